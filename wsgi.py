"""The HTTP API, and the server that serves it.

    python wsgi.py       serve on HOST and PORT until SIGTERM or SIGINT; without REDIS_URL with an embedded Redis and workers
    wsgi:app             the same API for any other WSGI or serverless host

Importing this module reads no setting and opens no connection: `app` does both at its first request. JSON goes in and comes out;
an error is application/problem+json (RFC 9457).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Any

import bottle
import click
import msgspec
import waitress
from bottle import request
from waitress import wasyncore

from tinyqueue import (
    HANDLERS,
    MAX_DEPTH,
    Corrupted,
    InvalidJob,
    Queue,
    Settings,
    SettingsError,
    TinyQueueError,
    Unavailable,
    UnknownType,
    WrongStatus,
    from_json,
    load_handlers,
    set_up_logging,
)

log = logging.getLogger("tinyqueue.web")

THREADS = 8
CONNECTIONS = 500  # beyond these, new ones wait unanswered in the backlog; idle keep-alives count
RETRY_AFTER = 5  # seconds
SIGNALS = (signal.SIGTERM, signal.SIGINT)


# Problems -------------------------------------------------------------------------------------------------------------


class Problem(Exception):
    """A request that cannot be answered. `more` goes into the answer's body, `headers` into its head."""

    def __init__(self, status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None, **more: Any) -> None:
        super().__init__(detail)
        self.status, self.kind, self.headers, self.more = status, kind, headers or {}, more

    def answer(self) -> bottle.HTTPResponse:
        title = self.kind.replace("-", " ").capitalize()
        about = {"type": f"urn:tinyqueue:{self.kind}", "title": title, "status": self.status, "detail": str(self)} | self.more
        headers = {"Content-Type": "application/problem+json", "Cache-Control": "no-store", **self.headers}
        return bottle.HTTPResponse(msgspec.json.encode(about), self.status, headers)


# What the queue raises, as HTTP: the first that fits.
PROBLEMS: tuple[tuple[type[TinyQueueError], int, str], ...] = (
    (UnknownType, 422, "unknown-type"),
    (InvalidJob, 422, "invalid-job"),
    (WrongStatus, 409, "wrong-status"),
    (Unavailable, 503, "unavailable"),
    (SettingsError, 503, "misconfigured"),
    (Corrupted, 500, "corrupted"),
    (TinyQueueError, 500, "internal"),
)


def problem(error: TinyQueueError) -> Problem:
    """Translate an error of the queue."""
    status, kind = next((status, kind) for of, status, kind in PROBLEMS if isinstance(error, of))
    more: dict[str, Any] = {}
    match error:
        case UnknownType():
            more = {"field": error.field, "known": error.known}
        case InvalidJob():
            more = {"field": error.field} | ({"path": error.path} if error.path else {})
        case WrongStatus():
            more = {"jobStatus": error.job.status}
        case Unavailable():
            more = {"reason": error.reason}
    if status >= 500:
        log.warning("%s %s: %s", request.method, ascii(request.path), error)
    return Problem(status, kind, str(error), {"Retry-After": str(RETRY_AFTER)} if status == 503 else None, **more)


# The API --------------------------------------------------------------------------------------------------------------

ROUTES = (
    ("GET", "/health", "health"),
    ("GET", "/ready", "ready"),
    ("POST", "/jobs", "submit"),
    ("GET", "/jobs/<id>", "show"),
    ("GET", "/stats", "stats"),
)
FIELDS = {
    "type": "type",
    "payload": "payload",
    "maxAttempts": "max_attempts",
    "queue": "queue",
    "delay": "delay",
    "runAt": "run_at",
}


class API(bottle.Bottle):  # type: ignore[misc]
    """The routes over one queue; without one, it is made from the settings at the first request that needs it."""

    __setattr__ = object.__setattr__  # Bottle's own lets an attribute be set once only

    def __init__(self, settings: Settings | None = None, queue: Queue | None = None) -> None:
        super().__init__()
        self._lock, self._settings, self._queue = threading.Lock(), settings, queue
        for method, path, name in ROUTES:
            self.route(path, method, partial(self._answer, getattr(self, name)))

    @property
    def settings(self) -> Settings:
        if self._settings is None:
            self._settings = Settings.read()
        return self._settings

    @property
    def queue(self) -> Queue:
        with self._lock:
            if self._queue is None:
                if not self.settings.redis_url:
                    raise SettingsError("REDIS_URL is not set, and this server runs no workers: set it, or use python wsgi.py")
                load_handlers(self.settings.handlers)
                self._queue = Queue.from_settings(self.settings)
            return self._queue

    def _answer(self, act: Callable[..., Any], **args: str) -> Any:
        """Run a route: what it returns goes out as JSON, what it raises as a problem."""
        try:
            body = act(**args)
        except Problem as error:
            return error.answer()
        except TinyQueueError as error:
            return problem(error).answer()
        bottle.response.content_type = "application/json"
        bottle.response.set_header("Cache-Control", "no-store")
        return msgspec.json.encode(body)

    def default_error_handler(self, error: bottle.HTTPError) -> Any:
        """Answer what Bottle itself refuses. Its 405 names the methods that there are; OPTIONS asks for just that."""
        headers = {name: value for name, value in error.headers.items() if name == "Allow"}
        if error.status_code == 405 and request.method == "OPTIONS":
            answer = bottle.HTTPResponse("", 204, headers)
        else:
            phrase = HTTPStatus(error.status_code).phrase
            detail = {404: "there is no such path", 405: f"{phrase}: see Allow"}.get(error.status_code, phrase)
            answer = Problem(error.status_code, phrase.lower().replace(" ", "-"), detail, headers).answer()
        answer.apply(bottle.response)
        return answer.body

    # Routes -----------------------------------------------------------------------------------------------------------

    def health(self) -> dict[str, str]:
        """Whether this process is alive; says nothing of Redis, for restarting the process would not mend that."""
        return {"status": "ok"}

    def ready(self) -> dict[str, str]:
        """Whether jobs can be submitted: Redis takes writes."""
        self.queue.ping()
        return {"status": "ok"}

    def submit(self) -> dict[str, str]:
        """Accept a job: 201 when it is stored."""
        queue = self.queue
        job = queue.submit([self._draft(self._body())])[0]
        bottle.response.status = 201
        bottle.response.set_header("Location", f"/jobs/{job.id}")
        return {"jobId": job.id, "status": job.status}

    def show(self, id: str) -> dict[str, Any]:
        job = self.queue.get(id)
        if job is None:
            raise Problem(404, "not-found", "there is no job of that id, or it ended too long ago")
        return job.answer()

    def stats(self) -> dict[str, Any]:
        return self.queue.stats()

    # What comes in ----------------------------------------------------------------------------------------------------

    def _body(self) -> Any:
        if request.content_type.partition(";")[0].strip().lower() != "application/json":
            raise Problem(415, "unsupported-media-type", "send JSON, with Content-Type: application/json")
        limit = self.settings.max_body
        body = b"" if request.content_length > limit else request.body.read(limit + 1)
        if request.content_length > limit or len(body) > limit:
            raise Problem(413, "too-large", f"a request's body may have {limit} bytes at most (TINYQUEUE_MAX_BODY)")
        try:
            return from_json(body, MAX_DEPTH + 1)  # the payload's, and the job around it
        except ValueError as error:
            raise Problem(400, "not-json", f"the body is not JSON: {error}") from None

    def _draft(self, fields: Any) -> Any:
        """Make a job of what the client sent. Unlike Queue.draft it insists on a known type: a typing error must not wait."""
        if not isinstance(fields, dict):
            raise InvalidJob("job", "must be an object with type and payload")
        if unknown := fields.keys() - FIELDS.keys():
            raise InvalidJob(ascii(min(unknown))[1:-1][:100], f"is no field of a job; there are {', '.join(FIELDS)}")
        if missing := {"type", "payload"} - fields.keys():
            raise InvalidJob(max(missing), "is missing")
        if isinstance(fields["type"], str) and fields["type"] not in HANDLERS:
            raise UnknownType(ascii(fields["type"])[1:-1][:100], sorted(HANDLERS))
        return self.queue.draft(**{FIELDS[name]: value for name, value in fields.items()})


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
        if both and error.errno in (97, 99):  # the kernel knows IPv6, this machine does not
            return socket.create_server(("", port), backlog=1024)
        raise SettingsError(f"cannot listen on HOST={host or '*'} PORT={port}: {error.strerror or error}") from None


class Server:
    """Serves an API on a socket until it is told to stop, then answers what it has accepted."""

    def __init__(self, api: API, sock: socket.socket) -> None:
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a queue of requests is what threads are for
        self.channels: dict[int, Any] = {}
        self.drain = api.settings.shutdown_timeout
        self.stopping = False
        self.waitress = waitress.create_server(
            api,
            self.channels,
            sockets=[sock],
            threads=THREADS,
            connection_limit=CONNECTIONS,
            max_request_body_size=4 * api.settings.max_body,  # a little too large gets an answer in JSON, far too large none
            max_request_header_size=32768,
            asyncore_use_poll=True,
            ident=None,
        )

    def stop(self) -> None:
        """Begin to stop. May be called from a signal handler and from any thread."""
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
    from worker import Worker, obey_signals  # only here does the web process need it

    worker, codes = Worker(api.queue, api.settings), [0]

    def work() -> None:
        codes[0] = worker.run()
        server.stop()

    thread = threading.Thread(target=work, name="worker")
    thread.start()
    obey_signals(worker, server.stop)
    server.run()
    thread.join()
    return codes[0]


def serve_many(api: API, sock: socket.socket) -> int:
    """Serve from WEB_CONCURRENCY processes that accept from one socket; one that dies is replaced. Returns the exit code."""
    children: set[int] = set()
    stopping = threading.Event()

    def stop(*_: Any) -> None:
        stopping.set()
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while children or not stopping.is_set():
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until each child is known here, and its own handlers are set there
        while len(children) < api.settings.web_concurrency and not stopping.is_set():
            if (child := os.fork()) == 0:
                os._exit(serve(api, sock))
            children.add(child)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        with suppress(ChildProcessError):
            child, status = os.wait()
            children.discard(child)
            if not stopping.is_set():
                log.error("web process %d ended (%d): it is replaced", child, os.waitstatus_to_exitcode(status))
                time.sleep(1)
    return 0


def run() -> None:
    """Start the service as the settings say, and end the process when it is over."""
    settings = Settings.read()
    set_up_logging(settings)
    load_handlers(settings.handlers)
    api, sock = API(settings, Queue.from_settings(settings)), listen(settings)
    where = f"http://{settings.host or 'localhost'}:{sock.getsockname()[1]}"
    if settings.redis_url:
        log.info("web on %s, %d processes", where, settings.web_concurrency)
    else:
        log.info("web and %d workers in one process on %s", settings.worker_concurrency, where)
        log.warning("NOTHING IS KEPT: without REDIS_URL all jobs live in this process's memory and end with it")
    code = serve_many(api, sock) if settings.redis_url and settings.web_concurrency > 1 else serve(api, sock)
    logging.shutdown()
    os._exit(code)


@click.command(epilog="\b\n" + Settings.help())
@click.option("--reload", is_flag=True, help="Start anew whenever the code changes; for development.")
def main(reload: bool) -> None:
    """Serve the HTTP API of TinyQueue."""
    try:
        if not reload:
            return run()
        import hupper

        hupper.start_reloader("wsgi.run")
        run()
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    except ModuleNotFoundError as error:
        if error.name != "hupper":
            raise
        raise click.UsageError("--reload needs hupper: pip install '.[dev]'") from None


if __name__ == "__main__":
    main()
