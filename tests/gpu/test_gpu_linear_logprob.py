"""linear_logprob and linear_policy_loss on the device against float64: dtypes, sizes, bits, graphs, memory."""

import itertools
import math

import pytest
import torch
from common import DEVICE, DRY_RUN, DTYPES, INFINITY, allocated, assert_same_bits, needs_gpu, on_device, scaled
from linear import (
    BACKENDS,
    KERNELS,
    Layer,
    assert_near,
    layer_of,
    run_linear_logprob,
    run_linear_policy_loss,
)

from v05.kernels import linear_logprob, linear_policy_loss
from v05.kernels.policy_loss.options import LEVELS
from v05.testing import error_against, poisoned_outputs


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def compare(run, backend, data, **options):
    exact = run("reference", data, torch.float64, **options)
    same = run("reference", data, **options)
    with poisoned_outputs():
        actual = run(backend, data, **options)
    assert_near(actual, same, exact)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "features", "columns"),
    [
        *((1, 1, 1), (7, 40, 33), (130, 128, 4096), (300, 1000, 4097), (257, 1024, 32001), (128, 2560, 151936)),
        *((1, 8, 8), (1, 64, 264), (150, 72, 1000), (5, 256, 70_000), (700, 200, 33_288), (33_100, 32, 520)),
    ],
)
def test_sizes(backend, dtype, rows, features, columns):
    """In 2 bytes sm_90's kernels take rows that begin at multiples of 16 bytes, here with ragged last tiles too."""
    if rows * columns > scaled(rows * columns, 40_000):
        pytest.skip("too large for a dry run")
    compare(run_linear_logprob, backend, layer_of(rows, features, columns, dtype, seed=columns), temperature=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_temperatures_and_bias(backend, dtype, bias):
    data = layer_of(scaled(300, 20), 72, scaled(5000, 400), dtype)
    rows = torch.linspace(0.4, 3, len(data.targets), dtype=torch.float64, device=DEVICE)
    rows[data.targets < 0] = math.nan  # of an ignored row: must not matter
    own = torch.linspace(-3, 3, len(data.weight), device=DEVICE).to(dtype) if bias else None
    compare(run_linear_logprob, backend, data, temperature=rows, bias=own)


@pytest.mark.parametrize("kind", ["peaked", "flat", "huge"])
@pytest.mark.parametrize("backend", KERNELS)
def test_error_of_bfloat16_inputs(backend, kind):
    """Below 1e-5 of the value, or of what a float32 logit of that size can tell."""
    data = layer_of(scaled(256, 32), scaled(2048, 64), scaled(32000, 600), torch.bfloat16)
    weight = data.weight.clone()
    if kind == "peaked":
        weight[::50] *= 10
    elif kind == "flat":
        weight[:] = weight[0]
    else:
        weight *= 1000
    data = data._replace(weight=weight)
    with torch.no_grad():
        actual = linear_logprob(*data, backend=backend)
        exact = linear_logprob(data.hidden.double(), weight.double(), data.targets, backend="reference")
    largest = (data.hidden.nan_to_num(0).double() @ weight.double().t()).abs().max()
    scale = max(1.0, float(largest) / 40)
    errors = [error_against(a / scale, b / scale) for a, b in zip(actual, exact, strict=True)]
    assert max(errors) < 1e-5, errors


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_in_any_company(backend, dtype):
    """Alone, in 20 other orders, beside other rows: a row's log-prob has the same bits."""
    if DRY_RUN and backend == "triton":
        pytest.skip("the interpreter's products depend on the place in a tile")
    rows = scaled(700, 60)
    hidden, weight, targets = layer_of(rows, scaled(1024, 64), scaled(9001, 603), dtype)
    whole = linear_logprob(hidden, weight, targets, temperature=0.7, backend=backend)
    for seed in range(scaled(20, 3)):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[: rows - 13 * seed].to(DEVICE)
        part = linear_logprob(hidden[order], weight, targets[order], temperature=0.7, backend=backend)
        for name, value in part._asdict().items():
            assert torch.equal(value, getattr(whole, name)[order])
    for row in (0, rows // 2, rows - 1):
        own = slice(row, row + 1)
        alone = linear_logprob(hidden[own], weight, targets[own], temperature=0.7, backend=backend)
        assert [value.item() for value in alone] == [value[row].item() for value in whole]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("run", [run_linear_logprob, run_linear_policy_loss])
def test_same_bits_every_time(backend, run):
    data = layer_of(scaled(500, 20), 256, scaled(9001, 300), torch.bfloat16)
    first = run(backend, data, chunk=scaled(2**20, 900))
    for _ in range(scaled(30, 2)):
        assert_same_bits(run(backend, data, chunk=scaled(2**20, 900)), first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("chunk", [None, 30_000])
@pytest.mark.parametrize("features", [scaled(96, 8), scaled(100, 6), scaled(256, 32)])
def test_policy_loss(backend, dtype, level, chunk, features):
    """In bfloat16 with logits made twice on sm_90, summed up in float32, and with the gradients of all logits kept."""
    data = layer_of(scaled(300, 30), features, scaled(9001, 400), dtype)
    compare(run_linear_policy_loss, backend, data, level=level, chunk=chunk)


@pytest.mark.parametrize("backend", KERNELS)
def test_matrices_that_lie_apart(backend):
    hidden, weight, targets = layer_of(40, 96, 700, torch.bfloat16)
    expected = linear_logprob(hidden, weight, targets, backend=backend)
    wide = torch.cat([hidden, hidden], 1)
    for layout in ((wide[:, :96], weight), (hidden, weight.t().contiguous().t()), (wide[:, 96:], weight)):
        actual = linear_logprob(*layout, targets, backend=backend)
        assert all(error_against(*pair) < 1e-6 for pair in zip(actual, expected, strict=True))


def test_no_rows_and_none_that_counts(backend):
    data = layer_of(0, 16, 70)
    assert run_linear_logprob(backend, data)["by_weight"].count_nonzero() == 0
    data = layer_of(24, 16, 70)
    ignored = data._replace(targets=torch.full_like(data.targets, -100))
    assert not any(value.any() for value in run_linear_logprob(backend, ignored).values())


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_values_come_out_as_nan_or_are_named_where_asked_for(dtype):
    """Unless asked to check values, nothing waits for the device: then NaN must come out, not a number."""
    hidden, weight, targets = layer_of(8, 32, 5000, dtype)
    hidden[2, 3] = math.nan
    targets[3] = 5000
    for kernel in KERNELS:
        result = linear_logprob(hidden, weight, targets, backend=kernel)
        assert result.logprob[2:4].isnan().all()
        assert result.logprob[4:].isfinite().all()
        with pytest.raises(ValueError, match=r"targets\[3\] is 5000; allowed: 0 to 4999"):
            linear_logprob(hidden, weight, targets, check_values=True, backend=kernel)
        with pytest.raises(ValueError, match=r"hidden\[2\] has the logit nan by weight\[0\]"):
            linear_logprob(hidden, weight, targets.clamp(max=4999), check_values=True, backend=kernel)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("run", [run_linear_logprob, run_linear_policy_loss])
@pytest.mark.parametrize(("rows", "columns"), [(200, 5000), (300, 5003)])
def test_the_host_does_not_wait_and_a_graph_replays(run, dtype, rows, columns):
    data = layer_of(rows, 128, columns, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run("triton", data)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run("triton", data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run("triton", data)
    for _ in range(2):
        data.hidden.copy_(data.hidden.roll(8, 0))
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(replayed, run("triton", data))


@needs_gpu
def test_a_new_number_of_rows_or_columns_compiles_nothing(monkeypatch):
    import triton

    compiled = []
    for rows, columns in ((64, 64), (65, 67)):
        run_linear_logprob("triton", layer_of(rows, 64, columns, torch.bfloat16))
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **told: compiled.append(told["repr"]))
    for rows, columns in itertools.product((1, 2, 16, 100, 1000), (1, 2, 16, 4096, 9001)):
        run_linear_logprob("triton", layer_of(rows, 64, columns, torch.bfloat16))
    assert not compiled


@needs_gpu
@pytest.mark.parametrize("rows", [2048, 4096])
@pytest.mark.parametrize("run", [run_linear_logprob, run_linear_policy_loss])
def test_memory(run, rows):
    """Under 1 GiB beside inputs and gradients, where logits and their gradient would take 5 GiB; and given back."""
    data = layer_of(rows, 1024, 151_936, torch.bfloat16)
    gradients = data.hidden.nbytes + data.weight.nbytes
    run("triton", layer_of(64, 1024, 500, torch.bfloat16))
    before = allocated()
    torch.cuda.reset_peak_memory_stats()
    run("triton", data)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - gradients
    # gradients made in the forward pass are summed up in a float32 copy of the weight, or kept in as much
    extra -= 4 * data.weight.numel() if run is run_linear_policy_loss else 0
    assert extra < 2**30, f"{extra / 2**20:.0f} MiB"
    assert allocated() <= before


@pytest.mark.large
@pytest.mark.parametrize("backend", KERNELS)
def test_more_than_2_31_logits_and_elements_of_the_weight(backend):
    """Sampled against float64: rows times columns, and the weight's own elements, beyond what 32 bits count."""
    for rows, features, columns in ((2**31 // 131_072 + 17, 64, 131_080), (70, 8_320, 262_144)):
        rows, features, columns = scaled(rows, 20), scaled(features, 32), scaled(columns, 300)
        rng = torch.Generator(DEVICE).manual_seed(0)
        hidden = torch.randn(rows, features, generator=rng, device=DEVICE, dtype=torch.bfloat16)
        weight = torch.randn(columns, features, generator=rng, device=DEVICE, dtype=torch.bfloat16) / features**0.5
        targets = torch.randint(columns, (rows,), generator=rng, device=DEVICE)
        targets[-1] = columns - 1
        data = Layer(hidden, weight, targets)
        actual = run_linear_logprob(backend, data)
        sample = torch.tensor([0, rows // 2, rows - 1], device=DEVICE)
        logits = torch.cat([hidden[sample].double() @ part.double().t() for part in weight.split(16384)], 1)
        log_p = torch.log_softmax(logits, 1)
        exact = log_p.gather(1, targets[sample][:, None])[:, 0]
        assert error_against(actual["logprob"][sample], exact) < 1e-5
        assert error_against(actual["entropy"][sample], -(log_p.exp() * log_p).sum(1)) < 1e-5
        assert all(bool(value.isfinite().all()) for value in actual.values())
        assert actual["by_weight"][-1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_vocabulary(backend, dtype):
    data = on_device(
        Layer(torch.ones(3, 16, dtype=dtype), torch.zeros(5000, 16, dtype=dtype), torch.tensor([4500, 3, -100]))
    )
    bias = torch.full((5000,), -INFINITY, device=DEVICE, dtype=dtype)
    bias[4500] = bias[4700] = 0
    result = run_linear_logprob(backend, data, bias=bias)
    assert result["logprob"].tolist() == pytest.approx([-math.log(2), -INFINITY, 0])
    assert result["entropy"].tolist() == pytest.approx([math.log(2), math.log(2), 0])
    assert all(value.isfinite().all() for name, value in result.items() if name != "logprob")


def test_gradients_off_make_none(backend):
    hidden, weight, targets = layer_of(20, 16, 70)
    ones = torch.ones(20, device=DEVICE)
    with torch.no_grad():
        offsets = torch.tensor([0, 20], device=DEVICE)
        weights = torch.where(targets >= 0, ones, 0)
        result = linear_policy_loss(
            hidden, weight, targets, -4 * ones, ones[:1], weights, sequence_offsets=offsets, backend=backend
        )
    assert not result.loss.requires_grad
    assert result.loss.isfinite()
