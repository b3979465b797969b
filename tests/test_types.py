"""GET /types, and the snapshots of the times in the metrics that it needs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from client import Client
from conftest import put, raw, until
from test_metrics import run, samples

from tinyqueue import BUCKETS, SERIES, SNAPSHOTS, Failure, Outcome, Queue, Unavailable, handler
from tinyqueue_config import Settings
from tinyqueue_metrics import percentile, types
from tinyqueue_shards import Shards
from worker import Worker
from wsgi import API

MINUTE = 60_000
BOOM = Failure("Boom", "it broke")


@pytest.fixture(autouse=True)
def handlers(no_handlers: None) -> None:
    @handler("echo")
    def echo(payload: object) -> None: ...


def snapshot(queue: Queue) -> bool:
    """Take a snapshot as if the last one were old enough."""
    raw(queue).delete(queue.keys.snapshotter)
    return queue.take_snapshot()


def work(queue: Queue, *took: int, **more: Any) -> None:
    """Run a job for each of these times, in milliseconds."""
    worker = queue.register(["default"], 1)
    for milliseconds in took:
        queue.enqueue("echo", {}, **more)
        run(queue, worker, took=milliseconds)
    queue.deregister(worker)


# Counts ---------------------------------------------------------------------------------------------------------------


def test_types_list_every_handler_before_its_first_job(api: Client) -> None:
    nothing = {"p50": None, "p95": None}
    assert api.get("/types").json == {
        "minutes": 15,
        "timesSince": 0,
        "types": {
            "echo": {
                "completed": 0,
                "failed": 0,
                "perMinute": 0,
                "failureShare": None,
                "errors": {},
                "waitedMs": nothing,
                "ranMs": nothing,
            }
        },
    }


def test_types_count_failed_attempts_that_others_follow(queue: Queue, api: Client) -> None:
    queue.clock.ahead += MINUTE - queue.now() % MINUTE  # no minute ends meanwhile
    worker = queue.register(["default"], 1)
    for name in ("Boom", "Boom", "Bang"):
        queue.enqueue("echo", {})
        run(queue, worker, "fail", error=Failure(name, "it broke"), after=600)
    queue.enqueue("echo", {})
    run(queue, worker)
    about = api.get("/types").json["types"]["echo"]
    assert (about["completed"], about["failed"], about["failureShare"]) == (1, 3, 0.75)
    assert list(about["errors"].items()) == [("Boom", 2), ("Bang", 1)]
    assert about["perMinute"] == pytest.approx(4 / 14, abs=0.05)
    assert queue.stats()["failed"] == 0


def test_types_forget_what_happened_before_the_minutes_asked_for(queue: Queue, api: Client) -> None:
    work(queue, 5)
    queue.clock.ahead += 16 * MINUTE
    assert api.get("/types").json["types"]["echo"]["completed"] == 0
    assert api.get("/types?minutes=30").json["types"]["echo"]["completed"] == 1


@pytest.mark.parametrize("minutes", ["0", "121", "x", "-1"])
def test_types_refuse_other_minutes(api: Client, minutes: str) -> None:
    answer = api.get(f"/types?minutes={minutes}")
    assert (answer.status, answer.kind) == (400, "invalid-query")


# Times ----------------------------------------------------------------------------------------------------------------


def test_types_estimate_how_long_jobs_take(queue: Queue, api: Client) -> None:
    work(queue, *[100] * 18, 20_000, 20_000)
    about = api.get("/types").json["types"]["echo"]
    assert 50 < about["ranMs"]["p50"] <= 250
    assert 15_000 < about["ranMs"]["p95"] <= 60_000
    assert about["waitedMs"]["p95"] <= 50


def test_times_begin_at_the_newest_snapshot_that_is_old_enough(queue: Queue) -> None:
    work(queue, *[20_000] * 5)
    assert snapshot(queue)
    first = queue.now()
    queue.clock.ahead += 10 * MINUTE
    work(queue, 100)
    assert snapshot(queue)
    assert types(queue, 15)["timesSince"] == 0
    queue.clock.ahead += 6 * MINUTE
    found = types(queue, 15)
    assert found["timesSince"] == pytest.approx(first, abs=2000)
    assert found["types"]["echo"]["ranMs"]["p95"] <= 250
    assert types(queue, 5)["timesSince"] == pytest.approx(first + 10 * MINUTE, abs=2000)
    assert types(queue, 5)["types"]["echo"]["ranMs"] == {"p50": None, "p95": None}


def test_snapshot_is_taken_once_in_fifteen_minutes(queue: Queue) -> None:
    assert [queue.take_snapshot() for _ in range(3)] == [True, False, False]
    assert 0 < raw(queue).ttl(queue.keys.snapshotter) <= 900


def test_only_the_newest_snapshots_are_kept(queue: Queue) -> None:
    for _ in range(SNAPSHOTS + 3):
        queue.clock.ahead += 15 * MINUTE
        assert snapshot(queue)
    assert raw(queue).llen(queue.keys.snapshots) == SNAPSHOTS
    assert queue.times(15)[0] == pytest.approx(queue.now() - 15 * MINUTE, abs=2000)


def test_lost_metrics_give_no_negative_counts(queue: Queue) -> None:
    work(queue, 100)
    snapshot(queue)
    queue.clock.ahead += 20 * MINUTE
    raw(queue).delete(queue.keys.metrics)
    work(queue, 20_000)
    assert types(queue, 15)["types"]["echo"]["ranMs"]["p50"] > 15_000
    raw(queue).flushall()  # the counters no longer balance


def test_snapshot_that_cannot_be_read_is_an_error(queue: Queue, api: Client) -> None:
    raw(queue).lpush(queue.keys.snapshots, "?")
    answer = api.get("/types")
    assert (answer.status, answer.kind) == (500, "corrupted")


def test_worker_takes_snapshots(queue: Queue) -> None:
    worker = Worker(queue, Settings(worker_concurrency=1), ["default"])
    thread = threading.Thread(target=worker.run)
    thread.start()
    until(lambda: raw(queue).llen(queue.keys.snapshots))
    worker.stop("drain")
    thread.join(20)
    assert not thread.is_alive()


def test_full_redis_takes_no_snapshot(start_redis: Any) -> None:
    server = start_redis("--maxmemory", "1", "--maxmemory-policy", "noeviction")
    queue = Queue.from_url(server.url)
    with pytest.raises(Unavailable) as refused:
        queue.take_snapshot()
    assert refused.value.reason == "full"
    queue.pool.disconnect()


def test_types_of_shards_are_added_up(server: Any) -> None:
    queue = Shards([server.queue(namespace=f"queue.{number}") for number in range(3)])
    worker = queue.register(["default"], 6)
    for _ in range(6):
        queue.enqueue("echo", {})
    for number, job in enumerate(queue.dequeue(worker, ["default"], 6)):
        if number % 2:
            queue.complete(job)
        else:
            queue.fail(job, BOOM, after=60)
    about = types(queue, 15)["types"]["echo"]
    assert (about["completed"], about["failed"], about["errors"]) == (3, 3, {"Boom": 3})
    assert sum(queue.times(15)[1]["echo"]["ran"].values()) == 6
    assert queue.take_snapshot()
    assert [raw(part).llen(part.keys.snapshots) for part in queue.parts] == [1, 1, 1]
    queue.disconnect()


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ({}, 0.5, None),
        ({10: 4}, 0.5, 5),
        ({10: 50, 50: 50}, 0.75, 30),
        ({250: 1}, 0.95, 240),
        ({10: 95, 5000: 5}, 0.95, 10),
        ({1_800_000: 1, BUCKETS[-1]: 99}, 0.95, 1_800_000),
    ],
)
def test_percentile_is_interpolated_within_a_bucket(
    counts: dict[float, int], share: float, expected: float | None
) -> None:
    assert percentile([counts.get(bound, 0) for bound in BUCKETS], share) == expected


# Retrying -------------------------------------------------------------------------------------------------------------


def test_metrics_have_the_jobs_that_retry(queue: Queue) -> None:
    worker = queue.register(["default"], 1)
    queue.enqueue("echo", {})
    assert samples(queue)["tinyqueue_jobs_retrying",] == 0
    run(queue, worker, "fail", error=BOOM, after=60)
    assert samples(queue)["tinyqueue_jobs_retrying",] == 1


# Costs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/stats?minutes=60", "/types", "/metrics", "/queues", "/workers", "/limits"])
def test_reports_send_the_same_commands_however_many_jobs_there_are(near: Queue, path: str) -> None:
    client = raw(near)
    api = Client(API(Settings(), near))
    assert snapshot(near)

    def commands() -> dict[str, int]:
        assert api.get(path).status == 200
        client.config_resetstat()
        assert api.get(path).status == 200
        return {name: about["calls"] for name, about in client.info("commandstats").items() if "config" not in name}

    for status in ("completed", "failed", "cancelled", "processing", "delayed", "pending"):
        put(near, status, queue=status)
    put(near, "pending", queue="completed")  # the reports read one entry of each queue with pending jobs
    few = commands()
    for name in ("completed", "delayed", "pending"):
        near.enqueue_many("echo", range(1000), queue=name)
        near.enqueue_many("echo", range(1000), queue=name, delay=600)
    assert commands() == few


def test_errors_with_invented_names_do_not_fill_redis(queue: Queue) -> None:
    worker = queue.register(["default"], 2000)
    for batch in range(2):
        queue.enqueue_many("echo", [{}] * 600, max_attempts=1)
        jobs = queue.dequeue(worker, ["default"], 600)
        failures = [Failure(f"Invented{batch}_{at}", "") for at in range(len(jobs))]
        queue.settle(worker, [Outcome(job, "fail", error=error) for job, error in zip(jobs, failures, strict=True)])
    errors = types(queue, 5)["types"]["echo"]["errors"]
    assert len(errors) == SERIES + 1
    assert errors["other"] == 1200 - SERIES
    worker = queue.register(["default"], 1)
    queue.enqueue("echo", {}, max_attempts=1)
    [job] = queue.dequeue(worker, ["default"])
    queue.fail(job, Failure("Invented0_0", ""))
    assert types(queue, 5)["types"]["echo"]["errors"]["Invented0_0"] == 2
