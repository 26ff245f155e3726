"""Many runs of one model at once: their weights side by side, and a step of every run in one CUDA graph.

Every run is a model of `loglinear.model` with weights, clipping and update of its own, so in a group it computes what
it would compute alone. On a GPU a step of all runs is one CUDA graph with a branch for each: such small models would
otherwise wait for the launches of their kernels, and the kernels of one run leave most of the GPU to the others.

Shapes: r run, w weight (all parameters of a model one after the other), e example, b batch, t time, n label, v token
of the vocabulary, d model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.optim.adamw import adamw

from loglinear.config import Config
from loglinear.experiments.examples import Examples
from loglinear.model import LanguageModel, build_model
from loglinear.ops.checks import at_least_fp32
from loglinear.ops.graphs import run_aside
from loglinear.train.schedule import learning_rate

ALIGNMENT = 64  # weights: a parameter begins at a multiple, as in memory of its own, so kernels treat it the same


@dataclass(frozen=True)
class Run:
    """What makes a run different from others of its ensemble."""

    rate: float
    seed: int


class Ensemble:
    """Models of one shape, one for each run.

    Attributes:
        runs: in the order of dimension r.
        models: of each run, whose parameters are views of one tensor: of `weights_rw`, or of its copy in bf16.
        weights_rw: fp32 master weights, zero between parameters. Whoever changes them calls `refresh`.
    """

    def __init__(self, config: Config, runs: Sequence[Run], device: torch.device, dtype: torch.dtype) -> None:
        """Start every run from the weights that `build_model` gives for its seed; compute in `dtype`."""
        self.runs = tuple(runs)
        self.models = tuple(build_model(config.model, run.seed).to(device) for run in runs)
        self._shapes = {name: parameter.shape for name, parameter in self.models[0].named_parameters()}
        width = sum(map(_room, self._shapes.values()))
        self.weights_rw = torch.zeros(len(runs), width, device=device)
        self._computing_rw = self.weights_rw.to(dtype)  # the same memory if the dtype is the same
        for run, model in enumerate(self.models):
            masters, views = self.split(self.weights_rw[run]), self.split(self._computing_rw[run])
            for parameter, (_, master), (_, view) in zip(model.parameters(), masters, views, strict=True):
                master.copy_(parameter.data)
                parameter.data = view
        self.refresh()

    def refresh(self) -> None:
        """Give the models the present weights, rounded to what they compute in; nothing to do in fp32."""
        self._computing_rw.copy_(self.weights_rw)

    def split(self, weights_w: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters of a run by name, in the model's order: views of `weights_w`."""
        rooms = [_room(shape) for shape in self._shapes.values()]
        for (name, shape), part_w in zip(self._shapes.items(), weights_w.split(rooms), strict=True):
            yield name, part_w[: shape.numel()].view(shape)

    @torch.no_grad()
    def score(self, examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        """Every run on the same rows, one run after the other: what `score_rows` gives, [R, E, N]."""
        losses, hits = zip(*(score_rows(model, examples) for model in self.models), strict=True)
        return torch.stack(losses), torch.stack(hits)


class Trainer:
    """AdamW and gradient clipping for every run, with a learning rate of its own.

    Attributes:
        ensemble: what is trained.
        step: how many steps are done.
        loss_r: of the last step, mean over labels, in nats.
        norm_r: gradient norm of the last step, before clipping.
        gradient_rw: of the last step, before clipping.
    """

    def __init__(self, ensemble: Ensemble, config: Config, parts: Sequence[Examples]) -> None:
        """Train `ensemble` on rows of `parts`, which lie on its device."""
        self.ensemble, self.config, self.step = ensemble, config, 0
        weights_rw, runs = ensemble.weights_rw, len(ensemble.runs)
        self._parts = parts
        self.first_rw, self.second_rw = torch.zeros_like(weights_rw), torch.zeros_like(weights_rw)
        self.gradient_rw = torch.zeros_like(weights_rw)
        self.loss_r, self.norm_r, self._rate_r, self._done_r = weights_rw.new_zeros(4, runs)
        self._peak_r = weights_rw.new_tensor([run.rate for run in ensemble.runs])
        self._decay_w = torch.zeros_like(weights_rw[0])
        for _, part in ensemble.split(self._decay_w):
            part.fill_(config.optimizer.weight_decay if part.ndim >= 2 else 0.0)
        self._rows = [weights_rw.new_zeros(runs, config.train.micro_batch, dtype=torch.int64) for _ in parts]
        self._streams = [torch.cuda.Stream(weights_rw.device) for _ in ensemble.runs] if weights_rw.is_cuda else []
        self._updates: dict[int, Callable[[], object]] = {}
        self._pool: Any = None  # memory that the graphs share, because one runs at a time

    def train_step(self, part: int, rows_rb: torch.Tensor) -> None:
        """One step of every run on the rows that it names, int64 [R, B] on the CPU, of a part of the data."""
        torch.mul(self._peak_r, learning_rate(self.config, self.step) / self.config.optimizer.lr, out=self._rate_r)
        self._rows[part].copy_(rows_rb)
        if part not in self._updates:
            self._updates[part] = self._capture(part) if self._streams else lambda: self._update(part)
        self._updates[part]()
        self.ensemble.refresh()
        self.step += 1

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that a step changes."""
        weights_rw = self.ensemble.weights_rw
        return {"weights": weights_rw, "first": self.first_rw, "second": self.second_rw}

    def restore(self, state: dict[str, torch.Tensor], step: int) -> None:
        """Go on from what `state` gave after `step` steps; tensors [R, W]."""
        self.step = step
        self._done_r.fill_(step)
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.ensemble.refresh()

    def _update(self, part: int) -> None:
        """A step of every run; on a GPU each has a stream of its own, which a capture makes a branch of its graph."""
        if not self._streams:
            for run in range(len(self.ensemble.runs)):
                self._update_run(run, part)
            return
        here = torch.cuda.current_stream()
        for stream in self._streams:
            stream.wait_stream(here)
        for run, stream in enumerate(self._streams):
            with torch.cuda.stream(stream):
                self._update_run(run, part)
        for stream in self._streams:
            here.wait_stream(stream)

    def _update_run(self, run: int, part: int) -> None:
        """A step of AdamW (arXiv 1711.05101) on the clipped gradient of one run; nothing here waits for the GPU."""
        optimizer, model = self.config.optimizer, self.ensemble.models[run]
        weights_w, gradient_w, rate = self.ensemble.weights_rw[run], self.gradient_rw[run], self._rate_r[run]
        loss = mean_loss(model, self._parts[part].take(self._rows[part][run]))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            self.loss_r[run].copy_(loss)
            views = [view for _, view in self.ensemble.split(gradient_w)]
            torch._foreach_copy_(views, gradients)  # pyright: ignore[reportPrivateImportUsage]
            norm = torch.linalg.vector_norm(gradient_w, out=self.norm_r[run])
            clipped_w = gradient_w * (optimizer.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            weights_w.mul_(1 - rate * self._decay_w)
            adamw(
                [weights_w], [clipped_w], [self.first_rw[run]], [self.second_rw[run]], [], [self._done_r[run]],
                lr=rate, beta1=optimizer.betas[0], beta2=optimizer.betas[1], eps=optimizer.eps, weight_decay=0.0,
                fused=True, amsgrad=False, maximize=False,
            )  # fmt: skip

    def _capture(self, part: int) -> Callable[[], object]:
        """The update as a CUDA graph; what trying it out has changed is put back.

        The op keeps its tables of the last 64 shapes, and a run sees far fewer, so those of the graph stay.
        """
        before = {name: tensor.clone() for name, tensor in self.state().items()}
        for _ in range(2):  # compiles kernels and makes tables, which a graph cannot hold
            run_aside(lambda: self._update(part))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._update(part)
        self._pool = graph.pool()
        self.restore(before, self.step)
        return graph.replay


def score_rows(model: LanguageModel, examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each label [E, N], fp32, in nats, zero where it is -100; and whether it is the likeliest token."""
    logits_env, labels_en = at_least_fp32(_answers(model, examples)), examples.labels_en.long()
    losses_en = F.cross_entropy(logits_env.flatten(0, 1), labels_en.flatten(), reduction="none")
    return losses_en.view(labels_en.shape), logits_env.argmax(-1) == labels_en


def mean_loss(model: LanguageModel, examples: Examples) -> torch.Tensor:
    """The mean of the losses of `score_rows`, as training needs it: a scalar, fp32."""
    labels_en = examples.labels_en.long()
    return model.loss(_answers(model, examples), labels_en) / labels_en.numel()


def _answers(model: LanguageModel, examples: Examples) -> torch.Tensor:
    """Logits [E, N, V] at the positions of the labels alone, so that those of the others need no room."""
    hidden_etd = model.hidden(examples.tokens_et.long())
    if examples.positions_en is not None:
        places_end = examples.positions_en.long()[..., None].expand(-1, -1, hidden_etd.shape[2])
        hidden_etd = hidden_etd.gather(1, places_end)
    return model.head(hidden_etd)


def _room(shape: torch.Size) -> int:
    """Weights that a parameter of this shape takes among those of its run."""
    return -(-shape.numel() // ALIGNMENT) * ALIGNMENT
