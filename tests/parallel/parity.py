"""A model over a mesh of real gloo ranks, held to the same model in one process.

Everything that runs in the ranks is here, so that one start of ranks serves many cases.
"""

from __future__ import annotations

import copy
import json
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import loglinear.parallel
from data_pipeline.batch import IGNORED, Batch, make_batch
from loglinear.checkpoint.zero import fragments
from loglinear.config import Config
from loglinear.model import build_model
from loglinear.model.layers import Documents
from loglinear.ops.checks import at_least_fp32
from loglinear.parallel import local_batch, make_mesh, parallel_model, start_world
from loglinear.parallel.collectives import all_gather, all_reduce, count_traffic
from loglinear.parallel.mesh import Mesh
from loglinear.parallel.parallelize import parallelize
from loglinear.parallel.shard import shard_of
from loglinear.train.engine import Engine
from loglinear.train.optim import make_optimizer
from loglinear.train.schedule import learning_rate
from loglinear.train.timing import StepTimer

TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-2}
VOCAB, SEQ_LEN, SAMPLES, BOS = 48, 96, 4, 1
MESHES = [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 1, 4), (1, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)]
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

    @property
    def ranks(self) -> int:
        """How many ranks the mesh has."""
        return self.mesh[0] * self.mesh[1] * self.mesh[2]

    def config(self) -> Config:
        """A tiny model whose heads, groups and vocabulary divide as they must."""
        log_linear = {"heads": 4, "head_dim": 16, "groups": self.groups, "state_dim": 16}
        return Config.model_validate(
            {
                "model": {
                    "vocab_size": VOCAB,
                    "seq_len": SEQ_LEN,
                    "dim": 16,
                    "layers": 2,
                    "pattern": PATTERNS[self.pattern],
                    "log_linear": log_linear | {"level_scale": self.level_scale, "level_scale_hidden": 8},
                    "softmax": {"heads": 4, "head_dim": 8},
                    "mlp_dim": 32,
                    "init_std": 0.2,
                    "tie_embeddings": self.pattern != "softmax",
                },
                "train": {"global_batch": SAMPLES, "micro_batch": SAMPLES // self.mesh[0]},
                "parallel": {"context": self.mesh[1], "tensor": self.mesh[2], "sequence": self.sequence},
            }
        )


def batch_of(case: Case, seed: int = 0) -> Batch:
    """Samples of random tokens, each one document, or cut into documents of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    tokens_bt = torch.randint(2, VOCAB, (SAMPLES, SEQ_LEN + 1), generator=generator)
    if case.packed:
        tokens_bt[torch.rand(tokens_bt.shape, generator=generator) < 0.04] = BOS
    return packed(tokens_bt)


def packed(tokens_bt: torch.Tensor) -> Batch:
    """A batch of samples [B, T + 1] whose documents begin at every `BOS`."""
    return make_batch(list(tokens_bt.numpy()), SEQ_LEN, BOS, [SEQ_LEN] * len(tokens_bt))


def awake(model: torch.nn.Module, size: float = 0.3) -> None:
    """Move every parameter away from its start, where some gradients are zero; far, and bf16 can no longer follow."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def run_cases(cases: list[Case], folder: Path, dtype: torch.dtype = torch.float64) -> None:
    """In every rank: each case; what differs is written to `folder`, one file a rank."""
    world = start_world()

    def check(case: Case) -> Differences:
        return compare(case, make_mesh(world, case.config().parallel), dtype, world.device)

    report([(case,) for case in cases], check, folder / f"rank-{world.rank}")
    world.close()


def report(cases: Iterable[tuple[Any, ...]], check: Callable[..., Differences], file: Path) -> None:
    """Check each case and write down which differ, and how; an error ends the rank."""
    found = []
    for case in cases:
        try:
            found += [f"{case}: {difference}" for difference in check(*case).found]
        except Exception:
            file.write_text(f"{case}: {traceback.format_exc()}")
            raise
    file.write_text("\n".join(found))


class Differences:
    """What differs in a case. Noted rather than raised: a rank that left early would let the others wait."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.found: list[str] = []

    def compare(
        self,
        name: str,
        found: torch.Tensor,
        expected: torch.Tensor,
        whole: torch.Tensor | None = None,
        floor: float = 0.0,
    ) -> None:
        """Note if the error is above the tolerance times the norm of the truth, or of its `whole`, plus `floor`."""
        error = (found.double() - expected).norm().item()
        norm = (expected if whole is None else whole).norm().item()
        if not error <= self.tolerance * norm + floor:
            self.found.append(f"{name} differs by {error:.1e}, its norm is {norm:.1e}")


def compare(case: Case, mesh: Mesh, dtype: torch.dtype, device: torch.device) -> Differences:
    """Loss, logits and the gradient of every parameter, against the same weights in float64 in one process."""
    config, batch, differences = case.config(), batch_of(case), Differences(TOLERANCES[dtype])
    truth = build_model(config.model, seed=0).double()
    awake(truth, 0.05 if dtype == torch.bfloat16 else 0.3)
    truth = truth.to(dtype).double()
    model = copy.deepcopy(truth).to(dtype)
    model = parallelize(model, mesh, config).to(device)
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


def compare_gradients(model: torch.nn.Module, truth: torch.nn.Module, mesh: Mesh, differences: Differences) -> None:
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


STEPS = 5
CLIP_NORM = 0.5
EPS = 1e-4  # so that AdamW does not blow up what rounding leaves of gradients that vanish


def training_config(case: Case, stage: int) -> Config:
    """The case's model trained for a few steps, with clipping that acts."""
    tree = case.config().model_dump()
    tree["train"] |= {"steps": STEPS, "zero_stage": stage}
    tree["optimizer"] |= {"lr": 1e-2, "clip_norm": CLIP_NORM, "eps": EPS}
    return Config.model_validate(tree)


@dataclass(frozen=True)
class Truth:
    """Five steps in one process: losses, gradient norms, the first step's clipped gradients, the last weights."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def train_plainly(case: Case) -> Truth:
    """Plain PyTorch in float64."""
    config = training_config(case, stage=1)
    model = build_model(config.model, seed=0).double()
    optimizer = make_optimizer(model, config.optimizer)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        batch = batch_of(case, seed=step)
        loss = model(batch.inputs, batch.labels, Documents.packed(batch.cu_seqlens, torch.device("cpu")))
        loss = loss / (batch.labels != IGNORED).sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM).item())
        losses.append(loss.item())
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
    return Truth(losses, norms, gradients, {name: p.detach() for name, p in model.named_parameters()})


def train_cases(cases: list[tuple[Case, int]], truths: dict[str, Truth], folder: Path) -> None:
    """In every rank: each case under its ZeRO stage; what differs is written to `folder`, one file a rank."""
    world = start_world()

    def check(case: Case, stage: int) -> Differences:
        return compare_training(case, stage, truths[case.pattern], make_mesh(world, case.config().parallel))

    report(cases, check, folder / f"rank-{world.rank}")
    world.close()


def compare_training(case: Case, stage: int, truth: Truth, mesh: Mesh) -> Differences:
    """Every step's loss and gradient norm, every parameter's first gradient and last weight, in fp32."""
    config = training_config(case, stage)
    engine = Engine(parallel_model(mesh, config, fresh=True), config, mesh)
    timer, differences = StepTimer(torch.device("cpu")), Differences(1e-5)
    for step in range(STEPS):
        own = own_samples(batch_of(case, seed=step), mesh)
        result = engine.step([own], learning_rate(config, step), False, timer)
        differences.compare(f"loss of step {step}", torch.tensor(result.loss), torch.tensor(truth.losses[step]))
        differences.compare(f"norm of step {step}", torch.tensor(result.grad_norm), torch.tensor(truth.norms[step]))
        if step == 0:
            beta = config.optimizer.betas[0]
            gradients = {name: (1 - beta) * gradient for name, gradient in truth.gradients.items()}
            norm = sum(gradient.norm().item() ** 2 for gradient in gradients.values()) ** 0.5
            compare_fragments(engine, "exp_avg", gradients, differences, noise=1e-8 * norm)  # of sums that cancel
    reach = config.optimizer.lr * STEPS  # as far as AdamW moves an element, however small its gradient
    compare_fragments(engine, "weight", truth.weights, differences, noise=1e-5 * reach)
    return differences


def compare_fragments(
    engine: Engine, kind: str, expected: dict[str, torch.Tensor], differences: Differences, noise: float
) -> None:
    """What this rank owns of every parameter's weight or moment, against the same part of the truth."""
    for fragment in fragments(engine.deepspeed):
        shard, found = fragment.shard, fragment.tensors[kind]
        part = expected[fragment.name].narrow(shard.dim, shard.start, shard.size).flatten()
        part = part[fragment.start : fragment.start + len(found)]
        differences.compare(
            f"{kind} of {fragment.name}", found, part, expected[fragment.name], noise * len(found) ** 0.5
        )


def ignore_gradients_of_others(module: Any) -> None:
    """The gradient of what all tensor ranks hold whole is no longer summed."""
    module.parallelize.copy_to = lambda x, axis: x


def keep_shared_gradients_apart(module: Any) -> None:
    """The parts of shared weights' gradients are no longer summed."""
    module.parallelize._sum_shared_gradients = lambda model, axis, config: None


def forget_the_halo(module: Any) -> None:
    """Convolutions see zeros before a cut."""
    module.parallelize.give_halo = lambda conv, inputs, axis: give_nothing(conv, inputs)


def give_nothing(conv: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Rows without what was before them."""
    x_btc, documents = inputs[:2]
    rows = x_btc[0].unflatten(0, (documents.samples, -1))
    positions = documents.positions_bt.view(documents.samples, -1)
    return (
        rows,
        Documents(positions, documents.length, documents.cu_seqlens),
        torch.zeros_like(rows[:, 1 - conv.width :]),
    )


def forget_the_past(module: Any) -> None:
    """Log-linear attention begins with an empty state at every cut."""
    whole = module.context._initial_buckets
    module.context._initial_buckets = lambda *args: 0 * whole(*args)


def forget_the_decay(module: Any) -> None:
    """States do not decay over the ranks between their own and the reader's."""
    whole = module.context._initial_buckets
    module.context._initial_buckets = lambda states, totals, *others: whole(states, 0 * totals, *others)


BREAKS = {
    ignore_gradients_of_others: Case((1, 1, 2), sequence=False),
    keep_shared_gradients_apart: Case((1, 1, 2)),
    forget_the_halo: Case((1, 2, 1)),
    forget_the_past: Case((1, 2, 1)),
    forget_the_decay: Case((1, 4, 1), packed=False),
}


def run_broken(rule: Callable[[Any], None], case: Case, folder: Path) -> None:
    """In every rank: one case with one rule broken."""
    rule(loglinear.parallel)
    run_cases([case], folder)


def count_bytes(seq_lens: list[int], folder: Path) -> None:
    """In every rank: bytes given to the network in a training step of one layer, at several lengths."""
    world = start_world()
    counts = []
    for seq_len in seq_lens:
        tree = Case((1, world.size, 1), "log_linear").config().model_dump()
        tree["model"] |= {"seq_len": seq_len, "layers": 1}
        tree["train"] |= {"global_batch": 2, "micro_batch": 2}
        config = Config.model_validate(tree)
        mesh = make_mesh(world, config.parallel)
        model = parallelize(build_model(config.model, seed=0), mesh, config)
        tokens_bt = torch.randint(2, VOCAB, (2, seq_len))
        bounds = seq_len * torch.arange(3, dtype=torch.int32)
        with count_traffic() as traffic:
            model(*local_batch(tokens_bt, tokens_bt, bounds, mesh)).backward()
        counts.append(dict(traffic))
    (folder / f"rank-{world.rank}").write_text(json.dumps(counts))
    world.close()
