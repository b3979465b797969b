"""The checks of `doctor`, which examine what the queue depends on, and the warnings at a start.

`examine` changes nothing. Errors of Redis become findings.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import msgspec
import redis
from msgspec.structs import replace

from tinyqueue import MEMORY_SHARE, AnyQueue, Queue, TinyQueueError
from tinyqueue_redis import ask_each, memory_use, parse_info

OLDEST = (6, 0, 6)  # version of Redis: the first with LPOS
SLOW = 10.0  # milliseconds to Redis and back; above this a worker spends its time waiting
SKEW = 2.0  # seconds between two clocks
COMMANDS = {  # every command that the queue uses, by how many arguments it needs at least
    0: "EXEC INFO MULTI TIME UNWATCH",
    1: "DEL EXISTS GET HGETALL INCR LLEN MGET SMEMBERS WATCH ZCARD",
    2: "BLPOP EXPIRE HMGET LINDEX LPOS LPUSH MSET MSETNX RPOPLPUSH RPUSH SADD SET SREM WAIT ZREM ZSCORE",
    3: "HINCRBY LRANGE LREM LTRIM ZADD ZCOUNT ZRANGE ZRANGEBYSCORE ZREVRANGEBYSCORE",
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
    """Return the warnings about one Redis. That it is away is one only if there are other shards."""
    try:
        if one_of_many:
            queue.ping()
        info = queue.store.memory()
    except TinyQueueError as error:
        return [f"shard {queue.keys.prefix[1:-2]}: {error}"] if one_of_many else []
    found = [_eviction(info), replace(_memory(info), seen=f"Redis uses {_memory(info).seen}")]
    return [f"{finding.seen}: {finding.advice}" for finding in found if finding.level != "ok"]


def examine(queue: AnyQueue, connections: int) -> list[Finding]:
    """Examine every shard. Equal findings of several shards are returned once.

    `connections` is how many the web processes and one worker may open together.
    """
    return list(dict.fromkeys(finding for part in queue.parts for finding in _examine(part, connections)))


def _examine(queue: Queue, connections: int) -> list[Finding]:
    found = [_transport(queue.pool)]
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "reachable": partial(_round_trip, queue),
        "permissions": partial(_permissions, queue),
        "writes": partial(_writes, queue),
        "server": partial(_server, queue, connections),
        "counts": partial(_counts, queue),
        "workers": partial(_workers, queue),
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
    return _judge("transport", "not encrypted", (not _is_private(host), "warn", advice))


def _is_private(host: str) -> bool:
    """Whether the host is this machine, or in a private network, or cannot be resolved."""
    with suppress(OSError, ValueError):
        return all(ipaddress.ip_address(info[4][0]).is_private for info in socket.getaddrinfo(host, None))
    return True


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
    seen = "none" if idle == "0" else f"{idle} s: the queue reopens connections that it closes"
    yield Finding("ok", "idle timeout", seen)


def _version(info: Mapping[str, str]) -> Finding:
    name = "Valkey " + info["valkey_version"] if "valkey_version" in info else "Redis " + info["redis_version"]
    mode = info.get("redis_mode", "standalone")
    version = tuple(map(int, re.findall(r"\d+", info["redis_version"])[:3]))
    return _judge(
        "server",
        f"{name}, {mode}",
        (version < OLDEST, "fail", f"use {'.'.join(map(str, OLDEST))} or newer"),
        (mode == "sentinel", "fail", "name the Redis that it watches in REDIS_URL"),
    )


def _role(info: Mapping[str, str]) -> Finding:
    role = info.get("role", "master")
    replicas = info.get("connected_slaves", "0")
    seen = f"primary with {replicas} replicas" if role == "master" else "a replica"
    return _judge("role", seen, (role != "master", "fail", "name its primary in REDIS_URL"))


def _eviction(info: Mapping[str, str]) -> Finding:
    policy = info.get("maxmemory_policy", "noeviction")
    limit = int(info.get("maxmemory", 0))
    advice = "Redis evicts jobs or leases when its memory is full; set it to noeviction"
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
    for _ in range(3):  # a queue or a worker may be new since the names were read
        unended, listed = queue.count_unended()
        wrong = sum(unended) > listed or min(unended, default=0) < 0
        if not wrong:
            break
    seen = f"{sum(unended)} jobs counted as pending or processing, {listed} entries listed"
    advice = "keys are lost: check for evictions, a failover, or others that write to the queue's keys"
    yield _judge("counts", seen, (wrong, "fail", advice))


def _workers(queue: Queue) -> Iterator[Finding]:
    alive = [worker for worker in queue.workers() if worker["alive"]]
    yield _judge("workers", f"{len(alive)} alive", (not alive, "warn", "start one: tinyqueue worker"))
    served = {name for worker in alive for name in worker["queues"]}
    for name, about in queue.queues().items():
        if about["paused"]:
            yield Finding("warn", "queue", f"{name} is paused", f"POST /queues/{name}/resume")
        elif alive and about["pending"] and name not in served:
            seen = f"{name}: {about['pending']} pending, no worker serves it"
            yield Finding("warn", "queue", seen, f"tinyqueue worker --queue {name}")
