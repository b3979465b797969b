"""What an operator does to jobs and workers: run now, replay, purge, count, groups of failures, quiet, audit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec
import pytest
from client import NO_BODY, Client
from conftest import Server, check_consistency, disconnect, dump, find_lost, lapse, put, raw

from tinyqueue import (
    Failure,
    InvalidJob,
    Job,
    Once,
    Queue,
    WrongStatus,
    handler,
)
from tinyqueue_shards import Shards

BOOM = Failure("Boom", "it broke")
NO_JOB = "01900000-0000-7000-8000-000000000000"


class Mail(msgspec.Struct):
    to: str


@pytest.fixture(autouse=True)
def handlers(no_handlers: None) -> None:
    @handler("echo")
    def echo(payload: Any) -> Any: ...

    @handler("mail", max_attempts=1)
    def mail(payload: Mail) -> None: ...


@pytest.fixture
def shards(server: Server) -> Iterator[Shards]:
    """Three shards on each server."""
    shards = Shards([server.queue(namespace=f"queue.{at}") for at in range(3)])
    yield shards
    for part in shards.parts:
        check_consistency(part)
    shards.disconnect()
    disconnect([part.pool for part in shards.parts])


def fail(queue: Queue, job: Job, after: float | None = None, error: Failure = BOOM) -> Job:
    """Start a pending job and fail its attempt."""
    worker = queue.register([job.queue], 1)
    [started] = queue.dequeue(worker, [job.queue])
    assert started.id == job.id
    queue.fail(started, error, after)
    queue.deregister(worker)
    found = queue.get(job.id)
    assert found
    return found


# Run now --------------------------------------------------------------------------------------------------------------


def test_hasten_a_delayed_job_before_the_others_of_its_queue(queue: Queue) -> None:
    job = put(queue, "delayed")
    queue.enqueue("echo", 2)
    hastened = queue.hasten(job.id)
    assert (hastened.run_at, hastened.attempts) == (0, 0)
    [started] = queue.dequeue(queue.register(["default"], 1), ["default"])
    assert started.id == job.id


def test_hasten_a_retrying_job_and_keep_its_attempts(queue: Queue) -> None:
    job = fail(queue, queue.enqueue("echo", 1), after=60)
    assert queue.stats()["retrying"] == 1
    queue.hasten(job.id)
    [started] = queue.dequeue(queue.register(["default"], 1), ["default"])
    assert (started.id, started.attempts, started.error) == (job.id, 2, BOOM)
    assert queue.stats()["retrying"] == 0


def test_hasten_wakes_a_worker_that_waits(queue: Queue) -> None:
    job = put(queue, "delayed")
    assert queue.wait(["default"], 0.01) == set()
    queue.hasten(job.id)
    assert queue.wait(["default"], 0.01) == {"default"}


def test_hasten_a_job_whose_promotion_is_near_starts_it_once(queue: Queue) -> None:
    job = put(queue, "delayed")
    queue.hasten(job.id)
    queue.clock.ahead += 61_000
    queue.promote()
    worker = queue.register(["default"], 3)
    assert [started.id for started in queue.dequeue(worker, ["default"], 3)] == [job.id]


def test_hasten_an_unknown_job(queue: Queue) -> None:
    assert queue.hasten(NO_JOB) is None
    assert queue.hasten("no id") is None


def test_run_a_job_now_over_http(queue: Queue, api: Client) -> None:
    job = put(queue, "delayed")
    answer = api.call("POST", f"/jobs/{job.id}/run")
    assert (answer.status, answer.json) == (200, {"jobId": job.id, "status": "pending"})
    again = api.call("POST", f"/jobs/{job.id}/run")
    assert (again.status, again.kind, again.problem["jobStatus"]) == (409, "wrong-status", "pending")
    assert "it is due already" in again.problem["detail"]
    assert api.call("POST", f"/jobs/{NO_JOB}/run").status == 404


def test_hasten_with_shards(shards: Shards) -> None:
    jobs = [shards.enqueue("echo", at, delay=60) for at in range(6)]
    assert all(shards.hasten(job.id).run_at == 0 for job in jobs)
    assert shards.waiting(["default"]) == 6


# Purge one ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_purge_one_job(queue: Queue, api: Client, status: str) -> None:
    job, other = put(queue, status), put(queue, status)
    answer = api.call("POST", f"/jobs/{job.id}/purge")
    assert (answer.status, answer.json) == (200, {"jobId": job.id, "status": status})
    assert queue.get(job.id) is None
    assert queue.get(other.id) == other
    assert queue.stats()[status] == 1
    assert api.call("POST", f"/jobs/{job.id}/purge").status == 404


@pytest.mark.parametrize("status", ["pending", "delayed", "processing"])
def test_refuse_to_purge_a_job_that_has_not_ended(queue: Queue, api: Client, status: str) -> None:
    job = put(queue, status)
    before = dump(queue)
    assert (answer := api.call("POST", f"/jobs/{job.id}/purge")).status == 409
    assert answer.kind == "wrong-status"
    with pytest.raises(WrongStatus):
        queue.purge_one(job.id)
    assert dump(queue) == before


def test_purge_one_with_shards(shards: Shards) -> None:
    jobs = [shards.enqueue("echo", at) for at in range(4)]
    for job in jobs:
        shards.cancel(job.id)
    assert [shards.purge_one(job.id).id for job in jobs] == [job.id for job in jobs]
    assert shards.page()[0] == []


# Purge many -----------------------------------------------------------------------------------------------------------


def test_purge_the_jobs_that_match_over_http(queue: Queue, api: Client) -> None:
    put(queue, "failed")
    mails = [fail(queue, queue.enqueue("mail", {"to": str(at)})) for at in range(3)]
    put(queue, "cancelled")
    answer = api.post("/jobs/purge", {"status": "failed", "type": "mail", "most": 2})
    assert (answer.status, answer.json["purged"]) == (200, 2)
    assert [queue.get(job.id) is None for job in mails] == [False, True, True]
    rest = {"status": "failed", "type": "mail", "cursor": answer.json["cursor"]}
    assert api.post("/jobs/purge", rest).json == {"purged": 1, "cursor": None}
    assert [job.type for job in queue.page()[0]] == ["echo", "echo"]


@pytest.mark.parametrize("fields", [{}, {"status": "pending"}, {"status": ""}, {"status": "failed", "most": 0}])
def test_refuse_to_purge_jobs_without_an_end_or_a_number(queue: Queue, api: Client, fields: Any) -> None:
    put(queue, "pending")
    assert (answer := api.post("/jobs/purge", fields)).status == 422
    assert answer.problem["field"] == ("most" if "most" in fields else "status")
    assert queue.stats()["pending"] == 1


# Replay ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_replay_an_ended_job_with_what_it_was_submitted_with(queue: Queue, status: str) -> None:
    old = put(queue, status, max_attempts=7, queue="other", unique_key="a", callback_url="http://receiver.example/")
    before = raw(queue).get(queue.keys.job(old.id))
    new = queue.replay(old.id)
    assert new.id != old.id
    assert (new.status, new.attempts, new.replay_of, new.payload) == ("pending", 0, old.id, old.payload)
    fields = ("type", "queue", "max_attempts", "unique_key", "callback_url")
    assert [getattr(new, field) for field in fields] == [getattr(old, field) for field in fields]
    assert (new.result, new.error, new.ended_at, new.callback_job) == (None, None, 0, "")
    assert queue.get(new.id) == new
    assert raw(queue).get(queue.keys.job(old.id)) == before


def test_replay_with_another_payload_and_other_fields(queue: Queue, api: Client) -> None:
    old = fail(queue, queue.enqueue("mail", {"to": "wrong"}, expires_in=60))
    fields = {"payload": {"to": "right"}, "queue": "slow", "delay": 60, "maxAttempts": 2}
    answer = api.post(f"/jobs/{old.id}/replay", fields)
    assert answer.status == 201
    assert answer.headers["location"] == f"../{answer.json['jobId']}"
    new = api.get(f"/jobs/{answer.json['jobId']}").json
    assert (new["replayOf"], new["payload"], new["queue"]) == (old.id, {"to": "right"}, "slow")
    assert (new["maxAttempts"], new["runAt"] > new["createdAt"], "expiresAt" in new) == (2, True, False)
    assert queue.get(old.id) == old


def test_replay_over_http_needs_no_body(queue: Queue, api: Client) -> None:
    old = put(queue, "failed")
    answer = api.call("POST", f"/jobs/{old.id}/replay", NO_BODY, {"X-Request-ID": "mine"})
    new = queue.get(answer.json["jobId"])
    assert (answer.status, new.replay_of, new.payload, new.request_id) == (201, old.id, old.payload, "mine")


def test_replay_checks_the_payload_against_the_type(queue: Queue, api: Client) -> None:
    old = fail(queue, queue.enqueue("mail", {"to": "wrong"}))
    before = dump(queue)
    answer = api.post(f"/jobs/{old.id}/replay", {"payload": {"to": 7}})
    assert (answer.status, answer.kind) == (422, "invalid-job")
    assert (answer.problem["field"], answer.problem["path"]) == ("payload", "$.to")
    with pytest.raises(InvalidJob):
        queue.replay(old.id, payload={})
    assert dump(queue) == before


REFUSED = {
    "another type": ({"type": "echo"}, "type"),
    "unknown field": ({"priority": 1}, "priority"),
    "no object": ([], "job"),
    "wrong queue": ({"queue": "a b"}, "queue"),
}


@pytest.mark.parametrize(("fields", "field"), REFUSED.values(), ids=REFUSED.keys())
def test_refuse_a_replay_with_wrong_fields(queue: Queue, api: Client, fields: Any, field: str) -> None:
    old = fail(queue, queue.enqueue("mail", {"to": "you"}))
    before = dump(queue)
    assert (answer := api.post(f"/jobs/{old.id}/replay", fields)).status == 422
    assert answer.problem["field"] == field
    assert dump(queue) == before


@pytest.mark.parametrize("status", ["pending", "delayed", "processing"])
def test_refuse_to_replay_a_job_that_has_not_ended(queue: Queue, api: Client, status: str) -> None:
    job = put(queue, status)
    before = dump(queue)
    answer = api.call("POST", f"/jobs/{job.id}/replay")
    assert (answer.status, answer.kind) == (409, "wrong-status")
    assert "cancel it first" in answer.problem["detail"]
    assert dump(queue) == before
    assert queue.replay(NO_JOB) is None
    assert api.call("POST", f"/jobs/{NO_JOB}/replay").status == 404


def test_refuse_to_replay_a_job_whose_type_has_no_handler(queue: Queue, api: Client) -> None:
    job = queue.enqueue("gone", 1)
    queue.cancel(job.id)
    answer = api.call("POST", f"/jobs/{job.id}/replay")
    assert (answer.status, answer.kind) == (422, "unknown-type")


def test_replay_twice_with_one_idempotency_key_makes_one_job(queue: Queue, api: Client) -> None:
    old = put(queue, "failed")
    key = {"Idempotency-Key": "once"}
    first, second = (api.call("POST", f"/jobs/{old.id}/replay", NO_BODY, key) for _ in range(2))
    assert (first.status, second.status, first.json["jobId"]) == (201, 200, second.json["jobId"])
    other = api.call("POST", f"/jobs/{old.id}/replay", {"payload": 2}, key)
    assert (other.status, other.kind) == (422, "idempotency-key-reused")


def test_replay_while_another_job_has_the_unique_key(queue: Queue, api: Client) -> None:
    old = put(queue, "failed", unique_key="a")
    holder = queue.enqueue("echo", 2, unique_key="a")
    answer = api.call("POST", f"/jobs/{old.id}/replay")
    assert (answer.status, answer.json) == (200, {"jobId": holder.id, "status": "pending", "duplicate": True})
    freed = api.post(f"/jobs/{old.id}/replay", {"uniqueKey": None})
    assert (freed.status, queue.get(freed.json["jobId"]).unique_key) == (201, "")


def test_replay_a_job_with_parents(queue: Queue) -> None:
    parent = put(queue, "completed")
    old = queue.enqueue("echo", 1, after=[parent])
    queue.cancel(old.id)
    new = queue.replay(old.id)
    assert (new.after, new.waiting_for) == ((parent.id,), ())
    queue.purge_one(parent.id)
    with pytest.raises(InvalidJob, match="does not exist"):
        queue.replay(old.id)
    assert queue.replay(old.id, after=[]).after == ()


def test_replay_counts_against_the_limit_of_the_new_payload(queue: Queue) -> None:
    @handler("charge", max_running=1, limit_by="account")
    def charge(payload: dict[str, str]) -> None: ...

    old = queue.enqueue("charge", {"account": "1"})
    queue.cancel(old.id)
    assert queue.replay(old.id, payload={"account": "2"}).limit == "charge/2"


def test_replay_a_job_of_a_schedule_keeps_its_tick(queue: Queue) -> None:
    draft = queue.draft("echo", 1)
    draft.schedule = "nightly"
    draft.scheduled_for = 1_795_662_720_000
    [job] = queue.submit([draft], Once("k", "f"))
    queue.cancel(job.id)
    new = queue.replay(job.id)
    assert (new.schedule, new.scheduled_for) == ("nightly", 1_795_662_720_000)


def test_replay_with_shards(shards: Shards) -> None:
    jobs = [shards.enqueue("echo", at, unique_key=str(at)) for at in range(4)]
    for job in jobs:
        shards.cancel(job.id)
        new = shards.replay(job.id, payload="new")
        assert (new.replay_of, new.unique_key, shards.get(new.id)) == (job.id, job.unique_key, new)


# Quiet workers --------------------------------------------------------------------------------------------------------


def test_quiet_worker_runs_what_it_has_and_takes_no_more(queue: Queue) -> None:
    running = put(queue, "processing")
    job = queue.enqueue("echo", 2)
    assert queue.quiet(running.worker)
    assert [worker["quiet"] for worker in queue.workers()] == [True]
    queue.queues()  # this process sees which workers are quiet
    assert queue.dequeue(running.worker, ["default"]) == []
    queue.complete(running)
    other = queue.register(["default"], 1)
    assert [started.id for started in queue.dequeue(other, ["default"])] == [job.id]
    assert queue.resume_worker(running.worker)
    assert [worker["quiet"] for worker in queue.workers()] == [False, False]
    queue.queues()
    third = queue.enqueue("echo", 3)
    assert [started.id for started in queue.dequeue(running.worker, ["default"])] == [third.id]


def test_quiet_worker_leaves_the_bells_to_others(queue: Queue) -> None:
    worker = queue.register(["default"], 1)
    queue.quiet(worker)
    queue.enqueue("echo", 1)
    assert queue.wait(["default"], 0.01, worker) == set()  # it heard the bell, and found itself quiet
    assert queue.wait(["default"], 0.01, worker) == set()
    assert queue.wait(["default"], 0.01) == {"default"}


@pytest.mark.parametrize("end", ["deregister", "reap"])
def test_quiet_worker_leaves_no_mark_when_it_is_gone(queue: Queue, end: str) -> None:
    worker = queue.register(["default"], 1)
    queue.quiet(worker)
    if end == "reap":
        lapse(queue, worker)
        assert find_lost(queue) == [worker]
        queue.reap(worker)
    else:
        queue.deregister(worker)
    assert queue.keys.paused not in dump(queue)
    assert not queue.quiet(worker)
    assert not queue.resume_worker(worker)
    assert queue.keys.paused not in dump(queue)


def test_quiet_workers_are_no_paused_queues(queue: Queue) -> None:
    worker = queue.register(["default"], 1)
    queue.pause("slow")
    queue.quiet(worker)
    assert {name: row["paused"] for name, row in queue.queues().items()} == {"slow": True}
    assert queue.scale()["ready"] == 0


def test_quiet_and_resume_over_http(queue: Queue, api: Client) -> None:
    worker = queue.register(["default"], 1)
    answer = api.call("POST", f"/workers/{worker}/quiet")
    assert (answer.status, answer.json) == (200, {"worker": worker, "quiet": True})
    assert [row["quiet"] for row in api.get("/workers").json["workers"]] == [True]
    answer = api.call("POST", f"/workers/{worker}/resume")
    assert (answer.status, answer.json) == (200, {"worker": worker, "quiet": False})
    assert [row["quiet"] for row in api.get("/workers").json["workers"]] == [False]
    assert api.call("POST", "/workers/nobody/quiet").status == 404
    assert api.call("POST", "/workers/nobody/resume").status == 404
    assert "name of a worker" in api.call("POST", "/workers/@/quiet").problem["detail"]


def test_why_says_that_only_quiet_workers_serve_a_queue(queue: Queue, api: Client) -> None:
    worker = queue.register(["default"], 1)
    job = queue.enqueue("echo", 1)
    queue.quiet(worker)
    why = api.get(f"/jobs/{job.id}").json["why"]
    assert (why["reason"], why["queue"], why["workers"]) == ("quiet", "default", [worker])
    queue.register(["default"], 1)
    assert api.get(f"/jobs/{job.id}").json["why"]["reason"] == "behind"


def test_quiet_with_shards_stays_when_a_shard_has_reaped_the_worker(shards: Shards) -> None:
    worker = shards.register(["default"], 1)
    assert shards.quiet(worker)
    assert [row["quiet"] for row in shards.workers()] == [True]
    shards.queues()
    first = shards.parts[0]
    lapse(first, worker)
    find_lost(first)
    first.reap(worker)
    beat = partial(shards.heartbeat, worker)
    with pytest.raises(Exception, match="reaped"):
        beat()
    beat()
    assert [part.workers()[0]["quiet"] for part in shards.parts] == [True] * 3
    assert shards.resume_worker(worker)
    assert [row["quiet"] for row in shards.workers()] == [False]
    assert not shards.quiet("nobody")
    shards.deregister(worker)
