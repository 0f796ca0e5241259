"""A vLLM server, or another OpenAI-compatible one, that somebody else started."""

import asyncio
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v05.errors import InputError
from v05.rollout.answer import make_rollout
from v05.rollout.concurrent import ConcurrentEngine
from v05.rollout.engine import Rollout
from v05.rollout.streaming import EngineDied, Request
from v05.rollout.vllm_library import TRANSFER, VllmSettings
from v05.rollout.wire import WIRES, Sampled

NEEDS = (
    "allowed: vLLM 0.32 or newer, started with VLLM_SERVER_DEV_MODE=1 where v05 is installed, with the options that "
    "v05.rollout.vllm_server.server_command gives"
)


@dataclass(frozen=True)
class ServerSettings:
    """How to talk to a server.

    Attributes:
        url: of the server, without a path.
        model: folder or name of the model whose tokenizer the server uses.
        served_model: name under which the server knows it; empty is `model`.
        chat: prompts are the user's message in the tokenizer's chat template; otherwise raw text.
        dialect: `tokens` (vLLM's token-in token-out endpoint) or `completions` (OpenAI's, tokens carry no version).
        transfer: how weights are loaded: `v05-file` (vLLM's weight transfer, with v05's plug-in in the server) or
            `reload` (vLLM's `reload_weights` from a folder; a server without v05).
        timeout: longest time that one answer may take, in seconds.
        startup_timeout: how long a start or restart waits for the server to be healthy, in seconds.
        weights_folder: where weights are written for the server, which must be able to read it under the same path;
            None is shared memory of this machine.
    """

    url: str
    model: str | Path
    served_model: str = ""
    chat: bool = False
    dialect: str = "tokens"
    transfer: str = TRANSFER
    timeout: float = 600.0
    startup_timeout: float = 300.0
    weights_folder: str | Path | None = None


def server_command(settings: VllmSettings, port: int) -> list[str]:
    """Return the command that serves a model for `ServerEngine`; run it with VLLM_SERVER_DEV_MODE=1.

    Args:
        settings: of the model; `chat` has no meaning here, `options` become `--name value` (True: `--name`).
        port: to listen on, at 127.0.0.1.
    """
    options: dict[str, Any] = {
        "model": settings.model,
        "dtype": settings.dtype,
        "max-model-len": settings.max_model_len,
        "seed": settings.seed,
        "host": "127.0.0.1",
        "port": port,
        "logprobs-mode": "processed_logprobs",
        "enable-scale-out": True,  # the token-in token-out endpoint
        "scheduling-policy": "priority",
        "weight-transfer-config": f'{{"backend": "{TRANSFER}"}}',
        **settings.options,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in options.items():
        if value is not None:
            command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return command


class Refusal(RuntimeError):
    """The server is healthy and answered with an error.

    Attributes:
        status: of the answer, as HTTP numbers it.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def most_at_once() -> int:
    """Return how many answers may be under way: each has a connection, and others need files of this process too."""
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 4)


class ServerEngine(ConcurrentEngine):
    """One HTTP request per answer; see `StreamingEngine` and `Engine`.

    Three quarters of the files that this process may open (`ulimit -n`) are requests at a time; more wait here, in the
    order of asking.

    The server must report log-probabilities at the sampling temperature (`--logprobs-mode processed_logprobs`); no
    answer tells whether it does, but `v05 train` warns when it does not (`v05.training.sampler_gap`).
    """

    def __init__(self, settings: ServerSettings) -> None:
        """Wait until the server is healthy.

        Raises:
            InputError: a setting is not allowed, or httpx is not installed.
            EngineDied: the server is not healthy within `startup_timeout`.
        """
        try:
            import httpx
        except ImportError:
            raise InputError("this engine needs the package httpx; install it: pip install v05[server]") from None
        for name, value, allowed in (
            ("dialect", settings.dialect, tuple(WIRES)),
            ("transfer", settings.transfer, (TRANSFER, "reload")),
        ):
            if value not in allowed:
                raise InputError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        super().__init__(settings.model, settings.chat, settings.weights_folder)
        self.settings, self._wire = settings, WIRES[settings.dialect]
        self._httpx: Any = httpx
        self._client: Any = None
        self._room = asyncio.Semaphore(most_at_once())
        try:
            self._run(self._start())
        except BaseException:
            self.close()
            raise

    async def _start(self) -> None:
        limits = self._httpx.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = self._httpx.Timeout(self.settings.timeout, connect=10.0)
        self._client = self._httpx.AsyncClient(base_url=self.settings.url, timeout=timeout, limits=limits)
        deadline = time.monotonic() + self.settings.startup_timeout
        while not await self._healthy():
            if time.monotonic() > deadline:
                waited = f"{self.settings.startup_timeout:g} s"
                raise EngineDied(f"the server at {self.settings.url} is not healthy after {waited}")
            await asyncio.sleep(0.25)

    async def _healthy(self) -> bool:
        # Over a connection of its own: a server may have closed those that are kept alive.
        async with self._httpx.AsyncClient(base_url=self.settings.url, timeout=10.0) as client:
            try:
                answer = await client.get(self._wire.health)
            except self._httpx.TransportError:
                return False
            return bool(answer.is_success)

    async def _answer(self, request: Request, prompt_ids: tuple[int, ...]) -> Rollout:
        model = self.settings.served_model or str(self.settings.model)
        async with self._room:
            answer = await self._post(self._wire.path, self._wire.body(request, prompt_ids, model))
        sampled = self._read(answer)
        return make_rollout(self.codec, prompt_ids, sampled.token_ids, sampled.logprobs, sampled.reason, sampled.spans)

    def _read(self, answer: Any) -> Sampled:
        try:
            return self._wire.read(answer.json())
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.settings.url}{self._wire.path} answered {answer.text[:200]!r} ({what})") from error

    async def _post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return a successful answer; a request is sent a second time where a healthy server dropped its connection."""
        for last in (False, True):
            try:
                answer = await self._client.post(path, json=body)
                break
            except (self._httpx.ReadTimeout, self._httpx.WriteTimeout) as error:
                raise TimeoutError(
                    f"no answer from {self.settings.url}{path} in {self.settings.timeout:g} s"
                ) from error
            except self._httpx.TransportError as error:
                if not await self._healthy():
                    raise EngineDied(f"the server at {self.settings.url} is gone: {error!r}") from error
                if last:
                    raise
        if answer.status_code >= 500 and not await self._healthy():
            raise EngineDied(f"the server at {self.settings.url} is not healthy: {answer.text[:200]!r}")
        if not answer.is_success:
            status = answer.status_code
            raise Refusal(f"{self.settings.url}{path} answered {status}: {answer.text[:500]!r}", status)
        return answer

    async def _push(self, path: Path, version: int) -> None:
        try:
            await self._post("/pause?mode=keep&clear_cache=true")
        except Refusal as error:
            if error.status == 404:
                raise NotImplementedError(f"the server at {self.settings.url} takes no weights; {NEEDS}") from error
            raise
        if self.settings.transfer == TRANSFER:
            await self._post("/start_weight_update")
            await self._post("/update_weights", {"update_info": {"path": str(path)}})
            await self._post("/finish_weight_update", {"weight_version": str(version)})
        else:
            await self._post(
                "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(path.parent)}}
            )
            await self._post("/update_weight_version", {"new_version": str(version)})
        found = (await self._client.get("/weight_info")).json()["weight_version"]
        if found != str(version):
            raise RuntimeError(f"the server says that its weights are {found!r}, not {version}")
        await self._post("/resume")

    async def _stop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()
