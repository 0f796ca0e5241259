"""Log-probability and entropy from hidden states, without logits in memory."""
