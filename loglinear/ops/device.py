"""Where Triton's kernels run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

_ON_META: ContextVar[bool] = ContextVar("kernels on the meta device", default=False)


def has_kernels(x: torch.Tensor) -> bool:
    """Whether x [...] lies on a GPU, or within `kernels_on_meta` nowhere."""
    return x.is_cuda or (x.is_meta and _ON_META.get())


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """The op chooses its own precision. On the meta device, where memory is counted, autocast does not exist."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


@contextmanager
def kernels_on_meta() -> Iterator[None]:
    """Within, tensors of the meta device go the way of a GPU's, so that what kernels keep can be counted there."""
    token = _ON_META.set(True)
    try:
        yield
    finally:
        _ON_META.reset(token)
