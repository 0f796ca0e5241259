"""The settings of a training run: defaults, then a TOML or JSON file, then the command line."""

import dataclasses
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from v05.checks import FINITE_FROM_ZERO, FROM_ONE, POSITIVE, check_each, check_one_of, check_types, known
from v05.errors import InputError

# v0: the embedded V0; history: kernel regression over past prompts (both with each prompt's own past); constant: one
# running mean for all prompts; none: always the middle of the reward range, as an ablation. See `v05.value.priors`.
PRIORS: Final = ("v0", "history", "constant", "none")

# What a resumed run may change; see `v05.training.changes`.
CHANGEABLE: Final = ("rollouts", "learning_rate", "micro_batches", "eval_every", "checkpoint_every")
TABLES: Final = ("model", "sampling", "loss")  # of a file of settings; of a run each is a file of its own


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes; two runs with equal settings and threads are equal bit for bit.

    Attributes:
        algorithm: `name[:k]`, see `v05.training.algorithms`.
        task: one of `v05.tasks.TASKS`.
        policy: size of the policy, one of `v05.small_policy.SIZES`.
        prior: one of `PRIORS`.
        seed: fixes the order of prompts and every sample; the warm start has its own.
        rollouts: rollouts to spend in all.
        rollouts_per_update: rollouts that one step of the optimiser learns from.
        learning_rate: of Adam, after the first updates, see `v05.training.learner.WARM_UP`.
        temperature: of sampling and of log-probabilities.
        cost: price of a rollout in the look-ahead, in units of the largest reward variance.
        epochs: passes over each batch; from the second on the ratio is clipped.
        micro_batches: parts that a batch is split into to save memory; does not change the gradient.
        eval_every: rollouts between held-out evaluations.
        heldout_prompts: held-out prompts, the same in every run.
        heldout_seed: chooses the held-out prompts: tune on one choice, report on another.
        heldout_samples: answers sampled to each of them at temperature 1.
        checkpoint_every: updates between checkpoints.
        warm_start_steps: batches of supervised learning before the first rollout.
        warm_start_seed: fixes weights and data of the warm start, whatever `seed` is.
    """

    algorithm: str = "v05_from_one"
    task: str = "arithmetic"
    policy: str = "small"
    prior: str = "v0"
    seed: int = 0
    rollouts: int = 16_000
    rollouts_per_update: int = 128
    learning_rate: float = 2e-4
    temperature: float = 1.0
    cost: float = 1 / 256
    epochs: int = 1
    micro_batches: int = 1
    eval_every: int = 1_000
    heldout_prompts: int = 512
    heldout_seed: int = 0
    heldout_samples: int = 4
    checkpoint_every: int = 25
    warm_start_steps: int = 700
    warm_start_seed: int = 0

    def __post_init__(self) -> None:
        """Raise InputError naming the first setting that is not allowed."""
        check_types(self)
        check_each(self, ("rollouts", "rollouts_per_update", "epochs", "micro_batches", "eval_every"), FROM_ONE)
        check_each(self, ("heldout_prompts", "heldout_samples", "checkpoint_every"), FROM_ONE)
        check_each(self, ("seed", "warm_start_seed", "warm_start_steps", "cost"), FINITE_FROM_ZERO)
        check_each(self, ("learning_rate", "temperature"), POSITIVE)
        check_one_of("prior", self.prior, PRIORS)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by name."""
        return dataclasses.asdict(self)


def make_config(file: Path | None = None, given: Mapping[str, Any] | None = None) -> TrainConfig:
    """Return the defaults, overridden by a file, overridden by `given`.

    Args:
        file: a TOML or JSON file of settings; None for none. Its `TABLES` are for others.
        given: settings by name, as on the command line.

    Returns:
        The checked settings.

    Raises:
        InputError: unknown key, a value that is not allowed, or a file that cannot be read as TOML or JSON.
        OSError: the file cannot be opened.
    """
    settings: dict[str, Any] = {}
    if file is not None:
        found = {name: value for name, value in read_settings(file).items() if name not in TABLES}
        settings.update(known(TrainConfig, found, str(file)))
    settings.update(known(TrainConfig, given or {}, "the given settings"))
    return TrainConfig(**settings)


def read_settings(file: Path) -> dict[str, Any]:
    """Return the settings in a TOML or JSON file, unchecked."""
    readers: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".json": json.loads}
    if file.suffix not in readers:
        raise InputError(f"{file} ends in {file.suffix!r}; allowed: {', '.join(readers)}")
    try:
        settings = readers[file.suffix](file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{file} holds a {type(settings).__name__}; allowed: settings by name")
    return settings
