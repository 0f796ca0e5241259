"""vLLM's token states beside transformers', on a random Qwen3 of two layers made here."""

from pathlib import Path

import pytest
import torch
from tiny_models import make_tokenizer, qwen3_config

from v05.value.embedder import TransformersEmbedder
from v05.value.vllm_embedder import VllmEmbedder

pytestmark = pytest.mark.vllm

PROMPTS = ["47+8=", "", "1", "2+3=" * 40, "9+9+9=", "12" * 300]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3ForCausalLM

    path = tmp_path_factory.mktemp("qwen3")
    letters = ["<pad>", "<eos>", *"0123456789+="]
    make_tokenizer(letters).save_pretrained(path)
    torch.manual_seed(0)
    Qwen3ForCausalLM(qwen3_config(len(letters), 64, heads=4, max_position_embeddings=512)).save_pretrained(path)
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
