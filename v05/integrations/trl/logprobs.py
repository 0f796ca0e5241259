"""Log-probs and entropies of completions straight from hidden states, through `v05.kernels.linear_logprob`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from v05.integrations.trl.config import V05Config
from v05.integrations.trl.head import Places, packed, places_of, through_head
from v05.kernels import dispatch, linear_logprob
from v05.kernels.token_logprob.op import TokenLogprob


def why_no_kernel(device_type: str) -> str | None:
    """Return why TRL's own log-probs take less memory on a device than `linear_logprob`, or None where they do not."""
    if dispatch.choose("linear_logprob", device_type) != "reference":
        return None
    return f"it has no kernel for {device_type} here, and its reference keeps all logits"


def completion_tokens(ids: Tensor, mask: Tensor, length: int) -> Places:
    """Return the unmasked ones of the last `length` tokens of `ids` [B, S]; `mask` [B, S]; a device is waited for."""
    places = places_of(mask[:, -length:])
    return Places(places, length, packed(ids[:, -length:], places))


def logprobs_of(args: V05Config, hidden: Tensor, head: Any, where: Places) -> TokenLogprob:
    """Return log-probs and entropies of completions, `[B, length]` float32; 0 at places that `where` leaves out.

    Args:
        args: the choices.
        hidden, head: as in `v05.integrations.trl.head.through_head`.
        where: the completions' tokens.
    """
    rows = hidden.size(0)
    found = through_head(args, linear_logprob, hidden, head, where)
    empty = found.logprob.new_zeros(rows * where.length)
    return TokenLogprob(*(empty.index_copy(0, where.places, values).view(rows, -1) for values in found))
