"""Random batches as verl holds them: padded, groups out of order, one of them verl's own padding."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from verl.workers.config import ActorConfig


class Batch(NamedTuple):
    """log_prob, old, mask, weights and advantages `[B, L]`; rewards on each row's last token `[B, L]`; uids `[B]`."""

    log_prob: Tensor
    old: Tensor
    mask: Tensor
    weights: Tensor
    advantages: Tensor
    token_rewards: Tensor
    uids: np.ndarray


def actor_config(**options):
    """The configuration of an actor, with `options` of `ActorConfig`."""
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, use_dynamic_bsz=True, **options)


def random_batch(seed: int, sizes=(4, 2, 5, 3), width: int = 9, values=(0.0, 1.0), drift: float = 0.5) -> Batch:
    """A batch in float64 with groups of these sizes, shuffled."""
    rng = torch.Generator().manual_seed(seed)
    rows = sum(sizes)
    order = torch.randperm(rows, generator=rng).numpy()
    uids = np.repeat([f"prompt-{group}" for group in range(len(sizes))], sizes).astype(object)[order]
    lengths = torch.randint(1, width + 1, (rows,), generator=rng)
    mask = torch.arange(width) < lengths[:, None]
    rewards = torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), (rows,), generator=rng)]
    token_rewards = torch.zeros(rows, width, dtype=torch.float64)
    token_rewards[torch.arange(rows), lengths - 1] = rewards
    log_prob = -torch.randn(rows, width, generator=rng, dtype=torch.float64).abs() - 0.05
    old = log_prob + drift * torch.randn(rows, width, generator=rng, dtype=torch.float64)
    weights = torch.rand(rows, width, generator=rng, dtype=torch.float64) * 1.5
    weights[torch.rand(rows, width, generator=rng) < 0.2] = 0
    advantages = torch.randn(rows, 1, generator=rng, dtype=torch.float64).expand(rows, width).clone()
    return Batch(log_prob, old, mask.double(), weights, advantages, token_rewards, uids)
