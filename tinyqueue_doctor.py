"""The checks of `doctor`, which examine what the queue depends on, and those of a verdict.

`examine` changes nothing. Errors of Redis become findings. An `Observer` says whether all is well,
as the dashboard, GET /verdict, `stats`, /ready and the alerts show it.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Literal, NamedTuple

import msgspec
import redis
from msgspec.structs import replace

from tinyqueue import (
    BUCKETS,
    ID,
    LIMIT,
    MEMORY_SHARE,
    NAME,
    SERIES,
    UNENDED,
    Queue,
    TinyQueueError,
    Unavailable,
    host_name,
    ids_in,
    read_count,
    read_workers,
)
from tinyqueue_config import plural
from tinyqueue_handler import rule_of
from tinyqueue_json import created_at
from tinyqueue_metrics import percentile
from tinyqueue_redis import ask_each, memory_use, pairs, parse_info, text_of
from tinyqueue_schedule import list_schedules, read_schedule
from tinyqueue_shards import AnyQueue

OLDEST = (6, 0, 6)  # version of Redis: the first with LPOS
SLOW = 10.0  # milliseconds to Redis and back; above this a worker spends its time waiting
LATE = 90_000  # milliseconds that a schedule may be overdue: workers look once a minute
SKEW = 2.0  # seconds between two clocks
COMMANDS = {  # every command that the queue uses, by how many arguments it needs at least
    0: "EXEC INFO MULTI TIME UNWATCH",
    1: "DEL EXISTS GET HGETALL INCR LLEN MGET PERSIST PTTL SCAN SCARD SMEMBERS STRLEN WATCH ZCARD",
    2: "BLPOP EXPIRE HDEL HMGET LINDEX LPOS LPUSH MSET MSETNX PEXPIRE RPOPLPUSH RPUSH SADD SET SISMEMBER SREM WAIT "
    "ZRANK ZREM ZSCORE",
    3: "HINCRBY HSET HSETNX LRANGE LREM LTRIM ZADD ZCOUNT ZRANGE ZRANGEBYSCORE ZREMRANGEBYSCORE ZREVRANGEBYSCORE",
}
REMEDIES = {
    "unreachable": "check that Redis runs there, that REDIS_URL names it, and whether it needs rediss://",
    "timeout": "check whether Redis is overloaded, or a firewall drops the packets",
    "loading": "wait until Redis has loaded its data",
    "full": "give Redis more memory, purge ended jobs (tinyqueue purge), or lower TINYQUEUE_KEEP_COMPLETED and "
    "TINYQUEUE_KEEP_FAILED",
    "read-only": "check whether REDIS_URL names a replica, and whether the disk of Redis is full",
    "refused": "check the user and the password in REDIS_URL, and the ACL of that user",
    "busy": "check the number of connections",
}
OTHER_REMEDY = "check that REDIS_URL names a Redis, and that nothing else writes to the queue's keys"


# Findings -------------------------------------------------------------------------------------------------------------

Level = Literal["ok", "warn", "fail"]


class Finding(msgspec.Struct, frozen=True):
    """The result of one check: its level, what was checked, what was seen and what to do."""

    level: Level
    about: str
    seen: str
    advice: str = ""


def _judge(about: str, seen: str, *cases: tuple[bool, Level, str]) -> Finding:
    """Return a finding with the level and advice of the first case that holds, or ok."""
    level, advice = next(((level, advice) for holds, level, advice in cases if holds), ("ok", ""))
    return Finding(level, about, seen, advice)


def warnings(queue: AnyQueue) -> list[str]:
    """Return what a process logs at its start: why Redis may refuse or lose jobs."""
    single = len(queue.parts) == 1  # then the process fails anyway if Redis is away
    found = [problem for problem in Observer(queue).problems() if problem.check in LOGGED]
    return [str(problem) for problem in found if not (single and problem.check == "redis")]


def examine(queue: AnyQueue, connections: int) -> list[Finding]:
    """Examine every shard. Equal findings of several shards are returned once.

    `connections` is how many the web processes and one worker may open together.
    """
    return list(dict.fromkeys(finding for part in queue.parts for finding in _examine(part, connections)))


def _examine(queue: Queue, connections: int) -> list[Finding]:
    found = [_transport(queue.pool)]
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "reachable": partial(_round_trip, queue),
        "password": partial(_password, queue.pool),
        "permissions": partial(_permissions, queue),
        "writes": partial(_writes, queue),
        "server": partial(_server, queue, connections),
        "counts": partial(_counts, queue),
        "workers": partial(_workers, queue),
        "schedules": partial(_schedules, queue),
    }
    for about, check in checks.items():
        try:
            found.extend(check())
        except TinyQueueError as error:
            reason = getattr(error, "reason", "")
            if reason == "full" and str(error) in {finding.seen for finding in found}:
                continue  # Redis refuses every transaction, even one that only reads
            found.append(Finding("fail", about, str(error), REMEDIES.get(reason, OTHER_REMEDY)))
            if reason in ("unreachable", "timeout", "loading"):
                break
    return found


# The connection -------------------------------------------------------------------------------------------------------


def _transport(pool: Any) -> Finding:
    host = str(pool.connection_kwargs.get("host", ""))
    if issubclass(pool.connection_class, redis.SSLConnection):
        verified = pool.connection_kwargs.get("ssl_cert_reqs") != "none"
        seen = f"TLS, certificate {'' if verified else 'not '}verified"
        advice = "add ?ssl_ca_certs=/path/to/ca.pem to REDIS_URL, and unset TINYQUEUE_TLS_VERIFY"
        return _judge("transport", seen, (not verified, "warn", advice))
    if not host:
        return Finding("ok", "transport", "within this machine")
    advice = "use rediss:// if others can read the traffic of that network"
    return _judge("transport", "not encrypted", (not _all_addresses(host, "is_private"), "warn", advice))


def _all_addresses(host: str, kind: str) -> bool:
    """Whether all addresses of a host are of that kind, such as is_private; also if it has none."""
    with suppress(OSError, ValueError):
        return all(getattr(ipaddress.ip_address(info[4][0]), kind) for info in socket.getaddrinfo(host, None))
    return True


def _password(pool: Any) -> Iterator[Finding]:
    """Warn if others than this machine reach a Redis that requires no password."""
    proofs = {"password": "with a password", "ssl_certfile": "with a client certificate"}
    seen = next((text for name, text in proofs.items() if pool.connection_kwargs.get(name)), "")
    host = str(pool.connection_kwargs.get("host", ""))
    advice = "set requirepass in Redis, or make a user (docs/deploy.md), and put the password into REDIS_URL"
    open_to_others = not seen and not _all_addresses(host or "localhost", "is_loopback")
    yield _judge("password", seen or "without a password", (open_to_others, "warn", advice))


def _round_trip(queue: Queue) -> Iterator[Finding]:
    times = []
    for _ in range(5):
        began = time.monotonic()
        seconds, micros = queue.store.read(("TIME",))[-1]
        times.append(1000 * (time.monotonic() - began))
    ahead = int(seconds) + int(micros) / 1e6 - time.time()
    seen = f"answers in {min(times):.2f} ms"
    yield _judge("reachable", seen, (min(times) > SLOW, "warn", "run the processes near Redis"))
    seen = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
    advice = "synchronise both by NTP: runAt and delays follow the clock of Redis"
    yield _judge("clock", seen, (abs(ahead) > SKEW, "warn", advice))


def _permissions(queue: Queue) -> Iterator[Finding]:
    """Queue every command in a MULTI that is never executed. Redis checks the permissions then."""
    key = queue.keys.promoter + ":none"
    around = ("WATCH", "UNWATCH", "MULTI", "EXEC")
    unused = around if queue.min_replicas else (*around, "WAIT")
    used = [(name, count) for count, names in COMMANDS.items() for name in names.split() if name not in unused]
    tries = [(name, *[key] * count) for name, count in used]
    with queue.store.lend() as connection:
        first = ask_each(connection, [("WATCH", key), *((name,) for name in around[1:])])
        replies = dict(zip(around, first, strict=True))
        if not isinstance(replies["MULTI"], Exception):
            queued = ask_each(connection, [("MULTI",), *tries])[1:]
            replies |= zip((name for name, *_ in tries), queued, strict=True)
        connection.disconnect()
    # Above its maxmemory Redis refuses all of them, but it checks the permissions before that.
    full = redis.exceptions.OutOfMemoryError
    refused = [name for name, reply in replies.items() if isinstance(reply, Exception) and not isinstance(reply, full)]
    user = queue.pool.connection_kwargs.get("username") or "default"
    advice = f"ACL SETUSER {user} ~{key.partition(':')[0]}:* {' '.join('+' + name.lower() for name in refused)}"
    seen = f"refused: {', '.join(refused)}" if refused else "all commands that the queue needs"
    yield _judge("permissions", seen, (refused == ["INFO"], "warn", advice), (bool(refused), "fail", advice))


def _writes(queue: Queue) -> Iterator[Finding]:
    queue.ping()
    yield Finding("ok", "writes", "accepted")


# The server -----------------------------------------------------------------------------------------------------------


def _server(queue: Queue, connections: int) -> Iterator[Finding]:
    names = ("save", "maxclients", "timeout")
    with queue.store.lend() as connection:
        reply, *replies = ask_each(connection, [("INFO",), *(("CONFIG", "GET", name) for name in names)])
    answered = zip(names, replies, strict=True)
    info = {name: reply[1].decode() for name, reply in answered if isinstance(reply, list) and reply}
    info |= parse_info(reply)
    if "redis_version" not in info:
        advice = "grant +info, or check version, memory and persistence yourself"
        yield Finding("warn", "server", "INFO is not permitted", advice)
        return
    yield from (_version(info), _role(info), _eviction(info), _memory(info), _persistence(info))
    yield _clients(info, connections)
    idle = info.get("timeout", "0")
    seen = "none" if idle == "0" else f"{idle} s: TinyQueue reopens connections that Redis closes"
    yield Finding("ok", "idle timeout", seen)


def _version(info: Mapping[str, str]) -> Finding:
    name = "Valkey " + info["valkey_version"] if "valkey_version" in info else "Redis " + info["redis_version"]
    mode = info.get("redis_mode", "standalone")
    version = tuple(map(int, re.findall(r"\d+", info["redis_version"])[:3]))
    return _judge(
        "server",
        f"{name}, {mode}",
        (version < OLDEST, "fail", f"use {'.'.join(map(str, OLDEST))} or newer"),
        (mode == "sentinel", "fail", "REDIS_URL names a sentinel; use redis+sentinel://host:26379/service"),
    )


def _role(info: Mapping[str, str]) -> Finding:
    role = info.get("role", "master")
    replicas = info.get("connected_slaves", "0")
    count = f"{replicas} replica{'' if replicas == '1' else 's'}"
    seen = f"master with {count}" if role == "master" else "a replica"
    return _judge("role", seen, (role != "master", "fail", "name its master in REDIS_URL"))


def _eviction(info: Mapping[str, str]) -> Finding:
    policy = info.get("maxmemory_policy", "noeviction")
    limit = int(info.get("maxmemory", 0))
    advice = "Redis evicts jobs or leases when its memory is full; set maxmemory-policy to noeviction"
    return _judge("eviction", f"maxmemory-policy is {policy}", (limit > 0 and policy != "noeviction", "warn", advice))


def _memory(info: Mapping[str, str]) -> Finding:
    used = int(info.get("used_memory", 0))
    limit = int(info.get("maxmemory", 0))
    share = memory_use(info)
    seen = f"{used / 1e6:.1f} MB" + (f" of {limit / 1e6:.1f} MB ({share:.0%})" if limit else ", no maxmemory")
    full = f"new jobs are refused; {REMEDIES['full']}"
    soon = f"above {MEMORY_SHARE:.0%}, new jobs are refused; {REMEDIES['full']}"
    return _judge("memory", seen, (share > MEMORY_SHARE, "fail", full), (share > 0.8, "warn", soon))


def _persistence(info: Mapping[str, str]) -> Finding:
    aof = info.get("aof_enabled") == "1"
    save = info.get("save")
    snapshots = "unknown" if save is None else f'"{save}"'
    broken = "err" in (info.get("rdb_last_bgsave_status"), info.get("aof_last_write_status"))
    return _judge(
        "persistence",
        "appendonly yes" if aof else f"appendonly no, save {snapshots}",
        (broken, "fail", "Redis cannot write to its disk: read its log"),
        (not aof and save == "", "warn", "a restart of Redis loses every job: set appendonly yes"),
        (not aof, "warn", "a crash of Redis loses all changes since its last snapshot: set appendonly yes"),
    )


def _clients(info: Mapping[str, str], connections: int) -> Finding:
    limit = int(info.get("maxclients", 0))
    now = int(info.get("connected_clients", 0))
    seen = f"{now} of {limit or 'unknown'}; the web processes and one worker open up to {connections}"
    advice = "run fewer processes (WEB_CONCURRENCY, workers), or raise maxclients"
    return _judge("connections", seen, (0 < limit < max(connections, now / 0.9), "warn", advice))


# The queue ------------------------------------------------------------------------------------------------------------


def _counts(queue: Queue) -> Iterator[Finding]:
    """Check that the lists have at least as many entries as there are jobs. They may have more."""
    counted, listed, wrong = compare_counts(queue)
    seen = f"{counted} jobs counted as pending or processing, {listed} entries listed"
    causes = "check for evictions, a failover, or others that write to the queue's keys"
    advice = f"keys are lost: {causes}; then run tinyqueue doctor --repair"
    yield _judge("counts", seen, (wrong, "fail", advice))


def compare_counts(queue: Queue) -> tuple[int, int, bool]:
    """Return how many jobs are counted, how many entries are listed, and whether both are wrong."""
    for _ in range(3):  # a queue or a worker may be new since the names were read
        unended, listed = queue.count_unended()
        wrong = sum(unended) > listed or min(unended, default=0) < 0
        if not wrong:
            break
    return sum(unended), listed, wrong


def _workers(queue: Queue) -> Iterator[Finding]:
    alive = [worker for worker in queue.workers() if worker["alive"]]
    yield _judge("workers", f"{len(alive)} alive", (not alive, "warn", "start one: tinyqueue worker"))
    served = {name for worker in alive for name in worker["queues"]}
    for name, about in queue.queues().items():
        if about["paused"]:
            yield Finding("warn", "queue", f"{name} is paused", f"tinyqueue resume {name}")
        elif alive and about["pending"] and name not in served:
            seen = f"{name}: {about['pending']} pending, no worker serves it"
            yield Finding("warn", "queue", seen, f"tinyqueue worker --queue {name}")


def _schedules(queue: Queue) -> Iterator[Finding]:
    """Warn of schedules that are overdue or paused. Without schedules, returns nothing."""
    found = [made for made, _ in list_schedules(queue)]
    now = queue.now()
    late = [made.name for made in found if made.overdue(now) > LATE]
    if found:
        seen = f"{len(found)} {'schedule' if len(found) == 1 else 'schedules'}" + (
            f", overdue: {', '.join(late)}" if late else ""
        )
        advice = "start a worker; its log says why a tick fails; with overlap one, the last job may still run"
        yield _judge("schedules", seen, (bool(late), "warn", advice))
    for made in found:
        if made.paused:
            yield Finding("warn", "schedule", f"{made.name} is paused", f"tinyqueue schedules --resume {made.name}")


def local_workers(queue: AnyQueue) -> list[dict[str, Any]]:
    """Return the workers whose processes run on this host.

    A worker is alive if it holds its lease in any shard that answers. Raises the error of the first
    shard if none answers. A process with the id of one that has died replaces that.
    """
    with ThreadPoolExecutor(len(queue.parts)) as threads:  # a shard that hangs holds up no other
        found = list(threads.map(_try_workers, queue.parts))
    answers = [workers for workers in found if not isinstance(workers, TinyQueueError)]
    if not answers:
        raise next(error for error in found if isinstance(error, TinyQueueError))
    here: dict[str, dict[str, Any]] = {}
    for about in (about for workers in answers for about in workers if about["host"] == host_name()):
        known = here.setdefault(about["id"], about)
        known["alive"] = known["alive"] or about["alive"]
    newest = {about["pid"]: about for about in sorted(here.values(), key=lambda about: about["startedAt"])}
    return [about for pid, about in newest.items() if _is_running(pid)]


def _try_workers(part: Queue) -> list[dict[str, Any]] | TinyQueueError:
    try:
        return part.workers()
    except TinyQueueError as error:
        return error


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# The verdict ----------------------------------------------------------------------------------------------------------

Severity = Literal["warning", "critical"]

LIFETIME = 2.0  # seconds for which a process returns the same verdict again
COUNT_EVERY = 10.0  # seconds between two comparisons of the counts, and two readings of the configuration
SHORT_WAIT = 3000  # milliseconds that a job may always wait
UNSERVED = 60_000  # milliseconds that a job may wait in a queue that has lost its workers
BUSY_WAIT = 10_000  # milliseconds that a job may wait before it matters what the slots do
LONG_RUN = 30_000  # milliseconds that a job of any type may run
UNKNOWN_RUN = 900_000  # milliseconds that a job may run whose type has run less than SAMPLES times
SAMPLES = 20
LAG = 10  # seconds that a replica may be behind
NAMED = 10  # jobs, queues or limits that a problem names
LIMITS_READ = 50  # limits with held jobs that one look reads
AWAY = ("unreachable", "timeout", "loading")


class Next(msgspec.Struct, frozen=True, omit_defaults=True):
    """The next step in words, as a command, and as a request or as a link of the dashboard."""

    text: str
    command: str = ""
    action: dict[str, str] | None = None


class Problem(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What is wrong, since when (in ms), what it concerns, and the next step."""

    check: str
    level: Severity = "warning"
    text: str
    next: Next
    since: int = 0
    queues: Sequence[str] = ()
    types: Sequence[str] = ()
    workers: Sequence[str] = ()
    jobs: Sequence[str] = ()
    schedules: Sequence[str] = ()
    limits: Sequence[str] = ()
    subject: str = ""  # tells the problems of one check apart; not a part of the answer

    def __str__(self) -> str:
        return f"{self.text}: {self.next.text}" + (f" ({self.next.command})" if self.next.command else "")

    @property
    def key(self) -> str:
        return f"{self.check}:{self.subject}"

    def answer(self) -> dict[str, Any]:
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return {"check": self.check, "level": self.level} | {k: v for k, v in fields.items() if k != "subject"}


class Waiting(NamedTuple):
    """The job that has waited longest, and since when."""

    since: int
    job: str


class Look:
    """What one look at a shard has read, in a few round trips. It reads no list of jobs."""

    def __init__(self, part: Queue, server: Mapping[str, str]) -> None:
        self.part = part
        self.now = part.now()
        self.refusal: TinyQueueError | None = None  # why Redis takes no writes
        try:
            part.ping()
        except Unavailable as error:
            if error.reason in AWAY:
                raise
            self.refusal = error
        memory = part.store.memory()
        self.info = {**server, **memory} if memory else {}
        self._read_tables()
        self._read_places()

    def _read_tables(self) -> None:
        keys = self.part.keys
        due = ("ZRANGEBYSCORE", keys.delayed, "-inf", self.now - SHORT_WAIT, "LIMIT", 0, NAMED)
        ticks = ("ZRANGEBYSCORE", keys.ticks, "-inf", self.now - LATE, "WITHSCORES", "LIMIT", 0, NAMED)
        sets = [("SMEMBERS", key) for key in (keys.paused, keys.workers, keys.holding)]
        found = self.part.store.read(("HGETALL", keys.counts), ("HGETALL", keys.trouble), due, ticks, *sets)
        counts, trouble, self.due, late, paused, workers, holding = found
        self.counts = {field: read_count(value) for field, value in pairs(counts)}
        self.trouble = {field: read_count(value) for field, value in pairs(trouble)}
        self.paused = set(map(text_of, paused))
        self.worker_ids = sorted(filter(NAME.fullmatch, map(text_of, workers)))
        self.limits = sorted(filter(LIMIT.fullmatch, map(text_of, holding)))[:LIMITS_READ]
        self.late = {name: int(float(at)) for name, at in pairs(late)}

    def _read_places(self) -> None:
        """Read the workers and the halts, and the next job of each place where jobs wait."""
        keys = self.part.keys
        counted = (field.partition(":")[2] for field, count in self.counts.items() if count > 0)
        lists = [keys.jobs(name) for name in dict.fromkeys(counted) if name and name not in self.paused]
        about = [key for id in self.worker_ids for key in (keys.worker(id), keys.lease(id))]
        held = [("ZRANGE", keys.held(limit), 0, NAMED - 1) for limit in self.limits]
        sizes = [("ZCARD", keys.held(limit)) for limit in self.limits]
        mget = ("MGET", *about, *map(keys.halt, self.limits), keys.mark)
        found = self.part.store.read(mget, *(("LINDEX", key, -1) for key in lists), *held, *sizes)
        values = found[0]
        heads = [id for id in found[1 : len(lists) + 1] if id]
        self.workers = read_workers(self.worker_ids, values[: len(about)], self.paused)
        self.halted = {limit for limit, value in zip(self.limits, values[len(about) :], strict=False) if value}
        found = found[len(lists) + 1 :]
        self.held_counts = dict(zip(self.limits, found[len(held) :], strict=True))
        self._read_waiting([*heads, *self.due], dict(zip(self.limits, found[: len(held)], strict=True)))

    def _read_waiting(self, queued: Sequence[bytes], entries: Mapping[str, Sequence[bytes]]) -> None:
        """Read the jobs that may have waited for some time: their ids say when they were submitted.

        So a look at a queue without a backlog reads no job.
        """
        awake = {limit: [e for e in map(text_of, some) if self._runs(e)] for limit, some in entries.items()}
        held = {limit: some[0].partition(":")[2] for limit, some in awake.items() if some}
        places = dict.fromkeys(ids_in(queued), True) | dict.fromkeys(held.values(), False)
        old = [id for id in places if ID.fullmatch(id) and created_at(id) <= self.now - SHORT_WAIT]
        self.held: dict[str, Waiting] = {}
        self.waiting: dict[str, Waiting] = {}
        for job in [job for job, _ in self.part.read_jobs(old, cut=0) if job and job.status == "pending"]:
            mine = Waiting(self.now - job.waited(self.now), job.id)
            if job.queue in self.paused or mine.since > self.now - SHORT_WAIT:
                continue
            if places[job.id]:
                self.waiting[job.queue] = min(self.waiting.get(job.queue, mine), mine)
            else:
                self.held |= {limit: mine for limit, id in held.items() if id == job.id}

    def _runs(self, entry: str) -> bool:
        return entry.partition(":")[0] not in self.paused

    def blocked_schedules(self) -> dict[str, str]:
        """Return the overdue schedules that wait for the end of their last job, with that job."""
        read = self.part.store.read
        records = read(("MGET", *map(self.part.keys.schedule, self.late)))[0] if self.late else []
        made = [read_schedule(record) for record in records if record]
        last = {schedule.last_job: schedule.name for schedule in made if schedule.last_job}
        jobs = (job for job, _ in self.part.read_jobs(list(last), cut=0) if job)
        return {last[job.id]: job.id for job in jobs if job.status in UNENDED}

    def still_run(self, slots: Mapping[str, int]) -> set[str]:
        """Return which of these jobs still run since that time."""
        jobs = (job for job, _ in self.part.read_jobs(list(slots), cut=0) if job and job.status == "processing")
        return {job.id for job in jobs if job.started_at == slots[job.id]}


class Sight:
    """What the looks at all shards have seen together."""

    def __init__(self, looks: Sequence[Look], max_wait: float) -> None:
        self.looks = looks
        self.now = looks[0].now
        self.max_wait = round(1000 * max_wait) or sys.maxsize
        self.patience = 2 * self.max_wait // 5  # with jobs that wait for the first worker
        self.counts = Counter[str]()
        for look in looks:
            self.counts.update(look.counts)
        self.waiting: dict[str, Waiting] = {}
        for name, waiting in (item for look in looks for item in look.waiting.items()):
            self.waiting[name] = min(self.waiting.get(name, waiting), waiting)
        self.workers: dict[str, list[dict[str, Any]]] = {}  # by id, as each shard knows it
        for worker in (worker for look in looks for worker in look.workers):
            self.workers.setdefault(worker["id"], []).append(worker)
        self.alive = [known for known in self.workers.values() if any(worker["alive"] for worker in known)]
        self.halted = {limit for look in looks for limit in look.halted}
        quiet = {name[1:] for look in looks for name in look.paused if name.startswith("@")}
        self.serving = [known[0] for known in self.alive if known[0]["id"] not in quiet]
        self.served = {name for worker in self.serving for name in worker["queues"]}

    def waited(self, name: str) -> int:
        """Return how long the next job of a queue has waited, in ms."""
        return self.now - self.waiting[name].since

    def oldest_first(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: self.waiting[name])

    def count_pending(self, names: Iterable[str]) -> int:
        return sum(self.counts["pending:" + name] for name in names)

    def all_run_long(self, slots: Sequence[Mapping[str, Any]]) -> bool:
        """Whether all these slots run jobs that take longer than usual.

        A slot is as the last heartbeat says, so some jobs are read to see whether they still run.
        """
        shortest: dict[str, int] = {}
        for slot in slots:
            ran = self.now - slot["startedAt"]
            shortest[slot["type"]] = min(ran, shortest.get(slot["type"], ran))
        if any(ran < LONG_RUN for ran in shortest.values()):
            return False
        usual = self._usual_times(shortest)
        if any(ran < max(LONG_RUN, 3 * usual[type]) for type, ran in shortest.items()):
            return False
        some = {slot["jobId"]: slot["startedAt"] for slot in slots[:NAMED]}
        return some.keys() == {id for look in self.looks for id in look.still_run(some)}

    def _usual_times(self, types: Iterable[str]) -> dict[str, float]:
        """Return for each type in how many ms 95 % of its attempts end."""
        usual: dict[str, float] = {}
        for type in types:
            fields = [f"ran:{type}:{name}:{bound}" for name in sorted(self.served)[:SERIES] for bound in BUCKETS]
            counts = [0] * len(BUCKETS)
            for look in self.looks:
                found = look.part.store.read(("HMGET", look.part.keys.metrics, *fields))[0]
                for at, value in enumerate(found):
                    counts[at % len(BUCKETS)] += read_count(value)
            known = percentile(counts, 0.95) if sum(counts) >= SAMPLES else None
            usual[type] = UNKNOWN_RUN / 3 if known is None else known
        return usual


# Checks: what is wrong with what a look has seen. Each returns nothing if all is well.


def _unavailable(part: Queue, error: TinyQueueError, shard: str = "") -> Problem:
    """Make the problem of a Redis that does not answer, or that takes no writes."""
    reason = getattr(error, "reason", "")
    states = {"read-only": "takes no writes", "full": "is full"}
    detail = str(error).partition("): ")[2] or str(error)
    text = f"Redis{shard} {states.get(reason, 'does not answer')}, so jobs can be neither submitted nor run: {detail}"
    away = round(1000 * (time.monotonic() - part.store.connections.last_contact))
    since = 0 if reason in states else round(1000 * time.time()) - away
    todo = Next(REMEDIES.get(reason, OTHER_REMEDY), "tinyqueue doctor")
    return Problem(check="redis", level="critical", text=text, since=since, next=todo, subject=part.keys.prefix)


def _check_redis(sight: Sight) -> Iterator[Problem]:
    for look in sight.looks:
        if look.refusal:
            yield _unavailable(look.part, look.refusal, _shard(look.part, len(sight.looks)))


def _shard(part: Queue, count: int) -> str:
    return f" of shard {part.keys.prefix[1:-2]}" if count > 1 else ""


def _check_memory(sight: Sight) -> Iterator[Problem]:
    yield from _of_server(sight, "memory", _memory, "Redis uses ")


def _check_eviction(sight: Sight) -> Iterator[Problem]:
    yield from _of_server(sight, "eviction", _eviction, "Redis may evict jobs: ")


def _check_persistence(sight: Sight) -> Iterator[Problem]:
    """Find a Redis that stores nothing, or cannot. Snapshots alone may be what is wanted."""
    if any(_persistence(look.info).level == "fail" or look.info.get("save") == "" for look in sight.looks):
        yield from _of_server(sight, "persistence", _persistence, "Redis may lose jobs: ")


def _of_server(
    sight: Sight, check: str, judge: Callable[[Mapping[str, str]], Finding], begin: str
) -> Iterator[Problem]:
    """Make a problem of what `doctor` finds too. Shards may be on one server, so of the first."""
    for finding in (judge(look.info) for look in sight.looks if look.info):
        if finding.level != "ok":
            level: Severity = "critical" if finding.level == "fail" else "warning"
            todo = Next(finding.advice, "tinyqueue doctor")
            yield Problem(check=check, level=level, text=begin + finding.seen, next=todo)
            return


def _check_replicas(sight: Sight) -> Iterator[Problem]:
    for look in sight.looks:
        rows = (value for name, value in look.info.items() if re.fullmatch("slave[0-9]+", name))
        replicas = [{"lag": "0"} | dict(part.split("=", 1) for part in row.split(",") if "=" in part) for row in rows]
        good = [about for about in replicas if about.get("state") == "online" and int(about["lag"]) <= LAG]
        needed = look.part.min_replicas if look.info else 0
        if len(good) < needed:
            text = f"Submits are refused: they need {plural(needed, 'replica')}, and {len(good)} of them keep up"
            todo = Next("start the replicas, or lower TINYQUEUE_MIN_REPLICAS", "redis-cli INFO replication")
            yield Problem(check="replicas", level="critical", text=text, next=todo)
            return
        if late := [about for about in replicas if about not in good]:
            names = ", ".join(f"{about.get('ip')}:{about.get('port')} ({_lag(about)})" for about in late)
            text = f"A failover may lose the last changes, because replicas are behind: {names}"
            todo = Next("check the load and the network of these replicas", "redis-cli INFO replication")
            yield Problem(check="replicas", text=text, next=todo)
            return


def _lag(about: Mapping[str, str]) -> str:
    return f"{about['lag']} s" if about.get("state") == "online" else about.get("state", "state unknown")


def _check_served(sight: Sight) -> Iterator[Problem]:
    """Find queues with jobs and no live worker.

    Without any worker, all may be scaled to zero, and the first may start soon. A queue that was
    served before may be served again after a deploy. One that never was has a wrong name, or its
    worker was forgotten.
    """
    ever = {field.partition(":")[2] for field in sight.counts if field.startswith("processing:")}
    late = [
        name
        for name in sight.oldest_first(sight.waiting.keys() - sight.served)
        if sight.waited(name) >= (sight.patience if not sight.serving else UNSERVED if name in ever else SHORT_WAIT)
    ]
    if not late:
        return
    them = "it" if len(late) == 1 else "them"
    why = f"no live worker serves {them}" if sight.serving else "all workers are quiet"
    text = f"{plural(sight.count_pending(late), 'job')} in {_names('queue', late)} cannot start, because "
    text += why if sight.alive else "no worker is alive"
    options = "".join(f" --queue {name}" for name in late[:NAMED]) if sight.serving else ""
    todo = Next(
        f"start a worker that serves {them}" if sight.serving else "start a worker", f"tinyqueue worker{options}"
    )
    since = sight.waiting[late[0]].since
    yield Problem(check="unserved", level="critical", text=text, since=since, queues=late[:NAMED], next=todo)


def _check_lost(sight: Sight) -> Iterator[Problem]:
    """Find workers without a lease. Another worker will reap them, if there is one."""
    lost = [known[0] for known in sight.workers.values() if known not in sight.alive]
    ids = [worker["id"] for worker in lost]
    lengths = [("LLEN", look.part.keys.proc(id)) for look in sight.looks for id in ids]
    held = sum(sum(look.part.store.read(*(("LLEN", look.part.keys.proc(id)) for id in ids))) for look in sight.looks)
    if not lengths or not (held or sight.alive):
        return
    text = f"{_names('Worker', ids)} sent no heartbeat for {sight.looks[0].part.lease:.0f} s"
    soon = "soon" if sight.alive else "only when another worker runs"
    text += f"; {plural(held, 'job')} will be requeued {soon}" if held else ""
    todo = Next("read the end of its log, and check whether its process was killed or is frozen", "tinyqueue workers")
    level: Severity = "warning" if sight.alive else "critical"
    yield Problem(check="lost", level=level, text=text, workers=ids[:NAMED], next=todo)


def _check_slots(sight: Sight) -> Iterator[Problem]:
    """Find queues whose jobs wait because all slots run jobs that take longer than usual."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in sight.oldest_first(sight.waiting.keys() & sight.served):
        if sight.waited(name) >= BUSY_WAIT:
            ids = tuple(worker["id"] for worker in sight.serving if name in worker["queues"])
            groups.setdefault(ids, []).append(name)
    for ids, names in groups.items():
        slots = [slot for id in ids for worker in sight.workers[id] for slot in worker["slots"]]
        if len(slots) >= sum(sight.workers[id][0]["concurrency"] for id in ids) and sight.all_run_long(slots):
            yield _slots_taken(sight, ids, names, slots)


def _slots_taken(sight: Sight, ids: Sequence[str], names: Sequence[str], slots: Sequence[Mapping[str, Any]]) -> Problem:
    types = Counter(slot["type"] for slot in slots)
    run = ", ".join(f"{type} in {count}" for type, count in types.most_common(3))
    longest = _time(sight.now - min(slot["startedAt"] for slot in slots))
    waits = plural(sight.count_pending(names), "job waits", "jobs wait")
    text = f"{waits} in {_names('queue', names)}, because all {plural(len(slots), 'slot')} run jobs that take longer "
    text += f"than usual: {run}, for up to {longest}"
    return Problem(
        check="slots",
        level="critical",
        text=text,
        since=sight.waiting[names[0]].since,
        queues=names[:NAMED],
        types=list(types)[:NAMED],
        workers=ids[:NAMED],
        jobs=[slot["jobId"] for slot in slots[:NAMED]],
        subject=ids[0],
        next=Next("check what these jobs wait for; give the handler a timeout, or start workers", "tinyqueue workers"),
    )


def _check_waiting(sight: Sight) -> Iterator[Problem]:
    served = sight.oldest_first(sight.waiting.keys() & sight.served)
    late = [name for name in served if sight.waited(name) >= sight.max_wait]
    if not late:
        return
    first = sight.waiting[late[0]]
    text = f"The next job of queue {late[0]} has waited for {_time(sight.now - first.since)}"
    text += f", and so have jobs of {plural(len(late) - 1, 'other queue')}" if late[1:] else ""
    since = first.since + sight.max_wait
    todo = Next("start more workers, or raise WORKER_CONCURRENCY", "tinyqueue workers")
    yield Problem(check="waiting", text=text, since=since, queues=late[:NAMED], jobs=[first.job], next=todo)


def _check_schedules(sight: Sight) -> Iterator[Problem]:
    """Find overdue schedules. Without a worker, the one that starts soon enqueues their jobs."""
    late = {name: at for look in sight.looks for name, at in look.late.items()}
    late = {name: at for name, at in late.items() if sight.serving or sight.now - at >= max(LATE, sight.patience)}
    blocked = {name: job for look in sight.looks for name, job in look.blocked_schedules().items()} if late else {}
    names = [name for name in late if name not in blocked or sight.now - late[name] >= sight.max_wait]
    if not names:
        return
    names.sort(key=lambda name: late[name])
    first = names[0]
    text = f"{_names('Schedule', names)} should have run {_time(sight.now - late[first])} ago"
    todo = Next("read the log of a worker: it says why the job was not enqueued", "tinyqueue schedules")
    if not sight.serving:
        text += ", and no worker is alive"
        todo = Next("start a worker", "tinyqueue worker")
    elif first in blocked:
        text += f"; {first} waits for the end of its last job"
        todo = Next("check what that job does", f"tinyqueue get {blocked[first]}", {"link": f"#/jobs/{blocked[first]}"})
    since = late[first]
    yield Problem(check="schedules", text=text, since=since, schedules=names[:NAMED], next=todo)


def _check_limits(sight: Sight) -> Iterator[Problem]:
    """Find limits that hold jobs for too long. Those that are paused or halted do so on purpose."""
    late: dict[str, Waiting] = {}
    for look in sight.looks:
        held = [limit for limit in look.held if sight.now - look.held[limit].since >= sight.max_wait]
        names = [limit for limit in held if limit not in look.halted]
        found = look.part.store.read(look.part.limits.overrides_of(names))[0] if names else []
        rules = {limit: rule_of(limit, found[2 * at : 2 * at + 2]) for at, limit in enumerate(names)}
        late |= {limit: look.held[limit] for limit, rule in rules.items() if not rule.paused}
    if not late:
        return
    names = sorted(late, key=lambda limit: late[limit])
    first = late[names[0]]
    text = f"{_names('Limit', names)} had no room for {_time(sight.now - first.since)} for a job that waits"
    todo = Next("check the jobs that run under it, or set higher numbers", "tinyqueue limits")
    since = first.since + sight.max_wait
    yield Problem(check="limits", text=text, since=since, limits=names[:NAMED], jobs=[first.job], next=todo)


def _check_deliveries(sight: Sight) -> Iterator[Problem]:
    for limit in sorted(sight.halted):
        type, _, host = limit.partition("/")
        held = sum(look.held_counts.get(limit, 0) for look in sight.looks)
        if type == "webhook" and held:
            text = f"{plural(held, 'delivery is', 'deliveries are')} held, because {host} failed many times in a row"
            link = {"link": "#/jobs?status=pending&type=webhook"}
            todo = Next("check that receiver; the deliveries go on by themselves when it answers", "", link)
            yield Problem(check="deliveries", text=text, limits=[limit], types=["webhook"], subject=host, next=todo)


CHECKS: dict[str, Callable[[Sight], Iterator[Problem]]] = {
    "redis": _check_redis,
    "memory": _check_memory,
    "eviction": _check_eviction,
    "persistence": _check_persistence,
    "replicas": _check_replicas,
    "unserved": _check_served,
    "lost": _check_lost,
    "slots": _check_slots,
    "waiting": _check_waiting,
    "schedules": _check_schedules,
    "limits": _check_limits,
    "deliveries": _check_deliveries,
}

LOGGED = ("redis", "memory", "eviction")  # checks whose problems a process logs at its start


class Observer:
    """Gives the verdict on a queue, at most once in LIFETIME seconds. Threads may share it.

    `max_wait` is how many seconds the next job of a queue may wait; 0: any time.
    """

    def __init__(self, queue: AnyQueue, max_wait: float = 300) -> None:
        self.queue = queue
        self.max_wait = max_wait
        self._lock = threading.Lock()
        self._given: tuple[float, list[Problem], str] = (-1e9, [], "")
        self._since: dict[str, int] = {}  # when problems began, if Redis took no writes
        self._servers: dict[Queue, tuple[float, dict[str, str]]] = {}
        self._compared: tuple[float, bool] = (-1e9, False)

    def verdict(self) -> dict[str, Any]:
        """Return the status, a sentence, and the problems, the worst first."""
        problems, text = self._look()
        levels = {problem.level for problem in problems}
        status = next((level for level in ("critical", "warning") if level in levels), "well")
        return {"status": status, "text": text, "problems": [problem.answer() for problem in problems]}

    def problems(self) -> list[Problem]:
        return self._look()[0]

    def firing(self) -> dict[str, bool]:
        """Return for every check whether it has found a problem."""
        found = {problem.check for problem in self.problems()}
        return {check: check in found for check in (*CHECKS, "counts")}

    def _look(self) -> tuple[list[Problem], str]:
        """Look again, unless another thread just did, or does so now."""
        first = not self._given[2]
        if time.monotonic() - self._given[0] >= LIFETIME and self._lock.acquire(blocking=first):
            try:
                if time.monotonic() - self._given[0] >= LIFETIME:
                    found, text = self._examine()
                    self._given = (time.monotonic(), found, text)
            finally:
                self._lock.release()
        return self._given[1:]

    def _examine(self) -> tuple[list[Problem], str]:
        parts = self.queue.parts
        looks: list[Look] = []
        found: list[Problem] = []
        for part in parts:
            try:
                looks.append(Look(part, self._read_server(part)))
            except TinyQueueError as error:
                found.append(_unavailable(part, error, _shard(part, len(parts))))
        text = "All is well"
        if looks:
            sight = Sight(looks, self.max_wait)
            text = f"All is well: {_summary(sight)}"
            try:
                found += [problem for check in CHECKS.values() for problem in check(sight)]
                found += self._check_counts(looks)
            except TinyQueueError as error:  # Redis went away meanwhile
                found.append(_unavailable(looks[0].part, error))
        found.sort(key=lambda problem: problem.level != "critical")
        found = self._dated(found, looks)
        if found:
            text = found[0].text + (f"; {plural(len(found) - 1, 'more problem')}" if found[1:] else "")
        return found, f"{text}."

    def _read_server(self, part: Queue) -> dict[str, str]:
        """Return what INFO says of persistence and replicas, and the configuration of snapshots."""
        read_at, known = self._servers.get(part, (-1e9, {}))
        asks = time.monotonic() - read_at >= COUNT_EVERY
        config = [("CONFIG", "GET", "save")] if asks else []
        with part.store.lend() as connection:
            found = ask_each(connection, [("INFO", "persistence"), ("INFO", "replication"), *config])
        if asks:
            allowed = isinstance(found[2], list) and bool(found[2])
            known = {"save": found[2][1].decode()} if allowed else {}
            self._servers[part] = (time.monotonic() if allowed else math.inf, known)  # never ask again if refused
        return known | parse_info(found[0]) | parse_info(found[1])

    def _check_counts(self, looks: Sequence[Look]) -> Iterator[Problem]:
        compared_at, wrong = self._compared
        if wrong or time.monotonic() - compared_at >= COUNT_EVERY:
            wrong = any(compare_counts(look.part)[2] for look in looks)
            self._compared = (time.monotonic(), wrong)
        if wrong:
            text = "More jobs are counted than are listed: keys were lost, and some jobs may never run"
            todo = Next("repair it; workers do so too, every ten minutes", "tinyqueue doctor --repair")
            yield Problem(check="counts", level="critical", text=text, next=todo)

    def _dated(self, found: Sequence[Problem], looks: Sequence[Look]) -> list[Problem]:
        """Say since when each problem lasts: since it was first found, or earlier if that is known.

        Stores that in Redis only when a problem begins or ends.
        """
        known = looks[0].trouble | self._since if looks else dict(self._since)
        now = looks[0].now if looks else round(1000 * time.time())
        since = {problem.key: min(known.get(problem.key, now), problem.since or now) for problem in found}
        self._since = since
        if looks and (looks[0].trouble.keys() != since.keys()):
            key = looks[0].part.keys.trouble
            new = [("HSETNX", key, name, at) for name, at in since.items() if name not in looks[0].trouble]
            gone = looks[0].trouble.keys() - since.keys()
            with suppress(TinyQueueError):
                looks[0].part.store.read(*new, *([("HDEL", key, *sorted(gone))] if gone else []))
        return [replace(problem, since=since[problem.key]) for problem in found]


def _summary(sight: Sight) -> str:
    counts = {status: sum(n for field, n in sight.counts.items() if field.startswith(status)) for status in UNENDED}
    workers = plural(len(sight.alive), "live worker") if sight.alive else "no live worker"
    return f"{workers}, {plural(counts['processing'], 'running job')}, {plural(counts['pending'], 'pending job')}"


def _names(what: str, names: Sequence[str]) -> str:
    """Name some things: queue a; queues a, b and c; queues a, b, c and 5 more."""
    if len(names) == 1:
        return f"{what} {names[0]}"
    shown, last = (names[:3], f"{len(names) - 3} more") if len(names) > 4 else (names[:-1], names[-1])
    return f"{what}s {', '.join(shown)} and {last}"


def _time(ms: float) -> str:
    """Return a time as people say it: 45 s, 12 minutes, 3 hours, 2 days."""
    for unit, size in (("day", 86_400_000), ("hour", 3_600_000), ("minute", 60_000)):
        if ms >= 2 * size:
            return f"{ms / size:.0f} {unit}s"
    return f"{ms / 1000:.0f} s"
