"""`python -m launch.rank JOB_FOLDER`: one rank of a submitted run."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.lock import PreparationEndedError
from launch.job import JobFolder
from launch.ranks import PLACE
from loglinear.errors import EXIT_REFUSED, UserError
from loglinear.train.signals import StopRequest


def place_of(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK and WORLD_SIZE: those that are given, or else what srun calls them."""
    return {name: environment.get(name) or environment[slurm] for name, slurm in PLACE.items()}


def main(folder: Path) -> None:
    """Train; a user's mistake is one sentence and exit code 2, a bad node is recorded and ends with 3.

    A preparation that was ended is no mistake: started again, it goes on.
    """
    stop = StopRequest()
    stop.listen()  # before anything that takes time: a signal must find us listening
    os.environ |= place_of(os.environ)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    job = JobFolder(folder)
    from loglinear.train.preflight import EXIT_BAD_NODE, FailedNodes
    from loglinear.train.run import train

    try:
        train(job.config(), stop)
    except UserError as error:
        end(f"loglinear: {error}", 1 if isinstance(error, PreparationEndedError) else EXIT_REFUSED)
    except FailedNodes as failure:
        if os.environ["RANK"] == "0":
            job.add_bad_nodes(failure.nodes)
        end(f"loglinear: {failure}", EXIT_BAD_NODE)


def end(words: str, code: int) -> None:
    """Say why, and end at once: leaving the group in good order could wait for ranks that do not answer any more."""
    print(words, flush=True)
    os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
