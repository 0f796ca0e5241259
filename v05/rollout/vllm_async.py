"""vLLM with continuous batching in a process of its own: the default engine for language models."""

from pathlib import Path
from typing import Any

from v05.rollout import vllm_library
from v05.rollout.concurrent import ConcurrentEngine
from v05.rollout.engine import Rollout
from v05.rollout.streaming import EngineDied, Outcome, Request
from v05.rollout.vllm_in_process import outcome_of
from v05.rollout.vllm_library import VllmSettings


class AsyncVllm(ConcurrentEngine):
    """`AsyncLLM` behind `StreamingEngine` and `Engine`.

    Weights arrive through vLLM's interface for reinforcement learning: generation pauses and keeps its requests, caches
    are cleared, the weights are loaded and numbered, generation resumes. A kept request is read again under the new
    weights, so every log-probability is that of the weights whose version its token carries.
    """

    def __init__(self, settings: VllmSettings) -> None:
        """Start vLLM; raises InputError where it is not installed."""
        super().__init__(settings.model, settings.chat)
        self.settings = settings
        self._engine: Any = None
        try:
            self._run(self._start())
        except BaseException:
            self.close()
            raise

    async def _start(self) -> None:
        self._engine = vllm_library.start_async(self.settings)

    async def _answer(self, request: Request, prompt_ids: tuple[int, ...]) -> Rollout:
        prompt = {"prompt_token_ids": list(prompt_ids)}
        outcome = Outcome(request.number, None, "vLLM ended without an answer")
        sampling, priority = vllm_library.sampling(request), vllm_library.priority(request)
        try:
            async for output in self._engine.generate(prompt, sampling, str(request.number), priority=priority):
                if output.finished:
                    outcome = outcome_of(self.codec, request.number, output)
        except Exception as error:
            raise self._named(error) from error
        if outcome.rollout is None:
            raise ValueError(outcome.error)
        return outcome.rollout

    async def _push(self, path: Path, version: int) -> None:
        engine = self._engine
        try:
            await engine.pause_generation(mode="keep", clear_cache=True)
            await engine.start_weight_update()
            await engine.update_weights(vllm_library.update_request(path))
            await engine.finish_weight_update(str(version))
            found = await engine.get_weight_version()
            if found != str(version):
                raise RuntimeError(f"vLLM says that its weights are {found}, not {version}")
            await engine.resume_generation()
        except Exception as error:
            raise self._named(error) from error

    async def _stop(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()

    @staticmethod
    def _named(error: Exception) -> Exception:
        return EngineDied(f"vLLM's core process died: {error}") if vllm_library.is_death(error) else error
