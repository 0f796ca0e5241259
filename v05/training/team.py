"""An engine on every rank, led by one: the leader decides, and all of them sample what it asks for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from v05.rollout.engine import Engine, Rollout
from v05.seeds import seed_of
from v05.training.ranks import Ranks

T = TypeVar("T")


class Team:
    """The engines of all ranks as one; answers are dealt out in turn, and depend on how many ranks there are."""

    def __init__(self, engine: Engine, ranks: Ranks) -> None:
        """Sample with this rank's `engine`."""
        self.engine, self.ranks = engine, ranks

    def lead(self, work: Callable[[], T]) -> T:
        """Do `work` on the leader, the others sampling for it meanwhile, and return what it returned on every rank.

        Raises:
            RuntimeError: on the others, that the leader failed; the leader itself raises what `work` did.
        """
        if self.ranks.count == 1:
            return work()
        if not self.ranks.leads:
            found: T = self._serve()
            return found
        try:
            result = work()
        except BaseException as error:
            self.ranks.broadcast(("failed", f"{type(error).__name__}: {error}"))
            raise
        self.ranks.broadcast(("done", result))
        return result

    def generate(
        self, prompts: Sequence[str], counts: Sequence[int], *, seed: int, temperature: float, max_new_tokens: int
    ) -> list[list[Rollout]]:
        """Sample answers on all ranks; see `v05.rollout.engine.Engine`. Only for the leader, inside `lead`."""
        if self.ranks.count > 1:
            self.ranks.broadcast(("generate", (prompts, counts, seed, temperature, max_new_tokens)))
        return self._share(prompts, counts, seed, temperature, max_new_tokens)

    def update_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Give this rank's engine the policy's weights."""
        self.engine.update_weights(weights)

    def _serve(self) -> Any:
        """Sample what the leader asks for until its work is done, and return its result."""
        nothing: tuple[str, Any] = ("", None)
        while True:
            kind, content = self.ranks.broadcast(nothing)
            if kind == "failed":
                raise RuntimeError(f"rank 0 failed: {content}")
            if kind == "done":
                return content
            self._share(*content)

    def _share(
        self, prompts: Sequence[str], counts: Sequence[int], seed: int, temperature: float, max_new_tokens: int
    ) -> list[list[Rollout]]:
        """Sample this rank's share and return all ranks' answers."""
        own = seed if self.ranks.count == 1 else seed_of("rank", seed, self.ranks.rank)
        mine = deal(counts, self.ranks)
        found = self.engine.generate(prompts, mine, seed=own, temperature=temperature, max_new_tokens=max_new_tokens)
        return [[rollout for row in rows for rollout in row] for rows in zip(*self.ranks.gather(found), strict=True)]


def deal(counts: Sequence[int], ranks: Ranks) -> list[int]:
    """Return how many answers to each prompt are this rank's, dealt out one by one over all prompts."""
    dealt, before = [], 0
    for count in counts:
        reached = [(place - ranks.rank + ranks.count - 1) // ranks.count for place in (before, before + count)]
        dealt.append(reached[1] - reached[0])
        before += count
    return dealt
