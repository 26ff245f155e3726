"""Cross-entropy of logits in their own dtype: read once forward, read and written once backward, never copied to fp32.

Shapes: i token, v vocabulary.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel's constants and the options of its launch are not what the type checker takes them for.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loglinear.ops.triton.operator import operator

MOST_AT_ONCE = 8192  # logits of a token


@operator("loglinear::cross_entropy")
def cross_entropy(logits_iv: torch.Tensor, labels_i: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-log softmax of each token's label, 0 for negative labels, and log sum exp of its logits; fp32 [tokens] both.

    Args:
        logits_iv: [tokens, V], contiguous.
        labels_i: int64 [tokens], below V.
    """
    loss_i, normaliser_i = (logits_iv.new_empty(len(logits_iv), dtype=torch.float32) for _ in range(2))
    vocabulary = logits_iv.shape[1]
    _forward[(len(logits_iv),)](logits_iv, labels_i, loss_i, normaliser_i, vocabulary, BLOCK=_block(vocabulary))
    return loss_i, normaliser_i


def _block(vocabulary: int) -> int:
    return min(MOST_AT_ONCE, 1 << (vocabulary - 1).bit_length())


@cross_entropy.register_fake
def _(logits_iv, labels_i):
    return tuple(logits_iv.new_empty(len(logits_iv), dtype=torch.float32) for _ in range(2))


@operator("loglinear::cross_entropy_backward")
def _cross_entropy_backward(
    dloss_i: torch.Tensor, logits_iv: torch.Tensor, labels_i: torch.Tensor, normaliser_i: torch.Tensor
) -> torch.Tensor:
    """The gradient of the logits."""
    dlogits_iv = torch.empty_like(logits_iv)
    vocabulary = logits_iv.shape[1]
    block = _block(vocabulary)
    _backward[(len(logits_iv), triton.cdiv(vocabulary, block))](
        dloss_i, logits_iv, labels_i, normaliser_i, dlogits_iv, vocabulary, BLOCK=block
    )
    return dlogits_iv


@_cross_entropy_backward.register_fake
def _(dloss_i, logits_iv, labels_i, normaliser_i):
    return torch.empty_like(logits_iv)


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _autograd(ctx, dloss_i, _):
    return _cross_entropy_backward(dloss_i.contiguous(), *ctx.saved_tensors), None


cross_entropy.register_autograd(_autograd, setup_context=_setup_context)


@triton.jit
def _forward(logits_ptr, labels_ptr, loss_ptr, normaliser_ptr, V, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    logits_ptr += token * V
    highest, total = float("-inf"), 0.0
    for first in range(0, V, BLOCK):
        v = first + tl.arange(0, BLOCK)
        logits_v = tl.load(logits_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(logits_v, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits_v - higher), 0)
        highest = higher
    normaliser = highest + tl.log(total)
    label = tl.load(labels_ptr + token)
    of_label = tl.load(logits_ptr + label, mask=label >= 0, other=0.0).to(tl.float32)
    tl.store(loss_ptr + token, tl.where(label >= 0, normaliser - of_label, 0.0))
    tl.store(normaliser_ptr + token, normaliser)


@triton.jit
def _backward(dloss_ptr, logits_ptr, labels_ptr, normaliser_ptr, dlogits_ptr, V, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + token)
    dloss = tl.where(label >= 0, tl.load(dloss_ptr + token), 0.0)
    logits_v = tl.load(logits_ptr + token * V + v, mask=v < V, other=0.0).to(tl.float32)
    share_v = tl.exp(logits_v - tl.load(normaliser_ptr + token))
    dlogits_v = dloss * (share_v - tl.where(v == label, 1.0, 0.0))
    tl.store(dlogits_ptr + token * V + v, dlogits_v.to(dlogits_ptr.dtype.element_ty), mask=v < V)
