"""An engine of whole batches behind the protocol of one that streams: a `wait` samples everything that is queued."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from v05.rollout.engine import Engine, Rollout
from v05.rollout.streaming import Outcome, Request
from v05.seeds import seed_of


class QueuedEngine:
    """Answers all queued requests in one batch, whose draws follow from their seeds."""

    def __init__(self, engine: Engine) -> None:
        """Sample with `engine`."""
        self.engine, self.version = engine, 0
        self._queue: dict[int, Request] = {}

    def generate(
        self, prompts: Sequence[str], counts: Sequence[int], *, seed: int, temperature: float, max_new_tokens: int
    ) -> list[list[Rollout]]:
        """Sample a batch beside the queue; see `Engine`."""
        limits = dict(seed=seed, temperature=temperature, max_new_tokens=max_new_tokens)
        return self.engine.generate(prompts, counts, **limits)  # type: ignore[arg-type]

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests."""
        self._queue |= {request.number: request for request in requests}

    def wait(self, timeout: float) -> list[Outcome]:
        """Sample everything that is queued; what is asked of it must be alike in temperature and limit.

        Raises:
            ValueError: temperatures or limits differ.
        """
        asked = sorted(self._queue.values(), key=lambda request: request.seed)
        self._queue.clear()
        if not asked:
            return []
        limits = {(request.temperature, request.max_new_tokens) for request in asked}
        if len(limits) > 1:
            raise ValueError(f"temperatures and limits are {sorted(limits)}; allowed: one for all that is queued")
        ((temperature, longest),) = limits
        seed = seed_of(*(request.seed for request in asked))
        rows = self.generate(
            [request.prompt for request in asked],
            [1] * len(asked),
            seed=seed,
            temperature=temperature,
            max_new_tokens=longest,
        )
        return [
            Outcome(request.number, replace(row[0], versions=(self.version,) * len(row[0].token_ids)))
            for request, row in zip(asked, rows, strict=True)
        ]

    def abort(self, numbers: Sequence[int]) -> None:
        """Take requests out of the queue."""
        for number in numbers:
            self._queue.pop(number, None)

    def update_weights(self, weights: Mapping[str, Tensor], version: int | None = None) -> None:
        """Give the engine weights, whose number is the last one's successor where none is given."""
        self.engine.update_weights(weights)
        self.version = self.version + 1 if version is None else version

    def restart(self) -> None:
        """Empty the queue."""
        self._queue.clear()

    def close(self) -> None:
        """Do nothing: nothing was started."""
