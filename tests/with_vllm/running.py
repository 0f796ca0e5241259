"""Each of the three engines, started on the same model, and the means to kill it."""

import os
import signal
from pathlib import Path
from typing import Any

from tests.with_vllm.server_process import ServerProcess
from v05.rollout.vllm_async import AsyncVllm
from v05.rollout.vllm_in_process import InProcessVllm
from v05.rollout.vllm_library import VllmSettings
from v05.rollout.vllm_server import ServerEngine, ServerSettings

KINDS = ("in-process", "async", "server")
OPTIONS = {"enforce_eager": True, "block_size": 32, "max_num_seqs": 8}
LONGEST = 256


class Running:
    """One engine of a kind; there is never a second vLLM beside it."""

    def __init__(self, kind: str, model: Path, dtype: str, chat: bool = False) -> None:
        self.kind, self.server = kind, None
        settings = VllmSettings(model, dtype, LONGEST, chat=chat, options=OPTIONS)
        self.engine: Any
        if kind == "in-process":
            self.engine = InProcessVllm(settings)
        elif kind == "async":
            self.engine = AsyncVllm(settings)
        else:
            self.server = ServerProcess(settings, model.parent / "server.log")
            try:
                self.engine = ServerEngine(ServerSettings(self.server.url, model, chat=chat))
            except BaseException:
                self.server.kill()
                raise

    def kill(self) -> None:
        """Kill the process that computes, as the kernel does when memory runs out."""
        if self.server is not None:
            self.server.kill()
        else:
            import psutil

            children = psutil.Process().children(recursive=True)
            alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
            (core,) = [child for child in alive if "EngineCor" in child.name()]
            os.kill(core.pid, signal.SIGKILL)

    def revive(self) -> None:
        """Restart the engine; a server is somebody else's to start."""
        if self.server is not None and self.server.process.poll() is not None:
            self.server.start()
        self.engine.restart()

    def close(self) -> None:
        """Stop everything."""
        self.engine.close()
        if self.server is not None:
            self.server.kill()
