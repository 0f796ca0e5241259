"""What the Triton backend of policy_loss allocates beside its inputs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from v05.kernels.policy_loss.options import METRICS, Correction, Kinds

FIELDS = 1 + len(METRICS)  # the loss, then the metrics


class Scratch(NamedTuple):
    """Sums by program, and, where an option asks, what sequences share."""

    partial: Tensor  # [FIELDS, programs]; stands in for what no option asks for
    kept: Tensor  # [N]: unmasked tokens, at the level of sequences
    ratio: Tensor  # [N]: exp of the mean log-ratio, at the level of sequences
    correction: Tensor  # [N]: the sampler's weight, where it is a sequence's
    by_ratio: Tensor  # [T]: derivative by the sequence's log-ratio, at the level of sequences


def whole_sequences(kinds: Kinds) -> bool:
    """Whether an option works on whole sequences."""
    return kinds.level == 1 or kinds.correction >= Correction.SEQUENCE_TRUNCATE


def make_scratch(logprobs: Tensor, sequences: int, kinds: Kinds, programs: int) -> Scratch:
    """Allocates the scratch of one call, uninitialised."""
    make = logprobs.new_empty
    partial = make(FIELDS * programs)
    correction = make(sequences) if kinds.correction >= Correction.SEQUENCE_TRUNCATE else partial
    if kinds.level == 1:
        return Scratch(partial, make(sequences), make(sequences), correction, make(logprobs.numel()))
    return Scratch(partial, partial, partial, correction, partial)
