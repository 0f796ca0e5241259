"""Advantages of ragged groups of rollouts."""
