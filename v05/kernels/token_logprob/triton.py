"""Log-probs in Triton: a row a program, one read of its logits forward, one read and one write backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v05.kernels import segments
from v05.kernels.device import on_device_of
from v05.kernels.token_logprob.rules import rows_of

BLOCK, WARPS = 4096, 8
BACKWARD_BLOCK, BACKWARD_WARPS = 2048, 4
LOG2_E = tl.constexpr(1.4426950408889634)
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
def unit_of(acc: tl.constexpr):
    """power(unit * x) is e^x: powers of 2 are what a GPU has, but in float64."""
    return tl.full([], 1.0 if acc == tl.float64 else LOG2_E, acc)


@triton.jit
def power(x):
    """See unit_of."""
    return tl.exp(x) if x.dtype == tl.float64 else tl.exp2(x)


@triton.jit
def finite(x):
    """x, or where its power is 0 a number of which that is true as well: what is multiplied with that power must not be
    infinite. NaN stays NaN."""
    least: tl.constexpr = -1000.0 if x.dtype == tl.float64 else -160.0
    return tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def raised(total, weighted, largest, new_largest, scale):
    """The sums of powers, plain and times their exponents, relative to a maximum at least as large; without a maximum
    they stay as they are, 0 or NaN."""
    shift = tl.where(largest > float("-inf"), finite((largest - new_largest) * scale), 0)
    factor = power(shift)
    return total * factor, (weighted + total * shift) * factor


@triton.jit
def with_more(b_max, b_sum, b_weighted, b_logit, scale):
    """Maxima and sums of the rows of a block, with those of another block."""
    new_max = tl.maximum(b_max, tl.max(b_logit, axis=1))
    b_sum, b_weighted = raised(b_sum, b_weighted, b_max, new_max, scale)
    b_exponent = finite((b_logit - tl.where(new_max > float("-inf"), new_max, 0)[:, None]) * scale)
    b_power = power(b_exponent)
    return new_max, b_sum + tl.sum(b_power, axis=1), b_weighted + tl.sum(b_power * b_exponent, axis=1)


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
        scale = inverse * unit_of(acc)
        logits += row * stride
        LANE: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth  # 16 bytes, summed up by one thread
        b_max = tl.full([BLOCK_V // LANE], float("-inf"), acc)
        b_sum = tl.zeros([BLOCK_V // LANE], acc)
        b_weighted = tl.zeros([BLOCK_V // LANE], acc)
        o_place = tl.arange(0, BLOCK_V // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
        whole = columns.to(tl.int32) // BLOCK_V * BLOCK_V  # in blocks without a mask, whose loads are wide
        for start in range(0, whole, BLOCK_V):
            b_logit = tl.load(logits + start + o_place).to(acc)
            b_max, b_sum, b_weighted = with_more(b_max, b_sum, b_weighted, b_logit, scale)
        if whole < columns:
            b_logit = tl.load(logits + whole + o_place, mask=whole + o_place < columns, other=float("-inf")).to(acc)
            b_max, b_sum, b_weighted = with_more(b_max, b_sum, b_weighted, b_logit, scale)
        row_max = tl.max(b_max, axis=0)
        b_sum, b_weighted = raised(b_sum, b_weighted, b_max, row_max, scale)
        total = tl.sum(b_sum, axis=0)
        weighted = tl.sum(b_weighted, axis=0) / unit_of(acc)
        base = tl.where(row_max > float("-inf"), row_max, 0)
        some = (row_max > float("-inf")) | (total != total)
        log_total = tl.where(some, tl.log(tl.where(some, total, 1)), 0)
        inside = (target >= 0) & (target < columns)
        chosen = tl.load(logits + target, mask=inside, other=float("nan")).to(acc)
        tl.store(logprob + row, (chosen - base) * inverse - log_total)
        own_entropy = log_total - weighted / tl.where(some, total, 1)
        tl.store(entropy + row, tl.where(some & ~(own_entropy < 0), own_entropy, 0))
        tl.store(statistics + row, row_max)
        tl.store(log_sum + row, log_total)


@triton.jit
def slopes(b_logit, row_max, scale, log_total, level, slope):
    """p (level - slope y), where y = log p in the unit of `power`."""
    b_log_p = finite((b_logit - row_max) * scale - log_total)
    return power(b_log_p) * (level - slope * b_log_p)


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
    grad_stride: tl.int64,
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
    kind: tl.constexpr = grad_logits.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    row_max = tl.load(statistics + row)
    logits += row * stride
    grad_logits += row * grad_stride
    o_place = tl.arange(0, BLOCK_V)
    whole = columns.to(tl.int32) // BLOCK_V * BLOCK_V  # in blocks without a mask, whose loads and stores are wide
    idle = (target == ignore_index) | (row_max == float("-inf"))
    by_logprob = tl.full([], 0, acc)
    by_entropy = tl.full([], 0, acc)
    if HAS_LOGPROB:
        by_logprob = tl.load(grad_logprob + row).to(acc)
    if HAS_ENTROPY:
        by_entropy = tl.load(grad_entropy + row).to(acc)
    if idle | ((by_logprob == 0) & (by_entropy == 0)):  # whatever the row holds
        for start in range(0, whole, BLOCK_V):
            tl.store(grad_logits + start + o_place, tl.zeros([BLOCK_V], kind))
        if whole < columns:
            tl.store(grad_logits + whole + o_place, tl.zeros([BLOCK_V], kind), mask=whole + o_place < columns)
    else:
        inverse = inverse_temperature_of(temperatures, temperature, row, PER_ROW, acc)
        by_logprob *= inverse
        by_entropy *= inverse
        log_total = tl.load(statistics + tl.num_programs(0).to(tl.int64) + row) * unit_of(acc)
        level = -by_logprob - by_entropy * tl.load(entropy + row)
        slope = by_entropy / unit_of(acc)
        scale = inverse * unit_of(acc)
        for start in range(0, whole, BLOCK_V):
            b_logit = tl.load(logits + start + o_place).to(acc)
            b_grad = slopes(b_logit, row_max, scale, log_total, level, slope)
            b_grad += tl.where(start + o_place == target, by_logprob, 0)
            tl.store(grad_logits + start + o_place, b_grad.to(kind))
        if whole < columns:
            m_column = whole + o_place < columns
            b_logit = tl.load(logits + whole + o_place, mask=m_column, other=float("-inf")).to(acc)
            b_grad = slopes(b_logit, row_max, scale, log_total, level, slope)
            b_grad += tl.where(whole + o_place == target, by_logprob, 0)
            tl.store(grad_logits + whole + o_place, b_grad.to(kind), mask=m_column)


def block_of(logits: Tensor) -> int:
    """Columns at a time of the forward pass: fewer in float64, for which there are no registers."""
    return BLOCK if logits.element_size() < 8 else BLOCK // 2


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
                BLOCK_V=block_of(logits),
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
                grad_logits.stride(0),
                columns,
                ignore_index,
                temperature,
                PER_ROW=temperatures is not None,
                HAS_LOGPROB=grad_logprob is not None,
                HAS_ENTROPY=grad_entropy is not None,
                BLOCK_V=BACKWARD_BLOCK,
                num_warps=BACKWARD_WARPS,
            )
    return grad_logits
