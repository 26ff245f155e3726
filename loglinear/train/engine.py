"""The model under DeepSpeed ZeRO: one optimizer step from the micro-batches of a rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data_pipeline.batch import IGNORED, Batch
from loglinear.checkpoint import check_gradients_by_norm_alone, grad_norm
from loglinear.config import Config
from loglinear.model import LanguageModel
from loglinear.model.block import MIXERS
from loglinear.model.layers import SwiGLU
from loglinear.parallel import Mesh, local_batch
from loglinear.parallel.mesh import ModelParallelUnit
from loglinear.train.optim import make_optimizer
from loglinear.train.stability import Guard
from loglinear.train.timing import StepTimer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of the weights that the model computes with


@dataclass(frozen=True)
class StepResult:
    """What a step reports, equal on all ranks.

    Attributes:
        loss: mean cross-entropy per valid token of the global batch, in nats, before the update.
        grad_norm: L2 norm of the global gradient before clipping.
        tokens: valid tokens of the global batch.
        stop: whether any rank asked to stop.
        refusal: why the update was not made, or None.
    """

    loss: float
    grad_norm: float
    tokens: int
    stop: bool
    refusal: str | None


@dataclass(frozen=True)
class _Verdict:
    """On a step's update."""

    is_known: bool = False
    refusal: str | None = None


class Engine:
    """DeepSpeed around the model.

    Attributes:
        deepspeed: the DeepSpeed engine; calling it runs the model.
    """

    def __init__(self, model: LanguageModel, config: Config, mesh: Mesh, guard: Guard) -> None:
        """Shard `model`'s optimizer (ZeRO 1), gradients (2) and weights (3) over the ranks.

        Args:
            model: this rank's part.
            config: the run's.
            mesh: the ranks.
            guard: says which updates are refused.
        """
        import deepspeed
        from deepspeed.utils import set_z3_leaf_modules

        self.mesh, self.world, self.guard = mesh, mesh.world, guard
        self._loss, self._verdict = math.nan, _Verdict()
        optimizer = make_optimizer(model, config.optimizer)
        optimizer.allowed = self._allows
        # Their layers' weights are multiplied by several at once, so ZeRO 3 has to bring them together.
        set_z3_leaf_modules(model, [*MIXERS.values(), SwiGLU])
        self.deepspeed: Any = deepspeed.initialize(
            model=model.to(self.world.device),
            optimizer=optimizer,
            mpu=ModelParallelUnit(mesh),
            config=_deepspeed_config(config, mesh.data.size),
        )[0]
        check_gradients_by_norm_alone(self.deepspeed)

    @property
    def model(self) -> LanguageModel:
        """The model inside; under ZeRO 3 its weights are there only while a layer runs."""
        return self.deepspeed.module

    def step(self, batches: Sequence[Batch], learning_rate: float, wants_stop: bool, timer: StepTimer) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one update.

        The gradient is that of the token sum over the whole global batch divided by its number of valid tokens, at
        any number of ranks and micro-batches.
        """
        tokens, stops = self.world.sum(sum(map(_valid_tokens, batches)), wants_stop)
        tokens /= self.mesh.readers
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        self._verdict = _Verdict()
        for number, batch in enumerate(batches, 1):
            with timer("forward"):
                loss = self.loss_sum(batch)
            loss_sum += loss.detach()
            with timer("backward"):
                # DeepSpeed averages over replicas; the sum is wanted.
                self.deepspeed.backward(loss * (self.mesh.replicas.size / tokens), scale_wrt_gas=False)
            if number == len(batches):
                (total,) = self.world.sum(loss_sum.item() / self.mesh.tensor.size)
                self._loss = total / tokens
            with timer("optimizer"):
                self.deepspeed.step()  # updates after the last micro-batch alone
        self._allows()  # DeepSpeed asks for no update if the gradient is not finite
        norm, refusal = grad_norm(self.deepspeed), self._verdict.refusal
        self.guard.note(self._loss, norm, refusal)
        return StepResult(self._loss, norm, int(tokens), stops > 0, refusal)

    def _allows(self) -> bool:
        """Whether this step's update may be made: decided once a step, and by all ranks alike."""
        if not self._verdict.is_known:
            refusal = self.guard.judge(self._loss, grad_norm(self.deepspeed))
            (refusals,) = self.world.sum(refusal is not None)
            if refusals and refusal is None:
                refusal = "another rank refused it"
            self._verdict = _Verdict(True, refusal)
        return self._verdict.refusal is None

    def loss_sum(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy summed over the labels of this rank's part of a batch, in nats."""
        return self.deepspeed(*local_batch(*batch, self.mesh))


def _valid_tokens(batch: Batch) -> int:
    return int((batch.labels != IGNORED).sum())


def _deepspeed_config(config: Config, data_parallel: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.train.micro_batches(data_parallel),
        "gradient_clipping": config.optimizer.clip_norm,
        "zero_optimization": {"stage": config.train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.train.precision == "bf16", "check_grad_overflow": True},
        "steps_per_print": 2**62,
    }
