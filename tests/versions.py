"""Run an old version and this one side by side on one Redis, and check that each understands the other.

    python tests/versions.py [--old d0c5128] [--jobs 5000]

A web process and a worker of each version serve the same queue. Every job is submitted to one
version, and whatever is done to it later is requested from the other. The kinds of jobs are in
KINDS. In the end workers of both versions are restarted and killed while they run jobs.

Exits with 1 unless every job has ended as its kind says, both versions list all jobs with the same
fields, and no record is unreadable. The old version is a commit, so this needs the repository.
"""

from __future__ import annotations

import http.client
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conftest import RedisServer, check_consistency, disconnect, until  # noqa: E402
from rolling import Part  # noqa: E402

from tinyqueue import Queue  # noqa: E402
from tinyqueue_job import UNREADABLE  # noqa: E402

OLD = "d0c5128"  # a commit whose records this version must understand, and whose code must understand ours
HANDLERS = """
import os, time
from tinyqueue import Discard, Job, handler

RUNS = os.open("runs", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
SOON = {"backoff": 0.05, "backoff_cap": 0.1}

def note(job):
    os.write(RUNS, f"{job.id} {os.getpid()}\\n".encode())

@handler("echo")
def echo(payload: int, job: Job) -> int:
    note(job)
    return payload

@handler("held", queue="held")
def held(payload: int, job: Job) -> int:
    note(job)
    return payload

@handler("flaky", **SOON)
def flaky(fails: int, job: Job) -> int:
    note(job)
    if job.attempts <= fails:
        raise OSError("flaky")
    return job.attempts

@handler("discard")
def discard(payload: int, job: Job) -> None:
    note(job)
    raise Discard("pointless")

@handler("sulk", max_attempts=1)
def sulk(file: str, job: Job) -> str:
    note(job)
    if not os.path.exists(file):
        raise OSError("not yet")
    return file

@handler("patient")
def patient(payload: int, job: Job) -> None:
    note(job)
    while not job.cancelled:
        time.sleep(0.01)
    raise OSError("asked to stop")

@handler("steps")
def steps(payload: int, job: Job) -> int:
    note(job)
    job.set_progress(1, 2)
    job.set_progress(3, 4)
    return payload

@handler("gate")
def gate(file: str, job: Job) -> str:
    note(job)
    job.set_progress(1, 2)
    while not os.path.exists(file):
        time.sleep(0.01)
    return file
"""
BATCH = 20
EXPIRES_IN = 0.2  # seconds
LEASE = 2  # seconds


def has_commit(commit: str) -> bool:
    """Whether this folder is a repository that has the commit."""
    command = ["git", "-C", str(ROOT), "cat-file", "-e", f"{commit}^{{commit}}"]
    try:
        return (ROOT / ".git").exists() and subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:  # there is no git here
        return False


def unpack(commit: str, folder: Path) -> Path:
    """Unpack the files of a commit into a folder."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


class Web:
    """The API of one version. All processes work in `folder`."""

    def __init__(self, port: int, folder: Path) -> None:
        self.folder = folder
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            sent["Content-Type"] = "application/json"
        self.connection.request(method, path, None if body is None else json.dumps(body), sent)
        answer = self.connection.getresponse()
        return answer.status, json.loads(answer.read())

    def submit(self, type: str, payload: Any, **fields: Any) -> str:
        status, answer = self.call("POST", "/jobs", {"type": type, "payload": payload} | fields)
        assert status == 201, answer
        return str(answer["jobId"])

    def get(self, id: str) -> dict[str, Any]:
        status, job = self.call("GET", f"/jobs/{id}")
        assert status == 200, job
        return dict(job)

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Return all jobs that this version lists, in the order of the listing."""
        found: dict[str, dict[str, Any]] = {}
        cursor = ""
        while True:
            status, page = self.call("GET", f"/jobs?limit=500&cursor={cursor}")
            assert status == 200, page
            found |= {job["id"]: job for job in page["jobs"]}
            if not (cursor := page["cursor"]):
                return found


class Wanted(NamedTuple):
    """How a job must end. `runs` is how often it must have run, and None if that depends on faults."""

    status: str
    runs: int | None = 1
    fields: dict[str, Any] = {}  # noqa: RUF012


Made = dict[str, Wanted]
COMPLETED = Wanted("completed", 1, {"attempts": 1})


def plain(web: Web, other: Web, number: int) -> Made:
    body = {"type": "echo", "payload": number}
    status, answer = web.call("POST", "/jobs", body, X_Request_ID=f"request-{number}")
    assert status == 201
    return {answer["jobId"]: Wanted("completed", 1, {"result": number, "requestId": f"request-{number}"})}


def batch(web: Web, other: Web, number: int) -> Made:
    status, answer = web.call("POST", "/jobs/batch", [{"type": "echo", "payload": n} for n in range(BATCH)])
    assert status == 201
    return {job["jobId"]: COMPLETED for job in answer["jobs"]}


def delayed(web: Web, other: Web, number: int) -> Made:
    return {web.submit("echo", number, delay=0.3): COMPLETED}


def unique(web: Web, other: Web, number: int) -> Made:
    id = web.submit("held", number, uniqueKey=f"key-{number}")
    status, again = other.call("POST", "/jobs", {"type": "held", "payload": -1, "uniqueKey": f"key-{number}"})
    assert (status, again["jobId"], again["duplicate"]) == (200, id, True), again
    return {id: Wanted("completed", 1, {"result": number})}


def once(web: Web, other: Web, number: int) -> Made:
    body = {"type": "echo", "payload": number}
    answers = [side.call("POST", "/jobs", body, Idempotency_Key=f"once-{number}") for side in (web, other)]
    assert [status for status, _ in answers] == [201, 200], answers
    ids = {answer["jobId"] for _, answer in answers}
    assert len(ids) == 1, answers
    return dict.fromkeys(ids, COMPLETED)


def flaky(web: Web, other: Web, number: int) -> Made:
    return {web.submit("flaky", 2): Wanted("completed", 3, {"attempts": 3, "result": 3})}


def failing(web: Web, other: Web, number: int) -> Made:
    return {web.submit("flaky", 9, maxAttempts=2): Wanted("failed", 2, {"attempts": 2})}


def discarded(web: Web, other: Web, number: int) -> Made:
    return {web.submit("discard", number): Wanted("failed", 1, {"attempts": 1})}


def cancelled(web: Web, other: Web, number: int) -> Made:
    id = web.submit("held", number, uniqueKey=f"cancelled-{number}")
    assert other.call("DELETE", f"/jobs/{id}")[0] == 200
    return {id: Wanted("cancelled", 0)}


def stopped(web: Web, other: Web, number: int) -> Made:
    id = web.submit("patient", number)
    until(lambda: other.get(id)["status"] == "processing")
    assert other.call("DELETE", f"/jobs/{id}")[0] == 202
    return {id: Wanted("cancelled", 1, {"cancelRequested": True})}


def retried(web: Web, other: Web, number: int) -> Made:
    file = f"retry-{number}"
    id = web.submit("sulk", file)
    assert other.call("GET", f"/jobs/{id}?wait=20")[1]["status"] == "failed"
    (web.folder / file).touch()
    assert other.call("POST", f"/jobs/{id}/retry")[0] == 200
    return {id: Wanted("completed", 2, {"attempts": 1, "result": file})}


def progress(web: Web, other: Web, number: int) -> Made:
    return {web.submit("steps", number): Wanted("completed", 1, {"progress": 0.75})}


def expired(web: Web, other: Web, number: int) -> Made:
    return {web.submit("held", number, expiresIn=EXPIRES_IN): Wanted("failed", 0, {"attempts": 0})}


KINDS: tuple[Callable[[Web, Web, int], Made], ...] = (
    *(plain, batch, delayed, unique, once, flaky, failing, discarded, cancelled, stopped, retried, progress, expired),
)


class World:
    """A Redis, and a web process and a worker of the old and of this version."""

    def __init__(self, folder: Path, redis: RedisServer, roots: tuple[Path, Path]) -> None:
        (folder / "versionhandlers.py").write_text(HANDLERS)
        self.folder = folder
        self.queue = Queue.from_url(redis.url, lease=LEASE)
        settings = {"REDIS_URL": redis.url, "TINYQUEUE_HANDLERS": "versionhandlers", "WORKER_CONCURRENCY": "10"}
        settings |= {"TINYQUEUE_SHUTDOWN_TIMEOUT": "0", "TINYQUEUE_LEASE": str(LEASE)}
        sides = tuple(zip(("old", "new"), roots, strict=True))
        self.web_parts = [Part(folder, f"web-{side}", root, self.queue, **settings) for side, root in sides]
        self.workers = [Part(folder, f"worker-{side}", root, self.queue, **settings) for side, root in sides]
        self.parts = [*self.web_parts, *self.workers]
        self.webs: list[Web] = []

    def __enter__(self) -> World:
        try:
            for part in self.parts:
                part.start()
        except BaseException:
            self.__exit__()
            raise
        self.webs = [Web(part.port, self.folder) for part in self.web_parts]
        return self

    def __exit__(self, *_: object) -> None:
        for web in self.webs:
            web.connection.close()
        for part in self.parts:
            part.kill()
        disconnect([self.queue.pool])

    def until_quiet(self) -> None:
        until(lambda: (stats := self.queue.stats())["pending"] + stats["processing"] == 0, timeout=120)

    def run_kinds(self, jobs: int) -> Made:
        """Make jobs of every kind, each submitted to one version and changed through the other."""
        assert self.webs[0].call("POST", "/queues/held/pause")[0] == 200
        made: Made = {}
        number = 0
        while len(made) < jobs:
            web, other = self.webs if number // len(KINDS) % 2 else self.webs[::-1]
            made |= KINDS[number % len(KINDS)](web, other, number)
            number += 1
        time.sleep(EXPIRES_IN)
        assert self.webs[1].call("POST", "/queues/held/resume")[0] == 200
        self.until_quiet()
        return made

    def submit_gates(self, file: str, **fields: Any) -> list[str]:
        """Submit jobs that run until a file exists, and wait until all run."""
        ids = [web.submit("gate", file, **fields) for web in self.webs for _ in range(3)]
        self.until_all_run(ids)
        return ids

    def until_all_run(self, ids: list[str], worker: Part | None = None) -> None:
        """Wait until all jobs have reported progress, and run on that worker if one is given."""

        def runs(web: Web, id: str) -> bool:
            job = web.get(id)
            here = worker is None or (worker.process and f"-{worker.process.pid}-" in job.get("worker", ""))
            return bool(here and "progress" in job)

        until(lambda: all(runs(web, id) for web in self.webs for id in ids))

    def restart_workers(self) -> Made:
        """Stop the worker of each version while it runs jobs. It hands them back to the other."""
        ids = self.submit_gates("restarted", maxAttempts=1)
        for worker in self.workers:
            worker.restart()
            self.until_all_run(ids)
        (self.folder / "restarted").touch()
        self.until_quiet()
        return dict.fromkeys(ids, Wanted("completed", None, {"attempts": 1}))

    def kill_workers(self) -> Made:
        """Kill the worker of each version while it runs several jobs. These end as suspects, each alone."""
        old, new = self.workers
        old.stop()
        ids = self.submit_gates("killed", maxAttempts=1)
        old.start()
        new.kill()
        self.until_all_run(ids, old)
        new.start()
        old.kill()
        (self.folder / "killed").touch()
        old.start()
        self.until_quiet()
        return dict.fromkeys(ids, Wanted("completed", 3, {"attempts": 1, "suspicions": 2}))

    def judge(self, made: Made) -> list[str]:
        """Return what is wrong with the jobs, as each version shows them."""
        check_consistency(self.queue)
        runs = Counter(line.split()[0] for line in (self.folder / "runs").read_text().splitlines())
        shown = [web.jobs() for web in self.webs]
        failures = [f"the versions show job {id} differently" for id in made if shown[0].get(id) != shown[1].get(id)]
        for id, wanted in made.items():
            job = shown[1].get(id, {"status": "lost"})
            fields = {name: job.get(name) for name in wanted.fields}
            if (job["status"], fields) != (wanted.status, wanted.fields):
                failures.append(f"job {id} is {job}, not {wanted}")
            if job.get("error", {}).get("type") == UNREADABLE:
                failures.append(f"the record of job {id} is unreadable: {job}")
            if wanted.runs not in (None, runs[id]):
                failures.append(f"job {id} ran {runs[id]} times: {wanted}")
        return failures + [f"job {id} was not submitted: {shown[1][id]}" for id in shown[1].keys() - made.keys()]


class Played(NamedTuple):
    """What a run has shown. `failures` is empty if everything held."""

    jobs: int
    seconds: float
    failures: list[str]


def play(folder: Path, old: Path, jobs: int) -> Played:
    """Run the version in the folder `old` and this one side by side, with so many jobs."""
    began = time.monotonic()
    redis = RedisServer(folder)
    redis.start()
    try:
        with World(folder, redis, (old, ROOT)) as world:
            made = world.run_kinds(jobs) | world.restart_workers() | world.kill_workers()
            failures = world.judge(made)
    finally:
        redis.stop()
    return Played(len(made), time.monotonic() - began, failures)


@click.command()
@click.option("--old", default=OLD, show_default=True, help="The commit of the old version.")
@click.option("--jobs", default=5000, show_default=True)
def main(old: str, jobs: int) -> None:
    """Run an old version and this one side by side on one Redis."""
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as folder:
        played = play(Path(folder), unpack(old, Path(root)), jobs)
    click.echo(f"{played.jobs:,} jobs of {len(KINDS) + 2} kinds in {played.seconds:.0f} s")
    for failure in played.failures[:20]:
        click.echo(failure)
    click.echo(f"{len(played.failures)} failures")
    sys.exit(bool(played.failures))


if __name__ == "__main__":
    main()
