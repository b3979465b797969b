"""TinyQueue: a job queue on Redis. This module holds every rule of the queue, beginning with its contract.

The promise
    An accepted job runs at least once, and is never lost while Redis keeps its data. It runs twice
    only if the worker that held it was cut off for longer than its lease. Jobs of a queue start
    first in, first out. A job that kills its worker runs out of attempts like any other. Jobs that
    ran beside it get their attempts back, so they never fail because of it.

States
                 enqueue                dequeue                complete
        (nothing) -----> pending ------------------> processing -----> completed
                         |  ^  ^                       |  |  |
                  cancel |  |  +--- release, reap -----+  |  | fail, reap: no attempt left
                         v  |  +--- fail: attempts left --+  v
                  cancelled +-------- retry ------------- failed

    A job that waits for its delay or backoff is pending with a `runAt`. One that expires before its
    first start is failed.

Transitions. Each is one WATCH / MULTI / EXEC: two round trips however many jobs it moves, and no Lua.

    verb      from -> to                      watches              only if                    writes
    enqueue   nothing -> pending              once, unique         keys unused                record, list or delayed, keys
    take      (list to list)                  -                    queue not paused           jobs -> proc, workers
    start     pending -> processing           worker, records      registered; due            record: attempts + 1, worker
    expire    pending -> failed               worker, records      registered; expired        record, proc, failed
    complete  processing -> completed         worker, records      registered; same attempt   record, proc, completed
    fail      processing -> pending, failed*  worker, records      registered; same attempt   record, proc, delayed or failed
    release   processing -> pending, failed*  worker, records      registered; same attempt   record, proc, head of list
    progress  processing -> processing        worker, record       registered; same attempt   record
    promote   (delayed to list)               records              runAt has come             delayed, list
    reap      processing -> pending, failed*  worker, lease, proc  lease gone; worker's own   worker, proc, record, head of list
                                              and the records
    cancel    pending -> cancelled            record               -                          record, delayed, cancelled
    request   processing -> processing        record               handler takes a Job        record: cancelRequested
    retry     failed, cancelled -> pending    record, unique       uniqueKey free             record, its index, list

    * cancelled, if that was requested. Due: runAt has come, and the job has not expired. Expired:
    expiresAt has passed before the first start. Same attempt: worker, attempts, refunds and startedAt
    of the record are those that the worker holds. Worker's own: processing under that worker's name.

    dequeue is take, then start or expire. complete, fail and release are written by settle, many in
    one transaction. cancel makes the request when the job is processing. Every verb that fills a list
    rings its bell, and every verb keeps the counts and the metrics. Whatever ends a job frees its
    uniqueKey and leaves a token for those who wait for it.

Keys. All share one hash tag, the namespace, and so one slot of a cluster.

    {queue}:job:<id>          string  the record: the job as JSON, without its id and without default values
    {queue}:jobs:<name>       list    ids that wait in queue <name>: enter left, leave right
    {queue}:proc:<worker>     list    ids that this worker holds
    {queue}:bell:<name>       list    wake-up tokens, at most 64; holds no work, may be lost
    {queue}:delayed           zset    id -> runAt
    {queue}:completed         zset    id -> endedAt; likewise {queue}:failed and {queue}:cancelled
    {queue}:workers           set     every worker that may hold a job
    {queue}:worker:<worker>   string  its registration: the fence. Never expires
    {queue}:lease:<worker>    string  its sign of life and the ids that it runs. Expires
    {queue}:once:<key>        string  the fingerprint of a submit with an Idempotency-Key and the ids it made. Expires
    {queue}:unique:<key>      string  the id of the pending or processing job that has this uniqueKey
    {queue}:paused            set     the names of paused queues
    {queue}:minute:<n>        hash    started, waitedMs, completed, failed, cancelled in minute n since 1970.
                                      Expires after two hours
    {queue}:rate:<who>:<n>    string  requests of a client in rate window n. Expires
    {queue}:awaited           set     the ids of jobs for whose end somebody waits
    {queue}:done:<id>         list    a token for those who waited. Expires after a minute
    {queue}:counts            hash    pending:<name> and processing:<name> now; completed, failed, cancelled ever
    {queue}:promoter          string  a lock that saves two promoters the same work. Expires
    {queue}:mark              string  written to learn when the replicas have all earlier writes. Expires after a second
    {queue}:metrics           hash    all that ever happened to jobs: <what>:<type>:<queue>, for times with :<bucket>
    {queue}:series            set     the <type>:<queue> counted there by name, up to 1,000; the rest are other:other

Three rules carry everything
    1. The record decides, lists are hints. A list may hold an id twice, or the id of a job that is
       cancelled, finished or gone; whoever takes such an id drops it. So promote and reap may
       repeat themselves, and cancelling costs the same however long the queue is.
    2. Every write of a worker is fenced. It watches its registration and writes only if that still
       exists. reap deletes the registration in the transaction that gives the jobs away, so a
       worker that was declared dead and wakes up can no longer write.
    3. Waiting never holds work. An idle worker blocks on the bell, never on the jobs, so a lost
       reply costs nothing.

The file follows a job's life up to the end of upkeep; reading, shards, handlers and input checks come
after it. `grep '# [A-Z].* ---' tinyqueue.py` prints the table of contents.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import itertools
import json
import logging
import math
import os
import random
import re
import socket
import sys
import threading
import time
import typing
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Concatenate, Generic, Literal, NamedTuple, ParamSpec, TypeAlias, TypeVar, cast

import msgspec
import redis
from msgspec import Meta

from tinyqueue_redis import (
    Clock,
    Command,
    Connections,
    Pool,
    ask,
    ask_each,
    connect,
    explain,
    memory_use,
    pairs,
    parse_info,
    read_reply,
    send,
    text_of,
)

__version__ = "0.1.0"
# Makes worker.py and wsgi.py, which lie beside this file, importable as tinyqueue.worker and tinyqueue.wsgi, even where
# another module is named worker or wsgi.
__path__ = [os.path.dirname(os.path.abspath(__file__))]

log = logging.getLogger("tinyqueue")


# Errors ---------------------------------------------------------------------------------------------------------------


class TinyQueueError(Exception):
    """The base of every error that TinyQueue raises. "Nothing there" is None or empty, never an error."""


class SettingsError(TinyQueueError):
    """A setting or the handlers module is wrong and the process must not start. The text is one line that says what to do."""


class InvalidJob(TinyQueueError):
    """A job that cannot be accepted; nothing was stored.

    `field` names the wrong part as JSON clients know it, `rule` says what it must be, and `path` is
    the place inside the payload (``$.to``), if it is there.
    """

    def __init__(self, field: str, rule: str, path: str = "") -> None:
        super().__init__(f"{field}{path.removeprefix('$')}: {rule}")
        self.field = field
        self.rule = rule
        self.path = path


class UnknownType(InvalidJob):
    """No handler is registered for that type. `known` lists the registered types."""

    def __init__(self, type: str, known: Sequence[str]) -> None:
        super().__init__("type", f"no handler is registered for {type!r}; registered: {', '.join(known) or 'none'}")
        self.type = type
        self.known = list(known)


class KeyReused(TinyQueueError):
    """The Idempotency-Key was used before, for a different request. Nothing was stored."""


class QueueFull(TinyQueueError):
    """The queue has as many pending jobs as TINYQUEUE_MAX_PENDING allows. Nothing was stored."""


class NotReplicated(TinyQueueError):
    """The jobs are stored and will run, but fewer replicas have them than TINYQUEUE_MIN_REPLICAS requires.

    If the master is lost now, so are they. `jobs` lists them. Submitting again makes new jobs,
    except under the same Idempotency-Key: that waits for the replicas once more.
    """

    def __init__(self, jobs: Sequence[Job], reached: int, wanted: int) -> None:
        what, them = (f"job {jobs[0].id} is", "it") if len(jobs) == 1 else (f"{len(jobs)} jobs are", "them")
        super().__init__(f"{what} stored and will run, but only {reached} of {wanted} replicas have {them} so far")
        self.jobs = list(jobs)


class WrongStatus(TinyQueueError):
    """The job's status does not allow the verb; nothing was changed. `job` is the job as it stands."""

    def __init__(self, verb: str, job: Job, why: str = "") -> None:
        super().__init__(f"cannot {verb} job {job.id}: {why or f'it is {job.status}'}")
        self.verb = verb
        self.job = job


class Unavailable(TinyQueueError):
    """Redis did not do it. `reason` is one word: unreachable, timeout, loading, full, read-only, refused or busy.

    `doubtful` means that a write was sent and its reply was lost: it may have been applied.
    """

    def __init__(self, reason: str, detail: str, doubtful: bool = False) -> None:
        super().__init__(f"Redis is {reason}: {detail}")
        self.reason = reason
        self.doubtful = doubtful


class Corrupted(TinyQueueError):
    """A key of the namespace holds what TinyQueue never writes. `applied`: the rest of the transaction was written."""

    applied = False


class Reaped(TinyQueueError):
    """This worker lost its lease and its jobs were requeued: it must drop what it holds and register again."""


def _translated(error: Exception) -> TinyQueueError:
    """Turn an error of the Redis client into one of ours."""
    reason, text = explain(error)
    return Unavailable(reason, text) if reason else Corrupted(f"Redis answered: {text}")


# Bounds: a part of the contract, not tunables -------------------------------------------------------------------------

MAX_JOBS = 1000  # jobs of one batch: some milliseconds of Redis' only thread
MAX_ATTEMPTS = 100
MAX_DELAY = 366 * 86400  # seconds
MAX_DEPTH = 100  # nested arrays and objects in a payload; a fixed number, because parsers give up at different ones
MAX_RESULT = 262144  # bytes of a result's JSON
SUSPICIOUS = 2  # times that a worker was lost with this job and others running, after which the job runs alone
MAX_REFUNDS = 10  # times that a release refunds the attempt: a job that never survives a deploy must end some day
KEY_LENGTH = 200  # characters of a uniqueKey
SCANNED = 1000  # jobs that one page of a listing or one bulk change looks at
MEMORY_SHARE = 0.95  # of Redis' maxmemory, above which no job is accepted: the jobs it has must still be able to end
LISTED = 10_000  # entries of a list that a listing looks at
KEPT = 100_000  # ended jobs that are kept, of each status
BELLS = 64
PROMOTED = 500  # jobs moved by one promote
TRIES = 50  # of a transaction whose keys others keep changing
WRITERS = 4  # handlers of a worker that write their progress at the same time; the others wait for their turn
BLOCK = 2.0  # seconds of one wait for the bell
CATCH_UP = 1000  # milliseconds that replicas have to receive a write
PAUSE_AGE = 0.1  # seconds for which the known set of paused queues is used
MEMORY_AGE = 2.0  # seconds for which a reading of Redis' memory is used
SERIES = 1000  # types and queues that the metrics tell apart: each is some thirty lines of a scrape
BUCKETS = (10, 50, 250, 1000, 5000, 15_000, 60_000, 300_000, 1_800_000, math.inf)  # ms: upper bounds for times

NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")  # of queues, types, workers: no name can spell another key
PRINTABLE = re.compile(r"[^\x00-\x1f\x7f-\xa0\xad\u2028\u2029\ud800-\udfff]+")  # as in openapi.json; no lone surrogates
ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")

# Keys -----------------------------------------------------------------------------------------------------------------


class Keys:
    """The names of all keys, spelled here and nowhere else."""

    def __init__(self, namespace: str) -> None:
        self.prefix = prefix = "{" + namespace + "}:"
        self.delayed = prefix + "delayed"
        self.workers = prefix + "workers"
        self.paused = prefix + "paused"
        self.awaited = prefix + "awaited"
        self.counts = prefix + "counts"
        self.metrics = prefix + "metrics"
        self.series = prefix + "series"
        self.promoter = prefix + "promoter"
        self.mark = prefix + "mark"
        self.ended: dict[str, str] = {status: prefix + status for status in ENDED}

        def each(kind: str) -> Callable[[str], str]:
            return f"{prefix}{kind}:".__add__  # runs no Python: every job needs several of these

        self.job = each("job")
        self.done = each("done")
        self.unique = each("unique")
        self.jobs = each("jobs")
        self.bell = each("bell")
        self.worker = each("worker")
        self.lease = each("lease")
        self.proc = each("proc")
        self._once = each("once")
        self._minute = each("minute")
        self._rate = each("rate")

    def once(self, key: str) -> str:
        return self._once(hashlib.sha256(key.encode()).hexdigest())

    def minute(self, now: int) -> str:
        return self._minute(str(now // 60_000))

    def rate(self, who: str, window: int) -> str:
        return self._rate(f"{who}:{window}")


# The job --------------------------------------------------------------------------------------------------------------

Status = Literal["pending", "processing", "completed", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = typing.get_args(Status)
UNENDED = STATUSES[:2]
ENDED = STATUSES[2:]
SHOWN = (
    "id",
    "type",
    "payload",
    "status",
    "attempts",
    "maxAttempts",
    "queue",
    "createdAt",
    "updatedAt",
)  # of every job
SHOWN_IF_SET = (
    *("runAt", "startedAt", "endedAt", "worker", "progress", "expiresAt", "uniqueKey", "cancelRequested", "suspicions"),
    *("requestId", "traceparent", "error"),
)
UNREADABLE = "UnreadableRecord"


class Failure(msgspec.Struct, rename="camel", omit_defaults=True):
    """Why an attempt failed. Message and traceback are cut to size."""

    type: str
    message: str
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException, traceback: str = "") -> Failure:
        """Describe an exception. Text that JSON cannot hold, such as lone surrogates, is escaped."""
        message, trace = (text.encode("utf-8", "backslashreplace").decode() for text in (_text(error), traceback))
        return cls(type(error).__name__, message[:1000], trace[-4000:])


class Job(msgspec.Struct, rename="camel", omit_defaults=True, dict=True):
    """A job as it stood when it was read. Times are milliseconds of Redis TIME, 0 for never.

    The fields are the record. It omits default values, so a default is part of the storage format.
    """

    id: str
    type: str
    payload: Any
    status: Status = "pending"
    attempts: int = 0
    max_attempts: int = 3
    queue: str = "default"
    run_at: int = 0
    updated_at: int = 0
    started_at: int = 0
    ended_at: int = 0
    worker: str = ""
    progress: float = 0.0
    refunds: int = 0
    suspicions: int = 0
    expires_at: int = 0
    unique_key: str = ""
    cancel_requested: bool = False
    result: Any = None
    error: Failure | None = None
    request_id: str = ""
    traceparent: str = ""

    @property
    def created_at(self) -> int:
        """When it was enqueued."""
        return created_at(self.id)

    @property
    def suspect(self) -> bool:
        """Whether it must run alone in its process: workers were lost while they ran it beside other jobs."""
        return self.suspicions >= SUSPICIOUS

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked this running job to stop. A handler that then raises anything leaves it cancelled."""
        return self.cancel_requested

    def set_progress(self, done: float, of: float = 1.0) -> None:
        """Report how far a running handler is, from within it.

        Written to Redis at most once a second; the last value is stored with the outcome. Raises
        Reaped if the job is no longer this worker's.
        """
        self.progress = round(min(1.0, max(0.0, done / of)), 4) if of else 1.0
        now = time.monotonic()
        if now - self.__dict__.get("_progress_written", -1.0) >= 1.0 and (queue := self.__dict__.get("_queue")):
            self.__dict__["_progress_written"] = now
            with suppress(Unavailable):  # no reason to fail an attempt
                queue.write_progress(self)

    def place(self) -> tuple[int, str]:
        """Its place in a listing: by when it ended, or was enqueued if it has not ended."""
        return self.ended_at if self.status in ENDED else self.created_at, self.id

    def log_fields(self) -> dict[str, Any]:
        """The fields of every log line about it."""
        fields = {
            "job": self.id,
            "type": self.type,
            "queue": self.queue,
            "attempt": self.attempts,
            "worker": self.worker,
        }
        origin = {"requestId": self.request_id, "traceparent": self.traceparent}
        return fields | {name: value for name, value in origin.items() if value}

    def answer(self) -> dict[str, Any]:
        """The job as clients see it: the record with id, times and defaults, without what has not happened yet."""
        fields = dict(zip(self.__struct_encode_fields__, msgspec.structs.astuple(self), strict=True))
        fields |= {"createdAt": self.created_at, "updatedAt": self.updated_at or self.created_at}
        set_now = [name for name in SHOWN_IF_SET if fields[name]] + ["result"] * (self.status == "completed")
        return {name: fields[name] for name in (*SHOWN, *set_now)}


class Attempt(msgspec.Struct, rename="camel"):
    """The part of a record that tells one attempt from all others. Reading only this is cheap."""

    status: str = "pending"
    worker: str = ""
    attempts: int = 0
    refunds: int = 0
    started_at: int = 0
    cancel_requested: bool = False


_decode_job = msgspec.json.Decoder(Job).decode
_decode_attempt = msgspec.json.Decoder(Attempt).decode
_ID_PART = len('{"id":"') + 36 + len('",')  # what every encoded job begins with, and no record holds


def _record(job: Job) -> bytes:
    return b"{" + _encode(job)[_ID_PART:]


def _job(id: str, record: bytes) -> Job:
    """Read a record. An unreadable one becomes a failed job that shows it, so that no reader crashes or loops."""
    try:
        job = _decode_job(b'{"id":"%b",%b' % (id.encode(), record[1:]))
        if job.id != id:
            raise msgspec.DecodeError("a record must not hold an id")
        return job
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = record[:10_000].decode("utf-8", "backslashreplace")
        return Job(id, "unreadable", text, status="failed", error=Failure(UNREADABLE, str(error)))


def _expired(job: Job, now: int) -> bool:
    return bool(job.expires_at) and not job.started_at and job.expires_at <= now


def _runs(job: Job, worker: str) -> bool:
    return job.status == "processing" and job.worker == worker


def created_at(id: str) -> int:
    """When the job of that id was enqueued: a UUID of version 7 (RFC 9562) begins with that time, in milliseconds."""
    return int(id[:8] + id[9:13], 16)


_order = itertools.count()


def _new_id(now: int) -> str:
    """Make a UUID of version 7 from Redis time in ms; a counter keeps ids of the same millisecond in their order."""
    noise = int.from_bytes(os.urandom(8), "big")
    number = now << 80 | 7 << 76 | (next(_order) & 0xFFF) << 64 | 2 << 62 | noise & 0x3FFFFFFFFFFFFFFF
    digits = f"{number:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


# Transactions ---------------------------------------------------------------------------------------------------------

R = TypeVar("R")
T = TypeVar("T")
Push = Literal["LPUSH", "RPUSH"]  # behind all other jobs of a queue, or before them


class Transaction:
    """One try of a transition: WATCH and its reads in one round trip, then MULTI, the writes and EXEC in another.

    `gather`, `ring` and `count` collect what many jobs do to one key and make one command of it.
    """

    def __init__(self, connection: Any, keys: Keys, clock: Clock, watch: Sequence[str], again: bool) -> None:
        self._connection = connection
        self._keys = keys
        self._clock = clock
        self._watch = watch
        self._watches = bool(watch)
        self.now = clock.now()
        self.again = again  # an earlier try sent its EXEC and lost the reply: look whether it was applied
        self.replicas = 0  # how many must have the writes
        self.awaited: set[bytes] | None = None  # jobs for whose end somebody waits; None until it was read
        self.measured: defaultdict[tuple[str, str, str], list[int]] = defaultdict(list)
        self._writes: list[Command] = []
        self._gathered: dict[tuple[str, str], list[Any]] = {}
        self._bells: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._minute: Counter[str] = Counter()

    def read(self, *commands: Command) -> list[Any]:
        """Ask Redis. The first call sends WATCH along, and TIME when the clock is stale."""
        ahead: list[Command] = [("WATCH", *self._watch)] if self._watch else []
        self._watch = ()
        if not self._clock.stale:
            return ask(self._connection, [*ahead, *commands])[len(ahead) :]
        replies = ask(self._connection, [*ahead, *commands, ("TIME",)])  # last: one of the commands may wait for long
        self._clock.read(replies[-1])
        self.now = self._clock.now()
        return replies[len(ahead) : -1]

    def unwatch(self) -> None:
        if self._watches:
            ask(self._connection, [("UNWATCH",)])

    def execute(self, writes: Sequence[Command]) -> tuple[list[Any] | None, int]:
        """Apply writes. Return their replies, None if a watched key has changed, and how many replicas have them.

        A refused WAIT proves nothing about any replica, but the writes are applied: it counts as 0.
        """
        wait = [("WAIT", self.replicas, CATCH_UP)] if self.replicas else []
        send(self._connection, [("MULTI",), *writes, ("EXEC",), *wait])
        *_, done = [self._connection.read_response() for _ in range(len(writes) + 2)]
        reached = read_reply(self._connection) if wait else 0
        return done, reached if isinstance(reached, int) else 0

    def write(self, *command: Any) -> None:
        self._writes.append(command)

    def gather(self, command: str, key: str, *parts: Any) -> None:
        """Append to the one command of that name for that key: LPUSH, RPUSH, ZADD, ZREM."""
        self._gathered.setdefault((command, key), []).extend(parts)

    def push(self, command: Push, job: Job) -> None:
        """Put a job into the list of its queue, and ring the bell."""
        self.gather(command, self._keys.jobs(job.queue), job.id)
        self.ring(job.queue)

    def ring(self, queue: str) -> None:
        self._bells[queue] += 1

    def count(self, field: str, by: int = 1) -> None:
        self._counts[field] += by

    def started(self, job: Job, waited: int) -> None:
        """Count a start, in this minute and for the metrics, with the milliseconds that the job had waited."""
        self._minute["started"] += 1
        self._minute["waitedMs"] += waited
        self.measure("waited", job, waited)

    def ended(self, job: Job) -> None:
        """Count an end: ever, in this minute and for the metrics."""
        self._counts[job.status] += 1
        self._minute[job.status] += 1
        self.measure(job.status, job)

    def measure(self, what: str, job: Job, ms: int = -1) -> None:
        """Count for the metrics what happened to a job, and the time it took unless that is -1."""
        self.measured[what, job.type, job.queue].append(ms)

    def sealed(self) -> list[Command]:
        """Return all commands that are to be written."""
        commands = self._writes + [(*name, *parts) for name, parts in self._gathered.items()]
        for queue, times in self._bells.items():
            bell = self._keys.bell(queue)
            commands += [("LPUSH", bell, *["1"] * min(times, BELLS)), ("LTRIM", bell, 0, BELLS - 1)]
        commands += [("HINCRBY", self._keys.counts, field, by) for field, by in self._counts.items() if by]
        if self._minute:
            minute = self._keys.minute(self.now)
            commands += [("HINCRBY", minute, field, by) for field, by in self._minute.items() if by]
            commands.append(("EXPIRE", minute, 7200))
        return commands


class Store:
    """The Redis of one queue: its connections, keys and clock, the transaction loop and what it writes for the metrics."""

    def __init__(self, pool: Any, namespace: str) -> None:
        self.connections = Connections(pool, harmless=TinyQueueError, translate=_translated)
        self.lend = self.connections.lend
        self.keys = Keys(namespace)
        self.clock = Clock()
        self._memory: tuple[float, dict[str, str]] = (-1e9, {})  # when it was read, and what INFO said
        self._series: frozenset[str] = frozenset()  # types and queues that the metrics count by name
        self._series_known = False  # whether no others were met since those were read

    def read(self, *commands: Command) -> list[Any]:
        return self.transact((), lambda tx: tx.read(*commands), counts=False)

    def now(self) -> int:
        """Redis TIME in milliseconds."""
        if self.clock.stale:
            self.read()
        return self.clock.now()

    def transact(
        self, watch: Sequence[str], body: Callable[[Transaction], R], again: bool = False, counts: bool = True
    ) -> R:
        """Run `body` until its writes are applied while nothing watched has changed, and return what it returned.

        A body that writes nothing ends the loop. When the reply to EXEC is lost, the body is called
        again with `again` set. It must check whether its writes are there, and omit them if so:
        nothing is ever repeated blindly. After a time-out the writes may still arrive. Only a watch
        makes it safe to send them again; without one this raises Unavailable.
        """
        if counts and not self._series_known:
            self._learn_series()
        late = False
        for _ in range(TRIES):
            sent = False
            try:
                with self.lend() as connection:
                    tx = Transaction(connection, self.keys, self.clock, watch, again)
                    result, writes = self._run(tx, body)
                    if not writes and not tx.replicas:
                        tx.unwatch()
                        return result
                    if late and writes and not watch:
                        raise Unavailable("timeout", "no reply, and nothing was written so far", doubtful=True)
                    sent = True
                    done = self._execute(connection, tx, writes, result)
            except Unavailable as trouble:
                if isinstance(trouble.__cause__, redis.exceptions.MovedError) and isinstance(
                    self.connections.pool, Pool
                ):
                    continue  # nothing was applied, and the pool now leads to the owner of the slot
                refused = isinstance(trouble.__cause__, redis.ResponseError)
                if not sent or refused or trouble.reason not in ("timeout", "unreachable"):
                    trouble.doubtful = again
                    raise
                again = True
                late = late or trouble.reason == "timeout"
                continue
            if done is not None:
                _checked(done)
                return result
        raise Unavailable("busy", f"gave up after {TRIES} tries: too much contention on these keys", doubtful=again)

    def _run(self, tx: Transaction, body: Callable[[Transaction], R]) -> tuple[R, list[Command]]:
        try:
            result = body(tx)
            return result, tx.sealed() + self._metric_writes(tx)
        except TinyQueueError:
            tx.unwatch()
            raise

    def _execute(self, connection: Any, tx: Transaction, writes: list[Command], result: Any) -> list[Any] | None:
        mark = ("SET", self.keys.mark, "", "PX", 1000)  # WAIT covers only what its own connection has written
        done, reached = tx.execute(writes or [mark])
        if done is not None and reached < tx.replicas:
            connection.disconnect()  # the replicas may have left for a new master, which only a new connection looks for
            raise NotReplicated(result, reached, tx.replicas)
        return done

    def _learn_series(self) -> None:
        self._series_known = True  # before it is true, because the read itself comes by here
        try:
            found = self.read(("SMEMBERS", self.keys.series))[0]
        except Unavailable as trouble:
            self._series_known = False
            if trouble.reason == "timeout":  # waiting once is enough; other trouble the transaction will meet itself
                raise
        else:
            self._series |= set(map(text_of, found))

    def _metric_writes(self, tx: Transaction) -> list[Command]:
        """Sum up for the metrics all jobs of one type and queue to which the same happened.

        Beyond SERIES types and queues, new ones count as other, so that whoever makes up names
        fills neither Redis nor Prometheus. Processes that meet new ones at the same moment may go a
        little beyond.
        """
        met = {f"{type}:{queue}" for _, type, queue in tx.measured}
        new = sorted(met - self._series)[: max(0, SERIES - len(self._series))]
        if new:
            self._series |= set(new)
            self._series_known = False
        sums: Counter[str] = Counter()
        for (what, type, queue), times in tx.measured.items():
            name = known if (known := f"{type}:{queue}") in self._series else "other:other"
            if times[0] < 0:
                sums[f"{what}:{name}"] += len(times)
            else:
                sums[f"{what}Ms:{name}"] += sum(times)
                for at, count in Counter([bisect_left(BUCKETS, ms) for ms in times]).items():
                    sums[f"{what}:{name}:{BUCKETS[at]}"] += count
        added: list[Command] = [("SADD", self.keys.series, *new)] if new else []
        return added + [("HINCRBY", self.keys.metrics, field, by) for field, by in sums.items() if by]

    def memory(self) -> dict[str, str]:
        """Return what INFO says about memory, empty if it says nothing. Asks at most every MEMORY_AGE."""
        read_at, info = self._memory
        if time.monotonic() - read_at > MEMORY_AGE:
            info = {}
            try:
                with self.lend() as connection:
                    info = parse_info(ask_each(connection, [("INFO", "memory")])[0])
            except Unavailable as trouble:
                if trouble.reason == "timeout":  # the submit itself would wait as long again
                    raise
            self._memory = (time.monotonic(), info)
        return info


def _checked(replies: list[Any]) -> list[Any]:
    """Return the replies to EXEC, or raise the first that is an error. The other commands were applied anyway."""
    if errors := [reply for reply in replies if isinstance(reply, Exception)]:
        error = _translated(errors[0])
        if isinstance(error, Corrupted):
            error.applied = True
        raise error
    return replies


def _count(value: bytes | None) -> int:
    """Read a count, which is 0 until something was counted."""
    try:
        return int(value or 0)
    except ValueError:
        raise Corrupted(f"expected a count, found {value!r}") from None


# The queue ------------------------------------------------------------------------------------------------------------


class Once(msgspec.Struct):
    """A submit under an Idempotency-Key: the key, the fingerprint of what is sent, and whether it was made before."""

    key: str
    fingerprint: str
    replayed: bool = False


class Made(msgspec.Struct):
    """What a submit made, as the once: key holds it."""

    fingerprint: str
    ids: list[str]


class Outcome(NamedTuple):
    """How an attempt ended. `after`: seconds until the next attempt of a failed one, None for no further attempt."""

    job: Job
    verb: Literal["complete", "fail", "release"]
    result: Any = None
    error: Failure | None = None
    after: float | None = None


class Verbs(ABC):
    """What `Queue` and `Shards` share: the verbs that are made of other verbs. `parts` are the queues of a namespace each."""

    parts: list[Queue]

    @abstractmethod
    def now(self) -> int: ...
    @abstractmethod
    def submit(self, jobs: Sequence[Job], once: Once | None = None) -> list[Job]: ...
    @abstractmethod
    def take(self, worker: str, names: Sequence[str], most: int) -> list[bytes]: ...
    @abstractmethod
    def start(self, worker: str, ids: Sequence[bytes]) -> list[Job]: ...
    @abstractmethod
    def settle(self, worker: str, outcomes: Sequence[Outcome]) -> list[Outcome]: ...
    @abstractmethod
    def cancel(self, id: str) -> Job | None: ...
    @abstractmethod
    def retry(self, id: str) -> Job | None: ...
    @abstractmethod
    def forget(self, status: str, ids: Sequence[bytes]) -> int: ...
    @abstractmethod
    def page(self, filter: Filter, *, limit: int = 50, cursor: str = "") -> tuple[list[Job], str]: ...

    @property
    def last_contact(self) -> float:
        """When Redis last did what it was asked, in monotonic time; with shards, any of them."""
        return max(part.store.connections.last_contact for part in self.parts)

    @property
    def last_trouble(self) -> float:
        """When Redis last did not."""
        return max(part.store.connections.last_trouble for part in self.parts)

    def disconnect(self) -> None:
        """Close all connections, before a fork: each process opens its own."""
        for part in self.parts:
            part.store.connections.disconnect()

    def draft(self, type: str, payload: Any, **options: Any) -> Job:
        """Check a job and make it, stored nowhere yet; options as for `make_job`. Asks Redis only for the time."""
        return make_job(self.now(), type, payload, **options)

    def enqueue(self, type: str, payload: Any, **options: Any) -> Job:
        """Accept one job; options as for `make_job`. When it returns, the job is stored; after InvalidJob nothing is."""
        return self.submit([self.draft(type, payload, **options)])[0]

    def enqueue_many(self, type: str, payloads: Iterable[Any], **options: Any) -> list[Job]:
        """Accept up to 1,000 jobs of one type, all or none."""
        return self.submit([self.draft(type, payload, **options) for payload in payloads])

    def dequeue(self, worker: str, names: Sequence[str], most: int = 1) -> list[Job]:
        """Take and start up to `most` jobs. Nothing there: an empty list."""
        ids = self.take(worker, names, most)
        return [job for job in self.start(worker, ids) if job.status == "processing"] if ids else []

    def complete(self, job: Job, result: Any = None) -> None:
        """Record that a started job's handler returned `result`. Raises Reaped if the job is no longer this worker's."""
        self._settle_one(Outcome(job, "complete", result=result))

    def fail(self, job: Job, error: Failure, after: float | None = None) -> None:
        """Record a failed attempt: pending again in `after` seconds if attempts are left; with None failed at once."""
        self._settle_one(Outcome(job, "fail", error=error, after=after))

    def release(self, job: Job) -> None:
        """Hand a started job back to the head of its queue and refund the attempt, at most MAX_REFUNDS times."""
        self._settle_one(Outcome(job, "release"))

    def _settle_one(self, outcome: Outcome) -> None:
        if self.settle(outcome.job.worker, [outcome]):
            raise Reaped(f"job {outcome.job.id} is no longer with worker {outcome.job.worker}")

    def change_many(self, verb: Literal["cancel", "retry"], filter: Filter, cursor: str = "") -> dict[str, Any]:
        """Cancel or retry all jobs that match, looking at up to 1,000; `cursor` in the answer says where to go on.

        Each job is changed by itself. Those that changed meanwhile are counted as skipped.
        """
        jobs, cursor = self.page(filter, limit=SCANNED, cursor=cursor)
        change = self.cancel if verb == "cancel" else self.retry
        done = 0
        for job in jobs:
            with suppress(WrongStatus):
                done += change(job.id) is not None
        return {"cancelled" if verb == "cancel" else "retried": done, "skipped": len(jobs) - done, "cursor": cursor}

    def purge(self, filter: Filter, cursor: str = "") -> dict[str, Any]:
        """Delete the ended jobs that match, looking at up to 1,000; `cursor` in the answer says where to go on."""
        if filter.status not in ENDED:
            raise InvalidJob("status", f"must be one of {', '.join(ENDED)}: other jobs have not ended")
        jobs, cursor = self.page(filter, limit=SCANNED, cursor=cursor)
        return {"purged": self.forget(filter.status, [job.id.encode() for job in jobs]), "cursor": cursor}


class Queue(Verbs):
    """A queue in one namespace. Safe to share between threads and, unused before the fork, between processes."""

    def __init__(
        self,
        pool: Any,
        *,
        namespace: str = "queue",
        lease: float = 30,
        keep_completed: float = 86400,
        keep_failed: float = 604800,
        keep_once: float = 86400,
        max_pending: int = 0,
        min_replicas: int = 0,
    ) -> None:
        self.store = Store(pool, check_name("namespace", namespace))
        self.keys = self.store.keys
        self.parts = [self]  # the queues that this one consists of: itself
        self.lease = lease
        self.lease_ms = int(lease * 1000)
        kept = {"completed": keep_completed, "failed": keep_failed, "cancelled": keep_failed}
        self.keep_ms = {status: int(seconds * 1000) for status, seconds in kept.items()}
        self.keep_once_ms = int(keep_once * 1000)
        self.max_pending = max_pending
        self.min_replicas = min_replicas
        self._paused: tuple[float, frozenset[str]] = (-1e9, frozenset())  # when they were read, and which
        self._writers = threading.BoundedSemaphore(WRITERS)

    @classmethod
    def from_url(
        cls, url: str, *, namespace: str = "queue", connections: int = 100, tls_verify: bool = True, **options: Any
    ) -> Queue:
        """Make a queue at a redis://, rediss://, unix:// or redis+sentinel:// URL. Connects on first use."""
        try:
            pool = connect(url, tag=namespace, connections=connections, tls_verify=tls_verify)
        except ValueError as error:
            raise SettingsError(str(error)) from None
        return cls(pool, namespace=namespace, **options)

    @classmethod
    def embedded(cls, **options: Any) -> Queue:
        """Make a queue on a Redis inside this process, for a first run and for tests. Its jobs end with the process."""
        import fakeredis  # slow to import, and nobody else needs it

        return cls(fakeredis.FakeRedis(server=fakeredis.FakeServer(), protocol=2).connection_pool, **options)

    @property
    def pool(self) -> Any:
        return self.store.connections.pool

    @property
    def clock(self) -> Clock:
        return self.store.clock

    def now(self) -> int:
        """Redis TIME in milliseconds."""
        return self.store.now()

    # Enqueue ----------------------------------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job], once: Once | None = None) -> list[Job]:
        """Store drafted jobs, all or none, and return them; for a uniqueKey that is taken, the job that has it.

        nothing -> pending. `once` makes a second submit with the same key return the jobs of the
        first. Watches the keys that are given; without any, nothing, because the ids are new. After
        a lost reply, the ids or the key tell whether all is there. Raises KeyReused, QueueFull, and
        Unavailable if Redis' memory is nearly used up. Raises NotReplicated if the jobs, or those
        of the first submit, are stored but not on `min_replicas` replicas within a second.
        """
        if len(jobs) > MAX_JOBS:
            raise InvalidJob("jobs", f"must be at most {MAX_JOBS} at a time")
        if memory_use(self.store.memory()) > MEMORY_SHARE:
            raise Unavailable("full", f"more than {MEMORY_SHARE:.0%} of its maxmemory is used")
        ids = {job.id for job in jobs}
        unique = [self.keys.unique(key) for key in dict.fromkeys(job.unique_key for job in jobs if job.unique_key)]
        accepted = list(jobs)

        def body(tx: Transaction) -> list[Job]:
            nonlocal accepted
            tx.replicas = self.min_replicas if jobs else 0
            if once and (stored := tx.read(("GET", self.keys.once(once.key)))[0]):
                return self._made_once(tx, jobs, once, stored)
            if not jobs or (not once and tx.again and tx.read(("EXISTS", *map(self.keys.job, ids)))[0]):
                return accepted
            accepted = self._without_duplicates(tx, jobs) if unique else list(jobs)
            new = list({job.id: job for job in accepted if job.id in ids}.values())
            if self.max_pending and new:
                self._check_room(tx, new)
            if new:  # NX: an EXEC that was given up for lost and arrives late must not reset a job that ran
                tx.write("MSETNX", *(part for job in new for part in (self.keys.job(job.id), _record(job))))
            for job in new:
                self._line_up(tx, job)
                tx.measure("enqueued", job)
            if once:
                made = _encode(Made(once.fingerprint, [job.id for job in accepted]))
                tx.write("SET", self.keys.once(once.key), made, "PX", self.keep_once_ms)
            return accepted

        return self.store.transact([*([self.keys.once(once.key)] if once else []), *unique], body)

    def _made_once(self, tx: Transaction, jobs: Sequence[Job], once: Once, stored: bytes) -> list[Job]:
        """Return the jobs of the first submit with this key as they stand; expired ones as they were submitted."""
        try:
            made = msgspec.json.decode(stored, type=Made)
        except msgspec.DecodeError as error:
            raise Corrupted(f"the record of an Idempotency-Key cannot be read: {error}") from None
        if made.fingerprint != once.fingerprint or len(made.ids) != len(jobs):
            raise KeyReused("this Idempotency-Key was used for another request")
        drafts = {job.id: job for job in jobs}
        once.replayed = not drafts.keys() & made.ids  # else it was this submit, whose reply was lost
        records = tx.read(("MGET", *map(self.keys.job, made.ids)))[0] if jobs else []
        found = (
            _job(id, record) if record else msgspec.structs.replace(job, id=id)
            for id, record, job in zip(made.ids, records, jobs, strict=True)
        )
        return [drafts.get(job.id, job) for job in found]

    def _without_duplicates(self, tx: Transaction, jobs: Sequence[Job]) -> list[Job]:
        """Replace each job whose uniqueKey is taken by the job that has it, and take the keys for the others."""
        keys = list(dict.fromkeys(job.unique_key for job in jobs if job.unique_key))
        holders = tx.read(("MGET", *map(self.keys.unique, keys)))[0]
        named = {
            key: id for key, holder in zip(keys, holders, strict=True) if ID.fullmatch(id := text_of(holder or b""))
        }
        records = tx.read(("MGET", *map(self.keys.job, named.values())))[0] if named else []
        active: dict[str, Job] = {}
        for (key, id), record in zip(named.items(), records, strict=True):
            job = _job(id, record) if record else None
            if job and job.status in UNENDED and job.unique_key == key:
                active[key] = job
        accepted = [active.setdefault(job.unique_key, job) if job.unique_key else job for job in jobs]
        for (
            key,
            job,
        ) in active.items():  # also keys that keep their job: a watched key must change, or a late EXEC passes
            tx.write("SET", self.keys.unique(key), job.id)
        return accepted

    def _check_room(self, tx: Transaction, jobs: Sequence[Job]) -> None:
        """Refuse jobs for a full queue. Not watched: submits at the same moment may go a little beyond the limit."""
        wanted = Counter(job.queue for job in jobs)
        counts = tx.read(("HMGET", self.keys.counts, *("pending:" + name for name in wanted)))[0]
        for (name, more), count in zip(wanted.items(), map(_count, counts), strict=True):
            if count + more > self.max_pending:
                raise QueueFull(f"queue {name} has {count} pending jobs; the limit is {self.max_pending}")

    def _line_up(self, tx: Transaction, job: Job, push: Push = "LPUSH") -> None:
        """Put a pending job where it waits: in the list of its queue, or among the delayed."""
        if job.run_at > tx.now:
            tx.gather("ZADD", self.keys.delayed, job.run_at, job.id)
        else:
            tx.push(push, job)
        tx.count("pending:" + job.queue)

    # Dequeue ----------------------------------------------------------------------------------------------------------

    def register(self, queues: Sequence[str], concurrency: int, worker: str = "") -> str:
        """Register a new worker and return its id. From then on it must send a heartbeat within its lease."""
        host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:60] or "host"
        worker = worker or f"{host}-{os.getpid()}-{os.urandom(4).hex()}"
        about = {"host": host, "pid": os.getpid(), "queues": list(queues), "concurrency": concurrency}
        about["startedAt"] = self.now()

        def body(tx: Transaction) -> str:
            tx.write("SADD", self.keys.workers, worker)
            tx.write("SET", self.keys.worker(worker), _encode(about))
            tx.write("SET", self.keys.lease(worker), "{}", "PX", self.lease_ms)
            return worker

        return self.store.transact((), body)

    def wait(self, names: Sequence[str], seconds: float = BLOCK) -> bool:
        """Wait until a job may have come to one of the queues: True; or time is up: False. Takes only a wake-up token."""
        bells = ("BLPOP", *map(self.keys.bell, names), seconds)
        token, paused = self.store.read(bells, ("SMEMBERS", self.keys.paused))
        self._note_paused(paused)
        return token is not None

    def waiting(self, names: Sequence[str], due: bool = False) -> int:
        """Count cheaply what there may be to take: the entries in the lists of the queues that are not paused.

        With `due` also the delayed jobs whose time has come: somebody is about to promote them.
        """
        lists = [("LLEN", self.keys.jobs(name)) for name in self._not_paused(names)]
        delayed = [("ZCOUNT", self.keys.delayed, "-inf", self.now())] if due else []
        return sum(self.store.read(*lists, *delayed)) if lists or delayed else 0

    def _note_paused(self, members: Iterable[bytes] | Exception) -> None:
        found = () if isinstance(members, Exception) else members
        self._paused = (time.monotonic(), frozenset(map(text_of, found)))

    def _not_paused(self, names: Sequence[str]) -> list[str]:
        """Filter out the paused queues, as known for at most PAUSE_AGE: a pause takes effect within that time."""
        if time.monotonic() - self._paused[0] > PAUSE_AGE:
            with suppress(Corrupted):  # a key of the wrong type pauses nothing
                self._note_paused(self.store.read(("SMEMBERS", self.keys.paused))[0])
        return [name for name in names if name not in self._paused[1]]

    def take(self, worker: str, names: Sequence[str], most: int) -> list[bytes]:
        """Move up to `most` ids from the queues that are not paused, in strict order, to the worker's own list.

        If the reply is lost the ids are in that list, where `adopt` finds them. The same
        transaction adds the worker to the set of workers: even one that slept through its own
        reaping can hide nothing.
        """
        taken: list[bytes] = []
        broken: Corrupted | None = None
        for name in self._not_paused(names):
            moves = [("RPOPLPUSH", self.keys.jobs(name), self.keys.proc(worker))] * (most - len(taken))
            around = ("SADD", self.keys.workers, worker), ("SMEMBERS", self.keys.paused)
            try:
                added, paused, *ids = self.store.read(("MULTI",), *around, *moves, ("EXEC",))[-1]
                _checked([added, *ids])
            except Corrupted as error:  # one list of the wrong type must not stop the other queues
                broken = error
                continue
            self._note_paused(paused)
            taken += [id for id in ids if id is not None]
            if len(taken) == most:
                break
        if broken and not taken:
            raise broken
        return taken

    def start(
        self, worker: str, ids: Sequence[bytes], held: Mapping[str, int] | None = None, others: int = 0
    ) -> list[Job]:
        """Begin an attempt for every taken id whose job is pending and due; drop the other ids.

        pending -> processing. Watches the registration and the records. `held` maps the jobs that
        this worker has started and not settled to their attempts. An id that is processing under
        this worker's name but not held was started by a transaction whose reply was lost: it is
        returned too. A suspect starts only by itself, while nothing is held; otherwise it is
        returned as it is, pending, and stays in the worker's list. `others` counts the ids that are
        started at the same time elsewhere. Raises Reaped if the worker is not registered.
        """
        texts = list(map(text_of, ids))
        named = list(dict.fromkeys(id for id in texts if ID.fullmatch(id)))
        if len(named) < len(set(texts)):
            log.warning("dropped %d entries of a queue that are not job ids", len(set(texts)) - len(named))
        record_keys = [self.keys.job(id) for id in named]
        registration = self.keys.worker(worker)
        company = bool(held) or len(texts) + others > 1

        def body(tx: Transaction) -> list[Job]:
            reads: list[Command] = [("EXISTS", registration)] + ([("MGET", *record_keys)] if named else [])
            registered, *found = tx.read(*reads)
            if not registered:
                raise Reaped(f"worker {worker} was reaped")
            records = dict(zip(named, found[0], strict=True)) if named else {}
            started: list[Job] = []
            changed: list[Any] = []
            for id, entry in zip(texts, ids, strict=True):
                record = records.pop(id, None)  # a second entry of the same id finds nothing and is dropped
                job = _job(id, record) if record is not None else None
                if job and self._stays(job, worker, held, company, tx.again):
                    started.append(job)
                elif job and job.status == "pending" and not _expired(job, tx.now) and job.run_at <= tx.now:
                    changed += [self.keys.job(id), _record(self._started(tx, job, worker))]
                    started.append(job)
                else:
                    tx.write("LREM", self.keys.proc(worker), 1, entry)
                    self._drop(tx, job)
            if changed:
                tx.write("MSET", *changed)
            return started

        started = self.store.transact([registration, *record_keys], body)
        for job in started:
            job.__dict__["_queue"] = self  # for set_progress
        return started

    def _stays(self, job: Job, worker: str, held: Mapping[str, int] | None, company: bool, again: bool) -> bool:
        """Tell whether a taken job stays as it is: a suspect in company, or started by a transaction whose reply was lost."""
        if job.status == "pending":
            return job.suspect and company
        unheard = again if held is None else held.get(job.id) != job.attempts  # None: by this very transaction
        return (job.status, job.worker) == ("processing", worker) and unheard

    def _started(self, tx: Transaction, job: Job, worker: str) -> Job:
        waited = max(0, tx.now - max(job.created_at, job.run_at, job.updated_at))  # updated by release, fail and retry
        tx.started(job, waited)
        job.status = "processing"
        job.worker = worker
        job.attempts += 1
        job.started_at = job.updated_at = max(tx.now, job.created_at)
        job.ended_at = 0
        job.progress = 0.0
        tx.count("pending:" + job.queue, -1)
        tx.count("processing:" + job.queue)
        return job

    def _drop(self, tx: Transaction, job: Job | None) -> None:
        """Drop a taken id. An expired job fails; any other is where `_set_aside` puts it."""
        if job and job.status == "pending" and _expired(job, tx.now):
            job.error = Failure("Expired", "expired before it was started")
            tx.count("pending:" + job.queue, -1)
            self._end(tx, job, "failed")
        else:
            self._set_aside(tx, job)

    def _set_aside(self, tx: Transaction, job: Job | None) -> None:
        """Handle a job whose entry is dropped: if it is not due it is delayed, if it is unreadable it fails as it is."""
        if job and job.status == "pending":
            tx.gather("ZADD", self.keys.delayed, job.run_at, job.id)
        elif job and job.error and job.error.type == UNREADABLE:
            self._end(tx, msgspec.structs.replace(job), "failed")

    def adopt(self, worker: str, held: Collection[str]) -> list[bytes]:
        """List the ids in the worker's own list that it does not know because a reply was lost: they must be started.

        `held` must be read before this is called, and only the thread that takes may call it: an id
        whose reply is on its way to another thread would be started twice.
        """
        known = Counter(id.encode() for id in held)
        return list((Counter(self.store.read(("LRANGE", self.keys.proc(worker), 0, -1))[0]) - known).elements())

    # Settle -----------------------------------------------------------------------------------------------------------

    def settle(self, worker: str, outcomes: Sequence[Outcome], again: bool = False) -> list[Outcome]:
        """Write the outcomes of many started jobs in one transaction; return those that were no longer this worker's.

        processing -> completed, pending, failed or cancelled. Watches the registration and the
        records, so that an EXEC given up for lost fails if it arrives late. `again` means that an
        earlier call raised Unavailable with `doubtful`: what that wrote is left alone. Raises
        Reaped, with nothing written, if the worker is not registered.
        """
        registration = self.keys.worker(worker)
        record_keys = [self.keys.job(outcome.job.id) for outcome in outcomes]

        def body(tx: Transaction) -> list[Outcome]:
            reads: list[Command] = [("EXISTS", registration), ("SMEMBERS", self.keys.awaited)]
            registered, awaited, *found = tx.read(*reads, *([("MGET", *record_keys)] if outcomes else []))
            tx.awaited = set(awaited)
            if not registered:
                raise Reaped(f"worker {worker} was reaped")
            others = []
            records = found[0] if outcomes else []
            # Backwards: each released job goes to the head of its queue, so the first must go there last.
            for outcome, record in zip(reversed(outcomes), reversed(records), strict=True):
                if attempt := self._same_attempt(outcome.job, record):
                    tx.write("LREM", self.keys.proc(worker), 1, outcome.job.id)
                    self._write_outcome(tx, outcome, attempt.cancel_requested)
                else:
                    others.append(outcome)
            return [] if tx.again else others

        return self.store.transact([registration, *record_keys], body, again)

    def _same_attempt(self, job: Job, record: bytes | None) -> Attempt | None:
        """Return what the record says, if it is still the very attempt that the worker holds."""
        try:
            now = _decode_attempt(record or b"{}")
        except msgspec.DecodeError:
            return None
        ours = Attempt("processing", job.worker, job.attempts, job.refunds, job.started_at, now.cancel_requested)
        return now if now == ours else None

    def _write_outcome(self, tx: Transaction, outcome: Outcome, cancel_requested: bool) -> None:
        job = msgspec.structs.replace(outcome.job, updated_at=max(tx.now, outcome.job.started_at))
        job.error = outcome.error or job.error
        tx.count("processing:" + job.queue, -1)
        if outcome.verb == "release":
            tx.measure("released", job)
        else:
            tx.measure("ran", job, max(0, tx.now - job.started_at))
        if outcome.verb == "complete":
            job.result = outcome.result
            job.error = None
            job.cancel_requested = False
            self._end(tx, job, "completed")
        elif cancel_requested:
            job.cancel_requested = True
            self._end(tx, job, "cancelled")
        elif outcome.verb == "release" and job.refunds < MAX_REFUNDS:
            job.attempts -= 1
            job.refunds += 1
            self._requeue(tx, job, push="RPUSH")
        elif outcome.verb == "release":
            self._give_back(tx, job, "released too often")
        elif outcome.after is not None and job.attempts < job.max_attempts:
            self._requeue(tx, job, tx.now + round(outcome.after * 1000))
            tx.measure("retried", job)
        else:
            self._end(tx, job, "failed")

    def _end(self, tx: Transaction, job: Job, status: Literal["completed", "failed", "cancelled"]) -> None:
        """Write a job's last state: the record expires in its time, and the index lists it by when it ended."""
        job.status = status
        job.worker = ""
        job.ended_at = job.updated_at = max(tx.now, job.updated_at)
        tx.write("SET", self.keys.job(job.id), _record(job), "PX", self.keep_ms[status])
        tx.gather("ZADD", self.keys.ended[status], job.ended_at, job.id)
        tx.ended(job)
        if job.unique_key:
            tx.write("DEL", self.keys.unique(job.unique_key))
        if tx.awaited is None:
            tx.awaited = set(tx.read(("SMEMBERS", self.keys.awaited))[0])
        if job.id.encode() in tx.awaited:
            tx.write("LPUSH", self.keys.done(job.id), "1")
            tx.write("EXPIRE", self.keys.done(job.id), 60)
            tx.write("SREM", self.keys.awaited, job.id)

    def _requeue(self, tx: Transaction, job: Job, run_at: int = 0, push: Push = "LPUSH") -> None:
        """Write a job that is pending again."""
        job.status = "pending"
        job.worker = ""
        job.run_at = run_at
        tx.write("SET", self.keys.job(job.id), _record(job))
        self._line_up(tx, job, push)

    def _give_back(self, tx: Transaction, job: Job, reason: str, beside: bool = False) -> None:
        """End an attempt that nobody will finish: to the head of its queue, or failed if no attempt is left.

        `beside` means that its worker ran other jobs too. Any of them may have killed it, so the
        attempt does not count. That cannot go on for ever: after SUSPICIOUS such losses the job
        runs alone, and a job that is lost alone has itself to blame.
        """
        job.error = Failure("WorkerLost", f"{reason} (attempt {job.attempts}/{job.max_attempts})")
        if beside:
            note = f"attempt {job.attempts}/{job.max_attempts}, not counted"
            job.error.message = f"{reason} while it ran other jobs too ({note})"
            job.attempts -= 1
            job.suspicions += 1
        job.updated_at = max(tx.now, job.updated_at)
        if job.cancel_requested:
            self._end(tx, job, "cancelled")
        elif job.attempts < job.max_attempts:
            self._requeue(tx, job, push="RPUSH")
        else:
            self._end(tx, job, "failed")

    def write_progress(self, job: Job) -> None:
        """Write the progress of a running job; raise Reaped if the job is no longer this worker's. Watches both.

        A few at a time: if each slot opened a connection for it, a worker would need as many as slots.
        """
        key = self.keys.job(job.id)
        registration = self.keys.worker(job.worker)

        def body(tx: Transaction) -> None:
            registered, record = tx.read(("EXISTS", registration), ("GET", key))
            attempt = self._same_attempt(job, record) if registered else None
            if attempt is None:
                raise Reaped(f"job {job.id} is no longer with worker {job.worker}")
            job.cancel_requested = attempt.cancel_requested
            tx.write("SET", key, _record(msgspec.structs.replace(job, updated_at=max(tx.now, job.started_at))))

        with self._writers:
            self.store.transact([registration, key], body)

    # Cancel and retry -------------------------------------------------------------------------------------------------

    def cancel(self, id: str) -> Job | None:
        """Cancel a pending job, or request that a running one stops, and return it; None for an unknown id.

        pending -> cancelled; a processing job stays so, and its handler reads `job.cancelled`.
        Watches the record. The id of a cancelled job stays in the list until somebody takes and
        drops it: LREM would cost as much as the queue is long. Raises WrongStatus if the job has
        ended, or if it runs and its handler takes no Job through which to learn of the request.
        """

        def body(tx: Transaction, job: Job) -> None:
            if tx.again and (job.status == "cancelled" or job.cancel_requested):
                return
            if job.status == "processing":
                if job.type in HANDLERS and not HANDLERS[job.type].wants_job:
                    raise WrongStatus(
                        "cancel", job, "it is processing, and its handler takes no Job to read the request"
                    )
                job.cancel_requested = True
                tx.write("SET", self.keys.job(id), _record(job))
                return
            if job.status != "pending":
                raise WrongStatus("cancel", job)
            tx.write("ZREM", self.keys.delayed, id)
            tx.count("pending:" + job.queue, -1)
            self._end(tx, job, "cancelled")

        return self._change(id, body)

    def cancel_requests(self, ids: Sequence[str]) -> list[str]:
        """Filter the ids of running jobs whose cancellation was requested."""
        records = self.store.read(("MGET", *map(self.keys.job, ids)))[0] if ids else []
        found = ((id, record) for id, record in zip(ids, records, strict=True) if record)
        return [id for id, record in found if b'"cancelRequested":true' in record and _job(id, record).cancelled]

    def retry(self, id: str) -> Job | None:
        """Requeue a failed or cancelled job with its attempts reset and return it; None for an unknown id.

        failed, cancelled -> pending. Watches the record: of two at once one succeeds and the other
        raises WrongStatus. So does a job whose uniqueKey another job has by now.
        """

        def body(tx: Transaction, job: Job) -> None:
            if job.status not in ("failed", "cancelled"):
                if tx.again:  # requeued by the try whose reply was lost, and possibly started since
                    return
                raise WrongStatus("retry", job)
            if job.unique_key:
                tx.read(("WATCH", self.keys.unique(job.unique_key)))
                if (holder := self._without_duplicates(tx, [job])[0]) is not job:
                    raise WrongStatus("retry", job, f"job {holder.id} has its uniqueKey now")
            tx.write("ZREM", self.keys.ended[job.status], id)
            job.attempts = job.refunds = job.ended_at = job.expires_at = 0
            job.cancel_requested = False
            job.updated_at = max(tx.now, job.updated_at)
            self._requeue(tx, job)
            tx.measure("revived", job)

        return self._change(id, body)

    def _change(self, id: str, body: Callable[[Transaction, Job], None]) -> Job | None:
        """Change one job under WATCH of its record."""
        if not ID.fullmatch(id):
            return None

        def change(tx: Transaction) -> Job | None:
            record = tx.read(("GET", self.keys.job(id)))[0]
            if record is None:
                return None
            job = _job(id, record)
            body(tx, job)
            return job

        return self.store.transact([self.keys.job(id)], change)

    # Pause and resume -------------------------------------------------------------------------------------------------

    def pause(self, name: str) -> None:
        """Start no more jobs of a queue. Running jobs go on and jobs are accepted. Takes effect within PAUSE_AGE."""
        self.store.read(("SADD", self.keys.paused, check_name("queue", name)))

    def resume(self, name: str) -> None:
        """Start jobs of a queue again."""

        def body(tx: Transaction) -> None:
            tx.write("SREM", self.keys.paused, check_name("queue", name))
            tx.ring(name)

        self.store.transact((), body)

    # Upkeep -----------------------------------------------------------------------------------------------------------

    def heartbeat(self, worker: str, jobs: Sequence[str] = ()) -> None:
        """Renew the lease and report which jobs run. Raises Reaped if the registration is gone.

        reap deletes the registration only once the lease is gone, so a lease that still exists
        proves the registration: one command. An expired lease is set again only under WATCH of the
        registration.
        """
        lease = self.keys.lease(worker)
        registration = self.keys.worker(worker)
        sign = ("SET", lease, _encode({"at": self.now(), "jobs": list(jobs)}), "PX", self.lease_ms)
        if self.store.read((*sign, "XX"))[0] is not None:
            return

        def body(tx: Transaction) -> None:
            if not tx.read(("EXISTS", registration))[0]:
                raise Reaped(f"worker {worker} was reaped")
            tx.write(*sign)

        self.store.transact([registration], body)

    def deregister(self, worker: str) -> None:
        """Remove a worker that has stopped. The jobs it still holds are requeued, as `reap` does it."""
        self.store.read(("DEL", self.keys.lease(worker)))
        self.reap(worker)

    def promote(self) -> int:
        """Move up to 500 jobs whose runAt has come to their queues; return how many ids left the delayed ones.

        Watches the records: a job that another promoter has moved may have run, failed and be
        delayed again, and to remove that entry would lose it. The lock only saves two promoters
        from doing the same work.
        """

        def body(tx: Transaction) -> int:
            due = tx.read(("ZRANGEBYSCORE", self.keys.delayed, "-inf", tx.now, "LIMIT", 0, PROMOTED))[0]
            if not due or tx.again or not tx.read(("SET", self.keys.promoter, "1", "NX", "PX", 1000))[0]:
                return 0
            tx.write("ZREM", self.keys.delayed, *due)
            for job in self._listed(tx, due, watch=True):
                if job.status == "pending" and job.run_at <= tx.now:
                    tx.push("LPUSH", job)
                else:
                    self._set_aside(tx, job)
            tx.write("DEL", self.keys.promoter)
            return len(due)

        return self.store.transact((), body)

    def _listed(self, tx: Transaction, entries: Iterable[bytes], watch: bool = False) -> Iterator[Job]:
        """Read the jobs that the entries of a list name, each once, and skip what names none. `watch` watches them."""
        ids = list(dict.fromkeys(filter(ID.fullmatch, map(text_of, entries))))
        keys = [self.keys.job(id) for id in ids]
        records = tx.read(*([("WATCH", *keys)] if watch else []), ("MGET", *keys))[-1] if ids else []
        return (_job(id, record) for id, record in zip(ids, records, strict=True) if record is not None)

    def _known_workers(self) -> list[str]:
        """List every worker that may hold a job. What is not a name in that set was not put there by a worker."""
        return sorted(filter(NAME.fullmatch, map(text_of, self.store.read(("SMEMBERS", self.keys.workers))[0])))

    def lost_workers(self, own: str = "") -> list[str]:
        """List the workers whose lease is gone, except `own`."""
        workers = [worker for worker in self._known_workers() if worker != own]
        leases = self.store.read(("MGET", *map(self.keys.lease, workers)))[0] if workers else []
        return [worker for worker, lease in zip(workers, leases, strict=True) if lease is None]

    def reap(self, worker: str, others: int = 0) -> int:
        """Remove a worker whose lease is gone, requeue what it held, and return how many jobs those are. Alive: 0.

        processing -> pending, or failed with the last attempt. Watches the registration, the lease,
        the list and the records: a worker that wakes up may just be taking or starting jobs, and
        deleting the list would delete what it took. An id in the list is requeued only if its job
        is pending, or processing under this worker's name: without that test a job that was
        requeued before and runs elsewhere would run twice. For a worker reaped before, this
        requeues what it took since. `others` counts the jobs that it ran in other shards.
        """
        registration = self.keys.worker(worker)
        lease = self.keys.lease(worker)
        proc = self.keys.proc(worker)

        def body(tx: Transaction) -> int:
            alive, entries = tx.read(("EXISTS", lease), ("LRANGE", proc, 0, -1))
            if alive:
                return 0
            listed = list(self._listed(tx, entries, watch=True))
            beside = others + sum(_runs(job, worker) for job in listed) > 1
            requeued = 0
            for job in listed:
                if job.status == "pending":
                    tx.push("RPUSH", job)
                elif _runs(job, worker):
                    tx.measure("reaped", job)
                    tx.count("processing:" + job.queue, -1)
                    self._give_back(tx, job, "worker lost", beside)
                else:
                    self._set_aside(tx, job)
                    continue
                requeued += 1
            tx.write("DEL", registration, proc)
            tx.write("SREM", self.keys.workers, worker)
            return requeued

        return self.store.transact([registration, lease, proc], body)

    def running(self, worker: str) -> int:
        """Count the jobs that a worker has started and not settled."""
        entries = ("LRANGE", self.keys.proc(worker), 0, -1)
        jobs = self.store.transact((), lambda tx: self._listed(tx, tx.read(entries)[0]))
        return sum(_runs(job, worker) for job in jobs)

    def trim(self) -> int:
        """Delete expired ended jobs and the oldest of each status above KEPT; return how many, up to 1,000 a status.

        Records expire by themselves; their entries in the indexes do not.
        """
        removed = 0
        for status, keep in self.keep_ms.items():
            index = self.keys.ended[status]
            expired = ("ZRANGEBYSCORE", index, "-inf", self.now() - keep, "LIMIT", 0, MAX_JOBS)
            over, ids = self.store.read(("ZCARD", index), expired)
            if not ids and over > KEPT:
                ids = self.store.read(("ZRANGE", index, 0, min(over - KEPT, MAX_JOBS) - 1))[0]
            if ids:
                removed += self.forget(status, ids)
        return removed

    def forget(self, status: str, ids: Sequence[bytes]) -> int:
        """Delete records of ended jobs and their entries in the index of that status; return how many were there.

        Watches the records: one that was requeued meanwhile is not in the index, and is needed.
        Completed jobs cannot be requeued, and thousands of them may end in a second: no check and
        no watch for them.
        """
        index = self.keys.ended[status]
        keys = [self.keys.job(text_of(id)) for id in ids]

        def body(tx: Transaction) -> int:
            scores = tx.read(*(("ZSCORE", index, id) for id in ids)) if status != "completed" else ids
            gone = [at for at, score in enumerate(scores) if score is not None]
            if gone:
                tx.write("ZREM", index, *(ids[at] for at in gone))
                tx.write("DEL", *(keys[at] for at in gone))
            return len(gone)

        return self.store.transact(keys if status != "completed" else (), body)

    # Reading ----------------------------------------------------------------------------------------------------------

    def ping(self) -> None:
        """Raise Unavailable unless Redis accepts a write: one that never stores anything."""
        self.store.read(("SET", self.keys.promoter + ":none", "", "XX"))

    def get(self, id: str) -> Job | None:
        """Return the job of that id, or None."""
        if not ID.fullmatch(id):
            return None
        record = self.store.read(("GET", self.keys.job(id)))[0]
        return _job(id, record) if record is not None else None

    def wait_for(self, id: str, seconds: float) -> Job | None:
        """Return the job when it has ended, or as it is when time is up; None for an unknown id.

        Whoever ends an awaited job leaves a token. The job is also read every two seconds, in case
        the token is missed.
        """
        until = time.monotonic() + seconds
        job = self.get(id)
        if not job or job.status not in UNENDED:
            return job
        while job and job.status in UNENDED and (left := until - time.monotonic()) > 0:
            record = self.store.read(("SADD", self.keys.awaited, id), ("GET", self.keys.job(id)))[
                1
            ]  # it may just have ended
            job = _job(id, record) if record else None
            if job and job.status in UNENDED:
                self._wait_for_token(self.keys.done(id), min(left, BLOCK))
                job = self.get(id)
        self.store.read(("SREM", self.keys.awaited, id))  # others who wait add it again
        return job

    def _wait_for_token(self, key: str, seconds: float) -> None:
        if self.store.read(("BLPOP", key, round(max(seconds, 0.01), 3)))[0]:
            self.store.read(("LPUSH", key, "1"), ("EXPIRE", key, 60))  # for others who wait for the same job

    def page(self, filter: Filter | None = None, *, limit: int = 50, cursor: str = "") -> tuple[list[Job], str]:
        """List the jobs that match, newest first, and a cursor for those that follow: empty when none do.

        Sorted by when they ended, or were created if they have not ended. The cursor is a place in
        that order, so jobs that come or go shift nothing. Looks at up to SCANNED jobs: a page may
        be short, or empty, and still have a cursor. Of the pending jobs it sees 10,000 entries of
        each queue around the cursor, and as many delayed ones. Raises InvalidJob for a cursor that
        no listing returned.
        """
        filter = filter or Filter()
        before = _place_of(cursor or "9999999999999999.g")
        entries: set[Entry] = set()
        horizon = NO_HORIZON
        for status in [filter.status] if filter.status else STATUSES:
            look = self._unended if status in UNENDED else self._ended
            found_there, horizon_there = look(status, before)
            entries |= found_there
            horizon = max(horizon, horizon_there)
        todo = sorted((entry for entry in entries if horizon <= entry[:2] < before), reverse=True)[: SCANNED + 1]
        more = horizon > NO_HORIZON
        found: list[Job] = []
        for at in range(0, min(len(todo), SCANNED), 100):
            part = todo[at : min(at + 100, SCANNED)]
            records = self.store.read(("MGET", *(self.keys.job(id) for _, id, _ in part)))[0]
            for seen, ((_, id, under), record) in enumerate(zip(part, records, strict=True), at + 1):
                job = _job(id, record) if record else None
                if job and job.status == under and filter.matches(job):
                    found.append(job)
                if len(found) == limit:
                    return found, _cursor(todo, seen, more)
        return found, _cursor(todo, SCANNED, more)

    def _windows(self, read: Callable[[int], Sequence[Entry]], start: int, before: Place) -> tuple[set[Entry], Place]:
        """Read LISTED entries at a time from `start` until some lie before the cursor; return how far that reached, too."""
        while True:
            found = read(start)
            if len(found) < LISTED:
                return set(found), NO_HORIZON
            if older := [entry[:2] for entry in found if entry[:2] < before]:
                return set(found), min(older)
            start += LISTED

    def _ended(self, status: str, before: Place) -> tuple[set[Entry], Place]:
        def read(start: int) -> list[Entry]:
            newest = ("ZREVRANGEBYSCORE", self.keys.ended[status], before[0], "-inf")
            found = self.store.read((*newest, "WITHSCORES", "LIMIT", start, LISTED))[0]
            return [(int(at), id, status) for id, at in pairs(found)]

        return self._windows(read, 0, before)

    def _unended(self, status: str, before: Place) -> tuple[set[Entry], Place]:
        """Read the newest entries of each list, and as many from the cursor on; thousands may be of cancelled jobs."""
        keys = self._lists(status)
        found: set[Entry] = set()
        if status == "pending":
            found |= set(self._read_entries(("ZRANGE", self.keys.delayed, 0, LISTED - 1), status))
        horizon = NO_HORIZON
        for key in keys:
            read = partial(self._listed_entries, key, status)
            at = self.store.read(("LPOS", key, before[1]))[0]
            if at:
                found |= set(read(0))
            seen, horizon_there = self._windows(read, at or 0, before)
            found |= seen
            horizon = max(horizon, horizon_there)
        return found, horizon

    def _lists(self, status: str) -> list[str]:
        """The keys of all lists in which the jobs of a status are."""
        if status == "pending":
            return [self.keys.jobs(name) for name in self.queues()]
        return [self.keys.proc(worker) for worker in self._known_workers()]

    def _listed_entries(self, key: str, status: str, start: int) -> list[Entry]:
        return self._read_entries(("LRANGE", key, start, start + LISTED - 1), status)

    def _read_entries(self, command: Command, status: str) -> list[Entry]:
        ids = map(text_of, self.store.read(command)[0])
        return [(created_at(id) if ID.fullmatch(id) else 1 << 60, id, status) for id in ids]

    def queues(self) -> dict[str, dict[str, Any]]:
        """Every queue that ever had a job or is paused: its counts, the age of its oldest waiting job, whether it is paused."""
        counts, paused = self.store.read(("HGETALL", self.keys.counts), ("SMEMBERS", self.keys.paused))
        self._note_paused(paused)
        now = {field: _count(value) for field, value in pairs(counts)}
        counted = {field.partition(":")[2] for field in now if ":" in field}
        names = sorted(counted | set(filter(NAME.fullmatch, self._paused[1])))
        heads = self.store.read(*(("LINDEX", self.keys.jobs(name), -1) for name in names))
        return {
            name: {
                "pending": now.get("pending:" + name, 0),
                "processing": now.get("processing:" + name, 0),
                "oldestWaitingMs": self._age(head) if now.get("pending:" + name) else 0,
                "paused": name in self._paused[1],
            }
            for name, head in zip(names, heads, strict=True)
        }

    def _age(self, head: bytes | None) -> int:
        id = text_of(head or b"")
        return max(0, self.now() - created_at(id)) if ID.fullmatch(id) else 0

    def count_unended(self) -> tuple[list[int], int]:
        """Return the counts of pending and processing jobs, and the number of entries that list them, at one moment."""
        keys = self._lists("pending") + self._lists("processing")
        reads = ("HGETALL", self.keys.counts), ("ZCARD", self.keys.delayed), *(("LLEN", key) for key in keys)
        counts, *sizes = _checked(self.store.read(("MULTI",), *reads, ("EXEC",))[-1])
        return [_count(value) for field, value in pairs(counts) if ":" in field], sum(sizes)

    def stats(self, minutes: int = 0) -> dict[str, Any]:
        """Count the jobs of every status, by queue too, and the live workers. `pending` includes the delayed jobs.

        `lastMinute` counts the jobs that ended in the last sixty seconds. `total` counts all that
        ever ended, also those whose records have expired. With `minutes`, `history` has an entry
        for each of the last minutes, up to 120.
        """
        queues = self.queues()
        now = self.now()
        indexes = {"delayed": self.keys.delayed, **self.keys.ended}
        totals, last, this, *sizes = self.store.read(
            ("HMGET", self.keys.counts, *ENDED),
            ("HMGET", self.keys.minute(now - 60_000), *ENDED),
            ("HMGET", self.keys.minute(now), *ENDED),
            *(("ZCARD", index) for index in indexes.values()),
        )
        share = 1 - now % 60_000 / 60_000  # of the previous minute that lies within the last sixty seconds
        leases = [self.keys.lease(worker) for worker in self._known_workers()]
        return {
            "pending": sum(queue["pending"] for queue in queues.values()),
            "processing": sum(queue["processing"] for queue in queues.values()),
            **dict(zip(indexes, sizes, strict=True)),
            "oldestWaitingMs": max((queue["oldestWaitingMs"] for queue in queues.values()), default=0),
            "workers": self.store.read(("EXISTS", *leases))[0] if leases else 0,
            "queues": queues,
            "lastMinute": {s: round(_count(a) * share) + _count(b) for s, a, b in zip(ENDED, last, this, strict=True)},
            "total": {status: _count(total) for status, total in zip(ENDED, totals, strict=True)},
            **({"history": self._history(now, minutes)} if minutes else {}),
        }

    def _history(self, now: int, minutes: int) -> list[dict[str, int]]:
        """What started and ended in each minute, oldest first; the last minute is not over."""
        fields = ("started", *ENDED, "waitedMs")
        begun = [(now // 60_000 - back) * 60_000 for back in reversed(range(minutes))]
        found = self.store.read(*(("HMGET", self.keys.minute(at), *fields) for at in begun))
        return [
            {"at": at, **{field: _count(value) for field, value in zip(fields, values, strict=True)}}
            for at, values in zip(begun, found, strict=True)
        ]

    def workers(self) -> list[dict[str, Any]]:
        """List the registered workers: id, host, pid, queues, concurrency, startedAt, alive, lastHeartbeat, current jobs."""
        ids = self._known_workers()
        keys = [key for id in ids for key in (self.keys.worker(id), self.keys.lease(id))]
        found = self.store.read(("MGET", *keys))[0] if keys else []
        pairs = zip(ids, found[::2], found[1::2], strict=True)
        try:
            return [_worker(id, about, lease) for id, about, lease in pairs if about]
        except (msgspec.DecodeError, KeyError, AttributeError, TypeError) as error:
            raise Corrupted(f"the registration or the lease of a worker cannot be read: {error}") from None

    def metrics(self) -> dict[str, dict[tuple[str, ...], int]]:
        """Return what ever happened to jobs: by word, then by type and queue.

        enqueued; completed, failed, cancelled: ended so; retried: an attempt failed and others were
        left; revived: a failed or cancelled job became pending again; released: handed back by a
        stopping worker; reaped: lost with its worker. By time in BUCKETS: waited, from when a job
        could start until it started, for every start; ran, from the start until the outcome was
        written, for every attempt with an outcome. waitedMs and ranMs are their sums. scrapeErrors
        is one number.
        """
        found: dict[str, dict[tuple[str, ...], int]] = {}
        for field, value in pairs(self.store.read(("HGETALL", self.keys.metrics))[0]):
            what, *labels = parts = field.split(":")
            if len(labels) != 1 and all(map(NAME.fullmatch, parts)):
                found.setdefault(what, {})[tuple(labels)] = _count(value)
        return found

    # Counting for the web process -------------------------------------------------------------------------------------

    def count_scrape_errors(self, times: int) -> None:
        """Count failed scrapes of the metrics, now that Redis can be reached again."""
        self.store.read(("HINCRBY", self.keys.metrics, "scrapeErrors", times))

    def spend(self, who: str, limit: int, seconds: int) -> tuple[int, int]:
        """Count a request of a client in the present window; return how many are left (below 0: none), and for how long."""
        now = self.now()
        key = self.keys.rate(who, now // (seconds * 1000))
        used = self.store.read(("INCR", key), ("EXPIRE", key, seconds))[0]
        return limit - used, seconds - now // 1000 % seconds


def _worker(id: str, about: bytes, lease: bytes | None) -> dict[str, Any]:
    known = msgspec.json.decode(about)
    sign = msgspec.json.decode(lease or b"{}")
    at = sign.get("at", known["startedAt"] if lease else 0)
    return {"id": id, **known, "alive": bool(lease), "lastHeartbeat": at, "jobs": sign.get("jobs", [])}


# Filters and cursors --------------------------------------------------------------------------------------------------


class Filter(NamedTuple):
    """Which jobs a listing shows and a bulk change touches: those that match all that is given."""

    status: Status | None = None
    type: str | None = None
    queue: str | None = None
    error_type: str | None = None

    def matches(self, job: Job) -> bool:
        error = job.error.type if job.error else None
        pairs = (self.status, job.status), (self.type, job.type), (self.queue, job.queue), (self.error_type, error)
        return all(wanted is None or wanted == value for wanted, value in pairs)


CURSOR = re.compile(r"([0-9]{1,16})\.([0-9a-g-]{1,36})")
Entry = tuple[int, str, str]  # of a listing: when, id, and the status under which it was found
Place = tuple[int, str]  # in the order of a listing
NO_HORIZON: Place = (0, "")  # everything was seen


def _cursor(todo: Sequence[Entry], seen: int, more: bool) -> str:
    """Return the place after the entries that were seen, if others follow."""
    if len(todo) > seen or (more and todo):
        at, id, _ = todo[min(seen, len(todo)) - 1]
        return f"{at}.{id}"
    return ""


def _place_of(cursor: str) -> Place:
    match = CURSOR.fullmatch(cursor)
    if not match:
        raise InvalidJob("cursor", "must be a cursor returned by a listing")
    return int(match[1]), match[2]


# Shards ---------------------------------------------------------------------------------------------------------------


class Shards(Verbs):
    """Many queues as one, each in a namespace of its own and so in its own slot: `{queue.0}`, `{queue.1}` and so on.

    The last two digits of a job's id name its shard. A submit goes whole into one shard and the
    next one into the next, so jobs start first in, first out within each shard. A submit with a
    uniqueKey or an Idempotency-Key goes to the shard of that key. A worker registers in all shards
    under one id; if one of them reaps it, it starts again in all. While a shard is unreachable the
    others are served.
    """

    def __init__(self, shards: Sequence[Queue]) -> None:
        self.parts = list(shards)
        self.clock = shards[0].clock
        self.lease = shards[0].lease
        self.lease_ms = shards[0].lease_ms
        self.keep_ms = shards[0].keep_ms
        self._turn = itertools.count(random.randrange(len(shards)))
        self._waiters = ThreadPoolExecutor(len(shards), "shard")
        self._waits: dict[int, Future[bool]] = {}

    def _of(self, id: str) -> Queue:
        """The shard that an id names. An id that names none is as unknown in the first shard as in any other."""
        at = int(id[-2:], 16) if ID.fullmatch(id) else 0
        return self.parts[at if at < len(self.parts) else 0]

    def _at(self, key: str) -> int:
        return zlib.crc32(key.encode()) % len(self.parts)

    def _by_shard(self, things: Iterable[T], id: Callable[[T], str]) -> list[tuple[Queue, list[T]]]:
        """Group what belongs to jobs by the shards of those jobs."""
        parts: defaultdict[Queue, list[T]] = defaultdict(list)
        for thing in things:
            parts[self._of(id(thing))].append(thing)
        return list(parts.items())

    def _try(self, act: Callable[[Queue], T], all: bool = False, order: Sequence[Queue] = ()) -> list[T]:
        """Do it in every shard; raise the first error if it failed in one, or without `all` only if it failed in each."""
        done = list[T]()
        errors = list[TinyQueueError]()
        for shard in order or self.parts:
            try:
                done.append(act(shard))
            except TinyQueueError as error:
                errors.append(error)
        if errors and (all or not done):
            raise next((error for error in errors if isinstance(error, Reaped)), errors[0])
        return done

    def now(self) -> int:
        return self.parts[0].now()

    def submit(self, jobs: Sequence[Job], once: Once | None = None) -> list[Job]:
        """As Queue.submit. Jobs whose uniqueKeys belong to different shards cannot be stored together: raises InvalidJob."""
        places = {self._at(job.unique_key) for job in jobs if job.unique_key}
        if len(places) > 1:
            raise InvalidJob(
                "uniqueKey", "must be the same in all jobs of a batch, because TINYQUEUE_SHARDS is above 1"
            )
        if places or once:
            return self._submit_to(places.pop() if places else self._at(once.key if once else ""), jobs, once)
        first = next(self._turn)
        for at in range(first, first + len(self.parts)):
            try:
                return self._submit_to(at % len(self.parts), jobs, once)
            except Unavailable as error:
                trouble = error
                if error.doubtful:  # the jobs may be there: in another shard they would be second ones
                    break
        raise trouble

    def _submit_to(self, at: int, jobs: Sequence[Job], once: Once | None) -> list[Job]:
        for job in jobs:
            job.id = f"{job.id[:-2]}{at:02x}"
        return self.parts[at].submit(jobs, once)

    def register(self, queues: Sequence[str], concurrency: int, worker: str = "") -> str:
        for shard in self.parts:
            worker = shard.register(queues, concurrency, worker)
        return worker

    def wait(self, names: Sequence[str], seconds: float = BLOCK) -> bool:
        """As Queue.wait, in all shards. Waits that go on when one shard answers are asked again the next time."""
        for at, shard in enumerate(self.parts):
            if at not in self._waits:
                self._waits[at] = self._waiters.submit(self._wait_in, shard, names, seconds)
        done, _ = wait(self._waits.values(), return_when=FIRST_COMPLETED)
        answered = [self._waits.pop(at) for at, future in list(self._waits.items()) if future in done]
        rung = [future.result() for future in answered]
        return any(rung)

    def _wait_in(self, shard: Queue, names: Sequence[str], seconds: float) -> bool:
        try:
            return shard.wait(names, seconds)
        except TinyQueueError:  # as if nothing had come: the others must not be kept from waiting
            time.sleep(seconds)
            return False

    def waiting(self, names: Sequence[str], due: bool = False) -> int:
        return sum(self._try(lambda shard: shard.waiting(names, due)))

    def take(self, worker: str, names: Sequence[str], most: int) -> list[bytes]:
        """As Queue.take, from the shards in turn. A shard in trouble does not keep the others from being served."""
        taken: list[bytes] = []

        def take(shard: Queue) -> None:
            if len(taken) < most:
                taken.extend(shard.take(worker, names, most - len(taken)))

        first = next(self._turn) % len(self.parts)
        self._try(take, order=[*self.parts[first:], *self.parts[:first]])
        return taken

    def start(self, worker: str, ids: Sequence[bytes], held: Mapping[str, int] | None = None) -> list[Job]:
        parts = self._by_shard(ids, text_of)
        started = (shard.start(worker, entries, held, len(ids) - len(entries)) for shard, entries in parts)
        return [job for jobs in started for job in jobs]

    def adopt(self, worker: str, held: Collection[str]) -> list[bytes]:
        return [id for ids in self._try(lambda shard: shard.adopt(worker, held)) for id in ids]

    def settle(self, worker: str, outcomes: Sequence[Outcome], again: bool = False) -> list[Outcome]:
        """As Queue.settle, one transaction a shard. Raises Unavailable after all were tried: then some are written."""
        others = list[Outcome]()
        trouble = list[Unavailable]()
        for shard, part in self._by_shard(outcomes, lambda outcome: outcome.job.id):
            try:
                others += shard.settle(worker, part, again)
            except Unavailable as error:
                trouble.append(error)
        if trouble:
            trouble[0].doubtful = True
            raise trouble[0]
        return others

    def write_progress(self, job: Job) -> None:
        self._of(job.id).write_progress(job)

    def cancel(self, id: str) -> Job | None:
        return self._of(id).cancel(id)

    def cancel_requests(self, ids: Sequence[str]) -> list[str]:
        return [id for shard, part in self._by_shard(ids, str) for id in shard.cancel_requests(part)]

    def retry(self, id: str) -> Job | None:
        return self._of(id).retry(id)

    def pause(self, name: str) -> None:
        self._try(lambda shard: shard.pause(name), all=True)

    def resume(self, name: str) -> None:
        self._try(lambda shard: shard.resume(name), all=True)

    def heartbeat(self, worker: str, jobs: Sequence[str] = ()) -> None:
        self._try(lambda shard: shard.heartbeat(worker, [id for id in jobs if self._of(id) is shard]), all=True)

    def deregister(self, worker: str) -> None:
        self._try(lambda shard: shard.deregister(worker), all=True)

    def promote(self) -> int:
        return sum(self._try(Queue.promote))

    def lost_workers(self, own: str = "") -> list[str]:
        return sorted({worker for lost in self._try(lambda shard: shard.lost_workers(own)) for worker in lost})

    def reap(self, worker: str) -> int:
        """As Queue.reap. What it ran in one shard it ran beside what it ran in the others."""
        ran = dict(self._try(lambda shard: (shard, shard.running(worker))))
        return sum(self._try(lambda shard: shard.reap(worker, sum(ran.values()) - ran.get(shard, 0))))

    def trim(self) -> int:
        return sum(self._try(Queue.trim))

    def forget(self, status: str, ids: Sequence[bytes]) -> int:
        return sum(shard.forget(status, part) for shard, part in self._by_shard(ids, text_of))

    def ping(self) -> None:
        self._try(Queue.ping, all=True)

    def get(self, id: str) -> Job | None:
        return self._of(id).get(id)

    def wait_for(self, id: str, seconds: float) -> Job | None:
        return self._of(id).wait_for(id, seconds)

    def page(self, filter: Filter | None = None, *, limit: int = 50, cursor: str = "") -> tuple[list[Job], str]:
        """As Queue.page: a cursor is a place in the order of all jobs. Merges pages as far as every shard has looked."""
        pages = [shard.page(filter, limit=limit, cursor=cursor) for shard in self.parts]
        horizon = max((_place_of(cursor) for _, cursor in pages if cursor), default=NO_HORIZON)
        found = sorted((job for jobs, _ in pages for job in jobs), key=Job.place, reverse=True)
        seen = [job for job in found if job.place() >= horizon]
        if len(seen) > limit:
            at, id = seen[limit - 1].place()
            return seen[:limit], f"{at}.{id}"
        return seen, f"{horizon[0]}.{horizon[1]}" if horizon > NO_HORIZON else ""

    def queues(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for shard in self.parts:
            for name, about in shard.queues().items():
                found[name] = _added(found[name], about) if name in found else about
        return dict(sorted(found.items()))

    def stats(self, minutes: int = 0) -> dict[str, Any]:
        """As Queue.stats, added up. A worker serves all shards, so workers are counted in the shard that has most."""
        all = [shard.stats(minutes) for shard in self.parts]
        history: dict[int, Any] = {}
        for minute in itertools.chain(*(stats.pop("history", ()) for stats in all)):
            at = minute["at"]  # not the index: a minute may begin between asking two shards
            history[at] = _added(history[at], minute) | {"at": at} if at in history else minute
        total = functools.reduce(_added, all) | {"workers": max(stats["workers"] for stats in all)}
        return total | ({"history": [history[at] for at in sorted(history)[-minutes:]]} if minutes else {})

    def workers(self) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for shard in self.parts:
            for about in shard.workers():
                known = found.setdefault(about["id"], about | {"jobs": [], "lastHeartbeat": 0})
                known["jobs"] = known["jobs"] + about["jobs"]
                known["lastHeartbeat"] = max(known["lastHeartbeat"], about["lastHeartbeat"])
                known["alive"] = known["alive"] and about["alive"]
        return list(found.values())

    def metrics(self) -> dict[str, dict[tuple[str, ...], int]]:
        return functools.reduce(_added, (shard.metrics() for shard in self.parts))

    def count_scrape_errors(self, times: int) -> None:
        self.parts[0].count_scrape_errors(times)

    def spend(self, who: str, limit: int, seconds: int) -> tuple[int, int]:
        return self.parts[self._at(who)].spend(who, limit, seconds)


def _added(one: Any, other: Any) -> Any:
    """Add up what two shards report: counts are summed, ages are the higher one, and paused is what either has paused."""
    if not isinstance(one, dict):
        return one or other if isinstance(one, bool) else one + other
    both = {
        name: _added(one[name], other[name]) if name in one and name in other else one.get(name, other.get(name))
        for name in {**one, **other}
    }
    return both | {name: max(one[name], other[name]) for name in ("oldestWaitingMs",) if name in one}


AnyQueue: TypeAlias = Queue | Shards


# Handlers -------------------------------------------------------------------------------------------------------------

P = TypeVar("P")
A = ParamSpec("A")

HANDLERS: dict[str, Handler[Any, Any, Any]] = {}


class Handler(Generic[P, A, R]):
    """A function that runs jobs of one type. It can still be called as it is."""

    def __init__(self, function: Callable[Concatenate[P, A], R], type: str, options: Mapping[str, Any]) -> None:
        self.function = function
        self.type = type
        self.__doc__ = function.__doc__
        self.max_attempts: int = _whole("maxAttempts", options["max_attempts"], 1, MAX_ATTEMPTS)
        self.timeout: float | None = options["timeout"]
        self.backoff: float = options["backoff"]
        self.backoff_cap: float = options["backoff_cap"]
        self.queue: str = check_name("queue", options["queue"])
        self.payload_type, self.wants_job = _signature(function)
        self._parse = msgspec.json.Decoder(self.payload_type).decode

    def __call__(self, payload: P, *args: A.args, **kwargs: A.kwargs) -> R:
        return self.function(payload, *args, **kwargs)

    def enqueue(self, queue: AnyQueue, payload: P, /, **options: Any) -> Job:
        """Enqueue a job of this type; mypy checks the payload too. Options as for `make_job`."""
        return queue.enqueue(self.type, payload, **options)

    def parse(self, payload: bytes) -> P:
        """Turn a payload's JSON into what the handler takes; raises InvalidJob with the path of what does not match."""
        try:
            return cast(P, self._parse(payload))
        except msgspec.ValidationError as error:
            with suppress(msgspec.ValidationError):
                return cast(P, self._parse(_encode(_whole_floats(msgspec.json.decode(payload)))))
            rule, _, path = str(error).partition(" - at ")
            raise InvalidJob("payload", rule, path.strip("`") or "$") from None
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidJob("payload", str(error)) from None

    def run(self, job: Job) -> Any:
        """Call the function for a job that a worker has started."""
        payload = self.parse(_encode(job.payload))
        call: Callable[..., Any] = self.function
        return call(payload, job) if self.wants_job else call(payload)


def handler(
    type: str,
    *,
    max_attempts: int = 3,
    timeout: float | None = 300,
    backoff: float = 1.0,
    backoff_cap: float = 300.0,
    queue: str = "default",
) -> Callable[[Callable[Concatenate[P, A], R]], Handler[P, A, R]]:
    """Register a function as the handler of jobs of `type`.

    Its first parameter is annotated with the payload's type: a dataclass, TypedDict, msgspec Struct
    or anything else that msgspec can read from JSON. The payload is checked against it when a job is
    submitted and again before it runs. A second parameter, annotated `Job`, receives the job. The
    return value, as JSON, is the job's result.

    `timeout` is in seconds; None means unlimited. After attempt n the job waits for `backoff` * 2
    ** (n - 1) seconds and up to half as much again, at most `backoff_cap`. Mistakes raise TypeError
    or InvalidJob when the module is imported.
    """
    check_name("type", type)
    if not all(_is_number(value) for value in (300 if timeout is None else timeout, backoff, backoff_cap)):
        raise TypeError(f"handler {type!r}: timeout, backoff and backoff_cap must be numbers of seconds")
    if timeout is not None and not timeout > 0:
        raise TypeError(f"handler {type!r}: timeout must be above 0, or None")
    if not 0 < backoff <= backoff_cap <= MAX_DELAY:
        raise TypeError(f"handler {type!r}: backoff must be above 0, backoff_cap at least that and at most {MAX_DELAY}")
    options = {
        "max_attempts": max_attempts,
        "timeout": timeout,
        "backoff": backoff,
        "backoff_cap": backoff_cap,
        "queue": queue,
    }

    def register(function: Callable[Concatenate[P, A], R]) -> Handler[P, A, R]:
        twin = HANDLERS[type].function if type in HANDLERS else function
        if _place(twin) != _place(function):  # the same place is met again when a module is reloaded
            raise TypeError(f"two handlers are declared for type {type!r}")
        made = HANDLERS[type] = Handler(function, type, options)
        return made

    return register


def _place(function: Callable[..., Any]) -> tuple[str, str, int]:
    return function.__module__, function.__qualname__, function.__code__.co_firstlineno


def _signature(function: Callable[..., Any]) -> tuple[Any, bool]:
    """Return a handler's payload type, and whether it takes the job as well."""
    name = f"handler {function.__name__}"
    kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
    if any(is_kind(function) for is_kind in kinds):
        raise TypeError(
            f"{name} must be a plain function, not async and not a generator: a call would not run its body"
        )
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = list(inspect.signature(function).parameters.values())
    if not 1 <= len(parameters) <= 2 or parameters[0].name not in hints:
        raise TypeError(f"{name} must take an annotated payload and, optionally, a Job")
    if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
        raise TypeError(f"{name} must take its parameters by position")
    if len(parameters) == 2 and hints.get(parameters[1].name) is not Job:
        raise TypeError(f"the second parameter of {name} must be annotated Job")
    return hints[parameters[0].name], len(parameters) == 2


def load_handlers(modules: str) -> dict[str, Handler[Any, Any, Any]]:
    """Import the modules that register handlers. The working directory comes first, so that the user's own files win."""
    if sys.path[:1] != [os.getcwd()]:
        sys.path.insert(0, os.getcwd())
    for module in filter(None, (name.strip() for name in modules.split(","))):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module.partition(".")[0] and error.name != module:
                raise SettingsError(f"cannot import {module}: {error}") from error
            text = (
                f"TINYQUEUE_HANDLERS: there is no module {module} here; create it, or name the module of your handlers"
            )
            raise SettingsError(text) from None
        except (Exception, SystemExit) as error:
            text = " ".join(_text(error).split())
            raise SettingsError(f"cannot import {module}: {type(error).__name__}: {text}") from error
    if not HANDLERS:
        raise SettingsError(f"{modules} registers no handler: decorate a function with @handler('type')")
    return HANDLERS


class Retry(Exception):
    """Raised by a handler: this attempt failed; try again in `after` seconds, by default after the usual backoff."""

    def __init__(self, reason: str = "the handler asked for a retry", *, after: float | None = None) -> None:
        if after is not None and not is_delay(after):
            raise ValueError(f"Retry: after must be a number of seconds from 0 to {MAX_DELAY}")
        super().__init__(reason)
        self.after = after


class Discard(Exception):
    """Raised by a handler: fail the job now, however many attempts are left."""


class TimedOut(BaseException):
    """Raised inside a handler that exceeds its timeout. A BaseException, so that `except Exception` does not swallow it."""

    def __str__(self) -> str:
        return "the handler exceeded its timeout"


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as second:  # the handler's own exception class may be broken as well
        return f"(its text raised {type(second).__name__})"


def backoff(attempts: int, base: float = 1.0, cap: float = 300.0) -> float:
    """Seconds to wait after that many attempts: doubling from `base` with jitter on top, at most `cap`, at least `base`."""
    return float(min(cap, base * 2 ** min(attempts - 1, 60) * random.uniform(1.0, 1.5)))


# Checking a job -------------------------------------------------------------------------------------------------------


def make_job(
    now: int,
    type: str,
    payload: Any,
    *,
    max_attempts: int | None = None,
    queue: str | None = None,
    delay: float | None = None,
    run_at: int | str | datetime | None = None,
    expires_in: float | None = None,
    unique_key: str | None = None,
) -> Job:
    """Check the parts of a job and make it. Raises InvalidJob naming the field and the rule.

    What is left out comes from the handler's declaration, if this process knows one. A job that was
    not started within `expires_in` seconds fails when its turn comes. While a job with its
    `unique_key` is pending or processing, a second one is not stored: submit returns the first.
    """
    known = HANDLERS.get(check_name("type", type))
    try:
        encoded = to_json(payload)
    except ValueError as error:
        raise InvalidJob("payload", str(error)) from None
    if known:
        known.parse(encoded)
    if max_attempts is None:
        max_attempts = known.max_attempts if known else 3
    if queue is None:
        queue = known.queue if known else "default"
    return Job(
        id=_new_id(now),
        type=type,
        payload=payload,
        max_attempts=_whole("maxAttempts", max_attempts, 1, MAX_ATTEMPTS),
        queue=check_name("queue", queue),
        run_at=_first_run(delay, run_at, now),
        expires_at=_expiry(expires_in, now) if expires_in is not None else 0,
        unique_key=_text_key("uniqueKey", unique_key) if unique_key is not None else "",
    )


def check_name(field: str, value: Any) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise InvalidJob(field, "must be 1 to 100 of the characters A-Z a-z 0-9 . _ -")
    return value


def _text_key(field: str, value: Any) -> str:
    if not isinstance(value, str) or not PRINTABLE.fullmatch(value) or len(value) > KEY_LENGTH:
        raise InvalidJob(field, f"must be 1 to {KEY_LENGTH} printable characters")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_delay(value: Any) -> bool:
    """Tell whether a job may be delayed by that many seconds."""
    return _is_number(value) and 0 <= value <= MAX_DELAY


def _whole(field: str, value: Any, low: int, high: int) -> int:
    if not _is_number(value) or not low <= value <= high or value % 1:
        raise InvalidJob(field, f"must be a whole number from {low} to {high}")
    return int(value)


def _first_run(delay: float | None, run_at: Any, now: int) -> int:
    """When a job with that `delay` or `runAt` may start: 0 for at once."""
    at = 0
    if delay is not None and run_at is not None:
        raise InvalidJob("delay", "must not be given together with runAt")
    if run_at is not None:
        at = _moment(run_at, now)
    if delay is not None:
        if not is_delay(delay):
            raise InvalidJob("delay", f"must be a number of seconds from 0 to {MAX_DELAY}")
        at = now + round(delay * 1000)
    return at if at > now else 0


def _expiry(seconds: float, now: int) -> int:
    if not is_delay(seconds) or not seconds:
        raise InvalidJob("expiresIn", f"must be a number of seconds above 0, at most {MAX_DELAY}")
    return now + max(1, round(seconds * 1000))


def _moment(value: Any, now: int) -> int:
    """Read `runAt`: milliseconds since 1970, or ISO 8601 with a zone. The past means now."""
    rule = f"must be ISO 8601 with a zone, or milliseconds since 1970, and at most {MAX_DELAY // 86400} days ahead"
    if isinstance(value, str):
        try:
            value = msgspec.convert(value, Annotated[datetime, Meta(tz=True)])
        except (msgspec.ValidationError, ValueError):
            raise InvalidJob("runAt", rule) from None
    if isinstance(value, datetime) and value.tzinfo:
        value = int(value.timestamp() * 1000)
    if isinstance(value, bool) or not isinstance(value, int) or value > now + MAX_DELAY * 1000:
        raise InvalidJob("runAt", rule)
    return max(value, 0)


# Strict JSON ----------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Encode an instance of a subclass of str, int or float, which libraries like to return, as its base class."""
    for base in (str, int, float):
        if isinstance(value, base):
            return base.__str__(value) if base is str else base(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


_encode = msgspec.json.Encoder(enc_hook=_plain).encode


def to_json(value: Any) -> bytes:
    """Encode what a client or a handler gave; raises ValueError for what JSON cannot hold or what is nested too deep.

    Dates, sets, bytes and dataclasses become what msgspec makes of them.
    """
    try:
        encoded = _encode(value)
        decoded = msgspec.json.decode(encoded)  # msgspec takes what is encoded already, msgspec.Raw, unseen
        if b"null" in encoded:  # msgspec silently makes null of NaN; only then is a walk through the value worth it
            json.dumps(msgspec.to_builtins(value, str_keys=True), allow_nan=False)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.DecodeError) as error:
        raise ValueError(f"is not JSON: {_text(error) or type(error).__name__}"[:300]) from None
    if encoded.count(b"[") + encoded.count(b"{") > MAX_DEPTH and _depth(decoded) > MAX_DEPTH:
        raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")
    return encoded


def from_json(text: bytes, levels: int = MAX_DEPTH) -> Any:
    """Decode what a client sent, strictly; raises ValueError with the reason.

    Refuses encodings other than UTF-8, NaN and numbers too large for a float, a name used twice in
    one object (parsers differ in which they take), and more levels of nesting than that.
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=_object, parse_float=_number, parse_constant=_number)
        if text.count(b"[") + text.count(b"{") > levels and _depth(value) > levels:
            raise RecursionError
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"nested deeper than {levels} levels") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"duplicate name {ascii(twice)[:100]} in one object")
    return made


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"JSON cannot hold the number {text[:100]}")
    return number


def _whole_floats(value: Any) -> Any:
    """Write 1.0 as 1 throughout: to JSON Schema both are integers, to msgspec only one of them is."""
    if isinstance(value, dict):
        return {name: _whole_floats(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_whole_floats(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        level = [child for v in level for child in (v.values() if isinstance(v, dict) else v)]
    return depth
