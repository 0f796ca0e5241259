"""Names that change with what they name: records, files, and models with their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from torch import Tensor

WEIGHTS: Final = ("safetensors", "bin", "pt", "gguf")  # the first kind that a folder has is the one that is loaded
SETTINGS: Final = ("json", "jinja", "model", "txt")  # configuration and tokenizer


def fingerprint(parts: Iterable[bytes]) -> str:
    """Return 16 hexadecimal digits that depend on all parts, read as one."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def model_fingerprint(model: Any, tokenizer: Any) -> str:
    """Return a name that depends on configuration, tokenizer, and samples of every weight."""
    settings = (model.config.to_json_string(), tokenizer.backend_tokenizer.to_str())
    weights = sorted(model.state_dict().items())
    return fingerprint([*(text.encode() for text in settings), *(sample(name, value) for name, value in weights)])


def folder_fingerprint(folder: Path) -> str | None:
    """Return the same of a model that is not loaded, by its files.

    Returns:
        A name that depends on configuration, tokenizer and every weight: on samples of those in safetensors, on the
        whole of other files. None where the folder has no weights, or is none.
    """
    kind = next((end for end in WEIGHTS if any(folder.glob(f"*.{end}"))), None)
    if kind is None:
        return None
    files = sorted(file for end in (kind, *SETTINGS) for file in folder.glob(f"*.{end}"))
    return fingerprint(part for file in files for part in (file.name.encode(), *_contents(file)))


def sample(name: str, value: Tensor) -> bytes:
    """Return the name and shape of a weight, and up to 64 of its values."""
    flat = value.detach().reshape(-1)
    taken = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
    return name.encode() + str(tuple(value.shape)).encode() + taken.numpy().tobytes()


def _contents(file: Path) -> Iterable[bytes]:
    """Yield what of a file its model depends on."""
    if file.suffix != ".safetensors":
        with file.open("rb") as stream:
            yield hashlib.file_digest(stream, "sha256").digest()
        return
    from safetensors import safe_open

    with safe_open(file, framework="pt") as weights:
        for name in sorted(weights.keys()):
            yield sample(name, weights.get_tensor(name))
