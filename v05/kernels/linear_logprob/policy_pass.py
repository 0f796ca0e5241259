"""A policy loss on log-probs that exist only while it is computed: value, metrics and gradients in one go."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from v05.kernels import dispatch, segments
from v05.kernels.linear_logprob.inputs import Inputs
from v05.kernels.linear_logprob.op import linear_logprob
from v05.kernels.linear_logprob.passes import Gradients, Needs, returned, spread
from v05.kernels.policy_loss import options
from v05.kernels.policy_loss.op import loss_of
from v05.kernels.policy_loss.options import Kinds, Numbers, whole_sequences
from v05.kernels.token_logprob.op import TokenLogprob
from v05.kernels.token_logprob.ranks import Ranks
from v05.kernels.token_logprob.softmax import Softmax

MASKED = -(2**62)  # as a target: of a token of weight 0, whose own target counts for nothing


class Work(NamedTuple):
    """What is asked for beside the tensors."""

    kinds: Kinds
    numbers: Numbers
    entropy_coef: float
    needs: Needs
    chunk: int
    backend: str


class Result(NamedTuple):
    """loss, a scalar; metrics `[len(METRICS) + 1]`, the last the sum of entropies; gradients of the loss."""

    loss: Tensor
    metrics: Tensor
    gradients: Gradients


def check_tokens(tokens: options.Inputs, kinds: Kinds) -> None:
    """Raises at a value that is not allowed, but for those seen beside the log-probs alone; waits for the device."""
    alone = kinds._replace(kl=int(options.Kl.K3))  # which asks nothing of the distance to the reference
    options.check_token_values(tokens._replace(logprobs=torch.zeros_like(tokens.weights)), alone)


def masked(given: Inputs, weights: Tensor) -> Inputs:
    """The same without the targets of tokens of weight 0."""
    return given._replace(targets=torch.where(weights != 0, given.targets, MASKED))


def logprobs(
    given: Inputs, tokens: options.Inputs, work: Work, group: dist.ProcessGroup | None, check_values: bool
) -> TokenLogprob:
    """Log-probs and entropies, 0 where masked, differentiable."""
    temperature = given.temperature if given.temperatures is None else given.temperatures
    tensors = (given.hidden, given.weight, masked(given, tokens.weights).targets)
    places = dict(chunk=work.chunk, group=group, backend=work.backend, ignore_index=MASKED, check_values=check_values)
    return linear_logprob(*tensors, bias=given.bias, temperature=temperature, **places)  # type: ignore[arg-type]


def apart(
    given: Inputs, tokens: options.Inputs, work: Work, group: dist.ProcessGroup | None, check_values: bool
) -> tuple[Tensor, Tensor]:
    """Loss and metrics by two ops, whose gradients are made once that of the loss is known."""
    logprob, entropy = logprobs(given, tokens, work, group, check_values)
    loss, metrics = loss_of(tokens._replace(logprobs=logprob), work.kinds, work.numbers, check_values, work.backend)
    if work.entropy_coef:
        loss = loss - work.entropy_coef * (tokens.weights * entropy).sum()
    return loss, torch.stack([*metrics.values(), entropy.detach().sum()])


def _each(tokens: options.Inputs) -> options.Inputs:
    """The tokens with an advantage each, so that any of them can be taken alone."""
    if tokens.per_token:
        return tokens
    ids = segments.segment_ids(tokens.offsets, tokens.tokens)
    return tokens._replace(advantages=tokens.advantages[ids])


def _some(tokens: options.Inputs, rows: Tensor | slice) -> options.Inputs:
    """Some of tokens that have an advantage each, as one sequence."""
    fields = {name: values for name, values in tokens._asdict().items() if name != "offsets" and values is not None}
    taken = {name: values[rows] for name, values in fields.items()}
    ends = torch.arange(2, device=tokens.weights.device) * len(taken["weights"])
    return tokens._replace(offsets=ends, **taken)


def _finish(tokens: options.Inputs, softmax: Softmax, work: Work) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient by log-probs, and metrics, all tokens together."""
    run = dispatch.implementation("policy_loss", work.backend).policy_loss
    loss, gradient, metrics = run(tokens._replace(logprobs=softmax.logprob), work.kinds, work.numbers)
    entropy = torch.where(tokens.weights != 0, softmax.entropy, 0)
    if work.entropy_coef:
        loss = loss - work.entropy_coef * (tokens.weights * entropy).sum()
    return loss, gradient, torch.cat([metrics, entropy.sum()[None]])


def _by_entropy(weights: Tensor, work: Work) -> Tensor | None:
    return -work.entropy_coef * weights if work.entropy_coef else None


def compute(given: Inputs, tokens: options.Inputs, work: Work, ranks: Ranks | None = None) -> Result:
    """Loss, metrics and the wanted gradients.

    Args:
        given: the layer's inputs; targets of masked tokens are `SKIPPED`.
        tokens: the loss's inputs in the wide dtype; their logprobs are not read.
        work: what is asked for.
        ranks: those with the other slices of the vocabulary.
    """
    run = dispatch.implementation("linear_logprob", work.backend)
    if not any(work.needs) or whole_sequences(work.kinds) or run.two_passes(given, work.needs):
        softmax = run.forward(given, work.chunk, ranks)
        loss, gradient, metrics = _finish(tokens, softmax, work)
        if not any(work.needs):
            return Result(loss, metrics, Gradients(None, None, None))
        by_entropy = _by_entropy(tokens.weights, work)
        return Result(loss, metrics, run.backward(given, softmax, gradient, by_entropy, work.needs, work.chunk))
    some, rows = given.without_skipped()
    try:
        softmax, made = _rows_by_rows(some, tokens, rows, work, ranks)
    except ValueError:
        _finish(tokens, run.forward(given, work.chunk, ranks), work)  # names the value by its place among all tokens
        raise
    loss, _, metrics = _finish(tokens, spread(softmax, rows, len(given.targets)), work)
    return Result(loss, metrics, made._replace(hidden=returned(made.hidden, rows, len(given.targets))))


def _rows_by_rows(
    some: Inputs, tokens: options.Inputs, rows: Tensor | None, work: Work, ranks: Ranks | None
) -> tuple[Softmax, Gradients]:
    """The pass in which the loss is differentiated as soon as a few rows have their log-probs."""
    each = _each(tokens)
    each = each if rows is None else _some(each, rows)
    policy = dispatch.implementation("policy_loss", work.backend).policy_loss

    def derivative(softmax: Softmax, first: int, last: int) -> tuple[Tensor, Tensor | None]:
        part = _some(each, slice(first, last))._replace(logprobs=softmax.logprob)
        return policy(part, work.kinds, work.numbers)[1], _by_entropy(part.weights, work)

    run = dispatch.implementation("linear_logprob", work.backend)
    return run.forward_backward(some, derivative, work.needs, work.chunk, ranks)
