"""What happened to a job: its attempts, however they end, and the worker of an ended job."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from conftest import NoBar, Server, lapse, put, raw, until
from test_worker import gates, until_ended, work  # noqa: F401  fixtures

import tinyqueue_slot
from tinyqueue import MAX_REFUNDS, Failure, Job, Outcome, Queue, RateLimited, TimedOut, handler
from tinyqueue_backup import back_up, restore
from tinyqueue_job import HISTORY, KEPT_MESSAGE, KEPT_STACK, PastAttempt, read_job

DEFAULT = ["default"]
BOOM = Failure("Boom", "it broke", "Traceback of it")

pytestmark = pytest.mark.usefixtures("no_handlers")


@pytest.fixture(autouse=True)
def types(no_handlers: None) -> None:
    @handler("echo")
    def echo(payload: Any, job: Job) -> None: ...


def start(queue: Queue) -> Job:
    """Start the job of the queue `default` as a new worker, once it is due."""
    queue.clock.ahead += 1_000_000
    queue.promote()
    [job] = queue.dequeue(queue.register(DEFAULT, 1), DEFAULT)
    return job


def history(queue: Queue, job: Job) -> list[PastAttempt]:
    found = queue.get(job.id)
    assert found
    return found.attempts_so_far()


def stored(queue: Queue, job: Job) -> dict[str, Any]:
    return dict(json.loads(raw(queue).get(queue.keys.job(job.id))))


# Every end of an attempt ----------------------------------------------------------------------------------------------


def settle(verb: Any, **options: Any) -> Callable[[Queue, Job], Any]:
    return lambda queue, job: queue.settle(job.worker, [Outcome(job, verb, **options)])


def reap(queue: Queue, job: Job) -> None:
    lapse(queue, job.worker)
    assert queue.reap(job.worker) == 1


def requested(end: Callable[[Queue, Job], Any]) -> Callable[[Queue, Job], Any]:
    """End an attempt whose job was asked to stop."""

    def act(queue: Queue, job: Job) -> None:
        queue.cancel(job.id)
        end(queue, job)

    return act


LIMITED = {"error": Failure("RateLimited", "429"), "after": 5.0, "halt": True}
ENDS: dict[str, tuple[Callable[[Queue, Job], Any], str, str, str]] = {
    "complete": (settle("complete"), "completed", "completed", ""),
    "fail": (settle("fail", error=BOOM, after=5.0), "pending", "failed", "Boom"),
    "fail for good": (settle("fail", error=BOOM), "failed", "failed", "Boom"),
    "release": (settle("release"), "pending", "released", ""),
    "postpone": (
        settle("release", error=Failure("UnknownType", "none"), after=5.0),
        "pending",
        "released",
        "UnknownType",
    ),
    "rate limit": (settle("release", **LIMITED), "pending", "released", "RateLimited"),
    "reap": (reap, "pending", "lost", "WorkerLost"),
    "fail on request": (requested(settle("fail", error=BOOM, after=5.0)), "cancelled", "cancelled", "Boom"),
    "release on request": (requested(settle("release")), "cancelled", "cancelled", ""),
    "reap on request": (requested(reap), "cancelled", "cancelled", "WorkerLost"),
    "complete on request": (requested(settle("complete")), "completed", "completed", ""),
}


@pytest.mark.parametrize("end", ENDS)
def test_end_of_an_attempt_is_in_the_history(queue: Queue, end: str) -> None:
    act, status, outcome, error = ENDS[end]
    job = put(queue, "processing")
    assert history(queue, job) == [PastAttempt(job.started_at, 0, job.worker, "running")]
    queue.clock.ahead += 7
    act(queue, job)
    now = queue.get(job.id)
    [attempt] = history(queue, job)
    assert (now.status, attempt.outcome) == (status, outcome)
    assert (attempt.started_at, attempt.worker) == (job.started_at, job.worker)
    assert attempt.started_at + 7 <= attempt.ended_at <= queue.now()
    assert (attempt.error.type if attempt.error else "") == error
    assert now.worker == ("" if status == "pending" else job.worker)


@pytest.mark.parametrize("end", ENDS)
def test_end_of_a_second_attempt_comes_after_the_first(queue: Queue, end: str) -> None:
    act, _, outcome, error = ENDS[end]
    queue.fail(put(queue, "processing"), Failure("First", "the first broke"), 0)
    job = start(queue)
    act(queue, job)
    first, second = history(queue, job)
    assert (first.outcome, first.error) == ("failed", Failure("First", "the first broke"))
    assert (second.outcome, second.error.type if second.error else "", second.worker) == (outcome, error, job.worker)


@pytest.mark.parametrize("end", ENDS)
def test_attempt_under_a_limit_is_in_the_history(queue: Queue, end: str) -> None:
    @handler("limited", max_running=1)
    def limited(payload: Any, job: Job) -> None: ...

    act, _, outcome, _ = ENDS[end]
    job = queue.enqueue("limited", 1)
    [job] = queue.dequeue(queue.register(DEFAULT, 1), DEFAULT)
    act(queue, job)
    assert [attempt.outcome for attempt in history(queue, job)] == [outcome]


def test_release_too_often_is_a_lost_attempt(queue: Queue) -> None:
    job = queue.enqueue("echo", 1, max_attempts=1)
    for _ in range(MAX_REFUNDS + 1):
        job = start(queue)
        queue.release(job)
    outcomes = [attempt.outcome for attempt in history(queue, job)]
    assert outcomes == ["released"] * (HISTORY - 1) + ["lost"]
    assert queue.get(job.id).status == "failed"


def test_history_keeps_the_last_attempts(queue: Queue) -> None:
    job = queue.enqueue("echo", 1, max_attempts=HISTORY + 3)
    for n in range(HISTORY + 2):
        job = start(queue)
        queue.fail(job, Failure("Boom", f"failure {n}"), 0)
    messages = [f"failure {n}" for n in range(2, HISTORY + 2)]
    assert [attempt.error.message for attempt in history(queue, job) if attempt.error] == messages
    queue.complete(start(queue))
    assert [attempt.outcome for attempt in history(queue, job)] == ["failed"] * (HISTORY - 1) + ["completed"]


def test_message_in_the_history_is_short(queue: Queue) -> None:
    job = put(queue, "processing")
    queue.fail(job, Failure("Boom", "x" * 1000, "y" * 4000), 0)
    [attempt] = history(queue, job)
    assert attempt.error == Failure("Boom", "x" * KEPT_MESSAGE)
    assert queue.get(job.id).error.message == "x" * 1000


# Verbs of operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_retry_keeps_the_history(queue: Queue, status: str) -> None:
    job = put(queue, "processing")
    (settle("fail", error=BOOM) if status == "failed" else requested(settle("fail", error=BOOM)))(queue, job)
    queue.retry(job.id)
    before = history(queue, job)
    assert [(attempt.outcome, attempt.worker) for attempt in before] == [(status, job.worker)]
    assert queue.get(job.id).worker == ""
    again = start(queue)
    queue.complete(again)
    *first, last = history(queue, job)
    assert first == before
    assert (last.outcome, last.worker) == ("completed", again.worker)


def test_retry_of_a_job_that_never_ran_leaves_no_history(queue: Queue) -> None:
    job = put(queue, "cancelled")
    queue.retry(job.id)
    assert history(queue, job) == []


def test_cancel_of_a_pending_job_adds_no_attempt(queue: Queue) -> None:
    job = put(queue, "processing")
    queue.fail(job, BOOM, 60)
    before = history(queue, job)
    queue.cancel(job.id)
    assert history(queue, job) == before
    assert (queue.get(job.id).status, queue.get(job.id).worker) == ("cancelled", "")


def test_revival_with_the_parent_keeps_the_history(queue: Queue) -> None:
    parent = put(queue, "processing")
    child = queue.enqueue("echo", 2, after=[parent.id])
    queue.fail(parent, BOOM)
    assert (queue.get(child.id).status, history(queue, child)) == ("failed", [])
    queue.retry(parent.id)
    queue.complete(start(queue))
    queue.complete(start(queue))
    assert [attempt.outcome for attempt in history(queue, parent)] == ["failed", "completed"]
    assert [attempt.outcome for attempt in history(queue, child)] == ["completed"]


@pytest.mark.parametrize("status", ["pending", "processing", "failed"])
def test_backup_keeps_the_history(server: Server, tmp_path: Any, status: str) -> None:
    queue = server.queue()
    queue.fail(put(queue, "processing"), BOOM, 0)
    job = start(queue)
    ends = {"pending": settle("release"), "failed": settle("fail", error=BOOM)}
    ends.get(status, lambda queue, job: None)(queue, job)
    before = history(queue, job)
    back_up(queue, str(tmp_path / "backup"), NoBar())
    raw(queue).flushall()
    restore(queue, str(tmp_path / "backup"), NoBar())
    after = history(queue, job)
    if status == "processing":
        assert (before[-1].outcome, after[-1].outcome, after[-1].worker) == ("running", "released", job.worker)
        before, after = before[:-1], after[:-1]
    assert after == before


# What is stored -------------------------------------------------------------------------------------------------------


def test_job_of_one_attempt_stores_only_its_worker(queue: Queue) -> None:
    plain = queue.enqueue("echo", 1)
    assert stored(queue, plain).keys() == {"type", "payload"}
    job = start(queue)
    queue.complete(job, 7)
    record = stored(queue, job)
    times = {"updatedAt", "startedAt", "endedAt"}
    assert record.keys() == {"type", "payload", "status", "attempts", *times, "worker", "result"}
    # Older versions stored that there was no progress.
    assert len(f'"worker":"{record["worker"]}",') - len('"progress":0.0,') <= 40


@pytest.mark.parametrize(
    ("host", "end"),
    [
        ("vm", "vm-"),
        ("web.example.com", "web.example.com-"),
        ("ip-10-0-12-345.eu-central-1.compute.internal", "ip-10-0-12-345-"),
        ("send-many-mails-worker-7d4b9c6f5-x2x9q", "worker-7d4b9c6f5-x2x9q-"),
        ("x" * 300, "xxx-"),
    ],
)
def test_worker_id_has_the_end_of_the_host_name(monkeypatch: pytest.MonkeyPatch, host: str, end: str) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: host)
    worker = Server().queue().register(DEFAULT, 1)
    assert len(worker) <= 43
    assert end in worker


OLDER = '{"type":"echo","payload":1,"status":"%s","attempts":2,"updatedAt":9,"startedAt":5,"endedAt":9%s}'
ID = "01a2155f-3143-7000-b0c9-28342567d0c6"


@pytest.mark.parametrize(
    ("status", "more", "expected"),
    [
        ("completed", "", [PastAttempt(5, 9, "", "completed")]),
        ("failed", ',"error":{"type":"Boom","message":"b"}', [PastAttempt(5, 9, "", "failed", Failure("Boom", "b"))]),
        ("failed", ',"error":{"type":"DependencyFailed","message":"b"}', []),
        ("cancelled", "", []),
    ],
)
def test_read_the_history_of_a_job_that_an_older_version_has_ended(
    status: str, more: str, expected: list[PastAttempt]
) -> None:
    job = read_job(ID, (OLDER % (status, more)).encode())
    assert job.attempts_so_far() == expected


def test_answer_has_the_history_once_a_job_has_run(queue: Queue) -> None:
    job = queue.enqueue("echo", 1)
    assert "history" not in queue.get(job.id).answer()
    job = start(queue)
    queue.fail(job, BOOM)
    assert queue.get(job.id).answer()["history"] == history(queue, job)


# In a worker ----------------------------------------------------------------------------------------------------------


def test_worker_that_stops_leaves_a_released_attempt(queue: Queue, work: Any, gates: Any) -> None:  # noqa: F811
    gate = gates()
    job = queue.enqueue("gate", 1)
    running = work(queue)
    until(lambda: gate.started)
    running.end("release")
    [attempt] = history(queue, job)
    assert (attempt.outcome, attempt.error, attempt.worker) == ("released", None, running.worker.id)


def test_job_without_a_handler_leaves_a_released_attempt(queue: Queue, work: Any) -> None:  # noqa: F811
    job = queue.enqueue("nobody-knows-it", 1)
    work(queue)
    [attempt] = until(lambda: (found := history(queue, job)) and found[0].outcome == "released" and found)
    assert attempt.error.type == "UnknownType"


def test_handler_that_is_rate_limited_leaves_a_released_attempt(queue: Queue, work: Any) -> None:  # noqa: F811
    @handler("limited")
    def limited(payload: Any) -> None:
        raise RateLimited("429", after=60)

    job = queue.enqueue("limited", 1)
    work(queue)
    [attempt] = until(lambda: (found := history(queue, job)) and found[0].outcome == "released" and found)
    assert attempt.error == Failure("RateLimited", "429")


def test_handler_that_times_out_leaves_where_it_was(queue: Queue, work: Any) -> None:  # noqa: F811
    @handler("slow", timeout=0.05, max_attempts=2, backoff=60)
    def slow(payload: Any) -> None:
        wait_for_nothing()

    job = queue.enqueue("slow", 1)
    work(queue)
    [attempt] = until(lambda: (found := history(queue, job)) and found[0].outcome == "failed" and found)
    assert attempt.error.type == "TimedOut"
    assert "wait_for_nothing" in attempt.error.traceback


def wait_for_nothing() -> None:
    while True:
        threading.Event().wait(0.001)


def test_thread_that_is_given_up_leaves_its_stack(
    queue: Queue,
    work: Any,  # noqa: F811
    gates: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tinyqueue_slot, "GRACE", 0.1)
    stop_now = gates("unused").opened

    @handler("deaf", timeout=0.05, max_attempts=2, backoff=60)
    def deaf(payload: Any) -> None:
        sleep_deeply(stop_now)

    job = queue.enqueue("deaf", 1)
    work(queue)
    [attempt] = until(lambda: (found := history(queue, job)) and found[0].outcome == "failed" and found)
    assert attempt.error.type == "TimedOut"
    assert len(attempt.error.traceback) <= KEPT_STACK
    assert attempt.error.traceback.startswith(tinyqueue_slot.GIVEN_UP)
    assert "in deaf\n    sleep_deeply(stop_now)" in attempt.error.traceback
    assert "in sleep_deeply" in attempt.error.traceback
    assert "run_job" not in attempt.error.traceback
    assert queue.get(job.id).error.traceback == attempt.error.traceback
    stop_now.set()


def sleep_deeply(stop_now: threading.Event) -> None:
    while not stop_now.is_set():
        try:
            stop_now.wait(0.001)
        except TimedOut:
            continue


def test_thread_that_is_given_up_in_its_last_attempt_leaves_its_stack(
    queue: Queue,
    work: Any,  # noqa: F811
    gates: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tinyqueue_slot, "GRACE", 0.1)
    gates("stuck", timeout=0.05, max_attempts=1)
    job = queue.enqueue("stuck", 1)
    work(queue)
    ended = until_ended(queue, job)
    [attempt] = ended.attempts_so_far()
    assert (ended.status, attempt.outcome) == ("failed", "failed")
    assert attempt.error.traceback.startswith(tinyqueue_slot.GIVEN_UP)
