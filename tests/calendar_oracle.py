"""Compare the calendar of schedules with a scan of all UTC minutes of five years.

    python tests/calendar_oracle.py [--expressions 50] [--zones 60] [--years 5]

The scan shares nothing with tinyqueue_calendar.py but the table of time zones. It has its own reader
of expressions, marks each minute of a clock that is never changed, and then walks through the
minutes of UTC: it asks each for its local time, and so learns of the changes by itself.
"""

from __future__ import annotations

import calendar
import itertools
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from tinyqueue_calendar import calendar_of

EXPRESSIONS = [
    *("30 2 * * *", "0 2 * * *", "0 3 * * *", "30 1 * * *", "15 0 * * *", "59 23 * * *", "0 0 * * *", "5 1,2,3 * * *"),
    *("0 7 * * mon-fri", "0 0 1 * *", "0 0 L * *", "0 9 * * 1#1", "45 16 * * 5L", "0 0 29 2 *", "0 12 31 * *"),
    *("0,30 2 * * *", "0-59 2 * * sun", "10-50/20 1-4 * * *", "0 1-5 * * *", "30 2,3 * * sat,sun", "1 1 1 1 *"),
    *("0 0-23 * * *", "0,15,30,45 2 * * *", "17 2-3 * 3,4,9,10,11 *", "0 22 * * 1-5", "30 23 * * 0", "30 23 * * 7"),
    *("0 0 13 * fri", "0 0 13 * */7", "0 6 */2 * *", "0 3 * jan,jul *", "20 4 1,15 * 3", "0 0 LW * *", "45 2 * * *"),
    *("0 * * * *", "*/30 * * * *", "30 * * * *", "*/15 2 * * *", "0 */2 * * *", "0 */3 * * sun", "*/20 1-3 * * sun"),
    *("* 2 * * sun", "5 */4 1-7 * *", "15,45 * * * sat,sun", "59 * 31 * *", "*/7 0 * * *", "* 3 * 4,9,10 6,0"),
    *("0 */23 * * *", "*/59 23 * * *", "@weekly"),
]
ZONES = [
    *("UTC", "Europe/Berlin", "Europe/London", "Europe/Dublin", "Europe/Lisbon", "Europe/Moscow", "Europe/Istanbul"),
    *("Europe/Chisinau", "Atlantic/Azores", "Atlantic/Reykjavik", "America/New_York", "America/Chicago"),
    *("America/Denver", "America/Phoenix", "America/Los_Angeles", "America/Anchorage", "America/St_Johns"),
    *("America/Halifax", "America/Havana", "America/Santiago", "America/Asuncion", "America/Sao_Paulo"),
    *(
        "America/Argentina/Buenos_Aires",
        "America/Mexico_City",
        "America/Tijuana",
        "America/Nuuk",
        "America/Scoresbysund",
    ),
    *("America/Caracas", "America/Miquelon", "Africa/Cairo", "Africa/Casablanca", "Africa/El_Aaiun", "Africa/Lagos"),
    *("Africa/Juba", "Asia/Amman", "Asia/Beirut", "Asia/Damascus", "Asia/Gaza", "Asia/Jerusalem", "Asia/Tehran"),
    *("Asia/Kabul", "Asia/Kolkata", "Asia/Kathmandu", "Asia/Yangon", "Asia/Almaty", "Asia/Shanghai", "Asia/Tokyo"),
    *("Australia/Sydney", "Australia/Adelaide", "Australia/Darwin", "Australia/Eucla", "Australia/Lord_Howe"),
    *("Pacific/Auckland", "Pacific/Chatham", "Pacific/Easter", "Pacific/Fiji", "Pacific/Apia", "Pacific/Norfolk"),
    *("Antarctica/Troll", "Antarctica/Casey"),
]
MARGIN = 2 * 1440  # minutes before and after the years: further than any zone is from UTC
NAMES = {
    **{calendar.day_abbr[at - 1].lower(): at % 7 for at in range(1, 8)},
    **{calendar.month_abbr[at].lower(): at for at in range(1, 13)},
}


def numbers(field: str, low: int, high: int) -> set[int]:
    """Read one field of numbers, such as 1-5 or */2."""
    found: set[int] = set()
    for part in field.split(","):
        span, _, step = part.partition("/")
        first, _, last = span.partition("-")
        if span == "*":
            values = range(low, high + 1)
        else:
            begin, end = (NAMES[text] if text in NAMES else int(text) for text in (first, last or first))
            values = range(begin, (high if step and not last else end) + 1)
        found.update(list(values)[:: int(step or 1)])
    return found


def days_match(day: datetime, days: str, weekdays: str) -> bool:
    """Whether a day matches its two fields: both if one begins with a star, else either."""
    last = calendar.monthrange(day.year, day.month)[1]
    weekday = day.isoweekday() % 7
    if days == "L":
        by_day = day.day == last
    elif days == "LW":
        by_day = day.day == max(at for at in range(1, last + 1) if day.replace(day=at).isoweekday() < 6)
    else:
        by_day = day.day in numbers(days, 1, 31)
    if weekdays.endswith("L"):
        by_weekday = weekday == int(weekdays[:-1]) and day.day + 7 > last
    elif "#" in weekdays:
        which, nth = map(int, weekdays.split("#"))
        by_weekday = weekday == which and (day.day - 1) // 7 + 1 == nth
    else:
        by_weekday = weekday in {at % 7 for at in numbers(weekdays, 0, 7)}
    both = days.startswith("*") or weekdays.startswith("*")
    return (by_day and by_weekday) if both else (by_day or by_weekday)


def mark(cron: str, start: datetime, minutes: int) -> bytes:
    """Mark the minutes that match on a clock that is never changed, MARGIN minutes more at each end."""
    minute, hour, days, month, weekdays = {"@weekly": "0 0 * * 0"}.get(cron, cron).split()
    hours, in_hour = numbers(hour, 0, 23), numbers(minute, 0, 59)
    a_day = bytes(at // 60 in hours and at % 60 in in_hour for at in range(1440))
    months = numbers(month, 1, 12)
    marks = []
    for at in range(0, minutes + 2 * MARGIN, 1440):
        day = start + timedelta(minutes=at - MARGIN)
        marks.append(a_day if day.month in months and days_match(day, days, weekdays) else bytes(1440))
    return b"".join(marks)


def offsets(zone: str, start: datetime, minutes: int) -> list[tuple[int, int]]:
    """Ask each minute of UTC for its offset. Return where it changes, and to which minutes."""
    info = ZoneInfo(zone)
    found: list[tuple[int, int]] = []
    at = (start - timedelta(minutes=1)).replace(tzinfo=UTC)
    step = timedelta(minutes=1)
    before = None
    for number in range(-1, minutes):
        offset = at.astimezone(info).utcoffset()
        if offset != before:
            assert offset is not None
            found.append((number, offset // step))
            before = offset
        at += step
    return found


def scan(cron: str, marks: bytes, runs: list[tuple[int, int]], minutes: int) -> bytes:
    """Mark the minutes of UTC at which a schedule runs."""
    minute, hour = cron.split()[:2] if cron[0] != "@" else ("0", "0")
    fixed = not (minute.startswith("*") or hour.startswith("*"))
    ends = [begin for begin, _ in runs[1:]] + [minutes]
    utc = bytearray()
    for (begin, offset), end in zip(runs, ends, strict=True):
        utc += marks[begin + offset + MARGIN : end + offset + MARGIN]
    utc = utc[1:]  # the minute before the first
    for (_, before), (at, after) in itertools.pairwise(runs) if fixed else ():
        if after > before and any(marks[at + before + MARGIN : at + after + MARGIN]):
            utc[at] = 1
        elif after < before:
            utc[at : at + before - after] = bytes(before - after)
    return bytes(utc)


def compare(cron: str, zone: str, utc: bytes, start: datetime) -> int:
    """Return how many runs the scan has found. Raises AssertionError if the calendar has others."""
    minutes = len(utc)
    first = int(start.replace(tzinfo=UTC).timestamp()) // 60
    end = (first + minutes) * 60_000
    found = bytearray(minutes)
    for tick in itertools.takewhile(lambda at: at < end, calendar_of(cron, zone).ticks(first * 60_000 - 1)):
        found[tick // 60_000 - first] += 1
    if found != utc:
        at = next(at for at in range(minutes) if found[at] != utc[at])
        raise AssertionError(f"{cron} in {zone} at {start + timedelta(minutes=at)} UTC: {found[at]}, not {utc[at]}")
    return sum(utc)


def compare_all(expressions: list[str], zones: list[str], start: datetime, years: int) -> Iterator[tuple[str, int]]:
    minutes = (datetime(start.year + years, 1, 1) - start) // timedelta(minutes=1)
    marks = {cron: mark(cron, start, minutes) for cron in expressions}
    for zone in zones:
        runs = offsets(zone, start, minutes)
        for cron in expressions:
            yield zone, compare(cron, zone, scan(cron, marks[cron], runs, minutes), start)


@click.command()
@click.option("--expressions", default=len(EXPRESSIONS), show_default=True)
@click.option("--zones", default=len(ZONES), show_default=True)
@click.option("--years", default=5, show_default=True)
@click.option("--first", default=2024, show_default=True, help="The first year.")
def main(expressions: int, zones: int, years: int, first: int) -> None:
    """Compare the calendar with the scan."""
    began = time.monotonic()
    total = 0
    pairs = 0
    for _, runs in compare_all(EXPRESSIONS[:expressions], ZONES[:zones], datetime(first, 1, 1), years):
        total += runs
        pairs += 1
    seconds = time.monotonic() - began
    click.echo(f"{pairs} pairs of expression and zone, {years} years, {total} runs, no difference, {seconds:.0f} s")


if __name__ == "__main__":
    main()
