"""Charts as SVG, drawn by hand: points, lines, bands and levels over two axes are all that is needed here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 860, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 44, 54
COLOURS = ("#1f6fb4", "#d1495b", "#2e8b57", "#8a5fb0", "#b8860b", "#008b8b", "#555555")
TICKS = 6
SMALLEST = 1e-9
"""An axis whose largest value is below it is drawn as if it were empty."""

Points = Sequence[tuple[float, float]]


class Chart:
    """One chart. What is added is drawn in that order; axes begin at zero and end above the largest value."""

    def __init__(self, title: str, x_label: str, y_label: str) -> None:
        self._labels = (title, x_label, y_label)
        self._points: list[tuple[str, Points, str]] = []
        self._bands: list[tuple[float, float, str]] = []
        self._levels: list[tuple[float, str]] = []

    def points(self, points: Points, label: str) -> None:
        """Dots."""
        self._points.append(("dots", points, label))

    def line(self, points: Points, label: str) -> None:
        """A line through the points in their order."""
        self._points.append(("line", points, label))

    def band(self, begin: float, end: float, label: str) -> None:
        """A shaded stretch of the x axis."""
        self._bands.append((begin, end, label))

    def level(self, y: float, label: str) -> None:
        """A dashed line across."""
        self._levels.append((y, label))

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text(self.to_svg(), encoding="utf-8")

    def to_svg(self) -> str:
        """The document."""
        every = [point for _, points, _ in self._points for point in points]
        x_max = _rounded_up(max([x for x, _ in every] + [end for _, end, _ in self._bands], default=1.0))
        y_max = _rounded_up(max([y for _, y in every] + [y for y, _ in self._levels], default=1.0))

        def x_at(x: float) -> float:
            return LEFT + (WIDTH - LEFT - RIGHT) * x / x_max

        def y_at(y: float) -> float:
            return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y / y_max

        parts = [
            f'<rect x="{x_at(begin):.1f}" y="{TOP}" width="{x_at(end) - x_at(begin):.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}" fill="#f2e6c9"/>'
            + _text(x_at(begin) + 4, TOP + 14, label, anchor="start")
            for begin, end, label in self._bands
        ]
        for index in range(TICKS + 1):
            x, y = x_max * index / TICKS, y_max * index / TICKS
            parts += [
                f'<path d="M{LEFT} {y_at(y):.1f}H{WIDTH - RIGHT}" stroke="#e3e3e3"/>',
                _text(LEFT - 8, y_at(y) + 4, f"{y:g}", anchor="end"),
                _text(x_at(x), HEIGHT - BOTTOM + 18, f"{x:g}"),
            ]
        for index, (kind, points, label) in enumerate(self._points):
            colour = COLOURS[index % len(COLOURS)]
            placed = [(x_at(x), y_at(y)) for x, y in points]
            if kind == "line":
                path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
                parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            else:
                dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in placed)
                parts.append(f'<path d="{dots}" stroke="{colour}" stroke-width="3" stroke-linecap="round"/>')
            parts.append(_text(WIDTH - RIGHT, TOP + 14 + 16 * index, label, anchor="end", colour=colour))
        for y, label in self._levels:
            parts.append(f'<path d="M{LEFT} {y_at(y):.1f}H{WIDTH - RIGHT}" stroke="#333" stroke-dasharray="6 4"/>')
            parts.append(_text(LEFT + 4, y_at(y) - 5, label, anchor="start"))
        title, x_label, y_label = self._labels
        parts += [
            f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#333"/>',
            _text(LEFT, 24, title, anchor="start", size=15),
            _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_label),
            f'<g transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">{_text(0, 0, y_label)}</g>',
        ]
        body = "\n".join(parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" font-family="sans-serif">\n<rect width="100%" height="100%" fill="#fff"/>\n{body}\n'
            "</svg>\n"
        )


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 12, colour: str = "#333") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )


def _rounded_up(value: float) -> float:
    """The next number that divides into ticks well."""
    if value < SMALLEST:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1.2, 1.8, 2.4, 3, 3.6, 4.8, 6, 7.2, 9, 12) if step * power >= value)
