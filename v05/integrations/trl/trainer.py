"""`V05Trainer`: TRL's `GRPOTrainer` with V0.5's baselines, groups that grow, and the loss of v05's kernels."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast, gather_object
from torch import Tensor

from v05.files import read_tensors, write_tensors
from v05.integrations.trl.config import V05Config
from v05.integrations.trl.estimation import Estimation, Rewards
from v05.integrations.trl.loss_trainer import KernelLossTrainer
from v05.integrations.trl.metrics import batch_metrics
from v05.integrations.trl.prompts import Predictor, check_prior, prompt_text
from v05.integrations.trl.rollouts import Rollouts, learnt_from, merged_lengths, split_rows, with_fields
from v05.value.priors import named_prior

logger = get_logger(__name__)
STATE_FILE: Final = "v05_state.safetensors"  # beside TRL's files in a checkpoint


def _emptied(logs: dict[str, Any], rows: int) -> dict[str, Any]:
    """Return TRL's tables of completions without any, with room for `rows`."""
    column = partial(deque[Any], maxlen=rows)
    return {name: defaultdict(column) if isinstance(kept, dict) else column() for name, kept in logs.items()}


class V05Trainer(KernelLossTrainer):
    """`GRPOTrainer` whose advantages come from V0.5, see `V05Config`; everything else is TRL's."""

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: V05Config | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        prior: Predictor | None = None,
    ) -> None:
        """Set up TRL's trainer and the prior.

        Args:
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes,
                callbacks, optimizers, quantization_config, peft_config, tools, rollout_func, environment_factory: as
                for `GRPOTrainer`; args are a `V05Config`.
            prior: has `predict(prompts)`, texts to numbers, see `V05Config.prior_gives`; of its `observe`, `state_dict`
                and `load_state_dict` (`v05.value.prior.Prior`) those that there are get used. Only the main process
                asks it. None for the one that `args.prior` names.

        Raises:
            TypeError: `args` are not a `V05Config`, or `prior` has no `predict`.
            ValueError: whatever TRL does not allow.
        """
        args = V05Config() if args is None else args
        if not isinstance(args, V05Config):
            raise TypeError(f"args is {type(args).__name__}; allowed: V05Config, which takes the same options")
        if prior is not None:
            check_prior(prior)
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        self.choose_loss()
        self.estimation = Estimation(args, named_prior(args.prior, args.bounds) if prior is None else prior)
        self._rewards_per_func = torch.zeros(0)  # of the newest batch, on all processes
        self._rollouts: Rollouts | None = None  # finished ones, while TRL makes a batch of them
        reasons = {"environments are used": self.environment_factories is not None}
        reasons |= {"tools are called": bool(self.tools), "the model takes images": self._is_vlm}
        self._fixed = next((reason for reason, applies in reasons.items() if applies), None)
        if args.grows and self._fixed is not None:
            logger.warning(f"v05: every prompt keeps {self.num_generations} rollouts, because {self._fixed}")
        if self._grows:
            self.cut_steps()

    @property
    def _grows(self) -> bool:
        return bool(self.args.grows) and self._fixed is None

    def _from_main(self, compute: Callable[[], Tensor], size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return what the main process computes, `[size]`, on every process."""
        device = self.accelerator.device
        if self.accelerator.is_main_process:
            return broadcast(compute().to(device=device, dtype=dtype))
        return broadcast(torch.empty(size, dtype=dtype, device=device))

    @contextmanager
    def _every_row_a_group(self) -> Iterator[None]:
        """Let TRL generate one completion per row, and take any number of rows."""
        kept, self.num_generations = self.num_generations, 1
        try:
            yield
        finally:
            self.num_generations = kept

    def _generate(self, prompts: list[Any]) -> Any:
        """Generate as TRL does, or hand over what was generated in rounds."""
        done = self._rollouts
        if done is None:
            return super()._generate(prompts)
        return done.prompt_ids, done.completion_ids, done.tool_mask, done.completions, done.logprobs, {}, None, []

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        """Score as TRL does, or hand over what was scored in rounds; remember it: [N, functions]."""
        if self._rollouts is None:
            self._rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        else:
            self._rewards_per_func = self._rollouts.rewards.flatten(0, 1)
        return self._rewards_per_func

    def _round(self, inputs: list[dict[str, Any]], group: Tensor) -> Rollouts:
        """Generate and score one completion per row; `group` [W, R] says whose prompts they are."""
        prompts = [row["prompt"] for row in inputs]
        prompt_ids, completion_ids, tool_mask, completions, logprobs, fields, _, _ = super()._generate(prompts)
        rows = with_fields(inputs, fields)
        rewards = super()._calculate_rewards(rows, prompts, completions, completion_ids)
        by_process = rewards.view(self.accelerator.num_processes, len(rows), -1)
        return Rollouts(rows, prompt_ids, completion_ids, completions, tool_mask, logprobs, by_process, group)

    def _total(self, rewards_per_func: Tensor, group: Tensor) -> Rewards:
        """Return the rewards weighed and summed as TRL does, [N, functions] to [N], inside the range."""
        values = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        values = values.masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)
        groups = int(group.max()) + 1
        if not self.args.fused:
            return Rewards(values, group.flatten(), groups)
        return Rewards(values, group.flatten(), groups).checked(self.args.bounds)

    def _roll_out(self, inputs: list[dict[str, Any]], prior: Tensor, group: Tensor) -> Rollouts:
        """Generate the first rollouts, then more for the prompts whose rollouts contradict their prior."""
        first_rows = gather_object(inputs)[:: self.num_generations]
        metrics = self._metrics["train"]
        rollouts, rows = self._round(inputs, group), [len(inputs)]
        limit = self.args.max_extra_rollouts
        budget = group.numel() if limit is None else limit
        with self._every_row_a_group():
            for _ in range(self.args.extra_rounds):
                rewards = self._total(rollouts.rewards.flatten(0, 1), rollouts.group)
                compute = partial(self.estimation.plan, rewards, prior, budget, self.accelerator.num_processes)
                plan = self._from_main(compute, len(prior), torch.int64)
                more = torch.arange(len(prior), device=plan.device).repeat_interleave(plan)
                if not len(more):
                    break
                budget -= len(more)
                more = more.view(self.accelerator.num_processes, -1)
                own = more[self.accelerator.process_index].tolist()
                rollouts = rollouts + self._round([first_rows[prompt] for prompt in own], more)
                rows.append(len(own))
        merged_lengths(metrics, rows)
        return rollouts

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Make TRL's batch, from groups that have grown where they may, and put V0.5's advantages in."""
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        processes, device = self.accelerator.num_processes, self.accelerator.device
        texts = gather_object([prompt_text(row.get("prompt", "")) for row in inputs])[:: self.num_generations]
        prior = self._from_main(lambda: self.estimation.predict(texts), len(texts))
        group = torch.arange(len(texts), device=device).repeat_interleave(self.num_generations).view(processes, -1)
        if not self._grows:
            batch = super()._generate_and_score_completions(inputs)
        else:
            self._rollouts = self._roll_out(inputs, prior, group)
            group = self._rollouts.group
            self._logs: dict[str, Any] = _emptied(self._logs, group.numel())
            try:
                with self._every_row_a_group():
                    batch = super()._generate_and_score_completions(self._rollouts.inputs)
            finally:
                self._rollouts = None
        rewards = self._total(self._rewards_per_func, group)
        lengths = self.accelerator.gather(learnt_from(batch).sum(1))
        advantages = self._from_main(
            lambda: self._learn_from(texts, rewards, prior, lengths, len(inputs)), rewards.values.numel()
        )
        self._logs["advantages"].clear()
        self._logs["advantages"].extend(advantages.tolist())
        batch["advantages"] = advantages.view(processes, -1)[self.accelerator.process_index]
        batch["rows"] = torch.tensor(len(batch["advantages"]), device=device)
        return batch

    def _learn_from(self, texts: list[str], rewards: Rewards, prior: Tensor, lengths: Tensor, first: int) -> Tensor:
        """Return the advantages [N], log what V0.5 adds, then let prior and calibration learn; on the main process."""
        advantages = self.estimation.advantages(rewards, prior, lengths)
        metrics = self._metrics["train"]
        metrics["v05/advantage_std"].append(float(advantages.std()))
        if self.args.fused:
            start = [column.view(self.accelerator.num_processes, -1)[:, :first].flatten() for column in rewards[:2]]
            begun = Rewards(start[0], start[1], rewards.groups)
            first_test, test = self.estimation.test(begun, prior), self.estimation.test(rewards, prior)
            for name, value in batch_metrics(rewards, prior, begun.values, first_test, test).items():
                metrics[name].append(value)
            self.estimation.observe(texts, rewards, test)
        if self._grows:  # TRL saw groups of one
            values, offsets, _ = rewards.ragged()
            parts = [part for part in values.split(offsets.diff().tolist()) if len(part)]
            metrics["frac_reward_zero_std"][-1] = sum(bool((part == part[0]).all()) for part in parts) / max(
                1, len(parts)
            )
        return advantages

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Return the rows of this step; grown batches are dealt out row by row, where TRL would drop a remainder."""
        if not (self._grows and self.model.training):
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            self._buffered_inputs = split_rows(self._generate_and_score_completions(generation_batch), steps)
        return self._buffered_inputs[self._step % steps]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write TRL's checkpoint, and what prior and calibration know beside it."""
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            write_tensors(folder / STATE_FILE, self.estimation.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load TRL's state, and on the main process that of prior and calibration."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self.accelerator.is_main_process:
            return
        file = Path(checkpoint) / STATE_FILE
        if file.exists():
            self.estimation.load_state_dict(read_tensors(file), self.accelerator.device)
        else:
            logger.warning(f"v05: {file} does not exist; prior and calibration start anew")
