"""What is written agrees with what runs: README, docs/, --help and the docstrings against the code."""

from __future__ import annotations

import ast
import configparser
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from conftest import Server, free_port, until

import tinyqueue
import tinyqueue_access
import tinyqueue_config
import tinyqueue_events
import tinyqueue_http
import tinyqueue_json
import tinyqueue_metrics
import tinyqueue_plan
import tinyqueue_problems
import tinyqueue_request
import tinyqueue_schedule
import tinyqueue_server
import tinyqueue_work
import worker
import wsgi
from tinyqueue import STATUSES, Failure, Job
from tinyqueue_config import PLATFORMS, Settings
from tinyqueue_job import SHOWN, SHOWN_IF_SET

REPOSITORY = Path(tinyqueue.__file__).parent
TABLE = [(name, default) for name, default, _ in Settings.table()]
DOCUMENTS = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text()
    for path in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md")))
}
README, HTTP, OPERATIONS = DOCUMENTS["README.md"], DOCUMENTS["docs/http.md"], DOCUMENTS["docs/operations.md"]
SETTINGS, DEPLOY = DOCUMENTS["docs/settings.md"], DOCUMENTS["docs/deploy.md"]
SCHEDULES = DOCUMENTS["docs/schedules.md"]
WEBHOOKS = DOCUMENTS["docs/webhooks.md"]
EVERYTHING = "\n".join(DOCUMENTS.values())
each_document = pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS.keys())


def rows(document: str) -> list[list[str]]:
    """The cells of all tables, without the marks of code."""
    lines = [line for line in document.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


def section(document: str, title: str) -> str:
    """The text below a heading, up to the next heading of the same level."""
    [text] = re.findall(rf"^(#+) {re.escape(title)}$\n(.*?)(?=^\1 |\Z)", document, re.M | re.S)
    return str(text[1])


def blocks(document: str, language: str) -> list[str]:
    """The code blocks in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document, re.M | re.S)


def in_one_line(document: str) -> str:
    return " ".join(document.split())


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


def test_settings_page_lists_every_setting_with_default_and_meaning() -> None:
    listed = [row for row in rows(SETTINGS) if re.fullmatch("[A-Z][A-Z0-9_]+", row[0])]
    assert listed == [[name, default or "-", meaning] for name, default, meaning in Settings.table()]


@each_document
def test_documents_name_no_unknown_setting(document: str) -> None:
    named = set(re.findall(r"\bTINYQUEUE_[A-Z_]*[A-Z]\b", document))
    assert named <= {name for name, _ in TABLE}


def test_settings_page_names_every_variable_of_the_handlers() -> None:
    [listed] = re.findall(
        r"^Environment of .*?\n\n(.*?)\n\"\"\"", (REPOSITORY / "handlers.py").read_text(), re.M | re.S
    )
    names = re.findall(r"^ +([A-Z_]+) ", listed, re.M)
    assert len(names) > 3
    assert [name for name in names if f"`{name}`" not in SETTINGS] == []


def test_settings_page_names_every_platform_that_requires_a_redis() -> None:
    assert [name for name in PLATFORMS.pattern.replace(".*", "*").split("|") if f"`{name}`" not in SETTINGS] == []


# HTTP -----------------------------------------------------------------------------------------------------------------


def test_http_page_lists_every_route_with_its_role() -> None:
    listed = [row[:2] for row in rows(HTTP) if re.match("[A-Z]+ /", row[0])]
    roles = {"": "none", "page": "none; without keys, local requests only"}
    assert sorted(listed) == sorted(
        [f"{method} {path}", roles.get(role, role)] for method, path, _, role in wsgi.ROUTES
    )


def kinds_of_the_code() -> set[tuple[int, str]]:
    """Status and kind of every problem: in PROBLEMS, in each `Problem(...)` of the source, and of Bottle's own."""
    modules = (tinyqueue_access, tinyqueue_problems, tinyqueue_request, tinyqueue_work, wsgi)
    trees = [ast.parse(inspect.getsource(module)) for module in modules]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    raised = {
        (call.args[0].value, call.args[1].value)
        for call in calls
        if isinstance(call.func, ast.Name)
        and call.func.id == "Problem"
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[1], ast.Constant)
    }
    bottle = {(404, "not-found"), (405, "method-not-allowed"), (500, "internal-server-error")}
    of_the_queue = {(status, kind) for _, status, kind in tinyqueue_problems.PROBLEMS}
    return of_the_queue | raised | bottle  # type: ignore[arg-type]


def kinds_of(document: str) -> set[tuple[int, str]]:
    """Those of a table: a row has one status for all its kinds, or as many statuses as kinds."""
    found = set()
    for row in rows(document):
        if re.fullmatch(r"\d{3}(, \d{3})*", row[0]):
            statuses, kinds = [int(status) for status in row[0].split(", ")], row[1].split(", ")
            statuses = statuses * len(kinds) if len(statuses) == 1 else statuses
            found |= set(zip(statuses, kinds, strict=True))
    return found


def test_http_page_lists_every_kind_of_problem_with_its_status() -> None:
    assert kinds_of(HTTP) == kinds_of_the_code()


def test_http_page_lists_every_field_that_a_client_may_send() -> None:
    assert [row[0] for row in rows(section(HTTP, "Submit jobs"))[2:]] == list(wsgi.FIELDS)


def test_schedules_page_names_every_field_of_a_schedule() -> None:
    names = {*wsgi.SCHEDULE_FIELDS, *tinyqueue_schedule.make_schedule("a", "@daily", "t", 1).answer(0, None)}
    assert [name for name in names if f"`{name}`" not in section(SCHEDULES, "Manage schedules")] == []


@pytest.mark.parametrize("title", ["List jobs", "Change many jobs"])
def test_http_page_names_every_filter(title: str) -> None:
    text = section(HTTP, title)
    assert [name for name in (*wsgi.FILTERS, "cursor") if f"`{name}`" not in text] == []


def test_http_page_names_every_field_and_status_of_a_record() -> None:
    text = section(HTTP, "The job")
    whole = Job("0" * 36, "t", 1, "completed", 1, 1, "q", *[1] * 4, "w", 1.0, error=Failure("E", "m")).answer()
    names = {*whole, *SHOWN, *SHOWN_IF_SET, *STATUSES}
    assert [name for name in names if f"`{name}`" not in text] == []


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(worker.cli.commands))
def test_operations_page_shows_a_command(name: str) -> None:
    assert re.search(rf"\b(worker\.py|tinyqueue) {name}\b", OPERATIONS)


@each_document
def test_documents_show_no_unknown_command(document: str) -> None:
    assert set(re.findall(r"\bworker\.py ([a-z]+)", document)) <= set(worker.cli.commands)


@pytest.mark.parametrize(
    "row", [row for row in rows(OPERATIONS) if row[0].startswith("worker.py ")], ids=lambda row: row[0]
)
def test_operations_page_shows_only_options_that_a_command_has(row: list[str]) -> None:
    command = worker.cli.commands[row[0].split()[1]]
    options = {option for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", " ".join(row))) <= options


@pytest.mark.parametrize("name", ["enqueue", "list"])
def test_operations_page_shows_every_option_of_a_command(name: str) -> None:
    [row] = [row for row in rows(OPERATIONS) if row[0].split()[:2] == ["worker.py", name]]
    options = {option for parameter in worker.cli.commands[name].params for option in parameter.opts if "--" in option}
    assert options - set(re.findall(r"--[a-z-]+", row[1])) <= {"--json"}


def test_operations_page_lists_every_metric_with_its_labels() -> None:
    listed = [[row[0], row[1].replace(",", "")] for row in rows(OPERATIONS) if row[0].startswith("tinyqueue_")]
    suffix = {"counter": "_total"}
    assert listed == [[f"tinyqueue_{name}{suffix.get(kind, '')}", labels] for name, kind, labels, _ in in_order(listed)]


def in_order(listed: list[list[str]]) -> list[tuple[str, str, str, str]]:
    """The metrics of the code, all of them, in the order of a list."""
    names = [row[0].removesuffix("_total") for row in listed]
    return sorted(tinyqueue_metrics.METRICS, key=lambda metric: names.index(f"tinyqueue_{metric[0]}"))


# Numbers --------------------------------------------------------------------------------------------------------------

HANDLER = inspect.signature(tinyqueue.handler).parameters
NUMBERS = {
    "MAX_JOBS in Python": (README, r"up to ([\d,]+), all or none", tinyqueue.MAX_JOBS),
    "MAX_JOBS in HTTP": (HTTP, r"Submits up to ([\d,]+) jobs", tinyqueue.MAX_JOBS),
    "MAX_ATTEMPTS": (HTTP, r"maximum number of attempts, 1 to ([\d,]+)", tinyqueue.MAX_ATTEMPTS),
    "MAX_DELAY": (HTTP, r"may start, up to (\d+) days", tinyqueue.MAX_DELAY / 86400),
    "MAX_DEPTH": (HTTP, r"more than ([\d,]+) levels", tinyqueue_json.MAX_DEPTH),
    "MAX_RESULT": (README, r"at most ([\d,]+) bytes of JSON", tinyqueue.MAX_RESULT),
    "MAX_REFUNDS": (README, r"attempt refunded, at most (ten) times", tinyqueue.MAX_REFUNDS),
    "SCANNED": (HTTP, r"looks at up to ([\d,]+) jobs", tinyqueue.SCANNED),
    "PAGE_BYTES": (HTTP, r"([\d,]+) MB of their data", tinyqueue.PAGE_BYTES >> 20),
    "PREVIEW_BYTES": (HTTP, r"longer than ([\d,]+) bytes are cut", wsgi.PREVIEW_BYTES),
    "LONGEST_WAIT": (HTTP, r"has ended, after at most (\d+) seconds", wsgi.LONGEST_WAIT),
    "LISTENERS": (HTTP, r"sends it to up to (\d+) listeners", tinyqueue_events.LISTENERS),
    "time to read an event": (HTTP, r"longer than (\d+) seconds to read an event", tinyqueue_server.PATIENCE),
    "CONNECTIONS": (HTTP, r"serves ([\d,]+) connections at a time", tinyqueue_server.CONNECTIONS),
    "time to send": (HTTP, r"has (\d+) seconds to send a request", tinyqueue_server.CLIENT_TIMES[1]),
    "time to read": (HTTP, r"and (\d+) seconds to read the answer", tinyqueue_server.CLIENT_TIMES[1]),
    "time to idle": (HTTP, r"may be idle for (\d+) seconds", tinyqueue_server.CLIENT_TIMES[0]),
    "crowd": (HTTP, r"While more than ([\d,]+) connections are open", tinyqueue_server.CROWD),
    "time in a crowd": (HTTP, r"these times are (\d+), \d+ and", tinyqueue_server.CROWDED_TIMES[1]),
    "time to idle in a crowd": (HTTP, r"these times are \d+, \d+ and (\d+) s", tinyqueue_server.CROWDED_TIMES[0]),
    "time to idle at the end": (HTTP, r"without a request is closed after (\d+) s", tinyqueue_server.DRAIN_TIMES[0]),
    "time at the end": (HTTP, r"never a pause of more than (\d+) seconds", tinyqueue_server.DRAIN_TIMES[1]),
    "wrong keys": (HTTP, r"or to (\d+) in a minute", tinyqueue_access.WRONG_KEYS[0]),
    "waiting elsewhere": (HTTP, r"let (\d+) requests wait", tinyqueue_config.WEB_THREADS / 2),
    "MAX_QUEUES": (OPERATIONS, r"There can be ([\d,]+) queues", tinyqueue.MAX_QUEUES),
    "MAX_QUEUES in HTTP": (HTTP, r"there are ([\d,]+) queues already", tinyqueue.MAX_QUEUES),
    "KEPT_QUEUES": (OPERATIONS, r"When there are more than (\d+), those without jobs", tinyqueue.KEPT_QUEUES),
    "KEPT": (OPERATIONS, r"at most ([\d,]+) of each", tinyqueue.KEPT),
    "MEMORY_SHARE": (OPERATIONS, r"has used (\d+) % of its `maxmemory`", 100 * tinyqueue.MEMORY_SHARE),
    "SERIES": (OPERATIONS, r"The first ([\d,]+) pairs of type and queue", tinyqueue.SERIES),
    "lease": (README, r"longer than its lease \((\d+) s\)", Settings().lease),
    "shutdown_timeout": (README, r"gives running handlers up to (\d+) s", Settings().shutdown_timeout),
    "grace": (DEPLOY, r"needs up to (\d+) seconds", Settings().shutdown_timeout + worker.LAST_WRITE + worker.CLOSING),
    "worker_concurrency": (README, r"runs up to (\d+) jobs at a time", Settings().worker_concurrency),
    "timeout": (README, r"longer than `timeout` \((\d+) s", HANDLER["timeout"].default),
    "backoff": (README, r"`backoff=([\d.]+)`", HANDLER["backoff"].default),
    "backoff_cap": (README, r"`backoff_cap=([\d.]+)`", HANDLER["backoff_cap"].default),
    "web_connections": (DEPLOY, r"web process opens up to (\d+) connections", Settings().web_connections),
    "worker_connections": (
        DEPLOY,
        r"worker opens (\d+) and one more for each slot",
        Settings(worker_concurrency=1).worker_connections - 1,
    ),
    "most worker_connections": (
        DEPLOY,
        r"but never more than (\d+)",
        Settings(worker_concurrency=500).worker_connections,
    ),
    "BUSY": (OPERATIONS, r"At most (\d+) % are busy on average", 100 * tinyqueue_plan.BUSY),
    "FULL": (OPERATIONS, r"so that (\d+) % of it are used then", 100 * tinyqueue_plan.FULL),
    "REDIS_COST": (OPERATIONS, r"Redis, for each job \| ([\d.]+) ms", 1e3 * tinyqueue_plan.REDIS_COST[0]),
    "WORKER_COST": (OPERATIONS, r"without the handler \| ([\d.]+) ms", 1e3 * tinyqueue_plan.WORKER_COST[0]),
    "WEB_COST": (OPERATIONS, r"for each submit \| ([\d.]+) ms", 1e3 * tinyqueue_plan.WEB_COST[0]),
    "ENTRY": (OPERATIONS, r"of a pending job \| (\d+) bytes", tinyqueue_plan.ENTRY[0]),
    "ENTRY of an ended job": (OPERATIONS, r"of an ended job \| (\d+) bytes", tinyqueue_plan.ENTRY[1]),
    "RECORD": (OPERATIONS, r"the payload and (\d+) bytes", tinyqueue_plan.RECORD[0]),
    "RECORD of an ended job": (OPERATIONS, r"the result and (\d+) bytes", tinyqueue_plan.RECORD[1]),
    "TRACEBACK": (OPERATIONS, r"error of a failed job \| (\d+) bytes", tinyqueue_plan.TRACEBACK),
    "ONCE": (OPERATIONS, r"idempotency key \| (\d+) bytes", tinyqueue_plan.ONCE),
    "catchup": (SCHEDULES, r"([\d]+) by default and at most", tinyqueue_schedule.Schedule("", "", "", None).catchup),
    "MAX_CATCHUP": (SCHEDULES, r"by default and at most (\d+)", tinyqueue_schedule.MAX_CATCHUP),
    "GRACE": (SCHEDULES, r"may always be late by (\d+) seconds", tinyqueue_schedule.GRACE),
    "RETRY": (SCHEDULES, r"tried again every (\d+) seconds", tinyqueue_schedule.RETRY / 1000),
    "RELEASES": (SCHEDULES, r"order of the last (\d+) releases", tinyqueue_schedule.RELEASES),
    "ABSENT": (SCHEDULES, r"was seen for (\d+) seconds", tinyqueue_schedule.ABSENT),
    "MAX_SCHEDULES": (SCHEDULES, r"accepts up to (\d+) schedules", tinyqueue_schedule.MAX_SCHEDULES),
    "SECONDS of a request": (WEBHOOKS, r"does not answer within (\d+) s", tinyqueue_http.SECONDS),
    "KEPT of an answer": (WEBHOOKS, r"A worker reads (\d+) bytes of the answer", tinyqueue_http.KEPT),
    "JITTER of deliveries": (WEBHOOKS, r"or up to (\d+) % later", 100 * tinyqueue_http.JITTER),
    "FAILURES in a row": (WEBHOOKS, r"has failed (\d+) times in a row", tinyqueue_http.FAILURES),
    "AT_ONCE to a receiver": (WEBHOOKS, r"gets (\d+) deliveries at a time", tinyqueue_http.AT_ONCE),
    "PAUSE of a circuit": (WEBHOOKS, r"one delivery every (\d+) s", tinyqueue_http.PAUSE),
    "ATTEMPTS of an http job": (WEBHOOKS, r"has (\d+) attempts unless", tinyqueue_http.ATTEMPTS),
    "BACKOFF of an http job": (WEBHOOKS, r"next one follows after (\d+) s", tinyqueue_http.BACKOFF),
    "MAX_RESULT of an http job": (WEBHOOKS, r"at most ([\d,]+) bytes: as JSON", tinyqueue.MAX_RESULT),
    "exit code": (OPERATIONS, r"(\d+) when it could not do its work", worker.EXIT_BROKEN),
}


@pytest.mark.parametrize(("document", "words", "number"), NUMBERS.values(), ids=NUMBERS.keys())
def test_documents_give_the_right_number(document: str, words: str, number: float) -> None:
    found = re.findall(words, in_one_line(document))
    assert found, "the document no longer says it in these words"
    assert {float(text.replace(",", "").replace("ten", "10")) for text in found} == {number}


def test_webhooks_page_lists_the_wait_before_each_delivery() -> None:
    [listed] = re.findall(r"sent again ([\w ,]+) and (\d+ h) after", in_one_line(WEBHOOKS))
    units = {"s": 1, "min": 60, "h": 3600}
    waits = [text.split() for text in ", ".join(listed).split(", ")]
    assert [int(number) * units[unit] for number, unit in waits] == list(tinyqueue_http.WAITS)


def test_webhooks_page_lists_every_field_of_an_http_job() -> None:
    fields = [row[0] for row in rows(section(WEBHOOKS, "HTTP jobs")) if row[0].isidentifier()]
    assert fields[1:] == [field.name for field in msgspec.structs.fields(tinyqueue_http.Request)]


def test_operations_page_says_how_long_ended_jobs_stay() -> None:
    assert (Settings().keep_completed, Settings().keep_failed) == (86400, 7 * 86400)
    assert "Completed jobs are kept for a day, failed and cancelled ones for a week" in in_one_line(OPERATIONS)


def test_http_page_says_how_long_keys_are_remembered() -> None:
    assert Settings().keep_once == 86400
    assert "The server remembers keys for a day" in in_one_line(HTTP)


# The documents themselves ---------------------------------------------------------------------------------------------


def test_readme_is_short() -> None:
    assert 150 <= len(README.splitlines()) <= 220


@each_document
def test_documents_name_no_package_registry(document: str) -> None:
    hosts = r"pypi\.|pythonhosted|npmjs|crates\.io|rubygems|docker\.io|ghcr\.io|quay\.io|proxy\.golang|anaconda\.org"
    assert re.findall(rf"{hosts}|index-url", document, re.I) == []


def anchors(document: str) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", document, flags=re.M | re.S)
    titles = [title.lower() for title in re.findall(r"^#+ (.+)$", text, re.M)]
    return {re.sub(r"[^a-z0-9 _-]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_link_to_files_and_headings_that_exist(name: str) -> None:
    links = re.findall(r"\]\(([^):]+)\)", DOCUMENTS[name])
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        target = (REPOSITORY / name).parent / file if file else REPOSITORY / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_readme_links_to_every_document() -> None:
    assert [name for name in DOCUMENTS if f"]({name})" not in README] == ["README.md"]


def test_readme_shows_a_small_image_with_a_description() -> None:
    [(text, name)] = re.findall(r"!\[(.*?)\]\((.+?)\)", README)
    assert len(text) > 40
    assert (REPOSITORY / name).stat().st_size <= 150_000


@each_document
def test_documents_name_extras_as_setup_cfg_does(document: str) -> None:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    assert set(re.findall(r"\.\[([a-z,]+)\]", document)) <= setup["options.extras_require"].keys()


def test_readme_names_python_as_setup_cfg_does() -> None:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    assert f"Python {setup['options']['python_requires'].removeprefix('>=')} or newer" in README


def test_setup_cfg_installs_every_file_that_the_web_process_reads() -> None:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    read = set(re.findall(r'_file\("(.+?)"\)', inspect.getsource(wsgi)))
    assert set(setup["options.package_data"]["tinyqueue"].split()) == read | {"worker.py", "wsgi.py"}
    assert all((REPOSITORY / name).exists() for name in read)


@each_document
def test_documents_show_code_that_parses(document: str) -> None:
    for block in blocks(document, "python"):
        ast.parse(block)
    for block in blocks(document, "sh"):
        subprocess.run(["sh", "-n"], input=block, text=True, check=True)


def test_documents_have_code_of_both_kinds() -> None:
    assert len(blocks(EVERYTHING, "python")) > 1
    assert len(blocks(EVERYTHING, "sh")) > 10


# The commands, run as they are written --------------------------------------------------------------------------------

READY = {"web": "web (and a worker |on http)", "worker": "worker started", "honcho": "worker started"}


class Checkout(NamedTuple):
    """A copy of the repository with a virtual environment that is not activated. It has ports of its own."""

    folder: Path
    web: int
    redis: str

    def as_here(self, script: str) -> str:
        return script.replace("localhost:3000", f"localhost:{self.web}").replace("redis://localhost:6379/0", self.redis)

    def environ(self, more: dict[str, str]) -> dict[str, str]:
        inside = Path(sys.prefix).resolve()
        path = [part for part in os.environ["PATH"].split(":") if not Path(part).resolve().is_relative_to(inside)]
        return {"PATH": ":".join(path), "HOME": str(self.folder), "PORT": str(self.web)} | more

    def declare_charge(self) -> None:
        """Add the README's handler to handlers.py."""
        with (self.folder / "handlers.py").open("a") as handlers:
            handlers.write(blocks(README, "python")[0])

    def run(self, script: str, shell: str = "sh", **environ: str) -> str:
        """Run a block until it ends, which it must without an error, and return what it prints."""
        command = [shell, "-e", "-c", self.as_here(script)]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environ(environ),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextmanager
    def running(self, script: str, ready: str, stopped: str = "", **environ: str) -> Iterator[None]:
        """Run a block in the background. It is up when it logs `ready`, and must end at SIGTERM."""
        log = self.folder / f"{ready[:6].strip()}-{free_port()}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["sh", "-e", "-c", self.as_here(script)],
                cwd=self.folder,
                env=self.environ(environ),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            until(lambda: re.search(ready, log.read_text()) or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)
            until(lambda: stopped in log.read_text())


@pytest.fixture
def checkout(tmp_path: Path, real: Server) -> Checkout:
    for path in REPOSITORY.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return Checkout(tmp_path, free_port(), real.url)


def block(document: str, words: str) -> str:
    """The one block with these words."""
    [found] = [block for block in blocks(document, "sh") if words in block]
    return found


def session(document: str) -> str:
    """All blocks with curl that belong together: those of the document's first section that has any."""
    parts = re.split(r"^##? ", document, flags=re.M)
    return "".join(next(filter(None, (blocks(part, "sh") for part in parts if "\ncurl " in part))))


START = block(README, "install -q .").rpartition("&&")[2]


def test_readme_session_runs_as_written(checkout: Checkout) -> None:
    with checkout.running(START, "and a worker with"):
        said = checkout.run(session(README))
    assert said.startswith("HTTP/1.1 201 Created")
    assert '"status":"completed","attempts":1,"maxAttempts":3' in said
    assert '"note":"SMTP_URL is not set"' in said
    assert '"completed":1,"failed":0,"cancelled":0' in said


def test_readme_handler_takes_jobs_as_written(checkout: Checkout) -> None:
    checkout.declare_charge()
    with checkout.running(START, "and a worker with"):
        said = checkout.run(block(README, '"charge"'))
    right, wrong = map(json.loads, said.replace("}{", "}\n{").splitlines())
    assert right["status"] == "pending"
    assert (wrong["status"], wrong["detail"]) == (422, "payload.cents: Expected `int`, got `str`")
    assert wrong["detail"] in README


def test_http_session_runs_as_written(checkout: Checkout) -> None:
    with checkout.running(START, "and a worker with"):
        said = checkout.run(session(HTTP))
    assert re.findall(r'"type":"(urn:tinyqueue:.+?)"', said) == ["urn:tinyqueue:wrong-status"]
    assert said.count('"jobId"') == 4
    assert said.endswith('{"retried":0,"skipped":0,"cursor":null}')


def test_schedules_session_runs_as_written(checkout: Checkout) -> None:
    with (checkout.folder / "handlers.py").open("a") as handlers:
        handlers.write(blocks(SCHEDULES, "python")[0])
    with checkout.running(START, "and a worker with"):
        until(lambda: '"nightly"' in checkout.run("curl -s localhost:3000/schedules"))
        said = checkout.run(block(SCHEDULES, "curl -X PUT"))
    made, listed, run, removed = map(json.loads, said.replace("}{", "}\n{").splitlines())
    assert {found["name"]: found["source"] for found in listed["schedules"]} == {
        "cleanup": "api",
        "nightly": "code",
        "report": "code",
    }
    assert (made["timezone"], run["status"], removed["name"]) == ("Europe/Berlin", "pending", "cleanup")
    assert "no schedules" in checkout.run(block(SCHEDULES, "worker.py schedules"), REDIS_URL=checkout.redis)


def test_http_key_lets_in_as_written(checkout: Checkout) -> None:
    assignment, start = block(HTTP, "export TINYQUEUE_API_KEYS").splitlines()
    keys = checkout.run(f'{assignment}\nprintf %s "$TINYQUEUE_API_KEYS"')
    with checkout.running(start, "and a worker with", TINYQUEUE_API_KEYS=keys):
        assert '"pending":0' in checkout.run(block(HTTP, "Bearer"), TINYQUEUE_API_KEYS=keys)
        assert "unauthorized" in checkout.run("curl localhost:3000/stats")


def test_readme_processes_run_as_written(checkout: Checkout) -> None:
    start = [text for text in blocks(README, "sh") if text.startswith("REDIS_URL=")]
    assert [text.split()[2:] for text in start] == [["wsgi.py"], ["worker.py"], ["worker.py", "doctor"]]
    with checkout.running(start[0], "web server on http"), checkout.running(start[1], "worker started"):
        assert "completed" in checkout.run(session(README))
        assert "ok    workers       1 alive" in checkout.run(start[2])


def test_readme_redis_keeps_its_data(checkout: Checkout) -> None:
    if not shutil.which("redis-server"):
        pytest.skip("there is no redis-server on PATH")
    port = free_port()
    command = block(README, "redis-server").rstrip() + f" --port {port}"
    with checkout.running(command, "Ready to accept connections"):
        doctor = checkout.run(".venv/bin/python worker.py doctor", REDIS_URL=f"redis://localhost:{port}/0")
    assert re.findall(r"^(warn|fail) +(\w+)", doctor, re.M) == [("warn", "workers")]
    assert (checkout.folder / "redis-data").is_dir()


def test_readme_program_submits_as_written(checkout: Checkout) -> None:
    checkout.declare_charge()
    (checkout.folder / "submit.py").write_text(checkout.as_here(blocks(README, "python")[1]))
    checkout.run(".venv/bin/python submit.py")
    checkout.run(block(DEPLOY, "--burst"))
    listed = checkout.run(".venv/bin/python worker.py list --json", REDIS_URL=checkout.redis)
    jobs = [(job["type"], job["status"], job.get("result")) for job in json.loads(listed)]
    done = ("charge", "completed", {"receipt": "r-17"})
    assert sorted(jobs, key=str) == [done] * 4 + [("charge", "pending", None)]


def test_operations_session_runs_as_written(checkout: Checkout) -> None:
    said = checkout.run(block(OPERATIONS, "worker.py doctor"))
    for text in (
        "permissions",
        " pending",
        " cancelled",
        "completed",
        "default paused",
        "default resumed",
        "1 deleted",
    ):
        assert text in said


def test_operations_backup_moves_jobs_to_another_redis_as_written(checkout: Checkout) -> None:
    submit = """.venv/bin/python worker.py enqueue send-email '{"to": "a@example.com", "subject": "", "body": ""}'"""
    id = checkout.run(submit, REDIS_URL=checkout.redis).strip()
    other = checkout.redis.removesuffix("0") + "1"
    script = block(OPERATIONS, "backup -").replace("redis://old:6379/0", checkout.redis)
    assert "resumed: default" in checkout.run(script.replace("redis://new:6379/0", other))
    assert id in checkout.run(".venv/bin/python worker.py list --status pending", REDIS_URL=other)


def test_operations_plan_prints_what_it_shows(checkout: Checkout) -> None:
    said = checkout.run(block(OPERATIONS, "worker.py plan")).splitlines()
    [shown] = [text for text in blocks(OPERATIONS, "text") if text.startswith("slots ")]
    assert shown.splitlines() == [*said[:5], "…"]


def test_operations_completion_is_loaded_as_written(checkout: Checkout) -> None:
    if not shutil.which("bash") or not Path(sys.prefix, "bin", "tinyqueue").exists():
        pytest.skip("there is no bash, or the program is not installed")
    said = checkout.run(block(OPERATIONS, "_TINYQUEUE_COMPLETE") + "complete -p tinyqueue", "bash", PYTHONPATH=".")
    assert "_tinyqueue_completion" in said


def test_deploy_honcho_runs_as_written(checkout: Checkout) -> None:
    [install, *start] = block(DEPLOY, "honcho start").splitlines()
    assert "install -q '.[dev]'" in install
    with checkout.running("\n".join(start), "worker started", "worker.1 stopped"):
        until(lambda: "web server on http" in "".join(log.read_text() for log in checkout.folder.glob("*.log")))
        assert "completed" in checkout.run(session(README))


def test_deploy_heroku_settings_are_valid_and_let_the_key_in(checkout: Checkout) -> None:
    """Heroku's own commands cannot be run: what they would set is printed instead."""
    said = checkout.run('heroku() { echo "$@"; }; git() { :; }\n' + block(DEPLOY, "heroku create"))
    environ = dict(re.findall(r"^config:set (\w+)=(\S+)$", said, re.M))
    settings = Settings.read({"DYNO": "web.1", "REDIS_URL": "rediss://:secret@host:6379"} | environ)
    assert re.fullmatch("ops:admin:[0-9a-f]{32}", settings.api_keys)
    assert (settings.tls_verify, settings.trusted_proxies) == (False, 1)
    assert wsgi.API(settings).settings is settings


def test_readme_test_command_is_what_ci_runs() -> None:
    assert block(README, ".[test]").strip() in (REPOSITORY / ".ci" / "run").read_text().splitlines()


def test_ci_leaves_out_only_tests_that_exist() -> None:
    named = re.findall(r"tests/\S+", (REPOSITORY / ".ci" / "run").read_text())
    assert named
    for file, _, test in (name.partition("::") for name in named):
        assert f"def {test or 'test_'}" in (REPOSITORY / file).read_text()


# Docstrings -----------------------------------------------------------------------------------------------------------


def test_tinyqueue_prints_a_table_of_contents_as_it_says() -> None:
    [pattern] = re.findall(r"`grep '(.+)' tinyqueue.py`", str(tinyqueue.__doc__))
    assert f"`grep '{pattern}' tinyqueue.py`" in README
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


def test_git_ignores_the_folders_that_the_documents_make() -> None:
    """They contain payloads and keys, which `git add .` would publish."""
    folders = {name.rstrip("/") for name in (REPOSITORY / ".gitignore").read_text().split()}
    texts = "\n".join(DOCUMENTS.values())
    made = set(re.findall(r"embedded:\./([\w-]+)|mkdir -p ([\w-]+)", texts))
    assert {"".join(names) for names in made} >= {"data", "redis-data"}
    assert {"".join(names) for names in made} - folders == set()


def test_help_shows_every_command() -> None:
    shown = subprocess.run(
        [sys.executable, "worker.py", "--help"], cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=True
    ).stdout
    assert [name for name in worker.cli.commands if not re.search(rf"^  {name} +[A-Z]", shown, re.M)] == []
