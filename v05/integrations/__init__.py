"""Ways into other trainers. Each needs its host installed, so import the one you use: `v05.integrations.trl`, `.verl`."""
