"""Decoding steps as CUDA graphs: a step is some hundred small kernels, which cost more to launch than to run.

Shapes: b batch, v vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from loglinear.model.layers import Documents
from loglinear.model.lm import DecodeState, LanguageModel
from loglinear.model.mixer import MixerState
from loglinear.ops import LogLinearState, StateInPlace
from loglinear.ops.graphs import run_aside


class Decoder:
    """Reads token after token from where a prompt ended.

    With log-linear layers alone, on a GPU, the state is overwritten in place and a step is the replay of a graph. A
    graph serves until a document fills a new bucket, so that a document of T tokens needs log2(T) of them; that one
    step, and every step of other models and on other devices, is `LanguageModel.decode`.
    """

    def __init__(self, model: LanguageModel, state: DecodeState) -> None:
        """Go on from `state`, which stays as it is.

        Args:
            model: on one device, its weights whole and of one dtype; hooks within blocks are not called.
            state: what came before, of B documents.
        """
        self._model, self._state, self._graph = model, state, None
        weight = model.embedding.weight
        is_log_linear = all(isinstance(layer, MixerState) for layer in state.layers)
        self._may_capture = weight.is_cuda and is_log_linear
        self._positions = state.positions
        self._tokens_b1 = torch.zeros(len(state.positions), 1, dtype=torch.int64, device=weight.device)

    @torch.no_grad()
    def step(self, tokens_b1: torch.Tensor) -> torch.Tensor:
        """Read one token [B, 1] of each document.

        Returns:
            fp32 logits [B, V], overwritten by the next step.
        """
        if not self._may_capture or not self._has_room():
            return self._step_outside(tokens_b1)
        self._tokens_b1.copy_(tokens_b1)
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        self._graph.replay()
        self._positions = self._positions + 1
        return self._logits_bv

    def _has_room(self) -> bool:
        """Whether the buckets that there are hold the next token too."""
        memory = self._state.layers[0].memory  # pyright: ignore[reportAttributeAccessIssue]
        return (int(self._positions.max()) + 1).bit_length() <= memory.buckets.shape[2]

    def _step_outside(self, tokens_b1: torch.Tensor) -> torch.Tensor:
        state = self._state if self._graph is None else _as_state(self._state, self._positions)
        logits_bv, self._state = self._model.decode(tokens_b1, state)
        self._positions, self._graph = self._state.positions, None
        return logits_bv

    def _capture(self) -> None:
        run_aside(lambda: self._read(_in_place(self._state)))  # on a copy
        self._state = _in_place(self._state)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits_bv = self._read(self._state)

    def _read(self, state: DecodeState) -> torch.Tensor:
        """A step that overwrites `state`."""
        memory: StateInPlace = state.layers[0].memory  # pyright: ignore
        documents = Documents(memory.positions[:, None], (1 << memory.buckets.shape[2]) - 1)
        x_bd = self._model.embedding(self._tokens_b1[:, 0])
        for block, before in zip(self._model.blocks, state.layers, strict=True):
            x_bd = block.step(x_bd, documents, before)  # pyright: ignore[reportCallIssue]
        memory.positions.add_(1)
        return self._model.logits(x_bd)


def _in_place(state: DecodeState) -> DecodeState:
    """A copy that steps overwrite; its layers share their positions."""
    positions_b = state.positions.to(state.layers[0].memory.buckets.device)  # pyright: ignore[reportAttributeAccessIssue]
    layers = tuple(
        MixerState(StateInPlace.copy_of(layer.memory, positions_b), tuple(x.clone() for x in layer.recent))
        for layer in state.layers
        if isinstance(layer, MixerState) and isinstance(layer.memory, LogLinearState)
    )
    return DecodeState(layers, state.positions)


def _as_state(state: DecodeState, positions_b: torch.Tensor) -> DecodeState:
    """What `decode` takes."""
    layers = tuple(
        replace(layer, memory=layer.memory.as_state(positions_b))
        for layer in state.layers
        if isinstance(layer, MixerState) and isinstance(layer.memory, StateInPlace)
    )
    return DecodeState(layers, positions_b)
