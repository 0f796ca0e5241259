"""What a native backend of query_attention is given, and what it writes into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from v05.kernels.query_attention.rules import AttentionWeights, rows_of


class Saved(NamedTuple):
    """What the backward needs beside the inputs, in the working dtype."""

    attended: Tensor  # [B, E, Q]: before the output projection
    largest: Tensor  # [B, heads, Q]: score
    inverse: Tensor  # [B, heads, Q]: 1 over the sum of powers relative to it; 0 for an empty prompt
    kv: Tensor  # [T, E]: projected states


class Inputs(NamedTuple):
    """All tensors contiguous, but for the states, whose rows may lie apart."""

    states: Tensor
    offsets: Tensor
    queries: Tensor
    weights: AttentionWeights

    def addresses(self) -> tuple[int, ...]:
        return tuple(map(Tensor.data_ptr, (*self[:3], *self.weights)))

    def sizes(self, heads: int) -> tuple[int, ...]:
        """Stride and number of tokens, size of their states, prompts, queries of a prompt, heads."""
        return (self.states.stride(0), *self.states.shape, *self.queries.shape[:2], heads)


def make_inputs(states: Tensor, offsets: Tensor, queries: Tensor, weights: Sequence[Tensor]) -> Inputs:
    """The arguments as kernels take them."""
    held = AttentionWeights(*(given.contiguous() for given in weights))
    return Inputs(rows_of(states), offsets.contiguous(), queries.contiguous(), held)


def make_outputs(states: Tensor, queries: Tensor, heads: int) -> tuple[Tensor, Saved]:
    """Uninitialised features `[B, Q * E]`, and what is saved."""
    (prompts, count, width), make = queries.shape, queries.new_empty
    largest, inverse = make(prompts, heads, count), make(prompts, heads, count)
    saved = Saved(make(prompts, width, count), largest, inverse, make(states.shape[0], width))
    return make(prompts, count * width), saved


def make_gradients(states: Tensor, queries: Tensor, weights: Sequence[Tensor], for_states: bool) -> list[Tensor]:
    """Uninitialised gradients of the states (none where not wanted), the queries and each weight."""
    of_states = states.new_empty(states.shape if for_states else (0,))
    return [of_states, *(given.new_empty(given.shape) for given in (queries, *weights))]
