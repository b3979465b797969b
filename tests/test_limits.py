"""Limits: how many jobs run at a time and start in a period. No job without room delays another."""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import pytest
from click.testing import CliRunner
from client import Client
from conftest import NoBar, RedisServer, Server, check_consistency, lapse, newest, raw

import worker as worker_module
from tinyqueue import (
    AHEAD,
    HANDLERS,
    LOOK,
    Failure,
    Filter,
    InvalidJob,
    Job,
    KeyReused,
    Once,
    Outcome,
    Override,
    Queue,
    RateLimited,
    handler,
)
from tinyqueue_backup import BackupError, back_up, restore
from tinyqueue_config import Settings
from tinyqueue_shards import AnyQueue, Shards
from worker import Worker

BOOM = Failure("Boom", "it broke")


@pytest.fixture(autouse=True)
def declared(no_handlers: None) -> None:
    """Declare two limits at a time, one for each account, and five starts in a second."""

    @handler("charge", max_running=2)
    def charge(payload: object) -> None: ...

    @handler("bill", max_running=1, limit_by="account")
    def bill(payload: dict[str, object]) -> None: ...

    @handler("sync", rate="5/second")
    def sync(payload: object) -> None: ...

    @handler("plain")
    def plain(payload: object) -> None: ...


@pytest.fixture
def worker(queue: Queue) -> str:
    return queue.register(["default", "other"], 10)


def ids(jobs: list[Job]) -> list[str]:
    return [job.id for job in jobs]


def start(queue: Queue, worker: str, most: int = 10) -> list[Job]:
    return queue.dequeue(worker, ["default", "other"], most)


def held(queue: Queue, limit: str) -> list[str]:
    return [entry.decode().partition(":")[2] for entry in raw(queue).zrange(queue.keys.held(limit), 0, -1)]


def look(queue: Queue, after: int = LOOK + 1000) -> None:
    """Let the time of the next look come, and promote."""
    queue.clock.ahead += after
    queue.promote()


# Jobs at a time -------------------------------------------------------------------------------------------------------


def test_start_as_many_jobs_as_the_limit_allows_and_hold_the_others(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("charge", [1, 2, 3, 4])
    other = queue.enqueue("plain", 1)
    assert ids(start(queue, worker)) == [*ids(jobs[:2]), other.id]
    assert held(queue, "charge") == ids(jobs[2:])
    assert [job.status for job in map(queue.get, ids(jobs))] == ["processing"] * 2 + ["pending"] * 2
    assert queue.get(jobs[2].id).attempts == 0


@pytest.mark.parametrize("verb", ["complete", "fail", "release"])
def test_end_wakes_the_oldest_held_job(queue: Queue, worker: str, verb: str) -> None:
    jobs = queue.enqueue_many("charge", [1, 2, 3, 4])
    started = start(queue, worker)
    queue.settle(worker, [Outcome(started[0], verb, error=BOOM if verb == "fail" else None)])
    oldest = jobs[0] if verb == "release" else jobs[2]
    assert ids(start(queue, worker)) == [oldest.id]
    assert held(queue, "charge") == [job.id for job in jobs[2:] if job.id != oldest.id]


def test_reap_wakes_held_jobs(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("charge", [1, 2, 3])
    start(queue, worker)
    lapse(queue, worker)
    queue.reap(worker)
    other = queue.register(["default"], 10)
    assert len(start(queue, other)) == 2
    assert held(queue, "charge") == [jobs[2].id]


def test_held_jobs_start_in_order(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("bill", [{"account": "a"}] * 30)
    order: list[str] = []
    while started := start(queue, worker, 3):
        assert len(started) == 1
        order += ids(started)
        queue.complete(started[0])
    assert order == ids(jobs)


def test_each_value_of_the_field_has_a_limit_of_its_own(queue: Queue, worker: str) -> None:
    values = ["a", "b", "a", 5, None, "with space", "x" * 65, "b"]
    jobs = [queue.enqueue("bill", {"account": value}) for value in values]
    assert ids(start(queue, worker)) == [jobs[at].id for at in (0, 1, 3, 4, 5, 6)]
    limits = [queue.get(job.id).limit for job in jobs]
    assert limits[:5] == ["bill/a", "bill/b", "bill/a", "bill/5", "bill/null"]
    assert all(len(limit) == len("bill/") + 32 for limit in limits[5:7])
    assert limits[5] != limits[6]


def test_exchange_starts_a_job_with_the_room_of_the_one_that_it_settles(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("bill", [{"account": "a"}] * 3)
    [first] = start(queue, worker, 1)
    lost, [second] = queue.exchange(worker, [Outcome(first, "complete")], ["default"], 1, {first.id: first})
    assert (lost, second.id) == ([], jobs[1].id)
    assert (
        queue.exchange(worker, [Outcome(second, "complete")], ["default"], 2, {second.id: second})[1][0].id
        == jobs[2].id
    )


def test_exchange_holds_jobs_without_room(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("bill", [{"account": "a"}] * 3)
    plain = queue.enqueue("plain", 1)
    [first] = start(queue, worker, 1)
    [done] = queue.dequeue(worker, ["default"], 3)
    assert done.id == plain.id
    assert held(queue, "bill/a") == ids(jobs[1:])
    assert queue.exchange(worker, [Outcome(done, "complete")], ["default"], 2, {}) == ([], [])
    queue.complete(first)
    assert ids(start(queue, worker)) == [jobs[1].id]


def test_newcomer_does_not_overtake_a_held_job(queue: Queue, worker: str) -> None:
    first = queue.enqueue_many("charge", [1, 2, 3])
    started = start(queue, worker)
    newcomer = queue.enqueue("charge", 4)
    raw(queue).srem(queue.keys.running("charge"), started[0].id)  # as if a wake-up was lost
    assert ids(start(queue, worker)) == []
    assert ids(start(queue, worker)) == [first[2].id]
    assert held(queue, "charge") == [newcomer.id]
    raw(queue).sadd(queue.keys.running("charge"), started[0].id)


def test_job_submitted_without_the_handler_gets_its_limit_at_the_start(queue: Queue, worker: str) -> None:
    known = HANDLERS.pop("bill")
    jobs = [queue.enqueue("bill", {"account": "a"}) for _ in range(2)]
    assert [job.limit for job in jobs] == ["", ""]
    HANDLERS["bill"] = known
    assert ids(start(queue, worker)) == [jobs[0].id]
    assert [queue.get(job.id).limit for job in jobs] == ["bill/a", "bill/a"]


# What may happen to a held job ----------------------------------------------------------------------------------------


def test_cancel_a_held_job(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("charge", [1, 2, 3, 4])
    start(queue, worker)
    queue.cancel(jobs[2].id)
    assert held(queue, "charge") == [jobs[3].id]
    assert queue.retry(jobs[2].id).status == "pending"


def test_drop_of_a_woken_job_wakes_the_next(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("bill", [{"account": "a"}] * 3)
    [first] = start(queue, worker)
    queue.complete(first)
    queue.cancel(jobs[1].id)
    assert start(queue, worker) == []
    assert ids(start(queue, worker)) == [jobs[2].id]


def test_bulk_cancel_cancels_held_jobs(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("charge", list(range(150)))
    begun = start(queue, worker, 150)
    assert queue.change_many("cancel", Filter("pending", type="charge")) == {
        "cancelled": 148,
        "skipped": 0,
        "cursor": "",
    }
    assert held(queue, "charge") == []
    assert queue.stats()["pending"] == 0
    last = queue.enqueue("charge", 1)
    for job in begun:
        queue.complete(job)
    assert ids(start(queue, worker)) == [last.id]
    assert queue.get(jobs[-1].id).status == "cancelled"


def test_held_job_expires_when_its_turn_comes(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("bill", [{"account": "a"}] * 2, expires_in=5)
    last = queue.enqueue("bill", {"account": "a"})
    [first] = start(queue, worker)
    queue.clock.ahead += 6000
    queue.complete(first)
    assert start(queue, worker) == []
    assert queue.get(jobs[1].id).status == "failed"
    assert ids(start(queue, worker)) == [last.id]


def test_page_lists_held_jobs(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("charge", list(range(150)))
    start(queue, worker, 150)
    assert len(newest(queue, "pending", 200)) == 148
    assert ids(newest(queue, "pending", 1)) == [jobs[-1].id]
    assert queue.stats()["delayed"] == 0


def test_restore_finds_held_jobs_and_restores_lost_ones(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("charge", [1, 2, 3])
    start(queue, worker)
    assert not queue.restore(jobs[2].id)
    raw(queue).delete(queue.keys.held("charge"))
    assert queue.restore(jobs[2].id)


# Looks ----------------------------------------------------------------------------------------------------------------


def test_look_wakes_held_jobs_after_a_wake_up_was_lost(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("charge", list(range(5)))
    one, two = start(queue, worker)
    queue.settle(worker, [Outcome(one, "complete"), Outcome(two, "complete")])
    raw(queue).delete(queue.keys.jobs("default"))  # the woken jobs are lost to this test
    raw(queue).zadd(queue.keys.held("charge"), {f"default:{job.id}": job.created_at for job in jobs[2:4]})
    look(queue)
    assert ids(start(queue, worker)) == ids(jobs[2:4])
    assert held(queue, "charge") == [jobs[4].id]


def test_look_counts_the_woken_jobs_that_nobody_has_taken(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("charge", list(range(6)))
    one, two = start(queue, worker)
    queue.settle(worker, [Outcome(one, "complete"), Outcome(two, "complete")])
    look(queue)
    look(queue)
    assert held(queue, "charge") == ids(jobs[4:])


def test_look_drops_what_does_not_run(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("charge", [1, 2, 3, 4])
    start(queue, worker)
    running = raw(queue).smembers(queue.keys.running("charge"))
    raw(queue).srem(queue.keys.running("charge"), *running)
    raw(queue).sadd(queue.keys.running("charge"), "gone", jobs[3].id)
    look(queue)
    assert held(queue, "charge") == []
    raw(queue).sadd(queue.keys.running("charge"), *running)


def test_limit_that_the_code_no_longer_has_lets_all_go(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("charge", list(range(AHEAD + 50)))
    start(queue, worker, AHEAD + 50)
    del HANDLERS["charge"]

    @handler("charge")
    def charge(payload: object) -> None: ...

    look(queue)
    look(queue, 1000)
    look(queue, 1000)
    assert raw(queue).keys(queue.keys.held("*")) == raw(queue).keys(queue.keys.holding) == []
    assert len(start(queue, worker, 500)) == len(jobs) - 2


def test_type_that_the_code_no_longer_has_leaves_nothing_stuck(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("charge", [1, 2, 3, 4])
    for job in start(queue, worker):
        queue.complete(job)
    del HANDLERS["charge"]
    order = []
    while started := start(queue, worker):
        order += ids(started)
        queue.settle(worker, [Outcome(job, "release", error=BOOM, after=60) for job in started])
    look(queue)
    assert order == ids(jobs[2:])


def declare(type: str, **limit: Any) -> None:
    """Declare a type again, as a deploy of new code does."""
    HANDLERS.pop(type, None)

    @handler(type, **limit)
    def handle(payload: object) -> None: ...


@pytest.mark.parametrize(
    ("limit", "started"), [({"max_running": 5}, 3), ({}, 5), ({"rate": "9/second"}, 5), ({"max_running": 1}, 0)]
)
def test_worker_that_starts_applies_the_limits_of_its_code(
    queue: Queue, worker: str, limit: dict[str, Any], started: int
) -> None:
    jobs = queue.enqueue_many("charge", list(range(7)))
    begun = start(queue, worker)
    declare("charge", **limit)
    new = queue.register(["default"], 10)
    queue.promote()
    assert ids(start(queue, new)) == ids(jobs[2 : 2 + started])
    check_consistency(queue)
    for job in begun:
        queue.complete(job)
    assert raw(queue).scard(queue.keys.running("charge")) == started


def test_worker_that_starts_applies_its_limits_although_one_with_the_code_before_looks_first(
    queue: Queue, server: Server, worker: str
) -> None:
    """As in a rolling deploy, where workers with both versions of the code run."""
    jobs = queue.enqueue_many("charge", list(range(7)))
    start(queue, worker)
    old = server.queue()
    declare("charge", max_running=5)
    new = queue.register(["default"], 10)
    declare("charge", max_running=2)
    old.promote()
    declare("charge", max_running=5)
    queue.promote()
    assert ids(start(queue, new)) == ids(jobs[2:5])


def test_worker_that_starts_has_many_limits_looked_at(queue: Queue, worker: str) -> None:
    jobs = [queue.enqueue("bill", {"account": f"a{at % 150}"}) for at in range(300)]
    start(queue, worker, 300)
    declare("bill", max_running=2, limit_by="account")
    new = queue.register(["default"], 200)
    queue.promote()
    assert sorted(ids(start(queue, new, 200))) == ids(jobs[150:])


def test_resume_of_a_queue_wakes_its_held_jobs(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("charge", [1, 2, 3, 4])
    begun = start(queue, worker)
    queue.pause("default")
    queue.wait(["other"], 0.01)  # reads which queues are paused
    for job in begun:
        queue.complete(job)
    assert held(queue, "charge") == ids(jobs[2:])
    queue.resume("default")
    queue.promote()
    assert ids(start(queue, worker)) == ids(jobs[2:])


def test_removed_value_and_removed_limit_leave_no_key(queue: Queue, worker: str) -> None:
    queue.enqueue_many("bill", [{"account": "a"}] * 3)
    queue.enqueue_many("charge", list(range(4)))
    begun = start(queue, worker)
    declare("bill")
    declare("charge", rate="100/second")
    new = queue.register(["default"], 10)
    for job in (*begun, *start(queue, new)):
        queue.complete(job)
    look(queue)
    assert raw(queue).keys(queue.keys.running("*")) == raw(queue).keys(queue.keys.held("*")) == []
    assert raw(queue).keys(queue.keys.holding) == raw(queue).keys(queue.keys.delayed) == []


# Scaling --------------------------------------------------------------------------------------------------------------


def test_scale_counts_held_jobs_once_a_limit_has_room(queue: Queue, worker: str) -> None:
    queue.enqueue_many("charge", list(range(5)), queue="other")
    one, _ = start(queue, worker)
    assert queue.scale()["ready"] == 0
    raw(queue).srem(queue.keys.running("charge"), one.id)  # as if its end woke none
    queue.clock.ahead += LOOK + 1000
    assert queue.scale()["ready"] == queue.scale(["other"])["ready"] == 1
    assert queue.scale(["other"])["oldestWaitingMs"] > LOOK
    assert queue.scale(["default"])["ready"] == 0
    raw(queue).sadd(queue.keys.running("charge"), one.id)


def test_scale_counts_held_jobs_when_the_rate_opens(queue: Queue, worker: str) -> None:
    queue.enqueue_many("sync", list(range(12)))
    for job in start(queue, worker):
        queue.complete(job)
    start(queue, worker)
    queue.clock.ahead += 900
    assert queue.scale()["ready"] == 0
    queue.clock.ahead += 200
    assert queue.scale()["ready"] == 5
    queue.set_limit("sync", Override(paused=True))
    assert queue.scale()["ready"] == 0


# Starts in a period ---------------------------------------------------------------------------------------------------


def run_all(queue: Queue, workers: list[str], count: int, seconds: float) -> list[int]:
    """Start jobs until all have started, on a clock that is moved by hand. Returns when they started."""
    begun: list[int] = []
    order: list[str] = []
    until = queue.now() + int(seconds * 1000)
    while len(begun) < count and queue.now() < until:
        for worker in workers:
            for job in start(queue, worker, 3):
                begun.append(job.started_at)
                order.append(job.id)
                queue.complete(job)
        if not queue.waiting(["default"]):
            queue.clock.ahead += 5
            if queue.seconds_to_look <= 0:
                queue.promote()
    assert order == sorted(order), "jobs started out of order"
    return begun


def test_rate_allows_so_many_starts_in_any_second(queue: Queue) -> None:
    workers = [queue.register(["default"], 3) for _ in range(4)]
    queue.enqueue_many("sync", list(range(50)))
    since = time.monotonic()
    begun = run_all(queue, workers, 50, 20)
    passed = (time.monotonic() - since) * 1000  # the clock goes on while the test runs
    assert len(begun) == 50
    assert all(later - earlier >= 1000 for earlier, later in zip(begun, begun[5:], strict=False))
    assert 9000 <= begun[-1] - begun[0] <= 9450 + passed


def test_rate_limited_pauses_the_limit_and_refunds_the_attempt(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("charge", [1, 2, 3])
    one, two = start(queue, worker)
    queue.settle(worker, [Outcome(one, "release", error=BOOM, after=30, halt=True)])
    assert start(queue, worker) == []
    queue.complete(two)
    assert start(queue, worker) == []
    assert queue.get(jobs[0].id).attempts == 0
    raw(queue).delete(queue.keys.halt("charge"))
    look(queue, 31_000)
    assert ids(start(queue, worker)) == ids(jobs[:1] + jobs[2:])


@pytest.mark.parametrize("seconds", [1, 15])
def test_halt_ends_when_its_time_has_come(real: Server, seconds: int) -> None:
    queue = real.queue()
    worker = queue.register(["default"], 10)
    jobs = queue.enqueue_many("charge", [1, 2, 3])
    one, two = start(queue, worker)
    queue.settle(worker, [Outcome(one, "release", error=BOOM, after=seconds, halt=True), Outcome(two, "complete")])
    assert start(queue, worker) == []
    while seconds > 9:  # the looks meanwhile
        look(queue, 10_000)
        assert start(queue, worker) == []
        seconds -= 10
    queue.clock.ahead += seconds * 1000
    assert queue.seconds_to_look <= 0
    queue.promote()
    assert ids(start(queue, worker)) == ids(jobs[:1] + jobs[2:])


# For operators --------------------------------------------------------------------------------------------------------


def test_override_raises_lowers_and_pauses_a_limit(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("charge", list(range(8)))
    queue.set_limit("charge", Override(max_running=4))
    first = start(queue, worker)
    assert ids(first) == ids(jobs[:4])
    queue.set_limit("charge", Override(max_running=1))
    for job in first[:3]:
        queue.complete(job)
    assert start(queue, worker) == []
    queue.set_limit("charge", Override(paused=True))
    queue.complete(first[3])
    assert start(queue, worker) == []
    queue.set_limit("charge", Override())
    queue.promote()
    assert ids(start(queue, worker)) == ids(jobs[4:6])


def test_resume_of_a_queue_starts_its_held_jobs_at_once(server: Server, queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("charge", list(range(4)))
    first = start(queue, worker)
    queue.pause("default")
    start(queue, worker)  # notes the pause
    for job in first:
        queue.complete(job)
    assert held(queue, "charge") == ids(jobs[2:])
    other = server.queue()
    other.resume("default")
    queue.promote()
    assert ids(start(queue, worker)) == ids(jobs[2:])


def test_override_of_a_value_goes_before_that_of_its_type(queue: Queue, worker: str) -> None:
    queue.set_limit("bill", Override(max_running=2))
    queue.set_limit("bill/b", Override(max_running=3))
    for account in ("a", "b"):
        queue.enqueue_many("bill", [{"account": account}] * 5)
    assert Counter(job.limit for job in start(queue, worker, 10)) == {"bill/a": 2, "bill/b": 3}
    assert {name: (row["running"], row["held"], row["maxRunning"]) for name, row in queue.limits_in_use().items()} == {
        "bill/a": (2, 3, 2),
        "bill/b": (3, 2, 3),
        "bill": (0, 0, 2),
        "charge": (0, 0, 2),
        "sync": (0, 0, None),
    }


@pytest.mark.parametrize(
    ("limit", "fields", "field"),
    [
        ("charge", {"maxRunning": 0}, "maxRunning"),
        ("charge", {"maxRunning": True}, "maxRunning"),
        ("charge", {"rate": "5/second"}, "rate"),
        ("sync", {"rate": "5 a second"}, "rate"),
        ("sync", {"rate": 5}, "rate"),
        ("sync", {"maxRunning": 2}, "maxRunning"),
        ("charge", {"paused": 1}, "paused"),
        ("charge", {"color": "red"}, "color"),
        ("plain", {"paused": True}, "limit"),
        ("unknown/a", {"paused": True}, "limit"),
    ],
)
def test_refuse_numbers_of_a_limit_that_are_wrong(api: Client, limit: str, fields: dict[str, Any], field: str) -> None:
    answer = api.call("PUT", f"/limits/{limit}", fields)
    assert (answer.status, answer.json["field"]) == (422, field)


def test_http_sets_a_limit_to_a_whole_number_with_a_fraction(api: Client, queue: Queue, worker: str) -> None:
    answer = api.call("PUT", "/limits/charge", {"maxRunning": 3.0})
    assert (answer.status, answer.json["maxRunning"]) == (200, 3)
    queue.enqueue_many("charge", list(range(5)))
    assert len(start(queue, worker)) == 3


@pytest.mark.parametrize(
    ("limit", "override"),
    [("charge", Override(max_running=0)), ("charge", Override(rate="fast")), ("charge:x", Override(paused=True))],
)
def test_python_sets_no_numbers_that_are_wrong(queue: Queue, limit: str, override: Override) -> None:
    with pytest.raises(InvalidJob):
        queue.set_limit(limit, override)
    assert not raw(queue).exists(queue.keys.overrides)


@pytest.mark.parametrize("stored", ['{"maxRunning":2.5}', '{"rate":"fast"}', "no JSON", b"\xff"])
def test_override_that_cannot_be_read_pauses_its_limit_and_stops_no_other_type(
    api: Client, queue: Queue, worker: str, stored: Any
) -> None:
    raw(queue).hset(queue.keys.overrides, "sync", stored)
    jobs = [queue.enqueue(type, 1) for type in ("sync", "charge", "plain")]
    assert ids(start(queue, worker)) == ids(jobs[1:])
    assert api.get("/limits").json["limits"]["sync"]["paused"]
    queue.set_limit("sync", Override())
    queue.promote()
    assert ids(start(queue, worker)) == ids(jobs[:1])


def test_restore_brings_back_what_was_set_for_limits(server: Server, tmp_path: Path) -> None:
    queue = server.queue()
    queue.set_limit("charge", Override(paused=True))
    queue.set_limit("bill/a", Override(max_running=7))
    file = str(tmp_path / "backup.gz")
    assert back_up(queue, file, NoBar())["limit"] == 2
    server.clear()
    queue.set_limit("bill/a", Override(max_running=3))
    assert restore(queue, file, NoBar()).limits == 1  # what was set since stays
    found = queue.limits_in_use()
    assert (found["charge"]["paused"], found["bill/a"]["maxRunning"]) == (True, 3)


def test_restore_refuses_a_name_that_no_limit_has(queue: Queue, tmp_path: Path) -> None:
    raw(queue).hset(queue.keys.overrides, "a b", "{}")
    file = str(tmp_path / "backup.gz")
    back_up(queue, file, NoBar())
    with pytest.raises(BackupError, match="names no limit"):
        restore(queue, file, NoBar())
    raw(queue).delete(queue.keys.overrides)


def test_http_sets_and_lists_limits(api: Client, queue: Queue, worker: str) -> None:
    queue.enqueue_many("bill", [{"account": "a"}] * 3)
    start(queue, worker)
    answer = api.call("PUT", "/limits/bill/a", {"maxRunning": 2})
    assert answer.status == 200
    row = {"running": 1, "held": 2, "maxRunning": 2, "rate": None, "paused": False, "haltedMs": 0, "overridden": True}
    row["override"] = {"maxRunning": 2}
    assert answer.json == {"limit": "bill/a", **row}
    assert api.get("/limits").json["limits"]["bill/a"] == row
    assert api.get("/limits").json["limits"]["bill"]["override"] == {}
    assert api.call("PUT", "/limits/bill/a", {}).json["maxRunning"] == 1


def test_http_sets_a_whole_number_that_is_written_as_a_decimal(api: Client, queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("charge", list(range(5)))
    assert api.call("PUT", "/limits/charge", {"maxRunning": 3.0}).json["maxRunning"] == 3
    assert ids(start(queue, worker)) == ids(jobs[:3])


def test_http_says_which_limit_holds_a_job_and_its_position(api: Client, queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("bill", [{"account": "a"}] * 3)
    start(queue, worker)
    answers = [api.get(f"/jobs/{job.id}").json for job in jobs]
    assert [(answer.get("heldBy"), answer.get("position")) for answer in answers] == [
        (None, None),
        ("bill/a", 1),
        ("bill/a", 2),
    ]


@pytest.fixture
def command(near: Queue, shared_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("REDIS_URL", shared_redis.url)

    def command(*arguments: str) -> Any:
        return CliRunner().invoke(worker_module.cli, ["limits", *arguments])

    return command


def test_command_lists_sets_and_resets_limits(near: Queue, command: Callable[..., Any]) -> None:
    near.enqueue_many("bill", [{"account": "a"}] * 3)
    start(near, near.register(["default"], 10))
    assert command("bill/a", "--max-running", "2", "--pause").output == "bill/a set\n"
    rows = {line.split()[0]: line.split()[1:] for line in command().output.splitlines()}
    assert rows["bill/a"] == ["1", "2", "-", "2", "paused"]
    assert rows["sync"] == ["0", "-", "5/second", "0"]
    assert json.loads(command("--json").output)["bill/a"]["override"] == {"maxRunning": 2, "paused": True}
    assert command("bill/a", "--reset").output == "bill/a reset\n"
    assert near.limits_in_use()["bill/a"]["override"] == {}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["bill"], "to set a limit, name it and use"),
        (["--pause"], "to set a limit, name it and use"),
        (["bill", "--pause", "--reset"], "to set a limit, name it and use"),
        (["bill", "--max-running", "0"], "maxRunning: must be a whole number from 1"),
        (["bill", "--rate", "5/second"], "rate: is not declared by the handler"),
        (["plain", "--pause"], "limit: no handler of this process declares one"),
        (["a b", "--pause"], "limit: must be a type"),
    ],
)
def test_command_refuses_what_is_wrong(command: Callable[..., Any], arguments: list[str], text: str) -> None:
    done = command(*arguments)
    assert done.exit_code
    assert text in done.output


# Running workers ------------------------------------------------------------------------------------------------------


@contextmanager
def working(queue: AnyQueue, slots: int = 4) -> Iterator[None]:
    """Run a real worker in a thread."""
    running = Worker(queue, Settings(worker_concurrency=slots))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        yield
    finally:
        running.stop("release")
        thread.join(20)
        assert not thread.is_alive()


def test_worker_that_meets_a_rate_limit_of_a_service_tries_again_without_losing_an_attempt(near: Queue) -> None:
    begun: list[tuple[float, int]] = []

    @handler("call", max_running=1, max_attempts=1)
    def call(payload: int, job: Job) -> None:
        begun.append((time.monotonic(), payload))
        if len(begun) == 1:
            raise RateLimited(after=1)

    jobs = near.enqueue_many("call", [1, 2])
    with working(near):
        assert [near.wait_for(job.id, 20).status for job in jobs] == ["completed"] * 2
    assert [payload for _, payload in begun] == [1, 1, 2]
    assert 1 <= begun[1][0] - begun[0][0] < 3
    assert [near.get(job.id).attempts for job in jobs] == [1, 1]
    check_consistency(near)


class Crowd:
    """A handler that notes the greatest number of its jobs that ran at once, of each account."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()

        @handler("crowd", max_running=2, limit_by="account")
        def crowd(payload: dict[str, str]) -> None:
            with self.lock:
                self.now[payload["account"]] += 1
                self.most[payload["account"]] = max(self.most[payload["account"]], self.now[payload["account"]])
            threading.Event().wait(0.005)
            with self.lock:
                self.now[payload["account"]] -= 1


def test_workers_of_shards_never_exceed_a_limit_and_leave_nothing_held(server: Server) -> None:
    crowd = Crowd()
    shards = Shards([server.queue(namespace=f"queue.{at}") for at in range(4)])
    jobs = [shards.enqueue("crowd", {"account": f"a{n % 5}"}) for n in range(150)]
    with working(shards, 6), working(shards, 6):
        assert all(shards.wait_for(job.id, 20).status == "completed" for job in jobs)
    assert crowd.most == dict.fromkeys((f"a{n}" for n in range(5)), 2)
    for part in shards.parts:
        assert raw(part).keys(part.keys.running("*")) == raw(part).keys(part.keys.held("*")) == []
        check_consistency(part)
    shards.disconnect()


# Declarations ---------------------------------------------------------------------------------------------------------


class Payment(TypedDict):
    account: str


@pytest.mark.parametrize(
    "options",
    [
        {"max_running": -1},
        {"max_running": 1.5},
        {"max_running": True},
        {"rate": "fast"},
        {"rate": 10},
        {"rate": "10/second", "limit_by": 5},
        {"limit_by": "account"},
        {"max_running": 1, "limit_by": "acount"},
    ],
)
def test_refuse_a_limit_that_is_declared_wrong(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"handler 'wrong': (max_running|rate|limit_by) (must|needs) "):

        @handler("wrong", **options)
        def wrong(payload: Payment) -> None: ...

    assert "wrong" not in HANDLERS


def test_rate_limited_needs_a_time() -> None:
    for after in (0, -1, float("nan"), "30"):
        with pytest.raises(ValueError, match="after must be"):
            RateLimited(after=after)  # type: ignore[arg-type]


# Shards ---------------------------------------------------------------------------------------------------------------


def test_limit_decides_the_shard(server: Server) -> None:
    shards = Shards([server.queue(namespace=f"queue.{at}") for at in range(4)])
    jobs = [shards.enqueue("bill", {"account": f"a{n % 5}"}) for n in range(20)]
    assert all(len({shards.part_of(job.id) for job in jobs[n::5]}) == 1 for n in range(5))
    worker = shards.register(["default"], 20)
    assert len(shards.start(worker, shards.take(worker, ["default"], 20))) == 5
    shards.set_limit("bill", Override(max_running=2))
    shards.promote()
    assert len(shards.start(worker, shards.take(worker, ["default"], 20))) == 5
    rows = shards.limits_in_use()
    assert sum(row["running"] for row in rows.values()) == 10
    held = next(job for job in jobs if shards.place_among_held(job))
    assert shards.cancel(held.id)
    with pytest.raises(InvalidJob, match="different shards"):
        shards.enqueue_many("bill", [{"account": f"a{n}"} for n in range(20)])
    at = shards.parts.index(shards.part_of(jobs[0].id))
    other = next(key for key in map(str, range(20)) if zlib.crc32(key.encode()) % 4 != at)
    with pytest.raises(InvalidJob, match="belongs to another shard than the limit bill/a0"):
        shards.enqueue("bill", {"account": "a0"}, unique_key=other)
    for part in shards.parts:
        check_consistency(part)
    shards.disconnect()


@pytest.fixture
def shards(server: Server) -> Iterator[Shards]:
    shards = Shards([server.queue(namespace=f"queue.{at}") for at in range(4)])
    yield shards
    shards.disconnect()


def submit_once(shards: Shards, account: str, key: str) -> Job:
    [job] = shards.submit([shards.draft("bill", {"account": account})], Once(key, f"asks for {account}"))
    return job


def test_idempotency_key_of_any_shard_holds_for_a_limited_job(shards: Shards) -> None:
    """So clients may choose keys at random. A key is taken in its own shard before the submit."""
    keys = [f"k{n}" for n in range(40)]
    first = [submit_once(shards, f"a{n % 7}", key) for n, key in enumerate(keys)]
    assert {shards.parts.index(shards.part_of(job.id)) for job in first} == {0, 1, 2, 3}
    assert ids([submit_once(shards, f"a{n % 7}", key) for n, key in enumerate(keys)]) == ids(first)
    for n, key in enumerate(keys):
        with pytest.raises(KeyReused):
            submit_once(shards, f"b{n}", key)
    assert shards.stats()["pending"] == 40


def test_idempotency_key_that_was_taken_before_a_crash_is_used_by_the_same_request(shards: Shards) -> None:
    at = next(n for n in range(20) if zlib.crc32(f"k{n}".encode()) % 4 != zlib.crc32(b"bill/a") % 4)
    once = Once(f"k{at}", "asks for a")
    shards.parts[zlib.crc32(once.key.encode()) % 4].claim(once)  # what the submit did before the crash
    with pytest.raises(KeyReused):
        submit_once(shards, "b", once.key)
    assert submit_once(shards, "a", once.key).id == submit_once(shards, "a", once.key).id
    assert shards.stats()["pending"] == 1
