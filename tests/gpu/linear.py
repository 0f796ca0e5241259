"""linear_logprob and linear_policy_loss as functions of tensors, for the tests on a GPU."""

from typing import NamedTuple

import torch
from common import DEVICE, DRY_RUN, ON_CPU, Outputs, on_device
from torch import Tensor

from v05.kernels import linear_logprob, linear_policy_loss
from v05.testing import error_against

BACKENDS = ON_CPU if DRY_RUN else ("triton", "reference")
KERNELS = tuple(backend for backend in BACKENDS if backend != "reference")


class Layer(NamedTuple):
    """hidden `[T, H]`, weight `[V, H]` and targets `[T]`."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor


def layer_of(rows: int, features: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Layer:
    """Random matrices; every eighth row is ignored, and NaN, and every eighth peaked."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, features, generator=rng)
    weight = torch.randn(columns, features, generator=rng) * (3 / features**0.5)
    targets = torch.randint(columns, (rows,), generator=rng)
    kind = torch.arange(rows) % 8
    hidden[kind == 1], targets[kind == 1] = float("nan"), -100
    hidden[kind == 5] *= 4
    return on_device(Layer(hidden.to(dtype), weight.to(dtype), targets))


def run_linear_logprob(
    backend: str | None, data: Layer, dtype: torch.dtype | None = None, bias: Tensor | None = None, **options
) -> Outputs:
    """Log-prob, entropy, and gradients of a weighted sum of them; the weights depend on the target alone."""
    given = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in (*data[:2], bias)]
    outputs = linear_logprob(*given[:2], data.targets, bias=given[2], backend=backend, **options)
    weights = (data.targets % 7 - 2.5).to(outputs.logprob.dtype)
    leaves = [x for x in given if x is not None]
    gradients = torch.autograd.grad(list(outputs), leaves, [weights, 0.3 * weights])
    names = ("logprob", "entropy", "by_hidden", "by_weight", "by_bias")
    return {name: value.detach() for name, value in zip(names, (*outputs, *gradients), strict=False)}


def run_linear_policy_loss(backend: str | None, data: Layer, dtype: torch.dtype | None = None, **options) -> Outputs:
    """Loss, gradients and metrics of a few sequences; what is ignored is masked."""
    hidden, weight = (x.detach().to(dtype or x.dtype).requires_grad_() for x in data[:2])
    rows, wide = len(data.targets), torch.float64 if hidden.dtype == torch.float64 else torch.float32
    places = torch.arange(rows, device=hidden.device)
    ends = torch.arange(5, device=hidden.device)
    offsets = torch.where(ends == 4, rows, ends * (rows // 4))
    result = linear_policy_loss(
        hidden,
        weight,
        data.targets,
        -5.0 - (places % 5).to(wide),
        torch.linspace(-1, 1, 4, dtype=wide, device=hidden.device),
        torch.where(data.targets >= 0, 1 / rows, 0.0).to(wide),
        sequence_offsets=offsets,
        surrogate="sapo",
        entropy_coef=0.01,
        backend=backend,
        **options,
    )
    by_hidden, by_weight = torch.autograd.grad(result.loss, (hidden, weight))
    return {"loss": result.loss.detach(), "by_hidden": by_hidden, "by_weight": by_weight, **result.metrics}


def assert_near(actual: Outputs, same: Outputs, exact: Outputs) -> None:
    """Log-probs and sums of float32, gradients of the operands' dtype: small ones are compared with the largest, and
    large ones with a part of it, since a logit's gradient is rounded too before many are added up."""
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert value.device.type == DEVICE.type
        half = value.dtype in (torch.bfloat16, torch.float16)
        floor = 4e-2 if half else 3e-5 if value.dtype == torch.float32 else 1e-11
        largest = float(exact[name].double().abs().max()) if value.numel() else 0
        scale = max(min(1.0, max(largest, 1e-6)), largest / 64) if half else 1.0
        allowed = max(floor, 2 * error_against(same[name] / scale, exact[name] / scale))
        error = error_against(value / scale, exact[name] / scale)
        assert error <= allowed, f"{name}: error against float64 is {error:.3g}; allowed: {allowed:.3g}"
