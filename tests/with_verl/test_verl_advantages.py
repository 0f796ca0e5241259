"""Our estimators through verl's own `compute_advantage`: ragged groups by uid, priors, and verl's padding rows."""

import math
import os
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch
from batches import random_batch
from omegaconf import OmegaConf
from verl import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import compute_advantage

import v05.integrations.verl
from v05.kernels import group_advantage, shrinkage

pytestmark = pytest.mark.verl
VERLS_OWN = {
    "v05_dr_grpo": (core_algos.compute_grpo_outcome_advantage, dict(norm_adv_by_std_in_grpo=False)),
    "v05_grpo": (core_algos.compute_grpo_outcome_advantage, dict(norm_adv_by_std_in_grpo=True)),
    "v05_rloo": (core_algos.compute_rloo_outcome_advantage, {}),
    "v05_opo": (core_algos.compute_opo_outcome_advantage, {}),
}


class FromUid:
    """A prior of one's own: the number at the end of a uid, in tenths."""

    def predict(self, uids):
        """Expected rewards of the groups."""
        return torch.tensor([int(uid.rsplit("-", 1)[1]) / 10 for uid in uids])


class AsList(FromUid):
    """The same as a list."""

    def predict(self, uids):
        """Expected rewards of the groups."""
        return super().predict(uids).tolist()


class AsArray(FromUid):
    """The same as an array."""

    def predict(self, uids):
        """Expected rewards of the groups."""
        return super().predict(uids).numpy()


class AsModule(FromUid):
    """The same with a gradient, as a network's."""

    def predict(self, uids):
        """Expected rewards of the groups."""
        return super().predict(uids).requires_grad_()


class Keeper(FromUid):
    """It keeps the state of calibrated fusion too, as the job's memory does."""

    states: ClassVar[list[torch.Tensor]] = []

    def mixture(self):
        """The newest state."""
        return self.states[-1] if self.states else None

    def learn(self, mixture):
        """Keep a state."""
        self.states.append(mixture)


def advantages(name, batch, algorithm=None, column=None):
    """What verl's trainer computes, `[B, L]`."""
    tensors = {"token_level_rewards": batch.token_rewards, "response_mask": batch.mask}
    if column is not None:
        tensors["reward_baselines"] = column
    data = DataProto.from_dict(tensors=tensors, non_tensors={"uid": batch.uids})
    config = OmegaConf.create({"adv_estimator": name, **(algorithm or {})})
    OmegaConf.set_struct(config, True)
    done = compute_advantage(data, adv_estimator=config.adv_estimator, config=config)
    assert torch.equal(done.batch["advantages"], done.batch["returns"])
    return done.batch["advantages"]


def by_hand(batch, estimator, prior_of=None, **options):
    """The same by a loop over uids, `[B, L]`."""
    rewards, column = batch.token_rewards.sum(1), torch.zeros(len(batch.uids), dtype=torch.float64)
    rows = [np.flatnonzero(batch.uids == uid) for uid in sorted(set(batch.uids))]
    flat = torch.from_numpy(np.concatenate(rows))
    offsets = torch.tensor([0, *np.cumsum([len(group) for group in rows])])
    prior = None
    if prior_of is not None:
        prior = torch.tensor([prior_of(uid) for uid in sorted(set(batch.uids))], dtype=torch.float64)
    lengths = batch.mask.sum(1)[flat]
    options = dict(reward_range=(0.0, 1.0), lengths=lengths) | options
    column[flat] = group_advantage(rewards[flat], offsets, estimator=estimator, prior=prior, **options)
    return column[:, None] * batch.mask


def mean_of_others(batch):
    """For each uid the mean reward of the rows with another uid."""
    rewards = batch.token_rewards.sum(1)
    return lambda uid: float(rewards[torch.from_numpy(batch.uids != uid)].mean())


@pytest.mark.parametrize("name", VERLS_OWN)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_other_estimators_are_verls_own(name, seed):
    batch = random_batch(seed, values=(-1.0, 0.3, 1.0))
    function, options = VERLS_OWN[name]
    theirs, _ = function(batch.token_rewards, batch.mask, index=batch.uids, **options)
    torch.testing.assert_close(advantages(name, batch), theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("by_std", [True, False])
def test_verls_switch_of_the_std_in_grpo(by_std):
    """Without the std it is Dr. GRPO; another estimator does not look at it."""
    batch, section = random_batch(2), {"norm_adv_by_std_in_grpo": by_std}
    function = core_algos.compute_grpo_outcome_advantage
    theirs, _ = function(batch.token_rewards, batch.mask, index=batch.uids, **section)
    torch.testing.assert_close(advantages("v05_grpo", batch, section), theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(advantages("v05_grpo", batch, section), advantages("v05_dr_grpo", batch)) is not by_std
    assert torch.equal(advantages("v05_rloo", batch, section), advantages("v05_rloo", batch))


@pytest.mark.parametrize("name", [name for name in v05.integrations.verl.estimator_names() if name.startswith("v05")])
def test_every_estimator_without_a_setting(name):
    """The default prior of a group is the mean of the batch's other groups."""
    batch, estimator = random_batch(3), v05.integrations.verl.estimator_names()[name]
    fused = estimator.startswith("v05")
    expected = by_hand(batch, estimator, mean_of_others(batch) if fused else None)
    torch.testing.assert_close(advantages(name, batch), expected, rtol=1e-6, atol=1e-8)


def test_none_of_verls_names_is_taken():
    own = {item.value for item in core_algos.AdvantageEstimator}
    assert not own & set(v05.integrations.verl.estimator_names())
    assert {"v05", "v05_loo", "v05_calibrated", "v05_calibrated_loo", "v05_grpo", "v05_james_stein"} <= set(
        v05.integrations.verl.estimator_names()
    )
    v05.integrations.verl.register()  # a second time changes nothing


def test_a_column_a_class_and_a_range():
    batch = random_batch(4, values=(-1.0, 1.0))
    tenth = {uid: int(uid.rsplit("-", 1)[1]) / 10 for uid in batch.uids}
    expected = by_hand(batch, "v05", tenth.__getitem__, reward_range=(-1.0, 1.0))
    section = {"v05": {"reward_range": [-1, 1]}}
    column = torch.tensor([tenth[uid] for uid in batch.uids], dtype=torch.float64)
    torch.testing.assert_close(advantages("v05", batch, section, column), expected, rtol=1e-6, atol=1e-8)
    section["v05"]["prior"] = f"{__name__}.FromUid"
    torch.testing.assert_close(advantages("v05", batch, section), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["AsList", "AsArray", "AsModule"])
def test_a_prior_may_return_a_list_an_array_or_what_has_a_gradient(kind):
    batch = random_batch(4)
    expected = advantages("v05", batch, {"v05": {"prior": f"{__name__}.FromUid"}})
    found = advantages("v05", batch, {"v05": {"prior": f"{__name__}.{kind}"}})
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["v05_calibrated", "v05_calibrated_loo"])
@pytest.mark.parametrize("scale", ["none", "batch", "baseline"])
def test_calibrated_fusion_goes_on_from_batch_to_batch(name, scale, monkeypatch):
    monkeypatch.setattr(Keeper, "states", [])
    section = {"v05": {"reward_range": [-1, 1], "prior": f"{__name__}.Keeper", "scale": scale}}
    state = None
    for seed in (4, 5):
        batch = random_batch(seed, values=(-1.0, 1.0))
        found = advantages(name, batch, section)
        rows = [np.flatnonzero(batch.uids == uid) for uid in sorted(set(batch.uids))]
        flat, offsets = np.concatenate(rows), torch.tensor([0, *np.cumsum([len(group) for group in rows])])
        prior = FromUid().predict(sorted(set(batch.uids))).double()
        options = dict(reward_range=(-1.0, 1.0), fusion="calibrated", advantages=True, state=state)
        rewards = batch.token_rewards.sum(1)[flat]
        test = shrinkage(rewards, offsets, prior, leave_one_out=name.endswith("loo"), **options)
        by = {"none": 1.0, "batch": rewards.std() + 1e-6}
        by["baseline"] = (1 - (rewards - test.advantages).square()).clamp(min=1e-6).sqrt()
        column = torch.zeros(len(flat), dtype=torch.float64)
        column[flat] = test.advantages / by[scale]
        torch.testing.assert_close(found, column[:, None] * batch.mask, rtol=1e-6, atol=1e-7)
        state = test.state
        torch.testing.assert_close(Keeper.states[-1], state)
    assert len(Keeper.states) == 2
    advantages("v05", batch, section)
    assert len(Keeper.states) == 2, "the paper's rule has no state"
    section["v05"]["fusion"] = "calibrated"
    advantages("v05", batch, section)
    assert len(Keeper.states) == 3, "but the look-ahead may want it"


@pytest.mark.parametrize("name", ["v05", "v05_calibrated", "v05_reinforce_plus_plus", "v05_james_stein"])
def test_rows_that_verl_adds_count_for_nothing(name):
    """It fills a ragged batch up with rows under a uid of their own, reward 0, without an unmasked token."""
    batch = random_batch(5, values=(1.0, 0.0))
    added = random_batch(6, sizes=(3,))
    uids = np.array(["pad-0"] * 3, dtype=object)
    added = added._replace(mask=added.mask * 0, token_rewards=added.token_rewards * 0, uids=uids)
    together = type(batch)(
        *(torch.cat(pair) for pair in zip(batch[:-1], added[:-1], strict=True)), np.concatenate([batch.uids, uids])
    )
    filled = advantages(name, together)
    torch.testing.assert_close(filled[: len(batch.uids)], advantages(name, batch), rtol=1e-9, atol=1e-12)
    assert not filled[len(batch.uids) :].any()


def test_what_is_not_allowed_is_named():
    batch = random_batch(6, values=(-1.0, 1.0))
    with pytest.raises(ValueError, match=r"rewards lie between -1 and 1, and algorithm.v05.reward_range is \[0, 1\]"):
        advantages("v05", batch)
    with pytest.raises(ValueError, match=r"algorithm.v05 has rewards; allowed: reward_range, prior, scale"):
        advantages("v05", batch, {"v05": {"rewards": [-1, 1]}})
    with pytest.raises(ValueError, match=r"algorithm.v05.reward_range is \[1\]; allowed: two finite numbers"):
        advantages("v05", batch, {"v05": {"reward_range": [1]}})
    for given in (1, None, "wide", [0, math.inf], [0, None]):
        with pytest.raises(ValueError, match=r"algorithm.v05.reward_range is .*; allowed: two finite numbers, the sm"):
            advantages("v05", batch, {"v05": {"reward_range": given}})
    with pytest.raises(ValueError, match=r"algorithm.v05.prior is 'mine'"):
        advantages("v05", batch, {"v05": {"reward_range": [-1, 1], "prior": "mine"}})
    with pytest.raises(ValueError, match="the batch has no uid"):
        core_algos.get_adv_estimator_fn("v05")(batch.token_rewards, batch.mask)
    column = torch.rand(len(batch.uids), dtype=torch.float64)
    with pytest.raises(ValueError, match="reward_baselines differ within a group"):
        advantages("v05", batch, {"v05": {"reward_range": [-1, 1]}}, column)


def test_another_version_is_refused(tmp_path):
    """The range is checked upon import, before anything of verl's is touched."""
    info = tmp_path / "verl-0.8.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: verl\nVersion: 0.8.0\n", encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", "import v05.integrations.verl"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 1
    assert "ImportError: verl is 0.8.0; v05.integrations.verl works with verl>=0.9.1,<0.10" in done.stderr
