"""What the rivals of several ops share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.timing import Run
from v05.testing import RaggedGroups, ragged_groups


def forward_backward(function: Callable[[Tensor], Sequence[Tensor]], leaf: Tensor, upstream: Sequence[Tensor]) -> Run:
    """Calls function on a leaf and backpropagates; returns the outputs and the leaf's gradient."""
    leaf = leaf.detach().requires_grad_()

    def run() -> Sequence[Tensor]:
        outputs = function(leaf)
        (gradient,) = torch.autograd.grad(outputs, leaf, upstream)
        return (*outputs, gradient)

    return run


def without_gradient(function: Callable[[], Sequence[Tensor]]) -> Run:
    """Calls function where autograd records nothing."""

    def run() -> Sequence[Tensor]:
        with torch.no_grad():
            return function()

    return run


def groups_of(groups: int, device: torch.device, seed: int) -> RaggedGroups:
    """Groups of 4 to 16 rollouts. Every seed has the same lengths, so that torch.compile need not allow for others."""
    rewards, offsets, prior = ragged_groups(groups, 4, 16)
    rng = torch.Generator().manual_seed(seed)
    rewards, prior = (values[torch.randperm(len(values), generator=rng)] for values in (rewards, prior))
    return RaggedGroups(rewards.to(device), offsets.to(device), prior.to(device))
