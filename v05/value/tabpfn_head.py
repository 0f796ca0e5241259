"""V0's own head: TabPFN, fitted to the context once and asked any number of times."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from v05.errors import InputError
from v05.value.head import LOWEST, check_outcomes

FILTER_BATCH = 4096  # prompts in one call


class TabPFNHead:
    """In-context classification of features [N, F]: a success rate of one half or more is a success.

    Whoever uses it chooses the weights: those of TabPFN 2.5 and later are for non-commercial use, version 2 has the
    Prior Labs licence.
    """

    def __init__(self, checkpoint: Path, estimators: int = 4, seed: int = 0, device: str = "cpu") -> None:
        """Name the weights.

        Args:
            checkpoint: TabPFN's own `.ckpt` or `.safetensors` file.
            estimators: views of the context that are averaged.
            seed: fixes those views.
            device: where it runs.

        Raises:
            InputError: the package or the file is missing.
        """
        self.check(checkpoint)
        self.checkpoint, self.estimators, self.seed, self.device = checkpoint, estimators, seed, device
        self.model: Any = None
        self.constant = torch.tensor(0.5)

    @staticmethod
    def check(checkpoint: Path) -> None:
        """Raise InputError where the package or the file is missing."""
        try:
            classifier()
        except ImportError:
            raise InputError("TabPFN's head needs the package tabpfn; install it: pip install v05[v0]") from None
        if not Path(checkpoint).is_file():
            raise InputError(f"head {checkpoint}: no such file; allowed: a TabPFN checkpoint")

    def fit(self, features: Tensor, outcomes: Tensor) -> None:
        """Take the context.

        Args:
            features: [N, F] floating.
            outcomes: success rates [N], from 0 to 1.

        Raises:
            ValueError: an outcome is outside, or their number is not that of the features.
        """
        check_outcomes(outcomes, len(features), "outcomes")
        solved = outcomes >= 0.5
        self.model = None
        if one_class(solved):
            self.constant = share(solved)
            return
        self.model = classifier()(
            n_estimators=self.estimators,
            model_path=str(self.checkpoint),
            device=self.device,
            random_state=self.seed,
            ignore_pretraining_limits=True,
            fit_mode="fit_with_cache",
            inference_precision=torch.float32,
        )
        self.model.fit(features.float().numpy(), solved.long().numpy())

    def predict(self, features: Tensor) -> Tensor:
        """Return the probability of success for each row, [M] float32."""
        if self.model is None or not len(features):
            return self.constant.float().expand(len(features)).clone()
        values = features.float().numpy()
        parts = [
            self.model.predict_proba(values[start : start + FILTER_BATCH])[:, 1]
            for start in range(0, len(values), FILTER_BATCH)
        ]
        return torch.from_numpy(np.concatenate(parts)).float().clamp(LOWEST, 1 - LOWEST)


def one_class(solved: Tensor) -> bool:
    """Return whether there is nothing to classify."""
    return len(solved) == 0 or bool(solved.all()) or not bool(solved.any())


def share(solved: Tensor) -> Tensor:
    """Return the share of successes, with half a success and half a failure added."""
    return (solved.sum() + 0.5) / (len(solved) + 1.0)


def classifier() -> Any:
    """Return the class TabPFNClassifier; what it would report about its use stays here."""
    os.environ.setdefault("TABPFN_DISABLE_TELEMETRY", "1")
    from tabpfn import TabPFNClassifier

    return TabPFNClassifier


def differentiable_head(checkpoint: Path, device: str = "cpu") -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return TabPFN as a function of features, differentiable in them, for training an adapter through it.

    Args:
        checkpoint: as for the class.
        device: where it runs.

    Returns:
        From features [N, F] and success rates [N] of a context, and features [M, F], to log-odds [M]; where the context
        has one class, to those of the share of successes, with a gradient of 0.

    Raises:
        InputError: the package or the file is missing.
    """
    TabPFNHead.check(checkpoint)

    def log_odds(context: Tensor, outcomes: Tensor, features: Tensor) -> Tensor:
        solved = outcomes >= 0.5
        if one_class(solved):
            return torch.logit(share(solved)) + 0 * features.sum(1)
        model = classifier()(
            n_estimators=1,
            model_path=str(checkpoint),
            device=device,
            random_state=0,
            ignore_pretraining_limits=True,
            differentiable_input=True,
            inference_precision=torch.float32,
        )
        model.fit_with_differentiable_input(context.float(), solved.long())
        logits: Tensor = model.forward(features.float(), use_inference_mode=True, return_logits=True)
        return logits[:, 1] - logits[:, 0]

    return log_odds
