"""Verifiers: exact match, mathematics, those of the user, and what is made of what they return."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from v05.errors import InputError
from v05.tasks.mathematics import last_boxed, same_answer
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
