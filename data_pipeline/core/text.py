"""Text and numbers for people: lines, sizes, Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any


def finite(value: Any) -> Any:
    """Put None for numbers that are not finite, at any depth: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list | tuple) else value


def last_lines(text: str, count: int = 12) -> str:
    """Return the last ``count`` lines of ``text``."""
    return "\n".join(text.strip().splitlines()[-count:])


def human_bytes(size: float) -> str:
    """Format bytes: ``1536`` -> ``1.5 kB`` (powers of 1000, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def duration(seconds: float) -> str:
    """Format seconds: ``83`` -> ``1:23``; under a minute ``8.3 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def p_text(p_value: float) -> str:
    """Format a p-value: ``0.021``, ``< 0.001``."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def clock(time: int) -> str:
    """A time (in milliseconds since 1970) as people here write it: of today, without the day."""
    when = datetime.fromtimestamp(time / 1000)
    return f"{when:%H:%M}" if when.date() == datetime.now().date() else f"{when:%Y-%m-%d %H:%M}"


def first_line(error: BaseException) -> str:
    """Return an error's message, cut after its first line; its type where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def excerpt(text: str, characters: int = 160) -> str:
    """Return the beginning of ``text`` in one line."""
    return " ".join(text[: 2 * characters].split())[:characters]


def table(header: Sequence[str], rows: Iterable[Iterable[object]], align: Sequence[str] = ()) -> str:
    """Return a Markdown table; bars and line breaks in its cells stay text.

    Args:
        align: of each column, ``---``, ``:---`` or ``---:``; all the first where it is empty.
    """
    lines = [header, align or ["---"] * len(header), *(map(cell, row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def cell(value: object) -> str:
    """Return ``value`` as it may stand between the bars of a Markdown table."""
    text = str(value)
    return (text if len(text.splitlines()) < 2 else " ".join(text.split())).replace("|", "\\|")
