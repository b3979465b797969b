"""The worker process, and the commands that start processes: `run`, `worker` and `web`.

    python worker.py           run jobs until SIGTERM or Ctrl-C; the same as `python worker.py run`
    python worker.py --help    list all commands and settings
    tinyqueue                  the same command line where TinyQueue is installed

The other commands are in tinyqueue_cli.py.

The methods of a worker are grouped by the thread that runs them:

    main      waits for a stop request, enforces timeouts, and checks that the others make progress
    slots     run handlers. A slot that finds no job in the inbox exchanges all outcomes that have
              piled up for as many new jobs, while the other slots run handlers
    taker     takes jobs for the slots that got none in an exchange. If no jobs are left, it waits
              for the bell. It adopts jobs after a lost reply, and starts suspects alone
    settlers  save the outcomes that were not exchanged, one thread for each shard
    keeper    sends heartbeats, promotes, reaps, trims, syncs schedules and enqueues their jobs, and
              passes on cancellation requests

A slot is free once its handler has returned and its outcome was exchanged, or left to a settler. No
job is taken before a slot is free for it, so no job waits behind a long one inside a worker. The
jobs in the inbox, the running handlers and the outcomes that nobody saves yet are together never
more than the slots. So there is always an idle slot to wake for a job or an outcome.
tests/cycle_model.py checks that in every interleaving. With shards, nothing is exchanged: the taker
takes all jobs, and the settlers save all outcomes.

A worker that stops takes no more jobs. A stop has one of three modes. `drain` lets the handlers
finish, and releases what still runs when time is up. `release` and `broken` release everything at
once; after `broken` the process exits with 70.

A worker with a time limit (`until`) is a guest in a process that goes on after it, such as the web
process that answers POST /work. It drains shortly before that time and interrupts the handlers
whose jobs it releases. When `run` returns, it is deregistered, and only handlers that cannot be
interrupted still have a thread.
"""

from __future__ import annotations

import itertools
import logging
import math
import resource
import signal
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal

import click

import tinyqueue_cli
from tinyqueue import (
    BLOCK,
    HANDLERS,
    MAX_JOBS,
    PROMOTED,
    Corrupted,
    Job,
    Outcome,
    Queue,
    Reaped,
    TinyQueueError,
    Unavailable,
    backoff,
    check_name,
    is_suspect,
)
from tinyqueue_config import (
    EXIT_TIME,
    SIGNALS,
    Settings,
    error_line,
    exit_at_sigterm,
    exit_now,
    load_handlers,
    plural,
    process_warnings,
    reset_signals_in_children,
    variable,
)
from tinyqueue_doctor import warnings
from tinyqueue_log import capturing, recapture
from tinyqueue_repair import find_broken, find_forgotten, repair
from tinyqueue_schedule import Scheduler
from tinyqueue_shards import AnyQueue
from tinyqueue_slot import Slot

log = logging.getLogger("tinyqueue.worker")

TICK = 0.25  # seconds between two checks of the handlers' timeouts
SHORT_TICK = 0.005  # the same while a handler cannot be interrupted yet, or while too many outcomes are unsaved
LOG_EVERY = 1.0  # seconds between two writes of what a job logs
PROMOTE_EVERY = 1.0  # seconds; a delayed job is promoted about that late at most, and a tick comes about that late
SOON = 2.0  # seconds that a burst waits for a rate, at most
LATE = 1.0  # seconds until a job that a rate lets start is in its list, at most
SYNC_EVERY = 60.0
REAP_EVERY = 5.0
TRIM_EVERY = 60.0
WARN_EVERY = 10.0  # seconds between two log lines with the same warning
CLOSING = 1.0  # seconds for the end of the threads and to deregister, even if Redis hangs
LAST_WRITE = 2.0  # seconds to save the last outcomes after the drain: 25 + 2 + 1 is less than the 30 of platforms
RUN_OUT = 3.0  # seconds before its time limit in which a worker takes no more jobs, at most a quarter of its time
UNSETTLED = 100  # jobs that have run and are not settled, above which no more are taken
EXIT_BROKEN = 70  # EX_SOFTWARE: the process cannot do its work, and a restart may help


def _resident_memory() -> int:
    """Return the bytes of memory in use; without /proc, the most that were ever in use."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# The worker -----------------------------------------------------------------------------------------------------------

StopMode = Literal["drain", "release", "broken"]
Batch = tuple[list[Outcome], bool]  # outcomes to save, and whether they may have been saved before


class Worker:
    """Runs the jobs of some queues until it is stopped.

    With `burst`, it stops when no job is due, no rate has room for a held one within SOON seconds,
    and no other worker has lost its lease. It stops at `until`, in monotonic seconds, in any case:
    then the process goes on after it.
    """

    beat_at_once = False  # whether the next heartbeat must not wait
    quiet = False  # whether this worker last logged that it is quiet

    def __init__(
        self,
        queue: AnyQueue,
        settings: Settings,
        names: Sequence[str] = (),
        burst: bool = False,
        until: float = math.inf,
    ) -> None:
        self.queue = queue
        self.settings = settings
        self.burst = burst
        self.room_at = -math.inf  # until when a burst waits for a held job that a rate lets start
        self.until = until
        self.take_until = until - min(RUN_OUT, (until - time.monotonic()) / 4) if until < math.inf else until
        self.names = list(names) or list(dict.fromkeys(["default", *(handler.queue for handler in HANDLERS.values())]))
        self.deliveries_due = True  # the queue webhooks may have jobs: its bell rang, or may have been lost
        self.id = ""  # the registered worker id; empty while not registered
        self.held: dict[str, Job] = {}  # jobs that were started and are not settled
        self.lock = threading.Lock()  # for `id` and `held` together
        self.stop_requests: SimpleQueue[StopMode] = SimpleQueue()
        self.free_slots: SimpleQueue[None] = SimpleQueue()  # an entry for each free slot that the taker has not counted
        self.inbox: deque[Job] = deque()  # jobs that were started, for the slots
        self.outcomes: deque[Outcome] = deque()  # of the slots, not yet exchanged
        self.wakes: SimpleQueue[bool] = SimpleQueue()  # wakes a slot: True to look for work, False to end
        self.waking = False  # a slot was woken and has not looked yet
        # Held to take, adopt and start: an id whose reply is on its way must not be adopted.
        self.cycle = threading.Lock()
        self.alone = False  # nothing else may start: a suspect runs, or will once all others have ended
        # One for each shard, with a settler: a shard that is away holds up no outcome of others.
        self.outboxes: dict[Queue, SimpleQueue[Batch | None]] = {part: SimpleQueue() for part in queue.parts}
        self.pool = ThreadPoolExecutor(2 * settings.worker_concurrency, "slot")  # stuck slots are replaced
        self.slot_runs: list[Future[None]] = []
        self.slots: list[Slot] = []
        self.stuck: list[Slot] = []  # they were replaced
        self.stopping = threading.Event()  # the taker must take no more jobs
        self.closed = threading.Event()  # the settlers and the keeper must end
        self.adopt_at = 0.0  # when the taker next looks for jobs whose replies were lost
        self.all_busy = False  # True while the taker waits for slots: that is not a hang
        self.at_bell = False  # True while the taker waits for the bell: after a stop it takes nothing then
        self.last_take = time.monotonic()  # when Redis last answered a take or an exchange, even without a job
        self.last_upkeep = time.monotonic()  # when the keeper last began one of its duties
        self.exit_by = 0.0  # when this process must have exited, once it stops
        self.started = 0  # jobs that were started so far
        self.counts = Counter[str]()  # attempts that have ended, by their outcome
        self.looked = threading.Event()  # the keeper has looked for lost workers
        self.unleased: dict[Queue, int] = {}  # how many workers had no lease then, in each shard
        self.last_reap_check = time.monotonic()
        self.late_reap_check = time.monotonic()  # the last check that came too late after the one before it
        self.scheduler = Scheduler(queue, settings.handlers)
        self.warned: dict[str, float] = {}  # when each warning was last logged

    def stop(self, mode: StopMode) -> None:
        """Request a stop. Safe in a signal handler, because SimpleQueue.put is reentrant."""
        self.stop_requests.put(mode)

    # Main thread ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Work until a stop is requested, then stop and return the exit code of the process.

        A taker that waits for the bell may outlive this by BLOCK seconds. It takes no more jobs.
        """
        for part in self.queue.parts:
            part.keeps_logs = self.settings.job_logs or any(handler.logs for handler in HANDLERS.values())
        with capturing() if self.queue.parts[0].keeps_logs else nullcontext():
            return self._run()

    def _run(self) -> int:
        for _ in range(self.settings.worker_concurrency):
            self._add_slot()
        taker = self._start_thread("taker", self._take_jobs)
        settlers = [self._start_thread("settler", partial(self._save_outcomes, part)) for part in self.queue.parts]
        keeper = self._start_thread("keeper", self._keep)
        mode = self._wait_for_stop()
        self.stopping.set()
        self.free_slots.put(None)  # wakes the taker if it waits for a slot
        log.info("worker stopping (%s); running jobs: %d", mode, len(self.held))
        return self._close(self._drain(mode, taker), keeper, *settlers)

    def _start_thread(self, name: str, target: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._run_thread, args=(target,), name=name, daemon=True)
        thread.start()
        return thread

    def _run_thread(self, target: Callable[[], None]) -> None:
        """Run a thread. If it crashes, the worker stops, because it cannot work without it."""
        try:
            target()
        except BaseException:
            log.critical("%s thread crashed; shutting down", threading.current_thread().name, exc_info=True)
            self.stop("broken")

    def _wait_for_stop(self) -> StopMode:
        pause = TICK
        while True:
            with suppress(Empty):
                return self.stop_requests.get(timeout=pause)
            pause = TICK if self._enforce_timeouts() else SHORT_TICK
            if problem := self._find_hang():
                log.critical("%s; shutting down because a restart may help", problem)
                return "broken"
            if time.monotonic() >= self.take_until:
                return "drain"
            if limit := self._find_limit():
                log.info("%s; stopping, to be restarted", limit)
                return "drain"

    def _find_hang(self) -> str:
        """Return what has not happened for as long as the watchdog allows."""
        now = time.monotonic()
        unsaved = min((job.__dict__.get("_ended", now) for job in tuple(self.held.values())), default=now)
        since = {
            "no contact with Redis": self.queue.last_contact,
            "slots are free, but no jobs could be taken": now if self.all_busy else self.last_take,
            "the outcome of a job could not be saved": unsaved,
            "no heartbeat and no other upkeep": self.last_upkeep,
        }
        limit = self.settings.watchdog
        return next((f"{problem} for {limit} s" for problem, at in since.items() if now - at > limit), "")

    def _find_limit(self) -> str:
        """Return which of MAX_JOBS and MAX_MEMORY was reached. One job always runs."""
        jobs = self.settings.max_jobs
        memory = self.settings.max_memory
        if jobs and self.started >= jobs:
            return f"{plural(self.started, 'job was', 'jobs were')} started"
        if memory and self.started and (used := _resident_memory() >> 20) >= memory:
            return f"{used} MB of memory are in use"
        return ""

    def _enforce_timeouts(self) -> bool:
        """Interrupt handlers that exceed their timeout, and replace stuck slots, without Redis.

        Returns False if a handler could not be interrupted yet.
        """
        now = time.monotonic()
        done = True
        for slot in tuple(self.slots):
            done = slot.interrupt(now) and done
            if not slot.is_stuck(now):
                continue
            self.stuck.append(slot)  # first, because once it is abandoned its thread may remove it from the list
            if not (outcome := slot.give_up()):
                self.stuck.remove(slot)
                continue
            self.beat_at_once = True
            job = outcome.job
            log.error("job %s (%s) did not stop after its timeout; its thread was abandoned", job.id, job.type)
            self._put([outcome])
            self.slots.remove(slot)
            if len(self.stuck) >= self.settings.worker_concurrency:
                self.stop("broken")
            else:
                self._add_slot()
        return done

    def _add_slot(self) -> None:
        self.slot_runs = [*self.running_slots(), self.pool.submit(self._run_thread, self._run_slot)]
        self.free_slots.put(None)

    def _drain(self, mode: StopMode, taker: threading.Thread) -> StopMode:
        """Let handlers finish until time is up, then release the rest. Returns the last mode."""
        deadline = min(time.monotonic() + self.settings.shutdown_timeout, self.until)
        self.exit_by = deadline + LAST_WRITE + CLOSING
        while self._has_work(taker) and mode == "drain" and time.monotonic() < deadline:
            with suppress(Empty):
                mode = self.stop_requests.get(timeout=0.02)
            self._enforce_timeouts()
        deadline = time.monotonic() + LAST_WRITE
        while self._has_work(taker) and time.monotonic() < deadline:
            self._release_jobs()
            time.sleep(0.02)
        return mode

    def _has_work(self, taker: threading.Thread) -> bool:
        """Whether jobs are held, or the taker may be about to start some.

        If the process goes on, the taker must have ended: it waits for the bell only briefly then.
        """
        taking = taker.is_alive() and (self.until < math.inf or not self.at_bell)
        return taking or bool(self.held)

    def _release_jobs(self) -> None:
        """Release the jobs in the inbox and those that run. Their handlers run until the exit.

        If the process goes on, they are interrupted instead. First leaves all outcomes to the
        settlers: no slot can exchange them while the taker holds the cycle and waits for a reply.
        """
        self._put(self._collect_outcomes())
        jobs = [job for slot in tuple(self.slots) if (job := slot.abandon())]
        self._evict_handlers()
        with suppress(IndexError):
            while True:
                jobs.append(self.inbox.popleft())
        if jobs:  # in one batch, in the order in which they were taken, so that the queue keeps its order
            with self.lock:
                position = {id: at for at, id in enumerate(self.held)}
            jobs.sort(key=lambda job: position.get(job.id, 0))
            self._put([Outcome(job, "release") for job in jobs])

    def _evict_handlers(self) -> None:
        """End the threads of handlers whose jobs were released, if the process goes on."""
        for slot in (*self.slots, *self.stuck) if self.until < math.inf else ():
            slot.evict()

    def _close(self, mode: StopMode, keeper: threading.Thread, *settlers: threading.Thread) -> int:
        """End the threads, deregister and return the exit code, within a second."""
        until = time.monotonic() + CLOSING
        self.closed.set()
        for outbox in self.outboxes.values():
            outbox.put(None)
        # In a thread of its own, which the process does not wait for if Redis hangs.
        leave = threading.Thread(target=self._deregister, args=(keeper,), name="leaver", daemon=True)
        leave.start()
        for thread in (*settlers, leave):
            thread.join(max(0.0, until - time.monotonic()))
        self._end_slots(until)
        if self.held:
            problem = "could not save the outcome of %s, which will run again when this worker's lease expires"
            log.error(problem, plural(len(self.held), "job"))
        log.info("worker stopped")
        return EXIT_BROKEN if mode == "broken" else int(bool(self.held))

    def _end_slots(self, until: float) -> None:
        """End the slots. If the process goes on, wait for their threads too."""
        for _ in self.slot_runs:
            self.wakes.put(False)
        self.pool.shutdown(wait=False)
        while self.until < math.inf and (left := self.running_slots()) and time.monotonic() < until:
            self._evict_handlers()  # again: an exception may have been too dangerous before
            wait(left, SHORT_TICK)

    def running_slots(self) -> list[Future[None]]:
        """Return the runs of slots that have not ended."""
        return [run for run in self.slot_runs if not run.done()]

    def _deregister(self, keeper: threading.Thread) -> None:
        """Remove this worker from every shard, except those that have jobs it has not settled."""
        keeper.join(CLOSING / 2)  # a heartbeat that is on its way would renew the lease
        with self.lock:
            unsettled = {self.queue.part_of(id) for id in self.held}
        for part in self.queue.parts if self.id else ():
            if part not in unsettled:
                with suppress(TinyQueueError):
                    part.deregister(self.id)

    # Taker thread -----------------------------------------------------------------------------------------------------

    def _take_jobs(self) -> None:
        free = 0
        failures = 0
        while True:
            free += self._count_free_slots(wait=free < 1)
            if self.stopping.is_set():
                return
            if free < 1:  # a suspect was started before the slots that became free were counted
                continue
            worker = self.id
            try:
                worker = worker or self._register()
                with self._in_cycle():
                    most = min(free, self._room())
                    taken, jobs = self._next_jobs(worker, most)
                    started = self._begin(jobs)
                free -= started
                self.last_take = time.monotonic()
                failures = 0
                self._wait_for_suspect(jobs)
                for job in (job for job in jobs if job.status == "pending"):
                    if is_suspect(job):
                        free -= self._start_alone(worker, job)
                    else:  # a reply was lost: adopt finds what is still in the list
                        self.adopt_at = 0.0
                if most < 1:
                    self.stopping.wait(SHORT_TICK)
                elif taken < most:
                    self._wait_for_bell(worker)
            except Reaped as error:
                self._give_up(worker, error)
            except TinyQueueError as error:
                self.adopt_at = 0.0
                failures += 1
                self._warn("take jobs", error)
                self.stopping.wait(backoff(failures, 0.1, 5.0))

    def _count_free_slots(self, wait: bool) -> int:
        """Count the slots that have become free; with `wait`, wait for one, or for the stop."""
        if wait:
            self.all_busy = True
            self.free_slots.get()
            self.all_busy = False
            self.last_take = time.monotonic()
        count = int(wait)
        with suppress(Empty):
            while True:
                self.free_slots.get_nowait()
                count += 1
        return count

    def _room(self) -> int:
        """Return how many jobs to take: those that have run and are not settled are bounded."""
        unsettled = self.settings.worker_concurrency + UNSETTLED - len(self.held)
        left = self.settings.max_jobs - self.started
        return min(unsettled, left) if self.settings.max_jobs else unsettled

    def _register(self) -> str:
        worker = self.queue.register(self.names, self.settings.worker_concurrency)
        with self.lock:
            self.id = worker
        log.debug("worker %s registered", worker)
        return worker

    def _next_jobs(self, worker: str, free: int) -> tuple[int, list[Job]]:
        """Take and start jobs for the free slots. Returns how many ids were taken, and the jobs."""
        if free < 1:
            return 0, []
        with self.lock:  # before `adopt` reads the list, so that a job that is settled meanwhile is known here
            held = dict(self.held)
        ids: list[bytes] = []
        if time.monotonic() >= self.adopt_at:
            self.deliveries_due = True
            ids = self.queue.adopt(worker, held)[:free]
            self.adopt_at = time.monotonic() + self.queue.lease if len(ids) < free else 0.0
        if len(ids) < free:
            ids += self.queue.take(worker, self._names(), free - len(ids))
            self.deliveries_due = self.deliveries_due and len(ids) == free
        return len(ids), self.queue.start(worker, ids, held) if ids else []

    def _names(self) -> list[str]:
        """Return the queues to take from now.

        Leaves out `webhooks` while no delivery is due. A take from a queue costs a round trip, and
        most workers never find deliveries.
        """
        usual = [name for name in self.names if name != "webhooks" or self.deliveries_due]
        return usual or self.names

    @contextmanager
    def _in_cycle(self) -> Iterator[None]:
        """Hold the cycle, then wake a slot for what has piled up, even after an error (taker)."""
        try:
            with self.cycle:
                yield
        finally:
            if self.inbox or self.outcomes:
                self._wake_slot()

    def _begin(self, jobs: Sequence[Job]) -> int:
        """Give the started jobs to the slots and return how many. The caller holds the cycle."""
        started = [job for job in jobs if job.status == "processing"]
        self.started += len(started)
        with self.lock:
            self.held.update((job.id, job) for job in started)
        self.inbox += started
        return len(started)

    def _wait_for_suspect(self, jobs: Sequence[Job]) -> None:
        """Wait until a suspect among these jobs has ended, if it was started."""
        if any(is_suspect(job) and job.status == "processing" for job in jobs):
            self._wait_until_idle()

    def _start_alone(self, worker: str, suspect: Job) -> int:
        """Start a suspect once nothing else runs, so that no other job dies with this worker."""
        if not self._wait_until_idle() or self._room() < 1:
            return 0
        with self._in_cycle():
            jobs = self.queue.start(worker, [suspect.id.encode()], {})
            started = self._begin(jobs)
        self._wait_for_suspect(jobs)
        return started

    def _wait_until_idle(self) -> bool:
        """Wait until every started job is settled. Returns False if the worker is stopping."""
        self.all_busy = True
        self.alone = True
        while self.held and not self.stopping.wait(0.02):
            pass
        self.all_busy = False
        self.alone = False
        self.last_take = time.monotonic()
        return not self.stopping.is_set()

    def _wait_for_bell(self, worker: str) -> None:
        """Wait until a job may be there. Reads the lists after each wait: a bell may be lost."""
        while not self.stopping.is_set() and time.monotonic() < self.adopt_at and self.id == worker:
            if self.burst and self._nothing_is_due():
                self.stop("drain")
                return
            self.at_bell = True
            try:
                rung = self.queue.wait(self.names, 0.1 if self.burst else BLOCK, worker)
            except Corrupted as error:  # a bell of the wrong type does not keep jobs from being taken
                self._warn("wait for the bell", error)
                rung = set() if self.stopping.wait(0.5) else set(self.names)
            finally:
                self.at_bell = False
            self._note_quiet(worker)
            # If the bell of deliveries is lost, the next adoption looks. A burst has none.
            self.deliveries_due = self.deliveries_due or self.burst or "webhooks" in rung
            if rung or self.queue.waiting(self._names()):
                return
            self.last_take = time.monotonic()

    def _note_quiet(self, worker: str) -> None:
        """Log when this worker becomes quiet, and when it takes jobs again."""
        if (quiet := self.queue.is_quiet(worker)) != self.quiet:
            self.quiet = quiet
            log.info("worker %s %s", worker, "is quiet: it takes no more jobs" if quiet else "takes jobs again")

    def _nothing_is_due(self) -> bool:
        """Whether a burst may end. If a worker has no lease, its jobs may be requeued soon."""
        if (soon := self.queue.seconds_to_look) < SOON:
            self.room_at = time.monotonic() + soon + LATE
        if self.queue.promote() or self.held or not self.looked.wait(0.1) or any(self.unleased.values()):
            return False
        # Then another thread may look, and wake a held job a moment later.
        if self.queue.waiting(self.names, due=True) or time.monotonic() < self.room_at:
            return False
        return time.monotonic() < self.adopt_at  # otherwise an exchange failed, and may have taken jobs

    # Slot threads -----------------------------------------------------------------------------------------------------

    def _run_slot(self) -> None:
        slot = Slot(self.settings.job_logs)
        self.slots.append(slot)
        while job := self._next_job():
            if self.inbox or self.outcomes:  # this handler may run for long
                self._wake_slot()
            outcome = slot.run(job)
            if outcome is None:
                if slot in self.stuck:
                    self.stuck.remove(slot)
                    self.beat_at_once = True
                return
            outcome.job.__dict__["_ended"] = time.monotonic()
            if len(self.outboxes) == 1:
                self.outcomes.append(outcome)
            else:
                # With an exchange, a slot would stay with the shard of its first job.
                self._put([outcome])
                self.free_slots.put(None)

    def _next_job(self) -> Job | None:
        """Return a job from the inbox, or from an exchange. None if this slot must end."""
        while True:
            with suppress(IndexError):
                return self.inbox.popleft()
            if self._exchange():
                continue
            if not self.wakes.get():
                return None
            self.waking = False  # before the next look, because whoever sees it set relies on that look

    def _wake_slot(self) -> None:
        """Wake an idle slot, unless one is waking. It wakes the next if it leaves something."""
        if not self.waking:
            self.waking = True
            self.wakes.put(True)

    def _exchange(self) -> bool:
        """Save the outcomes that have piled up, and start as many jobs.

        Returns False if there are none, or if another thread holds the cycle: it will look again.
        """
        if not self.outcomes or not self.cycle.acquire(blocking=False):
            return False
        try:
            outcomes = self._collect_outcomes()
            try:
                started = self._save_and_start(self.id, outcomes) if outcomes else 0
            except BaseException:  # the worker will stop; the settlers save these outcomes before it does
                self._put(outcomes, again=True)
                raise
        finally:
            self.cycle.release()
        for _ in range(len(outcomes) - started):
            self.free_slots.put(None)
        return True

    def _collect_outcomes(self) -> list[Outcome]:
        """Take the outcomes that have piled up (slots, main)."""
        outcomes: list[Outcome] = []
        with suppress(IndexError):
            while len(outcomes) < MAX_JOBS:
                outcomes.append(self.outcomes.popleft())
        return outcomes

    def _save_and_start(self, worker: str, outcomes: list[Outcome]) -> int:
        """Exchange outcomes for jobs, and return how many jobs.

        After an error, the settler saves the outcomes and the taker takes jobs.
        """
        with self.lock:
            held = dict(self.held)
        taker_first = self.stopping.is_set() or self.alone or time.monotonic() >= self.adopt_at
        most = 0 if taker_first else max(0, min(len(outcomes), self._room()))
        again = False
        try:
            if all(outcome.job.worker == worker for outcome in outcomes):
                others, jobs = self.queue.parts[0].exchange(worker, outcomes, self._names(), most, held)
                started = self._begin(jobs)  # before the outcomes leave `held`, so that no waiter finds it empty
                if started < len(jobs):  # a suspect, or a reply was lost
                    self.adopt_at = 0.0
                self.last_take = time.monotonic()
                self._note_saved(outcomes, [outcome for outcome in outcomes if outcome not in others])
                return started
        except Reaped as error:
            self._give_up(worker, error)
        except TinyQueueError as error:
            again = getattr(error, "doubtful", False) or getattr(error, "applied", False)
            self._warn("save outcomes and take jobs", error)
        self.adopt_at = 0.0
        self._put(outcomes, again)
        return 0

    # Settler thread ---------------------------------------------------------------------------------------------------

    def _put(self, outcomes: Sequence[Outcome], again: bool = False) -> None:
        """Leave outcomes to the settlers of their shards (main, slots)."""
        for part, outbox in self.outboxes.items():
            if own := [outcome for outcome in outcomes if self.queue.part_of(outcome.job.id) is part]:
                outbox.put((own, again))

    def _save_outcomes(self, part: Queue) -> None:
        outbox = self.outboxes[part]
        while (batch := outbox.get()) is not None:
            outcomes, again = batch
            with suppress(Empty):
                while len(outcomes) < MAX_JOBS:
                    if (more := outbox.get_nowait()) is None:
                        outbox.put(None)  # for the outer loop, after this batch
                        break
                    outcomes = outcomes + more[0]
                    again = again or more[1]
            self._save(outcomes, again)

    def _save(self, outcomes: list[Outcome], again: bool) -> None:
        """Save outcomes of one shard, however long it takes; drop them if the worker was reaped."""
        failures = 0
        saved: list[Outcome] = []
        while own := [outcome for outcome in outcomes if outcome.job.worker == self.id]:
            worker = own[0].job.worker
            try:
                others = self.queue.settle(worker, own, again)
                saved = [outcome for outcome in own if outcome not in others] if others else own
                break
            except Reaped as error:
                self._drop_jobs(worker, error)
                break
            except (Unavailable, Corrupted) as error:
                if getattr(error, "applied", False):  # one key has the wrong type; everything else was written
                    log.error("outcomes were saved except in one key: %s", error)
                    saved = own
                    break
                again = again or getattr(error, "doubtful", False)
                failures += 1
                self._warn("save outcomes", error)
                if self.closed.wait(backoff(failures, 0.1, 5.0)):
                    return
        self._note_saved(outcomes, saved)

    def _note_saved(self, outcomes: Sequence[Outcome], saved: Sequence[Outcome]) -> None:
        """Remove the jobs from `held`, and log their outcomes (settlers, slots)."""
        with self.lock:
            for outcome in outcomes:
                if self.held.get(outcome.job.id) is outcome.job:
                    del self.held[outcome.job.id]
            saved_ids = {outcome.job.id for outcome in saved}
            self.counts.update(_fate(outcome) if outcome.job.id in saved_ids else "lost" for outcome in outcomes)
        _log_outcomes(outcomes, saved)

    def _give_up(self, worker: str, reaped: Reaped) -> None:
        """Drop all jobs of a reaped worker, and requeue what it just took (taker, slots)."""
        self._drop_jobs(worker, reaped)
        self.adopt_at = 0.0
        for part in reaped.parts or self.queue.parts:
            with suppress(TinyQueueError):
                part.reap(worker)

    def _drop_jobs(self, worker: str, reaped: Reaped) -> None:
        """Drop all jobs after this worker was reaped (taker, slots, settlers, keeper).

        If only some shards reaped it, the heartbeat registers it there again under the same id. An
        outcome of a job that it lost there is not saved, because the record has another attempt.
        """
        with self.lock:
            if not worker or self.id != worker:
                return
            if reaped.parts:
                log.warning("worker %s lost its lease in a shard; its jobs there were requeued", worker)
                return
            log.warning("worker %s lost its lease; %s requeued", worker, plural(len(self.held), "job"))
            self.id = ""
            self.held.clear()

    # Keeper thread ----------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        lease = self.queue.lease
        duties: list[tuple[str, Callable[[], None], float]] = [
            ("send a heartbeat", self._heartbeat, lease / 3),
            ("promote jobs", self._promote, PROMOTE_EVERY),
            ("sync schedules", self.scheduler.sync, SYNC_EVERY),
            ("enqueue the jobs of schedules", self.scheduler.tick, PROMOTE_EVERY),
            ("read cancellation requests", self._pass_on_cancellations, PROMOTE_EVERY),
            ("reap workers", self._reap, min(lease / 6, PROMOTE_EVERY if self.burst else REAP_EVERY)),
            ("write the logs of jobs", self._write_logs, LOG_EVERY),
            ("trim ended jobs", self._trim, TRIM_EVERY),
        ]
        due = [0.0] * len(duties)
        while not self.closed.is_set():
            if self.beat_at_once:
                due[0] = 0.0
            for at, (name, duty, interval) in enumerate(duties):
                if time.monotonic() < due[at]:
                    continue
                self.last_upkeep = time.monotonic()
                # Before the worker is registered, its heartbeat does nothing: it stays due.
                due[at] = self.last_upkeep + (interval if self.id or duty != self._heartbeat else 0.0)
                try:
                    duty()
                except TinyQueueError as error:
                    self._warn(name, error)
                    if duty == self._heartbeat:  # it cannot wait for the next interval: the lease would soon expire
                        due[at] = 0.0
            pause = min(TICK, max(0.0, self.queue.seconds_to_look))
            if pause < TICK:
                due[1] = 0.0  # a rate has room then, and promote looks at its limit
            self.closed.wait(pause)

    def _heartbeat(self) -> None:
        if worker := self.id:
            try:
                self._beat(worker)
            except Reaped as error:
                self._drop_jobs(worker, error)
                if error.parts:
                    self._beat(worker)

    def _beat(self, worker: str) -> None:
        self.beat_at_once = False
        with self.lock:
            held = dict(self.held)
        given_up = [job for slot in tuple(self.stuck) if (job := slot.given_up)]
        self.queue.heartbeat(worker, list(held), list(held.values()), given_up)

    def _promote(self) -> None:
        while self.queue.promote() >= PROMOTED and not self.closed.is_set():
            self.last_upkeep = time.monotonic()

    def _pass_on_cancellations(self) -> None:
        """Set cancel_requested on running jobs whose handlers take a Job."""
        with self.lock:
            jobs = {id: job for id, job in self.held.items() if job.type in HANDLERS and HANDLERS[job.type].wants_job}
        for id in self.queue.cancel_requests([id for id, job in jobs.items() if not job.cancel_requested]):
            jobs[id].cancel_requested = True

    def _write_logs(self) -> None:
        """Write what running jobs have logged since the last time."""
        with self.lock:
            jobs = [job for job in self.held.values() if "_log" in job.__dict__]
        if jobs:
            recapture()
        for job in jobs:
            with suppress(Reaped):  # the job has just ended, or the heartbeat will find that it is lost
                self.queue.write_log(job)

    def _reap(self) -> None:
        """Reap lost workers, unless a Redis command failed within the last lease period.

        Such trouble may have kept healthy workers from renewing their leases. If Redis or this
        machine freezes, no command fails, but too much time passes between two checks.

        A burst is too short for that. To it, a lease counts as lost if it is missing for half a
        lease without such trouble, because healthy workers send heartbeats more often.
        """
        now = time.monotonic()
        lease = self.queue.lease
        patience = lease / 2 if self.burst else lease
        if now - self.last_reap_check > lease / 2:  # a live worker's lease always has at least that much left
            self.late_reap_check = now
        self.last_reap_check = now
        lost: defaultdict[str, list[Queue]] = defaultdict(list)
        for part in self.queue.parts:
            try:
                expired = part.lost_workers(own=self.id, missing_for=patience)
                self.unleased[part] = part.unleased
            except TinyQueueError as error:  # the other shards still need their jobs back
                self._warn("reap workers", error)
                self.unleased[part] = 0
                continue
            if now - max(self.late_reap_check, part.last_trouble) >= patience:
                for worker in expired:
                    lost[worker].append(part)
        self.looked.set()
        for worker, parts in lost.items():
            self.last_upkeep = time.monotonic()
            if count := self.queue.reap_in(parts, worker):
                log.warning("lease of worker %s expired; %s requeued or ended", worker, plural(count, "job"))

    def _trim(self) -> None:
        while self.queue.trim() >= MAX_JOBS and not self.closed.is_set():
            self.last_upkeep = time.monotonic()
        for finding in find_forgotten(self.queue):
            log.warning("repaired after a token was lost: %s", finding.seen)
        if broken := find_broken(self.queue):  # in a thread, because the lease must be renewed meanwhile
            threading.Thread(target=self._repair, args=(broken,), daemon=True).start()
        self.queue.take_snapshot()

    def _repair(self, broken: Sequence[Queue]) -> None:
        try:
            for finding in repair(broken):
                log.warning("repaired after keys were lost: %s", finding.seen)
        except TinyQueueError as error:
            self._warn("repair", error)

    def _warn(self, action: str, error: TinyQueueError) -> None:
        """Log that an action failed, the same text at most every ten seconds (all threads)."""
        now = time.monotonic()
        text = f"cannot {action}: {error}"
        if now - self.warned.get(text, -WARN_EVERY) >= WARN_EVERY:
            self.warned = {known: at for known, at in self.warned.items() if now - at < WARN_EVERY} | {text: now}
            log.warning("%s", text)


def _log_outcomes(outcomes: Sequence[Outcome], saved: Sequence[Outcome]) -> None:
    """Log one line for each outcome. Those that were not saved are `lost`."""
    if not log.isEnabledFor(logging.WARNING):
        return
    saved_ids = {outcome.job.id for outcome in saved}
    for outcome in outcomes:
        job = outcome.job
        if job.id not in saved_ids:
            event = "lost"
            detail = ": the job is no longer this worker's"
        elif outcome.error:
            event = "failed" if outcome.verb == "fail" else "released"
            detail = f": {error_line(outcome.error)[:300]}; {_next_step(outcome)}"
        else:
            event = outcome.verb + "d"
            detail = ""
        level = logging.WARNING if detail else logging.INFO
        fields = job.log_fields() | {"event": event}
        duration = ""
        if (milliseconds := job.__dict__.get("_duration_ms")) is not None:  # not known if it never ran to its end
            fields["durationMs"] = milliseconds
            duration = f" in {milliseconds} ms"
        text = f"job {job.id} ({job.type}) {event}{duration}, attempt {job.attempts}/{job.max_attempts}{detail}"
        log.log(level, "%s", text, extra={"fields": fields})


def _fate(outcome: Outcome) -> str:
    """Return what a saved outcome has made of its job, as far as this worker knows."""
    if outcome.verb == "complete":
        return "completed"
    if outcome.job.cancel_requested:
        return "cancelled"
    if outcome.verb == "release":
        return "released"
    return "retried" if outcome.after is not None and outcome.job.attempts < outcome.job.max_attempts else "failed"


def _next_step(failed: Outcome) -> str:
    fate = _fate(failed)
    if fate == "cancelled":
        return "cancelled, as requested"
    if fate == "released":
        return f"not counted, next attempt in {failed.after:.1f} s"
    if fate == "retried":
        return f"next attempt in {failed.after:.1f} s"
    return "it will not be retried" if failed.after is None else "no attempts left"


# The command line -----------------------------------------------------------------------------------------------------


def handle_signals(worker: Worker, also: Callable[[], None] = lambda: None) -> None:
    """Drain at SIGTERM or SIGINT, release at the second SIGINT. Each signal calls `also` first.

    Processes that handlers fork get the default signals.
    """
    interrupts = itertools.count()

    def handle(number: int, frame: Any) -> None:
        also()
        worker.stop("release" if number == signal.SIGINT and next(interrupts) else "drain")

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    reset_signals_in_children()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _setting_help(field: str) -> str:
    name, default, text = next(row for row in Settings.table() if row[0] == variable(field))
    return f"{text[0].upper()}{text[1:]}.  [env: {name}; default: {default}]"


cli = tinyqueue_cli.cli  # the console script `tinyqueue` runs tinyqueue.worker:cli


@cli.command()
@click.option("--concurrency", "worker_concurrency", type=int, metavar="N", help=_setting_help("worker_concurrency"))
@click.option(
    "--queue",
    "queues",
    multiple=True,
    metavar="NAME",
    help="Queue to serve. Repeat it to serve several, in order of priority."
    "  [default: the queue `default`, then the queues that handlers name, then `webhooks`]",
)
@click.option("--burst", is_flag=True, help="Run the jobs that are due, then exit.")
@click.option("--max-jobs", type=int, metavar="N", help=_setting_help("max_jobs"))
@click.option("--max-memory", type=int, metavar="MB", help=_setting_help("max_memory"))
@click.option("--shutdown-timeout", type=int, metavar="SECONDS", help=_setting_help("shutdown_timeout"))
@click.option("--log-format", metavar="FORMAT", help=_setting_help("log_format"))
def run(queues: tuple[str, ...], burst: bool, **overrides: Any) -> None:
    """Run jobs until SIGTERM or Ctrl-C."""
    settings = Settings.read(**overrides)
    exit_at_sigterm()
    queue = tinyqueue_cli.require_queue(settings)
    names = [check_name("queue", name) for name in queues]
    load_handlers(settings.handlers)
    worker = Worker(queue, settings, names, burst)
    handle_signals(worker)
    text = "worker started: %s, queues: %s; up to %d connections to Redis"
    slots = plural(settings.worker_concurrency, "slot")
    log.info(text, slots, ", ".join(worker.names), settings.shards * settings.worker_connections)
    for warning in (*process_warnings(), *warnings(queue), *worker.scheduler.surprises()):
        log.warning("%s", warning)
    code = worker.run()
    exit_now(code, min(EXIT_TIME, max(0.2, worker.exit_by - time.monotonic())))


cli.add_command(click.Command("worker", None, run.callback, run.params, run.help, short_help="Same as run."))


@cli.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def web(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Serve the HTTP API until SIGTERM or Ctrl-C; without REDIS_URL, embed Redis and a worker."""
    from tinyqueue.wsgi import command  # here, because no other command needs a web server

    command().main(arguments, ctx.command_path)


if __name__ == "__main__":
    cli()
