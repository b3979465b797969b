"""The checks of `doctor`, which examine what the queue depends on, and the warnings at a start.

`examine` changes nothing. Errors of Redis become findings. `repair` restores what lost keys have
broken.
"""

from __future__ import annotations

import ipaddress
import os
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any, Literal

import msgspec
import redis
from msgspec.structs import replace

from tinyqueue import (
    ENDED,
    LOOK_MARK,
    MEMORY_SHARE,
    NAME,
    SWEEP_MARK,
    UNENDED,
    Queue,
    TinyQueueError,
    Transaction,
    host_name,
    ids_in,
)
from tinyqueue_redis import ask_each, memory_use, pairs, parse_info, scan, text_of
from tinyqueue_schedule import list_schedules
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
    """Return what may lose or refuse jobs although Redis works, in any shard, each text once."""
    return list(dict.fromkeys(warning for part in queue.parts for warning in _warnings(part, len(queue.parts) > 1)))


def _warnings(queue: Queue, one_of_many: bool) -> list[str]:
    """Return the warnings about one Redis. If it is the only one, that it is away is none."""
    try:
        if one_of_many:
            queue.ping()
        info = queue.store.memory()
        unserved = _unserved_deliveries(queue)
    except TinyQueueError as error:
        return [f"shard {queue.keys.prefix[1:-2]}: {error}"] if one_of_many else []
    found = [_eviction(info), replace(_memory(info), seen=f"Redis uses {_memory(info).seen}")]
    return [f"{finding.seen}: {finding.advice}" for finding in found if finding.level != "ok"] + unserved


def _unserved_deliveries(queue: Queue) -> list[str]:
    """Warn if workers run and none of them serves the deliveries that wait."""
    if not queue.count_pending(["webhooks"])["webhooks"]:
        return []
    alive = [worker for worker in queue.workers() if worker["alive"]]
    if not alive or any("webhooks" in worker["queues"] for worker in alive):
        return []
    todo = "add it to the queues of a worker, or start one: tinyqueue worker --queue webhooks"
    return [f"deliveries wait in queue webhooks, and no worker serves it: {todo}"]


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
    counted, listed, wrong = _compare_counts(queue)
    seen = f"{counted} jobs counted as pending or processing, {listed} entries listed"
    causes = "check for evictions, a failover, or others that write to the queue's keys"
    advice = f"keys are lost: {causes}; then run tinyqueue doctor --repair"
    yield _judge("counts", seen, (wrong, "fail", advice))


def _compare_counts(queue: Queue) -> tuple[int, int, bool]:
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


# Repair ---------------------------------------------------------------------------------------------------------------

MARKS = (LOOK_MARK.encode(), SWEEP_MARK.encode())  # among the delayed ids
STEP = 1000  # keys or entries of one step
OTHERS = "*"  # any queue, as it may be in the metrics that are counted as other
REPAIR_EVERY = 600  # seconds between two repairs that no operator asked for


def repair(parts: Iterable[Queue]) -> list[Finding]:
    """Restore what lost keys have broken, in these shards. Return what was changed.

    Lists the jobs that no list names, finds the lists of unknown workers, drops entries without a
    job, lists schedules again, and counts again. Safe while jobs are submitted and run, except that
    the jobs of a queue are counted only if none of them changes meanwhile. Remembers the ids of all
    unended jobs.
    """
    return [finding for part in parts for finding in _repair(part)]


def find_broken(queue: AnyQueue) -> list[Queue]:
    """Return the shards in which more jobs are counted than listed, each every 10 minutes."""
    wrong = [part for part in queue.parts if _compare_counts(part)[2]]
    return [part for part in wrong if part.store.read(("SET", part.keys.repairer, "1", "NX", "EX", REPAIR_EVERY))[0]]


def _repair(queue: Queue) -> Iterator[Finding]:
    before = _read_counters(queue)
    names = list(scan(queue.store.read, queue.keys.prefix))
    jobs = _read_unended(queue, [name[4:] for name in names if name.startswith("job:")])
    workers = [name[5:] for name in names if name.startswith("proc:")]
    yield from _changed(_enlist(queue, workers), "list of an unknown worker", "lists of unknown workers", "found")
    lists = sorted(queue.keys.prefix + name for name in names if name.startswith(("jobs:", "proc:")))
    missing = set(jobs).difference(*queue.read_held())
    dropped = 0
    for key in (queue.keys.delayed, *lists, *queue.keys.ended.values()):
        for entries in queue.read_entries(key, "LRANGE" if key in lists else "ZRANGE"):
            missing.difference_update(entries)
            others = [id for id in entries if id not in jobs and not id.startswith(MARKS)]
            for at in range(0, len(others), STEP):
                dropped += _drop_gone(queue, key, others[at : at + STEP])
    yield from _changed(dropped, "entry without a job", "entries without a job", "dropped")
    restored = sum(queue.restore(id.decode()) for id in missing)
    yield from _changed(restored, "job", "jobs", "listed again")
    for entries in queue.read_entries(queue.keys.delayed, "ZRANGE"):
        yield from _look_again(queue, ids_in(entries))
    schedules = {name[9:] for name in names if name.startswith("schedule:")}
    yield from _changed(_list_schedules(queue, schedules), "schedule", "schedules", "listed again, or dropped")
    yield from _recount(queue, Counter(chain(*jobs.values())), before)


def _list_schedules(queue: Queue, stored: Collection[str]) -> int:
    """List again the schedules whose next tick was lost, and drop ticks without a schedule."""
    listed = {text_of(name) for name in queue.store.read(("ZRANGE", queue.keys.ticks, 0, -1))[0]}
    wrong = sorted(name for name in listed.symmetric_difference(stored) if NAME.fullmatch(name))
    for name in wrong:
        queue.change_schedule(name, lambda found, last, now: (found, 0))  # writes the entry in any case
    return len(wrong)


def _changed(count: int, one: str, many: str, how: str) -> Iterator[Finding]:
    if count:
        yield Finding("ok", "repair", f"{count} {one if count == 1 else many} {how}")


def _read_counters(queue: Queue) -> dict[str, bytes]:
    """Return all counts and metrics. Whatever changes a job changes one of them."""
    reads = ("HGETALL", queue.keys.counts), ("HGETALL", queue.keys.metrics)
    counts, metrics = queue.store.read(("MULTI",), *reads, ("EXEC",))[-1]
    return dict(pairs(counts) + pairs(metrics))


def _read_unended(queue: Queue, ids: Sequence[str]) -> dict[bytes, tuple[str, ...]]:
    """Return the unended jobs by id, each with the fields that count it."""
    jobs = (job for job, _ in queue.read_jobs(ids, cut=0) if job and job.status in UNENDED)
    return {job.id.encode(): (f"{job.status}:{job.queue}", *["retrying"] * job.retrying) for job in jobs}


def _enlist(queue: Queue, workers: Sequence[str]) -> int:
    """Add workers that have a list to the set of workers, so that they are reaped if lost."""
    at_once = (workers[at : at + STEP] for at in range(0, len(workers), STEP))
    return sum(queue.store.read(("SADD", queue.keys.workers, *some))[0] for some in at_once)


def find_forgotten(queue: AnyQueue) -> list[Finding]:
    """Look at some jobs that wait for others, and advance those that wait for one that has ended.

    There are none, unless keys were lost or an older version of a worker ended a parent.
    """
    return [finding for part in queue.parts for finding in _look_again(part, _some_that_wait(part))]


def _some_that_wait(part: Queue) -> list[str]:
    """Return the ids of up to 100 jobs that wait for others, beginning anywhere among them."""
    [count] = part.store.read(("ZCOUNT", part.keys.delayed, "inf", "inf"))
    if not count:
        return []
    start = random.randrange(-99, count)
    return ids_in(part.store.read(("ZRANGEBYSCORE", part.keys.delayed, "inf", "inf", "LIMIT", max(start, 0), 100))[0])


def _look_again(queue: Queue, ids: Sequence[str]) -> Iterator[Finding]:
    """Advance those jobs that wait for one that has ended or is gone, or whose end is not seen."""
    forgotten = 0
    for job in [job for job, _ in queue.read_jobs(ids, cut=0) if job and job.status == "pending" and job.waiting_for]:
        parents = [parent for parent, _ in queue.read_jobs(job.waiting_for, cut=0)]
        if any(parent is None or parent.status in ENDED or not parent.followed for parent in parents):
            queue.restore(job.id)
            forgotten += 1
    yield from _changed(forgotten, "job that waited", "jobs that waited", "looked at again: their parents have ended")


def _drop_gone(queue: Queue, key: str, ids: Sequence[bytes]) -> int:
    """Drop the entries whose jobs do not exist. No job is ever stored under such an id again."""
    found = queue.store.read(*(("EXISTS", queue.keys.job(text_of(id))) for id in ids)) if ids else []
    gone = [id for id, exists in zip(ids, found, strict=True) if not exists]
    in_list = key.startswith((queue.keys.jobs(""), queue.keys.proc("")))
    drops = [("LREM", key, 0, id) for id in gone] if in_list else [("ZREM", key, *gone)] if gone else []
    return sum(queue.store.read(*drops)) if drops else 0


def _recount(queue: Queue, actual: Mapping[str, int], before: Mapping[str, bytes]) -> Iterator[Finding]:
    """Correct the counts of every queue of which no job has changed since `before`."""
    wrong = {field for field in before if field.startswith(("pending:", "processing:", "retrying"))} | actual.keys()
    wrong = {field for field in wrong if before.get(field, b"0") != b"%d" % actual.get(field, 0)}

    def body(tx: Transaction) -> list[str]:
        counts, metrics = tx.read(("HGETALL", queue.keys.counts), ("HGETALL", queue.keys.metrics))
        now = dict(pairs(counts) + pairs(metrics))
        changed = {_queue_in(field) for field in now.keys() | before.keys() if now.get(field) != before.get(field)}
        quiet = sorted(field for field in wrong if not {_queue_in(field), OTHERS} & changed)
        for field in quiet:
            tx.write("HDEL", queue.keys.counts, field)
            tx.count(field, actual.get(field, 0))
        return quiet

    corrected = queue.store.transact([queue.keys.counts, queue.keys.metrics], body) if wrong else []
    for field in corrected:
        was = text_of(before.get(field, b"0"))
        yield Finding("ok", "repair", f"{field} counted again: it was {was}, and is {actual.get(field, 0)}")
    for name in sorted(set(map(_queue_in, wrong - set(corrected)))):
        seen = f"jobs {f'of queue {name} ' if name else ''}changed while they were counted"
        yield Finding("warn", "repair", seen, f"if this goes on, tinyqueue pause {name}, and repair again")


def _queue_in(field: str) -> str:
    """Return the queue in pending:<queue> or <event>:<type>:<queue>, with or without a bucket."""
    labels = field.split(":")[1:3]
    return OTHERS if labels == ["other", "other"] else (labels or [""])[-1]
