"""Inject faults into real processes and check that no job is lost or repeated without a cause.

    python tests/chaos.py [--trials 1000] [--seed 1] [--parallel 4]
    python tests/chaos.py --seed 417 --trials 1

The second line repeats one trial, because the schedule of a trial depends only on its seed.

A world is a Redis that syncs every write, a web process and two workers. Each process is behind its
own proxy, and a supervisor restarts it as a platform does. A trial submits jobs over HTTP and from
Python while one to three faults happen. Then it ends all faults, waits until the world is quiet,
and judges the evidence. Handlers write the start and the end of each run to a file, so the evidence
does not depend on Redis. The judge requires:

    every accepted job has ended as its handler determines; a submit without an answer has made one
    job or none; the tick of a schedule has made one job
    a job of a chain starts after the one before it has completed, or fails because that did
    every end of a job with a callbackUrl was delivered to a receiver, under one id
    every run of a job except the first has a cause: its handler failed, or its worker was killed,
    was told to stop, or was cut off for longer than its lease
    runs of a job overlap only if the worker of the first was cut off for longer than its lease, or
    for up to 1.5 seconds if it was told to stop
    no more jobs of a limit run at a time than it allows, except those of a worker that was cut off,
    and at the end none counts as running or is held
    processes exit only because of a fault, and check_consistency finds no error

No fault lasts between SHORT and LONG, because it would then depend on the heartbeat whether a lease
expires. Whether a long fault interrupts a job depends on the machine. A plan of `plan_interruption`
leaves that to nothing: its fault hits the worker that runs a job, and lasts until the job has begun
again. An outage of Redis is never a cause for a second run, however long it lasts. If a trial
fails, its evidence is printed and the exit code is 1.
"""

from __future__ import annotations

import fcntl
import http.client
import http.server
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM
from typing import Any, NamedTuple

import click
import msgspec
import redis

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conftest import RedisServer, check_consistency, disconnect, free_port, until  # noqa: E402
from cutproxy import CutProxy  # noqa: E402

from tinyqueue import ENDED, Job, Queue, Schedule, TinyQueueError, Unavailable, WrongStatus  # noqa: E402
from tinyqueue_schedule import list_schedules, make_schedule  # noqa: E402

LEASE = 2  # seconds; renewed after at most 0.92, so that 1.08 are left at any time
SHORT = (0.1, 0.8)  # seconds of a fault during which no lease expires
LONG = (3.6, 4.3)  # seconds of a fault during which a reaper sees a lease unchanged for too long
PATIENCE = 40.0  # seconds after which the world must be quiet
WORKERS = ("worker-0", "worker-1")
TICK = "tick"  # the name of a schedule
RUNNER = "runner"  # as a victim: the worker that runs the first job

HANDLERS = """
import logging, os, pathlib, signal, sys, threading, time
from contextlib import contextmanager
from tinyqueue import Discard, Job, handler

MARKS = os.open("marks", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
PROCESS = os.getpid()
SOON = {"backoff": 0.05, "backoff_cap": 0.2}
quiet = logging.getLogger("quiet")  # has a handler of Python's library
quiet.addHandler(logging.FileHandler(os.devnull))
quiet.propagate = False

def mark(what, job):
    if os.getpid() == PROCESS:  # not in a forked child
        os.write(MARKS, f"{what} {job.id} {job.attempts} {PROCESS} {job.worker} {time.monotonic():.4f}\\n".encode())

@contextmanager
def marked(job):
    mark("begin", job)
    try:
        yield
    except BaseException:
        mark("fail", job)
        raise
    mark("end", job)

@handler("work", max_attempts=10, timeout=10, **SOON)
def work(payload: dict, job: Job) -> str:
    with marked(job):
        time.sleep(payload["ms"] / 1000)
        return payload["token"]

@handler("flaky", max_attempts=3, timeout=10, **SOON)
def flaky(payload: dict, job: Job) -> str:
    with marked(job):
        if job.attempts <= payload["fails"]:
            raise OSError("flaky")
        return payload["token"]

@handler("discard", max_attempts=3, timeout=10, **SOON)
def discard(payload: dict, job: Job) -> None:
    with marked(job):
        raise Discard("pointless")

@handler("poison", max_attempts=2, timeout=10, **SOON)
def poison(payload: dict, job: Job) -> None:
    with marked(job):
        time.sleep(payload["ms"] / 1000)
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(10)

@handler("hang", max_attempts=2, timeout=0.3, **SOON)
def hang(payload: dict, job: Job) -> None:
    with marked(job):
        while True:
            time.sleep(0.01)

@handler("loud", max_attempts=2, timeout=0.3, **SOON)
def loud(payload: dict, job: Job) -> None:
    with marked(job):
        while True:
            quiet.info("said to a file")
            logging.debug("said to nobody")

@handler("mutate", max_attempts=10, timeout=10, **SOON)
def mutate(payload: dict, job: Job) -> str:
    with marked(job):
        job.payload["object"] = object()
        job.max_attempts = job.refunds = job.started_at = 77
        job.type = job.queue = object()
    job.attempts += 1
    job.id = "none"
    return payload["token"]

@handler("stuck", max_attempts=1, timeout=0.3, **SOON)
def stuck(payload: dict, job: Job) -> None:
    with marked(job):
        time.sleep(6.5)  # notices its timeout only afterwards, when its thread has been abandoned

@handler("exit", max_attempts=2, timeout=10, **SOON)
def exit(payload: dict, job: Job) -> None:
    with marked(job):
        sys.exit(3)

@handler("fork", max_attempts=10, timeout=10, **SOON)
def fork(payload: dict, job: Job) -> str:
    with marked(job):
        if child := os.fork():
            os.waitpid(child, 0)
        return payload["token"]

@handler("thread", max_attempts=10, timeout=10, **SOON)
def thread(payload: dict, job: Job) -> str:
    with marked(job):
        threading.Thread(target=time.sleep, args=(1.0,)).start()
        return payload["token"]

@handler("one", max_attempts=10, timeout=10, max_running=1, limit_by="account", **SOON)
def one(payload: dict, job: Job) -> str:
    with marked(job):
        time.sleep(payload["ms"] / 1000)
        return payload["token"]

@handler("three", max_attempts=10, timeout=10, max_running=3, limit_by="account", **SOON)
def three(payload: dict, job: Job) -> str:
    with marked(job):
        time.sleep(payload["ms"] / 1000)
        return payload["token"]

@handler("interrupted", max_attempts=10, timeout=60, **SOON)
def interrupted(payload: dict, job: Job) -> str:
    with marked(job):
        while pathlib.Path("marks").read_text().count(f"begin {job.id} ") < 2:
            time.sleep(0.01)
        return payload["token"]
"""
HARMFUL = (
    "poison",
    "hang",
    "loud",
    "mutate",
    "stuck",
    "exit",
    "fork",
    "thread",
)  # types of jobs that are a fault themselves
MAX_ATTEMPTS = {
    "work": 10,
    "flaky": 3,
    "discard": 3,
    "poison": 2,
    "hang": 2,
    "loud": 2,
    "mutate": 10,
    "stuck": 1,
    "exit": 2,
    "fork": 10,
    "thread": 10,
    "one": 10,
    "three": 10,
    "interrupted": 10,
}
LIMITS = {"one": 1, "three": 3}  # jobs of these types that run at a time for each account
ACCOUNTS = 20
FAILS_WITH = {
    **{"flaky": "OSError", "discard": "Discard", "poison": "WorkerLost"},
    **{"hang": "TimedOut", "loud": "TimedOut", "stuck": "TimedOut", "exit": "SystemExit"},
}
SUSPICIONS = 2  # times that a job may kill its worker without losing an attempt

# Sets the wall clock ten minutes ahead. libfaketime 0.9.10 would also affect time.sleep or the
# monotonic clock.
CC = shutil.which("cc")
WRONG_CLOCK = """
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t id, struct timespec *now) {
    int code = syscall(SYS_clock_gettime, id, now);
    if (id == CLOCK_REALTIME) now->tv_sec += 600;
    return code;
}
"""
# Adds the seconds in a file to the wall clock, and follows when they change.
SET_CLOCK = """
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile int64_t zero, *ahead = &zero;
__attribute__((constructor)) static void attach(void) {
    int file = open(getenv("CLOCK_AHEAD"), O_RDONLY);
    if (file >= 0) ahead = mmap(0, sizeof *ahead, PROT_READ, MAP_SHARED, file, 0);
}
int clock_gettime(clockid_t id, struct timespec *now) {
    int code = syscall(SYS_clock_gettime, id, now);
    if (id == CLOCK_REALTIME) now->tv_sec += *ahead;
    return code;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *result) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (result) *result = precise.tv_sec;
    return precise.tv_sec;
}
"""


# The plan -------------------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """A fault that begins `at` seconds after the start of the trial.

    With the victim RUNNER it begins when a worker runs a job. If `seconds` is infinite, it lasts
    until that job has begun again.
    """

    kind: str
    at: float
    victim: str
    seconds: float


@dataclass
class Submit:
    """A submit and its result. `token` is also its Idempotency-Key, and job n has `token.n`."""

    token: str
    at: float
    via: str  # http, batch, python, or a schedule
    type: str
    payloads: list[dict[str, Any]]
    delay: float
    patient: bool  # repeat it with the same key until it is answered
    cancel: bool
    callback: bool = False
    chain: bool = False  # each job of the batch starts after the one before it
    ids: list[str] = field(default_factory=list)  # from the answer
    doubtful: bool = False  # not answered, so it may have been accepted
    cancelled_at: float = 0.0  # when the answer came that it is cancelled
    tries: int = 0


class Plan(NamedTuple):
    seed: int
    faults: list[Fault]
    submits: list[Submit]

    @property
    def kinds(self) -> list[str]:
        return [fault.kind for fault in self.faults]

    @property
    def jobs(self) -> int:
        return sum(len(submit.payloads) for submit in self.submits)


def plan(seed: int) -> Plan:
    """Draw a plan. Consecutive seeds begin with different kinds of faults, so all kinds occur."""
    rng = random.Random(seed)
    kinds = list(KINDS)
    others = rng.sample([kind for kind in kinds if kind != kinds[seed % len(kinds)]], rng.randrange(3))
    faults = []
    for kind in [kinds[seed % len(kinds)], *others]:
        victim = rng.choice(("web", *WORKERS) if kind.startswith(("link-", "log-")) else WORKERS)
        seconds = rng.uniform(*(LONG if kind.endswith("-long") else SHORT))
        faults.append(Fault(kind, round(rng.uniform(0.1, 0.8), 3), victim, round(seconds, 3)))
    types = rng.choices(("work", "flaky", "discard"), (8, 2, 1), k=rng.randrange(16, 24))
    types += rng.choices(tuple(LIMITS), k=rng.randrange(8, 16))
    types += [kind for kind in [kinds[seed % len(kinds)], *others] if kind in HARMFUL for _ in range(2)]
    submits = [_draw_submit(rng, f"{seed}-{n}", type) for n, type in enumerate(types)]
    if any(fault.kind == "schedule-tick" for fault in faults):
        payloads = [{"token": f"{seed}-tick.0", "ms": 50}]
        submits.append(Submit(f"{seed}-tick", 0.0, "schedule", "work", payloads, 0.0, patient=True, cancel=False))
    return Plan(seed, faults, submits)


def plan_interruption(kind: str) -> Plan:
    """Plan a fault that surely interrupts a job: its handler ends only after it has begun twice."""
    submit = Submit(kind, 0.0, "http", "interrupted", [{"token": kind}], 0.0, patient=True, cancel=False)
    return Plan(0, [Fault(kind, 0.0, RUNNER, math.inf)], [submit])


def _draw_submit(rng: random.Random, token: str, type: str) -> Submit:
    via = rng.choice(("http", "http", "batch", "python"))
    payloads = [
        {
            "token": f"{token}.{n}",
            "ms": rng.choice((rng.randrange(50), rng.randrange(50, 200))),
            "fails": rng.randrange(1, 5),
            "account": f"a{int(rng.random() ** 3 * ACCOUNTS)}",  # few have many jobs
        }
        for n in range(rng.randrange(2, 5) if via == "batch" and type not in HARMFUL else 1)
    ]
    delay = rng.choice((0.0, 0.0, round(rng.uniform(0.05, 0.5), 2)))
    patient = via != "python" and rng.random() < 0.8
    at = round(rng.uniform(0.0, 0.6), 3)
    cancel = rng.random() < 0.15
    callback = rng.random() < 0.3
    chain = via == "batch" and rng.random() < 0.6
    return Submit(token, at, via, type, payloads, delay, patient, cancel, callback, chain)


# The world ------------------------------------------------------------------------------------------------------------


class Signal(NamedTuple):
    at: float
    pid: int
    number: int


class Death(NamedTuple):
    at: float  # when it was seen
    name: str
    pid: int
    code: int


class Cut(NamedTuple):
    """A victim that could not reach Redis for longer than its lease, while others could."""

    begin: float
    end: float
    victim: str


class Receiver(http.server.ThreadingHTTPServer):
    """Receives the ends of jobs. `received` has the id of each request and that of its job."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ReceiverHandler)
        self.received: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class ReceiverHandler(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.headers["webhook-id"], json.loads(body)["data"]["id"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class World:
    """A Redis, a web process and two workers behind proxies, and their supervisor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.closed = False
        (folder / "redis").mkdir()
        (folder / "chaoshandlers.py").write_text(HANDLERS)
        (folder / "marks").touch()
        self.redis = RedisServer(folder / "redis", "--appendonly", "yes", "--appendfsync", "always")
        self.clock = folder / "ahead"
        self.clock.write_bytes(struct.pack("q", 0))
        if CC:
            self.redis.environ = {"LD_PRELOAD": str(folder / "set_clock.so"), "CLOCK_AHEAD": str(self.clock)}
        self.redis.start()
        self.proxies = {name: CutProxy(self.redis.port) for name in ("web", *WORKERS)}
        self.queue = Queue.from_url(self.redis.url, lease=LEASE)
        self.client = redis.Redis(connection_pool=self.queue.pool)
        self.proxied_queue = Queue.from_url(self.proxies["web"].url, lease=LEASE)
        self.port = free_port()
        self.receiver = Receiver()
        self.password = ""
        self.seed = 0  # of the trial
        self.names: dict[int, str] = {}  # of processes, by pid
        self.lock = threading.Lock()  # for the processes
        self.redis_lock = threading.Lock()  # for faults of Redis: one at a time
        self.wrong_clocks: set[str] = set()
        self.unanswered: set[str] = set()  # tokens of submits that had no answer
        self.signals: list[Signal] = []
        self.deaths: list[Death] = []
        self.cuts: list[Cut] = []
        self.reading = {name: threading.Event() for name in self.proxies}  # set while its log is read
        self.processes = {name: self._spawn(name) for name in self.proxies}
        self.supervisor = threading.Thread(target=self._supervise, daemon=True)
        self.supervisor.start()

    def close(self) -> None:
        self.closed = True
        self.supervisor.join()
        for process in self.processes.values():
            self._kill_tree(process.pid)
            process.wait(10)
        disconnect([self.queue.pool, self.proxied_queue.pool])
        for proxy in self.proxies.values():
            proxy.close()
        self.receiver.shutdown()
        self.receiver.server_close()
        self.redis.kill()

    def set_clock(self, by: int) -> None:
        """Move the wall clock of Redis by so many seconds."""
        with self.redis_lock:
            [ahead] = struct.unpack("q", self.clock.read_bytes())
            before, _ = self.command_redis("TIME")
            with self.clock.open("r+b") as file:  # in place: the server has it mapped
                file.write(struct.pack("q", ahead + by))
            after, _ = self.command_redis("TIME")
            assert not CC or abs(after - before - by) < 30, "the clock of Redis did not move"

    # Processes --------------------------------------------------------------------------------------------------------

    def _spawn(self, name: str) -> subprocess.Popen[bytes]:
        environ = {
            "PATH": os.environ["PATH"],
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
            "REDIS_URL": self.proxies[name].url,
        }
        environ |= {"PYTHONPATH": str(ROOT), "WORKER_CONCURRENCY": "3", "TINYQUEUE_HANDLERS": "chaoshandlers"}
        environ |= {"TINYQUEUE_LEASE": str(LEASE), "TINYQUEUE_SHUTDOWN_TIMEOUT": name[-1] if name in WORKERS else "5"}
        environ |= {"TINYQUEUE_WEBHOOK_SECRETS": f"whsec_{'A' * 32}", "TINYQUEUE_HTTP_ALLOW": "127.0.0.0/8"}
        if name in self.wrong_clocks and CC:
            environ["LD_PRELOAD"] = str(self.folder / "clock.so")
        program = ROOT / ("wsgi.py" if name == "web" else "worker.py")
        log, its_log = os.pipe()
        fcntl.fcntl(log, fcntl.F_SETPIPE_SZ, 4096)
        process = subprocess.Popen(
            [sys.executable, str(program)],
            cwd=self.folder,
            env=environ,
            stdout=its_log,
            stderr=its_log,
            start_new_session=True,
        )
        os.close(its_log)
        self.reading[name].set()
        threading.Thread(target=self._copy_log, args=(log, name), daemon=True).start()
        self.names[process.pid] = name
        return process

    def _copy_log(self, log: int, name: str) -> None:
        with open(log, "rb", buffering=0) as source, (self.folder / f"{name}.log").open("ab", buffering=0) as target:
            while data := source.read(4096):
                target.write(data)
                self.reading[name].wait()

    def _supervise(self) -> None:
        parent = os.getppid()
        while not self.closed:
            if os.getppid() != parent:  # the parent was killed: end this world
                os.kill(os.getpid(), SIGTERM)
            for name, process in self.processes.items():
                if process.poll() is not None:
                    with self.lock:
                        self.deaths.append(Death(time.monotonic(), name, process.pid, process.returncode))
                        self.processes[name] = self._spawn(name)
            time.sleep(0.01)

    def signal(self, process: subprocess.Popen[bytes], number: int) -> None:
        self.signals.append(Signal(time.monotonic(), process.pid, number))  # before it has an effect
        process.send_signal(number)

    def _kill_tree(self, pid: int) -> None:
        """Send SIGKILL to a process and then to its descendants."""
        children = Path(f"/proc/{pid}/task/{pid}/children")
        pids = children.read_text().split() if children.exists() else []
        self.signals.append(Signal(time.monotonic(), pid, SIGKILL))
        with suppress(ProcessLookupError):
            os.kill(pid, SIGKILL)
        for child in pids:
            self._kill_tree(int(child))

    def kill_tree(self, name: str) -> None:
        with self.lock:  # so that the pid is not reused meanwhile
            self._kill_tree(self.processes[name].pid)

    def successor(self, process: subprocess.Popen[bytes], name: str) -> subprocess.Popen[bytes]:
        while self.processes[name] is process and not self.closed:
            time.sleep(0.005)
        return self.processes[name]

    # Redis ------------------------------------------------------------------------------------------------------------

    def command_redis(self, *command: Any) -> Any:
        password = self.password or None
        with redis.Redis(port=self.redis.port, password=password, retry=None, socket_timeout=10) as client:
            return client.execute_command(*command)

    def assert_refused(self, error: type[redis.RedisError]) -> None:
        """Check that Redis refuses a write, which shows that a fault is there."""
        try:
            self.command_redis("SET", "refused", "")
        except error:
            return
        raise AssertionError(f"Redis did not refuse a write with {error.__name__}")

    def cut_off(self, victim: str, seconds: float) -> None:
        """Wait while a victim is cut off. Record it if its lease expires meanwhile."""
        begin = time.monotonic()
        if seconds == math.inf:
            until(lambda: len(self._runs()) > 1, PATIENCE)
        else:
            time.sleep(seconds)
        if seconds >= LONG[0]:
            self.cuts.append(Cut(begin, time.monotonic() + 1.0, victim))  # the victim learns of it a little later

    # A trial ----------------------------------------------------------------------------------------------------------

    def trial(self, plan: Plan) -> Result:
        """Run a plan and judge the evidence."""
        begun = self._begin()
        self.seed = plan.seed
        submitters = ThreadPoolExecutor(12)
        injectors = ThreadPoolExecutor(3)
        submits = [submitters.submit(self._submit, submit, begun) for submit in plan.submits]
        faults = [injectors.submit(self._inject, fault, begun) for fault in plan.faults]
        wait(faults)
        for proxy in self.proxies.values():
            proxy.heal()
        healed = time.monotonic()
        problems = [str(problem) for done in (*submits, *faults) if (problem := done.exception() or done.result())]
        submitters.shutdown()
        injectors.shutdown()
        quiet = self._wait_for_quiet(healed + PATIENCE)
        recovery = time.monotonic() - healed
        if not quiet:
            problems.append(f"not quiet after {PATIENCE} s: {self.queue.stats()} {self.queue.workers()}")
        problems += self._check_consistency()
        evidence = self._evidence(plan)
        verdict = judge(evidence)
        self._clear()
        return Result(plan, verdict, problems, show(evidence), recovery, time.monotonic() - begun)

    def _begin(self) -> float:
        if not self._wait_for_quiet(time.monotonic() + PATIENCE):
            raise RuntimeError(f"the world did not become quiet: {self.queue.workers()}")
        os.truncate(self.folder / "marks", 0)
        self.receiver.received.clear()
        self.signals.clear()
        self.deaths.clear()
        self.cuts.clear()
        return time.monotonic()

    def _inject(self, fault: Fault, begun: float) -> None:
        time.sleep(max(0.0, begun + fault.at - time.monotonic()))
        if fault.victim == RUNNER:
            [run] = until(self._runs, PATIENCE)
            fault = fault._replace(victim=self.names[run.pid])
        if fault.kind not in HARMFUL:
            KINDS[fault.kind](self, fault)

    def _wait_for_quiet(self, until: float) -> bool:
        while time.monotonic() < until:
            with suppress(Unavailable, OSError, http.client.HTTPException):
                if self._quiet():
                    return True
            time.sleep(0.02)
        return False

    def _quiet(self) -> bool:
        """Whether all jobs have ended and exactly the running workers are registered."""
        stats, workers = self.queue.stats(), self.queue.workers()
        alive = {worker["pid"] for worker in workers if worker["alive"]}
        expected = {self.processes[name].pid for name in WORKERS}
        known = self.client.smembers(self.queue.keys.workers)
        if expected & {signal.pid for signal in self.signals}:  # it is stopping
            return False
        idle = not stats["pending"] and not stats["processing"] and len(known) == len(workers) == len(WORKERS)
        return idle and alive == expected and self._call("GET", "/ready")[0] == 200

    def _check_consistency(self) -> list[str]:
        """Check the consistency until it passes: harmless entries may remain for a while."""
        until = time.monotonic() + 3.0
        while True:
            try:
                check_consistency(self.queue)
                left = [
                    key
                    for family in (self.queue.keys.running("*"), self.queue.keys.held("*"))
                    for key in self.client.keys(family)
                ]
                assert not left, f"jobs of limits are left: {left}"
                return []
            except AssertionError as error:
                if time.monotonic() > until:
                    return [f"the queue is not consistent: {error}"]
            time.sleep(0.1)

    def _records(self) -> list[Job]:
        ids = [key.decode().removeprefix(self.queue.keys.job("")) for key in self.client.keys(self.queue.keys.job("*"))]
        return [job for id in ids if (job := self.queue.get(id))]

    def _clear(self) -> None:
        """Delete the jobs of the trial, so that the next one is checked faster."""
        keys = self.queue.keys
        made = [key for family in (keys.job("*"), keys.prefix + "once:*") for key in self.client.keys(family)]
        self.client.delete(keys.schedule(TICK), keys.ticks)
        self.client.delete(*made, keys.ended["completed"], keys.ended["failed"], keys.ended["cancelled"])

    def _runs(self) -> list[Run]:
        return read_marks([line.split() for line in (self.folder / "marks").read_text().splitlines()])

    def _evidence(self, plan: Plan) -> Evidence:
        logs = {
            name: (self.folder / f"{name}.log").read_text(errors="replace").splitlines()[-400:] for name in self.proxies
        }
        signals, deaths, cuts = list(self.signals), list(self.deaths), list(self.cuts)
        late = frozenset(self.unanswered)
        self.unanswered |= {item["token"] for submit in plan.submits if submit.doubtful for item in submit.payloads}
        received = list(self.receiver.received)
        names = dict(self.names)
        return Evidence(plan, self._records(), self._runs(), signals, deaths, cuts, names, logs, late, received)

    # Submitting -------------------------------------------------------------------------------------------------------

    def _call(self, method: str, path: str, body: Any = None, key: str = "") -> tuple[int, Any]:
        headers = {"Content-Type": "application/json"} | ({"Idempotency-Key": key} if key else {})
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=1.0)) as connection:
            connection.request(
                method, path, None if body is None else json.dumps(body), headers if body is not None else {}
            )
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def _submit(self, submit: Submit, begun: float) -> str:
        """Make a submit, with its repeats and its cancellation. Returns a problem, if any."""
        time.sleep(max(0.0, begun + submit.at - time.monotonic()))
        deadline = time.monotonic() + PATIENCE
        ways = {"python": self._send_from_python, "schedule": self._find_ticked}
        send = ways.get(submit.via, self._send_over_http)
        while not send(submit):
            if not submit.patient:
                return ""
            if time.monotonic() > deadline:
                return f"submit {submit.token} was not answered"
            time.sleep(0.1)
        if submit.cancel:
            with suppress(OSError, http.client.HTTPException):
                status, answer = self._call("DELETE", f"/jobs/{submit.ids[0]}")
                if status == 200 and answer["status"] == "cancelled":
                    submit.cancelled_at = time.monotonic()
        return ""

    def _send_from_python(self, submit: Submit) -> bool:
        url = self.receiver.url if submit.callback else None
        options = {"max_attempts": MAX_ATTEMPTS[submit.type], "delay": submit.delay, "callback_url": url}
        try:
            submit.ids = [self.proxied_queue.enqueue(submit.type, submit.payloads[0], **options).id]
        except Unavailable as error:
            submit.doubtful = error.doubtful
        return bool(submit.ids)

    def _find_ticked(self, submit: Submit) -> bool:
        """Look for the job of the schedule, which a worker enqueues."""
        with suppress(Unavailable):
            submit.ids = [made.last_job for made, _ in list_schedules(self.queue) if made.last_job]
        return bool(submit.ids)

    def _send_over_http(self, submit: Submit) -> bool:
        more = {"type": submit.type, "delay": submit.delay}
        more |= {"callbackUrl": self.receiver.url} if submit.callback else {}
        bodies = [{"payload": payload, **more} for payload in submit.payloads]
        if submit.chain:
            bodies = [{**body, "ref": f"r{n}", "after": [f"r{n - 1}"] if n else []} for n, body in enumerate(bodies)]
        path, body = ("/jobs/batch", bodies) if submit.via == "batch" else ("/jobs", bodies[0])
        submit.tries += 1
        try:
            status, answer = self._call("POST", path, body, submit.token if submit.patient else "")
        except (OSError, http.client.HTTPException):
            submit.doubtful = True
            return False
        if status in (200, 201):
            submit.ids = [job["jobId"] for job in answer.get("jobs", [answer])]
        elif status != 503:
            raise AssertionError(f"submit {submit.token} was answered {status}: {answer}")
        else:
            submit.doubtful = True
        return bool(submit.ids)


# Faults ---------------------------------------------------------------------------------------------------------------


def kill_worker(world: World, fault: Fault) -> None:
    world.signal(world.processes[fault.victim], SIGKILL)


def kill_tree(world: World, fault: Fault) -> None:
    for name in WORKERS:
        world.kill_tree(name)


def kill_web(world: World, fault: Fault) -> None:
    world.signal(world.processes["web"], SIGKILL)


def stop(world: World, fault: Fault) -> None:
    """Send SIGSTOP, and later SIGCONT."""
    process = world.processes[fault.victim]
    process.send_signal(SIGSTOP)
    world.cut_off(fault.victim, fault.seconds)
    process.send_signal(SIGCONT)


def term(world: World, fault: Fault) -> None:
    world.signal(world.processes[fault.victim], SIGTERM)


def term_thrice(world: World, fault: Fault) -> None:
    process = world.processes[fault.victim]
    for _ in range(3):
        world.signal(process, SIGTERM)
        time.sleep(0.05)


def term_at_start(world: World, fault: Fault) -> None:
    """Kill a worker, and stop the next one before it starts or while it starts."""
    process = world.processes[fault.victim]
    world.signal(process, SIGKILL)
    process = world.successor(process, fault.victim)
    time.sleep(fault.seconds)
    world.signal(process, SIGTERM)


def wrong_clock(world: World, fault: Fault) -> None:
    """Replace a worker by one whose wall clock is ten minutes ahead, and then that one again."""
    world.wrong_clocks.add(fault.victim)
    process = world.processes[fault.victim]
    world.signal(process, SIGTERM)
    process = world.successor(process, fault.victim)
    time.sleep(1.5)
    world.wrong_clocks.clear()
    world.signal(process, SIGTERM)
    world.successor(process, fault.victim)


def clock_ahead(world: World, fault: Fault) -> None:
    """Set the wall clock of Redis a minute ahead, for good: back again, backoffs would take a minute."""
    world.set_clock(60)


def clock_back(world: World, fault: Fault) -> None:
    """Set the wall clock of Redis an hour back, and right again."""
    world.set_clock(-3600)
    time.sleep(fault.seconds)
    world.set_clock(3600)


def redis_kill(world: World, fault: Fault) -> None:
    with world.redis_lock:
        world.redis.kill()
        time.sleep(fault.seconds)
        world.redis.start()


def redis_loading(world: World, fault: Fault) -> None:
    """Kill Redis and make it load for about a second, during which it answers LOADING."""
    with world.redis_lock:
        with world.client.pipeline(transaction=False) as pipeline:
            for _ in range(3000):
                pipeline.set("padding", "").delete("padding")
            pipeline.execute()
        world.redis.kill()
        commands = sum(
            file.read_bytes().count(b"\r\n*") for file in (world.redis.folder / "appendonlydir").glob("*.aof")
        )
        pauses = min(commands, 10_000)  # each takes at least 60 microseconds
        delay = str(1_000_000 // pauses - 60) if pauses == commands else str(-commands // pauses)
        options, world.redis.options = world.redis.options, (*world.redis.options, "--key-load-delay", delay)
        world.redis.start()
        world.redis.options = options


def client_kill(world: World, fault: Fault) -> None:
    with world.redis_lock:  # nobody is connected yet if Redis was just restarted
        until(lambda: world.command_redis("CLIENT", "KILL", "TYPE", "normal"))


def client_pause(world: World, fault: Fault) -> None:
    with world.redis_lock:
        world.command_redis("CLIENT", "PAUSE", int(fault.seconds * 1000))
        time.sleep(fault.seconds)


def redis_full(world: World, fault: Fault) -> None:
    with world.redis_lock:
        # One byte, because a Redis that has just started uses less than a megabyte.
        world.command_redis("CONFIG", "SET", "maxmemory", "1")
        world.assert_refused(redis.exceptions.OutOfMemoryError)
        time.sleep(fault.seconds)
        world.command_redis("CONFIG", "SET", "maxmemory", "0")


def read_only(world: World, fault: Fault) -> None:
    """Make Redis a replica, as in a failover. Its master is unreachable, so it keeps its data."""
    with world.redis_lock:
        world.command_redis("REPLICAOF", "127.0.0.1", "1")
        world.assert_refused(redis.ReadOnlyError)
        time.sleep(fault.seconds)
        world.command_redis("REPLICAOF", "NO", "ONE")


def password(world: World, fault: Fault) -> None:
    """Change the password for a while, and close all connections so that they need it."""
    with world.redis_lock:
        world.command_redis("CONFIG", "SET", "requirepass", "other")
        world.assert_refused(redis.AuthenticationError)
        world.password = "other"
        world.command_redis("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        time.sleep(fault.seconds)
        world.command_redis("CONFIG", "SET", "requirepass", "")
        world.password = ""


def link_lost_reply(world: World, fault: Fault) -> None:
    """Drop a reply of Redis for each step of a job's life."""
    proxy = world.proxies[fault.victim]
    for trigger in (b"EXEC", b"RPOPLPUSH", b"MSET", b"EXEC", b"LREM"):
        proxy.drop_reply(trigger)
    time.sleep(fault.seconds)


def link_late_exec(world: World, fault: Fault) -> None:
    """Deliver transactions late, after the client has given up on them and gone on.

    From the web process only those with an Idempotency-Key. Without a key nothing is watched: a submit
    that is repeated and then delivered late is counted as pending twice, although it makes one job.
    """
    proxy = world.proxies[fault.victim]
    for trigger in (b"MSET", b"LREM", b"EXEC") if fault.victim in WORKERS else (b"\r\nPX\r\n",) * 3:
        proxy.hold(trigger)
    time.sleep(fault.seconds)
    proxy.deliver()


def link_stall(world: World, fault: Fault) -> None:
    """Hold all data on a link, and deliver it afterwards."""
    proxy = world.proxies[fault.victim]
    proxy.flowing.clear()
    world.cut_off(fault.victim, fault.seconds)
    proxy.flowing.set()


def link_reset(world: World, fault: Fault) -> None:
    """Hold all data on a link, and then close its connections."""
    proxy = world.proxies[fault.victim]
    proxy.flowing.clear()
    world.cut_off(fault.victim, fault.seconds)
    proxy.cut()
    proxy.flowing.set()


def link_delay(world: World, fault: Fault) -> None:
    world.proxies[fault.victim].delay = 0.03
    time.sleep(fault.seconds + 0.5)
    world.proxies[fault.victim].delay = 0.0


def link_cut(world: World, fault: Fault) -> None:
    """Close all connections of a link, ten times."""
    for _ in range(10):
        world.proxies[fault.victim].cut()
        time.sleep(fault.seconds / 10)


def log_stall(world: World, fault: Fault) -> None:
    """Do not read the log of a process for some time."""
    world.reading[fault.victim].clear()
    time.sleep(fault.seconds)
    world.reading[fault.victim].set()


def schedule_tick(world: World, fault: Fault) -> None:
    """Make a schedule that is due in the next minute, and set the clock to that minute, for good."""
    made = make_schedule(TICK, "0 0 1 1 *", "work", {"token": f"{world.seed}-tick.0", "ms": 50}, max_attempts=10)

    def put() -> bool:
        with suppress(Unavailable):
            world.queue.change_schedule(TICK, lambda found, last, now: (found or _due_next(made, now), 0))
            return True
        return False

    until(put, PATIENCE)
    world.set_clock(61 - int(world.command_redis("TIME")[0]) % 60)


def _due_next(made: Schedule, now: int) -> Schedule:
    return msgspec.structs.replace(made, next_at=now - now % 60_000 + 60_000)


def hasten(world: World, fault: Fault) -> None:
    """Let every delayed job start now, also those that fail meanwhile and wait for their backoff."""
    end = time.monotonic() + fault.seconds
    while time.monotonic() < end:
        with suppress(TinyQueueError, redis.RedisError):
            for entry in world.client.zrange(world.queue.keys.delayed, 0, -1):
                with suppress(WrongStatus):
                    world.queue.hasten(entry.decode())
        time.sleep(0.01)


def quiet(world: World, fault: Fault) -> None:
    """Let a worker take no jobs for a while. If it dies, so does its mark."""
    pid = world.processes[fault.victim].pid

    def tell(verb: Callable[[Queue, str], bool]) -> bool:
        with suppress(Unavailable):
            for worker in world.queue.workers():
                if worker["pid"] == pid:
                    verb(world.queue, worker["id"])
            return True
        return False

    until(lambda: tell(Queue.quiet), PATIENCE)
    time.sleep(fault.seconds)
    until(lambda: tell(Queue.resume_worker), PATIENCE)


def harmful_jobs(world: World, fault: Fault) -> None:
    """Do nothing: the submits of the plan include harmful jobs."""


KINDS: dict[str, Callable[[World, Fault], None]] = {
    "kill-worker": kill_worker,
    "kill-tree": kill_tree,
    "kill-web": kill_web,
    "stop-short": stop,
    "stop-long": stop,
    "term": term,
    "term-thrice": term_thrice,
    "term-at-start": term_at_start,
    "wrong-clock": wrong_clock,
    "clock-ahead": clock_ahead,
    "clock-back": clock_back,
    "clock-back-long": clock_back,
    "redis-kill": redis_kill,
    "redis-kill-long": redis_kill,
    "redis-loading": redis_loading,
    "client-kill": client_kill,
    "client-pause": client_pause,
    "client-pause-long": client_pause,
    "redis-full": redis_full,
    "redis-full-long": redis_full,
    "read-only": read_only,
    "read-only-long": read_only,
    "password": password,
    "password-long": password,
    "link-lost-reply": link_lost_reply,
    "link-late-exec": link_late_exec,
    "link-stall": link_stall,
    "link-stall-long": link_stall,
    "link-reset-long": link_reset,
    "link-delay": link_delay,
    "link-cut": link_cut,
    "log-stall": log_stall,
    "log-stall-long": log_stall,
    "hasten": hasten,
    "quiet-long": quiet,
    **({"schedule-tick": schedule_tick} if CC else {}),
    **dict.fromkeys(HARMFUL, harmful_jobs),
}


# The judge ------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A run of a handler. `how` it ended is end, fail, or empty if it wrote no second mark."""

    id: str
    attempt: int
    pid: int
    worker: str
    begin: float
    end: float = float("inf")
    how: str = ""


class Evidence(NamedTuple):
    """Everything known about a trial."""

    plan: Plan
    records: list[Job]
    runs: list[Run]
    signals: list[Signal]
    deaths: list[Death]
    cuts: list[Cut]
    names: dict[int, str]  # of processes
    logs: dict[str, list[str]]
    late: Collection[str] = ()  # tokens of earlier trials whose submit had no answer: the job may come now
    received: Sequence[tuple[str, str]] = ()  # ids of delivered ends, and of their jobs


class Verdict(NamedTuple):
    """The findings of the judge. `lost`, `unexplained` and `wrong` must be empty."""

    lost: list[str]
    unexplained: list[str]
    wrong: list[str]
    explained: Counter[str]  # repeated runs by cause


class Result(NamedTuple):
    plan: Plan
    verdict: Verdict
    problems: list[str]
    evidence: str
    recovery: float
    seconds: float

    @property
    def failures(self) -> list[str]:
        return [*self.verdict.lost, *self.verdict.unexplained, *self.verdict.wrong, *self.problems]


def read_marks(marks: Sequence[Sequence[str]]) -> list[Run]:
    """Parse the marks that handlers wrote into runs."""
    runs: list[Run] = []
    for what, id, attempt, pid, worker, at in marks:
        if what == "begin":
            runs.append(Run(id, int(attempt), int(pid), worker, float(at)))
        else:
            same = (id, int(attempt), int(pid), worker)
            for n, run in enumerate(runs):  # a stuck handler may write its last mark in the next trial
                if run[:4] == same and not run.how:
                    runs[n] = run._replace(end=float(at), how=what)
    return runs


def judge(evidence: Evidence) -> Verdict:
    """Compare the accepted jobs, the records in Redis and the marks of the handlers."""
    verdict = Verdict([], [], [], Counter())
    by_token: dict[str, list[Job]] = {}
    deliveries = [job for job in evidence.records if job.type == "webhook"]
    for job in (job for job in evidence.records if job.type != "webhook"):
        by_token.setdefault(job.payload["token"], []).append(job)
    for submit in evidence.plan.submits:
        found = [by_token.pop(payload["token"], []) for payload in submit.payloads]
        _judge_submit(submit, found, verdict)
        before: Job | None = None
        for n, job in enumerate(job for jobs in found for job in jobs):
            # By attempt: a worker that is suspended between start and handler runs the job late.
            runs = sorted((run for run in evidence.runs if run.id == job.id), key=lambda run: (run.attempt, run.begin))
            if before and before.status != "completed":
                _judge_dependent(job, runs, verdict)
            else:
                _judge_end(submit, job, runs, n == 0, verdict)
            if before and runs and not any(run.end <= runs[0].begin for run in evidence.runs if run.id == before.id):
                verdict.wrong.append(f"a job ran before the one that it waits for: {job}")
            _judge_runs(job, runs, evidence, verdict)
            before = job if submit.chain else None
            if submit.callback:
                _judge_delivery(job, deliveries, evidence.received, verdict)
    unknown = [jobs for token, jobs in by_token.items() if token not in evidence.late]
    verdict.wrong.extend(f"jobs that nobody submitted: {jobs}" for jobs in unknown)
    known = {job.id for job in evidence.records}
    verdict.lost.extend(f"{run.id} ran, but the job does not exist" for run in evidence.runs if run.id not in known)
    _judge_deaths(evidence, verdict)
    _judge_limits(evidence, verdict)
    return verdict


def _judge_submit(submit: Submit, found: list[list[Job]], verdict: Verdict) -> None:
    if any(len(jobs) > 1 for jobs in found):
        verdict.wrong.append(f"a submit made two jobs: {submit}")
    ids = [jobs[0].id for jobs in found if jobs]
    if submit.ids and ids != submit.ids:
        verdict.lost.append(f"accepted, but only {ids} exist: {submit}")
    if not submit.ids and ids and not submit.doubtful:
        verdict.wrong.append(f"refused, but stored: {submit}")
    if ids and len(ids) < len(submit.payloads):
        verdict.lost.append(f"a batch was stored in part: {submit}")


def _judge_end(submit: Submit, job: Job, runs: list[Run], first: bool, verdict: Verdict) -> None:
    """Check that a job has ended as its handler determines."""
    if job.status not in ENDED:
        verdict.lost.append(f"a job has not ended: {job}")
    spent = job.attempts == job.max_attempts
    completes = submit.type not in FAILS_WITH or (submit.type == "flaky" and job.payload["fails"] < job.max_attempts)
    expected = {
        "completed": completes and job.result == job.payload["token"] and any(run.how == "end" for run in runs),
        "cancelled": submit.cancel and first,
        "failed": job.error is not None
        and (
            job.error.type == FAILS_WITH.get(submit.type)
            or (job.error.type == "WorkerLost" and spent and submit.type in FAILS_WITH)
        ),
    }
    if job.status in ENDED and not expected[job.status]:
        verdict.wrong.append(f"a job has another outcome than its handler: {job}")
    if (
        first
        and submit.cancelled_at
        and (job.status != "cancelled" or any(run.begin > submit.cancelled_at for run in runs))
    ):
        verdict.wrong.append(f"a job was cancelled, but ran: {job}")


def _judge_dependent(job: Job, runs: list[Run], verdict: Verdict) -> None:
    """Check that a job has failed because the one that it waits for did not complete."""
    if job.status not in ENDED:
        verdict.lost.append(f"a job waits for ever: {job}")
    elif runs or job.status != "failed" or not job.error or job.error.type != "DependencyFailed":
        verdict.wrong.append(f"a job did not fail because of the one that it waits for: {job}")


def _judge_delivery(job: Job, jobs: list[Job], received: Sequence[tuple[str, str]], verdict: Verdict) -> None:
    """Check that the end of a job was delivered under one id, once or several times."""
    made = [delivery for delivery in jobs if delivery.payload["event"]["data"]["id"] == job.id]
    if [delivery.id for delivery in made] != [job.callback_job] or made[0].status != "completed":
        verdict.lost.append(f"the end of a job has not one delivery that completed: {job}, {made}")
    if {id for id, of in received if of == job.id} != {job.callback_job}:
        verdict.lost.append(f"the end of a job was not received under one id: {job}, {received}")


def _judge_runs(job: Job, runs: list[Run], evidence: Evidence, verdict: Verdict) -> None:
    """Find a cause for each run except the first, and for overlaps."""
    causes = [cause_of(run, after, evidence) for run, after in pairwise(runs)]
    verdict.explained.update(cause for cause in causes if cause)
    if not all(causes):
        verdict.unexplained.append(f"a repeated run without a cause ({causes}): {job}")
    for run, after, cause in zip(runs, runs[1:], causes, strict=False):
        death = next((death.at for death in evidence.deaths if death.pid == run.pid), float("inf"))
        # A handler whose job was released runs on until its process exits.
        allowed = {"cut off": float("inf"), "told to stop": 1.5}.get(cause, 0.0)
        if min(run.end, death) > after.begin + allowed:
            verdict.unexplained.append(f"overlapping runs ({cause}): {job}")
    if job.type == "poison" and causes.count("killed") >= job.max_attempts + SUSPICIONS + _killed_by_others(
        runs, evidence
    ):
        verdict.wrong.append(f"a job killed too many workers: {job}")


def _killed_by_others(runs: list[Run], evidence: Evidence) -> int:
    return sum(signal.pid in {run.pid for run in runs} for signal in evidence.signals)


def cause_of(run: Run, after: Run, evidence: Evidence) -> str:
    """Find why another run followed this one; empty if no cause is found."""
    if run.how == "fail" and after.attempt > run.attempt and run.end <= after.begin:
        return "failed"
    slack = (
        10.0
        if any(kind.startswith(("redis", "read", "client", "password", "link")) for kind in evidence.plan.kinds)
        else 1.0
    )
    saved = run.end + slack if run.how else float("inf")  # when its outcome must have been saved
    if any(
        death.pid == run.pid and death.at < min(after.begin, saved) and death.code == -SIGKILL
        for death in evidence.deaths
    ):
        return "killed"
    name = evidence.names.get(run.pid, "")
    if any(cut.victim == name and cut.begin < min(after.begin, saved) and cut.end > run.begin for cut in evidence.cuts):
        return "cut off"
    # The attempt of the later run may have begun first: its worker was cut off before the mark.
    late = evidence.names.get(after.pid, "")
    if any(cut.victim == late and cut.begin < run.begin and after.begin < cut.end + slack for cut in evidence.cuts):
        return "cut off"
    if any(s.number == SIGTERM and s.pid == run.pid and s.at < min(after.begin, saved) for s in evidence.signals):
        return "told to stop"
    return ""


def _judge_limits(evidence: Evidence, verdict: Verdict) -> None:
    """Check that no more jobs of a limit ran at a time than it allows.

    A run of a worker that died, that was told to stop or that was cut off counts only until then:
    its job was requeued, and its handler may run on for a while.
    """
    jobs = {job.id: job for job in evidence.records if job.type in LIMITS}
    spans: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    for run in evidence.runs:
        if run.id in jobs:
            ends = [run.end, *(death.at for death in evidence.deaths if death.pid == run.pid)]
            ends += [signal.at for signal in evidence.signals if signal.pid == run.pid and signal.at > run.begin]
            name = evidence.names.get(run.pid, "")
            ends += [cut.begin for cut in evidence.cuts if cut.victim == name and cut.end > run.begin]
            key = jobs[run.id].type, jobs[run.id].payload["account"]
            spans.setdefault(key, []).append((run.begin, min(ends), run.id))
    for (type, account), found in spans.items():
        for begin, _, id in found:
            beside = [other for start, end, other in found if start <= begin < end and other != id]
            if len(beside) >= LIMITS[type]:
                verdict.wrong.append(f"{id} ran beside {beside}: more than the limit of {type}/{account}")


def _judge_deaths(evidence: Evidence, verdict: Verdict) -> None:
    """Check that processes ended only by a signal or by a job that kills its worker."""
    signalled = {signal.pid for signal in evidence.signals}
    poisoned = {run.pid for run in evidence.runs if not run.how} if "poison" in evidence.plan.kinds else set()
    for death in evidence.deaths:
        if death.pid not in signalled and not (death.code == -SIGKILL and death.pid in poisoned):
            verdict.wrong.append(f"a process ended by itself: {death}")


def show(evidence: Evidence) -> str:
    """Format everything known about a trial, to find out what went wrong."""
    lines = [f"faults   {fault}" for fault in evidence.plan.faults]
    lines += [f"submit   {submit}" for submit in evidence.plan.submits]
    lines += [f"record   {job}" for job in evidence.records]
    events = [*evidence.signals, *evidence.deaths, *evidence.cuts, *evidence.runs]
    lines += [
        f"event    {event}"
        for event in sorted(events, key=lambda event: getattr(event, "begin", getattr(event, "at", 0.0)))
    ]
    lines += [f"{name}  {line}" for name, log in evidence.logs.items() for line in log]
    return "\n".join(lines)


# Many trials ----------------------------------------------------------------------------------------------------------


def run_trials(seeds: Sequence[int], parallel: int) -> Iterator[Result | str]:
    """Run a trial for each seed in parallel worlds. A world that crashed yields an error text."""
    context = multiprocessing.get_context("spawn")
    todo, done = context.SimpleQueue(), context.SimpleQueue()
    for seed in seeds:
        todo.put(seed)
    worlds = [context.Process(target=_work, args=(todo, done), daemon=True) for _ in range(min(parallel, len(seeds)))]
    for world in worlds:
        todo.put(None)
        world.start()
    for _ in seeds:
        yield done.get()
    for world in worlds:
        world.join()


def _work(todo: Any, done: Any) -> None:
    """Run trials in a world, and in a new world after a failed trial."""
    signal.signal(SIGTERM, lambda *_: sys.exit(1))
    seed = todo.get()
    while seed is not None:
        try:
            with open_world() as world:
                failed = False
                while seed is not None and not failed:
                    result = world.trial(plan(seed))
                    failed = bool(result.failures)
                    done.put(result)
                    seed = todo.get()
        except Exception:
            done.put(f"seed {seed}: {traceback.format_exc()}")
            seed = todo.get()


@contextmanager
def open_world() -> Iterator[World]:
    """Start a world in a temporary folder, and end it at the end."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        _build_clocks(Path(name))
        world = World(Path(name))
        try:
            yield world
        finally:
            world.close()


def _build_clocks(folder: Path) -> None:
    for name, code in {"clock": WRONG_CLOCK, "set_clock": SET_CLOCK}.items():
        source = folder / f"{name}.c"
        source.write_text(code)
        if CC:
            subprocess.run([CC, "-shared", "-fPIC", "-o", source.with_suffix(".so"), source], check=True)


def table(results: Sequence[Result]) -> str:
    """Format the results by kind of fault. A trial with several kinds counts for each of them."""
    widths = {"trials": 6, "jobs": 7, "lost": 5, "failed": 7, "killed": 7, "stopped": 8, "cut off": 8}
    widths |= {"unexplained": 12, "wrong": 6}
    head = "".join(f" {name:>{width}}" for name, width in widths.items())
    lines = [f"{'fault':<20}{head} {'slowest recovery':>17}"]
    for kind in (*KINDS, ""):
        matching = [result for result in results if not kind or kind in result.plan.kinds]
        causes = sum((result.verdict.explained for result in matching), Counter[str]())
        counts = [
            len(matching),
            sum(result.plan.jobs for result in matching),
            sum(len(result.verdict.lost) for result in matching),
            *(causes[cause] for cause in ("failed", "killed", "told to stop", "cut off")),
            sum(len(result.verdict.unexplained) for result in matching),
            sum(len(result.verdict.wrong) + len(result.problems) for result in matching),
        ]
        cells = "".join(f" {count:>{width}}" for count, width in zip(counts, widths.values(), strict=True))
        recovery = max((result.recovery for result in matching), default=0.0)
        lines.append(f"{kind or 'all':<20}{cells} {recovery:>15.1f} s")
    return "\n".join(lines)


@click.command()
@click.option("--trials", default=1000, show_default=True)
@click.option("--seed", default=1, show_default=True, help="Seed of the first trial; each further trial adds 1.")
@click.option("--parallel", default=4, show_default=True, help="Number of worlds that run in parallel.")
def main(trials: int, seed: int, parallel: int) -> None:
    """Inject faults and check that no job is lost or repeated without a cause."""
    results: list[Result] = []
    broken = 0
    for result in run_trials(range(seed, seed + trials), parallel):
        if isinstance(result, str):
            broken += 1
            click.echo(result)
            continue
        results.append(result)
        if result.failures:
            broken += 1
            click.echo("\n".join([f"SEED {result.plan.seed} FAILED", *result.failures, result.evidence]))
        click.echo(
            f"{len(results):>5} seed {result.plan.seed} {result.seconds:.1f} s {' '.join(result.plan.kinds)}", err=True
        )
    click.echo(
        "repeated runs by cause: failed handler; worker killed, told to stop, or cut off for longer than its lease"
    )
    click.echo(table(results))
    if not CC:
        click.echo("wrong-clock, clock-*: no C compiler found, so no clock was changed")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
