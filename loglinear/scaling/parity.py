"""A model over a mesh of ranks, held to the same model in one process: loss, logits and every gradient.

Shapes: b batch, t time, v vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from data_pipeline.batch import Batch, make_batch
from loglinear.config import Config, ParallelConfig
from loglinear.model import LanguageModel, build_model
from loglinear.model.layers import Documents
from loglinear.ops.checks import at_least_fp32
from loglinear.parallel import local_batch
from loglinear.parallel.collectives import all_gather, all_reduce
from loglinear.parallel.mesh import Mesh
from loglinear.parallel.parallelize import parallelize
from loglinear.parallel.shard import shard_of

TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-2}
VOCAB, SEQ_LEN, SAMPLES, HEADS, BOS = 48, 96, 4, 4, 1
PATTERNS = {"log_linear": ["log_linear"], "softmax": ["softmax"], "hybrid": ["log_linear", "softmax"]}


@dataclass(frozen=True)
class Case:
    """One parity check: a mesh (data, context, tensor), a mixer, and what is special about it."""

    mesh: tuple[int, int, int]
    pattern: str = "hybrid"
    sequence: bool = True
    packed: bool = True
    groups: int = 1
    level_scale: str = "mlp"
    seq_len: int = SEQ_LEN
    recomputes: bool = False

    @property
    def ranks(self) -> int:
        """How many ranks the mesh has."""
        return self.mesh[0] * self.mesh[1] * self.mesh[2]

    def config(self) -> Config:
        """A tiny model whose heads, groups and vocabulary divide as they must."""
        log_linear = {"heads": HEADS, "head_dim": 16, "groups": self.groups, "state_dim": 16}
        return Config.model_validate(
            {
                "model": {
                    "vocab_size": VOCAB,
                    "seq_len": self.seq_len,
                    "dim": 16,
                    "layers": 2,
                    "pattern": PATTERNS[self.pattern],
                    "log_linear": log_linear | {"level_scale": self.level_scale, "level_scale_hidden": 8},
                    "softmax": {"heads": HEADS, "head_dim": 8},
                    "mlp_dim": 32,
                    "init_std": 0.2,
                    "tie_embeddings": self.pattern != "softmax",
                },
                "train": {"global_batch": SAMPLES, "micro_batch": SAMPLES // self.mesh[0]},
                "parallel": {"context": self.mesh[1], "tensor": self.mesh[2], "sequence": self.sequence},
            }
        )


def grids(ranks: int) -> list[tuple[int, int, int]]:
    """Every mesh of `ranks` ranks that the tiny model and batch divide over."""
    sizes = range(1, ranks + 1)
    return [
        mesh
        for mesh in itertools.product(sizes, sizes, sizes)
        if math.prod(mesh) == ranks and not (SAMPLES % mesh[0] or SEQ_LEN % mesh[1] or HEADS % mesh[2])
    ]


def cases_over(ranks: int) -> list[Case]:
    """What is compared on GPUs: every mesh and mixer; the stream whole among tensor ranks; two query/key groups."""
    every = [Case(mesh, pattern) for mesh in grids(ranks) for pattern in PATTERNS]
    cut = [mesh for mesh in grids(ranks) if mesh[2] > 1]
    special = [(Case(mesh, sequence=False), Case(mesh, "log_linear", groups=2)) for mesh in cut]
    return every + [case for pair in special for case in pair]


def batch_of(case: Case, seed: int = 0) -> Batch:
    """Samples of random tokens, each one document, or cut into documents of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    tokens_bt = torch.randint(2, VOCAB, (SAMPLES, case.seq_len + 1), generator=generator)
    if case.packed:
        tokens_bt[torch.rand(tokens_bt.shape, generator=generator) < 0.04] = BOS
        middle = case.seq_len // 2  # where context ranks may be cut: a document ends there
        tokens_bt[0, [middle - 5, middle]] = BOS
    return packed(tokens_bt)


def packed(tokens_bt: torch.Tensor) -> Batch:
    """A batch of samples [B, T + 1] whose documents begin at every `BOS`."""
    seq_len = tokens_bt.shape[1] - 1
    return make_batch(list(tokens_bt.numpy()), seq_len, BOS, [seq_len] * len(tokens_bt))


def awake(model: torch.nn.Module, size: float = 0.3) -> None:
    """Move every parameter away from its start, where some gradients are zero; far, and bf16 can no longer follow."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


class Differences:
    """What differs in a case. Noted rather than raised: a rank that left early would let the others wait.

    Attributes:
        tolerance: of an error, relative to a norm.
        found: a sentence for everything that is further off.
        largest: the largest error, as a share of what is allowed.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.found: list[str] = []
        self.largest = 0.0

    def compare(
        self,
        name: str,
        found: torch.Tensor,
        expected: torch.Tensor,
        whole: torch.Tensor | None = None,
        floor: float = 0.0,
    ) -> None:
        """Note if `found` [...] is further from `expected` [...] than the tolerance times the norm of that, or of its
        `whole`, plus `floor`."""
        error = (found.double() - expected).norm().item()
        norm = (expected if whole is None else whole).norm().item()
        allowed = self.tolerance * norm + floor
        self.largest = max(self.largest, error / allowed if allowed else float(error > 0))
        if not error <= allowed:
            self.found.append(f"{name} differs by {error:.1e}, its norm is {norm:.1e}")


def compare_all(mesh_of: Callable[[ParallelConfig], Mesh], ranks: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compare each of `cases_over` the ranks; every rank must call it.

    Returns:
        cases: how many; tolerance; found: a sentence for everything that is further off, on any rank; largest: the
        largest error, as a share of what is allowed.
    """
    found, largest, cases = [], 0.0, cases_over(ranks)
    for case in cases:
        mesh = mesh_of(case.config().parallel)
        own = compare(case, mesh, dtype)
        for rank, (sentences, share) in enumerate(mesh.world.gather((own.found, own.largest))):
            found += [f"{case} on rank {rank}: {sentence}" for sentence in sentences]
            largest = max(largest, share)
    return {"cases": len(cases), "tolerance": TOLERANCES[dtype], "found": found, "largest": largest}


def compare(case: Case, mesh: Mesh, dtype: torch.dtype) -> Differences:
    """Loss, logits and the gradient of every parameter, against the same weights in float64 in one process.

    The error is relative to each parameter's gradient; below float64 with a floor of a hundredth of the whole one's.
    """
    config, batch, differences = case.config(), batch_of(case), Differences(TOLERANCES[dtype])
    truth = build_model(config.model, seed=0).double()
    awake(truth, 0.05 if dtype == torch.bfloat16 else 0.3)
    truth = truth.to(dtype).double()
    model = copy.deepcopy(truth).to(dtype)
    model.recomputed_blocks = len(model.blocks) if case.recomputes else 0
    model = parallelize(model, mesh, config).to(mesh.world.device)
    documents = Documents.packed(batch.cu_seqlens, torch.device("cpu"))
    expected = truth(batch.inputs, batch.labels, documents)
    expected.backward()
    own = own_samples(batch, mesh)
    loss = model(*local_batch(*own, mesh))
    loss.backward()
    total = all_reduce(loss.detach(), mesh.replicas)
    differences.compare("loss", total.cpu(), expected.detach())
    with torch.no_grad():
        inputs_bt, _, local = local_batch(*own, mesh)
        logits_btv = model(inputs_bt, documents=local)
        whole = all_gather(all_gather(logits_btv, mesh.context, 1), mesh.data, 0)
        differences.compare("logits", whole.cpu(), truth(batch.inputs, documents=documents))
    compare_gradients(model, truth, mesh, differences)
    return differences


def own_samples(batch: Batch, mesh: Mesh) -> Batch:
    """The samples of this rank's place along the data axis, packed anew."""
    inputs_bt, labels_bt = (x.chunk(mesh.data.size)[mesh.data.index] for x in batch[:2])
    tokens = torch.cat([inputs_bt, labels_bt[:, -1:]], 1)
    return packed(tokens)


def compare_gradients(model: LanguageModel, truth: LanguageModel, mesh: Mesh, differences: Differences) -> None:
    """Each parameter's gradient, summed over replicas, against this rank's part of the true one."""
    expected = dict(truth.named_parameters())
    norm = torch.cat([p.grad.flatten() for p in expected.values() if p.grad is not None]).norm().item()
    floor = 0.0 if model.head.weight.dtype == torch.float64 else 1e-2 * differences.tolerance * norm
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        shard = shard_of(parameter)
        whole = expected[name].grad
        assert whole is not None
        part = whole.narrow(shard.dim, shard.start, shard.size)
        differences.compare(name, all_reduce(at_least_fp32(parameter.grad), mesh.replicas).cpu(), part, whole, floor)
