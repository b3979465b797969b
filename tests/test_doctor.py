"""The checks of doctor on healthy and broken servers, and its output on the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from client import Client, running
from conftest import RedisServer, Server, check_consistency, dump, find_lost, free_port, lapse, newest, put, raw, until
from cutproxy import CutProxy

import handlers
import worker
from tinyqueue import Filter, Queue, QueueFull, Unavailable
from tinyqueue_config import Settings
from tinyqueue_doctor import Finding, examine, warnings
from tinyqueue_repair import find_broken, repair
from tinyqueue_shards import Shards
from wsgi import API

NEEDED = 19


def findings(queue: Queue, connections: int = NEEDED) -> dict[str, Finding]:
    return {finding.about: finding for finding in examine(queue, connections)}


@pytest.fixture
def own(start_redis: Callable[..., RedisServer]) -> Iterator[Queue]:
    """A queue on a healthy real server that no other test uses."""
    queue = Queue.from_url(start_redis("--appendonly", "yes").url)
    yield queue
    queue.pool.disconnect()


def as_user(queue: Queue, *rules: str) -> Queue:
    """Return the same queue, opened by a user with these ACL rules."""
    raw(queue).execute_command("ACL", "SETUSER", "app", "reset", "on", ">secret", *rules)
    return Queue.from_url(f"redis://app:secret@127.0.0.1:{queue.pool.connection_kwargs['port']}/0")


# Healthy --------------------------------------------------------------------------------------------------------------


def test_doctor_finds_nothing_wrong_with_a_healthy_server(own: Queue) -> None:
    own.register(["default"], 1)
    found = findings(own)
    assert [finding for finding in found.values() if (finding.level, finding.advice) != ("ok", "")] == []
    assert set(found) >= {"transport", "reachable", "clock", "permissions", "writes", "server", "eviction", "memory"}
    assert set(found) >= {"role", "persistence", "connections", "idle timeout", "counts", "workers"}
    version = raw(own).info("server")["redis_version"]
    assert version in found["server"].seen


def test_doctor_changes_nothing(queue: Queue) -> None:
    for status in ("completed", "failed", "delayed", "processing"):
        put(queue, status, queue=status)
    before = dump(queue)
    assert findings(queue)["counts"].level == "ok"
    after = dump(queue)
    assert after == before
    queue.enqueue("echo", 1)  # no connection was left inside a MULTI


# Broken ---------------------------------------------------------------------------------------------------------------


def test_doctor_reports_an_unreachable_server() -> None:
    [transport, away] = examine(Queue.from_url(f"redis://:s3cret@127.0.0.1:{free_port()}/0"), NEEDED)
    assert transport.level == "ok"
    assert (away.level, away.about) == ("fail", "reachable")
    assert "REDIS_URL" in away.advice
    assert "s3cret" not in f"{away}"


def test_doctor_reports_a_wrong_password(own: Queue) -> None:
    raw(own).config_set("requirepass", "another")
    queue = Queue.from_url(f"redis://:s3cret@127.0.0.1:{own.pool.connection_kwargs['port']}/0")
    found = findings(queue)["reachable"]
    assert (found.level, "refused" in found.seen, "password" in found.advice) == ("fail", True, True)


@pytest.mark.parametrize(
    ("address", "level", "seen"),
    [
        ("127.0.0.1", "ok", "without a password"),
        ("0.0.0.0", "warn", "without a password"),
        (":s3cret@0.0.0.0", "ok", "with a password"),
    ],
)
def test_doctor_judges_the_password_by_who_can_reach_redis(own: Queue, address: str, level: str, seen: str) -> None:
    if "@" in address:
        raw(own).config_set("requirepass", "s3cret")
    queue = Queue.from_url(f"redis://{address}:{own.pool.connection_kwargs['port']}/0")
    found = findings(queue)["password"]
    queue.pool.disconnect()
    assert (found.level, found.seen) == (level, seen)
    assert ("requirepass" in found.advice) == (level == "warn")


@pytest.mark.parametrize(
    ("settings", "about", "level"),
    [
        ({"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"}, "eviction", "warn"),
        ({"maxmemory": "100mb", "maxmemory-policy": "volatile-ttl"}, "eviction", "warn"),
        ({"maxmemory": "0", "maxmemory-policy": "allkeys-lru"}, "eviction", "ok"),
        ({"maxmemory": "100mb"}, "memory", "ok"),
        ({"appendonly": "no", "save": ""}, "persistence", "warn"),
        ({"appendonly": "no", "save": "60 1"}, "persistence", "warn"),
        ({"maxclients": str(NEEDED)}, "connections", "ok"),
        ({"maxclients": str(NEEDED - 1)}, "connections", "warn"),
        ({"timeout": "300"}, "idle timeout", "ok"),
    ],
)
def test_doctor_judges_a_setting_of_redis(own: Queue, settings: dict[str, str], about: str, level: str) -> None:
    for name, value in settings.items():
        raw(own).config_set(name, value)
    found = findings(own)[about]
    assert found.level == level
    assert bool(found.advice) == (level != "ok")


@pytest.mark.parametrize(("share", "level"), [(0.5, "ok"), (0.85, "warn"), (0.97, "fail")])
def test_doctor_judges_the_memory_in_use(own: Queue, share: float, level: str) -> None:
    fill(own, share)
    assert findings(own)["memory"].level == level


def test_doctor_reports_a_disk_that_cannot_be_written(start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis("--dbfilename", "snapshot")
    queue = Queue.from_url(server.url)
    (server.folder / "snapshot").mkdir()  # instead of the file, so that even root cannot write it
    raw(queue).config_set("save", "60 1")
    raw(queue).bgsave()
    until(lambda: raw(queue).info("persistence")["rdb_last_bgsave_status"] == "err")
    found = findings(queue)
    assert (found["persistence"].level, found["writes"].level) == ("fail", "fail")
    raw(queue).config_set("save", "")  # or it would save before it ends
    queue.pool.disconnect()


def test_doctor_reports_a_replica(own: Queue) -> None:
    raw(own).execute_command("REPLICAOF", "127.0.0.1", free_port())
    found = findings(own)
    assert found["role"].level == "fail"
    assert (found["writes"].level, "replica" in found["writes"].advice) == ("fail", True)


def test_doctor_reports_missing_permissions_of_commands(own: Queue) -> None:
    app = as_user(own, "~{queue}:*", "+@all", "-lpos", "-blpop")
    found = findings(app)["permissions"]
    assert (found.level, found.seen) == ("fail", "refused: BLPOP, LPOS")
    raw(own).execute_command(*found.advice.split())
    assert findings(app)["permissions"].level == "ok"
    app.pool.disconnect()


@pytest.mark.parametrize("rules", [["~{queue}:*"], ["+@all"]], ids=["no commands", "no keys"])
def test_doctor_advises_the_rules_that_a_user_needs(own: Queue, rules: list[str]) -> None:
    app = as_user(own, *rules)
    found = findings(app)["permissions"]
    assert found.level == "fail"
    # More than once, because without MULTI the other commands cannot be tried.
    while (found := findings(app)["permissions"]).level == "fail":
        before = found
        raw(own).execute_command(*found.advice.split())
        assert findings(app)["permissions"] != before
    assert (found.level, findings(app)["counts"].level) == ("ok", "ok")
    app.pool.disconnect()


def test_doctor_warns_of_a_user_without_info(own: Queue) -> None:
    app = as_user(own, "~{queue}:*", "+@all", "-info")
    found = findings(app)
    assert (found["permissions"].level, found["server"].level, found["counts"].level) == ("warn", "warn", "ok")
    app.pool.disconnect()


def test_doctor_reports_lost_keys(own: Queue) -> None:
    own.enqueue("echo", 1)
    assert findings(own)["counts"].level == "ok"
    raw(own).delete(own.keys.jobs("default"))
    assert findings(own)["counts"].level == "fail"


def test_doctor_reports_a_key_of_the_wrong_type(own: Queue) -> None:
    own.enqueue("echo", 1)
    raw(own).delete(own.keys.jobs("default"))
    raw(own).set(own.keys.jobs("default"), "1")
    found = findings(own)
    assert (found["counts"].level, found["workers"].about) == ("fail", "workers")


def test_doctor_warns_when_no_worker_is_alive(queue: Queue) -> None:
    worker = queue.register(["default"], 1)
    assert findings(queue)["workers"].level == "ok"
    lapse(queue, worker)
    found = findings(queue)["workers"]
    assert (found.level, found.seen, found.advice) == ("warn", "0 alive", "start one: tinyqueue worker")


def test_doctor_warns_of_a_paused_queue(queue: Queue) -> None:
    queue.pause("mail")
    found = findings(queue)["queue"]
    assert (found.level, found.seen, found.advice) == ("warn", "mail is paused", "tinyqueue resume mail")


def test_doctor_warns_of_a_queue_without_a_worker(queue: Queue) -> None:
    queue.enqueue("echo", 1, queue="mail")
    assert "queue" not in findings(queue)  # there is no worker at all, which has its own finding
    queue.register(["default"], 1)
    found = findings(queue)["queue"]
    assert (found.level, found.seen) == ("warn", "mail: 1 pending, no worker serves it")
    queue.register(["mail"], 1)
    assert "queue" not in findings(queue)


# Warnings -------------------------------------------------------------------------------------------------------------


def test_warnings_name_an_eviction_policy(own: Queue) -> None:
    assert warnings(own) == []
    raw(own).config_set("maxmemory", "100mb")
    raw(own).config_set("maxmemory-policy", "allkeys-lru")
    [warning] = warnings(Queue(own.pool))
    assert "allkeys-lru" in warning
    assert "noeviction" in warning


@pytest.mark.parametrize(("share", "text"), [(0.7, ""), (0.9, "above 95%, new jobs"), (0.98, ": new jobs are refused")])
def test_warnings_name_memory_that_is_nearly_used_up(own: Queue, share: float, text: str) -> None:
    fill(own, share)
    found = Client(API(Settings(), Queue(own.pool))).get("/ready").json["warnings"]
    assert [warning.startswith("Redis uses ") and text in warning for warning in found] == [True] * bool(text)


def fill(queue: Queue, share: float) -> None:
    raw(queue).setrange("ballast", 50_000_000, "x")  # much more than a connection takes
    raw(queue).config_set("maxmemory", int(raw(queue).info("memory")["used_memory"] / share))


def test_doctor_tells_full_memory_from_missing_permissions(own: Queue) -> None:
    own.register(["default"], 1)
    fill(own, 1.02)
    found = {about: finding for about, finding in findings(own).items() if finding.level != "ok"}
    assert found.keys() == {"writes", "memory"}
    assert "new jobs are refused" in found["memory"].advice


def test_purge_and_trim_make_room_when_memory_is_full(own: Queue) -> None:
    ended = [put(own, status, queue=status) for status in ("completed", "failed", "cancelled", "completed")]
    fill(own, 1.02)
    with pytest.raises(Unavailable, match="purge ended jobs") as caught:
        own.enqueue("echo", 1)
    assert caught.value.reason == "full"
    assert [own.purge(Filter(status))["purged"] for status in ("failed", "cancelled")] == [1, 1]
    own.clock.ahead = max(own.keep_ms.values()) + 1000
    assert own.trim() == 2
    own.clock.ahead = 0
    assert [own.get(job.id) for job in ended] == [None] * 4
    raw(own).config_set("maxmemory", 0)
    check_consistency(own)


def test_cancel_when_memory_is_full_is_refused_and_changes_nothing(own: Queue) -> None:
    job = put(own, "pending")
    before = own.get(job.id)
    fill(own, 1.02)
    with pytest.raises(Unavailable) as caught:
        own.cancel(job.id)
    assert caught.value.reason == "full"
    assert own.get(job.id) == before
    raw(own).config_set("maxmemory", 0)
    own.cancel(job.id)
    check_consistency(own)


def test_purge_leaves_a_revived_job_alone_when_memory_is_full(own: Queue) -> None:
    job = put(own, "failed")
    own.retry(job.id)
    fill(own, 1.02)
    assert own.forget("failed", [job.id.encode()]) == 0
    assert own.get(job.id)


def test_metrics_expose_the_memory_in_use_even_when_it_is_full(own: Queue) -> None:
    fill(own, 1.02)
    text = Client(API(Settings(), Queue(own.pool))).get("/metrics").body.decode()
    [value] = re.findall("^tinyqueue_redis_memory_ratio (.+)$", text, re.M)
    assert 1.01 < float(value) < 1.05


def test_warnings_are_empty_without_info(own: Queue) -> None:
    raw(own).config_set("maxmemory", "100mb")
    raw(own).config_set("maxmemory-policy", "allkeys-lru")
    app = as_user(own, "~{queue}:*", "+@all", "-info", "-config")
    assert warnings(app) == []
    assert warnings(Queue.from_url(f"redis://127.0.0.1:{free_port()}/0")) == []
    app.pool.disconnect()


def test_enqueue_without_info_does_not_count_as_trouble(own: Queue) -> None:
    """A missing INFO must not be trouble, after which workers do not reap for one lease."""
    app = as_user(own, "~{queue}:*", "+@all", "-info")
    before = app.last_trouble
    app.enqueue("echo", 1)
    assert app.last_trouble == before
    app.pool.disconnect()


def test_ready_returns_the_warnings(own: Queue) -> None:
    assert Client(API(Settings(), own)).get("/ready").json == {"status": "ok", "warnings": []}
    raw(own).config_set("maxmemory", "100mb")
    raw(own).config_set("maxmemory-policy", "allkeys-lru")
    answer = Client(API(Settings(), Queue(own.pool))).get("/ready")
    assert answer.status == 200
    assert [("allkeys-lru" in warning) for warning in answer.json["warnings"]] == [True]


@pytest.fixture
def evicting(start_redis: Callable[..., RedisServer]) -> str:
    """The URL of a Redis that may evict jobs."""
    return start_redis("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru").url


def test_web_logs_the_warnings_at_its_start(evicting: str, tmp_path: Path) -> None:
    with running(tmp_path, REDIS_URL=evicting) as process:
        assert process.log.read_text().count("maxmemory-policy is allkeys-lru") == 1


def test_worker_logs_the_warnings_at_its_start(evicting: str) -> None:
    done = run_worker(evicting, "--burst")
    assert done.returncode == 0
    assert done.stderr.count("maxmemory-policy is allkeys-lru") == 1


# At the command line --------------------------------------------------------------------------------------------------


def run_worker(url: str, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, worker.__file__, *options]
    environ = {"PATH": os.environ["PATH"], "REDIS_URL": url} | environ
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=False)


def test_doctor_prints_a_line_for_each_finding(real: Server) -> None:
    done = run_worker(real.url, "doctor")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == len(examine(real.queue(), NEEDED))
    assert all(line.split()[0] in ("ok", "warn") for line in lines)
    assert "warn  workers       0 alive -> start one: tinyqueue worker" in lines


def test_doctor_prints_json(real: Server) -> None:
    done = run_worker(real.url, "doctor", "--json")
    found = {finding["about"]: finding for finding in json.loads(done.stdout)}
    assert found["workers"] == {
        "about": "workers",
        "level": "warn",
        "seen": "0 alive",
        "advice": "start one: tinyqueue worker",
    }


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_doctor_exits_with_1_if_something_fails(options: tuple[str, ...]) -> None:
    done = run_worker(f"redis://:s3cret@127.0.0.1:{free_port()}/0", "doctor", *options)
    assert (done.returncode, done.stderr) == (1, "")
    assert "fail" in done.stdout
    assert "s3cret" not in done.stdout


def test_doctor_counts_the_connections_of_the_settings(real: Server) -> None:
    small, large = (
        run_worker(real.url, "doctor", WEB_CONCURRENCY=web, WORKER_CONCURRENCY="1").stdout for web in ("1", "3")
    )
    one = Settings(worker_concurrency=1)
    assert f"open up to {one.web_connections + one.worker_connections}\n" in small
    assert f"open up to {3 * one.web_connections + one.worker_connections}\n" in large


# Repair ---------------------------------------------------------------------------------------------------------------


def changes(queue: Queue) -> list[str]:
    return [finding.seen for finding in repair([queue])]


def test_repair_changes_nothing_that_is_right(queue: Queue) -> None:
    for status in ("completed", "failed", "cancelled", "delayed", "processing", "pending"):
        put(queue, status, queue=status)
    before = dump(queue)
    assert changes(queue) == []
    assert dump(queue) == before


def test_repair_counts_again_after_records_were_lost(server: Server, queue: Queue) -> None:
    limited = server.queue(max_pending=3)
    jobs = limited.enqueue_many("echo", range(3))
    raw(queue).delete(*(queue.keys.job(job.id) for job in jobs))
    with pytest.raises(QueueFull):
        limited.enqueue("echo", 4)
    assert changes(queue) == ["3 entries without a job dropped", "pending:default counted again: it was 3, and is 0"]
    limited.enqueue("echo", 4)
    check_consistency_but_metrics(queue)


def check_consistency_but_metrics(queue: Queue) -> None:
    """Check the consistency after records were lost, whose ends no metric counts."""
    raw(queue).delete(queue.keys.metrics)
    for id in (job.id for job in newest(queue, "pending")):
        queue.cancel(id)
    raw(queue).delete(queue.keys.metrics)
    check_consistency(queue)


@pytest.mark.parametrize("status", ["pending", "delayed", "processing"])
def test_repair_lists_a_job_whose_list_was_lost(queue: Queue, status: str) -> None:
    job = put(queue, status)
    raw(queue).delete(queue.keys.jobs("default"), queue.keys.delayed, queue.keys.proc(job.worker))
    assert changes(queue) == ["1 job listed again"]
    queue.clock.ahead += 61_000
    queue.promote()
    if status == "processing":
        queue.complete(job)
    else:
        worker = queue.register(["default"], 1)
        queue.complete(queue.dequeue(worker, ["default"])[0])
    assert queue.get(job.id).status == "completed"


def test_repair_returns_a_job_whose_worker_and_list_were_lost(queue: Queue) -> None:
    job = put(queue, "processing")
    raw(queue).delete(queue.keys.proc(job.worker), queue.keys.workers)
    assert changes(queue) == ["1 job listed again"]
    lapse(queue, job.worker)
    assert [queue.reap(worker) for worker in find_lost(queue)] == [1]
    assert queue.get(job.id).status == "pending"


def test_repair_finds_the_list_of_a_worker_that_is_in_no_set(queue: Queue) -> None:
    job = put(queue, "processing")
    raw(queue).delete(queue.keys.workers)
    lapse(queue, job.worker)
    assert find_lost(queue) == []
    assert changes(queue) == ["1 list of an unknown worker found"]
    assert [queue.reap(worker) for worker in find_lost(queue)] == [1]
    assert queue.get(job.id).status == "pending"


def test_repair_counts_again_after_the_counts_were_lost(queue: Queue) -> None:
    put(queue, "completed")
    put(queue, "pending", queue="a")
    put(queue, "processing", queue="b")
    totals = raw(queue).hget(queue.keys.counts, "completed")
    raw(queue).delete(queue.keys.counts)
    raw(queue).hset(queue.keys.counts, mapping={"completed": totals, "pending:b": "nonsense", "pending:c": "-2"})
    repair([queue])
    assert {name: (row["pending"], row["processing"]) for name, row in queue.queues().items()} == {
        "a": (1, 0),
        "b": (0, 1),
    }


def test_repair_counts_a_submit_once_whose_cut_connection_delivered_late(
    near: Queue, far: Queue, proxy: CutProxy
) -> None:
    proxy.hold(b"MSETNX")
    far.enqueue("echo", 1)
    proxy.deliver()
    worker = near.register(["default"], 2)
    [job] = near.dequeue(worker, ["default"], 2)
    near.complete(job)
    assert near.stats()["pending"] == 1
    assert changes(near) == ["pending:default counted again: it was 1, and is 0"]
    assert near.stats()["pending"] == 0
    raw(near).delete(near.keys.metrics)  # which counted the submit twice, too


def test_repair_drops_entries_of_ended_jobs_that_were_lost(queue: Queue) -> None:
    job = put(queue, "completed")
    raw(queue).delete(queue.keys.job(job.id))
    assert changes(queue) == ["1 entry without a job dropped"]
    assert queue.stats()["completed"] == 0
    raw(queue).delete(queue.keys.metrics)


def test_repair_does_not_count_a_queue_whose_jobs_change_meanwhile(
    real: Server, near: Queue, far: Queue, proxy: CutProxy
) -> None:
    near.enqueue("echo", 1)
    near.enqueue("echo", 1, queue="other")
    raw(near).hincrby(near.keys.counts, "pending:default", 5)
    raw(near).hincrby(near.keys.counts, "pending:other", 5)
    proxy.before(b"STRLEN", lambda: near.enqueue("echo", 2))
    assert [(finding.level, finding.seen) for finding in repair([far])] == [
        ("ok", "pending:other counted again: it was 6, and is 1"),
        ("warn", "jobs of queue default changed while they were counted"),
    ]
    assert changes(near) == ["pending:default counted again: it was 7, and is 2"]


def test_repair_counts_again_when_another_queue_changes_at_the_last_moment(
    near: Queue, far: Queue, proxy: CutProxy
) -> None:
    near.enqueue("echo", 1)
    raw(near).hincrby(near.keys.counts, "pending:default", 5)
    proxy.before(b"HDEL", lambda: near.enqueue("echo", 2, queue="other"))
    assert changes(far) == ["pending:default counted again: it was 6, and is 1"]


def test_find_broken_returns_a_shard_once_in_ten_minutes(server: Server) -> None:
    shards = Shards([server.queue(namespace=f"queue.{at}") for at in range(2)])
    shards.enqueue_many("echo", range(2))
    assert find_broken(shards) == []
    [broken] = [part for part in shards.parts if part.stats()["pending"]]
    raw(broken).delete(broken.keys.jobs("default"))
    assert find_broken(shards) == [broken]
    assert find_broken(shards) == []
    assert [finding.seen for finding in repair([broken])] == ["2 jobs listed again"]


def test_worker_repairs_by_itself_after_keys_were_lost(real: Server, queue_at: Callable[..., Queue]) -> None:
    queue = real.queue()
    handlers.send_email.enqueue(queue, handlers.SendEmail("user@example.com", "a", "b"))
    gone = handlers.send_email.enqueue(queue, handlers.SendEmail("user@example.com", "a", "b"))
    raw(queue).delete(queue.keys.jobs("default"), queue.keys.job(gone.id))
    process = subprocess.Popen(
        [sys.executable, worker.__file__],
        env={"PATH": os.environ["PATH"], "REDIS_URL": real.url},
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: queue.stats()["completed"] == 1 and queue.stats()["pending"] == 0)
    process.terminate()
    log = process.communicate(timeout=30)[1]
    assert log.count("repaired after keys were lost: 1 job listed again") == 1


def test_doctor_repairs_on_request_at_the_command_line(real: Server) -> None:
    queue = real.queue()
    queue.enqueue("echo", 1)
    raw(queue).delete(queue.keys.jobs("default"))
    broken = run_worker(real.url, "doctor")
    assert broken.returncode == 1
    assert "then run tinyqueue doctor --repair" in broken.stdout
    repaired = run_worker(real.url, "doctor", "--repair")
    assert (repaired.returncode, repaired.stderr) == (0, "")
    assert repaired.stdout.splitlines()[0] == "ok    repair        1 job listed again"
    again = run_worker(real.url, "doctor", "--repair")
    assert again.stdout.splitlines()[0] == "ok    repair        nothing to repair"


def test_taking_an_id_without_a_job_logs_one_warning(queue: Queue, caplog: pytest.LogCaptureFixture) -> None:
    jobs = queue.enqueue_many("echo", range(3)) + queue.enqueue_many("echo", range(2), delay=60)
    raw(queue).delete(*(queue.keys.job(job.id) for job in jobs))
    worker = queue.register(["default"], 9)
    assert queue.dequeue(worker, ["default"], 9) == []
    queue.clock.ahead += 61_000
    assert queue.promote() == 2
    assert [line.partition(",")[0].rpartition(" ")[2] for line in caplog.messages] == ["3", "2"]
    changes(queue)
    raw(queue).delete(queue.keys.metrics)
