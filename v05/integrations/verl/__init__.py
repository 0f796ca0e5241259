"""V0.5 inside verl: `actor_rollout_ref.model.external_lib=v05.integrations.verl` and `algorithm.adv_estimator=v05`.

verl imports its external library where it reads the model's configuration: in the driver that computes advantages, in
every training worker, rollout server and agent loop worker. Registering upon import is what that hook is for; nothing
of verl's is replaced.
"""

from v05.integrations.versions import check_version, installed

check_version("verl", "0.9.1", "0.10", installed("verl"))  # tested with 0.9.1

from v05.integrations.verl.fused_logprob import linear_cross_entropy  # noqa: E402
from v05.integrations.verl.registration import estimator_names, loss_names, register  # noqa: E402

__all__ = ["estimator_names", "linear_cross_entropy", "loss_names", "register"]

register()
