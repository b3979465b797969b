"""What a schedule is: its record, how it is declared, and what a tick and a sync make of it.

`Queue.change_schedule` and `Queue.sync_schedules` in tinyqueue.py write what this module decides. A
schedule is declared in code or made through the API.

Code is identified by the names of its handlers modules, and a release of it by a fingerprint of the
schedules that it declares. Redis has the fingerprints of the last releases, newest first. A worker
of a release that has been replaced leaves the schedules alone. So if it starts during a deploy, it
does not bring back what was removed. After a rollback, the older release takes over when no worker
of the newer one has been seen for ABSENT seconds.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import msgspec
from msgspec.structs import replace

from tinyqueue_handler import HANDLERS, check_name, limit_of, make_job
from tinyqueue_job import UNENDED, Corrupted, InvalidJob, Job, TinyQueueError, UnknownType
from tinyqueue_json import encode, is_number, new_id, to_json
from tinyqueue_redis import text_of

if TYPE_CHECKING:
    from tinyqueue_calendar import Calendar

log = logging.getLogger("tinyqueue.worker")

MAX_SCHEDULES = 1000  # that the API accepts: each has some lines in the metrics
MAX_CATCHUP = 7 * 86400  # seconds
RETRY = 5000  # milliseconds until a tick that has failed or waits is tried again
GRACE = 60  # seconds that a tick may always be late
SHOWN_RUNS = 5  # next runs of a schedule that are listed
ABSENT = 300  # seconds after which the release that synced last counts as gone
SEEN_EVERY = 60  # seconds between two writes that it is still there
RELEASES = 20  # of one code that are remembered, by their fingerprints
TAKEN = "the API or other code made schedules with these names; remove those, or use other names"
OVERLAPS = ("skip", "one", "allow")
# Fields of a schedule that are declared. The others say what has happened to it.
DECLARED = ("cron", "timezone", "type", "payload", "queue", "max_attempts", "unique_key", "overlap", "catchup", "code")

Outcome = Literal["", "enqueued", "duplicate", "skipped", "missed", "waiting"]


class Schedule(msgspec.Struct, rename="camel", omit_defaults=True):
    """When to enqueue which job. Times are in milliseconds of Redis TIME, 0 for never.

    The fields are the record, which omits default values. A version may only add a field with a
    default value. An older version drops it at its next tick.
    """

    name: str
    cron: str
    type: str
    payload: Any
    timezone: str = "UTC"
    queue: str = "default"
    max_attempts: int = 3
    unique_key: str = ""
    overlap: Literal["skip", "one", "allow"] = "skip"
    catchup: float = 3600
    code: str = ""  # the handlers modules that declare it; empty: the API made it
    paused: bool = False
    next_at: int = 0
    last_at: int = 0  # the time of the last tick
    last_outcome: Outcome = ""  # of that tick
    last_run_at: int = 0  # the time of the last tick that had a job, and that job
    last_job: str = ""

    @property
    def calendar(self) -> Calendar:
        from tinyqueue_calendar import CalendarError, calendar_of  # here, because few programs have schedules

        try:
            return calendar_of(self.cron, self.timezone)
        except CalendarError as error:
            raise InvalidJob(error.field, str(error)) from None

    def tick(self, now: int, last: Job | None) -> tuple[Outcome, int]:
        """Return the outcome of a tick now, and the time of the tick. `last` is the last job.

        If several ticks were missed, only the last of them counts, and only if it was due within
        `catchup` seconds. With `overlap` one, the tick waits until the last job has ended, so the
        schedule stays due.
        """
        if self.paused or self.next_at > now:
            return "", 0
        since = now - round(1000 * max(self.catchup, GRACE))
        at = self.calendar.last(max(self.next_at, since), now)
        # With newer rules of its time zone, the time in the record may not match any more.
        at = at or (self.next_at if self.next_at >= since else 0)
        if not at:
            return "missed", self.next_at
        if last and last.status in UNENDED and self.overlap != "allow":
            return ("waiting" if self.overlap == "one" else "skipped"), at
        return "enqueued", at

    def ticked(self, now: int, outcome: Outcome, at: int) -> Schedule:
        """Return the schedule after a tick without a job: unchanged if it is not due, or waits."""
        if outcome in ("", "waiting"):
            return self
        return replace(self, next_at=self.calendar.next(now), last_at=at, last_outcome=outcome)

    def ran(self, at: int, job: Job, stored: Job) -> Schedule:
        """Return the schedule after a run. If another job has the uniqueKey, `stored` is that."""
        duplicate = stored is not job and at == self.last_at  # not of a run that was asked for
        outcome: Outcome = "duplicate" if duplicate else self.last_outcome
        return replace(self, last_outcome=outcome, last_run_at=at, last_job=stored.id)

    def job(self, now: int, at: int, shard: int | None, id: str) -> Job:
        """Make the job of a run. Its payload was checked when the schedule was declared."""
        made = new_id(now)
        job = Job(
            id=id or (made if shard is None else f"{made[:-2]}{shard:02x}"),
            type=self.type,
            payload=self.payload,
            max_attempts=self.max_attempts,
            queue=self.queue,
            unique_key=self.unique_key,
            schedule=self.name,
            scheduled_for=at,
        )
        job.limit = limit_of(job)
        return job

    def after(self, old: Schedule | None, now: int) -> Schedule:
        """Return this declaration with the state of an older one, such as its last run."""
        if old is None:
            return replace(self, next_at=self.calendar.next(now))
        own = {name: getattr(self, name) for name in DECLARED}
        same = (self.cron, self.timezone) == (old.cron, old.timezone)
        return replace(old, **own, next_at=old.next_at if same else self.calendar.next(now))

    def restore(self, found: Schedule | None, last: Job | None, now: int) -> tuple[Schedule, int]:
        """Return a schedule of a backup, unless one exists. The ticks it missed make no jobs."""
        return found or replace(self, next_at=self.calendar.next(now)), 0

    def overdue(self, now: int) -> int:
        """Return for how many milliseconds a tick has been due."""
        return 0 if self.paused else max(0, now - self.next_at)

    def answer(self, now: int, last: Job | None) -> dict[str, Any]:
        """The schedule as clients see it. Changes nothing."""
        # After a clock was set back, the next tick is further ahead than the calendar says.
        after = max(now, self.next_at - 1)
        ticks = [] if self.paused else list(itertools.islice(self.calendar.ticks(after), SHOWN_RUNS))
        run = {"scheduledFor": self.last_run_at, "jobId": self.last_job, "status": last.status if last else None}
        return {
            "name": self.name,
            "cron": self.cron,
            "timezone": self.timezone,
            "type": self.type,
            "payload": self.payload,
            "queue": self.queue,
            "maxAttempts": self.max_attempts,
            "uniqueKey": self.unique_key,
            "overlap": self.overlap,
            "catchup": self.catchup,
            "source": "code" if self.code else "api",
            "paused": self.paused,
            "nextRuns": ticks,
            "lastTick": {"scheduledFor": self.last_at, "outcome": self.last_outcome} if self.last_at else None,
            "lastRun": run if self.last_job else None,
            "warnings": self.calendar.surprises(now),
        }


_decode = msgspec.json.Decoder(Schedule).decode


def read_schedule(stored: bytes) -> Schedule:
    """Read a record. Raises Corrupted if it cannot be read."""
    try:
        return _decode(stored)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupted(f"the record of a schedule cannot be read: {error}; delete its key") from None


# Declaring ------------------------------------------------------------------------------------------------------------


def make_schedule(
    name: str,
    cron: str,
    type: str,
    payload: Any,
    *,
    timezone: str = "UTC",
    overlap: str = "skip",
    catchup: float = 3600,
    queue: str | None = None,
    max_attempts: int | None = None,
    unique_key: str | None = None,
    code: str = "",
) -> Schedule:
    """Check the parts of a schedule and make it. Raises InvalidJob with the field and the rule."""
    if overlap not in OVERLAPS:
        raise InvalidJob("overlap", f"must be one of {', '.join(OVERLAPS)}")
    if not is_number(catchup) or not 0 <= catchup <= MAX_CATCHUP:
        raise InvalidJob("catchup", f"must be a number of seconds from 0 to {MAX_CATCHUP}")
    check_name("name", name)
    job = make_job(0, type, payload, queue=queue, max_attempts=max_attempts, unique_key=unique_key)
    made = Schedule(
        name=name,
        cron=cron,
        type=type,
        payload=msgspec.json.decode(to_json(payload)),  # as it is once it is stored
        timezone=timezone,
        queue=job.queue,
        max_attempts=job.max_attempts,
        unique_key=job.unique_key,
        overlap=overlap,  # type: ignore[arg-type]
        catchup=catchup,
        code=code,
    )
    made.calendar  # noqa: B018 - raises
    return made


SCHEDULES: dict[str, Callable[[], Schedule]] = {}


def schedule(name: str, cron: str, type: str, payload: Any, **options: Any) -> None:
    """Declare a schedule: workers enqueue a job of that type whenever its cron expression matches.

    `timezone` is a name of the tz database. `overlap` is what a tick does while the last job has
    not ended: "skip" makes no job, "one" waits and then makes one, and "allow" makes a job. If
    ticks were missed because no worker ran, the last of them makes a job, unless it was due more
    than `catchup` seconds ago. `queue`, `max_attempts` and `unique_key` are those of the job.

    Mistakes raise InvalidJob when the module is imported. A type without a handler, or a payload
    that does not fit a handler that is declared later, raises it when all modules are imported.
    """
    make = partial(_declare, name, cron, type, payload, **options)
    made = make()
    if name in SCHEDULES and SCHEDULES[name]() != made:  # a reload declares the same again
        raise TypeError(f"two schedules are named {name!r}; rename one of them")
    SCHEDULES[name] = make


def _declare(name: str, *args: Any, **options: Any) -> Schedule:
    try:
        return make_schedule(name, *args, **options)
    except InvalidJob as error:
        raise InvalidJob(f"schedule {name!r}, {error.field}", error.rule, error.path) from None


def declared(code: str = "") -> list[Schedule]:
    """Return the schedules that this process declares. Raises InvalidJob if one is wrong."""
    found = {name: make() for name, make in SCHEDULES.items()}
    for type, handler in HANDLERS.items():
        if handler.schedule:
            if type in found:
                raise InvalidJob(f"schedule {type!r}", "is declared twice: by a handler and by schedule()")
            found[type] = _declare(type, handler.schedule, type, {}, timezone=handler.timezone)
    for name, made in found.items():
        if made.type not in HANDLERS:
            raise InvalidJob(f"schedule {name!r}, type", UnknownType(made.type, sorted(HANDLERS)).rule)
    return [replace(made, code=code) for made in found.values()]


def code_of(modules: str) -> str:
    """Return the name of the code that consists of these handlers modules."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", modules)[:100]


# Changing -------------------------------------------------------------------------------------------------------------

# Takes the stored schedule, its last job and the time. Returns the new schedule, and the time of
# the tick whose job is to be enqueued, or 0.
Change = Callable[[Schedule | None, Job | None, int], tuple[Schedule | None, int]]


def put(queue: Any, made: Schedule) -> Schedule:
    """Store a schedule, or replace one. Raises InvalidJob if the code declares it."""

    def change(found: Schedule | None, last: Job | None, now: int) -> tuple[Schedule | None, int]:
        if found and found.code:
            raise InvalidJob("name", f"schedule {made.name} is declared in code; change it there, or pause it")
        return made.after(found, now), 0

    _check_shard(queue, made)
    part = queue.part_for(made.name)
    count = part.store.read(("ZCARD", part.keys.ticks))[0]
    if count >= MAX_SCHEDULES and not part.store.read(("EXISTS", part.keys.schedule(made.name)))[0]:
        raise InvalidJob("name", f"cannot be added: there are {count} schedules already; remove some")
    stored = part.change_schedule(made.name, change)
    assert stored
    return cast(Schedule, stored)


def pause(queue: Any, name: str) -> Schedule | None:
    """Pause a schedule: its ticks do nothing. Return it, or None for an unknown name."""
    return _change(queue, name, lambda found, now: (replace(found, paused=True), 0))


def resume(queue: Any, name: str) -> Schedule | None:
    """Resume a paused schedule. Ticks that it has missed make no job."""

    def change(found: Schedule, now: int) -> tuple[Schedule, int]:
        return (replace(found, paused=False, next_at=found.calendar.next(now)) if found.paused else found), 0

    return _change(queue, name, change)


def remove(queue: Any, name: str) -> Schedule | None:
    """Remove a schedule and return it. Raises InvalidJob if the code declares it."""

    def change(found: Schedule, now: int) -> tuple[Schedule | None, int]:
        if found.code:
            raise InvalidJob("name", f"schedule {name} is declared in code; remove it there, or pause it")
        return None, 0

    return _change(queue, name, change)


def run(queue: Any, name: str) -> Job | None:
    """Enqueue the job of a schedule now, even if it is paused. Return it; None for an unknown name.

    The next tick stays as it is, and may find this job running. If another job has the uniqueKey,
    returns that one.
    """
    made = _change(queue, name, lambda found, now: (found, now))
    return cast(Job | None, queue.get(made.last_job)) if made else None


def _change(queue: Any, name: str, change: Callable[[Schedule, int], tuple[Schedule | None, int]]) -> Schedule | None:
    made = queue.part_for(name).change_schedule(
        name, lambda found, last, now: change(found, now) if found else (None, 0)
    )
    return cast(Schedule | None, made)


def _check_shard(queue: Any, made: Schedule) -> None:
    """Raise InvalidJob if the uniqueKey or the limit of its jobs belongs to another shard."""
    part = queue.part_for(made.name)
    if made.unique_key and queue.part_for(made.unique_key) is not part:
        rule = f"belongs to another shard than schedule {made.name}; use the name of the schedule as its uniqueKey"
        raise InvalidJob("uniqueKey", rule)
    limit = limit_of(made.job(0, 0, None, ""))
    if limit and queue.part_for(limit) is not part:
        rule = f"{made.name} belongs to another shard than the limit {limit} of its jobs; use another name"
        raise InvalidJob("name", rule)


def list_schedules(queue: Any) -> list[tuple[Schedule, Job | None]]:
    """Return all schedules by name, with the job of the last run if it still exists."""
    found: list[tuple[Schedule, Job | None]] = []
    for part in queue.parts:
        names = list(map(text_of, part.store.read(("ZRANGE", part.keys.ticks, 0, -1))[0]))
        records = part.store.read(("MGET", *map(part.keys.schedule, names)))[0] if names else []
        schedules = [read_schedule(record) for record in records if record is not None]
        jobs = {
            job.id: job for job, _ in part.read_jobs([made.last_job for made in schedules if made.last_job], 0) if job
        }
        found += [(made, jobs.get(made.last_job)) for made in schedules]
    return sorted(found, key=lambda item: item[0].name)


# Ticks ----------------------------------------------------------------------------------------------------------------


class Ticker:
    """Enqueues the jobs of the due schedules of a queue whenever `tick` is called.

    Reads the due times only once a minute, because ticks fall on whole minutes. If a tick has
    failed or waits for the end of a job, reads them again after RETRY.
    """

    def __init__(self, part: Any) -> None:
        self.part = part
        self.at = 0  # when to read next
        self.failed = Counter[str]()  # failed ticks that are not counted in Redis yet, by schedule and error

    def tick(self) -> None:
        """Enqueue what is due. Tries all schedules before it raises an error."""
        now = self.part.now()
        if self.at - 60_000 <= now < self.at:
            return
        due = self.part.store.read(("ZRANGEBYSCORE", self.part.keys.ticks, "-inf", now))[0]
        self.at = now - now % 60_000 + 60_000
        trouble: TinyQueueError | None = None
        for name in map(text_of, due):
            try:
                left = self.part.change_schedule(name, tick)
            except TinyQueueError as error:
                trouble = error
                self.failed[f"{name}:{type(error).__name__}"] += 1
            if trouble or (left and left.next_at <= now):
                self.at = min(self.at, now + RETRY)
        self._count_failed()
        if trouble:
            raise trouble

    def _count_failed(self) -> None:
        """Count failed ticks in the metrics. If Redis is too full, the next call retries."""
        if self.failed:
            with suppress(TinyQueueError):
                self.part.count_failed_ticks(self.failed)
                self.failed.clear()


def tick(found: Schedule | None, last: Job | None, now: int) -> tuple[Schedule | None, int]:
    """Decide what a tick does: a Change."""
    if found is None:
        return None, 0
    outcome, at = found.tick(now, last)
    return found.ticked(now, outcome, at), at if outcome == "enqueued" else 0


# Syncing what the code declares ---------------------------------------------------------------------------------------


class Generation(msgspec.Struct, rename="camel"):
    """Which releases of a code have synced. `number` counts how often one has replaced another.

    `releases` are the fingerprints, newest first. A worker of the newest was seen at `seen_at`.
    """

    number: int = 0
    releases: list[str] = []
    seen_at: int = 0

    def next(self, own: str, now: int) -> Generation | None:
        """Return the generation after a sync of that release, or None if it may not sync."""
        if own in self.releases[1:] and now - self.seen_at < ABSENT * 1000:
            return None
        if own == (self.releases or [""])[0]:
            late = not 0 <= now - self.seen_at < SEEN_EVERY * 1000
            return replace(self, seen_at=now) if late else self
        releases = [own, *(release for release in self.releases if release != own)]
        return Generation(self.number + 1, releases[:RELEASES], now)


def read_generation(stored: bytes | None) -> Generation:
    try:
        return msgspec.json.decode(stored or b"{}", type=Generation)
    except msgspec.DecodeError as error:
        raise Corrupted(f"the generation of schedules cannot be read: {error}; delete its key") from None


def fingerprint(schedules: Sequence[Schedule]) -> str:
    """Return a digest of all that a release of the code declares. Another release has another."""
    text = encode(sorted(encode(made).decode() for made in schedules))
    return hashlib.sha256(text).hexdigest()[:16]


class Merge(NamedTuple):
    """What a sync writes: schedules that are new or changed, and names that are gone.

    `taken` are names that the code declares and that the API or other code had first. Their
    schedules stay as they are.
    """

    changed: list[Schedule]
    gone: list[str]
    taken: list[str]

    def names(self) -> dict[str, list[str]]:
        events = {"added or changed": [made.name for made in self.changed], "removed": self.gone}
        return {event: names for event, names in events.items() if names}


NOTHING = Merge([], [], [])


def merge(code: str, wanted: Iterable[Schedule], found: Mapping[str, Schedule], now: int) -> Merge:
    """Compare the schedules that a code declares with those that are stored."""
    ours = {made.name: made for made in wanted}
    free = {name: made for name, made in ours.items() if name not in found or found[name].code == code}
    after = [made.after(found.get(name), now) for name, made in free.items()]
    changed = [made for made in after if made != found.get(made.name)]
    gone = [name for name, old in found.items() if old.code == code and name not in ours]
    return Merge(changed, gone, sorted(ours.keys() - free.keys()))


def sync(queue: Any, code: str, wanted: Sequence[Schedule]) -> list[Merge]:
    """Call `Queue.sync_schedules` in every shard. Return what has changed where it is used."""
    parts = ((part, [made for made in wanted if queue.part_for(made.name) is part]) for part in queue.parts)
    return [merged for part, made in parts if (merged := part.sync_schedules(code, made))]


class Scheduler:
    """The work of a worker on schedules: it syncs those that its code declares, and ticks.

    Raises InvalidJob if a schedule that the code declares is wrong.
    """

    def __init__(self, queue: Any, modules: str) -> None:
        self.queue = queue
        self.code = code_of(modules)
        self.declared = declared(self.code)
        for made in self.declared:
            _check_shard(queue, made)
        self.tickers = [Ticker(part) for part in queue.parts]
        self.unused = False  # this code declares none, and never has
        self.taken: list[str] = []  # declared names that the API or other code had first, as last logged

    def surprises(self) -> list[str]:
        """Describe effects of the next clock changes on its schedules that may surprise."""
        now = time.time_ns() // 1_000_000
        texts = ((made, text) for made in self.declared for text in made.calendar.surprises(now))
        return [f"schedule {made.name} ({made.cron}): {text}" for made, text in texts]

    def sync(self) -> None:
        """Sync the declared schedules, and log what has changed."""
        taken = []
        merges = [] if self.unused else sync(self.queue, self.code, self.declared)
        self.unused = not self.declared and not merges
        for merged in merges:
            for event, names in merged.names().items():
                log.info("schedules %s: %s", event, ", ".join(names))
            taken += merged.taken
        if taken and taken != self.taken:
            log.warning("schedules not synced: %s: %s", ", ".join(taken), TAKEN)
        self.taken = taken

    def tick(self) -> None:
        """Enqueue what is due, in every shard that answers."""
        trouble: TinyQueueError | None = None
        for ticker in self.tickers:
            try:
                ticker.tick()
            except TinyQueueError as error:  # the other shards may have due schedules too
                trouble = error
        if trouble:
            raise trouble
