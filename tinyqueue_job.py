"""What a job is: errors, record, filters and outcomes.

This module knows no queue. tinyqueue.py imports all of it, and users import it from there.
"""

from __future__ import annotations

import math
import re
import time
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import msgspec

from tinyqueue_json import Preview, created_at, describe, encode
from tinyqueue_redis import explain, shield, text_of

# Bounds of a job, a part of the contract ------------------------------------------------------------------------------

MAX_ATTEMPTS = 100
MAX_DELAY = 366 * 86400  # seconds
MAX_AFTER = 1000  # parents of a job
KEY_LENGTH = 200  # characters of a uniqueKey
MAX_TAGS = 10
TAG_LENGTH = 50  # characters of a tag
NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")  # of queues, types, workers: cannot spell another key
PRINTABLE = re.compile(r"[^\x00-\x1f\x7f-\xa0\xad\u2028\u2029\ud800-\udfff]+")  # as in openapi.json
# The only parser of URLs, so that all code reads a URL alike. It refuses a user name, a fragment, a
# backslash and characters beyond ASCII, because other parsers read these in different ways.
URL = re.compile(
    r"(?P<scheme>[Hh][Tt][Tt][Pp][Ss]?)://(?P<host>[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])"
    r"(?::(?P<port>[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?"
    r"(?P<target>[/?][!-\"$-\[\]-~]*)?"
)
URL_LENGTH = 2000
URL_RULE = "must be an http or https URL in ASCII, without a user name or a fragment, of at most 2000 characters"
DELIVERIES = 10  # attempts of a delivery: one at once, and one after each wait in tinyqueue_http.WAITS
ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")

# Errors ---------------------------------------------------------------------------------------------------------------


class TinyQueueError(Exception):
    """The base of all errors of TinyQueue. For an unknown job, methods return None instead."""


class SettingsError(TinyQueueError):
    """A setting or the handlers module is wrong. The text is one line that says what to do."""


class InvalidJob(TinyQueueError):
    """A field of a job, or another argument such as a cursor, is invalid. Nothing was changed.

    `field` is the wrong field as JSON clients know it, and `rule` says what it must be. `path` is
    the place inside the payload (``$.to``), or empty.
    """

    def __init__(self, field: str, rule: str, path: str = "") -> None:
        super().__init__(f"{field}{path.removeprefix('$')}: {rule}")
        self.field = field
        self.rule = rule
        self.path = path


class UnknownType(InvalidJob):
    """No handler is registered for that type. `known` lists the registered types."""

    def __init__(self, type: str, known: Sequence[str]) -> None:
        todo = "restart this process after adding a handler"
        rule = f"no handler is registered for {type!r}; registered: {', '.join(known) or 'none'}; {todo}"
        super().__init__("type", rule)
        self.type = type
        self.known = list(known)


class KeyReused(TinyQueueError):
    """The Idempotency-Key was used before, for a different request. Nothing was stored."""


class QueueFull(TinyQueueError):
    """A submit would exceed TINYQUEUE_MAX_PENDING or MAX_QUEUES. Nothing was stored."""


class NotReplicated(TinyQueueError):
    """The jobs are stored and will run, but on fewer replicas than TINYQUEUE_MIN_REPLICAS.

    A failover now may lose them. `jobs` lists them. Submitting again makes new jobs, except under
    the same Idempotency-Key: that waits for the replicas once more.
    """

    def __init__(self, jobs: Sequence[Job], reached: int, wanted: int) -> None:
        stored = f"job {jobs[0].id} is" if len(jobs) == 1 else f"{len(jobs)} jobs are"
        them = "it" if len(jobs) == 1 else "them"
        super().__init__(f"{stored} stored and will run, but only {reached} of {wanted} replicas have {them} so far")
        self.jobs = list(jobs)


class WrongStatus(TinyQueueError):
    """The job's status does not allow the verb. Nothing was changed. `job` is the current job."""

    def __init__(self, verb: str, job: Job, why: str = "") -> None:
        super().__init__(f"cannot {verb} job {job.id}: {why or f'it is {job.status}'}")
        self.verb = verb
        self.job = job


class Unavailable(TinyQueueError):
    """Redis did not carry out a command.

    `reason` is unreachable, timeout, loading, full, read-only, refused or busy. `doubtful` means
    that a write was sent and its reply was lost: the write may have been applied.
    """

    def __init__(self, reason: str, detail: str, doubtful: bool = False) -> None:
        super().__init__(f"Redis is unavailable ({reason}): {detail}")
        self.reason = reason
        self.doubtful = doubtful


class Corrupted(TinyQueueError):
    """A key holds what TinyQueue never writes. `applied`: all other commands were carried out."""

    applied = False


class Reaped(TinyQueueError):
    """The worker was reaped and its jobs were requeued. It must drop them and register again.

    `parts` are the shards that reaped it. It keeps the jobs of the other shards. Without shards,
    `parts` is empty.
    """

    parts: Sequence[Any] = ()


def translated(error: Exception) -> TinyQueueError:
    """Translate an error of the Redis client."""
    reason, text = explain(error)
    return Unavailable(reason, text) if reason else Corrupted(f"Redis answered: {text}")


# The job --------------------------------------------------------------------------------------------------------------

Status = Literal["pending", "processing", "completed", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = typing.get_args(Status)
UNENDED = STATUSES[:2]
ENDED = STATUSES[2:]
SHOWN = ("id", "type", "payload", "status", "attempts", "maxAttempts", "queue", "createdAt", "updatedAt")
SHOWN_IF_SET = (
    *("runAt", "startedAt", "endedAt", "worker", "progress", "expiresAt", "uniqueKey", "cancelRequested", "suspicions"),
    "logged",
    *("requestId", "traceparent", "limit", "callbackUrl", "callbackJob", "schedule", "scheduledFor", "error"),
    *("after", "waitingFor", "onFailure", "tags", "replayOf", "history"),
)
UNREADABLE = "UnreadableRecord"
HISTORY = 10  # attempts of a job that are kept, including the running or last one
KEPT_MESSAGE = 200  # characters of an error message in the history
KEPT_STACK = 2000  # characters of the end of the traceback of a TimedOut


class Failure(msgspec.Struct, rename="camel", omit_defaults=True):
    """Why an attempt failed. `of` shortens type, message and traceback."""

    type: str
    message: str
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException, traceback: str = "") -> Failure:
        """Describe an exception."""
        return cls(*describe(error, traceback))


class PastAttempt(msgspec.Struct, rename="camel", omit_defaults=True):
    """An attempt in the history of a job. No version may remove a field or change its meaning.

    released: it did not count, because its worker stopped or could not run the job, or because of
    RateLimited. lost: its worker died or was cut off, or it was released too often. The error is
    shortened, and has a traceback only if the handler exceeded its timeout.
    """

    started_at: int
    ended_at: int = 0
    worker: str = ""
    outcome: str = ""  # completed, failed, cancelled, released or lost; in an answer also running
    error: Failure | None = None

    def explain(self, error: Failure | None) -> PastAttempt:
        """Add the error of the attempt."""
        if error:
            stack = error.traceback[-KEPT_STACK:] if error.type == "TimedOut" else ""
            self.error = Failure(error.type, error.message[:KEPT_MESSAGE], stack)
        return self


def _without_trace(error: Failure | None) -> Failure | None:
    return Failure(error.type, error.message) if error else None


class Job(msgspec.Struct, rename="camel", omit_defaults=True, dict=True, forbid_unknown_fields=True):
    """A job as it was when it was read. Times are in milliseconds of Redis TIME, 0 for never.

    The fields are the record. It omits default values, so these are part of the storage format.
    During a deploy, older and newer versions read and write the same records. So a version may
    change the record only in these ways:

    - It may add a field with a default value. Older versions keep it as it is, in `unknown`, and
      work as if it had that value. (Checkouts from before `unknown` was added drop it instead.)
    - It must not rename or remove a field, nor change its type, its default or its meaning.
    - It must not write a new status: older versions could not read the record, and would fail the
      job. One version may learn to read it, and the next one to write it.
    - It must not add a field to Failure or PastAttempt, which have no `unknown`.
    - It adds a sample of its records to tests/records, and leaves those of older versions there.
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
    limit: str = ""
    after: tuple[str, ...] = ()  # its parents
    waiting_for: tuple[str, ...] = ()  # those of them that keep it from starting
    on_failure: Literal["", "run"] = ""  # "run": it starts even if a parent fails or is cancelled
    followed: bool = False  # whether other jobs wait for it
    schedule: str = ""  # name of the schedule that made it, and the time of the tick
    scheduled_for: int = 0
    callback_url: str = ""
    callback_job: str = ""  # id of the delivery of its last end
    replay_of: str = ""  # id of the ended job that was replayed as this one
    tags: tuple[str, ...] = ()
    history: tuple[PastAttempt, ...] = ()  # its former attempts, without the last one of an ended job
    logged: bool = False  # whether lines that it logged are stored
    # The fields of a newer version. In the record they are beside the others, not under this name.
    unknown: dict[str, msgspec.Raw] | None = msgspec.field(default=None, name="*")

    @property
    def created_at(self) -> int:
        """When it was enqueued."""
        return created_at(self.id)

    @property
    def unreadable(self) -> bool:
        """Whether its record cannot be read. Then the payload shows the text of the record."""
        return bool(self.error and self.error.type == UNREADABLE)

    @property
    def retrying(self) -> bool:
        """Whether it is pending after an attempt that failed."""
        return self.status == "pending" and self.error is not None and self.attempts > 0

    def has_expired(self, now: int) -> bool:
        """Whether it was not started in time."""
        return bool(self.expires_at) and not self.started_at and self.expires_at <= now

    def waited(self, now: int) -> int:
        """Milliseconds since a pending job could start. Release, fail and retry set updated_at."""
        return max(0, now - max(self.created_at, self.run_at, self.updated_at))

    def runs_on(self, worker: str) -> bool:
        return self.status == "processing" and self.worker == worker

    def same_attempt(self, other: Job) -> bool:
        """Whether both are the same attempt. Compares times: a retry resets `attempts`."""
        ours = (self.worker, self.attempts, self.refunds, self.started_at)
        return ours == (other.worker, other.attempts, other.refunds, other.started_at)

    def view(self, payload: bytes) -> Job:
        """Return a copy for the handler, with its payload in JSON decoded again.

        What the handler does to it changes nothing stored: only `cancelled` and `set_progress`
        reach the job itself.
        """
        error = msgspec.structs.replace(self.error) if self.error else None
        view = msgspec.structs.replace(self, payload=msgspec.json.decode(payload), error=error, unknown=None)
        view.__dict__["_own"] = self
        return view

    @property
    def cancelled(self) -> bool:
        """Whether this running job was asked to stop. If its handler raises, it ends cancelled."""
        own: Job = self.__dict__.get("_own", self)
        return own.cancel_requested

    def set_progress(self, done: float, of: float = 1.0) -> None:
        """Report from within a handler that `done` of `of` is done.

        Writes to Redis at most once a second; the last value is stored with the outcome. Raises
        Reaped if the worker has lost the job.
        """
        own: Job = self.__dict__.get("_own", self)
        own.progress = self.progress = round(float(min(1.0, max(0.0, done / of))), 4) if of else 1.0
        now = time.monotonic()
        if now - own.__dict__.get("_progress_written", -1.0) >= 1.0 and (queue := own.__dict__.get("_queue")):
            own.__dict__["_progress_written"] = now
            with shield(), suppress(Unavailable):  # an attempt must not fail because of its progress
                queue.write_progress(own)

    def log(self, *values: object) -> None:
        """Add a line to the log of this job from within a handler, with values joined as by print.

        The log is kept if the handler is declared with `logs=True`, or with TINYQUEUE_JOB_LOGS=1.
        """
        if log := self.__dict__.get("_own", self).__dict__.get("_log"):
            log.add("INFO", " ".join(map(str, values)))

    def attempts_so_far(self) -> list[PastAttempt]:
        """Return its last attempts, oldest first, including the running one. At most HISTORY."""
        last = self._last_attempt()
        return [*self.history, *([last] if last else [])][-HISTORY:]

    def _last_attempt(self) -> PastAttempt | None:
        """Return the running attempt or the one that ended the job, unless the history has it.

        Versions without history removed the worker from the jobs that they ended.
        """
        before = self.history[-1].started_at if self.history else 0
        ran = self.status in ("completed", "failed") and not self.failed_because_of("")
        if not self.worker and not (ran and self.started_at > before):
            return None
        attempt = PastAttempt(self.started_at, self.ended_at, self.worker, self.status)
        if self.status == "processing":
            attempt.outcome = "running"
        elif self.status != "completed":
            lost = self.error is not None and self.error.type == "WorkerLost" and self.status == "failed"
            attempt.outcome = "lost" if lost else self.status
            attempt.explain(self.error)
        return attempt

    def leave_attempt(self, outcome: str, now: int, error: Failure | None = None) -> None:
        """Move the running attempt to the history, because another may follow."""
        attempt = PastAttempt(self.started_at, max(now, self.started_at), self.worker, outcome)
        self.history = (*self.history, attempt.explain(error))[-HISTORY:]
        self.worker = ""

    def leave_end(self) -> None:
        """Move the last attempt of an ended job to the history, because the job is requeued."""
        self.history = tuple(self.attempts_so_far())
        self.worker = ""

    def without_traces(self) -> Job:
        """Return a copy without the tracebacks of its errors."""
        history = (msgspec.structs.replace(attempt, error=_without_trace(attempt.error)) for attempt in self.history)
        return msgspec.structs.replace(self, error=_without_trace(self.error), history=tuple(history))

    def parents(self) -> list[Job | None]:
        """Return the jobs in `after`, in that order, with their results, from within a handler.

        None stands for a parent that was purged, or whose record has expired.
        """
        queue = self.__dict__.get("_own", self).__dict__.get("_queue")
        if not queue and self.after:
            raise TinyQueueError(f"job {self.id} was not started by a worker, so its parents cannot be read")
        with shield():
            return [job for job, _ in queue.read_jobs(self.after)] if queue else []

    @property
    def due(self) -> float:
        """When a pending job leaves the delayed ones. One that waits for others does to expire."""
        return (self.expires_at or math.inf) if self.waiting_for else self.run_at

    def may_follow(self, status: str) -> bool:
        """Whether it need not wait for a parent of that status."""
        return status == "completed" or (status in ENDED and self.on_failure == "run")

    def failed_because_of(self, parent: str) -> bool:
        """Whether it failed because that parent did, and not because of its own attempts."""
        cause = self.error if self.status == "failed" else None
        return cause is not None and cause.type == "DependencyFailed" and parent in cause.message

    def fail_as(self, stored: Job) -> None:
        """Take over from the stored job how it failed."""
        self.status = "failed"
        self.error = stored.error
        self.ended_at = self.updated_at = stored.ended_at

    def again(self) -> dict[str, Any]:
        """Return the options with which `make_job` makes this job again, without its times."""
        names = ("queue", "max_attempts", "unique_key", "after", "on_failure", "callback_url", "tags")
        return {"payload": self.payload, **{name: value for name in names if (value := getattr(self, name))}}

    def place(self) -> tuple[int, str]:
        """Its place in a listing: by when it ended, or was created if it has not ended."""
        return self.ended_at if self.status in ENDED else self.created_at, self.id

    def log_fields(self) -> dict[str, Any]:
        """The fields of every log line about the job."""
        fields: dict[str, Any] = {"job": self.id, "type": self.type, "queue": self.queue}
        fields |= {"attempt": self.attempts, "worker": self.worker}
        origin = {"requestId": self.request_id, "traceparent": self.traceparent}
        return fields | {name: value for name, value in origin.items() if value}

    def answer(self) -> dict[str, Any]:
        """The job as clients see it: the fields in SHOWN, and the others if they are set."""
        fields = dict(zip(self.__struct_encode_fields__, msgspec.structs.astuple(self), strict=True))
        fields |= {"createdAt": self.created_at, "updatedAt": self.updated_at or self.created_at}
        fields |= {"after": list(self.after), "waitingFor": list(self.waiting_for)}
        fields |= {"tags": list(self.tags), "history": self.attempts_so_far()}
        set_now = [name for name in SHOWN_IF_SET if fields[name]] + ["result"] * (self.status == "completed")
        return {name: fields[name] for name in (*SHOWN, *set_now)}


class Attempt(msgspec.Struct, rename="camel"):
    """The part of a record that identifies an attempt. It is cheap to decode."""

    status: str = "pending"
    worker: str = ""
    attempts: int = 0
    refunds: int = 0
    started_at: int = 0
    cancel_requested: bool = False
    followed: bool = False
    logged: bool = False


_decode_job = msgspec.json.Decoder(Job).decode
_decode_attempt = msgspec.json.Decoder(Attempt).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_KNOWN = frozenset(field.encode_name for field in msgspec.structs.fields(Job) if field.name != "unknown")
_ID_PART = len('{"id":"') + 36 + len('",')  # how an encoded job begins; a record leaves this out


def record_of(job: Job) -> bytes:
    if not job.unknown:
        return b"{" + encode(job)[_ID_PART:]
    known = encode(msgspec.structs.replace(job, unknown=None))[_ID_PART:-1]
    return b"{" + known + b"," + encode(job.unknown)[1:]


def read_job(id: str, record: bytes, decode: Callable[[bytes], Job] = _decode_job) -> Job:
    """Read a record. An unreadable one becomes a failed job that shows it, so no reader crashes."""
    try:
        encoded = b'{"id":"%b",%b' % (id.encode(), record[1:])
        try:
            job = decode(encoded)
        except msgspec.ValidationError:
            job = _read_newer(encoded, decode)
        if job.id != id:
            raise msgspec.DecodeError("a record must not hold an id")
        return job
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = record[:10_000].decode("utf-8", "backslashreplace")
        return Job(id, "unreadable", text, status="failed", error=Failure(UNREADABLE, str(error)))


def _read_newer(encoded: bytes, decode: Callable[[bytes], Job]) -> Job:
    """Read a job that has fields of a newer version. Keep these as they are."""
    fields = _decode_fields(encoded)
    job = decode(encode({name: value for name, value in fields.items() if name in _KNOWN}))
    job.unknown = _unknown(fields)
    return job


def _unknown(fields: Mapping[str, msgspec.Raw]) -> dict[str, msgspec.Raw] | None:
    # Copied, because a Raw keeps the whole record in memory.
    return {name: value.copy() for name, value in fields.items() if name not in _KNOWN} or None


def note_record(job: Job, record: bytes) -> bytes:
    """Note the record that is stored of a running job, and return it."""
    job.__dict__["_record"] = record
    return record


def attempt_in(record: bytes | None, job: Job) -> Attempt | None:
    """Return the attempt in a record if it is still the one in which this job was started.

    If somebody else has changed the record since `note_record`, the job takes over the fields of
    newer versions.
    """
    try:
        stored = _decode_attempt(record or b"{}")
    except (msgspec.DecodeError, RecursionError):
        return None
    marks = stored.cancel_requested, stored.followed, stored.logged
    if stored != Attempt("processing", job.worker, job.attempts, job.refunds, job.started_at, *marks):
        return None
    if record and record != job.__dict__.get("_record"):
        job.unknown = _unknown(_decode_fields(record))
    return stored


def stopped(job: Job, now: int) -> Job:
    """Return a job as if a worker had released it without an attempt."""
    job = msgspec.structs.replace(job)
    if job.status == "processing":
        job.leave_attempt("cancelled" if job.cancel_requested else "released", now)
        job.status = "cancelled" if job.cancel_requested else "pending"
        job.attempts = max(0, job.attempts - 1)
        job.run_at = 0
        job.updated_at = max(now, job.updated_at)
    if job.status in ENDED:
        job.ended_at = job.ended_at or now
    return job


# Listings -------------------------------------------------------------------------------------------------------------


class _Listed(Job):
    """A job whose payload and result are not decoded."""

    payload: msgspec.Raw
    result: msgspec.Raw = msgspec.Raw(b"null")


_decode_listed = msgspec.json.Decoder(_Listed).decode


def listed_job(id: str, record: bytes, cut: int | None) -> Job:
    """Read a record. With `cut`, payload and result stay JSON: a Raw, or a Preview of that size."""
    if cut is None:
        return read_job(id, record)

    def decode(text: bytes) -> Job:
        job = _decode_listed(text)
        return msgspec.structs.replace(job, payload=Preview.of(job.payload, cut), result=Preview.of(job.result, cut))

    job = read_job(id, record, decode)
    if not isinstance(job, _Listed):  # the record cannot be read
        job.payload = Preview.of(encode(job.payload), cut)
    return job


def stored_job(id: str, record: bytes) -> Job:
    """Read a record. Payload and result stay JSON, a Raw, unless the record cannot be read.

    Then it becomes a failed job that shows the record, and its payload is a text.
    """
    return read_job(id, record, _decode_stored)


def _decode_stored(text: bytes) -> Job:
    str(text, "utf-8")  # raises UnicodeDecodeError: nothing else reads what stays JSON
    return _decode_listed(text)


FILTER_NAMES = {"error_type": "errorType"}  # field of Filter -> name in JSON, where it differs


class Filter(NamedTuple):
    """Which jobs a listing returns or a bulk change touches: those that match all that is given."""

    status: Status | None = None
    type: str | None = None
    queue: str | None = None
    error_type: str | None = None
    tag: str | None = None
    text: str | None = None  # in the JSON of the payload; case does not matter

    def check(self) -> Filter:
        """Return the filter. Raises InvalidJob for text that is not Unicode: no job can have it."""
        for field, value in self._asdict().items():
            if value and re.search("[\ud800-\udfff]", value):
                raise InvalidJob(FILTER_NAMES.get(field, field), "must be valid Unicode, without lone surrogates")
        return self

    def matches(self, job: Job, record: bytes) -> bool:
        values = (job.status, job.type, job.queue, job.error.type if job.error else None)
        same = all(wanted is None or wanted == value for wanted, value in zip(self[:4], values, strict=True))
        return same and (self.tag is None or self.tag in job.tags) and (self.text is None or self._is_in(record))

    def _is_in(self, record: bytes) -> bool:
        """Whether the payload of a record has the text: as it is, escaped, or without spaces."""
        text = str(self.text)
        spellings = {text, encode(text).decode()[1:-1], re.sub(r"([:,])\s+", r"\1", text)}
        payload = _payload_in(record).decode("utf-8", "replace").casefold()
        return any(spelling.casefold() in payload for spelling in spellings)


class Page(tuple[list[Job], str]):
    """The jobs of a listing, and the cursor of the next page. `scanned` jobs were looked at."""

    scanned: int

    def __new__(cls, jobs: list[Job], cursor: str, scanned: int) -> Page:
        page = super().__new__(cls, (jobs, cursor))
        page.scanned = scanned
        return page


class _Payload(msgspec.Struct):
    payload: msgspec.Raw


_decode_payload = msgspec.json.Decoder(_Payload).decode


def _payload_in(record: bytes) -> bytes:
    """Return the JSON of the payload, or the whole record if it cannot be read."""
    try:
        return bytes(_decode_payload(record).payload)
    except (msgspec.DecodeError, RecursionError):
        return record


CURSOR = re.compile(r"([0-9]{1,16})\.([0-9a-g-]{1,36})")
Entry = tuple[int, str, tuple[Status, ...]]  # of a listing: when, id, and the statuses of such an entry
Place = tuple[int, str]  # in the order of a listing


def place_of(cursor: str) -> Place:
    """Read a cursor. Raises InvalidJob if no listing returned it."""
    match = CURSOR.fullmatch(cursor)
    if not match:
        raise InvalidJob("cursor", "must be a cursor returned by a listing")
    return int(match[1]), match[2]


def ids_in(entries: Iterable[bytes]) -> list[str]:
    """Return the ids among the entries of a list, each once."""
    return list(dict.fromkeys(filter(ID.fullmatch, map(text_of, entries))))


# What verbs take and return -------------------------------------------------------------------------------------------

KEY_REUSED = "this Idempotency-Key was used for another request"


class Once(msgspec.Struct):
    """A submit under an Idempotency-Key. submit sets `replayed` if the key made jobs before."""

    key: str
    fingerprint: str
    replayed: bool = False


class Made(msgspec.Struct):
    """What an Idempotency-Key stores: the fingerprint of the first submit, and its jobs."""

    fingerprint: str
    ids: list[str]


def read_made(stored: bytes) -> Made:
    """Read what an Idempotency-Key stores. Raises Corrupted if that cannot be read."""
    try:
        return msgspec.json.decode(stored, type=Made)
    except msgspec.DecodeError as error:
        raise Corrupted(f"the record of an Idempotency-Key cannot be read: {error}") from None


class Outcome(NamedTuple):
    """How an attempt ended. `after`: seconds until the next; None: never, or released: now.

    `halt`: nothing may start under the limit of the released job for `after` seconds.
    """

    job: Job
    verb: Literal["complete", "fail", "release"]
    result: Any = None
    error: Failure | None = None
    after: float | None = None
    halt: bool = False


class Loaded(NamedTuple):
    """What `load` did. Jobs in neither list were there already, or have ended too long ago.

    `jobs` are stored now. The uniqueKeys of `taken` belong to other jobs. If there are `unpaused`
    queues, nothing was stored.
    """

    jobs: list[Job]
    taken: list[str]
    unpaused: list[str]


# Users import these classes from tinyqueue, so tracebacks and pickles must name that module.
for _defined in [value for value in globals().values() if isinstance(value, type) and value.__module__ == __name__]:
    _defined.__module__ = "tinyqueue"
