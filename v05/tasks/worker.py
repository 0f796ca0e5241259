"""A process that judges answers, one after the other, and knows nothing else."""

import logging
import math
import os
import resource
import signal
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, Final, Literal, NamedTuple

from v05.tasks.verifiers import Verifier, make_verifier

ROUNDING: Final = 2.0**-22  # of a number in float32: a verifier's 0.1 may be a little more, its 0.7 a little less


class Verdict(NamedTuple):
    """What a verifier made of an answer.

    Attributes:
        reward: in the task's range; the smallest where the verifier did not give one.
        problem: why it did not: `failure` for an exception, a reward that is not allowed or a crash; `timeout`.
        reason: the same in words.
    """

    reward: float
    problem: Literal["", "failure", "timeout"] = ""
    reason: str = ""


class Answer(NamedTuple):
    """What a verifier is given."""

    prompt: str
    completion: str
    record: Mapping[str, Any]


def judge(verifier: Verifier, answer: Answer, reward_range: tuple[float, float]) -> Verdict:
    """Return the verdict on one answer, whatever the verifier raises or returns."""
    low, high = reward_range
    try:
        returned = verifier(*answer)
    except BaseException as error:  # SystemExit and Math-Verify's own timeout are no Exceptions
        return Verdict(low, "failure", f"{type(error).__name__}: {error}"[:500])
    try:
        reward = float(returned)
    except Exception:
        reward = math.nan
    rounding = ROUNDING * max(abs(low), abs(high))
    for edge in reward_range:
        if abs(reward - edge) <= rounding:
            return Verdict(edge)
    if not low <= reward <= high:
        allowed = f"a number from {low:g} to {high:g} (--reward-range)"
        return Verdict(low, "failure", f"returned {returned!r:.80}; allowed: {allowed}")
    return Verdict(reward)


def serve(connection: Connection, name: str, reward_range: tuple[float, float], memory: int) -> None:
    """Judge answers from `connection` until it closes.

    A session of its own keeps the terminal's Ctrl-C away and lets the pool kill whatever the verifier started.

    Args:
        connection: answers come in; first `(True, "")` goes out, or `(False, reason)` where there is no verifier; then
            one verdict an answer.
        name: of the verifier.
        reward_range: smallest and largest reward.
        memory: bytes of address space that judging may add to what the process has at its start.
    """
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs what it cannot parse, whole
    try:
        verifier = make_verifier(name, reward_range)
    except Exception as error:
        connection.send((False, str(error)))
        return
    limit_memory(memory)
    own = os.getpid()
    connection.send((True, ""))
    while True:
        try:
            answer = connection.recv()
        except EOFError:
            return
        verdict = judge(verifier, answer, reward_range)
        if os.getpid() != own:  # forked by the verifier, which thought that an exit ends it
            os._exit(0)
        connection.send(verdict)


def limit_memory(more: int) -> None:
    """Let this process allocate at most `more` further bytes, where the system says how many it has."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            now = int(stream.read().split()[0]) * resource.getpagesize()
    except OSError:
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = now + more if hard == resource.RLIM_INFINITY else min(now + more, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
