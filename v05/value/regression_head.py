"""An embedded head for the adapter's features: kernel regression without weights, differentiable in the features."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from v05.value.head import LOWEST, check_outcomes


class Setting(NamedTuple):
    """One choice of hyper-parameters.

    Attributes:
        linear: share of the linear kernel; the rest has the Gaussian one.
        noise: variance of an outcome beside a kernel of 1.
    """

    linear: float
    noise: float


SETTINGS: Final = tuple(
    Setting(linear, noise) for linear in (0.1, 0.5, 0.9) for noise in (0.5, 1.0, 2.0, 4.0, 8.0, 32.0)
)
TRAINED_WITH: Final = Setting(0.5, 2.0)


def standardised(context: Tensor, features: Tensor) -> Tensor:
    """Return features with the context's mean 0 and standard deviation 1, [M, F]; constant columns become 0."""
    centre, width = context.mean(0), context.std(0, unbiased=False)
    return torch.where(width > 1e-6, (features - centre) / width.clamp(min=1e-6), 0.0)


def kernel(a: Tensor, b: Tensor, linear: float) -> Tensor:
    """Return the covariance of standardised features, [A, B]."""
    product = a @ b.T / a.shape[1]
    squared = (a.square().mean(1)[:, None] + b.square().mean(1) - 2 * product).clamp(min=0)
    return linear * product + (1 - linear) * torch.exp(-squared / 2)


def solve(context: Tensor, outcomes: Tensor, features: Tensor, setting: Setting) -> Tensor:
    """Return the expected success rate of each row, [M], unclipped; differentiable in everything."""
    own, other = standardised(context, context), standardised(context, features)
    noise = setting.noise * torch.eye(len(own), dtype=own.dtype, device=own.device)
    mean = outcomes.mean()
    solved = torch.linalg.solve(kernel(own, own, setting.linear) + noise, outcomes - mean)
    return mean + kernel(other, own, setting.linear) @ solved


def log_odds(context: Tensor, outcomes: Tensor, features: Tensor) -> Tensor:
    """Return log-odds of success for each row, [M], for training an adapter through the head.

    They are the rate's linearised around the context's mean, so that a rate outside [0, 1] keeps its gradient.

    Args:
        context: features of the context, [N, F], N at least 2.
        outcomes: success rates [N], from 0 to 1.
        features: of what is predicted, [M, F].
    """
    mean = outcomes.mean().clamp(0.05, 0.95)
    return torch.logit(mean) + (solve(context, outcomes, features, TRAINED_WITH) - mean) / (mean * (1 - mean))


class RegressionHead:
    """Kernel regression of success on features [N, F]; hyper-parameters by leave-one-out on the context."""

    def fit(self, features: Tensor, outcomes: Tensor) -> None:
        """Take the context.

        Args:
            features: [N, F] floating.
            outcomes: success rates [N], from 0 to 1.
        """
        check_outcomes(outcomes, len(features), "outcomes")
        self.context, self.outcomes = features.double(), outcomes.double()
        self.setting = TRAINED_WITH
        if len(features) < 3:
            return
        own = standardised(self.context, self.context)
        centred, best = self.outcomes - self.outcomes.mean(), float("inf")
        for setting in SETTINGS:
            full = kernel(own, own, setting.linear) + setting.noise * torch.eye(len(own), dtype=own.dtype)
            inverse = torch.linalg.inv(full)
            error = float((inverse @ centred / inverse.diagonal()).square().mean())  # leave-one-out, closed form
            if error < best:
                self.setting, best = setting, error

    def predict(self, features: Tensor) -> Tensor:
        """Return the probability of success for each row, [M] float32."""
        if len(self.outcomes) < 2:
            middle = self.outcomes.mean() if len(self.outcomes) else torch.tensor(0.5)
            return middle.float().expand(len(features)).clone()
        rate = solve(self.context, self.outcomes, features.double(), self.setting)
        return rate.clamp(LOWEST, 1 - LOWEST).float()
