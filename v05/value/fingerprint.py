"""Names of models that change with their weights, for caches of what they compute."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

from torch import Tensor

WEIGHTS: Final = ("safetensors", "bin", "pt", "gguf")  # the first kind that a folder has is the one that is loaded
SETTINGS: Final = ("json", "jinja", "model", "txt")  # configuration and tokenizer


def sample(name: str, value: Tensor) -> bytes:
    """Return the name and shape of a weight, and up to 64 of its values."""
    flat = value.detach().reshape(-1)
    taken = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
    return name.encode() + str(tuple(value.shape)).encode() + taken.numpy().tobytes()


def fingerprint(model: Any, tokenizer: Any) -> str:
    """Return 16 hexadecimal digits that depend on configuration, tokenizer, and samples of every weight."""
    digest = hashlib.sha256(model.config.to_json_string().encode() + tokenizer.backend_tokenizer.to_str().encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(sample(name, value))
    return digest.hexdigest()[:16]


def folder_fingerprint(folder: Path) -> str | None:
    """Return the same of a model that is not loaded, by its files.

    Returns:
        16 hexadecimal digits that depend on configuration, tokenizer and every weight: on samples of those in
        safetensors, on the whole of other files. None where the folder has no weights.
    """
    from safetensors import safe_open

    kind = next((end for end in WEIGHTS if any(folder.glob(f"*.{end}"))), None)
    if kind is None:
        return None
    digest = hashlib.sha256()
    for file in sorted(file for end in (kind, *SETTINGS) for file in folder.glob(f"*.{end}")):
        digest.update(file.name.encode())
        if file.suffix != ".safetensors":
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            continue
        with safe_open(file, framework="pt") as weights:
            for name in sorted(weights.keys()):
                digest.update(sample(name, weights.get_tensor(name)))
    return digest.hexdigest()[:16]
