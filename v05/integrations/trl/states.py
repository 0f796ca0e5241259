"""A language model whose forward can end at its last hidden states, inside of whatever wraps the model."""

from __future__ import annotations

import functools
import types
from typing import Any


def end_at_states(model: Any) -> None:
    """Let `model(..., at_states=f, given=x)` return `f(hidden, head, x)`; no other call changes.

    `hidden` `[B, S, H]` are the last hidden states, `head` the output layer, which is not called. As `f` is called
    inside of the forward, autocast holds for it, and no state is returned that a wrapper would convert.

    Args:
        model: a causal language model of transformers, or an adapter of PEFT around one; changed in place.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    original = causal.forward

    @functools.wraps(type(causal).forward)
    def forward(
        self: Any, *args: Any, at_states: Any = None, given: Any = None, labels: Any = None, **options: Any
    ) -> Any:
        if at_states is None:
            return original(*args, **options, **({} if labels is None else {"labels": labels}))
        hidden = self.base_model(*args, **(options | {"use_cache": False})).last_hidden_state
        return at_states(hidden, self.get_output_embeddings(), given)

    causal.forward = types.MethodType(forward, causal)
