"""What a process needs before it works: settings from the environment, logging and signals.

Also opens what the settings name: the queue and the handlers.
"""

from __future__ import annotations

import atexit
import codecs
import importlib
import json
import logging
import math
import os
import re
import select
import signal
import sys
import threading
import time
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import cache, partial
from io import StringIO
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Annotated, Any, ClassVar, Literal, NoReturn

import msgspec
from dotenv import load_dotenv
from msgspec import Meta

from tinyqueue import (
    BUILT_IN,
    HANDLERS,
    WRITERS,
    Failure,
    Handler,
    InvalidJob,
    Queue,
    SettingsError,
    Unavailable,
)
from tinyqueue_embedded import SCHEME, StartError, folder_of, local_redis
from tinyqueue_http import read_networks, read_secrets, register
from tinyqueue_json import error_text
from tinyqueue_schedule import declared
from tinyqueue_shards import AnyQueue, Shards

WEB_THREADS = 8  # threads of a web process that answer requests
SIGNALS = (signal.SIGTERM, signal.SIGINT)  # they stop a process
EXIT_TIME = 3.0  # seconds that a process which has done its work may take to exit
SPARE = 2  # spare connections of a process, because one may be on its way between two threads


# Settings -------------------------------------------------------------------------------------------------------------

PLAIN_NAMES = {"redis_url", "host", "port", "worker_concurrency", "web_concurrency", "log_format", "log_level"}
PLATFORMS = re.compile("DYNO|RENDER|K_SERVICE|FLY_APP_NAME|VERCEL|RAILWAY_.*|AWS_LAMBDA_.*")
# Values that an error may repeat: numbers, durations and short words. Others may be a password that
# was pasted into the wrong variable.
HARMLESS = re.compile("[+-]?[0-9.]{1,12}|[0-9]{1,9} ?/?[a-z]{1,8}|[A-Za-z]{1,10}")
# Marks at the beginning of a text file. That of UTF-32 begins with that of UTF-16.
ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


# What a pattern cannot check. Each raises ValueError with the rule, and without the value.
CHECKS: dict[str, Callable[[str], object]] = {"webhook_secrets": read_secrets, "http_allow": read_networks}


def variable(field: str) -> str:
    return field.upper() if field in PLAIN_NAMES else f"TINYQUEUE_{field.upper()}"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename=variable):
    """All settings: one table for the environment, `--help` and docs/settings.md.

    An empty variable counts as unset.
    """

    redis_url: Annotated[
        str,
        Meta(
            description="URL of the Redis server, or embedded:FOLDER for one that TinyQueue starts and that keeps its "
            "data there; unset: the web process embeds one and loses all jobs when it exits; other commands need it"
        ),
    ] = ""
    host: Annotated[str, Meta(description="address the web process listens on; unset: all, IPv4 and IPv6")] = ""
    port: Annotated[int, Meta(ge=0, le=65535, description="port the web process listens on")] = 3000
    worker_concurrency: Annotated[
        int, Meta(ge=1, le=500, description="slots of a worker process: how many jobs it runs at a time")
    ] = 5
    web_concurrency: Annotated[
        int, Meta(ge=1, le=64, description="number of web processes; they share the listening socket")
    ] = 1
    log_format: Annotated[Literal["text", "json"], Meta(description="log format: text or json")] = "text"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="minimum log level: debug, info, warning or error"),
    ] = "info"
    handlers: Annotated[str, Meta(description="modules that register handlers, comma-separated")] = "handlers"
    namespace: Annotated[
        str, Meta(pattern=r"^[A-Za-z0-9._-]{1,100}\Z", description="key prefix and cluster hash tag in Redis")
    ] = "queue"
    lease: Annotated[
        int, Meta(ge=2, le=3600, description="seconds without a heartbeat after which a worker counts as dead")
    ] = 30
    shutdown_timeout: Annotated[
        int, Meta(ge=0, le=3600, description="seconds running jobs may take at SIGTERM before they are handed back")
    ] = 25
    ready_grace: Annotated[
        int,
        Meta(
            ge=0,
            le=300,
            description="seconds at SIGTERM for which a web process still accepts connections and answers /ready "
            "with 503",
        ),
    ] = 0
    watchdog: Annotated[
        int,
        Meta(
            ge=10,
            le=86400,
            description="seconds without Redis, or unable to take jobs or save outcomes, after which a worker exits",
        ),
    ] = 300
    max_jobs: Annotated[
        int, Meta(ge=0, le=10**9, description="jobs after which a worker process stops to be restarted; 0: unlimited")
    ] = 0
    max_memory: Annotated[
        int,
        Meta(ge=0, le=10**6, description="megabytes in use above which a worker process does the same; 0: unlimited"),
    ] = 0
    job_logs: Annotated[bool, Meta(description="1: keep with each job what its handler logs")] = False
    max_work: Annotated[
        int,
        Meta(
            ge=1,
            le=3600,
            description="maximum seconds of POST /work; keep it 5 seconds below the request time-out of the platform",
        ),
    ] = 25
    max_body: Annotated[int, Meta(ge=1024, le=16 << 20, description="maximum size of a request body in bytes")] = 262144
    keep_completed: Annotated[int, Meta(ge=1, le=10**9, description="seconds to keep completed jobs")] = 86400
    keep_failed: Annotated[int, Meta(ge=1, le=10**9, description="seconds to keep failed and cancelled jobs")] = 604800
    keep_once: Annotated[int, Meta(ge=60, le=10**9, description="seconds to remember an Idempotency-Key")] = 86400
    max_pending: Annotated[int, Meta(ge=0, le=10**9, description="maximum pending jobs per queue; 0: unlimited")] = 0
    max_wait: Annotated[
        int,
        Meta(
            ge=0,
            le=10**9,
            description="seconds that the next job of a queue may wait before the verdict warns; 0: unlimited",
        ),
    ] = 300
    min_replicas: Annotated[
        int, Meta(ge=0, le=100, description="number of replicas that must have a job before its submit succeeds")
    ] = 0
    api_keys: Annotated[
        str,
        Meta(
            description="API keys as name:role:secret, comma-separated; roles: submit, read, admin; a secret alone, "
            "of 32 or more characters, is an admin key"
        ),
    ] = ""
    open: Annotated[bool, Meta(description="1: accept requests from any host without a key")] = False
    rate_limit: Annotated[
        str,
        Meta(
            pattern=r"^([1-9][0-9]{0,8}/(second|minute|hour))?\Z",
            description="maximum requests per key or address, such as 600/minute; unset: unlimited",
        ),
    ] = ""
    trusted_proxies: Annotated[
        int,
        Meta(
            ge=0,
            le=10,
            description="number of proxies in front of the server, N; the client's address is the Nth from the right "
            "in X-Forwarded-For",
        ),
    ] = 0
    shards: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description="number of namespaces to spread jobs over in a cluster; while jobs are stored, do not lower it "
            "and do not change it from 1",
        ),
    ] = 1
    tls_verify: Annotated[bool, Meta(description="0: accept any certificate of a rediss:// server")] = True
    webhook_secrets: Annotated[
        str,
        Meta(
            description="secret that signs webhooks and HTTP jobs: whsec_ and the Base64 of 24 to 64 bytes; two, "
            "comma-separated, while receivers change from one to the other"
        ),
    ] = ""
    http_allow: Annotated[
        str,
        Meta(
            description="networks that are not public and that webhooks and HTTP jobs may reach, comma-separated, such "
            "as 10.1.0.0/16"
        ),
    ] = ""

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
        """Read settings from the environment and from `.env` in the working directory.

        The environment wins over the file, and `overrides` win over both. Raises SettingsError for
        an invalid value, for an unknown name that begins with TINYQUEUE_, and on a hosting platform
        without REDIS_URL.
        """
        if environ is None:
            # Into the environment, because handlers have settings of their own.
            load_dotenv(stream=StringIO(_read_dotenv()))
            environ = os.environ
        names = {field.encode_name for field in msgspec.structs.fields(cls)}
        raw = {k: v for k, v in environ.items() if v and (k in names or k.startswith("TINYQUEUE_"))}
        raw |= {variable(k): v for k, v in overrides.items() if v is not None}
        if unknown := sorted(raw.keys() - names):
            raise SettingsError(f"{unknown[0]} is not a setting; use one of {', '.join(sorted(names))}")
        try:
            settings = msgspec.convert(raw, cls, strict=False)
        except msgspec.ValidationError as error:
            rule, _, path = str(error).partition(" - at `$.")
            raise SettingsError(cls._explain(rule, path.rstrip("`"), raw)) from None
        for field, check in CHECKS.items():
            try:
                check(getattr(settings, field))
            except ValueError as error:
                raise SettingsError(cls._explain(str(error), variable(field), raw)) from None
        platform = next((name for name, value in environ.items() if value and PLATFORMS.fullmatch(name)), None)
        if platform and (not settings.redis_url or settings.is_local):
            needed = "must name a Redis server" if settings.redis_url else "is required"
            why = "the embedded Redis would lose all jobs at every restart"
            raise SettingsError(f"REDIS_URL {needed} here ({platform} is set): {why}")
        return settings

    @classmethod
    def _explain(cls, rule: str, name: str, raw: Mapping[str, Any]) -> str:
        """Say what is wrong with a value, without a value that may be a secret."""
        meaning = next(text for known, _, text in cls.table() if known == name)
        value = str(raw[name])
        is_harmless = HARMLESS.fullmatch(value) and not name.endswith(("KEYS", "SECRETS"))
        shown = f"{name}={value!r}" if is_harmless else f"{name} (value not shown; it may be a secret)"
        # msgspec's own texts would repeat the value, or a regular expression.
        if rule.startswith("Invalid enum value"):
            rule = "unknown value"
        elif " matching regex " in rule:
            rule = "malformed value"
        return f"{shown} is not valid: {rule} ({meaning})"

    @classmethod
    def table(cls) -> list[tuple[str, str, str]]:
        """Return the table of `--help` and docs/settings.md: variables, defaults and meanings."""
        hints = typing.get_type_hints(cls, include_extras=True)
        return [
            (
                f.encode_name,
                str(int(f.default)) if isinstance(f.default, bool) else str(f.default),
                hints[f.name].__metadata__[0].description,
            )
            for f in msgspec.structs.fields(cls)
        ]

    @classmethod
    def help(cls) -> str:
        """Return the table as text for `--help`."""
        lines = [f"  {name:<26} {text}{f' [{default}]' if default else ''}" for name, default, text in cls.table()]
        return "\n".join(
            ["Settings, from environment variables or from .env in the working directory [default]:", *lines]
        )

    @property
    def is_local(self) -> bool:
        """Whether TinyQueue itself runs the Redis, in a folder of this machine."""
        return self.redis_url.startswith(SCHEME)

    @property
    def web_connections(self) -> int:
        """How many connections a web process may open to each shard: one for each thread."""
        return WEB_THREADS + SPARE

    @property
    def worker_connections(self) -> int:
        """How many a worker may open to each shard.

        The taker, an exchange, the settler and the keeper use one each. WRITERS slots at a time
        write progress.
        """
        return 4 + min(self.worker_concurrency, WRITERS) + SPARE


def _read_dotenv() -> str:
    """Return the text of `.env`, in UTF-8 or in an encoding that its mark names.

    Without the file, and if `.env` is a folder such as a virtual environment, the text is empty.
    """
    try:
        data = Path(".env").read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        return ""
    except OSError as error:
        raise SettingsError(f"cannot read .env: {error.strerror}; change its permissions or delete it") from None
    encoding = next((name for mark, name in ENCODINGS if data.startswith(mark)), "utf-8")
    if encoding.startswith("utf-8") and b"\0" in data:
        raise SettingsError(".env contains null characters, as UTF-16 without a mark does; save it as UTF-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SettingsError(f".env is not valid {encoding.upper()} at line {line}; save it as UTF-8") from None


def plural(number: int, one: str, many: str = "") -> str:
    """Count something: 1 job, 2 jobs."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def error_line(error: Failure | None) -> str:
    """Return the type and the message of a job's error in one line."""
    return " ".join(f"{error.type}: {error.message}".split()) if error else ""


# Logging --------------------------------------------------------------------------------------------------------------

LOGGERS = ("tinyqueue", "tinyqueue.worker", "tinyqueue.web")
LEVELS = {getattr(logging, name): name for name in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")}
MAX_UNREAD = 4 << 20  # bytes of log lines that wait for a slow reader
PIPE_BUF = 4096  # a write of up to that many bytes is not mixed with those of other processes

# Returns the log fields of the job or request that the thread works on.
LOG_CONTEXT: ContextVar[Callable[[], dict[str, Any]]] = ContextVar("log_context", default=dict)


class LogWriter:
    """Writes log lines to a file from a thread of its own, so no other thread waits for the reader.

    While more than MAX_UNREAD bytes wait for it, further lines are dropped. `report` returns the
    line that says how many. A forked process has no such thread and writes its lines itself.
    """

    def __init__(self, file: int, report: Callable[[int], bytes]) -> None:
        self.file = file
        self.report = report
        self.lines: SimpleQueue[bytes] = SimpleQueue()
        self.lock = threading.Lock()  # never held while anything is written
        self.unread = 0
        self.dropped = 0
        self.forked = False
        os.register_at_fork(after_in_child=self._after_fork)
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def put(self, line: bytes) -> None:
        if self.forked:
            self._write(line)
            return
        with self.lock:
            if self.unread + len(line) > MAX_UNREAD:
                self.dropped += 1
                return
            self.unread += len(line)
            self.lines.put(line)

    def flush(self, seconds: float) -> None:
        """Wait until all lines are written, but not longer than that."""
        deadline = time.monotonic() + seconds
        while self.unread and time.monotonic() < deadline:
            time.sleep(0.005)

    def _run(self) -> None:
        line = b""
        reported_at = time.monotonic()
        while True:
            batch = line or self.lines.get()
            line = b""
            with suppress(Empty):
                while len(batch) + len(line := self.lines.get_nowait()) <= PIPE_BUF:
                    batch += line
                    line = b""
            self._write(batch)
            with self.lock:
                self.unread -= len(batch)
            if self.dropped and (self.lines.empty() or time.monotonic() - reported_at > 1.0):
                reported_at = time.monotonic()
                with self.lock:
                    dropped = self.dropped
                    self.dropped = 0
                self._write(self.report(dropped))

    def _write(self, data: bytes) -> None:
        with suppress(OSError):  # it is closed, or its reader is gone
            while data:
                try:
                    data = data[os.write(self.file, data) :]
                except BlockingIOError:
                    select.select([], [self.file], [])

    def _after_fork(self) -> None:
        self.forked = True


class JSONFormatter(logging.Formatter):
    """Write a log line as an object of strict JSON. No field replaces time, level or message."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": int(record.created * 1000), "level": _level(record).lower(), "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(_strict(line | getattr(record, "fields", {}) | line), allow_nan=False)


def _strict(value: Any) -> Any:
    """Replace what strict JSON cannot hold: NaN and infinities by null, any object by its text."""
    if isinstance(value, dict):
        return {_strict(str(name)): _strict(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, int):
        return value
    return str.encode(str(value), "utf-8", "backslashreplace").decode()


class TextFormatter(logging.Formatter):
    """Write a log line for people. Escapes control characters, so that no text can forge a line.

    The time is UTC. The ids to search for follow the message, unless it names them. Tracebacks are
    indented.
    """

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        fields = getattr(record, "fields", {})
        ids = {name: str(fields[name]) for name in ("job", "requestId", "traceparent") if name in fields}
        missing = [f"{name}={id}" for name, id in ids.items() if id not in message]
        trace = self.formatException(record.exc_info).splitlines() if record.exc_info else []
        at = datetime.fromtimestamp(record.created, UTC).isoformat(" ", "milliseconds").replace("+00:00", "Z")
        head = " ".join([at, _level(record), message, *missing])
        return "\n    ".join(map(_one_line, [head, *trace]))


def _level(record: logging.LogRecord) -> str:
    return LEVELS.get(record.levelno) or str(record.levelname)  # handlers may have renamed the known ones


def _one_line(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class LogHandler(logging.Handler):
    """Formats a record in the thread that logs it, and gives the line to a writer. Takes no lock.

    Up to Python 3.12, TimedOut can hit a handler between taking the lock of logging.Handler and
    the `try` that would release it. Then everybody who logs would wait for ever.
    """

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.formatter = formatter
        self.encoding = getattr(sys.__stderr__, "encoding", None) or "utf-8"
        self.writer = LogWriter(_standard_error(), self._report_dropped)

    def createLock(self) -> None:
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        if shown := bool(self.filter(record)):
            self.write(record)
        return shown

    def write(self, record: logging.LogRecord) -> None:
        try:
            line = self._line(record)
        except Exception as error:
            line = self._line(_describe_faulty(record, error))
        self.writer.put(line)

    def _line(self, record: logging.LogRecord) -> bytes:
        """Format a record with the fields of LOG_CONTEXT and of `extra={"fields": {...}}`."""
        own = getattr(record, "fields", None)
        record.fields = LOG_CONTEXT.get()() | (own if isinstance(own, dict) else {})
        return (self.format(record) + "\n").encode(self.encoding, "backslashreplace")

    def _report_dropped(self, count: int) -> bytes:
        text = f"dropped {plural(count, 'log line')} because standard error was not read fast enough"
        return self._line(logging.LogRecord("tinyqueue", logging.WARNING, "", 0, text, (), None))


def _describe_faulty(record: logging.LogRecord, error: Exception) -> logging.LogRecord:
    """Make a record that shows where a record came from that cannot be formatted."""
    why = Failure.of(error)
    text = f"cannot format a log line from {record.pathname}:{record.lineno}: {why.type}: {why.message}"
    return logging.LogRecord("tinyqueue", logging.ERROR, "", 0, "%s", (text,), None)


class OwnLogger(logging.Logger):
    """The class of TinyQueue's loggers in its own processes: they only use `handler`, and no lock.

    So whatever a module of handlers does to `logging` cannot silence, change or stop them.
    """

    handler: ClassVar[LogHandler]
    threshold: ClassVar[int]

    def isEnabledFor(self, level: int) -> bool:
        return level >= self.threshold

    def findCaller(self, *_: Any, **__: Any) -> tuple[str, int, str, None]:
        return "", 0, "", None  # no line shows it

    def makeRecord(self, *args: Any, **_: Any) -> logging.LogRecord:
        record = logging.LogRecord(*args[:8])
        record.__dict__.update(args[8] or {})  # what was given as `extra`
        return record

    def handle(self, record: logging.LogRecord) -> None:
        self.handler.write(record)


def _standard_error() -> int:
    """Return a file for the log that stays the same if a handler redirects or closes its own."""
    try:
        return os.dup(sys.__stderr__.fileno())  # type: ignore[union-attr]
    except (AttributeError, ValueError, OSError):
        return os.open(os.devnull, os.O_WRONLY)


def set_up_logging(settings: Settings) -> None:
    """Log to standard error, in the format and from the level that the settings name."""
    handler = LogHandler(JSONFormatter() if settings.log_format == "json" else TextFormatter())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)  # they would be written to standard error by any thread
    OwnLogger.handler = handler
    OwnLogger.threshold = logging.getLevelNamesMapping()[settings.log_level.upper()]
    for name in LOGGERS:
        logging.getLogger(name).__class__ = OwnLogger


def flush_log(seconds: float) -> None:
    """Wait until all log lines are written, but not longer than that."""
    if handler := getattr(OwnLogger, "handler", None):
        handler.writer.flush(seconds)


# Signals, and leaving the process -------------------------------------------------------------------------------------


def exit_now(code: int, seconds: float = EXIT_TIME, functions: bool = True) -> NoReturn:
    """Exit without waiting for threads that still run.

    With exit code 0 the functions that were registered with atexit run before, unless `functions`
    is false. All that may take up to `seconds`.
    """
    threading.Thread(target=_exit_after, args=(seconds, code), daemon=True).start()
    if functions and code == 0:
        with suppress(BaseException):
            atexit._run_exitfuncs()
    logging.shutdown()
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        sys.stderr.flush()
    flush_log(seconds)
    os._exit(code)


def process_warnings() -> list[str]:
    """Return what is wrong with how a process that runs handlers was started."""
    if os.getpid() != 1:
        return []
    what = "this worker is process 1 and does not reap the processes that handlers leave behind"
    where = "docker run --init, init: true in Compose, shareProcessNamespace: true in Kubernetes"
    return [f"{what}: start the container with an init ({where})"]


def exit_at_sigterm() -> None:
    """Exit at SIGTERM, as a process that has done nothing yet may. Call this first in a process.

    Without a handler, Linux keeps SIGTERM from the first process of a container. What started this
    process may have blocked signals.
    """
    reset_signals_in_children()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def hold_signals() -> None:
    """Block signals that the main thread takes with sigwait. Call this first in a process.

    Threads that start later have them blocked too. One that took SIGTERM would kill the process,
    and one that took SIGCHLD would keep it from the main thread.
    """
    reset_signals_in_children()
    signal.pthread_sigmask(signal.SIG_BLOCK, {*SIGNALS, signal.SIGCHLD})


@cache
def reset_signals_in_children() -> None:
    """Give processes that this one forks from now on the default signal handlers, none blocked."""
    os.register_at_fork(before=_block_signals, after_in_parent=_restore_mask, after_in_child=_reset_signals)


class Forking(threading.local):
    """What the thread that forks needs to know after it."""

    mask: frozenset[int] | set[Any] = frozenset()  # the signals that it blocks
    held = False  # whether the child keeps these


FORKING = Forking()


def fork_held() -> int:
    """Fork a process that blocks the signals of `hold_signals` until it has handlers."""
    FORKING.held = True
    try:
        return os.fork()
    finally:
        FORKING.held = False


def _block_signals() -> None:
    """Block signals during a fork: Python forgets those that come before the child is set up."""
    FORKING.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _restore_mask() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, FORKING.mask)


def _reset_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not FORKING.held:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*SIGNALS, signal.SIGCHLD})


def _exit_after(seconds: float, code: int) -> None:
    """Exit when time is up: one of the functions may hang, or a file whose reader has stalled."""
    time.sleep(seconds)
    os._exit(code)


# Opening the queue and the handlers -----------------------------------------------------------------------------------


def open_queue(settings: Settings, connections: int = 100) -> AnyQueue:
    """Open the queue that the settings name: a Queue, or Shards. Without REDIS_URL it is embedded.

    This process may open up to `connections` connections to each shard. The Redis of an embedded:
    URL runs when this returns. Raises Unavailable if it cannot be started.
    """
    names = "lease", "keep_completed", "keep_failed", "keep_once", "max_pending", "min_replicas"
    options: dict[str, Any] = {name: getattr(settings, name) for name in names}
    if settings.min_replicas and (not settings.redis_url or settings.is_local):
        raise SettingsError("TINYQUEUE_MIN_REPLICAS needs REDIS_URL: the embedded Redis has no replicas")
    if settings.is_local:
        start_redis(settings.redis_url)
    make = Queue.embedded
    if settings.redis_url:
        make = partial(Queue.from_url, settings.redis_url, connections=connections, tls_verify=settings.tls_verify)
    if settings.shards == 1:
        return make(namespace=settings.namespace, **options)
    return Shards([make(namespace=f"{settings.namespace}.{at}", **options) for at in range(settings.shards)])


def start_redis(url: str) -> None:
    """Start the Redis of an embedded: URL unless it runs. Raises SettingsError or Unavailable."""
    try:
        local_redis(folder_of(url)).start()
    except ValueError as error:
        raise SettingsError(str(error)) from None
    except StartError as error:
        raise Unavailable("unreachable", str(error)) from None


def load_handlers(modules: str) -> dict[str, Handler[Any, Any, Any]]:
    """Import the modules that register handlers, from the working directory first.

    Then registers the built-in types. Raises SettingsError if a module cannot be imported, or if a
    schedule is wrong. It also does if no module registers a handler, unless tinyqueue_http is one
    of the modules, which asks for the built-in types alone.
    """
    if sys.path[:1] != [os.getcwd()]:
        sys.path.insert(0, os.getcwd())
    for module in filter(None, (name.strip() for name in modules.split(","))):
        if not all(part.isidentifier() for part in module.split(".")):
            raise SettingsError(f"TINYQUEUE_HANDLERS: {_missing_module(module)}")
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module.partition(".")[0] and error.name != module:
                raise SettingsError(f"cannot import {module}: {error}") from error
            raise SettingsError(f"TINYQUEUE_HANDLERS: {_missing_module(module)}") from None
        except (Exception, SystemExit) as error:
            text = " ".join(error_text(error).split())
            raise SettingsError(f"cannot import {module}: {type(error).__name__}: {text}") from error
    try:
        register()
    except TypeError as error:
        raise SettingsError(str(error)) from None
    if not HANDLERS.keys() - BUILT_IN and "tinyqueue_http" not in modules:
        raise SettingsError(f"{modules} registers no handler: decorate a function with @handler('type')")
    try:
        declared()
    except InvalidJob as error:
        raise SettingsError(f"{modules}: {error}") from None
    return HANDLERS


def _missing_module(module: str) -> str:
    name = f"module {module}" if looks_like_name(module) else "such module (name not shown; it may be a secret)"
    return f"there is no {name} here; create it, or name the module of your handlers"


def looks_like_name(text: str) -> bool:
    """Check that a text is a dotted name, rather than a URL or a random secret."""
    return all(re.fullmatch(r"(?:[^\W\d]|-){1,24}[0-9]{0,2}|[\w-]{1,12}", part) for part in text.split("."))
