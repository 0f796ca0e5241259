"""A real vLLM server as a child process, on a port of its own."""

import os
import signal
import socket
import subprocess
from pathlib import Path

from v05.rollout.vllm_library import VllmSettings
from v05.rollout.vllm_server import server_command


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class ServerProcess:
    """Started at once; it is ready when its /health says so."""

    def __init__(self, settings: VllmSettings, log: Path) -> None:
        self.settings, self.log, self.port = settings, log, free_port()
        self.start()

    @property
    def url(self) -> str:
        """Return where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, on the same port as before."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                server_command(self.settings, self.port),
                env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Kill it and its own children."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
