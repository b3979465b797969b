"""What an operator does to jobs and workers: run now, replay, purge, count, groups of failures, quiet, audit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec
import pytest
from client import NO_BODY, Client
from conftest import Server, check_consistency, disconnect, dump, find_lost, lapse, put, raw
from cutproxy import CutProxy

from tinyqueue import (
    ACTIONS,
    Failure,
    Filter,
    InvalidJob,
    Job,
    Once,
    Queue,
    WrongStatus,
    handler,
)
from tinyqueue_config import Settings
from tinyqueue_shards import Shards
from wsgi import API

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


@pytest.mark.parametrize("cut", ["drop_reply", "drop_request", "hold"])
def test_hasten_is_applied_once_when_a_packet_is_lost(near: Queue, far: Queue, proxy: CutProxy, cut: str) -> None:
    job = put(near, "delayed")
    getattr(proxy, cut)(b"EXEC")
    assert far.hasten(job.id).run_at == 0
    proxy.deliver()
    assert near.waiting(["default"]) == 1


def test_hasten_after_a_lost_reply_leaves_a_job_that_has_started(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "delayed")
    worker = near.register(["default"], 1)
    proxy.drop_reply(b"EXEC", lambda: near.dequeue(worker, ["default"]))
    assert far.hasten(job.id).status == "processing"
    assert near.waiting(["default"]) == 0


def test_hasten_is_refused_when_the_job_starts_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "delayed")
    worker = near.register(["default"], 1)

    def run() -> None:
        near.hasten(job.id)
        near.dequeue(worker, ["default"])

    proxy.before(b"EXEC", run)
    with pytest.raises(WrongStatus, match="it is processing"):
        far.hasten(job.id)


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


def test_purge_one_is_refused_when_the_job_is_retried_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "failed")
    proxy.before(b"EXEC", lambda: near.retry(job.id))
    with pytest.raises(WrongStatus, match="it is pending"):
        far.purge_one(job.id)
    assert near.get(job.id).status == "pending"


@pytest.mark.parametrize("cut", ["drop_reply", "drop_request"])
def test_purge_one_deletes_the_job_when_a_packet_is_lost(near: Queue, far: Queue, proxy: CutProxy, cut: str) -> None:
    job = put(near, "failed")
    getattr(proxy, cut)(b"EXEC")
    assert far.purge_one(job.id) == job
    assert near.get(job.id) is None


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


@pytest.mark.parametrize("type", ["", "text/plain", "application/json"])
@pytest.mark.parametrize("length", ["", "0"])
def test_replay_takes_a_request_without_a_body_from_any_server(
    queue: Queue, api: Client, type: str, length: str
) -> None:
    old = put(queue, "failed")
    answer = api.call("POST", f"/jobs/{old.id}/replay", b"", {"Content-Type": type, "Content-Length": length})
    assert answer.status == 201


def test_refuse_a_replay_whose_body_is_not_json(queue: Queue, api: Client) -> None:
    old = put(queue, "failed")
    answer = api.call("POST", f"/jobs/{old.id}/replay", b'{"payload": 2}', {"Content-Type": "text/plain"})
    assert (answer.status, answer.kind) == (415, "unsupported-media-type")


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
    "no object": ([], "replay"),
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


def test_quiet_leaves_no_mark_when_the_worker_is_reaped_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    worker = near.register(["default"], 1)
    proxy.before(b"EXEC", lambda: near.deregister(worker))
    assert not far.quiet(worker)
    assert near.keys.paused not in dump(near)


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


# Count, group, and change some --------------------------------------------------------------------------------------


def in_steps(step: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Repeat a step until its cursor is at the end."""
    steps = [step("")]
    while cursor := steps[-1]["cursor"]:
        steps.append(step(cursor))
    return steps


def test_count_the_jobs_that_match_in_bounded_steps(queue: Queue, api: Client) -> None:
    for at in range(1, 4):
        queue.enqueue_many("echo" if at < 3 else "mail", [{"to": "you"}] * 1000, delay=60)
    steps = in_steps(lambda cursor: api.get(f"/jobs/count?type=echo&cursor={cursor}").json)
    assert sum(step["count"] for step in steps) == 2000
    assert len(steps) == 3
    assert [step["scanned"] for step in steps] == [1000] * 3


def test_count_a_status_or_a_queue_at_once(queue: Queue, api: Client) -> None:
    queue.enqueue_many("echo", range(1000), queue="slow")
    queue.enqueue_many("echo", range(1000))
    put(queue, "cancelled", queue="other")
    found = {
        query: api.get(f"/jobs/count?{query}").json
        for query in ("status=pending", "status=pending&queue=slow", "status=cancelled", "status=processing&queue=none")
    }
    assert {query: answer["count"] for query, answer in found.items()} == {
        "status=pending": 2000,
        "status=pending&queue=slow": 1000,
        "status=cancelled": 1,
        "status=processing&queue=none": 0,
    }
    assert all(answer["cursor"] is None for answer in found.values())
    assert api.get("/jobs/count?colour=red").status == 422


def test_failures_are_grouped_by_type_and_error_over_all_jobs(queue: Queue, api: Client) -> None:
    fail(queue, queue.enqueue("mail", {"to": "x"}), error=Failure("Timeout", "after 3 s"))
    for at in range(3):
        last = fail(queue, queue.enqueue("echo", at), error=Failure("Timeout", f"{at}" * 300))
    fail(queue, queue.enqueue("echo", 4), error=BOOM)
    fail(queue, queue.enqueue("echo", 5), after=60, error=Failure("Later", "in a minute"))
    answer = api.get("/failures").json
    assert [(group["type"], group["errorType"], group["count"]) for group in answer["groups"]] == [
        ("echo", "Timeout", 3),
        ("echo", "Boom", 1),
        ("mail", "Timeout", 1),
    ]
    first = answer["groups"][0]
    assert (first["jobId"], first["at"], first["message"]) == (last.id, last.ended_at, "2" * 200)
    assert [group["count"] for group in api.get("/failures?type=mail&status=").json["groups"]] == [1]
    assert [group["errorType"] for group in api.get("/failures?status=pending").json["groups"]] == ["Later"]
    assert api.get("/failures?status=completed").status == 422


def test_group_of_retrying_jobs_shows_the_latest_failure(queue: Queue, api: Client) -> None:
    queue.enqueue_many("echo", range(2))
    early, late = queue.dequeue(queue.register(["default"], 2), ["default"], 2)
    queue.fail(late, Failure("Boom", "first"), 60)
    queue.clock.ahead += 5000
    queue.fail(early, Failure("Boom", "second"), 60)
    [group] = api.get("/failures?status=pending").json["groups"]
    assert (group["jobId"], group["message"], group["count"]) == (early.id, "second", 2)
    assert group["at"] >= early.created_at + 5000


def test_failures_of_more_jobs_than_a_step_looks_at(queue: Queue) -> None:
    draft = [msgspec.structs.replace(queue.draft("echo", at), status="failed", error=BOOM) for at in range(1500)]
    for at in (0, 1000):
        queue.load(draft[at : at + 1000])
    steps = in_steps(lambda cursor: queue.failures(Filter("failed"), cursor))
    assert sum(group["count"] for step in steps for group in step["groups"]) == 1500
    assert len(steps) == 2


def test_count_and_group_with_shards(shards: Shards) -> None:
    jobs = [shards.enqueue("echo", at) for at in range(9)]
    worker = shards.register(["default"], 9)
    for job in shards.dequeue(worker, ["default"], 9):
        shards.fail(job, BOOM)
    assert shards.count(Filter("failed")) == {"count": len(jobs), "cursor": "", "scanned": 0}
    assert sum(step["count"] for step in in_steps(lambda cursor: shards.count(Filter(type="echo"), cursor))) == 9
    [group] = shards.failures(Filter("failed"))["groups"]
    assert (group["errorType"], group["count"]) == ("Boom", 9)
    shards.deregister(worker)


def test_retry_some_of_the_jobs_that_match_each_time(queue: Queue, api: Client) -> None:
    jobs = [put(queue, "failed") for _ in range(5)]
    cursor = ""
    retried = []
    while cursor is not None:
        answer = api.post("/jobs/retry", {"most": 2, "cursor": cursor})
        cursor = answer.json["cursor"]
        retried.append(answer.json["retried"])
    assert retried == [2, 2, 1]
    assert queue.count(Filter("pending"))["count"] == len(jobs)


def test_cancel_some_of_the_jobs_that_match(queue: Queue, api: Client) -> None:
    queue.enqueue_many("echo", range(5))
    assert api.post("/jobs/cancel", {"most": 3.0}).json["cancelled"] == 3
    assert queue.stats()["pending"] == 2


@pytest.mark.parametrize("most", [0, 1001, 1.5, True, "2", None])
@pytest.mark.parametrize("verb", ["retry", "cancel", "purge"])
def test_refuse_a_number_of_jobs_to_change(queue: Queue, api: Client, verb: str, most: Any) -> None:
    put(queue, "failed")
    before = dump(queue)
    answer = api.post(f"/jobs/{verb}", {"most": most, "status": "pending" if verb == "cancel" else "failed"})
    assert (answer.status, answer.problem["field"]) == (422, "most")
    assert dump(queue) == before


# Audit ----------------------------------------------------------------------------------------------------------------

KEYS = "ops:admin:0123456789abcdef,app:submit:fedcba9876543210"


def actions(api: Client) -> list[tuple[str, str, Any, Any]]:
    """Return what the audit lists, oldest first, without the times."""
    listed = api.get("/audit").json["actions"]
    return [tuple(entry[name] for name in ("by", "action", "target", "result")) for entry in reversed(listed)]


def test_audit_lists_every_action_with_the_name_of_the_key(queue: Queue) -> None:
    handler("charge", max_running=2)(lambda_handler)
    api = Client(API(Settings(api_keys=KEYS), queue), "0123456789abcdef")
    delayed, failed, completed, pending = (put(queue, s) for s in ("delayed", "failed", "completed", "delayed"))
    worker = queue.register(["default"], 1)
    before = queue.now()
    api.call("POST", f"/jobs/{delayed.id}/run")
    replayed = api.call("POST", f"/jobs/{failed.id}/replay").json["jobId"]
    api.call("POST", f"/jobs/{failed.id}/retry")
    api.call("POST", f"/jobs/{completed.id}/purge")
    api.call("DELETE", f"/jobs/{pending.id}")
    api.call("POST", "/queues/default/pause")
    api.call("POST", "/queues/default/resume")
    api.call("POST", f"/workers/{worker}/quiet")
    api.call("POST", f"/workers/{worker}/resume")
    api.call("PUT", "/limits/charge", {"maxRunning": 1})
    api.call("PUT", "/schedules/nightly", {"cron": "@daily", "type": "echo"})
    run = api.call("POST", "/schedules/nightly/run").json["jobId"]
    api.call("POST", "/schedules/nightly/pause")
    api.call("POST", "/schedules/nightly/resume")
    api.call("DELETE", "/schedules/nightly")
    nightly = {"schedule": "nightly"}
    assert actions(api) == [
        ("ops", "run", {"job": delayed.id}, {}),
        ("ops", "replay", {"job": failed.id}, {"jobId": replayed}),
        ("ops", "retry", {"job": failed.id}, {}),
        ("ops", "purge", {"job": completed.id}, {}),
        ("ops", "cancel", {"job": pending.id}, {}),
        ("ops", "pause", {"queue": "default"}, {}),
        ("ops", "resume", {"queue": "default"}, {}),
        ("ops", "quiet", {"worker": worker}, {}),
        ("ops", "resume", {"worker": worker}, {}),
        ("ops", "set", {"limit": "charge"}, {"maxRunning": 1}),
        ("ops", "set", nightly, {}),
        ("ops", "run", nightly, {"jobId": run}),
        ("ops", "pause", nightly, {}),
        ("ops", "resume", nightly, {}),
        ("ops", "remove", nightly, {}),
    ]
    assert all(before <= entry["at"] <= queue.now() for entry in api.get("/audit").json["actions"])


def lambda_handler(payload: object) -> None: ...


def test_audit_lists_neither_reads_nor_submits_nor_refusals(queue: Queue, api: Client) -> None:
    job = put(queue, "pending")
    api.post("/jobs", {"type": "echo", "payload": 1})
    api.get("/stats")
    api.call("POST", f"/jobs/{job.id}/run")
    api.call("POST", f"/jobs/{NO_JOB}/retry")
    api.post("/jobs/retry", {"status": "pending"})
    assert actions(api) == []


def test_audit_adds_up_the_steps_of_a_bulk_change(queue: Queue, api: Client) -> None:
    for _ in range(3):
        put(queue, "failed")
    for _ in range(3):
        api.post("/jobs/retry", {"type": "echo", "most": 1})
    api.post("/jobs/cancel", {"queue": "default", "errorType": ""})
    queue.clock.ahead += 61_000
    api.post("/jobs/cancel", {"queue": "default", "errorType": ""})
    retry = {"filter": {"status": "failed", "type": "echo"}}
    cancel = {"filter": {"status": "pending", "queue": "default"}}
    assert actions(api) == [
        ("", "retry", retry, {"retried": 3, "skipped": 0}),
        ("", "cancel", cancel, {"cancelled": 3, "skipped": 0}),
        ("", "cancel", cancel, {"cancelled": 0, "skipped": 0}),
    ]


@pytest.mark.parametrize("cut", ["drop_reply", "drop_request", "hold"])
@pytest.mark.parametrize("target", [{"queue": "slow"}, {"filter": {"status": "failed"}}], ids=["queue", "filter"])
def test_audit_lists_an_action_once_when_a_packet_is_lost(
    near: Queue, far: Queue, proxy: CutProxy, cut: str, target: dict[str, Any]
) -> None:
    getattr(proxy, cut)(b"EXEC")
    far.note_action("ops", "purge", target, {"purged": 7})
    proxy.deliver()
    assert [(entry["target"], entry["result"]) for entry in near.audit()] == [(target, {"purged": 7})]


def test_audit_keeps_the_last_actions(queue: Queue, api: Client) -> None:
    for at in range(ACTIONS + 2):
        queue.note_action("ops", "pause", {"queue": str(at)}, {})
    listed = queue.audit()
    assert [entry["target"]["queue"] for entry in listed] == [str(at) for at in range(ACTIONS + 1, 1, -1)]
    assert [entry["target"]["queue"] for entry in api.get("/audit?limit=2").json["actions"]] == ["1001", "1000"]
    assert len(api.get("/audit").json["actions"]) == 100
    assert api.get("/audit?limit=1001").status == 400


def test_audit_logs_each_action(queue: Queue, api: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    api.call("POST", "/queues/slow/pause")
    api.post("/jobs/purge", {"status": "failed", "type": "mail\n"})
    said = [record.getMessage() for record in caplog.records if getattr(record, "fields", {}).get("event") == "action"]
    assert said == ["somebody: pause queue slow", "somebody: purge failed jobs with type mail\\n"]


def test_audit_with_shards_lists_actions_in_order(shards: Shards) -> None:
    for at, part in enumerate(shards.parts):
        part.clock.ahead += at
        part.note_action("ops", "pause", {"queue": str(at)}, {})
    shards.note_action("ops", "quiet", {"worker": "w"}, {})
    assert [entry["target"] for entry in shards.audit(3)][-1] != {"queue": "0"}
    assert len(shards.audit()) == 4
    times = [entry["at"] for entry in shards.audit()]
    assert times == sorted(times, reverse=True)


def test_action_stays_when_its_audit_cannot_be_written(near: Queue, caplog: pytest.LogCaptureFixture) -> None:
    raw(near).set(near.keys.audit, "not a list")
    assert Client(API(Settings(), near)).call("POST", "/queues/slow/pause").status == 200
    assert near.queues()["slow"]["paused"]
    assert "could not add this action to the audit" in caplog.text
    raw(near).delete(near.keys.audit)


def test_bulk_change_is_answered_after_an_action_that_cannot_be_read(queue: Queue, api: Client) -> None:
    raw(queue).lpush(queue.keys.audit, b"no JSON")
    put(queue, "failed")
    assert api.post("/jobs/retry", {"status": "failed"}).json["retried"] == 1
    assert json.loads(raw(queue).lindex(queue.keys.audit, 0))["action"] == "retry"


def test_audit_lists_a_replay_that_too_few_replicas_have(near: Queue) -> None:
    job = put(near, "completed")
    near.min_replicas = 1
    api = Client(API(Settings(), near))
    answer = api.call("POST", f"/jobs/{job.id}/replay")
    assert answer.status == 503
    stored = answer.problem["jobId"]
    assert near.get(stored)
    assert actions(api) == [("", "replay", {"job": job.id}, {"jobId": stored})]
