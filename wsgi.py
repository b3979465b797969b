"""The HTTP API and the server that serves it.

    python wsgi.py       serve on HOST and PORT until SIGTERM or SIGINT
    wsgi:app             the same API for any other WSGI server or serverless host
    tinyqueue.wsgi:app   the same API where TinyQueue is installed

Without REDIS_URL, `python wsgi.py` also runs an embedded Redis and a worker in its process.

Importing this module reads no settings and opens no connections; `app` does both at its first
request. What only our own server needs is imported when that starts, so that `app` does not wait for
it on a serverless host. Requests and responses are JSON. Errors are application/problem+json (RFC
9457). The only page, dashboard.html at /, uses the API like any other client.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, cached_property, partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import bottle
import msgspec
from bottle import request

import tinyqueue_openapi
import tinyqueue_schedule
from tinyqueue import (
    ACTIONS,
    BUILT_IN,
    ENDED,
    ID,
    LIMIT,
    MAX_JOBS,
    NAME,
    SCANNED,
    UNENDED,
    InvalidJob,
    Job,
    NotReplicated,
    Once,
    Queue,
    Schedule,
    SettingsError,
    TinyQueueError,
    Unavailable,
    check_name,
    read_override,
)
from tinyqueue_access import ROLES, Access
from tinyqueue_config import (
    LOG_CONTEXT,
    SIGNALS,
    WEB_THREADS,
    Settings,
    exit_at_sigterm,
    exit_now,
    fork_held,
    hold_signals,
    load_handlers,
    looks_like_name,
    open_queue,
    plural,
    process_warnings,
    reset_signals_in_children,
    set_up_logging,
)
from tinyqueue_doctor import Observer, warnings
from tinyqueue_events import HEADERS as EVENT_HEADERS, LISTENERS, Events, cached, overview
from tinyqueue_json import new_id
from tinyqueue_metrics import REASONS, Refusals, Scrape, types
from tinyqueue_problems import HEADERS, RETRY_AFTER, Problem, kind_of_status, problem, problem_of, response_headers
from tinyqueue_request import (
    FILTERS,
    describe_action,
    is_ref,
    log_request,
    note_sent_ids,
    printable,
    read_arguments,
    read_batch,
    read_filter,
    read_flag,
    read_int,
    read_json,
    read_key,
    read_most,
    read_optional_json,
    read_query,
    read_query_pairs,
    read_refs,
    require_job,
    require_schedule,
    require_worker,
    shorten,
    shown,
    summary,
)
from tinyqueue_shards import AnyQueue
from tinyqueue_waiter import Waiter
from tinyqueue_why import answer
from tinyqueue_work import Guest

if TYPE_CHECKING:
    import click

    from tinyqueue_server import Server

log = logging.getLogger("tinyqueue.web")

OVERVIEW_MINUTES = 60  # of history in each event
TYPES_MINUTES = 15  # that GET /types looks back, unless the request says otherwise
TYPES_EVERY = 10  # seconds until events have new counts of the types
MAX_MINUTES = 120  # for which there are counts
LONGEST_WAIT = 25  # seconds that GET /jobs/<id>?wait= may take: routers time out after 30
WORK_TIME = 20  # seconds that POST /work takes at most, unless the request says otherwise
MAX_SCALED = 100  # queues that one GET /scale may name
PREVIEW_BYTES = 500  # length at which a listing cuts off a payload or a result
IPV6 = re.compile("[0-9a-fA-F:.]{2,45}")
REQUEST_ID = re.compile("[!-~]{1,128}")
# As in W3C Trace Context.
TRACEPARENT = re.compile("(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


# The API --------------------------------------------------------------------------------------------------------------

# Method, path, method of API, and the role that the caller's key needs. "any" is satisfied by every
# key and "page" needs none. Access does not check a route with the role "".
ROUTES = (
    ("GET", "/", "dashboard", "page"),
    ("GET", "/health", "health", ""),
    ("GET", "/ready", "ready", "read"),
    ("GET", "/openapi.json", "openapi", "any"),
    ("GET", "/whoami", "whoami", "any"),
    ("POST", "/jobs", "submit", "submit"),
    ("POST", "/jobs/batch", "submit_batch", "submit"),
    ("GET", "/jobs", "list", "read"),
    ("GET", "/jobs/count", "count", "read"),
    ("GET", "/jobs/<id>", "show", "read"),
    ("GET", "/jobs/<id>/log", "job_log", "read"),
    ("DELETE", "/jobs/<id>", "cancel", "admin"),
    ("POST", "/jobs/<id>/retry", "retry", "admin"),
    ("POST", "/jobs/<id>/run", "hasten", "admin"),
    ("POST", "/jobs/<id>/replay", "replay", "admin"),
    ("POST", "/jobs/<id>/purge", "purge", "admin"),
    ("POST", "/jobs/retry", "retry_many", "admin"),
    ("POST", "/jobs/cancel", "cancel_many", "admin"),
    ("POST", "/jobs/purge", "purge_many", "admin"),
    ("GET", "/failures", "failures", "read"),
    ("GET", "/queues", "queues", "read"),
    ("POST", "/queues/<name>/pause", "pause", "admin"),
    ("POST", "/queues/<name>/resume", "resume", "admin"),
    ("GET", "/schedules", "schedules", "read"),
    ("PUT", "/schedules/<name>", "put_schedule", "admin"),
    ("DELETE", "/schedules/<name>", "remove_schedule", "admin"),
    ("POST", "/schedules/<name>/pause", "pause_schedule", "admin"),
    ("POST", "/schedules/<name>/resume", "resume_schedule", "admin"),
    ("POST", "/schedules/<name>/run", "run_schedule", "admin"),
    ("GET", "/limits", "limits", "read"),
    ("PUT", "/limits/<limit>", "set_limit", "admin"),
    ("POST", "/work", "work", "admin"),
    ("GET", "/stats", "stats", "read"),
    ("GET", "/verdict", "verdict", "read"),
    ("GET", "/scale", "scale", "read"),
    ("GET", "/workers", "workers", "read"),
    ("GET", "/types", "types", "read"),
    ("GET", "/events", "events", "read"),
    ("POST", "/workers/<name>/quiet", "quiet_worker", "admin"),
    ("POST", "/workers/<name>/resume", "resume_worker", "admin"),
    ("GET", "/audit", "audit", "read"),
    ("GET", "/metrics", "metrics", "read"),
)
# JSON name -> argument of Queue.draft
FIELDS = {
    "type": "type",
    "payload": "payload",
    "maxAttempts": "max_attempts",
    "queue": "queue",
    "delay": "delay",
    "runAt": "run_at",
    "expiresIn": "expires_in",
    "uniqueKey": "unique_key",
    "after": "after",
    "onFailure": "on_failure",
    "callbackUrl": "callback_url",
    "tags": "tags",
}
# JSON name -> argument of make_schedule
SCHEDULE_FIELDS = {
    "cron": "cron",
    "timezone": "timezone",
    "type": "type",
    "payload": "payload",
    "queue": "queue",
    "maxAttempts": "max_attempts",
    "uniqueKey": "unique_key",
    "overlap": "overlap",
    "catchup": "catchup",
}


class API(bottle.Bottle):  # type: ignore[misc]
    """The routes of a queue. Without `queue`, the first request that needs one opens it."""

    __setattr__ = object.__setattr__  # Bottle's own lets an attribute be set only once

    def __init__(self, settings: Settings | None = None, queue: AnyQueue | None = None) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._queue = queue
        if settings:
            self.settings = settings
            self.access = Access(settings)
        self._blocked = threading.BoundedSemaphore(WEB_THREADS // 2)
        self._waiters: dict[Queue, Waiter] = {}
        self._guest = Guest()
        self._refusals = Refusals()
        self._events = Events(self._overview)
        self._types = cached(lambda: types(self.queue, TYPES_MINUTES), TYPES_EVERY)  # for events only
        self._scrape_errors = 0  # not yet counted in Redis
        for method, path, name, role in ROUTES:
            for part, pattern in (("<id>", ID.pattern), ("<name>", NAME.pattern), ("<limit>", LIMIT.pattern)):
                # Bottle's own `$` would let a final line break pass.
                path = path.replace(part, f"<{part[1:-1]}:re:{pattern}(?!\\n)>")  # noqa: PLW2901
            self.route(path, method, partial(self._run_route, getattr(self, name), role))

    @cached_property
    def settings(self) -> Settings:
        return Settings.read()

    @cached_property
    def access(self) -> Access:
        return Access(self.settings)

    @cached_property
    def observer(self) -> Observer:
        return Observer(self.queue, self.settings.max_wait, self._refusals)

    @property
    def queue(self) -> AnyQueue:
        if self._queue is None:
            with self._lock:
                self._queue = self._queue or self._open_queue()
        return self._queue

    def _open_queue(self) -> AnyQueue:
        if not self.settings.redis_url:
            raise SettingsError("REDIS_URL is not set and this server runs no workers; set it, or run tinyqueue web")
        load_handlers(self.settings.handlers)
        return open_queue(self.settings)

    def wsgi(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        """Answer one request and log it.

        The response has the client's X-Request-ID, or a new one if that is missing or malformed.
        """
        request_id = environ.get("HTTP_X_REQUEST_ID", "")
        traceparent = environ.get("HTTP_TRACEPARENT", "")
        sent_ids = {"requestId": request_id} if REQUEST_ID.fullmatch(request_id) else {}
        sent_ids |= {"traceparent": traceparent} if TRACEPARENT.fullmatch(traceparent) else {}
        ids = {"requestId": os.urandom(16).hex()} | sent_ids
        environ["tinyqueue.sent_ids"] = sent_ids
        if not environ.get("PATH_INFO", "").isascii():  # Bottle would drop bytes that are not UTF-8
            environ["PATH_INFO"] = quote(environ["PATH_INFO"], encoding="latin-1")
        began = environ.setdefault("tinyqueue.began", time.monotonic())
        status_line = ""

        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            nonlocal status_line
            status_line = status
            return start_response(status, [*headers, ("X-Request-ID", ids["requestId"])], *more)

        context = LOG_CONTEXT.set(ids.copy)
        try:
            answer = super().wsgi(environ, start)
            log_request(environ, int(status_line[:3]), round((time.monotonic() - began) * 1000))
            return answer
        finally:
            LOG_CONTEXT.reset(context)

    def _run_route(self, route: Callable[..., Any], role: str, **args: str) -> Any:
        """Authorize the request and run its route. Respond with JSON, or a problem if it raises."""
        try:
            if role and "tinyqueue.caller" not in request.environ:  # it is there when a request has waited
                request.environ["tinyqueue.caller"] = self.access.authorize(role, lambda: self.queue)
            body = route(**args)
            if role == "admin" and request.path != "/work":
                self._note_action(route.__name__, args, body)
        except Problem as error:
            return self._refuse(error, role)
        except TinyQueueError as error:
            if isinstance(error, NotReplicated) and role == "admin":  # a replay, whose job is stored
                self._note_action(route.__name__, args, {"jobId": error.jobs[0].id})
            return self._refuse(problem(error), role)
        if isinstance(body, bottle.HTTPResponse):
            return body
        bottle.response.headers.update(response_headers())
        bottle.response.content_type = "application/json"
        return msgspec.json.encode(body)

    def _refuse(self, error: Problem, role: str) -> bottle.HTTPResponse:
        """Answer with a problem. Count it if it refuses a submission that was valid."""
        if role == "submit" and (reason := error.more.get("reason", error.kind)) in REASONS:
            self._refusals.note(reason, self.queue)
        return error.response()

    def _note_action(self, route: str, args: Mapping[str, str], body: Mapping[str, Any]) -> None:
        """Log an action of an operator, and add it to the audit. If that fails, log a warning."""
        by = request.environ["tinyqueue.caller"]
        action, target, result = describe_action(route, args, body)
        fields = {"event": "action", "key": by, "action": action, "target": target, "result": result}
        log.info("%s: %s %s", by or "somebody", action, shown(target), extra={"fields": fields})
        try:
            self.queue.note_action(by, action, target, result)
        except TinyQueueError as error:
            log.warning("could not add this action to the audit: %s", error)

    def default_error_handler(self, error: bottle.HTTPError) -> Any:
        """Answer what Bottle itself refuses. OPTIONS, which it refuses, gets a 204 with Allow."""
        headers = {name: value for name, value in error.headers.items() if name == "Allow"}
        if error.status_code == 405 and request.method == "OPTIONS":
            response = bottle.HTTPResponse("", 204, HEADERS | headers)
        else:
            details = {404: _explain_missing(request.path), 405: "unsupported method; see the Allow header"}
            detail = details.get(error.status_code, HTTPStatus(error.status_code).phrase)
            response = Problem(error.status_code, kind_of_status(error.status_code), detail, headers).response()
        response.apply(bottle.response)
        return response.body

    # Submitting jobs --------------------------------------------------------------------------------------------------

    def submit(self) -> dict[str, Any]:
        """Accept a job. The status is 201 if it is new, 200 if it was stored before."""
        fields = read_json(self.settings.max_body)
        draft = self._draft_job(fields)
        once = read_key(fields)
        job = self.queue.submit([draft], once)[0]
        request.environ["tinyqueue.job"] = job.id
        bottle.response.set_header("Location", f"jobs/{job.id}")  # relative, because a proxy may add a prefix
        return self._answer_submit([draft], [job], once)[0]

    def submit_batch(self) -> dict[str, Any]:
        """Accept up to 1,000 jobs, all or none.

        With ?partial=true, accept the valid ones and return an error for each of the others. The
        status is 201 if at least one job is new, and 200 if none is.
        """
        items = read_batch(self.settings.max_body)
        allow_partial = read_flag(read_query("partial"), "partial")
        if not isinstance(items, list) or not 1 <= len(items) <= MAX_JOBS:
            raise InvalidJob("jobs", f"must be an array of 1 to {MAX_JOBS} jobs")
        drafts = self._draft_jobs(items, allow_partial)
        valid = [draft for draft in drafts if isinstance(draft, Job)]
        once = read_key(items)
        jobs = self.queue.submit(valid, once) if valid else []
        answers = iter(self._answer_submit(valid, jobs, once))
        return {"jobs": [next(answers) if isinstance(draft, Job) else {"error": draft.body()} for draft in drafts]}

    def _answer_submit(self, drafts: Sequence[Job], jobs: Sequence[Job], once: Once | None) -> list[dict[str, Any]]:
        """Return the answer for each job, and set the status: 201 if any is new, else 200."""
        replayed = once is not None and once.replayed
        is_new = [job is draft for job, draft in zip(jobs, drafts, strict=True)]
        bottle.response.status = 201 if any(is_new) else 200
        if replayed:
            bottle.response.set_header("Idempotency-Replayed", "true")
        # A replay repeats the first answer. Else a job in place of a draft has its uniqueKey.
        return [
            summary(job) | ({} if new or replayed else {"duplicate": True})
            for job, new in zip(jobs, is_new, strict=True)
        ]

    def _draft_jobs(self, items: Sequence[Any], allow_partial: bool) -> list[Job | Problem]:
        """Draft the jobs of a batch, which may name each other in `after` by their `ref`."""
        now = self.queue.now()
        ids = [new_id(now) for _ in items]
        refs = read_refs(items, ids)
        drafts: list[Job | Problem] = []
        for at, fields in enumerate(items):
            try:
                drafts.append(self._draft_job(fields, refs, ids[at]))
            except InvalidJob as error:
                refusal = problem(error, index=at)
                if not allow_partial:
                    raise refusal from None
                drafts.append(refusal)
        refused = {id for id, draft in zip(ids, drafts, strict=True) if isinstance(draft, Problem)}
        while orphans := [at for at, job in enumerate(drafts) if isinstance(job, Job) and refused & {*job.after}]:
            orphaned = InvalidJob("after", "must not name a job of the batch that is invalid")
            drafts = [problem(orphaned, index=at) if at in orphans else draft for at, draft in enumerate(drafts)]
            refused.update(ids[at] for at in orphans)
        return drafts

    def _draft_job(self, fields: Any, refs: Mapping[str, str] | None = None, id: str = "") -> Job:
        """Make a job from a client's fields. Unlike Queue.draft, refuse types without a handler.

        `refs` has the ids of the jobs of its batch that have a `ref`, and `id` is its own.
        """
        queue = self.queue  # opening it has loaded the handlers
        options = read_arguments("job", fields, FIELDS | {"ref": "ref"}, ("type", "payload"))
        ref = options.pop("ref", None)
        if ref is not None and not is_ref(ref):
            raise InvalidJob("ref", "must be 1 to 100 of the characters A-Z a-z 0-9 . _ -, and not a job id")
        if refs and refs.get(ref or "", id) != id:
            raise InvalidJob("ref", "must differ from that of every other job of the batch")
        if refs and isinstance(options.get("after"), list):
            options["after"] = [refs.get(name, name) if isinstance(name, str) else name for name in options["after"]]
        job = queue.draft(**options)
        job.id = id or job.id
        return note_sent_ids(job)

    def replay(self, id: str) -> dict[str, Any]:
        """Submit an ended job again, with the same fields or others. Answers like submit."""
        fields = read_optional_json(self.settings.max_body)
        job = require_job(self.queue.get(id))
        known = {name: argument for name, argument in FIELDS.items() if name != "type"}
        options = read_arguments("replay", fields, known, (), job.type)
        draft = note_sent_ids(self.queue.redraft(job, **options))
        once = read_key(fields)
        new = self.queue.submit([draft], once)[0]
        request.environ["tinyqueue.job"] = new.id
        bottle.response.set_header("Location", f"../{new.id}")
        return self._answer_submit([draft], [new], once)[0]

    # Reading jobs, queues and workers ---------------------------------------------------------------------------------

    def list(self) -> dict[str, Any]:
        """List jobs that match a filter, newest first. Long payloads and results are shortened."""
        query = read_query()
        limit = read_int(query, "limit", 50, 1, 500)
        cursor = query.pop("cursor", "")
        page = self.queue.page(read_filter(query), limit=limit, cursor=cursor, cut=PREVIEW_BYTES)
        jobs, cursor = page
        return {"jobs": [shorten(job.answer()) for job in jobs], "cursor": cursor or None, "scanned": page.scanned}

    def count(self) -> dict[str, Any]:
        """Count the jobs that match a filter. Looks at up to 1,000 jobs in each request."""
        query = read_query()
        cursor = query.pop("cursor", "")
        found = self.queue.count(read_filter(query), cursor)
        return found | {"cursor": found["cursor"] or None}

    def failures(self) -> dict[str, Any]:
        """Group failed jobs, or jobs that wait for another attempt, by type and error."""
        query = read_query()
        cursor = query.pop("cursor", "")
        filter = read_filter(query | {"status": query.get("status") or "failed"})
        if filter.status not in ("failed", "pending"):
            raise InvalidJob("status", "must be failed, or pending for jobs that wait for another attempt")
        found = self.queue.failures(filter, cursor)
        return found | {"cursor": found["cursor"] or None}

    def show(self, id: str) -> dict[str, Any]:
        """Return a job. With ?wait=SECONDS, return it when it has ended or the time is up.

        Waiting takes no thread of our server. Any other server's thread blocks, so there only a few
        requests wait. The others are answered at once, with Retry-After. None waits where a process
        has one request at a time, because no other request could be answered meanwhile.
        """
        seconds = min(read_int(read_query("wait"), "wait", 0, 0, 3600), LONGEST_WAIT)
        waited = request.environ.get("tinyqueue.waited")
        if isinstance(waited, TinyQueueError):
            raise waited
        job = require_job(self.queue.get(id))
        if not seconds or waited or job.status not in UNENDED:
            return self._explain(job)
        if "tinyqueue.can_park" in request.environ:
            from tinyqueue_server import Parked

            raise Parked(partial(self._waiter_of(id).add, id, seconds, request.environ))
        if not request.environ.get("wsgi.multithread") or not self._blocked.acquire(blocking=False):
            bottle.response.set_header("Retry-After", "1")
            return self._explain(job)
        try:
            return self._explain(require_job(self.queue.wait_for(id, seconds)))
        finally:
            self._blocked.release()

    def _explain(self, job: Job) -> dict[str, Any]:
        """Return a job as clients see it, and why it does not run if it is pending.

        Only admins see what was answered to a webhook or to an http job that failed.
        """
        hides = job.type in BUILT_IN and "admin" not in self._roles()
        return answer(self.queue, job.without_traces() if hides else job)

    def job_log(self, id: str) -> dict[str, Any]:
        """Return the lines that a job logged after the line ?after=, and the status of the job."""
        after = read_int(read_query("after"), "after", 0, 0, 2**53 - 1)
        job, lines = self.queue.read_log(id, after)
        last = lines[-1].number if lines else after
        return {"lines": [line.answer() for line in lines], "after": last, "status": require_job(job).status}

    def _roles(self) -> Collection[str]:
        """Return the roles of the caller's key. Without keys, these are all."""
        name = request.environ["tinyqueue.caller"]
        return next((key.roles for key in self.access.keys if key.name == name), ROLES["admin"])

    def _waiter_of(self, id: str) -> Waiter:
        queue = self.queue.part_of(id)
        with self._lock:
            return self._waiters.setdefault(queue, Waiter(queue))

    def stop_waiting(self) -> None:
        """Answer all requests that wait for jobs, with the jobs as they are. Drain POST /work."""
        for waiter in list(self._waiters.values()):
            waiter.release_all()
        self._guest.stop()
        self._events.wake()

    def events(self) -> bottle.HTTPResponse:
        """Send the data of the dashboard's overview as server-sent events, until one side closes.

        Only our own server can send events without a thread for each listener.
        """
        if "tinyqueue.can_park" not in request.environ:
            raise Problem(404, "not-found", "this server cannot send events; poll GET /stats instead")
        self._require_running()
        headers = response_headers() | EVENT_HEADERS
        if request.method == "HEAD":
            return bottle.HTTPResponse("", 200, headers)
        self.queue  # noqa: B018 - if it cannot be opened, this is the answer
        place = self._events.enter()
        if not place:
            detail = f"this process already sends events to {LISTENERS} listeners; poll GET /stats instead"
            raise Problem(503, "too-many-listeners", detail, {"Retry-After": "60"})
        from tinyqueue_server import Stream

        raise Stream([*headers.items(), ("X-Request-ID", LOG_CONTEXT.get()()["requestId"])], place.attach)

    def _overview(self) -> bytes:
        parts: dict[str, Callable[[], Any]] = {
            "verdict": self.observer.verdict,  # first: it never fails
            "stats": self._overview_stats,
            "workers": self.queue.workers,
            "types": self._types,
        }
        return overview(parts, lambda error: problem_of(error).body())

    def _overview_stats(self) -> dict[str, Any]:
        """Return the stats. Fail at once if the verdict has just waited for Redis in vain."""
        if self.observer.away:
            raise self.observer.away
        return self.queue.stats(OVERVIEW_MINUTES)

    def _require_running(self) -> None:
        """Refuse the request if the server is stopping: another process should answer it."""
        if request.environ.get("tinyqueue.stopping"):
            headers = {"Retry-After": str(RETRY_AFTER)}
            raise Problem(503, "stopping", "this web process is stopping; use another one", headers)

    def queues(self) -> dict[str, Any]:
        return {"queues": self.queue.queues()}

    def stats(self) -> dict[str, Any]:
        return self.queue.stats(read_int(read_query("minutes"), "minutes", 0, 0, MAX_MINUTES))

    def types(self) -> dict[str, Any]:
        """Report by type how many attempts ended and failed, and how long jobs wait and run."""
        return types(self.queue, read_int(read_query("minutes"), "minutes", TYPES_MINUTES, 1, MAX_MINUTES))

    def verdict(self) -> dict[str, Any]:
        """Say whether all is well, or what is wrong and what to do. Answers without Redis too."""
        return self.observer.verdict()

    def scale(self) -> dict[str, int]:
        """Count the jobs that need workers now, in each ?queue= or in all, for an autoscaler."""
        query = read_query_pairs()
        # A misspelled parameter would count all queues, and start workers that have nothing to do.
        if unknown := {name for name, _ in query} - {"queue"}:
            raise InvalidJob(printable(min(unknown)), "unknown parameter; the only one is queue")
        if len(query) > MAX_SCALED:
            raise InvalidJob("queue", f"must not occur more than {MAX_SCALED} times")
        return self.queue.scale([check_name("queue", name) for _, name in query])

    def workers(self) -> dict[str, Any]:
        return {"workers": self.queue.workers()}

    def audit(self) -> dict[str, Any]:
        """List the latest actions of operators, newest first."""
        return {"actions": self.queue.audit(read_int(read_query("limit"), "limit", 100, 1, ACTIONS))}

    def limits(self) -> dict[str, Any]:
        return {"limits": self.queue.limits_in_use()}

    # Changing jobs and queues -----------------------------------------------------------------------------------------

    def cancel(self, id: str) -> dict[str, str]:
        """Cancel a pending job. For a running one the status is 202: it was asked to stop."""
        job = require_job(self.queue.cancel(id))
        bottle.response.status = 202 if job.status == "processing" else 200
        return summary(job)

    def retry(self, id: str) -> dict[str, str]:
        return summary(require_job(self.queue.retry(id)))

    def hasten(self, id: str) -> dict[str, str]:
        """Let a delayed or retrying job start now."""
        return summary(require_job(self.queue.hasten(id)))

    def purge(self, id: str) -> dict[str, str]:
        """Delete an ended job. The status is the one that it had."""
        return summary(require_job(self.queue.purge_one(id)))

    def cancel_many(self) -> dict[str, Any]:
        return self._change_many("cancel", "pending", {"pending"})

    def retry_many(self) -> dict[str, Any]:
        return self._change_many("retry", "failed", {"failed", "cancelled"})

    def purge_many(self) -> dict[str, Any]:
        return self._change_many("purge", "", set(ENDED))

    def _change_many(
        self, verb: Literal["cancel", "retry", "purge"], default: str, allowed: set[str]
    ) -> dict[str, Any]:
        fields = read_json(self.settings.max_body)
        most = read_most(fields, SCANNED)
        if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
            keys = f"{', '.join(FILTERS)}, cursor"
            raise InvalidJob("filter", f"must be an object of strings, and the number most; possible keys: {keys}")
        cursor = fields.pop("cursor", "")
        filter = read_filter({"status": default} | fields)
        request.environ["tinyqueue.filter"] = {"status": default} | fields
        if filter.status not in allowed:
            raise InvalidJob("status", f"must be {' or '.join(sorted(allowed))}; this route changes no other jobs")
        if verb == "purge":
            counts = self.queue.purge(filter, cursor, most)
        else:
            counts = self.queue.change_many(verb, filter, cursor, most)
        return counts | {"cursor": counts["cursor"] or None}

    def pause(self, name: str) -> dict[str, Any]:
        self.queue.pause(name)
        return {"queue": name, "paused": True}

    def resume(self, name: str) -> dict[str, Any]:
        self.queue.resume(name)
        return {"queue": name, "paused": False}

    def quiet_worker(self, name: str) -> dict[str, Any]:
        """Make a worker quiet: it takes no more jobs, and finishes those that it has taken."""
        require_worker(self.queue.quiet(name))
        return {"worker": name, "quiet": True}

    def resume_worker(self, name: str) -> dict[str, Any]:
        require_worker(self.queue.resume_worker(name))
        return {"worker": name, "quiet": False}

    def set_limit(self, limit: str) -> dict[str, Any]:
        """Pause, raise or lower a limit. An empty object returns to the numbers in the code."""
        fields = read_json(self.settings.max_body)
        if not isinstance(fields, dict):
            raise InvalidJob("limit", "must be an object with maxRunning, rate or paused")
        self.queue.set_limit(limit, read_override(limit, fields))
        return {"limit": limit, **self.queue.limits_in_use().get(limit, {})}

    # Schedules --------------------------------------------------------------------------------------------------------

    def schedules(self) -> dict[str, Any]:
        now = self.queue.now()
        found = tinyqueue_schedule.list_schedules(self.queue)
        return {"schedules": [made.answer(now, last) for made, last in found]}

    def put_schedule(self, name: str) -> dict[str, Any]:
        """Make a schedule, or replace one of the API. It keeps its pause and its last run."""
        queue = self.queue
        fields = read_arguments("schedule", read_json(self.settings.max_body), SCHEDULE_FIELDS, ("cron", "type"))
        made = tinyqueue_schedule.make_schedule(name, **({"payload": {}} | fields))
        return self._answer_schedule(tinyqueue_schedule.put(queue, made))

    def remove_schedule(self, name: str) -> dict[str, Any]:
        return self._answer_schedule(tinyqueue_schedule.remove(self.queue, name))

    def pause_schedule(self, name: str) -> dict[str, Any]:
        return self._answer_schedule(tinyqueue_schedule.pause(self.queue, name))

    def resume_schedule(self, name: str) -> dict[str, Any]:
        return self._answer_schedule(tinyqueue_schedule.resume(self.queue, name))

    def run_schedule(self, name: str) -> dict[str, str]:
        """Enqueue the job of a schedule now, even if it is paused."""
        found = tinyqueue_schedule.run(self.queue, name)
        job = require_schedule(found)
        bottle.response.set_header("Location", f"../../jobs/{job.id}")
        return summary(job)

    def _answer_schedule(self, found: Schedule | None) -> dict[str, Any]:
        made = require_schedule(found)
        last = self.queue.get(made.last_job) if made.last_job else None
        return made.answer(self.queue.now(), last)

    # Work -------------------------------------------------------------------------------------------------------------

    def work(self) -> dict[str, Any]:
        """Run the due jobs in this process for at most ?seconds=, and count the outcomes."""
        most = self.settings.max_work
        return self.run_jobs(read_int(read_query("seconds"), "seconds", min(WORK_TIME, most), 1, most))

    def run_jobs(self, seconds: float) -> dict[str, Any]:
        """Do what POST /work does, for a host that calls a function on a schedule.

        Raises Problem if this process runs jobs already, and Unavailable without Redis.
        """
        return self._guest.work(self.settings, self.queue, time.monotonic() + seconds)

    # Health, identity, metrics and documents --------------------------------------------------------------------------

    def health(self) -> dict[str, str]:
        """Report that this process is alive. Ignores Redis, which a restart would not repair."""
        return {"status": "ok"}

    def ready(self) -> dict[str, Any]:
        """Check that Redis takes writes, so jobs can be submitted. Warnings name other risks.

        A server that stops is not ready, so that a load balancer sends requests elsewhere.
        """
        self._require_running()
        self.queue.ping()
        return {"status": "ok", "warnings": list(map(str, self.observer.problems()))}

    def whoami(self) -> dict[str, Any]:
        """Return the name and roles of the caller's key. Without keys: no name, and all roles."""
        roles = self._roles()
        return {
            "name": request.environ["tinyqueue.caller"],
            "roles": [role for role in ROLES if role in roles],
            "embedded": not self.settings.redis_url,
        }

    def metrics(self) -> bottle.HTTPResponse:
        """Return metrics of all jobs and workers for Prometheus.

        A scrape that fails, for example without Redis, is counted by the next one that succeeds.
        """
        from prometheus_client.exposition import choose_encoder  # slow to import, and many servers are never scraped

        encode, content_type = choose_encoder(request.environ.get("HTTP_ACCEPT", ""))
        with self._lock:
            missed = self._scrape_errors
            self._scrape_errors = 0
        try:
            scrape = Scrape(self.queue, missed, self.observer.firing())
        except TinyQueueError:
            with self._lock:
                self._scrape_errors += missed + 1
            raise
        try:
            if missed:
                self.queue.count_scrape_errors(missed)
        except Unavailable:  # Redis may be read-only or full: the next scrape counts them
            with self._lock:
                self._scrape_errors += missed
        return bottle.HTTPResponse(encode(scrape), 200, response_headers() | {"Content-Type": content_type})

    def dashboard(self) -> bottle.HTTPResponse:
        """Return the dashboard. The page contains no data; it requests it like any other client."""
        page, policy = _dashboard()
        headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": policy,
            "Referrer-Policy": "no-referrer",
        }
        return bottle.HTTPResponse(page, 200, HEADERS | headers)

    def openapi(self) -> Any:
        """Return the OpenAPI document of this API and of all job types that have a handler."""
        self.queue  # noqa: B018 - opening it loads the handlers
        document = describe()
        document["components"]["parameters"]["seconds"]["schema"]["maximum"] = self.settings.max_work
        return document


# Errors of Bottle -----------------------------------------------------------------------------------------------------


def _explain_missing(path: str) -> str:
    """Say why no route has this path. A route with an id or a name has only valid ones."""
    if re.fullmatch("/jobs/[^/]+(/(log|retry|run|replay|purge))?", path):
        return "not a job id; an id is a UUID, such as 01900000-0000-7000-8000-000000000000"
    if re.fullmatch("/schedules/[^/]+(/(pause|resume|run))?", path):
        return "not the name of a schedule; a name is 1 to 100 of the characters A-Z a-z 0-9 . _ -"
    if re.fullmatch("/workers/[^/]+/(quiet|resume)", path):
        return "not the name of a worker; see GET /workers"
    if path.startswith("/limits/"):
        return "not the name of a limit; a name is a type, or type/value as GET /limits shows it"
    if re.fullmatch("/queues/[^/]+/(pause|resume)", path):
        return "not the name of a queue; a name is 1 to 100 of the characters A-Z a-z 0-9 . _ -"
    return "unknown path; see /openapi.json"


# The dashboard and the OpenAPI document -------------------------------------------------------------------------------


def _file(name: str) -> bytes:
    """Read a file that lies next to this module, both in a checkout and in an installation."""
    return Path(__file__).with_name(name).read_bytes()


@cache
def _dashboard() -> tuple[bytes, str]:
    """Return the page and its Content-Security-Policy.

    The policy allows the page's own script and style, requests to this server and data: images, and
    nothing else. With Trusted Types, the browser refuses script code that turns text into markup.
    """
    page = _file("dashboard.html")
    [script], [style] = (re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.S) for tag in (b"script", b"style"))
    script_hash, style_hash = (
        f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in (script, style)
    )
    return page, (
        f"default-src 'none'; script-src {script_hash}; style-src {style_hash}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def describe() -> dict[str, Any]:
    """Make the OpenAPI document of this API and of all job types that have a handler."""
    document: dict[str, Any] = msgspec.json.decode(_file("openapi.json"))
    return tinyqueue_openapi.describe(document)


app = API()


# The server -----------------------------------------------------------------------------------------------------------


def listen(settings: Settings) -> socket.socket:
    """Open the listening socket. Without HOST, it accepts IPv4 and, if the machine has it, IPv6."""
    host = settings.host
    both = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, settings.port), family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        # The kernel may support IPv6 on a machine that has no IPv6 address.
        if both and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            return socket.create_server(("", settings.port), backlog=1024)
        raise SettingsError(_explain_listen(settings, error)) from None


def _explain_listen(settings: Settings, error: OSError) -> str:
    """Say why a port cannot be opened, without a HOST that may be a secret."""
    host = settings.host or "*"
    is_host = host == "*" or looks_like_name(host) or IPV6.fullmatch(host)
    shown = f"HOST={host}" if is_host else "HOST (value not shown; it may be a secret)"
    # Python adds the address to the system's text.
    reason = str(error.strerror or error).partition(" (while attempting")[0]
    todo = "change HOST or PORT"
    if error.errno == errno.EADDRINUSE:
        todo = "stop the process that uses this port, or set PORT to another one"
    return f"cannot listen on {shown} PORT={settings.port}: {reason}; {todo}"


# Processes ------------------------------------------------------------------------------------------------------------


def serve(api: API, sock: socket.socket, lifeline: int | None = None) -> int:
    """Serve until a signal, with a worker if REDIS_URL is not set. Returns the exit code.

    Also stops when nobody holds the other end of the pipe `lifeline`.
    """
    from tinyqueue_server import Lifeline, Server

    server = Server(api, sock)
    if lifeline is not None:
        Lifeline(lifeline, server)
    if not api.settings.redis_url:
        return _serve_with_worker(api, server)
    signal.signal(signal.SIGTERM, lambda *_: server.stop(api.settings.ready_grace))
    signal.signal(signal.SIGINT, lambda *_: server.stop())
    reset_signals_in_children()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    server.run()
    return 0


def _serve_with_worker(api: API, server: Server) -> int:
    from tinyqueue.worker import EXIT_BROKEN, Worker, handle_signals  # needed only here

    forever = msgspec.structs.replace(api.settings, max_jobs=0, max_memory=0)  # a restart would lose all jobs
    worker = Worker(api.queue, forever)
    exit_code: int = EXIT_BROKEN

    def work() -> None:
        nonlocal exit_code
        try:
            exit_code = worker.run()
        finally:  # also if the worker crashes: a server must not accept jobs that nobody runs
            server.stop()

    handle_signals(worker, server.stop)
    thread = threading.Thread(target=work, name="worker")
    thread.start()
    server.run()
    thread.join()
    return exit_code


def serve_many(api: API, sock: socket.socket) -> int:
    """Serve from WEB_CONCURRENCY processes that share one socket, and replace those that die.

    They stop when this process dies. Returns the exit code. Signals are taken with sigwait, not
    handled: a handled signal that came just before a blocking wait for a child would take effect
    only when a child exits. Requires `hold_signals`.
    """
    import tinyqueue_server  # noqa: F401 - before the fork, so that the processes share it

    children: set[int] = set()
    stopping = False
    lifeline, held = os.pipe()
    while children or not stopping:
        while len(children) < api.settings.web_concurrency and not stopping:
            if (child := fork_held()) == 0:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
                os.close(held)
                set_up_logging(api.settings)  # the thread that writes the log is not in this process
                # serve unblocks SIGTERM and SIGINT when it has handlers for them
                exit_now(serve(api, sock, lifeline), functions=False)
            children.add(child)
        if (number := signal.sigwait({*SIGNALS, signal.SIGCHLD})) != signal.SIGCHLD:
            stopping = True
            sock.close()  # otherwise clients could still connect, and nobody would accept them
            for child in children:
                os.kill(child, number)
        for child, status in _exited(children):
            children.discard(child)
            if not stopping:
                log.error("web process %d exited with %d; replacing it", child, os.waitstatus_to_exitcode(status))
                time.sleep(1)  # so that processes that crash at startup are not replaced in a tight loop
    return 0


def _exited(children: set[int]) -> list[tuple[int, int]]:
    """Return children that have exited, with their status. One SIGCHLD may stand for several."""
    found = (os.waitpid(child, os.WNOHANG) for child in children)
    return [(child, status) for child, status in found if child]


def run(processes: int = 0) -> None:
    """Serve, and exit the process at the end. `processes`, unless 0, replaces WEB_CONCURRENCY."""
    settings = Settings.read()
    processes = (processes or settings.web_concurrency) if settings.redis_url else 1
    if processes > 1:
        hold_signals()
    else:
        exit_at_sigterm()
    set_up_logging(settings)
    load_handlers(settings.handlers)
    queue = open_queue(settings, settings.web_connections)
    api = API(settings, queue)
    sock = listen(settings)
    url = f"http://{settings.host or 'localhost'}:{sock.getsockname()[1]}"
    if settings.redis_url:
        for warning in warnings(queue):
            log.warning("%s", warning)
        queue.disconnect()
        connections = settings.shards * settings.web_connections
        count = plural(processes, "process", "processes")
        log.info("web server on %s: %s with up to %d connections to Redis each", url, count, connections)
    else:
        slots = plural(settings.worker_concurrency, "slot")
        log.info("web server on %s, and a worker with %s in this process", url, slots)
        log.warning("JOBS ARE NOT PERSISTED: REDIS_URL is not set; all jobs are lost when this process exits")
        for warning in process_warnings():
            log.warning("%s", warning)
    exit_code = serve_many(api, sock) if processes > 1 else serve(api, sock)
    exit_now(exit_code)


def command() -> click.Command:
    """Make the command that starts the server."""
    import click

    @click.command(epilog="\b\n" + Settings.help())
    @click.option("--reload", is_flag=True, help="Restart when the code changes. For development.")
    def main(reload: bool) -> None:
        """Serve the TinyQueue HTTP API."""
        _start(reload)

    return main


def _start(reload: bool) -> None:
    import click

    try:
        if reload:
            import hupper

            # By default it looks once a second, and kills a server that does not stop within one.
            settings = Settings.read()
            patience = settings.ready_grace + settings.shutdown_timeout + 5
            # hupper has threads of its own, which would take the signals that serve_many waits for.
            one = {"processes": 1}
            hupper.start_reloader(
                "tinyqueue.wsgi.run", reload_interval=0.2, shutdown_interval=patience, worker_kwargs=one
            )
        run()
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    except TinyQueueError as error:
        raise click.ClickException(str(error)) from None
    except ModuleNotFoundError as error:
        if error.name != "hupper":
            raise
        raise click.UsageError("--reload needs hupper; install it: pip install hupper") from None


if __name__ == "__main__":
    command()()
