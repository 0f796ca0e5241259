"""The public `shrinkage`: V0.5's fused baseline, test and look-ahead for ragged groups of rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from v05.kernels import dispatch, segments
from v05.kernels.calibration.op import calibrated
from v05.kernels.custom import custom_op
from v05.kernels.shrinkage import reference
from v05.kernels.shrinkage.rules import Budget, check_group_values, make_budget, prepared, readable

FUSIONS = ("v05", "calibrated")


class Shrinkage(NamedTuple):
    """What V0.5 knows about each of G groups; every field is `[G]` unless said otherwise.

    `count` int64: finished rollouts k. `mean`: their mean reward (of an empty group, the prior). `deviation`: d, the
    squared distance of mean and prior beyond the noise bound; above 0 means conflict. `weight`: w, the trust in the
    rollouts. `baseline`: mu. `mse`: the estimated error of the baseline. `gain`: what one more rollout takes off it.
    `roll_out_more` bool. `planned` int64: k*, the rollouts at which to test again; k itself where it stops.
    `rollout_baseline` `[N]`: the baseline of each rollout without its own reward, or None.
    `advantages` `[N]`: each reward less its baseline, or None. Of calibrated fusion alone, else None: `state` `[7]`,
    how many groups have borne out each strength of the prior, and `graded`, a scalar bool: whether some reward lies
    between the two ends of the range, so that the Gaussian mixture ran.
    """

    count: Tensor  # type: ignore[assignment]
    mean: Tensor
    deviation: Tensor
    weight: Tensor
    baseline: Tensor
    mse: Tensor
    gain: Tensor
    roll_out_more: Tensor
    planned: Tensor
    rollout_baseline: Tensor | None = None
    advantages: Tensor | None = None
    state: Tensor | None = None
    graded: Tensor | None = None


@custom_op("v05::shrinkage")
def _shrinkage(
    rewards: Tensor,
    offsets: Tensor,
    prior: Tensor,
    low: float,
    high: float,
    cost: float,
    k_init: int,
    k_max: int,
    leave_one_out: bool,
    advantages: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = dispatch.implementation("shrinkage", backend).shrinkage
    return run(rewards, offsets, prior, Budget(low, high, cost, k_init, k_max), leave_one_out, advantages)


@_shrinkage.register_fake
def _(
    rewards: Tensor,
    offsets: Tensor,
    prior: Tensor,
    low: float,
    high: float,
    cost: float,
    k_init: int,
    k_max: int,
    leave_one_out: bool,
    advantages: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    groups = prior.numel()
    more = prior.new_empty(groups, dtype=torch.bool)
    rollouts = [prior.new_empty(rewards.numel() if asked else 0) for asked in (leave_one_out, advantages)]
    return prior.new_empty(6, groups), offsets.new_empty(2, groups), more, rollouts[0], rollouts[1]


def shrinkage(
    rewards: Tensor,
    offsets: Tensor,
    prior: Tensor,
    *,
    reward_range: tuple[float, float] = (-1.0, 1.0),
    cost: float = 1 / 256,
    k_init: int = 4,
    k_max: int = 16,
    fusion: str = "v05",
    leave_one_out: bool = False,
    advantages: bool = False,
    state: Tensor | None = None,
    state_decay: float = 0.9,
    check_values: bool = False,
    backend: str | None = None,
) -> Shrinkage:
    """Fuses each group's mean reward with its prior, tests the prior, and plans how many rollouts the group deserves.

    Args:
        rewards: `[N]` floating, in `reward_range`; statistics come back in float32, or float64 for float64.
        offsets: `[G+1]` int64, ascending from 0 to N; group g is `rewards[offsets[g]:offsets[g+1]]`, may be empty.
        prior: `[G]` floating, the expected reward of each prompt, in `reward_range`.
        reward_range: the smallest and the largest reward possible, 1e-15 to 1e15 apart; for half rewards, both as their
            dtype rounds them.
        cost: of one rollout, in units of the largest variance a reward in that range can have.
        k_init: rollouts a group needs before its first test; a smaller group plans exactly these.
        k_max: rollouts a group gets at most, below 2^31.
        fusion: `"v05"`, the paper's rule, or `"calibrated"`: the posterior mean under a mixture that is fitted to the
            batch, of beta-binomials for rewards of two values, of Gaussians with the largest variance for graded ones.
        leave_one_out: also return the baseline of each rollout that does not see its own reward.
        advantages: also return each reward less its baseline (the leave-one-out one where asked for), in the same pass.
        state: of calibrated fusion, what the call on the last batch returned as `state`: small batches then lean on
            earlier ones. None starts anew, with half a group for each strength.
        state_decay: how much a group of the last batch counts for in this one.
        check_values: check values on a device too, which waits for it; on the CPU they are always checked. Where they
            are not, calibrated fusion leaves a group with a prior or a reward that is not finite out of the fit, and
            returns NaN for it alone.
        backend: None for the best available, or `"reference"`, `"cpu"`, `"triton"`, `"cuda"`.

    Returns:
        A `Shrinkage` of tensors on the device of the inputs.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that are not allowed; the message says where.
        RuntimeError: the backend asked for cannot run here.

    Source: V0.5 (arXiv 2603.10848), sections 3 and 4. Leave-one-out is ours: a reward that chooses whether its group
    goes on (a data-dependent k) still leaves a small optional-stopping bias. Calibrated fusion is ours too, empirical
    Bayes over the batch (its gain is the exact expected drop of the posterior variance); its mixture has seen every
    reward of the batch, the left-out one included.
    """
    segments.choice("fusion", fusion, FUSIONS)
    given = make_budget(reward_range, cost, k_init, k_max)
    segments.check_tensor("prior", prior)
    rewards, prior, budget = prepared(rewards, offsets, prior, given)
    if fusion == "calibrated":
        asked = (leave_one_out, advantages, check_values, backend)
        *fused, soft, graded = calibrated(rewards, offsets, prior, budget, state, state_decay, *asked)
        return _named(fused, leave_one_out, advantages, soft, graded)
    if state is not None:
        raise ValueError("state is given; fusion 'v05' has none, 'calibrated' does")
    chosen = dispatch.backend_for("shrinkage", rewards, backend)
    if check_values or (chosen == "reference" and segments.readable(rewards)):
        check_group_values(rewards.to(prior.dtype), offsets, prior, budget.low, budget.high)
    rewards = readable(rewards, chosen)
    if chosen == "reference":
        outputs = reference.shrinkage(rewards, offsets, prior, budget, leave_one_out, advantages)
    else:
        outputs = _shrinkage(rewards, offsets, prior, *budget, leave_one_out, advantages, chosen)
    return _named(outputs, leave_one_out, advantages)


def _named(
    outputs: Sequence[Tensor],
    leave_one_out: bool,
    advantages: bool,
    state: Tensor | None = None,
    graded: Tensor | None = None,
) -> Shrinkage:
    """A backend's outputs by name, all at once: torch 2.11 does not compile `_replace`."""
    floats, integers, more, rollout_baseline, advantage = outputs
    mean, deviation, weight, baseline, mse, gain = floats.unbind(0)
    count, planned = integers.unbind(0)
    rollouts = rollout_baseline if leave_one_out else None
    centred = advantage if advantages else None
    tests = (more, planned, rollouts, centred, state, graded)
    return Shrinkage(count, mean, deviation, weight, baseline, mse, gain, *tests)
