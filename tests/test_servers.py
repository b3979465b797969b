"""The HTTP API under other WSGI servers: the tests of test_http.py that need no server of ours."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import test_http
from client import JSON, NO_BODY, Answer, Client, Wire, spell
from conftest import RedisServer, free_port, put, raw, until
from test_http import VALID, handlers, refuse  # noqa: F401 - fixtures

from tinyqueue import Queue

REPOSITORY = Path(test_http.__file__).parent.parent
GUNICORN = f"{sys.executable} -m gunicorn wsgi:app -b 127.0.0.1:%d --access-logfile - --limit-request-line 0"
SERVERS = {
    "gunicorn sync": f"{GUNICORN} -k sync -w 2",
    "gunicorn gthread": f"{GUNICORN} -k gthread --threads 8",
}
if uwsgi := shutil.which("uwsgi", path=str(Path(sys.executable).parent)):  # no test needs it, because it must be built
    SERVERS["uwsgi"] = f"{uwsgi} --http-socket 127.0.0.1:%d -w wsgi:app --master --die-on-term --threads 8 -b 32768"
HANDLERS_PY = """
from test_http import echo, send_email
from tinyqueue import handler

handler("echo")(echo)
handler("send-email", max_attempts=5, queue="mail")(send_email)
"""
SLEEP = """
import time

@handler("sleep")
def sleep(seconds: float) -> None:
    time.sleep(seconds)
"""


class Remote(Client):
    """Sends each request on a new connection to a server."""

    def __init__(self, server: str, address: tuple[str, int], log: Path) -> None:
        self.server = server
        self.address = address
        self.log_file = log

    def call(self, method: str, path: str, body: Any = NO_BODY, headers: Any = None) -> Answer:
        if self.server == "uwsgi" and re.search(r"/\.\.$|/\.\./|/%$|.{9000}", path):
            pytest.skip("this server changes or refuses such a path before the app gets it")
        path = path if path.startswith("/") else f"/{path}"
        raw = b"" if body is NO_BODY else body if isinstance(body, bytes) else json.dumps(body).encode()
        own = {} if body is NO_BODY else {"content-type": JSON, "content-length": str(len(raw))}
        own |= {name.lower(): value for name, value in (headers or {}).items()}
        with Wire(self.address) as wire:
            wire.send(spell(method, path, None, *(f"{name}: {value}" for name, value in own.items())) + raw)
            return wire.answer(bodiless=method == "HEAD")


@contextmanager
def serving(
    server: str, url: str, folder: Path, module: str = HANDLERS_PY
) -> Iterator[tuple[Remote, subprocess.Popen[bytes]]]:
    """Run the app under another server until the end of the block, or until the process has ended."""
    pytest.importorskip("gunicorn")
    (folder / "handlers.py").write_text(module)
    port = free_port()
    path = os.pathsep.join(map(str, (folder, REPOSITORY, REPOSITORY / "tests")))
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": path, "REDIS_URL": url}
    command = (SERVERS[server] % port).split()
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=output, stderr=output)
    until(lambda: process.poll() is not None or re.search("Listening at|spawned uWSGI worker", log.read_text()))
    assert process.poll() is None, log.read_text()
    yield Remote(server, ("127.0.0.1", port), log), process
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0, log.read_text()


@pytest.fixture(scope="session", params=SERVERS)
def remote(
    request: pytest.FixtureRequest, shared_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Remote]:
    """A client of the app under another server."""
    with serving(request.param, shared_redis.url, tmp_path_factory.mktemp("server")) as (client, _):
        yield client


@pytest.fixture
def queue(near: Queue) -> Queue:
    return near


@pytest.fixture
def api(remote: Remote, queue: Queue) -> Remote:
    return remote


def shared_tests() -> Iterator[tuple[str, Any]]:
    """Yield the tests that send requests and read the queue, and do nothing else."""
    for name, test in vars(test_http).items():
        if name.startswith("test_"):
            marks = (mark.args[0] for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize")
            names = {part.strip() for mark in marks for part in ([mark] if isinstance(mark, str) else mark)}
            fixtures = inspect.signature(test).parameters.keys() - names
            if fixtures & {"api", "refuse"} and fixtures <= {"api", "refuse", "queue"}:
                yield name, test


globals().update(shared_tests())


# Bodies ---------------------------------------------------------------------------------------------------------------

POST = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def chunked(api: Remote) -> Remote:
    """A server that passes on chunked bodies and answers Expect."""
    if api.server == "uwsgi":
        pytest.skip("this server passes on no chunked body and answers no Expect")
    return api


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))


def test_server_passes_on_a_chunked_body(chunked: Remote, queue: Queue) -> None:
    with Wire(chunked.address) as wire:
        wire.send(CHUNKED + chunks(VALID[:5], VALID[5:]))
        assert wire.answer().status == 201
    assert queue.waiting(["default"]) == 1


def test_server_passes_on_a_chunked_batch(chunked: Remote, queue: Queue) -> None:
    lines = [VALID + b"\n"] * 50
    with Wire(chunked.address) as wire:
        wire.send(CHUNKED.replace(b"/jobs", b"/jobs/batch").replace(b"json", b"x-ndjson") + chunks(*lines))
        assert wire.answer().status == 201
    assert queue.waiting(["default"]) == 50


def test_server_passes_on_a_chunked_body_that_is_too_large(chunked: Remote, queue: Queue) -> None:
    with Wire(chunked.address) as wire:
        wire.send(CHUNKED + chunks(*[b" " * 10_000] * 30))
        assert wire.answer().kind == "too-large"
    assert queue.waiting(["default"]) == 0


@pytest.mark.parametrize("kind", ["chunked", "length"])
def test_server_passes_on_a_body_that_is_streamed(chunked: Remote, queue: Queue, kind: str) -> None:
    with Wire(chunked.address) as wire:
        head = CHUNKED if kind == "chunked" else POST + b"Content-Length: %d\r\n\r\n" % len(VALID)
        body = chunks(VALID[:9], VALID[9:]) if kind == "chunked" else VALID
        for part in (head, body[:7], body[7:20], body[20:]):
            wire.send(part)
            wire.until_read()
        assert wire.answer().status == 201


@pytest.mark.parametrize("kind", ["chunked", "length"])
def test_server_serves_a_client_that_waits_for_100_continue(chunked: Remote, kind: str) -> None:
    head = CHUNKED if kind == "chunked" else POST + b"Content-Length: %d\r\n\r\n" % len(VALID)
    with Wire(chunked.address) as wire:
        wire.send(head.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
        assert wire.answer().status == 100
        wire.send(chunks(VALID) if kind == "chunked" else VALID)
        assert wire.answer().status == 201


# Waiting, working and the log -----------------------------------------------------------------------------------------


def test_server_answers_a_waiting_request_when_the_job_ends_or_says_when_to_ask_again(
    api: Remote, queue: Queue
) -> None:
    job = put(queue, "processing")
    answers: list[Answer] = []
    threads = [threading.Thread(target=lambda: answers.append(api.get(f"/jobs/{job.id}?wait=20"))) for _ in range(5)]
    for thread in threads:
        thread.start()
    waiting = 0 if api.server == "gunicorn sync" else 4
    until(lambda: len(answers) == 5 - waiting and raw(queue).scard(queue.keys.awaited) == min(waiting, 1))
    assert {answer.headers["retry-after"] for answer in answers} == {"1"}
    assert api.get("/health").status == 200
    queue.complete(job)
    for thread in threads:
        thread.join()
    ended = [answer.json["status"] for answer in answers if "retry-after" not in answer.headers]
    assert ended == ["completed"] * waiting


def test_server_runs_jobs_itself(api: Remote, queue: Queue) -> None:
    jobs = queue.enqueue_many("echo", range(20))
    answer = api.call("POST", "/work?seconds=20")
    assert (answer.status, answer.json["completed"]) == (200, 20)
    assert {queue.get(job.id).status for job in jobs} == {"completed"}
    assert queue.workers() == []


def test_server_logs_requests(api: Remote, queue: Queue) -> None:
    assert api.post("/jobs", VALID, {"Authorization": "Bearer s3cr3t-s3cr3t-s3cr3t"}).status == 201
    line = until(lambda: re.search(r".*POST /jobs\b.*", api.log_file.read_text().splitlines()[-1]))[0]
    assert "201" in line
    assert "s3cr3t" not in api.log_file.read_text()


@pytest.mark.parametrize("server", [server for server in SERVERS if server != "uwsgi"])  # which answers nothing then
def test_server_that_stops_answers_a_request_that_runs_jobs(
    near: Queue, shared_redis: RedisServer, tmp_path: Path, server: str
) -> None:
    job = near.enqueue("sleep", 1.0)
    answers: list[Answer] = []
    with serving(server, shared_redis.url, tmp_path, HANDLERS_PY + SLEEP) as (api, _):
        thread = threading.Thread(target=lambda: answers.append(api.call("POST", "/work?seconds=20")))
        thread.start()
        until(lambda: near.get(job.id).status == "processing")
    thread.join()
    assert [answer.json["completed"] for answer in answers] == [1]
    assert near.workers() == []
