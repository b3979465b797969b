"""Log lines: one for each event, safe against forgery, with the ids that link requests to jobs."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import pytest
from client import Client, Wire, running, spell
from conftest import raw, until

from tinyqueue import HANDLERS, Discard, Job, Queue, handler
from tinyqueue_config import LogWriter, Settings, flush_log, set_up_logging
from worker import Worker
from wsgi import API

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
NASTY = "a\nb\r\x1b[31m\x00\x85\u2028\u202e2026-01-01 00:00:00,000 INFO completed"
Lines = Callable[[], list[str]]


@pytest.fixture
def logged(capfd: pytest.CaptureFixture[str]) -> Callable[..., Lines]:
    """Set up the log: logged(log_format="json") returns a function that returns the lines."""
    text = io.StringIO()

    def lines() -> list[str]:
        flush_log(10)
        text.write(capfd.readouterr().err)
        return text.getvalue().splitlines()

    def start(**settings: Any) -> Lines:
        set_up_logging(Settings(**settings))
        return lines

    return start


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


def run_jobs(queue: Queue, slots: int = 1) -> None:
    """Run all due jobs in a worker of this process."""
    worker = Worker(queue, Settings(worker_concurrency=slots), burst=True)
    assert worker.run() == 0


def events(lines: Lines) -> dict[str, Any]:
    """Map each event to its last JSON line."""
    return {line.get("event", line["message"]): line for line in map(json.loads, lines())}


# Jobs -----------------------------------------------------------------------------------------------------------------


def test_log_the_start_and_the_end_of_a_job(queue: Queue, types: None, logged: Any) -> None:
    lines = logged(log_format="json", log_level="debug")
    job = queue.enqueue("echo", {"password": "hunter2"})
    run_jobs(queue)
    found = events(lines)
    expected = {"job": job.id, "type": "echo", "queue": "default", "attempt": 1}
    worker = found["completed"]["worker"]
    assert worker
    for event, level in (("started", "debug"), ("completed", "info"), ("echo was here", "info")):
        assert found[event].items() >= {**expected, "worker": worker, "level": level}.items()
    assert 0 <= found["completed"]["durationMs"] < 10_000
    assert "requestId" not in found["completed"]
    assert "hunter2" not in "".join(lines())


def test_log_no_start_of_a_job_at_level_info(queue: Queue, types: None, logged: Any) -> None:
    lines = logged()
    job = queue.enqueue("echo", 1)
    run_jobs(queue)
    assert [line for line in lines() if "started" in line] == []
    [outcome] = [line for line in lines() if "completed" in line]
    assert re.search(rf" INFO job {job.id} \(echo\) completed in \d+ ms, attempt 1/3$", outcome)
    [from_handler] = [line for line in lines() if "echo was here" in line]
    assert from_handler.endswith(f" INFO echo was here job={job.id}")


def test_log_in_several_slots_names_the_job_of_each(queue: Queue, types: None, logged: Any) -> None:
    lines = logged(log_format="json")
    jobs = {job.id for job in queue.enqueue_many("threads", range(3))}
    run_jobs(queue, slots=3)
    found = [line for line in map(json.loads, lines()) if line["message"].startswith("mine is ")]
    assert {line["job"] for line in found} == jobs
    assert all(line["message"] == f"mine is {line['job']}" for line in found)


def test_log_of_a_cancelled_running_job_says_so(queue: Queue, types: None, logged: Any) -> None:
    @handler("stops")
    def stops(payload: object, job: Job) -> None:
        queue.cancel(job.id)
        until(lambda: job.cancelled)
        raise RuntimeError("stopped")

    lines = logged()
    job = queue.enqueue("stops", 1)
    run_jobs(queue)
    [outcome] = [line for line in lines() if "RuntimeError" in line]
    assert f" WARNING job {job.id} (stops) failed in " in outcome
    assert outcome.endswith(" ms, attempt 1/3: RuntimeError: stopped; cancelled, as requested")


@pytest.mark.parametrize(
    ("error", "next_step"),
    [(Discard("pointless"), "it will not be retried"), (ValueError("broken"), "no attempts left")],
    ids=["discard", "last attempt"],
)
def test_log_of_a_final_failure_says_why_no_attempt_follows(
    queue: Queue, types: None, logged: Any, error: Exception, next_step: str
) -> None:
    @handler("gives-up", max_attempts=1)
    def gives_up(payload: object) -> None:
        raise error

    lines = logged()
    queue.enqueue("gives-up", 1)
    run_jobs(queue)
    [outcome] = [line for line in lines() if f"{error}; " in line]
    assert outcome.endswith(f"{error}; {next_step}")


@pytest.mark.parametrize("format", ["text", "json"])
def test_log_of_nasty_text_stays_on_one_line(queue: Queue, types: None, logged: Any, format: str) -> None:
    lines = logged(log_format=format)
    queue.enqueue("nasty", 1)
    run_jobs(queue)
    assert len([line for line in lines() if "2026-01-01 00:00:00" in line]) == 2
    for line in lines():
        assert line.isprintable()
        assert (
            json.loads(line)["level"]
            if format == "json"
            else re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}Z [A-Z]+ ", line)
        )
    assert not [line for line in lines() if line.startswith("2026-01-01 00:00:00,000")]


def test_log_of_a_traceback_is_indented(logged: Any) -> None:
    lines = logged()
    try:
        raise ValueError(NASTY)
    except ValueError:
        logging.getLogger("mine").exception("it broke")
    assert lines()[0].endswith("ERROR it broke")
    assert len(lines()) > 3
    assert all(line.startswith("    ") and line.isprintable() for line in lines()[1:])


def test_log_fields_replace_no_standard_member(logged: Any) -> None:
    lines = logged(log_format="json")
    logging.getLogger("mine").info("true", extra={"fields": {"level": "x", "message": "false", "time": 0, "more": {1}}})
    logging.getLogger("mine").info("other", extra={"fields": ["not ours"]})
    first, second = map(json.loads, lines())
    assert (first["level"], first["message"], first["more"]) == ("info", "true", "{1}")
    assert first["time"] > 0
    assert second["message"] == "other"


class TextRaises:
    def __str__(self) -> str:
        raise ZeroDivisionError("text")


FAULTY: dict[str, tuple[Any, ...]] = {
    "too few values": ("%s and %s", NASTY),
    "wrong kind of value": ("%d", NASTY),
    "value that raises": ("%s", TextRaises()),
    "message that raises": (TextRaises(),),
}


@pytest.mark.parametrize("format", ["text", "json"])
@pytest.mark.parametrize("kind", FAULTY)
def test_log_of_a_faulty_call_is_one_line_that_names_the_place(logged: Any, format: str, kind: str) -> None:
    lines = logged(log_format=format)
    logging.getLogger("mine").info(*FAULTY[kind])
    [line] = lines()
    assert line.isprintable()
    text = f"cannot format a log line from {__file__}:"
    assert json.loads(line)["message"].startswith(text) if format == "json" else f"Z ERROR {text}" in line


FIELDS: dict[str, Any] = {
    "NaN": float("nan"),
    "infinities": [float("inf"), {"deep": (-float("inf"),)}],
    "lone surrogate": "\ud800",
    "other keys": {1: 2, None: 3, "\udfff": 4},
    "object": object(),
    "object that raises": TextRaises(),
    "long number": 10**5000,
    "nested": [[]],
}
FIELDS["nested"][0].append(FIELDS["nested"])


@pytest.mark.parametrize("kind", FIELDS)
def test_log_of_any_field_is_strict_json(logged: Any, kind: str) -> None:
    lines = logged(log_format="json")
    logging.getLogger("mine").info("said", extra={"fields": {"field": FIELDS[kind], "\ud800": 1}})
    [line] = lines()
    assert msgspec.json.decode(line)["level"] in ("info", "error")  # msgspec takes strict JSON only


def test_log_of_nan_in_a_field_is_null(logged: Any) -> None:
    lines = logged(log_format="json")
    logging.getLogger("mine").info("said", extra={"fields": {"field": [float("nan"), 1.5, True]}})
    assert json.loads(lines()[0])["field"] == [None, 1.5, True]


def test_log_of_a_time_as_text_is_utc_in_any_zone(logged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = logged()
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    try:
        before = datetime.now(UTC)
        logging.getLogger("mine").info("now")
        at = datetime.fromisoformat(lines()[0].partition(" INFO")[0])
        assert abs(at - before) < timedelta(seconds=60)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_log_of_a_warning_of_python_is_one_line(logged: Any) -> None:
    lines = logged()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old\nnews", UserWarning, stacklevel=1)
    [line] = lines()
    assert "Z WARNING " in line
    assert "UserWarning: old\\nnews" in line


# A reader that stalls -------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> Iterator[tuple[BinaryIO, int]]:
    """The two ends of a pipe. What is written to it waits until it is read."""
    reader, writer = os.pipe()
    with open(reader, "rb") as file:
        yield file, writer


def test_put_lines_while_nobody_reads_drops_and_counts_them(pipe: tuple[BinaryIO, int]) -> None:
    reader, file = pipe
    writer = LogWriter(file, lambda count: b"dropped %d\n" % count)
    line = b"x" * 999 + b"\n"
    for _ in range(6000):
        writer.put(line)
    assert writer.dropped > 1000
    read: Counter[bytes] = Counter()
    while read[line] + sum(int(report.split()[1]) for report in read if report != line) < 6000:
        read[reader.readline()] += 1
    writer.put(b"last\n")
    assert reader.readline() == b"last\n"
    assert read[line] < 5000


def test_put_lines_in_a_forked_process_writes_them(pipe: tuple[BinaryIO, int]) -> None:
    reader, file = pipe
    writer = LogWriter(file, lambda count: b"")
    with writer.lock:  # as if another thread held it at the fork
        if (child := os.fork()) == 0:
            writer.put(b"child\n")
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    writer.put(b"parent\n")
    assert [reader.readline(), reader.readline()] == [b"child\n", b"parent\n"]


def test_put_lines_whose_reader_is_gone_raises_nothing(pipe: tuple[BinaryIO, int]) -> None:
    reader, file = pipe
    writer = LogWriter(file, lambda count: b"")
    reader.close()
    writer.put(b"lost\n")
    writer.flush(10)
    assert writer.unread == 0


# Requests -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "level"),
    [
        ("GET", "/queues?token=tok123", "debug"),
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
def test_log_a_request_once(  # noqa: PLR0917
    api: Client, types: None, logged: Any, format: str, method: str, path: str, level: str
) -> None:
    lines = logged(log_format=format, log_level="debug")
    answer = api.call(method, path, headers={"X-Request-ID": "r-1"})
    [line] = [line for line in lines() if f"{method} /" in line]
    assert "tok123" not in line
    assert line.isprintable()
    assert len(line) < 700
    if format == "json":
        fields = json.loads(line)
        assert fields.items() >= {"level": level, "event": "request", "method": method, "requestId": "r-1"}.items()
        assert (fields["status"], fields["durationMs"] >= 0, " " in fields["path"]) == (answer.status, True, False)
    else:
        assert re.search(rf" {level.upper()} {method} \S+ {answer.status} in \d+ ms requestId=r-1$", line)


def test_log_a_request_with_the_name_of_its_key(queue: Queue, types: None, logged: Any) -> None:
    lines = logged(log_format="json")
    secret = "s" * 16
    api = Client(API(Settings(api_keys=f"ops:admin:{secret}"), queue), secret)
    job = api.post("/jobs", {"type": "echo", "payload": 1}).json["jobId"]
    assert events(lines)["request"].items() >= {"key": "ops", "path": "/jobs", "status": 201, "job": job}.items()
    assert secret not in "".join(lines())


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        ({"type": "nope", "payload": 1}, "unknown-type type"),
        ({"type": "echo", "payload": 1, "queue": "secret secret"}, "invalid-job queue"),
    ],
)
def test_log_the_reason_of_a_refusal_without_its_values(
    api: Client, types: None, logged: Any, job: Any, reason: str
) -> None:
    lines = logged(log_format="json")
    api.post("/jobs", job)
    assert (events(lines)["request"]["status"], events(lines)["request"]["reason"]) == (422, reason)
    assert events(lines)["request"]["message"].endswith(f" ms: {reason}")
    assert "secret" not in "".join(lines())


@pytest.mark.parametrize("id", ["r-1", "!" * 128, "~"])
def test_return_the_request_id_of_a_request(api: Client, id: str) -> None:
    for path in ("/health", "/stats", "/nope"):
        assert api.get(path, {"X-Request-ID": id}).headers["x-request-id"] == id


@pytest.mark.parametrize("id", ["", "a b", "x" * 129, "\xe9", "a\x7f", None])
def test_make_a_request_id_that_the_job_does_not_store(queue: Queue, api: Client, types: None, id: str) -> None:
    headers = {} if id is None else {"X-Request-ID": id}
    answers = [api.post("/jobs", {"type": "echo", "payload": 1}, headers) for _ in range(2)]
    made = {answer.headers["x-request-id"] for answer in answers}
    assert len(made) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", id) for id in made)
    assert "requestId" not in api.get(f"/jobs/{answers[0].json['jobId']}").json
    assert b"equest" not in raw(queue).get(queue.keys.job(answers[0].json["jobId"]))


# From web to worker ---------------------------------------------------------------------------------------------------


def test_log_the_request_id_in_web_and_worker(queue: Queue, api: Client, types: None, logged: Any) -> None:
    lines = logged(log_format="json", log_level="debug")
    headers = {"X-Request-ID": "r-1", "traceparent": TRACE}
    job = api.post("/jobs", {"type": "echo", "payload": 1}, headers).json["jobId"]
    run_jobs(queue)
    found = events(lines)
    for event in ("request", "started", "echo was here", "completed"):
        assert found[event].items() >= {"requestId": "r-1", "traceparent": TRACE, "job": job}.items()
    shown = api.get(f"/jobs/{job}").json
    assert (shown["requestId"], shown["traceparent"]) == ("r-1", TRACE)


def test_store_the_request_id_in_each_job_of_a_batch(api: Client, types: None) -> None:
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
def test_ignore_an_invalid_traceparent(api: Client, types: None, wrong: str) -> None:
    answer = api.post("/jobs", {"type": "echo", "payload": 1}, {"traceparent": wrong})
    assert answer.status == 201
    assert "traceparent" not in api.get(f"/jobs/{answer.json['jobId']}").json


@pytest.mark.parametrize("field", ["requestId", "traceparent"])
def test_refuse_request_ids_in_the_body(api: Client, types: None, field: str) -> None:
    assert api.post("/jobs", {"type": "echo", "payload": 1, field: "x"}).kind == "invalid-job"


def test_retry_keeps_the_request_id_of_a_job(queue: Queue, api: Client, types: None) -> None:
    job = api.post("/jobs", {"type": "nasty", "payload": 1}, {"X-Request-ID": "r-1"}).json["jobId"]
    run_jobs(queue)
    queue.retry(job)
    assert queue.get(job).request_id == "r-1"  # type: ignore[union-attr]


HANDLERS_PY = """
import logging
from tinyqueue import handler

@handler("echo")
def echo(payload: object) -> None:
    logging.info("here")
"""


def test_log_a_request_and_its_job_in_a_real_server(tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text(HANDLERS_PY)
    with running(tmp_path) as (address, log, _), Wire(address) as wire:
        wire.send(spell("POST", "/jobs", b'{"type":"echo","payload":1}', "X-Request-ID: r-17"))
        answer = wire.answer()
        assert (answer.status, answer.headers["x-request-id"]) == (201, "r-17")
        until(lambda: "(echo) completed" in log.read_text())
        found = [line for line in log.read_text().splitlines() if "r-17" in line]
    assert len(found) == 3, found
    assert all(answer.json["jobId"] in line for line in found)
