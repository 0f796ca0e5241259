"""What a scheduler may spend and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Mode = Literal["barrier", "async", "planned", "stream"]
MODES: Final = ("barrier", "async", "planned", "stream")


@dataclass(frozen=True)
class Limits:
    """What a scheduler may spend and how long it waits.

    Attributes:
        prompts: of a step.
        mode: `barrier`: one more rollout for each prompt that deserves one, once all prompts are through; `async`: the
            same, prompt by prompt; `planned`: as many as planned at once, prompt by prompt; `stream`: the same, and
            the prompts of following steps start meanwhile.
        window: steps in flight at most, 1 or more; with `stream` a rollout is at most `window - 1` updates old when
            its step is learnt from, with the other modes it is 1.
        rollouts: of a step at most, first ones included; prompts that it does not reach belong to the next step; None
            for no cap.
        temperature: of sampling.
        max_new_tokens: of an answer.
        seconds: that a request may take, by the scheduler's clock, waiting in the engine's queue included; the time
            between two steps, when nobody looks for its answer, left out.
        attempts: at a rollout before it is given up, 1 or more.
        restarts: of an engine that dies, without a finished rollout in between, before it counts as lost.
        poll: seconds, by the same clock, that the engine may be silent before a stop is looked for.
    """

    prompts: int
    mode: Mode = "stream"
    window: int = 4
    rollouts: int | None = None
    temperature: float = 1.0
    max_new_tokens: int = 1024
    seconds: float = 600.0
    attempts: int = 3
    restarts: int = 3
    poll: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError for what is not allowed."""
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; allowed: {', '.join(MODES)}")
        for name in ("prompts", "window", "rollouts", "attempts", "max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        for name in ("temperature", "seconds", "poll"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: above 0")

    @property
    def in_flight(self) -> int:
        """Return how many steps may be unfinished at once."""
        return self.window if self.mode == "stream" else 1
