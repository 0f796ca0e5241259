"""V0.5: a value prior, empirical shrinkage and fused kernels for reinforcement learning with sparse rollouts."""

__version__ = "0.1.0"
