"""Check that nothing grows: after many jobs, Redis and both processes use as much as before.

    python tests/soak.py [--jobs 200000]

Submits batches through one web process to one worker. A twentieth of the jobs is discarded, and
another twentieth fails once and is retried. Ended jobs are kept for a second. Measures before the
first job, after 40 % of them (the warm-up) and at the end, each time after all jobs were deleted.

Exits with 1 if something has grown: the memory of Redis since the start; the memory, the threads
and the open files of the processes since the warm-up. Also if Redis has a key that an idle queue
does not need, or more connections than the settings promise.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import click
import redis

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conftest import RedisServer, check_consistency, free_port, until  # noqa: E402

from tinyqueue import Queue  # noqa: E402
from tinyqueue_config import Settings  # noqa: E402

HANDLERS = """
from tinyqueue import Discard, Job, handler

@handler("soak", max_attempts=2, backoff=0.1)
def soak(n: int, job: Job) -> int:
    if n % 20 == 0:
        raise Discard("pointless")
    if n % 20 == 1 and job.attempts == 1:
        raise OSError("flaky")
    return n
"""
BATCH = 1000
DELETED_WITHIN = 150.0  # seconds; a worker trims once a minute
SLACK = {"used": 1 << 20, "rss": 5 << 20, "threads": 0, "files": 0}
SLOTS = 10
# Once one queue was used, these stay for as long as there is a worker, or for two hours.
STEADY = re.compile(
    r"counts|metrics|series|workers|worker:.*|lease:.*|minute:.*|bell:default|mark|promoter|repairer"
    r"|snapshots|snapshotter"
)


class Measurement(NamedTuple):
    """The use of resources at one time. `keys` are those that an idle queue does not need.

    `files` of a process excludes its connections.
    """

    jobs: int
    keys: int
    used: int
    web: dict[str, int]
    worker: dict[str, int]
    connections: int


def measure_process(pid: int) -> dict[str, int]:
    """Measure the memory, the threads and the open files of a process."""
    resident = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert resident
    files = 0
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            files += not os.readlink(file).startswith("socket:")
    return {"rss": int(resident[1]) << 10, "threads": len(os.listdir(f"/proc/{pid}/task")), "files": files}


class Soak:
    """A Redis, a web process and a worker."""

    def __init__(self, folder: Path) -> None:
        (folder / "soakhandlers.py").write_text(HANDLERS)
        self.redis = RedisServer(folder)
        self.redis.start()
        self.queue = Queue.from_url(self.redis.url, keep_completed=1, keep_failed=1)
        port = free_port()
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOST": "127.0.0.1", "PORT": str(port)}
        environ |= {"REDIS_URL": self.redis.url, "TINYQUEUE_HANDLERS": "soakhandlers"}
        environ |= {"WORKER_CONCURRENCY": str(SLOTS)}
        environ |= {"TINYQUEUE_KEEP_COMPLETED": "1", "TINYQUEUE_KEEP_FAILED": "1", "LOG_LEVEL": "error"}
        self.processes = [
            subprocess.Popen([sys.executable, str(ROOT / program)], cwd=folder, env=environ)
            for program in ("wsgi.py", "worker.py")
        ]
        self.web = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        until(self._ready)

    def close(self) -> None:
        self.web.close()
        for process in self.processes:
            process.terminate()
            process.wait(40)
        self.queue.pool.disconnect()
        self.redis.stop()

    def _ready(self) -> bool:
        try:
            self.web.request("GET", "/ready")
            return self.web.getresponse().read() != b"" and self.queue.stats()["workers"] == 1
        except OSError:
            self.web.close()
            return False

    def submit(self, jobs: range) -> None:
        for at in range(jobs.start, jobs.stop, BATCH):
            body = [{"type": "soak", "payload": n} for n in range(at, min(at + BATCH, jobs.stop))]
            self.web.request("POST", "/jobs/batch", json.dumps(body), {"Content-Type": "application/json"})
            answer = self.web.getresponse()
            text = answer.read()
            assert answer.status == 201, text
            until(lambda: self.queue.stats()["pending"] < 20 * BATCH, timeout=60)

    def measure(self, jobs: int) -> Measurement:
        """Wait until all jobs have ended and were deleted, then measure."""
        until(lambda: self._deleted(jobs), timeout=DELETED_WITHIN)
        check_consistency(self.queue)
        with redis.Redis(connection_pool=self.queue.pool) as client:
            names = {key.decode().removeprefix(self.queue.keys.prefix) for key in client.scan_iter()}
            keys = {name for name in names if not STEADY.fullmatch(name)}
            memory, clients = client.info("memory"), client.info("clients")
        web, worker = (measure_process(process.pid) for process in self.processes)
        return Measurement(jobs, len(keys), memory["used_memory"], web, worker, clients["connected_clients"])

    def _deleted(self, jobs: int) -> bool:
        time.sleep(0.2)
        stats = self.queue.stats()
        ended = sum(stats["total"].values()) == jobs
        return ended and not any(stats[index] for index in ("delayed", "completed", "failed", "cancelled"))


@contextmanager
def soaking() -> Iterator[Soak]:
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        soak = Soak(Path(name))
        try:
            yield soak
        finally:
            soak.close()


def connections() -> int:
    """Return how many connections the web process, the worker and this process may have together."""
    settings = Settings(worker_concurrency=SLOTS)
    return settings.web_connections + settings.worker_connections + 1


# Name, reader, and the most that is allowed at the end.
Column = tuple[str, Callable[[Measurement], int], Callable[[list[Measurement]], int]]
COLUMNS: list[Column] = [
    ("needless keys", lambda at: at.keys, lambda found: 0),
    ("Redis memory", lambda at: at.used, lambda found: found[0].used + SLACK["used"]),
    ("connections", lambda at: at.connections, lambda found: connections()),
    *(
        (
            f"{process} {what}",
            lambda at, process=process, what=what: getattr(at, process)[what],
            lambda found, process=process, what=what: getattr(found[1], process)[what] + SLACK[what],
        )
        for process in ("web", "worker")
        for what in ("rss", "threads", "files")
    ),
]


def grown(found: list[Measurement]) -> list[str]:
    """List what is more than is allowed at the end."""
    return [name for name, read, most in COLUMNS if read(found[-1]) > most(found)]


def table(found: list[Measurement]) -> str:
    lines = [f"{'':<16}" + "".join(f"{at.jobs:>12,} jobs" for at in found)]
    for name, read, _ in COLUMNS:
        cells = (f"{n / (1 << 20):.2f} MB" if (n := read(at)) >= 1 << 20 else str(n) for at in found)
        lines.append(f"{name:<16}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


@click.command()
@click.option("--jobs", default=200_000, show_default=True, help="Number of jobs to run.")
def main(jobs: int) -> None:
    """Run many jobs and check that nothing has grown."""
    with soaking() as soak:
        found = [soak.measure(0)]
        for upto in (jobs * 4 // 10, jobs):
            soak.submit(range(found[-1].jobs, upto))
            found.append(soak.measure(upto))
    click.echo(table(found))
    if more := grown(found):
        click.echo(f"GROWN: {', '.join(more)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
