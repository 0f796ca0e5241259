"""Tokens whose gradient is 0 take no part in the products that make gradients, and what is left keeps its bits."""

import pytest
import torch
from linear_layers import random_layer
from test_linear_policy_loss import COLUMNS, FEATURES, companions, make
from test_linear_policy_loss import run as run_loss

from v05.kernels import linear_logprob, linear_policy_loss
from v05.kernels.linear_logprob.cpu import Cpu
from v05.testing import FLOORS, assert_as_exact_as, error_against, poisoned_outputs

ROWS = 40
NAN = float("nan")


@pytest.fixture
def multiplied(monkeypatch):
    """The multiplications of each product from now on."""
    found, plain = [], Cpu.multiply

    def counting(self, left, right, out, adds):
        found.append(left.shape[0] * left.shape[1] * right.shape[0])
        plain(self, left, right, out, adds)

    monkeypatch.setattr(Cpu, "multiply", counting)
    return found


def upstream(silent, which=(0, 1), dtype=torch.float32):
    """Gradients of log-prob and entropy, 0 in silent rows; of one of them alone, a row of a 0 has a gradient still."""
    rng = torch.Generator().manual_seed(1)
    both = list(torch.randn(2, ROWS, generator=rng, dtype=torch.float64).to(dtype))
    for place in which:
        both[place][silent] = 0 if place else -0.0
    return both


def gradients(layer, by, poisoned=None, dtype=None, only=None, **options):
    """Of hidden, weight and bias; poisoned rows of hidden are NaN when the backward reads them."""
    hidden, weight, targets, bias = layer
    given = [x.to(dtype or x.dtype, copy=True).requires_grad_() for x in (hidden, weight, bias)]
    outputs = linear_logprob(*given[:2], targets, bias=given[2], **options)
    if poisoned is not None:
        given[0].data[poisoned] = NAN
    used = [place for place in (0, 1) if only in (None, place)]
    with poisoned_outputs():
        return torch.autograd.grad(
            [outputs[place] for place in used], given, [by[place].to(outputs.logprob.dtype) for place in used]
        )


def layer_and_silent(dtype=torch.float32):
    """A layer some of whose rows are ignored, and rows beside those whose gradient shall be 0."""
    layer = random_layer(ROWS, FEATURES, COLUMNS, dtype=dtype, bias=True)
    return layer, torch.arange(ROWS) % 5 < 2


@pytest.mark.parametrize("dtype", list(FLOORS))
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("chunk", [None, 20_000])
def test_against_float64(dtype, which, chunk):
    layer, silent = layer_and_silent(dtype)
    by = upstream(silent, which)
    actual = gradients(layer, by, chunk=chunk)
    same, exact = (gradients(layer, by, backend="reference", dtype=kind) for kind in (None, torch.float64))
    for result, like, truth in zip(actual, same, exact, strict=True):
        assert_as_exact_as(result, like, truth, 3 * max(FLOORS[dtype], error_against(like, truth)))
    assert bool(actual[0][silent].any()) == (len(which) < 2)


@pytest.mark.parametrize("dtype", list(FLOORS))
@pytest.mark.parametrize("only", [None, 0, 1])
def test_what_a_row_without_a_gradient_holds_does_not_matter(dtype, only):
    layer, silent = layer_and_silent(dtype)
    by = upstream(silent)
    expected = gradients(layer, by, only=only)
    for value, same in zip(gradients(layer, by, silent, only=only), expected, strict=True):
        assert torch.equal(value, same)
    assert not expected[0][silent].any()
    assert all(value.any() for value in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [None, 20_000])
def test_the_other_rows_keep_their_bits_and_the_products_shrink(dtype, chunk, multiplied):
    layer, silent = layer_and_silent(dtype)
    counts, none = layer[2] >= 0, torch.zeros_like(silent)
    whole = gradients(layer, upstream(none), chunk=chunk)[0]
    for rows in (none, silent, torch.arange(ROWS) > 6, ~none):
        multiplied.clear()
        made = gradients(layer, upstream(rows), chunk=chunk)[0]
        assert sum(multiplied) == int(counts.sum() + 3 * (counts & ~rows).sum()) * COLUMNS * FEATURES
        assert torch.equal(made[~rows], whole[~rows])
        assert not made[rows].any()


@pytest.mark.parametrize("dtype", list(FLOORS))
def test_no_row_with_a_gradient(dtype):
    layer, _ = layer_and_silent(dtype)
    every = torch.ones(ROWS, dtype=torch.bool)
    made = gradients(layer, upstream(every), every)
    assert [value.shape for value in made] == [layer[0].shape, layer[1].shape, layer[3].shape]
    assert not any(value.any() for value in made)


def test_a_gradient_that_is_not_a_number_is_not_taken_for_0():
    layer, silent = layer_and_silent()
    by, row = upstream(silent), int((silent & (layer[2] >= 0)).nonzero()[0])
    by[1][row] = NAN
    assert gradients(layer, by)[0].isnan().all(1).nonzero().flatten().tolist() == [row]


def test_second_derivatives_are_refused_still():
    layer, silent = layer_and_silent()
    hidden = layer[0].nan_to_num(0).requires_grad_()
    logprob = linear_logprob(hidden, layer[1], layer[2]).logprob
    (first,) = torch.autograd.grad(logprob, hidden, upstream(silent)[0], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprob has a first derivative in reverse mode alone"):
        first.sum().backward()


def halved(data):
    """Every other sequence with an advantage of 0."""
    advantages = data.advantages.clone()
    advantages[::2] = 0
    return data._replace(advantages=advantages)


def moved(layer, data, **options):
    """Tokens that have a gradient, by the reference."""
    return run_loss(layer, data, "reference", torch.float64, **options)[2].ne(0).any(1)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [None, 5 * COLUMNS, 1])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_losses_against_float64(level, dtype, chunk, entropy_coef):
    (*matrices, targets), data = make(sequences=20)
    layer, data = (*(x.to(dtype) for x in matrices), targets), halved(data)
    options = dict(level=level, entropy_coef=entropy_coef)
    exact = run_loss(layer, data, "reference", torch.float64, **options)
    with poisoned_outputs():
        actual = run_loss(layer, data, chunk=chunk, **options)
    for result, truth in zip(actual, exact, strict=True):
        assert error_against(result, truth) < (1e-5 if result.itemsize > 2 else 2e-2)


@pytest.mark.parametrize("chunk", [None, 3 * COLUMNS])
@pytest.mark.parametrize("advantages", [0, 1, 2])
def test_products_of_a_loss_shrink_and_bits_stay(chunk, advantages, multiplied):
    """With the tokens that are clipped, and those whose advantage is 0: some, all, and all of the first steps."""
    layer, data = make(sequences=20)
    given = [data, halved(data), data._replace(advantages=torch.zeros_like(data.advantages))][advantages]
    whole = run_loss(layer, data, chunk=chunk)
    multiplied.clear()
    made = run_loss(layer, given, chunk=chunk)
    left, counts = moved(layer, given), data.weights != 0
    assert sum(multiplied) == (int(counts.sum()) + 2 * int(left.sum())) * COLUMNS * FEATURES
    assert int(left.sum()) < int(counts.sum())
    assert torch.equal(made[2][left], whole[2][left])
    assert not made[2][~left].any()


def test_steps_without_a_gradient_at_the_beginning_and_the_end():
    layer, data = make(sequences=20)
    for part in (slice(0, 12), slice(8, 20), slice(4, 16)):
        advantages = data.advantages.clone()
        advantages[part] = 0
        some = data._replace(advantages=advantages)
        exact = run_loss(layer, some, "reference", torch.float64)
        for result, truth in zip(run_loss(layer, some, chunk=2 * COLUMNS), exact, strict=True):
            assert error_against(result, truth) < 1e-5


def test_autocast():
    (hidden, weight, bias, targets), data = make(sequences=20)
    data = halved(data)
    options = dict(sequence_offsets=data.sequence_offsets, **companions(data))
    rest = (targets, data.old_logprobs, data.advantages, data.weights)
    made = []
    for kind in (torch.float32, torch.bfloat16):
        own = [x.to(kind).requires_grad_() for x in (hidden, weight, bias)]
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.float32):
            loss = linear_policy_loss(*own[:2], *rest, bias=own[2], **options).loss
        made.append(torch.autograd.grad(loss, own))
    assert all(torch.equal(ours, half.float()) for ours, half in zip(*made, strict=True))


def test_compiles():
    (hidden, weight, _, targets), data = make(sequences=6, columns=60)
    hidden, targets, data = hidden.nan_to_num(0), targets.clamp(max=59), halved(data)
    rest = (targets, data.old_logprobs, data.advantages, data.weights)
    keep = (torch.arange(len(targets)) % 2).float()

    def loss(x, w):
        fused = linear_policy_loss(x, w, *rest, sequence_offsets=data.sequence_offsets).loss
        return fused + (linear_logprob(x, w, targets).logprob * keep).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        given = [x.clone().requires_grad_() for x in (hidden, weight)]
        results.append(torch.autograd.grad(function(*given), given))
    for pair in zip(*results, strict=True):
        torch.testing.assert_close(*pair)
