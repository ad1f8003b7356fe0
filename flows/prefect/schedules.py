"""Schedules of a deployment: made from the command line's options, written in words, and their next times.

Prefect computes the times, so its own classes check a schedule here, and say when it is due.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

from data_pipeline.core.errors import UserError
from data_pipeline.core.text import first_line

Schedule = Mapping[str, Any]
"""A schedule as a prefect.yaml has it, or the API within an entry's ``schedule``."""

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SHORTEST = timedelta(minutes=1)
CHECKED = 10
"""Times to come of which each must be a minute after the one before."""
PREFECTS_START = "DTSTART:20200101T000000\n"
"""The start that Prefect writes before a rule that has none."""
KINDS = ("cron", "interval", "rrule")
FIELDS = (*KINDS, "anchor_date", "day_or", "timezone")


@dataclass(frozen=True)
class Wanted:
    """Options of the command line about schedules."""

    cron: Sequence[str] = ()
    every: Sequence[str] = ()
    rrule: Sequence[str] = ()
    timezone: str | None = None
    paused: bool = False

    def __bool__(self) -> bool:
        return bool(self.cron or self.every or self.rrule)


def make_schedules(
    wanted: Wanted, known: Iterable[Schedule] = (), now: datetime | None = None
) -> list[dict[str, Any]]:
    """Make the schedules as a prefect.yaml has them; none where the options name none.

    Args:
        known: schedules that are there already; an interval among them keeps its anchor.

    Raises:
        UserError: an option makes no sense.
    """
    if not wanted:
        for option, value in {"--timezone": wanted.timezone, "--paused": wanted.paused}.items():
            if value:
                raise UserError(f"{option} is said of a schedule: give --cron, --every or --rrule too")
        return []
    now, name = now or datetime.now(UTC), wanted.timezone or "UTC"
    if name not in available_timezones():
        raise UserError(f"--timezone {name}: no such timezone; it is a name such as Europe/Berlin")
    zone, kept, active = ZoneInfo(name), list(known), {"active": not wanted.paused}
    made: dict[str, dict[str, Any]] = {}
    for text in wanted.cron:
        made[f"--cron {text}"] = {"cron": text, "timezone": name, **active}
    for text in wanted.every:
        made[f"--every {text}"] = {**make_interval(text, zone, kept, now), **active}
    for text in wanted.rrule:
        made[f"--rrule {text}"] = {"rrule": text, "timezone": name, **active}
    for option, schedule in made.items():
        check(option, schedule, now)
    return list(made.values())


def make_interval(text: str, zone: ZoneInfo, known: Iterable[Schedule], now: datetime) -> dict[str, Any]:
    """Make an interval that begins at the start of this day in ``zone``, or when the same one among ``known`` did.

    Its own timezone is UTC: with one that has daylight saving, Prefect 3.8 schedules a run of 24 hours or more twice
    around a change, an hour apart, since it counts hours up to now and days from there.
    """
    found = re.fullmatch("([1-9][0-9]{0,4})([smhd])", text)
    if not found:
        raise UserError(f"--every {text}: write a whole number and its unit, such as 90s, 30m, 6h or 1d")
    seconds = int(found[1]) * SECONDS[found[2]]
    if seconds < SHORTEST.total_seconds():
        raise UserError(f"--every {text}: the shortest is a minute, 1m")
    anchor = datetime.combine(now.astimezone(zone), time(), zone)
    for schedule in known:
        if float(schedule.get("interval") or 0) == seconds and schedule.get("anchor_date"):
            before = datetime.fromisoformat(str(schedule["anchor_date"]))
            if (
                before.utcoffset() == before.astimezone(zone).utcoffset()
            ):  # else another timezone is asked for now
                anchor = before
                break
    return {"interval": seconds, "anchor_date": anchor.isoformat(), "timezone": "UTC"}


def check(option: str, schedule: Schedule, now: datetime) -> None:
    """See that Prefect takes a schedule, that it has times to come, and that they are not too close.

    Raises:
        UserError: it isn't so.
    """
    if "SECONDLY" in str(schedule.get("rrule", "")).upper():  # whose times may be sought without end
        raise UserError(f"{option}: runs are to be a minute apart at least")
    try:
        times = next_times(schedule, CHECKED, now)
    except Exception as error:  # of pydantic, croniter or dateutil
        reason = error.errors()[0]["msg"] if hasattr(error, "errors") else first_line(error)
        reason = " ".join(reason.removeprefix("Value error, ").split())[:200]
        raise UserError(f"{option}: Prefect takes no such schedule: {reason}") from None
    if not times:
        raise UserError(f"{option}: there is no such time to come")
    if any(later - earlier < SHORTEST for earlier, later in pairwise(times)):
        raise UserError(f"{option}: runs are to be a minute apart at least")


def next_times(schedule: Schedule, count: int, now: datetime) -> list[datetime]:
    """Return the next times of a schedule as Prefect's server computes them, in the schedule's timezone."""
    from prefect.server.schemas.actions import DeploymentScheduleCreate
    from prefect.server.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule

    classes = {"cron": CronSchedule, "interval": IntervalSchedule, "rrule": RRuleSchedule}
    given = {name: schedule[name] for name in FIELDS if schedule.get(name) is not None}
    made = next(classes[kind] for kind in KINDS if kind in given)(**given)
    sent = DeploymentScheduleCreate(schedule=made).schedule  # with the start that it gets there
    zone = ZoneInfo(due_zone(schedule))
    return [due.astimezone(zone) for due in sent._get_dates_generator(n=count, start=now)]


def due_zone(schedule: Schedule) -> str:
    return schedule.get("timezone") or "UTC"


def expression(schedule: Schedule) -> str:
    """Write what a schedule is, on one line: ``0 2 * * * Europe/Berlin``, ``every 6 h from ...``."""
    zone = due_zone(schedule)
    if schedule.get("interval"):
        anchor = schedule.get("anchor_date")
        start = f" from {moment(datetime.fromisoformat(str(anchor)))}" if anchor else ""
        return f"every {interval(float(schedule['interval']))}{start}{'' if zone == 'UTC' else ' ' + zone}"
    rule = str(schedule.get("cron") or schedule.get("rrule")).removeprefix(PREFECTS_START)
    return f"{' '.join(rule.split())} {zone}"


def meaning(schedule: Schedule) -> str:
    """Write in words when a schedule is due; empty where its own text says as much."""
    if schedule.get("interval"):
        return f"every {interval(float(schedule['interval']))}"
    try:
        text = CronSim(str(schedule.get("cron", "")), datetime.now(UTC)).explain()
    except CronSimError:  # a rule, or a cron of a form that Prefect alone knows, such as @daily
        return ""
    return f"{text[0].lower()}{text[1:]}"


def interval(seconds: float) -> str:
    """Format a length by its largest whole unit: ``6 h``."""
    unit = next(unit for unit in ("d", "h", "m", "s") if seconds % SECONDS[unit] == 0 or unit == "s")
    return f"{seconds / SECONDS[unit]:g} {unit.replace('m', 'min')}"


def moment(when: datetime) -> str:
    """Format a time with its timezone: ``2026-11-30 02:00 CET``."""
    return when.strftime("%Y-%m-%d %H:%M %Z").replace("UTC+", "+").replace("UTC-", "-")
