"""Checkpoints: whole or not at all, and runs that go on bit for bit after a stop."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import TINY, StopAfter, assert_same_run, silent

from v05.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from v05.errors import InputError
from v05.files import write_tensors
from v05.stop import StopRequest
from v05.training.loss_config import PLAIN
from v05.training.model_config import ModelConfig
from v05.training.run import Interrupted, read_metrics, train_run, truncate_metrics
from v05.training.run_folder import alone_in, prepare_folder, remove_run
from v05.training.settings import Settings
from v05.training.stream_config import StreamConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train_run(TINY, folder, folder / "warm_start", StopRequest(), silent)
    return folder


def test_checkpoints_are_read_back_and_old_ones_removed(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path) is None
    for update in (1, 999_999, 1_000_000):
        tensors = {"policy": {"w": torch.full((2,), float(update))}, "prior": {}}
        write_checkpoint(tmp_path, Checkpoint(update, tensors, {"seconds": 1.5}))
    newest = read_checkpoint(tmp_path)
    assert newest is not None
    assert (newest.update, newest.state) == (1_000_000, {"seconds": 1.5})
    assert newest.tensors["policy"]["w"].tolist() == [1e6, 1e6]
    assert newest.tensors["prior"] == {}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1000000", "999999"]


def test_a_half_written_checkpoint_is_ignored(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Checkpoint(1, {"policy": {"w": torch.zeros(1)}}, {}))
    (tmp_path / "000002.partial").mkdir()
    newest = read_checkpoint(tmp_path)
    assert newest is not None
    assert newest.update == 1
    write_checkpoint(tmp_path, Checkpoint(3, {"policy": {"w": torch.zeros(1)}}, {}))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "000001",
        "000003",
    ]  # it takes as much room as another


@pytest.mark.parametrize("crash", range(8))
def test_a_crash_while_an_update_is_saved_again_loses_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int
) -> None:
    """The crash comes before the change number `crash` of a file's name, or removal of a folder; a later save works."""
    steps = iter(range(99))

    def or_crash(change: Callable[..., None]) -> Callable[..., None]:
        def changed(*arguments: Any, **options: Any) -> None:
            if next(steps) == crash:
                raise KeyboardInterrupt
            change(*arguments, **options)

        return changed

    def at(seconds: float) -> Checkpoint:
        return Checkpoint(3, {"policy": {"w": torch.full((2,), seconds)}}, {"seconds": seconds})

    write_checkpoint(tmp_path, at(1.0))
    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr(os, "replace", or_crash(os.replace))
        patched.setattr(shutil, "rmtree", or_crash(shutil.rmtree))
        write_checkpoint(tmp_path, at(2.0))
    found = read_checkpoint(tmp_path)
    assert found is not None
    assert found.state["seconds"] == found.tensors["policy"]["w"][0] in (1.0, 2.0)
    in_place = tmp_path / "000003" / "state.json"  # before what was set aside for it
    assert not in_place.exists() or found.state["seconds"] == json.loads(in_place.read_text())["seconds"]
    before = sorted(entry.name for entry in tmp_path.iterdir())
    read_checkpoint(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == before, "processes may read at once"
    write_checkpoint(tmp_path, at(3.0))
    found = read_checkpoint(tmp_path)
    assert found is not None
    assert found.state["seconds"] == 3.0
    assert [entry.name for entry in tmp_path.iterdir()] == ["000003"]


def test_tensors_that_cannot_be_written_are_an_error_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        write_tensors(tmp_path / "missing" / "policy.safetensors", {"w": torch.zeros(1)})
    assert caught.value.filename == str(tmp_path / "missing" / "policy.safetensors")


def test_lines_after_a_checkpoint_are_removed(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"update": 0}\n{"update": 1}\n{"update": 2}\n{"upda')
    truncate_metrics(file, 2)
    assert file.read_text() == '{"update": 0}\n{"update": 1}\n{"update": 2}\n'
    truncate_metrics(file, 1)
    assert read_metrics(tmp_path) == [{"update": 0}, {"update": 1}]


@pytest.mark.parametrize("rollouts", [32, 96])
def test_a_stopped_run_goes_on_bit_for_bit(whole: Path, tmp_path: Path, rollouts: int) -> None:
    cache, stop = whole / "warm_start", StopRequest()
    with pytest.raises(Interrupted, match=f"after {rollouts} of 192 rollouts"):
        train_run(TINY, tmp_path, cache, stop, StopAfter(stop, rollouts))
    for name in ("metrics.jsonl", "times.jsonl"):
        with (tmp_path / name).open("a") as stream:
            stream.write('{"update": 99}\n')  # as after a crash between two checkpoints
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1] / "state.json"
    newest.write_text(json.dumps(json.loads(newest.read_text()) | {"seconds": 2e6, "updating": 1e6}))
    summary = train_run(TINY, tmp_path, cache, StopRequest(), silent, resume=True)
    assert_same_run(whole, tmp_path)
    times = read_metrics(tmp_path, "times.jsonl")
    assert [line["update"] for line in times] == [line["update"] for line in read_metrics(whole, "times.jsonl")]
    assert 1e6 < times[-1]["seconds"] < 2e6 < summary["seconds"]  # time goes on from where the run was stopped


def test_a_finished_run_is_not_repeated(whole: Path) -> None:
    stop = StopRequest()
    summary = train_run(TINY, whole, whole / "none", stop, StopAfter(stop, 0), resume=True)
    assert summary["rollouts"] == 192
    assert not stop.requested
    evaluated = [line["rollouts"] for line in read_metrics(whole) if "heldout_right" in line]
    assert evaluated == [0, 64, 128, 192]


def test_the_summary_is_of_the_first_and_the_last_evaluation(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    lines = read_metrics(run)
    for line, right in ((lines[0], 3), (lines[-1], 7)):
        line |= {"heldout_right": right, "heldout_worth": right + 0.5}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "summary.json").unlink()  # as after a crash just before it was written
    summary = train_run(TINY, run, whole / "warm_start", StopRequest(), silent, resume=True)
    assert (summary["heldout_before"], summary["heldout_after"]) == ([3, 16], [7, 16])
    assert summary["heldout_worth"] == [3.5, 7.5]


def test_a_run_is_removed_and_nothing_else(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    for name in ("changes.jsonl", "notes.txt"):
        (run / name).touch()
    remove_run(run)
    assert {entry.name for entry in run.iterdir()} == {".lock", "notes.txt", "warm_start"}


def test_a_folder_has_a_run_once_all_its_settings_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr("v05.training.run_folder.write_json", lambda file, value: names.append(file.name))
    prepare_folder(Settings(TINY, None, StreamConfig("stream"), PLAIN), tmp_path, resume=False)
    assert sorted(names) == ["config.json", "sampling.json"]
    assert names[-1] == "config.json"


def test_another_run_is_neither_overwritten_nor_resumed(whole: Path) -> None:
    with pytest.raises(InputError, match="--resume"):
        train_run(TINY, whole, whole, StopRequest(), silent)
    with pytest.raises(InputError, match=r"seed is 1; allowed when resuming .*: 0"):
        train_run(dataclasses.replace(TINY, seed=1), whole, whole, StopRequest(), silent, resume=True)


def test_one_process_at_a_time_works_in_a_folder(whole: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(TINY, rollouts=1920, eval_every=640)
    config = tmp_path / "run.json"
    config.write_text(json.dumps(settings.to_dict()))
    run = tmp_path / "run"
    start = [sys.executable, "-c", "from v05.cli import main; main()", "train", "--output", str(run)]
    process = subprocess.Popen([*start, "--config", str(config)], stdout=subprocess.DEVNULL)
    while process.poll() is None and not (run / "checkpoints" / "000002").is_dir():
        os.sched_yield()
    process.send_signal(signal.SIGSTOP)
    for work in (
        lambda: train_run(settings, run, whole / "warm_start", StopRequest(), silent, resume=True),
        lambda: remove_run(run),
    ):
        with pytest.raises(InputError, match="run is in use by another process; allowed: one at a time"):
            work()
    process.kill()
    process.wait()
    assert read_checkpoint(run / "checkpoints") is not None
    stop = StopRequest()
    with pytest.raises(Interrupted):
        train_run(settings, run, whole / "warm_start", stop, StopAfter(stop, 0), resume=True)
    updates = [line["update"] for line in read_metrics(run)]
    assert updates == list(range(len(updates)))


def test_a_run_that_cannot_start_holds_its_folder_to_the_end(tmp_path: Path, monkeypatch) -> None:
    lock = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    seen = []

    @contextlib.contextmanager
    def watched(folder: Path):
        with alone_in(folder):
            try:
                yield
            finally:
                found = subprocess.run([sys.executable, "-c", lock, folder / ".lock"], stderr=subprocess.PIPE)
                seen.append(found.stderr.decode().splitlines()[-1:])
                assert not (folder / "config.json").exists()

    monkeypatch.setattr("v05.training.run.alone_in", watched)
    model = ModelConfig(str(tmp_path / "absent"), str(tmp_path / "absent.jsonl"))
    with pytest.raises(InputError, match="absent"):
        train_run(TINY, tmp_path / "run", tmp_path / "cache", StopRequest(), silent, model=model)
    assert len(seen) == 1
    assert seen[0]
    assert seen[0][0].startswith("BlockingIOError")


def test_a_stop_request_is_noted_once_and_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert signal.getsignal(signal.SIGTERM) == before
    with StopRequest() as unasked:
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    assert not unasked.requested


def test_ctrl_c_saves_and_the_run_goes_on_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(TINY, rollouts=960, eval_every=320)
    config = tmp_path / "run.json"
    config.write_text(json.dumps(settings.to_dict()))
    run, never_stopped = tmp_path / "run", tmp_path / "never_stopped"
    start = [sys.executable, "-c", "from v05.cli import main; main()", "train", "--output", str(run)]
    process = subprocess.Popen([*start, "--config", str(config)], stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not (run / "checkpoints" / "000002").is_dir():
        os.sched_yield()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130
    assert f"v05 train --output {run} --resume" in output
    stopped = read_checkpoint(run / "checkpoints")
    assert stopped is not None
    assert 2 <= stopped.update < 30
    assert [line["update"] for line in read_metrics(run)] == list(range(stopped.update + 1))
    train_run(settings, run, run / "warm_start", StopRequest(), silent, resume=True)
    train_run(settings, never_stopped, whole / "warm_start", StopRequest(), silent)
    assert_same_run(run, never_stopped)
