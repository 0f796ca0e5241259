"""The study of training: every algorithm with the learning rate of one sweep, several seeds, one table."""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch

from v05.errors import InputError
from v05.stop import Interrupted, StopRequest
from v05.studies.training_report import Trained
from v05.training.algorithms import parse_algorithm
from v05.training.compare import read_curve
from v05.training.config import TrainConfig
from v05.training.metrics import read_metrics
from v05.training.run import make_trainer, train_run
from v05.training.run_folder import read_summary

RATES: Final = (1e-4, 2e-4, 4e-4, 8e-4)
TUNING_SEED: Final = 100  # seeds of the sweep start here, and so does its choice of held-out prompts


@dataclass(frozen=True)
class TrainStudy:
    """What is compared.

    Attributes:
        algorithms: as `parse_algorithm` takes them, without a learning rate.
        rates: learning rates of the sweep, the same for every algorithm.
        tuning_seeds: runs of each rate, with seeds and held-out prompts that the study does not use.
        seeds: runs of each algorithm, at its best rate.
        config: everything else; its algorithm, seed and learning rate are replaced.
    """

    algorithms: tuple[str, ...]
    rates: tuple[float, ...] = RATES
    tuning_seeds: int = 2
    seeds: int = 5
    config: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        """Raise InputError for names and numbers that cannot be studied."""
        for what, values in (("algorithms", self.algorithms), ("rates", self.rates)):
            if not values or len(set(values)) != len(values):
                raise InputError(f"{what} are {', '.join(map(str, values))}; allowed: one or more, all different")
        for name in self.algorithms:
            if parse_algorithm(name).learning_rate is not None:
                raise InputError(f"algorithm is {name!r}; allowed: no learning rate, the sweep chooses it")
        if any(not 0 < rate < float("inf") for rate in self.rates):
            raise InputError(f"rates are {self.rates}; allowed: above 0 and finite")
        if self.tuning_seeds < 1 or not 1 <= self.seeds <= TUNING_SEED:
            raise InputError(
                f"tuning seeds are {self.tuning_seeds}, seeds {self.seeds}; allowed: 1 or more, and 1 to {TUNING_SEED}"
            )
        if self.config.heldout_seed == TUNING_SEED:
            raise InputError(f"heldout_seed is {TUNING_SEED}, which the sweep uses; allowed: another one")


class Run(NamedTuple):
    """One training run of a study: its settings, and its folder below the study's."""

    config: TrainConfig
    folder: str


def tuning_runs(study: TrainStudy) -> list[Run]:
    """Return the runs of the sweep, seed by seed."""
    seeds = range(TUNING_SEED, TUNING_SEED + study.tuning_seeds)
    return [
        _run(study, name, rate, seed, "tuning", heldout_seed=TUNING_SEED)
        for seed in seeds
        for name in study.algorithms
        for rate in study.rates
    ]


def final_runs(study: TrainStudy, chosen: dict[str, float]) -> list[Run]:
    """Return the runs that the study is about, at the learning rate chosen for each algorithm, seed by seed."""
    heldout = study.config.heldout_seed
    return [
        _run(study, name, chosen[name], seed, "runs", heldout_seed=heldout)
        for seed in range(study.seeds)
        for name in study.algorithms
    ]


def _run(study: TrainStudy, name: str, rate: float, seed: int, room: str, heldout_seed: int) -> Run:
    config = dataclasses.replace(study.config, algorithm=name, learning_rate=rate, seed=seed, heldout_seed=heldout_seed)
    return Run(config, f"{room}/{name.replace(':', '_')}-{rate:g}-seed{seed}")


def choose_rates(study: TrainStudy, folder: Path) -> dict[str, dict[float, float]]:
    """Return the score of every learning rate of each algorithm: held-out accuracy over the last quarter of a run."""
    scores: dict[str, dict[float, float]] = {}
    for name in study.algorithms:
        runs = [run for run in tuning_runs(study) if run.config.algorithm == name]
        for rate in study.rates:
            folders = [folder / run.folder for run in runs if run.config.learning_rate == rate]
            curve = read_curve(name, folders, study.config)
            last = max(1, len(curve.rollouts) // 4)
            scores.setdefault(name, {})[rate] = float(curve.accuracy[:, -last:].mean())
    return scores


def best_rates(scores: dict[str, dict[float, float]]) -> dict[str, float]:
    """Return the learning rate with the highest score for each algorithm."""
    return {name: max(of_rates, key=lambda rate: of_rates[rate]) for name, of_rates in scores.items()}


def trained_of(study: TrainStudy, folder: Path, chosen: dict[str, float]) -> list[Trained]:
    """Return what the final runs of every algorithm did."""
    found = []
    for name in study.algorithms:
        folders = [folder / run.folder for run in final_runs(study, chosen) if run.config.algorithm == name]
        curve = read_curve(name, folders, study.config)
        lines = [read_metrics(each, "times.jsonl") for each in folders]
        seconds = [
            np.interp(curve.rollouts, [line["rollouts"] for line in run], [line["seconds"] for line in run])
            for run in lines
        ]
        sizes = [read_summary(each)["rollouts_per_prompt"] for each in folders]
        found.append(Trained(curve, np.stack(seconds), chosen[name], float(np.mean(sizes))))
    return found


def carry_out(
    runs: Sequence[Run], folder: Path, workers: int, stop: StopRequest, on_done: Callable[[int, int], None]
) -> None:
    """Train what is not finished in `folder`, several runs at once, each on one thread.

    Args:
        runs: in order.
        folder: of the study; every run is resumed from its own checkpoint.
        workers: processes, 1 or more; one is the present process.
        stop: looked at after every update, or every second where there are several processes.
        on_done: called with the number of finished runs and of all.

    Raises:
        Interrupted: a stop was asked for; everything is saved.
    """
    waiting = [run for run in runs if not (folder / run.folder / "summary.json").exists()]
    done = len(runs) - len(waiting)
    on_done(done, len(runs))
    if not waiting:
        return
    make_trainer(waiting[0].config, folder / "warm_start", stop, lambda *_: None)  # all runs share its warm start
    if workers == 1:
        with one_thread():
            for number, run in enumerate(waiting, done + 1):
                train_run(run.config, folder / run.folder, folder / "warm_start", stop, lambda *_: None, resume=True)
                on_done(number, len(runs))
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_start_worker) as pool:
        upcoming, running = iter(waiting), set[Future[bool]]()
        while True:
            # No more than can run: what a pool holds in reserve could not be taken back.
            for run in islice(upcoming, workers - len(running)) if not stop.requested else ():
                running.add(pool.submit(_train, run.config, folder / run.folder, folder / "warm_start"))
            if not running:
                break
            finished, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            try:
                done += sum(future.result() for future in finished)
            except BrokenProcessPool:
                if stop.requested:  # a worker was stopped before its first run
                    break
                raise
            on_done(done, len(runs))
            for worker in multiprocessing.active_children() if stop.requested else ():
                worker.terminate()
    if done < len(runs):
        raise Interrupted(f"saved in {folder} after {done:,} of {len(runs):,} runs")


def _start_worker() -> None:
    """Compute on one thread; signals count inside a run alone, which then saves and ends."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, so that runs are the same whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(config: TrainConfig, folder: Path, cache: Path) -> bool:
    """Return whether the run was finished; a stopped one is saved."""
    with StopRequest() as stop:
        try:
            train_run(config, folder, cache, stop, lambda *_: None, resume=True)
        except Interrupted:
            return False
    return True
