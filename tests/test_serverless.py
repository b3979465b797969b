"""Hosts without a process of ours: POST /work, AWS Lambda and other WSGI servers."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import msgspec
import pytest
from client import Answer, Client, Process, Wire, running, spell
from conftest import RedisServer, Server, lapse, put, raw, threads_since, until

from tinyqueue import Discard, Job, Queue, Retry, handler
from tinyqueue_config import Settings
from tinyqueue_shards import Shards
from wsgi import API

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def handlers(no_handlers: None) -> None:
    @handler("echo")
    def echo(payload: Any) -> Any:
        return payload


class Long:
    """A handler that runs until it is interrupted or `opened`. With `deaf`, nothing interrupts it."""

    def __init__(self, deaf: bool = False, timeout: float | None = None) -> None:
        self.started = threading.Event()
        self.ended = threading.Event()
        self.opened = threading.Event()

        @handler("long", timeout=timeout)
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

    def make(**options: Any) -> Long:
        made.append(Long(**options))
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


def test_work_counts_handlers_that_cannot_be_interrupted_as_busy_slots(near: Queue, long: Any) -> None:
    api = Client(API(msgspec.structs.replace(Settings(), worker_concurrency=2), near))
    deaf = long(deaf=True)
    near.enqueue("long", 1, max_attempts=1)
    assert work(api, 1) == {"released": 1, "waiting": 1}
    assert work(api, 1) == {"released": 1, "waiting": 1}
    refused = api.call("POST", "/work?seconds=1")
    assert (refused.status, refused.kind) == (409, "already-working")
    assert "handlers of earlier requests" in refused.problem["detail"]
    deaf.opened.set()
    assert until(lambda: api.call("POST", "/work?seconds=1").status == 200)


def test_work_answers_500_when_no_handler_ends_at_its_timeout(
    near: Queue, long: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyqueue_slot.GRACE", 0.1)
    api = Client(API(msgspec.structs.replace(Settings(), worker_concurrency=1), near))
    deaf = long(deaf=True, timeout=0.1)
    job = near.enqueue("long", 1)
    answer = api.call("POST", "/work")
    assert (answer.status, answer.kind) == (500, "worker-failed")
    assert near.get(job.id).error.type == "TimedOut"
    assert near.workers() == []
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

    def connected() -> int:
        return raw(near).info("clients")["connected_clients"]

    threads = threading.enumerate()
    clients = connected()
    for n in range(100):
        near.enqueue("echo", n)
        assert work(api) == {"completed": 1}
        assert threads_since(threads) == []
    until(lambda: connected() <= clients)  # Redis notices a closed connection a little later


def test_work_without_redis_answers_503(real: Server, queue_at: Any, start_redis: Callable[..., RedisServer]) -> None:
    redis = start_redis()
    queue = queue_at(redis.url)
    api = Client(API(Settings(), queue))
    assert work(api) == {}
    redis.kill()
    answer = api.call("POST", "/work")
    assert (answer.status, answer.kind) == (503, "unavailable")


# POST /work in a process ----------------------------------------------------------------------------------------------

SLOW = """
import os, time
from tinyqueue import handler

@handler("slow")
def slow(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
"""
WORK = spell("POST", "/work?seconds=20", None, "Content-Length: 0")


def begin_work(queue: Queue, process: Process, job: Job) -> Wire:
    """Send POST /work and return when the job runs."""
    wire = Wire(process.address)
    wire.send(WORK)
    until(lambda: queue.get(job.id).status == "processing")
    return wire


@pytest.fixture
def slow_folder(tmp_path: Path) -> Path:
    (tmp_path / "handlers.py").write_text(SLOW)
    return tmp_path


def test_work_drains_when_the_process_is_stopped(near: Queue, shared_redis: RedisServer, slow_folder: Path) -> None:
    jobs = near.enqueue_many("slow", [1.0] * 3)
    options = {"REDIS_URL": shared_redis.url, "WORKER_CONCURRENCY": "1"}
    with running(slow_folder, **options) as web, begin_work(near, web, jobs[0]) as wire:
        os.kill(web.pid, signal.SIGTERM)
        answer = wire.answer()
    assert (answer.status, answer.json["completed"], answer.json["waiting"]) == (200, 1, 2)
    assert near.workers() == []


def test_work_releases_what_outlasts_the_stop_of_the_process(
    near: Queue, shared_redis: RedisServer, slow_folder: Path
) -> None:
    job = near.enqueue("slow", 60.0)
    options = {"REDIS_URL": shared_redis.url, "TINYQUEUE_SHUTDOWN_TIMEOUT": "4"}
    with running(slow_folder, **options) as web, begin_work(near, web, job) as wire:
        os.kill(web.pid, signal.SIGTERM)
        assert wire.answer().json["released"] == 1
    found = near.get(job.id)
    assert found
    assert (found.status, found.attempts) == ("pending", 0)


def test_work_alone_runs_the_jobs_of_a_process_that_was_killed(
    near: Queue, shared_redis: RedisServer, slow_folder: Path
) -> None:
    job = near.enqueue("slow", 0.5)
    options = {"REDIS_URL": shared_redis.url, "TINYQUEUE_LEASE": "2"}
    with running(slow_folder, **options) as web, begin_work(near, web, job):
        os.kill(web.pid, signal.SIGKILL)
    assert near.get(job.id).status == "processing"
    with running(slow_folder, **options) as web, Wire(web.address) as wire:
        until(lambda: not near.workers()[0]["alive"])
        wire.send(WORK)
        assert wire.answer().json["completed"] == 1
    assert near.get(job.id).attempts == 2
    assert near.workers() == []


def test_work_answers_three_seconds_after_its_time_if_redis_hangs(
    queue_at: Any, start_redis: Callable[..., RedisServer], slow_folder: Path
) -> None:
    redis = start_redis()
    queue = queue_at(redis.url)
    job = queue.enqueue("slow", 1.0)
    with running(slow_folder, REDIS_URL=redis.url) as web, Wire(web.address) as wire:
        began = time.monotonic()
        wire.send(spell("POST", "/work?seconds=2", None, "Content-Length: 0"))
        until(lambda: queue.get(job.id).status == "processing")
        redis.process.send_signal(signal.SIGSTOP)
        answer = wire.answer()
        assert time.monotonic() - began < 2 + 3 + 1
        assert (answer.status, answer.kind) == (503, "unavailable")
        redis.process.send_signal(signal.SIGCONT)


def test_work_of_a_process_that_was_frozen_meanwhile_settles_nothing(
    near: Queue, shared_redis: RedisServer, slow_folder: Path
) -> None:
    job = near.enqueue("slow", 1.0)
    options = {"REDIS_URL": shared_redis.url, "TINYQUEUE_LEASE": "2"}
    with running(slow_folder, **options) as frozen, begin_work(near, frozen, job) as wire:
        os.kill(frozen.pid, signal.SIGSTOP)
        until(lambda: not near.workers()[0]["alive"])
        (slow_folder / "other").mkdir()
        (slow_folder / "other/handlers.py").write_text(SLOW)
        with running(slow_folder / "other", **options) as web, Wire(web.address) as other:
            other.send(WORK)
            assert other.answer().json["completed"] == 1
        os.kill(frozen.pid, signal.SIGCONT)
        answer = wire.answer().json
        assert (answer["completed"], answer["lost"]) == (0, 1)
    assert near.get(job.id).attempts == 2
    assert near.workers() == []


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


# AWS Lambda -----------------------------------------------------------------------------------------------------------

LAMBDA = """
import json, sys
sys.path.insert(0, sys.argv[1])
from lambda_function import lambda_handler

class Context:
    def get_remaining_time_in_millis(self):
        return 8000

for line in sys.stdin:
    print(json.dumps(lambda_handler(json.loads(line), Context())), flush=True)
"""
ECHO = """
from tinyqueue import handler

@handler("echo")
def echo(payload: object) -> object:
    return payload
"""
KEY = "s3cr3t-s3cr3t-s3cr3t"
SENT = {"Authorization": f"Bearer {KEY}", "Host": "api.example.com", "X-Forwarded-For": "203.0.113.9"}


class Lambda:
    """A function of AWS Lambda in another process, which answers one event at a time."""

    def __init__(self, folder: Path, url: str) -> None:
        (folder / "handlers.py").write_text(ECHO)
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "REDIS_URL": url}
        environ |= {"TINYQUEUE_API_KEYS": f"ops:admin:{KEY}", "AWS_LAMBDA_FUNCTION_NAME": "tinyqueue"}
        command = [sys.executable, "-c", LAMBDA, str(REPOSITORY / "deploy/lambda")]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def invoke(self, event: dict[str, Any]) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(event) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(20) == 0


@pytest.fixture(scope="module")
def function(shared_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lambda]:
    pytest.importorskip("apig_wsgi")
    made = Lambda(tmp_path_factory.mktemp("lambda"), shared_redis.url)
    yield made
    made.end()


class Sent(NamedTuple):
    """A request as the client sent it."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes | None
    binary: bool  # whether the body is passed on in base64

    def encoded(self) -> dict[str, Any]:
        if self.body is None:
            return {"body": None, "isBase64Encoded": False}
        text = base64.b64encode(self.body).decode() if self.binary else self.body.decode()
        return {"body": text, "isBase64Encoded": self.binary}


def rest_api(sent: Sent) -> Any:
    """An event of a REST API (API Gateway v1), or of an HTTP API with payload format 1.0."""
    pairs = parse_qsl(sent.query, keep_blank_values=True)
    return {
        "resource": "/{proxy+}",
        "path": sent.path,
        "httpMethod": sent.method,
        "headers": sent.headers or None,
        "multiValueHeaders": {name: [value] for name, value in sent.headers.items()} or None,
        "queryStringParameters": dict(pairs) or None,
        "multiValueQueryStringParameters": {name: [v for n, v in pairs if n == name] for name, _ in pairs} or None,
        "pathParameters": {"proxy": sent.path[1:]},
        "stageVariables": None,
        "requestContext": {
            "resourcePath": "/{proxy+}",
            "httpMethod": sent.method,
            "path": f"/prod{sent.path}",
            "stage": "prod",
            "protocol": "HTTP/1.1",
            "identity": {"sourceIp": "203.0.113.9", "userAgent": "curl/8"},
        },
        **sent.encoded(),
    }


def http_api(sent: Sent, stage: str = "prod") -> Any:
    """An event of an HTTP API (payload format 2.0), whose path begins with a named stage."""
    whole = sent.path if stage == "$default" else f"/{stage}{sent.path}"
    return {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": whole,
        "rawQueryString": sent.query,
        "headers": {name.lower(): value for name, value in sent.headers.items()},
        "requestContext": {
            "stage": stage,
            "domainName": "id.execute-api.eu-central-1.amazonaws.com",
            "http": {"method": sent.method, "path": whole, "protocol": "HTTP/1.1", "sourceIp": "203.0.113.9"},
        },
        **{name: value for name, value in sent.encoded().items() if value is not None},
    }


def function_url(sent: Sent) -> Any:
    """An event of a function URL: payload format 2.0 without a stage."""
    event = http_api(sent, stage="$default")
    event["requestContext"] |= {"domainName": "id.lambda-url.eu-central-1.on.aws", "apiId": "id"}
    return event


def load_balancer(sent: Sent) -> Any:
    """An event of an Application Load Balancer, which does not decode the query."""
    return {
        "requestContext": {"elb": {"targetGroupArn": "arn:aws:elasticloadbalancing:eu:1:targetgroup/x/1"}},
        "httpMethod": sent.method,
        "path": sent.path,
        "queryStringParameters": dict(pair.split("=", 1) for pair in sent.query.split("&") if pair),
        "headers": {name.lower(): value for name, value in sent.headers.items()},
        **sent.encoded(),
    }


def load_balancer_multi(sent: Sent) -> Any:
    """The same with multi-value headers, which a target group may have enabled."""
    event = load_balancer(sent)
    event["multiValueHeaders"] = {name: [value] for name, value in event.pop("headers").items()}
    event["multiValueQueryStringParameters"] = {n: [v] for n, v in event.pop("queryStringParameters").items()}
    return event


SHAPES = [rest_api, http_api, function_url, load_balancer, load_balancer_multi]


@pytest.fixture(params=SHAPES, ids=[shape.__name__ for shape in SHAPES])
def call(request: pytest.FixtureRequest, function: Lambda) -> Callable[..., Answer]:
    def call(method: str, path: str, body: bytes | None = None, binary: bool = False, **headers: str) -> Answer:
        path, _, query = path.partition("?")
        typed = {} if body is None else {"Content-Type": "application/json"}
        answer = function.invoke(request.param(Sent(method, path, query, SENT | typed | headers, body, binary)))
        many = answer.get("multiValueHeaders", {})
        got = answer.get("headers", {}) | {name: value for name, [value] in many.items()}
        assert not answer["isBase64Encoded"]
        return Answer(answer["statusCode"], {k.lower(): v for k, v in got.items()}, answer["body"].encode())

    return call


@pytest.mark.parametrize("binary", [False, True])
def test_lambda_accepts_and_shows_a_job(call: Any, near: Queue, binary: bool) -> None:
    submitted = call("POST", "/jobs", JOB, binary=binary)
    assert submitted.status == 201
    shown = call("GET", f"/{submitted.headers['location']}")
    assert (shown.status, shown.json["payload"], shown.headers["content-type"]) == (200, "é", "application/json")


def test_lambda_reads_the_query(call: Any, near: Queue) -> None:
    near.enqueue("echo", 1, queue="a")
    near.enqueue("echo", 2, queue="b")
    listed = call("GET", "/jobs?status=pending&queue=b&cursor=")
    assert [job["queue"] for job in listed.json["jobs"]] == ["b"]
    assert call("GET", "/jobs?type=a%2Bb%26c").json["jobs"] == []


@pytest.mark.parametrize("path", ["/jobs/%20", "/jobs/%C3%A9", "/jobs/%2e%2e", "/jobs%2F", "/%ff", "/jobs/\u00e9"])
def test_lambda_answers_404_to_an_encoded_path(call: Any, near: Queue, path: str) -> None:
    answer = call("GET", path)
    assert (answer.status, answer.kind) == (404, "not-found")


def test_lambda_answers_a_problem_as_text(call: Any, near: Queue) -> None:
    answer = call("POST", "/jobs", b"{")
    assert (answer.status, answer.kind) == (400, "not-json")


def test_lambda_serves_the_dashboard(call: Any) -> None:
    answer = call("GET", "/")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.body.startswith(b"<!doctype html>")


def test_lambda_refuses_a_request_without_a_key(call: Any, near: Queue) -> None:
    assert call("GET", "/stats", Authorization="").status == 401


def test_lambda_passes_on_request_ids_and_idempotency_keys(call: Any, near: Queue) -> None:
    first = call("POST", "/jobs", JOB, **{"Idempotency-Key": "one", "X-Request-ID": "mine"})
    again = call("POST", "/jobs", JOB, **{"Idempotency-Key": "one"})
    assert (first.status, again.status, again.json["jobId"]) == (201, 200, first.json["jobId"])
    assert first.headers["x-request-id"] == "mine"


def test_lambda_lets_no_request_wait(call: Any, near: Queue) -> None:
    answer = call("GET", f"/jobs/{near.enqueue('echo', 1).id}?wait=25")
    assert (answer.status, answer.json["status"], answer.headers["retry-after"]) == (200, "pending", "1")


def test_lambda_runs_jobs_at_a_request(call: Any, near: Queue) -> None:
    near.enqueue_many("echo", range(5))
    assert call("POST", "/work?seconds=5").json["completed"] == 5
    assert near.workers() == []


def test_lambda_runs_jobs_at_a_scheduled_event(function: Lambda, near: Queue) -> None:
    near.enqueue_many("echo", range(5))
    event = {
        "version": "0",
        "id": "53dc4d37-cffa-4f76-80c9-8b7d4a4d2eaa",
        "detail-type": "Scheduled Event",
        "source": "aws.events",
        "account": "123456789012",
        "time": "2026-01-01T00:00:00Z",
        "region": "eu-central-1",
        "resources": ["arn:aws:events:eu-central-1:123456789012:rule/tinyqueue"],
        "detail": {},
    }
    assert function.invoke(event)["completed"] == 5
    assert near.workers() == []


# Vercel ---------------------------------------------------------------------------------------------------------------


def test_vercel_answers_a_cron_job_as_a_request_that_runs_jobs(near: Queue, shared_redis: RedisServer) -> None:
    module = runpy.run_path(str(REPOSITORY / "deploy/vercel/api/index.py"))
    app = module["api"]
    app.settings = Settings(redis_url=shared_redis.url, api_keys=f"cron:admin:{KEY}")
    app._queue = near
    near.enqueue("echo", 1)
    client = Client(module["app"], KEY)
    assert client.get("/cron?seconds=5").json["completed"] == 1
    assert Client(module["app"]).get("/cron").status == 401
    assert client.get("/work").status == 405


def test_vercel_file_names_what_is_there() -> None:
    folder = REPOSITORY / "deploy/vercel"
    config = json.loads((folder / "vercel.json").read_text())
    assert [(folder / name).exists() for name in config["functions"]] == [True]
    assert [cron["path"] for cron in config["crons"]] == ["/cron"]


# Cold starts ----------------------------------------------------------------------------------------------------------


def test_import_loads_nothing_that_only_our_own_server_needs() -> None:
    script = "import sys, wsgi; print(sorted(name for name in sys.modules if '.' not in name))"
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)}
    loaded = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)
    names = set(ast.literal_eval(loaded.stdout))
    assert {"bottle", "redis", "msgspec", "wsgi"} <= names
    assert not names & {"click", "waitress", "tinyqueue_server", "worker", "prometheus_client", "fakeredis", "hupper"}
