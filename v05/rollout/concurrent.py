"""Requests answered side by side by coroutines, in an event loop that has a thread of its own."""

import asyncio
import queue
import threading
import time
from abc import abstractmethod
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from v05.rollout.batches import Batches
from v05.rollout.codec import Codec
from v05.rollout.engine import Rollout
from v05.rollout.streaming import EngineDied, Outcome, Request
from v05.rollout.weights_file import check_weights, weights_file

T = TypeVar("T")


class ConcurrentEngine(Batches):
    """What the engines that answer in coroutines share; a subclass says how to start, answer, push and stop."""

    def __init__(self, model: str | Path, chat: bool, weights_folder: str | Path | None = None) -> None:
        """Start the loop; the subclass then calls `_start` in it through `_run`."""
        super().__init__()
        self.codec, self.version = Codec.from_pretrained(model, chat), 0
        self._model = model
        self._weights_folder = weights_folder
        self._ready: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()  # None wakes `wait` when the engine dies
        self._tasks: dict[int, asyncio.Task[None]] = {}  # touched in the loop's thread alone
        self._death = ""
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=type(self).__name__, daemon=True)
        self._thread.start()

    @abstractmethod
    async def _start(self) -> None:
        """Make the engine ready."""

    @abstractmethod
    async def _answer(self, request: Request, prompt_ids: tuple[int, ...]) -> Rollout:
        """Return the answer; raises EngineDied when the engine is gone, anything else for this request alone."""

    @abstractmethod
    async def _push(self, path: Path, version: int) -> None:
        """Load the weights of a safetensors file between two tokens of the requests under way.

        Raises NotImplementedError where the engine cannot and nothing has changed.
        """

    @abstractmethod
    async def _stop(self) -> None:
        """Let go of the engine."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests and return at once; see `StreamingEngine`."""
        self._check_alive()
        self._run(self._launch(requests))

    async def _launch(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.number in self._tasks:
                raise ValueError(f"request {request.number} is not answered yet; allowed: another number")
            self._tasks[request.number] = asyncio.create_task(self._serve(request))

    async def _serve(self, request: Request) -> None:
        try:
            outcome = Outcome(request.number, await self._answer(request, self.codec.encode(request.prompt)))
        except EngineDied as error:
            self._die(str(error))
            return
        except Exception as error:
            outcome = Outcome(request.number, None, f"{type(error).__name__}: {error}")
        finally:
            self._tasks.pop(request.number, None)
        if not self._death:
            self._ready.put(outcome)

    def _die(self, reason: str) -> None:
        if not self._death:
            self._death = reason
            self._ready.put(None)

    def _take(self, timeout: float) -> list[Outcome]:
        ready: list[Outcome] = []
        deadline = time.monotonic() + timeout
        while True:
            try:
                remaining = 0.0 if ready or self._death else max(0.0, deadline - time.monotonic())
                outcome = self._ready.get(timeout=remaining) if remaining else self._ready.get_nowait()
            except queue.Empty:
                break
            if outcome is not None:
                ready.append(outcome)
        if not ready:
            self._check_alive()
        return ready

    def abort(self, numbers: Sequence[int]) -> None:
        """Give up requests; unknown numbers are ignored."""
        if not self._closed:
            self._run(self._cancel(numbers))

    async def _cancel(self, numbers: Sequence[int]) -> None:
        tasks = [self._tasks[number] for number in numbers if number in self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def update_weights(self, weights: Mapping[str, Tensor], version: int | None = None) -> None:
        """Load weights and forget everything computed with earlier ones; unfinished answers go on with the new.

        Args:
            weights: by parameter name, as transformers names them.
            version: their number; None is the last one's successor.

        Raises:
            ValueError: they are not those of the model's architecture; nothing has changed.
            EngineDied: the engine's process is gone.
            NotImplementedError: the engine takes no weights; it goes on with those that it has.
            RuntimeError: the weights were refused; the engine has to be restarted.
        """
        self._check_alive()
        check_weights(weights, self._model)
        version = self.version + 1 if version is None else version
        with weights_file(weights, self._weights_folder) as path:
            try:
                self._run(self._push(path, version))
            except NotImplementedError:
                raise
            except EngineDied as error:
                self._die(str(error))
                raise
            except Exception as error:
                self._die(f"the weights of version {version} were refused: {error}")
                raise RuntimeError(f"{self._death}; restart the engine") from error
        self.version = version

    def restart(self) -> None:
        """Start a fresh engine in the place of one that died; it has no requests and no pushed weights."""
        self._run(self._again())
        self._ready, self._kept, self._death, self.version = queue.SimpleQueue(), [], "", 0

    async def _again(self) -> None:
        await self._cancel(list(self._tasks))
        await self._stop()
        await self._start()

    def close(self) -> None:
        """Stop the engine and its thread; calling it twice is allowed."""
        if self._closed:
            return
        self._run(self._cancel_and_stop())
        self._closed, self._death = True, "the engine was closed"
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancel_and_stop(self) -> None:
        await self._cancel(list(self._tasks))
        await self._stop()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            work.close()
            raise EngineDied(self._death)
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _check_alive(self) -> None:
        if self._death:
            raise EngineDied(self._death)
