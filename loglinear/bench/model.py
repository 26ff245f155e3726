"""Whole training steps of whole models on one device: throughput, utilisation and peak memory against length.

A step is forward, backward, clipping and AdamW: on a GPU with weights and gradients in bf16 and an fp32 copy for the
optimizer, as DeepSpeed trains, on a CPU in fp32. Tokens are random. A step that does not fit the memory is tried again
with half of the blocks recomputed in the backward pass, then with all, and marked. Softmax models use cuDNN's attention
where there is one.

Where flash-linear-attention is installed, its LogLinearMamba2 is timed too, with as many layers as give it the
parameters of the first model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from data_pipeline.files import make_folder
from loglinear.bench.machine import chosen_device, keep, machine
from loglinear.config import Config
from loglinear.model import build_model
from loglinear.ops.peak import TRAINING_FLOPS, peak_flops

COMMAND = "loglinear bench model"
WARM_UP, STEPS = 2, 5
THEIRS, THEIRS_LONGEST = "fla LogLinearMamba2", 16384  # tokens; its layer has levels for no more
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # mean over tokens, of inputs and labels [B, T]


@dataclass(frozen=True)
class ModelPoint:
    """Training steps of one model on sequences of `length` tokens.

    Attributes:
        parameters: of the model; 0 if it does not fit.
        seconds: of a step of `tokens` tokens, the median; None if it does not fit the memory.
        mfu: model FLOPs, recomputation not counted, over the device's peak; None where they are not counted.
        peak_bytes: at the step's peak, on a GPU; None elsewhere.
        recomputed: how many blocks are recomputed in the backward pass.
    """

    model: str
    parameters: int
    length: int
    tokens: int
    seconds: float | None
    mfu: float | None
    peak_bytes: int | None
    recomputed: int


@dataclass(frozen=True)
class _Contender:
    """A model to be timed: built for a length and a number of recomputed blocks, `recomputed` one after the other."""

    name: str
    build: Callable[[int, int], tuple[nn.Module, Loss]]
    recomputed: tuple[int, ...]
    flops_per_token: Callable[[int], int] | None
    longest: int


def bench_model(
    configs: list[Config], lengths: tuple[int, ...], tokens: int, device: str | None, out: Path | None
) -> list[ModelPoint]:
    """Time training steps of each model at each length, and print a table.

    Args:
        configs: runs whose models are timed, with random weights; the last is the baseline.
        lengths: of the sequences, in tokens.
        tokens: of a step; a longer sequence is a step of its own.
        device: "cpu" or "cuda"; None takes a GPU if there is one.
        out: a folder for `model.json`, `model.md` and the plot `model.png`; None writes nothing.

    Returns:
        A point for each model and length.

    Raises:
        UserError: the GPU's peak speed is not known, there is no such device, or `out` cannot be written to.
    """
    place = chosen_device(device)
    peak = peak_flops(place, configs[0].train.peak_tflops)
    if out is not None:
        make_folder(out)
    console, points = Console(), []
    for contender in _contenders(configs, place):
        own = [length for length in lengths if length <= contender.longest]
        for length in track(own, f"timing {contender.name}", console=console, transient=True):
            points.append(_point(contender, length, max(1, tokens // length), place, peak))
            if out is not None:
                keep(out / "model.json", _machine(place), points, peak_flops=peak)
    text = _markdown(points, place)
    console.print(text, highlight=False, soft_wrap=True)
    if out is not None:
        (out / "model.md").write_text(text)
        _plot(out / "model.png", points)
        console.print(f"written: {out / 'model.json'}, model.md and model.png", highlight=False)
    return points


def _contenders(configs: list[Config], device: torch.device) -> Iterator[_Contender]:
    for config in configs:
        yield _ours(config)
    if device.type == "cuda" and find_spec("fla") is not None:
        yield _theirs(configs[0])


def _ours(config: Config) -> _Contender:
    def at(length: int) -> Any:
        return config.model.model_copy(update={"seq_len": length})

    def build(length: int, recomputed: int) -> tuple[nn.Module, Loss]:
        model = build_model(at(length), 0, recomputed_blocks=recomputed)
        return model, lambda inputs_bt, labels_bt: model(inputs_bt, labels_bt) / inputs_bt.numel()

    def flops(length: int) -> int:
        with torch.device("meta"):
            return TRAINING_FLOPS * build_model(at(length), 0).flops_per_token(length)

    layers = config.model.layers
    return _Contender(config.run.name, build, (0, layers // 2, layers), flops, 1 << 62)


def _theirs(config: Config) -> _Contender:
    own, fla = config.model, import_module("fla.models.log_linear_mamba2")

    def make(layers: int) -> Any:
        settings = fla.LogLinearMamba2Config(
            hidden_size=own.dim,
            num_hidden_layers=layers,
            head_dim=own.log_linear.head_dim,
            num_heads=2 * own.dim // own.log_linear.head_dim,  # it expands the width by two
            state_size=own.log_linear.state_dim,
            vocab_size=own.vocab_size,
            tie_word_embeddings=own.tie_embeddings,
        )
        return fla.LogLinearMamba2ForCausalLM(settings)

    with torch.device("meta"):
        one, two, wanted = _parameters(make(1)), _parameters(make(2)), _parameters(build_model(own, 0))
    layers = max(1, 1 + round((wanted - one) / (two - one)))

    def build(length: int, recomputed: int) -> tuple[nn.Module, Loss]:
        model = make(layers)
        if recomputed:
            model.gradient_checkpointing_enable()
        return model, lambda inputs_bt, labels_bt: model(input_ids=inputs_bt, labels=labels_bt).loss

    return _Contender(THEIRS, build, (0, layers), None, THEIRS_LONGEST)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _point(contender: _Contender, length: int, batch: int, device: torch.device, peak: float) -> ModelPoint:
    measured, recomputed = None, 0
    for recomputed in contender.recomputed:
        measured = _measure(contender, length, batch, device, recomputed)
        if measured is not None:
            break
        torch.cuda.empty_cache()
    tokens, mfu = batch * length, None
    parameters, seconds, peak_bytes = measured or (0, None, None)
    if seconds is not None and contender.flops_per_token is not None:
        mfu = tokens * contender.flops_per_token(length) / seconds / peak
    return ModelPoint(contender.name, parameters, length, tokens, seconds, mfu, peak_bytes, recomputed)


def _measure(
    contender: _Contender, length: int, batch: int, device: torch.device, recomputed: int
) -> tuple[int, float, int | None] | None:
    """Parameters, seconds of a step and bytes at its peak; None if it does not fit the memory."""
    try:
        with device:
            model, loss = contender.build(length, recomputed)
        return _parameters(model), *_time(model, loss, batch, length, device)
    except torch.OutOfMemoryError:
        return None


def _time(model: nn.Module, loss: Loss, batch: int, length: int, device: torch.device) -> tuple[float, int | None]:
    """The median seconds of a step, and the bytes at its peak on a GPU."""
    on_gpu = device.type == "cuda"
    model.to(device, torch.bfloat16 if on_gpu else torch.float32).train()
    step = _Optimizer(model)
    vocabulary = next(module for module in model.modules() if isinstance(module, nn.Embedding)).num_embeddings
    tokens_bt = torch.randint(vocabulary, (batch, length + 1), device=device)
    seconds = []
    for run in range(WARM_UP + STEPS):
        if on_gpu:
            torch.cuda.synchronize(device)
            if run == WARM_UP:
                torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        with _attention(on_gpu):
            loss(tokens_bt[:, :-1], tokens_bt[:, 1:]).backward()
        step.update()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:]), torch.cuda.max_memory_allocated(device) if on_gpu else None


def _attention(on_gpu: bool) -> AbstractContextManager[object]:
    return sdpa_kernel(ATTENTION, set_priority=True) if on_gpu else nullcontext()


class _Optimizer:
    """AdamW on an fp32 copy of the weights, which are it themselves if they are fp32."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = list(model.parameters())
        self._masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self._weights]
        self._adamw = torch.optim.AdamW(self._masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def update(self) -> None:
        """One step from the weights' gradients, which are cleared."""
        for weight, master in zip(self._weights, self._masters, strict=True):
            if master is not weight:
                master.grad, weight.grad = weight.grad.float() if weight.grad is not None else None, None
        nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._adamw.step()
        self._adamw.zero_grad()
        with torch.no_grad():
            for weight, master in zip(self._weights, self._masters, strict=True):
                if master is not weight:
                    weight.copy_(master)


def _machine(device: torch.device) -> dict[str, str | int]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return machine(COMMAND) | {"device": name}


def _markdown(points: list[ModelPoint], device: torch.device) -> str:
    """A table: a row for each length, a column for each model and for how many times faster it is than the baseline."""
    names = list(dict.fromkeys(point.model for point in points))
    baseline = next((name for name in reversed(names) if name != THEIRS), names[-1])
    found = {(point.model, point.length): point for point in points}
    sizes = {name: max(point.parameters for point in points if point.model == name) for name in names}
    rows = [["T", *(f"{name} ({sizes[name] / 1e6:.0f}M)" for name in names)]]
    rows.append(["---:"] * len(rows[0]))
    for length in sorted({point.length for point in points}):
        base = found.get((baseline, length))
        rows.append([f"{length:,}", *(_cell(found.get((name, length)), base) for name in names)])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    about = _machine(device)
    return (
        f"{about['device']} ({about['processor']}), {about['date']}, torch {about['torch']}; `{COMMAND}`. Tokens a "
        f"second of whole training steps, MFU, GB at the peak, times the speed of {baseline}; * half or all blocks"
        " recomputed."
        f"\n\n{table}\n"
    )


def _cell(point: ModelPoint | None, baseline: ModelPoint | None) -> str:
    if point is None:
        return "-"
    if point.seconds is None:
        return "does not fit"
    parts = [f"{point.tokens / point.seconds:,.0f}{'*' if point.recomputed else ''}"]
    if point.mfu is not None:
        parts.append(f"{100 * point.mfu:.1f} %")
    if point.peak_bytes is not None:
        parts.append(f"{point.peak_bytes / 1e9:.1f} GB")
    if baseline is not None and baseline.seconds is not None and baseline is not point:
        parts.append(f"{baseline.seconds / baseline.tokens * point.tokens / point.seconds:.2f}x")
    return ", ".join(parts)


def _plot(path: Path, points: list[ModelPoint]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(point.model for point in points):
        line = [(p.length, p.tokens / p.seconds) for p in points if p.model == name and p.seconds is not None]
        axis.plot(*zip(*line, strict=True), marker="o", label=name)
    axis.set(xscale="log", yscale="log", xlabel="tokens of a sequence", ylabel="tokens a second")
    axis.grid(True, which="both", alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
