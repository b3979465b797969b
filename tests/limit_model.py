"""Check limits in every interleaving of small worlds, and that they need each of their guards.

    python tests/limit_model.py [--world ends] [--without GUARD]

All jobs of a world have one limit. A start, an end and a look each read first and write later, and
in between the other side may do anything. If a key that is watched has changed by then, nothing is
written. protocol_model.py has the rest of the protocol, such as leases.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import click
from protocol_model import less, search

GUARDS = {
    "running": "a start watches the set of running ids",
    "batch": "a start counts the room that it has itself used",
    "again": "after a lost reply a start leaves pending ids to adoption: it may have held them",
    "mark": "who holds a job sees that somebody looks at its limit",
    "pace": "a start under a rate is counted in its own transaction",
    "leave": "an end takes the id out of the running ones",
    "wake": "an end wakes the oldest held job",
    "empty": "an end that finds no held job watches that none comes",
    "pass": "a start that drops the id of a limited job wakes the next",
    "look": "somebody looks at a limit with held jobs",
    "drops": "a look drops from the running ids what does not run",
    "held": "a look watches the held jobs: it forgets a limit without any",
    "ahead": "a look counts the woken jobs that nobody has taken yet",
}
# The world in which the search finds the fault that a guard prevents.
NEEDS = {
    **{"running": "ends", "batch": "batch", "again": "lost", "mark": "rate", "pace": "rate", "leave": "ends"},
    **{"wake": "blind", "empty": "blind", "pass": "cancel", "look": "old", "drops": "old", "held": "rate"},
    "ahead": "ahead",
}
WORLDS: dict[str, dict[str, Any]] = {
    "ends": {"jobs": 2},
    "batch": {"jobs": 2, "slots": (2,)},
    "order": {"jobs": 3, "limit": 2},
    "lost": {"jobs": 2, "frail": True, "faults": 1},
    "blind": {"jobs": 2, "looks": False},  # no wake-up is lost, so nobody needs to look
    "cancel": {"jobs": 3, "cancels": 1, "looks": False},
    "purge": {"jobs": 3, "slots": (1,), "cancels": 1, "purges": 1},
    "ahead": {"jobs": 3, "purges": 1},  # 154,246 states: the tests search it only without a guard
    "rate": {"jobs": 2, "limit": 9, "rate": 1},
    "old": {"jobs": 2, "olds": 1},  # a worker of a version without limits ends an attempt
}


class State(NamedTuple):
    records: tuple[str, ...]  # pending, worker that runs it, done, cancelled or gone
    list: tuple[int, ...]  # enter left, leave right
    procs: tuple[tuple[int, ...], ...]
    taken: tuple[frozenset[int], ...]  # what each worker knows: ids that it has taken, and jobs that it runs
    runs: tuple[frozenset[int], ...]
    again: frozenset[tuple[int, int]] = frozenset()  # worker and taken id whose start has lost its reply
    dead: frozenset[int] = frozenset()
    held: frozenset[int] = frozenset()
    running: frozenset[int] = frozenset()
    mark: bool = False
    recent: int = 0  # starts of the last period, as they were counted
    window: int = 0  # as they were
    faults: int = 0
    cancels: int = 0
    purges: int = 0
    olds: int = 0
    flight: tuple[Any, ...] = ()
    bad: str = ""

    def record(self, job: int, status: str) -> State:
        return self._replace(records=(*self.records[:job], status, *self.records[job + 1 :]))

    def put(self, field: str, at: int, value: Any) -> State:
        old = getattr(self, field)
        return self._replace(**{field: (*old[:at], value, *old[at + 1 :])})

    def wake(self, *jobs: int) -> State:
        """Move held jobs to the head of the list, the first to the very head.

        An id may come twice, because ends watch no held job; more often would make the world infinite.
        """
        fresh = [job for job in reversed(jobs) if self.list.count(job) < 2]
        return self._replace(held=self.held.difference(jobs), list=(*self.list, *fresh))


Step = tuple[str, State]


class World:
    def __init__(
        self, jobs: int, *, slots: tuple[int, ...] = (1, 1), limit: int = 1, rate: int = 0, frail: bool = False,
        looks: bool = True, without: str = "", **budgets: int,
    ) -> None:  # fmt: skip
        self.jobs = range(jobs)
        self.slots = slots
        self.limit = limit
        self.rate = rate
        self.frail = frail
        self.looks = looks and without != "look"
        self.without = without
        self.old = bool(budgets.get("olds"))
        self.tidy = bool(budgets.get("purges"))
        none = (frozenset[int](),) * len(slots)
        lists = tuple(reversed(self.jobs))
        self.first = State(("pending",) * jobs, lists, ((),) * len(slots), none, none, **budgets)

    def guarded(self, guard: str) -> bool:
        return guard != self.without

    def steps(self, state: State) -> Iterator[Step]:
        for name, then, _ in self.all_steps(state):
            yield name, then

    def all_steps(self, state: State) -> Iterator[tuple[str, State, bool]]:
        """Yield the steps, and whether each helps: an accident does not.

        A step that changes a key which the other side watches makes that read again.
        """
        flight = state.flight
        for name, then, helps in self.any_steps(state):
            changed = flight and then.flight == flight and self.watched(state, flight) != self.watched(then, flight)
            yield name, then._replace(flight=()) if changed else then, helps

    def any_steps(self, state: State) -> Iterator[tuple[str, State, bool]]:
        for at in range(len(self.slots)):
            if at in state.dead:
                if state.procs[at]:
                    yield f"{at} is reaped", self.reaped(state, at), True
                continue
            yield from self.takes(state, at)
            if state.taken[at]:
                yield from self.begins(state, "start", at, tuple(sorted(state.taken[at])))
            for job in state.runs[at]:
                yield from self.begins(state, "end", at, (job,))
                if state.olds:
                    ended = self.over(state, at, job).record(job, "done")._replace(olds=state.olds - 1)
                    yield f"{at}, an old worker, ends {job}", ended, False
            if self.frail and at == 0:
                lost = state.put("taken", at, frozenset()).put("runs", at, frozenset())
                lost = lost._replace(again=frozenset(pair for pair in state.again if pair[0] != at))
                yield f"{at} crashes", lost._replace(dead=state.dead | {at}), False
        if state.mark and self.looks:
            yield from self.begins(state, "look", 0, ())
        yield from self.happens(state)

    def happens(self, state: State) -> Iterator[tuple[str, State, bool]]:
        if state.window:
            yield "a period ends", state._replace(window=state.window - 1, recent=max(0, state.recent - 1)), True
        for job in self.jobs:
            if state.cancels and state.records[job] == "pending":
                gone = state.record(job, "cancelled")._replace(cancels=state.cancels - 1, held=state.held - {job})
                yield f"cancel {job}", gone, False
            if state.purges and state.records[job] in ("done", "cancelled"):
                yield f"purge {job}", state.record(job, "gone")._replace(purges=state.purges - 1), False

    def takes(self, state: State, at: int) -> Iterator[tuple[str, State, bool]]:
        if state.flight[:2] == ("start", at):  # one thread at a time takes, adopts and starts
            return
        if state.list and len(state.procs[at]) < self.slots[at]:
            job = state.list[-1]
            moved = state._replace(list=state.list[:-1]).put("procs", at, (*state.procs[at], job))
            yield f"{at} takes {job}", moved.put("taken", at, state.taken[at] | {job}), True
        for job in state.procs[at]:
            if job not in state.taken[at] | state.runs[at]:
                yield f"{at} adopts {job}", state.put("taken", at, state.taken[at] | {job}), True

    # What reads first and writes later

    def begins(self, state: State, kind: str, at: int, jobs: tuple[int, ...]) -> Iterator[tuple[str, State, bool]]:
        write = {"start": self.started, "end": self.ended, "look": self.looked}[kind]
        if state.flight[:3] == (kind, at, jobs):
            yield from write(state._replace(flight=()), state.flight[3], at, jobs)
        elif not state.flight:
            yield f"{kind} of {jobs} by {at} reads", state._replace(flight=(kind, at, jobs, state)), False
            yield from write(state, state, at, jobs)
        elif (kind, at) != state.flight[:2] or kind == "end":
            yield from write(state, state, at, jobs)

    def watched(self, state: State, flight: tuple[Any, ...]) -> Any:
        kind, at, jobs, seen = flight
        if kind == "look":
            records = tuple(state.records[job] for job in sorted(seen.held | seen.running))
            held = state.held if self.guarded("held") else ()
            return held, state.running, records if self.guarded("records") else ()
        running = state.running if kind == "start" and self.guarded("running") else ()
        held = state.held if kind == "end" and not seen.held and self.guarded("empty") else ()
        return at in state.dead, [state.records[job] for job in jobs], running, held

    def started(self, state: State, seen: State, at: int, jobs: tuple[int, ...]) -> Iterator[tuple[str, State, bool]]:
        mine = [job for job in jobs if seen.records[job] == "pending"]
        again = {job for job in jobs if (at, job) in state.again}
        leave = [job for job in mine if job in again and self.guarded("again")]
        admitted, woken = self.admit(seen, [job for job in mine if job not in leave])
        then = state._replace(again=state.again - {(at, job) for job in jobs}).put(
            "taken", at, state.taken[at] - set(jobs)
        )
        redis = state
        for job in jobs:
            if job in leave or (seen.records[job] == str(at) and job in again):
                continue
            redis = self.one(redis, seen, at, job, job in admitted)
        redis = redis.wake(*woken)
        mark = redis.mark or (self.guarded("mark") and any(job not in admitted and job not in leave for job in mine))
        redis = redis._replace(mark=mark)
        runs = {job for job in jobs if redis.records[job] == str(at)}
        known = redis._replace(again=then.again, taken=then.taken).put("runs", at, state.runs[at] | runs)
        yield f"{at} starts {sorted(runs)} of {jobs}", known, True
        if state.faults:
            yield (
                f"{at} starts {sorted(runs)} of {jobs}, the reply is lost",
                redis._replace(again=state.again | {(at, job) for job in jobs}, faults=state.faults - 1),
                False,
            )

    def admit(self, seen: State, mine: list[int]) -> tuple[set[int], list[int]]:
        """Return which of the taken jobs may start, and which held ones to wake instead."""
        left = self.left(seen, seen.running)
        if not mine or left < 1:
            return set(), []
        if not self.guarded("batch"):
            return set(mine), []
        oldest = sorted({*mine, *(seen.held if self.guarded("oldest") else ())})[:left]
        first = [job for job in oldest if job <= max(mine)]
        return set(first) & set(mine), [job for job in first if job not in mine]

    def left(self, seen: State, running: frozenset[int]) -> int:
        left = self.limit - len(running)
        return min(left, self.rate - seen.recent) if self.rate else left

    def one(self, state: State, seen: State, at: int, job: int, admitted: bool) -> State:
        if admitted:
            older = [other for other in seen.held if other < job and seen.records[other] == "pending"]
            counted = state.recent + 1 if self.guarded("pace") else state.recent
            then = state.record(job, str(at))._replace(running=state.running | {job}, held=state.held - {job})
            then = then._replace(recent=counted if self.rate else 0, window=state.window + 1 if self.rate else 0)
            late = older and not self.guarded("oldest")
            return then._replace(bad=f"{job} overtakes {older[0]}, which is held") if late else then
        then = state.put("procs", at, less(state.procs[at], job))
        if seen.records[job] == "pending":
            return then._replace(held=then.held | {job})
        known = seen.records[job] != "gone" and self.guarded("pass") and not self.rate
        return then.wake(*sorted(seen.held)[:1]) if known else then

    def over(self, state: State, at: int, job: int) -> State:
        return state.put("procs", at, less(state.procs[at], job)).put("runs", at, state.runs[at] - {job})

    def ended(self, state: State, seen: State, at: int, jobs: tuple[int, ...]) -> Iterator[tuple[str, State, bool]]:
        [job] = jobs
        if seen.records[job] != str(at):
            yield f"{at} no longer has {job}", state.put("runs", at, state.runs[at] - {job}), True
            return
        then = self.woken(self.over(state, at, job).record(job, "done"), seen, job)
        yield f"{at} completes {job}", then, True
        back = self.over(state, at, job).record(job, "pending")
        yield f"{at} releases {job}", self.woken(back._replace(list=(*back.list, job)), seen, job), False

    def woken(self, state: State, seen: State, job: int) -> State:
        if self.guarded("leave"):
            state = state._replace(running=state.running - {job})
        return state.wake(*sorted(seen.held)[:1]) if self.guarded("wake") and not self.rate else state

    def reaped(self, state: State, at: int) -> State:
        for job in dict.fromkeys(state.procs[at]):
            if state.records[job] == str(at):
                back = state.record(job, "pending")
                state = self.woken(back._replace(list=(*back.list, job)), back, job)
            elif state.records[job] == "pending":
                state = state._replace(list=(*state.list, job))
        return state.put("procs", at, ())

    def looked(self, state: State, seen: State, at: int, jobs: tuple[int, ...]) -> Iterator[tuple[str, State, bool]]:
        runs = {job for job in seen.running if seen.records[job].isdigit()}
        drops = seen.running - runs if self.guarded("drops") else frozenset()
        pending = [job for job in sorted(seen.held) if seen.records[job] == "pending"]
        ahead = {job for job in seen.list if seen.records[job] == "pending"} - seen.held
        left = self.left(seen, seen.running - drops) - (len(ahead) if self.guarded("ahead") else 0)
        moved = pending[: max(0, left)]
        then = state._replace(running=state.running - drops, held=state.held.intersection(pending)).wake(*moved)
        if not self.guarded("held"):
            then = then._replace(held=then.held | (state.held - seen.held))
        if self.tidy and len(moved) + len(ahead) > self.limit and moved:
            then = then._replace(bad=f"a look wakes {moved} although {sorted(ahead)} are woken")
        if len(moved) == len(pending):
            then = then._replace(mark=False)
        yield f"a look wakes {moved} and drops {sorted(drops)}", then, then != state

    # States that must never occur

    def wrong(self, state: State) -> str:
        runs = {job for job in self.jobs if state.records[job].isdigit()}
        waiting = {job for job in self.jobs if state.records[job] == "pending"}
        places = {*state.list, *state.held, *(job for proc in state.procs for job in proc)}
        loose = [job for job in runs if job not in state.procs[int(state.records[job])]]
        rules = {
            f"{sorted(runs)} run at a time": len(runs) > self.limit,
            f"{state.window} started in one period": 0 < self.rate < state.window,
            "other ids count as running than run": not self.old and state.running != runs,
            f"{sorted(runs - state.running)} run uncounted": bool(runs - state.running),
            f"{sorted(waiting - places)} are pending, and nobody can find them": bool(waiting - places),
            f"{loose} run, and a reaper would not find them": bool(loose),
            "nobody looks at the held jobs": self.looks and bool(state.held & waiting) and not state.mark,
        }
        found = state.bad or next((rule for rule, broken in rules.items() if broken), "")
        if (
            not found
            and not state.flight
            and (runs or waiting)
            and not any(helps for _, then, helps in self.all_steps(state))
        ):
            return f"{sorted(runs | waiting)} are stuck"
        return found


@click.command()
@click.option("--world", type=click.Choice(list(WORLDS)), help="Search this world; all by default.")
@click.option("--without", type=click.Choice(list(GUARDS)), help="Leave a guard out.")
def main(world: str | None, without: str | None) -> None:
    """Search all states of small worlds of jobs with one limit."""
    broken = False
    for name in [world] if world else WORLDS:
        states, why, path = search(World(**WORLDS[name], without=without or ""))
        broken = broken or bool(why)
        click.echo("\n".join([*path, f"{name}: {states} states: {why or 'no state is wrong'}"]))
    sys.exit(broken)


if __name__ == "__main__":
    main()
