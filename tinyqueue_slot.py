"""Running one job: its handler with a time limit, and the outcome.

`run_job` calls the handler and never raises an exception. A `Slot` is a thread that runs jobs one
after another, and the time limit is enforced from the main thread. This module knows neither Redis
nor the other threads of a worker.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import sys
import threading
import time
import traceback
from contextvars import Context
from types import FrameType
from typing import Any

import msgspec

from tinyqueue import (
    HANDLERS,
    MAX_REFUNDS,
    MAX_RESULT,
    Discard,
    Failure,
    InvalidJob,
    Job,
    Outcome,
    RateLimited,
    Retry,
    TimedOut,
    UnknownType,
    backoff,
    is_delay,
)
from tinyqueue_config import LOG_CONTEXT
from tinyqueue_json import to_json
from tinyqueue_log import JOB_LOG, JobLog, recapture
from tinyqueue_redis import THREAD, Shield

log = logging.getLogger("tinyqueue.worker")

GRACE = 5.0  # seconds from a handler's timeout until the handler counts as stuck
UNREADABLE_BACKOFF = 10.0  # seconds, doubling: a worker that can read the job may get it meanwhile
# Functions of Python's library that take and release locks. An exception in one of them can leave
# its lock taken.
FRAGILE_MODULES = frozenset(
    {"logging", "threading", "concurrent.futures._base", "importlib._bootstrap", "_frozen_importlib"}
)
FRAGILE_FUNCTIONS = frozenset(
    {"acquire", "release", "_acquireLock", "_releaseLock", "_acquire_restore", "_release_save"}
    | {"__enter__", "__exit__", "_get_module_lock", "_lock_unlock_module"}
)
GIVEN_UP = "The handler did not stop. Its thread was given up here (most recent call last):\n"
STARTED = {"fields": {"event": "started"}}


def run_job(job: Job) -> Outcome:
    """Run the handler of a started job and return the outcome. Never raises an exception."""
    try:
        try:
            if job.type not in HANDLERS:
                raise UnknownType(job.type, sorted(HANDLERS))
            call = HANDLERS[job.type].bind(job)
        except InvalidJob as error:
            return _postpone(job, error)
        result = call()
        return Outcome(job, "complete", result=None if result is None else _encode_result(result))
    except BaseException as error:  # SystemExit, KeyboardInterrupt and TimedOut too only fail this attempt
        return fail(job, error)


def _encode_result(result: Any) -> msgspec.Raw:
    """Encode a result before the handler can change it. Raises Discard if it cannot be stored."""
    try:
        encoded = to_json(result)
    except ValueError as error:
        raise Discard(f"the result {error}") from None
    if len(encoded) > MAX_RESULT:
        raise Discard(f"the result is longer than {MAX_RESULT} bytes of JSON; store it elsewhere and return its URL")
    return msgspec.Raw(encoded)


def _postpone(job: Job, error: InvalidJob) -> Outcome:
    """Let a job that this process cannot read wait for one that can, up to MAX_REFUNDS times."""
    if job.refunds >= MAX_REFUNDS:
        return fail(job, error)
    wait = f"this worker cannot run the job, and it waits for one that can ({job.refunds + 1}/{MAX_REFUNDS})"
    failure = Failure(type(error).__name__, f"{str(error)[:800]}; {wait}")
    return Outcome(job, "release", error=failure, after=backoff(job.refunds + 1, UNREADABLE_BACKOFF))


def fail(job: Job, error: BaseException, stack: str = "") -> Outcome:
    """Return the outcome of an attempt that an error ended. `stack` replaces the traceback."""
    halt = issubclass(type(error), RateLimited)  # not isinstance, which asks the exception for its class
    known = HANDLERS.get(job.type)
    limits = (known.backoff, known.backoff_cap) if known else (UNREADABLE_BACKOFF,)
    after: float | None = backoff(job.attempts, *limits)
    try:
        if issubclass(type(error), Discard):
            after = None
        elif halt or issubclass(type(error), Retry):
            after = _wanted_delay(error, after)
        failure = Failure.of(error, "" if halt else stack or _format_traceback(error))
    except BaseException:  # an exception may raise another whenever it is touched
        failure = Failure.of(error)
    return Outcome(job, "release" if halt else "fail", error=failure, after=after, halt=halt)


def _wanted_delay(error: BaseException, default: float | None) -> float | None:
    wanted: Any = getattr(error, "after", None)  # a subclass may not set it
    return float(wanted) if is_delay(wanted) else default


def _format_traceback(error: BaseException) -> str:
    """Format the traceback of an error, starting at the handler's own frame."""
    frames = error.__traceback__
    while frames and frames.tb_frame.f_globals.get("__name__") in (__name__, "tinyqueue"):
        frames = frames.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, frames)) if frames else ""
    except BaseException:  # the exception's own __str__ can raise anything
        return ""


def _format_stack(frame: FrameType | None) -> str:
    """Format the stack of a thread that runs a job, beginning with the frame of the handler."""
    frames = itertools.takewhile(lambda at: at[0].f_code is not run_job.__code__, traceback.walk_stack(frame))
    return "".join(traceback.StackSummary.extract(iter(list(frames)[::-1])).format())


def _raise_in_thread(thread: int, error: type[BaseException] | None) -> None:
    """Raise an exception in a thread at its next line of Python; None revokes a pending one."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)


def _is_fragile(frame: FrameType | None) -> bool:
    """Whether an exception now might leave a lock taken that other threads need."""
    if frame is None or frame.f_code.co_name not in FRAGILE_FUNCTIONS:
        return False
    return frame.f_globals.get("__name__") in FRAGILE_MODULES


class Slot(Shield):
    """A thread that runs jobs. `lock` decides who ends one: its handler, or the main thread."""

    def __init__(self, keeps_logs: bool = False) -> None:
        super().__init__()
        THREAD.shield = self
        self.keeps_logs = keeps_logs  # of all types
        self.thread = threading.get_ident()
        self.process = os.getpid()
        self.job: Job | None = None
        self.deadline = float("inf")
        self.expired_at = float("inf")  # when the main thread first tried to interrupt it
        self.interrupted = False
        self.abandoned = False  # the handler still runs, and its job was taken away
        self.given_up: Job | None = None  # the job whose handler was given up

    def run(self, job: Job) -> Outcome | None:
        """Run a job and return its outcome; None if it was abandoned and this thread must end."""
        known = HANDLERS.get(job.type)
        timeout = known.timeout if known else None
        context = Context()  # of this attempt alone: the next job must not see what this one sets
        context.run(LOG_CONTEXT.set, job.log_fields)  # for the handler's log lines
        if self.keeps_logs or (known and known.logs):
            sizes = job.__dict__.get("_log_sizes") if job.logged else ()
            log_of_job = job.__dict__["_log"] = JobLog(job.attempts, job.started_at, sizes)
            context.run(JOB_LOG.set, log_of_job)
            recapture()
        if log.isEnabledFor(logging.DEBUG):
            text = "job %s (%s) started, attempt %d/%d"
            context.run(log.debug, text, job.id, job.type, job.attempts, job.max_attempts, extra=STARTED)
        began = time.monotonic()
        with self.lock:
            self.job = job
            self.interrupted = False
            self.late = None
            self.expired_at = float("inf")
            self.deadline = began + (timeout or float("inf"))
        try:
            outcome = context.run(run_job, job)
            job.__dict__["_duration_ms"] = round((time.monotonic() - began) * 1000)
            if os.getpid() != self.process:
                os._exit(0)  # the handler forked, and this is the child: it must not act as a second worker
            return outcome if self._finish() else None
        except BaseException as error:  # TimedOut, raised between the handler's last line and the end of _finish
            return fail(job, error) if self._finish() else None

    def _finish(self) -> bool:
        """End the job; False if it was abandoned. Afterwards no TimedOut can be raised here."""
        with self.lock:
            if self.interrupted:  # TimedOut may not have been raised yet
                _raise_in_thread(self.thread, None)
            self.abandoned = False
            job, self.job = self.job, None
            return job is not None

    def interrupt(self, now: float) -> bool:
        """Raise TimedOut in the handler if it has exceeded its timeout (main).

        Returns False if this should be tried again soon, at a better moment.
        """
        with self.lock:
            if not self.job or self.interrupted or now <= self.deadline:
                return True
            self.expired_at = min(self.expired_at, now)
            return self._interrupt()

    def _interrupt(self) -> bool:
        self.late = TimedOut if self.depth else None
        self.interrupted = bool(self.late) or self._raise()
        return self.interrupted

    def _raise(self) -> bool:
        """Raise TimedOut in the handler, unless it is where that may break something."""
        if _is_fragile(sys._current_frames().get(self.thread)):
            return False
        _raise_in_thread(self.thread, TimedOut)
        if _is_fragile(sys._current_frames().get(self.thread)):  # it ran on since the first look
            _raise_in_thread(self.thread, None)
            return False
        return True

    def is_stuck(self, now: float) -> bool:
        """Whether the handler still runs although TimedOut was raised in it, or could not be."""
        return self.job is not None and now > self.expired_at + GRACE

    def give_up(self) -> Outcome | None:
        """Give up a handler that does not stop, and return the outcome of its attempt (main).

        The outcome has the stack of the thread. Returns None if the handler has just returned.
        """
        with self.lock:  # the thread cannot leave `run` meanwhile
            frame = sys._current_frames().get(self.thread)
        job = self.abandon()
        return fail(job, TimedOut(), GIVEN_UP + _format_stack(frame)) if job else None

    def abandon(self) -> Job | None:
        """Take the job away from its handler; None if the handler has just returned (main)."""
        with self.lock:
            job, self.job = self.job, None
            self.abandoned = self.abandoned or job is not None
            self.given_up = job or self.given_up
            return job

    def evict(self) -> None:
        """Raise TimedOut in a handler whose job was taken away, so that its thread ends (main)."""
        with self.lock:
            if self.abandoned and not self.interrupted:
                self._interrupt()
