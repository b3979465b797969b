"""Check the ticks and the sync of schedules in every interleaving, and that they need their guards.

    python tests/schedule_model.py [--workers 2] [--sync] [--without GUARD]

The first world has one schedule and some workers that tick. A worker lists what is due, reads the
schedule, and writes. Between any two of these steps time passes, the schedule is edited, paused,
resumed, removed or added again, Redis is full, the worker crashes, or its reply is lost while its
transaction is applied at once, later or never. With --sync, the second world has workers of an old
and a new release of the code, which bring the schedules in Redis up to date when they start, and an
operator who uses the API. With --without, one of the guards is left out. Then the search finds a
wrong state, and prints the steps to it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import click
from protocol_model import search

TICKS = {
    "watch": "a tick writes only if the schedule has not changed since it was read",
    "read": "a tick decides by the schedule as it is now, not by the listing",
    "due": "a tick does nothing before the schedule's own next time, so a lost reply is read back",
    "together": "job, schedule and index are written in one transaction",
    "fold": "the next time is strictly later than now, so that missed ticks fold into one",
    "catchup": "a tick that is too late is skipped",
    "again": "a tick that fails stays due",
    "index": "whoever changes a schedule writes the index, too",
}
SYNC = {
    "known": "older code, which has been replaced, leaves the schedules as they are",
    "return": "older code takes over when no worker of the newer code has been seen for some time",
    "gate": "a sync writes only if no other code has synced, and no schedule changed, since it read",
    "owner": "a sync removes and replaces only schedules of its own module",
    "same": "a sync leaves a schedule alone that is as declared: its next time, its pause",
}
PERIOD = 3  # from one tick to the next
FIRST = 1  # time of the first tick
END = 4  # of the time: the second tick


def following(now: int) -> int:
    """The first tick strictly later than now."""
    return next(at for at in range(FIRST, now + 2 * PERIOD, PERIOD) if at > now)


# Ticks ----------------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A schedule in Redis. `edition` differs after each edit, `version` after each write."""

    next: int
    edition: int = 0
    version: int = 0
    paused: bool = False


class Ticker(NamedTuple):
    """A worker that ticks: what it does next, and what it knows."""

    step: str = "list"
    listed: Stored | None = None
    seen: Stored | None = None  # by what it decides
    watched: Stored | None = None


class TickState(NamedTuple):
    now: int = 0
    stored: Stored | None = Stored(FIRST)
    index: int | None = FIRST  # when the schedule is due; None: not listed
    workers: tuple[Ticker, ...] = ()
    jobs: tuple[tuple[int, int], ...] = ()  # edition and tick
    flight: tuple[tuple[Stored, Stored], ...] = ()  # transactions that arrive later: seen and watched
    edits: int = 0
    failures: int = 0
    fault: str = ""

    def worker(self, at: int, **changes: object) -> TickState:
        worker = self.workers[at]._replace(**changes)  # type: ignore[arg-type]
        return self._replace(workers=(*self.workers[:at], worker, *self.workers[at + 1 :]))


class Ticks:
    """One schedule, and workers that tick."""

    def __init__(self, workers: int, without: str = "", catchup: int = 1, edits: int = 2, failures: int = 2) -> None:
        self.without = without
        self.catchup = catchup
        self.edits = edits
        self.failures = failures
        self.first = TickState(workers=(Ticker(),) * workers)

    def guarded(self, guard: str) -> bool:
        return guard != self.without

    def steps(self, state: TickState) -> Iterator[tuple[str, TickState]]:
        if state.now < END:
            yield "time passes", state._replace(now=state.now + 1)
        if state.edits < self.edits:
            yield from self.changes(state)
        for late in state.flight:
            left = list(state.flight)
            left.remove(late)
            yield "a late transaction arrives", self.applied(state._replace(flight=tuple(left)), *late)
        for at, worker in enumerate(state.workers):
            yield from getattr(self, worker.step)(state, at, worker)
            if worker.step != "list" and state.failures < self.failures:
                yield f"{at} crashes", state.worker(at, **Ticker()._asdict())._replace(failures=state.failures + 1)

    def changes(self, state: TickState) -> Iterator[tuple[str, TickState]]:
        """An operator, or a sync, changes the schedule."""
        stored = state.stored
        state = state._replace(edits=state.edits + 1)
        edition = state.edits
        if stored is None:
            yield "it is added again", self.put(state, Stored(following(state.now), edition, 10 * edition))
            return
        version = stored.version + 1
        yield "it is removed", self.put(state, None)
        edited = Stored(following(state.now), edition, version, stored.paused)
        yield "it is edited", self.put(state, edited)
        if stored.paused:
            resumed = stored._replace(next=following(state.now), version=version, paused=False)
            yield "it is resumed", self.put(state, resumed)
        else:
            yield "it is paused", self.put(state, stored._replace(version=version, paused=True))

    def put(self, state: TickState, stored: Stored | None) -> TickState:
        index = stored.next if stored and not stored.paused else None
        return state._replace(stored=stored, index=index if self.guarded("index") else state.index)

    def list(self, state: TickState, at: int, worker: Ticker) -> Iterator[tuple[str, TickState]]:
        if state.index is not None and state.index <= state.now:
            yield f"{at} lists it", state.worker(at, step="read", listed=state.stored)

    def read(self, state: TickState, at: int, worker: Ticker) -> Iterator[tuple[str, TickState]]:
        seen = state.stored if self.guarded("read") else worker.listed
        idle = state.worker(at, **Ticker()._asdict())
        due = seen and not seen.paused and (seen.next <= state.now or not self.guarded("due"))
        if due:
            yield f"{at} reads it", state.worker(at, step="write", seen=seen, watched=state.stored)
        elif state.stored is None or state.stored.paused:
            yield f"{at} finds it gone or paused", idle._replace(index=None)
        elif state.stored.next > state.now:  # heals an index that is wrong
            yield f"{at} finds that it is not due", idle._replace(index=state.stored.next)

    def write(self, state: TickState, at: int, worker: Ticker) -> Iterator[tuple[str, TickState]]:
        if not worker.seen or not worker.watched:
            return
        idle = state.worker(at, **Ticker()._asdict())
        again = state.worker(at, step="read", seen=None, watched=None)
        fails = state.failures < self.failures
        if not self.guarded("together"):
            done = self.enqueued(state, worker.seen)
            yield f"{at} stores the job", done.worker(at, step="advance")
            return
        yield f"{at} writes", self.applied(idle, worker.seen, worker.watched)
        if fails:
            failed = state.failures + 1
            yield (
                f"{at} writes, the reply is lost",
                self.applied(again, worker.seen, worker.watched)._replace(failures=failed),
            )
            late = (*again.flight, (worker.seen, worker.watched))
            yield f"{at} gets no reply, the write may come later", again._replace(flight=late, failures=failed)
            refused = idle._replace(failures=failed)
            yield f"{at} is refused, Redis is full", refused if self.guarded("again") else self.moved(refused)

    def advance(self, state: TickState, at: int, worker: Ticker) -> Iterator[tuple[str, TickState]]:
        yield f"{at} stores the schedule", self.moved(state.worker(at, **Ticker()._asdict()))

    def applied(self, state: TickState, seen: Stored, watched: Stored) -> TickState:
        """Apply the transaction of a tick that has seen the schedule like that."""
        if self.guarded("watch") and state.stored != watched:
            return state
        return self.moved(self.enqueued(state, seen), seen)

    def enqueued(self, state: TickState, seen: Stored) -> TickState:
        """Store the job, unless the tick is too late for it."""
        ticks = [at for at in range(FIRST, state.now + 1, PERIOD) if at >= seen.next] or [seen.next]
        tick = ticks[-1] if self.guarded("fold") else ticks[0]
        late = state.now - tick > self.catchup
        if late and self.guarded("catchup"):
            return state
        fault = ""
        if (seen.edition, tick) in state.jobs:
            fault = f"tick {tick} made two jobs"
        elif tick + PERIOD <= state.now:
            fault = f"tick {tick} did not fold into a later one"
        elif late:
            fault = f"tick {tick} ran at {state.now}, beyond its catch-up time"
        elif not state.stored or state.stored.paused or state.stored.edition != seen.edition:
            fault = f"tick {tick} made a job after the schedule was changed, paused or removed"
        elif tick > state.now:
            fault = f"tick {tick} ran early"
        return state._replace(jobs=(*state.jobs, (seen.edition, tick)), fault=state.fault or fault)

    def moved(self, state: TickState, seen: Stored | None = None) -> TickState:
        """Write the next time into the schedule, and into the index."""
        base = seen or state.stored
        if base is None:
            return state
        later = following(state.now) if self.guarded("fold") else base.next + PERIOD
        stored = base._replace(next=later, version=base.version + 1)
        fault = ""
        missed = [at for at in range(FIRST, state.now + 1, PERIOD) if base.next <= at < later]
        if missed and state.now - missed[-1] <= self.catchup and (base.edition, missed[-1]) not in state.jobs:
            fault = f"tick {missed[-1]} was lost"
        return state._replace(stored=stored, index=later, fault=state.fault or fault)

    def wrong(self, state: TickState) -> str:
        stored = state.stored
        if state.fault:
            return state.fault
        if stored and not stored.paused and (state.index is None or state.index > stored.next):
            return "the schedule is not listed when it is due"
        return "a tick made two jobs" if len(state.jobs) != len(set(state.jobs)) else ""


# Sync -----------------------------------------------------------------------------------------------------------------

DECLARED = {"old": frozenset({"a", "b"}), "new": frozenset({"a"})}


class Entry(NamedTuple):
    """A schedule of the second world. `kept` falls when somebody writes it as if it were new."""

    owner: str  # the code's module, or the API
    kept: bool = True


class Starter(NamedTuple):
    """A worker that syncs: its code, and what it has read."""

    code: str
    step: str = "start"
    seen: tuple[object, ...] = ()


class SyncState(NamedTuple):
    schedules: tuple[tuple[str, Entry], ...]
    codes: tuple[str, ...]  # those that have synced, the newest first
    version: int = 0  # of all that a sync watches
    workers: tuple[Starter, ...] = ()
    stale: bool = False  # no worker of the newest code was seen for some time
    changes: int = 0
    left: bool = False  # the new release was rolled back: all its workers have stopped
    removed: frozenset[str] = frozenset()  # by the API
    fault: str = ""

    def worker(self, at: int, **changes: object) -> SyncState:
        worker = self.workers[at]._replace(**changes)  # type: ignore[arg-type]
        return self._replace(workers=(*self.workers[:at], worker, *self.workers[at + 1 :]))


class Sync:
    """Workers of two releases that start, and an operator. The old release has synced before."""

    def __init__(self, without: str = "", old: int = 2, new: int = 1) -> None:
        self.without = without
        stored = (("a", Entry("code")), ("b", Entry("code")), ("c", Entry("api")))
        workers = (Starter("old"),) * old + (Starter("new"),) * new
        self.first = SyncState(stored, ("old",), workers=workers)

    def guarded(self, guard: str) -> bool:
        return guard != self.without

    def steps(self, state: SyncState) -> Iterator[tuple[str, SyncState]]:
        if not state.left and state.codes[0] == "new":
            stopped = tuple(worker for worker in state.workers if worker.code == "old")
            yield "the new release is rolled back", state._replace(workers=stopped, left=True)
        if state.left and not state.stale:
            yield "the new release was not seen for long", state._replace(stale=True)
        if state.changes < 2:
            yield from self.operates(state)
        for at, worker in enumerate(state.workers):
            if worker.step == "start":
                yield from self.reads(state, at, worker)
            elif worker.step == "write":
                yield from self.writes(state, at, worker)
            else:
                yield f"{at} ({worker.code}) looks again, or starts again", state.worker(at, step="start", seen=())

    def operates(self, state: SyncState) -> Iterator[tuple[str, SyncState]]:
        changed = state._replace(changes=state.changes + 1, version=state.version + 1)
        schedules = dict(state.schedules)
        if "c" in schedules:
            left = tuple(item for item in state.schedules if item[0] != "c")
            yield "c is removed by the API", changed._replace(schedules=left, removed=frozenset("c"))
        if "b" not in schedules:
            mine = tuple(sorted((schedules | {"b": Entry("api")}).items()))
            yield "b is made by the API", changed._replace(schedules=mine)

    def reads(self, state: SyncState, at: int, worker: Starter) -> Iterator[tuple[str, SyncState]]:
        known = worker.code in state.codes[1:]
        replaced = known and not (state.stale and self.guarded("return"))
        done = state.worker(at, step="done")
        if replaced and self.guarded("known"):
            if not (state.stale and state.left):
                yield f"{at} (old) has been replaced", done
            return
        seen = (state.schedules, state.codes, state.version)
        yield f"{at} ({worker.code}) reads", state.worker(at, step="write", seen=seen)

    def writes(self, state: SyncState, at: int, worker: Starter) -> Iterator[tuple[str, SyncState]]:
        if self.guarded("gate") and worker.seen != (state.schedules, state.codes, state.version):
            yield f"{at} ({worker.code}) reads again, something has changed", state.worker(at, step="start", seen=())
            return
        before = dict(worker.seen[0])  # type: ignore[call-overload]
        declared = DECLARED[worker.code]
        after = {}
        for name, entry in before.items():
            if name in declared and (entry.owner == "code" or not self.guarded("owner")):
                after[name] = Entry("code", kept=entry.kept and self.guarded("same"))
            elif entry.owner == "api" and self.guarded("owner"):
                after[name] = entry
        after |= {name: Entry("code") for name in declared if name not in after}
        codes = tuple(dict.fromkeys((worker.code, *state.codes)))
        same = (tuple(sorted(after.items())), codes) == (state.schedules, state.codes)
        version = state.version if same else state.version + 1
        done = state.worker(at, step="done", seen=())
        done = done._replace(schedules=tuple(sorted(after.items())), codes=codes, version=version, stale=False)
        lost = [name for name, entry in state.schedules if entry.owner == "api" and after.get(name) != entry]
        fault = f"{lost} of the API were lost" if lost else ""
        if state.removed & after.keys():
            fault = f"{sorted(state.removed & after.keys())} came back"
        yield f"{at} ({worker.code}) writes", done._replace(fault=state.fault or fault)

    def wrong(self, state: SyncState) -> str:
        schedules = dict(state.schedules)
        if state.fault:
            return state.fault
        if not all(entry.kept for entry in schedules.values()):
            return "a schedule that nobody changed lost its next time"
        ours = {name for name, entry in schedules.items() if entry.owner == "code"}
        if state.codes[0] == "new" and "b" in ours:
            return "older code brought back what was removed"
        if state.codes[0] == "old" and "new" in state.codes and not state.left:
            return "older code took over while newer code runs"
        stuck = state.stale and state.left and all(worker.step != "write" for worker in state.workers)
        if stuck and not any(True for at, worker in enumerate(state.workers) for _ in self.reads(state, at, worker)):
            return "the code that was rolled back to has none of its schedules"
        return ""


@click.command()
@click.option("--workers", default=2, show_default=True)
@click.option("--catchup", default=1, show_default=True)
@click.option("--sync", is_flag=True, help="Search the world of two releases.")
@click.option("--without", type=click.Choice([*TICKS, *SYNC]), help="Leave a guard out.")
def main(workers: int, catchup: int, sync: bool, without: str | None) -> None:
    """Search all states of one of the two worlds."""
    world = Sync(without or "") if sync or without in SYNC else Ticks(workers, without or "", catchup)
    states, why, path = search(world)
    click.echo("\n".join([*path, f"{states} states: {why or 'no state is wrong'}"]))
    sys.exit(bool(why))


if __name__ == "__main__":
    main()
