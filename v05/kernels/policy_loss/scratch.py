"""How many sums a policy loss returns."""

from v05.kernels.policy_loss.options import FIELDS as FIELDS
