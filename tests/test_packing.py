"""Padded tensors to packed tokens and back: against loops over rows, in value and gradient."""

import pytest
import torch

from v05.packing import Layout

MASKS = {
    "right": [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]],
    "left": [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]],
    "holes": [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 1]],
    "empty rows": [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]],
    "nothing": [[0, 0, 0, 0]],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("extra", [(), (3,)])
def test_rows_end_to_end_and_back(mask, dtype, extra):
    keep = torch.tensor(mask).bool()
    values = torch.randn(*keep.shape, *extra, dtype=torch.float64)
    layout = Layout.of(keep.to(dtype))
    rows = [row[chosen] for row, chosen in zip(values, keep, strict=True)]
    packed = layout.pack(values)
    torch.testing.assert_close(packed, torch.cat(rows), rtol=0, atol=0)
    assert layout.counts.tolist() == [len(row) for row in rows]
    assert layout.sequence_offsets.tolist() == [0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist()]
    assert layout.rows.tolist() == [row for row, count in enumerate(layout.counts.tolist()) for _ in range(count)]
    back = layout.unpack(packed, fill=-7.0)
    masked = keep.view(*keep.shape, *[1] * len(extra))
    torch.testing.assert_close(back, torch.where(masked, values, -7.0), rtol=0, atol=0)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_gradients_against_finite_differences(mask):
    layout = Layout.of(torch.tensor(mask))
    values = torch.randn(len(mask), 4, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(len(layout.positions), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda padded: layout.pack(padded).sin(), (values,))
    assert torch.autograd.gradcheck(lambda tokens: layout.unpack(tokens, fill=0.5).sin(), (packed,))


def test_what_is_masked_may_be_nan():
    mask = torch.tensor([[False, True, True], [True, False, False]])
    values = torch.where(mask, torch.arange(6.0).view(2, 3), torch.nan).requires_grad_()
    layout = Layout.of(mask)
    layout.pack(values).square().sum().backward()
    assert values.grad.tolist() == [[0.0, 2.0, 4.0], [6.0, 0.0, 0.0]]


def test_one_layout_serves_tokens_and_flags():
    layout = Layout.of(torch.tensor([[1, -1, 0], [0, 2, 0]]))  # what is not 0 is kept
    tokens = torch.tensor([[5, 6, 0], [0, 7, 0]])
    assert layout.pack(tokens).tolist() == [5, 6, 7]
    assert layout.unpack(layout.pack(tokens)).dtype == torch.int64
    assert layout.unpack(layout.pack(tokens > 5)).tolist() == [[False, True, False], [False, True, False]]


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match=r"mask has shape \[3\]; allowed: \[B, L\]"):
        Layout.of(torch.ones(3))
    layout = Layout.of(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"values has shape \[3, 2\]; allowed: \[2, 3\]"):
        layout.pack(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"values has shape \[2, 4, 1\]; allowed: \[2, 3\]"):
        layout.pack(torch.ones(2, 4, 1))
    with pytest.raises(ValueError, match=r"packed has shape \[5\]; allowed: 6"):
        layout.unpack(torch.ones(5))


def test_a_batch_of_no_width():
    layout = Layout.of(torch.ones(2, 0))
    assert layout.pack(torch.ones(2, 0)).shape == (0,)
    assert layout.unpack(torch.ones(0)).shape == (2, 0)
    assert layout.rows.tolist() == []
