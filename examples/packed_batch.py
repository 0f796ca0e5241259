"""You have samples packed into one row, as OpenRLHF packs them, end to end: the loss from hidden states."""

import torch
from torch import Tensor

from v05.kernels import group_advantage, linear_policy_loss


def packed_loss(
    hidden: Tensor,
    output: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    action_mask: Tensor,
    action_logprobs: Tensor,
    rewards: Tensor,
    group_size: int,
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DAPO's loss of one packed row.

    hidden [T, H] of the row, output [V, H], token_ids [T], lengths [N] of the samples, action_mask [T] true on answers,
    action_logprobs [T] as the sampler reported them, rewards [N] with `group_size` answers to each prompt.
    """
    ends = lengths.cumsum(0)
    # The state at a token predicts the next one; the last of a sample predicts nothing, least of all the next sample.
    targets = token_ids.roll(-1)
    acts = action_mask.roll(-1)
    acts[ends - 1] = False
    advantages = group_advantage(rewards, torch.arange(0, len(rewards) + 1, group_size), estimator="rloo")
    return linear_policy_loss(
        hidden,
        output,
        targets.masked_fill(~acts, -100),
        action_logprobs.roll(-1),
        advantages,
        acts / acts.sum().clamp(min=1),  # token-mean: over all ranks and micro-batches where there are several
        sequence_offsets=torch.nn.functional.pad(ends, (1, 0)),
        temperature=temperature,
        clip_low=0.2,
        clip_high=0.28,
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    hidden, output = torch.randn(12, 8).requires_grad_(), torch.randn(100, 8).requires_grad_()
    answers = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1]).bool()
    given = (torch.randint(100, (12,)), torch.tensor([4, 4, 4]), answers, torch.full((12,), -4.0))
    loss, metrics = packed_loss(hidden, output, *given, torch.tensor([1.0, -1.0, 1.0]), group_size=3)
    loss.backward()
    print(loss.item(), metrics["tokens"].item(), output.grad.norm().item())
