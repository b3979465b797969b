"""The calendar of schedules: which times match, and what happens when clocks are changed."""

from __future__ import annotations

import itertools
import random
from datetime import UTC, datetime

import pytest
from calendar_oracle import EXPRESSIONS, ZONES, compare_all

from tinyqueue_calendar import CalendarError, calendar_of


def ms(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


def runs(cron: str, zone: str, start: str, count: int) -> list[str]:
    """The first runs at or after a time, in UTC."""
    ticks = itertools.islice(calendar_of(cron, zone).ticks(ms(start) - 1), count)
    return [f"{datetime.fromtimestamp(tick / 1000, UTC):%m-%d %H:%M}" for tick in ticks]


# Against the oracle ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_compare_some_expressions_and_zones_with_a_scan_of_all_minutes(seed: int) -> None:
    chance = random.Random(seed)
    expressions = chance.sample(EXPRESSIONS, 8)
    zones = ZONES[seed::4]
    start = datetime(2024 + seed, 1, 1)
    assert sum(runs for _, runs in compare_all(expressions, chance.sample(zones, 2), start, 1)) > 1000


# Changes of the clock -------------------------------------------------------------------------------------------------

BERLIN = "Europe/Berlin"


@pytest.mark.parametrize(
    ("cron", "zone", "start", "expected"),
    [
        # A gap: clocks go from 02:00 to 03:00, at 01:00 UTC.
        ("30 2 * * *", BERLIN, "2026-03-28T12:00", ["03-29 01:00", "03-30 00:30"]),
        ("0,30 2 * * *", BERLIN, "2026-03-29T00:00", ["03-29 01:00", "03-30 00:00"]),
        ("0 2,3 * * *", BERLIN, "2026-03-29T00:00", ["03-29 01:00", "03-30 00:00"]),
        ("*/30 2 * * *", BERLIN, "2026-03-29T00:00", ["03-30 00:00", "03-30 00:30"]),
        ("0 * * * *", BERLIN, "2026-03-29T00:00", ["03-29 00:00", "03-29 01:00", "03-29 02:00"]),
        # An overlap: clocks go from 03:00 to 02:00, at 01:00 UTC.
        ("30 2 * * *", BERLIN, "2026-10-25T00:00", ["10-25 00:30", "10-26 01:30"]),
        ("30 2 * * *", BERLIN, "2026-10-25T01:10", ["10-26 01:30"]),
        ("*/30 2 * * *", BERLIN, "2026-10-25T00:00", ["10-25 00:00", "10-25 00:30", "10-25 01:00", "10-25 01:30"]),
        ("0 * * * *", BERLIN, "2026-10-25T00:00", ["10-25 00:00", "10-25 01:00", "10-25 02:00"]),
        # Lord Howe: half an hour, from 02:00 to 02:30 and back.
        ("15 2 * * *", "Australia/Lord_Howe", "2026-10-03T15:00", ["10-03 15:30", "10-04 15:15"]),
        ("45 1 * * *", "Australia/Lord_Howe", "2026-04-04T14:00", ["04-04 14:45", "04-05 15:15"]),
        ("45 * * * *", "Australia/Lord_Howe", "2026-04-04T14:00", ["04-04 14:45", "04-04 15:15", "04-04 16:15"]),
        ("* 3 * * *", "Australia/Lord_Howe", "2026-10-03T15:45", ["10-03 16:00", "10-03 16:01"]),
        # Zones that are half or three quarters of an hour off.
        ("0 9 * * *", "Asia/Kolkata", "2026-01-01T00:00", ["01-01 03:30"]),
        ("0 9 * * *", "Asia/Kathmandu", "2026-01-01T00:00", ["01-01 03:15"]),
        ("30 2 * * *", "America/St_Johns", "2026-03-08T04:00", ["03-08 05:30", "03-09 05:00"]),
        # Chatham: clocks go from 02:45 to 03:45 and back.
        ("0 3 * * *", "Pacific/Chatham", "2026-09-26T13:00", ["09-26 14:00", "09-27 13:15"]),
        ("* 4 * * *", "Pacific/Chatham", "2026-09-26T14:05", ["09-26 14:15", "09-26 14:16"]),
        ("0 3 * * *", "Pacific/Chatham", "2026-04-04T13:00", ["04-04 13:15", "04-05 14:15"]),
        # Troll: two hours, from 01:00 to 03:00 and back.
        ("30 2 * * *", "Antarctica/Troll", "2026-03-29T00:30", ["03-29 01:00", "03-30 00:30"]),
        ("30 1,2 * * *", "Antarctica/Troll", "2026-10-24T23:00", ["10-24 23:30", "10-25 00:30", "10-26 01:30"]),
        # Cairo: at midnight. The day begins at 01:00, and the hour before another midnight repeats.
        ("0 0 * * *", "Africa/Cairo", "2026-04-23T12:00", ["04-23 22:00", "04-24 21:00"]),
        ("0 0 * * fri", "Africa/Cairo", "2026-04-23T12:00", ["04-23 22:00"]),
        ("30 23 * * *", "Africa/Cairo", "2026-10-29T12:00", ["10-29 20:30", "10-30 21:30"]),
        ("0 */2 * * *", "Africa/Cairo", "2026-04-23T21:00", ["04-23 23:00", "04-24 01:00"]),
        # Casablanca: clocks are set back for Ramadan, and forward after it.
        ("30 2 * * *", "Africa/Casablanca", "2026-02-15T00:00", ["02-15 01:30", "02-16 02:30"]),
        # An island that changed its side of the date line had no December 30.
        ("0 12 * * *", "Pacific/Apia", "2011-12-29T00:00", ["12-29 22:00", "12-30 10:00", "12-30 22:00"]),
    ],
)
def test_run_at_a_change_of_the_clock(cron: str, zone: str, start: str, expected: list[str]) -> None:
    assert runs(cron, zone, start, len(expected)) == expected


@pytest.mark.parametrize("zone", [BERLIN, "Australia/Lord_Howe", "Antarctica/Troll", "Africa/Cairo", "Pacific/Chatham"])
@pytest.mark.parametrize("cron", ["30 2 * * *", "0 0 * * *", "*/20 * * * *", "0,30 1-3 * * *"])
def test_next_run_is_strictly_later_from_every_minute_around_a_change(cron: str, zone: str) -> None:
    calendar = calendar_of(cron, zone)
    for start in ("2026-03-29T00:00", "2026-10-25T00:00", "2026-04-04T12:00", "2026-10-03T14:00", "2026-10-29T18:00"):
        ticks = list(itertools.islice(calendar.ticks(ms(start)), 100))
        for now in range(ms(start), ms(start) + 8 * 3600_000, 60_000):
            later = calendar.next(now)
            assert later > now
            assert later == next(tick for tick in ticks if tick > now)
            assert calendar.next(now + 59_999) == later or later == now + 60_000 - later % 60_000


def test_last_run_of_a_period_includes_both_of_its_ends() -> None:
    calendar = calendar_of("0 * * * *", "UTC")
    nine, ten = ms("2026-01-01T09:00"), ms("2026-01-01T10:00")
    assert calendar.last(nine, ten) == ten
    assert calendar.last(nine, ten - 1) == nine
    assert calendar.last(nine + 1, ten - 1) == 0


@pytest.mark.parametrize(
    ("short", "cron"), [("@hourly", "0 * * * *"), ("@Daily", "0 0 * * *"), ("@weekly", "0 0 * * 0")]
)
def test_nickname_stands_for_an_expression(short: str, cron: str) -> None:
    assert runs(short, BERLIN, "2026-01-01T00:00", 5) == runs(cron, BERLIN, "2026-01-01T00:00", 5)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cron", "rule"),
    [
        ("0 0 30 2 *", "day of month is wrong, or that day does not exist"),
        ("0 0 31 4,6 *", "day of month is wrong, or that day does not exist"),
        ("60 * * * *", "minute"),
        ("* 24 * * *", "hour"),
        ("* * * 13 *", "month"),
        ("* * * * xyz", "day of week"),
        ("5-1 * * * *", "minute"),
        ("*/0 * * * *", "minute"),
        ("\u0663 * * * *", "minute"),
        ("* * * *", "must have five fields"),
        ("0 * * * * *", "must have five fields"),
        ("@reboot", "must have five fields"),
        ("", "must have five fields"),
        ("* " * 200, "must be a cron expression of up to 200 characters"),
        (None, "must be a cron expression"),
        (["0 * * * *"], "must be a cron expression"),
    ],
)
def test_wrong_expression_is_refused(cron: object, rule: str) -> None:
    with pytest.raises(CalendarError, match=rule) as refused:
        calendar_of(cron, "UTC")
    assert refused.value.field == "cron"


@pytest.mark.parametrize(
    "zone", ["Europe/Bonn", "Europe", "", "../../etc/passwd", "/etc/localtime", "localtime", "\x00", "ü", None, 1, []]
)
def test_unknown_zone_is_refused(zone: object) -> None:
    with pytest.raises(CalendarError, match="unknown time zone") as refused:
        calendar_of("0 0 * * *", zone)
    assert refused.value.field == "timezone"


# Warnings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cron", "zone", "expected"),
    [
        ("30 2 * * *", BERLIN, ["does not exist", "it runs at 03:00", "occurs twice", "it runs the first time only"]),
        ("*/30 2 * * *", BERLIN, ["does not exist", "it does not run then", "occurs twice", "it runs both times"]),
        ("0 */2 * * *", BERLIN, ["it does not run then", "it runs both times"]),
        ("0 0-23 * * *", BERLIN, ["occurs twice", "it runs the first time only"]),
        ("0 * * * *", "Australia/Lord_Howe", ["it does not run then"]),
        ("45 * * * *", "Australia/Lord_Howe", ["it runs both times"]),
        ("0 0 * * *", "Africa/Cairo", ["00:00 on 2026-04-24 does not exist", "it runs at 01:00"]),
    ],
)
def test_warn_of_a_change_of_the_clock_that_surprises(cron: str, zone: str, expected: list[str]) -> None:
    texts = " ".join(calendar_of(cron, zone).surprises(ms("2026-01-01T00:00")))
    assert [part for part in expected if part not in texts] == []


@pytest.mark.parametrize(
    ("cron", "zone"),
    [
        ("0 * * * *", BERLIN),
        ("*/15 * * * *", "Australia/Lord_Howe"),
        ("5,20 * * * *", BERLIN),
        ("0 7 * * mon-fri", BERLIN),
        ("30 2 * * mon-fri", BERLIN),
        ("30 2 * * *", "UTC"),
        ("30 2 * * *", "Asia/Tokyo"),
    ],
)
def test_do_not_warn_of_an_expression_that_keeps_its_pace(cron: str, zone: str) -> None:
    assert calendar_of(cron, zone).surprises(ms("2026-01-01T00:00")) == []
