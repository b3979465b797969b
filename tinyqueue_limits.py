"""Limits: how many jobs of one kind run at a time, and how many of them start in a period.

The contract in tinyqueue.py has the keys and the transitions. Each method here adds to the
transaction of a verb. A job that finds no room is held: it stays pending, but waits in a set of its
limit, where it costs others nothing. Whatever ends an attempt wakes the oldest held job. A look at
a limit wakes held jobs for which room came in another way: with time, by a change of the limit, or
after a wake-up was lost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

from tinyqueue_job import HANDLERS, LIMIT, Job, Override, Rule, ids_in, limit_of, read_job, record_of, rule_of
from tinyqueue_json import encode
from tinyqueue_redis import Command, pairs, text_of

LEAVE = 5  # tries of a start after which it leaves its limited jobs to adoption: many start under their limits
LOOK = 10_000  # milliseconds between two looks at a limit with held jobs, unless a rate has room before
LOOK_GAP = 20  # milliseconds between two looks, at least
AHEAD = 100  # held jobs, or jobs at the head of a queue, that one look reads
SHOWN = 1000  # limits of one report
LOOK_MARK = "limit:"  # with a limit, what stands among the delayed ids until the next look at that limit


class Names(Protocol):
    """The keys that limits use."""

    delayed: str
    holding: str
    overrides: str
    job: Callable[[str], str]
    jobs: Callable[[str], str]
    running: Callable[[str], str]
    held: Callable[[str], str]
    pace: Callable[[str], str]
    halt: Callable[[str], str]


class Writes(Protocol):
    """What limits need of a transaction."""

    now: int
    again: bool
    tries: int
    left: set[bytes]
    wakes: dict[str, int]

    def read(self, *commands: Command) -> list[Any]: ...
    def write(self, *command: Any) -> None: ...
    def gather(self, command: str, key: str, *parts: Any) -> None: ...
    def ring(self, queue: str) -> None: ...
    def count(self, field: str, by: int = 1) -> None: ...


class Reads(Protocol):
    """What limits need of the store."""

    def read(self, *commands: Command) -> list[Any]: ...
    def transact(self, watch: Sequence[str], body: Callable[[Any], None]) -> None: ...


class Room:
    """What a limit allows at one moment: `left` more jobs may start."""

    def __init__(self, limit: str, rule: Rule, running: Collection[bytes] = ()) -> None:
        self.limit = limit
        self.rule = rule
        self.running = running
        self.left = rule.max_running - len(running)
        self.held: list[str] = []  # the first entries, oldest first, except those of paused queues
        self.opens = math.inf  # when the rate has room again, if that is what there is no room for
        self.admitted: set[str] = set()  # the ids that may start
        self.closed = False  # paused or halted
        self.busy = False  # too many start at the moment: leave its jobs to adoption
        self.noted = False  # that jobs are held


class Limits:
    """The limits of one queue. `paused` returns the names of the paused queues."""

    def __init__(self, keys: Names, store: Reads, paused: Callable[[], Collection[str]]) -> None:
        self.keys = keys
        self.store = store
        self.paused = paused
        self.looks: dict[str, int] = {}  # when to look at a limit next, as far as this process knows

    def next_look(self) -> float:
        """When a rate next has room for a held job, as far as this process knows, in ms."""
        return min(tuple(self.looks.values()), default=math.inf)

    def note_looks(self, now: int) -> None:
        """Forget the times that have come, because somebody looks now."""
        for limit in [limit for limit, at in tuple(self.looks.items()) if at <= now]:
            self.looks.pop(limit, None)

    # Start ------------------------------------------------------------------------------------------------------------

    def rooms(self, tx: Writes, jobs: Iterable[Job]) -> dict[str, Room]:
        """Return the rooms of pending jobs with limits, by job id, except those not due.

        Watches the sets of running ids. The oldest jobs get the room first, and those among them
        that are held are woken.
        """
        found: dict[str, list[Job]] = {}
        for job in jobs:
            if job.run_at <= tx.now and not job.has_expired(tx.now):
                found.setdefault(limit_of(job), []).append(job)
        if not found or tx.again:
            return {}
        if tx.tries < LEAVE:
            rooms = self.read_rooms(tx, sorted(found))
        else:
            rooms = {limit: Room(limit, Rule()) for limit in found}
        for limit, room in rooms.items():
            room.busy = tx.tries >= LEAVE
            if not room.busy:
                self._admit(tx, room, {job.id for job in found[limit]})
        return {job.id: rooms[limit] for limit, jobs in found.items() for job in jobs}

    def _admit(self, tx: Writes, room: Room, taken: set[str]) -> None:
        held = {_id_in(entry): entry for entry in room.held}
        oldest = _first(sorted(held.keys() | taken), room.left)
        newest = max(taken)
        first = [id for id in oldest if id <= newest]
        owed = tx.wakes.pop(room.limit, 0) - len(first)
        more = _first([id for id in oldest if id > newest], owed)
        if owed - len(more) > 0 and len(first) + len(more) < room.left:
            tx.wakes[room.limit] = owed - len(more)
        room.admitted = taken.intersection(first)
        # Without an end, none younger than all these is woken: it would overtake others.
        self._move(tx, room.limit, [held[id] for id in (*first, *more) if id not in taken])

    def read_rooms(self, tx: Writes, limits: Sequence[str]) -> dict[str, Room]:
        """Read the rooms of limits. Watches the sets of running ids, which every start changes."""
        reads: list[Command] = []
        for limit in limits:
            held = ("ZRANGE", self.keys.held(limit), 0, AHEAD - 1)
            reads += [("SMEMBERS", self.keys.running(limit)), ("GET", self.keys.halt(limit)), held]
        watch = ("WATCH", *map(self.keys.running, limits))
        _, overrides, *found = tx.read(watch, self.overrides_of(limits), *reads)
        rooms: dict[str, Room] = {}
        for at, limit in enumerate(limits):
            running, halt, held = found[3 * at : 3 * at + 3]
            room = rooms[limit] = Room(limit, rule_of(limit, overrides[2 * at : 2 * at + 2]), set(running) - tx.left)
            room.held = self._awake(held)
            room.closed = bool(halt or room.rule.paused)
            if room.closed:
                room.left = 0
        self._read_pace(tx, [room for room in rooms.values() if room.rule.starts])
        return rooms

    def overrides_of(self, limits: Sequence[str]) -> Command:
        """Return the command that reads the overrides: of each limit its type's, and its own."""
        return ("HMGET", self.keys.overrides, *(name for limit in limits for name in (limit.partition("/")[0], limit)))

    def _awake(self, entries: Iterable[bytes]) -> list[str]:
        paused = self.paused()
        return [text for text in map(text_of, entries) if text.partition(":")[0] not in paused]

    def _read_pace(self, tx: Writes, rooms: Sequence[Room]) -> None:
        """Count the starts in the last period of each rate."""
        reads: list[Command] = []
        for room in rooms:
            # A start that seems to be further ahead was written before the clock was set back.
            window = self.keys.pace(room.limit), f"({tx.now - room.rule.period}", tx.now + room.rule.period
            reads += [("ZCOUNT", *window), ("ZRANGEBYSCORE", *window, "WITHSCORES", "LIMIT", 0, 1)]
        found = tx.read(*reads) if reads else []
        for room, count, oldest in zip(rooms, found[::2], found[1::2], strict=True):
            if room.rule.starts - count <= room.left:
                room.left = room.rule.starts - count
                room.opens = int(float(oldest[1]) if oldest else tx.now) + room.rule.period

    def enter(self, tx: Writes, job: Job, room: Room) -> bool:
        """Count a job that starts under its limit, or hold it and return False."""
        limit = room.limit
        if job.id not in room.admitted:
            self._hold(tx, job, room)
            return False
        job.limit = limit
        tx.gather("SADD", self.keys.running(limit), job.id)
        if (entry := _entry_of(job)) in room.held:
            tx.gather("ZREM", self.keys.held(limit), entry)
        if period := room.rule.period:
            # Twice the period, because the clock of another worker may be behind.
            tx.write("ZREMRANGEBYSCORE", self.keys.pace(limit), "-inf", tx.now - 2 * period)
            tx.write("ZADD", self.keys.pace(limit), tx.now, f"{job.id}:{tx.now}")
            tx.write("PEXPIRE", self.keys.pace(limit), 2 * period)
        return True

    def _hold(self, tx: Writes, job: Job, room: Room) -> None:
        if job.limit != room.limit:
            job.limit = room.limit
            tx.write("SET", self.keys.job(job.id), record_of(job))
        tx.gather("ZADD", self.keys.held(room.limit), job.created_at, _entry_of(job))
        if not room.noted:
            room.noted = True
            tx.write("SADD", self.keys.holding, room.limit)
            self._look_later(tx, room)

    def _look_later(self, tx: Writes, room: Room) -> None:
        """Set the time of the next look. An earlier one stays, unless a rate knows better."""
        latest = tx.now + LOOK
        if room.opens < latest:
            at = max(int(room.opens), tx.now + LOOK_GAP)
            tx.write("ZADD", self.keys.delayed, at, LOOK_MARK + room.limit)
            self.looks[room.limit] = at
        else:
            tx.write("ZADD", self.keys.delayed, "NX", latest, LOOK_MARK + room.limit)

    # End --------------------------------------------------------------------------------------------------------------

    def leave(self, tx: Writes, job: Job) -> None:
        """Stop counting a job whose attempt ends, and let the next one start."""
        tx.gather("SREM", self.keys.running(job.limit), job.id)
        tx.left.add(job.id.encode())
        self.owe(tx, job.limit)

    def owe(self, tx: Writes, limit: str) -> None:
        """Note that the transaction must wake a held job, unless only time makes room for one."""
        known = HANDLERS.get(limit.partition("/")[0])
        if not known or known.max_running:
            tx.wakes[limit] = tx.wakes.get(limit, 0) + 1

    def halt(self, tx: Writes, job: Job, ms: int) -> None:
        """Hold a job that was refused, and let none start under its limit for a time."""
        tx.write("SET", self.keys.halt(job.limit), tx.now + ms, "PX", ms)
        tx.wakes.pop(job.limit, None)
        room = Room(job.limit, Rule())
        room.opens = tx.now + ms
        self._hold(tx, job, room)

    def wake(self, tx: Writes) -> None:
        """Move the oldest held jobs to the heads of their queues, as many as are owed.

        Watches the held jobs only if there are too few: one that is held before this is written
        would wait for room that it has. Otherwise two workers may wake the same job, and put its id
        into the list twice. Whoever takes the second drops it, and that wakes the next job.
        """
        few: list[str] = []
        for limit, entries in self._read_held(tx, tx.wakes):
            awake = self._awake(entries)[: tx.wakes[limit]]
            if len(awake) < tx.wakes[limit]:
                few.append(limit)
            else:
                self._move(tx, limit, awake)
        if few:
            tx.read(("WATCH", *map(self.keys.held, few)))
        if few:
            tx.read(("WATCH", *map(self.keys.held, few)))
        for limit, entries in self._read_held(tx, few):
            self._move(tx, limit, self._awake(entries)[: tx.wakes[limit]])

    def _read_held(self, tx: Writes, limits: Collection[str]) -> Iterable[tuple[str, list[bytes]]]:
        reads = [("ZRANGE", self.keys.held(limit), 0, AHEAD - 1) for limit in limits]
        return zip(limits, tx.read(*reads), strict=True) if reads else ()

    def _move(self, tx: Writes, limit: str, entries: Sequence[str]) -> None:
        for entry in reversed(entries):
            queue, _, id = entry.partition(":")
            tx.gather("ZREM", self.keys.held(limit), entry)
            tx.gather("RPUSH", self.keys.jobs(queue), id)
            tx.ring(queue)

    def forget(self, tx: Writes, job: Job) -> None:
        """Remove a pending job from the held ones, because it is cancelled."""
        tx.write("ZREM", self.keys.held(job.limit), _entry_of(job))

    # Look -------------------------------------------------------------------------------------------------------------

    def reconcile(self, limits: Sequence[str], now: int) -> None:
        """Look at limits whose time has come: drop what does not run, and wake what has room.

        Of several workers that look at the same moment one goes on. The others find that the time
        of the next look is already set. If nothing has changed, a look takes four commands.
        """
        later = now // 1000 * 1000 + LOOK
        turns = [("ZADD", self.keys.delayed, "XX", "CH", later, LOOK_MARK + limit) for limit in limits]
        mine = [limit for limit, changed in zip(limits, self.store.read(*turns), strict=True) if changed]
        sets = [("SMEMBERS", self.keys.running(limit)) for limit in mine]
        overrides, *found = self.store.read(self.overrides_of(mine), *sets) if mine else [()]
        for at, (limit, running) in enumerate(zip(mine, found, strict=True)):
            full = len(running) >= rule_of(limit, overrides[2 * at : 2 * at + 2]).max_running
            if not full or not self._all_run(limit, running):
                self.store.transact([self.keys.held(limit)], partial(self.look, limit=limit))

    def _all_run(self, limit: str, running: Collection[bytes]) -> bool:
        ids = list(map(text_of, running))
        records = self.store.read(("MGET", *map(self.keys.job, ids)))[0]
        jobs = [read_job(id, record) for id, record in zip(ids, records, strict=True) if record is not None]
        return sum(job.status == "processing" and job.limit == limit for job in jobs) == len(ids)

    def look(self, tx: Writes, limit: str) -> None:
        """Drop what does not run under a limit, and wake as many held jobs as there is room for.

        Watches the records of all that it moves or drops. The transaction watches the held jobs.
        """
        room = self.read_rooms(tx, [limit])[limit]
        running = self._read_jobs(tx, map(text_of, room.running), watch=True)
        for id in map(text_of, room.running):
            if id not in running or running[id].status != "processing" or running[id].limit != limit:
                tx.gather("SREM", self.keys.running(limit), id)
                room.left += 0 if room.closed else 1
        held = room.held if room.left > 0 else []
        jobs = self._read_jobs(tx, map(_id_in, held), watch=True)
        pending = [entry for entry in held if _id_in(entry) in jobs and jobs[_id_in(entry)].status == "pending"]
        for entry in held:
            if entry not in pending:
                tx.gather("ZREM", self.keys.held(limit), entry)
        if pending and room.left < math.inf:
            room.left -= self._count_ahead(tx, limit, pending)
        woken = _first(pending, room.left)
        self._move(tx, limit, woken)
        self._go_on(tx, room, len(held) - len(pending) + len(woken))

    def _go_on(self, tx: Writes, room: Room, removed: int) -> None:
        """Set the time of the next look, if jobs are still held."""
        if tx.read(("ZCARD", self.keys.held(room.limit)))[0] > removed:
            if room.left > removed >= AHEAD:
                room.opens = tx.now
            self._look_later(tx, room)
        else:
            tx.write("SREM", self.keys.holding, room.limit)
            tx.write("ZREM", self.keys.delayed, LOOK_MARK + room.limit)

    def _count_ahead(self, tx: Writes, limit: str, entries: Sequence[str]) -> int:
        """Count the woken jobs of a limit that nobody has taken yet."""
        queues = {entry.partition(":")[0] for entry in entries}
        heads = tx.read(*(("LRANGE", self.keys.jobs(queue), -AHEAD, -1) for queue in queues))
        jobs = self._read_jobs(tx, ids_in(itertools.chain(*heads)))
        held = set(map(_id_in, entries))
        return sum(job.status == "pending" and job.limit == limit and job.id not in held for job in jobs.values())

    # For operators ----------------------------------------------------------------------------------------------------

    def set(self, limit: str, override: Override) -> None:
        """Store an override, or delete it if it is empty, and have somebody look at once."""
        holding = map(text_of, self.store.read(("SMEMBERS", self.keys.holding))[0])
        under = [name for name in holding if limit in (name, name.partition("/")[0])]
        write: Command = ("HSET", self.keys.overrides, limit, encode(override))
        if override == Override():
            write = ("HDEL", self.keys.overrides, limit)
        self.store.read(write, *(("ZADD", self.keys.delayed, "XX", 0, LOOK_MARK + name) for name in under))

    def in_use(self) -> dict[str, dict[str, Any]]:
        """Return up to SHOWN limits, those with the most held jobs first.

        A type whose limits belong to the values of a field has a row too, with its numbers.
        """
        stored, holding = self.store.read(("HGETALL", self.keys.overrides), ("SMEMBERS", self.keys.holding))
        overrides = dict(pairs(stored))
        names = {type for type, handler in HANDLERS.items() if handler.limited} | overrides.keys()
        limits = sorted(names.union(filter(LIMIT.fullmatch, map(text_of, holding))))
        rows = {}
        for at in range(0, len(limits), AHEAD):
            some = limits[at : at + AHEAD]
            reads = [[("SCARD", self.keys.running(name)), ("ZCARD", self.keys.held(name))] for name in some]
            found = self.store.read(*itertools.chain(*reads), *(("PTTL", self.keys.halt(name)) for name in some))
            for n, name in enumerate(some):
                rule = rule_of(name, [overrides.get(name.partition("/")[0]), overrides.get(name)])
                halted = max(0, found[2 * len(some) + n])
                rows[name] = {"running": found[2 * n], "held": found[2 * n + 1], **rule.answer(), "haltedMs": halted}
                rows[name]["overridden"] = name in overrides
        return dict(sorted(rows.items(), key=lambda row: -row[1]["held"])[:SHOWN])

    def place_of(self, job: Job) -> int:
        """Return the position of a pending job among the held ones, from 1; 0: it is not held."""
        if job.status != "pending" or not job.limit:
            return 0
        rank = self.store.read(("ZRANK", self.keys.held(job.limit), _entry_of(job)))[0]
        return 0 if rank is None else int(rank) + 1

    def _read_jobs(self, tx: Writes, ids: Iterable[str], watch: bool = False) -> dict[str, Job]:
        keys = {id: self.keys.job(id) for id in ids}
        if not keys:
            return {}
        watching = [("WATCH", *keys.values())] if watch else []
        records = tx.read(*watching, ("MGET", *keys.values()))[-1]
        return {id: read_job(id, record) for id, record in zip(keys, records, strict=True) if record is not None}


def _first(items: Sequence[str], count: float) -> Sequence[str]:
    return items[: int(max(0, min(count, len(items))))]


def _entry_of(job: Job) -> str:
    """Return what stands for a job among the held ones."""
    return f"{job.queue}:{job.id}"


def _id_in(entry: str) -> str:
    return entry.partition(":")[2]
