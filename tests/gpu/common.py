"""What the GPU tests share: the device, its backends, each op as a function of tensors, and the comparison."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from emulated import EMULATED
from torch import Tensor

from v05.kernels import group_advantage, policy_loss, query_attention, shrinkage, token_logprob
from v05.kernels.advantage.estimators import ESTIMATORS, SCALES
from v05.kernels.device import interpreting
from v05.testing import (
    FLOORS,
    RaggedStates,
    RaggedTokens,
    assert_as_exact_as,
    error_against,
    poisoned_outputs,
    ragged_groups,
    ragged_states,
    ragged_tokens,
)

DRY_RUN = EMULATED or os.environ.get("V05_DRY_RUN") == "1"
DEVICE = torch.device("cpu" if DRY_RUN else "cuda")
ON_CPU = ("cuda",) if EMULATED else ("triton",) if interpreting() else ("reference", "cpu")
BACKENDS = ON_CPU if DRY_RUN else ("cuda", "triton", "reference")
KERNELS = tuple(backend for backend in BACKENDS if backend != "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INFINITY = float("inf")

needs_gpu = pytest.mark.skipif(DRY_RUN, reason="a GPU is needed")
COMBINATIONS = [(e, s) for e, own in ESTIMATORS.items() for s in SCALES if s == "none" or own.scale.name == "NONE"]

Outputs = dict[str, Tensor]


class Rows(NamedTuple):
    """logits `[T, V]` and targets `[T]`."""

    logits: Tensor
    targets: Tensor


def scaled(size: int, dry: int) -> int:
    """A size on the GPU, and over the emulation up to 65,535; and in a dry run."""
    return size if not DRY_RUN or (EMULATED and size < 65_536) else dry


def on_device(data):
    """A named tuple of tensors, on the device of the tests."""
    return data._make(values.to(DEVICE) for values in data)


def widened(data):
    """A named tuple of tensors, the floating ones in float64."""
    return data._make(values.double() if values.is_floating_point() else values for values in data)


def rows_of(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Rows:
    """Random logits with every kind of row: ignored (and NaN), all -inf, masked in part, peaked."""
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, columns, generator=rng, dtype=torch.float64)
    targets = torch.randint(columns, (rows,), generator=rng)
    kind = torch.arange(rows) % 8
    logits[kind == 1], targets[kind == 1] = float("nan"), -100
    logits[kind == 2] = -INFINITY
    logits[kind == 3, columns // 2 + 1 :] = -INFINITY
    logits[kind == 4, : columns // 2] = -INFINITY
    logits[kind == 5] *= 30
    return on_device(Rows(logits.to(dtype), targets))


def tokens_of(
    sequences: int, longest: int, dtype: torch.dtype = torch.float32, seed: int = 0, **options
) -> RaggedTokens:
    """Random packed tokens with weights near 1; those whose ratio is within rounding of a bound are masked."""
    data = ragged_tokens(sequences, 0, longest, seed=seed, dtype=dtype, **options)
    exact = widened(data)
    ratios = torch.stack([exact.logprobs - exact.old_logprobs, exact.old_logprobs - exact.sampler_logprobs]).exp()
    bounds = torch.tensor([0.8, 1.2, 3.0, 1.5, 1 / 1.5], dtype=torch.float64)
    near = ((ratios[:, :, None] - bounds).abs() < 1e-5).flatten(2).any(2).any(0)
    return on_device(data._replace(weights=torch.where(near, 0, exact.weights * len(near)).to(dtype)))


def run_shrinkage(backend: str | None, data, **options) -> Outputs:
    result = shrinkage(*data, backend=backend, **options)._asdict()
    return {name: value for name, value in result.items() if value is not None}


def run_advantage(backend: str | None, data, estimator: str = "v05", **options) -> Outputs:
    prior = data.prior if ESTIMATORS[estimator].needs_prior else None
    lengths = torch.arange(len(data.rewards), device=data.rewards.device) % 7
    named = dict(estimator=estimator, prior=prior, backend=backend)
    named |= dict(lengths=lengths if ESTIMATORS[estimator].needs_lengths else None)
    return {"advantages": group_advantage(data.rewards, data.offsets, **(named | options))}


def run_policy_loss(
    backend: str | None, data: RaggedTokens, surrogate="ppo", kl="none", correction="none", **options
) -> Outputs:
    """Loss, gradient and metrics."""
    if kl != "none":
        options |= dict(ref_logprobs=data.ref_logprobs, kl_coef=0.3)
    if correction != "none":
        options |= dict(sampler_logprobs=data.sampler_logprobs, sampler_cap=1.5)
    if "cov" in surrogate:
        options |= dict(covariance_selected=torch.arange(data.logprobs.numel(), device=data.logprobs.device) % 3 == 0)
    if surrogate == "ppo":
        options |= dict(dual_clip=3.0)
    leaf = data.logprobs.detach().requires_grad_()
    loss, metrics = policy_loss(
        leaf,
        data.old_logprobs,
        data.advantages,
        data.weights,
        sequence_offsets=data.sequence_offsets,
        surrogate=surrogate,
        kl=kl,
        sampler_correction=correction,
        backend=backend,
        **options,
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    return {"loss": loss.detach(), "gradient": gradient, **metrics}


def run_token_logprob(backend: str | None, data: Rows, use: str = "both", upstream: Tensor | None = None, **options):
    """Log-prob, entropy and the gradient of a weighted sum of them; the weights depend on the target alone."""
    leaf = data.logits.detach().requires_grad_()
    outputs = token_logprob(leaf, data.targets, backend=backend, **options)
    weights = (data.targets % 7 - 2.5).to(outputs.logprob.dtype) if upstream is None else upstream
    used = [name for name in outputs._fields if use in ("both", name)]
    (gradient,) = torch.autograd.grad([getattr(outputs, name) for name in used], leaf, [weights] * len(used))
    return {"logprob": outputs.logprob.detach(), "entropy": outputs.entropy.detach(), "gradient": gradient}


def run_query_attention(backend: str | None, data: RaggedStates, for_states: bool = True, **options) -> Outputs:
    """Features, and the gradients of a weighted sum of them by the states (where wanted), queries and weights."""
    frozen = ("offsets",) if for_states else ("offsets", "states")
    leaves = {name: value.detach().requires_grad_() for name, value in data._asdict().items() if name not in frozen}
    given = data._replace(**leaves)
    heads = given.queries.shape[2] // 2
    features = query_attention(
        given.states, given.offsets, given.queries, given.weights, heads=heads, backend=backend, **options
    )
    weights = torch.linspace(-1.5, 1, features.shape[1], dtype=features.dtype, device=features.device)
    gradients = torch.autograd.grad(features, list(leaves.values()), weights.expand_as(features))
    named = {f"gradient of {name}": value for name, value in zip(leaves, gradients, strict=True)}
    return {"features": features.detach(), **named}


class Op(NamedTuple):
    """An op as the tests of streams, graphs and bits see it: `make(size, seed)` gives the data that `run` takes."""

    make: Callable
    run: Callable[..., Outputs]
    options: dict

    def __call__(self, backend: str | None, data) -> Outputs:
        return self.run(backend, data, **self.options)


def _groups(size: int, seed: int = 0):
    return on_device(ragged_groups(size, 0, 21, seed=seed, values=(-1.0, 0.3, 1.0)))


def _half_groups(size: int, seed: int = 0):
    return on_device(ragged_groups(size, 0, 21, seed=seed, values=(-1.0, 0.3, 1.0), dtype=torch.bfloat16))


def _tokens(size: int, seed: int = 0):
    return tokens_of(size, 60, seed=seed)


def _rows(size: int, seed: int = 0):
    return rows_of(size, 1003, seed=seed)


def _states(size: int, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 90, (size // 10 + 1,), generator=rng)
    return on_device(ragged_states(lengths, count=scaled(40, 7), size=48, seed=seed))


OPS = {
    "shrinkage": Op(_groups, run_shrinkage, dict(leave_one_out=True, advantages=True)),
    "calibrated fusion": Op(_groups, run_shrinkage, dict(fusion="calibrated", leave_one_out=True, advantages=True)),
    "calibrated fusion in half precision": Op(
        _half_groups, run_shrinkage, dict(fusion="calibrated", leave_one_out=True, advantages=True)
    ),
    "advantage by group": Op(_groups, run_advantage, dict(estimator="grpo")),
    "advantage by batch": Op(_groups, run_advantage, dict(estimator="v05_loo", scale="batch")),
    "shrinkage in half precision": Op(_half_groups, run_shrinkage, dict(leave_one_out=True, advantages=True)),
    "advantage by batch in half precision": Op(_half_groups, run_advantage, dict(estimator="reinforce_plus_plus")),
    "policy_loss by token": Op(_tokens, run_policy_loss, dict(kl="k3", correction="token_truncate")),
    "policy_loss by sequence": Op(
        _tokens, run_policy_loss, dict(surrogate="sapo", level="sequence", correction="sequence_truncate")
    ),
    "token_logprob": Op(_rows, run_token_logprob, dict(temperature=0.7)),
    "query_attention": Op(_states, run_query_attention, {}),
}


def assert_close(actual: Outputs, same: Outputs, exact: Outputs, but: tuple[str, ...] = (), floors: float = 1) -> None:
    """Each floating output of the order of torch's error in the same dtype; the others equal, `but` those named.

    Both errors are one draw of many. A sum of thousands of float32 terms that cancel each other may lose more.
    """
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        if name in but:
            continue
        try:
            assert value.device.type == DEVICE.type
            if value.is_floating_point():
                floor = FLOORS[value.dtype] * (20 if value.ndim == 0 else floors)
                assert_as_exact_as(
                    value, same[name], exact[name], max(floor, 2 * error_against(same[name], exact[name]))
                )
            else:
                assert torch.equal(value, same[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def allocated() -> int:
    """Bytes that tensors take on the GPU. The thread of a backward may let go of its gradients with the next one."""
    torch.ones(1, device=DEVICE, requires_grad=True).sum().backward()
    torch.cuda.synchronize()
    gc.collect()
    return torch.cuda.memory_allocated()


@contextmanager
def reproducible() -> Iterator[None]:
    """Makes torch's own sums the same every time, where it can."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def compare(
    run: Callable[..., Outputs], backend: str, data, but: tuple[str, ...] = (), floors: float = 1, **options
) -> Outputs:
    """Runs an op on poisoned memory, compares it with the reference in float64, and returns what it gave.

    Errors up to `floors` times the floor of the dtype are allowed.
    """
    with reproducible():
        exact = run("reference", widened(data), **options)
        same = run("reference", data, **options)
    with poisoned_outputs() if backend != "reference" else reproducible():
        actual = run(backend, data, **options)
    assert_close(actual, same, exact, but, floors)
    return actual


def assert_same_bits(actual: Outputs, expected: Outputs) -> None:
    """Equal bit for bit, NaN included."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True, msg=f"{name} differs")
