"""Ways into other trainers; each needs its host installed: import `v05.integrations.trl` or `v05.integrations.verl`."""
