"""`loglinear experiment`: one name runs an experiment, `report` writes what the results say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loglinear.errors import UserError

OUT = Path("docs/evidence")
STATE = Path("runs/experiments")

Name = Annotated[str, typer.Argument(help="mqar, mqar_contiguous, copying, novels; or report.", metavar="NAME")]
Modes = Annotated[str | None, typer.Option(help="Level scales, or softmax, with commas between; all if not given.")]
Seeds = Annotated[str | None, typer.Option(help="Seeds to report, such as 0-9 or 0,3; the protocol's if not given.")]
Rate = Annotated[float | None, typer.Option(help="A learning rate instead of the sweep's choice; no sweep then.")]
Minutes = Annotated[float | None, typer.Option(min=0.0, help="Stop cleanly after so many minutes.")]
Out = Annotated[Path, typer.Option(help="The folder of the results.")]
State = Annotated[Path, typer.Option(help="The folder that keeps groups of runs that were stopped.")]
Novels = Annotated[Path | None, typer.Option(help="The folder of train.jsonl.xz and val.jsonl.xz.")]


def experiment(
    name: Name,
    modes: Modes = None,
    seeds: Seeds = None,
    rate: Rate = None,
    minutes: Minutes = None,
    out: Out = OUT,
    state: State = STATE,
    novels: Novels = None,
) -> None:
    """Run an experiment of the protocol, going on where it stopped; or write the report of all results.

    Exit code 3 says that it was stopped before its end, and that the same command goes on.
    """
    if name == "report":
        from loglinear.experiments.report import write_report

        write_report(out)
        return
    from loglinear.experiments.protocol import load_protocol

    chosen = load_protocol().experiment(name)
    from loglinear.experiments.runner import Settings, run_experiment

    settings = Settings(
        modes=None if modes is None else tuple(modes.split(",")),  # pyright: ignore[reportArgumentType]
        seeds=None if seeds is None else parse_seeds(seeds),
        rate=rate,
        minutes=minutes,
        out=out,
        state=state,
        novels=novels,
    )
    if not run_experiment(name, chosen, settings):
        raise typer.Exit(3)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Numbers and ranges with commas between, in order and once each: 0-2,7 is 0, 1, 2, 7.

    Raises:
        UserError: it is not of that form, or names no seed.
    """
    seeds: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()):
            raise UserError(f"--seeds {text!r}: write numbers and ranges, such as 0-9 or 0,3")
        seeds |= set(range(int(first), int(last) + 1))
    if not seeds:
        raise UserError(f"--seeds {text!r} names no seed: write a range from its smaller number to its larger")
    return tuple(sorted(seeds))
