"""Log-probability of chosen tokens and entropy of their distributions."""
