"""The model under DeepSpeed ZeRO: one optimizer step from the micro-batches of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data_pipeline.batch import IGNORED, Batch
from loglinear.config import Config
from loglinear.model import LanguageModel
from loglinear.parallel import World
from loglinear.train.optim import make_optimizer
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
    """

    loss: float
    grad_norm: float
    tokens: int
    stop: bool


class Engine:
    """DeepSpeed around the model.

    Attributes:
        deepspeed: the DeepSpeed engine; calling it runs the model.
    """

    def __init__(self, model: LanguageModel, config: Config, world: World) -> None:
        """Shard `model`'s optimizer (ZeRO 1), gradients (2) and weights (3) over the ranks."""
        import deepspeed

        self.world = world
        self.deepspeed: Any = deepspeed.initialize(
            model=model.to(world.device),
            optimizer=make_optimizer(model, config.optimizer),
            config=_deepspeed_config(config, world.size),
        )[0]

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
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for batch in batches:
            with timer("forward"):
                loss = self.loss_sum(batch)
            loss_sum += loss.detach()
            with timer("backward"):
                # DeepSpeed averages over ranks; the sum is wanted.
                self.deepspeed.backward(loss * (self.world.size / tokens), scale_wrt_gas=False)
            with timer("optimizer"):
                self.deepspeed.step()  # updates after the last micro-batch alone
        (total,) = self.world.sum(loss_sum.item())
        grad_norm = float(self.deepspeed.get_global_grad_norm())
        return StepResult(total / tokens, grad_norm, int(tokens), stops > 0)

    def loss_sum(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy summed over the labels of a batch, in nats."""
        device = self.world.device
        return self.deepspeed(batch.inputs.to(device), batch.labels.to(device), batch.cu_seqlens)


def _valid_tokens(batch: Batch) -> int:
    return int((batch.labels != IGNORED).sum())


def _deepspeed_config(config: Config, ranks: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.train.micro_batches(ranks),
        "gradient_clipping": config.optimizer.clip_norm,
        "zero_optimization": {"stage": config.train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "steps_per_print": 2**62,
    }
