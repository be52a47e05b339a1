"""Ops of PyTorch that cost nothing where nobody traces them.

`torch.library.custom_op` lets torch.compile and torch.export see through a kernel. In eager mode its way through
PyTorch's dispatcher, in Python, takes longer than all else that starts a kernel (`benchmarks/launch_cost.py`), and on
small batches longer than the kernel. An `Op` takes that way only where somebody wants to see the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def untraced(inputs: Sequence[Any]) -> bool:
    """Whether nobody but autograd has to see a call: no compiler, no mode, no transformation, no special tensors."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(x) in (Tensor, torch.nn.Parameter) for x in inputs if isinstance(x, Tensor))
    )


def _trained(x: Any) -> bool:
    if isinstance(x, list):
        return any(_trained(part) for part in x)
    return isinstance(x, Tensor) and x.requires_grad


class Op:
    """A function of tensors and numbers as an op of PyTorch, called by the shortest way.

    Args:
        name: "namespace::name".
        function: As `torch.library.custom_op` takes it; it changes none of its inputs.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.function = function
        self.registered = torch.library.custom_op(name, function, mutates_args=())
        self.__doc__ = function.__doc__
        self._name = name
        self._direct: type[torch.autograd.Function] | None = None

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """As `CustomOpDef.register_fake`."""
        return self.registered.register_fake(function)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As `CustomOpDef.register_autograd`."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        function = self.function

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            if isinstance(output, list):
                raise TypeError(f"{self._name}: a differentiable op returns a tensor or a tuple of them, not a list.")
            setup_context(ctx, inputs, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._direct = type(self._name, (torch.autograd.Function,), members)

    def __call__(self, *inputs: Any) -> Any:
        """The function's result, differentiable where the op is."""
        if not untraced(inputs):
            return self.registered(*inputs)
        if torch.is_grad_enabled() and any(_trained(x) for x in inputs):
            # Autograd functions don't look into lists; and without a derivative, the op knows how to refuse one.
            if self._direct is None or any(isinstance(x, list) for x in inputs):
                return self.registered(*inputs)
            return self._direct.apply(*inputs)  # type: ignore[no-untyped-call]
        return self.function(*inputs)


def op(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Decorator that makes a function an `Op`."""
    return lambda function: Op(name, function)
