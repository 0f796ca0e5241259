"""Groups that grow: who gets more, what their advantages are, and that a batch dealt out to steps stays one batch."""

import math

import pytest
import torch
from tiny_trl import PROMPTS, make_trainer, starts_early, write_policy

from v05.integrations.trl.config import V05Config
from v05.integrations.trl.estimation import Estimation, Rewards
from v05.integrations.trl.rollouts import merged_lengths, split_rows
from v05.kernels import group_advantage

pytestmark = pytest.mark.trl
PROMPT_ROWS = [{"prompt": prompt} for prompt in PROMPTS[:4] for _ in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_policy(str(tmp_path_factory.mktemp("policy")))


class Constant:
    """Expects the same of every prompt and remembers what it was told."""

    def __init__(self, value):
        self.value, self.seen = value, []

    def predict(self, prompts):
        return torch.full((len(prompts),), self.value)

    def observe(self, prompts, means, counts):
        self.seen.append((list(prompts), means, counts))


def by_letter(prompts, **_):
    """Prompts that begin with a always fail, those with b never."""
    return [float(prompt[0] == "b") for prompt in prompts]


def generated(trainer):
    trainer.model.train()
    return trainer._generate_and_score_completions([dict(row) for row in PROMPT_ROWS])


def rows_of(trainer, batch):
    """Prompt text and completion text of each row."""
    decode = trainer.processing_class.batch_decode
    texts = decode(batch["prompt_ids"], skip_special_tokens=True)
    return texts, decode(batch["completion_ids"], skip_special_tokens=True)


def paper_advantages(rewards, prior, low, high):
    """The fused baseline of one group, in plain Python."""
    k, s = len(rewards), ((high - low) / 2) ** 2
    mean, noise = sum(rewards) / k, s / k
    deviation = max(0.0, (mean - prior) ** 2 - noise)
    weight = deviation / (deviation + noise)
    return [reward - (weight * mean + (1 - weight) * prior) for reward in rewards]


def test_prompts_that_contradict_the_prior_grow(folder, tmp_path):
    prior = Constant(0.9)
    options = dict(per_device_train_batch_size=16, k_max=10, max_extra_rollouts=100)
    trainer = make_trainer(folder, tmp_path, by_letter, extra=dict(prior=prior), **options)
    batch = generated(trainer)
    texts, _ = rows_of(trainer, batch)
    counts = {prompt: texts.count(prompt) for prompt in PROMPTS[:4]}
    assert counts == {"a e c": 10, "a f c": 10, "b e c": 4, "b f c": 4}
    assert int(batch["rows"]) == 28
    rewards = by_letter(texts)
    for prompt in counts:
        own = [i for i, text in enumerate(texts) if text == prompt]
        expected = paper_advantages([rewards[i] for i in own], 0.9, 0.0, 1.0)
        torch.testing.assert_close(batch["advantages"][own], torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert len({tuple(row) for row in batch["completion_ids"][:4].tolist()}) > 1
    assert int(batch["num_items_in_batch"]) == int(batch["completion_mask"].sum())
    prompts, means, seen = prior.seen[0]
    assert (prompts, means.tolist(), seen.tolist()) == (PROMPTS[:4], [0.0, 0.0, 1.0, 1.0], [10, 10, 4, 4])
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert logged["v05/conflicts"] == 0.5
    assert logged["v05/planned"] == pytest.approx((10 + 10 + 4 + 4) / 4)
    assert logged["v05/extra_rollouts"] == 12
    assert logged["v05/rollouts_per_prompt"] == 7
    assert logged["v05/first_reward"] == 0.5
    assert logged["reward"] == pytest.approx(8 / 28)
    assert logged["frac_reward_zero_std"] == 1.0
    assert logged["v05/prior_squared_error"] == pytest.approx((0.81 + 0.81 + 0.01 + 0.01) / 4)
    lengths = batch["completion_mask"].sum(1).float()
    assert logged["completions/mean_length"] == pytest.approx(float(lengths.mean()))
    assert logged["completions/min_length"] == float(lengths.min())
    assert len(trainer._metrics["train"]["completions/mean_length"]) == 1
    logs = trainer._logs
    assert (
        len(logs["advantages"])
        == len(logs["prompt"])
        == len(logs["completion"])
        == len(logs["rewards"]["by_letter"])
        == 28
    )
    assert [list(logs["prompt"]).count(prompt) for prompt in counts] == list(counts.values())
    assert list(logs["rewards"]["by_letter"]) == by_letter(logs["prompt"])
    trainer.args.max_extra_rollouts = 0
    generated(trainer)
    assert len(trainer._logs["advantages"]) == len(trainer._logs["prompt"]) == 16, "of the newest batch alone"


def test_the_budget_holds_and_the_worst_prior_is_served_first(folder, tmp_path):
    options = dict(per_device_train_batch_size=16, k_max=10, max_extra_rollouts=5)
    trainer = make_trainer(folder, tmp_path, by_letter, extra=dict(prior=Constant(0.9)), **options)
    texts, _ = rows_of(trainer, generated(trainer))
    assert len(texts) == 21
    assert [texts.count(prompt) for prompt in PROMPTS[2:4]] == [4, 4]


@pytest.mark.parametrize(
    ("options", "why"),
    [(dict(k_max=4), "k_max"), (dict(extra_rounds=0), "rounds"), (dict(estimator="dr_grpo"), "no prior")],
)
def test_fixed_groups(folder, tmp_path, options, why):
    trainer = make_trainer(folder, tmp_path, by_letter, per_device_train_batch_size=16, **options)
    batch = generated(trainer)
    assert len(batch["advantages"]) == 16, why
    if "estimator" in options:
        assert not batch["advantages"].any()
        assert "v05/weight" not in trainer._metrics["train"]


@pytest.mark.parametrize("estimator", ["v05_loo", "v05_calibrated", "v05_calibrated_loo", "grpo", "rloo"])
@pytest.mark.parametrize("scale", ["none", "batch"])
def test_estimators_and_scales(folder, tmp_path, estimator, scale):
    options = dict(
        per_device_train_batch_size=16, estimator=estimator, advantage_scale="none" if estimator == "grpo" else scale
    )
    batch = generated(make_trainer(folder, tmp_path, **options))
    assert batch["advantages"].isfinite().all()
    assert batch["advantages"].any()


def test_several_reward_functions_and_rewards_that_are_missing(folder, tmp_path):
    def some(prompts, **_):
        return [None if prompt[0] == "a" else 1.0 for prompt in prompts]

    def length(completion_ids, prompts, **_):
        return [
            None if prompt == PROMPTS[1] else len(ids) / 6 for ids, prompt in zip(completion_ids, prompts, strict=True)
        ]

    options = dict(per_device_train_batch_size=16, reward_weights=[0.5, 2.0], reward_range=(0.0, 2.5), k_max=6)
    trainer = make_trainer(folder, tmp_path, [some, length], extra=dict(prior=Constant(1.0)), **options)
    batch = generated(trainer)
    texts, _ = rows_of(trainer, batch)
    lengths = batch["completion_mask"].sum(1).double()
    for prompt in PROMPTS[:4]:
        own = [i for i, text in enumerate(texts) if text == prompt]
        if prompt == PROMPTS[1]:  # no function had a reward
            assert len(own) == 4
            assert not batch["advantages"][own].any()
            continue
        rewards = [0.5 * (prompt[0] == "b") + 2.0 * float(lengths[i]) / 6 for i in own]
        expected = torch.tensor(paper_advantages(rewards, 1.0, 0.0, 2.5))
        torch.testing.assert_close(batch["advantages"][own], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rewards", "prior", "options", "message"),
    [
        (
            lambda prompts, **_: [2.0] * len(prompts),
            Constant(0.5),
            {},
            r"rewards\[0\] is 2; allowed: 0 to 1; set reward_range",
        ),
        (by_letter, Constant(1.5), {}, r"predict\[0\] is 1.5; allowed: 0 to 1; set reward_range"),
        (by_letter, Constant(math.nan), {}, "predict returned nan"),
        (by_letter, Constant(-0.5), dict(prior_gives="probability", reward_range=(-1, 1)), r"predict\[0\] is -0.5"),
    ],
)
def test_numbers_out_of_range(folder, tmp_path, rewards, prior, options, message):
    trainer = make_trainer(
        folder, tmp_path, rewards, extra=dict(prior=prior), per_device_train_batch_size=16, **options
    )
    with pytest.raises(ValueError, match=message):
        generated(trainer)


def test_a_prior_that_gives_probabilities(folder, tmp_path):
    options = dict(per_device_train_batch_size=16, reward_range=(-1.0, 1.0), prior_gives="probability", k_max=4)

    def rewards(prompts, **_):
        return [1.0 if prompt[0] == "b" else -1.0 for prompt in prompts]

    batch = generated(make_trainer(folder, tmp_path, rewards, extra=dict(prior=Constant(0.8)), **options))
    expected = torch.tensor(paper_advantages([-1.0] * 4, 0.6, -1.0, 1.0))
    torch.testing.assert_close(batch["advantages"][:4], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("loss_backend", ["policy_loss", "linear_policy_loss", "trl"])
def test_steps_add_up_to_one_big_batch(folder, tmp_path, loss_type, loss_backend):
    """21 rows in 4 steps of 5 or 6 rows have the gradient of the 21 at once."""
    options = dict(loss_type=loss_type, loss_backend=loss_backend, epsilon_high=1.2, k_max=10, max_extra_rollouts=5)
    options |= dict(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    trainer = make_trainer(folder, tmp_path, by_letter, extra=dict(prior=Constant(0.9)), **options)
    trainer.current_gradient_accumulation_steps = 4
    trainer.model.train()
    steps = [trainer._prepare_inputs([dict(row) for row in PROMPT_ROWS])]
    for trainer._step in (1, 2, 3):
        steps.append(trainer._prepare_inputs(None))
    assert sorted(len(step["advantages"]) for step in steps) == [5, 5, 5, 6]
    whole = {
        name: torch.cat([step[name] for step in steps]) if value.dim() else value for name, value in steps[0].items()
    }
    parameters = list(trainer.model.parameters())
    losses = [trainer._compute_loss(trainer.model, step) for step in steps]
    parts = torch.autograd.grad(sum(losses), parameters)
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    one = trainer._compute_loss(trainer.model, whole)
    torch.testing.assert_close(sum(losses), one, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts, torch.autograd.grad(one, parameters), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [0, 1, 7, 100])
def test_a_plan_is_shared_evenly_and_within_budget_and_room(processes, budget, tmp_path):
    rng = torch.Generator().manual_seed(processes + budget)
    group = torch.arange(12).repeat_interleave(4)[torch.randperm(48, generator=rng)]
    rewards = Rewards((torch.rand(48, generator=rng) < 0.5).float(), group, 12)
    args = V05Config(output_dir=str(tmp_path), use_cpu=True, bf16=False, num_generations=4, k_max=9)
    plan = Estimation(args, Constant(0.0)).plan(rewards, torch.rand(12, generator=rng), budget, processes)
    assert int(plan.sum()) <= budget
    assert int(plan.sum()) % processes == 0
    assert int(plan.min()) >= 0
    assert int(plan.max()) <= 5
    if budget == 100:
        assert int(plan.sum()) > 0


def test_rows_are_dealt_out_once():
    batch = {"advantages": torch.arange(11), "ids": torch.arange(22).view(11, 2), "rows": torch.tensor(11)}
    steps = split_rows(batch, 4)
    assert [len(step["advantages"]) for step in steps] == [2, 3, 3, 3]
    assert sorted(torch.cat([step["advantages"] for step in steps]).tolist()) == list(range(11))
    assert all((step["ids"][:, 0] == 2 * step["advantages"]).all() and int(step["rows"]) == 11 for step in steps)


def test_length_metrics_of_rounds_become_those_of_all_rows():
    rounds = [([3, 5, 9], [True, False, True]), ([2, 7], [False, False])]
    names = [f"completions/{kind}_{part}length" for part in ("", "terminated_") for kind in ("mean", "min", "max")]
    metrics = {name: [] for name in [*names, "completions/clipped_ratio"]}

    def add(lengths, clipped):
        for part, values in (
            ("", lengths),
            ("terminated_", [x for x, c in zip(lengths, clipped, strict=True) if not c]),
        ):
            for kind, value in (("mean", sum(values) / len(values)), ("min", min(values)), ("max", max(values))):
                metrics[f"completions/{kind}_{part}length"].append(value)
        metrics["completions/clipped_ratio"].append(sum(clipped) / len(clipped))

    for lengths, clipped in rounds:
        add(lengths, clipped)
    merged_lengths(metrics, [3, 2])
    add([x for lengths, _ in rounds for x in lengths], [c for _, clipped in rounds for c in clipped])
    for name, (merged, expected) in metrics.items():
        assert merged == pytest.approx(expected), name


def test_a_conversation_and_evaluation(folder, tmp_path):
    from datasets import Dataset

    trainer = make_trainer(folder, tmp_path, lambda completions, **_: [1.0] * len(completions), k_max=8)
    trainer.processing_class.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS[:2] for _ in range(4)]
    trainer.model.train()
    batch = trainer._generate_and_score_completions(rows)
    assert len(batch["advantages"]) >= 8
    assert list(trainer.estimation.prior.met) == [f"user: {prompt}" for prompt in PROMPTS[:2]]
    log = trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS}))
    assert math.isfinite(log["eval_loss"])
    assert log["eval_reward"] == 1.0
    assert not any("v05" in name for name in log)
    assert starts_early(["a b", "z"]) == [1.0, 0.0]


@pytest.mark.parametrize("estimator", ["opo", "reinforce_plus_plus"])
def test_tokens_count_where_the_estimator_is_defined_over_them(folder, tmp_path, estimator):
    def odd(completion_ids, **_):
        return [float(len(ids) % 2) for ids in completion_ids]

    options = dict(per_device_train_batch_size=16, estimator=estimator, max_completion_length=60)
    batch = generated(make_trainer(folder, tmp_path, odd, **options))
    lengths = batch["completion_mask"].sum(1)
    rewards, offsets = (lengths % 2).float(), torch.arange(0, 17, 4)
    assert len(lengths.unique()) > 2
    named = dict(estimator=estimator, reward_range=(0.0, 1.0), eps=1e-4)
    expected = group_advantage(rewards, offsets, lengths=lengths, **named)
    torch.testing.assert_close(batch["advantages"], expected)
    assert (expected - group_advantage(rewards, offsets, lengths=torch.ones(16), **named)).abs().max() > 0.01


@pytest.mark.parametrize("estimator", ["v05_calibrated", "v05_calibrated_loo"])
@pytest.mark.parametrize("scale", ["none", "batch", "baseline"])
def test_calibration_goes_on_whatever_the_scale(tmp_path, estimator, scale):
    own = dict(estimator=estimator, advantage_scale=scale)
    args = V05Config(output_dir=str(tmp_path), use_cpu=True, bf16=False, num_generations=4, **own)
    estimation = Estimation(args, Constant(0.5))
    rewards = Rewards(torch.tensor([0.0, 1, 0, 1, 1, 1, 0, 1]), torch.arange(2).repeat_interleave(4), 2)
    prior, lengths = torch.tensor([0.9, 0.2]), torch.ones(8, dtype=torch.int64)
    before = estimation.advantages(rewards, prior, lengths)
    estimation.mixture = torch.tensor([200.0, 1, 1, 1, 1, 1, 1])  # every prior was right so far, or none was
    assert (estimation.advantages(rewards, prior, lengths) - before).abs().max() > 0.05


LOSSES = ["grpo", "dr_grpo", "bnpo", "dapo", "luspo", "cispo", "sapo", "vespo"]


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("loss_backend", ["policy_loss", "linear_policy_loss", "trl"])
def test_no_forward_has_more_rows_than_a_micro_batch(folder, tmp_path, loss_type, loss_backend):
    """A step of 7 rows goes in pieces of at most 4, with the gradient of all 7 at once."""
    options = dict(loss_type=loss_type, loss_backend=loss_backend, epsilon_high=1.2, k_max=10, max_extra_rollouts=21)
    options |= dict(per_device_train_batch_size=4, gradient_accumulation_steps=4, max_completion_length=9)
    trainer = make_trainer(folder, tmp_path, by_letter, extra=dict(prior=Constant(0.9)), **options)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 4
    trainer._prepare_inputs([dict(row) for row in PROMPT_ROWS])
    steps = trainer._buffered_inputs
    assert [len(step["advantages"]) for step in steps] == [7] * 4
    sizes, found = [], []
    trainer.model.register_forward_pre_hook(lambda *given: sizes.append(len(given[2]["input_ids"])), with_kwargs=True)
    for trainer._rows_at_once, expected in ((4, [4, 3] * 4), (None, [7] * 4)):
        sizes.clear()
        trainer.model.zero_grad()
        total = torch.zeros(())
        for step in steps:
            loss = trainer.compute_loss(trainer.model, step)
            assert trainer.accelerator.gradient_state.sync_gradients
            loss.backward()
            total += loss.detach()
        assert sizes == expected
        found.append([total, *(parameter.grad for parameter in trainer.model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert max(float(gradient.abs().max()) for gradient in found[0][1:]) > 1e-4


def test_steps_that_must_stay_whole_say_so(folder, tmp_path, caplog):
    options = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, entropy_coef=0.1)
    for more, why in ((dict(loss_backend="trl"), "TRL's loss adds a mean over a step"), (dict(k_max=4), None)):
        caplog.clear()
        with caplog.at_level("WARNING"):
            trainer = make_trainer(folder, tmp_path, by_letter, **options, **more)
        found = "have more rows than a micro-batch: " in caplog.text
        assert found == (why is not None)
        assert why is None or why in caplog.text
        assert trainer._rows_at_once is None
