"""Half rewards at the ends of a range that their dtype does not hold: neither refused nor between the ends."""

import torch

from v05.kernels import group_advantage, shrinkage
from v05.kernels.advantage.estimators import ESTIMATORS


def check_rounded_ends(backend, dtype):
    """The range is as good as one with the rounded ends, and a prior may be at either kind."""
    given, (low, high) = (0.1, 1.1), torch.tensor([0.1, 1.1], dtype=dtype).tolist()
    rewards = torch.tensor([low, high, high, low, high, high], dtype=dtype)
    offsets = torch.tensor([0, 2, 5, 6])
    options = dict(leave_one_out=True, advantages=True, backend=backend)
    for prior in (torch.tensor([0.1, 1.1, 0.6]), torch.tensor([low, high, 0.6])):
        moved = prior.clamp(low, high)
        for fusion in ("v05", "calibrated"):
            results = [
                shrinkage(rewards, offsets, values, reward_range=ends, fusion=fusion, **options)
                for values, ends in ((prior, given), (moved, (low, high)))
            ]
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(*results, strict=True))
            assert fusion == "v05" or results[0].graded.item() is False
        for estimator, rule in ESTIMATORS.items():
            named = dict(estimator=estimator, backend=backend)
            named |= dict(lengths=torch.ones(len(rewards))) if rule.needs_lengths else {}
            ours, theirs = (
                group_advantage(
                    rewards, offsets, prior=values if rule.needs_prior else None, reward_range=ends, **named
                )
                for values, ends in ((prior, given), (moved, (low, high)))
            )
            assert torch.equal(ours, theirs), estimator
