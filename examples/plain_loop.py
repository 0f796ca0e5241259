"""V0.5 in a plain loop, without a trainer and without logits: python examples/plain_loop.py Qwen/Qwen3-0.6B"""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from v05.kernels import group_advantage, linear_logprob, linear_policy_loss, shrinkage
from v05.packing import Layout

PROMPTS = [f"{a}+{b}=" for a in range(4) for b in range(4)]
REWARDS = (0.0, 1.0)  # the smallest and the largest
FIRST = 4  # rollouts that every prompt starts with
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the model; what is counted stays on the CPU
PLAIN = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)  # what the loss computes


class Sampled(NamedTuple):
    """The tokens of a prompt and its answer, [L] int64, and where the answer begins."""

    ids: Tensor
    start: int


def reward(answer: str) -> float:
    """Return what an answer is worth; a verifier of your own goes here."""
    return float(answer.strip()[:1].isdigit())


def roll_out(model: Any, tokenizer: Any, prompts: list[str], length: int) -> list[Sampled]:
    """Sample an answer of at most `length` tokens to each prompt."""
    given = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = given["input_ids"], given["attention_mask"].bool()
    limits = dict(max_new_tokens=length, eos_token_id=tokenizer.eos_token_id)
    rows = model.generate(ids.to(DEVICE), attention_mask=mask.to(DEVICE), **limits, **PLAIN).cpu()
    end = (rows[:, ids.shape[1] :] == tokenizer.eos_token_id).long()
    kept = torch.cat([mask, end.cumsum(1) == end], dim=1)  # of an answer all up to its first end token
    return [Sampled(row[keep], int(own.sum())) for row, keep, own in zip(rows, kept, mask, strict=True)]


def look_ahead(model: Any, tokenizer: Any, prior: Tensor, length: int) -> tuple[list[Sampled], Tensor, Tensor, Tensor]:
    """Ask, test, and ask again where prior and rewards conflict.

    Returns the rollouts, group after group; their rewards [N] and offsets [G + 1]; and the mean reward of each group.
    """
    groups: list[list[tuple[Sampled, float]]] = [[] for _ in PROMPTS]
    wanted = torch.full((len(PROMPTS),), FIRST)
    while wanted.sum():
        asked = torch.arange(len(PROMPTS)).repeat_interleave(wanted).tolist()
        answers = roll_out(model, tokenizer, [PROMPTS[group] for group in asked], length)
        for group, sampled in zip(asked, answers, strict=True):
            text = tokenizer.decode(sampled.ids[sampled.start :], skip_special_tokens=True)
            groups[group].append((sampled, reward(text)))
        offsets = torch.tensor([0, *map(len, groups)]).cumsum(0)
        rewards = torch.tensor([value for group in groups for _, value in group])
        fused = shrinkage(rewards, offsets, prior, reward_range=REWARDS)
        wanted = fused.planned - fused.count
    return [sampled for group in groups for sampled, _ in group], rewards, offsets, fused.mean


def loss_of(model: Any, rollouts: list[Sampled], advantages: Tensor) -> Tensor:
    """Return the loss of the answers' tokens, straight from the hidden states before them."""
    ids = pad_sequence([sampled.ids for sampled in rollouts], batch_first=True)
    place = torch.arange(ids.shape[1])
    inside = place < torch.tensor([len(sampled.ids) for sampled in rollouts])[:, None]
    answer = inside & (place >= torch.tensor([sampled.start for sampled in rollouts])[:, None])
    ids, inside, answer, advantages = (each.to(DEVICE) for each in (ids, inside, answer, advantages))
    states = model.base_model(input_ids=ids, attention_mask=inside).last_hidden_state
    layout = Layout.of(answer[:, 1:])
    given = (layout.pack(states[:, :-1]), model.lm_head.weight, layout.pack(ids[:, 1:]))  # a state predicts the next
    old = linear_logprob(*given).logprob.detach()
    weights = torch.full_like(old, 1 / len(old))
    return linear_policy_loss(*given, old, advantages, weights, sequence_offsets=layout.sequence_offsets).loss


def train(name: str, steps: int = 30, lr: float = 1e-6, length: int = 8) -> list[float]:
    """Train the model of this name and return the mean reward of every step."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(DEVICE)  # bfloat16 loses small steps
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # batches need one; what it fills up is masked
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr)
    prior, curve = torch.full((len(PROMPTS),), 0.5), []
    for _ in range(steps):
        rollouts, rewards, offsets, means = look_ahead(model, tokenizer, prior, length)
        advantages = group_advantage(rewards, offsets, prior=prior, reward_range=REWARDS)
        optimiser.zero_grad()
        loss_of(model, rollouts, advantages).backward()
        optimiser.step()
        prior = 0.8 * prior + 0.2 * means  # from each prompt's own past
        curve.append(float(rewards.mean()))
    return curve


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/plain_loop.py MODEL, a folder or a name such as Qwen/Qwen3-0.6B")
    print(*(f"{value:.2f}" for value in train(sys.argv[1])))
