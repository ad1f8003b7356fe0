"""Tables of what a model wrote while it was trained: files of a run that MLflow's pages show a page at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flows.listeners.mlflow.points import PLAIN

SAMPLES = "samples.json"
COLUMNS = ("step", "tokens", "prompt", "text")
TABLES = "mlflow.loggedArtifacts"
"""Tag of a run by which MLflow's pages know which of its files are tables."""
KINDS = ('{"event": "samples"', '{"event": "rollback"')
"""Beginnings of the lines of a training's events that a table is made of."""


def samples_of(step_name: str) -> str:
    """The file on the page of the whole run that has a training's samples."""
    return SAMPLES if step_name == PLAIN else f"{step_name}/{SAMPLES}"


def is_sample(line: str) -> bool:
    """Whether a line of a training's events has samples."""
    return line.startswith(KINDS[0])


def samples_table(key: str, name: str, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The operation that gives a run all samples among the lines of a training, each step's once; none without any."""
    by_step: dict[int, list[list[Any]]] = {}
    for event in (json.loads(line) for line in lines if line.startswith(KINDS)):
        if event["event"] == "rollback":
            by_step = {step: rows for step, rows in by_step.items() if step <= event["to"]}
            continue
        step, tokens = event["step"], event["tokens"]
        by_step[step] = [[step, tokens, one["prompt"], one["text"]] for one in event["samples"]]
    if by_step:
        rows = [row for rows in by_step.values() for row in rows]
        yield {"op": "table", "run": key, "name": name, "columns": list(COLUMNS), "data": rows}


def tables_of(tags: Mapping[str, str]) -> list[str]:
    """The files of a run that are tables."""
    return [one["path"] for one in json.loads(tags.get(TABLES, "[]")) if one["type"] == "table"]


def tables_tag(names: Iterable[str]) -> str:
    """The value of `TABLES`."""
    return json.dumps([{"path": name, "type": "table"} for name in names], allow_nan=False)
