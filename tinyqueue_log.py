"""The lines that a job logs: those that its handler passes to `logging` and to `job.log`.

A worker keeps the lines of an attempt here until it writes them. This module knows no queue.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import msgspec

from tinyqueue_json import encode
from tinyqueue_redis import shield

LOG_BYTES = 65536  # of the lines of a job, as they are stored; the oldest are dropped
LINE = 4000  # characters of a line
LEVEL = 50  # characters of the name of a log level


class LogLine(msgspec.Struct, array_like=True):
    """A stored line. Its `number` is its time in microseconds, and higher than the one before."""

    number: int
    attempt: int
    level: str
    text: str

    def answer(self) -> dict[str, Any]:
        """The line as clients see it."""
        return {"number": self.number, "at": self.number // 1000, **msgspec.structs.asdict(self)}


def read_lines(stored: Iterable[bytes], after: int) -> list[LogLine]:
    """Read the stored lines with a number above `after`. Skips lines that cannot be read."""
    lines: dict[int, LogLine] = {}  # a line may be stored twice if the reply to its write was lost
    for entry in stored:
        try:
            line = msgspec.json.decode(entry, type=LogLine)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        if line.number > after:
            lines.setdefault(line.number, line)
    return [lines[number] for number in sorted(lines)]


class JobLog:
    """The lines of an attempt that are not written yet. Their times follow the clock of Redis.

    `sizes` has the sizes of the stored lines of earlier attempts; None: unknown.
    """

    def __init__(self, attempt: int, started_at: int, sizes: Sequence[int] | None = ()) -> None:
        self.attempt = attempt
        self.sizes = None if sizes is None else list(sizes)
        self._lines: deque[tuple[int, bytes]] = deque()
        self._size = 0
        self._last = 0
        self._began = time.monotonic_ns() // 1000 - started_at * 1000
        self._lock = threading.Lock()
        self._process = os.getpid()

    def add(self, level: str, text: str) -> None:
        """Add a line. Drops the oldest if too many wait to be written.

        Does nothing in a process that the handler has forked: nobody writes the lines there, and
        the lock may have been held at the fork.
        """
        if os.getpid() != self._process:
            return
        level = _valid(level[:LEVEL])
        text = _valid(text[:LINE])
        with shield(), self._lock:
            self._last = max(self._last + 1, time.monotonic_ns() // 1000 - self._began)
            self._put(self._last, encode(LogLine(self._last, self.attempt, level, text)))

    def _put(self, number: int, line: bytes) -> None:
        self._lines.append((number, line))
        self._size += len(line)
        while self._size > LOG_BYTES:
            self._size -= len(self._lines.popleft()[1])

    def unwritten(self) -> list[tuple[int, bytes]]:
        """Return the lines to write, with their numbers."""
        with self._lock:
            return list(self._lines)

    def fit(self, lines: Sequence[tuple[int, bytes]]) -> list[int]:
        """Return the sizes of the newest stored lines that may stay once these are stored too."""
        sizes = [*(self.sizes or ()), *(len(line) for _, line in lines)]
        excess = sum(sizes) - LOG_BYTES
        first = 0
        while excess > 0:
            excess -= sizes[first]
            first += 1
        return sizes[first:]

    def note_written(self, lines: Sequence[tuple[int, bytes]]) -> None:
        """Note that lines are stored."""
        self.sizes = self.fit(lines)
        with self._lock:
            while self._lines and self._lines[0][0] <= lines[-1][0]:
                self._size -= len(self._lines.popleft()[1])


def _valid(text: str) -> str:
    """Escape lone surrogates, which JSON in UTF-8 cannot contain."""
    return text.encode("utf-8", "backslashreplace").decode()


# The log of the job that this thread runs, if the lines of the job are kept.
JOB_LOG: ContextVar[JobLog | None] = ContextVar("job_log", default=None)


class Capture(logging.Handler):
    """Adds each record to the log of the job in whose context it was made. Takes no lock.

    If several workers share the process, each has a Capture. Only the first one adds a record.
    """

    def createLock(self) -> None:
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        log = JOB_LOG.get()
        if log is not None and not record.__dict__.get("_captured"):
            record.__dict__["_captured"] = True
            log.add(str(record.levelname), _text_of(record))
        return True


def _text_of(record: logging.LogRecord) -> str:
    try:
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        return "\n".join(filter(None, [record.getMessage(), trace]))
    except Exception as error:
        return f"cannot format a log line from {record.pathname}:{record.lineno}: {type(error).__name__}"


_CAPTURES: list[Capture] = []  # those of the workers in this process


@contextmanager
def capturing() -> Iterator[None]:
    """Keep the log records that handlers make meanwhile. Several workers may use it at once."""
    capture = Capture()
    _CAPTURES.append(capture)
    recapture()
    try:
        yield
    finally:
        _CAPTURES.remove(capture)
        logging.getLogger().removeHandler(capture)


def recapture() -> None:
    """Add the captures again: a handler that configured logging may have removed them."""
    for capture in _CAPTURES[:]:
        logging.getLogger().addHandler(capture)  # does nothing if it is still there
