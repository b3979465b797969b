"""Hosts without a process of ours: POST /work, AWS Lambda and other WSGI servers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from client import Client
from conftest import RedisServer, Server, lapse, put, raw, until

from tinyqueue import Discard, Queue, Retry, Shards, handler
from tinyqueue_config import Settings
from wsgi import API


@pytest.fixture(autouse=True)
def handlers(no_handlers: None) -> None:
    @handler("echo")
    def echo(payload: Any) -> Any:
        return payload


class Long:
    """A handler that runs until it is interrupted or `opened`. With `deaf`, nothing interrupts it."""

    def __init__(self, deaf: bool = False) -> None:
        self.started = threading.Event()
        self.ended = threading.Event()
        self.opened = threading.Event()

        @handler("long")
        def long(payload: Any) -> None:
            self.started.set()
            try:
                while not self.opened.wait(None if deaf else 0.01):
                    pass
            finally:
                self.ended.set()


@pytest.fixture
def long() -> Iterator[Callable[..., Long]]:
    made: list[Long] = []

    def make(deaf: bool = False) -> Long:
        made.append(Long(deaf))
        return made[-1]

    yield make
    for each in made:
        each.opened.set()


def work(api: Client, seconds: int = 20) -> Any:
    """Let the process of this API work, and return the counts that are not 0."""
    answer = api.call("POST", f"/work?seconds={seconds}")
    assert answer.status == 200, answer
    return {name: count for name, count in answer.json.items() if count}


# POST /work -----------------------------------------------------------------------------------------------------------


def test_work_runs_what_is_due_and_counts_the_outcomes(api: Client, queue: Queue) -> None:
    @handler("discard")
    def discard(payload: Any) -> None:
        raise Discard("never")

    @handler("retry")
    def retry(payload: Any) -> None:
        raise Retry("later", after=60)

    jobs = queue.enqueue_many("echo", range(20))
    queue.enqueue("discard", 1)
    queue.enqueue("retry", 1)
    later = queue.enqueue("echo", 1, delay=60)
    assert work(api) == {"completed": 20, "failed": 1, "retried": 1}
    assert [queue.get(job.id).result for job in jobs] == list(range(20))
    assert queue.get(later.id).status == "pending"


def test_work_answers_every_count(api: Client) -> None:
    answer = api.call("POST", "/work")
    assert answer.json == dict.fromkeys(
        ("completed", "retried", "failed", "cancelled", "released", "lost", "unsaved", "waiting"), 0
    )


def test_work_serves_the_queues_of_all_handlers(api: Client, queue: Queue) -> None:
    @handler("mail", queue="mails")
    def mail(payload: Any) -> None: ...

    queue.enqueue("mail", 1)
    assert work(api) == {"completed": 1}


def test_work_runs_delayed_jobs_whose_time_has_come(api: Client, queue: Queue) -> None:
    queue.enqueue("echo", 1, delay=60)
    queue.clock.ahead += 61_000
    assert work(api) == {"completed": 1}


def test_work_has_deregistered_when_it_answers(api: Client, queue: Queue) -> None:
    queue.enqueue("echo", 1)
    assert work(api) == {"completed": 1}
    assert queue.workers() == []
    assert not list(raw(queue).scan_iter("*lease*"))


@pytest.mark.parametrize("seconds", ["0", "26", "-1", "1.5", "", "x"])
def test_work_refuses_a_time_that_is_out_of_range(api: Client, seconds: str) -> None:
    answer = api.call("POST", f"/work?seconds={seconds}")
    assert (answer.status, answer.kind, answer.problem["field"]) == (400, "invalid-query", "seconds")


def test_work_is_limited_to_the_time_of_the_settings(queue: Queue) -> None:
    api = Client(API(msgspec.structs.replace(Settings(), max_work=60), queue))
    assert work(api, 60) == {}
    assert api.call("POST", "/work?seconds=61").status == 400
    assert api.get("/openapi.json").json["components"]["parameters"]["seconds"]["schema"]["maximum"] == 60


def test_work_refuses_a_second_call_while_one_runs(api: Client, queue: Queue, long: Any) -> None:
    job = long()
    queue.enqueue("long", 1)
    answers: list[Any] = []
    first = threading.Thread(target=lambda: answers.append(work(api)))
    first.start()
    assert job.started.wait(20)
    second = api.call("POST", "/work")
    assert (second.status, second.kind, second.headers["retry-after"]) == (409, "already-working", "1")
    assert second.problem["detail"].startswith("another POST /work runs in this process")
    job.opened.set()
    first.join()
    assert answers == [{"completed": 1}]
    assert work(api) == {}


def test_work_releases_and_interrupts_a_job_that_outlasts_its_time(api: Client, queue: Queue, long: Any) -> None:
    running = long()
    job = queue.enqueue("long", 1)
    begun = time.monotonic()
    assert work(api, 1) == {"released": 1, "waiting": 1}
    assert 1 <= time.monotonic() - begun < 4
    assert running.ended.is_set()
    found = queue.get(job.id)
    assert found
    assert (found.status, found.attempts, found.refunds) == ("pending", 0, 1)
    assert queue.workers() == []


def test_work_takes_no_more_jobs_shortly_before_its_end(api: Client, queue: Queue) -> None:
    @handler("slow")
    def slow(payload: Any) -> None:
        threading.Event().wait(0.01)

    queue.enqueue_many("slow", range(1000))
    begun = time.monotonic()
    counts = work(api, 1)
    assert time.monotonic() - begun < 1
    assert counts == {"completed": counts["completed"], "waiting": 1000 - counts["completed"]}


def test_work_counts_handlers_that_cannot_be_interrupted_as_busy_slots(queue: Queue, long: Any) -> None:
    api = Client(API(msgspec.structs.replace(Settings(), worker_concurrency=2), queue))
    deaf = long(deaf=True)
    queue.enqueue("long", 1, max_attempts=1)
    assert work(api, 1) == {"released": 1, "waiting": 1}
    assert work(api, 1) == {"released": 1, "waiting": 1}
    refused = api.call("POST", "/work?seconds=1")
    assert (refused.status, refused.kind) == (409, "already-working")
    assert "handlers of earlier requests" in refused.problem["detail"]
    deaf.opened.set()
    assert until(lambda: api.call("POST", "/work?seconds=1").status == 200)


def test_work_runs_the_jobs_of_a_lost_worker(server: Server) -> None:
    queue = server.queue(lease=2)
    lost = put(queue, "processing")
    lapse(queue, lost.worker)
    assert work(Client(API(Settings(), queue)), 10) == {"completed": 1}
    assert queue.get(lost.id).attempts == 2
    assert queue.workers() == []


def test_work_leaves_a_worker_alone_that_sends_heartbeats(server: Server) -> None:
    queue = server.queue(lease=2)
    alive = put(queue, "processing")
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.1):
            queue.heartbeat(alive.worker, [alive.id])

    lapse(queue, alive.worker)  # as if Redis' clock had been set ahead
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert work(Client(API(Settings(), queue)), 5) == {}
        assert queue.get(alive.id).worker == alive.worker
    finally:
        stop.set()
        thread.join()


def test_work_runs_the_jobs_of_all_shards(real: Server) -> None:
    shards = Shards([real.queue(namespace=f"queue.{at}") for at in range(3)])
    shards.enqueue_many("echo", range(30))
    assert work(Client(API(Settings(), shards))) == {"completed": 30}
    assert shards.workers() == []


def test_work_leaves_no_threads_and_no_connections(near: Queue, shared_redis: RedisServer) -> None:
    api = Client(API(msgspec.structs.replace(Settings(), redis_url=shared_redis.url), near))
    near.enqueue("echo", 0)
    assert work(api) == {"completed": 1}

    def used() -> tuple[int, int]:
        return threading.active_count(), raw(near).info("clients")["connected_clients"]

    before = used()
    for n in range(100):
        near.enqueue("echo", n)
        assert work(api) == {"completed": 1}
    assert used() == before


def test_work_without_redis_answers_503(real: Server, queue_at: Any, start_redis: Callable[..., RedisServer]) -> None:
    redis = start_redis()
    queue = queue_at(redis.url)
    api = Client(API(Settings(), queue))
    assert work(api) == {}
    redis.kill()
    answer = api.call("POST", "/work")
    assert (answer.status, answer.kind) == (503, "unavailable")
