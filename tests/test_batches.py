"""Whole batches from an engine that answers one by one: what is refused is asked again, and no other answer is lost."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from v05.errors import InputError
from v05.evaluate import Sampling, evaluate
from v05.rollout.batches import ATTEMPTS, Batches
from v05.rollout.engine import NOTHING, Rollout, Unanswered, wrong_where_unanswered
from v05.rollout.streaming import Outcome, Request
from v05.rollout.vllm_in_process import InProcessVllm
from v05.rollout.vllm_library import VllmSettings
from v05.stop import StopRequest
from v05.tasks.pool import RewardPool

LIMITS = {"seed": 3, "temperature": 1.0, "max_new_tokens": 4}


class Refusing(Batches):
    """Answers with the request's seed, last request first; refuses a prompt so many times in all."""

    def __init__(self, refusals: dict[str, int]) -> None:
        super().__init__()
        self.refusals, self.asked, self.queue = refusals, list[Request](), list[Request]()

    def submit(self, requests: Sequence[Request]) -> None:
        self.asked += requests
        self.queue += requests

    def abort(self, numbers: Sequence[int]) -> None:
        raise AssertionError("nothing is to be given up")

    def _take(self, timeout: float) -> list[Outcome]:
        request = self.queue.pop()
        left = self.refusals.get(request.prompt, 0)
        self.refusals[request.prompt] = left - 1
        if left > 0:
            return [Outcome(request.number, None, "too long")]
        return [Outcome(request.number, Rollout((0,), (1,), (-1.0,), str(request.seed), finished=True))]


def test_a_refused_request_is_asked_again_with_its_seed() -> None:
    clean, engine = Refusing({}), Refusing({"b": ATTEMPTS - 1})
    rows = engine.generate(["a", "b"], [2, 3], **LIMITS)  # type: ignore[arg-type]
    assert rows == clean.generate(["a", "b"], [2, 3], **LIMITS)  # type: ignore[arg-type]
    assert len(engine.asked) == 5 + ATTEMPTS - 1
    assert len({request.number for request in engine.asked}) == len(engine.asked)
    assert clean.generate([], [], **LIMITS) == []  # type: ignore[arg-type]


def test_what_cannot_be_had_is_named_after_everything_else_is_there(caplog: pytest.LogCaptureFixture) -> None:
    engine = Refusing({"b": 10**6})
    with pytest.raises(Unanswered, match="2 of 5 answers could not be had; answer 1 to prompt 'b' failed: too long"):
        engine.generate(["a", "b"], [3, 2], **LIMITS)  # type: ignore[arg-type]
    rows = wrong_where_unanswered(engine.generate, ["a", "b"], [3, 2], **LIMITS)
    assert rows[0] == Refusing({}).generate(["a"], [3], **LIMITS)[0]  # type: ignore[arg-type]
    assert rows[1] == [NOTHING] * 2
    assert "answer 0 to prompt 'b' failed: too long; it counts as wrong" in caplog.messages
    with pytest.raises(Unanswered):  # an engine that answers nothing is no evaluation
        wrong_where_unanswered(engine.generate, ["b"], [2], **LIMITS)


def test_an_evaluation_keeps_what_it_has_and_asks_again_for_the_rest(tmp_path: Path) -> None:
    records = [{"prompt": prompt, "answer": "1"} for prompt in "abcdef"]
    sampling = Sampling(samples=2, batch=2)
    engine = Refusing({"c": 10**6})
    with RewardPool("exact") as pool:
        whole = evaluate(Refusing({}), records, pool, sampling, tmp_path / "whole", {}, StopRequest())  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"5 of 6 problems are in .* to prompt 'c' failed: too long"):
            evaluate(engine, records, pool, sampling, tmp_path / "part", {}, StopRequest())  # type: ignore[arg-type]
        engine = Refusing({})
        assert evaluate(engine, records, pool, sampling, tmp_path / "part", {}, StopRequest()) == whole  # type: ignore[arg-type]
        assert {request.prompt for request in engine.asked} == {"c", "d"}


def test_an_evaluation_keeps_the_batch_before_the_one_that_fails(tmp_path: Path) -> None:
    class Failing(Refusing):
        def submit(self, requests: Sequence[Request]) -> None:
            if requests[0].prompt == "b":
                raise OSError("no memory left")
            super().submit(requests)

    records = [{"prompt": prompt, "answer": "1"} for prompt in "ab"]
    with RewardPool("exact") as pool, pytest.raises(OSError, match="no memory left"):
        evaluate(Failing({}), records, pool, Sampling(samples=2, batch=1), tmp_path, {}, StopRequest())  # type: ignore[arg-type]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


def test_a_restarted_engine_hands_over_nothing_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    class Vllm:
        def __getattr__(self, name: str) -> object:
            return self

        def __call__(self, *_: object, **__: object) -> object:
            return self

    monkeypatch.setattr("v05.rollout.vllm_library.start_in_process", lambda settings: Vllm())
    monkeypatch.setattr("v05.rollout.vllm_library.release_in_process", lambda: None)
    engine = InProcessVllm(VllmSettings("model"))
    engine._kept.append(Outcome(1, None, "of before"))
    engine.restart()
    assert engine.wait(0.0) == []
