"""Count the load for an autoscaler, and let one start and stop real workers by it."""

from __future__ import annotations

from typing import Any

import pytest
from client import Client
from conftest import Server, put, raw

from tinyqueue import SAMPLED, Failure, Job, Queue, Shards, handler
from tinyqueue_config import Settings
from wsgi import API, MAX_SCALED

NOTHING = {"ready": 0, "processing": 0, "load": 0, "oldestWaitingMs": 0}


def echo(payload: Any, job: Job) -> Any:
    return payload


@pytest.fixture(autouse=True)
def handlers(no_handlers: None) -> None:
    handler("echo")(echo)


def counts(queue: Any, *names: str) -> tuple[int, int]:
    """Return ready and processing, which add up to load."""
    found = queue.scale(names)
    assert found["load"] == found["ready"] + found["processing"]
    return found["ready"], found["processing"]


# The counts -----------------------------------------------------------------------------------------------------------


def test_scale_is_zero_without_jobs(queue: Queue) -> None:
    assert queue.scale() == queue.scale(["default", "other"]) == NOTHING


def test_scale_counts_waiting_and_running_jobs_of_all_queues_or_of_those_named(queue: Queue) -> None:
    put(queue, "processing")
    queue.enqueue_many("echo", [1, 2])
    queue.enqueue("echo", 3, queue="mail")
    assert counts(queue) == (3, 1)
    assert counts(queue, "default") == (2, 1)
    assert counts(queue, "mail", "mail", "unknown") == (1, 0)
    assert queue.scale(["unknown"]) == NOTHING


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled", "delayed"])
def test_scale_ignores_a_job_that_has_ended_or_is_delayed(queue: Queue, status: str) -> None:
    put(queue, status)
    assert queue.scale() == queue.scale(["default"]) == NOTHING


def test_scale_ignores_a_job_that_waits_for_its_next_attempt(queue: Queue) -> None:
    job = put(queue, "processing")
    queue.fail(job, Failure("Boom", "it broke"), after=60)
    assert queue.scale() == NOTHING


def test_scale_ignores_the_waiting_jobs_of_a_paused_queue_but_not_its_running_ones(queue: Queue) -> None:
    put(queue, "processing")
    queue.enqueue("echo", 1)
    queue.pause("default")
    assert queue.scale() == queue.scale(["default"]) == NOTHING | {"processing": 1, "load": 1}
    queue.resume("default")
    assert counts(queue, "default") == (1, 1)


def test_scale_counts_due_jobs_that_no_worker_has_promoted_in_their_queues(queue: Queue) -> None:
    for name in ("a", "b", "a"):
        queue.enqueue("echo", 1, queue=name, delay=1)
    queue.enqueue("echo", 1, queue="c", delay=60)
    queue.clock.ahead += 1000
    assert [counts(queue, *names) for names in ((), ("a",), ("b",), ("c",))] == [(3, 0), (2, 0), (1, 0), (0, 0)]
    assert queue.scale(["a"])["oldestWaitingMs"] >= 0
    assert queue.promote() == 3
    assert [counts(queue, *names) for names in ((), ("a",), ("b",), ("c",))] == [(3, 0), (2, 0), (1, 0), (0, 0)]


def test_scale_ignores_due_jobs_of_a_paused_queue_that_no_worker_has_promoted(queue: Queue) -> None:
    queue.enqueue("echo", 1, delay=1)
    queue.clock.ahead += 1000
    queue.pause("default")
    assert queue.scale() == NOTHING


def test_scale_estimates_the_queues_of_many_unpromoted_jobs_and_leaves_no_queue_at_zero(queue: Queue) -> None:
    """The jobs of `late` come after so many of `early` that none of them is read."""
    queue.enqueue_many("echo", range(3 * SAMPLED), queue="early", delay=1)
    queue.enqueue_many("echo", range(5), queue="late", delay=2)
    queue.clock.ahead += 2000
    assert counts(queue, "late") == (1, 0)
    assert counts(queue, "early") == (3 * SAMPLED, 0)
    while queue.promote():
        pass
    assert [counts(queue, "late"), counts(queue, "early")] == [(5, 0), (3 * SAMPLED, 0)]


def test_scale_ignores_entries_of_cancelled_jobs_in_the_list(queue: Queue) -> None:
    for job in queue.enqueue_many("echo", range(5)):
        queue.cancel(job.id)
    assert raw(queue).llen(queue.keys.jobs("default")) == 5
    assert queue.scale() == NOTHING


def test_scale_reports_how_long_the_next_job_has_waited(queue: Queue) -> None:
    queue.enqueue("echo", 1, queue="a")
    queue.enqueue("echo", 1, queue="c", delay=10)
    queue.clock.ahead += 30_000
    queue.enqueue("echo", 2, queue="b")
    seconds = {name: queue.scale([name])["oldestWaitingMs"] // 10_000 for name in ("a", "b", "c")}
    assert seconds == {"a": 3, "b": 0, "c": 2}
    assert queue.scale()["oldestWaitingMs"] // 10_000 == 3


def commands(queue: Queue) -> int:
    return int(raw(queue).info("stats")["total_commands_processed"])


def test_scale_costs_the_same_few_commands_however_many_jobs_there_are(near: Queue) -> None:
    def cost() -> int:
        before = commands(near)
        near.scale(["default", "mail"])
        return commands(near) - before - 1  # the reading of the statistics

    near.enqueue("echo", 1)
    near.enqueue("echo", 1, queue="mail", delay=60)
    near.scale()  # reads the time
    few = cost()
    for _ in range(5):
        near.enqueue_many("echo", range(1000))
        near.enqueue_many("echo", range(1000), queue="mail", delay=60)
    assert cost() == few <= 10


def test_scale_adds_up_all_shards(server: Server) -> None:
    queue = Shards([server.queue(namespace=f"queue.{at}") for at in range(3)])
    for at in range(6):
        queue.enqueue("echo", at, queue="a" if at < 4 else "b")
    worker = queue.register(["a"], 1)
    queue.dequeue(worker, ["a"])
    assert [counts(queue, *names) for names in ((), ("a",), ("b",), ("c",))] == [(5, 1), (3, 1), (2, 0), (0, 0)]


# Over HTTP ------------------------------------------------------------------------------------------------------------


def test_scale_answers_one_flat_object(api: Client, queue: Queue) -> None:
    put(queue, "processing")
    queue.enqueue("echo", 1, queue="mail")
    queue.enqueue("echo", 1, queue="slow")
    found = {path: api.get(path).json for path in ("/scale", "/scale?queue=mail", "/scale?queue=mail&queue=default")}
    ages = [answer.pop("oldestWaitingMs") for answer in found.values()]
    assert all(0 <= age < 20_000 for age in ages)
    assert found == {
        "/scale": {"ready": 2, "processing": 1, "load": 3},
        "/scale?queue=mail": {"ready": 1, "processing": 0, "load": 1},
        "/scale?queue=mail&queue=default": {"ready": 1, "processing": 1, "load": 2},
    }


def test_scale_of_an_unknown_queue_is_zero(api: Client) -> None:
    assert api.get("/scale?queue=unknown").json == NOTHING


@pytest.mark.parametrize("name", ["", "a%20b", "a:b", "a/b", "%C3%A9", "x" * 101, "a%0A"])
def test_scale_refuses_a_malformed_queue(api: Client, name: str) -> None:
    answer = api.get(f"/scale?queue=mail&queue={name}")
    assert (answer.status, answer.kind, answer.problem["field"]) == (422, "invalid-job", "queue")


def test_scale_refuses_an_unknown_parameter(api: Client) -> None:
    answer = api.get("/scale?queues=mail")
    assert (answer.status, answer.kind, answer.problem["field"]) == (422, "invalid-job", "queues")


def test_scale_refuses_too_many_queues(api: Client) -> None:
    names = [f"queue=q{at}" for at in range(MAX_SCALED + 1)]
    assert api.get("/scale?" + "&".join(names[1:])).json == NOTHING
    assert api.get("/scale?" + "&".join(names)).kind == "invalid-job"


def test_scale_needs_the_role_read(near: Queue) -> None:
    keys = "front:submit:submit-0123456789,scaler:read:reader-0123456789"
    app = API(Settings(api_keys=keys), near)
    secrets = ("", "submit-0123456789", "reader-0123456789")
    assert [Client(app, secret).get("/scale").status for secret in secrets] == [401, 403, 200]
