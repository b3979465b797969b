"""A queue in a Redis Cluster. All its keys are on one node, which may change at any moment."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import PORTS, NoBar, RedisServer, check_consistency, follow_jobs, free_port, newest, put, until
from redis.crc import key_slot
from test_availability import Load, service, stopped

import tinyqueue_reading
from tinyqueue import Outcome, Unavailable, handler
from tinyqueue_backup import BackupError, back_up, restore
from tinyqueue_config import Settings
from tinyqueue_doctor import Observer
from tinyqueue_shards import Shards
from worker import Worker

DEFAULT = ["default"]
SLOTS = 16384


def cluster_port() -> int:
    """Return a free port low enough for its bus port, which is 10,000 higher."""
    return free_port([port for port in PORTS if port + 10_000 in PORTS])


class Node(RedisServer):
    """A node of a cluster."""

    def __init__(self, folder: Path) -> None:
        options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--repl-diskless-sync-delay", "0"]
        super().__init__(folder, *options, "--cluster-replica-validity-factor", "0", "--appendonly", "yes")
        self.port = cluster_port()
        self.url = f"redis://127.0.0.1:{self.port}"

    def ask(self, *command: Any) -> Any:
        with redis.Redis(port=self.port) as client:
            return client.execute_command(*command)

    @property
    def id(self) -> str:
        return str(self.ask("CLUSTER MYID").decode())


class Cluster:
    """Three masters, each with a replica."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes

    def build(self) -> None:
        for epoch, node in enumerate(self.nodes, 1):
            node.start()
            node.ask("CLUSTER SET-CONFIG-EPOCH", epoch)
            node.ask("CLUSTER MEET", "127.0.0.1", self.nodes[0].port)
        masters = self.nodes[:3]
        replicas = self.nodes[3:]
        for at, master in enumerate(masters):
            master.ask("CLUSTER ADDSLOTS", *range(SLOTS * at // 3, SLOTS * (at + 1) // 3))
        until(lambda: all(self._known(node) == len(self.nodes) for node in self.nodes))
        for master, replica in zip(masters, replicas, strict=True):
            replica.ask("CLUSTER REPLICATE", master.id)
        until(lambda: all(replica.ask("INFO", "replication")["master_link_status"] == "up" for replica in replicas))
        until(lambda: all(node.ask("CLUSTER INFO")["cluster_state"] == "ok" for node in self.nodes))
        until(lambda: all(len(row) == 4 for node in self.nodes for row in self._slots(node)))

    def repair(self) -> None:
        """Start the dead nodes, wait until each master has a replica again, and delete all data."""
        for node in self.nodes:
            if not node.process:
                node.start()
        until(lambda: all(len(row) == 4 for node in self.nodes for row in self._slots(node)), timeout=60)
        until(lambda: all(node.ask("CLUSTER INFO")["cluster_state"] == "ok" for node in self.nodes), timeout=60)
        for node in self.masters:
            node.ask("FLUSHALL")

    @property
    def masters(self) -> list[Node]:
        return [node for node in self.nodes if node.process and node.ask("ROLE")[0] == b"master"]

    def move(self, source: Node, target: Node, tag: str = "queue") -> None:
        """Move the slot of a namespace and its keys to another node."""
        slot = key_slot(tag.encode())
        target.ask("CLUSTER SETSLOT", slot, "IMPORTING", source.id)
        source.ask("CLUSTER SETSLOT", slot, "MIGRATING", target.id)
        while keys := source.ask("CLUSTER GETKEYSINSLOT", slot, 10):
            source.ask("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for node in (target, source, *self.masters):
            node.ask("CLUSTER SETSLOT", slot, "NODE", target.id)

    def _known(self, node: Node) -> int:
        with redis.Redis(port=node.port) as client:
            return sum(
                "handshake" not in known["flags"] and known["connected"] for known in client.cluster("NODES").values()
            )

    def _slots(self, node: Node) -> Any:
        connection = redis.Connection(port=node.port, protocol=2)
        connection.connect()
        connection.send_command("CLUSTER", "SLOTS")
        found = connection.read_response()
        connection.disconnect()
        return found

    def owner(self, tag: str = "queue", but: Node | None = None) -> Node:
        """Wait until the live nodes agree who owns the slot of a namespace, and return that node.

        `but` is not asked, because it cannot answer.
        """

        def agreed() -> Node | None:
            named = {self._owner_according_to(node, tag) for node in self.nodes if node.process and node is not but}
            return next((node for node in self.nodes if {node.port} == named), None)

        return until(agreed)

    def _owner_according_to(self, node: Node, tag: str) -> int:
        slot = key_slot(tag.encode())
        return next((row[2][1] for row in self._slots(node) if row[0] <= slot <= row[1]), 0)

    def others(self, tag: str = "queue") -> list[Node]:
        owner = self.owner(tag)
        return [master for master in self.masters if master is not owner]


@pytest.fixture(scope="module")
def built(start_redis: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster for all tests of this module. `start_redis` skips them without a redis-server."""
    cluster = Cluster([Node(tmp_path_factory.mktemp("node")) for _ in range(6)])
    try:
        cluster.build()
        yield cluster
    finally:
        for node in cluster.nodes:
            node.kill()


@pytest.fixture
def cluster(built: Cluster) -> Cluster:
    """The cluster, complete and empty."""
    built.repair()
    return built


def test_every_verb_works_through_every_node(cluster: Cluster, queue_at: Any) -> None:
    for node in cluster.nodes:
        queue = queue_at(node.url)
        for status in ("pending", "processing", "completed", "failed", "cancelled"):
            put(queue, status, queue=status)
        queue.take(queue.register(DEFAULT, 1), DEFAULT, 1)
        queue.wait(DEFAULT, 0.01)
        assert queue.stats()["workers"] > 0
        assert not {problem.check for problem in Observer(queue).problems()} & {"redis", "counts"}
        check_consistency(queue)
        assert queue.pool.place == ("127.0.0.1", cluster.owner().port)


@pytest.mark.usefixtures("no_handlers")
def test_worker_keeps_to_limits_while_the_slot_moves(cluster: Cluster, queue_at: Any) -> None:
    now: list[int] = []
    seen: list[int] = []

    @handler("one", max_running=1)
    def one(payload: int) -> None:
        now.append(payload)
        seen.append(len(now))
        now.remove(payload)

    queue = queue_at(cluster.nodes[0].url)
    jobs = queue.enqueue_many("one", list(range(200)))
    running = Worker(queue, Settings(worker_concurrency=4))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        until(lambda: len(seen) > 20)
        owner = cluster.owner()
        cluster.move(owner, next(node for node in cluster.masters if node is not owner))
        until(lambda: queue.stats()["completed"] == len(jobs), timeout=60)
    finally:
        running.stop("release")
        thread.join(20)
    assert set(seen) == {1}
    assert [job.status for job in newest(queue, "completed", 500)] == ["completed"] * len(jobs)
    check_consistency(queue)


def test_limits_parents_callbacks_and_schedules_work_in_a_cluster(
    cluster: Cluster, queue_at: Any, no_handlers: None
) -> None:
    follow_jobs(queue_at(cluster.others()[0].url))


@pytest.mark.parametrize("shard", range(4))
def test_namespace_is_stored_on_the_owner_of_its_slot(cluster: Cluster, queue_at: Any, shard: int) -> None:
    namespace = f"queue.{shard}"
    queue = queue_at(cluster.nodes[0].url, namespace=namespace)
    job = queue.enqueue("echo", 1)
    assert queue.pool.place == ("127.0.0.1", cluster.owner(namespace).port)
    assert cluster.owner(namespace).ask("EXISTS", queue.keys.job(job.id)) == 1


def test_restore_brings_all_shards_of_a_cluster_back(cluster: Cluster, queue_at: Any, tmp_path: Path) -> None:
    def shards() -> Shards:
        return Shards([queue_at(node.url, namespace=f"queue.{at}") for at, node in enumerate(cluster.others())])

    file = str(tmp_path / "backup")
    jobs = [shards().enqueue("echo", at) for at in range(30)]
    back_up(shards(), file, NoBar())
    for node in cluster.masters:
        node.ask("FLUSHALL")
    restore(shards(), file, NoBar())
    assert [queue.get(job.id) for queue in [shards()] for job in jobs] == jobs


def test_backup_while_the_slot_moves_is_refused(cluster: Cluster, queue_at: Any, tmp_path: Path) -> None:
    """The cursor with which one node returns all keys means nothing to another."""

    class Move(NoBar):
        def update(self, n_steps: int, /) -> None:
            cluster.move(cluster.owner(), cluster.others()[0])

    queue = queue_at(cluster.nodes[0].url)
    queue.enqueue("echo", 1)
    with pytest.raises(BackupError, match="another one has taken over"):
        back_up(queue, str(tmp_path / "backup"), Move())


def test_follow_a_moved_slot_within_one_call(cluster: Cluster, queue_at: Any) -> None:
    source = cluster.owner()
    target = cluster.others()[0]
    queue = queue_at(source.url)
    first = queue.enqueue("echo", 1)
    before = queue.last_trouble
    cluster.move(source, target)
    second = queue.enqueue("echo", 2)
    assert queue.last_trouble > before, "the reaper must know about the interruption"
    assert [job.id for job in queue.dequeue(queue.register(DEFAULT, 1), DEFAULT, 9)] == [first.id, second.id]
    assert queue.pool.place == ("127.0.0.1", target.port)
    check_consistency(queue)


def test_exchange_follows_a_moved_slot_and_keeps_the_order_of_queues(
    cluster: Cluster, queue_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_reading, "PAUSE_AGE", 3600.0)  # the exchange is the first to ask the wrong node
    source = cluster.owner()
    queue = queue_at(source.url)
    names = ["high", "low"]
    worker = queue.register(names, 2)
    for name in names * 2:  # two of each, so that the series of the metrics are known
        queue.enqueue("echo", name, queue=name)
    running = queue.dequeue(worker, names, 2)
    outcomes = [Outcome(job, "complete") for job in running]
    assert [job.queue for job in running] == ["high", "high"]
    third = queue.enqueue("echo", "high", queue="high")
    cluster.move(source, cluster.others()[0])
    lost, started = queue.exchange(worker, outcomes, names, 2, {job.id: job for job in running})
    assert (lost, started[0].id, [job.queue for job in started]) == ([], third.id, ["high", "low"])
    assert queue.adopt(worker, [job.id for job in started]) == []
    check_consistency(queue)


def test_report_busy_and_store_nothing_while_the_slot_is_moving(cluster: Cluster, queue_at: Any) -> None:
    source = cluster.owner()
    target = cluster.others()[0]
    queue = queue_at(source.url)
    slot = key_slot(b"queue")
    job = queue.enqueue("echo", 1)
    target.ask("CLUSTER SETSLOT", slot, "IMPORTING", source.id)
    source.ask("CLUSTER SETSLOT", slot, "MIGRATING", target.id)
    try:
        for act in (lambda: queue.enqueue("echo", 2), lambda: queue.get(queue.draft("echo", 3).id)):
            with pytest.raises(Unavailable) as caught:
                act()
            assert (caught.value.reason, caught.value.doubtful) == ("busy", False)
        assert queue.get(job.id) == job
    finally:
        cluster.move(source, target)
    assert [found.id for found in newest(queue, "pending")] == [job.id]
    check_consistency(queue)


def test_lose_no_job_when_the_slot_moves_under_load(cluster: Cluster, queue_at: Any, tmp_path: Path) -> None:
    with service(tmp_path, REDIS_URL=cluster.nodes[0].url) as service_:
        with Load(service_.web) as load:
            for target in (cluster.others()[0], cluster.others()[1]):
                load.wait_for_accepted(50)
                cluster.move(cluster.owner(), target)
            load.wait_for_accepted(50)
        load.assert_all_run(service_)
    queue = queue_at(cluster.nodes[0].url)
    until(lambda: queue.stats()["pending"] == queue.stats()["processing"] == 0)
    check_consistency(queue)


def test_ask_the_node_of_the_url_when_all_known_nodes_are_gone(cluster: Cluster, queue_at: Any) -> None:
    queue = queue_at(cluster.others()[0].url)
    queue.pool.nodes = frozenset({("127.0.0.1", free_port())})  # as if all others had been replaced
    queue.pool.move_to(*next(iter(queue.pool.nodes)))
    with suppress(Unavailable):
        queue.ping()
    queue.ping()
    assert queue.pool.place == ("127.0.0.1", cluster.owner().port)


@contextmanager
def dead(node: RedisServer) -> Iterator[None]:
    """Kill a node, and restart it after the block."""
    node.kill()
    yield
    node.start()


@pytest.mark.parametrize("fail", [dead, stopped])
def test_lose_no_job_when_a_failed_owner_is_replaced(cluster: Cluster, tmp_path: Path, fail: Any) -> None:
    owner = cluster.owner()
    with service(tmp_path, REDIS_URL=owner.url, TINYQUEUE_MIN_REPLICAS="1") as service_:
        with Load(service_.web) as load:
            load.wait_for_accepted(50)
            with fail(owner):
                until(lambda: cluster.owner(but=owner) is not owner)
                until(lambda: "not-replicated" in str(load.refused[-1:]))  # the new owner has no replica yet
            load.wait_for_accepted(50)
        assert load.longest_pause < 20
        load.assert_all_run(service_)


def calls(node: Node) -> int:
    return int(node.ask("INFO", "stats")["total_commands_processed"])


def test_shards_spread_the_load_over_the_masters(cluster: Cluster, tmp_path: Path) -> None:
    before = {master: calls(master) for master in cluster.masters}
    with (
        service(tmp_path, REDIS_URL=cluster.nodes[0].url, TINYQUEUE_SHARDS="12") as service_,
        Load(service_.web) as load,
    ):
        load.wait_for_accepted(100)
        until(lambda: load.accepted[-1][1] in service_.runs())
    done = [calls(master) - before[master] for master in before]
    assert min(done) > max(done) / 10, f"commands of each master: {done}"


def test_shards_keep_working_and_lose_no_job_while_one_master_is_dead(cluster: Cluster, tmp_path: Path) -> None:
    owner = cluster.owner("queue.0")
    settings = {"TINYQUEUE_SHARDS": "6", "TINYQUEUE_MIN_REPLICAS": "1"}
    with service(tmp_path, REDIS_URL=cluster.nodes[0].url, **settings) as service_:
        with Load(service_.web) as load:
            load.wait_for_accepted(50)
            with dead(owner):
                load.wait_for_accepted(50)
                until(lambda: cluster.owner("queue.0", but=owner) is not owner)
            load.wait_for_accepted(100)
        assert load.longest_pause < 20
        load.assert_all_run(service_)
