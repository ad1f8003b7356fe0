"""Line plots as SVG whose colours follow the page's, light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from data_pipeline.core.text import duration
from flows.drawing import MaxNLocator

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 40
COLOURS = 8
"""That the page's style names; with more lines they begin again, dashed."""


@dataclass(frozen=True)
class Line:
    """One line of a plot."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Scale:
    """From values to places on the page."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = (self.high - self.low) or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)

    def ticks(self) -> list[float]:
        found = map(float, MaxNLocator(6).tick_values(self.low, self.high))
        return [tick for tick in found if self.low <= tick <= self.high]


def plot(lines: Sequence[Line], x_name: str, y_name: str) -> str:
    """An ``<svg>`` element with a line for each of ``lines`` and named axes."""
    xs, ys = [x for line in lines for x in line.x], [y for line in lines for y in line.y]
    across = Scale(low=min(xs), high=max(xs), start=LEFT, end=WIDTH - RIGHT)
    up = Scale(low=min(ys), high=max(ys), start=HEIGHT - BOTTOM, end=TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_name)} over {escape(x_name)}">'
    ]
    for tick in across.ticks():
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{shown(tick, x_name)}</text>'
        )
    for tick in up.ticks():
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for place, line in enumerate(lines):
        points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in zip(line.x, line.y, strict=True))
        parts.append(
            f'<polyline class="line {style(place)}" points="{points}"><title>{escape(line.name)}</title></polyline>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text></svg>')
    return "".join(parts)


def style(place: int) -> str:
    """The classes of the line at a place."""
    return f"c{place % COLOURS}" + (" dashed" if place >= COLOURS else "")


def shown(value: float, axis: str) -> str:
    """A tick's label."""
    if axis == "seconds":
        return duration(value)
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
