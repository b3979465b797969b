"""The data that a verdict is based on: everything that one look at a queue reads.

A `Look` reads a shard in a few round trips, and reads no list of jobs as a whole. A `Sight` adds up
the looks at all shards. tinyqueue_doctor.py judges it.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from tinyqueue import (
    BUCKETS,
    LIMIT,
    MINUTE_KEPT,
    NAME,
    SERIES,
    UNENDED,
    Queue,
    TinyQueueError,
    Unavailable,
    read_count,
    read_workers,
)
from tinyqueue_metrics import percentile
from tinyqueue_reading import time_in
from tinyqueue_redis import pairs, text_of
from tinyqueue_schedule import read_schedule

MINUTE = 60_000  # milliseconds
RECENT = 5  # minutes that a verdict looks back
LATEST = 2  # the last of these minutes: a problem that is not in them is over
SHORT_WAIT = 3000  # milliseconds that a job may always wait
LONG_RUN = 30_000  # milliseconds that a job of any type may run
UNKNOWN_RUN = 900_000  # the same for a type with fewer than SAMPLES ended attempts
SAMPLES = 10
NAMED = 10  # jobs, queues or others that a problem names
LIMITS_READ = 50  # limits with held jobs that one look reads
AWAY = ("unreachable", "timeout", "loading")

Minutes = dict[int, dict[str, int]]  # the counts of each minute since 1970


class Waiting(NamedTuple):
    """The job that has waited for the longest time, since when, and in which queue."""

    since: int
    job: str
    queue: str


class Look:
    """The data that one look at a shard has read, in a few round trips."""

    def __init__(self, part: Queue, server: Mapping[str, str], known: Minutes) -> None:
        """Look at a shard. `known` are the minutes that an earlier look has read."""
        self.part = part
        self.now = part.now()
        self.refusal: TinyQueueError | None = None  # why Redis takes no writes
        try:
            part.ping()
        except Unavailable as error:
            if error.reason in AWAY:
                raise
            self.refusal = error
        memory = part.store.memory()
        self.info = {**server, **memory} if memory else {}
        self._read_tables(known)
        self._read_places()

    def _read_tables(self, known: Minutes) -> None:
        keys = self.part.keys
        last = self.now // MINUTE
        minutes = range(last + 1 - RECENT, last + 1)
        changing = [minute for minute in minutes if minute not in known or minute > last - LATEST]
        due = ("ZRANGEBYSCORE", keys.delayed, "-inf", self.now - SHORT_WAIT, "LIMIT", 0, NAMED)
        ticks = ("ZRANGEBYSCORE", keys.ticks, "-inf", self.now, "WITHSCORES", "LIMIT", 0, NAMED)
        sets = [("SMEMBERS", key) for key in (keys.paused, keys.workers, keys.holding)]
        tables = [keys.counts, keys.trouble, *(keys.minute(minute * MINUTE) for minute in changing)]
        found = self.part.store.read(due, ticks, *sets, *(("HGETALL", key) for key in tables))
        self.due, late, paused, workers, holding, *hashes = found
        rows = [{field: read_count(value) for field, value in pairs(table)} for table in hashes]
        self.counts, self.trouble, *counted = rows
        newer = known | dict(zip(changing, counted, strict=True))
        self.minutes = {minute: newer[minute] for minute in minutes}
        self.paused = set(map(text_of, paused))
        self.worker_ids = sorted(filter(NAME.fullmatch, map(text_of, workers)))
        self.limits = sorted(filter(LIMIT.fullmatch, map(text_of, holding)))[:LIMITS_READ]
        self.late = {name: int(float(at)) for name, at in pairs(late)}

    def _read_places(self) -> None:
        """Read the workers and the halts, and the next job of each place where jobs wait."""
        keys = self.part.keys
        counted = (field.partition(":")[2] for field, count in self.counts.items() if count > 0)
        names = [name for name in dict.fromkeys(counted) if name and name not in self.paused]
        lists = list(map(keys.jobs, names))
        about = [key for id in self.worker_ids for key in (keys.worker(id), keys.lease(id))]
        held = [("ZRANGE", keys.held(limit), 0, NAMED - 1) for limit in self.limits]
        sizes = [("ZCARD", keys.held(limit)) for limit in self.limits]
        mget = ("MGET", *about, *map(keys.halt, self.limits), keys.mark)
        lengths = [("LLEN", key) for key in lists]
        values, *found = self.part.store.read(mget, *lengths, *(("LINDEX", key, -1) for key in lists), *held, *sizes)
        self.ready = sum(found[: len(lists)])
        found = found[len(lists) :]
        heads = dict(zip(names, found[: len(lists)], strict=True))
        self.workers = read_workers(self.worker_ids, values[: len(about)], self.paused)
        self.halted = {limit for limit, value in zip(self.limits, values[len(about) :], strict=False) if value}
        found = found[len(lists) :]
        self.held_counts = dict(zip(self.limits, found[len(held) :], strict=True))
        self._read_waiting(heads, dict(zip(self.limits, found[: len(held)], strict=True)))

    def _read_waiting(self, heads: Mapping[str, bytes | None], entries: Mapping[str, Sequence[bytes]]) -> None:
        """Read the jobs that may have waited for some time. Their ids say when they were submitted.

        A look at a queue without a backlog therefore reads no job.
        """
        awake = {limit: [e for e in map(text_of, some) if self._runs(e)] for limit, some in entries.items()}
        held = {limit: some[0].partition(":")[2] for limit, some in awake.items() if some}
        queued = self.part.next_jobs({name: id for name, id in heads.items() if id and self._is_old(id)})
        others = [id for id in (*self.due, *map(str.encode, held.values())) if self._is_old(id)]
        self.held: dict[str, Waiting] = {}
        self.waiting: dict[str, Waiting] = {}
        for job in [*queued.values(), *self.part.pending_among(others)]:
            mine = Waiting(self.now - job.waited(self.now), job.id, job.queue)
            if job.queue in self.paused or mine.since > self.now - SHORT_WAIT:
                continue
            if job.id in held.values():
                self.held |= {limit: mine for limit, id in held.items() if id == job.id}
            else:
                self.waiting[job.queue] = min(self.waiting.get(job.queue, mine), mine)

    def _is_old(self, entry: bytes) -> bool:
        """Whether an entry is the id of a job that was submitted some time ago."""
        return 0 < time_in(entry) <= self.now - SHORT_WAIT

    def note_ready(self) -> None:
        """Store once a minute how many jobs wait. Later looks see whether the backlog grows."""
        minute = self.now // MINUTE
        if self.ready and "ready" not in self.minutes[minute]:
            key = self.part.keys.minute(self.now)
            with suppress(TinyQueueError):
                self.part.store.read(("HSETNX", key, "ready", self.ready), ("EXPIRE", key, MINUTE_KEPT))
                self.minutes[minute]["ready"] = self.ready

    def count_held(self, workers: Sequence[str]) -> int:
        """Count the entries in the lists of some workers."""
        lengths = [("LLEN", self.part.keys.proc(id)) for id in workers]
        return sum(self.part.store.read(*lengths)) if lengths else 0

    def _runs(self, entry: str) -> bool:
        return entry.partition(":")[0] not in self.paused

    def blocked_schedules(self) -> dict[str, str]:
        """Return the overdue schedules that wait for the end of their last job, with that job."""
        read = self.part.store.read
        records = read(("MGET", *map(self.part.keys.schedule, self.late)))[0] if self.late else []
        made = [read_schedule(record) for record in records if record]
        last = {schedule.last_job: schedule.name for schedule in made if schedule.last_job}
        jobs = (job for job, _ in self.part.read_jobs(list(last), cut=0) if job)
        return {last[job.id]: job.id for job in jobs if job.status in UNENDED}

    def still_run(self, slots: Mapping[str, int]) -> set[str]:
        """Return which of these jobs still run since that time."""
        jobs = (job for job, _ in self.part.read_jobs(list(slots), cut=0) if job and job.status == "processing")
        return {job.id for job in jobs if job.started_at == slots[job.id]}


class Sight:
    """The data of the looks at all shards together."""

    def __init__(
        self, looks: Sequence[Look], max_wait: float, refused: Mapping[str, int], is_miscounted: Callable[[], bool]
    ) -> None:
        """Add up the looks.

        `refused` has the submissions that are not counted in Redis yet. `is_miscounted` returns
        whether more jobs are counted than listed.
        """
        self.looks = looks
        self.is_miscounted = is_miscounted
        self.now = looks[0].now
        self.max_wait = round(1000 * max_wait) or sys.maxsize
        self.patience = 2 * self.max_wait // 5  # for jobs while no worker is alive
        self.counts = Counter[str]()
        for look in looks:
            self.counts.update(look.counts)
        self.waiting: dict[str, Waiting] = {}
        for name, waiting in (item for look in looks for item in look.waiting.items()):
            self.waiting[name] = min(self.waiting.get(name, waiting), waiting)
        self.workers: dict[str, list[dict[str, Any]]] = {}  # by id, as each shard knows it
        for worker in (worker for look in looks for worker in look.workers):
            self.workers.setdefault(worker["id"], []).append(worker)
        self.alive = [known for known in self.workers.values() if any(worker["alive"] for worker in known)]
        self.halted = {limit for look in looks for limit in look.halted}
        self.minutes: dict[int, Counter[str]] = {}
        for minute, counts in (item for look in looks for item in look.minutes.items()):
            self.minutes.setdefault(minute, Counter()).update(counts)
        self.minutes[max(self.minutes)].update({f"refused:{reason}": n for reason, n in refused.items()})
        self.serving = [known[0] for known in self.alive if not known[0]["quiet"]]
        self.quiet = {name for known in self.alive if known[0]["quiet"] for name in known[0]["queues"]}
        self.served = {name for worker in self.serving for name in worker["queues"]}

    def waited(self, name: str) -> int:
        """Return how long the next job of a queue has waited, in ms."""
        return self.now - self.waiting[name].since

    def recent(self, event: str, minutes: int = RECENT) -> Counter[str]:
        """Add up the counts of the last minutes whose fields begin with that event."""
        found = Counter[str]()
        for minute in sorted(self.minutes)[-minutes:]:
            counts = self.minutes[minute].items()
            found.update({field.removeprefix(event): n for field, n in counts if field.startswith(event)})
        return found

    def oldest_first(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: self.waiting[name])

    def count_pending(self, names: Iterable[str]) -> int:
        return sum(self.counts["pending:" + name] for name in names)

    def all_run_long(self, slots: Sequence[Mapping[str, Any]]) -> bool:
        """Whether all these slots run jobs that take longer than usual.

        `slots` are as of the last heartbeat, so this reads some of the jobs to see whether they
        still run.
        """
        shortest: dict[str, int] = {}
        for slot in slots:
            ran = self.now - slot["startedAt"]
            shortest[slot["type"]] = min(ran, shortest.get(slot["type"], ran))
        if any(ran < LONG_RUN for ran in shortest.values()):
            return False
        usual = self._usual_times(shortest)
        if any(ran < max(LONG_RUN, 3 * usual[type]) for type, ran in shortest.items()):
            return False
        some = {slot["jobId"]: slot["startedAt"] for slot in slots[:NAMED]}
        return some.keys() == {id for look in self.looks for id in look.still_run(some)}

    def _usual_times(self, types: Iterable[str]) -> dict[str, float]:
        """Return for each type the 95th percentile of the time that its attempts ran, in ms."""
        usual = defaultdict[str, float](lambda: UNKNOWN_RUN / 3)
        for type in itertools.islice(types, NAMED):
            fields = [f"ran:{type}:{name}:{bound}" for name in sorted(self.served)[:SERIES] for bound in BUCKETS]
            counts = [0] * len(BUCKETS)
            for look in self.looks:
                found = look.part.store.read(("HMGET", look.part.keys.metrics, *fields))[0]
                for at, value in enumerate(found):
                    counts[at % len(BUCKETS)] += read_count(value)
            known = percentile(counts, 0.95) if sum(counts) >= SAMPLES else None
            usual[type] = known or UNKNOWN_RUN / 3
        return usual
