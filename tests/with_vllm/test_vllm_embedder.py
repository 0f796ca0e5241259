"""vLLM's token states beside transformers', on a random Qwen3 of two layers made here."""

from pathlib import Path

import pytest
import torch

from v05.value.embedder import TransformersEmbedder
from v05.value.vllm_embedder import VllmEmbedder

pytestmark = pytest.mark.vllm

PROMPTS = ["47+8=", "", "1", "2+3=" * 40, "9+9+9=", "12" * 300]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    path = tmp_path_factory.mktemp("qwen3")
    letters = ["<pad>", "<eos>", *"0123456789+="]
    backend = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(letters)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(letters),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def test_token_states_equal_those_of_transformers(folder: Path) -> None:
    expected = TransformersEmbedder.from_pretrained(folder, max_tokens=256).embed(PROMPTS)
    engine = VllmEmbedder(folder, 256, "float32", {"enforce_eager": True, "block_size": 32, "max_num_seqs": 8})
    found = engine.embed(PROMPTS)
    assert expected.truncated == found.truncated == 1
    assert torch.equal(found.offsets, expected.offsets)
    assert int(found.offsets[-1]) == sum(len(prompt) or 1 for prompt in PROMPTS[:-1]) + 256
    assert (found.states - expected.states).abs().max() < 1e-4
    assert expected.states.std() > 0.5  # not the agreement of zeros
    assert (engine.embed(PROMPTS[:1]).last - expected.last[:1]).abs().max() < 1e-4
    assert len(engine.embed([]).states) == 0
