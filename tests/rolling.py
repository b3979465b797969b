"""Restart web processes and workers one by one while clients send requests, and check that nothing fails.

    python tests/rolling.py [--rolls 20] [--rate 200] [--clients 20] [--grace 0]

Two web processes are behind a proxy that forwards bytes, and two workers run the jobs. A roll stops
each of the four with SIGTERM and starts it again, one after the other. Meanwhile the clients submit
and read jobs over connections that they keep, and never repeat a request. Some bodies arrive in two
pieces. With `--grace`, the web processes have that TINYQUEUE_READY_GRACE, and the proxy asks /ready
ten times a second and avoids those that are not ready. Without it, the proxy only avoids those that
refuse connections.

Exits with 1 unless every request was answered with 200 or 201, every accepted job ran exactly once
and is completed in its first and only attempt, no other job is stored, and every process exited
with 0.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import os
import random
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conftest import RedisServer, check_consistency, disconnect, free_port, until  # noqa: E402

from tinyqueue import Queue  # noqa: E402

HANDLERS = """
import os, time
from tinyqueue import Job, handler

RUNS = os.open("runs", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

@handler("roll", max_attempts=1)
def roll(seconds: float, job: Job) -> float:
    os.write(RUNS, f"{job.id}\\n".encode())
    time.sleep(seconds)
    return seconds
"""
LEASE = 5  # seconds
PAUSE = 0.05  # seconds between the two pieces of a body
START_TIME = 30.0  # seconds that a process may take until it serves, on a busy machine
STOP_TIME = 40.0


class Part:
    """A web process or a worker, of the code in `root`. Its log is a file in the folder."""

    def __init__(self, folder: Path, name: str, root: Path, queue: Queue, **environ: str) -> None:
        self.name = name
        self.port = free_port()
        self.queue = queue
        self.program = root / ("wsgi.py" if name.startswith("web") else "worker.py")
        self.folder = folder
        self.environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(root), "HOST": "127.0.0.1"}
        self.environ |= {"PORT": str(self.port), "LOG_LEVEL": "warning", "TINYQUEUE_LEASE": str(LEASE)} | environ
        self.codes: list[int] = []
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return (self.folder / f"{self.name}.log").read_text()

    def start(self) -> None:
        """Start the process and return when it is ready, or registered."""
        with (self.folder / f"{self.name}.log").open("ab") as log:
            command = [sys.executable, str(self.program)]
            self.process = subprocess.Popen(command, cwd=self.folder, env=self.environ, stdout=log, stderr=log)
        until(self._serves, START_TIME)

    def terminate(self) -> None:
        if self.process:
            self.process.terminate()

    def stop(self) -> None:
        """Stop the process with SIGTERM and note its exit code."""
        if self.process:
            self.process.terminate()
            self.codes.append(self.process.wait(STOP_TIME))
            self.process = None

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def _serves(self) -> bool:
        assert self.process
        assert self.process.poll() is None, self.log
        if self.program.name == "wsgi.py":
            return is_ready(self.port)
        return any(worker["pid"] == self.process.pid and worker["alive"] for worker in self.queue.workers())


def is_ready(port: int) -> bool:
    try:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


class Balancer:
    """A proxy that forwards the bytes of each connection to one of some ports.

    With `checks` it chooses among those that are ready. It connects to the next port if one refuses.
    """

    def __init__(self, ports: list[int], checks: bool) -> None:
        self.ports = ports
        self.ready = set(ports)
        self.checks = checks
        self.turn = itertools.count()
        self.port = 0
        self._up = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="balancer", daemon=True)

    def __enter__(self) -> Balancer:
        self._thread.start()
        assert self._up.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        if self.checks:
            checker = self._loop.create_task(self._check())
        self._up.set()
        self._loop.run_forever()
        if self.checks:
            checker.cancel()
        server.close()
        while tasks := asyncio.all_tasks(self._loop):
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(asyncio.sleep(0.1))  # for the transports, which close in the loop
        self._loop.close()

    async def _check(self) -> None:
        while True:
            for port in self.ports:
                if await asyncio.to_thread(is_ready, port):
                    self.ready.add(port)
                else:
                    self.ready.discard(port)
            await asyncio.sleep(0.1)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        turn = next(self.turn)
        ports = self.ports[turn % len(self.ports) :] + self.ports[: turn % len(self.ports)]
        for port in [
            *(port for port in ports if port in self.ready),
            *(port for port in ports if port not in self.ready),
        ]:
            with suppress(ConnectionRefusedError):
                there, back = await asyncio.open_connection("127.0.0.1", port)
                break
        else:
            writer.close()
            return
        with suppress(asyncio.CancelledError):  # the proxy ends
            await asyncio.gather(self._pump(reader, back), self._pump(there, writer), return_exceptions=True)
        for end in (back, writer):
            end.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.write_eof()
        except OSError:
            writer.transport.abort()
            raise


class Load:
    """Clients that send requests at a rate over connections that they keep. They repeat no request."""

    def __init__(self, port: int, rate: float, clients: int) -> None:
        self.port = port
        self.interval = clients / rate
        self.answers: Counter[int] = Counter()
        self.failures: list[str] = []
        self.accepted: list[str] = []  # ids of jobs
        self.connections = 0
        self.slowest = 0.0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,), name=f"client {n}") for n in range(clients)]

    @property
    def requests(self) -> int:
        return sum(self.answers.values()) + len(self.failures)

    def __enter__(self) -> Load:
        self.began = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
        self.seconds = time.monotonic() - self.began

    def _run(self, number: int) -> None:
        chance = random.Random(number)
        due = time.monotonic() + chance.random() * self.interval
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            while not self._over.wait(max(0.0, due - time.monotonic())):
                due = max(due + self.interval, time.monotonic() - 10 * self.interval)
                if connection.sock and select.select([connection.sock], [], [], 0)[0]:
                    connection.close()  # the server has ended it while it was idle
                if not connection.sock:
                    with self._lock:
                        self.connections += 1
                self._request(connection, chance)

    def _request(self, connection: http.client.HTTPConnection, chance: random.Random) -> None:
        began = time.monotonic()
        kind = chance.choice(["submit", "submit", "pieces", "get", "health"])
        try:
            if kind in ("submit", "pieces"):
                self._submit(connection, chance, in_pieces=kind == "pieces")
            else:
                known = self.accepted[-1:]
                connection.request("GET", f"/jobs/{known[0]}" if known and kind == "get" else "/health")
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            with self._lock:
                self.failures.append(f"{kind}: {type(error).__name__}: {error}")
            return
        with self._lock:
            self.answers[answer.status] += 1
            self.slowest = max(self.slowest, time.monotonic() - began)
            if answer.status not in (200, 201):
                self.failures.append(f"{kind}: {answer.status} {body.decode()}")
            elif kind in ("submit", "pieces"):
                self.accepted.append(json.loads(body)["jobId"])

    def _submit(self, connection: http.client.HTTPConnection, chance: random.Random, in_pieces: bool) -> None:
        body = json.dumps({"type": "roll", "payload": round(chance.uniform(0.0, 0.1), 3)}).encode()
        connection.putrequest("POST", "/jobs")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        half = len(body) // 2 if in_pieces else len(body)
        connection.endheaders(body[:half])
        if in_pieces:
            time.sleep(PAUSE)
            connection.send(body[half:])


class Rolled(NamedTuple):
    """What a run has shown. `failures` is empty if everything held."""

    requests: int
    seconds: float
    connections: int
    slowest: float
    jobs: int
    restarts: int
    failures: list[str]


@contextmanager
def parts(folder: Path, url: str, grace: int, root: Path = ROOT) -> Iterator[list[Part]]:
    """Run two web processes and two workers on the Redis at a URL."""
    (folder / "rollhandlers.py").write_text(HANDLERS)
    queue = Queue.from_url(url, lease=LEASE)
    settings = {"REDIS_URL": url, "TINYQUEUE_HANDLERS": "rollhandlers", "WORKER_CONCURRENCY": "20"}
    names = ["web-0", "web-1", "worker-0", "worker-1"]
    made = [Part(folder, name, root, queue, TINYQUEUE_READY_GRACE=str(grace), **settings) for name in names]
    try:
        for part in made:
            part.start()
        yield made
    finally:
        for part in made:
            part.kill()
        disconnect([queue.pool])


def roll(
    folder: Path,
    rolls: int,
    rate: float,
    clients: int,
    grace: int,
    *,
    note: Callable[[int, Load], None] = lambda number, load: None,
) -> Rolled:
    """Restart all parts so often under load, and judge what has happened."""
    redis = RedisServer(folder, "--appendonly", "yes")
    redis.start()
    try:
        with parts(folder, redis.url, grace) as made:
            ports = [part.port for part in made if part.name.startswith("web")]
            with Balancer(ports, checks=grace > 0) as balancer, Load(balancer.port, rate, clients) as load:
                for number in range(rolls):
                    for part in made:
                        part.restart()
                    note(number + 1, load)
            failures = load.failures + _judge(folder, made[0].queue, load.accepted)
            for part in made:
                part.terminate()
            for part in made:
                part.stop()
            failures += [f"{part.name} exited with {part.codes}: {part.log}" for part in made if any(part.codes)]
            restarts = sum(len(part.codes) for part in made) - len(made)
    finally:
        redis.stop()
    jobs = len(load.accepted)
    return Rolled(load.requests, load.seconds, load.connections, load.slowest, jobs, restarts, failures)


def _judge(folder: Path, queue: Queue, accepted: list[str]) -> list[str]:
    """Wait until all jobs have ended, and return what is wrong with them."""
    until(lambda: (stats := queue.stats())["pending"] + stats["processing"] == 0, timeout=60)
    queue.trim()  # corrects the count of retrying jobs, which an old version does not keep
    check_consistency(queue)
    runs = Counter((folder / "runs").read_text().split())
    failures = [f"job {id} was stored, but not accepted" for id in runs.keys() - set(accepted)]
    for id in accepted:
        job = queue.get(id)
        if job is None:
            failures.append(f"job {id} is lost")
        elif (job.status, job.attempts, job.refunds, job.suspicions, runs[id]) != ("completed", 1, 0, 0, 1):
            failures.append(f"job {id} ran {runs[id]} times: {job.answer()}")
    return failures


def show(number: int, load: Load) -> None:
    click.echo(f"roll {number}: {load.requests:,} requests, {len(load.failures)} failed", err=True)


@click.command()
@click.option("--rolls", default=20, show_default=True)
@click.option("--rate", default=200.0, show_default=True, help="Requests a second.")
@click.option("--clients", default=20, show_default=True)
@click.option("--grace", default=0, show_default=True, help="TINYQUEUE_READY_GRACE in seconds.")
def main(rolls: int, rate: float, clients: int, grace: int) -> None:
    """Restart web processes and workers one by one while clients send requests."""
    with tempfile.TemporaryDirectory() as folder:
        done = roll(Path(folder), rolls, rate, clients, grace, note=show)
    click.echo(f"{done.requests:,} requests in {done.seconds:.0f} s ({done.requests / done.seconds:.0f} a second)")
    click.echo(f"{done.connections} connections by {clients} clients; the slowest answer took {done.slowest:.2f} s")
    click.echo(f"{done.jobs:,} jobs accepted; {done.restarts} restarts")
    for failure in done.failures[:20]:
        click.echo(failure)
    click.echo(f"{len(done.failures)} failures")
    sys.exit(bool(done.failures))


if __name__ == "__main__":
    main()
