"""Schedules as `llmill deploy` writes them: which instants Prefect makes of them, also where clocks change."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prefect.cli.deploy._schedules import _schedule_config_to_deployment_schedule as read_by_prefect
from prefect.server.schemas.schedules import SCHEDULE_TYPES
from pydantic import TypeAdapter

from flows.prefect.schedules import Wanted, make_schedules

BERLIN = "Europe/Berlin"
MARCH = (datetime(2027, 3, 27, tzinfo=UTC), datetime(2027, 3, 31, tzinfo=UTC))
"""Around the 28th, when the clocks of Berlin go from 02:00 to 03:00 at 01:00 UTC."""
OCTOBER = (datetime(2027, 10, 30, tzinfo=UTC), datetime(2027, 11, 3, tzinfo=UTC))
"""Around the 31st, when they go from 03:00 back to 02:00 at 01:00 UTC."""
WINTER, SUMMER = datetime(2027, 1, 10, 12, tzinfo=UTC), datetime(2026, 7, 10, 12, tzinfo=UTC)


def scheduled(schedule: Mapping[str, Any], span: tuple[datetime, datetime]) -> list[str]:
    """The instants, in UTC, that a server schedules within ``span``, as day, hour and minute.

    Its scheduler looks again and again, each time for the next three runs; what it has made stays.
    """
    sent = read_by_prefect(dict(schedule))["schedule"].model_dump(mode="json")
    kept = TypeAdapter(SCHEDULE_TYPES).validate_python(sent)
    begin, end = span
    found: set[datetime] = set()
    for half_hours in range(int((end - begin) / timedelta(minutes=30))):
        start = begin + half_hours * timedelta(minutes=30)
        found |= {due.astimezone(UTC) for due in kept._get_dates_generator(n=3, start=start, end=end)}
    return [f"{due:%d %H:%M}" for due in sorted(found)]


def made(now: datetime = WINTER, **options: Any) -> dict[str, Any]:
    [schedule] = make_schedules(Wanted(timezone=BERLIN, **options), now=now)
    return schedule


@pytest.mark.parametrize(
    "options",
    [{"cron": ["30 2 * * *"]}, {"rrule": ["FREQ=DAILY;BYHOUR=2;BYMINUTE=30"]}],
    ids=["cron", "rrule"],
)
def test_a_night_in_which_clocks_change_has_one_run(options):
    """02:30 there is none in March: it runs at 03:30. In October there are two: it runs at the first."""
    schedule = made(**options)
    assert scheduled(schedule, MARCH) == ["27 01:30", "28 00:30", "29 00:30", "30 00:30"]
    assert scheduled(schedule, OCTOBER) == ["30 00:30", "31 00:30", "01 01:30", "02 01:30"]
