"""A language model whose forward can end at its last hidden states, inside of whatever wraps it or its output layer."""

from __future__ import annotations

import functools
import types
from typing import Any


def end_at_states(model: Any) -> None:
    """Let `model(..., at_states=f, given=x)` return `f(hidden, head, x)`; no other call changes.

    `hidden` `[B, S, H]` are the last hidden states, `head` the output layer. As `f` is called inside of the forward of
    the output layer, autocast holds for it, FSDP and DeepSpeed have gathered the layer's parameters, and no state is
    returned that a wrapper would convert.

    Args:
        model: a causal language model of transformers, or an adapter of PEFT around one; changed in place.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = causal.get_output_embeddings()
    head = getattr(head, "_fsdp_wrapped_module", head)
    to_logits, to_outputs = head.forward, causal.forward

    @functools.wraps(type(head).forward)
    def from_states(
        self: Any, hidden: Any, *args: Any, at_states: Any = None, given: Any = None, **options: Any
    ) -> Any:
        return to_logits(hidden, *args, **options) if at_states is None else at_states(hidden, self, given)

    @functools.wraps(type(causal).forward)
    def forward(
        self: Any, *args: Any, at_states: Any = None, given: Any = None, labels: Any = None, **options: Any
    ) -> Any:
        if at_states is None:
            return to_outputs(*args, **options, **({} if labels is None else {"labels": labels}))
        hidden = self.base_model(*args, **(options | {"use_cache": False})).last_hidden_state
        return self.get_output_embeddings()(hidden, at_states=at_states, given=given)

    head.forward = types.MethodType(from_states, head)
    causal.forward = types.MethodType(forward, causal)
