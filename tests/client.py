"""Clients and servers of the HTTP API for tests.

`Client` calls the app directly, through the WSGI validator, without a server. `Wire` sends bytes to
a server over a socket. `serving` runs a server in this process, `running` in another one.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import WSGIWarning, validator

import wsgi
from tinyqueue_server import Server
from wsgi import API

JSON = "application/json"
PROBLEM = "application/problem+json"
NO_BODY = object()


class Answer(NamedTuple):
    """A response. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return strict_json(self.body)

    @property
    def problem(self) -> Any:
        """The body, which must be a problem with the status of this answer."""
        assert self.headers["content-type"] == PROBLEM, self
        about = self.json
        kind = about["type"].removeprefix("urn:tinyqueue:")
        assert about["type"] == f"urn:tinyqueue:{kind}"
        assert kind
        assert about["title"] == kind.replace("-", " ").capitalize()
        assert about["status"] == self.status >= 400
        assert isinstance(about["detail"], str)
        assert about["detail"]
        return about

    @property
    def kind(self) -> str:
        return str(self.problem["type"].removeprefix("urn:tinyqueue:"))


class Client:
    """Calls a WSGI app from the address `peer`, with a key's `secret` if given.

    `log` holds what the app has written to wsgi.errors.
    """

    def __init__(self, app: Any, secret: str = "", peer: str = "127.0.0.1") -> None:
        self._app = validator(app)
        self._peer = peer
        self._headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        self.log = io.StringIO()

    def call(self, method: str, path: str, body: Any = NO_BODY, headers: Mapping[str, str] | None = None) -> Answer:
        """Send a request. A body that is not bytes is encoded as JSON.

        A request with a body has Content-Type: application/json, unless `headers` has another one.
        Header names are case-insensitive. An empty Content-Type is not sent.
        """
        raw = b"" if body is NO_BODY else body if isinstance(body, bytes) else json.dumps(body).encode()
        environ = self._environ(method, path, raw)
        if body is not NO_BODY:
            environ |= {"CONTENT_LENGTH": str(len(raw)), "CONTENT_TYPE": JSON}
        for name, value in {**self._headers, **(headers or {})}.items():
            variable = name.upper().replace("-", "_")
            environ[variable if variable in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{variable}"] = value
        return self._send(environ)

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.call("GET", path, headers=headers)

    def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Answer:
        return self.call("POST", path, body, headers)

    def stream(self, path: str, stream: Any, **environ: Any) -> Answer:
        """Send a POST of JSON whose body the app must read from a stream, with more variables of WSGI."""
        environ = self._environ("POST", path, b"") | {"CONTENT_TYPE": JSON, "wsgi.input": stream} | environ
        return self._send(environ)

    def _environ(self, method: str, path: str, raw: bytes) -> dict[str, Any]:
        path, _, query = path.partition("?")
        path = path if path.startswith("/") else f"/{path}"  # a Location is relative to /jobs
        environ: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": "",
            "QUERY_STRING": query,
            "REMOTE_ADDR": self._peer,
        }
        environ["PATH_INFO"] = unquote_to_bytes(path).decode("latin-1")
        environ |= {"wsgi.input": io.BytesIO(raw), "wsgi.errors": self.log, "wsgi.multithread": True}
        setup_testing_defaults(environ)
        return environ

    def _send(self, environ: dict[str, Any]) -> Answer:
        head: list[Any] = []

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            head[:] = [status, headers]
            return head.append

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WSGIWarning)  # about unknown methods
            chunks: Iterable[bytes] = self._app(environ, start_response)
        try:
            body = b"".join(chunks)
        finally:
            chunks.close()  # type: ignore[attr-defined]
        status = int(head[0].split()[0])
        headers = {name.lower(): value for name, value in head[1]}
        assert len(headers) == len(head[1]), f"duplicate header: {head}"
        if environ["REQUEST_METHOD"] == "HEAD" or status == 204:
            assert body == b""
        else:
            assert headers["content-length"] == str(len(body))
        return Answer(status, headers, body)


def strict_json(text: bytes) -> Any:
    """Decode JSON like the strictest client: no NaN, no duplicate names, no lone surrogates."""

    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), f"duplicate name: {pairs}"
        return dict(pairs)

    value = json.loads(text.decode(), parse_constant=refuse, object_pairs_hook=unique)
    json.dumps(value, ensure_ascii=False).encode()
    return value


# Over a socket --------------------------------------------------------------------------------------------------------


class Wire:
    """A connection that sends raw bytes and reads one answer after the other."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._socket = socket.create_connection(address, timeout=10)
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def send(self, raw: bytes) -> None:
        self._socket.sendall(raw)

    def push(self, raw: bytes) -> int:
        """Send as much as the connection takes at this moment, and return how much that was."""
        try:
            return self._socket.send(raw, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def until_read(self) -> None:
        """Wait until the server's host has acknowledged everything that was sent."""
        while struct.unpack("i", fcntl.ioctl(self._socket, termios.TIOCOUTQ, b"\0" * 4))[0]:
            threading.Event().wait(0.005)

    def half_close(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def answer(self, bodiless: bool = False) -> Answer:
        """Read one answer. An answer to HEAD is `bodiless`: no body follows its Content-Length."""
        status = int(self._file.readline().split()[1])
        headers = {}
        while line := self._file.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        length = 0 if bodiless else int(headers.get("content-length", 0))
        return Answer(status, headers, self._file.read(length))

    def rest(self) -> bytes:
        """Read until the server closes or resets the connection."""
        try:
            return self._file.read()
        except ConnectionResetError:
            return b""

    def ended(self) -> bool:
        """Wait until the server closes. Returns whether it sent nothing more."""
        return self.rest() == b""


@contextmanager
def serving(api: API) -> Iterator[tuple[Server, tuple[str, int]]]:
    """Serve an API on a socket from a thread of this process."""
    sock = socket.create_server(("127.0.0.1", 0))
    address = sock.getsockname()
    server = Server(api, sock)
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        yield server, address
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"


class Process(NamedTuple):
    """A server in another process: the address that it listens on, its log file and its id."""

    address: tuple[str, int]
    log: Path
    pid: int


@contextmanager
def running(folder: Path, *command: str, **environ: str) -> Iterator[Process]:
    """Run `python wsgi.py`, or another command that serves, until the block ends.

    It runs in the folder, listens on a free port of 127.0.0.1, and inherits only PATH from this
    process' environment.
    """
    log = folder / "wsgi.log"
    environ = {"PATH": os.environ["PATH"], "HOST": "127.0.0.1", "PORT": "0", "PYTHONPATH": str(folder)} | environ
    with log.open("wb") as stderr:
        process = subprocess.Popen(command or [sys.executable, wsgi.__file__], cwd=folder, env=environ, stderr=stderr)
    try:
        for _ in range(2000):
            if found := re.search(r" on http://[\w.]+:(\d+)", log.read_text()):
                break
            assert process.poll() is None, log.read_text()
            threading.Event().wait(0.01)
        else:
            raise AssertionError("the server did not log where it listens")
        yield Process(("127.0.0.1", int(found[1])), log, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            process.kill()


def spell(method: str, path: str, body: bytes | None = None, *headers: str) -> bytes:
    """Return a request as the bytes of HTTP/1.1. A body is declared as JSON, with its length."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")
