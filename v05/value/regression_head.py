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


LINEAR: Final = (0.1, 0.5, 0.9)
NOISE: Final = (0.5, 1.0, 2.0, 4.0, 8.0, 32.0)
TRAINED_WITH: Final = Setting(0.5, 2.0)


def standardised(context: Tensor, features: Tensor) -> Tensor:
    """Return features with the context's mean 0 and standard deviation 1, [M, F]; constant columns become 0."""
    centre, width = context.mean(0), context.std(0, unbiased=False)
    return torch.where(width > 1e-6, (features - centre) / width.clamp(min=1e-6), 0.0)


def products(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the linear and the Gaussian kernel of standardised features, [A, B] each."""
    linear = a @ b.T / a.shape[1]
    squared = (a.square().mean(1)[:, None] + b.square().mean(1) - 2 * linear).clamp(min=0)
    return linear, torch.exp(-squared / 2)


def kernel(a: Tensor, b: Tensor, linear: float) -> Tensor:
    """Return the covariance of standardised features, [A, B]."""
    first, second = products(a, b)
    return linear * first + (1 - linear) * second


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


def left_out(values: Tensor, vectors: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
    """Return what remains of each target when it is predicted from all others, under each noise, [K, N].

    In closed form (Rasmussen and Williams 2006, equation 5.12), from one eigendecomposition for all noises.

    Args:
        values: eigenvalues of the covariance, [N].
        vectors: its eigenvectors in columns, [N, N].
        targets: [N].
        noise: variances, [K].
    """
    inverse = 1 / (values + noise[:, None])
    return ((vectors.T @ targets) * inverse) @ vectors.T / (inverse @ vectors.square().T)


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
        if len(features) < 2:
            return
        self.own = standardised(self.context, self.context)
        self.mean = self.outcomes.mean()
        shares, noises = (LINEAR, NOISE) if len(features) > 2 else ((TRAINED_WITH.linear,), (TRAINED_WITH.noise,))
        targets, noise = self.outcomes - self.mean, torch.tensor(noises, dtype=torch.float64)
        linear, gaussian = products(self.own, self.own)
        best = float("inf")
        for share in shares:
            values, vectors = torch.linalg.eigh(share * linear + (1 - share) * gaussian)
            error, index = left_out(values, vectors, targets, noise).square().mean(1).min(0)
            if float(error) < best:
                best = float(error)
                self.setting = Setting(share, noises[int(index)])
                self.solved = vectors @ (vectors.T @ targets / (values + self.setting.noise))

    def predict(self, features: Tensor) -> Tensor:
        """Return the probability of success for each row, [M] float32."""
        if len(self.outcomes) < 2:
            middle = self.outcomes.mean() if len(self.outcomes) else torch.tensor(0.5)
            return middle.float().expand(len(features)).clone()
        other = standardised(self.context, features.double())
        rate = self.mean + kernel(other, self.own, self.setting.linear) @ self.solved
        return rate.clamp(LOWEST, 1 - LOWEST).float()
