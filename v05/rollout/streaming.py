"""What the scheduler asks of an engine that answers requests one by one, as they finish."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from v05.rollout.engine import Rollout


class EngineDied(RuntimeError):
    """The engine's process is gone; `restart` it, push the weights and submit what was unfinished again."""


@dataclass(frozen=True)
class Request:
    """One answer to one prompt.

    Attributes:
        number: unique within a run; its outcome carries it.
        prompt: the prompt's text.
        seed: fixes this answer's draws, whatever else the engine is doing.
        temperature: divides the logits, above 0.
        max_new_tokens: limit of the answer's tokens, end token included.
        urgent: served before requests that are not, among those that wait.
    """

    number: int
    prompt: str
    seed: int
    temperature: float
    max_new_tokens: int
    urgent: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Attributes:
        number: of the request.
        rollout: the answer; None where there is none.
        error: why there is none; empty otherwise.
    """

    number: int
    rollout: Rollout | None
    error: str = ""


class StreamingEngine(Protocol):
    """Answers many requests at once and hands over each as it finishes; every submitted request has one outcome."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests and return at once.

        Raises:
            EngineDied: the engine's process is gone.
        """
        ...

    def wait(self, timeout: float) -> list[Outcome]:
        """Return what has finished since the last call, waiting for the first of it at most `timeout` seconds.

        Raises:
            EngineDied: the engine's process is gone; outcomes that were ready have been returned before.
        """
        ...

    def abort(self, numbers: Sequence[int]) -> None:
        """Give up requests; those not finished yet have no outcome any more. Unknown numbers are ignored."""
        ...

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy the policy's weights, by parameter name; tokens sampled from now on carry `version`.

        Requests that are being answered go on with the new weights, from the next token.
        """
        ...

    def restart(self) -> None:
        """Start a fresh process in the place of one that died; it has no requests and no pushed weights."""
        ...

    def close(self) -> None:
        """Stop the engine; calling it twice is allowed."""
        ...
