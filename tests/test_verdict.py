"""The verdict: each check on a system with that problem, and none on a healthy system."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from client import Client
from conftest import RedisServer, Server, find_lost, free_port, lapse, put, raw, until
from test_worker import Running

import worker as worker_module
from tinyqueue import Failure, Job, Outcome, Override, Queue, QueueFull, handler
from tinyqueue_config import Settings
from tinyqueue_doctor import CHECKS, REFUSALS, Observer
from tinyqueue_http import CircuitOpen, register
from tinyqueue_json import new_id
from tinyqueue_metrics import REASONS
from tinyqueue_schedule import Ticker, make_schedule, pause as pause_schedule, put as put_schedule
from tinyqueue_shards import Shards
from tinyqueue_slot import fail as slot_fail, run_job
from wsgi import API


def verdict(queue: Any, **options: Any) -> dict[str, Any]:
    """The verdict of a process that has given none before."""
    found: dict[str, Any] = Observer(queue, **options).verdict()
    for problem in found["problems"]:
        assert not problem["text"][0].islower()
        assert problem["next"]["text"]
        assert problem["since"] > 0
        assert problem["check"] in CHECKS
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


def test_verdict_is_computed_once_for_many_callers(own: Queue) -> None:
    api = Client(API(Settings(), own))
    raw(own).config_resetstat()
    threads = [threading.Thread(target=api.get, args=("/verdict",)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    calls = {name: stats["calls"] for name, stats in raw(own).info("commandstats").items()}
    assert calls["cmdstat_zrangebyscore"] == 2  # the due jobs and the due schedules


def test_verdict_reads_neither_lists_nor_all_keys(own: Queue) -> None:
    for at in range(50):
        own.enqueue_many("echo", range(20), queue=f"q{at}")
    later(own, 400)
    raw(own).config_resetstat()
    assert "unserved" in problems(own)
    stats = {name.removeprefix("cmdstat_"): about for name, about in raw(own).info("commandstats").items()}
    assert not stats.keys() & {"lrange", "zrange", "scan", "keys", "sort", "strlen"}
    assert stats["mget"]["calls"] <= 3  # the next jobs of all queues are read with one of them
    assert sum(about["usec"] for about in stats.values()) < 5000  # 300 on a quiet machine


def test_verdict_explains_every_reason_that_the_metrics_count() -> None:
    assert REFUSALS.keys() == set(REASONS)


def test_checks_are_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
    table = page.partition("### The checks")[2].partition("\n## ")[0]
    assert sorted(re.findall("^\\| `([a-z]+)` \\|", table, re.M)) == sorted(CHECKS)


# Redis ----------------------------------------------------------------------------------------------------------------


def test_verdict_names_a_redis_that_does_not_answer() -> None:
    queue = Queue.from_url(f"redis://127.0.0.1:{free_port()}/0")
    found = verdict(queue)
    assert found["status"] == "critical"
    assert found["text"].startswith("Redis does not answer, so jobs can be neither submitted nor run: Error 111")
    assert found["text"].endswith("Connection refused.")
    assert not found["text"].endswith("..")
    [problem] = found["problems"]
    assert "REDIS_URL" in problem["next"]["text"]
    assert problem["next"]["command"] == "tinyqueue doctor"


def test_verdict_is_given_without_redis_although_requests_are_limited() -> None:
    queue = Queue.from_url(f"redis://127.0.0.1:{free_port()}/0")
    api = Client(API(Settings(rate_limit="1/hour"), queue))
    assert api.get("/verdict").json["status"] == "critical"
    assert api.get("/stats").status == 503


def test_verdict_names_a_redis_that_refuses_the_user(own: Queue, queue_at: Any) -> None:
    port = own.pool.connection_kwargs["port"]
    problem = problems(queue_at(f"redis://:wrong@127.0.0.1:{port}/0"))["redis"]
    assert problem["text"].startswith("Redis refuses this user, or a command, so jobs can be neither submitted nor run")
    assert "ACL" in problem["next"]["text"]


def test_verdict_names_data_of_another_program(real: Server) -> None:
    queue = real.queue()
    raw(queue).set(queue.keys.counts, "x")
    problem = problems(queue)["redis"]
    assert problem["text"].startswith("Redis has other data under the keys of the queue, so ")
    assert "nothing else writes to the queue's keys" in problem["next"]["text"]


def test_verdict_says_since_when_redis_does_not_answer(start_redis: Callable[..., RedisServer], queue_at: Any) -> None:
    server = start_redis()
    api = Client(API(Settings(), queue_at(server.url)))
    assert [problem["check"] for problem in api.get("/verdict").json["problems"]] == ["persistence"]
    killed = time.time() * 1000
    server.kill()
    answer = until(lambda: (found := api.get("/verdict")).json["status"] == "critical" and found)
    assert answer.status == 200
    [problem] = answer.json["problems"]
    assert problem["check"] == "redis"
    assert killed - 2000 < problem["since"] < killed + 100


def test_verdict_names_a_redis_that_hangs(start_redis: Callable[..., RedisServer], queue_at: Any) -> None:
    server = start_redis()
    queue = queue_at(server.url)
    assert problems(queue) == {}
    assert server.process
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        [problem] = verdict(queue)["problems"]
        assert problem["text"].startswith("Redis does not answer, so jobs can be neither submitted nor run: ")
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


def test_verdict_names_a_redis_that_takes_no_writes(
    own: Queue, start_redis: Callable[..., RedisServer], queue_at: Any
) -> None:
    port = own.pool.connection_kwargs["port"]
    replica = queue_at(start_redis("--replicaof", "127.0.0.1", str(port)).url)
    problem = until(lambda: problems(replica).get("redis"))
    assert problem["text"].startswith(
        "Redis takes no writes, so jobs can be neither submitted nor run: You can't write"
    )
    assert "names a replica" in problem["next"]["text"]


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


def test_verdict_names_persistence_that_is_off(start_redis: Callable[..., RedisServer], queue_at: Any) -> None:
    queue = queue_at(start_redis().url)
    [problem] = verdict(queue)["problems"]
    assert problem["text"] == 'Redis may lose jobs: appendonly no, save ""'
    assert problem["next"]["text"] == "a restart of Redis loses every job: set appendonly yes"
    raw(queue).config_set("save", "60 1")
    assert verdict(queue)["problems"] == []  # snapshots may be what is wanted


def test_verdict_names_a_disk_that_redis_cannot_write_to(
    start_redis: Callable[..., RedisServer], queue_at: Any
) -> None:
    server = start_redis("--save", "3600 1000000", "--stop-writes-on-bgsave-error", "no")
    queue = queue_at(server.url)
    assert verdict(queue)["problems"] == []
    shutil.rmtree(server.folder)
    raw(queue).bgsave()
    problem = until(lambda: verdict(queue)["problems"])[0]
    start = "Redis may lose jobs, because it cannot write to its disk: appendonly no"
    assert (problem["text"].startswith(start), problem["level"]) == (True, "critical")
    assert problem["next"]["text"] == "Redis cannot write to its disk: read its log"


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


@pytest.mark.parametrize("cancelled", [1, 150])
def test_verdict_names_a_job_behind_cancelled_ones(queue: Queue, cancelled: int) -> None:
    queue.register(["default"], 1)
    before = queue.enqueue_many("echo", range(cancelled), queue="typo")
    later(queue, 10)
    job = queue.enqueue("echo", 1, queue="typo")
    for other in before:
        queue.cancel(other.id)
    later(queue, 30)
    found = problems(queue)["unserved"]
    assert found["text"] == "1 job in queue typo cannot start, because no live worker serves it"
    assert found["since"] == job.created_at
    assert 30_000 <= queue.queues()["typo"]["oldestWaitingMs"] < 35_000
    assert 30_000 <= queue.scale(["typo"])["oldestWaitingMs"] < 35_000


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


def test_verdict_names_quiet_workers_only_if_jobs_wait_for_long(queue: Queue) -> None:
    worker = queue.register(["default"], 1)
    queue.enqueue("echo", 1)
    queue.quiet(worker)
    later(queue, 200)
    assert problems(queue) == {}
    later(queue, 110)
    problem = problems(queue)["unserved"]
    text = "1 job in queue default cannot start, because only quiet workers serve it"
    assert (problem["text"], problem["level"]) == (text, "warning")
    assert problem["next"]["action"] == {"method": "POST", "path": f"/workers/{worker}/resume"}


def test_verdict_names_a_lost_worker(queue: Queue) -> None:
    lost = put(queue, "processing").worker
    queue.register(["default"], 1)
    assert problems(queue) == {}
    lapse(queue, lost)
    problem = problems(queue)["lost"]
    assert problem["text"] == f"Worker {lost} has sent no heartbeat for 30 s; 1 job will be requeued soon"
    assert (problem["level"], problem["workers"]) == ("warning", [lost])


def test_verdict_names_a_lost_worker_whose_jobs_nobody_requeues(queue: Queue) -> None:
    lost = put(queue, "processing").worker
    lapse(queue, lost)
    found = verdict(queue)
    assert found["status"] == "critical"
    assert f"Worker {lost} has sent no heartbeat for 30 s; 1 job will be requeued only when another worker runs" in [
        problem["text"] for problem in found["problems"]
    ]


def test_verdict_names_a_worker_that_was_reaped(queue: Queue) -> None:
    lost = put(queue, "processing").worker
    own = queue.register(["default"], 1)
    lapse(queue, lost)
    assert find_lost(queue) == [lost]
    queue.reap(lost)
    problem = problems(queue)["lost"]
    assert problem["text"] == f"Worker {lost} was lost in the last 5 minutes, and 1 job was requeued or ended"
    assert problem["workers"] == [lost]
    queue.deregister(own)
    later(queue, 6 * 60)
    assert "lost" not in problems(queue)


def test_verdict_names_no_worker_that_was_deregistered(queue: Queue) -> None:
    put(queue, "completed")
    queue.register(["default"], 1)
    assert problems(queue) == {}


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
    """Run jobs of a type, each for that time."""
    worker = queue.register(["default"], times)
    queue.enqueue_many(type, range(times))
    for job in queue.dequeue(worker, ["default"], times):
        later(queue, seconds / times)
        queue.complete(job)
    queue.deregister(worker)


def start_long(queue: Queue, seconds: float) -> list[Job]:
    """Let a worker run two jobs for that time, while a third waits. Return the two."""
    worker = queue.register(["default"], 2)
    queue.enqueue_many("report", [1, 2, 3])
    jobs = queue.dequeue(worker, ["default"], 2)
    later(queue, seconds)
    queue.heartbeat(worker, [job.id for job in jobs], jobs)
    return jobs


def test_workers_of_an_older_version_report_no_slots(queue: Queue) -> None:
    worker = queue.register(["default"], 1)
    raw(queue).set(queue.keys.lease(worker), b'{"at":1,"jobs":["x"]}', px=30_000)
    [shown] = queue.workers()
    assert (shown["jobs"], shown["slots"], shown["givenUp"]) == (["x"], [], [])


def test_verdict_names_slots_that_are_taken_for_longer_than_usual(queue: Queue) -> None:
    run_for(queue, "report", 10, times=20)
    jobs = start_long(queue, 70)
    problem = problems(queue)["slots"]
    text = "1 job waits in queue default, because all 2 slots run jobs that take longer than usual"
    assert problem["text"] == f"{text}: 2 of type report, for up to 70 s"
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


def test_verdict_names_an_overdue_schedule_without_a_worker(queue: Queue) -> None:
    put_schedule(queue, make_schedule("nightly", "* * * * *", "echo", 3))
    later(queue, 115)
    assert problems(queue) == {}  # a worker that starts soon enqueues its job
    later(queue, 180)
    problem = problems(queue)["schedules"]
    assert problem["text"].endswith(" ago, and no worker is alive")
    assert problem["next"]["command"] == "tinyqueue worker"


def test_verdict_names_a_schedule_that_waits_for_its_last_job_for_long(queue: Queue) -> None:
    worker = queue.register(["default"], 1)
    put_schedule(queue, make_schedule("nightly", "* * * * *", "echo", 3, overlap="one"))
    ticker = Ticker(queue)
    later(queue, 61)
    ticker.tick()
    [job] = queue.dequeue(worker, ["default"])
    later(queue, 200)
    ticker.tick()
    assert problems(queue) == {}
    later(queue, 300)
    problem = problems(queue)["schedules"]
    assert problem["text"].endswith(" minutes ago; nightly waits for the end of its last job")
    assert problem["next"]["command"] == f"tinyqueue get {job.id}"


def test_verdict_is_well_while_a_limit_is_paused(queue: Queue, no_handlers: None) -> None:
    @handler("charge", max_running=1)
    def charge(payload: object) -> None: ...

    queue.set_limit("charge", Override(paused=True))
    worker = queue.register(["default"], 2)
    queue.enqueue_many("charge", [1, 2])
    assert queue.dequeue(worker, ["default"], 2) == []
    later(queue, 3600)
    assert problems(queue) == {}


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
    assert problem["text"] == "Limit charge has had no room for a waiting job for 5 minutes"
    assert problem["limits"] == ["charge"]


def test_verdict_names_held_jobs_that_have_lost_their_workers(queue: Queue, no_handlers: None) -> None:
    @handler("charge", rate="1/hour", queue="money")
    def charge(payload: object) -> None: ...

    worker = queue.register(["money"], 2)
    queue.enqueue_many("charge", [1, 2])
    [job] = queue.dequeue(worker, ["money"], 2)
    queue.complete(job)
    queue.deregister(worker)
    queue.register(["default"], 1)
    later(queue, 600)
    problem = problems(queue)["limits"]
    assert problem["text"].endswith("and no live worker serves its queue money")
    assert problem["text"].startswith("Limit charge has held a job for 10 minutes")
    assert problem["next"]["command"] == "tinyqueue worker --queue money"


def test_verdict_names_a_receiver_whose_deliveries_are_held(queue: Queue, no_handlers: None) -> None:
    register()
    for _ in range(3):
        put(queue, "completed", queue="mail", callback_url="http://receiver.example/")
    worker = queue.register(["default", "webhooks"], 3)
    [first, *_] = queue.dequeue(worker, ["webhooks"], 3)
    assert problems(queue) == {}
    error = CircuitOpen("receiver.example has failed 10 times in a row", after=60)
    queue.settle(worker, [slot_fail(first, error)])
    problem = problems(queue)["deliveries"]
    assert problem["text"] == "2 deliveries are held, because receiver.example failed many times in a row"
    assert problem["limits"] == ["webhook/receiver.example"]


def test_verdict_names_a_schedule_whose_job_cannot_be_enqueued(server: Server) -> None:
    queue = server.queue(max_pending=1)
    queue.register(["default"], 1)
    queue.enqueue("echo", 1)
    queue.pause("default")
    put_schedule(queue, make_schedule("nightly", "* * * * *", "echo", 3))
    ticker = Ticker(queue)
    later(queue, 61)
    with pytest.raises(QueueFull):
        ticker.tick()
    problem = problems(queue)["schedules"]
    assert problem["text"].startswith("Schedule nightly should have run ")
    assert problem["text"].endswith(" s ago, but its job could not be enqueued (QueueFull)")


# Attempts -------------------------------------------------------------------------------------------------------------


def attempt(queue: Queue, type: str, failed: int, completed: int, error: str = "ConnectionError") -> None:
    """Run jobs of a type. Those that fail have attempts left."""
    worker = queue.register(["default"], failed + completed)
    queue.enqueue_many(type, range(failed + completed))
    jobs = queue.dequeue(worker, ["default"], failed + completed)
    failures = [Outcome(job, "fail", error=Failure(error, "no route"), after=600.0) for job in jobs[:failed]]
    queue.settle(worker, [*failures, *(Outcome(job, "complete") for job in jobs[failed:])])
    queue.deregister(worker)


def test_verdict_names_a_type_whose_attempts_all_fail(queue: Queue) -> None:
    attempt(queue, "report", 2, 0)
    assert problems(queue) == {}
    attempt(queue, "report", 1, 0)
    problem = problems(queue)["failing"]
    text = "All of the 3 attempts of type report failed in the last 5 minutes, all with ConnectionError"
    assert problem["text"] == text
    assert (problem["level"], problem["types"]) == ("warning", ["report"])
    command = "tinyqueue list --type report --error-type ConnectionError"
    assert problem["next"]["command"] == command
    assert problem["next"]["action"] == {"link": "#/jobs?type=report&errorType=ConnectionError"}
    assert queue.now() - 120_000 < problem["since"] <= queue.now()


def test_next_step_quotes_the_name_of_an_error(queue: Queue) -> None:
    worker = queue.register(["default"], 5)
    for _ in range(5):
        queue.enqueue("echo", 1, max_attempts=1)
        [job] = queue.dequeue(worker, ["default"])
        queue.fail(job, Failure("Bad; rm -r x", "no"))
    command = problems(queue)["failing"]["next"]["command"]
    assert command == "tinyqueue list --type echo --error-type 'Bad; rm -r x'"


def test_verdict_names_the_share_and_the_main_error(queue: Queue) -> None:
    attempt(queue, "mail", 0, 100)
    attempt(queue, "report", 30, 10)
    attempt(queue, "report", 2, 0, "ValueError")
    found = problems(queue)
    text = "76% of the 42 attempts of type report failed in the last 5 minutes, 30 with ConnectionError"
    assert found["failing"]["text"] == text
    assert found["failing"]["level"] == "critical"


def test_verdict_is_well_with_a_few_failures_under_load(queue: Queue) -> None:
    attempt(queue, "report", 40, 360)
    attempt(queue, "mail", 2, 3)
    assert problems(queue) == {}


def test_verdict_forgets_failures_when_attempts_succeed_again(queue: Queue) -> None:
    attempt(queue, "report", 20, 0)
    assert "failing" in problems(queue)
    later(queue, 120)
    attempt(queue, "report", 0, 1)
    assert "failing" not in problems(queue)


def test_since_of_failing_attempts_is_when_they_began(queue: Queue) -> None:
    began = queue.now()
    for _ in range(8):
        attempt(queue, "report", 5, 0)
        problem = problems(queue)["failing"]
        later(queue, 60)
    assert began - 60_000 < problem["since"] <= began


def test_verdict_names_retrying_jobs(queue: Queue) -> None:
    attempt(queue, "report", 12, 0)
    later(queue, 300)
    problem = problems(queue)["retrying"]
    assert problem["text"] == "12 jobs wait for another attempt after one that failed"
    later(queue, 60)
    attempt(queue, "report", 0, 100)
    assert problems(queue) == {}


def test_verdict_names_a_type_that_no_live_worker_knows(queue: Queue, no_handlers: None) -> None:
    @handler("echo")
    def echo(payload: object) -> None: ...

    worker = queue.register(["default"], 1)
    queue.enqueue("resize", 1)
    [job] = queue.dequeue(worker, ["default"])
    queue.settle(worker, [run_job(job)])
    problem = problems(queue)["unknown"]
    text = "Jobs of type resize are postponed, because no live worker has a handler for it"
    assert (problem["text"], problem["types"]) == (text, ["resize"])

    @handler("resize")
    def resize(payload: object) -> None: ...

    queue.register(["default"], 1)  # a rolling deploy: the old worker is still there
    assert problems(queue) == {}


def test_verdict_names_handlers_that_were_given_up(queue: Queue) -> None:
    job = put(queue, "processing")
    later(queue, 60)
    queue.heartbeat(job.worker, [], [], [job])
    problem = problems(queue)["stuck"]
    text = "1 handler was given up after the timeout and still runs: 1 of type echo"
    assert problem["text"] == f"{text}, in worker {job.worker}"
    assert problem["jobs"] == [job.id]
    assert problem["since"] == job.started_at


def test_verdict_names_a_backlog_that_grows(queue: Queue) -> None:
    queue.register(["default"], 1)
    for size in (100, 200, 300):
        queue.enqueue_many("echo", range(size))
        assert "backlog" not in problems(queue)
        later(queue, 60)
    for size in (400, 500):
        queue.enqueue_many("echo", range(size))
        problem = problems(queue)["backlog"]
        later(queue, 60)
    assert problem["text"] == "The backlog grows: 1500 jobs wait, 1400 more than 4 minutes ago"
    assert problem["queues"] == ["default"]


def test_verdict_is_well_while_a_large_batch_is_worked_off(queue: Queue) -> None:
    worker = queue.register(["default"], 100)
    queue.enqueue_many("echo", range(1000))
    for _ in range(5):
        queue.settle(worker, [Outcome(job, "complete") for job in queue.dequeue(worker, ["default"], 50)])
        assert problems(queue) == {}
        later(queue, 55)


# Refused submissions --------------------------------------------------------------------------------------------------

JOB = {"type": "echo", "payload": {}}


def accept_echo() -> None:
    @handler("echo")
    def echo(payload: object) -> None: ...


def refused(queue: Queue, settings: Settings | None = None, times: int = 1) -> dict[str, Any]:
    """The problem after submits that are refused."""
    accept_echo()
    app = API(settings or Settings(), queue)
    api = Client(app)
    assert {api.post("/jobs", JOB).status for _ in range(times)} <= {429, 503}
    return {problem["check"]: problem for problem in app.observer.verdict()["problems"]}["refused"]


def test_verdict_names_submissions_that_a_full_queue_refuses(server: Server, no_handlers: None) -> None:
    queue = server.queue(max_pending=1)
    queue.register(["default"], 1)
    queue.enqueue("echo", 1)
    problem = refused(queue)
    text = "1 submission was refused in the last 5 minutes: 1 because there were too many pending jobs or queues"
    assert (problem["text"], problem["level"]) == (text, "critical")
    assert "TINYQUEUE_MAX_PENDING" in problem["next"]["text"]
    assert queue.metrics()["refused"] == {("queue-full",): 1}
    later(queue, 180)
    assert "refused" not in problems(queue)


def test_verdict_names_submissions_that_a_full_redis_refuses(own: Queue, no_handlers: None) -> None:
    fill(own, 0.97)
    text = "1 submission was refused in the last 5 minutes: 1 because the memory of Redis was nearly used up"
    assert refused(own)["text"] == text


def test_verdict_names_submissions_refused_while_redis_takes_no_writes(own: Queue, no_handlers: None) -> None:
    fill(own, 1.05)
    text = "3 submissions were refused in the last 5 minutes: 3 because the memory of Redis was nearly used up"
    assert refused(own, times=3)["text"] == text


def test_refusals_without_redis_are_counted_when_it_is_back(
    start_redis: Callable[..., RedisServer], no_handlers: None, queue_at: Any
) -> None:
    server = start_redis()
    accept_echo()
    api = Client(API(Settings(), queue_at(server.url)))
    assert api.get("/verdict").json["problems"]
    server.kill()
    assert {api.post("/jobs", JOB).json["reason"] for _ in range(2)} == {"unreachable"}
    found = until(lambda: {p["check"]: p for p in api.get("/verdict").json["problems"]}.get("refused"))
    assert found["text"].endswith("2 because Redis did not answer")
    server.start()
    text = 'tinyqueue_submissions_refused_total{reason="unreachable"} 2.0'
    until(lambda: text in api.get("/metrics").body.decode())


def test_verdict_names_submissions_that_too_few_replicas_have(own: Queue, no_handlers: None) -> None:
    queue = Queue(own.pool, min_replicas=1)
    found = refused(queue)
    assert found["text"].endswith("1 because too few replicas had the jobs")
    text = "Submissions are refused, because 0 replicas keep up and 1 is required"
    assert problems(queue)["replicas"]["text"] == text


def test_verdict_names_submissions_that_the_rate_limit_refuses(real: Server, no_handlers: None) -> None:
    queue = real.queue()
    settings = Settings(rate_limit="1/hour")
    Client(API(settings, queue)).post("/jobs", JOB)
    problem = refused(queue, settings, times=10)
    text = "10 submissions were refused in the last 5 minutes: 10 because of the rate limit"
    assert (problem["text"], problem["level"]) == (text, "warning")


def test_verdict_is_well_when_the_rate_limit_refuses_a_few(real: Server, no_handlers: None) -> None:
    queue = real.queue()
    accept_echo()
    api = Client(API(Settings(rate_limit="1/hour"), queue))
    assert [api.post("/jobs", JOB).status for _ in range(5)][1:] == [429] * 4
    assert problems(queue) == {}


def test_invalid_submissions_are_not_counted_as_refused(queue: Queue, api: Client) -> None:
    assert api.post("/jobs", {"type": "nope", "payload": 1}).status == 422
    assert "refused" not in queue.metrics()


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
    queue.reap(lost)
    later(queue, 360)
    assert "lost" not in problems(queue)
    assert b"lost:" not in raw(queue).hgetall(queue.keys.trouble)


def test_metrics_expose_every_check(queue: Queue) -> None:
    job = put(queue, "processing", queue="mail")
    queue.heartbeat(job.worker, [], [], [job])
    text = Client(API(Settings(), queue)).get("/metrics").body.decode()
    shown = dict(re.findall('^tinyqueue_problems{check="([a-z]+)"} ([01]).0$', text, re.M))
    assert shown.keys() == CHECKS.keys()
    assert {check for check, value in shown.items() if value == "1"} - {"persistence"} == {"stuck"}
    assert "\ntinyqueue_stuck_threads 1.0\n" in text
    assert '\ntinyqueue_submissions_refused_total{reason="queue-full"} 0.0\n' in text


def test_ready_warns_of_what_the_verdict_says(queue: Queue) -> None:
    queue.register(["default"], 1)
    queue.enqueue("echo", 1, queue="mial")
    later(queue, 4)
    text = "1 job in queue mial cannot start, because no live worker serves it: start a worker that serves it"
    assert f"{text} (tinyqueue worker --queue mial)" in Client(API(Settings(), queue)).get("/ready").json["warnings"]


# Real workers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def work(own: Queue, no_handlers: None) -> Iterator[Callable[..., Running]]:
    """Start workers on the queue. They end with the test."""
    started: list[Running] = []

    def work(**options: Any) -> Running:
        started.append(Running(own, **options))
        return started[-1]

    yield work
    for running in started:
        running.end("release")


def test_verdict_names_failing_attempts_within_five_seconds(own: Queue, work: Callable[..., Running]) -> None:
    @handler("report", backoff=0.5)
    def report(payload: object) -> None:
        raise ConnectionError("no route")

    work(slots=2)
    api = Client(API(Settings(), own))
    assert api.get("/verdict").json["status"] == "well"
    began = time.monotonic()
    own.enqueue_many("report", range(3))
    until(lambda: api.get("/verdict").json["status"] != "well", timeout=5)
    assert time.monotonic() - began < 5
    found = {problem["check"]: problem for problem in api.get("/verdict").json["problems"]}
    assert found["failing"]["text"].startswith("All of the ")
    assert found["failing"]["text"].endswith("failed in the last 5 minutes, all with ConnectionError")


def test_verdict_names_a_handler_that_its_worker_has_given_up(own: Queue, work: Callable[..., Running]) -> None:
    gate = threading.Event()

    @handler("stuck", timeout=0.1, max_attempts=1)
    def stuck(payload: object) -> None:
        gate.wait()  # a wait for a lock cannot be interrupted

    running = work(slots=2)
    job = own.enqueue("stuck", 1)
    try:
        until(lambda: running.worker.stuck)
        problem = until(lambda: problems(own).get("stuck"), timeout=5)
        assert problem["text"].startswith("1 handler was given up after the timeout and still runs: 1 of type stuck")
        assert problem["jobs"] == [job.id]
        [shown] = own.workers()
        assert [slot["jobId"] for slot in shown["givenUp"]] == [job.id]
    finally:
        gate.set()
    until(lambda: "stuck" not in problems(own), timeout=5)


def test_verdict_stays_well_under_load_and_while_workers_are_replaced(own: Queue, work: Callable[..., Running]) -> None:
    @handler("mail", backoff=0.1)
    def mail(payload: int) -> None:
        if payload % 50 == 0:
            raise ValueError("one in fifty")

    running = work(slots=5)
    until(own.workers)
    for round in range(8):
        own.enqueue_many("mail", range(400))
        assert verdict(own)["problems"] == []
        if round in (2, 5):
            old, running = running, work(slots=5)
            old.end("drain")
            assert verdict(own)["problems"] == []
        until(lambda: own.stats()["pending"] < 100)
        assert verdict(own)["problems"] == []


def test_verdict_names_slots_that_a_real_worker_reports(own: Queue, work: Callable[..., Running]) -> None:
    gate = threading.Event()

    @handler("report")
    def report(payload: object) -> None:
        gate.wait(60)

    running = work(slots=2)
    jobs = own.enqueue_many("report", range(3))
    until(lambda: len(running.worker.held) == 2)
    running.worker.beat_at_once = True
    slots = until(lambda: own.workers()[0]["slots"])
    assert {slot["jobId"] for slot in slots} == {job.id for job in jobs[:2]}
    gate.set()


# On the command line --------------------------------------------------------------------------------------------------


def test_stats_prints_the_verdict(real: Server) -> None:
    queue = real.queue()
    queue.register(["default"], 1)
    job = queue.draft("echo", 1, queue="mial")
    job.id = new_id(queue.now() - 10_000)  # the commands go by the clock of Redis
    queue.submit([job])
    environ = {"REDIS_URL": real.url}
    shown = CliRunner(env=environ).invoke(worker_module.cli, ["stats"]).output
    first = "critical: 1 job in queue mial cannot start, because no live worker serves it (since "
    assert shown.startswith(first)
    assert "\n  next: start a worker that serves it: tinyqueue worker --queue mial\n" in shown
    about = json.loads(CliRunner(env=environ).invoke(worker_module.cli, ["stats", "--json"]).output)
    assert about["verdict"]["status"] == "critical"


def test_stats_says_that_all_is_well(own: Queue) -> None:
    own.register(["default"], 1)
    environ = {"REDIS_URL": f"redis://127.0.0.1:{own.pool.connection_kwargs['port']}/0"}
    shown = CliRunner(env=environ).invoke(worker_module.cli, ["stats"]).output
    assert shown.startswith("All is well: 1 live worker, 0 running jobs, 0 pending jobs.\n")


def test_workers_prints_what_each_slot_runs(real: Server) -> None:
    queue = real.queue()
    job = put(queue, "processing")
    queue.heartbeat(job.worker, [job.id], [job], [job])
    shown = CliRunner(env={"REDIS_URL": real.url}).invoke(worker_module.cli, ["workers"]).output
    lines = [line.split() for line in shown.splitlines() if job.id in line][1:]
    assert [line[:3] for line in lines] == [[job.worker, job.id, "echo"]] * 2
    assert lines[1][5:] == ["given", "up,", "and", "still", "runs"]


# Replicas and sentinels -----------------------------------------------------------------------------------------------


def test_verdict_names_a_replica_that_lags(own: Queue, start_redis: Callable[..., RedisServer]) -> None:
    port = own.pool.connection_kwargs["port"]
    replica = start_redis("--replicaof", "127.0.0.1", str(port), "--repl-diskless-sync-delay", "0")
    until(lambda: raw(own).info("replication").get("slave0", {}).get("state") == "online")
    assert verdict(own)["problems"] == []
    assert replica.process
    os.kill(replica.process.pid, signal.SIGSTOP)
    problem = until(lambda: problems(own).get("replicas"), timeout=30)
    start = f"A failover may lose the last changes, because replicas are behind: 127.0.0.1:{replica.port} (1"
    assert problem["text"].startswith(start)
    os.kill(replica.process.pid, signal.SIGCONT)
