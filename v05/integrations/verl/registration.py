"""Everything under its name in verl's registries."""

from v05.integrations.verl.advantages import Advantage
from v05.integrations.verl.losses import LOSSES, Loss
from v05.integrations.verl.settings import NAMES, prefixed


def estimator_names() -> dict[str, str]:
    """Return every estimator's name in verl with its name in `group_advantage`: `v05_grpo` -> `grpo`."""
    return dict(NAMES)


def loss_names() -> tuple[str, ...]:
    """Return the names of the policy losses in verl, `v05_ppo`, `v05_gspo` and so on."""
    return tuple(prefixed(name) for name in LOSSES)


def register() -> None:
    """Register estimators and losses with verl; calling it again changes nothing.

    Raises:
        ImportError: verl is not installed.
    """
    from verl.trainer.ppo import core_algos

    for name, estimator in estimator_names().items():
        if name not in core_algos.ADV_ESTIMATOR_REGISTRY:
            core_algos.register_adv_est(name)(Advantage(estimator))
    for name in LOSSES:
        if prefixed(name) not in core_algos.POLICY_LOSS_REGISTRY:
            core_algos.register_policy_loss(prefixed(name))(Loss(name))
