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
    """Check that `weights` are the tensors of a model's safetensors files: their names and their shapes.

    An engine that fuses matrices would not miss a part of one, and may be left with half of the weights when it meets
    a name that it does not know. A model that is not a local folder is not checked.

    Args:
        weights: by parameter name; an output layer tied to the embeddings may be among them or not.
        model: folder of the model that the engine was started with.

    Raises:
        ValueError: a tensor is missing, unknown, or has another shape.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(Path(model).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for name, shape in shapes.items():
        if name not in weights:
            raise ValueError(f"weights has no {name!r}; allowed: every tensor of {model}")
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"weights[{name!r}] is {tuple(weights[name].shape)}; allowed: {shape}, as in {model}")
    unknown = sorted(weights.keys() - shapes.keys() - {"lm_head.weight"}) if shapes else []
    if unknown:
        raise ValueError(f"weights has {unknown[0]!r}; allowed: the tensors of {model}")
