"""Jobs that wait for others: `after`, what their parents' ends do to them, and what no fault may break."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client import Client
from conftest import NoBar, Server, check_consistency, lapse, put, raw, until
from cutproxy import CutProxy
from test_backup import Steps

import tinyqueue
from tinyqueue import SWEEP_AFTER, Failure, InvalidJob, Job, Once, Outcome, Queue, handler
from tinyqueue_backup import back_up, restore
from tinyqueue_repair import find_forgotten, repair
from tinyqueue_shards import Shards

pytestmark = pytest.mark.usefixtures("no_handlers")
BOOM = Failure("Boom", "it broke")
DAY = 86400_000


def now(queue: Queue, *jobs: Job) -> list[Job]:
    """Return the jobs as they are stored now."""
    found = [queue.get(job.id) for job in jobs]
    assert all(found)
    return found


def statuses(queue: Queue, *jobs: Job) -> list[str]:
    return [job.status for job in now(queue, *jobs)]


def start(queue: Queue | Shards, most: int = 1000, name: str = "default") -> list[Job]:
    """Start the jobs that wait in a queue, as one worker would."""
    queue.promote()
    return queue.dequeue(queue.register([name], most), [name], most)


def run(queue: Queue | Shards, result: Any = None) -> list[str]:
    """Complete the jobs that wait in the queue now. Return their ids."""
    jobs = start(queue)
    for job in jobs:
        queue.complete(job, result)
    return [job.id for job in jobs]


def fail(queue: Queue, job: Job) -> None:
    """Start a job, with all that wait before it, and fail it. Release the others."""
    for started in start(queue):
        if started.id == job.id:
            queue.fail(started, BOOM)
        else:
            queue.release(started)
    assert queue.get(job.id).status == "failed"


def child(queue: Queue, *parents: Job, **options: Any) -> Job:
    return queue.enqueue("child", None, after=parents, **options)


# Submit ---------------------------------------------------------------------------------------------------------------


def test_start_a_job_after_its_parent_has_completed(queue: Queue) -> None:
    parent = queue.enqueue("parent", None)
    job = child(queue, parent)
    assert job.waiting_for == job.after == (parent.id,)
    assert run(queue) == [parent.id]
    assert now(queue, job)[0].waiting_for == ()
    assert run(queue) == [job.id]


def test_start_a_job_after_the_last_of_many_parents(queue: Queue) -> None:
    parents = queue.enqueue_many("parent", range(1000))
    job = child(queue, *parents)
    *most, last = start(queue)
    queue.settle(last.worker, [Outcome(parent, "complete") for parent in most])
    assert start(queue) == []
    assert now(queue, job)[0].waiting_for == (last.id,)
    queue.complete(last)
    assert run(queue) == [job.id]


def test_start_a_thousand_jobs_after_one_parent(queue: Queue) -> None:
    parent = queue.enqueue("parent", None)
    jobs = queue.enqueue_many("child", range(1000), after=[parent])
    run(queue)
    assert sorted(run(queue)) == sorted(job.id for job in jobs)
    assert queue.stats()["completed"] == 1001


def test_fail_a_thousand_jobs_after_one_parent_and_bring_them_back(queue: Queue) -> None:
    parent = queue.enqueue("parent", None)
    queue.enqueue_many("child", range(1000), after=[parent])
    fail(queue, parent)
    assert queue.stats()["failed"] == 1001
    queue.retry(parent.id)
    assert queue.stats()["pending"] == 1001
    run(queue)
    assert len(run(queue)) == 1000


def test_run_a_chain_of_a_hundred_jobs(queue: Queue) -> None:
    chain = [queue.enqueue("link", 0)]
    for number in range(1, 100):
        chain.append(queue.enqueue("link", number, after=[chain[-1]]))
    assert [run(queue) for _ in range(100)] == [[job.id] for job in chain]


def test_fail_a_chain_of_a_hundred_jobs_and_bring_it_back(queue: Queue) -> None:
    chain = [queue.enqueue("link", 0)]
    for number in range(1, 100):
        chain.append(queue.enqueue("link", number, after=[chain[-1]]))
    fail(queue, chain[0])
    assert set(statuses(queue, *chain)) == {"failed"}
    assert now(queue, chain[-1])[0].error == Failure(
        "DependencyFailed", f"job {chain[-2].id}, which this job waits for, has failed"
    )
    queue.retry(chain[0].id)
    assert set(statuses(queue, *chain)) == {"pending"}
    assert [run(queue) for _ in range(100)] == [[job.id] for job in chain]


def test_run_a_diamond_of_one_batch(queue: Queue) -> None:
    top = queue.draft("job", "top")
    left = queue.draft("job", "left", after=[top])
    right = queue.draft("job", "right", after=[top.id])
    bottom = queue.draft("job", "bottom", after=[left, right])
    assert queue.submit([bottom, left, right, top]) == [bottom, left, right, top]
    assert run(queue) == [top.id]
    assert sorted(run(queue)) == sorted([left.id, right.id])
    assert run(queue) == [bottom.id]


PARENTS: dict[str, Callable[[Queue], Job]] = {
    status: lambda queue, status=status: put(queue, status, queue="other")  # type: ignore[misc]
    for status in ("pending", "delayed", "processing", "completed", "failed", "cancelled")
}


@pytest.mark.parametrize("status", PARENTS)
def test_submit_a_job_whose_parent_has_each_status(queue: Queue, status: str) -> None:
    parent = PARENTS[status](queue)
    job = child(queue, parent)
    ended = status in ("failed", "cancelled")
    assert job.status == statuses(queue, job)[0] == ("failed" if ended else "pending")
    assert bool(job.waiting_for) == (status != "completed")
    assert [job.id] == run(queue) if status == "completed" else start(queue) == []
    if ended:
        text = {"failed": "has failed", "cancelled": "was cancelled"}[status]
        assert job.error == Failure("DependencyFailed", f"job {parent.id}, which this job waits for, {text}")
        assert now(queue, job)[0] == job


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_submit_a_job_that_runs_even_if_its_parent_has_failed(queue: Queue, status: str) -> None:
    job = child(queue, put(queue, status), on_failure="run")
    assert job.waiting_for == ()
    assert run(queue) == [job.id]


def test_submit_a_job_whose_parent_was_purged(queue: Queue) -> None:
    parent = put(queue, "completed")
    queue.forget("completed", [parent.id.encode()])
    other = put(queue, "pending")
    before = raw(queue).dbsize()
    with pytest.raises(InvalidJob, match=f"after: job {parent.id} does not exist"):
        child(queue, other, parent)
    assert raw(queue).dbsize() == before
    assert not now(queue, other)[0].followed


def test_bring_back_a_job_that_was_submitted_after_its_parent_had_failed(queue: Queue) -> None:
    parent = put(queue, "failed")
    left = raw(queue).pttl(queue.keys.job(parent.id))
    job = child(queue, parent)
    assert 0 < raw(queue).pttl(queue.keys.job(parent.id)) <= left
    queue.retry(parent.id)
    assert statuses(queue, parent, job) == ["pending", "pending"]
    run(queue)
    assert run(queue) == [job.id]


WRONG: dict[str, tuple[Any, str]] = {
    "a text": ("a", "must be a list of job ids"),
    "a number": (1, "must be a list of job ids"),
    "a list of others": (["a"], "'a' is neither"),
    "a list of lists": ([[1]], "is neither"),
    "too many": (["a"] * 1001, "at most 1000"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refuse_parents_that_are_no_list_of_ids(queue: Queue, name: str) -> None:
    after, rule = WRONG[name]
    with pytest.raises(InvalidJob, match=rule) as refused:
        queue.enqueue("child", None, after=after)
    assert refused.value.field == "after"


def test_refuse_another_reaction_to_a_failure(queue: Queue) -> None:
    with pytest.raises(InvalidJob, match="onFailure: must be fail or run"):
        queue.enqueue("child", None, on_failure="stop")


def test_refuse_jobs_of_a_batch_that_wait_for_each_other(queue: Queue) -> None:
    one, two, three = (queue.draft("job", None) for _ in range(3))
    one.after = (three.id,)
    two.after = (one.id,)
    three.after = (two.id,)
    with pytest.raises(InvalidJob, match="in a circle: "):
        queue.submit([one, two, three])
    one.after = (one.id,)
    with pytest.raises(InvalidJob, match="in a circle: 0, 0"):
        queue.submit([one])
    assert not raw(queue).keys("*job*")


def test_refuse_more_links_than_a_batch_may_have(queue: Queue) -> None:
    parents = queue.enqueue_many("parent", range(101))
    with pytest.raises(InvalidJob, match="after: must be at most 10000"):
        queue.enqueue_many("child", range(100), after=parents)


# The ends of parents --------------------------------------------------------------------------------------------------


def release_each_time(queue: Queue, job: Job) -> None:
    """Let a worker release a job until it has no attempt left to refund."""
    while queue.get(job.id).status == "pending":
        for started in start(queue):
            queue.release(started)


def lose_worker(queue: Queue, job: Job) -> None:
    [started] = start(queue)
    lapse(queue, started.worker)
    queue.reap(started.worker)


def cancel_running(queue: Queue, job: Job) -> None:
    [started] = start(queue)
    queue.cancel(job.id)
    queue.fail(started, BOOM, 1)


def expire(queue: Queue, job: Job) -> None:
    queue.clock.ahead += 61_000
    assert start(queue) == []
    queue.clock.ahead -= 61_000


def exchange_outcome(queue: Queue, job: Job) -> None:
    [started] = start(queue)
    queue.exchange(started.worker, [Outcome(started, "fail", error=BOOM)], [], 0, {started.id: started})


ENDS: dict[str, tuple[str, Callable[[Queue, Job], Any]]] = {
    "fail": ("has failed", fail),
    "exchange": ("has failed", exchange_outcome),
    "release": ("has failed", release_each_time),
    "reap": ("has failed", lose_worker),
    "expire": ("has failed", expire),
    "cancel": ("was cancelled", lambda queue, job: queue.cancel(job.id)),
    "cancel while it runs": ("was cancelled", cancel_running),
}


@pytest.mark.parametrize("end", ENDS)
def test_fail_a_job_whatever_ends_its_parent(queue: Queue, end: str) -> None:
    parent = queue.enqueue("parent", None, max_attempts=1, expires_in=60)
    job = child(queue, parent)
    text, act = ENDS[end]
    act(queue, parent)
    [failed] = now(queue, job)
    assert failed.status == "failed"
    assert failed.error.type == "DependencyFailed"
    assert failed.error.message.endswith(text)
    assert queue.stats()["pending"] == 0


@pytest.mark.parametrize("end", ENDS)
def test_run_a_job_whatever_ends_its_parent(queue: Queue, end: str) -> None:
    parent = queue.enqueue("parent", None, max_attempts=1, expires_in=60)
    job = child(queue, parent, on_failure="run")
    ENDS[end][1](queue, parent)
    assert run(queue) == [job.id]


def test_wait_while_a_parent_is_retried_after_its_backoff(queue: Queue) -> None:
    parent = queue.enqueue("parent", None)
    job = child(queue, parent)
    [started] = start(queue)
    queue.fail(started, BOOM, 60)
    assert statuses(queue, parent, job) == ["pending", "pending"]
    queue.clock.ahead += 61_000
    assert run(queue) == [parent.id]
    assert run(queue) == [job.id]


def test_bring_back_a_job_when_its_parent_is_retried(queue: Queue) -> None:
    one, two = queue.enqueue("parent", 1), queue.enqueue("parent", 2)
    job = child(queue, one, two)
    fail(queue, one)
    assert statuses(queue, job) == ["failed"]
    queue.retry(one.id)
    assert statuses(queue, job) == ["pending"]
    assert sorted(run(queue)) == sorted([one.id, two.id])
    assert run(queue) == [job.id]
    assert queue.get(job.id).error is None


def test_fail_a_job_again_whose_other_parent_has_failed_meanwhile(queue: Queue) -> None:
    one, two = queue.enqueue("parent", 1), queue.enqueue("parent", 2)
    job = child(queue, one, two)
    queue.cancel(one.id)
    queue.cancel(two.id)
    queue.retry(one.id)
    [again] = now(queue, job)
    assert again.status == "failed"
    assert two.id in again.error.message
    queue.retry(two.id)
    run(queue)
    assert run(queue) == [job.id]


def test_leave_a_job_failed_that_has_lost_its_unique_key(queue: Queue) -> None:
    parent = queue.enqueue("parent", None)
    job = child(queue, parent, unique_key="a")
    queue.cancel(parent.id)
    other = queue.enqueue("other", None, unique_key="a", delay=60)
    queue.retry(parent.id)
    run(queue)
    assert statuses(queue, job, other) == ["failed", "pending"]
    assert queue.get(job.id).waiting_for == ()
    queue.cancel(other.id)
    queue.retry(job.id)
    assert run(queue) == [job.id]


@pytest.mark.parametrize("verb", ["purge", "expire"])
@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
def test_treat_a_parent_that_is_gone_as_it_ended(server: Server, end: str, verb: str) -> None:
    """The process that ended the parent dies before it advances, and the parent's record goes first."""
    queue = server.queue(keep_completed=1, keep_failed=1)
    queue.store.advance = lambda: None
    parent = queue.enqueue("parent", None)
    job = child(queue, parent)
    if end == "cancelled":
        queue.cancel(parent.id)
    else:
        [started] = start(queue)
        queue.complete(started) if end == "completed" else queue.fail(started, BOOM)
    if verb == "purge":
        queue.forget(end, [parent.id.encode()])
    else:
        queue.clock.ahead += 2000
        raw(queue).delete(queue.keys.job(parent.id))
    assert queue.advance() == 1
    [found] = now(queue, job)
    assert found.status == ("pending" if end == "completed" else "failed")
    if end != "completed":
        assert found.error.message.endswith({"failed": "has failed", "cancelled": "was cancelled"}[end])
        queue.retry(job.id)
        queue.advance()
        assert now(queue, job)[0].status == "failed"
    check_consistency(queue)


# The ends and retries of the jobs that wait ---------------------------------------------------------------------------


def test_cancel_a_job_before_its_parent_ends(queue: Queue) -> None:
    parent = queue.enqueue("parent", None)
    job = child(queue, parent)
    queue.cancel(job.id)
    run(queue)
    assert statuses(queue, job) == ["cancelled"]
    assert run(queue) == []
    queue.retry(job.id)
    assert run(queue) == [job.id]


def test_retry_a_cancelled_job_that_still_waits(queue: Queue) -> None:
    parent = queue.enqueue("parent", None)
    job = child(queue, parent)
    queue.cancel(job.id)
    queue.retry(job.id)
    assert now(queue, job)[0].waiting_for == (parent.id,)
    assert run(queue) == [parent.id]
    assert run(queue) == [job.id]


def test_retry_a_job_whose_parent_has_failed(queue: Queue) -> None:
    parent = put(queue, "failed")
    job = child(queue, parent)
    queue.retry(job.id)
    assert statuses(queue, job) == ["failed"]
    assert start(queue) == []


def test_retry_a_job_whose_parent_has_failed_and_was_purged(queue: Queue) -> None:
    parent = put(queue, "failed")
    job = child(queue, parent)
    queue.forget("failed", [parent.id.encode()])
    raw(queue).delete(queue.keys.next(parent.id))  # its time to live is over
    queue.retry(job.id)
    assert statuses(queue, job) == ["failed"]


def test_expire_a_job_that_still_waits(queue: Queue) -> None:
    parent = queue.enqueue("parent", None, delay=100)
    job = child(queue, parent, expires_in=60)
    last = child(queue, job)
    queue.clock.ahead += 59_000
    assert start(queue) == []
    assert statuses(queue, job) == ["pending"]
    queue.clock.ahead += 2000
    assert start(queue) == []
    assert statuses(queue, job, last) == ["failed", "failed"]
    assert now(queue, job)[0].error == Failure("Expired", "expired before it was started")
    queue.clock.ahead += 100_000
    assert run(queue) == [parent.id]
    assert statuses(queue, job) == ["failed"]


def test_wait_for_the_delay_after_the_parents(queue: Queue) -> None:
    parent = queue.enqueue("parent", None)
    job = child(queue, parent, delay=60)
    run(queue)
    assert start(queue) == []
    queue.clock.ahead += 61_000
    assert run(queue) == [job.id]


def test_drop_the_id_of_a_job_that_waits_from_a_list(queue: Queue) -> None:
    """A list is a hint: an older version may have listed the job."""
    parent = queue.enqueue("parent", None, delay=60)
    job = child(queue, parent)
    raw(queue).lpush(queue.keys.jobs("default"), job.id)
    assert start(queue) == []
    assert statuses(queue, job) == ["pending"]


# Keys and shards ------------------------------------------------------------------------------------------------------


def test_wait_for_the_job_that_has_the_unique_key_of_a_parent(queue: Queue) -> None:
    holder = queue.enqueue("parent", 1, unique_key="a")
    parent = queue.draft("parent", 2, unique_key="a")
    job = queue.draft("child", None, after=[parent])
    stored = queue.submit([parent, job])
    assert [stored[0].id, stored[1].after] == [holder.id, (holder.id,)]
    assert run(queue) == [holder.id]
    assert run(queue) == [job.id]


def test_refuse_a_circle_that_a_unique_key_closes(queue: Queue) -> None:
    first = queue.draft("job", 1, unique_key="a")
    second = queue.draft("job", 2, unique_key="a")
    middle = queue.draft("job", 3, after=[second])
    first.after = (middle.id,)
    with pytest.raises(InvalidJob, match="in a circle"):
        queue.submit([first, second, middle])


def test_return_the_first_job_under_an_idempotency_key(queue: Queue) -> None:
    parent = put(queue, "completed")
    jobs = [queue.draft("child", None, after=[parent]) for _ in range(2)]
    [first] = queue.submit(jobs[:1], Once("a", "b"))
    queue.forget("completed", [parent.id.encode()])
    [again] = queue.submit(jobs[1:], Once("a", "b"))
    assert again.id == first.id
    assert run(queue) == [first.id]


@pytest.fixture
def echo(no_handlers: None) -> None:
    @handler("echo")
    def echo(payload: Any) -> None: ...


@pytest.mark.usefixtures("echo")
def test_submit_a_job_with_parents_over_http(api: Client, queue: Queue) -> None:
    parent = api.post("/jobs", {"type": "echo", "payload": 1}).json["jobId"]
    body = {"type": "echo", "payload": 2, "after": [parent], "onFailure": "run"}
    answer = api.post("/jobs", body)
    assert (answer.status, answer.json["status"]) == (201, "pending")
    job = api.get(answer.headers["location"]).json
    assert (job["after"], job["waitingFor"], job["onFailure"]) == ([parent], [parent], "run")
    run(queue)
    assert "waitingFor" not in api.get(answer.headers["location"]).json
    assert run(queue) == [job["id"]]


@pytest.mark.usefixtures("echo")
def test_submit_a_job_over_http_whose_parent_has_failed(api: Client, queue: Queue) -> None:
    answer = api.post("/jobs", {"type": "echo", "payload": 2, "after": [put(queue, "failed").id]})
    assert (answer.status, answer.json["status"], answer.json.get("duplicate")) == (201, "failed", None)


@pytest.mark.usefixtures("echo")
def test_refuse_a_job_over_http_whose_parent_is_missing(api: Client, queue: Queue) -> None:
    missing = queue.draft("echo", 1).id
    answer = api.post("/jobs", {"type": "echo", "payload": 2, "after": [missing]})
    assert answer.status == 422
    assert f"job {missing} does not exist" in answer.problem["detail"]


def batch(*jobs: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "echo", "payload": None} | job for job in jobs]


@pytest.mark.usefixtures("echo")
def test_submit_a_batch_whose_jobs_name_each_other(api: Client, queue: Queue) -> None:
    there = queue.enqueue("echo", None)
    jobs = batch({"after": ["left", "right"]}, {"ref": "left", "after": ["top"]}, {"ref": "right", "after": ["top"]})
    answer = api.post("/jobs/batch", [*jobs, *batch({"ref": "top", "after": [there.id]})])
    assert answer.status == 201
    bottom, left, right, top = (job["jobId"] for job in answer.json["jobs"])
    assert queue.get(bottom).after == (left, right)
    assert [sorted(run(queue)) for _ in range(4)] == [[there.id], [top], sorted([left, right]), [bottom]]


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a circle": (batch({"ref": "a", "after": ["b"]}, {"ref": "b", "after": ["a"]}), "in a circle"),
    "itself": (batch({"ref": "a", "after": ["a"]}), "in a circle"),
    "an unknown ref": (batch({"ref": "a"}, {"after": ["b"]}), "'b' is neither"),
    "a ref that is taken": (batch({"ref": "a"}, {"ref": "a"}), "ref: must differ"),
    "a ref with a blank": (batch({"ref": "a b"}), "ref: must be 1 to 100"),
    "a ref that is an id": (batch({"ref": "01a2155f-3143-7000-b0c9-28342567d0c6"}), "and not a job id"),
    "a ref that is a number": (batch({"ref": 1}), "ref: must be 1 to 100"),
}


@pytest.mark.usefixtures("echo")
@pytest.mark.parametrize("name", REFUSED)
def test_refuse_a_batch_as_a_whole(api: Client, queue: Queue, name: str) -> None:
    jobs, text = REFUSED[name]
    answer = api.post("/jobs/batch", [*jobs, *batch({})])
    assert answer.status == 422
    assert text in answer.problem["detail"]
    assert queue.stats()["pending"] == 0


@pytest.mark.usefixtures("echo")
def test_submit_the_valid_part_of_a_batch_whose_jobs_name_each_other(api: Client, queue: Queue) -> None:
    jobs = batch(
        {"after": ["b"]}, {"ref": "b", "after": ["a"]}, {"ref": "a", "delay": -1}, {"ref": "c"}, {"after": ["c"]}
    )
    answers = api.post("/jobs/batch?partial=true", jobs).json["jobs"]
    assert ["error" in answer for answer in answers] == [True, True, True, False, False]
    assert "is invalid" in answers[0]["error"]["detail"]
    assert [run(queue), run(queue)] == [[answers[3]["jobId"]], [answers[4]["jobId"]]]


# Shards ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(server: Server) -> Iterator[Shards]:
    parts = [server.queue(namespace=f"queue.{at}") for at in range(3)]
    shards = Shards(parts)
    yield shards
    for part in parts:
        check_consistency(part)
    shards.disconnect()


def test_submit_a_job_to_the_shard_of_its_parents(shards: Shards) -> None:
    for number in range(6):
        parent = shards.enqueue("parent", number)
        job = shards.enqueue("child", None, after=[parent])
        assert shards.part_of(job.id) is shards.part_of(parent.id)
        assert run(shards) == [parent.id]
        assert run(shards) == [job.id]


def test_submit_a_batch_to_the_shard_of_its_parents(shards: Shards) -> None:
    parent = shards.enqueue("parent", None)
    one = shards.draft("child", 1, after=[parent])
    two = shards.draft("child", 2, after=[one, parent])
    shards.submit([one, two])
    assert two.after == (one.id, parent.id)
    assert [run(shards) for _ in range(3)] == [[parent.id], [one.id], [two.id]]


def test_refuse_parents_in_different_shards(shards: Shards) -> None:
    parents = [shards.enqueue("parent", number) for number in range(3)]
    with pytest.raises(InvalidJob, match="after: must be jobs of one shard"):
        shards.enqueue("child", None, after=parents)


def test_refuse_a_parent_in_another_shard_than_the_unique_key(shards: Shards) -> None:
    parents = [shards.enqueue("parent", number) for number in range(3)]
    stored = 0
    for parent in parents:
        try:
            shards.enqueue("child", None, after=[parent], unique_key="a")
            stored += 1
        except InvalidJob as error:
            assert "that of the uniqueKey" in str(error)  # noqa: PT017
    assert stored == 1
    assert len([run(shards), run(shards)][1]) == 1


# Reading --------------------------------------------------------------------------------------------------------------


def test_list_and_count_a_job_that_waits(queue: Queue) -> None:
    parent = queue.enqueue("parent", None)
    job = child(queue, parent)
    assert {found.id for found in queue.page()[0]} == {parent.id, job.id}
    assert queue.stats()["pending"] == 2
    assert queue.queues()["default"]["pending"] == 2
    assert queue.scale()["ready"] == 1
    answer = job.answer()
    assert answer["after"] == answer["waitingFor"] == [parent.id]
    assert "followed" not in queue.get(parent.id).answer()


def test_change_many_jobs_that_wait(queue: Queue) -> None:
    parent = queue.enqueue("parent", None)
    queue.enqueue_many("child", range(10), after=[parent])
    waiting = tinyqueue.Filter("pending", "child")
    assert queue.change_many("cancel", waiting)["cancelled"] == 10
    cancelled = tinyqueue.Filter("cancelled")
    assert queue.change_many("retry", cancelled)["retried"] == 10
    run(queue)
    assert len(run(queue)) == 10


def test_give_a_handler_the_results_of_its_parents(queue: Queue) -> None:
    seen: list[Any] = []

    @handler("child")
    def add(payload: Any, job: Job) -> int:
        seen.extend(parent and (parent.status, parent.result) for parent in job.parents())
        return sum(parent.result for parent in job.parents() if parent)

    one = queue.enqueue("parent", 1)
    run(queue, 1)
    two = queue.enqueue("parent", 2)
    gone = put(queue, "completed", queue="other")
    child(queue, one, two, gone)
    run(queue, 2)
    queue.forget("completed", [gone.id.encode()])
    [job] = start(queue)
    assert add.run(job) == 3
    assert seen == [("completed", 1), ("completed", 2), None]


def test_refuse_the_parents_of_a_job_that_no_worker_started() -> None:
    job = tinyqueue.make_job(0, "child", None, after=["00000000-0000-7000-8000-000000000000"])
    with pytest.raises(tinyqueue.TinyQueueError, match="was not started by a worker"):
        job.parents()
    assert tinyqueue.make_job(0, "child", None).parents() == []


# Faults ---------------------------------------------------------------------------------------------------------------


def test_advance_by_another_after_the_one_that_ended_the_parent_died(queue: Queue, server: Server) -> None:
    parent = queue.enqueue("parent", None)
    job = child(queue, parent)
    dying = server.queue()
    dying.store.advance = lambda: None
    run(dying)
    assert now(queue, job)[0].waiting_for == (parent.id,)
    queue.promote()
    assert now(queue, job)[0].waiting_for == (parent.id,)
    queue.clock.ahead += SWEEP_AFTER
    assert run(queue) == [job.id]
    assert raw(queue).zcard(queue.keys.delayed) == 0


def test_advance_after_the_one_that_held_the_lock_died(queue: Queue) -> None:
    raw(queue).set(queue.keys.advancer, "1", px=20)
    parent = queue.enqueue("parent", None)
    job = child(queue, parent)
    run(queue)
    until(lambda: not raw(queue).exists(queue.keys.advancer))
    queue.clock.ahead += SWEEP_AFTER
    assert run(queue) == [job.id]


def test_sweep_until_no_token_is_left(queue: Queue) -> None:
    parent = queue.enqueue("parent", None)
    job = child(queue, parent)
    raw(queue).set(queue.keys.advancer, "1", px=20)
    run(queue)
    queue.clock.ahead += SWEEP_AFTER
    queue.promote()
    until(lambda: not raw(queue).exists(queue.keys.advancer))
    queue.promote()
    assert run(queue) == [job.id]


@pytest.mark.parametrize("token", [b"a", b"a:b", b"\xff", b":", b"a:completed:1"])
def test_advance_past_a_token_that_nobody_wrote(queue: Queue, token: bytes) -> None:
    parent = queue.enqueue("parent", None)
    job = child(queue, parent)
    raw(queue).lpush(queue.keys.advance, token)
    run(queue)
    assert run(queue) == [job.id]
    assert not raw(queue).exists(queue.keys.advance)


def test_repeat_a_token_without_harm(queue: Queue) -> None:
    parent = queue.enqueue("parent", None)
    job = child(queue, parent)
    run(queue)
    [started] = start(queue)
    raw(queue).rpush(queue.keys.advance, *(f"{parent.id}:{status}:1" for status in ("completed", "pending", "failed")))
    assert queue.advance() == 3
    assert statuses(queue, job) == ["processing"]
    queue.complete(started)


@pytest.mark.parametrize("status", ["pending", "processing", "failed"])
def test_keep_the_mark_of_a_parent(queue: Queue, status: str) -> None:
    parent = put(queue, status)
    job = child(queue, parent)
    if status == "processing":
        queue.write_progress(parent)
        assert now(queue, parent)[0].followed
        queue.complete(parent)
    else:
        if status == "failed":
            queue.retry(parent.id)
        run(queue)
    assert now(queue, parent)[0].followed
    assert run(queue) == [job.id]


def test_end_the_last_parents_at_once(server: Server) -> None:
    """50 workers end the parents of one job at the same moment. It starts once."""
    queue = server.queue()
    queues = [server.queue() for _ in range(10)]
    parents = queue.enqueue_many("parent", range(50))
    job = child(queue, *parents)
    started = start(queue)
    assert len(started) == len(parents)
    barrier = threading.Barrier(50)

    def end(one: Job, its: Queue) -> None:
        barrier.wait()
        its.complete(one)

    threads = [
        threading.Thread(target=end, args=(one, its))
        for one, its in zip(started, itertools.cycle(queues), strict=False)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.advance()
    assert [again.id for again in start(queue)] == [job.id]
    assert start(queue) == []
    check_consistency(queue)


def test_push_and_read_nothing_for_a_job_that_nobody_follows(near: Queue) -> None:
    with raw(near).monitor() as monitor:
        put(near, "completed")
        near.retry(put(near, "failed").id)
        near.cancel(put(near, "pending", queue="other").id)
        raw(near).echo("end")
        seen = list(itertools.takewhile(lambda command: command["command"] != "ECHO end", monitor.listen()))
    assert not [command for command in seen if "advance" in command["command"] or ":next:" in command["command"]]


def test_end_a_parent_whose_reply_was_lost(near: Queue, far: Queue, proxy: CutProxy) -> None:
    parent = near.enqueue("parent", None)
    job = child(near, parent)
    [started] = start(far)
    proxy.drop_reply(b"EXEC")
    far.complete(started)
    assert run(near) == [job.id]


def test_end_a_parent_whose_advance_got_no_reply(near: Queue, far: Queue, proxy: CutProxy) -> None:
    parent = near.enqueue("parent", None)
    job = child(near, parent)
    [started] = start(far)
    proxy.drop_reply(b"SREM")
    far.complete(started)
    assert near.advance() == 0
    assert run(near) == [job.id]


@pytest.mark.parametrize("end", ["completed", "failed"])
def test_submit_while_the_parent_ends(near: Queue, far: Queue, proxy: CutProxy, end: str) -> None:
    parent = near.enqueue("parent", None)
    [started] = start(near)
    job = far.draft("child", None, after=[parent])
    act = {"completed": lambda: near.complete(started), "failed": lambda: near.fail(started, BOOM)}[end]
    proxy.before(b"MSETNX", act)
    far.submit([job])
    assert run(near) == ([job.id] if end == "completed" else [])
    assert statuses(near, job) == [end]


def test_submit_while_the_parent_is_purged(near: Queue, far: Queue, proxy: CutProxy) -> None:
    parent = put(near, "failed")
    job = far.draft("child", None, after=[parent], on_failure="run")
    proxy.before(b"MSETNX", lambda: near.forget("failed", [parent.id.encode()]))
    with pytest.raises(InvalidJob, match="does not exist"):
        far.submit([job])


@pytest.mark.parametrize("verb", ["retry the parent", "cancel the job", "complete it by another"])
def test_advance_while_others_change_the_jobs(near: Queue, far: Queue, proxy: CutProxy, verb: str) -> None:
    parent = near.enqueue("parent", None)
    job = child(near, parent)
    near.store.advance = int
    near.cancel(parent.id)
    acts = {
        "retry the parent": lambda: near.retry(parent.id),
        "cancel the job": lambda: near.cancel(job.id),
        "complete it by another": lambda: Queue(near.pool).advance(),
    }
    proxy.before(b"MULTI", acts[verb])
    far.advance()
    wanted = {"retry the parent": "pending", "cancel the job": "cancelled", "complete it by another": "failed"}
    assert statuses(near, job) == [wanted[verb]]


# Lost keys ------------------------------------------------------------------------------------------------------------


def test_restore_lists_no_job_that_waits(queue: Queue) -> None:
    parent = queue.enqueue("parent", None, delay=60)
    job = child(queue, parent)
    assert not queue.restore(job.id)
    raw(queue).delete(queue.keys.delayed, queue.keys.next(parent.id))
    assert queue.restore(job.id)
    assert queue.restore(parent.id)
    queue.clock.ahead += 61_000
    assert run(queue) == [parent.id]
    assert run(queue) == [job.id]


def test_repair_the_dependents_of_a_job_whose_end_an_older_version_wrote(queue: Queue) -> None:
    """It keeps the mark, but pushes no token."""
    parent, other = queue.enqueue("parent", 1), queue.enqueue("parent", 2)
    jobs = [child(queue, parent), child(queue, other, parent)]
    run(queue)
    for job in jobs:
        record = json.loads(raw(queue).get(queue.keys.job(job.id)))
        raw(queue).set(queue.keys.job(job.id), json.dumps(record | {"waitingFor": record["after"]}))
        raw(queue).lrem(queue.keys.jobs("default"), 0, job.id)
        raw(queue).zadd(queue.keys.delayed, {job.id: "inf"})
    assert start(queue) == []
    repair([queue])
    assert sorted(run(queue)) == sorted(job.id for job in jobs)


def test_find_a_job_that_waits_for_one_whose_end_was_not_seen(queue: Queue) -> None:
    """An older version of a worker ends a parent, and pushes no token."""
    parent = queue.enqueue("parent", None)
    jobs = [
        child(queue, parent),
        *queue.enqueue_many("child", range(150), after=[queue.enqueue("parent", 1, delay=60)]),
    ]
    [started] = start(queue)
    unseen = json.loads(raw(queue).get(queue.keys.job(parent.id)))
    raw(queue).set(queue.keys.job(parent.id), json.dumps(unseen | {"followed": False}))
    queue.complete(started)
    assert start(queue) == []
    findings = [finding for _ in range(50) for finding in find_forgotten(queue)]
    assert [finding.seen for finding in findings] == ["1 job that waited looked at again: their parents have ended"]
    assert run(queue) == [jobs[0].id]
    assert find_forgotten(queue) == []


def test_find_nothing_with_one_command_where_no_job_waits(near: Queue) -> None:
    put(near, "delayed")
    with raw(near).monitor() as monitor:
        find_forgotten(near)
        raw(near).echo("end")
        seen = list(itertools.takewhile(lambda command: command["command"] != "ECHO end", monitor.listen()))
    assert [command["command"] for command in seen] == ["ZCOUNT {queue}:delayed inf inf"]


def test_start_limited_jobs_after_their_parent_one_by_one(queue: Queue) -> None:
    @handler("limited", max_running=1)
    def limited(payload: Any) -> None: ...

    parent = queue.enqueue("limited", 0)
    jobs = queue.enqueue_many("limited", range(5), after=[parent])
    [started] = start(queue)
    queue.complete(started)
    ran = []
    while jobs_now := start(queue):
        [job] = jobs_now
        ran.append(job.id)
        queue.complete(job)
    assert sorted(ran) == sorted(job.id for job in jobs)


def test_submit_after_a_reply_was_lost(near: Queue, far: Queue, proxy: CutProxy) -> None:
    parent = near.enqueue("parent", None)
    job = far.draft("child", None, after=[parent])
    proxy.drop_reply(b"EXEC")
    far.submit([job])
    run(near)
    assert run(near) == [job.id]


# Backups --------------------------------------------------------------------------------------------------------------


def move(queue: Queue, file: str, meanwhile: Callable[[], Any] = int, **options: Any) -> None:
    """Back up, wipe, restore and resume. `meanwhile` runs after the jobs that wait have been read."""
    back_up(queue, file, Steps(meanwhile))
    raw(queue).flushall()
    for name in restore(queue, file, NoBar(), **options).resumable:
        queue.resume(name)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "backup.jsonl")


def test_restore_jobs_that_wait(queue: Queue, file: str) -> None:
    first, second = queue.enqueue("parent", 1), queue.enqueue("parent", 2, queue="other")
    job = child(queue, first, second)
    last = child(queue, job)
    move(queue, file)
    assert run(queue) == [first.id]
    [parent] = start(queue, name="other")
    queue.complete(parent)
    assert [run(queue), run(queue)] == [[job.id], [last.id]]


def test_restore_a_job_whose_parent_completed_while_the_backup_was_made(queue: Queue, file: str) -> None:
    parent = queue.enqueue("parent", None)
    job = child(queue, parent)
    move(queue, file, lambda: run(queue))
    assert queue.get(parent.id) is None
    assert run(queue) == [job.id]


def test_restore_a_job_that_failed_because_of_its_parent(queue: Queue, file: str) -> None:
    parent = put(queue, "failed")
    job = child(queue, parent)
    move(queue, file)
    assert statuses(queue, parent, job) == ["failed", "failed"]
    queue.retry(parent.id)
    assert [run(queue), run(queue)] == [[parent.id], [job.id]]


def test_restore_a_job_whose_parent_is_left_out(queue: Queue, file: str) -> None:
    parent = queue.enqueue("parent", None)
    queue.clock.ahead += 100_000
    job = child(queue, parent)
    move(queue, file, oldest=50_000)
    assert queue.get(parent.id) is None
    assert statuses(queue, job) == ["failed"]
