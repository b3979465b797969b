"""Count the load for an autoscaler, and let one start and stop real workers by it."""

from __future__ import annotations

import http.client
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from client import Client, running
from conftest import Server, free_port, lapse, put, raw, until

import worker
from tinyqueue import SAMPLED, Failure, Job, Queue, handler
from tinyqueue_config import Settings
from tinyqueue_shards import Shards
from wsgi import API, MAX_SCALED

KUBERNETES = Path(worker.__file__).parent / "deploy" / "k8s"
# A gate runs until a file with its name exists.
HANDLERS = """
import os, time
from tinyqueue import handler

@handler("gate", timeout=None)
def gate(name: str) -> None:
    with open("runs", "a") as file:
        file.write(f"begin {name}\\n")
    while not os.path.exists(name):
        time.sleep(0.01)
    with open("runs", "a") as file:
        file.write(f"end {name}\\n")
"""
NOTHING = {"ready": 0, "processing": 0, "load": 0, "oldestWaitingMs": 0}


def echo(payload: Any, job: Job) -> Any:
    return payload


@pytest.fixture(autouse=True)
def handlers(no_handlers: None) -> None:
    handler("echo")(echo)


def counts(queue: Any, *names: str) -> tuple[int, int]:
    """Return ready and processing, which add up to load."""
    found = queue.scale(names)
    assert found["load"] == found["ready"] + found["processing"]
    return found["ready"], found["processing"]


# The counts -----------------------------------------------------------------------------------------------------------


def test_scale_is_zero_without_jobs(queue: Queue) -> None:
    assert queue.scale() == queue.scale(["default", "other"]) == NOTHING


def test_scale_counts_waiting_and_running_jobs_of_all_queues_or_of_those_named(queue: Queue) -> None:
    put(queue, "processing")
    queue.enqueue_many("echo", [1, 2])
    queue.enqueue("echo", 3, queue="mail")
    assert counts(queue) == (3, 1)
    assert counts(queue, "default") == (2, 1)
    assert counts(queue, "mail", "mail", "unknown") == (1, 0)
    assert queue.scale(["unknown"]) == NOTHING


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled", "delayed"])
def test_scale_ignores_a_job_that_has_ended_or_is_delayed(queue: Queue, status: str) -> None:
    put(queue, status)
    assert queue.scale() == queue.scale(["default"]) == NOTHING


def test_scale_ignores_a_job_that_waits_for_its_next_attempt(queue: Queue) -> None:
    job = put(queue, "processing")
    queue.fail(job, Failure("Boom", "it broke"), after=60)
    assert queue.scale() == NOTHING


def test_scale_ignores_the_waiting_jobs_of_a_paused_queue_but_not_its_running_ones(queue: Queue) -> None:
    put(queue, "processing")
    queue.enqueue("echo", 1)
    queue.pause("default")
    assert queue.scale() == queue.scale(["default"]) == NOTHING | {"processing": 1, "load": 1}
    queue.resume("default")
    assert counts(queue, "default") == (1, 1)


def test_scale_counts_a_running_job_whose_worker_was_lost(queue: Queue) -> None:
    """So an autoscaler keeps or starts a worker, which reaps the lost one."""
    lapse(queue, put(queue, "processing").worker)
    assert counts(queue) == (0, 1)


def test_scale_counts_due_jobs_that_no_worker_has_promoted_in_their_queues(queue: Queue) -> None:
    for name in ("a", "b", "a"):
        queue.enqueue("echo", 1, queue=name, delay=1)
    queue.enqueue("echo", 1, queue="c", delay=60)
    queue.clock.ahead += 1000
    assert [counts(queue, *names) for names in ((), ("a",), ("b",), ("c",))] == [(3, 0), (2, 0), (1, 0), (0, 0)]
    assert queue.scale(["a"])["oldestWaitingMs"] >= 0
    assert queue.promote() == 3
    assert [counts(queue, *names) for names in ((), ("a",), ("b",), ("c",))] == [(3, 0), (2, 0), (1, 0), (0, 0)]


def test_scale_ignores_due_jobs_of_a_paused_queue_that_no_worker_has_promoted(queue: Queue) -> None:
    queue.enqueue("echo", 1, delay=1)
    queue.clock.ahead += 1000
    queue.pause("default")
    assert queue.scale() == NOTHING


def test_scale_estimates_the_queues_of_many_unpromoted_jobs_and_leaves_no_queue_at_zero(queue: Queue) -> None:
    """The jobs of `late` come after so many of `early` that none of them is read."""
    queue.enqueue_many("echo", range(3 * SAMPLED), queue="early", delay=1)
    queue.enqueue_many("echo", range(5), queue="late", delay=2)
    queue.clock.ahead += 2000
    assert counts(queue, "late") == (1, 0)
    assert counts(queue, "early") == (3 * SAMPLED, 0)
    assert counts(queue) == (3 * SAMPLED + 1, 0)
    while queue.promote():
        pass
    assert [counts(queue, "late"), counts(queue, "early")] == [(5, 0), (3 * SAMPLED, 0)]


def test_scale_ignores_entries_of_cancelled_jobs_in_the_list(queue: Queue) -> None:
    for job in queue.enqueue_many("echo", range(5)):
        queue.cancel(job.id)
    assert raw(queue).llen(queue.keys.jobs("default")) == 5
    assert queue.scale() == NOTHING


def test_scale_reports_how_long_the_next_job_has_waited(queue: Queue) -> None:
    queue.enqueue("echo", 1, queue="a")
    queue.enqueue("echo", 1, queue="c", delay=10)
    queue.clock.ahead += 30_000
    queue.enqueue("echo", 2, queue="b")
    seconds = {name: queue.scale([name])["oldestWaitingMs"] // 10_000 for name in ("a", "b", "c")}
    assert seconds == {"a": 3, "b": 0, "c": 2}
    assert queue.scale()["oldestWaitingMs"] // 10_000 == 3


def commands(queue: Queue) -> int:
    return int(raw(queue).info("stats")["total_commands_processed"])


def test_scale_costs_the_same_few_commands_however_many_jobs_there_are(near: Queue) -> None:
    def cost() -> int:
        before = commands(near)
        near.scale(["default", "mail"])
        return commands(near) - before - 1  # the reading of the statistics

    near.enqueue("echo", 1)
    near.enqueue("echo", 1, queue="mail", delay=60)
    near.enqueue_many("echo", [1, 2], queue="mail", delay=1)
    near.clock.ahead += 1000
    near.scale()  # reads the time
    few = cost()
    for _ in range(5):
        near.enqueue_many("echo", range(1000))
        near.enqueue_many("echo", range(1000), queue="mail", delay=60)
        near.enqueue_many("echo", range(1000), queue="mail", delay=1)
    near.clock.ahead += 1000
    assert cost() == few <= 11  # one of them counts the due schedules


def test_scale_adds_up_all_shards(server: Server) -> None:
    queue = Shards([server.queue(namespace=f"queue.{at}") for at in range(3)])
    for at in range(6):
        queue.enqueue("echo", at, queue="a" if at < 4 else "b")
    worker = queue.register(["a"], 1)
    queue.dequeue(worker, ["a"])
    assert [counts(queue, *names) for names in ((), ("a",), ("b",), ("c",))] == [(5, 1), (3, 1), (2, 0), (0, 0)]


# Over HTTP ------------------------------------------------------------------------------------------------------------


def test_scale_answers_one_flat_object(api: Client, queue: Queue) -> None:
    put(queue, "processing")
    queue.enqueue("echo", 1, queue="mail")
    queue.enqueue("echo", 1, queue="slow")
    found = {path: api.get(path).json for path in ("/scale", "/scale?queue=mail", "/scale?queue=mail&queue=default")}
    ages = [answer.pop("oldestWaitingMs") for answer in found.values()]
    assert all(0 <= age < 20_000 for age in ages)
    assert found == {
        "/scale": {"ready": 2, "processing": 1, "load": 3},
        "/scale?queue=mail": {"ready": 1, "processing": 0, "load": 1},
        "/scale?queue=mail&queue=default": {"ready": 1, "processing": 1, "load": 2},
    }


def test_scale_of_an_unknown_queue_is_zero(api: Client) -> None:
    assert api.get("/scale?queue=unknown").json == NOTHING


@pytest.mark.parametrize("name", ["", "a%20b", "a:b", "a/b", "%C3%A9", "x" * 101, "a%0A"])
def test_scale_refuses_a_malformed_queue(api: Client, name: str) -> None:
    answer = api.get(f"/scale?queue=mail&queue={name}")
    assert (answer.status, answer.kind, answer.problem["field"]) == (422, "invalid-job", "queue")


def test_scale_refuses_an_unknown_parameter(api: Client) -> None:
    answer = api.get("/scale?queues=mail")
    assert (answer.status, answer.kind, answer.problem["field"]) == (422, "invalid-job", "queues")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/work?second=1"),
        ("POST", "/jobs/batch?parts=true"),
        ("GET", "/stats?minute=5"),
        ("GET", "/jobs/01a212e8-0d63-7018-974e-7771d63fb8fa?waits=9"),
    ],
)
def test_refuse_a_misspelled_parameter(api: Client, method: str, path: str) -> None:
    answer = api.call(method, path, *([[]] if "batch" in path else []))
    name = path.partition("?")[2].partition("=")[0]
    assert (answer.status, answer.kind, answer.problem["field"]) == (400, "invalid-query", name)


def test_scale_refuses_too_many_queues(api: Client) -> None:
    names = [f"queue=q{at}" for at in range(MAX_SCALED + 1)]
    assert api.get("/scale?" + "&".join(names[1:])).json == NOTHING
    assert api.get("/scale?" + "&".join(names)).kind == "invalid-job"


def test_scale_needs_the_role_read(near: Queue) -> None:
    keys = "front:submit:submit-0123456789,scaler:read:reader-0123456789"
    app = API(Settings(api_keys=keys), near)
    secrets = ("", "submit-0123456789", "reader-0123456789")
    assert [Client(app, secret).get("/scale").status for secret in secrets] == [401, 403, 200]


# An autoscaler --------------------------------------------------------------------------------------------------------


class Scaler:
    """Stands in for KEDA: it follows a ScaledObject. One step is one polling interval of its clock."""

    def __init__(self, read: Callable[[], float], scale_to: Callable[[int], None]) -> None:
        [self.spec] = [spec["spec"] for spec in manifests("keda.yaml") if spec["kind"] == "ScaledObject"]
        [trigger] = self.spec["triggers"]
        self.target = float(trigger["metadata"]["targetValue"])
        self.activation = float(trigger["metadata"]["activationTargetValue"])
        self.read = read
        self.scale_to = scale_to
        self.clock = 0
        self.active_at = -1_000_000
        self.failures = 0
        self.workers = 0
        self.wanted: list[tuple[int, int]] = []  # when, and how many: it scales in to the highest of the last ones

    def step(self) -> int:
        """Read the metric once and set the number of workers. Returns it."""
        self.clock += self.spec["pollingInterval"]
        try:
            value = self.read()
        except OSError:
            self.failures += 1
            fallback = self.spec["fallback"]
            if self.failures >= fallback["failureThreshold"]:  # as currentReplicasIfHigher says
                self._set(max(fallback["replicas"], self.workers))
        else:
            self.failures = 0
            self._set(self._count_wanted(value))
        return self.workers

    def _count_wanted(self, value: float) -> int:
        if value > self.activation:
            self.active_at = self.clock
        elif self.clock - self.active_at > self.spec["cooldownPeriod"]:
            return self.spec["minReplicaCount"]
        if not self.workers:
            return int(value > self.activation)
        now = max(1, min(self.spec["maxReplicaCount"], math.ceil(value / self.target)))
        behavior = self.spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
        self.wanted.append((self.clock, now))
        recent = [count for at, count in self.wanted if self.clock - at <= behavior["stabilizationWindowSeconds"]]
        return max(recent) if now < self.workers else now

    def _set(self, count: int) -> None:
        if count != self.workers:
            self.scale_to(count)
            self.workers = count


def manifests(name: str) -> list[Any]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


class Fleet:
    """Starts workers with the settings of the manifests, and stops the newest as Kubernetes does: by SIGTERM."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        [config] = manifests("settings.yaml")
        path = {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder), "TINYQUEUE_LEASE": "2"}
        self.environ = config["data"] | path | {"REDIS_URL": url}
        self.running: list[subprocess.Popen[bytes]] = []
        self.stopping: list[subprocess.Popen[bytes]] = []

    def scale_to(self, count: int) -> None:
        while len(self.running) > count:
            process = self.running.pop()
            process.terminate()
            self.stopping.append(process)
        while len(self.running) < count:
            with (self.folder / "workers.log").open("ab") as log:
                command = [sys.executable, worker.__file__]
                self.running.append(subprocess.Popen(command, cwd=self.folder, env=self.environ, stderr=log))

    def kill(self) -> None:
        for process in self.running + self.stopping:
            process.kill()
            process.wait()


@pytest.fixture
def fleet(tmp_path: Path, real: Server) -> Iterator[Fleet]:
    (tmp_path / "handlers.py").write_text(HANDLERS)
    fleet = Fleet(tmp_path, real.url)
    yield fleet
    fleet.kill()


def read_metric(port: int, key: str) -> float:
    """Read the metric as the manifest says: the path of its URL, the field, and the key of the Secret."""
    [spec] = [spec["spec"] for spec in manifests("keda.yaml") if spec["kind"] == "ScaledObject"]
    metadata = spec["triggers"][0]["metadata"]
    path = "/" + metadata["url"].split("/", 3)[3]
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"})
        answer = connection.getresponse()
        assert answer.status == 200
        return float(json.loads(answer.read())[metadata["valueLocation"]])


def test_scaler_starts_and_stops_workers_by_the_load_and_cuts_off_no_job(
    near: Queue, real: Server, fleet: Fleet, tmp_path: Path
) -> None:
    """0 -> 3 -> 0 workers. On the way, a delayed job starts none, and losing the metric stops none."""
    key = "reader-0123456789"
    port = free_port()
    web = {"REDIS_URL": real.url, "PORT": str(port), "TINYQUEUE_API_KEYS": f"scaler:read:{key}"}
    scaler = Scaler(lambda: read_metric(port, key), fleet.scale_to)

    def runs() -> Counter[str]:
        return Counter((tmp_path / "runs").read_text().splitlines()) if (tmp_path / "runs").exists() else Counter()

    names = [f"gate-{at}" for at in range(12)]
    with running(tmp_path, **web):
        near.enqueue("gate", "delayed", delay=3600)
        assert [scaler.step() for _ in range(3)] == [0, 0, 0]
        jobs = near.enqueue_many("gate", names)
        submitted = time.monotonic()
        assert scaler.step() == 1
        until(runs)
        first_start = scaler.spec["pollingInterval"] + time.monotonic() - submitted
        assert first_start < 30
        assert scaler.step() == 3
        until(lambda: near.stats()["processing"] == len(jobs))
    assert [scaler.step() for _ in range(60)] == [3] * 60  # the metric cannot be read for ten minutes
    with running(tmp_path, **web):
        until(lambda: sum(len(about["jobs"]) for about in near.workers()) == len(jobs))  # each has sent a heartbeat
        last = {near.get(about["jobs"][0]).payload for about in near.workers()}  # one of each worker
        for name in set(names) - last:
            (tmp_path / name).touch()
        until(lambda: near.stats()["processing"] == len(last) == 3)
        while scaler.step() == 3:  # until it has seen the lower load for long enough
            pass
        assert scaler.workers == 1
        assert scaler.step() == 1  # the load is 3: the jobs of the stopping workers
        assert near.stats()["processing"] == 3
        assert [process.poll() for process in fleet.stopping] == [None, None]
        for name in last:
            (tmp_path / name).touch()
        assert [process.wait(20) for process in fleet.stopping] == [0, 0]
        until(lambda: near.scale()["load"] == 0)
        while scaler.step() == 1:
            pass
        assert scaler.workers == 0
        assert [process.wait(20) for process in fleet.stopping] == [0, 0, 0]
    assert runs() == Counter([f"{event} {name}" for event in ("begin", "end") for name in names])
    ended = [near.get(job.id) for job in jobs]
    assert {(job.status, job.attempts) for job in ended if job} == {("completed", 1)}
    assert near.metrics().keys() & {"released", "reaped", "retried"} == set()


def test_scaler_starts_a_worker_for_a_due_job_that_nobody_has_promoted(near: Queue, fleet: Fleet) -> None:
    job = near.enqueue("gate", "handlers.py", delay=0.2)  # a file that exists
    scaler = Scaler(lambda: near.scale(["default"])["load"], fleet.scale_to)
    assert scaler.step() == 0
    until(lambda: near.now() >= job.run_at)
    assert scaler.step() == 1
    until(lambda: (now := near.get(job.id)) and now.status == "completed")
    fleet.scale_to(0)
    assert [process.wait(20) for process in fleet.stopping] == [0]


def test_scaler_without_the_metric_keeps_workers_and_starts_the_fallback() -> None:
    """The values of the manifest, without processes: no number of failures ends in no worker."""

    def fail() -> float:
        raise ConnectionRefusedError

    counts: list[int] = []
    scaler = Scaler(fail, counts.append)
    assert [scaler.step() for _ in range(4)] == [0, 0, 2, 2]
    scaler.workers = 7
    assert [scaler.step() for _ in range(100)] == [7] * 100
    assert counts == [2]
