"""Token states: each prompt as the model sees it alone, in order, cut where too long, cached by content."""

import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_embedder, write_qwen3

from v05.errors import InputError
from v05.fingerprint import folder_fingerprint, model_fingerprint
from v05.value.cache import EmbeddingCache
from v05.value.embedder import (
    CachedEmbedder,
    MeanEmbedder,
    TransformersEmbedder,
    sentence_embedder,
    sentence_folder,
)
from v05.value.vllm_embedder import VllmEmbedder, weights_of

PROMPTS = ["47+8=", "1", "", "what is 2+3?", "9=" * 30, "1"]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> TransformersEmbedder:
    return tiny_embedder(tmp_path_factory.mktemp("qwen3"))


def test_states_equal_the_model_on_each_prompt_alone(embedder: TransformersEmbedder) -> None:
    found = embedder.embed(PROMPTS)
    assert found.offsets.tolist() == [0, 5, 6, 7, 19, 79, 80]
    for row, prompt in enumerate(PROMPTS):
        ids = embedder.tokenizer(prompt)["input_ids"] or [0]
        with torch.no_grad():
            expected = embedder.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(found.states[found.offsets[row] : found.offsets[row + 1]], expected)
        torch.testing.assert_close(found.last[row], expected[-1])
        torch.testing.assert_close(found.mean[row], expected.mean(0))
    assert found.truncated == 0
    assert len(embedder.embed([]).states) == 0


def test_batches_give_the_same_and_one_at_a_time_the_same_bits(embedder: TransformersEmbedder) -> None:
    model, tokenizer = embedder.model, embedder.tokenizer
    batched = TransformersEmbedder(model, tokenizer, "m", batch_tokens=200).embed(PROMPTS)
    alone = embedder.embed(PROMPTS)
    torch.testing.assert_close(batched.states, alone.states, atol=1e-5, rtol=1e-5)
    backwards = embedder.embed(PROMPTS[::-1])
    assert torch.equal(backwards.last.flip(0), alone.last)


def test_long_prompts_are_cut_and_counted(tmp_path: Path) -> None:
    short = tiny_embedder(tmp_path, max_tokens=10)
    found = short.embed(PROMPTS)
    assert found.truncated == 2
    assert found.offsets.diff().max() == 10
    cached = CachedEmbedder(short, EmbeddingCache(tmp_path / "cache.sqlite"))
    assert [cached.embed(PROMPTS).truncated for _ in range(2)] == [2, 2]
    assert cached.embed(PROMPTS[:3]).truncated == 0


def test_layers_stand_side_by_side(embedder: TransformersEmbedder) -> None:
    both = TransformersEmbedder(embedder.model, embedder.tokenizer, "m", layers=(0, 2))
    found, width = both.embed(PROMPTS), embedder.width
    assert both.width == 2 * width == found.states.shape[1]
    torch.testing.assert_close(found.states[:, width:], embedder.embed(PROMPTS).states)
    ids = torch.tensor(embedder.tokenizer(PROMPTS[0])["input_ids"])
    torch.testing.assert_close(found.states[:5, :width], embedder.model.embed_tokens(ids))
    pooled = MeanEmbedder(both, parts=2).embed(PROMPTS)
    assert pooled.offsets.tolist() == list(range(7))
    torch.testing.assert_close(pooled.last.unflatten(1, (2, -1)).norm(dim=-1), torch.ones(6, 2))


def test_the_cache_is_asked_first_and_gives_the_same_bits(embedder: TransformersEmbedder, tmp_path: Path) -> None:
    class Counting:
        name, width, asked = embedder.name, embedder.width, 0

        def embed(self, prompts):
            self.asked += len(prompts)
            return embedder.embed(prompts)

    inner = Counting()
    cached = CachedEmbedder(inner, EmbeddingCache(tmp_path / "cache.sqlite"), chunk=2)
    first = cached.embed(PROMPTS)
    assert inner.asked == 5  # distinct prompts
    second = cached.embed([*PROMPTS, "new"])
    assert inner.asked == 6
    assert torch.equal(first.states, embedder.embed(PROMPTS).states)
    assert torch.equal(second.states[: len(first.states)], first.states)
    assert len(cached.embed([]).states) == 0


def test_other_weights_have_another_name(embedder: TransformersEmbedder) -> None:
    before = model_fingerprint(embedder.model, embedder.tokenizer)
    weight = next(embedder.model.parameters())
    with torch.no_grad():
        weight += 1
        after = model_fingerprint(embedder.model, embedder.tokenizer)
        weight -= 1
    assert before != after


def test_a_model_that_keeps_positions_for_itself_takes_what_its_tokenizer_says(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    tokenizer = tiny_embedder(tmp_path).tokenizer
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=18, pad_token_id=1, **sizes)
    RobertaModel(config).save_pretrained(tmp_path / "roberta")
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(tmp_path / "roberta")
    found = TransformersEmbedder.from_pretrained(tmp_path / "roberta").embed(["1+2+3+4+5+6+7+8+9="])
    assert (len(found.states), found.truncated) == (16, 1)


def test_another_tokenizer_has_another_name(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    first = tiny_embedder(tmp_path)
    end = first.tokenizer.convert_ids_to_tokens(1)
    first.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {end}", special_tokens=[(end, 1)])
    first.tokenizer.save_pretrained(tmp_path)
    second = TransformersEmbedder.from_pretrained(tmp_path)
    assert len(second.embed(["1+2="]).states) == 1 + len(tiny_embedder(tmp_path / "plain").embed(["1+2="]).states)
    assert first.name != second.name


def test_loading_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    TransformersEmbedder.from_pretrained(sentence_folder())
    assert capfd.readouterr() == ("", "")


def test_the_packaged_sentence_model_knows_what_is_alike() -> None:
    found = sentence_embedder()
    texts = ["What is the area of a circle?", "Find the area of the disc.", "How many primes are below 100?"]
    wording, sentence = found.embed(texts).last.chunk(2, dim=-1)
    assert sentence.shape == (3, 384)
    assert sentence[0] @ sentence[1] > sentence[0] @ sentence[2] + 0.2
    assert not torch.allclose(wording, sentence)


def test_what_cannot_be_had_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"backbone .*absent"):
        TransformersEmbedder.from_pretrained(tmp_path / "absent")
    with pytest.raises(ValueError, match="max_tokens is 0"):
        tiny_embedder(tmp_path, max_tokens=0)


@pytest.fixture
def vllm_name(monkeypatch) -> Any:
    """The name of vLLM's embedder of a model, where the engine starts nothing."""

    class Engine:
        llm_engine = SimpleNamespace(model_config=SimpleNamespace(get_hidden_size=lambda: 32))

        def __init__(self, **_: Any) -> None: ...

        def get_tokenizer(self) -> None: ...

    library, config = ModuleType("vllm"), ModuleType("vllm.config")
    vars(library).update(LLM=Engine, config=config)
    vars(config).update(PoolerConfig=lambda **_: None)
    monkeypatch.setitem(sys.modules, "vllm", library)
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    return lambda *given: VllmEmbedder(*given).name


def test_the_name_of_vllms_embedder_changes_with_the_weights(tmp_path: Path, vllm_name) -> None:
    """Of a folder that another checkpoint is put into: one value in the middle of one weight is enough to tell."""
    folder, file = write_qwen3(tmp_path / "model"), tmp_path / "model" / "model.safetensors"
    first = vllm_name(folder, 64, "float32")
    assert vllm_name(shutil.copytree(folder, tmp_path / "copy"), 64, "float32") == first
    assert len({first, vllm_name(folder, 65, "float32"), vllm_name(folder, 64, "bfloat16")}) == 3
    assert vllm_name(folder, 64, "float32", {"quantization": "fp8"}) != first
    weights = load_file(file)
    weights["layers.0.post_attention_layernorm.weight"][16] += 1
    save_file(weights, file, {"format": "pt"})
    second = vllm_name(folder, 64, "float32")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"rope_theta"', '"rope_theta_"'))
    assert len({first, second, vllm_name(folder, 64, "float32")}) == 3


def test_weights_by_a_hubs_name_are_those_of_the_local_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--some--model"
    for revision, seed in (("a" * 40, 0), ("b" * 40, 1)):
        write_qwen3(home / "snapshots" / revision, seed)
    (home / "refs").mkdir()
    names = []
    for revision in "ab":
        (home / "refs" / "main").write_text(revision * 40)
        names.append(weights_of("some/model"))
    assert names == [weights_of("some/model", revision * 40) for revision in "ab"]
    assert names[0] != names[1]
    assert weights_of("some/other") != weights_of("some/other")  # what is not known is not reused
    assert weights_of("no name of a hub.gguf") != weights_of("no name of a hub.gguf")


def test_weights_of_another_kind_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert folder_fingerprint(tmp_path) is None
    names = set()
    for content in (b"a" * 1000, b"a" * 500 + b"b" + b"a" * 499):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        names.add(folder_fingerprint(tmp_path))
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")
        names.add(folder_fingerprint(tmp_path))
    assert len(names) == 4
    assert folder_fingerprint(tmp_path / "owner" / "name") is None
