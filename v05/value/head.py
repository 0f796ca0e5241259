"""Heads: from features and outcomes of a policy's context to the probability of success on other prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from v05.errors import InputError
from v05.value import process
from v05.value.features import Described
from v05.value.process import Rows, Scaling

LOWEST = 0.01  # no prompt is called impossible or sure
SEARCH_STEPS = 30
LARGEST = 8192  # outcomes in a Gaussian process, whose memory grows with their square: 10 GiB for so many
Features = TypeVar("Features")
Given = TypeVar("Given", contravariant=True)
SLOPE_STRENGTH = 50.0  # outcomes that a slope of 1 counts for in the calibration
SPREAD_STRENGTH = 10.0  # outcomes that a middling spread counts for in a policy's own
TYPICAL_SPREAD = 0.35  # standard deviation of success probabilities over prompts, where nothing is known


class Head(Protocol[Given]):
    """Learns from one policy's context, once per policy version, and predicts any number of prompts from it."""

    def fit(self, features: Given, outcomes: Tensor) -> None:
        """Take the context: features of N prompts and their success rates [N], from 0 to 1."""
        ...

    def predict(self, features: Given) -> Tensor:
        """Return the probability of success for each prompt, [M] float32."""
        ...


class Context(NamedTuple, Generic[Features]):
    """What one policy did: features of N prompts, and success rates [N] from 0 to 1."""

    features: Features
    outcomes: Tensor


class GaussianProcessHead:
    """The embedded head: no weights, hyper-parameters by leave-one-out, several policies informing each other."""

    def __init__(
        self, background: Sequence[Context[Described]] = (), start: Tensor | None = None, steps: int = SEARCH_STEPS
    ) -> None:
        """Start without a context.

        Args:
            background: contexts of other policies; they help as far as they are seen to agree.
            start: hyper-parameters to start the search from; None for `process.START`.
            steps: of that search; 0 keeps `start`.
        """
        self.background, self.steps = list(background), steps
        self.parameters = torch.tensor(process.START, dtype=torch.float64) if start is None else start.clone()

    def fit(self, features: Described, outcomes: Tensor) -> None:
        """Take the context of one policy."""
        self.fit_policies([Context(features, outcomes)])

    def predict(self, features: Described) -> Tensor:
        """Return the probability of success for each prompt under the policy of `fit`, [M] float32."""
        return self.predict_policy(0, features)

    def fit_policies(self, contexts: Sequence[Context[Described]]) -> None:
        """Take the contexts of several policies, choose hyper-parameters on all of them, and calibrate each.

        Args:
            contexts: Q contexts; an empty one is allowed, its policy is then taken to be an average one.

        Raises:
            InputError: more than `LARGEST` outcomes.
            ValueError: an outcome is not from 0 to 1, or their number is not that of the prompts.
        """
        together = [*contexts, *self.background]
        if (outcomes := sum(len(context.outcomes) for context in together)) > LARGEST:
            raise InputError(f"the contexts have {outcomes:,} outcomes; allowed: {LARGEST:,}, such as the newest")
        for number, context in enumerate(together):
            check_outcomes(context.outcomes, len(context.features.sentence), f"outcomes of context {number}")
        self.rows = number_prompts(together)
        self.counts = [len(context.outcomes) for context in together]
        values = torch.cat([context.outcomes.double().cpu() for context in together])
        self.centre, self.spread = moments(values, self.rows.policy, len(together))
        targets = (values - self.centre[self.rows.policy]) / self.spread[self.rows.policy]
        self.slope = torch.ones(len(together), dtype=torch.float64)
        if not len(values):
            return
        self.scaling = Scaling.of(self.rows.described)
        if self.steps:
            self.parameters = process.choose(self.rows, targets, self.scaling, self.parameters, self.steps)
        inverse = torch.linalg.inv(self._covariance(self.rows, noise=True))
        self.solved = inverse @ targets
        guess, _ = process.left_out(inverse, targets, self.rows.prompt)
        for policy in range(len(together)):
            own = self.rows.policy == policy
            self.slope[policy] = calibration_slope(guess[own], targets[own])

    def predict_policy(self, policy: int, features: Described) -> Tensor:
        """Return the probability of success under policy `policy`, in the order of `fit_policies`, [M] float32."""
        centre, spread = self.centre[policy], self.spread[policy]
        if not sum(self.counts) or not len(features.sentence):
            return centre.float().expand(len(features.sentence)).clone()
        known = match(features, self.rows.described)
        query = Rows(features, known, torch.full((len(known),), policy))
        deviation = self._covariance(query) @ self.solved
        return (centre + spread * self.slope[policy] * deviation).clamp(LOWEST, 1 - LOWEST).float()

    def _covariance(self, rows: Rows, noise: bool = False) -> Tensor:
        """Return the covariance [N, R] of `rows` with the rows of the fit."""
        fitted = self.rows
        stack = process.kernels(rows.described, fitted.described, self.scaling)
        of_prompts = process.mixture(self.parameters, stack)[:, fitted.prompt]
        alike = of_prompts[rows.prompt] if rows is fitted else of_prompts
        full = process.covariance(self.parameters, alike, *process.masks(rows, fitted))
        if noise:
            full = full + (self.parameters[-2].exp() + process.JITTER) * torch.eye(len(full), dtype=torch.float64)
        return full


def number_prompts(contexts: Sequence[Context[Described]]) -> Rows:
    """Return the rows of several policies, equal prompts sharing one number."""
    blocks = [torch.cat(parts) for parts in zip(*(context.features for context in contexts), strict=True)]
    everything = Described(*blocks)
    first_seen: dict[int, int] = {}
    prompt = [first_seen.setdefault(key, len(first_seen)) for key in everything.identity.tolist()]
    numbers = torch.tensor(prompt, dtype=torch.int64)
    firsts = torch.zeros(len(first_seen), dtype=torch.int64)
    firsts[numbers.flip(0)] = torch.arange(len(prompt)).flip(0)
    counts = torch.tensor([len(context.outcomes) for context in contexts])
    return Rows(everything.rows(firsts), numbers, torch.repeat_interleave(torch.arange(len(contexts)), counts))


def match(features: Described, known: Described) -> Tensor:
    """Return the row of `known` that describes the same prompt, -1 where there is none, [M] int64."""
    rows = {key: row for row, key in enumerate(known.identity.tolist())}
    return torch.tensor([rows.get(key, -1) for key in features.identity.tolist()], dtype=torch.int64)


def moments(values: Tensor, policy: Tensor, policies: int) -> tuple[Tensor, Tensor]:
    """Return each policy's mean and standard deviation, drawn towards all policies' where a context is short."""
    known = len(values) > 0
    overall = values.mean() if known else torch.tensor(0.5, dtype=torch.float64)
    counts = torch.bincount(policy, minlength=policies).double()
    sums = torch.zeros(policies, dtype=torch.float64).index_add_(0, policy, values)
    centre = torch.where(counts > 0, (sums + overall) / (counts + 1), overall)
    squares = torch.zeros_like(sums).index_add_(0, policy, (values - centre[policy]).square())
    spread = ((squares + SPREAD_STRENGTH * TYPICAL_SPREAD**2) / (counts + SPREAD_STRENGTH)).sqrt()
    return centre, spread


def calibration_slope(guess: Tensor, target: Tensor) -> Tensor:
    """Return the slope of outcomes on their left-out predictions, drawn towards 1 and kept inside [0, 1.5]."""
    prior = SLOPE_STRENGTH * (guess.square().mean() if len(guess) else torch.tensor(1.0))
    slope = ((guess * target).sum() + prior) / (guess.square().sum() + prior).clamp(min=1e-12)
    return slope.clamp(0.0, 1.5)


def check_outcomes(outcomes: Tensor, prompts: int, name: str) -> None:
    """Raise ValueError unless there is one outcome from 0 to 1 for each prompt."""
    if outcomes.shape != (prompts,):
        raise ValueError(f"{name} have shape {list(outcomes.shape)}; allowed: one for each of {prompts} prompts")
    wrong = torch.nonzero(~((outcomes >= 0) & (outcomes <= 1)))
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(f"{name}: entry {at} is {float(outcomes[at]):g}; allowed: 0 to 1")
