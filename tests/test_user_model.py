"""Any causal language model as a policy: two losses that agree, prompts, tokens, batches in pieces."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat import WORDS, write_model
from tiny_models import make_tokenizer, write_qwen3
from transformers import AutoModelForCausalLM

from v05.batch import PackedTokens
from v05.errors import InputError
from v05.policy import Policy
from v05.rollout.hf import TransformersEngine, pieces
from v05.rollout.pack import pack
from v05.tasks.problems import Problems
from v05.training.algorithms import parse_algorithm
from v05.training.learner import Learner, check_linear
from v05.training.pretrained import load_policy
from v05.training.sampler_gap import GapWatch

pytestmark = pytest.mark.usefixtures("one_thread")

SUMS = ("one plus one", "one plus two", "two plus one", "two plus two", "zero plus two", "zero plus one", "one", "two")
RECORDS = [{"prompt": prompt, "answer": "two"} for prompt in SUMS]


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
