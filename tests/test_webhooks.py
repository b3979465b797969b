"""Deliveries to callbackUrls and http jobs, over real sockets: signatures, retries, forbidden addresses."""

from __future__ import annotations

import base64
import errno
import gzip
import os
import random
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from client import Client
from conftest import Server, dump, free_port, newest, put, raw, until
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

import tinyqueue_http
from tinyqueue import HANDLERS, Failure, Filter, InvalidJob, Job, Queue, SettingsError, handler
from tinyqueue_config import Settings
from tinyqueue_http import (
    AT_ONCE,
    CONNECT,
    FAILURES,
    JITTER,
    PAUSE,
    WAITS,
    Circuits,
    may_connect,
    read_networks,
    register,
)
from tinyqueue_job import DELIVERIES
from tinyqueue_shards import Shards
from tinyqueue_slot import run_job
from worker import Worker
from wsgi import API

SECRETS = ["whsec_" + base64.b64encode(bytes([n] * 32)).decode() for n in (1, 2)]
OK = b"HTTP/1.1 204 No Content\r\n\r\n"


@pytest.fixture(autouse=True)
def _environment(no_handlers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the built-in types and `echo`, with a secret, and with the loopback allowed."""
    register()

    @handler("echo")
    def echo(payload: Any, job: Job) -> Any:
        return payload

    monkeypatch.setenv("TINYQUEUE_WEBHOOK_SECRETS", SECRETS[0])
    monkeypatch.setenv("TINYQUEUE_HTTP_ALLOW", "127.0.0.0/8,::1/128")
    monkeypatch.setattr(tinyqueue_http, "CIRCUITS", Circuits())


# Receivers ------------------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """What a receiver got. Header names are in lower case."""

    line: str
    headers: dict[str, str]
    body: bytes


Behaviour = bytes | Callable[[socket.socket], None]


def read_request(stream: Any) -> Request:
    line = stream.readline().decode().strip()
    headers = {}
    while text := stream.readline().decode().strip():
        name, _, value = text.partition(": ")
        assert name.lower() not in headers, f"two headers {name}"
        headers[name.lower()] = value
    return Request(line, headers, stream.read(int(headers.get("content-length", 0))))


class Receiver:
    """A server of the loopback that answers as it is told: bytes, or what a function sends."""

    def __init__(self, answer: Behaviour = OK, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.answer = answer
        self.tls = tls
        self.requests: list[Request] = []
        self.connections = 0
        self.open = 0
        self.most_open = 0  # connections at a time
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/hook?a=b"
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def _accept(self) -> None:
        while not self.closing.is_set():
            with suppress(OSError):
                connection, _ = self.listener.accept()
                self._count(1)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _count(self, by: int) -> None:
        with self.lock:
            self.open += by
            self.connections += max(0, by)
            self.most_open = max(self.most_open, self.open)

    def _serve(self, connection: socket.socket) -> None:
        try:
            self._answer(connection)
        finally:
            self._count(-1)

    def _answer(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            if self.tls:
                connection = self.tls.wrap_socket(connection, server_side=True)
            with connection, connection.makefile("rb") as stream:
                request = read_request(stream)
                if request.line:
                    self.requests.append(request)
                    if isinstance(self.answer, bytes):
                        connection.sendall(self.answer)
                    else:
                        self.answer(connection)

    def close(self) -> None:
        self.closing.set()
        with suppress(OSError):  # wakes the thread that accepts
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        self.thread.join(5)
        self.listener.close()


@pytest.fixture
def receive() -> Iterator[Callable[..., Receiver]]:
    made: list[Receiver] = []

    def receive(*args: Any, **options: Any) -> Receiver:
        made.append(Receiver(*args, **options))
        return made[-1]

    yield receive
    for receiver in made:
        receiver.close()


def answer(status: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def drip(start: bytes) -> Callable[[socket.socket], None]:
    """Send the start of an answer, and then a byte every 20 ms for as long as the client reads."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(b"x")
            time.sleep(0.02)

    return answer


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a request take at most 0.3 seconds."""
    monkeypatch.setattr(tinyqueue_http, "SECONDS", 0.3)


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a worker wait for the bell for a short time, so that it stops soon."""
    monkeypatch.setattr("worker.BLOCK", 0.1)


def say_nothing(connection: socket.socket) -> None:
    connection.recv(1)


def end(queue: Queue, url: str, result: Any = None, **options: Any) -> tuple[Job, Job]:
    """Complete a job with that callbackUrl. Return the job and its delivery."""
    job = put(queue, "processing", callback_url=url, queue="ended", **options)
    queue.complete(job, result)
    queue.deregister(job.worker)
    ended = queue.get(job.id)
    assert ended
    delivery = queue.get(ended.callback_job)
    assert delivery
    return ended, delivery


def work(queue: Queue, name: str = "webhooks") -> list[Job]:
    """Run all jobs of a queue that are due, one after the other, and return them as they are then."""
    queue.promote()
    worker = queue.register([name], 1)
    ran: list[Job] = []
    while jobs := queue.dequeue(worker, [name]):
        assert queue.settle(worker, [run_job(jobs[0])]) == []
        ran.append(jobs[0])
    queue.deregister(worker)
    return [job for id in ran if (job := queue.get(id.id))]


def deliver(queue: Queue, receiver: Receiver | str) -> Job:
    """Make one attempt to deliver the end of a job, and return the delivery."""
    end(queue, receiver if isinstance(receiver, str) else receiver.url)
    [delivery] = work(queue)
    return delivery


def pass_time(queue: Queue, seconds: float) -> None:
    """Move the clock of the queue, by more than a receiver's pause. The server's own clock, which ends it, stays."""
    queue.clock.ahead += round(seconds * 1000)
    for key in raw(queue).keys(f"{queue.keys.prefix}halt:*"):
        raw(queue).delete(key)


# Signatures -----------------------------------------------------------------------------------------------------------


def verified(request: Request, secret: str) -> Any:
    return Webhook(secret).verify(request.body, request.headers)


def test_deliver_an_end_that_the_standard_library_of_webhooks_verifies(queue: Queue, receive: Any) -> None:
    receiver = receive()
    job, delivery = end(queue, receiver.url, {"sent": ["ü", 1.5]}, unique_key="u")
    [delivered] = work(queue)
    assert (delivered.status, delivered.result) == ("completed", {"status": 204})
    [request] = receiver.requests
    assert request.line == "POST /hook?a=b HTTP/1.1"
    assert request.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["webhook-id"] == delivery.id
    event = verified(request, SECRETS[0])
    data = event["data"]
    assert (event["type"], data["id"], data["result"]) == ("job.completed", job.id, {"sent": ["ü", 1.5]})
    assert (data["type"], data["queue"], data["status"], data["attempts"]) == ("echo", "ended", "completed", 1)
    assert (data["createdAt"], data["endedAt"]) == (job.created_at, job.ended_at)
    with pytest.raises(WebhookVerificationError):
        verified(request, SECRETS[1])


def test_deliver_during_a_rotation_with_a_signature_for_each_secret(
    queue: Queue, receive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = receive(answer("500 Broken"))
    end(queue, receiver.url)
    for secrets in (SECRETS[:1], SECRETS, SECRETS[::-1], SECRETS[1:]):  # read when each attempt is sent
        monkeypatch.setenv("TINYQUEUE_WEBHOOK_SECRETS", ",".join(secrets))
        work(queue)
        for secret in secrets:
            assert verified(receiver.requests[-1], secret)
        queue.clock.ahead += 7200_000
    assert len(receiver.requests) == 4
    assert not any(secret in str(dump(queue)) for secret in SECRETS)


def test_deliver_without_a_secret_sends_nothing_and_says_what_to_set(
    queue: Queue, receive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TINYQUEUE_WEBHOOK_SECRETS")
    receiver = receive()
    delivery = deliver(queue, receiver)
    assert (delivery.status, delivery.error.type) == ("pending", "Unsigned")
    assert "TINYQUEUE_WEBHOOK_SECRETS" in delivery.error.message
    assert receiver.connections == 0


def test_deliver_a_failure_without_its_traceback(queue: Queue, receive: Any) -> None:
    @handler("break", max_attempts=1)
    def broken(payload: Any) -> None:
        raise ValueError("it broke")

    receiver = receive()
    job = queue.enqueue("break", 1, callback_url=receiver.url)
    work(queue, "default")
    work(queue)
    event = verified(receiver.requests[0], SECRETS[0])
    assert queue.get(job.id).error.traceback
    assert event["type"] == "job.failed"
    assert event["data"]["error"] == {"type": "ValueError", "message": "it broke"}


def test_deliver_the_end_of_each_life_of_a_job_under_its_own_id(queue: Queue, receive: Any) -> None:
    receiver = receive()
    job = put(queue, "pending", callback_url=receiver.url)
    queue.cancel(job.id)
    work(queue)
    queue.retry(job.id)
    queue.cancel(job.id)
    work(queue)
    events = [verified(request, SECRETS[0]) for request in receiver.requests]
    assert [event["type"] for event in events] == ["job.cancelled"] * 2
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 2


@pytest.mark.parametrize(
    "value",
    [
        "secret",
        "whsec_",
        "whsec_AAAA",
        "whsec_!" + "A" * 40,
        "whsec_ä" + "A" * 40,
        ",".join([*SECRETS, SECRETS[0]]),
        SECRETS[0] + ",x",
    ],
)
def test_read_settings_refuses_a_secret_that_cannot_sign_and_does_not_show_it(value: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.read({"TINYQUEUE_WEBHOOK_SECRETS": value})
    assert str(refused.value).startswith("TINYQUEUE_WEBHOOK_SECRETS")
    assert "secret must be whsec_" in str(refused.value) or "at most two secrets" in str(refused.value)
    assert len(value) < 10 or value not in str(refused.value)


@pytest.mark.parametrize("value", ["localhost", "10.0.0.1/8", "10.0.0.0/33", "127.0.0.0/8;::1", "s3cret-s3cret-s3cret"])
def test_read_settings_refuses_a_network_that_is_none(value: str) -> None:
    with pytest.raises(SettingsError, match=r"^TINYQUEUE_HTTP_ALLOW.*each must be a network such as 10\.1\.0\.0/16"):
        Settings.read({"TINYQUEUE_HTTP_ALLOW": value})


def test_read_settings_takes_two_secrets_and_several_networks() -> None:
    both = {"TINYQUEUE_WEBHOOK_SECRETS": ",".join(SECRETS), "TINYQUEUE_HTTP_ALLOW": "10.1.0.0/16, fd00::/8"}
    assert Settings.read(both).http_allow == "10.1.0.0/16, fd00::/8"


# Retries --------------------------------------------------------------------------------------------------------------


def test_waits_are_one_fewer_than_the_attempts_of_a_delivery() -> None:
    assert len(WAITS) + 1 == DELIVERIES == HANDLERS["webhook"].max_attempts


def circuits_of(queue: Queue) -> Circuits:
    """Circuits that follow the clock of the queue, which a test moves."""
    return Circuits(lambda: queue.now() / 1000)


def test_deliver_after_each_wait_of_the_schedule_under_one_id_and_then_fail(
    queue: Queue, receive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_http, "CIRCUITS", circuits_of(queue))
    receiver = receive(answer("500 Broken"))
    _, delivery = end(queue, receiver.url)
    for wait in WAITS:
        [tried] = work(queue)
        after = (tried.run_at - tried.updated_at) / 1000
        assert wait <= after <= max(wait, PAUSE) * (1 + JITTER)
        queue.clock.ahead += round(after * 1000)
    [failed] = work(queue)
    assert (failed.status, failed.attempts, failed.error.type) == ("failed", DELIVERIES, "BadAnswer")
    assert {request.headers["webhook-id"] for request in receiver.requests} == {delivery.id}
    assert len(receiver.requests) == DELIVERIES


def test_deliver_every_event_under_the_same_id_after_an_outage_of_two_hours(
    queue: Queue, receive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_http, "CIRCUITS", circuits_of(queue))
    receiver = receive(answer("503 Starting"))
    ids = {end(queue, receiver.url)[1].id for _ in range(5)}
    work(queue)
    assert {request.headers["webhook-id"] for request in receiver.requests} == ids
    receiver.close()  # connections are refused
    began = queue.now()
    while queue.now() < began + 7200_000:
        if len(ids) < 20:
            ids.add(end(queue, receiver.url)[1].id)
        work(queue)
        pass_time(queue, 120)
    back = receive(port=receiver.port)
    for _ in range(200):
        work(queue)
        pass_time(queue, 120)
    assert sorted(request.headers["webhook-id"] for request in back.requests) == sorted(ids)
    assert {queue.get(id).status for id in ids} == {"completed"}


@pytest.mark.parametrize(
    ("sent", "error", "text"),
    {
        "body that never ends": (drip(b"HTTP/1.1 200 OK\r\n\r\n"), "", ""),
        "slow body": (drip(b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n"), "NoAnswer", "did not finish its answer"),
        "slow headers": (drip(b"HTTP/1.1 200 OK\r\nX: "), "NoAnswer", "did not finish its answer"),
        "slow chunk": (drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\n"), "NoAnswer", "not finish"),
        "no answer": (say_nothing, "NoAnswer", "did not finish its answer"),
        "close without an answer": (b"", "NoAnswer", "closed the connection before the end"),
        "close within the headers": (b"HTTP/1.1 200 OK\r\nContent", "NoAnswer", "closed the connection"),
        "close within the body": (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", "NoAnswer", "closed the conn"),
        "close within a chunk": (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\na",
            "NoAnswer",
            "closed the connection",
        ),
        "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n", "NoAnswer", "did not answer with valid HTTP; check the scheme"),
        "two lengths": (
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            "NoAnswer",
            "did not answer with valid HTTP",
        ),
        "switch of protocols": (b"HTTP/1.1 101 Switching\r\n\r\n", "BadAnswer", "answered 101"),
        "endless continues": (lambda c: [c.sendall(b"HTTP/1.1 100 C\r\n\r\n") for _ in range(10**9)], "NoAnswer", ""),
        "500": (answer("500 Broken"), "BadAnswer", "answered 500"),
        "404": (answer("404 Not Found"), "BadAnswer", "answered 404"),
    }.values(),
)
def test_deliver_to_a_receiver_that_does_not_answer_well_tries_again_in_seconds(
    queue: Queue, receive: Any, hurry: None, *, sent: Behaviour, error: str, text: str
) -> None:
    began = time.monotonic()
    delivery = deliver(queue, receive(sent))
    if not error and delivery.status == "completed":  # it had sent 500 bytes in time
        return
    assert (delivery.status, delivery.attempts, delivery.error.type) == ("pending", 1, error or "NoAnswer")
    assert text in delivery.error.message
    assert WAITS[0] * 1000 <= delivery.run_at - delivery.updated_at <= WAITS[0] * (1 + JITTER) * 1000
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("interim", ["100 Continue", "102 Processing", "103 Early Hints\r\nLink: </a>"])
def test_send_takes_no_interim_status_for_the_answer(queue: Queue, receive: Any, interim: str) -> None:
    sent = f"HTTP/1.1 {interim}\r\n\r\n".encode() * 2
    assert deliver(queue, receive(sent + OK)).status == "completed"
    job = send(queue, receive(sent + answer("200 OK", b"[1]", Content_Type="application/json")))
    assert (job.status, job.result) == ("completed", [1])


def test_deliver_to_a_fast_body_that_never_ends_reads_only_its_beginning(queue: Queue, receive: Any) -> None:
    def flood(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b"x" * 65536)

    assert deliver(queue, receive(flood)).status == "completed"


def test_deliver_within_fifteen_seconds_in_all() -> None:
    assert tinyqueue_http.SECONDS == 15
    assert CONNECT < 15
    assert (HANDLERS["webhook"].timeout, HANDLERS["http"].timeout) == (30, 30)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary", "308 Permanent", "304 Not Modified"])
def test_deliver_follows_no_redirect(queue: Queue, receive: Any, status: str) -> None:
    other = receive()
    delivery = deliver(queue, receive(answer(status, Location=other.url)))
    assert (delivery.status, delivery.error.type) == ("pending", "BadAnswer")
    assert delivery.error.message.endswith(f"answered {status[:3]}; redirects are not followed")
    assert other.connections == 0


def test_deliver_to_a_receiver_that_is_gone_ends_at_once(queue: Queue, receive: Any) -> None:
    delivery = deliver(queue, receive(answer("410 Gone")))
    assert (delivery.status, delivery.attempts, delivery.error.type) == ("failed", 1, "Refused")


@pytest.mark.parametrize("status", ["429 Too Many", "503 Unavailable"])
@pytest.mark.parametrize(
    ("asked", "seconds"),
    {
        "seconds": ("3600", 3600),
        "date": ("in two hours", 7200),
        "less than the schedule": ("1", 5),
        "far away": ("999999999", 86_400),
        "date in the past": ("Sun, 06 Nov 1994 08:49:37 GMT", 5),
        "nonsense": ("soon", 5),
    }.values(),
)
def test_deliver_again_after_the_time_that_the_receiver_asks_for(
    queue: Queue, receive: Any, status: str, asked: str, seconds: int
) -> None:
    date = formatdate(time.time() + 7200, usegmt=True)
    delivery = deliver(queue, receive(answer(status, Retry_After=date if asked == "in two hours" else asked)))
    assert delivery.status == "pending"
    wait = (delivery.run_at - delivery.updated_at) / 1000
    assert seconds - 120 <= wait <= max(seconds, 5) * (1 + JITTER)
    assert wait >= 5


def test_deliver_ignores_a_retry_after_of_another_status(queue: Queue, receive: Any) -> None:
    delivery = deliver(queue, receive(answer("500 Broken", Retry_After="3600")))
    assert delivery.run_at - delivery.updated_at <= WAITS[0] * (1 + JITTER) * 1000


# Receivers that are down ----------------------------------------------------------------------------------------------


def test_circuit_opens_after_failures_in_a_row_and_closes_after_a_success() -> None:
    now = 1000.0
    circuits = Circuits(lambda: now)
    for _ in range(FAILURES - 1):
        circuits.note("a", failed=True)
    circuits.note("a", failed=False)
    for _ in range(FAILURES):
        assert circuits.check("a") == 0
        circuits.note("a", failed=True)
    assert (circuits.check("a"), circuits.check("b")) == (PAUSE, 0)
    now += PAUSE
    assert circuits.check("a") == 0
    assert circuits.check("a") == PAUSE, "one try at a time"
    circuits.note("a", failed=False)
    assert circuits.check("a") == 0


def test_deliver_to_a_receiver_that_has_failed_in_a_row_sends_nothing_and_says_so(
    queue: Queue, receive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = receive(answer("500 Broken"))
    for _ in range(FAILURES):
        assert deliver(queue, receiver).error.type == "BadAnswer"
    delivery = deliver(queue, receiver)
    assert (delivery.status, delivery.attempts, delivery.error.type) == ("pending", 0, "CircuitOpen")
    assert f"127.0.0.1:{receiver.port} has failed {FAILURES} times in a row" in delivery.error.message
    assert receiver.connections == FAILURES


def test_deliver_to_others_while_a_receiver_is_dead(
    server: Server, receive: Any, short_waits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_http, "SECONDS", 1.0)
    queue = server.queue()
    dead, alive = receive(say_nothing), receive()
    for _ in range(50):
        end(queue, dead.url)
    for _ in range(50):
        end(queue, alive.url)
    began = time.monotonic()
    with Working(queue, "webhooks"):
        until(lambda: len(alive.requests) == 50)
        seconds = time.monotonic() - began
        [halted] = until(lambda: [about for about in queue.limits_in_use().values() if about["haltedMs"]])
    assert seconds < 4, "50 deliveries to the dead receiver alone take 10 s in 5 slots"
    assert dead.connections <= FAILURES + AT_ONCE
    # The receiver may notice the end of a connection after the next one has begun.
    assert AT_ONCE <= dead.most_open <= 2 * AT_ONCE < 5
    assert halted["held"] > 30, "what is held spends no attempts"


# Server-side request forgery ------------------------------------------------------------------------------------------

CONNECTED: list[Any] = []  # addresses of all connections that this process has tried to open
WATCHING = threading.Event()


@pytest.fixture(autouse=True)
def _watched() -> Iterator[None]:
    WATCHING.set()
    yield
    WATCHING.clear()


def watch_connections(event: str, args: tuple[Any, ...]) -> None:
    """Note each connection, and refuse those that would leave this machine.

    A hook cannot be removed. So it does nothing during the tests of other modules.
    """
    if event == "socket.connect" and WATCHING.is_set():
        CONNECTED.append(args[1])
        if isinstance(args[1], tuple) and not args[1][0].startswith(("127.", "::1", "localhost")):
            raise ConnectionRefusedError(errno.ECONNREFUSED, "refused by the test")


sys.addaudithook(watch_connections)

FORBIDDEN = [
    *(
        "127.0.0.1",
        "127.1",
        "127.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "0x7f.1",
        "0177.0.0.1",
        "017700000001",
    ),
    *("0", "0.0.0.0", "0x0", "127.255.255.254", "10.0.0.1", "0xa000001", "172.16.0.1", "172.31.255.255", "192.168.0.1"),
    *("169.254.169.254", "2852039166", "0xa9fea9fe", "0xa9.0xfe.0xa9.0xfe", "0251.0376.0251.0376", "169.254.43518"),
    *("100.64.0.1", "192.0.0.1", "192.0.2.1", "192.88.99.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1"),
    *("240.0.0.1", "255.255.255.255", "[::1]", "[::]", "[::127.0.0.1]", "[::ffff:127.0.0.1]", "[::ffff:a9fe:a9fe]"),
    *("[64:ff9b::7f00:1]", "[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]", "[2002:a9fe:a9fe::1]"),
    *("[2001::1]", "[2001:db8::1]", "[fc00::1]", "[fd00:ec2::254]", "[fe80::1]", "[fec0::1]", "[ff02::1]", "[100::1]"),
    *("[5f00::1]", "[3fff::1]", "[4000::1]", "[0:0:0:0:0:ffff:7f00:1]", "localhost", "LOCALHOST", "127.0.0.1."),
]
MALFORMED = [
    *(
        "http://user@127.0.0.1/",
        "http://a:b@127.0.0.1/",
        "http://127.0.0.1@93.184.215.14/",
        "http://93.184.215.14\\@127.1/",
    ),
    *(
        "http://93.184.215.14#@127.0.0.1/",
        "http://[fe80::1%25eth0]/",
        "http://[::1/",
        "http://127.0.0.1:99999/",
        "http:///",
    ),
    *(
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "//127.0.0.1/",
        "http:127.0.0.1",
        "http://\uff11\uff12\uff17.0.0.1/",
        "http://\u2460.1/",
    ),
    *(
        "http://127%2e0.0.1/",
        "http://127.0.0.1 /",
        "http://127.0.0.1\t/",
        "http://127.0.0.1\r\nHost: a/",
        "http://a\0/",
    ),
]


@pytest.fixture
def far_resolver(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Answer each look-up of a name with the next addresses; the last are repeated. Returns the looked up names."""

    def install(*answers: list[str]) -> list[str]:
        names: list[str] = []
        real = socket.getaddrinfo

        def getaddrinfo(host: str, port: int, *more: Any, **options: Any) -> list[Any]:
            if not host.endswith(".example"):  # Redis
                return real(host, port, *more, **options)
            addresses = answers[min(len(names), len(answers) - 1)]
            names.append(host)
            return [
                (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
                if ":" in address
                else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
                for address in addresses
            ]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        return names

    return install


@pytest.mark.parametrize("type", ["http", "webhook"])
def test_send_to_no_spelling_of_a_forbidden_address(server: Server, monkeypatch: pytest.MonkeyPatch, type: str) -> None:
    monkeypatch.delenv("TINYQUEUE_HTTP_ALLOW")
    assert len(FORBIDDEN) > 40
    queue = server.queue()
    worker = queue.register(["forbidden"], 1)
    ids = {}
    for host in FORBIDDEN:
        url = f"http://{host}:80/"
        payload = {"url": url} if type == "http" else {"url": url, "host": host, "event": {}}
        ids[queue.enqueue(type, payload, queue="forbidden").id] = host
    jobs = queue.dequeue(worker, ["forbidden"], 100)
    CONNECTED.clear()
    outcomes = [run_job(job) for job in jobs]
    assert CONNECTED == []
    assert len(outcomes) == len(FORBIDDEN)
    for outcome in outcomes:
        host = ids[outcome.job.id]
        assert outcome.error
        refused = outcome.error.type == "Forbidden" and outcome.after is None
        unknown = outcome.error.type == "NoAnswer" and "unknown host" in outcome.error.message
        assert refused or (unknown and host in ("127.0.0.1.", "LOCALHOST")), (host, outcome.error)
        assert "169.254" not in outcome.error.message or "169.254" in host


@pytest.mark.parametrize("url", MALFORMED)
def test_submit_refuses_a_url_that_parsers_read_differently(api: Client, queue: Queue, url: str) -> None:
    jobs = [
        ({"type": "echo", "payload": 1, "callbackUrl": url}, "callbackUrl"),
        ({"type": "http", "payload": {"url": url}}, "payload"),
    ]
    for job, field in jobs:
        answer = api.post("/jobs", job)
        assert (answer.status, answer.kind, answer.problem["field"]) == (422, "invalid-job", field)
        assert "must be an http or https URL" in answer.problem["detail"]
    with pytest.raises(InvalidJob):
        queue.enqueue("unknown", 1, callback_url=url)


def test_send_resolves_a_name_once(server: Server, far_resolver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that answers first with a public address, and then with one that is not."""
    monkeypatch.delenv("TINYQUEUE_HTTP_ALLOW")
    names = far_resolver(["93.184.215.14"], ["169.254.169.254"])
    queue = server.queue()
    end(queue, "http://rebinding.example/")
    worker = queue.register(["webhooks"], 1)
    [job] = queue.dequeue(worker, ["webhooks"])
    CONNECTED.clear()
    outcome = run_job(job)
    assert names == ["rebinding.example"]
    assert CONNECTED == [("93.184.215.14", 80)]
    assert outcome.error.type == "NoAnswer"


@pytest.mark.parametrize("addresses", [["93.184.215.14", "169.254.169.254"], ["2606:2800::1", "::1"], ["10.0.0.1"]])
def test_send_opens_no_connection_if_any_address_is_forbidden(
    server: Server, far_resolver: Any, monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    monkeypatch.delenv("TINYQUEUE_HTTP_ALLOW")
    far_resolver(addresses)
    CONNECTED.clear()
    queue = server.queue()
    end(queue, "http://mixed.example/")
    worker = queue.register(["webhooks"], 1)
    [job] = queue.dequeue(worker, ["webhooks"])
    CONNECTED.clear()
    outcome = run_job(job)
    assert CONNECTED == []
    assert outcome.error
    assert (outcome.error.type, outcome.after) == ("Forbidden", None)
    assert not any(address in str(outcome.error) for address in addresses)


def test_send_reaches_only_the_networks_that_are_allowed() -> None:
    allowed = read_networks("10.1.0.0/16, fd00::/8")
    assert may_connect("10.1.255.255", allowed)
    assert may_connect("fd12::1", allowed)
    assert not any(may_connect(address, allowed) for address in ("10.2.0.1", "::ffff:10.1.0.1", "fc00::1", "127.0.0.1"))
    assert all(may_connect(address, []) for address in ("93.184.215.14", "1.1.1.1", "2606:4700::1", "2a00:1450::1"))


def test_send_uses_no_proxy_of_the_environment(queue: Queue, receive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, receiver = receive(), receive()
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
    assert deliver(queue, receiver).status == "completed"
    assert (proxy.connections, receiver.connections) == (0, 1)


def test_send_to_the_next_address_if_the_first_refuses(queue: Queue, receive: Any, far_resolver: Any) -> None:
    receiver = receive()
    end(queue, f"http://two.example:{receiver.port}/")
    far_resolver(["127.0.0.2", "127.0.0.1"])
    worker = queue.register(["webhooks"], 1)
    [delivery] = queue.dequeue(worker, ["webhooks"])
    outcome = run_job(delivery)
    queue.settle(worker, [outcome])
    assert outcome.verb == "complete"
    assert receiver.requests[0].headers["host"] == f"two.example:{receiver.port}"


def test_send_to_a_name_that_nobody_knows_tries_again(queue: Queue) -> None:
    delivery = deliver(queue, "http://unknown.invalid/")
    assert (delivery.status, delivery.error.type) == ("pending", "NoAnswer")
    assert "unknown host" in delivery.error.message


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for secure.example."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=secure.example -days 2"
    make += " -addext subjectAltName=DNS:secure.example -keyout - -out -"
    try:
        path.write_bytes(subprocess.run(make.split(), capture_output=True, check=True).stdout)
    except FileNotFoundError:
        pytest.skip("needs openssl to make a certificate")
    return path


@pytest.mark.parametrize(
    ("host", "trusted", "error"),
    [
        ("secure.example", True, ""),
        ("other.example", True, "its certificate is not valid"),
        ("secure.example", False, "its certificate is not valid"),
    ],
)
def test_send_over_tls_checks_the_certificate_for_the_name(
    server: Server, receive: Any, far_resolver: Any, monkeypatch: pytest.MonkeyPatch, *,
    certificate: Path, host: str, trusted: bool, error: str,
) -> None:  # fmt: skip
    names: list[str | None] = []
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    receiver = receive(tls=context)
    queue = server.queue()
    queue.enqueue("http", {"url": f"https://{host}:{receiver.port}/", "body": 1})
    far_resolver(["127.0.0.1"])
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tinyqueue_http.tls_context.cache_clear()
    try:
        worker = queue.register(["default"], 1)
        [job] = queue.dequeue(worker, ["default"])
        outcome = run_job(job)
    finally:
        tinyqueue_http.tls_context.cache_clear()
    assert names == [host]
    if error:
        assert error in outcome.error.message
        assert receiver.requests == []
    else:
        assert outcome.verb == "complete"
        assert receiver.requests[0].headers["host"] == f"{host}:{receiver.port}"


def test_error_shows_what_a_receiver_answered_to_admins_only(queue: Queue, receive: Any) -> None:
    secret = b"internal-secret " + b"x" * 1000
    receiver = receive(answer("500 internal-secret", secret, X_Internal="internal-secret"))
    for job in (end(queue, receiver.url)[1], queue.enqueue("http", {"url": receiver.url}, queue="webhooks")):
        work(queue)
        settings = Settings(api_keys="r:read:0123456789abcdef,a:admin:fedcba9876543210")
        api = API(settings, queue)
        shown = Client(api, "0123456789abcdef").get(f"/jobs/{job.id}")
        listed = Client(api, "0123456789abcdef").get("/jobs")
        waited = Client(api, "0123456789abcdef").get(f"/jobs/{job.id}?wait=1")
        assert not any(b"internal-secret" in answer.body for answer in (shown, listed, waited))
        assert shown.json["error"]["message"].endswith(" answered 500")
        trace = Client(api, "fedcba9876543210").get(f"/jobs/{job.id}").json["error"]["traceback"]
        assert "internal-secret xx" in trace
        assert trace.count("x" * 484)
        assert "x" * 485 not in trace


def test_attempts_of_built_in_types_show_their_tracebacks_to_admins_only(queue: Queue) -> None:
    job = queue.enqueue("http", {"url": "http://receiver.example/"})
    [started] = queue.dequeue(queue.register([job.queue], 1), [job.queue])
    queue.fail(started, Failure("TimedOut", "too slow", "secret"), 60)
    settings = Settings(api_keys="r:read:0123456789abcdef,a:admin:fedcba9876543210")
    api = API(settings, queue)
    [shown] = Client(api, "0123456789abcdef").get(f"/jobs/{job.id}").json["history"]
    assert shown["error"] == {"type": "TimedOut", "message": "too slow"}
    [shown] = Client(api, "fedcba9876543210").get(f"/jobs/{job.id}").json["history"]
    assert shown["error"]["traceback"] == "secret"


def test_error_of_other_types_shows_its_traceback_to_readers(queue: Queue) -> None:
    @handler("break", max_attempts=1)
    def broken(payload: Any) -> None:
        raise ValueError("it broke")

    job = queue.enqueue("break", 1)
    work(queue, "default")
    api = Client(API(Settings(api_keys="r:read:0123456789abcdef"), queue), "0123456789abcdef")
    assert "it broke" in api.get(f"/jobs/{job.id}").json["error"]["traceback"]


# callbackUrl ----------------------------------------------------------------------------------------------------------


def test_submit_with_a_callback_shows_its_url_and_then_its_delivery(api: Client, queue: Queue, receive: Any) -> None:
    receiver = receive()
    made = api.post("/jobs", {"type": "echo", "payload": 1, "callbackUrl": receiver.url})
    location = made.headers["location"]
    assert api.get(location).json["callbackUrl"] == receiver.url
    assert "callbackJob" not in api.get(location).json
    work(queue, "default")
    delivery = api.get(f"/jobs/{api.get(location).json['callbackJob']}").json
    assert (delivery["type"], delivery["queue"], delivery["status"]) == ("webhook", "webhooks", "pending")
    work(queue)
    assert verified(receiver.requests[0], SECRETS[0])["data"]["id"] == made.json["jobId"]


def test_batch_with_callbacks_delivers_the_end_of_each_job(api: Client, queue: Queue, receive: Any) -> None:
    receiver = receive()
    jobs = [{"type": "echo", "payload": n, "callbackUrl": receiver.url} for n in range(5)]
    ids = [made["jobId"] for made in api.post("/jobs/batch", jobs).json["jobs"]]
    work(queue, "default")
    work(queue)
    assert sorted(verified(request, SECRETS[0])["data"]["id"] for request in receiver.requests) == sorted(ids)


def test_bulk_cancel_delivers_every_end(queue: Queue, receive: Any) -> None:
    receiver = receive()
    for _ in range(5):
        queue.enqueue("echo", 1, callback_url=receiver.url)
    queue.change_many("cancel", Filter("pending", "echo"))
    work(queue)
    assert {verified(request, SECRETS[0])["type"] for request in receiver.requests} == {"job.cancelled"}
    assert len(receiver.requests) == 5


def test_delivery_is_in_the_shard_of_its_job(server: Server, receive: Any) -> None:
    receiver = receive()
    shards = Shards([server.queue(namespace=f"queue.{at}") for at in range(4)])
    jobs = [shards.enqueue("echo", n, callback_url=receiver.url) for n in range(8)]
    for job in jobs:
        shards.cancel(job.id)
    deliveries = [shards.get(shards.get(job.id).callback_job) for job in jobs]
    assert [delivery.payload["event"]["data"]["id"] for delivery in deliveries] == [job.id for job in jobs]
    assert len({job.id[-2:] for job in jobs}) > 1


def calls(queue: Queue) -> Counter[str]:
    """Count the commands that the server has carried out, except those that only the clock needs."""
    stats = raw(queue).info("commandstats")
    own = {"cmdstat_time", "cmdstat_info"}
    return Counter({name: int(about["calls"]) for name, about in stats.items() if name not in own})


def test_end_of_a_job_with_a_callback_is_one_transaction(real: Server) -> None:
    queue = real.queue()
    sent = []
    for options in ({}, {}, {"callback_url": "http://receiver.example/"}):
        job = put(queue, "processing", **options)
        before = calls(queue)
        queue.complete(job)
        sent.append(calls(queue) - before)
        queue.deregister(job.worker)
    _, plain, with_callback = sent
    more = with_callback - plain
    assert plain["cmdstat_exec"] == with_callback["cmdstat_exec"] == 1
    assert {"cmdstat_set", "cmdstat_lpush"} <= more.keys()
    assert not more.keys() & {"cmdstat_get", "cmdstat_mget", "cmdstat_watch", "cmdstat_exists"}


def test_ended_job_that_a_backup_restores_delivers_nothing(server: Server, queue: Queue) -> None:
    job = put(queue, "processing", callback_url="http://receiver.example/")
    queue.cancel(job.id)
    copied = queue.get(job.id)
    queue.complete(job)
    raw(queue).flushall()
    [loaded] = queue.load([copied]).jobs
    assert (loaded.status, [job.id for job in newest(queue, "pending")]) == ("cancelled", [])


# Workers that do not serve the deliveries -----------------------------------------------------------------------------


def test_ready_warns_of_deliveries_that_no_worker_serves(api: Client, queue: Queue) -> None:
    other = queue.register(["default"], 1)
    end(queue, "http://receiver.example/")
    queue.clock.ahead += 5000
    todo = "start a worker that serves it (tinyqueue worker --queue webhooks)"
    warning = f"1 job in queue webhooks cannot start, because no live worker serves it: {todo}"
    assert warning in api.get("/ready").json["warnings"]
    queue.deregister(other)
    worker = queue.register(["webhooks"], 1)
    again = Client(API(Settings(), queue))  # each process looks once in two seconds
    assert warning not in again.get("/ready").json["warnings"]
    queue.deregister(worker)


def test_worker_serves_deliveries_without_a_handler_of_the_user(queue: Queue) -> None:
    assert Worker(queue, Settings()).names == ["default", "webhooks"]


class Working:
    """A worker in a thread."""

    def __init__(self, queue: Any, *names: str, **settings: Any) -> None:
        self.worker = Worker(queue, Settings(**settings), names)
        self.thread = threading.Thread(target=self.worker.run)

    def __enter__(self) -> Worker:
        self.thread.start()
        return self.worker

    def __exit__(self, *_: object) -> None:
        self.worker.stop("release")
        self.thread.join(20)


def test_worker_delivers_the_end_of_a_job_at_once(server: Server, receive: Any) -> None:
    receiver = receive()
    queue = server.queue()
    with Working(queue):
        until(queue.workers)
        for n in range(1, 6):
            queue.enqueue("echo", n, callback_url=receiver.url)
            until(lambda n=n: len(receiver.requests) == n, 1.5)  # of a wait for the bell, which lasts 2 s


def test_worker_of_shards_delivers_the_end_of_a_job_at_once(real: Server, receive: Any) -> None:
    receiver = receive()
    shards = Shards([real.queue(namespace=f"queue.{at}") for at in range(3)])
    with Working(shards):
        until(shards.workers)
        for n in range(1, 6):
            shards.enqueue("echo", n, callback_url=receiver.url)
            until(lambda n=n: len(receiver.requests) == n, 1.9)


def test_worker_of_deliveries_alone_delivers(server: Server, receive: Any, short_waits: None) -> None:
    receiver = receive()
    queue = server.queue()
    for _ in range(20):
        end(queue, receiver.url)
    with Working(queue, "webhooks"):
        until(lambda: len(receiver.requests) == 20)


def test_worker_in_a_burst_delivers_what_its_jobs_made_even_if_the_bell_is_lost(queue: Queue, receive: Any) -> None:
    receiver = receive()
    for _ in range(5):
        end(queue, receiver.url)
    queue.enqueue("echo", 1, callback_url=receiver.url)
    raw(queue).delete(queue.keys.bell("webhooks"))
    worker = Worker(queue, Settings(), burst=True)
    assert worker.run() == 0
    assert len(receiver.requests) == 6


def test_worker_without_deliveries_does_not_look_for_them(real: Server, short_waits: None) -> None:
    queue = real.queue()
    looks: list[str] = []
    with Working(queue), raw(queue).monitor() as monitor:
        until(queue.workers)
        for n in range(20):
            job = queue.enqueue("echo", n)
            until(lambda job=job: queue.get(job.id).status == "completed")
        raw(queue).echo("that is all")
        for command in monitor.listen():
            if "that is all" in command["command"]:
                break
            looks += [command["command"]] * ("jobs:webhooks" in command["command"])
    assert len(looks) <= 5, "only the first take, of up to 5 jobs, looks into that queue"


# HTTP jobs ------------------------------------------------------------------------------------------------------------


def send(queue: Queue, receiver: Receiver, **payload: Any) -> Job:
    queue.enqueue("http", {"url": receiver.url} | payload)
    [job] = work(queue, "default")
    return job


def test_http_job_sends_its_body_signed_and_stores_the_answer(queue: Queue, receive: Any) -> None:
    receiver = receive(
        answer("200 OK", b'{"thumbnail": "\xc3\xbc.png"}', Content_Type="application/json; charset=utf-8")
    )
    job = send(queue, receiver, method="PUT", headers={"X-Tenant": "t-1", "authorization": "Bearer 1"}, body={"n": [1]})
    assert (job.status, job.result) == ("completed", {"thumbnail": "ü.png"})
    [request] = receiver.requests
    assert request.line == "PUT /hook?a=b HTTP/1.1"
    assert (request.headers["x-tenant"], request.headers["authorization"]) == ("t-1", "Bearer 1")
    assert request.headers["webhook-id"] == job.id
    assert verified(request, SECRETS[0]) == {"n": [1]}


@pytest.mark.parametrize(
    ("sent", "result"),
    {
        "JSON": (answer("201 Created", b"[1]", Content_Type="application/vnd.api+json"), [1]),
        "text": (answer("200 OK", b"done", Content_Type="text/plain"), "done"),
        "JSON that is none": (answer("200 OK", b"{", Content_Type="application/json"), "{"),
        "no UTF-8": (answer("200 OK", b"\xff"), "\ufffd"),
        "nothing": (OK, None),
        "no length": (b"HTTP/1.1 200 OK\r\n\r\nto the end", "to the end"),
        "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n", "abc"),
    }.values(),
)
def test_http_job_stores_the_body_of_the_answer_as_its_result(
    queue: Queue, receive: Any, sent: bytes, result: Any
) -> None:
    job = send(queue, receive(sent))
    assert (job.status, job.result) == ("completed", result)


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_http_job_without_a_body_sends_none(queue: Queue, receive: Any, method: str) -> None:
    receiver = receive()
    assert send(queue, receiver, method=method).status == "completed"
    assert (receiver.requests[0].body, receiver.requests[0].headers.get("content-type")) == (b"", None)


def test_http_job_sends_text_as_it_is(queue: Queue, receive: Any) -> None:
    receiver = receive()
    send(queue, receiver, body="<a>ü</a>", headers={"content-type": "application/xml"})
    assert (receiver.requests[0].body, receiver.requests[0].headers["content-type"]) == (
        "<a>ü</a>".encode(),
        "application/xml",
    )


@pytest.mark.parametrize("status", ["302 Found", "400 Bad", "401 No", "404 Not Found", "410 Gone", "422 Unprocessable"])
def test_http_job_is_discarded_by_an_answer_that_a_retry_cannot_change(queue: Queue, receive: Any, status: str) -> None:
    job = send(queue, receive(answer(status, b"why")))
    assert (job.status, job.attempts, job.error.type) == ("failed", 1, "Refused")
    assert f"answered {status[:3]}" in job.error.message


@pytest.mark.parametrize("status", ["408 Timeout", "429 Too Many", "500 Broken", "502 Bad", "503 Unavailable"])
def test_http_job_is_retried_after_an_answer_that_may_change(queue: Queue, receive: Any, status: str) -> None:
    receiver = receive(answer(status))
    job = send(queue, receiver)
    assert (job.status, job.attempts, job.error.type) == ("pending", 1, "BadAnswer")
    receiver.answer = OK
    queue.clock.ahead += 10_000
    [job] = work(queue, "default")
    assert (job.status, job.attempts) == ("completed", 2)


def test_http_job_is_retried_after_a_time_out(queue: Queue, receive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyqueue_http, "SECONDS", 0.2)
    job = send(queue, receive(say_nothing))
    assert (job.status, job.error.type) == ("pending", "NoAnswer")


def test_http_job_waits_as_long_as_the_application_asks(queue: Queue, receive: Any) -> None:
    job = send(queue, receive(answer("429 Too Many", Retry_After="600")))
    assert 600_000 <= job.run_at - job.updated_at < 601_000


def test_http_job_with_a_compressed_answer_stores_no_unreadable_result(queue: Queue, receive: Any) -> None:
    job = send(queue, receive(answer("200 OK", gzip.compress(b"[1]"), Content_Encoding="gzip")))
    assert (job.status, job.error.type) == ("failed", "Refused")
    assert "the answer is compressed ('gzip')" in job.error.message


def test_http_job_with_an_answer_that_is_too_long_is_discarded(queue: Queue, receive: Any) -> None:
    job = send(queue, receive(answer("200 OK", b"x" * 300_000)))
    assert (job.status, job.error.type) == ("failed", "Refused")
    assert "longer than 262144 bytes" in job.error.message


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"url": "http://a.example/", "method": "TRACE"},
        {"url": "http://a.example/", "headers": {"Host": "b"}},
        {"url": "http://a.example/", "headers": {"Webhook-Id": "b"}},
        {"url": "http://a.example/", "headers": {"Transfer-Encoding": "chunked"}},
        {"url": "http://a.example/", "headers": {"A": "b\r\nC: d"}},
        {"url": "http://a.example/", "headers": {"A\r\nC": "d"}},
        {"url": "http://a.example/", "headers": {"A b": "d"}},
        {"url": "http://a.example/", "header": {}},
    ],
)
def test_submit_refuses_an_http_job_that_cannot_be_sent(api: Client, payload: Any) -> None:
    answer = api.post("/jobs", {"type": "http", "payload": payload})
    assert (answer.status, answer.kind, answer.problem["field"]) == (422, "invalid-job", "payload")


def test_submit_names_the_place_of_a_header_with_a_wrong_name(api: Client) -> None:
    answer = api.post("/jobs", {"type": "http", "payload": {"url": "http://a.example/", "headers": {"A b": "d"}}})
    assert answer.problem["detail"] == "payload.headers: wrong key: must be the name of an HTTP header"
    assert answer.problem["path"] == "$.headers"


def test_send_imports_its_client_only_when_it_is_needed() -> None:
    """A web process on a serverless host that sends nothing starts without it."""
    script = "import sys, wsgi, tinyqueue_http; tinyqueue_http.register(); print('urllib3' in sys.modules)"
    run = [sys.executable, "-c", script]
    root = Path(tinyqueue_http.__file__).parent
    done = subprocess.run(run, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, check=True)
    assert done.stdout.strip() == b"False"


# The application of the documents -------------------------------------------------------------------------------------

ROOT = Path(tinyqueue_http.__file__).parent
HTTP_JOBS = int(os.environ.get("HTTP_JOBS", "100"))


class Killed:
    """A process that is killed at random times and started again."""

    def __init__(self, command: list[str], folder: Path, environ: dict[str, str]) -> None:
        self.start = lambda: subprocess.Popen(
            command, cwd=folder, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.process = self.start()
        self.kills = 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process = self.start()
        self.kills += 1

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def application() -> str:
    [text] = re.findall(r"^```js\n(.*?)^```", (ROOT / "docs" / "webhooks.md").read_text(), re.M | re.S)
    return str(text)


@pytest.fixture
def node(tmp_path: Path, real: Server) -> Iterator[tuple[Killed, Killed, str]]:
    """The application of the documents, a worker, and the URL of the application."""
    program = shutil.which("node")
    if not program:
        pytest.skip("needs node")
    (tmp_path / "app.mjs").write_text(application())
    port = str(free_port())
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TINYQUEUE_WEBHOOK_SECRETS": ",".join(SECRETS)}
    app = Killed([program, "app.mjs"], tmp_path, environ | {"PORT": port})
    own = {"REDIS_URL": real.url, "TINYQUEUE_HANDLERS": "tinyqueue_http", "TINYQUEUE_HTTP_ALLOW": "127.0.0.0/8"}
    own |= {"TINYQUEUE_LEASE": "2", "LOG_LEVEL": "error"}
    worker = Killed([sys.executable, str(ROOT / "worker.py")], tmp_path, environ | own)
    yield app, worker, f"http://127.0.0.1:{port}"
    worker.end()
    app.end()


def test_http_jobs_lose_none_while_worker_and_application_are_killed(near: Queue, node: Any) -> None:
    app, worker, url = node
    jobs = [
        job
        for at in range(0, HTTP_JOBS, 100)
        for job in near.submit(
            [
                near.draft("http", {"url": f"{url}/greet", "body": {"name": f"ü{n}"}}, max_attempts=20)
                for n in range(at, min(at + 100, HTTP_JOBS))
            ]
        )
    ]
    chance = random.Random(HTTP_JOBS)
    marks = sorted(chance.sample(range(10, HTTP_JOBS - 10), HTTP_JOBS // 50))  # after how many jobs to kill
    deadline = time.monotonic() + 600
    while (stats := near.stats())["pending"] + stats["processing"]:
        assert time.monotonic() < deadline, stats
        if marks and stats["completed"] >= marks[0]:
            del marks[0]
            (app if app.kills <= worker.kills else worker).kill()
    ended = [near.get(job.id) for job in jobs]
    assert [(job.status, job.result) for job in ended] == [
        ("completed", {"text": f"Hello ü{n}", "id": job.id}) for n, job in enumerate(jobs)
    ]
    assert min(app.kills, worker.kills) >= 1
    worker.process.terminate()
    assert worker.process.wait(20) == 0


def test_application_of_the_documents_refuses_an_unknown_path(near: Queue, node: Any) -> None:
    _, worker, url = node
    job = near.enqueue("http", {"url": f"{url}/nowhere", "body": {"name": "Ada"}})
    failed = until(lambda: (now := near.get(job.id)).status == "failed" and now)
    assert failed.error.message == "127.0.0.1 answered 404"
    worker.process.terminate()
    assert worker.process.wait(20) == 0


def test_application_of_the_documents_refuses_another_signature(
    near: Queue, node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, worker, url = node
    until(lambda: is_listening(url) and near.workers())
    monkeypatch.setenv("TINYQUEUE_WEBHOOK_SECRETS", "whsec_" + base64.b64encode(b"x" * 32).decode())
    near.enqueue("http", {"url": f"{url}/greet", "body": {"name": "Ada"}}, queue="here")
    [job] = work(near, "here")
    assert job.error.message == "127.0.0.1 answered 401"
    worker.process.terminate()
    assert worker.process.wait(20) == 0


def is_listening(url: str) -> bool:
    host, _, port = url.removeprefix("http://").partition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), 1):
        return True
    return False
