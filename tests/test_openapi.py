"""Test the OpenAPI document: it is valid and complete, and the API conforms to it."""

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
from test_http import TIMES, WHOLE_TIMES

from tinyqueue import (
    HANDLERS,
    KEY_LENGTH,
    MAX_ATTEMPTS,
    MAX_DELAY,
    MAX_JOBS,
    SCANNED,
    STATUSES,
    Queue,
    __version__,
    handler,
)
from tinyqueue_config import Settings
from tinyqueue_job import URL, URL_LENGTH
from tinyqueue_json import TIME
from tinyqueue_openapi import ecma_pattern
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
    """Return the payload.

    Only the first paragraph is published."""
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
    return {
        (method.upper(), path): operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }


def resolved(document: Any, part: Any) -> Any:
    """Follow references to the part that they name."""
    while "$ref" in part:
        target = part["$ref"]
        part = document
        for name in target.removeprefix("#/").split("/"):
            part = part[name.replace("~1", "/").replace("~0", "~")]
    return part


def in_braces(path: str) -> str:
    return path.replace("<", "{").replace(">", "}")


# Validity -------------------------------------------------------------------------------------------------------------


def test_document_is_valid_openapi(document: Any) -> None:
    pytest.importorskip("openapi_spec_validator").validate(document)


def test_document_has_the_structure_of_openapi(document: Any) -> None:
    assert re.fullmatch(r"3\.1\.\d+", document["openapi"])
    assert document["info"].keys() >= {"title", "version"}
    assert document["info"]["version"] == __version__
    assert document.keys() <= {"openapi", "info", "servers", "tags", "paths", "components", "security", "externalDocs"}
    tags = {tag["name"] for tag in document["tags"]}
    for operation in operations(document).values():
        assert operation["summary"]
        assert set(operation["tags"]) <= tags
        assert all(re.fullmatch("[1-5][0-9][0-9]", status) for status in operation["responses"])
        assert {"200", "201"} & operation["responses"].keys()
        for response in operation["responses"].values():
            assert resolved(document, response)["description"]


def test_every_reference_resolves_and_every_component_is_used(document: Any) -> None:
    used = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(document)))
    for target in used:
        assert target.startswith("#/")
        assert resolved(document, {"$ref": target})
    defined = {
        f"#/components/{kind}/{name}"
        for kind in ("parameters", "responses", "schemas")
        for name in document["components"][kind]
    }
    assert defined == used


@pytest.mark.parametrize("kind", ["parameters", "responses", "schemas", "securitySchemes"])
def test_component_names_are_identifiers(document: Any, kind: str) -> None:
    assert [name for name in document["components"][kind] if not re.fullmatch("[A-Za-z][A-Za-z0-9]*", name)] == []


def test_schema_names_differ_in_more_than_case(document: Any) -> None:
    names = [name.lower() for name in document["components"]["schemas"]]
    assert len(set(names)) == len(names)


def test_no_schema_has_the_name_of_a_type_of_typescript(document: Any) -> None:
    names = {"Array", "Date", "Error", "Map", "Object", "Partial", "Pick", "Promise", "Record", "Set", "Worker"}
    assert document["components"]["schemas"].keys() & names == set()


def test_document_uses_enum_where_a_value_is_constant(document: Any) -> None:
    assert "const" not in re.findall(r'"(\w+)": ', json.dumps(document))


def test_document_names_its_server_relative_to_itself(document: Any) -> None:
    assert [server["url"] for server in document["servers"]] == ["."]


def test_every_schema_is_valid_json_schema(document: Any) -> None:
    meta = pytest.importorskip("jsonschema_rs").meta
    for schema in document["components"]["schemas"].values():
        meta.validate(schema | {"$schema": "https://json-schema.org/draft/2020-12/schema"})


def test_every_path_parameter_is_described_once(document: Any) -> None:
    for (_, path), operation in operations(document).items():
        parameters = [resolved(document, parameter) for parameter in operation.get("parameters", [])]
        assert {p["name"] for p in parameters if p["in"] == "path"} == set(re.findall(r"{(\w+)}", path))
        assert all(p["required"] for p in parameters if p["in"] == "path")
        assert len({(p["in"], p["name"]) for p in parameters}) == len(parameters)


# Routes ---------------------------------------------------------------------------------------------------------------


def test_document_describes_exactly_the_routes(document: Any) -> None:
    assert operations(document).keys() == {(method, in_braces(path)) for method, path, *_ in ROUTES}


def test_operation_ids_are_a_verb_and_a_noun(document: Any) -> None:
    ids = [operation["operationId"] for operation in operations(document).values()]
    assert [
        id
        for id in ids
        if not re.fullmatch(
            "(get|list|put|remove|submit|cancel|retry|pause|resume|run|set|replay|purge|quiet|count)[A-Z][a-z]+", id
        )
    ] == []
    assert len(set(ids)) == len(ids)


BODY = {400, 413, 415, 422}
STATUSES_OF = {
    ("GET", "/ready"): {200},
    ("GET", "/openapi.json"): {200},
    ("GET", "/whoami"): {200},
    ("POST", "/jobs"): {200, 201} | BODY,
    ("POST", "/jobs/batch"): {200, 201} | BODY,
    ("GET", "/jobs"): {200, 400, 422},
    ("GET", "/jobs/count"): {200, 400, 422},
    ("GET", "/failures"): {200, 400, 422},
    ("GET", "/jobs/<id>"): {200, 400, 404},
    ("DELETE", "/jobs/<id>"): {200, 202, 404, 409},
    ("POST", "/jobs/<id>/retry"): {200, 404, 409},
    ("POST", "/jobs/retry"): {200} | BODY,
    ("POST", "/jobs/cancel"): {200} | BODY,
    ("POST", "/jobs/purge"): {200} | BODY,
    ("POST", "/jobs/<id>/run"): {200, 404, 409},
    ("POST", "/jobs/<id>/replay"): {200, 201, 404, 409} | BODY,
    ("POST", "/jobs/<id>/purge"): {200, 404, 409},
    ("GET", "/queues"): {200},
    ("POST", "/queues/<name>/pause"): {200, 404},
    ("POST", "/queues/<name>/resume"): {200, 404},
    ("GET", "/limits"): {200},
    ("PUT", "/limits/<limit>"): {200, 404} | BODY,
    ("GET", "/stats"): {200},
    ("GET", "/verdict"): {200},
    ("GET", "/workers"): {200},
    ("GET", "/types"): {200},
    ("GET", "/events"): {200, 404},
    ("POST", "/workers/<name>/quiet"): {200, 404},
    ("POST", "/workers/<name>/resume"): {200, 404},
    ("GET", "/audit"): {200, 400},
    ("GET", "/metrics"): {200},
}
EVERYWHERE = {400, 401, 403, 429, 500, 503}  # 400: invalid X-Forwarded-For


@pytest.mark.parametrize(("method", "path"), STATUSES_OF)
def test_document_describes_every_status_of_a_route(document: Any, method: str, path: str) -> None:
    described = {int(status) for status in operations(document)[method, in_braces(path)]["responses"]}
    assert described == STATUSES_OF[method, path] | EVERYWHERE


def test_dashboard_is_described_as_a_page_without_a_key(document: Any) -> None:
    page = operations(document)["GET", "/"]
    assert {int(status) for status in page["responses"]} == {200} | EVERYWHERE - {401, 429}
    assert page["security"] == [{}]


def test_health_is_described_as_always_ok_without_a_key(document: Any) -> None:
    health = operations(document)["GET", "/health"]
    assert health["responses"].keys() <= {"200", "500"}
    assert health["security"] == [{}]


def test_document_says_which_routes_require_a_key(document: Any) -> None:
    roles = {(method, in_braces(path)): role for method, path, _, role in ROUTES}
    requires = {route: {"key": []} in operation["security"] for route, operation in operations(document).items()}
    assert requires == {route: role not in ("", "page") for route, role in roles.items()}
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


def test_document_describes_every_field_and_filter(document: Any) -> None:
    schemas = document["components"]["schemas"]
    for kind in schemas["Job"]["oneOf"]:
        job = resolved(document, kind)
        assert job["properties"].keys() == {*FIELDS, "ref"}
        assert job["required"] == ["type", "payload"]
        assert job["additionalProperties"] is False
    assert schemas["Replay"]["properties"].keys() == FIELDS.keys() - {"type"}
    for name in ("PendingFilter", "EndedFilter", "PurgeFilter"):
        assert schemas[name]["properties"].keys() == {*FILTERS, "cursor", "most"}
        assert schemas[name]["properties"]["most"]["maximum"] == SCANNED
    listed = {resolved(document, part)["name"] for part in operations(document)["GET", "/jobs"]["parameters"]}
    assert listed == {*FILTERS, "limit", "cursor"}
    for path in ("/jobs/count", "/failures"):
        names = {resolved(document, part)["name"] for part in operations(document)["GET", path]["parameters"]}
        assert names == {*FILTERS, "cursor"}


def test_document_contains_the_limits_of_the_code(document: Any) -> None:
    schemas = document["components"]["schemas"]
    job = resolved(document, schemas["Job"]["oneOf"][0])["properties"]
    batch = operations(document)["POST", "/jobs/batch"]["requestBody"]["content"]["application/json"]["schema"]
    assert (job["maxAttempts"]["maximum"], job["uniqueKey"]["maxLength"]) == (MAX_ATTEMPTS, KEY_LENGTH)
    assert job["delay"]["maximum"] == job["expiresIn"]["maximum"] == MAX_DELAY
    assert (batch["minItems"], batch["maxItems"]) == (1, MAX_JOBS)
    assert schemas["Status"]["enum"] == list(STATUSES)
    assert document["components"]["parameters"]["minutes"]["schema"]["maximum"] == 120
    assert str(LONGEST_WAIT) in document["components"]["parameters"]["wait"]["description"]


def test_document_describes_the_forms_of_a_time_that_the_server_reads(document: Any) -> None:
    job = resolved(document, document["components"]["schemas"]["Job"]["oneOf"][0])
    [pattern] = [kind["pattern"] for kind in job["properties"]["runAt"]["anyOf"] if "pattern" in kind]
    assert pattern == "^" + re.sub(r"\(\?<\w+>", "(", ecma_pattern(TIME.pattern)) + "$"


def test_document_describes_the_urls_that_the_server_takes(document: Any) -> None:
    job = resolved(document, document["components"]["schemas"]["Job"]["oneOf"][0])
    url = job["properties"]["callbackUrl"]
    assert url["pattern"] == "^" + re.sub(r"\(\?<\w+>", "(", ecma_pattern(URL.pattern)) + "$"
    assert url["maxLength"] == URL_LENGTH


# Job types ------------------------------------------------------------------------------------------------------------


def test_document_has_one_schema_for_each_job_type(document: Any) -> None:
    kinds = [resolved(document, kind) for kind in document["components"]["schemas"]["Job"]["oneOf"]]
    assert [kind["properties"]["type"]["enum"] for kind in kinds] == [[type] for type in HANDLERS]
    assert kinds[0]["properties"]["type"]["description"] == "Return the payload."


JOBS = {
    "anything": ({"type": "echo", "payload": [None, 1, {}]}, True),
    "e-mail": ({"type": "send-email", "payload": {"to": "a", "cc": ["b"]}}, True),
    "image": ({"type": "scale.image", "payload": {"path": "a", "crop": {"width": 1}}}, True),
    "options": ({"type": "echo", "payload": 1, "delay": 1.5, "queue": "q", "maxAttempts": 3, "uniqueKey": "u"}, True),
    "nulls": ({"type": "echo", "payload": 1} | dict.fromkeys(FIELDS.keys() - {"type", "payload"}), True),
    "unknown type": ({"type": "nope", "payload": 1}, False),
    "missing payload": ({"type": "echo"}, False),
    "invalid payload": ({"type": "send-email", "payload": {"to": 1}}, False),
    "payload of another type": ({"type": "scale.image", "payload": {"to": "a"}}, False),
    "unknown field": ({"type": "echo", "payload": 1, "priority": 1}, False),
    "invalid queue": ({"type": "echo", "payload": 1, "queue": "a b"}, False),
    "queue ending in a newline": ({"type": "echo", "payload": 1, "queue": "a\n"}, False),
    "zero maxAttempts": ({"type": "echo", "payload": 1, "maxAttempts": 0}, False),
    "whole floats": (
        {"type": "scale.image", "payload": {"path": "a", "crop": {"width": 7.0}}, "maxAttempts": 3.0},
        True,
    ),
    "fractional float for an integer": (
        {"type": "scale.image", "payload": {"path": "a", "crop": {"width": 7.5}}},
        False,
    ),
    "delay and runAt": ({"type": "echo", "payload": 1, "delay": 1, "runAt": 1}, False),
    "callbackUrl": ({"type": "echo", "payload": 1, "callbackUrl": "https://[2606::1]:65535/a?b=@"}, True),
    "callbackUrl with a user": ({"type": "echo", "payload": 1, "callbackUrl": "https://user@a.example/"}, False),
    "callbackUrl with port 65536": ({"type": "echo", "payload": 1, "callbackUrl": "http://a.example:65536"}, False),
    "callbackUrl with a fragment": ({"type": "echo", "payload": 1, "callbackUrl": "http://a.example/#b"}, False),
    "callbackUrl of another scheme": ({"type": "echo", "payload": 1, "callbackUrl": "ftp://a.example/"}, False),
    "zero expiresIn": ({"type": "echo", "payload": 1, "expiresIn": 0}, False),
    "runAt in words": ({"type": "echo", "payload": 1, "runAt": "tomorrow"}, False),
    "runAt without a zone": ({"type": "echo", "payload": 1, "runAt": "2026-01-01T00:00:00"}, False),
    "runAt with an incomplete zone": ({"type": "echo", "payload": 1, "runAt": "2026-01-01T00:00:00+0"}, False),
    "runAt that is a date": ({"type": "echo", "payload": 1, "runAt": "2026-01-01"}, False),
    "runAt in a leap second": ({"type": "echo", "payload": 1, "runAt": "2016-12-31T23:59:60Z"}, True),
    "fractional runAt": ({"type": "echo", "payload": 1, "runAt": 1.5}, False),
}
for language, spelled in (TIMES | WHOLE_TIMES).items():
    run_at = spelled.format(day="2026-01-31", basic="20260131")
    JOBS[f"runAt of {language}"] = ({"type": "echo", "payload": 1, "runAt": run_at}, True)


@pytest.mark.parametrize(("job", "valid"), JOBS.values(), ids=JOBS.keys())
def test_schema_accepts_the_same_jobs_as_the_server(document: Any, near: Queue, job: Any, valid: bool) -> None:
    rs = pytest.importorskip("jsonschema_rs")
    schema = {"$ref": "#/components/schemas/Job", "components": document["components"]}
    assert rs.is_valid(schema, job, validate_formats=True) == valid
    assert (Client(API(Settings(), near)).post("/jobs", job).status == 201) == valid


class Record(msgspec.Struct):
    mine: int


class Problem(msgspec.Struct):
    mine: int
    record: Record


@dataclasses.dataclass
class Job:
    mine: int


@pytest.mark.parametrize("payload", [Record, Problem, Job], ids=lambda payload: payload.__name__)
def test_payload_type_does_not_replace_a_schema_of_the_same_name(payload: Any) -> None:
    before = describe()["components"]["schemas"]

    def own(payload: Any) -> None: ...

    own.__annotations__["payload"] = payload
    handler("own")(own)
    schemas = describe()["components"]["schemas"]
    assert {name: schemas.get(name) for name in before if name != "Job"} == {
        name: before[name] for name in before if name != "Job"
    }
    assert "mine" in json.dumps(schemas["OwnJob"]) + json.dumps(schemas)
    assert len(schemas["Job"]["oneOf"]) == len(HANDLERS)


def same_name() -> Any:
    class SendEmail(msgspec.Struct):
        another: int

    return SendEmail


def test_payload_types_of_the_same_name_keep_separate_schemas() -> None:
    def own(payload: Any) -> None: ...

    own.__annotations__["payload"] = same_name()
    handler("own")(own)
    document = describe()
    schemas = document["components"]["schemas"]
    payloads = {name: resolved(document, schemas[name]["properties"]["payload"]) for name in ("OwnJob", "SendEmailJob")}
    assert payloads["OwnJob"]["properties"].keys() == {"another"}
    assert payloads["SendEmailJob"]["properties"].keys() == {"to", "cc"}


def test_types_that_make_the_same_name_keep_separate_schemas() -> None:
    def own(payload: Any) -> None: ...

    for type in ("send_email", "Send.Email", "9-lives"):
        own.__annotations__["payload"] = same_name()
        handler(type)(own)
    schemas = describe()["components"]["schemas"]
    names = [job["$ref"].rpartition("/")[2] for job in schemas["Job"]["oneOf"]]
    assert names[-4:] == ["ScaleImageJob", "SendEmailJob2", "SendEmailJob3", "Type9LivesJob"]
    assert [schemas[name]["properties"]["type"]["enum"] for name in names] == [[type] for type in HANDLERS]


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
def test_document_describes_every_supported_payload_type(near: Queue, payload: Any) -> None:
    def own(payload: Any) -> None: ...

    own.__annotations__["payload"] = payload
    handler("own")(own)
    answer = Client(API(Settings(), near)).get("/openapi.json")
    assert answer.status == 200
    assert "OwnJob" in answer.json["components"]["schemas"]


# Conformance ----------------------------------------------------------------------------------------------------------


def assert_conforms(answer: Answer, document: Any, method: str, path: str) -> None:
    """Check that the document describes the status, the content type and the body of an answer."""
    rs = pytest.importorskip("jsonschema_rs")
    response = resolved(document, operations(document)[method, path]["responses"][str(answer.status)])
    content = response["content"][answer.headers["content-type"]]
    rs.validate(content["schema"] | {"components": document["components"]}, answer.json)


@pytest.mark.parametrize("status", STATUSES)
def test_answers_conform_to_the_document(queue: Queue, api: Client, status: str) -> None:
    document = describe()
    job = put(queue, status, unique_key="u", expires_in=60)
    assert_conforms(api.get(f"/jobs/{job.id}"), document, "GET", "/jobs/{id}")
    queue.enqueue("echo", "x" * 2000)
    reads = ("/jobs", "/jobs/count", "/failures", "/queues", "/stats", "/verdict", "/workers", "/audit", "/whoami")
    for path in (*reads, "/types"):
        assert_conforms(api.get(path), document, "GET", path)
    assert_conforms(api.get("/stats?minutes=2"), document, "GET", "/stats")
    assert_conforms(api.call("POST", f"/jobs/{job.id}/retry"), document, "POST", "/jobs/{id}/retry")
    assert_conforms(api.call("DELETE", f"/jobs/{job.id}"), document, "DELETE", "/jobs/{id}")
    assert_conforms(api.post("/jobs/cancel", {}), document, "POST", "/jobs/cancel")
    assert_conforms(api.call("POST", f"/jobs/{job.id}/run"), document, "POST", "/jobs/{id}/run")
    again = api.call("POST", f"/jobs/{job.id}/replay")
    assert_conforms(again, document, "POST", "/jobs/{id}/replay")
    assert_conforms(api.get(f"/jobs/{again.json.get('jobId', job.id)}"), document, "GET", "/jobs/{id}")
    assert_conforms(api.call("POST", f"/jobs/{job.id}/purge"), document, "POST", "/jobs/{id}/purge")
    assert_conforms(api.post("/jobs/purge", {"status": "cancelled"}), document, "POST", "/jobs/purge")
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


def test_api_conforms_to_the_document_for_generated_requests(tmp_path: Path) -> None:
    """Send requests generated from the document. The server must accept the valid ones, reject the
    invalid ones, and send only answers that the document describes."""
    pytest.importorskip("schemathesis")
    (tmp_path / "handlers.py").write_text(HANDLERS_PY)
    options = ["--max-examples", "200", "--generation-deterministic", "--no-color"]
    with running(tmp_path) as server:
        url = f"http://{server.address[0]}:{server.address[1]}/openapi.json"
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", url, *options]
        done = subprocess.run(command, cwd=CONFIG.parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tested = len(ROUTES) - 1  # not getEvents, whose answer does not end
    assert f"Tested: {tested}" in done.stdout, "schemathesis did not test every operation"
