"""The three vLLM engines keep one contract: transformers' log-probs under the weights that a token's version names."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.with_vllm import tiny_qwen3
from tests.with_vllm.running import KINDS, LONGEST, Running
from v05.rollout.engine import Rollout
from v05.rollout.streaming import EngineDied, Outcome, Request

pytestmark = pytest.mark.vllm

PROMPTS = ["12+3=", "9+9=a", "abc" * 30]
MODELS = {version: tiny_qwen3.make_model(version) for version in range(4)}  # 0 is what the engines start with


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3.write(tmp_path_factory.mktemp("qwen3") / "model", 0)


@pytest.fixture(scope="module", params=KINDS)
def running(request: pytest.FixtureRequest, folder: Path) -> Iterator[Running]:
    running = Running(request.param, folder, "float32")
    yield running
    running.close()


def push(running: Running, version: int) -> None:
    running.engine.update_weights(MODELS[version].state_dict(), version)


def collect(running: Running, count: int) -> list[Outcome]:
    outcomes: list[Outcome] = []
    while len(outcomes) < count:
        found = running.engine.wait(30)
        assert found, "nothing finished in 30 seconds"
        outcomes += found
    return outcomes


def generate(running: Running, **changes: float) -> list[list[Rollout]]:
    settings = {"seed": 3, "temperature": 0.7, "max_new_tokens": 40} | changes
    return running.engine.generate(PROMPTS, [3, 0, 2], **settings)


def test_log_probs_are_those_of_transformers_before_and_after_an_update(running: Running) -> None:
    for version in (0, 1, 2):
        if version:
            push(running, version)
        groups = generate(running)
        assert [len(group) for group in groups] == [3, 0, 2]
        for rollout in groups[0] + groups[2]:
            assert set(rollout.versions) == {version}
            assert tiny_qwen3.gap(MODELS, rollout, 0.7) < 1e-4
        elsewhere = tiny_qwen3.logprobs(MODELS[(version + 1) % 3], groups[0][0], 0.7)
        assert (elsewhere - torch.tensor(groups[0][0].logprobs)).abs().max() > 0.1  # the weights do matter


def test_the_coldest_sampling_takes_transformers_best_token(running: Running) -> None:
    push(running, 3)
    (rollout,) = running.engine.generate(["12+3="], [1], seed=0, temperature=0.01, max_new_tokens=60)[0]
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.token_ids]])
    with torch.no_grad():
        logits = MODELS[3](input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
    best = logits.topk(2, -1)
    clear = best.values[:, 0] - best.values[:, 1] > 0.2  # at 0.01, a second best 20 units away is never drawn
    assert clear.sum() > 20
    assert torch.equal(best.indices[clear, 0], torch.tensor(rollout.token_ids)[clear])


def test_a_seed_fixes_the_answer_alone_or_in_a_batch(running: Running) -> None:
    request = Request(0, PROMPTS[0], 11, 1.0, 50)
    running.engine.submit([request])
    (alone,) = collect(running, 1)
    crowd = [Request(number, PROMPTS[number % 3], 100 + number, 0.9, 50) for number in range(1, 12)]
    running.engine.submit([*crowd[:5], request, *crowd[5:]])
    (again,) = [outcome for outcome in collect(running, 12) if outcome.number == 0]
    assert alone.rollout is not None
    assert again.rollout is not None
    assert again.rollout.token_ids == alone.rollout.token_ids
    assert torch.tensor(again.rollout.logprobs).allclose(torch.tensor(alone.rollout.logprobs), atol=1e-4)
    assert generate(running)[0] != generate(running, seed=4)[0]


def test_lengths_and_stop_reasons(running: Running) -> None:
    push(running, 0)
    rollouts = running.engine.generate(["1="], [24], seed=1, temperature=1.0, max_new_tokens=60)[0]
    ended = [rollout for rollout in rollouts if rollout.finished]
    assert 0 < len(ended) < 24
    for rollout in rollouts:
        assert (rollout.token_ids[-1] == 1) == rollout.finished
        assert 1 not in rollout.token_ids[:-1]
        assert rollout.finished or len(rollout.token_ids) == 60
        letters = [tiny_qwen3.LETTERS[token] for token in rollout.token_ids if token > 1]
        assert rollout.text == "".join(letters)
    (one,) = running.engine.generate(["1="], [1], seed=1, temperature=1.0, max_new_tokens=1)[0]
    assert len(one.token_ids) == 1
    requests = [Request(0, "1" * (LONGEST - 6), 0, 1.0, 500), Request(1, "1" * (LONGEST + 1), 0, 1.0, 5)]
    running.engine.submit([*requests, Request(2, "", 0, 1.0, 5)])
    outcomes = {outcome.number: outcome for outcome in collect(running, 3)}
    assert outcomes[0].rollout is not None
    assert len(outcomes[0].rollout.token_ids) <= 6  # the model's limit holds
    assert outcomes[1].rollout is None
    assert str(LONGEST) in outcomes[1].error
    assert "has no tokens; allowed: one or more" in outcomes[2].error


def test_an_update_in_the_middle_of_an_answer(running: Running) -> None:
    push(running, 0)
    running.engine.submit([Request(number, PROMPTS[number % 3], number, 1.0, 150) for number in range(96)])
    outcomes = running.engine.wait(30)
    push(running, 1)
    outcomes += running.engine.wait(30)
    push(running, 2)
    outcomes += collect(running, 96 - len(outcomes))
    rollouts = [outcome.rollout for outcome in outcomes]
    assert max(len(set(rollout.versions)) for rollout in rollouts if rollout) >= 2
    for rollout in rollouts:
        assert rollout is not None
        assert list(rollout.versions) == sorted(rollout.versions)
        assert tiny_qwen3.gap(MODELS, rollout) < 1e-4


def test_what_is_given_up_has_no_outcome(running: Running) -> None:
    running.engine.submit([Request(number, PROMPTS[0], number, 1.0, 200) for number in range(30)])
    running.engine.abort([*range(25), 12345])
    assert {outcome.number for outcome in collect(running, 5)} >= set(range(25, 30))
    running.engine.submit([Request(7, PROMPTS[0], 7, 1.0, 5)])  # a number is free again
    assert [outcome.number for outcome in collect(running, 1)] == [7]
    assert running.engine.wait(0.0) == []


def test_the_urgent_overtake_those_that_wait(running: Running) -> None:
    # Eight are computed at once, and the urgent come last: without priorities they would finish last.
    normal = [Request(number, "1=", number, 1.0, 60) for number in range(90)]
    running.engine.submit([*normal, *(Request(number, "1=", number, 1.0, 60, urgent=True) for number in range(90, 98))])
    outcomes = collect(running, 98)
    assert all(outcome.rollout for outcome in outcomes)
    order = [outcome.number for outcome in outcomes]
    places = [order.index(number) for number in range(90, 98)]
    if running.kind != "server":  # over HTTP they may arrive when the others are answered already
        assert sum(places) / len(places) < 45


def test_batches_leave_other_outcomes_for_wait(running: Running) -> None:
    running.engine.submit([Request(5, "1=", 5, 1.0, 3)])
    assert len(running.engine.generate(["2="], [2], seed=0, temperature=1.0, max_new_tokens=40)[0]) == 2
    assert [outcome.number for outcome in collect(running, 1)] == [5]


def test_refused_weights_are_never_sampled_from(running: Running, folder: Path) -> None:
    push(running, 1)
    wrong = MODELS[2].state_dict()
    part = wrong.pop("model.layers.0.mlp.up_proj.weight")  # vLLM has it fused with another, and would not miss it
    with pytest.raises(ValueError, match=r"no 'model.layers.0.mlp.up_proj.weight'; allowed: every tensor of .*"):
        running.engine.update_weights(wrong, 9)
    with pytest.raises(ValueError, match=r"up_proj.weight'\] is \(64, 128\); allowed: \(128, 64\)"):
        running.engine.update_weights(wrong | {"model.layers.0.mlp.up_proj.weight": part.T}, 9)
    stray = MODELS[2].state_dict() | {"model.layers.0.mlp.side_proj.weight": part}
    with pytest.raises(ValueError, match=r"has 'model.layers.0.mlp.side_proj.weight'; allowed: the tensors of"):
        running.engine.update_weights(stray, 9)
    assert set(generate(running)[0][0].versions) == {1}  # nothing has changed
    checkpoint = folder / "model.safetensors"
    checkpoint.rename(folder / "away")  # with nothing to compare it with, vLLM has to refuse it
    try:
        with pytest.raises(RuntimeError, match=r"version 9.*restart the engine"):
            running.engine.update_weights(stray, 9)
    finally:
        (folder / "away").rename(checkpoint)
    with pytest.raises(EngineDied, match="version 9"):
        running.engine.submit([Request(0, "1=", 0, 1.0, 3)])
    if running.server is not None:
        running.kill()  # it has half of the weights; its owner starts another
    running.revive()
    push(running, 1)
    for rollout in generate(running)[0]:
        assert set(rollout.versions) == {1}
        assert tiny_qwen3.gap(MODELS, rollout, 0.7) < 1e-4


def test_death_restart_and_the_same_numbers(running: Running) -> None:
    if running.kind == "in-process":
        running.engine.close()  # its death is the trainer's
    else:
        push(running, 2)
        before = generate(running)
        running.engine.submit([Request(number, PROMPTS[0], number, 1.0, 200) for number in range(16)])
        running.kill()
    with pytest.raises(EngineDied):
        collect(running, 17)
    with pytest.raises(EngineDied):
        running.engine.submit([Request(0, "1=", 0, 1.0, 3)])
    running.revive()
    assert running.engine.wait(0.0) == []
    assert set(generate(running)[0][0].versions) == {0}
    push(running, 2)
    after = generate(running)
    assert all(tiny_qwen3.gap(MODELS, rollout, 0.7) < 1e-4 for rollout in after[0] + after[2])
    if running.kind != "in-process":
        assert [rollout.token_ids for rollout in after[0]] == [rollout.token_ids for rollout in before[0]]
