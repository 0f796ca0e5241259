"""Our losses in verl's registry against verl's own: every aggregation, with and without global normalisers."""

import itertools

import pytest
import torch
from batches import actor_config, random_batch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import PolicyLossConfig

import v05.integrations.verl

pytestmark = pytest.mark.verl
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
ALIKE = {"v05_ppo": "vanilla", "v05_gspo": "gspo", "v05_cispo": "cispo", "v05_gpg": "gpg"}
GLOBAL = dict(dp_size=2, batch_num_tokens=211, global_batch_size=40, loss_scale_factor=1000)


def run(name, batch, mode, config, weights=None):
    log_prob = batch.log_prob.clone().requires_grad_()
    loss, metrics = get_policy_loss_fn(name)(
        old_log_prob=batch.old,
        log_prob=log_prob,
        advantages=batch.advantages.clone(),
        response_mask=batch.mask,
        loss_agg_mode=mode,
        config=config,
        rollout_is_weights=weights,
    )
    (gradient,) = torch.autograd.grad(loss, log_prob)
    return loss.detach(), gradient, metrics


def assert_alike(ours, theirs):
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)  # weights are float32; they add 1e-8 to counts


@pytest.mark.parametrize(("name", "mode"), list(itertools.product(ALIKE, MODES)))
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["own", "global"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_loss_and_gradient_are_verls(name, mode, info, weighted):
    batch = random_batch(7)
    batch.mask[3] = 0  # a row that verl added, or rejected
    config = actor_config(clip_ratio_low=0.1, clip_ratio_high=0.25, clip_ratio_c=1.5, loss_agg_mode=mode)
    config.global_batch_info.update(info)
    weights = batch.weights if weighted else None
    if weighted and name == "v05_gspo":
        weights = weights[:, :1].expand_as(weights)  # one a sequence; see the next test
    ours, theirs = (run(which, batch, mode, config, weights) for which in (name, ALIKE[name]))
    assert_alike(ours, theirs)
    for metric in set(theirs[2]) & {"actor/ppo_kl"}:
        assert ours[2][metric] == pytest.approx(theirs[2][metric], abs=1e-6)


def test_gspo_with_weights_by_token_differs_by_design():
    """The loss is the same; ours sends its gradient through the mean of the sequence, theirs to each token alone."""
    batch = random_batch(7)
    ours, theirs = (run(name, batch, "token-mean", actor_config(), batch.weights) for name in ("v05_gspo", "gspo"))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-9)
    sums = [gradient.sum(1) for gradient in (ours[1], theirs[1])]
    torch.testing.assert_close(*sums, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(ours[1], theirs[1])


@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["own", "global"])
def test_sapo_is_verls_where_verl_aggregates_so(info):
    batch = random_batch(8)
    config = actor_config(tau_pos=1.5, tau_neg=2.0)
    config.global_batch_info.update(info)
    mode = "seq-mean-token-mean"  # theirs takes it whatever it is told
    assert_alike(run("v05_sapo", batch, mode, config, batch.weights), run("sapo", batch, mode, config, batch.weights))
    assert not torch.allclose(run("v05_sapo", batch, "token-sum", config)[0], run("v05_sapo", batch, mode, config)[0])


@pytest.mark.parametrize(("mode", "weighted"), list(itertools.product(MODES, [False, True])))
def test_covariance_losses_are_verls(mode, weighted):
    """With as many places as tokens clip_cov's random choice takes all candidates, theirs and ours."""
    batch = random_batch(9)
    section = PolicyLossConfig(clip_cov_ratio=1.0, clip_cov_lb=0.2, kl_cov_ratio=0.2, ppo_kl_coef=0.7)
    config = actor_config(policy_loss=section)
    weights = batch.weights if weighted else None
    for name in ("clip_cov", "kl_cov"):
        ours = run(f"v05_{name}", batch, mode, config, weights)
        assert_alike(ours, run(name, batch, mode, config, weights))
        assert ours[2]["actor/covariance_selected"] > 0


@pytest.mark.parametrize("name", v05.integrations.verl.loss_names())
def test_split_batches_add_up(name):
    """With global normalisers the parts' gradients are the whole's; with room for all, covariance chooses alike."""
    batch = random_batch(10)
    section = PolicyLossConfig(clip_cov_ratio=1.0, clip_cov_lb=-50.0, clip_cov_ub=50.0, kl_cov_ratio=1.0)
    config = actor_config(policy_loss=section)
    tokens, rows = int(batch.mask.sum()), len(batch.mask)
    config.global_batch_info.update(dp_size=1, batch_num_tokens=tokens, global_batch_size=rows)
    whole = run(name, batch, "seq-mean-token-mean", config)
    parts = []
    for rows in (slice(0, 5), slice(5, 6), slice(6, None)):
        part = type(batch)(*(values[rows] for values in batch))
        parts.append(run(name, part, "seq-mean-token-mean", config))
    torch.testing.assert_close(sum(part[0] for part in parts), whole[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), whole[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", v05.integrations.verl.loss_names())
def test_masked_places_may_hold_anything(name):
    batch = random_batch(11)
    config = actor_config(policy_loss=PolicyLossConfig(clip_cov_ratio=1.0, clip_cov_lb=-50.0, clip_cov_ub=50.0))
    clean = run(name, batch, "token-mean", config)
    outside = batch.mask == 0
    dirty = batch._replace(
        log_prob=batch.log_prob.masked_fill(outside, torch.nan), old=batch.old.masked_fill(outside, torch.inf)
    )
    loss, gradient, _ = run(name, dirty, "token-mean", config)
    torch.testing.assert_close(loss, clean[0], rtol=0, atol=0)
    assert not gradient[outside].any()
    silent = run(name, batch._replace(mask=batch.mask * 0), "token-mean", actor_config())
    assert silent[0] == 0
    assert not silent[1].any()


def test_as_many_tokens_as_rows():
    """Advantages are per token even where a row without tokens makes their number that of the rows."""
    batch = random_batch(12, sizes=(3,), width=2)
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    batch = batch._replace(mask=mask, advantages=torch.tensor([[3.0, -2.0], [9.0, 9.0], [1.0, 9.0]]).double())
    assert_alike(*(run(name, batch, "token-mean", actor_config()) for name in ("v05_ppo", "vanilla")))


def test_what_is_not_allowed_is_named():
    batch = random_batch(13)
    with pytest.raises(ValueError, match=r"loss_agg_mode is 'mean'; allowed: token-mean, token-sum"):
        run("v05_ppo", batch, "mean", actor_config())
    for given in (None, 1.0, "3", float("inf")):
        with pytest.raises(ValueError, match=r"clip_ratio_c is .*; allowed: a finite number above 1"):
            run("v05_ppo", batch, "token-mean", actor_config(clip_ratio_c=given))
    with pytest.raises(ValueError, match="config is None"):
        run("v05_ppo", batch, "token-mean", None)
    config = actor_config()
    config.global_batch_info["dp_size"] = 2
    with pytest.raises(ValueError, match="global_batch_info has no batch_num_tokens; needed with dp_size 2"):
        run("v05_ppo", batch, "token-mean", config)
