"""A policy small enough to train for a few steps in a second, a task for it, and trainers on both."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from datasets import Dataset
from tiny_models import make_tokenizer, qwen3_config
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM
from trl import GRPOTrainer

from v05.integrations.trl import V05Config, V05Trainer

VOCABULARY, WIDTH = 24, 6
LETTERS = [chr(97 + i) for i in range(VOCABULARY - 2)]
PROMPTS = [f"{a} {b} c" for a in "abcd" for b in "ef"]


def write_policy(folder: str, width: int = 16, heads: int = 2) -> str:
    """Write a random Qwen3 of one layer and its tokenizer of one token a letter; return the folder."""
    words = ["<pad>", "<eos>", *LETTERS]
    make_tokenizer(words, spaced=True, unk_token="<pad>", padding_side="left").save_pretrained(folder)
    torch.manual_seed(0)
    settings = dict(num_hidden_layers=1, pad_token_id=0, eos_token_id=1, initializer_range=0.4)
    config = qwen3_config(VOCABULARY, width, heads=heads, tie_word_embeddings=False, **settings)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def starts_early(completions, **_):
    """1 where the first letter is in the first half of the alphabet, else 0."""
    return [float(text[:1] != "" and text[0] < "l") for text in completions]


def make_trainer(
    folder,
    output,
    rewards=starts_early,
    trainer=V05Trainer,
    config=V05Config,
    extra=None,
    weights=torch.float32,
    **options,
):
    """A trainer on the CPU: 8 rows a step, 4 to a prompt, unless `options` say otherwise; `weights` is their dtype."""
    settings = dict(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=WIDTH,
        gradient_checkpointing=False,
        disable_tqdm=True,
        learning_rate=1e-2,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        **({"k_max": 12} if config is V05Config else {}),
    )
    parts = dict(
        model=Qwen3ForCausalLM.from_pretrained(folder, dtype=weights),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
    )
    return trainer(
        reward_funcs=rewards,
        args=config(**(settings | options)),
        **(parts | (extra or {})),
    )


@contextmanager
def trl_s_logprobs(trainer: GRPOTrainer) -> Iterator[None]:
    """Let the log-probs and entropies of a trainer be those that TRL's own code finds."""
    name = "_get_per_token_logps_and_entropies"
    setattr(trainer, name, types.MethodType(getattr(GRPOTrainer, name), trainer))
    try:
        yield
    finally:
        delattr(trainer, name)
