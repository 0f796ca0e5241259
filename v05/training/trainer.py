"""The loop: prior, first rollouts, test, more where planned, advantage, log-probs, loss, step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, cast

import torch
from torch import Tensor

from v05.batch import Groups
from v05.estimates import HeldOut
from v05.files import finite
from v05.kernels import shrinkage
from v05.kernels.shrinkage.op import Shrinkage
from v05.policy import Policy
from v05.rollout.engine import Engine, Rollout, wrong_where_unanswered
from v05.rollout.pack import pack
from v05.rollout.sample import Sample, first_rollouts
from v05.rollout.share import share_out
from v05.rollout.streaming import StreamingEngine
from v05.seeds import seed_of
from v05.tasks import Task
from v05.tasks.grading import Grader, InlineGrader
from v05.training.algorithms import equal_groups, parse_algorithm
from v05.training.config import TrainConfig
from v05.training.counters import Counters
from v05.training.learner import Learner
from v05.training.loss_config import PLAIN, LossConfig
from v05.training.metrics import means_of
from v05.training.ranks import ALONE, Ranks
from v05.training.sampling import Stopped, StreamSampler
from v05.training.stream_config import BATCHES, StreamConfig
from v05.training.team import Team
from v05.value.prior import Middle, Prior

REPLACED: Final = 10  # times `rollouts_per_update` that an update spends at most before it learns from what it has


class Trainer:
    """One run of one algorithm, update by update; the same settings give the same bits."""

    def __init__(
        self,
        config: TrainConfig,
        policy: Policy,
        task: Task,
        engine: Engine,
        prior: Prior | None,
        *,
        grader: Grader | None = None,
        linear: bool = False,
        stream: StreamConfig = BATCHES,
        loss: LossConfig = PLAIN,
        ranks: Ranks = ALONE,
    ) -> None:
        """Set up an optimiser over `policy`.

        Args:
            config: the settings.
            policy: what is trained, in place.
            task: prompts and rewards.
            engine: generates rollouts; gets the policy's weights before each use.
            prior: expected rewards; None for an algorithm without.
            grader: gives rewards; None for the task's verifier, in this process.
            linear: go from hidden states to the loss, without logits in memory.
            stream: how rollouts are sampled; where it streams the engine is a `StreamingEngine` as well.
            loss: its options.
            ranks: processes that train together, each with a trainer of its own that is called in the same order.

        Raises:
            ValueError: the algorithm needs a prior and none is given.
        """
        self.config, self.policy, self.task, self.prior, self.ranks = config, policy, task, prior, ranks
        self.team = Team(engine, ranks)
        self.engine: Engine = engine if ranks.count == 1 or stream.streams else self.team
        self.algorithm = parse_algorithm(config.algorithm)
        if self.algorithm.prior != "none" and prior is None:
            raise ValueError(f"prior is None; allowed for {self.algorithm.name}: a prior")
        self.grader = grader or InlineGrader(task.verify, task.reward_range[0])
        self.learner = Learner(
            policy,
            self.algorithm,
            learning_rate=self.algorithm.learning_rate or config.learning_rate,
            temperature=config.temperature,
            epochs=config.epochs,
            micro_batches=config.micro_batches,
            linear=linear,
            behaviour=stream.streams,
            loss=loss,
            ranks=ranks,
        )
        self.streams = stream.streams
        self.sampler: StreamSampler | None = None
        if stream.streams and ranks.leads:
            parts = (self.algorithm, task, cast(StreamingEngine, engine), self.grader, prior)
            self.sampler = StreamSampler(config, stream, *parts, lambda prompt: policy.encode([prompt])[0])
        self.stopped: Callable[[], bool] = lambda: False  # asked while an update is being sampled
        self.counters = Counters() if self.algorithm.grows else Counters(expected_extra=0.0)
        self.pushed: int | None = None  # updates behind the weights that the engine has
        self.mixture: Tensor | None = None  # of calibrated fusion: what the batches so far say of the prior

    @property
    def done(self) -> bool:
        """Return whether all rollouts are spent."""
        return self.counters.rollouts >= self.config.rollouts

    def update(self) -> dict[str, Any]:
        """Sample rollouts, learn from them once, and return this update's metrics by name.

        Raises:
            Stopped: `stopped` became true before the rollouts were there; everything is as before the call.
        """
        self._push()
        sample, sampled = self.team.lead(self._sample)
        groups, prior = sample.groups, sample.prior
        rollouts = [rollout for group in sample.rollouts for rollout in group]
        batch = pack(rollouts, self.algorithm.aggregation, max_length=self.task.max_answer_length)
        advantages = self.algorithm.advantages(groups, prior, self.task.reward_range, self.mixture, batch.lengths)
        learnt = self.learner.learn(batch, advantages, self.counters.update) if rollouts else {}
        if self.prior is not None and self.ranks.leads:
            self.prior.observe(groups.prompts, groups.means, groups.counts)
        self._count(sample, conflicts := self._conflicts(sample))
        troubles = self.grader.take_troubles()
        whole = {"update": self.counters.update, "rollouts": self.counters.rollouts, "prompts": len(sample.prompts)}
        whole |= {"kept": sample.kept, "dropped": sample.dropped, "conflicts": conflicts}
        whole |= {"reward_failures": troubles.failures, "reward_timeouts": troubles.timeouts}
        expected = None if self.prior is None else prior
        return {**whole, **finite({**means_of(groups, expected, advantages), **learnt, **sampled})}

    def _push(self) -> None:
        """Give the engine the policy's weights unless it has them; all ranks call this."""
        if self.pushed == self.counters.update:
            return
        weights, self.pushed = self.learner.weights(), self.counters.update
        if self.sampler is not None:
            self.sampler.push(weights, self.counters.update)
        elif not self.streams:
            self.engine.update_weights(weights)

    def evaluate(self) -> HeldOut:
        """Return how many sampled held-out answers are right.

        Prompts, their order and the seeds are the same at every evaluation of every run; temperature is 1.
        """
        self._push()
        return self.team.lead(self._right)

    def _right(self) -> HeldOut:
        """Sample and judge the held-out answers with the engine's present weights."""
        generate = self.engine.generate if self.sampler is None else self.sampler.generate
        prompts = self.task.prompts(self.config.heldout_seed, 0, self.config.heldout_prompts, "heldout")
        tickets: list[list[int]] = []
        for start in range(0, len(prompts), 256):
            part = prompts[start : start + 256]
            answers = wrong_where_unanswered(
                generate,
                part,
                [self.config.heldout_samples] * len(part),
                seed=seed_of("heldout", self.config.heldout_seed, start),
                temperature=1.0,
                max_new_tokens=self.task.max_answer_length,
            )
            tickets += self._submit(part, answers)
        right = [row.count(self.task.reward_range[1]) for row in self._collect(tickets)]
        return HeldOut.of(right, self.config.heldout_samples)

    def _sample(self) -> tuple[Sample, dict[str, float]]:
        """Spend this update's rollouts; return the groups, and metrics."""
        left_in_run = self.config.rollouts - self.counters.rollouts
        if self.sampler is not None:
            return self.sampler.sample(self.counters.update, self.stopped, left_in_run)
        sample, round_number, position = Sample(), 0, self.counters.position
        target = min(self.config.rollouts_per_update, left_in_run)
        most = min(REPLACED * self.config.rollouts_per_update, left_in_run)
        while sample.kept < target and sample.spent < most:
            if round_number and self.stopped():
                self.counters.position = position
                raise Stopped
            budget = min(target - sample.kept, most - sample.spent)
            if round_number and self.algorithm.drop_equal and budget == 1:
                break  # a group of one has equal rewards
            more = self._planned_more(sample, budget)
            first = first_rollouts(budget - sum(more), self.algorithm.k_init, self.counters.expected_extra)
            self._start_prompts(sample, len(first))
            self._generate(sample, [*more, *first], round_number)
            if self.algorithm.drop_equal:
                sample.drop(equal_groups(sample.groups))
            round_number += 1
        return sample, {}

    def _start_prompts(self, sample: Sample, count: int) -> None:
        """Take `count` prompts off the stream, each with its expected reward."""
        first = self.counters.position
        prompts = self.task.prompts(self.config.seed, first, count)
        prior = (self.prior or Middle(self.task.reward_range)).predict(prompts)
        sample.start(prompts, range(first, first + count), prior)
        self.counters.position += count

    def _generate(self, sample: Sample, counts: list[int], round_number: int) -> None:
        """Generate `counts` rollouts and verify them."""
        rollouts = self.engine.generate(
            sample.prompts,
            counts,
            seed=seed_of("rollout", self.config.seed, self.counters.update, round_number),
            temperature=self.config.temperature,
            max_new_tokens=self.task.max_answer_length,
        )
        sample.add(rollouts, self._collect(self._submit(sample.prompts, rollouts)))

    def _submit(self, prompts: Sequence[str], rollouts: Sequence[Sequence[Rollout]]) -> list[list[int]]:
        """Ask for the rewards of every prompt's rollouts and return their tickets."""
        return [
            [self.grader.submit(prompt, rollout.text, rollout.finished) for rollout in row]
            for prompt, row in zip(prompts, rollouts, strict=True)
        ]

    def _collect(self, tickets: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the rewards of every prompt's tickets."""
        rewards = iter(self.grader.collect([ticket for row in tickets for ticket in row]))
        return [[next(rewards) for _ in row] for row in tickets]

    def _test(self, groups: Groups, prior: Tensor) -> Shrinkage:
        """Return what the shrinkage test says of every group."""
        return shrinkage(
            groups.rewards,
            groups.offsets,
            prior,
            reward_range=self.task.reward_range,
            cost=self.algorithm.cost_or(self.config.cost),
            k_init=self.algorithm.k_init,
            k_max=self.algorithm.k_max,
            fusion=self.algorithm.fusion,
            state=self.mixture,
        )

    def _planned_more(self, sample: Sample, budget: int) -> list[int]:
        """Return the rollouts that each group gets now, at most `budget` in all; the largest gains come first."""
        if not self.algorithm.grows or not sample.prompts:
            return [0] * len(sample.prompts)
        test = self._test(sample.groups, sample.prior)
        wanted = torch.where(test.roll_out_more, test.planned - test.count, 0)
        return share_out(wanted.tolist(), test.gain.tolist(), budget)

    def _conflicts(self, sample: Sample) -> int:
        """Return how many of the groups reject their prior after their first rollouts."""
        if self.prior is None or not sample.prompts:
            return 0
        first = [rewards[: self.algorithm.k_init] for rewards in sample.rewards]
        groups = Groups.from_lists(sample.prompts, sample.ids, first)
        return int((self._test(groups, sample.prior).deviation > 0).sum())

    def _count(self, sample: Sample, conflicts: int) -> None:
        """Add an update to the counters."""
        counters = self.counters
        counters.update += 1
        counters.rollouts += sample.spent
        counters.groups += len(sample.prompts)
        counters.kept += sample.kept
        counters.dropped += sample.dropped
        counters.conflicts += conflicts
        if self.prior is None or not sample.prompts:
            return
        test = self._test(sample.groups, sample.prior)
        extra = (torch.maximum(test.planned, test.count) - self.algorithm.k_init).clamp(min=0).float().mean()
        counters.expected_extra = 0.9 * counters.expected_extra + 0.1 * float(extra)
        self.mixture = test.state

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return the tensors by file and name, and the counters, from which `load_state` goes on bit for bit.

        Every random draw is a function of seed, update and round, so that the counters are the generators' state.
        """
        tensors = {
            **self.learner.state(),
            "prior": {} if self.prior is None else self.prior.state_dict(),
            "mixture": {} if self.mixture is None else {"state": self.mixture},
        }
        in_flight, tokens = ({}, {}) if self.sampler is None else self.sampler.state()
        return {**tensors, "in_flight": tokens}, {**asdict(self.counters), "in_flight": in_flight}

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], counters: Mapping[str, Any]) -> None:
        """Go on from a state that `state` returned."""
        self.learner.load_state(tensors)
        if self.prior is not None:
            self.prior.load_state_dict(tensors["prior"])
        self.mixture = tensors.get("mixture", {}).get("state")
        self.counters = Counters(**{name: value for name, value in counters.items() if name != "in_flight"})
        self.pushed = None
        self._push()
        if self.sampler is not None:
            self.sampler.load_state(counters["in_flight"], tensors["in_flight"], self.mixture)
