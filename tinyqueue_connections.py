"""Lending the connections of a pool: to one thread at a time, and to nobody while a server is away.

This module knows nothing of queues.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import redis
from redis.sentinel import MasterNotFoundError

from tinyqueue_redis import PROBE_TIMEOUT, Pool, SentinelPool, ask, connect_error, explain

log = logging.getLogger("tinyqueue")

WARM = 1.0  # seconds after its last use for which a connection is lent again without a check
ASK_AGAIN = 0.25  # seconds until a server that did not answer is asked again


# Keeps the client from sending CLIENT SETINFO: it would take a greeting for the reply.
_KNOWN = inspect.signature(redis.Redis.__init__).parameters
UNNAMED = dict.fromkeys(["driver_info"] if "driver_info" in _KNOWN else ["lib_name", "lib_version"])


class Connections:
    """Lends the connections of a pool.

    Threads may share it. Forked processes may too, if it was not used before the fork.

    After an error of the class `harmless` a connection has no unread reply. `translate` turns an
    error of the client into the one to raise. After `guard`, nobody waits for a server that is
    known to be away: `lend` raises the last error at once until the server answers a thread that
    asks it.
    """

    def __init__(self, pool: Any, harmless: type[Exception], translate: Callable[[Exception], Exception]) -> None:
        self.pool = pool
        self.harmless = harmless
        self.translate = translate
        self.last_contact = time.monotonic()  # when Redis last carried out a command
        self.last_trouble = time.monotonic()  # when it last failed to; at first, neither is known
        self._warm: list[tuple[Any, int, float]] = []  # connections just used, by process and time
        self._sentinel_pool = pool if isinstance(pool, SentinelPool) else None
        self._closings = 0  # how often `disconnect` was called
        self._guarded = ""  # the name of the server in log lines; empty: callers wait for it
        self._away: tuple[int, Exception] | None = None  # the process that found it away, and how
        self._asker: threading.Thread | None = None  # the thread that asks whether it is back
        self._lock = threading.Lock()

    @property
    def away(self) -> bool:
        """Whether a guarded server is known not to answer."""
        return self._away is not None

    def guard(self, name: str) -> None:
        """Let nobody wait for this server while it is away. `name` is for the log."""
        self._guarded = name

    @contextmanager
    def lend(self, asking: bool = False) -> Iterator[Any]:
        """Lend a connection. Closes it after an error that may have left a reply on it."""
        if self._away and not asking:
            self._refuse(*self._away)
        if self._sentinel_pool:
            self._sentinel_pool.keep_up()
        connection = None
        closings = self._closings
        try:
            connection = self._checked_out()
            yield connection
        except BaseException as error:
            if connection and (closings != self._closings or not isinstance(error, self.harmless)):
                connection.disconnect()
            self._cool_down(connection)
            if connection is None:
                error = connect_error(error)
            if isinstance(error, redis.RedisError | OSError):
                self._follow(error)
                if self._guarded and not asking:
                    self._note_away(error, connected=connection is not None)
                raise self.translate(error) from error
            raise
        self.last_contact = time.monotonic()
        self._warm.append((connection, os.getpid(), self.last_contact))
        if closings != self._closings:
            self._close_idle()

    def disconnect(self) -> None:
        """Close all connections. Do this before a fork: each process must open its own.

        A connection that a thread uses is closed when it is returned. The client would connect it
        again without its WATCH if it was closed earlier. The threads that ask servers end: a fork
        would not take them along, but the locks that they hold.
        """
        self._closings += 1
        self._away = None
        if self._asker:
            self._asker.join(PROBE_TIMEOUT)
        if self._sentinel_pool:
            self._sentinel_pool.rest()
        self._close_idle()

    def _close_idle(self) -> None:
        self._cool_down(None)
        self.pool.disconnect(inuse_connections=False)

    def _refuse(self, process: int, error: Exception) -> None:
        if process == os.getpid():
            raise self.translate(error) from error
        self._away = None  # the thread that asks the server has not survived the fork

    def _note_away(self, error: Exception, connected: bool) -> None:
        """Start asking a server that did not answer. A connection that was only cut is no sign."""
        reason, text = explain(error)
        if reason != "timeout" and (reason != "unreachable" or connected):
            return
        with self._lock:
            if self._away and self._away[0] == os.getpid():
                return
            self._away = away = os.getpid(), error
            name = "asks " + self._guarded
            asker = threading.Thread(target=self._ask_until_it_answers, args=(away,), name=name, daemon=True)
            try:
                asker.start()
            except RuntimeError:  # no more threads; then callers wait for the server
                self._away = None
                return
            self._asker = asker
        log.warning("%s does not answer and is left out until it does: %s", self._guarded, text)

    def _ask_until_it_answers(self, away: tuple[int, Exception]) -> None:
        try:
            while self._away is away and not self._answers():
                time.sleep(ASK_AGAIN)
            if self._away is away:
                log.warning("%s answers again", self._guarded)
        finally:
            if self._away is away:
                self._away = None

    def _answers(self) -> bool:
        """Whether the server answers, be it that it refuses the command."""
        try:
            with self.lend(asking=True) as connection:
                ask(connection, [("TIME",)])
        except self.harmless as error:
            cause = error.__cause__
            return not (isinstance(cause, Exception) and explain(cause)[0] in ("timeout", "unreachable"))
        return True

    def _follow(self, error: redis.RedisError | OSError) -> None:
        reason, _ = explain(error)
        if reason:
            self.last_trouble = time.monotonic()
        if isinstance(self.pool, Pool):
            self.pool.follow(error, reason)

    def _checked_out(self) -> Any:
        """Take a connection used within the last second, or else one that the pool must check."""
        with suppress(IndexError):
            while True:
                connection, process, used = self._warm.pop()
                current = self._sentinel_pool is None or self._sentinel_pool.is_current(connection)
                if current and process == os.getpid() and time.monotonic() - used < WARM:
                    return connection
                self.pool.release(connection)
        try:
            return self.pool.get_connection()
        except redis.ConnectionError as error:
            clear = isinstance(error, MasterNotFoundError) or "connecting to" in str(error)
            if clear or explain(error)[0] != "unreachable":
                raise
            raise self._greeting() or error from error  # the server has spoken first, or has hung up

    def _greeting(self) -> Exception | None:
        """Return what a server says to a new connection before any command: why it refuses."""
        brief = {"socket_timeout": PROBE_TIMEOUT, "socket_connect_timeout": PROBE_TIMEOUT, **UNNAMED}
        connection = self.pool.connection_class(**{**self.pool.connection_kwargs, **brief})
        try:
            connection.connect()
            connection.read_response()
        except redis.TimeoutError:
            return None
        except (redis.RedisError, OSError) as error:
            return error
        finally:
            connection.disconnect()
        return None

    def _cool_down(self, connection: Any) -> None:
        """Return all connections to the pool, which checks them: others may be broken too."""
        if connection:
            self.pool.release(connection)
        with suppress(IndexError):
            while True:
                self.pool.release(self._warm.pop()[0])
