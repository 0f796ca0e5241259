"""Ragged groups in micro-batches, off policy: the gradient through verl's registries is the definition's."""

import numpy as np
import pytest
import torch
from batches import actor_config
from omegaconf import OmegaConf
from tiny_models import LETTERS, write_qwen3
from transformers import AutoModelForCausalLM
from verl import DataProto
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.ray_trainer import compute_advantage

import v05.integrations.verl  # noqa: F401  (registers)

pytestmark = pytest.mark.verl
PROMPTS, WIDTH, DIGITS = 8, 4, range(2, 12)  # token ids of the ten digits in `tiny_models`
SIZES = [4, 6, 3, 5, 8, 4, 2, 4]  # rollouts of each prompt


def roll_out(model, rng):
    """A ragged batch as verl's trainer holds it; a rollout earns 1 if its first token is a digit, and ends at a "+"."""
    prompts = torch.tensor([[2 + p, 12, 3 + p, 13] for p in range(PROMPTS)])  # "0+1=", "1+2=" and so on
    rows = torch.from_numpy(rng.permutation(np.repeat(np.arange(PROMPTS), SIZES)))
    ids, end = prompts[rows], 2 + LETTERS.index("+")
    for _ in range(WIDTH):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1].softmax(-1).multinomial(1)], dim=1)
    ended = (ids[:, 4:] == end).long()
    mask = (ended.cumsum(1) - ended == 0).long()
    rewards = torch.zeros(len(rows), WIDTH)
    rewards[torch.arange(len(rows)), mask.sum(1) - 1] = sum(ids[:, 4] == digit for digit in DIGITS).float()
    tensors = {"ids": ids, "response_mask": mask, "token_level_rewards": rewards}
    uids = np.array([f"prompt-{row}" for row in rows.tolist()], dtype=object)
    return DataProto.from_dict(tensors=tensors, non_tensors={"uid": uids})


def log_probs(model, ids):
    """Of the answers, [B, WIDTH]."""
    logits = model(ids).logits[:, 3:-1].log_softmax(-1)
    return logits.gather(2, ids[:, 4:, None]).squeeze(2)


def backward(model, data, name, mode, parts):
    """The gradient of the batch in `parts` micro-batches, as a verl worker accumulates it; returns the loss."""
    sequences, tokens = len(data), int(data.batch["response_mask"].sum())
    config = actor_config(clip_ratio_low=0.2, clip_ratio_high=0.28)
    config.global_batch_info.update(dp_size=1, batch_num_tokens=tokens, global_batch_size=sequences)
    total = 0.0
    for rows in torch.arange(sequences).tensor_split(parts):
        part = data.batch[rows]
        loss, _ = get_policy_loss_fn(name)(
            old_log_prob=part["old_log_probs"],
            log_prob=log_probs(model, part["ids"]),
            advantages=part["advantages"],
            response_mask=part["response_mask"],
            loss_agg_mode=mode,
            config=config,
        )
        loss.backward()
        total += float(loss.detach())
    return total


def prepare(model, rng):
    """A batch with advantages and old log-probs."""
    data = roll_out(model, rng)
    config = OmegaConf.create({"adv_estimator": "v05"})
    data = compute_advantage(data, adv_estimator=config.adv_estimator, config=config)
    with torch.no_grad():
        data.batch["old_log_probs"] = log_probs(model, data.batch["ids"])
    return data


@pytest.fixture
def model(tmp_path):
    """A Qwen3 of two layers."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(write_qwen3(tmp_path), dtype=torch.float32)


def by_hand(model, data, mode):
    """V0.5's loss in plain float64 loops over rows, from the definition: no kernel, no verl."""
    rewards = data.batch["token_level_rewards"].sum(1).double()
    uids, mask = data.non_tensor_batch["uid"], data.batch["response_mask"].bool()
    logs, old = log_probs(model, data.batch["ids"]).double(), data.batch["old_log_probs"].double()
    lengths, loss = mask.sum(1), 0.0
    for row, uid in enumerate(uids):
        group = rewards[torch.from_numpy(uids == uid)]
        prior = float(rewards[torch.from_numpy(uids != uid)].mean())
        mean, noise = float(group.mean()), 0.25 / len(group)  # rewards in [0, 1]: a variance of 1/4 at most
        conflict = max(0.0, (mean - prior) ** 2 - noise)
        trust = conflict / (conflict + noise)
        advantage = rewards[row] - (trust * mean + (1 - trust) * prior)
        ratio = (logs[row] - old[row]).exp()[mask[row]]
        terms = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        terms = torch.minimum(terms, -3 * advantage) if advantage < 0 else terms
        loss = loss + terms.sum() / (lengths.sum() if mode == "token-mean" else len(uids) * lengths[row])
    return loss


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("parts", [1, 4])
def test_the_gradient_is_the_definitions(model, mode, parts):
    """However the batch is split, and after the policy has moved away from the one that was sampled."""
    torch.manual_seed(2)
    data = prepare(model, np.random.default_rng(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    weights = list(model.parameters())
    expected = by_hand(model, data, mode)
    gradients = torch.autograd.grad(expected, weights)
    assert backward(model, data, "v05_ppo", mode, parts) == pytest.approx(float(expected), rel=1e-5)
    for weight, gradient in zip(weights, gradients, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6)
