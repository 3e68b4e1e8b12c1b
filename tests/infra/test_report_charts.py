"""Charts are read back from their SVG and compared with the data."""

import math
import re

import numpy as np
import pytest

from lodeset.infra.report import charts


@pytest.mark.parametrize("seed", range(40))
def test_ticks_are_round_even_and_cover(seed: int) -> None:
    rng = np.random.default_rng(seed)
    low, high = sorted(rng.normal(size=2) * 10.0 ** rng.integers(-6, 7))
    most = int(rng.integers(3, 9))
    found = charts.ticks(low, high, most)
    steps = np.diff(found)
    assert found[0] <= low + 1e-6 * steps[0] and found[-1] >= high - 1e-6 * steps[0]
    assert 2 <= len(found) <= most + 1
    assert np.allclose(steps, steps[0])
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6


@pytest.mark.parametrize("value", [0.0, 3.0, -2e-9])
def test_ticks_of_a_single_value_surround_it(value: float) -> None:
    found = charts.ticks(value, value)
    assert found[0] < value < found[-1]


def test_a_line_lies_where_its_points_say() -> None:
    points = [(0.0, 0.0), (5.0, 10.0), (10.0, 5.0), (7.0, math.nan), (math.inf, 3.0)]
    svg = charts.line_chart([charts.Series("a & b", points, 1)], "x <m>", "y")
    drawn = re.search(r'<polyline class="line solid" points="([^"]+)"', svg)
    assert drawn is not None
    uv = np.array([pair.split(",") for pair in drawn[1].split()], np.float64)
    assert len(uv) == 3  # the points that are not finite are left out
    assert uv[1, 0] == pytest.approx((uv[0, 0] + uv[2, 0]) / 2, abs=0.1)
    assert uv[2, 1] == pytest.approx((uv[0, 1] + uv[1, 1]) / 2, abs=0.1)
    assert uv[1, 1] < uv[0, 1]  # upwards
    assert "a &amp; b" in svg and "x &lt;m&gt;" in svg and "<m>" not in svg


def test_bars_are_as_high_as_their_values() -> None:
    svg = charts.bar_chart([("a", 10.0), ("b", 5.0), ("<c>", 0.0)], "x", "n")
    heights = [float(h) for h in re.findall(r'<rect class="column c0"[^>]* height="([^"]+)"', svg)]
    assert heights[1] == pytest.approx(heights[0] / 2, abs=0.1) and heights[2] == 0
    assert "&lt;c&gt;" in svg


def test_spans_and_marks_share_an_axis() -> None:
    spans = [charts.Span("one", 0.0, 0.25, 0.5), charts.Span("two", 0.5, 0.75, 1.0, 1)]
    svg = charts.range_chart(spans, "x", [charts.Mark("limit", 0.5)])
    bars = [
        (float(x), float(w)) for x, w in re.findall(r'<rect class="span" x="([^"]+)" y="[^"]+" width="([^"]+)"', svg)
    ]
    mark = re.search(r'<line class="mark" x1="([^"]+)"', svg)
    assert mark is not None
    assert bars[0][0] + bars[0][1] == pytest.approx(bars[1][0], abs=0.2)
    assert float(mark[1]) == pytest.approx(bars[1][0], abs=0.2)


def test_nothing_to_draw_draws_nothing() -> None:
    assert charts.line_chart([charts.Series("a", [(1.0, math.nan)])], "x", "y") == ""
    assert charts.bar_chart([], "x", "y") == "" and charts.range_chart([], "x") == ""
