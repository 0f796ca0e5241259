"""A language model whose forward can end in a loss of its last hidden states, inside of whatever wraps the model."""

from __future__ import annotations

import functools
import types
from typing import Any


def add_states_loss(model: Any) -> None:
    """Let `model(..., states_loss=f, tokens=given)` return `f(hidden, head, given)`; no other call changes.

    `hidden` `[B, S, H]` are the last hidden states, `head` the output layer, which is not called. As the loss is made
    inside of the forward, autocast holds for it, and no state is returned that a wrapper would convert.

    Args:
        model: a causal language model of transformers, or an adapter of PEFT around one; changed in place.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    original = causal.forward

    @functools.wraps(type(causal).forward)
    def forward(
        self: Any, *args: Any, states_loss: Any = None, tokens: Any = None, labels: Any = None, **options: Any
    ) -> Any:
        if states_loss is None:
            return original(*args, **options, **({} if labels is None else {"labels": labels}))
        hidden = self.base_model(*args, **(options | {"use_cache": False})).last_hidden_state
        return states_loss(hidden, self.get_output_embeddings(), tokens)

    causal.forward = types.MethodType(forward, causal)
