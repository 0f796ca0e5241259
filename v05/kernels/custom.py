"""Custom ops that cost an eager call little: torch's dispatcher is asked only where something listens to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

# What an argument, or an element of a list, may be where nothing but autograd needs to see the call.
_PLAIN = frozenset({Tensor, Parameter, type(None), bool, int, float, str})


def _unknown() -> bool:
    return True


# What listens to calls beside autograd, as torch tells it in no public way; where it does not, the dispatcher is asked.
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", _unknown)
_function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", _unknown)
_transforms: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", _unknown)
_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", _unknown)


def _unheard(arguments: tuple[Any, ...]) -> bool:
    """Whether nothing but autograd listens to a call with these arguments."""
    if _dispatch_modes() or _function_modes() or _transforms() or _tracing():
        return False
    kinds = set(map(type, arguments))
    if list in kinds:
        kinds.discard(list)
        kinds.update(*(map(type, given) for given in arguments if type(given) is list))
    return kinds <= _PLAIN


class CustomOp:
    """A function as a torch custom op, which an eager call on plain tensors runs directly, or as an autograd.Function.

    The custom op serves torch.compile, fake tensors, subclasses, modes and transforms. A list of tensors must be the
    last argument, so that those before it keep their places in `ctx.needs_input_grad`.
    """

    def __init__(self, name: str, run: Callable[..., Any], mutates_args: Sequence[str]) -> None:
        self._run = run
        self._definition = torch.library.custom_op(name, run, mutates_args=mutates_args)
        self._overload = self._definition._opoverload
        arguments = self._overload._schema.arguments
        self._mutated = [place for place, argument in enumerate(arguments) if argument.name in mutates_args]
        self._alone = len(arguments) - (str(arguments[-1].type) == "List[Tensor]")  # arguments before such a list
        self._listed = self._alone < len(arguments)
        self._apply: Callable[..., Any] | None = None
        self.register_fake = self._definition.register_fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Registers the derivative, as `register_autograd` of a torch custom op does."""
        self._definition.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *flat: Any) -> Any:
            inputs = (*flat[: self._alone], list(flat[self._alone :])) if self._listed else flat
            output = self._run(*inputs)
            setup_context(ctx, inputs, output)
            return output

        def flat_backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            made = backward(ctx, *gradients)
            return (*made[:-1], *made[-1]) if self._listed else made

        methods = {"forward": staticmethod(forward), "backward": staticmethod(flat_backward)}
        function = type(self._overload._opname, (torch.autograd.Function,), methods)
        # Function.apply itself prepares for functorch, which is not at work in an eager call.
        self._apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def __call__(self, *arguments: Any) -> Any:
        """Runs the function on positional arguments."""
        if torch.compiler.is_compiling() or not _unheard(arguments):
            return self._overload(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            if self._apply is None:
                return self._overload(*arguments)
            flat = (*arguments[:-1], *arguments[-1]) if self._listed else arguments
            return self._apply(*flat)
        result = self._run(*arguments)
        for place in self._mutated:
            torch.autograd.graph.increment_version(arguments[place])
        return result


def custom_op(name: str, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], CustomOp]:
    """Makes a `CustomOp` of the function below it, whose annotations are its schema."""
    return lambda run: CustomOp(name, run, mutates_args)
