"""Kernels as functions that autograd and torch.compile know, and that cost little to call.

A custom operator of torch is what a compiler needs, but calling one takes a tenth of a millisecond of Python, a dozen
times a layer. So only a compiler calls it, or whoever looks at operators as they pass; everybody else calls the same
function through an autograd Function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class Operator:
    """A function of tensors, called as it is or, by a compiler, as the custom operator `definition`."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.definition = torch.library.custom_op(name, function, mutates_args=())
        self._function = self._fake = function
        self._setup_context: Callable[..., None] | None = None
        self._backward: Callable[..., Any] | None = None

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """`fake` gives empty outputs of the right shapes; arguments are the function's."""
        self.definition.register_fake(fake)
        self._fake = fake

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """As `torch.library.CustomOpDef.register_autograd` takes them."""
        self.definition.register_autograd(backward, setup_context=setup_context)
        self._backward, self._setup_context = backward, setup_context

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return self.definition(*args)
        wants_gradient = any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)
        if self._backward is None or not wants_gradient or not torch.is_grad_enabled():
            return self.run(*args)
        return _Eager.apply(self, *args)

    def run(self, *args: Any) -> Any:
        """The function without autograd; on the meta device the shapes that it would give."""
        return self._fake(*args) if args[0].is_meta else self._function(*args)

    def and_input(self, index: int, *args: Any) -> tuple[Any, ...]:
        """What a call gives and, last, the input at `index` again, for whatever else reads it.

        The gradient from there is the last that the backward function gets, which adds it to the input's own: so it
        costs one read, where autograd would add the two in a pass over memory of its own. Not a part of the custom
        operator, which may not return what it was given.
        """
        if torch.compiler.is_compiling():
            return *_as_tuple(self(*args)), args[index]
        return _AndInput.apply(self, index, *args)  # pyright: ignore[reportReturnType]


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function with annotated arguments an `Operator` called `name`."""
    return lambda function: Operator(name, function)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Operator, *args: Any) -> Any:
        output = operator.run(*args)
        ctx.operator = operator
        assert operator._setup_context is not None
        operator._setup_context(ctx, args, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        result = ctx.operator._backward(ctx, *gradients)
        return None, *_as_tuple(result)


class _AndInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Operator, index: int, *args: Any) -> tuple[Any, ...]:
        output = operator(*args)
        ctx.operator = operator
        assert operator._setup_context is not None
        operator._setup_context(ctx, args, output)
        return *_as_tuple(output), args[index]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        *own, beside = gradients
        return None, None, *ctx.operator._backward(ctx, *own, beside.contiguous())


def _as_tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
