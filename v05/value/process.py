"""A Gaussian process over prompts and policies; its hyper-parameters are chosen by predicting what was left out.

The score of prompt x under policy q, centred and scaled by that policy's own mean and spread, is

    z = T(q, q') (sum_k w_k K_k(x, x') + w_same [x = x']) + w_policy [q = q'] + noise,    T = rho + (1 - rho) [q = q'],

as covariances. `rho` is how much of a prompt's difficulty policies share, so that other policies' records help as far
as they have been seen to agree, and a prompt's own past does too. Any new policy is one more q: no weight is trained
for it. Hyper-parameters are the maximum of the leave-one-out predictive density (Rasmussen and Williams 2006, section
5.4.2), with a broad normal prior around `START`.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from v05.value.features import MEASURES, Described

KERNELS: Final = (
    "wording near",
    "sentence",
    "sentence near",
    "letters",
    "structure",
    "structure near",
    "measures near",
)
WORDING_NEAR: Final = 0.3  # squared length scales of unit vectors
SENTENCE_NEAR: Final = 0.2
# Logarithms of the kernels' variances, the logit of rho (shared), then those of same prompt, noise and policy.
START: Final = (*(-2.5,) * len(KERNELS), 2.0, -1.0, -0.7, -4.0)
SPREAD: Final = 2.0  # standard deviation of the prior of each hyper-parameter
FARTHEST: Final = 3.0  # of those from `START`: beyond, noise drowns in rounding and the covariance has no inverse
SUBSET: Final = 800  # rows that hyper-parameters are chosen on; all rows are conditioned on
JITTER: Final = 1e-6


class Rows(NamedTuple):
    """Outcomes: which prompt under which policy scored what.

    Attributes:
        described: the distinct prompts, P rows a block.
        prompt: row of `described`, [N] int64.
        policy: number of the policy, [N] int64.
    """

    described: Described
    prompt: Tensor
    policy: Tensor


class Scaling(NamedTuple):
    """Centre and width of the structure block, each [S] float32."""

    centre: Tensor
    width: Tensor

    @classmethod
    def of(cls, described: Described) -> Scaling:
        """Return the scaling that gives these prompts mean 0 and standard deviation 1; constant columns stay 0."""
        centre = described.structure.mean(0)
        width = described.structure.std(0, unbiased=False)
        return cls(centre, torch.where(width > 1e-6, width, torch.inf))


def kernels(a: Described, b: Described, scaling: Scaling) -> Tensor:
    """Return the covariance of each kernel of `KERNELS` between prompts, [K, A, B] float64."""
    first, second = (((x.structure - scaling.centre) / scaling.width).clamp(-4, 4).double() for x in (a, b))
    columns, measures = first.shape[1], MEASURES
    cosine = a.sentence.double() @ b.sentence.double().T
    wording = a.wording.double() @ b.wording.double().T
    return torch.stack(
        [
            torch.exp(-(2 - 2 * wording).clamp(min=0) / (2 * WORDING_NEAR)),
            cosine,
            torch.exp(-(2 - 2 * cosine).clamp(min=0) / (2 * SENTENCE_NEAR)),
            (a.letters @ b.letters.T).double(),
            first @ second.T / columns,
            torch.exp(-squared_distance(first, second) / (2 * columns)),
            torch.exp(-squared_distance(first[:, :measures], second[:, :measures]) / (2 * measures)),
        ]
    )


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return squared distances between rows, [A, B]."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def mixture(parameters: Tensor, stack: Tensor) -> Tensor:
    """Return the weighted sum of kernels [K, A, B], [A, B]."""
    return torch.einsum("k,kab->ab", parameters[: len(KERNELS)].exp(), stack)


def covariance(parameters: Tensor, alike: Tensor, same_prompt: Tensor, same_policy: Tensor) -> Tensor:
    """Return the covariance without noise, [N, M], from the kernels' mixture and two masks of 0 and 1, [N, M] each."""
    shared, same, _, policy = parameters[len(KERNELS) :]
    rho = torch.sigmoid(shared)
    between = rho + (1 - rho) * same_policy
    return between * (alike + same.exp() * same_prompt) + policy.exp() * same_policy


def masks(a: Rows, b: Rows) -> tuple[Tensor, Tensor]:
    """Return which rows have the same prompt and which the same policy, [A, B] float64 each; prompts are compared by
    their number, so both must number the same prompts."""
    return (a.prompt[:, None] == b.prompt).double(), (a.policy[:, None] == b.policy).double()


def left_out(inverse: Tensor, targets: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each row predicted from all rows of other prompts.

    Args:
        inverse: of the covariance with noise, [N, N].
        targets: [N].
        block: number of each row's prompt, [N]; rows of one prompt are left out together.

    Returns:
        Two tensors [N].
    """
    solved = inverse @ targets
    mean, variance = torch.empty_like(targets), torch.empty_like(targets)
    order = torch.argsort(block, stable=True)
    _, counts = torch.unique_consecutive(block[order], return_counts=True)
    starts = counts.cumsum(0) - counts
    for size in counts.unique().tolist():
        index = order[starts[counts == size][:, None] + torch.arange(size)]  # [blocks, size]
        inner = torch.linalg.inv(inverse[index[:, :, None], index[:, None, :]])
        shift = (inner @ solved[index][..., None]).squeeze(-1)
        mean = mean.index_put((index,), targets[index] - shift)
        variance = variance.index_put((index,), torch.diagonal(inner, dim1=1, dim2=2))
    return mean, variance


def choose(rows: Rows, targets: Tensor, scaling: Scaling, start: Tensor, steps: int, seed: int = 0) -> Tensor:
    """Return the hyper-parameters that best predict rows left out, found from `start` in `steps` steps of L-BFGS.

    Above `SUBSET` rows, a random part of the prompts stands for all.
    """
    prompts = torch.unique(rows.prompt)
    if len(targets) > SUBSET:
        generator = torch.Generator().manual_seed(seed)
        kept = torch.randperm(len(prompts), generator=generator)[: round(len(prompts) * SUBSET / len(targets))]
        some = torch.isin(rows.prompt, prompts[kept])
        rows, targets = Rows(rows.described, rows.prompt[some], rows.policy[some]), targets[some]
    seen = rows.described.rows(rows.prompt)
    stack, (same_prompt, same_policy) = kernels(seen, seen, scaling), masks(rows, rows)
    identity = torch.eye(len(targets), dtype=torch.float64)
    first = torch.tensor(START, dtype=torch.float64)
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-2, tolerance_change=1e-3
    )

    def bounded() -> Tensor:
        return parameters.clamp(first - FARTHEST * SPREAD, first + FARTHEST * SPREAD)

    def loss() -> Tensor:
        optimizer.zero_grad()
        kept = bounded()
        full = covariance(kept, mixture(kept, stack), same_prompt, same_policy)
        full = full + (kept[-2].exp() + JITTER) * identity
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(full))
        mean, variance = left_out(inverse, targets, rows.prompt)
        value = 0.5 * (variance.log() + (targets - mean).square() / variance).sum()
        value = value + 0.5 * ((parameters - first) / SPREAD).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return bounded().detach()
