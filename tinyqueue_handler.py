"""Handlers, their limits, and the checks of what a client sends.

This module knows no queue. tinyqueue.py imports all of it, and users import it from there.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import random
import re
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from graphlib import CycleError, TopologicalSorter
from typing import Any, Concatenate, Generic, Literal, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import msgspec

from tinyqueue_job import (
    DELIVERIES,
    ID,
    KEY_LENGTH,
    MAX_AFTER,
    MAX_ATTEMPTS,
    MAX_DELAY,
    MAX_TAGS,
    NAME,
    PRINTABLE,
    TAG_LENGTH,
    URL,
    URL_LENGTH,
    URL_RULE,
    InvalidJob,
    Job,
)
from tinyqueue_json import Mismatch, encode, epoch_ms, is_number, new_id, parser, to_json

# Handlers -------------------------------------------------------------------------------------------------------------

P = TypeVar("P")
A = ParamSpec("A")
R = TypeVar("R")


class Enqueues(Protocol):
    """What a handler needs of a queue."""

    def enqueue(self, type: str, payload: Any, **options: Any) -> Job: ...


HANDLERS: dict[str, Handler[Any, Any, Any]] = {}
BUILT_IN = ("http", "webhook")  # types whose handlers are in tinyqueue_http.py


class Handler(Generic[P, A, R]):
    """A function that runs jobs of one type. It can still be called directly."""

    def __init__(self, function: Callable[Concatenate[P, A], R], type: str, options: Mapping[str, Any]) -> None:
        self.function = function
        self.type = type
        self.__doc__ = function.__doc__
        self.max_attempts: int = _whole("maxAttempts", options["max_attempts"], 1, MAX_ATTEMPTS)
        self.timeout: float | None = options["timeout"]
        self.backoff: float = options["backoff"]
        self.backoff_cap: float = options["backoff_cap"]
        self.queue: str = check_name("queue", options["queue"])
        self.schedule: str = options["schedule"]
        self.timezone: str = options["timezone"]
        self.payload_type, self.wants_job = _signature(function)
        self._parse = parser(self.payload_type)
        self.max_running = int(options["max_running"] or 0)
        self.rate: str = options["rate"]
        self.limit_by: str = options["limit_by"]
        self.logs = bool(options["logs"])
        self.limited = bool(self.max_running or self.rate)
        if self.limit_by and self.limit_by not in (known := _fields_of(self.payload_type, self.limit_by)):
            raise TypeError(f"handler {type!r}: limit_by must be a field of the payload, one of {', '.join(known)}")

    def __call__(self, payload: P, *args: A.args, **kwargs: A.kwargs) -> R:
        return self.function(payload, *args, **kwargs)

    def enqueue(self, queue: Enqueues, payload: P, /, **options: Any) -> Job:
        """Enqueue a job of this type; mypy checks the payload too. Options as for `make_job`."""
        return queue.enqueue(self.type, payload, **options)

    def parse(self, payload: bytes) -> P:
        """Decode a payload as the handler's type. Raises InvalidJob with the path of a mismatch."""
        try:
            return cast(P, self._parse(payload))
        except Mismatch as error:
            raise InvalidJob("payload", error.rule, error.path) from None

    def bind(self, job: Job) -> Callable[[], Any]:
        """Return the call of the function for a started job. Raises InvalidJob like `parse`."""
        encoded = encode(job.payload)
        payload = self.parse(encoded)
        function: Callable[..., Any] = self.function
        return partial(function, payload, job.view(encoded)) if self.wants_job else partial(function, payload)

    def run(self, job: Job) -> Any:
        """Call the function for a started job."""
        return self.bind(job)()


def handler(
    type: str,
    *,
    max_attempts: int = 3,
    timeout: float | None = 300,
    backoff: float = 1.0,
    backoff_cap: float = 300.0,
    queue: str = "default",
    schedule: str = "",
    timezone: str = "UTC",
    max_running: int = 0,
    rate: str = "",
    limit_by: str = "",
    logs: bool = False,
) -> Callable[[Callable[Concatenate[P, A], R]], Handler[P, A, R]]:
    """Register a function as the handler of jobs of `type`.

    Its first parameter must be annotated with the payload's type: a dataclass, TypedDict, msgspec
    Struct or anything else that msgspec can read from JSON. Payloads are checked against it when a
    job is submitted and again before it runs. An optional second parameter, annotated `Job`,
    receives the job. The return value, as JSON, is the job's result.

    `timeout` is in seconds; None means unlimited. After failed attempt n the job waits for
    `backoff` * 2 ** (n - 1) seconds or up to half as much again, but not longer than `backoff_cap`.
    Waits that would be longer are spread between two thirds of `backoff_cap` and all of it.

    At most `max_running` jobs of the type run at a time over all workers, and at most `rate` start
    in any second, minute, hour or day, such as "10/second". With `limit_by`, the name of a field of
    the payload, both apply to each value of that field separately. Jobs without room are held, and
    delay no job of another limit. `logs` keeps what the function logs with `logging` and `job.log`.

    `schedule` is a cron expression: workers enqueue a job with the payload {} whenever it matches
    in `timezone`. The function `schedule` has more options. Mistakes raise TypeError or InvalidJob
    when the module is imported.
    """
    if callable(type):
        raise TypeError("handler needs the type of the jobs: write @handler('send-email'), not @handler")
    check_name("type", type)
    _check_times(type, timeout, backoff, backoff_cap)
    _check_limit(type, max_running, rate, limit_by)
    options: dict[str, Any] = {"max_attempts": max_attempts, "queue": queue, "schedule": schedule, "timezone": timezone}
    options |= {"timeout": timeout, "backoff": backoff, "backoff_cap": backoff_cap, "logs": logs}
    options |= {"max_running": max_running, "rate": rate, "limit_by": limit_by}

    def register(function: Callable[Concatenate[P, A], R]) -> Handler[P, A, R]:
        _refuse_another(type, function)
        made = HANDLERS[type] = Handler(function, type, options)
        return made

    return register


def _check_times(type: str, timeout: Any, backoff: Any, backoff_cap: Any) -> None:
    if not all(is_number(value) for value in (300 if timeout is None else timeout, backoff, backoff_cap)):
        raise TypeError(f"handler {type!r}: timeout, backoff and backoff_cap must be numbers of seconds")
    if timeout is not None and not timeout > 0:
        raise TypeError(f"handler {type!r}: timeout must be above 0, or None")
    if not 0 < backoff <= backoff_cap <= MAX_DELAY:
        raise TypeError(f"handler {type!r}: backoff must be above 0, backoff_cap at least that and at most {MAX_DELAY}")


def _check_limit(type: str, max_running: Any, rate: Any, limit_by: Any) -> None:
    try:
        Override(max_running or None, rate).check()
    except InvalidJob as error:
        python = "max_running" if error.field == "maxRunning" else error.field
        raise TypeError(f"handler {type!r}: {python} {error.rule}") from None
    if not isinstance(limit_by, str):
        raise TypeError(f"handler {type!r}: limit_by must be the name of a field of the payload")
    if limit_by and not max_running and not rate:
        raise TypeError(f"handler {type!r}: limit_by needs max_running or rate")


def _fields_of(type: Any, name: str) -> list[str]:
    """Return the JSON names of a payload's fields, or only `name` if the type declares none."""
    about = msgspec.inspect.type_info(type)
    return [field.encode_name for field in getattr(about, "fields", ())] or [name]


def _refuse_another(type: str, function: Callable[..., Any]) -> None:
    """Raise TypeError if a type has another handler. A reload declares the same function again."""
    if type in HANDLERS and _source(HANDLERS[type].function) != _source(function):
        todo = "; this type is built in: choose another name" if type in BUILT_IN else ""
        raise TypeError(f"two handlers are declared for type {type!r}{todo}")


def _source(function: Callable[..., Any]) -> tuple[str, str, int]:
    return function.__module__, function.__qualname__, function.__code__.co_firstlineno


def _signature(function: Callable[..., Any]) -> tuple[Any, bool]:
    """Return the type of a handler's payload, and whether the handler takes the job too."""
    name = f"handler {function.__name__}"
    kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
    if any(is_kind(function) for is_kind in kinds):
        why = "a call would not run its body"
        raise TypeError(f"{name} must be a plain function, not async and not a generator: {why}")
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = list(inspect.signature(function).parameters.values())
    if not 1 <= len(parameters) <= 2 or parameters[0].name not in hints:
        raise TypeError(f"{name} must take an annotated payload and, optionally, a Job")
    if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
        raise TypeError(f"{name} must take its parameters by position")
    if len(parameters) == 2 and hints.get(parameters[1].name) is not Job:
        raise TypeError(f"the second parameter of {name} must be annotated Job")
    return hints[parameters[0].name], len(parameters) == 2


class Retry(Exception):
    """Raised by a handler to fail this attempt. Retry in `after` seconds, or after the backoff."""

    def __init__(self, reason: str = "the handler asked for a retry", *, after: float | None = None) -> None:
        if after is not None and not is_delay(after):
            raise ValueError(f"Retry: after must be a number of seconds from 0 to {MAX_DELAY}")
        super().__init__(reason)
        self.after = after


class Discard(Exception):
    """Raised by a handler to fail the job now, even if attempts are left."""


class RateLimited(Exception):
    """Raised by a handler whose work was refused for now, such as by a service that answers 429.

    The attempt does not count. For `after` seconds, no job starts under the limit of this job. If
    its type has no limit, only this job waits.
    """

    def __init__(self, reason: str = "the rate limit of a service was reached", *, after: float) -> None:
        if not is_delay(after) or not after:
            raise ValueError(f"RateLimited: after must be a number of seconds above 0, at most {MAX_DELAY}")
        super().__init__(reason)
        self.after = after


class TimedOut(BaseException):
    """Raised in a handler that exceeds its timeout. `except Exception` does not catch it."""

    def __str__(self) -> str:
        return "the handler exceeded its timeout"


def backoff(attempts: int, base: float = 1.0, cap: float = 300.0) -> float:
    """Return the seconds to wait after that attempt: doubling from `base` to `cap`, with jitter.

    The jitter is up to a third of the wait, at the cap too, so that jobs that failed together do
    not come back together.
    """
    longest = min(cap, base * 2 ** min(attempts - 1, 60) * 1.5)
    return random.uniform(max(min(base, cap), longest / 1.5), longest)


# Limits ---------------------------------------------------------------------------------------------------------------

VALUE = re.compile(r"[A-Za-z0-9._-]{1,64}")  # of a limit_by field; a digest replaces all other values
LIMIT = re.compile(rf"{NAME.pattern}(?:/{VALUE.pattern})?")
RATE = re.compile(r"([1-9][0-9]{0,3}|10000)/(second|minute|hour|day)")
PERIODS = {"second": 1000, "minute": 60_000, "hour": 3_600_000, "day": 86_400_000}
MAX_RUNNING = 10_000


class Override(msgspec.Struct, rename="camel", omit_defaults=True):
    """What an operator has set for a limit, in place of the numbers in the code."""

    max_running: int | None = None
    rate: str = ""
    paused: bool = False

    def check(self) -> Override:
        """Raise InvalidJob for values that no limit can have."""
        if self.max_running is not None:
            self.max_running = _whole("maxRunning", self.max_running, 1, MAX_RUNNING)
        if not isinstance(self.rate, str) or (self.rate and not RATE.fullmatch(self.rate)):
            raise InvalidJob(
                "rate", 'must be a number up to 10000 and second, minute, hour or day, such as "10/second"'
            )
        if not isinstance(self.paused, bool):
            raise InvalidJob("paused", "must be true or false")
        return self


class Rule(NamedTuple):
    """What a limit allows: `max_running` jobs at a time, and `starts` in `period` milliseconds."""

    max_running: float = math.inf
    starts: int = 0
    period: int = 0
    paused: bool = False

    def answer(self) -> dict[str, Any]:
        """Return the numbers as clients see them, None for unlimited."""
        period = next((name for name, ms in PERIODS.items() if ms == self.period), "")
        return {
            "maxRunning": None if self.max_running == math.inf else int(self.max_running),
            "rate": f"{self.starts}/{period}" if self.starts else None,
            "paused": self.paused,
        }


def limit_of(job: Job) -> str:
    """Return the limit of a job, or "". A job from before the limit was declared gets one too."""
    known = HANDLERS.get(job.type)
    if job.limit or not known or not known.limited:
        return job.limit
    if not known.limit_by:
        return job.type
    value = job.payload.get(known.limit_by) if isinstance(job.payload, dict) else None
    text = value if isinstance(value, str) else encode(value).decode()
    short = text if VALUE.fullmatch(text) else hashlib.sha256(text.encode()).hexdigest()[:32]
    return f"{job.type}/{short}"


def check_limit(limit: str) -> str:
    if not LIMIT.fullmatch(limit):
        raise InvalidJob("limit", "must be a type, or a type and a value: type/value")
    return limit


def read_override(limit: str, fields: Mapping[str, Any]) -> Override:
    """Check the fields that an operator sets for a limit or a type. Raises InvalidJob."""
    names = {name for field in msgspec.structs.fields(Override) if (name := field.encode_name)}
    if unknown := fields.keys() - names:
        raise InvalidJob(min(unknown), f"unknown field; the fields of a limit are {', '.join(sorted(names))}")
    values = {name: value for name, value in fields.items() if value is not None}
    override = Override(values.get("maxRunning"), values.get("rate", ""), values.get("paused", False)).check()
    known = HANDLERS.get(limit.partition("/")[0])
    if override == Override():
        return override
    if not known or not known.limited:
        limited = ", ".join(sorted(type for type, handler in HANDLERS.items() if handler.limited)) or "none"
        raise InvalidJob("limit", f"no handler of this process declares one for its type; types with one: {limited}")
    for field, declared in {"maxRunning": known.max_running, "rate": known.rate}.items():
        if field in values and not declared:
            raise InvalidJob(field, "is not declared by the handler; declare it there first")
    return override


def rule_of(limit: str, overrides: Iterable[bytes | None]) -> Rule:
    """Return what a limit allows. `overrides` are that of its type and its own, in this order.

    The numbers are those of this process's code. A process without the handler starts one job at a
    time, and returns it like any job of an unknown type. If the handler declares no limit, all
    jobs may start. An override that cannot be read pauses its limit, and stops no other type.
    """
    known = HANDLERS.get(limit.partition("/")[0])
    if not known:
        return Rule(1)
    if not known.limited:
        return Rule()
    max_running = known.max_running
    rate = known.rate
    paused = False
    for override in (stored_override(stored) for stored in overrides if stored):
        max_running = (override.max_running or max_running) if max_running else 0
        rate = (override.rate or rate) if rate else ""
        paused = paused or override.paused
    starts, _, period = rate.partition("/")
    return Rule(max_running or math.inf, int(starts or 0), PERIODS.get(period, 0), paused)


def stored_override(stored: bytes) -> Override:
    try:
        return msgspec.json.decode(stored, type=Override).check()
    except (msgspec.DecodeError, UnicodeDecodeError, InvalidJob):
        return Override(paused=True)


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
    after: Iterable[str | Job] | None = None,
    on_failure: Literal["fail", "run"] | None = None,
    callback_url: str | None = None,
    tags: Iterable[str] | None = None,
) -> Job:
    """Check the parts of a job and make it. Raises InvalidJob with the field and the rule.

    Defaults come from the handler's declaration, if this process has it. A job that was not started
    within `expires_in` seconds fails when its turn comes. While a job with the same `unique_key` is
    pending or processing, submit returns that job and stores no other. The job starts when the jobs
    in `after` have completed: jobs, ids, or drafts of the same batch. If one of them fails or is
    cancelled, this job fails with DependencyFailed, or with `on_failure="run"` it starts anyway.
    When the job ends, a job of type webhook sends its end to `callback_url`. Listings can find the
    job by its `tags`, up to 10 short texts.
    """
    known = HANDLERS.get(check_name("type", type))
    encoded = _encode_payload(payload)
    if known:
        known.parse(encoded)
    own = (known.max_attempts, known.queue) if known else (3, "default")
    starts_at = _first_run(delay, run_at, now)
    job = Job(
        id=new_id(now),
        type=type,
        payload=payload,
        max_attempts=_whole("maxAttempts", own[0] if max_attempts is None else max_attempts, 1, MAX_ATTEMPTS),
        queue=check_name("queue", own[1] if queue is None else queue),
        run_at=starts_at,
        expires_at=_expiry(expires_in, now, starts_at),
        unique_key=_text_key("uniqueKey", unique_key) if unique_key is not None else "",
        after=_parents(after) if after is not None else (),
        on_failure=_on_failure(on_failure) if on_failure is not None else "",
        callback_url=check_url("callbackUrl", callback_url) if callback_url is not None else "",
        tags=_tags(tags) if tags is not None else (),
    )
    if known and known.limited:
        job.limit = limit_of(msgspec.structs.replace(job, payload=msgspec.json.decode(encoded)))
    return job


def _encode_payload(payload: Any) -> bytes:
    try:
        return to_json(payload)
    except ValueError as error:
        raise InvalidJob("payload", str(error)) from None


def check_name(field: str, value: Any) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise InvalidJob(field, "must be 1 to 100 of the characters A-Z a-z 0-9 . _ -")
    return value


def check_url(field: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > URL_LENGTH or not URL.fullmatch(value):
        raise InvalidJob(field, URL_RULE)
    return value


def _text_key(field: str, value: Any) -> str:
    if not isinstance(value, str) or not PRINTABLE.fullmatch(value) or len(value) > KEY_LENGTH:
        raise InvalidJob(field, f"must be 1 to {KEY_LENGTH} printable characters")
    return value


def _parents(after: Any) -> tuple[str, ...]:
    if isinstance(after, str | bytes | Mapping) or not isinstance(after, Iterable):
        raise InvalidJob("after", "must be a list of job ids")
    ids = [parent.id if isinstance(parent, Job) else parent for parent in after]
    if len(ids) > MAX_AFTER:
        raise InvalidJob("after", f"must be at most {MAX_AFTER} jobs")
    if wrong := [id for id in ids if not isinstance(id, str) or not ID.fullmatch(id)]:
        rule = "must be a list of job ids, or of refs in a batch"
        raise InvalidJob("after", f"{rule}; {ascii(wrong[0])[:80]} is neither")
    return tuple(dict.fromkeys(ids))


def _tags(tags: Any) -> tuple[str, ...]:
    rule = f"must be a list of up to {MAX_TAGS} texts of 1 to {TAG_LENGTH} printable characters"
    if isinstance(tags, str | bytes | Mapping) or not isinstance(tags, Iterable):
        raise InvalidJob("tags", rule)
    found = list(tags)
    texts = all(isinstance(tag, str) and PRINTABLE.fullmatch(tag) and len(tag) <= TAG_LENGTH for tag in found)
    if len(found) > MAX_TAGS or not texts:
        raise InvalidJob("tags", rule)
    return tuple(dict.fromkeys(found))


def _on_failure(value: Any) -> Literal["", "run"]:
    if value not in ("fail", "run"):
        raise InvalidJob("onFailure", "must be fail or run")
    return "run" if value == "run" else ""


def is_delay(value: Any) -> bool:
    """Whether a job may be delayed by that many seconds."""
    return is_number(value) and 0 <= value <= MAX_DELAY


def _whole(field: str, value: Any, low: int, high: int) -> int:
    if not is_number(value) or not low <= value <= high or value % 1:
        raise InvalidJob(field, f"must be a whole number from {low} to {high}")
    return int(value)


def _first_run(delay: float | None, run_at: Any, now: int) -> int:
    """Return when a job with that `delay` or `runAt` may start. 0 means now."""
    at: int | None = 0
    if delay is not None and run_at is not None:
        raise InvalidJob("delay", "must not be given together with runAt")
    if run_at is not None:
        at = epoch_ms(run_at)
        if at is None or at > now + MAX_DELAY * 1000:
            rule = "must be ISO 8601 with a zone, or milliseconds since 1970, and at most"
            raise InvalidJob("runAt", f"{rule} {MAX_DELAY // 86400} days ahead")
    if delay is not None:
        if not is_delay(delay):
            raise InvalidJob("delay", f"must be a number of seconds from 0 to {MAX_DELAY}")
        at = now + round(delay * 1000)
    return at if at and at > now else 0


def _expiry(seconds: float | None, now: int, starts_at: int) -> int:
    if seconds is None:
        return 0
    if not is_delay(seconds) or not seconds:
        raise InvalidJob("expiresIn", f"must be a number of seconds above 0, at most {MAX_DELAY}")
    expires_at = now + max(1, round(seconds * 1000))
    if starts_at >= expires_at:
        raise InvalidJob("expiresIn", "must end after the job may start: raise it, or lower delay or runAt")
    return expires_at


# Parents --------------------------------------------------------------------------------------------------------------

MAX_LINKS = 10_000  # parents of all jobs of a batch


def outer_parents(after: Mapping[str, Iterable[str]], own: Collection[str]) -> list[str]:
    """Return the parents that are not in the batch itself. Raises InvalidJob for too many."""
    links = [id for ids in after.values() for id in ids]
    if len(links) > MAX_LINKS:
        raise InvalidJob("after", f"must be at most {MAX_LINKS} ids in all jobs of a batch")
    return [id for id in dict.fromkeys(links) if id not in own]


def set_parents(new: Sequence[Job], after: Mapping[str, Sequence[str]], kept: Mapping[str, str]) -> list[str]:
    """Set `after` of the new jobs of a batch. Return the parents that are not among them.

    `kept` has the ids of the jobs that are kept in place of drafts. Raises InvalidJob if jobs wait
    for each other in a circle.
    """
    for job in new:
        job.after = tuple(dict.fromkeys(kept.get(id, id) for id in after.get(job.id, ())))
    places = {job.id: str(place) for place, job in enumerate(new)}
    try:
        TopologicalSorter({job.id: [id for id in job.after if id in places] for job in new}).prepare()
    except CycleError as error:
        circle = ", ".join(places[id] for id in error.args[1])
        raise InvalidJob("after", f"these jobs of the batch wait for each other in a circle: {circle}") from None
    return outer_parents({job.id: job.after for job in new}, places)


def check_parents(ids: Sequence[str], found: Collection[str]) -> None:
    """Raise InvalidJob if a parent of new jobs was not found."""
    if missing := [id for id in ids if id not in found]:
        raise InvalidJob("after", f"job {missing[0]} does not exist: its id is wrong, or it was purged or expired")


# Deliveries -----------------------------------------------------------------------------------------------------------

# Fields of a job that its delivery contains if the job has them.
REPORTED = ("id", "type", "queue", "status", "attempts", "createdAt", "endedAt", "requestId", "result", "error")


def delivery_of(job: Job, now: int) -> Job:
    """Make the job that delivers the end of a job to its callbackUrl. Both are in one shard."""
    answer = job.answer()
    data = {name: answer[name] for name in REPORTED if name in answer}
    if job.error:
        data["error"] = {"type": job.error.type, "message": job.error.message}
    at = datetime.fromtimestamp(job.ended_at / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    event = {"type": f"job.{job.status}", "timestamp": at, "data": data}
    delivery = Job(
        id=new_id(now)[:-2] + job.id[-2:],
        type="webhook",
        payload={"url": job.callback_url, "host": host_of(job.callback_url), "event": event},
        max_attempts=DELIVERIES,
        queue="webhooks",
        request_id=job.request_id,
        traceparent=job.traceparent,
    )
    delivery.limit = limit_of(delivery)
    return delivery


def host_of(url: str) -> str:
    """Return the host of a URL, with the port if that is not the scheme's own."""
    parts = URL.fullmatch(url)
    if not parts:
        return ""
    own = {"http": "80", "https": "443"}[parts["scheme"].lower()]
    port = f":{parts['port']}" if parts["port"] not in (None, own) else ""
    return f"{parts['host'].lower()}{port}"


# Users import these classes from tinyqueue, so tracebacks and pickles must name that module.
for _defined in [value for value in globals().values() if isinstance(value, type) and value.__module__ == __name__]:
    _defined.__module__ = "tinyqueue"
