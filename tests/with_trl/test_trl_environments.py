"""Environments, TRL's own way to have data, tools and rewards in one object: groups then keep their size."""

import logging
import math

import pytest
import trl.trainer.grpo_trainer
from datasets import Dataset
from tiny_trl import PROMPTS, make_trainer, starts_early, write_policy
from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.trl


class Asks:
    """It owns the question and the reward, and has no tool."""

    def reset(self, **row):
        """What is added to the prompt."""
        return " a b"

    def get_reward(self):
        """Always the same."""
        return 0.5


@pytest.mark.parametrize("own_data", [False, True])
def test_an_environment_without_tools(tmp_path, monkeypatch, caplog, own_data):
    folder = write_policy(str(tmp_path / "policy"))
    monkeypatch.setattr(trl.trainer.grpo_trainer, "supports_tool_calling", lambda *_: True)
    monkeypatch.setattr(trl.trainer.grpo_trainer, "is_jmespath_available", lambda: True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] or 'b' }} {% endfor %}"
    rows = {} if own_data else {"prompt": [[{"role": "user", "content": prompt}] for prompt in PROMPTS]}
    data = Dataset.from_dict(rows | {"number": list(range(len(PROMPTS)))})

    def early(completions, environments, **_):
        assert len(environments) == len(completions)
        return starts_early([completion[0]["content"] for completion in completions])

    extra = dict(environment_factory=Asks, train_dataset=data, processing_class=tokenizer)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(folder, tmp_path, early, extra=extra, max_steps=2, reward_range=[0.0, 1.5])
    assert "v05: every prompt keeps 4 rollouts, because environments are used" in caplog.text
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert trainer.state.log_history[0]["v05/rollouts_per_prompt"] == 4
