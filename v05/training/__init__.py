"""A training run: its settings, the loop that reads straight down, and what carries it on, alone or among processes."""
