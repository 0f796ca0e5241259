"""Causal language models of random weights with a tokenizer of words and a chat template, made at test time."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import make_tokenizer

WORDS = ("<end>", "zero", "one", "two", "three", "four", "five", "<user>", "<assistant>", "plus", "is", "?")
TEMPLATE = (
    "{% for message in messages %}<user> {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)

OTHERS: dict[str, dict[str, Any]] = {  # by the name of transformers' configuration
    "Cohere": {"logit_scale": 0.25},
    "Falcon": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
    "Gemma2": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "Granite": {"logits_scaling": 4.0},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Mamba": {"state_size": 4},
    "Mixtral": {"num_local_experts": 2, "router_jitter_noise": 0.5},
    "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.5, "layerdrop": 0.5},
    "Starcoder2": {"residual_dropout": 0.5, "embedding_dropout": 0.5, "attention_dropout": 0.5},
}


def write_model(folder: Path, kind: str = "qwen3", *, chat: bool = True, tied: bool = False, seed: int = 0) -> Path:
    """Write a model of two layers with its tokenizer, and return its folder.

    Args:
        folder: made where missing.
        kind: `qwen3`, `llama` or `gpt2`, which has biases, dropout and learnt positions; or one of `OTHERS`.
        chat: whether the tokenizer has a chat template.
        tied: whether the output layer is the embedding.
        seed: fixes the weights.
    """
    import transformers
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

    tokenizer = make_tokenizer(WORDS, spaced=True, unknown="?", pad_token=None, eos_token="<end>", unk_token="?")
    tokenizer.chat_template = TEMPLATE if chat else None
    tokenizer.save_pretrained(folder)
    shared = dict(vocab_size=len(WORDS), tie_word_embeddings=tied, bos_token_id=None, eos_token_id=0)
    widths = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    widths |= dict(num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2)
    config: dict[str, Any] = {
        "qwen3": lambda: Qwen3Config(**shared, **widths, head_dim=8),
        "llama": lambda: LlamaConfig(**shared, **widths),
        "gpt2": lambda: GPT2Config(**shared, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2),
    }
    if kind == "Gemma3":  # for images too: the settings of its text are nested
        vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        parts = {"text_config": {**shared, **widths, **OTHERS["Gemma2"], "final_logit_softcapping": None}}
        parts |= {"vision_config": vision | {"image_size": 8, "patch_size": 4}}
        config[kind] = lambda: transformers.Gemma3Config(**parts, mm_tokens_per_image=4)
    make = config.get(kind) or (lambda: getattr(transformers, f"{kind}Config")(**shared, **widths, **OTHERS[kind]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(make()).save_pretrained(folder)
    return folder
