"""Seeds derived from names and numbers, so that no generator has a state to save."""

import hashlib


def seed_of(*parts: str | int) -> int:
    """Return a seed from 0 to 2^63 - 1 that depends on every part and on their order."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
