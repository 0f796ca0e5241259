"""The small policy, its tokenizer, the rollout engine and the warm start."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from v05.batch import offsets_of
from v05.policy import Policy
from v05.rollout.hf import TransformersEngine
from v05.small_policy import make_policy
from v05.tasks import make_task
from v05.training.config import TrainConfig
from v05.training.warm_start import (
    ADAM_RATE,
    MUON_RATE,
    cache_key,
    imitate,
    imitation_loss,
    make_optimizers,
    warm_start,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ALPHABET = "0123456789+="


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy(ALPHABET, "tiny", 0)


def test_the_default_policy_is_small_and_of_the_qwen3_architecture() -> None:
    small = make_policy(ALPHABET, "small", 0)
    assert small.model.config.model_type == "qwen3"
    assert 200_000 <= small.parameters <= 1_000_000


def test_texts_survive_the_tokenizer(policy: Policy) -> None:
    ids = policy.encode(["12+3=", "0"])
    assert [len(row) for row in ids] == [5, 1]
    assert [policy.decode(row) for row in ids] == ["12+3=", "0"]
    assert policy.decode([*ids[1], policy.tokenizer.eos_token_id]) == "0"
    for bad in ("1-2", "", "a"):
        with pytest.raises(ValueError, match="cannot encode"):
            policy.encode(["1", bad])


def test_weights_depend_on_the_seed_only(policy: Policy) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    same, other = make_policy(ALPHABET, "tiny", 0), make_policy(ALPHABET, "tiny", 1)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [candidate.model.lm_head.weight for candidate in (policy, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    with pytest.raises(ValueError, match="allowed: small, tiny"):
        make_policy(ALPHABET, "huge", 0)


def test_response_logits_do_not_depend_on_the_rest_of_the_batch(policy: Policy) -> None:
    prompts = policy.encode(["1+2=", "12+34+56=", "7="])
    answers = policy.encode(["3", "201", "70"])
    tokens = torch.tensor([token for answer in answers for token in answer])
    together = policy.response_logits(prompts, tokens, offsets_of([1, 3, 2]))
    alone = [
        policy.response_logits([prompt], torch.tensor(answer), offsets_of([len(answer)]))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert (together - torch.cat(alone)).abs().max() < 1e-5


def test_rollouts_are_reproducible_and_report_their_log_probabilities(policy: Policy) -> None:
    engine = TransformersEngine(policy)
    prompts, counts = ["1+2=", "12+34+56=", "7+7="], [3, 0, 5]

    def generate(seed: int) -> list:
        return engine.generate(prompts, counts, seed=seed, temperature=0.8, max_new_tokens=4)

    rollouts = generate(1)
    assert [len(row) for row in rollouts] == counts
    assert rollouts == generate(1)
    assert rollouts != generate(2)
    flat = [rollout for row in rollouts for rollout in row]
    tokens = torch.tensor([token for rollout in flat for token in rollout.token_ids])
    offsets = offsets_of([len(rollout.token_ids) for rollout in flat])
    logits = policy.response_logits([rollout.prompt_ids for rollout in flat], tokens, offsets)
    expected = torch.log_softmax(logits / 0.8, dim=-1).gather(1, tokens[:, None])[:, 0]
    reported = torch.tensor([value for rollout in flat for value in rollout.logprobs])
    assert (expected - reported).abs().max() < 1e-5
    end = policy.tokenizer.eos_token_id
    for rollout in flat:
        assert 1 <= len(rollout.token_ids) <= 4
        assert rollout.finished == (rollout.token_ids[-1] == end)
        assert end not in rollout.token_ids[:-1]
        assert rollout.text == policy.decode(rollout.token_ids)


def test_the_engine_samples_from_the_weights_it_was_given_last() -> None:
    policy = make_policy(ALPHABET, "tiny", 0)
    engine = TransformersEngine(policy)
    with torch.no_grad():
        policy.model.lm_head.weight.zero_()
    request = {"seed": 0, "temperature": 1.0, "max_new_tokens": 2}
    before = engine.generate(["1="], [1], **request)[0][0]
    engine.update_weights(policy.model.state_dict())
    after = engine.generate(["1="], [1], **request)[0][0]
    assert before.logprobs != after.logprobs
    assert after.logprobs[0] == pytest.approx(-torch.log(torch.tensor(15.0)).item())


def test_bad_requests_are_refused(policy: Policy) -> None:
    engine = TransformersEngine(policy)
    assert engine.generate(["1="], [0], seed=0, temperature=1.0, max_new_tokens=1) == [[]]
    assert engine.generate([], [], seed=0, temperature=1.0, max_new_tokens=1) == []
    for counts, temperature, limit, message in (
        ([1, 1], 1.0, 1, "1 prompts with 2 counts"),
        ([-1], 1.0, 1, r"counts\[0\] is -1"),
        ([1], 0.0, 1, "temperature is 0.0"),
        ([1], 1.0, 0, "max_new_tokens is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.generate(["1="], counts, seed=0, temperature=temperature, max_new_tokens=limit)


def test_imitation_lowers_the_loss_and_is_deterministic() -> None:
    task = make_task("arithmetic")
    losses = []
    for _ in range(2):
        policy = make_policy(task.alphabet, "tiny", 0)
        before = imitation_loss(policy, task, 1, 0, 64).item()
        imitate(policy, task, 20, 0)
        losses.append((before, imitation_loss(policy, task, 1, 0, 64).item()))
    assert losses[0] == losses[1]
    assert losses[0][1] < losses[0][0] - 0.1


def test_the_rates_of_imitation_rise_and_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    task, made, seen = make_task("arithmetic"), [], []
    monkeypatch.setattr("v05.training.warm_start.WARM_UP", 2)
    monkeypatch.setattr(
        "v05.training.warm_start.make_optimizers", lambda policy: made.extend(make_optimizers(policy)) or made
    )
    policy = make_policy(task.alphabet, "tiny", 0)
    imitate(policy, task, 4, 0, lambda *step: seen.append([each.param_groups[0]["lr"] for each in made]))
    muon, adam = zip(*seen, strict=True)
    assert muon == pytest.approx([MUON_RATE * share for share in (0.5, 0.75, 0.5, 0.25)])
    assert adam == pytest.approx([ADAM_RATE * share for share in (0.5, 0.75, 0.5, 0.25)])


def test_a_finished_warm_start_is_reused(tmp_path: Path) -> None:
    config = dataclasses.replace(TrainConfig(), policy="tiny", warm_start_steps=2)
    task, steps = make_task("arithmetic"), []
    first = warm_start(config, task, tmp_path, lambda done, total, loss: steps.append(done))
    second = warm_start(dataclasses.replace(config, seed=7), task, tmp_path, lambda *step: steps.append(step))
    assert steps == [1, 2]
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])
    assert len({cache_key(dataclasses.replace(config, warm_start_seed=seed)) for seed in range(3)}) == 3


def test_saving_says_nothing(policy: Policy, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    policy.save(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.is_progress_bar_enabled()


def test_a_saved_policy_loads_in_transformers(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("12+3=")["input_ids"] == policy.encode(["12+3="])[0]
    inputs = torch.tensor(policy.encode(["12+3="]))
    assert torch.equal(model(inputs).logits, policy.model.eval()(inputs).logits)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen3"
