"""V0.5 inside TRL: `V05Trainer` in place of `GRPOTrainer`, `V05Config` in place of `GRPOConfig`."""

from v05.integrations.versions import check_version, installed

# `V05Trainer` overrides methods that TRL does not promise to keep (their names begin with an underscore), so the range
# is narrow. Tested with 1.16.0.
check_version("trl", "1.16.0", "2", installed("trl"))

from v05.integrations.trl.config import V05Config  # noqa: E402
from v05.integrations.trl.trainer import V05Trainer  # noqa: E402

__all__ = ["V05Config", "V05Trainer"]
