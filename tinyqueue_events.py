"""GET /events: one thread that sends the same events to all listeners of a web process.

The server keeps the connections of the listeners. This module decides what is sent, and when.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import msgspec

from tinyqueue import TinyQueueError

LISTENERS = 200  # at a time; each takes one of the server's connections
EVERY = 2.1  # seconds between two events; more than a verdict lasts, or every second event would repeat one
QUIET = 10.0  # seconds until a comment is sent if nothing changes, because proxies close idle connections
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "X-Accel-Buffering": "no",  # nginx would keep events until its buffer is full
}
COMMENT = b":\n\n"

log = logging.getLogger("tinyqueue.web")
T = TypeVar("T")


class Connection(Protocol):
    """The connection of a listener, as the server keeps it."""

    @property
    def connected(self) -> bool: ...
    def push(self, data: bytes) -> None:
        """Send data without waiting. May drop it if the client is too slow."""


class Place:
    """A place for one listener. It is free again once its connection is closed."""

    def __init__(self, attached: Callable[[], None]) -> None:
        self.connection: Connection | None = None
        self.greeted = False  # whether its first event was sent
        self._attached = attached

    def attach(self, connection: Connection) -> None:
        """Take the connection whose request got this place."""
        self.connection = connection
        self._attached()

    @property
    def is_free(self) -> bool:
        return self.connection is not None and not self.connection.connected

    def push(self, data: bytes) -> None:
        if self.connection and data:
            self.connection.push(data)
            self.greeted = True


class Events:
    """Sends what `compute` returns to all listeners. Its one thread runs while there are any."""

    def __init__(self, compute: Callable[[], bytes]) -> None:
        self._compute = compute
        self._lock = threading.Lock()
        self._places: list[Place] = []
        self._running = False
        self._bell = threading.Event()

    def enter(self) -> Place | None:
        """Return a place for one more listener; None if all are taken."""
        with self._lock:
            self._places = [place for place in self._places if not place.is_free]
            if len(self._places) >= LISTENERS:
                return None
            place = Place(self._start)
            self._places.append(place)
        return place

    def _start(self) -> None:
        with self._lock:
            was_running = self._running
            self._running = True
        self._bell.set()
        if not was_running:
            threading.Thread(target=self._run, name="events", daemon=True).start()

    def wake(self) -> None:
        """Let the thread look for closed connections. It ends if no others are left."""
        self._bell.set()

    def _taken(self) -> list[Place]:
        with self._lock:
            self._places = [place for place in self._places if not place.is_free]
            self._running = bool(self._places)
            return list(self._places)

    def _run(self) -> None:
        event = b""
        due = sent = 0.0
        while places := self._taken():
            now = time.monotonic()
            if now >= due:
                before = event
                event = self._try_to_compute() or event
                due = now + EVERY
                data = event if event != before else COMMENT if now - sent >= QUIET else b""
                sent = now if data else sent
                for place in places:
                    place.push(data if place.greeted else event)
            for place in places:
                if not place.greeted:
                    place.push(event)
            self._bell.wait(max(0.0, due - time.monotonic()))
            self._bell.clear()

    def _try_to_compute(self) -> bytes:
        try:
            return self._compute()
        except Exception:
            log.exception("cannot make an event for the listeners of GET /events")
            return b""


def overview(parts: Mapping[str, Callable[[], Any]], refused: Callable[[TinyQueueError], Any]) -> bytes:
    """Make an event from the answers of several routes, and the `problem` if one of them fails."""
    body: dict[str, Any] = {}
    for name, part in parts.items():
        try:
            body[name] = part()
        except TinyQueueError as error:  # the other parts would fail too, one timeout after another
            body["problem"] = refused(error)
            break
    return b"event: overview\ndata: %b\n\n" % msgspec.json.encode(body)  # JSON in one line


def cached(compute: Callable[[], T], seconds: float) -> Callable[[], T]:
    """Return a function that computes something again only after some seconds. Not thread-safe."""
    kept: list[tuple[float, T]] = []

    def get() -> T:
        now = time.monotonic()
        if not kept or now - kept[0][0] >= seconds:
            kept[:] = [(now, compute())]
        return kept[0][1]

    return get
