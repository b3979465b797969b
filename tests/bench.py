"""Compare TinyQueue with plain Redis commands of the same client, in the same run.

    python tests/bench.py [--jobs 20000] [--growth] [--plan] [--python /usr/bin/python3.13 ...]

Starts its own redis-server. Times depend on the machine and its load; compare the ratios. Round
trips, context switches and CPU time a job are steadier than times.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click
import redis

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tinyqueue import Queue  # noqa: E402

PAYLOAD = {"to": "user@example.com", "subject": "Welcome!", "body": "Thanks for signing up"}
HANDLERS = """
import os, time
from dataclasses import dataclass
from tinyqueue import handler

@dataclass
class Email:
    to: str
    subject: str
    body: str

@handler("send-email")
def send_email(email: Email) -> None:
    pass

@handler("sleep")
def sleep(seconds: float) -> None:
    time.sleep(seconds)

@handler("any")
def run(text: str) -> str:
    time.sleep(0.4)
    return text[:98]

@handler("clock")
def clock(sent: int) -> None:
    late = time.monotonic_ns() - sent
    with open("latency", "a") as file:
        file.write(f"{late}\\n")
"""

POPPER = """
import threading, time
import redis

raw, file = redis.Redis.from_url(open("url").read()), open("bare", "a")

def pop():
    while True:
        if popped := raw.brpop(["bare"], 1):
            print(time.monotonic_ns() - int(popped[1]), file=file, flush=True)

for _ in range(10):
    threading.Thread(target=pop).start()
"""

BARE_WEB = """
import logging, os
import bottle, redis, waitress

logging.getLogger("waitress.queue").setLevel(logging.ERROR)

raw = redis.Redis.from_url(open("url").read())

@bottle.post("/jobs")
def submit():
    body = bottle.request.body.read()
    pipe = raw.pipeline(transaction=True)
    pipe.set("bare:job", body)
    pipe.lpush("bare", "x" * 36)
    pipe.execute()
    bottle.response.status = 201
    return {"ok": True}

here = "127.0.0.1:" + os.environ["PORT"]
waitress.serve(bottle.default_app(), listen=here, threads=8, connection_limit=500, asyncore_use_poll=True)
"""

WRK = """
wrk.method, wrk.path, wrk.body = "POST", "%s", [==[%s]==]
wrk.headers["Content-Type"] = "application/json"
"""


@contextmanager
def redis_server(folder: str, *options: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--save", "", "--dir", folder, "--loglevel", "warning", *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        raw = redis.Redis(port=port)
        try:
            until(lambda: answers(raw))
            yield f"redis://127.0.0.1:{port}"
        finally:
            server.terminate()


@contextmanager
def worker(folder: str, *arguments: str, python: str = sys.executable) -> Iterator[subprocess.Popen[bytes]]:
    url = Path(folder, "url").read_text()
    env = dict(os.environ, REDIS_URL=url, TINYQUEUE_HANDLERS="benchhandlers", LOG_LEVEL="error", PYTHONPATH=str(ROOT))
    with subprocess.Popen([python, str(ROOT / "worker.py"), *arguments], cwd=folder, env=env) as process:
        try:
            yield process
        finally:
            process.terminate()


@contextmanager
def web(folder: str, *command: str, processes: int = 1) -> Iterator[str]:
    """Run one or more web processes on a free port."""
    with web_process(folder, *command, processes=processes) as (url, _):
        yield url


@contextmanager
def web_process(folder: str, *command: str, processes: int = 1) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run wsgi.py, or another command that serves, on a free port."""
    command = command or (str(ROOT / "wsgi.py"),)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    own = {"REDIS_URL": Path(folder, "url").read_text(), "TINYQUEUE_HANDLERS": "benchhandlers", "LOG_LEVEL": "error"}
    env = os.environ | own | {"PORT": str(port), "PYTHONPATH": str(ROOT), "WEB_CONCURRENCY": str(processes)}
    with subprocess.Popen([sys.executable, *command], cwd=folder, env=env) as process:
        try:
            until(lambda: listens(port))
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.terminate()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def requests_per_second(folder: str, url: str, path: str, body: str, connections: int) -> float:
    """Measure the requests a second with wrk. Fails if an answer is not 2xx."""
    Path(folder, "post.lua").write_text(WRK % (path, body))
    command = ["wrk", "-t1", f"-c{connections}", "-d5s", "-s", "post.lua", url]
    output = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in output:
        raise click.ClickException(output)
    return float(output.partition("Requests/sec:")[2].split()[0])


def answers(raw: redis.Redis) -> bool:
    try:
        return bool(raw.ping())
    except redis.ConnectionError:
        return False


def until(true: Callable[[], Any], every: float = 0.005) -> None:
    while not true():
        time.sleep(every)


def per_second(count: int, act: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    act()
    return count / (time.perf_counter() - begin)


def show(what: str, value: float, limit: float, unit: str, limited_by: str) -> None:
    click.echo(f"{what:<34} {value:>12,.2f} {unit:<10} {value / limit:>7.2f} x {limit:>12,.2f}  {limited_by}")


def measure_enqueue(queue: Queue, raw: redis.Redis, count: int) -> None:
    single = count // 4
    bare = per_second(single, lambda: [raw.lpush("bare", "x" * 100) for _ in range(single)])
    value = per_second(single, lambda: [queue.enqueue("send-email", PAYLOAD) for _ in range(single)])
    show("enqueue, one at a time", value, bare, "jobs/s", "LPUSH, one at a time")

    def pipelined() -> None:
        for _ in range(0, count, 1000):
            pipe = raw.pipeline(transaction=True)
            pipe.mset({f"bare:{n}": "x" * 100 for n in range(1000)})
            pipe.lpush("bare", *range(1000))
            pipe.execute()

    bare = per_second(count, pipelined)
    value = per_second(
        count, lambda: [queue.enqueue_many("send-email", [PAYLOAD] * 1000) for _ in range(0, count, 1000)]
    )
    show("enqueue, 1,000 at a time", value, bare, "jobs/s", "MSET + LPUSH of 1,000 in one MULTI")


class Drained(NamedTuple):
    """What it took to run a job, from the first completed job to the last."""

    rate: float  # jobs a second
    cpu: float  # microseconds of the worker's process
    switches: float  # of its threads
    trips: float  # packets that Redis read


def measure_drain(queue: Queue, raw: redis.Redis, folder: str, count: int, slots: int) -> None:
    """Compare a worker with threads that only pop ids and save nothing, as many as it has slots."""
    raw.flushall()
    raw.lpush("bare", *range(count))
    pops = [
        threading.Thread(target=lambda: [raw.brpop(["bare"], 1) for _ in range(count // slots)]) for _ in range(slots)
    ]

    def pop_all() -> None:
        for thread in pops:
            thread.start()
        for thread in pops:
            thread.join()

    bare = per_second(count, pop_all)
    raw.flushall()
    fill(queue, count)
    show_drain(f"drain, {slots} slots", drain(raw, folder, count, slots), bare, f"BRPOP in {slots} threads")


def show_drain(what: str, drained: Drained, limit: float, limited_by: str) -> None:
    show(what, drained.rate, limit, "jobs/s", limited_by)
    click.echo(
        f"{'':<34} {drained.cpu:>12,.1f} us of CPU a job, {drained.switches:.2f} context switches,"
        f" {drained.trips:.2f} round trips"
    )


def measure_sleeping(queue: Queue, raw: redis.Redis, folder: str, count: int) -> None:
    raw.flushall()
    fill(queue, count, "sleep", 0.002)
    drained = drain(raw, folder, count, 10)
    show_drain("handlers that sleep 2 ms, 10 slots", drained, 5000, "10 threads that only sleep")


def measure_pythons(queue: Queue, raw: redis.Redis, folder: str, count: int, pythons: Sequence[str]) -> None:
    """Compare other interpreters with this one."""
    fill(queue, count)
    own = drain(raw, folder, count, 10)
    for python in pythons:
        raw.flushall()
        fill(queue, count)
        version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout.strip()
        show_drain(f"drain, 10 slots, {version}", drain(raw, folder, count, 10, python), own.rate, "this Python")


def measure_durable(folder: str, count: int) -> None:
    """Compare Redis that syncs its log of writes with one that has none."""
    rates = []
    for options in ((), ("--appendonly", "yes"), ("--appendonly", "yes", "--appendfsync", "always")):
        with tempfile.TemporaryDirectory() as data, redis_server(data, *options) as url:
            Path(folder, "url").write_text(url)
            fill(Queue.from_url(url), count)
            rates.append(drain(redis.Redis.from_url(url), folder, count, 10))
    for sync, drained in zip(("everysec", "always"), rates[1:], strict=True):
        show_drain(f"drain, 10 slots, appendfsync {sync}", drained, rates[0].rate, "not persisted")


def fill(queue: Queue, count: int, type: str = "send-email", payload: Any = PAYLOAD) -> None:
    for _ in range(0, count, 1000):
        queue.enqueue_many(type, [payload] * 1000)


def drain(raw: redis.Redis, folder: str, count: int, slots: int, python: str = sys.executable) -> Drained:
    """Measure a worker from the first completed job to the last."""
    polls = 0

    def done() -> int:
        nonlocal polls
        polls += 1
        return int(raw.hget("{queue}:counts", "completed") or 0)

    def used() -> tuple[float, int, int]:
        return cpu_seconds(process.pid), switches(process.pid), int(raw.info("stats")["total_reads_processed"])

    with worker(folder, "--concurrency", str(slots), python=python) as process:
        until(done, 0.002)
        polls = 0
        before = used()
        first = done()
        begin = time.perf_counter()
        until(lambda: done() >= count)
        seconds = time.perf_counter() - begin
        cpu, switched, trips = (then - now for then, now in zip(used(), before, strict=True))
    jobs = count - first
    return Drained(jobs / seconds, cpu / jobs * 1e6, switched / jobs, (trips - polls) / jobs)


def switches(pid: int) -> int:
    """Count the context switches of all threads of a process."""
    lines = itertools.chain(*(path.read_text().splitlines() for path in Path(f"/proc/{pid}/task").glob("*/status")))
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)


def measure_latency(queue: Queue, raw: redis.Redis, folder: str) -> None:
    """Compare enqueue to handler with LPUSH to BRPOP, at fifty jobs a second."""
    with subprocess.Popen([sys.executable, "-c", POPPER], cwd=folder) as popper:
        time.sleep(0.5)
        paced(lambda: raw.lpush("bare", time.monotonic_ns()))
        popper.kill()
    with worker(folder, "--concurrency", "10"):
        until(lambda: queue.stats()["workers"])
        paced(lambda: queue.enqueue("clock", time.monotonic_ns()))
        until(lambda: not queue.stats()["pending"])
    value, bare = (milliseconds(Path(folder, name)) for name in ("latency", "bare"))
    for name, at in (("p50", 50), ("p99", 99)):
        show(f"latency, {name}", value[at - 1], bare[at - 1], "ms", "LPUSH to BRPOP in 10 threads")


def paced(act: Callable[[], Any], count: int = 300, rate: float = 50.0) -> None:
    begin = time.monotonic()
    for n in range(count):
        time.sleep(max(0.0, begin + n / rate - time.monotonic()))
        act()
    time.sleep(0.5)


def milliseconds(file: Path) -> list[float]:
    return statistics.quantiles([int(line) / 1e6 for line in file.read_text().split()], n=100)


def measure_memory(queue: Queue, raw: redis.Redis, count: int) -> None:
    def used() -> int:
        return int(raw.info("memory")["used_memory"])

    def grown(act: Callable[[], Any]) -> float:
        raw.flushall()
        before = used()
        act()
        return (used() - before) / count

    text = len('{"to":"user@example.com","subject":"Welcome!","body":"Thanks for signing up"}')
    bare = grown(lambda: [raw.lpush("bare", *["x" * text] * 1000) for _ in range(0, count, 1000)])
    show("memory of a pending job", grown(lambda: fill(queue, count)), bare, "bytes", "the payload alone, in a list")


def measure_idle(raw: redis.Redis, folder: str) -> None:
    raw.flushall()

    def commands() -> int:
        return int(raw.info("stats")["total_commands_processed"])

    with worker(folder) as process:
        time.sleep(3)
        before = commands()
        cpu = cpu_seconds(process.pid)
        time.sleep(20)
        show("idle worker", (commands() - before - 1) / 20, 3, "commands/s", "the goal")
        show("idle worker", 100 * (cpu_seconds(process.pid) - cpu) / 20, 0.3, "% of a core", "the goal")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))


def measure_import(folder: str, times: int = 15) -> None:
    """Compare a cold start with one that imports only what wsgi.py cannot do without."""
    value, bare = (statistics.median(each) for each in zip(*(imports(folder) for _ in range(times)), strict=True))
    show("import wsgi", value, bare, "ms of CPU", "bottle, redis and msgspec alone")


def imports(folder: str) -> tuple[float, float]:
    """Return the milliseconds of CPU of two new processes, whose bytecode is compiled already."""
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": f"{folder}/bytecode"}
    return (started("import wsgi", environ), started("import bottle, redis, msgspec", environ))


def started(script: str, environ: dict[str, str]) -> float:
    for _ in range(2):  # the first one may compile
        process = subprocess.Popen([sys.executable, "-c", script], env=environ)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise click.ClickException(f"{script} failed")
    return 1000 * (usage.ru_utime + usage.ru_stime)


def measure_http(raw: redis.Redis, folder: str) -> None:
    job = json.dumps({"type": "send-email", "payload": PAYLOAD})
    for connections in (1, 16, 64, 256):
        with web(folder, "-c", BARE_WEB) as url:
            bare = requests_per_second(folder, url, "/jobs", job, connections)
        with web(folder, str(ROOT / "wsgi.py")) as url:
            value = requests_per_second(folder, url, "/jobs", job, connections)
        show(f"POST /jobs, {connections} connections", value, bare, "jobs/s", "a bare route with one MULTI")
        raw.flushall()
    with web(folder, str(ROOT / "wsgi.py"), processes=2) as url:
        two = requests_per_second(folder, url, "/jobs", job, 64)
    with web(folder, str(ROOT / "wsgi.py")) as url:
        show(
            "POST /jobs, 2 web processes",
            two,
            requests_per_second(folder, url, "/jobs", job, 64),
            "jobs/s",
            "one web process",
        )
        batch = f"[{','.join([job] * 1000)}]"
        single = requests_per_second(folder, url, "/jobs", job, 16)
        show(
            "POST /jobs/batch, 1,000 each",
            1000 * requests_per_second(folder, url, "/jobs/batch", batch, 4),
            single,
            "jobs/s",
            "POST /jobs",
        )
    raw.flushall()


def measure_plan(raw: redis.Redis, folder: str, size: int, seconds: int = 8) -> None:
    """Measure the costs behind `worker.py plan`: jobs one at a time, which run for 0.4 s.

    Processor time is steadier than time, but a busy machine adds to it.
    """
    job = json.dumps({"type": "any", "payload": "x" * (size - 2)})

    def cpu_of_redis() -> float:
        info = raw.info("cpu")
        return float(info["used_cpu_user"] + info["used_cpu_sys"])

    def submit(host: str, rate: int) -> None:
        connection = http.client.HTTPConnection(host)
        begin = time.monotonic()
        for n in range(rate * seconds):
            time.sleep(max(0.0, begin + n / rate - time.monotonic()))
            connection.request("POST", "/jobs", job, {"Content-Type": "application/json"})
            connection.getresponse().read()

    for rate, slots in ((50, 5), (300, 50)):
        raw.flushall()
        count = rate * seconds
        with ExitStack() as stack:
            url, server = stack.enter_context(web_process(folder))
            workers = [stack.enter_context(worker(folder, "--concurrency", str(slots))) for _ in range(6)]
            until(lambda: raw.scard("{queue}:workers") == 6)
            pids = [[server.pid], [process.pid for process in workers]]
            before = [cpu_of_redis(), *(sum(map(cpu_seconds, some)) for some in pids)]
            submit(url.removeprefix("http://"), rate)
            until(lambda count=count: int(raw.hget("{queue}:counts", "completed") or 0) >= count)
            after = [cpu_of_redis(), *(sum(map(cpu_seconds, some)) for some in pids)]
        costs = [1e6 * (now - then) / count for now, then in zip(after, before, strict=True)]
        what = "%d jobs/s of %d bytes: %.0f us of Redis, %.0f us of a web process, %.0f us of a worker for each job"
        click.echo(what % (rate, size, *costs))


def measure_growth(queue: Queue, raw: redis.Redis, folder: str) -> None:
    rates = []
    for pending in (10_000, 1_000_000):
        raw.flushall()
        fill(queue, pending)
        rates.append(drain(raw, folder, 10_000, 10).rate)
    show("drain, 1,000,000 pending", rates[1], rates[0], "jobs/s", "with 10,000 pending")


@click.command()
@click.option("--jobs", default=20_000, show_default=True, help="Number of jobs of each measurement.")
@click.option("--growth", is_flag=True, help="Also measure the drain with a million pending jobs.")
@click.option("--plan", "of_plan", is_flag=True, help="Only measure the costs behind `worker.py plan`.")
@click.option("--python", "pythons", multiple=True, metavar="PATH", help="Also measure the drain with this Python.")
def main(jobs: int, growth: bool, of_plan: bool, pythons: tuple[str, ...]) -> None:
    """Compare TinyQueue with plain Redis commands."""
    with tempfile.TemporaryDirectory() as folder, redis_server(folder) as url:
        Path(folder, "benchhandlers.py").write_text(HANDLERS)
        Path(folder, "url").write_text(url)
        queue = Queue.from_url(url)
        raw = redis.Redis.from_url(url)
        if of_plan:
            raw.config_set("appendonly", "yes")
            for size in (2000, 20_000):
                measure_plan(raw, folder, size)
            return
        click.echo(f"{'measure':<34} {'TinyQueue':>12} {'unit':<10} {'ratio':>7}   {'limit':>12}")
        measure_enqueue(queue, raw, jobs)
        for slots in (10, 50):
            measure_drain(queue, raw, folder, jobs, slots)
        measure_sleeping(queue, raw, folder, jobs // 2)
        raw.flushall()
        measure_pythons(queue, raw, folder, jobs, pythons)
        raw.flushall()
        measure_latency(queue, raw, folder)
        measure_memory(queue, raw, 50_000)
        measure_idle(raw, folder)
        measure_import(folder)
        if shutil.which("wrk"):
            measure_http(raw, folder)
        else:
            click.echo("HTTP was not measured because wrk is not installed")
        if growth:
            measure_growth(queue, raw, folder)
        measure_durable(folder, jobs)


if __name__ == "__main__":
    main()
