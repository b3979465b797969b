"""Records of other versions: this one reads those of older versions, and keeps the fields of newer ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import Server, lapse, newest, put, raw

from tinyqueue import Failure, Job, Once, Outcome, Queue, handler, stored_job
from tinyqueue_job import read_job, record_of

# A file for each version that has changed the record, named after the day of its first commit.
SAMPLES = {
    f"{file.stem}: {sample['what']}": sample
    for file in sorted(Path(__file__).with_name("records").glob("*.json"))
    for sample in json.loads(file.read_text())
}
MORE = {"tenant": {"name": "ü", "limits": [1, None]}, "weight": 2.5}  # fields that no version has so far
BOOM = Failure("Boom", "it broke")

pytestmark = pytest.mark.usefixtures("no_handlers")


def wait_patiently(payload: Any, job: Job) -> None: ...


@pytest.fixture(autouse=True)
def handlers(no_handlers: None) -> None:
    handler("echo")(wait_patiently)


# Older versions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())
def test_read_a_record_of_an_older_version(sample: dict[str, Any]) -> None:
    job = read_job(sample["id"], sample["record"].encode())
    assert msgspec.to_builtins(job.answer()) == sample["answer"]
    assert record_of(job).decode() == sample["record"]


def test_samples_have_every_field_of_the_record() -> None:
    seen = {name for sample in SAMPLES.values() for name in json.loads(sample["record"])}
    assert seen == {field.encode_name for field in msgspec.structs.fields(Job)} - {"id", "*"}


# Newer versions -------------------------------------------------------------------------------------------------------


def stored(queue: Queue, job: Job) -> dict[str, Any]:
    return dict(json.loads(raw(queue).get(queue.keys.job(job.id))))


def add_more(queue: Queue, job: Job, **more: Any) -> None:
    """Add fields to a record, as a newer version would."""
    record = stored(queue, job) | (more or MORE)
    raw(queue).set(queue.keys.job(job.id), msgspec.json.encode(record), keepttl=True)


def outcome(verb: Any, **options: Any) -> Callable[[Queue, Job], Any]:
    return lambda queue, job: queue.settle(job.worker, [Outcome(job, verb, **options)])


def start(queue: Queue, job: Job) -> None:
    [started] = queue.dequeue(queue.register([job.queue], 1), [job.queue])
    assert started.id == job.id


def exchange(queue: Queue, job: Job) -> None:
    running = put(queue, "processing", queue="other")
    queue.exchange(running.worker, [Outcome(running, "complete")], [job.queue], 1, {running.id: running})


def reap(queue: Queue, job: Job) -> None:
    lapse(queue, job.worker)
    assert queue.reap(job.worker) == 1


def expire(queue: Queue, job: Job) -> None:
    add_more(queue, job, expiresAt=1)
    assert queue.dequeue(queue.register([job.queue], 1), [job.queue]) == []


VERBS: dict[str, tuple[str, Callable[[Queue, Job], Any]]] = {
    "start": ("pending", start),
    "start by exchange": ("pending", exchange),
    "expire": ("pending", expire),
    "cancel": ("pending", lambda queue, job: queue.cancel(job.id)),
    "cancel of a delayed job": ("delayed", lambda queue, job: queue.cancel(job.id)),
    "request": ("processing", lambda queue, job: queue.cancel(job.id)),
    "progress": ("processing", lambda queue, job: queue.write_progress(job)),
    "complete": ("processing", outcome("complete", result=[1])),
    "fail": ("processing", outcome("fail", error=BOOM)),
    "fail with a retry": ("processing", outcome("fail", error=BOOM, after=60.0)),
    "release": ("processing", outcome("release")),
    "reap": ("processing", reap),
    "retry": ("failed", lambda queue, job: queue.retry(job.id)),
    "hasten": ("delayed", lambda queue, job: queue.hasten(job.id)),
    "retry of a cancelled job": ("cancelled", lambda queue, job: queue.retry(job.id)),
}


@pytest.mark.parametrize("verb", VERBS)
def test_write_a_record_with_the_fields_of_a_newer_version(queue: Queue, verb: str) -> None:
    status, change = VERBS[verb]
    job = put(queue, status)
    add_more(queue, job)  # of a processing job after this version has started it
    before = stored(queue, job)
    change(queue, job)
    record = stored(queue, job)
    assert {name: record.get(name) for name in MORE} == MORE
    assert record != before
    assert "*" not in record


def test_settle_a_job_that_was_started_with_the_fields_of_a_newer_version(queue: Queue) -> None:
    job = queue.enqueue("echo", {})
    add_more(queue, job)
    [job] = queue.dequeue(queue.register(["default"], 1), ["default"])
    queue.write_progress(job)
    queue.complete(job, 7)
    assert {name: stored(queue, job).get(name) for name in MORE} == MORE


def test_settle_with_the_fields_as_a_newer_version_has_changed_them(queue: Queue) -> None:
    job = queue.enqueue("echo", {})
    add_more(queue, job, tenant=1, weight=1)
    [job] = queue.dequeue(queue.register(["default"], 1), ["default"])
    record = stored(queue, job) | {"tenant": 2}
    del record["weight"]
    raw(queue).set(queue.keys.job(job.id), msgspec.json.encode(record))
    queue.complete(job, 7)
    record = stored(queue, job)
    assert (record["tenant"], "weight" in record) == (2, False)


def test_read_and_list_a_job_without_the_fields_of_a_newer_version(queue: Queue) -> None:
    job = put(queue, "completed")
    answer = queue.get(job.id).answer()
    add_more(queue, job)
    assert queue.get(job.id).answer() == answer
    assert [job.id for job in newest(queue, "completed")] == [job.id]
    [listed], _ = queue.page(cut=1000)
    assert listed.answer() | {"payload": 0, "result": 0} == answer | {"payload": 0, "result": 0}
    assert (bytes(listed.payload), bytes(listed.result)) == (b'{"to":"you"}', b'{"sent":true}')


def test_view_of_a_handler_cannot_change_the_fields_of_a_newer_version(server: Server) -> None:
    queue = server.queue()
    job = queue.enqueue("echo", {})
    add_more(queue, job)
    [job] = queue.dequeue(queue.register(["default"], 1), ["default"])
    view = job.view(b"{}")
    assert view.unknown is None
    assert job.unknown


def test_replay_a_key_with_the_fields_of_a_newer_version(queue: Queue) -> None:
    once = Once("key", "fingerprint")
    [job] = queue.submit([queue.draft("echo", {})], once)
    key = queue.keys.once("key")
    raw(queue).set(key, msgspec.json.encode(json.loads(raw(queue).get(key)) | MORE), keepttl=True)
    [again] = queue.submit([queue.draft("echo", {})], once)
    assert (again.id, once.replayed) == (job.id, True)


def test_serve_a_worker_that_a_newer_version_has_registered(queue: Queue) -> None:
    job = put(queue, "processing")
    for key in (queue.keys.worker(job.worker), queue.keys.lease(job.worker)):
        raw(queue).set(key, msgspec.json.encode(json.loads(raw(queue).get(key)) | MORE), keepttl=True)
    [worker] = queue.workers()
    assert (worker["id"], worker["alive"]) == (job.worker, True)
    reap(queue, job)
    assert queue.get(job.id).status == "pending"


def test_back_up_a_record_with_the_fields_of_a_newer_version(queue: Queue) -> None:
    job = put(queue, "completed")
    add_more(queue, job)
    record = raw(queue).get(queue.keys.job(job.id))
    assert json.loads(record_of(stored_job(job.id, record))) == json.loads(record)
