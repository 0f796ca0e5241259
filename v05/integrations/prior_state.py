"""The state of a prior among the tensors of a checkpoint, and of which prior it is."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from v05.value.memory import below, under

PREFIX: Final = "prior."  # of the names of its tensors
CLASS: Final = "prior_class"  # name of its class, uint8
REFUSALS: Final = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)

log = logging.getLogger(__name__)


def prior_tensors(prior: Any) -> dict[str, Tensor]:
    """Return the state of a prior as a checkpoint can hold it: tensors on the CPU that share no memory.

    A state that is not all tensors is left out, with a warning: it must not end a run.
    """
    name = type(prior).__name__
    named = {CLASS: torch.tensor(list(name.encode()), dtype=torch.uint8)}
    state = prior.state_dict() if hasattr(prior, "state_dict") else {}
    why = _why_not(state)
    if why is not None:
        log.warning(f"v05: prior {name}: {why}; its state is left out of the checkpoint")
        return named
    return named | under(PREFIX, {key: _alone(value) for key, value in state.items()})


def _why_not(state: Any) -> str | None:
    if not isinstance(state, Mapping):
        return f"state_dict() is {type(state).__name__}; allowed: tensors by name"
    for key, value in state.items():
        if not isinstance(key, str):
            return f"state_dict() has the key {key!r}; allowed: tensors by name"
        if not isinstance(value, Tensor):
            return f"state_dict()[{key!r}] is {type(value).__name__}; allowed: a tensor"
    return None


def _alone(value: Tensor) -> Tensor:
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def restore_prior(prior: Any, state: Mapping[str, Tensor]) -> bool:
    """Let a prior go on from what `prior_tensors` returned, or start anew, with a warning, where that is not its own.

    Args:
        prior: just made.
        state: of a checkpoint; tensors of other names are not looked at.

    Returns:
        Whether the state is of a prior of this class, so that what was learnt about its errors still holds.

    Raises:
        ValueError: the prior does not take it.
    """
    name, saved = type(prior).__name__, bytes(state[CLASS].tolist()).decode() if CLASS in state else None
    if saved is not None and saved != name:
        log.warning(f"v05: the checkpoint holds the state of prior {saved}, not of {name}, which starts anew")
        return False
    own = below(PREFIX, state)
    if own and hasattr(prior, "load_state_dict"):
        try:
            prior.load_state_dict(own)
        except REFUSALS as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"prior {name} does not take the state in the checkpoint ({why})") from error
    elif not own and hasattr(prior, "state_dict") and prior.state_dict():
        log.warning(f"v05: the checkpoint holds no state of prior {name}, which starts anew")
    return True
