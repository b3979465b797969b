"""TinyQueue: a job queue on Redis. This file holds every rule of it and is the only one that talks to Redis.

The promise
    A job that was accepted is run at least once and never lost while Redis keeps its data. It is run twice only if the worker
    that held it was cut off for longer than its lease. Jobs of a queue start first in, first out. A job that kills its worker
    runs out of attempts like any other; those that ran beside it get theirs back, so they never fail for its sake.

States
                 enqueue                dequeue                complete
        (nothing) -----> pending ------------------> processing -----> completed
                         |  ^  ^                       |  |  |
                  cancel |  |  +--- release, reap -----+  |  | fail, reap: no attempt left
                         v  |  +--- fail: attempts left --+  v
                  cancelled +-------- retry ------------- failed

    A job that waits for its delay or its backoff is pending with a `runAt`. One that expires before its first start is failed.

Transitions. Each is one WATCH / MULTI / EXEC: two round trips however many jobs it moves, and no Lua.

    verb       from -> to                     watches              only if                      writes
    enqueue    nothing -> pending             once, unique         keys unused, if given        record, list or delayed, bell, keys
    take       (list to list)                 -                    -                            RPOPLPUSH jobs -> proc, workers
    start      pending -> processing          worker, records      registered; pending and due  record: attempts + 1, worker
               (failed, if it has expired)    worker, records      pending, never started       record, proc, failed
    complete   processing -> completed        worker, records      registered                   record, proc, completed
    fail       processing -> pending, failed  worker, records      registered                   record, proc, delayed or failed
               (or cancelled, if asked to)
    release    processing -> pending          worker, records      registered                   record, proc, head of list, bell
    promote    (delayed to list)              records              runAt has come               delayed, list, bell
    reap       processing -> pending, failed  worker, lease, proc  lease gone                   worker, proc, record, head of list
               (or cancelled, if asked to)    and the records
    cancel     pending -> cancelled           record               pending                      record, delayed, cancelled
               (processing, asked to stop)    record               processing                   record
    retry      failed, cancelled -> pending   record, unique       failed or cancelled          record, its index, list, bell
    progress   (processing, as it is)         worker, record       registered                   record

    dequeue is take, then start. complete, fail and release are all written by settle, many in one transaction. Each verb keeps the
    counts and the metrics, too; and what ends a job frees its uniqueKey and leaves a token for those who wait for it.

Keys. All share one hash tag, the namespace, and with it one slot of a cluster.

    {queue}:job:<id>          string    the record: the job as JSON, without its id and without what stands at its default
    {queue}:jobs:<name>       list      ids waiting in queue <name>: enter left, leave right
    {queue}:proc:<worker>     list      ids that this worker holds
    {queue}:bell:<name>       list      wake-up tokens, at most 64; holds no work, may be lost
    {queue}:delayed           zset      id -> runAt
    {queue}:completed         zset      id -> when it ended; likewise {queue}:failed and {queue}:cancelled
    {queue}:workers           set       every worker that may hold a job
    {queue}:worker:<worker>   string    its registration: the fence. No time to live
    {queue}:lease:<worker>    string    its sign of life, with a time to live; says what it is doing
    {queue}:once:<key>        string    what a submit with an Idempotency-Key made: its fingerprint and the ids. With a time to live
    {queue}:unique:<key>      string    the id of the unended job that has this uniqueKey
    {queue}:paused            set       the names of paused queues
    {queue}:minute:<n>        hash      started, and waitedMs of those; completed, failed, cancelled: in the n-th minute since 1970.
                                        Two hours to live
    {queue}:rate:<who>:<n>    string    requests of a client in the n-th window. With a time to live
    {queue}:awaited           set       the ids of jobs for whose end somebody waits
    {queue}:done:<id>         list      a token for those who waited. A minute to live
    {queue}:counts            hash      pending:<name> and processing:<name> now; completed, failed, cancelled since the beginning
    {queue}:promoter          string    who promotes at the moment, with a time to live; two at once would do no harm
    {queue}:mark              string    written to hear when the replicas have all that was written before. A second to live
    {queue}:metrics           hash      what happened to jobs since the beginning: <what>:<type>:<queue>, for times with :<bucket>
    {queue}:series            set       the <type>:<queue> that are counted there by name, 1,000 of them; the rest are other:other

Three rules carry everything
    1. The record decides, lists are hints. A list may hold an id twice, or one whose job is cancelled, finished or gone; whoever
       takes such an id drops it. So promote and reap may repeat themselves, and cancelling costs the same in any queue.
    2. Every write of a worker is fenced. It watches its registration and writes only if that still exists. reap deletes the
       registration in the transaction that gives the jobs away: a worker thought dead that wakes up can no longer write.
    3. Waiting never holds work. An idle worker blocks on the bell, never on the jobs: a lost reply there costs nothing.

Read on in the order of a job's life. `grep '# [A-Z].* ---' tinyqueue.py` prints the table of contents.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import ipaddress
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
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Concatenate, Generic, Literal, NamedTuple, ParamSpec, TypeVar, cast
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import msgspec
import redis
from dotenv import load_dotenv
from hiredis import pack_command
from msgspec import Meta
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry as NoRetries
from redis.sentinel import Sentinel, SentinelConnectionPool

__version__ = "0.1.0"
# Makes worker.py and wsgi.py, which lie beside this file, importable as tinyqueue.worker and tinyqueue.wsgi, even where
# another module is named worker or wsgi.
__path__ = [os.path.dirname(os.path.abspath(__file__))]

log = logging.getLogger("tinyqueue")


# Errors ---------------------------------------------------------------------------------------------------------------


class TinyQueueError(Exception):
    """The base of every error that TinyQueue raises. "Nothing there" is None or empty, never an error."""


class SettingsError(TinyQueueError):
    """A setting, or the handlers module, is wrong: the process must not start. The text is one line that says what to do."""


class InvalidJob(TinyQueueError):
    """A job that cannot be accepted; nothing was stored.

    `field` is the name of the offending part as JSON clients know it, `rule` what it must be, and `path` the place inside the
    payload (``$.to``), if it is there.
    """

    def __init__(self, field: str, rule: str, path: str = "") -> None:
        super().__init__(f"{field}{path.removeprefix('$')}: {rule}")
        self.field, self.rule, self.path = field, rule, path


class UnknownType(InvalidJob):
    """No handler of that type is registered. `known` lists those that are."""

    def __init__(self, type: str, known: Sequence[str]) -> None:
        super().__init__("type", f"no handler is registered for {type!r}; known are: {', '.join(known) or 'none'}")
        self.type, self.known = type, list(known)


class KeyReused(TinyQueueError):
    """The Idempotency-Key was used before, for another request. Nothing was stored."""


class QueueFull(TinyQueueError):
    """So many jobs are pending in that queue that no more are accepted (TINYQUEUE_MAX_PENDING). Nothing was stored."""


class NotReplicated(TinyQueueError):
    """The jobs are stored and will run, but fewer replicas than TINYQUEUE_MIN_REPLICAS have them: without the master they are lost.

    `jobs` are those. To submit them again makes new ones, unless it is done under the same Idempotency-Key: that waits once more.
    """

    def __init__(self, jobs: Sequence[Job], reached: int, wanted: int) -> None:
        what, them = (f"job {jobs[0].id} is", "it") if len(jobs) == 1 else (f"{len(jobs)} jobs are", "them")
        super().__init__(f"{what} stored and will run, but only {reached} of {wanted} replicas have {them} by now")
        self.jobs = list(jobs)


class WrongStatus(TinyQueueError):
    """The verb is not for a job of this status; nothing was changed. `job` is the job as it stands."""

    def __init__(self, verb: str, job: Job, why: str = "") -> None:
        super().__init__(f"cannot {verb} job {job.id}: {why or f'it is {job.status}'}")
        self.verb, self.job = verb, job


class Unavailable(TinyQueueError):
    """Redis did not do it. `reason` is one word: unreachable, timeout, loading, full, read-only, refused or busy.

    `doubtful` tells that a write was sent and its reply lost: it may have been applied.
    """

    def __init__(self, reason: str, detail: str, doubtful: bool = False) -> None:
        super().__init__(f"Redis is {reason}: {detail}")
        self.reason, self.doubtful = reason, doubtful


class Corrupted(TinyQueueError):
    """A key of the namespace holds what TinyQueue never writes there. `applied`: everything else of the transaction was written."""

    applied = False


class Reaped(TinyQueueError):
    """This worker was taken for dead and its jobs were given away: it must drop what it holds and register anew."""


# What a handler raises to steer its job -------------------------------------------------------------------------------


class Retry(Exception):
    """Raised by a handler: this attempt is over, try again `after` seconds (by default after the usual backoff)."""

    def __init__(self, reason: str = "asked to be retried", *, after: float | None = None) -> None:
        if after is not None and not is_delay(after):
            raise ValueError(f"Retry: after must be a number of seconds from 0 to {MAX_DELAY}")
        super().__init__(reason)
        self.after = after


class Discard(Exception):
    """Raised by a handler: fail the job now, whatever attempts are left."""


class TimedOut(BaseException):
    """Raised in a handler that has run past its timeout. A BaseException, so that `except Exception` does not swallow it."""

    def __str__(self) -> str:
        return "the handler ran past its timeout"


# Settings -------------------------------------------------------------------------------------------------------------

PLAIN_NAMES = {"redis_url", "host", "port", "worker_concurrency", "web_concurrency", "log_format", "log_level"}
PLATFORMS = re.compile("DYNO|RENDER|K_SERVICE|FLY_APP_NAME|VERCEL|RAILWAY_.*|AWS_LAMBDA_.*")


def variable(field: str) -> str:
    return field.upper() if field in PLAIN_NAMES else f"TINYQUEUE_{field.upper()}"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename=variable):
    """Every tunable: one table for the environment, where an empty variable counts as unset, for `--help` and for the README."""

    redis_url: Annotated[str, Meta(description="where the jobs are; without it: embedded, nothing is kept")] = ""
    host: Annotated[str, Meta(description="address the web process listens on; without it: all, IPv4 and IPv6")] = ""
    port: Annotated[int, Meta(ge=0, le=65535, description="port the web process listens on")] = 3000
    worker_concurrency: Annotated[int, Meta(ge=1, le=500, description="slots of a worker process: jobs at a time")] = 5
    web_concurrency: Annotated[int, Meta(ge=1, le=64, description="web processes sharing the listening socket")] = 1
    log_format: Annotated[Literal["text", "json"], Meta(description="log lines for people or for machines")] = "text"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="the least serious lines that are logged")
    ] = "info"
    handlers: Annotated[str, Meta(description="modules that register handlers, comma-separated")] = "handlers"
    namespace: Annotated[
        str, Meta(pattern=r"^[A-Za-z0-9._-]{1,100}\Z", description="key prefix and cluster hash tag in Redis")
    ] = "queue"
    lease: Annotated[
        int, Meta(ge=2, le=3600, description="seconds without a sign of life until a worker counts as dead")
    ] = 30
    shutdown_timeout: Annotated[
        int, Meta(ge=0, le=3600, description="seconds of drain at SIGTERM, then jobs are handed back")
    ] = 25
    watchdog: Annotated[
        int,
        Meta(
            ge=10,
            le=86400,
            description="seconds without Redis, or without taking jobs, until a worker gives up and exits",
        ),
    ] = 300
    max_body: Annotated[int, Meta(ge=1024, le=16 << 20, description="bytes of a request's body")] = 262144
    keep_completed: Annotated[int, Meta(ge=1, le=10**9, description="seconds that completed jobs stay")] = 86400
    keep_failed: Annotated[int, Meta(ge=1, le=10**9, description="seconds that failed and cancelled jobs stay")] = (
        604800
    )
    keep_once: Annotated[int, Meta(ge=60, le=10**9, description="seconds that an Idempotency-Key is remembered")] = (
        86400
    )
    max_pending: Annotated[
        int, Meta(ge=0, le=10**9, description="pending jobs of a queue beyond which none are accepted; 0: any")
    ] = 0
    min_replicas: Annotated[
        int, Meta(ge=0, le=100, description="replicas that must have a job before it is accepted")
    ] = 0
    api_keys: Annotated[
        str, Meta(description="who may come in: name:role:secret, comma-separated; roles submit, read, admin")
    ] = ""
    open: Annotated[bool, Meta(description="1: without keys let everybody in, not only this machine")] = False
    rate_limit: Annotated[
        str,
        Meta(
            pattern=r"^([1-9][0-9]{0,8}/(second|minute|hour))?\Z",
            description="requests of one key or address, as 600/minute",
        ),
    ] = ""
    trusted_proxies: Annotated[
        int,
        Meta(
            ge=0,
            le=10,
            description="proxies before this server; the client is that many from the right in X-Forwarded-For",
        ),
    ] = 0
    shards: Annotated[
        int,
        Meta(ge=1, le=64, description="namespaces over which jobs are spread, for a cluster; never make them fewer"),
    ] = 1
    tls_verify: Annotated[bool, Meta(description="0: accept any certificate of a rediss:// server")] = True

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
        """Make settings from the environment and `.env` in the working directory; the real environment wins, `overrides` over both.

        A wrong value, a name that begins with TINYQUEUE_ but is none, or a platform without REDIS_URL raises SettingsError.
        """
        if environ is None:
            load_dotenv(".env")  # into the environment, for handlers have settings of their own
            environ = os.environ
        names = {field.encode_name for field in msgspec.structs.fields(cls)}
        raw = {k: v for k, v in environ.items() if v and (k in names or k.startswith("TINYQUEUE_"))}
        raw |= {variable(k): v for k, v in overrides.items() if v is not None}
        if unknown := sorted(raw.keys() - names):
            raise SettingsError(f"{unknown[0]} is not a setting; there are {', '.join(sorted(names))}")
        try:
            settings = msgspec.convert(raw, cls, strict=False)
        except msgspec.ValidationError as error:
            rule, _, name = str(error).partition(" - at `$.")
            raise SettingsError(f"{name.rstrip('`')}={raw[name.rstrip('`')]!r}: {rule}") from None
        platform = next((name for name, value in environ.items() if value and PLATFORMS.fullmatch(name)), None)
        if platform and not settings.redis_url:
            raise SettingsError(
                f"REDIS_URL is not set, and {platform} tells of a platform that would lose every job at a restart"
            )
        return settings

    @classmethod
    def table(cls) -> list[tuple[str, str, str]]:
        """List the settings as (variable, default, meaning), for whoever checks the README."""
        hints = typing.get_type_hints(cls, include_extras=True)
        return [
            (f.encode_name, str(f.default), hints[f.name].__metadata__[0].description)
            for f in msgspec.structs.fields(cls)
        ]

    @classmethod
    def help(cls) -> str:
        """The table as text for `--help`."""
        lines = [f"  {name:<26} {text}{f' [{default}]' if default else ''}" for name, default, text in cls.table()]
        return "\n".join(["Settings, from the environment or from .env here [and what they are without]:", *lines])

    @property
    def web_connections(self) -> int:
        """How many connections to Redis a web process may open, to each shard: each thread one."""
        return THREADS + SPARE

    @property
    def worker_connections(self) -> int:
        """How many a worker process may open, to each shard: taker, settler and keeper one each, and handlers for progress."""
        return 3 + min(self.worker_concurrency, WRITERS) + SPARE


LOG_CONTEXT: ContextVar[Callable[[], dict[str, Any]]] = ContextVar(
    "log_context", default=dict
)  # of a job, or of a request


def _add_context(record: logging.LogRecord) -> bool:
    """Give a line the fields of the job or the request in whose thread it was written, beside its own `extra={"fields": {...}}`."""
    own = getattr(record, "fields", None)
    record.fields = LOG_CONTEXT.get()() | (own if isinstance(own, dict) else {})
    return True


class JSONFormatter(logging.Formatter):
    """Write a log line as one JSON object with its fields as members; none takes the place of time, level and message."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": int(record.created * 1000), "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, "fields", {}) | line, default=str)


class TextFormatter(logging.Formatter):
    """Write a log line for people. Nothing in it can begin another or look like one: control characters are escaped.

    The ids by which one searches stand at its end, unless it names them. Lines of a traceback are indented.
    """

    def format(self, record: logging.LogRecord) -> str:
        message, fields = record.getMessage(), getattr(record, "fields", {})
        ids = {name: str(fields[name]) for name in ("job", "requestId", "traceparent") if name in fields}
        told = [f"{name}={id}" for name, id in ids.items() if id not in message]
        trace = self.formatException(record.exc_info).splitlines() if record.exc_info else []
        head = " ".join([self.formatTime(record), record.levelname, message, *told])
        return "\n    ".join(map(_one_line, [head, *trace]))


def _one_line(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def set_up_logging(settings: Settings) -> None:
    """Send all logging to standard error as the settings say."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter() if settings.log_format == "json" else TextFormatter())
    handler.addFilter(_add_context)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)


# Limits: a part of the contract, not tunables -------------------------------------------------------------------------

MAX_JOBS = 1000  # jobs of one enqueue_many: some milliseconds of Redis' one thread
MAX_ATTEMPTS = 100
MAX_DELAY = 366 * 86400  # seconds
MAX_DEPTH = 100  # nested arrays and objects in a payload; a fixed number, for parsers give up at different ones
MAX_RESULT = 262144  # bytes of a result's JSON
SUSPICIOUS = 2  # times that a worker was lost while it ran a job beside others, until that job runs alone
MAX_REFUNDS = 10  # times that a release gives the attempt back: a job that never survives a deploy must end some day
KEY_LENGTH = 200  # characters of a uniqueKey
SCANNED = 1000  # jobs that one page of a listing or one bulk change looks at
MEMORY_SHARE = 0.95  # of Redis' maxmemory, above which no job is accepted: what is there must still be able to end
LISTED = 10_000  # entries of a list that a listing looks at
KEPT = 100_000  # ended jobs that stay, of each status
BELLS = 64
PROMOTED = 500  # jobs moved by one promote
TRIES = 50  # of a transaction that others keep breaking
CLOCK_AGE = 10.0  # seconds that a reading of Redis TIME is good for
THREADS = 8  # of a web process
WRITERS = 4  # handlers of a worker that write their progress at the same moment; others wait for their turn
SPARE = 2  # connections of a process beyond those in use: one may be on its way from a thread to the next
SERIES = 1000  # types and queues that the metrics tell apart: each is some thirty lines of a scrape
BUCKETS = (
    10,
    50,
    250,
    1000,
    5000,
    15_000,
    60_000,
    300_000,
    1_800_000,
    math.inf,
)  # milliseconds, at most, of waiting and running

NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")  # of queues, types, workers: no name can spell another key
PRINTABLE = re.compile(r"[^\x00-\x1f\x7f-\xa0\xad\u2028\u2029\ud800-\udfff]+")  # as in openapi.json; no lone surrogates
ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")

# Keys -----------------------------------------------------------------------------------------------------------------


class Keys:
    """The names of all keys, spelled here and nowhere else."""

    def __init__(self, namespace: str) -> None:
        self.prefix = prefix = "{" + namespace + "}:"
        self.delayed, self.workers, self.paused = prefix + "delayed", prefix + "workers", prefix + "paused"
        self.completed, self.failed, self.cancelled = prefix + "completed", prefix + "failed", prefix + "cancelled"
        self.counts, self.metrics, self.series = prefix + "counts", prefix + "metrics", prefix + "series"
        self.promoter, self.mark, self.awaited = prefix + "promoter", prefix + "mark", prefix + "awaited"

        def each(kind: str) -> Callable[[str], str]:
            return f"{prefix}{kind}:".__add__  # no Python of its own: every job has several of these made

        self.job, self.done, self.unique = each("job"), each("done"), each("unique")
        self.jobs, self.bell = each("jobs"), each("bell")
        self.worker, self.lease, self.proc = each("worker"), each("lease"), each("proc")
        self._once, self._minute, self._rate = each("once"), each("minute"), each("rate")

    def once(self, key: str) -> str:
        return self._once(hashlib.sha256(key.encode()).hexdigest())

    def minute(self, now: int) -> str:
        return self._minute(str(now // 60_000))

    def rate(self, who: str, window: int) -> str:
        return self._rate(f"{who}:{window}")


# The job --------------------------------------------------------------------------------------------------------------

Status = Literal["pending", "processing", "completed", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = typing.get_args(Status)
UNENDED, ENDED = STATUSES[:2], STATUSES[2:]
MINUTELY = ("started", *ENDED, "waitedMs")  # what is counted for each minute
TOLD = ("id", "type", "payload", "status", "attempts", "maxAttempts", "queue", "createdAt", "updatedAt")  # of every job
TOLD_LATER = (  # once it is so
    *("runAt", "startedAt", "endedAt", "worker", "progress", "expiresAt", "uniqueKey", "cancelRequested", "suspicions"),
    *("requestId", "traceparent", "error"),
)
UNREADABLE = "UnreadableRecord"


def _plain(value: Any) -> Any:
    """Encode a subclass of text or number as that, which libraries like to return."""
    for base in (str, int, float):
        if isinstance(value, base):
            return base.__str__(value) if base is str else base(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


_encode = msgspec.json.Encoder(enc_hook=_plain).encode


class Failure(msgspec.Struct, rename="camel", omit_defaults=True):
    """Why an attempt failed. Message and traceback are cut to size."""

    type: str
    message: str
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException, traceback: str = "") -> Failure:
        """Describe an exception. Text that JSON cannot hold, as lone surrogates, is escaped."""
        message, trace = (text.encode("utf-8", "backslashreplace").decode() for text in (_text(error), traceback))
        return cls(type(error).__name__, message[:1000], trace[-4000:])


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as second:  # the handler's own exception class may be broken as well
        return f"(its text raised {type(second).__name__})"


class Job(msgspec.Struct, rename="camel", omit_defaults=True, dict=True):
    """A job as it stood when it was read. Times are milliseconds of Redis TIME, 0 for never.

    The fields are the record. It leaves out what stands at its default, so a default is part of the storage format.
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
    def attempt(self) -> int:
        """Which start of the handler this is, counted from 1."""
        return self.attempts

    @property
    def suspect(self) -> bool:
        """Whether it must run alone in its process: workers were lost that ran it beside others, and one of those did it."""
        return self.suspicions >= SUSPICIOUS

    @property
    def cancelled(self) -> bool:
        """Whether somebody wants this running job to stop. A handler that does, by any exception, leaves it cancelled."""
        return self.cancel_requested

    def set_progress(self, done: float, of: float = 1.0) -> None:
        """Show how far a running handler is. Goes to Redis at most once a second; the last value is kept with the outcome.

        For the job that a handler was given. Raises Reaped if the job is no longer this worker's.
        """
        self.progress = round(min(1.0, max(0.0, done / of)), 4) if of else 1.0
        now = time.monotonic()
        if now - self.__dict__.get("_progress_written", -1.0) >= 1.0 and (queue := self.__dict__.get("_queue")):
            self.__dict__["_progress_written"] = now
            with suppress(Unavailable):  # no reason to fail an attempt
                queue.write_progress(self)

    def place(self) -> tuple[int, str]:
        """Where it stands in a listing: by when it ended, or if it has not, was enqueued."""
        return self.ended_at if self.status in ENDED else self.created_at, self.id

    def log_fields(self) -> dict[str, Any]:
        """What every log line about it carries."""
        fields = {
            "job": self.id,
            "type": self.type,
            "queue": self.queue,
            "attempt": self.attempts,
            "worker": self.worker,
        }
        came_with = {"requestId": self.request_id, "traceparent": self.traceparent}
        return fields | {name: value for name, value in came_with.items() if value}

    def answer(self) -> dict[str, Any]:
        """The job as clients see it: the record with its id, its times and its defaults; nothing that has not happened yet."""
        fields = dict(zip(self.__struct_encode_fields__, msgspec.structs.astuple(self), strict=True))
        fields |= {"createdAt": self.created_at, "updatedAt": self.updated_at or self.created_at}
        later = [name for name in TOLD_LATER if fields[name]] + ["result"] * (self.status == "completed")
        return {name: fields[name] for name in (*TOLD, *later)}


class Attempt(msgspec.Struct, rename="camel"):
    """What in a record tells one attempt from all others. Reading only this is cheap."""

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
    """Read a record. One that cannot be read becomes a failed job that shows it, so that no reader crashes or loops."""
    try:
        job = _decode_job(b'{"id":"%b",%b' % (id.encode(), record[1:]))
        if job.id != id:
            raise msgspec.DecodeError("a record must not hold an id")
        return job
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = record[:10_000].decode("utf-8", "backslashreplace")
        return Job(id, "unreadable", text, status="failed", error=Failure(UNREADABLE, str(error)))


def created_at(id: str) -> int:
    """When the job of that id was enqueued: a UUID of version 7 (RFC 9562) begins with that time, in milliseconds."""
    return int(id[:8] + id[9:13], 16)


class Filter(NamedTuple):
    """Which jobs a listing shows and a bulk change touches: those to which all that is given applies."""

    status: Status | None = None
    type: str | None = None
    queue: str | None = None
    error_type: str | None = None

    def fits(self, job: Job) -> bool:
        error = job.error.type if job.error else None
        wanted = (self.status, job.status), (self.type, job.type), (self.queue, job.queue), (self.error_type, error)
        return all(want is None or want == has for want, has in wanted)


CURSOR = re.compile(r"([0-9]{1,16})\.([0-9a-g-]{1,36})")
Entry = tuple[int, str, str]  # of a listing: when, id, and the status under which it was found
Place = tuple[int, str]  # in the order of a listing
NO_HORIZON: Place = (0, "")  # everything was seen


def _cursor(todo: Sequence[Entry], seen: int, more: bool) -> str:
    """The place behind the entries that were seen, if there are others."""
    if len(todo) > seen or (more and todo):
        at, id, _ = todo[min(seen, len(todo)) - 1]
        return f"{at}.{id}"
    return ""


def _place_of(cursor: str) -> Place:
    match = CURSOR.fullmatch(cursor)
    if not match:
        raise InvalidJob("cursor", "must be one that a listing gave")
    return int(match[1]), match[2]


_order = itertools.count()


def _new_id(now: int) -> str:
    """Make a UUID of version 7 from Redis time in milliseconds; a counter keeps those of one millisecond in their order."""
    noise = int.from_bytes(os.urandom(8), "big")
    number = now << 80 | 7 << 76 | (next(_order) & 0xFFF) << 64 | 2 << 62 | noise & 0x3FFFFFFFFFFFFFFF
    digits = f"{number:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


# JSON, strictly -------------------------------------------------------------------------------------------------------


def to_json(value: Any) -> bytes:
    """Encode what a client or a handler gave; raises ValueError for what JSON cannot hold or what is nested too deep.

    Dates, sets, bytes, dataclasses become what JSON has for them, as msgspec does it.
    """
    try:
        encoded = _encode(value)
        decoded = msgspec.json.decode(encoded)  # what is encoded already, msgspec.Raw, it has taken unseen
        if (
            b"null" in encoded
        ):  # which is what msgspec makes of NaN, silently; then a walk through the value is worth it
            json.dumps(msgspec.to_builtins(value, str_keys=True), allow_nan=False)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.DecodeError) as error:
        raise ValueError(f"is not JSON: {_text(error) or type(error).__name__}"[:300]) from None
    if encoded.count(b"[") + encoded.count(b"{") > MAX_DEPTH and _depth(decoded) > MAX_DEPTH:
        raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")
    return encoded


def from_json(text: bytes, levels: int = MAX_DEPTH) -> Any:
    """Decode what a client sent, strictly; raises ValueError that says why it is not JSON.

    Refused are other encodings than UTF-8, NaN and what else would become no number, a name given twice in one object (parsers
    differ in which they take), and more levels of nesting than that.
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
        raise ValueError(f"the name {ascii(twice)[:100]} stands twice in one object")
    return made


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:100]} is no number that JSON can hold")
    return number


def _whole_floats(value: Any) -> Any:
    """Write 1.0 as 1 throughout: to JSON Schema both are integers, to msgspec one of them is not."""
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


# Handlers -------------------------------------------------------------------------------------------------------------

P = TypeVar("P")
R = TypeVar("R")
T = TypeVar("T")
A = ParamSpec("A")

HANDLERS: dict[str, Handler[Any, Any, Any]] = {}


class Handler(Generic[P, A, R]):
    """A function that runs jobs of one type. It stays callable as it is."""

    def __init__(self, function: Callable[Concatenate[P, A], R], type: str, options: Mapping[str, Any]) -> None:
        self.function, self.type, self.__doc__ = function, type, function.__doc__
        self.max_attempts: int = _whole("maxAttempts", options["max_attempts"], 1, MAX_ATTEMPTS)
        self.timeout: float | None = options["timeout"]
        self.backoff: float = options["backoff"]
        self.backoff_cap: float = options["backoff_cap"]
        self.queue: str = check_name("queue", options["queue"])
        self.payload_type, self.wants_job = _signature(function)
        self._parse = msgspec.json.Decoder(self.payload_type).decode

    def __call__(self, payload: P, *args: A.args, **kwargs: A.kwargs) -> R:
        return self.function(payload, *args, **kwargs)

    def enqueue(self, queue: Queue, payload: P, /, **options: Any) -> Job:
        """Enqueue a job of this type, the payload checked by mypy as well. Options as for Queue.enqueue."""
        return queue.enqueue(self.type, payload, **options)

    def parse(self, payload: bytes) -> P:
        """Turn a payload's JSON into what the handler takes; raises InvalidJob with the path of what does not fit."""
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

    Its first parameter is annotated with the payload's type (a dataclass, TypedDict, msgspec Struct or what else msgspec can
    read from JSON), which is checked when a job is submitted and again before it runs. A second parameter, annotated `Job`,
    receives the job. What it returns, as JSON, is the job's result.

    `timeout` is in seconds (None: as long as it likes); attempt n is followed by a pause of `backoff` * 2 ** (n - 1) seconds and
    up to half as much again, at most `backoff_cap`. Mistakes raise TypeError or InvalidJob when the module is imported.
    """
    check_name("type", type)
    if not all(_is_number(value) for value in (300 if timeout is None else timeout, backoff, backoff_cap)):
        raise TypeError(f"handler {type!r}: timeout, backoff and backoff_cap must be numbers of seconds")
    if timeout is not None and not timeout > 0:
        raise TypeError(f"handler {type!r}: timeout must be above 0, or None")
    if not 0 < backoff <= backoff_cap <= MAX_DELAY:
        raise TypeError(f"handler {type!r}: backoff must be above 0 and at most backoff_cap, that at most {MAX_DELAY}")
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
    """Tell a handler's payload type, and whether it wants the job as well."""
    name = f"handler {function.__name__}"
    if (
        inspect.iscoroutinefunction(function)
        or inspect.isgeneratorfunction(function)
        or inspect.isasyncgenfunction(function)
    ):
        raise TypeError(f"{name} must be a plain function: one that is async or a generator would only be begun")
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = list(inspect.signature(function).parameters.values())
    if not 1 <= len(parameters) <= 2 or parameters[0].name not in hints:
        raise TypeError(f"{name} must take an annotated payload and, if it likes, a Job")
    if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
        raise TypeError(f"{name} must take its parameters by position")
    if len(parameters) == 2 and hints.get(parameters[1].name) is not Job:
        raise TypeError(f"the second parameter of {name} must be annotated Job")
    return hints[parameters[0].name], len(parameters) == 2


def load_handlers(modules: str) -> dict[str, Handler[Any, Any, Any]]:
    """Import the modules that register handlers; the working directory comes first, so that the user's own files win."""
    if sys.path[:1] != [os.getcwd()]:
        sys.path.insert(0, os.getcwd())
    for module in filter(None, (name.strip() for name in modules.split(","))):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module.partition(".")[0] and error.name != module:
                raise SettingsError(f"cannot import {module}: {error}") from error
            raise SettingsError(
                f"TINYQUEUE_HANDLERS: there is no module {module} here, where your handlers would be"
            ) from None
        except (Exception, SystemExit) as error:
            text = " ".join(_text(error).split())
            raise SettingsError(f"cannot import {module}: {type(error).__name__}: {text}") from error
    if not HANDLERS:
        raise SettingsError(f"{modules} registers no handler: decorate a function with @handler('type')")
    return HANDLERS


def backoff(attempts: int, base: float = 1.0, cap: float = 300.0) -> float:
    """Seconds to wait after that many attempts: doubling from `base` with jitter on top, at most `cap`, never below `base`."""
    return float(min(cap, base * 2 ** min(attempts - 1, 60) * random.uniform(1.0, 1.5)))


# Checking what comes in -----------------------------------------------------------------------------------------------


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
    """Whether that is a number of seconds that a job may be put off by."""
    return _is_number(value) and 0 <= value <= MAX_DELAY


def _whole(field: str, value: Any, low: int, high: int) -> int:
    if not _is_number(value) or not low <= value <= high or value % 1:
        raise InvalidJob(field, f"must be a whole number from {low} to {high}")
    return int(value)


def _first_run(delay: float | None, run_at: Any, now: int) -> int:
    """When a job may start that is to wait for `delay` seconds or until `runAt`: 0 for at once."""
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


# Talking to Redis -----------------------------------------------------------------------------------------------------

Command = tuple[Any, ...]
Push = Literal["LPUSH", "RPUSH"]  # behind all others of a queue, before all others
SOCKET_TIMEOUT = 4.0  # seconds for a reply; above BLOCK with room for a slow answer
CONNECT_TIMEOUT = 2.0
NODES_AGE = 60.0  # seconds that what is known of a cluster's nodes is good for
ASIDE_TIMEOUT = (
    0.5  # for those who only say where the jobs are: one that is dead must not hold up the question to the next
)
BLOCK = 2.0  # seconds of one wait for the bell
CATCH_UP = 1000  # milliseconds that replicas have to take what was written
PAUSE_AGE = 0.1  # seconds that what is known of paused queues is good for
WARM = 1.0  # seconds after its last use that a connection is lent again without a look at it

REASONS: tuple[tuple[type[Exception], str], ...] = (
    (redis.exceptions.BusyLoadingError, "loading"),
    (redis.exceptions.ReadOnlyError, "read-only"),
    (redis.exceptions.OutOfMemoryError, "full"),
    (redis.exceptions.AuthenticationError, "refused"),
    (redis.exceptions.AuthorizationError, "refused"),
    (redis.exceptions.NoPermissionError, "refused"),
    (redis.exceptions.MaxConnectionsError, "busy"),
    (redis.exceptions.ClusterDownError, "unreachable"),
    (redis.exceptions.TryAgainError, "busy"),
    (redis.exceptions.AskError, "busy"),
    (redis.exceptions.TimeoutError, "timeout"),
    (redis.exceptions.ConnectionError, "unreachable"),
    (OSError, "unreachable"),
)
REFUSALS = {"MISCONF": "read-only", "NOREPLICAS": "read-only", "TRYAGAIN": "busy", "BUSY": "busy", "UNBLOCKED": "busy"}


def _explained(error: Exception) -> TinyQueueError:
    """Turn what the Redis client raised into an error of ours."""
    text = " ".join(str(error).split())
    if "CERTIFICATE_VERIFY_FAILED" in text:
        text += "; name its authority with ?ssl_ca_certs=/path in REDIS_URL, or set TINYQUEUE_TLS_VERIFY=0"
    if isinstance(error, redis.exceptions.AskError | redis.exceptions.TryAgainError):
        text = f"the queue is being moved to another node of the cluster ({text})"
    for kind, reason in REASONS:
        if isinstance(error, kind):
            return Unavailable(reason, text)
    if reason := REFUSALS.get(text.split(" ")[0], ""):
        return Unavailable(reason, text)
    return Corrupted(f"Redis answered: {text}")


class Pool(redis.ConnectionPool):
    """Connections to one server; in a cluster, to the node that owns `slot`, wherever that goes.

    All keys of a queue are in one slot, so this is all that a cluster takes. The client's own RedisCluster would send a transaction
    again, without its WATCH, after a lost connection.
    """

    slot, home = 0, ("", 0)  # home: the place that the URL names, maybe a name for whichever nodes there are
    nodes: frozenset[tuple[str, int]] = frozenset()  # of the cluster, as far as they are known
    _ask_at = 0.0  # when to ask for them

    @property
    def place(self) -> tuple[str, int]:
        return self.connection_kwargs.get("host", "localhost"), self.connection_kwargs.get("port", 6379)

    def get_connection(self, *_: Any, **__: Any) -> Any:
        connection = super().get_connection()
        try:
            if time.monotonic() >= self._ask_at:
                self._owner(connection)
                self._ask_at = time.monotonic() + NODES_AGE if self.nodes else math.inf
        except BaseException:
            connection.disconnect()  # type: ignore[no-untyped-call]
            self.release(connection)
            raise
        return connection

    def owns_connection(self, connection: Any) -> bool:
        return bool(super().owns_connection(connection)) and (connection.host, connection.port) == self.place

    def turn_to(self, host: str, port: int) -> None:
        """Connect to that node from now on. Connections to another that are in use are closed when they come back."""
        if (host, port) != self.place:
            log.info("the cluster keeps the queue on %s:%d now", host, port)
            self.disconnect(inuse_connections=False)
            self.connection_kwargs = {**self.connection_kwargs, "host": host, "port": port}
            self._ask_at = 0.0
            self.reset()

    def heed(self, error: Exception, reason: str) -> None:
        """Turn to the node that an error names, or if it tells that this one is of no use, to the one that the others name."""
        if isinstance(error, redis.exceptions.MovedError):
            self.turn_to(error.host or self.place[0], error.port)
        elif self.nodes and reason in ("unreachable", "timeout", "loading"):
            others = sorted((self.nodes | {self.home}) - {self.place})
            told = (self._owner_as_told_by(*place) for place in random.sample(others, len(others)))
            if owner := next(filter(None, told), None):
                self.turn_to(*owner)

    def _owner_as_told_by(self, host: str, port: int) -> tuple[str, int] | None:
        brief = {"host": host, "port": port, "socket_timeout": ASIDE_TIMEOUT, "socket_connect_timeout": ASIDE_TIMEOUT}
        connection = self.connection_class(**{**self.connection_kwargs, **brief})
        try:
            connection.connect()
            return self._owner(connection)
        except (redis.RedisError, OSError):
            return None
        finally:
            connection.disconnect()

    def _owner(self, connection: Any) -> tuple[str, int] | None:
        """Ask who owns the slot, and take note of all nodes; None if that is nobody, or this is no cluster."""
        try:
            ranges = _ask(connection, [("CLUSTER", "SLOTS")])[0]
        except redis.ResponseError:
            return None
        owner, nodes = None, set()
        for first, last, *served_by in ranges:
            places = [(host.decode() if host else connection.host, port) for host, port, *_ in served_by]
            nodes |= set(places)
            owner = places[0] if first <= self.slot <= last else owner
        self.nodes = frozenset(nodes)
        return owner


def connect(url: str, *, tag: str = "queue", connections: int = 100, tls_verify: bool = True) -> redis.ConnectionPool:
    """Make the pool of connections, none opened yet. Every option that differs between versions of the client is set here.

    In a cluster it leads to the node that has the keys with that hash tag, whichever node the URL names.
    No retries: the client would send a whole transaction again after a lost reply, and every push in it twice.
    Behind sentinels, each new connection asks them for the master. A wrong URL raises SettingsError without showing the URL, which
    may hold a password.
    """
    options: dict[str, Any] = {
        "max_connections": connections,
        "protocol": 2,
        "retry": NoRetries(NoBackoff(), 0),
        "socket_timeout": SOCKET_TIMEOUT,
        "socket_connect_timeout": CONNECT_TIMEOUT,
        "socket_keepalive": True,
        "health_check_interval": 0,
    }
    if url.startswith("unix:"):
        del options["socket_keepalive"]
    if url.startswith("rediss") and not tls_verify:
        log.warning("TINYQUEUE_TLS_VERIFY=0: the certificate of the Redis server is not checked")
        options |= {"ssl_cert_reqs": "none", "ssl_check_hostname": False}
    try:
        watched = _Watched.read(url) if urlsplit(url).scheme in ("redis+sentinel", "rediss+sentinel") else None
        url = watched.url if watched else url
        database = urlsplit(url).path.lstrip("/")
        if url.startswith("redis") and database and not database.isdecimal():
            raise SettingsError("REDIS_URL: what follows the host must be the number of a database, as /0")
        pool = (redis.ConnectionPool if url.startswith("unix:") else Pool).from_url(url, **options)
        if isinstance(pool, Pool):
            pool.slot, pool.home = key_slot(tag.encode()), pool.place
        pool.connection_class(**pool.connection_kwargs)  # opens nothing; an option it does not know shows here
        changed = [name for name, value in options.items() if pool.connection_kwargs.get(name, value) != value]
        if changed or pool.connection_kwargs.get("decode_responses"):
            raise SettingsError(
                f"REDIS_URL: {(*changed, 'decode_responses')[0]} is not to be set there: the queue relies on its own"
            )
    except (ValueError, TypeError, redis.RedisError) as error:
        forms = "redis://, rediss://, unix:// or redis+sentinel://host:port,host:port/service"
        hint = "an option after ? is unknown" if isinstance(error, TypeError) else f"use {forms}"
        raise SettingsError(
            f"REDIS_URL cannot be used: {hint}; percent-encode special characters of the password"
        ) from None
    return watched.pool(pool, options) if watched else pool


class _Watched(NamedTuple):
    """What a redis+sentinel:// URL says, a form that the client does not know: `url` is the rest of it, as for one server."""

    url: str
    sentinels: list[tuple[str, int]]
    service: str
    credentials: dict[str, str]  # for the sentinels themselves

    @classmethod
    def read(cls, url: str) -> _Watched:
        """Read redis+sentinel://[user:password@]host:port,host:port/service[/database][?options]; raises ValueError."""
        parts = urlsplit(url)
        user, at, hosts = parts.netloc.rpartition("@")
        service, _, database = parts.path.strip("/").partition("/")
        query = dict(parse_qsl(parts.query))
        own = {name: query.pop("sentinel_" + name) for name in ("username", "password") if "sentinel_" + name in query}
        found = [urlsplit("//" + host) for host in hosts.split(",")]
        sentinels = [(host.hostname, host.port or 26379) for host in found if host.hostname]
        if not service or len(sentinels) < len(found) or parts.fragment:
            raise ValueError("no sentinels, or no service")
        url = f"{parts.scheme.removesuffix('+sentinel')}://{user}{at}master/{database}?{urlencode(query)}"
        return cls(url, sentinels, unquote(service), own)

    def pool(self, of: redis.ConnectionPool, options: Mapping[str, Any]) -> redis.ConnectionPool:
        """Make a pool as that one, but of connections to whoever the sentinels say is the master."""
        tls = {name: value for name, value in of.connection_kwargs.items() if name.startswith("ssl_")}
        aside = {"socket_timeout": ASIDE_TIMEOUT, "socket_connect_timeout": ASIDE_TIMEOUT, "max_connections": None}
        ssl = issubclass(of.connection_class, redis.SSLConnection)
        access = {**options, **tls, **aside, **self.credentials, "ssl": ssl}
        sentinel = Sentinel(self.sentinels, sentinel_kwargs=access)  # type: ignore[no-untyped-call]
        more = {"ssl": ssl, "max_connections": of.max_connections, **of.connection_kwargs}
        return SentinelConnectionPool(self.service, sentinel, **more)  # type: ignore[no-untyped-call]


class Clock:
    """Redis time in milliseconds, known without asking: the monotonic clock carries the last reading on.

    `ahead` is added to every reading. Tests move it; nobody else does.
    """

    def __init__(self) -> None:
        self.ahead = 0
        self._offset = 0.0
        self._good_until = 0.0

    @property
    def stale(self) -> bool:
        return time.monotonic() >= self._good_until

    def read(self, reply: Sequence[bytes]) -> None:
        """Take a reply to TIME."""
        self._offset = int(reply[0]) * 1000 + int(reply[1]) / 1000 - time.monotonic() * 1000
        self._good_until = time.monotonic() + CLOCK_AGE

    def now(self) -> int:
        return int(time.monotonic() * 1000 + self._offset) + self.ahead


class Transaction:
    """One try of a transition: WATCH and its reads in one round trip, then MULTI, the writes and EXEC in another.

    What many jobs do to one key becomes one command: `gather`, `ring` and `count` collect it.
    """

    def __init__(self, connection: Any, keys: Keys, clock: Clock, watch: Sequence[str], again: bool) -> None:
        self._connection, self._keys, self._clock = connection, keys, clock
        self._watch, self._watches = watch, bool(watch)
        self.now = clock.now()
        self.replicas = 0  # that must have the writes
        self.again = again  # an earlier try sent its EXEC and lost the reply: look whether it was applied
        self._writes: list[Command] = []
        self._gathered: dict[tuple[str, str], list[Any]] = {}
        self._bells: Counter[str] = Counter()
        self._minute: Counter[str] = Counter()
        self.awaited: set[bytes] | None = None  # for whose end somebody waits, once that was asked
        self._counts: Counter[str] = Counter()
        self.measured: defaultdict[tuple[str, str, str], list[int]] = defaultdict(list)

    def read(self, *commands: Command) -> list[Any]:
        """Ask Redis. The first call takes WATCH along, and TIME when the clock wants it."""
        ahead: list[Command] = [("WATCH", *self._watch)] if self._watch else []
        self._watch = ()
        if not self._clock.stale:
            return _ask(self._connection, [*ahead, *commands])[len(ahead) :]
        replies = _ask(
            self._connection, [*ahead, *commands, ("TIME",)]
        )  # last, for one of the commands may be a long wait
        self._clock.read(replies[-1])
        self.now = self._clock.now()
        return replies[len(ahead) : -1]

    def unwatch(self) -> None:
        if self._watches:
            _ask(self._connection, [("UNWATCH",)])

    def execute(self, writes: Sequence[Command]) -> tuple[list[Any] | None, int]:
        """Apply writes. Returns their replies, None if something watched has changed, and how many replicas have them.

        A WAIT that is refused proves nothing of any replica, but the writes are there: it counts as none.
        """
        wait = [("WAIT", self.replicas, CATCH_UP)] if self.replicas else []
        _send(self._connection, [("MULTI",), *writes, ("EXEC",), *wait])
        *_, done = [self._connection.read_response() for _ in range(len(writes) + 2)]
        reached = _reply(self._connection) if wait else 0
        return done, reached if isinstance(reached, int) else 0

    def write(self, *command: Any) -> None:
        self._writes.append(command)

    def gather(self, command: str, key: str, *parts: Any) -> None:
        """Append to the one command of that name for that key: LPUSH, RPUSH, ZADD, ZREM."""
        self._gathered.setdefault((command, key), []).extend(parts)

    def push(self, command: Push, job: Job) -> None:
        """Put a job into the list of its queue, and ring for it."""
        self.gather(command, self._keys.jobs(job.queue), job.id)
        self.ring(job.queue)

    def ring(self, queue: str) -> None:
        self._bells[queue] += 1

    def count(self, field: str, by: int = 1) -> None:
        self._counts[field] += by

    def started(self, job: Job, waited: int) -> None:
        """Count a start: in this minute and for the metrics, with the milliseconds that the job had waited."""
        self._minute["started"] += 1
        self._minute["waitedMs"] += waited
        self.measure("waited", job, waited)

    def ended(self, job: Job) -> None:
        """Count an end: since the beginning, in this minute and for the metrics."""
        self._counts[job.status] += 1
        self._minute[job.status] += 1
        self.measure(job.status, job)

    def measure(self, what: str, job: Job, ms: int = -1) -> None:
        """Count for the metrics what has happened to a job, and how long it took, if that is to be told."""
        self.measured[what, job.type, job.queue].append(ms)

    def sealed(self) -> list[Command]:
        """All that is to be written."""
        commands = self._writes + [(*name, *parts) for name, parts in self._gathered.items()]
        for queue, times in self._bells.items():
            bell = self._keys.bell(queue)
            commands += [("LPUSH", bell, *["1"] * min(times, BELLS)), ("LTRIM", bell, 0, BELLS - 1)]
        commands += [("HINCRBY", self._keys.counts, field, by) for field, by in self._counts.items() if by]
        if self._minute:
            minute = self._keys.minute(self.now)
            commands += [
                *(("HINCRBY", minute, field, by) for field, by in self._minute.items() if by),
                ("EXPIRE", minute, 7200),
            ]
        return commands


def _send(connection: Any, commands: Sequence[Command]) -> None:
    connection.send_packed_command([b"".join(map(pack_command, commands))])


def _ask(connection: Any, commands: Sequence[Command]) -> list[Any]:
    _send(connection, commands)
    return [connection.read_response() for _ in commands]


def _tried(connection: Any, commands: Sequence[Command]) -> list[Any]:
    """Ask Redis, and take a refusal for the reply: an ACL may forbid a command, or the server not know it."""
    _send(connection, commands)
    return [_reply(connection) for _ in commands]


def _reply(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error


def _unfailed(replies: list[Any]) -> list[Any]:
    """Pass the replies of an EXEC on, unless one of its commands failed: the others were applied all the same."""
    if errors := [reply for reply in replies if isinstance(reply, Exception)]:
        explained = _explained(errors[0])
        if isinstance(explained, Corrupted):
            explained.applied = True
        raise explained
    return replies


def _ascii(value: bytes) -> str:
    """Read an id or a name. Whatever else stands in its place becomes a text that is neither."""
    return value.decode("ascii", "replace")


def _fields(reply: Sequence[bytes]) -> list[tuple[str, bytes]]:
    """Pair the reply to HGETALL, or to a range WITHSCORES."""
    return list(zip(map(_ascii, reply[::2]), reply[1::2], strict=True))


def _count(value: bytes | None) -> int:
    """Read a count, which is 0 as long as nothing was counted."""
    try:
        return int(value or 0)
    except ValueError:
        raise Corrupted(f"{value!r} stands where a count should be") from None


def _info(reply: Any) -> dict[str, str]:
    """Read a reply to INFO. One that was refused tells nothing: the embedded server knows no INFO, and an ACL may forbid it."""
    return (
        dict(line.split(":", 1) for line in reply.decode().split("\r\n") if ":" in line)
        if isinstance(reply, bytes)
        else {}
    )


def _used(told: Mapping[str, str]) -> float:
    """The share of its maxmemory that Redis uses, 0 without a limit."""
    limit = int(told.get("maxmemory", 0))
    return int(told.get("used_memory", 0)) / limit if limit else 0.0


# The queue ------------------------------------------------------------------------------------------------------------


class Once(msgspec.Struct):
    """A submit that is made once: the client's key, the fingerprint of what it sends under it, and whether it was made before."""

    key: str
    fingerprint: str
    replayed: bool = False


class Made(msgspec.Struct):
    """What a submit made, as the once: key holds it."""

    fingerprint: str
    ids: list[str]


class Outcome(NamedTuple):
    """What became of a started job. `after`: seconds until the next attempt of a failed one, None for none."""

    job: Job
    verb: Literal["complete", "fail", "release"]
    result: Any = None
    error: Failure | None = None
    after: float | None = None


class Queue:
    """The queue: every verb of it. Safe to share between threads and, unused before the fork, between processes."""

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
        self.pool, self.keys, self.clock = pool, Keys(check_name("namespace", namespace)), Clock()
        self.lease_ms, self.lease = int(lease * 1000), lease
        self.keep_ms = {
            "completed": int(keep_completed * 1000),
            "failed": int(keep_failed * 1000),
            "cancelled": int(keep_failed * 1000),
        }
        self.keep_once_ms, self.max_pending, self.min_replicas = int(keep_once * 1000), max_pending, min_replicas
        self._paused: tuple[float, frozenset[str]] = (-1e9, frozenset())  # when they were read, and which
        self._memory: tuple[float, dict[str, str]] = (-1e9, {})  # when it was looked at, and what INFO told
        self._writers = threading.BoundedSemaphore(WRITERS)
        self._series: frozenset[str] = frozenset()  # types and queues that the metrics count by name
        self._series_known = False  # whether no others were met since those were read
        self._warm: list[tuple[Any, int, float]] = []  # connections just used: by which process, and when
        self.last_contact = time.monotonic()  # when Redis last did what it was asked
        self.last_trouble = time.monotonic()  # when it last did not; before it was first asked, nobody knows

    @classmethod
    def from_url(
        cls, url: str, *, namespace: str = "queue", connections: int = 100, tls_verify: bool = True, **options: Any
    ) -> Queue:
        """Make a queue on the Redis at a redis://, rediss://, unix:// or redis+sentinel:// URL. Connects on first use."""
        pool = connect(url, tag=namespace, connections=connections, tls_verify=tls_verify)
        return cls(pool, namespace=namespace, **options)

    @classmethod
    def embedded(cls, **options: Any) -> Queue:
        """Make a queue on a Redis inside this process, for a first run and for tests: gone when the process ends."""
        import fakeredis  # takes a while to import, and nobody else needs it

        return cls(fakeredis.FakeRedis(server=fakeredis.FakeServer(), protocol=2).connection_pool, **options)

    @classmethod
    def from_settings(cls, settings: Settings, connections: int = 100) -> Queue:
        """Make the queue that the settings name, of one shard or many; without REDIS_URL the embedded one."""
        names = "lease", "keep_completed", "keep_failed", "keep_once", "max_pending", "min_replicas"
        options: dict[str, Any] = {name: getattr(settings, name) for name in names}
        if settings.min_replicas and not settings.redis_url:
            raise SettingsError("TINYQUEUE_MIN_REPLICAS is set, but without REDIS_URL there are no replicas")
        make = cls.embedded
        if settings.redis_url:
            make = partial(cls.from_url, settings.redis_url, connections=connections, tls_verify=settings.tls_verify)
        if settings.shards == 1:
            return make(namespace=settings.namespace, **options)
        return Shards([make(namespace=f"{settings.namespace}.{at}", **options) for at in range(settings.shards)])

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        """Lend a connection. After any error but our own it is closed: no reply must be left on it for the next one.

        So it is when replicas are missing: they may have left for a new master, which only a new connection looks for.
        """
        connection = None
        try:
            connection = self._checked_out()
            yield connection
        except BaseException as error:
            if connection and (isinstance(error, NotReplicated) or not isinstance(error, TinyQueueError)):
                connection.disconnect()
            self._cool_down(connection)
            if isinstance(error, redis.RedisError | OSError):
                explained = _explained(error)
                if isinstance(explained, Unavailable):
                    self.last_trouble = time.monotonic()
                    if isinstance(self.pool, Pool):
                        self.pool.heed(error, explained.reason)
                raise explained from error
            raise
        self.last_contact = time.monotonic()
        self._warm.append((connection, os.getpid(), self.last_contact))

    def disconnect(self) -> None:
        """Close all connections, before a fork: each process opens its own."""
        self.pool.disconnect()

    def _checked_out(self) -> Any:
        """Take a connection: one used within the last second as it is, else one that the pool has looked at, which costs."""
        with suppress(IndexError):
            while True:
                connection, process, used = self._warm.pop()
                if process == os.getpid() and time.monotonic() - used < WARM:
                    return connection
                self.pool.release(connection)
        return self.pool.get_connection()

    def _cool_down(self, connection: Any) -> None:
        """Give all connections back to the pool after trouble, for what befell one may have befallen others."""
        if connection:
            self.pool.release(connection)
        with suppress(IndexError):
            while True:
                self.pool.release(self._warm.pop()[0])

    def _read(self, *commands: Command) -> list[Any]:
        return self._transact((), lambda tx: tx.read(*commands), counts=False)

    def _transact(
        self, watch: Sequence[str], body: Callable[[Transaction], R], again: bool = False, counts: bool = True
    ) -> R:
        """Run `body` until its writes are applied with nothing watched having changed, and return what it returned.

        A body that writes nothing ends it. When the reply to EXEC is lost, the body is called again with `again` set, must look
        whether its writes are there, and leaves them out if so: nothing is ever repeated blindly. If they are not there after a
        time-out, they may still arrive: then only a watch makes it safe to send them again, and without one this gives up.
        """
        if counts and not self._series_known:
            self._learn_series()
        late = False
        for _ in range(TRIES):
            sent = False
            try:
                with self._connection() as connection:
                    tx = Transaction(connection, self.keys, self.clock, watch, again)
                    try:
                        result, writes = body(tx), tx.sealed() + self._metrics(tx)
                    except TinyQueueError:
                        tx.unwatch()
                        raise
                    if not writes and not tx.replicas:
                        tx.unwatch()
                        return result
                    if late and writes and not watch:
                        raise Unavailable("timeout", "no reply, and nothing was written so far", doubtful=True)
                    sent = True
                    mark = ("SET", self.keys.mark, "", "PX", 1000)  # WAIT is for what its own connection has written
                    done, reached = tx.execute(writes or [mark])
                    if done is not None and reached < tx.replicas:
                        raise NotReplicated(cast(list[Job], result), reached, tx.replicas)
            except Unavailable as trouble:
                if isinstance(trouble.__cause__, redis.exceptions.MovedError) and isinstance(self.pool, Pool):
                    continue  # nothing was applied, and the pool leads to the owner of the slot now
                answered = isinstance(trouble.__cause__, redis.ResponseError)
                if not sent or answered or trouble.reason not in ("timeout", "unreachable"):
                    trouble.doubtful = again
                    raise
                again, late = True, late or trouble.reason == "timeout"
                continue
            if done is not None:
                _unfailed(done)
                return result
        raise Unavailable("busy", "others kept changing the same keys", doubtful=again)

    def _learn_series(self) -> None:
        self._series_known = True  # before it is: the read itself comes by here
        try:
            found = self._read(("SMEMBERS", self.keys.series))[0]
        except Unavailable as trouble:
            self._series_known = False
            if trouble.reason == "timeout":  # once is enough; the rest the transaction will meet itself, if it lasts
                raise
        else:
            self._series |= set(map(_ascii, found))

    def _metrics(self, tx: Transaction) -> list[Command]:
        """What a transaction adds to the metrics: one number for all its jobs of one type and queue to which the same happened.

        Beyond SERIES types and queues, those not met before count as other, so that whoever makes up names fills neither Redis nor
        Prometheus. Processes that meet new ones at the same moment may go a little beyond.
        """
        new = sorted({f"{type}:{queue}" for _, type, queue in tx.measured} - self._series)[
            : max(0, SERIES - len(self._series))
        ]
        if new:
            self._series, self._series_known = self._series | set(new), False
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

    def now(self) -> int:
        """Redis TIME in milliseconds."""
        if self.clock.stale:
            self._read()
        return self.clock.now()

    # Enqueue ----------------------------------------------------------------------------------------------------------

    def draft(
        self,
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
        """Check what a job is made of and make it, stored nowhere yet. Raises InvalidJob naming the field and the rule.

        What is left out comes from the handler's declaration, if this process knows one. A job that has not been started
        `expires_in` seconds from now fails when its turn comes. While a job with its `unique_key` is pending or processing, a
        second one is not stored: submit returns the first. Asks Redis for the time at most.
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
        now = self.now()
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

    def enqueue(self, type: str, payload: Any, **options: Any) -> Job:
        """Accept one job; options as for `draft`. When it returns, the job is stored; when it raises InvalidJob, nothing is."""
        return self.submit([self.draft(type, payload, **options)])[0]

    def enqueue_many(self, type: str, payloads: Iterable[Any], **options: Any) -> list[Job]:
        """Accept up to 1,000 jobs of one type, all or none."""
        return self.submit([self.draft(type, payload, **options) for payload in payloads])

    def submit(self, jobs: Sequence[Job], once: Once | None = None) -> list[Job]:
        """Store drafted jobs, all or none, and return them; for one whose uniqueKey is taken, the unended job that has it.

        nothing -> pending. `once` makes a second submit with the same key return the jobs of the first. Watches the keys that are
        given; without any, nothing, for the ids are new. After a lost reply, the ids or the key tell whether all is there. Raises
        KeyReused and QueueFull, and Unavailable if Redis' memory is nearly used up; and NotReplicated if the jobs, or those of the
        first submit, are stored but not on `min_replicas` replicas within a second.
        """
        if len(jobs) > MAX_JOBS:
            raise InvalidJob("jobs", f"must be at most {MAX_JOBS} at a time")
        if self.memory_is_short():
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
            accepted = self._without_doubles(tx, jobs) if unique else list(jobs)
            new = list({job.id: job for job in accepted if job.id in ids}.values())
            if self.max_pending and new:
                self._check_room(tx, new)
            if new:  # an EXEC that was given up for lost and arrives late must not reset a job that ran: NX
                tx.write("MSETNX", *(part for job in new for part in (self.keys.job(job.id), _record(job))))
            for job in new:
                self._line_up(tx, job)
                tx.measure("enqueued", job)
            if once:
                made = _encode(Made(once.fingerprint, [job.id for job in accepted]))
                tx.write("SET", self.keys.once(once.key), made, "PX", self.keep_once_ms)
            return accepted

        return self._transact([*([self.keys.once(once.key)] if once else []), *unique], body)

    def _made_once(self, tx: Transaction, jobs: Sequence[Job], once: Once, stored: bytes) -> list[Job]:
        """The jobs that the first submit with this key made, as they stand; those that are forgotten by now, as they were."""
        try:
            made = msgspec.json.decode(stored, type=Made)
        except msgspec.DecodeError as error:
            raise Corrupted(f"what was made under an Idempotency-Key cannot be read: {error}") from None
        if made.fingerprint != once.fingerprint or len(made.ids) != len(jobs):
            raise KeyReused("this Idempotency-Key was used for another request")
        drafts = {job.id: job for job in jobs}
        once.replayed = not drafts.keys() & made.ids  # else it was this one, whose reply was lost
        records = tx.read(("MGET", *map(self.keys.job, made.ids)))[0] if jobs else []
        found = (
            _job(id, record) if record else msgspec.structs.replace(job, id=id)
            for id, record, job in zip(made.ids, records, jobs, strict=True)
        )
        return [drafts.get(job.id, job) for job in found]

    def _without_doubles(self, tx: Transaction, jobs: Sequence[Job]) -> list[Job]:
        """Put in the place of each job whose uniqueKey is taken the one that has it, and take the keys for the others."""
        keys = list(dict.fromkeys(job.unique_key for job in jobs if job.unique_key))
        holders = tx.read(("MGET", *map(self.keys.unique, keys)))[0]
        named = {
            key: id for key, holder in zip(keys, holders, strict=True) if ID.fullmatch(id := _ascii(holder or b""))
        }
        records = tx.read(("MGET", *map(self.keys.job, named.values())))[0] if named else []
        active: dict[str, Job] = {}
        for (key, id), record in zip(named.items(), records, strict=True):
            job = _job(id, record) if record else None
            if job and job.status in UNENDED and job.unique_key == key:
                active[key] = job
        accepted = []
        for job in jobs:
            accepted.append(active.setdefault(job.unique_key, job) if job.unique_key else job)
        for (
            key,
            job,
        ) in active.items():  # also those that stay as they are: a watched key must change, or a late EXEC would pass
            tx.write("SET", self.keys.unique(key), job.id)
        return accepted

    def _check_room(self, tx: Transaction, jobs: Sequence[Job]) -> None:
        """Refuse jobs for a queue that is full. Not watched: submits at the same moment may go a little beyond."""
        wanted = Counter(job.queue for job in jobs)
        counts = tx.read(("HMGET", self.keys.counts, *("pending:" + name for name in wanted)))[0]
        for (name, more), count in zip(wanted.items(), map(_count, counts), strict=True):
            if count + more > self.max_pending:
                raise QueueFull(f"queue {name} has {count} pending jobs; the limit is {self.max_pending}")

    def memory_is_short(self) -> bool:
        """Whether Redis is so full that accepting jobs would endanger those that it has."""
        return _used(self._look_at_memory()) > MEMORY_SHARE

    def _look_at_memory(self) -> dict[str, str]:
        """What INFO tells of the memory, nothing if it does not. Asks every two seconds at most."""
        looked_at, told = self._memory
        if time.monotonic() - looked_at > 2.0:
            told = {}
            try:
                with self._connection() as connection:
                    told = _info(_tried(connection, [("INFO", "memory")])[0])
            except Unavailable as trouble:
                if trouble.reason == "timeout":  # the submit itself would wait as long again
                    raise
            self._memory = (time.monotonic(), told)
        return told

    def _line_up(self, tx: Transaction, job: Job, push: Push = "LPUSH") -> None:
        """Put a pending job where it waits: in the list of its queue, or among the delayed."""
        if job.run_at > tx.now:
            tx.gather("ZADD", self.keys.delayed, job.run_at, job.id)
        else:
            tx.push(push, job)
        tx.count("pending:" + job.queue)

    # Dequeue ----------------------------------------------------------------------------------------------------------

    def register(self, queues: Sequence[str], concurrency: int, worker: str = "") -> str:
        """Enter a new worker and return its id. It must send a heartbeat within its lease from then on."""
        host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:60] or "host"
        worker = worker or f"{host}-{os.getpid()}-{os.urandom(4).hex()}"
        about = {
            "host": host,
            "pid": os.getpid(),
            "queues": list(queues),
            "concurrency": concurrency,
            "startedAt": self.now(),
        }

        def body(tx: Transaction) -> str:
            tx.write("SADD", self.keys.workers, worker)
            tx.write("SET", self.keys.worker(worker), _encode(about))
            tx.write("SET", self.keys.lease(worker), "{}", "PX", self.lease_ms)
            return worker

        return self._transact((), body)

    def wait(self, names: Sequence[str], seconds: float = BLOCK) -> bool:
        """Wait until a job may have come to one of the queues: True, or the time is up. Takes nothing but a wake-up token."""
        bells = ("BLPOP", *map(self.keys.bell, names), seconds)
        token, paused = self._read(bells, ("SMEMBERS", self.keys.paused))
        self._note_paused(paused)
        return token is not None

    def waiting(self, names: Sequence[str], due: bool = False) -> int:
        """Count what may be there to take, a cheap look: the entries of those lists whose queue is not paused.

        With `due` also the delayed jobs whose time has come: somebody is just promoting them.
        """
        lists = [("LLEN", self.keys.jobs(name)) for name in self._not_paused(names)]
        delayed = [("ZCOUNT", self.keys.delayed, "-inf", self.now())] if due else []
        return sum(self._read(*lists, *delayed)) if lists or delayed else 0

    def _note_paused(self, members: Iterable[bytes] | Exception) -> None:
        found = () if isinstance(members, Exception) else members
        self._paused = (time.monotonic(), frozenset(map(_ascii, found)))

    def _not_paused(self, names: Sequence[str]) -> list[str]:
        """The queues that are not paused, as known for PAUSE_AGE at most: a pause takes effect within that time."""
        if time.monotonic() - self._paused[0] > PAUSE_AGE:
            with suppress(Corrupted):  # a key of the wrong type pauses nothing
                self._note_paused(self._read(("SMEMBERS", self.keys.paused))[0])
        return [name for name in names if name not in self._paused[1]]

    def take(self, worker: str, names: Sequence[str], most: int) -> list[bytes]:
        """Move up to `most` ids from the queues that are not paused, in their strict order, to the worker's own list.

        If the reply is lost the ids lie in that list, where `adopt` finds them. The worker's id goes into the set of workers in the
        same transaction: even one that slept through its own reaping can hide nothing.
        """
        taken: list[bytes] = []
        broken: Corrupted | None = None
        for name in self._not_paused(names):
            moves = [("RPOPLPUSH", self.keys.jobs(name), self.keys.proc(worker))] * (most - len(taken))
            around = ("SADD", self.keys.workers, worker), ("SMEMBERS", self.keys.paused)
            try:
                added, paused, *ids = self._read(("MULTI",), *around, *moves, ("EXEC",))[-1]
                _unfailed([added, *ids])
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

    def start(self, worker: str, ids: Sequence[bytes], held: Mapping[str, int] | None = None) -> list[Job]:
        """Begin the attempt of every taken id whose job is pending and due; drop the ids that are not.

        pending -> processing. Watches the registration and the records. `held` maps the ids of the jobs that this worker has
        started and not settled to their attempts. An id that is processing under this worker's name but not held was started by a
        transaction whose reply was lost: it is returned too. A suspect is started only by itself, while nothing is held; else it is
        returned as it is, pending, and stays in the worker's list. Raises Reaped if the worker is no longer registered.
        """
        texts = list(map(_ascii, ids))
        named = list(dict.fromkeys(id for id in texts if ID.fullmatch(id)))
        if len(named) < len(set(texts)):
            log.warning("dropped %d entries of a queue that are no job ids", len(set(texts)) - len(named))
        record_keys = [self.keys.job(id) for id in named]
        registration, proc = self.keys.worker(worker), self.keys.proc(worker)

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
                if job and self._stays(job, worker, held, len(texts), tx.again):
                    started.append(job)
                elif (
                    job
                    and job.status == "pending"
                    and job.expires_at
                    and not job.started_at
                    and job.expires_at <= tx.now
                ):
                    tx.write("LREM", proc, 1, entry)
                    self._expire(tx, job)
                elif job and job.status == "pending" and job.run_at <= tx.now:
                    changed += [self.keys.job(id), _record(self._started(tx, job, worker))]
                    started.append(job)
                else:
                    tx.write("LREM", proc, 1, entry)
                    self._set_aside(tx, job)
            if changed:
                tx.write("MSET", *changed)
            return started

        started = self._transact([registration, *record_keys], body)
        for job in started:
            job.__dict__["_queue"] = self  # for set_progress
        return started

    def _stays(self, job: Job, worker: str, held: Mapping[str, int] | None, together: int, again: bool) -> bool:
        """Whether a taken job stays as it is: it was started by a transaction whose reply was lost, or is a suspect in company."""
        if job.status == "pending":
            return job.suspect and (bool(held) or together > 1)
        unheard = again if held is None else held.get(job.id) != job.attempts  # None: by this very transaction
        return (job.status, job.worker) == ("processing", worker) and unheard

    def _started(self, tx: Transaction, job: Job, worker: str) -> Job:
        waited = max(
            0, tx.now - max(job.created_at, job.run_at, job.updated_at)
        )  # updated when handed back, failed or retried
        tx.started(job, waited)
        job.status, job.worker = "processing", worker
        job.attempts += 1
        job.started_at = job.updated_at = max(tx.now, job.created_at)
        job.ended_at, job.progress = 0, 0.0
        tx.count("pending:" + job.queue, -1)
        tx.count("processing:" + job.queue)
        return job

    def _expire(self, tx: Transaction, job: Job) -> None:
        job.error = Failure("Expired", "it was not started in the time that it was given")
        tx.count("pending:" + job.queue, -1)
        self._end(tx, job, "failed")

    def _set_aside(self, tx: Transaction, job: Job | None) -> None:
        """See to a job whose entry is dropped: not due yet -> its place among the delayed; unreadable -> failed, as it is."""
        if job and job.status == "pending":
            tx.gather("ZADD", self.keys.delayed, job.run_at, job.id)
        elif job and job.error and job.error.type == UNREADABLE:
            self._end(tx, msgspec.structs.replace(job), "failed")

    def dequeue(self, worker: str, names: Sequence[str], most: int = 1) -> list[Job]:
        """Take and start up to `most` jobs. Nothing there: an empty list."""
        ids = self.take(worker, names, most)
        return [job for job in self.start(worker, ids) if job.status == "processing"] if ids else []

    def adopt(self, worker: str, held: Collection[str]) -> list[bytes]:
        """List the ids in the worker's own list that it does not know of, because a reply was lost: to be started.

        `held` must have been read before this is called, and only the thread that takes may call it: an id whose reply is on its
        way to another thread would be started twice.
        """
        known = Counter(id.encode() for id in held)
        return list((Counter(self._read(("LRANGE", self.keys.proc(worker), 0, -1))[0]) - known).elements())

    # Settle -----------------------------------------------------------------------------------------------------------

    def complete(self, job: Job, result: Any = None) -> None:
        """Record that a started job's handler returned `result`. Raises Reaped if the job is no longer this worker's."""
        self._settle_one(Outcome(job, "complete", result=result))

    def fail(self, job: Job, error: Failure, after: float | None = None) -> None:
        """Record that an attempt failed: pending again `after` seconds if attempts are left, else, or with None, failed."""
        self._settle_one(Outcome(job, "fail", error=error, after=after))

    def release(self, job: Job) -> None:
        """Hand a started job back to the head of its queue, the attempt refunded (at most MAX_REFUNDS times)."""
        self._settle_one(Outcome(job, "release"))

    def _settle_one(self, outcome: Outcome) -> None:
        if self.settle(outcome.job.worker, [outcome]):
            raise Reaped(f"job {outcome.job.id} is no longer with worker {outcome.job.worker}")

    def settle(self, worker: str, outcomes: Sequence[Outcome], again: bool = False) -> list[Outcome]:
        """Write what became of many started jobs in one transaction; return those that were no longer this worker's.

        processing -> completed, pending or failed. Watches the registration and the records: an EXEC given up for lost that arrives
        late fails. `again` tells that an earlier call raised Unavailable with `doubtful`: what that wrote is left alone. Raises
        Reaped, with nothing written, if the worker is no longer registered.
        """
        registration = self.keys.worker(worker)
        record_keys = [self.keys.job(outcome.job.id) for outcome in outcomes]

        def body(tx: Transaction) -> list[Outcome]:
            reads = [("EXISTS", registration), ("SMEMBERS", self.keys.awaited)] + (
                [("MGET", *record_keys)] if outcomes else []
            )
            registered, awaited, *found = tx.read(*reads)
            tx.awaited = set(awaited)
            if not registered:
                raise Reaped(f"worker {worker} was reaped")
            others, records = [], found[0] if outcomes else []
            # Backwards, for each one that is released goes to the head of its queue: the first must be the last to go there.
            for outcome, record in zip(reversed(outcomes), reversed(records), strict=True):
                if attempt := self._still_ours(outcome.job, record):
                    tx.write("LREM", self.keys.proc(worker), 1, outcome.job.id)
                    self._write_outcome(tx, outcome, attempt.cancel_requested)
                else:
                    others.append(outcome)
            return [] if tx.again else others

        return self._transact([registration, *record_keys], body, again)

    def _still_ours(self, job: Job, record: bytes | None) -> Attempt | None:
        """What the record tells, if it is still the very attempt that the worker holds."""
        try:
            now = _decode_attempt(record or b"{}")
        except msgspec.DecodeError:
            return None
        ours = Attempt("processing", job.worker, job.attempts, job.refunds, job.started_at, now.cancel_requested)
        return now if now == ours else None

    def _write_outcome(self, tx: Transaction, outcome: Outcome, cancel_requested: bool) -> None:
        job = msgspec.structs.replace(
            outcome.job, updated_at=max(tx.now, outcome.job.started_at), error=outcome.error or outcome.job.error
        )
        tx.count("processing:" + job.queue, -1)
        if outcome.verb == "release":
            tx.measure("released", job)
        else:
            tx.measure("ran", job, max(0, tx.now - job.started_at))
        if outcome.verb == "complete":
            job.result, job.error, job.cancel_requested = outcome.result, None, False
            self._end(tx, job, "completed")
        elif cancel_requested:
            job.cancel_requested = True
            self._end(tx, job, "cancelled")
        elif outcome.verb == "release" and job.refunds < MAX_REFUNDS:
            job.attempts -= 1
            job.refunds += 1
            self._put_back(tx, job, push="RPUSH")
        elif outcome.verb == "release":
            self._give_back(tx, job, "released too often")
        elif outcome.after is not None and job.attempts < job.max_attempts:
            self._put_back(tx, job, tx.now + round(outcome.after * 1000))
            tx.measure("retried", job)
        else:
            self._end(tx, job, "failed")

    def _end(self, tx: Transaction, job: Job, status: Literal["completed", "failed", "cancelled"]) -> None:
        """Write a job's last state: the record lives on for its time, the index lists it by when it ended."""
        job.status, job.worker = status, ""
        job.ended_at = job.updated_at = max(tx.now, job.updated_at)
        tx.write("SET", self.keys.job(job.id), _record(job), "PX", self.keep_ms[status])
        tx.gather("ZADD", getattr(self.keys, status), job.ended_at, job.id)
        tx.ended(job)
        if job.unique_key:
            tx.write("DEL", self.keys.unique(job.unique_key))
        if tx.awaited is None:
            tx.awaited = set(tx.read(("SMEMBERS", self.keys.awaited))[0])
        if job.id.encode() in tx.awaited:
            tx.write("LPUSH", self.keys.done(job.id), "1")
            tx.write("EXPIRE", self.keys.done(job.id), 60)
            tx.write("SREM", self.keys.awaited, job.id)

    def _put_back(self, tx: Transaction, job: Job, run_at: int = 0, push: Push = "LPUSH") -> None:
        """Write a job that is pending again."""
        job.status, job.worker, job.run_at = "pending", "", run_at
        tx.write("SET", self.keys.job(job.id), _record(job))
        self._line_up(tx, job, push)

    def _give_back(self, tx: Transaction, job: Job, reason: str, beside: bool = False) -> None:
        """End an attempt that nobody will finish: to the head of its queue if attempts are left, else failed with the reason.

        `beside` tells that its worker ran others, too: any of them may have killed it, so the attempt does not count. That cannot
        go on for ever, for after SUSPICIOUS such losses the job runs alone, and whoever is lost alone has nobody else to blame.
        """
        job.error = Failure("WorkerLost", f"{reason} (attempt {job.attempts}/{job.max_attempts})")
        if beside:
            job.error.message = (
                f"{reason} beside others (attempt {job.attempts}/{job.max_attempts}, which does not count)"
            )
            job.attempts -= 1
            job.suspicions += 1
        job.updated_at = max(tx.now, job.updated_at)
        if job.cancel_requested:
            self._end(tx, job, "cancelled")
        elif job.attempts < job.max_attempts:
            self._put_back(tx, job, push="RPUSH")
        else:
            self._end(tx, job, "failed")

    def write_progress(self, job: Job) -> None:
        """Write how far a running job is, unless it is no longer this worker's: then raise Reaped. Watches both.

        Some at a time: were each slot to open a connection for it, a worker would need as many as it has slots.
        """
        key, registration = self.keys.job(job.id), self.keys.worker(job.worker)

        def body(tx: Transaction) -> None:
            registered, record = tx.read(("EXISTS", registration), ("GET", key))
            attempt = self._still_ours(job, record) if registered else None
            if attempt is None:
                raise Reaped(f"job {job.id} is no longer with worker {job.worker}")
            job.cancel_requested = attempt.cancel_requested
            tx.write("SET", key, _record(msgspec.structs.replace(job, updated_at=max(tx.now, job.started_at))))

        with self._writers:
            self._transact([registration, key], body)

    # Cancel and retry -------------------------------------------------------------------------------------------------

    def cancel(self, id: str) -> Job | None:
        """Cancel a pending job, or ask a running one to stop, and return it; None if there is none of that id.

        pending -> cancelled; processing stays so, and its handler reads `job.cancelled`. Watches the record. The id of a cancelled
        job stays in the list until somebody takes and drops it: LREM would cost as much as the queue is long. Raises WrongStatus if
        the job has ended, or if it runs and its handler takes no Job by which to learn of it.
        """

        def body(tx: Transaction, job: Job) -> None:
            if tx.again and (job.status == "cancelled" or job.cancel_requested):
                return
            if job.status == "processing":
                if job.type in HANDLERS and not HANDLERS[job.type].wants_job:
                    raise WrongStatus(
                        "cancel", job, "it is processing, and its handler takes no Job that would tell it"
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

    def asked_to_stop(self, ids: Sequence[str]) -> list[str]:
        """Those of the running jobs that somebody wants to stop."""
        records = self._read(("MGET", *map(self.keys.job, ids)))[0] if ids else []
        return [
            id
            for id, record in zip(ids, records, strict=True)
            if record and b'"cancelRequested":true' in record and _job(id, record).cancelled
        ]

    def retry(self, id: str) -> Job | None:
        """Revive a failed or cancelled job with all its attempts and return it; None if there is none of that id.

        failed, cancelled -> pending. Watches the record: of two at once one succeeds, the other raises WrongStatus. So does one
        whose uniqueKey another job has meanwhile.
        """

        def body(tx: Transaction, job: Job) -> None:
            if job.status not in ("failed", "cancelled"):
                if tx.again:  # revived by the try whose reply was lost, and maybe started since
                    return
                raise WrongStatus("retry", job)
            if job.unique_key:
                tx.read(("WATCH", self.keys.unique(job.unique_key)))
                if (holder := self._without_doubles(tx, [job])[0]) is not job:
                    raise WrongStatus("retry", job, f"job {holder.id} has its uniqueKey now")
            tx.write("ZREM", getattr(self.keys, job.status), id)
            job.attempts, job.refunds, job.ended_at, job.expires_at, job.cancel_requested = 0, 0, 0, 0, False
            job.updated_at = max(tx.now, job.updated_at)
            self._put_back(tx, job)
            tx.measure("revived", job)

        return self._change(id, body)

    def change_many(self, verb: Literal["cancel", "retry"], filter: Filter, cursor: str = "") -> dict[str, Any]:
        """Cancel or retry all jobs that fit, looking at 1,000 of them at most; `cursor` in the answer says where to go on.

        Each job is changed by itself, as `cancel` and `retry` do it; those that changed meanwhile are counted as skipped.
        """
        jobs, cursor = self.page(filter, limit=SCANNED, cursor=cursor)
        done = 0
        for job in jobs:
            with suppress(WrongStatus):
                done += (self.cancel(job.id) if verb == "cancel" else self.retry(job.id)) is not None
        return {"cancelled" if verb == "cancel" else "retried": done, "skipped": len(jobs) - done, "cursor": cursor}

    # Pause and resume -------------------------------------------------------------------------------------------------

    def pause(self, name: str) -> None:
        """Start no more jobs of a queue; what runs goes on, and jobs are accepted. Takes effect within PAUSE_AGE."""
        self._read(("SADD", self.keys.paused, check_name("queue", name)))

    def resume(self, name: str) -> None:
        """Start jobs of a queue again."""

        def body(tx: Transaction) -> None:
            tx.write("SREM", self.keys.paused, check_name("queue", name))
            tx.ring(name)

        self._transact((), body)

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

        return self._transact([self.keys.job(id)], change)

    # Upkeep -----------------------------------------------------------------------------------------------------------

    def heartbeat(self, worker: str, jobs: Sequence[str] = ()) -> None:
        """Renew the lease and say which jobs run. Raises Reaped if the registration is gone.

        A lease that still exists proves the registration, for reap deletes that only when the lease is gone: one command. A lease
        that has lapsed is set anew only under WATCH of the registration.
        """
        lease, registration = self.keys.lease(worker), self.keys.worker(worker)
        sign = ("SET", lease, _encode({"at": self.now(), "jobs": list(jobs)}), "PX", self.lease_ms)
        if self._read((*sign, "XX"))[0] is not None:
            return

        def body(tx: Transaction) -> None:
            if not tx.read(("EXISTS", registration))[0]:
                raise Reaped(f"worker {worker} was reaped")
            tx.write(*sign)

        self._transact([registration], body)

    def deregister(self, worker: str) -> None:
        """Take a worker that has ended out of the books. What it still holds is given back, as `reap` does it."""
        self._read(("DEL", self.keys.lease(worker)))
        self.reap(worker)

    def promote(self) -> int:
        """Move the jobs whose runAt has come to their queues, 500 at most, and return how many ids left the delayed ones.

        Watches the records: a job that another has promoted meanwhile may have run, failed and be delayed again, and to take that
        entry away would lose it. The lock only keeps two from doing the same work.
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

        return self._transact((), body)

    def _listed(self, tx: Transaction, entries: Iterable[bytes], watch: bool = False) -> Iterator[Job]:
        """The jobs that the entries of a list name, each once; what names none is passed over. `watch`: from here on watched."""
        ids = list(dict.fromkeys(filter(ID.fullmatch, map(_ascii, entries))))
        keys = [self.keys.job(id) for id in ids]
        records = tx.read(*([("WATCH", *keys)] if watch else []), ("MGET", *keys))[-1] if ids else []
        return (_job(id, record) for id, record in zip(ids, records, strict=True) if record is not None)

    def _known_workers(self) -> list[str]:
        """Every worker that may hold a job. What is no name in that set was not put there by a worker."""
        return sorted(filter(NAME.fullmatch, map(_ascii, self._read(("SMEMBERS", self.keys.workers))[0])))

    def lost_workers(self, but: str = "") -> list[str]:
        """List the workers whose lease is gone, but for that one."""
        workers = [worker for worker in self._known_workers() if worker != but]
        leases = self._read(("MGET", *map(self.keys.lease, workers)))[0] if workers else []
        return [worker for worker, lease in zip(workers, leases, strict=True) if lease is None]

    def reap(self, worker: str, others: int = 0) -> int:
        """Bury a worker whose lease is gone, give back what it held, and return how many jobs that were. Alive: 0.

        processing -> pending, or failed with the last attempt. Watches the registration, the lease, the list and the records, for
        a worker that wakes up may just be taking or starting, and deleting the list would delete what it took. An id in its list is
        given back only if its job is pending, or processing under this worker's name: without that test a job that was given back
        before and runs elsewhere would run twice. For a worker reaped before, it gives back what it took in its sleep. `others` are
        the jobs that it ran beside these, in other shards.
        """
        registration, lease, proc = self.keys.worker(worker), self.keys.lease(worker), self.keys.proc(worker)

        def body(tx: Transaction) -> int:
            alive, entries = tx.read(("EXISTS", lease), ("LRANGE", proc, 0, -1))
            if alive:
                return 0
            given, listed = 0, list(self._listed(tx, entries, watch=True))
            beside = others + sum(job.status == "processing" and job.worker == worker for job in listed) > 1
            for job in listed:
                if job.status == "pending":
                    tx.push("RPUSH", job)
                elif job.status == "processing" and job.worker == worker:
                    tx.measure("reaped", job)
                    tx.count("processing:" + job.queue, -1)
                    self._give_back(tx, job, "worker lost", beside)
                else:
                    self._set_aside(tx, job)
                    continue
                given += 1
            tx.write("DEL", registration, proc)
            tx.write("SREM", self.keys.workers, worker)
            return given

        return self._transact([registration, lease, proc], body)

    def _running(self, worker: str) -> int:
        """Count the jobs that a worker has started and not settled."""
        jobs = self._transact((), lambda tx: self._listed(tx, tx.read(("LRANGE", self.keys.proc(worker), 0, -1))[0]))
        return sum(job.status == "processing" and job.worker == worker for job in jobs)

    def trim(self) -> int:
        """Forget ended jobs whose time is up, and the oldest of each status above KEPT; return how many, 1,000 a status at most.

        Records expire by themselves; their entries in the indexes do not.
        """
        removed = 0
        for status, keep in self.keep_ms.items():
            index = getattr(self.keys, status)
            over, expired = self._read(
                ("ZCARD", index), ("ZRANGEBYSCORE", index, "-inf", self.now() - keep, "LIMIT", 0, MAX_JOBS)
            )
            ids = expired or (
                self._read(("ZRANGE", index, 0, min(over - KEPT, MAX_JOBS) - 1))[0] if over > KEPT else []
            )
            if ids:
                removed += self.forget(status, ids)
        return removed

    def purge(self, filter: Filter, cursor: str = "") -> dict[str, Any]:
        """Forget the ended jobs that fit, looking at 1,000 at most; `cursor` in the answer says where to go on."""
        if filter.status not in ENDED:
            raise InvalidJob("status", f"must be {', '.join(ENDED)}: others have not ended")
        jobs, cursor = self.page(filter, limit=SCANNED, cursor=cursor)
        return {"purged": self.forget(filter.status, [job.id.encode() for job in jobs]), "cursor": cursor}

    def forget(self, status: str, ids: Sequence[bytes]) -> int:
        """Delete records of ended jobs and their entries in the index of that status; return how many were there.

        Watches the records: one revived meanwhile is not listed, and needed. Completed jobs cannot be revived, and thousands of
        them may end in a second: for them no look and no watch.
        """
        index = getattr(self.keys, status)
        keys = [self.keys.job(_ascii(id)) for id in ids]

        def body(tx: Transaction) -> int:
            scores = tx.read(*(("ZSCORE", index, id) for id in ids)) if status != "completed" else ids
            gone = [at for at, score in enumerate(scores) if score is not None]
            if gone:
                tx.write("ZREM", index, *(ids[at] for at in gone))
                tx.write("DEL", *(keys[at] for at in gone))
            return len(gone)

        return self._transact(keys if status != "completed" else (), body)

    # Reading ----------------------------------------------------------------------------------------------------------

    def ping(self) -> None:
        """Raise Unavailable unless Redis takes a write: one that never stores anything."""
        self._read(("SET", self.keys.promoter + ":none", "", "XX"))

    def get(self, id: str) -> Job | None:
        """The job of that id, or None."""
        if not ID.fullmatch(id):
            return None
        record = self._read(("GET", self.keys.job(id)))[0]
        return _job(id, record) if record is not None else None

    def wait_for(self, id: str, seconds: float) -> Job | None:
        """The job of that id when it has ended, or as it is when the time is up; None if there is none.

        Whoever ends a job that is awaited leaves a token. It is asked for every two seconds all the same, should that be missed.
        """
        until = time.monotonic() + seconds
        job = self.get(id)
        if not job or job.status not in UNENDED:
            return job
        while job and job.status in UNENDED and (left := until - time.monotonic()) > 0:
            record = self._read(("SADD", self.keys.awaited, id), ("GET", self.keys.job(id)))[
                1
            ]  # it may just have ended
            job = _job(id, record) if record else None
            if job and job.status in UNENDED:
                self._wait_for_token(self.keys.done(id), min(left, BLOCK))
                job = self.get(id)
        self._read(("SREM", self.keys.awaited, id))  # others who wait enter it again
        return job

    def _wait_for_token(self, key: str, seconds: float) -> None:
        if self._read(("BLPOP", key, round(max(seconds, 0.01), 3)))[0]:
            self._read(("LPUSH", key, "1"), ("EXPIRE", key, 60))  # for others who wait for the same

    def jobs(self, status: Status, *, limit: int = 50) -> list[Job]:
        """List the newest jobs of a status: by when they ended, or for those that have not, by when they were created."""
        return self.page(Filter(status), limit=limit)[0] if limit > 0 else []

    def page(self, filter: Filter = Filter(), *, limit: int = 50, cursor: str = "") -> tuple[list[Job], str]:  # noqa: B008
        """List the jobs that fit, newest first, and a cursor for what follows them: empty when nothing does.

        Newest by when they ended, or if they have not, were created. The cursor is a place in that order, so that jobs which come
        or go shift nothing. Looks at SCANNED jobs at most: a page may be short, or empty, and still have a cursor. Of pending jobs
        it sees 10,000 entries of each queue around the cursor, and as many delayed ones. Raises InvalidJob for a cursor that is
        none.
        """
        before = _place_of(cursor or "9999999999999999.g")
        entries: set[Entry] = set()
        horizon = NO_HORIZON
        for status in [filter.status] if filter.status else STATUSES:
            look = self._unended if status in UNENDED else self._ended
            seen_there, its_horizon = look(status, before)
            entries |= seen_there
            horizon = max(horizon, its_horizon)
        todo = sorted((entry for entry in entries if horizon <= entry[:2] < before), reverse=True)[: SCANNED + 1]
        more = horizon > NO_HORIZON
        found: list[Job] = []
        for at in range(0, min(len(todo), SCANNED), 100):
            part = todo[at : min(at + 100, SCANNED)]
            records = self._read(("MGET", *(self.keys.job(id) for _, id, _ in part)))[0]
            for seen, ((_, id, under), record) in enumerate(zip(part, records, strict=True), at + 1):
                job = _job(id, record) if record else None
                if job and job.status == under and filter.fits(job):
                    found.append(job)
                if len(found) == limit:
                    return found, _cursor(todo, seen, more)
        return found, _cursor(todo, SCANNED, more)

    def _windows(self, read: Callable[[int], Sequence[Entry]], start: int, before: Place) -> tuple[set[Entry], Place]:
        """Read entries, LISTED at a time from `start` on, until some lie before the cursor; tell how far that reached, too."""
        while True:
            found = read(start)
            if len(found) < LISTED:
                return set(found), NO_HORIZON
            if older := [entry[:2] for entry in found if entry[:2] < before]:
                return set(found), min(older)
            start += LISTED

    def _ended(self, status: str, before: Place) -> tuple[set[Entry], Place]:
        def read(start: int) -> list[Entry]:
            command = (
                "ZREVRANGEBYSCORE",
                getattr(self.keys, status),
                before[0],
                "-inf",
                "WITHSCORES",
                "LIMIT",
                start,
                LISTED,
            )
            return [(int(at), id, status) for id, at in _fields(self._read(command)[0])]

        return self._windows(read, 0, before)

    def _unended(self, status: str, before: Place) -> tuple[set[Entry], Place]:
        """The newest entries of each list, and as many from the cursor's own on; cancelled jobs may make up thousands of them."""
        if status == "pending":
            keys = [self.keys.jobs(name) for name in self.queues()]
        else:
            keys = [self.keys.proc(worker) for worker in self._known_workers()]
        found = (
            set(self._read_entries(("ZRANGE", self.keys.delayed, 0, LISTED - 1), status))
            if status == "pending"
            else set()
        )
        horizon = NO_HORIZON
        for key in keys:
            read = partial(self._listed_entries, key, status)
            at = self._read(("LPOS", key, before[1]))[0]
            if at:
                found |= set(read(0))
            seen, its_horizon = self._windows(read, at or 0, before)
            found |= seen
            horizon = max(horizon, its_horizon)
        return found, horizon

    def _listed_entries(self, key: str, status: str, start: int) -> list[Entry]:
        return self._read_entries(("LRANGE", key, start, start + LISTED - 1), status)

    def _read_entries(self, command: Command, status: str) -> list[Entry]:
        return [
            (created_at(id) if ID.fullmatch(id) else 1 << 60, id, status) for id in map(_ascii, self._read(command)[0])
        ]

    def queues(self) -> dict[str, dict[str, Any]]:
        """Every queue that ever had a job or is paused: its counts, the age of the oldest waiting job, and whether it is paused."""
        counts, paused = self._read(("HGETALL", self.keys.counts), ("SMEMBERS", self.keys.paused))
        self._note_paused(paused)
        now = {field: _count(value) for field, value in _fields(counts)}
        names = sorted(
            {field.partition(":")[2] for field in now if ":" in field} | set(filter(NAME.fullmatch, self._paused[1]))
        )
        heads = self._read(*(("LINDEX", self.keys.jobs(name), -1) for name in names))
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
        id = _ascii(head or b"")
        return max(0, self.now() - created_at(id)) if ID.fullmatch(id) else 0

    def stats(self, minutes: int = 0) -> dict[str, Any]:
        """Count the jobs of every status, each queue's own, and the workers that are alive. `pending` includes the delayed ones.

        `lastMinute` tells how many ended in the sixty seconds before; `total` counts since the beginning what the others forget
        when records end their time. With `minutes`, `history` has an entry for each of the last ones, 120 at most.
        """
        queues, now = self.queues(), self.now()
        indexes = ("delayed", "completed", "failed", "cancelled")
        totals, last, this, *sizes = self._read(
            ("HMGET", self.keys.counts, *ENDED),
            ("HMGET", self.keys.minute(now - 60_000), *ENDED),
            ("HMGET", self.keys.minute(now), *ENDED),
            *(("ZCARD", getattr(self.keys, index)) for index in indexes),
        )
        share = 1 - now % 60_000 / 60_000  # of the minute before this one that lies within the last sixty seconds
        leases = [self.keys.lease(worker) for worker in self._known_workers()]
        return {
            "pending": sum(queue["pending"] for queue in queues.values()),
            "processing": sum(queue["processing"] for queue in queues.values()),
            **dict(zip(indexes, sizes, strict=True)),
            "oldestWaitingMs": max((queue["oldestWaitingMs"] for queue in queues.values()), default=0),
            "workers": self._read(("EXISTS", *leases))[0] if leases else 0,
            "queues": queues,
            "lastMinute": {s: round(_count(a) * share) + _count(b) for s, a, b in zip(ENDED, last, this, strict=True)},
            "total": {status: _count(total) for status, total in zip(ENDED, totals, strict=True)},
            **({"history": self._history(now, minutes)} if minutes else {}),
        }

    def _history(self, now: int, minutes: int) -> list[dict[str, int]]:
        """What was started and what ended in each minute, oldest first; the last one is still going on."""
        begun = [(now // 60_000 - back) * 60_000 for back in reversed(range(minutes))]
        found = self._read(*(("HMGET", self.keys.minute(at), *MINUTELY) for at in begun))
        return [
            {"at": at, **{field: _count(value) for field, value in zip(MINUTELY, values, strict=True)}}
            for at, values in zip(begun, found, strict=True)
        ]

    def metrics(self) -> dict[str, dict[tuple[str, ...], int]]:
        """What has happened to jobs since the beginning: by word, then by type and queue.

        enqueued; completed, failed, cancelled: ended so; retried: an attempt failed, and others were left; revived: failed or
        cancelled before, now pending again; released: handed back by a worker that stops; reaped: lost with its worker. By time in
        BUCKETS: waited, from when it could start to its start, for every start; and ran, from there until its outcome was written,
        for every attempt of which a handler told the outcome. waitedMs and ranMs are their sums. scrapeErrors is one number.
        """
        told: dict[str, dict[tuple[str, ...], int]] = {}
        for field, value in _fields(self._read(("HGETALL", self.keys.metrics))[0]):
            what, *labels = parts = field.split(":")
            if len(labels) != 1 and all(map(NAME.fullmatch, parts)):
                told.setdefault(what, {})[tuple(labels)] = _count(value)
        return told

    def count_scrape_errors(self, times: int) -> None:
        """Count scrapes of the metrics that failed, now that Redis can be told."""
        self._read(("HINCRBY", self.keys.metrics, "scrapeErrors", times))

    def spend(self, who: str, limit: int, seconds: int) -> tuple[int, int]:
        """Count a request of a client in the present window; return how many are left (below 0: none), for how many seconds."""
        now = self.now()
        key = self.keys.rate(who, now // (seconds * 1000))
        used = self._read(("INCR", key), ("EXPIRE", key, seconds))[0]
        return limit - used, seconds - now // 1000 % seconds

    def workers(self) -> list[dict[str, Any]]:
        """List the registered workers: id, host, pid, queues, concurrency, startedAt, alive, lastHeartbeat and current jobs."""
        ids = self._known_workers()
        keys = [key for id in ids for key in (self.keys.worker(id), self.keys.lease(id))]
        found = self._read(("MGET", *keys))[0] if keys else []
        try:
            return [
                _worker(id, about, lease)
                for id, about, lease in zip(ids, found[::2], found[1::2], strict=True)
                if about
            ]
        except (msgspec.DecodeError, KeyError, AttributeError, TypeError) as error:
            raise Corrupted(f"the registration or the lease of a worker cannot be read: {error}") from None

    # Examine ----------------------------------------------------------------------------------------------------------

    def warnings(self) -> list[str]:
        """What of Redis endangers jobs though it works; nothing of what it does not tell."""
        found = Finding("ok", "eviction", "")
        with suppress(Unavailable):
            found = _eviction(self._look_at_memory())
        return [f"{found.seen}: {found.advice}"] if found.level != "ok" else []

    def examine(self, connections: int) -> list[Finding]:
        """Look at all that the queue depends on, as `doctor` shows it. Changes nothing, and raises nothing that Redis does.

        `connections` is how many the web processes and a worker may open.
        """
        found = [_transport(self.pool)]
        looks: dict[str, Callable[[], Iterable[Finding]]] = {
            "reachable": self._examine_trip,
            "permissions": self._examine_permissions,
            "writes": self._examine_writes,
            "server": partial(self._examine_server, connections),
            "books": self._examine_books,
            "workers": self._examine_workers,
        }
        for about, look in looks.items():
            try:
                found.extend(look())
            except TinyQueueError as error:
                reason = getattr(error, "reason", "")
                found.append(
                    Finding("fail", about, str(error), REMEDIES.get(reason, "is it a Redis, its keys the queue's?"))
                )
                if reason in ("unreachable", "timeout", "loading"):
                    break
        return found

    def _examine_trip(self) -> Iterator[Finding]:
        times = []
        for _ in range(5):
            began = time.monotonic()
            seconds, micros = self._read(("TIME",))[-1]
            times.append(1000 * (time.monotonic() - began))
        ahead = int(seconds) + int(micros) / 1e6 - time.time()
        yield _judged(
            "reachable", f"answers in {min(times):.2f} ms", (min(times) > SLOW, "warn", "run the processes near Redis")
        )
        clock = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
        yield _judged(
            "clock", clock, (abs(ahead) > SKEW, "warn", "set both by NTP: runAt and delays go by that of Redis")
        )

    def _examine_permissions(self) -> Iterator[Finding]:
        """Try every command inside a MULTI that is never executed: Redis refuses there, too, what the user may not do."""
        key, around = self.keys.promoter + ":none", ("WATCH", "UNWATCH", "MULTI", "EXEC")
        unused = around if self.min_replicas else (*around, "WAIT")
        tries = [
            (name, *[key] * count) for count, names in COMMANDS.items() for name in names.split() if name not in unused
        ]
        with self._connection() as connection:
            replies = dict(
                zip(around, _tried(connection, [("WATCH", key), *((name,) for name in around[1:])]), strict=True)
            )
            if not isinstance(replies["MULTI"], Exception):
                queued = _tried(connection, [("MULTI",), *tries])[1:]
                replies |= zip((name for name, *_ in tries), queued, strict=True)
            connection.disconnect()
        refused = [name for name, reply in replies.items() if isinstance(reply, Exception)]
        user = self.pool.connection_kwargs.get("username") or "default"
        advice = f"ACL SETUSER {user} ~{key.partition(':')[0]}:* {' '.join('+' + name.lower() for name in refused)}"
        seen = f"refused: {', '.join(refused)}" if refused else "all commands that the queue needs"
        yield _judged("permissions", seen, (refused == ["INFO"], "warn", advice), (bool(refused), "fail", advice))

    def _examine_writes(self) -> Iterator[Finding]:
        self.ping()
        yield Finding("ok", "writes", "are taken")

    def _examine_server(self, connections: int) -> Iterator[Finding]:
        settings = ("save", "maxclients", "timeout")
        with self._connection() as connection:
            info, *replies = _tried(connection, [("INFO",), *(("CONFIG", "GET", name) for name in settings)])
        told = {
            name: reply[1].decode()
            for name, reply in zip(settings, replies, strict=True)
            if isinstance(reply, list) and reply
        }
        told |= _info(info)
        if "redis_version" not in told:
            yield Finding(
                "warn", "server", "does not tell of itself", "allow +info, or look to version, memory, persistence"
            )
            return
        yield from (
            _version(told),
            _role(told),
            _eviction(told),
            _memory(told),
            _persistence(told),
            _clients(told, connections),
        )
        idle = told.get("timeout", "0")
        yield Finding(
            "ok", "idle timeout", "none" if idle == "0" else f"{idle} s: connections closed by it are opened anew"
        )

    def _examine_books(self) -> Iterator[Finding]:
        """Whether the lists can hold all jobs that are counted. They may hold more, for the record decides, but never less."""
        for _ in range(3):  # a queue or a worker may be new since its name was looked for
            keys = [self.keys.jobs(name) for name in self.queues()] + [
                self.keys.proc(worker) for worker in self._known_workers()
            ]
            reads = ("HGETALL", self.keys.counts), ("ZCARD", self.keys.delayed), *(("LLEN", key) for key in keys)
            counts, *sizes = _unfailed(self._read(("MULTI",), *reads, ("EXEC",))[-1])
            unended = [_count(value) for field, value in _fields(counts) if ":" in field]
            wrong = sum(unended) > sum(sizes) or min(unended, default=0) < 0
            if not wrong:
                break
        seen = f"{sum(unended)} jobs are counted that have not ended, {sum(sizes)} entries are listed"
        yield _judged(
            "books", seen, (wrong, "fail", "keys are lost: look for an eviction, a failover, or others who write there")
        )

    def _examine_workers(self) -> Iterator[Finding]:
        alive = [worker for worker in self.workers() if worker["alive"]]
        yield _judged("workers", f"{len(alive)} alive", (not alive, "warn", "start one: python worker.py"))
        queues, served = self.queues(), {name for worker in alive for name in worker["queues"]}
        for name, queue in queues.items():
            if queue["paused"]:
                yield Finding("warn", "queue", f"{name} is paused", f"POST /queues/{name}/resume")
            elif alive and queue["pending"] and name not in served:
                seen = f"{name}: {queue['pending']} pending, and no worker serves it"
                yield Finding("warn", "queue", seen, f"python worker.py --queue {name}")


def _worker(id: str, about: bytes, lease: bytes | None) -> dict[str, Any]:
    known, sign = msgspec.json.decode(about), msgspec.json.decode(lease or b"{}")
    at = sign.get("at", known["startedAt"] if lease else 0)
    return {"id": id, **known, "alive": bool(lease), "lastHeartbeat": at, "jobs": sign.get("jobs", [])}


# What doctor finds ----------------------------------------------------------------------------------------------------

Level = Literal["ok", "warn", "fail"]
OLDEST = (6, 0, 6)  # version of Redis: the first with LPOS
SLOW = 10.0  # milliseconds to Redis and back, above which a worker spends its time waiting
SKEW = 2.0  # seconds between two clocks
COMMANDS = {  # every command that the queue uses, by how many keys may stand in for its arguments
    0: "EXEC INFO MULTI TIME UNWATCH",
    1: "DEL EXISTS GET HGETALL INCR LLEN MGET SMEMBERS WATCH ZCARD",
    2: "BLPOP EXPIRE HMGET LINDEX LPOS LPUSH MSET MSETNX RPOPLPUSH RPUSH SADD SET SREM WAIT ZREM ZSCORE",
    3: "HINCRBY LRANGE LREM LTRIM ZADD ZCOUNT ZRANGE ZRANGEBYSCORE ZREVRANGEBYSCORE",
}
REMEDIES = {
    "unreachable": "is Redis running there, does REDIS_URL name it, and does it want rediss://?",
    "timeout": "is Redis overloaded, or a firewall between?",
    "loading": "wait until it has read its data",
    "full": "more memory, or shorter TINYQUEUE_KEEP_COMPLETED and TINYQUEUE_KEEP_FAILED",
    "read-only": "is that a replica, or its disk full?",
    "refused": "see to user and password in REDIS_URL, and to the user's ACL",
    "busy": "see to the number of connections",
}


class Finding(msgspec.Struct, frozen=True):
    """One thing that `doctor` looked at: how it stands, what was seen, and what to do about it."""

    level: Level
    about: str
    seen: str
    advice: str = ""


def _judged(about: str, seen: str, *cases: tuple[bool, Level, str]) -> Finding:
    """A finding of the first case that holds; ok if none does."""
    level, advice = next(((level, advice) for holds, level, advice in cases if holds), ("ok", ""))
    return Finding(level, about, seen, advice)


def _transport(pool: Any) -> Finding:
    host = str(pool.connection_kwargs.get("host", ""))
    if issubclass(pool.connection_class, redis.SSLConnection):
        checked = pool.connection_kwargs.get("ssl_cert_reqs") != "none"
        advice = "name its authority with ?ssl_ca_certs=/path in REDIS_URL, and unset TINYQUEUE_TLS_VERIFY"
        seen = f"TLS, the certificate is {'' if checked else 'not '}checked"
        return _judged("transport", seen, (not checked, "warn", advice))
    advice = "use rediss:// if others can see what goes over that network"
    seen, far = ("not encrypted", not _is_near(host)) if host else ("within this machine", False)
    return _judged("transport", seen, (far, "warn", advice))


def _is_near(host: str) -> bool:
    """Whether that host is this machine, or one in a private network."""
    with suppress(OSError, ValueError):
        return all(ipaddress.ip_address(info[4][0]).is_private for info in socket.getaddrinfo(host, None))
    return True


def _version(told: Mapping[str, str]) -> Finding:
    name = "Valkey " + told["valkey_version"] if "valkey_version" in told else "Redis " + told["redis_version"]
    mode, version = told.get("redis_mode", "standalone"), tuple(map(int, re.findall(r"\d+", told["redis_version"])[:3]))
    return _judged(
        "server",
        f"{name}, {mode}",
        (version < OLDEST, "fail", f"it must be {'.'.join(map(str, OLDEST))} or newer"),
        (mode == "sentinel", "fail", "REDIS_URL must name the Redis that it watches"),
    )


def _role(told: Mapping[str, str]) -> Finding:
    role, replicas = told.get("role", "master"), told.get("connected_slaves", "0")
    seen = f"primary with {replicas} replicas" if role == "master" else "a replica"
    return _judged("role", seen, (role != "master", "fail", "REDIS_URL must name its primary"))


def _eviction(told: Mapping[str, str]) -> Finding:
    policy, limit = told.get("maxmemory_policy", "noeviction"), int(told.get("maxmemory", 0))
    advice = "Redis throws jobs or leases away when its memory is full; set it to noeviction"
    return _judged("eviction", f"maxmemory-policy is {policy}", (limit > 0 and policy != "noeviction", "warn", advice))


def _memory(told: Mapping[str, str]) -> Finding:
    used, limit = int(told.get("used_memory", 0)), int(told.get("maxmemory", 0))
    seen = f"{used / 1e6:.1f} MB" + (f" of {limit / 1e6:.1f} MB" if limit else ", no maxmemory")
    advice = REMEDIES["full"]
    return _judged("memory", seen, (_used(told) > MEMORY_SHARE, "fail", advice), (_used(told) > 0.8, "warn", advice))


def _persistence(told: Mapping[str, str]) -> Finding:
    log, save = told.get("aof_enabled") == "1", told.get("save")
    snapshots = "unknown" if save is None else f'"{save}"'
    broken = "err" in (told.get("rdb_last_bgsave_status"), told.get("aof_last_write_status"))
    return _judged(
        "persistence",
        "appendonly yes" if log else f"appendonly no, save {snapshots}",
        (broken, "fail", "Redis cannot write to its disk: see its log"),
        (not log and save == "", "warn", "a restart of Redis loses every job: set appendonly yes"),
        (not log, "warn", "a crash of Redis loses what came after its last snapshot: set appendonly yes"),
    )


def _clients(told: Mapping[str, str], connections: int) -> Finding:
    most, now = int(told.get("maxclients", 0)), int(told.get("connected_clients", 0))
    seen = f"{now} of {most or 'unknown'}; the web processes and one worker open up to {connections}"
    advice = "fewer processes (WEB_CONCURRENCY, workers), or a larger maxclients"
    return _judged("connections", seen, (0 < most < max(connections, now / 0.9), "warn", advice))


# Shards ---------------------------------------------------------------------------------------------------------------


class Shards(Queue):
    """Many queues as one, each in a namespace and so in a slot of its own: `{queue.0}`, `{queue.1}` and so on.

    The last two digits of a job's id name its shard. A submit goes whole into one shard, the next into the next, so that jobs start
    first in, first out within each shard; one with a uniqueKey or an Idempotency-Key goes to the shard of that key. A worker is
    registered in all of them under one id; if one of them took it for dead, it starts anew in all. While a shard is out of reach,
    the others are served. Verbs that are not here are made of those that are.
    """

    def __init__(self, shards: Sequence[Queue]) -> None:
        self.shards, self.clock = list(shards), shards[0].clock
        self.lease, self.lease_ms, self.keep_ms = shards[0].lease, shards[0].lease_ms, shards[0].keep_ms
        self._turn = itertools.count(random.randrange(len(shards)))
        self._waiters = ThreadPoolExecutor(len(shards), "shard")
        self._waits: dict[int, Future[bool]] = {}

    @property
    def last_contact(self) -> float:  # type: ignore[override]
        """When any shard last did what it was asked."""
        return max(shard.last_contact for shard in self.shards)

    @property
    def last_trouble(self) -> float:  # type: ignore[override]
        """When any shard last did not."""
        return max(shard.last_trouble for shard in self.shards)

    def _of(self, id: str) -> Queue:
        """The shard that an id names. One that names none is as unknown in the first as in any."""
        at = int(id[-2:], 16) if ID.fullmatch(id) else 0
        return self.shards[at if at < len(self.shards) else 0]

    def _at(self, key: str) -> int:
        return zlib.crc32(key.encode()) % len(self.shards)

    def _by_shard(self, things: Iterable[T], id: Callable[[T], str]) -> list[tuple[Queue, list[T]]]:
        """Sort what belongs to jobs by the shards of those jobs."""
        parts: defaultdict[Queue, list[T]] = defaultdict(list)
        for thing in things:
            parts[self._of(id(thing))].append(thing)
        return list(parts.items())

    def disconnect(self) -> None:
        for shard in self.shards:
            shard.disconnect()

    def now(self) -> int:
        return self.shards[0].now()

    def submit(self, jobs: Sequence[Job], once: Once | None = None) -> list[Job]:
        """As Queue.submit. Jobs whose uniqueKeys belong to different shards cannot be stored all or none: raises InvalidJob."""
        places = {self._at(job.unique_key) for job in jobs if job.unique_key}
        if len(places) > 1:
            raise InvalidJob(
                "uniqueKey", "must be the same for all jobs of a batch, for there are several shards (TINYQUEUE_SHARDS)"
            )
        if places or once:
            return self._submit_to(places.pop() if places else self._at(once.key if once else ""), jobs, once)
        first = next(self._turn)
        for at in range(first, first + len(self.shards)):
            try:
                return self._submit_to(at % len(self.shards), jobs, once)
            except Unavailable as error:
                trouble = error
                if error.doubtful:  # it may be there: in another shard it would be a second job
                    break
        raise trouble

    def _submit_to(self, at: int, jobs: Sequence[Job], once: Once | None) -> list[Job]:
        for job in jobs:
            job.id = f"{job.id[:-2]}{at:02x}"
        return self.shards[at].submit(jobs, once)

    def _try(self, act: Callable[[Queue], T], all: bool = False, order: Sequence[Queue] = ()) -> list[T]:
        """Do it in every shard; raise the first error if it failed in one, or without `all` if it failed in each."""
        done, errors = list[T](), list[TinyQueueError]()
        for shard in order or self.shards:
            try:
                done.append(act(shard))
            except TinyQueueError as error:
                errors.append(error)
        if errors and (all or not done):
            raise next((error for error in errors if isinstance(error, Reaped)), errors[0])
        return done

    def register(self, queues: Sequence[str], concurrency: int, worker: str = "") -> str:
        for shard in self.shards:
            worker = shard.register(queues, concurrency, worker)
        return worker

    def wait(self, names: Sequence[str], seconds: float = BLOCK) -> bool:
        """As Queue.wait, in all shards. Those that still wait when one has an answer go on, and are asked the next time."""
        for at, shard in enumerate(self.shards):
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
        """As Queue.take, from the shards in turn. One that has trouble does not keep the others from being served."""
        taken: list[bytes] = []

        def take(shard: Queue) -> None:
            if len(taken) < most:
                taken.extend(shard.take(worker, names, most - len(taken)))

        first = next(self._turn) % len(self.shards)
        self._try(take, order=[*self.shards[first:], *self.shards[:first]])
        return taken

    def start(self, worker: str, ids: Sequence[bytes], held: Mapping[str, int] | None = None) -> list[Job]:
        jobs = []
        for shard, entries in self._by_shard(ids, _ascii):
            others = {_ascii(id): 0 for id in ids if id not in entries}  # a suspect is not alone among them
            jobs += shard.start(worker, entries, {**others, **held} if held is not None else others or None)
        return jobs

    def adopt(self, worker: str, held: Collection[str]) -> list[bytes]:
        return [id for ids in self._try(lambda shard: shard.adopt(worker, held)) for id in ids]

    def settle(self, worker: str, outcomes: Sequence[Outcome], again: bool = False) -> list[Outcome]:
        """As Queue.settle, in one transaction for each shard. Unavailable is raised when all were tried: then some were written."""
        others, trouble = list[Outcome](), list[Unavailable]()
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

    def asked_to_stop(self, ids: Sequence[str]) -> list[str]:
        return [id for shard, part in self._by_shard(ids, str) for id in shard.asked_to_stop(part)]

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

    def lost_workers(self, but: str = "") -> list[str]:
        return sorted({worker for lost in self._try(lambda shard: shard.lost_workers(but)) for worker in lost})

    def reap(self, worker: str, others: int = 0) -> int:
        """As Queue.reap. What it ran in one shard it ran beside what it ran in the others."""
        ran = dict(self._try(lambda shard: (shard, shard._running(worker))))
        return sum(self._try(lambda shard: shard.reap(worker, sum(ran.values()) - ran.get(shard, 0))))

    def trim(self) -> int:
        return sum(self._try(Queue.trim))

    def forget(self, status: str, ids: Sequence[bytes]) -> int:
        return sum(shard.forget(status, part) for shard, part in self._by_shard(ids, _ascii))

    def ping(self) -> None:
        self._try(Queue.ping, all=True)

    def get(self, id: str) -> Job | None:
        return self._of(id).get(id)

    def wait_for(self, id: str, seconds: float) -> Job | None:
        return self._of(id).wait_for(id, seconds)

    def page(self, filter: Filter = Filter(), *, limit: int = 50, cursor: str = "") -> tuple[list[Job], str]:  # noqa: B008
        """As Queue.page: a cursor is a place in the order of all jobs, so pages are merged as far as every shard has looked."""
        pages = [shard.page(filter, limit=limit, cursor=cursor) for shard in self.shards]
        horizon = max((_place_of(cursor) for _, cursor in pages if cursor), default=NO_HORIZON)
        found = sorted((job for jobs, _ in pages for job in jobs), key=Job.place, reverse=True)
        seen = [job for job in found if job.place() >= horizon]
        if len(seen) > limit:
            at, id = seen[limit - 1].place()
            return seen[:limit], f"{at}.{id}"
        return seen, f"{horizon[0]}.{horizon[1]}" if horizon > NO_HORIZON else ""

    def queues(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for shard in self.shards:
            for name, about in shard.queues().items():
                found[name] = _added(found[name], about) if name in found else about
        return dict(sorted(found.items()))

    def stats(self, minutes: int = 0) -> dict[str, Any]:
        """As Queue.stats, added up. A worker serves all shards, so it is counted where most are."""
        all = [shard.stats(minutes) for shard in self.shards]
        history: dict[int, Any] = {}
        for minute in itertools.chain(*(stats.pop("history", ()) for stats in all)):
            at = minute["at"]  # not the place in the list, for a minute may begin here while the next shard is asked
            history[at] = _added(history[at], minute) | {"at": at} if at in history else minute
        total = functools.reduce(_added, all) | {"workers": max(stats["workers"] for stats in all)}
        return total | ({"history": [history[at] for at in sorted(history)[-minutes:]]} if minutes else {})

    def count_scrape_errors(self, times: int) -> None:
        self.shards[0].count_scrape_errors(times)

    def metrics(self) -> dict[str, dict[tuple[str, ...], int]]:
        return functools.reduce(_added, (shard.metrics() for shard in self.shards))

    def workers(self) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for shard in self.shards:
            for about in shard.workers():
                known = found.setdefault(about["id"], about | {"jobs": [], "lastHeartbeat": 0})
                known["jobs"] = known["jobs"] + about["jobs"]
                known["lastHeartbeat"] = max(known["lastHeartbeat"], about["lastHeartbeat"])
                known["alive"] = known["alive"] and about["alive"]
        return list(found.values())

    def warnings(self) -> list[str]:
        return list(dict.fromkeys(warning for shard in self.shards for warning in shard.warnings()))

    def examine(self, connections: int) -> list[Finding]:
        """As Queue.examine, of every shard; what is found of several alike is told once."""
        return list(dict.fromkeys(found for shard in self.shards for found in shard.examine(connections)))

    def spend(self, who: str, limit: int, seconds: int) -> tuple[int, int]:
        return self.shards[self._at(who)].spend(who, limit, seconds)


def _added(one: Any, other: Any) -> Any:
    """Add up what shards tell of themselves: counts are summed, of ages the highest counts, and paused is what any has paused."""
    if not isinstance(one, dict):
        return one or other if isinstance(one, bool) else one + other
    both = {
        name: _added(one[name], other[name]) if name in one and name in other else one.get(name, other.get(name))
        for name in {**one, **other}
    }
    return both | {name: max(one[name], other[name]) for name in ("oldestWaitingMs",) if name in one}
