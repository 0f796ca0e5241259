"""Kernels over ragged rollout tensors: shrinkage, advantages, policy losses and log-probs."""

from v05.kernels.advantage.op import group_advantage
from v05.kernels.shrinkage.op import shrinkage

__all__ = ["group_advantage", "shrinkage"]
