"""Schedules as `llmill deploy` writes them: which instants Prefect makes of them, also where clocks change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from io import StringIO
from itertools import pairwise
from typing import Any

import pytest
from prefect.cli.deploy._schedules import _schedule_config_to_deployment_schedule as read_by_prefect
from prefect.server.schemas.schedules import SCHEDULE_TYPES
from pydantic import TypeAdapter

from flows.cli.schedule import show
from flows.listeners.terminal import Screen
from flows.prefect.page_edits import normal_schedules
from flows.prefect.schedules import Wanted, expression, make_schedules, meaning, moment, next_times

BERLIN = "Europe/Berlin"
MARCH = (datetime(2027, 3, 27, tzinfo=UTC), datetime(2027, 3, 31, tzinfo=UTC))
"""Around the 28th, when the clocks of Berlin go from 02:00 to 03:00 at 01:00 UTC."""
OCTOBER = (datetime(2027, 10, 30, tzinfo=UTC), datetime(2027, 11, 3, tzinfo=UTC))
"""Around the 31st, when they go from 03:00 back to 02:00 at 01:00 UTC."""
WINTER, SUMMER = datetime(2027, 1, 10, 12, tzinfo=UTC), datetime(2026, 7, 10, 12, tzinfo=UTC)


def scheduled(schedule: Mapping[str, Any], span: tuple[datetime, datetime], looks: int = 24) -> list[str]:
    """The instants, in UTC, that a server schedules within ``span``, as day, hour and minute.

    Its scheduler looks again and again, each time for the next three runs; what it has made stays.
    """
    sent = read_by_prefect(dict(schedule))["schedule"].model_dump(mode="json")
    kept = TypeAdapter(SCHEDULE_TYPES).validate_python(sent)
    begin, end = span
    found: set[datetime] = set()
    for look in range(looks):
        start = begin + look * (end - begin) / looks
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
    """02:30 there is none in March: it runs at 01:30. In October there are two: it runs at the first."""
    schedule = made(**options)
    assert scheduled(schedule, MARCH) == ["27 01:30", "28 00:30", "29 00:30", "30 00:30"]
    assert scheduled(schedule, OCTOBER) == ["30 00:30", "31 00:30", "01 01:30", "02 01:30"]


def test_a_rule_of_an_hour_runs_once_a_night_too():
    schedule = made(rrule=["FREQ=DAILY;BYHOUR=2"])
    assert scheduled(schedule, MARCH) == ["27 01:00", "28 00:00", "29 00:00", "30 00:00", "31 00:00"]
    assert scheduled(schedule, OCTOBER) == ["30 00:00", "31 00:00", "01 01:00", "02 01:00"]


def test_a_cron_of_each_hour_pauses_for_two_hours_and_an_interval_does_not():
    """The hour that comes twice in October has one run of the cron, and two of the interval."""
    night = (datetime(2027, 10, 30, 23, tzinfo=UTC), datetime(2027, 10, 31, 3, tzinfo=UTC))
    assert scheduled(made(cron=["0 * * * *"]), night) == ["30 23:00", "31 00:00", "31 02:00", "31 03:00"]
    assert scheduled(made(every=["1h"]), night) == [
        f"{day}:00" for day in ("30 23", "31 00", "31 01", "31 02", "31 03")
    ]
    night = (datetime(2027, 3, 27, 23, tzinfo=UTC), datetime(2027, 3, 28, 3, tzinfo=UTC))
    for options in ({"cron": ["0 * * * *"]}, {"every": ["1h"]}):
        assert scheduled(made(**options), night) == [
            "27 23:00",
            "28 00:00",
            "28 01:00",
            "28 02:00",
            "28 03:00",
        ]


def test_an_interval_of_a_day_is_24_hours_each_time():
    """The day begins at midnight in Berlin: 23:00 UTC by its winter time, 22:00 by its summer time."""
    for now, hour in ((WINTER, 23), (SUMMER, 22)):
        schedule = made(now, every=["1d"])
        assert scheduled(schedule, MARCH) == [f"{day} {hour}:00" for day in (27, 28, 29, 30)]
        assert scheduled(schedule, OCTOBER) == [f"{day} {hour}:00" for day in ("30", "31", "01", "02")]


def test_an_interval_has_no_timezone_since_prefect_would_then_schedule_a_day_twice():
    """Once this fails, Prefect is mended, and an interval of days may have a timezone again."""
    schedule = {**made(every=["1d"]), "timezone": BERLIN}
    twice = ["27 23:00", "28 22:00", "28 23:00", "29 22:00", "29 23:00", "30 22:00", "30 23:00"]
    assert scheduled(schedule, MARCH, looks=192) == twice


@pytest.mark.parametrize("hours", [1, 5, 24, 36])
def test_each_interval_keeps_its_length_all_year(hours):
    times = next_times(made(every=[f"{hours}h"]), 9000 // hours, WINTER)
    assert {(later - earlier).total_seconds() for earlier, later in pairwise(times)} == {hours * 3600}


def test_an_interval_begins_with_the_day_and_stays_there():
    schedule = made(SUMMER, every=["6h"])
    assert schedule == {
        "interval": 21600,
        "anchor_date": "2026-07-10T00:00:00+02:00",
        "timezone": "UTC",
        "active": True,
    }
    again = make_schedules(Wanted(every=["6h", "12h"], timezone=BERLIN), [schedule], now=WINTER)
    assert [one["anchor_date"] for one in again] == ["2026-07-10T00:00:00+02:00", "2027-01-10T00:00:00+01:00"]
    moved = {**schedule, "anchor_date": "2026-07-10T05:30:00+02:00"}
    [edited] = make_schedules(Wanted(every=["6h"], timezone=BERLIN, paused=True), [moved], now=WINTER)
    assert edited == {**moved, "active": False}
    [elsewhere] = make_schedules(Wanted(every=["6h"], timezone="Asia/Tokyo"), [schedule], now=WINTER)
    assert elsewhere["anchor_date"] == "2027-01-10T00:00:00+09:00"


def test_schedules_are_said_in_words_with_their_next_times():
    options = Wanted(
        cron=["0 2 * * *", "@daily"], every=["90m", "1d"], rrule=["FREQ=WEEKLY;BYDAY=MO"], timezone=BERLIN
    )
    schedules = make_schedules(options, now=WINTER)
    assert [(expression(one), meaning(one)) for one in schedules] == [
        ("0 2 * * * Europe/Berlin", "at 02:00 every day"),
        ("@daily Europe/Berlin", ""),
        ("every 90 min from 2027-01-10 00:00 +01:00", "every 90 min"),
        ("every 1 d from 2027-01-10 00:00 +01:00", "every 1 d"),
        ("FREQ=WEEKLY;BYDAY=MO Europe/Berlin", ""),
    ]
    times = [moment(*next_times(one, 1, WINTER)) for one in schedules]
    assert times == [
        "2027-01-11 02:00 CET", "2027-01-11 00:00 CET", "2027-01-10 12:30 UTC", "2027-01-10 23:00 UTC",
        "2027-01-11 00:00 CET",
    ]  # fmt: skip


def test_the_same_schedule_given_twice_is_one():
    assert len(make_schedules(Wanted(cron=["0 2 * * *"] * 2, every=["1h", "1h"]))) == 2


def test_a_rule_of_minutes_is_checked_at_once():
    """Prefect would go through all its times since 2020."""
    [rule] = make_schedules(Wanted(rrule=["FREQ=MINUTELY;INTERVAL=7"]))
    assert rule["rrule"] == "FREQ=MINUTELY;INTERVAL=7"


def test_the_start_that_prefect_gives_a_rule_is_no_edit():
    rule = made(rrule=["FREQ=WEEKLY;BYDAY=MO"])
    sent = {**rule, "rrule": f"DTSTART:20200101T000000\n{rule['rrule']}"}
    assert normal_schedules([sent]) == normal_schedules([rule])
    own = {**rule, "rrule": f"DTSTART:20260101T000000\n{rule['rrule']}"}
    assert normal_schedules([own]) != normal_schedules([rule])


def test_the_summary_has_a_line_for_each_schedule():
    options = Wanted(cron=["0 2 * * *"], every=["6h"], timezone=BERLIN)
    schedules = [
        {"schedule": one, "active": place == 0}
        for place, one in enumerate(make_schedules(options, now=WINTER))
    ]
    entry = {"name": "tiny", "id": "x", "work_pool_name": "llmill", "paused": False, "schedules": schedules}
    screen = Screen()
    screen.file = out = StringIO()
    show(screen, "http://h/api", [entry, {**entry, "schedules": []}, {**entry, "paused": True}])
    first, cron, every, asked, paused, off, _, _ = out.getvalue().splitlines()
    assert first.split() == ["✓", "tiny", "pool", "llmill", "2", "schedules"]
    assert re.fullmatch(
        r"    0 2 \* \* \* Europe/Berlin, at 02:00 every day: next (.+ 02:00 CES?T(, )?){2}", cron
    )
    assert every == "    every 6 h from 2027-01-10 00:00 +01:00: paused"
    assert asked.endswith("when asked")
    assert paused.endswith("2 schedules  (paused)")
    assert off.endswith("every day: paused")
