"""The settings of the loss, where it is not the algorithm's own."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from v05.checks import FINITE_FROM_ZERO, check, known
from v05.errors import InputError
from v05.kernels.policy_loss.options import CORRECTIONS, KLS, LEVELS, make_kinds, make_numbers
from v05.training.algorithms import Algorithm

SURROGATES: Final = ("ppo", "cispo", "sapo", "gpg")  # the others select tokens of a whole batch, not of its parts


@dataclass(frozen=True)
class LossConfig:
    """What `policy_loss` or `linear_policy_loss` is asked for; all of it decides what a run computes.

    Attributes:
        surrogate: one of `SURROGATES`.
        level: of the ratio: `token`, or `sequence` for GSPO.
        clip_low, clip_high: the ratio is clipped below 1 - clip_low and above 1 + clip_high; None for the algorithm's.
        dual_clip: above 1: the loss of ppo is at most so many times |A| where A < 0; None for no such bound.
        kl: an estimate of the KL to the policy that the run starts from, see `policy_loss`; all but `none` take a
            frozen copy of the model.
        kl_coef: of the KL; 0 measures it and no more.
        sampler_correction: of what the sampler's log-probabilities are off, see `policy_loss`; with `mode = "stream"`
            the ratio then refers to the policy before the update, as in batches, no longer to the sampler's.
        sampler_cap: of the weights of that correction.
    """

    surrogate: str = "ppo"
    level: str = "token"
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    kl: str = "none"
    kl_coef: float = 0.0
    sampler_correction: str = "none"
    sampler_cap: float = 2.0

    def __post_init__(self) -> None:
        """Raise InputError naming the first setting that is not allowed."""
        choices = {"surrogate": SURROGATES, "level": LEVELS, "kl": tuple(KLS), "sampler_correction": tuple(CORRECTIONS)}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in choices:
                allowed = choices[field.name]
                check(field.name, value, lambda value, allowed=allowed: value in allowed, ", ".join(allowed))  # type: ignore[misc]
            elif value is not None or field.default is not None:
                check(field.name, value, lambda value: type(value) in (int, float), "a number")
        check("kl_coef", self.kl_coef, *FINITE_FROM_ZERO)
        if self.kl_coef and not self.refers:
            raise InputError(f"kl_coef is {self.kl_coef} without a kl; allowed: 0, or a kl of {', '.join(KLS)}")
        kinds = make_kinds(self.surrogate, self.level, self.kl, self.sampler_correction)
        low, high = (0.2 if clip is None else clip for clip in (self.clip_low, self.clip_high))
        try:
            make_numbers(kinds, low, high, self.dual_clip, (1.0, 1.0), 1.0, self.kl_coef, None, self.sampler_cap)
        except ValueError as error:
            raise InputError(str(error)) from None

    @property
    def corrects(self) -> bool:
        """Return whether the sampler's log-probabilities are corrected for."""
        return self.sampler_correction != "none"

    @property
    def refers(self) -> bool:
        """Return whether there is a KL to the policy that the run starts from."""
        return self.kl != "none"

    def options(self, algorithm: Algorithm) -> dict[str, Any]:
        """Return the arguments of the loss, but for tensors; bounds that are not given are the algorithm's."""
        bounds = {"clip_low": algorithm.clip_low, "clip_high": algorithm.clip_high}
        given = {name: value for name, value in self.to_dict().items() if value is not None}
        return {**bounds, **given}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by name."""
        return dataclasses.asdict(self)


def make_loss_config(settings: Mapping[str, Any], where: str) -> LossConfig:
    """Return the settings of the table `loss` of a file; `where` names the file in errors.

    Raises:
        InputError: unknown key, or a value that is not allowed.
    """
    if not isinstance(settings, Mapping):
        raise InputError(f"loss is {settings!r} in {where}; allowed: a table of settings")
    return LossConfig(**known(LossConfig, settings, where))


PLAIN: Final = LossConfig()
