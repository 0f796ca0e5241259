"""The update part of a step in TRL: loss and backward through a whole model, for a batch that is already generated.

`GRPOTrainer` beside `V05Trainer`: "v05" with `loss_backend="linear_policy_loss"`, "v05, defaults" without an option
(`policy_loss` of log-probs by `linear_logprob`), and with these defaults but for TRL's loss, or but for its log-probs.
The model is a Qwen3 of random weights, few layers and a whole vocabulary with tied embeddings, as the small ones of its
family have; old log-probs are given, as with vLLM; nothing is checkpointed. Before anything is timed, all must give one
loss and one gradient.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import OURS, Case, rival
from benchmarks.timing import Run

VOCABULARY = 151_936
OPTIONS: dict[str, dict[str, str]] = {
    OURS: dict(loss_backend="linear_policy_loss"),
    f"{OURS}, defaults": {},
    f"{OURS}, TRL loss": dict(loss_backend="trl"),
    f"{OURS}, TRL log-probs": dict(logprob_backend="trl"),
}


class Size(NamedTuple):
    """Rows of a batch, tokens of a prompt, most of a completion; features, layers and vocabulary of the model."""

    rows: int
    prompt: int
    completion: int
    features: int
    layers: int
    vocabulary: int = VOCABULARY


class Precision(NamedTuple):
    """How a model computes: `weights` are its dtype; with `mixed`, TRL's default, products are of bfloat16.

    `tolerance`: the largest `gap` to TRL's own step.
    """

    name: str
    weights: torch.dtype
    mixed: bool
    tolerance: float


SMALL = [Size(4, 32, 128, 128, 2), Size(8, 32, 128, 256, 2)]
LARGE = [Size(8, 128, 2048, 1024, 4), Size(8, 128, 2048, 2048, 4)]
QUICK = [Size(3, 4, 12, 32, 1, 4096)]
SINGLE = Precision("float32", torch.float32, False, 1e-4)
MIXED = Precision("bfloat16, weights float32", torch.float32, True, 1e-1)
HALF = Precision("bfloat16", torch.bfloat16, True, 1e-1)


def tokenizer() -> Any:
    """One that knows no text: batches are of token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def policy(size: Size, dtype: torch.dtype) -> Any:
    """A causal Qwen3, the same weights at every call."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    width = min(128, size.features // 2)
    heads = size.features // width
    config = Qwen3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.features,
        intermediate_size=3 * size.features,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=width,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).to(dtype)


class Stepper:
    """A trainer as it is between generation and optimiser, its model wrapped as in training."""

    def __init__(self, trainer: type, config: type, size: Size, precision: Precision, device: torch.device, **own: Any):
        """Set up `trainer` with a `config` of TRL's defaults and its `own` options."""
        from datasets import Dataset

        with tempfile.TemporaryDirectory() as folder:
            args = config(
                output_dir=folder,
                use_cpu=device.type == "cpu",
                bf16=precision.mixed,
                report_to=[],
                disable_tqdm=True,
                per_device_train_batch_size=size.rows,
                num_generations=size.rows,
                gradient_accumulation_steps=1,
                max_completion_length=size.completion,
                gradient_checkpointing=False,
                **own,
            )
            self.trainer = trainer(
                model=policy(size, precision.weights),
                reward_funcs=lambda completions, **_: [0.0] * len(completions),
                args=args,
                train_dataset=Dataset.from_dict({"prompt": ["<eos>"] * size.rows}),
                processing_class=tokenizer(),
            )
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.model.train()
        self.model = self.trainer.accelerator.prepare(self.trainer.model)

    def logprobs(self, inputs: dict[str, Tensor]) -> Tensor:
        """What TRL's generation step finds for the completions, `[rows, completion]`."""
        ids, mask = (torch.cat([inputs[f"prompt_{what}"], inputs[f"completion_{what}"]], 1) for what in ("ids", "mask"))
        with torch.no_grad():
            found = self.trainer._get_per_token_logps_and_entropies(
                self.model, ids, mask, inputs["completion_ids"].size(1)
            )
        return found[0]

    def step(self, inputs: dict[str, Tensor]) -> Sequence[Tensor]:
        """Loss, and the gradient of every parameter."""
        loss = self.trainer.compute_loss(self.model, inputs)
        self.trainer.accelerator.backward(loss)
        gradients = [parameter.grad for parameter in self.model.parameters()]
        self.model.zero_grad(set_to_none=True)
        return (loss.detach(), *gradients)


def lengths(size: Size) -> Tensor:
    """Tokens of each completion, `[rows]`: from a quarter of the longest to the longest, evenly spread."""
    return torch.linspace(size.completion / 4, size.completion, size.rows).round().long()


def batch(size: Size, device: torch.device) -> dict[str, Tensor]:
    """What TRL's generation step hands over but for log-probs: ragged completions, advantages of both signs."""
    rng = torch.Generator().manual_seed(0)
    inside = (torch.arange(size.completion) < lengths(size)[:, None]).long()
    made = dict(
        prompt_ids=torch.randint(2, size.vocabulary, (size.rows, size.prompt), generator=rng),
        prompt_mask=torch.ones(size.rows, size.prompt, dtype=torch.int64),
        completion_ids=torch.randint(2, size.vocabulary, (size.rows, size.completion), generator=rng) * inside,
        completion_mask=inside,
        advantages=torch.linspace(-1, 1, size.rows),
        num_items_in_batch=inside.sum(),
    )
    return {name: value.to(device) for name, value in made.items()}


def gap(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The larger of two differences, relative to what is expected: of the loss, and of all gradients as one vector."""

    def length(tensors: Sequence[Tensor]) -> float:
        return math.sqrt(sum(float(values.double().square().sum()) for values in tensors))

    apart = [a.double() - b.double() for a, b in zip(actual, expected, strict=True)]
    return max(length(apart[some]) / length(expected[some]) for some in (slice(0, 1), slice(1, None)))


class Agreement:
    """The inputs of a case, made by its first contender, and the outcome that all others must have."""

    def __init__(self, size: Size, precision: Precision, device: torch.device) -> None:
        self.inputs, self.expected = batch(size, device), None
        self.tolerance = precision.tolerance

    def run_of(self, name: str, stepper: Stepper) -> Run:
        """A run of the stepper.

        Raises:
            ValueError: its loss or a gradient is not that of the first.
        """
        if self.expected is None:
            logprobs = stepper.logprobs(self.inputs)
            drift = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1)).to(logprobs)
            self.inputs["old_per_token_logps"] = logprobs + 0.2 * drift
        outcome = stepper.step(self.inputs)
        if self.expected is None:
            self.expected = [value.clone() for value in outcome]
        error = gap(outcome, self.expected)
        if not error <= self.tolerance:
            raise ValueError(f"trl_step: {name} differs from TRL by {error:.2g}; allowed: {self.tolerance}")
        return lambda: stepper.step(self.inputs)


def operations(model: Any, size: Size) -> int:
    """FLOPs of the products with weights, forward and backward: the head's of completions, the layers' of all tokens.

    The embedding is the head's weight; its own look-up multiplies nothing.
    """
    head = size.vocabulary * size.features
    body = sum(parameter.numel() for parameter in model.parameters()) - head
    tokens = int(lengths(size).sum())
    return 6 * (head * tokens + body * (tokens + size.rows * size.prompt))


def case(size: Size, precision: Precision, device: torch.device) -> Case:
    agreement = Agreement(size, precision, device)

    def theirs(trl: ModuleType) -> Run:
        return agreement.run_of("TRL", Stepper(trl.GRPOTrainer, trl.GRPOConfig, size, precision, device))

    def ours(name: str) -> Callable[[ModuleType], Run]:
        def make(integration: ModuleType) -> Run:
            trainer, config = integration.V05Trainer, integration.V05Config
            stepper = Stepper(trainer, config, size, precision, device, **OPTIONS[name])
            return agreement.run_of(name, stepper)

        return make

    first = rival("TRL", "trl", theirs)
    own = [rival(name, "v05.integrations.trl", ours(name)) for name in OPTIONS]
    agreement.expected = None
    with torch.device("meta"):
        model = policy(size, precision.weights)
    return Case(
        op="trl_step",
        shape=f"{size.rows} x ({size.prompt} + {size.completion // 4} to {size.completion}), "
        f"{size.layers} layers of {size.features}, vocabulary {size.vocabulary}",
        dtype=precision.name,
        direction="forward + backward",
        bytes=3 * sum(parameter.nbytes for parameter in model.parameters()),
        flops=operations(model, size),
        contenders=[*own, first],
        device=device,
        tolerance=precision.tolerance,
        captured=False,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yields the cases, one in memory at a time."""
    on_gpu = device.type == "cuda"
    for size in QUICK if quick else LARGE if on_gpu else SMALL:
        for precision in (MIXED, HALF) if on_gpu else (SINGLE,):
            yield case(size, precision, device)
