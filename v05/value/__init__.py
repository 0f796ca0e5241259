"""Priors: what reward to expect of a prompt before its rollouts exist."""
