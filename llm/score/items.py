"""Items of a task, read from its file and checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import PinnedFile
from llm.score.config import TaskConfig
from llm.score.prompts import FIELDS, Item

OPTIONS = {"choice": ("choices", 2), "schema": ("context_options", 2), "generation": ("answers", 1)}
"""Kind -> the field that lists an item's options or right answers, and the least number of them."""


def read_items(task: TaskConfig, file: PinnedFile) -> list[Item]:
    """Return all items of a task.

    Raises:
        UserError: a line is no item of its kind; the message says which, and why.
    """
    items = [item for _, item in checked(task, file)]
    if not items:
        raise UserError(f"{file.path}: the task {task.name} has no items")
    if task.shots >= len(items):
        raise UserError(f"{file.path}: {task.shots} shots are to be drawn from {len(items) - 1} other items")
    return items


def checked(task: TaskConfig, file: PinnedFile) -> Iterator[tuple[int, Item]]:
    """Yield the items with their lines, empty lines left out."""
    for number, item in file.json_lines():
        if why_not := misfit(task, item):
            raise UserError(f"{file.path}, line {number}: no item of kind {task.kind}: {why_not}")
        yield number, item


def misfit(task: TaskConfig, item: Any) -> str:
    """Say why something is no item of a task's kind; nothing where it is one."""
    if not isinstance(item, dict):
        return "it is no JSON object"
    if missing := [field for field in FIELDS[task.kind] if field not in item]:
        return f"it lacks {', '.join(missing)}"
    listed, least = OPTIONS.get(task.kind, ("", 0))
    options = item[listed] if listed else []
    texts = [item[field] for field in FIELDS[task.kind] if field not in ("gold", listed)]
    if listed and (not isinstance(options, list) or len(options) < least):
        return f"{listed} must list {'two options' if least == 2 else 'an answer'} at least"
    if not all(isinstance(text, str) for text in [*texts, *options]):
        return "its texts must be strings"
    if not all(text.strip() for text in options) or not str(item.get("continuation", "-")).strip():
        return "what is scored is empty"
    gold = item.get("gold", 0)
    if type(gold) is not int or not 0 <= gold < max(1, len(options)):
        return f"gold is {gold!r}, and there are {len(options)} options, counted from 0"
    return ""
