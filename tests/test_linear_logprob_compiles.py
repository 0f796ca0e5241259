"""The kernels of linear_logprob compile ahead of time with every tile, without spills."""

import pytest
from ahead_of_time import TARGETS, assert_it_fits, compile_for

from v05.kernels.linear_logprob import tiles, triton_gradient, triton_hopper, triton_hopper_gradient, triton_kernels
from v05.kernels.linear_logprob.triton import JOINED

LINEAR = {"targets": "*i64", "order": "*i64", "kept": "*i64", "partial": "*fp32", "chosen": "*fp32"}
LINEAR |= dict.fromkeys(("rows", "columns", "features", "hidden_stride", "weight_stride"), "i64")
LINEAR |= {"temperature": "fp64"}
STRIDES = ("features", "hidden_stride", "weight_stride")


@pytest.mark.parametrize("key", tiles.TILES, ids=str)
@pytest.mark.parametrize("more", [False, True])
def test_linear_logprob(key, more):
    """Every tile of the table, with a temperature for all rows, and with one per row and a bias."""
    target, size, aligned = key
    tile = tiles.tile_of(target, size, aligned, has_bias=more)
    constants = {"PER_ROW": more, "HAS_BIAS": more, "SPLIT": tiles.SPLIT, "INTERPRETED": False}
    constants |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.features, "PIECES": tile.pieces}
    kernel = triton_kernels.slice_kernel
    pointers = ("hidden", "weight", "targets", "order", "partial", "chosen")
    for dtype in ("bf16", "fp16") if size == 2 else ("fp32",):
        types = LINEAR | {"hidden": f"*{dtype}", "weight": f"*{dtype}"}
        types |= {"temperatures": "*fp64", "bias": f"*{dtype}"} if more else {}
        given = constants | ({} if more else {"temperatures": None, "bias": None})
        known = pointers + STRIDES if aligned else pointers[2:]
        launch = {"num_warps": tile.warps, "num_stages": tile.stages}
        assert_it_fits(target, compile_for(target, kernel, types, given, known, **launch))


@pytest.mark.parametrize("key", tiles.TILES, ids=str)
@pytest.mark.parametrize("more", [False, True])
def test_linear_logprob_backward(key, more):
    target, size, aligned = key
    tile = tiles.tile_of(target, size, aligned, has_bias=more)
    constants = {"PER_ROW": more, "HAS_BIAS": more, "HAS_LOGPROB": True, "HAS_ENTROPY": True, "INTERPRETED": False}
    constants |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.features}
    constants |= {"PIECES": tile.gradient_pieces} | ({} if more else {"temperatures": None, "bias": None})
    saved = ("largest", "log_sum", "entropy", "grad_logprob", "grad_entropy")
    names = ("targets", "rows", "columns", *STRIDES, "temperature")
    types = {name: LINEAR[name] for name in names} | dict.fromkeys(saved, "*fp32") | {"skipped": "i64"}
    for dtype in ("bf16", "fp16") if size == 2 else ("fp32",):
        own = types | dict.fromkeys(("hidden", "weight", "out"), f"*{dtype}")
        own |= {"temperatures": "*fp64", "bias": f"*{dtype}"} if more else {}
        known = ("targets", "out") + (("hidden", "weight", *STRIDES) if aligned else ())
        launch = {"num_warps": tile.warps, "num_stages": tile.stages}
        kernel = triton_gradient.gradient_kernel
        assert_it_fits(target, compile_for(target, kernel, own, constants, known, **launch))


@pytest.mark.parametrize("target", TARGETS)
def test_linear_logprob_without_a_bias_but_a_temperature_per_row(target):
    """The largest tile, which a training step uses."""
    tile = tiles.tile_of(target, 2, True, has_bias=False)
    constants = {"PER_ROW": True, "HAS_BIAS": False, "SPLIT": tiles.SPLIT, "INTERPRETED": False, "bias": None}
    constants |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.features, "PIECES": tile.pieces}
    types = LINEAR | {"hidden": "*bf16", "weight": "*bf16", "temperatures": "*fp64"}
    known = ("hidden", "weight", "targets", "order", "partial", "chosen", *STRIDES)
    launch = {"num_warps": tile.warps, "num_stages": tile.stages}
    assert_it_fits(target, compile_for(target, triton_kernels.slice_kernel, types, constants, known, **launch))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("per_row", [False, True])
def test_linear_logprob_join(target, per_row):
    types = {"targets": "*i64", "partial": "*fp32", "joined": "*fp32", "rows": "i64", "splits": "i64"}
    types |= {"temperature": "fp64", "skipped": "i64"} | ({"temperatures": "*fp64"} if per_row else {})
    constants = {"PER_ROW": per_row, **JOINED} | ({} if per_row else {"temperatures": None})
    assert_it_fits(target, compile_for(target, triton_kernels.join_kernel, types, constants))


HOPPER = [target for target in tiles.HOPPER if target in TARGETS]
VARIANTS = [(False, False), (True, False), (False, True), (True, True)]


def compile_hopper(target, kernel, tile, dtype, types, constants, **descriptors):
    """Compiles a kernel whose matrices are descriptors of their tiles."""
    operands = {"hidden": [tile.rows, tile.features], "weight": [tile.columns, tile.features], **descriptors}
    types = types | {name: f"tensordesc<{dtype}{shape}>" for name, shape in operands.items()}
    types |= {"targets": "*i64", "rows": "i64", "columns": "i64", "features": "i64", "temperature": "fp64"}
    types |= {"inverses": "*fp32", "bias": f"*{dtype}"}
    types = {name: kind for name, kind in types.items() if constants.get(name, kind) is not None}
    constants = constants | {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.features}
    known = ("features", *(name for name, kind in types.items() if kind.startswith("*")))
    launch = {"num_warps": tile.warps, "num_stages": tile.stages}
    assert_it_fits(target, compile_for(target, kernel, types, constants | {"INTERPRETED": False}, known, **launch))


@pytest.mark.parametrize("target", HOPPER)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("per_row", "has_bias"), VARIANTS)
def test_linear_logprob_on_hopper(target, dtype, per_row, has_bias):
    tile = tiles.HOPPER[target]
    types = {"order": "*i64", "kept": "*i64", "partial": "*fp32", "chosen": "*fp32"}
    constants = {"PER_ROW": per_row, "HAS_BIAS": has_bias, "PIECES": tile.pieces}
    constants |= ({} if per_row else {"inverses": None}) | ({} if has_bias else {"bias": None})
    compile_hopper(target, triton_hopper.sums_kernel, tile, dtype, types, constants)


@pytest.mark.parametrize("target", HOPPER)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("per_row", "has_bias"), VARIANTS)
@pytest.mark.parametrize("given", [("grad_logprob",), ("grad_entropy",), ("grad_logprob", "grad_entropy")])
def test_linear_logprob_backward_on_hopper(target, dtype, per_row, has_bias, given):
    tile = tiles.HOPPER[target]
    types = dict.fromkeys(("largest", "log_sum", "entropy", *given), "*fp32") | {"skipped": "i64"}
    constants = {"PER_ROW": per_row, "HAS_BIAS": has_bias, "PIECES": tile.gradient_pieces}
    constants |= {"HAS_LOGPROB": "grad_logprob" in given, "HAS_ENTROPY": "grad_entropy" in given}
    constants |= ({} if per_row else {"inverses": None}) | ({} if has_bias else {"bias": None})
    constants |= {name: None for name in ("grad_logprob", "grad_entropy") if name not in given}
    out = [tile.rows, tile.columns // tile.gradient_pieces]
    kernel = triton_hopper_gradient.hopper_gradient_kernel
    compile_hopper(target, kernel, tile, dtype, types, constants, out=out)
