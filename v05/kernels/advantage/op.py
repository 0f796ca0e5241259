"""The public `group_advantage`: every estimator as a baseline and a scale, over ragged groups."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import dispatch, segments
from v05.kernels.advantage import reference
from v05.kernels.advantage.baselines import MAKERS, Given
from v05.kernels.advantage.estimators import Baseline, Scale, resolve
from v05.kernels.custom import custom_op
from v05.kernels.shrinkage.rules import check_group_values, make_budget, prepared, readable


@custom_op("v05::group_advantage")
def _group_advantage(
    rewards: Tensor,
    offsets: Tensor,
    prior: Tensor | None,
    lengths: Tensor | None,
    baseline: int,
    scale: int,
    low: float,
    high: float,
    eps: float,
    backend: str,
) -> Tensor:
    run = dispatch.implementation("advantage", backend).group_advantage
    return run(rewards, offsets, prior, lengths, Baseline(baseline), Scale(scale), low, high, eps)


@_group_advantage.register_fake
def _(
    rewards: Tensor,
    offsets: Tensor,
    prior: Tensor | None,
    lengths: Tensor | None,
    baseline: int,
    scale: int,
    low: float,
    high: float,
    eps: float,
    backend: str,
) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=segments.working_dtype(rewards))


def group_advantage(
    rewards: Tensor,
    offsets: Tensor,
    *,
    estimator: str = "v05",
    prior: Tensor | None = None,
    scale: str = "none",
    eps: float = 1e-6,
    lengths: Tensor | None = None,
    reward_range: tuple[float, float] = (-1.0, 1.0),
    state: Tensor | None = None,
    check_values: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Advantage of every rollout: its reward less a baseline, optionally scaled.

    Args:
        rewards: `[N]` floating, in `reward_range`.
        offsets: `[G+1]` int64, ascending from 0 to N; group g is `rewards[offsets[g]:offsets[g+1]]`, may be empty.
        estimator: `"v05"` (prior and group mean fused), `"v05_loo"` (the same without the rollout's own reward),
            `"grpo"` (group mean and std), `"dr_grpo"` (group mean), `"rloo"` (mean of the others),
            `"reinforce_plus_plus"` (mean and std of the batch), `"v05_calibrated"` and `"v05_calibrated_loo"` (fusion
            calibrated on the batch), `"opo"` (mean weighted by length), `"gpg"` (group mean; advantages times N over
            the rewards that are not 0), `"james_stein"` (mean of the others, shrunk to the other groups' mean).
        prior: `[G]` floating, the expected rewards; needed by, and only allowed with, the fused estimators.
        scale: divides by nothing (`"none"`), the std of the group's or the batch's rewards (`"group"`, `"batch"`;
            unbiased, plus eps), or the std the baseline implies (`"baseline"`, `sqrt(max((b - mu)(mu - a), eps))`).
            Where a std is 0 or undefined the advantage is left unscaled.
        eps: added to a std, and the floor of the implied variance.
        lengths: `[N]` tokens of each rollout, finite and 0 or above: `opo` needs them, `reinforce_plus_plus` takes its
            mean and std over tokens where they are given (over rollouts else), and no other estimator looks at them.
        reward_range: the smallest and the largest reward possible, 1e-15 to 1e15 apart; for half rewards, both as their
            dtype rounds them.
        state: of the calibrated estimators, from earlier batches, see `shrinkage`; None starts anew.
        check_values: check values on a device too, which waits for it; on the CPU they are always checked.
        backend: None for the best available, or `"reference"`, `"cpu"`, `"triton"`, `"cuda"`.

    Returns:
        `[N]` float32, or float64 for float64 rewards; not differentiable. A group of one has advantage 0 under
        grpo, dr_grpo and rloo, and equal rewards have exactly 0 under every group mean.

    Raises:
        ValueError, TypeError: names, shapes, dtypes or values that are not allowed; the message says where.
        RuntimeError: the backend asked for cannot run here.

    Source: V0.5 (arXiv 2603.10848), GRPO (2402.03300), Dr. GRPO (2503.20783), RLOO (2402.14740), REINFORCE++
    (2501.03262), OPO (2505.23585), GPG (2504.02546) and James-Stein (2511.03710); calibration and the leave-one-out
    forms of V0.5 are ours.
    """
    resolved = resolve(estimator, scale)
    given = make_budget(reward_range, 0.0, 1, 1)
    if resolved.needs_prior != (prior is not None):
        given_or_not = "given" if prior is not None else "missing"
        raise ValueError(
            f"prior is {given_or_not}; estimator {estimator!r} needs {'one' if resolved.needs_prior else 'none'}"
        )
    if resolved.needs_lengths and lengths is None:
        raise ValueError(f"lengths is missing; estimator {estimator!r} needs the tokens of each rollout")
    if state is not None and resolved.fusion != "calibrated":
        raise ValueError(f"state is given; estimator {estimator!r} has none, the calibrated ones do")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; allowed: 0 or above")
    rewards, prior, (low, high, *_) = prepared(rewards, offsets, prior, given)
    dtype = segments.working_dtype(rewards)
    if lengths is not None:
        segments.check_tensor("lengths", lengths)
        if lengths.shape != rewards.shape:
            raise ValueError(f"lengths has shape {list(lengths.shape)}; allowed: {list(rewards.shape)}")
        if lengths.device != rewards.device:
            raise ValueError(f"lengths is on {lengths.device}; allowed: {rewards.device}, where the other inputs are")
        lengths = segments.constant(lengths, dtype) if resolved.by_length else None
    chosen = dispatch.backend_for("advantage", rewards, backend)
    on_cpu = segments.readable(rewards)
    if check_values or (chosen == "reference" and on_cpu):
        check_group_values(rewards.to(dtype), offsets, prior, low, high)
    if lengths is not None and (check_values or on_cpu):
        segments.check_range("lengths", lengths, 0, torch.finfo(dtype).max)
    if resolved.made:
        prior = MAKERS[resolved.made](Given(rewards.to(dtype), offsets, prior, low, high, backend, state))
    rewards = readable(rewards, chosen)
    kinds = (int(resolved.baseline), int(resolved.scale))
    if chosen == "reference":
        out = reference.group_advantage(rewards, offsets, prior, lengths, *kinds, low, high, eps)
    else:
        out = _group_advantage(rewards, offsets, prior, lengths, *kinds, low, high, eps, chosen)
    return out * (rewards.numel() / torch.count_nonzero(rewards).clamp(min=1)) if resolved.by_signal else out
