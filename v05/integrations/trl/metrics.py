"""TRL's metrics of a step's loss, under its names, and what V0.5 adds to a batch's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from v05.integrations.trl.config import V05Config
from v05.integrations.trl.estimation import Rewards
from v05.integrations.trl.loss import CLIPPED, Scored, epsilon_high
from v05.kernels.shrinkage.op import Shrinkage


def step_tensors(args: V05Config, scored: Scored, entropies: Tensor, kl: Tensor | None) -> dict[str, Tensor]:
    """Return what TRL logs as means over the tokens of all processes, by its names.

    Returns:
        `[B, L]` a token, or `[B, 1]` a sequence where ratios belong to sequences; masked tokens hold anything.
    """
    found = {"entropy": entropies.detach()}
    if kl is not None:
        found["kl"] = kl
    elif scored.ref is not None:
        gap = (scored.ref - scored.logprobs).detach()
        found["kl"] = gap.exp() - gap - 1
    high = epsilon_high(args)
    ratio, advantages = scored.log_ratio(args.importance_sampling_level).detach().exp(), scored.advantages
    if args.loss_type in CLIPPED:
        low_clipped, high_clipped = (ratio < 1 - args.epsilon) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
        found["clip_ratio/low_mean"], found["clip_ratio/high_mean"] = low_clipped.float(), high_clipped.float()
        found["clip_ratio/region_mean"] = (low_clipped | high_clipped).float()
    elif args.loss_type == "cispo":
        found["cispo_clip_ratio"] = ((ratio > high) & (advantages > 0)).float()
    return found


def token_means(tensors: dict[str, Tensor], mask: Tensor, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Return the mean of each over unmasked tokens (over sequences where there is one value each), on all processes.

    Args:
        tensors: by name, `[B, L]` or `[B, 1]`.
        mask: `[B, L]` bool.
        reduce: sums a tensor over the processes.
    """
    sums = []
    for values in tensors.values():
        kept = torch.ones_like(mask[:, :1]) if values.shape[1] == 1 and mask.shape[1] != 1 else mask
        sums.append(torch.stack([torch.where(kept, values.float(), 0).sum(), kept.sum().float()]))
    totals = reduce(torch.stack(sums))
    means = (totals[:, 0] / totals[:, 1].clamp(min=1)).tolist()
    return dict(zip(tensors, means, strict=True))


def sequence_means(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each row's unmasked tokens, [B]; NaN for a row that is masked whole."""
    if values.shape[1] == 1:
        return values[:, 0]
    return torch.where(mask, values, 0).sum(1) / mask.sum(1)


def batch_metrics(
    rewards: Rewards, prior: Tensor, first: Tensor, first_test: Shrinkage, test: Shrinkage
) -> dict[str, float]:
    """Return what V0.5 adds to the log.

    Args:
        rewards: of N completions of G prompts.
        prior: expected rewards [G].
        first: rewards of the first rollouts; NaN where there is none.
        first_test: of the groups of the first rollouts.
        test: of the finished groups.

    Returns:
        By name: the share of prompts whose first rollouts contradict the prior; rollouts planned per prompt then;
        rollouts there are per prompt; those beyond the first; the mean reward of the first (each prompt counts the
        same, as with fixed groups); the mean weight of the rollouts in the baseline; the mean squared distance of
        prior and group mean; the mean estimated squared error of the baseline.
    """
    rollouts, groups, seen = len(rewards.values), rewards.groups, test.count > 0
    error = (test.mean - prior)[seen].square().mean() if bool(seen.any()) else torch.tensor(0.0)
    return {
        "v05/conflicts": float((first_test.deviation > 0).float().mean()),
        "v05/planned": float(first_test.planned.maximum(first_test.count).float().mean()),
        "v05/rollouts_per_prompt": rollouts / groups,
        "v05/extra_rollouts": float(rollouts - first.numel()),
        "v05/first_reward": float(first.nanmean()),
        "v05/weight": float(test.weight.mean()),
        "v05/prior_squared_error": float(error),
        "v05/baseline_mse": float(test.mse.mean()),
    }
