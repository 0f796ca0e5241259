"""What goes into calibrated fusion beside groups: which rewards have two values, and the mixture's state."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels.calibration.components import COMPONENTS, NEAR
from v05.kernels.shrinkage.rules import Budget

# Those of shrinkage, then the groups [C] of each component.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def is_graded(rewards: Tensor, budget: Budget) -> Tensor:
    """Whether a reward is neither the smallest nor the largest possible, a scalar bool on the device."""
    near = NEAR * (budget.high - budget.low)
    return (((rewards - budget.low).abs() > near) & ((budget.high - rewards).abs() > near)).any()


def check_state(state: Tensor, like: Tensor) -> None:
    """Raises where state is not what an earlier call returned; values are not read."""
    if state.shape != (COMPONENTS,) or not state.dtype.is_floating_point:
        given = f"{state.dtype} of shape {list(state.shape)}"
        raise ValueError(f"state is {given}; allowed: a floating dtype of shape [{COMPONENTS}], as a call returned it")
    if state.device != like.device:
        raise ValueError(f"state is on {state.device}; allowed: {like.device}, where the rewards are")


def check_state_values(state: Tensor) -> None:
    """Raises where a count is negative or not finite; waits for the device."""
    bad = (~(state >= 0) | state.isinf()).nonzero()
    if bad.numel():
        i = int(bad[0])
        raise ValueError(f"state[{i}] is {float(state[i]):g}; allowed: finite, 0 or above")


def no_state(like: Tensor) -> Tensor:
    """The state before any batch."""
    return torch.zeros(COMPONENTS, dtype=like.dtype, device=like.device)
