"""What pictures show, read back from what was drawn."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from v05.estimates import Estimate
from v05.evaluate import Evaluation
from v05.fuse import FuseConfig, Summary
from v05.plots.baselines import plot_baseline_errors, plot_gradients
from v05.plots.evaluation import plot_evaluation
from v05.plots.fusion import plot_fusion
from v05.plots.reliability import plot_reliability
from v05.plots.simulation import plot_simulation
from v05.plots.training import plot_comparison, plot_run, plot_training
from v05.simulation import Result
from v05.studies.gradient import GradientQuality
from v05.studies.records import Cell
from v05.studies.training_report import Trained
from v05.training.compare import Curve
from v05.value.measure import Reliability

FILE = Path("not written.png")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were to be saved."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *given, **options: figures.append(figure))
    return figures


def widths(panel: Axes) -> list[float]:
    """How long the horizontal bars are."""
    return [bar.get_width() for bar in panel.patches]


def half_widths(panel: Axes) -> list[list[float]]:
    """Half the length of every error bar, by series."""
    series = [drawn for drawn in panel.collections if isinstance(drawn, LineCollection)]
    return [[float(np.ptp(ends, axis=0).max()) / 2 for ends in bars.get_segments()] for bars in series]


def band(panel: Axes) -> tuple[float, float]:
    """The lowest and the highest point of the first filled area."""
    heights = panel.collections[0].get_paths()[0].vertices[:, 1]
    return heights.min(), heights.max()


def test_an_evaluation_is_in_per_cent_and_counts_problems(drawn: list[Figure]) -> None:
    passed = {1: Estimate(0.25, 0.125, 0.5), 2: Estimate(0.5, 0.25, 0.75)}
    plot_evaluation(Evaluation(4, 2, passed[1], passed, 0.0, 9.0, 0, 0, (0, 2, 2, 1)), "title", FILE)
    curve, bars = drawn[0].axes
    assert curve.lines[0].get_xydata().tolist() == [[1, 25], [2, 50]]
    assert band(curve) == (12.5, 75)
    assert [bar.get_height() for bar in bars.patches] == [1, 1, 2]


def test_reliability_has_intervals_of_95_per_cent(drawn: list[Figure]) -> None:
    curve = Reliability(np.array([0.2, 0.6]), np.array([0.3, 0.5]), np.array([0.1, 0.05]), np.ones(2))
    plot_reliability({"V0": curve}, "title", FILE)
    (panel,) = drawn[0].axes
    assert panel.containers[0][0].get_xydata().tolist() == [[0.2, 0.3], [0.6, 0.5]]
    assert half_widths(panel)[0] == pytest.approx([0.196, 0.098])
    assert panel.get_legend().texts[0].get_text() == "V0 (mean gap 0.100)"


def test_errors_of_baselines_stand_at_their_prior(drawn: list[Figure]) -> None:
    cells = [Cell("sd 0.1", 2, "dr_grpo", 0.5, 0.25), Cell("sd 0.3", 2, "dr_grpo", 0.75, 0.125)]
    cells += [Cell("sd 0.1", 4, "dr_grpo", 0.375, 0.0625), Cell("sd 0.1", 2, "v05", 0.25, 0.03125)]
    plot_baseline_errors(cells, FILE)
    two, four = drawn[0].axes
    assert [bars[0].get_ydata().tolist() for bars in two.containers] == [[0.5, 0.75], [0.25]]
    assert half_widths(two) == [[0.25, 0.125], [0.03125]]
    places = [bars[0].get_xdata().tolist() for bars in two.containers]
    assert places == [pytest.approx([-0.06, 0.94]), pytest.approx([0.06])]
    assert four.containers[0][0].get_ydata().tolist() == [0.375]


def test_the_variance_of_a_gradient_is_for_each_rollout_and_sorted(drawn: list[Figure]) -> None:
    common = dict(factor=1.0, bias=0.0, bias_half_width=0.0, variance_half_width=0.125, between=0.25)
    rows = [
        GradientQuality(name, "constant", size, size, rollouts=size, variance=variance, **common)
        for name, size, variance in (("v05", 2, 0.5), ("rloo", 4, 0.75))
    ]
    plot_gradients(rows, FILE)
    (panel,) = drawn[0].axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["rloo:4", "v05:2"]
    assert widths(panel) == [4 * 0.75, 2 * 0.5, 4 * 0.25, 2 * 0.25]
    assert [bar.get_x() for bar in panel.patches] == [0, 0, 3, 1]
    assert half_widths(panel) == [[0.5, 0.25]]


def test_a_simulation_shows_time_over_ideal_and_v05s_error(drawn: list[Figure]) -> None:
    numbers = dict(rollouts=4.0, time=9.0, busy=1.0, error_mean=0.5, error_calibrated=0.125, stale=0.0, stalest=0)
    results = [
        Result("look-ahead", mode, tokens=tokens, over_ideal=over, error_v05=error, **numbers)
        for mode, tokens, over, error in (("barrier", 1e6, 4.0, 0.25), ("stream", 2e6, 1.5, 0.375))
    ]
    plot_simulation(results, FILE)
    left, right = drawn[0].axes
    assert widths(left) == [4, 1.5]
    assert [dots.get_offsets().tolist() for dots in right.collections] == [[[1, 0.25]], [[2, 0.375]]]


def test_fusion_shows_the_noise_of_the_first_rollouts(drawn: list[Figure]) -> None:
    sample = np.array([[0.0, -0.5, 0.5, 0.75], [0.0, 1.0, 0.0, 0.25]])
    summary = Summary(groups=2, conflicts=1, planned=20, plans={16: 1, 4: 1}, sample=sample)
    plot_fusion(summary, FuseConfig(reward_range=(-2.0, 2.0), k_init=16), FILE)
    left, right = drawn[0].axes[:2]
    assert band(left) == (-2.5, 2.5)  # the deviation of a mean of 16 is at most half the range over 4
    dots = left.collections[1]
    assert np.abs(dots.get_offsets() - sample[:, 1:3]).max() < 0.15  # moved apart by 0.03 at random
    assert dots.get_array().tolist() == [0.75, 0.25]
    assert "2 prompts, 50% in conflict" in left.get_title()
    assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in right.patches] == [(4, 1), (16, 1)]
    assert right.get_title() == "10.00 per prompt"


def test_a_run_shows_shares_of_prompts_against_rollouts(drawn: list[Figure]) -> None:
    line = dict(update=0, rollouts=0, prompts=0, conflicts=0, rollouts_per_prompt=0, heldout_right=None)
    evaluated = [
        line | dict(heldout_right=16, heldout_total=64, heldout_worth=48),
        line | dict(rollouts=64, heldout_right=32, heldout_total=64, heldout_worth=64),
    ]
    updates = [line | dict(update=1, rollouts=64, prompts=16, conflicts=4, rollouts_per_prompt=4.0)]
    plot_run([*evaluated, *updates], "v05", FILE)
    accuracy, conflicts, rollouts = drawn[0].axes
    assert accuracy.lines[0].get_xydata().tolist() == [[0, 25], [64, 50]]
    assert band(accuracy)[0] == pytest.approx(25 - 196 * 0.0625)  # the root of 0.25 x 0.75 / 48
    assert conflicts.lines[0].get_xydata().tolist() == [[64, 25]]
    assert rollouts.lines[0].get_xydata().tolist() == [[64, 4]]


def test_training_is_drawn_against_rollouts_and_against_seconds(drawn: list[Figure]) -> None:
    accuracy = np.array([[0.25, 0.0], [0.25, 0.5], [0.25, 0.75], [0.25, 0.75]])
    seconds = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 2.0], [0.0, 8.0]])
    plot_training([Trained(Curve("v05", (0, 64), accuracy), seconds, 1e-4, 4.0)], 0.625, FILE)
    by_rollouts, by_seconds = drawn[0].axes
    assert by_rollouts.lines[0].get_xydata().tolist() == [[0, 25], [64, 62.5]]  # the mean of the two in the middle
    assert by_seconds.lines[0].get_xydata().tolist() == [[0, 25], [3, 62.5]]
    assert [panel.lines[1].get_ydata() for panel in (by_rollouts, by_seconds)] == [[62.5, 62.5]] * 2
    plot_comparison({"v05": ((0, 64), accuracy)}, FILE)
    (panel,) = drawn[1].axes
    assert panel.lines[0].get_xydata().tolist() == [[0, 25], [64, 50]]
    assert band(panel) == (0, 75)
