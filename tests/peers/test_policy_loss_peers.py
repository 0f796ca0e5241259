"""policy_loss against verl's own loss functions: values and gradients on random ragged batches."""

import itertools

import pytest
import torch
from padded import padded_batch
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig, PolicyLossConfig

from v05.kernels import policy_loss, select_by_covariance

pytestmark = pytest.mark.peers
MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
SEEDS = [0, 1, 2]


def config(**options):
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, use_dynamic_bsz=True, **options)


def verl_loss(name, data, mode, settings, weights=None):
    logprobs = data.logprobs.clone().requires_grad_()
    loss, _ = core_algos.get_policy_loss_fn(name)(
        old_log_prob=data.old,
        log_prob=logprobs,
        advantages=data.advantages[:, None].expand_as(logprobs).clone(),
        response_mask=data.mask,
        loss_agg_mode=mode,
        config=settings,
        rollout_is_weights=weights,
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), data.pack(gradient)


def our_loss(data, mode, **options):
    logprobs = data.pack(data.logprobs).requires_grad_()
    result = policy_loss(
        logprobs,
        data.pack(data.old),
        data.advantages,
        data.pack(data.weights(mode, constant=data.mask.shape[1])),
        sequence_offsets=data.offsets,
        **options,
    )
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    return result.loss.detach(), gradient


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)  # they add 1e-8 to token counts


@pytest.mark.parametrize(("mode", "seed"), list(itertools.product(MODES, SEEDS)))
def test_vanilla_with_dual_clip(mode, seed):
    data = padded_batch(seed, drift=1.0)
    settings = config(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=2.0)
    close(our_loss(data, mode, clip_high=0.28, dual_clip=2.0), verl_loss("vanilla", data, mode, settings))


@pytest.mark.parametrize("correction", ["token_truncate", "token_mask"])
def test_vanilla_with_sampler_weights(correction):
    data = padded_batch(3)
    ratio = (data.old - data.sampler).exp()
    weights = ratio.clamp(max=1.3)
    if correction == "token_mask":
        weights = torch.where((ratio >= 0.7) & (ratio <= 1.3), ratio, 0)
    options = dict(sampler_logprobs=data.pack(data.sampler), sampler_cap=1.3, sampler_floor=0.7)
    ours = our_loss(data, "token-mean", dual_clip=3.0, sampler_correction=correction, **options)
    close(ours, verl_loss("vanilla", data, "token-mean", config(), weights))


@pytest.mark.parametrize(("mode", "seed"), list(itertools.product(MODES, SEEDS)))
def test_gspo(mode, seed):
    data = padded_batch(seed)
    settings = config(clip_ratio_low=0.1, clip_ratio_high=0.15)
    ours = our_loss(data, mode, level="sequence", clip_low=0.1, clip_high=0.15)
    close(ours, verl_loss("gspo", data, mode, settings))


@pytest.mark.parametrize("seed", SEEDS)
def test_sapo(seed):
    """Theirs aggregates by sequence whatever it is told."""
    data = padded_batch(seed)
    theirs = verl_loss("sapo", data, "token-mean", config(tau_pos=1.5, tau_neg=2.0))
    close(our_loss(data, "seq-mean-token-mean", surrogate="sapo", sapo_tau_pos=1.5, sapo_tau_neg=2.0), theirs)


@pytest.mark.parametrize(("mode", "seed"), list(itertools.product(MODES, SEEDS)))
def test_cispo_and_gpg(mode, seed):
    data = padded_batch(seed)
    settings = config(clip_ratio_low=0.3, clip_ratio_high=0.28)
    ours = our_loss(data, mode, surrogate="cispo", clip_low=0.3, clip_high=0.28)
    close(ours, verl_loss("cispo", data, mode, settings))
    close(our_loss(data, mode, surrogate="gpg"), verl_loss("gpg", data, mode, settings))


def covariance_choice(data, surrogate, fraction, bounds=(1.0, 5.0)):
    return select_by_covariance(
        data.pack(data.logprobs),
        data.pack(data.old),
        data.advantages,
        data.pack(data.mask),
        sequence_offsets=data.offsets,
        surrogate=surrogate,
        fraction=fraction,
        bounds=bounds,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_clip_cov_where_every_candidate_is_taken(seed):
    """With as many places as tokens, the random choice takes all candidates, theirs and ours."""
    data = padded_batch(seed)
    settings = config(policy_loss=PolicyLossConfig(clip_cov_ratio=1.0, clip_cov_lb=0.2))
    chosen = covariance_choice(data, "clip_cov", 1.0, (0.2, 5.0))
    assert chosen.sum() > 3
    ours = our_loss(data, "token-mean", surrogate="clip_cov", covariance_selected=chosen)
    close(ours, verl_loss("clip_cov", data, "token-mean", settings))


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_cov(seed):
    data = padded_batch(seed)
    settings = config(policy_loss=PolicyLossConfig(kl_cov_ratio=0.1, ppo_kl_coef=0.7))
    chosen = covariance_choice(data, "kl_cov", 0.1)
    assert chosen.sum() == max(1, int(data.mask.sum() * 0.1))
    ours = our_loss(data, "token-mean", surrogate="kl_cov", covariance_selected=chosen, covariance_coef=0.7)
    close(ours, verl_loss("kl_cov", data, "token-mean", settings))


@pytest.mark.parametrize(("kind", "mode"), list(itertools.product(["k1", "k2", "k3", "k1+", "k3+"], MODES)))
def test_kl(kind, mode):
    data = padded_batch(5)
    logprobs = data.logprobs.clone().requires_grad_()
    penalty = core_algos.kl_penalty(logprobs, data.ref, kind)
    loss = core_algos.agg_loss(penalty, data.mask, mode)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    silent = data._replace(advantages=data.advantages * 0)
    ours = our_loss(silent, mode, kl=kind, kl_coef=1.0, ref_logprobs=data.pack(data.ref))
    close(ours, (loss.detach(), data.pack(gradient)))


def test_their_k3_is_cut_off_at_ten_and_ours_is_not():
    logprobs, ref = torch.tensor([-4.0]), torch.tensor([-1.0])
    exact = torch.tensor(3.0).exp() - 4
    assert core_algos.kl_penalty(logprobs, ref, "k3").item() == 10.0
    one = torch.ones(1)
    options = dict(sequence_offsets=torch.tensor([0, 1]), ref_logprobs=ref, kl="k3", kl_coef=1.0)
    assert policy_loss(logprobs, logprobs, one * 0, one, **options).loss.item() == pytest.approx(exact.item())
