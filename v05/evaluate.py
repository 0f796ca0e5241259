"""Samples of a model at the problems of a data set, judged, line for line, in a folder that goes on after a stop."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from v05.checks import FROM_ONE, POSITIVE, check, check_each
from v05.errors import InputError
from v05.estimates import Estimate, over_prompts, pass_at_k, powers
from v05.files import finite, write_json
from v05.results_folder import ResultsFolder
from v05.rollout.engine import Engine, Rollout, Unanswered
from v05.seeds import seed_of
from v05.stop import Interrupted, StopRequest
from v05.tasks.data import digest
from v05.tasks.pool import RewardPool
from v05.tasks.worker import Verdict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        samples: answers to each problem.
        temperature: divides the logits, above 0.
        max_new_tokens: limit of an answer's tokens, end token included; an answer that reaches it without an end is
            wrong, as in training.
        seed: fixes the samples.
        batch: problems that the engine gets at once; the samples depend on it.
    """

    samples: int = 16
    temperature: float = 1.0
    max_new_tokens: int = 4096
    seed: int = 0
    batch: int = 8

    def __post_init__(self) -> None:
        """Raise InputError naming the first setting that is not allowed."""
        check_each(self, ("samples", "max_new_tokens", "batch"), FROM_ONE)
        check("temperature", self.temperature, *POSITIVE)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        problems: how many.
        samples: answers to each.
        mean: mean reward over all answers, `mean@n`.
        passed: `pass@k` by k: the chance that at least one of k answers gets the largest reward.
        unfinished: share of answers cut off at the limit.
        tokens: mean length of an answer.
        failures, timeouts: answers that the verifier gave no reward for.
        right: answers with the largest reward, by problem.
    """

    problems: int
    samples: int
    mean: Estimate
    passed: dict[int, Estimate]
    unfinished: float
    tokens: float
    failures: int
    timeouts: int
    right: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        intervals = {f"pass@{k}": list(estimate) for k, estimate in self.passed.items()}
        rest = {name: value for name, value in asdict(self).items() if name not in ("mean", "passed", "right")}
        values = finite({f"mean@{self.samples}": list(self.mean), **intervals})
        return {**rest, **values, "interval": "95 %, percentile bootstrap over problems"}


def evaluate(
    engine: Engine,
    records: Sequence[Mapping[str, Any]],
    pool: RewardPool,
    sampling: Sampling,
    folder: Path,
    settings: Mapping[str, Any],
    stop: StopRequest,
    on_problems: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Sample and judge answers to all problems that the folder has no result for, and sum up all of them.

    While the pool judges one batch, the engine generates the next.

    Args:
        engine: has the model's weights.
        records: problems, see `v05.tasks.data.read_data`.
        pool: judges answers.
        sampling: how answers are sampled.
        folder: gets `settings.json`, `results.jsonl` and `summary.json`; made where missing.
        settings: what the results depend on beside the problems and the sampling: model, data, verifier.
        stop: looked at after every batch.
        on_problems: told how many problems are done, of how many.

    Returns:
        The summary.

    Raises:
        Interrupted: a stop was asked for; all problems that were finished are written.
        InputError: the folder has results with other settings; or the engine could not answer some problems, and all
            others are written.
    """
    identity = {**settings, **asdict(sampling), "problems": digest(records), "reward_range": list(pool.reward_range)}
    results = ResultsFolder(folder, identity, ["problem"], on_disk=["prompt", "completions"])
    starts = range(0, len(records), sampling.batch)
    todo = [list(range(start, min(start + sampling.batch, len(records)))) for start in starts]
    todo = [batch for batch in todo if not all(results.has(problem=number) for number in batch)]
    on_problems(len(results.results), len(records))
    judged: tuple[list[int], list[list[Rollout]], list[int]] | None = None
    missing: list[str] = []
    for batch in [*todo, None]:
        answered = None
        try:
            if batch is not None and not stop.requested:
                answered = _generate(engine, records, batch, sampling, missing)
        finally:  # whatever becomes of this batch, the one before it is kept
            if judged is not None:
                _write(results, records, *judged, pool)
                on_problems(len(results.results), len(records))
        if answered is None:
            break
        judged = *answered, _submit(pool, records, *answered)
    if len(results.results) < len(records):
        kept = f"{len(results.results)} of {len(records)} problems are in {folder}"
        if missing and not stop.requested:
            raise InputError(f"{kept}; {missing[0]}; the same command asks again for what is missing")
        raise Interrupted(kept)
    evaluation = summarise(list(results.results.values()), pool.reward_range)
    write_json(folder / "summary.json", evaluation.to_dict())
    return evaluation


def summarise(rows: Sequence[Mapping[str, Any]], reward_range: tuple[float, float]) -> Evaluation:
    """Return what the lines of `results.jsonl` come to; every one has the same number of answers."""
    samples = len(rows[0]["rewards"])
    right = [sum(reward == reward_range[1] for reward in row["rewards"]) for row in rows]
    answers = len(rows) * samples
    return Evaluation(
        problems=len(rows),
        samples=samples,
        mean=over_prompts([sum(row["rewards"]) / samples for row in rows]),
        passed={k: over_prompts([pass_at_k(samples, count, k) for count in right]) for k in powers(samples)},
        unfinished=sum(not finished for row in rows for finished in row["finished"]) / answers,
        tokens=sum(sum(row["tokens"]) for row in rows) / answers,
        failures=sum(row["failures"] for row in rows),
        timeouts=sum(row["timeouts"] for row in rows),
        right=tuple(right),
    )


def _generate(
    engine: Engine, records: Sequence[Mapping[str, Any]], batch: Sequence[int], sampling: Sampling, missing: list[str]
) -> tuple[list[int], list[list[Rollout]]]:
    """Return the problems of a batch that have all their answers, and these; `missing` gets why others have not."""
    rows: Sequence[Sequence[Rollout | None]]
    try:
        rows = engine.generate(
            [records[number]["prompt"] for number in batch],
            [sampling.samples] * len(batch),
            seed=seed_of("evaluate", sampling.seed, batch[0]),
            temperature=sampling.temperature,
            max_new_tokens=sampling.max_new_tokens,
        )
    except Unanswered as error:
        rows = error.rows
        missing += error.reasons
        for reason in error.reasons:
            logger.warning("%s; its problem is left out", reason)
    answers = [[rollout for rollout in row if rollout is not None] for row in rows]
    whole = [place for place, row in enumerate(answers) if len(row) == sampling.samples]
    return [batch[place] for place in whole], [answers[place] for place in whole]


def _submit(
    pool: RewardPool, records: Sequence[Mapping[str, Any]], batch: Sequence[int], answers: Sequence[Sequence[Rollout]]
) -> list[int]:
    """Return the tickets of all finished answers."""
    return [
        pool.submit(records[number]["prompt"], rollout.text, records[number])
        for number, row in zip(batch, answers, strict=True)
        for rollout in row
        if rollout.finished
    ]


def _write(
    results: ResultsFolder,
    records: Sequence[Mapping[str, Any]],
    batch: Sequence[int],
    answers: Sequence[Sequence[Rollout]],
    tickets: Sequence[int],
    pool: RewardPool,
) -> None:
    """Wait for the verdicts on a batch and append the problems that are not there yet."""
    found = iter(pool.collect(tickets))
    low = pool.reward_range[0]
    for number, row in zip(batch, answers, strict=True):
        verdicts = [next(found) if rollout.finished else Verdict(low) for rollout in row]
        if results.has(problem=number):
            continue
        line = {
            "problem": number,
            "prompt": records[number]["prompt"],
            "answer": records[number].get("answer"),
            "rewards": [verdict.reward for verdict in verdicts],
            "failures": sum(verdict.problem == "failure" for verdict in verdicts),
            "timeouts": sum(verdict.problem == "timeout" for verdict in verdicts),
            "finished": [rollout.finished for rollout in row],
            "tokens": [len(rollout.token_ids) for rollout in row],
            "completions": [rollout.text for rollout in row],
        }
        results.add(line)
