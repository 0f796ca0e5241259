"""`v05 fuse`: real records against numpy, pass-through, malformed lines, bounded memory, and what a user sees."""

import json
import os
import signal
import subprocess
import sys
import time
from subprocess import PIPE

import numpy as np
import pytest
import torch
from commands import run, write
from records import read_lines, sparse_records, v0_folder

from v05.errors import BadLine, InputError
from v05.fuse import FuseConfig, fuse_file
from v05.kernels import dispatch, group_advantage
from v05.plots.fusion import plot_fusion

GOOD = {"prompt": "2+2", "rewards": [-1, -1, -1, -1], "prior": 0.6, "id": 7, "nested": {"a": [1, None]}}


def test_published_records_against_numpy(tmp_path):
    records = sparse_records(v0_folder())
    assert len(records) == 2560
    source = write(tmp_path / "records.jsonl", *records)
    summary = fuse_file(source, tmp_path / "out.jsonl")
    rewards = np.array([record["rewards"] for record in records])
    prior = np.array([record["prior"] for record in records])
    mean = rewards.mean(1)
    d = np.maximum(0, (mean - prior) ** 2 - 1 / 4)
    w = d / (d + 1 / 4)
    k = np.full(len(records), 4)
    for _ in range(12):
        k += (k < 16) & (d**2 / ((k * d + 1) * ((k + 1) * d + 1)) > 1 / 256)
    assert (summary.groups, summary.rollouts) == (2560, 10240)
    assert summary.conflicts == (d > 0).sum() > 100
    assert summary.undecided == (k > 4).sum()
    assert summary.planned == k.sum()
    assert summary.plans == {int(plan): int((k == plan).sum()) for plan in np.unique(k)}
    assert summary.prior_sum == pytest.approx(prior.sum())
    assert summary.mean_sum == pytest.approx(mean.sum())
    assert summary.weight_sum == pytest.approx(w.sum())
    assert summary.baseline_sum == pytest.approx((w * mean + (1 - w) * prior).sum())
    assert summary.mse_sum == pytest.approx((d / (4 * d + 1)).sum())
    lines = read_lines(tmp_path / "out.jsonl")
    advantages = np.array([line["advantages"] for line in lines])
    np.testing.assert_allclose(advantages, rewards - (w * mean + (1 - w) * prior)[:, None], atol=1e-12)
    assert [line["planned"] for line in lines] == k.tolist()
    assert [line["prompt"] for line in lines] == [record["prompt"] for record in records]


def test_a_decision_and_the_keys_that_pass_through(tmp_path):
    source = write(tmp_path / "in.jsonl", GOOD, {"prompt": "", "rewards": [], "prior": 0.25})
    fuse_file(source, tmp_path / "out.jsonl")
    first, second = read_lines(tmp_path / "out.jsonl")
    assert {key: first[key] for key in GOOD} == GOOD
    assert first["baseline"] == pytest.approx(-0.84375)
    assert first["conflict"] is first["roll_out_more"] is True
    assert first["planned"] == 16
    assert first["mse"] == pytest.approx(0.2255859375)
    assert first["advantages"] == pytest.approx([-0.15625] * 4)
    assert (second["baseline"], second["planned"], second["advantages"]) == (0.25, 4, [])


def test_running_it_on_its_own_output_changes_nothing(tmp_path):
    first, second = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    fuse_file(write(tmp_path / "in.jsonl", GOOD), first)
    fuse_file(str(first), second)
    assert first.read_text() == second.read_text()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken\n", "not JSON: Expecting property name"),
        ("[1, 2]\n", r"\[1, 2\] is not an object"),
        ('{"prompt": "a", "rewards": [1]}\n', "key 'prior' is missing"),
        ({**GOOD, "prompt": 3}, "prompt is 3; allowed: a string"),
        ({**GOOD, "rewards": "1"}, 'rewards is "1"; allowed: a list'),
        ({**GOOD, "rewards": [1, True]}, r"rewards\[1\] is true; allowed: a number from -1 to 1"),
        ({**GOOD, "rewards": [1, None]}, r"rewards\[1\] is null"),
        ({**GOOD, "rewards": [1, 2]}, r"rewards\[1\] is 2; allowed: -1 to 1"),
        ({**GOOD, "rewards": [float("nan")]}, r"rewards\[0\] is nan"),
        ({**GOOD, "rewards": [10**400]}, r"rewards\[0\] is 10{39}; allowed: -1 to 1"),
        ({**GOOD, "prior": -1.5}, "prior is -1.5; allowed: -1 to 1"),
    ],
)
def test_a_malformed_line_stops_it_and_leaves_nothing(tmp_path, line, reason):
    source = write(tmp_path / "in.jsonl", GOOD, line, GOOD)
    with pytest.raises(BadLine, match=rf"in.jsonl:2: {reason}"):
        fuse_file(source, tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(BadLine, match="2: not UTF-8 at byte 12"):
        fuse_file(str(tmp_path / "in.jsonl"), tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'\xff\xfe{"prompt": "a"}\n', "not UTF-8 at byte 0"),
        (json.dumps(GOOD).encode("utf-16") + b"\n", "not UTF-8 at byte 0"),
        (json.dumps(GOOD).encode("utf-16-le") + b"\n", "not JSON: "),
        (b'{"prompt": "\xed\xa0\x80"}\n', "not UTF-8 at byte 12"),
        (b'\xef\xbb\xbf{"prompt": "\xff"}\n', "not UTF-8 at byte 15"),
        (b'{"prompt": "a"\n', "not JSON: Expecting ',' delimiter at column 15"),
        (b'{"prompt":\r\n', "not JSON: Expecting value at column 11"),
    ],
)
def test_where_a_line_is_wrong(line, reason, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(line)
    with pytest.raises(BadLine) as caught:
        fuse_file(str(tmp_path / "in.jsonl"), tmp_path / "out.jsonl")
    assert caught.value.reason.startswith(reason)


def test_a_byte_order_mark_of_utf8_is_no_part_of_the_record(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n")
    assert fuse_file(str(tmp_path / "in.jsonl"), tmp_path / "out.jsonl").groups == 1


def test_skip_bad_sets_lines_aside(tmp_path):
    source = write(tmp_path / "in.jsonl", GOOD, "{broken\n", GOOD, {**GOOD, "prior": 7})
    summary = fuse_file(source, tmp_path / "out.jsonl", FuseConfig(skip_bad=True))
    assert (summary.groups, summary.bad_lines) == (2, 2)
    aside = read_lines(tmp_path / "out.bad.jsonl")
    assert [line["line"] for line in aside] == [2, 4]
    assert aside[0]["text"] == "{broken"
    assert aside[1]["reason"] == "prior is 7; allowed: -1 to 1"
    assert len(read_lines(tmp_path / "out.jsonl")) == 2


def test_an_empty_file_is_no_error(tmp_path):
    summary = fuse_file(write(tmp_path / "in.jsonl"), tmp_path / "out.jsonl")
    assert summary.groups == 0
    assert (tmp_path / "out.jsonl").read_text() == ""
    plot_fusion(summary, FuseConfig(), tmp_path / "plot.png")


def test_blocks_do_not_show(tmp_path):
    """24,500 lines in blocks of 8,192 give the sums of the lines, and a sample that is bounded."""
    rng = np.random.default_rng(0)
    records = [
        {"prompt": "", "rewards": rng.choice([0.0, 1.0], rng.integers(0, 9)).tolist(), "prior": float(rng.random())}
        for _ in range(24_500)
    ]
    read = []
    source = write(tmp_path / "in.jsonl", *records)
    summary = fuse_file(source, tmp_path / "out.jsonl", FuseConfig(reward_range=(0, 1)), read.append)
    assert len(read) == 3
    assert read[-1] == (tmp_path / "in.jsonl").stat().st_size
    lines = read_lines(tmp_path / "out.jsonl")
    assert summary.planned == sum(line["planned"] for line in lines)
    assert summary.baseline_sum == pytest.approx(sum(line["baseline"] for line in lines))
    assert len(summary.sample) == 20_000 < summary.groups_with_rollouts


def test_the_batch_whose_spread_scales_is_the_whole_file(tmp_path):
    rewards = [[1, -1], *[[1, 1]] * 8191, [-1]]
    source = write(tmp_path / "in.jsonl", *({"prompt": "", "rewards": group, "prior": 0} for group in rewards))
    fuse_file(source, tmp_path / "out.jsonl", FuseConfig(scale="batch"))
    lines = read_lines(tmp_path / "out.jsonl")
    flat = torch.tensor([reward for group in rewards for reward in group], dtype=torch.float64)
    offsets = torch.tensor([0, *np.cumsum([len(group) for group in rewards])])
    prior = torch.zeros(len(rewards), dtype=torch.float64)
    expected = group_advantage(flat, offsets, prior=prior, scale="batch")
    assert lines[-1]["advantages"] == pytest.approx(expected[-1:].tolist())
    assert lines[0]["advantages"] == pytest.approx(expected[:2].tolist())


def test_half_a_pair_of_surrogates_passes_through(tmp_path):
    source = write(tmp_path / "in.jsonl", {**GOOD, "prompt": "é"}, {**GOOD, "prompt": "cut off \ud83d"})
    fuse_file(source, tmp_path / "out.jsonl")
    assert [line["prompt"] for line in read_lines(tmp_path / "out.jsonl")] == ["é", "cut off \ud83d"]
    assert '"é"' in (tmp_path / "out.jsonl").read_text("utf-8")


def test_a_million_lines_would_not_fill_memory(tmp_path):
    """Peak memory of 60,000 more lines stays within a block's worth."""
    line = json.dumps({"prompt": "x" * 400, "rewards": [1, 1, -1, -1], "prior": 0.0}) + "\n"
    peaks = []
    for lines in (20_000, 80_000):
        (tmp_path / "in.jsonl").write_text(line * lines)
        script = (
            "import re, sys\nfrom pathlib import Path\nfrom v05.fuse import fuse_file\n"
            "fuse_file(sys.argv[1], Path(sys.argv[2]))\n"
            "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
        )
        command = [sys.executable, "-c", script, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] - peaks[0] < 20_000  # KiB; the lines themselves are 60,000 x 460 bytes = 27,000 KiB


def test_settings_and_paths_that_are_not_allowed(tmp_path):
    with pytest.raises(InputError, match="k_init is 5 and k_max 4"):
        FuseConfig(k_init=5, k_max=4)
    with pytest.raises(InputError, match="No such file"):
        fuse_file(str(tmp_path / "absent.jsonl"), tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="No such file"):
        fuse_file(write(tmp_path / "in.jsonl", GOOD), tmp_path / "absent" / "out.jsonl")
    with pytest.raises(InputError, match="is a folder; allowed: a file"):
        fuse_file(write(tmp_path / "in.jsonl", GOOD), tmp_path)


def test_links_and_pipes_are_not_replaced(tmp_path):
    source = write(tmp_path / "in.jsonl", GOOD)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "elsewhere" / "out.jsonl")
    fuse_file(source, tmp_path / "link.jsonl")
    assert len(read_lines(tmp_path / "elsewhere" / "out.jsonl")) == 1
    assert (tmp_path / "link.jsonl").is_symlink()
    os.mkfifo(tmp_path / "pipe")  # as /dev/null, which root could replace
    with pytest.raises(InputError, match="pipe is a device or a pipe; allowed: a file"):
        fuse_file(source, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_command_line(tmp_path, capsys, monkeypatch):
    source = write(tmp_path / "in.jsonl", {**GOOD, "prompt": "é"}, {**GOOD, "rewards": [1, 1, 1, -1]})
    status, lines, table = run(capsys, monkeypatch, "fuse", source)
    assert status == 0
    assert [json.loads(line)["planned"] for line in lines.splitlines()] == [16, 4]
    assert "conflicts" in table
    plot = tmp_path / "plot.png"
    arguments = ("--output", tmp_path / "out.jsonl", "--plot", plot, "--k-max", 8)
    status, table, _ = run(capsys, monkeypatch, "fuse", source, *arguments)
    assert status == 0
    assert "planned per prompt" in table
    assert "6.00" in table
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_standard_input_in_a_process_of_its_own():
    command = [sys.executable, "-c", "from v05.cli import main; main()", "fuse", "-", "--reward-range", "0", "1"]
    record = '{"prompt":"é","rewards":[1],"prior":0.5}\n'
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, input=record, capture_output=True, encoding="utf-8", check=True, env=ascii_only)
    assert json.loads(done.stdout)["prompt"] == "é"
    assert json.loads(done.stdout)["planned"] == 4
    assert "prompts" in done.stderr


def not_ignored():
    """A process started in the background may inherit that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("command", ["fuse", "predict"])
def test_a_signal_leaves_what_was_there_and_no_more(command, tmp_path):
    output, bad = tmp_path / "out.jsonl", tmp_path / "out.bad.jsonl"
    output.write_text("old\n")
    start = [sys.executable, "-c", "from v05.cli import main; main()", command, "--output", output, "--skip-bad"]
    if command == "predict":
        context = write(tmp_path / "done.jsonl", *({"prompt": str(n), "score": (-1) ** n} for n in range(20)))
        start += ["--context", context, "--prompts", "-", "--cache", tmp_path / "cache.sqlite"]
    else:
        start += ["-"]
    statuses = []
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(start, stdin=PIPE, stdout=PIPE, stderr=PIPE, preexec_fn=not_ignored)
        process.stdin.write(b"nonsense\n" * 8192)
        process.stdin.flush()
        while process.poll() is None and not list(tmp_path.glob(".out.bad.*.part")):
            time.sleep(0.01)
        assert list(tmp_path.glob(".out.jsonl.*.part"))
        process.send_signal(number)
        errors = process.communicate()[1].decode()
        statuses.append(process.returncode)
        assert "Traceback" not in errors
        assert not list(tmp_path.glob(".*.part"))
        assert output.read_text() == "old\n"
        assert not bad.exists()
    assert statuses[0] == statuses[1] != 0


def test_command_line_errors_exit_with_two(tmp_path, capsys, monkeypatch):
    source, output = write(tmp_path / "in.jsonl", GOOD, "nonsense\n"), tmp_path / "out.jsonl"
    status, _, errors = run(capsys, monkeypatch, "fuse", source, "--output", output)
    assert status == 2
    assert errors.strip().endswith(f"v05: {source}:2: not JSON: Expecting value at column 1")
    assert not output.exists()
    status, lines, _ = run(capsys, monkeypatch, "fuse", source)
    assert (status, lines) == (2, "")
    assert run(capsys, monkeypatch, "fuse", source, "--output", output, "--skip-bad")[0] == 0
    assert (tmp_path / "out.bad.jsonl").exists()
    for wrong in (("--k-init", 99), ("--scale", "loud"), ("--plot", tmp_path / "plot.nonsense")):
        assert run(capsys, monkeypatch, "fuse", source, "--skip-bad", *wrong)[0] == 2, wrong


def test_doctor_names_every_op_and_backend(capsys, monkeypatch):
    status, text, _ = run(capsys, monkeypatch, "doctor")
    assert status == 0
    assert all(name in text for name in (*dispatch.OPS, "cuda", "triton", "cpu"))
