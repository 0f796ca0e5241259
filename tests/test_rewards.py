"""Verifiers, and the pool of processes that runs them: real hangs, crashes and exceptions."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from v05.errors import InputError
from v05.tasks.grading import InlineGrader, PoolGrader, Troubles
from v05.tasks.mathematics import last_boxed, same_answer
from v05.tasks.pool import PoolBroken, RewardPool
from v05.tasks.verifiers import make_verifier, needs_answer
from v05.tasks.worker import Answer, Verdict, judge

BEHAVE = "verifiers_for_tests:behave"
UNIT = (0.0, 1.0)


def test_exact_match_ignores_white_space_around_and_nothing_else() -> None:
    verifier = make_verifier("exact", (-1.0, 2.0))
    assert needs_answer(verifier)
    assert verifier("", " 12\n", {"answer": 12}) == 2.0
    assert verifier("", "12.", {"answer": "12"}) == -1.0


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        ("42", r"so the answer is \boxed{42}.", True),
        ("$42$", r"\boxed{42}", True),
        (r"\boxed{\frac{1}{2}}", r"first \boxed{1/3}, no: \boxed{0.5}", True),
        ("1/3", r"first \boxed{1/3}, no: \boxed{0.5}", False),
        ("025", r"\boxed{25}", True),
        ("x^2+1", r"\boxed{1+x^2}", True),
        (r"\{1,2\}", r"\boxed{\{2, 1\}}", True),
        (r"\text{Tuesday}", r"\boxed{\text{Tuesday}}", True),
        (r"\frac{\sqrt{3}}{2}", r"\boxed{\sqrt{\frac34}}", True),
        ("12", "The answer is 12.", True),
        ("12", "The answer is 13.", False),
        ("34", "First 12, then 17.\n\nAnswer: 34", True),
        ("34", "First 34, then 17.\n\nAnswer: $17$", False),
        ("12", r"\boxed{13}", False),
        ("12", r"\boxed{}", False),
        ("12", r"\boxed{\frac{", False),
        ("12", r"\boxed{\frac{1}{0}}", False),
        ("12", r"\boxed{\begin{matrix} & \\ \end{array}}", False),
        ("12", r"\boxed{" + "9" * 100_000 + "}", False),
        ("12", "9" * 100_000, False),
        ("12", "", False),
        ("12", "\x00\ud800 \\boxed{\udfff}", False),
        ("None", r"\boxed{12}", False),
        ("", r"\boxed{12}", False),
        ("12", r"\boxed{10^{10^{10}}}", False),
    ],
)
def test_mathematical_answers(answer: str, completion: str, right: bool) -> None:
    assert same_answer(answer, completion) is right


def test_how_far_an_answer_is_looked_for() -> None:
    """Boxes of 2,000 characters, and the last 4,000 of a text without one."""
    assert [same_answer("12", rf"\boxed{{12{' ' * spaces}}}") for spaces in (1998, 1999)] == [True, False]
    assert [same_answer("12", "It is 12." + " " * spaces) for spaces in (3990, 4000)] == [True, False]


def test_the_last_complete_box_is_the_answer() -> None:
    assert last_boxed(r"\boxed{a} \boxed{\frac{b}{c}} \boxed{d") == r"\frac{b}{c}"
    assert last_boxed("no box") is None
    assert last_boxed(r"\boxed{") is None
    assert last_boxed(r"} \boxed{a \boxed{b} {c") == "b"
    assert last_boxed(r"\boxed{a \boxed{b} c}") == "b"


def test_boxes_without_end_take_no_time() -> None:
    started = time.process_time()
    assert last_boxed(r"\boxed{1} " + r"\boxed{ " * 30_000) == "1"
    assert time.process_time() - started < 5


def test_verifiers_are_imported_by_path_or_file(tmp_path: Path) -> None:
    assert make_verifier(BEHAVE, UNIT)("", "0.5", {}) == 0.5
    assert not needs_answer(make_verifier(BEHAVE, UNIT))
    file = tmp_path / "mine.py"
    file.write_text("def score(prompt, completion, record):\n    return record['weight']\n")
    assert make_verifier(f"{file}:score", UNIT)("", "", {"weight": 0.25}) == 0.25
    file.write_text(
        "from __future__ import annotations\nimport dataclasses\n\n@dataclasses.dataclass\nclass Score:\n"
        "    value: dataclasses.InitVar[float] = 0.5\n\n    def __call__(self, prompt, completion, record):\n"
        "        return 0.5\n\nscore = Score()\n"
    )
    assert make_verifier(f"{file}:score", UNIT)("", "", {}) == 0.5
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    before = list(sys.path)
    for bad, message in (
        (f"{tmp_path}/script.py:score", "cannot be imported: SystemExit: 0"),
        ("nothing", "allowed: exact, math, package.module:function"),
        (":score", "allowed: exact"),
        ("v05.nowhere:score", "No module named"),
        ("verifiers_for_tests:missing", "has no attribute 'missing'"),
        ("verifiers_for_tests:not_callable", "is a int; allowed: a callable"),
        (f"{tmp_path}/other.py:score", "no file"),
    ):
        with pytest.raises(InputError, match=message):
            make_verifier(bad, UNIT)
    assert sys.path == before


def test_what_a_verifier_returns_is_checked() -> None:
    def returning(value: object) -> Verdict:
        return judge(lambda prompt, completion, record: value, Answer("", "", {}), (-1.0, 1.0))  # type: ignore[arg-type, return-value]

    assert returning(True) == Verdict(1.0)
    assert returning(-0.5) == Verdict(-0.5)
    for bad in (None, float("nan"), 1.5, "much", [1, 2]):
        verdict = returning(bad)
        assert (verdict.reward, verdict.problem) == (-1.0, "failure")
        assert "allowed: a number from -1 to 1 (--reward-range)" in verdict.reason


def test_rewards_in_float32_are_inside_the_range() -> None:
    for low, high in ((0.0, 0.1), (-0.7, 0.3), (0.1, 0.7)):
        for value in (low, high):
            for returned in (np.float32(value), torch.tensor(value)):
                verdict = judge(lambda *_, found=returned: found, Answer("", "", {}), (low, high))  # type: ignore[misc]
                assert verdict == Verdict(value)
    assert judge(lambda *_: 0.10001, Answer("", "", {}), (0.0, 0.1)).problem == "failure"


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
