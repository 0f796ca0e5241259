"""More elements than a 32-bit number counts, and more blocks than 65,535: sampled against float64."""

import pytest
import torch
from common import BACKENDS, DEVICE, KERNELS, Rows, assert_close, run_policy_loss, run_token_logprob, scaled, widened

from v05.testing import RaggedTokens, error_against, poisoned_outputs

pytestmark = pytest.mark.large


def needs(gigabytes):
    """Skips, saying so, where the device has less memory free."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < gigabytes:
            pytest.skip(f"not run: {gigabytes:.0f} GB of memory are needed, {free:.0f} are free")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_than_2_31_logits(backend, dtype):
    columns = scaled(131_080, 5000)
    rows = scaled(2**31 // 131_072 + 17, 50)
    needs(3.5 * rows * columns * dtype.itemsize / 1e9)
    rng = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randn(rows, columns, generator=rng, device=DEVICE, dtype=dtype).mul_(3)
    data = Rows(logits, torch.randint(columns, (rows,), generator=rng, device=DEVICE))
    data.targets[rows // 2] = -100
    with poisoned_outputs():
        result = run_token_logprob(backend, data, temperature=0.8)
    assert all(bool(part.isfinite().all()) for value in result.values() for part in value.split(512))
    sample = torch.tensor([0, 1, rows // 3, rows // 2, rows - 2, rows - 1], device=DEVICE)
    chosen = Rows(data.logits[sample], data.targets[sample])
    same = run_token_logprob("reference", chosen, temperature=0.8)
    exact = run_token_logprob("reference", widened(chosen), temperature=0.8)
    assert_close({name: value[sample] for name, value in result.items()}, same, exact)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_more_blocks_of_tokens_than_a_grid_axis_holds(backend, level):
    """65,535 blocks of 2,048 tokens; tokens this many are compared in parts, where some lie on a bound of the ratio."""
    length, parts = scaled(1024, 64), 8
    sequences = scaled(2**17 + parts, 40)
    tokens = sequences * length
    needs(12 * tokens * 4 / 1e9 + 8)
    rng = torch.Generator(DEVICE).manual_seed(0)

    def normal(size):
        return torch.randn(size, generator=rng, device=DEVICE)

    logprobs = -normal(tokens).abs_()
    old = logprobs + 0.3 * normal(tokens)
    offsets = torch.arange(0, tokens + 1, length, device=DEVICE)
    weights = torch.ones_like(old)
    data = RaggedTokens(logprobs, old, old, old, normal(sequences), weights, offsets)
    with poisoned_outputs():
        result = run_policy_loss(backend, data, level=level)
    assert result["tokens"] == tokens
    assert result["sequences"] == sequences
    loss, share = 0.0, sequences // parts
    for first in range(0, sequences, share):
        part = slice(first * length, (first + share) * length)
        arrays = [value[part] for value in (logprobs, old, old, old)]
        some = RaggedTokens(
            *arrays, data.advantages[first : first + share], weights[part], offsets[: share + 1].clone()
        )
        exact = run_policy_loss("reference", widened(some), level=level)
        loss += exact["loss"].item()
        off = (result["gradient"][part] - exact["gradient"]).abs() > 1e-5
        assert off.float().mean() < 1e-5
    assert abs(result["loss"].item() - loss) < 1e-6 * tokens
    assert error_against(result["ratio_sum"] / tokens, torch.full_like(result["loss"], 1.0)) < 0.1
