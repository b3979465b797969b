"""Reading a queue: listings, counts, load, workers and metrics. Nothing here changes a job.

`Reading` is a base of Queue, which has the keys, the connections and the verbs.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from tinyqueue_job import (
    ENDED,
    ID,
    NAME,
    UNENDED,
    Corrupted,
    Entry,
    Filter,
    Job,
    Page,
    Place,
    Status,
    ids_in,
    listed_job,
    place_of,
    translated,
)
from tinyqueue_json import created_at
from tinyqueue_redis import Clock, pairs, text_of

if TYPE_CHECKING:
    from tinyqueue import Keys, Limits, Store

Range = Literal["LRANGE", "ZRANGE"]
Times = dict[str, dict[str, dict[str, int]]]  # by type, then "waited" or "ran", then bucket
SCANNED = 1000  # jobs that one page of a listing or one bulk change looks at
PAGE_BYTES = 32 << 20  # bytes of records that it looks at
READ_BYTES = 1 << 20  # bytes of records that it reads with one command
LISTED = 10_000  # entries of a list that are read with one command
LONG = 200  # entries of a list of which a page may read only the beginning
HEAD = 100  # entries of a long list that are read first
TAIL = 50  # entries at the right end of a long list that a page looks at
PROBES = 200  # places of long lists at which a page looks whether ids are in order
JITTER = 1000  # milliseconds after its creation in which a job may enter its list
STALE = 1000  # entries of a list that are searched for the next pending job
SAMPLED = 100  # due jobs that a count for scaling reads while no worker promotes them
BUCKETS = (10, 50, 250, 1000, 5000, 15_000, 60_000, 300_000, 1_800_000, math.inf)  # ms
QUIET_MARK = "@"  # before the id of a quiet worker among the names of the paused queues
PAUSE_AGE = 0.1  # seconds for which the known set of paused queues is used


class Reading:
    """What can be read of a queue in one namespace."""

    keys: Keys
    store: Store
    limits: Limits
    _paused: tuple[float, frozenset[str]]

    @property
    def clock(self) -> Clock:
        return self.store.clock

    def now(self) -> int:
        """Redis TIME in milliseconds."""
        if self.clock.stale:
            self.store.read()
        return self.clock.now()

    def _note_paused(self, members: Iterable[bytes] | Exception) -> None:
        found = () if isinstance(members, Exception) else members
        self._paused = (time.monotonic(), frozenset(map(text_of, found)))

    def _not_paused(self, names: Sequence[str], worker: str = "") -> list[str]:
        """Leave out paused queues, and all queues if the worker is quiet, as of PAUSE_AGE ago."""
        if time.monotonic() - self._paused[0] > PAUSE_AGE:
            with suppress(Corrupted):  # a key of the wrong type pauses nothing
                self._note_paused(self.store.read(("SMEMBERS", self.keys.paused))[0])
        paused = self._paused[1]
        return [] if QUIET_MARK + worker in paused else [name for name in names if name not in paused]

    def page(self, filter: Filter | None = None, *, limit: int = 50, cursor: str = "", cut: int | None = None) -> Page:
        """Return matching jobs, newest first, and the cursor of the next page; "" after the last.

        Sorted by when jobs ended, or were created if they have not ended. The cursor is a place in
        that order, so jobs that come or go shift nothing. A job that keeps its status is on exactly
        one page. One whose status changes meanwhile may be on none, or on two. Looks at up to
        SCANNED jobs and PAGE_BYTES of their records, so a page may be short or even empty and still
        have a cursor. Also reads the ids of all unended jobs, up to LISTED with each command. Of
        long queues it usually reads only those up to the end of the page. With `cut`, payloads and
        results stay JSON, a `msgspec.Raw`, or a `Preview` if they have more bytes than that. Raises
        InvalidJob for a malformed cursor.
        """
        filter = (filter or Filter()).check()
        entries = self._find_entries(filter, place_of(cursor or "9999999999999999.g"))
        jobs: list[Job] = []
        seen = size = 0
        for id, record in self.read_records([id for _, id, _ in entries[:SCANNED]]):
            found_in = entries[seen][2]
            seen += 1
            size += len(record or b"")
            job = listed_job(id, record, cut) if record else None
            if job and record and job.status in found_in and filter.matches(job, record):
                jobs.append(job)
            if len(jobs) == limit or size > PAGE_BYTES:
                break
        return Page(jobs, "{}.{}".format(*entries[seen - 1]) if len(entries) > seen else "", seen)

    def read_jobs(self, ids: Sequence[str], cut: int | None = None) -> Iterator[tuple[Job | None, int]]:
        """Read jobs, and the sizes of their records."""
        for id, record in self.read_records(ids):
            yield (listed_job(id, record, cut), len(record)) if record else (None, 0)

    def read_records(self, ids: Sequence[str], most: int = 100) -> Iterator[tuple[str, bytes | None]]:
        """Read the records of jobs: about READ_BYTES and up to `most` with each command."""
        for at in range(0, len(ids), most):
            part = ids[at : at + most]
            sizes = itertools.accumulate(self.store.read(*(("STRLEN", self.keys.job(id)) for id in part)))
            for _, group in itertools.groupby(zip(sizes, part, strict=True), lambda item: item[0] // READ_BYTES):
                wanted = [id for _, id in group]
                yield from zip(wanted, self.store.read(("MGET", *map(self.keys.job, wanted)))[0], strict=True)

    def _find_entries(self, filter: Filter, before: Place) -> list[Entry]:
        """Return the first SCANNED + 1 places after the cursor at which a job may be listed."""
        entries: list[Entry] = []
        if filter.status is None or filter.status in UNENDED:
            entries += self._find_unended(filter, before)
        for status in ENDED:
            if filter.status in (None, status):
                entries += self._find_ended(status, before)
        return sorted(entries, reverse=True)[: SCANNED + 1]

    def _find_ended(self, status: Status, before: Place) -> list[Entry]:
        newest = ("ZREVRANGEBYSCORE", self.keys.ended[status], before[0], "-inf", "WITHSCORES", "LIMIT")
        entries: list[Entry] = []
        for start in itertools.count(0, SCANNED + 1):
            found = pairs(self.store.read((*newest, start, SCANNED + 1))[0])
            entries += [(int(at), id, (status,)) for id, at in found if (int(at), id) < before]
            if len(found) <= SCANNED or len(entries) > SCANNED:
                break
        return entries

    def _find_unended(self, filter: Filter, before: Place) -> list[Entry]:
        """Find pending and processing jobs. Compares ids as bytes, which sort by time of creation.

        Reading them as jobs would be too slow, because there may be a million.
        """
        start = f"{min(before[0], (1 << 48) - 1):012x}"
        start = f"{start[:8]}-{start[8:]}"
        bound = min(max(before[1], start), start + "~").encode()
        first: list[bytes] = []

        def oldest() -> bytes:
            return first[-1] if len(first) > SCANNED else b""

        for window in self._read_unended(filter, oldest):
            last = oldest()
            if closer := [id for id in window if last < id < bound]:
                first = _newest(closer, first)
        return [(created_at(id), id, UNENDED) for id in map(text_of, first)]

    def _read_unended(self, filter: Filter, oldest: Callable[[], bytes]) -> Iterator[list[bytes]]:
        """Read the entries of all lists that may hold unended jobs, up to LISTED at a time.

        Reads them in the order in which a job moves on, so that it misses none that moves
        meanwhile. Reads the lists of workers twice, because a job may go back from there. Skips
        entries older than `oldest` returns, where that is cheap.
        """
        held = [self.keys.proc(worker) for worker in self._known_workers()]
        yield from self.read_lists(held)
        if filter.status != "processing":
            yield from self.read_entries(self.keys.delayed, "ZRANGE")
            yield from self.read_held()
            names = [filter.queue] if filter.queue else self.queue_names()
            lists = [self.keys.jobs(name) for name in names]
            yield from self._read_newest(lists, oldest)
            yield from self.read_lists([self.keys.proc(worker) for worker in self._known_workers()])
            yield from self.read_held()

    def _read_newest(self, keys: Sequence[str], oldest: Callable[[], bytes]) -> Iterator[list[bytes]]:
        """Read lists of queues. Of a long list, read only the beginning, as far as needed.

        Jobs enter a list at its left. Behind a job that entered when it was created, none is newer
        than it. So reading stops at such a job if it is older than `oldest` returns. Two things
        break this rule: jobs that enter at the right, and a repair that enters old jobs again. So
        the ids at some places and at the right end must be in order, too.
        """
        sizes = self.store.read(*(("LLEN", key) for key in keys)) if keys else []
        long = {key: size for key, size in zip(keys, sizes, strict=True) if size > LONG}
        yield from self.read_lists([key for key in keys if key not in long])
        count = max(4, PROBES // max(len(long), 1))
        places = [(key, (size - TAIL) * at // (count - 1)) for key, size in long.items() for at in range(count)]
        ends = [("LRANGE", key, -TAIL, -1) for key in long]
        probes = self.store.read(*(("LINDEX", key, place) for key, place in places), *ends) if long else []
        times = {key: [time_in(probes.pop(0) or b"") for _ in range(count)] for key in long}
        for own, end in zip(times.values(), probes, strict=True):
            own.append(max(map(time_in, end), default=0))
        left = {key: 0 for key, own in times.items() if all(old <= new + JITTER for new, old in pairwise(own))}
        yield from self.read_lists([key for key in long if key not in left])
        step = HEAD
        while left:
            windows = self.store.read(*(("LRANGE", key, at, at + step - 1) for key, at in left.items()))
            yield list(itertools.chain(*windows))
            some = [window[-step // 4 :: step // 8] if len(window) == step else [] for window in windows]
            direct = self._entered_before(time_in(oldest()), list(itertools.chain(*some)))
            further = [bool(ids) and direct.isdisjoint(ids) for ids in some]
            left = {key: at + step - step // 10 for (key, at), more in zip(left.items(), further, strict=True) if more}
            step = max(HEAD, min(4 * step, LISTED // max(len(left), 1)))

    def _entered_before(self, time: int, entries: Sequence[bytes]) -> set[bytes]:
        """Return those of some entries that entered their list at their creation, before a time."""
        ids = [text_of(entry) for entry in entries if time_in(entry) + JITTER < time]
        jobs = (job for job, _ in self.read_jobs(ids, cut=0) if job)
        direct = (job for job in jobs if job.status == "pending" and not (job.run_at or job.attempts or job.after))
        return {job.id.encode() for job in direct if job.updated_at <= created_at(job.id) + JITTER}

    def read_held(self) -> Iterator[list[bytes]]:
        """Read the ids of the held jobs of all limits."""
        limits = sorted(map(text_of, self.store.read(("SMEMBERS", self.keys.holding))[0]))
        for window in self.read_lists(list(map(self.keys.held, limits)), "ZRANGE"):
            yield [entry.rpartition(b":")[2] for entry in window]

    def queue_names(self) -> list[str]:
        """Return the names of the queues that have jobs, or had some and were not forgotten."""
        return sorted(queues_in(pairs(self.store.read(("HGETALL", self.keys.counts))[0])))

    def read_lists(self, keys: Sequence[str], command: Range = "LRANGE") -> Iterator[list[bytes]]:
        """Read the first entries of 100 lists at a time, because most are short."""
        for at in range(0, len(keys), 100):
            part = keys[at : at + 100]
            heads = self.store.read(*((command, key, 0, 99) for key in part))
            yield list(itertools.chain(*heads))
            for key, head in zip(part, heads, strict=True):
                if len(head) == 100:
                    yield from self.read_entries(key, command)

    def read_entries(self, key: str, command: Range = "LRANGE") -> Iterator[list[bytes]]:
        """Read a list from its left, or a sorted set from its highest score, LISTED at a time.

        That is the end at which take and promote remove nothing. Windows overlap, because whatever
        else removes entries moves the later ones.
        """
        start = 0
        while True:
            end = start + LISTED - 1
            found = self.store.read((command, key, *((start, end) if command == "LRANGE" else (~end, ~start))))[0]
            yield found
            if len(found) < LISTED:
                return
            start += LISTED - LISTED // 10

    def queues(self) -> dict[str, dict[str, Any]]:
        """Return counts, oldest wait and pause of every queue that ever had a job or is paused."""
        fields, paused = self.store.read(("HGETALL", self.keys.counts), ("SMEMBERS", self.keys.paused))
        self._note_paused(paused)
        counts = {field: read_count(value) for field, value in pairs(fields)}
        counted = {field.partition(":")[2] for field in counts if ":" in field}
        names = sorted(counted | set(filter(NAME.fullmatch, self._paused[1])))
        found = self.store.read(*(("LINDEX", self.keys.jobs(name), -1) for name in names))
        heads = {name: id for name, id in zip(names, found, strict=True) if counts.get("pending:" + name)}
        now = self.now()
        waited = {name: job.waited(now) for name, job in self.next_jobs(heads).items()}
        return {
            name: {
                "pending": counts.get("pending:" + name, 0),
                "processing": counts.get("processing:" + name, 0),
                "oldestWaitingMs": waited.get(name, 0),
                "paused": name in self._paused[1],
            }
            for name in names
        }

    def next_jobs(self, heads: Mapping[str, bytes | None]) -> dict[str, Job]:
        """Return the next pending job of each queue that has one. `heads` are the first entries.

        The entry of a cancelled job stays until a worker drops it. If the first entry of a queue
        names no pending job, this looks at up to STALE more.
        """
        jobs = {job.id: job for job in self.pending_among(filter(None, heads.values()))}
        found = {name: jobs.get(text_of(id)) or self._first_pending(name) for name, id in heads.items() if id}
        return {name: job for name, job in found.items() if job}

    def _first_pending(self, name: str) -> Job | None:
        entries = self.store.read(("LRANGE", self.keys.jobs(name), -STALE, -1))[0]
        jobs = (job for job, _ in self.read_jobs(ids_in(reversed(entries)), cut=0))
        return next((job for job in jobs if job and job.status == "pending"), None)

    def count_unended(self) -> tuple[list[int], int]:
        """Count pending and processing jobs, and the entries of their lists, all at one moment."""
        keys = [*map(self.keys.jobs, self.queue_names()), *map(self.keys.proc, self._known_workers())]
        limits = map(text_of, self.store.read(("SMEMBERS", self.keys.holding))[0])
        lengths = [("LLEN", key) for key in keys] + [("ZCARD", self.keys.held(limit)) for limit in limits]
        reads = ("HGETALL", self.keys.counts), ("ZCARD", self.keys.delayed), *lengths
        counts, *sizes = checked(self.store.read(("MULTI",), *reads, ("EXEC",))[-1])
        return [read_count(value) for field, value in pairs(counts) if ":" in field], sum(sizes)

    def stats(self, minutes: int = 0) -> dict[str, Any]:
        """Count the jobs of every status, those of every queue, and the live workers.

        `pending` includes the delayed and the `retrying` jobs. A retrying job waits, after a failed
        attempt, for its backoff or for a slot. `lastMinute` estimates the jobs that ended in
        the last sixty seconds. `total` counts all that ever ended, even if their records have
        expired. With `minutes`, `history` has an entry for each of the last minutes. Their counts
        exist for 120.
        """
        queues = self.queues()
        now = self.now()
        indexes = [self.keys.delayed, *(self.keys.ended[status] for status in ENDED)]
        [*totals, retrying], last, this, looks, delayed, *kept = self.store.read(
            ("HMGET", self.keys.counts, *ENDED, "retrying"),
            ("HMGET", self.keys.minute(now - 60_000), *ENDED),
            ("HMGET", self.keys.minute(now), *ENDED),
            ("SCARD", self.keys.holding),
            *(("ZCARD", index) for index in indexes),
        )
        share = 1 - now % 60_000 / 60_000  # the part of the previous minute in the last sixty seconds
        recent = zip(ENDED, last, this, strict=True)
        leases = [self.keys.lease(worker) for worker in self._known_workers()]
        return {
            "pending": sum(queue["pending"] for queue in queues.values()),
            "processing": sum(queue["processing"] for queue in queues.values()),
            "delayed": max(0, delayed - looks),
            "retrying": max(0, read_count(retrying)),
            **dict(zip(ENDED, kept, strict=True)),
            "oldestWaitingMs": max((queue["oldestWaitingMs"] for queue in queues.values()), default=0),
            "workers": self.store.read(("EXISTS", *leases))[0] if leases else 0,
            "queues": queues,
            "lastMinute": {status: round(read_count(old) * share) + read_count(new) for status, old, new in recent},
            "total": {status: read_count(total) for status, total in zip(ENDED, totals, strict=True)},
            **({"history": self._history(now, minutes)} if minutes else {}),
        }

    def scale(self, names: Sequence[str] = ()) -> dict[str, int]:
        """Count the jobs that need workers now, of these queues or of all.

        `ready` jobs are due, and their queue is not paused. Due schedules count as ready jobs,
        because only workers tick. `load` adds the jobs in `processing`.

        Due jobs that no worker has promoted yet are ready too, and so are held jobs with room. If
        these are more than SAMPLED, only the first are read. The others are expected to have the
        same queues, and at least one job is counted for every queue that may have one. So a first
        worker starts, which promotes them.
        """
        now = self.now()
        due = self.keys.delayed, "-inf", now
        reads = ("ZCOUNT", *due), ("ZRANGEBYSCORE", *due, "LIMIT", 0, SAMPLED), ("ZCOUNT", self.keys.ticks, "-inf", now)
        tables = ("HGETALL", self.keys.counts), ("SMEMBERS", self.keys.paused)
        counted, paused, late, first, ticks = self.store.read(*tables, *reads)
        self._note_paused(paused)
        counts = {field: read_count(value) for field, value in pairs(counted)}
        names = list(dict.fromkeys(names)) or sorted(queues_in(pairs(counted)))
        waiting = self._not_paused([name for name in names if counts.get("pending:" + name)])
        lists = [self.keys.jobs(name) for name in waiting]
        found = self.store.read(*(("LLEN", key) for key in lists), *(("LINDEX", key, -1) for key in lists))
        sizes = found[: len(lists)]
        heads = self.next_jobs(dict(zip(waiting, found[len(lists) :], strict=True)))
        roomy = self.limits.startable(first)
        held = Counter(entry.partition(":")[0] for entry in roomy)
        promotable = self.pending_among(first)
        share = Counter(job.queue for job in promotable)
        ready = 0
        for name, size in zip(waiting, sizes, strict=True):
            unpromoted = max(math.ceil(share[name] * late / max(len(first), 1)), int(late > len(first)))
            ready += min(counts["pending:" + name], size + unpromoted + held[name])
        ready = min(ready, sum(sizes) + late + len(roomy)) + ticks
        oldest = [entry.partition(":")[2].encode() for entry in roomy]
        jobs = [*promotable, *heads.values(), *self.pending_among(oldest)]
        ages = [job.waited(now) for job in jobs if job.queue in waiting]
        processing = sum(counts.get("processing:" + name, 0) for name in names)
        return {
            "ready": ready,
            "processing": processing,
            "load": ready + processing,
            "oldestWaitingMs": max(ages, default=0),
        }

    def pending_among(self, entries: Iterable[bytes]) -> list[Job]:
        """Read the jobs that some entries name. Return those that are pending."""
        ids = ids_in(entries)
        records = self.store.read(("MGET", *map(self.keys.job, ids)))[0] if ids else []
        jobs = (listed_job(id, record, 0) for id, record in zip(ids, records, strict=True) if record)
        return [job for job in jobs if job.status == "pending"]

    def _history(self, now: int, minutes: int) -> list[dict[str, int]]:
        """Count what started and ended in each minute, oldest first. The last is not over yet."""
        fields = ("started", *ENDED, "retried", "waitedMs")
        begun = _last_minutes(now, minutes)
        found = self.store.read(*(("HMGET", self.keys.minute(at), *fields) for at in begun))
        return [
            {"at": at, **{field: read_count(value) for field, value in zip(fields, values, strict=True)}}
            for at, values in zip(begun, found, strict=True)
        ]

    def recent(self, minutes: int) -> list[dict[str, Any]]:
        """Count how attempts ended in each of the last minutes, by type. Oldest first.

        Each minute has `at`, and `types`: for each type `completed`, `failed` and `errors`, which
        has the failed attempts by the type of their error. Attempts that are retried count as
        failed, and so do attempts that were lost with their worker.
        """
        begun = _last_minutes(self.now(), minutes)
        found = self.store.read(*(("HGETALL", self.keys.minute(at)) for at in begun))
        return [{"at": at, "types": _ends_by_type(pairs(fields))} for at, fields in zip(begun, found, strict=True)]

    def workers(self) -> list[dict[str, Any]]:
        """Return the registered workers: what each registered, its last heartbeat and its jobs."""
        ids = self._known_workers()
        keys = [key for id in ids for key in (self.keys.worker(id), self.keys.lease(id))]
        found, paused = self.store.read(("MGET", *keys), ("SMEMBERS", self.keys.paused)) if keys else ([], ())
        return read_workers(ids, found, set(map(text_of, paused)))

    def _known_workers(self) -> list[str]:
        """Return every worker that may hold a job. Skip what cannot be the name of a worker."""
        return sorted(filter(NAME.fullmatch, map(text_of, self.store.read(("SMEMBERS", self.keys.workers))[0])))

    def metrics(self) -> dict[str, dict[tuple[str, ...], int]]:
        """Return how often each event ever happened: by event, then by type and queue.

        `completed`, `failed` and `cancelled` are ends of jobs. `retried`: an attempt failed and
        is retried. `revived`: `retry` requeued a job. `released`: a stopping worker requeued a
        job. `reaped`: an attempt was lost with its worker. By time in BUCKETS: `waited` from when a
        job could start until it did, and `ran` from a start until its outcome was written.
        `waitedMs` and `ranMs` are their sums. `scrapeErrors` has neither type nor queue. `refused`
        has the reasons of refused submissions instead.
        """
        found: dict[str, dict[tuple[str, ...], int]] = {}
        for field, value in pairs(self.store.read(("HGETALL", self.keys.metrics))[0]):
            event, *labels = parts = field.split(":")
            if (len(labels) != 1 or event == "refused") and all(map(NAME.fullmatch, parts)):
                found.setdefault(event, {})[tuple(labels)] = read_count(value)
        return found

    def times(self, minutes: int) -> tuple[int, Times]:
        """Count by type how long jobs waited and ran, in the last minutes or a longer window.

        The window begins at the newest snapshot that is old enough. Its time is returned too. If
        there is none, it is 0, and all times ever count.
        """
        latest = self.now() - minutes * 60_000
        stored = self.store.read(("LRANGE", self.keys.snapshots, 0, -1))[0]
        try:
            found = [msgspec.json.decode(snapshot, type=Snapshot) for snapshot in stored]
        except msgspec.DecodeError as error:
            raise Corrupted(f"a snapshot of the metrics cannot be read: {error}") from None
        old = next((snapshot for snapshot in found if snapshot.at <= latest), Snapshot(0, {}))
        return old.at, _subtract(times_by_type(self.metrics()), old.times)


def read_count(value: bytes | None) -> int:
    """Read a count, which is 0 until something was counted."""
    try:
        return int(value or 0)
    except ValueError:
        raise Corrupted(f"expected a count, found {value!r}") from None


def _last_minutes(now: int, count: int) -> list[int]:
    """Return when the last minutes began, oldest first. The last one is not over."""
    return [(now // 60_000 - back) * 60_000 for back in reversed(range(count))]


def _ends_by_type(fields: Iterable[tuple[str, bytes]]) -> dict[str, dict[str, Any]]:
    types: dict[str, dict[str, Any]] = {}
    for field, value in fields:
        event, type, error = [*field.split(":", 2), "", ""][:3]
        if event not in ("completed", "error") or not type:  # fields without a type are the sums
            continue
        ends = types.setdefault(type, {"completed": 0, "failed": 0, "errors": {}})
        ends["completed" if event == "completed" else "failed"] += read_count(value)
        if event == "error":
            ends["errors"][error] = read_count(value)
    return types


def add_counts(total: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add counts to others of the same names, at each level."""
    for name, value in more.items():
        if isinstance(value, Mapping):
            add_counts(total.setdefault(name, {}), value)
        else:
            total[name] = total.get(name, 0) + value


def queues_in(counts: Iterable[tuple[str, bytes]]) -> set[str]:
    return {field.partition(":")[2] for field, _ in counts if ":" in field}


def time_in(entry: bytes) -> int:
    """Return when the id in an entry was made, or 0 if it is not an id."""
    return created_at(text_of(entry)) if ID.fullmatch(text_of(entry)) else 0


def _newest(ids: Iterable[bytes], known: Sequence[bytes]) -> list[bytes]:
    """Return the first SCANNED + 1 job ids, newest first, among those `known` and some more."""
    found = sorted({*ids, *known}, reverse=True)
    checked = {*known}
    ours = (id for id in found if id in checked or ID.fullmatch(text_of(id)))
    return list(itertools.islice(ours, SCANNED + 1))


def read_workers(ids: Sequence[str], values: Sequence[bytes | None], paused: Collection[str]) -> list[dict[str, Any]]:
    """Read the registrations and leases of workers, two values each. Skip those not registered."""
    rows = zip(ids, values[::2], values[1::2], strict=True)
    try:
        return [_worker(id, about, lease, QUIET_MARK + id in paused) for id, about, lease in rows if about]
    except (msgspec.DecodeError, KeyError, AttributeError, TypeError) as error:
        raise Corrupted(f"the registration or the lease of a worker cannot be read: {error}") from None


def _worker(id: str, about: bytes, lease: bytes | None, quiet: bool) -> dict[str, Any]:
    known = msgspec.json.decode(about)
    beat = msgspec.json.decode(lease or b"{}")
    at = beat.get("at", known["startedAt"] if lease else 0)
    lists = {name: beat.get(name, []) for name in ("jobs", "slots", "givenUp")}
    return {"id": id, **known, "alive": bool(lease), "quiet": quiet, "lastHeartbeat": at, **lists}


class Snapshot(msgspec.Struct):
    """The times that the metrics had at one moment."""

    at: int
    times: Times


def times_by_type(counters: Mapping[str, Mapping[tuple[str, ...], int]]) -> Times:
    """Add up `waited` and `ran` of the metrics over all queues: by type, then by bucket."""
    found: Times = {}
    for event in ("waited", "ran"):
        for (type, *_, bucket), count in counters.get(event, {}).items():
            buckets = found.setdefault(type, {}).setdefault(event, {})
            buckets[bucket] = buckets.get(bucket, 0) + count
    return found


def _subtract(now: Times, then: Times) -> Times:
    """Subtract the times of a snapshot from the present ones."""
    for type, events in now.items():
        for event, counts in events.items():
            before = then.get(type, {}).get(event, {})
            counts.update({bucket: max(0, count - before.get(bucket, 0)) for bucket, count in counts.items()})
    return now


def checked(replies: list[Any]) -> list[Any]:
    """Return the replies to EXEC, or raise the first error. The other commands were applied."""
    if errors := [reply for reply in replies if isinstance(reply, Exception)]:
        error = translated(errors[0])
        if isinstance(error, Corrupted):
            error = Corrupted(f"{error}; everything else of this transaction was applied")
            error.applied = True
        raise error
    return replies
