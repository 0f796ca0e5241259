"""A policy's weights in a file that another process can read: the way into an engine that is not in this process."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

MEMORY: Final = Path("/dev/shm")


@contextmanager
def weights_file(weights: Mapping[str, Tensor], folder: str | Path | None = None) -> Iterator[Path]:
    """Write `weights` to a safetensors file that is deleted at the end of the block.

    Args:
        weights: by parameter name, as `state_dict` of a transformers model returns them; parameters that share memory
            (tied embeddings) are written once under each name.
        folder: where; None is shared memory where the system has it, otherwise the folder for temporary files.

    Yields:
        Path of `model.safetensors`, alone in a folder of its own.

    Raises:
        ValueError: there are no weights.
    """
    if not weights:
        raise ValueError("weights is empty; allowed: the parameters of the policy by name")
    place = folder or (MEMORY if MEMORY.is_dir() else None)
    home = Path(tempfile.mkdtemp(prefix="v05-weights-", dir=place))
    try:
        path, seen = home / "model.safetensors", set()
        tensors = {}
        for name, value in weights.items():
            tensor = value.detach().cpu().contiguous()
            tensors[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
            seen.add(tensor.untyped_storage().data_ptr())
        save_file(tensors, path, metadata={"format": "pt"})
        yield path
    finally:
        shutil.rmtree(home, ignore_errors=True)


def check_weights(weights: Mapping[str, Tensor], model: str | Path) -> None:
    """Check that `weights` has every tensor of a model's safetensors files, in its shape.

    An engine that fuses matrices would not miss a part of one. A model that is not a local folder is not checked.

    Args:
        weights: by parameter name.
        model: folder of the model that the engine was started with.

    Raises:
        ValueError: a tensor is missing, or has another shape.
    """
    for path in sorted(Path(model).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name not in weights:
                    raise ValueError(f"weights has no {name!r}; allowed: every tensor of {path}")
                shape, found = tuple(file.get_slice(name).get_shape()), tuple(weights[name].shape)
                if shape != found:
                    raise ValueError(f"weights[{name!r}] is {found}; allowed: {shape}, as in {path}")
