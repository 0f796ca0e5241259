"""Which tokens Clip-Cov and KL-Cov treat apart: those whose log-prob and advantage vary together the most."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import segments
from v05.kernels.policy_loss.options import BY_COVARIANCE, SURROGATES, Surrogate, check_token_shapes
from v05.kernels.policy_loss.reference import log_ratio

FRACTION = 2e-4


def select_by_covariance(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    sequence_offsets: Tensor,
    surrogate: str,
    fraction: float = FRACTION,
    bounds: tuple[float, float] = (1.0, 5.0),
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Selects tokens of a whole batch by `(A - mean A) (l - mean l)`, the means taken over its unmasked tokens.

    Call it once for the batch and pass the slices of its result to the `policy_loss` of each micro-batch: then the
    gradient does not depend on the split. It selects `max(1, floor(fraction * unmasked tokens))` tokens, or fewer.

    Args:
        logprobs, old_logprobs, weights: `[T]` floating, as for `policy_loss`; tokens of weight 0 are never selected.
        advantages: `[N]`, one per sequence, or `[T]`, one per token.
        sequence_offsets: `[N+1]` int64.
        surrogate: `"kl_cov"` takes the largest; `"clip_cov"` draws at random among those between `bounds` whose
            ratio is not clipped anyhow.
        fraction: of the unmasked tokens, from 0 to 1.
        bounds: of the covariance, exclusive, for `"clip_cov"`.
        clip_low, clip_high: the ratio is clipped below `1 - clip_low` and above `1 + clip_high`.
        generator: of the random choice, on the device of the inputs.

    Returns:
        `[T]` bool. The host does not wait for the device.

    Raises:
        ValueError, TypeError: names, numbers, shapes or dtypes that are not allowed.

    Source: arXiv 2505.22617.
    """
    names = tuple(kind.name.lower() for kind in BY_COVARIANCE)
    kind = SURROGATES[segments.choice("surrogate", surrogate, names)]
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction}; allowed: 0 to 1")
    check_token_shapes(logprobs, advantages, sequence_offsets, old_logprobs=old_logprobs, weights=weights)
    with torch.no_grad():
        if advantages.numel() == sequence_offsets.numel() - 1:
            advantages = advantages[segments.segment_ids(sequence_offsets, logprobs.numel())]
        keep = (weights != 0) & logprobs.isfinite()
        count = keep.sum()
        logprobs, advantages = (torch.where(keep, v, 0).double() for v in (logprobs, advantages))
        means = [values.sum() / count.clamp(min=1) for values in (logprobs, advantages)]
        covariance = (advantages - means[1]) * (logprobs - means[0])
        score = covariance
        if kind == Surrogate.CLIP_COV:
            ratio = log_ratio(logprobs, torch.where(keep, old_logprobs, 0).double()).exp()
            clipped = ((advantages < 0) & (ratio < 1 - clip_low)) | ((advantages > 0) & (ratio > 1 + clip_high))
            keep = keep & ~clipped & (covariance > bounds[0]) & (covariance < bounds[1])
            score = torch.rand(keep.shape, generator=generator, device=keep.device, dtype=torch.float64)
        order = torch.where(keep, score, -torch.inf).argsort(descending=True, stable=True)
        chosen = torch.arange(keep.numel(), device=keep.device) < (count.double() * fraction).floor().clamp(min=1)
        return torch.zeros_like(keep).scatter(0, order, chosen) & keep
