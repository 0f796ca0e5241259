"""group_advantage against verl's estimators on random ragged groups."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from verl.trainer.ppo import core_algos

from v05.kernels import group_advantage
from v05.testing import ragged_groups

pytestmark = pytest.mark.peers
ESTIMATORS = {
    "grpo": (core_algos.compute_grpo_outcome_advantage, dict(norm_adv_by_std_in_grpo=True)),
    "dr_grpo": (core_algos.compute_grpo_outcome_advantage, dict(norm_adv_by_std_in_grpo=False)),
    "rloo": (core_algos.compute_rloo_outcome_advantage, {}),
    "opo": (core_algos.compute_opo_outcome_advantage, {}),
    "gpg": (core_algos.compute_gpg_outcome_advantage, {}),
}


def verl_advantage(function, data, lengths, **options):
    """The advantage of each rollout; every reward sits on the last of its tokens, as theirs expects."""
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(data.rewards.dtype)
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(len(lengths)), lengths - 1] = data.rewards
    index = np.repeat(np.arange(len(data.offsets) - 1), data.offsets.diff().numpy())
    advantages, _ = function(rewards, mask, index=index, **options)
    assert torch.equal(advantages, advantages[:, :1] * mask)
    return advantages[:, 0]


def batch(seed, shortest, values=(-1.0, 1.0)):
    data = ragged_groups(40, shortest, 9, seed=seed, values=values, dtype=torch.float64)
    rng = torch.Generator().manual_seed(seed)
    return data, torch.randint(1, 7, data.rewards.shape, generator=rng)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 1.0), (0.0, 0.3, 0.7, 1.0)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_groups_of_two_or_more(estimator, values, seed):
    data, lengths = batch(seed, 2, values)
    function, options = ESTIMATORS[estimator]
    reward_range = (min(values), max(values))
    named = dict(estimator=estimator, reward_range=reward_range, lengths=lengths, eps=1e-6)
    ours = group_advantage(data.rewards, data.offsets, **named)
    # A group of equal rewards is 0 in ours; rounding in theirs is divided by their 1e-6.
    torch.testing.assert_close(ours, verl_advantage(function, data, lengths, **options), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_group_of_one_differs_by_design(estimator):
    """Theirs takes a lone reward as its own advantage; ours says nothing without a second one."""
    data, lengths = batch(3, 1)
    function, options = ESTIMATORS[estimator]
    counts = data.offsets.diff()
    alone = (counts == 1).repeat_interleave(counts)
    assert alone.any()
    theirs = verl_advantage(function, data, lengths, **options)
    ours = group_advantage(data.rewards, data.offsets, estimator=estimator, lengths=lengths)
    assert not ours[alone].any()
    torch.testing.assert_close(theirs[alone], data.rewards[alone], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[~alone], theirs[~alone], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
def test_reinforce_plus_plus_over_tokens(seed):
    """Theirs divides by sqrt(variance + 1e-8), ours by the std plus eps."""
    data, lengths = batch(seed, 1, (-1.0, 0.2, 1.0))
    config = SimpleNamespace(gamma=1.0)
    theirs = verl_advantage(core_algos.compute_reinforce_plus_plus_outcome_advantage, data, lengths, config=config)
    ours = group_advantage(data.rewards, data.offsets, estimator="reinforce_plus_plus", lengths=lengths, eps=0.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)
