"""Groups with a value that is not finite, which calibrated fusion leaves out where values are not checked."""

import torch

from v05.kernels import shrinkage
from v05.testing import RaggedGroups, offsets_of, ragged_groups

NAN, INF = float("nan"), float("inf")


def check_spoilt_groups(backend, device, graded, dtype):
    """Statistics of groups of which some have a prior or a reward that is not finite, against those of the others
    alone; the spoilt ones are NaN."""
    values = (-1.0, 0.3, 1.0) if graded else (-1.0, 1.0)
    data = ragged_groups(60, 0, 9, seed=4, values=values, dtype=dtype)
    lengths = data.offsets.diff()
    rewards, prior = data.rewards.clone(), data.prior.clone()
    spoilt = torch.zeros(60, dtype=torch.bool)
    some, none = (lengths > 2).nonzero()[:, 0].tolist(), (lengths == 0).nonzero()[:, 0].tolist()
    for group, place, value in ((some[0], 0, NAN), (some[2], 2, INF), (some[3], -1, -INF), (some[4], 1, NAN)):
        rewards[data.offsets[group + (place < 0)] + place], spoilt[group] = value, True
    for group, value in ((some[6], NAN), (some[8], INF), (none[0], NAN), (none[1], -INF)):
        prior[group], spoilt[group] = value, True
    of_rollouts = spoilt.repeat_interleave(lengths)
    kept = RaggedGroups(rewards[~of_rollouts], offsets_of(lengths[~spoilt]), prior[~spoilt])
    options = dict(fusion="calibrated", leave_one_out=True, advantages=True, backend=backend)
    result, alone = (
        shrinkage(*(x.to(device) for x in groups), state=torch.arange(7.0, device=device), **options)._asdict()
        for groups in (RaggedGroups(rewards, data.offsets, prior), kept)
    )
    for name, value in result.items():
        others = value
        if value.numel() in (60, len(rewards)) and name != "state":
            left_out = (spoilt if value.numel() == 60 else of_rollouts).to(device)
            others = value[~left_out]
            assert not value.is_floating_point() or value[left_out].isnan().all(), name
        torch.testing.assert_close(others, alone[name], rtol=0 if value.dtype == torch.int64 else 1e-5, atol=1e-6)
    assert (result["count"].cpu() == lengths).all()
    assert result["graded"].item() is graded
