"""The log of a job: what is kept, how it is read while the job runs, and when it is deleted."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import signal
import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import msgspec
import pytest
from client import Client
from conftest import NoBar, Server, lapse, put, raw, until
from cutproxy import CutProxy
from test_processes import folder, run  # noqa: F401  fixtures
from test_worker import Running, gates, until_ended, work  # noqa: F401  fixtures

import tinyqueue
import worker
from tinyqueue import Failure, Filter, Job, Outcome, Queue, Reaped, handler
from tinyqueue_backup import back_up, restore
from tinyqueue_config import Settings
from tinyqueue_log import JOB_LOG, LEVEL, LINE, LOG_BYTES, Capture, JobLog, LogLine
from tinyqueue_shards import Shards

DEFAULT = ["default"]
BOOM = Failure("Boom", "it broke")
log = logging.getLogger("app")

pytestmark = pytest.mark.usefixtures("no_handlers")


@pytest.fixture(autouse=True)
def types(no_handlers: None) -> None:
    @handler("echo", logs=True)
    def echo(payload: Any, job: Job) -> None: ...


def start(queue: Queue, id: str = "") -> Job:
    """Start a job as a new worker that keeps logs."""
    queue.keeps_logs = True
    queue.clock.ahead += 1_000_000
    queue.promote()
    [job] = queue.dequeue(queue.register(DEFAULT, 1), DEFAULT)
    assert id in ("", job.id)
    sizes = job.__dict__.get("_log_sizes") if job.logged else ()
    job.__dict__["_log"] = JobLog(job.attempts, job.started_at, sizes)
    return job


def begun(queue: Queue, *lines: str, **options: Any) -> Job:
    """Start a new job that has logged some lines, which are not written yet."""
    queue.enqueue("echo", 1, **options)
    job = start(queue)
    for line in lines:
        job.log(line)
    return job


def texts(queue: Any, job: Job, after: int = 0) -> list[str]:
    return [line.text for line in queue.read_log(job.id, after)[1]]


def log_key(queue: Queue, job: Job) -> tuple[bool, int]:
    """Whether the log exists, and its time to live in milliseconds."""
    left = raw(queue).pttl(queue.keys.log(job.id))
    return left != -2, left


# Writing --------------------------------------------------------------------------------------------------------------


def test_write_log_while_the_job_runs(queue: Queue) -> None:
    job = begun(queue, "one", "two")
    queue.write_log(job)
    assert texts(queue, job) == ["one", "two"]
    assert queue.get(job.id).logged
    job.log("three")
    queue.write_log(job)
    queue.write_log(job)
    assert texts(queue, job) == ["one", "two", "three"]
    assert log_key(queue, job) == (True, -1)


def test_log_joins_values_as_print_does(queue: Queue) -> None:
    job = begun(queue)
    job.log("row", 17, None, "a\nb")
    queue.write_log(job)
    assert texts(queue, job) == ["row 17 None a\nb"]


def test_write_log_changes_the_record_only_once(queue: Queue) -> None:
    job = begun(queue, "one")
    queue.write_log(job)
    queue.clock.ahead += 1000
    before = raw(queue).get(queue.keys.job(job.id))
    job.log("two")
    queue.write_log(job)
    assert raw(queue).get(queue.keys.job(job.id)) == before


def test_write_log_keeps_a_request_to_stop(queue: Queue) -> None:
    job = begun(queue, "one")
    queue.cancel(job.id)
    queue.write_log(job)
    assert queue.get(job.id).cancelled
    assert job.cancelled


def test_write_progress_keeps_the_mark_of_the_log(queue: Queue) -> None:
    job = begun(queue, "one")
    queue.write_log(job)
    queue.write_progress(job)
    assert queue.get(job.id).logged


ENDS: dict[str, Callable[[Queue, Job], Any]] = {
    "complete": lambda queue, job: queue.complete(job),
    "fail": lambda queue, job: queue.fail(job, BOOM),
    "fail with a retry": lambda queue, job: queue.fail(job, BOOM, 60),
    "release": lambda queue, job: queue.release(job),
    "cancel": lambda queue, job: (queue.cancel(job.id), queue.fail(job, BOOM)),
    "exchange": lambda queue, job: queue.exchange(job.worker, [Outcome(job, "complete")], DEFAULT, 1, {job.id: job}),
}


@pytest.mark.parametrize("written", [True, False], ids=["written before", "not written before"])
@pytest.mark.parametrize("end", ENDS)
def test_end_of_an_attempt_writes_the_rest(queue: Queue, end: str, written: bool) -> None:
    job = begun(queue, "one")
    if written:
        queue.write_log(job)
    job.log("two")
    ENDS[end](queue, job)
    now, lines = queue.read_log(job.id)
    assert [line.text for line in lines] == ["one", "two"]
    ends = now.status in tinyqueue.ENDED
    exists, left = log_key(queue, job)
    assert exists
    assert (0 < left <= queue.keep_ms[now.status]) if ends else (left == -1)
    if ends:
        assert abs(left - raw(queue).pttl(queue.keys.job(job.id))) <= 1000


def test_end_of_a_job_that_logged_nothing_leaves_no_log(queue: Queue) -> None:
    job = begun(queue)
    queue.complete(job)
    assert not queue.get(job.id).logged
    assert not log_key(queue, job)[0]


def test_reap_keeps_what_was_written(queue: Queue) -> None:
    job = begun(queue, "one")
    queue.write_log(job)
    job.log("lost")
    lapse(queue, job.worker)
    queue.reap(job.worker)
    assert texts(queue, job) == ["one"]
    with pytest.raises(Reaped):
        queue.write_log(job)
    assert texts(queue, job) == ["one"]


def test_write_log_after_the_end_writes_nothing(queue: Queue) -> None:
    job = begun(queue, "one")
    queue.complete(job)
    job.log("too late")
    with pytest.raises(Reaped):
        queue.write_log(job)
    assert texts(queue, job) == ["one"]


def test_next_attempt_adds_to_the_log(queue: Queue) -> None:
    job = begun(queue, "first")
    queue.fail(job, BOOM, 0)
    again = start(queue, job.id)
    again.log("second")
    queue.complete(again)
    lines = queue.read_log(job.id)[1]
    assert [(line.attempt, line.text) for line in lines] == [(1, "first"), (2, "second")]
    assert lines[0].number < lines[1].number


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_retry_keeps_the_log(queue: Queue, status: str) -> None:
    job = begun(queue, "one")
    if status == "cancelled":
        queue.cancel(job.id)
    queue.fail(job, BOOM)
    queue.retry(job.id)
    assert log_key(queue, job) == (True, -1)
    again = start(queue, job.id)
    again.log("two")
    queue.complete(again)
    assert texts(queue, job) == ["one", "two"]


def test_lost_reply_to_a_write_of_lines_adds_none_twice(far: Queue, near: Queue, proxy: CutProxy) -> None:
    job = begun(near, "one")
    far.write_log(job)
    job.log("two")
    proxy.drop_reply(b"RPUSH")
    far.write_log(job)
    job.log("three")
    far.complete(job)
    assert texts(near, job) == ["one", "two", "three"]
    assert raw(near).llen(near.keys.log(job.id)) == 3


def test_earlier_lines_that_could_not_be_measured_are_replaced(queue: Queue) -> None:
    job = begun(queue, "first")
    queue.fail(job, BOOM, 0)
    again = start(queue, job.id)
    again.__dict__["_log"] = JobLog(2, again.started_at, None)
    again.log("second")
    queue.write_log(again)
    again.log("third")
    queue.complete(again)
    assert texts(queue, job) == ["second", "third"]


# Bounds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7], ids=["at once", "in steps"])
def test_log_drops_the_oldest_lines(queue: Queue, steps: int) -> None:
    job = begun(queue)
    for step in range(steps):
        for n in range(1000):
            job.log(f"{step}-{n} " + "x" * 100)
        queue.write_log(job)
    queue.complete(job)
    stored = raw(queue).lrange(queue.keys.log(job.id), 0, -1)
    assert LOG_BYTES - 200 < sum(map(len, stored)) <= LOG_BYTES
    found = [text.split()[0] for text in texts(queue, job)]
    last = [f"{step}-{n}" for step in range(steps) for n in range(1000)]
    assert found == last[-len(found) :]


def test_log_of_several_attempts_drops_the_oldest_lines(queue: Queue) -> None:
    job = begun(queue, *("a" * 100 for _ in range(500)))
    queue.fail(job, BOOM, 0)
    again = start(queue, job.id)
    for _ in range(500):
        again.log("b" * 100)
    queue.complete(again)
    assert sum(map(len, raw(queue).lrange(queue.keys.log(job.id), 0, -1))) <= LOG_BYTES
    found = "".join(text[0] for text in texts(queue, job))
    assert found.strip("a") == "b" * 500
    assert "a" in found


def test_line_is_cut(queue: Queue) -> None:
    job = begun(queue, "x" * 100_000, "\x00" * 100_000, "\ud800")
    queue.write_log(job)
    assert texts(queue, job) == ["x" * LINE, "\x00" * LINE, "\\ud800"]


def test_numbers_of_lines_rise_in_every_thread() -> None:
    kept = JobLog(1, 1_000)
    threads = [threading.Thread(target=lambda: [kept.add("INFO", "x") for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = [number for number, _ in kept.unwritten()]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 800
    assert all(number >= 1_000_000 for number in numbers)


# Deleting -------------------------------------------------------------------------------------------------------------


def test_purge_deletes_the_logs(queue: Queue) -> None:
    jobs = [begun(queue, "one") for _ in range(2)]
    for job in jobs:
        queue.complete(job)
    assert queue.purge(Filter("completed"))["purged"] == 2
    assert not any(log_key(queue, job)[0] for job in jobs)


def test_purge_of_one_deletes_its_log(queue: Queue) -> None:
    job = begun(queue, "one")
    queue.fail(job, BOOM)
    assert queue.purge_one(job.id)
    assert not log_key(queue, job)[0]


def test_trim_above_the_bound_deletes_the_logs(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [begun(queue, "one") for _ in range(3)]
    for job in jobs:
        queue.complete(job)
        queue.clock.ahead += 1000
    monkeypatch.setattr(tinyqueue, "KEPT", 1)
    assert queue.trim() == 2
    assert [log_key(queue, job)[0] for job in jobs] == [False, False, True]


def test_purge_of_jobs_without_a_log_deletes_nothing_else(near: Queue) -> None:
    put(near, "completed")
    with raw(near).monitor() as monitor:
        near.purge(Filter("completed"))
        commands = []
        while not commands or "DEL" not in commands[-1]:
            commands.append(monitor.next_command()["command"])
    assert ":log:" not in commands[-1]


def test_backup_leaves_logs_out(server: Server, tmp_path: Any) -> None:
    queue = server.queue()
    job = begun(queue, "one")
    queue.fail(job, BOOM)
    back_up(queue, str(tmp_path / "backup"), NoBar())
    raw(queue).flushall()
    restore(queue, str(tmp_path / "backup"), NoBar())
    assert queue.read_log(job.id)[1] == []
    queue.retry(job.id)
    for name in DEFAULT:
        queue.resume(name)
    again = start(queue, job.id)
    again.log("two")
    queue.complete(again)
    assert texts(queue, job) == ["two"]


# Reading --------------------------------------------------------------------------------------------------------------


def test_show_log_of_a_running_job_step_by_step(api: Client, queue: Queue) -> None:
    job = begun(queue, "one")
    queue.write_log(job)
    first = api.get(f"/jobs/{job.id}/log").json
    [line] = first["lines"]
    assert (first["status"], first["after"]) == ("processing", line["number"])
    assert line.keys() == {"number", "at", "attempt", "level", "text"}
    assert (line["attempt"], line["level"], line["text"]) == (1, "INFO", "one")
    assert job.started_at <= line["at"] == line["number"] // 1000
    again = api.get(f"/jobs/{job.id}/log?after={first['after']}").json
    assert again == {"lines": [], "after": first["after"], "status": "processing"}
    job.log("two")
    queue.complete(job)
    last = api.get(f"/jobs/{job.id}/log?after={first['after']}").json
    assert ([line["text"] for line in last["lines"]], last["status"]) == (["two"], "completed")


def test_show_log_of_a_job_without_one(api: Client, queue: Queue) -> None:
    answer = api.get(f"/jobs/{put(queue, 'pending').id}/log")
    assert (answer.status, answer.json) == (200, {"lines": [], "after": 0, "status": "pending"})


def test_show_log_of_an_unknown_job(api: Client) -> None:
    assert api.get("/jobs/01a2155f-3143-7000-b0c9-28342567d0c6/log").status == 404


@pytest.mark.parametrize("after", ["-1", "x", "1.5"])
def test_show_log_refuses_an_invalid_number(api: Client, queue: Queue, after: str) -> None:
    answer = api.get(f"/jobs/{put(queue, 'pending').id}/log?after={after}")
    assert (answer.status, answer.problem["field"]) == (400, "after")


def test_read_log_leaves_out_lines_that_cannot_be_read(server: Server) -> None:
    queue = server.queue()
    job = begun(queue, "one")
    queue.write_log(job)
    newer = msgspec.json.encode([9**16, 1, "INFO", "newer", "more"])  # a later version may add to lines
    raw(queue).rpush(queue.keys.log(job.id), b"broken", b'{"a":1}', b"\xff", newer)
    assert texts(queue, job) == ["one", "newer"]


def test_read_log_of_a_shard(near: Queue) -> None:
    shards = Shards([near, Queue(near.pool, namespace="other")])
    job = shards.enqueue("echo", 1)
    own = shards.part_of(job.id)
    [started] = own.dequeue(own.register(DEFAULT, 1), DEFAULT)
    started.__dict__["_log"] = JobLog(1, started.started_at)
    started.log("one")
    shards.write_log(started)
    own.complete(started)
    assert texts(shards, job) == ["one"]
    assert shards.purge(Filter("completed"))["purged"] == 1
    assert not log_key(own, job)[0]


# In a worker ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LOG_EVERY", 0.05)


def test_worker_keeps_what_a_handler_logs(queue: Queue, work: Any) -> None:  # noqa: F811
    @handler("chatty", logs=True)
    def chatty(payload: Any, job: Job) -> None:
        job.log("hello", payload)
        log.warning("row %d", 17)
        try:
            raise ValueError("no")
        except ValueError:
            log.exception("it broke")

    job = queue.enqueue("chatty", "you")
    work(queue)
    until_ended(queue, job)
    lines = queue.read_log(job.id)[1]
    assert [line.level for line in lines] == ["INFO", "WARNING", "ERROR"]
    hello, row, broke = (line.text for line in lines)
    assert (hello, row) == ("hello you", "row 17")
    assert broke.startswith("it broke\nTraceback (most recent call last):\n")
    assert broke.endswith("ValueError: no")


def test_record_that_cannot_be_formatted_leaves_a_line() -> None:
    kept = JobLog(1, 1)
    record = logging.LogRecord("app", logging.ERROR, "app.py", 7, "%d", ("x",), None)
    context = copy_context()
    context.run(JOB_LOG.set, kept)
    context.run(Capture().handle, record)
    [(_, line)] = kept.unwritten()
    assert msgspec.json.decode(line)[2:] == ["ERROR", "cannot format a log line from app.py:7: TypeError"]


def test_worker_shows_lines_while_the_job_runs(queue: Queue, work: Any, gates: Any, fast: None) -> None:  # noqa: F811
    gate = threading.Event()

    @handler("slow", logs=True)
    def slow(payload: Any, job: Job) -> None:
        job.log("one")
        gate.wait(20)
        job.log("two")

    job = queue.enqueue("slow", 1)
    work(queue)
    until(lambda: texts(queue, job) == ["one"])
    assert queue.get(job.id).status == "processing"
    gate.set()
    until_ended(queue, job)
    assert texts(queue, job) == ["one", "two"]


def test_worker_keeps_the_lines_of_each_job_apart(queue: Queue, work: Any) -> None:  # noqa: F811
    @handler("chatty", logs=True)
    def chatty(payload: int, job: Job) -> None:
        for _ in range(20):
            log.warning("%d", payload)

    jobs = queue.enqueue_many("chatty", range(10))
    work(queue, slots=4)
    for job in jobs:
        until_ended(queue, job)
        assert texts(queue, job) == [str(job.payload)] * 20


@pytest.mark.parametrize("kept", [True, False])
def test_setting_keeps_the_logs_of_all_handlers(queue: Queue, monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    @handler("plain")
    def plain(payload: Any, job: Job) -> None:
        job.log("one")
        log.warning("two")

    job = queue.enqueue("plain", 1)
    settings = msgspec.structs.replace(Settings(), job_logs=kept)
    running = worker.Worker(queue, settings, burst=True)
    assert running.run() == 0
    until_ended(queue, job)
    assert texts(queue, job) == (["one", "two"] if kept else [])
    assert queue.get(job.id).logged is kept


def test_workers_of_one_process_keep_each_line_once(queue: Queue, work: Any) -> None:  # noqa: F811
    before = logging.getLogger().handlers[:]
    waiting = threading.Barrier(2)

    @handler("chatty", logs=True)
    def chatty(payload: Any, job: Job) -> None:
        waiting.wait(20)
        log.warning("one")

    jobs = queue.enqueue_many("chatty", range(2))
    workers = [work(queue, slots=1) for _ in range(2)]
    for job in jobs:
        until_ended(queue, job)
        assert texts(queue, job) == ["one"]
    for running in workers:
        running.end("drain")
    assert logging.getLogger().handlers == before


@pytest.mark.parametrize(
    "configure",
    [
        lambda: logging.basicConfig(force=True),
        lambda: logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "root": {"handlers": []}}),
    ],
)
def test_lines_are_kept_after_a_handler_has_configured_logging(
    queue: Queue,
    work: Any,  # noqa: F811
    fast: None,
    configure: Callable[[], None],
) -> None:
    handlers = logging.getLogger().handlers[:]

    @handler("configures", logs=True)
    def configures(payload: Any, job: Job) -> None:
        configure()

        def log_again() -> list[str]:
            log.warning("later")
            return texts(queue, job)

        until(log_again)

    @handler("chatty", logs=True)
    def chatty(payload: Any, job: Job) -> None:
        log.warning("one")

    work(queue, slots=1)
    try:
        for type, line in {"configures": "later", "chatty": "one"}.items():
            job = queue.enqueue(type, 1)
            until_ended(queue, job)
            assert texts(queue, job)[0] == line
    finally:
        logging.getLogger().handlers[:] = handlers


def test_forked_process_adds_no_lines_and_does_not_wait_for_the_lock() -> None:
    kept = JobLog(1, 1)
    halt = threading.Event()

    def read() -> None:
        while not halt.is_set():
            kept.unwritten()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(50):  # at some of these forks the reader holds the lock
            if (child := os.fork()) == 0:
                kept.add("INFO", "in the child")
                os._exit(0)
            try:
                until(lambda child=child: os.waitpid(child, os.WNOHANG)[0], 5)  # type: ignore[misc]
            except AssertionError:
                os.kill(child, signal.SIGKILL)
                raise
    finally:
        halt.set()
        reader.join()
    assert kept.unwritten() == []


def test_name_of_a_level_that_is_not_unicode_or_long_fails_no_attempt(queue: Queue) -> None:
    job = begun(queue)
    kept = job.__dict__["_log"]
    kept.add("L\ud800", "one")
    kept.add("L" * LOG_BYTES, "two")
    queue.write_log(job)
    assert [(line.level, line.text) for line in queue.read_log(job.id)[1]] == [
        ("L\\ud800", "one"),
        ("L" * LEVEL, "two"),
    ]


def test_thread_that_is_given_up_logs_no_more(
    queue: Queue,
    work: Any,  # noqa: F811
    gates: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    fast: None,
) -> None:
    monkeypatch.setattr("tinyqueue_slot.GRACE", 0.1)
    go_on = threading.Event()
    gone_on = threading.Event()

    @handler("stuck", timeout=0.05, max_attempts=1, logs=True)
    def stuck(payload: Any, job: Job) -> None:
        job.log("before")
        while not go_on.is_set():
            try:
                go_on.wait(20)
            except tinyqueue.TimedOut:
                continue
        job.log("after")
        gone_on.set()

    job = queue.enqueue("stuck", 1)
    work(queue)
    assert until_ended(queue, job).status == "failed"
    go_on.set()
    gone_on.wait(20)
    assert texts(queue, job) == ["before"]


def test_worker_that_keeps_no_logs_sends_no_command_for_them(near: Queue, work: Any) -> None:  # noqa: F811
    @handler("plain")
    def plain(payload: Any, job: Job) -> None:
        job.log("one")

    job = near.enqueue("plain", 1)
    work(near)
    until_ended(near, job)
    assert not raw(near).keys("*:log:*")
    assert json.loads(raw(near).get(near.keys.job(job.id))).keys() >= {"worker"}
    assert not near.get(job.id).logged


# The command line -----------------------------------------------------------------------------------------------------


def test_command_line_shows_the_log(near: Queue, run: Any) -> None:  # noqa: F811
    job = begun(near, "one", "two\x1b")
    near.complete(job)
    shown = run("log", job.id).stdout.decode().splitlines()
    assert [line.split(None, 2)[2] for line in shown] == ["1  INFO     one", "1  INFO     two\\x1b"]
    lines = [json.loads(line) for line in run("log", job.id, "--json").stdout.splitlines()]
    assert [line["text"] for line in lines] == ["one", "two\x1b"]
    assert run("log", "01a2155f-3143-7000-b0c9-28342567d0c6").returncode == 1
    silent = run("log", put(near, "pending").id)
    assert (silent.returncode, silent.stdout) == (0, b"")
    assert b"has no log; only handlers with logs=True keep one" in silent.stderr


def test_command_line_follows_the_log_until_the_job_ends(near: Queue, run: Any) -> None:  # noqa: F811
    job = begun(near, "one")
    near.write_log(job)

    def end() -> None:
        job.log("two")
        near.complete(job)

    threading.Timer(1.5, end).start()
    assert [line.split()[-1] for line in run("log", "--follow", job.id).stdout.decode().splitlines()] == ["one", "two"]


def test_stored_line_is_an_array() -> None:
    kept = JobLog(3, 1)
    kept.add("INFO", "ü")
    [(number, line)] = kept.unwritten()
    assert msgspec.json.decode(line) == [number, 3, "INFO", "ü"]
    assert LogLine(5_000_007, 1, "INFO", "x").answer()["at"] == 5_000
