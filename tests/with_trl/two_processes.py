"""Trains for two updates on completions that depend on the prompt alone; writes weights and log. For `torchrun`."""

import json
import os
import sys

from safetensors.torch import save_file
from tiny_trl import make_trainer

FAILS = ("a", "c")  # prompts that begin so always fail


class Hopeful:
    """Expects nine successes of ten, whatever it is asked."""

    def predict(self, prompts):
        return [0.9] * len(prompts)


def fixed_rollouts(prompts, trainer):
    """One completion per prompt, which follows from its letters."""
    ids = trainer.processing_class(text=prompts)["input_ids"]
    answers = [[*reversed(one), 1] if one[0] % 2 else [*one, *one] for one in ids]
    return dict(prompt_ids=ids, completion_ids=answers, logprobs=None)


def rewards(prompts, **_):
    return [float(prompt[0] not in FAILS) for prompt in prompts]


def main(folder: str, output: str, rows: int, variants: str) -> None:
    """Train once for each of the variants' options, on `rows` rows a process and step."""
    for number, options in enumerate(json.loads(variants)):
        settings = dict(per_device_train_batch_size=rows, max_steps=2, k_max=8, learning_rate=0.1, optim="sgd")
        settings |= dict(lr_scheduler_type="constant", max_grad_norm=0.0, **options)
        extra = dict(rollout_func=fixed_rollouts, prior=Hopeful())
        trainer = make_trainer(folder, output, rewards=rewards, extra=extra, **settings)
        trainer.train()
        if trainer.accelerator.is_main_process:
            weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
            save_file({name: value.contiguous() for name, value in weights.items()}, f"{output}{number}.safetensors")
            with open(f"{output}{number}.json", "w", encoding="utf-8") as file:
                json.dump(trainer.state.log_history, file)
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # when Python frees the trainer, gloo's threads and the interpreter can wait for each other


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
