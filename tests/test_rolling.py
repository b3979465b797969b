"""Restarts without downtime: web processes and workers are replaced one by one while clients send requests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from client import Process, Wire, running, spell
from conftest import NO_REDIS, REDIS, Server, put, until
from rolling import roll
from versions import OLD, has_commit, play, unpack

from tinyqueue import Failure, Job, make_job
from tinyqueue_job import record_of

JOB = b'{"type":"echo","payload":1}'
HANDLERS = "from tinyqueue import handler\n@handler('echo')\ndef echo(payload: int) -> int:\n    return payload\n"

pytestmark = pytest.mark.skipif(not REDIS, reason=NO_REDIS)


@pytest.mark.parametrize(("rolls", "grace"), [(2, 0), (1, 1)])
def test_restart_one_by_one_under_load_fails_no_request_and_no_job(tmp_path: Path, rolls: int, grace: int) -> None:
    rolled = roll(tmp_path, rolls=rolls, rate=100, clients=10, grace=grace)
    assert rolled.failures == []
    assert rolled.restarts == 4 * rolls
    assert rolled.jobs > 0


def test_old_and_new_version_side_by_side_lose_no_job(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not has_commit(OLD):
        pytest.skip(f"this copy has no history with the commit {OLD}")
    old = unpack(OLD, tmp_path_factory.mktemp("old"))
    played = play(tmp_path_factory.mktemp("both"), old, jobs=300)
    assert played.failures == []
    assert played.jobs > 300


def test_old_version_knows_all_fields_of_a_plain_job(tmp_path: Path) -> None:
    """The old version drops fields that it does not know. Only the jobs that use what it lacks have such fields."""
    if not has_commit(OLD):
        pytest.skip(f"this copy has no history with the commit {OLD}")
    show = "from tinyqueue import Job; print(*Job.__struct_encode_fields__)"
    folder = unpack(OLD, tmp_path)
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", show], cwd=folder, env=environ, capture_output=True, check=True)
    fields = done.stdout.decode().split()
    record = json.loads(record_of(make_job(1, "echo", {"n": 1}, delay=60, unique_key="a", max_attempts=3)))
    assert record.keys() <= set(fields)
    assert [name for name in Job.__struct_encode_fields__ if name in fields] == fields


WITHOUT_HISTORY = "5c48923"  # a commit that keeps unknown fields, and does not know `history`
RUN_TWICE = """
import sys
from tinyqueue import Failure, Queue
queue = Queue.from_url(sys.argv[1])
worker = queue.register(["default"], 1)
for end in (lambda job: queue.fail(job, Failure("Old", "it broke"), 0), queue.complete):
    queue.clock.ahead += 10
    queue.promote()
    [job] = queue.dequeue(worker, ["default"])
    end(job)
"""


def test_older_version_keeps_the_history(real: Server, tmp_path: Path) -> None:
    if not has_commit(WITHOUT_HISTORY):
        pytest.skip(f"this copy has no history with the commit {WITHOUT_HISTORY}")
    queue = real.queue()
    job = put(queue, "processing")
    queue.fail(job, Failure("New", "it broke"), 0)
    [first] = queue.get(job.id).attempts_so_far()
    folder = unpack(WITHOUT_HISTORY, tmp_path)
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder)}
    subprocess.run([sys.executable, "-c", RUN_TWICE, real.url], cwd=folder, env=environ, check=True)
    ended = queue.get(job.id)
    assert ended.history == (first,)
    assert [attempt.outcome for attempt in ended.attempts_so_far()] == ["failed", "completed"]


def ask(server: Process, method: str, path: str, body: bytes | None = None) -> int:
    with Wire(server.address) as wire:
        wire.send(spell(method, path, body))
        return wire.answer().status


@pytest.mark.parametrize("processes", ["1", "2"])
def test_web_process_with_a_grace_stops_accepting_later(real: Server, tmp_path: Path, processes: str) -> None:
    (tmp_path / "handlers.py").write_text(HANDLERS)
    settings = {"REDIS_URL": real.url, "WEB_CONCURRENCY": processes, "TINYQUEUE_READY_GRACE": "60"}
    with running(tmp_path, **settings) as web:
        until(lambda: ask(web, "GET", "/ready") == 200)
        os.kill(web.pid, signal.SIGTERM)
        until(lambda: ask(web, "GET", "/ready") == 503)
        assert ask(web, "POST", "/jobs", JOB) == 201
        os.kill(web.pid, signal.SIGINT)  # ends the grace: otherwise `running` would wait for it in vain


def test_embedded_web_process_ignores_the_grace(tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text(HANDLERS)
    with running(tmp_path, TINYQUEUE_READY_GRACE="60") as web:
        until(lambda: ask(web, "GET", "/ready") == 200)
    # `running` has stopped it with SIGTERM, and waits for 20 seconds at most
