"""The public `policy_loss`: surrogate, level of the ratio, KL and sampler correction in one pass over packed tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from v05.kernels import dispatch, segments
from v05.kernels.custom import custom_op, transforms
from v05.kernels.policy_loss import reference
from v05.kernels.policy_loss.covariance import select_by_covariance
from v05.kernels.policy_loss.options import (
    BY_COVARIANCE,
    METRICS,
    Inputs,
    Kinds,
    Numbers,
    check_companions,
    check_selected,
    check_token_shapes,
    check_token_values,
    make_kinds,
    make_numbers,
)


class PolicyLoss(NamedTuple):
    """`loss`: a scalar, the weighted sum, differentiable in the log-probs. `metrics`: sums by name, scalars without
    gradient on the device, to be added up over micro-batches and ranks.

    All but `sequences` (those with an unmasked token) are sums over unmasked tokens: `tokens`, `ratio_sum` (of the
    level's ratio), `log_ratio_sum` (of `l - o`; minus its mean estimates the KL from old to new), `clipped_low`,
    `clipped_high` and `dual_clipped` (tokens that a bound held back), `kl_sum`, `sampler_weight_sum` (`tokens` where
    nothing is corrected), `sampler_masked` and `covariance_selected`.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


@custom_op("v05::policy_loss")
def _policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    offsets: Tensor,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
    selected: Tensor | None,
    kinds: Sequence[int],
    numbers: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = dispatch.implementation("policy_loss", backend).policy_loss
    tensors = (logprobs, old_logprobs, advantages, weights, offsets, ref_logprobs, sampler_logprobs, selected)
    return run(Inputs(*tensors), Kinds(*kinds), Numbers(*numbers))


@_policy_loss.register_fake
def _(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    offsets: Tensor,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
    selected: Tensor | None,
    kinds: Sequence[int],
    numbers: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return logprobs.new_empty(()), logprobs.new_empty(logprobs.numel()), logprobs.new_empty(len(METRICS))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[2])  # but not the gradient, through which a second derivative is refused
    ctx.backend = inputs[-1]


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    if grad_loss is None or gradient is None:
        return (None,) * 11
    scaled = scaled_at_once(ctx, gradient, grad_loss)
    return (gradient * grad_loss if scaled is None else scaled, *[None] * 10)


# Whether the present backward keeps its graph, in which case a stored gradient must stay as it is.
_kept: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def scaled_at_once(ctx: Any, gradient: Tensor, grad_loss: Tensor) -> Tensor | None:
    """The stored gradient of a loss times that of the loss, in place; where that is 1, without a pass over it.

    What is returned is the caller's to write into, so that neither is possible where the graph is kept, nor where the
    stored gradient may be known to somebody as an output of the op.

    Returns:
        None where it is not possible.
    """
    plain = type(grad_loss) is Tensor and getattr(ctx, "direct", False)
    if not plain or torch.compiler.is_compiling() or transforms() or _kept():
        return None
    return dispatch.implementation("policy_loss", ctx.backend).scale_(gradient.detach(), grad_loss)


_policy_loss.register_autograd(_backward, setup_context=_save)


def loss_of(given: Inputs, kinds: Kinds, by: Numbers, check_values: bool, backend: str | None) -> PolicyLoss:
    """Checks shapes, casts to the working dtype and runs the backend."""
    logprobs, old_logprobs, advantages, weights, offsets, ref_logprobs, sampler_logprobs, selected = given
    companions = dict(ref_logprobs=ref_logprobs, sampler_logprobs=sampler_logprobs)
    check_token_shapes(logprobs, advantages, offsets, old_logprobs=old_logprobs, weights=weights, **companions)
    check_selected(selected, logprobs)
    inputs = given.cast(segments.working_dtype(logprobs))
    chosen = dispatch.backend_for("policy_loss", logprobs, backend)
    if check_values or (chosen == "reference" and segments.readable(logprobs)):
        check_token_values(inputs, kinds)
    if chosen == "reference":
        loss, metrics = reference.policy_loss(inputs, kinds, by)
    else:
        loss, _, metrics = _policy_loss(*inputs, list(kinds), list(by), chosen)
    return PolicyLoss(loss, dict(zip(METRICS, metrics.unbind(0), strict=True)))


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    sequence_offsets: Tensor,
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
    check_values: bool = False,
    backend: str | None = None,
) -> PolicyLoss:
    """Sums `weights * (sampler weight * surrogate + kl_coef * KL)` over packed tokens, and stores the gradient.

    A log-ratio `x` is cut off at 20 nats either way, without gradient beyond. Two equal values, -inf included, have
    ratio 1. A token of weight 0 is masked: whatever else it holds counts for nothing.

    Args:
        logprobs: `[T]` floating, in nats, under the policy in training; others are cast to its working dtype.
        old_logprobs: `[T]`, under the policy that the ratio refers to, `exp(x)`, `x = logprobs - old_logprobs`.
        advantages: `[N]`, one per sequence, or `[T]`, one per token; where N is T they are per sequence.
        weights: `[T]`, finite: mask and aggregation in one; made for the whole batch, so that splits add up.
        sequence_offsets: `[N+1]` int64, ascending from 0 to T; sequences may be empty.
        surrogate: `"ppo"`, `"cispo"`, `"sapo"`, `"gpg"` (or `"reinforce"`: no ratio), `"clip_cov"` or `"kl_cov"`.
        level: of the ratio; `"sequence"` takes the mean of x over unmasked tokens (GSPO), gradient through the mean.
        clip_low, clip_high: the ratio is clipped below `1 - clip_low` and above `1 + clip_high` (ppo, cispo, clip_cov).
        dual_clip: None, or c > 1: the loss of ppo is at most `c |A|` where A < 0.
        ref_logprobs: `[T]`, under the reference; needed by, and only allowed with, a kl.
        kl: `"none"`, `"k1"`, `"k2"` or `"k3"`, with the gradient of that value (only k2's is, on average, that of the
            KL); `"k1+"` and `"k3+"` have that value and the gradient of k2. k3 cuts its log-ratio off at 20 nats.
        kl_coef: of the KL.
        sampler_logprobs: `[T]`, as the sampler reported them; needed by, and only allowed with, a correction.
        sampler_correction: `"token_truncate"`: min(ratio, cap) of old policy to sampler; `"token_mask"`: the ratio
            between floor and cap, else 0; `"sequence_truncate"`, `"sequence_mask"`: the same of the product over a
            sequence's unmasked tokens. Not differentiated; weighs the surrogate, not the KL.
        sampler_cap, sampler_floor: the bounds of that ratio; the floor is 1 / cap by default.
        sapo_tau_pos, sapo_tau_neg: temperatures of sapo where A > 0, and elsewhere.
        covariance_selected: `[T]` bool from `select_by_covariance`; None selects from this call's tokens alone.
        covariance_coef: kl_cov adds this times `|x|` to the loss of selected tokens.
        check_values: check values on a device too, which waits for it; on the CPU they are always checked.
        backend: None for the best available, or `"reference"`, `"cpu"`, `"triton"`, `"cuda"`.

    Returns:
        A `PolicyLoss`, float32 or, for float64 logprobs, float64.

    Raises:
        ValueError, TypeError: names, numbers, shapes, dtypes or values that are not allowed; the message says where.
        RuntimeError: the backend asked for cannot run here.

    Source: csrc/formulas.h names the paper of each surrogate and KL; GSPO is arXiv 2507.18071.
    """
    kinds = make_kinds(surrogate, level, kl, sampler_correction)
    taus = (sapo_tau_pos, sapo_tau_neg)
    by = make_numbers(kinds, clip_low, clip_high, dual_clip, taus, covariance_coef, kl_coef, sampler_floor, sampler_cap)
    chosen = covariance_selected is not None
    check_companions(kinds, kl, sampler_correction, surrogate, ref_logprobs, sampler_logprobs, chosen)
    if kinds.surrogate in BY_COVARIANCE and not chosen:
        covariance_selected = select_by_covariance(
            logprobs,
            old_logprobs,
            advantages,
            weights,
            sequence_offsets=sequence_offsets,
            surrogate=surrogate,
            clip_low=clip_low,
            clip_high=clip_high,
        )
    tensors = (logprobs, old_logprobs, advantages, weights, sequence_offsets)
    given = Inputs(*tensors, ref_logprobs, sampler_logprobs, covariance_selected)
    return loss_of(given, kinds, by, check_values, backend)
