"""Many shards as one queue: ids name their shard, workers serve all shards, and reports add up."""

from __future__ import annotations

import inspect
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from client import Client
from conftest import RedisServer, Server, check_consistency, find_lost, lapse, raw, until
from cutproxy import CutProxy
from test_worker import Running

import tinyqueue
import tinyqueue_redis
from tinyqueue import (
    Failure,
    Filter,
    InvalidJob,
    Job,
    KeyReused,
    Once,
    Outcome,
    Queue,
    QueueFull,
    Reaped,
    Unavailable,
    Verbs,
    handler,
)
from tinyqueue_config import Settings, open_queue
from tinyqueue_doctor import examine, warnings
from tinyqueue_reading import Reading
from tinyqueue_shards import Shards
from worker import CLOSING, LAST_WRITE, StopMode
from wsgi import API

DEFAULT = ["default"]
COUNT = 3
CONSTRUCTORS = {"from_url", "embedded"}
ONE_BY_ONE = {
    "read_held",
    "await_ends",
    "wait_for_end",
    "leave_token",
    "forget_awaited",
    "running",
    "count_unended",
    "queue_names",
    "read_entries",
    "read_jobs",
    "read_lists",
    "read_records",
    "restore",
    "claim",
    "count_failed_ticks",
    "count_pending",
    "discard",
    "exchange",
    "load",
    "next_jobs",
    "pending_among",
    "change_schedule",
    "sync_schedules",
    "write_log",
    "write_schedule",
}  # called for each shard, by other verbs, by doctor, by backups, by the web process and for schedules


@pytest.fixture
def queue(server: Server) -> Iterator[Shards]:
    """An empty queue of three shards on either server. Checks each for consistency at the end."""
    shards = Shards([server.queue(namespace=f"queue.{at}") for at in range(COUNT)])
    yield shards
    shards._waiters.shutdown()  # before the connections are closed on which they wait for a bell
    for shard in shards.parts:
        check_consistency(shard)


@pytest.fixture
def worker(queue: Shards) -> str:
    return queue.register(DEFAULT, 10)


def shard_of(job: Job) -> int:
    return int(job.id[-2:], 16)


def test_shards_have_every_verb_of_a_queue() -> None:
    public = {
        name
        for name, member in {**vars(Reading), **vars(Queue)}.items()
        if not name.startswith("_") and inspect.isroutine(member)
    }
    assert public - CONSTRUCTORS - ONE_BY_ONE - vars(Verbs).keys() - vars(Shards).keys() == set()


def test_submit_spreads_jobs_over_all_shards(queue: Shards) -> None:
    jobs = [queue.enqueue("echo", at) for at in range(9)]
    assert Counter(map(shard_of, jobs)) == {0: 3, 1: 3, 2: 3}
    for at, shard in enumerate(queue.parts):
        assert shard.stats()["pending"] == 3
        assert all((shard.get(job.id) is not None) == (shard_of(job) == at) for job in jobs)
    assert [queue.get(job.id) for job in jobs] == jobs


def test_submit_puts_a_batch_into_one_shard(queue: Shards) -> None:
    assert len({shard_of(job) for job in queue.enqueue_many("echo", range(50))}) == 1


def test_get_of_an_id_without_a_shard_returns_none(queue: Shards) -> None:
    id = queue.enqueue("echo", 1).id[:-2] + "2a"
    assert [queue.get(id), queue.cancel(id), queue.retry(id), queue.wait_for(id, 1)] == [None] * 4
    assert queue.get("nonsense") is None


def test_dequeue_starts_the_jobs_of_a_shard_first_in_first_out(queue: Shards, worker: str) -> None:
    jobs = [queue.enqueue("echo", at) for at in range(12)]
    started = [job for _ in range(6) for job in queue.dequeue(worker, DEFAULT, 2)]
    assert sorted(started, key=lambda job: job.id) == sorted(started, key=lambda job: job.payload)
    for at in range(COUNT):
        assert [job.id for job in started if shard_of(job) == at] == [job.id for job in jobs if shard_of(job) == at]
    queue.settle(worker, [Outcome(job, "complete") for job in started])


def test_take_serves_every_shard_in_turn(queue: Shards, worker: str) -> None:
    for _ in range(COUNT):
        queue.enqueue_many("echo", range(30))
    for _ in range(COUNT):
        jobs = queue.dequeue(worker, DEFAULT, 10)
        assert len(jobs) == 10
        queue.settle(worker, [Outcome(job, "complete") for job in jobs])
    assert [shard.stats()["pending"] for shard in queue.parts] == [20, 20, 20]


def test_take_succeeds_while_one_shard_is_broken(queue: Shards, worker: str) -> None:
    jobs = [queue.enqueue("echo", at) for at in range(COUNT)]
    broken = queue.parts[1].keys.jobs("default")
    entries = raw(queue.parts[1]).lrange(broken, 0, -1)
    raw(queue.parts[1]).set(broken, "no list")
    started = queue.dequeue(worker, DEFAULT, 9)
    assert {shard_of(job) for job in started} == {0, 2}
    queue.settle(worker, [Outcome(job, "complete") for job in started])
    raw(queue.parts[1]).delete(broken)
    raw(queue.parts[1]).rpush(broken, *entries)
    assert [job.id for job in queue.dequeue(worker, DEFAULT)] == [job.id for job in jobs if shard_of(job) == 1]


def test_submit_repeatedly_with_one_key_makes_one_job(queue: Shards) -> None:
    made = {queue.submit([queue.draft("echo", 1)], once)[0].id for once in (Once("k", "same") for _ in range(7))}
    assert len(made) == 1


def test_submit_with_a_taken_unique_key_returns_its_job(queue: Shards, worker: str) -> None:
    first = queue.enqueue("echo", 1, unique_key="u")
    assert {queue.enqueue("echo", 2, unique_key="u").id for _ in range(5)} == {first.id}
    [job] = queue.dequeue(worker, DEFAULT)
    queue.complete(job)
    assert queue.enqueue("echo", 3, unique_key="u").id != first.id


def test_submit_refuses_an_idempotency_key_of_another_request_whatever_its_unique_key(queue: Shards) -> None:
    def submit(key: str, unique_key: str | None) -> Job:
        return queue.submit([queue.draft("echo", 1, unique_key=unique_key)], Once(key, f"asks for {unique_key}"))[0]

    unique_keys = [None, *(f"user {at}" for at in range(9))]
    for first in unique_keys:
        job = submit(f"key of {first}", first)
        assert submit(f"key of {first}", first).id == job.id
        for other in unique_keys:
            if other != first:
                with pytest.raises(KeyReused):
                    submit(f"key of {first}", other)
    assert queue.stats()["pending"] == len(unique_keys)


def test_submit_may_be_repeated_when_it_failed_after_taking_its_idempotency_key(
    servers: list[RedisServer], apart: Callable[[], Shards]
) -> None:
    queue = apart()
    key = next(f"key {at}" for at in range(99) if queue._index_of(f"key {at}") == 0)
    user = next(f"user {at}" for at in range(99) if queue._index_of(f"user {at}") == 1)
    servers[1].kill()
    drafts = [queue.draft("echo", 1, unique_key=user)]
    with pytest.raises(Unavailable):
        queue.submit(drafts, Once(key, "f"))
    servers[1].start()
    until(lambda: not is_away(queue.parts[1]))
    [job] = queue.submit(drafts, Once(key, "f"))
    assert queue.get(job.id) == job


@pytest.mark.parametrize("batch", [1, 2])
def test_submit_counts_the_pending_jobs_of_all_shards(server: Server, batch: int) -> None:
    queue = Shards([server.queue(namespace=f"queue.{at}", max_pending=6) for at in range(8)])
    for at in range(6 // batch):
        queue.enqueue_many("echo", range(batch), unique_key=None if at % 2 else f"user {at}" if batch == 1 else None)
    for unique_key in (None, "somebody else"):
        with pytest.raises(QueueFull, match="queue default has 6 pending jobs; the limit is 6"):
            queue.enqueue("echo", 7, unique_key=unique_key)
    assert queue.enqueue("echo", 8, queue="other")
    queue.disconnect()


@pytest.mark.parametrize("junk", [b"junk", b"\xff", b"0199a0f0-0000-7000-8000-000000000000"])
def test_take_drops_an_entry_that_names_no_job_of_the_shard(
    queue: Shards, worker: str, junk: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    shard = queue.parts[1]
    raw(shard).lpush(shard.keys.jobs("default"), junk)
    jobs = [queue.enqueue("echo", at) for at in range(6)]
    assert {job.id for job in queue.dequeue(worker, DEFAULT, 9)} == {job.id for job in jobs}
    raw(shard).lpush(shard.keys.proc(worker), junk)
    assert queue.adopt(worker, [job.id for job in jobs]) == []
    assert raw(shard).lrange(shard.keys.proc(worker), 0, -1).count(junk) == 0
    assert [record.getMessage().partition(",")[0].rpartition(" ")[2] for record in caplog.records] == ["1", "1"]
    queue.deregister(worker)


def test_submit_refuses_unique_keys_of_different_shards(queue: Shards) -> None:
    drafts = [queue.draft("echo", 1, unique_key=f"user {at}") for at in range(10)]
    with pytest.raises(InvalidJob, match="TINYQUEUE_SHARDS"):
        queue.submit(drafts)
    assert queue.stats()["pending"] == 0
    assert len(queue.submit([queue.draft("echo", 1, unique_key="u") for _ in range(2)])) == 2


def test_start_leaves_a_suspect_pending_beside_jobs_of_other_shards(queue: Shards, worker: str) -> None:
    suspect = queue.enqueue("echo", "suspect")
    innocent = queue.enqueue("echo", "innocent")
    shard = queue.parts[shard_of(suspect)]
    record = raw(shard).get(shard.keys.job(suspect.id))
    raw(shard).set(shard.keys.job(suspect.id), record[:-1] + b',"suspicions":2}')
    taken = [suspect.id.encode(), innocent.id.encode()]
    for entry in taken:
        owner = queue.parts[int(entry[-2:], 16)]
        raw(owner).rpoplpush(owner.keys.jobs("default"), owner.keys.proc(worker))
    by_payload = {job.payload: job.status for job in queue.start(worker, taken, {})}
    assert by_payload == {"suspect": "pending", "innocent": "processing"}
    queue.deregister(worker)


def test_heartbeat_raises_reaped_if_one_shard_reaped_the_worker(queue: Shards, worker: str) -> None:
    lapse(queue.parts[2], worker)
    assert find_lost(queue.parts[2]) == [worker]
    assert queue.reap(worker) == 0
    with pytest.raises(Reaped):
        queue.heartbeat(worker)
    queue.deregister(worker)
    assert queue.workers() == []


def test_reap_does_not_count_attempts_of_jobs_that_ran_beside_other_shards(queue: Shards, worker: str) -> None:
    jobs = [queue.enqueue("echo", at, max_attempts=1) for at in range(COUNT)]
    assert len(queue.dequeue(worker, DEFAULT, COUNT)) == COUNT
    for shard in queue.parts:
        lapse(shard, worker)
    assert queue.reap(worker) == COUNT
    found = [queue.get(job.id) for job in jobs]
    assert [(job.status, job.attempts, job.suspicions) for job in found if job] == [("pending", 0, 1)] * COUNT


def test_page_lists_jobs_of_all_shards_newest_first(queue: Shards) -> None:
    jobs = []
    for at in range(25):
        jobs.append(queue.enqueue("echo", at))
        for shard in queue.parts:
            shard.clock.ahead += 1
    listed = []
    cursor = ""
    pages = 0
    while pages == 0 or cursor:
        page, cursor = queue.page(Filter("pending"), limit=4, cursor=cursor)
        listed += [job.payload for job in page]
        pages += 1
    assert listed == [job.payload for job in reversed(jobs)]


def test_change_many_changes_jobs_of_all_shards(queue: Shards) -> None:
    for at in range(7):
        queue.enqueue("echo", at)
    assert queue.change_many("cancel", Filter("pending"))["cancelled"] == 7
    assert queue.change_many("retry", Filter("cancelled"))["retried"] == 7
    assert queue.stats()["pending"] == 7


def test_stats_adds_up_all_shards(queue: Shards, worker: str) -> None:
    for name in ("default", "default", "slow", "default"):
        queue.enqueue("echo", 1, queue=name)
    [job] = queue.dequeue(worker, DEFAULT)
    queue.fail(job, Failure("Boom", "it broke"))
    stats = queue.stats()
    assert (stats["pending"], stats["failed"], stats["workers"]) == (3, 1, 1)
    assert {name: about["pending"] for name, about in stats["queues"].items()} == {"default": 2, "slow": 1}
    assert stats["total"]["failed"] == stats["lastMinute"]["failed"] == 1
    assert sum(minute["started"] for minute in queue.stats(minutes=5)["history"]) == 1
    assert len(queue.stats(minutes=5)["history"]) == 5
    assert queue.metrics()["enqueued"] == {("echo", "default"): 3, ("echo", "slow"): 1}


@pytest.mark.parametrize("name", ["oldestWaitingMs", "workers", "queues", "at"])
def test_stats_adds_up_a_queue_that_is_named_like_a_part_of_them(queue: Shards, name: str) -> None:
    for at in range(COUNT):
        queue.enqueue("echo", at, queue=name)
    assert queue.stats()["queues"][name]["pending"] == COUNT


def test_history_adds_up_minutes_when_one_shard_is_ahead(queue: Shards, worker: str) -> None:
    for at in range(6):
        queue.enqueue("echo", at)
    for job in queue.dequeue(worker, DEFAULT, 6):
        queue.complete(job)
    queue.parts[1].clock.ahead += 60_000
    history = queue.stats(5)["history"]
    assert len(history) == 5
    assert len({minute["at"] for minute in history}) == 5
    assert sum(minute["started"] for minute in history) == sum(minute["completed"] for minute in history) == 6
    assert "history" not in queue.stats()


def test_recent_adds_up_all_shards(queue: Shards, worker: str) -> None:
    for _ in range(6):
        queue.enqueue("echo", {})
    jobs = queue.dequeue(worker, ["default"], 6)
    queue.settle(worker, [Outcome(job, "fail", error=Failure("Boom", "it broke")) for job in jobs])
    assert sum(minute["types"].get("echo", {"failed": 0})["failed"] for minute in queue.recent(2)) == 6
    assert sum(minute["types"]["echo"]["errors"]["Boom"] for minute in queue.recent(2) if minute["types"]) == 6


@pytest.mark.parametrize("error", ["at", "rate", "workers"])
def test_recent_adds_up_an_error_that_is_named_like_a_part_of_a_report(queue: Shards, worker: str, error: str) -> None:
    for _ in range(COUNT):
        queue.enqueue("echo", {})
    jobs = queue.dequeue(worker, DEFAULT, COUNT)
    assert {shard_of(job) for job in jobs} == set(range(COUNT))
    queue.settle(worker, [Outcome(job, "fail", error=Failure(error, "it broke")) for job in jobs])
    found = [minute["types"]["echo"]["errors"][error] for minute in queue.recent(2) if minute["types"]]
    assert sum(found) == COUNT


def test_history_and_metrics_add_up_all_shards(queue: Shards, worker: str) -> None:
    for _ in range(6):
        queue.enqueue("echo", {})
    jobs = queue.dequeue(worker, ["default"], 6)
    queue.settle(worker, [Outcome(job, "complete") for job in jobs])
    history = queue.stats(2)["history"]
    assert len(history) == 2
    assert history[1]["at"] - history[0]["at"] == 60_000
    assert sum(minute["started"] for minute in history) == sum(minute["completed"] for minute in history) == 6
    metrics = queue.metrics()
    assert metrics["enqueued"]["echo", "default"] == metrics["completed"]["echo", "default"] == 6
    assert sum(metrics["ran"].values()) == 6


def test_workers_lists_a_worker_once_with_the_jobs_of_all_shards(queue: Shards, worker: str) -> None:
    for at in range(4):
        queue.enqueue("echo", at)
    jobs = queue.dequeue(worker, DEFAULT, 4)
    queue.heartbeat(worker, [job.id for job in jobs])
    [about] = queue.workers()
    assert sorted(about["jobs"]) == sorted(job.id for job in jobs)
    queue.settle(worker, [Outcome(job, "release") for job in jobs])


def test_pause_stops_all_shards(queue: Shards, worker: str) -> None:
    for at in range(COUNT):
        queue.enqueue("echo", at)
    queue.pause("default")
    assert queue.queues()["default"]["paused"] is True
    assert queue.dequeue(worker, DEFAULT, 9) == []
    queue.resume("default")
    jobs: list[Job] = []
    until(lambda: jobs.extend(queue.dequeue(worker, DEFAULT, 9)) or len(jobs) == COUNT)
    queue.settle(worker, [Outcome(job, "release") for job in jobs])


def test_examine_reports_once_what_all_shards_share(queue: Shards) -> None:
    found = examine(queue, 19)
    assert [finding.about for finding in found].count("writes") == 1
    assert {"transport", "reachable", "permissions", "counts", "workers"} <= {finding.about for finding in found}
    assert warnings(queue) == []


def test_spend_counts_the_requests_of_a_client_in_one_shard(queue: Shards) -> None:
    assert [queue.spend("one", 5, 3600)[0] for _ in range(3)] == [4, 3, 2]
    assert queue.spend("another", 5, 3600)[0] == 4


@pytest.mark.usefixtures("no_handlers")
def test_worker_runs_the_jobs_of_all_shards(queue: Shards) -> None:
    handler("echo")(echo)
    running = Running(queue, slots=4)
    jobs = [queue.enqueue("echo", at) for at in range(30)]
    later = queue.enqueue("echo", "later", delay=0.3)
    until(lambda: queue.stats()["completed"] == 31)
    assert running.end("drain") == 0
    assert {queue.get(job.id).attempts for job in [*jobs, later]} == {1}
    assert queue.workers() == []


@pytest.mark.usefixtures("no_handlers")
@pytest.mark.parametrize("mode", ["drain", "release"])
def test_worker_that_stops_among_jobs_of_all_shards_loses_none(queue: Shards, mode: StopMode) -> None:
    ran: Counter[int] = Counter()
    lock = threading.Lock()

    @handler("note")
    def note(payload: int) -> None:
        with lock:
            ran[payload] += 1

    jobs = [queue.enqueue("note", n) for n in range(400)]
    for n in range(4):
        running = Running(queue, slots=4)
        until(lambda n=n: sum(ran.values()) > 40 * n)
        assert running.end(mode) == 0
        assert queue.stats()["processing"] == 0
    assert Running(queue, slots=4, burst=True).end() == 0
    stored = [queue.get(job.id) for job in jobs]
    assert queue.stats()["total"]["completed"] == 400
    assert all(ran[job.payload] <= job.attempts + job.refunds for job in stored)
    if mode == "drain":
        assert ran == dict.fromkeys(range(400), 1)


def echo(payload: object, job: Job) -> object:
    job.set_progress(0.5)
    return payload


@pytest.mark.usefixtures("no_handlers")
def test_http_api_serves_all_shards(queue: Shards) -> None:
    handler("echo")(echo)
    api = Client(API(Settings(), queue))
    ids = [api.post("/jobs", {"type": "echo", "payload": at}).json["jobId"] for at in range(6)]
    assert {job["id"] for job in api.get("/jobs?limit=6").json["jobs"]} == set(ids)
    assert api.call("DELETE", f"/jobs/{ids[0]}").json["status"] == "cancelled"
    assert api.call("POST", f"/jobs/{ids[0]}/retry").json["status"] == "pending"
    assert api.get(f"/jobs/{ids[-1]}?wait=1").json["status"] == "pending"
    assert api.get("/ready").status == 200
    assert api.get("/stats").json["pending"] == 6


def test_open_queue_makes_the_shards_of_the_settings(real: Server) -> None:
    queue = open_queue(Settings(redis_url=real.url, shards=4, namespace="shop"))
    assert isinstance(queue, Shards)
    assert [shard.keys.counts for shard in queue.parts] == [f"{{shop.{at}}}:counts" for at in range(4)]
    queue.enqueue("echo", 1)
    assert open_queue(Settings(redis_url=real.url, shards=4, namespace="shop")).stats()["pending"] == 1
    assert not isinstance(open_queue(Settings(redis_url=real.url)), Shards)


def test_settle_writes_the_outcomes_of_the_reachable_shards(real: Server) -> None:
    shards = Shards([real.queue(namespace=f"queue.{at}") for at in range(2)])
    worker = shards.register(DEFAULT, 2)
    jobs = [shards.enqueue("echo", at) for at in range(2)]
    started = shards.dequeue(worker, DEFAULT, 2)
    assert len(started) == 2
    dead = Queue(tinyqueue.connect("redis://127.0.0.1:1"), namespace="queue.1")
    alive = shards.parts[1]
    shards.parts[1] = dead
    outcomes = [Outcome(job, "complete") for job in started]
    with pytest.raises(Unavailable) as trouble:
        shards.settle(worker, outcomes)
    assert trouble.value.doubtful
    shards.parts[1] = alive
    assert shards.settle(worker, outcomes, again=True) == []
    assert {shards.get(job.id).status for job in jobs} == {"completed"}


# Each shard stands alone ----------------------------------------------------------------------------------------------


@pytest.fixture
def servers(start_redis: Callable[..., RedisServer]) -> Iterator[list[RedisServer]]:
    """Two servers, one for each shard."""
    both = [start_redis(), start_redis()]
    yield both
    for server in both:
        server.stop()


@pytest.fixture
def apart(servers: list[RedisServer]) -> Iterator[Callable[[], Shards]]:
    """Make queues whose two shards are on servers of their own."""
    made: list[Shards] = []

    def make() -> Shards:
        made.append(Shards([Queue.from_url(server.url, namespace=f"queue.{at}") for at, server in enumerate(servers)]))
        return made[-1]

    yield make
    for server in servers:
        if server.process:
            server.process.send_signal(signal.SIGCONT)
    for shards in made:
        shards.disconnect()


def hang(server: RedisServer) -> None:
    assert server.process
    server.process.send_signal(signal.SIGSTOP)


def kill(server: RedisServer) -> None:
    server.kill()


@pytest.mark.parametrize("fail", [kill, hang])
@pytest.mark.parametrize("dead", [0, 1])
def test_submit_succeeds_while_a_shard_is_away(
    servers: list[RedisServer],
    apart: Callable[[], Shards],
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[RedisServer], None],
    dead: int,
) -> None:
    monkeypatch.setattr(tinyqueue_redis, "SOCKET_TIMEOUT", 1.0)
    queue = apart()
    fail(servers[dead])
    assert {shard_of(queue.enqueue("echo", at)) for at in range(6)} == {1 - dead}
    queue.ping()


def test_nobody_waits_for_a_shard_that_is_known_to_hang(
    servers: list[RedisServer], apart: Callable[[], Shards]
) -> None:
    queue = apart()
    job = next(job for job in (queue.enqueue("echo", at) for at in range(2)) if shard_of(job) == 0)
    hang(servers[0])
    with pytest.raises(Unavailable):
        queue.get(job.id)
    began = time.monotonic()
    for at in range(20):
        queue.enqueue("echo", at)
        with pytest.raises(Unavailable) as caught:
            queue.get(job.id)
        assert caught.value.reason == "timeout"
    assert time.monotonic() - began < tinyqueue_redis.SOCKET_TIMEOUT  # which every wait would have taken
    assert servers[0].process
    servers[0].process.send_signal(signal.SIGCONT)
    until(lambda: not queue.parts[0].store.connections.away)
    assert queue.get(job.id) == job


def test_cut_connection_does_not_make_a_shard_seem_away(real: Server, proxy: CutProxy) -> None:
    queue = Shards([real.queue(proxy.url, namespace="queue.0")])
    queue.ping()
    proxy.drop_reply(b"EXEC")
    assert queue.enqueue("echo", 1)
    assert not queue.parts[0].store.connections.away


def test_register_succeeds_without_a_shard_that_heartbeat_adds_later(
    servers: list[RedisServer], apart: Callable[[], Shards]
) -> None:
    servers[0].kill()
    queue = apart()
    worker = queue.register(DEFAULT, 1)
    job = queue.enqueue("echo", 1)
    queue.heartbeat(worker)
    assert [started.id for started in queue.dequeue(worker, DEFAULT, 5)] == [job.id]
    servers[0].start()
    until(lambda: not queue.parts[0].store.connections.away)
    other = apart()
    [early] = [job for job in (other.enqueue("echo", at) for at in range(2)) if shard_of(job) == 0]
    assert [shard_of(job) for job in queue.dequeue(worker, DEFAULT, 5)] == [1]
    queue.heartbeat(worker)
    assert [started.id for started in queue.dequeue(worker, DEFAULT, 5)] == [early.id]


def test_reaped_worker_of_one_shard_keeps_its_jobs_in_the_others(queue: Shards, worker: str) -> None:
    for at in range(COUNT):
        queue.enqueue("echo", at)
    jobs = sorted(queue.dequeue(worker, DEFAULT, COUNT), key=shard_of)
    lapse(queue.parts[2], worker)
    assert queue.reap(worker) == 1
    with pytest.raises(Reaped) as caught:
        queue.heartbeat(worker, [job.id for job in jobs])
    assert caught.value.parts == [queue.parts[2]]
    queue.heartbeat(worker, [job.id for job in jobs[:2]])
    assert queue.settle(worker, [Outcome(job, "complete") for job in jobs]) == [Outcome(jobs[2], "complete")]
    [again] = queue.dequeue(worker, DEFAULT)
    assert again.id == jobs[2].id
    queue.complete(again)
    assert [queue.get(job.id).status for job in jobs] == ["completed"] * COUNT


def test_reap_requeues_the_jobs_of_a_dead_worker_while_another_shard_is_away(
    servers: list[RedisServer], apart: Callable[[], Shards]
) -> None:
    queue = apart()
    worker = queue.register(DEFAULT, 4)
    jobs = [queue.enqueue("echo", at, max_attempts=1) for at in range(4)]
    assert len(queue.dequeue(worker, DEFAULT, 4)) == 4
    servers[0].kill()
    lapse(queue.parts[1], worker)
    assert queue.reap(worker) == 2
    found = [queue.get(job.id) for job in jobs if shard_of(job) == 1]
    assert [(job.status, job.attempts, job.suspicions) for job in found if job] == [("pending", 0, 1)] * 2


def test_spend_counts_in_another_shard_while_that_of_the_client_is_away(
    servers: list[RedisServer], apart: Callable[[], Shards]
) -> None:
    queue = apart()
    servers[0].kill()
    assert {queue.spend(f"client {at}", 5, 3600)[0] for at in range(6)} == {4}


def test_warnings_name_a_shard_that_is_away(servers: list[RedisServer], apart: Callable[[], Shards]) -> None:
    queue = apart()
    assert warnings(queue) == []
    servers[1].kill()
    ready = Client(API(Settings(), queue)).get("/ready").json
    assert ready["status"] == "ok"
    text = "Redis of shard queue.1 does not answer, so its jobs do not run: Error 111"
    assert ready["warnings"][0].startswith(text)


@pytest.mark.usefixtures("no_handlers")
@pytest.mark.parametrize("fail", [kill, hang])
def test_worker_saves_the_outcomes_of_one_shard_while_the_other_is_away(
    servers: list[RedisServer], apart: Callable[[], Shards], fail: Callable[[RedisServer], None]
) -> None:
    gate = threading.Event()
    handler("gate")(gated(gate))
    queue = apart()
    jobs = [queue.enqueue("gate", at) for at in range(4)]
    running = Running(apart(), slots=4)
    until(lambda: queue.stats()["processing"] == 4)
    fail(servers[0])
    gate.set()
    alive = queue.parts[1]
    until(lambda: alive.stats()["completed"] == 2, timeout=15)
    until(lambda: is_away(queue.parts[0]))  # before that, a submit there may be in doubt
    more = [queue.enqueue("gate", at) for at in range(20)]
    until(lambda: alive.stats()["completed"] == 2 + len(more), timeout=15)
    began = time.monotonic()
    assert running.end("release") == 1  # the outcomes of the other shard could not be saved
    assert time.monotonic() - began < LAST_WRITE + CLOSING + 2
    assert alive.stats()["workers"] == alive.stats()["processing"] == 0
    assert {found.status for job in jobs if shard_of(job) == 1 and (found := queue.get(job.id))} == {"completed"}


def is_away(shard: Queue) -> bool:
    with suppress(Unavailable):
        shard.ping()
    return shard.store.connections.away


def gated(gate: threading.Event) -> Callable[[int, Job], int]:
    def run(payload: int, job: Job) -> int:
        gate.wait(20)
        return payload

    return run


@pytest.mark.usefixtures("no_handlers")
def test_worker_starts_while_a_shard_is_away_and_serves_it_when_it_is_back(
    servers: list[RedisServer], apart: Callable[[], Shards]
) -> None:
    handler("echo")(echo)
    queue = apart()
    servers[0].kill()
    running = Running(apart(), slots=2)
    alive = queue.parts[1]
    for at in range(3):
        queue.enqueue("echo", at)
    until(lambda: alive.stats()["completed"] == 3)
    servers[0].start()
    queue = apart()
    jobs = [queue.enqueue("echo", at) for at in range(2)]
    until(lambda: {found.status for job in jobs if (found := queue.get(job.id))} == {"completed"})
    assert running.end("drain") == 0
