"""An update's rollouts from a scheduler: priors, the algorithm's budget or a rival's, and what went wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from v05.errors import InputError
from v05.rollout.budget import BudgetRule, Fixed, LookAhead, ReinforceAda, Utility, Variance
from v05.rollout.engine import Rollout
from v05.rollout.limits import Limits
from v05.rollout.sample import Sample
from v05.rollout.scheduler import Scheduler
from v05.rollout.streaming import StreamingEngine
from v05.tasks import Task
from v05.tasks.grading import Grader
from v05.training.algorithms import Algorithm
from v05.training.config import TrainConfig
from v05.training.stream_config import StreamConfig
from v05.value.prior import Middle, Prior


class Stopped(Exception):
    """A stop was asked for while an update was being sampled; the state has all that had finished."""


class StreamSampler:
    """Samples update after update with a scheduler, from the task's prompts and the prior's expectations."""

    def __init__(
        self,
        config: TrainConfig,
        stream: StreamConfig,
        algorithm: Algorithm,
        task: Task,
        engine: StreamingEngine,
        grader: Grader,
        prior: Prior | None,
        encode: Callable[[str], Sequence[int]],
    ) -> None:
        """Set up a scheduler.

        Args:
            config: of the run.
            stream: of sampling; its mode is not `batch`.
            algorithm: its sizes of groups, its fusion and its cost.
            task: gives prompts.
            engine: answers requests.
            grader: gives rewards while others are being sampled.
            prior: expected rewards; None for the middle of the range.
            encode: returns a prompt's token ids; an answer to others is asked for again.

        Raises:
            InputError: the algorithm replaces groups whose rewards are all equal.
        """
        if algorithm.drop_equal:
            raise InputError(f"mode is {stream.mode!r}; allowed for {algorithm.name}, which drops equal groups: batch")
        self.config, self.task, self.prior = config, task, prior or Middle(task.reward_range)
        prompts = stream.prompts or prompts_of(config.rollouts_per_update, algorithm)
        self.rule = make_rule(stream.rule, algorithm, task.reward_range, config, config.rollouts_per_update / prompts)
        limits = Limits(
            prompts,
            stream.mode,  # type: ignore[arg-type]
            stream.window,
            rollouts=config.rollouts_per_update,
            temperature=config.temperature,
            max_new_tokens=task.max_answer_length,
            seconds=stream.seconds,
            attempts=stream.attempts,
            restarts=stream.restarts,
        )
        self.scheduler = Scheduler(engine, self._source, grader, self.rule, limits, config.seed, encode=encode)

    def push(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Give the engine the policy's weights."""
        self.scheduler.push(weights, version)

    def sample(self, version: int, stopped: Callable[[], bool], left: int) -> tuple[Sample, dict[str, float]]:
        """Return the groups of the next update, and metrics.

        Args:
            version: of the weights that will learn from them.
            stopped: asked again and again.
            left: rollouts of the run, 1 or more.

        Raises:
            Stopped: it became true before the groups were finished.
        """
        before = self.scheduler.trouble.counts()
        step = self.scheduler.next_step(stopped, left)
        if step is None:
            raise Stopped
        groups = [group for group in step.groups if group.rewards]
        sample = Sample()
        prior = torch.tensor([group.prior for group in groups], dtype=torch.float32)
        sample.start([group.prompt for group in groups], [group.position for group in groups], prior)
        sample.add(
            [[group.rollouts[place] for place in group.in_order] for group in groups],
            [[group.rewards[place] for place in group.in_order] for group in groups],
        )
        stale = step.staleness(version)
        metrics: dict[str, float] = {
            "stale": sum(stale) / max(1, len(stale)),
            "stalest": max(stale, default=0),
            "extra": step.extra,
            "in_flight": len(self.scheduler.steps),
        }
        after = self.scheduler.trouble.counts()
        return sample, metrics | {f"requests_{name}": after[name] - before[name] for name in after}

    def generate(
        self, prompts: Sequence[str], counts: Sequence[int], *, seed: int, temperature: float, max_new_tokens: int
    ) -> list[list[Rollout]]:
        """Sample a batch beside what is in flight; see `v05.rollout.engine.Engine`."""
        limits: dict[str, Any] = dict(seed=seed, temperature=temperature, max_new_tokens=max_new_tokens)
        return self.scheduler.revived.generate(prompts, counts, **limits)

    def _source(self, first: int, count: int) -> tuple[list[str], Tensor]:
        prompts = self.task.prompts(self.config.seed, first, count)
        return prompts, self.prior.predict(prompts)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what is in flight, see `Scheduler.state`."""
        return self.scheduler.state()

    def load_state(self, state: Mapping[str, Any], tokens: Mapping[str, Tensor], mixture: Tensor | None) -> None:
        """Go on from a state, with the mixture of calibrated fusion."""
        if isinstance(self.rule, LookAhead):
            self.rule.state = mixture
        self.scheduler.load_state(state, tokens)


def prompts_of(rollouts: int, algorithm: Algorithm) -> int:
    """Return the prompts of an update: where groups may grow a third of its rollouts is kept back for that."""
    return max(1, round(rollouts / (algorithm.k_init * (1.5 if algorithm.grows else 1))))


def make_rule(
    name: str, algorithm: Algorithm, reward_range: tuple[float, float], config: TrainConfig, mean: float
) -> BudgetRule:
    """Return a budget rule by name; `mean` is the rollouts per prompt that rivals divide."""
    if name in ("utility", "variance"):
        allocation = Utility if name == "utility" else Variance
        return allocation(mean, reward_range, smallest=2 if mean >= 2 else 1)
    if name == "reinforce-ada":
        return ReinforceAda(algorithm.k_init, max(algorithm.k_init, algorithm.k_max), reward_range)
    if name == "fixed" or not algorithm.grows:
        return Fixed(algorithm.k_init if name == "look-ahead" else max(1, int(mean)), reward_range)
    return LookAhead(algorithm.k_init, algorithm.k_max, algorithm.cost_or(config.cost), algorithm.fusion, reward_range)
