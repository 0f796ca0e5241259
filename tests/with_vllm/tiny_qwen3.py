"""A random Qwen3 that both vLLM and transformers run, and what transformers says of its tokens."""

from collections.abc import Mapping
from pathlib import Path

import torch
from tiny_models import make_tokenizer, qwen3_config
from torch import Tensor

from v05.rollout.engine import Rollout

LETTERS = ["<pad>", "<eos>", *"0123456789+=abcdefghijklmnopqrstuvwxyz:"]
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}:{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


def make_model(seed: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Return a causal Qwen3 of two layers whose distributions are far from uniform."""
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(seed)
    settings = dict(max_position_embeddings=512, initializer_range=0.15, tie_word_embeddings=False)
    config = qwen3_config(len(LETTERS), 64, heads=4, pad_token_id=0, eos_token_id=1, bos_token_id=None, **settings)
    return Qwen3ForCausalLM(config).eval().to(dtype)


def write(folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """Write the model of `seed` and its tokenizer of single letters to `folder`."""
    tokenizer = make_tokenizer(LETTERS)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    make_model(seed, dtype).save_pretrained(folder)
    return folder


@torch.no_grad()
def logprobs(model: torch.nn.Module, rollout: Rollout, temperature: float) -> Tensor:
    """Return what `model` gives each token of the answer, [T] float32, from one pass over prompt and answer."""
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.token_ids]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1].float()
    chosen = torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(rollout.token_ids)[:, None])
    return chosen[:, 0]


def gap(models: Mapping[int, torch.nn.Module], rollout: Rollout, temperature: float = 1.0) -> float:
    """Return the largest |difference| between the rollout's log-probs and those of each token's own version."""
    assert len(rollout.versions) == len(rollout.token_ids) == len(rollout.logprobs) > 0
    found, worst = torch.tensor(rollout.logprobs), 0.0
    for version in set(rollout.versions):
        mine = torch.tensor(rollout.versions) == version
        worst = max(worst, float((logprobs(models[version], rollout, temperature) - found)[mine].abs().max()))
    return worst
