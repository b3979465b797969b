"""Prove that no job is lost: real processes, real faults, and a record of every run that Redis knows nothing of.

    python tests/chaos.py [--trials 1000] [--seed 1] [--parallel 4]     a trial's schedule depends on its seed alone
    python tests/chaos.py --seed 417 --trials 1                         the same trial again

A world is a Redis that syncs every write, and a web process and two workers, each behind a proxy of its own, which a supervisor
restarts as a platform does. A trial submits jobs over HTTP and from Python while one to three faults happen, heals everything,
waits until all is quiet, and judges. Handlers mark the beginning and the end of each run in a file: what really ran. The judge
demands:

    every job that was accepted has ended as its handler says; one whose submit was not answered exists once or not at all
    each run but a job's first has a cause: its handler failed, its worker was killed, told to stop, or cut off beyond its lease
    two runs of a job overlap only if the first one's worker was cut off beyond its lease
    no worker has ended but by a fault, and the books are right

No fault lasts between SHORT and LONG, where it would depend on the heartbeat whether a lease is lost. So what an outage of Redis
must never cost, a second run, is demanded of it, however long it is. Exit code 1 tells of a failure, with the evidence printed.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM
from typing import Any, NamedTuple

import click
import redis

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conftest import RedisServer, check_consistency, free_port  # noqa: E402
from cutproxy import CutProxy  # noqa: E402

from tinyqueue import ENDED, Job, Queue, Unavailable  # noqa: E402

LEASE = 2  # seconds; renewed every 0.92 at the latest, so that 1.08 are left of it at any time
SHORT, LONG = (0.1, 0.8), (2.6, 3.3)  # seconds of a fault that no lease, and that every lease is lost by
PATIENCE = 40.0  # seconds until all must be quiet
WORKERS = ("worker-0", "worker-1")

HANDLERS = """
import os, signal, sys, threading, time
from contextlib import contextmanager
from tinyqueue import Discard, Job, handler

MARKS, PROCESS = os.open("marks", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), os.getpid()
SOON = {"backoff": 0.05, "backoff_cap": 0.2}

def mark(what, job):
    if os.getpid() == PROCESS:  # and not the child of one that has forked
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
        raise Discard("no use")

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

@handler("deaf", max_attempts=1, timeout=0.3, **SOON)
def deaf(payload: dict, job: Job) -> None:
    with marked(job):
        time.sleep(6.5)  # notices its time-out only afterwards, when its thread has been given up

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
"""
RUDE = ("poison", "hang", "deaf", "exit", "fork", "thread")  # types that are a fault by themselves
MAX_ATTEMPTS = {
    "work": 10,
    "flaky": 3,
    "discard": 3,
    "poison": 2,
    "hang": 2,
    "deaf": 1,
    "exit": 2,
    "fork": 10,
    "thread": 10,
}
FAILS_WITH = {
    **{"flaky": "OSError", "discard": "Discard", "poison": "WorkerLost"},
    **{"hang": "TimedOut", "deaf": "TimedOut", "exit": "SystemExit"},
}
SUSPICIONS = 2  # starts that a job may cost its worker before its attempts are spent

# A clock that is ten minutes ahead, and only that: libfaketime 0.9.10 breaks time.sleep, or the monotonic clock as well.
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


# What is to happen ----------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """What happens: `at` seconds after the trial's beginning, to whom, and for how long."""

    kind: str
    at: float
    victim: str
    seconds: float


@dataclass
class Submit:
    """One submit: what it sends, how, and what came of it. `token` is its Idempotency-Key, too; job n carries token.n."""

    token: str
    at: float
    via: str  # http, batch or python
    type: str
    payloads: list[dict[str, Any]]
    delay: float
    patient: bool  # repeats it with the same key until it is answered
    cancel: bool
    ids: list[str] = field(default_factory=list)  # as they were answered
    doubtful: bool = False  # not answered, and it may have been accepted
    cancelled_at: float = 0.0  # answered so
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
    """Draw a schedule. Seeds that follow each other begin with one kind of fault after the other, so that none is left out."""
    dice = random.Random(seed)
    kinds = list(KINDS)
    others = dice.sample([kind for kind in kinds if kind != kinds[seed % len(kinds)]], dice.randrange(3))
    faults = []
    for kind in [kinds[seed % len(kinds)], *others]:
        victim = dice.choice(("web", *WORKERS) if kind.startswith("link-") else WORKERS)
        seconds = dice.uniform(*(LONG if kind.endswith("-long") else SHORT))
        faults.append(Fault(kind, round(dice.uniform(0.1, 0.8), 3), victim, round(seconds, 3)))
    types = dice.choices(("work", "flaky", "discard"), (8, 2, 1), k=dice.randrange(16, 24))
    types += [kind for kind in [kinds[seed % len(kinds)], *others] if kind in RUDE for _ in range(2)]
    return Plan(seed, faults, [_draw_submit(dice, f"{seed}-{n}", type) for n, type in enumerate(types)])


def _draw_submit(dice: random.Random, token: str, type: str) -> Submit:
    via = dice.choice(("http", "http", "batch", "python"))
    payloads = [
        {
            "token": f"{token}.{n}",
            "ms": dice.choice((dice.randrange(50), dice.randrange(50, 200))),
            "fails": dice.randrange(1, 5),
        }
        for n in range(dice.randrange(2, 5) if via == "batch" and type not in RUDE else 1)
    ]
    delay = dice.choice((0.0, 0.0, round(dice.uniform(0.05, 0.5), 2)))
    patient = via != "python" and dice.random() < 0.8
    return Submit(
        token, round(dice.uniform(0.0, 0.6), 3), via, type, payloads, delay, patient, cancel=dice.random() < 0.15
    )


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
    """`victim` could not reach Redis for longer than its lease, while others could."""

    begin: float
    end: float
    victim: str


class World:
    """A Redis, a web process and two workers, each behind its own proxy, and the supervisor that restarts what has died."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.over = folder, False
        (folder / "redis").mkdir()
        (folder / "chaoshandlers.py").write_text(HANDLERS)
        (folder / "marks").touch()
        self.redis = RedisServer(folder / "redis", "--appendonly", "yes", "--appendfsync", "always")
        self.redis.start()
        self.proxies = {name: CutProxy(self.redis.port) for name in ("web", *WORKERS)}
        self.queue = Queue.from_url(self.redis.url, lease=LEASE)
        self.client = redis.Redis(connection_pool=self.queue.pool)
        self.far = Queue.from_url(self.proxies["web"].url, lease=LEASE)
        self.port, self.password, self.names = free_port(), "", dict[int, str]()
        self.lock, self.server = threading.Lock(), threading.Lock()  # for processes; for faults of Redis, one at a time
        self.wrong_clocks: set[str] = set()
        self.signals: list[Signal] = []
        self.deaths: list[Death] = []
        self.cuts: list[Cut] = []
        self.processes = {name: self._spawn(name) for name in self.proxies}
        self.supervisor = threading.Thread(target=self._supervise, daemon=True)
        self.supervisor.start()

    def close(self) -> None:
        self.over = True
        self.supervisor.join()
        for process in self.processes.values():
            self._kill_tree(process.pid)
            process.wait(10)
        for proxy in self.proxies.values():
            proxy.close()
        self.redis.kill()

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
        if name in self.wrong_clocks and CC:
            environ["LD_PRELOAD"] = str(self.folder / "clock.so")
        program = ROOT / ("wsgi.py" if name == "web" else "worker.py")
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(program)],
                cwd=self.folder,
                env=environ,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.names[process.pid] = name
        return process

    def _supervise(self) -> None:
        parent = os.getppid()
        while not self.over:
            if os.getppid() != parent:  # killed: nobody would end this world
                os.kill(os.getpid(), SIGTERM)
            for name, process in self.processes.items():
                if process.poll() is not None:
                    with self.lock:
                        self.deaths.append(Death(time.monotonic(), name, process.pid, process.returncode))
                        self.processes[name] = self._spawn(name)
            time.sleep(0.01)

    def signal(self, process: subprocess.Popen[bytes], number: int) -> None:
        self.signals.append(Signal(time.monotonic(), process.pid, number))  # before it acts
        process.send_signal(number)

    def _kill_tree(self, pid: int) -> None:
        """kill -9 of a process and all that descend from it, the ancestors first."""
        children = Path(f"/proc/{pid}/task/{pid}/children")
        pids = children.read_text().split() if children.exists() else []
        self.signals.append(Signal(time.monotonic(), pid, SIGKILL))
        with suppress(ProcessLookupError):
            os.kill(pid, SIGKILL)
        for child in pids:
            self._kill_tree(int(child))

    def kill_tree(self, name: str) -> None:
        with self.lock:  # its pid must not have become another's
            self._kill_tree(self.processes[name].pid)

    def successor(self, process: subprocess.Popen[bytes], name: str) -> subprocess.Popen[bytes]:
        while self.processes[name] is process and not self.over:
            time.sleep(0.005)
        return self.processes[name]

    # Redis ------------------------------------------------------------------------------------------------------------

    def tell_redis(self, *command: Any) -> Any:
        password = self.password or None
        with redis.Redis(port=self.redis.port, password=password, retry=None, socket_timeout=10) as client:
            return client.execute_command(*command)

    def cut_off(self, victim: str, seconds: float) -> None:
        """Let time pass in which a victim cannot be reached, and take note of it if its lease does not last that long."""
        begin = time.monotonic()
        time.sleep(seconds)
        if seconds >= LONG[0]:
            self.cuts.append(Cut(begin, time.monotonic() + 1.0, victim))  # it learns of it a little later

    # A trial ----------------------------------------------------------------------------------------------------------

    def trial(self, plan: Plan) -> Result:
        """Let a plan happen and judge what came of it."""
        begun = self._begin()
        crew, fates = ThreadPoolExecutor(12), ThreadPoolExecutor(3)
        submits = [crew.submit(self._submit, submit, begun) for submit in plan.submits]
        faults = [fates.submit(self._inflict, fault, begun) for fault in plan.faults]
        wait(faults)
        for proxy in self.proxies.values():
            proxy.heal()
        healed = time.monotonic()
        troubles = [str(trouble) for done in (*submits, *faults) if (trouble := done.exception() or done.result())]
        crew.shutdown()
        fates.shutdown()
        quiet = self._wait_for_quiet(healed + PATIENCE)
        recovery = time.monotonic() - healed
        troubles += (
            [] if quiet else [f"it was not quiet after {PATIENCE} s: {self.queue.stats()} {self.queue.workers()}"]
        )
        troubles += self._check_books()
        evidence = self._evidence(plan)
        verdict = judge(evidence)
        self._clear()
        return Result(plan, verdict, troubles, show(evidence), recovery, time.monotonic() - begun)

    def _begin(self) -> float:
        if not self._wait_for_quiet(time.monotonic() + PATIENCE):
            raise RuntimeError(f"the world does not become ready: {self.queue.workers()}")
        os.truncate(self.folder / "marks", 0)
        self.signals.clear()
        self.deaths.clear()
        self.cuts.clear()
        return time.monotonic()

    def _inflict(self, fault: Fault, begun: float) -> None:
        time.sleep(max(0.0, begun + fault.at - time.monotonic()))
        if fault.kind not in RUDE:
            KINDS[fault.kind](self, fault)

    def _wait_for_quiet(self, until: float) -> bool:
        while time.monotonic() < until:
            with suppress(Unavailable, OSError, http.client.HTTPException):
                if self._quiet():
                    return True
            time.sleep(0.02)
        return False

    def _quiet(self) -> bool:
        """Whether all jobs have ended, and exactly the workers that live are registered."""
        stats, workers = self.queue.stats(), self.queue.workers()
        alive = {worker["pid"] for worker in workers if worker["alive"]}
        expected = {self.processes[name].pid for name in WORKERS}
        known = self.client.smembers(self.queue.keys.workers)
        if expected & {signal.pid for signal in self.signals}:  # told to stop, and on its way out
            return False
        idle = not stats["pending"] and not stats["processing"] and len(known) == len(workers) == len(WORKERS)
        return idle and alive == expected and self._call("GET", "/ready")[0] == 200

    def _check_books(self) -> list[str]:
        """Check the books, for a while: entries that decide nothing may still be on their way out."""
        until = time.monotonic() + 3.0
        while True:
            try:
                check_consistency(self.queue)
                return []
            except AssertionError as error:
                if time.monotonic() > until:
                    return [f"the books are wrong: {error}"]
            time.sleep(0.1)

    def _records(self) -> list[Job]:
        ids = [key.decode().removeprefix(self.queue.keys.job("")) for key in self.client.keys(self.queue.keys.job("*"))]
        return [job for id in ids if (job := self.queue.get(id))]

    def _clear(self) -> None:
        """Forget the trial's jobs, which have ended: the books of the next are read faster."""
        keys = self.queue.keys
        made = [key for family in (keys.job("*"), keys.prefix + "once:*") for key in self.client.keys(family)]
        self.client.delete(*made, keys.ended["completed"], keys.ended["failed"], keys.ended["cancelled"])

    def _evidence(self, plan: Plan) -> Evidence:
        marks = [line.split() for line in (self.folder / "marks").read_text().splitlines()]
        logs = {
            name: (self.folder / f"{name}.log").read_text(errors="replace").splitlines()[-400:] for name in self.proxies
        }
        signals, deaths, cuts = list(self.signals), list(self.deaths), list(self.cuts)
        return Evidence(plan, self._records(), read_marks(marks), signals, deaths, cuts, dict(self.names), logs)

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
        """Submit, again and again if it is patient, and cancel if it shall; returns what must not be."""
        time.sleep(max(0.0, begun + submit.at - time.monotonic()))
        deadline = time.monotonic() + PATIENCE
        send = self._send_from_python if submit.via == "python" else self._send_over_http
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
        options = {"max_attempts": MAX_ATTEMPTS[submit.type], "delay": submit.delay}
        try:
            submit.ids = [self.far.enqueue(submit.type, submit.payloads[0], **options).id]
        except Unavailable as trouble:
            submit.doubtful = trouble.doubtful
        return bool(submit.ids)

    def _send_over_http(self, submit: Submit) -> bool:
        bodies = [{"type": submit.type, "payload": payload, "delay": submit.delay} for payload in submit.payloads]
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
    """SIGSTOP, and SIGCONT later."""
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
    """Kill a worker, and tell the next one to stop before it has begun, or just as it begins."""
    process = world.processes[fault.victim]
    world.signal(process, SIGKILL)
    process = world.successor(process, fault.victim)
    time.sleep(fault.seconds)
    world.signal(process, SIGTERM)


def wrong_clock(world: World, fault: Fault) -> None:
    """A worker whose wall clock is ten minutes ahead. It takes the place of the right one, and that its own in turn."""
    world.wrong_clocks.add(fault.victim)
    process = world.processes[fault.victim]
    world.signal(process, SIGTERM)
    process = world.successor(process, fault.victim)
    time.sleep(1.5)
    world.wrong_clocks.clear()
    world.signal(process, SIGTERM)
    world.successor(process, fault.victim)


def redis_kill(world: World, fault: Fault) -> None:
    with world.server:
        world.redis.kill()
        time.sleep(fault.seconds)
        world.redis.start()


def redis_loading(world: World, fault: Fault) -> None:
    """Kill Redis and have it load for about a second, answering LOADING after each 1,024 commands of its log."""
    with world.server:
        with world.client.pipeline(transaction=False) as pipeline:
            for _ in range(3000):
                pipeline.set("padding", "").delete("padding")
            pipeline.execute()
        world.redis.kill()
        commands = sum(
            file.read_bytes().count(b"\r\n*") for file in (world.redis.folder / "appendonlydir").glob("*.aof")
        )
        pauses = min(commands, 10_000)  # each takes 60 microseconds at the least
        delay = str(1_000_000 // pauses - 60) if pauses == commands else str(-commands // pauses)
        options, world.redis.options = world.redis.options, (*world.redis.options, "--key-load-delay", delay)
        world.redis.start()
        world.redis.options = options


def client_kill(world: World, fault: Fault) -> None:
    with world.server:
        world.tell_redis("CLIENT", "KILL", "TYPE", "normal")


def client_pause(world: World, fault: Fault) -> None:
    with world.server:
        world.tell_redis("CLIENT", "PAUSE", int(fault.seconds * 1000))
        time.sleep(fault.seconds)


def redis_full(world: World, fault: Fault) -> None:
    with world.server:
        world.tell_redis("CONFIG", "SET", "maxmemory", "1mb")
        time.sleep(fault.seconds)
        world.tell_redis("CONFIG", "SET", "maxmemory", "0")


def read_only(world: World, fault: Fault) -> None:
    """As after a failover: it says it is a replica, of a server that cannot be reached, so that it keeps its data."""
    with world.server:
        world.tell_redis("REPLICAOF", "127.0.0.1", "1")
        time.sleep(fault.seconds)
        world.tell_redis("REPLICAOF", "NO", "ONE")


def password(world: World, fault: Fault) -> None:
    """The password is another for a while, and all connections must show theirs."""
    with world.server:
        world.tell_redis("CONFIG", "SET", "requirepass", "other")
        world.password = "other"
        world.tell_redis("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        time.sleep(fault.seconds)
        world.tell_redis("CONFIG", "SET", "requirepass", "")
        world.password = ""


def link_lost_reply(world: World, fault: Fault) -> None:
    """Redis does what it is asked, and nobody hears of it: once for each step of a job's life."""
    proxy = world.proxies[fault.victim]
    for trigger in (b"EXEC", b"RPOPLPUSH", b"MSET", b"EXEC", b"LREM"):
        proxy.drop_reply(trigger)
    time.sleep(fault.seconds)


def link_late_exec(world: World, fault: Fault) -> None:
    """Transactions given up for lost arrive later, after the client has done as it thinks right.

    Of the web process those with an Idempotency-Key: without one nothing is watched, and a submit that is given up, made again and
    then arrives all the same would be counted twice among the pending, though it makes one job.
    """
    proxy = world.proxies[fault.victim]
    for trigger in (b"MSET", b"LREM", b"EXEC") if fault.victim in WORKERS else (b"\r\nPX\r\n",) * 3:
        proxy.hold(trigger)
    time.sleep(fault.seconds)
    proxy.deliver()


def link_stall(world: World, fault: Fault) -> None:
    """Nothing passes, nobody is told, and what was sent arrives when it is over."""
    proxy = world.proxies[fault.victim]
    proxy.flowing.clear()
    world.cut_off(fault.victim, fault.seconds)
    proxy.flowing.set()


def link_reset(world: World, fault: Fault) -> None:
    """Nothing passes, and when it is over all connections are gone."""
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
    """All connections end, ten times."""
    for _ in range(10):
        world.proxies[fault.victim].cut()
        time.sleep(fault.seconds / 10)


def rude(world: World, fault: Fault) -> None:
    """Nothing but jobs that misbehave."""


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
    **dict.fromkeys(RUDE, rude),
}


# The judge ------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One run of a handler. `how` it ended: end, fail, or nothing if it never said."""

    id: str
    attempt: int
    pid: int
    worker: str
    begin: float
    end: float = float("inf")
    how: str = ""


class Evidence(NamedTuple):
    """All that is known of a trial."""

    plan: Plan
    records: list[Job]
    runs: list[Run]
    signals: list[Signal]
    deaths: list[Death]
    cuts: list[Cut]
    names: dict[int, str]  # of processes
    logs: dict[str, list[str]]


class Verdict(NamedTuple):
    """What was found. `lost`, `unexplained` and `wrong` must be empty."""

    lost: list[str]
    unexplained: list[str]
    wrong: list[str]
    explained: Counter[str]  # extra runs, by their cause


class Result(NamedTuple):
    plan: Plan
    verdict: Verdict
    troubles: list[str]
    evidence: str
    recovery: float
    seconds: float

    @property
    def failures(self) -> list[str]:
        return [*self.verdict.lost, *self.verdict.unexplained, *self.verdict.wrong, *self.troubles]


def read_marks(marks: Sequence[Sequence[str]]) -> list[Run]:
    """Make runs of the lines that handlers wrote."""
    runs: list[Run] = []
    for what, id, attempt, pid, worker, at in marks:
        if what == "begin":
            runs.append(Run(id, int(attempt), int(pid), worker, float(at)))
        else:
            same = (id, int(attempt), int(pid), worker)
            for n, run in enumerate(
                runs
            ):  # the last mark of a deaf handler may come in the next trial: it finds no run
                if run[:4] == same and not run.how:
                    runs[n] = run._replace(end=float(at), how=what)
    return runs


def judge(evidence: Evidence) -> Verdict:
    """Compare what was accepted, what Redis says and what really ran."""
    verdict = Verdict([], [], [], Counter())
    by_token: dict[str, list[Job]] = {}
    for job in evidence.records:
        by_token.setdefault(job.payload["token"], []).append(job)
    for submit in evidence.plan.submits:
        found = [by_token.pop(payload["token"], []) for payload in submit.payloads]
        _judge_submit(submit, found, verdict)
        for n, job in enumerate(job for jobs in found for job in jobs):
            # By attempt: a worker that is stopped between the start of a job and its handler's first line runs it when it wakes up.
            runs = sorted((run for run in evidence.runs if run.id == job.id), key=lambda run: (run.attempt, run.begin))
            _judge_end(submit, job, runs, n == 0, verdict)
            _judge_runs(job, runs, evidence, verdict)
    verdict.wrong.extend(f"nobody submitted {jobs}" for jobs in by_token.values())
    known = {job.id for job in evidence.records}
    verdict.lost.extend(f"{run.id} ran, and there is no such job" for run in evidence.runs if run.id not in known)
    _judge_deaths(evidence, verdict)
    return verdict


def _judge_submit(submit: Submit, found: list[list[Job]], verdict: Verdict) -> None:
    if any(len(jobs) > 1 for jobs in found):
        verdict.wrong.append(f"one submit made two jobs: {submit}")
    ids = [jobs[0].id for jobs in found if jobs]
    if submit.ids and ids != submit.ids:
        verdict.lost.append(f"accepted, but there are only {ids}: {submit}")
    if not submit.ids and ids and not submit.doubtful:
        verdict.wrong.append(f"refused for certain, but it was stored: {submit}")
    if ids and len(ids) < len(submit.payloads):
        verdict.lost.append(f"a part of a batch is missing: {submit}")


def _judge_end(submit: Submit, job: Job, runs: list[Run], first: bool, verdict: Verdict) -> None:
    """Whether a job has ended as it should."""
    if job.status not in ENDED:
        verdict.lost.append(f"it has not ended: {job}")
    spent = job.attempts == job.max_attempts
    ends = submit.type not in FAILS_WITH or (submit.type == "flaky" and job.payload["fails"] < job.max_attempts)
    right = {
        "completed": ends and job.result == job.payload["token"] and any(run.how == "end" for run in runs),
        "cancelled": submit.cancel and first,
        "failed": job.error is not None
        and (
            job.error.type == FAILS_WITH.get(submit.type)
            or (job.error.type == "WorkerLost" and spent and submit.type in FAILS_WITH)
        ),
    }
    if job.status in ENDED and not right[job.status]:
        verdict.wrong.append(f"it has not ended as its handler says: {job}")
    if (
        first
        and submit.cancelled_at
        and (job.status != "cancelled" or any(run.begin > submit.cancelled_at for run in runs))
    ):
        verdict.wrong.append(f"cancelled, but it ran: {job}")


def _judge_runs(job: Job, runs: list[Run], evidence: Evidence, verdict: Verdict) -> None:
    """Find a cause for each run but the first, and for overlaps."""
    causes = [cause_of(run, after, evidence) for run, after in pairwise(runs)]
    verdict.explained.update(cause for cause in causes if cause)
    if not all(causes):
        verdict.unexplained.append(f"a run more than can be explained ({causes}): {job}")
    for run, after, cause in zip(runs, runs[1:], causes, strict=False):
        death = next((death.at for death in evidence.deaths if death.pid == run.pid), float("inf"))
        allowed = {"cut off": float("inf"), "told to stop": 1.5}.get(
            cause, 0.0
        )  # what was handed back goes on until the process ends
        if min(run.end, death) > after.begin + allowed:
            verdict.unexplained.append(f"two runs at once ({cause}): {job}")
    if job.type == "poison" and causes.count("killed") >= job.max_attempts + SUSPICIONS + _killed_by_others(
        runs, evidence
    ):
        verdict.wrong.append(f"it killed more workers than it may: {job}")


def _killed_by_others(runs: list[Run], evidence: Evidence) -> int:
    return sum(signal.pid in {run.pid for run in runs} for signal in evidence.signals)


def cause_of(run: Run, after: Run, evidence: Evidence) -> str:
    """Why there was another run after this one; empty if nothing tells."""
    if run.how == "fail" and after.attempt > run.attempt and run.end <= after.begin:
        return "failed"
    slack = (
        10.0
        if any(kind.startswith(("redis", "read", "client", "password", "link")) for kind in evidence.plan.kinds)
        else 1.0
    )
    noted = run.end + slack if run.how else float("inf")  # when its outcome must have been written
    if any(
        death.pid == run.pid and death.at < min(after.begin, noted) and death.code == -SIGKILL
        for death in evidence.deaths
    ):
        return "killed"
    name = evidence.names.get(run.pid, "")
    if any(cut.victim == name and cut.begin < min(after.begin, noted) and cut.end > run.begin for cut in evidence.cuts):
        return "cut off"
    late = evidence.names.get(
        after.pid, ""
    )  # its attempt began first, and it was cut off before the handler's first mark
    if any(cut.victim == late and cut.begin < run.begin and after.begin < cut.end + slack for cut in evidence.cuts):
        return "cut off"
    if any(s.number == SIGTERM and s.pid == run.pid and s.at < min(after.begin, noted) for s in evidence.signals):
        return "told to stop"
    return ""


def _judge_deaths(evidence: Evidence, verdict: Verdict) -> None:
    """A process may end by a signal, or by a job that kills it."""
    signalled = {signal.pid for signal in evidence.signals}
    poisoned = {run.pid for run in evidence.runs if not run.how} if "poison" in evidence.plan.kinds else set()
    for death in evidence.deaths:
        if death.pid not in signalled and not (death.code == -SIGKILL and death.pid in poisoned):
            verdict.wrong.append(f"a process ended by itself: {death}")


def show(evidence: Evidence) -> str:
    """Write down everything about a trial, for whoever has to find out what went wrong."""
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
    """Run a trial for each seed, in so many worlds at a time; a string tells of a world that broke."""
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
    """Run trials in a world, and in another after one that has failed."""
    signal.signal(SIGTERM, lambda *_: sys.exit(1))
    seed = todo.get()
    while seed is not None:
        with tempfile.TemporaryDirectory(prefix="chaos-") as name:
            _build_wrong_clock(Path(name))
            world = World(Path(name))
            try:
                failed = False
                while seed is not None and not failed:
                    result = world.trial(plan(seed))
                    failed = bool(result.failures)
                    done.put(result)
                    seed = todo.get()
            except Exception:
                done.put(f"seed {seed}: {traceback.format_exc()}")
                seed = todo.get()
            finally:
                world.close()


def _build_wrong_clock(folder: Path) -> None:
    source = folder / "clock.c"
    source.write_text(WRONG_CLOCK)
    if CC:
        subprocess.run([CC, "-shared", "-fPIC", "-o", folder / "clock.so", source], check=True)


def table(results: Sequence[Result]) -> str:
    """What happened, by kind of fault. A trial with several kinds counts for each of them."""
    head = (
        f"{'fault':<20} {'trials':>6} {'jobs':>7} {'lost':>5} {'failed':>7} {'killed':>7} {'stopped':>8} {'cut off':>8}"
    )
    lines = [head + f" {'unexplained':>12} {'wrong':>6} {'slowest recovery':>17}"]
    for kind in (*KINDS, ""):
        those = [result for result in results if not kind or kind in result.plan.kinds]
        causes = sum((result.verdict.explained for result in those), Counter[str]())
        counts = (
            f"{kind or 'all':<20} {len(those):>6} {sum(result.plan.jobs for result in those):>7}"
            f" {sum(len(result.verdict.lost) for result in those):>5} {causes['failed']:>7} {causes['killed']:>7}"
            f" {causes['told to stop']:>8} {causes['cut off']:>8} {sum(len(result.verdict.unexplained) for result in those):>12}"
            f" {sum(len(result.verdict.wrong) + len(result.troubles) for result in those):>6}"
        )
        lines.append(counts + f" {max((result.recovery for result in those), default=0.0):>15.1f} s")
    return "\n".join(lines)


@click.command()
@click.option("--trials", default=1000, show_default=True)
@click.option("--seed", default=1, show_default=True, help="Of the first trial; the others count on from it.")
@click.option("--parallel", default=4, show_default=True, help="Worlds at a time.")
def main(trials: int, seed: int, parallel: int) -> None:
    """Inject faults, and prove that no job is lost and none runs without a cause."""
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
        "extra runs by cause: a handler that failed, a worker that was killed, told to stop or cut off beyond its lease"
    )
    click.echo(table(results))
    if not CC:
        click.echo("wrong-clock: there is no C compiler here, so those clocks were right")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
