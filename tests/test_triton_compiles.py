"""Every Triton kernel compiles ahead of time for every target in every dtype, without spills."""

import pytest
from ahead_of_time import TARGETS, assert_it_fits, compile_for

from v05.kernels.advantage.estimators import Baseline, Scale
from v05.kernels.advantage.triton import advantage_kernel
from v05.kernels.shrinkage.triton import BLOCK_GROUPS, BLOCK_ROLLOUTS, shrinkage_kernel
from v05.kernels.token_logprob import triton as token_logprob

BLOCKS = {"BLOCK_G": BLOCK_GROUPS, "BLOCK_K": BLOCK_ROLLOUTS}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("advantages", [False, True])
def test_shrinkage(target, dtype, leave_one_out, advantages):
    pointer = f"*{dtype}"
    types = dict.fromkeys(("rewards", "prior", "floats", "rollout_baseline", "advantages"), pointer)
    types |= {"offsets": "*i64", "integers": "*i64", "more": "*i1"}
    types |= {"groups": "i64", "low": "fp64", "high": "fp64", "cost": "fp64", "k_init": "i64", "k_max": "i64"}
    assert_it_fits(
        target,
        compile_for(
            target, shrinkage_kernel, types, {"LEAVE_ONE_OUT": leave_one_out, "ADVANTAGES": advantages, **BLOCKS}
        ),
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "baseline", "scale"),
    [("fp32", baseline, scale) for baseline in Baseline for scale in Scale]
    + [("fp64", Baseline.FUSED_LOO, Scale.BASELINE), ("fp64", Baseline.GROUP, Scale.GROUP)],
)
def test_advantage(target, dtype, baseline, scale):
    types = dict.fromkeys(("rewards", "prior", "moments", "out"), f"*{dtype}")
    types |= {"offsets": "*i64", "groups": "i64", "low": "fp64", "high": "fp64", "eps": "fp64"}
    constants = {"BASELINE": int(baseline), "SCALE": int(scale), **BLOCKS}
    assert_it_fits(target, compile_for(target, advantage_kernel, types, constants))


TOKEN = {"targets": "*i64", "stride": "i64", "columns": "i64", "ignore_index": "i64", "temperature": "fp64"}
LOGITS = [("fp32", "fp32"), ("fp64", "fp64"), ("bf16", "fp32"), ("fp16", "fp32")]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "wide"), LOGITS)
@pytest.mark.parametrize("per_row", [False, True])
def test_token_logprob(target, dtype, wide, per_row):
    types = TOKEN | dict.fromkeys(("logprob", "entropy", "largest", "log_sum"), f"*{wide}")
    constants = {"PER_ROW": per_row, "BLOCK_V": token_logprob.BLOCK}
    types |= {"logits": f"*{dtype}"} | ({"temperatures": "*fp64"} if per_row else {})
    constants |= {} if per_row else {"temperatures": None}
    kernel = token_logprob.forward_kernel
    assert_it_fits(target, compile_for(target, kernel, types, constants, num_warps=token_logprob.WARPS))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "wide"), LOGITS)
@pytest.mark.parametrize("gradients", [("grad_logprob",), ("grad_entropy",), ("grad_logprob", "grad_entropy")])
def test_token_logprob_backward(target, dtype, wide, gradients):
    types = TOKEN | dict.fromkeys(("entropy", "largest", "log_sum", *gradients), f"*{wide}")
    types |= {"logits": f"*{dtype}", "grad_logits": f"*{dtype}"}
    constants = {"PER_ROW": False, "BLOCK_V": token_logprob.BLOCK, "temperatures": None}
    constants |= {"HAS_LOGPROB": "grad_logprob" in gradients, "HAS_ENTROPY": "grad_entropy" in gradients}
    constants |= {name: None for name in ("grad_logprob", "grad_entropy") if name not in gradients}
    kernel = token_logprob.backward_kernel
    assert_it_fits(target, compile_for(target, kernel, types, constants, num_warps=token_logprob.WARPS))
