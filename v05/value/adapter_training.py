"""Training of the query adapter through a frozen head: pairs from one context, ranking and soft cross-entropy."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from v05.seeds import seed_of
from v05.value.adapter import QueryAdapter
from v05.value.embedder import TokenStates, join
from v05.value.regression_head import log_odds

PAIRWISE: Final = 0.25  # share of the ranking loss; the rest is cross-entropy
WARM_UP: Final = 0.05  # share of the steps with a rising learning rate
GRADIENT_NORM: Final = 1.0

# From features [N, F] and success rates [N] of the context, and features [M, F], to log-odds [M].
DifferentiableHead = Callable[[Tensor, Tensor, Tensor], Tensor]


class Episode(NamedTuple):
    """What one step learns from, as rows of one policy's records: a context, and pairs that are not in it.

    Attributes:
        context: rows, [N].
        solved, failed: rows, [K] each; pair k is `solved[k]` and `failed[k]`.
    """

    context: list[int]
    solved: list[int]
    failed: list[int]


def draw_episode(rates: Sequence[float], size: int, pairs: int, seed: int) -> Episode | None:
    """Return a random episode, or None where a policy has no two outcomes of both kinds.

    Args:
        rates: success rates of the policy's records; one half or more is solved.
        size: of the context at most.
        pairs: at most.
        seed: fixes the choice.
    """
    rng = random.Random(seed)
    rows = list(range(len(rates)))
    rng.shuffle(rows)
    solved, failed = ([row for row in rows if (rates[row] >= 0.5) is kind] for kind in (True, False))
    count = min(pairs, len(solved) // 2, len(failed) // 2)
    if count == 0:
        return None
    taken = {*solved[:count], *failed[:count]}
    return Episode([row for row in rows if row not in taken][:size], solved[:count], failed[:count])


def episode_loss(solved: Tensor, failed: Tensor, solved_rate: Tensor, failed_rate: Tensor) -> Tensor:
    """Return `0.25 * pairwise + 0.75 * cross-entropy` of log-odds; everything is [K].

    The pairwise part, -log sigmoid(z_solved - z_failed), cancels what depends on the context alone. Source: V0, arXiv
    2602.03584.
    """
    pairwise = -logsigmoid(solved - failed).mean()
    rates = torch.cat([solved_rate, failed_rate])
    entropy = binary_cross_entropy_with_logits(torch.cat([solved, failed]), rates.to(solved.dtype))
    return PAIRWISE * pairwise + (1 - PAIRWISE) * entropy


def gather(states: Sequence[Tensor], rows: Sequence[int]) -> TokenStates:
    """Return the token states of some prompts as one batch."""
    return join([states[row] for row in rows], states[0].shape[1], 0)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate at `step` of `steps`: rising over the first 5 %, then a cosine to 0."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class AdapterTrainer:
    """One run of AdamW over an adapter; every draw is a function of seed and step, so that it can go on anywhere."""

    def __init__(self, adapter: QueryAdapter, head: DifferentiableHead, peak: float, steps: int, seed: int) -> None:
        """Set up.

        Args:
            adapter: trained in place.
            head: frozen, differentiable; `regression_head.log_odds`, or TabPFN's.
            peak: learning rate after the warm-up.
            steps: of the whole run.
            seed: of episodes and dropout.
        """
        self.adapter, self.head, self.peak, self.steps, self.seed = adapter, head, peak, steps, seed
        self.optimizer = torch.optim.AdamW(adapter.parameters(), lr=peak, weight_decay=0.01)
        self.done = 0

    def step(self, states: Sequence[Sequence[Tensor]], rates: Sequence[Tensor], size: int, pairs: int) -> float | None:
        """Take one step on a random policy, and return its loss; None where that policy gives no episode.

        Args:
            states: of each policy, the token states [T, D] of each of its prompts.
            rates: of each policy, the success rates [N].
            size: of a context.
            pairs: in a step.
        """
        number = seed_of("policy", self.seed, self.done) % len(rates)
        episode = draw_episode(rates[number].tolist(), size, pairs, seed_of("episode", self.seed, self.done))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.done, self.steps, self.peak)
        self.done += 1
        if episode is None:
            return None
        self.adapter.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("dropout", self.seed, self.done))
            features = self.adapter(gather(states[number], [*episode.context, *episode.solved, *episode.failed]))
        context, rest = features[: len(episode.context)], features[len(episode.context) :]
        rate = rates[number].to(features.dtype)
        odds = self.head(context, rate[episode.context], rest)
        count = len(episode.solved)
        loss = episode_loss(odds[:count], odds[count:], rate[episode.solved], rate[episode.failed])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), GRADIENT_NORM)
        self.optimizer.step()
        return float(loss.detach())


@torch.no_grad()
def evaluate(
    adapter: QueryAdapter,
    head: DifferentiableHead,
    context: tuple[Sequence[Tensor], Tensor],
    states: Sequence[Tensor],
    size: int,
) -> Tensor:
    """Return the probabilities of success [M] for prompts that were not trained on.

    Args:
        adapter, head: as trained.
        context: token states and success rates of the policy's training records; the last `size` are used.
        states: of the M prompts.
        size: of the context.
    """
    adapter.eval()
    known, rates = context
    start = max(0, len(known) - size)
    features = adapter(gather([*known[start:], *states], range(len(known) - start + len(states))))
    split = len(known) - start
    return torch.sigmoid(head(features[:split], rates[start:].to(features.dtype), features[split:]))


def embedded_head() -> DifferentiableHead:
    """Return the head that needs no weights."""
    return log_odds
