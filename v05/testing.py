"""What the tests of every op share: ragged inputs, poisoned outputs and the tolerance rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import deterministic

from v05.batch import offsets_of
from v05.kernels.query_attention.rules import HEAD, AttentionWeights, weight_shapes

# The largest error against float64 that is never blamed on a kernel, relative to max(1, |value|).
FLOORS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


class RaggedGroups(NamedTuple):
    """rewards `[N]`, offsets `[G+1]` int64 and prior `[G]`."""

    rewards: Tensor
    offsets: Tensor
    prior: Tensor


class RaggedTokens(NamedTuple):
    """logprobs, old, ref, sampler and weights `[T]`, advantages `[N]`, sequence_offsets `[N+1]` int64."""

    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    sampler_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    sequence_offsets: Tensor


class RaggedStates(NamedTuple):
    """states `[T, D]`, offsets `[B+1]` int64, queries `[B, Q, E]`, then the fields of `AttentionWeights`."""

    states: Tensor
    offsets: Tensor
    queries: Tensor
    projection_weight: Tensor
    projection_bias: Tensor
    query_norm_weight: Tensor
    query_norm_bias: Tensor
    key_norm_weight: Tensor
    key_norm_bias: Tensor
    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor

    @property
    def weights(self) -> AttentionWeights:
        return AttentionWeights(*self[3:])


def ragged_groups(
    groups: int,
    shortest: int = 0,
    longest: int = 16,
    *,
    seed: int = 0,
    values: tuple[float, ...] = (-1.0, 1.0),
    dtype: torch.dtype = torch.float32,
) -> RaggedGroups:
    """Return random groups of shortest to longest rollouts whose rewards are drawn from values, with a random prior."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (groups,), generator=rng)
    choice = torch.randint(len(values), (int(lengths.sum()),), generator=rng)
    low, high = min(values), max(values)
    prior = low + (high - low) * torch.rand(groups, generator=rng, dtype=torch.float64)
    return RaggedGroups(torch.tensor(values, dtype=dtype)[choice], offsets_of(lengths), prior.to(dtype))


def ragged_tokens(
    sequences: int,
    shortest: int = 0,
    longest: int = 64,
    *,
    seed: int = 0,
    masked: float = 0.2,
    drift: float = 0.3,
    dtype: torch.dtype = torch.float32,
) -> RaggedTokens:
    """Return random packed sequences; `masked` is the share of tokens of weight 0, `drift` the sd between log-probs."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (sequences,), generator=rng)
    tokens = int(lengths.sum())

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=rng, dtype=torch.float64)

    logprobs = -normal(tokens).abs() - 0.05
    old, ref, sampler = (logprobs + drift * normal(tokens) for _ in range(3))
    kept = torch.rand(tokens, generator=rng) >= masked
    weights = torch.where(kept, torch.rand(tokens, generator=rng, dtype=torch.float64) + 0.5, 0) / max(tokens, 1)
    advantages = normal(sequences)
    floats = [value.to(dtype) for value in (logprobs, old, ref, sampler, advantages, weights)]
    return RaggedTokens._make([*floats, offsets_of(lengths)])


def ragged_states(
    lengths: Tensor | list[int],
    *,
    count: int = 168,
    heads: int = 3,
    size: int = 64,
    seed: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> RaggedStates:
    """Return random token states of prompts with those lengths, queries and weights; `scale` is that of the scores."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.as_tensor(lengths, dtype=torch.int64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    width, wide = HEAD * heads, torch.float64 if dtype == torch.float64 else torch.float32
    given = AttentionWeights(*(normal(*shape) for shape in weight_shapes(width, size)))
    weights = given._replace(
        projection_weight=given.projection_weight / size**0.5,
        query_norm_weight=(1 + 0.3 * given.query_norm_weight) * scale,
        key_norm_weight=1 + 0.3 * given.key_norm_weight,
        in_weight=given.in_weight / width**0.5,
        out_weight=given.out_weight / width**0.5,
    )
    states, queries = normal(int(lengths.sum()), size), normal(len(lengths), count, width)
    return RaggedStates(states.to(dtype), offsets_of(lengths), *(value.to(wide) for value in (queries, *weights)))


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fill all memory that torch allocates uninitialised with NaN, so that an element nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]


def error_against(actual: Tensor, exact: Tensor) -> float:
    """Return the largest |actual - exact| / max(1, |exact|); infinite where only one of the two is finite."""
    if actual.shape != exact.shape:
        raise AssertionError(f"shape is {list(actual.shape)}; expected {list(exact.shape)}")
    actual, exact = actual.double(), exact.double()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    error = torch.where(same, 0, (actual - exact).abs() / exact.abs().clamp(min=1))
    return float(error.nan_to_num(nan=float("inf")).max()) if error.numel() else 0.0


def assert_as_exact_as(actual: Tensor, same_dtype: Tensor, exact: Tensor, floor: float | None = None) -> None:
    """Fail where actual is further from float64 than torch's own result in the same dtype, and than the floor.

    Args:
        actual: what the kernel returned.
        same_dtype: what plain torch returns for the same inputs in the same dtype.
        exact: the float64 result.
        floor: an error that is always allowed; by default the entry of `FLOORS` for actual's dtype.
    """
    allowed = max(error_against(same_dtype, exact), FLOORS[actual.dtype] if floor is None else floor)
    error = error_against(actual, exact)
    if not error <= allowed:
        raise AssertionError(f"error against float64 is {error:.3g}; allowed: {allowed:.3g}")
