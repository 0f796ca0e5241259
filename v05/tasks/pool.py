"""Rewards from processes of their own: they overlap generation, and a verifier that hangs or crashes stops nothing."""

import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Final

from v05.tasks.verifiers import make_verifier
from v05.tasks.worker import Answer, Verdict, serve

START_SECONDS: Final = 300.0  # for a worker to import its verifier
ENDING_SECONDS: Final = 1.0  # for a process to end whose connection is closed
STARTS: Final = 3  # workers that may fail to start, one after the other, before the pool gives up
TRIES: Final = 2  # an answer whose worker died is judged once more: something else may have killed it
MEMORY: Final = 4 * 2**30  # bytes that a worker may add to what it starts with


class PoolBroken(RuntimeError):
    """No worker can be started; the message has the last one's reason."""


class Worker:
    """One process of the pool, as the pool sees it."""

    def __init__(self, verifier: str, reward_range: tuple[float, float]) -> None:
        """Start the process; spawned, as a forked one hangs in OpenMP."""
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        arguments = (other, verifier, reward_range, MEMORY)
        self.process = context.Process(target=serve, args=arguments, name="v05-reward", daemon=True)
        self.process.start()
        other.close()
        self.ready = False
        self.ticket: int | None = None
        self.deadline = time.monotonic() + START_SECONDS

    @property
    def due(self) -> float:
        """Return when what it is doing has to be done, on the monotonic clock."""
        return self.deadline if self.ticket is not None or not self.ready else float("inf")

    def ended_with(self) -> int | None:
        """Return the exit status of a process whose connection is closed; None where it goes on all the same."""
        deadline = time.monotonic() + ENDING_SECONDS
        while self.process.exitcode is None and time.monotonic() < deadline:
            time.sleep(0.01)  # `join` has no timeout where the process has closed all its files
        return self.process.exitcode

    def stop(self) -> None:
        """Kill the process and all that it started."""
        pid = self.process.pid
        try:
            if pid is not None and os.getpgid(pid) == pid:
                os.killpg(pid, signal.SIGKILL)
        except OSError:
            pass  # gone already
        self.process.kill()
        self.process.join()
        self.connection.close()


class RewardPool:
    """Judges answers in the background; every answer that is submitted has one verdict, in any order asked for.

    A verifier that takes longer than the limit is killed with its process; it costs the smallest reward, as do an
    exception, a reward outside the range and a crash. Whether an answer near the limit gets its reward depends on the
    machine's load, which is why verdicts say so.
    """

    def __init__(
        self, verifier: str, reward_range: tuple[float, float] = (0.0, 1.0), *, workers: int = 2, timeout: float = 10.0
    ) -> None:
        """Check the verifier's name; the processes start with the first answer.

        Args:
            verifier: see `v05.tasks.verifiers.make_verifier`.
            reward_range: smallest and largest reward.
            workers: processes, 1 or more.
            timeout: seconds for one answer, above 0.

        Raises:
            InputError: no such verifier.
            ValueError: a number that is not allowed.
        """
        if not -math.inf < reward_range[0] < reward_range[1] < math.inf:
            raise ValueError(f"reward_range is {reward_range}; allowed: two finite numbers, the first below the second")
        if workers < 1:
            raise ValueError(f"workers is {workers}; allowed: 1 or more")
        if not 0 < timeout < float("inf"):
            raise ValueError(f"timeout is {timeout}; allowed: above 0 and finite")
        make_verifier(verifier, reward_range)
        self.verifier, self.reward_range, self.timeout = verifier, reward_range, timeout
        self._count = workers
        self._workers: list[Worker] = []
        self._answers: dict[int, Answer] = {}
        self._deaths: dict[int, int] = {}
        self._verdicts: dict[int, Verdict] = {}
        self._waiting: deque[int] = deque()
        self._submitted, self._failed_starts = 0, 0
        self._broken, self._closed = "", False
        self._changed = threading.Condition()
        self._wake_reader, self._wake = multiprocessing.Pipe(duplex=False)
        self._woken = False  # a message is in that pipe: a second one would say no more, and many would fill it
        self._thread: threading.Thread | None = None

    def submit(self, prompt: str, completion: str, record: Mapping[str, Any]) -> int:
        """Queue one answer and return its ticket at once.

        Raises:
            RuntimeError: the pool is closed.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("the reward pool is closed")
            ticket = self._submitted
            self._submitted += 1
            self._answers[ticket] = Answer(prompt, completion, dict(record))
            self._waiting.append(ticket)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="v05-rewards", daemon=True)
                self._thread.start()
            self._wake_up()
        return ticket

    def _wake_up(self) -> None:
        """Have the thread look at what has changed; whoever calls this holds the lock."""
        if not self._woken:
            self._woken = True
            self._wake.send_bytes(b".")

    def done(self, ticket: int) -> bool:
        """Return whether `collect` would return this verdict without waiting."""
        with self._changed:
            return ticket in self._verdicts

    def collect(self, tickets: Sequence[int]) -> list[Verdict]:
        """Wait for the verdicts on these tickets and hand them over, in this order, once.

        Raises:
            PoolBroken: no worker can be started.
            RuntimeError: the pool is closed.
            KeyError: a ticket that was never given, or has been collected.
        """
        with self._changed:
            for ticket in tickets:
                if ticket not in self._answers and ticket not in self._verdicts:
                    raise KeyError(ticket)
            waiting = list(tickets)
            self._changed.wait_for(lambda: self._broken or self._closed or self._judged(waiting))
            if self._broken:
                raise PoolBroken(f"no reward worker can be started: {self._broken}")
            if self._closed:
                raise RuntimeError("the reward pool is closed")
            return [self._verdicts.pop(ticket) for ticket in tickets]

    def _judged(self, waiting: list[int]) -> bool:
        """Take tickets with a verdict off the end of a list, to look at each once, and return whether none is left."""
        while waiting and waiting[-1] in self._verdicts:
            waiting.pop()
        return not waiting

    def close(self) -> None:
        """Stop all processes; calling it twice is allowed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._wake_up()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "RewardPool":
        """Return the pool; it is closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the pool."""
        self.close()

    def _run(self) -> None:
        """Hand out answers and take in verdicts, in a thread of its own, until the pool is closed or broken."""
        try:
            while not (self._closed or self._broken):
                while len(self._workers) < self._count:
                    self._workers.append(Worker(self.verifier, self.reward_range))
                self._hand_out()
                due = min(worker.due for worker in self._workers)
                places: list[Any] = [self._wake_reader, *(worker.connection for worker in self._workers)]
                ready = wait(places, None if due == float("inf") else max(0.0, due - time.monotonic()))
                if self._wake_reader in ready:
                    with self._changed:
                        self._wake_reader.recv_bytes()
                        self._woken = False
                for worker in [worker for worker in self._workers if worker.connection in ready]:
                    self._take_in(worker)
                for worker in [worker for worker in self._workers if worker.due <= time.monotonic()]:
                    self._overdue(worker)
        except Exception as error:  # a collector must not wait for a thread that is gone
            self._broken = f"{type(error).__name__}: {error}"
        finally:
            for worker in self._workers:
                worker.stop()
            with self._changed:
                self._changed.notify_all()

    def _hand_out(self) -> None:
        for worker in self._workers:
            with self._changed:
                if not self._waiting:
                    return
                if not worker.ready or worker.ticket is not None:
                    continue
                worker.ticket = self._waiting.popleft()
                answer = self._answers[worker.ticket]
            worker.deadline = time.monotonic() + self.timeout
            try:
                worker.connection.send(answer)
            except OSError:
                pass  # the process has just died; reading finds out
            except Exception as error:  # whatever pickling raises
                reason = f"record cannot be sent to a process: {error}"
                self._settle(worker, Verdict(self.reward_range[0], "failure", reason))

    def _take_in(self, worker: Worker) -> None:
        """Read one message; a closed connection means that the process is gone."""
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            self._died(worker)
            return
        if isinstance(message, Verdict):
            self._settle(worker, message)
        elif message[0]:
            worker.ready, self._failed_starts = True, 0
        else:
            self._replace(worker, message[1])

    def _died(self, worker: Worker) -> None:
        """Queue the answer of a dead process again, in front, or settle it where it killed another one before."""
        status = worker.ended_with()
        reason = "the process closed its connection" if status is None else f"the process ended with status {status}"
        ticket = worker.ticket
        if ticket is not None:
            self._deaths[ticket] = self._deaths.get(ticket, 0) + 1
            if self._deaths[ticket] >= TRIES:
                self._settle(worker, Verdict(self.reward_range[0], "failure", reason))
            else:
                with self._changed:
                    self._waiting.appendleft(ticket)
                worker.ticket = None
        self._replace(worker, reason)

    def _overdue(self, worker: Worker) -> None:
        reason = f"no answer in {self.timeout:g} s" if worker.ready else f"not ready in {START_SECONDS:g} s"
        self._replace(worker, reason)
        if worker.ticket is not None:
            self._settle(worker, Verdict(self.reward_range[0], "timeout", reason))

    def _settle(self, worker: Worker, verdict: Verdict) -> None:
        assert worker.ticket is not None
        with self._changed:
            del self._answers[worker.ticket]
            self._deaths.pop(worker.ticket, None)
            self._verdicts[worker.ticket] = verdict
            worker.ticket = None
            self._changed.notify_all()

    def _replace(self, worker: Worker, reason: str) -> None:
        """Stop a process; the loop starts another one, unless too many in a row have failed to start."""
        worker.stop()
        self._workers.remove(worker)
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= STARTS:
                self._broken = reason
