"""TRL's trainer with vLLM in its process: groups grow there, and each rollout keeps the log-probs that vLLM gave it."""

import gc

import pytest
from tiny_trl import make_trainer, write_policy
from trl.generation.vllm_generation import VLLMGeneration
from vllm.distributed import cleanup_dist_env_and_memory

pytestmark = pytest.mark.vllm
SETTINGS = dict(use_vllm=True, vllm_mode="colocate", vllm_max_model_length=64, vllm_gpu_memory_utilization=0.05)


class Pessimist:
    """Expects next to nothing, so that every prompt contradicts it."""

    def predict(self, prompts):
        return [0.02] * len(prompts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_policy(str(tmp_path_factory.mktemp("policy")), width=64, heads=4)


@pytest.fixture(autouse=True)
def alone():
    """The engine of a test is gone, with its process groups, before the next one begins."""
    yield
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture
def pushes(monkeypatch):
    """Counts the times that weights reach vLLM, which on a processor has packed those that TRL would write over."""
    counted = []

    def sync_weights(self):
        weights = [(name, value.detach().float()) for name, value in self._iter_named_params()]
        self.llm.llm_engine.model_executor.driver_worker.model_runner.reload_weights(weights_iterator=iter(weights))
        self.llm.reset_prefix_cache()
        counted.append(len(weights))

    monkeypatch.setattr(VLLMGeneration, "sync_weights", sync_weights)
    return counted


CASES = {
    "policy_loss": {},
    "several steps a batch, masked": dict(
        loss_backend="linear_policy_loss",
        vllm_importance_sampling_mode="token_mask",
        steps_per_generation=2,
        num_iterations=2,
        per_device_train_batch_size=4,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_groups_grow_in_vllm(folder, tmp_path, pushes, case):
    options = dict(reward_range=[0, 1], loss_type="grpo", learning_rate=1e-2, max_steps=8) | CASES[case]
    trainer = make_trainer(folder, tmp_path, extra=dict(prior=Pessimist()), **SETTINGS, **options)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    batches = [entry for entry in log if "v05/rollouts_per_prompt" in entry]
    assert all(entry["v05/rollouts_per_prompt"] == 8 and entry["v05/extra_rollouts"] == 8 for entry in batches)
    # Of bfloat16 beside float32. A row with another row's log-probs, or of older weights, is nats away.
    assert all(entry["sampling/sampling_logp_difference/max"] < 0.2 for entry in batches)
    assert len(pushes) == len(batches)  # once, however many rounds a batch has
    assert batches[-1]["entropy"] < batches[0]["entropy"] - 0.2  # the policy has moved, and vLLM with it
