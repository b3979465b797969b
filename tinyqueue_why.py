"""Why a pending job does not run.

Reads only. `explain` returns the first thing that keeps a job from starting, in the order in which
they would: what the job waits for, its queue, the workers, and the jobs before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from tinyqueue import Job, Queue, is_suspect
from tinyqueue_shards import AnyQueue

NAMED = 20  # parents or workers that are named
COUNTED = 10_000  # jobs before a job that are counted, from the head of its queue
ALMOST = "; it starts in a moment"

Why = dict[str, Any]


def answer(queue: AnyQueue, job: Job) -> dict[str, Any]:
    """Return a job as clients see it, with `why` if it is pending, and its place if it is held."""
    why = explain(queue, job)
    held = {"heldBy": why["limit"], "position": why["position"]} if why and why["reason"] == "held" else {}
    return job.answer() | held | ({"why": why} if why else {})


def explain(queue: AnyQueue, job: Job) -> Why | None:
    """Return why a job does not run: `reason`, `text` and details. None if it is not pending.

    The text continues a sentence that begins with "it".
    """
    return next(_reasons(queue.part_of(job.id), job)) if job.status == "pending" else None


def _reasons(part: Queue, job: Job) -> Iterator[Why]:
    now = part.now()
    if job.waiting_for:
        yield _waits(part, job)
    if job.run_at > now and job.error and job.started_at:
        about = {"until": job.run_at, "attempt": job.attempts + 1, "maxAttempts": job.max_attempts}
        text = f"waits until {_moment(job.run_at)} for attempt {job.attempts + 1} of {job.max_attempts}"
        yield _why("retrying", f"{text}, after {job.error.type}: {job.error.message[:200]}", **about)
    if job.run_at > now:
        yield _why("delayed", f"is delayed until {_moment(job.run_at)}", until=job.run_at)
    if place := part.place_among_held(job):
        text = f"is held by the limit {job.limit}, at position {place} of those that wait for room"
        yield _why("held", text, limit=job.limit, position=place)
    yield from _reasons_in_queue(part, job, now)


def _reasons_in_queue(part: Queue, job: Job, now: int) -> Iterator[Why]:
    key = part.keys.jobs(job.queue)
    place = ("LPOS", key, job.id, "RANK", -1, "MAXLEN", COUNTED)  # the oldest entry, looked for from the head
    found = part.store.read(("SMEMBERS", part.keys.paused), ("LLEN", key), place, ("ZSCORE", part.keys.delayed, job.id))
    paused, size, index, due = found
    if job.queue.encode() in paused:
        yield _why("paused", f"waits, because its queue {job.queue} is paused; resume it", queue=job.queue)
    serving = [worker for worker in part.workers() if worker["alive"] and job.queue in worker["queues"]]
    if not serving:
        todo = f"start one: tinyqueue worker --queue {job.queue}"
        text = f"waits, because no live worker serves its queue {job.queue}; {todo}"
        yield _why("notServed", text, queue=job.queue)
    if all(worker["quiet"] for worker in serving):
        quiet = [worker["id"] for worker in serving]
        todo = f"resume one: tinyqueue quiet --resume {quiet[0]}"
        text = f"waits, because only quiet workers serve its queue {job.queue}; {todo}"
        yield _why("quiet", text, queue=job.queue, workers=quiet[:NAMED])
    serving = [worker for worker in serving if not worker["quiet"]]
    # A worker of an older version does not report its types, and may know any.
    if not any(job.type in worker.get("types", [job.type]) for worker in serving):
        todo = f"start a worker with the code that has one: tinyqueue worker --queue {job.queue}"
        text = f"waits, because no live worker of its queue has a handler for its type {job.type}; {todo}"
        yield _why("unknownType", text, type=job.type)
    if job.has_expired(now):
        yield _why("expired", "has expired; it fails when its turn comes", expiresAt=job.expires_at)
    if index is not None:
        yield _behind(job, size - 1 - index)
    if due is not None:
        yield _why("due", f"is due{ALMOST}")
    if size > COUNTED:
        yield _why("behind", f"is behind more than {COUNTED} other jobs of queue {job.queue}", ahead=COUNTED)
    if is_suspect(job):
        text = "waits until a worker runs nothing else: workers were lost while they ran it beside other jobs"
        yield _why("alone", text)
    yield _why("taken", f"was taken by a worker{ALMOST}")


def _why(reason: str, text: str, **details: Any) -> Why:
    return {"reason": reason, "text": text, **details}


def _waits(part: Queue, job: Job) -> Why:
    named = job.waiting_for[:NAMED]
    parents = [parent for parent, _ in part.read_jobs(named, cut=0)]
    statuses = [parent.status if parent else "gone" for parent in parents]
    text = ", ".join(f"{id} ({status})" for id, status in zip(named, statuses, strict=True))
    more = f" and {len(job.waiting_for) - len(named)} more" if len(job.waiting_for) > len(named) else ""
    return _why("waitingFor", f"waits for {text}{more}", jobs=list(named), count=len(job.waiting_for))


def _behind(job: Job, ahead: int) -> Why:
    if not ahead:
        return _why(
            "behind", f"is the next job of queue {job.queue}; a worker starts it when it has a free slot", ahead=0
        )
    others = "1 other job" if ahead == 1 else f"{ahead} other jobs"
    return _why("behind", f"is behind {others} of queue {job.queue}", ahead=ahead)


def _moment(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
