"""The op on a GPU beside other attentions on the same GPU, in one run.

Shapes: b batch, t time, h value head, g query/key group, n state (key) size, p value head size, l level.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
import triton
from rich.console import Console
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from data_pipeline.files import make_folder
from loglinear.bench.machine import keep
from loglinear.errors import UserError
from loglinear.ops import log_linear_attention, num_levels
from loglinear.ops.flops import attention_flops

HEADS, GROUPS, STATE_DIM, HEAD_DIM = 32, 1, 128, 64  # of log-linear attention
SOFTMAX_HEADS, SOFTMAX_DIM = 16, 128  # as wide
TOKENS = 65536  # of a call, unless one sequence is longer
LENGTHS = tuple(2048 << doubling for doubling in range(7))  # 2K to 131K tokens
OURS_ONLY = (262144, 524288, 1048576)
OURS = "log-linear, ours"
PACKAGES = {"softmax, FlashAttention-3": "flash_attn_interface", "softmax, FlashAttention-4": "flash_attn.cute"}

Op = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Timing:
    """Median times of one call of `tokens` tokens in sequences of `length`, and the memory at its peak."""

    op: str
    length: int
    tokens: int
    forward_ms: float
    training_ms: float  # forward and backward
    peak_gb: float  # of forward and backward, inputs and gradients included


@dataclass(frozen=True)
class Ceilings:
    """What this GPU does at best, measured."""

    matrix_tflops: float  # 8192 x 8192 x 8192 in bf16
    copy_tbs: float  # bytes read and written


def bench_kernels(out: Path | None = None, lengths: tuple[int, ...] = LENGTHS + OURS_ONLY) -> list[Timing]:
    """Time the kernels beside cuDNN's and FlashAttention-2, and print a table.

    Where installed also beside flash-linear-attention's, FlashAttention-3 and FlashAttention-4.

    Args:
        out: a folder for `kernels.json`, `kernels.md` and the plot `kernels.png`; None writes nothing.
        lengths: of the sequences, in tokens; those above 131,072 are measured for the kernels alone.

    Returns:
        Median times in milliseconds and peak memory in GB (1e9 bytes), by op and length.

    Raises:
        UserError: there is no CUDA GPU, or `out` cannot be written to.
    """
    if not torch.cuda.is_available():
        raise UserError("bench kernels measures a CUDA GPU, and this machine has none: try `loglinear bench ops`")
    if out is not None:
        make_folder(out)
    console = Console()
    ceilings = _ceilings()
    timings = []
    for timing in _timings(lengths):
        timings.append(timing)
        if out is not None:
            keep(out / "kernels.json", _machine(), timings, ceilings=asdict(ceilings))
        console.print(
            f"{timing.op:26} T {timing.length:8,}  {timing.forward_ms:8.2f} / {timing.training_ms:8.2f} ms  "
            f"{timing.peak_gb:6.2f} GB",
            highlight=False,
        )
    text = _markdown(timings, ceilings)
    console.print(text, highlight=False)
    if out is not None:
        (out / "kernels.md").write_text(text)
        _plot(out / "kernels.png", timings)
        console.print(f"written: {out / 'kernels.json'}, kernels.md and kernels.png", highlight=False)
    return timings


def _timings(lengths: tuple[int, ...]) -> Iterator[Timing]:
    for name, (op, leaves) in _ops().items():
        for length in lengths:
            if length in OURS_ONLY and name != OURS:
                continue
            yield _time(name, op, leaves(max(1, TOKENS // length), length))
            torch.cuda.empty_cache()


def _time(name: str, op: Op, leaves: tuple[torch.Tensor, ...]) -> Timing:
    batch, length = leaves[-1].shape[:2]
    do_bthp = torch.randn_like(op(*leaves))

    def train() -> None:
        torch.autograd.grad(op(*leaves), leaves, do_bthp)

    with torch.no_grad():
        forward = _median_ms(lambda: op(*leaves))
    training = _median_ms(train)
    torch.cuda.reset_peak_memory_stats()
    train()
    peak = torch.cuda.max_memory_allocated() / 1e9
    return Timing(name, length, batch * length, forward, training, peak)


def _median_ms(function: Callable[[], object]) -> float:
    return cast(float, triton.testing.do_bench(function, warmup=30, rep=150, return_mode="median"))


def _ceilings() -> Ceilings:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matrix = 2 * 8192**3 / _median_ms(lambda: a @ b) / 1e9
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _median_ms(lambda: target.copy_(source)) / 1e9
    return Ceilings(matrix, copy)


def _ops() -> dict[str, tuple[Op, Callable[[int, int], tuple[torch.Tensor, ...]]]]:
    """The ops by name, each with a function that makes its inputs; the last input begins with [B, T]."""
    ops = {OURS: (_ours, _log_linear_leaves)}
    if find_spec("fla") is not None:
        theirs = import_module("fla.ops.log_linear_attn").chunk_log_linear_attn
        ops["log-linear, fla"] = (lambda *leaves: theirs(*leaves)[0], _log_linear_leaves)
    ops["softmax, cuDNN"] = (_softmax(SDPBackend.CUDNN_ATTENTION), _softmax_leaves)
    ops["softmax, FlashAttention-2"] = (_softmax(SDPBackend.FLASH_ATTENTION), _softmax_leaves)
    for name, package in PACKAGES.items():
        if _is_installed(package):
            ops[name] = (_flash(package), _softmax_leaves)
    return ops


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # not even the package that it is a part of
        return False


def _leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def _log_linear_leaves(batch: int, length: int) -> tuple[torch.Tensor, ...]:
    q_btgn, k_btgn = (_leaf(batch, length, GROUPS, STATE_DIM) for _ in range(2))
    g_bth = (-0.1 * torch.rand(batch, length, HEADS, device="cuda")).requires_grad_()
    scales_bthl = torch.rand(batch, length, HEADS, num_levels(length), device="cuda").bfloat16().requires_grad_()
    return q_btgn, k_btgn, _leaf(batch, length, HEADS, HEAD_DIM), g_bth, scales_bthl


def _softmax_leaves(batch: int, length: int) -> tuple[torch.Tensor, ...]:
    return tuple(_leaf(batch, length, SOFTMAX_HEADS, SOFTMAX_DIM) for _ in range(3))


def _ours(*leaves: torch.Tensor) -> torch.Tensor:
    return log_linear_attention(*leaves)[0]


def _softmax(backend: SDPBackend) -> Op:
    def attend(*leaves: torch.Tensor) -> torch.Tensor:
        q_bhtp, k_bhtp, v_bhtp = (x.transpose(1, 2) for x in leaves)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q_bhtp, k_bhtp, v_bhtp, is_causal=True).transpose(1, 2)

    return attend


def _flash(package: str) -> Op:
    """Causal attention of [B, T, H, P] by a package that FlashAttention's authors publish."""
    function = import_module(package).flash_attn_func

    def attend(*leaves: torch.Tensor) -> torch.Tensor:
        o = function(*leaves, causal=True)
        return o[0] if isinstance(o, tuple) else o  # some give the logarithms of the sums, too

    return attend


def _forward_tflop(timing: Timing) -> float:
    """Matrix products of our forward pass in 1e12 FLOP."""
    return timing.tokens * attention_flops(timing.length, HEADS, GROUPS, STATE_DIM, HEAD_DIM) / 1e12


def _forward_tb(timing: Timing) -> float:
    """Inputs and output of our forward pass in 1e12 bytes, each counted once."""
    numbers = 2 * GROUPS * STATE_DIM + 2 * HEADS * HEAD_DIM + HEADS * num_levels(timing.length)
    return timing.tokens * (2 * numbers + 4 * HEADS) / 1e12


def _markdown(timings: list[Timing], ceilings: Ceilings) -> str:
    machine = _machine()
    found = {(timing.op, timing.length): timing for timing in timings}
    names = list(dict.fromkeys(timing.op for timing in timings))
    rows = [["T", *names, "ours: TFLOP/s, TB/s forward"]]
    for length in dict.fromkeys(timing.length for timing in timings):
        cells = [f"{length:,}"]
        for name in names:
            timing = found.get((name, length))
            cells.append("-" if timing is None else _cell(timing))
        ours = found[OURS, length]
        seconds = ours.forward_ms / 1e3
        rows.append([*cells, f"{_forward_tflop(ours) / seconds:,.0f}, {_forward_tb(ours) / seconds:.2f}"])
    rows.insert(1, ["---:"] * len(rows[0]))
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    return (
        f"{machine['gpu']}, {machine['date']}, torch {machine['torch']}, Triton {machine['triton']}; "
        f"`{machine['command']}`. Milliseconds forward / forward + backward, and GB at the peak; {TOKENS:,} tokens a "
        f"call, or one sequence; bf16; log-linear {HEADS} heads x {HEAD_DIM}, state {STATE_DIM}, softmax "
        f"{SOFTMAX_HEADS} x {SOFTMAX_DIM}. This GPU multiplies at {ceilings.matrix_tflops:,.0f} TFLOP/s and copies "
        f"at {ceilings.copy_tbs:.2f} TB/s.\n\n{table}\n\n{_growth(timings)}"
    )


def _cell(timing: Timing) -> str:
    return f"{timing.forward_ms:.2f} / {timing.training_ms:.2f}, {timing.peak_gb:.2f}"


def _growth(timings: list[Timing]) -> str:
    """One sentence: how our time per sequence grows between the longest and a sequence of 32,768 tokens."""
    ours = [timing for timing in timings if timing.op == OURS and timing.length >= 32768]
    if len(ours) < 2:
        return ""
    first, last = ours[0], ours[-1]
    per_sequence = [timing.training_ms * timing.length / timing.tokens for timing in (first, last)]
    slope = math.log(per_sequence[1] / per_sequence[0]) / math.log(last.length / first.length)
    return f"Ours, forward + backward, grows as T^{slope:.3f} from {first.length:,} to {last.length:,} tokens.\n"


def _machine() -> dict[str, str | int]:
    return {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": "loglinear bench kernels",
    }


def _plot(path: Path, timings: list[Timing]) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharex=True, layout="constrained")
    for axis, what in zip(axes, ("forward_ms", "training_ms"), strict=True):
        for name in dict.fromkeys(timing.op for timing in timings):
            of_op = [timing for timing in timings if timing.op == name]
            per_token = [1e6 * getattr(timing, what) / timing.tokens for timing in of_op]
            axis.plot([timing.length for timing in of_op], per_token, marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens of a sequence", ylabel="nanoseconds a token")
        axis.set_title({"forward_ms": "forward", "training_ms": "forward + backward"}[what])
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
