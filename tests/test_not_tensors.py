"""Every op says which argument is no tensor, and what was given instead."""

import pytest
import torch

from v05.kernels import (
    AttentionWeights,
    group_advantage,
    linear_logprob,
    linear_policy_loss,
    policy_loss,
    query_attention,
    select_by_covariance,
    shrinkage,
    token_logprob,
)
from v05.kernels.query_attention.rules import weight_shapes

OFFSETS = torch.tensor([0, 2, 4])
FOUR, TWO = torch.linspace(-1, 0, 4), torch.tensor([0.1, -0.1])
TOKENS = {"logprobs": FOUR, "old_logprobs": FOUR, "advantages": TWO, "weights": FOUR + 2, "sequence_offsets": OFFSETS}
LAYER = {"hidden": torch.ones(4, 3), "weight": torch.ones(5, 3), "targets": torch.zeros(4, dtype=torch.int64)}
WEIGHTS = AttentionWeights(*(torch.ones(shape) for shape in weight_shapes(2, 3)))

CALLS = [
    (shrinkage, {"rewards": FOUR, "offsets": OFFSETS, "prior": TWO}, {}),
    (shrinkage, {"state": torch.ones(7)}, {"rewards": FOUR, "offsets": OFFSETS, "prior": TWO, "fusion": "calibrated"}),
    (group_advantage, {"rewards": FOUR, "offsets": OFFSETS, "prior": TWO}, {}),
    (group_advantage, {"lengths": FOUR + 2}, {"rewards": FOUR, "offsets": OFFSETS, "estimator": "reinforce_plus_plus"}),
    (policy_loss, TOKENS, {}),
    (policy_loss, {"ref_logprobs": FOUR}, {**TOKENS, "kl": "k3", "kl_coef": 0.1}),
    (policy_loss, {"sampler_logprobs": FOUR}, {**TOKENS, "sampler_correction": "token_mask"}),
    (policy_loss, {"covariance_selected": FOUR > 0}, {**TOKENS, "surrogate": "kl_cov"}),
    (select_by_covariance, TOKENS, {"surrogate": "kl_cov"}),
    (token_logprob, {"logits": torch.ones(2, 3), "targets": torch.tensor([0, 1])}, {}),
    (linear_logprob, LAYER | {"bias": torch.ones(5)}, {}),
    (linear_policy_loss, LAYER | {name: TOKENS[name] for name in list(TOKENS)[1:]}, {}),
    (
        query_attention,
        {"states": torch.ones(4, 3), "offsets": OFFSETS, "queries": torch.ones(2, 6, 2)},
        {"weights": WEIGHTS, "heads": 1},
    ),
]


@pytest.mark.parametrize(
    ("op", "tensors", "others", "name"),
    [(op, tensors, others, name) for op, tensors, others in CALLS for name in tensors],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("make", [torch.Tensor.tolist, torch.Tensor.numpy], ids=["list", "array"])
def test_the_argument_is_named(op, tensors, others, name, make):
    with pytest.raises(TypeError, match=rf"^{name} is a (list|ndarray); allowed: a tensor$"):
        op(**{**tensors, **others, name: make(tensors[name])})


@pytest.mark.parametrize("fusion", ["v05", "calibrated"])
def test_shrinkage_needs_a_prior(fusion):
    with pytest.raises(TypeError, match="prior is a NoneType"):
        shrinkage(torch.ones(2), torch.tensor([0, 2]), None, fusion=fusion)
