"""Why a job does not run: twelve situations, each named over HTTP, by the command line and in the dashboard."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from client import Client
from conftest import Server, dump, lapse, put, raw, until
from test_processes import folder, run  # noqa: F401  fixtures

from tinyqueue import Failure, Job, Queue, handler
from tinyqueue_shards import Shards
from tinyqueue_why import COUNTED, explain

BOOM = Failure("Boom", "it broke")


@pytest.fixture(autouse=True)
def echo(no_handlers: None) -> None:
    @handler("echo")
    def echo(payload: Any, job: Job) -> None: ...


def waits(queue: Queue) -> tuple[Job, str]:
    parents = [put(queue, "delayed"), put(queue, "processing", queue="other")]
    job = queue.enqueue("echo", 1, after=parents)
    return job, f"waits for {parents[0].id} (pending), {parents[1].id} (processing)"


def waits_for_many(queue: Queue) -> tuple[Job, str]:
    job = queue.enqueue("echo", 1, after=queue.enqueue_many("echo", range(30), queue="other"))
    return job, f"{job.after[19]} (pending) and 10 more"


def retries(queue: Queue) -> tuple[Job, str]:
    job = put(queue, "processing")
    queue.fail(job, BOOM, 60)
    return job, "for attempt 2 of 3, after Boom: it broke"


def is_delayed(queue: Queue) -> tuple[Job, str]:
    return put(queue, "delayed"), "is delayed until 20"


def is_held(queue: Queue) -> tuple[Job, str]:
    @handler("charge", max_running=1)
    def charge(payload: Any) -> None: ...

    jobs = queue.enqueue_many("charge", range(3), queue="charges")
    queue.dequeue(queue.register(["charges"], 3), ["charges"], 3)
    [job] = [job for job in jobs if queue.place_among_held(queue.get(job.id)) == 2]
    return job, "is held by the limit charge, at position 2 of those that wait for room"


def is_paused(queue: Queue) -> tuple[Job, str]:
    queue.register(["default"], 1)
    queue.pause("default")
    return put(queue, "pending"), "waits, because its queue default is paused; resume it"


def is_not_served(queue: Queue) -> tuple[Job, str]:
    queue.register(["other"], 1)
    lapse(queue, queue.register(["default"], 1))
    todo = "start one: tinyqueue worker --queue default"
    return put(queue, "pending"), f"waits, because no live worker serves its queue default; {todo}"


def is_of_an_unknown_type(queue: Queue) -> tuple[Job, str]:
    queue.register(["default"], 1)
    return queue.enqueue("report", 1), "waits, because no live worker of its queue has a handler for its type report"


def has_expired(queue: Queue) -> tuple[Job, str]:
    queue.register(["default"], 1)
    job = queue.enqueue("echo", 1, expires_in=0.01)
    until(lambda: job.has_expired(queue.now()))
    return job, "has expired; it fails when its turn comes"


def is_next(queue: Queue) -> tuple[Job, str]:
    queue.register(["default"], 1)
    return put(queue, "pending"), "is the next job of queue default; a worker starts it when it has a free slot"


def is_behind_others(queue: Queue) -> tuple[Job, str]:
    queue.register(["default"], 1)
    queue.enqueue_many("echo", range(7))
    return queue.enqueue("echo", 1), "is behind 7 other jobs of queue default"


def is_behind_many_others(queue: Queue) -> tuple[Job, str]:
    queue.register(["default"], 1)
    raw(queue).lpush(queue.keys.jobs("default"), *["gone"] * (COUNTED + 1))
    return queue.enqueue("echo", 1), "is behind more than 10000 other jobs of queue default"


def is_due(queue: Queue) -> tuple[Job, str]:
    queue.register(["default"], 1)
    job = queue.enqueue("echo", 1, delay=0.05)
    until(lambda: queue.now() >= job.run_at)
    return job, "is due; it starts in a moment"


def must_run_alone(queue: Queue) -> tuple[Job, str]:
    worker = queue.register(["default"], 2)
    job = put(queue, "pending")
    record = json.loads(raw(queue).get(queue.keys.job(job.id))) | {"suspicions": 2}
    raw(queue).set(queue.keys.job(job.id), json.dumps(record))
    queue.take(worker, ["default"], 1)
    return job, "waits until a worker runs nothing else"


def was_taken(queue: Queue) -> tuple[Job, str]:
    worker = queue.register(["default"], 2)
    job = put(queue, "pending")
    queue.take(worker, ["default"], 1)
    return job, "was taken by a worker; it starts in a moment"


SITUATIONS: dict[str, tuple[str, Callable[[Queue], tuple[Job, str]]]] = {
    "waits": ("waitingFor", waits),
    "waits for many": ("waitingFor", waits_for_many),
    "retries": ("retrying", retries),
    "delayed": ("delayed", is_delayed),
    "held": ("held", is_held),
    "paused": ("paused", is_paused),
    "not served": ("notServed", is_not_served),
    "unknown type": ("unknownType", is_of_an_unknown_type),
    "expired": ("expired", has_expired),
    "next": ("behind", is_next),
    "behind others": ("behind", is_behind_others),
    "behind many others": ("behind", is_behind_many_others),
    "due": ("due", is_due),
    "alone": ("alone", must_run_alone),
    "taken": ("taken", was_taken),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_explain_why_a_job_does_not_run(queue: Queue, api: Client, name: str) -> None:
    reason, make = SITUATIONS[name]
    job, text = make(queue)
    why = api.get(f"/jobs/{job.id}").json["why"]
    assert why["reason"] == reason
    assert text in why["text"]
    assert why["text"].partition(" ")[0].rstrip(",") in ("waits", "is", "has", "was")  # continues "it"


def test_explain_with_details(queue: Queue) -> None:
    job, _ = retries(queue)
    why = explain(queue, queue.get(job.id))
    assert (why["attempt"], why["maxAttempts"], why["until"]) == (2, 3, queue.get(job.id).run_at)
    job, _ = waits(queue)
    assert explain(queue, job)["jobs"] == list(job.after)
    job, _ = is_behind_others(queue)
    assert explain(queue, job)["ahead"] == 7


@pytest.mark.parametrize("status", ["processing", "completed", "failed", "cancelled"])
def test_explain_nothing_of_a_job_that_does_not_wait(queue: Queue, api: Client, status: str) -> None:
    job = put(queue, status)
    assert explain(queue, job) is None
    assert "why" not in api.get(f"/jobs/{job.id}").json


def test_explain_a_job_whose_worker_reports_no_types(queue: Queue) -> None:
    worker = queue.register(["default"], 1)
    about = json.loads(raw(queue).get(queue.keys.worker(worker)))
    del about["types"]  # as one of an older version
    raw(queue).set(queue.keys.worker(worker), json.dumps(about))
    assert explain(queue, queue.enqueue("report", 1))["reason"] == "behind"


def test_explain_a_job_of_a_shard(server: Server) -> None:
    shards = Shards([server.queue(namespace=f"queue.{at}") for at in range(3)])
    shards.register(["default"], 1)
    for number in range(3):
        assert explain(shards, shards.enqueue("echo", number))["ahead"] == 0
    shards.disconnect()


def test_explain_by_reading_only(near: Queue) -> None:
    jobs = [make(near)[0] for _, make in SITUATIONS.values()]
    before = dump(near)
    for job in jobs:
        explain(near, near.get(job.id))
    assert dump(near) == before


@pytest.mark.parametrize("name", SITUATIONS)
def test_show_by_the_command_line_why_a_job_does_not_run(real: Server, run: Any, name: str) -> None:  # noqa: F811
    job, text = SITUATIONS[name][1](real.queue())
    [line] = [line for line in run("get", job.id).stdout.decode().splitlines() if line.startswith("why ")]
    assert line.startswith("why          it ")
    assert text in line
