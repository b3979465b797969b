"""The distributions that `python -m build` makes, used as their users do: installed elsewhere, or unpacked."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from client import Answer, Wire, running, spell
from conftest import Server

import tinyqueue

ROOT = Path(tinyqueue.__file__).parent

# A project with modules named as some of ours. Its handler needs its own.
PROJECT = {
    "worker.py": "NAME = 'the worker.py of the project'",
    "wsgi.py": "NAME = 'the wsgi.py of the project'",
    "handlers.py": """
import worker, wsgi
from tinyqueue import handler

@handler("names")
def names(payload: None) -> list[str]:
    return [worker.NAME, wsgi.NAME]
""",
}
NAMES = ["the worker.py of the project", "the wsgi.py of the project"]

# Each comment says what mypy must find in its line; in all other lines it must find nothing.
PROGRAM = """
from dataclasses import dataclass

from tinyqueue import Discard, Job, Queue, QueueFull, Retry, handler
from tinyqueue.worker import Worker
from tinyqueue.wsgi import app
from tinyqueue_config import Settings, open_queue
from tinyqueue_doctor import warnings
from tinyqueue_redis import connect


@dataclass
class Charge:
    customer: str
    cents: int


@handler("charge", max_attempts=5, timeout=30)
def charge(payload: Charge, job: Job) -> dict[str, str]:
    return {"receipt": job.id}


queue = Queue.from_url("redis://localhost:6379/0")
charge.enqueue(queue, Charge("c-9", 500), delay=60)
charge.enqueue(queue, {"customer": "c-9", "cents": 500})  # arg-type
charge.enqueue(queue, Charge("c-9", "500"))  # arg-type
Worker(queue, Settings()).run().bit_length()
app.settings.port.bit_length()
queue.no_such_verb()  # attr-defined
open_queue("redis://localhost:6379/0")  # arg-type
warnings(connect("redis://localhost:6379/0"))  # arg-type
"""


def run(*command: str | Path, cwd: Path, **environ: str) -> str:
    """Run a command that must succeed, and return what it prints. It sees nothing of our environment but `environ`."""
    environ = {"PATH": os.environ["PATH"]} | environ
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fetch(python: str | Path, *arguments: str | Path) -> None:
    """Run a module that downloads packages as pip is configured here. Skip the test where nothing can be downloaded."""
    done = subprocess.run([python, "-m", *arguments], capture_output=True, text=True, timeout=600, check=False)
    said = done.stdout + done.stderr
    if "No matching distribution found" in said:
        pytest.skip("no package index can be reached: THE PACKAGE IS NOT TESTED")
    assert done.returncode == 0, said


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and with the wheel that was made from it."""
    folder = tmp_path_factory.mktemp("dist")
    fetch(sys.executable, "build", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    [wheel] = distributions.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def unpacked(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the source distribution unpacks to."""
    [sdist] = distributions.glob("*.tar.gz")
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of a fresh environment in which only the wheel is installed, with what it needs."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    fetch(folder / "bin" / "python", "pip", "install", wheel)
    return folder / "bin"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in PROJECT.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def ask(address: tuple[str, int], method: str, path: str, body: bytes | None = None) -> Answer:
    with Wire(address) as wire:
        wire.send(spell(method, path, body))
        return wire.answer()


# The wheel ------------------------------------------------------------------------------------------------------------


def test_distributions_pass_the_strict_check_of_their_metadata(distributions: Path) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", *distributions.iterdir(), cwd=distributions)


def test_wheel_installs_no_name_that_a_user_may_have(wheel: Path) -> None:
    installed = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert [name for name in installed if not re.match(r"tinyqueue\b|tinyqueue_", name)] == []


def test_wheel_marks_every_module_as_typed(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {name.partition("/")[0] for name in names if name.endswith("/__init__.py")}
    assert modules == {path.stem for path in ROOT.glob("tinyqueue*.py")}
    assert {f"{module}/py.typed" for module in modules} <= names


def test_wheel_holds_the_sources_unchanged(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    for name in ("worker.py", "wsgi.py", "dashboard.html", "openapi.json"):
        assert archive.read(f"tinyqueue/{name}") == (ROOT / name).read_bytes()
    for path in ROOT.glob("tinyqueue*.py"):
        assert archive.read(f"{path.stem}/__init__.py") == path.read_bytes()


def test_wheel_built_where_an_older_one_was_holds_nothing_of_it(unpacked: Path, tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(unpacked, sources)
    left = sources / "build" / "lib" / "worker.py"
    left.parent.mkdir(parents=True)
    left.write_text("")
    fetch(sys.executable, "build", "--wheel", "--outdir", tmp_path, sources)
    [wheel] = tmp_path.glob("*.whl")
    assert "worker.py" not in zipfile.ZipFile(wheel).namelist()


# Installed ------------------------------------------------------------------------------------------------------------


def test_command_ignores_modules_of_the_same_names(scripts: Path, project: Path) -> None:
    for name in ("worker.py", "wsgi.py", "handlers.py"):
        (project / name).write_text("raise SystemExit('wrong module')")
    printed = run(scripts / "tinyqueue", "--version", cwd=project, PYTHONPATH=str(project))
    assert printed == f"tinyqueue, version {tinyqueue.__version__}\n"


def test_web_command_serves_a_project_that_has_modules_of_the_same_names(scripts: Path, project: Path) -> None:
    with running(project, str(scripts / "tinyqueue"), "web") as (address, _, _):
        submitted = ask(address, "POST", "/jobs", b'{"type": "names", "payload": null}')
        ended = ask(address, "GET", f"/jobs/{submitted.json['jobId']}?wait=20").json
        assert (ended["status"], ended["result"]) == ("completed", NAMES)
        assert ask(address, "GET", "/openapi.json").json["info"]["version"] == tinyqueue.__version__
        assert ask(address, "GET", "/").body == (ROOT / "dashboard.html").read_bytes()


def test_checkout_serves_a_project_that_has_modules_of_the_same_names(project: Path) -> None:
    with running(project) as (address, _, _):
        submitted = ask(address, "POST", "/jobs", b'{"type": "names", "payload": null}')
        assert ask(address, "GET", f"/jobs/{submitted.json['jobId']}?wait=20").json["result"] == NAMES


@pytest.mark.parametrize("command", ["worker", "run"])
def test_worker_command_runs_jobs_of_a_project_that_has_modules_of_the_same_names(
    scripts: Path, project: Path, real: Server, command: str
) -> None:
    queue = real.queue()
    job = queue.enqueue("names", None)
    run(scripts / "tinyqueue", command, "--burst", cwd=project, REDIS_URL=real.url)
    ended = queue.get(job.id)
    assert ended
    assert ended.answer()["result"] == NAMES


def test_commands_of_the_operator_are_installed(scripts: Path, project: Path, real: Server) -> None:
    assert json.loads(run(scripts / "tinyqueue", "stats", "--json", cwd=project, REDIS_URL=real.url))["pending"] == 0


@pytest.mark.parametrize(
    ("installed", "checkout"), [("web", ("wsgi.py",)), ("worker", ("worker.py", "run")), ("run", ("worker.py", "run"))]
)
def test_installed_command_has_the_options_of_the_checkout(
    scripts: Path, tmp_path: Path, installed: str, checkout: tuple[str, ...]
) -> None:
    _, _, options = run(scripts / "tinyqueue", installed, "--help", cwd=tmp_path).partition("\n")
    name, *arguments = checkout
    assert options == run(sys.executable, ROOT / name, *arguments, "--help", cwd=tmp_path).partition("\n")[2]


def test_web_command_helps_when_a_setting_is_wrong(scripts: Path, tmp_path: Path) -> None:
    assert "Usage: tinyqueue web " in run(scripts / "tinyqueue", "web", "--help", cwd=tmp_path, PORT="garbage")


def test_application_of_the_wheel_can_be_imported_beside_another_wsgi(scripts: Path, project: Path) -> None:
    program = "import wsgi; from tinyqueue.wsgi import API, app; assert isinstance(app, API); print(wsgi.NAME)"
    assert run(scripts / "python", "-c", program, cwd=project).strip() == NAMES[1]


def test_dashboard_and_description_are_served_from_a_target_folder(wheel: Path, project: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    fetch(sys.executable, "pip", "install", "--no-deps", "--target", target, wheel)
    with running(project, sys.executable, "-m", "tinyqueue.wsgi", PYTHONPATH=str(target)) as (address, _, _):
        assert ask(address, "GET", "/openapi.json").json["info"]["version"] == tinyqueue.__version__
        assert ask(address, "GET", "/").body == (target / "tinyqueue" / "dashboard.html").read_bytes()


def test_mypy_refuses_a_wrong_payload_in_a_project_of_a_user(scripts: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--python-executable", scripts / "python"]
    done = subprocess.run([*command, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = enumerate(PROGRAM.splitlines(), start=1)
    expected = {(str(number), match[1]) for number, line in lines if (match := re.search(r"# ([a-z-]+)$", line))}
    assert set(re.findall(r"^program\.py:(\d+): error: .* \[([a-z-]+)\]$", done.stdout, re.M)) == expected, done.stdout
    assert f"Found {len(expected)} errors in 1 file" in done.stdout


# The source distribution ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository() -> Path:
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a checkout: there is nothing to compare with")
    return ROOT


def test_sdist_holds_what_git_does(repository: Path, unpacked: Path) -> None:
    held = run("git", "ls-files", cwd=repository).splitlines()
    missing = {name for name in held if not (unpacked / name).exists()}
    assert {name for name in missing if not name.startswith(".")} == set()


def test_sdist_has_tests_that_can_all_be_collected(unpacked: Path) -> None:
    printed = run(sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", cwd=unpacked)
    assert {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")} <= set(
        re.findall(r"^(tests/\w+\.py)::", printed, re.M)
    )


def test_sdist_has_tests_that_pass(unpacked: Path) -> None:
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_declare.py", cwd=unpacked)


# The change log -------------------------------------------------------------------------------------------------------


def test_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\] - (Unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0][0] == tinyqueue.__version__


def test_changelog_has_the_sections_of_keep_a_changelog() -> None:
    sections = re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert sections
    assert set(sections) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
