"""What RESULTS.md makes of the rows of results.csv: the newest of each contender, losses first, a case in one line."""

import csv

import pytest

from benchmarks.report import latest, write
from v05.studies.table import StudyTable

ROW = dict(
    op="policy_loss", shape="64 tokens", dtype="float32", note="", other_load="0.1", versions="torch 2", flops="2"
)
ROW |= {"pass": "forward", "run": "2026-01-02T00:00:00Z", "commit": "abc", "timed_by": "wall", "bytes": "64"}
ROW |= dict(p20_ms="0.9", p80_ms="1.1", fraction_of_ceiling="0.5", peak_mib="1", host_us="", device="a CPU (AVX512)")
ROW |= dict(threads="2", architecture="", copy_gb_s="10", matrix_gflop_s="100")


def row(contender, p50_ms, ratio, **changes):
    return ROW | dict(contender=contender, p50_ms=p50_ms, ratio_to_ours=ratio) | changes


@pytest.fixture
def report(tmp_path):
    """The text of RESULTS.md for some rows."""

    def made_of(*rows):
        with (tmp_path / "results.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*ROW, "contender", "p50_ms", "ratio_to_ours"])
            writer.writeheader()
            writer.writerows(rows)
        write(tmp_path / "results.csv", tmp_path)
        return (tmp_path / "RESULTS.md").read_text(encoding="utf-8")

    return made_of


def test_a_case_is_one_line_beside_its_fastest_rival(report):
    text = report(row("v05", "1", "1"), row("torch eager", "3", "3"), row("torch.compile", "2", "2"))
    assert "| policy_loss | 64 tokens, float32, forward, 2 threads | 1 | 50% | torch.compile | 2 |" in text
    assert "Nowhere in these measurements." in text


def test_a_rival_that_wins_is_named_first_and_bold(report):
    text = report(row("v05", "1", "1"), row("v05, two ops", "0.4", "0.4"), row("torch.compile", "0.5", "0.5"))
    assert "* torch.compile: 0.50 of our time on policy_loss, 64 tokens, float32, forward, 2 threads" in text
    assert text.index("0.50 of our time") < text.index("## a CPU")
    assert "| torch.compile | **0.5** |" in text


def test_a_rival_that_is_missing_is_in_the_table_with_its_reason(report):
    text = report(row("v05", "1", "1"), row("flash-attn", "", "", note="not installed"))
    assert "| flash-attn | | | | | | | not installed |" in text
    assert "| policy_loss | 64 tokens" not in text  # nothing to compare it with


def test_a_case_s_contenders_are_listed_fastest_first(report):
    text = report(row("v05", "3", "1"), row("torch eager", "10", "3.3"), row("torch.compile", "2", "0.67"))
    table = text[text.index("| contender |") :]
    assert [line.split(" | ")[0] for line in table.splitlines()[2:5]] == ["| torch.compile", "| v05", "| torch eager"]
    assert "| torch.compile | **2** | " in table
    assert table.count("**") == 2


def test_a_time_says_what_to_know_of_it(report):
    busy, idle = row("v05", "1", "1", other_load="0.26"), row("verl", "4", "4", other_load="0.25")
    text = report(busy, idle, row("TRL", "5", "5", note="as released", timed_by="events"))
    assert "| others used 0.26 cores |" in text
    assert text.count("others used") == 1
    assert "| as released; ratio as called; by events |" in text


def test_studies_come_last(report, tmp_path):
    (tmp_path / "studies").mkdir()
    StudyTable("Priors", "v05 study prior", ["model", "auc"], [["V0", "0.8"]]).write(
        tmp_path / "studies" / "prior.json"
    )
    text = report(row("v05", "1", "1"), row("verl", "4", "4"))
    assert text.index("## a CPU") < text.index("## Studies\n\n### Priors.\n") < text.index("| V0 | 0.8 |")


def test_the_newest_measured_row_counts(report, tmp_path):
    later = "2026-01-03T00:00:00Z"
    rows = [row("v05", "1", "1"), row("verl", "4", "4"), row("renamed since", "2", "2")]
    text = report(*rows, row("v05", "0.8", "1", run=later), row("verl", "", "", run=later))
    assert [line["p50_ms"] for line in latest(tmp_path / "results.csv")] == ["0.8", "4"]
    assert "commit abc, 2026-01-03" in text


def test_each_device_has_its_own_part_and_plots(report, tmp_path):
    gpu = dict(device="a GPU", architecture="sm_90", threads="")
    text = report(
        row("v05", "1", "1"), row("verl", "4", "4"), row("v05", "1", "1", **gpu), row("verl", "9", "9", **gpu)
    )
    assert text.count("## a CPU (AVX512)\n") == text.count("## a GPU\n") == 1
    for name in ("policy_loss_cpu", "policy_loss_gpu", "roofline_cpu", "roofline_gpu"):
        assert f"![{name.split('_cpu')[0].split('_gpu')[0]}](plots/{name}.png)" in text
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 1000


def test_a_second_processor_has_plots_of_its_own_and_a_whole_step_is_on_no_roofline(report, tmp_path):
    other = dict(device="another CPU (AVX2)", op="trl_step")
    text = report(
        row("v05", "1", "1"), row("verl", "4", "4"), row("v05", "2", "1", **other), row("TRL", "9", "4", **other)
    )
    assert "![trl_step](plots/trl_step_cpu_2.png)" in text
    names = {file.name for file in (tmp_path / "plots").iterdir()}
    assert names == {"policy_loss_cpu.png", "roofline_cpu.png", "trl_step_cpu_2.png"}


def test_times_by_unlike_clocks_are_compared_as_called(report):
    """A graph's time has no host in it: 0.1 ms of GPU, for which a host takes 0.5, beside 2 ms by events."""
    gpu = dict(device="a GPU", architecture="sm_90", threads="")
    own = row("v05", "0.1", "1", timed_by="graph", host_us="500", **gpu)
    other = row("verl", "2", "20", timed_by="events", host_us="1800", **gpu)
    text = report(own, other, row("torch eager", "0.4", "4", timed_by="graph", host_us="900", **gpu))
    assert "| verl | 2 | 0.9 to 1.1 | 4 | 50% | 1 | 1,800 | ratio as called; by events |" in text
    assert "| torch eager | 0.4 | 0.9 to 1.1 | 4 | 50% | 1 | 900 | |" in text.replace("|  |", "| |")
