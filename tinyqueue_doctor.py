"""The checks of `doctor`, which examine what the queue depends on, and those of the verdict.

`examine` changes nothing. Errors of Redis become findings. An `Observer` says whether all is well.
The dashboard, GET /verdict, `stats`, /ready and the metrics show what it says.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
import shlex
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any, Literal
from urllib.parse import urlencode

import msgspec
import redis
from msgspec.structs import replace

from tinyqueue import (
    MEMORY_SHARE,
    UNENDED,
    Queue,
    TinyQueueError,
    host_name,
)
from tinyqueue_config import plural
from tinyqueue_handler import rule_of
from tinyqueue_look import AWAY, LATEST, LONG_RUN, MINUTE, NAMED, RECENT, SHORT_WAIT, Look, Minutes, Sight, Waiting
from tinyqueue_metrics import Refusals
from tinyqueue_redis import ask_each, memory_use, parse_info
from tinyqueue_schedule import list_schedules
from tinyqueue_shards import AnyQueue

OLDEST = (6, 0, 6)  # version of Redis: the first with LPOS
LATE = 90_000  # milliseconds that a schedule may be overdue: workers look once a minute
SLOW = 10.0  # milliseconds to Redis and back; above this a worker spends its time waiting
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
            if reason in AWAY:
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
    """Warn if other machines can reach a Redis that requires no password."""
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
    shard if none answers. If a new process has the pid of a dead one, only the new one counts.
    """
    with ThreadPoolExecutor(len(queue.parts)) as threads:  # a shard that hangs delays no other
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
COUNT_EVERY = 10.0  # seconds between two comparisons of the counts, or reads of the configuration
UNSERVED = 60_000  # milliseconds that a job may wait in a queue that has lost its workers
BUSY_WAIT = 10_000  # milliseconds that a job may wait before the check `slots` looks at the slots
LAG = 10  # seconds that a replica may be behind
FAILED = 5  # minimum of failed attempts of a type before their share counts
ALL_FAILED = 3  # the same if none completed
FAILED_SHARE = 0.2  # of the attempts of a type
RETRYING = 10  # minimum of jobs that wait for another attempt before they count
RATE_LIMITED = 10  # minimum of submissions that the rate limit refused before they count
GROWTH = 100  # minimum of jobs by which a backlog grows before it counts


class Next(msgspec.Struct, frozen=True, omit_defaults=True):
    """The next step: in words, as a command, and as a request or a link of the dashboard."""

    text: str
    command: str = ""
    action: dict[str, str] | None = None


class Problem(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What is wrong, since when (ms since 1970), what it concerns, and the next step."""

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
    subject: str = ""  # distinguishes the problems of one check; not part of the answer

    def __str__(self) -> str:
        return f"{self.text}: {self.next.text}" + (f" ({self.next.command})" if self.next.command else "")

    @property
    def key(self) -> str:
        return f"{self.check}:{self.subject}"

    def answer(self) -> dict[str, Any]:
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return {"check": self.check, "level": self.level} | {k: v for k, v in fields.items() if k != "subject"}


LOST = "read the end of its log, and check whether its process was killed or frozen"
UNKNOWN = ":UnknownType"  # the error of jobs that a worker leaves to one that has their handler
REFUSALS = {  # why submissions were refused, and what to do
    "full": ("the memory of Redis was nearly used up", REMEDIES["full"]),
    "read-only": ("Redis took no writes", REMEDIES["read-only"]),
    "unreachable": ("Redis did not answer", REMEDIES["unreachable"]),
    "timeout": ("Redis did not answer in time", REMEDIES["timeout"]),
    "loading": ("Redis was loading its data", REMEDIES["loading"]),
    "refused": ("Redis refused the user or the command", REMEDIES["refused"]),
    "busy": ("connections or keys were in use by others", REMEDIES["busy"]),
    "queue-full": ("there were too many pending jobs or queues", "start more workers, or raise TINYQUEUE_MAX_PENDING"),
    "not-replicated": ("too few replicas had the jobs", "start the replicas, or lower TINYQUEUE_MIN_REPLICAS"),
    "too-many-requests": ("of the rate limit", "have clients send fewer requests, or raise TINYQUEUE_RATE_LIMIT"),
}


# Checks. Each yields the problems that it finds in what the looks have seen.


def _unavailable(part: Queue, error: TinyQueueError, shard: str = "") -> Problem:
    """Return the problem of a Redis that does not answer, or that takes no writes."""
    reason = getattr(error, "reason", "")
    states = {
        "read-only": "takes no writes",
        "full": "is full",
        "refused": "refuses this user, or a command",
        "": "has other data under the keys of the queue",
    }
    detail = (str(error).partition("): ")[2] or str(error)).rstrip(".")
    result = "its jobs do not run" if shard else "jobs can be neither submitted nor run"
    text = f"Redis{shard} {states.get(reason, 'does not answer')}, so {result}: {detail}"
    away = round(1000 * (time.monotonic() - part.store.connections.last_contact))
    since = 0 if reason not in AWAY else round(1000 * time.time()) - away
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
    """Find a Redis that stores nothing on disk, or fails to. Snapshots alone may be intended."""
    broken = any(_persistence(look.info).level == "fail" for look in sight.looks)
    if broken or any(look.info.get("save") == "" for look in sight.looks):
        why = ", because it cannot write to its disk" if broken else ""
        yield from _of_server(sight, "persistence", _persistence, f"Redis may lose jobs{why}: ")


def _of_server(
    sight: Sight, check: str, judge: Callable[[Mapping[str, str]], Finding], begin: str
) -> Iterator[Problem]:
    """Turn a finding of `doctor` into a problem. One is enough: shards may share a server."""
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
            required = f"{needed} {'is' if needed == 1 else 'are'} required"
            text = f"Submissions are refused, because {plural(len(good), 'replica keeps', 'replicas keep')} up "
            text += f"and {required}"
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
    """Find queues with jobs and no live worker. Quiet workers are intended, so they get longer."""
    unserved = sight.oldest_first(sight.waiting.keys() - sight.served - sight.quiet)
    late = [name for name in unserved if sight.waited(name) >= _patience(sight, name)]
    if late:
        them = "it" if len(late) == 1 else "them"
        why = f"no live worker serves {them}" if sight.alive else "no worker is alive"
        text = f"{plural(sight.count_pending(late), 'job')} in {_names('queue', late)} cannot start, because {why}"
        options = "".join(f" --queue {name}" for name in late[:NAMED]) if sight.alive else ""
        todo = Next(f"start a worker{f' that serves {them}' if options else ''}", f"tinyqueue worker{options}")
        since = sight.waiting[late[0]].since
        yield Problem(check="unserved", level="critical", text=text, since=since, queues=late[:NAMED], next=todo)
    names = sight.oldest_first(sight.waiting.keys() & sight.quiet - sight.served)
    quiet = [name for name in names if sight.waited(name) >= sight.max_wait]
    if quiet:
        them = "it" if len(quiet) == 1 else "them"
        text = f"{plural(sight.count_pending(quiet), 'job')} in {_names('queue', quiet)} cannot start, because only "
        text += f"quiet workers serve {them}"
        id = next(known[0]["id"] for known in sight.alive if quiet[0] in known[0]["queues"])
        action = {"method": "POST", "path": f"/workers/{id}/resume"}
        todo = Next("let a worker take jobs again", f"tinyqueue quiet {id} --resume", action)
        since = sight.waiting[quiet[0]].since
        yield Problem(check="unserved", text=text, since=since, queues=quiet[:NAMED], subject="quiet", next=todo)


def _patience(sight: Sight, name: str) -> int:
    """Return how many ms jobs may wait in a queue without a worker.

    If no worker is alive, all may be scaled to zero, and the first may start soon. A deploy may
    leave a queue without workers for a moment. A queue that no worker ever served has a wrong name,
    or nobody started its worker.
    """
    if not sight.alive:
        return sight.patience
    return UNSERVED if f"processing:{name}" in sight.counts else SHORT_WAIT


def _check_known(sight: Sight) -> Iterator[Problem]:
    """Find types whose jobs were postponed, because no live worker has a handler for them."""
    postponed = {field.rpartition(":")[0]: n for field, n in sight.recent("error:").items() if field.endswith(UNKNOWN)}
    known = {name for worker in sight.serving for name in worker.get("types", postponed)}
    if sight.serving and (types := sorted(postponed.keys() - known)):
        them = "it" if len(types) == 1 else "them"
        text = f"Jobs of {_names('type', types)} are postponed, because no live worker has a handler for {them}"
        todo = Next("start workers whose code has that handler", "tinyqueue workers")
        yield Problem(check="unknown", level="critical", text=text, types=types[:NAMED], next=todo)


def _check_failing(sight: Sight) -> Iterator[Problem]:
    """Find types whose attempts fail, and still do so in the LATEST minutes."""
    ends = _ends(sight, RECENT)
    latest = _ends(sight, LATEST)
    failing = [type for type in ends if _fails(ends[type]) and latest[type][1] > FAILED_SHARE * sum(latest[type][:2])]
    for type in sorted(failing, key=lambda type: -ends[type][1])[:NAMED]:
        completed, failed, errors = ends[type]
        [(error, count)] = errors.most_common(1)
        share = f"{failed / (completed + failed):.0%}" if completed else "All"
        text = f"{share} of the {completed + failed} attempts of type {type} failed in the last {RECENT} minutes"
        text += f", {'all' if count == failed else count} with {error}"
        command = f"tinyqueue list --type {type} --error-type {shlex.quote(error)}"
        link = {"link": "#/jobs?" + urlencode({"type": type, "errorType": error})}
        minutes = (at for at in sorted(sight.minutes) if any(f"error:{type}:" in field for field in sight.minutes[at]))
        yield Problem(
            check="failing",
            level="critical" if failed >= max(2 * FAILED, completed) else "warning",
            text=text,
            since=next(minutes) * MINUTE,
            types=[type],
            subject=type,
            next=Next("read the errors of these jobs, and fix the cause", command, link),
        )


def _ends(sight: Sight, minutes: int) -> dict[str, tuple[int, int, Counter[str]]]:
    """Return by type how many attempts completed and failed, and the failed ones by error."""
    completed = sight.recent("completed:", minutes)
    errors: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for field, count in sight.recent("error:", minutes).items():
        if not field.endswith(UNKNOWN):
            errors[field.partition(":")[0]][field.partition(":")[2]] += count
    found = {type: (completed[type], some.total(), some) for type, some in errors.items()}
    return defaultdict(lambda: (0, 0, Counter()), found)


def _fails(ends: tuple[int, int, Counter[str]]) -> bool:
    completed, failed, _ = ends
    return failed >= (FAILED if completed else ALL_FAILED) and failed > FAILED_SHARE * (completed + failed)


def _check_retrying(sight: Sight) -> Iterator[Problem]:
    """Find out whether more jobs are retrying than a few failures explain.

    The count may be too high after workers of an older version ran, which do not keep it.
    """
    pending = sum(count for field, count in sight.counts.items() if field.startswith("pending:"))
    retrying = min(sight.counts["retrying"], pending)
    completed = sight.recent("completed:").total()
    if retrying >= RETRYING and retrying > FAILED_SHARE * (retrying + completed):
        text = f"{retrying} jobs wait for another attempt after one that failed"
        todo = Next("read the errors of these jobs, and fix the cause", "tinyqueue list --status pending")
        yield Problem(check="retrying", text=text, next=todo)


def _check_lost(sight: Sight) -> Iterator[Problem]:
    """Find workers without a lease, and those that were reaped in the last minutes."""
    if reaped := sight.recent("lost:"):
        ids = sorted(reaped)
        jobs = plural(sight.recent("requeued").total(), "job was", "jobs were")
        text = f"{_names('Worker', ids)} {'was' if len(ids) == 1 else 'were'} lost in the last {RECENT} minutes, "
        text += f"and {jobs} requeued or ended"
        todo = Next(LOST, "tinyqueue workers")
        yield Problem(check="lost", text=text, workers=ids[:NAMED], subject="reaped", next=todo)
    yield from _without_lease(sight)


def _without_lease(sight: Sight) -> Iterator[Problem]:
    lost = [known[0] for known in sight.workers.values() if known not in sight.alive]
    ids = [worker["id"] for worker in lost]
    held = sum(look.count_held(ids) for look in sight.looks)
    if not ids or not (held or sight.alive):
        return
    has = "has" if len(ids) == 1 else "have"
    text = f"{_names('Worker', ids)} {has} sent no heartbeat for {sight.looks[0].part.lease:.0f} s"
    soon = "soon" if sight.alive else "only when another worker runs"
    text += f"; {plural(held, 'job')} will be requeued {soon}" if held else ""
    todo = Next(LOST, "tinyqueue workers")
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
    run = ", ".join(f"{count} of type {type}" for type, count in types.most_common(3))
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


def _check_stuck(sight: Sight) -> Iterator[Problem]:
    given_up = [(worker, slot) for known in sight.alive for worker in known for slot in worker["givenUp"]]
    if not given_up:
        return
    types = Counter(slot["type"] for _, slot in given_up)
    ids = sorted({worker["id"] for worker, _ in given_up})
    run = ", ".join(f"{count} of type {type}" for type, count in types.most_common(3))
    still = "was given up after the timeout and still runs", "were given up after the timeout and still run"
    text = f"{plural(len(given_up), f'handler {still[0]}', f'handlers {still[1]}')}: {run}, "
    text += f"in {_names('worker', ids)}"
    todo = Next("restart the worker to end it, and set time limits inside the handler", "tinyqueue workers")
    since = min(slot["startedAt"] for _, slot in given_up)
    jobs = [slot["jobId"] for _, slot in given_up[:NAMED]]
    yield Problem(check="stuck", text=text, since=since, types=list(types), workers=ids[:NAMED], jobs=jobs, next=todo)


def _check_backlog(sight: Sight) -> Iterator[Problem]:
    """Find a backlog that has grown in each of the last minutes while jobs wait."""
    minutes = sorted(sight.minutes)
    sizes = [sight.minutes[at]["ready"] for at in minutes[:-1] if "ready" in sight.minutes[at]]
    sizes.append(sum(look.ready for look in sight.looks))
    grown = sizes[-1] - sizes[0]
    names = sight.oldest_first(sight.waiting.keys() & sight.served)
    steady = len(sizes) >= RECENT - 1 and all(before < after for before, after in pairwise(sizes))
    if steady and grown >= max(GROWTH, sizes[0] / 4) and names and sight.waited(names[0]) >= LONG_RUN:
        text = f"The backlog grows: {sizes[-1]} jobs wait, {grown} more than {len(sizes) - 1} minutes ago"
        todo = Next("start more workers, or have clients submit fewer jobs", "tinyqueue stats --watch")
        yield Problem(check="backlog", text=text, since=minutes[0] * MINUTE, queues=names[:NAMED], next=todo)


def _check_refused(sight: Sight) -> Iterator[Problem]:
    if sight.recent("refused:", LATEST):
        yield from _refused(sight.recent("refused:"))


def _refused(counts: Mapping[str, int]) -> Iterator[Problem]:
    """Return the problem of refused submissions. A rate limit refuses a few on purpose."""
    found = {reason: n for reason, n in counts.items() if n >= (RATE_LIMITED if reason == "too-many-requests" else 1)}
    reasons = sorted(found, key=lambda reason: -found[reason])
    if reasons:
        why = "; ".join(f"{found[reason]} because {REFUSALS.get(reason, (reason, ''))[0]}" for reason in reasons)
        count = plural(sum(found.values()), "submission was", "submissions were")
        text = f"{count} refused in the last {RECENT} minutes: {why}"
        todo = Next(REFUSALS.get(reasons[0], ("", OTHER_REMEDY))[1], "tinyqueue doctor")
        level: Severity = "warning" if reasons == ["too-many-requests"] else "critical"
        yield Problem(check="refused", level=level, text=text, next=todo)


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
    """Find overdue schedules. If no worker is alive, one may start soon and enqueue their jobs."""
    failed: Counter[str] = Counter()
    for field, count in sight.recent("failedTick:", LATEST).items():
        failed[field.partition(":")[0]] += count
    patience = LATE if sight.serving else max(LATE, sight.patience)
    late = {name: at for look in sight.looks for name, at in look.late.items()}
    late = {name: at for name, at in late.items() if sight.now - at >= patience or name in failed}
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
    elif first in failed:
        errors = ", ".join(sorted(sight.recent(f"failedTick:{first}:", LATEST)))
        text += f", but its job could not be enqueued ({errors})"
    elif first in blocked:
        text += f"; {first} waits for the end of its last job"
        todo = Next("check what that job does", f"tinyqueue get {blocked[first]}", {"link": f"#/jobs/{blocked[first]}"})
    since = late[first]
    yield Problem(check="schedules", text=text, since=since, schedules=names[:NAMED], next=todo)


def _check_limits(sight: Sight) -> Iterator[Problem]:
    """Find limits that have held jobs for too long. Paused and halted ones do so on purpose."""
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
    has = "has" if len(names) == 1 else "have"
    text = f"{_names('Limit', names)} {has} had no room for a waiting job for {_time(sight.now - first.since)}"
    todo = Next("check the jobs that run under it, or raise its numbers", "tinyqueue limits")
    if first.queue not in sight.served | sight.quiet:
        begin = f"{_names('Limit', names)} {has} held a job for {_time(sight.now - first.since)}"
        text = f"{begin}, and no live worker serves its queue {first.queue}"
        todo = Next("start a worker that serves it", f"tinyqueue worker --queue {first.queue}")
    since = first.since + sight.max_wait
    yield Problem(check="limits", text=text, since=since, limits=names[:NAMED], jobs=[first.job], next=todo)


def _check_deliveries(sight: Sight) -> Iterator[Problem]:
    for limit in sorted(sight.halted):
        type, _, host = limit.partition("/")
        held = sum(look.held_counts.get(limit, 0) for look in sight.looks)
        if type == "webhook" and held:
            text = f"{plural(held, 'delivery is', 'deliveries are')} held, because {host} failed many times in a row"
            link = {"link": "#/jobs?status=pending&type=webhook"}
            todo = Next("check that receiver; the deliveries resume by themselves once it answers", "", link)
            yield Problem(check="deliveries", text=text, limits=[limit], types=["webhook"], subject=host, next=todo)


def _check_counts(sight: Sight) -> Iterator[Problem]:
    if sight.is_miscounted():
        text = "More jobs are counted than are listed: keys were lost, and some jobs may never run"
        todo = Next("run a repair; workers also run one every ten minutes", "tinyqueue doctor --repair")
        yield Problem(check="counts", level="critical", text=text, next=todo)


CHECKS: dict[str, Callable[[Sight], Iterator[Problem]]] = {
    "redis": _check_redis,
    "refused": _check_refused,
    "failing": _check_failing,
    "memory": _check_memory,
    "eviction": _check_eviction,
    "persistence": _check_persistence,
    "replicas": _check_replicas,
    "unserved": _check_served,
    "unknown": _check_known,
    "lost": _check_lost,
    "slots": _check_slots,
    "stuck": _check_stuck,
    "waiting": _check_waiting,
    "backlog": _check_backlog,
    "retrying": _check_retrying,
    "schedules": _check_schedules,
    "limits": _check_limits,
    "deliveries": _check_deliveries,
    "counts": _check_counts,
}

LOGGED = ("redis", "memory", "eviction")  # checks whose problems a process logs at its start


class Observer:
    """Gives the verdict on a queue, a new one at most every LIFETIME seconds. Threads may share it.

    `max_wait` is how many seconds the next job of a queue may wait; 0: unlimited. `refusals` are
    those of this process.
    """

    def __init__(self, queue: AnyQueue, max_wait: float = 300, refusals: Refusals | None = None) -> None:
        self.queue = queue
        self.max_wait = max_wait
        self.refusals = refusals or Refusals()
        self.away: TinyQueueError | None = None  # the reason, if no shard answered the last look
        self._lock = threading.Lock()
        self._given: tuple[float, list[Problem], str] = (-1e9, [], "")
        self._since: dict[str, int] = {}  # when problems began, if Redis took no writes
        self._minutes: dict[Queue, Minutes] = {}
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
        return {check: check in found for check in CHECKS}

    def _look(self) -> tuple[list[Problem], str]:
        """Look again, unless another thread has just looked, or is looking now."""
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
                looks.append(look := Look(part, self._read_server(part), self._minutes.get(part, {})))
                self._minutes[part] = look.minutes
                look.note_ready()
            except TinyQueueError as error:
                trouble = error
                found.append(_unavailable(part, error, _shard(part, len(parts))))
        self.away = None if looks else trouble
        text = "All is well"
        if not looks:
            found += _refused(self.refusals.counts)
        else:
            sight = Sight(looks, self.max_wait, self.refusals.counts, partial(self._miscounts, looks))
            text = f"All is well: {_summary(sight)}"
            try:
                for check in CHECKS.values():
                    found += check(sight)
                self.refusals.store(self.queue)
            except TinyQueueError as error:  # Redis went away meanwhile
                found.append(_unavailable(looks[0].part, error))
        found.sort(key=lambda problem: problem.level != "critical")
        found = self._dated(found, looks)
        if found:
            text = found[0].text + (f"; {plural(len(found) - 1, 'more problem')}" if found[1:] else "")
        return found, f"{text}."

    def _read_server(self, part: Queue) -> dict[str, str]:
        """Return what INFO says about persistence and replicas, and the setting `save`."""
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

    def _miscounts(self, looks: Sequence[Look]) -> bool:
        """Compare the counts with the lists every COUNT_EVERY seconds; always while wrong."""
        compared_at, wrong = self._compared
        if wrong or time.monotonic() - compared_at >= COUNT_EVERY:
            wrong = any(compare_counts(look.part)[2] for look in looks if not look.refusal)
            self._compared = (time.monotonic(), wrong)
        return wrong

    def _dated(self, found: Sequence[Problem], looks: Sequence[Look]) -> list[Problem]:
        """Date each problem: since it was first found, or earlier if that is known.

        Stores the dates in Redis only when a problem begins or ends.
        """
        known = self._since | looks[0].trouble if looks else self._since
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
    """Return names as words: queue a; queues a, b and c; queues a, b, c and 5 more."""
    if len(names) == 1:
        return f"{what} {names[0]}"
    shown, last = (names[:3], f"{len(names) - 3} more") if len(names) > 4 else (names[:-1], names[-1])
    return f"{what}s {', '.join(shown)} and {last}"


def _time(ms: float) -> str:
    """Return a duration in words: 45 s, 12 minutes, 3 hours, 2 days."""
    for unit, size in (("day", 86_400_000), ("hour", 3_600_000), ("minute", 60_000)):
        if ms >= 2 * size:
            return f"{ms / size:.0f} {unit}s"
    return f"{ms / 1000:.0f} s"
