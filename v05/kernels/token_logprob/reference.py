"""Log-prob and entropy in plain differentiable torch, the oracle of every kernel: softmax(logits / temperature)."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import segments


def token_logprob(
    logits: Tensor, targets: Tensor, temperatures: Tensor | None, temperature: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """log p of each target and H = -sum p log p; a row of -inf has log-prob -inf and entropy 0, an ignored one 0 and 0.

    Rows without a softmax are replaced before it, so that neither their values nor their gradients reach the others.
    """
    kept = targets != ignore_index
    z = torch.where(kept[:, None], logits.to(segments.working_dtype(logits)), 0)
    z = z / (temperature if temperatures is None else torch.where(kept, temperatures, 1).to(z.dtype)[:, None])
    empty = (z == float("-inf")).all(1)
    log_p = torch.log_softmax(torch.where(empty[:, None], 0, z), dim=1)
    logprob = log_p.gather(1, torch.where(kept, targets, 0)[:, None]).squeeze(1)
    entropy = -(log_p.exp() * torch.where(log_p > float("-inf"), log_p, 0)).sum(1)
    logprob = torch.where(empty, float("-inf"), logprob)
    return torch.where(kept, logprob, 0), torch.where(kept & ~empty, entropy, 0)
