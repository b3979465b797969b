"""Check the protocol in every interleaving of a small world, and that it needs each of its guards.

    python tests/protocol_model.py [--jobs 1] [--workers 3] [--pill] [--without GUARD]

A step is a transition of the table in tinyqueue.py or a failure of a worker: a crash, a lost
reply, an expired lease. With --pill, the first job kills every worker that runs it, nothing else
fails, and a worker that was reaped is replaced. Then no other job may fail, and the pill must end.
With --without, one of the guards is left out. Then the search finds a wrong state, and prints the
steps to it.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import click

MAX_ATTEMPTS = 2
SUSPICIOUS = 1  # in the code it is 2, but 1 makes the world smaller
GUARDS = {
    "fence": "a worker writes only while it is registered",
    "owner": "reap requeues a processing job only if it is under the lost worker's name",
    "again": "the list of a reaped worker is read again",
    "adopt": "a worker adopts the ids in its list that it does not know",
    "once": "only a pending job starts, so an id that is taken twice starts once",
    "beside": "an attempt that was lost beside others does not count",
    "alone": "a job that was lost beside others too often runs alone",
    "leave": "after a lost reply start neither starts nor drops an id: it may have done so already",
    "cycle": "one thread of a worker at a time takes, adopts and starts",
    "same": "an outcome is written only for its own attempt: after a lost reply it may be written again",
    "callback": "the transaction that ends a job enqueues the delivery to its callbackUrl",
    "hasten": "hasten watches the record: the job may have started since it was read",
    "quiet": "only a registered worker becomes quiet",
    "unmark": "reap removes the mark of a quiet worker",
}


class Record(NamedTuple):
    status: str = "pending"
    due: bool = True
    attempts: int = 0
    begun: int = 0  # differs from every start that a worker remembers, as startedAt does in the code
    retries: int = 0
    worker: int | None = None
    suspicions: int = 0


class Worker(NamedTuple):
    """What Redis stores of a worker, and what the worker knows: ids it has taken, jobs it runs."""

    proc: tuple[int, ...] = ()
    registered: bool = True
    leased: bool = True
    alive: bool = True
    taken: frozenset[int] = frozenset()
    again: frozenset[int] = frozenset()  # the taken ids whose start has lost a reply
    runs: frozenset[int] = frozenset()
    coming: frozenset[int] = frozenset()  # started by an exchange whose reply is on its way
    twice: bool = False  # two of its slots run one job
    doubts: frozenset[tuple[int, int, int]] = frozenset()  # settled, but the reply was lost: job, attempts, begun
    owes: frozenset[int] = frozenset()  # without the guard "callback": jobs whose delivery it will enqueue


class State(NamedTuple):
    records: tuple[Record, ...]
    workers: tuple[Worker, ...]
    list: tuple[int, ...]  # enter left, leave right
    delayed: frozenset[int] = frozenset()
    completed: tuple[int, ...] = ()  # how many times each job was completed
    ends: tuple[int, ...] = ()  # how many times each job has ended
    deliveries: tuple[int, ...] = ()  # how many deliveries each job has enqueued
    kills: int = 0
    quiet: frozenset[int] = frozenset()  # the workers that take nothing
    hasty: frozenset[int] = frozenset()  # without the guard "hasten": the jobs that hasten has read

    def record(self, job: int, **changes: object) -> State:
        record = self.records[job]._replace(**changes)  # type: ignore[arg-type]
        return self._replace(records=(*self.records[:job], record, *self.records[job + 1 :]))

    def ended(self, job: int, status: str) -> State:
        """End a job."""
        return self.record(job, status=status, worker=None)._replace(ends=one_more(self.ends, job))

    def worker(self, at: int, **changes: object) -> State:
        worker = self.workers[at]._replace(**changes)  # type: ignore[arg-type]
        return self._replace(workers=(*self.workers[:at], worker, *self.workers[at + 1 :]))


Step = tuple[str, State]


class World:
    def __init__(self, jobs: int, workers: int, pill: bool = False, without: str = "") -> None:
        self.jobs = range(jobs)
        self.pill = pill
        self.without = without
        # Larger worlds would have millions of states.
        self.timed = jobs * workers <= 2 and jobs == 1  # has jobs that are not due
        self.detailed = jobs * workers == 1  # has lost replies of settle, retries and quiet workers, too
        self.first = State((Record(),) * jobs, (Worker(),) * workers, tuple(self.jobs))
        self.first = self.first._replace(**dict.fromkeys(("completed", "ends", "deliveries"), (0,) * jobs))

    def guarded(self, guard: str) -> bool:
        return guard != self.without

    # Steps

    def steps(self, state: State) -> Iterator[Step]:
        for at, worker in enumerate(state.workers):
            if worker.alive:
                yield from self.takes(state, at)
                yield from self.starts(state, at)
                yield from self.settles(state, at)
                yield from self.learns(state, at)
                yield from self.sleeps(state, at)
                yield from self.reports(state, at)
            if not worker.leased:
                yield from self.is_reaped(state, at)
            if self.detailed:
                yield from self.is_told(state, at)
        for job in self.jobs:
            yield from self.hastens(state, job)
            if not state.records[job].due:
                yield f"the time of {job} comes", state.record(job, due=True)
            if state.records[job].status == "failed" and self.detailed and not state.records[job].retries:
                yield (
                    f"retry {job}",
                    state.record(job, status="pending", attempts=0, retries=1)._replace(list=(job, *state.list)),
                )
        for job in (job for job in state.delayed if state.records[job].due):
            delayed = state.delayed - {job}
            yield f"promote {job}", state._replace(delayed=delayed, list=(job, *state.list))
            if len(state.list) < 2:
                yield f"promote {job} twice", state._replace(delayed=delayed, list=(job, job, *state.list))
        for job in self.jobs if not self.pill else ():
            if state.records[job].status == "pending":
                cancelled = state.ended(job, "cancelled")._replace(delayed=state.delayed - {job})
                yield f"cancel {job}", self.delivered(cancelled, job)

    def hastens(self, state: State, job: int) -> Iterator[Step]:
        """Let a delayed job start now. Without the guard, it writes what it has read before."""
        delayed = state.records[job].status == "pending" and not state.records[job].due
        if job in state.hasty or (delayed and self.guarded("hasten")):
            pending = state.record(job, status="pending", due=True, worker=None)
            moved = pending._replace(delayed=state.delayed - {job}, list=(*state.list, job))
            yield f"hasten {job}", moved._replace(hasty=state.hasty - {job})
        elif delayed:
            yield f"hasten reads {job}", state._replace(hasty=state.hasty | {job})

    def is_told(self, state: State, at: int) -> Iterator[Step]:
        if at in state.quiet:
            yield f"{at} resumes", state._replace(quiet=state.quiet - {at})
        elif state.workers[at].registered or not self.guarded("quiet"):
            yield f"{at} becomes quiet", state._replace(quiet=state.quiet | {at})

    def takes(self, state: State, at: int) -> Iterator[Step]:
        worker = state.workers[at]
        if at in state.quiet or (worker.coming and self.guarded("cycle")):
            return
        if state.list and len(worker.proc) < 2:
            job = state.list[-1]
            moved = state._replace(list=state.list[:-1]).worker(at, proc=(*worker.proc, job))
            yield f"{at} takes {job}", moved.worker(at, taken=worker.taken | {job})
            yield f"{at} takes {job}, the reply is lost", moved
        for job in worker.proc if self.guarded("adopt") else ():
            if job not in worker.taken | worker.runs | {doubt[0] for doubt in worker.doubts}:
                yield f"{at} adopts {job}", state.worker(at, taken=worker.taken | {job})

    def starts(self, state: State, at: int) -> Iterator[Step]:
        worker = state.workers[at]
        for job in () if worker.coming and self.guarded("cycle") else worker.taken:
            record = state.records[job]
            known = state.worker(at, taken=worker.taken - {job}, again=worker.again - {job})
            again = state.worker(at, again=worker.again | {job})
            ours = (record.status, record.worker) == ("processing", at)
            begun_before = ours and job not in worker.runs and not self.seems_held(worker, job, record)
            if self.guarded("fence") and not worker.registered:
                yield f"{at} finds itself reaped with {job}", known
            elif begun_before:
                yield f"{at} learns that it started {job}", known.worker(at, runs=worker.runs | {job})
            elif self.guarded("leave") and job in worker.again:
                yield f"{at} leaves {job} to adoption", known
            elif record.status == "pending" and self.must_wait(state, at, job):
                continue
            elif (record.status == "pending" and record.due) or (
                not self.guarded("once") and record.status == "processing"
            ):
                yield f"{at} starts {job}", self.begun(known, at, job).worker(at, runs=worker.runs | {job})
                yield f"{at} starts {job}, the reply is lost", self.begun(again, at, job)
            else:
                delayed = state.delayed | {job} if record.status == "pending" else state.delayed
                dropped = less(worker.proc, job)
                yield f"{at} drops {job}", known.worker(at, proc=dropped)._replace(delayed=delayed)
                if self.detailed:
                    yield (
                        f"{at} drops {job}, the reply is lost",
                        again.worker(at, proc=dropped)._replace(delayed=delayed),
                    )

    def begun(self, state: State, at: int, job: int) -> State:
        changes = {"status": "processing", "attempts": state.records[job].attempts + 1, "worker": at}
        return state.record(job, begun=self.unused(state, job), **changes)

    def unused(self, state: State, job: int) -> int:
        """The smallest number that no worker remembers; a counter would make the world infinite."""
        remembered = {doubt[2] for worker in state.workers for doubt in worker.doubts if doubt[0] == job}
        return next(number for number in itertools.count(1) if number not in remembered)

    def seems_held(self, worker: Worker, job: int, record: Record) -> bool:
        """Whether the worker still holds the very attempt in the record, because a reply to settle was lost."""
        return (job, record.attempts, record.begun) in worker.doubts

    def must_wait(self, state: State, at: int, job: int) -> bool:
        """A suspect waits for an idle worker, and all jobs wait for a suspect that runs."""
        if not self.guarded("alone"):
            return False
        ours = [j for j in self.jobs if (state.records[j].status, state.records[j].worker) == ("processing", at)]
        return bool(ours) and any(state.records[j].suspicions >= SUSPICIOUS for j in (job, *ours))

    def settles(self, state: State, at: int) -> Iterator[Step]:
        worker = state.workers[at]
        for doubt in worker.doubts:
            job = doubt[0]
            known = state.worker(at, doubts=worker.doubts - {doubt})
            ours = (state.records[job].status, state.records[job].worker) == ("processing", at)
            if ours and not self.guarded("same"):
                written = known.worker(at, proc=less(worker.proc, job)).ended(job, "failed")
                yield f"{at} writes the outcome of {job} again", written
            else:
                yield f"{at} learns that it settled {job}", known
        for job in worker.runs:
            if self.pill and job == 0:
                yield f"{job} kills {at}", lost(state, at)._replace(kills=state.kills + 1)
            elif self.guarded("fence") and not worker.registered:
                over = state.worker(at, runs=worker.runs - {job})
                yield f"{at} may not write the outcome of {job}", over
            else:
                for name, settled in self.ends(state, at, job):
                    yield f"{at} {name}", settled
                    yield from self.exchanges(state, settled, at, job, name)

    def ends(self, state: State, at: int, job: int) -> Iterator[Step]:
        """Settle a job in every way."""
        worker = state.workers[at]
        over = state.worker(at, runs=worker.runs - {job}, proc=less(worker.proc, job))
        attempts = state.records[job].attempts
        completed = over.ended(job, "completed")._replace(completed=one_more(state.completed, job))
        yield f"completes {job}", self.called_back(completed, at, job)
        if self.pill:
            return
        if attempts < MAX_ATTEMPTS:
            later = over.record(job, status="pending", due=not self.timed, worker=None)
            yield f"fails {job}", later._replace(delayed=state.delayed | {job})
        failed = self.called_back(over.ended(job, "failed"), at, job)  # at any attempt: a handler may give up early
        yield f"fails {job} for good", failed
        if self.detailed:
            doubt = (job, attempts, state.records[job].begun)
            yield f"fails {job} for good, the reply is lost", failed.worker(at, doubts=worker.doubts | {doubt})
        back = over.record(job, status="pending", worker=None, attempts=attempts - 1)
        yield f"releases {job}", back._replace(list=(*state.list, job))
        if self.timed:
            yield f"cannot read {job}", back._replace(delayed=state.delayed | {job})

    def called_back(self, state: State, at: int, job: int) -> State:
        """Enqueue the delivery of a job that this worker has ended, or leave it for later."""
        if self.guarded("callback"):
            return self.delivered(state, job)
        return state.worker(at, owes=state.workers[at].owes | {job})

    def delivered(self, state: State, job: int) -> State:
        return state._replace(deliveries=one_more(state.deliveries, job))

    def reports(self, state: State, at: int) -> Iterator[Step]:
        owes = state.workers[at].owes
        for job in owes:
            yield f"{at} enqueues the delivery of {job}", self.delivered(state.worker(at, owes=owes - {job}), job)

    def exchanges(self, state: State, settled: State, at: int, job: int, name: str) -> Iterator[Step]:
        """Start a job in the transaction that settled another. The reply comes later, or is lost."""
        worker = settled.workers[at]
        for other in worker.taken - worker.again:
            record = settled.records[other]
            if record.status != "pending" or not record.due or self.must_wait(settled, at, other):
                continue
            begun = self.begun(settled, at, other).worker(at, taken=worker.taken - {other})
            yield f"{at} {name} and starts {other}", begun.worker(at, coming=worker.coming | {other})
            if not self.pill:
                doubt = (job, state.records[job].attempts, state.records[job].begun)
                doubts = worker.doubts | ({doubt} if self.detailed else set())
                yield f"{at} {name} and starts {other}, the reply is lost", begun.worker(at, doubts=doubts)

    def learns(self, state: State, at: int) -> Iterator[Step]:
        worker = state.workers[at]
        if worker.coming:
            twice = bool(worker.coming & worker.runs)
            runs = worker.runs | worker.coming
            yield f"{at} learns what it exchanged", state.worker(at, coming=frozenset(), runs=runs, twice=twice)

    def sleeps(self, state: State, at: int) -> Iterator[Step]:
        worker = state.workers[at]
        if self.pill:  # only the pill may harm a worker
            return
        if worker.leased:
            yield f"the lease of {at} expires", state.worker(at, leased=False)
        elif worker.registered:
            yield f"{at} renews its lease", state.worker(at, leased=True)
        yield f"{at} crashes", lost(state, at)

    def is_reaped(self, state: State, at: int) -> Iterator[Step]:
        worker = state.workers[at]
        if worker.registered or (worker.proc and self.guarded("again")):
            given = self.requeued(state, at).worker(at, proc=(), registered=False)
            given = given._replace(quiet=given.quiet - {at}) if self.guarded("unmark") else given
            yield f"{at} is reaped", given.worker(at, registered=True, leased=True, alive=True) if self.pill else given

    def requeued(self, state: State, at: int) -> State:
        proc = dict.fromkeys(state.workers[at].proc)
        running = [job for job in proc if (state.records[job].status, state.records[job].worker) == ("processing", at)]
        beside = len(running) > 1 and self.guarded("beside")
        for job in proc:
            record = state.records[job]
            if record.status == "pending":
                state = state._replace(list=(*state.list, job))
            elif job in running or (record.status == "processing" and not self.guarded("owner")):
                attempts = record.attempts - beside
                if attempts >= MAX_ATTEMPTS:
                    state = self.delivered(state.ended(job, "failed"), job)
                    continue
                suspicions = min(record.suspicions + beside, SUSPICIOUS)
                state = state.record(job, status="pending", worker=None, attempts=attempts, suspicions=suspicions)
                state = state._replace(list=(*state.list, job))
        return state

    # States that must never occur

    def wrong(self, state: State) -> str:
        found = (self.wrong_with(job, record, state) for job, record in enumerate(state.records))
        marks = [at for at in state.quiet if not state.workers[at].registered]
        rest = {
            f"{state.kills} workers were killed": state.kills > MAX_ATTEMPTS + SUSPICIOUS,
            f"the mark of {marks} stays, though no such worker is registered": bool(marks),
        }
        return next(filter(None, found), "") or next((rule for rule, broken in rest.items() if broken), "")

    def wrong_with(self, job: int, record: Record, state: State) -> str:
        finders = [at for at, worker in enumerate(state.workers) if self.will_find(worker, job)]
        runners = [
            at for at, worker in enumerate(state.workers) if worker.alive and worker.registered and job in worker.runs
        ]
        owed = sum(job in worker.owes for worker in state.workers)
        lost = record.status == "pending" and job not in state.list and job not in state.delayed and not finders
        rules = {
            f"job {job} is pending, and no worker can find it": lost,
            f"job {job} is processing, and will never end": record.status == "processing"
            and record.worker not in finders,
            f"job {job} runs on two registered workers": len(runners) > 1,
            f"two slots of a worker run job {job}": any(worker.twice for worker in state.workers),
            f"job {job} is {record.status} while a registered worker runs it": bool(runners)
            and record.status != "processing",
            f"job {job} was completed twice": state.completed[job] > 1,
            f"nobody hears of an end of job {job}": state.ends[job] > state.deliveries[job] + owed,
            f"an end of job {job} was delivered twice": state.ends[job] < state.deliveries[job],
            f"job {job} failed because of another": self.pill and job > 0 and record.status == "failed",
        }
        return next((rule for rule, broken in rules.items() if broken), "")

    def will_find(self, worker: Worker, job: int) -> bool:
        """Whether the job is in that worker's list and will be found there."""
        if job not in worker.proc or not (worker.registered or self.guarded("again")):
            return False
        return self.guarded("adopt") or not worker.alive or job in worker.taken | worker.runs | worker.coming


def less(proc: tuple[int, ...], job: int) -> tuple[int, ...]:
    """Return the list without the first entry of the job, like LREM key 1 job."""
    at = proc.index(job) if job in proc else len(proc)
    return proc[:at] + proc[at + 1 :]


def one_more(counts: tuple[int, ...], job: int) -> tuple[int, ...]:
    return tuple(count + (j == job) for j, count in enumerate(counts))


def lost(state: State, at: int) -> State:
    return state.worker(
        at,
        **dict.fromkeys(("alive", "leased", "twice"), False),
        **dict.fromkeys(("taken", "again", "runs", "coming", "doubts", "owes"), frozenset()),
    )


class Searched(Protocol):
    first: Any

    def steps(self, state: Any) -> Iterator[tuple[str, Any]]: ...
    def wrong(self, state: Any) -> str: ...


def search(world: Searched) -> tuple[int, str, list[str]]:
    """Visit all states, nearest first, up to a wrong one.

    Returns how many were visited, what is wrong, and the steps to it.
    """
    came: dict[Any, tuple[str, Any] | None] = {world.first: None}
    todo = deque([world.first])
    while todo:
        state = todo.popleft()
        if why := world.wrong(state):
            path = []
            while step := came[state]:
                path.append(step[0])
                state = step[1]
            return len(came), why, path[::-1]
        for name, then in world.steps(state):
            if then not in came:
                came[then] = (name, state)
                todo.append(then)
    return len(came), "", []


@click.command()
@click.option("--jobs", default=1, show_default=True)
@click.option("--workers", default=3, show_default=True)
@click.option("--pill", is_flag=True, help="The first job kills its worker; nothing else goes wrong.")
@click.option("--without", type=click.Choice(list(GUARDS)), help="Leave a guard out.")
def main(jobs: int, workers: int, pill: bool, without: str | None) -> None:
    """Search all states of a world of these jobs and workers."""
    states, why, path = search(World(jobs, workers, pill, without or ""))
    click.echo("\n".join([*path, f"{states} states: {why or 'no state is wrong'}"]))
    sys.exit(bool(why))


if __name__ == "__main__":
    main()
