"""An engine that is started again when it dies, with its weights and everything that it had been asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from v05.rollout.engine import Engine, Rollout
from v05.rollout.requests import Requests
from v05.rollout.step import Trouble
from v05.rollout.streaming import EngineDied, Outcome, Request, StreamingEngine


class RevivedEngine:
    """Passes calls on; a call on which the engine dies counts as done once a fresh one has all unfinished requests."""

    def __init__(self, engine: StreamingEngine, requests: Requests, trouble: Trouble, restarts: int) -> None:
        """Use `engine`.

        Args:
            engine: may die.
            requests: what it has not answered; renumbered when it is started again.
            trouble: counts restarts and what is asked again.
            restarts: in a row, without `lived` in between, before the engine counts as lost.
        """
        self.engine, self.requests, self.trouble, self.restarts = engine, requests, trouble, restarts
        self.weights: Mapping[str, Tensor] | None = None
        self.version = self.deaths = 0

    def lived(self) -> None:
        """Note that an answer came."""
        self.deaths = 0

    def push(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Give the engine weights, now and whenever it is started again."""
        self.weights, self.version = weights, version
        self._alive(lambda: self.engine.update_weights(weights, version))

    def submit(self, requests: Sequence[Request]) -> None:
        """Ask for rollouts that are in the book of requests."""
        if requests:
            self._alive(lambda: self.engine.submit(requests))

    def wait(self, timeout: float) -> list[Outcome]:
        """Return what has finished; nothing where the engine died."""
        outcomes: list[Outcome] | None = self._alive(lambda: self.engine.wait(timeout))
        return outcomes or []

    def abort(self, numbers: Sequence[int]) -> None:
        """Take requests back."""
        self._alive(lambda: self.engine.abort(numbers))

    def generate(
        self, prompts: Sequence[str], counts: Sequence[int], *, seed: int, temperature: float, max_new_tokens: int
    ) -> list[list[Rollout]]:
        """Sample a batch beside the requests, see `Engine`; again where the engine dies meanwhile."""
        engine = cast(Engine, self.engine)
        limits: dict[str, Any] = dict(seed=seed, temperature=temperature, max_new_tokens=max_new_tokens)
        rows: list[list[Rollout]] | None = None
        while rows is None:
            rows = self._alive(lambda: engine.generate(prompts, counts, **limits))
        self.lived()
        return rows

    def _alive(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except EngineDied as first:
            death = first
        while True:
            self.deaths += 1
            if self.deaths > self.restarts:
                raise EngineDied(f"the engine died {self.deaths} times without a finished rollout in between: {death}")
            self.trouble.restarts += 1
            try:
                self.engine.restart()
                if self.weights is not None:
                    self.engine.update_weights(self.weights, self.version)
                again = [self.requests.renumbered(asked) for asked in self.requests.take_all()]
                self.trouble.resubmitted += len(again)
                self.engine.submit(again)
                return None
            except EngineDied as another:
                death = another
