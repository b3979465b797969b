"""Every verb on a job of every status: what the table of transitions allows happens, and everything else changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from conftest import dump, lapse, newest, put, raw

from tinyqueue import Failure, Filter, Job, Queue, Reaped, WrongStatus

pytestmark = pytest.mark.usefixtures("no_handlers")
STATUSES = ("pending", "delayed", "processing", "completed", "failed", "cancelled")
BOOM = Failure("Boom", "it broke")
SAME = "nothing changes"
GONE = "the record is gone"
DAY = 86400_000


def dequeue(queue: Queue, job: Job) -> None:
    """Let somebody dequeue who finds the job's id in the queue, whatever the status."""
    worker = queue.register(["other"], 1)
    raw(queue).lpush(queue.keys.jobs("other"), job.id)
    queue.dequeue(worker, ["other"])


def reap_finder(queue: Queue, job: Job) -> None:
    """Let a worker die that has the job's id in its list, though it never started it."""
    worker = queue.register(["other"], 1)
    raw(queue).lpush(queue.keys.proc(worker), job.id)
    lapse(queue, worker)
    queue.reap(worker)


def reap_owner(queue: Queue, job: Job) -> None:
    """Let the worker die that has started the job; of other jobs there is none."""
    if job.worker:
        lapse(queue, job.worker)
    queue.reap(job.worker or "nobody")


def promote_later(queue: Queue, job: Job) -> None:
    queue.clock.ahead += 61_000
    queue.promote()


def trim_later(queue: Queue, job: Job) -> None:
    queue.clock.ahead += 8 * DAY
    queue.trim()


def read(queue: Queue, job: Job) -> None:
    for status in ("pending", "processing", "completed", "failed", "cancelled"):
        newest(queue, status)
        queue.page(Filter(status))
    queue.page(), queue.wait_for(job.id, 0), queue.cancel_requests([job.id])
    queue.get(job.id), queue.stats(), queue.workers(), queue.queues(), queue.ping(), queue.now()
    queue.waiting(["default"]), queue.lost_workers(), queue.adopt(job.worker or "nobody", [])


VERBS: dict[str, Callable[[Queue, Job], Any]] = {
    "dequeue": dequeue,
    "complete": lambda queue, job: queue.complete(job, {"sent": True}),
    "fail, to be tried again": lambda queue, job: queue.fail(job, BOOM, 10),
    "fail for good": lambda queue, job: queue.fail(job, BOOM),
    "release": lambda queue, job: queue.release(job),
    "progress": lambda queue, job: queue.write_progress(job),
    "cancel": lambda queue, job: queue.cancel(job.id),
    "pause": lambda queue, job: (queue.pause("default"), queue.resume("default")),
    "retry": lambda queue, job: queue.retry(job.id),
    "promote": lambda queue, job: queue.promote(),
    "promote later": promote_later,
    "reap the living": lambda queue, job: queue.reap(job.worker or "nobody"),
    "reap its owner": reap_owner,
    "reap a finder": reap_finder,
    "trim": lambda queue, job: queue.trim(),
    "trim later": trim_later,
    "read": read,
}

# What the job is afterwards: a status, SAME for no change of any key, or the error, with which no key may change either.
# "=" is the status it had: its record is as before, byte by byte, while lists may have changed.
TABLE = {
    "dequeue":                 ("processing", "=",         "=",          "=",         "=",         "="),
    "complete":                (Reaped,       Reaped,      "completed",  Reaped,      Reaped,      Reaped),
    "fail, to be tried again": (Reaped,       Reaped,      "pending",    Reaped,      Reaped,      Reaped),
    "fail for good":           (Reaped,       Reaped,      "failed",     Reaped,      Reaped,      Reaped),
    "release":                 (Reaped,       Reaped,      "pending",    Reaped,      Reaped,      Reaped),
    "progress":                (Reaped,       Reaped,      "processing", Reaped,      Reaped,      Reaped),
    "cancel":                  ("cancelled",  "cancelled", "processing", WrongStatus, WrongStatus, WrongStatus),
    "pause":                   ("=",          "=",         "=",          "=",         "=",         "="),
    "retry":                   (WrongStatus,  WrongStatus, WrongStatus,  WrongStatus, "pending",   "pending"),
    "promote":                 (SAME,         SAME,        SAME,         SAME,        SAME,        SAME),
    "promote later":           (SAME,         "=",         SAME,         SAME,        SAME,        SAME),
    "reap the living":         (SAME,         SAME,        SAME,         SAME,        SAME,        SAME),
    "reap its owner":          (SAME,         SAME,        "pending",    SAME,        SAME,        SAME),
    "reap a finder":           ("=",          "=",         "=",          "=",         "=",         "="),
    "trim":                    (SAME,         SAME,        SAME,         SAME,        SAME,        SAME),
    "trim later":              (SAME,         SAME,        SAME,         GONE,        GONE,        GONE),
    "read":                    (SAME,         SAME,        SAME,         SAME,        SAME,        SAME),
}  # fmt: skip
CELLS = [(verb, status, row[at]) for verb, row in TABLE.items() for at, status in enumerate(STATUSES)]


@pytest.mark.parametrize(("verb", "status", "expected"), CELLS)
def test_matrix(queue: Queue, verb: str, status: str, expected: Any) -> None:
    job = put(queue, status)
    before = dump(queue)
    if isinstance(expected, type):
        with pytest.raises(expected) as caught:
            VERBS[verb](queue, job)
        if expected is WrongStatus:
            assert caught.value.verb == verb
            assert caught.value.job == queue.get(job.id)
    else:
        VERBS[verb](queue, job)
    if expected == SAME or isinstance(expected, type):
        assert dump(queue) == before
    elif expected == "=":
        assert dump(queue)[queue.keys.job(job.id)] == before[queue.keys.job(job.id)]
    elif expected == GONE:
        assert queue.get(job.id) is None
    else:
        assert queue.get(job.id).status == expected


def test_matrix_is_complete() -> None:
    assert TABLE.keys() == VERBS.keys()
    assert {cell[:2] for cell in CELLS} == set(itertools.product(VERBS, STATUSES))
