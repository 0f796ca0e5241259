"""Architectures with habits of their own: what is learnt from is what was sampled, or the model is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_user_model import SUMS
from tiny_chat import write_model

from v05.errors import InputError
from v05.rollout.hf import TransformersEngine
from v05.rollout.pack import pack
from v05.training.algorithms import parse_algorithm
from v05.training.learner import Learner, check_linear
from v05.training.pretrained import load_policy
from v05.training.sharding import layers_of
from v05.training.user_model import check_positions


def gap(folder: Path, **options: Any) -> float:
    """How far the trainer is from the sampler in one batch, in nats."""
    policy = load_policy(str(folder), train=True, gradient_checkpointing=options.pop("checkpointing", False))
    settings: dict[str, Any] = dict(learning_rate=0.0, temperature=0.7, epochs=1, micro_batches=2) | options
    learner = Learner(policy, parse_algorithm("dapo"), **settings)
    sampled = TransformersEngine(policy).generate(SUMS[-5:], [3, 2, 0, 4, 3], seed=0, temperature=0.7, max_new_tokens=9)
    rollouts = [rollout for row in sampled for rollout in row]
    assert len({len(rollout.prompt_ids) for rollout in rollouts}) > 1
    batch = pack(rollouts, "token-mean", max_length=9)
    return learner.learn(batch, torch.linspace(-1, 1, len(rollouts)), 0)["sampler_gap"]


@pytest.mark.parametrize("kind", ["Falcon", "Mixtral", "OPT", "Starcoder2"])
def test_nothing_in_training_is_random(kind: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, kind)
    for checkpointing in (False, True):
        assert gap(folder, linear=True, checkpointing=checkpointing) < 1e-5


@pytest.mark.parametrize("kind", ["Falcon", "Mixtral", "OPT", "Starcoder2", "gpt2"])
def test_a_saved_configuration_has_the_models_own_dropout(kind: str, tmp_path: Path) -> None:
    def random_settings(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if "drop" in name or "jitter" in name}

    policy = load_policy(str(write_model(tmp_path / "given", kind)), train=True)
    zeros = random_settings(policy.model.config.to_dict())
    policy.save(tmp_path / "saved")
    given, saved = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("given", "saved"))
    assert random_settings(saved) == random_settings(given)
    assert random_settings(policy.model.config.to_dict()) == zeros  # and training goes on without
    assert zeros != random_settings(given)


@pytest.mark.parametrize("kind", ["Lfm2", "Mamba"])
def test_states_without_attention_are_sampled_from(kind: str, tmp_path: Path) -> None:
    assert gap(write_model(tmp_path, kind)) < 1e-5


def test_a_cache_of_a_kind_of_its_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(str(write_model(tmp_path, "gpt2")))

    def forward(input_ids: Any, cache_params: Any = None, **rest: Any) -> None:
        """Takes what Mamba took before transformers named it as all others do."""

    monkeypatch.setattr(policy.model, "forward", forward)
    with pytest.raises(InputError, match="keeps its context in 'cache_params'; allowed: another model"):
        TransformersEngine(policy).generate(SUMS[:1], [1], seed=0, temperature=1.0, max_new_tokens=2)


def test_a_tokenizer_that_wants_another_library_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wanting(name: str) -> None:
        raise ImportError("\n requires the protobuf library but it was not found in your environment.\n")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", wanting)
    with pytest.raises(InputError, match="cannot be loaded: requires the protobuf library"):
        load_policy(str(tmp_path))


@pytest.mark.parametrize("kind", ["Cohere", "Gemma2", "Granite"])
def test_what_is_done_to_logits_is_learnt_from_or_refused(kind: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, kind)
    assert gap(folder) < 1e-5
    with pytest.raises(InputError, match="allowed for it: loss = logits"):
        gap(folder, linear=True)


def test_a_soft_cap_is_refused_while_logits_are_still_small(tmp_path: Path) -> None:
    policy = load_policy(str(write_model(tmp_path, "Gemma2")), train=True)
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(1e-3 - 1)  # Gemma adds 1
    with pytest.raises(InputError, match="does more to its logits"):
        check_linear(policy)


def test_a_model_for_images_too_has_the_layers_and_the_positions_of_its_text(tmp_path: Path) -> None:
    policy = load_policy(str(write_model(tmp_path, "Gemma3")), train=True)
    assert [type(layer).__name__ for layer in layers_of(policy.model)] == ["Gemma3DecoderLayer"] * 2
    check_positions(policy, 10, 54)
    with pytest.raises(InputError, match="64 positions, of which the longest prompt takes 10"):
        check_positions(policy, 10, 55)


def test_layers_inside_a_decoder_are_found(tmp_path: Path) -> None:
    policy = load_policy(str(write_model(tmp_path, "OPT")))
    assert layers_of(policy.model) == list(policy.model.model.decoder.layers)
