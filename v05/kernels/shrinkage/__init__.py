"""Empirical shrinkage of group means towards a prior."""
