"""The recipe's configuration is composed over verl's own, and accepted by it."""

import re
from pathlib import Path

import pytest
import verl
from hydra import compose, initialize_config_dir
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.import_utils import import_external_libs, load_class_from_fqn

from v05.integrations.verl.settings import Settings

pytestmark = pytest.mark.verl
RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "verl_ray"


def load(*overrides):
    """The recipe, composed as `python -m verl.trainer.main_ppo --config-dir` does."""
    with initialize_config_dir(config_dir=str(RECIPES), version_base=None):
        return compose(config_name="qwen3_4b_dapo_math", overrides=list(overrides))


def test_verl_accepts_it():
    config = load()
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    assert (actor.policy_loss.loss_mode, actor.loss_agg_mode, actor.clip_ratio_high) == ("v05_ppo", "token-mean", 0.28)
    assert (rollout.n, rollout.agent.num_workers, rollout.val_kwargs.n) == (4, 32, 16)
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == (4, 8)
    assert config.trainer.use_v1


def test_every_name_in_it_exists():
    config = load()
    import_external_libs(config.actor_rollout_ref.model.external_lib)
    settings = Settings.of(config.algorithm)
    assert (settings.k_init, settings.k_max, settings.cost) == (4, 16, 1 / 256)
    assert callable(get_adv_estimator_fn(config.algorithm.adv_estimator))
    assert callable(get_policy_loss_fn(config.actor_rollout_ref.actor.policy_loss.loss_mode))
    manager = load_class_from_fqn(config.actor_rollout_ref.rollout.agent.agent_loop_manager_class)
    assert manager.__name__ == "LookAheadManager"
    assert callable(load_class_from_fqn(settings.prior))
    assert callable(load_class_from_fqn(settings.memory))
    assert load_class_from_fqn(config.trainer.checkpoint_callback_class).__name__ == "SaveMemory"


def test_a_wrong_setting_is_refused():
    with pytest.raises(ValueError, match=r"algorithm.v05 has k_first; allowed: reward_range, prior"):
        Settings.of(load("+algorithm.v05.k_first=2").algorithm)


def test_the_settings_in_the_readme_are_verls():
    """Composed over verl's own defaults, without the recipe."""
    text = (RECIPES.parents[1] / "README.md").read_text(encoding="utf-8").split("### In verl")[1].split("###")[0]
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    given = re.findall(r"(\+?[a-z_]+\.[a-z_.0-9]+=[\w.]+)", blocks)
    assert len(given) == 5
    folder = Path(verl.__file__).parent / "trainer" / "config"
    with initialize_config_dir(config_dir=str(folder), version_base=None):
        config = compose(config_name="ppo_trainer", overrides=given)
    assert config.trainer.use_v1
    assert callable(get_adv_estimator_fn(config.algorithm.adv_estimator))
    Settings.of(config.algorithm).find_names()
    name = config.actor_rollout_ref.rollout.agent.agent_loop_manager_class
    assert load_class_from_fqn(name).__name__ == "PriorManager"
    assert load_class_from_fqn(config.trainer.checkpoint_callback_class).__name__ == "SaveMemory"
