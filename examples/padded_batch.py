"""You have padded `[B, L]` tensors and a mask: GSPO's loss, its gradient where you had log-probs."""

import torch
from torch import Tensor

from v05.kernels import group_advantage, policy_loss
from v05.packing import Layout, normalizer, token_weights


def padded_loss(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, rewards: Tensor, group_sizes: Tensor, prior: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a batch: logprobs, old and mask [B, L]; rewards [B] in [-1, 1], group after group; prior [G]."""
    offsets = torch.nn.functional.pad(group_sizes.cumsum(0), (1, 0))
    advantages = group_advantage(rewards, offsets, estimator="v05_loo", prior=prior)
    layout = Layout.of(mask)  # padding left or right; masked places may hold NaN
    divisor = normalizer("seq-mean-token-mean", layout.sequence_offsets, max_length=mask.shape[1])
    return policy_loss(
        layout.pack(logprobs),
        layout.pack(old_logprobs),
        advantages,
        token_weights("seq-mean-token-mean", layout.sequence_offsets, divisor=divisor),
        sequence_offsets=layout.sequence_offsets,
        level="sequence",
        clip_low=3e-4,
        clip_high=4e-4,
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    logprobs = -torch.rand(6, 5)
    logprobs.requires_grad_()
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 1, 2, 5])[:, None]
    rewards = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, -1.0])
    loss, metrics = padded_loss(
        logprobs, logprobs.detach(), mask, rewards, torch.tensor([2, 4]), torch.tensor([0.6, 0.0])
    )
    loss.backward()
    print(loss.item(), metrics["tokens"].item(), logprobs.grad.shape)
