"""Which backend a benchmark's rows make the preferred one, and when a rival did the same work."""

import math

import torch

from benchmarks.harness import difference
from benchmarks.wins import wins_of

ROW = dict(op="advantage", architecture="sm_90", dtype="float32", elements="5000", shape="s", run="1", commit="c")
ROW |= {"pass": "forward", "host_us": "40", "p50_ms": "1", "note": ""}


def row(contender: str, **changes: str) -> dict[str, str]:
    return ROW | {"contender": contender} | changes


def orders(*rows: dict[str, str]) -> list[tuple[str, ...]]:
    return [win.order for win in wins_of(list(rows))]


def test_the_faster_backend_comes_first():
    assert orders(row("v05 cuda", p50_ms="2"), row("v05 triton", p50_ms="1")) == [("triton", "cuda")]
    assert orders(row("v05 cuda", p50_ms="1"), row("v05 triton", p50_ms="2")) == [("cuda", "triton")]


def test_a_backend_whose_numbers_differ_wins_nothing():
    wrong = row("v05 triton", p50_ms="1", note="differs from v05 by 0.3")
    assert orders(row("v05 cuda", p50_ms="2"), wrong) == []


def test_where_the_host_takes_longer_it_decides():
    slow_host = row("v05 triton", p50_ms="0.002", host_us="90")
    assert orders(row("v05 cuda", p50_ms="0.003"), slow_host) == [("cuda", "triton")]


def test_the_newest_run_of_the_slowest_pass_decides():
    old = (row("v05 cuda", p50_ms="1"), row("v05 triton", p50_ms="2"))
    new = (row("v05 cuda", p50_ms="3", run="2"), row("v05 triton", p50_ms="2", run="2"))
    assert orders(*old, *new) == [("triton", "cuda")]
    backward = {"pass": "forward + backward"}
    last = (row("v05 cuda", p50_ms="4", run="2", **backward), row("v05 triton", p50_ms="5", run="2", **backward))
    assert orders(*old, *new, *last) == [("cuda", "triton")]


def test_rivals_processors_and_single_backends_make_no_win():
    assert not orders(row("torch eager"), row("v05"), row("v05 cuda"))
    assert not orders(row("v05 cuda", architecture=""), row("v05 triton", architecture=""))
    assert not orders(row("v05 cuda", p50_ms=""), row("v05 triton"))


def test_a_rival_whose_numbers_are_not_ours_did_other_work():
    ours, theirs = torch.tensor([1.0, -math.inf, 4.0]), torch.tensor([1.0, -math.inf, 5.0])
    assert difference([ours], [ours]) == 0
    assert difference([theirs], [ours]) == 0.25
    assert difference([theirs], [ours, ours]) == 0.25  # a rival without the second output
    assert difference([torch.tensor([1.0, -math.inf, math.nan])], [ours]) == math.inf
