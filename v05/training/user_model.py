"""A model and data of the user's, put together for a trainer."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from v05.errors import InputError
from v05.policy import Policy
from v05.tasks.data import read_data
from v05.tasks.grading import PoolGrader
from v05.tasks.pool import RewardPool
from v05.tasks.problems import Problems
from v05.tasks.verifiers import make_verifier, needs_answer
from v05.training.model_config import ModelConfig
from v05.training.pretrained import load_policy

logger = logging.getLogger(__name__)


def load_user_model(settings: ModelConfig) -> tuple[Policy, Problems, PoolGrader]:
    """Return policy, task and grader.

    Args:
        settings: see `v05.training.model_config.ModelConfig`.

    Raises:
        InputError: a model, data or a verifier that cannot be loaded, or prompts and answers that the model's
            positions do not hold.
    """
    verifier = make_verifier(settings.verifier, settings.reward_range)
    records = read_data(settings.source, needs_answer(verifier))
    policy = load_policy(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        train=True,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    limit = settings.max_prompt_tokens
    lengths = prompt_lengths(policy, records, settings.data)
    short = [record for record, length in zip(records, lengths, strict=True) if length <= limit]
    if len(short) < len(records):
        left_out = f"{len(records) - len(short):,} of {len(records):,} prompts"
        logger.warning("%s are longer than max_prompt_tokens, %d, and are left out", left_out, limit)
    longest = max((length for length in lengths if length <= limit), default=0)
    check_positions(policy, longest, settings.max_new_tokens)
    task = Problems(
        short,
        name=settings.data,
        verifier=settings.verifier,
        reward_range=settings.reward_range,
        heldout_share=settings.heldout_share,
        max_answer_length=settings.max_new_tokens,
    )
    workers, timeout = settings.reward_workers, settings.reward_timeout
    pool = RewardPool(settings.verifier, settings.reward_range, workers=workers, timeout=timeout)
    return policy, task, PoolGrader(pool, task.record)


def check_positions(policy: Policy, longest: int, max_new_tokens: int) -> None:
    """Raise InputError where the longest prompt and the longest answer need more positions than there are."""
    positions = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest + max_new_tokens > positions:
        left = f"{positions:,} positions, of which the longest prompt takes {longest:,}"
        raise InputError(f"max_new_tokens is {max_new_tokens:,}; allowed by the model: {left}")


def prompt_lengths(policy: Policy, records: Sequence[Mapping[str, Any]], data: str) -> list[int]:
    """Return the tokens of every prompt, or raise InputError naming the data and what cannot be encoded."""
    try:
        return [len(ids) for ids in policy.encode([record["prompt"] for record in records])]
    except ValueError as error:
        raise InputError(f"{data}: {error}") from None
