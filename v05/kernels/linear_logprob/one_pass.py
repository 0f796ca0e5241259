"""The pass in which a loss is differentiated as soon as a few rows have their log-probs: each logit is made once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from v05.kernels.linear_logprob.inputs import Inputs
from v05.kernels.linear_logprob.passes import (
    Engine,
    Gradients,
    Needs,
    make_logits,
    returned,
    statistics_of,
    steps,
    taken,
)
from v05.kernels.token_logprob.ranks import Ranks
from v05.kernels.token_logprob.softmax import Softmax, finish

WHOLE_ROWS = 128  # a product's number of rows is a multiple of it, where there are as many: tiles are then full

Upstream = tuple[Tensor, Tensor | None]
Derivative = Callable[[Softmax, int, int], Upstream]


def keeps(engine: Engine, some: Inputs) -> bool:
    """Whether gradients of all logits, rounded as for products, take no more memory than a wide copy of the weight."""
    dtype, wide = some.weight.dtype, some.wide
    fits = len(some.targets) * dtype.itemsize <= some.weight.shape[1] * wide.itemsize
    return engine.rounds and dtype != wide and fits


def _to_front(logits: Tensor, rows: Tensor) -> Tensor:
    """Brings some rows, ascending, into the first places, where others make room; returns which row is in each."""
    before = rows[rows < len(rows)]
    order = torch.arange(len(rows), device=rows.device)
    free = torch.ones_like(rows, dtype=torch.bool).index_fill_(0, before, False)
    order[free] = rows[len(before) :]
    for place in free.nonzero().squeeze(1).tolist():
        logits[place] = logits[order[place]]
    return order


def _gradient(
    engine: Engine, logits: Tensor, part: Inputs, softmax: Softmax, upstream: Upstream, out: Tensor | None
) -> tuple[Tensor, Inputs, Tensor | None]:
    """Gradient of logits, over them or in the first rows of out, and the rows it is of: where it is 0, none on the CPU.

    The others then come in an order of their own, which is returned; None: all of them, where they were.
    """
    part = part.moved_by(*upstream)
    rows = part.counting()
    order = None if rows is None else _to_front(logits, rows)
    part, logits = (part, logits) if order is None else (part.at(order), logits[: len(order)])
    softmax = Softmax(*(taken(values, order) for values in softmax))  # type: ignore[arg-type]
    by_logprob, by_entropy = (taken(values, order) for values in upstream)
    own = None if out is None else out[: len(logits)]
    return engine.gradient(logits, part, softmax, by_logprob, by_entropy, own), part, order


def _add_products(engine: Engine, gradient: Tensor, part: Inputs, sums: Gradients, rows: slice, adds: bool) -> None:
    """What the gradient of the logits of some rows gives, hidden's as the rows of its own; the first is not added."""
    if sums.hidden is not None:
        engine.multiply(gradient, part.weight.t(), sums.hidden[rows], False)
    if sums.weight is not None:
        engine.multiply(gradient.t(), part.hidden.t(), sums.weight, adds)
    if sums.bias is not None:
        sums.bias.add_(gradient.sum(0, dtype=part.wide))


def _softmax(engine: Engine, part: Inputs, logits: Tensor, whole: Inputs, ranks: Ranks | None) -> Softmax:
    """Log-probs of some rows, whose logits are stored."""
    partials = []
    for left, right in steps(part.columns, engine.slice_width(part.columns)):
        piece = part.slice_of(left, right)
        make_logits(engine, piece, logits[:, left:right])
        partials.append(statistics_of(engine, logits[:, left:right], piece, whole, ranks))
    return finish(part, engine.join(partials, part), ranks)


def forward_backward(
    engine: Engine,
    some: Inputs,
    derivative: Derivative,
    needs: Needs,
    chunk: int,
    ranks: Ranks | None = None,
) -> tuple[Softmax, Gradients]:
    """Log-probs, and gradients from `derivative` of them, rows by rows.

    The weight's gradient is summed up over the steps in the wide dtype; or the gradients of all logits are kept, see
    `keeps`, and each product is one of all rows. Rows whose derivative is 0 take no part in products on the CPU.

    Args:
        engine: the device's.
        some: rows that all count, or whose derivative is 0.
        derivative: of a loss by log-prob and entropy, from the softmax of rows first to last.
        needs: which gradients are wanted.
        chunk: wide logits that may exist at a time; at least one row's do.
        ranks: those with the other slices of the vocabulary, and as many rows at a time.
    """
    total, (columns, features) = len(some.targets), some.weight.shape
    height = max(1, min(total, chunk // columns))
    height = height // WHOLE_ROWS * WHOLE_ROWS or height
    dtype, wide, make = some.weight.dtype, some.wide, some.hidden.new_empty
    buffer = make(height, columns, dtype=wide)
    kept = make(total, columns, dtype=dtype) if needs.weight and keeps(engine, some) else None
    sums = Gradients(
        make(total, features, dtype=wide) if needs.hidden else None,
        make(columns, features, dtype=wide if kept is None else dtype) if needs.weight else None,
        some.hidden.new_zeros(columns, dtype=wide) if needs.bias else None,
    )
    parts, moved, done = [], [], 0  # moved: rows that have a gradient, which is the place of each in the sums
    for first, last in steps(total, height):
        part, logits = some.at(slice(first, last)), buffer[: last - first]
        parts.append(_softmax(engine, part, logits, some, ranks))
        if any(needs):
            upstream, out = derivative(parts[-1], first, last), None if kept is None else kept[done:]
            gradient, part, order = _gradient(engine, logits, part, parts[-1], upstream, out)
            moved.append(torch.arange(first, last, device=logits.device) if order is None else first + order)
            if kept is None and len(gradient):
                _add_products(engine, gradient, part, sums, slice(done, done + len(gradient)), done > 0)
            done += len(gradient)
    rows = None if done == total else torch.cat(moved)
    if kept is not None and done:
        _add_products(engine, kept[:done], some if rows is None else some.at(rows), sums, slice(done), False)
    if sums.weight is not None and not done:
        sums.weight.zero_()
    empty = some.hidden.new_empty(0, dtype=wide)
    softmax = Softmax(*(torch.cat(field) for field in zip(Softmax(*[empty] * 4), *parts, strict=True)))
    hidden = None if sums.hidden is None else returned(sums.hidden[:done], rows, total)
    weight = None if sums.weight is None else sums.weight.to(dtype)
    return softmax, Gradients(hidden, weight, sums.bias)
