"""All interleavings of small worlds of jobs that wait for others: submit, ends, revivals, purges, and two advancers.

    python tests/dependency_model.py --world join
    python tests/dependency_model.py --world join --without carry

It searches the rules of tinyqueue.py. A transaction is one step if it watches what it reads. Without
a guard it may be two: what it has read may then be old when it writes. An advancer handles one
dependent in each transaction, so every world has chunks. In a state in which nothing is left to
advance, no job may wait for one that has ended, and none may stay failed because of one that has
not failed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import click
from protocol_model import search

GUARDS = {
    "mark": "submit watches the parents' records, and marks them as followed",
    "carry": "an outcome takes the mark from the stored record, not from the worker's copy",
    "push": "the end of a followed job pushes a token onto advance",
    "revive": "the revival of a followed job pushes a token onto advance",
    "parent": "advance watches the parent's record",
    "dependents": "advance watches the dependents' records",
    "last": "the last transaction of advance removes its tokens, not an earlier one",
    "unique": "no two tokens are equal, so an advancer removes only those that it has read",
    "enter": "a job whose parent has failed before is entered in next, too, and its parent is marked",
    "rest": "a job that is brought back has its other parents looked at again",
    "late": "the completion of a parent brings back the jobs that failed because of it",
    "waits": "the retry of a job that waits for parents lists it nowhere",
    "relink": "the retry of a job that waits for parents enters it in their next again",
    "every": "a completed parent leaves the waitingFor of ended jobs, too",
    "handled": "advance removes only the dependents that it has handled from next",
    "status": "a token has the status of the end, because the parent may be gone",
    "gone": "the token of a revival does nothing when the parent is gone",
    "persist": "a revival removes the time to live of next",
    "together": "the jobs of a batch are stored in one transaction",
    "hasten": "a job that waits for parents is not hastened",
}
ENDED = ("completed", "failed", "cancelled")


class Record(NamedTuple):
    status: str = "none"
    waiting: frozenset[int] = frozenset()
    followed: bool = False
    copied: bool = False  # whether the running worker's copy has the mark
    cause: int = -1  # the parent because of which it failed
    gone: bool = False  # it was purged, or has expired


class Token(NamedTuple):
    job: int
    status: str
    number: int


class Advancer(NamedTuple):
    """What an advancer has read: the tokens of a job, its dependents that are left, and perhaps their old records."""

    job: int
    tokens: tuple[Token, ...]
    left: tuple[int, ...]
    status: str = ""
    record: Record | None = None


class State(NamedTuple):
    records: tuple[Record, ...]
    list: frozenset[int]
    next: tuple[frozenset[int], ...]
    expiring: frozenset[int] = frozenset()  # the jobs whose next has a time to live
    tokens: tuple[Token, ...] = ()
    advancers: tuple[Advancer | None, ...] = (None,)
    submits: tuple[Any, ...] = ()  # a batch, and the records of its parents as they were read
    retries: int = 0
    cancels: int = 0
    fails: int = 0
    purges: int = 0
    crashes: int = 0
    bad: str = ""

    def record(self, job: int, **changes: Any) -> State:
        changed = self.records[job]._replace(**changes)
        return self._replace(records=(*self.records[:job], changed, *self.records[job + 1 :]))

    def enter(self, parent: int, *jobs: int) -> State:
        entered = self.next[parent] | set(jobs)
        return self._replace(next=(*self.next[:parent], entered, *self.next[parent + 1 :]))

    def leave(self, parent: int, jobs: frozenset[int]) -> State:
        left = self.next[parent] - jobs
        return self._replace(next=(*self.next[:parent], left, *self.next[parent + 1 :]))

    def advancer(self, at: int, changed: Advancer | None) -> State:
        return self._replace(advancers=(*self.advancers[:at], changed, *self.advancers[at + 1 :]))


Step = tuple[str, State]


class Dependencies:
    """A world: the parents of each job, the batches in which they are submitted, and how often what may go wrong."""

    def __init__(
        self,
        parents: tuple[tuple[int, ...], ...],
        batches: tuple[tuple[int, ...], ...] = (),
        run: tuple[int, ...] = (),
        without: str = "",
        advancers: int = 2,
        **budgets: int,
    ) -> None:
        self.parents = parents
        self.run = run  # with onFailure "run"
        self.without = without
        self.batches = batches or tuple((job,) for job in range(len(parents)))
        nothing: frozenset[int] = frozenset()
        jobs = (Record(),) * len(parents)
        self.first = State(jobs, nothing, (nothing,) * len(parents), advancers=(None,) * advancers, **budgets)

    def guarded(self, guard: str) -> bool:
        return guard != self.without

    def steps(self, state: State) -> Iterator[Step]:
        for batch in self.batches:
            yield from self.submits(state, batch)
        if state.submits:
            yield f"EXEC of submit {state.submits[0]}", self.submitted(state, *state.submits)
        for job, record in enumerate(state.records):
            if not record.gone:
                yield from self.lives(state, job, record)
            if job in state.expiring and self.may_expire(state, job, record):
                yield (
                    f"next of {job} expires",
                    state.leave(job, state.next[job])._replace(expiring=state.expiring - {job}),
                )
        for at, advancer in enumerate(state.advancers):
            yield from self.advances(state, at, advancer)

    def may_expire(self, state: State, job: int, record: Record) -> bool:
        """Whether the time to live of next may be over. It is days, so no token of the job waits for so long."""
        reading = any(advancer and advancer.job == job for advancer in state.advancers)
        waiting = reading or any(token.job == job for token in state.tokens)
        return not waiting and (record.gone or record.status not in ("failed", "cancelled"))

    # Submit

    def submits(self, state: State, batch: tuple[int, ...]) -> Iterator[Step]:
        if state.submits or any(state.records[job].status != "none" for job in batch):
            return
        outside = {parent for job in batch for parent in self.parents[job]} - set(batch)
        if any(state.records[parent].status == "none" for parent in outside):
            return
        if any(state.records[parent].gone for parent in outside):
            return  # refused: a parent is missing
        seen = tuple((parent, state.records[parent]) for parent in sorted(outside))
        if self.guarded("together"):
            if self.guarded("mark"):
                yield f"submit {batch}", self.submitted(state, batch, seen)
            else:
                yield f"submit {batch} reads", state._replace(submits=(batch, seen))
            return
        first = batch[0]  # in a transaction of its own: the process may crash before the next one
        alone = self.submitted(state, (first,), seen, known=batch)
        yield f"submit only {first} of {batch}", alone

    def submitted(self, state: State, batch: tuple[int, ...], seen: Any, known: tuple[int, ...] = ()) -> State:
        state = state._replace(submits=())
        found = dict(seen)
        for job in batch:
            waiting = set()
            for parent in self.parents[job]:
                before = found.get(parent, Record("pending"))
                over = before.status == "completed" or (before.status in ENDED and job in self.run)
                if over:
                    continue
                waiting.add(parent)
                if before.status in ENDED and not self.guarded("enter"):
                    continue
                state = state.enter(parent, job)
                if parent in found and self.guarded("mark"):
                    state = state.record(parent, followed=True)
                if before.status in ENDED:
                    state = self.push(state, parent, before.status)
            mark = any(job in self.parents[other] for other in known or batch)
            state = state.record(job, status="pending", waiting=frozenset(waiting), followed=mark)
            for parent in waiting:
                if state.records[parent].status in ENDED and not self.guarded("enter"):
                    state = state.record(job, status="failed", cause=parent)
            if not waiting:
                state = state._replace(list=state.list | {job})
        return state

    # The life of a job

    def lives(self, state: State, job: int, record: Record) -> Iterator[Step]:
        if job in state.list:
            rest = state._replace(list=state.list - {job})
            yield f"{job} is taken", self.started(rest, job) if record.status == "pending" else rest
        if record.status == "processing":
            mark = record.followed if self.guarded("carry") else record.copied
            over = state.record(job, followed=mark)
            yield f"{job} completes", self.end(over, job, "completed")
            if state.fails:
                yield f"{job} fails", self.end(over._replace(fails=state.fails - 1), job, "failed")
        if record.status == "pending" and record.waiting and not self.guarded("hasten"):
            yield f"hasten {job}", state._replace(list=state.list | {job})
        if record.status == "pending" and state.cancels:
            yield f"cancel {job}", self.end(state._replace(cancels=state.cancels - 1), job, "cancelled")
        if record.status in ("failed", "cancelled") and state.retries:
            yield f"retry {job}", self.revived(state._replace(retries=state.retries - 1), job)
        if record.status in ENDED and state.purges:
            yield f"{job} is purged", state.record(job, gone=True)._replace(purges=state.purges - 1)

    def started(self, state: State, job: int) -> State:
        early = [parent for parent in self.parents[job] if state.records[parent].status != "completed"]
        if early and job not in self.run:
            state = state._replace(bad=f"{job} starts while {early[0]} is {state.records[early[0]].status}")
        return state.record(job, status="processing", copied=state.records[job].followed)

    def end(self, state: State, job: int, status: str, cause: int = -1) -> State:
        state = state.record(job, status=status, cause=cause)
        marked = state.records[job].followed and self.guarded("push")
        return self.push(state, job, status) if marked else state

    def revived(self, state: State, job: int, seen: int = -1) -> State:
        """Requeue an ended job. `seen` is the parent that the caller has looked at."""
        record = state.records[job]
        state = state.record(job, status="pending", cause=-1)
        if not record.waiting or not self.guarded("waits"):
            state = state._replace(list=state.list | {job})
        if record.followed and self.guarded("revive"):
            state = self.push(state, job, "pending")
        if self.guarded("persist"):
            state = state._replace(expiring=state.expiring - {job})
        for parent in sorted(record.waiting - {seen}):
            if self.guarded("relink"):
                state = state.enter(parent, job)
                state = state._replace(expiring=state.expiring - {parent})
            if self.guarded("rest") or seen < 0:
                state = self.push(state, parent, "")
        return state

    def push(self, state: State, job: int, status: str) -> State:
        """Push a token with the smallest unused number; a counter would make the world infinite."""
        read = [token for advancer in state.advancers if advancer for token in advancer.tokens]
        used = {token.number for token in (*state.tokens, *read) if token[:2] == (job, status)}
        number = min(set(range(len(used) + 1)) - used) if self.guarded("unique") else 0
        return state._replace(tokens=(*state.tokens, Token(job, status, number)))

    # Advance

    def advances(self, state: State, at: int, advancer: Advancer | None) -> Iterator[Step]:
        if advancer is None:
            for job in sorted({token.job for token in state.tokens}):
                tokens = tuple(token for token in state.tokens if token.job == job)
                read = state.advancer(at, Advancer(job, tokens, tuple(sorted(state.next[job]))))
                yield f"{at} reads the tokens of {job}", read if self.guarded("last") else self.remove(read, tokens)
            return
        if state.crashes:
            yield f"{at} crashes", state.advancer(at, None)._replace(crashes=state.crashes - 1)
        status = self.status_of(state, advancer)
        stale = not self.guarded("parent") or not self.guarded("dependents")
        if stale and not advancer.status and advancer.left:
            seen = state.records[advancer.left[0]]
            yield f"{at} reads {advancer.left[0]}", state.advancer(at, advancer._replace(status=status, record=seen))
            return
        if advancer.status and not self.guarded("parent"):
            status = advancer.status
        yield (
            f"{at} advances {advancer.left[:1]} of {advancer.job}, {status}",
            self.advanced(state, at, advancer, status),
        )

    def status_of(self, state: State, advancer: Advancer) -> str:
        record = state.records[advancer.job]
        if not record.gone:
            return record.status
        known = {token.status for token in advancer.tokens} if self.guarded("status") else {"failed"}
        if "completed" in known:
            return "completed"
        return "pending" if known == {"pending"} else "failed"

    def advanced(self, state: State, at: int, advancer: Advancer, status: str) -> State:
        """Handle one dependent. The last transaction removes the tokens."""
        parent = advancer.job
        for job in advancer.left[:1]:
            if not state.records[job].gone:
                state = self.follow(state, job, parent, status, advancer)
            if status == "completed" and self.guarded("handled"):
                state = state.leave(parent, frozenset({job}))
        if advancer.left[1:]:
            return state.advancer(at, advancer._replace(left=advancer.left[1:], status="", record=None))
        if status == "completed" and not self.guarded("handled"):
            state = state.leave(parent, state.next[parent])
        if status in ("failed", "cancelled") and state.next[parent]:
            state = state._replace(expiring=state.expiring | {parent})
        return self.remove(state.advancer(at, None), advancer.tokens)

    def remove(self, state: State, tokens: tuple[Token, ...]) -> State:
        left = list(state.tokens)
        for token in tokens:
            if token in left:
                left.remove(token)
        return state._replace(tokens=tuple(left))

    def follow(self, state: State, job: int, parent: int, status: str, advancer: Advancer) -> State:
        stored = state.records[job]
        record = stored
        if advancer.record and not self.guarded("dependents"):
            record = advancer.record
            state = state.record(job, **record._asdict())  # written as it was read
        gone = state.records[parent].gone
        if parent not in record.waiting or (gone and status == "pending" and self.guarded("gone")):
            return state
        over = status == "completed" or (status in ENDED and job in self.run)
        because = record.status == "failed" and record.cause == parent
        if over and (record.status == "pending" or because or self.guarded("every")):
            record = record._replace(waiting=record.waiting - {parent})
            state = state.record(job, waiting=record.waiting)
        if because and ((over and self.guarded("late")) or status in ("pending", "processing")):
            return self.revived(state, job, parent)
        if record.status == "pending" and over and not record.waiting:
            return state._replace(list=state.list | {job})
        if record.status == "pending" and status in ENDED and not over:
            return self.end(state, job, "failed", parent)
        return state

    # States that must never occur

    def wrong(self, state: State) -> str:
        if state.bad or state.tokens or state.submits or any(state.advancers):
            return state.bad
        found = (self.wrong_with(state, job, record) for job, record in enumerate(state.records) if not record.gone)
        return next(filter(None, found), "")

    def wrong_with(self, state: State, job: int, record: Record) -> str:
        statuses = {parent: state.records[parent].status for parent in (*self.parents[job], record.cause)}
        ended = [parent for parent in record.waiting if statuses[parent] in ENDED]
        never = [parent for parent in record.waiting if statuses[parent] == "none"]
        in_vain = (
            record.status == "failed" and record.cause >= 0 and statuses[record.cause] not in ("failed", "cancelled")
        )
        rules = {
            f"{job} is pending, waits for nothing and is not listed": record.status == "pending"
            and not record.waiting
            and job not in state.list,
            f"{job} waits for ever for {ended}": record.status == "pending" and bool(ended),
            f"{job} waits for {never}, which was not stored": record.status == "pending" and bool(never),
            f"{job} stays failed because of {record.cause}": in_vain,
        }
        return next((rule for rule, broken in rules.items() if broken), "")


# A world in which each guard is needed, unless that is the first one.
NEEDED_IN = {
    "unique": "fan",
    "rest": "join",
    "relink": "purge",
    "every": "purge",
    "handled": "fan",
    "status": "purge",
    "gone": "purge",
    "together": "batch",
}
WORLDS: dict[str, dict[str, Any]] = {
    "two": {"parents": ((), (0,)), "retries": 2, "cancels": 1, "fails": 2, "crashes": 1},
    "chain": {"parents": ((), (0,), (1,)), "retries": 1, "cancels": 1, "fails": 1},
    "join": {"parents": ((), (), (0, 1)), "retries": 1, "fails": 2},
    "fan": {"parents": ((), (0,), (0,)), "retries": 1, "fails": 1, "crashes": 1},
    "diamond": {
        "parents": ((), (0,), (0,), (1, 2)),
        "batches": ((0,), (1, 2, 3)),
        "retries": 1,
        "fails": 1,
        "advancers": 1,
    },
    "batch": {"parents": ((), (0,), (0, 1)), "batches": ((2, 1, 0),), "retries": 1, "fails": 1},
    "run": {"parents": ((), (), (0, 1)), "run": (2,), "retries": 1, "cancels": 1, "fails": 1},
    "purge": {"parents": ((), (0,)), "retries": 2, "cancels": 1, "fails": 1, "purges": 1, "crashes": 1},
    "purge-join": {"parents": ((), (), (0, 1)), "retries": 1, "cancels": 1, "fails": 1, "purges": 1, "advancers": 1},
}


@click.command()
@click.option("--world", type=click.Choice(list(WORLDS)), default="two", show_default=True)
@click.option("--without", type=click.Choice(list(GUARDS)), help="Leave a guard out.")
def main(world: str, without: str | None) -> None:
    """Search all states of a world."""
    states, why, path = search(Dependencies(**WORLDS[world], without=without or ""))
    click.echo("\n".join([*path, f"{states} states: {why or 'no state is wrong'}"]))
    sys.exit(bool(why))


if __name__ == "__main__":
    main()
