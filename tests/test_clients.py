"""Generate clients from the OpenAPI document, type-check them, and use them against a server.

The programs that use the clients are in tests/clients. Node's packages are installed into a
temporary folder, once in a session.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from client import running
from msgspec import Meta

from tinyqueue import ID, NAME, PRINTABLE, handler
from tinyqueue_openapi import ecma_pattern
from wsgi import describe

CLIENTS = Path(__file__).with_name("clients")
HANDLERS_PY = CLIENTS.parent.parent / "handlers.py"


class Record(msgspec.Struct):
    name: Annotated[str, Meta(pattern=r"^\w[\w-]*\Z")]


class Job(msgspec.Struct):
    type: str
    record: Record | None = None


class Error(msgspec.Struct, tag="error"):
    message: str = ""


class Text(msgspec.Struct, tag="text"):
    text: Annotated[str, Meta(pattern="(?i)^a+$")]


def run(folder: Path, *command: object) -> str:
    """Run a command, which must succeed, and return its output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the generator formats by ruff
    environ = os.environ | {"PATH": path}
    done = subprocess.run([*map(str, command)], cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Documents ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def examples() -> dict[str, Any]:
    """The document of the handlers that the project ships, which this process may have changed."""
    imports = "import json, tinyqueue_config, wsgi"
    program = f"{imports}; tinyqueue_config.load_handlers('handlers'); print(json.dumps(wsgi.describe()))"
    document: dict[str, Any] = json.loads(run(HANDLERS_PY.parent, sys.executable, "-c", program))
    return document


@pytest.fixture
def awkward(no_handlers: None) -> dict[str, Any]:
    """The document of types whose names collide with each other, with ours and with a language's."""

    def declare(type: str, payload_type: Any) -> None:
        def run(payload: Any) -> None: ...

        run.__annotations__["payload"] = payload_type
        handler(type)(run)

    for type in ("send-email", "send_email", "Send.Email", "9-lives", "class", "record"):
        declare(type, Job)
    declare("anything", Any)
    declare("numbers", list[int])
    declare("union", Error | Text)
    return describe()


@pytest.fixture(params=["examples", "awkward"])
def document(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    document: dict[str, Any] = request.getfixturevalue(request.param)
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    return document


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the node packages of tests/clients/package.json."""
    if not shutil.which("npm"):
        pytest.skip("npm is not on PATH: THE TYPESCRIPT CLIENTS ARE NOT TESTED")
    folder = tmp_path_factory.mktemp("node")
    shutil.copy(CLIENTS / "package.json", folder)
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"npm install failed: THE TYPESCRIPT CLIENTS ARE NOT TESTED\n{done.stderr}")
    return folder / "node_modules"


@pytest.fixture
def node(packages: Path, tmp_path: Path) -> Path:
    """A folder of this test from which node finds the packages. Returns the folder of programs."""
    (tmp_path / "node_modules").symlink_to(packages)
    return packages / ".bin"


@pytest.fixture
def server() -> Iterator[str]:
    """The URL of a server with the handlers that the project ships, and an embedded worker."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(HANDLERS_PY, folder)
        with running(folder) as process:
            yield f"http://{process.address[0]}:{process.address[1]}"


# Linters --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("document")
def test_redocly_finds_no_error(node: Path, tmp_path: Path) -> None:
    run(tmp_path, node / "redocly", "lint", "openapi.json")


@pytest.mark.usefixtures("document")
def test_spectral_finds_no_error(node: Path, tmp_path: Path) -> None:
    (tmp_path / ".spectral.yaml").write_text("extends: ['spectral:oas']")
    run(tmp_path, node / "spectral", "lint", "openapi.json")


# Clients --------------------------------------------------------------------------------------------------------------


def generate_typescript(node: Path, folder: Path) -> None:
    shutil.copy(CLIENTS / "tsconfig.json", folder)
    shutil.copy(CLIENTS / "orval.config.cjs", folder)
    commands: list[tuple[object, ...]] = [
        (node / "openapi-typescript", "openapi.json", "-o", "schema.d.ts"),
        (node / "openapi-ts", "-i", "openapi.json", "-o", "hey"),
        (node / "orval", "--config", "orval.config.cjs"),
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda command: run(folder, *command), commands))


def generate_python(folder: Path) -> Path:
    """Generate the Python client. The generator warns of what it cannot express."""
    pytest.importorskip("openapi_python_client")
    command = (sys.executable, "-m", "openapi_python_client", "generate", "--path", "openapi.json")
    output = run(folder, *command, "--meta", "none", "--output-path", "tiny_queue_client", "--fail-on-warning")
    assert "Warning" not in output, output
    return folder / "tiny_queue_client"


@pytest.mark.parametrize("document", ["awkward"], indirect=True)
@pytest.mark.usefixtures("document")
def test_typescript_clients_pass_the_compiler(node: Path, tmp_path: Path) -> None:
    """Those of the examples pass it in test_typescript_clients_submit_and_read_jobs."""
    generate_typescript(node, tmp_path)
    run(tmp_path, node / "tsc", "--noEmit")


@pytest.mark.usefixtures("document")
def test_python_client_passes_mypy(tmp_path: Path) -> None:
    """Except its client.py, which is the same for every document, and which mypy finds wrong."""
    client = generate_python(tmp_path)
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = silent\n")
    run(tmp_path, sys.executable, "-m", "mypy", client / "api", client / "models")


def test_typescript_clients_submit_and_read_jobs(
    examples: dict[str, Any], server: str, node: Path, tmp_path: Path
) -> None:
    (tmp_path / "openapi.json").write_text(json.dumps(examples))
    generate_typescript(node, tmp_path)
    shutil.copy(CLIENTS / "use.ts", tmp_path)
    run(tmp_path, node / "tsc")
    assert run(tmp_path, "node", "js/use.js", server) == "ok\n"


def test_python_client_submits_and_reads_jobs(examples: dict[str, Any], server: str, tmp_path: Path) -> None:
    (tmp_path / "openapi.json").write_text(json.dumps(examples))
    generate_python(tmp_path)
    shutil.copy(CLIENTS / "use.py", tmp_path)
    assert run(tmp_path, sys.executable, "use.py", server) == "ok\n"


# Patterns -------------------------------------------------------------------------------------------------------------

PATTERNS = [
    r"\A[]a-z\-[]+\Z",
    r"^[^]^]*\Z",
    r"(?P<q>['\"])\w+(?P=q)\Z",
    r"(a|b)\1\Z",
    r"\A[\w.-]{,3}\Z",
    r"^[^\W_]+\Z",
    r"\Aa{b}c]\Z",
    r"(?a)\A\w+\Z",
    r"\Ax.y#/\Z",
    r"\A[(?#)]{2}\Z",
    r"\A\101\x42\u0043\0?\Z",
    r"\A[\1\b\t]+\Z",
    r"\A\N{EM DASH}ü\Z",
    r"\A(?#a comment)a(?:b|c)(?=d)(?!e)(?<=[bc])d\Z",
    r"\A\ \-\'\@\!\Z",
    r"\A\d{5}(-\d{4})?\Z",
    r"\A[+*?]+?\Z",
    r"\bword\B.\Z",
    PRINTABLE.pattern.replace(r"\ud800-\udfff", "") + r"\Z",
    rf"\A{NAME.pattern}\Z",
    rf"\A{ID.pattern}\Z",
]
TEXTS = (
    *("", "a", "aa", "abd", "acd", "abde", "a\n", "ab", "]", "[-]a", "^", "'x'", "'é\"", "'é'", "a.-", "a.-a"),
    *("é", "_", "a{b}c]", "axb", "x\ny#/", "x y#/", "x\u2028y#/", "(#", "?)", "ABC", "ABC\0", "\1\b", "—ü"),
    *(" -'@!", "12345", "12345-6789", "12345\n", "+*?", "words", "word!", "word", "a\u00a0", "a b", "🙂", "a🙂"),
    *("01900000-0000-7000-8000-000000000000", "a" * 100, "a" * 101),
)
MATCH = """
const [patterns, texts] = JSON.parse(require("fs").readFileSync(0, "utf8"));
const results = flags => patterns.map(pattern => texts.map(text => new RegExp(pattern, flags).test(text)));
console.log(JSON.stringify([results(""), results("u")]));
"""


def matches_in_javascript(patterns: list[str]) -> list[list[list[bool]]]:
    if not shutil.which("node"):
        pytest.skip("node is not on PATH: THE TRANSLATED PATTERNS ARE NOT TESTED")
    done = subprocess.run(
        ["node", "-e", MATCH], input=json.dumps([patterns, TEXTS]), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results: list[list[list[bool]]] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("flag", [0, 1], ids=["no flag", "flag u"])
def test_translated_patterns_match_the_same_texts_in_javascript(flag: int) -> None:
    r"""Except \w, which matches more: ECMA-262 cannot name the letters of all languages."""
    matched = matches_in_javascript([ecma_pattern(pattern) for pattern in PATTERNS])[flag]
    expected = [[bool(re.search(pattern, text)) for text in TEXTS] for pattern in PATTERNS]
    wrong = [
        (pattern, text, there)
        for pattern, row, expected_row in zip(PATTERNS, matched, expected, strict=True)
        for text, there, here in zip(TEXTS, row, expected_row, strict=True)
        if there < here or (there > here and not re.search(r"\\[wW]", pattern))
    ]
    assert wrong == []


def test_translated_word_characters_accept_every_language() -> None:
    assert ecma_pattern(r"^\w+\Z") == r"^[\w\u0080-\uffff]+$"
    assert ecma_pattern(r"(?a)^\w+\Z") == r"^\w+$"


@pytest.mark.parametrize("pattern", ["(?i)a", "a++", "(?>a)", "a{2}+", "(a)(?(1)b|c)", "(?i:a)", "🙂", "[🙂-🙃]"])
def test_pattern_without_a_translation_is_left_out(no_handlers: None, pattern: str) -> None:
    def own(payload: Any) -> None: ...

    text = Annotated[str, Meta(pattern=pattern, max_length=9)]
    own.__annotations__["payload"] = msgspec.defstruct("Payload", [("text", text)])
    handler("own")(own)
    schemas = describe()["components"]["schemas"]
    assert schemas["OwnPayload"]["properties"]["text"] == {"type": "string", "maxLength": 9}


def test_field_named_like_a_keyword_keeps_its_schema(no_handlers: None) -> None:
    class Payload(msgspec.Struct):
        pattern: str = r"\Z"
        properties: dict[str, str] = {}
        default: int = 1

    def own(payload: Any) -> None: ...

    own.__annotations__["payload"] = Payload
    handler("own")(own)
    fields = describe()["components"]["schemas"]["OwnPayload"]["properties"]
    assert fields["pattern"] == {"type": "string", "default": r"\Z"}
    assert fields.keys() == {"pattern", "properties", "default"}
