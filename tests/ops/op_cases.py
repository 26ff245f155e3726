"""Inputs of the op, its three forms, and a truth that shares no code with them.

Shapes: b batch, t query time, s key time, h value head, g query/key group, n state (key) size, p value head size,
l level, k bucket; d document or row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from loglinear.ops import (
    LogLinearState,
    chunk_log_linear_attention,
    naive_log_linear_attention,
    recurrent_log_linear_attention,
)

FORMS: dict[str, Callable[..., tuple[torch.Tensor, LogLinearState | None]]] = {
    "naive": naive_log_linear_attention,
    "chunk": chunk_log_linear_attention,
    "recurrent": recurrent_log_linear_attention,
}
NAMES = ("q", "k", "v", "g", "level_scales")


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call; tensors are [B, T, ...], or [1, T, ...] with `cu_seqlens`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    level_scales: torch.Tensor | None = None
    initial_state: LogLinearState | None = None
    cu_seqlens: torch.Tensor | None = None
    scale: float = 1.0

    def arguments(self) -> dict[str, Any]:
        """Everything by the name of its parameter."""
        return vars(self)

    def leaves(self) -> dict[str, torch.Tensor]:
        """The tensors that have gradients, by name."""
        tensors = {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}
        if self.initial_state is not None:
            tensors["initial_state"] = self.initial_state.buckets
        return tensors

    def fresh(self, dtype: torch.dtype | None = None) -> Inputs:
        """A copy whose tensors are new leaves that want gradients, of another dtype if one is given."""
        copies = {name: x.detach().to(dtype or x.dtype, copy=True) for name, x in self.leaves().items()}
        for x in copies.values():
            x.requires_grad_()
        buckets = copies.pop("initial_state", None)
        state = self.initial_state
        if buckets is not None and state is not None:
            state = LogLinearState(buckets, state.positions)
        return replace(self, **copies, initial_state=state)

    def tokens(self, index_t: torch.Tensor, lengths: Sequence[int]) -> Inputs:
        """Some tokens of a packed row, as documents of the given lengths, with no initial state."""
        picked = {name: getattr(self, name)[:, index_t] for name in NAMES if getattr(self, name) is not None}
        return replace(self, **picked, initial_state=None, cu_seqlens=boundaries(lengths))


@dataclass(frozen=True)
class Sizes:
    """Small sizes that are all different."""

    groups: int = 1
    heads: int = 4
    state_dim: int = 3
    head_dim: int = 2
    levels: int | None = 10  # None: no level scales


@dataclass(frozen=True)
class Result:
    """Outputs, the final state and the gradient of every input."""

    o: torch.Tensor
    final: LogLinearState
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def boundaries(lengths: Sequence[int]) -> torch.Tensor:
    """`cu_seqlens` of documents with these lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def random_inputs(seed: int, batch: int, time: int, sizes: Sizes = Sizes(), decay: float = 0.3) -> Inputs:
    """Normal q, k, v and level scales (of both signs), g uniform in [-decay, 0], in float64."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, time, *shape, generator=rng, dtype=torch.float64)

    q_btgn, k_btgn = normal(sizes.groups, sizes.state_dim), normal(sizes.groups, sizes.state_dim)
    v_bthp = normal(sizes.heads, sizes.head_dim)
    g_bth = -decay * torch.rand(batch, time, sizes.heads, generator=rng, dtype=torch.float64)
    scales_bthl = None if sizes.levels is None else normal(sizes.heads, sizes.levels)
    return Inputs(q_btgn, k_btgn, v_bthp, g_bth, scales_bthl)


def random_state(seed: int, positions: Sequence[int], sizes: Sizes, spare: int = 0) -> LogLinearState:
    """Random buckets wherever the positions say that one is occupied, and `spare` empty ones above."""
    rng = torch.Generator().manual_seed(seed)
    count = max(positions).bit_length() + spare
    shape = (len(positions), sizes.heads, count, sizes.state_dim, sizes.head_dim)
    state = LogLinearState(torch.randn(*shape, generator=rng, dtype=torch.float64), torch.tensor(positions))
    return replace(state, buckets=state.buckets * occupied(state))


def run(form: str, inputs: Inputs, **options: Any) -> Result:
    """One form forward and backward, from random gradients of the outputs and of the final state."""
    inputs = inputs.fresh()
    o, final = FORMS[form](**inputs.arguments(), output_final_state=True, **options)
    assert final is not None
    loss = weighted_sum(o, 1) + weighted_sum(final.buckets, 2)
    leaves = inputs.leaves()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    filled = {
        name: torch.zeros_like(x) if gradient is None else gradient
        for (name, x), gradient in zip(leaves.items(), gradients, strict=True)
    }
    if inputs.initial_state is not None:  # empty buckets are zero by contract, so nobody asks for their gradient
        filled["initial_state"] *= occupied(inputs.initial_state)
    return Result(o.detach(), LogLinearState(final.buckets.detach(), final.positions), filled)


def occupied(state: LogLinearState) -> torch.Tensor:
    """1 for the buckets that hold tokens, else 0: [D, 1, K, 1, 1]."""
    bits = [[position >> bucket & 1 for bucket in range(state.buckets.shape[2])] for position in state.positions]
    return torch.tensor(bits, dtype=torch.float64).view(len(bits), 1, -1, 1, 1)


def weighted_sum(x: torch.Tensor, seed: int) -> torch.Tensor:
    """A scalar whose gradient is random, and of the same values for whatever form made `x`."""
    rng = torch.Generator().manual_seed(seed)
    return (x.double() * torch.randn(x.shape, generator=rng, dtype=torch.float64)).sum()


def assert_close(actual: Result, wanted: Result, tolerance: float = 1e-10) -> None:
    """Outputs, final states and every gradient agree to `tolerance`."""
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(actual.o, wanted.o, **close, msg=lambda text: f"o: {text}")
    assert actual.final.positions.tolist() == wanted.final.positions.tolist()
    torch.testing.assert_close(
        actual.final.buckets, wanted.final.buckets, **close, msg=lambda text: f"final state: {text}"
    )
    assert actual.gradients.keys() == wanted.gradients.keys()
    for name, gradient in wanted.gradients.items():
        torch.testing.assert_close(
            actual.gradients[name], gradient, **close, msg=lambda text, name=name: f"gradient of {name}: {text}"
        )


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    actual, wanted = actual.detach().double(), wanted.detach().double()
    return float((actual - wanted).norm() / wanted.norm())


def bucket_of(t: int, level: int) -> range:
    """The positions that a query at t reads at a level, straight from the definition."""
    if level == 0:
        return range(t, t + 1)
    if not t >> (level - 1) & 1:
        return range(0)
    first = (t >> level) << level
    return range(first, first + 2 ** (level - 1))


def literal_head(
    q_tn: torch.Tensor, k_tn: torch.Tensor, v_tp: torch.Tensor, g_t: torch.Tensor, scales_tl: torch.Tensor | None
) -> torch.Tensor:
    """One head of one document by loops over t, l and s: o_t = sum_l lambda_l q_t^T sum_s exp(G_t - G_s) k_s v_s^T."""
    outputs = []
    for t in range(len(v_tp)):
        o_p = torch.zeros_like(v_tp[0])
        for level in range(max(1, t.bit_length() + 1)):
            state_np = torch.zeros(k_tn.shape[1], v_tp.shape[1], dtype=v_tp.dtype)
            for s in bucket_of(t, level):
                decay = math.exp(sum(g_t[s + 1 : t + 1].tolist()))
                state_np = state_np + decay * torch.outer(k_tn[s], v_tp[s])
            scale = 1.0 if scales_tl is None else scales_tl[t, level]
            o_p = o_p + scale * (q_tn[t] @ state_np)
        outputs.append(o_p)
    return torch.stack(outputs)


def literal(inputs: Inputs) -> torch.Tensor:
    """The outputs of a whole call without an initial state, head by head and document by document."""
    batch, time, heads = inputs.g.shape
    cuts = [0, time] if inputs.cu_seqlens is None else inputs.cu_seqlens.tolist()
    per_group = heads // inputs.q.shape[2]
    o_bthp = torch.zeros_like(inputs.v)
    for b in range(batch):
        for h in range(heads):
            for start, end in pairwise(cuts):
                if end == start:
                    continue
                now = (b, slice(start, end))
                scales_tl = None if inputs.level_scales is None else inputs.level_scales[(*now, h)]
                q_tn, k_tn = (x[(*now, h // per_group)] for x in (inputs.q * inputs.scale, inputs.k))
                o_bthp[(*now, h)] = literal_head(q_tn, k_tn, inputs.v[(*now, h)], inputs.g[(*now, h)], scales_tl)
    return o_bthp
