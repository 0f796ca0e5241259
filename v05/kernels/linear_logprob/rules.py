"""What hidden states, output layer, targets, temperatures and chunk are allowed to be."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import segments
from v05.kernels.linear_logprob.inputs import Inputs
from v05.kernels.token_logprob.rules import check_rows

CPU_CHUNK, DEVICE_CHUNK = 2**25, 2**27  # logits that exist at a time
ROWS_CHECKED, COLUMNS_CHECKED = 64, 4096  # at a time, where bad logits are looked for


def chunk_of(chunk: int | None, device_type: str) -> int:
    """The number of logits that may exist at a time.

    Raises:
        ValueError: it is below 1, or not an int.
    """
    if chunk is None:
        return CPU_CHUNK if device_type == "cpu" else DEVICE_CHUNK
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk is {chunk!r}; allowed: None, or an int of at least 1")
    return chunk


def check_shapes(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float | Tensor
) -> None:
    """Raises where the tensors do not fit together; no element is read."""
    for name, matrix in (("hidden", hidden), ("weight", weight)):
        segments.check_tensor(name, matrix)
        if matrix.dim() != 2 or matrix.shape[1] == 0:
            raise ValueError(f"{name} has shape {list(matrix.shape)}; allowed: two dimensions, at least one column")
        if matrix.dtype not in segments.DTYPES:
            raise TypeError(f"{name} is {matrix.dtype}; allowed: {', '.join(map(str, segments.DTYPES))}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}; allowed: at least one row")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight has shape {list(weight.shape)}; allowed: [V, {hidden.shape[1]}], for that is hidden's"
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight is {weight.dtype}; allowed: {hidden.dtype}, as hidden is")
    if bias is not None:
        segments.check_vector("bias", bias, hidden, weight.shape[0])
    if weight.device != hidden.device:
        raise ValueError(f"weight is on {weight.device}; allowed: {hidden.device}, where hidden is")
    check_rows(targets, temperature, hidden, "hidden is")


def check_logits(given: Inputs, kept: Tensor) -> None:
    """Raises at the first row that counts and has a logit that is NaN or inf; waits for the device."""
    hidden, weight, bias, wide = given.hidden, given.weight, given.bias, given.wide

    def logits(rows: Tensor, columns: slice) -> Tensor:
        products = hidden[rows].to(wide) @ weight[columns].to(wide).t()
        return products if bias is None else products + bias[columns].to(wide)

    for rows in kept.nonzero().squeeze(1).split(ROWS_CHECKED):
        parts = [slice(first, first + COLUMNS_CHECKED) for first in range(0, given.columns, COLUMNS_CHECKED)]
        where = torch.cat([~(logits(rows, columns) < float("inf")) for columns in parts], 1).nonzero()
        if where.numel():
            row, column = int(rows[where[0, 0]]), int(where[0, 1])
            value = float(logits(rows[where[0, 0]][None], slice(column, column + 1)))
            raise ValueError(f"hidden[{row}] has the logit {value:g} by weight[{column}]; allowed: finite or -inf")
