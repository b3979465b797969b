"""The description of the API: it is OpenAPI 3.1, it describes the routes and the job types that there are, and it is true."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import msgspec
import pytest
from client import Answer, Client, running
from conftest import put

from tinyqueue import HANDLERS, KEY_LENGTH, MAX_ATTEMPTS, MAX_DELAY, MAX_JOBS, STATUSES, Queue, __version__, handler
from tinyqueue_config import Settings
from wsgi import API, FIELDS, FILTERS, LONGEST_WAIT, ROUTES, describe

CONFIG = Path(__file__).with_name("schemathesis.toml")
NO_JOB = "01900000-0000-7000-8000-000000000000"


class SendEmail(msgspec.Struct, forbid_unknown_fields=True):
    to: str
    cc: list[str] = []


class Crop(TypedDict):
    width: int


@dataclasses.dataclass
class Image:
    path: str
    crop: Crop | None = None


def echo(payload: Any) -> Any:
    """Give back what comes.

    And more."""
    return payload


def send_email(email: SendEmail) -> None: ...


def scale(image: Image) -> None: ...


@pytest.fixture(autouse=True)
def handlers(no_handlers: None) -> None:
    handler("echo")(echo)
    handler("send-email", queue="mail")(send_email)
    handler("scale.image")(scale)


@pytest.fixture
def document(near: Queue) -> Any:
    answer = Client(API(Settings(), near)).get("/openapi.json")
    assert answer.status == 200, answer
    return answer.json


def operations(document: Any) -> dict[tuple[str, str], Any]:
    return {(method.upper(), path): about for path, item in document["paths"].items() for method, about in item.items()}


def resolved(document: Any, part: Any) -> Any:
    """What a reference leads to."""
    while "$ref" in part:
        target = part["$ref"]
        part = document
        for name in target.removeprefix("#/").split("/"):
            part = part[name.replace("~1", "/").replace("~0", "~")]
    return part


def braced(path: str) -> str:
    return path.replace("<", "{").replace(">", "}")


# Form -----------------------------------------------------------------------------------------------------------------


def test_is_valid_openapi(document: Any) -> None:
    pytest.importorskip("openapi_spec_validator").validate(document)


def test_has_the_form_of_openapi(document: Any) -> None:
    assert re.fullmatch(r"3\.1\.\d+", document["openapi"])
    assert document["info"].keys() >= {"title", "version"}
    assert document["info"]["version"] == __version__
    assert document.keys() <= {"openapi", "info", "servers", "tags", "paths", "components", "security", "externalDocs"}
    tags = {tag["name"] for tag in document["tags"]}
    for about in operations(document).values():
        assert about["summary"]
        assert set(about["tags"]) <= tags
        assert all(re.fullmatch("[1-5][0-9][0-9]", status) for status in about["responses"])
        assert {"200", "201"} & about["responses"].keys()
        for response in about["responses"].values():
            assert resolved(document, response)["description"]


def test_every_reference_leads_somewhere_and_every_part_is_used(document: Any) -> None:
    used = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(document)))
    for target in used:
        assert target.startswith("#/")
        assert resolved(document, {"$ref": target})
    there = {
        f"#/components/{kind}/{name}"
        for kind in ("parameters", "responses", "schemas")
        for name in document["components"][kind]
    }
    assert there == used


@pytest.mark.parametrize("kind", ["parameters", "responses", "schemas", "securitySchemes"])
def test_names_of_parts_are_what_openapi_allows(document: Any, kind: str) -> None:
    assert [name for name in document["components"][kind] if not re.fullmatch(r"[a-zA-Z0-9._-]+", name)] == []


def test_every_schema_is_one(document: Any) -> None:
    meta = pytest.importorskip("jsonschema_rs").meta
    for schema in document["components"]["schemas"].values():
        meta.validate(schema | {"$schema": "https://json-schema.org/draft/2020-12/schema"})


def test_every_parameter_in_a_path_is_described(document: Any) -> None:
    for (_, path), about in operations(document).items():
        parameters = [resolved(document, parameter) for parameter in about.get("parameters", [])]
        assert {p["name"] for p in parameters if p["in"] == "path"} == set(re.findall(r"{(\w+)}", path))
        assert all(p["required"] for p in parameters if p["in"] == "path")
        assert len({(p["in"], p["name"]) for p in parameters}) == len(parameters)


# Routes ---------------------------------------------------------------------------------------------------------------


def test_describes_every_route_and_no_other(document: Any) -> None:
    assert operations(document).keys() == {(method, braced(path)) for method, path, *_ in ROUTES}


def test_names_operations_as_the_methods_of_the_code(document: Any) -> None:
    named = {route: about["operationId"] for route, about in operations(document).items()}
    assert named == {(method, braced(path)): name for method, path, name, _ in ROUTES}


BODY = {400, 413, 415, 422}
STATUSES_OF = {
    ("GET", "/ready"): {200},
    ("GET", "/openapi.json"): {200},
    ("GET", "/whoami"): {200},
    ("POST", "/jobs"): {200, 201} | BODY,
    ("POST", "/jobs/batch"): {200, 201} | BODY,
    ("GET", "/jobs"): {200, 400, 422},
    ("GET", "/jobs/<id>"): {200, 400, 404},
    ("DELETE", "/jobs/<id>"): {200, 202, 404, 409},
    ("POST", "/jobs/<id>/retry"): {200, 404, 409},
    ("POST", "/jobs/retry"): {200} | BODY,
    ("POST", "/jobs/cancel"): {200} | BODY,
    ("GET", "/queues"): {200},
    ("POST", "/queues/<name>/pause"): {200, 404},
    ("POST", "/queues/<name>/resume"): {200, 404},
    ("GET", "/stats"): {200},
    ("GET", "/workers"): {200},
    ("GET", "/metrics"): {200},
}
EVERYWHERE = {400, 401, 403, 429, 500, 503}  # 400 is for what a proxy forwards


@pytest.mark.parametrize(("method", "path"), STATUSES_OF)
def test_describes_every_status_that_a_route_answers(document: Any, method: str, path: str) -> None:
    described = {int(status) for status in operations(document)[method, braced(path)]["responses"]}
    assert described == STATUSES_OF[method, path] | EVERYWHERE


def test_describes_the_dashboard_as_a_page_without_a_key(document: Any) -> None:
    page = operations(document)["GET", "/"]
    assert {int(status) for status in page["responses"]} == {200} | EVERYWHERE - {401, 429}
    assert page["security"] == [{}]


def test_describes_health_as_what_is_always_well(document: Any) -> None:
    health = operations(document)["GET", "/health"]
    assert health["responses"].keys() <= {"200", "500"}
    assert health["security"] == [{}]


def test_says_where_a_key_is_wanted(document: Any) -> None:
    roles = {(method, braced(path)): role for method, path, _, role in ROUTES}
    wants = {route: {"key": []} in about["security"] for route, about in operations(document).items()}
    assert wants == {route: role not in ("", "page") for route, role in roles.items()}
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


def test_describes_every_field_and_filter(document: Any) -> None:
    schemas = document["components"]["schemas"]
    for kind in schemas["Job"]["oneOf"]:
        job = resolved(document, kind)
        assert job["properties"].keys() == FIELDS.keys()
        assert job["required"] == ["type", "payload"]
        assert job["additionalProperties"] is False
    for name in ("PendingFilter", "EndedFilter"):
        assert schemas[name]["properties"].keys() == {*FILTERS, "cursor"}
    listed = {resolved(document, part)["name"] for part in operations(document)["GET", "/jobs"]["parameters"]}
    assert listed == {*FILTERS, "limit", "cursor"}


def test_gives_the_limits_of_the_code(document: Any) -> None:
    schemas = document["components"]["schemas"]
    job = resolved(document, schemas["Job"]["oneOf"][0])["properties"]
    batch = operations(document)["POST", "/jobs/batch"]["requestBody"]["content"]["application/json"]["schema"]
    assert (job["maxAttempts"]["maximum"], job["uniqueKey"]["maxLength"]) == (MAX_ATTEMPTS, KEY_LENGTH)
    assert job["delay"]["maximum"] == job["expiresIn"]["maximum"] == MAX_DELAY
    assert (batch["minItems"], batch["maxItems"]) == (1, MAX_JOBS)
    assert schemas["Status"]["enum"] == list(STATUSES)
    assert document["components"]["parameters"]["minutes"]["schema"]["maximum"] == 120
    assert str(LONGEST_WAIT) in document["components"]["parameters"]["wait"]["description"]


# Job types ------------------------------------------------------------------------------------------------------------


def test_has_one_schema_for_each_job_type(document: Any) -> None:
    kinds = [resolved(document, kind) for kind in document["components"]["schemas"]["Job"]["oneOf"]]
    assert [kind["properties"]["type"]["const"] for kind in kinds] == list(HANDLERS)
    assert kinds[0]["properties"]["type"]["description"] == "Give back what comes."


JOBS = {
    "anything": ({"type": "echo", "payload": [None, 1, {}]}, True),
    "e-mail": ({"type": "send-email", "payload": {"to": "a", "cc": ["b"]}}, True),
    "image": ({"type": "scale.image", "payload": {"path": "a", "crop": {"width": 1}}}, True),
    "options": ({"type": "echo", "payload": 1, "delay": 1.5, "queue": "q", "maxAttempts": 3, "uniqueKey": "u"}, True),
    "nulls": ({"type": "echo", "payload": 1} | dict.fromkeys(FIELDS.keys() - {"type", "payload"}), True),
    "unknown type": ({"type": "nope", "payload": 1}, False),
    "no payload": ({"type": "echo"}, False),
    "wrong payload": ({"type": "send-email", "payload": {"to": 1}}, False),
    "another's payload": ({"type": "scale.image", "payload": {"to": "a"}}, False),
    "unknown field": ({"type": "echo", "payload": 1, "priority": 1}, False),
    "wrong queue": ({"type": "echo", "payload": 1, "queue": "a b"}, False),
    "wrong queue at its end": ({"type": "echo", "payload": 1, "queue": "a\n"}, False),
    "no attempts": ({"type": "echo", "payload": 1, "maxAttempts": 0}, False),
    "whole floats": (
        {"type": "scale.image", "payload": {"path": "a", "crop": {"width": 7.0}}, "maxAttempts": 3.0},
        True,
    ),
    "no whole float": ({"type": "scale.image", "payload": {"path": "a", "crop": {"width": 7.5}}}, False),
    "delay and moment": ({"type": "echo", "payload": 1, "delay": 1, "runAt": 1}, False),
    "no time": ({"type": "echo", "payload": 1, "expiresIn": 0}, False),
}


@pytest.mark.parametrize(("job", "right"), JOBS.values(), ids=JOBS.keys())
def test_takes_for_a_job_what_the_code_takes(document: Any, near: Queue, job: Any, right: bool) -> None:
    rs = pytest.importorskip("jsonschema_rs")
    assert rs.is_valid({"$ref": "#/components/schemas/Job", "components": document["components"]}, job) == right
    assert (Client(API(Settings(), near)).post("/jobs", job).status == 201) == right


class Record(msgspec.Struct):
    mine: int


class Problem(msgspec.Struct):
    mine: int
    record: Record


@dataclasses.dataclass
class Job:
    mine: int


@pytest.mark.parametrize("payload", [Record, Problem, Job], ids=lambda payload: payload.__name__)
def test_a_payload_type_does_not_take_the_place_of_another_schema(payload: Any) -> None:
    before = describe()["components"]["schemas"]

    def own(payload: Any) -> None: ...

    own.__annotations__["payload"] = payload
    handler("own")(own)
    schemas = describe()["components"]["schemas"]
    assert {name: schemas.get(name) for name in before if name != "Job"} == {
        name: before[name] for name in before if name != "Job"
    }
    assert "mine" in json.dumps(schemas["Job.own"]) + json.dumps(schemas)
    assert len(schemas["Job"]["oneOf"]) == len(HANDLERS)


def same_name() -> Any:
    class SendEmail(msgspec.Struct):
        another: int

    return SendEmail


def test_two_payload_types_of_one_name_keep_each_its_own_schema() -> None:
    def own(payload: Any) -> None: ...

    own.__annotations__["payload"] = same_name()
    handler("own")(own)
    document = describe()
    schemas = document["components"]["schemas"]
    payloads = {
        type: resolved(document, schemas[f"Job.{type}"]["properties"]["payload"]) for type in ("own", "send-email")
    }
    assert payloads["own"]["properties"].keys() == {"another"}
    assert payloads["send-email"]["properties"].keys() == {"to", "cc"}


class Pair(NamedTuple):
    left: int
    right: str


PAYLOADS = [
    object,
    Any,
    dict,
    dict[str, int],
    list[SendEmail],
    int,
    int | None,
    Pair,
    tuple[int, ...],
    msgspec.Raw,
    same_name(),
]


@pytest.mark.parametrize("payload", PAYLOADS, ids=str)
def test_describes_every_kind_of_payload_that_a_handler_may_take(near: Queue, payload: Any) -> None:
    def own(payload: Any) -> None: ...

    own.__annotations__["payload"] = payload
    handler("own")(own)
    answer = Client(API(Settings(), near)).get("/openapi.json")
    assert answer.status == 200
    assert "Job.own" in answer.json["components"]["schemas"]


# It is true -----------------------------------------------------------------------------------------------------------


def assert_conforms(answer: Answer, document: Any, method: str, path: str) -> None:
    """Whether an answer is of a status, content type and schema that the document has for it."""
    rs = pytest.importorskip("jsonschema_rs")
    response = resolved(document, operations(document)[method, path]["responses"][str(answer.status)])
    content = response["content"][answer.headers["content-type"]]
    rs.validate(content["schema"] | {"components": document["components"]}, answer.json)


@pytest.mark.parametrize("status", STATUSES)
def test_records_are_as_described(queue: Queue, api: Client, status: str) -> None:
    document = describe()
    job = put(queue, status, unique_key="u", expires_in=60)
    assert_conforms(api.get(f"/jobs/{job.id}"), document, "GET", "/jobs/{id}")
    queue.enqueue("echo", "x" * 2000)
    for path in ("/jobs", "/queues", "/stats", "/workers", "/whoami"):
        assert_conforms(api.get(path), document, "GET", path)
    assert_conforms(api.get("/stats?minutes=2"), document, "GET", "/stats")
    assert_conforms(api.call("POST", f"/jobs/{job.id}/retry"), document, "POST", "/jobs/{id}/retry")
    assert_conforms(api.call("DELETE", f"/jobs/{job.id}"), document, "DELETE", "/jobs/{id}")
    assert_conforms(api.post("/jobs/cancel", {}), document, "POST", "/jobs/cancel")
    assert_conforms(
        api.post("/jobs/batch?partial=true", [{"type": "nope", "payload": 1}]), document, "POST", "/jobs/batch"
    )


HANDLERS_PY = """
from dataclasses import dataclass
from tinyqueue import handler

@dataclass
class Image:
    path: str
    width: int = 100

@handler("echo")
def echo(payload: dict) -> dict:
    return payload

@handler("scale.image", queue="slow")
def scale(image: Image) -> None: ...
"""


def test_answers_as_described_to_whatever_is_sent(tmp_path: Path) -> None:
    """Requests made from the document: those that fit it must be taken, those that do not refused, and no answer may surprise."""
    pytest.importorskip("schemathesis")
    (tmp_path / "handlers.py").write_text(HANDLERS_PY)
    options = ["--max-examples", "200", "--generation-deterministic", "--no-color"]
    with running(tmp_path) as server:
        url = f"http://{server.address[0]}:{server.address[1]}/openapi.json"
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", url, *options]
        played = subprocess.run(command, cwd=CONFIG.parent.parent, capture_output=True, text=True, check=False)
    assert played.returncode == 0, played.stdout + played.stderr
    assert f"Tested: {len(ROUTES) - 1}" in played.stdout, "it did not play all of them"
