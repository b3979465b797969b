"""Hosts without a process of ours: POST /work, AWS Lambda and other WSGI servers."""

from __future__ import annotations

import io
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


# Bodies as other servers pass them on ---------------------------------------------------------------------------------

JOB = b'{"type":"echo","payload":"\xc3\xa9"}'
CHUNKED = {"HTTP_TRANSFER_ENCODING": "chunked"}


class Dripping(io.BytesIO):
    """A stream that returns less than it was asked for, as a socket does."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(7, size if size and size > 0 else 7))


class Endless(io.BytesIO):
    """A connection that the client keeps open: a read behind the body would block."""

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        assert data, "the app reads behind the end of the body"
        return data


@pytest.mark.parametrize("make", [io.BytesIO, Dripping])
def test_body_is_read_that_the_server_has_decoded_from_chunks(api: Client, make: Any) -> None:
    answer = api.stream("/jobs", make(JOB), **CHUNKED, **{"wsgi.input_terminated": True})
    assert answer.status == 201
    assert api.get(answer.headers["location"]).json["payload"] == "é"


def test_body_is_read_whose_chunks_the_server_has_not_decoded(api: Client) -> None:
    chunks = b"5\r\n" + JOB[:5] + b"\r\n%x\r\n" % len(JOB[5:]) + JOB[5:] + b"\r\n0\r\n\r\n"
    assert api.stream("/jobs", io.BytesIO(chunks), **CHUNKED).status == 201


def test_body_that_arrives_in_small_parts_is_read_to_its_end(api: Client) -> None:
    assert api.stream("/jobs", Dripping(JOB), CONTENT_LENGTH=str(len(JOB))).status == 201


def test_body_is_not_read_behind_its_length(api: Client) -> None:
    assert api.stream("/jobs", Endless(JOB + b"GET /"), CONTENT_LENGTH=str(len(JOB))).status == 201


def test_body_with_a_false_chunked_header_and_a_length_is_read_by_its_length(api: Client) -> None:
    assert api.stream("/jobs", Endless(JOB), CONTENT_LENGTH=str(len(JOB)), **CHUNKED).status == 201


@pytest.mark.parametrize("length", ["", None])
def test_body_without_a_length_is_empty(api: Client, length: str | None) -> None:
    answer = api.stream("/jobs", Endless(JOB), **({} if length is None else {"CONTENT_LENGTH": length}))
    assert (answer.status, answer.kind) == (400, "not-json")


@pytest.mark.parametrize("length", ["9" * 30, "+5"])
def test_body_with_a_malformed_length_is_refused(api: Client, length: str) -> None:
    answer = api.stream("/jobs", io.BytesIO(JOB), CONTENT_LENGTH=length)
    assert (answer.status, answer.kind) == (400, "bad-request")


def test_body_that_ends_early_is_refused(api: Client) -> None:
    answer = api.stream("/jobs", io.BytesIO(JOB[:-5]), CONTENT_LENGTH=str(len(JOB)))
    assert (answer.status, answer.kind) == (400, "not-json")


@pytest.mark.parametrize("environ", [CHUNKED | {"wsgi.input_terminated": True}, {"CONTENT_LENGTH": "50"}])
def test_body_that_the_server_cannot_read_is_refused(api: Client, environ: dict[str, Any]) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError("request data read error")

    answer = api.stream("/jobs", Broken(), **environ)
    assert (answer.status, answer.kind) == (400, "bad-request")
    assert api.log.getvalue() == ""


@pytest.mark.parametrize("environ", [CHUNKED | {"wsgi.input_terminated": True}, {"CONTENT_LENGTH": "999999"}])
def test_body_that_is_too_large_is_not_read_whole(api: Client, environ: dict[str, Any]) -> None:
    stream = io.BytesIO(b" " * 1_000_000)
    answer = api.stream("/jobs", stream, **environ)
    assert (answer.status, answer.kind) == (413, "too-large")
    assert stream.tell() <= Settings().max_body + 1
