"""`v05 fuse` at its edges: calibrated fusion, blank lines, what JSON lacks, and outputs that cannot be written."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import run, write
from records import read_lines

import v05.cli.fuse
import v05.cli.simulate
from v05.errors import BadLine, InputError
from v05.fuse import Decisions, FuseConfig, Summary, fuse_file
from v05.kernels import shrinkage

GOOD = {"prompt": "2+2", "rewards": [-1, -1, -1, -1], "prior": 0.6}


def test_calibrated_fusion_is_that_of_the_whole_file(tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 9, 9000)  # more than a block
    rewards = [rng.choice([-1.0, 1.0], size).tolist() for size in sizes]
    prior = rng.uniform(-1, 1, len(sizes))
    lines = [{"prompt": "", "rewards": group, "prior": float(p)} for group, p in zip(rewards, prior, strict=True)]
    output = tmp_path / "out.jsonl"
    source = write(tmp_path / "in.jsonl", *lines)
    assert run(capsys, monkeypatch, "fuse", source, "--fusion", "calibrated", "--output", output)[0] == 0
    flat = torch.tensor([reward for group in rewards for reward in group], dtype=torch.float64)
    offsets = torch.tensor([0, *np.cumsum(sizes)])
    expected = shrinkage(flat, offsets, torch.from_numpy(prior), fusion="calibrated", advantages=True)
    found = read_lines(output)
    for name in ("baseline", "weight", "mse", "planned"):
        assert [line[name] for line in found] == pytest.approx(getattr(expected, name).tolist()), name
    advantages = [advantage for line in found for advantage in line["advantages"]]
    assert advantages == pytest.approx(expected.advantages.tolist())
    with pytest.raises(InputError, match="fusion is 'magic'; allowed: 'v05', 'calibrated'"):
        FuseConfig(fusion="magic")


def test_the_sample_is_of_all_blocks_alike(monkeypatch):
    monkeypatch.setattr("v05.fuse.PLOT_POINTS", 300)
    summary, priors = Summary(), (0.1, 0.2, 0.3)
    for prior in priors:
        block = [{"rewards": [1.0], "prior": prior}] * 1000
        summary.add(Decisions(block, FuseConfig()))
    counts = [int((summary.sample[:, 1] == prior).sum()) for prior in priors]
    assert sum(counts) == 300
    assert min(counts) > 70  # 100 of each are expected, with a deviation of 8


def test_blank_lines_are_skipped_and_counted(tmp_path):
    summary = fuse_file(write(tmp_path / "in.jsonl", GOOD, "\n", GOOD, " \r\n\n"), tmp_path / "out.jsonl")
    assert (summary.groups, summary.bad_lines) == (2, 0)
    assert len(read_lines(tmp_path / "out.jsonl")) == 2
    with pytest.raises(BadLine, match=r"in.jsonl:3: \[1\] is not an object"):
        fuse_file(write(tmp_path / "in.jsonl", GOOD, "\n", "[1]\n"), tmp_path / "out.jsonl")


@pytest.mark.parametrize("value", ["1e999", "-1e999", "NaN", '{"deep": [0, 1e999]}'])
def test_numbers_that_json_lacks_are_refused(value, tmp_path):
    line = f'{{"prompt": "a", "rewards": [1], "prior": 0, "x": {value}}}\n'
    with pytest.raises(BadLine, match=r"in.jsonl:1: x holds (-?inf|nan); allowed: finite numbers"):
        fuse_file(write(tmp_path / "in.jsonl", line), tmp_path / "out.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_standard_output_is_one_line(tmp_path):
    command = [sys.executable, "-c", "from v05.cli import main; main()", "fuse", write(tmp_path / "in.jsonl", GOOD)]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, encoding="utf-8")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "v05: No space left on device"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("option", "place", "said"),
    [
        ("--plot", "absent/f.png", "No such file or directory"),
        ("--plot", "f.nonsense", "'nonsense' is unknown; allowed: "),
        ("--plot", ".", "is a folder"),
        ("--output", ".", "is a folder"),
        ("--output", "absent/f.json", "No such file or directory"),
    ],
)
@pytest.mark.parametrize("command", ["fuse", "simulate"])
def test_outputs_are_refused_before_the_work(command, option, place, said, tmp_path, capsys, monkeypatch):
    def worked(*_, **__):
        raise AssertionError("the work was done")

    monkeypatch.setattr(v05.cli.fuse, "fuse_file", worked)
    monkeypatch.setattr(v05.cli.simulate, "compare", worked)
    given = [write(tmp_path / "in.jsonl", GOOD)] if command == "fuse" else []
    status, _, errors = run(capsys, monkeypatch, command, *given, option, tmp_path / place)
    assert status == 2
    assert said in errors


@pytest.mark.parametrize("arguments", [["fuse", "."], ["predict", "--prompts", "."], ["predict", "--context", "."]])
def test_a_folder_in_place_of_a_file_is_one_line(arguments, tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "in.jsonl", {"prompt": "a", "score": 1})
    monkeypatch.chdir(tmp_path)
    given = {"--context": file, "--prompts": file, "--cache": tmp_path / "cache"} if arguments[0] == "predict" else {}
    rest = [text for pair in given.items() if pair[0] not in arguments for text in pair]
    status, _, errors = run(capsys, monkeypatch, *arguments, *rest)
    assert (status, errors.strip()) == (2, "v05: .: Is a directory; allowed: a readable file, or - for standard input")


@pytest.mark.parametrize(
    ("values", "options", "warned"),
    [
        ([0, 1, 1, 0], [], True),
        ([0, 0], [], True),
        ([1, 1], [], False),
        ([0, 1, -1], [], False),
        ([0, 0.5, 1], [], False),
        ([0, 1], ["--reward-range", "-1", "1"], False),
        ([0, 1], ["--reward-range", "0", "1"], False),
    ],
)
@pytest.mark.parametrize("command", ["fuse", "predict"])
def test_rewards_of_0_and_1_under_the_default_range_are_warned_of(
    command, values, options, warned, tmp_path, capsys, monkeypatch
):
    if command == "fuse":
        given = [write(tmp_path / "in.jsonl", {"prompt": "a", "rewards": values, "prior": 0.5})]
    else:
        scored = [{"prompt": f"p{value}", "score": value} for value in values]
        given = ["--context", write(tmp_path / "in.jsonl", *scored), "--prompts", tmp_path / "in.jsonl"]
        given += ["--cache", tmp_path / "cache"]
    status, lines, errors = run(capsys, monkeypatch, command, *given, *options)
    assert status == 0
    message = "warning: all values are 0 or 1 and the range is -1 to 1; for 0 and 1 give --reward-range 0 1"
    assert (message in errors) == warned
    assert "warning" not in lines
