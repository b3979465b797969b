"""Failover: Redis behind sentinels, and replicas that must have a job before it is accepted."""

from __future__ import annotations

import itertools
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis
from client import Client
from conftest import REDIS, RedisServer, check_consistency, follow_jobs, newest, threads_since, until
from cutproxy import CutProxy
from test_processes import HANDLERS, ROOT, Process, Web, environment

from tinyqueue import NotReplicated, Queue, SettingsError, Unavailable, handler
from tinyqueue_config import Settings, open_queue
from tinyqueue_doctor import Observer
from tinyqueue_redis import FOLLOW_EVERY, connect
from wsgi import API

SERVICE = "jobs"

pytestmark = pytest.mark.usefixtures("no_handlers")


class SentinelServer(RedisServer):
    """A sentinel, which stores its state in a configuration file."""

    @property
    def command(self) -> list[str]:
        return [str(REDIS), str(self.folder / "sentinel.conf"), "--sentinel"]

    def watch(self, master: RedisServer, *more: str) -> None:
        """Start monitoring a master. It counts as down after a second without an answer."""
        lines = [f"port {self.port}", "bind 127.0.0.1", f"dir {self.folder}", "logfile redis.log", *more]
        lines += [
            f"sentinel monitor {SERVICE} 127.0.0.1 {master.port} 2",
            f"sentinel down-after-milliseconds {SERVICE} 1000",
        ]
        lines += [f"sentinel failover-timeout {SERVICE} 3000"]
        (self.folder / "sentinel.conf").write_text("\n".join(lines))
        self.start()


class Monitored(NamedTuple):
    """A master with replicas, three sentinels that monitor them, and the URL for clients."""

    master: RedisServer
    replicas: list[RedisServer]
    sentinels: list[SentinelServer]
    url: str

    @property
    def named(self) -> int:
        """The port of the present master according to a sentinel."""
        with redis.Redis(port=self.sentinels[0].port, protocol=2) as client:
            return int(client.sentinel_get_master_addr_by_name(SERVICE)[1])

    @property
    def replaced(self) -> bool:
        return self.named != self.master.port


@pytest.fixture
def replicated(start_redis: Callable[..., RedisServer]) -> Callable[[int], tuple[RedisServer, list[RedisServer]]]:
    """Start a master with replicas that are in sync with it."""

    def start(count: int) -> tuple[RedisServer, list[RedisServer]]:
        options = ["--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1"]
        master = start_redis(*options)
        replicas = [start_redis(*options, "--replicaof", "127.0.0.1", str(master.port)) for _ in range(count)]
        until(lambda: count_online(master) == count)
        with redis.Redis(port=master.port) as client:
            client.flushall()
            until(lambda: client.wait(count, 1000) == count)  # the first acknowledgement may take long
        return master, replicas

    return start


def echo(payload: int) -> int:
    return payload


def count_online(master: RedisServer) -> int:
    with redis.Redis(port=master.port) as client:
        info = client.info("replication")
    return sum(value.get("state") == "online" for name, value in info.items() if name.startswith("slave"))


@pytest.fixture
def monitored(
    replicated: Callable[[int], tuple[RedisServer, list[RedisServer]]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Monitored]:
    """A master with two replicas and three sentinels that know all of them."""
    master, replicas = replicated(2)
    sentinels = [SentinelServer(tmp_path_factory.mktemp("sentinel")) for _ in range(3)]
    try:
        for sentinel in sentinels:
            sentinel.watch(master)
        until(lambda: all(knows_all(sentinel) for sentinel in sentinels), timeout=60)
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
        yield Monitored(master, replicas, sentinels, f"redis+sentinel://{hosts}/{SERVICE}/0")
    finally:
        for sentinel in sentinels:
            sentinel.kill()


def knows_all(sentinel: SentinelServer) -> bool:
    with redis.Redis(port=sentinel.port, protocol=2) as client:
        state = client.sentinel_masters()[SERVICE]
    return bool(state["num-slaves"] == state["num-other-sentinels"] == 2)


class Service(NamedTuple):
    """A web and a worker process."""

    web: Web
    worker: Process
    folder: Path

    def runs(self) -> set[int]:
        """Return the payloads of the jobs that have run."""
        file = self.folder / "runs"
        return {int(line.removeprefix("echo ")) for line in file.read_text().splitlines()} if file.exists() else set()


@contextmanager
def service(folder: Path, **environ: str) -> Iterator[Service]:
    """Run a web and a worker process in a folder of their own."""
    (folder / "handlers.py").write_text(HANDLERS)
    web = Web(folder, [sys.executable, str(ROOT / "wsgi.py")], environment(**environ))
    worker = Process(folder, [sys.executable, str(ROOT / "worker.py")], environment(**environ))
    try:
        yield Service(web, worker, folder)
    finally:
        web.kill()
        worker.kill()


class Load:
    """Submits jobs from threads, and records the payload and the time of each accepted job."""

    def __init__(self, web: Web, threads: int = 3) -> None:
        self.accepted: list[tuple[float, int]] = []
        self.refused: list[tuple[int, Any]] = []
        self._web = web
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._submit, args=(n,)) for n in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)

    def _submit(self, thread: int) -> None:
        payload = thread * 1_000_000
        while not self._over.wait(0.01):
            payload += 1
            delay = 3 if payload % 2 else 0  # so that some jobs are delayed when the failure happens
            body = {"type": "echo", "payload": payload, "delay": delay}
            status, answer = self._web.call("POST", "/jobs", body)
            if status == 201:
                self.accepted.append((time.monotonic(), payload))
            else:
                self.refused.append((status, answer))

    def wait_for_accepted(self, more: int) -> None:
        before = len(self.accepted)
        until(lambda: len(self.accepted) >= before + more, timeout=60)

    @property
    def longest_pause(self) -> float:
        """The longest time in seconds between two accepted jobs."""
        times = [at for at, _ in self.accepted]
        return max(b - a for a, b in itertools.pairwise(times))

    def assert_all_run(self, service: Service) -> None:
        accepted = {payload for _, payload in self.accepted}
        until(lambda: accepted <= service.runs(), timeout=60)


# Replicas -------------------------------------------------------------------------------------------------------------

Replicated = Callable[[int], tuple[RedisServer, list[RedisServer]]]
ECHO = {"type": "echo", "payload": 1}


@contextmanager
def stopped(server: RedisServer) -> Iterator[None]:
    """Pause a server process for the duration of the block."""
    assert server.process
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


def test_submit_returns_when_enough_replicas_have_the_jobs(replicated: Replicated, queue_at: Any) -> None:
    master, replicas = replicated(2)
    queue = queue_at(master.url, min_replicas=2)
    for _ in range(20):
        jobs = queue.enqueue_many("echo", range(3))
        for replica in replicas:
            with redis.Redis(port=replica.port) as client:
                assert client.exists(*(queue.keys.job(job.id) for job in jobs)) == 3
    check_consistency(queue)


def test_submit_raises_but_stores_the_job_when_too_few_replicas_have_it(replicated: Replicated, queue_at: Any) -> None:
    queue = queue_at(replicated(1)[0].url, min_replicas=2)
    with pytest.raises(NotReplicated, match="stored and will run, but only 1 of 2 replicas") as caught:
        queue.enqueue("echo", 1)
    assert newest(queue, "pending") == caught.value.jobs
    [job] = queue.dequeue(queue.register(["default"], 1), ["default"])
    queue.complete(job)
    check_consistency(queue)


def test_submit_answers_503_when_too_few_replicas_have_the_job(replicated: Replicated, queue_at: Any) -> None:
    queue = queue_at(replicated(1)[0].url, min_replicas=2)
    api = Client(API(Settings(), queue))
    handler("echo")(echo)
    one = api.post("/jobs", ECHO)
    many = api.post("/jobs/batch", [ECHO, ECHO])
    for answer in (one, many):
        assert (answer.status, answer.kind, answer.headers["retry-after"]) == (503, "not-replicated", "5")
    reported = [*one.problem["jobIds"], *many.problem["jobIds"]]
    assert one.problem["jobId"] == reported[0]
    assert sorted(reported) == sorted(job.id for job in newest(queue, "pending"))


def test_submit_again_with_the_same_key_waits_for_the_replicas_again(replicated: Replicated, queue_at: Any) -> None:
    master, [replica] = replicated(1)
    queue = queue_at(master.url, min_replicas=1)
    api = Client(API(Settings(), queue))
    handler("echo")(echo)
    with stopped(replica):
        answers = [api.post("/jobs", ECHO, {"Idempotency-Key": "k"}) for _ in range(2)]
    assert [(answer.status, answer.kind) for answer in answers] == [(503, "not-replicated")] * 2
    answer = until(lambda: (again := api.post("/jobs", ECHO, {"Idempotency-Key": "k"})).status == 200 and again)
    assert answer.headers["idempotency-replayed"] == "true"
    assert [answer.json["jobId"]] * 2 == [answer.problem["jobId"] for answer in answers]
    check_consistency(queue)


@pytest.mark.parametrize("lost", ["drop_reply", "drop_request"])
def test_submit_stores_a_job_once_and_waits_for_replicas_when_a_reply_is_lost(
    replicated: Replicated, queue_at: Any, lost: str
) -> None:
    master, [replica] = replicated(1)
    near = queue_at(master.url)
    with CutProxy(master.port) as proxy, stopped(replica):
        far = queue_at(proxy.url, min_replicas=1)
        far.ping()
        getattr(proxy, lost)(b"WAIT")
        with pytest.raises(NotReplicated) as caught:
            far.enqueue("echo", 1)
        assert proxy.idle
    assert newest(near, "pending") == caught.value.jobs
    check_consistency(near)


def test_submit_without_jobs_does_not_wait_for_replicas(replicated: Replicated, queue_at: Any) -> None:
    assert queue_at(replicated(0)[0].url, min_replicas=1).enqueue_many("echo", []) == []


def test_refuse_min_replicas_without_redis_url() -> None:
    with pytest.raises(SettingsError, match="TINYQUEUE_MIN_REPLICAS"):
        open_queue(Settings(min_replicas=1))


# Sentinels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_connect_reads_every_part_of_a_sentinel_url(scheme: str) -> None:
    url = f"{scheme}+sentinel://me:p%40ss%2C@one:1,[::1]:2,three/my%2Fjobs/4?sentinel_username=s&sentinel_password=t%26"
    pool: Any = connect(url, connections=7)
    assert (pool.service_name, pool.max_connections, pool.is_master) == ("my/jobs", 7, True)
    options = pool.connection_kwargs
    assert [options[name] for name in ("username", "password", "db", "protocol")] == ["me", "p@ss,", 4, 2]
    places = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]
    assert [(place["host"], place["port"]) for place in places] == [("one", 1), ("::1", 2), ("three", 26379)]
    assert [(place["username"], place["password"]) for place in places] == [("s", "t&")] * 3
    assert all(place["socket_timeout"] < options["socket_timeout"] for place in places)
    pools = [pool, pool.sentinel_manager.sentinels[0].connection_pool]
    tls = [issubclass(made.connection_class, redis.SSLConnection) for made in pools]
    assert tls == [scheme == "rediss"] * 2


def test_connect_sends_the_password_of_the_sentinels(start_redis: Any, tmp_path: Path, queue_at: Any) -> None:
    master = start_redis("--requirepass", "m@ster")
    sentinel = SentinelServer(tmp_path)
    sentinel.watch(master, "requirepass s3ntinel")
    try:
        url = f"redis+sentinel://:m%40ster@127.0.0.1:{sentinel.port}/{SERVICE}"
        queue_at(url + "?sentinel_password=s3ntinel").ping()
        for wrong in (url, url + "?sentinel_password=s3cret"):
            with pytest.raises(Unavailable, match=r"a sentinel refused the connection: .+sentinel_password=") as caught:
                queue_at(wrong).ping()
            assert caught.value.reason == "refused"
            assert not re.search("[<>]|s3cret|m@ster", str(caught.value))
    finally:
        sentinel.kill()


def test_report_unreachable_when_the_sentinels_know_no_master(monitored: Monitored, queue_at: Any) -> None:
    with pytest.raises(Unavailable) as caught:
        queue_at(monitored.url.replace(SERVICE, "others")).ping()
    assert (
        str(caught.value)
        == "Redis is unavailable (unreachable): no sentinel names the master: no master is named others"
    )


def test_connect_when_only_one_sentinel_is_alive(monitored: Monitored, queue_at: Any) -> None:
    for sentinel in monitored.sentinels[:2]:
        sentinel.kill()
    assert queue_at(monitored.url).enqueue("echo", 1)


def kill(monitored: Monitored) -> None:
    monitored.master.kill()


def hang(monitored: Monitored) -> None:
    assert monitored.master.process
    monitored.master.process.send_signal(signal.SIGSTOP)


@pytest.mark.parametrize("fail", [kill, hang])
def test_lose_no_job_when_sentinels_replace_a_failed_master(
    monitored: Monitored, tmp_path: Path, fail: Callable[[Monitored], None]
) -> None:
    with service(tmp_path, REDIS_URL=monitored.url, TINYQUEUE_MIN_REPLICAS="1") as service_:
        with Load(service_.web) as load:
            load.wait_for_accepted(50)
            fail(monitored)
            until(lambda: monitored.replaced)
            load.wait_for_accepted(50)
        assert load.longest_pause < 15
        load.assert_all_run(service_)


def test_lose_no_fully_replicated_job_in_a_requested_failover(monitored: Monitored, tmp_path: Path) -> None:
    """Sentinels do not wait for clients: a job that only the other replica has would be lost."""
    with service(tmp_path, REDIS_URL=monitored.url, TINYQUEUE_MIN_REPLICAS="2") as service_:
        with Load(service_.web) as load:
            load.wait_for_accepted(50)
            with redis.Redis(port=monitored.sentinels[0].port) as client:
                client.sentinel_failover(SERVICE)
            until(lambda: monitored.replaced)
            with redis.Redis(port=monitored.master.port) as client:
                client.replicaof("127.0.0.1", monitored.named)  # the sentinels do this as well, but later
            load.wait_for_accepted(50)
        load.assert_all_run(service_)


def test_follow_the_sentinels_in_a_requested_failover(monitored: Monitored, tmp_path: Path, queue_at: Any) -> None:
    """The old master accepts writes for ten seconds more, and all of them are lost."""
    with service(tmp_path, REDIS_URL=monitored.url) as service_, Load(service_.web) as load:
        load.wait_for_accepted(50)
        with redis.Redis(port=monitored.sentinels[0].port) as client:
            client.sentinel_failover(SERVICE)
        until(lambda: monitored.replaced)
        named = time.monotonic()
        load.wait_for_accepted(200)
        until(lambda: time.monotonic() > named + 3)
    queue = queue_at(monitored.url)
    lost = missing(queue, load)
    window = max(lost) - min(lost) if lost else 0.0
    print(f"{len(lost)} of {len(load.accepted)} accepted jobs were lost within {window:.2f} s")
    assert all(at < named + FOLLOW_EVERY + 0.5 for at in lost), f"jobs were lost up to {max(lost) - named:.2f} s later"


def test_verdict_names_the_time_without_a_master_and_then_goes_on(monitored: Monitored, queue_at: Any) -> None:
    queue = queue_at(monitored.url)
    queue.register(["default"], 1)

    def checks() -> set[str]:
        return {problem.check for problem in Observer(queue).problems()} - {"persistence"}

    assert checks() == set()
    monitored.master.kill()
    assert "redis" in checks()
    until(lambda: monitored.replaced and "redis" not in checks(), timeout=60)


def missing(queue: Queue, load: Load) -> list[float]:
    """Return when the jobs were accepted that the present master does not have."""
    payloads = set()
    cursor = "9999999999999999.g"
    while cursor:
        jobs, cursor = queue.page(limit=1000, cursor=cursor)
        payloads |= {job.payload for job in jobs}
    return [at for at, payload in load.accepted if payload not in payloads]


def test_drop_connections_to_the_old_master_when_the_sentinels_name_another(
    monitored: Monitored, queue_at: Any
) -> None:
    queue = queue_at(monitored.url, connections=2)
    for _ in range(3):  # more often than there are connections: none may be leaked
        queue.enqueue("echo", 1)
        with redis.Redis(port=monitored.sentinels[0].port) as client:
            old = client.sentinel_get_master_addr_by_name(SERVICE)[1]
            until(lambda: failover(client), timeout=60)
            until(lambda: client.sentinel_get_master_addr_by_name(SERVICE)[1] != old)  # noqa: B023 - called at once
        until(lambda: queue.ping() or queue.pool.master_address[1] != old)  # noqa: B023
        job = queue.enqueue("echo", 2)
        with redis.Redis(port=queue.pool.master_address[1]) as client:
            assert client.exists(queue.keys.job(job.id))


def test_limits_parents_callbacks_and_schedules_work_behind_sentinels(monitored: Monitored, queue_at: Any) -> None:
    queue = queue_at(monitored.url)
    follow_jobs(queue)
    monitored.master.kill()
    until(lambda: monitored.replaced, timeout=30)
    until(lambda: available(queue), timeout=30)
    follow_jobs(queue_at(monitored.url, namespace="after"))


def available(queue: Queue) -> bool:
    with suppress(Unavailable):
        queue.ping()
        return True
    return False


def failover(client: redis.Redis) -> bool:
    """Request a failover; False if the sentinel is not ready for another."""
    try:
        return bool(client.execute_command("SENTINEL", "FAILOVER", SERVICE))
    except redis.ResponseError:
        return False


# POST /work -----------------------------------------------------------------------------------------------------------


def test_work_behind_sentinels_finds_the_next_master_and_leaves_no_threads(
    monitored: Monitored,
) -> None:
    @handler("echo")
    def echo(payload: object) -> object:
        return payload

    settings = Settings(redis_url=monitored.url, shards=3)
    queue = open_queue(settings)
    api = Client(API(settings, queue))

    def work() -> int:
        queue.enqueue_many("echo", range(6))
        return api.call("POST", "/work").json["completed"]

    def left() -> list[threading.Thread]:
        queue.disconnect()
        return threads_since(before)

    before = threading.enumerate()
    assert [work() for _ in range(5)] == [6] * 5
    until(lambda: not left(), timeout=30)
    monitored.master.kill()
    until(lambda: monitored.replaced, timeout=30)
    until(lambda: api.get("/ready").status == 200, timeout=30)
    assert work() == 6
    assert queue.workers() == []
    until(lambda: not left(), timeout=30)
