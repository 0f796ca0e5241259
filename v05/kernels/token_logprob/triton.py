"""Log-probs in Triton: a row a program, one read of its logits forward, one read and one write backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v05.kernels import segments
from v05.kernels.device import on_device_of
from v05.kernels.token_logprob.rules import rows_of

BLOCK = 4096
WARPS = 8
LENGTHS = ["columns", "ignore_index"]  # a new one compiles nothing


@triton.jit
def inverse_temperature_of(temperatures, temperature, row, PER_ROW: tl.constexpr, acc: tl.constexpr):
    """1 / temperature of a row, in the dtype that is accumulated in."""
    if PER_ROW:
        value = tl.load(temperatures + row)
    else:
        value = tl.full([], temperature, tl.float64)
    return (1.0 / value).to(acc)


@triton.jit
def load_logits(logits, start, columns, acc: tl.constexpr, BLOCK_V: tl.constexpr):
    """Columns start to start + BLOCK_V of a row; -inf past its end."""
    o_column = start + tl.arange(0, BLOCK_V)
    m_column = o_column < columns
    return o_column, m_column, tl.load(logits + o_column, mask=m_column, other=float("-inf")).to(acc)


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    logits,
    targets,
    temperatures,
    logprob,
    entropy,
    statistics,
    stride: tl.int64,
    columns: tl.int64,
    ignore_index: tl.int64,
    temperature: tl.float64,
    PER_ROW: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Log-prob, entropy, largest logit and log of the sum of one row; sums are rescaled to the largest logit so far.

    Statistics: the largest logit of each row, then the log of each row's sum.
    """
    acc: tl.constexpr = logprob.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    log_sum = statistics + tl.num_programs(0).to(tl.int64)
    target = tl.load(targets + row)
    if target == ignore_index:
        tl.store(logprob + row, 0)
        tl.store(entropy + row, 0)
        tl.store(statistics + row, float("-inf"))
        tl.store(log_sum + row, 0)
    else:
        inverse = inverse_temperature_of(temperatures, temperature, row, PER_ROW, acc)
        logits += row * stride
        row_max = tl.full([], float("-inf"), acc)
        base = tl.full([], 0, acc)
        b_sum = tl.zeros([BLOCK_V], acc)
        b_weighted = tl.zeros([BLOCK_V], acc)
        for start in range(0, columns, BLOCK_V):
            _o_column, _m_column, b_logit = load_logits(logits, start, columns, acc, BLOCK_V)
            new_max = tl.maximum(row_max, tl.max(b_logit, axis=0))
            new_base = tl.where(new_max > float("-inf"), new_max, 0)
            shift = tl.where(row_max > float("-inf"), (base - new_base) * inverse, 0)
            factor = tl.exp(shift)
            b_gap = (b_logit - new_base) * inverse
            b_power = tl.exp(b_gap)
            b_weighted = tl.where(factor > 0, (b_weighted + b_sum * shift) * factor, 0)
            b_weighted += tl.where(b_power > 0, b_power * b_gap, 0)
            b_sum = b_sum * factor + b_power
            row_max = new_max
            base = new_base
        weighted = tl.sum(b_weighted, axis=0)
        total = tl.sum(b_sum, axis=0)
        some = (row_max > float("-inf")) | (total != total)
        log_total = tl.where(some, tl.log(tl.where(some, total, 1)), 0)
        inside = (target >= 0) & (target < columns)
        chosen = tl.load(logits + target, mask=inside, other=float("nan")).to(acc)
        tl.store(logprob + row, (chosen - base) * inverse - log_total)
        own_entropy = log_total - weighted / tl.where(some, total, 1)
        tl.store(entropy + row, tl.where(some & ~(own_entropy < 0), own_entropy, 0))
        tl.store(statistics + row, row_max)
        tl.store(log_sum + row, log_total)


@triton.jit(do_not_specialize=LENGTHS)
def backward_kernel(
    logits,
    targets,
    temperatures,
    entropy,
    statistics,
    grad_logprob,
    grad_entropy,
    grad_logits,
    stride: tl.int64,
    columns: tl.int64,
    ignore_index: tl.int64,
    temperature: tl.float64,
    PER_ROW: tl.constexpr,
    HAS_LOGPROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dz_j = [g_l (1[j = y] - p_j) - g_H p_j (log p_j + H)] / temperature of one row, written once."""
    acc: tl.constexpr = entropy.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    row_max = tl.load(statistics + row)
    inverse = tl.full([], 0, acc)
    if (target != ignore_index) & (row_max > float("-inf")):
        inverse = inverse_temperature_of(temperatures, temperature, row, PER_ROW, acc)
    by_logprob = tl.full([], 0, acc)
    by_entropy = tl.full([], 0, acc)
    if HAS_LOGPROB:
        by_logprob = tl.load(grad_logprob + row).to(acc)
    if HAS_ENTROPY:
        by_entropy = tl.load(grad_entropy + row).to(acc)
    silent = inverse == 0
    base = tl.where(silent, 0, row_max)
    own_entropy = tl.load(entropy + row)
    own_log_sum = tl.load(statistics + tl.num_programs(0).to(tl.int64) + row)
    logits += row * stride
    grad_logits += row * columns
    for start in range(0, columns, BLOCK_V):
        o_column, m_column, b_logit = load_logits(logits, start, columns, acc, BLOCK_V)
        b_log_p = (b_logit - base) * inverse - own_log_sum
        b_p = tl.exp(b_log_p)
        b_grad = tl.where(o_column == target, by_logprob, 0) - by_logprob * b_p
        b_grad -= tl.where(b_p > 0, by_entropy * b_p * (b_log_p + own_entropy), 0)
        b_grad = tl.where(silent, 0, b_grad * inverse)
        tl.store(grad_logits + o_column, b_grad.to(grad_logits.dtype.element_ty), mask=m_column)


def token_logprob(
    logits: Tensor, targets: Tensor, temperatures: Tensor | None, temperature: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as the CPU backend; one launch, no synchronisation."""
    logits, targets = rows_of(logits), targets.contiguous()
    temperatures = None if temperatures is None else temperatures.to(torch.float64).contiguous()
    dtype, (rows, columns) = segments.working_dtype(logits), logits.shape
    logprob, entropy = (torch.empty(rows, dtype=dtype, device=logits.device) for _ in range(2))
    statistics = torch.empty(2, rows, dtype=dtype, device=logits.device)
    if rows:
        with on_device_of(logits):
            forward_kernel[(rows,)](
                logits,
                targets,
                temperatures,
                logprob,
                entropy,
                statistics,
                logits.stride(0),
                columns,
                ignore_index,
                temperature,
                PER_ROW=temperatures is not None,
                BLOCK_V=BLOCK,
                num_warps=WARPS,
            )
    return logprob, entropy, statistics


def token_logprob_backward(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: Tensor,
    statistics: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logits: Tensor | None = None,
) -> Tensor:
    """Gradient `[T, V]` of the logits, in their dtype, or into a grad_logits without gaps, in its own."""
    logits, targets = rows_of(logits), targets.contiguous()
    temperatures = None if temperatures is None else temperatures.to(torch.float64).contiguous()
    rows, columns = logits.shape
    if grad_logits is None:
        grad_logits = torch.empty(rows, columns, dtype=logits.dtype, device=logits.device)
    if rows:
        with on_device_of(logits):
            backward_kernel[(rows,)](
                logits,
                targets,
                temperatures,
                entropy,
                statistics,
                None if grad_logprob is None else grad_logprob.contiguous(),
                None if grad_entropy is None else grad_entropy.contiguous(),
                grad_logits,
                logits.stride(0),
                columns,
                ignore_index,
                temperature,
                PER_ROW=temperatures is not None,
                HAS_LOGPROB=grad_logprob is not None,
                HAS_ENTROPY=grad_entropy is not None,
                BLOCK_V=BLOCK,
                num_warps=WARPS,
            )
    return grad_logits
