"""Mathematical answers, compared by Math-Verify: numbers, expressions, sets, intervals, matrices."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from v05.errors import InputError

LONGEST: Final = 2000  # characters of a boxed answer; a longer one is wrong without being parsed
TAIL: Final = 4000  # characters at the end of a completion without a box that are searched for an answer
BRACES: Final = re.compile(r"\\boxed\{|[{}]")
SECONDS: Final = 3  # for one parse or one comparison; the pool's own limit catches what ignores this one


@dataclass(frozen=True)
class Mathematics:
    """The largest reward where the completion's last boxed answer equals the record's `answer`, else the smallest.

    A completion without a box is searched for a last expression or number. Whatever cannot be parsed is wrong.
    """

    reward_range: tuple[float, float] = (0.0, 1.0)
    needs_answer = True

    def __post_init__(self) -> None:
        """Raise InputError where Math-Verify is not installed."""
        math_verify()

    def __call__(self, prompt: str, completion: str, record: Mapping[str, Any]) -> float:
        """Return the reward of `completion`; it must run in a process's main thread, which gets the alarms."""
        return self.reward_range[same_answer(str(record["answer"]), completion)]


def same_answer(answer: str, completion: str) -> bool:
    """Return whether a completion gives an answer.

    Args:
        answer: LaTeX with or without dollars or a box, or a plain number or word.
        completion: text that should end in an answer in a box.

    Returns:
        Whether Math-Verify finds both equal; equal texts are equal without it.
    """
    parse, verify = math_verify()
    gold, given = last_boxed(answer), last_boxed(completion)
    gold = answer.strip().strip("$").strip() if gold is None else gold
    if given is not None and (len(given) > LONGEST or not given.strip()):
        return False
    if given is not None and given.strip() == gold:
        return True
    text = completion[-TAIL:] if given is None else boxed(given)
    found = parse(text, parsing_timeout=SECONDS)
    return bool(found) and bool(verify(parse(boxed(gold), parsing_timeout=SECONDS), found, timeout_seconds=SECONDS))


def boxed(text: str) -> str:
    """Return `text` in a box of LaTeX."""
    return f"\\boxed{{{text}}}"


def last_boxed(text: str) -> str | None:
    """Return what is inside the last complete `\\boxed{...}`, or None where there is none."""
    opened: list[int] = []  # for each brace that is open, where a box's content begins, or -1
    first, last = -1, -1
    for found in BRACES.finditer(text):  # once, since an answer may open boxes without end
        if found[0] != "}":
            opened.append(-1 if found[0] == "{" else found.end())
        elif (start := opened.pop() if opened else -1) > first:
            first, last = start, found.start()
    return text[first:last] if first >= 0 else None


def math_verify() -> tuple[Any, Any]:
    """Return Math-Verify's `parse` and `verify`, which report what they cannot do by their results.

    Raises:
        InputError: the package is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise InputError("math answers need Math-Verify; install v05[math]") from None
    return parse, verify
