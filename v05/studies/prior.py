"""How good a prior is on prompts that nothing was trained on: folds over prompts, several models side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from v05.errors import InputError
from v05.scored import Scored, by_policy, to_record
from v05.studies.rivals import context_mean, ridge_per_policy, ridge_pooled
from v05.value.measure import auc, correlation
from v05.value.model import V0, Record

EMBEDDED: Final = "embedded V0"
Predictor = Callable[[Sequence[Record], Sequence[Sequence[str]]], list[np.ndarray]]


@dataclass(frozen=True)
class Outcomes:
    """Every record once, as arrays.

    Attributes:
        policies: names.
        prompts: distinct prompts.
        policy, prompt: of each record, [N] int64.
        rate: its success rate, from 0 to 1, [N].
        fold: of each prompt, [P] int64.
    """

    policies: list[str]
    prompts: list[str]
    policy: np.ndarray
    prompt: np.ndarray
    rate: np.ndarray
    fold: np.ndarray


def outcomes_of(records: Sequence[Scored], reward_range: tuple[float, float], folds: int, seed: int) -> Outcomes:
    """Return the records as arrays; the fold of a prompt holds for every policy and step, and depends on its text.

    Args:
        records: of one or several policies.
        reward_range: of the scores.
        folds: how many, 2 or more.
        seed: of the assignment.

    Raises:
        InputError: `folds` is too small, or larger than the number of prompts.
    """
    low, high = reward_range
    prompts = sorted({record.prompt for record in records})
    if not 2 <= folds <= len(prompts):
        raise InputError(f"--folds is {folds}; allowed: 2 to {len(prompts)}, the number of prompts")
    by_hash = sorted(prompts, key=lambda text: hashlib.sha256(f"{seed}/{text}".encode("utf-8", "replace")).digest())
    place = {text: number % folds for number, text in enumerate(by_hash)}
    row = {text: number for number, text in enumerate(prompts)}
    policies = list(by_policy(records))
    rates = [to_record(rows) for rows in by_policy(records).values()]
    return Outcomes(
        policies,
        prompts,
        np.concatenate([np.full(len(rate.prompts), number) for number, rate in enumerate(rates)]),
        np.array([row[text] for rate in rates for text in rate.prompts]),
        np.concatenate([(rate.outcomes.numpy() - low) / (high - low) for rate in rates]),
        np.array([place[text] for text in prompts]),
    )


def cross_predict(
    data: Outcomes,
    predictors: Mapping[str, Predictor],
    on_fold: Callable[[int, str], None] = lambda done, name: None,
) -> dict[str, np.ndarray]:
    """Return every model's predictions, each record predicted where its prompt was in no fold that anything saw.

    Args:
        data: the records.
        predictors: by name, from each policy's training records and the prompts to predict to probabilities.
        on_fold: told how many pairs of fold and model are done, and which comes next.

    Returns:
        Probabilities [N] by name.
    """
    found = {name: np.full(len(data.rate), np.nan) for name in predictors}
    done = 0
    for fold in range(int(data.fold.max()) + 1):
        test = data.fold[data.prompt] == fold
        rows = [np.flatnonzero(test & (data.policy == policy)) for policy in range(len(data.policies))]
        wanted = [[data.prompts[number] for number in data.prompt[part]] for part in rows]
        seen = [training_record(data, policy, ~test) for policy in range(len(data.policies))]
        for name, predictor in predictors.items():
            on_fold(done, name)
            for part, prediction in zip(rows, predictor(seen, wanted), strict=True):
                found[name][part] = prediction
            done += 1
    return found


def training_record(data: Outcomes, policy: int, allowed: np.ndarray) -> Record:
    """Return one policy's records among the allowed ones."""
    rows = np.flatnonzero(allowed & (data.policy == policy))
    return Record([data.prompts[number] for number in data.prompt[rows]], torch.from_numpy(data.rate[rows]))


def predictors_of(model: V0, embed: Callable[[Sequence[str]], np.ndarray], alone: bool = True) -> dict[str, Predictor]:
    """Return the models of the study by name.

    Args:
        model: the V0 that is judged.
        embed: sentence vectors of prompts, for the rivals.
        alone: judge V0 also with one policy's records and nothing of the others.
    """

    def together(seen: Sequence[Record], wanted: Sequence[Sequence[str]]) -> list[np.ndarray]:
        return [part.numpy() for part in model.predict_policies(seen, wanted, reward_range=(0.0, 1.0))]

    def one_by_one(seen: Sequence[Record], wanted: Sequence[Sequence[str]]) -> list[np.ndarray]:
        pairs = zip(seen, wanted, strict=True)
        return [model.predict(own.prompts, own.outcomes, part, reward_range=(0.0, 1.0)).numpy() for own, part in pairs]

    rivals: dict[str, Predictor] = {
        "context mean": context_mean,
        "ridge, embedder": lambda seen, wanted: ridge_per_policy(seen, wanted, embed, words=False),
        "ridge, embedder + TF-IDF": lambda seen, wanted: ridge_per_policy(seen, wanted, embed, words=True),
        "the same, pooled": lambda seen, wanted: ridge_pooled(seen, wanted, embed),
    }
    own = {f"{EMBEDDED}, one policy": one_by_one} if alone else {}
    return {**rivals, **own, EMBEDDED: together}


class Scores:
    """AUC and squared error of each model and policy, with bootstrap intervals over prompts."""

    def __init__(self, data: Outcomes, predictions: Mapping[str, np.ndarray], span: float) -> None:
        """Take predictions [N] by name; `span` is largest minus smallest reward."""
        self.data, self.span = data, span
        self.predictions = dict(predictions)

    def of(self, name: str, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return AUC and squared error on the reward scale of each policy, [Q] both.

        Args:
            name: of the model.
            weights: how often each prompt was drawn, [P]; None for once.

        Both are nan for a policy without a record, AUC also for one whose outcomes are all of one kind.
        """
        prediction, data = self.predictions[name], self.data
        aucs, errors = [], []
        for policy in range(len(data.policies)):
            rows = np.flatnonzero(data.policy == policy)
            if weights is not None:
                rows = np.repeat(rows, weights[data.prompt[rows]])
            # Models that know a policy's mean only rank by fold: that is no ranking, so they get AUC 0.5.
            value = 0.5 if name == "context mean" else auc(prediction[rows], data.rate[rows] >= 0.5)
            aucs.append(value)
            squares = (prediction[rows] - data.rate[rows]) ** 2
            errors.append(squares.mean() * self.span**2 if len(rows) else np.nan)
        return np.array(aucs), np.array(errors)

    def bootstrap(self, resamples: int, seed: int = 0) -> dict[str, np.ndarray]:
        """Return AUC and error averaged over policies for each resample of the prompts, [resamples, 2] by name.

        A policy of which a resample has no record, or none of one kind, is left out of its means; nan where all are.
        All models see the same resamples, so that differences between them are paired.
        """
        generator, count = np.random.default_rng(seed), len(self.data.prompts)
        values: dict[str, list[list[float]]] = {name: [] for name in self.predictions}
        for _ in range(resamples):
            weights = np.bincount(generator.integers(count, size=count), minlength=count)
            for name in self.predictions:
                aucs, errors = self.of(name, weights)
                values[name].append([mean_of_known(aucs), mean_of_known(errors)])
        return {name: np.array(rows) for name, rows in values.items()}

    def residual_correlations(self, name: str) -> tuple[float, float]:
        """Return how residuals go with the policy's context mean and with the prompt's difficulty.

        A residual is outcome minus prediction. A prompt's difficulty is measured under *other* policies, as the mean
        failure rate beyond theirs, on the prompts that have such records; its own outcome is never part of it.
        """
        data = self.data
        residual = data.rate - self.predictions[name]
        size = len(data.policies)
        sums, records = np.bincount(data.policy, data.rate, size), np.bincount(data.policy, minlength=size)
        means = sums / np.maximum(1, records)  # a policy may have none, as in a part of the data
        beyond = means[data.policy] - data.rate
        total = np.bincount(data.prompt, beyond, minlength=len(data.prompts))
        count = np.bincount(data.prompt, minlength=len(data.prompts))
        others = count[data.prompt] > 1
        difficulty = (total[data.prompt] - beyond)[others] / (count[data.prompt] - 1)[others]
        return correlation(residual, means[data.policy]), correlation(residual[others], difficulty)


def mean_of_known(values: np.ndarray) -> float:
    """Return the mean of what is not nan; nan where nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
