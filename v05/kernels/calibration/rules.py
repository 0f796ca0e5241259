"""What goes into calibrated fusion beside groups: the mixture's state, and its checks."""

from __future__ import annotations

import math

from torch import Tensor

from v05.kernels import segments
from v05.kernels.calibration.components import COMPONENTS

# Those of shrinkage, then the groups [C] of each component, and graded, a scalar bool.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def check_state(state: Tensor, like: Tensor) -> None:
    """Raises where state is not what an earlier call returned; values are not read."""
    segments.check_tensor("state", state)
    if state.shape != (COMPONENTS,) or not state.dtype.is_floating_point:
        given = f"{state.dtype} of shape {list(state.shape)}"
        raise ValueError(f"state is {given}; allowed: a floating dtype of shape [{COMPONENTS}], as a call returned it")
    if state.device != like.device:
        raise ValueError(f"state is on {state.device}; allowed: {like.device}, where the rewards are")


def check_state_values(state: Tensor) -> None:
    """Raises where a count is negative or not finite; waits for the device."""
    for i, count in enumerate(state.tolist()):
        if not 0 <= count < math.inf:
            raise ValueError(f"state[{i}] is {count:g}; allowed: finite, 0 or above")
