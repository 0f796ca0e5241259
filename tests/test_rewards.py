"""The pool of processes that runs verifiers: real hangs, crashes and exceptions; and the graders before it."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from v05.errors import InputError
from v05.tasks.grading import InlineGrader, PoolGrader, Troubles
from v05.tasks.pool import PoolBroken, RewardPool
from v05.tasks.worker import Verdict

BEHAVE = "verifiers_for_tests:behave"
UNIT = (0.0, 1.0)


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(BEHAVE, UNIT, workers=2, timeout=1.5) as shared:
        yield shared


def submit(pool: RewardPool, completions: list[str]) -> list[int]:
    return [pool.submit("p", completion, {"answer": "a"}) for completion in completions]


def test_verdicts_come_in_the_order_asked_for(pool: RewardPool) -> None:
    tickets = submit(pool, [str(number / 100) for number in range(101)])
    assert [verdict.reward for verdict in pool.collect(tickets[::-1])] == [number / 100 for number in range(101)][::-1]
    assert pool.collect([]) == []
    with pytest.raises(KeyError):
        pool.collect(tickets[:1])


def test_hangs_crashes_and_exceptions_cost_the_smallest_reward_and_nothing_else(
    pool: RewardPool, tmp_path: Path
) -> None:
    asked = ["0.5", "hang", "0.25", "crash", "raise", "spin", "exit", "none", "7", f"crash_once {tmp_path}/x", "1"]
    verdicts = pool.collect(submit(pool, asked))
    assert [verdict.reward for verdict in verdicts] == [0.5, 0, 0.25, 0, 0, 0, 0, 0, 0, 0.75, 1]
    problems = dict(zip(asked, (verdict.problem for verdict in verdicts), strict=True))
    assert {name for name, problem in problems.items() if problem == "timeout"} == {"hang", "spin"}
    assert {name for name, problem in problems.items() if problem == "failure"} == {
        *("crash", "raise", "exit", "none", "7")
    }
    reasons = dict(zip(asked, (verdict.reason for verdict in verdicts), strict=True))
    assert reasons["crash"] == "the process ended with status 3"
    assert reasons["raise"] == "KeyError: 'nothing here'"
    assert reasons["hang"] == "no answer in 1.5 s"


def test_what_a_hung_verifier_has_started_is_stopped_with_it(pool: RewardPool, tmp_path: Path) -> None:
    [verdict] = pool.collect(submit(pool, [f"child {tmp_path}/pid"]))
    assert verdict.problem == "timeout"
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    deadline = time.monotonic() + 30
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the child lives on"
        os.sched_yield()


def test_a_process_that_a_verifier_forks_judges_nothing(pool: RewardPool) -> None:
    asked = ["fork", "0.25", "fork", "0.75", *[str(number / 20) for number in range(20)]]
    verdicts = pool.collect(submit(pool, asked))
    assert verdicts == [Verdict(0.5 if text == "fork" else float(text)) for text in asked]


def test_graders_hand_over_rewards_in_order_and_count_what_went_wrong(caplog: pytest.LogCaptureFixture) -> None:
    inline = InlineGrader(lambda prompt, text: float(text), 0.0)
    tickets = [inline.submit("p", "0.5", True), inline.submit("p", "0.75", False), inline.submit("p", "0.25", True)]
    assert all(map(inline.ready, tickets))
    assert inline.collect(tickets[::-1]) == [0.25, 0.0, 0.5]
    assert inline.take_troubles() == Troubles()
    pooled = PoolGrader(RewardPool(BEHAVE, (-1.0, 1.0), workers=1, timeout=1.0), lambda prompt: {"answer": prompt})
    tickets = [pooled.submit("p", text, done) for text, done in (("0.5", True), ("1", False), ("raise", True))]
    assert pooled.ready(tickets[1])
    assert pooled.collect(tickets) == [0.5, -1.0, -1.0]
    assert pooled.collect([pooled.submit("p", "hang", True)]) == [-1.0]
    assert pooled.take_troubles() == Troubles(1, 1, "no answer in 1 s")
    assert pooled.take_troubles() == Troubles()
    assert [record.getMessage().split(";")[1] for record in caplog.records] == [
        " last: KeyError: 'nothing here'",
        " last: no answer in 1 s",
    ]
    pooled.close()


@pytest.mark.parametrize("given", [0, 1])
def test_a_verifier_that_gives_no_reward_at_all_ends_the_run(given: int) -> None:
    pooled = PoolGrader(RewardPool(BEHAVE, UNIT, workers=1), lambda prompt: {"answer": prompt})
    asked = ["0.5"] * given + ["raise"] * 63
    assert pooled.collect([pooled.submit("p", text, True) for text in asked]) == [0.5] * given + [0.0] * 63
    last = [pooled.submit("p", "raise", True)]
    if given:
        assert pooled.collect(last) == [0.0]
    else:
        with pytest.raises(InputError, match="gave no reward for any of its first 64 answers; last: KeyError: 'noth"):
            pooled.collect(last)
    pooled.close()


def test_a_verifier_that_wants_all_memory_fails_alone(pool: RewardPool) -> None:
    verdicts = pool.collect(submit(pool, ["memory", "0.5"]))
    assert verdicts[0].problem == "failure"
    assert verdicts[0].reason.startswith("MemoryError")
    assert verdicts[1] == Verdict(0.5)


def test_a_record_that_cannot_be_sent_fails_alone(pool: RewardPool) -> None:
    tickets = [pool.submit("", "1", {"answer": lambda: 0}), pool.submit("", "1", {})]
    first, second = pool.collect(tickets)
    assert (first.reward, first.problem, second) == (0.0, "failure", Verdict(1.0))
    assert first.reason.startswith("record cannot be sent")


def test_answers_are_judged_while_nobody_waits(pool: RewardPool) -> None:
    first, second = submit(pool, ["0.5", "0.25"])
    pool.collect([second])
    while not pool.done(first):
        os.sched_yield()
    assert pool.collect([first]) == [Verdict(0.5)]


def test_collecting_looks_at_every_ticket_a_few_times_whatever_comes_first(pool: RewardPool) -> None:
    class Counting(dict[int, Verdict]):
        looks = 0

        def __contains__(self, ticket: object) -> bool:
            self.looks += 1
            return super().__contains__(ticket)

    pool._verdicts = verdicts = Counting()
    assert pool.collect(submit(pool, ["0.5"] * 400)) == [Verdict(0.5)] * 400
    assert verdicts.looks <= 3 * 400


def test_a_pool_without_workers_takes_any_number_of_answers(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def score(prompt, completion, record):\n    return 1.0\n")
    broken = RewardPool(f"{file}:score", UNIT, workers=1)
    file.write_text("raise RuntimeError('out of order')\n")
    with pytest.raises(PoolBroken):
        broken.collect([broken.submit("", "", {})])
    many = threading.Thread(target=lambda: [broken.submit("", "", {}) for _ in range(20_000)], daemon=True)
    many.start()
    many.join(60)
    assert not many.is_alive()
    broken.close()


def test_a_verifier_that_closes_the_connection_and_goes_on_fails_alone(pool: RewardPool) -> None:
    started = time.monotonic()
    first, second = pool.collect(submit(pool, ["close", "0.5"]))
    assert (first.reward, first.problem, second) == (0.0, "failure", Verdict(0.5))
    assert "closed its connection" in first.reason
    assert time.monotonic() - started < 60


def test_a_pool_whose_workers_cannot_start_says_why(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def score(prompt, completion, record):\n    return 1.0\n")
    with RewardPool(f"{file}:score", UNIT, workers=1) as broken:
        file.write_text("raise RuntimeError('out of order')\n")
        ticket = broken.submit("", "", {})
        with pytest.raises(PoolBroken, match="out of order"):
            broken.collect([ticket])


def test_a_closed_pool_leaves_no_process(tmp_path: Path) -> None:
    pool = RewardPool(BEHAVE, (0.0, 1e9), workers=1)
    [verdict] = pool.collect(submit(pool, ["process id"]))
    pool.close()
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(verdict.reward), 0)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("", "", {})
    with pytest.raises(RuntimeError, match="closed"):
        pool.collect([])


def test_bad_settings_are_refused() -> None:
    for wrong in ((1.0, 0.0), (0.0, float("inf"))):
        with pytest.raises(ValueError, match="reward_range is"):
            RewardPool("exact", wrong)
    with pytest.raises(ValueError, match="workers is 0"):
        RewardPool("exact", workers=0)
    with pytest.raises(ValueError, match="timeout is 0"):
        RewardPool("exact", timeout=0)
    with pytest.raises(InputError, match="verifier is 'wrong'"):
        RewardPool("wrong")
