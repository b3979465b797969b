"""The HTTP server: a Waitress whose clients cannot block it, and that stops without losing an answer.

A connection has one request in progress. A request that only waits needs no thread: its app raises
Parked, and is called again later. An endless answer needs no thread either: its app raises Stream.
This module knows nothing about jobs.
"""

from __future__ import annotations

import ctypes
import io
import logging
import math
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from email.utils import formatdate
from functools import partial
from typing import Any, Protocol
from urllib.parse import urlsplit

from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.buffers import OverflowableBuffer
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask

from tinyqueue_config import WEB_THREADS, Settings

CONNECTIONS = 500  # open at a time, idle ones included; further clients wait in the listen backlog
# Seconds that a connection may be idle, and that a client may take to send a request or to read an
# answer.
CLIENT_TIMES = (120, 60)
CROWD = 450  # connections above which clients get less time
CROWDED_TIMES = (3, 20)  # the two times above, in a crowd
# The two times above, while the server drains. Both count from the beginning of the drain at the
# earliest. The second one starts again with every byte that the client sends.
DRAIN_TIMES = (1, 5)
PATIENCE = 20  # seconds that a listener may take to read an event
UNSENT = 65536  # bytes that the kernel buffers for a listener that does not read
LINGER = 2  # seconds that a client has to close its side
# Linux only: options of a socket, and a filter of one instruction that drops all packets.
ATTACH_FILTER, DETACH_FILTER = 26, 27
DROP = (6, 0, 0, 0)
TRANSFER_ENCODING = re.compile(rb"(?im)^transfer-encoding[ \t]*:(.*)$")


log = logging.getLogger("tinyqueue.web")


class ErrorLog(io.TextIOBase):
    """The wsgi.errors of a request, which never blocks it, as a full standard error would."""

    def write(self, text: str) -> int:
        if error := sys.exc_info()[1]:  # Bottle has written its traceback
            log.error("request failed unexpectedly: %s", type(error).__name__, exc_info=True)
        elif text.strip():
            log.error("%s", text.strip())
        return len(text)


class App(Protocol):
    """What the server serves: a WSGI app with settings."""

    @property
    def settings(self) -> Settings: ...
    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any: ...
    def stop_waiting(self) -> None:
        """Resume all requests that are parked."""


class Parked(BaseException):
    """Raised by an app that has nothing to answer yet, to give back the thread.

    Only where the environ has "tinyqueue.can_park". `park` is then called with a function. Called
    from any thread, that function makes the server call the app again with the same environ. It is
    not an Exception, so that no framework between the app and the server turns it into an error.
    """

    def __init__(self, park: Callable[[Callable[[], None]], None]) -> None:
        super().__init__()
        self.park = park


class Stream(BaseException):
    """Raised by an app to release its thread while its answer goes on.

    Allowed only if the environ has "tinyqueue.can_park". The server sends `headers` with status
    200, and then calls `attach` with the connection. Its `push` sends data to the client.
    """

    def __init__(self, headers: Iterable[tuple[str, str]], attach: Callable[[Channel], None]) -> None:
        super().__init__()
        self.headers = headers
        self.attach = attach


class Parser(HTTPRequestParser):  # type: ignore[misc]
    """One request. Refuses what a proxy in front of this server may have read differently."""

    path = ""  # Waitress sets it, unless the request is malformed
    rest = b""  # what the client has sent after this request
    environ: dict[str, Any] | None = None  # what the app gets, and gets again after it has parked

    def received(self, data: bytes) -> int:
        """Read up to the end of the request. Keep the bytes behind it, but do not parse them."""
        used: int = super().received(data)
        if not self.completed or self.empty:
            return used
        self.rest = data[used:]
        return len(data)

    def parse_header(self, header_plus: bytes) -> None:
        codings = TRANSFER_ENCODING.findall(header_plus)
        super().parse_header(header_plus)
        if codings and (self.version != "1.1" or "CONTENT_LENGTH" in self.headers):
            raise ParsingError("Transfer-Encoding is not allowed in HTTP/1.0 or together with Content-Length")
        if codings and [coding.strip().lower() for coding in codings] != [b"chunked"]:
            raise ParsingError("Transfer-Encoding must be chunked, once")
        if "," in self.headers.get("HOST", ""):
            raise ParsingError("There must be one Host")


class Task(WSGITask):  # type: ignore[misc]
    """The answer to one request."""

    def get_environment(self) -> dict[str, Any]:
        """Return the WSGI environment, with the path as it was sent.

        By default Waitress decodes it and drops slashes, so that each path has many spellings.
        """
        if self.request.environ is None:
            target = self.request.request_uri.partition("?")[0]
            path = target if target.startswith("/") else urlsplit(target).path
            own = {"PATH_INFO": path, "wsgi.errors": ErrorLog(), "tinyqueue.can_park": True}
            own["tinyqueue.stopping"] = self.channel.server.stopping
            self.request.environ = super().get_environment() | own
        environ: dict[str, Any] = self.request.environ
        return environ

    def build_response_header(self) -> Any:
        self.channel.since = time.monotonic()
        if self.channel.server.stopping:
            self.request.headers["CONNECTION"] = "close"
        return super().build_response_header()


class Refusal(ErrorTask):  # type: ignore[misc]
    """The answer to a request that Waitress refuses. Waitress forgets to close in HTTP/1.0."""

    def build_response_header(self) -> Any:
        self.request.headers["CONNECTION"] = "close"
        return super().build_response_header()


class Channel(HTTPChannel):  # type: ignore[misc]
    """A connection. Handles one request at a time, and reads on when the client has its answer.

    So a client that does not read holds one answer in memory, and no thread: a thread would wait
    only with more than 16 MB to send. What a client sends ahead stays unparsed in `rest`, or in
    the kernel.

    Responses are sent by the thread that produces them. By default Waitress' event loop tries to
    send them as well. It then spins while that thread holds the buffer and waits for the
    interpreter lock: with 256 connections, throughput fell to a hundredth.
    """

    parser_class = Parser
    task_class = Task
    error_task_class = Refusal
    rest = b""
    lingering = False
    listening = False  # whether it gets a Stream
    requests: list[Any]  # requests without an answer yet
    total_outbufs_len: int  # bytes that are not sent yet

    def __init__(self, *args: Any, **options: Any) -> None:
        self.since = time.monotonic()  # when the present request or answer began, or the last one
        super().__init__(*args, **options)

    def readable(self) -> bool:
        return not self.rest and bool(super().readable())

    def writable(self) -> bool:
        pending = self.total_outbufs_len or self.rest or self.close_when_flushed
        return bool(self.will_close or (pending and not self.requests))

    def received(self, data: bytes) -> bool:
        if self.lingering or self.listening:
            return False
        if self.request is None or self.server.drain_began:
            self.since = time.monotonic()
        return bool(super().received(data))

    def service(self) -> None:
        self.rest = self.requests[0].rest
        try:
            super().service()
        except Parked as parked:
            parked.park(partial(self.server.add_task, self))
        except Stream as stream:
            self._listen(stream)

    def _listen(self, stream: Stream) -> None:
        """Answer with a stream, which ends when one side closes the connection."""
        lines = ["HTTP/1.1 200 OK", f"Date: {formatdate(usegmt=True)}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in stream.headers]
        self.listening = True
        with self.requests_lock:
            for request in self.requests:
                request.close()
            self.requests = []
            self.rest = b""
        with suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNSENT)
        self.push("\r\n".join([*lines, "", ""]).encode("latin-1"))
        stream.attach(self)

    def push(self, data: bytes) -> None:
        """Send data to a listener, from any thread and without waiting.

        Drops the data if the client has not read what was sent before. So no more than one event
        waits in memory.
        """
        with self.outbuf_lock:
            if self.total_outbufs_len or not self.connected:
                return
            self.since = time.monotonic()
            self.outbufs.append(OverflowableBuffer(self.adj.outbuf_overflow))  # the last one keeps what it has sent
            self.outbufs[-1].append(data)
            self.total_outbufs_len = len(data)
            self._flush_exception(self._flush_some, do_close=False)
        if self.total_outbufs_len or self.will_close:
            self.server.pull_trigger()

    def handle_write(self) -> None:
        """Send what is left. Then close, or read what the client has sent ahead."""
        if not self.requests:
            self._flush_exception(self._flush_some_if_lockable if self.listening else self._flush_some)
        if self.will_close or not self.connected:
            self.handle_close()
        elif self.requests or self.total_outbufs_len:
            return
        elif self.close_when_flushed:
            self._linger()
        elif self.rest:
            data = self.rest
            self.rest = b""
            self.received(data)

    def _linger(self) -> None:
        """Send nothing more, and close when the client has closed.

        A close while bytes arrive would reset the connection. The client could lose the answer.
        """
        self.close_when_flushed = False
        self.lingering = True
        self.rest = b""
        self.since = time.monotonic()
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:  # the client has reset the connection
            self.handle_close()

    def expire(self, idle: float, slow: float, began: float) -> None:
        """Close the connection if it has been idle, or its client slow, for that many seconds.

        The seconds count from the time `began` at the earliest.
        """
        if self.listening:
            if self.total_outbufs_len and time.monotonic() - self.since > PATIENCE:
                self.handle_close()
            return
        is_slow = self.request or self.rest or self.total_outbufs_len or self.close_when_flushed
        limit = LINGER if self.lingering else slow if is_slow else idle
        if self.requests or time.monotonic() - max(self.since, began) < limit:
            return
        if self.lingering or self.total_outbufs_len:
            self.handle_close()
        elif is_slow or not self._has_unread():
            self._linger()

    def _has_unread(self) -> bool:
        """Whether data, or the end of the connection, has arrived and was not read yet."""
        try:
            self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:  # the client has reset the connection, which the event loop will notice
            return True
        return True


class Server(TcpWSGIServer):  # type: ignore[misc]
    """Serves an API on a socket until `stop` is called, then answers what it has accepted."""

    channel_class = Channel

    def __init__(self, app: App, sock: socket.socket) -> None:
        # It warns whenever a request waits for a thread, which is normal.
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        self.shutdown_timeout = app.settings.shutdown_timeout
        self.accept_until = math.inf
        self.drain_began = 0.0  # 0 until then
        self.ended = False
        self.lock = threading.RLock()  # reentrant: a signal handler may take it in the thread that holds it
        options = Adjustments(
            sockets=[sock],
            threads=WEB_THREADS,
            connection_limit=CONNECTIONS,
            cleanup_interval=1,
            # Waitress itself refuses a larger body, in plain text. A smaller one gets our problem.
            max_request_body_size=4 * app.settings.max_body,
            max_request_header_size=32768,
            clear_untrusted_proxy_headers=False,  # Access decides which to trust
            ident=None,
        )
        about = (sock.family, sock.type, sock.proto, sock.getsockname())
        super().__init__(app, {}, _sock=sock, adj=options, sockinfo=about, bind_socket=False)
        self.health_thread = ThreadedTaskDispatcher()
        self.health_thread.set_thread_count(1)

    def add_task(self, task: Channel) -> None:
        """Let a thread answer. /health has its own, because the others may all wait for Redis."""
        is_health = task.requests[0].path == "/health"
        (self.health_thread if is_health else self.task_dispatcher).add_task(task)

    def maintenance(self, now: float) -> None:
        channels = list(self.active_channels.values())
        is_crowded = len(channels) > CROWD
        times = DRAIN_TIMES if self.drain_began else CROWDED_TIMES if is_crowded else CLIENT_TIMES
        for channel in channels:
            channel.expire(*times, self.drain_began)

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called. From then on, every answer closes its connection."""
        return self.accept_until < math.inf

    def stop(self, grace: float = 0.0) -> None:
        """Begin to stop, but accept connections for `grace` more seconds.

        Another call may shorten that time, and never prolongs it. May be called from a signal
        handler and from any thread.
        """
        with self.lock:  # run() must not close the trigger between these lines
            self.accept_until = min(self.accept_until, time.monotonic() + grace)
            if not self.ended:
                self.pull_trigger()

    def run(self) -> None:
        """Serve until `stop` is called and its grace is over, then answer what was accepted.

        Returns when everything is answered, or when the shutdown timeout is over.
        """
        while (left := self.accept_until - time.monotonic()) > 0:
            self._poll(min(1.0, left))
            if self.stopping:
                self._end_streams()
        self.drain_began = time.monotonic()
        # The system would reset a connection that comes between the last accept and the close.
        drop_new_connections(self.socket, True)
        self._accept_waiting()
        drop_new_connections(self.socket, False)  # other processes may accept from this socket
        # Closes only the listening socket: responses need the trigger to wake this loop.
        wasyncore.dispatcher.close(self)
        deadline = self.drain_began + self.shutdown_timeout
        while self.active_channels and time.monotonic() < deadline:
            self._end_streams()
            self.application.stop_waiting()
            self.maintenance(0)
            self._poll(0.1)
        self.health_thread.shutdown(timeout=1)
        self.task_dispatcher.shutdown(timeout=1)
        with self.lock:
            self.ended = True
            wasyncore.close_all(self._map)

    def _end_streams(self) -> None:
        """Close the connections of all listeners. They can connect to another process."""
        for channel in list(self.active_channels.values()):
            if channel.listening:
                channel.handle_close()

    def _poll(self, seconds: float) -> None:
        wasyncore.loop(timeout=seconds, use_poll=True, map=self._map, count=1)

    def _accept_waiting(self) -> None:
        """Accept the clients in the backlog, which closing the socket would reset."""
        accepted = -1
        while accepted < len(self.active_channels) < CONNECTIONS:
            accepted = len(self.active_channels)
            self.handle_accept()


def drop_new_connections(sock: socket.socket, drop: bool) -> None:
    """Start or stop dropping the packets with which clients connect to a socket. Only on Linux.

    A client whose packet is dropped tries again one second later.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError):  # some sandboxes do not permit it
        if drop:
            code = ctypes.create_string_buffer(struct.pack("HBBI", *DROP))
            program = struct.pack("HP", 1, ctypes.addressof(code))
            sock.setsockopt(socket.SOL_SOCKET, ATTACH_FILTER, program)
        else:
            sock.setsockopt(socket.SOL_SOCKET, DETACH_FILTER, 0)


class Lifeline(wasyncore.file_dispatcher):  # type: ignore[misc]
    """Stops a server when the process that holds the other end of a pipe has died."""

    def __init__(self, pipe: int, server: Server) -> None:
        self.server = server
        super().__init__(pipe, server._map)

    def writable(self) -> bool:
        return False

    def handle_read(self) -> None:
        self.recv(1)

    def handle_close(self) -> None:
        self.close()
        self.server.stop()
