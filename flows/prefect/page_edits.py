"""Changes to deployments that people made on Prefect's pages: seen, shown and kept when a file is registered again.

To register a file replaces what the server has: a schedule edited there, a pause, a parameter. A home keeps what the
server had after the last registration; a field that has another value there by now was changed on a page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from data_pipeline.core.files import write_durably
from flows.prefect.form import without_defaults
from flows.prefect.schedules import KINDS, PREFECTS_START, expression

Fields = dict[str, Any]
"""The fields of a deployment that a page can change, as a prefect.yaml writes them."""


@dataclass(frozen=True)
class Edit:
    """One field of a deployment that has another value on the server than the one registered last."""

    deployment: str
    field: str
    page: Any
    file: Any

    def __str__(self) -> str:
        return (
            f"{self.deployment}: {self.field.replace('_', ' ')} on Prefect's page: {shown(self.page)} "
            f"(the file says {shown(self.file)})"
        )


def fields_on_server(entry: Mapping[str, Any]) -> Fields:
    """Fields of a deployment as the API returns it."""
    limit = entry.get("global_concurrency_limit") or {}
    options = entry.get("concurrency_options") or {}
    concurrency = {"limit": limit.get("limit"), "collision_strategy": options.get("collision_strategy")}
    schedules = [
        {**one["schedule"], **{name: one.get(name) for name in ("active", "parameters", "slug")}}
        for one in entry["schedules"]
    ]
    return {
        "schedules": normal_schedules(schedules),
        "paused": bool(entry["paused"]),
        "parameters": parameters_on_server(entry["parameters"]),
        "tags": sorted(entry["tags"]),
        "description": entry.get("description") or "",
        "concurrency_limit": concurrency if limit.get("limit") else None,
        "work_pool": {"name": entry["work_pool_name"], "job_variables": entry.get("job_variables") or {}},
    }


def parameters_on_server(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a deployment without what its form only shows."""
    kept = {name: value for name, value in parameters.items() if name not in ("config", "defaults")}
    config = without_defaults(parameters.get("config") or {}, parameters.get("defaults") or {})
    return kept | ({"config": config} if config else {})


def fields_in_file(entry: Mapping[str, Any]) -> Fields:
    """Fields of a deployment as a prefect.yaml has it."""
    plain = json.loads(json.dumps(entry, default=str, allow_nan=False))
    limit = plain.get("concurrency_limit")
    if isinstance(limit, int):
        limit = {"limit": limit, "collision_strategy": None}
    pool = plain.get("work_pool") or {}
    return {
        "schedules": normal_schedules(plain.get("schedules") or []),
        "paused": bool(plain.get("paused", False)),
        "parameters": plain.get("parameters") or {},
        "tags": sorted(plain.get("tags") or []),
        "description": plain.get("description") or "",
        "concurrency_limit": limit or None,
        "work_pool": {"name": pool.get("name"), "job_variables": pool.get("job_variables") or {}},
    }


def normal_schedules(schedules: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Schedules in one order, with defaults written out or left out alike for file and server."""
    normal = []
    for schedule in schedules:
        kept = {name: schedule[name] for name in (*KINDS, "slug") if schedule.get(name)}
        if "rrule" in kept:
            kept["rrule"] = kept["rrule"].removeprefix(PREFECTS_START)
        if "interval" in kept:
            kept["interval"] = float(kept["interval"])
            if schedule.get("anchor_date"):
                kept["anchor_date"] = datetime.fromisoformat(schedule["anchor_date"]).isoformat()
        if schedule.get("day_or") is False:
            kept["day_or"] = False
        if schedule.get("parameters"):
            kept["parameters"] = schedule["parameters"]
        zone, active = schedule.get("timezone") or "UTC", bool(schedule.get("active", True))
        normal.append({**kept, "timezone": zone, "active": active})
    return sorted(normal, key=json.dumps)


def find_edits(
    entries: Mapping[str, Mapping[str, Any]],
    server: Sequence[Mapping[str, Any]],
    registered: Mapping[str, Fields],
) -> list[Edit]:
    """Fields that were changed on a page since the last registration, and differ from the file.

    Args:
        entries: name -> the deployment in the file.
        server: deployments as the API returns them.
        registered: id -> fields as `remember` kept them; of a deployment that it lacks, each difference is an edit.
    """
    edits = []
    for known in server:
        if known["name"] not in entries:
            continue
        page, file = fields_on_server(known), fields_in_file(entries[known["name"]])
        before = registered.get(known["id"], file)
        edits += [
            Edit(deployment=known["name"], field=field, page=page[field], file=file[field])
            for field in page
            if page[field] != before.get(field, file[field]) and page[field] != file[field]
        ]
    return edits


def keep(entry: dict[str, Any], edit: Edit) -> None:
    """Write what a page says into a deployment of the file."""
    if edit.field == "work_pool":
        entry["work_pool"] = {**entry.get("work_pool", {}), **edit.page}
    else:
        entry[edit.field] = edit.page


def shown(value: Any) -> str:
    """A field's value on one line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(shown_schedule(schedule) for schedule in value)
    if value in ([], {}, None, ""):
        return "none"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def shown_schedule(schedule: Mapping[str, Any]) -> str:
    """``0 2 * * * Europe/Berlin``."""
    return f"{expression(schedule)}{'' if schedule['active'] else ' (off)'}"


def place(home: Path) -> Path:
    return home / "servers" / "deployments.json"


def remembered(home: Path) -> dict[str, Fields]:
    """Id -> fields, as the server had them after the last registration from this home."""
    try:
        return json.loads(place(home).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # without it each difference counts as an edit, and is shown
        return {}


def remember(home: Path, server: Sequence[Mapping[str, Any]]) -> None:
    """Keep what the server has right after a registration."""
    kept = remembered(home) | {known["id"]: fields_on_server(known) for known in server}
    place(home).parent.mkdir(parents=True, exist_ok=True)
    write_durably(place(home), json.dumps(kept, indent=1, ensure_ascii=False, allow_nan=False))
