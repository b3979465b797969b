"""The worker in a thread: outcomes, slots, order, timeouts, stopping, lost leases and faults."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from decimal import Decimal, getcontext
from typing import Any

import msgspec
import pytest
from conftest import ENDED, RedisServer, Server, lapse, newest, raw, threads_since, until
from cutproxy import CutProxy

import tinyqueue_redis
import tinyqueue_slot
import worker
from tinyqueue import HANDLERS, MAX_RESULT, Discard, Job, Queue, Reaped, Retry, TimedOut, WrongStatus, handler
from tinyqueue_config import Settings
from tinyqueue_slot import run_job
from worker import EXIT_BROKEN, StopMode, Worker


def until_ended(queue: Queue, job: Job, timeout: float = 20.0) -> Job:
    return until(lambda: (now := queue.get(job.id)) and now.status in ENDED and now, timeout)


def found(queue: Queue, job: Job) -> Job:
    """Read a job that exists."""
    now = queue.get(job.id)
    assert now
    return now


class Running:
    """A worker in a thread."""

    def __init__(
        self,
        queue: Queue,
        *names: str,
        slots: int = 2,
        burst: bool = False,
        drain: float = 10,
        watchdog: float = 300,
        max_jobs: int = 0,
    ):
        settings = msgspec.structs.replace(
            Settings(), worker_concurrency=slots, shutdown_timeout=drain, watchdog=watchdog, max_jobs=max_jobs
        )
        self.worker = Worker(queue, settings, names or ("default",), burst)
        self.code: int | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.code = self.worker.run()

    def stop(self, mode: StopMode) -> None:
        self.worker.stop(mode)

    def end(self, mode: StopMode | None = None) -> int | None:
        """Stop the worker if a mode is given, wait for its end and return its exit code."""
        if mode:
            self.stop(mode)
        self._thread.join(20)
        assert not self._thread.is_alive(), "the worker does not stop"
        return self.code


class Gate:
    """A handler that runs until it is opened. Like time.sleep, its wait cannot be interrupted."""

    def __init__(self, type: str = "gate", **options: Any) -> None:
        self.started: list[Any] = []
        self.attempts: list[int] = []
        self.opened = threading.Event()

        @handler(type, **options)
        def gate(payload: Any, job: Job) -> Any:
            self.attempts.append(job.attempts)
            self.started.append(payload)
            self.opened.wait()
            return payload


@pytest.fixture(autouse=True)
def _own_handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start without handlers, and let workers check more often."""
    saved = dict(HANDLERS)
    HANDLERS.clear()
    monkeypatch.setattr(worker, "TICK", 0.02)
    monkeypatch.setattr(worker, "BLOCK", 0.1)
    monkeypatch.setattr(worker, "PROMOTE_EVERY", 0.02)
    yield
    HANDLERS.clear()
    HANDLERS.update(saved)


@pytest.fixture
def gates() -> Iterator[Callable[..., Gate]]:
    made: list[Gate] = []

    def make(type: str = "gate", **options: Any) -> Gate:
        made.append(Gate(type, **options))
        return made[-1]

    yield make
    for gate in made:
        gate.opened.set()


@pytest.fixture
def work(gates: Any) -> Iterator[Callable[..., Running]]:
    """Start workers, and stop them after the test."""
    started: list[Running] = []

    def start(queue: Queue, *names: str, **options: Any) -> Running:
        started.append(Running(queue, *names, **options))
        return started[-1]

    yield start
    for running in started:
        if running.code is None:
            running.stop("release")
    for running in started:
        running.end()


@pytest.fixture
def echo() -> None:
    @handler("echo")
    def echo(payload: Any) -> Any:
        return payload


def reap_alive(queue: Queue, running: Running) -> None:
    """Reap a worker that is alive."""
    id = until(lambda: running.worker.id)

    def reaped() -> bool:
        raw(queue).delete(queue.keys.lease(id))
        queue.reap(id)
        return not raw(queue).exists(queue.keys.worker(id))

    until(reaped)


# Outcomes -------------------------------------------------------------------------------------------------------------


def test_complete_stores_the_result(queue: Queue, work: Any, echo: None) -> None:
    job = queue.enqueue("echo", {"a": [1, None, "é"]})
    work(queue)
    ended = until_ended(queue, job)
    assert (ended.status, ended.result, ended.attempts, ended.error) == ("completed", {"a": [1, None, "é"]}, 1, None)
    assert job.created_at <= ended.started_at <= ended.ended_at


def test_complete_without_a_result_stores_null(queue: Queue, work: Any) -> None:
    @handler("nothing")
    def nothing(payload: Any) -> None: ...

    job = queue.enqueue("nothing", None)
    work(queue)
    assert until_ended(queue, job).answer()["result"] is None


def test_complete_keeps_the_result_as_it_was_when_the_handler_returned() -> None:
    result = [1]

    @handler("mutable")
    def mutable(payload: Any) -> list[int]:
        return result

    outcome = run_job(Job("", "mutable", None))
    result.append(2)
    assert msgspec.json.decode(outcome.result) == [1]


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        ({1}, [1]),
        (b"x", "eA=="),
        (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00Z"),
        ({1: "a"}, {"1": "a"}),
        ((1, 2), [1, 2]),
        (msgspec.Raw(b'{"a":1}'), {"a": 1}),
    ],
    ids=["set", "bytes", "date", "integer keys", "tuple", "raw JSON"],
)
def test_complete_converts_a_result_to_json(value: Any, stored: Any) -> None:
    @handler("give")
    def give(payload: Any) -> Any:
        return value

    assert msgspec.json.decode(run_job(Job("", "give", None)).result) == stored


def circular() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


UNSTORABLE: dict[str, Callable[[], Any]] = {
    "object": object,
    "generator": lambda: (x for x in ()),
    "NaN": lambda: [float("nan")],
    "infinity": lambda: {"a": -float("inf")},
    "tuple keys": lambda: {(1, 2): 3},
    "circular list": circular,
    "nested": lambda: nested(101),
    "long": lambda: "x" * MAX_RESULT,
    "lone surrogate": lambda: "\ud800",
    "raw but not JSON": lambda: msgspec.Raw(b"}{"),
    "raw but empty": lambda: msgspec.Raw(b""),
}


@pytest.mark.parametrize("kind", UNSTORABLE)
def test_complete_refuses_a_result_that_cannot_be_stored(kind: str) -> None:
    @handler("give")
    def give(payload: Any) -> Any:
        return UNSTORABLE[kind]()

    outcome = run_job(Job("", "give", None))
    assert (outcome.verb, outcome.after) == ("fail", None)
    assert outcome.error
    assert outcome.error.type == "Discard"
    assert outcome.error.message.startswith("the result is ")


def test_complete_with_a_result_that_cannot_be_stored_fails_the_job_at_once(
    queue: Queue, work: Any, echo: None
) -> None:
    calls = []

    @handler("give", backoff=0.01)
    def give(payload: Any) -> Any:
        calls.append(payload)
        return object()

    job, after = queue.enqueue("give", 1), queue.enqueue("echo", 2)
    work(queue, slots=1)
    ended = until_ended(queue, job)
    assert (ended.status, ended.attempts, calls) == ("failed", 1, [1])
    assert until_ended(queue, after).status == "completed"


def test_fail_is_retried_until_no_attempts_are_left(queue: Queue, work: Any) -> None:
    @handler("broken", max_attempts=2, backoff=0.01)
    def broken(payload: Any) -> None:
        {}["no such key"]

    job = queue.enqueue("broken", None)
    work(queue)
    ended = until_ended(queue, job)
    assert (ended.status, ended.attempts) == ("failed", 2)
    assert ended.error
    assert (ended.error.type, ended.error.message) == ("KeyError", "'no such key'")


def test_fail_stores_a_traceback_that_begins_with_the_handler(queue: Queue, work: Any) -> None:
    def inner() -> None:
        raise ValueError("deep")

    @handler("broken", max_attempts=1)
    def outer(payload: Any) -> None:
        inner()

    job = queue.enqueue("broken", None)
    work(queue)
    ended = until_ended(queue, job)
    assert ended.error
    lines = ended.error.traceback.splitlines()
    assert lines[0].startswith("Traceback")
    assert __file__ in lines[1]
    assert lines[1].endswith("in outer")
    assert lines[-1] == "ValueError: deep"


def test_fail_delays_the_next_attempt_by_the_backoff(queue: Queue, work: Any) -> None:
    @handler("broken", backoff=1000, backoff_cap=1500)
    def broken(payload: Any) -> None:
        raise ValueError("no")

    job = queue.enqueue("broken", None)
    work(queue)
    waiting = until(lambda: (now := queue.get(job.id)) and now.error and now)
    assert (waiting.status, waiting.attempts, waiting.error.message) == ("pending", 1, "no")
    assert 1_000_000 <= waiting.run_at - waiting.started_at <= 1_520_000


# Jobs that this worker cannot read ------------------------------------------------------------------------------------


@pytest.fixture
def unreadable(queue: Queue) -> Callable[[str], Job]:
    """Enqueue a job of an unknown type, or with a payload that the handler's type does not allow."""

    def enqueue(kind: str) -> Job:
        job = queue.enqueue("changed", {"to": 1}, max_attempts=1)
        if kind == "payload":

            @handler("changed", backoff=0.01)
            def changed(payload: dict[str, str]) -> None: ...

        return job

    return enqueue


UNREADABLE_KINDS = {
    "type": ("UnknownType", "type: no handler is registered for 'changed'; registered: echo; "),
    "payload": ("InvalidJob", "payload[...]: Expected `str`"),
}


@pytest.mark.parametrize("kind", UNREADABLE_KINDS)
def test_postpone_a_job_that_the_worker_cannot_read_without_spending_an_attempt(
    queue: Queue, work: Any, echo: None, unreadable: Any, kind: str
) -> None:
    job, after = unreadable(kind), queue.enqueue("echo", 1)
    work(queue, slots=1)
    waiting = until(lambda: (now := queue.get(job.id)) and now.error and now)
    assert (waiting.status, waiting.attempts, waiting.refunds) == ("pending", 0, 1)
    type, message = UNREADABLE_KINDS[kind]
    assert waiting.error.type == type
    assert waiting.error.message.startswith(message)
    assert waiting.error.message.endswith("this worker cannot run the job, and it waits for one that can (1/10)")
    assert waiting.error.traceback == ""
    assert 10_000 <= waiting.run_at - waiting.started_at <= 16_000
    assert until_ended(queue, after).status == "completed"


@pytest.mark.parametrize("kind", UNREADABLE_KINDS)
def test_postpone_a_job_until_a_worker_can_read_it(
    queue: Queue, work: Any, echo: None, unreadable: Any, *, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_slot, "UNREADABLE_BACKOFF", 0.01)
    job = unreadable(kind)
    old = work(queue)
    until(lambda: found(queue, job).refunds >= 2)
    assert old.end("drain") == 0
    HANDLERS.pop("changed", None)

    @handler("changed")
    def changed(payload: dict[str, int]) -> int:
        return payload["to"]

    work(queue)
    ended = until_ended(queue, job)
    assert (ended.status, ended.result, ended.attempts, ended.error) == ("completed", 1, 1, None)


@pytest.mark.parametrize("kind", UNREADABLE_KINDS)
def test_postpone_a_job_that_no_worker_can_read_only_ten_times(
    queue: Queue, work: Any, echo: None, unreadable: Any, *, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_slot, "UNREADABLE_BACKOFF", 0.001)
    job = unreadable(kind)
    work(queue)
    ended = until_ended(queue, job)
    assert (ended.status, ended.attempts, ended.refunds) == ("failed", 1, 10)
    assert ended.error
    assert ended.error.type == UNREADABLE_KINDS[kind][0]


def test_postpone_no_job_whose_handler_submits_an_invalid_job(queue: Queue, work: Any, echo: None) -> None:
    @handler("parent", max_attempts=1)
    def parent(payload: Any) -> None:
        queue.enqueue("echo", object())

    job = queue.enqueue("parent", None)
    work(queue)
    ended = until_ended(queue, job)
    assert ended.error
    assert (ended.status, ended.error.type, ended.refunds) == ("failed", "InvalidJob", 0)


# What handlers and exceptions can break -------------------------------------------------------------------------------


def change_payload(job: Job) -> None:
    job.payload["object"] = object()


def change_fields(job: Job) -> None:
    job.attempts += 1
    job.worker = "other"
    job.max_attempts = job.refunds = job.suspicions = 77
    job.started_at = 5
    job.type = object()  # type: ignore[assignment]
    job.id = "none"


def change_error(job: Job) -> None:
    assert job.error
    job.error.message = object()  # type: ignore[assignment]


def delete_everything(job: Job) -> None:
    for name in job.__struct_fields__:
        delattr(job, name)


class Odd(float):
    def __repr__(self) -> str:
        return "odd"


def report_odd_progress(job: Job) -> None:
    job.set_progress(Odd(0.5))
    job.set_progress(Decimal("0.25"), of=Decimal(1))  # type: ignore[arg-type]


CHANGES = (change_payload, change_fields, change_error, delete_everything, report_odd_progress)


@pytest.mark.parametrize("end", ["completed", "failed"])
@pytest.mark.parametrize("change", CHANGES)
def test_change_of_the_job_by_its_handler_breaks_nothing(
    queue: Queue, work: Any, echo: None, *, change: Callable[[Job], None], end: str
) -> None:
    @handler("change", backoff=0.01)
    def change_job(payload: Any, job: Job) -> str:
        if job.attempts == 1:
            raise ValueError("first")
        change(job)
        if end == "failed":
            raise Discard("enough")
        return "done"

    job, after = queue.enqueue("change", {"a": 1}), queue.enqueue("echo", 1)
    running = work(queue, slots=1)
    ended = until_ended(queue, job, 5)
    assert (ended.status, ended.attempts, ended.max_attempts, ended.payload) == (end, 2, 3, {"a": 1})
    assert (ended.refunds, ended.suspicions) == (0, 0)
    assert until_ended(queue, after).attempts == 1
    assert running.end("drain") == 0


def test_cancel_reaches_a_handler_that_has_changed_its_job(queue: Queue, work: Any) -> None:
    changed = threading.Event()

    @handler("change")
    def change(payload: Any, job: Job) -> None:
        job.payload = object()
        changed.set()
        until(lambda: job.cancelled)
        raise RuntimeError("stopped")

    job = queue.enqueue("change", 1)
    work(queue)
    changed.wait(10)
    queue.cancel(job.id)
    assert until_ended(queue, job).status == "cancelled"


class Custom(BaseException):
    pass


class TextRaises(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


class TextExits(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class TextCannotBeEncoded(Exception):
    class Text(str):
        def encode(self, *_: Any) -> bytes:  # type: ignore[override]
            raise ZeroDivisionError

    def __str__(self) -> str:
        return self.Text("text")


class NameRaises(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise ZeroDivisionError


class TypeHasNoName(Exception, metaclass=NameRaises):
    pass


class EverythingRaises(Exception):
    """Whatever is asked of it raises another of its kind."""

    def __getattribute__(self, name: str) -> Any:
        raise EverythingRaises

    def __str__(self) -> str:
        raise EverythingRaises


class TextHasNoEnd(Exception):
    def __str__(self) -> str:
        return str(self)


class OddNumber(int):
    def __mul__(self, other: Any) -> Any:
        raise ZeroDivisionError


class RetryWithoutInit(Retry):
    def __init__(self) -> None: ...


@pytest.mark.parametrize(
    "error", [SystemExit(0), SystemExit(1), KeyboardInterrupt(), GeneratorExit(), Custom("mine"), TimedOut()], ids=repr
)
def test_fail_with_any_base_exception_costs_only_the_attempt(
    near: Queue, work: Any, gates: Any, error: BaseException
) -> None:
    gate = gates()

    @handler("raise", max_attempts=1)
    def raise_error(payload: Any) -> None:
        raise error

    jobs = near.enqueue_many("raise", range(4))
    near.enqueue_many("gate", range(2))
    running = work(near, slots=2)
    for job in jobs:
        ended = until_ended(near, job)
        assert ended.error
        assert (ended.status, ended.error.type) == ("failed", type(error).__name__)
    until(lambda: len(gate.started) == 2)  # both slots still run jobs
    gate.opened.set()
    assert running.end("drain") == 0


def retry_after(after: Any) -> Callable[[], BaseException]:
    def make() -> BaseException:
        error = Retry()
        error.after = after
        return error

    return make


BROKEN: dict[str, Callable[[], BaseException]] = {
    "text that raises": TextRaises,
    "text that exits": TextExits,
    "text that cannot be encoded": TextCannotBeEncoded,
    "text without end": TextHasNoEnd,
    "type without a name": TypeHasNoName,
    "everything raises": EverythingRaises,
    "surrogates": lambda: ValueError("\ud800"),
    "long": lambda: ValueError("x" * 5000),
    "group": lambda: BaseExceptionGroup("two", [ValueError("a"), Custom("b")]),
    "retry that skips its init": RetryWithoutInit,
    "retry after a text": retry_after("soon"),
    "retry after NaN": retry_after(float("nan")),
    "retry after infinity": retry_after(float("inf")),
    "retry after minus one": retry_after(-1),
    "retry after an odd number": retry_after(OddNumber(0)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_fail_with_a_broken_exception_costs_only_the_attempt(near: Queue, work: Any, echo: None, kind: str) -> None:
    @handler("broken", max_attempts=2, backoff=0.01)
    def broken(payload: Any) -> None:
        raise BROKEN[kind]()

    job = near.enqueue("broken", None)
    running = work(near, slots=1)
    ended = until_ended(near, job, 5)
    assert (ended.status, ended.attempts) == ("failed", 2)
    assert ended.error
    assert len(ended.error.message) <= 1000
    assert len(ended.error.traceback) <= 4000
    assert until_ended(near, near.enqueue("echo", 1), 5).status == "completed"
    assert running.end("drain") == 0


def test_fail_of_an_infinite_recursion_stores_the_error(queue: Queue, work: Any) -> None:
    @handler("deep", max_attempts=1)
    def deep(payload: Any) -> None:
        deep(payload)

    job = queue.enqueue("deep", None)
    work(queue)
    ended = until_ended(queue, job)
    assert ended.error
    assert ended.error.type == "RecursionError"


def test_fail_leaves_no_threads_or_connections_behind(queue: Queue, work: Any) -> None:
    @handler("broken", max_attempts=1)
    def broken(payload: Any) -> None:
        raise ValueError("no")

    work(queue, slots=2)

    def run_jobs() -> None:
        for job in queue.enqueue_many("broken", range(50)):
            until_ended(queue, job)

    run_jobs()
    before = threading.enumerate()
    for _ in range(4):
        run_jobs()
    assert threads_since(before) == []
    used = len(queue.pool._in_use_connections) + len(queue.pool._available_connections)
    assert used <= 5  # for the taker, a slot, a settler, the keeper and this thread, if all use Redis at once


def test_retry_with_a_delay_waits_that_long(queue: Queue, work: Any) -> None:
    @handler("later")
    def later(payload: Any) -> None:
        raise Retry("not yet", after=3600)

    job = queue.enqueue("later", None)
    work(queue)
    waiting = until(lambda: (now := queue.get(job.id)) and now.error and now)
    assert (waiting.status, waiting.error.type, waiting.error.message) == ("pending", "Retry", "not yet")
    assert 3_600_000 <= waiting.run_at - waiting.started_at < 3_660_000


def test_retry_without_a_delay_runs_until_it_succeeds(queue: Queue, work: Any) -> None:
    @handler("third", max_attempts=5)
    def third(payload: Any, job: Job) -> int:
        if job.attempts < 3:
            raise Retry(after=0)
        return job.attempts

    job = queue.enqueue("third", None)
    work(queue)
    ended = until_ended(queue, job)
    assert (ended.status, ended.result, ended.attempts, ended.error) == ("completed", 3, 3, None)


def test_retry_without_attempts_left_fails_the_job(queue: Queue, work: Any) -> None:
    @handler("again", max_attempts=2)
    def again(payload: Any) -> None:
        raise Retry(after=0)

    job = queue.enqueue("again", None)
    work(queue)
    ended = until_ended(queue, job)
    assert (ended.status, ended.attempts) == ("failed", 2)


@pytest.mark.parametrize("after", [-1, float("nan"), float("inf"), 1e9, "soon"], ids=repr)
def test_retry_refuses_an_invalid_delay(after: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        Retry(after=after)


def test_retry_of_many_jobs_starts_no_attempt_twice(queue: Queue, work: Any) -> None:
    starts: Counter[tuple[int, int]] = Counter()
    running: Counter[int] = Counter()
    overlaps = []
    lock = threading.Lock()

    @handler("again", max_attempts=9)
    def again(payload: int, job: Job) -> None:
        with lock:
            starts[payload, job.attempts] += 1
            running[payload] += 1
            overlaps.extend([payload] * (running[payload] > 1))
        time.sleep(0.001)
        with lock:
            running[payload] -= 1
        if job.attempts < 8:
            raise Retry(after=0)

    jobs = queue.enqueue_many("again", range(20))
    work(queue, slots=4)
    for job in jobs:
        assert until_ended(queue, job).attempts == 8
    assert starts == dict.fromkeys(((payload, attempt) for payload in range(20) for attempt in range(1, 9)), 1)
    assert overlaps == []


def test_discard_fails_the_job_at_once(queue: Queue, work: Any) -> None:
    @handler("discard")
    def discard(payload: Any) -> None:
        raise Discard("pointless")

    job = queue.enqueue("discard", None)
    work(queue)
    ended = until_ended(queue, job)
    assert ended.error
    assert (ended.status, ended.attempts, ended.error.message) == ("failed", 1, "pointless")


def test_set_progress_is_visible_while_the_handler_runs(queue: Queue, work: Any, gates: Any) -> None:
    go_on = threading.Event()

    @handler("steps")
    def steps(payload: Any, job: Job) -> None:
        job.set_progress(1, of=4)
        go_on.wait()
        job.set_progress(3, of=4)

    job = queue.enqueue("steps", None)
    work(queue)
    until(lambda: (now := queue.get(job.id)) and now.progress == 0.25)
    go_on.set()
    assert until_ended(queue, job).progress == 0.75


# What one job leaves for the next -------------------------------------------------------------------------------------


def test_context_of_a_job_is_not_seen_by_the_next(queue: Queue, work: Any) -> None:
    tenant = ContextVar("tenant", default="nobody")
    seen: list[tuple[str, int]] = []

    @handler("tenant")
    def serve_tenant(payload: str) -> None:
        seen.append((tenant.get(), getcontext().prec))
        tenant.set(payload)
        getcontext().prec = 5

    jobs = queue.enqueue_many("tenant", ["a", "b", "c"])
    work(queue, slots=1)
    for job in jobs:
        until_ended(queue, job)
    assert seen == [("nobody", 28)] * 3


# Slots and order ------------------------------------------------------------------------------------------------------


def test_take_never_exceeds_the_free_slots(queue: Queue, work: Any, gates: Any) -> None:
    gate = gates()
    queue.enqueue_many("gate", range(10))
    work(queue, slots=3)
    until(lambda: len(gate.started) == 3)
    stats = queue.stats()
    assert (stats["processing"], stats["pending"], queue.waiting(["default"])) == (3, 7, 7)
    assert len(gate.started) == 3
    gate.opened.set()
    until(lambda: queue.stats()["completed"] == 10)


def test_take_with_a_long_job_running_does_not_delay_short_jobs(
    queue: Queue, work: Any, gates: Any, echo: None
) -> None:
    gate = gates()
    queue.enqueue("gate", 0)
    work(queue, slots=2)
    until(lambda: gate.started)
    for job in queue.enqueue_many("echo", range(20)):
        assert until_ended(queue, job).status == "completed"
    assert not gate.opened.is_set()


def test_dequeue_is_first_in_first_out(queue: Queue, work: Any) -> None:
    ran: list[int] = []

    @handler("note")
    def note(payload: int) -> None:
        ran.append(payload)

    queue.enqueue_many("note", range(10))
    queue.enqueue("note", 10)
    work(queue, slots=1)
    until(lambda: queue.stats()["completed"] == 11)
    assert ran == list(range(11))


def test_dequeue_empties_the_first_queue_first(queue: Queue, work: Any, gates: Any) -> None:
    ran: list[str] = []
    gate = gates()

    @handler("note")
    def note(payload: str) -> None:
        ran.append(payload)

    queue.enqueue("gate", 0, queue="low")
    work(queue, "high", "low", slots=1)
    until(lambda: gate.started)
    for n in range(3):
        queue.enqueue("note", f"low {n}", queue="low")
        queue.enqueue("note", f"high {n}", queue="high")
    queue.enqueue("note", "unserved", queue="third")
    gate.opened.set()
    until(lambda: queue.stats()["completed"] == 7)
    assert ran == ["high 0", "high 1", "high 2", "low 0", "low 1", "low 2"]


def test_dequeue_is_not_slowed_by_cancelled_jobs_at_the_head(queue: Queue, work: Any, echo: None) -> None:
    for job in queue.enqueue_many("echo", range(500)):
        queue.cancel(job.id)
    last = queue.enqueue("echo", "last")
    work(queue, slots=1)
    assert until_ended(queue, last, 15).status == "completed"  # waiting for the bell after each of them would take 50 s
    assert queue.stats()["completed"] == 1


def test_dequeue_during_a_cancel_has_one_winner(queue: Queue, work: Any) -> None:
    ran = []

    @handler("note")
    def note(payload: int) -> None:
        ran.append(payload)

    jobs = queue.enqueue_many("note", range(60))
    work(queue, slots=2)
    cancelled = []
    for n, job in enumerate(reversed(jobs)):
        with suppress(WrongStatus):
            queue.cancel(job.id)
            cancelled.append(59 - n)
    for job in jobs:
        until_ended(queue, job)
    assert sorted(ran + cancelled) == list(range(60))


def test_dequeue_of_a_duplicate_id_runs_the_job_once(queue: Queue, work: Any, gates: Any, echo: None) -> None:
    gate = gates()
    job = queue.enqueue("gate", 0)
    raw(queue).lpush(queue.keys.jobs("default"), job.id, job.id)
    work(queue, slots=2)
    until(lambda: gate.started)
    until_ended(queue, queue.enqueue("echo", 1))  # it is behind the second and the third entry
    gate.opened.set()
    assert until_ended(queue, job).attempts == 1
    assert len(gate.started) == 1


def test_dequeue_drops_entries_that_are_not_job_ids(
    queue: Queue, work: Any, echo: None, caplog: pytest.LogCaptureFixture
) -> None:
    ghost = queue.draft("echo", 0)
    raw(queue).lpush(queue.keys.jobs("default"), "not an id", "", b"\xff\x00", "../" + "a" * 5000, ghost.id)
    job = queue.enqueue("echo", 1)
    running = work(queue, slots=2)
    assert until_ended(queue, job).status == "completed"
    until(lambda: not raw(queue).exists(queue.keys.proc(running.worker.id), queue.keys.jobs("default")))
    assert "that are not job ids" in caplog.text


UNREADABLE = {
    "empty": "",
    "text": "not-json",
    "array": "[]",
    "without type": "{}",
    "cut off": '{"type":"echo","payl',
    "attempts no number": '{"type":"echo","payload":1,"attempts":"x"}',
    "status none": '{"type":"echo","payload":1,"status":"gone"}',
    "lone surrogate": '{"type":"echo","payload":"\\ud800"}',
    "no UTF-8": b'{"type":"echo","payload":"\xff"}',
    "nested": b'{"type":"echo","payload":' + b"[" * 100_000,
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_dequeue_fails_an_unreadable_record(real: Server, work: Any, echo: None, kind: str) -> None:
    queue = real.queue()
    job, after = queue.enqueue_many("echo", [1, 2])
    raw(queue).set(queue.keys.job(job.id), UNREADABLE[kind])
    work(queue, slots=1)
    assert until_ended(queue, after).status == "completed"
    assert [(failed.id, failed.error and failed.error.type) for failed in newest(queue, "failed")] == [
        (job.id, "UnreadableRecord")
    ]


def test_heartbeat_keeps_a_job_that_outlasts_the_lease(near: Queue, real: Server, work: Any, gates: Any) -> None:
    gate = gates()
    queue = real.queue(lease=2)
    job = queue.enqueue("gate", 0)
    first = work(queue, slots=1)
    until(lambda: gate.started)
    work(real.queue(lease=2), slots=1)

    def listed() -> dict[str, Any]:
        return next(about for about in queue.workers() if about["id"] == first.worker.id)

    until(lambda: listed()["lastHeartbeat"] > listed()["startedAt"] + 3000)
    assert listed()["jobs"] == [job.id]
    gate.opened.set()
    assert until_ended(queue, job).attempts == 1
    assert len(gate.started) == 1


def test_heartbeat_that_fails_is_repeated_before_the_next_is_due(
    near: Queue, real: Server, proxy: CutProxy, work: Any
) -> None:
    proxy.drop_request(b'{"at":')
    work(real.queue(proxy.url, lease=120))  # renewed every 40 seconds
    until(lambda: proxy.idle)
    dropped_at = near.now()
    until(lambda: near.workers()[0]["lastHeartbeat"] >= dropped_at)


def test_settle_keeps_an_outcome_until_it_can_be_saved(queue: Queue, work: Any, gates: Any) -> None:
    gate = gates()
    awaited = queue.keys.awaited
    job = queue.enqueue("gate", 0)
    running = work(queue, slots=1)
    until(lambda: gate.started)
    raw(queue).set(awaited, "not a set")
    gate.opened.set()
    until(lambda: running.worker.warned)
    assert found(queue, job).status == "processing"
    raw(queue).delete(awaited)
    assert until_ended(queue, job).attempts == 1
    assert len(gate.started) == 1


def test_reap_gives_the_jobs_of_a_dead_worker_to_another(queue: Queue, server: Server, work: Any, echo: None) -> None:
    dead = queue.register(["default"], 2)
    started, taken = queue.enqueue_many("echo", [1, 2])
    queue.dequeue(dead, ["default"], 1)
    queue.take(dead, ["default"], 1)
    lapse(queue, dead)
    work(server.queue(lease=0.5))
    assert until_ended(queue, taken).attempts == 1
    assert until_ended(queue, started).attempts == 2
    assert dead not in [about["id"] for about in queue.workers()]


# Busy workers ---------------------------------------------------------------------------------------------------------
# While jobs are waiting, the slots exchange outcomes for jobs themselves.


class Notes:
    """A handler that counts its runs of each payload and notes when each began."""

    def __init__(self, type: str = "note") -> None:
        self.ran: Counter[int] = Counter()
        self.began: list[float] = []
        self.lock = threading.Lock()

        @handler(type)
        def note(payload: int) -> None:
            with self.lock:
                self.ran[payload] += 1
                self.began.append(time.monotonic())


@pytest.mark.parametrize("shorts", [0, 1, 300])
def test_exchange_before_long_jobs_leaves_no_slot_idle(queue: Queue, work: Any, gates: Any, shorts: int) -> None:
    """A slot that runs a long job must have woken another, even if it has run all short jobs alone."""
    notes = Notes()
    gate = gates()
    for n in range(shorts):
        queue.enqueue("note", n)
    queue.enqueue_many("gate", range(12))
    work(queue, slots=10)
    until(lambda: len(gate.started) == 10)
    until(lambda: queue.stats()["completed"] == shorts)
    assert queue.stats()["processing"] == 10
    gate.opened.set()
    until(lambda: queue.stats()["completed"] == shorts + 12)
    assert notes.ran == dict.fromkeys(range(shorts), 1)


def test_exchange_saves_an_outcome_while_all_other_slots_run_long_jobs(queue: Queue, work: Any, gates: Any) -> None:
    long, short = gates("long"), gates("short")
    queue.enqueue_many("long", range(3))
    jobs = queue.enqueue_many("short", range(2))
    more = queue.enqueue_many("long", range(3, 5))
    work(queue, slots=5)
    until(lambda: len(long.started) + len(short.started) == 5)
    short.opened.set()
    assert {until_ended(queue, job).attempts for job in jobs} == {1}
    until(lambda: len(long.started) == 5)
    last = queue.enqueue("long", 5)
    assert found(queue, last).status == "pending"
    long.opened.set()
    assert {until_ended(queue, job).attempts for job in (*more, last)} == {1}


def test_exchange_starts_jobs_of_the_second_queue_when_the_first_is_empty(queue: Queue, work: Any) -> None:
    ran: list[int] = []

    @handler("note")
    def note(payload: int) -> None:
        ran.append(payload)

    queue.enqueue_many("note", range(50, 100), queue="low")
    queue.enqueue_many("note", range(50), queue="high")
    work(queue, "high", "low", slots=1)
    until(lambda: queue.stats()["completed"] == 100)
    assert ran == list(range(100))


def test_exchange_starts_no_more_than_max_jobs(queue: Queue, work: Any) -> None:
    notes = Notes()
    queue.enqueue_many("note", range(100))
    running = work(queue, slots=8, max_jobs=37)
    assert running.end() == 0  # by itself
    assert sum(notes.ran.values()) == queue.stats()["completed"] == 37
    assert queue.stats()["pending"] == queue.waiting(["default"]) == 63
    assert {job.attempts + job.refunds for job in newest(queue, "pending", 100)} == {0}


def test_exchange_in_a_burst_ends_when_all_queues_are_empty(queue: Queue, work: Any) -> None:
    notes = Notes()
    queue.enqueue_many("note", range(300))
    queue.enqueue_many("note", range(300, 400), queue="low")
    assert work(queue, "default", "low", slots=8, burst=True).end() == 0
    assert notes.ran == dict.fromkeys(range(400), 1)
    assert queue.stats()["completed"] == 400
    assert queue.workers() == []


def test_exchange_of_other_jobs_lets_a_suspect_run_alone(queue: Queue, work: Any) -> None:
    lock = threading.Lock()
    active: list[str] = []
    beside: list[list[str]] = []

    def enter(name: str) -> None:
        with lock:
            if name == "suspect" or "suspect" in active:
                beside.append([*active, name])
            active.append(name)

    def leave(name: str) -> None:
        with lock:
            active.remove(name)

    @handler("suspect")
    def suspect(payload: int) -> None:
        enter("suspect")
        until(lambda: queue.stats()["processing"] == 1)
        leave("suspect")

    @handler("note")
    def note(payload: int) -> None:
        enter("note")
        leave("note")

    suspects = queue.enqueue_many("suspect", range(2))
    for _ in range(2):
        lost = queue.register(["default"], 2)
        assert len(queue.dequeue(lost, ["default"], 2)) == 2
        lapse(queue, lost)
        assert queue.reap(lost) == 2
    first = raw(queue).rpop(queue.keys.jobs("default"), 2)
    queue.enqueue_many("note", range(100))
    raw(queue).lpush(queue.keys.jobs("default"), *first)
    queue.enqueue_many("note", range(100, 200))
    work(queue, slots=4)
    until(lambda: queue.stats()["completed"] == 202)
    assert beside == [["suspect"], ["suspect"]]
    assert {found(queue, job).attempts for job in suspects} == {1}


@pytest.mark.parametrize("mode", ["drain", "release"])
def test_stop_during_exchanges_loses_no_job(queue: Queue, work: Any, mode: StopMode) -> None:
    notes = Notes()
    jobs = queue.enqueue_many("note", range(1000))
    stops = 8
    for n in range(stops):
        running = work(queue, slots=4)
        until(lambda n=n: len(notes.began) > 30 * n)
        assert running.end(mode) == 0
        assert queue.stats()["processing"] == 0
        assert queue.workers() == []
    assert work(queue, burst=True, slots=4).end() == 0
    stored = [found(queue, job) for job in jobs]
    assert {job.status for job in stored} == {"completed"}
    assert queue.stats()["total"]["completed"] == 1000
    assert all(notes.ran[job.payload] <= job.attempts + job.refunds for job in stored)
    if mode == "drain":
        assert notes.ran == dict.fromkeys(range(1000), 1)


def test_pause_during_exchanges_takes_effect_in_time(queue: Queue, work: Any, echo: None) -> None:
    notes = Notes()
    for n in range(3):
        queue.enqueue_many("note", range(1000 * n, 1000 * n + 1000))
    work(queue, "default", "other", slots=4)
    until(lambda: len(notes.began) > 50)
    queue.pause("default")
    paused_at = time.monotonic()
    until(lambda: queue.stats()["processing"] == 0)
    assert until_ended(queue, queue.enqueue("echo", 1, queue="other")).status == "completed"
    ran = len(notes.began)
    assert ran < 3000, "all jobs had run before the pause"
    assert notes.began[-1] - paused_at < 1.0  # PAUSE_AGE, and then some for a slow machine
    assert until_ended(queue, queue.enqueue("echo", 1, queue="other")).status == "completed"
    assert len(notes.began) == ran
    queue.resume("default")
    until(lambda: queue.stats()["completed"] == 3002)
    assert notes.ran == dict.fromkeys(range(3000), 1)


def test_reap_during_exchanges_repeats_only_the_jobs_that_ran(queue: Queue, server: Server, work: Any) -> None:
    notes = Notes()
    jobs = queue.enqueue_many("note", range(1000))
    running = work(server.queue(lease=1), slots=4)
    until(lambda: len(notes.began) > 50)
    old = running.worker.id
    reap_alive(queue, running)
    until(lambda: queue.stats()["completed"] == 1000)
    assert running.worker.id not in ("", old)
    stored = [found(queue, job) for job in jobs]
    assert {job.payload: job.attempts + job.suspicions for job in stored} == notes.ran
    assert queue.stats()["total"] == {"completed": 1000, "failed": 0, "cancelled": 0}
    assert running.end("drain") == 0
    assert queue.workers() == []


# Burst ----------------------------------------------------------------------------------------------------------------


def test_burst_exits_when_all_jobs_have_run(queue: Queue, work: Any, echo: None) -> None:
    queue.enqueue_many("echo", range(20))
    assert work(queue, slots=3, burst=True).end() == 0
    assert queue.stats()["completed"] == 20
    assert queue.workers() == []


def test_burst_exits_at_once_when_no_job_is_due(queue: Queue, work: Any) -> None:
    assert work(queue, burst=True).end() == 0


def test_burst_runs_the_jobs_that_handlers_enqueue(queue: Queue, work: Any) -> None:
    @handler("countdown")
    def countdown(payload: int) -> None:
        if payload:
            queue.enqueue("countdown", payload - 1)

    queue.enqueue("countdown", 10)
    assert work(queue, slots=2, burst=True).end() == 0
    assert queue.stats()["completed"] == 11


def test_burst_waits_for_running_jobs(queue: Queue, work: Any, gates: Any) -> None:
    gate = gates()

    @handler("parent")
    def parent(payload: int) -> None:
        gate.opened.wait()
        queue.enqueue("child", 1)

    @handler("child")
    def child(payload: int) -> None: ...

    queue.enqueue("parent", 0)
    running = work(queue, slots=3, burst=True)
    until(lambda: queue.stats()["processing"] == 1)
    gate.opened.set()
    assert running.end() == 0
    assert queue.stats()["completed"] == 2


def test_burst_leaves_jobs_that_are_not_due(queue: Queue, work: Any, echo: None) -> None:
    later, now = queue.enqueue("echo", 1, delay=3600), queue.enqueue("echo", 2)
    assert work(queue, burst=True).end() == 0
    assert until_ended(queue, now).status == "completed"
    assert found(queue, later).status == "pending"


@pytest.mark.parametrize("rate", ["5/second", "5/hour"])
def test_burst_goes_on_while_a_rate_has_room_soon(queue: Queue, work: Any, rate: str) -> None:
    @handler("paced", rate=rate)
    def paced(payload: int) -> None: ...

    queue.enqueue_many("paced", list(range(12)))
    assert work(queue, slots=2, burst=True).end() == 0
    assert queue.stats()["completed"] == (12 if rate == "5/second" else 5)


def test_burst_runs_a_job_that_another_worker_is_promoting(queue: Queue, work: Any, echo: None) -> None:
    job = queue.enqueue("echo", 1, delay=0.001)
    until(lambda: queue.now() > job.run_at)
    raw(queue).set(queue.keys.promoter, "1", px=1000)  # another has the lock and has not moved the job yet
    assert work(queue, burst=True).end() == 0
    assert found(queue, job).status == "completed"


def test_burst_runs_a_job_that_a_failed_exchange_took_while_it_looked_for_jobs(
    near: Queue, real: Server, proxy: CutProxy, work: Any, gates: Any, *, echo: None
) -> None:
    gate = gates()
    first = near.enqueue("gate", 0)
    running = work(real.queue(proxy.url), slots=2, burst=True)
    until(lambda: gate.started)
    looking: list[int] = []
    go_on = threading.Event()

    def block() -> None:
        looking.append(1)
        go_on.wait(10)

    for _ in range(2):  # the keeper promotes jobs too
        proxy.before(b"ZRANGEBYSCORE", block)
    until(lambda: len(looking) == 2)
    second = near.enqueue("echo", 1)
    proxy.drop_request(second.id.encode())  # after it was taken
    gate.opened.set()
    until_ended(near, first)
    until(lambda: not running.worker.held)
    go_on.set()
    assert running.end() == 0
    assert found(near, second).status == "completed"


# Timeouts -------------------------------------------------------------------------------------------------------------


def test_timeout_raises_an_exception_in_the_handler(queue: Queue, work: Any) -> None:
    cleaned = []

    @handler("endless", timeout=0.05, max_attempts=1)
    def endless(payload: Any) -> None:
        try:
            while True:
                try:
                    time.sleep(0.001)
                except Exception:
                    cleaned.append("never")
        finally:
            cleaned.append("up")

    job = queue.enqueue("endless", None)
    work(queue)
    ended = until_ended(queue, job)
    assert ended.error
    assert (ended.status, ended.error.type, cleaned) == ("failed", "TimedOut", ["up"])
    assert ended.error.message == "the handler exceeded its timeout"
    assert "in endless" in ended.error.traceback


def test_timeout_is_retried_like_any_failure(queue: Queue, work: Any) -> None:
    @handler("slow", timeout=0.05, max_attempts=3, backoff=0.01)
    def slow(payload: Any, job: Job) -> int:
        while job.attempts < 3:
            time.sleep(0.001)
        return job.attempts

    job = queue.enqueue("slow", None)
    work(queue, slots=1)
    assert until_ended(queue, job).result == 3


def test_timeout_that_a_handler_catches_is_no_failure_if_it_returns(queue: Queue, work: Any, echo: None) -> None:
    @handler("stubborn", timeout=0.05, max_attempts=1)
    def stubborn(payload: Any) -> str:
        try:
            while True:
                time.sleep(0.001)
        except TimedOut:
            return "finished"

    job, after = queue.enqueue("stubborn", None), queue.enqueue("echo", 1)
    work(queue, slots=1)
    assert until_ended(queue, job).result == "finished"
    assert until_ended(queue, after).status == "completed"


def test_timeout_that_a_handler_ignores_abandons_its_thread(
    queue: Queue, work: Any, gates: Any, echo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_slot, "GRACE", 0.1)
    stop_now = gates("unused").opened

    @handler("deaf", timeout=0.05, max_attempts=1)
    def deaf(payload: Any) -> str:
        while not stop_now.is_set():
            try:
                time.sleep(0.001)
            except TimedOut:
                continue
        return "too late"

    job = queue.enqueue("deaf", None)
    work(queue, slots=2)
    ended = until_ended(queue, job)
    assert ended.error
    assert (ended.status, ended.error.type) == ("failed", "TimedOut")
    stop_now.set()
    assert until_ended(queue, queue.enqueue("echo", 1)).status == "completed"
    assert until_ended(queue, job).result is None


def test_timeout_of_a_stuck_handler_replaces_its_slot(
    queue: Queue, work: Any, gates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_slot, "GRACE", 0.1)
    stuck, gate = gates("stuck", timeout=0.05, max_attempts=1), gates()
    job = queue.enqueue("stuck", None)
    running = work(queue, slots=2)
    assert until_ended(queue, job).status == "failed"
    queue.enqueue_many("gate", range(3))
    until(lambda: len(gate.started) == 2)
    stuck.opened.set()  # its thread ends and does not become a third slot
    time.sleep(0.05)
    assert len(gate.started) == 2
    gate.opened.set()
    until(lambda: queue.stats()["completed"] == 3)
    assert running.end("drain") == 0


def test_timeout_of_too_many_stuck_handlers_stops_the_worker(
    queue: Queue, work: Any, gates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_slot, "GRACE", 0.1)
    gate, _ = gates(), gates("stuck", timeout=0.05, max_attempts=1)
    running = work(queue, slots=2)
    assert until_ended(queue, queue.enqueue("stuck", 1)).status == "failed"
    other = queue.enqueue("gate", "other")
    until(lambda: gate.started)
    second = queue.enqueue("stuck", 2)
    assert running.end() == EXIT_BROKEN
    assert until_ended(queue, second).status == "failed"
    left = found(queue, other)
    assert (left.status, left.attempts, queue.workers()) == ("pending", 0, [])


def test_timeout_leaves_no_lock_of_the_queue_taken(
    near: Queue, work: Any, echo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Handlers are timed out while they report progress and submit jobs, which takes connections."""
    monkeypatch.setattr(worker, "TICK", 0.001)

    @handler("busy", timeout=0.001, max_attempts=1)
    def busy(payload: int, job: Job) -> None:
        while True:
            near.write_progress(job)
            near.get(job.id)

    near.enqueue_many("busy", range(150))
    running = work(near, slots=4, watchdog=10)
    until(lambda: near.stats()["failed"] == 150, 60)
    assert {job.error and job.error.type for job in newest(near, "failed", 200)} == {"TimedOut"}
    assert len(near.pool._in_use_connections) + len(near.pool._available_connections) <= 4 + 4 + 3
    assert until_ended(near, near.enqueue("echo", 1)).status == "completed"
    assert running.end("drain") == 0


def test_timeout_of_handlers_that_log_leaves_no_lock_of_logging_taken(
    near: Queue, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to Python 3.12, logging takes its locks in a way that an exception can break."""
    monkeypatch.setattr(worker, "TICK", 0.001)
    own = logging.getLogger("own")
    own.propagate = False
    own.addHandler(logging.FileHandler(os.devnull))

    @handler("loud", timeout=0.001, max_attempts=1)
    def loud(payload: int) -> None:
        while True:
            own.warning("said")
            logging.getLogger(f"new.{payload}").isEnabledFor(logging.DEBUG)

    near.enqueue_many("loud", range(300))
    running = work(near, slots=4)
    until(lambda: near.stats()["failed"] == 300, 60)
    last = threading.Thread(target=own.warning, args=("last",), daemon=True)
    last.start()
    last.join(10)
    assert not last.is_alive()
    assert running.end("drain") == 0
    own.handlers[0].close()
    own.handlers.clear()


def test_timeout_of_a_handler_that_waits_for_an_event_is_raised(queue: Queue, work: Any) -> None:
    never = threading.Event()

    @handler("waits", timeout=0.05, max_attempts=1)
    def waits(payload: Any) -> None:
        while not never.wait(0.02):
            pass

    job = queue.enqueue("waits", None)
    work(queue)
    ended = until_ended(queue, job, 2)
    assert ended.error
    assert ended.error.type == "TimedOut"


def test_timeout_during_a_call_of_the_queue_is_raised_after_it(near: Queue, work: Any) -> None:
    steps = []

    @handler("asks", timeout=0.05, max_attempts=1)
    def asks(payload: Any) -> None:
        other = near.enqueue("nobody", 1, queue="unserved")
        steps.append(near.wait_for(other.id, 0.3))
        steps.append("reached only if the call was not interrupted")

    job = near.enqueue("asks", None)
    work(near)
    ended = until_ended(near, job, 5)
    assert ended.error
    assert ended.error.type == "TimedOut"
    assert steps == []
    near.cancel(newest(near, "pending")[0].id)


def test_timeout_never_interrupts_the_next_job(queue: Queue, work: Any, echo: None) -> None:
    """Handlers return at about the time at which their timeout is raised."""
    durations = [0.018 + n * 0.0005 for n in range(30)]

    @handler("close", timeout=0.02, max_attempts=1)
    def close(payload: float) -> str:
        time.sleep(payload)
        return "in time"

    jobs = [job for seconds in durations for job in (queue.enqueue("close", seconds), queue.enqueue("echo", 1))]
    running = work(queue, slots=2)
    for job in jobs:
        ended = until_ended(queue, job)
        if job.type == "echo":
            assert ended.status == "completed"
        else:
            assert ended.result == "in time" or (ended.error and ended.error.type == "TimedOut")
    assert running.end("drain") == 0


# Stopping -------------------------------------------------------------------------------------------------------------


def test_drain_lets_jobs_finish_and_takes_no_more(queue: Queue, work: Any, gates: Any, echo: None) -> None:
    gate = gates()
    job, left = queue.enqueue("gate", "done"), queue.enqueue("echo", 1)
    running = work(queue, slots=1)
    until(lambda: gate.started)
    running.stop("drain")
    until(running.worker.stopping.is_set)
    late = queue.enqueue("echo", 2)
    running.stop("drain")
    gate.opened.set()
    assert running.end() == 0
    ended = until_ended(queue, job)
    assert (ended.result, ended.attempts) == ("done", 1)
    assert [(found(queue, job).status, found(queue, job).refunds) for job in (left, late)] == [
        ("pending", 0),
        ("pending", 0),
    ]
    assert queue.workers() == []


def test_drain_releases_jobs_when_time_is_up(queue: Queue, work: Any, gates: Any) -> None:
    gate = gates()
    job = queue.enqueue("gate", 0)
    running = work(queue, slots=1, drain=0.2)
    until(lambda: gate.started)
    queue.enqueue("gate", 1)
    assert running.end("drain") == 0
    left = found(queue, job)
    assert (left.status, left.attempts, left.refunds, left.error) == ("pending", 0, 1, None)
    assert raw(queue).lrange(queue.keys.jobs("default"), -1, -1) == [job.id.encode()]
    assert queue.workers() == []


def test_release_requeues_jobs_at_once(queue: Queue, work: Any, gates: Any) -> None:
    gate = gates()
    jobs = queue.enqueue_many("gate", range(2))
    running = work(queue, slots=2, drain=3600)
    until(lambda: len(gate.started) == 2)
    running.stop("drain")
    until(running.worker.stopping.is_set)
    assert running.end("release") == 0
    assert {(left.status, left.attempts) for left in (found(queue, job) for job in jobs)} == {("pending", 0)}


def test_release_restores_the_order_of_the_queue(queue: Queue, work: Any, gates: Any) -> None:
    first, gate = gates("first"), gates()
    done, *jobs = [queue.enqueue("first", 0), *queue.enqueue_many("gate", range(5))]
    running = work(queue, slots=3)
    until(lambda: len(gate.started) == 2)
    first.opened.set()  # then the slots are in another order than the jobs
    until_ended(queue, done)
    until(lambda: len(gate.started) == 3)
    assert running.end("release") == 0
    waiting = raw(queue).lrange(queue.keys.jobs("default"), 0, -1)
    assert [id.decode() for id in reversed(waiting)] == [job.id for job in jobs]


def test_release_ignores_the_later_outcome_of_the_handler(queue: Queue, work: Any, gates: Any) -> None:
    gate = gates()
    job = queue.enqueue("gate", 0)
    running = work(queue, slots=1)
    until(lambda: gate.started)
    assert running.end("release") == 0
    gate.opened.set()
    second = work(queue, slots=1)
    assert until_ended(queue, job).attempts == 1
    assert second.end("drain") == 0
    assert queue.stats()["total"] == {"completed": 1, "failed": 0, "cancelled": 0}


def test_drain_of_an_idle_worker_deregisters_it(queue: Queue, work: Any) -> None:
    running = work(queue)
    until(lambda: running.worker.id)
    assert running.end("drain") == 0
    assert queue.workers() == []


def test_drain_of_an_idle_worker_does_not_wait_for_the_bell(
    near: Queue, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "BLOCK", 3.5)
    running = work(near)
    until(lambda: any(client["cmd"] == "blpop" for client in raw(near).client_list()))
    began = time.monotonic()
    assert running.end("drain") == 0
    assert time.monotonic() - began < 2
    assert near.workers() == []
    near.enqueue("echo", 1)
    until(lambda: not any(client["cmd"] == "blpop" for client in raw(near).client_list()))
    assert near.stats()["pending"] == near.waiting(["default"]) == 1


def test_drain_deregisters_a_worker_whose_heartbeat_is_on_its_way(
    near: Queue, real: Server, proxy: CutProxy, work: Any
) -> None:
    """It must not renew the lease between the two steps of the deregistration."""
    sent = threading.Event()
    go_on = threading.Event()

    def hold() -> None:
        sent.set()
        go_on.wait(10)

    proxy.before(b'{"at":', hold)
    running = work(real.queue(proxy.url))
    assert sent.wait(10)
    [about] = near.workers()
    lease, registration = near.keys.lease(about["id"]), near.keys.worker(about["id"])

    def renewed() -> None:
        go_on.set()
        with suppress(AssertionError):
            until(lambda: raw(near).exists(lease), 0.3)

    proxy.before(f"WATCH\r\n${len(registration)}\r\n{registration}".encode(), renewed)
    running.stop("drain")
    with suppress(AssertionError):
        until(lambda: not raw(near).exists(lease), 0.2)
    go_on.set()
    assert running.end() == 0
    assert near.workers() == []


def test_drain_before_the_worker_has_started_succeeds(queue: Queue, work: Any) -> None:
    assert work(queue).end("drain") == 0


def test_drain_while_a_job_arrives_loses_nothing(queue: Queue, work: Any) -> None:
    ran: Counter[int] = Counter()

    @handler("note")
    def note(payload: int) -> None:
        ran[payload] += 1

    for n in range(8):
        running = work(queue, slots=2)
        until(lambda running=running: running.worker.id)
        request = threading.Timer(n * 0.001, running.stop, ("drain",))
        request.start()
        queue.enqueue("note", n)
        assert running.end() == 0
        request.join()
        assert queue.stats()["processing"] == 0
    assert work(queue, burst=True).end() == 0
    assert ran == dict.fromkeys(range(8), 1)


def test_drain_saves_an_outcome_that_came_during_a_take_that_failed(
    near: Queue, real: Server, proxy: CutProxy, work: Any, gates: Any
) -> None:
    """The slot could not save it, because the taker was busy. The taker must leave it to somebody when it ends."""
    gate = gates()
    job = near.enqueue("gate", 0)
    running = work(real.queue(proxy.url), slots=2)
    until(lambda: gate.started)

    def meanwhile() -> None:
        gate.opened.set()
        until(lambda: running.worker.outcomes)
        running.stop("drain")
        until(running.worker.stopping.is_set)

    proxy.drop_request(b"RPOPLPUSH", meanwhile)
    left = near.enqueue("gate", 1)
    assert running.end() == 0
    assert (until_ended(near, job).attempts, found(near, left).status) == (1, "pending")


def test_release_saves_an_outcome_that_came_during_a_take_that_hangs(
    near: Queue, real: Server, proxy: CutProxy, work: Any, gates: Any
) -> None:
    gate = gates()
    job = near.enqueue("gate", 0)
    running = work(real.queue(proxy.url), slots=2)
    until(lambda: gate.started)
    proxy.hold(b"RPOPLPUSH", cut=False)
    near.enqueue("gate", 1)
    until(lambda: proxy.idle)
    gate.opened.set()
    until(lambda: running.worker.outcomes)
    assert running.end("release") == 0
    assert until_ended(near, job).attempts == 1


# Lost leases ----------------------------------------------------------------------------------------------------------


# The lease is short here. A worker may learn only when it takes a job that it was reaped. It has
# then moved that job into its old list, and the job is requeued when that list is reaped again.


def test_reap_of_a_live_worker_drops_its_outcome_and_it_registers_again(
    queue: Queue, server: Server, work: Any, gates: Any
) -> None:
    gate = gates()
    job = queue.enqueue("gate", 0)
    running = work(server.queue(lease=1), slots=1)
    until(lambda: gate.started)
    old = running.worker.id
    reap_alive(queue, running)
    gate.opened.set()
    ended = until_ended(queue, job)
    assert (ended.status, ended.attempts, gate.attempts) == ("completed", 2, [1, 2])
    assert queue.stats()["total"]["completed"] == 1
    assert running.worker.id != old
    assert running.end("drain") == 0
    assert queue.workers() == []


def test_reap_of_a_live_worker_lets_another_complete_its_job(
    queue: Queue, server: Server, work: Any, gates: Any, echo: None
) -> None:
    gate = gates()
    job = queue.enqueue("gate", 0)
    first = work(server.queue(lease=2), slots=1)
    until(lambda: gate.started)
    reap_alive(queue, first)
    second = work(server.queue(lease=2), slots=1)
    until(lambda: len(gate.started) == 2)
    gate.opened.set()
    ended = until_ended(queue, job)
    assert (ended.attempts, gate.attempts) == (2, [1, 2])
    assert until_ended(queue, queue.enqueue("echo", 1)).status == "completed"
    assert (first.end("drain"), second.end("drain")) == (0, 0)
    assert queue.stats()["total"]["completed"] == 2


def test_reap_of_a_live_worker_logs_its_job_as_lost(
    queue: Queue, server: Server, work: Any, gates: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    gate = gates()
    job = queue.enqueue("gate", 0)
    running = work(queue, slots=1)  # its heartbeat is rare: it learns only when it saves the outcome
    until(lambda: gate.started)
    reap_alive(queue, running)
    work(server.queue(), slots=1)
    until(lambda: len(gate.started) == 2)
    gate.opened.set()
    until_ended(queue, job)
    assert running.end("drain") == 0
    line = rf"job {job.id} \(gate\) %s in \d+ ms, attempt 1/3"
    assert re.search(line % "lost", caplog.text)
    assert not re.search(line % "completed", caplog.text)


def test_reap_of_an_idle_worker_makes_it_register_again(queue: Queue, server: Server, work: Any, echo: None) -> None:
    running = work(server.queue(lease=1))
    old = until(lambda: running.worker.id)
    reap_alive(queue, running)
    until(lambda: running.worker.id not in ("", old))
    assert until_ended(queue, queue.enqueue("echo", 1)).status == "completed"


def test_reap_spares_workers_that_could_not_renew_their_lease_during_a_hang(
    near: Queue, real: Server, proxy: CutProxy, work: Any, echo: None
) -> None:
    worker = near.register(["default"], 1)
    job = near.enqueue("echo", 1)
    near.dequeue(worker, ["default"])
    far = real.queue(proxy.url, lease=1)
    work(far)
    until(lambda: time.monotonic() - far.last_trouble > far.lease)
    proxy.flowing.clear()
    time.sleep(0.7 * far.lease)  # the time itself is under test: a lease could have been renewed in it
    lapse(near, worker)
    proxy.packets.clear()
    proxy.flowing.set()
    reads = near.keys.lease(worker).encode()
    until(lambda: sum(reads in packet for packet in tuple(proxy.packets)) >= 2 or found(near, job).worker != worker)
    assert found(near, job).worker == worker
    near.heartbeat(worker)
    near.complete(found(near, job))


def test_reap_of_a_live_worker_raises_in_set_progress(queue: Queue, server: Server, work: Any, gates: Any) -> None:
    gate = gates()
    errors = []

    @handler("steps")
    def steps(payload: Any, job: Job) -> None:
        if job.attempts == 1:
            gate.started.append(job)
            gate.opened.wait()
            try:
                job.set_progress(0.5)
            except Reaped as error:
                errors.append(error)
                raise

    job = queue.enqueue("steps", None)
    running = work(server.queue(lease=1), slots=1)
    until(lambda: gate.started)
    reap_alive(queue, running)
    gate.opened.set()
    assert until_ended(queue, job).attempts == 2
    assert len(errors) == 1


# Faults ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["idle", "busy"])
def test_watchdog_does_not_stop_a_healthy_worker(near: Queue, work: Any, gates: Any, echo: None, kind: str) -> None:
    gate = gates()
    if kind == "busy":
        near.enqueue("gate", 0)
    running = work(near, slots=1, watchdog=1)
    began = time.monotonic()
    until(lambda: time.monotonic() > began + 1.6)
    assert running.code is None
    gate.opened.set()
    assert until_ended(near, near.enqueue("echo", 1)).status == "completed"


def test_watchdog_stops_a_worker_that_cannot_take_jobs(server: Server, work: Any) -> None:
    queue = server.queue()
    raw(queue).set(queue.keys.jobs("default"), "not a list")
    assert work(queue, watchdog=0.5).end() == EXIT_BROKEN


def test_watchdog_stops_a_worker_that_cannot_save_outcomes(
    server: Server, work: Any, echo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LAST_WRITE", 0.3)
    ran: list[int] = []

    @handler("note")
    def note(payload: int) -> None:
        ran.append(payload)

    queue = server.queue()
    queue.enqueue_many("note", range(1000))
    raw(queue).set(queue.keys.awaited, "not a set")
    running = work(queue, slots=2, watchdog=1)
    assert running.end() == EXIT_BROKEN
    assert len(ran) <= 2 + worker.UNSETTLED


def test_watchdog_stops_a_worker_whose_keeper_hangs(
    near: Queue, far: Queue, proxy: CutProxy, *, work: Any, echo: None, caplog: pytest.LogCaptureFixture
) -> None:
    running = work(far, watchdog=1)
    until(lambda: running.worker.id)
    proxy.swallow(b":delayed")  # an idle worker looks there only to promote
    until(lambda: proxy.idle)
    job = until_ended(near, near.enqueue("echo", 1))
    assert (job.status, running.code) == ("completed", None)
    assert running.end() == EXIT_BROKEN
    assert "no heartbeat and no other upkeep for 1 s; shutting down" in caplog.text


def test_watchdog_stops_a_worker_without_redis(start_redis: Callable[..., RedisServer], work: Any) -> None:
    redis = start_redis()
    running = work(Queue.from_url(redis.url), watchdog=0.5)
    until(lambda: running.worker.id)
    redis.kill()
    assert running.end() == EXIT_BROKEN


def test_drain_without_redis_exits_with_1_for_unsaved_outcomes(
    start_redis: Callable[..., RedisServer], work: Any, gates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LAST_WRITE", 0.3)
    redis = start_redis()
    gate = gates()
    queue = Queue.from_url(redis.url)
    queue.enqueue("gate", 0)
    running = work(queue, drain=0.3)
    until(lambda: gate.started)
    redis.kill()
    gate.opened.set()
    assert running.end("drain") == 1


def test_settle_waits_until_redis_has_memory_again(
    start_redis: Callable[..., RedisServer], work: Any, gates: Any, caplog: pytest.LogCaptureFixture
) -> None:
    gate = gates()
    queue = Queue.from_url(start_redis().url)
    jobs = queue.enqueue_many("gate", range(4))
    running = work(queue, slots=2)
    until(lambda: len(gate.started) == 2)
    raw(queue).config_set("maxmemory", 1)
    gate.opened.set()
    until(lambda: "cannot save outcomes: Redis is unavailable (full)" in caplog.text)
    assert queue.stats()["processing"] == 2
    raw(queue).config_set("maxmemory", 0)
    assert [until_ended(queue, job).attempts for job in jobs] == [1, 1, 1, 1]
    assert running.end("drain") == 0


def test_wait_on_a_dead_connection_times_out(
    near: Queue, real: Server, proxy: CutProxy, work: Any, echo: None, *, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_redis, "SOCKET_TIMEOUT", 0.5)
    running = work(real.queue(proxy.url), slots=1)
    until(lambda: running.worker.id)
    proxy.swallow(b"BLPOP")
    until(lambda: proxy.idle)
    job = near.enqueue("echo", 1)
    assert until_ended(near, job, 15).attempts == 1


PACKETS = {"take": b"RPOPLPUSH", "start": b"MSET", "settle": b"{queue}:completed"}


@pytest.mark.parametrize("fault", ["drop_reply", "drop_request", "hold"])
@pytest.mark.parametrize("packet", PACKETS)
def test_lose_packets_without_losing_or_repeating_jobs(
    near: Queue, real: Server, proxy: CutProxy, work: Any, *, packet: str, fault: str
) -> None:
    ran: Counter[int] = Counter()

    @handler("note")
    def note(payload: int) -> None:
        ran[payload] += 1  # no lock, because each number has one thread unless there is a bug

    work(real.queue(proxy.url, lease=3), slots=3)
    jobs = []
    for n in range(5):
        getattr(proxy, fault)(PACKETS[packet])
        jobs += near.enqueue_many("note", range(20 * n, 20 * n + 20))
        until(lambda: proxy.idle)
        until_ended(near, jobs[-20])
        proxy.deliver()
    assert {until_ended(near, job).attempts for job in jobs} == {1}
    assert ran == dict.fromkeys(range(100), 1)


REFUSALS = {
    "loading": b"-LOADING Redis is loading the dataset in memory\r\n",
    "full": b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
    "read-only": b"-READONLY You can't write against a read only replica.\r\n",
    "refused": b"-NOAUTH Authentication required.\r\n",
    "busy": b"-BUSY Redis is busy running a script.\r\n",
}


@pytest.mark.parametrize("packet", PACKETS)
@pytest.mark.parametrize("reason", REFUSALS)
def test_refuse_commands_until_the_worker_repeats_them(
    near: Queue, real: Server, proxy: CutProxy, work: Any, echo: None, *, packet: str, reason: str
) -> None:
    proxy.answer(PACKETS[packet], REFUSALS[reason])
    work(real.queue(proxy.url), slots=1)
    jobs = near.enqueue_many("echo", range(3))
    assert {until_ended(near, job).attempts for job in jobs} == {1}
    until(lambda: proxy.idle)


def test_take_recovers_when_a_corrupted_list_is_deleted(
    queue: Queue, work: Any, echo: None, caplog: pytest.LogCaptureFixture
) -> None:
    raw(queue).set(queue.keys.jobs("default"), "not a list")
    work(queue)
    until(lambda: "cannot take jobs" in caplog.text)
    raw(queue).delete(queue.keys.jobs("default"))
    assert until_ended(queue, queue.enqueue("echo", 1)).status == "completed"


@pytest.mark.parametrize("key", ["completed", "counts", "delayed", "paused", "minute"])
def test_complete_with_a_corrupted_key_elsewhere_succeeds(server: Server, work: Any, echo: None, key: str) -> None:
    queue = server.queue()
    job = queue.enqueue("echo", 1)
    minutes = [queue.keys.minute(queue.now() + n * 60_000) for n in (0, 1)]
    others = {"completed": queue.keys.ended["completed"], "counts": queue.keys.counts}
    others |= {"delayed": queue.keys.delayed, "paused": queue.keys.paused}
    for name in minutes if key == "minute" else [others[key]]:
        raw(queue).set(name, "wrong")
    running = work(queue, slots=1)
    ended = until_ended(queue, job)
    assert (ended.status, ended.attempts) == ("completed", 1)
    assert running.end("drain") == 0


def test_reap_with_a_corrupted_set_of_workers_does_not_stop_the_worker(server: Server, work: Any, echo: None) -> None:
    queue = server.queue()
    raw(queue).sadd(queue.keys.workers, b"\xff\xfe", "no-such-worker")
    running = work(server.queue(lease=0.1))  # then it soon checks for dead workers
    until(lambda: running.code is not None or not raw(queue).sismember(queue.keys.workers, "no-such-worker"), 5)
    assert running.code is None
    assert until_ended(queue, queue.enqueue("echo", 1), 5).status == "completed"
