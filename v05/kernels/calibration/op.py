"""Calibrated fusion as a custom op; `shrinkage(..., fusion="calibrated")` is its public function."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import dispatch, segments
from v05.kernels.calibration import reference
from v05.kernels.calibration.components import COMPONENTS
from v05.kernels.calibration.rules import Outputs, check_state, check_state_values
from v05.kernels.custom import custom_op
from v05.kernels.shrinkage.rules import Budget, check_group_values, readable


@custom_op("v05::calibrated")
def _calibrated(
    rewards: Tensor,
    offsets: Tensor,
    prior: Tensor,
    state: Tensor | None,
    state_decay: float,
    low: float,
    high: float,
    cost: float,
    k_init: int,
    k_max: int,
    leave_one_out: bool,
    advantages: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = dispatch.implementation("calibration", backend).calibrated
    budget = Budget(low, high, cost, k_init, k_max)
    return run(rewards, offsets, prior, state, state_decay, budget, leave_one_out, advantages)


@_calibrated.register_fake
def _(
    rewards: Tensor,
    offsets: Tensor,
    prior: Tensor,
    state: Tensor | None,
    state_decay: float,
    low: float,
    high: float,
    cost: float,
    k_init: int,
    k_max: int,
    leave_one_out: bool,
    advantages: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    groups = prior.numel()
    floats, soft = prior.new_empty(6, groups), prior.new_empty(COMPONENTS)
    more, graded = (prior.new_empty(shape, dtype=torch.bool) for shape in ((groups,), ()))
    own, centred = (prior.new_empty(rewards.numel() if asked else 0) for asked in (leave_one_out, advantages))
    return floats, offsets.new_empty(2, groups), more, own, centred, soft, graded


def calibrated(
    rewards: Tensor,
    offsets: Tensor,
    prior: Tensor,
    budget: Budget,
    state: Tensor | None,
    state_decay: float,
    leave_one_out: bool,
    advantages: bool,
    check_values: bool,
    backend: str | None,
) -> Outputs:
    """Runs the backend on checked shapes; the prior is in the working dtype.

    Raises:
        ValueError, TypeError: a state, a decay or values that are not allowed; the message says where.
        RuntimeError: the backend asked for cannot run here.
    """
    if not 0 <= state_decay <= 1:
        raise ValueError(f"state_decay is {state_decay}; allowed: 0 to 1")
    if state is not None:
        check_state(state, rewards)
    chosen = dispatch.backend_for("calibration", rewards, backend)
    on_cpu = segments.readable(rewards)
    if check_values or (chosen == "reference" and on_cpu):
        check_group_values(rewards.to(prior.dtype), offsets, prior, budget.low, budget.high)
    if state is not None:
        if check_values or on_cpu:
            check_state_values(state)
        state = segments.constant(state, prior.dtype)
    rewards, asked = readable(rewards, chosen), (leave_one_out, advantages)
    if chosen == "reference":
        return reference.calibrated(rewards, offsets, prior, state, state_decay, budget, *asked)
    return _calibrated(rewards, offsets, prior, state, float(state_decay), *budget, *asked, chosen)
