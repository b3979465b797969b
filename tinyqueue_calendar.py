"""When a schedule runs: cron expressions in time zones. This module knows no queue.

cronsim reads an expression and finds the times on a clock that is never changed. This module maps
these times to UTC. On the days of clock changes it follows the rules of Debian's cron:

    minute or hour begins with *   runs whenever the clock shows a time that matches: twice if that
                                   time occurs twice, and never if it does not occur
    all other expressions          run once for each time that matches: the first time if it occurs
                                   twice, and right after the change if it does not occur

All times are in milliseconds since 1970.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

NICKNAMES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
EPOCH = datetime(1970, 1, 1)
MINUTE = timedelta(minutes=1)
PROBE = timedelta(hours=6)  # no zone changes its clocks twice within that time
AROUND = timedelta(hours=25)  # before and after a clock change: it has no effect beyond that
LONGEST = 200  # characters of an expression
YEARS = 2  # in which the next two clock changes are looked for


class CalendarError(ValueError):
    """An expression or a time zone is wrong. `field` is cron or timezone."""

    def __init__(self, field: str, rule: str) -> None:
        super().__init__(rule)
        self.field = field


class Change(NamedTuple):
    """A clock change: when, in UTC, and the offsets from UTC before and after it."""

    at: datetime
    before: timedelta
    after: timedelta


@lru_cache(5000)
def changes_in(zone: ZoneInfo, year: int) -> tuple[Change, ...]:
    """Find the clock changes of a zone in a year of UTC, which `zoneinfo` does not list."""
    found = []
    at = datetime(year, 1, 1)
    start = at - MINUTE
    before = _offset(zone, start)
    while at.year == year:
        if (after := _offset(zone, at)) != before:
            found.append(Change(_moment_between(zone, start, at, before), before, after))
        before = after
        start = at
        at += PROBE
    last = datetime(year + 1, 1, 1) - MINUTE
    if (after := _offset(zone, last)) != before:
        found.append(Change(_moment_between(zone, start, last, before), before, after))
    return tuple(found)


def _moment_between(zone: ZoneInfo, low: datetime, high: datetime, before: timedelta) -> datetime:
    """Return the first minute after `low` at which the offset is no longer `before`."""
    while high - low > MINUTE:
        middle = low + (high - low) // (2 * MINUTE) * MINUTE
        if _offset(zone, middle) == before:
            low = middle
        else:
            high = middle
    return high


def _offset(zone: ZoneInfo, at: datetime) -> timedelta:
    return at.replace(tzinfo=UTC).astimezone(zone).utcoffset() or timedelta()


def calendar_of(cron: Any, timezone: Any) -> Calendar:
    """Return a calendar. Raises CalendarError if the expression or the zone is wrong."""
    if not isinstance(cron, str) or len(cron) > LONGEST:
        raise CalendarError("cron", f"must be a cron expression of up to {LONGEST} characters")
    return _calendar(cron, timezone) if isinstance(timezone, str) else Calendar(cron, timezone)


class Calendar:
    """A cron expression in a time zone. Raises CalendarError if one is wrong or never matches."""

    def __init__(self, cron: str, timezone: str) -> None:
        self.zone = _read_zone(timezone)
        self.timezone = timezone
        self._surprises: tuple[int, list[str]] = (-1, [])  # the day on which they were found, and the texts
        self.cron = NICKNAMES.get(cron.strip().lower(), cron)
        fields = self.cron.split()
        if len(fields) != 5:
            names = "minute, hour, day of the month, month and day of the week"
            raise CalendarError("cron", f"must have five fields ({names}), or be one of {', '.join(NICKNAMES)}")
        self.follows_clock = fields[0].startswith("*") or fields[1].startswith("*")
        try:
            next(self._matches(datetime(2000, 1, 1)))
        except (CronSimError, RuntimeError) as error:
            raise CalendarError("cron", f"{_explain(error)}; man 5 crontab explains the fields") from None
        except StopIteration:
            raise CalendarError("cron", "never matches: that day does not exist in that month") from None

    def ticks(self, after: int) -> Iterator[int]:
        """Return the times at which it runs, all later than `after`."""
        start = EPOCH + timedelta(minutes=after // 60_000 + 1)
        last = None
        for at in self._times(start):
            if at != last:
                yield (at - EPOCH) // timedelta(milliseconds=1)
            last = at

    def next(self, after: int) -> int:
        """Return the next time at which it runs, later than `after`."""
        return next(self.ticks(after))

    def last(self, since: int, until: int) -> int:
        """Return the last time at which it runs from `since` to `until`, both included, or 0."""
        found = 0
        for at in itertools.takewhile(lambda at: at <= until, self.ticks(since - 1)):
            found = at
        return found

    def _times(self, start: datetime) -> Iterator[datetime]:
        """Return the times from `start` on, period by period between clock changes, all in UTC."""
        offset = _offset(self.zone, start - MINUTE)  # not that of a change at `start` itself
        begin = start + offset
        if not self.follows_clock:
            begin = max(begin, self._end_of_repeat(start))
        for change in self._changes(start):
            end = change.at + change.before
            for local in self._matches(begin):
                if local >= end:
                    break
                yield local - offset
            offset = change.after
            begin = change.at + offset
            if not self.follows_clock:
                if begin > end and next(self._matches(end)) < begin:
                    yield change.at
                begin = max(begin, end)

    def _matches(self, begin: datetime) -> Iterator[datetime]:
        """Return the times that match on a clock that is never changed, from `begin` on."""
        return CronSim(self.cron, begin - timedelta(seconds=1))

    def _end_of_repeat(self, start: datetime) -> datetime:
        """Return the local time until which a clock that was set back repeats times."""
        for change in changes_in(self.zone, (start - AROUND).year) + changes_in(self.zone, start.year):
            if change.at < start < change.at + AROUND:
                return change.at + change.before
        return start - AROUND

    def _changes(self, start: datetime) -> Iterator[Change]:
        """Return the clock changes from `start` on, and at each new year one without effect."""
        for year in itertools.count(start.year):
            yield from (change for change in changes_in(self.zone, year) if change.at >= start)
            end = datetime(year + 1, 1, 1)
            offset = _offset(self.zone, end - MINUTE)
            yield Change(end, offset, offset)

    def surprises(self, now: int) -> list[str]:
        """Describe the effects of the next two clock changes that may surprise.

        Remembers the texts for a day, because listings ask for them often.
        """
        day = now // 86_400_000
        if self._surprises[0] != day:
            self._surprises = day, self._find_surprises(EPOCH + timedelta(milliseconds=now))
        return list(self._surprises[1])

    def _find_surprises(self, start: datetime) -> list[str]:
        near = itertools.takewhile(lambda change: change.at.year <= start.year + YEARS, self._changes(start))
        coming = (change for change in near if change.before != change.after)
        return [text for change in itertools.islice(coming, 2) if (text := self._surprise(change))]

    def _surprise(self, change: Change) -> str:
        low, high = sorted((change.at + change.before, change.at + change.after))
        if (local := next(self._matches(low))) >= high or self._keeps_pace(change):
            return ""
        skipped = change.after > change.before
        when = f"{local:%H:%M} on {local:%Y-%m-%d} {'does not exist' if skipped else 'occurs twice'} in {self.timezone}"
        clocks = f"clocks go from {change.at + change.before:%H:%M} to {change.at + change.after:%H:%M}"
        if skipped:
            runs = "it does not run then" if self.follows_clock else f"it runs at {change.at + change.after:%H:%M}"
        else:
            runs = "it runs both times" if self.follows_clock else "it runs the first time only"
        return f"{when} ({clocks}): {runs}"

    def _keeps_pace(self, change: Change) -> bool:
        """Whether it runs around a change as often as on other days, such as every 15 minutes."""
        begin = change.at + change.before - AROUND
        naive = list(itertools.takewhile(lambda at: at < begin + 2 * AROUND, self._matches(begin)))
        real = itertools.takewhile(lambda at: at < change.at + AROUND, self._times(change.at - AROUND))
        shift = abs(change.after - change.before)
        if {at + shift for at in naive if at + shift < naive[-1]} - set(naive):
            return False
        steps = [{later - at for at, later in itertools.pairwise(times)} for times in (real, naive)]
        return steps[0] <= steps[1]


_calendar = lru_cache(1000)(Calendar)


def _read_zone(name: str) -> ZoneInfo:
    try:
        if name == "localtime":  # each machine has its own
            raise ValueError
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # unknown, a folder, or not a name
        rule = f"unknown time zone {ascii(name)[:100]}; use a name of the tz database, such as Europe/Berlin or UTC"
        raise CalendarError("timezone", rule) from None


def _explain(error: Exception) -> str:
    """Turn an error of cronsim, such as "Bad day-of-week", into a rule."""
    text = str(error)
    if text.startswith("Bad "):
        field = text.removeprefix("Bad ").replace("-", " ")
        return f"the field {field} is wrong" + (", or that day does not exist" if field == "day of month" else "")
    return f"cannot be read ({text})"
