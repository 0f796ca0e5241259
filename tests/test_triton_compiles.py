"""Every Triton kernel compiles ahead of time for every target in every dtype, without spills."""

import re

import pytest
import torch
from ahead_of_time import TARGETS, assert_it_fits, compile_for

from v05.kernels.advantage import triton_moments
from v05.kernels.advantage.estimators import Baseline, Scale
from v05.kernels.advantage.triton import advantage_kernel
from v05.kernels.calibration import triton as calibration
from v05.kernels.calibration.components import NEAR, PRIOR_COUNT, STEPS
from v05.kernels.policy_loss import triton as policy_loss
from v05.kernels.policy_loss import triton_sequences
from v05.kernels.policy_loss.options import BY_COVARIANCE, Correction, Kinds, Kl, Numbers, Surrogate, whole_sequences
from v05.kernels.query_attention import triton as query_attention
from v05.kernels.query_attention import triton_backward, triton_forward, triton_states
from v05.kernels.query_attention.rules import MOST_HEADS
from v05.kernels.shrinkage.triton import BLOCK_GROUPS, BLOCK_ROLLOUTS, shrinkage_kernel
from v05.kernels.token_logprob import triton as token_logprob

DTYPES = [("fp32", "fp32"), ("fp64", "fp64"), ("bf16", "fp32"), ("fp16", "fp32")]
BLOCKS = {"BLOCK_G": BLOCK_GROUPS, "BLOCK_K": BLOCK_ROLLOUTS}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "wide"), DTYPES)
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("advantages", [False, True])
def test_shrinkage(target, dtype, wide, leave_one_out, advantages):
    types = dict.fromkeys(("prior", "floats", "rollout_baseline", "advantages"), f"*{wide}") | {"rewards": f"*{dtype}"}
    types |= {"offsets": "*i64", "integers": "*i64", "more": "*i1"}
    types |= {"groups": "i64", "low": "fp64", "high": "fp64", "cost": "fp64", "k_init": "i64", "k_max": "i64"}
    assert_it_fits(
        target,
        compile_for(
            target, shrinkage_kernel, types, {"LEAVE_ONE_OUT": leave_one_out, "ADVANTAGES": advantages, **BLOCKS}
        ),
    )


CALIBRATION = {"offsets": "*i64", "graded": "*i1", "integers": "*i64", "more": "*i1", "groups": "i64"}
CALIBRATION |= {"low": "fp64", "high": "fp64", "cost": "fp64", "k_init": "i64", "k_max": "i64", "decay": "fp64"}
CALIBRATION_BLOCKS = {"BLOCK_G": calibration.BLOCK_GROUPS, "BLOCK_K": calibration.BLOCK_ROLLOUTS}
FIT = {"COUNT": PRIOR_COUNT, "STEPS": STEPS}


def compile_calibration(target, kernel, dtype, wide, constants, **options):
    """Pointers are aligned, as those of new tensors are: layouts depend on it."""
    names = [parameter.name for parameter in kernel.params if parameter.name not in constants]
    types = CALIBRATION | {"rewards": f"*{dtype}"}
    types = {name: types.get(name, f"*{wide}") for name in names}
    pointers = tuple(name for name, kind in types.items() if kind.startswith("*"))
    resources = compile_for(target, kernel, types, constants, pointers, **options)
    assert_it_fits(target, resources)
    return resources


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "wide"), DTYPES)
def test_calibration_of_groups(target, dtype, wide):
    """A warp works alone, without shared memory: nothing that two threads could write."""
    asked = [(calibration.likelihood_kernel, {"NEAR": NEAR})]
    asked += [(calibration.calibrated_kernel, {"LEAVE_ONE_OUT": own, "ADVANTAGES": True}) for own in (False, True)]
    for kernel, constants in asked:
        constants |= CALIBRATION_BLOCKS
        resources = compile_calibration(target, kernel, dtype, wide, constants, num_warps=calibration.WARPS)
        assert resources.shared == 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("wide", ["fp32", "fp64"])
@pytest.mark.parametrize("remembers", [False, True])
def test_calibration_of_the_mixture(target, wide, remembers):
    block = calibration.BLOCK_FIT[torch.float32 if wide == "fp32" else torch.float64]
    constants = FIT | {"BLOCK_F": block} | ({} if remembers else {"state": None})
    compile_calibration(target, calibration.fit_kernel, wide, wide, constants, num_warps=calibration.FIT_WARPS)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "wide", "baseline", "scale"),
    [("fp32", "fp32", baseline, scale) for baseline in Baseline for scale in Scale]
    + [(*types, Baseline.FUSED_LOO, Scale.BASELINE) for types in DTYPES[1:]]
    + [(*types, Baseline.GROUP, Scale.GROUP) for types in DTYPES[1:]],
)
def test_advantage(target, dtype, wide, baseline, scale):
    types = dict.fromkeys(("prior", "lengths", "moments", "out"), f"*{wide}") | {"rewards": f"*{dtype}"}
    types |= {"offsets": "*i64", "groups": "i64", "low": "fp64", "high": "fp64", "eps": "fp64"}
    constants = {"BASELINE": int(baseline), "SCALE": int(scale), **BLOCKS}
    assert_it_fits(target, compile_for(target, advantage_kernel, types, constants))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "wide"), DTYPES)
@pytest.mark.parametrize("by_length", [False, True])
def test_moments_of_the_batch(target, dtype, wide, by_length):
    types = {"rewards": f"*{dtype}", "lengths": f"*{wide}", "partial": "*fp64", "moments": f"*{wide}"}
    types |= {"n": "i64", "parts": "i64", "eps": "fp64"}
    constants = {"WEIGHTED": by_length, "BLOCK": triton_moments.BLOCK}
    kernel = triton_moments.moments_kernel
    assert_it_fits(target, compile_for(target, kernel, types, constants, num_warps=triton_moments.WARPS))


TOKEN = {"targets": "*i64", "stride": "i64", "columns": "i64", "ignore_index": "i64", "temperature": "fp64"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "wide"), DTYPES)
@pytest.mark.parametrize("per_row", [False, True])
def test_token_logprob(target, dtype, wide, per_row):
    types = TOKEN | dict.fromkeys(("logprob", "entropy", "statistics"), f"*{wide}")
    constants = {"PER_ROW": per_row, "BLOCK_V": token_logprob.BLOCK // (2 if dtype == "fp64" else 1)}
    types |= {"logits": f"*{dtype}"} | ({"temperatures": "*fp64"} if per_row else {})
    constants |= {} if per_row else {"temperatures": None}
    kernel = token_logprob.forward_kernel
    wide_loads = () if per_row else ("logits", "stride")
    assert_it_fits(target, compile_for(target, kernel, types, constants, wide_loads, num_warps=token_logprob.WARPS))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "wide"), DTYPES)
@pytest.mark.parametrize("gradients", [("grad_logprob",), ("grad_entropy",), ("grad_logprob", "grad_entropy")])
def test_token_logprob_backward(target, dtype, wide, gradients):
    types = TOKEN | dict.fromkeys(("entropy", "statistics", *gradients), f"*{wide}")
    types |= {"logits": f"*{dtype}", "grad_logits": f"*{dtype}", "grad_stride": "i64"}
    constants = {"PER_ROW": False, "BLOCK_V": token_logprob.BACKWARD_BLOCK, "temperatures": None}
    constants |= {"HAS_LOGPROB": "grad_logprob" in gradients, "HAS_ENTROPY": "grad_entropy" in gradients}
    constants |= {name: None for name in ("grad_logprob", "grad_entropy") if name not in gradients}
    kernel = token_logprob.backward_kernel
    wide = ("logits", "stride", "grad_logits", "grad_stride")
    assert_it_fits(target, compile_for(target, kernel, types, constants, wide, num_warps=token_logprob.BACKWARD_WARPS))


POLICY = {"offsets": "*i64", "selected": "*i1", "tokens": "i64", "sequences": "i64", "each": "i64"}
POLICY |= dict.fromkeys((*Numbers._fields[:-2], "floor", "cap"), "fp64")


def compile_policy(target, dtype, surrogate, level, kl, correction, per_token=False, wide=True):
    """Compiles the one pass of policy_loss as it is launched, over sequences where an option is on whole ones."""
    kinds = Kinds(int(surrogate), level, int(kl), int(correction))
    by_sequence, selects, size = whole_sequences(kinds), surrogate in BY_COVARIANCE, int(dtype[2:]) // 8
    constants = {"SURROGATE": kinds.surrogate, "KL": kinds.kl, "CORRECTION": kinds.correction, "SELECTS": selects}
    constants |= {"PER_TOKEN": per_token, "BLOCK_T": policy_loss.BLOCK}
    needed = {"ref_logprobs": kl, "sampler_logprobs": correction, "selected": selects}
    constants |= {name: None for name, needs in needed.items() if not needs}
    if by_sequence:
        rows = policy_loss.rows_of(size) * (2 if target == "gfx942" else 1)
        kernel, more = triton_sequences.sequence_kernel, {"LEVEL": level, "ROWS": rows}
    else:
        kernel, more = policy_loss.token_kernel, {"WIDE": wide}
    constants |= more
    names = [parameter.name for parameter in kernel.params if parameter.name not in constants]
    types = {name: POLICY.get(name, f"*{dtype}") for name in names}
    aligned = tuple(name for name, kind in types.items() if kind.startswith("*") and wide)
    options = {} if target == "gfx942" else policy_loss.registers(kinds, wide, size)
    resources = compile_for(target, kernel, types, constants, aligned, num_warps=policy_loss.WARPS[size], **options)
    assert_it_fits(target, resources)
    return resources


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_policy_loss_moves_16_bytes_at_once_where_it_may(wide, per_token):
    ptx = compile_policy("sm_90", "fp32", Surrogate.PPO, 0, Kl.NONE, Correction.NONE, per_token, wide).ptx
    inputs = 4 if per_token else 3  # log-probs, old log-probs, weights, and advantages by token
    assert len(re.findall(r"ld\.global\.v4", ptx)) == (inputs if wide else 0)
    assert len(re.findall(r"st\.global\.v4", ptx)) == (1 if wide else 0)


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("surrogate", [Surrogate.PPO, Surrogate.CLIP_COV])
@pytest.mark.parametrize("level", [0, 1])
def test_policy_loss_of_views_that_are_not_aligned(target, dtype, surrogate, level):
    compile_policy(target, dtype, surrogate, level, Kl.K3, Correction.TOKEN_MASK, wide=False)
    compile_policy(target, dtype, surrogate, level, Kl.NONE, Correction.NONE, wide=False)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("surrogate", list(Surrogate))
@pytest.mark.parametrize("level", [0, 1])
def test_policy_loss_surrogates(target, surrogate, level):
    compile_policy(target, "fp32", surrogate, level, Kl.NONE, Correction.NONE)
    compile_policy(target, "fp32", surrogate, level, Kl.NONE, Correction.NONE, per_token=True)
    compile_policy(target, "fp32", surrogate, level, Kl.K3, Correction.TOKEN_MASK)
    compile_policy(target, "fp32", surrogate, level, Kl.K3, Correction.SEQUENCE_MASK)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kl", list(Kl))
@pytest.mark.parametrize("level", [0, 1])
def test_policy_loss_kl(target, kl, level):
    compile_policy(target, "fp32", Surrogate.PPO, level, kl, Correction.NONE)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("correction", list(Correction))
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("level", [0, 1])
def test_policy_loss_corrections(target, correction, dtype, level):
    compile_policy(target, dtype, Surrogate.PPO, level, Kl.NONE, correction, per_token=dtype == "fp64")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("level", [0, 1])
def test_policy_loss_with_every_input(target, dtype, level):
    for surrogate, kl in ((Surrogate.KL_COV, Kl.K3_PLUS), (Surrogate.CLIP_COV, Kl.K3), (Surrogate.PPO, Kl.K3_PLUS)):
        compile_policy(target, dtype, surrogate, level, kl, Correction.SEQUENCE_MASK, per_token=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_policy_loss_scale_and_finish(target, dtype):
    types = dict.fromkeys(("values", "factor"), f"*{dtype}") | {"length": "i64"}
    assert_it_fits(target, compile_for(target, policy_loss.scale_kernel, types, {"BLOCK_T": policy_loss.SCALED}))
    types = dict.fromkeys(("partial", "loss", "metrics"), f"*{dtype}") | {"programs": "i64"}
    assert_it_fits(target, compile_for(target, policy_loss.finish_kernel, types, {"BLOCK_P": policy_loss.SUMMED}))


ATTENTION_LENGTHS = dict.fromkeys(triton_forward.LENGTHS, "i64") | {"offsets": "*i64", "eps": "fp64"}
STATES_TILE = {"BLOCK_T": query_attention.BLOCK_ROWS, "BLOCK_D": query_attention.BLOCK_COLUMNS}
QUERIES_TILE = {"BLOCK_Q": query_attention.ROWS, "BLOCK_T": query_attention.PASSING_T}
NARROW_TILES = {
    triton_forward.tokens_kernel: {"BLOCK_T": query_attention.ROWS, "BLOCK_D": query_attention.PROJECTED},
    triton_forward.keys_kernel: {"BLOCK_T": query_attention.ROWS},
    triton_forward.attend_kernel: QUERIES_TILE,
    triton_backward.queries_kernel: QUERIES_TILE,
    triton_backward.tokens_backward_kernel: {
        "BLOCK_T": query_attention.ROWS,
        "BLOCK_Q": query_attention.PASSING_Q,
    },
}
# One kernel alone reads states, which may be of half precision.
NARROW = [(k, *own) for k in NARROW_TILES for own in DTYPES if own[0] == own[1] or k is triton_forward.tokens_kernel]


def attention_types(kernel, dtype, wide, constants):
    names = [parameter.name for parameter in kernel.params if parameter.name not in constants]
    of_states = dict.fromkeys({"states", "grad_states"} & set(names), f"*{dtype}")
    return {name: ATTENTION_LENGTHS.get(name, f"*{wide}") for name in names} | of_states


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "wide"), DTYPES)
@pytest.mark.parametrize("chunk", [{}, {"CHUNK": query_attention.CHUNK}])
def test_query_attention_over_states(target, dtype, wide, chunk):
    kernel = triton_states.projection_backward_kernel if chunk else triton_states.states_kernel
    for heads in (3, 4):
        constants = {"HEADS": heads} | STATES_TILE | chunk
        assert_it_fits(target, compile_for(target, kernel, attention_types(kernel, dtype, wide, constants), constants))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("heads", range(1, MOST_HEADS + 1))
@pytest.mark.parametrize(("kernel", "dtype", "wide"), NARROW, ids=lambda value: getattr(value, "__name__", value))
def test_query_attention_with_narrow_rows(target, kernel, dtype, wide, heads):
    """A warp works alone, without shared memory, wherever tensors begin."""
    launch = query_attention.narrow_rows(heads)
    warps = launch.pop("num_warps")
    constants = launch | NARROW_TILES[kernel]
    types = attention_types(kernel, dtype, wide, constants)
    pointers = tuple(name for name, kind in types.items() if kind.startswith("*"))
    for aligned in ((), pointers):
        resources = compile_for(target, kernel, types, constants, aligned, num_warps=warps)
        assert resources.shared == 0
        if (target, wide, heads) != ("sm_80", "fp64", 4):  # there ptxas keeps an address in memory over a division
            assert_it_fits(target, resources)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_token_logprob_backward_into_the_dtype_of_products(target, dtype):
    """float32 logits of linear_logprob, whose gradient is rounded as it is written."""
    types = TOKEN | dict.fromkeys(("entropy", "statistics", "grad_logprob", "grad_entropy"), "*fp32")
    types |= {"logits": "*fp32", "grad_logits": f"*{dtype}", "grad_stride": "i64"}
    constants = {"PER_ROW": False, "BLOCK_V": token_logprob.BACKWARD_BLOCK, "temperatures": None}
    constants |= {"HAS_LOGPROB": True, "HAS_ENTROPY": True}
    kernel = token_logprob.backward_kernel
    wide = ("logits", "stride", "grad_logits", "grad_stride")
    assert_it_fits(target, compile_for(target, kernel, types, constants, wide, num_warps=token_logprob.BACKWARD_WARPS))
