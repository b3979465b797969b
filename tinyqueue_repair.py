"""Restoring what lost keys have broken. `doctor --repair` calls `repair`, and so do workers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain

from tinyqueue import (
    ENDED,
    LOOK_MARK,
    NAME,
    SWEEP_MARK,
    UNENDED,
    Queue,
    Transaction,
    ids_in,
)
from tinyqueue_doctor import Finding, compare_counts
from tinyqueue_redis import pairs, scan, text_of
from tinyqueue_shards import AnyQueue

MARKS = (LOOK_MARK.encode(), SWEEP_MARK.encode())  # among the delayed ids
STEP = 1000  # keys or entries of one step
OTHERS = "*"  # any queue, as it may be in the metrics that are counted as other
REPAIR_EVERY = 600  # seconds between two repairs that no operator asked for


def repair(parts: Iterable[Queue]) -> list[Finding]:
    """Restore what lost keys have broken, in these shards. Return what was changed.

    Lists the jobs that no list names, finds the lists of unknown workers, drops entries without a
    job, lists schedules again, and counts again. Safe while jobs are submitted and run, except that
    the jobs of a queue are counted only if none of them changes meanwhile. Remembers the ids of all
    unended jobs.
    """
    return [finding for part in parts for finding in _repair(part)]


def find_broken(queue: AnyQueue) -> list[Queue]:
    """Return the shards in which more jobs are counted than listed, each every 10 minutes."""
    wrong = [part for part in queue.parts if compare_counts(part)[2]]
    return [part for part in wrong if part.store.read(("SET", part.keys.repairer, "1", "NX", "EX", REPAIR_EVERY))[0]]


def _repair(queue: Queue) -> Iterator[Finding]:
    before = _read_counters(queue)
    names = list(scan(queue.store.read, queue.keys.prefix))
    jobs = _read_unended(queue, [name[4:] for name in names if name.startswith("job:")])
    workers = [name[5:] for name in names if name.startswith("proc:")]
    yield from _changed(_enlist(queue, workers), "list of an unknown worker", "lists of unknown workers", "found")
    lists = sorted(queue.keys.prefix + name for name in names if name.startswith(("jobs:", "proc:")))
    missing = set(jobs).difference(*queue.read_held())
    dropped = 0
    for key in (queue.keys.delayed, *lists, *queue.keys.ended.values()):
        for entries in queue.read_entries(key, "LRANGE" if key in lists else "ZRANGE"):
            missing.difference_update(entries)
            others = [id for id in entries if id not in jobs and not id.startswith(MARKS)]
            for at in range(0, len(others), STEP):
                dropped += _drop_gone(queue, key, others[at : at + STEP])
    yield from _changed(dropped, "entry without a job", "entries without a job", "dropped")
    restored = sum(queue.restore(id.decode()) for id in missing)
    yield from _changed(restored, "job", "jobs", "listed again")
    for entries in queue.read_entries(queue.keys.delayed, "ZRANGE"):
        yield from _look_again(queue, ids_in(entries))
    schedules = {name[9:] for name in names if name.startswith("schedule:")}
    yield from _changed(_list_schedules(queue, schedules), "schedule", "schedules", "listed again, or dropped")
    yield from _recount(queue, Counter(chain(*jobs.values())), before)


def _list_schedules(queue: Queue, stored: Collection[str]) -> int:
    """List again the schedules whose next tick was lost, and drop ticks without a schedule."""
    listed = {text_of(name) for name in queue.store.read(("ZRANGE", queue.keys.ticks, 0, -1))[0]}
    wrong = sorted(name for name in listed.symmetric_difference(stored) if NAME.fullmatch(name))
    for name in wrong:
        queue.change_schedule(name, lambda found, last, now: (found, 0))  # writes the entry in any case
    return len(wrong)


def _changed(count: int, one: str, many: str, how: str) -> Iterator[Finding]:
    if count:
        yield Finding("ok", "repair", f"{count} {one if count == 1 else many} {how}")


def _read_counters(queue: Queue) -> dict[str, bytes]:
    """Return all counts and metrics. Whatever changes a job changes one of them."""
    reads = ("HGETALL", queue.keys.counts), ("HGETALL", queue.keys.metrics)
    counts, metrics = queue.store.read(("MULTI",), *reads, ("EXEC",))[-1]
    return dict(pairs(counts) + pairs(metrics))


def _read_unended(queue: Queue, ids: Sequence[str]) -> dict[bytes, tuple[str, ...]]:
    """Return the unended jobs by id, each with the fields that count it."""
    jobs = (job for job, _ in queue.read_jobs(ids, cut=0) if job and job.status in UNENDED)
    return {job.id.encode(): (f"{job.status}:{job.queue}", *["retrying"] * job.retrying) for job in jobs}


def _enlist(queue: Queue, workers: Sequence[str]) -> int:
    """Add workers that have a list to the set of workers, so that they are reaped if lost."""
    at_once = (workers[at : at + STEP] for at in range(0, len(workers), STEP))
    return sum(queue.store.read(("SADD", queue.keys.workers, *some))[0] for some in at_once)


def find_forgotten(queue: AnyQueue) -> list[Finding]:
    """Look at some jobs that wait for others, and advance those whose parents have ended.

    There are none, unless keys were lost or an older version of a worker ended a parent.
    """
    return [finding for part in queue.parts for finding in _look_again(part, _some_that_wait(part))]


def _some_that_wait(part: Queue) -> list[str]:
    """Return the ids of up to 100 jobs that wait for others, beginning anywhere among them."""
    [count] = part.store.read(("ZCOUNT", part.keys.delayed, "inf", "inf"))
    if not count:
        return []
    start = random.randrange(-99, count)
    return ids_in(part.store.read(("ZRANGEBYSCORE", part.keys.delayed, "inf", "inf", "LIMIT", max(start, 0), 100))[0])


def _look_again(queue: Queue, ids: Sequence[str]) -> Iterator[Finding]:
    """Advance those jobs that wait for one that has ended or is gone, or whose end is not seen."""
    forgotten = 0
    for job in [job for job, _ in queue.read_jobs(ids, cut=0) if job and job.status == "pending" and job.waiting_for]:
        parents = [parent for parent, _ in queue.read_jobs(job.waiting_for, cut=0)]
        if any(parent is None or parent.status in ENDED or not parent.followed for parent in parents):
            queue.restore(job.id)
            forgotten += 1
    yield from _changed(forgotten, "job that waited", "jobs that waited", "looked at again: their parents have ended")


def _drop_gone(queue: Queue, key: str, ids: Sequence[bytes]) -> int:
    """Drop the entries whose jobs do not exist. No job is ever stored under such an id again."""
    found = queue.store.read(*(("EXISTS", queue.keys.job(text_of(id))) for id in ids)) if ids else []
    gone = [id for id, exists in zip(ids, found, strict=True) if not exists]
    in_list = key.startswith((queue.keys.jobs(""), queue.keys.proc("")))
    drops = [("LREM", key, 0, id) for id in gone] if in_list else [("ZREM", key, *gone)] if gone else []
    return sum(queue.store.read(*drops)) if drops else 0


def _recount(queue: Queue, actual: Mapping[str, int], before: Mapping[str, bytes]) -> Iterator[Finding]:
    """Correct the counts of every queue of which no job has changed since `before`."""
    wrong = {field for field in before if field.startswith(("pending:", "processing:", "retrying"))} | actual.keys()
    wrong = {field for field in wrong if before.get(field, b"0") != b"%d" % actual.get(field, 0)}

    def body(tx: Transaction) -> list[str]:
        counts, metrics = tx.read(("HGETALL", queue.keys.counts), ("HGETALL", queue.keys.metrics))
        now = dict(pairs(counts) + pairs(metrics))
        changed = {_queue_in(field) for field in now.keys() | before.keys() if now.get(field) != before.get(field)}
        quiet = sorted(field for field in wrong if not {_queue_in(field), OTHERS} & changed)
        for field in quiet:
            tx.write("HDEL", queue.keys.counts, field)
            tx.count(field, actual.get(field, 0))
        return quiet

    corrected = queue.store.transact([queue.keys.counts, queue.keys.metrics], body) if wrong else []
    for field in corrected:
        was = text_of(before.get(field, b"0"))
        yield Finding("ok", "repair", f"{field} counted again: it was {was}, and is {actual.get(field, 0)}")
    for name in sorted(set(map(_queue_in, wrong - set(corrected)))):
        seen = f"jobs {f'of queue {name} ' if name else ''}changed while they were counted"
        todo = f"tinyqueue pause {name}, and repair again" if name else "pause the queues, and repair again"
        yield Finding("warn", "repair", seen, f"if this goes on, {todo}")


def _queue_in(field: str) -> str:
    """Return the queue in pending:<queue> or <event>:<type>:<queue>, with or without a bucket."""
    labels = field.split(":")[1:3]
    return OTHERS if labels == ["other", "other"] else (labels or [""])[-1]
