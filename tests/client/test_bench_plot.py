"""Charts are well-formed SVG with everything inside the frame."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from client.bench.plot import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart

VALUES = st.floats(0, 1e6)
POINTS = st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=20)
NAMESPACE = "{http://www.w3.org/2000/svg}"


@settings(deadline=None)
@given(POINTS, POINTS, VALUES, st.text(st.characters(categories=["L", "N", "P", "S"])))
def test_whatever_is_drawn_lies_inside_the_axes(
    dots: list[tuple[float, float]], line: list[tuple[float, float]], level: float, label: str
) -> None:
    chart = Chart(label, "x", "y")
    chart.points(dots, label)
    chart.line(line, "line")
    chart.level(level, "level")
    root = ElementTree.fromstring(chart.to_svg())
    drawn = [path for path in root.iter(f"{NAMESPACE}path") if path.get("stroke") in {"#1f6fb4", "#d1495b"}]
    assert len(drawn) == 2
    for path, points in zip(drawn, (dots, line), strict=True):
        places = [tuple(map(float, pair)) for pair in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path.get("d", ""))]
        assert len(places) == len(points)
        assert all(LEFT - 1 <= x <= WIDTH - RIGHT + 1 and TOP - 1 <= y <= HEIGHT for x, y in places)


def test_bands_and_levels_carry_their_labels() -> None:
    chart = Chart("title", "x", "y")
    chart.points([(0, 1), (4, 9)], "dots & more")
    chart.band(1, 2, "prefill")
    chart.level(20, "target")
    texts = [text.text for text in ElementTree.fromstring(chart.to_svg()).iter(f"{NAMESPACE}text")]
    assert {"title", "x", "y", "dots & more", "prefill", "target"} <= set(texts)
