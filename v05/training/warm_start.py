"""The warm start: imitating answers that are often wrong, so that the policy is right sometimes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from v05.batch import offsets_of
from v05.files import read_tensors, write_tensors
from v05.fingerprint import fingerprint
from v05.policy import Policy
from v05.small_policy import make_policy
from v05.tasks import Demonstrated
from v05.training.config import TrainConfig

BATCH: Final = 128  # demonstrations per step
MUON_RATE: Final = 0.02  # peak learning rate of the matrices inside the layers
ADAM_RATE: Final = 4e-3  # peak learning rate of embeddings, output layer and norms
WARM_UP: Final = 100  # steps of rising learning rate; it falls linearly to 0 afterwards
VERSION: Final = 1  # part of the cache key: raise it when the recipe changes


def warm_start(
    config: TrainConfig, task: Demonstrated, cache: Path, on_step: Callable[[int, int, float], None] | None = None
) -> Policy:
    """Return the policy that all runs with these settings start from, from the cache where it is there.

    Args:
        config: its `policy`, `task`, `warm_start_steps` and `warm_start_seed` decide the result.
        task: gives prompts and demonstrations.
        cache: folder of finished warm starts, made where missing.
        on_step: called after each step with the steps done, the steps in all and the loss in nats per token.

    Returns:
        A new policy.
    """
    policy = make_policy(task.alphabet, config.policy, config.warm_start_seed)
    file = cache / f"{cache_key(config)}.safetensors"
    if file.exists():
        policy.model.load_state_dict(read_tensors(file))
        return policy
    imitate(policy, task, config.warm_start_steps, config.warm_start_seed, on_step)
    cache.mkdir(parents=True, exist_ok=True)
    write_tensors(file, policy.model.state_dict())
    return policy


def cache_key(config: TrainConfig) -> str:
    """Return a name that changes with everything that the warm start depends on."""
    recipe = {
        "version": VERSION,
        "task": config.task,
        "policy": config.policy,
        "steps": config.warm_start_steps,
        "seed": config.warm_start_seed,
        "optimizer": [BATCH, MUON_RATE, ADAM_RATE, WARM_UP],
    }
    return "warm-" + fingerprint([json.dumps(recipe, sort_keys=True).encode()])


def imitate(
    policy: Policy, task: Demonstrated, steps: int, seed: int, on_step: Callable[[int, int, float], None] | None = None
) -> None:
    """Train `policy` in place on demonstrations.

    Args:
        policy: what is trained.
        task: gives prompts and demonstrations.
        steps: batches of `BATCH` demonstrations.
        seed: fixes prompts and demonstrations.
        on_step: see `warm_start`.
    """
    optimizers = make_optimizers(policy)
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    for step in range(steps):
        for group, peak in groups:
            group["lr"] = peak * min((step + 1) / WARM_UP, 1.0) * (1 - step / steps)
        loss = imitation_loss(policy, task, seed, step * BATCH, BATCH)
        policy.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if on_step is not None:
            on_step(step + 1, steps, float(loss.detach()))
    policy.model.zero_grad(set_to_none=True)


def make_optimizers(policy: Policy) -> list[torch.optim.Optimizer]:
    """Return Muon over the matrices inside the layers, which learns sums in half the steps, and AdamW over the rest."""
    inside: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in policy.model.named_parameters():
        matrix = parameter.dim() == 2 and "embed" not in name and "lm_head" not in name
        (inside if matrix else rest).append(parameter)
    return [
        torch.optim.Muon(inside, lr=MUON_RATE, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def imitation_loss(policy: Policy, task: Demonstrated, seed: int, start: int, count: int) -> Tensor:
    """Return the mean negative log-probability of demonstrations `start .. start + count - 1`, in nats per token."""
    prompts = task.prompts(seed, start, count)
    answers = policy.encode([task.demonstration(prompt, seed, start + row) for row, prompt in enumerate(prompts)])
    end = policy.tokenizer.eos_token_id
    tokens = torch.tensor([token for answer in answers for token in [*answer, end]])
    logits = policy.response_logits(policy.encode(prompts), tokens, offsets_of([len(answer) + 1 for answer in answers]))
    return torch.nn.functional.cross_entropy(logits, tokens)
