"""Slow, idle and waiting clients of a server process. None may block the answers to others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from client import Process, Wire, running, spell

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


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    (tmp_path / "handlers.py").write_text(HANDLERS_PY)
    with running(tmp_path) as server:
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


def test_answer_while_other_clients_do_not_read_their_answers(server: Process) -> None:
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.address)) for _ in range(20)]
        for wire in wires:
            wire.send(spell("GET", "/openapi.json") * 50)
        assert_answers_soon(server)


def test_answer_while_other_clients_wait_for_a_job(server: Process) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(Wire(server.address))
        first.send(spell("POST", "/jobs", b'{"type":"echo","payload":{},"delay":60}'))
        location = first.answer().headers["location"]
        wires = [stack.enter_context(Wire(server.address)) for _ in range(100)]
        for wire in wires:
            wire.send(spell("GET", f"{location}?wait=25"))
        for _ in range(3):
            assert_answers_soon(server)
        first.send(spell("DELETE", location))
        assert first.answer().status == 200
        statuses = [wire.answer().json["status"] for wire in wires]
        assert set(statuses) <= {"pending", "cancelled"}
        assert "cancelled" in statuses


def test_answer_while_every_slot_is_busy(server: Process) -> None:
    with Wire(server.address) as wire:
        for _ in range(20):
            wire.send(spell("POST", "/jobs", b'{"type":"sleep","payload":0.5}'))
            assert wire.answer().status == 201
        assert_answers_soon(server)
        wire.send(spell("GET", "/stats"))
        stats = wire.answer().json
        assert stats["pending"] + stats["processing"] > 0
