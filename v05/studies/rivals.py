"""The models that a prior has to beat: the context's mean, and ridge regression on text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from v05.errors import InputError
from v05.value.model import Record

STRENGTHS = np.logspace(-1, 2, 10)  # ridge penalties, chosen by leave-one-out on the training prompts


def context_mean(seen: Sequence[Record], wanted: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """Predict each policy's mean."""
    return [np.full(len(part), float(own.outcomes.mean())) for own, part in zip(seen, wanted, strict=True)]


def ridge_per_policy(
    seen: Sequence[Record],
    wanted: Sequence[Sequence[str]],
    embed: Callable[[Sequence[str]], np.ndarray],
    words: bool,
) -> list[np.ndarray]:
    """Predict each policy by a ridge regression of its own, on sentence vectors and, with `words`, TF-IDF."""
    training = [prompt for own in seen for prompt in own.prompts]
    describe = describer(training, embed, words)
    found = []
    for own, part in zip(seen, wanted, strict=True):
        model = ridge().fit(describe(own.prompts), own.outcomes.numpy())
        found.append(np.clip(model.predict(describe(part)), 0, 1) if len(part) else np.zeros(0))
    return found


def ridge_pooled(
    seen: Sequence[Record], wanted: Sequence[Sequence[str]], embed: Callable[[Sequence[str]], np.ndarray]
) -> list[np.ndarray]:
    """Predict all policies by one ridge regression on scores minus their policy's mean."""
    training = [prompt for own in seen for prompt in own.prompts]
    describe = describer(training, embed, words=True)
    means = [float(own.outcomes.mean()) for own in seen]
    centred = np.concatenate([own.outcomes.numpy() - mean for own, mean in zip(seen, means, strict=True)])
    model = ridge().fit(describe(training), centred)
    pairs = zip(means, wanted, strict=True)
    return [np.clip(mean + model.predict(describe(part)), 0, 1) if len(part) else np.zeros(0) for mean, part in pairs]


def describer(
    training: Sequence[str], embed: Callable[[Sequence[str]], np.ndarray], words: bool
) -> Callable[[Sequence[str]], np.ndarray]:
    """Return prompts-to-features; the vocabulary of TF-IDF is that of the training prompts alone.

    Where they have no word of two letters or more in common, there is none, and sentence vectors are all.
    """
    if not words:
        return embed
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise InputError("the rivals need the package scikit-learn; install it: pip install v05[v0]") from None
    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    try:
        vectors.fit(sorted(set(training)))
    except ValueError:  # an empty vocabulary, the one thing that it refuses of texts
        return embed
    return lambda prompts: np.hstack([embed(prompts), vectors.transform(prompts).toarray()])


def ridge() -> Any:
    """Return a ridge regression that chooses its penalty by leave-one-out."""
    from sklearn.linear_model import RidgeCV

    return RidgeCV(alphas=STRENGTHS)
