"""The layout of the project: who imports whom, and how long functions and lines of prose are."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
IMPORTS = {  # each module, and those of ours that it may import
    "tinyqueue_embedded": set(),
    "tinyqueue_redis": {"tinyqueue_embedded"},
    "tinyqueue_json": set(),
    "tinyqueue_calendar": set(),
    "tinyqueue_job": {"tinyqueue_json", "tinyqueue_redis"},
    "tinyqueue_handler": {"tinyqueue_job", "tinyqueue_json"},
    "tinyqueue_schedule": {
        *("tinyqueue_calendar", "tinyqueue_handler", "tinyqueue_job", "tinyqueue_json", "tinyqueue_redis"),
    },
    "tinyqueue_log": {"tinyqueue_json", "tinyqueue_redis"},
    "tinyqueue_reading": {"tinyqueue_job", "tinyqueue_json", "tinyqueue_redis"},
    "tinyqueue": {
        *("tinyqueue_handler", "tinyqueue_job", "tinyqueue_json", "tinyqueue_log", "tinyqueue_reading"),
        "tinyqueue_redis",
        "tinyqueue_schedule",
    },
    "tinyqueue_shards": {
        *("tinyqueue", "tinyqueue_handler", "tinyqueue_job", "tinyqueue_log", "tinyqueue_reading", "tinyqueue_redis"),
    },
    "tinyqueue_http": {"tinyqueue", "tinyqueue_handler", "tinyqueue_job", "tinyqueue_json"},
    "tinyqueue_config": {
        *("tinyqueue", "tinyqueue_embedded", "tinyqueue_http", "tinyqueue_json", "tinyqueue_schedule"),
        *("tinyqueue_shards",),
    },
    "tinyqueue_look": {
        *("tinyqueue", "tinyqueue_metrics", "tinyqueue_reading", "tinyqueue_redis", "tinyqueue_schedule"),
    },
    "tinyqueue_doctor": {
        *("tinyqueue", "tinyqueue_config", "tinyqueue_handler", "tinyqueue_look", "tinyqueue_metrics"),
        *("tinyqueue_redis", "tinyqueue_schedule", "tinyqueue_shards"),
    },
    "tinyqueue_repair": {"tinyqueue", "tinyqueue_doctor", "tinyqueue_redis", "tinyqueue_shards"},
    "tinyqueue_backup": {
        *("tinyqueue", "tinyqueue_job", "tinyqueue_json", "tinyqueue_redis", "tinyqueue_schedule"),
        *("tinyqueue_shards",),
    },
    "tinyqueue_plan": {"tinyqueue", "tinyqueue_config"},
    "tinyqueue_cli": {
        *("tinyqueue", "tinyqueue_backup", "tinyqueue_config", "tinyqueue_doctor", "tinyqueue_embedded"),
        *("tinyqueue_json", "tinyqueue_plan", "tinyqueue_repair", "tinyqueue_schedule", "tinyqueue_shards"),
        *("tinyqueue_why",),
    },
    "tinyqueue_metrics": {"tinyqueue", "tinyqueue_reading", "tinyqueue_schedule", "tinyqueue_shards"},
    "tinyqueue_why": {"tinyqueue", "tinyqueue_shards"},
    "tinyqueue_openapi": {"tinyqueue"},
    "tinyqueue_problems": {"tinyqueue"},
    "tinyqueue_access": {"tinyqueue", "tinyqueue_config", "tinyqueue_problems", "tinyqueue_shards"},
    "tinyqueue_request": {"tinyqueue", "tinyqueue_json", "tinyqueue_problems"},
    "tinyqueue_waiter": {"tinyqueue"},
    "tinyqueue_events": {"tinyqueue"},
    "tinyqueue_work": {"tinyqueue", "tinyqueue_config", "tinyqueue_problems", "tinyqueue_shards", "worker"},
    "tinyqueue_server": {"tinyqueue_config"},
    "handlers": {"tinyqueue"},
    "tinyqueue_slot": {"tinyqueue", "tinyqueue_config", "tinyqueue_json", "tinyqueue_log", "tinyqueue_redis"},
    # The two programs start each other, from within a function: `tinyqueue web`, and the workers of an embedded Redis.
    "worker": {
        *("tinyqueue", "tinyqueue_cli", "tinyqueue_config", "tinyqueue_doctor", "tinyqueue_repair"),
        *("tinyqueue_log", "tinyqueue_schedule", "tinyqueue_shards", "tinyqueue_slot", "wsgi"),
    },
    "wsgi": {
        *("tinyqueue", "tinyqueue_access", "tinyqueue_config", "tinyqueue_doctor", "tinyqueue_events"),
        *("tinyqueue_json", "tinyqueue_metrics", "tinyqueue_openapi", "tinyqueue_problems", "tinyqueue_request"),
        *("tinyqueue_schedule", "tinyqueue_server", "tinyqueue_shards", "tinyqueue_waiter", "tinyqueue_why"),
        *("tinyqueue_work", "worker"),
    },
}
SCREEN = 50  # lines
PROSE = 100  # columns


def source(module: str) -> str:
    return (REPOSITORY / f"{module}.py").read_text()


def imported(module: str) -> Iterator[str]:
    """The modules that a module imports when it runs, not those that only its types need."""
    tree = ast.parse(source(module))
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield str(node.module).removeprefix("tinyqueue.")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_layout_lists_every_module() -> None:
    assert {path.stem for path in REPOSITORY.glob("*.py")} - {"setup"} == IMPORTS.keys()


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_run_one_way(module: str) -> None:
    assert set(imported(module)) & IMPORTS.keys() <= IMPORTS[module]


@pytest.mark.parametrize("module", IMPORTS)
def test_functions_fit_on_a_screen(module: str) -> None:
    nodes = ast.walk(ast.parse(source(module)))
    functions = (node for node in nodes if isinstance(node, ast.FunctionDef))
    assert [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= SCREEN] == []


def prose(module: str) -> Iterator[tuple[int, str]]:
    """The lines of docstrings and of comments that stand alone, except tables and banners."""
    text = source(module)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (doc := node.body[0]) and ast.get_docstring(node):
            yield from ((at, text.splitlines()[at - 1]) for at in range(doc.lineno, (doc.end_lineno or 0) + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#") and "-----" not in token.string:
            yield token.start[0], token.line.rstrip("\n")


@pytest.mark.parametrize("module", IMPORTS)
def test_prose_stays_within_100_columns(module: str) -> None:
    assert [f"{module}.py:{at}" for at, line in prose(module) if len(line) > PROSE] == []
