"""TinyQueue: a job queue on Redis. This module holds all rules of the queue. Its contract:

The promise
    An accepted job runs at least once, unless it is cancelled or expires first. It is never lost
    while Redis keeps its data. Apart from retries and releases, it runs twice only if its outcome
    could not be saved: its worker died or was cut off from Redis for longer than its lease, or a
    failover lost the write. The jobs of a queue start first in, first out. A job that kills its
    worker runs out of attempts like any other. Jobs that ran beside it get their attempts back, so
    they never fail because of it.

States
                 enqueue                dequeue                complete
        (nothing) -----> pending ------------------> processing -----> completed
                         |  ^  ^                       |  |  |
                  cancel |  |  +--- release, reap -----+  |  | fail, reap: no attempt left
                         v  |  +--- fail: attempts left --+  v
                  cancelled +-------- retry ------------- failed

    A job that waits for its delay or backoff is pending with a `runAt`. A job that expires before
    its first start is failed.

Transitions. Each is one MULTI / EXEC, with a WATCH on the keys in column 3. It takes the same few
round trips however many jobs it moves. No Lua.

    verb      from -> to                      watches          only if                   writes
    enqueue   nothing -> pending              once, unique     keys unused               record, list/delayed, keys
    tick      nothing -> pending              schedule,        its time has come         as enqueue; schedule, ticks
                                              unique
    sync      (schedules of the code)         generation,      code not replaced         schedules, ticks, generation
                                              schedules
    take      (list to list)                  -                not paused; not quiet     jobs -> proc, workers
    start     pending -> processing           worker, records  registered; due; room     record: attempts + 1, worker,
                                              and running                                running, pace
    hold      (list to held)                  worker, records  registered; no room       held, holding, delayed, proc
                                              and running
    expire    pending -> failed               worker, records  registered; expired       record, proc, failed
    complete  processing -> completed         worker, records  registered; same attempt  record, proc, completed
    fail      processing -> pending, failed*  worker, records  registered; same attempt  record, proc, delayed/failed
    release   processing -> pending, failed*  worker, records  registered; same attempt  record, proc, head of
                                                                                         list or delayed
    progress  processing -> processing        worker, record   registered; same attempt  record
    log       processing -> processing        worker, record   registered; same attempt  record: logged, log
    deliver   nothing -> pending              -                callbackUrl               record, list
    advance   pending -> pending, failed      parent, records  waits for that parent     waitingFor, list, advance
    revive    failed -> pending               parent, records  failed because of that    record, its index, delayed
    cancel    pending -> cancelled            record           -                         record, delayed, cancelled
    request   processing -> processing        record           handler takes a Job       record: cancelRequested
    retry     failed, cancelled -> pending    record, unique   uniqueKey free            record, its index, list
    hasten    pending -> pending              record           delayed                   record, delayed, head of
                                                                                         list
    promote   (delayed to list)               records          runAt has come            delayed, list
    wake      (held to list)                  held, if few     an attempt has ended      held, head of list
    look      (held to list)                  held, records,   room                      held, head of list, running,
                                              running                                    holding, delayed
    reap      processing -> pending, failed*  worker, lease,   lease gone; worker's own  worker, proc, record,
                                              proc, records                              head of list, running
    restore   (none to list)                  record           unended; in no list       delayed, or proc and workers
    load      nothing -> pending, failed*     records, unique  unused; queue paused      records, list/delayed,
                                              and paused                                 indexes, uniqueKeys

    * cancelled, if that was requested. Due: runAt has come, and the job has not expired. Expired:
    expiresAt has passed before the first start. Same attempt: worker, attempts, refunds and
    startedAt of the record are those that the worker holds. Worker's own: processing under that
    worker's name. Lease gone: missing, or seen unchanged for longer than a lease. Handler takes a
    Job: checked where the handler is known. Unused: no job has the id, and no unended one has the
    uniqueKey. Not paused, not quiet: the queue, and the worker that takes. Queue paused: the queues
    of all pending jobs that load stores. Delayed: runAt has not come, and the job waits for no
    other. A suspect is a job that two workers lost while they ran it along with others. It starts
    only alone.

    dequeue is take, then start, hold or expire. enqueue is written by submit, hold and expire by
    start, and request by cancel. Whatever ends a job writes deliver too, except load: it enqueues a
    job of type webhook, which sends the end to the callbackUrl. complete, fail and release are
    written by settle, many in one transaction. exchange is settle and dequeue in three round trips.
    A busy worker uses it instead of these two, except with shards. load stores the jobs of a
    backup; the ended ones count in no metric. Every verb that fills a list rings its bell, and
    every verb keeps the counts and the metrics. Whatever ends a job frees its uniqueKey and leaves
    a token for those who wait for it. Whatever ends an attempt leaves it in the record: an ended
    job keeps its last worker and times, and an attempt that another may follow goes to `history`.

    Schedules. A tick is a time at which the cron expression of a schedule matches. tick enqueues
    its job, at most once. If it fails, the schedule stays due. sync stores the schedules that code
    declares, and removes those that it no longer declares. Code is replaced once a newer release of
    it has synced. tinyqueue_schedule.py decides what tick and sync make of a schedule.

    Dependencies. A job with parents is among the delayed until its `waitingFor` is empty. enqueue
    enters it in next of each parent that has not completed, and marks the record of the parent as
    followed. Whoever ends or retries a followed job pushes a token onto advance in the same
    transaction. Then it calls advance and revive, which are one verb. That applies the status of
    the parent to its next, some jobs in each transaction. The last one removes the token, so all of
    them may be repeated. completed: the parent leaves each `waitingFor`. failed, cancelled: those
    that wait for it fail with DependencyFailed, or it leaves their `waitingFor` if they have
    onFailure "run". Not ended: those that failed because of it wait again. A parent that is gone
    has the status in the token. revive, retry and restore push tokens for what their job waits for.

    Limits. A handler may declare how many jobs of its type run at a time (max_running) and how many
    start in a period (rate), also for each value of a field of the payload (limit_by). The limit of
    a job is `type` or `type/<value>`. start holds a job if its limit has no room. It also holds a
    job if a held one is older, and wakes that one instead. A held job is pending, spends no attempt
    and takes no slot. Every end of an attempt writes running too, and wakes the oldest held job.
    Whatever drops the id of a limited job wakes the next one. wake watches the held jobs only if
    there are fewer than it must wake, or it would miss a job that is held meanwhile. Otherwise two
    workers may wake the same job and list its id twice, which is harmless (rule 1). look wakes jobs
    for which room came without an end: with time, by a raised limit, or after a lost wake-up. The
    time of the next look is among the delayed ids, where promote finds it. RateLimited halts a
    limit: nothing starts under it for a while. The numbers are those of the code, unless
    `overrides` has others. tests/limit_model.py shows what each of these guards is for.

    Lost replies. adopt finds the ids in a worker's list that the worker does not know. After a lost
    reply, start neither starts nor drops an id: it may have done so already. Only one thread of a
    worker at a time takes, adopts and starts, or an id would be started twice. A worker that was
    reaped may wake up and take ids. take lists it as a worker again, so reap requeues them too.

    A quiet worker takes no ids and leaves the bells to others. It finishes the jobs that it has
    taken. Only a registered worker can become quiet, and reap removes its mark. So no mark outlives
    its worker.

    A slot is a thread of a worker that runs one job at a time (in a cluster: Redis' hash slot). To
    trim is to delete ended jobs that were kept long enough. A shard is one of several queues that
    are used as one. doctor is the command that checks Redis and the settings.

Keys. All share one hash tag, the namespace, and so one slot of a cluster.

    {queue}:job:<id>          string  the record: the job as JSON, without id and default values
    {queue}:jobs:<name>       list    ids that wait in queue <name>: enter left, leave right
    {queue}:proc:<worker>     list    ids that this worker holds
    {queue}:bell:<name>       list    wake-up tokens, at most 64; holds no work, may be lost
    {queue}:delayed           zset    id -> runAt; of a job that waits for others: expiresAt or inf;
                                      limit:<limit> -> time of the next look; advance: -> when to do so
    {queue}:next:<id>         set     ids of the jobs that wait for job <id>, or failed because of it.
                                      Expires once that has failed
    {queue}:log:<id>          list    lines that job <id> has logged, oldest first, at most 64 kB.
                                      Expires with the record
    {queue}:advance           list    tokens <id>:<status>:<any>: job <id> has ended or was revived,
                                      and its dependents may not know yet
    {queue}:advancer          string  a lock that saves two advancers the same work. Expires
    {queue}:completed         zset    id -> endedAt; likewise {queue}:failed and {queue}:cancelled
    {queue}:workers           set     every worker that may hold a job
    {queue}:worker:<worker>   string  its registration: the fence. Never expires
    {queue}:lease:<worker>    string  its last heartbeat and the jobs that it runs. Expires
    {queue}:once:<hash>       string  an Idempotency-Key, by its SHA-256: request fingerprint and
                                      job ids. Expires. Without ids: another shard has them
    {queue}:unique:<key>      string  id of the pending or processing job with this uniqueKey
    {queue}:paused            set     names of the paused queues, and @<worker> of quiet workers
    {queue}:schedule:<name>   string  a schedule as JSON: when to enqueue what, and its last tick
    {queue}:ticks             zset    name of a schedule -> its next tick, +inf while it is paused
    {queue}:generation:<code> string  the releases of the code that synced schedules, newest first
    {queue}:running:<limit>   set     ids of the processing jobs that count against the limit
    {queue}:held:<limit>      zset    <queue>:<id> of pending jobs that wait for room -> createdAt
    {queue}:holding           set     limits that may have held jobs
    {queue}:pace:<limit>      zset    <id>:<start> of the starts in the last period. Expires
    {queue}:halt:<limit>      string  until when RateLimited halts the limit. Expires
    {queue}:overrides         hash    type or limit -> what replaces the numbers in the code
    {queue}:minute:<n>        hash    what happened in minute n since 1970: started, waitedMs, completed,
                                      failed, cancelled, retried; completed:<type> and
                                      error:<type>:<error>, the attempts by how they ended (each
                                      process names up to 1,000 errors; others: other);
                                      refused:<reason>, submits; requeued and lost:<worker>, by reap;
                                      failedTick:<schedule>:<error>; ready, the jobs in lists when a
                                      verdict looked. Expires after two hours
    {queue}:rate:<who>:<n>    string  requests of a client in rate window n. Expires
    {queue}:awaited           set     ids of the jobs whose end a caller waits for
    {queue}:done:<id>         list    a token that wakes those callers. A web process has an <id> of
                                      its own, to be woken for more jobs. Expires after a minute
    {queue}:counts            hash    pending:<name> and processing:<name> now;
                                      retrying: pending ones after a failed attempt;
                                      completed, failed and cancelled ever
    {queue}:promoter          string  a lock that saves two promoters the same work. Expires
    {queue}:repairer          string  a lock that saves workers the same repair. Expires
    {queue}:snapshots         list    the times in metrics by type as they were, newest first: up to 5
    {queue}:snapshotter       string  a lock until the next snapshot. Expires after 15 minutes
    {queue}:mark              string  a write that only WAIT needs. Expires after a second
    {queue}:audit             list    the last 1,000 actions of operators as JSON, newest first
    {queue}:metrics           hash    events so far: <event>:<type>:<queue>, times with :<bucket>
    {queue}:trouble           hash    <check>:<subject> -> since when a verdict has found that problem
    {queue}:series            set     up to 1,000 <type>:<queue> of metrics; others: other:other

Three rules carry everything
    1. The record decides, lists are hints. A list may hold an id twice, or the id of a job that was
       cancelled, has ended or is gone. Whoever takes such an id drops it. So promote and reap may
       repeat themselves, and a cancel takes the same time however long the queue is.
    2. What a worker writes to a record is fenced: it watches its registration, and writes only if
       that still exists. reap deletes the registration in the transaction that requeues the jobs.
       So a worker that wakes up after it was reaped can no longer write.
    3. Waiting never holds work. An idle worker blocks on the bell, never on a list of jobs, so a
       lost reply loses no job.

tinyqueue_job.py says what a job is: errors, record, filters, outcomes. tinyqueue_handler.py says
what a type is: handlers, their limits, checks of input. Here come first the bounds, the keys and
transactions, and the verbs that are made of other verbs. Then the verbs of the queue follow the
life of a job, up to upkeep. Reading, loading and metrics come last. What only reports, such as
listings and counts, is in tinyqueue_reading.py, a base of Queue.
`grep '# [A-Z].* ---' tinyqueue.py` prints the table of contents.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
import re
import socket
import threading
import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal, TypeVar

import msgspec
import redis

from tinyqueue_handler import (
    BUILT_IN as BUILT_IN,
    HANDLERS as HANDLERS,
    LIMIT as LIMIT,
    Discard as Discard,
    Handler as Handler,
    Override as Override,
    RateLimited as RateLimited,
    Retry as Retry,
    Rule,
    TimedOut as TimedOut,
    backoff as backoff,
    check_limit as check_limit,
    check_name as check_name,
    check_parents,
    delivery_of,
    handler as handler,
    is_delay as is_delay,
    limit_of as limit_of,
    make_job as make_job,
    outer_parents,
    read_override as read_override,
    rule_of,
    set_parents,
    stored_override,
)
from tinyqueue_job import (
    CURSOR as CURSOR,
    ENDED as ENDED,
    ID as ID,
    KEY_LENGTH as KEY_LENGTH,
    KEY_REUSED as KEY_REUSED,
    MAX_AFTER as MAX_AFTER,
    MAX_ATTEMPTS as MAX_ATTEMPTS,
    MAX_DELAY as MAX_DELAY,
    MAX_TAGS as MAX_TAGS,
    NAME as NAME,
    PRINTABLE as PRINTABLE,
    STATUSES as STATUSES,
    UNENDED as UNENDED,
    Corrupted as Corrupted,
    Failure as Failure,
    Filter as Filter,
    InvalidJob as InvalidJob,
    Job as Job,
    KeyReused as KeyReused,
    Loaded as Loaded,
    Made as Made,
    NotReplicated as NotReplicated,
    Once as Once,
    Outcome as Outcome,
    Page as Page,
    PastAttempt as PastAttempt,
    QueueFull as QueueFull,
    Reaped as Reaped,
    SettingsError as SettingsError,
    Status as Status,
    TinyQueueError as TinyQueueError,
    Unavailable as Unavailable,
    UnknownType as UnknownType,
    WrongStatus as WrongStatus,
    attempt_in,
    ids_in as ids_in,
    note_record,
    read_job,
    read_made,
    record_of,
    stopped,
    stored_job as stored_job,
    translated,
)
from tinyqueue_json import encode
from tinyqueue_log import LogLine, read_lines
from tinyqueue_reading import (
    BUCKETS as BUCKETS,
    PAGE_BYTES as PAGE_BYTES,
    PAUSE_AGE as PAUSE_AGE,
    QUIET_MARK,
    SAMPLED as SAMPLED,
    SCANNED as SCANNED,
    Reading,
    Times as Times,
    checked,
    queues_in,
    read_count as read_count,
    read_workers as read_workers,
    times_by_type,
)
from tinyqueue_redis import (
    Clock,
    Command,
    Connections,
    Pool,
    ask,
    connect,
    pairs,
    read_replies,
    read_reply,
    send,
    text_of,
)
from tinyqueue_schedule import (
    NOTHING as NO_CHANGE,
    Change,
    Merge,
    Schedule as Schedule,
    fingerprint,
    merge,
    read_generation,
    read_schedule,
    schedule as schedule,
)

__version__ = "0.1.0"
# Makes worker.py and wsgi.py beside this file importable as tinyqueue.worker and tinyqueue.wsgi,
# even if there are other modules named worker and wsgi.
__path__ = [os.path.dirname(os.path.abspath(__file__))]

log = logging.getLogger("tinyqueue")


# Bounds: a part of the contract, not tunables -------------------------------------------------------------------------

MAX_JOBS = 1000  # jobs of one batch, which take some milliseconds of Redis' only thread
MAX_QUEUES = 10_000  # queues with jobs: each adds a row to every report
KEPT_QUEUES = 100  # queues, above which those without jobs are forgotten
MAX_RESULT = 262144  # bytes of a result's JSON
SUSPICIOUS = 2  # after this many lost workers that ran a job along with others, the job runs alone
# Attempts that release refunds. Without a limit, a job longer than every shutdown timeout would
# never end.
MAX_REFUNDS = 10
MEMORY_SHARE = 0.95  # of maxmemory, above which submits are refused so that stored jobs can end
KEPT = 100_000  # ended jobs that are kept, of each status
BELLS = 64  # wake-up tokens of a queue
WORKER_ID = 43  # characters of a generated worker id
PROMOTED = 500  # jobs moved by one promote
TRIES = 50  # of a transaction whose watched keys keep changing
WRITERS = 3  # handlers of a worker that write progress at the same time; the others wait
BLOCK = 2.0  # seconds of one wait for the bell
CATCH_UP = 1000  # milliseconds that replicas have to receive a write
LEAVE = 5  # tries of a start after which it leaves its limited jobs to adoption: many start under their limits
LOOK = 30_000  # milliseconds between two looks at a limit with held jobs, unless a rate has room before
LOOK_GAP = 20  # milliseconds between two looks, at least
AHEAD = 100  # held jobs, or jobs at the head of a queue, that one look reads
SHOWN = 1000  # limits of one report
MESSAGE = 200  # characters of an error message that a group of failures shows
ACTIONS = 1000  # actions of operators that are kept
ONE_ACTION = 60_000  # milliseconds between two steps of a bulk change that count as one action
LOOK_MARK = "limit:"  # with a limit, what stands among the delayed ids until the next look at that limit
SWEEP_MARK = "advance:"  # stands among the delayed ids, to have promote look for tokens that are left
SWEEP_AFTER = 1000  # milliseconds
TOKENS = 1000  # of advance that are read at a time
ADVANCED = 100  # waiting jobs that one transaction of advance changes
FATES = {"failed": "has failed", "cancelled": "was cancelled"}  # of a parent, in an error
SERIES = 1000  # pairs of type and queue in the metrics: each adds some thirty lines to a scrape
MINUTE_KEPT = 7200  # seconds that the counts of a minute are kept
SNAPSHOTS = 5  # snapshots of the times in the metrics that are kept
SNAPSHOT_EVERY = 900  # seconds between two snapshots


# Keys -----------------------------------------------------------------------------------------------------------------


class Keys:
    """The names of all keys, spelled here and nowhere else."""

    def __init__(self, namespace: str) -> None:
        self.prefix = prefix = "{" + namespace + "}:"
        self.delayed = prefix + "delayed"
        self.workers = prefix + "workers"
        self.paused = prefix + "paused"
        self.awaited = prefix + "awaited"
        self.counts = prefix + "counts"
        self.metrics = prefix + "metrics"
        self.series = prefix + "series"
        self.ticks = prefix + "ticks"
        self.promoter = prefix + "promoter"
        self.repairer = prefix + "repairer"
        self.snapshots = prefix + "snapshots"
        self.snapshotter = prefix + "snapshotter"
        self.advance = prefix + "advance"
        self.advancer = prefix + "advancer"
        self.mark = prefix + "mark"
        self.trouble = prefix + "trouble"
        self.holding = prefix + "holding"
        self.overrides = prefix + "overrides"
        self.audit = prefix + "audit"
        self.ended: dict[str, str] = {status: prefix + status for status in ENDED}

        def each(kind: str) -> Callable[[str], str]:
            return f"{prefix}{kind}:".__add__  # faster than a lambda, and every job needs several

        self.job = each("job")
        self.done = each("done")
        self.unique = each("unique")
        self.jobs = each("jobs")
        self.bell = each("bell")
        self.worker = each("worker")
        self.lease = each("lease")
        self.proc = each("proc")
        self.next = each("next")
        self.log = each("log")
        self.once_hash = each("once")
        self.schedule = each("schedule")
        self.generation = each("generation")
        self.running = each("running")
        self.held = each("held")
        self.pace = each("pace")
        self.halt = each("halt")
        self._minute = each("minute")
        self._rate = each("rate")

    def once(self, key: str) -> str:
        return self.once_hash(hashlib.sha256(key.encode()).hexdigest())

    def minute(self, now: int) -> str:
        return self._minute(str(now // 60_000))

    def rate(self, who: str, window: int) -> str:
        return self._rate(f"{who}:{window}")


# Transactions ---------------------------------------------------------------------------------------------------------

R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")
Records = dict[str, bytes | None]  # by id
Push = Literal["LPUSH", "RPUSH"]  # behind all other jobs of a queue, or before them


class Transaction:
    """One try of a transition. WATCH and reads take one round trip, MULTI, writes and EXEC another.

    `gather`, `ring` and `count` merge what many jobs do to one key into one command.
    """

    def __init__(self, connection: Any, keys: Keys, clock: Clock, watch: Sequence[str], again: bool) -> None:
        self._connection = connection
        self._keys = keys
        self._clock = clock
        self._watch = watch
        self._watching = False
        self.now = clock.now()
        self.again = again  # an earlier try lost the reply to EXEC, and may have been applied
        self.tries = 0  # earlier tries during which a watched key changed
        self.left: set[bytes] = set()  # ids that no longer count against their limits
        self.wakes: dict[str, int] = {}  # by limit, how many held jobs to wake
        self.replicas = 0  # how many must receive the writes
        self.advances = False  # whether it pushes onto advance
        self.awaited: set[bytes] | None = None  # the ids that callers wait for; None until read
        self.measured: defaultdict[tuple[str, str, str], list[int]] = defaultdict(list)
        self._writes: list[Command] = []
        self._gathered: dict[tuple[str, str], list[Any]] = {}
        # Not Counter, which takes a microsecond to make.
        self._bells: defaultdict[str, int] = defaultdict(int)
        self._counts: defaultdict[str, int] = defaultdict(int)
        self.minute: defaultdict[str, int] = defaultdict(int)
        self.errors: defaultdict[tuple[str, str, str], int] = defaultdict(int)

    def read(self, *commands: Command, before: Sequence[Command] = ()) -> list[Any]:
        """Send commands and return their replies. The first call also sends WATCH.

        `before` is a transaction of its own. Its EXEC clears all watches, so it is sent before
        WATCH. Earlier watches are removed, because a change of their keys would abort it. Its reply
        comes last.
        """
        ahead = [("UNWATCH",), *before] if before and self._watching else list(before)
        applied_at = len(ahead) - 1
        if self._watch and (before or not self._watching):
            ahead.append(("WATCH", *self._watch))
            self._watching = True
        stale = self._clock.stale
        # TIME comes last, because one of the commands may block.
        replies = ask(self._connection, [*ahead, *commands, *([("TIME",)] if stale else [])])
        if stale:
            self._clock.read(replies.pop())
            self.now = self._clock.now()
        applied = [replies[applied_at]] if before else []
        return replies[len(ahead) :] + applied

    def read_jobs(self, ids: Sequence[str], watch: bool = False) -> dict[str, Job]:
        """Read the jobs that exist, by id. With `watch`, watches the records of all."""
        keys = list(map(self._keys.job, ids))
        records = self.read(*([("WATCH", *keys)] if watch else []), ("MGET", *keys))[-1] if keys else []
        return {id: read_job(id, record) for id, record in zip(ids, records, strict=True) if record is not None}

    def read_watched(self, keys: Sequence[str], work: Callable[[], R]) -> tuple[R, list[Any]]:
        """Watch more keys and read them. While Redis answers, do some work, which must not read.

        Returns the result of the work, and the values.
        """
        if not keys:
            return work(), []
        send(self._connection, [("WATCH", *keys), ("MGET", *keys)])
        try:
            done = work()
        finally:
            values = read_replies(self._connection, 2)[1]
        return done, values

    def unwatch(self) -> None:
        if self._watching:
            ask(self._connection, [("UNWATCH",)])

    def execute(self, writes: Sequence[Command]) -> tuple[list[Any] | None, int]:
        """Apply writes and wait for replicas.

        Return the replies (None if a watched key changed) and the number of replicas reached. If
        Redis refuses WAIT, that number is 0: the writes are applied, but no replica is known to
        have them.
        """
        waits = [("WAIT", self.replicas, CATCH_UP)] if self.replicas else []
        send(self._connection, [("MULTI",), *writes, ("EXEC",), *waits])
        done = read_replies(self._connection, len(writes) + 2)[-1]
        reached = read_reply(self._connection) if waits else 0
        return done, reached if isinstance(reached, int) else 0

    def write(self, *command: Any) -> None:
        self._writes.append(command)

    def gather(self, command: str, key: str, *parts: Any) -> None:
        """Add arguments to the one command of that name and key, such as LPUSH or ZADD."""
        self._gathered.setdefault((command, key), []).extend(parts)

    def push(self, command: Push, job: Job) -> None:
        """Put a job into the list of its queue, and ring the bell."""
        self.gather(command, self._keys.jobs(job.queue), job.id)
        self.ring(job.queue)

    def push_token(self, id: str, status: str = "") -> None:
        """Have `advance` look at the dependents of a job. No two tokens are equal."""
        self.gather("RPUSH", self._keys.advance, f"{id}:{status}:{os.urandom(4).hex()}")
        self.gather("ZADD", self._keys.delayed, self.now + SWEEP_AFTER, SWEEP_MARK)
        self.advances = True

    def ring(self, queue: str) -> None:
        self._bells[queue] += 1

    def count(self, field: str, by: int = 1) -> None:
        self._counts[field] += by

    def count_pending(self, job: Job, by: int = 1) -> None:
        """Count a job that became pending. With `by` -1: one that stops being pending."""
        self.count("pending:" + job.queue, by)
        if job.retrying:
            self.count("retrying", by)

    def count_start(self, job: Job, waited: int) -> None:
        """Count a start, in this minute and in the metrics. `waited` is in milliseconds."""
        self.minute["started"] += 1
        self.minute["waitedMs"] += waited
        self.measure("waited", job, waited)

    def count_end(self, job: Job) -> None:
        """Count an end, in the totals, in this minute and in the metrics."""
        self._counts[job.status] += 1
        self.minute[job.status] += 1
        self.measure(job.status, job)

    def count_retry(self, job: Job) -> None:
        """Count a failed attempt that is retried, in this minute and in the metrics."""
        self.minute["retried"] += 1
        self.measure("retried", job)

    def count_error(self, job: Job) -> None:
        """Count a failed attempt in this minute, by its type and error."""
        self.errors[job.type, job.queue, job.error.type if job.error else ""] += 1

    def measure(self, event: str, job: Job, ms: int = -1) -> None:
        """Count an event in the metrics, and the time that it took unless that is -1."""
        self.measured[event, job.type, job.queue].append(ms)

    def commands(self) -> list[Command]:
        """Return all commands to write, except those of the metrics."""
        commands = self._writes + [(*name, *parts) for name, parts in self._gathered.items()]
        for queue, times in self._bells.items():
            bell = self._keys.bell(queue)
            commands += [("LPUSH", bell, *["1"] * min(times, BELLS)), ("LTRIM", bell, 0, BELLS - 1)]
        commands += [("HINCRBY", self._keys.counts, field, by) for field, by in self._counts.items() if by]
        if self.minute:
            minute = self._keys.minute(self.now)
            commands += [("HINCRBY", minute, field, by) for field, by in self.minute.items() if by]
            commands.append(("EXPIRE", minute, MINUTE_KEPT))
        return commands


class Store:
    """The Redis of one queue: connections, keys, clock, the transaction loop and the metrics."""

    def __init__(self, pool: Any, namespace: str) -> None:
        self.connections = Connections(pool, harmless=TinyQueueError, translate=translated)
        self.lend = self.connections.lend
        self.memory = self.connections.memory
        self.keys = Keys(namespace)
        self.clock = Clock()
        self.series: frozenset[str] = frozenset()  # the <type>:<queue> that have their own metrics
        self.errors: set[str] = set()  # the types of errors that this process counts by name
        self.series_known = False  # whether these were read and no others have been met since
        self.advance: Callable[[], Any] = int  # called after a transaction that pushed a token

    def read(self, *commands: Command) -> list[Any]:
        """Send commands and return their replies. Despite its name it may write.

        Each command is carried out by itself, unless they include MULTI and EXEC.
        """
        return self.transact((), lambda tx: tx.read(*commands), counts=False)

    # The transaction loop. Skip it on a first reading. A body reads, then writes, and is repeated
    # until no watched key has changed.
    def transact(
        self, watch: Sequence[str], body: Callable[[Transaction], R], again: bool = False, counts: bool = True
    ) -> R:
        """Call `body` until its writes are applied with no watched key changed. Return its result.

        A body that writes nothing ends the loop. When the reply to EXEC is lost, the body is called
        again with `tx.again` set. It must check whether its writes were applied, and must not
        repeat them if so. After a time-out the first EXEC may still arrive. Only a watch makes a
        second EXEC safe then, so without a watch this raises Unavailable.
        """
        if counts and not self.series_known:
            _learn_series(self)
        late = False
        advances = False
        for tries in range(TRIES):
            sent = False
            try:
                with self.lend() as connection:
                    tx = Transaction(connection, self.keys, self.clock, watch, again)
                    tx.tries = tries
                    result, writes = self._run(tx, body)
                    advances = advances or tx.advances
                    if not writes and not tx.replicas:
                        tx.unwatch()
                        break
                    if late and writes and not watch:
                        detail = "no reply to the write; it was not applied when checked, but may still be"
                        raise Unavailable("timeout", detail, doubtful=True)
                    sent = True
                    done = self._execute(connection, tx, writes, result)
            except Unavailable as trouble:
                moved = isinstance(trouble.__cause__, redis.exceptions.MovedError)
                if moved and isinstance(self.connections.pool, Pool):
                    continue  # nothing was applied, and the pool now leads to the slot's new owner
                refused = isinstance(trouble.__cause__, redis.ResponseError)
                if not sent or refused or trouble.reason not in ("timeout", "unreachable"):
                    trouble.doubtful = again
                    raise
                again = True
                late = late or trouble.reason == "timeout"
                continue
            if done is not None:
                checked(done)
                break
        else:
            raise Unavailable("busy", f"gave up after {TRIES} tries: too much contention on these keys", doubtful=again)
        if advances:
            with suppress(TinyQueueError):  # the tokens stay for the next call
                self.advance()
        return result

    def _run(self, tx: Transaction, body: Callable[[Transaction], R]) -> tuple[R, list[Command]]:
        try:
            result = body(tx)
            return result, _metric_commands(self, tx) + tx.commands()
        except TinyQueueError:
            tx.unwatch()
            raise

    def _execute(self, connection: Any, tx: Transaction, writes: list[Command], result: Any) -> list[Any] | None:
        mark = ("SET", self.keys.mark, "", "PX", 1000)  # WAIT needs a write on its own connection
        done, reached = tx.execute(writes or [mark])
        if done is not None and reached < tx.replicas:
            connection.disconnect()  # a new connection finds the new master, if there is one
            raise NotReplicated(result, reached, tx.replicas)
        return done


# Limits ---------------------------------------------------------------------------------------------------------------

# The contract explains limits. Most methods add to the transaction of a verb.


class Room:
    """What a limit allows at one moment: `left` more jobs may start."""

    def __init__(self, limit: str, rule: Rule, running: Collection[bytes] = ()) -> None:
        self.limit = limit
        self.rule = rule
        self.running = running
        self.left = rule.max_running - len(running)
        self.held: list[str] = []  # the first entries, oldest first, except those of paused queues
        self.opens = math.inf  # when the rate has room again or the halt ends, if that is why there is none
        self.admitted: set[str] = set()  # the ids that may start
        self.closed = False  # True: the limit is paused or halted
        self.busy = False  # True: too many workers start under it at the moment; adoption gets its jobs
        self.noted = False  # True: this transaction has noted that the limit holds jobs


class Limits:
    """The limits of one queue. `paused` returns the names of the paused queues, as last noted."""

    def __init__(
        self, keys: Keys, store: Store, paused: Callable[[], Collection[str]], note_paused: Callable[[Any], None]
    ) -> None:
        self.keys = keys
        self.store = store
        self.paused = paused
        self.note_paused = note_paused
        self.looks: dict[str, int] = {}  # when to look at a limit next, as far as this process knows
        self.own: list[str] = []  # what this process must look at itself, once

    def next_look(self) -> float:
        """When a rate next has room for a held job, as far as this process knows, in ms."""
        return min(tuple(self.looks.values()), default=math.inf)

    def note_looks(self, now: int) -> None:
        """Forget the times that have come, because somebody looks now."""
        for limit in [limit for limit, at in tuple(self.looks.items()) if at <= now]:
            self.looks.pop(limit, None)

    # Start ------------------------------------------------------------------------------------------------------------

    def rooms(self, tx: Transaction, jobs: Iterable[Job]) -> dict[str, Room]:
        """Return the rooms of pending jobs with limits, by job id. Leaves out jobs not due yet.

        Watches the sets of running ids. The oldest jobs get the room first, and those among them
        that are held are woken.
        """
        found: dict[str, list[Job]] = {}
        for job in jobs:
            if job.due <= tx.now and not job.has_expired(tx.now):
                found.setdefault(limit_of(job), []).append(job)
        if not found or tx.again:
            return {}
        if tx.tries < LEAVE:
            rooms = self.read_rooms(tx, sorted(found))
        else:
            rooms = {limit: Room(limit, Rule()) for limit in found}
        for limit, room in rooms.items():
            room.busy = tx.tries >= LEAVE
            if not room.busy:
                self._admit(tx, room, {job.id for job in found[limit]})
        return {job.id: rooms[limit] for limit, jobs in found.items() for job in jobs}

    def _admit(self, tx: Transaction, room: Room, taken: set[str]) -> None:
        held = {_id_in(entry): entry for entry in room.held}
        oldest = _first(sorted(held.keys() | taken), room.left)
        newest = max(taken)
        first = [id for id in oldest if id <= newest]
        owed = tx.wakes.pop(room.limit, 0) - len(first)
        more = _first([id for id in oldest if id > newest], owed)
        if owed - len(more) > 0 and len(first) + len(more) < room.left:
            tx.wakes[room.limit] = owed - len(more)
        room.admitted = taken.intersection(first)
        # Without an end, none younger than all these is woken: it would overtake others.
        self._move(tx, room.limit, [held[id] for id in (*first, *more) if id not in taken])

    def read_rooms(self, tx: Transaction, limits: Sequence[str]) -> dict[str, Room]:
        """Read the rooms of limits. Watches the sets of running ids, which every start changes."""
        reads: list[Command] = []
        for limit in limits:
            held = ("ZRANGE", self.keys.held(limit), 0, AHEAD - 1)
            reads += [("SMEMBERS", self.keys.running(limit)), ("GET", self.keys.halt(limit)), held]
        watch = ("WATCH", *map(self.keys.running, limits))
        _, overrides, *found = tx.read(watch, self.overrides_of(limits), *reads)
        rooms: dict[str, Room] = {}
        for at, limit in enumerate(limits):
            running, halt, held = found[3 * at : 3 * at + 3]
            room = rooms[limit] = Room(limit, rule_of(limit, overrides[2 * at : 2 * at + 2]), set(running) - tx.left)
            room.held = self._awake(held)
            halted = _end_of_halt(halt)
            room.closed = room.rule.paused or halted > tx.now
            if room.closed:
                room.left = 0
                room.opens = math.inf if room.rule.paused else halted
        self._read_pace(tx, [room for room in rooms.values() if room.rule.starts and not room.closed])
        return rooms

    def overrides_of(self, limits: Sequence[str]) -> Command:
        """Return the command that reads the overrides: of each limit its type's, and its own."""
        return ("HMGET", self.keys.overrides, *(name for limit in limits for name in (limit.partition("/")[0], limit)))

    def _awake(self, entries: Iterable[bytes]) -> list[str]:
        paused = self.paused()
        return [text for text in map(text_of, entries) if text.partition(":")[0] not in paused]

    def _read_pace(self, tx: Transaction, rooms: Sequence[Room]) -> None:
        """Count the starts in the last period of each rate."""
        reads: list[Command] = []
        for room in rooms:
            # A start that seems to be further ahead was written before the clock was set back.
            window = self.keys.pace(room.limit), f"({tx.now - room.rule.period}", tx.now + room.rule.period
            reads += [("ZCOUNT", *window), ("ZRANGEBYSCORE", *window, "WITHSCORES", "LIMIT", 0, 1)]
        found = tx.read(*reads) if reads else []
        for room, count, oldest in zip(rooms, found[::2], found[1::2], strict=True):
            if room.rule.starts - count <= room.left:
                room.left = room.rule.starts - count
                room.opens = int(float(oldest[1]) if oldest else tx.now) + room.rule.period

    def enter(self, tx: Transaction, job: Job, room: Room) -> bool:
        """Count a job that starts under its limit, or hold it and return False."""
        limit = room.limit
        if job.id not in room.admitted:
            self._hold(tx, job, room)
            return False
        job.limit = limit
        tx.gather("SADD", self.keys.running(limit), job.id)
        if (entry := _entry_of(job)) in room.held:
            tx.gather("ZREM", self.keys.held(limit), entry)
        if period := room.rule.period:
            # Twice the period, because the clock of another worker may be behind.
            tx.write("ZREMRANGEBYSCORE", self.keys.pace(limit), "-inf", tx.now - 2 * period)
            tx.write("ZADD", self.keys.pace(limit), tx.now, f"{job.id}:{tx.now}")
            tx.write("PEXPIRE", self.keys.pace(limit), 2 * period)
        return True

    def _hold(self, tx: Transaction, job: Job, room: Room) -> None:
        if job.limit != room.limit:
            job.limit = room.limit
            tx.write("SET", self.keys.job(job.id), record_of(job))
        tx.gather("ZADD", self.keys.held(room.limit), job.created_at, _entry_of(job))
        if not room.noted:
            room.noted = True
            tx.write("SADD", self.keys.holding, room.limit)
            self._look_later(tx, room)

    def _look_later(self, tx: Transaction, room: Room) -> None:
        """Set the time of the next look. An earlier time stays, unless the rate has room before."""
        latest = tx.now + LOOK
        if room.opens < latest:
            at = max(int(room.opens), tx.now + LOOK_GAP)
            tx.write("ZADD", self.keys.delayed, at, LOOK_MARK + room.limit)
            self.looks[room.limit] = at
        else:
            tx.write("ZADD", self.keys.delayed, "NX", latest, LOOK_MARK + room.limit)

    # End --------------------------------------------------------------------------------------------------------------

    def leave(self, tx: Transaction, job: Job) -> None:
        """Stop counting a job whose attempt ends, and let the next one start."""
        tx.gather("SREM", self.keys.running(job.limit), job.id)
        tx.left.add(job.id.encode())
        self.owe(tx, job.limit)

    def owe(self, tx: Transaction, limit: str) -> None:
        """Note that the transaction must wake a held job, unless the limit is only a rate."""
        known = HANDLERS.get(limit.partition("/")[0])
        if not known or known.max_running:
            tx.wakes[limit] = tx.wakes.get(limit, 0) + 1

    def halt(self, tx: Transaction, job: Job, ms: int) -> None:
        """Hold the job of a handler that raised RateLimited, and let none start under its limit."""
        tx.write("SET", self.keys.halt(job.limit), tx.now + ms, "PX", ms)
        tx.wakes.pop(job.limit, None)
        room = Room(job.limit, Rule())
        room.opens = tx.now + ms
        self._hold(tx, job, room)

    def wake(self, tx: Transaction) -> None:
        """Move the oldest held jobs to the heads of their queues, as many as are owed.

        Watches the held jobs only if there are too few. Otherwise a job that is held before this is
        written would wait although it has room. If there are enough, two workers may wake the same
        job and list its id twice. Whoever takes the second drops it, and that wakes the next job.
        """
        few: list[str] = []
        for limit, entries in self._read_held(tx, tx.wakes):
            awake = self._awake(entries)[: tx.wakes[limit]]
            if len(awake) < tx.wakes[limit]:
                few.append(limit)
            else:
                self._move(tx, limit, awake)
        if few:
            tx.read(("WATCH", *map(self.keys.held, few)))
        for limit, entries in self._read_held(tx, few):
            self._move(tx, limit, self._awake(entries)[: tx.wakes[limit]])

    def _read_held(self, tx: Transaction, limits: Collection[str]) -> Iterable[tuple[str, list[bytes]]]:
        reads = [("ZRANGE", self.keys.held(limit), 0, AHEAD - 1) for limit in limits]
        return zip(limits, tx.read(*reads), strict=True) if reads else ()

    def _move(self, tx: Transaction, limit: str, entries: Sequence[str]) -> None:
        for entry in reversed(entries):
            queue, _, id = entry.partition(":")
            tx.gather("ZREM", self.keys.held(limit), entry)
            tx.gather("RPUSH", self.keys.jobs(queue), id)
            tx.ring(queue)

    def forget(self, tx: Transaction, job: Job) -> None:
        """Remove a pending job from the held ones, because it is cancelled."""
        tx.write("ZREM", self.keys.held(job.limit), _entry_of(job))

    # Look -------------------------------------------------------------------------------------------------------------

    def reconcile(self, limits: Sequence[str], now: int) -> None:
        """Look at limits whose time has come: drop what does not run, and wake what has room.

        If several workers look at the same moment, only one goes on. The others find that the time
        of the next look is already set. If nothing has changed, a look takes five commands.
        """
        later = now // 1000 * 1000 + LOOK
        turns = [("ZADD", self.keys.delayed, "XX", "CH", later, LOOK_MARK + limit) for limit in limits]
        *found, paused = self.store.read(*turns, ("SMEMBERS", self.keys.paused))
        self.note_paused(paused)  # a busy worker may have read it long ago
        mine = [limit for limit, changed in zip(limits, found, strict=True) if changed]
        mine += [limit for limit in self.own if limit not in mine]
        self.own = []
        sets = [("SMEMBERS", self.keys.running(limit)) for limit in mine]
        overrides, *found = self.store.read(self.overrides_of(mine), *sets) if mine else [()]
        for at, (limit, running) in enumerate(zip(mine, found, strict=True)):
            full = len(running) >= rule_of(limit, overrides[2 * at : 2 * at + 2]).max_running
            if not full or not self._all_run(limit, running):
                self.store.transact([self.keys.held(limit)], partial(self.look, limit=limit))

    def review(self) -> None:
        """Have promote look at the limits of this process's types: its code may allow more now.

        Workers with the code before may look first, and set a later time. So this process looks at
        the first of its limits even then.
        """
        own = [limit for limit in self._holding() if limit.partition("/")[0] in HANDLERS]
        self.own = own[:AHEAD]
        self.hurry(own)

    def startable(self, due: Iterable[bytes]) -> list[str]:
        """Return up to AHEAD held jobs with room of each limit that is due, as entries."""
        marks = [text_of(entry) for entry in due if entry.startswith(LOOK_MARK.encode())]
        limits = [mark.removeprefix(LOOK_MARK) for mark in marks]
        # The watch is of no use here. With it, transact removes those of read_rooms too.
        watch = [self.keys.holding]
        rooms = self.store.transact(watch, lambda tx: self.read_rooms(tx, limits), counts=False) if limits else {}
        return [entry for room in rooms.values() for entry in _first(room.held, room.left)]

    def hurry(self, limits: Iterable[str] | None = None) -> None:
        """Have the next promote look at limits, or at all with held jobs."""
        if looks := self.looks_now(limits):
            self.store.read(*looks)

    def looks_now(self, limits: Iterable[str] | None = None) -> list[Command]:
        """Return the commands that make limits, or all with held jobs, due for a look."""
        marks = [LOOK_MARK + limit for limit in (self._holding() if limits is None else limits)]
        return [("ZADD", self.keys.delayed, "XX", *itertools.chain(*((0, mark) for mark in marks)))] if marks else []

    def _holding(self) -> list[str]:
        return sorted(map(text_of, self.store.read(("SMEMBERS", self.keys.holding))[0]))

    def _all_run(self, limit: str, running: Collection[bytes]) -> bool:
        ids = list(map(text_of, running))
        jobs = self.store.transact((), lambda tx: tx.read_jobs(ids), counts=False).values()
        return sum(job.status == "processing" and job.limit == limit for job in jobs) == len(ids)

    def look(self, tx: Transaction, limit: str) -> None:
        """Drop what does not run under a limit, and wake as many held jobs as there is room for.

        Watches the records of all that it moves or drops. The transaction watches the held jobs.
        """
        room = self.read_rooms(tx, [limit])[limit]
        running = tx.read_jobs(list(map(text_of, room.running)), watch=True)
        for id in map(text_of, room.running):
            if id not in running or running[id].status != "processing" or running[id].limit != limit:
                tx.gather("SREM", self.keys.running(limit), id)
                room.left += 0 if room.closed else 1
        held = room.held if room.left > 0 else []
        jobs = tx.read_jobs(list(map(_id_in, held)), watch=True)
        pending = [entry for entry in held if _id_in(entry) in jobs and jobs[_id_in(entry)].status == "pending"]
        for entry in held:
            if entry not in pending:
                tx.gather("ZREM", self.keys.held(limit), entry)
        if pending and room.left < math.inf:
            room.left -= self._count_ahead(tx, limit, pending)
        woken = _first(pending, room.left)
        self._move(tx, limit, woken)
        self._go_on(tx, room, len(held) - len(pending) + len(woken))

    def _go_on(self, tx: Transaction, room: Room, removed: int) -> None:
        """Set the time of the next look, if jobs are still held."""
        if tx.read(("ZCARD", self.keys.held(room.limit)))[0] > removed:
            if room.left > removed >= AHEAD:
                room.opens = tx.now
            self._look_later(tx, room)
        else:
            tx.write("SREM", self.keys.holding, room.limit)
            tx.write("ZREM", self.keys.delayed, LOOK_MARK + room.limit)

    def _count_ahead(self, tx: Transaction, limit: str, entries: Sequence[str]) -> int:
        """Count the woken jobs of a limit that nobody has taken yet."""
        queues = {entry.partition(":")[0] for entry in entries}
        heads = tx.read(*(("LRANGE", self.keys.jobs(queue), -AHEAD, -1) for queue in queues))
        jobs = tx.read_jobs(ids_in(itertools.chain(*heads)))
        held = set(map(_id_in, entries))
        return sum(job.status == "pending" and job.limit == limit and job.id not in held for job in jobs.values())

    # For operators ----------------------------------------------------------------------------------------------------

    def set(self, limit: str, override: Override) -> None:
        """Store an override, or delete it if it is empty. The next promote looks at the limits."""
        check_limit(limit)
        override.check()
        under = [name for name in self._holding() if limit in (name, name.partition("/")[0])]
        write: Command = ("HSET", self.keys.overrides, limit, encode(override))
        if override == Override():
            write = ("HDEL", self.keys.overrides, limit)
        self.store.read(write)
        self.hurry(under)

    def in_use(self) -> dict[str, dict[str, Any]]:
        """Return up to SHOWN limits, those with the most held jobs first.

        A type whose limits belong to the values of a field has a row too, with its numbers.
        """
        stored, holding = self.store.read(("HGETALL", self.keys.overrides), ("SMEMBERS", self.keys.holding))
        overrides = dict(pairs(stored))
        names = {type for type, handler in HANDLERS.items() if handler.limited} | overrides.keys()
        limits = sorted(names.union(filter(LIMIT.fullmatch, map(text_of, holding))))
        rows = {}
        for at in range(0, len(limits), AHEAD):
            some = limits[at : at + AHEAD]
            reads = [[("SCARD", self.keys.running(name)), ("ZCARD", self.keys.held(name))] for name in some]
            found = self.store.read(*itertools.chain(*reads), *(("PTTL", self.keys.halt(name)) for name in some))
            for n, name in enumerate(some):
                rule = rule_of(name, [overrides.get(name.partition("/")[0]), overrides.get(name)])
                halted = max(0, found[2 * len(some) + n])
                rows[name] = {"running": found[2 * n], "held": found[2 * n + 1], **rule.answer(), "haltedMs": halted}
                rows[name]["overridden"] = name in overrides
                rows[name]["override"] = msgspec.to_builtins(stored_override(overrides.get(name, b"{}")))
        return dict(sorted(rows.items(), key=lambda row: -row[1]["held"])[:SHOWN])

    def place_of(self, job: Job) -> int:
        """Return the position of a pending job among the held ones, from 1; 0: it is not held."""
        if job.status != "pending" or not job.limit:
            return 0
        rank = self.store.read(("ZRANK", self.keys.held(job.limit), _entry_of(job)))[0]
        return 0 if rank is None else int(rank) + 1


def _first(items: Sequence[str], count: float) -> Sequence[str]:
    return items[: int(max(0, min(count, len(items))))]


def _entry_of(job: Job) -> str:
    """Return what stands for a job among the held ones."""
    return f"{job.queue}:{job.id}"


def _end_of_halt(stored: bytes | None) -> float:
    """Return when a halt ends. Its key expires a moment later, after the look for that time."""
    return float(stored) if stored and stored.isdigit() else math.inf if stored else 0


def _id_in(entry: str) -> str:
    return entry.partition(":")[2]


# Verbs ----------------------------------------------------------------------------------------------------------------

Held = Mapping[str, Job] | None  # the jobs that a worker has started and not settled, by id


class Verbs(ABC):
    """The verbs that need nothing but other verbs. `parts` are the shards, or the queue itself."""

    parts: list[Queue]

    @abstractmethod
    def now(self) -> int: ...
    @abstractmethod
    def part_of(self, id: str) -> Queue: ...
    @abstractmethod
    def submit(self, jobs: Sequence[Job], once: Once | None = None) -> list[Job]: ...
    @abstractmethod
    def take(self, worker: str, names: Sequence[str], most: int) -> list[bytes]: ...
    @abstractmethod
    def adopt(self, worker: str, held: Collection[str]) -> list[bytes]: ...
    @abstractmethod
    def start(self, worker: str, ids: Sequence[bytes]) -> list[Job]: ...
    @abstractmethod
    def settle(self, worker: str, outcomes: Sequence[Outcome]) -> list[Outcome]: ...
    @abstractmethod
    def cancel(self, id: str) -> Job | None: ...
    @abstractmethod
    def retry(self, id: str) -> Job | None: ...
    @abstractmethod
    def get(self, id: str) -> Job | None: ...
    @abstractmethod
    def queues(self) -> dict[str, dict[str, Any]]: ...
    @abstractmethod
    def stats(self, minutes: int = 0) -> dict[str, Any]: ...
    @abstractmethod
    def page(self, filter: Filter, *, limit: int, cursor: str, cut: int | None) -> Page: ...
    @abstractmethod
    def forget(self, status: str, ids: Sequence[bytes], logged: Collection[bytes] = ()) -> int: ...

    @property
    def last_contact(self) -> float:
        """When Redis last carried out a command, in monotonic seconds. With shards: any of them."""
        return max(part.store.connections.last_contact for part in self.parts)

    @property
    def memory_use(self) -> float:
        """The share of maxmemory that Redis uses, or 0 without a limit; of shards the highest."""
        return max(part.store.connections.memory_use for part in self.parts)

    @property
    def last_trouble(self) -> float:
        """When Redis last failed to carry out a command."""
        return max(part.store.connections.last_trouble for part in self.parts)

    @property
    def seconds_to_look(self) -> float:
        """Seconds until a rate has room for a held job, as far as this process knows."""
        return min(part.limits.next_look() - part.clock.now() for part in self.parts) / 1000

    def is_quiet(self, worker: str) -> bool:
        """Whether a worker was quiet when this process last read the paused queues."""
        return any(QUIET_MARK + worker in part._paused[1] for part in self.parts)

    def disconnect(self) -> None:
        """Close all connections. Do this before a fork: each process must open its own."""
        for part in self.parts:
            part.store.connections.disconnect()

    def draft(self, type: str, payload: Any, **options: Any) -> Job:
        """Check and make a job without storing it. Options as for `make_job`."""
        return make_job(self.now(), type, payload, **options)

    def redraft(self, job: Job, **options: Any) -> Job:
        """Check and make a job that replays an ended one, without storing it. See `replay`."""
        if job.status in UNENDED:
            raise WrongStatus("replay", job, f"it is {job.status}; cancel it first, or it would run twice")
        draft = self.draft(job.type, **(job.again() | options))
        draft.replay_of = job.id
        draft.schedule = job.schedule
        draft.scheduled_for = job.scheduled_for
        return draft

    def replay(self, id: str, **options: Any) -> Job | None:
        """Submit an ended job again. Return the new job; None for an unknown id.

        The new job has the options that the old one was submitted with, except its times.
        `options` replaces some of them, for example the payload. The old job stays as it is. Raises
        WrongStatus if it has not ended, and otherwise the errors of `enqueue`: the payload may no
        longer fit the handler, and parents may be gone. If another job has the uniqueKey now,
        returns that job.
        """
        job = self.get(id)
        return self.submit([self.redraft(job, **options)])[0] if job else None

    def enqueue(self, type: str, payload: Any, **options: Any) -> Job:
        """Check and store one job. Options as for `make_job`, errors as for `submit`."""
        return self.submit([self.draft(type, payload, **options)])[0]

    def enqueue_many(self, type: str, payloads: Iterable[Any], **options: Any) -> list[Job]:
        """Check and store up to 1,000 jobs of one type, all or none."""
        return self.submit([self.draft(type, payload, **options) for payload in payloads])

    def dequeue(self, worker: str, names: Sequence[str], most: int = 1) -> list[Job]:
        """Take and start up to `most` jobs. Return an empty list if there are none."""
        ids = self.take(worker, names, most)
        jobs = self.start(worker, ids) if ids else []
        if left := {job.id.encode() for job in jobs if job.status == "pending" and not is_suspect(job)}:
            jobs += self.start(worker, [id for id in self.adopt(worker, ()) if id in left])
        return [job for job in jobs if job.status == "processing"]

    def complete(self, job: Job, result: Any = None) -> None:
        """Complete a started job with its result. Raises Reaped if its worker has lost it."""
        self._settle_one(Outcome(job, "complete", result=result))

    def fail(self, job: Job, error: Failure, after: float | None = None) -> None:
        """Fail an attempt. The next starts `after` seconds later, if any is left; None: never."""
        self._settle_one(Outcome(job, "fail", error=error, after=after))

    def release(self, job: Job) -> None:
        """Requeue a started job at the head of its queue. Refunds up to MAX_REFUNDS attempts."""
        self._settle_one(Outcome(job, "release"))

    def reap_in(self, parts: Sequence[Queue], worker: str) -> int:
        """Reap a worker in some of the shards. Returns how many of its jobs were requeued or ended.

        Jobs in different shards count as run beside each other. So does whatever it may have run in
        a shard that is away. The other shards are reaped even if one fails.
        """
        ran: dict[Queue, int] = {}
        for part in self.parts:
            with suppress(Unavailable):
                ran[part] = part.running(worker)
        beside = sum(ran.values()) + len(self.parts) - len(ran)
        return sum(try_each(parts, lambda part: part.reap(worker, beside - ran.get(part, 1))))

    def _settle_one(self, outcome: Outcome) -> None:
        if self.settle(outcome.job.worker, [outcome]):
            raise Reaped(f"job {outcome.job.id} is no longer with worker {outcome.job.worker}")

    def change_many(
        self, verb: Literal["cancel", "retry"], filter: Filter, cursor: str = "", most: int = SCANNED
    ) -> dict[str, Any]:
        """Look at up to 1,000 jobs and cancel or retry those that match, up to `most`.

        Continue with the returned cursor. Each job is changed in its own transaction. Those whose
        status changed meanwhile are counted as skipped.
        """
        jobs, cursor = self.page(filter, limit=most, cursor=cursor, cut=0)
        change = self.cancel if verb == "cancel" else self.retry
        done = 0
        for job in jobs:
            with suppress(WrongStatus):
                done += change(job.id) is not None
        return {"cancelled" if verb == "cancel" else "retried": done, "skipped": len(jobs) - done, "cursor": cursor}

    def purge(self, filter: Filter, cursor: str = "", most: int = SCANNED) -> dict[str, Any]:
        """Look at up to 1,000 ended jobs and delete those that match, up to `most`.

        Continue with the returned cursor.
        """
        if filter.status not in ENDED:
            raise InvalidJob("status", f"must be one of {', '.join(ENDED)}: other jobs have not ended")
        jobs, cursor = self.page(filter, limit=most, cursor=cursor, cut=0)
        ids = [job.id.encode() for job in jobs]
        logged = [job.id.encode() for job in jobs if job.logged]
        return {"purged": self.forget(filter.status, ids, logged), "cursor": cursor}

    def count(self, filter: Filter, cursor: str = "") -> dict[str, Any]:
        """Look at up to 1,000 jobs and count those that match. Continue with the returned cursor.

        Counts all at once if the filter is only a status, or a queue with an unended status.
        """
        status, queue = filter.status, filter.queue
        if status and not cursor and filter == Filter(status):
            return {"count": self.stats()[status], "cursor": "", "scanned": 0}
        if status in UNENDED and not cursor and filter == Filter(status, queue=queue):
            return {"count": self.queues().get(queue or "", {status: 0})[status], "cursor": "", "scanned": 0}
        page = self.page(filter, limit=SCANNED, cursor=cursor, cut=0)
        return {"count": len(page[0]), "cursor": page[1], "scanned": page.scanned}

    def failures(self, filter: Filter, cursor: str = "") -> dict[str, Any]:
        """Look at up to 1,000 jobs, and group those that match by type and by type of error.

        Each group has its `count`, and the `message`, `jobId` and `at` of its latest failure. Jobs
        without an error are in no group. Continue with the returned cursor, and add up the counts.
        """
        page = self.page(filter, limit=SCANNED, cursor=cursor, cut=0)
        groups: dict[tuple[str, str], dict[str, Any]] = {}
        for job, error in ((job, job.error) for job in page[0] if job.error):
            first: dict[str, Any] = {"type": job.type, "errorType": error.type, "count": 0, "at": -1}
            own = groups.setdefault((job.type, error.type), first)
            own["count"] += 1
            at = job.ended_at or job.updated_at  # a retrying job was updated when its attempt failed
            if at > own["at"]:
                own |= {"message": error.message[:MESSAGE], "jobId": job.id, "at": at}
        listed = sorted(groups.values(), key=lambda group: -group["count"])
        return {"groups": listed, "cursor": page[1], "scanned": page.scanned}

    def purge_one(self, id: str) -> Job | None:
        """Delete an ended job. Return it as it was; None for an unknown id.

        Raises WrongStatus if it has not ended, or was retried meanwhile.
        """
        job = self.get(id)
        ids = [id.encode()]
        deleted = job and job.status in ENDED and self.forget(job.status, ids, ids if job.logged else ())
        if job and not deleted and (now := self.get(id)):
            raise WrongStatus("purge", now)
        return job


def try_each(
    parts: Sequence[Queue], call: Callable[[Queue], T], must: bool = False, run: Callable[..., Iterable[Any]] = map
) -> list[T]:
    """Call `call` for each of these shards, even after errors, and return the results.

    Raises Reaped if any call did. Raises the first error if all failed, or with `must` if any did.
    """

    def attempt(part: Queue) -> T | TinyQueueError:
        try:
            return call(part)
        except TinyQueueError as error:
            return error

    replies = list(run(attempt, parts))
    errors = [reply for reply in replies if isinstance(reply, TinyQueueError)]
    if reaped := [error for error in errors if isinstance(error, Reaped)]:
        reaped[0].parts = [part for error in reaped for part in error.parts]
        raise reaped[0]
    if errors and (must or len(errors) == len(replies)):
        raise errors[0]
    return [reply for reply in replies if not isinstance(reply, TinyQueueError)]


# The queue ------------------------------------------------------------------------------------------------------------


class Queue(Reading, Verbs):
    """A queue in one namespace.

    Threads may share it. Forked processes may too, if it was not used before the fork.
    """

    def __init__(
        self,
        pool: Any,
        *,
        namespace: str = "queue",
        lease: float = 30,
        keep_completed: float = 86400,
        keep_failed: float = 604800,
        keep_once: float = 86400,
        max_pending: int = 0,
        min_replicas: int = 0,
    ) -> None:
        self.store = Store(pool, check_name("namespace", namespace))
        self.pool = pool
        self.keys = self.store.keys
        self.parts = [self]  # the queues that this one consists of: itself
        self.lease = lease
        self.lease_ms = int(lease * 1000)
        kept = {"completed": keep_completed, "failed": keep_failed, "cancelled": keep_failed}
        self.keep_ms = {status: int(seconds * 1000) for status, seconds in kept.items()}
        self.keep_once_ms = int(keep_once * 1000)
        self.max_pending = max_pending
        self.min_replicas = min_replicas
        self._paused: tuple[float, frozenset[str]] = (-1e9, frozenset())  # when read, and the names
        self.store.advance = self.advance
        self.limits = Limits(self.keys, self.store, lambda: self._paused[1], self._note_paused)
        self._known: set[str] = set()  # the names of queues that exist
        self._leases: dict[str, tuple[bytes | None, float]] = {}  # as last seen, and since when
        self._lost: dict[str, bytes | None] = {}  # those that were seen unchanged for too long
        self._writers = threading.BoundedSemaphore(WRITERS)
        self.keeps_logs = False  # whether jobs may have logs, as far as this process knows
        self.shard: int | None = None  # its number, if it is one of several

    @classmethod
    def from_url(
        cls, url: str, *, namespace: str = "queue", connections: int = 100, tls_verify: bool = True, **options: Any
    ) -> Queue:
        """Make a queue at a redis, rediss, unix or redis+sentinel URL. Connects on first use."""
        try:
            pool = connect(url, tag=namespace, connections=connections, tls_verify=tls_verify)
        except ValueError as error:
            raise SettingsError(str(error)) from None
        return cls(pool, namespace=namespace, **options)

    @classmethod
    def embedded(cls, **options: Any) -> Queue:
        """Make a queue on a Redis in this process, for tests and a first run. Persists nothing."""
        import fakeredis  # slow to import

        return cls(fakeredis.FakeRedis(server=fakeredis.FakeServer(), protocol=2).connection_pool, **options)

    def part_of(self, id: str) -> Queue:
        """Return the queue that has the job of that id: this one."""
        return self

    def part_for(self, name: str) -> Queue:
        """Return the queue that has the schedule of that name: this one."""
        return self

    # Enqueue ----------------------------------------------------------------------------------------------------------

    def submit(
        self, jobs: Sequence[Job], once: Once | None = None, elsewhere: Mapping[str, int] | None = None
    ) -> list[Job]:
        """Store drafted jobs, all or none, and return them.

        nothing -> pending. In place of a job whose uniqueKey is taken, returns the job that has it.
        With `once`, a second submit under the same key returns the jobs of the first. Watches the
        keys of `once` and of uniqueKeys, and parents; ids are new and need no watch. After a lost
        reply, the ids or `once` show whether all is stored. If the first EXEC still arrives late,
        the jobs are safe, but counted twice until a worker repairs the counts. Raises KeyReused,
        QueueFull, InvalidJob for more than MAX_JOBS jobs and for parents that do not exist,
        Unavailable if Redis' memory is nearly used up, and NotReplicated if fewer than
        `min_replicas` replicas have the stored jobs within a second. `elsewhere` counts the pending
        jobs of other shards.
        """
        if len(jobs) > MAX_JOBS:
            raise InvalidJob("jobs", f"must be at most {MAX_JOBS} at a time")
        self._check_memory()
        ids = {job.id for job in jobs}
        after = {job.id: job.after for job in jobs if job.after}
        unique = [self.keys.unique(key) for key in dict.fromkeys(job.unique_key for job in jobs if job.unique_key)]
        accepted = list(jobs)

        def body(tx: Transaction) -> list[Job]:
            nonlocal accepted
            tx.replicas = self.min_replicas if jobs else 0
            if once and (stored := tx.read(("GET", self.keys.once(once.key)))[0]):
                return self._replay(tx, jobs, once, stored)
            if not jobs or (not once and tx.again and tx.read(("EXISTS", *map(self.keys.job, ids)))[0]):
                return accepted
            accepted = self._store_new(tx, jobs, elsewhere or {}, after)
            if once:
                made = encode(Made(once.fingerprint, [job.id for job in accepted]))
                tx.write("SET", self.keys.once(once.key), made, "PX", self.keep_once_ms)
            return accepted

        parents = [self.keys.job(id) for id in outer_parents(after, ids)]
        stored = self.store.transact([*([self.keys.once(once.key)] if once else []), *unique, *parents], body)
        return self._note_failures(stored) if parents else stored

    def _note_failures(self, jobs: list[Job]) -> list[Job]:
        """Return jobs as they are after submit. One whose parent had failed has failed, too."""
        waiting = {job.id: job for job in jobs if job.waiting_for}
        for now, _ in self.read_jobs(list(waiting)):
            if now and now.status == "failed":
                waiting[now.id].fail_as(now)
        return jobs

    def _check_memory(self) -> None:
        if self.store.connections.memory_use > MEMORY_SHARE:
            raise Unavailable("full", f"more than {MEMORY_SHARE:.0%} of its maxmemory is used")

    def _store_new(
        self, tx: Transaction, jobs: Sequence[Job], elsewhere: Mapping[str, int], after: Mapping[str, Sequence[str]]
    ) -> list[Job]:
        """Store jobs under new ids. In place of some, return those that have their uniqueKeys."""
        ids = {job.id for job in jobs}
        accepted = self._without_duplicates(tx, jobs) if any(job.unique_key for job in jobs) else list(jobs)
        new = list({job.id: job for job in accepted if job.id in ids}.values())
        if after:
            self._link(tx, new, after, {job.id: has.id for job, has in zip(jobs, accepted, strict=True)})
        if new:
            self._check_room(tx, Counter(job.queue for job in new), elsewhere)
            # NX, because an EXEC that arrives late must not reset a job that ran meanwhile.
            tx.write("MSETNX", *(part for job in new for part in (self.keys.job(job.id), record_of(job))))
        for job in new:
            self._add_to_queue(tx, job)
            tx.measure("enqueued", job)
        return accepted

    def _replay(self, tx: Transaction, jobs: Sequence[Job], once: Once, stored: bytes) -> list[Job]:
        """Return the jobs of the first submit as they are now, or as submitted if deleted since."""
        made = read_made(stored)
        if made.fingerprint != once.fingerprint or len(made.ids) != len(jobs):
            raise KeyReused(KEY_REUSED)
        drafts = {job.id: job for job in jobs}
        once.replayed = not drafts.keys() & made.ids  # else this submit made them, but got no reply
        records = tx.read(("MGET", *map(self.keys.job, made.ids)))[0] if jobs else []
        found = (
            read_job(id, record) if record else msgspec.structs.replace(job, id=id)
            for id, record, job in zip(made.ids, records, jobs, strict=True)
        )
        return [drafts.get(job.id, job) for job in found]

    def _without_duplicates(self, tx: Transaction, jobs: Sequence[Job]) -> list[Job]:
        """Replace each job whose uniqueKey is taken with the job that holds the key.

        The other jobs take their keys.
        """
        keys = list(dict.fromkeys(job.unique_key for job in jobs if job.unique_key))
        ids = map(text_of, (id or b"" for id in tx.read(("MGET", *map(self.keys.unique, keys)))[0]))
        named = {key: id for key, id in zip(keys, ids, strict=True) if ID.fullmatch(id)}
        records = tx.read(("MGET", *map(self.keys.job, named.values())))[0] if named else []
        holders: dict[str, Job] = {}
        for (key, id), record in zip(named.items(), records, strict=True):
            job = read_job(id, record) if record else None
            if job and job.status in UNENDED and job.unique_key == key:
                holders[key] = job
        accepted = [holders.setdefault(job.unique_key, job) if job.unique_key else job for job in jobs]
        # Write taken keys too: a late EXEC fails only if a watched key has changed since.
        for key, job in holders.items():
            tx.write("SET", self.keys.unique(key), job.id)
        return accepted

    def _check_room(self, tx: Transaction, wanted: Mapping[str, int], elsewhere: Mapping[str, int]) -> None:
        """Raise QueueFull. Watches nothing: concurrent submits may exceed the limits a little."""
        if self.max_pending:
            counts = tx.read(("HMGET", self.keys.counts, *("pending:" + name for name in wanted)))[0]
            for (name, more), here in zip(wanted.items(), map(read_count, counts), strict=True):
                count = here + elsewhere.get(name, 0)
                if count + more > self.max_pending:
                    raise QueueFull(f"queue {name} has {count} pending jobs; the limit is {self.max_pending}")
        if wanted.keys() - self._known:
            names = queues_in(pairs(tx.read(("HGETALL", self.keys.counts))[0]))
            if (new := sorted(wanted.keys() - names)) and len(names) + len(new) > MAX_QUEUES:
                todo = "use a queue that exists, or cancel all jobs of some that are not needed"
                raise QueueFull(f"queue {new[0]} is one too many: there are {len(names)} queues with jobs; {todo}")
            self._known = names | wanted.keys()

    def _add_to_queue(self, tx: Transaction, job: Job, push: Push = "LPUSH") -> None:
        """Put a pending job into the list of its queue, or among the delayed jobs."""
        if job.due > tx.now:
            tx.gather("ZADD", self.keys.delayed, job.due, job.id)
        else:
            tx.push(push, job)
        tx.count_pending(job)

    # Schedules --------------------------------------------------------------------------------------------------------

    def change_schedule(self, name: str, change: Change) -> Schedule | None:
        """Apply `change` to a schedule, and enqueue a job if it says so. Return the new schedule.

        `change` gets the schedule, its last job and the time. It returns the new schedule, or None
        to remove it, and the time of the tick whose job is to be enqueued, or 0. Watches the
        schedule. Returns a removed schedule as it was. Repeats `change` after a lost reply, unless
        its job is stored: `change` must see in the schedule that its work is done.
        """
        key = self.keys.schedule(check_name("name", name))
        first: Schedule | None = None
        id = ""

        def body(tx: Transaction) -> Schedule | None:
            nonlocal first, id
            stored = tx.read(("GET", key))[0]
            found = read_schedule(stored) if stored else None
            first = first or found
            if found and id and tx.again and found.last_job == id:
                return found
            last = tx.read(("GET", self.keys.job(found.last_job)))[0] if found and found.last_job else None
            made, tick = change(found, read_job(found.last_job, last) if found and last else None, tx.now)
            if made and tick:
                job = made.job(tx.now, tick, self.shard, id)
                id = job.id
                made = made.ran(tick, job, self._store_scheduled(tx, job))
            self.write_schedule(tx, name, made, made != found)
            return made or first

        return self.store.transact([key], body)

    def _store_scheduled(self, tx: Transaction, job: Job) -> Job:
        self._check_memory()
        if job.unique_key:
            tx.read(("WATCH", self.keys.unique(job.unique_key)))
        return self._store_new(tx, [job], {}, {})[0]

    def write_schedule(self, tx: Transaction, name: str, made: Schedule | None, changed: bool = True) -> None:
        """Write a schedule if it has changed, and its next tick in any case. None removes both."""
        if made is None:
            tx.write("DEL", self.keys.schedule(name))
            tx.gather("ZREM", self.keys.ticks, name)
            return
        if changed:
            tx.write("SET", self.keys.schedule(name), encode(made))
        tx.gather("ZADD", self.keys.ticks, "+inf" if made.paused else made.next_at, name)

    def sync_schedules(self, code: str, wanted: Sequence[Schedule]) -> Merge | None:
        """Store the schedules that a code declares, unless a newer release of that code has synced.

        Watches the generation, which every sync of that code writes, and the schedules. Returns
        what has changed; None if this code has never declared a schedule.
        """
        key = self.keys.generation(code)

        def body(tx: Transaction) -> Merge | None:
            stored = tx.read(("GET", key))[0]
            before = read_generation(stored)
            after = before.next(fingerprint(wanted), tx.now)
            if not after:
                return NO_CHANGE
            if not wanted and len(after.releases) == 1 and (before.releases or not stored):
                # If the next release declares schedules, it must know that this one is older.
                if not stored:
                    tx.write("SET", key, encode(after))
                return None
            if after != before:
                tx.write("SET", key, encode(after))
            return self._merge_schedules(tx, code, wanted)

        return self.store.transact([key], body)

    def _merge_schedules(self, tx: Transaction, code: str, wanted: Sequence[Schedule]) -> Merge:
        listed = list(map(text_of, tx.read(("ZRANGE", self.keys.ticks, 0, -1))[0]))
        names = list(dict.fromkeys([*listed, *(made.name for made in wanted)]))
        keys = list(map(self.keys.schedule, names))
        records = tx.read(("WATCH", *keys), ("MGET", *keys))[1] if keys else []
        found = {name: read_schedule(record) for name, record in zip(names, records, strict=True) if record}
        merged = merge(code, wanted, found, tx.now)
        for made in merged.changed:
            self.write_schedule(tx, made.name, made)
        for name in merged.gone:
            self.write_schedule(tx, name, None)
        written = {*listed, *(made.name for made in merged.changed)}
        for lost in (made for name, made in found.items() if name not in written):
            self.write_schedule(tx, lost.name, lost, changed=False)
        return merged

    # Dequeue ----------------------------------------------------------------------------------------------------------

    def register(self, queues: Sequence[str], concurrency: int, worker: str = "") -> str:
        """Register a new worker and return its id. It must renew its lease with heartbeats.

        Makes the limits of its types due for a look, because its code may allow more.
        """
        worker = worker or new_worker_id()
        self.limits.review()
        about: dict[str, Any] = {"host": host_name(), "pid": os.getpid()}
        about |= {"queues": list(queues), "concurrency": concurrency}
        about |= {"startedAt": self.now(), "types": sorted(HANDLERS)}

        def body(tx: Transaction) -> str:
            tx.write("SADD", self.keys.workers, worker)
            tx.write("SET", self.keys.worker(worker), encode(about))
            tx.write("SET", self.keys.lease(worker), "{}", "PX", self.lease_ms)
            return worker

        return self.store.transact((), body)

    def wait(self, names: Sequence[str], seconds: float = BLOCK, worker: str = "") -> set[str]:
        """Wait for a bell of these queues. Return the name of the one that rang. Takes no job.

        A quiet worker waits for a bell that nobody rings, and returns a token that it has taken.
        """
        heard = [QUIET_MARK + worker] if self.is_quiet(worker) else names
        bells = ("BLPOP", *map(self.keys.bell, heard), seconds)
        token, paused = self.store.read(bells, ("SMEMBERS", self.keys.paused))
        self._note_paused(paused)
        if token is not None and self.is_quiet(worker):
            self.store.read(("RPUSH", token[0], "1"))
            token = None
        return {text_of(token[0]).removeprefix(self.keys.bell(""))} if token is not None else set()

    def take(self, worker: str, names: Sequence[str], most: int) -> list[bytes]:
        """Move up to `most` ids to the worker's own list, from queues that are not paused.

        A quiet worker gets none. Earlier queues are emptied first. If the reply is lost, the ids
        are in the worker's list, where `adopt` finds them. The transaction also adds the worker to
        the set of workers. So a worker that was reaped, wakes up and takes jobs is found and reaped
        again.
        """
        taken: list[bytes] = []
        broken: Corrupted | None = None
        for name in self._not_paused(names, worker):
            try:
                added, paused, *ids = self.store.read(*self._moves(worker, name, most - len(taken)))[-1]
                checked([added, *ids])
            except Corrupted as error:  # one list of the wrong type must not stop the other queues
                broken = error
                continue
            self._note_paused(paused)
            taken += [id for id in ids if id is not None]
            if len(taken) == most:
                break
        if broken and not taken:
            raise broken
        return taken

    def _moves(self, worker: str, name: str, most: int) -> list[Command]:
        """Return the transaction that takes ids from one queue."""
        move = ("RPOPLPUSH", self.keys.jobs(name), self.keys.proc(worker))
        first = ("SADD", self.keys.workers, worker), ("SMEMBERS", self.keys.paused)
        return [("MULTI",), *first, *[move] * most, ("EXEC",)]

    def start(self, worker: str, ids: Sequence[bytes], held: Held = None, others: int = 0) -> list[Job]:
        """Start an attempt for every taken id whose job is pending and due. Drop the other ids.

        pending -> processing; an expired job -> failed. Watches the registration and the records.
        `held` has the jobs that this worker has started and not settled. A job that is processing
        under this worker's name in an attempt that is not held was started by a transaction whose
        reply was lost, and is returned too. A suspect starts only alone, while nothing is held.
        Otherwise it is returned pending and stays in the worker's list. After a lost reply, start
        neither starts nor drops an id, because it may have done so already. It returns pending jobs
        as they are, and `adopt` finds those that are still in the list. `others` counts the ids
        started at the same time in other shards. Raises Reaped if the worker is not registered.
        """
        records: Records = dict.fromkeys(ids_in(ids))
        keys = list(map(self.keys.job, records))
        company = bool(held) or len(ids) + others > 1

        def body(tx: Transaction) -> list[Job]:
            [found] = self._read_fenced(tx, worker, keys)
            records.update(zip(records, found, strict=True))
            return self._start(tx, worker, ids, records, held=held, company=company)

        started = self.store.transact([self.keys.worker(worker), *keys], body)
        return self._after_start(started, ids, records)

    def _start(
        self, tx: Transaction, worker: str, ids: Sequence[bytes], records: Records, *, held: Held, company: bool
    ) -> list[Job]:
        started: list[Job] = []
        changed: list[Any] = []
        unread = {id: read_job(id, record) for id, record in records.items() if record is not None}
        limited = [job for job in unread.values() if job.status == "pending" and limit_of(job)]
        alone = [job for job in limited if not (company and is_suspect(job))]
        rooms = self.limits.rooms(tx, alone) if alone else {}
        for entry in ids:
            id = text_of(entry)
            job = unread.pop(id, None)  # a second entry of one id finds none and is dropped
            room = rooms.get(id) if job else None
            if job and (self._stays(job, worker, held, company, tx.again) or (room and room.busy)):
                started.append(job)
            elif tx.again:
                continue
            elif job and room and not self.limits.enter(tx, job, room):
                tx.write("LREM", self.keys.proc(worker), 1, entry)
            elif job and job.status == "pending" and not job.has_expired(tx.now) and job.due <= tx.now:
                changed += [self.keys.job(id), note_record(job, record_of(self._begin(tx, job, worker)))]
                started.append(job)
            else:
                tx.write("LREM", self.keys.proc(worker), 1, entry)
                self._drop(tx, job)
        if changed:
            tx.write("MSET", *changed)
        self.limits.wake(tx)
        return started

    def _after_start(self, jobs: list[Job], ids: Sequence[bytes], records: Records) -> list[Job]:
        """Report the taken ids that no job has, and let the handlers of the jobs write progress."""
        if len(records) < len(set(ids)):
            log.warning("entries of a queue that are not job ids were dropped: %d", len(set(ids)) - len(records))
        _warn_of_gone([id for id, record in records.items() if record is None])
        for job in jobs:
            job.__dict__["_queue"] = self
            if job.logged and self.keeps_logs:
                self._measure_log(job)
        return jobs

    def _measure_log(self, job: Job) -> None:
        """Note the sizes of the stored lines that earlier attempts logged."""
        with suppress(Unavailable, Corrupted):  # then the next write replaces them
            job.__dict__["_log_sizes"] = list(map(len, self.store.read(("LRANGE", self.keys.log(job.id), 0, -1))[0]))

    def _read_fenced(
        self, tx: Transaction, worker: str, keys: Sequence[str], *more: Command, before: Sequence[Command] = ()
    ) -> list[Any]:
        """Return the replies to `more`, the records, and the reply to `before` if that is given.

        Raises Reaped without a registration.
        """
        records = [("MGET", *keys)] if keys else []
        registered, *replies = tx.read(("EXISTS", self.keys.worker(worker)), *more, *records, before=before)
        if not registered:
            raise Reaped(f"worker {worker} was reaped")
        if not records:
            replies.insert(len(more), [])
        return replies

    def _stays(self, job: Job, worker: str, held: Held, company: bool, again: bool) -> bool:
        """Whether to return a taken job as it is.

        That is a suspect in company, a job whose start lost its reply, and after a lost reply any
        pending job.
        """
        if job.status == "pending":
            return again or (is_suspect(job) and company)
        ours = held.get(job.id) if held else None
        reply_lost = again if held is None else ours is None or not job.same_attempt(ours)
        return job.runs_on(worker) and reply_lost

    def _begin(self, tx: Transaction, job: Job, worker: str) -> Job:
        tx.count_start(job, job.waited(tx.now))
        tx.count_pending(job, -1)
        job.status = "processing"
        job.worker = worker
        job.attempts += 1
        job.started_at = job.updated_at = max(tx.now, job.created_at)
        job.ended_at = 0
        if job.progress:  # or the zero would be stored
            job.progress = 0.0
        tx.count("processing:" + job.queue)
        return job

    def _drop(self, tx: Transaction, job: Job | None) -> None:
        """Handle the job of a taken id that is dropped: fail it if it has expired."""
        if job and job.limit:
            self.limits.owe(tx, job.limit)  # it may have been woken
        if job and job.status == "pending" and job.has_expired(tx.now):
            self._fail_pending(tx, job, "Expired", "expired before it was started")
        else:
            self._set_aside(tx, job)

    def _fail_pending(self, tx: Transaction, job: Job, type: str, message: str) -> None:
        tx.count_pending(job, -1)
        job.error = Failure(type, message)
        self._end(tx, job, "failed")

    def _set_aside(self, tx: Transaction, job: Job | None) -> None:
        """Handle a job whose entry is dropped: delay it if it is pending, fail it if unreadable."""
        if job and job.status == "pending":
            tx.gather("ZADD", self.keys.delayed, job.due, job.id)
        elif job and job.unreadable:
            self._end(tx, msgspec.structs.replace(job), "failed")

    def adopt(self, worker: str, held: Collection[str]) -> list[bytes]:
        """Return the ids in the worker's own list that are not in `held`, to be started.

        The reply that brought them was lost. Read `held` first, and call this only while no other
        thread takes or starts jobs: an id whose reply is on its way to another thread would be
        started twice.
        """
        known = Counter(id.encode() for id in held)
        return list((Counter(self.store.read(("LRANGE", self.keys.proc(worker), 0, -1))[0]) - known).elements())

    # Settle -----------------------------------------------------------------------------------------------------------

    def settle(self, worker: str, outcomes: Sequence[Outcome], again: bool = False) -> list[Outcome]:
        """Write the outcomes of many started jobs in one transaction. Return those not written.

        processing -> completed, pending, failed or cancelled. An outcome is not written if the
        worker has lost the job. Watches the registration and the records, so an EXEC that arrives
        late fails. `again` means that an earlier call raised Unavailable with `doubtful`. Then jobs
        that it settled are left alone, and the list is empty. Raises Reaped, with nothing written,
        if the worker is not registered.
        """
        keys = [self.keys.job(outcome.job.id) for outcome in outcomes]

        def body(tx: Transaction) -> list[Outcome]:
            awaited, records = self._read_fenced(tx, worker, keys, ("SMEMBERS", self.keys.awaited))
            tx.awaited = set(awaited)
            lost = self._settle(tx, worker, outcomes, records)
            self.limits.wake(tx)
            return lost

        return self.store.transact([self.keys.worker(worker), *keys], body, again)

    def _settle(
        self, tx: Transaction, worker: str, outcomes: Sequence[Outcome], records: Sequence[bytes | None]
    ) -> list[Outcome]:
        lost = []
        # Backwards, because released jobs go to the head of their queue: the first goes last.
        for outcome, record in zip(reversed(outcomes), reversed(records), strict=True):
            if attempt := attempt_in(record, outcome.job):
                tx.write("LREM", self.keys.proc(worker), -1, outcome.job.id)
                outcome.job.followed = attempt.followed
                if attempt.logged or "_log" in outcome.job.__dict__:
                    self._add_lines(tx, outcome.job, attempt.logged)
                self._write_outcome(tx, outcome, attempt.cancel_requested)
            else:
                lost.append(outcome)
        return [] if tx.again else lost

    def exchange(
        self, worker: str, outcomes: Sequence[Outcome], names: Sequence[str], most: int, held: Mapping[str, Job]
    ) -> tuple[list[Outcome], list[Job]]:
        """Settle outcomes, and take and start up to `most` jobs, as settle, take and start do.

        Returns the outcomes that were not written, and the jobs. Takes three round trips. The first
        takes the ids, in a transaction of its own, and reads the records of the outcomes. A queue
        that has too few ids costs one more. The second reads the records of the taken ids, and the
        third writes all the rest. If this raises, the ids that it took are in the worker's own
        list, where `adopt` finds them. `held` includes the jobs of the outcomes, so a suspect is
        not started, but returned pending.
        """
        keys = [self.keys.job(outcome.job.id) for outcome in outcomes]
        untried = self._not_paused(names, worker) if most else []
        ids: list[bytes] = []  # those that an earlier try took stay taken
        taken: Records = {}

        def read(tx: Transaction) -> tuple[list[bytes], list[bytes | None]]:
            take = self._moves(worker, untried[0], most - len(ids)) if untried and len(ids) < most else []
            awaited, records, *moves = self._read_fenced(tx, worker, keys, ("SMEMBERS", self.keys.awaited), before=take)
            for added, paused, *moved in moves:
                del untried[0]  # not before, because a node of a cluster may have redirected this
                checked([added])
                self._note_paused(paused)
                ids.extend(id for id in moved if isinstance(id, bytes))  # an error is left to `take`
            return awaited, records

        def body(tx: Transaction) -> tuple[list[Outcome], list[Job]]:
            awaited, records = read(tx)
            while untried and len(ids) < most:
                awaited, records = read(tx)
            tx.awaited = set(awaited)
            settle = partial(self._settle, tx, worker, outcomes, records)
            taken.update(dict.fromkeys(ids_in(ids)))
            lost, found = tx.read_watched(list(map(self.keys.job, taken)), settle)
            taken.update(zip(taken, found, strict=True))
            return lost, self._start(tx, worker, ids, taken, held=held, company=True)

        lost, started = self.store.transact([self.keys.worker(worker), *keys], body)
        return lost, self._after_start(started, ids, taken)

    def _write_outcome(self, tx: Transaction, outcome: Outcome, cancel_requested: bool) -> None:
        job = msgspec.structs.replace(outcome.job, updated_at=max(tx.now, outcome.job.started_at))
        job.error = outcome.error or job.error
        if outcome.error and not outcome.halt and not cancel_requested:
            tx.count_error(job)
        if outcome.verb == "release":
            self._stop_attempt(tx, job, "released")
        else:
            self._stop_attempt(tx, job, "ran", max(0, tx.now - job.started_at))
        if outcome.verb == "complete":
            job.result = outcome.result
            job.error = None
            job.cancel_requested = False
            self._end(tx, job, "completed")
        elif cancel_requested:
            job.cancel_requested = True
            job.error = outcome.error  # not that of an attempt before
            self._end(tx, job, "cancelled")
        elif outcome.halt and outcome.after:
            job.leave_attempt("released", tx.now, outcome.error)
            job.attempts -= 1
            if job.limit:
                self._make_pending(tx, job)
                tx.count_pending(job)
                self.limits.halt(tx, job, round(outcome.after * 1000))
            else:
                self._requeue(tx, job, tx.now + round(outcome.after * 1000))
        elif outcome.verb == "release" and job.refunds < MAX_REFUNDS:
            job.leave_attempt("released", tx.now, outcome.error)
            job.attempts -= 1
            job.refunds += 1
            run_at = tx.now + round(outcome.after * 1000) if outcome.after else 0
            self._requeue(tx, job, run_at, push="RPUSH")
        elif outcome.verb == "release":
            self._requeue_or_fail(tx, job, "released too often")
        elif outcome.after is not None and job.attempts < job.max_attempts:
            job.leave_attempt("failed", tx.now, outcome.error)
            self._requeue(tx, job, tx.now + round(outcome.after * 1000))
            tx.count_retry(job)
        else:
            self._end(tx, job, "failed")

    def write_progress(self, job: Job) -> None:
        """Write the progress of a running job. Raises Reaped if the worker has lost the job.

        Watches the registration and the record. Only WRITERS threads at a time write, so that a
        worker does not need a connection for each slot.
        """
        self._write_running(job, lambda tx, logged: self._write_record(tx, job))

    def write_log(self, job: Job) -> None:
        """Write what a running job has logged since the last write. Raises Reaped like progress.

        Writes the record only with the first lines.
        """
        log = job.__dict__["_log"]
        lines = log.unwritten()

        def write(tx: Transaction, logged: bool) -> None:
            if tx.again and tx.read(("LRANGE", self.keys.log(job.id), -1, -1))[0] == [lines[-1][1]]:
                return
            self._add_lines(tx, job, logged, lines)
            if not logged:
                self._write_record(tx, job)

        if lines:
            self._write_running(job, write)
            log.note_written(lines)

    def _write_running(self, job: Job, write: Callable[[Transaction, bool], None]) -> None:
        """Let `write` write to a running job. It gets whether the record is marked as logged."""
        key = self.keys.job(job.id)

        def body(tx: Transaction) -> None:
            [[record]] = self._read_fenced(tx, job.worker, [key])
            attempt = attempt_in(record, job)
            if attempt is None:
                raise Reaped(f"job {job.id} is no longer with worker {job.worker}")
            job.cancel_requested = attempt.cancel_requested
            job.followed = attempt.followed
            write(tx, attempt.logged)

        with self._writers:
            self.store.transact([self.keys.worker(job.worker), key], body)

    def _write_record(self, tx: Transaction, job: Job) -> None:
        record = record_of(msgspec.structs.replace(job, updated_at=max(tx.now, job.started_at)))
        tx.write("SET", self.keys.job(job.id), note_record(job, record))

    def _add_lines(
        self, tx: Transaction, job: Job, logged: bool, lines: Sequence[tuple[int, bytes]] | None = None
    ) -> None:
        """Add lines to the log of a job, by default all unwritten ones. Drop the oldest lines."""
        job.logged = job.logged or logged
        log = job.__dict__.get("_log")
        lines = log.unwritten() if log and lines is None else lines
        if not log or not lines:
            return
        key = self.keys.log(job.id)
        job.logged = True
        if log.sizes is None:
            tx.write("DEL", key)
        tx.write("RPUSH", key, *(line for _, line in lines))
        tx.write("LTRIM", key, -len(log.fit(lines)), -1)

    # The end of a job -------------------------------------------------------------------------------------------------

    def _stop_attempt(self, tx: Transaction, job: Job, event: str, ms: int = -1) -> None:
        """Count that a job no longer runs. The counterpart of `_begin`."""
        tx.count("processing:" + job.queue, -1)
        tx.measure(event, job, ms)
        if job.limit:
            self.limits.leave(tx, job)

    def _end(self, tx: Transaction, job: Job, status: Literal["completed", "failed", "cancelled"]) -> None:
        """Write the final state of a job: the record, which now expires, and its index entry."""
        job.status = status
        job.ended_at = job.updated_at = max(tx.now, job.updated_at)
        if job.callback_url:
            self._add_delivery(tx, job)
        tx.write("SET", self.keys.job(job.id), record_of(job), "PX", self.keep_ms[status])
        if job.logged:
            tx.write("PEXPIRE", self.keys.log(job.id), self.keep_ms[status])
        tx.gather("ZADD", self.keys.ended[status], job.ended_at, job.id)
        tx.count_end(job)
        if job.followed:
            tx.push_token(job.id, status)
        if job.unique_key:
            tx.write("DEL", self.keys.unique(job.unique_key))
        if tx.awaited is None:
            tx.awaited = set(tx.read(("SMEMBERS", self.keys.awaited))[0])
        if job.id.encode() in tx.awaited:
            tx.write("LPUSH", self.keys.done(job.id), "1")
            tx.write("EXPIRE", self.keys.done(job.id), 60)
            tx.write("SREM", self.keys.awaited, job.id)

    def _add_delivery(self, tx: Transaction, job: Job) -> None:
        """Enqueue the job that delivers this end to the callbackUrl."""
        delivery = delivery_of(job, tx.now)
        job.callback_job = delivery.id
        tx.write("SET", self.keys.job(delivery.id), record_of(delivery))
        self._add_to_queue(tx, delivery)
        tx.measure("enqueued", delivery)

    def _requeue(self, tx: Transaction, job: Job, run_at: int = 0, push: Push = "LPUSH") -> None:
        self._make_pending(tx, job, run_at)
        self._add_to_queue(tx, job, push)

    def _make_pending(self, tx: Transaction, job: Job, run_at: int = 0) -> None:
        job.status = "pending"
        job.run_at = run_at
        tx.write("SET", self.keys.job(job.id), record_of(job))

    def _requeue_or_fail(self, tx: Transaction, job: Job, reason: str, beside: bool = False) -> None:
        """End an attempt without outcome. Requeue the job at the head, or fail it after its last.

        `beside`: the worker ran other jobs too. Any of them may have killed it, so the attempt does
        not count. After SUSPICIOUS such losses the job runs alone, and then every loss counts.
        """
        attempt = f"attempt {job.attempts}/{job.max_attempts}"
        job.error = Failure("WorkerLost", f"{reason} ({attempt})")
        if beside:
            job.error.message = f"{reason} while it ran other jobs too ({attempt}, not counted)"
            job.attempts -= 1
            job.suspicions += 1
        job.updated_at = max(tx.now, job.updated_at)
        tx.count_error(job)
        if job.cancel_requested:
            self._end(tx, job, "cancelled")
        elif job.attempts < job.max_attempts:
            job.leave_attempt("lost", tx.now, job.error)
            self._requeue(tx, job, push="RPUSH")
        else:
            self._end(tx, job, "failed")

    # Cancel and retry -------------------------------------------------------------------------------------------------

    def cancel(self, id: str) -> Job | None:
        """Cancel a pending job or request a running one to stop. Return it; None for an unknown id.

        pending -> cancelled. A running job stays processing, and its handler reads `job.cancelled`.
        Watches the record. The id of a cancelled job stays in its list until a worker takes and
        drops it, because LREM takes longer the longer the list is. Raises WrongStatus if the job
        has ended, or if it is running and its handler takes no Job to read the request from.
        """

        def body(tx: Transaction, job: Job) -> None:
            if tx.again and (job.status == "cancelled" or job.cancel_requested):
                return
            if job.status == "processing":
                if job.type in HANDLERS and not HANDLERS[job.type].wants_job:
                    why = "it is processing, and its handler takes no Job to read the request"
                    raise WrongStatus("cancel", job, why)
                job.cancel_requested = True
                tx.write("SET", self.keys.job(id), record_of(job))
                return
            if job.status != "pending":
                raise WrongStatus("cancel", job)
            tx.write("ZREM", self.keys.delayed, id)
            if job.limit:
                self.limits.forget(tx, job)
            tx.count_pending(job, -1)
            self._end(tx, job, "cancelled")

        return self._change(id, body)

    def retry(self, id: str) -> Job | None:
        """Requeue a failed or cancelled job with attempts reset. Return it; None for an unknown id.

        failed, cancelled -> pending, without expiresAt. Watches the record: of two retries at once
        one raises WrongStatus. So does the retry of a job whose uniqueKey another has taken since.
        """

        def body(tx: Transaction, job: Job) -> None:
            if job.status not in ("failed", "cancelled"):
                if tx.again:  # the try whose reply was lost requeued it; it may have started since
                    return
                raise WrongStatus("retry", job)
            if (holder := self._holder(tx, job)) is not job:
                raise WrongStatus("retry", job, f"job {holder.id} has its uniqueKey now")
            self._revive(tx, job)

        return self._change(id, body)

    def hasten(self, id: str) -> Job | None:
        """Let a delayed or retrying job start now. Return it; None for an unknown id.

        pending -> pending, at the head of its queue. The job keeps its attempts. Watches the
        record. Raises WrongStatus if the job is not pending, waits for other jobs or is due.
        """

        def body(tx: Transaction, job: Job) -> None:
            delayed = job.status == "pending" and not job.waiting_for and job.run_at > tx.now
            if not delayed and tx.again:  # the try whose reply was lost hastened it
                return
            if not delayed:
                raise WrongStatus("hasten", job, self._why_not_delayed(tx, job))
            tx.write("ZREM", self.keys.delayed, id)
            job.updated_at = max(tx.now, job.updated_at)
            self._make_pending(tx, job)
            tx.push("RPUSH", job)

        return self._change(id, body)

    def _why_not_delayed(self, tx: Transaction, job: Job) -> str:
        if job.status != "pending":
            return ""
        if job.waiting_for:
            return "it waits for other jobs"
        if job.limit and tx.read(("ZSCORE", self.keys.held(job.limit), _entry_of(job)))[0] is not None:
            return f"it is held by the limit {job.limit}; raise that, or wait until it has room"
        return "it is due already"

    def _revive(self, tx: Transaction, job: Job, seen: str = "") -> None:
        """Requeue an ended job. Look again at the parents that it waits for, except one `seen`."""
        tx.write("ZREM", self.keys.ended[job.status], job.id)
        job.leave_end()
        job.attempts = job.refunds = job.ended_at = job.expires_at = 0
        job.cancel_requested = False
        job.updated_at = max(tx.now, job.updated_at)
        self._requeue(tx, job)
        tx.measure("revived", job)
        if job.logged:
            tx.write("PERSIST", self.keys.log(job.id))
        if job.followed:
            tx.write("PERSIST", self.keys.next(job.id))
            tx.push_token(job.id, job.status)
        self._look_again(tx, job, seen)

    def _holder(self, tx: Transaction, job: Job) -> Job:
        """Take the uniqueKey of an ended job again. Return the job that has it now."""
        if not job.unique_key:
            return job
        tx.read(("WATCH", self.keys.unique(job.unique_key)))
        return self._without_duplicates(tx, [job])[0]

    def _change(self, id: str, body: Callable[[Transaction, Job], None]) -> Job | None:
        """Read one job and let `body` change it, under WATCH of its record."""
        if not ID.fullmatch(id):
            return None

        def change(tx: Transaction) -> Job | None:
            record = tx.read(("GET", self.keys.job(id)))[0]
            if record is None:
                return None
            job = read_job(id, record)
            body(tx, job)
            return job

        return self.store.transact([self.keys.job(id)], change)

    # Jobs that wait for others ----------------------------------------------------------------------------------------

    def _link(
        self,
        tx: Transaction,
        new: Sequence[Job],
        after: Mapping[str, Sequence[str]],
        kept: Mapping[str, str],
    ) -> None:
        """Let new jobs wait for their parents, and mark these. `kept`: ids in place of drafts.

        Watches the parents. Raises InvalidJob if one does not exist, or if jobs of the batch wait
        for each other.
        """
        ids = set_parents(new, after, kept)
        stored = tx.read_jobs(ids, watch=True)
        check_parents(ids, stored)
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

    def _mark(self, tx: Transaction, parent: Job) -> None:
        parent.followed = True
        self._rewrite(tx, parent)

    def _rewrite(self, tx: Transaction, job: Job) -> None:
        """Write a changed record. That of an ended job keeps its time to live."""
        ended = job.status in ENDED
        left = job.ended_at + self.keep_ms[job.status] - tx.now if ended else 0
        if not job.unreadable:
            tx.write("SET", self.keys.job(job.id), record_of(job), *(("PX", max(1, left)) if ended else ()))

    def _look_again(self, tx: Transaction, job: Job, seen: str = "", completed: Collection[str] = ()) -> None:
        """Have `advance` look at the parents that a job waits for. They may have ended."""
        for parent in job.waiting_for:
            if parent != seen:
                tx.gather("SADD", self.keys.next(parent), job.id)
                tx.write("PERSIST", self.keys.next(parent))
                tx.push_token(parent, "completed" if parent in completed else "")

    def advance(self) -> int:
        """Apply ends and revivals to the jobs that wait for them. Return how many tokens it took.

        Whoever pushed a token calls this at once. promote calls it for tokens that are left after a
        second: whoever pushed them may have crashed. The lock only saves duplicate work. It is free
        again before the last look, so a token that was pushed while it was taken is seen.
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

    def _sweep(self) -> None:
        """Take the tokens that are left. Remove the mark once there are none."""
        self.advance()
        self.store.transact([self.keys.advance], self._remove_mark)

    def _remove_mark(self, tx: Transaction) -> None:
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

    def _advance_some(self, tx: Transaction, id: str, tokens: Sequence[bytes], some: Sequence[str], last: bool) -> None:
        """Apply the status of a parent to some dependents. Watches its record and theirs.

        The last transaction removes the tokens, and no others: somebody may have pushed more.
        """
        jobs = tx.read_jobs([id, *some], watch=True)
        parent = jobs.pop(id, None)
        status = parent.status if parent else status_in(tokens)
        for job in jobs.values():
            if id in job.waiting_for and status:
                self._follow(tx, job, id, status)
        if status == "completed" and some:
            tx.write("SREM", self.keys.next(id), *some)
        elif status in ENDED and last:
            tx.write("EXPIRE", self.keys.next(id), self.keep_ms[status] // 1000 + 1)
        elif parent and some and not parent.followed:
            self._mark(tx, parent)
        for token in tokens if last else ():
            tx.write("LREM", self.keys.advance, 1, token)
        tx.advances = False  # `advance` looks again

    def _follow(self, tx: Transaction, job: Job, parent: str, status: str) -> None:
        """Apply the status of a parent to a job that waits for it."""
        released = job.may_follow(status)
        if released:
            job.waiting_for = tuple(id for id in job.waiting_for if id != parent)
        if job.failed_because_of(parent) and (released or status in UNENDED) and self._holder(tx, job) is job:
            self._revive(tx, job, seen=parent)
        elif job.status == "pending" and not job.waiting_for:
            tx.write("ZREM", self.keys.delayed, job.id)
            tx.count_pending(job, -1)  # counted again at once
            job.updated_at = max(tx.now, job.updated_at)
            self._requeue(tx, job, job.run_at)
        elif released:
            self._rewrite(tx, job)
        elif job.status == "pending" and status in ENDED:
            tx.write("ZREM", self.keys.delayed, job.id)
            self._fail_pending(tx, job, "DependencyFailed", f"job {parent}, which this job waits for, {FATES[status]}")

    # Pause and resume -------------------------------------------------------------------------------------------------

    def pause(self, name: str) -> None:
        """Pause a queue. Workers start none of its jobs after at most PAUSE_AGE seconds.

        Running jobs and submits continue.
        """
        self.store.read(("SADD", self.keys.paused, check_name("queue", name)))

    def resume(self, name: str) -> None:
        """Resume a paused queue. Workers start its jobs, also those that were held meanwhile."""
        looks = self.limits.looks_now()  # nobody has woken the held jobs of a paused queue

        def body(tx: Transaction) -> None:
            tx.write("SREM", self.keys.paused, check_name("queue", name))
            for look in looks:
                tx.write(*look)
            tx.ring(name)

        self.store.transact((), body)

    def quiet(self, worker: str) -> bool:
        """Make a worker quiet: it takes no more jobs. Return whether it is registered.

        Takes effect after at most PAUSE_AGE seconds. The worker finishes the jobs that it has
        taken. Watches the registration, because reap removes the mark of a worker only once.
        """
        key = self.keys.worker(check_name("worker", worker))

        def body(tx: Transaction) -> bool:
            if registered := bool(tx.read(("EXISTS", key))[0]):
                tx.write("SADD", self.keys.paused, QUIET_MARK + worker)
            return registered

        return self.store.transact([key], body)

    def resume_worker(self, worker: str) -> bool:
        """Let a quiet worker take jobs again, within two seconds.

        Returns whether it is registered.
        """
        mark = QUIET_MARK + check_name("worker", worker)
        return bool(self.store.read(("SREM", self.keys.paused, mark), ("EXISTS", self.keys.worker(worker)))[1])

    # Audit ------------------------------------------------------------------------------------------------------------

    def note_action(self, by: str, action: str, target: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Add an action of an operator to the audit. `target` names what was changed.

        Keeps the last ACTIONS. If `target` has a filter, adds the counts to the step before, if
        that is at most ONE_ACTION old.
        """
        made = b""

        def body(tx: Transaction) -> None:
            nonlocal made
            newest = tx.read(("LINDEX", self.keys.audit, 0))[0]
            if tx.again and newest == made:
                return
            entry = {"at": tx.now, "by": by, "action": action, "target": dict(target), "result": dict(result)}
            before = _read_action(newest) if newest and "filter" in target else {}
            same = all(before.get(name) == entry[name] for name in ("by", "action", "target"))
            if same and tx.now - before["at"] < ONE_ACTION:
                entry["result"] = {name: before["result"].get(name, 0) + count for name, count in result.items()}
                tx.write("LTRIM", self.keys.audit, 1, -1)
            made = encode(entry)
            tx.write("LPUSH", self.keys.audit, made)
            tx.write("LTRIM", self.keys.audit, 0, ACTIONS - 1)

        self.store.transact([self.keys.audit], body)

    def audit(self, limit: int = ACTIONS) -> list[dict[str, Any]]:
        """Return the latest actions of operators, newest first.

        Each has `at`, `by` (the name of a key, or user@host), `action`, `target` and `result`.
        """
        try:
            return list(map(msgspec.json.decode, self.store.read(("LRANGE", self.keys.audit, 0, limit - 1))[0]))
        except msgspec.DecodeError as error:
            raise Corrupted(f"an action in {self.keys.audit} cannot be read: {error}") from None

    # Upkeep -----------------------------------------------------------------------------------------------------------

    def set_limit(self, limit: str, override: Override) -> None:
        """Replace the numbers of a limit, or of all of a type. Effective within two seconds.

        Raises InvalidJob for numbers that no limit can have.
        """
        self.limits.set(limit, override)

    def limits_in_use(self) -> dict[str, dict[str, Any]]:
        """Return the limits that types declare, that have held jobs, or whose numbers were set."""
        return self.limits.in_use()

    def place_among_held(self, job: Job) -> int:
        """Return the position of a job among those that its limit holds, from 1; 0: not held."""
        return self.limits.place_of(job)

    def heartbeat(
        self, worker: str, jobs: Sequence[str] = (), slots: Sequence[Job] = (), given_up: Sequence[Job] = ()
    ) -> None:
        """Renew the lease and report which jobs run. Raises Reaped if the registration is gone.

        `slots` has the same jobs as far as their types and starts are known. The handlers of the
        jobs in `given_up` still run, although these jobs were taken away from them.

        reap deletes the registration only when the lease is gone or unchanged for too long. So a
        lease that exists can be renewed with one command. An expired one is set again under WATCH
        of the registration.
        """
        about = {"at": self.now(), "jobs": list(jobs), "beat": time.monotonic_ns()}  # each one differs
        about |= {name: list(map(_slot, some)) for name, some in (("slots", slots), ("givenUp", given_up)) if some}
        beat = encode(about)
        renewal = ("SET", self.keys.lease(worker), beat, "PX", self.lease_ms)
        if self.store.read((*renewal, "XX"))[0] is not None:
            if jobs:  # if the set of workers was lost, reap must still find this one
                self.store.read(("SADD", self.keys.workers, worker))
            return

        def body(tx: Transaction) -> None:
            self._read_fenced(tx, worker, [])
            tx.write(*renewal)

        self.store.transact([self.keys.worker(worker)], body)

    def deregister(self, worker: str) -> None:
        """Remove a worker that has stopped. Requeue the jobs that it still holds, like `reap`."""
        self.store.read(("DEL", self.keys.lease(worker)))
        self.reap(worker, lost=False)

    def promote(self) -> int:
        """Move up to 500 jobs to their queues when runAt has come. Return how many ids it removed.

        Then looks at the limits whose next look is due, which counts too, and advances what other
        workers have left.

        Watches the records: a job that another promoter moved may have run, failed and be delayed
        again, and removing that new entry would lose the job. The lock only saves duplicate work.
        """

        looks: list[str] = []
        self.limits.note_looks(self.now())

        def body(tx: Transaction) -> int:
            found = tx.read(("ZRANGEBYSCORE", self.keys.delayed, "-inf", tx.now, "LIMIT", 0, PROMOTED))[0]
            marks = {entry for entry in found if entry.startswith((LOOK_MARK.encode(), SWEEP_MARK.encode()))}
            due = [entry for entry in found if entry not in marks]
            looks[:] = sorted(text_of(mark).removeprefix(LOOK_MARK) for mark in marks)
            if not due or tx.again or not tx.read(("SET", self.keys.promoter, "1", "NX", "PX", 1000))[0]:
                return 0
            tx.write("ZREM", self.keys.delayed, *due)
            for job in self._read_jobs(tx, due, watch=True):
                if job.status == "pending" and job.due <= tx.now:
                    tx.push("LPUSH", job)
                else:
                    self._set_aside(tx, job)
            tx.write("DEL", self.keys.promoter)
            return len(due)

        promoted = self.store.transact((), body)
        if SWEEP_MARK in looks:
            looks.remove(SWEEP_MARK)
            self._sweep()
        if looks or self.limits.own:
            self.limits.reconcile(looks, self.now())
        return promoted + len(looks)

    def _read_jobs(self, tx: Transaction, entries: Iterable[bytes], watch: bool = False) -> Iterable[Job]:
        """Read the jobs that list entries name, each once. Skip entries that name none."""
        ids = ids_in(entries)
        jobs = tx.read_jobs(ids, watch)
        if watch:
            _warn_of_gone([id for id in ids if id not in jobs])
        return jobs.values()

    def lost_workers(self, own: str = "", now: float | None = None, missing_for: float | None = None) -> list[str]:
        """Return the workers, except `own`, that have not renewed their lease for a lease period.

        Their lease was seen missing or unchanged for that long, by the monotonic clock of this
        process (`now`, in seconds). Leases expire by the wall clock of Redis, which somebody may
        set: set ahead, it would make living workers seem lost; set back, it would make lost workers
        seem alive. A lease that expires still counts as unchanged, because a live worker sets it
        again. Call this several times within a lease period. If `missing_for` is shorter than that,
        a missing lease needs to be seen for only so many seconds: the workers that are alive send a
        heartbeat every third of a lease.
        """
        now = time.monotonic() if now is None else now
        workers = [worker for worker in self._known_workers() if worker != own]
        leases = self.store.read(("MGET", *map(self.keys.lease, workers)))[0] if workers else []
        seen = {}
        for worker, lease in zip(workers, leases, strict=True):
            before, since = self._leases.get(worker, (lease, now))
            expired = lease is None and (missing_for is None or missing_for >= self.lease)
            seen[worker] = (lease, since if before == lease or expired else now)
        self._leases = seen
        limits = {None: self.lease if missing_for is None else missing_for}
        self._lost = {
            worker: lease for worker, (lease, since) in seen.items() if now - since >= limits.get(lease, self.lease)
        }
        return list(self._lost)

    @property
    def unleased(self) -> int:
        """How many workers had no lease when `lost_workers` last looked."""
        return sum(lease is None for lease, _ in self._leases.values())

    def reap(self, worker: str, others: int = 0, lost: bool = True) -> int:
        """Remove a lost worker and requeue or end its jobs. Return how many; 0 if it is alive.

        It is alive if its lease exists, unless `lost_workers` has seen that very lease unchanged
        for too long.

        processing -> pending, or failed if no attempt is left. Watches the registration, the lease,
        the list and the records: a worker that wakes up may be taking or starting jobs right now,
        and deleting the list would lose what it takes. Requeues an id of the list only if its job
        is pending, or processing under this worker's name. Otherwise a job that was requeued before
        and runs elsewhere would run twice. A worker that was reaped before may have taken ids
        since. They are requeued too. `others` counts the jobs that it ran in other shards. A worker
        that is `lost` is counted in this minute, with its jobs.
        """
        registration = self.keys.worker(worker)
        lease = self.keys.lease(worker)
        proc = self.keys.proc(worker)
        stale = self._lost.get(worker)

        def body(tx: Transaction) -> int:
            known, sign, entries = tx.read(("EXISTS", registration), ("GET", lease), ("LRANGE", proc, 0, -1))
            if sign is not None and sign != stale:
                return 0
            jobs = list(self._read_jobs(tx, entries, watch=True))
            beside = others + sum(job.runs_on(worker) for job in jobs) > 1
            held = 0
            for job in jobs:
                if job.status == "pending":
                    tx.push("RPUSH", job)
                elif job.runs_on(worker):
                    self._stop_attempt(tx, job, "reaped")
                    self._requeue_or_fail(tx, job, "worker lost", beside)
                else:
                    self._set_aside(tx, job)
                    continue
                held += 1
            tx.write("DEL", registration, lease, proc)
            tx.write("SREM", self.keys.workers, worker)
            tx.write("SREM", self.keys.paused, QUIET_MARK + worker)
            if lost and known:
                tx.minute[f"lost:{worker}"] += 1
                tx.minute["requeued"] += held
            self.limits.wake(tx)
            return held

        return self.store.transact([registration, lease, proc], body)

    def restore(self, id: str, completed: Collection[str] = ()) -> bool:
        """List an unended job that no list names, because a key was lost. Return whether it did.

        A pending job becomes a delayed one, which promote moves to its queue. For a processing job
        its worker's list is restored: if that worker is lost, reap requeues it. Watches the record.
        Also looks again at the parents that a job waits for. `completed` names some that are gone.
        """
        restored = False

        def body(tx: Transaction, job: Job) -> None:
            nonlocal restored
            key = self.keys.jobs(job.queue) if job.status == "pending" else self.keys.proc(job.worker)
            held = ("ZSCORE", self.keys.held(job.limit), f"{job.queue}:{id}")
            holding = ("SISMEMBER", self.keys.holding, job.limit)
            listed, delayed, *waits = tx.read(("LPOS", key, id), ("ZSCORE", self.keys.delayed, id), held, holding)
            restored = job.status in UNENDED and listed is None and delayed is None and not all(waits)
            if restored and job.status == "processing":
                tx.write("LPUSH", key, id)
                tx.write("SADD", self.keys.workers, job.worker)
                if job.limit:
                    tx.write("SADD", self.keys.running(job.limit), id)
            elif restored:
                self._set_aside(tx, job)
            self._look_again(tx, job, completed=completed)

        self._change(id, body)
        return restored

    def trim(self) -> int:
        """Delete ended jobs kept long enough, or else the oldest above KEPT. Return how many.

        Up to 1,000 of each status. Records expire by themselves, but index entries do not. Also
        forgets some queues without jobs.
        """
        self._forget_queues()
        removed = 0
        for status, keep in self.keep_ms.items():
            index = self.keys.ended[status]
            expired = ("ZRANGEBYSCORE", index, "-inf", self.now() - keep, "LIMIT", 0, MAX_JOBS)
            size, ids = self.store.read(("ZCARD", index), expired)
            if not ids and size > KEPT:
                ids = self.store.read(("ZRANGE", index, 0, min(size - KEPT, MAX_JOBS) - 1))[0]
            if ids:
                removed += self.forget(status, ids, ids if self.keeps_logs else ())
        return removed

    def _forget_queues(self) -> None:
        """Forget up to 1,000 queues without jobs, if there are more than KEPT_QUEUES queues."""
        counts, paused = self.store.read(("HGETALL", self.keys.counts), ("SMEMBERS", self.keys.paused))
        self._correct_retrying(dict(pairs(counts)))
        names = queues_in(pairs(counts)) - set(map(text_of, paused))
        if len(names) <= KEPT_QUEUES:
            return
        busy = {field.partition(":")[2] for field, count in pairs(counts) if ":" in field and count != b"0"}
        empty = sorted(names - busy)[:MAX_JOBS]
        for at in range(0, len(empty), 100):
            with suppress(Unavailable):  # too busy: they are forgotten next time
                self._forget_empty(empty[at : at + 100])

    def _correct_retrying(self, counts: Mapping[str, bytes]) -> None:
        """Reset the count of retrying jobs if no job is pending.

        Versions that do not keep this count start and end such jobs without counting them.
        """
        pending = {field: count for field, count in counts.items() if field.startswith("pending:") and count != b"0"}
        if pending or counts.get("retrying", b"0") == b"0":
            return

        def body(tx: Transaction) -> None:
            if dict(pairs(tx.read(("HGETALL", self.keys.counts))[0])) == counts:
                tx.write("HDEL", self.keys.counts, "retrying")

        self.store.transact([self.keys.counts], body)

    def _forget_empty(self, names: Sequence[str]) -> None:
        """Delete the counts of queues without jobs. Drop up to 100 ids from the list of each.

        The ids are those of cancelled jobs. Watches the counts, which every verb changes that makes
        a job pending, and the lists.
        """
        lists = [self.keys.jobs(name) for name in names]

        def body(tx: Transaction) -> None:
            fields = [(f"pending:{name}", f"processing:{name}") for name in names]
            counts, *entries = tx.read(
                ("HMGET", self.keys.counts, *itertools.chain(*fields)), *(("LRANGE", key, -100, -1) for key in lists)
            )
            idle = [at for at in range(len(names)) if {*counts[2 * at : 2 * at + 2]} <= {None, b"0"}]
            for job in self._read_jobs(tx, itertools.chain(*(entries[at] for at in idle)), watch=True):
                self._set_aside(tx, job)
            for at in idle:
                tx.write("LTRIM", lists[at], 0, -1 - len(entries[at]))
                if len(entries[at]) < 100:
                    tx.gather("HDEL", self.keys.counts, *fields[at])
                    tx.write("DEL", self.keys.bell(names[at]))

        self.store.transact([self.keys.counts, *lists], body)

    def take_snapshot(self) -> bool:
        """Store the times in the metrics, if 15 minutes have passed since the last snapshot.

        Returns whether it did. `times` compares them with later ones.
        """
        if not self.store.read(("SET", self.keys.snapshotter, "1", "NX", "EX", SNAPSHOT_EVERY))[0]:
            return False
        snapshot = encode({"at": self.now(), "times": times_by_type(self.metrics())})
        kept = ("LTRIM", self.keys.snapshots, 0, SNAPSHOTS - 1)
        self.store.read(("LPUSH", self.keys.snapshots, snapshot), kept)
        return True

    def forget(self, status: str, ids: Sequence[bytes], logged: Collection[bytes] = ()) -> int:
        """Delete ended jobs and their entries in the index of that status. Return how many.

        Also deletes the logs of those that may have some.

        Watches the records, because a job that was requeued meanwhile must stay. Completed jobs
        cannot be requeued, so these need neither a check nor a watch, and may be many. When memory
        is full, Redis refuses every transaction, and so every retry. Then this deletes without one.
        """
        index = self.keys.ended[status]
        watched = [self.keys.job(text_of(id)) for id in ids] if status != "completed" else []

        def delete(tx: Transaction, write: Callable[..., Any]) -> int:
            scores = tx.read(*(("ZSCORE", index, id) for id in ids)) if watched else ids
            gone = [id for id, score in zip(ids, scores, strict=True) if score is not None]
            if gone:
                logs = (self.keys.log(text_of(id)) for id in gone if id in logged)
                write("DEL", *(self.keys.job(text_of(id)) for id in gone), *logs)
                write("ZREM", index, *gone)
            return len(gone)

        try:
            return self.store.transact(watched, lambda tx: delete(tx, tx.write))
        except Unavailable as trouble:
            if trouble.reason != "full":
                raise
        return self.store.transact((), lambda tx: delete(tx, lambda *command: tx.read(command)))

    # Reading ----------------------------------------------------------------------------------------------------------

    def ping(self) -> None:
        """Raise Unavailable unless Redis accepts writes. The write that tries it stores nothing."""
        self.store.read(("SET", self.keys.promoter + ":none", "", "XX"))

    def get(self, id: str) -> Job | None:
        """Return the job of that id, or None."""
        if not ID.fullmatch(id):
            return None
        record = self.store.read(("GET", self.keys.job(id)))[0]
        return read_job(id, record) if record is not None else None

    def read_log(self, id: str, after: int = 0) -> tuple[Job | None, list[LogLine]]:
        """Return a job, and the lines that it logged with a number above `after`."""
        if not ID.fullmatch(id):
            return None, []
        record, lines = self.store.read(("GET", self.keys.job(id)), ("LRANGE", self.keys.log(id), 0, -1))
        if record is None:
            return None, []
        return read_job(id, record), read_lines(lines, after)

    def waiting(self, names: Sequence[str], due: bool = False) -> int:
        """Count the entries in the lists of queues that are not paused.

        This is fast, but some entries may be dropped when they are taken. `due` adds the delayed
        jobs whose time has come. They are about to be promoted.
        """
        lists = [("LLEN", self.keys.jobs(name)) for name in self._not_paused(names)]
        delayed = [("ZCOUNT", self.keys.delayed, "-inf", self.now())] if due else []
        return sum(self.store.read(*lists, *delayed)) if lists or delayed else 0

    def running(self, worker: str) -> int:
        """Count the jobs that a worker has started and not settled."""
        entries = ("LRANGE", self.keys.proc(worker), 0, -1)
        jobs = self.store.transact((), lambda tx: self._read_jobs(tx, tx.read(entries)[0]))
        return sum(job.runs_on(worker) for job in jobs)

    def cancel_requests(self, ids: Sequence[str]) -> list[str]:
        """Return those of the ids whose jobs were requested to stop."""
        records = self.store.read(("MGET", *map(self.keys.job, ids)))[0] if ids else []
        found = ((id, record) for id, record in zip(ids, records, strict=True) if record)
        return [id for id, record in found if b'"cancelRequested":true' in record and read_job(id, record).cancelled]

    def wait_for(self, id: str, seconds: float) -> Job | None:
        """Return the job once it has ended, or as it is after `seconds`; None for an unknown id.

        Whatever ends an awaited job leaves a token. In case the token is lost, this also reads the
        job every two seconds.
        """
        until = time.monotonic() + seconds
        job = self.get(id)
        if not job or job.status not in UNENDED:
            return job
        while job and job.status in UNENDED and (left := until - time.monotonic()) > 0:
            if not self.await_ends([id]):
                self.wait_for_end([id], min(left, BLOCK))
            job = self.get(id)
        self.forget_awaited([id])
        return job

    def await_ends(self, ids: Collection[str]) -> set[str]:
        """Mark jobs as awaited: their ends leave tokens. Return those that had ended before."""
        if not ids:
            return set()
        indexes = self.keys.ended.values()
        scores = [("ZSCORE", index, id) for id in ids for index in indexes]
        found = iter(self.store.read(("SADD", self.keys.awaited, *ids), *scores)[1:])
        return {id for id in ids if [next(found) for _ in indexes] != [None] * len(indexes)}

    def wait_for_end(self, ids: Collection[str], seconds: float, bell: str = "") -> str:
        """Wait until one of these awaited jobs has ended and return its id, or "" when time is up.

        Returns `bell` after `leave_token(bell)`, which wakes this call to wait for more jobs.
        """
        names = {self.keys.done(id).encode(): id for id in (*ids, *filter(None, [bell]))}
        popped = self.store.read(("BLPOP", *names, round(max(seconds, 0.01), 3)))[0]
        id = names[popped[0]] if popped else ""
        if id and id != bell:
            self.leave_token(id)  # for other callers that wait for the same job
        return id

    def leave_token(self, id: str) -> None:
        """Make `wait_for_end` return an id in one of its callers."""
        self.store.read(("LPUSH", self.keys.done(id), "1"), ("EXPIRE", self.keys.done(id), 60))

    def forget_awaited(self, ids: Collection[str]) -> None:
        """Stop awaiting jobs. Other callers that wait for them mark them again."""
        if ids:
            self.store.read(("SREM", self.keys.awaited, *ids))

    # Counting what is not a job ---------------------------------------------------------------------------------------

    def count_scrape_errors(self, times: int) -> None:
        """Add scrapes of the metrics that failed while Redis was unavailable."""
        self.store.read(("HINCRBY", self.keys.metrics, "scrapeErrors", times))

    def count_refused(self, counts: Mapping[str, int]) -> None:
        """Count refused submissions by reason, in this minute and in the metrics."""
        refused = {f"refused:{why}": n for why, n in counts.items()}
        self._count_events(refused, refused)

    def count_failed_ticks(self, counts: Mapping[str, int]) -> None:
        """Count failed ticks: by <schedule>:<error> in this minute, and all in the metrics."""
        failed = {f"failedTick:{what}": n for what, n in counts.items()}
        self._count_events(failed, {"failedTicks": sum(counts.values())})

    def _count_events(self, now: Mapping[str, int], ever: Mapping[str, int]) -> None:
        minute = self.keys.minute(self.now())
        adds = [("HINCRBY", minute, field, n) for field, n in now.items()]
        adds += [("HINCRBY", self.keys.metrics, field, n) for field, n in ever.items()]
        self.store.read(("MULTI",), *adds, ("EXPIRE", minute, MINUTE_KEPT), ("EXEC",))

    def spend(self, who: str, limit: int, seconds: int) -> tuple[int, int]:
        """Count a request of a client in the current window of `seconds`.

        Returns how many are left, below 0 if none, and in how many seconds the window ends.
        """
        now = self.now()
        key = self.keys.rate(who, now // (seconds * 1000))
        used = self.store.read(("INCR", key), ("EXPIRE", key, seconds))[0]
        return limit - used, seconds - now // 1000 % seconds

    # Load a backup ----------------------------------------------------------------------------------------------------

    def load(self, jobs: Sequence[Job], behind: bool = False) -> Loaded:
        """Store jobs of a backup under their own ids, all that can be stored. See `Loaded`.

        nothing -> pending, failed or cancelled. Each pending job goes before those that its queue
        has, or `behind` them, or among the delayed. A processing job becomes pending and its
        attempt does not count; it becomes cancelled if that was requested. Watches the records, the
        uniqueKeys and the set of paused queues: nothing is stored unless all these queues are
        paused, so no job starts before an operator has resumed its queue. Raises InvalidJob for
        more than MAX_JOBS, and Unavailable if Redis' memory is nearly used up.
        """
        if len(jobs) > MAX_JOBS:
            raise InvalidJob("jobs", f"must be at most {MAX_JOBS} at a time")
        self._check_memory()
        jobs = list({job.id: job for job in jobs}.values())
        keys = [self.keys.job(job.id) for job in jobs]
        unique = list({self.keys.unique(job.unique_key) for job in jobs if job.unique_key})

        def body(tx: Transaction) -> Loaded:
            present, paused = tx.read(("EXISTS", *keys), ("SMEMBERS", self.keys.paused))
            found = tx.read(*(("EXISTS", key) for key in keys)) if present else [0] * len(keys)
            new = [stopped(job, tx.now) for job, exists in zip(jobs, found, strict=True) if not exists]
            pending = [job for job in new if job.status == "pending"]
            unpaused = sorted({job.queue for job in pending} - set(map(text_of, paused)))
            if unpaused:
                return Loaded([], [], unpaused)
            has_keys = any(job.unique_key for job in pending)
            holders = self._without_duplicates(tx, pending) if has_keys else pending
            free = [job for job, holder in zip(pending, holders, strict=True) if job is holder]
            ended = [job for job in new if job.status != "pending" and self._left(job, tx.now) > 0]
            self._write_loaded(tx, free, ended, "LPUSH" if behind else "RPUSH")
            taken = [job.id for job, holder in zip(pending, holders, strict=True) if job is not holder]
            return Loaded(free + ended, taken, [])

        return self.store.transact([*keys, *unique, self.keys.paused], body) if jobs else Loaded([], [], [])

    def _left(self, job: Job, now: int) -> int:
        """Return the milliseconds for which an ended job is still kept."""
        return job.ended_at + self.keep_ms[job.status] - now

    def _write_loaded(self, tx: Transaction, pending: Sequence[Job], ended: Sequence[Job], push: Push) -> None:
        if pending:
            tx.write("MSET", *(part for job in pending for part in (self.keys.job(job.id), record_of(job))))
        for job in pending:
            self._add_to_queue(tx, job, push)
            tx.measure("enqueued", job)
        for job in ended:  # these count in no metric: they ended before, and an alert must not fire again
            tx.write("SET", self.keys.job(job.id), record_of(job), "PX", self._left(job, tx.now))
            tx.gather("ZADD", self.keys.ended[job.status], job.ended_at, job.id)
            tx.count(job.status)

    # For shards -------------------------------------------------------------------------------------------------------

    def claim(self, once: Once) -> None:
        """Take an Idempotency-Key for a submit that goes to another shard. Raises KeyReused.

        The other shard has the record with the job ids. The key stays taken if that submit fails.
        The same request may then be sent again.
        """
        key = self.keys.once(once.key)
        claim = ("SET", key, encode(Made(once.fingerprint, [])), "NX", "PX", self.keep_once_ms)
        stored = self.store.read(claim, ("GET", key))[1]
        if stored and read_made(stored).fingerprint != once.fingerprint:
            raise KeyReused(KEY_REUSED)

    def count_pending(self, names: Sequence[str]) -> dict[str, int]:
        """Count the pending jobs of some queues."""
        counts = self.store.read(("HMGET", self.keys.counts, *("pending:" + name for name in names)))[0]
        return dict(zip(names, map(read_count, counts), strict=True))

    def discard(self, worker: str, entries: Sequence[bytes]) -> None:
        """Drop entries of the worker's own list that cannot name a job of this queue."""
        shown = ", ".join(text_of(entry)[:50] for entry in entries[:3])
        log.warning("entries of a list that name no job of this shard were dropped: %d, %s", len(entries), ascii(shown))
        self.store.read(*(("LREM", self.keys.proc(worker), 1, entry) for entry in entries))


# What is stored beside jobs -------------------------------------------------------------------------------------------


def _read_action(stored: bytes) -> dict[str, Any]:
    """Read an action of the audit; {} if that cannot be read, so that it equals no other."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        return msgspec.json.decode(stored, type=dict[str, Any])
    return {}


def is_suspect(job: Job) -> bool:
    """Whether a job must run alone: workers were lost while running it beside other jobs."""
    return job.suspicions >= SUSPICIOUS


def _warn_of_gone(ids: Sequence[str]) -> None:
    if ids:
        text = "ids of jobs that do not exist any more were dropped: %d, such as %s; they were purged, or keys lost"
        log.warning(text, len(ids), ids[0])


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


def host_name() -> str:
    """Return the name of this host as workers register it."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:60] or "host"


def new_worker_id() -> str:
    """Make an id of up to WORKER_ID characters: short, because every ended job keeps its worker's.

    A long host name is shortened to the end of its first part, which differs between pods.
    """
    host = host_name()
    end = f"-{os.getpid()}-{os.urandom(4).hex()}"
    room = WORKER_ID - len(end)
    return (host if len(host) <= room else host.partition(".")[0][-room:].lstrip("-_")) + end


def _slot(job: Job) -> dict[str, Any]:
    return {"jobId": job.id, "type": job.type, "startedAt": job.started_at}


# Metrics --------------------------------------------------------------------------------------------------------------


def _learn_series(store: Store) -> None:
    store.series_known = True  # at once, so that other threads do not read them too
    try:
        found = store.read(("SMEMBERS", store.keys.series))[0]
    except Unavailable as trouble:
        store.series_known = False
        if trouble.reason == "timeout":  # the transaction would only wait as long again
            raise
    else:
        store.series |= set(map(text_of, found))


def _metric_commands(store: Store, tx: Transaction) -> list[Command]:
    """Add up the events of all jobs of one type and queue.

    Above SERIES of them, new ones count as other, so that invented names fill neither Redis nor
    Prometheus. Processes that meet new ones at the same moment may exceed SERIES a little.
    """
    if not tx.measured:
        return []
    met = {f"{type}:{queue}" for _, type, queue in tx.measured}
    new = sorted(met - store.series)[: max(0, SERIES - len(store.series))]
    if new:
        store.series |= set(new)
        store.series_known = False
    sums: defaultdict[str, int] = defaultdict(int)
    for (event, type, queue), times in tx.measured.items():
        name = known if (known := f"{type}:{queue}") in store.series else "other:other"
        if event == "completed":
            tx.minute["completed:" + name.partition(":")[0]] += len(times)
        if times[0] < 0:
            sums[f"{event}:{name}"] += len(times)
        else:
            sums[f"{event}Ms:{name}"] += sum(times)
            for ms in times:
                sums[f"{event}:{name}:{BUCKETS[bisect_left(BUCKETS, ms)]}"] += 1
    for (type, queue, error), count in tx.errors.items():
        if len(store.errors) < SERIES:
            store.errors.add(error)
        known_error = error if error in store.errors else "other"
        tx.minute[f"error:{type if f'{type}:{queue}' in store.series else 'other'}:{known_error}"] += count
    added: list[Command] = [("SADD", store.keys.series, *new)] if new else []
    return added + [("HINCRBY", store.keys.metrics, field, by) for field, by in sums.items() if by]
