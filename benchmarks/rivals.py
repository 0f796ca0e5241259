"""What the rivals of several ops share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.timing import Run


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
