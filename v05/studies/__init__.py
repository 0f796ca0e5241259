"""Studies of baselines, gradients, priors and training: each can be measured again, and goes on after a stop."""
