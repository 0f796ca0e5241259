"""How good predictions of success are: ranking, squared error, reliability."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

BINS: Final = 10


class Reliability(NamedTuple):
    """Predictions in bins of equal number.

    Attributes:
        predicted: mean prediction of each bin, [K].
        observed: mean outcome, [K].
        error: standard error of `observed`, [K].
        size: predictions, [K] int64.
    """

    predicted: np.ndarray
    observed: np.ndarray
    error: np.ndarray
    size: np.ndarray

    @property
    def gap(self) -> float:
        """Return the expected calibration error: the mean distance of predicted from observed."""
        return float((np.abs(self.predicted - self.observed) * self.size).sum() / max(1, self.size.sum()))


def auc(prediction: np.ndarray, success: np.ndarray) -> float:
    """Return the chance that a success is predicted above a failure, ties counting half; nan without one of both.

    Args:
        prediction: [N] floating.
        success: [N] bool.
    """
    positives = int(success.sum())
    negatives = len(success) - positives
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(prediction, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]
    return float((ranks[success].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def pair_accuracy(prediction: np.ndarray, score: np.ndarray) -> float:
    """Return the share of pairs with different scores that are predicted in their order, ties being wrong."""
    higher = score[:, None] > score
    return float((prediction[:, None] > prediction)[higher].mean()) if higher.any() else float("nan")


def grouped_auc(prediction: np.ndarray, success: np.ndarray, group: np.ndarray) -> float:
    """Return the mean AUC over groups, each weighed by its number of rows; groups of one class are left out."""
    names, counts = np.unique(group, return_counts=True)
    values = np.array([auc(prediction[group == name], success[group == name]) for name in names])
    known = ~np.isnan(values)
    return float(np.average(values[known], weights=counts[known])) if known.any() else float("nan")


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Pearson's correlation; nan where one of both does not vary."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def reliability(prediction: np.ndarray, outcome: np.ndarray, bins: int = BINS) -> Reliability:
    """Return predictions and outcomes, both from 0 to 1, in `bins` bins of equal number."""
    parts = np.array_split(np.argsort(prediction, kind="stable"), min(bins, max(1, len(prediction))))
    parts = [part for part in parts if len(part)]
    return Reliability(
        np.array([prediction[part].mean() for part in parts]),
        np.array([outcome[part].mean() for part in parts]),
        np.array([outcome[part].std(ddof=1) / np.sqrt(len(part)) if len(part) > 1 else np.nan for part in parts]),
        np.array([len(part) for part in parts], dtype=np.int64),
    )
