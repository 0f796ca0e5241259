"""The passes over slices of logits that every backend shares: forward and backward.

An engine is a module that multiplies matrices and turns logits into statistics and gradients: `cpu` or `device`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from v05.kernels.linear_logprob.inputs import Inputs
from v05.kernels.linear_logprob.rules import check_logits
from v05.kernels.token_logprob.ranks import Ranks
from v05.kernels.token_logprob.softmax import SKIPPED, SKIPPED_ROW, Partial, Softmax, finish

FORWARD_ROWS = 1024  # at most at a time: more gain nothing
BACKWARD_COLUMNS = 1024  # at least at a time


class Engine(Protocol):
    """What a pass needs of a device.

    `widest` is how many columns backward takes at most at a time; `rounds` says whether `multiply` may have an out of
    the operands' dtype, to which its wide sums are rounded.
    """

    widest: int
    rounds: bool

    def slice_width(self, columns: int) -> int:
        """How many columns of logits are made in one product, forward."""

    def multiply(self, left: Tensor, right: Tensor, out: Tensor, adds: bool) -> None:
        """out `[m, n]` = left `[m, k]` times right `[n, k]` transposed, or is increased by it, where out is wide."""

    def statistics(self, logits: Tensor, given: Inputs) -> Partial | None:
        """Of one slice of logits; None where a value is not allowed."""

    def join(self, slices: list[Partial], given: Inputs) -> Partial:
        """Puts slices of the same rows together, in their order."""

    def gradient(
        self,
        logits: Tensor,
        given: Inputs,
        softmax: Softmax,
        by_logprob: Tensor | None,
        by_entropy: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Gradient of the logits: in out, or where there is none, in their place or in the dtype that products take."""

    def buffer_dtype(self, given: Inputs) -> torch.dtype:
        """What `gradient_again` works in."""

    def gradient_again(
        self, buffer: Tensor, given: Inputs, softmax: Softmax, by_logprob: Tensor | None, by_entropy: Tensor | None
    ) -> Tensor:
        """Gradient of the logits of one slice, which are made for it, in the buffer."""


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """hidden `[T, H]` and bias `[V]` in the wide dtype, weight `[V, H]` in its own; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def steps(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, last) of pieces of at most `size`."""
    for first in range(0, total, size):
        yield first, min(first + size, total)


def make_logits(engine: Engine, given: Inputs, out: Tensor) -> None:
    """Logits of one slice, into out."""
    if given.bias is not None:
        out.copy_(given.bias.expand_as(out))
    engine.multiply(given.hidden, given.weight, out, given.bias is not None)


def statistics_of(engine: Engine, logits: Tensor, given: Inputs, whole: Inputs, ranks: Ranks | None) -> Partial:
    """Sums over a slice of logits; raises, where these can be looked at, what is wrong with `whole`."""
    partial = engine.statistics(logits, given)
    if partial is not None:
        return partial
    with nullcontext() if ranks is None else ranks.holding():
        check_logits(whole, whole.targets != SKIPPED)
        raise ValueError("a logit of hidden and weight is NaN or inf; allowed: finite or -inf")
    return Partial(*logits.new_zeros(4, len(logits)))  # which nobody gets to see


def spread(softmax: Softmax, rows: Tensor | None, total: int) -> Softmax:
    """Puts the rows that count where they were; the others are 0, their largest logit -inf."""
    if rows is None:
        return softmax
    fields = softmax._asdict().items()
    return Softmax(
        **{name: values.new_full((total,), SKIPPED_ROW[name]).index_copy_(0, rows, values) for name, values in fields}
    )


def forward(engine: Engine, given: Inputs, chunk: int, ranks: Ranks | None = None) -> Softmax:
    """Log-prob, entropy and statistics `[T]`; one slice of logits exists at a time."""
    some, rows = given.without_skipped()
    width = engine.slice_width(given.columns)
    height = max(1, min(chunk // width, FORWARD_ROWS))
    buffer = given.hidden.new_empty(min(height, len(some.targets)) * width, dtype=given.wide)
    parts = []
    for first, last in steps(len(some.targets), height):
        part, partials = some.at(slice(first, last)), []
        for left, right in steps(given.columns, width):
            piece = part.slice_of(left, right)
            logits = buffer[: (last - first) * (right - left)].view(last - first, right - left)
            make_logits(engine, piece, logits)
            partials.append(statistics_of(engine, logits, piece, given, ranks))
        parts.append(engine.join(partials, part))
    empty = some.hidden.new_empty(0, dtype=some.wide)
    whole = Partial(*(torch.cat(field) for field in zip(Partial(*[empty] * 4), *parts, strict=True)))
    return spread(finish(some, whole, ranks), rows, len(given.targets))


def taken(values: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """Some of the values, where there are any; all without rows."""
    return values if values is None or rows is None else values[rows]


def returned(hidden: Tensor | None, rows: Tensor | None, total: int) -> Tensor | None:
    """The gradient of hidden with a row of 0 for each that was left out."""
    if hidden is None or rows is None:
        return hidden
    return hidden.new_zeros(total, hidden.shape[1]).index_copy_(0, rows, hidden)


def backward(
    engine: Engine,
    given: Inputs,
    softmax: Softmax,
    by_logprob: Tensor | None,
    by_entropy: Tensor | None,
    needs: Needs,
    chunk: int,
    scale: Tensor | None = None,
) -> Gradients:
    """Gradients from those of log-prob and entropy: slices of the vocabulary are made once more, each for all rows.

    So each slice of the weight's gradient is finished at once, and needs no wide copy of the whole, or none at all
    (`straight`). Rows whose upstream gradients are 0 are left out like those that are skipped. Upstream gradients come
    multiplied by `scale`, if given, which is taken out again before a result is rounded.
    """
    some, rows = given.moved_by(by_logprob, by_entropy).without_skipped()
    kept = Softmax(*(taken(values, rows) for values in softmax))  # type: ignore[arg-type]
    by_logprob, by_entropy = taken(by_logprob, rows), taken(by_entropy, rows)
    total, (columns, features) = len(some.targets), given.weight.shape
    least, most = BACKWARD_COLUMNS, engine.widest
    height = max(1, min(total, chunk // least))
    dtype, straight = engine.buffer_dtype(given), scale is None
    if given.weight.dtype != given.wide:
        straight = straight and engine.rounds and height == total
    room = chunk * given.wide.itemsize // dtype.itemsize if straight else chunk
    width = min(columns, most, max(least, room // height // least * least))
    wide = {"dtype": given.wide, "device": given.hidden.device}
    buffer = given.hidden.new_empty(height * width, dtype=dtype)
    hidden = torch.empty(total, features, **wide) if needs.hidden else None  # type: ignore[call-overload]
    make = torch.empty_like if total else torch.zeros_like
    weight = make(given.weight, memory_format=torch.contiguous_format) if needs.weight else None
    bias = torch.zeros(columns, **wide) if needs.bias else None  # type: ignore[call-overload]
    sums = torch.empty(width if needs.weight and not straight else 0, features, **wide)  # type: ignore[call-overload]
    for left, right in steps(columns if total else 0, width):
        piece = some.slice_of(left, right)
        own = weight[left:right] if weight is not None and straight else sums[: right - left]
        for first, last in steps(total, height):
            at = slice(first, last)
            part, logits = piece.at(at), buffer[: (last - first) * (right - left)].view(last - first, right - left)
            upstream = [None if values is None else values[at] for values in (by_logprob, by_entropy)]
            gradient = engine.gradient_again(logits, part, Softmax(*(values[at] for values in kept)), *upstream)
            if hidden is not None:
                engine.multiply(gradient, part.weight.t(), hidden[at], left > 0)
            if weight is not None:
                engine.multiply(gradient.t(), part.hidden.t(), own, first > 0)
            if bias is not None:
                bias[left:right] += gradient.sum(0, dtype=given.wide)
        if weight is not None and not straight:
            weight[left:right] = own if scale is None else own / scale
    if scale is not None:
        hidden, bias = (None if values is None else values / scale for values in (hidden, bias))
    return Gradients(returned(hidden, rows, len(given.targets)), weight, bias)
