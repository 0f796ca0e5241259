"""Policies from a folder or a hub: any causal language model that transformers can load."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch

from v05.errors import InputError
from v05.policy import Policy
from v05.quiet import without_bars

DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType({"float32": torch.float32, "bfloat16": torch.bfloat16})


def load_policy(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    train: bool = False,
    gradient_checkpointing: bool = False,
) -> Policy:
    """Return the model and the tokenizer in a folder, or of a name on the hub.

    Args:
        name: folder or hub name.
        dtype: of the products, one of `DTYPES`. Parameters that are trained are float32 whatever it is, as steps of
            Adam are lost in bfloat16; others have it too.
        device: where the model goes; `auto` is the GPU where there is one.
        train: whether the parameters will be trained.
        gradient_checkpointing: make the activations of a layer again in the backward pass instead of keeping them.

    Returns:
        The policy, without dropout: what is learnt from must be what was sampled.

    Raises:
        InputError: an unknown dtype or device, or nothing that transformers can load as a causal language model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    place = check_device(device)
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise InputError(f"model is {name!r}, no folder; allowed: a folder, or a name on the hub")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        parameters = torch.float32 if train else DTYPES[dtype]
        with without_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=parameters, output_loading_info=True)
    except (OSError, ValueError, KeyError, ImportError) as error:  # the last: a tokenizer that wants protobuf
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"model {name!r} cannot be loaded: {reason}") from error
    model, missing = loaded[0], sorted(loaded[1]["missing_keys"])
    if missing:
        raise InputError(f"model {name!r} lacks {len(missing)} weights, such as {missing[0]}; allowed: a whole model")
    if model.get_output_embeddings() is None:
        raise InputError(f"model {name!r} has no output layer; allowed: a causal language model")
    before = without_dropout(model)
    model.to(place).train(train).requires_grad_(train)
    if gradient_checkpointing and train:
        keep_no_activations(model)
    policy = Policy(model, tokenizer, DTYPES[dtype], tuple(before))
    if not policy.end_ids:
        raise InputError(f"model {name!r} has no end token; allowed: a tokenizer or generation settings with one")
    return policy


def keep_no_activations(model: Any) -> None:
    """Have a model make the activations of every layer again in the backward pass."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    if newer is not None:
        newer()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def check_device(device: str) -> torch.device:
    """Return the device of that name.

    Raises:
        InputError: torch does not know it, or it is not there.
    """
    try:
        chosen = (
            torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
        )
    except RuntimeError:
        raise InputError(f"device is {device!r}; allowed: auto, cpu, cuda, cuda:0 and so on") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device is {device!r}; allowed here: auto, cpu; GPUs found: {torch.cuda.device_count()}")
    return chosen


def without_dropout(model: Any) -> list[tuple[Any, str, float]]:
    """Set to 0 all that makes a forward pass in training random: dropout, dropped layers, a router's jitter.

    Returns:
        What was set in configurations: each with the name and the value that it had.
    """
    before: list[tuple[Any, str, float]] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for owner in (module, getattr(module, "config", None)):
            for name, value in vars(owner).items() if owner is not None else ():
                if isinstance(value, float) and value and ("drop" in name or "jitter" in name):
                    setattr(owner, name, 0.0)
                    before += [] if owner is module else [(owner, name, value)]
    return before
