"""The queue against a simple model: no order of verbs, crashes and clocks loses a job."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from conftest import Server, check_consistency, find_lost, lapse, raw
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

import tinyqueue
import tinyqueue_reading
import tinyqueue_schedule
from tinyqueue import SWEEP_MARK, Failure, Job, KeyReused, Once, Outcome, Queue, Reaped, WrongStatus, handler
from tinyqueue_job import HISTORY
from tinyqueue_schedule import Schedule, Ticker, list_schedules, make_schedule

# No second run: hypothesis might not find the same steps again.
pytestmark = [pytest.mark.usefixtures("no_handlers"), pytest.mark.flaky(reruns=0)]
BOOM = Failure("Boom", "it broke")
NAMES = ["high", "low"]
VERBS = ["complete", "complete", "fail", "fail for good", "release"]


class Known:
    """What the model knows about a job."""

    def __init__(self, job: Job) -> None:
        self.ends = 0
        self._status = "pending"
        self.callback_url = job.callback_url
        self.limit = job.limit
        self.attempts = 0
        self.max_attempts = job.max_attempts
        self.due = job.run_at
        self.worker = ""
        self.expires = job.expires_at
        self.unique_key = job.unique_key
        self.cancel_requested = False
        self.suspicions = 0
        self.waiting = set(job.after)
        self.runs_anyway = job.on_failure == "run"
        self.cause = ""  # the parent because of which it failed
        self.outcomes: list[str] = []  # of its attempts

    @property
    def status(self) -> str:
        return self._status

    @status.setter
    def status(self, status: str) -> None:
        self.ends += self.active and status in ("completed", "failed", "cancelled")
        self._status = status

    @property
    def active(self) -> bool:
        return self.status in ("pending", "processing")

    def lose(self, beside: bool) -> None:
        self.status = "pending"
        self.due = 0
        if beside:
            self.attempts -= 1
            self.suspicions += 1
        if self.cancel_requested:
            self.status = "cancelled"
        elif self.attempts >= self.max_attempts:
            self.status = "failed"
        self.outcomes.append("cancelled" if self.cancel_requested else "lost")
        self.worker = "" if self.status == "pending" else self.worker

    def revive(self) -> None:
        self.status = "pending"
        self.worker = ""
        self.attempts = 0
        self.due = 0
        self.expires = 0
        self.cancel_requested = False
        self.cause = ""

    def follow(self, id: str, parent: Known) -> bool:
        """Apply the status of a parent. Return whether that has changed anything."""
        over = parent.status == "completed" or (self.runs_anyway and not parent.active)
        because = self.status == "failed" and self.cause == id
        if over:
            self.waiting.discard(id)
        if because and (over or parent.active):
            self.revive()
        elif not over and not parent.active and self.status == "pending":
            self.status = "failed"
            self.cause = id
        else:
            return over
        return True

    def expired(self, now: int) -> bool:
        return self.status == "pending" and 0 < self.expires <= now


class Worker:
    """A worker process: the jobs that it believes to hold, and whether it was reaped."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.held = {}
        self.reaped = False
        self.quiet = False


class Machine(RuleBasedStateMachine):
    """Each rule is one event. Events never overlap, because transactions are atomic."""

    jobs = Bundle("jobs")
    queue: Queue  # set by the test

    def __init__(self) -> None:
        super().__init__()
        raw(self.queue).flushall()
        self.queue.clock.ahead = 0
        self.model: dict[str, Known] = {}
        self.workers: list[Worker] = []
        self.names: list[str] = []  # of all workers that ever were
        self.made_once: dict[str, list[str]] = {}
        self.paused: set[str] = set()
        self.schedules: dict[str, Schedule] = {}

    def _has(self, unique_key: str) -> list[str]:
        """Return the ids of the unended jobs that have that uniqueKey."""
        return [
            id for id, known in self.model.items() if unique_key and known.unique_key == unique_key and known.active
        ]

    def _new(self, drafts: list[Job], jobs: list[Job]) -> Any:
        """Record what a submit returned: each draft, or the job that has its uniqueKey."""
        made = []
        for draft, job in zip(drafts, jobs, strict=True):
            assert [job.id] == (self._has(draft.unique_key) or [draft.id])
            if job.id not in self.model:
                self.model[job.id] = Known(job)
                made.append(job.id)
        return multiple(*made)

    # Clients

    @rule(
        target=jobs,
        name=st.sampled_from(NAMES),
        most=st.integers(1, 3),
        delay=st.sampled_from([0, 0, 10]),
        expires_in=st.sampled_from([None, None, 20]),
        callback=st.sampled_from([None, None, "http://receiver.example/"]),
    )
    def enqueue(self, name: str, most: int, *, delay: int, expires_in: int | None, callback: str | None) -> str:
        options = {"delay": delay, "expires_in": expires_in, "callback_url": callback}
        job = self.queue.enqueue("echo", {}, queue=name, max_attempts=most, **options)
        self.model[job.id] = Known(job)
        return job.id

    @rule(
        target=jobs,
        parents=st.lists(jobs, min_size=1, max_size=3, unique=True),
        on_failure=st.sampled_from(["fail", "fail", "run"]),
        delay=st.sampled_from([0, 0, 10]),
        expires_in=st.sampled_from([None, None, 20]),
    )
    def enqueue_after(self, parents: list[str], on_failure: Any, delay: int, expires_in: int | None) -> str:
        options = {"delay": delay, "expires_in": expires_in, "on_failure": on_failure}
        job = self.queue.enqueue("echo", {}, queue="low", after=parents, **options)
        self.model[job.id] = Known(job)
        return job.id

    def _follow(self) -> None:
        """Apply the statuses of all parents until nothing changes any more."""
        while any(known.follow(id, self.model[id]) for known in self.model.values() for id in list(known.waiting)):
            pass

    @rule(target=jobs, keys=st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=3))
    def enqueue_unique(self, keys: list[str | None]) -> Any:
        drafts = [self.queue.draft("echo", {}, queue="high", unique_key=key) for key in keys]
        return self._new(drafts, self.queue.submit(drafts))

    @rule(
        target=jobs, key=st.sampled_from("xy"), count=st.integers(1, 2), unique_key=st.sampled_from([None, None, "a"])
    )
    def submit_once(self, key: str, count: int, unique_key: str | None) -> Any:
        drafts = [self.queue.draft("echo", {}, queue="low", unique_key=unique_key) for _ in range(count)]
        made = self.made_once.get(key)
        if made and len(made) != count:
            with pytest.raises(KeyReused):
                self.queue.submit(drafts, Once(key, ""))
            return multiple()
        jobs = self.queue.submit(drafts, Once(key, ""))
        if made:
            assert [job.id for job in jobs] == made
            return multiple()
        self.made_once[key] = [job.id for job in jobs]
        return self._new(drafts, jobs)

    @precondition(lambda self: self.workers)
    @rule(
        target=jobs,
        data=st.data(),
        name=st.sampled_from(NAMES),
        most=st.integers(1, 3),
        count=st.integers(2, 4),
        expires_in=st.sampled_from([None, None, 20]),
    )
    def enqueue_limited(self, data: st.DataObject, name: str, *, most: int, count: int, expires_in: int | None) -> Any:
        """Submit jobs of a type of which one runs at a time, and take some: others will be held."""
        options = {"queue": name, "max_attempts": most, "expires_in": expires_in}
        jobs = self.queue.enqueue_many("limited", [{}] * count, **options)
        self.model |= {job.id: Known(job) for job in jobs}
        worker = data.draw(st.sampled_from(self.workers))
        self._start(worker, self._take(worker, 5))
        return multiple(*(job.id for job in jobs))

    @rule()
    def look(self) -> None:
        """Have a worker look at all limits with held jobs, as after a change of their numbers."""
        self.queue.limits.hurry()
        self.queue.promote()

    @rule(name=st.sampled_from(NAMES))
    def pause(self, name: str) -> None:
        self.queue.pause(name)
        self.paused.add(name)

    @rule(name=st.sampled_from(NAMES))
    def resume(self, name: str) -> None:
        self.queue.resume(name)
        self.paused.discard(name)

    @rule(target=jobs, count=st.integers(2, 4))
    def enqueue_many(self, count: int) -> Any:
        jobs = self.queue.enqueue_many("echo", [{}] * count, queue="low", max_attempts=2)
        self.model |= {job.id: Known(job) for job in jobs}
        return multiple(*(job.id for job in jobs))

    @rule(id=jobs)
    def cancel(self, id: str) -> None:
        known = self.model[id]
        if known.status == "pending":
            assert self.queue.cancel(id)
            known.status = "cancelled"
        elif known.status == "processing":
            assert self.queue.cancel(id).cancelled
            known.cancel_requested = True
        else:
            with pytest.raises(WrongStatus):
                self.queue.cancel(id)

    @rule(id=jobs)
    def retry(self, id: str) -> None:
        known = self.model[id]
        if known.status in ("failed", "cancelled") and not self._has(known.unique_key):
            assert self.queue.retry(id)
            known.revive()
        else:
            with pytest.raises(WrongStatus):
                self.queue.retry(id)

    @rule(id=jobs)
    def hasten(self, id: str) -> None:
        known = self.model[id]
        if known.status == "pending" and known.due > self.queue.now() and not known.waiting:
            assert self.queue.hasten(id).run_at == 0
            known.due = 0
            assert self._listed_in(id)[-1] == id, "it is not the next job of its queue"
        else:
            with pytest.raises(WrongStatus):
                self.queue.hasten(id)

    def _listed_in(self, id: str) -> list[str]:
        """Return the ids in the queue of a job, the next one last."""
        key = self.queue.keys.jobs(self.queue.get(id).queue)
        return [entry.decode() for entry in raw(self.queue).lrange(key, 0, -1)]

    def _take(self, worker: Worker, most: int) -> list[bytes]:
        ids = self.queue.take(worker.id, NAMES, most)
        assert not (worker.quiet and ids), "a quiet worker takes jobs"
        return ids

    # Workers

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def quiet(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        assert self.queue.quiet(worker.id) != worker.reaped
        worker.quiet = not worker.reaped

    @precondition(lambda self: any(worker.quiet for worker in self.workers))
    @rule(data=st.data())
    def resume_worker(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from([worker for worker in self.workers if worker.quiet]))
        assert self.queue.resume_worker(worker.id) != worker.reaped
        worker.quiet = False

    @precondition(lambda self: len(self.workers) < 3)
    @rule()
    def start_worker(self) -> None:
        self.workers.append(Worker(self.queue.register(NAMES, 2)))
        self.names.append(self.workers[-1].id)

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), most=st.integers(1, 3))
    def dequeue(self, data: st.DataObject, most: int) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        self._start(worker, self._take(worker, most))

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), most=st.integers(1, 3))
    def adopt(self, data: st.DataObject, most: int) -> None:
        """Start what was left in the list, such as a suspect beside other jobs."""
        worker = data.draw(st.sampled_from(self.workers))
        self._start(worker, self.queue.adopt(worker.id, worker.held)[:most])

    def _start(self, worker: Worker, ids: list[bytes]) -> None:
        try:
            jobs = self.queue.start(worker.id, ids, {job.id: job for job in worker.held.values()})
        except Reaped:
            assert worker.reaped
            self.workers.remove(worker)
            return
        assert not worker.reaped
        for id in ids:
            self._expire(self.model[id.decode()])
        self._started(worker, jobs, alone=not worker.held and len(ids) == 1)

    def _expire(self, known: Known) -> None:
        if known.expired(self.queue.now()):
            known.status = "failed"

    def _started(self, worker: Worker, jobs: list[Job], alone: bool) -> None:
        for job in jobs:
            known = self.model[job.id]
            if job.status == "pending":
                assert known.suspicions >= tinyqueue.SUSPICIOUS
                assert not alone
                continue
            assert known.suspicions < tinyqueue.SUSPICIOUS or alone
            assert known.status == "pending"
            assert known.due <= self.queue.now()
            assert job.queue not in self.paused
            known.expires = 0  # a job that has started never expires
            known.status = "processing"
            known.attempts = known.attempts + 1
            known.worker = worker.id
            assert job.attempts == known.attempts
            worker.held[job.id] = job

    @precondition(lambda self: any(worker.held for worker in self.workers))
    @rule(
        data=st.data(),
        verb=st.sampled_from(VERBS),
        all=st.booleans(),
    )
    def settle(self, data: st.DataObject, verb: str, all: bool) -> None:
        worker, outcomes = self._draw_outcomes(data, verb, all)
        try:
            self.queue.settle(worker.id, outcomes)
        except Reaped:
            assert worker.reaped
            self.workers.remove(worker)
            return
        assert not worker.reaped
        for outcome in outcomes:
            del worker.held[outcome.job.id]
            self._settled(self.model[outcome.job.id], self.queue.get(outcome.job.id), verb)

    @precondition(lambda self: any(worker.held for worker in self.workers))
    @rule(data=st.data(), verb=st.sampled_from(VERBS), all=st.booleans(), most=st.integers(0, 3))
    def exchange(self, data: st.DataObject, verb: str, all: bool, most: int) -> None:
        worker, outcomes = self._draw_outcomes(data, verb, all)
        listed = self._listed()
        held = dict(worker.held)
        try:
            lost, jobs = self.queue.exchange(worker.id, outcomes, NAMES, most, held)
        except Reaped:
            assert worker.reaped
            self.workers.remove(worker)
            return
        assert not worker.reaped
        assert lost == []
        taken = [] if worker.quiet else listed[:most]
        for outcome in outcomes:
            del worker.held[outcome.job.id]
            self._settled(self.model[outcome.job.id], self.queue.get(outcome.job.id), verb)
        for id in taken:
            self._expire(self.model[id])
        assert {job.id for job in jobs} <= set(taken)
        self._started(worker, jobs, alone=False)
        for known in map(self.model.__getitem__, taken):
            ready = known.status == "pending" and known.due <= self.queue.now()
            left = ready and not known.waiting and not known.limit
            assert not left or known.suspicions >= tinyqueue.SUSPICIOUS, "a job was taken and not started"

    def _listed(self) -> list[str]:
        """Return the ids in the queues that are not paused, in the order in which they are taken."""
        names = [name for name in NAMES if name not in self.paused]
        lists = [raw(self.queue).lrange(self.queue.keys.jobs(name), 0, -1) for name in names]
        return [id.decode() for ids in lists for id in reversed(ids)]

    def _draw_outcomes(self, data: st.DataObject, verb: str, all: bool) -> tuple[Worker, list[Outcome]]:
        worker = data.draw(st.sampled_from([worker for worker in self.workers if worker.held]))
        jobs = list(worker.held.values()) if all else [data.draw(st.sampled_from(list(worker.held.values())))]
        word = verb.partition(" ")[0]
        waits = [5 + n / 1000 if verb == "fail" else None for n in range(len(jobs))]
        outcomes = [Outcome(job, word, error=BOOM, after=wait) for job, wait in zip(jobs, waits, strict=True)]
        return worker, outcomes

    def _settled(self, known: Known, job: Job, verb: str) -> None:
        if verb == "complete":
            known.status = "completed"
            known.cancel_requested = False
        elif known.cancel_requested:
            known.status = "cancelled"
        elif verb == "release":
            known.status = "pending"
            known.due = 0
            known.attempts -= 1
        elif verb == "fail" and known.attempts < known.max_attempts:
            known.status = "pending"
            known.due = job.run_at
            assert job.run_at > self.queue.now()
        else:
            known.status = "failed"
        again = "released" if verb == "release" else "failed"
        known.outcomes.append(again if known.status == "pending" else known.status)
        known.worker = "" if known.status == "pending" else known.worker

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def heartbeat(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        try:
            self.queue.heartbeat(worker.id, list(worker.held))
            assert not worker.reaped
        except Reaped:
            assert worker.reaped
            self.workers.remove(worker)

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def oversleep(self, data: st.DataObject) -> None:
        """Let the lease of a worker expire without the worker noticing."""
        worker = data.draw(st.sampled_from(self.workers))
        if not worker.reaped and worker.id not in find_lost(self.queue):
            lapse(self.queue, worker.id)

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        raw(self.queue).delete(self.queue.keys.lease(worker.id))
        self.workers.remove(worker)

    @precondition(lambda self: any(not worker.held for worker in self.workers))
    @rule(data=st.data())
    def deregister(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from([worker for worker in self.workers if not worker.held]))
        self.queue.deregister(worker.id)
        self.workers.remove(worker)

    # Upkeep

    @rule()
    def reap(self) -> None:
        for id in self._lost():
            self._reap(id)

    @rule()
    def reap_everybody(self) -> None:
        """Reap live workers, which changes nothing, and lost workers twice."""
        lost = self._lost()
        for worker in list(self.workers):
            if worker.id not in lost and not worker.reaped:
                assert self.queue.reap(worker.id) == 0
        for id in lost * 2:
            self._reap(id)

    def _lost(self) -> list[str]:
        """Return the workers without a lease by age, so that a failure can be replayed."""
        return sorted(find_lost(self.queue), key=self.names.index)

    def _reap(self, id: str) -> None:
        held = self.queue.reap(id)
        running = [known for known in self.model.values() if known.worker == id and known.status == "processing"]
        assert held >= len(running)  # it also held the jobs that it took and did not start
        for known in running:
            known.lose(beside=len(running) > 1)
        for worker in self.workers:
            worker.reaped = worker.reaped or worker.id == id
            worker.quiet = worker.quiet and not worker.reaped

    @rule()
    def promote(self) -> None:
        self.queue.promote()

    @rule()
    def promote_twice(self) -> None:
        """Promote as two processes do at the same moment: each due id is in its queue twice."""
        found = raw(self.queue).zrangebyscore(self.queue.keys.delayed, 0, self.queue.now(), withscores=True)
        due = [(id, at) for id, at in found if id != SWEEP_MARK.encode()]
        assert self.queue.promote() == len(due)
        if due:
            raw(self.queue).zadd(self.queue.keys.delayed, dict(due))
        assert self.queue.promote() == len(due)

    # Schedules

    @rule(name=st.sampled_from("st"), overlap=st.sampled_from(["skip", "allow"]), key=st.sampled_from([None, "a"]))
    def put_schedule(self, name: str, overlap: str, key: str | None) -> None:
        made = make_schedule(name, "* * * * *", "echo", {}, queue="high", overlap=overlap, unique_key=key)
        self.schedules[name] = tinyqueue_schedule.put(self.queue, made)

    @precondition(lambda self: self.schedules)
    @rule(data=st.data(), verb=st.sampled_from(["pause", "resume", "remove"]))
    def change_schedule(self, data: st.DataObject, verb: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.schedules)))
        changed = getattr(tinyqueue_schedule, verb)(self.queue, name)
        assert changed
        if verb == "remove":
            del self.schedules[name]
        else:
            self.schedules[name] = changed

    @rule(target=jobs, name=st.sampled_from("st"), overlap=st.sampled_from(["skip", "allow"]))
    def tick(self, name: str, overlap: str) -> Any:
        """Let the next minute begin, and tick as two workers do."""
        if name not in self.schedules:
            self.put_schedule(name, overlap, None)
        now = self.queue.now()
        self.queue.clock.ahead += 61_000 - now % 60_000
        made = []
        before = dict(self.schedules)
        Ticker(self.queue).tick()
        Ticker(self.queue).tick()
        after = {found.name: found for found, _ in list_schedules(self.queue)}
        for found in sorted(before.values(), key=lambda found: found.name):
            if found.paused or found.next_at > self.queue.now():
                assert after[found.name] == found
            else:
                made += self._ticked(found, after[found.name])
        self.schedules = after
        return multiple(*made)

    def _ticked(self, before: Schedule, after: Schedule) -> list[str]:
        """Compare the outcome of a tick with the model. Return the id of the job that it made."""
        last = self.model.get(before.last_job)
        [holder] = self._has(before.unique_key) or [""]
        assert after.last_at > before.last_at
        assert after.next_at > self.queue.now()
        if last and last.active and before.overlap == "skip":
            assert (after.last_outcome, after.last_job) == ("skipped", before.last_job)
            return []
        if holder:
            assert (after.last_outcome, after.last_job) == ("duplicate", holder)
            return []
        assert after.last_outcome == "enqueued"
        job = self.queue.get(after.last_job)
        assert (job.schedule, job.scheduled_for) == (before.name, after.last_at)
        assert job.id not in self.model
        self.model[job.id] = Known(job)
        return [job.id]

    @rule(seconds=st.sampled_from([1, 6, 11]))
    def advance(self, seconds: int) -> None:
        self.queue.clock.ahead += seconds * 1000

    # Invariants

    @invariant()
    def consistency(self) -> None:
        check_consistency(self.queue)
        self.queue.clock.ahead += 1  # events of one millisecond would be ordered by random ids

    @invariant()
    def model_agrees(self) -> None:
        self._follow()
        for id, known in self.model.items():
            job = self.queue.get(id)
            assert (job.status, job.attempts, job.worker) == (known.status, known.attempts, known.worker)
            assert job.suspicions == known.suspicions
            assert job.cancelled == known.cancel_requested
            assert set(job.waiting_for) == known.waiting
            running = ["running"] * (known.status == "processing")
            assert [attempt.outcome for attempt in job.attempts_so_far()] == (known.outcomes + running)[-HISTORY:]

    @invariant()
    def limit_is_never_exceeded(self) -> None:
        assert sum(known.status == "processing" for known in self.model.values() if known.limit) <= 1

    @invariant()
    def every_end_has_one_delivery(self) -> None:
        ids = raw(self.queue).lrange(self.queue.keys.jobs("webhooks"), 0, -1)
        deliveries = [self.queue.get(id.decode()) for id in ids]
        made = Counter(delivery.payload["event"]["data"]["id"] for delivery in deliveries)
        assert made == {id: known.ends for id, known in self.model.items() if known.callback_url and known.ends}

    def teardown(self) -> None:
        """All workers are lost. One new worker must be able to end every job that has not ended."""
        for id in self._lost() + [worker.id for worker in self.workers]:
            raw(self.queue).delete(self.queue.keys.lease(id))
            self._reap(id)
        for name in NAMES:
            self.queue.resume(name)
        self.queue.clock.ahead += 11_000
        self.queue.promote()
        self._follow()
        for known in self.model.values():
            self._expire(known)
        self._follow()
        waiting = [id for id, known in self.model.items() if known.status == "pending"]
        last = self.queue.register(NAMES, 1)
        ended: list[str] = []
        while self.queue.waiting(NAMES):
            ids = self.queue.take(last, NAMES, 5)
            for part in [ids, *([id] for id in ids)]:  # suspects one by one
                jobs = [job for job in self.queue.start(last, part, {}) if job.status == "processing"]
                for job in jobs:
                    self.queue.complete(job)
                    ended.append(job.id)
        assert sorted(ended) == sorted(waiting)
        check_consistency(self.queue)


def limited(payload: object, job: Job) -> None: ...


def test_queue_agrees_with_the_model_in_any_order_of_events(
    server: Server, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler("limited", max_running=1)(limited)
    monkeypatch.setattr(tinyqueue_reading, "PAUSE_AGE", -1.0)  # a pause takes effect at once
    monkeypatch.setattr(tinyqueue, "SUSPICIOUS", 1)  # or few jobs would become suspects
    examples, steps = (40, 40) if not server.url else (15, 30)
    limits = settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(type("TestMachine", (Machine,), {"queue": queue}), settings=limits)
