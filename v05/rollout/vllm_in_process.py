"""vLLM in the trainer's process: it computes while `wait` runs, and a weight update falls between two steps."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from v05.rollout import vllm_library
from v05.rollout.answer import make_rollout
from v05.rollout.batches import Batches
from v05.rollout.codec import Codec
from v05.rollout.streaming import EngineDied, Outcome, Request
from v05.rollout.vllm_library import VllmSettings
from v05.rollout.weights_file import check_weights, weights_file


class InProcessVllm(Batches):
    """The simplest of the vLLM engines, for one machine and debugging; see `StreamingEngine` and `Engine`."""

    def __init__(self, settings: VllmSettings) -> None:
        """Start vLLM; raises InputError where it is not installed."""
        super().__init__()
        self.settings = settings
        self.version = 0
        self._ready: list[Outcome] = []
        self._waiting: dict[int, Request] = {}
        self._death = ""
        self._engine: Any = vllm_library.start_in_process(settings)
        self.codec = Codec(self._engine.get_tokenizer(), settings.chat)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; those that vLLM refuses have an outcome at once."""
        self._check_alive()
        for request in requests:
            if request.number in self._waiting:
                raise ValueError(f"request {request.number} is not answered yet; allowed: another number")
            try:
                prompt = {"prompt_token_ids": list(self.codec.encode(request.prompt))}
                self._engine.add_request(
                    str(request.number), prompt, vllm_library.sampling(request), priority=vllm_library.priority(request)
                )
            except Exception as error:  # vLLM's own kinds among them
                self._ready.append(Outcome(request.number, None, f"{type(error).__name__}: {error}"))
            else:
                self._waiting[request.number] = request

    def _take(self, timeout: float) -> list[Outcome]:
        self._check_alive()
        deadline = time.monotonic() + timeout
        while not self._ready and self._waiting:
            try:
                finished = self._engine.step()
            except Exception as error:
                self._death = f"vLLM failed in a step: {type(error).__name__}: {error}"
                raise EngineDied(self._death) from error
            self._ready += [self._outcome(output) for output in finished if output.finished]
            if time.monotonic() > deadline:
                break
        ready, self._ready = self._ready, []
        return ready

    def _outcome(self, output: Any) -> Outcome:
        number = int(output.request_id)
        del self._waiting[number]
        return outcome_of(self.codec, number, output)

    def abort(self, numbers: Sequence[int]) -> None:
        """Give up requests; unknown numbers are ignored."""
        known = [number for number in numbers if self._waiting.pop(number, None)]
        if known and not self._death:
            self._engine.abort_request([str(number) for number in known])

    def update_weights(self, weights: Mapping[str, Tensor], version: int | None = None) -> None:
        """Load weights and forget everything computed with earlier ones; unfinished answers go on with the new.

        Args:
            weights: by parameter name, as transformers names them.
            version: their number; None is the last one's successor.

        Raises:
            ValueError: they are not those of the model's architecture; nothing has changed.
            RuntimeError: vLLM refuses them; the engine has to be restarted.
        """
        self._check_alive()
        check_weights(weights, self.settings.model)
        version = self.version + 1 if version is None else version
        engine = self._engine
        try:
            with weights_file(weights) as path:
                engine.collective_rpc("start_weight_update")
                info = vllm_library.update_request(path).update_info
                engine.collective_rpc("update_weights", kwargs={"update_info": info})
                engine.collective_rpc("finish_weight_update")
            engine.set_weight_version(str(version))
            if not engine.reset_prefix_cache(reset_running_requests=True):
                raise RuntimeError("the prefix cache was not reset")
        except Exception as error:
            self._death = f"vLLM refused the weights of version {version}: {error}"
            raise RuntimeError(f"{self._death}; restart the engine") from error
        self.version = version

    def restart(self) -> None:
        """Start a fresh engine with the weights of the model's folder and no requests."""
        self.close()
        self._engine = vllm_library.start_in_process(self.settings)
        self._ready, self._kept, self._waiting, self._death, self.version = [], [], {}, "", 0

    def close(self) -> None:
        """Stop the engine."""
        if self._engine is not None:
            self._engine.engine_core.shutdown()
            self._engine, self._death = None, "the engine was closed"
            vllm_library.release_in_process()

    def _check_alive(self) -> None:
        if self._death:
            raise EngineDied(self._death)


def outcome_of(codec: Codec, number: int, output: Any) -> Outcome:
    """Return the outcome of a finished `RequestOutput` of vLLM."""
    (completion,) = output.outputs
    try:
        rollout = make_rollout(
            codec,
            output.prompt_token_ids,
            completion.token_ids,
            [entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)],
            completion.finish_reason,
            [(span.version, span.start, span.end) for span in completion.weight_versions or ()],
        )
    except ValueError as error:
        return Outcome(number, None, str(error))
    return Outcome(number, rollout)
