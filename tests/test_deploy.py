"""Files for deployment: the locked requirements, the image, and what checks and starts processes in it."""

from __future__ import annotations

import configparser
import fcntl
import gzip
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM
from typing import Any, NamedTuple

import pytest
import yaml
from client import running
from conftest import RedisServer, Server, free_port, lapse, raw, until
from dotenv import dotenv_values
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tinyqueue
import wsgi
from tinyqueue import Queue, Unavailable, host_name
from tinyqueue_config import Settings
from tinyqueue_doctor import local_workers
from tinyqueue_shards import AnyQueue, Shards
from worker import CLOSING, LAST_WRITE

ROOT = Path(tinyqueue.__file__).parent
HEALTH_TIMEOUT = 10  # seconds that a health check may take


# Locked requirements --------------------------------------------------------------------------------------------------


def declared() -> dict[str, Requirement]:
    """What setup.cfg requires at run time, without extras."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = parser["options"]["install_requires"].splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def locked() -> dict[str, tuple[Requirement, str]]:
    """What requirements.txt locks, each with the lines that follow it: its hashes and who needs it."""
    text = (ROOT / "requirements.txt").read_text()
    entries = re.findall(r"^([a-z0-9].*?) \\\n((?: .*\n)+)", text, re.M)
    requirements = [(Requirement(line), rest) for line, rest in entries]
    return {canonicalize_name(requirement.name): (requirement, rest) for requirement, rest in requirements}


def test_lock_pins_every_dependency_at_a_version_that_setup_cfg_allows() -> None:
    pins = {name: str(requirement.specifier).removeprefix("==") for name, (requirement, _) in locked().items()}
    refused = {name: pins.get(name) for name, rule in declared().items() if pins.get(name, "0") not in rule.specifier}
    assert refused == {}, "renew requirements.txt; docs/deploy.md has the command"


def test_lock_contains_nothing_that_no_dependency_needs() -> None:
    direct = {name for name, (_, rest) in locked().items() if re.search(r"tinyqueue \(setup\.cfg\)$", rest, re.M)}
    assert direct == declared().keys(), "renew requirements.txt; docs/deploy.md has the command"
    parents = re.findall(r"^    #(?: via)? +([a-z0-9-]+)$", "".join(rest for _, rest in locked().values()), re.M)
    assert {parent for parent in parents if parent != "via"} <= locked().keys()


def test_lock_has_an_exact_version_and_hashes_for_every_requirement() -> None:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if re.match("[^ #]", line)]
    assert len(lines) == len(locked()) > len(declared())
    for requirement, rest in locked().values():
        assert re.fullmatch(r"==[^,*]+", str(requirement.specifier))
        assert re.search(r"^    --hash=sha256:[0-9a-f]{64}\b", rest, re.M)


# The check of processes -----------------------------------------------------------------------------------------------

REGISTER = "import sys, tinyqueue; print(tinyqueue.Queue.from_url(sys.argv[1]).register(['default'], 1))"


def alive(queue: AnyQueue) -> dict[str, bool]:
    return {about["id"]: about["alive"] for about in local_workers(queue)}


def register_elsewhere(url: str) -> str:
    """Register a worker from a process that ends without deregistering it."""
    return subprocess.check_output([sys.executable, "-c", REGISTER, url], cwd=ROOT, text=True).strip()


def test_local_workers_holds_a_worker_before_its_first_heartbeat(queue: Queue) -> None:
    assert alive(queue) == {}
    worker = queue.register(["default"], 1)
    assert alive(queue) == {worker: True}


def test_local_workers_shows_a_worker_without_a_lease_as_dead(queue: Queue) -> None:
    worker = queue.register(["default"], 1)
    lapse(queue, worker)
    assert alive(queue) == {worker: False}
    queue.heartbeat(worker)
    assert alive(queue) == {worker: True}


def test_local_workers_replaces_a_worker_by_a_later_one_of_the_same_process(queue: Queue) -> None:
    """A container that restarts has the same host name, and its processes have the same ids."""
    old = queue.register(["default"], 1)
    lapse(queue, old)
    queue.clock.ahead += 1000
    new = queue.register(["default"], 1)
    assert alive(queue) == {new: True}


def test_local_workers_omits_a_worker_whose_process_has_ended(near: Queue, real: Server) -> None:
    gone = register_elsewhere(real.url)
    assert alive(near) == {}
    assert gone in {about["id"] for about in near.workers()}


def test_local_workers_omits_workers_of_other_hosts(queue: Queue) -> None:
    worker = queue.register(["default"], 1)
    about = raw(queue).get(queue.keys.worker(worker))
    assert isinstance(about, bytes)
    raw(queue).set(queue.keys.worker(worker), about.replace(host_name().encode(), b"elsewhere"))
    assert alive(queue) == {}


@pytest.fixture
def apart(start_redis: Callable[..., RedisServer]) -> Iterator[tuple[Shards, list[RedisServer]]]:
    """A queue of two shards, each on a server of its own."""
    servers = [start_redis(), start_redis()]
    shards = Shards([Queue.from_url(server.url, namespace=f"queue.{at}") for at, server in enumerate(servers)])
    yield shards, servers
    shards.disconnect()


def test_local_workers_succeeds_while_one_shard_is_away(apart: tuple[Shards, list[RedisServer]]) -> None:
    shards, servers = apart
    worker = shards.register(["default"], 1)
    lapse(shards.parts[0], worker)
    assert alive(shards) == {worker: True}
    servers[0].kill()
    assert alive(shards) == {worker: True}
    servers[1].kill()
    with pytest.raises(Unavailable):
        local_workers(shards)


def check(url: str, *options: str, **environ: str) -> tuple[int, str]:
    """Run `worker.py check`. Returns its exit code and what it prints."""
    environ = {"PATH": os.environ["PATH"], "REDIS_URL": url, "TINYQUEUE_HANDLERS": "missing_module"} | environ
    done = subprocess.run(
        [sys.executable, ROOT / "worker.py", "check", *options],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stdout


def test_check_follows_the_workers_of_this_host(near: Queue, real: Server) -> None:
    none = f"Error: no worker of this host ({host_name()}) is registered; start one\n"
    assert check(real.url) == (1, none)
    worker = near.register(["default"], 1)
    assert check(real.url) == (0, f"1 worker with a lease: {worker}\n")
    lapse(near, worker)
    code, said = check(real.url)
    assert (code, said) == (1, f"Error: no heartbeat for 30 s: {worker}; restart the worker\n")


@pytest.mark.parametrize("environ", [{}, {"TINYQUEUE_SHARDS": "3"}], ids=["one", "shards"])
def test_check_passes_for_two_workers_and_fails_when_one_hangs(real: Server, environ: dict[str, str]) -> None:
    environ = {"TINYQUEUE_LEASE": "2"} | environ
    command = [sys.executable, ROOT / "worker.py"]
    both = {"PATH": os.environ["PATH"], "REDIS_URL": real.url} | environ
    processes = [subprocess.Popen(command, env=both, stderr=subprocess.DEVNULL) for _ in range(2)]
    try:
        until(lambda: check(real.url, **environ)[1].startswith("2 workers with a lease: "))
        processes[0].send_signal(SIGSTOP)
        until(lambda: check(real.url, **environ)[0] == 1)
        processes[0].send_signal(SIGCONT)
        until(lambda: check(real.url, **environ)[0] == 0)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_check_fails_with_one_line_while_redis_is_away_or_hangs(start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis()
    assert server.process
    server.process.send_signal(SIGSTOP)
    began = time.monotonic()
    code, said = check(server.url)
    assert time.monotonic() - began < HEALTH_TIMEOUT
    assert (code, said.count("\n"), said[:7]) == (1, 1, "Error: ")
    server.kill()
    code, said = check(server.url)
    assert (code, said.count("\n"), said[:7]) == (1, 1, "Error: ")


def test_check_of_a_web_process_needs_no_redis(tmp_path: Path) -> None:
    port = free_port()
    away = f"redis://127.0.0.1:{free_port()}/0"
    code, said = check("", "--web", PORT=str(port))
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith(f"Error: the web process on port {port} does not answer: ")
    with running(tmp_path, PORT=str(port), REDIS_URL=away, TINYQUEUE_API_KEYS="ops:admin:0123456789abcdef0123"):
        for host in ("", "*"):
            assert check("", "--web", PORT=str(port), HOST=host) == (0, f"the web process on port {port} answers\n")


def test_check_of_any_process_passes_for_either_and_names_both_problems(near: Queue, real: Server) -> None:
    port = free_port()
    refused = f"Error: the web process on port {port} does not answer: [Errno 111] Connection refused; "
    none = f"no worker of this host ({host_name()}) is registered; start one\n"
    assert check(real.url, "--any", PORT=str(port)) == (1, refused + none)
    worker = near.register(["default"], 1)
    assert check(real.url, "--any", PORT=str(port)) == (0, f"1 worker with a lease: {worker}\n")
    code, said = check("", "--any", PORT=str(port))
    assert code == 1
    assert said.startswith(refused + "REDIS_URL is not set")


def test_check_of_a_web_process_that_hangs_fails_in_time(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        os.kill(server.pid, SIGSTOP)
        began = time.monotonic()
        code, said = check("", "--web", PORT=str(server.address[1]))
        assert time.monotonic() - began < HEALTH_TIMEOUT
        os.kill(server.pid, SIGCONT)
    assert (code, said.count("\n")) == (1, 1)
    assert said.endswith("timed out\n")


# Process 1 ------------------------------------------------------------------------------------------------------------

WARNING = "WARNING this worker is process 1 and does not reap the processes that handlers leave behind"


@pytest.fixture
def unshare() -> list[str]:
    """A command that runs another as the first process of a process namespace."""
    command = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user cannot make a process namespace")
    return command


def log_of(*command: str | Path, **environ: str) -> str:
    environ = {"PATH": os.environ["PATH"]} | environ
    done = subprocess.run(command, env=environ, stderr=subprocess.PIPE, text=True, timeout=60, check=True)
    return done.stderr


def test_worker_warns_if_it_is_process_1(real: Server, unshare: list[str]) -> None:
    log = log_of(*unshare, sys.executable, ROOT / "worker.py", "--burst", REDIS_URL=real.url)
    assert log.count(WARNING) == 1
    assert "docker run --init, init: true in Compose, shareProcessNamespace: true in Kubernetes" in log


def test_worker_does_not_warn_below_an_init(real: Server, unshare: list[str]) -> None:
    script = f"{sys.executable} {ROOT / 'worker.py'} --burst; exit $?"
    assert "process 1" not in log_of(*unshare, "sh", "-c", script, REDIS_URL=real.url)


def test_web_process_with_a_worker_warns_if_it_is_process_1(tmp_path: Path, unshare: list[str]) -> None:
    with running(tmp_path, *unshare, sys.executable, str(ROOT / "wsgi.py")) as server:
        until(lambda: server.log.read_text().count(WARNING) == 1)
        [first] = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        os.kill(int(first), SIGTERM)
        until(lambda: not Path(f"/proc/{first}").exists())


# Compose --------------------------------------------------------------------------------------------------------------

SECRETS = {"REDIS_PASSWORD": "s3cret", "TINYQUEUE_API_KEYS": "ops:admin:0123456789abcdef0123"}


def tool(name: str) -> str:
    """The path of a program that the tests need beside Python packages, or of one that a package has."""
    found = shutil.which(name, path=f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}")
    return found or pytest.skip(f"there is no {name}")


def compose() -> dict[str, Any]:
    """The services of docker-compose.yml, with the variables replaced as Compose does it."""
    text = (ROOT / "docker-compose.yml").read_text()
    names = "|".join(SECRETS)
    text = re.sub(rf"\$\{{({names}):\?[^}}]+\}}", lambda match: SECRETS[match[1]], text)
    services: dict[str, Any] = yaml.safe_load(text)["services"]
    return services


def settings_of(service: str, **env_file: str) -> Settings:
    return Settings.read({**env_file, **compose()[service]["environment"]})


def megabytes(text: str) -> int:
    assert text[-1] == "m"
    return int(text[:-1])


def seconds(text: str) -> int:
    assert text[-1] == "s"
    return int(text[:-1])


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_compose_file_follows_its_schema() -> None:
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", ROOT / "docker-compose.yml"]
    subprocess.run(command, check=True, timeout=60)


def test_compose_refuses_to_start_without_secrets() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    assert {name for name in SECRETS if f"${{{name}:?" in text} == SECRETS.keys()
    assert not [name for name in SECRETS if re.search(rf"\$\{{?{name}(?!:\?)\b", text)]


@pytest.mark.parametrize("service", ["web", "worker"])
def test_compose_gives_a_process_time_to_stop(service: str) -> None:
    settings = settings_of(service)
    drain = settings.shutdown_timeout + LAST_WRITE + CLOSING
    assert drain < seconds(compose()[service]["stop_grace_period"])


@pytest.mark.parametrize("service", ["web", "worker"])
def test_compose_starts_a_process_with_few_rights(service: str) -> None:
    about = compose()[service]
    assert about["init"] is True
    assert about["read_only"] is True
    assert about["cap_drop"] == ["ALL"]
    assert about["security_opt"] == ["no-new-privileges:true"]
    assert about["restart"] == "unless-stopped"
    assert about["depends_on"]["redis"]["condition"] == "service_healthy"
    assert about["pids_limit"] > 500 + 20  # the most slots, and other threads
    assert about["logging"]["options"]["max-size"]


def test_compose_scales_workers() -> None:
    about = compose()["worker"]
    assert not {"container_name", "hostname", "ports", "network_mode"} & about.keys()


@pytest.mark.parametrize("service", ["web", "worker"])
def test_compose_sets_valid_settings(service: str) -> None:
    settings = settings_of(service, HOST="127.0.0.1", PORT="80", REDIS_URL="redis://elsewhere")
    assert (settings.host, settings.port, settings.log_format) == ("", 3000, "json")
    assert settings.redis_url == f"redis://:{SECRETS['REDIS_PASSWORD']}@redis:6379/0"


def test_compose_requires_api_keys_and_publishes_to_this_machine_only() -> None:
    settings = settings_of("web")
    assert wsgi.API(settings).access.keys
    assert compose()["web"]["ports"] == ["${PUBLISH:-127.0.0.1:3000}:3000"]


def test_compose_restarts_a_worker_before_its_memory_is_full() -> None:
    about = compose()["worker"]
    assert 0 < settings_of("worker").max_memory < 0.9 * megabytes(about["mem_limit"])


def test_compose_checks_each_process_in_time() -> None:
    services = compose()
    assert services["web"]["healthcheck"]["test"] == ["CMD", "python", "worker.py", "check", "--web"]
    assert services["worker"]["healthcheck"]["test"] == ["CMD", "python", "worker.py", "check"]
    for service in ("web", "worker"):
        assert seconds(services[service]["healthcheck"]["timeout"]) >= HEALTH_TIMEOUT


def test_compose_keeps_the_data_of_redis(start_redis: Callable[..., RedisServer]) -> None:
    """The command of the service is run, by the redis-server that is here."""
    about = compose()["redis"]
    [program, *options] = about["command"]
    server = start_redis(*options)
    assert program == "redis-server"
    url = server.url.replace("redis://", f"redis://:{about['environment']['REDISCLI_AUTH']}@")
    done = subprocess.run(
        [sys.executable, ROOT / "worker.py", "doctor", "--json"],
        env={"PATH": os.environ["PATH"], "REDIS_URL": url},
        capture_output=True,
        check=False,
        timeout=30,
    )
    found = {finding["about"]: finding for finding in json.loads(done.stdout)}
    assert [name for name, finding in found.items() if finding["level"] != "ok"] == ["workers"]
    assert found["persistence"]["seen"] == "appendonly yes"
    assert found["eviction"]["seen"] == "maxmemory-policy is noeviction"
    assert "no maxmemory" not in found["memory"]["seen"]
    assert check(server.url)[0] == 1  # it needs the password
    assert megabytes(about["mem_limit"]) >= 2 * int(option(options, "--maxmemory").removesuffix("mb"))
    assert about["volumes"] == ["redis-data:/data"]


def test_compose_writes_a_backup_on_request_only(real: Server, tmp_path: Path) -> None:
    """The command of the service is run, with the Python that is here and a folder in place of the volume."""
    about = compose()["backup"]
    assert (about["profiles"], about["restart"], about["volumes"]) == (["backup"], "no", ["backups:/data"])
    real.queue().enqueue("export", {"to": "a"})  # a type for which no module that a test loads has a handler
    old = tmp_path / "2020-01-01-0330.gz"
    old.touch()
    os.utime(old, (0, 0))
    [shell, flag, script] = about["command"]
    script = script.replace("$$", "$").replace("/data", str(tmp_path)).replace("python ", f"{sys.executable} ")
    environ = {"PATH": os.environ["PATH"], "REDIS_URL": real.url}
    subprocess.run([shell, flag, script], cwd=ROOT, env=environ, check=True, timeout=60, stderr=subprocess.DEVNULL)
    [backup] = tmp_path.iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d{4}\.gz", backup.name)
    assert b'"export"' in gzip.decompress(backup.read_bytes())


def test_compose_waits_until_redis_answers(start_redis: Callable[..., RedisServer]) -> None:
    about = compose()["redis"]
    server = start_redis(*about["command"][1:])
    [kind, script] = about["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    script = script.replace("redis-cli", f"{tool('redis-cli')} -p {server.port}")
    environ = {"PATH": os.environ["PATH"], **about["environment"]}
    assert subprocess.run(["sh", "-c", script], env=environ, check=False).returncode == 0
    environ["REDISCLI_AUTH"] = "wrong"
    assert subprocess.run(["sh", "-c", script], env=environ, check=False, stderr=subprocess.DEVNULL).returncode == 1
    server.stop()
    assert subprocess.run(["sh", "-c", script], env=environ, check=False, stderr=subprocess.DEVNULL).returncode == 1


def test_env_example_becomes_a_valid_env_as_it_says(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".env.example", tmp_path)
    [comment] = re.findall(r"^#     (sed .*?)\n#\n", (ROOT / ".env.example").read_text(), re.M | re.S)
    script = comment.replace("\n#", "\n")
    assert " ".join(script.split()) in " ".join((ROOT / "docs" / "deploy.md").read_text().split())
    tool("openssl")
    subprocess.run(["sh", "-ec", script], cwd=tmp_path, check=True, timeout=30)
    values = dotenv_values(tmp_path / ".env")
    assert values.keys() >= {*SECRETS, "PUBLISH"}
    assert re.fullmatch("[0-9a-f]{48}", values["REDIS_PASSWORD"] or "")
    settings = Settings.read({name: value or "" for name, value in values.items()} | {"REDIS_URL": "redis://redis"})
    assert wsgi.API(settings).access.keys[0].name == "ops"
    assert (tmp_path / ".env").stat().st_mode & 0o77 == 0


# The image ------------------------------------------------------------------------------------------------------------


def test_dockerfile_follows_the_rules_of_hadolint() -> None:
    subprocess.run([tool("hadolint"), ROOT / "Dockerfile"], check=True, timeout=60)


def test_dockerfile_labels_this_version() -> None:
    assert f"ARG VERSION={tinyqueue.__version__}\n" in (ROOT / "Dockerfile").read_text()


CA = Path("/etc/ssl/certs/ca-certificates.crt")  # the same on Debian's machines and in their containers
SECRET = "not-for-the-image"

# A module of the user, which imports a folder. Its job waits until the test puts something into the list `gate`.
GATES = """
import os
import redis
from shop import NAME
from tinyqueue import handler

@handler("gate")
def gate(name: str) -> str:
    with redis.Redis.from_url(os.environ["REDIS_URL"], socket_timeout=None) as client:
        client.rpush("begun", name)
        client.blpop("gate", 60)
    return NAME
"""


@contextmanager
def memory_at(folder: str) -> Iterator[str]:
    """A file system in memory: dpkg waits for the disk after each package, for two minutes in all."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    try:
        yield f"{folder}/root"
    finally:
        subprocess.run(["umount", folder], check=True)


class Buildah:
    """Runs buildah with a storage of its own, which stays for later runs of the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        storage = ["--root", str(folder / "storage"), "--runroot", str(folder / "run"), "--storage-driver", "vfs"]
        self.command = [tool("buildah"), *storage]

    def __call__(self, command: str, *arguments: str | Path) -> str:
        environ = os.environ | {"BUILDAH_ISOLATION": "chroot"}
        whole = [*self.command, command, *arguments]
        done = subprocess.run(whole, env=environ, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def base(self) -> str:
        """The name of an image with Python, which the first run on this machine makes from Debian's packages."""
        name = "localhost/tinyqueue-tests-base"
        if not self("images", "--quiet", "--filter", f"reference={name}"):
            with tempfile.TemporaryDirectory() as mount, memory_at(mount) as root:
                packages = "--include=python3,python3-venv,ca-certificates"
                command = [tool("debootstrap"), "--variant=minbase", packages, "bookworm", root]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=900)
                container = self("from", "scratch")
                self("add", container, root, "/")
                self("config", "--env", f"PIP_CERT={CA}", container)
                self("commit", container, name)
        return name


@pytest.fixture(scope="module")
def buildah() -> Iterator[Buildah]:
    """Buildah, for this run of the tests alone. It has no containers."""
    if os.getuid():
        pytest.skip("this user cannot run containers: only root can without a daemon")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tinyqueue-tests")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        buildah = Buildah(folder)
        buildah("rm", "--all")  # an earlier run may have been killed
        yield buildah
        buildah("rm", "--all")


class Image(NamedTuple):
    root: Path
    config: dict[str, Any]


@pytest.fixture(scope="module")
def image(buildah: Buildah, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The image of this project with a module of the user, unpacked. Nothing secret may be in it."""
    context = tmp_path_factory.mktemp("context")
    shutil.copytree(ROOT, context, ignore=shutil.ignore_patterns(".git", ".venv", ".*_cache"), dirs_exist_ok=True)
    (context / ".git").mkdir()
    (context / "gates.py").write_text(GATES)
    (context / "shop").mkdir()
    (context / "shop" / "__init__.py").write_text("NAME = 'shop'\n")
    with (context / ".dockerignore").open("a") as listed:
        listed.write("!shop/\n")
    for name in (".git/config", ".env", "dump.rdb", "tests/key.pem"):
        (context / name).write_text(SECRET)
    certificates = ["--volume", f"{CA}:{CA}:ro"] if CA.exists() else []  # of a proxy between here and the packages
    options = ["--format", "docker", "--build-arg", f"BASE_IMAGE={buildah.base()}", *certificates]
    tag = "localhost/tinyqueue-tests"
    buildah("bud", *options, "--tag", tag, context)
    about = json.loads(buildah("inspect", "--type", "image", tag))
    root = buildah("mount", buildah("from", tag))
    buildah("rmi", "--prune", "--force")  # the image of an earlier run, which has lost its tag
    return Image(Path(root), about["Docker"]["config"])


def test_image_contains_only_what_runs(image: Image) -> None:
    modules = {path.name for path in ROOT.glob("*.py")} - {"setup.py"}
    files = {str(path.relative_to(image.root / "app")) for path in (image.root / "app").rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} == modules | {
        "gates.py",
        "shop/__init__.py",
        "dashboard.html",
        "openapi.json",
    }
    assert not [path for path in (image.root / "app").rglob("*.py") if SECRET in path.read_text()]
    assert {name for name in modules if f"__pycache__/{name[:-3]}." not in " ".join(files)} == set()


def test_image_contains_no_tools_to_build_and_no_caches(image: Image) -> None:
    programs = {path.name for folder in image.root.glob("**/bin") for path in folder.iterdir()}
    assert programs >= {"python", "python3"}
    assert not programs & {"pip", "pip3", "cc", "gcc", "g++", "c++", "make", "ld", "as", "cargo", "git", "uv"}
    packages = {path.name for path in image.root.glob("opt/venv/lib/*/site-packages/*")}
    assert packages >= {"redis", "waitress"}
    assert not packages & {"pip", "setuptools", "wheel", "pytest"}
    assert not [path for name in ("build", "root/.cache", "app/tests") if (path := image.root / name).exists()]
    assert not list((image.root / "tmp").iterdir())


def test_image_says_how_it_runs(image: Image) -> None:
    config = image.config
    assert config["User"] == "10001:10001"
    assert config["Cmd"] == ["python", "wsgi.py"]
    assert not config["Entrypoint"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"] == ["CMD", "python", "worker.py", "check", "--any"]
    assert config["Healthcheck"]["Timeout"] >= 2 * HEALTH_TIMEOUT * 10**9
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in config["Labels"].items()}
    assert labels["version"] == tinyqueue.__version__
    assert labels["base.name"] == "localhost/tinyqueue-tests-base"
    assert {"title", "description", "licenses", "revision", "created", "base.digest"} <= labels.keys()


# A root that cannot be written, a host name, processes of its own, and a user without rights, as Compose does it.
ENTER = """
root=$1 data=$2 name=$3 user=$4; shift 4
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/tmp"
mount --bind /dev "$root/dev"
mount --bind "$data" "$root/data"
echo "$name" > /proc/sys/kernel/hostname
exec chroot --userspec="$user" "$root" "$@"
"""


class Container:
    """A process of the image: `process` is its first one, as seen from this machine."""

    def __init__(self, image: Image, folder: Path, command: list[str], settings: dict[str, str]) -> None:
        self.name = folder.name
        self.log = folder / "log"
        self.user, self.group = map(int, image.config["User"].split(":"))
        (folder / "data").mkdir()
        os.chown(folder / "data", self.user, self.group)  # as Docker does it with a new volume
        variables = [*image.config["Env"], *(f"{name}={value}" for name, value in settings.items())]
        self.env = ["env", "-i", "-C", image.config["WorkingDir"], *variables]
        unshare = ["unshare", "--mount", "--uts", "--pid", "--fork", "sh", "-ec", ENTER, "sh"]
        where = [str(image.root), str(folder / "data"), folder.name, image.config["User"]]
        with self.log.open("wb") as log:
            self.outer = subprocess.Popen([*unshare, *where, *self.env, *command], stdout=log, stderr=log)
        children = Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children")
        self.pid = int(until(lambda: self.outer.poll() is None and children.read_text()))

    def until_log(self, text: str) -> None:
        with suppress(AssertionError):
            until(lambda: text in self.log.read_text() or self.outer.poll() is not None)
        assert text in self.log.read_text(), self.log.read_text()

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as `docker exec` does."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--uts", "--pid", "--root"]
        user = ["--setuid", str(self.user), "--setgid", str(self.group)]
        whole = [*enter, *user, *self.env, *command]
        return subprocess.run(whole, capture_output=True, text=True, timeout=60, check=False)

    def kill(self) -> None:
        if self.outer.poll() is None:
            os.kill(self.pid, SIGKILL)  # and with it all processes inside
            self.outer.wait(30)

    def stop(self) -> int:
        """Send SIGTERM to the first process and return its exit code."""
        os.kill(self.pid, SIGTERM)
        return self.outer.wait(30)


@pytest.fixture
def start(image: Image, tmp_path: Path, real: Server) -> Iterator[Callable[..., Container]]:
    """Start a process of the image on the real server."""
    started: list[Container] = []

    def start(*command: str, **settings: str) -> Container:
        folder = tmp_path / f"container{len(started)}"
        folder.mkdir()
        settings = {"REDIS_URL": real.url, "TINYQUEUE_HANDLERS": "handlers,gates"} | settings
        started.append(Container(image, folder, list(command), settings))
        return started[-1]

    yield start
    for container in started:
        container.kill()


def test_image_serves_and_runs_jobs_on_a_read_only_root(
    image: Image, start: Callable[..., Container], near: Queue
) -> None:
    port = free_port()
    web = start(*image.config["Cmd"], PORT=str(port), HOST="127.0.0.1")
    worker = start("python", "worker.py", PORT=str(port + 1), EXPORT_DIR="/data/exports")
    web.until_log("web server on")
    worker.until_log("worker started")
    export = {"type": "export-data", "payload": {"format": "csv", "rows": [{"a": 1}]}}
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("POST", "/jobs", json.dumps(export), {"Content-Type": "application/json"})
        id = json.loads(connection.getresponse().read())["jobId"]
    job = near.wait_for(id, 20)
    assert job
    assert job.status == "completed", job.error
    for container in (web, worker):
        passed = container.run(*image.config["Healthcheck"]["Test"][1:])
        assert (passed.returncode, passed.stderr) == (0, "")
        status = Path(f"/proc/{container.pid}/status").read_text()
        assert re.findall(r"^Uid:\t(\d+)\t(\d+)\t(\d+)\t(\d+)$", status, re.M) == [("10001",) * 4]
        assert re.search(r"^CapEff:\t0+$", status, re.M)
        assert "Read-only file system" in container.run("touch", "/app/file").stderr
    assert worker.run("python", "worker.py", "check").stdout.startswith(f"1 worker with a lease: {worker.name}-1-")
    assert web.run("python", "worker.py", "check").returncode == 1
    assert web.stop() == 0
    assert worker.stop() == 0
    assert "Traceback" not in web.log.read_text() + worker.log.read_text()


@pytest.mark.parametrize(("timeout", "outcome"), [("20", "completed"), ("0", "pending")])
def test_image_loses_no_job_at_sigterm(
    start: Callable[..., Container], near: Queue, *, timeout: str, outcome: str
) -> None:
    job = near.enqueue("gate", "one")
    waiting = near.enqueue("gate", "two")
    settings = {"TINYQUEUE_SHUTDOWN_TIMEOUT": timeout, "WORKER_CONCURRENCY": "1"}
    worker = start("python", "worker.py", **settings)
    assert raw(near).blpop(["begun"], 20)
    os.kill(worker.pid, SIGTERM)
    worker.until_log("worker stopping")
    if outcome == "completed":
        raw(near).rpush("gate", "open")
    assert worker.outer.wait(30) == 0
    left = [near.get(job.id), near.get(waiting.id)]
    assert [(job.status, job.attempts) for job in left if job] == [
        (outcome, int(outcome == "completed")),
        ("pending", 0),
    ]
    start("python", "worker.py")
    raw(near).rpush("gate", "open", "open")
    until(lambda: near.stats()["completed"] == 2)
    raw(near).delete("begun", "gate")
