"""From what a server says it sampled to a rollout, checked."""

import math
from collections.abc import Sequence

from v05.rollout.codec import Codec
from v05.rollout.engine import Rollout

INITIAL: str = "default"  # what vLLM calls the weights it started with


def make_rollout(
    codec: Codec,
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    reason: str | None,
    spans: Sequence[tuple[str, int, int]] | None,
) -> Rollout:
    """Return the rollout, having checked that its parts fit together.

    Args:
        codec: of the model.
        prompt_ids: token ids of the prompt.
        token_ids: sampled token ids, T.
        logprobs: their log-probabilities at the sampling temperature, T, in nats.
        reason: why the answer ended: `stop` or `length`.
        spans: (version, first token, token after the last) of each version of the weights, without gaps; None where
            nobody counted.

    Returns:
        The rollout.

    Raises:
        ValueError: there is no token, lengths differ, a log-probability is not one, the spans do not cover the tokens,
            or the answer ended otherwise.
    """
    if reason not in ("stop", "length"):
        raise ValueError(f"the answer ended with {reason!r}; allowed: 'stop' or 'length'")
    if not token_ids or len(token_ids) != len(logprobs):
        raise ValueError(f"{len(token_ids)} tokens with {len(logprobs)} log-probabilities; allowed: as many, 1 or more")
    for index, value in enumerate(logprobs):
        if not (isinstance(value, float | int) and math.isfinite(value) and value <= 1e-3):
            raise ValueError(f"log-probability {index} is {value!r}; allowed: finite, at most 0")
    versions: list[int] = []
    for name, start, end in spans or ():
        if start != len(versions):
            raise ValueError(
                f"version {name!r} starts at token {start}; allowed: {len(versions)}, where the last ended"
            )
        versions += [0 if name == INITIAL else int(name)] * (end - start)
    if spans is not None and len(versions) != len(token_ids):
        raise ValueError(f"{len(versions)} tokens have a version, of {len(token_ids)}; allowed: all")
    text = codec.decode(token_ids)
    return Rollout(
        tuple(prompt_ids), tuple(token_ids), tuple(map(float, logprobs)), text, reason == "stop", tuple(versions)
    )
