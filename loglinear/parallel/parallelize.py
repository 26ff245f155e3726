"""A model of one process made parallel: its parameters are cut, and hooks communicate where the cuts meet.

Every half of a block takes the residual stream in once and gives it back once. Without sequence parallelism all
tensor ranks hold the whole stream: a half takes it in as it is (its gradient is summed) and sums what it gives back.
With it each holds a part of the tokens: a half gathers them, and sums and scatters what it gives back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from loglinear.config import Config
from loglinear.errors import UserError
from loglinear.model import LanguageModel, build_model
from loglinear.model.attention import SoftmaxMixer
from loglinear.model.mixer import LogLinearMixer
from loglinear.ops.projections import Layer, Projections, weights_of
from loglinear.parallel.collectives import all_reduce, gather, sum_and_scatter, sum_over
from loglinear.parallel.context import ContextConvolutions, ContextLogLinearCore
from loglinear.parallel.context_softmax import ContextSoftmaxCore
from loglinear.parallel.mesh import Axis, Mesh
from loglinear.parallel.overlap import column_projections
from loglinear.parallel.shard import Placement, cut, placement_of, placements
from loglinear.parallel.vocabulary import VocabParallelCrossEntropy, lookup

TIME = 1  # dimension of [B, T, D]
CONTEXT_CORES = {LogLinearMixer: ContextLogLinearCore, SoftmaxMixer: ContextSoftmaxCore}


def parallel_model(mesh: Mesh, config: Config, *, fresh: bool) -> LanguageModel:
    """This rank's part of the run's model; unless it is `fresh`, its weights are still to be loaded."""
    if fresh:
        model = build_model(config.model, config.run.seed, recomputed_blocks=config.recomputed_blocks)
        return parallelize(model, mesh, config)
    with torch.device("meta"):
        model = LanguageModel(config.model, recomputed_blocks=config.recomputed_blocks)
    _cut_parameters(model, mesh.tensor, config)
    _allocate(model)
    _connect(model, mesh, config)
    return model


def parallelize(model: LanguageModel, mesh: Mesh, config: Config) -> LanguageModel:
    """Make this rank's part of `model`, in place; names of parameters stay as they are.

    Args:
        model: whole, the same on every rank; may live on the meta device.
        mesh: the ranks.
        config: the run's; its sizes divide as its validation promises.

    Raises:
        UserError: a mixer has no form over the mesh's context ranks.
    """
    _cut_parameters(model, mesh.tensor, config)
    _connect(model, mesh, config)
    return model


class Stream:
    """The residual stream among the tensor ranks; whole, or cut along time while gradients are wanted."""

    def __init__(self, axis: Axis, sequence: bool) -> None:
        self._axis, self._sequence = axis, sequence
        self._is_cut = False

    def start(self, partial_btd: torch.Tensor) -> torch.Tensor:
        """The stream from a rank's part of the embeddings [B, T, D]; without gradients (decoding) it stays whole."""
        self._is_cut = self._sequence and torch.is_grad_enabled()
        return self.leave(partial_btd)

    def enter(self, x_btd: torch.Tensor, weights_ed: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """All tokens times each weight [E, D]: [B, T, E] each, from what this rank holds of the stream [B, T, D]."""
        return column_projections(x_btd, weights_ed, self._axis, TIME if self._is_cut else None)

    def leave(self, partial_btd: torch.Tensor) -> torch.Tensor:
        """What this rank holds of the sum of all ranks' outputs [B, T, D]."""
        if self._is_cut:
            return sum_and_scatter(partial_btd, self._axis, TIME)
        return sum_over(partial_btd, self._axis)

    @property
    def axis(self) -> Axis:
        """The tensor ranks."""
        return self._axis


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding that belong to this rank's part of the vocabulary."""

    def __init__(self, weight_vd: nn.Parameter, stream: Stream) -> None:
        super().__init__()
        self.weight = weight_vd
        self._stream = stream

    def forward(self, tokens_bt: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] to the residual stream [B, T, D], or this rank's part of its tokens."""
        return self._stream.start(lookup(tokens_bt, self.weight, self._stream.axis))


class ColumnProjections(nn.Module):
    """The layers with which a half of a block takes the stream in."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    def forward(self, x_btd: torch.Tensor, layers: Sequence[Layer]) -> tuple[torch.Tensor, ...]:
        """As `Projections.forward`, from what this rank holds of [B, T, D]."""
        return self._stream.enter(x_btd, weights_of(layers))


class VocabParallelHead(nn.Linear):
    """Rows of the head that belong to this rank's part of the vocabulary."""

    def __init__(self, head: nn.Linear, stream: Stream) -> None:
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight = head.weight
        self._stream = stream

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """What this rank holds of the stream [B, T, D] to logits [B, T, V / ranks]."""
        return self._stream.enter(input, (self.weight,))[0]


class WholeLogits(nn.Module):
    """Logits of the whole vocabulary, for those who sample from them."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self._axis = axis

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """[..., V / ranks] to [..., V]."""
        return gather(logits, self._axis, -1)


class OwnGroups(nn.Module):
    """A log-linear core whose rank needs one of the query/key groups that all ranks compute."""

    def __init__(self, core: nn.Module, group: int) -> None:
        super().__init__()
        self._core, self._group = core, slice(group, group + 1)

    def forward(self, memory: Any, q_btgn: torch.Tensor, k_btgn: torch.Tensor, *others: Any) -> Any:
        """Outputs and memory, as in `LogLinearCore.forward`."""
        return self._core(memory, q_btgn[:, :, self._group], k_btgn[:, :, self._group], *others)


def _cut_parameters(model: LanguageModel, axis: Axis, config: Config) -> None:
    if axis.size == 1:
        return
    plan = placements(config)
    parts: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter is cut once
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            placement = placement_of(f"{path}.{name}".lstrip("."), plan)
            if parameter not in parts:
                parts[parameter] = cut(parameter, placement, axis)
            module.register_parameter(name, parts[parameter])
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape


def _allocate(model: LanguageModel) -> None:
    """Give the parameters of a model on the meta device memory, and nothing in it, one after the other."""
    allocated: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in allocated:
                allocated[parameter] = nn.Parameter(torch.empty_like(parameter, device="cpu"))
                vars(allocated[parameter]).update(vars(parameter))
            module.register_parameter(name, allocated[parameter])


def _connect(model: LanguageModel, mesh: Mesh, config: Config) -> None:
    if mesh.tensor.size > 1:
        _communicate(model, Stream(mesh.tensor, config.parallel.sequence))
        _sum_shared_gradients(model, mesh.tensor, config)
    if mesh.context.size > 1:
        _split_sequences(model, mesh.context)
    _choose_groups(model, mesh.tensor, config.model.log_linear.groups)


def _sum_shared_gradients(model: LanguageModel, axis: Axis, config: Config) -> None:
    """Each rank's is a part of it. On the parameter itself, so that no module needs to know."""
    plan = placements(config)
    for name, parameter in model.named_parameters():
        if placement_of(name, plan) is Placement.SHARED:
            parameter.register_hook(lambda gradient: all_reduce(gradient, axis))


def _communicate(model: Any, stream: Stream) -> None:
    model.embedding = VocabParallelEmbedding(model.embedding.weight, stream)  # pyright: ignore[reportArgumentType]
    model.head = VocabParallelHead(model.head, stream)
    model.whole_logits = WholeLogits(stream.axis)
    model.loss = VocabParallelCrossEntropy(stream.axis)
    for block in model.blocks:
        mlp = [] if block.mlp is None else [(block.mlp, block.mlp.down)]
        for half, last in [(block.mixer, block.mixer.out_proj), *mlp]:
            assert isinstance(half.project, Projections)
            half.project = ColumnProjections(stream)
            last.register_forward_hook(lambda module, inputs, output: stream.leave(output))


def _choose_groups(model: LanguageModel, axis: Axis, groups: int) -> None:
    if groups == 1 or groups % axis.size == 0:
        return
    for mixer in list(model.modules()):
        if isinstance(mixer, LogLinearMixer):
            mixer.core = OwnGroups(mixer.core, axis.index * groups // axis.size)


def _split_sequences(model: Any, axis: Axis) -> None:
    for block in model.blocks:
        mixer = block.mixer
        if type(mixer) not in CONTEXT_CORES:
            raise UserError(
                f"{type(mixer).__name__} has no form for sequences cut among context ranks: set parallel.context=1, or"
                " give it one in CONTEXT_CORES of loglinear/parallel/parallelize.py"
            )
        mixer.core = CONTEXT_CORES[type(mixer)](mixer.core, axis)
        if isinstance(mixer, LogLinearMixer):
            mixer.convolve = ContextConvolutions(mixer.convolve, axis)
