"""V0.5 in a plain loop, without a trainer and without logits: python examples/plain_loop.py Qwen/Qwen3-0.6B"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from v05.kernels import group_advantage, linear_logprob, linear_policy_loss, shrinkage
from v05.packing import Layout

PROMPTS = [f"{a}+{b}=" for a in range(4) for b in range(4)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the model; what is counted stays on the CPU
PLAIN = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)  # what the loss computes


def reward(answer: str) -> float:  # a verifier of your own
    return float(answer.strip()[:1].isdigit())


def roll_out(model, tokenizer, prompts: list[str], length: int) -> list[tuple]:  # sequences and where answers begin
    given = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = given["input_ids"], given["attention_mask"].bool()
    limits = dict(max_new_tokens=length, eos_token_id=tokenizer.eos_token_id, **PLAIN)
    rows = model.generate(ids.to(DEVICE), attention_mask=mask.to(DEVICE), **limits).cpu()
    end = (rows[:, ids.shape[1] :] == tokenizer.eos_token_id).long()
    keep = torch.cat([mask, end.cumsum(1) == end], dim=1)
    return [(row[k], int(m.sum())) for row, k, m in zip(rows, keep, mask, strict=True)]


def train(name: str, steps: int = 30, lr: float = 1e-6, length: int = 8) -> list[float]:
    """Train the model of this name and return the mean reward of every step."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(DEVICE)
    prior = torch.full((len(PROMPTS),), 0.5)
    tokenizer, optimiser, curve = AutoTokenizer.from_pretrained(name), torch.optim.AdamW(model.parameters(), lr=lr), []
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # batches need one; what it fills up is masked
    for _ in range(steps):  # small ones, which bfloat16 weights would lose
        groups, wanted = [[] for _ in PROMPTS], torch.full((len(PROMPTS),), 4)
        while wanted.sum():  # the look-ahead: ask, test, ask again where prior and rewards conflict
            asked = torch.arange(len(PROMPTS)).repeat_interleave(wanted).tolist()
            for group, made in zip(asked, roll_out(model, tokenizer, [PROMPTS[g] for g in asked], length), strict=True):
                groups[group].append((*made, reward(tokenizer.decode(made[0][made[1] :], skip_special_tokens=True))))
            offsets, rows = torch.tensor([0, *map(len, groups)]).cumsum(0), [row for group in groups for row in group]
            rewards = torch.tensor([row[2] for row in rows])
            fused = shrinkage(rewards, offsets, prior, reward_range=(0.0, 1.0))
            wanted = fused.planned - fused.count
        advantages = group_advantage(rewards, offsets, prior=prior, reward_range=(0.0, 1.0))
        ids = torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
        place = torch.arange(ids.shape[1])
        inside = place < torch.tensor([len(row[0]) for row in rows])[:, None]
        answer = inside & (place >= torch.tensor([row[1] for row in rows])[:, None])
        ids, inside, answer, advantages = (each.to(DEVICE) for each in (ids, inside, answer, advantages))
        layout = Layout.of(answer[:, 1:])
        states = model.base_model(input_ids=ids, attention_mask=inside).last_hidden_state[:, :-1]  # predict the next
        given = (layout.pack(states), model.lm_head.weight, layout.pack(ids[:, 1:]))
        old = linear_logprob(*given).logprob.detach()
        weights = torch.full_like(old, 1 / len(old))
        loss, _ = linear_policy_loss(*given, old, advantages, weights, sequence_offsets=layout.sequence_offsets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        prior, curve = 0.8 * prior + 0.2 * fused.mean, [*curve, float(rewards.mean())]  # a prompt's own past
    return curve


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/plain_loop.py MODEL, a folder or a name such as Qwen/Qwen3-0.6B")
    print(*(f"{value:.2f}" for value in train(sys.argv[1])))
