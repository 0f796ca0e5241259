"""Prior, rollouts, look-ahead, advantages through Ray: verl's own agent loop workers and queue, engines simulated."""

import os
import uuid
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from test_verl_recipe import load
from tiny_models import write_qwen3
from transformers import AutoTokenizer
from verl import DataProto
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils import tensordict_utils as tu

import v05.integrations.verl
from v05.kernels import group_advantage, shrinkage

pytestmark = pytest.mark.verl
HERE = Path(__file__).resolve().parent
RANGE = (-1.0, 1.0)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The recipe with a tiny model and two agent loop workers, on a local Ray with verl's queue."""
    import transfer_queue

    folder = write_qwen3(tmp_path_factory.mktemp("model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})  # verl looks for them
    tokenizer.save_pretrained(folder)
    config = load(
        f"actor_rollout_ref.model.path={folder}",
        "actor_rollout_ref.rollout.agent.num_workers=2",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "transfer_queue.backend.SimpleStorage.total_storage_size=1000",
        "data.max_prompt_length=8",
        "data.max_response_length=8",
    )
    path = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1])])
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ray.init(num_cpus=8, include_dashboard=False, runtime_env={"env_vars": environment})
    transfer_queue.init(config.transfer_queue)
    yield config
    transfer_queue.close()
    ray.shutdown()


@pytest.fixture(scope="module")
def manager(config):
    """The manager that the recipe names."""
    return make_manager(config, config.actor_rollout_ref.rollout.agent.agent_loop_manager_class)


def make_manager(config, name):
    """The manager of this full name, with two engines and a scorer."""
    from simulated import Client, Engine, Scorer
    from verl.utils.import_utils import load_class_from_fqn

    return load_class_from_fqn(name).create(
        config=config,
        llm_client=Client([Engine.remote() for _ in range(2)]),
        teacher_client=None,
        reward_loop_worker_handles=[Scorer.remote()],
    )


def refuse(failed):
    """No prompt fails here."""
    raise AssertionError(f"{failed} prompts failed")


def rollouts(config, manager, prompts, step):
    """Every prompt's rewards as verl's queue has them, by uid, with what its trainer would train on."""
    import transfer_queue

    uids = [uuid.uuid4().hex for _ in prompts]
    batch = tu.get_tensordict(
        {
            "uid": np.array(uids, dtype=object),
            "raw_prompt": np.array([[{"role": "user", "content": prompt}] for prompt in prompts], dtype=object),
            "index": np.arange(len(prompts)),
            "data_source": np.array(["simulated"] * len(prompts), dtype=object),
        }
    )
    tu.assign_non_tensor_data(batch, "global_steps", step)
    tags = [{"is_prompt": True, "status": "pending", "global_steps": step} for _ in uids]
    transfer_queue.kv_batch_put(keys=uids, partition_id="train", tags=tags)
    manager.generate_sequences(batch)
    buffer = ReplayBuffer("sync", config, None, "drop", {}, poll_interval=0.05, refill_fn=refuse)
    batch, _ = buffer.sample(global_steps=step, partition_id="train", batch_size=len(uids))
    fields = ["uid", "response_mask", "rm_scores"]
    data = transfer_queue.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=fields)
    transfer_queue.kv_clear(keys=batch.keys, partition_id="train")
    return uids, DataProto(batch=data.to_padded_tensor())


def test_two_workers_grow_groups_and_the_driver_fuses_them(config, manager):
    """Every group has the size that its own prior and rewards give, and the advantages are the definition's."""
    prompts = [f"p{tenths}" for tenths in (0, 1, 5, 9, 0, 8, 9, 3)]
    memory = ray.get_actor(v05.integrations.verl.memory.NAME)
    sizes, before = [], None
    for step in range(4):
        uids, data = rollouts(config, manager, prompts, step)
        of_row = np.array(data.batch.pop("uid").tolist(), dtype=object)
        data.non_tensor_batch["uid"] = of_row
        data.batch["token_level_rewards"] = data.batch["rm_scores"].float()
        priors = ray.get(memory.recall.remote(uids))
        rewards = data.batch["rm_scores"].sum(1).float()
        groups = [rewards[torch.from_numpy(np.flatnonzero(of_row == uid))] for uid in uids]
        assert all(4 <= len(group) <= 16 for group in groups)
        offsets = torch.tensor([0, *np.cumsum([len(group) for group in groups])])
        stopped = shrinkage(torch.cat(groups), offsets, torch.tensor(priors), reward_range=RANGE)
        assert torch.equal(stopped.planned, stopped.count)
        done = compute_advantage(data, adv_estimator=config.algorithm.adv_estimator, config=config.algorithm)
        expected = group_advantage(torch.cat(groups), offsets, prior=torch.tensor(priors), reward_range=RANGE)
        rows = np.concatenate([np.flatnonzero(of_row == uid) for uid in uids])
        ours = done.batch["advantages"][rows]
        torch.testing.assert_close(ours, expected[:, None] * done.batch["response_mask"][rows], rtol=1e-5, atol=1e-6)
        sizes.append([len(group) for group in groups])
        if step == 0:
            before = priors
    assert set(before) == {0.0}, "nothing is known at first"
    assert max(sizes[0]) > 4, "a prior in the middle conflicts with prompts that always fail"
    hard, easy = sum(priors[place] for place in (0, 1, 4)), sum(priors[place] for place in (3, 5, 6))
    assert hard < easy, "the memory has learnt which prompts fail"


def test_groups_of_fixed_size_with_a_prior_that_knows_prompts(config):
    """Every group has `rollout.n` rollouts, and is fused with what the memory expected of its prompt."""
    manager = make_manager(config, "v05.integrations.verl.rollouts.PriorManager")
    memory = ray.get_actor(v05.integrations.verl.memory.NAME)
    prompts = [f"p{tenths}" for tenths in (0, 1, 5, 9, 0, 8, 9, 3)]
    for step in range(2):
        uids, data = rollouts(config, manager, prompts, step)
        of_row = np.array(data.batch.pop("uid").tolist(), dtype=object)
        data.non_tensor_batch["uid"] = of_row
        data.batch["token_level_rewards"] = data.batch["rm_scores"].float()
        rewards, priors = data.batch["rm_scores"].sum(1).float(), torch.tensor(ray.get(memory.recall.remote(uids)))
        rows = torch.from_numpy(np.concatenate([np.flatnonzero(of_row == uid) for uid in uids]))
        n = config.actor_rollout_ref.rollout.n
        assert len(of_row) == n * len(uids)
        assert all((of_row == uid).sum() == n for uid in uids)
        done = compute_advantage(data, adv_estimator=config.algorithm.adv_estimator, config=config.algorithm)
        offsets = torch.arange(0, len(rows) + 1, n)
        expected = group_advantage(rewards[rows], offsets, prior=priors, reward_range=RANGE)
        mask = done.batch["response_mask"][rows]
        torch.testing.assert_close(done.batch["advantages"][rows], expected[:, None] * mask, rtol=1e-5, atol=1e-6)
    assert priors[[0, 1, 4]].sum() < priors[[3, 5, 6]].sum(), "the memory has learnt which prompts fail"


@pytest.mark.parametrize("name", ["PriorManager", "LookAheadManager"])
def test_a_wrong_setting_ends_the_job_before_it_has_begun(config, name):
    for given, message in (
        (dict(k_init=20), "k_init is 20 and k_max 16"),
        (dict(prior="nope.Mine"), "prior is 'nope.M"),
    ):
        wrong = config.copy()
        wrong.algorithm.v05.update(given)
        with pytest.raises(ValueError, match=message):
            make_manager(wrong, f"v05.integrations.verl.rollouts.{name}")


def test_a_memory_whose_prior_the_estimator_does_not_use_is_reported(config, caplog):
    other = config.copy()
    other.algorithm.v05.prior = "others"
    make_manager(other, "v05.integrations.verl.rollouts.PriorManager")
    assert "algorithm.v05.prior is 'others': advantages do not use what the memory expects" in caplog.text


def test_the_memory_goes_on_from_verls_checkpoint(config, manager, tmp_path, caplog):
    """As verl's trainer calls it after a save, and makes the manager of the job that goes on."""
    from verl.trainer.ppo.checkpoint_callback import build_checkpoint_callback

    from v05.integrations.verl.checkpoints import FILE, load_memory
    from v05.integrations.verl.memory import Memory
    from v05.integrations.verl.settings import Settings

    folder = tmp_path / "global_step_7"
    folder.mkdir()
    running = ray.get_actor(v05.integrations.verl.memory.NAME)
    ray.get(running.start.remote("known", "p9"))
    ray.get(running.learn.remote(torch.arange(5.0)))
    build_checkpoint_callback(config).on_save(trainer=None, global_step=7, checkpoint_dir=str(folder), async_save=False)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    known = ray.get(running.state_dict.remote())
    fresh = ray.remote(Memory).options(num_cpus=0)
    settings, trainer = Settings.of(config.algorithm), config.trainer.copy()
    for mode, path in (("auto", None), ("resume_path", str(folder))):
        trainer.resume_mode, trainer.resume_from_path, trainer.default_local_dir = mode, path, str(tmp_path)
        again = fresh.remote(settings)
        load_memory(again, trainer)
        found = ray.get(again.state_dict.remote())
        assert found.keys() == known.keys()
        assert all(torch.equal(value, known[name]) for name, value in found.items())
        assert ray.get(again.recall.remote(["known"])) == ray.get(running.recall.remote(["known"]))
    (folder / FILE).unlink()
    for mode in ("disable", "auto"):
        trainer.resume_mode, again = mode, fresh.remote(settings)
        load_memory(again, trainer)
        assert ray.get(again.mixture.remote()) is None
        assert ("the prior starts anew" in caplog.text) == (mode == "auto")
