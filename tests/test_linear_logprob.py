"""linear_logprob: hand-computed numbers, the oracle in every dtype, bits, memory."""

import math
import subprocess
import sys

import pytest
import torch
from linear_layers import BACKENDS, DTYPES, INF, compare, random_layer, run

from v05.kernels import linear_logprob, token_logprob
from v05.kernels.linear_logprob.cpu import Cpu
from v05.testing import error_against, poisoned_outputs


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def test_hand_computed(backend):
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0, 1.0], [math.log(3), 1.0]], dtype=torch.float64, requires_grad=True)
    logprob, entropy = linear_logprob(hidden, weight, torch.tensor([1, 0]), backend=backend)
    h = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert logprob.tolist() == pytest.approx([math.log(0.75), -math.log(2)])
    assert entropy.tolist() == pytest.approx([h, math.log(2)])
    by_hidden, by_weight = torch.autograd.grad(logprob.sum(), (hidden, weight), retain_graph=True)
    assert by_hidden.flatten().tolist() == pytest.approx([0.25 * math.log(3), 0, -0.5 * math.log(3), 0], abs=1e-15)
    assert by_weight.flatten().tolist() == pytest.approx([-0.25, 0.5, 0.25, -0.5])
    slope = 0.25 * (math.log(0.25) + h)
    by_weight = torch.autograd.grad(entropy.sum(), weight)[0]
    assert by_weight.flatten().tolist() == pytest.approx([-slope, 0, slope, 0], abs=1e-15)


@pytest.mark.parametrize("kind", ["normal", "peaked", "flat", "huge"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_as_exact_as_torch(kind, dtype, bias):
    if kind == "huge" and dtype == torch.float16:
        pytest.skip("a weight of float16 is not that large")
    compare(*random_layer(40, 96, 5003, kind, dtype, bias=bias))


@pytest.mark.parametrize("kind", ["normal", "peaked", "flat", "huge"])
def test_error_against_float64_of_bfloat16_inputs(kind):
    """Below 1e-5 of the value or of the largest logit, as which a float32 logit cannot be more exact."""
    hidden, weight, targets, _ = random_layer(64, 640, 9001, kind, torch.bfloat16)
    exact = run(hidden, weight, targets, None, "reference", torch.float64)
    largest = (hidden.nan_to_num(0).double() @ weight.double().t()).abs().amax(1)
    for result, truth in list(zip(run(hidden, weight, targets), exact, strict=True))[:2]:
        scale = truth.abs().clamp(min=1) if kind != "huge" else torch.maximum(truth.abs(), largest / 40).clamp(min=1)
        assert ((result - truth).abs() < 1e-5 * scale).all()


@pytest.mark.parametrize("columns", [1, 2, 7, 31, 33, 1000, 4095, 4096, 4097, 8193])
@pytest.mark.parametrize("features", [1, 3, 255, 257, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes(columns, features, dtype):
    compare(*random_layer(7, features, columns, dtype=dtype, seed=columns), temperature=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.05, 13.0, "rows"])
def test_temperatures(dtype, temperature):
    hidden, weight, targets, _ = random_layer(40, 64, 5000, dtype=dtype)
    rows = torch.linspace(0.2, 3, 40, dtype=torch.float64)
    rows[targets < 0] = float("nan")  # of an ignored row: must not matter
    compare(hidden, weight, targets, temperature=rows if temperature == "rows" else temperature)


@pytest.mark.parametrize("uses", [(1.0, 0.0), (0.0, 1.0)])
def test_each_gradient_alone(uses):
    compare(*random_layer(16, 40, 2100), uses=uses)


def test_only_one_output_and_one_input_used():
    hidden, weight, targets, bias = random_layer(6, 20, 40, bias=True)
    for field in range(2):
        for which in range(3):
            gradients = []
            for backend in BACKENDS:
                given = [x.clone().requires_grad_(i == which) for i, x in enumerate((hidden, weight, bias))]
                linear_logprob(*given[:2], targets, bias=given[2], backend=backend)[field].sum().backward()
                assert [x.grad is None for x in given] == [i != which for i in range(3)]
                gradients.append(given[which].grad)
            torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_gradcheck():
    hidden, weight, targets, bias = random_layer(4, 5, 9, dtype=torch.float64, bias=True)
    hidden = hidden.nan_to_num(0)

    def function(*given):
        return tuple(linear_logprob(*given[:2], targets, bias=given[2], temperature=1.3, backend="cpu"))

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in (hidden, weight, bias)])


def test_agrees_with_token_logprob():
    hidden, weight, targets, _ = random_layer(30, 50, 6001)
    logits = hidden.nan_to_num(0) @ weight.t()
    for actual, expected in zip(linear_logprob(hidden, weight, targets), token_logprob(logits, targets), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_are_exactly_zero_and_poison_nothing(backend, dtype):
    hidden, weight, _, _ = random_layer(4, 9, 30, dtype=dtype)
    hidden = hidden.nan_to_num(0.5)
    hidden[0], hidden[1, 2], hidden[2] = float("nan"), INF, -INF
    targets = torch.tensor([-100, -100, -100, 4])
    with poisoned_outputs():
        logprob, entropy, by_hidden, by_weight = run(hidden, weight, targets, backend=backend)
    assert logprob[:3].tolist() == entropy[:3].tolist() == [0, 0, 0]
    assert not by_hidden[:3].any()
    assert by_hidden[3].any()
    assert by_weight.isfinite().all()
    torch.testing.assert_close(logprob[3:], run(hidden[3:], weight, targets[3:], backend=backend)[0])


def test_every_row_ignored_and_another_ignore_index(backend):
    hidden, weight, _, _ = random_layer(3, 5, 8)
    outputs = run(hidden, weight, torch.full((3,), 2), backend=backend, ignore_index=2)
    assert not any(output.any() for output in outputs)


def test_no_rows(backend):
    outputs = run(torch.zeros(0, 7), torch.ones(9, 7), torch.zeros(0, dtype=torch.int64), backend=backend)
    assert [list(output.shape) for output in outputs] == [[0], [0], [0, 7], [9, 7]]
    assert not outputs[3].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_vocabulary(backend, dtype):
    hidden, weight = torch.ones(3, 2, dtype=dtype), torch.zeros(5000, 2, dtype=dtype)
    bias = torch.full((5000,), -INF, dtype=dtype)
    targets = torch.tensor([4500, 3, -100])
    logprob, entropy, *gradients = run(hidden, weight, targets, bias, backend)
    assert logprob.tolist() == [-INF, -INF, 0]
    assert entropy.tolist() == [0, 0, 0]
    bias[4500] = bias[4700] = 0
    logprob, entropy, *gradients = run(hidden, weight, targets, bias, backend)
    assert logprob.tolist() == pytest.approx([-math.log(2), -INF, 0])
    assert entropy.tolist() == pytest.approx([math.log(2), math.log(2), 0])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[2][4:4500].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("features", [96, 333])
def test_same_bits_whatever_else_is_in_the_batch(dtype, features):
    """Alone, in 20 other orders, beside other tokens, in other chunks, with other numbers of threads."""
    rows = 150
    hidden, weight, targets, _ = random_layer(rows, features, 9001, dtype=dtype)
    temperature = torch.linspace(0.5, 2, rows)
    whole = linear_logprob(hidden, weight, targets, temperature=temperature)
    threads = torch.get_num_threads()
    for seed in range(20):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[: rows - 7 * seed]
        torch.set_num_threads(1 + seed % 4)
        chunk = [None, 1, 5000, 40_000, 2**20][seed % 5]
        part = linear_logprob(hidden[order], weight, targets[order], temperature=temperature[order], chunk=chunk)
        assert all(torch.equal(*pair) for pair in zip(part, (values[order] for values in whole), strict=True))
    torch.set_num_threads(threads)
    for row in range(0, rows, 29):
        own = slice(row, row + 1)
        alone = linear_logprob(hidden[own], weight, targets[own], temperature=temperature[own])
        assert [value.item() for value in alone] == [value[row].item() for value in whole]


def test_gradients_have_the_same_bits_from_run_to_run_and_about_the_same_in_other_chunks():
    layer = random_layer(60, 70, 5000, bias=True)
    first = run(*layer)
    for chunk in (None, 20_000, 2000):
        chunked = [run(*layer, chunk=chunk) for _ in range(2)]
        assert all(torch.equal(*pair) for pair in zip(*chunked, strict=True))
        assert all(error_against(*pair) < 2e-6 for pair in zip(chunked[0], first, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_that_lie_apart(dtype):
    hidden, weight, targets, _ = random_layer(12, 40, 500, dtype=dtype)
    expected = run(hidden, weight, targets)
    wide = torch.cat([hidden, hidden], 1)
    layouts = [
        (wide[:, :40], weight),
        (hidden.t().contiguous().t(), weight.t().contiguous().t()),
        (hidden, torch.cat([weight, weight], 1)[:, 40:]),
    ]
    for layout in layouts:
        actual = run(*layout, targets)
        assert all(error_against(*pair) < 1e-6 for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (13, 33, 7), (5, 700, 513), (200, 40, 300), (97, 129, 1001)])
def test_products(dtype, shape):
    """The matrix product beside float64's: layouts, a wide left operand, and adding to what is there."""
    m, n, k = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    left, right = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    exact = left.double() @ right.double().t()
    for a in (left, left.t().contiguous().t(), left.to(wide)):
        for b in (right, right.t().contiguous().t()):
            out = torch.full((m, n + 3), float("nan"), dtype=wide)[:, :n]
            for times in (1, 2):
                Cpu().multiply(a, b, out, times > 1)
                assert ((out - times * exact).abs() < (1e-11 if wide == torch.float64 else 3e-6) * (9 + k)).all()


def test_memory_that_runs_out_in_a_thread_is_a_memory_error():
    """In a process of its own, whose threads are there before it may take no more memory."""
    pytest.importorskip("resource")
    script = """
import resource, torch
from v05.kernels import _cpu, token_logprob
torch.set_num_threads(2)
token_logprob(torch.zeros(64, 20_000), torch.zeros(64, dtype=torch.int64))
left, right, out = torch.ones(64, 512), torch.ones(4096, 512), torch.empty(64, 4096)

def multiply():
    operands = [(x.data_ptr(), *x.stride()) for x in (left, right)]
    _cpu.matrix_product(0, True, *operands, 64, 4096, 512, out.data_ptr(), 4096, False)

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
kept = []
try:
    while True:
        kept.append(bytearray(2**18))
except MemoryError:
    pass
try:
    multiply()
except MemoryError:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    multiply()
    print(out.unique().tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[512.0]\n"


def test_a_vocabulary_of_262144_and_its_memory():
    """Forward and backward in a process of its own: its largest resident size grows by far less than the logits."""
    script = """
import resource, torch
from v05.kernels import linear_logprob, linear_policy_loss
torch.set_num_threads(2)
T, V, H = 512, 262_144, 16
hidden, weight = torch.randn(T, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
targets, old = torch.randint(V, (T,)), torch.full((T,), -13.0)

def largest(rows):
    x = hidden[:rows]
    logprob, entropy = linear_logprob(x, weight, targets[:rows], chunk=2**20)
    (logprob.sum() + entropy.sum()).backward()
    offsets = torch.tensor([0, rows])
    loss = linear_policy_loss(x, weight, targets[:rows], old[:rows], torch.ones(1), torch.ones(rows),
                              sequence_offsets=offsets, chunk=2**20).loss
    loss.backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

print(largest(16))
print(largest(T))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    small, large = map(int, done.stdout.split())
    logits = 512 * 262_144 * 4
    assert large - small < logits / 8, f"{(large - small) / 2**20:.0f} MiB more; the logits are {logits / 2**20:.0f}"


def test_a_large_vocabulary_is_exact():
    compare(*random_layer(5, 24, 262_144, dtype=torch.bfloat16))


def test_opcheck():
    hidden, weight, targets, bias = random_layer(5, 8, 40, bias=True)
    hidden, temperatures = hidden.nan_to_num(0), torch.linspace(0.5, 2, 5)
    op = torch.ops.v05.linear_logprob.default
    for dtype in (torch.float32, torch.bfloat16):
        x, w, b = (given.to(dtype).requires_grad_() for given in (hidden, weight, bias))
        torch.library.opcheck(op, (x, w, None, targets, None, 0.9, -100, 4096, "cpu"))
        torch.library.opcheck(op, (x, w, b, targets, temperatures, 1.0, -100, 4096, "cpu"))


def test_compiles_without_a_break():
    hidden, weight, targets, bias = random_layer(6, 12, 50, bias=True)

    def loss(x, w, b):
        logprob, entropy = linear_logprob(x, w, targets, bias=b, temperature=0.8)
        return (logprob * torch.arange(6.0) + 0.3 * entropy).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        given = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        value = function(*given)
        results.append([value.detach(), *torch.autograd.grad(value, given)])
    for pair in zip(*results, strict=True):
        torch.testing.assert_close(*pair)
