"""What follows the end of a job for the jobs that wait for it, and how these begin to wait.

The contract in tinyqueue.py has the keys and the transitions, and tests/dependency_model.py shows
what each guard is for. A job that waits has its parents in `waitingFor`. Whoever ends or retries a
followed job pushes a token onto the list advance, in its own transaction. `advance` takes the
tokens, and applies the status of each parent to the jobs that wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple, Protocol

from tinyqueue_job import ENDED, UNENDED, Corrupted, InvalidJob, Job, ids_in, read_job, record_of
from tinyqueue_redis import Command, text_of

MAX_LINKS = 10_000  # parents of all jobs of a batch
SWEEP_MARK = "advance:"  # stands among the delayed ids, to have promote look for tokens that are left
SWEEP_AFTER = 1000  # milliseconds
TOKENS = 1000  # that are read at a time
ADVANCED = 100  # jobs that one transaction changes
FATES = {"failed": "has failed", "cancelled": "was cancelled"}
OTHER_SHARD = "must be jobs of one shard, that of the uniqueKey if it is given, because TINYQUEUE_SHARDS is above 1"


class Names(Protocol):
    """The keys that dependents use."""

    advance: str
    advancer: str
    delayed: str
    job: Callable[[str], str]
    next: Callable[[str], str]


class Writes(Protocol):
    """What dependents need of a transaction."""

    now: int
    again: bool
    advances: bool

    def read(self, *commands: Command) -> list[Any]: ...
    def write(self, *command: Any) -> None: ...
    def gather(self, command: str, key: str, *parts: Any) -> None: ...
    def count(self, field: str, by: int = 1) -> None: ...
    def push_token(self, id: str, status: str = "") -> None: ...


class Reads(Protocol):
    """What dependents need of the store."""

    def read(self, *commands: Command) -> list[Any]: ...
    def transact(self, watch: Sequence[str], body: Callable[[Any], None]) -> None: ...


class Rules(NamedTuple):
    """What dependents need of the queue."""

    revive: Callable[..., None]
    requeue: Callable[..., None]
    fail: Callable[..., None]  # a pending job
    holder: Callable[..., Job]
    keep_ms: Mapping[str, int]


class Dependents:
    """The jobs of one queue that wait for others."""

    def __init__(self, keys: Names, store: Reads, rules: Rules) -> None:
        self.keys = keys
        self.store = store
        self.rules = rules

    # Submit -----------------------------------------------------------------------------------------------------------

    def link(
        self,
        tx: Writes,
        new: Sequence[Job],
        after: Mapping[str, Sequence[str]],
        kept: Mapping[str, str],
    ) -> None:
        """Let new jobs wait for their parents, and mark these. `kept`: ids in place of drafts.

        Watches the parents. Raises InvalidJob if one does not exist, or if jobs of the batch wait
        for each other.
        """
        ids = set_parents(new, after, kept)
        keys = list(map(self.keys.job, ids))
        stored = read_parents(ids, tx.read(("WATCH", *keys), ("MGET", *keys))[1] if ids else [])
        parents = {**stored, **{job.id: job for job in new}}
        for job in new:
            job.waiting_for = tuple(id for id in job.after if not job.may_follow(parents[id].status))
            for id in job.waiting_for:
                tx.gather("SADD", self.keys.next(id), job.id)
                if parents[id].status in ENDED:
                    tx.push_token(id, parents[id].status)
        waited = {id for job in new for id in job.waiting_for}
        for job in new:
            job.followed = job.id in waited
        for parent in stored.values():  # after a lost reply all, so that a late EXEC fails
            if tx.again or (parent.id in waited and not parent.followed):
                self._mark(tx, parent)

    def _mark(self, tx: Writes, parent: Job) -> None:
        parent.followed = True
        self._rewrite(tx, parent)

    def _rewrite(self, tx: Writes, job: Job) -> None:
        """Write a changed record. That of an ended job keeps its time to live."""
        ended = job.status in ENDED
        left = job.ended_at + self.rules.keep_ms[job.status] - tx.now if ended else 0
        if not job.unreadable:
            tx.write("SET", self.keys.job(job.id), record_of(job), *(("PX", max(1, left)) if ended else ()))

    def look_again(self, tx: Writes, job: Job, seen: str = "", completed: Collection[str] = ()) -> None:
        """Have `advance` look at the parents that a job waits for. They may have ended."""
        for parent in job.waiting_for:
            if parent != seen:
                tx.gather("SADD", self.keys.next(parent), job.id)
                tx.write("PERSIST", self.keys.next(parent))
                tx.push_token(parent, "completed" if parent in completed else "")

    # Advance ----------------------------------------------------------------------------------------------------------

    def advance(self) -> int:
        """Take all tokens, and return how many. See Queue.advance.

        The lock only saves duplicate work. It is free again before the last look, so a token that
        was pushed while it was taken is seen.
        """
        taken = 0
        while tokens := self.store.read(("LRANGE", self.keys.advance, 0, TOKENS - 1))[0]:
            if not self.store.read(("SET", self.keys.advancer, "1", "NX", "PX", 1000))[0]:
                break
            for parent, own in tokens_by_job(tokens).items():
                self._advance_next(parent, own)
            self.store.read(("DEL", self.keys.advancer))
            taken += len(tokens)
        return taken

    def sweep(self) -> None:
        """Take the tokens that are left. Remove the mark once there are none."""
        self.advance()
        self.store.transact([self.keys.advance], self._remove_mark)

    def _remove_mark(self, tx: Writes) -> None:
        if not tx.read(("LLEN", self.keys.advance))[0]:
            tx.write("ZREM", self.keys.delayed, SWEEP_MARK)

    def _advance_next(self, id: str, tokens: Sequence[bytes]) -> None:
        """Apply the status of one parent to its dependents, some in each transaction."""
        ids: list[str] = []
        with suppress(Corrupted):  # a key of the wrong type has no members
            ids = ids_in(sorted(self.store.read(("SMEMBERS", self.keys.next(id)))[0]))
        for at in range(0, max(len(ids), 1), ADVANCED):
            some = ids[at : at + ADVANCED]
            last = at + ADVANCED >= len(ids)
            body = partial(self._advance_some, id=id, tokens=tokens, some=some, last=last)
            self.store.transact([self.keys.job(id)], body)

    def _advance_some(self, tx: Writes, id: str, tokens: Sequence[bytes], some: Sequence[str], last: bool) -> None:
        """Apply the status of a parent to some dependents. Watches its record and theirs.

        The last transaction removes the tokens, and no others: somebody may have pushed more.
        """
        keys = [self.keys.job(id), *map(self.keys.job, some)]
        record, *records = tx.read(("WATCH", *keys), ("MGET", *keys))[1]
        parent = read_job(id, record) if record is not None else None
        status = parent.status if parent else status_in(tokens)
        for job in (read_job(job, record) for job, record in zip(some, records, strict=True) if record is not None):
            if id in job.waiting_for and status:
                self._follow(tx, job, id, status)
        if status == "completed" and some:
            tx.write("SREM", self.keys.next(id), *some)
        elif status in ENDED and last:
            tx.write("EXPIRE", self.keys.next(id), self.rules.keep_ms[status] // 1000 + 1)
        elif parent and some and not parent.followed:
            self._mark(tx, parent)
        for token in tokens if last else ():
            tx.write("LREM", self.keys.advance, 1, token)
        tx.advances = False  # `advance` looks again

    def _follow(self, tx: Writes, job: Job, parent: str, status: str) -> None:
        """Apply the status of a parent to a job that waits for it."""
        released = job.may_follow(status)
        if released:
            job.waiting_for = tuple(id for id in job.waiting_for if id != parent)
        if job.failed_because_of(parent) and (released or status in UNENDED) and self.rules.holder(tx, job) is job:
            self.rules.revive(tx, job, seen=parent)
        elif job.status == "pending" and not job.waiting_for:
            tx.write("ZREM", self.keys.delayed, job.id)
            tx.count("pending:" + job.queue, -1)  # counted again at once
            job.updated_at = max(tx.now, job.updated_at)
            self.rules.requeue(tx, job, job.run_at)
        elif released:
            self._rewrite(tx, job)
        elif job.status == "pending" and status in ENDED:
            tx.write("ZREM", self.keys.delayed, job.id)
            self.rules.fail(tx, job, "DependencyFailed", f"job {parent}, which this job waits for, {FATES[status]}")


# Parents and tokens ---------------------------------------------------------------------------------------------------


def outer_parents(after: Mapping[str, Iterable[str]], own: Collection[str]) -> list[str]:
    """Return the parents that are not in the batch itself. Raises InvalidJob for too many."""
    links = [id for ids in after.values() for id in ids]
    if len(links) > MAX_LINKS:
        raise InvalidJob("after", f"must be at most {MAX_LINKS} ids in all jobs of a batch")
    return [id for id in dict.fromkeys(links) if id not in own]


def set_parents(new: Sequence[Job], after: Mapping[str, Sequence[str]], kept: Mapping[str, str]) -> list[str]:
    """Set `after` of the new jobs of a batch. Return the parents that are not among them.

    `kept` has the ids of the jobs that are kept in place of drafts. Raises InvalidJob if jobs wait
    for each other in a circle.
    """
    for job in new:
        job.after = tuple(dict.fromkeys(kept.get(id, id) for id in after.get(job.id, ())))
    places = {job.id: str(place) for place, job in enumerate(new)}
    try:
        TopologicalSorter({job.id: [id for id in job.after if id in places] for job in new}).prepare()
    except CycleError as error:
        circle = ", ".join(places[id] for id in error.args[1])
        raise InvalidJob("after", f"these jobs of the batch wait for each other in a circle: {circle}") from None
    return outer_parents({job.id: job.after for job in new}, places)


def read_parents(ids: Sequence[str], records: Sequence[bytes | None]) -> dict[str, Job]:
    """Read the parents of new jobs. Raises InvalidJob if one does not exist."""
    found = {id: read_job(id, record) for id, record in zip(ids, records, strict=True) if record is not None}
    if missing := [id for id in ids if id not in found]:
        raise InvalidJob("after", f"job {missing[0]} does not exist: its id is wrong, or it was purged or expired")
    return found


def tokens_by_job(tokens: Iterable[bytes]) -> dict[str, list[bytes]]:
    """Group the tokens of advance by the job that ended or was revived."""
    groups: dict[str, list[bytes]] = {}
    for token in tokens:
        groups.setdefault(text_of(token).partition(":")[0], []).append(token)
    return groups


def status_in(tokens: Iterable[bytes]) -> str:
    """Return the status of a job that is gone from the tokens of its ends and revivals.

    A token without a status was pushed because of a `waitingFor`, which a job leaves when it
    completes, so the job has failed. Returns "" if it was only revived: the token of its later end
    follows.
    """
    found = {text_of(token).partition(":")[2].partition(":")[0] for token in tokens}
    known = next((status for status in ("completed", "cancelled", "failed") if status in found), "failed")
    return "" if found == {"pending"} else known
