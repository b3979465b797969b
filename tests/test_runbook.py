"""The runbook and the other pages for operators: every entry, command and test that they name exists."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import redis
from client import Client
from conftest import RedisServer

import tinyqueue
import tinyqueue_doctor
import tinyqueue_repair
import worker
from tinyqueue import Queue
from tinyqueue_config import Settings
from wsgi import API

REPOSITORY = Path(tinyqueue.__file__).parent
OPERATIONS = (REPOSITORY / "docs" / "operations.md").read_text()
DEPLOY = (REPOSITORY / "docs" / "deploy.md").read_text()
SECURITY = (REPOSITORY / "docs" / "security.md").read_text()
ALERTS = re.findall(r"- alert: (\w+)", (REPOSITORY / "deploy" / "alerts.yml").read_text())
INCIDENTS = [
    *("Redis is full", "Redis is lost", "Failover", "Backlog", "Poison job", "Stuck handler", "Leaked key"),
    *("Restore after a loss", "Bad deploy"),
]
PARTS = ["Meaning", "First look", "Fix", "Prevention"]


def section(title: str) -> str:
    """The text below a heading, up to the next heading of its level or above."""
    [(level, text)] = re.findall(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#|\Z)", OPERATIONS, re.M | re.S)
    below = OPERATIONS.partition(f"{level} {title}\n")[2]
    end = re.search(rf"^#{{2,{len(level)}}} ", below, re.M)
    return below[: end.start()] if end else str(text)


def spans(text: str, program: str) -> list[str]:
    """The commands in a text that begin with a program, in one line each."""
    found = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`", text)]
    return [span for span in dict.fromkeys(found) if span.startswith(f"{program} ")]


RUNBOOK = section("Runbook")


# Entries --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", [*ALERTS, *INCIDENTS])
def test_runbook_says_what_to_do(title: str) -> None:
    text = section(title)
    assert re.findall(r"^\* \*\*(.+?)\.\*\* \S", text, re.M) == PARTS
    look = text.partition("**First look.**")[2].partition("**Fix.**")[0]
    assert "`" in look


def test_runbook_explains_every_alert_and_no_other() -> None:
    assert len(ALERTS) > 5
    assert re.findall("^#### (.+)$", section("When an alert fires"), re.M) == ALERTS


def test_alerts_name_their_entries() -> None:
    text = (REPOSITORY / "deploy" / "alerts.yml").read_text()
    named = re.findall(r"- alert: (\w+)\n.*?runbook: docs/operations\.md#(\w+)\n", text, re.S)
    assert named == [(alert, alert.lower()) for alert in ALERTS]


def kinds_of_findings() -> set[str]:
    """What `_judge` and `Finding` are called with, and the names of the checks that may fail."""
    tree = ast.parse(
        inspect.getsource(tinyqueue_doctor) + inspect.getsource(tinyqueue_repair).partition("annotations")[2]
    )
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    places = {"_judge": 0, "Finding": 1}
    named = [call.args[places[call.func.id]] for call in calls if call.func.id in places]  # type: ignore[attr-defined]
    checks = [
        *(
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "checks"
        )
    ]
    named += [key for check in checks for key in check.keys]  # type: ignore[union-attr]
    return {node.value for node in named if isinstance(node, ast.Constant)}


def test_runbook_explains_every_finding_of_doctor_and_no_other() -> None:
    rows = [line.strip("|").split("|") for line in section("When doctor warns").splitlines() if line.startswith("|")]
    entries = {row[0].strip(" `"): row for row in rows[2:]}
    assert kinds_of_findings() == entries.keys()
    assert len(entries) > 12
    assert [name for name, row in entries.items() if len(row) != 1 + len(PARTS) or not all(map(str.strip, row))] == []


def test_doctor_finds_nothing_that_the_runbook_does_not_explain(start_redis: Callable[..., RedisServer]) -> None:
    queue = Queue.from_url(start_redis().url)
    assert {finding.about for finding in tinyqueue_doctor.examine(queue, 1)} <= kinds_of_findings()
    queue.pool.disconnect()


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", spans(RUNBOOK, "tinyqueue"))
def test_runbook_shows_commands_that_exist_with_their_options(command: str) -> None:
    _, name, *arguments = shlex.split(command)
    numbers = {"N": "50", "SECONDS": "0.4", "BYTES": "2000"}
    context = click.Context(worker.cli)
    worker.cli.commands[name].make_context(name, [numbers.get(word, word) for word in arguments], parent=context)


@pytest.fixture(scope="module")
def changeable(start_redis: Callable[..., RedisServer]) -> Iterator[redis.Redis]:
    """A server that the commands may change."""
    client = redis.Redis.from_url(start_redis("--appendonly", "yes").url)
    client.execute_command("ACL", "SETUSER", "NAME", ">OLD")
    yield client
    client.close()


@pytest.mark.parametrize("command", [text for text in spans(RUNBOOK, "redis-cli") if not re.search("-u |SET$", text)])
def test_runbook_shows_commands_that_redis_runs(changeable: redis.Redis, command: str) -> None:
    changeable.execute_command(*shlex.split(command)[1:])  # raises what Redis replies to one that it does not know


def test_runbook_shows_commands_of_both_kinds() -> None:
    assert len(spans(RUNBOOK, "tinyqueue")) > 20
    assert len(spans(RUNBOOK, "redis-cli")) > 10


# A leaked key ---------------------------------------------------------------------------------------------------------

OLD, NEW = "o" * 20, "n" * 20


@pytest.fixture
def echo(no_handlers: None) -> None:
    @tinyqueue.handler("echo")
    def echo(payload: int) -> int:
        return payload


def statuses(queue: Queue, keys: str, *secrets: str) -> list[int]:
    """Submit a job with each secret to a web process with these keys, under one Idempotency-Key."""
    api = API(Settings(api_keys=keys), queue)
    again = {"Idempotency-Key": "order-17"}
    return [
        Client(api, secret).call("POST", "/jobs", {"type": "echo", "payload": 1}, again).status for secret in secrets
    ]


@pytest.mark.usefixtures("echo")
def test_rotation_of_a_key_refuses_no_client_while_both_secrets_are_set(queue: Queue) -> None:
    assert statuses(queue, f"app:submit:{OLD}", OLD) == [201]
    assert statuses(queue, f"app:submit:{OLD},app-2:submit:{NEW}", OLD, NEW) == [200, 201]
    assert statuses(queue, f"app-2:submit:{NEW}", OLD, NEW) == [401, 200]


@pytest.mark.usefixtures("echo")
def test_rotation_of_a_key_does_not_take_its_idempotency_keys_along(queue: Queue) -> None:
    statuses(queue, f"app:submit:{OLD},app-2:submit:{NEW}", OLD, OLD, NEW, NEW)
    assert queue.stats()["pending"] == 2
    assert "submits its jobs a second time" in " ".join(section("Leaked key").split())


# Security -------------------------------------------------------------------------------------------------------------


def defined_tests() -> set[str]:
    text = "\n".join(path.read_text() for path in (REPOSITORY / "tests").glob("test_*.py"))
    return set(re.findall(r"^def (test_\w+)\(", text, re.M))


def test_security_page_names_only_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", SECURITY))
    assert len(named) > 40
    assert named - defined_tests() == set()


def test_security_page_names_a_test_for_every_defence() -> None:
    lines = SECURITY.partition("## What is defended")[2].partition("## What is not")[0].splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")][2:]
    assert len(rows) > 15
    assert [row[0] for row in rows if len(row) != 3 or "`test_" not in row[2]] == []


MODULES = sorted(path.name for path in REPOSITORY.glob("*.py") if path.name != "setup.py")


@pytest.mark.parametrize("name", MODULES)
def test_code_neither_unpickles_nor_evaluates(name: str) -> None:
    tree = ast.parse((REPOSITORY / name).read_text())
    imported = {
        alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    } | {str(node.module).partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert imported & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml"} == set()
    assert called & {"eval", "exec", "compile", "__import__"} == set()


def test_contributing_page_lists_every_module() -> None:
    listed = set(re.findall(r"\b[a-z_]+\.py\b", (REPOSITORY / "CONTRIBUTING.md").read_text().partition("## Style")[0]))
    assert set(MODULES) <= listed


# The production checklist ---------------------------------------------------------------------------------------------

NEEDS = [
    *("Redis persistence", "Redis authentication", "Memory limits", "TLS", "Log aggregation", "Monitoring", "Alerts"),
    *("Rate limiting", "API authentication", "Backups", "Autoscaling", "Incident procedures"),
]
CHECKLIST = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in DEPLOY.partition("## Production checklist\n")[2].partition("\n## ")[0].splitlines()
    if line.startswith("|")
][2:]
each_need = pytest.mark.parametrize(("need", "where", "shown"), CHECKLIST, ids=[row[0] for row in CHECKLIST])


def test_checklist_has_every_need() -> None:
    assert [row[0] for row in CHECKLIST] == NEEDS


def values_in_files(text: str) -> list[tuple[str, str]]:
    """Each code that follows the link to a file, with the name of the file."""
    found = []
    for part in text.split("; "):
        files = re.findall(r"\]\(\.\./([^)#]+)\)", part)
        codes = re.findall(r"`([^`]+)`", part.partition("): ")[2])
        found += [(file, code) for file in files for code in codes]
    return found


@each_need
def test_checklist_names_values_that_the_files_set(need: str, where: str, shown: str) -> None:
    for file, value in values_in_files(where):
        assert value in (REPOSITORY / file).read_text(), f"{file} does not have {value}"
    assert values_in_files(where)


@each_need
def test_checklist_names_tests_and_findings_that_exist(need: str, where: str, shown: str) -> None:
    codes = re.findall(r"`([^`]+)`", shown)
    tests = {code for code in codes if code.startswith("test_")}
    findings = set(re.findall(r"`([^`]+)`", shown.partition("`doctor`: ")[2].partition(";")[0]))
    assert tests - defined_tests() == set()
    assert findings - kinds_of_findings() == set()
    assert codes
