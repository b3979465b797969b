"""Requests that wait for the end of a job, in one thread for all of them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from tinyqueue import BLOCK, Queue, TinyQueueError


class Waiting(NamedTuple):
    """A request that waits for a job until a time. `resume` answers it."""

    until: float
    environ: dict[str, Any]
    resume: Callable[[], None]


class Waiter:
    """Waits for the ends of many jobs of a queue in one thread, which runs while there are any."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.bell = f"waiter-{os.urandom(8).hex()}"  # its token says that there is another job to wait for
        self.lock = threading.Lock()
        self.running = False
        self.waiting: dict[str, list[Waiting]] = {}

    def add(self, id: str, seconds: float, environ: dict[str, Any], resume: Callable[[], None]) -> None:
        with self.lock:
            self.waiting.setdefault(id, []).append(Waiting(time.monotonic() + seconds, environ, resume))
            was_running = self.running
            self.running = True
        if not was_running:
            threading.Thread(target=self._run, name="waiter", daemon=True).start()
            return
        with suppress(TinyQueueError):  # then the thread looks after BLOCK seconds
            self.queue.leave_token(self.bell)

    def release(self, ids: Collection[str], error: TinyQueueError | None = None) -> None:
        """Answer the requests that wait for these jobs."""
        with self.lock:
            found = [entry for id in ids for entry in self.waiting.pop(id, ())]
        _resume(found, error)

    def release_all(self) -> None:
        self.release(list(self.waiting))

    def _run(self) -> None:
        marked: set[str] = set()  # the ids that are awaited
        checked: set[str] = set()  # those of them that had not ended; all are checked again after BLOCK
        while left := self._release_late():
            with self.lock:
                ids = set(self.waiting)
            try:
                self.queue.forget_awaited(marked - ids)
                marked = ids
                ended = self.queue.await_ends(ids - checked)
                checked = ids - ended
                if not ended:
                    token = self.queue.wait_for_end(ids, min(left, BLOCK), self.bell)
                    ended = {token} & ids
                    checked = checked - ended if token else set()
            except TinyQueueError as error:
                self.release(ids, error)
            else:
                self.release(ended)
        with suppress(TinyQueueError):  # a mark that stays costs one token when its job ends
            self.queue.forget_awaited(marked)

    def _release_late(self) -> float:
        """Answer requests whose time is up. Return the seconds until the next, 0 if none wait."""
        now = time.monotonic()
        with self.lock:
            late = [entry for entries in self.waiting.values() for entry in entries if entry.until <= now]
            kept = {id: [entry for entry in entries if entry.until > now] for id, entries in self.waiting.items()}
            self.waiting = {id: entries for id, entries in kept.items() if entries}
            self.running = bool(self.waiting)
            times = [entry.until - now for entries in self.waiting.values() for entry in entries]
        _resume(late)
        return min(times, default=0)


def _resume(entries: Iterable[Waiting], error: TinyQueueError | None = None) -> None:
    for entry in entries:
        entry.environ["tinyqueue.waited"] = error or True
        entry.resume()
