"""Where rollouts come from, who gets more of them, and how they are packed."""
