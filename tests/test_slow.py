"""Slow, idle and waiting clients of a server process. None may block the answers to others."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from typing import Any

import pytest
from client import Process, Wire, running, serving, spell
from conftest import RedisServer, raw, until

import tinyqueue_server
from tinyqueue import Queue
from tinyqueue_config import Settings
from wsgi import API

HANDLERS_PY = """
import time
from tinyqueue import handler

@handler("echo")
def echo(payload: dict) -> dict:
    return payload

@handler("sleep")
def sleep(seconds: float) -> None:
    time.sleep(seconds)
"""
VALID = b'{"type":"echo","payload":{}}'
SOON = 5.0  # seconds; long enough for a slow machine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server for all tests that need none of their own: what one test does to it must not harm the next."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "handlers.py").write_text(HANDLERS_PY)
    with running(folder) as server:
        yield server


def assert_answers_soon(server: Process) -> None:
    begin = time.monotonic()
    with Wire(server.address) as wire:
        wire.send(spell("GET", "/health"))
        assert wire.answer().status == 200
    assert time.monotonic() - begin < SOON


def test_answer_while_other_requests_are_incomplete(server: Process) -> None:
    request = spell("POST", "/jobs", VALID)
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.address)) for _ in range(100)]
        for at, wire in enumerate(wires):
            wire.send(request[: 1 + at * (len(request) - 2) // 100])
        assert_answers_soon(server)
        for at, wire in enumerate(wires):
            wire.send(request[1 + at * (len(request) - 2) // 100 :])
        assert {wire.answer().status for wire in wires} == {201}


def test_answer_while_other_requests_arrive_byte_by_byte(server: Process) -> None:
    request = spell("POST", "/jobs", VALID)
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.address)) for _ in range(20)]
        for at, byte in enumerate(request):
            for wire in wires:
                wire.send(bytes([byte]))
            if at % 20 == 0:
                assert_answers_soon(server)
        assert {wire.answer().status for wire in wires} == {201}


def test_answer_while_hundreds_of_connections_are_idle(server: Process) -> None:
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.address)) for _ in range(450)]
        for wire in wires[::3]:
            wire.send(spell("GET", "/health"))
        assert {wire.answer().status for wire in wires[::3]} == {200}
        assert_answers_soon(server)
    assert_answers_soon(server)


def test_answer_although_more_clients_are_idle_than_may_connect(server: Process) -> None:
    with ExitStack() as stack:
        for _ in range(520):
            stack.enter_context(Wire(server.address))
        with Wire(server.address) as wire:
            wire.send(spell("GET", "/health"))
            assert wire.answer().status == 200


def test_answer_while_other_clients_do_not_read_their_answers(server: Process) -> None:
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.address)) for _ in range(20)]
        for wire in wires:
            wire.send(spell("GET", "/openapi.json") * 50)
        assert_answers_soon(server)


def test_answer_while_other_clients_pipeline_pages_and_never_read(tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text(HANDLERS_PY)
    pages = spell("GET", "/") * 400
    with running(tmp_path) as server, ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.address)) for _ in range(16)]
        for _ in range(20):
            for wire in wires:
                wire.push(pages)
            with Wire(server.address) as wire:
                wire.send(spell("GET", "/stats"))
                assert wire.answer().status == 200
        [line] = re.findall(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{server.pid}/status").read_text(), re.M)
        assert int(line) < 150_000, "the server keeps the unread pages in memory"


def test_answer_all_requests_that_a_client_pipelines_before_it_reads(server: Process) -> None:
    with Wire(server.address) as wire:
        for _ in range(40):
            wire.send(spell("GET", "/openapi.json") + b"\r\n" + spell("GET", "/health"))
        for _ in range(40):
            assert [wire.answer().json.keys() >= {key} for key in ("openapi", "status")] == [True, True]


def test_health_answers_within_a_second_while_redis_hangs(
    tmp_path: Path, start_redis: Callable[..., RedisServer]
) -> None:
    (tmp_path / "handlers.py").write_text(HANDLERS_PY)
    redis = start_redis()
    with running(tmp_path, REDIS_URL=redis.url) as server, ExitStack() as stack:
        assert redis.process
        redis.process.send_signal(SIGSTOP)
        try:
            for _ in range(40):
                stack.enter_context(Wire(server.address)).send(spell("GET", "/stats"))
            for _ in range(20):
                begin = time.monotonic()
                assert_answers_soon(server)
                assert time.monotonic() - begin < 1
        finally:
            redis.process.send_signal(SIGCONT)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch, near: Queue) -> Iterator[tuple[str, int]]:
    """The address of a server that closes idle connections after a minute and slow ones after a second."""
    monkeypatch.setattr(tinyqueue_server, "CLIENT_TIMES", (60, 1))
    with serving(API(Settings(), near)) as (_, address):
        yield address


@pytest.mark.parametrize(
    "head", [b"GET /hea", spell("POST", "/jobs", VALID + b" " * 1000)[:-1000]], ids=["headers", "body"]
)
def test_close_a_connection_whose_request_does_not_arrive_in_time(hurried: tuple[str, int], head: bytes) -> None:
    with Wire(hurried) as slow, Wire(hurried) as idle:
        slow.send(head)
        trickle = threading.Event()

        def send_on() -> None:
            while not trickle.wait(0.05):
                slow.push(b" ")

        thread = threading.Thread(target=send_on)
        thread.start()
        try:
            assert slow.ended()
        finally:
            trickle.set()
            thread.join()
        idle.send(spell("GET", "/health"))
        assert idle.answer().status == 200


def test_close_a_connection_whose_client_does_not_read_its_answer(hurried: tuple[str, int], near: Queue) -> None:
    near.enqueue_many("echo", [{"text": "x" * 100} for _ in range(500)])
    with Wire(hurried) as wire:
        wire.send(spell("GET", "/jobs?limit=500") * 100)
        with pytest.raises(ConnectionError):
            until(lambda: wire.push(b" ") and False)


def test_answer_while_other_clients_wait_for_a_job(server: Process) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(Wire(server.address))
        first.send(spell("POST", "/jobs", b'{"type":"echo","payload":{},"delay":60}'))
        location = "/" + first.answer().headers["location"]
        wires = [stack.enter_context(Wire(server.address)) for _ in range(100)]
        for wire in wires:
            wire.send(spell("GET", f"{location}?wait=25"))
        for _ in range(3):
            assert_answers_soon(server)
        first.send(spell("DELETE", location))
        assert first.answer().status == 200
        statuses = [wire.answer().json["status"] for wire in wires]
        assert statuses == ["cancelled"] * 100


def threads(server: Process) -> int:
    return len(list(Path(f"/proc/{server.pid}/task").iterdir()))


@pytest.mark.parametrize("shards", ["1", "3"])
@pytest.mark.parametrize("embedded", [True, False])
def test_wait_for_200_jobs_in_one_thread(
    tmp_path: Path, shared_redis: RedisServer, near: Queue, embedded: bool, shards: str
) -> None:
    (tmp_path / "handlers.py").write_text(HANDLERS_PY)
    url = {} if embedded else {"REDIS_URL": shared_redis.url}
    with running(tmp_path, TINYQUEUE_SHARDS=shards, **url) as server, ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.address)) for _ in range(200)]
        for wire in wires:
            wire.send(spell("POST", "/jobs", b'{"type":"echo","payload":{},"delay":60}'))
        locations = ["/" + wire.answer().headers["location"] for wire in wires]
        before = threads(server)
        for wire, location in zip(wires, locations, strict=True):
            wire.send(spell("GET", f"{location}?wait=25"))
        assert_answers_soon(server)
        shard_threads = 3 * int(shards) if shards != "1" else 0  # of the queue, which start when they are needed
        until(lambda: threads(server) <= before + int(shards) + shard_threads)  # upkeep may have one for a moment
        other = stack.enter_context(Wire(server.address))
        begin = time.monotonic()
        for wire, location in zip(wires, locations, strict=True):
            other.send(spell("DELETE", location))
            assert other.answer().status == 200
            assert wire.answer().json["status"] == "cancelled"
        assert time.monotonic() - begin < 20
        until(lambda: threads(server) <= before + shard_threads)


def test_wait_until_the_time_is_up_in_every_one_of_40_requests(server: Process) -> None:
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.address)) for _ in range(40)]
        wires[0].send(spell("POST", "/jobs", b'{"type":"echo","payload":{},"delay":60}'))
        location = "/" + wires[0].answer().headers["location"]
        begin = time.monotonic()
        for wire in wires:
            wire.send(spell("GET", f"{location}?wait=1"))
        assert {wire.answer().json["status"] for wire in wires} == {"pending"}
        assert 1 <= time.monotonic() - begin < SOON


@pytest.fixture
def delayed(near: Queue) -> str:
    """The path of a job that does not start, with a wait."""
    return f"/jobs/{near.enqueue('echo', {}, delay=60).id}?wait=25"


def test_wait_ends_with_an_answer_when_the_server_stops(near: Queue, delayed: str) -> None:
    with serving(API(Settings(), near)) as (server, address), Wire(address) as wire:
        wire.send(spell("GET", delayed))
        until(lambda: raw(near).scard(near.keys.awaited))
        begin = time.monotonic()
        server.stop()
        answer = wire.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert time.monotonic() - begin < SOON


def test_wait_answers_503_when_redis_is_lost(start_redis: Callable[..., RedisServer], queue_at: Any) -> None:
    redis = start_redis()
    queue = queue_at(redis.url)
    job = queue.enqueue("echo", {}, delay=60)
    with serving(API(Settings(), queue)) as (_, address), Wire(address) as wire:
        wire.send(spell("GET", f"/jobs/{job.id}?wait=25"))
        until(lambda: raw(queue).scard(queue.keys.awaited))
        redis.kill()
        answer = wire.answer()
        assert (answer.status, answer.kind) == (503, "unavailable")


def test_wait_counts_as_one_request_and_is_logged_once(
    near: Queue, delayed: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "tinyqueue.web")
    with serving(API(Settings(rate_limit="9/hour"), near)) as (_, address), Wire(address) as wire:
        wire.send(spell("GET", delayed.removesuffix("25") + "1"))
        assert wire.answer().headers["ratelimit"].startswith('"default";r=8;')
    lines = [record for record in caplog.records if getattr(record, "fields", {}).get("event") == "request"]
    assert [line.fields["status"] for line in lines] == [200]
    assert lines[0].fields["durationMs"] >= 1000


def test_wait_forgets_the_job_when_the_time_is_up(near: Queue, delayed: str) -> None:
    with serving(API(Settings(), near)) as (_, address), Wire(address) as wire:
        wire.send(spell("GET", delayed.removesuffix("25") + "1"))
        assert wire.answer().status == 200
        until(lambda: not raw(near).scard(near.keys.awaited))


def test_wait_sees_the_end_of_a_job_whose_token_is_lost(near: Queue, delayed: str) -> None:
    with serving(API(Settings(), near)) as (_, address), Wire(address) as wire:
        wire.send(spell("GET", delayed))
        until(lambda: raw(near).scard(near.keys.awaited))
        raw(near).delete(near.keys.awaited)
        assert near.cancel(delayed[6:42])
        assert wire.answer().json["status"] == "cancelled"


def test_answer_while_every_slot_is_busy(server: Process) -> None:
    with Wire(server.address) as wire:
        for _ in range(20):
            wire.send(spell("POST", "/jobs", b'{"type":"sleep","payload":0.5}'))
            assert wire.answer().status == 201
        assert_answers_soon(server)
        wire.send(spell("GET", "/stats"))
        stats = wire.answer().json
        assert stats["pending"] + stats["processing"] > 0
