"""What ranks run to be held to one process: training steps, broken rules, bytes sent.

All of it is here or in `loglinear.scaling.parity`, so that one start of ranks serves many cases.
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import loglinear.parallel
from data_pipeline.batch import IGNORED
from loglinear.checkpoint.zero import fragments
from loglinear.config import Config, ParallelConfig
from loglinear.model import build_model
from loglinear.model.layers import Documents
from loglinear.parallel import local_batch, make_mesh, parallel_model, start_world
from loglinear.parallel.collectives import Pending, count_traffic
from loglinear.parallel.mesh import Mesh
from loglinear.parallel.parallelize import parallelize
from loglinear.parallel.vocabulary import VocabParallelCrossEntropy
from loglinear.scaling.parity import VOCAB, Case, Differences, batch_of, compare, own_samples
from loglinear.train import engine as engine_module
from loglinear.train.engine import Engine
from loglinear.train.optim import make_optimizer
from loglinear.train.schedule import learning_rate
from loglinear.train.stability import Guard
from loglinear.train.timing import StepTimer

MESHES = [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 1, 4), (1, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)]


def run_cases(cases: list[Case], folder: Path, dtype: torch.dtype = torch.float64) -> None:
    """In every rank: each case; what differs is written to `folder`, one file a rank."""
    world = start_world()

    def check(case: Case) -> Differences:
        return compare(case, make_mesh(world, case.config().parallel), dtype)

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


STEPS = 5
CLIP_NORM = 0.5
EPS = 1e-4  # so that AdamW does not blow up what rounding leaves of gradients that vanish


def training_config(case: Case, stage: int) -> Config:
    """The case's model trained for a few steps, with clipping that acts."""
    tree = case.config().model_dump()
    tree["train"] |= {"steps": STEPS, "zero_stage": stage, "activation_checkpointing": case.recomputes}
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
    release_small_parameters_too()

    def check(case: Case, stage: int) -> Differences:
        return compare_training(case, stage, truths[case.pattern], make_mesh(world, case.config().parallel))

    report(cases, check, folder / f"rank-{world.rank}")
    world.close()


def compare_training(case: Case, stage: int, truth: Truth, mesh: Mesh) -> Differences:
    """Every step's loss and gradient norm, every parameter's first gradient and last weight, in fp32."""
    config = training_config(case, stage)
    engine = Engine(parallel_model(mesh, config, fresh=True), config, mesh, Guard(config.stability))
    timer, differences = StepTimer(torch.device("cpu")), Differences(1e-5)
    if stage == 3:  # DeepSpeed numbers the modules whose weights it brings together; `mixer` and `mlp` are such
        alone = [name for name, module in engine.model.named_modules() if hasattr(module, "ds_id")]
        inside = re.compile(r"blocks\.\d+\.(mixer|mlp)\..+")
        differences.found += [f"{name} is gathered by itself" for name in alone if inside.fullmatch(name)]
    behind_blocks: list[list[str]] = []
    engine.model.norm.register_forward_pre_hook(lambda *_: behind_blocks.append(whole_parameters(engine.model)))
    for step in range(STEPS):
        own = own_samples(batch_of(case, seed=step), mesh)
        result = engine.step([own], learning_rate(config, step), False, timer)
        differences.compare(f"loss of step {step}", torch.tensor(result.loss), torch.tensor(truth.losses[step]))
        differences.compare(f"norm of step {step}", torch.tensor(result.grad_norm), torch.tensor(truth.norms[step]))
        if stage == 3:
            held = [name for name in behind_blocks[0] if name.startswith("blocks.")] + whole_parameters(engine.model)
            differences.found += [f"{name} was not released by step {step}" for name in held]
        if step == 0:
            beta = config.optimizer.betas[0]
            gradients = {name: (1 - beta) * gradient for name, gradient in truth.gradients.items()}
            norm = sum(gradient.norm().item() ** 2 for gradient in gradients.values()) ** 0.5
            compare_fragments(engine, "exp_avg", gradients, differences, noise=1e-8 * norm)  # of sums that cancel
    reach = config.optimizer.lr * STEPS  # as far as AdamW moves an element, however small its gradient
    compare_fragments(engine, "weight", truth.weights, differences, noise=1e-5 * reach)
    return differences


def whole_parameters(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that are there; those that ZeRO 3 has released have no numbers."""
    return [name for name, parameter in model.named_parameters() if parameter.numel()]


def release_small_parameters_too() -> None:
    """DeepSpeed keeps what has less than 100,000 numbers, all of these models, once ZeRO 3 has brought it together."""
    configure = engine_module._deepspeed_config

    def configured(*args: Any) -> dict[str, Any]:
        tree = configure(*args)
        return tree | {"zero_optimization": tree["zero_optimization"] | {"stage3_param_persistence_threshold": 0}}

    engine_module._deepspeed_config = configured


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
    module.overlap.start_all_reduce = lambda x, axis: Pending(x, None, x)


def keep_shared_gradients_apart(module: Any) -> None:
    """The parts of shared weights' gradients are no longer summed."""
    module.parallelize._sum_shared_gradients = lambda model, axis, config: None


def forget_the_halo(module: Any) -> None:
    """Convolutions see zeros before a cut."""
    module.context.last_inputs = lambda inputs, reach, axis: [torch.zeros_like(x_btc[:, -reach:]) for x_btc in inputs]


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


def lose_on_large_logits(folder: Path) -> None:
    """In every rank: the loss of fp32 logits whose exponential overflows, and its gradient, against torch's own."""
    world, differences = start_world(), Differences(1e-6)
    axis = make_mesh(world, ParallelConfig(tensor=world.size)).tensor
    logits_btv = 1000 * torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    labels_bt = torch.arange(18).view(2, 9) % 8
    labels_bt[0, 4] = IGNORED
    truth = logits_btv.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(truth.flatten(0, 1), labels_bt.flatten(), reduction="sum")
    own = logits_btv.chunk(world.size, 2)[world.rank].clone().requires_grad_()
    loss = VocabParallelCrossEntropy(axis)(own, labels_bt)
    torch.autograd.backward([expected, loss])
    assert truth.grad is not None
    assert own.grad is not None
    differences.compare("loss", loss.detach(), expected.detach())
    differences.compare("gradient", own.grad, truth.grad.chunk(world.size, 2)[world.rank])
    (folder / f"rank-{world.rank}").write_text("\n".join(differences.found))
    world.close()


def note_order(folder: Path) -> None:
    """In every rank: what happens one after the other in the backward pass of one block and the head."""
    world, order = start_world(), []

    def noting(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            order.append(what)
            return function(*args)

        return noted

    overlap = loglinear.parallel.overlap
    start = overlap.start_reduce_scatter

    class Noted(Pending):
        def wait(self) -> torch.Tensor:
            order.append("wait")
            return super().wait()

    overlap.start_reduce_scatter = noting("start", lambda *args: Noted(**vars(start(*args))))
    overlap.weight_gradients = noting("weights", overlap.weight_gradients)
    tree = Case((1, 1, world.size), "log_linear").config().model_dump()
    tree["model"] |= {"layers": 1}
    config = Config.model_validate(tree)
    mesh = make_mesh(world, config.parallel)
    model = parallelize(build_model(config.model, seed=0), mesh, config)
    model(*local_batch(*batch_of(Case((1, 1, world.size))), mesh)).backward()
    (folder / f"rank-{world.rank}").write_text(" ".join(order))
    world.close()
