"""The verdict: each check on a system with that problem, and none on a healthy system."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from client import Client
from conftest import RedisServer, Server, free_port, lapse, put, raw, until

from tinyqueue import Job, Queue, handler
from tinyqueue_config import Settings
from tinyqueue_doctor import CHECKS, Observer
from tinyqueue_schedule import make_schedule, pause as pause_schedule, put as put_schedule
from tinyqueue_shards import Shards
from wsgi import API

MINUTE = 60_000


def verdict(queue: Any, **options: Any) -> dict[str, Any]:
    """The verdict of a process that has given none before."""
    found: dict[str, Any] = Observer(queue, **options).verdict()
    for problem in found["problems"]:
        assert not problem["text"][0].islower()
        assert problem["next"]["text"]
        assert problem["since"] > 0
        assert problem["check"] in {*CHECKS, "counts"}
    return found


def problems(queue: Any, **options: Any) -> dict[str, dict[str, Any]]:
    """The problems by check, except that the Redis of all tests persists nothing."""
    found = verdict(queue, **options)["problems"]
    return {problem["check"]: problem for problem in found if problem["check"] != "persistence"}


def later(queue: Queue, seconds: float) -> None:
    """Let time pass. Every worker that is alive sends heartbeats meanwhile."""
    queue.clock.ahead += round(1000 * seconds)


@pytest.fixture
def own(start_redis: Callable[..., RedisServer]) -> Iterator[Queue]:
    """A queue on a healthy real server that no other test uses."""
    queue = Queue.from_url(start_redis("--appendonly", "yes").url)
    yield queue
    queue.pool.disconnect()


# Healthy --------------------------------------------------------------------------------------------------------------


def test_verdict_is_well_when_idle(own: Queue) -> None:
    own.register(["default"], 2)
    assert verdict(own) == {
        "status": "well",
        "text": "All is well: 1 live worker, 0 running jobs, 0 pending jobs.",
        "problems": [],
    }


def test_verdict_is_well_when_scaled_to_zero(queue: Queue) -> None:
    assert problems(queue) == {}
    queue.enqueue("echo", 1)
    queue.enqueue("echo", 2, queue="mail")
    queue.enqueue("echo", 3, delay=1)
    later(queue, 115)
    assert problems(queue) == {}


def test_verdict_is_well_with_delayed_jobs_and_no_worker(queue: Queue) -> None:
    queue.enqueue("echo", 1, delay=3600)
    later(queue, 600)
    assert problems(queue) == {}


def test_verdict_is_well_when_paused_on_purpose(queue: Queue) -> None:
    queue.register(["default"], 1)
    for name in ("default", "mail"):
        queue.enqueue("echo", 1, queue=name)
        queue.enqueue("echo", 1, queue=name, delay=1)
        queue.pause(name)
    put_schedule(queue, make_schedule("nightly", "* * * * *", "echo", 3))
    pause_schedule(queue, "nightly")
    later(queue, 3600)
    assert problems(queue) == {}


def test_verdict_is_well_right_after_a_deploy(queue: Queue) -> None:
    old = queue.register(["default", "mail"], 2)
    for name in ("default", "mail"):
        put(queue, "completed", queue=name)
        queue.enqueue("echo", 1, queue=name)
    queue.dequeue(old, ["default"])
    queue.deregister(old)
    later(queue, 20)
    assert problems(queue) == {}
    new = queue.register(["default"], 2)
    assert problems(queue) == {}  # the worker of mail starts later
    later(queue, 20)
    assert problems(queue) == {}
    assert len(queue.dequeue(new, ["default"])) == 1


def test_verdict_is_given_once_in_two_seconds(queue: Queue) -> None:
    observer = Observer(queue)
    first = observer.verdict()
    queue.enqueue("echo", 1)
    assert observer.verdict() == first


# Redis ----------------------------------------------------------------------------------------------------------------


def test_verdict_names_a_redis_that_does_not_answer() -> None:
    queue = Queue.from_url(f"redis://127.0.0.1:{free_port()}/0")
    found = verdict(queue)
    assert found["status"] == "critical"
    assert found["text"].startswith("Redis does not answer, so jobs can be neither submitted nor run: Error 111")
    [problem] = found["problems"]
    assert "REDIS_URL" in problem["next"]["text"]
    assert problem["next"]["command"] == "tinyqueue doctor"


def test_verdict_says_since_when_redis_does_not_answer(start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis()
    api = Client(API(Settings(), Queue.from_url(server.url)))
    assert [problem["check"] for problem in api.get("/verdict").json["problems"]] == ["persistence"]
    killed = time.time() * 1000
    server.kill()
    answer = until(lambda: (found := api.get("/verdict")).json["status"] == "critical" and found)
    assert answer.status == 200
    [problem] = answer.json["problems"]
    assert problem["check"] == "redis"
    assert killed - 2000 < problem["since"] < killed + 100


def test_verdict_names_a_redis_that_hangs(start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis()
    queue = Queue.from_url(server.url)
    assert problems(queue) == {}
    assert server.process
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        [problem] = verdict(queue)["problems"]
        assert problem["text"].startswith("Redis does not answer, so jobs can be neither submitted nor run: ")
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


def test_verdict_names_a_redis_that_takes_no_writes(own: Queue, start_redis: Callable[..., RedisServer]) -> None:
    port = own.pool.connection_kwargs["port"]
    replica = Queue.from_url(start_redis("--replicaof", "127.0.0.1", str(port)).url)
    problem = until(lambda: problems(replica).get("redis"))
    assert problem["text"].startswith(
        "Redis takes no writes, so jobs can be neither submitted nor run: You can't write"
    )
    assert "names a replica" in problem["next"]["text"]
    replica.pool.disconnect()


def fill(queue: Queue, share: float) -> None:
    raw(queue).setrange("ballast", 50_000_000, "x")  # much more than a connection takes
    raw(queue).config_set("maxmemory", int(raw(queue).info("memory")["used_memory"] / share))


@pytest.mark.parametrize(
    ("share", "level", "todo"),
    [(0.9, "warning", "above 95%, new jobs are refused"), (0.97, "critical", "new jobs are refused; give Redis more")],
)
def test_verdict_names_memory_that_is_nearly_used_up(own: Queue, share: float, level: str, todo: str) -> None:
    fill(own, share)
    [problem] = verdict(own)["problems"]
    assert (problem["check"], problem["level"]) == ("memory", level)
    assert problem["text"].startswith("Redis uses ")
    assert f"({share:.0%})" in problem["text"]
    assert problem["next"]["text"].startswith(todo)


def test_verdict_says_that_a_full_redis_refuses_all(own: Queue) -> None:
    fill(own, 1.05)
    found = problems(own)
    assert found.keys() == {"redis", "memory"}
    assert found["redis"]["text"].startswith("Redis is full, so jobs can be neither submitted nor run")
    assert "tinyqueue purge" in found["redis"]["next"]["text"]
    later_found = problems(own)
    assert later_found["memory"]["since"] >= found["memory"]["since"]


def test_verdict_names_an_eviction_policy(own: Queue) -> None:
    raw(own).config_set("maxmemory", "100mb")
    raw(own).config_set("maxmemory-policy", "allkeys-lru")
    [problem] = verdict(own)["problems"]
    assert problem["text"] == "Redis may evict jobs: maxmemory-policy is allkeys-lru"
    assert "noeviction" in problem["next"]["text"]


def test_verdict_names_persistence_that_is_off(start_redis: Callable[..., RedisServer]) -> None:
    queue = Queue.from_url(start_redis().url)
    [problem] = verdict(queue)["problems"]
    assert problem["text"] == 'Redis may lose jobs: appendonly no, save ""'
    assert problem["next"]["text"] == "a restart of Redis loses every job: set appendonly yes"
    raw(queue).config_set("save", "60 1")
    assert verdict(queue)["problems"] == []  # snapshots may be what is wanted
    queue.pool.disconnect()


# Queues and workers ---------------------------------------------------------------------------------------------------


def test_verdict_names_jobs_without_any_worker(queue: Queue) -> None:
    queue.enqueue("echo", 1)
    queue.enqueue("echo", 1)
    began = queue.now()
    later(queue, 121)
    found = problems(queue)
    assert found.keys() == {"unserved"}
    problem = found["unserved"]
    assert problem["text"] == "2 jobs in queue default cannot start, because no worker is alive"
    assert problem["next"] == {"text": "start a worker", "command": "tinyqueue worker"}
    assert problem["level"] == "critical"
    assert problem["queues"] == ["default"]
    assert abs(problem["since"] - began) < 1000


def test_verdict_names_due_jobs_that_nobody_promotes(queue: Queue) -> None:
    queue.enqueue("echo", 1, delay=10)
    later(queue, 135)
    text = "1 job in queue default cannot start, because no worker is alive"
    assert problems(queue)["unserved"]["text"] == text


def test_verdict_names_a_queue_that_no_worker_ever_served(queue: Queue) -> None:
    queue.register(["default"], 1)
    queue.enqueue("echo", 1, queue="mial")
    later(queue, 4)
    problem = problems(queue)["unserved"]
    assert problem["text"] == "1 job in queue mial cannot start, because no live worker serves it"
    assert problem["next"]["command"] == "tinyqueue worker --queue mial"


def test_verdict_names_a_queue_that_has_lost_its_worker(queue: Queue) -> None:
    put(queue, "completed", queue="mail")
    queue.register(["default"], 1)
    queue.enqueue("echo", 1, queue="mail")
    later(queue, 55)
    assert problems(queue) == {}
    later(queue, 10)
    assert problems(queue)["unserved"]["queues"] == ["mail"]


def test_verdict_names_deliveries_that_no_worker_serves(queue: Queue) -> None:
    put(queue, "completed", callback_url="http://receiver.example/")
    queue.register(["default"], 1)
    later(queue, 4)
    problem = problems(queue)["unserved"]
    assert problem["text"] == "1 job in queue webhooks cannot start, because no live worker serves it"


def test_verdict_names_several_queues(queue: Queue) -> None:
    queue.register(["default"], 1)
    for name in "abcdef":
        queue.enqueue("echo", 1, queue=name)
    later(queue, 4)
    text = problems(queue)["unserved"]["text"]
    assert text == "6 jobs in queues a, b, c and 3 more cannot start, because no live worker serves them"


def test_verdict_names_a_lost_worker(queue: Queue) -> None:
    lost = put(queue, "processing").worker
    queue.register(["default"], 1)
    assert problems(queue) == {}
    lapse(queue, lost)
    problem = problems(queue)["lost"]
    assert problem["text"] == f"Worker {lost} sent no heartbeat for 30 s; 1 job will be requeued soon"
    assert (problem["level"], problem["workers"]) == ("warning", [lost])


def test_verdict_names_a_lost_worker_whose_jobs_nobody_requeues(queue: Queue) -> None:
    lost = put(queue, "processing").worker
    lapse(queue, lost)
    found = verdict(queue)
    assert found["status"] == "critical"
    assert f"Worker {lost} sent no heartbeat for 30 s; 1 job will be requeued only when another worker runs" in [
        problem["text"] for problem in found["problems"]
    ]


def test_verdict_names_a_job_that_waits_too_long(queue: Queue) -> None:
    queue.register(["default"], 1)
    job = queue.enqueue("echo", 1)
    later(queue, 240)
    assert problems(queue) == {}
    assert problems(queue, max_wait=200)["waiting"]["jobs"] == [job.id]
    later(queue, 3600)
    problem = problems(queue)["waiting"]
    assert problem["text"] == "The next job of queue default has waited for 64 minutes"
    assert problems(queue, max_wait=0) == {}


def run_for(queue: Queue, type: str, seconds: float, times: int = 1) -> None:
    """Run jobs of a type that take so long."""
    worker = queue.register(["default"], times)
    queue.enqueue_many(type, range(times))
    for job in queue.dequeue(worker, ["default"], times):
        later(queue, seconds / times)
        queue.complete(job)
    queue.deregister(worker)


def start_long(queue: Queue, seconds: float) -> list[Job]:
    """Let a worker run two jobs for so long, while a third waits. Returns the two."""
    worker = queue.register(["default"], 2)
    queue.enqueue_many("report", [1, 2, 3])
    jobs = queue.dequeue(worker, ["default"], 2)
    later(queue, seconds)
    queue.heartbeat(worker, [job.id for job in jobs], jobs)
    return jobs


def test_verdict_names_slots_that_are_taken_for_longer_than_usual(queue: Queue) -> None:
    run_for(queue, "report", 10, times=20)
    jobs = start_long(queue, 70)
    problem = problems(queue)["slots"]
    text = "1 job waits in queue default, because all 2 slots run jobs that take longer than usual"
    assert problem["text"] == f"{text}: report in 2, for up to 70 s"
    assert set(problem["jobs"]) == {job.id for job in jobs}
    assert problem["types"] == ["report"]
    queue.complete(jobs[0])
    assert problems(queue) == {}  # although the last heartbeat says that it runs


def test_verdict_is_well_while_jobs_run_as_long_as_usual(queue: Queue) -> None:
    run_for(queue, "report", 2000, times=20)
    start_long(queue, 200)
    assert problems(queue) == {}


def test_verdict_knows_nothing_usual_of_a_new_type(queue: Queue) -> None:
    start_long(queue, 250)
    assert problems(queue) == {}
    later(queue, 700)
    assert "slots" in problems(queue)


# Schedules, limits and deliveries -------------------------------------------------------------------------------------


def test_verdict_names_an_overdue_schedule(queue: Queue) -> None:
    queue.register(["default"], 1)
    put_schedule(queue, make_schedule("nightly", "* * * * *", "echo", 3))
    later(queue, 61)
    assert problems(queue) == {}
    later(queue, 600)
    problem = problems(queue)["schedules"]
    assert problem["text"].startswith("Schedule nightly should have run 1")
    assert problem["text"].endswith(" minutes ago")
    assert problem["schedules"] == ["nightly"]


def test_verdict_names_held_jobs_whose_limit_is_full_for_long(queue: Queue, no_handlers: None) -> None:
    @handler("charge", max_running=1)
    def charge(payload: object) -> None: ...

    worker = queue.register(["default"], 2)
    queue.enqueue_many("charge", [1, 2])
    queue.dequeue(worker, ["default"], 2)
    later(queue, 290)
    assert problems(queue) == {}
    later(queue, 20)
    problem = problems(queue)["limits"]
    assert problem["text"] == "Limit charge had no room for 5 minutes for a job that waits"
    assert problem["limits"] == ["charge"]


# Counts, shards and outputs -------------------------------------------------------------------------------------------


def test_verdict_names_counts_that_do_not_add_up(real: Server) -> None:
    queue = real.queue()
    queue.enqueue_many("echo", [1, 2, 3])
    queue.register(["default"], 1)
    raw(queue).delete(queue.keys.jobs("default"))
    problem = problems(queue)["counts"]
    assert problem["text"] == "More jobs are counted than are listed: keys were lost, and some jobs may never run"
    assert problem["next"]["command"] == "tinyqueue doctor --repair"


def test_verdict_names_a_shard_that_is_away(real: Server) -> None:
    away = Queue.from_url(f"redis://127.0.0.1:{free_port()}/0", namespace="queue.1")
    shards = Shards([real.queue(namespace="queue.0"), away])
    shards.register(["default"], 1)
    assert problems(shards)["redis"]["text"].startswith("Redis of shard queue.1 does not answer")
    shards.disconnect()


def test_verdict_adds_up_shards(real: Server) -> None:
    shards = Shards([real.queue(namespace=f"queue.{at}") for at in range(2)])
    shards.register(["default"], 1)
    for _ in range(4):
        shards.enqueue("echo", 1, queue="mial")
    assert problems(shards) == {}
    for part in shards.parts:
        later(part, 4)
    text = "4 jobs in queue mial cannot start, because no live worker serves it"
    assert problems(shards)["unserved"]["text"] == text
    shards.disconnect()


def test_since_is_kept_in_redis_until_a_problem_ends(real: Server) -> None:
    queue = real.queue()
    lost = put(queue, "processing").worker
    lapse(queue, lost)
    first = problems(queue)["lost"]
    later(queue, 60)
    assert problems(real.queue())["lost"]["since"] == first["since"]
    assert b"lost:" in raw(queue).hgetall(queue.keys.trouble)
    queue.deregister(lost) if queue.workers()[0]["alive"] else queue.reap(lost)
    assert "lost" not in problems(queue)
    assert b"lost:" not in raw(queue).hgetall(queue.keys.trouble)


def test_ready_warns_of_what_the_verdict_says(queue: Queue) -> None:
    queue.register(["default"], 1)
    queue.enqueue("echo", 1, queue="mial")
    later(queue, 4)
    text = "1 job in queue mial cannot start, because no live worker serves it: start a worker that serves it"
    assert f"{text} (tinyqueue worker --queue mial)" in Client(API(Settings(), queue)).get("/ready").json["warnings"]
