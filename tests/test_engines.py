"""Engines by name, what is said of names and options that do not exist, and the weights that engines get."""

from pathlib import Path

import pytest
import torch

from v05.errors import InputError
from v05.rollout.hf import TransformersEngine
from v05.rollout.streaming import EngineDied
from v05.rollout.vllm_server import ServerSettings
from v05.rollout.weights_file import check_weights, weights_file
from v05.small_policy import make_policy
from v05.training.engines import PolicyCodec, check_engine, make_engine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_policy("0123456789+=", "tiny", 0).save(tmp_path / "model")
    return tmp_path / "model"


def test_transformers_samples_what_the_policy_itself_does() -> None:
    policy = make_policy("0123456789+=", "tiny", 0)
    engine, itself = make_engine("hf", policy), TransformersEngine(make_policy("0123456789+=", "tiny", 0))
    arguments = dict(seed=1, temperature=1.0, max_new_tokens=5)
    assert engine.generate(["1+2="], [3], **arguments) == itself.generate(["1+2="], [3], **arguments)


def test_other_engines_read_and_write_as_the_policy_does() -> None:
    policy = make_policy("0123456789+=", "tiny", 0)
    codec = PolicyCodec(policy)
    assert codec.encode("1+2=") == tuple(policy.encode(["1+2="])[0])
    assert codec.decode([*codec.encode("1+2="), *policy.end_ids]) == "1+2="


def test_what_is_not_allowed() -> None:
    policy = make_policy("0123456789+=", "tiny", 0)
    with pytest.raises(InputError, match="engine is 'sglang'; allowed: hf, vllm, vllm-sync, or a server's address"):
        make_engine("sglang", policy)
    with pytest.raises(InputError, match="option 'block_size' of engine 'hf'; allowed: none"):
        make_engine("hf", policy, options={"block_size": 32})
    with pytest.raises(InputError, match="option 'block_size' of engine 'http://x'; allowed: dialect, served_model"):
        make_engine("http://x", policy, options={"block_size": 32})
    for name in ("hf", "vllm", "vllm-sync", "http://127.0.0.1:8000", "https://x"):
        check_engine(name)


def test_an_address_without_a_server_is_the_users_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(settings: ServerSettings) -> None:
        raise EngineDied(f"the server at {settings.url} is not healthy after {settings.startup_timeout:g} s")

    monkeypatch.setattr("v05.training.engines.ServerEngine", nobody)
    with pytest.raises(InputError, match=r"http://here:1 is not healthy after 2 s; allowed: the address of a server"):
        make_engine("http://here:1", make_policy("01", "tiny", 0), model="m", options={"startup_timeout": 2.0})


def test_weights_in_a_file_are_the_weights_and_are_gone_after_use(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    table = torch.randn(4, 3)
    weights = {"embed": table, "head": table, "turned": table.T}
    with weights_file(weights, tmp_path) as path:
        found = load_file(path)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="weights is empty"), weights_file({}, tmp_path):
        pass


def test_weights_are_those_of_the_model(folder: Path) -> None:
    weights = make_policy("0123456789+=", "tiny", 1).model.state_dict()
    check_weights(weights, folder)
    check_weights({}, "some/hub-name")
    part = weights.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"weights has no 'model.norm.weight'; allowed: every tensor of"):
        check_weights(weights, folder)
    with pytest.raises(ValueError, match=r"weights\['model.norm.weight'\] is \(1,\); allowed: \(32,\)"):
        check_weights(weights | {"model.norm.weight": part[:1]}, folder)
    with pytest.raises(ValueError, match="weights has 'stray'; allowed: the tensors of"):
        check_weights(weights | {"model.norm.weight": part, "stray": part}, folder)
