"""What is written agrees with what runs: README, --help and the docstrings against the code."""

from __future__ import annotations

import ast
import configparser
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tinyqueue
import worker
import wsgi
from tinyqueue import STATUSES, Failure, Job
from tinyqueue_config import PLATFORMS, Settings

REPOSITORY = Path(tinyqueue.__file__).parent
TABLE = [(name, default) for name, default, _ in Settings.table()]
NONE = ("-", "", "none", "unset")  # how a table spells that there is no default


@pytest.fixture(scope="module")
def readme() -> str:
    return (REPOSITORY / "README.md").read_text()


def rows(readme: str) -> list[list[str]]:
    """The cells of all tables, without the marks of code."""
    lines = [line for line in readme.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["worker.py", "wsgi.py"])
def help(request: pytest.FixtureRequest) -> str:
    """What --help prints."""
    command = [sys.executable, str(REPOSITORY / request.param), "--help"]
    environ = {"PATH": os.environ["PATH"], "PORT": "garbage"}  # help must help when a setting is wrong, too
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=True).stdout


@pytest.mark.parametrize(("name", "default"), TABLE)
def test_help_lists_a_setting_with_its_default(help: str, name: str, default: str) -> None:
    [line] = re.findall(rf"^ +{name} +\S.*$", help, re.M)
    assert line.endswith(f" [{default}]") if default else not line.endswith("]")


@pytest.mark.parametrize(("name", "default"), TABLE)
def test_readme_lists_a_setting_with_its_default(readme: str, name: str, default: str) -> None:
    [row] = [row for row in rows(readme) if row[0] == name]
    assert row[1] == default if default else row[1].lower() in NONE
    assert row[2]


def test_readme_lists_no_setting_that_is_none(readme: str) -> None:
    """Other programs' variables, as SMTP_URL, stand outside the tables."""
    listed = {row[0] for row in rows(readme) if re.fullmatch("[A-Z][A-Z0-9_]+", row[0])}
    named = set(re.findall(r"\bTINYQUEUE_[A-Z_]*[A-Z]\b", readme))
    assert listed | named <= {name for name, _ in TABLE}


def test_readme_names_every_platform_that_must_have_a_redis(readme: str) -> None:
    assert [name for name in PLATFORMS.pattern.replace(".*", "*").split("|") if f"`{name}`" not in readme] == []


# HTTP -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), [(method, path) for method, path, *_ in wsgi.ROUTES])
def test_readme_lists_a_route(readme: str, method: str, path: str) -> None:
    assert f"{method} {path}" in [row[0] for row in rows(readme)]


def test_readme_lists_no_route_that_is_none(readme: str) -> None:
    listed = {row[0] for row in rows(readme) if re.match("[A-Z]+ /", row[0])}
    assert listed <= {f"{method} {path}" for method, path, *_ in wsgi.ROUTES}


def kinds_of_the_code() -> set[tuple[int, str]]:
    """Status and kind of every problem: of PROBLEMS, of each `Problem(...)` in the source, and of what Bottle refuses."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(wsgi))) if isinstance(node, ast.Call)]
    raised = {
        (call.args[0].value, call.args[1].value)
        for call in calls
        if isinstance(call.func, ast.Name)
        and call.func.id == "Problem"
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[1], ast.Constant)
    }
    bottle = {(404, "not-found"), (405, "method-not-allowed"), (500, "internal-server-error")}
    return {(status, kind) for _, status, kind in wsgi.PROBLEMS} | raised | bottle  # type: ignore[arg-type]


def kinds_of(readme: str) -> set[tuple[int, str]]:
    """Those of the README: a row has one status for all its kinds, or as many statuses as kinds."""
    found = set()
    for row in rows(readme):
        if re.fullmatch(r"\d{3}(, \d{3})*", row[0]):
            statuses, kinds = [int(status) for status in row[0].split(", ")], row[1].split(", ")
            statuses = statuses * len(kinds) if len(statuses) == 1 else statuses
            found |= set(zip(statuses, kinds, strict=True))
    return found


def test_readme_lists_every_kind_of_problem_with_its_status(readme: str) -> None:
    assert kinds_of(readme) == kinds_of_the_code()


def test_readme_names_every_field_that_a_client_may_send(readme: str) -> None:
    assert [name for name in wsgi.FIELDS if f"`{name}`" not in readme] == []


def test_readme_names_every_field_and_status_of_a_record(readme: str) -> None:
    whole = Job("0" * 36, "t", 1, "completed", 1, 1, "q", *[1] * 4, "w", 1.0, error=Failure("E", "m")).answer()
    assert [name for name in (*whole, *STATUSES) if f"`{name}`" not in readme] == []


# The rest of the README -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(worker.cli.commands))
def test_readme_shows_a_command(readme: str, name: str) -> None:
    assert re.search(rf"\b(worker\.py|tinyqueue) {name}\b", readme)


def test_readme_shows_no_command_that_is_none(readme: str) -> None:
    assert set(re.findall(r"\bworker\.py ([a-z]+)", readme)) <= set(worker.cli.commands)


HANDLER = inspect.signature(tinyqueue.handler).parameters
NUMBERS = {
    "MAX_JOBS": (r"up to ([\d,]+), all or none", tinyqueue.MAX_JOBS),
    "MAX_ATTEMPTS": (r"`maxAttempts` \(1 to ([\d,]+)\)", tinyqueue.MAX_ATTEMPTS),
    "MAX_DEPTH": (r"more than ([\d,]+) levels", tinyqueue.MAX_DEPTH),
    "MAX_RESULT": (r"at most ([\d,]+) bytes of JSON", tinyqueue.MAX_RESULT),
    "KEPT": (r"at most ([\d,]+) of each", tinyqueue.KEPT),
    "SERIES": (r"beyond ([\d,]+) types and queues", tinyqueue.SERIES),
    "lease": (r"longer than its lease \((\d+) s\)", Settings().lease),
    "shutdown_timeout": (r"lets handlers end for (\d+) s", Settings().shutdown_timeout),
    "timeout": (r"longer than `timeout` \((\d+) s", HANDLER["timeout"].default),
    "backoff": (r"`backoff=([\d.]+)`", HANDLER["backoff"].default),
    "backoff_cap": (r"`backoff_cap=([\d.]+)`", HANDLER["backoff_cap"].default),
    "web_connections": (r"web process opens up to (\d+) connections", Settings().web_connections),
    "worker_connections": (
        r"a worker (\d+) and one for each slot",
        Settings(worker_concurrency=1).worker_connections - 1,
    ),
    "most worker_connections": (r"but (\d+) at most", Settings(worker_concurrency=500).worker_connections),
    "exit code": (r"with (\d+) when it could not do its work", worker.EXIT_BROKEN),
}


@pytest.mark.parametrize(("words", "number"), NUMBERS.values(), ids=NUMBERS.keys())
def test_readme_gives_the_right_number(readme: str, words: str, number: float) -> None:
    found = re.findall(words, " ".join(readme.split()))
    assert found, "the README no longer says it in these words"
    assert {float(text.replace(",", "")) for text in found} == {number}


def test_readme_says_how_long_ended_jobs_stay(readme: str) -> None:
    assert (Settings().keep_completed, Settings().keep_failed) == (86400, 7 * 86400)
    assert "Completed jobs stay for a day, failed and cancelled ones for a week" in " ".join(readme.split())


def test_readme_is_short(readme: str) -> None:
    assert 150 <= len(readme.splitlines()) <= 350


def test_readme_names_no_package_registry(readme: str) -> None:
    hosts = r"pypi\.|pythonhosted|npmjs|crates\.io|rubygems|docker\.io|ghcr\.io|quay\.io|index-url|proxy\.golang|anaconda\.org"
    assert re.findall(hosts, readme, re.I) == []


def test_readme_links_to_files_that_exist(readme: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", readme)
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_readme_names_extras_and_python_as_setup_cfg_does(readme: str) -> None:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    assert set(re.findall(r"\.\[([a-z,]+)\]", readme)) <= setup["options.extras_require"].keys()
    assert f"Python {setup['options']['python_requires'].removeprefix('>=')} or newer" in readme


def test_setup_cfg_installs_every_file_that_the_web_process_reads() -> None:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    read = set(re.findall(r'_file\("(.+?)"\)', inspect.getsource(wsgi)))
    assert set(setup["options.package_data"]["tinyqueue"].split()) == read | {"worker.py", "wsgi.py"}
    assert all((REPOSITORY / name).exists() for name in read)


@pytest.mark.parametrize("language", ["sh", "python"])
def test_readme_shows_code_that_parses(readme: str, language: str) -> None:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", readme, re.M | re.S)
    assert blocks
    for block in blocks:
        if language == "python":
            ast.parse(block)
        else:
            subprocess.run(["sh", "-n"], input=block, text=True, check=True)


# Docstrings -----------------------------------------------------------------------------------------------------------


def test_tinyqueue_prints_a_table_of_contents_as_it_says(readme: str) -> None:
    [pattern] = re.findall(r"`grep '(.+)' tinyqueue.py`", str(tinyqueue.__doc__))
    assert f"`grep '{pattern}' tinyqueue.py`" in readme
    printed = subprocess.run(
        ["grep", pattern, "tinyqueue.py"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    lines = printed.splitlines()
    assert [line for line in lines if not re.fullmatch(r" *# [A-Z][^-]* -{10,}", line)] == []
    assert len(lines) > 7


@pytest.mark.parametrize("module", [tinyqueue, worker, wsgi], ids=lambda module: module.__name__)
def test_sections_of_a_module_have_names_of_their_own(module: object) -> None:
    titles = re.findall(r"^ *# ([^-\n]+) -{10,}$", inspect.getsource(module), re.M)  # type: ignore[arg-type]
    assert len(titles) == len(set(titles)) > 2


def test_tinyqueue_lists_every_family_of_keys() -> None:
    keys = tinyqueue.Keys("queue")
    named = [*vars(keys).values(), *keys.ended.values()]
    families = {family("") if callable(family) else family for family in named if family is not keys.ended} - {
        keys.prefix
    }
    assert len(families) > 20
    assert families - set(re.findall(r"\{queue\}:[a-z]+:?", str(tinyqueue.__doc__))) == set()


def test_tinyqueue_lists_every_verb_that_moves_a_job() -> None:
    for verb in ("enqueue", "take", "start", "complete", "fail", "release", "promote", "reap", "cancel", "retry"):
        assert re.search(rf"^    {verb} ", str(tinyqueue.__doc__), re.M)
        assert callable(getattr(tinyqueue.Queue, verb))


def test_help_shows_every_command() -> None:
    shown = subprocess.run(
        [sys.executable, "worker.py", "--help"], cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=True
    ).stdout
    assert [name for name in worker.cli.commands if not re.search(rf"^  {name} +[A-Z]", shown, re.M)] == []
