"""What both native backends of calibrated fusion allocate, and the addresses they pass on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from v05.kernels.calibration.components import COMPONENTS
from v05.kernels.calibration.rules import Outputs


class Allocated(NamedTuple):
    """Scratch and outputs of one call."""

    table: Tensor  # [COMPONENTS, G]
    weights: Tensor  # [COMPONENTS]
    floats: Tensor  # [6, G]
    integers: Tensor  # [2, G]
    more: Tensor  # [G]
    rollout_baseline: Tensor  # [N or 0]
    advantages: Tensor  # [N or 0]
    state: Tensor  # [COMPONENTS]

    @property
    def outputs(self) -> Outputs:
        """All but the scratch."""
        return self.floats, self.integers, self.more, self.rollout_baseline, self.advantages, self.state


def allocate(rewards: Tensor, offsets: Tensor, leave_one_out: bool, advantages: bool) -> Allocated:
    """Allocates uninitialised memory on the device of the rewards."""
    n, groups = rewards.numel(), offsets.numel() - 1
    own, centred = (rewards.new_empty(n if asked else 0) for asked in (leave_one_out, advantages))
    more = torch.empty(groups, dtype=torch.bool, device=rewards.device)
    table, weights, state = (rewards.new_empty(shape) for shape in ((COMPONENTS, groups), COMPONENTS, COMPONENTS))
    return Allocated(
        table, weights, rewards.new_empty(6, groups), offsets.new_empty(2, groups), more, own, centred, state
    )


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor begins; 0 where it is empty."""
    return [tensor.data_ptr() if tensor.numel() else 0 for tensor in tensors]
