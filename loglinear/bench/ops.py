"""How the op's time grows with length on this machine, beside softmax attention.

Shapes: b batch, t time, h value head, g query/key group, n state (key) size, p value head size, l level.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from torch.nn import functional as F

from data_pipeline.files import make_folder
from loglinear.bench.machine import keep, machine
from loglinear.ops import log_linear_attention, num_levels

HEADS, GROUPS, STATE_DIM, HEAD_DIM = 4, 1, 32, 32
COMMAND = "loglinear bench ops"
LENGTHS = tuple(1024 << doubling for doubling in range(7))  # 1K to 64K tokens
FIT_FROM = 4096  # shorter sequences cost mostly the start of each call
RUNS, BUDGET = (3, 15), 3.0  # timed runs of a point, as many as fit into so many seconds
PATIENCE = 4.0  # seconds; a run that takes longer is not repeated, and its op not tried at longer sequences

Op = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Timing:
    """Median times of one sequence of `tokens` tokens, in milliseconds."""

    op: str
    tokens: int
    forward_ms: float
    training_ms: float  # forward and backward


def bench_ops(out: Path | None = None) -> list[Timing]:
    """Time log-linear and softmax attention from 1K to 64K tokens on the CPU, and print a table.

    Args:
        out: a folder for `ops.json`, `ops.md` and the plot `ops.png`; None writes nothing.

    Returns:
        Median times in milliseconds, by op and length in tokens.

    Raises:
        UserError: `out` cannot be written to.
    """
    if out is not None:
        make_folder(out)
    console = Console()
    timings = []
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("timing", total=2 * len(LENGTHS))
        for timing in _timings():
            timings.append(timing)
            progress.update(task, advance=1, description=f"{timing.op}, {timing.tokens} tokens")
        progress.update(task, total=len(timings))
    console.print(_table(timings))
    for line in _fits(timings):
        console.print(line, highlight=False)
    if out is not None:
        _write(out, timings)
        console.print(f"written: {out / 'ops.json'}, ops.md and ops.png", highlight=False)
    return timings


def exponent(tokens: list[int], times: list[float]) -> float:
    """The slope of log time against log tokens, by least squares: 1 is linear, 2 quadratic."""
    x, y = ([math.log(value) for value in values] for values in (tokens, times))
    return statistics.linear_regression(x, y).slope


def _timings() -> Iterator[Timing]:
    for name, (op, leaves) in OPS.items():
        for tokens in LENGTHS:
            timing = _time(name, op, leaves(tokens))
            yield timing
            if timing.training_ms > 1e3 * PATIENCE:
                break


def _time(name: str, op: Op, leaves: tuple[torch.Tensor, ...]) -> Timing:
    tokens = leaves[0].shape[1]
    gradient_bthp = torch.randn(1, tokens, HEADS, HEAD_DIM)

    def train() -> None:
        torch.autograd.grad(op(*leaves), leaves, gradient_bthp)

    with torch.no_grad():
        forward = _median_ms(lambda: op(*leaves))
    return Timing(name, tokens, forward, _median_ms(train))


def _median_ms(function: Callable[[], object]) -> float:
    warm_up = _seconds(function)
    if warm_up > PATIENCE:
        return 1e3 * warm_up
    least, most = RUNS
    seconds: list[float] = []
    while len(seconds) < least or (len(seconds) < most and sum(seconds) < BUDGET):
        seconds.append(_seconds(function))
    return 1e3 * statistics.median(seconds)


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _leaf(*shape: int) -> torch.Tensor:
    return torch.randn(1, *shape).requires_grad_()


def _log_linear_leaves(tokens: int) -> tuple[torch.Tensor, ...]:
    g_bth = (-0.1 * torch.rand(1, tokens, HEADS)).requires_grad_()
    scales_bthl = torch.rand(1, tokens, HEADS, num_levels(tokens)).requires_grad_()
    q_btgn, k_btgn = _leaf(tokens, GROUPS, STATE_DIM), _leaf(tokens, GROUPS, STATE_DIM)
    return q_btgn, k_btgn, _leaf(tokens, HEADS, HEAD_DIM), g_bth, scales_bthl


def _softmax_leaves(tokens: int) -> tuple[torch.Tensor, ...]:
    return tuple(_leaf(tokens, HEADS, HEAD_DIM) for _ in range(3))


def _log_linear(*leaves: torch.Tensor) -> torch.Tensor:
    return log_linear_attention(*leaves)[0]


def _softmax(*leaves: torch.Tensor) -> torch.Tensor:
    q_bhtp, k_bhtp, v_bhtp = (x.transpose(1, 2) for x in leaves)
    o_bhtp = F.scaled_dot_product_attention(q_bhtp, k_bhtp, v_bhtp, is_causal=True)
    return o_bhtp.transpose(1, 2)


OPS: dict[str, tuple[Op, Callable[[int], tuple[torch.Tensor, ...]]]] = {
    "log-linear": (_log_linear, _log_linear_leaves),
    "softmax": (_softmax, _softmax_leaves),
}


def _rows(timings: list[Timing]) -> list[list[str]]:
    """Cells of the table: a row for each length, forward and training times of each op."""
    found = {(timing.op, timing.tokens): timing for timing in timings}
    rows = []
    for tokens in LENGTHS:
        cells = [f"{tokens:,}"]
        for op in OPS:
            timing = found.get((op, tokens))
            cells += ["-", "-"] if timing is None else [f"{timing.forward_ms:,.1f}", f"{timing.training_ms:,.1f}"]
        rows.append(cells)
    return rows


def _header() -> list[str]:
    return ["tokens", *(f"{op}: {what}" for op in OPS for what in ("forward", "forward + backward"))]


def _table(timings: list[Timing]) -> Table:
    table = Table(title=f"milliseconds, median; {_sizes()}")
    for name in _header():
        table.add_column(name, justify="right")
    for cells in _rows(timings):
        table.add_row(*cells)
    return table


def _fits(timings: list[Timing]) -> list[str]:
    """One sentence for each op: how its time grows, and how T log T would."""
    sentences = []
    for op in OPS:
        fitted = [timing for timing in timings if timing.op == op and timing.tokens >= FIT_FROM]
        if len(fitted) < 2:
            continue
        tokens = [timing.tokens for timing in fitted]
        forward = exponent(tokens, [timing.forward_ms for timing in fitted])
        training = exponent(tokens, [timing.training_ms for timing in fitted])
        sentences.append(
            f"{op}, {tokens[0]:,} to {tokens[-1]:,} tokens: time grows as T^{forward:.2f} forward, "
            f"T^{training:.2f} forward + backward (T log T would fit T^{exponent(tokens, _log_growth(tokens)):.2f})"
        )
    return sentences


def _log_growth(tokens: list[int]) -> list[float]:
    return [count * math.log2(count) for count in tokens]


def _sizes() -> str:
    return f"B = 1, H = {HEADS}, N = {STATE_DIM}, P = {HEAD_DIM}, G = {GROUPS}, fp32"


def _write(out: Path, timings: list[Timing]) -> None:
    keep(out / "ops.json", machine(COMMAND), timings, sizes=_sizes())
    (out / "ops.md").write_text(_markdown(timings))
    _plot(out / "ops.png", timings)


def _markdown(timings: list[Timing]) -> str:
    header = _header()
    rows = [header, ["---:"] * len(header), *_rows(timings)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    where = ", ".join(f"{name} {value}" for name, value in machine(COMMAND).items())
    return "\n\n".join([f"Milliseconds, median; {_sizes()}.", table, *_fits(timings), where]) + "\n"


def _plot(path: Path, timings: list[Timing]) -> None:
    """Time against length on logarithmic axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for op, colour in zip(OPS, ("tab:blue", "tab:red"), strict=True):
        points = [timing for timing in timings if timing.op == op]
        tokens = [timing.tokens for timing in points]
        axes.loglog(tokens, [x.training_ms for x in points], "o-", color=colour, label=f"{op}, forward + backward")
        axes.loglog(tokens, [x.forward_ms for x in points], "o--", color=colour, label=f"{op}, forward")
    axes.set_xticks(LENGTHS, [f"{tokens // 1024}K" for tokens in LENGTHS], minor=False)
    axes.minorticks_off()
    axes.set(xlabel="tokens", ylabel="milliseconds", title=_sizes())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
