"""A model of one process made parallel: its parameters are cut, and hooks communicate where the cuts meet.

Every half of a block takes the residual stream in once and gives it back once. Without sequence parallelism all
tensor ranks hold the whole stream: a half takes it in as it is (its gradient is summed) and sums what it gives back.
With it each holds a part of the tokens: a half gathers them, and sums and scatters what it gives back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loglinear.config import Config
from loglinear.model import LanguageModel
from loglinear.model.attention import SoftmaxMixer
from loglinear.model.layers import ShortConv
from loglinear.model.mixer import LogLinearMixer
from loglinear.parallel.collectives import all_reduce, copy_to, gather, sum_and_scatter, sum_over
from loglinear.parallel.context import ContextLogLinearCore, ContextSoftmaxCore, give_halo, join_rows
from loglinear.parallel.mesh import Axis, Mesh
from loglinear.parallel.shard import Placement, cut, placement_of, placements
from loglinear.parallel.vocabulary import VocabParallelCrossEntropy, lookup

TIME = 1  # dimension of [B, T, D]


def parallelize(model: LanguageModel, mesh: Mesh, config: Config) -> LanguageModel:
    """Make this rank's part of `model`, in place; names of parameters stay as they are.

    Args:
        model: whole, the same on every rank; may live on the meta device.
        mesh: the ranks.
        config: the run's; its sizes divide as its validation promises.
    """
    if mesh.tensor.size > 1:
        _cut_parameters(model, mesh.tensor, config)
        _communicate(model, Stream(mesh.tensor, config.parallel.sequence))
    if mesh.context.size > 1:
        _split_sequences(model, mesh.context)
    if mesh.tensor.size > 1:
        _choose_groups(model, mesh.tensor, config.model.log_linear.groups)
    return model


class Stream:
    """The residual stream among the tensor ranks; whole, or cut along time while gradients are wanted."""

    def __init__(self, axis: Axis, sequence: bool) -> None:
        self._axis, self._sequence = axis, sequence
        self._is_cut = False

    def start(self, partial_btd: torch.Tensor) -> torch.Tensor:
        """The stream from each rank's part of the embedding's sum; without gradients (decoding) it stays whole."""
        self._is_cut = self._sequence and torch.is_grad_enabled()
        return self.leave(partial_btd)

    def enter(self, x_btd: torch.Tensor) -> torch.Tensor:
        """All tokens, from what this rank holds of the stream."""
        return gather(x_btd, self._axis, TIME) if self._is_cut else copy_to(x_btd, self._axis)

    def leave(self, partial_btd: torch.Tensor) -> torch.Tensor:
        """What this rank holds of the sum of all ranks' outputs."""
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
        """As the core's."""
        return self._core(memory, q_btgn[:, :, self._group], k_btgn[:, :, self._group], *others)


def _cut_parameters(model: LanguageModel, axis: Axis, config: Config) -> None:
    plan = placements(config)
    parts: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter is cut once
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            placement = placement_of(f"{path}.{name}".lstrip("."), plan)
            if parameter not in parts:
                parts[parameter] = cut(parameter, placement, axis)
                if placement is Placement.SHARED:
                    parts[parameter].register_hook(lambda gradient: all_reduce(gradient, axis))
            module.register_parameter(name, parts[parameter])
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape


def _communicate(model: LanguageModel, stream: Stream) -> None:
    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return stream.enter(inputs[0]), *inputs[1:]

    def leave(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return stream.leave(output)

    model.embedding = VocabParallelEmbedding(model.embedding.weight, stream)  # pyright: ignore[reportArgumentType]
    model.whole_logits = WholeLogits(stream.axis)
    model.loss = VocabParallelCrossEntropy(stream.axis)
    model.head.register_forward_pre_hook(enter)
    for block in model.blocks:
        for half, last in ((block.mixer, block.mixer.out_proj), (block.mlp, block.mlp.down)):
            half.register_forward_pre_hook(enter)
            last.register_forward_hook(leave)


def _choose_groups(model: LanguageModel, axis: Axis, groups: int) -> None:
    if groups == 1 or groups % axis.size == 0:
        return
    for mixer in model.modules():
        if isinstance(mixer, LogLinearMixer):
            mixer.core = OwnGroups(mixer.core, axis.index * groups // axis.size)


def _split_sequences(model: LanguageModel, axis: Axis) -> None:
    for module in model.modules():
        if isinstance(module, ShortConv):
            module.register_forward_pre_hook(lambda conv, inputs: give_halo(conv, inputs, axis))
            module.register_forward_hook(join_rows)
        elif isinstance(module, LogLinearMixer):
            module.core = ContextLogLinearCore(module.core, axis)
        elif isinstance(module, SoftmaxMixer):
            module.core = ContextSoftmaxCore(module.core, axis)
