"""Custom ops that cost an eager call little: torch's dispatcher is asked only where something listens to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

# What an argument, or an element of a list, may be where nothing but autograd needs to see the call.
_PLAIN = frozenset({Tensor, Parameter, type(None), bool, int, float, str})


def _unknown() -> bool:
    return True


# What listens to calls beside autograd, as torch tells it in no public way; where it does not, the dispatcher is asked.
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", _unknown)
_function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", _unknown)
transforms: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", _unknown)
_several: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda _: False)
_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", _unknown)


def _unheard(arguments: tuple[Any, ...]) -> bool:
    """Whether nothing but autograd listens to a call with these arguments."""
    if _dispatch_modes() or _function_modes() or transforms() or _tracing():
        return False
    kinds = set(map(type, arguments))
    if list in kinds:
        kinds.discard(list)
        kinds.update(*(map(type, given) for given in arguments if type(given) is list))
    return kinds <= _PLAIN


def _no_more(name: str, *_: Any) -> NoReturn:
    raise RuntimeError(f"{name} has a first derivative in reverse mode alone; backend='reference' has more")


def _check_still(name: str, values: Sequence[Any]) -> None:
    """Raises where a value has a tangent, which a kernel would leave out; free of charge outside of a dual level."""
    if forward_ad._current_level < 0:
        return
    tensors = [value for value in values if isinstance(value, Tensor)]
    if any(forward_ad.unpack_dual(value).tangent is not None for value in tensors):
        _no_more(name)


def _check_one(name: str, gradients: Sequence[Tensor | None]) -> None:
    """Raises where gradients are several at once, by which no kernel can go through memory."""
    if any(gradient is not None and _several(gradient) for gradient in gradients):
        batched = "several gradients at once (is_grads_batched or vectorize)"
        raise RuntimeError(f"{name} is given {batched}; allowed: one, or vmap of what torch.func.vjp returns")


def _alive(values: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The tensors without the wrapping of a transform that is over, as that of `vjp` is once its function is called."""
    return tuple(None if value is None else torch._C._functorch.unwrap_if_dead(value) for value in values)


class _WithInputs:
    """The context of a derivative that saves inputs too, before what it saves itself."""

    def __init__(self, ctx: Any, inputs: Sequence[Tensor], saved_tensors: Sequence[Tensor | None] = ()) -> None:
        self.__dict__.update(_ctx=ctx, _inputs=inputs, saved_tensors=saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._ctx, name, value)

    def save_for_backward(self, *saved: Tensor | None) -> None:
        self._ctx.save_for_backward(*self._inputs, *saved)


class _Once(torch.autograd.Function):
    """A gradient of which there is no derivative by what it was made of."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, gradient: Tensor, *given: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        _no_more(ctx.name)


def once(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes of a backward one whose gradients refuse to be derived again, where autograd keeps a graph of them.

    What it saves must include an input or an output with a derivative, through which a second one would be reached.
    """

    def refused(gradient: Any, given: Sequence[Tensor]) -> Any:
        if isinstance(gradient, list | tuple):
            return type(gradient)(refused(part, given) for part in gradient)
        return None if gradient is None else _Once.apply(name, gradient, *given)

    def refusing(backward: Callable[..., Any]) -> Callable[..., Any]:
        def derived(ctx: Any, *gradients: Tensor | None) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *gradients)
            given = [value for value in (*ctx.saved_tensors, *gradients) if value is not None]
            with torch.no_grad():
                made = backward(ctx, *gradients)
            return refused(made, given)

        return derived

    return refusing


class CustomOp:
    """A function as a torch custom op, which an eager call on plain tensors runs directly, or as an autograd.Function.

    The custom op serves torch.compile, fake tensors, subclasses and modes; in torch.func (grad, vjp and vmap) it runs
    within an autograd.Function that transforms, one sample after the other under vmap. A list of tensors must be the
    last argument, so that those before it keep their places in `ctx.needs_input_grad`. `ctx.direct` is there, and True,
    where nothing listened: an output that the caller has dropped is then nobody's but the derivative's
    (and of hooks on saved tensors).
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
        self._transformed: Callable[..., Any] | None = None  # within torch.func
        self.register_fake = self._definition.register_fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Registers the first derivative, as `register_autograd` of a torch custom op does; see `once`."""
        self._name = name = self._overload._opname
        first = once(name)(backward)
        self._definition.register_autograd(first, setup_context=setup_context)

        def inputs_of(flat: tuple[Any, ...]) -> tuple[Any, ...]:
            return (*flat[: self._alone], list(flat[self._alone :])) if self._listed else flat

        def forward(ctx: Any, *flat: Any) -> Any:
            inputs = inputs_of(flat)
            ctx.direct = True
            output = self._run(*inputs)
            setup_context(ctx, inputs, output)
            return output

        def flat_backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            _check_still(name, gradients)
            _check_one(name, gradients)
            made = (first if torch.is_grad_enabled() else backward)(ctx, *gradients)
            return (*made[:-1], *made[-1]) if self._listed else made

        methods = {"forward": staticmethod(forward), "backward": staticmethod(flat_backward)}
        function = type(name, (torch.autograd.Function,), methods)
        # Function.apply itself prepares for functorch, which is not at work in an eager call.
        self._apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

        def save(ctx: Any, flat: tuple[Any, ...], output: Any) -> None:
            tensors = [value for value in flat if isinstance(value, Tensor)]
            ctx.tensors = len(tensors)
            setup_context(_WithInputs(ctx, tensors), inputs_of(flat), output)

        def backward_once(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            saved, gradients = _alive(ctx.saved_tensors), _alive(gradients)
            with torch.no_grad():
                made = flat_backward(_WithInputs(ctx, (), saved[ctx.tensors :]), *gradients)
            given = [value for value in (*saved, *gradients) if value is not None]
            return tuple(None if gradient is None else _Once.apply(name, gradient, *given) for gradient in made)

        methods = {
            "forward": staticmethod(lambda *flat: self._overload(*inputs_of(flat))),
            "setup_context": staticmethod(save),
            "backward": staticmethod(backward_once),
            "jvp": staticmethod(partial(_no_more, name)),
        }
        transformed: Any = type(name, (torch.autograd.Function,), methods | {"generate_vmap_rule": True})
        self._transformed = transformed.apply

    def _flat(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*arguments[:-1], *arguments[-1]) if self._listed else arguments

    def __call__(self, *arguments: Any) -> Any:
        """Runs the function on positional arguments."""
        if torch.compiler.is_compiling():
            return self._overload(*arguments)
        if self._transformed is not None and transforms():
            return self._transformed(*self._flat(arguments))
        if self._transformed is not None:
            _check_still(self._name, self._flat(arguments))
        if not _unheard(arguments):
            return self._overload(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            if self._apply is None:
                return self._overload(*arguments)
            return self._apply(*self._flat(arguments))
        result = self._run(*arguments)
        for place in self._mutated:
            torch.autograd.graph.increment_version(arguments[place])
        return result


def custom_op(name: str, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], CustomOp]:
    """Makes a `CustomOp` of the function below it, whose annotations are its schema."""
    return lambda run: CustomOp(name, run, mutates_args)
