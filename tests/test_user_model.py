"""Training any causal language model on records: the same loop, the same bits after a stop, two losses that agree."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat import WORDS, write_model
from tiny_models import make_tokenizer, write_qwen3
from training_runs import StopAfter, assert_same_run, silent
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from v05.batch import PackedTokens
from v05.cli import app
from v05.errors import InputError
from v05.policy import Policy
from v05.rollout.hf import TransformersEngine, pieces
from v05.rollout.pack import pack
from v05.stop import Interrupted, StopRequest
from v05.tasks.problems import Problems
from v05.training.algorithms import parse_algorithm
from v05.training.config import TrainConfig, make_config
from v05.training.learner import Learner, check_linear
from v05.training.metrics import read_metrics
from v05.training.model_config import ModelConfig, make_model_config
from v05.training.pretrained import load_policy
from v05.training.run import train_run
from v05.training.sampler_gap import GapWatch
from v05.training.stream_config import StreamConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SUMS = ("one plus one", "one plus two", "two plus one", "two plus two", "zero plus two", "zero plus one", "one", "two")
RECORDS = [{"prompt": prompt, "answer": "two"} for prompt in SUMS]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return file


def batch_of(policy: Policy, temperature: float = 0.7) -> tuple[PackedTokens, torch.Tensor]:
    """Sampled answers of different lengths, with advantages."""
    engine = TransformersEngine(policy)
    rows = engine.generate(SUMS[:5], [3, 2, 1, 2, 3], seed=0, temperature=temperature, max_new_tokens=6)
    rollouts = [rollout for row in rows for rollout in row]
    batch = pack(rollouts, "seq-mean-token-mean", max_length=6)
    return batch, torch.linspace(-1, 1, len(rollouts))


def gradient(policy: Policy, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradient of one batch by parameter, before it is scaled, and the metrics."""
    settings = dict(learning_rate=0.0, temperature=0.7, epochs=1, micro_batches=1) | options
    learner = Learner(policy, parse_algorithm("dapo"), **settings)  # type: ignore[arg-type]
    metrics = learner.learn(*batch_of(policy), 0)
    scale = max(1.0, metrics["gradient_norm"] + 1e-6)
    found = {name: parameter.grad * scale for name, parameter in policy.model.named_parameters()}
    return found, metrics


@pytest.mark.parametrize(("kind", "tied"), [("qwen3", False), ("llama", True), ("gpt2", True)])
def test_both_losses_have_the_same_gradient(kind: str, tied: bool, tmp_path: Path) -> None:
    folder = write_model(tmp_path, kind, tied=tied)

    def of(**options: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        checkpointing = options.pop("gradient_checkpointing", False)
        return gradient(load_policy(str(folder), train=True, gradient_checkpointing=checkpointing), **options)

    expected, metrics = of()
    assert max(value.abs().max() for value in expected.values()) > 1e-2
    for options in (
        dict(linear=True),
        dict(linear=True, gradient_checkpointing=True, micro_batches=3),
        dict(micro_batches=4),
    ):
        found, others = of(**options)
        for name, value in expected.items():
            assert (found[name] - value).abs().max() < 1e-6, (options, name)
        assert others.keys() == metrics.keys()
        for name, number in metrics.items():
            assert others[name] == pytest.approx(number, abs=3e-6), (options, name)
    assert metrics["sampler_gap"] < 1e-5


def test_later_epochs_agree_too(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    weights = []
    for linear in (False, True):
        policy = load_policy(str(folder), train=True)
        options = dict(learning_rate=0.05, temperature=0.7, epochs=3, micro_batches=2, linear=linear)
        learner = Learner(policy, parse_algorithm("dapo"), **options)  # type: ignore[arg-type]
        metrics = learner.learn(*batch_of(policy), 20)
        assert metrics["ratio_sum"] != metrics["tokens"]
        weights.append(torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()]))
    assert (weights[0] - weights[1]).abs().max() < 1e-3


def test_a_model_that_scales_its_logits_is_refused_by_the_linear_loss(tmp_path: Path) -> None:
    from transformers import GraniteConfig

    policy = load_policy(str(write_model(tmp_path)), train=True)
    check_linear(policy)
    config = GraniteConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        logits_scaling=4.0,
    )
    scaled = dataclasses.replace(policy, model=AutoModelForCausalLM.from_config(config))
    with pytest.raises(InputError, match="allowed for it: loss = logits"):
        check_linear(scaled)


def test_bfloat16_samples_what_it_learns_from(tmp_path: Path) -> None:
    exact, _ = gradient(load_policy(str(write_model(tmp_path)), train=True))
    policy = load_policy(str(tmp_path), dtype="bfloat16", train=True, gradient_checkpointing=True)
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.float32}
    found, metrics = gradient(policy, linear=True)
    assert metrics["sampler_gap_mean"] < 0.02
    one, other = (torch.cat([value.flatten() for value in values.values()]) for values in (exact, found))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.98


def test_prompts_become_a_users_turn(tmp_path: Path) -> None:
    chat = load_policy(str(write_model(tmp_path / "chat")))
    plain = load_policy(str(write_model(tmp_path / "plain", chat=False)))
    [ids] = chat.encode(["one plus two"])
    assert chat.tokenizer.convert_ids_to_tokens(ids) == ["<user>", "one", "plus", "two", "<assistant>"]
    [ids] = plain.encode(["one plus two"])
    assert plain.tokenizer.convert_ids_to_tokens(ids) == ["one", "plus", "two"]
    for policy in (chat, plain):
        for bad in ("", "one or two"):
            with pytest.raises(ValueError, match="cannot encode"):
                policy.encode([bad])


def test_a_tokenizer_may_have_one_token_for_begin_end_and_unknown(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    special: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<end>")
    tokenizer = make_tokenizer(WORDS, spaced=True, unknown="<end>", pad_token=None, **special)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    tokenizer.save_pretrained(write_model(tmp_path, "OPT", chat=False))
    assert load_policy(str(tmp_path)).encode(["one plus two"]) == [[0, 2, 9, 3]]


def test_a_pad_token_that_the_model_does_not_have_is_not_used(tmp_path: Path) -> None:
    write_model(tmp_path, chat=False)
    plain = gradient(load_policy(str(tmp_path), train=True))
    tokenizer = make_tokenizer([*WORDS, "<pad>"], spaced=True, unknown="?", eos_token="<end>", unk_token="?")
    assert tokenizer.pad_token_id == len(WORDS)
    tokenizer.save_pretrained(tmp_path)
    padded = gradient(load_policy(str(tmp_path), train=True))
    assert padded[1] == plain[1]
    assert all(torch.equal(value, padded[0][name]) for name, value in plain[0].items())


def test_a_model_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lacks 1 weights, such as lm_head.weight; allowed: a whole model"):
        load_policy(str(write_qwen3(tmp_path)))


def test_every_end_token_of_the_generation_settings_ends_an_answer(tmp_path: Path) -> None:
    policy = load_policy(str(write_model(tmp_path)))
    policy.model.generation_config.eos_token_id = [0, 3]
    assert policy.end_ids == (0, 3)
    rows = TransformersEngine(policy).generate(SUMS[:4], [8] * 4, seed=1, temperature=1.0, max_new_tokens=6)
    lasts = [rollout.token_ids[-1] for row in rows for rollout in row if rollout.finished]
    assert set(lasts) == {0, 3}
    for rollout in (rollout for row in rows for rollout in row):
        assert not {0, 3} & set(rollout.token_ids[:-1])
        assert rollout.finished == (rollout.token_ids[-1] in (0, 3))


def test_batches_are_cut_into_pieces() -> None:
    assert list(pieces([3, 2, 0, 4], 100)) == [(0, [3, 2, 0, 4])]
    assert list(pieces([3, 2, 0, 4], 4)) == [(0, [3, 1]), (1, [1, 0, 3]), (3, [1])]
    assert list(pieces([0, 5], 2)) == [(1, [2]), (1, [2]), (1, [1])]
    assert list(pieces([0, 0], 2)) == []


def test_an_engine_with_a_limit_answers_all(tmp_path: Path) -> None:
    policy = load_policy(str(write_model(tmp_path)))
    request: dict[str, Any] = dict(seed=3, temperature=1.0, max_new_tokens=4)
    limited = TransformersEngine(policy, sequences_at_once=4)
    rows = limited.generate(SUMS[:3], [5, 0, 6], **request)
    assert [len(row) for row in rows] == [5, 0, 6]
    assert [row[0].prompt_ids for row in (rows[0], rows[2])] == [
        tuple(ids) for ids in policy.encode([SUMS[0], SUMS[2]])
    ]
    assert len({rollout.logprobs for row in rows for rollout in row}) > 3
    assert rows == limited.generate(SUMS[:3], [5, 0, 6], **request)


def test_problems_are_shuffled_in_every_pass_and_some_are_held_out() -> None:
    task = Problems(RECORDS, name="sums", verifier="exact", heldout_share=0.25, max_answer_length=3)
    train = task.prompts(0, 0, 12)
    assert sorted(train[:6]) == sorted(train[6:]) != []
    assert train[:6] != train[6:]
    assert task.prompts(0, 4, 5) == train[4:9]
    assert task.prompts(1, 0, 12) != train
    heldout = task.prompts(0, 0, 100, "heldout")
    assert len(heldout) == 2
    assert not set(heldout) & set(train)
    reordered = Problems(RECORDS[::-1], name="sums", verifier="exact", heldout_share=0.25)
    assert set(reordered.prompts(0, 0, 9, "heldout")) == set(heldout)
    assert task.verify("one", "two") == 1.0
    assert task.record("one")["answer"] == "two"
    with pytest.raises(InputError, match="1 problems; allowed: 2 or more"):
        Problems(RECORDS[:1], name="sums", verifier="exact")


TINY = TrainConfig(
    algorithm="v05:2",
    prior="constant",
    rollouts=384,
    rollouts_per_update=32,
    eval_every=128,
    heldout_samples=2,
    checkpoint_every=2,
    learning_rate=3e-2,
    micro_batches=2,
)


def settings_for(model: Path, data: Path, **options: Any) -> ModelConfig:
    given = dict(model=str(model), data=str(data), verifier="verifiers_for_tests:words", max_new_tokens=8)
    return ModelConfig(**given | dict(dtype="float32", heldout_share=0.25, device="cpu") | options)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", ["linear", "logits"])
def test_a_users_run_learns_and_goes_on_bit_for_bit(loss: str, data: Path, tmp_path: Path) -> None:
    model = settings_for(write_model(tmp_path / "model", tied=loss == "linear"), data, loss=loss)
    whole, part, stop = tmp_path / "whole", tmp_path / "part", StopRequest()

    summary = train_run(TINY, whole, tmp_path, StopRequest(), silent, model=model)
    with pytest.raises(Interrupted, match="after 160 of 384"):
        train_run(TINY, part, tmp_path, stop, StopAfter(stop, 160), model=model)
    for wrong, message in ((dict(max_new_tokens=9), "max_new_tokens is 9; allowed"), (dict(dtype="bfloat16"), "dtype")):
        other = dataclasses.replace(model, **wrong)
        with pytest.raises(InputError, match=message):
            train_run(TINY, part, tmp_path, StopRequest(), silent, resume=True, model=other)
    lines = data.read_text()
    for changed in (lines.replace("one plus two", "five plus two"), lines.replace("{", '{"hint": 1, ', 1)):
        data.write_text(changed)
        with pytest.raises(InputError, match="has changed since the run"):
            train_run(TINY, part, tmp_path, StopRequest(), silent, resume=True, model=model)
    data.write_text(lines)
    with pytest.raises(InputError, match="allowed when resuming"):
        train_run(TINY, part, tmp_path, StopRequest(), silent, resume=True)
    train_run(TINY, part, tmp_path, StopRequest(), silent, resume=True, model=model)
    assert_same_run(whole, part)
    assert summary["heldout_before"][1] == 4
    updates = read_metrics(whole)[1:]
    assert any(line["reward_failures"] for line in updates)
    assert all(line["sampler_gap"] < 1e-5 for line in updates)
    assert sum(line["reward"] for line in updates[-3:]) > 0.2 + sum(line["reward"] for line in updates[:3])
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(whole / "policy").state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    assert AutoTokenizer.from_pretrained(whole / "policy").chat_template


def test_the_command_trains_a_users_model_and_resumes(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        'prior = "constant"\nheldout_samples = 2\nepochs = 1\n'
        '[model]\ndevice = "cpu"\nheldout_share = 0.25\nmax_prompt_tokens = 2\nreward_workers = 1\n'
    )
    model, output = write_model(tmp_path / "model", "llama"), tmp_path / "run"
    command = ["train", "--output", str(output), "--config", str(config), "--model", str(model), "--data", str(data)]
    command += ["--verifier", "exact", "--max-new-tokens", "4", "--rollouts", "32", "--rollouts-per-update", "16"]
    command += ["--template", "{prompt}", "--micro-batches", "2"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, InputError), result.output
    assert "0 problems" in str(result.exception)  # a chat of one word has 3 tokens
    config.write_text(config.read_text().replace("tokens = 2\n", "tokens = 5\n"))
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "rollouts spent" in result.output
    assert json.loads((output / "config.json").read_text())["learning_rate"] == 1e-6
    assert json.loads((output / "model.json").read_text())["dtype"] == "bfloat16"
    again = CliRunner().invoke(app, ["train", "--output", str(output), "--resume"])
    assert again.exit_code == 0, again.output
    assert "32" in again.output


def test_a_reward_range_is_an_option_and_what_got_no_reward_is_in_the_table(data: Path, tmp_path: Path) -> None:
    model, output = write_model(tmp_path / "model"), tmp_path / "run"
    command = ["train", "--output", str(output), "--model", str(model), "--data", str(data), "--rollouts", "64"]
    command += ["--max-new-tokens", "8", "--dtype", "float32", "--prior", "constant", "--rollouts-per-update", "32"]
    config = tmp_path / "run.toml"
    config.write_text('heldout_samples = 48\n[model]\ndevice = "cpu"\nheldout_share = 0.5\n')
    command += ["--config", str(config)]
    wrong = CliRunner().invoke(app, [*command, "--verifier", "verifiers_for_tests:no_record"])
    assert isinstance(wrong.exception, InputError), wrong.output
    assert "gave no reward for any of its first 64 answers; last: TypeError" in str(wrong.exception)
    command += ["--verifier", "verifiers_for_tests:signed"]  # needs no --overwrite: nothing had been learnt
    result = CliRunner().invoke(app, [*command, "--reward-range", "-1", "1"])
    assert result.exit_code == 0, result.output
    saved = json.loads((output / "model.json").read_text())
    assert (saved["reward_low"], saved["reward_high"]) == (-1.0, 1.0)
    lines = read_metrics(output)
    kinds = ("heldout_failures", "reward_failures")
    failures = {kind: sum(line.get(kind, 0) for line in lines) for kind in kinds}
    assert all(failures.values())
    assert json.loads((output / "summary.json").read_text())["reward_failures"] == sum(failures.values())
    assert f"{sum(failures.values())} failures, 0 timeouts" in result.output
    again = CliRunner().invoke(app, ["train", "--output", str(output), "--resume", "--reward-range", "0", "1"])
    assert "reward_low is 0.0; allowed when resuming" in str(again.exception)


def test_settings_of_a_users_model(tmp_path: Path) -> None:
    assert make_model_config({}, {}, "nowhere") is None
    config = make_model_config({"model": "m", "loss": "logits"}, {"data": "math500"}, "run.toml")
    assert config is not None
    assert (config.model, config.loss, config.source.place) == ("m", "logits", "HuggingFaceH4/MATH-500")
    assert dataclasses.replace(config, template="{prompt}!").source.template == "{prompt}!"
    file = tmp_path / "run.toml"
    file.write_text('seed = 3\n[model]\nmodel = "m"\n')
    assert make_config(file).seed == 3
    for given, message in (
        ({"model": "m"}, "data is ''; allowed: a name"),
        ({"model": "m", "data": "d", "modle": "x"}, "unknown key 'modle'"),
        ({"model": "m", "data": "d", "heldout_share": 1.0}, "allowed: above 0 and below 1"),
        ({"model": "m", "data": "d", "loss": "cubic"}, "allowed: linear, logits"),
        ({"model": "m", "data": "d", "reward_high": -1.0}, "allowed: above 0"),
        ({"model": "m", "data": "d", "reward_low": -math.inf}, "reward_low is -inf; allowed: a finite number"),
        ({"model": "m", "data": "d", "max_new_tokens": 0}, "1 or more"),
        ({"model": "m", "data": "d", "gradient_checkpointing": 1}, "allowed: bool"),
    ):
        with pytest.raises(InputError, match=message):
            make_model_config({}, given, "")


def test_answers_longer_than_the_models_positions_are_refused(data: Path, tmp_path: Path) -> None:
    model = settings_for(write_model(tmp_path / "model"), data, max_new_tokens=64)
    with pytest.raises(InputError, match="64 positions, of which the longest prompt takes 5"):
        train_run(TINY, tmp_path / "run", tmp_path, StopRequest(), silent, model=model)


def test_an_engine_is_stopped_where_no_trainer_can_be_made_of_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(TransformersEngine):
        times = 0

        def close(self) -> None:
            Closed.times += 1

    monkeypatch.setattr("v05.training.run.make_engine", lambda name, policy, *rest, **options: Closed(policy))
    model, config = settings_for(write_model(tmp_path / "model"), data), dataclasses.replace(TINY, algorithm="dapo:4")
    with pytest.raises(InputError, match="which drops equal groups"):
        train_run(config, tmp_path / "run", tmp_path, StopRequest(), silent, model=model, stream=StreamConfig("stream"))
    assert Closed.times == 1


def test_a_gradient_that_is_not_finite_is_not_learnt_from(tmp_path: Path) -> None:
    policy = load_policy(str(write_model(tmp_path)), train=True)
    settings = dict(learning_rate=0.1, temperature=0.7, epochs=1, micro_batches=1)
    learner = Learner(policy, parse_algorithm("grpo"), **settings)  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in learner.weights().items()}
    last = next(reversed(list(policy.model.parameters())))
    last.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match="update 4: the gradient's norm is nan; allowed: finite"):
        learner.learn(*batch_of(policy), 3)
    assert all(torch.equal(value, before[name]) for name, value in learner.weights().items())


def test_a_sampler_that_lags_behind_is_noticed(tmp_path: Path) -> None:
    policy = load_policy(str(write_model(tmp_path)), train=True)
    batch, advantages = batch_of(policy)
    stale = dataclasses.replace(batch, logprobs=batch.logprobs - 0.25)
    learner = Learner(
        policy, parse_algorithm("grpo"), learning_rate=0.0, temperature=0.7, epochs=1, micro_batches=3, linear=True
    )
    metrics = learner.learn(stale, advantages, 0)
    assert metrics["sampler_gap_mean"] == pytest.approx(0.25, abs=1e-5)
    assert metrics["sampler_gap"] == pytest.approx(0.25, abs=1e-5)
    assert metrics["sampler_effective"] == pytest.approx(1.0, abs=1e-9)  # a common factor loses no sample
    assert metrics["sampler_kl"] == pytest.approx(math.exp(0.25) - 1.25, abs=1e-5)
    assert GapWatch().see({"update": 1, **metrics})
