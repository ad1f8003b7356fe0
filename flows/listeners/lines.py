"""A run's events as they come, for scripts: one JSON object a line (docs/run-log.md)."""

from __future__ import annotations

import json
from typing import TextIO

from flows.engine.events import SCHEMA, Event


class LinesListener:
    """Writes each event on a line of its own; the first line has the version of the schema."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._write({"event": "log", "schema": SCHEMA})

    def handle(self, event: Event) -> None:
        values = event.as_json()
        values.pop("html", None)  # of a page, which no line needs
        self._write(values)

    def close(self) -> None:
        self._out.flush()

    def _write(self, values: object) -> None:
        self._out.write(json.dumps(values, allow_nan=False, ensure_ascii=False) + "\n")
        self._out.flush()
