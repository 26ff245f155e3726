"""Preparation beside training: a process of its own, which ends with the trainer and may be continued."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial

from data_pipeline.files import write_bytes
from data_pipeline.lock import is_preparing, wait_while_preparing
from data_pipeline.manifest import LOG_FILE, read_preparation
from data_pipeline.prepare import make_data_folder
from data_pipeline.prepared import is_complete, open_tokenizer
from data_pipeline.rows import Rows
from data_pipeline.shards import ShardReader
from loglinear.config import Config, DataConfig

COMMAND = (sys.executable, "-m", "loglinear", "data", "prepare")
CONFIG_FILE = "prepare.yaml"
PR_SET_PDEATHSIG = 1


def start_preparation(config: Config) -> subprocess.Popen[bytes] | None:
    """Prepare `config.data` in a process of its own, unless that is done or another process is at it.

    Its output goes to `prepare.log` in `data.dir`. On Linux it is ended with the thread that called this.

    Raises:
        UserError: the folder cannot be made, or holds data of other settings.
    """
    folder = config.data.dir
    make_data_folder(folder)
    if is_complete(config.data, config.model.vocab_size) or is_preparing(folder):
        return None
    config_file = folder / CONFIG_FILE
    write_bytes(config_file, config.to_yaml().encode())
    with (folder / LOG_FILE).open("ab") as log:
        return subprocess.Popen(
            [*COMMAND, str(config_file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent_alone(),
        )


def wait_until_ready(
    data: DataConfig,
    *,
    vocab_size: int,
    samples: int,
    seq_len: int,
    process: subprocess.Popen[bytes] | None,
    is_over: Callable[[], bool],
) -> bool:
    """Wait until the tokenizer and the first `samples` training samples are prepared, or all that there are.

    Of a mixture everything must be: where a source runs out, and others take its place, is known only then.

    Args:
        data: what is prepared.
        vocab_size: of the model.
        samples: how many are needed.
        seq_len: their length.
        process: what `start_preparation` returned. Whoever else looks at `data.dir` may do so only after this has
            returned on the rank that started it: before that, the preparation may not have taken its lock.
        is_over: whether to wait no longer.

    Returns:
        False if `is_over` said so before.

    Raises:
        UserError: the preparation failed; its last words are quoted.
    """
    wait_until = partial(wait_while_preparing, data.dir, process=process, is_over=is_over)
    has_begun = wait_until(lambda: process is None or is_preparing(data.dir) or is_complete(data, vocab_size))
    if not has_begun or not wait_until(lambda: read_preparation(data.dir) is not None):
        return False
    if data.is_mixture:
        return wait_until(lambda: is_complete(data, vocab_size))
    tokenizer = open_tokenizer(data, vocab_size)
    rows = Rows(ShardReader(data.dir, "train", tokenizer.sha256), seq_len, data.best_fit)
    return wait_until(lambda: rows.has(samples))


def end_with_parent() -> Callable[[], None] | None:
    """What a child runs before its program so that the kernel ends it when its parent is gone."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: after the fork little is safe to do
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end_with_parent_alone() -> Callable[[], None]:
    """The same for a child that goes on when its parent is asked to save or stop: such signals, from a terminal or from
    SLURM, reach children too."""
    end = end_with_parent()

    def before_program() -> None:
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        if end is not None:
            end()

    return before_program
