"""Declaring and loading handlers. A mistake is an error that says what to do about it."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from msgspec import Meta

from tinyqueue import BUILT_IN, HANDLERS, InvalidJob, Job, Queue, SettingsError, handler
from tinyqueue_config import load_handlers

pytestmark = pytest.mark.usefixtures("no_handlers")

ROOT = Path(__file__).parent.parent


@dataclass
class Greet:
    name: str


# The decorator --------------------------------------------------------------------------------------------------------


def test_handler_stays_callable_and_registered() -> None:
    @handler("greet")
    def greet(payload: Greet) -> str:
        """Greet somebody."""
        return f"Hello {payload.name}"

    assert greet(Greet("you")) == "Hello you"
    assert greet.__doc__ == "Greet somebody."
    assert {"greet": greet} == HANDLERS


def test_handler_with_a_second_parameter_receives_the_job() -> None:
    @handler("greet")
    def greet(payload: Greet, job: Job) -> str:
        return f"Hello {payload.name}, {job.attempts}"

    assert greet.run(Job("", "greet", {"name": "you"}, attempts=2)) == "Hello you, 2"


def test_handler_enqueues_with_its_declared_options() -> None:
    @handler("greet", max_attempts=7, queue="polite")
    def greet(payload: Greet) -> None: ...

    queue = Queue.embedded()
    jobs = (
        greet.enqueue(queue, Greet("you")),
        greet.enqueue(queue, Greet("you"), max_attempts=1, queue="default", delay=60),
    )
    assert [(job.type, job.max_attempts, job.queue, bool(job.run_at)) for job in jobs] == [
        ("greet", 7, "polite", False),
        ("greet", 1, "default", True),
    ]
    found = queue.get(jobs[0].id)
    assert found
    assert found.payload == {"name": "you"}


def test_handler_refuses_to_enqueue_a_payload_of_another_type() -> None:
    @handler("greet")
    def greet(payload: Greet) -> None: ...

    with pytest.raises(InvalidJob) as refusal:
        greet.enqueue(Queue.embedded(), {"name": 1})  # type: ignore[arg-type]
    assert (refusal.value.field, refusal.value.path) == ("payload", "$.name")


def test_handler_of_a_type_that_is_taken_is_refused() -> None:
    @handler("greet")
    def greet(payload: Greet) -> None: ...

    with pytest.raises(TypeError, match="two handlers are declared for type 'greet'"):

        @handler("greet")
        def hello(payload: Greet) -> None: ...

    assert HANDLERS["greet"] is greet


def test_handler_declared_again_by_a_reload_replaces_itself() -> None:
    def declare() -> Any:
        @handler("greet")
        def greet(payload: Greet) -> None: ...

        return greet

    declare()
    again = declare()
    assert {"greet": again} == HANDLERS


def without_annotation(payload) -> None: ...  # type: ignore[no-untyped-def]
def without_parameter() -> None: ...
def with_three(payload: Greet, job: Job, more: int) -> None: ...
def with_another_second(payload: Greet, retries: int = 3) -> None: ...
def with_untyped_second(payload: Greet, job) -> None: ...  # type: ignore[no-untyped-def]
def with_unreadable_payload(payload: list[Greet] | set[Greet]) -> None: ...


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (without_annotation, "without_annotation must take an annotated payload"),
        (without_parameter, "without_parameter must take an annotated payload"),
        (with_three, "with_three must take an annotated payload and, optionally, a Job"),
        (with_another_second, "second parameter of handler with_another_second must be annotated Job"),
        (with_untyped_second, "second parameter of handler with_untyped_second must be annotated Job"),
        (with_unreadable_payload, "more than one array-like"),
    ],
)
def test_handler_with_an_invalid_signature_is_refused(function: Callable[..., Any], rule: str) -> None:
    with pytest.raises(TypeError, match=rule):
        handler("greet")(function)
    assert HANDLERS == {}


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_handler_with_an_invalid_timeout_is_refused(timeout: float) -> None:
    with pytest.raises(TypeError, match="handler 'greet': timeout must be above 0, or None"):
        handler("greet", timeout=timeout)


@pytest.mark.parametrize(
    ("backoff", "cap"), [(0, 300), (-1, 300), (301, 300), (float("nan"), 300), (1, float("nan")), (float("inf"), 300)]
)
def test_handler_with_an_invalid_backoff_is_refused(backoff: float, cap: float) -> None:
    with pytest.raises(TypeError, match="handler 'greet': backoff must be above 0"):
        handler("greet", backoff=backoff, backoff_cap=cap)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"type": ""}, "type"),
        ({"type": "send email"}, "type"),
        ({"type": "greet\n"}, "type"),
        ({"queue": "a:b"}, "queue"),
        ({"max_attempts": 0}, "maxAttempts"),
        ({"max_attempts": 101}, "maxAttempts"),
        ({"max_attempts": 1.5}, "maxAttempts"),
        ({"max_attempts": True}, "maxAttempts"),
    ],
)
def test_handler_with_an_invalid_option_is_refused(options: dict[str, Any], field: str) -> None:
    def greet(payload: Greet) -> None: ...

    with pytest.raises(InvalidJob) as refusal:
        handler(**{"type": "greet", **options})(greet)
    assert refusal.value.field == field
    assert HANDLERS == {}


# Loading --------------------------------------------------------------------------------------------------------------

GREET = """\
from tinyqueue import handler

@handler({type!r})
def greet(payload: str) -> str:
    return {text!r} + payload
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory. What is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(ROOT))])
    monkeypatch.delitem(sys.modules, "handlers", raising=False)
    before = dict(sys.modules)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if name not in before and str(tmp_path) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


def test_load_handlers_finds_modules_in_the_working_directory(folder: Path) -> None:
    (folder / "first_ones.py").write_text(GREET.format(type="greet", text="Hello "))
    (folder / "more").mkdir()
    (folder / "more" / "jobs.py").write_text(GREET.format(type="welcome", text="Welcome "))
    assert set(load_handlers("first_ones, more.jobs,")) == {"greet", "welcome", *BUILT_IN}
    assert HANDLERS["welcome"]("you") == "Welcome you"
    assert sys.path[0] == str(folder)


def test_load_handlers_twice_changes_nothing(folder: Path) -> None:
    (folder / "handlers.py").write_text(GREET.format(type="greet", text="Hello "))
    once = dict(load_handlers("handlers"))
    path = list(sys.path)
    assert load_handlers("handlers") == once
    assert sys.path == path


def test_load_handlers_prefers_the_users_own_file(tmp_path: Path) -> None:
    """The console script runs like this, and could also import this repository's handlers."""
    (tmp_path / "handlers.py").write_text(GREET.format(type="greet", text="Hello "))
    script = "import json, tinyqueue_config as c; print(json.dumps(sorted(c.load_handlers('handlers'))))"
    run = [sys.executable, "-P", "-c", script]  # -P: not from the working directory by itself
    done = subprocess.run(
        run, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    assert json.loads(done.stdout) == ["greet", *BUILT_IN]


@pytest.mark.parametrize("type", BUILT_IN)
def test_load_handlers_refuses_a_type_that_is_built_in(folder: Path, type: str) -> None:
    (folder / "own.py").write_text(GREET.format(type=type, text="Hello "))
    with pytest.raises(SettingsError, match=f"^two handlers are declared for type '{type}'; .* choose another name$"):
        load_handlers("own")


def test_load_handlers_without_a_module_of_the_user(folder: Path) -> None:
    assert set(load_handlers("tinyqueue_http")) == set(BUILT_IN)


def test_handler_without_a_type_says_what_to_write() -> None:
    with pytest.raises(TypeError, match=r"write @handler\('send-email'\), not @handler$"):
        handler(lambda payload: None)  # type: ignore[arg-type]


Letter = Annotated[str, Meta(pattern="^a$", description="must be the letter a")]


class Part(msgspec.Struct):
    one: Letter | None = None
    many: list[Letter] = []
    named: dict[str, Letter] = {}
    pair: tuple[int, Letter] | None = None
    bare: Annotated[str, Meta(pattern="^a$")] = "a"


@pytest.mark.parametrize(
    ("part", "path", "rule"),
    [
        ({"one": "b"}, "one", "must be the letter a"),
        ({"many": ["a", "b"]}, "many[1]", "must be the letter a"),
        ({"named": {"k": "b"}}, "named[...]", "must be the letter a"),
        ({"pair": [1, "b"]}, "pair[1]", "must be the letter a"),
        ({"bare": "b"}, "bare", "Expected `str` matching regex '^a$'"),
        ({"many": [1]}, "many[0]", "Expected `str`, got `int`"),
    ],
)
def test_payload_that_breaks_a_pattern_is_refused_with_its_description(part: Any, path: str, rule: str) -> None:
    @handler("parts")
    def parts(payload: list[Part]) -> None: ...

    with pytest.raises(InvalidJob) as error:
        parts.parse(msgspec.json.encode([{}, part]))
    assert (error.value.path, error.value.rule) == (f"$[1].{path}", rule)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (
            None,
            r"^TINYQUEUE_HANDLERS: there is no module handlers here; create it, or name the module of your handlers$",
        ),
        ("import not_installed", r"^cannot import handlers: No module named 'not_installed'$"),
        ("import sys; sys.exit('stop')", r"^cannot import handlers: SystemExit: stop$"),
        ("exit(0)", r"^cannot import handlers: SystemExit: 0$"),
        ("1 / 0", r"^cannot import handlers: ZeroDivisionError: division by zero$"),
        ("def greet(", r"^cannot import handlers: SyntaxError: .*handlers\.py, line 1"),
        ("", r"^handlers registers no handler: decorate a function with @handler\('type'\)$"),
        (
            "from tinyqueue import handler\n@handler('greet')\ndef greet(payload): ...",
            r"^cannot import handlers: TypeError: handler greet must take an annotated payload",
        ),
    ],
)
def test_load_handlers_of_a_broken_module_says_what_to_do(folder: Path, text: str | None, rule: str) -> None:
    if text is not None:
        (folder / "handlers.py").write_text(text)
    with pytest.raises(SettingsError, match=rule) as error:
        load_handlers("handlers")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value",
    ["redis://:S3cr3tPw@h.example.com/0", "f86d081884c7d659S3cr3tPw", ".S3cr3tPw", "S3cr3tPw..b", "a\0S3cr3tPw"],
)
def test_load_handlers_prints_no_secret_pasted_into_the_wrong_variable(folder: Path, value: str) -> None:
    with pytest.raises(SettingsError) as error:
        load_handlers(value)
    assert "S3cr3tPw" not in str(error.value)
    assert "name not shown" in str(error.value)


def test_load_handlers_lets_a_keyboard_interrupt_through(folder: Path) -> None:
    (folder / "handlers.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_handlers("handlers")


# Names ----------------------------------------------------------------------------------------------------------------


def test_traceback_names_an_error_as_users_import_it() -> None:
    printed = traceback.format_exception_only(InvalidJob("delay", "too long"))
    assert printed == ["tinyqueue.InvalidJob: delay: too long\n"]


def test_pickle_of_a_job_names_it_as_users_import_it() -> None:
    job = Job(id="01a2", type="greet", payload={"name": "you"})
    pickled = pickle.dumps(job)
    assert b"tinyqueue_job" not in pickled
    assert pickle.loads(pickled) == job
