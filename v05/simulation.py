"""How long generation takes, and what it buys: the real scheduler over a simulated engine, mode by mode."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch
from torch import Tensor

from v05.checks import FROM_ONE, FROM_ZERO, check, check_each
from v05.kernels import shrinkage
from v05.rollout.budget import BudgetRule, Fixed, LookAhead, ReinforceAda, Utility, Variance
from v05.rollout.limits import Limits, Mode
from v05.rollout.scheduler import Scheduler
from v05.rollout.simulated import LONGEST, LogNormal, SimulatedEngine
from v05.rollout.step import Step
from v05.seeds import seed_of
from v05.tasks.grading import InlineGrader

RANGE: Final = (-1.0, 1.0)
SHAPE: Final = 0.5  # success probabilities of prompts are drawn from Beta(SHAPE, SHAPE)
STEPS_PER_TOKEN: Final = 64  # so that millions of tokens fit in memory


@dataclass(frozen=True)
class Simulation:
    """What is simulated.

    Attributes:
        prompts: of a step.
        slots: answers that the engine decodes at once.
        steps: learnt from, one after the other; learning takes no time.
        window: steps in flight at most where rollouts stream.
        prior_sd: standard deviation of the prior's error, on rewards of -1 and 1.
        seed: of prompts, answers and errors.
        length: decode steps of an answer, drawn.
    """

    prompts: int = 512
    slots: int = 1024
    steps: int = 8
    window: int = 6
    prior_sd: float = 0.3
    seed: int = 0
    length: Callable[[random.Random], int] = field(default_factory=LogNormal)

    def __post_init__(self) -> None:
        """Raise InputError naming the first number that is not allowed."""
        check_each(self, ("prompts", "slots", "steps", "window"), FROM_ONE)
        check("prior_sd", self.prior_sd, *FROM_ZERO)

    def success(self, prompt: str) -> float:
        """Return the success probability of a prompt, whose text is its position."""
        return random.Random(seed_of("success", self.seed, prompt)).betavariate(SHAPE, SHAPE)

    def source(self, first: int, count: int) -> tuple[list[str], Tensor]:
        """Return prompts and their expected rewards: the truth with noise, inside the range."""
        prompts = [str(first + row) for row in range(count)]
        errors = [self.prior_sd * random.Random(seed_of("prior", self.seed, prompt)).gauss(0, 1) for prompt in prompts]
        expected = [2 * self.success(prompt) - 1 + error for prompt, error in zip(prompts, errors, strict=True)]
        return prompts, torch.tensor(expected).clamp(*RANGE)


class Contender(NamedTuple):
    """A way to give out rollouts: who gets how many, and who waits for whom."""

    name: str
    mode: Mode
    rule: BudgetRule


class Result(NamedTuple):
    """What a contender did, by step where not said otherwise.

    Attributes:
        name: of the contender.
        mode: of the scheduler.
        rollouts: per prompt.
        tokens: of the step's rollouts.
        time: in decode steps, from the start to the end of the last step, per step.
        over_ideal: the time over what all tokens decoded meanwhile, for later steps too, take with every slot busy.
        busy: share of the slots' time that was used between the ends of the first and of the last step.
        error_mean: mean squared error of the group mean against the truth; of -1 and 1.
        error_v05: of V0.5's fused baseline.
        error_calibrated: of the calibrated one.
        stale: updates that rollouts were behind, mean.
        stalest: at most.
    """

    name: str
    mode: str
    rollouts: float
    tokens: float
    time: float
    over_ideal: float
    busy: float
    error_mean: float
    error_v05: float
    error_calibrated: float
    stale: float
    stalest: int


def growing() -> list[Contender]:
    """Return V0.5's look-ahead, from 4 to 16 rollouts, in every mode."""
    modes: tuple[Mode, ...] = ("barrier", "async", "planned", "stream")
    return [Contender("look-ahead", mode, LookAhead(reward_range=RANGE)) for mode in modes]


def fixed() -> list[Contender]:
    """Return groups of fixed size, a step at a time and streaming."""
    modes: tuple[Mode, ...] = ("planned", "stream")
    return [Contender(f"fixed {size}", mode, Fixed(size, RANGE)) for mode in modes for size in (4, 8, 16)]


def rivals(rollouts: float) -> list[Contender]:
    """Return other rules with the same rollouts per prompt, streaming; what wants more is capped there."""
    return [
        Contender("utility", "stream", Utility(rollouts, RANGE)),
        Contender("variance", "stream", Variance(rollouts, RANGE)),
        Contender("reinforce-ada", "stream", ReinforceAda(4, 16, RANGE)),
        Contender("its positive", "stream", ReinforceAda(4, 16, RANGE, positive=True)),
    ]


def run(simulation: Simulation, contender: Contender, rollouts: float | None = None) -> Result:
    """Simulate one contender.

    Args:
        simulation: the settings.
        contender: who gets how many, and who waits for whom.
        rollouts: cap per prompt and step, on average; None for none.
    """
    engine = SimulatedEngine(simulation.slots, simulation.success, simulation.length, STEPS_PER_TOKEN)
    limits = Limits(
        simulation.prompts,
        contender.mode,
        simulation.window,
        rollouts=None if rollouts is None else round(rollouts * simulation.prompts),
        max_new_tokens=LONGEST,
        seconds=float("inf"),
        poll=float("inf"),
    )
    grader = InlineGrader(lambda prompt, text: RANGE[int(text)], RANGE[0])
    scheduler = Scheduler(engine, simulation.source, grader, contender.rule, limits, simulation.seed, engine.clock)
    steps, ends, stale = [], [], list[int]()
    for number in range(simulation.steps):
        step = scheduler.next_step()
        assert step is not None
        steps.append(step)
        ends.append((engine.now, engine.busy))
        stale += step.staleness(number)
        scheduler.push({}, number + 1)
    return _result(simulation, contender, steps, ends, stale)


def _result(
    simulation: Simulation,
    contender: Contender,
    steps: Sequence[Step],
    ends: Sequence[tuple[float, float]],
    stale: Sequence[int],
) -> Result:
    errors = torch.tensor([_errors(simulation, step) for step in steps], dtype=torch.float64).mean(0).tolist()
    first, last = ends[0] if len(ends) > 1 else (0.0, 0.0), ends[-1]
    given = sum(int(step.outcome.counts.sum()) for step in steps)
    return Result(
        contender.name,
        contender.mode,
        given / (simulation.prompts * simulation.steps),
        sum(step.tokens for step in steps) * STEPS_PER_TOKEN / simulation.steps,
        last[0] / simulation.steps,
        last[0] * simulation.slots / last[1],
        (last[1] - first[1]) / ((last[0] - first[0]) * simulation.slots),
        errors[0],
        errors[1],
        errors[2],
        sum(stale) / max(1, len(stale)),
        max(stale, default=0),
    )


def _errors(simulation: Simulation, step: Step) -> tuple[float, float, float]:
    """Return the mean squared error of group mean, V0.5's and the calibrated baseline."""
    groups, truth = step.outcome, torch.tensor([2 * simulation.success(group.prompt) - 1 for group in step.groups])
    plain = shrinkage(groups.rewards, groups.offsets, step.prior, reward_range=RANGE)
    calibrated = shrinkage(groups.rewards, groups.offsets, step.prior, reward_range=RANGE, fusion="calibrated")
    found = (groups.means, plain.baseline, calibrated.baseline)
    return tuple(float((baseline - truth).square().mean()) for baseline in found)  # type: ignore[return-value]


def compare(simulation: Simulation) -> Iterator[Result]:
    """Yield the result of every contender; rivals get as many rollouts as the streaming look-ahead took."""
    taken = 0.0
    for contender in growing():
        result = run(simulation, contender)
        taken = result.rollouts
        yield result
    for contender in fixed():
        yield run(simulation, contender)
    for contender in rivals(taken):
        yield run(simulation, contender, taken)


def contenders() -> int:
    """Return how many results `compare` yields."""
    return len(growing()) + len(fixed()) + len(rivals(4.0))
