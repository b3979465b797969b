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
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import redis
from redis.sentinel import MasterNotFoundError

from tinyqueue_redis import (
    PROBE_TIMEOUT,
    Pool,
    SentinelPool,
    ask,
    ask_each,
    connect_error,
    explain,
    memory_use,
    parse_info,
)

log = logging.getLogger("tinyqueue")

WARM = 1.0  # seconds after its last use for which a connection is lent again without a check
ASK_AGAIN = 0.25  # seconds until a server that did not answer is asked again
MEMORY_AGE = 2.0  # seconds for which a reading of Redis' memory is used


# Not being interrupted ------------------------------------------------------------------------------------------------


class Shield:
    """Defers an exception for a thread while the thread runs code that must not be interrupted.

    An exception between two lines of it could leave a lock or a connection taken for good, and
    other threads would wait for it for ever. `with shield():` begins such code.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.depth = 0  # how many times this thread has entered such code
        self.late: type[BaseException] | None = None  # what to raise when it has left it

    def __enter__(self) -> None:
        before = self.depth
        try:
            with self.lock:  # afterwards exceptions are only deferred; one that is on its way is raised in here
                self.depth = before + 1
        except BaseException:
            self.depth = before
            raise

    def __exit__(self, *_: object) -> None:
        late = None
        with self.lock:
            self.depth -= 1
            if not self.depth:
                late, self.late = self.late, None
        if late:
            raise late


NO_SHIELD = nullcontext()  # of a thread in which nobody raises exceptions
THREAD = threading.local()  # its `shield` is set in the threads that run handlers


def shield() -> AbstractContextManager[None]:
    """Return the context in which nothing interrupts this thread."""
    own: AbstractContextManager[None] = getattr(THREAD, "shield", NO_SHIELD)
    return own


# Lending connections --------------------------------------------------------------------------------------------------


class Connections:
    """Lends the connections of a pool.

    Threads may share it. Forked processes may too, if it was not used before the fork.

    After an error of the class `harmless` a connection has no unread reply. `translate` turns an
    error of the client into the one to raise.
    """

    def __init__(self, pool: Any, harmless: type[Exception], translate: Callable[[Exception], Exception]) -> None:
        self.pool = pool
        self.harmless = harmless
        self.translate = translate
        self.last_contact = time.monotonic()  # when Redis last carried out a command
        self.last_trouble = time.monotonic()  # when it last failed to; at first, neither is known
        self._warm: list[tuple[Any, int, float]] = []  # connections just used, by process and time
        self._is_current = pool.is_current if isinstance(pool, SentinelPool) else None
        self._closings = 0  # how often `disconnect` was called
        self._guard: Guard | None = None
        self._memory: tuple[float, dict[str, str]] = (-1e9, {})  # when INFO was read, and its reply

    @property
    def away(self) -> bool:
        """Whether a guarded server is known not to answer."""
        return bool(self._guard and self._guard.error)

    def guard(self, name: str) -> None:
        """Let nobody wait for this server while it is away. `name` is for the log."""
        self._guard = Guard(name, self._answers)

    def lend(self) -> AbstractContextManager[Any]:
        """Lend a connection. Closes it after an error that may have left a reply on it.

        Nothing interrupts the thread that borrows it. Raises the last error of a guarded server at
        once until the server answers again.
        """
        guard = self._guard
        if guard and guard.away and (error := guard.error):
            raise self.translate(error) from error
        return self._lend(guard)

    @contextmanager
    def _lend(self, guard: Guard | None = None) -> Iterator[Any]:
        connection = None
        closings = self._closings
        with shield():
            try:
                connection = self._take_warm() or get_connection(self.pool)
                yield connection
            except BaseException as error:
                keep = isinstance(error, self.harmless) and closings == self._closings
                self._return_all(connection, keep)
                if not isinstance(error, redis.RedisError | OSError):
                    raise
                self._follow(error)
                if guard:
                    guard.note(error, connected=connection is not None)
                raise self.translate(error) from error
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
        if self._guard:
            self._guard.rest()
        if isinstance(self.pool, SentinelPool):
            self.pool.rest()
        self._close_idle()

    def _take_warm(self) -> Any:
        """Take a connection that was used within the last second. Return None if there is none."""
        try:
            while True:
                connection, process, used = self._warm.pop()
                recent = process == os.getpid() and time.monotonic() - used < WARM
                if recent and (self._is_current is None or self._is_current(connection)):
                    return connection
                self.pool.release(connection)
        except IndexError:
            return None

    def _return_all(self, connection: Any = None, keep: bool = True) -> None:
        """Return a connection, and the warm ones: the pool checks them, as others may be broken."""
        if connection:
            if not keep:
                connection.disconnect()
            self.pool.release(connection)
        with suppress(IndexError):
            while True:
                self.pool.release(self._warm.pop()[0])

    def _close_idle(self) -> None:
        self._return_all()
        self.pool.disconnect(inuse_connections=False)

    def _follow(self, error: redis.RedisError | OSError) -> None:
        reason, _ = explain(error)
        if reason:
            self.last_trouble = time.monotonic()
        if isinstance(self.pool, Pool):
            self.pool.follow(error, reason)

    def _answers(self) -> bool:
        """Whether the server answers, be it that it refuses the command."""
        try:
            with self._lend() as connection:
                ask(connection, [("TIME",)])
        except self.harmless as error:
            return _reason(error) not in ("timeout", "unreachable")
        return True

    def memory(self) -> dict[str, str]:
        """Return INFO memory, up to MEMORY_AGE seconds old; empty if Redis does not give it."""
        read_at, info = self._memory
        if time.monotonic() - read_at > MEMORY_AGE:
            info = {}
            try:
                with self.lend() as connection:
                    info = parse_info(ask_each(connection, [("INFO", "memory")])[0])
            except self.harmless as error:
                if _reason(error) in ("", "timeout"):  # the caller's next command would only wait as long again
                    raise
            self._memory = (time.monotonic(), info)
        return info

    @property
    def memory_use(self) -> float:
        return memory_use(self.memory())


def _reason(translated: Exception) -> str:
    """Return the word of `explain` for the error that was translated into this one."""
    cause = translated.__cause__
    return explain(cause)[0] if isinstance(cause, Exception) else ""


class Guard:
    """Keeps others from waiting for a server that is away. A thread asks until it answers."""

    def __init__(self, name: str, answers: Callable[[], bool]) -> None:
        self.name = name
        self.answers = answers
        self.away: tuple[int, Exception] | None = None  # the process that found it away, and how
        self._asker: threading.Thread | None = None
        self._lock = threading.Lock()

    @property
    def error(self) -> Exception | None:
        """The error of a server that is away. The thread that asks does not survive a fork."""
        away = self.away
        return away[1] if away and away[0] == os.getpid() else None

    def note(self, error: Exception, connected: bool) -> None:
        """Start asking a server that did not answer. A connection that was only cut is no sign."""
        reason, text = explain(error)
        if reason != "timeout" and (reason != "unreachable" or connected):
            return
        with self._lock:
            if self.error:
                return
            self.away = away = os.getpid(), error
            asker = threading.Thread(target=self._ask, args=(away,), name="asks " + self.name, daemon=True)
            try:
                asker.start()
            except RuntimeError:  # no more threads; then callers wait for the server
                self.away = None
                return
            self._asker = asker
        log.warning("%s does not answer and is left out until it does: %s", self.name, text)

    def rest(self) -> None:
        """Stop asking. The next error starts it again."""
        self.away = None
        if self._asker:
            self._asker.join(PROBE_TIMEOUT)

    def _ask(self, away: tuple[int, Exception]) -> None:
        try:
            while self.away is away and not self.answers():
                time.sleep(ASK_AGAIN)
            if self.away is away:
                log.warning("%s answers again", self.name)
        finally:
            if self.away is away:
                self.away = None


# Connecting -----------------------------------------------------------------------------------------------------------

# Keeps the client from sending CLIENT SETINFO: it would take a greeting for the reply.
_KNOWN = inspect.signature(redis.Redis.__init__).parameters
UNNAMED = dict.fromkeys(["driver_info"] if "driver_info" in _KNOWN else ["lib_name", "lib_version"])


def get_connection(pool: Any) -> Any:
    """Take a checked connection from a pool. Raises what explains best why there is none."""
    try:
        return pool.get_connection()
    except redis.ConnectionError as error:
        clear = isinstance(error, MasterNotFoundError) or "connecting to" in str(error)
        if clear or explain(error)[0] != "unreachable":
            raise
        raise _greeting(pool) or error from error  # the server has spoken first, or has hung up
    except Exception as error:
        raise connect_error(error) from error


def _greeting(pool: Any) -> Exception | None:
    """Return what a server says to a new connection before any command: why it refuses."""
    brief = {"socket_timeout": PROBE_TIMEOUT, "socket_connect_timeout": PROBE_TIMEOUT, **UNNAMED}
    connection = pool.connection_class(**{**pool.connection_kwargs, **brief})
    try:
        connection.connect()
        connection.read_response()
    except redis.TimeoutError:
        return None
    except (redis.RedisError, OSError) as error:
        return connect_error(error)
    finally:
        connection.disconnect()
    return None
