"""The settings of a model of the user's and of its data; the algorithm's are in `v05.training.config`."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from v05.checks import FROM_ONE, POSITIVE, check, check_each, check_one_of, check_types, known
from v05.errors import InputError
from v05.tasks.data import BENCHMARKS, Source

LOSSES: Final = ("linear", "logits")


@dataclass(frozen=True)
class ModelConfig:
    """What is trained, on what, and how it is fitted into memory; all of it decides what a run computes.

    Attributes:
        model: folder or hub name of a causal language model.
        data: a .jsonl or .parquet file, a data set's folder or hub name, or one of `v05.tasks.data.BENCHMARKS`.
        split: of a data set; empty for its own default.
        prompt_key, answer_key: columns; empty for `prompt` and `answer`, or the benchmark's own.
        template: the prompt, `{prompt}` standing for the problem's text; empty for the text alone.
        verifier: see `v05.tasks.verifiers.make_verifier`.
        reward_low, reward_high: smallest and largest reward.
        heldout_share: share of the problems that is held out for evaluation.
        max_prompt_tokens: longer prompts are left out.
        max_new_tokens: limit of an answer's tokens; one that reaches it without an end gets the smallest reward.
        engine: what samples, see `v05.training.engines.make_engine`.
        engine_options: more arguments of an engine other than `hf`, a JSON object.
        sequences_at_once: answers that the engine `hf` samples in one batch; the samples depend on it.
        device: `auto`, `cpu`, `cuda`.
        dtype: of the products, `float32` or `bfloat16`; the trained parameters are float32.
        loss: `linear` goes from hidden states to the loss without keeping logits; `logits` keeps them.
        gradient_checkpointing: make activations again in the backward pass.
        reward_workers: processes that judge answers.
        reward_timeout: seconds for one answer.
    """

    model: str = ""
    data: str = ""
    split: str = ""
    prompt_key: str = ""
    answer_key: str = ""
    template: str = ""
    verifier: str = "math"
    reward_low: float = 0.0
    reward_high: float = 1.0
    heldout_share: float = 0.05
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 1024
    engine: str = "hf"
    engine_options: str = "{}"
    sequences_at_once: int = 128
    device: str = "auto"
    dtype: str = "bfloat16"
    loss: str = "linear"
    gradient_checkpointing: bool = True
    reward_workers: int = 2
    reward_timeout: float = 10.0

    def __post_init__(self) -> None:
        """Raise InputError naming the first setting that is not allowed."""
        check_types(self)
        check_each(self, ("model", "data"), (bool, "a name, both of model and data"))
        check_each(self, ("max_prompt_tokens", "max_new_tokens", "sequences_at_once", "reward_workers"), FROM_ONE)
        check("engine_options", self.engine_options, is_object, "a JSON object")
        check("reward_timeout", self.reward_timeout, *POSITIVE)
        check("heldout_share", self.heldout_share, lambda value: 0 < value < 1, "above 0 and below 1")
        check_each(self, ("reward_low", "reward_high"), (math.isfinite, "a finite number"))
        check("reward_high", self.reward_high, lambda value: self.reward_low < value, f"above {self.reward_low:g}")
        check_one_of("loss", self.loss, LOSSES)

    @property
    def reward_range(self) -> tuple[float, float]:
        """Return smallest and largest reward."""
        return self.reward_low, self.reward_high

    @property
    def source(self) -> Source:
        """Return where the problems come from."""
        names = ("split", "prompt_key", "answer_key", "template")
        given = {name: getattr(self, name) for name in names if getattr(self, name)}
        return dataclasses.replace(BENCHMARKS.get(self.data, Source(self.data)), **given)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by name."""
        return dataclasses.asdict(self)


def make_model_config(settings: Mapping[str, Any], given: Mapping[str, Any], where: str) -> ModelConfig | None:
    """Return the settings, overridden by `given`; None where there are none at all.

    Args:
        settings: by name, as in the table `model` of a file.
        given: by name, as on the command line.
        where: names the file in errors.

    Raises:
        InputError: unknown key, a value that is not allowed, or only some of what is needed.
    """
    if not settings and not given:
        return None
    if not isinstance(settings, Mapping):
        raise InputError(f"model is {settings!r} in {where}; allowed: a table of settings")
    return ModelConfig(**{**known(ModelConfig, settings, where), **known(ModelConfig, given, "the given settings")})


def is_object(text: str) -> bool:
    """Return whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False
