"""Redis as hosts offer it: few connections, idle time-outs, own certificates, ACL users."""

from __future__ import annotations

import http.client
import inspect
import json
import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from client import Process, running
from conftest import NoBar, RedisServer, Server, free_port, lapse, newest, raw, until

import tinyqueue
import tinyqueue_schedule
import worker
from tinyqueue import (
    Failure,
    Filter,
    Job,
    NotReplicated,
    Once,
    Outcome,
    Override,
    Queue,
    Unavailable,
    Verbs,
    handler,
)
from tinyqueue_backup import back_up, restore
from tinyqueue_config import Settings, open_queue
from tinyqueue_doctor import COMMANDS, OLDEST, examine
from tinyqueue_log import JobLog
from tinyqueue_reading import Reading
from tinyqueue_repair import repair
from wsgi import ROUTES

README = Path(tinyqueue.__file__).parent / "README.md"
DEPLOY = README.parent / "docs" / "deploy.md"
HANDLERS = """
import os, time
from tinyqueue import Job, handler

@handler("echo")
def echo(payload: int, job: Job) -> int:
    job.set_progress(0.5)
    return payload

@handler("gate")
def gate(name: str) -> str:
    open(name + ".begun", "w").close()
    while not os.path.exists(name):
        time.sleep(0.01)
    return name
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The working directory of the processes, with the handlers in it."""
    (tmp_path / "handlers.py").write_text(HANDLERS)
    return tmp_path


@contextmanager
def working(folder: Path, url: str, *options: str, **environ: str) -> Iterator[Path]:
    """Run a worker until the block ends, and check its exit code. Yields the path of its log."""
    log = folder / "worker.log"
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder), "REDIS_URL": url} | environ
    with log.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, worker.__file__, *options], cwd=folder, env=environ, stderr=stderr)
    try:
        until(lambda: "worker started" in log.read_text())
        yield log
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def command(folder: Path, url: str, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run worker.py to its end."""
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder), "REDIS_URL": url} | environ
    line = [sys.executable, worker.__file__, *options]
    return subprocess.run(line, cwd=folder, env=environ, capture_output=True, text=True, timeout=30, check=False)


def call(web: Process, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    with closing(http.client.HTTPConnection(*web.address, timeout=20)) as connection:
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if "json" in str(answer.getheader("Content-Type")) else text


def post(web: Process, payload: int) -> tuple[int, Any]:
    return call(web, "POST", "/jobs", {"type": "echo", "payload": payload})


def clients(queue: Queue) -> set[str]:
    """Return the ids of all connections of Redis, except the one that asks."""
    client = raw(queue)
    own = client.client_id()
    return {about["id"] for about in client.client_list() if about["id"] != str(own)}


def complaints(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if " INFO " not in line]


# Few connections ------------------------------------------------------------------------------------------------------


def test_web_and_worker_need_no_more_than_20_connections(
    start_redis: Callable[..., RedisServer], queue_at: Any, folder: Path
) -> None:
    server = start_redis("--maxclients", "20")
    queue = queue_at(server.url)
    settings = Settings(worker_concurrency=10)
    highest = [0]
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            highest[0] = max(highest[0], raw(queue).info("clients")["connected_clients"])

    with running(folder, REDIS_URL=server.url) as web, working(folder, server.url, "--concurrency", "10") as log:
        with ThreadPoolExecutor(51) as pool:
            watching = pool.submit(watch)
            answers = list(pool.map(lambda n: post(web, n), range(1000)))
            over.set()
            watching.result(20)
        assert {status for status, _ in answers} == {201}
        until(lambda: queue.stats()["completed"] == 1000)
        assert (complaints(web.log), complaints(log)) == ([], [])
    assert highest[0] - 1 <= settings.web_connections + settings.worker_connections <= 19
    assert raw(queue).info("stats")["rejected_connections"] == 0


def test_processes_log_how_many_connections_they_may_open(
    start_redis: Callable[..., RedisServer], folder: Path
) -> None:
    url = start_redis().url
    settings = Settings(worker_concurrency=2)
    with running(folder, REDIS_URL=url) as web, working(folder, url, "--concurrency", "2") as log:
        assert f"up to {settings.web_connections} connections" in web.log.read_text()
        assert f"up to {settings.worker_connections} connections" in log.read_text()


def test_refused_connections_lose_no_job(start_redis: Callable[..., RedisServer], folder: Path, queue_at: Any) -> None:
    server = start_redis()
    admin = redis.Redis(port=server.port)
    job = queue_at(server.url).enqueue("gate", "a")
    with running(folder, REDIS_URL=server.url) as web, working(folder, server.url) as log:
        until((folder / "a.begun").exists)
        admin.config_set("maxclients", 1)
        admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        (folder / "a").touch()
        status, problem = post(web, 1)
        assert (status, problem["reason"]) == (503, "unreachable")
        assert "max number of clients" in problem["detail"]
        until(lambda: "cannot save outcomes" in log.read_text())
        admin.config_set("maxclients", 20)
        assert post(web, 1)[0] == 201
        queue = queue_at(server.url)
        until(lambda: queue.stats()["completed"] == 2)
    admin.close()
    done = queue.get(job.id)
    assert done
    assert (done.status, done.attempts) == ("completed", 1)


# Idle connections -----------------------------------------------------------------------------------------------------


def test_idle_connections_closed_by_redis_are_replaced_quietly(
    start_redis: Callable[..., RedisServer], queue_at: Any, folder: Path
) -> None:
    server = start_redis("--timeout", "1")
    queue = queue_at(server.url)
    with running(folder, REDIS_URL=server.url) as web:
        before = clients(queue)
        assert post(web, 1)[0] == 201
        opened = clients(queue) - before
        assert opened
        with working(folder, server.url) as log:
            until(lambda: not opened & clients(queue))
            assert post(web, 2)[0] == 201
            until(lambda: queue.stats()["completed"] == 2)
        assert (complaints(web.log), complaints(log)) == ([], [])


# TLS ------------------------------------------------------------------------------------------------------------------

TRUSTED = {
    "not checked": ("", {"TINYQUEUE_TLS_VERIFY": "0"}),
    "authority in the URL": ("?ssl_ca_certs=ca.pem", {}),
    "not checked, in the URL": ("?ssl_cert_reqs=none", {}),
}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the certificate of an unknown authority, and that of 127.0.0.1 with its key."""
    folder = tmp_path_factory.mktemp("tls")
    new = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN={} -keyout {}.key -out {}.pem "
    issuer = "-addext keyUsage=critical,keyCertSign,cRLSign"  # which Python 3.13 requires
    chain = "-CA ca.pem -CAkey ca.key -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE"
    try:
        for line in (new.format("authority", "ca", "ca") + issuer, new.format("redis", "redis", "redis") + chain):
            subprocess.run(line.split(), cwd=folder, capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("needs openssl to make certificates")
    return folder


@pytest.fixture(scope="module")
def encrypted(start_redis: Callable[..., RedisServer], authority: Path) -> str:
    """The URL of a Redis with TLS, whose chain of certificates is self-signed."""
    port = free_port()
    files = {"cert": "redis.pem", "key": "redis.key", "ca-cert": "ca.pem"}
    options = [part for name, file in files.items() for part in (f"--tls-{name}-file", str(authority / file))]
    start_redis("--tls-port", str(port), "--tls-auth-clients", "no", *options)
    return f"rediss://127.0.0.1:{port}/0"


@pytest.mark.parametrize("how", TRUSTED)
def test_tls_serves_web_worker_and_commands(encrypted: str, authority: Path, folder: Path, how: str) -> None:
    query, environ = TRUSTED[how]
    url = encrypted + query.replace("ca.pem", str(authority / "ca.pem"))
    with running(folder, REDIS_URL=url, **environ) as web, working(folder, url, **environ) as log:
        status, answer = post(web, 7)
        assert status == 201
        until(lambda: '"completed"' in command(folder, url, "get", "--json", answer["jobId"], **environ).stdout)
        warnings = [text.count("TINYQUEUE_TLS_VERIFY=0") for text in (web.log.read_text(), log.read_text())]
    assert warnings == [len(environ)] * 2  # once in each log, and only if it is set
    examined = command(folder, url, "doctor", **environ)
    assert examined.returncode == 0
    level, seen = ("ok", "verified") if "ca_certs" in query else ("warn", "not verified")
    assert f"{level:<5} transport     TLS, certificate {seen}" in examined.stdout


def test_tls_with_an_unknown_authority_fails_and_names_the_setting(encrypted: str, folder: Path) -> None:
    failed = command(folder, encrypted, "stats")
    assert failed.returncode == 1
    [line] = failed.stderr.splitlines()
    assert line.startswith("Error: Redis is unavailable (unreachable): ")
    assert line.endswith("?ssl_ca_certs=/path/to/ca.pem to REDIS_URL, or set TINYQUEUE_TLS_VERIFY=0")
    with running(folder, REDIS_URL=encrypted) as web, working(folder, encrypted) as log:
        status, problem = post(web, 1)
        assert status == 503
        assert "TINYQUEUE_TLS_VERIFY=0" in problem["detail"]
        until(lambda: "cannot take jobs: Redis is unavailable (unreachable)" in log.read_text())
        assert "TINYQUEUE_TLS_VERIFY=0" in complaints(log)[0]
        assert "Traceback" not in log.read_text() + web.log.read_text()
    assert command(folder, encrypted, "doctor").returncode == 1


def test_tls_refuses_a_host_that_the_certificate_does_not_name(encrypted: str, authority: Path, folder: Path) -> None:
    url = encrypted.replace("127.0.0.1", "localhost") + f"?ssl_ca_certs={authority / 'ca.pem'}"
    failed = command(folder, url, "stats")
    assert failed.returncode == 1
    assert "TINYQUEUE_TLS_VERIFY=0" in failed.stderr


def test_doctor_suggests_rediss_for_a_tls_server(encrypted: str, folder: Path) -> None:
    examined = command(folder, encrypted.replace("rediss:", "redis:"), "doctor")
    assert examined.returncode == 1
    assert "whether it needs rediss://" in examined.stdout


# Users with few permissions -------------------------------------------------------------------------------------------

SINCE = {  # the version of Redis that introduced each command the queue uses
    "1.0.0": "DEL EXISTS EXPIRE GET INCR INFO LINDEX LLEN LPUSH LRANGE LREM LTRIM MGET RPUSH SADD SET SMEMBERS SREM "
    "SCARD SISMEMBER",
    "1.0.1": "MSET MSETNX",
    "1.0.5": "ZRANGEBYSCORE",
    "1.2.0": "EXEC MULTI RPOPLPUSH ZADD ZCARD ZRANGE ZREM ZREMRANGEBYSCORE ZSCORE",
    "2.0.0": "BLPOP HDEL HGETALL HINCRBY HMGET HSET HSETNX ZCOUNT ZRANK",
    "2.2.0": "PERSIST STRLEN UNWATCH WATCH ZREVRANGEBYSCORE",
    "2.6.0": "PEXPIRE PTTL TIME",
    "2.8.0": "SCAN",
    "3.0.0": "WAIT",
    "6.0.6": "LPOS",
}
USED = {name: since for since, names in SINCE.items() for name in names.split()}


def granted() -> list[str]:
    """Return the ACL rules in docs/deploy.md."""
    [line] = re.findall(r"^ *ACL SETUSER tinyqueue (.+)$", DEPLOY.read_text(), re.M)
    return str(line).split()


@pytest.fixture
def admin(start_redis: Callable[..., RedisServer]) -> Iterator[redis.Redis]:
    """A client that may do everything, on a server of its own that has the documented user."""
    client = redis.Redis(port=start_redis().port, protocol=2)
    client.execute_command("ACL", "SETUSER", "tinyqueue", *granted())
    yield client
    client.close()


def url_of(admin: redis.Redis) -> str:
    [secret] = [rule[1:] for rule in granted() if rule.startswith(">")]
    return f"redis://tinyqueue:{secret}@127.0.0.1:{admin.connection_pool.connection_kwargs['port']}/0"


class Noted:
    """A queue that records the names of the verbs that are called."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.names = set[str]()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self.queue, name)


VERBS = {
    name
    for name, made in {**vars(Verbs), **vars(Reading), **vars(Queue)}.items()
    if inspect.isfunction(made) and not name.startswith("_")
}


def play_counts(queue: Any) -> None:
    queue.metrics()
    queue.count_scrape_errors(1)
    queue.count_refused({"queue-full": 1})
    queue.count_failed_ticks({"nightly:Unavailable": 1})


def play_waiting(queue: Any) -> None:
    """Call every verb that waits for the end of a job."""
    waiting = newest(queue, "pending")[0].id
    ended = queue.cancel(queue.enqueue("echo", 8).id).id
    queue.wait_for(waiting, 0.05)
    assert queue.await_ends([waiting, ended]) == {ended}
    queue.leave_token("bell")
    assert queue.wait_for_end([waiting], 0.05, "bell") == "bell"
    queue.forget_awaited([waiting, ended])


def play_schedules(queue: Any) -> None:
    made = tinyqueue_schedule.make_schedule("nightly", "@daily", "echo", 7, unique_key="s")
    tinyqueue_schedule.put(queue, made)
    for change in ("pause", "resume", "run"):
        assert getattr(tinyqueue_schedule, change)(queue, "nightly")
    tinyqueue_schedule.list_schedules(queue)
    for part in queue.parts:
        part.clock.ahead += 86400_000
        tinyqueue_schedule.Ticker(part).tick()
        part.clock.ahead -= 86400_000
    for declared in ([made], []):
        tinyqueue_schedule.sync(queue, "code", declared)
    tinyqueue_schedule.remove(queue, "nightly")


def play_limits(queue: Any, folder: Path) -> None:
    @handler("limited", max_running=1, rate="9/second", queue="limited")
    def limited(payload: object) -> None: ...

    queue.enqueue_many("limited", [1, 2])
    worker = queue.register(["limited"], 2)
    [running] = queue.dequeue(worker, ["limited"], 2)
    [held] = [job for job in newest(queue, "pending") if job.type == "limited"]
    assert (queue.place_among_held(held), len(list(queue.read_held()))) == (1, 1)
    queue.set_limit("limited", Override(max_running=2))
    queue.limits_in_use()
    back_up(queue, str(folder / "backup"), NoBar())
    restore(queue, str(folder / "backup"), NoBar(), merge=True)
    queue.resume("limited")
    queue.set_limit("limited", Override())
    queue.settle(worker, [Outcome(running, "release", error=Failure("Slow", "no"), after=1, halt=True)])
    queue.deregister(worker)
    queue.change_many("cancel", Filter("pending", type="limited"))


def play_parents(queue: Any) -> None:
    parent = queue.enqueue("echo", 9)
    queue.cancel(queue.enqueue("echo", 9, after=[parent.id]).id)
    queue.cancel(parent.id)
    queue.retry(parent.id)
    queue.advance()


def play_operator(queue: Any) -> None:
    queue.cancel(queue.hasten(queue.enqueue("echo", 6, delay=60).id).id)
    ended = queue.cancel(queue.enqueue("echo", 6).id)
    queue.cancel(queue.replay(ended.id).id)
    queue.count(Filter(type="echo"))
    queue.failures(Filter("failed"))
    queue.purge_one(ended.id)
    for _ in range(2):
        queue.note_action("somebody", "purge", {"filter": {"status": "completed"}}, {"purged": 1})
    queue.audit()
    worker = queue.register(["default"], 1)
    queue.quiet(worker)
    queue.enqueue("echo", 6)
    queue.wait(["default"], 0.01, worker)
    queue.resume_worker(worker)
    queue.deregister(worker)


def play_log(queue: Any, job: Job) -> None:
    job.__dict__["_log"] = JobLog(job.attempts, job.started_at, None)
    job.log("working")
    queue.write_log(job)
    queue.write_progress(job)
    queue.read_log(job.id)
    queue.pending_among([job.id.encode()])
    queue.next_jobs({"default": job.id.encode()})


def play(queue: Any, folder: Path) -> None:
    """Call every verb of a queue, in each of the cases in which it writes something else."""
    queue.enqueue("echo", 0, max_attempts=1)
    queue.enqueue_many("echo", [1, 2, 3, 4], max_attempts=1)
    queue.submit([queue.draft("echo", 5, unique_key="u", delay=60)], once := Once("k", "f"))
    queue.submit([queue.draft("echo", 5, unique_key="u", delay=60)], once)
    id = queue.register(["default"], 3)
    queue.wait(["default"], 0.01)
    queue.waiting(["default"], due=True)
    completed, failed, released, stopped = queue.dequeue(id, ["default"], 4)
    queue.heartbeat(id, [completed.id])
    play_log(queue, completed)
    queue.cancel_requests([completed.id])
    queue.cancel(stopped.id)
    queue.complete(completed, 1)
    queue.fail(failed, Failure("Boom", "it broke"))
    queue.release(released)
    queue.release(stopped)
    queue.retry(failed.id)
    queue.change_many("cancel", Filter("pending"))
    queue.change_many("retry", Filter("cancelled"))
    queue.enqueue("echo", 6)
    [running] = queue.start(id, queue.take(id, ["default"], 1))
    queue.settle(id, [])
    queue.exchange(id, [Outcome(running, "complete")], ["default"], 1, {running.id: running})
    queue.adopt(id, [])
    queue.enqueue("echo", 6, delay=0.1)
    until(queue.promote)
    queue.trim()
    queue.purge(Filter("completed"))
    play_counts(queue)
    queue.lost_workers()
    queue.deregister(id)
    assert queue.reap(id) == 0
    other = queue.register(["default"], 1)
    queue.dequeue(other, ["default"], 1)
    lapse(queue, other)
    assert queue.reap(other) == 1
    queue.pause("default")
    queue.resume("default")
    newest(queue, "failed")
    queue.page(limit=1)
    queue.page(cursor="9999999999999999.g")
    queue.get(completed.id)
    for more in (play_waiting, play_operator, play_schedules, partial(play_limits, folder=folder), play_parents):
        more(queue)
    queue.spend("somebody", 1, 60)
    for look in ("queues", "stats", "scale", "workers", "now", "ping", "take_snapshot"):
        getattr(queue, look)()
    for report in ("recent", "times"):
        getattr(queue, report)(15)
    raw(queue).delete(queue.keys.counts, queue.keys.jobs("default"))
    assert [finding.seen for finding in repair(queue.parts)]


@pytest.mark.usefixtures("no_handlers")
def test_documented_user_may_do_all_that_the_queue_does(admin: redis.Redis, queue_at: Any, folder: Path) -> None:
    """Nor has it more permissions than needed: Redis counts the commands that are used."""
    url = url_of(admin)
    admin.config_resetstat()
    short = Noted(queue_at(url))
    short.queue.keep_ms = dict.fromkeys(short.queue.keep_ms, 0)
    play(noted := Noted(queue_at(url)), folder)
    assert noted.names >= VERBS - {
        "disconnect",
        "forget",
        "running",
        "is_quiet",
        "redraft",
        "count_unended",
        "change_schedule",
        "write_schedule",
        "queue_names",
        "read_entries",
        "read_jobs",
        "read_lists",
        "sync_schedules",
        "read_records",
        "restore",
        "part_of",
        "reap_in",
        "claim",
        "count_pending",
        "discard",
        "load",
    }  # these are called by other verbs, by the worker, or by backups
    short.trim()
    with pytest.raises(NotReplicated):
        queue_at(url, min_replicas=1).enqueue("echo", 8)
    settings = {"REDIS_URL": url, "TINYQUEUE_RATE_LIMIT": "99/hour", "TINYQUEUE_MAX_PENDING": "99"}
    with running(folder, **settings) as web, working(folder, url) as log:
        status, answer = post(web, 7)
        assert status == 201
        for method, route, *_ in ROUTES:
            path = route.replace("<id>", answer["jobId"]).replace("<name>", "default").replace("<limit>", "echo")
            other = (404,) if re.match("/(schedules|workers)/", path) else ()  # nothing has that name
            other = (201,) if path.endswith("/replay") else other
            method = "HEAD" if path == "/events" else method  # noqa: PLW2901 - the answer to GET does not end
            assert call(web, method, path, {})[0] in (200, 202, 409, 422, *other)
        until(lambda: short.stats()["pending"] == short.stats()["processing"] == 0)
        assert (complaints(web.log), complaints(log)) == ([], [])
    used = {
        name.removeprefix("cmdstat_").upper() for name, stats in admin.info("commandstats").items() if stats["calls"]
    }
    refused = {name for name, stats in admin.info("commandstats").items() if stats.get("rejected_calls")}
    own = {"AUTH", "CONFIG|RESETSTAT"}  # what every user may send, and what this test sends
    assert refused <= {"cmdstat_client|setinfo", "cmdstat_cluster|slots", "cmdstat_config|get"}  # all are optional
    assert used - own == set(USED)
    assert {rule[1:].upper() for rule in granted() if rule.startswith("+")} == set(USED)
    assert {name for names in COMMANDS.values() for name in names.split()} == set(USED)


def test_documented_user_may_touch_no_other_key(admin: redis.Redis, queue_at: Any) -> None:
    client = raw(queue_at(url_of(admin)))
    for words in (
        "GET other",
        "GET {queue",
        "GET {queuex.1}:counts",
        "SET {queue} 1",
        "KEYS *",
        "FLUSHALL",
        "CONFIG GET *",
        "EVAL 1 0",
        "PUBLISH a b",
        "ACL LIST",
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*words.split())


def test_submit_without_permission_to_wait_raises_not_replicated(admin: redis.Redis, queue_at: Any) -> None:
    admin.execute_command("ACL", "SETUSER", "tinyqueue", "-wait")
    queue = queue_at(url_of(admin), min_replicas=1)
    with pytest.raises(NotReplicated) as caught:
        queue.enqueue("echo", 1)
    assert newest(queue, "pending") == caught.value.jobs
    assert "refused: WAIT" in [finding.seen for finding in examine(queue, 0)]


def test_documented_user_may_use_shards(admin: redis.Redis) -> None:
    shards = open_queue(Settings(redis_url=url_of(admin), shards=3))
    job = shards.submit([shards.draft("echo", 1, unique_key="u")], Once("k", "f"))[0]
    worker = shards.register(["default"], 1)
    [started] = shards.dequeue(worker, ["default"])
    shards.complete(started)
    assert shards.get(job.id).status == "completed"  # type: ignore[union-attr]
    assert [finding.about for finding in examine(shards, 0) if finding.level == "fail"] == []
    shards.disconnect()


def test_documented_user_satisfies_doctor(admin: redis.Redis, queue_at: Any) -> None:
    found = examine(queue_at(url_of(admin)), 0)
    assert [finding.about for finding in found if finding.level != "ok"] == ["persistence", "workers"]


def test_commands_exist_in_the_oldest_supported_redis(admin: redis.Redis) -> None:
    def number(version: str) -> tuple[int, ...]:
        return tuple(map(int, version.split(".")))

    assert max(map(number, SINCE)) == OLDEST
    oldest = ".".join(map(str, OLDEST))
    assert f"TinyQueue needs Redis {oldest} or newer" in DEPLOY.read_text()
    assert f"Use Redis {oldest} or newer" in README.read_text()
    if number(admin.info("server")["redis_version"]) < (7,):
        pytest.skip("this Redis has no COMMAND DOCS")
    docs = iter(admin.execute_command("COMMAND DOCS", *USED))
    versions = {
        name.decode().upper(): about[about.index(b"since") + 1].decode() for name, about in zip(docs, docs, strict=True)
    }
    assert versions == USED


# A wrong REDIS_URL ----------------------------------------------------------------------------------------------------


@contextmanager
def speaking(words: bytes) -> Iterator[str]:
    """Listen on a port and say something to everybody who connects. Yields its URL for Redis."""

    class Talker(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(words)
            self.request.recv(4096)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Talker) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"redis://127.0.0.1:{server.server_address[1]}/0"
        server.shutdown()


NO_REDIS = "this is not a Redis; check the host and the port in REDIS_URL"
WRONG = {
    "HTTP": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "unreachable", NO_REDIS),
    "SSH": (b"SSH-2.0-OpenSSH_9.2p1\r\n", "unreachable", NO_REDIS),
    "protected mode": (
        b"-DENIED Redis is running in protected mode because x. In this mode y. Many more words.\r\n",
        "refused",
        "set a password or a user in Redis and in REDIS_URL, or connect from the same machine",
    ),
    "database": (b"", "refused", "check the number of the database in REDIS_URL"),
    "host": (b"", "unreachable", "the host name in REDIS_URL is not valid"),
}


@pytest.fixture(params=WRONG)
def wrong(request: pytest.FixtureRequest, real: Server) -> Iterator[tuple[str, str, str]]:
    """A wrong REDIS_URL, the reason that clients get, and the advice."""
    words, reason, advice = WRONG[request.param]
    if request.param == "database":
        yield real.url.removesuffix("/0") + "/99", reason, advice
    elif request.param == "host":
        yield f"redis://{'x' * 64}.example:6379", reason, advice
    else:
        with speaking(words) as url:
            yield url, reason, advice


def test_wrong_url_is_one_clear_line_in_web_worker_and_commands(folder: Path, wrong: tuple[str, str, str]) -> None:
    url, reason, advice = wrong
    done = command(folder, url, "stats")
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: Redis is unavailable ({reason}): ")
    assert done.stderr.endswith(f"{advice}\n")
    assert done.stderr.count("\n") == 1
    assert advice in command(folder, url, "doctor").stdout
    with running(folder, REDIS_URL=url) as web, working(folder, url) as log:
        for method, path in (("POST", "/jobs"), ("GET", "/ready"), ("GET", "/jobs"), ("GET", "/metrics")):
            status, problem = call(web, method, path, {"type": "echo", "payload": 1})
            assert (status, problem["reason"]) == (503, reason)
            assert problem["detail"].endswith(advice)
        until(lambda: f"cannot take jobs: Redis is unavailable ({reason}): " in log.read_text())
        assert "Traceback" not in log.read_text() + web.log.read_text()


def test_protected_mode_of_a_real_redis_is_a_refusal(start_redis: Callable[..., RedisServer], queue_at: Any) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but the loopback")
        address = probe.getsockname()[0]
    server = start_redis("--bind", "127.0.0.1", address, "--protected-mode", "yes")
    with pytest.raises(Unavailable, match="protected mode") as caught:
        queue_at(f"redis://{address}:{server.port}").ping()
    assert caught.value.reason == "refused"
