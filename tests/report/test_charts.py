"""Where the report's lines, ticks and grid go."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_engine.report.charts import MAX_POINTS, Series, line_chart, nice_ticks, smoothed

FINITE = st.floats(-1e12, 1e12, allow_nan=False)


@given(FINITE, FINITE)
def test_ticks_enclose_the_range_at_even_distances(a, b):
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high, 5)
    slack = 1e-6 * max(1e-9, abs(low), abs(high))
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 12
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert all(step == pytest.approx(steps[0], rel=1e-3) for step in steps)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 4, [0, 1, 2, 3, 4]),
        (0, 5e-4, [0, 2e-4, 4e-4, 6e-4]),
        (3, 3, [2.6, 2.8, 3.0, 3.2, 3.4]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert nice_ticks(low, high, 5) == pytest.approx(expected)


def test_points_are_percentages_from_the_top_left():
    chart = line_chart("t", [Series("s", [(0, 0.0), (5, 1.0), (10, 4.0)], "plain")])
    assert chart is not None
    assert chart.series[0].path == "M0.00,100.00 L50.00,75.00 L100.00,0.00"
    lowest, furthest = chart.y_ticks[0], chart.x_ticks[-1]
    assert (lowest.position, lowest.label) == (100, "0")
    assert (furthest.position, furthest.label) == (100, "10")


def test_all_charts_share_the_axis_of_steps():
    chart = line_chart("t", [Series("s", [(1, 1.0), (5, 2.0)], "plain")], last_step=10)
    assert chart is not None
    assert chart.x_range == (0, 10)


def test_values_that_are_not_finite_are_left_out():
    points = [(1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)]
    chart = line_chart("t", [Series("s", points, "plain"), Series("none", [], "raw")])
    assert chart is not None
    assert len(chart.series) == 1
    assert [step for step, _ in chart.readout[0]["points"]] == [1, 4]
    assert line_chart("t", [Series("s", [(1, math.nan)], "plain")]) is None


def test_a_long_run_is_thinned_but_keeps_its_spike():
    points = [(step, 1.0) for step in range(100_000)]
    points[54_321] = (54_321, 50.0)
    chart = line_chart("t", [Series("s", points, "plain")])
    assert chart is not None
    kept = chart.readout[0]["points"]
    assert len(kept) <= MAX_POINTS
    assert (54_321, "50") in kept
    steps = [step for step, _ in kept]
    assert steps == sorted(steps)


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant():
    assert smoothed([(1, 5.0), (2, 5.0)]) == [(1, 5.0), (2, pytest.approx(5.0))]
    noisy = [(i, 1.0 + (-1) ** i) for i in range(200)]
    assert all(abs(y - 1) < 0.2 for _, y in smoothed(noisy)[20:])
