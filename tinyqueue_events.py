"""GET /events: one thread that sends the same events to all listeners of a web process.

The server keeps the connections of the listeners. This module decides what is sent, and when.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from tinyqueue import TinyQueueError

LISTENERS = 200  # at a time; each takes one of the server's connections
EVERY = 2.0  # seconds between two events
QUIET = 10.0  # seconds after which a comment is sent if nothing has changed, because proxies close idle connections
HEADERS = (
    ("Content-Type", "text/event-stream; charset=utf-8"),
    ("X-Accel-Buffering", "no"),  # nginx would keep events until its buffer is full
)
COMMENT = b":\n\n"

log = logging.getLogger("tinyqueue.web")


class Connection(Protocol):
    """The connection of a listener, as the server keeps it."""

    @property
    def connected(self) -> bool: ...
    def push(self, data: bytes) -> None:
        """Send data without waiting. Data that the client is too slow for may be left out."""


class Place:
    """One of the places for listeners. It is free again when its connection is closed."""

    def __init__(self, attached: Callable[[], None]) -> None:
        self.connection: Connection | None = None
        self.greeted = False  # whether it has got its first event
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
    """Sends what `compute` returns to all listeners, in one thread, which runs while there are any."""

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
        """Look for connections that are closed. The thread ends if no others are left."""
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


def encoded(kind: str, body: Any) -> bytes:
    """Return an event as it is sent. JSON has no line breaks, so the body is one line."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(body))


def overview(parts: dict[str, Callable[[], Any]], refused: Callable[[TinyQueueError], Any]) -> bytes:
    """Make the event `overview` from the answers of several routes, or `problem` if one fails."""
    try:
        return encoded("overview", {name: part() for name, part in parts.items()})
    except TinyQueueError as error:
        return encoded("problem", refused(error))
