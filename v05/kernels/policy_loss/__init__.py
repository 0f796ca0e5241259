"""Policy losses over packed tokens."""
