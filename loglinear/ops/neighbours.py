"""The cheap operations around the op. Each is one pass over memory on a GPU, and plain PyTorch elsewhere.

Sums and exponentials are computed in fp32 at least; results have the dtype of the activations.

Shapes: b batch, t time, c channel, h head, p head size, l level, m hidden size, w tap of the convolution, the token's
own first, i token of all rows, v vocabulary.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F

from loglinear.ops.checks import at_least_fp32
from loglinear.ops.device import has_kernels


def causal_conv_silu(
    x_btc: torch.Tensor,
    weight_wc: torch.Tensor,
    bias_c: torch.Tensor,
    positions_bt: torch.Tensor,
    past_bwc: torch.Tensor | None = None,
    *,
    packed: bool,
) -> torch.Tensor:
    """A causal depthwise convolution over the last W tokens of the same document, then SiLU.

    Args:
        x_btc: [B, T, C].
        weight_wc, bias_c: [W, C] and [C].
        positions_bt: int64 [B, T], of each token in its own document.
        past_bwc: [B, W - 1, C], the inputs before the first token; zero if None.
        packed: whether a row holds several documents.

    Returns:
        [B, T, C].
    """
    reach = len(weight_wc) - 1
    if _has_kernels(x_btc):
        from loglinear.ops.triton.convolution import causal_conv_silu as kernel

        past_bwc = None if past_bwc is None or reach == 0 else past_bwc.contiguous()
        return kernel(x_btc.contiguous(), weight_wc, bias_c, positions_bt, past_bwc)
    padded_btc = F.pad(x_btc, (0, 0, reach, 0)) if past_bwc is None else torch.cat([past_bwc, x_btc], 1)
    y_btc = bias_c + weight_wc[0] * x_btc
    for back in range(1, reach + 1):
        shifted_btc = padded_btc[:, reach - back : reach - back + x_btc.shape[1]]
        if packed:
            shifted_btc = shifted_btc * (positions_bt >= back)[..., None]
        y_btc = torch.addcmul(y_btc, weight_wc[back], shifted_btc)
    return F.silu(y_btc)


def discretise(
    raw_bth: torch.Tensor, bias_h: torch.Tensor, a_log_h: torch.Tensor, v_bthp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The log-decay and the values that the op reads, from the step size softplus(raw + bias).

    Args:
        raw_bth: [B, T, H].
        bias_h, a_log_h: [H].
        v_bthp: values [B, T, H, P].

    Returns:
        g [B, T, H] = -exp(A_log) * step, fp32 at least; v * step [B, T, H, P]; and v, for whatever else reads it: both
        gradients of v are added in the same pass over memory.

    Source: Mamba-2, arXiv 2405.21060.
    """
    if _has_kernels(v_bthp):
        from loglinear.ops.triton.discretise import discretise as kernel

        raw_ih, v_ihp = (x.flatten(0, 1).contiguous() for x in (raw_bth, v_bthp))
        g_ih, weighted_ihp, v_ihp = kernel.and_input(3, raw_ih, bias_h, a_log_h, v_ihp)
        return g_ih.view(raw_bth.shape), weighted_ihp.view(v_bthp.shape), v_ihp.view(v_bthp.shape)
    step_bth = F.softplus(at_least_fp32(raw_bth) + at_least_fp32(bias_h))
    return -at_least_fp32(a_log_h).exp() * step_bth, v_bthp * step_bth[..., None].to(v_bthp.dtype), v_bthp


def skip_gate_norm(
    o_bthp: torch.Tensor,
    v_bthp: torch.Tensor,
    z_bthp: torch.Tensor,
    skip_h: torch.Tensor,
    weight_p: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """RMSNorm((o + skip * v) * silu(z)) * weight within each head: [B, T, H, P] in and out.

    Args:
        o_bthp: outputs of the op.
        v_bthp: values, added to them times `skip_h` [H].
        z_bthp: the gate.
        weight_p: [P], of the norm.
        eps: added to the mean square.

    Source: Mamba-2, arXiv 2405.21060.
    """
    if _has_kernels(o_bthp):
        from loglinear.ops.triton.gated_norm import skip_gate_norm as kernel

        tensors_ihp = (x.flatten(0, 1).contiguous() for x in (o_bthp, v_bthp, z_bthp))
        return kernel(*tensors_ihp, skip_h, weight_p, eps).view(o_bthp.shape)
    x_bthp = (o_bthp + skip_h[:, None] * v_bthp) * F.silu(z_bthp)
    return F.rms_norm(x_bthp, weight_p.shape, weight_p, eps)


def adaptive_scales(
    logits_bthl: torch.Tensor,
    weight1_ml: torch.Tensor,
    bias1_m: torch.Tensor,
    weight2_lm: torch.Tensor,
    bias2_l: torch.Tensor,
) -> torch.Tensor:
    """softplus(W2 gelu(W1 logits + b1) + b2) of each head's level logits: [B, T, H, L] in and out.

    fp32 at least in PyTorch; the kernel returns the dtype of the logits, which is what it reads them in.

    Source: arXiv 2605.06946.
    """
    if _has_kernels(logits_bthl):
        from loglinear.ops.triton import lambda_mlp as kernels

        if len(bias1_m) in kernels.HIDDEN_SIZES and len(bias2_l) <= kernels.MOST_LEVELS:
            logits_il = logits_bthl.flatten(0, 2).contiguous()
            scales_il = kernels.lambda_mlp(logits_il, weight1_ml, bias1_m, weight2_lm, bias2_l)
            return scales_il.view(logits_bthl.shape)
    hidden_bthm = F.gelu(F.linear(logits_bthl, weight1_ml, bias1_m))
    return F.softplus(at_least_fp32(F.linear(hidden_bthm, weight2_lm, bias2_l)))


def rms_norm(x: torch.Tensor, weight_d: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension [..., D]. Source: arXiv 1910.07467."""
    if _has_kernels(x):
        from loglinear.ops.triton import rms_norm as kernels

        if len(weight_d) <= kernels.MOST_WIDTH:
            return kernels.rms_norm(x.flatten(0, -2).contiguous(), weight_d, eps).view(x.shape)
    return F.rms_norm(x, weight_d.shape, weight_d, eps)


def rms_norm_and_residual(
    x: torch.Tensor, addend: torch.Tensor | None, weight_d: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` of x + addend [..., D], or of x, and what it is the norm of.

    That is one pass over memory forward, and one backward, which adds both gradients.
    """
    if _has_kernels(x):
        from loglinear.ops.triton import rms_norm as kernels

        if len(weight_d) <= kernels.MOST_WIDTH:
            x_id = x.flatten(0, -2).contiguous()
            if addend is None:
                y_id, x_id = kernels.rms_norm.and_input(0, x_id, weight_d, eps)
            else:
                y_id, x_id = kernels.add_rms_norm(x_id, addend.flatten(0, -2).contiguous(), weight_d, eps)
            return y_id.view(x.shape), x_id.view(x.shape)
    x = x if addend is None else x + addend
    return F.rms_norm(x, weight_d.shape, weight_d, eps), x


def silu_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [..., D] each. Source: arXiv 2002.05202."""
    if _has_kernels(gate):
        if gate.is_meta:
            return _SiluProductWithoutData.apply(gate, up)
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(gate, up)
    return F.silu(gate) * up


def norm_linears(
    x_id: torch.Tensor, norm_d: torch.Tensor, eps: float, weights_ed: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """`rms_norm` of x [I, D] times the transpose of every weight [E, D]: [I, E] each.

    Like the next three it is one launch for few tokens on a GPU, and without gradients there.
    """
    if kernels := _kernels_for_few_rows(x_id):
        return kernels.norm_linears(x_id, norm_d, eps, weights_ed)
    normed_id = rms_norm(x_id, norm_d, eps)
    return tuple(F.linear(normed_id, weight_ed) for weight_ed in weights_ed)


def norm_gated_linear(
    x_id: torch.Tensor, norm_d: torch.Tensor, eps: float, gate_ed: torch.Tensor, up_ed: torch.Tensor
) -> torch.Tensor:
    """silu(n gate^T) * (n up^T), n the `rms_norm` of x [I, D]: [I, E]."""
    if kernels := _kernels_for_few_rows(x_id):
        return kernels.norm_silu_product(x_id, norm_d, eps, gate_ed, up_ed)
    normed_id = rms_norm(x_id, norm_d, eps)
    return silu_product(F.linear(normed_id, gate_ed), F.linear(normed_id, up_ed))


def step_inputs(
    inputs_ic: tuple[torch.Tensor, ...],
    weights_wc: tuple[torch.Tensor, ...],
    biases_c: tuple[torch.Tensor, ...],
    pasts_iwc: tuple[torch.Tensor, ...],
    raw_ih: torch.Tensor,
    bias_h: torch.Tensor,
    a_log_h: torch.Tensor,
    sums_ih: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """`causal_conv_silu` of one token of q, k and v, then `discretise`, on a GPU.

    Args:
        inputs_ic, weights_wc, biases_c: of the three convolutions, [I, C], [W, C] and [C] each.
        pasts_iwc: [I, W - 1, C] each, overwritten with what follows them.
        raw_ih, bias_h, a_log_h: as `discretise` takes them, [I, H] and [H].
        sums_ih: fp64 [I, H], to which g is added.

    Returns:
        q, k and v [I, C], then v * step [I, C].
    """
    from loglinear.ops.triton.step_inputs import step_inputs as kernel

    return kernel(inputs_ic, weights_wc, biases_c, pasts_iwc, raw_ih, bias_h, a_log_h, sums_ih)


def linear_onto(onto_ie: torch.Tensor, x_id: torch.Tensor, weight_ed: torch.Tensor) -> torch.Tensor:
    """onto + x weight^T: [I, E], from [I, E], [I, D] and [E, D]."""
    if kernels := _kernels_for_few_rows(x_id):
        return kernels.linear_onto(onto_ie, x_id, weight_ed)
    return onto_ie + F.linear(x_id, weight_ed)


def skip_gate_norm_onto(
    onto_ie: torch.Tensor,
    o_ihp: torch.Tensor,
    v_ihp: torch.Tensor,
    z_ihp: torch.Tensor,
    skip_h: torch.Tensor,
    norm_p: torch.Tensor,
    eps: float,
    weight_ed: torch.Tensor,
) -> torch.Tensor:
    """onto + y weight^T: [I, E], y [I, H, P] what `skip_gate_norm` makes of the others, weight [E, H * P]."""
    if kernels := _kernels_for_few_rows(o_ihp):
        return kernels.skip_gate_norm_onto(onto_ie, o_ihp, v_ihp, z_ihp, skip_h, norm_p, eps, weight_ed)
    y_1ihp = skip_gate_norm(o_ihp[None], v_ihp[None], z_ihp[None], skip_h, norm_p, eps)
    return onto_ie + F.linear(y_1ihp[0].flatten(1), weight_ed)


def cross_entropy(logits_iv: torch.Tensor, labels_i: torch.Tensor) -> torch.Tensor:
    """The cross-entropy summed over labels, in nats: a scalar, fp32 at least.

    Args:
        logits_iv: [tokens, V].
        labels_i: int64 [tokens], -100 where there is nothing to predict.
    """
    if _has_kernels(logits_iv):
        from loglinear.ops.triton.cross_entropy import cross_entropy as kernel

        return kernel(logits_iv.contiguous(), labels_i)[0].sum()
    return F.cross_entropy(at_least_fp32(logits_iv), labels_i, reduction="sum")


class _SiluProductWithoutData(torch.autograd.Function):
    """What liger-kernel's function keeps, on the meta device, where it cannot run."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)


def _has_kernels(x: torch.Tensor) -> bool:
    """Whether Triton runs there, in that dtype."""
    return has_kernels(x) and x.dtype in (torch.bfloat16, torch.float16, torch.float32)


def _kernels_for_few_rows(x: torch.Tensor) -> ModuleType | None:
    """The kernels that take weights with what stands around them, if they are for as many tokens as x [I, ...] has."""
    if _has_kernels(x):
        from loglinear.ops.triton import few_rows

        if len(x) <= few_rows.MOST_ROWS:
            return few_rows
    return None
