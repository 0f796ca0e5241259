"""The recipe: its file is TRL's and V0.5's to parse, and its script trains."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_chat import write_model
from trl import ModelConfig, TrlParser

from v05.integrations.trl import V05Config

pytestmark = pytest.mark.trl
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "trl_math"
FILE = RECIPE / "qwen3_4b_dapo_math.yaml"
ON_A_CPU = ["--use_cpu", "true", "--bf16", "false"]


def parse(*more: str) -> tuple[V05Config, ModelConfig]:
    parser = TrlParser((runpy.run_path(str(RECIPE / "train.py"))["Data"], V05Config, ModelConfig))
    _, args, model = parser.parse_args_and_config(["--config", str(FILE), *more])
    return args, model


def test_the_file_is_accepted_and_says_what_its_comments_say() -> None:
    args, model = parse(*ON_A_CPU)
    assert (args.estimator, args.num_generations, args.k_max, args.cost) == ("v05", 4, 16, 1 / 256)
    assert (args.loss_backend, args.loss_type, args.epsilon, args.epsilon_high) == (
        "linear_policy_loss",
        "dapo",
        0.2,
        0.28,
    )
    assert args.grows
    assert args.bounds == (0.0, 1.0)
    assert args.generation_batch_size * 8 == 512
    assert model.model_name_or_path == "Qwen/Qwen3-4B-Instruct-2507"
    assert (args.use_vllm, args.vllm_mode, args.beta) == (True, "colocate", 0.0)
    with pytest.raises(ValueError, match="estimator is 'v5'"):
        parse(*ON_A_CPU, "--estimator", "v5")


def test_the_script_trains_and_goes_on(tmp_path: Path) -> None:
    """A tiny model on a CPU, with everything else as the file has it."""
    data = tmp_path / "sums.jsonl"
    sums = [f"{first} plus {second}" for first in ("one", "two") for second in ("one", "two", "three")]
    data.write_text("".join(json.dumps({"prompt": text, "answer": "2"}) + "\n" for text in sums))
    model, output = write_model(tmp_path / "model"), tmp_path / "run"
    small = ["--model_name_or_path", str(model), "--data", str(data), "--output_dir", str(output), *ON_A_CPU]
    small += ["--use_vllm", "false", "--max_completion_length", "6", "--gradient_accumulation_steps", "2"]
    small += ["--save_steps", "1", "--learning_rate", "0.01", "--disable_tqdm", "true"]
    main = runpy.run_path(str(RECIPE / "train.py"))["main"]
    main(["--config", str(FILE), *small, "--max_steps", "1"])
    first = json.loads((output / "checkpoint-1" / "trainer_state.json").read_text())["log_history"]
    assert first[0]["v05/rollouts_per_prompt"] > 4
    main(["--config", str(FILE), *small, "--max_steps", "2", "--resume_from_checkpoint", str(output / "checkpoint-1")])
    log = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert log[0] == first[0]
    assert log[1]["step"] == 2
    before, after = (load_file(folder / "model.safetensors") for folder in (model, output))
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def test_rewards_are_one_for_the_answer_in_a_box() -> None:
    solved = runpy.run_path(str(RECIPE / "train.py"))["solved"]
    turns = [[{"role": "assistant", "content": text}] for text in (r"so \boxed{\frac{1}{2}}", r"\boxed{3}", "no idea")]
    assert solved(completions=turns, answer=["0.5", "0.5", "0.5"], prompts=None) == [1.0, 0.0, 0.0]
