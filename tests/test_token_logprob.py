"""token_logprob: hand-computed numbers, the oracle in every dtype, masked vocabularies, batch invariance."""

import math

import pytest
import torch
from scipy.special import log_softmax
from token_rows import BACKENDS, DTYPES, INF, compare, random_rows, run

from v05.kernels import token_logprob
from v05.testing import poisoned_outputs


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def test_hand_computed(backend):
    logits = torch.tensor([[0.0, math.log(3)], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    logprob, entropy = token_logprob(logits, torch.tensor([1, 0]), backend=backend)
    h = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert logprob.tolist() == pytest.approx([math.log(0.75), -math.log(2)])
    assert entropy.tolist() == pytest.approx([h, math.log(2)])
    by_logprob = torch.autograd.grad(logprob.sum(), logits, retain_graph=True)[0]
    assert by_logprob.flatten().tolist() == pytest.approx([-0.25, 0.25, 0.5, -0.5])
    by_entropy = torch.autograd.grad(entropy.sum(), logits)[0]
    slope = 0.25 * (math.log(0.25) + h)
    assert by_entropy.flatten().tolist() == pytest.approx([-slope, slope, 0, 0], abs=1e-15)


def test_temperature_divides_logits(backend):
    logits = torch.tensor([[0.0, math.log(9)]] * 2, dtype=torch.float64)
    targets = torch.tensor([1, 1])
    halved = token_logprob(logits, targets, temperature=2.0, backend=backend)
    assert halved.logprob.tolist() == pytest.approx([math.log(0.75)] * 2)
    per_row = token_logprob(logits, targets, temperature=torch.tensor([2.0, 1.0]), backend=backend)
    assert per_row.logprob.tolist() == pytest.approx([math.log(0.75), math.log(0.9)])


@pytest.mark.parametrize("kind", ["normal", "peaked", "flat", "huge", "masked"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_torch(kind, dtype):
    if kind == "huge" and dtype == torch.float16:
        logits, targets = random_rows(24, 3001, "normal", dtype)
        compare(logits * 1000, targets)
    else:
        compare(*random_rows(24, 3001, kind, dtype))


@pytest.mark.parametrize("columns", [1, 2, 7, 31, 32, 33, 1000, 1024, 1025, 2047, 2048, 2049, 50257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vocabulary_sizes(columns, dtype):
    compare(*random_rows(7, columns, "normal", dtype, seed=columns), temperature=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.05, 0.7, 13.0, "rows"])
def test_temperatures(dtype, temperature):
    logits, targets = random_rows(40, 2500, dtype=dtype)
    rows = torch.linspace(0.2, 3, 40, dtype=torch.float64)
    rows[targets < 0] = float("nan")  # of an ignored row: must not matter
    compare(logits, targets, temperature=rows if temperature == "rows" else temperature)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_each_gradient_alone(weights):
    compare(*random_rows(16, 2100), weights=weights)


def test_only_one_output_used():
    logits, targets = random_rows(6, 40)
    for field in range(2):
        gradients = []
        for backend in BACKENDS:
            x = logits.clone().requires_grad_()
            token_logprob(x, targets, backend=backend)[field].sum().backward()
            gradients.append(x.grad)
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_agrees_with_scipy():
    logits, targets = random_rows(50, 4099)
    targets = targets.clamp(min=0)
    truth = torch.from_numpy(log_softmax(logits.double().numpy() / 0.8, axis=1))
    logprob, entropy = token_logprob(logits, targets, temperature=0.8)
    assert (logprob - truth.gather(1, targets[:, None])[:, 0]).abs().max() < 2e-6
    assert (entropy + (truth.exp() * truth).sum(1)).abs().max() < 2e-6


def test_gradcheck():
    logits, targets = random_rows(3, 5, dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(token_logprob(x, targets, temperature=1.3, backend="cpu")), logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_are_exactly_zero_whatever_they_hold(backend, dtype):
    logits, _ = random_rows(4, 9, dtype=dtype)
    logits[0, 3], logits[1, 2], logits[2] = float("nan"), INF, -INF
    targets = torch.tensor([-100, -100, -100, 4])
    with poisoned_outputs():
        logprob, entropy, gradient = run(logits, targets, backend)
    assert logprob[:3].tolist() == entropy[:3].tolist() == [0, 0, 0]
    assert not gradient[:3].any()
    assert logprob[3] < 0
    assert gradient[3].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_an_upstream_gradient_has_none_whatever_becomes_of_it(dtype):
    logits, targets = random_rows(3, 5003, dtype=dtype)
    logits.requires_grad_()
    outputs = token_logprob(logits, targets)
    logits.data[1] = float("nan")
    with poisoned_outputs():
        upstream = [torch.tensor([1, 0, 2], dtype=values.dtype) for values in outputs]
        (gradient,) = torch.autograd.grad(outputs, logits, upstream)
    assert not gradient[1].any()
    assert gradient[::2].any(1).all()


def test_every_row_ignored_and_another_ignore_index(backend):
    logits, _ = random_rows(3, 5)
    outputs = run(logits, torch.full((3,), 2), backend, ignore_index=2)
    assert not any(output.any() for output in outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_vocabulary(backend, dtype):
    logits = torch.tensor([[-INF, 0, 0], [-INF, 0, 0], [-INF] * 3, [-INF, 2.0, -INF]], dtype=dtype)
    targets = torch.tensor([1, 0, 2, 1])
    logprob, entropy, gradient = run(logits, targets, backend)
    assert logprob.tolist() == pytest.approx([-math.log(2), -INF, -INF, 0])
    assert entropy.tolist() == pytest.approx([math.log(2), math.log(2), 0, 0])
    assert gradient.isfinite().all()
    assert gradient[0, 0] == 0
    assert not gradient[2:].any()


@pytest.mark.parametrize("first", [0, 1999, 2048, 4096])
def test_a_maximum_that_arrives_late(first):
    """The online maximum is raised block after block, from -inf on."""
    logits = torch.linspace(-600, 300, 6000).repeat(2, 1)
    logits[:, :first] = -INF
    compare(logits, torch.tensor([5999, 5000]))
    compare(logits.flip(1).contiguous(), torch.tensor([0, 700]))


def test_extreme_magnitudes():
    largest = torch.finfo(torch.float32).max
    logits = torch.tensor([[largest, -largest, 0.0], [-largest, -largest, -largest], [largest, largest, -INF]])
    for temperature in (1e-6, 1.0, 1e6):
        logprob, entropy, gradient = run(logits, torch.tensor([0, 1, 1]), "cpu", temperature=temperature)
        assert logprob.tolist() == pytest.approx([0, -math.log(3), -math.log(2)])
        assert entropy.tolist() == pytest.approx([0, math.log(3), math.log(2)])
        assert gradient.isfinite().all()


def test_no_rows(backend):
    outputs = run(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), backend)
    assert [list(output.shape) for output in outputs] == [[0], [0], [0, 7]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_lie_apart(dtype):
    wide, targets = random_rows(12, 3000, dtype=dtype)
    targets = targets.clamp(max=2499)
    expected = run(wide[:, :2500].contiguous(), targets, "cpu")
    layouts = [wide[:, :2500], wide.repeat_interleave(2, 0)[::2, :2500], wide[:, :2500].t().contiguous().t()]
    for layout in layouts:
        assert all(torch.equal(*pair) for pair in zip(run(layout, targets, "cpu"), expected, strict=True))
    repeated = wide[:1, :2500].expand(5, -1)
    assert torch.equal(*(token_logprob(x, targets[:5].abs()).logprob for x in (repeated, repeated.contiguous())))


def test_strided_rows_are_not_copied(monkeypatch):
    wide, targets = random_rows(4, 3000)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("copied") if self.dim() == 2 else self)
    token_logprob(wide[:, :2500], targets.clamp(max=2499))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_whatever_else_is_in_the_batch(dtype):
    logits, targets = random_rows(64, 5003, dtype=dtype)
    whole = run(logits, targets, "cpu", weights=(torch.arange(64), torch.arange(64)))
    threads = torch.get_num_threads()
    for seed in range(20):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[: 64 - seed]
        torch.set_num_threads(1 + seed % 4)
        x = logits[order].requires_grad_()
        parts = token_logprob(x, targets[order])
        for part, expected in zip(parts, whole, strict=False):
            assert torch.equal(part, expected[order])
    torch.set_num_threads(threads)
    for row in range(0, 64, 9):
        shifted = torch.cat([logits.new_zeros(row + 1), logits[row]])[row + 1 :][None]  # another address alignment
        alone = token_logprob(shifted, targets[row : row + 1])
        assert [value.item() for value in alone] == [value[row].item() for value in whole[:2]]


def test_same_bits_of_the_gradient_and_from_run_to_run():
    logits, targets = random_rows(32, 3001)
    upstream = torch.randn(32)

    def gradient(rows):
        x = logits[rows].requires_grad_()
        logprob, entropy = token_logprob(x, targets[rows])
        (upstream[rows] * (logprob - 0.1 * entropy)).sum().backward()
        return x.grad

    whole = gradient(torch.arange(32))
    for seed in range(20):
        order = torch.randperm(32, generator=torch.Generator().manual_seed(seed))[: 1 + seed]
        assert torch.equal(gradient(order), whole[order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_converted_exactly(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    every = every[every < INF]
    logits = torch.stack([every, torch.zeros_like(every)], 1)
    logprob, _ = token_logprob(logits, torch.zeros(len(every), dtype=torch.int64))
    wide, _ = token_logprob(logits.float(), torch.zeros(len(every), dtype=torch.int64))
    assert torch.equal(logprob, wide)
    # the gradient of a flat row of two is half the upstream gradient: every rounding of a float to half shows in it
    upstream = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=torch.Generator().manual_seed(0))
    upstream = upstream.to(torch.int32).view(torch.float32)
    upstream = upstream[upstream.isfinite() & (upstream.abs() > 1e-30)] / 2
    upstream = torch.cat([upstream, torch.logspace(-9, 6, 200_000), torch.tensor([131008.0, 131040.0])])
    flat = torch.zeros(len(upstream), 2, dtype=dtype, requires_grad=True)
    token_logprob(flat, torch.zeros(len(upstream), dtype=torch.int64)).logprob.backward(upstream)
    assert torch.equal(flat.grad[:, 1], (-upstream / 2).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_upstream_reaches_its_row_only(dtype):
    x = torch.zeros(2, 5, dtype=dtype, requires_grad=True)
    logprob, _ = token_logprob(x, torch.tensor([1, 2]))
    logprob.backward(torch.tensor([float("nan"), 1.0], dtype=logprob.dtype))
    assert x.grad[0].isnan().all()
    assert x.grad[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leaf", [False, True])
def test_a_gradient_in_place_has_the_same_bits_and_the_memory_of_the_logits(dtype, leaf):
    source, targets = random_rows(37, 5003, dtype=dtype)
    expected = source.clone().requires_grad_()
    sum(values.sum() for values in token_logprob(expected, targets)).backward()
    given = source.clone().requires_grad_()
    logits = given if leaf else given * 1
    sum(values.sum() for values in token_logprob(logits, targets, inplace_backward=True)).backward()
    assert torch.equal(given.grad, expected.grad)
    assert torch.equal(logits, expected.grad)


def test_logits_that_are_gone_are_not_read_again():
    source, targets = random_rows(5, 100)
    logits = source.requires_grad_() * 1
    other = (logits * logits).sum()  # keeps them for its own backward
    logprob = token_logprob(logits, targets, inplace_backward=True).logprob.sum()
    logprob.backward(retain_graph=True)
    for lost in (logprob, other):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            lost.backward()


def test_rows_that_lie_apart_get_a_gradient_of_their_own():
    wide, targets = random_rows(5, 100)
    before = wide.clone()
    logits = wide[:, :50].requires_grad_()
    token_logprob(logits, targets % 50, inplace_backward=True).logprob.sum().backward()
    assert torch.equal(wide, before)
    assert logits.grad.shape == logits.shape


def test_opcheck():
    logits, targets = random_rows(5, 40)
    temperatures = torch.linspace(0.5, 2, 5)
    op = torch.ops.v05.token_logprob.default
    for dtype in (torch.float32, torch.bfloat16):
        x = logits.to(dtype).requires_grad_()
        torch.library.opcheck(op, (x, targets, None, 0.9, -100, False, "cpu"))
        torch.library.opcheck(op, (x, targets, temperatures, 1.0, -100, True, "cpu"))


def test_compiles_without_a_break():
    logits, targets = random_rows(6, 50)

    def loss(x):
        logprob, entropy = token_logprob(x, targets, temperature=0.8)
        return (logprob * torch.arange(6.0) + 0.3 * entropy).sum()

    compiled = torch.compile(loss, fullgraph=True)
    values, gradients = [], []
    for function in (loss, compiled):
        x = logits.clone().requires_grad_()
        value = function(x)
        value.backward()
        values.append(value.detach())
        gradients.append(x.grad)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)
