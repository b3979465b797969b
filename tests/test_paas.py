"""Files for hosting platforms: each value agrees with our settings, and what they start runs.

app.json is checked against its published schema. For the other files there is none that a test can
get, so the names that they may use are listed here, from the documentation of the platforms.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
import yaml
from client import Client, running
from conftest import RedisServer, free_port, until

import tinyqueue
from tinyqueue import Queue
from tinyqueue_access import read_keys
from tinyqueue_config import Settings
from worker import CLOSING, LAST_WRITE
from wsgi import API, ROUTES

ROOT = Path(tinyqueue.__file__).parent
PROCFILE = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
HEROKU_SCHEMA = "@heroku/mcp-server@1.2.8"  # the package in which Heroku publishes it
KILLED_AFTER = 30  # seconds after SIGTERM on Heroku, which no file can change
HANDLERS = """
from tinyqueue import handler

@handler("echo")
def echo(payload: int) -> int:
    return payload
"""


def read(name: str) -> Any:
    text = (ROOT / name).read_text()
    if name.endswith(".toml"):
        return tomllib.loads(text)
    return json.loads(text) if name.endswith(".json") else yaml.safe_load(text)


class Part(NamedTuple):
    """A process that a platform starts, as its file describes it."""

    command: str
    environ: dict[str, str]
    grace: int  # seconds from SIGTERM until it is killed
    health: str = ""
    port: int = 0


GENERATED = {"hex": secrets.token_hex(32), "base64": base64.b64encode(secrets.token_bytes(32)).decode()}
PLAIN = {"REDIS_URL": "redis://:secret@redis:6379"}
TLS = {"REDIS_URL": "rediss://:secret@redis:6379"}


def heroku() -> dict[str, Part]:
    about = read("app.json")
    environ = {name: entry.get("value", GENERATED["hex"]) for name, entry in about["env"].items()}
    platform = {"DYNO": "web.1", "PORT": "5000", "WEB_CONCURRENCY": "2"} | TLS
    return {kind: Part(PROCFILE[kind], platform | environ, KILLED_AFTER) for kind in about["formation"]}


def render() -> dict[str, Part]:
    about = read("render.yaml")
    [group] = about["envVarGroups"]
    shared = {entry["key"]: entry["value"] for entry in group["envVars"]}
    parts = {}
    for service in (service for service in about["services"] if service["type"] != "keyvalue"):
        generated = [entry["key"] for entry in service["envVars"] if entry.get("generateValue")]
        environ = {"RENDER": "true", "PORT": "10000"} | PLAIN | shared | dict.fromkeys(generated, GENERATED["base64"])
        grace = service["maxShutdownDelaySeconds"]
        parts[service["type"]] = Part(service["startCommand"], environ, grace, service.get("healthCheckPath", ""))
    return parts


def fly() -> dict[str, Part]:
    about = read("fly.toml")
    secret = {"TINYQUEUE_API_KEYS": f"ops:admin:{GENERATED['hex']}"} | PLAIN  # set by `fly secrets`
    environ = {"FLY_APP_NAME": "tinyqueue"} | about["env"] | secret
    service = about["http_service"]
    [check] = service["checks"]
    web = {"health": check["path"], "port": service["internal_port"]}
    return {
        kind: Part(command, environ, about["kill_timeout"], **(web if kind in service["processes"] else {}))
        for kind, command in about["processes"].items()
    }


def railway() -> dict[str, Part]:
    environ = {"RAILWAY_ENVIRONMENT": "production", "PORT": "8080"} | PLAIN
    environ |= {"TINYQUEUE_API_KEYS": f"ops:admin:{GENERATED['hex']}"}
    files = {"web": "railway.json", "worker": "deploy/railway-worker.json"}
    deploys = {kind: read(name)["deploy"] for kind, name in files.items()}
    return {
        kind: Part(deploy["startCommand"], environ, deploy["drainingSeconds"], deploy.get("healthcheckPath", ""))
        for kind, deploy in deploys.items()
    }


def digitalocean() -> dict[str, Part]:
    about = read(".do/app.yaml")
    parts = {}
    for kind, component in (("web", about["services"][0]), ("worker", about["workers"][0])):
        listed = about["envs"] + component.get("envs", [])
        environ = {entry["key"]: entry["value"] for entry in listed} | TLS
        health = component.get("health_check", {}).get("http_path", "")
        grace = component["termination"]["grace_period_seconds"]
        parts[kind] = Part(component["run_command"], environ, grace, health, component.get("http_port", 0))
    return parts


PLATFORMS = {"heroku": heroku, "render": render, "fly": fly, "railway": railway, "digitalocean": digitalocean}
each_platform = pytest.mark.parametrize("parts", PLATFORMS.values(), ids=PLATFORMS.keys())


# The values -----------------------------------------------------------------------------------------------------------


@each_platform
def test_file_starts_the_processes_of_the_procfile(parts: Callable[[], dict[str, Part]]) -> None:
    assert {kind: part.command for kind, part in parts().items()} == PROCFILE


@each_platform
def test_file_sets_only_valid_settings(parts: Callable[[], dict[str, Part]]) -> None:
    for part in parts().values():
        settings = Settings.read(part.environ)
        assert settings.redis_url == part.environ["REDIS_URL"]
        assert not settings.open
        assert not part.port or part.port == settings.port


@each_platform
def test_file_leaves_time_to_drain_before_the_platform_kills(parts: Callable[[], dict[str, Part]]) -> None:
    for part in parts().values():
        assert Settings.read(part.environ).shutdown_timeout + LAST_WRITE + CLOSING < part.grace


@each_platform
def test_file_checks_the_health_of_web_processes_without_a_key(parts: Callable[[], dict[str, Part]]) -> None:
    open_to_all = {path for method, path, _, role in ROUTES if method == "GET" and not role}
    assert {part.health for part in parts().values()} - {""} <= open_to_all


@each_platform
def test_file_gives_the_web_process_the_key_of_an_admin(parts: Callable[[], dict[str, Part]], near: Queue) -> None:
    settings = Settings.read(parts()["web"].environ)
    [key] = read_keys(settings.api_keys)
    answer = Client(API(settings, near), key.secret.decode()).get("/whoami")
    assert "admin" in answer.json["roles"]


# What each platform needs ---------------------------------------------------------------------------------------------


def test_heroku_gets_a_redis_that_keeps_its_data_and_its_self_signed_certificate_is_accepted() -> None:
    about = read("app.json")
    assert [addon["plan"] for addon in about["addons"]] == ["heroku-redis:premium-0"]  # mini keeps nothing
    assert about["env"]["TINYQUEUE_API_KEYS"] == about["env"]["TINYQUEUE_API_KEYS"] | {"generator": "secret"}
    settings = Settings.read(heroku()["web"].environ)
    assert (settings.tls_verify, settings.trusted_proxies) == (False, 1)


def test_heroku_finds_exactly_one_file_that_locks_requirements() -> None:
    names = ("requirements.txt", "Pipfile.lock", "poetry.lock", "uv.lock")
    assert [name for name in names if (ROOT / name).exists()] == ["requirements.txt"]
    assert re.fullmatch(r"3\.\d+", (ROOT / ".python-version").read_text().strip())


def test_render_gets_a_redis_that_evicts_nothing_and_is_closed_to_the_internet() -> None:
    services = {service["type"]: service for service in read("render.yaml")["services"]}
    store = services["keyvalue"]
    assert (store["maxmemoryPolicy"], store["ipAllowList"]) == ("noeviction", [])
    assert store["plan"] != "free"  # which keeps nothing
    for kind in ("web", "worker"):
        [url] = [entry for entry in services[kind]["envVars"] if entry.get("key") == "REDIS_URL"]
        assert url["fromService"] == {"type": "keyvalue", "name": store["name"], "property": "connectionString"}
        assert {"fromGroup": "tinyqueue"} in services[kind]["envVars"]
        assert services[kind]["buildCommand"].split()[-1] == "requirements.txt"


def test_fly_sends_sigterm_and_restarts_workers_that_exit_with_0() -> None:
    about = read("fly.toml")
    assert about["kill_signal"] == "SIGTERM"
    [restart] = about["restart"]
    assert restart == {"policy": "always", "processes": [*about["processes"]]}
    assert about["http_service"]["processes"] == ["web"]


def test_railway_gets_numbers_and_restarts_workers_that_exit_with_0() -> None:
    for name in ("railway.json", "deploy/railway-worker.json"):
        deploy = read(name)["deploy"]
        assert deploy["restartPolicyType"] == "ALWAYS"
        assert type(deploy["drainingSeconds"]) is type(deploy["overlapSeconds"]) is int  # texts are refused


def test_digitalocean_keeps_the_key_secret_and_binds_the_database() -> None:
    about = read(".do/app.yaml")
    [store] = about["databases"]
    assert {entry["key"]: entry["value"] for entry in about["envs"]}[
        "REDIS_URL"
    ] == f"${{{store['name']}.DATABASE_URL}}"
    [key] = [entry for entry in about["services"][0]["envs"] if entry["key"] == "TINYQUEUE_API_KEYS"]
    assert key["type"] == "SECRET"
    assert about["services"][0]["termination"]["drain_seconds"] <= 110
    assert store["production"] is True


def test_files_build_the_same_image() -> None:
    builds = [read(name)["build"]["dockerfilePath"] for name in ("railway.json", "deploy/railway-worker.json")]
    builds.append(read("fly.toml")["build"]["dockerfile"])
    about = read(".do/app.yaml")
    builds += [component["dockerfile_path"] for component in about["services"] + about["workers"]]
    assert set(builds) == {"Dockerfile"}
    assert (ROOT / "Dockerfile").exists()


# The names ------------------------------------------------------------------------------------------------------------

WORDS = {
    "render.yaml": "services envVarGroups type name runtime plan buildCommand startCommand healthCheckPath "
    "maxShutdownDelaySeconds envVars key value fromService property generateValue fromGroup maxmemoryPolicy "
    "ipAllowList",
    "fly.toml": "kill_signal kill_timeout build dockerfile processes web worker env http_service internal_port "
    "force_https auto_stop_machines auto_start_machines min_machines_running checks method path interval timeout "
    "grace_period restart policy vm size memory",
    "railway.json": "$schema build builder dockerfilePath deploy startCommand healthcheckPath healthcheckTimeout "
    "restartPolicyType overlapSeconds drainingSeconds",
    ".do/app.yaml": "name region envs key scope value type services workers databases github repo branch "
    "deploy_on_push dockerfile_path run_command instance_count instance_size_slug http_port health_check http_path "
    "initial_delay_seconds period_seconds timeout_seconds termination drain_seconds grace_period_seconds engine "
    "production cluster_name",
}
WORDS["deploy/railway-worker.json"] = WORDS["railway.json"]


def names_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        for part in value.values():
            yield from names_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from names_in(part)


@pytest.mark.parametrize("name", WORDS)
def test_file_uses_only_names_that_the_platform_documents(name: str) -> None:
    settings = {setting for setting, _, _ in Settings.table()}
    assert set(names_in(read(name))) - set(WORDS[name].split()) - settings == set()


def unavailable(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def test_app_json_follows_the_schema_of_heroku(tmp_path: Path) -> None:
    if not shutil.which("npm"):
        unavailable("npm is not on PATH: app.json IS NOT CHECKED")
    pack = ["npm", "pack", "--silent", HEROKU_SCHEMA]
    done = subprocess.run(pack, cwd=tmp_path, capture_output=True, text=True, check=False)
    if done.returncode:
        unavailable(f"npm pack failed: app.json IS NOT CHECKED\n{done.stderr}")
    [archive] = tmp_path.glob("*.tgz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    [schema] = tmp_path.rglob("app-json.schema.json")
    jsonschema.validate(read("app.json"), json.loads(schema.read_text()))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(read("app.json") | {"unknown": 1}, json.loads(schema.read_text()))


# The Procfile, with a real runner -------------------------------------------------------------------------------------


@pytest.fixture
def self_signed(start_redis: Callable[..., RedisServer], tmp_path: Path) -> str:
    """The URL of a Redis that speaks only TLS, with a certificate of its own and a password."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    make = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=redis -keyout redis.key -out redis.pem"
    subprocess.run(make.split(), cwd=tmp_path, capture_output=True, check=True)
    port = free_port()
    files = ("--tls-cert-file", tmp_path / "redis.pem", "--tls-key-file", tmp_path / "redis.key")
    options = ("--tls-port", port, "--tls-auth-clients", "no", "--requirepass", "secret", *files)
    start_redis(*map(str, options))
    return f"rediss://:secret@127.0.0.1:{port}"


def call(environ: Mapping[str, str], method: str, path: str, body: str | None = None) -> Any:
    """Make a request as the router passes it on, with the generated key."""
    headers = {
        "Authorization": f"Bearer {environ['TINYQUEUE_API_KEYS']}",
        "Content-Type": "application/json",
        "X-Forwarded-For": "198.51.100.7",
    }
    with closing(http.client.HTTPConnection("localhost", int(environ["PORT"]), timeout=30)) as connection:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status < 300, text
        return json.loads(text) if answer.headers["Content-Type"] == "application/json" else text.decode()


def test_procfile_serves_and_runs_jobs_as_on_heroku(self_signed: str, tmp_path: Path) -> None:
    """A runner starts the Procfile with the environment that app.json and Heroku make."""
    (tmp_path / "handlers.py").write_text(HANDLERS)
    for path in (ROOT / "Procfile", *ROOT.glob("*.py"), ROOT / "dashboard.html", ROOT / "openapi.json"):
        if path.name != "handlers.py":
            (tmp_path / path.name).symlink_to(path)
    environ = heroku()["web"].environ | {"REDIS_URL": self_signed, "PORT": str(free_port()), "HOST": ""}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the Procfile says python
    runner = ("sh", "-c", "exec python -m honcho start >&2")
    with running(tmp_path, *runner, PATH=path, **environ) as processes:
        assert "<title>TinyQueue</title>" in call(environ | {"TINYQUEUE_API_KEYS": ""}, "GET", "/")  # asks for the key
        assert call(environ, "GET", "/whoami") == {
            "name": "admin",
            "roles": ["submit", "read", "admin"],
            "embedded": False,
        }
        id = call(environ, "POST", "/jobs", '{"type":"echo","payload":7}')["jobId"]
        until(lambda: call(environ, "GET", f"/jobs/{id}?wait=5")["status"] == "completed")
        assert call(environ, "GET", "/scale")["load"] == 0
    log = processes.log.read_text()
    assert "2 processes with up to" in log  # WEB_CONCURRENCY
    assert "Traceback" not in log
    queue = Queue.from_url(self_signed, tls_verify=False)
    assert queue.workers() == []
    queue.pool.disconnect()
