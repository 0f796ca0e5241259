"""The few options that V0.5 adds to TRL's."""

import math
from dataclasses import dataclass, field
from numbers import Integral, Real

from trl import GRPOConfig

from v05.integrations.reward_range import parsed_range
from v05.kernels.advantage.estimators import ESTIMATORS, resolve
from v05.kernels.shrinkage.rules import LARGEST
from v05.value.priors import PRIORS

LOSSES = ("policy_loss", "linear_policy_loss", "trl")
LOGPROBS = ("linear_logprob", "trl")


@dataclass
class V05Config(GRPOConfig):
    """TRL's `GRPOConfig` and what V0.5 adds; `num_generations` are the rollouts that every prompt starts with.

    Args:
        estimator: of `v05.kernels.group_advantage`; those that begin with `v05` fuse the group with a prior.
        advantage_scale: what an advantage is divided by: `none`, `group`, `batch` or `baseline`. Takes the place of
            `scale_rewards`, which is not looked at.
        reward_range: smallest and largest reward of a completion, after `reward_weights`. With a fused estimator a
            reward outside of it ends the run with an error, at whichever step it comes: count rare bonuses in.
        prior: the prior that is made where the trainer is given none: `history` (outcomes of similar prompts, and the
            prompt's own past), `running_mean` or `middle` (of the range). All work offline and start with no knowledge.
        prior_gives: what the prior predicts: a `reward` in `reward_range`, or the `probability` of its upper end.
        k_max: rollouts that a prompt may grow to; `num_generations` or less keeps every group at that size.
        cost: of one rollout, in units of the largest variance a reward in that range can have.
        extra_rounds: how often extra rollouts are planned and generated before a batch is learnt from. Weights reach
            vLLM once a batch; with `vllm_enable_sleep_mode` TRL sends them for every round again.
        max_extra_rollouts: extra rollouts in one generation batch, over all processes; None for as many as it starts
            with, so that a batch at most doubles. That costs time, not memory: a step goes in pieces of at most
            `per_device_train_batch_size` rows, with the gradient of all at once.
        loss_backend: `policy_loss` (v05's kernel on log-probs), `linear_policy_loss` (v05's loss straight from hidden
            states: a product with the output layer less than with log-probs), or `trl` (TRL's own loss).
        logprob_backend: where log-probs and entropies come from, the old policy's and the reference's too:
            `linear_logprob` (v05's fused output layer, of completion tokens alone) or `trl` (TRL's own code). Where
            v05's cannot, TRL's runs, and a warning says why; so it is with `loss_backend`.
    """

    estimator: str = field(default="v05", metadata={"help": f"One of {', '.join(ESTIMATORS)}."})
    advantage_scale: str = field(default="none", metadata={"help": "none, group, batch or baseline."})
    reward_range: list[float] = field(
        default_factory=lambda: [0.0, 1.0], metadata={"help": "Smallest and largest reward."}
    )
    prior: str = field(default="history", metadata={"help": f"One of {', '.join(PRIORS)}."})
    prior_gives: str = field(default="reward", metadata={"help": "What the prior predicts: reward or probability."})
    k_max: int = field(default=16, metadata={"help": "Rollouts that a prompt may grow to."})
    cost: float = field(default=1 / 256, metadata={"help": "Of a rollout, in units of the largest reward variance."})
    extra_rounds: int = field(default=2, metadata={"help": "Rounds of extra rollouts per generation batch."})
    max_extra_rollouts: int | None = field(default=None, metadata={"help": "Extra rollouts per generation batch."})
    loss_backend: str = field(default="policy_loss", metadata={"help": f"One of {', '.join(LOSSES)}."})
    logprob_backend: str = field(default="linear_logprob", metadata={"help": f"One of {', '.join(LOGPROBS)}."})

    def __post_init__(self) -> None:
        """Check the options, then let TRL check its own.

        Raises:
            ValueError: an option that is not allowed, or one of TRL's that does not go with it.
        """
        super().__post_init__()
        resolve(self.estimator, self.advantage_scale)
        parsed_range("reward_range", self.reward_range)
        for name, allowed in (
            ("prior", tuple(PRIORS)),
            ("prior_gives", ("reward", "probability")),
            ("loss_backend", LOSSES),
            ("logprob_backend", LOGPROBS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(map(repr, allowed))}")
        self._check_numbers()
        if self.multi_objective_aggregation != "sum_then_normalize":
            given = self.multi_objective_aggregation
            raise ValueError(f"multi_objective_aggregation is {given!r}; allowed with V0.5: 'sum_then_normalize'")

    def _check_numbers(self) -> None:
        for name in ("k_max", "extra_rounds", "max_extra_rollouts"):
            value, optional = getattr(self, name), name == "max_extra_rollouts"
            least, most = (1, LARGEST) if name == "k_max" else (0, math.inf)
            if optional and value is None:
                continue
            if not (isinstance(value, Integral) and least <= int(value) <= most):
                allowed = f"from 1 to {LARGEST}" if name == "k_max" else ", 0 or more"
                number = f"{'None, or ' if optional else ''}a whole number {allowed}".replace(" ,", ",")
                raise ValueError(f"{name} is {value!r}; allowed: {number}")
        if not (isinstance(self.cost, Real) and 0 <= float(self.cost) < math.inf):
            raise ValueError(f"cost is {self.cost!r}; allowed: a finite number, 0 or more")

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the smallest and the largest reward."""
        return parsed_range("reward_range", self.reward_range)

    @property
    def fused(self) -> bool:
        """Return whether the estimator has a prior."""
        return ESTIMATORS[self.estimator].needs_prior

    @property
    def fusion(self) -> str:
        """Return how prior and rollouts are fused, in the test and in the baseline; see `v05.kernels.shrinkage`."""
        return ESTIMATORS[self.estimator].fusion or "v05"

    @property
    def grows(self) -> bool:
        """Return whether prompts may get more rollouts than they start with."""
        return self.fused and self.k_max > self.num_generations and self.extra_rounds > 0
