"""Fixtures and helpers that all tests share.

A test that requests `queue` runs twice, on the embedded server and on a real one. When it ends, the
consistency of its data is checked. A test that requests `real`, `near`, `far` or `proxy` runs only
on the real server.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import redis
from client import Client
from cutproxy import CutProxy

from tinyqueue import HANDLERS, ID, Failure, Filter, Job, Queue, Status, handler
from tinyqueue_config import LOGGERS, Settings
from tinyqueue_job import HISTORY
from tinyqueue_log import LOG_BYTES
from tinyqueue_schedule import (
    SCHEDULES,
    Ticker,
    make_schedule,
    put as put_schedule,
    read_schedule,
    remove as remove_schedule,
)
from wsgi import API

# Real servers ---------------------------------------------------------------------------------------------------------


# Below those that Linux gives to outgoing connections: one of these might get the port of a server
# that a test has killed and is about to restart.
PORTS = range(11_000, 32_000)


def free_port(ports: Sequence[int] = PORTS) -> int:
    """Return a TCP port of 127.0.0.1 on which nothing listens at the moment."""
    chance = random.SystemRandom()  # hypothesis seeds the other one
    while True:
        port = chance.choice(ports)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class RedisServer:
    """A redis-server at `url`. A restart keeps its port, folder, options and data on disk."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.options = options
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.environ: dict[str, str] = {}  # added to the environment of the server
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> list[str]:
        where = [str(REDIS), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        return [*where, "--logfile", "redis.log", "--save", "", "--appendonly", "no", *self.options]

    def start(self) -> None:
        """Start the server and return when it answers."""
        environ = os.environ | self.environ
        silent = subprocess.DEVNULL
        self.process = subprocess.Popen(self.command, env=environ, stdout=silent, stderr=silent)
        with redis.Redis(port=self.port, retry=None) as client:
            for _ in range(1000):
                try:
                    client.ping()
                    return
                except redis.AuthenticationError:
                    return
                except redis.ConnectionError:
                    assert self.process.poll() is None, (self.folder / "redis.log").read_text()
                    time.sleep(0.01)
        raise AssertionError("redis-server did not answer")

    def stop(self) -> None:
        """Stop the server with SIGTERM, and kill it if that takes too long."""
        if self.process:
            self.process.terminate()
            self.process.send_signal(signal.SIGCONT)  # a test may have paused it
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
            self.process = None

    def kill(self) -> None:
        """Kill the server with SIGKILL."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


REDIS = shutil.which(os.environ.get("REDIS_SERVER", "redis-server"))  # REDIS_SERVER selects another program
NO_REDIS = "no redis-server on PATH: TESTS ON A REAL SERVER ARE SKIPPED"


def pytest_report_header() -> str:
    return f"redis-server: {REDIS or NO_REDIS}"


def refused(reason: str) -> bool:
    """Whether a test that is skipped for this reason fails instead: in CI, where all that tests need is installed.

    What nothing can install, such as IPv6, is a reason that begins with "this".
    """
    return os.environ.get("CI") == "true" and not reason.removeprefix("Skipped: ").startswith("this ")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    if call.excinfo and call.excinfo.errisinstance(pytest.skip.Exception) and refused(str(call.excinfo.value)):
        try:
            pytest.fail(f"CI=true, but this test would be skipped: {call.excinfo.value}", pytrace=False)
        except pytest.fail.Exception:
            call.excinfo = pytest.ExceptionInfo.from_current()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[Any]:
    report: pytest.CollectReport = yield
    if report.skipped and isinstance(report.longrepr, tuple) and refused(report.longrepr[2]):
        report.outcome = "failed"
    return report


@pytest.fixture(scope="session")
def start_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RedisServer]]:
    """Start another real server: start_redis("--appendonly", "yes") -> RedisServer."""
    if not REDIS:
        pytest.skip(NO_REDIS)
    started: list[RedisServer] = []

    def start(*options: str) -> RedisServer:
        server = RedisServer(tmp_path_factory.mktemp("redis"), *options)
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def shared_redis(start_redis: Callable[..., RedisServer]) -> RedisServer:
    """The real server that all tests use in turn."""
    return start_redis()


# Queues ---------------------------------------------------------------------------------------------------------------


class Server:
    """Makes queues that share their data: on an embedded server, or on the Redis at `url`."""

    def __init__(self, url: str = "") -> None:
        self.url = url
        self._pools = [Queue.from_url(url).pool if url else Queue.embedded().pool]
        self.clear()

    def queue(self, url: str = "", **options: Any) -> Queue:
        """Make another queue on the same data, with its own clock. `url` may name a proxy."""
        if not self.url:
            return Queue(self._pools[0], **options)
        queue = Queue.from_url(url or self.url, **options)
        self._pools.append(queue.pool)
        return queue

    def clear(self) -> None:
        redis.Redis(connection_pool=self._pools[0]).flushall()

    def close(self) -> None:
        disconnect(self._pools)


def disconnect(pools: Iterable[Any]) -> None:
    """Close all connections, those of a web server's waiter, too: it opens one more when its own is closed.

    The taker of a worker that was stopped may still wait for the bell.
    """
    for thread in threading.enumerate():
        if thread.name == "taker":
            thread.join(5)
    for _ in range(2):
        for pool in pools:
            pool.disconnect()
        for thread in threading.enumerate():
            if thread.name == "waiter":
                thread.join(20)


@pytest.fixture
def real(shared_redis: RedisServer) -> Iterator[Server]:
    """The real server, emptied."""
    server = Server(shared_redis.url)
    yield server
    server.close()


@pytest.fixture(params=["embedded", "redis"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Each server in turn, emptied: first the embedded one, then the real one."""
    if request.param == "redis":
        yield request.getfixturevalue("real")
    else:
        server = Server()
        yield server
        server.close()


@pytest.fixture
def queue(server: Server) -> Iterator[Queue]:
    """An empty queue on each server. Its data is checked for consistency at the end."""
    queue = server.queue()
    yield queue
    check_consistency(queue)


@pytest.fixture
def near(real: Server) -> Iterator[Queue]:
    """An empty queue on the real server. Its data is checked for consistency at the end."""
    queue = real.queue()
    yield queue
    check_consistency(queue)


@pytest.fixture
def proxy(shared_redis: RedisServer) -> Iterator[CutProxy]:
    """A proxy in front of the real server that cuts, delays or splits packets.

    Everything that the test has asked it to do must have happened at the end.
    """
    with CutProxy(shared_redis.port) as proxy:
        yield proxy
        assert proxy.idle, "a packet that the proxy waits for never came"


@pytest.fixture
def far(real: Server, near: Queue, proxy: CutProxy) -> Queue:
    """A queue on the data of `near`, but through `proxy`. It has already read the time."""
    queue = real.queue(proxy.url)
    queue.now()
    return queue


@pytest.fixture
def queue_at() -> Iterator[Callable[..., Queue]]:
    """Make queues on the Redis at a URL."""
    made: list[Queue] = []

    def queue_at(url: str, **options: Any) -> Queue:
        made.append(Queue.from_url(url, **options))
        return made[-1]

    yield queue_at
    disconnect([queue.pool for queue in made])


@pytest.fixture
def api(queue: Queue) -> Client:
    """A client of the HTTP API of `queue`, with default settings."""
    return Client(API(Settings(), queue))


@pytest.fixture
def no_handlers() -> Iterator[None]:
    """Hide the handlers and schedules that other tests have registered."""
    saved = dict(HANDLERS)
    schedules = dict(SCHEDULES)
    HANDLERS.clear()
    SCHEDULES.clear()
    yield
    HANDLERS.clear()
    HANDLERS.update(saved)
    SCHEDULES.clear()
    SCHEDULES.update(schedules)


@pytest.fixture(autouse=True)
def _log_is_restored() -> Iterator[None]:
    """Undo what a program that a test runs in this process does to logging. Later tests read log lines."""
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    yield
    logging.captureWarnings(False)
    for name in LOGGERS:
        logging.getLogger(name).__class__ = logging.Logger
    root.setLevel(before[0])
    root.handlers[:] = before[1]


# Waiting, and access to the data behind the queue ---------------------------------------------------------------------


def until(condition: Callable[[], Any], timeout: float = 20.0) -> Any:
    """Wait until a condition returns something true, and return that."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.005)
    return value


def threads_since(before: Collection[threading.Thread]) -> list[threading.Thread]:
    """Return the threads that run now and did not before.

    Compare threads, not their number: one that an earlier test has left may end meanwhile.
    """
    return [thread for thread in threading.enumerate() if thread not in before]


def raw(queue: Queue) -> redis.Redis:
    """Return a plain Redis client on the data of the queue."""
    return redis.Redis(connection_pool=queue.pool)


def lapse(queue: Queue, worker: str) -> None:
    """Make the lease of a worker expire now."""
    assert raw(queue).delete(queue.keys.lease(worker)), "the worker had no lease"


def find_lost(queue: Any) -> list[str]:
    """The workers that are lost to a process that has watched for a lease while all others sent heartbeats."""
    began = max((since for part in queue.parts for _, since in part._leases.values()), default=0.0)
    queue.lost_workers(now=began)
    for worker in queue.workers():
        if worker["alive"]:
            queue.heartbeat(worker["id"], worker["jobs"])
    return list(queue.lost_workers(now=began + queue.lease))


def put(queue: Queue, status: str, /, **options: Any) -> Job:
    """Make a job of that status, or a delayed one, with public methods only, and return it.

    No other job may wait in its queue. The worker of a processing job, `job.worker`, stays
    registered. Any other worker made on the way is deregistered.
    """
    delay = {"delay": 60} if status == "delayed" else {}
    job = queue.enqueue("echo", {"to": "you"}, **delay, **options)
    if status in ("pending", "delayed"):
        return job
    if status == "cancelled":
        queue.cancel(job.id)
    else:
        worker = queue.register([job.queue], 1)
        [started] = queue.dequeue(worker, [job.queue])
        assert started.id == job.id, f"another job was waiting in {job.queue}"
        if status == "processing":
            return started
        if status == "completed":
            queue.complete(started, {"sent": True})
        elif status == "failed":
            queue.fail(started, Failure("Boom", "it broke"))
        queue.deregister(worker)
    made = queue.get(job.id)
    assert made
    assert made.status == status
    return made


# Consistency ----------------------------------------------------------------------------------------------------------


def follow_jobs(queue: Queue) -> None:
    """Take a job through each thing that decides when it starts, or that follows its end."""

    @handler("echo")
    def echo(payload: object) -> None: ...

    @handler("charge", max_running=1)
    def charge(payload: object) -> None: ...

    worker = queue.register(["default"], 10)

    def started() -> list[Job]:
        queue.promote()
        return queue.dequeue(worker, ["default"], 10)

    limited = queue.enqueue_many("charge", [1, 2])
    parent = queue.enqueue("echo", 1, callback_url="http://receiver.example/")
    child = queue.enqueue("echo", 2, after=[parent.id])
    first, held = limited
    running = started()
    assert {job.id for job in running} == {first.id, parent.id}
    for job in running:
        queue.complete(job, "done")
    running = started()
    assert {job.id for job in running} == {held.id, child.id}
    assert [job.result for job in running[-1].parents()] == ["done"] * len(running[-1].parents())
    later = queue.enqueue("echo", 4, delay=60)
    queue.quiet(worker)
    queue.queues()
    queue.hasten(later.id)
    assert started() == []
    queue.resume_worker(worker)
    queue.queues()
    running += started()
    assert running[-1].id == later.id
    for job in running:
        queue.fail(job, Failure("Boom", "it broke"))
    assert [job.type for job in queue.dequeue(worker, ["webhooks"], 2)] == ["webhook"]
    put_schedule(queue, make_schedule("nightly", "* * * * *", "echo", 3))
    ticker = Ticker(queue)
    queue.clock.ahead += 61_000
    ticker.tick()
    assert [job.schedule for job in started()] == ["nightly"]
    remove_schedule(queue, "nightly")
    queue.deregister(worker)
    check_consistency(queue)


class NoBar:
    """A progress bar that shows nothing."""

    length: int | None = None

    def update(self, n_steps: int, /) -> None:
        pass


def newest(queue: Any, status: Status, limit: int = 50) -> list[Job]:
    """Return the newest jobs of a status, as the first page of a listing shows them."""
    return queue.page(Filter(status), limit=limit)[0] if limit else []


class Entry(NamedTuple):
    """The type and the value of a key, and whether it has a time to live."""

    type: str
    value: Any
    expires: bool


def dump(queue: Queue) -> dict[str, Entry]:
    """Return everything in the database of the queue."""
    client = raw(queue)
    keys = sorted(client.keys())
    with client.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.type(key)
        types = [type.decode() for type in pipe.execute()]
        here = [(key, type) for key, type in zip(keys, types, strict=True) if type != "none"]  # others have expired
        readers: dict[str, Callable[[bytes], object]] = {
            "string": pipe.get,
            "list": lambda key: pipe.lrange(key, 0, -1),
            "set": pipe.smembers,
            "zset": lambda key: pipe.zrange(key, 0, -1, withscores=True),
            "hash": pipe.hgetall,
        }
        for key, type in here:
            readers[type](key)
            pipe.pttl(key)
        replies = pipe.execute()
    rows = zip(here, replies[::2], replies[1::2], strict=True)
    return {
        key.decode(): Entry(type, dict(value) if type == "zset" else value, expiry > 0)
        for (key, type), value, expiry in rows
    }


FAMILIES = {
    "job:": "string",
    "jobs:": "list",
    "proc:": "list",
    "bell:": "list",
    "worker:": "string",
    "lease:": "string",
    "delayed": "zset",
    "completed": "zset",
    "failed": "zset",
    "cancelled": "zset",
    "workers": "set",
    "counts": "hash",
    "trouble": "hash",
    "promoter": "string",
    "repairer": "string",
    "snapshots": "list",
    "snapshotter": "string",
    "mark": "string",
    "metrics": "hash",
    "series": "set",
    "once:": "string",
    "unique:": "string",
    "paused": "set",
    "minute:": "hash",
    "rate:": "string",
    "awaited": "set",
    "done:": "list",
    "next:": "set",
    "log:": "list",
    "advance": "list",
    "advancer": "string",
    "schedule:": "string",
    "ticks": "zset",
    "generation:": "string",
    "holding": "set",
    "overrides": "hash",
    "audit": "list",
    "running:": "set",
    "held:": "zset",
    "pace:": "zset",
    "halt:": "string",
}
EXPIRING = (
    *("lease:", "promoter", "repairer", "advancer", "mark", "once:", "minute:", "rate:", "done:", "pace:", "halt:"),
    "snapshotter",
)
ENDED = ("completed", "failed", "cancelled")


def check_consistency(queue: Queue) -> None:
    """Check that every job is where its status says, and nowhere else except in lists.

    Lists may hold more ids, because the record decides.
    """
    tag = queue.keys.counts.removesuffix("counts")
    keys = {key.removeprefix(tag): entry for key, entry in dump(queue).items() if key.startswith(tag)}
    for key, entry in keys.items():
        match = re.match(r"[a-z]+:?", key)
        assert match, f"unknown key {key}"
        assert FAMILIES.get(match[0]) == entry.type, f"unknown key {key}, a {entry.type}"
        assert entry.expires == (match[0] in EXPIRING) or match[0] in ("job:", "next:", "log:"), (
            f"{key} has a time to live: {entry.expires}"
        )

    def family(name: str) -> dict[str, Any]:
        return {key.removeprefix(name): entry.value for key, entry in keys.items() if key.startswith(name)}

    records = {id: _read_record(record) for id, record in family("job:").items()}
    lists = {name: set(ids) for name, ids in family("jobs:").items()}
    held = {worker: set(ids) for worker, ids in family("proc:").items()}
    indexes = {name: keys[name].value if name in keys else {} for name in ("delayed", *ENDED)}
    waiting = {limit: {entry.decode() for entry in entries} for limit, entries in family("held:").items()}
    _check_limits(records, family("running:"), waiting, keys["holding"].value if "holding" in keys else set(), indexes)
    workers = {worker.decode() for worker in keys["workers"].value} if "workers" in keys else set()
    assert held.keys() <= workers, "a list belongs to a worker that is not in the set of workers"
    assert family("worker:").keys() <= workers
    marks = {name.decode() for name in keys["paused"].value if name.startswith(b"@")} if "paused" in keys else set()
    assert {mark[1:] for mark in marks} <= family("worker:").keys(), "the mark of a quiet worker has stayed"
    assert family("lease:").keys() <= workers
    assert all(len(bells) <= 64 for bells in family("bell:").values())
    for id, record in records.items():
        places = Places(
            queue={name for name, listed in lists.items() if id.encode() in listed},
            held={worker for worker, listed in held.items() if id.encode() in listed},
            index={status: index[id.encode()] for status, index in indexes.items() if id.encode() in index},
            waits=f"{record.get('queue', 'default')}:{id}" in waiting.get(record.get("limit", ""), ()),
        )
        _check_place(id, record, keys["job:" + id].expires, places)
    for id, lines in family("log:").items():
        record = records.get(id, {})
        assert record.get("logged") or (not record and keys["log:" + id].expires), f"nobody deletes the log of {id}"
        assert not record or keys["log:" + id].expires == (record.get("status") in ENDED), record
        assert 0 < sum(map(len, lines)) <= LOG_BYTES
    now = queue.now()
    for status in ENDED:
        for id, ended in indexes[status].items():
            record = records.get(id.decode())
            assert record or ended + queue.keep_ms[status] <= now, (
                f"{status} lists {id!r}, whose record is missing but should not have expired yet"
            )
    _check_counts(keys["counts"].value if "counts" in keys else {}, records, indexes)
    _check_metrics(queue.metrics(), records)
    assert "advance" not in keys or b"advance:" in indexes["delayed"], "nobody looks for tokens that are left"
    tokens = {token.decode().partition(":")[0] for token in keys["advance"].value} if "advance" in keys else set()
    _check_dependents(records, {id: set(ids) for id, ids in family("next:").items()}, tokens)
    _check_unique_keys({key: id.decode() for key, id in family("unique:").items()}, records)
    for id in (id for made in family("once:").values() for id in json.loads(made)["ids"]):
        assert ID.fullmatch(id), f"an Idempotency-Key names {id}, which is not a job id"
    _check_schedules(family("schedule:"), keys["ticks"].value if "ticks" in keys else {})
    for minute in family("minute:").values():
        totals = {field.decode() for field in minute if b":" not in field}
        assert totals <= {"started", "waitedMs", "retried", "ready", "requeued", *ENDED}
        ends = [int(count) for field, count in minute.items() if field.startswith(b"completed:")]
        assert sum(ends) <= int(minute.get(b"completed", 0))  # a version before them counts no types
        assert int(minute.get(b"waitedMs", 0)) == 0 or int(minute[b"started"]) > 0


def _check_schedules(stored: dict[str, bytes], ticks: dict[bytes, float]) -> None:
    """Check that each schedule is listed when it is due, or never while it is paused, and no other is."""
    due = {}
    for name, record in stored.items():
        found = read_schedule(record)
        assert found.name == name
        assert found.next_at > found.last_at, f"schedule {name} would tick twice: {found}"
        assert found.next_at % 60_000 == 0
        due[name] = float("inf") if found.paused else float(found.next_at)
    assert {name.decode(): score for name, score in ticks.items()} == due


def _check_limits(
    records: dict[str, dict[str, Any]],
    running: dict[str, set[bytes]],
    waiting: dict[str, set[str]],
    holding: set[bytes],
    indexes: dict[str, dict[bytes, float]],
) -> None:
    """Check that exactly the processing jobs of a limit count as running, and that somebody will look at held ones."""
    counted: dict[str, set[bytes]] = {}
    for id, record in records.items():
        if record.get("status") == "processing" and record.get("limit"):
            counted.setdefault(record["limit"], set()).add(id.encode())
    assert running == counted, "other jobs count as running under limits than are processing"
    limits = {limit.decode() for limit in holding}
    assert waiting.keys() <= limits, "a limit has held jobs and is not in `holding`"
    marks = {id.decode().removeprefix("limit:") for id in indexes["delayed"] if id.startswith(b"limit:")}
    assert marks == limits, "nobody looks at a limit with held jobs, or somebody looks at another"


def _check_metrics(counters: dict[str, dict[tuple[str, ...], int]], records: dict[str, dict[str, Any]]) -> None:
    """Check that the counters balance: each start counts once, and each end.

    The jobs accepted minus those that ended are the unended ones. The attempts started minus those
    that ended are the running ones.
    """
    jobs = Counter[tuple[str, ...]]()
    attempts = Counter[tuple[str, ...]]()
    for name, sign in {"enqueued": 1, "revived": 1, "completed": -1, "failed": -1, "cancelled": -1}.items():
        jobs.update({labels: sign * count for labels, count in counters.get(name, {}).items()})
    for name, sign in {"waited": 1, "ran": -1, "released": -1, "reaped": -1}.items():
        for labels, count in counters.get(name, {}).items():
            attempts[labels[:2]] += sign * count
    unended = [(record["type"], record.get("queue", "default")) for record in records.values() if _unended(record)]
    running = [(r["type"], r.get("queue", "default")) for r in records.values() if r.get("status") == "processing"]
    # A record that cannot be read was accepted under another type, or was never accepted.
    assert {labels: count for labels, count in jobs.items() if count and labels[0] != "unreadable"} == Counter(unended)
    assert {labels: count for labels, count in attempts.items() if count} == Counter(running)


def _read_record(text: bytes) -> dict[str, Any]:
    """Read a record without its payload and its result, which may take long."""
    fields = msgspec.json.decode(text.decode(), type=dict[str, msgspec.Raw])  # invalid UTF-8 is an error, too
    return {name: msgspec.json.decode(value) for name, value in fields.items() if name not in ("payload", "result")}


def _check_dependents(records: dict[str, dict[str, Any]], entered: dict[str, set[bytes]], tokens: set[str]) -> None:
    """Check that no job waits for one that has ended, and that none failed because of one that has not failed.

    Those are excepted whose parent has a token, because `advance` looks at them.
    """
    for id, record in records.items():
        waits = record.get("status", "pending") == "pending"
        error = record.get("error", {})
        because = record.get("status") == "failed" and error.get("type") == "DependencyFailed"
        assert set(record.get("waitingFor", ())) <= set(record.get("after", ()))
        for parent in set(record.get("waitingFor", ())) - tokens:
            details = f"{id} waits for {parent}: {record}, {records.get(parent)}"
            status = records.get(parent, {"status": "gone"}).get("status", "pending")
            if waits:
                assert status in ("pending", "processing"), f"waits for ever: {details}"
                assert records[parent].get("followed"), f"its end will not be seen: {details}"
                assert id.encode() in entered.get(parent, ()), f"it will not be found: {details}"
            elif because and parent in error["message"]:
                assert status in ("failed", "cancelled", "gone"), f"failed in vain: {details}"


def _check_unique_keys(keys: dict[str, str], records: dict[str, dict[str, Any]]) -> None:
    """Check that each uniqueKey names the only unended job that has it."""
    uses = Counter(record["uniqueKey"] for record in records.values() if _unended(record) and "uniqueKey" in record)
    assert all(count == 1 for count in uses.values()), f"two jobs have the same uniqueKey: {uses}"
    owners = {record["uniqueKey"]: id for id, record in records.items() if _unended(record) and "uniqueKey" in record}
    assert keys == owners, "a uniqueKey names no unended job, or a job's uniqueKey is missing"


def _unended(record: dict[str, Any]) -> bool:
    return record.get("status", "pending") not in ENDED


class Places(NamedTuple):
    """Where an id is: the queues and workers whose lists have it, and its score in each index."""

    queue: set[str]
    held: set[str]
    index: dict[str, float]
    waits: bool  # among the held jobs of its limit


def _check_place(id: str, record: dict[str, Any], expires: bool, places: Places) -> None:
    status = record.get("status", "pending")
    worker = record.get("worker", "")
    # The end of a job that a backup has ended is not delivered.
    silent = not record.get("callbackUrl") or record.get("cancelRequested") or status not in ENDED
    assert silent or record.get("callbackJob"), f"no delivery of an end: {record}"
    details = f"{id} is in {places}, and its record is {record}"
    assert expires == (status in ENDED), f"only an ended job may have a time to live, and it must: {details}"
    assert bool(worker) == (status == "processing") or (worker and status in ENDED), details
    _check_history(record)
    assert places.index.keys() - {"delayed"} == {status} & set(ENDED), details
    if status == "pending":
        listed = record.get("queue", "default") in places.queue or places.held or places.waits
        due = record.get("expiresAt", float("inf")) if record.get("waitingFor") else record.get("runAt", 0)
        assert listed or places.index.get("delayed") == due, f"lost job: {details}"
    elif status == "processing":
        assert worker in places.held, f"lost job: {details}"
    else:
        assert places.index[status] == record["endedAt"], details


def _check_history(record: dict[str, Any]) -> None:
    """Check that each former attempt has ended."""
    history = record.get("history", [])
    assert len(history) <= HISTORY, record
    for attempt in history:
        assert 0 < attempt["startedAt"] <= attempt["endedAt"], record
        assert attempt["outcome"] in ("completed", "failed", "cancelled", "released", "lost"), record


def _check_counts(
    counts: dict[bytes, bytes], records: dict[str, dict[str, Any]], indexes: dict[str, dict[bytes, float]]
) -> None:
    unended = Counter(
        f"{status}:{record.get('queue', 'default')}"
        for record in records.values()
        if (status := record.get("status", "pending")) not in ENDED
    )
    counted = {field.decode(): int(value) for field, value in counts.items()}
    assert {field: value for field, value in counted.items() if ":" in field and value} == unended
    for status in ENDED:
        assert counted.get(status, 0) >= len(indexes[status])
    assert {field for field in counted if ":" not in field} <= {*ENDED, "retrying"}
    retrying = [
        r for r in records.values() if r.get("status", "pending") == "pending" and r.get("attempts") and r.get("error")
    ]
    assert counted.get("retrying", 0) == len(retrying)
