"""V0.5 inside TRL: `V05Trainer` in place of `GRPOTrainer`, `V05Config` in place of `GRPOConfig`."""

from v05.integrations.trl.versions import check_version, installed

check_version(installed())

from v05.integrations.trl.config import V05Config  # noqa: E402
from v05.integrations.trl.trainer import V05Trainer  # noqa: E402

__all__ = ["V05Config", "V05Trainer"]
