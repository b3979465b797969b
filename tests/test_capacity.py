"""The arithmetic of `plan`, its output, and its figures of memory against a real Redis."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from conftest import RedisServer, raw, until

import worker
from tinyqueue import Failure, Queue, SettingsError
from tinyqueue_config import Settings
from tinyqueue_plan import BUSY, FULL, MAX_SHARDS, TRACEBACK, Load, make_plan, memory_of

TYPICAL = Load(rate=50, duration=0.4, payload=2000)

# The arithmetic -------------------------------------------------------------------------------------------------------


def test_plan_leaves_headroom_in_the_slots() -> None:
    planned = make_plan(TYPICAL, Settings())
    assert (planned.busy_slots, planned.workers, planned.slots) == (20, 6, 30)
    assert planned.busy_slots / planned.slots <= BUSY < planned.busy_slots / (planned.slots - 5)


def test_plan_follows_the_slots_of_a_worker() -> None:
    planned = make_plan(TYPICAL, Settings(worker_concurrency=50))
    assert (planned.workers, planned.slots) == (1, 50)


@pytest.mark.parametrize(("duration", "slots"), [(0.7, 1), (7, 10), (2.1, 3), (2.11, 4)])
def test_plan_rounds_slots_up_but_no_error_of_arithmetic(duration: float, slots: int) -> None:
    assert make_plan(TYPICAL._replace(rate=1, duration=duration), Settings(worker_concurrency=1)).slots == slots


def test_plan_counts_the_processor_time_of_short_jobs() -> None:
    planned = make_plan(Load(rate=1500, duration=0.001, payload=100), Settings())
    assert planned.workers == 3  # two slots would do, but not one process


def test_plan_says_when_a_backlog_is_done() -> None:
    planned = make_plan(TYPICAL, Settings())
    assert planned.backlog == 50 * 3600
    assert planned.catch_up == pytest.approx(50 * 3600 / (30 / 0.4 - 50))


def test_plan_counts_the_connections_of_all_processes() -> None:
    settings = Settings()
    assert make_plan(TYPICAL, settings).connections == 6 * settings.worker_connections + settings.web_connections


def test_plan_keeps_no_more_ended_jobs_than_the_queue_does() -> None:
    few = make_plan(TYPICAL, Settings(keep_completed=1000)).memory["completed"]
    assert few == pytest.approx(50 * 0.99 * 1000 * memory_of(2100, ended=True))
    assert make_plan(TYPICAL, Settings()).memory["completed"] == 100_000 * memory_of(2100, ended=True)


def test_plan_adds_memory_for_idempotency_keys_only_if_there_are_any() -> None:
    assert make_plan(TYPICAL, Settings()).memory["keys"] == 0
    assert make_plan(TYPICAL._replace(keys=True), Settings(keep_once=3600)).memory["keys"] == 50 * 3600 * 360


def test_plan_stays_below_the_memory_that_raises_an_alert() -> None:
    planned = make_plan(TYPICAL, Settings())
    assert sum(planned.memory.values()) / planned.max_memory <= FULL


def test_plan_adds_shards_where_one_redis_is_too_busy() -> None:
    one = make_plan(TYPICAL, Settings())
    assert one.shards == 1
    assert make_plan(TYPICAL._replace(rate=one.jobs_per_redis), Settings()).shards == 1
    assert make_plan(TYPICAL._replace(rate=one.jobs_per_redis + 1), Settings()).shards == 2
    assert make_plan(TYPICAL, Settings(shards=8)).shards == 8


def test_plan_refuses_more_shards_than_there_can_be() -> None:
    with pytest.raises(SettingsError, match="500,000 such jobs/s need 259 shards, and 64 is the maximum"):
        make_plan(TYPICAL._replace(rate=500_000), Settings())
    assert Settings.read({"TINYQUEUE_SHARDS": str(MAX_SHARDS)}).shards == MAX_SHARDS
    with pytest.raises(SettingsError, match="TINYQUEUE_SHARDS"):
        Settings.read({"TINYQUEUE_SHARDS": str(MAX_SHARDS + 1)})


# Memory, measured -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 200, 1000, 2000, 5000, 20_000, 100_000])
def test_memory_of_jobs_is_what_a_real_redis_uses(start_redis: Callable[..., RedisServer], size: int) -> None:
    queue = Queue.from_url(start_redis().url)
    count = 2000 if size < 10_000 else 200
    payload = "x" * (size - 2)

    before = used_after_batches(queue)
    for _ in range(0, count, 200):
        queue.enqueue_many("echo", [payload] * 200)
    pending = (used(queue) - before) / count
    end_all(queue, count, lambda job: queue.complete(job, "x" * 98))
    completed = (used(queue) - before) / count
    queue.pool.disconnect()
    assert 0.95 * pending <= memory_of(size) <= 1.3 * pending + 150
    assert 0.95 * completed <= memory_of(size + 100, ended=True) <= 1.3 * completed + 150


def used(queue: Queue) -> int:
    """The memory of the data, without the buffers of connections, which batches have made large."""
    queue.pool.disconnect()
    until(lambda: int(raw(queue).info("clients")["connected_clients"]) == 1)
    return int(raw(queue).info("memory")["used_memory"])


def used_after_batches(queue: Queue) -> int:
    """Use buffers of Redis that it keeps, and return the memory without jobs."""
    queue.enqueue_many("echo", ["x" * 1000] * 200)
    end_all(queue, 200, queue.complete)
    raw(queue).flushall()
    return used(queue)


def end_all(queue: Queue, count: int, end: Callable[[Any], None]) -> None:
    name = queue.register(["default"], 100)
    for _ in range(0, count, 100):
        for job in queue.dequeue(name, ["default"], 100):
            end(job)
    assert queue.stats()["pending"] == 0


def test_memory_of_failed_jobs_is_what_a_real_redis_uses(start_redis: Callable[..., RedisServer]) -> None:
    queue = Queue.from_url(start_redis().url)
    before = used_after_batches(queue)
    queue.enqueue_many("echo", ["x" * 998] * 1000, max_attempts=1)
    error = Failure("ValueError", "no such account", "x" * (TRACEBACK - 80))
    end_all(queue, 1000, lambda job: queue.fail(job, error))
    measured = (used(queue) - before) / 1000
    queue.pool.disconnect()
    assert 0.95 * measured <= memory_of(1000 + TRACEBACK, ended=True) <= 1.3 * measured + 150


# At the command line --------------------------------------------------------------------------------------------------


def run_plan(*options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, worker.__file__, "plan", *options]
    environ = {"PATH": os.environ["PATH"]} | environ
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=False)


def test_plan_prints_a_line_for_each_need_without_a_redis() -> None:
    done = run_plan("--rate", "50", "--duration", "0.4", "--payload", "2000")
    assert (done.returncode, done.stderr) == (0, "")
    *lines, empty, last = done.stdout.splitlines()
    names = ["slots", "workers", "web", "backlog", "Redis memory", "kept", "Redis host", "connections", "shards"]
    assert [line[:13].strip() for line in lines] == names
    assert max(len(line) for line in lines) <= 120
    assert "30, 67% busy" in lines[0]
    assert "completed 24 h, failed 168 h, at most 100,000 of each" in lines[5]
    assert (empty, last) == ("", "Where these figures come from: docs/operations.md, Capacity")


def test_plan_reads_the_settings() -> None:
    done = run_plan(
        *("--rate", "50", "--duration", "0.4", "--payload", "2000"),
        WORKER_CONCURRENCY="10",
        TINYQUEUE_KEEP_COMPLETED="60",
    )
    assert "workers       3, with 10 slots each" in done.stdout
    assert "completed 1 min" in done.stdout


def test_plan_prints_json() -> None:
    done = run_plan("--rate", "50", "--duration", "0.4", "--payload", "2000", "--json")
    planned = json.loads(done.stdout)
    assert (planned["slots"], planned["workers"], planned["webProcesses"], planned["shards"]) == (30, 6, 1, 1)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--rate 50 --duration 0.4", "Missing option '--payload'."),
        ("--rate nan --duration 1 --payload 1", "Invalid value for '--rate': nan is not a number"),
        ("--rate 0 --duration 1 --payload 1", "Invalid value for '--rate': 0.0 is not in the range"),
        ("--rate 1 --duration inf --payload 1", "Invalid value for '--duration': inf is not in the range"),
        ("--rate 1 --duration 1 --payload 2k", "Invalid value for '--payload': '2k' is not a valid integer range."),
        ("--rate 1 --duration 1 --payload 300000", "--payload is above TINYQUEUE_MAX_BODY (262144); raise that,"),
        ("--rate 500000 --duration 1 --payload 9", "500,000 such jobs/s need 251 shards, and 64 is the maximum"),
    ],
)
def test_plan_of_a_wrong_load_prints_one_clear_line(options: str, error: str) -> None:
    done = run_plan(*options.split())
    assert (done.returncode, done.stdout) == (2, "")
    [line] = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert line.removeprefix("Error: ").startswith(error)
