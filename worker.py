"""The worker process, and the operator's command line.

    python worker.py           run jobs until SIGTERM or SIGINT; the same as python worker.py run
    python worker.py --help    everything else
    tinyqueue                  the same command line, installed

Threads of a worker. Each method of Worker says which of them runs it.

    main      waits for a signal, times handlers out, and watches that the others make progress
    taker     waits for a free slot, then takes as many jobs as slots are free; nothing there: waits for the bell
    slots     run handlers: a job from the inbox, what became of it into the outbox
    settler   writes all outcomes that have piled up while it wrote the last ones, in one transaction
    keeper    heartbeat, promote, reap, trim, and word of jobs that shall stop

A slot is free when its handler has returned, and no job is taken ahead of a free slot: a long job never holds up a short one.
Stopping has three strengths: quiet (take nothing more), drain (let the handlers end, for a time), release (hand back the rest).
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import os
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Literal, NoReturn

import click
import msgspec

from tinyqueue import (
    BLOCK,
    ENDED,
    HANDLERS,
    MAX_JOBS,
    MAX_RESULT,
    PROMOTED,
    SCANNED,
    STATUSES,
    AnyQueue,
    Corrupted,
    Discard,
    Failure,
    Filter,
    InvalidJob,
    Job,
    Outcome,
    Queue,
    Reaped,
    Retry,
    SettingsError,
    Status,
    TimedOut,
    TinyQueueError,
    Unavailable,
    UnknownType,
    __version__,
    backoff,
    check_name,
    from_json,
    is_delay,
    load_handlers,
    to_json,
)
from tinyqueue_config import LOG_CONTEXT, Settings, open_queue, set_up_logging, variable
from tinyqueue_doctor import Finding, examine, find_broken, repair, warnings

log = logging.getLogger("tinyqueue.worker")

TICK = 0.25  # seconds between two looks at the handlers' time-outs
GRACE = 5.0  # seconds that a handler has to end after its time-out was raised in it
PROMOTE_EVERY = 1.0  # seconds; a delayed job starts that much late at most
TRIM_EVERY = 60.0
REAP_EVERY = 5.0
LAST_WRITE = 4.0  # seconds for the last outcomes after the drain: 25 + 4 stays below the 30 that platforms give
NEW_HANDLER = 10.0  # seconds, doubling, until a type that this worker does not know is tried again: another may know it
STARTED = {"fields": {"event": "started"}}
EXIT_BROKEN = 70  # EX_SOFTWARE: the process cannot do its work and wants to be restarted


# Running one job ------------------------------------------------------------------------------------------------------


def run_job(job: Job) -> Outcome:
    """Run a started job's handler and tell what became of it. Nothing that a handler does or raises gets out of here."""
    try:
        if job.type not in HANDLERS:
            raise UnknownType(job.type, sorted(HANDLERS))
        result = HANDLERS[job.type].run(job)
        return Outcome(job, "complete", result=None if result is None else _storable(result))
    except (
        BaseException
    ) as error:  # also SystemExit, KeyboardInterrupt, TimedOut: an attempt has failed, and nothing else
        return _failed(job, error)


def _storable(result: Any) -> msgspec.Raw:
    """Encode a result at once: the handler may go on changing it. One that cannot be stored fails the job for good: it has run."""
    try:
        encoded = to_json(result)
    except ValueError as error:
        raise Discard(f"the result {error}") from None
    if len(encoded) > MAX_RESULT:
        raise Discard(f"the result is longer than {MAX_RESULT} bytes of JSON: store it elsewhere and return where")
    return msgspec.Raw(encoded)


def _failed(job: Job, error: BaseException) -> Outcome:
    known = HANDLERS.get(job.type)
    after: float | None = (
        backoff(job.attempts, known.backoff, known.backoff_cap) if known else backoff(job.attempts, NEW_HANDLER)
    )
    if isinstance(error, Discard):
        after = None
    elif isinstance(error, Retry) and is_delay(
        wish := getattr(error, "after", None)
    ):  # a subclass may have left it out
        after = wish
    return Outcome(job, "fail", error=Failure.of(error, _traceback(error)), after=after)


def _traceback(error: BaseException) -> str:
    """Format an error's traceback from the handler's own frames on."""
    frames = error.__traceback__
    while frames and frames.tb_frame.f_globals.get("__name__") in (__name__, "tinyqueue"):
        frames = frames.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, frames)) if frames else ""
    except BaseException:  # its own __str__ may raise whatever it likes
        return ""


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Have a thread raise an exception at its next line of Python; None takes one back that it has not raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)


class Slot:
    """One thread that runs handlers, one job at a time.

    `lock` decides who ends a job: the handler by returning, or somebody who gives it up. Only one of them gets it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.thread, self.process = threading.get_ident(), os.getpid()
        self.job: Job | None = None
        self.deadline = float("inf")
        self.interrupted = False

    def run(self, job: Job) -> Outcome | None:
        """Run a job (slot thread). None if it was given up meanwhile: its outcome is nobody's then, and this thread must end."""
        timeout = HANDLERS[job.type].timeout if job.type in HANDLERS else None
        LOG_CONTEXT.set(job.log_fields)  # for whatever the handler logs in this thread, which is nobody else's
        log.debug("started %s %s attempt %d/%d", job.type, job.id, job.attempts, job.max_attempts, extra=STARTED)
        began = time.monotonic()
        with self.lock:
            self.job, self.interrupted = job, False
            self.deadline = began + (timeout or float("inf"))
        try:
            outcome = run_job(job)
            job.__dict__["_took"] = round((time.monotonic() - began) * 1000)
            if os.getpid() != self.process:
                os._exit(0)  # the handler has forked, and this is the child: it must not act as a second worker
            return outcome if self._end() else None
        except BaseException as error:  # TimedOut, between the handler's last line and the end of _end
            return _failed(job, error) if self._end() else None

    def _end(self) -> bool:
        with self.lock:
            if self.interrupted:  # and maybe not raised yet: from here on it must not be
                _raise_in(self.thread, None)
            job, self.job = self.job, None
            return job is not None

    def interrupt(self, now: float) -> None:
        """Raise TimedOut in a handler that has run past its time (main)."""
        with self.lock:
            if self.job and not self.interrupted and now > self.deadline:
                self.interrupted = True
                _raise_in(self.thread, TimedOut)

    def stuck(self, now: float) -> bool:
        """Whether the handler has not ended although TimedOut was raised in it."""
        return self.job is not None and self.interrupted and now > self.deadline + GRACE

    def give_up(self) -> Job | None:
        """Take the job from a handler that cannot be stopped; None if it has just ended (main)."""
        with self.lock:
            job, self.job = self.job, None
            return job


# The worker -----------------------------------------------------------------------------------------------------------

Order = Literal["drain", "release", "broken"]


class Worker:
    """Runs the jobs of some queues until it is told to stop. `run` returns the exit code of the process."""

    def __init__(self, queue: AnyQueue, settings: Settings, names: Sequence[str] = (), burst: bool = False) -> None:
        self.queue, self.settings, self.burst = queue, settings, burst
        self.names = list(names) or list(dict.fromkeys(["default", *(handler.queue for handler in HANDLERS.values())]))
        self.id = ""  # under which it is registered; empty: not yet, or no longer
        self.held: dict[str, Job] = {}  # started and not settled
        self.lock = threading.Lock()  # for the two together
        self.orders: SimpleQueue[Order] = SimpleQueue()  # its put may be called in a signal handler, unlike Event.set
        self.free: SimpleQueue[None] = SimpleQueue()  # an entry for each slot that waits for a job
        self.inbox: SimpleQueue[Job | None] = SimpleQueue()
        self.outbox: SimpleQueue[list[Outcome] | None] = SimpleQueue()
        self.pool = ThreadPoolExecutor(
            2 * settings.worker_concurrency, "slot"
        )  # twice: for those that replace stuck ones
        self.slots: list[Slot] = []
        self.stuck: list[Slot] = []
        self.quiet = threading.Event()  # take nothing more
        self.over = threading.Event()
        self.adopt_at = 0.0
        self.all_busy = False
        self.took_at = time.monotonic()  # when the taker last got an answer, be it that there is nothing
        self.looked_at = self.late_at = (
            time.monotonic()
        )  # when the keeper last saw which workers are lost; and saw it too late
        self.complained: dict[str, float] = {}

    # Main -------------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Work until an order to stop comes, then stop. Exit code 0: every job was finished or handed back."""
        for _ in range(self.settings.worker_concurrency):
            self._open_slot()
        taker, settler, keeper = (
            threading.Thread(target=self._guard, args=(duty,), name=name, daemon=True)
            for name, duty in (("taker", self._take_jobs), ("settler", self._settle_outcomes), ("keeper", self._keep))
        )
        for thread in (taker, settler, keeper):
            thread.start()
        order = self._wait_for_order()
        self.quiet.set()
        self.free.put(None)  # wakes a taker that waits for a slot
        log.info("worker stops (%s): %d jobs are running", order, len(self.held))
        return self._leave(self._drain(order, taker), settler, keeper)

    def _guard(self, duty: Callable[[], None]) -> None:
        """Run a thread; should it die of a defect, the worker stops: what it held comes back with its lease."""
        try:
            duty()
        except BaseException:
            log.critical("the %s died of a defect", threading.current_thread().name, exc_info=True)
            self.orders.put("broken")

    def _wait_for_order(self) -> Order:
        while True:
            with suppress(Empty):
                return self.orders.get(timeout=TICK)
            self._time_out()
            if trouble := self._hung():
                log.critical("%s: giving up, for a restart may help", trouble)
                return "broken"

    def _hung(self) -> str:
        now, limit = time.monotonic(), self.settings.watchdog
        if now - self.queue.last_contact > limit:
            return f"no contact with Redis for {limit} s"
        if not self.all_busy and now - self.took_at > limit:
            return f"slots are free, but no jobs could be taken for {limit} s"
        return ""

    def _time_out(self) -> None:
        """See to handlers that run past their time. Done by the main thread: it never waits for Redis."""
        now = time.monotonic()
        for slot in tuple(self.slots):
            slot.interrupt(now)
            if slot.stuck(now):
                self.stuck.append(
                    slot
                )  # before it is given up: once its handler ends after all, it takes itself off the list
                if not (job := slot.give_up()):
                    self.stuck.remove(slot)
                    continue
                log.error("job %s of type %s does not stop; its thread is given up", job.id, job.type)
                self.outbox.put([_failed(job, TimedOut())])
                self.slots.remove(slot)
                if len(self.stuck) >= self.settings.worker_concurrency:
                    self.orders.put("broken")
                else:
                    self._open_slot()

    def _open_slot(self) -> None:
        self.pool.submit(self._work)
        self.free.put(None)

    def _drain(self, order: Order, taker: threading.Thread) -> Order:
        """Let the handlers end until time is up or another order comes; then hand back what still runs. Returns the last order."""
        deadline = time.monotonic() + self.settings.shutdown_timeout
        while (taker.is_alive() or self.held) and order == "drain" and time.monotonic() < deadline:
            with suppress(Empty):
                order = self.orders.get(timeout=0.02)
            self._time_out()
        deadline = time.monotonic() + LAST_WRITE
        while (taker.is_alive() or self.held) and time.monotonic() < deadline:
            self._hand_back()
            time.sleep(0.02)
        return order

    def _hand_back(self) -> None:
        """Release what nobody has begun and what still runs. A handler goes on until the process ends, but it is not heard."""
        jobs = [job for slot in tuple(self.slots) if (job := slot.give_up())]
        with suppress(Empty):
            while job := self.inbox.get_nowait():
                jobs.append(job)
        if jobs:  # all at once, in the order in which they came: so they go back
            with self.lock:
                came = {id: at for at, id in enumerate(self.held)}
            self.outbox.put([Outcome(job, "release") for job in sorted(jobs, key=lambda job: came.get(job.id, 0))])

    def _leave(self, order: Order, *threads: threading.Thread) -> int:
        self.over.set()
        self.outbox.put(None)
        for thread in threads:
            thread.join(1.0)
        for _ in self.slots:
            self.inbox.put(None)
        self.pool.shutdown(wait=False)
        with suppress(TinyQueueError):
            if self.id and not self.held:
                self.queue.deregister(self.id)
        if self.held:
            log.error("Redis did not take what became of %d jobs: they run again when the lease ends", len(self.held))
        log.info("worker has stopped")
        return EXIT_BROKEN if order == "broken" else int(bool(self.held))

    # Taker ------------------------------------------------------------------------------------------------------------

    def _take_jobs(self) -> None:
        free = failures = 0
        while True:
            free += self._free_slots(wait=free < 1)
            if self.quiet.is_set():
                return
            if free < 1:  # one more was begun than was free, for all were about to be
                continue
            worker = self.id
            try:
                worker = worker or self._register()
                taken, jobs = self._next_jobs(worker, free)
                emptied = taken < free
                free -= self._begin(jobs)
                self.took_at, failures = time.monotonic(), 0
                for suspect in (job for job in jobs if job.status == "pending"):
                    free -= self._begin_alone(worker, suspect)
                if emptied:
                    self._wait_for_bell(worker)
            except Reaped:
                self._forget_all(worker)
                with suppress(TinyQueueError):
                    self.queue.reap(worker)  # gives back what was just taken under a name that is no more
            except TinyQueueError as trouble:
                self.adopt_at = 0.0
                failures += 1
                self._complain("take jobs", trouble)
                self.quiet.wait(backoff(failures, 0.1, 5.0))

    def _free_slots(self, wait: bool) -> int:
        """Count the slots that have become free; with `wait` at least one, unless the order to be quiet came."""
        count = 0
        if wait:
            self.all_busy = True
            self.free.get()
            self.all_busy, count, self.took_at = False, 1, time.monotonic()
        with suppress(Empty):
            while True:
                self.free.get_nowait()
                count += 1
        return count

    def _register(self) -> str:
        worker = self.queue.register(self.names, self.settings.worker_concurrency)
        with self.lock:
            self.id = worker
        log.debug("registered as worker %s", worker)
        return worker

    def _next_jobs(self, worker: str, free: int) -> tuple[int, list[Job]]:
        """Take and start jobs for the free slots. Tells how many ids were taken, too: fewer than asked means empty queues."""
        with self.lock:  # before the lists are read: what is settled after that was known
            held = {id: job.attempts for id, job in self.held.items()}
        ids: list[bytes] = []
        if time.monotonic() >= self.adopt_at:
            ids = self.queue.adopt(worker, held)[:free]
            self.adopt_at = time.monotonic() + self.queue.lease if len(ids) < free else 0.0
        if len(ids) < free:
            ids += self.queue.take(worker, self.names, free - len(ids))
        return len(ids), self.queue.start(worker, ids, held) if ids else []

    def _begin(self, jobs: Sequence[Job]) -> int:
        """Hand jobs that were started to the slots; return how many those are. Beside a suspect nothing else is begun."""
        started = [job for job in jobs if job.status == "processing"]
        with self.lock:
            self.held.update((job.id, job) for job in started)
        for job in started:
            self.inbox.put(job)
        if any(job.suspect for job in started):
            self._idle()
        return len(started)

    def _begin_alone(self, worker: str, suspect: Job) -> int:
        """Begin a suspect once nothing else runs here: it may kill this worker, and shall take no other's attempt along."""
        return self._begin(self.queue.start(worker, [suspect.id.encode()], {})) if self._idle() else 0

    def _idle(self) -> bool:
        """Wait until everything that was started is settled; False if the order to be quiet came."""
        self.all_busy = True
        while self.held and not self.quiet.wait(0.02):
            pass
        self.all_busy, self.took_at = False, time.monotonic()
        return not self.quiet.is_set()

    def _wait_for_bell(self, worker: str) -> None:
        """Wait until there may be something to take. A look at the lists after each wait makes up for a bell that was lost."""
        while not self.quiet.is_set() and time.monotonic() < self.adopt_at and self.id == worker:
            if (
                self.burst
                and not self.queue.promote()
                and not self.held
                and not self.queue.waiting(self.names, due=True)
            ):
                self.orders.put("drain")
                return
            try:
                rung = self.queue.wait(self.names, 0.1 if self.burst else BLOCK)
            except Corrupted as trouble:  # a bell of the wrong type: the jobs themselves may be had all the same
                self._complain("hear the bell", trouble)
                rung = not self.quiet.wait(0.5)
            if rung or self.queue.waiting(self.names):
                return
            self.took_at = time.monotonic()

    # Slots ------------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        slot = Slot()
        self.slots.append(slot)
        while job := self.inbox.get():
            outcome = slot.run(job)
            if outcome is None:
                if slot in self.stuck:
                    self.stuck.remove(slot)
                return
            self.outbox.put([outcome])
            self.free.put(None)

    # Settler ----------------------------------------------------------------------------------------------------------

    def _settle_outcomes(self) -> None:
        while (batch := self.outbox.get()) is not None:
            with suppress(Empty):
                while len(batch) < MAX_JOBS:
                    if (more := self.outbox.get_nowait()) is None:
                        self.outbox.put(None)  # to be found after this batch
                        break
                    batch += more
            self._settle(batch)

    def _settle(self, outcomes: list[Outcome]) -> None:
        """Write outcomes, however long that takes. Those of a registration that was reaped are dropped: their jobs run again."""
        failures, again, written = 0, False, list[Outcome]()
        while ours := [outcome for outcome in outcomes if outcome.job.worker == self.id]:
            worker = ours[0].job.worker
            try:
                others = self.queue.settle(worker, ours, again)
                written = [outcome for outcome in ours if outcome not in others] if others else ours
                break
            except Reaped:
                self._forget_all(worker)
            except (Unavailable, Corrupted) as trouble:
                if getattr(
                    trouble, "applied", False
                ):  # a key of the wrong type; everything else of the transaction was written
                    log.error("outcomes were written but for this: %s", trouble)
                    written = ours
                    break
                again = again or getattr(trouble, "doubtful", False)
                failures += 1
                self._complain("write outcomes", trouble)
                if self.over.wait(backoff(failures, 0.1, 5.0)):
                    return
        with self.lock:
            for outcome in outcomes:
                if self.held.get(outcome.job.id) is outcome.job:
                    del self.held[outcome.job.id]
        _log_outcomes(outcomes, written)

    def _forget_all(self, worker: str) -> None:
        """Take note that this worker was thought dead: its jobs are others' now (taker, settler, keeper)."""
        with self.lock:
            if worker and self.id == worker:
                log.warning(
                    "worker %s was cut off for longer than its lease; its %d jobs were given away",
                    worker,
                    len(self.held),
                )
                self.id = ""
                self.held.clear()

    # Keeper -----------------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        lease = self.queue.lease
        duties = {
            "heartbeat": lease / 3,
            "promote": PROMOTE_EVERY,
            "hear": PROMOTE_EVERY,
            "reap": min(lease / 6, REAP_EVERY),
            "trim": TRIM_EVERY,
        }
        due = dict.fromkeys(duties, 0.0)
        while not self.over.wait(TICK):
            for duty, every in duties.items():
                if time.monotonic() >= due[duty]:
                    due[duty] = time.monotonic() + every
                    try:
                        getattr(self, "_" + duty)()
                    except TinyQueueError as trouble:
                        self._complain(duty, trouble)
                        if duty == "heartbeat":  # a lease has room for two that fail: try again at the next look
                            due[duty] = 0.0

    def _heartbeat(self) -> None:
        if worker := self.id:
            try:
                self.queue.heartbeat(worker, list(self.held))
            except Reaped:
                self._forget_all(worker)

    def _promote(self) -> None:
        while self.queue.promote() >= PROMOTED and not self.over.is_set():
            pass

    def _hear(self) -> None:
        """Tell the jobs that can be told that somebody wants them to stop."""
        with self.lock:
            tellable = {
                id: job for id, job in self.held.items() if job.type in HANDLERS and HANDLERS[job.type].wants_job
            }
        for id in self.queue.cancel_requests([id for id, job in tellable.items() if not job.cancel_requested]):
            tellable[id].cancel_requested = True

    def _reap(self) -> None:
        """Bury workers whose lease is gone, but not within a lease of trouble with Redis: all others may just have had it, too.

        Trouble is also a Redis, or a machine, that stood still without an error: then this look comes long after the last one.
        """
        lost, now, lease = self.queue.lost_workers(own=self.id), time.monotonic(), self.queue.lease
        if now - self.looked_at > lease / 2:  # that long a lease lasts at any time, being renewed at a third of it
            self.late_at = now
        self.looked_at = now
        if now - max(self.late_at, self.queue.last_trouble) < lease:
            return
        for worker in lost:
            if given := self.queue.reap(worker):
                log.warning("worker %s is lost; %d jobs that it held were given back", worker, given)

    def _trim(self) -> None:
        while self.queue.trim() >= MAX_JOBS and not self.over.is_set():
            pass
        if broken := find_broken(self.queue):  # by a thread of its own, because the lease must be renewed meanwhile
            threading.Thread(target=self._repair, args=(broken,), daemon=True).start()

    def _repair(self, broken: Sequence[Queue]) -> None:
        try:
            for finding in repair(broken):
                log.warning("repaired after keys were lost: %s", finding.seen)
        except TinyQueueError as trouble:
            self._complain("repair", trouble)

    def _complain(self, doing: str, trouble: TinyQueueError) -> None:
        """Log trouble, the same at most every ten seconds (all threads)."""
        what, now = f"cannot {doing}: {trouble}", time.monotonic()
        if now - self.complained.get(what, -10.0) >= 10.0:
            self.complained = {**{k: at for k, at in self.complained.items() if now - at < 10.0}, what: now}
            log.warning("%s", what)


def _log_outcomes(outcomes: list[Outcome], written: list[Outcome]) -> None:
    """One line for each."""
    if not log.isEnabledFor(logging.WARNING):
        return
    recorded = {outcome.job.id for outcome in written}
    for outcome in outcomes:
        job, level, what, then = outcome.job, logging.INFO, outcome.verb + "d", ""
        if job.id not in recorded:
            level, what, then = logging.WARNING, "lost", ": it is no longer this worker's"
        elif outcome.error:
            level, what, then = logging.WARNING, "failed", f": {_why(outcome.error)[:300]}; {_what_next(outcome)}"
        fields = job.log_fields() | {"event": what}
        if (took := job.__dict__.get("_took")) is not None:  # else it was given up, or not begun
            fields, then = fields | {"durationMs": took}, f" in {took} ms{then}"
        text = f"{what} {job.type} {job.id} attempt {job.attempts}/{job.max_attempts}{then}"
        log.log(level, "%s", text, extra={"fields": fields})


def _what_next(failed: Outcome) -> str:
    if failed.job.cancel_requested:
        return "it was asked to stop"
    if failed.after is not None and failed.job.attempts < failed.job.max_attempts:
        return f"again in {failed.after:.1f} s"
    return "no attempt is left"


def _why(error: Failure | None) -> str:
    """An error in one line."""
    return " ".join(f"{error.type}: {error.message}".split()) if error else ""


# The command line -----------------------------------------------------------------------------------------------------


def obey_signals(worker: Worker, also: Callable[[], None] = lambda: None) -> None:
    """Have SIGTERM and SIGINT mean: drain, and a second SIGINT: release. A handler only leaves the order."""
    interrupts = itertools.count()

    def obey(number: int, frame: Any) -> None:
        also()
        worker.orders.put("release" if number == signal.SIGINT and next(interrupts) else "drain")

    signal.signal(signal.SIGTERM, obey)
    signal.signal(signal.SIGINT, obey)


def leave(code: int) -> NoReturn:
    """End the process now: handlers that were given up, and threads that they started, would keep it alive."""
    logging.shutdown()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _meaning(field: str) -> str:
    """A setting's help text with its variable and its default."""
    return next(
        f"{text[0].upper()}{text[1:]}.  [env: {name}; default: {default}]"
        for name, default, text in Settings.table()
        if name == variable(field)
    )


PAGE = {
    "Work": ("web", "worker", "run"),
    "Submit": ("enqueue",),
    "Watch": ("stats", "workers", "list", "failed", "get"),
    "Steer": ("retry", "cancel", "pause", "resume", "purge"),
    "Check": ("doctor",),
}


class Commands(click.Group):
    """The commands, with errors of the queue as one line each: exit 2 for what the caller must mend, 1 for the rest."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        about_run = not args or (args[0].startswith("-") and args[0] not in ("--help", "--version"))
        if about_run and not ctx.resilient_parsing:  # which completes a command line that is not whole
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (SettingsError, InvalidJob) as error:
            raise click.UsageError(str(error)) from None
        except TinyQueueError as error:
            raise click.ClickException(str(error)) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in PAGE.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(100)) for name in names])
        with formatter.section("Options of run"):
            formatter.write_dl(
                list(filter(None, (option.get_help_record(ctx) for option in self.commands["run"].params)))
            )


@click.group(
    cls=Commands,
    epilog="\b\n" + Settings.help(),
    options_metavar="",
    subcommand_metavar="[COMMAND] [ARGS]...",
    context_settings={"max_content_width": 120},
)
@click.version_option(__version__)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Run the jobs of TinyQueue, or look after them. Without a command: run. `COMMAND --help` tells more of each."""
    if ctx.invoked_subcommand != "web":  # which reads them itself, after its options
        ctx.obj = Settings.read()


def _queue(settings: Settings) -> AnyQueue:
    if not settings.redis_url:
        raise SettingsError(
            "REDIS_URL is not set, so there is nothing to work on. For web and worker in one process: tinyqueue web"
        )
    set_up_logging(settings)
    return open_queue(settings, settings.worker_connections)


def on_queue(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the queue that the settings name as its first argument."""

    @click.pass_obj
    @functools.wraps(command)
    def with_queue(settings: Settings, /, *args: Any, **kwargs: Any) -> None:
        command(_queue(settings), *args, **kwargs)

    return with_queue


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
watched = click.option("--watch", is_flag=True, help="Go on showing what changes.")
LIMIT = click.option(
    "--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="Jobs to show at most."
)
SURE = click.option("--yes", is_flag=True, help="Do not ask.")


def filtered(*statuses: str, required: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options by which jobs are chosen, and pass a `filter` made of them; `statuses` are those of --status, if any."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_filter(*args: Any, **options: Any) -> None:
            command(*args, filter=Filter(*(options.pop(field, None) for field in Filter._fields)), **options)

        options = [
            click.option("--type", help="Only jobs of that type."),
            click.option("--queue", help="Only jobs of that queue."),
            click.option("--error-type", help="Only jobs whose last error is of that type."),
        ]
        if statuses:
            options.insert(0, click.option("--status", type=click.Choice(statuses), required=required))
        return functools.reduce(lambda command, option: option(command), reversed(options), with_filter)

    return add


@cli.command()
@click.option("--concurrency", "worker_concurrency", type=int, help=_meaning("worker_concurrency"))
@click.option(
    "--queue",
    "queues",
    multiple=True,
    metavar="NAME",
    help="A queue to serve; repeat it, the first goes first.  [default: default, then those that handlers name]",
)
@click.option("--burst", is_flag=True, help="Run what is due, then exit.")
@click.option("--shutdown-timeout", type=int, help=_meaning("shutdown_timeout"))
@click.option("--log-format", help=_meaning("log_format"))
def run(queues: tuple[str, ...], burst: bool, **overrides: Any) -> None:
    """Run jobs until SIGTERM or SIGINT."""
    settings = Settings.read(**overrides)
    queue, names = _queue(settings), [check_name("queue", name) for name in queues]
    load_handlers(settings.handlers)
    worker = Worker(queue, settings, names, burst)
    slots, connections = settings.worker_concurrency, settings.shards * settings.worker_connections
    obey_signals(worker)
    log.info(
        "worker starts: %d slots, queues: %s; up to %d connections to Redis",
        slots,
        ", ".join(worker.names),
        connections,
    )
    for warning in warnings(queue):
        log.warning("%s", warning)
    leave(worker.run())


cli.add_command(run, "worker")  # the name that goes with `web`


@cli.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def web(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Serve the HTTP API until SIGTERM or SIGINT; without REDIS_URL with an embedded Redis and workers."""
    from tinyqueue.wsgi import main  # only here does the command line need a web server

    main.main(arguments, ctx.command_path)


@cli.command()
@click.argument("type")
@click.argument("payload")
@click.option("--max-attempts", type=int, help="Starts of the handler at most.")
@click.option("--queue", help="The queue to put it into.")
@click.option("--delay", type=float, help="Seconds until it may start.")
@click.option("--run-at", help="When it may start: ISO 8601 with a zone.")
@click.option("--expires-in", type=float, help="Seconds after which it fails if it was not started.")
@click.option("--unique-key", help="While an unended job has that key, print the id of that one.")
@click.pass_obj
def enqueue(settings: Settings, /, type: str, payload: str, **options: Any) -> None:
    """Submit a job of TYPE; PAYLOAD is JSON, or - for standard input. Prints its id."""
    queue = _queue(settings)
    load_handlers(settings.handlers)
    if type not in HANDLERS:
        raise UnknownType(type, sorted(HANDLERS))
    try:
        value = from_json(sys.stdin.buffer.read() if payload == "-" else payload.encode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise click.UsageError(f"PAYLOAD is not JSON: {error}") from None
    click.echo(queue.enqueue(type, value, **options).id)


@cli.command()
@watched
@as_json
@on_queue
def stats(queue: AnyQueue, watch: bool, as_json: bool) -> None:
    """Count the jobs of every status and queue."""
    _tell(queue.stats, _show_stats, as_json, watch)


def _show_stats(told: dict[str, Any]) -> None:
    rows = [["queue", "pending", "processing", "oldest waits", ""]]
    for name, about in {**told["queues"], "all": told | {"paused": False}}.items():
        oldest, paused = _span(about["oldestWaitingMs"]), "paused" if about["paused"] else ""
        rows.append([name, about["pending"], about["processing"], oldest, paused])
    _table(rows)
    click.echo(f"\n{told['delayed']} of the pending are delayed; {told['workers']} workers\n")
    ended = [[status, told[status], told["lastMinute"][status], told["total"][status]] for status in ENDED]
    _table([["ended", "kept", "last minute", "ever"], *ended])


@cli.command()
@watched
@as_json
@on_queue
def workers(queue: AnyQueue, watch: bool, as_json: bool) -> None:
    """Show the workers and what they run."""
    _tell(queue.workers, _show_workers, as_json, watch)


def _show_workers(told: list[dict[str, Any]]) -> None:
    rows = [["worker", "alive", "busy", "queues", "runs"]]
    for about in told:
        busy, alive = f"{len(about['jobs'])}/{about['concurrency']}", "yes" if about["alive"] else "no"
        rows.append([about["id"], alive, busy, ",".join(about["queues"]), " ".join(about["jobs"])])
    _table(rows) if told else click.echo("no worker: start one with tinyqueue worker")


@cli.command("list")
@filtered(*STATUSES)
@LIMIT
@as_json
@on_queue
def list_jobs(queue: AnyQueue, filter: Filter, limit: int, as_json: bool) -> None:
    """List jobs, newest first."""
    _list(queue, filter, limit, as_json)


@cli.command()
@filtered()
@LIMIT
@as_json
@on_queue
def failed(queue: AnyQueue, filter: Filter, limit: int, as_json: bool) -> None:
    """List the failed jobs, newest first, and why they failed."""
    _list(queue, filter._replace(status="failed"), limit, as_json)


def _list(queue: AnyQueue, filter: Filter, limit: int, as_json: bool) -> None:
    found, cursor = queue.page(filter, limit=limit)
    while cursor and len(found) < limit:  # a page may be short
        more, cursor = queue.page(filter, limit=limit - len(found), cursor=cursor)
        found += more
    _print([job.answer() for job in found]) if as_json else _show_jobs(found)


def _show_jobs(jobs: Sequence[Job]) -> None:
    rows = [["when", "id", "type", "queue", "status", "attempts", "error"]]
    for job in jobs:
        when, attempts = _moment(job.place()[0]), f"{job.attempts}/{job.max_attempts}"
        rows.append([when, job.id, job.type, job.queue, job.status, attempts, _why(job.error)[:100]])
    _table(rows) if jobs else click.echo("no job fits")


@cli.command()
@click.argument("id")
@watched
@as_json
@click.pass_context
def get(ctx: click.Context, id: str, watch: bool, as_json: bool) -> None:
    """Show the job of that ID. With --watch until it has ended: exit 0 if it completed, else 1."""
    queue = _queue(ctx.obj)
    job, told = _there(queue.get(id), id), ""
    while watch and job.status not in ENDED:
        line = f"{job.status}, attempt {job.attempts}/{job.max_attempts}, {job.progress:.0%}"
        if line != told:
            click.echo(line, err=True)
        job, told = _there(queue.wait_for(id, 1.0), id), line
    _print(job.answer()) if as_json else _show(job)
    ctx.exit(int(watch and job.status != "completed"))


def _show(job: Job) -> None:
    answer = job.answer()
    payload, error = answer.pop("payload"), answer.pop("error", None)
    for name, value in answer.items():
        shown = _moment(value) if name.endswith("At") else to_json(value).decode() if name == "result" else value
        _say(f"{name:<12} {shown}")
    _say(f"payload\n{_pretty(payload)}")
    if error:
        _say(f"error\n  {_why(error)}\n{textwrap.indent(error.traceback, '  ')}".rstrip())


@cli.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@filtered("failed", "cancelled")
@click.option("--all", "every", is_flag=True, help="All failed jobs.")
@on_queue
def retry(queue: AnyQueue, ids: tuple[str, ...], filter: Filter, every: bool) -> None:
    """Revive failed or cancelled jobs: those of the IDs, or all that fit the options."""
    filter = _chosen("failed", ids, filter, every)
    for id in ids:
        _there(queue.retry(id), id)
        click.echo(f"{id} pending")
    if not ids:
        done = _in_steps(queue, "retry", filter, partial(queue.change_many, "retry", filter))
        click.echo(f"{done['retried']} retried, {done['skipped']} had changed meanwhile")


@cli.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@filtered()
@click.option("--all", "every", is_flag=True, help="All pending jobs.")
@SURE
@on_queue
def cancel(queue: AnyQueue, ids: tuple[str, ...], filter: Filter, every: bool, yes: bool) -> None:
    """Cancel jobs: those of the IDs (running ones are asked to stop), or all that fit the options."""
    filter = _chosen("pending", ids, filter, every)
    for id in ids:
        job = _there(queue.cancel(id), id)
        click.echo(f"{id} {'asked to stop' if job.status == 'processing' else job.status}")
    if not ids:
        _ask("Cancel", filter, yes)
        done = _in_steps(queue, "cancel", filter, partial(queue.change_many, "cancel", filter))
        click.echo(f"{done['cancelled']} cancelled, {done['skipped']} had changed meanwhile")


@cli.command()
@click.argument("names", nargs=-1, required=True, metavar="QUEUE...")
@on_queue
def pause(queue: AnyQueue, names: tuple[str, ...]) -> None:
    """Start no more jobs of a queue; jobs are still accepted."""
    for name in names:
        queue.pause(name)
        click.echo(f"{name} paused")


@cli.command()
@click.argument("names", nargs=-1, required=True, metavar="QUEUE...")
@on_queue
def resume(queue: AnyQueue, names: tuple[str, ...]) -> None:
    """Start the jobs of a queue again."""
    for name in names:
        queue.resume(name)
        click.echo(f"{name} resumed")


@cli.command()
@filtered(*ENDED, required=True)
@SURE
@on_queue
def purge(queue: AnyQueue, filter: Filter, yes: bool) -> None:
    """Forget ended jobs before their time. Asks first."""
    _ask("Forget", filter, yes)
    done = _in_steps(queue, "purge", filter, partial(queue.purge, filter))
    click.echo(f"{done['purged']} forgotten")


@cli.command()
@click.option("--repair", "repairs", is_flag=True, help="First restore what lost keys have broken.")
@as_json
@click.pass_context
def doctor(ctx: click.Context, repairs: bool, as_json: bool) -> None:
    """Check Redis, permissions, settings and workers. Exits with 1 if a check fails."""
    settings: Settings = ctx.obj
    connections = settings.shards * (settings.web_concurrency * settings.web_connections + settings.worker_connections)
    queue = _queue(settings)
    repaired = (repair(queue.parts) or [Finding("ok", "repair", "nothing to repair")]) if repairs else []
    findings = repaired + examine(queue, connections)
    _print(findings) if as_json else _show_findings(findings)
    ctx.exit(int(any(finding.level == "fail" for finding in findings)))


def _show_findings(findings: Sequence[Finding]) -> None:
    for finding in findings:
        advice = f" -> {finding.advice}" if finding.advice else ""
        click.echo(f"{finding.level:<5} {finding.about:<13} {finding.seen}{advice}")


def _chosen(status: Status, ids: tuple[str, ...], filter: Filter, every: bool) -> Filter:
    """The filter of a bulk change, by default for that status. Refuses a command that chooses no jobs, or in two ways."""
    if bool(ids) == (every or filter != Filter()):
        raise click.UsageError("give either IDs, or options that choose jobs, or --all")
    return filter._replace(status=filter.status or status)


def _ask(verb: str, filter: Filter, yes: bool) -> None:
    words = {"of type": filter.type, "in queue": filter.queue, "with error": filter.error_type}
    which = "".join(f" {word} {value}" for word, value in words.items() if value)
    yes or click.confirm(f"{verb} all {filter.status} jobs{which}?", abort=True)


def _in_steps(queue: AnyQueue, verb: str, filter: Filter, step: Callable[[str], dict[str, Any]]) -> Counter[str]:
    """Do bulk work step by step under a progress bar, and add up what the steps tell."""
    done: Counter[str] = Counter()
    with click.progressbar(length=queue.stats()[str(filter.status)], label=verb, file=sys.stderr) as bar:
        cursor = ""
        while cursor or not done:
            told = step(cursor)
            cursor = told.pop("cursor")
            done.update(told)
            bar.update(SCANNED)
    return done


def _tell(read: Callable[[], Any], show: Callable[[Any], None], as_json: bool, watch: bool) -> None:
    """Show what is read, and with `watch` every two seconds from now on, until Ctrl-C."""
    show = _print if as_json else show
    show(read())
    if watch:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
    with suppress(KeyboardInterrupt):
        while watch:
            time.sleep(2.0)
            click.clear()
            show(read())


def _table(rows: Sequence[Sequence[Any]]) -> None:
    """Print rows, the columns aligned, numbers to the right."""
    widths = [max(len(str(row[at])) for row in rows) for at in range(len(rows[0]))]
    for row in rows:
        cells = (
            str(cell).rjust(n) if isinstance(cell, int) else str(cell).ljust(n)
            for cell, n in zip(row, widths, strict=True)
        )
        _say("  ".join(cells).rstrip())


def _say(text: str) -> None:
    """Print what clients and handlers may have worded: none of it may steer the operator's terminal."""
    click.echo("".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text))


def _span(milliseconds: int) -> str:
    return f"{milliseconds / 1000:,.1f} s" if milliseconds else "-"


def _moment(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _there(job: Job | None, id: str) -> Job:
    if job is None:
        raise click.ClickException(f"there is no job {id}")
    return job


def _pretty(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def _print(value: Any) -> None:
    click.echo(_pretty(value))


if __name__ == "__main__":
    cli()
