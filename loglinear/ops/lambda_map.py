"""The maps from a token to its level scales, lambda: fixed, linear, or a two-layer MLP (the adaptive form).

Shapes: b batch, t time, d model width, h head, l level, m hidden size of the MLP.
Sources: `scaled` arXiv 2506.04761; `mlp` and its variants arXiv 2605.06946; the others for comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from loglinear.config import LevelScaleName
from loglinear.errors import UserError
from loglinear.ops.checks import at_least_fp32
from loglinear.ops.fenwick import num_levels
from loglinear.ops.flops import linear_flops
from loglinear.ops.neighbours import adaptive_scales
from loglinear.ops.projections import Layer

SOFTPLUS_INVERSE_OF_1 = math.log(math.expm1(1.0))


class LambdaMap(nn.Module):
    """softplus of `logits`, so lambda > 0; subclasses say where the logits come from.

    It initialises its own weights, and whoever initialises a model must leave them alone.
    """

    def __init__(self, levels: int, beyond: str) -> None:
        """`levels` are trained; `beyond` says what the further levels of longer sequences get.

        "error" refuses them; "clamp" repeats the logit of the last trained level, "extend" its lambda, which differs
        under a softmax alone; "one" is lambda of plain linear attention.
        """
        super().__init__()
        self.levels, self.beyond = levels, beyond

    def token_layers(self) -> tuple[Layer, ...]:
        """The linear layers that read the mixer's input, for whoever computes all its products at once."""
        return ()

    def forward(self, of_token: Sequence[torch.Tensor], positions_bt: torch.Tensor, length: int) -> torch.Tensor | None:
        """Level scales, or None if they are all one.

        Args:
            of_token: the mixer's input times each of `token_layers`, [B, T, E].
            positions_bt: int64 [B, T], of each token in its own document.
            length: at least the largest position + 1.

        Returns:
            fp32 [B, T, H, L], L at least `num_levels(length)`; from `mlp` on a GPU in the dtype of the projection.

        Raises:
            UserError: `length` needs more levels than were trained, and the policy is "error".
        """
        logits_bthl = at_least_fp32(self.logits(of_token, positions_bt))
        if self.beyond == "clamp":
            return self.activate(self.beyond_trained(logits_bthl, length), positions_bt)
        return self.beyond_trained(self.activate(logits_bthl, positions_bt), length)

    def beyond_trained(self, x_bthl: torch.Tensor, length: int) -> torch.Tensor:
        """Logits or scales [B, T, H, L] with the levels that `length` tokens need; errors as in `forward`."""
        missing = num_levels(length) - self.levels
        if missing <= 0:
            return x_bthl
        if self.beyond == "error":
            raise UserError(
                f"a sequence of {length} tokens needs {num_levels(length)} levels, but {self.levels} were"
                " trained: give a shorter one, or set model.log_linear.beyond_trained_levels=clamp"
            )
        if self.beyond == "one":
            return F.pad(x_bthl, (0, missing), value=1.0)
        return torch.cat([x_bthl, x_bthl[..., -1:].expand(*x_bthl.shape[:3], missing)], -1)

    def logits(self, of_token: Sequence[torch.Tensor], positions_bt: torch.Tensor) -> torch.Tensor:
        """What the activation is applied to: broadcastable to [B, T, H, L]."""
        raise NotImplementedError

    def activate(self, logits_bthl: torch.Tensor, positions_bt: torch.Tensor) -> torch.Tensor:
        """Lambda from fp32 logits [B, T, H, L]."""
        return F.softplus(logits_bthl)

    def flops_per_token(self) -> int:
        """Forward FLOPs of the matrix products for a token."""
        return 0


class LambdaMLP(nn.Module):
    """W2 gelu(W1 x + b1) + b2.

    W1 starts as Xavier's, b1 = 0, W2 = 0, b2 such that softplus gives 1: training starts at plain linear attention.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(torch.empty(hidden, inputs))
        self.bias1 = nn.Parameter(torch.zeros(hidden))
        self.weight2 = nn.Parameter(torch.zeros(outputs, hidden))
        self.bias2 = nn.Parameter(torch.full((outputs,), SOFTPLUS_INVERSE_OF_1))
        nn.init.xavier_uniform_(self.weight1)

    def forward(self, x: torch.Tensor, *, softplus: bool = False) -> torch.Tensor:
        """Shapes [..., inputs] in and [..., outputs] out; with `softplus` of it, which is one pass on a GPU."""
        if softplus:
            return adaptive_scales(x, self.weight1, self.bias1, self.weight2, self.bias2)
        return self.second(F.linear(x, self.weight1, self.bias1))

    def second(self, hidden: torch.Tensor) -> torch.Tensor:
        """What follows the first layer: [..., hidden] in and [..., outputs] out."""
        return F.linear(F.gelu(hidden), self.weight2, self.bias2)

    def flops(self) -> int:
        """Forward FLOPs of one row."""
        return 2 * (self.weight1.numel() + self.weight2.numel())


class NoLambdaMap(LambdaMap):
    """lambda = 1: plain linear attention."""

    def forward(self, of_token: Sequence[torch.Tensor], positions_bt: torch.Tensor, length: int) -> None:
        """None: the op then pays for no levels."""


class StaticLambdaMap(LambdaMap):
    """softplus(P[h, l]), whatever the input; starts at 1."""

    def __init__(self, heads: int, levels: int, beyond: str) -> None:
        super().__init__(levels, beyond)
        self.scale_hl = nn.Parameter(torch.full((heads, levels), SOFTPLUS_INVERSE_OF_1))

    def logits(self, of_token: Sequence[torch.Tensor], positions_bt: torch.Tensor) -> torch.Tensor:
        return self.scale_hl.expand(*positions_bt.shape, -1, -1)


class _Projected(LambdaMap):
    """A map of the level logits dl[h, l], one linear projection of the token."""

    def __init__(self, dim: int, heads: int, levels: int, beyond: str) -> None:
        super().__init__(levels, beyond)
        self.level_proj = nn.Linear(dim, heads * levels, bias=False)
        nn.init.normal_(self.level_proj.weight, std=dim**-0.5)  # unit variance from a normed input

    def token_layers(self) -> tuple[Layer, ...]:
        return (self.level_proj,)

    def level_logits(self, of_token: Sequence[torch.Tensor]) -> torch.Tensor:
        """dl: [B, T, H, L]."""
        return of_token[0].unflatten(2, (-1, self.levels))

    def flops_per_token(self) -> int:
        return linear_flops(self.level_proj)


class ScaledLambdaMap(_Projected):
    """softplus(P[h, l] * dl[t, h, l]), P = 1 at the start: the log-linear paper's, and so the seed's baseline."""

    def __init__(self, dim: int, heads: int, levels: int, beyond: str) -> None:
        super().__init__(dim, heads, levels, beyond)
        self.scale_hl = nn.Parameter(torch.ones(heads, levels))

    def logits(self, of_token: Sequence[torch.Tensor], positions_bt: torch.Tensor) -> torch.Tensor:
        return self.scale_hl * self.level_logits(of_token)


class LinearLambdaMap(_Projected):
    """softplus(dl + b[h, l]): the MLP's simplest rival; starts at 1."""

    def __init__(self, dim: int, heads: int, levels: int, beyond: str) -> None:
        super().__init__(dim, heads, levels, beyond)
        nn.init.zeros_(self.level_proj.weight)
        self.bias_hl = nn.Parameter(torch.full((heads, levels), SOFTPLUS_INVERSE_OF_1))

    def logits(self, of_token: Sequence[torch.Tensor], positions_bt: torch.Tensor) -> torch.Tensor:
        return self.bias_hl + self.level_logits(of_token)


class _ThroughMLP(_Projected):
    """A map whose logits are one MLP for all heads, on each head's L level logits."""

    def __init__(self, dim: int, heads: int, levels: int, beyond: str, hidden: int) -> None:
        super().__init__(dim, heads, levels, beyond)
        self.mlp = LambdaMLP(levels, hidden, levels)

    def logits(self, of_token: Sequence[torch.Tensor], positions_bt: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.level_logits(of_token))

    def flops_per_token(self) -> int:
        heads = self.level_proj.out_features // self.levels
        return super().flops_per_token() + heads * self.mlp.flops()


class MLPLambdaMap(_ThroughMLP):
    """softplus(W2 gelu(W1 dl + b1) + b2) on each head's L logits, the adaptive form; starts at 1."""

    def forward(self, of_token: Sequence[torch.Tensor], positions_bt: torch.Tensor, length: int) -> torch.Tensor:
        return self.beyond_trained(self.mlp(self.level_logits(of_token), softplus=True), length)


class SoftmaxLambdaMap(_ThroughMLP):
    """A softmax over all levels of the same MLP; gives weight to levels that are empty."""

    def activate(self, logits_bthl: torch.Tensor, positions_bt: torch.Tensor) -> torch.Tensor:
        return logits_bthl.softmax(-1)


class MaskedSoftmaxLambdaMap(_ThroughMLP):
    """A softmax over the levels whose bucket is not empty: level 0, and l wherever bit l - 1 of t is set."""

    def activate(self, logits_bthl: torch.Tensor, positions_bt: torch.Tensor) -> torch.Tensor:
        bucket_l = torch.arange(-1, logits_bthl.shape[-1] - 1, device=positions_bt.device)
        occupied_btl = (positions_bt[..., None] >> bucket_l.clamp(min=0)) & 1 == 1
        active_btl = occupied_btl | (bucket_l < 0)
        return logits_bthl.masked_fill(~active_btl[:, :, None], -torch.inf).softmax(-1)


class TokenMLPLambdaMap(LambdaMap):
    """softplus(W2 gelu(W1 x + b1) + b2) from the token to all heads and levels, as the text describes; starts at 1."""

    def __init__(self, dim: int, heads: int, levels: int, beyond: str, hidden: int) -> None:
        super().__init__(levels, beyond)
        self.mlp = LambdaMLP(dim, hidden, heads * levels)

    def token_layers(self) -> tuple[Layer, ...]:
        return (self.mlp.weight1,)

    def logits(self, of_token: Sequence[torch.Tensor], positions_bt: torch.Tensor) -> torch.Tensor:
        return self.mlp.second(of_token[0] + self.mlp.bias1).unflatten(2, (-1, self.levels))

    def flops_per_token(self) -> int:
        return self.mlp.flops()


def make_lambda_map(name: LevelScaleName, *, dim: int, heads: int, levels: int, hidden: int, beyond: str) -> LambdaMap:
    """The map called `name`, for `heads` heads and `levels` trained levels.

    Args:
        name: as in the configuration.
        dim: width of the token.
        heads: value heads.
        levels: `num_levels` of the training length.
        hidden: of the MLP, for the names that begin with `mlp`.
        beyond: what longer sequences get, as `LambdaMap` has it.
    """
    projected = {"dim": dim, "heads": heads, "levels": levels, "beyond": beyond}
    match name:
        case "none":
            return NoLambdaMap(levels, beyond)
        case "static":
            return StaticLambdaMap(heads, levels, beyond)
        case "scaled":
            return ScaledLambdaMap(**projected)
        case "linear":
            return LinearLambdaMap(**projected)
        case "mlp":
            return MLPLambdaMap(**projected, hidden=hidden)
        case "mlp_token":
            return TokenMLPLambdaMap(**projected, hidden=hidden)
        case "mlp_softmax":
            return SoftmaxLambdaMap(**projected, hidden=hidden)
        case "mlp_masked_softmax":
            return MaskedSoftmaxLambdaMap(**projected, hidden=hidden)
