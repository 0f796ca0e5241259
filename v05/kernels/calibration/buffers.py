"""What every kernel of calibrated fusion allocates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from v05.kernels.calibration.components import COMPONENTS
from v05.kernels.calibration.rules import Outputs

# Of a table with a column for each group: likelihoods of two-valued rewards [COMPONENTS], of graded ones [COMPONENTS],
# and 1 where a reward of the group is graded.
TABLE_ROWS = 2 * COMPONENTS + 1


class Allocated(NamedTuple):
    """Scratch and outputs of one call."""

    scratch: Tensor  # [TABLE_ROWS * G + COMPONENTS], the table, then the weights of the components
    floats: Tensor  # [6, G]
    integers: Tensor  # [2, G]
    more: Tensor  # [G]
    rollout_baseline: Tensor  # [N or 0]
    advantages: Tensor  # [N or 0]
    state: Tensor  # [COMPONENTS]
    graded: Tensor  # scalar

    @property
    def outputs(self) -> Outputs:
        """All but the scratch."""
        return self[1:]


def allocate(n: int, prior: Tensor, offsets: Tensor, leave_one_out: bool, advantages: bool) -> Allocated:
    """Allocates uninitialised memory for n rewards, on the device and in the dtype of the prior."""
    groups = prior.numel()
    return Allocated(
        prior.new_empty(TABLE_ROWS * groups + COMPONENTS),
        prior.new_empty(6, groups),
        offsets.new_empty(2, groups),
        prior.new_empty(groups, dtype=torch.bool),
        prior.new_empty(n if leave_one_out else 0),
        prior.new_empty(n if advantages else 0),
        prior.new_empty(COMPONENTS),
        prior.new_empty((), dtype=torch.bool),
    )
