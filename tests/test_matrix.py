"""The contract's table of transitions, read from the docstring of tinyqueue.py and tried row by row.

Every verb meets a job of every status: what the table allows happens, and everything else changes
nothing. Every condition of the "only if" column is broken once, and then nothing happens either.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from conftest import Entry, dump, lapse, newest, put, raw

import tinyqueue
from tinyqueue import ENDED, LOOK, STATUSES, Failure, Filter, Job, Loaded, Outcome, Queue, Reaped, WrongStatus, handler
from tinyqueue_log import JobLog
from tinyqueue_schedule import Merge, Ticker, list_schedules, make_schedule, put as put_schedule, sync

pytestmark = pytest.mark.usefixtures("no_handlers")
BOOM = Failure("Boom", "it broke")
MADE = ("pending", "delayed", "processing", "completed", "failed", "cancelled")
DAY = 86400_000


class Row(NamedTuple):
    """A row of the table. A verb that only moves ids between lists goes from no status to none."""

    before: frozenset[str]
    after: frozenset[str]
    conditions: tuple[str, ...]


def rows() -> dict[str, Row]:
    """Read the table of transitions from the contract."""
    text = str(tinyqueue.__doc__).partition("    verb ")[2].partition("\n\n")[0]
    found = {}
    for line in text.splitlines()[1:]:
        if not re.match(r"    [a-z]", line):  # the rest of the row above
            continue
        verb, change, _, only_if, *_ = re.split(r"  +", line.strip())
        before, _, after = change.replace("*", ", cancelled").partition(" -> ")
        names = (frozenset(name for name in part.split(", ") if name in STATUSES) for part in (before, after))
        found[verb] = Row(*names, tuple(only_if.split("; ")) if only_if != "-" else ())
    return found


TABLE = rows()


# Every verb on every status -------------------------------------------------------------------------------------------


def dequeue(queue: Queue, job: Job) -> None:
    """Dequeue as a worker that finds the job's id in its queue, whatever the job's status."""
    worker = queue.register(["other"], 1)
    raw(queue).lpush(queue.keys.jobs("other"), job.id)
    queue.dequeue(worker, ["other"])


def dequeue_late(queue: Queue, job: Job) -> None:
    queue.clock.ahead += 121_000
    dequeue(queue, job)


def reap_finder(queue: Queue, job: Job) -> None:
    """Reap a worker that has the job's id in its list, though it never started it."""
    worker = queue.register(["other"], 1)
    raw(queue).lpush(queue.keys.proc(worker), job.id)
    lapse(queue, worker)
    queue.reap(worker)


def reap_owner(queue: Queue, job: Job) -> None:
    """Reap the worker that runs the job; no worker runs the others."""
    worker = job.worker if job.status == "processing" else "nobody"
    if job.status == "processing":
        lapse(queue, worker)
    queue.reap(worker)


def write_log(queue: Queue, job: Job) -> None:
    """Write a line that the job has logged."""
    job.__dict__["_log"] = JobLog(job.attempts, job.started_at)
    job.log("working")
    queue.write_log(job)


def request(queue: Queue, job: Job) -> None:
    """Request the cancellation of a job that is processing."""
    if job.status == "processing":
        queue.cancel(job.id)


def wait_for(queue: Queue, job: Job, parent: Job) -> None:
    """Let a job wait for a parent. One that has failed did so because of it."""
    stored = json.loads(raw(queue).get(queue.keys.job(job.id)))
    changes = {"after": [parent.id], "waitingFor": [parent.id]}
    if job.status == "failed":
        changes["error"] = {"type": "DependencyFailed", "message": f"job {parent.id} has failed"}
    raw(queue).set(queue.keys.job(job.id), json.dumps(stored | changes), keepttl=True)
    raw(queue).zadd(queue.keys.delayed, {job.id: "inf"}, xx=job.status != "pending")


def advance(status: str, before: str) -> Callable[[Queue, Job], None]:
    """Advance a job past a parent of that status. It waits for that parent if it has the status that the row needs."""

    def act(queue: Queue, job: Job) -> None:
        parent = put(queue, status, queue="parents")
        if job.status == before:
            wait_for(queue, job, parent)
        raw(queue).sadd(queue.keys.next(parent.id), job.id)
        raw(queue).rpush(queue.keys.advance, f"{parent.id}:{status}:1")
        assert queue.advance() == 1

    return act


class Action(NamedTuple):
    """A verb under given circumstances: the row of the table it follows, the status that results, and the refusal."""

    row: str
    to: str
    act: Callable[[Queue, Job], Any]
    refusal: type[Exception] | None = None  # None: the job is passed over, and its record stays as it is
    options: dict[str, Any] = {}  # of the job  # noqa: RUF012


def then(*acts: Callable[[Queue, Job], Any]) -> Callable[[Queue, Job], None]:
    def act(queue: Queue, job: Job) -> None:
        for one in acts:
            one(queue, job)

    return act


LAST = {"max_attempts": 1}
ACTIONS = {
    "start": Action("start", "processing", dequeue),
    "expire": Action("expire", "failed", dequeue_late, None, {"expires_in": 120}),
    "complete": Action("complete", "completed", lambda queue, job: queue.complete(job, {"sent": True}), Reaped),
    "fail with attempts left": Action("fail", "pending", lambda queue, job: queue.fail(job, BOOM, 10), Reaped),
    "fail with no attempt left": Action("fail", "failed", lambda queue, job: queue.fail(job, BOOM, 10), Reaped, LAST),
    "fail for good": Action("fail", "failed", lambda queue, job: queue.fail(job, BOOM), Reaped),
    "fail on request": Action("fail", "cancelled", then(request, lambda queue, job: queue.fail(job, BOOM, 10)), Reaped),
    "release": Action("release", "pending", lambda queue, job: queue.release(job), Reaped),
    "release on request": Action("release", "cancelled", then(request, lambda queue, job: queue.release(job)), Reaped),
    "progress": Action("progress", "processing", lambda queue, job: queue.write_progress(job), Reaped),
    "log": Action("log", "processing", write_log, Reaped),
    "reap": Action("reap", "pending", reap_owner),
    "reap with no attempt left": Action("reap", "failed", reap_owner, None, LAST),
    "reap on request": Action("reap", "cancelled", then(request, reap_owner)),
    "cancel": Action("cancel", "cancelled", lambda queue, job: queue.cancel(job.id), WrongStatus),
    "request": Action("request", "processing", lambda queue, job: queue.cancel(job.id), WrongStatus),
    "advance": Action("advance", "pending", advance("completed", "pending")),
    "advance past a failure": Action("advance", "failed", advance("failed", "pending")),
    "revive": Action("revive", "pending", advance("pending", "failed")),
    "revive after all has ended": Action("revive", "pending", advance("completed", "failed")),
    "retry": Action("retry", "pending", lambda queue, job: queue.retry(job.id), WrongStatus),
    "hasten": Action("hasten", "pending", lambda queue, job: queue.hasten(job.id), WrongStatus),
}
TWINS = {"cancel": "request", "request": "cancel"}  # one verb of the queue, two rows
BY_ENQUEUE = {("enqueue", "pending"), ("take", ""), ("promote", ""), ("restore", "")}  # tried below
BY_SCHEDULES = {("tick", "pending"), ("sync", "")}  # tried by test_schedules.py
BY_END = {("deliver", "pending")}  # tried below, on each verb that ends a job
BY_LIMITS = {("hold", ""), ("wake", ""), ("look", "")}  # tried below, and by test_limits.py
BY_LOAD = {("load", "pending"), ("load", "failed"), ("load", "cancelled")}  # tried by test_backup.py
RELEASED_TOO_OFTEN = ("release", "failed")  # tried by test_queue.py, which releases a job ten times


@pytest.mark.parametrize(("name", "status"), list(itertools.product(ACTIONS, MADE)))
def test_verb_changes_a_job_only_as_the_contract_says(queue: Queue, name: str, status: str) -> None:
    row, to, act, refusal, options = ACTIONS[name]
    job = put(queue, status, **options)
    before = dump(queue)
    plain = "pending" if status == "delayed" else status
    unmet = "due" if status == "delayed" else "delayed"
    if plain in TABLE[row].before and unmet not in TABLE[row].conditions:
        act(queue, job)
        assert queue.get(job.id).status == to
    elif row in TWINS and plain in TABLE[TWINS[row]].before:
        act(queue, job)
        assert queue.get(job.id).status in TABLE[TWINS[row]].after
    elif refusal:
        with pytest.raises(refusal) as refused:
            act(queue, job)
        assert dump(queue) == before
        if isinstance(refused.value, WrongStatus):
            assert (refused.value.verb, refused.value.job) == (row.replace("request", "cancel"), queue.get(job.id))
    else:
        act(queue, job)
        assert record(queue, job) == before[queue.keys.job(job.id)]


def record(queue: Queue, job: Job) -> Entry | None:
    return dump(queue).get(queue.keys.job(job.id))


def test_actions_cover_every_row_and_result_of_the_contract() -> None:
    tried = {(action.row, action.to) for action in ACTIONS.values()} | {RELEASED_TOO_OFTEN}
    tried |= BY_ENQUEUE | BY_END | BY_LIMITS | BY_LOAD | BY_SCHEDULES
    assert tried == {(verb, to) for verb, row in TABLE.items() for to in row.after or {""}}


ENDING = [name for name, action in ACTIONS.items() if action.to in ENDED]


@pytest.mark.parametrize("name", ENDING)
def test_end_of_a_job_with_a_callback_enqueues_one_delivery(queue: Queue, name: str) -> None:
    row, to, act, _, options = ACTIONS[name]
    status = "pending" if "pending" in TABLE[row].before else "processing"
    job = put(queue, status, callback_url="http://receiver.example/end", **options)
    act(queue, job)
    ended = queue.get(job.id)
    [delivery] = [other for other in queue.page()[0] if other.id != job.id and other.queue != "parents"]
    assert (ended.status, ended.callback_job) == (to, delivery.id)
    assert (delivery.type, delivery.queue, delivery.status) == ("webhook", "webhooks", "pending")
    assert delivery.payload["url"] == "http://receiver.example/end"
    event = delivery.payload["event"]
    assert (event["type"], event["data"]["id"], event["data"]["status"]) == (f"job.{to}", job.id, to)
    assert raw(queue).lrange(queue.keys.jobs("webhooks"), 0, -1) == [delivery.id.encode()]


# Every condition of the contract, broken ------------------------------------------------------------------------------


def settle_as(verb: str, queue: Queue, job: Job) -> None:
    {
        "complete": lambda: queue.complete(job),
        "fail": lambda: queue.fail(job, BOOM),
        "release": lambda: queue.release(job),
        "progress": lambda: queue.write_progress(job),
        "log": lambda: write_log(queue, job),
    }[verb]()


def break_registered(queue: Queue, verb: str) -> None:
    if verb in ("start", "expire", "hold"):
        if verb == "hold":
            fill_limit(queue)
        job = put(queue, "pending", expires_in=120)
        worker = queue.register(["default"], 1)
        ids = queue.take(worker, ["default"], 1)
        act: Callable[[], Any] = lambda: queue.start(worker, ids)  # noqa: E731
        queue.clock.ahead += 121_000 if verb == "expire" else 0
    else:
        job = put(queue, "processing")
        worker = job.worker
        act = lambda: settle_as(verb, queue, job)  # noqa: E731
    registration = raw(queue).get(queue.keys.worker(worker))
    raw(queue).delete(queue.keys.worker(worker))
    before = dump(queue)
    with pytest.raises(Reaped):
        act()
    assert dump(queue) == before
    raw(queue).set(queue.keys.worker(worker), registration)
    act()
    assert dump(queue) != before


def break_same_attempt(queue: Queue, verb: str) -> None:
    for field in ("worker", "attempts", "refunds", "startedAt"):
        job = put(queue, "processing", queue=field)
        stored = raw(queue).get(queue.keys.job(job.id))
        changed = json.loads(stored) | {field: "other" if field == "worker" else 7}
        raw(queue).set(queue.keys.job(job.id), json.dumps(changed))
        before = dump(queue)
        with pytest.raises(Reaped):
            settle_as(verb, queue, job)
        assert dump(queue) == before
        raw(queue).set(queue.keys.job(job.id), stored)


def fill_limit(queue: Queue) -> Job:
    """Declare a limit of one job at a time, and start one."""

    @handler("echo", max_running=1)
    def echo(payload: object) -> None: ...

    return put(queue, "processing", queue="other")


def break_room(queue: Queue, verb: str) -> None:
    running = fill_limit(queue)
    job = put(queue, "pending")
    before = record(queue, job)
    dequeue(queue, job)
    assert record(queue, job) == before
    held = dump(queue)[queue.keys.held("echo")]
    queue.clock.ahead += LOOK + 1000
    queue.promote()
    assert dump(queue)[queue.keys.held("echo")] == held
    raw(queue).srem(queue.keys.running("echo"), running.id)
    queue.clock.ahead += LOOK + 1000
    queue.promote()
    assert queue.keys.held("echo") not in dump(queue)
    raw(queue).sadd(queue.keys.running("echo"), running.id)


def break_no_room(queue: Queue, verb: str) -> None:
    queue.complete(fill_limit(queue))
    job = put(queue, "pending")
    dequeue(queue, job)
    assert queue.get(job.id).status == "processing"


def break_an_attempt_has_ended(queue: Queue, verb: str) -> None:
    running = fill_limit(queue)
    job = put(queue, "pending")
    dequeue(queue, job)
    queue.write_progress(running)
    assert queue.keys.held("echo") in dump(queue)
    queue.complete(running)
    assert queue.keys.held("echo") not in dump(queue)


def break_due(queue: Queue, verb: str) -> None:
    delayed = put(queue, "delayed")
    before = record(queue, delayed)
    dequeue(queue, delayed)
    assert record(queue, delayed) == before
    expired = put(queue, "pending", expires_in=120)
    dequeue_late(queue, expired)
    assert queue.get(expired.id).status == "failed"


def break_expired(queue: Queue, verb: str) -> None:
    early = put(queue, "pending", expires_in=120, queue="early")
    dequeue(queue, early)
    assert queue.get(early.id).status == "processing"
    started = put(queue, "processing", expires_in=120)
    queue.release(started)
    dequeue_late(queue, started)
    assert queue.get(started.id).status == "processing"


def break_not_paused(queue: Queue, verb: str) -> None:
    put(queue, "pending")
    worker = queue.register(["default"], 1)
    queue.pause("default")
    assert queue.take(worker, ["default"], 1) == []
    queue.resume("default")


def break_not_quiet(queue: Queue, verb: str) -> None:
    job = put(queue, "pending")
    running = put(queue, "processing", queue="other")
    assert queue.quiet(running.worker)
    queue.queues()  # reads which are quiet, too
    before = dump(queue)
    assert queue.take(running.worker, ["default"], 1) == []
    assert dump(queue) == before
    assert queue.exchange(running.worker, [Outcome(running, "complete")], ["default"], 1, {}) == ([], [])
    assert raw(queue).lrange(queue.keys.jobs("default"), 0, -1) == [job.id.encode()]


def break_delayed(queue: Queue, verb: str) -> None:
    """Hasten a job that is due, one that waits for another, and one that is held."""
    running = fill_limit(queue)
    held = put(queue, "pending")
    dequeue(queue, held)
    waiting = queue.enqueue("mail", 1, after=[running])
    due = queue.enqueue("mail", 1)
    reasons = ("it is held by the limit echo", "it waits for other jobs", "it is due already")
    before = dump(queue)
    for job, reason in zip((held, waiting, due), reasons, strict=True):
        with pytest.raises(WrongStatus, match=f"cannot hasten job {job.id}: {reason}"):
            queue.hasten(job.id)
    assert dump(queue) == before


def break_run_at_has_come(queue: Queue, verb: str) -> None:
    job = put(queue, "delayed")
    before = dump(queue)
    assert queue.promote() == 0
    assert dump(queue) == before
    queue.clock.ahead += 61_000
    assert queue.promote() == 1
    assert raw(queue).lrange(queue.keys.jobs("default"), 0, -1) == [job.id.encode()]


def break_lease_gone(queue: Queue, verb: str) -> None:
    job = put(queue, "processing")
    before = dump(queue)
    assert queue.reap(job.worker) == 0
    assert dump(queue) == before


def break_workers_own(queue: Queue, verb: str) -> None:
    job = put(queue, "processing")
    before = record(queue, job)
    reap_finder(queue, job)
    assert record(queue, job) == before


def break_handler_takes_a_job(queue: Queue, verb: str) -> None:
    @handler("echo")
    def echo(payload: object) -> None: ...

    job = put(queue, "processing")
    before = dump(queue)
    with pytest.raises(WrongStatus):
        queue.cancel(job.id)
    assert dump(queue) == before


def break_unique_key_free(queue: Queue, verb: str) -> None:
    job = put(queue, "failed", unique_key="a")
    put(queue, "pending", unique_key="a")
    before = dump(queue)
    with pytest.raises(WrongStatus):
        queue.retry(job.id)
    assert dump(queue) == before


def break_keys_unused(queue: Queue, verb: str) -> None:
    first = put(queue, "pending", unique_key="a")
    before = dump(queue)
    assert queue.enqueue("echo", 2, unique_key="a") == first
    assert dump(queue) == before


def break_callback_url(queue: Queue, verb: str) -> None:
    job = put(queue, "processing")
    queue.complete(job)
    assert queue.get(job.id).callback_job == ""
    assert [job.id for job in queue.page()[0]] == [job.id]


def break_unused(queue: Queue, verb: str) -> None:
    """Load a job whose id another job has, and one whose uniqueKey another has."""
    there = put(queue, "pending", unique_key="a")
    gone = put(queue, "processing", queue="other")
    queue.complete(gone)
    other = queue.draft("echo", 2, unique_key="a")
    queue.pause("default")
    before = dump(queue)
    assert queue.load([there, queue.get(gone.id)]) == Loaded([], [], [])
    assert queue.load([other]) == Loaded([], [other.id], [])
    assert dump(queue) == before


def break_queue_paused(queue: Queue, verb: str) -> None:
    job = queue.draft("echo", 1)
    before = dump(queue)
    assert queue.load([job]) == Loaded([], [], ["default"])
    assert dump(queue) == before
    queue.pause("default")
    assert queue.load([job]) == Loaded([job], [], [])


def break_unended(queue: Queue, verb: str) -> None:
    for status in ("completed", "failed", "cancelled"):
        job = put(queue, status)
        before = dump(queue)
        assert not queue.restore(job.id)
        assert dump(queue) == before


def break_in_no_list(queue: Queue, verb: str) -> None:
    for status in ("pending", "delayed", "processing"):
        job = put(queue, status, queue=status)
        before = dump(queue)
        assert not queue.restore(job.id)
        assert dump(queue) == before
        raw(queue).delete(queue.keys.jobs(status), queue.keys.proc(job.worker))
        raw(queue).zrem(queue.keys.delayed, job.id)
        assert queue.restore(job.id)


def break_waits_for_that_parent(queue: Queue, verb: str) -> None:
    job = put(queue, "pending")
    before = record(queue, job)
    for status in ("completed", "failed", "cancelled"):
        advance(status, "none")(queue, job)
    assert record(queue, job) == before


def break_failed_because_of_that(queue: Queue, verb: str) -> None:
    parent = put(queue, "failed", queue="parents")
    job = queue.enqueue("echo", 1, after=[put(queue, "delayed", queue="others"), parent], on_failure="run")
    other = put(queue, "failed")
    wait_for(queue, other, job)
    before = record(queue, other)
    queue.retry(parent.id)
    assert record(queue, other) == before
    wait_for(queue, other, parent)
    raw(queue).sadd(queue.keys.next(parent.id), other.id)
    raw(queue).rpush(queue.keys.advance, f"{parent.id}:pending:1")
    queue.advance()
    assert queue.get(other.id).status == "pending"


def break_its_time_has_come(queue: Queue, verb: str) -> None:
    put_schedule(queue, make_schedule("hourly", "0 * * * *", "echo", {}))
    before = dump(queue)
    Ticker(queue).tick()
    assert dump(queue) == before
    queue.clock.ahead += 3600_000
    Ticker(queue).tick()
    assert queue.stats()["pending"] == 1


def break_code_not_replaced(queue: Queue, verb: str) -> None:
    [old, new] = ([make_schedule("hourly", cron, "echo", {}, code="c")] for cron in ("0 * * * *", "1 * * * *"))
    sync(queue, "c", old)
    sync(queue, "c", new)
    before = dump(queue)
    assert sync(queue, "c", old) == [Merge([], [], [])]
    assert dump(queue) == before
    queue.clock.ahead += 301_000
    sync(queue, "c", old)
    assert [made.cron for made, _ in list_schedules(queue)] == ["0 * * * *"]


BREAKS = {
    "waits for that parent": break_waits_for_that_parent,
    "failed because of that": break_failed_because_of_that,
    "its time has come": break_its_time_has_come,
    "code not replaced": break_code_not_replaced,
    "unused": break_unused,
    "queue paused": break_queue_paused,
    "unended": break_unended,
    "in no list": break_in_no_list,
    "registered": break_registered,
    "same attempt": break_same_attempt,
    "due": break_due,
    "room": break_room,
    "no room": break_no_room,
    "an attempt has ended": break_an_attempt_has_ended,
    "expired": break_expired,
    "not paused": break_not_paused,
    "not quiet": break_not_quiet,
    "delayed": break_delayed,
    "runAt has come": break_run_at_has_come,
    "lease gone": break_lease_gone,
    "worker's own": break_workers_own,
    "handler takes a Job": break_handler_takes_a_job,
    "uniqueKey free": break_unique_key_free,
    "keys unused": break_keys_unused,
    "callbackUrl": break_callback_url,
}
CONDITIONS = [(verb, condition) for verb, row in TABLE.items() for condition in row.conditions]


@pytest.mark.parametrize(("verb", "condition"), CONDITIONS)
def test_verb_does_nothing_when_its_condition_does_not_hold(queue: Queue, verb: str, condition: str) -> None:
    BREAKS[condition](queue, verb)


def test_conditions_of_the_contract_are_all_tried() -> None:
    assert len(CONDITIONS) > 12
    assert {condition for _, condition in CONDITIONS} == BREAKS.keys()


# What the table does not list changes no status -----------------------------------------------------------------------


def promote_late(queue: Queue, job: Job) -> None:
    queue.clock.ahead += 61_000
    queue.promote()


def trim_late(queue: Queue, job: Job) -> None:
    queue.clock.ahead += 8 * DAY
    queue.trim()


def read(queue: Queue, job: Job) -> None:
    for status in STATUSES:
        newest(queue, status)
        queue.page(Filter(status))
    queue.page()
    queue.get(job.id)
    queue.wait_for(job.id, 0)
    queue.cancel_requests([job.id])
    queue.stats()
    queue.workers()
    queue.queues()
    queue.count_unended()
    queue.ping()
    queue.now()
    queue.waiting(["default"])
    queue.lost_workers()
    queue.adopt(job.worker or "nobody", [])


SAME_KEYS = {
    "promote": lambda queue, job: queue.promote(),
    "reap a living worker": lambda queue, job: queue.reap(job.worker or "nobody"),
    "trim": lambda queue, job: queue.trim(),
    "read": read,
}
SAME_RECORD = {
    "promote late": promote_late,
    "reap a finder": reap_finder,
    "pause and resume": lambda queue, job: (queue.pause("default"), queue.resume("default")),
}


@pytest.mark.parametrize("status", MADE)
@pytest.mark.parametrize("name", SAME_KEYS)
def test_verb_outside_the_contract_changes_no_key(queue: Queue, name: str, status: str) -> None:
    job = put(queue, status)
    before = dump(queue)
    SAME_KEYS[name](queue, job)
    assert dump(queue) == before


@pytest.mark.parametrize("status", MADE)
@pytest.mark.parametrize("name", SAME_RECORD)
def test_verb_outside_the_contract_changes_no_record(queue: Queue, name: str, status: str) -> None:
    job = put(queue, status)
    before = record(queue, job)
    SAME_RECORD[name](queue, job)
    assert record(queue, job) == before


@pytest.mark.parametrize("status", MADE)
def test_trim_late_deletes_ended_jobs_only(queue: Queue, status: str) -> None:
    job = put(queue, status)
    before = record(queue, job)
    trim_late(queue, job)
    assert record(queue, job) == (None if status in ("completed", "failed", "cancelled") else before)
