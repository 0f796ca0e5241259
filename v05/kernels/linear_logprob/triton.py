"""linear_logprob on a GPU: logits are made in Triton, forward and backward, and are never stored; the two products of
their gradient are torch's, slice by slice. There are two kernels for each way: one for sm_90 where its copy engine can
take the operands, one for all else.

A loss whose gradients are made in the forward pass stores the logits of some rows, which torch multiplies too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from v05.kernels.device import interpreting, on_device_of
from v05.kernels.linear_logprob import one_pass, passes
from v05.kernels.linear_logprob.inputs import Inputs
from v05.kernels.linear_logprob.one_pass import Derivative
from v05.kernels.linear_logprob.passes import Gradients, Needs
from v05.kernels.linear_logprob.tiles import HOPPER, SPLIT, Tile, architecture_of, hopper_tile_of, tile_for
from v05.kernels.linear_logprob.triton_gradient import gradient_kernel
from v05.kernels.linear_logprob.triton_hopper import sums_kernel
from v05.kernels.linear_logprob.triton_hopper_gradient import hopper_gradient_kernel
from v05.kernels.linear_logprob.triton_kernels import join_kernel, slice_kernel
from v05.kernels.token_logprob import triton as token_logprob
from v05.kernels.token_logprob.ranks import Ranks
from v05.kernels.token_logprob.rules import rows_of
from v05.kernels.token_logprob.softmax import SKIPPED, Partial, Softmax, finish, inverse_temperature, partial_of

ROWS_ADDED = 8192  # of a product that is added in a step of its own
ROWS_SUMMED = 32768  # at a time: what slices leave of more would take memory, and they keep a GPU busy
JOINED = {"BLOCK_M": 32, "BLOCK_S": 64}  # rows of one program, and slices at a time
LARGEST_FLOAT16 = 2.0**8  # of an upstream gradient scaled for float16: its sums have room above, its details below


@cache
def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of operands of this dtype to a float32 matrix; earlier ones refuse."""
    out, operand = (torch.zeros(16, 16, dtype=kind, device=device) for kind in (torch.float32, dtype))
    try:
        torch.addmm(out, operand, operand, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):
        return False
    return True


@contextmanager
def _wide_sums() -> Iterator[None]:
    """Has a product with few elements and long sums, which is put together from parts, round only the whole."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


class Gpu:
    """The engine of a GPU: torch's products with float32 sums, and token_logprob's kernels."""

    rounds = True
    widest = 32768

    def slice_width(self, columns: int) -> int:
        """Columns of logits in one product: all."""
        return columns

    def multiply(self, left: Tensor, right: Tensor, out: Tensor, adds: bool) -> None:
        """out `[m, n]` = left `[m, k]` times right `[n, k]` transposed, or is increased by it; sums are wide."""
        right = right.t()
        if not out.is_cuda:  # Triton's interpreter
            wide = torch.promote_types(out.dtype, torch.float32)
            out.copy_(torch.addmm(out.to(wide), left.to(wide), right.to(wide), beta=int(adds)))
        elif left.dtype == out.dtype:
            with _wide_sums():
                torch.addmm(out, left, right, out=out) if adds else torch.mm(left, right, out=out)
        elif not adds:
            torch.mm(left, right, out_dtype=out.dtype, out=out)
        elif _adds_in_place(out.device, left.dtype):
            torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
        else:
            for rows, sums in zip(left.split(ROWS_ADDED), out.split(ROWS_ADDED), strict=True):
                sums += torch.mm(rows, right, out_dtype=out.dtype)

    def statistics(self, logits: Tensor, given: Inputs) -> Partial:
        """Of one slice of logits."""
        return partial_of(token_logprob.token_logprob, logits, given)

    def join(self, slices: list[Partial], given: Inputs) -> Partial:
        """The only slice there is."""
        (whole,) = slices
        return whole

    def gradient(
        self,
        logits: Tensor,
        given: Inputs,
        softmax: Softmax,
        by_logprob: Tensor | None,
        by_entropy: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Gradient of the logits, rounded to the dtype of the operands that it is multiplied with."""
        out = torch.empty(logits.shape, dtype=given.weight.dtype, device=logits.device) if out is None else out
        saved = (softmax.entropy.contiguous(), softmax.statistics, by_logprob, by_entropy)
        rows = (logits, given.targets, given.temperatures, given.temperature, SKIPPED)
        return token_logprob.token_logprob_backward(*rows, *saved, out)

    def buffer_dtype(self, given: Inputs) -> torch.dtype:
        """That of the operands, for only the gradient is stored."""
        return given.weight.dtype

    def gradient_again(
        self, buffer: Tensor, given: Inputs, softmax: Softmax, by_logprob: Tensor | None, by_entropy: Tensor | None
    ) -> Tensor:
        """Gradient of the logits of one slice, in one launch; in float64, of logits that are stored."""
        if given.wide == torch.float64:
            passes.make_logits(self, given, buffer)
            return self.gradient(buffer, given, softmax, by_logprob, by_entropy)
        hidden, weight = rows_of(given.hidden), rows_of(given.weight)
        (rows, columns), has_bias = buffer.shape, given.bias is not None
        hopper = hopper_tile_of(hidden, weight, buffer)
        tile = hopper or tile_for(hidden, weight, has_bias)
        tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
        vectors = (None if given.bias is None else given.bias.contiguous(), given.targets, _temperatures(given, hopper))
        saved = (softmax.largest, softmax.log_sum, softmax.entropy, by_logprob, by_entropy)
        options = _launch(tile, given) | {
            "HAS_LOGPROB": by_logprob is not None,
            "HAS_ENTROPY": by_entropy is not None,
            "PIECES": tile.gradient_pieces,
        }
        sizes = (rows, columns, given.hidden.shape[1])
        with on_device_of(hidden):
            if hopper:
                out = TensorDescriptor.from_tensor(buffer, [tile.rows, tile.columns // tile.gradient_pieces])
                hopper_gradient_kernel[(min(tiles, _processors(hidden.device)),)](
                    *(*_descriptors(tile, hidden, weight), *vectors, *saved, out),
                    *(*sizes, given.temperature, SKIPPED),
                    **options,
                )
            else:
                strides = (hidden.stride(0), weight.stride(0))
                gradient_kernel[(tiles,)](
                    *(hidden, weight, *vectors, *saved, buffer),
                    *(*sizes, *strides, given.temperature, SKIPPED),
                    **options,
                )
        return buffer


def two_passes(given: Inputs, needs: Needs) -> bool:
    """Whether a loss by token is faster here with log-probs before gradients; the same on each rank of a group.

    On sm_90, whose kernels make logits as fast as cuBLAS makes products,
    a fourth product takes less than adding many pieces to a float32 copy of the weight's gradient.
    """
    if given.weight.dtype != torch.bfloat16:
        return False
    fast = given.weight.shape[1] % 8 == 0 and architecture_of(given.weight.device) in HOPPER
    return fast and needs.weight and not one_pass.keeps(Gpu(), given)


@cache
def _processors(device: torch.device) -> int:
    """Programs of a kernel in which each takes many tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _temperatures(given: Inputs, hopper: Tile | None) -> Tensor | None:
    """Those of rows as a kernel that makes logits takes them: divided already on sm_90."""
    return given.temperatures if hopper is None or given.temperatures is None else (1 / given.temperatures).float()


def _descriptors(tile: Tile, hidden: Tensor, weight: Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Both operands as the copy engine takes them."""
    return (
        TensorDescriptor.from_tensor(hidden, [tile.rows, tile.features]),
        TensorDescriptor.from_tensor(weight, [tile.columns, tile.features]),
    )


def _launch(tile: Tile, given: Inputs) -> dict[str, int]:
    """What both kernels that make logits are compiled with."""
    return {
        "PER_ROW": given.temperatures is not None,
        "HAS_BIAS": given.bias is not None,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.features,
        "INTERPRETED": interpreting(),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _partial(given: Inputs) -> Partial:
    """Of this rank's vocabulary: two launches, no synchronisation, and only rows that count are computed."""
    hidden, weight, device = rows_of(given.hidden), rows_of(given.weight), given.hidden.device
    rows, (columns, features) = len(given.targets), given.weight.shape
    hopper = hopper_tile_of(weight)
    tile = hopper or tile_for(hidden, weight, given.bias is not None)
    width = tile.columns if hopper else SPLIT
    blocks, splits = triton.cdiv(rows, tile.rows), triton.cdiv(columns, width)
    kept = given.targets != SKIPPED
    order = torch.argsort(kept.logical_not().to(torch.uint8), stable=True)
    partial = torch.empty(splits, 3, rows, dtype=torch.float32, device=device)
    joined = torch.empty(3, rows, dtype=torch.float32, device=device)
    chosen = torch.zeros(rows, dtype=torch.float32, device=device)
    bias = None if given.bias is None else given.bias.contiguous()
    vectors = (bias, given.targets, _temperatures(given, hopper), order, kept.sum(), partial, chosen)
    options, sizes = _launch(tile, given) | {"PIECES": tile.pieces}, (rows, columns, features)
    with on_device_of(hidden):
        if hopper:
            operands = _descriptors(tile, hidden.index_select(0, order), weight)
            programs = min(blocks * splits, _processors(device))
            sums_kernel[(programs,)](*operands, *vectors, *sizes, given.temperature, **options)
        else:
            strides = (hidden.stride(0), weight.stride(0))
            slice_kernel[(splits * blocks,)](
                *(hidden, weight, *vectors, *sizes, *strides, given.temperature), SPLIT=SPLIT, **options
            )
        join_kernel[(triton.cdiv(rows, JOINED["BLOCK_M"]),)](
            *(given.targets, given.temperatures, partial, joined, rows, splits, given.temperature, SKIPPED),
            PER_ROW=given.temperatures is not None,
            **JOINED,
        )
    return Partial(joined[0], joined[1], joined[2], chosen)


def forward(given: Inputs, chunk: int, ranks: Ranks | None = None) -> Softmax:
    """Log-prob, entropy and statistics `[T]`; float64, which tensor cores do not take here, by slices of logits."""
    rows = len(given.targets)
    if given.wide == torch.float64 or rows == 0:
        return passes.forward(Gpu(), given, chunk, ranks)
    if rows <= ROWS_SUMMED:
        return finish(given, _partial(given), ranks)
    parts = [_partial(given.at(slice(*ends))) for ends in passes.steps(rows, ROWS_SUMMED)]
    return finish(given, Partial(*(torch.cat(field) for field in zip(*parts, strict=True))), ranks)


def backward(
    given: Inputs,
    softmax: Softmax,
    by_logprob: Tensor | None,
    by_entropy: Tensor | None,
    needs: Needs,
    chunk: int,
) -> Gradients:
    """Gradients from those of log-prob and entropy; in float16, scaled by a power of two that fits it meanwhile."""
    if given.weight.dtype != torch.float16 or len(given.targets) == 0:
        return passes.backward(Gpu(), given, softmax, by_logprob, by_entropy, needs, chunk)
    upstream = [None if values is None else values * inverse_temperature(given) for values in (by_logprob, by_entropy)]
    largest = torch.stack([values.abs().nan_to_num(0).max() for values in upstream if values is not None]).max()
    scale = torch.exp2(torch.where(largest > 0, (LARGEST_FLOAT16 / largest).log2().floor().clamp(-60, 60), 0))
    scaled = [None if values is None else (values * scale).to(values.dtype) for values in (by_logprob, by_entropy)]
    return passes.backward(Gpu(), given, softmax, scaled[0], scaled[1], needs, chunk, scale)


def forward_backward(
    some: Inputs, derivative: Derivative, needs: Needs, chunk: int, ranks: Ranks | None = None
) -> tuple[Softmax, Gradients]:
    """Log-probs and gradients of a loss of them, rows by rows."""
    return one_pass.forward_backward(Gpu(), some, derivative, needs, chunk, ranks)
