"""Decoding one token behind a long context: time and memory of whole models, beside a baseline with a key-value cache.

States are random rather than read from a prompt: what a step costs depends on their shapes alone, and a prompt of a
million tokens would take a softmax model hours. A log-linear state just before position `context`, a power of two, has
all its buckets but the smallest occupied, which is the dearest case. The baseline's cache is allocated beforehand and
written in place, so that no step copies it, and on a GPU it may take the fastest of torch's attention kernels.

On a GPU steps are CUDA graphs: of log-linear models those of `Decoder`; of others one that repeats the step behind the
whole context, which is what a cache of fixed size could reach at best.

Shapes: b batch, t time, s key, h head, k bucket, n state (key) size, p value head size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch.nn.attention import SDPBackend, sdpa_kernel

from data_pipeline.files import make_folder
from loglinear.bench.machine import chosen_device, keep, machine
from loglinear.config import Config
from loglinear.errors import UserError
from loglinear.model import DecodeState, LanguageModel, build_model
from loglinear.model.attention import KeyValueCache, SoftmaxMixer
from loglinear.model.decoder import Decoder
from loglinear.model.mixer import LogLinearMixer, MixerState
from loglinear.ops import LogLinearState
from loglinear.ops.graphs import run_aside

COMMAND = "loglinear bench decode"
WARM_UP, STEPS, TRIES = 4, 8, 3
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)  # those that split a long cache
SHARE = 0.8  # of the free memory of a GPU that a state may take


Step = Callable[[torch.Tensor], object]  # reads tokens [B, 1]


@dataclass(frozen=True)
class DecodePoint:
    """A step of one model: `batch` sequences read a token each behind `context` tokens.

    Attributes:
        milliseconds: of the step, the median; None if the state does not fit the memory, or no kernel takes it.
        state_bytes: of everything kept between steps, over the whole batch.
        attention: which of torch's attention kernels was the fastest, if that was asked.
    """

    model: str
    batch: int
    context: int
    milliseconds: float | None
    state_bytes: int
    attention: str | None


@dataclass(frozen=True)
class PreallocatedCache(KeyValueCache):
    """A cache that writes into `buffers` [B, capacity, H, P], for rows without padding."""

    buffers: tuple[torch.Tensor, torch.Tensor]

    def append(self, k_bthp: torch.Tensor, v_bthp: torch.Tensor, tokens: torch.Tensor) -> PreallocatedCache:
        """With [B, T, H, P] more, in place; an older cache of the same buffers must not be appended to again."""
        start, end = self.k_bshp.shape[1], self.k_bshp.shape[1] + k_bthp.shape[1]
        for buffer_bshp, new_bthp in zip(self.buffers, (k_bthp, v_bthp), strict=True):
            buffer_bshp[:, start:end] = new_bthp
        k_bshp, v_bshp = (buffer_bshp[:, :end] for buffer_bshp in self.buffers)
        return replace(self, k_bshp=k_bshp, v_bshp=v_bshp, lengths=self.lengths + tokens)


def bench_decode(
    configs: list[Config], contexts: tuple[int, ...], batches: tuple[int, ...], device: str | None, out: Path | None
) -> list[DecodePoint]:
    """Time a decoding step of each model behind each context, and print a table.

    Args:
        configs: runs whose models are timed, with random weights; the last is the baseline.
        contexts: tokens before the last timed one, at least 32.
        batches: sequences that are decoded at once.
        device: "cpu" or "cuda"; None takes a GPU if there is one.
        out: a folder for `decode.json`, `decode.md` and the plot `decode.png`; None writes nothing.

    Returns:
        A point for each model, batch and context.

    Raises:
        UserError: a context is too short to be timed, there is no such device, or `out` cannot be written to.
    """
    if min(contexts) < WARM_UP + STEPS * TRIES:
        raise UserError(f"a context of {min(contexts)} tokens is too short: time {WARM_UP + STEPS * TRIES} or more")
    place = chosen_device(device)
    if out is not None:
        make_folder(out)
    console = Console()
    points = []
    for config in configs:
        model = build_model(config.model, 0).to(place, _dtype(place)).eval()
        pairs = [(batch, context) for batch in batches for context in contexts]
        for batch, context in track(pairs, f"timing {config.run.name}", console=console, transient=True):
            points.append(_point(config, model, batch, context, place))
            if out is not None:
                keep(out / "decode.json", _machine(place), points)
        del model
    text = _markdown(points, place)
    console.print(text, highlight=False, soft_wrap=True)
    if out is not None:
        (out / "decode.md").write_text(text)
        _plot(out / "decode.png", points)
        console.print(f"written: {out / 'decode.json'}, decode.md and decode.png", highlight=False)
    return points


def random_state(model: LanguageModel, batch: int, position: int, spare: int) -> DecodeState:
    """A state after `position` tokens of `batch` sequences with room for `spare` more, as a prompt would leave it."""
    layers = tuple(_random_layer(block.mixer, batch, position, spare) for block in model.blocks)  # pyright: ignore
    return DecodeState(layers, torch.full((batch,), position))


def _random_layer(mixer: Any, batch: int, position: int, spare: int) -> MixerState | KeyValueCache:
    empty = mixer.initial_state(batch)
    positions = torch.full((batch,), position)
    if isinstance(mixer, SoftmaxMixer):
        heads, size = empty.k_bshp.shape[2:]
        k, v = (empty.k_bshp.new_empty(batch, position + spare, heads, size).normal_() for _ in range(2))
        return PreallocatedCache(k[:, :position], v[:, :position], positions, (k, v))
    assert isinstance(mixer, LogLinearMixer)
    heads, size = empty.memory.buckets.shape[1], empty.memory.buckets.shape[3:]
    buckets_bhknp = empty.memory.buckets.new_empty(batch, heads, position.bit_length(), *size).normal_()
    for bucket in range(position.bit_length()):
        if not position >> bucket & 1:
            buckets_bhknp[:, :, bucket] = 0
    return MixerState(LogLinearState(buckets_bhknp, positions), tuple(x.normal_() for x in empty.recent))


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in a state; of a cache that was allocated beforehand, those in use."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if is_dataclass(state):
        return sum(state_bytes(getattr(state, field.name)) for field in fields(state) if field.name != "buffers")
    return sum(map(state_bytes, state))


def _point(config: Config, model: LanguageModel, batch: int, context: int, device: torch.device) -> DecodePoint:
    with torch.device("meta"):
        twin = LanguageModel(config.model).to(_dtype(device))
    size = state_bytes(random_state(twin, batch, context, 0))
    name = config.run.name
    if device.type == "cuda" and size > SHARE * torch.cuda.mem_get_info(device)[0]:
        return DecodePoint(name, batch, context, None, size, None)
    times = dict(_times(model, batch, context, device))
    fastest = min(times, key=lambda attention: times[attention], default=None)
    return DecodePoint(name, batch, context, times.get(fastest), size, fastest)


def _times(model: LanguageModel, batch: int, context: int, device: torch.device) -> Iterator[tuple[str | None, float]]:
    """Milliseconds of a step of a softmax model by attention kernel, but for those that do not take the shapes.

    Of others, whose states a graph cannot write twice, as they are decoded.
    """
    is_softmax = all(isinstance(block.mixer, SoftmaxMixer) for block in model.blocks)
    if device.type != "cuda" or not is_softmax:
        steps = WARM_UP + STEPS * TRIES
        decoder = Decoder(model, random_state(model, batch, context - steps, steps))
        yield None, _milliseconds(decoder.step, batch, device)
        return
    state = random_state(model, batch, context - 1, 1)
    for backend in BACKENDS:
        with sdpa_kernel(backend):
            try:
                yield backend.name, _milliseconds(_repeated(model, state), batch, device)
            except RuntimeError:
                continue


@torch.no_grad()
def _repeated(model: LanguageModel, state: DecodeState) -> Step:
    """A graph of the step behind `state`, which only ever writes the same place of its caches."""
    device = model.embedding.weight.device
    tokens_b1 = torch.zeros(len(state.positions), 1, dtype=torch.int64, device=device)
    run_aside(lambda: model.decode(tokens_b1, state))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.decode(tokens_b1, state)
    return lambda tokens_b1: graph.replay()


def _milliseconds(step: Step, batch: int, device: torch.device) -> float:
    """The median over tries of the mean over steps, the last of which reads the context's last token."""
    tokens_b1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    times = []
    for run in range(TRIES + 1):
        _wait(device)
        start = time.perf_counter()
        count = STEPS if run else WARM_UP
        for _ in range(count):
            step(tokens_b1)
        _wait(device)
        times.append(1e3 * (time.perf_counter() - start) / count)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _machine(device: torch.device) -> dict[str, str | int]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return machine(COMMAND) | {"device": name, "dtype": str(_dtype(device)).removeprefix("torch.")}


def _markdown(points: list[DecodePoint], device: torch.device) -> str:
    """A table: a row for each batch and context, columns of every model and their ratio to the last."""
    names = list(dict.fromkeys(point.model for point in points))
    found = {(point.model, point.batch, point.context): point for point in points}
    head = ["batch", "context", *(f"{name}: ms, state" for name in names), *(f"{name}: times" for name in names[:-1])]
    rows = [head, ["---:"] * len(head)]
    for batch, context in dict.fromkeys((point.batch, point.context) for point in points):
        cells = [found[name, batch, context] for name in names]
        rows.append([f"{batch}", f"{context:,}", *map(_cell, cells), *(_ratio(cell, cells[-1]) for cell in cells[:-1])])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    about = _machine(device)
    return (
        f"{about['device']} ({about['processor']}), {about['date']}, torch {about['torch']}, {about['dtype']}; "
        f"`{COMMAND}`. Milliseconds of a decoding step of the whole batch, and bytes kept between "
        f"steps, all layers. Times: how many times faster and smaller than {names[-1]}.\n\n{table}\n"
    )


def _cell(point: DecodePoint) -> str:
    size = f"{point.state_bytes / 1e6:,.2f} MB"
    return f"does not fit, {size}" if point.milliseconds is None else f"{point.milliseconds:.2f}, {size}"


def _ratio(point: DecodePoint, baseline: DecodePoint) -> str:
    smaller = f"{baseline.state_bytes / point.state_bytes:.1f}"
    if point.milliseconds is None or baseline.milliseconds is None:
        return f"-, {smaller}"
    return f"{baseline.milliseconds / point.milliseconds:.2f}, {smaller}"


def _plot(path: Path, points: list[DecodePoint]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharex=True, layout="constrained")
    for name, batch in dict.fromkeys((point.model, point.batch) for point in points):
        line = [point for point in points if (point.model, point.batch) == (name, batch)]
        timed = [(point.context, point.milliseconds) for point in line if point.milliseconds is not None]
        axes[0].plot(*zip(*timed, strict=True), marker="o", label=f"{name}, batch {batch}")
        axes[1].plot([p.context for p in line], [p.state_bytes / 1e6 for p in line], marker="o")
    axes[0].set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="milliseconds a step")
    axes[1].set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="MB kept between steps")
    figure.legend(loc="outside lower center", ncols=4)
    for axis in axes:
        axis.grid(True, which="both", alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)
