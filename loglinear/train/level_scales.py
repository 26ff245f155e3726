"""Lambda of the running model, taken as it comes out of each layer's map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from loglinear.ops.lambda_map import LambdaMap


class LevelScaleStatistics:
    """Keeps the last level scales of every layer while `recording`. Shapes: b batch, t time, h head, l level."""

    def __init__(self, model: nn.Module) -> None:
        self.recording = False
        self._last: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        maps = [module for module in model.modules() if isinstance(module, LambdaMap)]
        for layer, module in enumerate(maps):
            module.register_forward_hook(self._hook(layer))

    def take(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Layer (among those with level scales), level, and its lambdas at the tokens that read it; forgets them."""
        last, self._last = self._last, {}
        for layer, (scales_bthl, positions_bt) in sorted(last.items()):
            for level in range(scales_bthl.shape[-1]):
                reads_bt = (positions_bt >> (level - 1)) & 1 == 1 if level else positions_bt >= 0
                if reads_bt.any():
                    yield layer, level, scales_bthl[..., level][reads_bt].flatten()

    def _hook(self, layer: int) -> Any:
        def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...], scales_bthl: torch.Tensor | None) -> None:
            if self.recording and scales_bthl is not None:
                self._last[layer] = (scales_bthl.detach().float().cpu(), inputs[1].cpu())

        return keep
