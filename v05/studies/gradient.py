"""What a baseline is for: bias and variance of a prompt's policy gradient from a few rollouts, by estimator.

A pool of many rollouts of each prompt stands for the policy: groups are drawn from it, and its own gradient is the
truth. All gradients of one prompt lie in the span of the scores (gradients of log p) of its distinct answers, so that
the inner products of these, one small matrix a prompt, give every length exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, NamedTuple

import torch
from torch import Tensor

from v05.batch import offsets_of
from v05.errors import InputError
from v05.kernels import group_advantage, shrinkage, token_logprob
from v05.kernels.advantage.estimators import ESTIMATORS
from v05.policy import Policy
from v05.rollout.engine import Engine, Rollout
from v05.rollout.pack import pack
from v05.studies.records import PRIORS
from v05.tasks import Task

BLOCKS: Final = 10  # of repeats: what intervals are drawn from
CHUNK: Final = 1024  # rollouts of a prompt sampled at once
COST: Final = 1 / 256  # of a rollout, the paper's


class Pool(NamedTuple):
    """M rollouts of each of P prompts: rewards `[P, M]` float64, moved to [-1, 1], answers and tokens `[P, M]` int64.

    `gram` `[P, U, U]` float64: inner products of the answers' scores, centred on the pool; a prompt has at most U.
    `common`, a scalar float64: what part of a prompt's gradient, by squared length, all prompts have in common.
    """

    rewards: Tensor
    answer: Tensor
    gram: Tensor
    common: Tensor
    lengths: Tensor


class GradientQuality(NamedTuple):
    """One estimator's gradients against the truth, relative to its squared length, each with half a 95 % interval.

    `factor` is what the mean gradient is multiplied by to come nearest to the truth (a learning rate does as much);
    `bias` is the squared length of what is then missing, `variance` that of the noise, multiplied too. `between` is the
    variance from one prompt's true gradient to the next one's.
    """

    estimator: str
    prior: str
    k_init: int
    k_max: int
    rollouts: float
    factor: float
    bias: float
    bias_half_width: float
    variance: float
    variance_half_width: float
    between: float
    cost: float = COST

    @property
    def size(self) -> str:
        """Return the rollouts of a group, and at which cost it grows."""
        price = Fraction(self.cost).limit_denominator(10_000)
        return str(self.k_init) if self.k_init == self.k_max else f"{self.k_init} to {self.k_max} at {price}"

    @property
    def by_rollout(self) -> float:
        """Return variance times rollouts of a prompt: what an update of many rollouts of these prompts has for each."""
        return self.rollouts * self.variance

    @property
    def by_rollout_in_all(self) -> float:
        """Return the same for the gradient over all prompts: more rollouts of each leave room for fewer of them."""
        return self.rollouts * (self.variance + self.between)


@dataclass(frozen=True)
class Drawn:
    """How groups are drawn: `k_init` rollouts of every prompt, growing to `k_max` where the look-ahead wants more at
    `cost` a rollout, in units of the largest variance of a reward. What has grown weighs more, as in an update."""

    estimator: str
    prior: str
    k_init: int = 4
    k_max: int = 4
    repeats: int = 2000
    seed: int = 0
    cost: float = COST

    def __post_init__(self) -> None:
        """Raise InputError for names and numbers that cannot be studied."""
        for what, name, known in (("estimator", self.estimator, ESTIMATORS), ("prior", self.prior, PRIORS)):
            if name not in known:
                raise InputError(f"{what} is {name!r}; allowed: {', '.join(known)}")
        if not 1 <= self.k_init <= self.k_max:
            raise InputError(f"k_init is {self.k_init} and k_max {self.k_max}; allowed: 1 <= k_init <= k_max")
        if not 0 <= self.cost <= 1:
            raise InputError(f"cost is {self.cost}; allowed: 0 to 1")
        if self.repeats < 2 * BLOCKS:
            raise InputError(f"repeats is {self.repeats}; allowed: {2 * BLOCKS} or more")


def make_pool(
    policy: Policy, task: Task, engine: Engine, prompts: Sequence[str], size: int, on_prompt: Callable[[int], None]
) -> Pool:
    """Sample the pool and compute the scores of its answers.

    Args:
        policy: whose gradient it is.
        task: verifies, and limits the length of an answer.
        engine: samples from the policy at temperature 1.
        prompts: P prompts.
        size: rollouts of each.
        on_prompt: called after each with the prompts done.
    """
    rewards, answers, lengths, grams, gradients = [], [], [], [], []
    for number, prompt in enumerate(prompts):
        rollouts: list[Rollout] = []
        for start in range(0, size, CHUNK):
            count = min(CHUNK, size - start)
            limits = dict(seed=1_000_003 * number + start, temperature=1.0, max_new_tokens=task.max_answer_length)
            rollouts += engine.generate([prompt], [count], **limits)[0]  # type: ignore[arg-type]
        distinct = {rollout.token_ids: rollout for rollout in rollouts}
        index = {ids: position for position, ids in enumerate(distinct)}
        low, high = task.reward_range
        verified = [task.verify(prompt, r.text) if r.finished else low for r in distinct.values()]
        unit = (torch.tensor(verified, dtype=torch.float64) - low) / (high - low)
        answer = torch.tensor([index[rollout.token_ids] for rollout in rollouts])
        lengths.append(torch.tensor([len(rollout.token_ids) for rollout in rollouts]))
        rewards.append((2 * unit - 1)[answer])
        answers.append(answer)
        score = scores(policy, list(distinct.values()), task.max_answer_length)
        grams.append(centred_gram(score, answer))
        share = torch.bincount(answer, weights=rewards[-1] - rewards[-1].mean(), minlength=len(score)) / size
        gradients.append(share.float() @ score)
        on_prompt(number + 1)
    most = max(len(gram) for gram in grams)
    padded = [torch.nn.functional.pad(gram, (0, most - len(gram), 0, most - len(gram))) for gram in grams]
    common = in_common(torch.stack(gradients))
    return Pool(torch.stack(rewards), torch.stack(answers), torch.stack(padded), common, torch.stack(lengths))


def in_common(gradients: Tensor) -> Tensor:
    """Return the squared length of all prompts' mean gradient over the mean squared length, from some, `[P, D]`,
    without bias: the mean inner product of two different ones; 0 where there is one prompt."""
    squares = gradients.double().square().sum()
    others = gradients.double().sum(0).square().sum() - squares
    return others / (max(1, len(gradients) - 1) * squares)


def scores(policy: Policy, rollouts: Sequence[Rollout], max_length: int) -> Tensor:
    """Return the gradient of each answer's log-probability by all weights, `[U, D]` float32."""
    weights = [weight for weight in policy.model.parameters() if weight.requires_grad]
    rows = []
    for rollout in rollouts:
        tokens = pack([rollout], "token-mean", max_length=max_length)
        logits = policy.response_logits(tokens.prompts, tokens.tokens, tokens.sequence_offsets)
        total = token_logprob(logits, tokens.tokens).logprob.sum()
        rows.append(torch.cat([gradient.flatten() for gradient in torch.autograd.grad(total, weights)]))
    return torch.stack(rows)


def centred_gram(score: Tensor, answer: Tensor) -> Tensor:
    """Return the inner products `[U, U]` float64 of scores `[U, D]` less their mean over the pool of answers `[M]`."""
    share = torch.bincount(answer, minlength=len(score)).double() / len(answer)
    gram = torch.zeros(len(score), len(score), dtype=torch.float64)
    for part in score.split(8192, dim=1):
        wide = part.double()
        wide = wide - share @ wide
        gram += wide @ wide.T
    return gram


def draw_groups(pool: Pool, prior: Tensor, drawn: Drawn, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return rollouts `[P, k_max]` of every prompt, as places in the pool, and how many of them count, `[P]`."""
    prompts, size = pool.rewards.shape
    places = torch.randint(size, (prompts, drawn.k_max), generator=rng)
    counts = torch.full((prompts,), drawn.k_init)
    fusion = ESTIMATORS[drawn.estimator].fusion or "v05"
    while drawn.k_max > drawn.k_init:
        rewards, offsets = ragged(pool.rewards.gather(1, places), counts)
        bounds = dict(k_init=drawn.k_init, k_max=drawn.k_max)
        test = shrinkage(rewards, offsets, prior, fusion=fusion, cost=drawn.cost, **bounds)  # type: ignore[arg-type]
        if not test.roll_out_more.any():
            break
        counts = torch.maximum(counts, test.planned)
    return places, counts


def ragged(values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first `counts` `[P]` of each row of values `[P, K]` end to end, and their offsets `[P + 1]`."""
    kept = torch.arange(values.shape[1]) < counts[:, None]
    return values[kept], offsets_of(counts)


def quality(pool: Pool, drawn: Drawn) -> GradientQuality:
    """Draw groups of all prompts, `repeats` times, and compare their gradients with the pool's."""
    prompts, size = pool.rewards.shape
    rng = torch.Generator().manual_seed(drawn.seed)
    truth, defined = pool.rewards.mean(1), ESTIMATORS[drawn.estimator]
    per_block = drawn.repeats // BLOCKS
    coefficients = torch.zeros(BLOCKS, prompts, pool.gram.shape[1], dtype=torch.float64)
    lengths, spent = torch.zeros(BLOCKS, dtype=torch.float64), 0
    for block in range(BLOCKS):
        for _ in range(per_block):
            prior = PRIORS[drawn.prior](truth, rng)
            places, counts = draw_groups(pool, prior, drawn, rng)
            rewards, offsets = ragged(pool.rewards.gather(1, places), counts)
            tokens, _ = ragged(pool.lengths.gather(1, places), counts)
            given = dict(
                prior=prior if defined.needs_prior else None, lengths=tokens if defined.needs_lengths else None
            )
            advantages = group_advantage(rewards, offsets, estimator=drawn.estimator, **given)  # type: ignore[arg-type]
            answer = pool.answer.gather(1, places)
            share = torch.zeros(places.shape, dtype=torch.float64)
            share[torch.arange(drawn.k_max) < counts[:, None]] = advantages
            share = share / counts.double().mean()  # an update weighs every rollout alike
            coefficients[block].scatter_add_(1, answer, share / per_block)
            inner = pool.gram[torch.arange(prompts)[:, None, None], answer[:, :, None], answer[:, None, :]]
            lengths[block] += torch.einsum("pi,pij,pj->", share, inner, share) / per_block
            spent += int(counts.sum())
    exact = torch.zeros(prompts, pool.gram.shape[1], dtype=torch.float64)
    exact.scatter_add_(1, pool.answer, (pool.rewards - truth[:, None]) / size)
    return _summary(pool, coefficients, lengths, exact, drawn, spent / (BLOCKS * per_block * prompts))


def _summary(
    pool: Pool, coefficients: Tensor, lengths: Tensor, exact: Tensor, drawn: Drawn, rollouts: float
) -> GradientQuality:
    """Return bias and variance from the mean gradients and squared lengths of blocks, with jackknife intervals."""

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("...pi,pij,...pj->...", a, pool.gram, b)

    size = inner(exact, exact)
    products = torch.einsum("api,pij,bpj->ab", coefficients, pool.gram, coefficients)
    along = inner(coefficients, exact)

    def of(kept: Tensor) -> Tensor:
        """Return factor, bias, variance from some blocks; a product of two different ones has no noise in its mean."""
        own = products[kept][:, kept]
        several = len(own)
        squared = (own.sum() - own.trace()) / (several * (several - 1))
        factor = along[kept].mean() / squared
        bias = (factor**2 * squared - 2 * factor * along[kept].mean() + size) / size
        return torch.stack([factor, bias, factor**2 * (lengths[kept].mean() - squared) / size])

    everything = torch.arange(BLOCKS)
    whole = of(everything)
    left_out = torch.stack([of(everything[everything != block]) for block in range(BLOCKS)])
    spread = ((BLOCKS - 1) / BLOCKS * (left_out - left_out.mean(0)).square().sum(0)).sqrt()
    factor, bias, variance = whole.tolist()
    _, bias_spread, variance_spread = (1.96 * spread).tolist()
    where = (drawn.estimator, drawn.prior, drawn.k_init, drawn.k_max)
    numbers = (rollouts, factor, bias, bias_spread, variance, variance_spread, 1 - float(pool.common))
    return GradientQuality(*where, *numbers, drawn.cost)


def drawn_as(text: str, prior: str, repeats: int, seed: int = 0, cost: float = COST) -> Drawn:
    """Return how groups are drawn that `estimator[:k[-k_max]]` describes: 4 rollouts each, k, or growing to k_max.

    Raises:
        InputError: a name or a number that is not allowed.
    """
    estimator, _, size = text.partition(":")
    first, _, last = (size or "4").partition("-")
    if not first.isdecimal() or not (last or first).isdecimal():
        raise InputError(f"estimator is {text!r}; allowed: name, name:k or name:k-k_max, such as v05:4-16")
    return Drawn(estimator, prior, int(first), int(last or first), repeats, seed, cost)
