"""Many runs of one model at once: their weights side by side, one forward and backward pass for all.

`torch.vmap` runs the model of `loglinear.model` over the runs' weights, so a run is what it would be alone, up to
rounding. Attention takes the runs as further sequences of its batch. On a GPU the whole step is a CUDA graph,
because such small models would otherwise wait for the launches of their kernels.

Shapes: r run, w weight (all parameters of a model one after the other), b batch, t time, n label, d model width,
h head, g query/key group, p head size, l level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from loglinear.config import Config
from loglinear.experiments.examples import Examples
from loglinear.model import LanguageModel, build_model
from loglinear.model.attention import SoftmaxCore, SoftmaxMixer, causal_attention
from loglinear.model.layers import Documents
from loglinear.model.mixer import LogLinearCore, LogLinearMixer
from loglinear.ops import LogLinearState, log_linear_attention
from loglinear.ops.checks import at_least_fp32
from loglinear.train.schedule import learning_rate

Attention = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Run:
    """What makes a run different from others of its ensemble."""

    rate: float
    seed: int


class Ensemble:
    """Models of one shape, one for each run.

    Attributes:
        runs: in the order of dimension r.
        weights_rw: fp32 master weights.
        model: the model whose weights are taken from `weights_rw`; its own are those of the first run at the start.
    """

    def __init__(self, config: Config, runs: Sequence[Run], device: torch.device, dtype: torch.dtype) -> None:
        """Start every run from the weights that `build_model` gives for its seed; compute in `dtype`."""
        models = [build_model(config.model, run.seed) for run in runs]
        self.runs, self.dtype = tuple(runs), dtype
        self.model = models[0].to(device)
        named = list(self.model.named_parameters())
        self.names = [name for name, _ in named]
        self._shapes = [parameter.shape for _, parameter in named]
        self._scored = ScoredModel(self.model)
        flat = [torch.cat([parameter.detach().flatten() for parameter in model.parameters()]) for model in models]
        self.weights_rw = torch.stack([weights.to(device) for weights in flat])
        for module in self.model.modules():
            if isinstance(module, LogLinearMixer):
                module.core = _LogLinearOfAllRuns()
            elif isinstance(module, SoftmaxMixer):
                module.core = _SoftmaxOfAllRuns()

    def split(self, weights_w: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters of a run by name, cut out of `weights_w`."""
        sizes = [shape.numel() for shape in self._shapes]
        for name, part, shape in zip(self.names, weights_w.split(sizes), self._shapes, strict=True):
            yield name, part.view(shape)

    def score(self, weights_rw: torch.Tensor, examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        """Every run on rows of its own.

        Args:
            weights_rw: as `self.weights_rw`.
            examples: tokens [R, B, T] and labels [R, B, N]; or [B, T] and [B, N], for all runs the same.

        Returns:
            The loss of each label [R, B, N], fp32, in nats, and whether it is the likeliest token.
        """
        own = 0 if examples.tokens_et.ndim == 3 else None
        positions = None if examples.positions_en is None else own
        return torch.vmap(self._score_one, in_dims=(0, own, positions, own))(
            weights_rw, examples.tokens_et, examples.positions_en, examples.labels_en
        )

    def _score_one(self, weights_w: torch.Tensor, *rows: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        parameters = {f"model.{name}": part for name, part in self.split(weights_w.to(self.dtype))}
        return functional_call(self._scored, parameters, rows)

    def with_weights_of(self, run: int) -> LanguageModel:
        """The model with the present weights of one run, for whatever looks at one at a time."""
        with torch.no_grad():
            for name, part in self.split(self.weights_rw[run]):
                self.model.get_parameter(name).copy_(part)
        return self.model


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
        weights_rw = ensemble.weights_rw
        self._parts = parts
        self.first_rw, self.second_rw = torch.zeros_like(weights_rw), torch.zeros_like(weights_rw)
        self.gradient_rw = torch.zeros_like(weights_rw)
        self.loss_r, self.norm_r = weights_rw.new_zeros(len(weights_rw)), weights_rw.new_zeros(len(weights_rw))
        self._rate_r1, self._corrections = weights_rw.new_zeros(len(weights_rw), 1), weights_rw.new_ones(2)
        self._peak_r1 = weights_rw.new_tensor([[run.rate] for run in ensemble.runs])
        decays = [torch.full_like(part, part.ndim >= 2).flatten() for _, part in ensemble.split(weights_rw[0])]
        self._decay_w = torch.cat(decays) * config.optimizer.weight_decay
        self._rows = [weights_rw.new_zeros(len(weights_rw), config.train.micro_batch, dtype=torch.int64) for _ in parts]
        self._updates: dict[int, Callable[[], object]] = {}
        self._pool: Any = None  # memory that the graphs share, because one runs at a time

    def train_step(self, part: int, rows_rb: torch.Tensor) -> None:
        """One step of every run on the rows that it names, int64 [R, B] on the CPU, of a part of the data."""
        share = learning_rate(self.config, self.step) / self.config.optimizer.lr
        self.step += 1
        torch.mul(self._peak_r1, share, out=self._rate_r1)
        for index, beta in enumerate(self.config.optimizer.betas):
            self._corrections[index].fill_(1 - beta**self.step)
        self._rows[part].copy_(rows_rb)
        if part not in self._updates:
            self._updates[part] = self._capture(part) if self._rate_r1.is_cuda else lambda: self._update(part)
        self._updates[part]()

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that a step changes."""
        weights_rw = self.ensemble.weights_rw
        return {"weights": weights_rw, "first": self.first_rw, "second": self.second_rw}

    def restore(self, state: dict[str, torch.Tensor], step: int) -> None:
        """Go on from what `state` gave after `step` steps; tensors [R, W]."""
        self.step = step
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def _update(self, part: int) -> None:
        """A step of AdamW (arXiv 1711.05101) on the clipped gradient; nothing here waits for the GPU."""
        optimizer, weights_rw = self.config.optimizer, self.ensemble.weights_rw
        leaf_rw = weights_rw.detach().requires_grad_()
        losses_rbn, _ = self.ensemble.score(leaf_rw, self._parts[part].take(self._rows[part]))
        loss_r = losses_rbn.flatten(1).mean(1)
        (gradient_rw,) = torch.autograd.grad(loss_r.sum(), leaf_rw)
        with torch.no_grad():
            self.loss_r.copy_(loss_r)
            self.gradient_rw.copy_(gradient_rw)
            self.norm_r.copy_(gradient_rw.norm(dim=1))
            clipped_rw = gradient_rw * (optimizer.clip_norm / (self.norm_r[:, None] + 1e-6)).clamp(max=1.0)
            self.first_rw.lerp_(clipped_rw, 1 - optimizer.betas[0])
            self.second_rw.lerp_(clipped_rw.square(), 1 - optimizer.betas[1])
            scale_rw = (self.second_rw / self._corrections[1]).sqrt_().add_(optimizer.eps)
            step_rw = self.first_rw / self._corrections[0] / scale_rw + self._decay_w * weights_rw
            weights_rw.sub_(self._rate_r1 * step_rw)

    def _capture(self, part: int) -> Callable[[], object]:
        """The update as a CUDA graph; what trying it out has changed is put back.

        The op keeps its tables of the last 64 shapes, and a run sees far fewer, so those of the graph stay.
        """
        before = {name: tensor.clone() for name, tensor in self.state().items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles kernels and makes tables, which a graph cannot hold
                self._update(part)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._update(part)
        self._pool = graph.pool()
        self.restore(before, self.step)
        return graph.replay


class ScoredModel(nn.Module):
    """A language model that answers at some positions alone, so that logits of the others need no room."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens_bt: torch.Tensor, positions_bn: torch.Tensor | None, labels_bn: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [B, N], zero where a label is -100, and whether each label is the likeliest token."""
        hidden_btd = self.model.hidden(tokens_bt.long())
        if positions_bn is not None:
            places_bnd = positions_bn.long()[..., None].expand(-1, -1, hidden_btd.shape[2])
            hidden_btd = hidden_btd.gather(1, places_bnd)
        logits_bnv, labels_bn = at_least_fp32(self.model.head(hidden_btd)), labels_bn.long()
        losses_bn = F.cross_entropy(logits_bnv.flatten(0, 1), labels_bn.flatten(), reduction="none")
        return losses_bn.view(labels_bn.shape), logits_bnv.argmax(-1) == labels_bn


class _Folded(torch.autograd.Function):
    """Attention under vmap: the runs become sequences of one batch, and autograd sees that one call."""

    @staticmethod
    def forward(attention: Attention, *tensors: torch.Tensor | None) -> torch.Tensor:
        return attention(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Nothing is kept: only under vmap is there a gradient."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], attention: Attention, *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor, int]:
        runs = info.batch_size
        batches = [
            None if x is None else (x.expand(runs, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
            for x, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        return attention(*batches).unflatten(0, (runs, -1)), 0


def _log_linear(*tensors: torch.Tensor) -> torch.Tensor:
    return log_linear_attention(*tensors)[0]


class _LogLinearOfAllRuns(LogLinearCore):
    """The op over rows that are a document each."""

    def forward(
        self,
        memory: LogLinearState | None,
        q_btgn: torch.Tensor,
        k_btgn: torch.Tensor,
        v_bthp: torch.Tensor,
        g_bth: torch.Tensor,
        scales_bthl: torch.Tensor | None,
        documents: Documents,
    ) -> tuple[torch.Tensor, LogLinearState | None]:
        assert memory is None
        assert documents.cu_seqlens is None
        return _Folded.apply(_log_linear, q_btgn, k_btgn, v_bthp, g_bth, scales_bthl), None  # pyright: ignore[reportReturnType]


class _SoftmaxOfAllRuns(SoftmaxCore):
    """Attention over rows that are a document each."""

    def forward(
        self, q_bthp: torch.Tensor, k_bshp: torch.Tensor, v_bshp: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        assert documents.cu_seqlens is None
        return _Folded.apply(causal_attention, q_bthp, k_bshp, v_bshp)  # pyright: ignore[reportReturnType]
