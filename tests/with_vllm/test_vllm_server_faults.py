"""A server that answers nonsense, too late, or not at all; here it needs no vLLM, only HTTP."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.with_vllm import tiny_qwen3
from tests.with_vllm.server_process import free_port
from v05.errors import InputError
from v05.rollout.engine import Unanswered
from v05.rollout.streaming import EngineDied, Request
from v05.rollout.vllm_library import VllmSettings
from v05.rollout.vllm_server import ServerEngine, ServerSettings, server_command

pytestmark = pytest.mark.vllm

GOOD = {
    "token_ids": [5, 1],
    "logprobs": {"content": [{"token_id": 5, "logprob": -0.5}, {"token_id": 1, "logprob": -1.5}]},
    "finish_reason": "stop",
    "weight_versions": [{"version": "default", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}],
}


class Script(BaseHTTPRequestHandler):
    """Answers what the test says; `released` lets a silent answer go."""

    answer: Any = GOOD
    status = 200
    healthy = True
    drops = 0
    asked: Any = None
    released = threading.Event()

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.reply(200 if type(self).healthy else 503, b"")

    def do_POST(self) -> None:
        script = type(self)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.path.startswith("/inference"):
            self.reply(404, b"no such path")
            return
        script.asked = json.loads(body)
        if script.drops:
            script.drops -= 1
            self.close_connection = True
            return
        if script.answer is None:
            script.released.wait(30)
            return
        text = script.answer if isinstance(script.answer, bytes) else json.dumps({"choices": [script.answer]}).encode()
        self.reply(script.status, text)


@pytest.fixture
def script() -> Iterator[type[Script]]:
    class Fresh(Script):
        released = threading.Event()

    yield Fresh
    Fresh.released.set()


@pytest.fixture
def server(script: type[Script]) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    script.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def engine(server: ThreadingHTTPServer, folder: Path) -> Iterator[ServerEngine]:
    engine = ServerEngine(ServerSettings(f"http://127.0.0.1:{server.server_port}", folder, timeout=1.0))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3.write(tmp_path_factory.mktemp("qwen3"), 0)


def answer(engine: ServerEngine, **changes: Any) -> Any:
    engine.submit([Request(0, "1+2=", 17, 0.5, 9, **changes)])
    (outcome,) = engine.wait(30)
    assert outcome.number == 0
    return outcome


def test_what_is_asked_and_what_is_understood(engine: ServerEngine, script: type[Script], folder: Path) -> None:
    rollout = answer(engine, urgent=True).rollout
    assert rollout.token_ids == (5, 1)
    assert rollout.logprobs == (-0.5, -1.5)
    assert rollout.versions == (0, 4)
    assert (rollout.text, rollout.finished) == ("3", True)
    assert script.asked["token_ids"] == [3, 12, 4, 13]
    assert script.asked["model"] == str(folder)
    assert script.asked["priority"] < 0
    sampling = script.asked["sampling_params"]
    assert (sampling["seed"], sampling["temperature"], sampling["max_tokens"], sampling["top_p"]) == (17, 0.5, 9, 1.0)


@pytest.mark.parametrize(
    ("nonsense", "message"),
    [
        (b"<html>busy</html>", "answered '<html>busy</html>' (JSONDecodeError"),
        (b"{}", "KeyError: 'choices'"),
        (b'{"choices": []}', "IndexError"),
        (b"[1, 2]", "TypeError"),
        (GOOD | {"logprobs": None}, "TypeError"),
        (GOOD | {"token_ids": [5]}, "1 tokens with 2 log-probabilities"),
        (GOOD | {"token_ids": [], "logprobs": {"content": []}}, "0 tokens with 0 log-probabilities"),
        (GOOD | {"logprobs": {"content": [{"logprob": 3.0}, {"logprob": -1.0}]}}, "log-probability 0 is 3.0"),
        (GOOD | {"logprobs": {"content": [{"logprob": -1.0}, {"logprob": None}]}}, "log-probability 1 is None"),
        (GOOD | {"finish_reason": "abort"}, "ended with 'abort'; allowed: 'stop' or 'length'"),
        (GOOD | {"weight_versions": [{"version": "1", "start": 0, "end": 1}]}, "1 tokens have a version, of 2"),
        (GOOD | {"weight_versions": [{"version": "1", "start": 1, "end": 2}]}, "starts at token 1; allowed: 0"),
        (GOOD | {"weight_versions": None}, "0 tokens have a version, of 2"),
    ],
)
def test_nonsense_is_the_end_of_one_request_alone(
    engine: ServerEngine, script: type[Script], nonsense: Any, message: str
) -> None:
    script.answer = nonsense
    outcome = answer(engine)
    assert outcome.rollout is None
    assert message in outcome.error
    with pytest.raises(Unanswered, match="1 of 1 answers could not be had; answer 0 to prompt '1' failed"):
        engine.generate(["1"], [1], seed=0, temperature=1.0, max_new_tokens=2)
    script.answer = GOOD
    assert answer(engine).rollout is not None


def test_an_error_of_a_healthy_server(engine: ServerEngine, script: type[Script]) -> None:
    script.status, script.answer = 400, b"too long"
    assert "answered 400: 'too long'" in answer(engine).error
    script.status = 500
    assert "answered 500" in answer(engine).error


def test_a_dropped_connection_is_tried_once_more(engine: ServerEngine, script: type[Script]) -> None:
    script.drops = 1
    assert answer(engine).rollout is not None
    script.drops = 2
    assert "RemoteProtocolError" in answer(engine).error


def test_an_answer_that_does_not_come(engine: ServerEngine, script: type[Script]) -> None:
    script.answer = None
    outcome = answer(engine)
    assert "TimeoutError: no answer from" in outcome.error
    assert "in 1 s" in outcome.error


def test_no_more_connections_than_files(server: ThreadingHTTPServer, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (16, 1 << 20))
    under_way, most, lock = 0, 0, threading.Lock()

    class Counting(Script):
        def do_POST(self) -> None:
            nonlocal under_way, most
            with lock:
                under_way += 1
                most = max(most, under_way)
            time.sleep(0.02)
            with lock:
                under_way -= 1
            super().do_POST()

    server.RequestHandlerClass = Counting
    engine = ServerEngine(ServerSettings(f"http://127.0.0.1:{server.server_port}", folder))
    try:
        rows = engine.generate(["1+2="] * 10, [10] * 10, seed=0, temperature=1.0, max_new_tokens=9)
    finally:
        engine.close()
    assert [len(row) for row in rows] == [10] * 10
    assert 1 < most <= 12


def test_a_sick_server_is_a_dead_engine_until_it_is_well(engine: ServerEngine, script: type[Script]) -> None:
    script.status, script.healthy = 500, False
    engine.submit([Request(0, "1", 0, 1.0, 2)])
    with pytest.raises(EngineDied, match="not healthy"):
        engine.wait(30)
    with pytest.raises(EngineDied):
        engine.submit([Request(1, "1", 0, 1.0, 2)])
    script.status, script.healthy = 200, True
    engine.restart()
    assert answer(engine).rollout is not None


def test_a_server_that_takes_no_weights_says_what_it_needs(engine: ServerEngine) -> None:
    weights = tiny_qwen3.make_model(1).state_dict()
    with pytest.raises(NotImplementedError, match=r"takes no weights; allowed: vLLM 0\.32 or newer, started"):
        engine.update_weights(weights)
    with pytest.raises(ValueError, match=r"is \(1,\); allowed: \(41, 64\)"):
        engine.update_weights(weights | {"lm_head.weight": torch.zeros(1)})
    assert answer(engine).rollout is not None  # it goes on


def test_nobody_listens(folder: Path) -> None:
    with pytest.raises(EngineDied, match=r"is not healthy after 0 s"):
        ServerEngine(ServerSettings(f"http://127.0.0.1:{free_port()}", folder, startup_timeout=0))


def test_settings_that_are_not_allowed(folder: Path) -> None:
    with pytest.raises(InputError, match="dialect is 'grpc'; allowed: tokens, completions"):
        ServerEngine(ServerSettings("http://127.0.0.1:1", folder, dialect="grpc"))
    with pytest.raises(InputError, match="transfer is 'nccl'; allowed: v05-file, reload"):
        ServerEngine(ServerSettings("http://127.0.0.1:1", folder, transfer="nccl"))


def test_the_command_has_what_the_engine_needs(folder: Path) -> None:
    command = server_command(VllmSettings(folder, "bfloat16", options={"enforce_eager": True, "block_size": 32}), 8000)
    line = " ".join(command)
    assert "--logprobs-mode processed_logprobs" in line
    assert "--enforce-eager --block-size 32" in line
    assert "--max-model-len" not in line
