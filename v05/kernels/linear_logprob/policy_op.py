"""The public `linear_policy_loss`: a policy loss straight from hidden states, gradients made in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from v05.kernels import dispatch, segments
from v05.kernels.custom import custom_op, once
from v05.kernels.linear_logprob import parallel, policy_pass, reference
from v05.kernels.linear_logprob.autocast import as_linear
from v05.kernels.linear_logprob.inputs import Inputs
from v05.kernels.linear_logprob.op import empty_gradients
from v05.kernels.linear_logprob.passes import Needs
from v05.kernels.linear_logprob.policy_pass import Result, Work, check_tokens
from v05.kernels.linear_logprob.rules import check_logits, check_shapes, chunk_of
from v05.kernels.policy_loss import options
from v05.kernels.policy_loss.covariance import select_by_covariance
from v05.kernels.policy_loss.op import PolicyLoss, scaled_at_once
from v05.kernels.token_logprob.ranks import Ranks, check_split
from v05.kernels.token_logprob.rules import by_row, check_targets

ROWS_SCALED = 4096  # of a gradient at a time
NAMES = (*options.METRICS, "entropy_sum")


def _check(given: Inputs, tokens: options.Inputs, kinds: options.Kinds, columns: int) -> None:
    check_tokens(tokens, kinds)
    check_targets(given.targets, given.temperatures, columns, tokens.weights != 0)


@custom_op("v05::linear_policy_loss")
def _linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    offsets: Tensor,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
    selected: Tensor | None,
    kinds: Sequence[int],
    numbers: Sequence[float],
    entropy_coef: float,
    needs: Sequence[bool],
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = Inputs(hidden, weight, bias, targets, temperatures, temperature)
    tokens = options.Inputs(
        weights, old_logprobs, advantages, weights, offsets, ref_logprobs, sampler_logprobs, selected
    )
    work = Work(options.Kinds(*kinds), options.Numbers(*numbers), entropy_coef, Needs(*needs), chunk, backend)
    if hidden.device.type == "cpu":
        _check(given, tokens, work.kinds, given.columns)
    result = policy_pass.compute(policy_pass.masked(given, weights).localised(policy_pass.MASKED), tokens, work)
    likes = zip(result.gradients, given[:3], strict=True)
    empty = hidden.new_empty
    made = (empty(0) if g is None else g.to(like.dtype) for g, like in likes)  # type: ignore[union-attr]
    return result.loss, result.metrics, *made  # type: ignore[return-value]


@_linear_policy_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    offsets: Tensor,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
    selected: Tensor | None,
    kinds: Sequence[int],
    numbers: Sequence[float],
    entropy_coef: float,
    needs: Sequence[bool],
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = empty_gradients(hidden, weight, bias, needs)
    return weights.new_empty(()), weights.new_empty(len(NAMES)), *gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.needs, ctx.backend, ctx.inputs = inputs[16], inputs[-1], len(inputs)
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(output[1])  # but not the gradients, through which a second derivative is refused


def _scaled(ctx: Any, gradient: Tensor, by_loss: Tensor) -> Tensor:
    """The stored gradient times that of the loss, multiplied before it is rounded."""
    scaled = scaled_at_once(ctx, gradient, by_loss)
    if scaled is not None:
        return scaled
    if gradient.dtype == by_loss.dtype:
        return gradient * by_loss
    return torch.cat([(piece.to(by_loss.dtype) * by_loss).to(gradient.dtype) for piece in gradient.split(ROWS_SCALED)])


def _all_scaled(ctx: Any, gradients: Sequence[Tensor | None], by_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None or by_loss is None else _scaled(ctx, g, by_loss) for g in gradients)


def _backward(ctx: Any, by_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = [g if needed else None for g, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)]
    return (*_all_scaled(ctx, gradients, by_loss), *[None] * (ctx.inputs - 3))


_linear_policy_loss.register_autograd(_backward, setup_context=_save)


class _Parallel(torch.autograd.Function):
    """The loss where the vocabulary is split among ranks."""

    @staticmethod
    def forward(
        ctx: Any, given: Inputs, tokens: options.Inputs, work: Work, ranks: Ranks, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        result: Result = policy_pass.compute(given, tokens, work, ranks)
        gradients = parallel.reduced(result.gradients, given, ranks)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gradients)
        ctx.backend, ctx.direct = work.backend, True
        ctx.mark_non_differentiable(result.metrics)
        return result.loss, result.metrics, *gradients  # as `_save` has it

    @staticmethod
    @once("linear_policy_loss")
    def backward(ctx: Any, by_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, None, None, *_all_scaled(ctx, ctx.saved_tensors, by_loss))


def _selected(given: Inputs, tokens: options.Inputs, surrogate: str, work: Work, ranks: Ranks | None) -> Tensor:
    """Tokens selected by covariance, the same on all ranks, from a pass for the log-probs alone."""
    if ranks is None and segments.readable(given.hidden):
        _check(given, tokens, work.kinds, given.columns)
    group = None if ranks is None else ranks.group
    with torch.no_grad():
        logprob, _ = policy_pass.logprobs(given, tokens, work, group, False)
    selected = select_by_covariance(
        logprob,
        *tokens[1:4],
        sequence_offsets=tokens.offsets,
        surrogate=surrogate,
        clip_low=work.numbers.clip_low,
        clip_high=work.numbers.clip_high,
    )
    return selected if ranks is None else ranks.firsts(selected)


def _run(
    given: Inputs, tokens: options.Inputs, work: Work, ranks: Ranks | None, check_values: bool
) -> tuple[Tensor, Tensor]:
    """Checks what waits for nothing, and more where asked for; then loss and metrics by the backend."""
    apart = given.hidden.dtype == torch.float16 and any(work.needs)
    kept, on_cpu = tokens.weights != 0, segments.readable(given.hidden)
    if work.backend == "reference":
        if check_values or on_cpu:
            _check(given, tokens, work.kinds, given.columns)
            check_logits(given.detached(), kept)
        masked, numbers = policy_pass.masked(given, tokens.weights), (work.numbers, work.entropy_coef)
        loss, metrics, logprob = reference.linear_policy_loss(masked, policy_pass.MASKED, tokens, work.kinds, *numbers)
        if check_values or on_cpu:
            options.check_token_values(tokens._replace(logprobs=logprob.detach()), work.kinds)
        return loss, metrics
    if ranks is None and (check_values or (apart and on_cpu)):
        _check(given, tokens, work.kinds, given.columns)
    if apart:
        return policy_pass.apart(given, tokens, work, None if ranks is None else ranks.group, check_values)
    if ranks is not None:
        masked = policy_pass.masked(given, tokens.weights).detached()
        local, widest = parallel.localised(masked, kept, policy_pass.MASKED, "", ranks, check_values)
        rows = max(1, work.chunk // int(widest))  # at a time, the same on all
        loss, metrics, *_ = _Parallel.apply(local, tokens, work._replace(chunk=rows * given.columns), ranks, *given[:3])
        return loss, metrics
    if check_values:
        check_logits(given.detached(), kept)
    companions = (*tokens[1:], list(work.kinds), list(work.numbers), work.entropy_coef)
    result = _linear_policy_loss(*given, *companions, list(work.needs), work.chunk, work.backend)
    return result[0], result[1]


@as_linear
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    sequence_offsets: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy_coef: float = 0.0,
    surrogate: str = "ppo",
    level: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl: str = "none",
    kl_coef: float = 0.0,
    sampler_logprobs: Tensor | None = None,
    sampler_correction: str = "none",
    sampler_cap: float = 2.0,
    sampler_floor: float | None = None,
    sapo_tau_pos: float = 1.0,
    sapo_tau_neg: float = 1.05,
    covariance_selected: Tensor | None = None,
    covariance_coef: float = 1.0,
    chunk: int | None = None,
    group: dist.ProcessGroup | None = None,
    check_values: bool = False,
    backend: str | None = None,
) -> PolicyLoss:
    """`policy_loss` of `linear_logprob(hidden, weight, targets)`, minus `entropy_coef * weights * entropy`, in one go.

    Gradients of hidden, weight and bias are made in the forward pass, from logits that exist once: three products
    where the two ops need four. A ratio or a sampler weight for whole sequences needs every log-prob before any
    gradient, so there log-probs come first and the logits are made twice; so it is for bfloat16 on a CPU and, with more
    tokens than twice the features, on sm_90; and for float16, whose gradients wait for that of the loss, since a loss
    scale has to reach them before they are rounded. A selection by covariance that is not given takes a pass of its
    own, and with a group is the first rank's. Where logits exist once, the gradient of a bfloat16 weight is summed up
    in a float32 copy of it, or made of a bfloat16 gradient of all logits where that is no larger. Under autocast, as
    there. On a CPU, tokens without a gradient (advantage 0, ratio clipped) cost the forward's product alone.

    Args:
        hidden, weight, targets, bias, temperature, chunk, group: as for `linear_logprob`; but chunk holds whole rows of
            logits, and at least one, and with a group the device is waited for.
        old_logprobs, advantages, weights, sequence_offsets: as for `policy_loss`. A token of weight 0 is masked: its
            hidden state, target and temperature count for nothing, and on a CPU its logits are not computed.
        entropy_coef: of the entropy bonus.
        surrogate, level, clip_low, clip_high, dual_clip, ref_logprobs, kl, kl_coef, sampler_logprobs,
            sampler_correction, sampler_cap, sampler_floor, sapo_tau_pos, sapo_tau_neg, covariance_selected,
            covariance_coef: as for `policy_loss`.
        check_values: check values on a device too, which waits for it; on the CPU they are always checked.
        backend: None for the best available, or `"reference"`, `"cpu"` or `"triton"`.

    Returns:
        A `PolicyLoss`; its metrics have also `entropy_sum`, over unmasked tokens. Where a gradient is not wanted, or
        autograd is off, none is made.

    Raises:
        ValueError, TypeError: names, numbers, shapes, dtypes or values that are not allowed; the message says where.
        RuntimeError: the backend asked for cannot run here.

    Source: gradients before the upstream gradient is known, as in Liger's fused losses (arXiv 2410.10989).
    """

    def described() -> tuple[Inputs, options.Inputs, Work]:
        check_shapes(hidden, weight, targets, bias, temperature)
        kinds = options.make_kinds(surrogate, level, kl, sampler_correction)
        taus = (sapo_tau_pos, sapo_tau_neg)
        by = options.make_numbers(
            kinds, clip_low, clip_high, dual_clip, taus, covariance_coef, kl_coef, sampler_floor, sampler_cap
        )
        chosen = covariance_selected is not None
        options.check_companions(kinds, kl, sampler_correction, surrogate, ref_logprobs, sampler_logprobs, chosen)
        companions = dict(old_logprobs=old_logprobs, weights=weights, ref_logprobs=ref_logprobs)
        like = hidden.new_empty(len(targets), dtype=segments.working_dtype(hidden))
        options.check_token_shapes(like, advantages, sequence_offsets, sampler_logprobs=sampler_logprobs, **companions)
        options.check_selected(covariance_selected, like)
        if not -float("inf") < entropy_coef < float("inf"):
            raise ValueError(f"entropy_coef is {entropy_coef}; allowed: a finite number")
        temperatures, scalar = by_row(temperature)
        given = Inputs(hidden, weight, bias, targets, temperatures, scalar)
        rest = (sequence_offsets, ref_logprobs, sampler_logprobs, covariance_selected)
        tokens = options.Inputs(like, old_logprobs, advantages, weights, *rest).cast(like.dtype)
        needs = Needs(*(x is not None and x.requires_grad and torch.is_grad_enabled() for x in given[:3]))
        by_backend = dispatch.backend_for("linear_logprob", hidden, backend)
        work = Work(kinds, by, float(entropy_coef), needs, chunk_of(chunk, hidden.device.type), by_backend)
        if ranks is not None:
            check_split(work.backend, given, tokens)
            if ranks.heeds:
                check_tokens(tokens, kinds)
        return given, tokens, work

    ranks = None if group is None else parallel.ranks_of(group, check_values, hidden)
    given, tokens, work = described() if ranks is None else ranks.alike(described)
    if work.kinds.surrogate in options.BY_COVARIANCE and covariance_selected is None:
        tokens = tokens._replace(selected=_selected(given, tokens, surrogate, work, ranks))
    loss, metrics = _run(given, tokens, work, ranks, check_values)
    return PolicyLoss(loss, dict(zip(NAMES, metrics.unbind(0), strict=True)))
