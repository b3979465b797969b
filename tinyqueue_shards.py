"""Shards: several queues, each on its own Redis or in its own slot of a cluster, used as one.

A verb goes to the shard that the id, the uniqueKey or the limit of a job decides, or to all of
them. This module writes nothing itself. Each verb and each guarantee is that of `Queue`, in one
shard.
"""

from __future__ import annotations

import itertools
import random
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial, reduce
from typing import Any, TypeAlias

from tinyqueue import (
    ACTIONS,
    BLOCK,
    ID,
    Filter,
    Held,
    InvalidJob,
    Job,
    Once,
    Outcome,
    Override,
    Page,
    Queue,
    Reaped,
    S,
    T,
    Times,
    TinyQueueError,
    Unavailable,
    Verbs,
    limit_of,
    new_worker_id,
    try_each,
)
from tinyqueue_handler import outer_parents
from tinyqueue_job import place_of
from tinyqueue_log import LogLine
from tinyqueue_reading import add_counts
from tinyqueue_redis import shield, text_of

OTHER_SHARD = "must be jobs of one shard, that of the uniqueKey if it is given, because TINYQUEUE_SHARDS is above 1"


class Shards(Verbs):
    """Many queues as one. Each has its own namespace, such as `{queue.0}`, and so its own slot.

    The last two digits of a job's id name its shard. All jobs of a submit go into one shard, and
    those of the next into the next shard, so the order is first in, first out only within a shard.
    A submit goes to the shard of its limit or of its uniqueKey. If it has both, these must be the
    same shard. A submit with only an Idempotency-Key goes to the shard of that key. If it has one
    of the others too, it first takes the Idempotency-Key in the shard of that key.

    Each shard stands alone. While one does not answer, the others are served, and nobody waits for
    it. A worker has one id in all shards. The heartbeat registers it in those that did not answer
    before or that have reaped it. It takes no jobs from these until then. Reports need all shards.
    """

    def __init__(self, shards: Sequence[Queue]) -> None:
        self.parts = list(shards)
        self.lease = shards[0].lease
        self._turn = itertools.count(random.randrange(len(shards)))
        # For each worker that this process registered: how to register it, and the shards in which
        # it is not registered now.
        self._registrations: dict[str, tuple[Callable[[Queue], str], set[Queue]]] = {}
        self._open_threads()
        for at, shard in enumerate(shards):
            shard.shard = at
            shard.store.connections.guard(f"shard {shard.keys.prefix[1:-2]}")

    def _open_threads(self) -> None:
        self._waiters = ThreadPoolExecutor(len(self.parts), "bell")
        self._callers = ThreadPoolExecutor(2 * len(self.parts), "shard")
        self._waits: dict[Queue, Future[set[str]]] = {}

    def disconnect(self) -> None:
        """Close all connections and end all threads. A fork would not take the threads along."""
        for threads in (self._waiters, self._callers):
            threads.shutdown()
        super().disconnect()
        self._open_threads()

    def part_of(self, id: str) -> Queue:
        """Return the shard that an id names. If it names none, any shard will find it unknown."""
        at = int(id[-2:], 16) if ID.fullmatch(id) else 0
        return self.parts[at if at < len(self.parts) else 0]

    def part_for(self, name: str) -> Queue:
        """Return the shard of the schedule of that name. uniqueKeys and limits are spread alike."""
        return self.parts[self._index_of(name)]

    def _index_of(self, key: str) -> int:
        return zlib.crc32(key.encode()) % len(self.parts)

    def _from(self, first: int) -> list[Queue]:
        """Return all shards, beginning with that one."""
        first %= len(self.parts)
        return [*self.parts[first:], *self.parts[:first]]

    def _try_first(self, call: Callable[[Queue], T], first: int = 0) -> T:
        """Return the result of the first shard that is available, beginning with that one.

        A call that may have written something is not repeated in another shard.
        """
        for shard in self._from(first):
            try:
                return call(shard)
            except Unavailable as error:
                trouble = error
                if error.doubtful:
                    break
        raise trouble

    def _call_all(self, call: Callable[[Queue], T], must: bool = False) -> list[T]:
        """Like try_each, in all shards at the same time: one that hangs holds up no other."""
        with shield():  # a handler that calls this shares the threads with the worker
            return try_each(self.parts, call, must, self._callers.map)

    def _by_shard(self, items: Iterable[T], id: Callable[[T], str]) -> dict[Queue, list[T]]:
        """Group items by the shard of the job whose id `id` returns."""
        parts: defaultdict[Queue, list[T]] = defaultdict(list)
        for item in items:
            parts[self.part_of(id(item))].append(item)
        return parts

    def _call_each(
        self, items: Sequence[T], id: Callable[[T], str], call: Callable[[Queue, list[T]], list[S]], must: bool = False
    ) -> list[S]:
        """Call `call` for each shard with the items whose jobs are there. Join the results."""
        parts = self._by_shard(items, id)
        results = try_each(list(parts), lambda shard: call(shard, parts[shard]), must)
        return list(itertools.chain(*results))

    def now(self) -> int:
        """Return the time of a shard that this process knows, or else of the first that answers."""
        known = next((shard for shard in self.parts if not shard.clock.stale), None)
        return known.clock.now() if known else self._try_first(Queue.now)

    def submit(self, jobs: Sequence[Job], once: Once | None = None) -> list[Job]:
        """Like Queue.submit. Raises InvalidJob if uniqueKeys or limits are in different shards."""
        indexes = {self._index_of(job.unique_key) for job in jobs if job.unique_key}
        limits = {limit: self._index_of(limit) for job in jobs if (limit := limit_of(job))}
        if len(indexes) > 1:
            rule = "must be the same in all jobs of a batch, because TINYQUEUE_SHARDS is above 1"
            raise InvalidJob("uniqueKey", rule)
        if len({*limits.values()}) > 1:
            rule = f"the limits {' and '.join(sorted(limits)[:2])} belong to different shards; submit their jobs"
            raise InvalidJob("jobs", f"{rule} in batches of their own")
        if indexes and limits and indexes != {*limits.values()}:
            rule = f"belongs to another shard than the limit {min(limits)} of the job; use another key, or none"
            raise InvalidJob("uniqueKey", rule)
        indexes |= {*limits.values()}
        parents = outer_parents({job.id: job.after for job in jobs}, {job.id for job in jobs})
        indexes |= {self.parts.index(self.part_of(id)) for id in parents}
        if len(indexes) > 1:
            raise InvalidJob("after", OTHER_SHARD)
        if once and not indexes:
            indexes = {self._index_of(once.key)}
        elif once and (at := self._index_of(once.key)) not in indexes:
            self.parts[at].claim(once)
        if indexes:
            return self._submit_to(self.parts[indexes.pop()], jobs, once)
        return self._try_first(lambda shard: self._submit_to(shard, jobs, once), next(self._turn))

    def _submit_to(self, shard: Queue, jobs: Sequence[Job], once: Once | None) -> list[Job]:
        at = self.parts.index(shard)
        ids = {job.id: f"{job.id[:-2]}{at:02x}" for job in jobs}
        for job in jobs:
            job.id = ids[job.id]
            job.after = tuple(ids.get(id, id) for id in job.after)
        elsewhere: Counter[str] = Counter()
        names = list({job.queue for job in jobs})
        for part in self.parts if shard.max_pending else ():
            if part is not shard:
                with suppress(TinyQueueError):  # what is away counts for nothing
                    elsewhere.update(part.count_pending(names))
        return shard.submit(jobs, once, elsewhere)

    def register(self, queues: Sequence[str], concurrency: int, worker: str = "") -> str:
        """Like Queue.register, in every shard that answers. The heartbeat adds the others."""
        worker = worker or new_worker_id()
        register = partial(Queue.register, queues=queues, concurrency=concurrency, worker=worker)
        self._registrations[worker] = register, set(self.parts)
        try:
            self._call_all(lambda shard: self._register_in(shard, worker))
        except TinyQueueError:
            del self._registrations[worker]
            raise
        return worker

    def _register_in(self, shard: Queue, worker: str) -> None:
        register, absent = self._registrations[worker]
        register(shard)
        if self.is_quiet(worker):
            shard.quiet(worker)
        absent.discard(shard)

    def _absent(self, worker: str) -> set[Queue]:
        """Return the shards in which a worker of this process is known not to be registered."""
        return self._registrations[worker][1] if worker in self._registrations else set()

    @contextmanager
    def _noting_reaped(self, shard: Queue, worker: str) -> Iterator[None]:
        """Note where a worker was reaped: it takes nothing there until it registers again."""
        try:
            yield
        except Reaped as error:
            error.parts = [shard]
            self._absent(worker).add(shard)
            raise

    def wait(self, names: Sequence[str], seconds: float = BLOCK, worker: str = "") -> set[str]:
        """Like Queue.wait, in all shards. Waits that outlast this call go on in the next one."""
        for shard in self.parts:
            if shard not in self._waits:
                self._waits[shard] = self._waiters.submit(self._wait_in, shard, names, seconds, worker)
        done, _ = wait(self._waits.values(), return_when=FIRST_COMPLETED)
        self._waits = {shard: future for shard, future in self._waits.items() if future not in done}
        return {name for future in done for name in future.result()}

    def _wait_in(self, shard: Queue, names: Sequence[str], seconds: float, worker: str) -> set[str]:
        try:
            return shard.wait(names, seconds, worker)
        except TinyQueueError:  # as if no bell rang: the other shards are still waited for
            time.sleep(seconds)
            return set()

    def waiting(self, names: Sequence[str], due: bool = False) -> int:
        return sum(try_each(self.parts, lambda shard: shard.waiting(names, due)))

    def take(self, worker: str, names: Sequence[str], most: int) -> list[bytes]:
        """Like Queue.take, from the shards in turn. Shards that fail are left out."""
        taken: list[bytes] = []
        absent = self._absent(worker)

        def take(shard: Queue) -> None:
            while len(taken) < most and shard not in absent:
                ids = shard.take(worker, names, most - len(taken))
                own = self._own(shard, worker, ids)
                taken.extend(own)
                if len(own) == len(ids):
                    break

        try_each(self._from(next(self._turn)), take)
        return taken

    def start(self, worker: str, ids: Sequence[bytes], held: Held = None) -> list[Job]:
        """Like Queue.start, one transaction per shard. Tries all before it raises.

        A job that was started before an error was raised is found by `adopt`.
        """

        def start(shard: Queue, part: list[bytes]) -> list[Job]:
            with self._noting_reaped(shard, worker):
                return shard.start(worker, part, held, len(ids) - len(part))

        return self._call_each(ids, text_of, start, must=True)

    def adopt(self, worker: str, held: Collection[str]) -> list[bytes]:
        def adopt(shard: Queue) -> list[bytes]:
            return self._own(shard, worker, shard.adopt(worker, held))

        return [id for ids in try_each(self.parts, adopt) for id in ids]

    def _own(self, shard: Queue, worker: str, ids: Sequence[bytes]) -> list[bytes]:
        """Return the ids of a shard's own jobs. Drop the other entries."""
        own = [id for id in ids if ID.fullmatch(text_of(id)) and self.part_of(text_of(id)) is shard]
        if foreign := [id for id in ids if id not in own]:
            shard.discard(worker, foreign)
        return own

    def settle(self, worker: str, outcomes: Sequence[Outcome], again: bool = False) -> list[Outcome]:
        """Like Queue.settle, one transaction per shard. Tries all before it raises.

        A worker should settle the outcomes of each shard by themselves, so that it need not settle
        them again because of another shard.
        """

        def settle(shard: Queue, part: list[Outcome]) -> list[Outcome]:
            with self._noting_reaped(shard, worker):
                return shard.settle(worker, part, again)

        try:
            return self._call_each(outcomes, lambda outcome: outcome.job.id, settle, must=True)
        except Unavailable as error:
            parts = {self.part_of(outcome.job.id) for outcome in outcomes}
            error.doubtful = error.doubtful or len(parts) > 1  # the other shards may have written theirs
            raise

    def write_progress(self, job: Job) -> None:
        self.part_of(job.id).write_progress(job)

    def cancel(self, id: str) -> Job | None:
        return self.part_of(id).cancel(id)

    def retry(self, id: str) -> Job | None:
        return self.part_of(id).retry(id)

    def hasten(self, id: str) -> Job | None:
        return self.part_of(id).hasten(id)

    def quiet(self, worker: str) -> bool:
        return any(self._call_all(lambda shard: shard.quiet(worker), must=True))

    def resume_worker(self, worker: str) -> bool:
        return any(self._call_all(lambda shard: shard.resume_worker(worker), must=True))

    def note_action(self, by: str, action: str, target: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Like Queue.note_action, in the first shard that answers."""
        self._try_first(lambda shard: shard.note_action(by, action, target, result))

    def audit(self, limit: int = ACTIONS) -> list[dict[str, Any]]:
        found = itertools.chain(*self._call_all(lambda shard: shard.audit(limit)))
        return sorted(found, key=lambda entry: -int(entry["at"]))[:limit]

    def cancel_requests(self, ids: Sequence[str]) -> list[str]:
        return self._call_each(ids, str, Queue.cancel_requests)

    def pause(self, name: str) -> None:
        self._call_all(lambda shard: shard.pause(name), must=True)

    def resume(self, name: str) -> None:
        self._call_all(lambda shard: shard.resume(name), must=True)

    def set_limit(self, limit: str, override: Override) -> None:
        self._call_all(lambda shard: shard.set_limit(limit, override), must=True)

    def limits_in_use(self) -> dict[str, dict[str, Any]]:
        return reduce(_added, (shard.limits_in_use() for shard in self.parts))

    def place_among_held(self, job: Job) -> int:
        return self.part_of(job.id).place_among_held(job)

    def heartbeat(
        self, worker: str, jobs: Sequence[str] = (), slots: Sequence[Job] = (), given_up: Sequence[Job] = ()
    ) -> None:
        """Like Queue.heartbeat, in every shard that answers. Registers the worker where it is not.

        Raises Reaped after that, if any shard has reaped it. It registers there at the next call.
        """
        parts = self._by_shard(jobs, str)
        running = self._by_shard(slots, lambda job: job.id)
        given = self._by_shard(given_up, lambda job: job.id)
        absent = set(self._absent(worker))

        def beat(shard: Queue) -> None:
            if shard in absent:
                self._register_in(shard, worker)
                return
            with self._noting_reaped(shard, worker):
                shard.heartbeat(worker, parts.get(shard, []), running.get(shard, []), given.get(shard, []))

        self._call_all(beat)

    def deregister(self, worker: str) -> None:
        """Like Queue.deregister, in all shards. In those that fail the worker will be reaped."""
        self._call_all(lambda shard: shard.deregister(worker), must=True)
        self._registrations.pop(worker, None)

    def promote(self) -> int:
        return sum(self._call_all(Queue.promote))

    def advance(self) -> int:
        return sum(self._call_all(Queue.advance))

    def lost_workers(self, own: str = "", now: float | None = None, missing_for: float | None = None) -> list[str]:
        found = self._call_all(lambda shard: shard.lost_workers(own, now, missing_for))
        return sorted({worker for lost in found for worker in lost})

    def reap(self, worker: str) -> int:
        """Like Queue.reap, in every shard that answers."""
        return self.reap_in(self.parts, worker)

    def trim(self) -> int:
        return sum(self._call_all(Queue.trim))

    def forget(self, status: str, ids: Sequence[bytes], logged: Collection[bytes] = ()) -> int:
        return sum(shard.forget(status, part, logged) for shard, part in self._by_shard(ids, text_of).items())

    def ping(self) -> None:
        """Raise Unavailable unless a shard accepts writes. `warnings` names those that do not."""
        self._call_all(Queue.ping)

    def get(self, id: str) -> Job | None:
        return self.part_of(id).get(id)

    def write_log(self, job: Job) -> None:
        self.part_of(job.id).write_log(job)

    def read_log(self, id: str, after: int = 0) -> tuple[Job | None, list[LogLine]]:
        return self.part_of(id).read_log(id, after)

    def wait_for(self, id: str, seconds: float) -> Job | None:
        return self.part_of(id).wait_for(id, seconds)

    def page(self, filter: Filter | None = None, *, limit: int = 50, cursor: str = "", cut: int | None = None) -> Page:
        """Like Queue.page. Merges the pages of the shards as far as all of them have looked."""
        pages = [shard.page(filter, limit=limit, cursor=cursor, cut=cut) for shard in self.parts]
        horizon = max((place_of(cursor) for _, cursor in pages if cursor), default=(0, ""))
        found = sorted((job for jobs, _ in pages for job in jobs), key=Job.place, reverse=True)
        seen = [job for job in found if job.place() >= horizon]
        scanned = sum(page.scanned for page in pages)
        if len(seen) > limit:
            at, id = seen[limit - 1].place()
            return Page(seen[:limit], f"{at}.{id}", scanned)
        return Page(seen, f"{horizon[0]}.{horizon[1]}" if horizon[1] else "", scanned)

    def queues(self) -> dict[str, dict[str, Any]]:
        return dict(sorted(reduce(_added, (shard.queues() for shard in self.parts)).items()))

    def stats(self, minutes: int = 0) -> dict[str, Any]:
        """Like Queue.stats, added up.

        A worker registers in every shard that answers, so `workers` is the highest count of any.
        """
        each = [shard.stats(minutes) for shard in self.parts]
        # By time, not by index: a minute may begin between reading two shards.
        history = reduce(_added, ({minute["at"]: minute for minute in stats.pop("history", ())} for stats in each))
        total: dict[str, Any] = reduce(_added, each)
        return total | ({"history": [history[at] for at in sorted(history)[-minutes:]]} if minutes else {})

    def recent(self, minutes: int) -> list[dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for minute in (minute for shard in self.parts for minute in shard.recent(minutes)):
            # Not _added: a handler may name its errors like fields of a report.
            add_counts(found.setdefault(minute["at"], {}), minute["types"])
        return [{"at": at, "types": found[at]} for at in sorted(found)[-minutes:]]

    def scale(self, names: Sequence[str] = ()) -> dict[str, int]:
        return reduce(_added, (shard.scale(names) for shard in self.parts))

    def workers(self) -> list[dict[str, Any]]:
        """Like Queue.workers. A worker is alive if any shard has its lease."""
        each = ({worker["id"]: worker for worker in shard.workers()} for shard in self.parts)
        return list(reduce(_added, each).values())

    def metrics(self) -> dict[str, dict[tuple[str, ...], int]]:
        return reduce(_added, (shard.metrics() for shard in self.parts))

    def take_snapshot(self) -> bool:
        return any(self._call_all(Queue.take_snapshot))

    def times(self, minutes: int) -> tuple[int, Times]:
        """Like Queue.times, added up. Returns the earliest beginning of a window."""
        found = [shard.times(minutes) for shard in self.parts]
        return min(at for at, _ in found), reduce(_added, (times for _, times in found))

    def count_scrape_errors(self, times: int) -> None:
        self._try_first(lambda shard: shard.count_scrape_errors(times))

    def count_refused(self, counts: Mapping[str, int]) -> None:
        self._try_first(lambda shard: shard.count_refused(counts))

    def spend(self, who: str, limit: int, seconds: int) -> tuple[int, int]:
        """Like Queue.spend, in the shard of the client, or in the next that answers."""
        return self._try_first(lambda shard: shard.spend(who, limit, seconds), self._index_of(who))


# Fields whose higher value counts when two reports are added up. Most are the same in both.
HIGHEST = {"oldestWaitingMs", "workers", "at", "lastHeartbeat", "startedAt"}
HIGHEST |= {"id", "host", "pid", "queues", "types", "concurrency", "maxRunning", "rate", "haltedMs"}


def _added(one: Any, other: Any, name: Any = "") -> Any:
    """Add up the reports of two shards. What is true in either is true."""
    if isinstance(one, dict):
        both = one.keys() & other.keys()
        return {**one, **other, **{name: _added(one[name], other[name], name) for name in both}}
    if name in HIGHEST or isinstance(one, bool):
        return one if one is None else max(one, other)
    return one + other


AnyQueue: TypeAlias = Queue | Shards
