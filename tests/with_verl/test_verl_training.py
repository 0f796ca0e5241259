"""Steps of training on a CPU through verl's own pieces: DataProto, compute_advantage, its registries and agg_loss."""

import numpy as np
import pytest
import torch
from batches import actor_config
from omegaconf import OmegaConf
from tiny_models import write_qwen3
from transformers import AutoModelForCausalLM
from verl import DataProto
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.utils.torch_functional import logprobs_from_logits

import v05.integrations.verl  # noqa: F401

pytestmark = pytest.mark.verl
PROMPTS, LENGTH, ANSWERS = 8, 3, 4
DIGITS = range(2, 12)  # token ids of 0 to 9 in `tiny_models`


@pytest.fixture
def model(tmp_path):
    """A tiny Qwen3 with random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(write_qwen3(tmp_path))


def sampled(model, generator):
    """A batch of answers, half of which have a token less, as verl's trainer holds it before advantages."""
    prompts = torch.arange(12, 12 + PROMPTS).repeat_interleave(ANSWERS)[:, None].repeat(1, 2)
    ids = prompts
    with torch.no_grad():
        for _ in range(LENGTH):
            chances = model(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    mask = torch.ones(len(ids), LENGTH)
    mask[::2, -1] = 0
    rewards = torch.zeros(len(ids), LENGTH)
    rewards[:, 0] = torch.isin(ids[:, 2], torch.tensor(DIGITS)).float()
    order = torch.randperm(len(ids), generator=generator)  # verl balances: groups do not stay together
    uids = np.array([f"u{row // ANSWERS}" for row in order.tolist()], dtype=object)
    tensors = {"input_ids": ids, "response_mask": mask, "token_level_rewards": rewards}
    tensors = {name: values[order] for name, values in tensors.items()}
    return DataProto.from_dict(tensors=tensors, non_tensors={"uid": uids})


def log_probs(model, data):
    """Log-probs of the answers under the model, by verl's own function, `[B, L]`."""
    ids = data.batch["input_ids"]
    logits = model(input_ids=ids).logits[:, -LENGTH - 1 : -1]
    return logprobs_from_logits(logits, ids[:, -LENGTH:], inplace_backward=False)


def losses(model, data, algorithm, name, config):
    """One micro-batch's loss as verl's actor makes it."""
    data = compute_advantage(data, adv_estimator=algorithm.adv_estimator, config=algorithm)
    new = log_probs(model, data)
    loss, metrics = get_policy_loss_fn(name)(
        old_log_prob=new.detach(),
        log_prob=new,
        advantages=data.batch["advantages"],
        response_mask=data.batch["response_mask"],
        loss_agg_mode=config.loss_agg_mode,
        config=config,
    )
    return loss, metrics, new, data


@pytest.mark.parametrize(("estimator", "name"), [("v05", "v05_ppo"), ("v05_calibrated_loo", "v05_gspo")])
def test_rewards_rise(model, estimator, name):
    algorithm = OmegaConf.create({"adv_estimator": estimator})
    config = actor_config(loss_agg_mode="token-mean")
    optimiser, generator = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(1)
    curve = []
    for _ in range(25):
        data = sampled(model, generator)
        loss, metrics, _, data = losses(model, data, algorithm, name, config)
        assert metrics["actor/ppo_kl"] == pytest.approx(0, abs=1e-6)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        curve.append(float(data.batch["token_level_rewards"].sum(1).mean()))
    assert sum(curve[-5:]) / 5 > sum(curve[:5]) / 5 + 0.15, curve


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_the_models_gradient_is_that_of_verls_aggregation(model, mode):
    """On policy the loss is -A times a ratio of 1: its gradient in every weight, by agg_loss and autograd."""
    algorithm = OmegaConf.create({"adv_estimator": "v05_loo"})
    data = sampled(model, torch.Generator().manual_seed(2))
    loss, _, new, data = losses(model, data, algorithm, "v05_ppo", actor_config(loss_agg_mode=mode))
    by_hand = agg_loss(-data.batch["advantages"] * (new - new.detach()).exp(), data.batch["response_mask"], mode)
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=1e-7)
    weights = list(model.parameters())
    ours = torch.autograd.grad(loss, weights, retain_graph=True)
    theirs = torch.autograd.grad(by_hand, weights)
    assert max(float(gradient.abs().max()) for gradient in ours) > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
