"""Access to Redis: one server, sentinels or a cluster; lending connections; what an error means.

`connect` makes a pool from a URL, and `Connections` lends the connections of the pool. `ask` sends
commands, `Clock` keeps Redis time, and `explain` reduces an error of the client to one word and a
text. `shield` keeps exceptions away from a thread while it uses a connection. This module knows
nothing of jobs.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import redis
from hiredis import pack_command
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry as NoRetries
from redis.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool

from tinyqueue_embedded import SCHEME, EmbeddedConnection, StartError, folder_of

try:
    from redis._parsers.hiredis import NOT_ENOUGH_DATA  # private to the client
except ImportError:
    NOT_ENOUGH_DATA = None

log = logging.getLogger("tinyqueue")

Command = tuple[Any, ...]

SOCKET_TIMEOUT = 4.0  # seconds for a reply; longer than the longest blocking command, which is 2 s
CONNECT_TIMEOUT = 2.0
PROBE_TIMEOUT = 0.5  # seconds to ask one sentinel or node; a dead one must not delay the next
NODES_AGE = 60.0  # seconds for which the known nodes of a cluster are trusted
CLOCK_AGE = 10.0  # seconds for which a reading of Redis TIME is used
FOLLOW_EVERY = 0.25  # seconds until the sentinels are asked again who the master is
FOLLOW_FOR = 10.0  # seconds without use of the master, after which they are not asked until its next use
WARM = 1.0  # seconds after its last use for which a connection is lent again without a check
ASK_AGAIN = 0.25  # seconds until a server that did not answer is asked again
SCAN_COUNT = 1000  # keys that Redis looks at for one SCAN
MEMORY_AGE = 2.0  # seconds for which a reading of Redis' memory is used
SKIP_SENTINEL = 5.0  # seconds for which a sentinel that did not answer is not asked again


# What an error means --------------------------------------------------------------------------------------------------

REASONS: tuple[tuple[type[Exception], str], ...] = (
    (redis.exceptions.BusyLoadingError, "loading"),
    (redis.exceptions.ReadOnlyError, "read-only"),
    (redis.exceptions.OutOfMemoryError, "full"),
    (redis.exceptions.AuthenticationError, "refused"),
    (redis.exceptions.AuthorizationError, "refused"),
    (redis.exceptions.NoPermissionError, "refused"),
    (redis.exceptions.MaxConnectionsError, "busy"),
    (redis.exceptions.ClusterDownError, "unreachable"),
    (redis.exceptions.TryAgainError, "busy"),
    (redis.exceptions.AskError, "busy"),
    (redis.exceptions.TimeoutError, "timeout"),
    (redis.exceptions.InvalidResponse, "unreachable"),
    (redis.exceptions.ConnectionError, "unreachable"),
    (OSError, "unreachable"),
)
REFUSALS = {
    "MISCONF": "read-only",
    "NOREPLICAS": "read-only",
    "TRYAGAIN": "busy",
    "BUSY": "busy",
    "UNBLOCKED": "busy",
    "DENIED": "refused",
}
HINTS = {  # what to do, by a part of the error's text
    "CERTIFICATE_VERIFY_FAILED": "add ?ssl_ca_certs=/path/to/ca.pem to REDIS_URL, or set TINYQUEUE_TLS_VERIFY=0",
    "WRONG_VERSION_NUMBER": "use redis:// if this Redis has no TLS",
    "Protocol error": "this is not a Redis; check the host and the port in REDIS_URL",
    "DB index": "check the number of the database in REDIS_URL",
    "maxmemory": "purge ended jobs, or give Redis more memory",
    "DENIED": "set a password or a user in Redis and in REDIS_URL, or connect from the same machine",
}


def explain(error: Exception) -> tuple[str, str]:
    """Return why Redis was unavailable, in one word, and the text of the error.

    The word is empty if Redis was available and refused the command as wrong.
    """
    text = " ".join(str(error).split())
    if text.startswith("DENIED "):  # many sentences about Redis' configuration
        text = text.partition(". ")[0]
    for part, hint in HINTS.items():
        if part in text:
            text += f"; {hint}"
    if isinstance(error, redis.exceptions.AskError | redis.exceptions.TryAgainError):
        text = f"the cluster is moving the queue to another node ({text})"
    for kind, reason in REASONS:
        if isinstance(error, kind):
            return reason, text
    return REFUSALS.get(text.split(" ")[0], ""), text


# What the client raises, besides errors of its own, if another thread closes the connection
# meanwhile: the socket is gone.
CLOSED = AttributeError, TypeError, ValueError


def closed(error: Exception) -> Exception:
    text = f"the client failed as if another thread had closed the connection ({type(error).__name__}: {error})"
    return redis.ConnectionError(text)


def connect_error(error: Exception) -> Exception:
    """Turn an error while connecting into one that `explain` does not blame on a command."""
    if isinstance(error, redis.ResponseError) and not explain(error)[0]:
        return redis.exceptions.AuthorizationError(str(error))
    if isinstance(error, UnicodeError):
        return redis.ConnectionError("the host name in REDIS_URL is not valid")
    return closed(error) if isinstance(error, CLOSED) else error


# Commands on a connection ---------------------------------------------------------------------------------------------


def send(connection: Any, commands: Sequence[Command]) -> None:
    packet = b"".join(map(pack_command, commands))
    try:
        connection.send_packed_command([packet])
    except CLOSED as error:
        raise closed(error) from error


def read_replies(connection: Any, count: int) -> list[Any]:
    """Return the next replies, or raise the first error.

    Replies that arrived together are taken out of the client's parser together. Reading them one by
    one takes four times as long. `_parser` and `_reader` are private to the client. Without them,
    as in its parser in Python, replies are read one by one.
    """
    reader = NOT_ENOUGH_DATA and getattr(getattr(connection, "_parser", None), "_reader", None)
    replies: list[Any] = []
    try:
        while len(replies) < count:
            replies.append(connection.read_response())
            if reader:
                replies += itertools.islice(iter(reader.gets, NOT_ENOUGH_DATA), count - len(replies))
    except CLOSED as error:
        raise closed(error) from error
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


def ask(connection: Any, commands: Sequence[Command]) -> list[Any]:
    """Send commands in one packet and return their replies, or raise the first error."""
    send(connection, commands)
    return read_replies(connection, len(commands))


def ask_each(connection: Any, commands: Sequence[Command]) -> list[Any]:
    """Send commands and return their replies. Returns errors too: an ACL may refuse a command."""
    send(connection, commands)
    return [read_reply(connection) for _ in commands]


def read_reply(connection: Any) -> Any:
    try:
        return read_replies(connection, 1)[0]
    except redis.ResponseError as error:
        return error


def parse_info(reply: Any) -> dict[str, str]:
    """Read a reply to INFO. Returns an empty dict for an error: a server may refuse INFO."""
    if not isinstance(reply, bytes):
        return {}
    return dict(line.split(":", 1) for line in reply.decode().split("\r\n") if ":" in line)


def text_of(value: bytes) -> str:
    """Decode an id or a name. Other bytes become a text that is neither."""
    return value.decode("ascii", "replace")


def pairs(reply: Sequence[bytes]) -> list[tuple[str, bytes]]:
    """Return the pairs in a reply to HGETALL, or to a range WITHSCORES."""
    return list(zip(map(text_of, reply[::2]), reply[1::2], strict=True))


def scan(read: Callable[..., list[Any]], prefix: str) -> Iterator[str]:
    """Return the names of all keys that begin with `prefix`, without it.

    SCAN reads the whole database. It returns every key that exists from the beginning to the end,
    whatever is written meanwhile. It may return a key twice.
    """
    cursor = b"0"
    while True:
        # No character of a prefix is special in a pattern. The command with a key leads to the node
        # of a cluster that has the queue: any node answers SCAN.
        step = ("SCAN", cursor, "MATCH", prefix + "*", "COUNT", SCAN_COUNT)
        _, (cursor, keys) = read(("EXISTS", prefix), step)
        yield from (key.removeprefix(prefix) for key in map(text_of, keys))
        if cursor == b"0":
            return


def memory_use(info: Mapping[str, str]) -> float:
    """Return the share of its maxmemory that Redis uses, 0 without a limit."""
    limit = int(info.get("maxmemory", 0))
    return int(info.get("used_memory", 0)) / limit if limit else 0.0


class Clock:
    """Redis time in milliseconds: the last reply to TIME, advanced by the monotonic clock.

    `ahead` is added to it. Only tests set this.
    """

    def __init__(self) -> None:
        self.ahead = 0
        self._offset = 0.0
        self._good_until = 0.0

    @property
    def stale(self) -> bool:
        return time.monotonic() >= self._good_until

    def read(self, reply: Sequence[bytes]) -> None:
        """Set the clock by a reply to TIME."""
        self._offset = int(reply[0]) * 1000 + int(reply[1]) / 1000 - time.monotonic() * 1000
        self._good_until = time.monotonic() + CLOCK_AGE

    def now(self) -> int:
        return int(time.monotonic() * 1000 + self._offset) + self.ahead


# Pools: one server, a cluster, sentinels ------------------------------------------------------------------------------


class Pool(redis.ConnectionPool):
    """Connections to one server. In a cluster, to the node that owns `slot`, even if it moves.

    All keys of a queue are in one slot, so a cluster needs no more than this. The client's own
    RedisCluster would send a transaction again after a lost connection, without its WATCH.
    """

    slot = 0
    home = ("", 0)  # host and port in the URL; for a cluster, the host name may lead to any node
    nodes: frozenset[tuple[str, int]] = frozenset()  # the known nodes of the cluster
    _refresh_at = 0.0  # when to read them again

    @property
    def place(self) -> tuple[str, int]:
        return self.connection_kwargs.get("host", "localhost"), self.connection_kwargs.get("port", 6379)

    def get_connection(self, *_: Any, **__: Any) -> Any:
        connection = super().get_connection()
        try:
            if time.monotonic() >= self._refresh_at:
                self._find_owner(connection)
                self._refresh_at = time.monotonic() + NODES_AGE if self.nodes else math.inf
        except BaseException:
            connection.disconnect()  # type: ignore[no-untyped-call]
            self.release(connection)
            raise
        return connection

    def owns_connection(self, connection: Any) -> bool:
        return bool(super().owns_connection(connection)) and (connection.host, connection.port) == self.place

    def move_to(self, host: str, port: int) -> None:
        """Connect to that node from now on. Lent connections to other nodes close when returned."""
        if (host, port) != self.place:
            log.info("the cluster now serves the queue from %s:%d", host, port)
            self.disconnect(inuse_connections=False)
            self.connection_kwargs = {**self.connection_kwargs, "host": host, "port": port}
            self._refresh_at = 0.0
            self.reset()

    def follow(self, error: Exception, reason: str) -> None:
        """Move to the node that a MOVED names. If this node failed, to the one that others name."""
        if isinstance(error, redis.exceptions.MovedError):
            self.move_to(error.host or self.place[0], error.port)
        elif self.nodes and reason in ("unreachable", "timeout", "loading"):
            others = sorted((self.nodes | {self.home}) - {self.place})
            owners = (self._probe(*place) for place in random.sample(others, len(others)))
            if owner := next(filter(None, owners), None):
                self.move_to(*owner)

    def _probe(self, host: str, port: int) -> tuple[str, int] | None:
        """Ask a node, without waiting long, which node owns the slot. Return None if it fails."""
        brief = {"host": host, "port": port, "socket_timeout": PROBE_TIMEOUT, "socket_connect_timeout": PROBE_TIMEOUT}
        connection = self.connection_class(**{**self.connection_kwargs, **brief})
        try:
            connection.connect()
            return self._find_owner(connection)
        except (redis.RedisError, OSError):
            return None
        finally:
            connection.disconnect()

    def _find_owner(self, connection: Any) -> tuple[str, int] | None:
        """Ask which node owns the slot, and remember all nodes. Return None if no node owns it."""
        try:
            ranges = ask(connection, [("CLUSTER", "SLOTS")])[0]
        except redis.ResponseError:
            return None
        owner = None
        nodes = set()
        for first, last, *servers in ranges:
            places = [(host.decode() if host else connection.host, port) for host, port, *_ in servers]
            nodes |= set(places)
            owner = places[0] if first <= self.slot <= last else owner
        self.nodes = frozenset(nodes)
        return owner


SENTINEL_URL = re.compile("rediss?\\+sentinel://", re.I)


def connect(url: str, *, tag: str = "queue", connections: int = 100, tls_verify: bool = True) -> redis.ConnectionPool:
    """Make a pool of connections and open none.

    In a cluster the pool connects to the node that has the keys with that hash tag, whichever node
    the URL names. Behind sentinels each new connection asks them for the master. The client must
    not retry: after a lost reply it would send a whole transaction again, and push every id twice.
    Sets every option whose default differs between versions of the client. Raises ValueError for a
    wrong URL. Its text never shows the URL, which may hold a password.
    """
    options: dict[str, Any] = {
        "max_connections": connections,
        "protocol": 2,
        "retry": NoRetries(NoBackoff(), 0),
        "socket_timeout": SOCKET_TIMEOUT,
        "socket_connect_timeout": CONNECT_TIMEOUT,
        "socket_keepalive": True,
        "health_check_interval": 0,
    }
    if url.startswith(("unix:", SCHEME)):
        del options["socket_keepalive"]
    if url.startswith(SCHEME):
        return redis.ConnectionPool(EmbeddedConnection, folder=folder_of(url), **options)
    if url.startswith("rediss") and not tls_verify:
        log.warning("TINYQUEUE_TLS_VERIFY=0: the certificate of the Redis server is not verified")
        options |= {"ssl_cert_reqs": "none", "ssl_check_hostname": False}
    try:
        watched = _Watched.read(url) if SENTINEL_URL.match(url) else None
        pool = _pool(watched.url if watched else url, tag, options)
    except _WrongURL:
        raise
    except (ValueError, TypeError, redis.RedisError) as error:
        forms = "redis://, rediss://, unix://, embedded: or redis+sentinel://host:port,host:port/service"
        hint = "unknown option after ?" if isinstance(error, TypeError) else f"use {forms}"
        text = f"REDIS_URL cannot be used: {hint}; percent-encode special characters in the password"
        raise _WrongURL(text) from None
    return watched.pool(pool, options) if watched else pool


class _WrongURL(ValueError):
    """A URL that cannot be used. The text does not show it."""


def _pool(url: str, tag: str, options: Mapping[str, Any]) -> redis.ConnectionPool:
    database = urlsplit(url).path.lstrip("/")
    if url.startswith("redis") and database and not database.isdecimal():
        raise _WrongURL("REDIS_URL must end in the number of a database, such as /0, or in no path")
    pool = (redis.ConnectionPool if url.startswith("unix:") else Pool).from_url(url, **options)
    if isinstance(pool, Pool):
        pool.slot = key_slot(tag.encode())
        pool.home = pool.place
    pool.connection_class(**pool.connection_kwargs)  # opens nothing; an unknown option raises here
    changed = [name for name, value in options.items() if pool.connection_kwargs.get(name, value) != value]
    changed += ["decode_responses"] if pool.connection_kwargs.get("decode_responses") else []
    if changed:
        raise _WrongURL(f"REDIS_URL must not set {changed[0]}: the queue relies on its own value")
    return pool


class _Watched(NamedTuple):
    """The parts of a redis+sentinel:// URL. `url` is the same URL for one server named `master`."""

    url: str
    sentinels: list[tuple[str, int]]
    service: str
    credentials: dict[str, str]  # for the sentinels themselves

    @classmethod
    def read(cls, url: str) -> _Watched:
        """Read redis+sentinel://[user:password@]host:port,host:port/service[/database][?option]."""
        # urlsplit accepts brackets only at the beginning of the network location.
        scheme, _, rest = url.partition("://")
        netloc = re.split("[/?#]", rest, maxsplit=1)[0]
        parts = urlsplit("//master" + rest.removeprefix(netloc))
        user, at, hosts = netloc.rpartition("@")
        service, _, database = parts.path.strip("/").partition("/")
        query = dict(parse_qsl(parts.query))
        own = {name: query.pop("sentinel_" + name) for name in ("username", "password") if "sentinel_" + name in query}
        found = [urlsplit("//" + host) for host in hosts.split(",")]
        sentinels = [(host.hostname, host.port or 26379) for host in found if host.hostname]
        if not service or len(sentinels) < len(found) or parts.fragment:
            raise ValueError("no sentinels, or no service")
        url = f"{scheme.lower().removesuffix('+sentinel')}://{user}{at}master/{database}?{urlencode(query)}"
        return cls(url, sentinels, unquote(service), own)

    def pool(self, model: redis.ConnectionPool, options: Mapping[str, Any]) -> redis.ConnectionPool:
        """Make a pool like `model`, but of connections to the master that the sentinels name."""
        tls = {name: value for name, value in model.connection_kwargs.items() if name.startswith("ssl_")}
        probe = {"socket_timeout": PROBE_TIMEOUT, "socket_connect_timeout": PROBE_TIMEOUT, "max_connections": None}
        ssl = issubclass(model.connection_class, redis.SSLConnection)
        access = {**options, **tls, **probe, **self.credentials, "ssl": ssl}
        more = {"ssl": ssl, "max_connections": model.max_connections, **model.connection_kwargs}
        return SentinelPool(self.service, Sentinels(self.sentinels, sentinel_kwargs=access), **more)


Address = tuple[str, int]


class Sentinels(Sentinel):
    """The sentinels of a service. The one with the latest configuration is right about the master.

    In a planned failover only one sentinel names the new master at first. The others follow after
    up to ten seconds. Until then the old master accepts writes, which would be lost.
    """

    def __init__(self, sentinels: Sequence[Address], **options: Any) -> None:
        super().__init__(sentinels, **options)  # type: ignore[no-untyped-call]
        self._skipped: dict[Any, float] = {}  # sentinels that did not answer, and until when
        self._known: tuple[int, Address | None] = (-1, None)  # the latest configuration so far

    def discover_master(self, service_name: str) -> Address:
        """Return the address of the master. Raises the error that best explains a failure."""
        now = time.monotonic()
        asked = [sentinel for sentinel in self.sentinels if self._skipped.get(sentinel, 0.0) < now]
        answers = [self._ask(sentinel, service_name) for sentinel in asked or self.sentinels]
        named = [answer for answer in answers if not isinstance(answer, Exception)]
        if not named:
            raise self._explain([answer for answer in answers if isinstance(answer, Exception)])
        epoch, known = self._known
        latest = max(number for number, _ in named)
        addresses = [address for number, address in named if number == latest]
        # A configuration older than a known one counts only if most sentinels answer: all of them
        # may have been set up again.
        if known and (known in addresses or (latest < epoch and 2 * len(named) <= len(self.sentinels))):
            return known
        self._known = latest, addresses[0]
        return addresses[0]

    def _ask(self, sentinel: Any, service: str) -> tuple[int, Address] | Exception:
        """Return the number of a sentinel's configuration and the master that it names."""
        pool = sentinel.connection_pool
        try:
            connection = pool.get_connection()
            try:
                questions = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service), ("SENTINEL", "MASTER", service)
                address, about = ask_each(connection, questions)
            except BaseException:
                connection.disconnect()
                raise
            finally:
                pool.release(connection)
        except (redis.RedisError, OSError, *CLOSED) as error:
            self._skipped[sentinel] = time.monotonic() + SKIP_SENTINEL
            return connect_error(error)
        if isinstance(address, Exception):
            return address
        if not address:
            return LookupError(f"no master is named {service}")
        try:
            epoch = dict(pairs(about)).get("config-epoch", b"0") if isinstance(about, list) else 0
            return int(epoch), (text_of(address[0]), int(address[1]))
        except (AttributeError, LookupError, TypeError, ValueError):
            return LookupError("what answered is not a sentinel")

    def _explain(self, errors: Sequence[Exception]) -> Exception:
        refusal = next((error for error in errors if explain(error)[0] == "refused"), None)
        if refusal:
            advice = "check ?sentinel_username= and ?sentinel_password= in REDIS_URL"
            return redis.AuthenticationError(f"a sentinel refused the connection: {refusal}; {advice}")
        reasons = "; ".join(dict.fromkeys(str(error) for error in errors))
        return MasterNotFoundError(f"no sentinel names the master: {reasons}")


class SentinelPool(SentinelConnectionPool):
    """Connections to the master that the sentinels name.

    A thread asks the sentinels while connections are lent, so that an old master is left within
    FOLLOW_EVERY seconds.
    """

    def __init__(self, service: str, sentinels: Sentinels, **options: Any) -> None:
        super().__init__(service, sentinels, **options)  # type: ignore[no-untyped-call]
        self._lent_at = 0.0
        self._follower: threading.Thread | None = None
        self._following = threading.Lock()

    def get_connection(self, *_: Any, **__: Any) -> Any:
        self._keep_up()
        return super().get_connection()

    def is_current(self, connection: Any) -> bool:
        """Whether a connection leads to the present master. Call this before you lend it again."""
        self._keep_up()
        return self._leads_to_master(connection)

    def release(self, connection: Any) -> None:
        """Take a connection back. It will connect to the present master when it is lent again."""
        if not self._leads_to_master(connection):
            connection.disconnect()
        super().release(connection)

    def owns_connection(self, connection: Any) -> bool:
        return bool(redis.ConnectionPool.owns_connection(self, connection))

    def rest(self) -> None:
        """Stop asking until a connection is lent again."""
        self._lent_at = -math.inf
        if self._follower:
            self._follower.join(2 * PROBE_TIMEOUT)

    def _leads_to_master(self, connection: Any) -> bool:
        return bool((connection.host, connection.port) == self.master_address)

    def _keep_up(self) -> None:
        """Start the thread that asks the sentinels while connections are lent, if none runs."""
        self._lent_at = time.monotonic()
        if not (self._follower and self._follower.is_alive()):  # it does not survive a fork
            with self._following:
                if not (self._follower and self._follower.is_alive()):
                    self._ask()
                    follower = threading.Thread(target=self._follow, name="sentinels", daemon=True)
                    with suppress(RuntimeError):  # no more threads; then each use asks
                        follower.start()
                        self._follower = follower

    def _follow(self) -> None:
        time.sleep(FOLLOW_EVERY)
        while time.monotonic() - self._lent_at < FOLLOW_FOR:
            self._ask()
            time.sleep(FOLLOW_EVERY)

    def _ask(self) -> None:
        before = self.master_address
        with suppress(redis.RedisError, OSError):  # the known master stays; a new connection reports the error
            self.get_master_address()  # type: ignore[no-untyped-call]
        if before and self.master_address != before:
            log.warning("the sentinels have moved the queue to %s:%d", *self.master_address)


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
            with self.lock:  # from now on exceptions are deferred; one that is on its way is raised here
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


NO_SHIELD = nullcontext()  # for threads in which no other thread raises exceptions
THREAD = threading.local()  # its `shield` is set in the threads that run handlers


def shield() -> AbstractContextManager[None]:
    """Return the context in which nothing interrupts this thread."""
    own: AbstractContextManager[None] = getattr(THREAD, "shield", NO_SHIELD)
    return own


# Lending connections --------------------------------------------------------------------------------------------------


class Connections:
    """Lends the connections of a pool.

    Threads may share it. Forked processes may too, if it was not used before the fork.

    An error of the class `harmless` leaves no unread reply on a connection. `translate` turns an
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

        A connection that a thread uses is closed when it is returned. If it were closed earlier,
        the client would connect it again, without its WATCH. Also ends the threads that ask
        servers: a fork copies the locks that they hold, but not the threads.
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
        """Return a connection and all warm ones to the pool, which checks them before it lends any.

        If one is broken, others may be broken too.
        """
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
        """Whether the server answers, even if it refuses the command."""
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
                if _reason(error) in ("", "timeout"):  # the caller's next command would wait as long again
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
        """Start asking a server that did not answer. A cut connection alone does not prove that."""
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

# Keeps the client from sending CLIENT SETINFO: it would mistake a greeting for the reply.
_KNOWN = inspect.signature(redis.Redis.__init__).parameters
UNNAMED = dict.fromkeys(["driver_info"] if "driver_info" in _KNOWN else ["lib_name", "lib_version"])


def get_connection(pool: Any) -> Any:
    """Take a checked connection from a pool. Raises the error that best explains a failure."""
    try:
        return pool.get_connection()
    except redis.ConnectionError as error:
        clear = isinstance(error, MasterNotFoundError | StartError) or "connecting to" in str(error)
        if clear or explain(error)[0] != "unreachable":
            raise
        raise _greeting(pool) or error from error  # the server spoke first, or closed the connection
    except Exception as error:
        raise connect_error(error) from error


def _greeting(pool: Any) -> Exception | None:
    """Return the refusal that a server sends to a new connection before any command, or None."""
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
