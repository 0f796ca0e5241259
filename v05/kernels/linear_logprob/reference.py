"""Log-prob, entropy and the loss of them in plain differentiable torch, with all logits: the oracle of every kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import segments
from v05.kernels.linear_logprob.inputs import Inputs
from v05.kernels.policy_loss import options
from v05.kernels.policy_loss import reference as policy_loss
from v05.kernels.token_logprob import reference as token_logprob


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """log p of each target and the entropy under softmax((hidden @ weight.T + bias) / temperature).

    The hidden state of an ignored row is replaced before the product, so that it reaches no gradient.
    """
    wide = segments.working_dtype(hidden)
    kept = targets != ignore_index
    logits = torch.where(kept[:, None], hidden, 0).to(wide) @ weight.to(wide).t()
    logits = logits if bias is None else logits + bias.to(wide)
    return token_logprob.token_logprob(logits, targets, temperatures, temperature, ignore_index)


def linear_policy_loss(
    given: Inputs,
    ignore_index: int,
    tokens: options.Inputs,
    kinds: options.Kinds,
    numbers: options.Numbers,
    entropy_coef: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its metrics with the sum of entropies last, and the log-probs; masked targets are ignored ones."""
    logprob, entropy = linear_logprob(*given, ignore_index)
    loss, metrics = policy_loss.policy_loss(tokens._replace(logprobs=logprob), kinds, numbers)
    entropy = torch.where(tokens.weights != 0, entropy, 0)
    loss = loss - entropy_coef * (tokens.weights * entropy).sum()
    return loss, torch.cat([metrics, entropy.detach().sum()[None]]), logprob
