"""token_logprob on the device against float64: dtypes, vocabularies, temperatures, rows, alignment and bits."""

import math

import pytest
import torch
from common import (
    BACKENDS,
    DEVICE,
    DTYPES,
    INFINITY,
    KERNELS,
    Rows,
    assert_same_bits,
    compare,
    on_device,
    rows_of,
    run_token_logprob,
    scaled,
)

from v05.kernels import token_logprob
from v05.testing import poisoned_outputs


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 2, 7, 8, 33, 1000, 2047, 4096, 4097, 16385, 32000, 151936])
def test_vocabularies(backend, dtype, columns):
    if columns > scaled(columns, 4097):
        pytest.skip("too long for a dry run")
    compare(run_token_logprob, backend, rows_of(16, columns, dtype, seed=columns), temperature=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.05, 13.0, "rows"])
def test_temperatures(backend, dtype, temperature):
    data = rows_of(40, 2500, dtype)
    rows = torch.linspace(0.2, 3, 40, dtype=torch.float64, device=DEVICE)
    rows[data.targets < 0] = math.nan  # of an ignored row: must not matter
    compare(run_token_logprob, backend, data, temperature=rows if temperature == "rows" else temperature)


@pytest.mark.parametrize("use", ["logprob", "entropy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_gradient_alone(backend, use, dtype):
    compare(run_token_logprob, backend, rows_of(16, 2100, dtype), use=use)


@pytest.mark.parametrize("first", [0, 1999, 2048, 4096])
def test_a_maximum_that_arrives_late(backend, first):
    logits = torch.linspace(-600, 300, 6000).repeat(2, 1)
    logits[:, :first] = -INFINITY
    compare(run_token_logprob, backend, on_device(Rows(logits, torch.tensor([5999, 5000]))))
    compare(run_token_logprob, backend, on_device(Rows(logits.flip(1).contiguous(), torch.tensor([0, 700]))))


@pytest.mark.parametrize("backend", KERNELS)
def test_extreme_magnitudes(backend):
    largest = torch.finfo(torch.float32).max
    logits = torch.tensor([[largest, -largest, 0.0], [-largest, -largest, -largest], [largest, largest, -INFINITY]])
    data = on_device(Rows(logits, torch.tensor([0, 1, 1])))
    for temperature in (1e-6, 1.0, 1e6):
        result = run_token_logprob(backend, data, temperature=temperature)
        assert result["logprob"].tolist() == pytest.approx([0, -math.log(3), -math.log(2)])
        assert result["entropy"].tolist() == pytest.approx([0, math.log(3), math.log(2)], abs=1e-6)
        assert result["gradient"].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_than_a_grid_axis_holds_blocks(backend, dtype):
    compare(run_token_logprob, backend, rows_of(scaled(70_001, 50), 65, dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_in_place_has_the_same_bits(kernel, dtype):
    data = rows_of(24, 3001, dtype)
    expected = run_token_logprob(kernel, data)
    own = data._replace(logits=data.logits.clone())
    assert_same_bits(run_token_logprob(kernel, own, inplace_backward=True), expected)


def test_no_rows_and_none_that_counts(backend):
    compare(run_token_logprob, backend, rows_of(0, 7))
    data = rows_of(24, 70)
    ignored = data._replace(targets=torch.full_like(data.targets, -100))
    assert not any(value.any() for value in compare(run_token_logprob, backend, ignored).values())


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_same_bits_wherever_the_rows_lie(backend, dtype, offset):
    """Slices of something wider, begun at an address that no 16-byte load can take, and transposed."""
    data = rows_of(9, 2501, dtype)
    expected = run_token_logprob(backend, data)
    wide = torch.full((9, 2600), math.nan, dtype=dtype, device=DEVICE)
    wide[:, offset : offset + 2501] = data.logits
    odd = torch.full((9 * 2503 + offset,), math.nan, dtype=dtype, device=DEVICE)[offset:].view(9, 2503)
    odd[:, :2501] = data.logits
    for logits in (wide[:, offset : offset + 2501], odd[:, :2501], data.logits.t().contiguous().t()):
        assert_same_bits(run_token_logprob(backend, data._replace(logits=logits)), expected)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_any_company(backend, dtype):
    data = rows_of(64, scaled(5003, 603), dtype)
    whole = run_token_logprob(backend, data)
    for seed in range(scaled(20, 3)):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[: 64 - 3 * seed].to(DEVICE)
        other = Rows(data.logits[order], data.targets[order])
        expected = {name: value[order] for name, value in whole.items()}
        assert_same_bits(run_token_logprob(backend, other), expected)


@pytest.mark.skipif("cpu" in BACKENDS, reason="refused on the CPU")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rest", [0.0, -INFINITY])
@pytest.mark.parametrize("column", [0, 3, 7, 2047, 4100, 5002])
def test_a_bad_logit_is_seen(value, rest, column):
    """Unless asked to check values, nothing waits for the device: then NaN must come out, not a number."""
    logits = torch.full((1, 5003), rest)
    logits[0, 1], logits[0, column] = 0.5, value
    data = on_device(Rows(logits, torch.tensor([1])))
    for backend in KERNELS:
        result = run_token_logprob(backend, data)
        assert result["logprob"].isnan().all(), backend
        assert result["entropy"].isnan().all(), backend


@pytest.mark.parametrize(
    ("column", "value", "target", "temperature", "message"),
    [
        (3, math.nan, 2, 1.0, r"logits\[1, 3\] is nan; allowed: finite or -inf"),
        (4, math.inf, 2, 1.0, r"logits\[1, 4\] is inf"),
        (0, 0.0, 5, 1.0, r"targets\[1\] is 5; allowed: 0 to 4, or ignore_index -100"),
        (0, 0.0, -1, 1.0, r"targets\[1\] is -1"),
        (0, 0.0, 1, 0.0, r"temperature\[1\] is 0"),
    ],
)
def test_bad_values_are_named_where_asked_for(backend, column, value, target, temperature, message):
    logits = torch.zeros(2, 5)
    logits[1, column] = value
    logits, targets, rows = (
        given.to(DEVICE) for given in (logits, torch.tensor([0, target]), torch.tensor([1.0, temperature]))
    )
    with pytest.raises(ValueError, match=message):
        token_logprob(logits, targets, temperature=rows, check_values=True, backend=backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_that_the_loss_masks_may_hold_anything(backend, dtype, inplace):
    """Their upstream gradient is 0: so is theirs, and no other row's bits change."""
    source = torch.randn(6, 3001, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    upstream = torch.tensor([1.5, 0, -1, 0, 2, 0], device=DEVICE)
    gradients = []
    for held in (0.5, math.nan):
        logits = source.clone()
        logits[1::2] = held
        with poisoned_outputs():
            outputs = token_logprob(
                logits.requires_grad_(), torch.arange(6, device=DEVICE), inplace_backward=inplace, backend=backend
            )
            weighed = [upstream.to(values.dtype) for values in outputs]
            gradients += torch.autograd.grad(outputs, logits, weighed)
    assert not gradients[1][1::2].any()
    assert gradients[1][::2].any(1).all()
    assert torch.equal(*gradients)


@pytest.mark.parametrize("share", [1e-3, 1e-6])
def test_the_gradient_of_a_target_that_is_nearly_certain(share):
    """1 - p, of a p whose rounding would leave it few digits, has all those of the log-prob. CUDA's, as the CPU's."""
    logits = torch.zeros(1, 2501, device=DEVICE)
    logits[0, 7] = math.log(2500 / share)
    logprob, _ = token_logprob(logits.requires_grad_(), torch.tensor([7], device=DEVICE), backend="cuda")
    logprob.sum().backward()
    torch.testing.assert_close(logits.grad[0, 7], -logprob[0].detach().double().expm1().float(), rtol=1e-6, atol=0)
