"""POST /work: runs a worker in a web process, which serves requests meanwhile and afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import msgspec

from tinyqueue import Unavailable
from tinyqueue_config import Settings, open_queue
from tinyqueue_problems import RETRY_AFTER, Problem
from tinyqueue_shards import AnyQueue

if TYPE_CHECKING:
    from tinyqueue.worker import Worker

SHORTEST_COUNT = 0.25  # seconds to count the jobs that wait, if the worker has used up its time
OUTCOMES = ("completed", "retried", "failed", "cancelled", "released", "lost")


class Guest:
    """The worker that POST /work runs in this process, at most one at a time."""

    def __init__(self) -> None:
        self._working = threading.Lock()
        self._queue: AnyQueue | None = None  # has its own connections, closed between two requests
        self._worker: Worker | None = None
        self._left: list[Future[None]] = []  # slots of earlier requests whose handlers cannot be interrupted

    def stop(self) -> None:
        """Drain the worker, if there is one. May be called several times."""
        if worker := self._worker:
            worker.stop("drain")

    def work(self, settings: Settings, queue: AnyQueue, until: float) -> dict[str, Any]:
        """Run a worker until that time. When this returns, the worker has deregistered."""
        if not self._working.acquire(blocking=False):
            detail = "another POST /work runs in this process; repeat the request when it has ended"
            raise Problem(409, "already-working", detail, {"Retry-After": "1"})
        try:
            return self._run(settings, self._queue_of(settings, queue), until)
        finally:
            self._worker = None
            if self._queue:
                self._queue.disconnect()
            self._working.release()

    def _queue_of(self, settings: Settings, queue: AnyQueue) -> AnyQueue:
        """Return a queue for the worker that takes no connections from other requests."""
        if settings.redis_url and not self._queue:
            self._queue = open_queue(settings, settings.worker_connections)
        return self._queue or queue

    def _run(self, settings: Settings, queue: AnyQueue, until: float) -> dict[str, Any]:
        from tinyqueue.worker import CLOSING, EXIT_BROKEN, LAST_WRITE, Worker  # few web processes run jobs

        self._left = [run for run in self._left if not run.done()]
        slots = settings.worker_concurrency - len(self._left)
        if slots < 1:
            detail = "handlers of earlier requests that do not end take all slots of this process; restart it"
            raise Problem(409, "already-working", detail, {"Retry-After": str(RETRY_AFTER)})
        drain = max(0, settings.shutdown_timeout - int(LAST_WRITE + CLOSING))  # the server waits no longer than that
        # This process cannot restart itself.
        limits = {"worker_concurrency": slots, "shutdown_timeout": drain, "max_jobs": 0, "max_memory": 0}
        queue.ping()
        self._worker = worker = Worker(queue, msgspec.structs.replace(settings, **limits), burst=True, until=until)
        code = worker.run()
        self._left += worker.running_slots()
        waiting = _count_waiting(queue, worker.names, until + LAST_WRITE + CLOSING)
        if code == EXIT_BROKEN:
            raise Problem(500, "worker-failed", "the worker stopped because of a fault; see the log of this process")
        return {fate: worker.counts[fate] for fate in OUTCOMES} | {"unsaved": len(worker.held), "waiting": waiting}


def _count_waiting(queue: AnyQueue, names: Sequence[str], deadline: float) -> int:
    """Count the jobs that are due. Raises Unavailable if Redis has not answered by the deadline."""
    found: Future[int] = Future()

    def count() -> None:
        try:
            found.set_result(queue.waiting(names, due=True))
        except BaseException as error:
            found.set_exception(error)

    counter = threading.Thread(target=count, name="counter", daemon=True)  # not waited for if Redis hangs
    counter.start()
    counter.join(max(SHORTEST_COUNT, deadline - time.monotonic()))
    if counter.is_alive():
        raise Unavailable("timeout", "it did not answer before the end of the request")
    return found.result()
