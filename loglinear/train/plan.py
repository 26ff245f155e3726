"""What a run would need, without starting it: the model is built on the meta device, where tensors have no data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.overrides import TorchFunctionMode

from loglinear.config import Config
from loglinear.model import LanguageModel
from loglinear.model.layers import Documents
from loglinear.ops.device import kernels_on_meta
from loglinear.ops.peak import TRAINING_FLOPS
from loglinear.parallel.collectives import count_traffic
from loglinear.parallel.cut import cut_documents
from loglinear.parallel.mesh import data_parallel_size, last_rank
from loglinear.parallel.parallelize import parallelize
from loglinear.train.engine import DTYPES

LocalBatch = tuple[torch.Tensor, Documents | None]  # token ids, and where documents lie in them
MASTER_AND_MOMENTS = 3 * 4  # bytes a parameter: fp32 weight and AdamW's two moments


@dataclass(frozen=True)
class Plan:
    """Sizes of a run. Memory is in bytes per rank; FLOPs are those of a whole training step's token.

    Attributes:
        parameters: number of parameters; tied ones count once.
        flops_per_token: forward and backward, averaged over a document of the training length.
        tokens_per_step: of the global batch.
        micro_batches: of each rank in a step.
        memory: by kind; activations are the most that autograd holds for one micro-batch, with the kernels of a GPU.
        traffic: bytes that each rank gives to the network in a step, by the axis of the mesh.
    """

    parameters: int
    flops_per_token: int
    tokens_per_step: int
    micro_batches: int
    memory: dict[str, int]
    traffic: dict[str, int]


def make_plan(config: Config, ranks: int) -> Plan:
    """Plan `config` for `ranks` ranks.

    Raises:
        UserError: the ranks do not fit the mesh, or the global batch does not divide evenly over them.
    """
    data = data_parallel_size(config.parallel, ranks)
    micro_batches = config.train.micro_batches(data)
    with torch.device("meta"):
        whole = LanguageModel(config.model, recomputed_blocks=config.recomputed_blocks)
    parameters, flops = whole.parameter_count(), whole.flops_per_token(config.model.seq_len)
    replicas = data * config.parallel.context
    model = parallelize(whole.to(DTYPES[config.train.precision]), last_rank(data, config.parallel), config)
    batch = _local_batch(config)
    return Plan(
        parameters=parameters,
        flops_per_token=TRAINING_FLOPS * flops,
        tokens_per_step=config.train.global_batch * config.model.seq_len,
        micro_batches=micro_batches,
        memory=_state_memory(config, model.parameter_count(), replicas)
        | {"activations": _activation_memory(model, *batch)},
        traffic=_traffic(config, model, batch, micro_batches, replicas),
    )


def print_plan(plan: Plan) -> None:
    """Show a plan as a table."""
    table = Table(show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_row("parameters", f"{plan.parameters:,}")
    table.add_row("training FLOPs per token", f"{plan.flops_per_token:,}")
    table.add_row("tokens per step", f"{plan.tokens_per_step:,}")
    table.add_row("micro-batches per rank and step", f"{plan.micro_batches:,}", end_section=True)
    for kind, size in plan.memory.items():
        table.add_row(f"{kind}, per rank", _gib(size))
    table.add_row("total, per rank", _gib(sum(plan.memory.values())), end_section=True)
    for axis, size in plan.traffic.items():
        table.add_row(f"sent over {axis}, per rank and step", _gib(size))
    Console().print(table)


def _gib(size: int) -> str:
    return f"{size / 2**30:.3f} GiB"


def _local_batch(config: Config) -> LocalBatch:
    """Token ids [B, T / context] of the last context rank, every sample one document."""
    samples, seq_len, context = config.train.micro_batch, config.model.seq_len, config.parallel.context
    tokens_bt = torch.zeros(samples, seq_len // context, dtype=torch.int64, device="meta")
    bounds = seq_len * torch.arange(samples + 1, dtype=torch.int32)
    if context > 1:
        return tokens_bt, cut_documents(bounds, samples, context, context - 1, tokens_bt.device)
    return tokens_bt, Documents.packed(bounds, tokens_bt.device) if config.parallel.tensor > 1 else None


def _traffic(
    config: Config, model: LanguageModel, batch: LocalBatch, micro_batches: int, replicas: int
) -> dict[str, int]:
    """Counted in a forward and backward pass without data; what ZeRO sends by its paper, arXiv 1910.02054.

    DeepSpeed sums gradients after every micro-batch in stages 2 and 3, and gathers weights twice for each in stage 3.
    """
    tokens_bt, documents = batch
    with count_traffic() as traffic:
        model(tokens_bt, tokens_bt, documents).backward()
    weights = model.parameter_count() * DTYPES[config.train.precision].itemsize
    passes = {1: 2, 2: micro_batches + 1, 3: 3 * micro_batches}[config.train.zero_stage]
    sent = {axis: size * micro_batches for axis, size in sorted(traffic.items())}
    return sent | {"replicas": passes * weights * (replicas - 1) // replicas}


def _state_memory(config: Config, parameters: int, ranks: int) -> dict[str, int]:
    """ZeRO 1 shards what the optimizer keeps, 2 the gradients too, 3 the weights too. Source: arXiv 1910.02054."""
    stage, precision = config.train.zero_stage, DTYPES[config.train.precision].itemsize
    share = -(-parameters // ranks)
    return {
        "weights": precision * (share if stage == 3 else parameters),
        "gradients": precision * (share if stage >= 2 else parameters),
        "optimizer": MASTER_AND_MOMENTS * share,
    }


def _activation_memory(model: LanguageModel, tokens_bt: torch.Tensor, documents: Documents | None) -> int:
    """The most bytes that autograd holds at once for the backward pass of a micro-batch, weights apart."""
    weights = list(model.parameters())
    kept = _saved_bytes(lambda: model(tokens_bt, tokens_bt, documents), weights)
    recomputed_blocks = model.blocks[: model.recomputed_blocks]
    if not recomputed_blocks:
        return kept
    # Once those behind are spent, a block's activations come back beside its input and those of all blocks before it.
    x_btd = model.embedding(tokens_bt if documents is None else tokens_bt.view(1, -1))
    documents = documents or Documents.rows(len(tokens_bt), tokens_bt.shape[1], 0, x_btd.device)
    blocks = [
        _saved_bytes(lambda block=block: block(x_btd, documents), [*weights, x_btd]) for block in recomputed_blocks
    ]
    recomputed = max(number * x_btd.nbytes + block for number, block in enumerate(blocks, 1))
    return max(kept, tokens_bt.nbytes + recomputed)


def _saved_bytes(forward: Callable[[], Any], apart: Iterable[torch.Tensor]) -> int:
    """Bytes of all storages that autograd keeps of `forward()`, but for those of `apart`."""
    sizes: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # alive, so that no storage is taken for another
    not_counted = {tensor.untyped_storage()._cdata for tensor in apart}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in not_counted:
            kept.append(tensor)
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, _FlashAttention(), kernels_on_meta():
        kept.append(forward())
    return sum(sizes.values())


class _FlashAttention(TorchFunctionMode):
    """On the meta device softmax attention would keep its T x T weights; every real device has a fused kernel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _SavesInputsAndOutput.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _SavesInputsAndOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_bhtp: torch.Tensor, k_bhsp: torch.Tensor, v_bhsp: torch.Tensor) -> torch.Tensor:
        o_bhtp = torch.empty_like(q_bhtp)
        logsumexp_bht = torch.empty(q_bhtp.shape[:3], dtype=torch.float32, device=q_bhtp.device)
        ctx.save_for_backward(q_bhtp, k_bhsp, v_bhsp, o_bhtp, logsumexp_bht)
        return o_bhtp
