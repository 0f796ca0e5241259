"""V0.5 in TRL on problems with one answer, which Math-Verify compares.

    accelerate launch recipes/trl_math/train.py --config recipes/trl_math/qwen3_4b_dapo_math.yaml

Every option of TRL's `GRPOConfig` and `ModelConfig`, and of `V05Config`, goes into that file or after it.
"""

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from trl import ModelConfig, TrlParser, get_peft_config

from v05.integrations.trl import V05Config, V05Trainer
from v05.tasks.data import BENCHMARKS, Source, read_data
from v05.tasks.mathematics import Mathematics

verify = Mathematics()


@dataclass
class Data:
    """What is trained on."""

    data: str = field(
        default="dapo_math_17k",
        metadata={"help": "A file of `prompt` and `answer`, a data set of the hub, or a name that v05 knows."},
    )


def read_problems(name: str) -> Dataset:
    """Return conversations of one turn, each with its answer."""
    records = read_data(BENCHMARKS.get(name) or Source(name))
    prompts = [[{"role": "user", "content": record["prompt"]}] for record in records]
    return Dataset.from_dict({"prompt": prompts, "answer": [record["answer"] for record in records]})


def solved(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float]:
    """Return 1 for each completion whose last boxed answer equals the problem's, else 0."""
    return [verify("", turns[0]["content"], {"answer": gold}) for turns, gold in zip(completions, answer, strict=True)]


def main(arguments: list[str] | None = None) -> None:
    """Train, and go on from the newest checkpoint where `resume_from_checkpoint` is given."""
    data, args, model = TrlParser((Data, V05Config, ModelConfig)).parse_args_and_config(arguments)
    trainer = V05Trainer(
        model=model.model_name_or_path,
        reward_funcs=solved,
        args=args,
        train_dataset=read_problems(data.data),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
