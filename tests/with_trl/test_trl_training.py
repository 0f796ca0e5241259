"""Real training for a few steps: what is logged, LoRA, several epochs over a batch, checkpoints, bad options."""

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_trl import make_trainer, starts_early, write_policy
from trl import GRPOConfig, GRPOTrainer, TrlParser

from v05.integrations.trl import V05Config, V05Trainer
from v05.integrations.trl.prompts import prompt_text

pytestmark = pytest.mark.trl
OURS = {"conflicts", "planned", "rollouts_per_prompt", "extra_rollouts", "first_reward", "weight"}
OURS |= {"prior_squared_error", "baseline_mse", "advantage_std"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_policy(str(tmp_path_factory.mktemp("policy")))


def weights_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    ("estimator", "loss_backend"),
    [("v05", "policy_loss"), ("v05_calibrated", "policy_loss"), ("v05_loo", "linear_policy_loss"), ("v05", "trl")],
)
def test_training_learns(folder, tmp_path, estimator, loss_backend):
    options = dict(estimator=estimator, loss_backend=loss_backend, max_steps=10, learning_rate=3e-3)
    trainer = make_trainer(folder, tmp_path, per_device_train_batch_size=32, **options)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {f"v05/{name}" for name in OURS} <= log[0].keys()
    assert all(math.isfinite(value) for entry in log for value in entry.values())
    assert sum(entry["v05/first_reward"] for entry in log[-3:]) / 3 > log[0]["v05/first_reward"] + 0.15
    assert any(entry["v05/rollouts_per_prompt"] > 4 for entry in log)
    assert all(entry["clip_ratio/region_mean"] == 0 for entry in log)  # on policy


def test_the_log_has_all_that_trl_s_has(folder, tmp_path):
    ours = make_trainer(folder, tmp_path / "ours", max_steps=1, log_completions=True, num_completions_to_print=1)
    theirs = make_trainer(folder, tmp_path / "theirs", trainer=GRPOTrainer, config=GRPOConfig, max_steps=1)
    ours.train()
    theirs.train()
    own, other = (set(trainer.state.log_history[0]) for trainer in (ours, theirs))
    assert own - other == {f"v05/{name}" for name in OURS}
    assert not other - own
    assert len(list((tmp_path / "ours/completions").iterdir())) == 1


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("logprob_backend", ["linear_logprob", "trl"])
def test_without_a_prior_it_is_trl(folder, tmp_path, beta, logprob_backend):
    """The same seeds and estimator give the weights that TRL's trainer gives."""
    settings = dict(max_steps=3, loss_type="dapo", num_iterations=2, gradient_accumulation_steps=2, beta=beta)
    start = weights_of(make_trainer(folder, tmp_path))
    own = dict(trainer=GRPOTrainer, config=GRPOConfig, scale_rewards="none")
    theirs = make_trainer(folder, tmp_path / "theirs", **own, **settings)
    theirs.train()
    ours = make_trainer(folder, tmp_path / "ours", estimator="dr_grpo", logprob_backend=logprob_backend, **settings)
    ours.train()
    for name, value in weights_of(theirs).items():
        torch.testing.assert_close(weights_of(ours)[name], value, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(value, start[name]) for name, value in weights_of(ours).items())


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_several_epochs_over_grown_batches(folder, tmp_path, beta):
    """Each generation serves two windows of two steps, twice; ratios leave 1 and get clipped."""
    options = dict(num_iterations=2, gradient_accumulation_steps=2, steps_per_generation=4, beta=beta, max_steps=8)
    trainer = make_trainer(folder, tmp_path, per_device_train_batch_size=4, loss_type="grpo", **options)
    sizes = []

    def count(module, args, named):
        if torch.is_grad_enabled():
            sizes.append(len(named["input_ids"]))

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    assert max(sizes) == 4
    assert len(sizes) > 16, "some steps had more rows"
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert sum("v05/weight" in entry for entry in log) == 2  # generations in 8 updates
    assert max(entry["clip_ratio/region_mean"] for entry in log) > 0
    assert all(math.isfinite(entry["grad_norm"]) and entry["grad_norm"] > 0 for entry in log)
    assert beta == 0.0 or max(entry["kl"] for entry in log) > 0


@pytest.mark.parametrize("loss_backend", ["policy_loss", "linear_policy_loss"])
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_lora(folder, tmp_path, loss_backend, beta):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options = dict(extra=dict(peft_config=lora), loss_backend=loss_backend, beta=beta, max_steps=3)
    trainer = make_trainer(folder, tmp_path, **options)
    start = weights_of(trainer)
    trainer.train()
    moved = {name for name, value in weights_of(trainer).items() if not torch.equal(value, start[name])}
    assert moved
    assert all("lora" in name for name in moved)


def test_a_run_goes_on_where_it_was_cut_off(folder, tmp_path):
    """In the middle of an epoch: at its end TRL itself draws other numbers after a restart."""
    options = dict(estimator="v05_calibrated", save_strategy="steps", save_steps=1, max_steps=3)
    options |= dict(lr_scheduler_type="constant", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    whole = make_trainer(folder, tmp_path / "whole", **options)
    whole.train()
    state = load_file(tmp_path / "whole/checkpoint-1/v05_state.safetensors")
    assert "mixture" in state
    assert any(name.startswith("prior.past.") for name in state)
    resumed = make_trainer(folder, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-1"))
    for name, value in whole.estimation.state_dict().items():
        assert torch.equal(resumed.estimation.state_dict()[name], value), name
    for name, value in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], value), name
    assert not torch.equal(whole.estimation.state_dict()["mixture"], state["mixture"])


def test_a_checkpoint_of_trl_s_trainer_starts_the_prior_anew(folder, tmp_path):
    options = dict(save_strategy="steps", save_steps=1)
    theirs = make_trainer(folder, tmp_path, trainer=GRPOTrainer, config=GRPOConfig, max_steps=1, **options)
    theirs.train()
    assert not Path(tmp_path / "checkpoint-1/v05_state.safetensors").exists()
    ours = make_trainer(folder, tmp_path / "ours", max_steps=2)
    ours.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert ours.state.global_step == 2
    assert len(ours.estimation.prior.met) == 2


def test_a_prior_without_a_state(folder, tmp_path):
    class Half:
        def predict(self, prompts):
            return [0.5] * len(prompts)

    options = dict(save_strategy="steps", save_steps=1, max_steps=1, extra=dict(prior=Half()))
    make_trainer(folder, tmp_path, **options).train()
    assert load_file(tmp_path / "checkpoint-1/v05_state.safetensors").keys() == {"prior_class"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(estimator="grop"), "estimator is 'grop'; allowed: 'v05'"),
        (dict(advantage_scale="std"), "scale is 'std'"),
        (dict(estimator="grpo", advantage_scale="batch"), "grpo is defined with 'group'"),
        (dict(reward_range=(1.0, 0.0)), "reward_range is"),
        (dict(reward_range=[1.0]), "reward_range is"),
        (dict(reward_range=None), "reward_range is None; allowed: two finite numbers, the smaller one first"),
        (dict(reward_range=1.0), "reward_range is 1.0; allowed: two finite"),
        (dict(reward_range=[0.0, math.inf]), r"reward_range is \[0.0, inf\]; allowed: two finite"),
        (dict(reward_range=["low", "high"]), "reward_range is .*; allowed: two finite"),
        (dict(prior="v0"), "prior is 'v0'; allowed: 'history', 'running_mean', 'middle'"),
        (dict(prior_gives="odds"), "prior_gives is 'odds'"),
        (dict(loss_backend="liger"), "loss_backend is 'liger'"),
        (dict(logprob_backend="liger"), "logprob_backend is 'liger'; allowed: 'linear_logprob', 'trl'"),
        (dict(k_max=0), "k_max is 0; allowed: a whole number from 1"),
        (dict(k_max=None), "k_max is None; allowed: a whole number from 1 to 2147483647"),
        (dict(k_max="many"), "k_max is 'many'; allowed: a whole number"),
        (dict(k_max=2**31), "k_max is 2147483648; allowed: a whole number from 1 to 2147483647"),
        (dict(extra_rounds=None), "extra_rounds is None; allowed: a whole number, 0 or more"),
        (dict(extra_rounds=1.5), "extra_rounds is 1.5; allowed: a whole number, 0 or more"),
        (dict(max_extra_rollouts="all"), "max_extra_rollouts is 'all'; allowed: None, or a whole number, 0 or more"),
        (dict(cost=-1.0), "cost is -1.0; allowed: a finite number, 0 or more"),
        (dict(cost=None), "cost is None; allowed: a finite number, 0 or more"),
        (dict(cost=math.inf), "cost is inf; allowed: a finite number, 0 or more"),
        (dict(max_extra_rollouts=-1), "max_extra_rollouts is -1"),
        (dict(multi_objective_aggregation="normalize_then_sum"), "multi_objective_aggregation"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        V05Config(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize("estimator", ["v05", "grpo"])
def test_messages_without_content(folder, tmp_path, estimator):
    """Calls of a tool have none; the data set holds None for it."""
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    asked = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    trainer = make_trainer(folder, tmp_path, estimator=estimator)
    trainer.processing_class.chat_template = "{% for m in messages %}{{ m['content'] or 'b' }} {% endfor %}"
    trainer.reward_funcs = [lambda completions, **_: [1.0] * len(completions)]
    trainer.model.train()
    rows = [{"prompt": [*asked, {"role": "tool", "name": "f", "content": "c"}]} for _ in range(8)]
    assert len(trainer._generate_and_score_completions(rows)["advantages"]) >= 8


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "gpg", "opo", "reinforce_plus_plus", "james_stein"])
def test_without_a_prior_rewards_may_lie_anywhere(folder, tmp_path, estimator):
    def rewards(completions, **_):
        return [float(place % 4) - 1 for place in range(len(completions))]

    trainer = make_trainer(folder, tmp_path, rewards, estimator=estimator, max_steps=1)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    wide = make_trainer(folder, tmp_path, rewards, estimator=estimator, max_steps=1, reward_range=[-1.0, 2.0])
    wide.train()
    assert trainer.state.log_history[0]["v05/advantage_std"] == wide.state.log_history[0]["v05/advantage_std"]


def test_trl_s_own_config_is_refused(folder, tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="args is GRPOConfig; allowed: V05Config"):
        V05Trainer(model=folder, reward_funcs=starts_early, args=args)


def test_options_on_a_command_line(tmp_path):
    line = (
        f"--output_dir {tmp_path} --use_cpu --bf16 False --reward_range -1 1 --estimator v05_loo --max_extra_rollouts 9"
    )
    (args,) = TrlParser((V05Config,)).parse_args_and_config(line.split())
    assert (args.bounds, args.estimator, args.max_extra_rollouts) == ((-1.0, 1.0), "v05_loo", 9)
    assert args.k_max == 16


def test_prompts_as_text():
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert prompt_text("2 + 2 =") == "2 + 2 ="
    assert prompt_text(talk) == "system: Be brief.\nuser: What is it?"
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}]
    talk = [{"role": "assistant", "content": None, "tool_calls": calls}, {"role": "assistant", "tool_calls": calls}]
    assert prompt_text([*talk, {"role": "tool", "content": "3"}]) == "assistant: \nassistant: \ntool: 3"
    assert prompt_text([{"role": "user", "content": [{"type": "text", "text": None}]}]) == "user: "
