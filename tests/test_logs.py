"""Log lines: one for each event, that nothing can forge, with the ids that lead from a request to its job."""

from __future__ import annotations

import io
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client import Client, Wire, running, spell
from conftest import raw, until

from tinyqueue import HANDLERS, Job, Queue, handler
from tinyqueue_config import Settings, set_up_logging
from worker import Worker
from wsgi import API

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
NASTY = "a\nb\r\x1b[31m\x00\x85\u2028\u202e2026-01-01 00:00:00,000 INFO completed"
Lines = Callable[[], list[str]]


@pytest.fixture
def logged() -> Iterator[Callable[..., Lines]]:
    """Log as the settings say, into memory: logged(log_format="json") -> a function that gives the lines so far."""
    root = logging.getLogger()
    before = root.level, list(root.handlers)

    def start(**settings: Any) -> Lines:
        set_up_logging(Settings(**settings))
        [stream] = root.handlers
        assert isinstance(stream, logging.StreamHandler)
        text = io.StringIO()
        stream.setStream(text)
        return lambda: text.getvalue().splitlines()

    yield start
    for made in root.handlers:
        made.close()
    root.setLevel(before[0])
    root.handlers[:] = before[1]


@pytest.fixture
def types(no_handlers: None) -> None:
    @handler("echo")
    def echo(payload: object) -> object:
        logging.getLogger("mine").info("echo was here")
        return payload

    @handler("nasty", max_attempts=1)
    def nasty(payload: object) -> object:
        logging.getLogger("mine").error("said %s", NASTY)
        raise ValueError(NASTY)

    @handler("threads")
    def threads(payload: object, job: Job) -> None:
        gate.wait(10)
        logging.getLogger("mine").info("mine is %s", job.id)

    gate = threading.Barrier(3)
    assert HANDLERS.keys() == {"echo", "nasty", "threads"}


def work_off(queue: Queue, slots: int = 1) -> None:
    """Run all jobs that are due in a worker of this process, which ends then."""
    worker = Worker(queue, Settings(worker_concurrency=slots), burst=True)
    assert worker.run() == 0


def events(lines: Lines) -> dict[str, Any]:
    """The JSON lines by their event; of several the last."""
    return {line.get("event", line["message"]): line for line in map(json.loads, lines())}


# Jobs -----------------------------------------------------------------------------------------------------------------


def test_a_job_is_logged_when_it_starts_and_when_it_ends(queue: Queue, types: None, logged: Any) -> None:
    lines = logged(log_format="json", log_level="debug")
    job = queue.enqueue("echo", {"password": "hunter2"})
    work_off(queue)
    told = events(lines)
    about = {"job": job.id, "type": "echo", "queue": "default", "attempt": 1}
    worker = told["completed"]["worker"]
    assert worker
    for event, level in (("started", "debug"), ("completed", "info"), ("echo was here", "info")):
        assert told[event].items() >= {**about, "worker": worker, "level": level}.items()
    assert 0 <= told["completed"]["durationMs"] < 10_000
    assert "requestId" not in told["completed"]
    assert "hunter2" not in "".join(lines())


def test_a_job_that_starts_is_not_logged_at_info(queue: Queue, types: None, logged: Any) -> None:
    lines = logged()
    job = queue.enqueue("echo", 1)
    work_off(queue)
    assert [line for line in lines() if "started" in line] == []
    [ended] = [line for line in lines() if "completed" in line]
    assert re.search(rf" INFO completed echo {job.id} attempt 1/3 in \d+ ms$", ended)
    [own] = [line for line in lines() if "echo was here" in line]
    assert own.endswith(f" INFO echo was here job={job.id}")


def test_each_slot_logs_its_own_job(queue: Queue, types: None, logged: Any) -> None:
    lines = logged(log_format="json")
    jobs = {job.id for job in queue.enqueue_many("threads", range(3))}
    work_off(queue, slots=3)
    told = [line for line in map(json.loads, lines()) if line["message"].startswith("mine is ")]
    assert {line["job"] for line in told} == jobs
    assert all(line["message"] == f"mine is {line['job']}" for line in told)


def test_a_job_that_was_asked_to_stop_is_not_said_to_have_no_attempt_left(
    queue: Queue, types: None, logged: Any
) -> None:
    @handler("obedient")
    def obedient(payload: object, job: Job) -> None:
        queue.cancel(job.id)
        until(lambda: job.cancelled)
        raise RuntimeError("stopped")

    lines = logged()
    job = queue.enqueue("obedient", 1)
    work_off(queue)
    [ended] = [line for line in lines() if "RuntimeError" in line]
    assert f" WARNING failed obedient {job.id} attempt 1/3 in " in ended
    assert ended.endswith(" ms: RuntimeError: stopped; it was asked to stop")


@pytest.mark.parametrize("format", ["text", "json"])
def test_what_a_handler_raises_or_says_makes_no_second_line(
    queue: Queue, types: None, logged: Any, format: str
) -> None:
    lines = logged(log_format=format)
    queue.enqueue("nasty", 1)
    work_off(queue)
    assert len([line for line in lines() if "2026-01-01 00:00:00" in line]) == 2
    for line in lines():
        assert line.isprintable()
        assert (
            json.loads(line)["level"]
            if format == "json"
            else re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ", line)
        )
    assert not [line for line in lines() if line.startswith("2026-01-01 00:00:00,000")]


def test_a_traceback_is_indented(logged: Any) -> None:
    lines = logged()
    try:
        raise ValueError(NASTY)
    except ValueError:
        logging.getLogger("mine").exception("it broke")
    assert lines()[0].endswith("ERROR it broke")
    assert len(lines()) > 3
    assert all(line.startswith("    ") and line.isprintable() for line in lines()[1:])


def test_fields_take_the_place_of_nothing(logged: Any) -> None:
    lines = logged(log_format="json")
    logging.getLogger("mine").info("true", extra={"fields": {"level": "x", "message": "false", "time": 0, "more": {1}}})
    logging.getLogger("mine").info("other", extra={"fields": ["not ours"]})
    first, second = map(json.loads, lines())
    assert (first["level"], first["message"], first["more"]) == ("info", "true", "{1}")
    assert first["time"] > 0
    assert second["message"] == "other"


# Requests -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "level"),
    [
        ("GET", "/stats?token=tok123", "debug"),
        ("HEAD", "/health", "debug"),
        ("GET", "/nope?token=tok123", "info"),
        ("POST", "/jobs?token=tok123", "info"),
        ("PUT", "/jobs", "info"),
        ("GET", "/jobs/%0A2026-01-01%20INFO%20x%E2%80%A8", "info"),
        ("GET", "/\xff\x85", "info"),
        ("GET", "/" + "x" * 5000, "info"),
    ],
)
@pytest.mark.parametrize("format", ["text", "json"])
def test_a_request_is_logged_once(  # noqa: PLR0917
    api: Client, types: None, logged: Any, format: str, method: str, path: str, level: str
) -> None:
    lines = logged(log_format=format, log_level="debug")
    answer = api.call(method, path, headers={"X-Request-ID": "r-1"})
    [line] = [line for line in lines() if f"{method} /" in line]
    assert "tok123" not in line
    assert line.isprintable()
    assert len(line) < 700
    if format == "json":
        told = json.loads(line)
        assert told.items() >= {"level": level, "event": "request", "method": method, "requestId": "r-1"}.items()
        assert (told["status"], told["durationMs"] >= 0, " " in told["path"]) == (answer.status, True, False)
    else:
        assert re.search(rf" {level.upper()} {method} \S+ {answer.status} in \d+ ms requestId=r-1$", line)


def test_a_request_is_logged_with_the_name_of_its_key(queue: Queue, types: None, logged: Any) -> None:
    lines = logged(log_format="json")
    secret = "s" * 16
    api = Client(API(Settings(api_keys=f"ops:admin:{secret}"), queue), secret)
    job = api.post("/jobs", {"type": "echo", "payload": 1}).json["jobId"]
    assert events(lines)["request"].items() >= {"key": "ops", "path": "/jobs", "status": 201, "job": job}.items()
    assert secret not in "".join(lines())


@pytest.mark.parametrize("id", ["r-1", "!" * 128, "~"])
def test_a_request_id_comes_back(api: Client, id: str) -> None:
    for path in ("/health", "/stats", "/nope"):
        assert api.get(path, {"X-Request-ID": id}).headers["x-request-id"] == id


@pytest.mark.parametrize("id", ["", "a b", "x" * 129, "\xe9", "a\x7f", None])
def test_a_request_without_a_fit_id_gets_one_that_its_job_does_not_keep(
    queue: Queue, api: Client, types: None, id: str
) -> None:
    headers = {} if id is None else {"X-Request-ID": id}
    answers = [api.post("/jobs", {"type": "echo", "payload": 1}, headers) for _ in range(2)]
    made = {answer.headers["x-request-id"] for answer in answers}
    assert len(made) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", id) for id in made)
    assert "requestId" not in api.get(f"/jobs/{answers[0].json['jobId']}").json
    assert b"equest" not in raw(queue).get(queue.keys.job(answers[0].json["jobId"]))


# From web to worker ---------------------------------------------------------------------------------------------------


def test_one_search_follows_a_request_from_web_to_worker(queue: Queue, api: Client, types: None, logged: Any) -> None:
    lines = logged(log_format="json", log_level="debug")
    headers = {"X-Request-ID": "r-1", "traceparent": TRACE}
    job = api.post("/jobs", {"type": "echo", "payload": 1}, headers).json["jobId"]
    work_off(queue)
    told = events(lines)
    for event in ("request", "started", "echo was here", "completed"):
        assert told[event].items() >= {"requestId": "r-1", "traceparent": TRACE, "job": job}.items()
    shown = api.get(f"/jobs/{job}").json
    assert (shown["requestId"], shown["traceparent"]) == ("r-1", TRACE)


def test_the_jobs_of_a_batch_keep_the_id_of_their_request(api: Client, types: None) -> None:
    made = api.post("/jobs/batch", [{"type": "echo", "payload": n} for n in range(2)], {"X-Request-ID": "r-1"}).json[
        "jobs"
    ]
    assert [api.get(f"/jobs/{job['jobId']}").json["requestId"] for job in made] == ["r-1", "r-1"]


@pytest.mark.parametrize(
    "wrong",
    [
        TRACE.upper(),
        "ff" + TRACE[2:],
        TRACE[:-1],
        TRACE + "-",
        TRACE.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32),
        TRACE.replace("00f067aa0ba902b7", "0" * 16),
        "",
        "a\nb",
    ],
)
def test_a_wrong_traceparent_is_ignored(api: Client, types: None, wrong: str) -> None:
    answer = api.post("/jobs", {"type": "echo", "payload": 1}, {"traceparent": wrong})
    assert answer.status == 201
    assert "traceparent" not in api.get(f"/jobs/{answer.json['jobId']}").json


@pytest.mark.parametrize("field", ["requestId", "traceparent"])
def test_the_ids_of_a_request_cannot_be_set_in_its_body(api: Client, types: None, field: str) -> None:
    assert api.post("/jobs", {"type": "echo", "payload": 1, field: "x"}).kind == "invalid-job"


def test_a_retried_job_keeps_the_ids_of_its_request(queue: Queue, api: Client, types: None) -> None:
    job = api.post("/jobs", {"type": "nasty", "payload": 1}, {"X-Request-ID": "r-1"}).json["jobId"]
    work_off(queue)
    queue.retry(job)
    assert queue.get(job).request_id == "r-1"  # type: ignore[union-attr]


HANDLERS_PY = """
import logging
from tinyqueue import handler

@handler("echo")
def echo(payload: object) -> None:
    logging.info("here")
"""


def test_a_server_logs_both_ends_of_a_request(tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text(HANDLERS_PY)
    with running(tmp_path) as (address, log, _), Wire(address) as wire:
        wire.send(spell("POST", "/jobs", b'{"type":"echo","payload":1}', "X-Request-ID: r-17"))
        answer = wire.answer()
        assert (answer.status, answer.headers["x-request-id"]) == (201, "r-17")
        until(lambda: "completed echo" in log.read_text())
        said = [line for line in log.read_text().splitlines() if "r-17" in line]
    assert len(said) == 3, said
    assert all(f"{answer.json['jobId']}" in line for line in said)
