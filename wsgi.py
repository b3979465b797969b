"""The HTTP API, and the server that serves it.

    python wsgi.py       serve on HOST and PORT until SIGTERM or SIGINT; without REDIS_URL with an embedded Redis and workers
    wsgi:app             the same API for any other WSGI or serverless host
    tinyqueue.wsgi:app   the same API where TinyQueue is installed

Importing this module reads no setting and opens no connection: `app` does both at its first request. JSON goes in and comes out;
an error is application/problem+json (RFC 9457). The one page, dashboard.html at /, is a client like any other.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache, cached_property, lru_cache, partial
from http import HTTPStatus
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qsl, quote, urlsplit

import bottle
import click
import msgspec
import waitress
from bottle import request
from waitress import wasyncore
from waitress.channel import HTTPChannel

from tinyqueue import (
    BUCKETS,
    ENDED,
    HANDLERS,
    ID,
    MAX_DEPTH,
    MAX_JOBS,
    NAME,
    SERIES,
    STATUSES,
    UNENDED,
    AnyQueue,
    Corrupted,
    Filter,
    InvalidJob,
    Job,
    KeyReused,
    NotReplicated,
    Once,
    QueueFull,
    SettingsError,
    TinyQueueError,
    Unavailable,
    UnknownType,
    WrongStatus,
    __version__,
    from_json,
    load_handlers,
)
from tinyqueue_config import LOG_CONTEXT, WEB_THREADS, Settings, open_queue, set_up_logging
from tinyqueue_doctor import warnings

log = logging.getLogger("tinyqueue.web")

CONNECTIONS = 500  # beyond these, new ones wait unanswered in the backlog; idle keep-alives count
RETRY_AFTER = 5  # seconds
LONGEST_WAIT = 25  # seconds that GET /jobs/<id>?wait= may take: routers give up after 30
CUT = 500  # bytes of a payload or a result in a listing
SIGNALS = (signal.SIGTERM, signal.SIGINT)
REQUEST_ID = re.compile("[!-~]{1,128}")
TRACEPARENT = re.compile(
    "(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)  # W3C Trace Context


# Problems -------------------------------------------------------------------------------------------------------------


class Problem(Exception):
    """A request that cannot be answered. `more` goes into the answer's body, `headers` into its head."""

    def __init__(
        self, status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.headers, self.more = status, kind, headers or {}, more

    def body(self) -> dict[str, Any]:
        title = self.kind.replace("-", " ").capitalize()
        return {
            "type": f"urn:tinyqueue:{self.kind}",
            "title": title,
            "status": self.status,
            "detail": str(self),
        } | self.more

    def answer(self) -> bottle.HTTPResponse:
        headers = {**_headers(), "Content-Type": "application/problem+json", **self.headers}
        return bottle.HTTPResponse(msgspec.json.encode(self.body()), self.status, headers)


# What the queue raises, as HTTP: the first that fits.
PROBLEMS: tuple[tuple[type[TinyQueueError], int, str], ...] = (
    (UnknownType, 422, "unknown-type"),
    (InvalidJob, 422, "invalid-job"),
    (KeyReused, 422, "idempotency-key-reused"),
    (WrongStatus, 409, "wrong-status"),
    (QueueFull, 503, "queue-full"),
    (NotReplicated, 503, "not-replicated"),
    (Unavailable, 503, "unavailable"),
    (SettingsError, 503, "misconfigured"),
    (Corrupted, 500, "corrupted"),
    (TinyQueueError, 500, "internal"),
)


def problem(error: TinyQueueError, **more: Any) -> Problem:
    """Translate an error of the queue."""
    status, kind = next((status, kind) for of, status, kind in PROBLEMS if isinstance(error, of))
    match error:
        case UnknownType():
            more |= {"field": error.field, "known": error.known}
        case InvalidJob():
            more |= {"field": error.field} | ({"path": error.path} if error.path else {})
        case NotReplicated():
            ids = [job.id for job in error.jobs]
            more |= {"jobIds": ids} | ({"jobId": ids[0]} if len(ids) == 1 else {})
        case WrongStatus():
            more |= {"jobStatus": error.job.status}
        case Unavailable():
            more |= {"reason": error.reason}
    if status >= 500:
        log.warning("%s %s: %s", request.method, ascii(request.path), error)
    return Problem(status, kind, str(error), {"Retry-After": str(RETRY_AFTER)} if status == 503 else None, **more)


# Who may come in ------------------------------------------------------------------------------------------------------

ROLES = {"submit": {"submit"}, "read": {"read"}, "admin": {"submit", "read", "admin"}}
SECONDS = {"second": 1, "minute": 60, "hour": 3600}
LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}


class Key(NamedTuple):
    """One credential: `may` holds the roles that it includes."""

    name: str
    may: set[str]
    secret: bytes


def read_keys(text: str) -> list[Key]:
    """Read TINYQUEUE_API_KEYS; raises SettingsError, which shows no secret, for whatever could let the wrong one in."""
    keys: list[Key] = []
    for at, entry in enumerate(text.split(",") if text else (), 1):
        name, role, secret = (*entry.strip().split(":", 2), "", "")[:3]
        where = f"TINYQUEUE_API_KEYS: entry {at}"
        if not NAME.fullmatch(name) or role not in ROLES:
            raise SettingsError(f"{where} must be name:role:secret, the role one of {', '.join(ROLES)}")
        if len(secret) < 16 or not secret.isascii() or not secret.isprintable() or " " in secret:
            raise SettingsError(f"{where} ({name}): the secret must be 16 or more ASCII characters without blanks")
        if any(name == key.name or secret.encode() == key.secret for key in keys):
            raise SettingsError(f"{where} ({name}): its name or its secret stands there twice")
        keys.append(Key(name, ROLES[role], secret.encode()))
    return keys


class Door:
    """Decides who may do what. Without keys only this machine is let in, as Redis does it, unless TINYQUEUE_OPEN says otherwise."""

    def __init__(self, settings: Settings) -> None:
        self.keys, self.open, self.proxies = read_keys(settings.api_keys), settings.open, settings.trusted_proxies
        amount, _, unit = settings.rate_limit.partition("/")
        self.limit, self.window = int(amount or 0), SECONDS.get(unit, 0)
        if self.open and self.keys:
            raise SettingsError("TINYQUEUE_OPEN=1 and TINYQUEUE_API_KEYS contradict each other: unset one of them")
        if self.open:
            log.warning("TINYQUEUE_OPEN=1: everybody who can reach this server may submit, read, cancel and retry jobs")

    def admit(self, role: str, queue: Callable[[], AnyQueue]) -> str:
        """Let the present request in, or raise a Problem. Returns whose it is: the name of its key, or nothing without keys."""
        address = self._address()
        if not self.keys and not self.open:
            self._refuse_strangers(address)
        if (
            role == "page"
        ):  # a browser that opens it has no key yet, and it must open while Redis is down: nothing is counted
            return ""
        key = self._key() if self.keys else None
        if key and role != "any" and role not in key.may:
            raise Problem(403, "forbidden", f"the key {key.name} may not do that: it takes the role {role}")
        if request.method not in ("GET", "HEAD"):
            self._refuse_other_sites()
        if self.limit:
            self._count(queue(), "key-" + key.name if key else "address-" + address)
        return key.name if key else ""

    def _address(self) -> str:
        """The client's address: the peer's, or with trusted proxies what the outermost of those has seen."""
        peer = str(request.environ.get("REMOTE_ADDR", "")).removeprefix("::ffff:")
        seen = request.environ.get("HTTP_X_FORWARDED_FOR", "")
        if not self.proxies or not seen:
            return peer
        try:
            return str(ipaddress.ip_address(seen.split(",")[-self.proxies].strip()))
        except (ValueError, IndexError):
            raise Problem(
                400, "bad-forwarded-for", "X-Forwarded-For does not hold an address from each trusted proxy"
            ) from None

    def _key(self) -> Key:
        scheme, _, secret = request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        given = secret.strip().encode("utf-8", "replace") if scheme.lower() == "bearer" else b""
        found = [
            key for key in self.keys if hmac.compare_digest(key.secret, given)
        ]  # all of them: the time tells nothing
        if not found:
            how = {"WWW-Authenticate": 'Bearer realm="tinyqueue"'}
            raise Problem(
                401, "unauthorized", "send one of the keys of TINYQUEUE_API_KEYS: Authorization: Bearer SECRET", how
            )
        return found[0]

    def _refuse_strangers(self, address: str) -> None:
        """Let in only what comes from this machine, through no proxy, and under its name: a page may have rebound its own."""
        env = request.environ
        forwarded = "HTTP_X_FORWARDED_FOR" in env or "HTTP_FORWARDED" in env
        if not forwarded and _is_local(address, env.get("HTTP_HOST", "localhost")):
            return
        how = "set TINYQUEUE_API_KEYS, or TINYQUEUE_OPEN=1 if everybody who can reach it may do everything"
        raise Problem(403, "protected", f"without keys this server answers only its own machine: {how}")

    def _refuse_other_sites(self) -> None:
        """Refuse what a browser sends for a page of another site. Other clients send none of these headers."""
        env = request.environ
        site, origin = env.get("HTTP_SEC_FETCH_SITE", "none"), env.get("HTTP_ORIGIN")
        own = origin is None or origin.partition("://")[2] == env.get("HTTP_HOST")
        if site not in ("same-origin", "none") or not own:
            raise Problem(403, "cross-site", "a page of another site may not do that")

    def _count(self, queue: AnyQueue, who: str) -> None:
        left, seconds = queue.spend(who, self.limit, self.window)
        headers = {
            "RateLimit-Policy": f'"default";q={self.limit};w={self.window}',
            "RateLimit": f'"default";r={max(left, 0)};t={seconds}',
        }
        if left < 0:
            detail = f"more than {self.limit} requests in {self.window} seconds"
            raise Problem(429, "too-many-requests", detail, headers | {"Retry-After": str(seconds)})
        request.environ["tinyqueue.limits"] = headers


@lru_cache(maxsize=1000)
def _is_local(address: str, host: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback and urlsplit("//" + host).hostname in LOCAL_NAMES
    except ValueError:
        return False


# The API --------------------------------------------------------------------------------------------------------------

ROUTES = (  # method, path, method of API, role that it takes: "any" key will do, a "page" needs none, "" is not asked at the door
    ("GET", "/", "dashboard", "page"),
    ("GET", "/health", "health", ""),
    ("GET", "/ready", "ready", "read"),
    ("GET", "/openapi.json", "openapi", "any"),
    ("GET", "/whoami", "whoami", "any"),
    ("POST", "/jobs", "submit", "submit"),
    ("POST", "/jobs/batch", "submit_batch", "submit"),
    ("GET", "/jobs", "list", "read"),
    ("GET", "/jobs/<id>", "show", "read"),
    ("DELETE", "/jobs/<id>", "cancel", "admin"),
    ("POST", "/jobs/<id>/retry", "retry", "admin"),
    ("POST", "/jobs/retry", "retry_many", "admin"),
    ("POST", "/jobs/cancel", "cancel_many", "admin"),
    ("GET", "/queues", "queues", "read"),
    ("POST", "/queues/<name>/pause", "pause", "admin"),
    ("POST", "/queues/<name>/resume", "resume", "admin"),
    ("GET", "/stats", "stats", "read"),
    ("GET", "/workers", "workers", "read"),
    ("GET", "/metrics", "metrics", "read"),
)
FIELDS = {
    "type": "type",
    "payload": "payload",
    "maxAttempts": "max_attempts",
    "queue": "queue",
    "delay": "delay",
    "runAt": "run_at",
    "expiresIn": "expires_in",
    "uniqueKey": "unique_key",
}
FILTERS = {"status": "status", "type": "type", "queue": "queue", "errorType": "error_type"}
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class API(bottle.Bottle):  # type: ignore[misc]
    """The routes over one queue; without one, it is made from the settings at the first request that needs it."""

    __setattr__ = object.__setattr__  # Bottle's own lets an attribute be set once only

    def __init__(self, settings: Settings | None = None, queue: AnyQueue | None = None) -> None:
        super().__init__()
        self._lock, self._queue = threading.Lock(), queue
        if settings:
            self.settings, self.door = settings, Door(settings)
        self._waiters = threading.BoundedSemaphore(WEB_THREADS // 2)
        self._scrape_errors = 0  # that Redis has not been told of
        for method, path, name, role in ROUTES:
            for part, pattern in (
                ("<id>", ID.pattern),
                ("<name>", NAME.pattern),
            ):  # nothing may follow: not even a line break
                path = path.replace(part, f"<{part[1:-1]}:re:{pattern}(?!\\n)>")  # noqa: PLW2901
            self.route(path, method, partial(self._answer, getattr(self, name), role))

    @cached_property
    def settings(self) -> Settings:
        return Settings.read()

    @cached_property
    def door(self) -> Door:
        return Door(self.settings)

    @property
    def queue(self) -> AnyQueue:
        if self._queue is None:
            with self._lock:
                self._queue = self._queue or self._open()
        return self._queue

    def _open(self) -> AnyQueue:
        if not self.settings.redis_url:
            raise SettingsError("REDIS_URL is not set, and this server runs no workers: set it, or use tinyqueue web")
        load_handlers(self.settings.handlers)
        return open_queue(self.settings)

    def wsgi(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        """Answer a request under its own X-Request-ID, or one that is made for it, and log that."""
        given, trace = environ.get("HTTP_X_REQUEST_ID", ""), environ.get("HTTP_TRACEPARENT", "")
        kept = {"requestId": given} if REQUEST_ID.fullmatch(given) else {}
        kept |= {"traceparent": trace} if TRACEPARENT.fullmatch(trace) else {}
        ids = {"requestId": os.urandom(16).hex()} | kept
        environ["tinyqueue.kept"] = kept
        began, told = time.monotonic(), ""

        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            nonlocal told
            told = status
            return start_response(status, [*headers, ("X-Request-ID", ids["requestId"])], *more)

        context = LOG_CONTEXT.set(ids.copy)
        try:
            return super().wsgi(environ, start)
        finally:
            _log_request(environ, int(told[:3] or 500), round((time.monotonic() - began) * 1000))
            LOG_CONTEXT.reset(context)

    def _answer(self, act: Callable[..., Any], role: str, **args: str) -> Any:
        """Let a request in and run its route: what that returns goes out as JSON, what it raises as a problem."""
        try:
            if role:
                request.environ["tinyqueue.caller"] = self.door.admit(role, lambda: self.queue)
            body = act(**args)
        except Problem as error:
            return error.answer()
        except TinyQueueError as error:
            return problem(error).answer()
        if isinstance(body, bottle.HTTPResponse):
            return body
        bottle.response.headers.update(_headers())
        bottle.response.content_type = "application/json"
        return msgspec.json.encode(body)

    def default_error_handler(self, error: bottle.HTTPError) -> Any:
        """Answer what Bottle itself refuses. Its 405 names the methods that there are; OPTIONS asks for just that."""
        headers = {name: value for name, value in error.headers.items() if name == "Allow"}
        if error.status_code == 405 and request.method == "OPTIONS":
            answer = bottle.HTTPResponse("", 204, HEADERS | headers)
        else:
            phrase = HTTPStatus(error.status_code).phrase
            detail = {404: "there is no such path", 405: f"{phrase}: see Allow"}.get(error.status_code, phrase)
            answer = Problem(error.status_code, phrase.lower().replace(" ", "-"), detail, headers).answer()
        answer.apply(bottle.response)
        return answer.body

    # Submit -----------------------------------------------------------------------------------------------------------

    def submit(self) -> dict[str, str]:
        """Accept a job: 201 when it is stored, 200 if it was before."""
        fields = self._body()
        draft, once = self._draft(fields), self._once(fields)
        job = self.queue.submit([draft], once)[0]
        request.environ["tinyqueue.job"] = job.id
        bottle.response.set_header("Location", f"/jobs/{job.id}")
        self._say_whether_new(job is draft, once)
        return _brief(job)

    def submit_batch(self) -> dict[str, Any]:
        """Accept up to 1,000 jobs, all or none; with ?partial=true all that are right, and tell for each what became of it."""
        items, partial = self._items(), _flag(_query(), "partial")
        if not isinstance(items, list) or not 1 <= len(items) <= MAX_JOBS:
            raise InvalidJob("jobs", f"must be an array of 1 to {MAX_JOBS} jobs")
        drafts: list[Job | Problem] = []
        for at, fields in enumerate(items):
            try:
                drafts.append(self._draft(fields))
            except InvalidJob as error:
                refusal = problem(error, index=at)
                if not partial:
                    raise refusal from None
                drafts.append(refusal)
        good = [draft for draft in drafts if isinstance(draft, Job)]
        once = self._once(items)
        jobs = self.queue.submit(good, once) if good else []
        self._say_whether_new(jobs == drafts, once)
        left = iter(jobs)
        return {"jobs": [_brief(next(left)) if isinstance(draft, Job) else {"error": draft.body()} for draft in drafts]}

    def _say_whether_new(self, new: bool, once: Once | None) -> None:
        bottle.response.status = 201 if new else 200
        if once and once.replayed:
            bottle.response.set_header("Idempotency-Replayed", "true")

    def _once(self, content: Any) -> Once | None:
        """The request's Idempotency-Key, as of this caller and for this content: not for another's, nor for another request."""
        key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
        if key is None:
            return None
        if len(key) > 1 and key[0] == key[-1] == '"':  # the draft of the IETF has it as a quoted string
            key = key[1:-1]
        if not 1 <= len(key) <= 255 or not key.isascii() or not key.isprintable():
            raise Problem(400, "invalid-idempotency-key", "Idempotency-Key must be 1 to 255 printable ASCII characters")
        seen = json.dumps([request.path, request.query_string, content], sort_keys=True)
        return Once(f"{request.environ['tinyqueue.caller']}\n{key}", hashlib.sha256(seen.encode()).hexdigest())

    def _draft(self, fields: Any) -> Job:
        """Make a job of what the client sent. Unlike Queue.draft it insists on a known type: a typing error must not wait."""
        if not isinstance(fields, dict):
            raise InvalidJob("job", "must be an object with type and payload")
        if unknown := fields.keys() - FIELDS.keys():
            raise InvalidJob(ascii(min(unknown))[1:-1][:100], f"is no field of a job; there are {', '.join(FIELDS)}")
        if missing := {"type", "payload"} - fields.keys():
            raise InvalidJob(max(missing), "is missing")
        queue = self.queue  # which has loaded the handlers
        if isinstance(fields["type"], str) and fields["type"] not in HANDLERS:
            raise UnknownType(ascii(fields["type"])[1:-1][:100], sorted(HANDLERS))
        job = queue.draft(**{FIELDS[name]: value for name, value in fields.items()})
        kept = request.environ["tinyqueue.kept"]  # what the client sent, for that is what it will search for
        job.request_id, job.traceparent = kept.get("requestId", ""), kept.get("traceparent", "")
        return job

    def _bytes(self, *types: str) -> bytes:
        if _media_type() not in types:
            raise Problem(415, "unsupported-media-type", f"send JSON, with Content-Type: {' or '.join(types)}")
        limit = self.settings.max_body
        body = b""
        if request.content_length <= limit:
            with request.body as stream:
                body = stream.read(limit + 1)
        if request.content_length > limit or len(body) > limit:
            raise Problem(413, "too-large", f"a request's body may have {limit} bytes at most (TINYQUEUE_MAX_BODY)")
        return body

    def _body(self) -> Any:
        return _json(self._bytes("application/json"), MAX_DEPTH + 1)  # the payload's, and the job around it

    def _items(self) -> Any:
        body = self._bytes("application/json", "application/x-ndjson")
        if _media_type() == "application/json":
            return _json(body, MAX_DEPTH + 2)
        return [_json(line, MAX_DEPTH + 1) for line in body.split(b"\n") if line.strip()]

    # Watch ------------------------------------------------------------------------------------------------------------

    def list(self) -> dict[str, Any]:
        """List jobs that fit, newest first; long payloads and results are cut."""
        query = _query()
        limit, cursor = _number(query, "limit", 50, 1, 500), query.pop("cursor", "")
        jobs, cursor = self.queue.page(_filter(query), limit=limit, cursor=cursor)
        return {"jobs": [_cut(job.answer()) for job in jobs], "cursor": cursor or None}

    def show(self, id: str) -> dict[str, Any]:
        """Show a job; with ?wait= when it has ended, or the time is up, or at once if many wait already."""
        seconds = _number(_query(), "wait", 0, 0, 3600)
        if seconds and self._waiters.acquire(blocking=False):
            try:
                return _there(self.queue.wait_for(id, min(seconds, LONGEST_WAIT))).answer()
            finally:
                self._waiters.release()
        return _there(self.queue.get(id)).answer()

    def queues(self) -> dict[str, Any]:
        return {"queues": self.queue.queues()}

    def stats(self) -> dict[str, Any]:
        return self.queue.stats(_number(_query(), "minutes", 0, 0, 120))

    def workers(self) -> dict[str, Any]:
        return {"workers": self.queue.workers()}

    def metrics(self) -> bottle.HTTPResponse:
        """Tell Prometheus of all jobs and workers. Without Redis the scrape fails, `up` says so, and the next one counts it."""
        from prometheus_client.exposition import choose_encoder  # slow to import, and many servers are never scraped

        encode, content_type = choose_encoder(request.get_header("Accept", ""))
        with self._lock:
            missed, self._scrape_errors = self._scrape_errors, 0
        try:
            if missed:
                self.queue.count_scrape_errors(missed)
            scrape = Scrape(self.queue)
        except TinyQueueError:
            with self._lock:
                self._scrape_errors += missed + 1
            raise
        return bottle.HTTPResponse(encode(scrape), 200, _headers() | {"Content-Type": content_type})

    def health(self) -> dict[str, str]:
        """Whether this process is alive; says nothing of Redis, for restarting the process would not mend that."""
        return {"status": "ok"}

    def ready(self) -> dict[str, Any]:
        """Whether jobs can be submitted: Redis takes writes. What endangers them all the same stands among the warnings."""
        self.queue.ping()
        return {"status": "ok", "warnings": warnings(self.queue)}

    def whoami(self) -> dict[str, Any]:
        """Tell a caller whose key it has sent and which roles that has; without keys, all."""
        name = request.environ["tinyqueue.caller"]
        may = next((key.may for key in self.door.keys if key.name == name), ROLES["admin"])
        return {"name": name, "roles": [role for role in ROLES if role in may], "embedded": not self.settings.redis_url}

    def dashboard(self) -> bottle.HTTPResponse:
        """Show the dashboard. The page holds no data: it asks for it like any other client."""
        page, policy = _dashboard()
        headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": policy,
            "Referrer-Policy": "no-referrer",
        }
        return bottle.HTTPResponse(page, 200, HEADERS | headers)

    def openapi(self) -> Any:
        """Describe this API in OpenAPI 3.1: openapi.json, and the payload of every job type from its handler's declaration."""
        self.queue  # noqa: B018 - loads the handlers
        return describe()

    # Steer ------------------------------------------------------------------------------------------------------------

    def cancel(self, id: str) -> dict[str, str]:
        """Cancel a pending job; 202: a running one was asked to stop."""
        job = _there(self.queue.cancel(id))
        bottle.response.status = 202 if job.status == "processing" else 200
        return _brief(job)

    def retry(self, id: str) -> dict[str, str]:
        return _brief(_there(self.queue.retry(id)))

    def cancel_many(self) -> dict[str, Any]:
        return self._change_many("cancel", "pending", {"pending"})

    def retry_many(self) -> dict[str, Any]:
        return self._change_many("retry", "failed", {"failed", "cancelled"})

    def _change_many(self, verb: Literal["cancel", "retry"], default: str, possible: set[str]) -> dict[str, Any]:
        fields = self._body()
        if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
            raise InvalidJob("filter", f"must be an object of texts: {', '.join((*FILTERS, 'cursor'))}")
        filter = _filter({"status": default} | {k: v for k, v in fields.items() if k != "cursor"})
        if filter.status not in possible:
            raise InvalidJob("status", f"must be {' or '.join(sorted(possible))}: others cannot be changed so")
        answer = self.queue.change_many(verb, filter, fields.get("cursor", ""))
        return answer | {"cursor": answer["cursor"] or None}

    def pause(self, name: str) -> dict[str, Any]:
        self.queue.pause(name)
        return {"queue": name, "paused": True}

    def resume(self, name: str) -> dict[str, Any]:
        self.queue.resume(name)
        return {"queue": name, "paused": False}


def _headers() -> dict[str, str]:
    """What stands at the head of every answer."""
    limits: dict[str, str] = request.environ.get("tinyqueue.limits", {})
    return HEADERS | limits


def _log_request(environ: Mapping[str, Any], status: int, took: int) -> None:
    """One line for each request: at info if it was to change something or failed, else at debug. The path is percent-encoded."""
    method, path = environ["REQUEST_METHOD"][:20], quote(environ.get("PATH_INFO", ""), errors="replace")[:200]
    level = logging.INFO if method not in ("GET", "HEAD") or status >= 400 else logging.DEBUG
    if log.isEnabledFor(level):
        who = {"key": environ.get("tinyqueue.caller"), "job": environ.get("tinyqueue.job")}
        fields = {"event": "request", "method": method, "path": path, "status": status, "durationMs": took}
        fields |= {name: value for name, value in who.items() if value}
        by = f" by {who['key']}" if who["key"] else ""
        log.log(level, "%s %s %d in %d ms%s", method, path, status, took, by, extra={"fields": fields})


def _json(body: bytes, levels: int) -> Any:
    try:
        return from_json(body, levels)
    except ValueError as error:
        raise Problem(400, "not-json", f"the body is not JSON: {error}") from None


def _there(job: Job | None) -> Job:
    if job is None:
        raise Problem(404, "not-found", "there is no job of that id, or it ended too long ago")
    return job


def _brief(job: Job) -> dict[str, str]:
    return {"jobId": job.id, "status": job.status}


def _cut(answer: dict[str, Any]) -> dict[str, Any]:
    """Replace a long payload or result by the beginning of its JSON, and leave out the traceback."""
    for name in ("payload", "result"):
        text = msgspec.json.encode(answer.get(name))
        if len(text) > CUT:
            del answer[name]
            answer[name + "Preview"] = text[:CUT].decode("utf-8", "ignore")
    if "error" in answer:
        answer["error"] = {"type": answer["error"].type, "message": answer["error"].message}
    return answer


def _media_type() -> str:
    return str(request.content_type).partition(";")[0].strip().lower()


def _query() -> dict[str, str]:
    try:
        return dict(parse_qsl(request.query_string, keep_blank_values=True, errors="strict"))
    except ValueError as error:
        raise Problem(400, "invalid-query", f"the query cannot be read: {error}") from None


def _number(query: dict[str, str], name: str, default: int, low: int, high: int) -> int:
    """Take a number out of the query."""
    text = query.pop(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise Problem(400, "invalid-query", f"{name} must be a whole number from {low} to {high}", field=name)
    return int(text)


def _flag(query: Mapping[str, str], name: str) -> bool:
    text = query.get(name, "false")
    if text not in ("true", "false"):
        raise Problem(400, "invalid-query", f"{name} must be true or false", field=name)
    return text == "true"


def _filter(wanted: Mapping[str, str]) -> Filter:
    """Make a filter of a query or of a body's fields, which may be empty."""
    named = {FILTERS[name]: value for name, value in wanted.items() if name in FILTERS and value}
    if unknown := wanted.keys() - FILTERS.keys():
        raise InvalidJob(ascii(min(unknown))[1:-1][:100], f"is no filter; there are {', '.join(FILTERS)}")
    if named.get("status", "pending") not in STATUSES:
        raise InvalidJob("status", f"must be one of {', '.join(STATUSES)}")
    return Filter(**named)  # type: ignore[arg-type]


def _file(name: str) -> bytes:
    """Read a file that lies beside this module, in a checkout as in an installation."""
    return Path(__file__).with_name(name).read_bytes()


@cache
def _dashboard() -> tuple[bytes, str]:
    """The page, and the policy that lets a browser run its own script and style, fetch from here, and nothing else.

    Trusted Types make the browser refuse what would turn text into markup, should the script ever try.
    """
    page = _file("dashboard.html")
    [script], [style] = (re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.S) for tag in (b"script", b"style"))
    own = [f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in (script, style)]
    return page, (
        f"default-src 'none'; script-src {own[0]}; style-src {own[1]}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


METRICS = (  # name after tinyqueue_, kind, labels, meaning: a part of the contract, for deploy/ and others' dashboards
    ("jobs", "gauge", "queue status", "jobs that have not ended; pending includes those that wait for their time"),
    ("jobs_delayed", "gauge", "", "pending jobs that wait for their time"),
    ("jobs_kept", "gauge", "status", "jobs that have ended and can still be looked at"),
    ("oldest_waiting_seconds", "gauge", "queue", "age of the job that is next"),
    ("queue_paused", "gauge", "queue", "1: it starts no jobs"),
    ("workers", "gauge", "", "workers that are alive"),
    ("slots", "gauge", "", "jobs that these can run at a time"),
    ("slots_busy", "gauge", "", "jobs that these held at their last heartbeat"),
    ("jobs_enqueued", "counter", "type queue", "jobs that were accepted"),
    ("jobs_started", "counter", "type queue", "attempts that were begun"),
    ("jobs_completed", "counter", "type queue", "jobs that ended completed"),
    ("jobs_failed", "counter", "type queue", "jobs that ended failed"),
    ("jobs_cancelled", "counter", "type queue", "jobs that ended cancelled"),
    ("jobs_retried", "counter", "type queue", "attempts that failed with others left"),
    ("jobs_revived", "counter", "type queue", "failed and cancelled jobs that were made pending again"),
    ("jobs_released", "counter", "type queue", "attempts that a stopping worker handed back"),
    ("jobs_reaped", "counter", "type queue", "attempts that were lost with their worker"),
    ("scrape_errors", "counter", "", "scrapes that could not be answered, for Redis was out of reach"),
    ("job_waiting_seconds", "histogram", "type queue", "time from when a job could start until it did"),
    (
        "job_running_seconds",
        "histogram",
        "type queue",
        "time from the start of an attempt until its outcome was written",
    ),
)


class Scrape:
    """What Redis tells at one moment, in the form of a collector as Prometheus' client has them."""

    def __init__(self, queue: AnyQueue) -> None:
        stats, told = queue.stats(), queue.metrics()
        errors = told.pop("scrapeErrors", {(): 0})
        workers = [worker for worker in queue.workers() if worker["alive"]]
        pairs = dict.fromkeys(labels[:2] for counts in told.values() for labels in counts)
        queues = sorted(stats["queues"].items(), key=lambda item: -item[1]["pending"] - item[1]["processing"])[:SERIES]
        self.values: dict[str, Any] = {
            "jobs": {(name, status): queue[status] for name, queue in queues for status in UNENDED},
            "jobs_delayed": {(): stats["delayed"]},
            "jobs_kept": {(status,): stats[status] for status in ENDED},
            "oldest_waiting_seconds": {(name,): queue["oldestWaitingMs"] / 1000 for name, queue in queues},
            "queue_paused": {(name,): int(queue["paused"]) for name, queue in queues},
            "workers": {(): len(workers)},
            "slots": {(): sum(worker["concurrency"] for worker in workers)},
            "slots_busy": {(): sum(len(worker["jobs"]) for worker in workers)},
            "job_waiting_seconds": _histograms(told, "waited"),
            "job_running_seconds": _histograms(told, "ran"),
        }
        started = {pair: buckets[-1][1] for pair, (buckets, _) in self.values["job_waiting_seconds"].items()}
        self.values["scrape_errors"] = errors
        for what, kind, labels, _ in METRICS:
            if (
                kind == "counter" and labels
            ):  # those that are 0 are told, too: to Prometheus, a counter that appears has not grown
                counts = started if what == "jobs_started" else told.get(what.removeprefix("jobs_"), {})
                self.values[what] = {pair: counts.get(pair, 0) for pair in pairs}

    def collect(self) -> Iterator[Any]:
        from prometheus_client import core

        for name, kind, labels, meaning in METRICS:
            family = getattr(core, f"{kind.title()}MetricFamily")(f"tinyqueue_{name}", meaning, labels=labels.split())
            for given, value in self.values[name].items():
                family.add_metric(given, *(value if kind == "histogram" else (value,)))
            yield family


def _histograms(
    told: Mapping[str, Mapping[tuple[str, ...], int]], what: str
) -> dict[tuple[str, ...], tuple[Any, float]]:
    """Make the buckets of times cumulative, as Prometheus wants them, and give their sum in seconds."""
    stored, sums = told.get(what, {}), told.get(what + "Ms", {})
    bounds = [*(str(bound / 1000) for bound in BUCKETS[:-1]), "+Inf"]
    made = {}
    for pair in dict.fromkeys(labels[:2] for labels in stored):
        counts = accumulate(stored.get((*pair, str(bound)), 0) for bound in BUCKETS)
        made[pair] = list(zip(bounds, counts, strict=True)), sums.get(pair, 0) / 1000
    return made


def describe() -> dict[str, Any]:
    """Make the OpenAPI document for the handlers that are registered."""
    document: dict[str, Any] = msgspec.json.decode(_file("openapi.json"))
    schemas = document["components"]["schemas"]
    document["info"]["version"] = __version__
    kinds = []
    for type, handler in HANDLERS.items():
        payload: dict[str, Any] = {}
        with suppress(TypeError):  # a type that says nothing of its form, as object
            template = f"#/components/schemas/{type}.{{name}}"
            (payload,), parts = msgspec.json.schema_components([handler.payload_type], ref_template=template)
            schemas |= {f"{type}.{name}": part for name, part in parts.items()}
        own = {"type": {"const": type, "description": (handler.__doc__ or type).partition("\n")[0]}, "payload": payload}
        schemas["Job." + type] = {**schemas["Job"], "properties": {**schemas["Job"]["properties"], **own}}
        kinds.append({"$ref": f"#/components/schemas/Job.{type}"})
    schemas["Job"] = {"oneOf": kinds}
    return document


app = API()


# The server -----------------------------------------------------------------------------------------------------------


def listen(settings: Settings) -> socket.socket:
    """Open the listening socket; without HOST on all addresses, of both families where there are two."""
    host, port = settings.host, settings.port
    both = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        if both and error.errno in (
            errno.EAFNOSUPPORT,
            errno.EADDRNOTAVAIL,
        ):  # the kernel knows IPv6, this machine does not
            return socket.create_server(("", port), backlog=1024)
        raise SettingsError(f"cannot listen on HOST={host or '*'} PORT={port}: {error.strerror or error}") from None


class Channel(HTTPChannel):  # type: ignore[misc]
    """A connection whose answer is left to the thread that writes it.

    Waitress' loop tries to send it as well, and spins for as long as that thread has the buffer and waits for the interpreter: at
    256 connections a hundredth of the throughput was left. Beyond the watermark the thread waits for the loop, so there it may.
    """

    def writable(self) -> bool:
        waiting = (
            self.total_outbufs_len
            if not self.requests or self.total_outbufs_len > self.adj.outbuf_high_watermark
            else 0
        )
        return bool(waiting or self.will_close or self.close_when_flushed)


class Server:
    """Serves an API on a socket until it is told to stop, then answers what it has accepted."""

    def __init__(self, api: API, sock: socket.socket) -> None:
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a queue of requests is what threads are for
        self.channels: dict[int, Any] = {}
        self.drain = api.settings.shutdown_timeout
        self.stopping = False
        self.lock = threading.RLock()  # one that a signal may take again in the thread that holds it
        self.waitress = waitress.create_server(
            api,
            self.channels,
            sockets=[sock],
            threads=WEB_THREADS,
            connection_limit=CONNECTIONS,
            max_request_body_size=4
            * api.settings.max_body,  # a little too large gets an answer in JSON, far too large none
            max_request_header_size=32768,
            asyncore_use_poll=True,
            clear_untrusted_proxy_headers=False,  # the door decides what they are worth
            ident=None,
        )
        self.waitress.channel_class = Channel

    def stop(self) -> None:
        """Begin to stop. May be called from a signal handler and from any thread."""
        with self.lock:  # the loop must not end, and close the trigger, between these two
            if not self.stopping:
                self.stopping = True
                self.waitress.pull_trigger()

    def run(self) -> None:
        """Serve; after `stop`, refuse new connections and end when every request that was accepted is answered."""
        while not self.stopping:
            self._turn(1.0)
        wasyncore.dispatcher.close(self.waitress)  # the listening socket only: the trigger wakes this loop for answers
        deadline = time.monotonic() + self.drain
        while self._close_idle() and time.monotonic() < deadline:
            self._turn(0.2)
        self._turn(0.05)  # closes what was idle
        self.waitress.task_dispatcher.shutdown(timeout=1)
        with self.lock:
            wasyncore.close_all(self.channels)

    def _turn(self, seconds: float) -> None:
        wasyncore.loop(timeout=seconds, use_poll=True, map=self.channels, count=1)

    def _close_idle(self) -> int:
        """Close connections between two requests; count the others."""
        busy = 0
        for channel in list(self.waitress.active_channels.values()):
            if channel.requests or channel.total_outbufs_len:
                busy += 1
            else:
                channel.will_close = True
        return busy


def serve(api: API, sock: socket.socket) -> int:
    """Serve from one process; without REDIS_URL its workers run in it, too. Returns the exit code."""
    server = Server(api, sock)
    if not api.settings.redis_url:
        return _serve_with_workers(api, server)
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    signal.signal(signal.SIGINT, lambda *_: server.stop())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    server.run()
    return 0


def _serve_with_workers(api: API, server: Server) -> int:
    from tinyqueue.worker import EXIT_BROKEN, Worker, handle_signals as obey_signals  # only needed here

    worker = Worker(api.queue, api.settings)
    codes: list[int] = [EXIT_BROKEN]

    def work() -> None:
        try:
            codes[0] = worker.run()
        finally:  # also if it died of a defect: a server must not accept what nobody runs
            server.stop()

    thread = threading.Thread(target=work, name="worker")
    thread.start()
    obey_signals(worker, server.stop)
    server.run()
    thread.join()
    return codes[0]


def serve_many(api: API, sock: socket.socket) -> int:
    """Serve from WEB_CONCURRENCY processes that accept from one socket; one that dies is replaced. Returns the exit code.

    Signals are waited for, never handled: one that came just before a wait for a child began would be acted on when a child ends.
    """
    children: set[int] = set()
    stopping = False
    signal.pthread_sigmask(signal.SIG_BLOCK, {*SIGNALS, signal.SIGCHLD})
    while children or not stopping:
        while len(children) < api.settings.web_concurrency and not stopping:
            if (child := os.fork()) == 0:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
                os._exit(serve(api, sock))  # which lets the others through when it knows what to do
            children.add(child)
        if signal.sigwait({*SIGNALS, signal.SIGCHLD}) != signal.SIGCHLD:
            stopping = True
            for child in children:
                os.kill(child, signal.SIGTERM)
        for child, status in _ended(children):
            children.discard(child)
            if not stopping:
                log.error("web process %d ended (%d): it is replaced", child, os.waitstatus_to_exitcode(status))
                time.sleep(1)  # one that dies as it starts is not started without end
    return 0


def _ended(children: set[int]) -> list[tuple[int, int]]:
    """The children that have ended, with their status: one SIGCHLD may tell of several."""
    found = (os.waitpid(child, os.WNOHANG) for child in children)
    return [(child, status) for child, status in found if child]


def run() -> None:
    """Start the service as the settings say, and end the process when it is over."""
    settings = Settings.read()
    set_up_logging(settings)
    load_handlers(settings.handlers)
    queue = open_queue(settings, settings.web_connections)
    api, sock = API(settings, queue), listen(settings)
    where = f"http://{settings.host or 'localhost'}:{sock.getsockname()[1]}"
    if settings.redis_url:
        for warning in warnings(queue):
            log.warning("%s", warning)
        queue.disconnect()
        each = settings.shards * settings.web_connections
        log.info("web on %s, %d processes, up to %d connections to Redis each", where, settings.web_concurrency, each)
    else:
        log.info("web and a worker with %d slots in one process on %s", settings.worker_concurrency, where)
        log.warning("NOTHING IS KEPT: without REDIS_URL all jobs live in this process's memory and end with it")
    code = serve_many(api, sock) if settings.redis_url and settings.web_concurrency > 1 else serve(api, sock)
    logging.shutdown()
    os._exit(code)


@click.command(epilog="\b\n" + Settings.help())
@click.option("--reload", is_flag=True, help="Start anew whenever the code changes; for development.")
def main(reload: bool) -> None:
    """Serve the HTTP API of TinyQueue."""
    try:
        if reload:
            import hupper

            hupper.start_reloader("tinyqueue.wsgi.run")
        run()
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    except ModuleNotFoundError as error:
        if error.name != "hupper":
            raise
        raise click.UsageError("--reload needs hupper: pip install hupper") from None


if __name__ == "__main__":
    main()
