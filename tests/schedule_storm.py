"""Start many workers at once on schedules that are due, kill some of them, and count the jobs.

    python tests/schedule_storm.py [--trials 50] [--workers 8] [--seed 1]

Each trial forks the workers, which sync and tick as they start, and kills some of them with SIGKILL
at random moments. One of them at least survives. Then there must be exactly one job for each tick.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec

sys.path.insert(0, str(Path(__file__).parent.parent))

from tinyqueue import HANDLERS, Queue, TinyQueueError, handler
from tinyqueue_config import Settings
from tinyqueue_schedule import SCHEDULES, list_schedules, read_schedule, schedule, sync

NAMES = ("one", "two", "three")
MODULES = "storm"  # whose schedules the workers sync


class Report(NamedTuple):
    trials: int
    ticks: int
    kills: int
    wrong: list[str]


def rewind(queue: Queue, name: str) -> int:
    """Make a schedule due since the minute that has begun last, and return that time."""
    now = queue.now()
    at = now - now % 60_000

    def change(found: Any, last: Any, now: int) -> Any:
        return msgspec.structs.replace(found, next_at=at, last_at=0), 0

    queue.change_schedule(name, change)
    return at


def declare() -> None:
    HANDLERS.clear()
    SCHEDULES.clear()

    @handler("echo")
    def echo(payload: dict[str, Any]) -> None: ...

    for name in NAMES:
        schedule(name, "* * * * *", "echo", {}, overlap="allow")


def work(url: str) -> None:
    from worker import Worker

    queue = Queue.from_url(url)
    Worker(queue, Settings(handlers=MODULES, worker_concurrency=1)).run()


def storm(url: str, trials: int, workers: int, seed: int) -> Report:
    chance = random.Random(seed)
    saved = dict(HANDLERS), dict(SCHEDULES)
    declare()
    wrong: list[str] = []
    ticks = 0
    kills = 0
    try:
        for trial in range(trials):
            made, killed, found = _try(url, workers, chance)
            ticks += made
            kills += killed
            wrong += [f"trial {trial}: {text}" for text in found]
    finally:
        for registry, before in zip((HANDLERS, SCHEDULES), saved, strict=True):
            registry.clear()  # type: ignore[attr-defined]
            registry.update(before)  # type: ignore[attr-defined]
    return Report(trials, ticks, kills, wrong)


def _try(url: str, workers: int, chance: random.Random) -> tuple[int, int, list[str]]:
    queue = Queue.from_url(url)
    queue.store.read(("FLUSHALL",))
    from tinyqueue_schedule import declared

    sync(queue, MODULES, declared(MODULES))
    if (left := 60_000 - queue.now() % 60_000) < 10_000:  # else two ticks might fold into one
        time.sleep(left / 1000)
    first = {name: rewind(queue, name) for name in NAMES}
    queue.disconnect()
    children = [_fork(url) for _ in range(workers)]
    kills = sorted((chance.random() * 0.6, child) for child in chance.sample(children, chance.randrange(workers)))
    began = time.monotonic()
    for at, child in kills:
        time.sleep(max(0.0, began + at - time.monotonic()))
        os.kill(child, signal.SIGKILL)
    try:
        return *_judge(queue, first, len(kills)), _faults(queue, first)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        queue.disconnect()


def _fork(url: str) -> int:
    sys.stdout.flush()
    if child := os.fork():
        return child
    try:
        os.close(2)
        os.open(os.devnull, os.O_WRONLY)
        work(url)
    finally:
        os._exit(0)


def _judge(queue: Queue, first: dict[str, int], kills: int) -> tuple[int, int]:
    """Wait until every schedule has ticked. Return the number of ticks and of kills."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            found = {made.name: made for made, _ in list_schedules(queue)}
        except TinyQueueError:
            continue
        if all(found[name].next_at > at for name, at in first.items()):
            time.sleep(0.3)  # others may still be about to do the same
            break
        time.sleep(0.02)
    return sum(1 for job in queue.page(limit=500)[0] if job.schedule), kills


def _faults(queue: Queue, first: dict[str, int]) -> list[str]:
    """Compare the jobs with the ticks: one for each minute from the first to the last."""
    faults = []
    for name, at in first.items():
        stored = queue.store.read(("GET", queue.keys.schedule(name)))[0]
        due = range(at, read_schedule(stored).next_at, 60_000)
        times = sorted(job.scheduled_for for job in queue.page(limit=500)[0] if job.schedule == name)
        if times != list(due):
            faults.append(f"schedule {name} has jobs for {times}, and its ticks were {list(due)}")
    return faults


@click.command()
@click.option("--trials", default=50, show_default=True)
@click.option("--workers", default=8, show_default=True)
@click.option("--seed", default=1, show_default=True)
def main(trials: int, workers: int, seed: int) -> None:
    """Run the trials on a Redis of their own."""
    with tempfile.TemporaryDirectory() as folder:
        program = shutil.which("redis-server") or "redis-server"
        command = [program, "--unixsocket", f"{folder}/redis.sock", "--port", "0", "--save", "", "--dir", folder]
        redis = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while not Path(folder, "redis.sock").exists():
                time.sleep(0.01)
            report = storm(f"unix://{folder}/redis.sock", trials, workers, seed)
        finally:
            redis.terminate()
            redis.wait()
    click.echo("\n".join(report.wrong))
    click.echo(
        f"{report.trials} trials, {report.ticks} ticks, {report.kills} workers killed, {len(report.wrong)} faults"
    )
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
