"""Server-sent events: what listeners get, how many there may be, and that none of them delays another."""

from __future__ import annotations

import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any

import pytest
from client import Answer, Client, Wire, serving, spell
from conftest import RedisServer, put, raw, threads_since, until

import tinyqueue_events
import tinyqueue_server
from tinyqueue import Queue
from tinyqueue_config import Settings
from tinyqueue_events import LISTENERS
from wsgi import API

LISTEN = spell("GET", "/events")


class Listener:
    """A client of GET /events that reads one event after the other."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=20)
        self.socket.sendall(LISTEN)
        self.file = self.socket.makefile("rb")
        self.status = int(self.file.readline().split()[1])
        lines = iter(lambda: self.file.readline().strip(), b"")
        self.headers = dict(line.decode().lower().split(": ", 1) for line in lines)

    def event(self) -> Any:
        """Read up to the next event, past comments. Returns its data; None at the end of the stream."""
        for line in self.file:
            if line.startswith(b"data: "):
                return json.loads(line[6:])
        return None

    def close(self) -> None:
        self.file.close()
        self.socket.close()


@contextmanager
def listening(address: tuple[str, int]) -> Iterator[Listener]:
    with closing(Listener(address)) as listener:
        yield listener


@pytest.fixture
def address(near: Queue) -> Iterator[tuple[str, int]]:
    before = threading.enumerate()
    with serving(API(Settings(), near)) as (_, address):
        yield address
    until(lambda: not [thread for thread in threads_since(before) if thread.name == "events"])


def ask(address: tuple[str, int], method: str, path: str) -> Answer:
    with Wire(address) as wire:
        wire.send(spell(method, path))
        return wire.answer(bodiless=method == "HEAD")


# What is sent ---------------------------------------------------------------------------------------------------------


def test_listener_gets_the_answers_of_other_routes_at_once(near: Queue, address: tuple[str, int]) -> None:
    worker = near.register(["default"], 1)
    put(near, "pending", queue="other")
    with listening(address) as listener:
        assert listener.status == 200
        assert listener.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert listener.headers["cache-control"] == "no-store"
        assert listener.headers["connection"] == "close"
        assert listener.headers["x-request-id"]
        event = listener.event()
    assert event["verdict"]["problems"][0]["check"] == "persistence"
    assert event["stats"]["pending"] == 1
    assert len(event["stats"]["history"]) == 60
    assert [about["id"] for about in event["workers"]] == [worker]


def test_listener_gets_what_changes_afterwards(near: Queue, address: tuple[str, int]) -> None:
    with listening(address) as listener:
        assert listener.event()["stats"]["pending"] == 0
        put(near, "pending")
        assert listener.event()["stats"]["pending"] == 1


def test_listener_gets_comments_while_nothing_changes(
    near: Queue, address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_events, "EVERY", 0.01)
    monkeypatch.setattr(tinyqueue_events, "QUIET", 0.05)
    with listening(address) as listener:
        listener.event()
        until(lambda: listener.file.readline() == b":\n")


def test_listener_gets_the_problem_while_redis_is_down(start_redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyqueue_events, "EVERY", 0.05)
    server: RedisServer = start_redis()
    queue = Queue.from_url(server.url)
    with serving(API(Settings(), queue)) as (_, address), listening(address) as listener:
        assert "problem" not in listener.event()
        server.kill()
        problem = until(lambda: listener.event().get("problem"))
        until(lambda: listener.event()["verdict"]["problems"][0]["check"] == "redis")
        assert (problem["status"], problem["type"]) == (503, "urn:tinyqueue:unavailable")
        server.start()
        until(lambda: "problem" not in listener.event())
    queue.pool.disconnect()


def test_head_request_for_events_gets_the_headers(address: tuple[str, int]) -> None:
    answer = ask(address, "HEAD", "/events")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")


# How many -------------------------------------------------------------------------------------------------------------


def test_two_hundred_listeners_share_one_thread_and_the_next_is_refused(near: Queue, address: tuple[str, int]) -> None:
    assert LISTENERS == 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    ask(address, "GET", "/queues")  # the threads of the server run from now on
    before = threading.enumerate()
    with ExitStack() as stack:
        listeners = [stack.enter_context(listening(address)) for _ in range(LISTENERS)]
        assert {listener.status for listener in listeners} == {200}
        assert {listener.event()["stats"]["pending"] for listener in listeners} == {0}
        refused = ask(address, "GET", "/events")
        assert (refused.status, refused.kind) == (503, "too-many-listeners")
        assert "GET /stats" in refused.problem["detail"]
        assert refused.headers["retry-after"] == "60"
        assert ask(address, "GET", "/queues").status == 200
        assert [thread.name for thread in threads_since(before)] == ["events"]
        raw(near).config_resetstat()
        began = time.monotonic()
        put(near, "pending")
        for listener in listeners:
            while listener.event()["stats"]["pending"] == 0:
                pass
        assert time.monotonic() - began < 5
        assert raw(near).info("commandstats")["cmdstat_scard"]["calls"] < 10  # each event needs one
        listeners[0].close()
        until(lambda: ask(address, "HEAD", "/events").status == 200)
        with listening(address) as another:
            assert another.status == 200
            assert another.event()["stats"]["pending"] == 1


def test_thread_ends_after_the_last_listener_has_gone(address: tuple[str, int]) -> None:
    before = threading.enumerate()
    with listening(address) as listener:
        listener.event()
        assert any(thread.name == "events" for thread in threads_since(before))
    until(lambda: not any(thread.name == "events" for thread in threads_since(before)))
    with listening(address) as listener:
        assert listener.event()["stats"]["pending"] == 0


# Listeners that do not read, and the end ------------------------------------------------------------------------------


def test_listener_that_does_not_read_is_dropped_and_holds_up_no_other(
    near: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_events, "EVERY", 0.01)
    monkeypatch.setattr(tinyqueue_server, "PATIENCE", 0.5)
    put(near, "pending")  # its age changes in every event
    raw(near).sadd(near.keys.paused, *(f"q{number}" for number in range(3000)))  # events of about 200 KB
    before = threading.enumerate()
    with serving(API(Settings(), near)) as (server, address), listening(address) as reader, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(address)
        deaf.sendall(LISTEN)
        until(lambda: len(server.active_channels) == 2)
        until(lambda: reader.event() and len(server.active_channels) == 1)
        ages = [reader.event()["stats"]["oldestWaitingMs"] for _ in range(3)]
        assert sorted(set(ages)) == ages
        with suppress(ConnectionResetError):
            while deaf.recv(65536):
                pass
    until(lambda: not [thread for thread in threads_since(before) if thread.name == "events"])


def test_shutdown_ends_all_events_at_once(near: Queue) -> None:
    with serving(API(Settings(ready_grace=0), near)) as (server, address), ExitStack() as stack:
        listeners = [stack.enter_context(listening(address)) for _ in range(20)]
        for listener in listeners:
            listener.event()
        began = time.monotonic()
        server.stop()
        assert [listener.event() for listener in listeners] == [None] * 20
        assert time.monotonic() - began < 1


def test_events_end_at_the_begin_of_the_grace_of_a_shutdown(near: Queue) -> None:
    with serving(API(Settings(), near)) as (server, address):
        with listening(address) as listener:
            listener.event()
            began = time.monotonic()
            server.stop(grace=30)
            assert listener.event() is None
            assert time.monotonic() - began < 1
        refused = ask(address, "GET", "/events")
        assert (refused.status, refused.kind) == (503, "stopping")


def test_other_servers_refuse_events(api: Client) -> None:
    answer = api.get("/events")
    assert (answer.status, answer.kind) == (404, "not-found")
    assert "GET /stats" in answer.problem["detail"]
