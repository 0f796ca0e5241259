"""The README's estimator for verl registers, takes verl's ragged groups, and equals verl's own."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from verl.trainer.ppo import core_algos

from v05.kernels import group_advantage

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.mark.peers
def test_the_estimator_of_the_readme():
    (code,) = re.findall(r"```python\n([^`]*register_adv_est[^`]*)```", README)
    names = {"torch": torch, "group_advantage": group_advantage}
    exec(compile(code, "README.md", "exec"), names)
    rng = np.random.default_rng(0)
    index = rng.permutation(np.array(["a"] * 3 + ["b"] * 5 + ["c"] * 2, dtype=object))
    mask = torch.arange(7)[None, :] < torch.from_numpy(rng.integers(1, 8, 10))[:, None]
    rewards = torch.zeros(10, 7).masked_scatter_(
        torch.arange(7)[None] == mask.sum(1, keepdim=True) - 1, torch.randn(10).sign()
    )
    ours = core_algos.get_adv_estimator_fn("dr_grpo_ragged")(rewards, mask.float(), index)
    theirs = core_algos.compute_grpo_outcome_advantage(rewards, mask.float(), index, norm_adv_by_std_in_grpo=False)
    torch.testing.assert_close(ours, theirs)
