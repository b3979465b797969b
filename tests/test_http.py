"""The HTTP API: submitting and reading jobs, errors, and how the server handles connections."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from client import NO_BODY, PROBLEM, Answer, Client, Wire, serving, spell
from conftest import Server, dump, free_port, put, raw, until

import tinyqueue
import tinyqueue_redis
import tinyqueue_server
from tinyqueue import ID, MAX_ATTEMPTS, MAX_DELAY, STATUSES, Queue, handler
from tinyqueue_config import Settings
from tinyqueue_handler import BUILT_IN
from tinyqueue_json import MAX_DEPTH
from tinyqueue_problems import RETRY_AFTER
from wsgi import API, FIELDS, ROUTES

REPOSITORY = Path(tinyqueue.__file__).parent
SECRET = "S3cr3tPw"


class SendEmail(msgspec.Struct, forbid_unknown_fields=True):
    to: str
    cc: list[str] = []


def echo(payload: object) -> object:
    return payload


def send_email(email: SendEmail) -> None:
    """Never runs in these tests."""


@pytest.fixture(autouse=True)
def handlers(no_handlers: None) -> None:
    handler("echo")(echo)
    handler("send-email", max_attempts=5, queue="mail")(send_email)


Refuse = Callable[..., dict[str, Any]]


@pytest.fixture
def refuse(api: Client, queue: Queue) -> Refuse:
    """Send a request, check that it is refused and stores nothing, and return the problem."""
    queue.enqueue("echo", "stored before")

    def refuse(
        status: int, kind: str, body: Any = NO_BODY, *, path: str = "/jobs", method: str = "POST", headers: Any = None
    ) -> dict[str, Any]:
        before = dump(queue)
        answer = api.call(method, path, body, headers)
        assert (answer.status, answer.kind) == (status, kind), answer
        assert answer.headers["cache-control"] == "no-store"
        assert dump(queue) == before
        about: dict[str, Any] = answer.problem
        return about

    return refuse


def accepted_job(answer: Answer, api: Client) -> Any:
    """Return the record of the job that an answer reports as accepted."""
    assert answer.status == 201, answer
    return api.get(answer.headers["location"]).json


def echo_with(**fields: Any) -> dict[str, Any]:
    return {"type": "echo", "payload": None} | fields


# Submit and show ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "detail"),
    [
        ("GET", "/jobs/nope", "not a job id; "),
        ("DELETE", "/jobs/nope", "not a job id; "),
        ("POST", "/jobs/nope/retry", "not a job id; "),
        ("GET", "/jobs/nope/log", "not a job id; "),
        ("POST", "/queues/a%20b/pause", "not the name of a queue; "),
        ("PUT", "/limits/charge/a%20b", "not the name of a limit; "),
        ("GET", "/nope", "unknown path; see /openapi.json"),
    ],
)
def test_path_without_a_route_says_what_is_wrong_with_it(api: Client, method: str, path: str, detail: str) -> None:
    answer = api.call(method, path)
    assert (answer.status, answer.kind) == (404, "not-found")
    assert answer.problem["detail"].startswith(detail)


def test_submit_answers_201_with_id_and_location(api: Client) -> None:
    answer = api.post("/jobs", {"type": "echo", "payload": {"n": 1}})
    assert answer.status == 201
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json == {"jobId": answer.json["jobId"], "status": "pending"}
    assert ID.fullmatch(answer.json["jobId"])
    assert answer.headers["location"] == f"jobs/{answer.json['jobId']}"  # relative to /jobs


def test_show_returns_the_whole_record_of_a_new_job(api: Client) -> None:
    answer = api.post("/jobs", {"type": "send-email", "payload": {"to": "ann@example.org"}})
    id = answer.json["jobId"]
    created = int(id[:8] + id[9:13], 16)
    todo = "start one: tinyqueue worker --queue mail"
    assert api.get(f"/jobs/{id}").json == {
        "id": id,
        "type": "send-email",
        "payload": {"to": "ann@example.org"},
        "status": "pending",
        "attempts": 0,
        "maxAttempts": 5,
        "queue": "mail",
        "createdAt": created,
        "updatedAt": created,
        "why": {
            "reason": "notServed",
            "text": f"waits, because no live worker serves its queue mail; {todo}",
            "queue": "mail",
        },
    }


def test_submit_accepts_every_field(api: Client) -> None:
    job = accepted_job(api.post("/jobs", echo_with(maxAttempts=7, queue="slow", delay=60)), api)
    assert (job["maxAttempts"], job["queue"], job["runAt"]) == (7, "slow", job["createdAt"] + 60_000)


def test_submit_puts_the_job_where_a_worker_takes_it(api: Client, queue: Queue) -> None:
    id = api.post("/jobs", echo_with(payload="mine")).json["jobId"]
    worker = queue.register(["default"], 1)
    assert [(job.id, job.payload) for job in queue.dequeue(worker, ["default"])] == [(id, "mine")]


BASE = {"id", "type", "payload", "status", "attempts", "maxAttempts", "queue", "createdAt", "updatedAt"}
SHOWN = {
    "pending": BASE | {"why"},
    "processing": BASE | {"startedAt", "worker", "history"},
    "completed": BASE | {"startedAt", "endedAt", "worker", "history", "result"},
    "failed": BASE | {"startedAt", "endedAt", "worker", "history", "error"},
    "cancelled": BASE | {"endedAt"},
}


@pytest.mark.parametrize("status", STATUSES)
def test_show_returns_exactly_the_fields_of_each_status(api: Client, queue: Queue, status: str) -> None:
    job = api.get(f"/jobs/{put(queue, status).id}").json
    assert job["status"] == status
    assert job.keys() == SHOWN[status]


@pytest.mark.parametrize("status", STATUSES)
def test_show_returns_times_in_whole_milliseconds(api: Client, queue: Queue, status: str) -> None:
    job = api.get(f"/jobs/{put(queue, status).id}").json
    times = [job[name] for name in ("createdAt", "startedAt", "endedAt") if name in job]
    assert {type(time) for time in times} == {int}
    assert times == sorted(times)
    assert job["updatedAt"] == times[-1]
    assert (
        datetime(2024, 1, 1, tzinfo=UTC)
        < datetime.fromtimestamp(times[0] / 1000, UTC)
        < datetime(2100, 1, 1, tzinfo=UTC)
    )


def test_show_returns_the_error_of_a_failed_job(api: Client, queue: Queue) -> None:
    error = api.get(f"/jobs/{put(queue, 'failed').id}").json["error"]
    assert {"type", "message"} <= error.keys() <= {"type", "message", "traceback"}
    assert all(isinstance(text, str) and text for text in error.values())


def test_show_returns_a_null_result(api: Client, queue: Queue) -> None:
    id = queue.enqueue("echo", 1).id
    [job] = queue.dequeue(queue.register(["default"], 1), ["default"])
    queue.complete(job, None)
    assert api.get(f"/jobs/{id}").json["result"] is None


PAYLOADS = {
    "null": "null",
    "true": "true",
    "empty string": '""',
    "NUL": '{"\\u0000": "a\\u0000b"}',
    "string": '"\\ud83d\\ude00 \\u00e9 \\u2028 \\" \\\\ </script>"',
    "minus zero": "-0.0",
    "small": "5e-324",
    "large": "1.7976931348623157e308",
    "fraction": "0.1",
    "2**53 + 1": "9007199254740993",
    "2**63": str(2**63),
    "2**64 + 1": str(2**64 + 1),
    "30 digits": "123456789012345678901234567890",
    "-10**100": str(-(10**100)),
    "4000 digits": "7" * 4000,
    "empty object": "{}",
    "odd names": '{"": {"type": "x"}, "id": 1, "status": "failed", "$": [[], {}]}',
    "null among others": f'[null, {10**40}, "null"]',
    "deep arrays": "[" * MAX_DEPTH + "]" * MAX_DEPTH,
    "deep objects": '{"a":' * MAX_DEPTH + "1" + "}" * MAX_DEPTH,
    "white space": " \t\r\n [ 1 , 2 ] \n",
}


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS.keys())
def test_submit_stores_a_payload_exactly(api: Client, payload: str) -> None:
    answer = api.post("/jobs", b'{"type":"echo","payload":%b}' % payload.encode())
    assert repr(accepted_job(answer, api)["payload"]) == repr(json.loads(payload))


def test_submit_stores_a_payload_of_raw_utf8(api: Client) -> None:
    body = '{"type":"echo","payload":"é😀\u2028"}'.encode()
    assert accepted_job(api.post("/jobs", body), api)["payload"] == "é😀\u2028"


@pytest.mark.parametrize("value", [1, 2, 3.0, 1e1, MAX_ATTEMPTS])
def test_submit_accepts_whole_numbers_of_attempts(api: Client, value: float) -> None:
    attempts = accepted_job(api.post("/jobs", echo_with(maxAttempts=value)), api)["maxAttempts"]
    assert (attempts, type(attempts)) == (value, int)


@pytest.mark.parametrize("name", ["maxAttempts", "queue", "delay", "runAt"])
def test_submit_treats_a_null_field_as_absent(api: Client, name: str) -> None:
    job = accepted_job(api.post("/jobs", {"type": "send-email", "payload": {"to": "a"}, name: None}), api)
    assert job.keys() == SHOWN["pending"]
    assert (job["maxAttempts"], job["queue"]) == (5, "mail")


@pytest.mark.parametrize("delay", [0.4, 1, 1.5, 3600, MAX_DELAY])
def test_submit_accepts_a_delay_in_seconds(api: Client, delay: float) -> None:
    job = accepted_job(api.post("/jobs", echo_with(delay=delay)), api)
    assert (job["status"], job["runAt"]) == ("pending", job["createdAt"] + round(delay * 1000))


@pytest.mark.parametrize(
    "when",
    [{"delay": 0}, {"delay": 0.0}, {"delay": -0.0}]
    + [{"runAt": at} for at in (0, 1, -1, 1_700_000_000, 1_700_000_000_000, -(10**30))]
    + [{"runAt": at} for at in ("1970-01-01T00:00:00Z", "1969-12-31T23:59:59-01:00", "0001-01-01T00:00:00+14:00")],
    ids=str,
)
def test_submit_queues_a_job_at_once_when_it_is_already_due(api: Client, queue: Queue, when: dict[str, Any]) -> None:
    job = accepted_job(api.post("/jobs", echo_with(**when)), api)
    assert "runAt" not in job
    assert queue.waiting(["default"]) == 1


@pytest.mark.parametrize(
    ("spelled", "hours"),
    [("%FT%TZ", 0), ("%FT%T+00:00", 0), ("%FT%T.250+05:00", 5), ("%F %T-11:00", -11)],
)
def test_submit_accepts_a_run_time_with_a_zone(api: Client, spelled: str, hours: int) -> None:
    run_at = datetime.now(timezone(timedelta(hours=hours))).replace(microsecond=0) + timedelta(days=2)
    job = accepted_job(api.post("/jobs", echo_with(runAt=run_at.strftime(spelled))), api)
    assert job["runAt"] == run_at.timestamp() * 1000 + (250 if ".250" in spelled else 0)


TIMES = {  # as the documentation of each language shows its own output, for 09:15:30.123456789 UTC of a day
    "Java Instant": "{day}T09:15:30.123456789Z",
    "Java OffsetDateTime": "{day}T10:15:30.123456789+01:00",
    "Java ZonedDateTime": "{day}T10:15:30.123456789+01:00[Europe/Paris]",
    "Java SimpleDateFormat with Z": "{day}T10:15:30.123+0100",
    "Java with seconds of an offset": "{day}T09:34:51.123+00:19:21[Europe/Amsterdam]",
    "Go RFC3339Nano": "{day}T10:15:30.123456789+01:00",
    "Go Time.String": "{day} 10:15:30.123456789 +0100 CET",
    "Go Time.String of now": "{day} 10:15:30.123456789 +0100 CET m=+0.000012345",
    "Go Time.String without a name": "{day} 06:15:30.123456789 -0300 -03",
    "JavaScript toISOString": "{day}T09:15:30.123Z",
    "JavaScript Temporal.ZonedDateTime": "{day}T10:15:30.123456789+01:00[Europe/Paris][u-ca=gregory]",
    "PHP DATE_RFC3339_EXTENDED": "{day}T10:15:30.123+01:00",
    "PHP DATE_ISO8601 with milliseconds": "{day}T10:15:30.123+0100",
    "Ruby Time#inspect": "{day} 10:15:30.123456789 +0100",
    "Ruby Time#inspect in UTC": "{day} 09:15:30.123456789 UTC",
    "Ruby iso8601(3)": "{day}T10:15:30.123+01:00",
    ".NET": "{day}T09:15:30.1234567Z",
    "Python str": "{day} 09:15:30.123456+00:00",
    "lower case": "{day}t09:15:30.123z",
    "comma": "{day}T09:15:30,123Z",
    "hours of an offset": "{day}T04:15:30.123-05",
    "basic format": "{basic}T091530.123Z",
    "basic format with an offset": "{basic}T101530.123+0100",
}
WHOLE_TIMES = {  # for 09:00 UTC
    "Java OffsetDateTime": "{day}T10:00+01:00",
    "Java Instant": "{day}T09:00:00Z",
    "Go RFC3339": "{day}T10:00:00+01:00",
    "PHP DATE_ATOM": "{day}T10:00:00+01:00",
    "PHP DATE_ISO8601": "{day}T10:00:00+0100",
    "Ruby Time#to_s": "{day} 10:00:00 +0100",
    "Ruby Time#to_s in UTC": "{day} 09:00:00 UTC",
    "hours": "{day}T09Z",
    "basic format": "{basic}T0900Z",
    "RFC 3339 with an unknown zone": "{day}T09:00:00-00:00",
}


def spell_day(spelled: str, hour: int) -> tuple[str, datetime]:
    day = datetime.now(UTC).replace(hour=hour, minute=0, second=0, microsecond=0) + timedelta(days=2)
    return spelled.format(day=f"{day:%F}", basic=f"{day:%Y%m%d}"), day


@pytest.mark.parametrize("spelled", TIMES.values(), ids=TIMES.keys())
def test_submit_accepts_a_run_time_as_other_languages_write_it(api: Client, spelled: str) -> None:
    text, day = spell_day(spelled, 9)
    job = accepted_job(api.post("/jobs", echo_with(runAt=text)), api)
    assert job["runAt"] == day.timestamp() * 1000 + (15 * 60 + 30) * 1000 + 123


@pytest.mark.parametrize("spelled", WHOLE_TIMES.values(), ids=WHOLE_TIMES.keys())
def test_submit_accepts_a_whole_run_time_as_other_languages_write_it(api: Client, spelled: str) -> None:
    text, day = spell_day(spelled, 9)
    assert accepted_job(api.post("/jobs", echo_with(runAt=text)), api)["runAt"] == day.timestamp() * 1000


@pytest.mark.parametrize("spelled", ["{day}T23:59:60Z", "{basic}T235960.000Z", "{day} 20:29:60 -0330"])
def test_submit_accepts_a_leap_second_as_the_second_after_it(api: Client, spelled: str) -> None:
    text, day = spell_day(spelled, 0)
    assert accepted_job(api.post("/jobs", echo_with(runAt=text)), api)["runAt"] == (day.timestamp() + 86_400) * 1000


def test_submit_refuses_a_delay_beyond_its_expiry(refuse: Refuse) -> None:
    assert refuse(422, "invalid-job", echo_with(delay=60, expiresIn=60))["field"] == "expiresIn"


def test_submit_accepts_a_run_time_in_milliseconds(api: Client, queue: Queue) -> None:
    run_at = queue.now() + 86_400_000
    assert accepted_job(api.post("/jobs", echo_with(runAt=run_at)), api)["runAt"] == run_at


@pytest.mark.parametrize("name", ["default", "a" * 100, "A.b_c-1", "0", "..", "dead", "failed"])
def test_submit_accepts_any_valid_queue_name(api: Client, queue: Queue, name: str) -> None:
    assert accepted_job(api.post("/jobs", echo_with(queue=name)), api)["queue"] == name
    assert queue.waiting([name]) == 1


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        "APPLICATION/JSON;Charset=UTF-8",
        "Application/Json ;",
        " application/json ",
    ],
)
def test_submit_accepts_every_spelling_of_the_content_type(api: Client, content_type: str) -> None:
    assert api.post("/jobs", echo_with(), {"Content-Type": content_type}).status == 201


def test_submit_ignores_the_accept_header(api: Client) -> None:
    assert api.post("/jobs", echo_with(), {"Accept": "text/html"}).status == 201


# Refuse invalid JSON --------------------------------------------------------------------------------------------------

VALID = b'{"type":"echo","payload":1}'
NOT_JSON = {
    "empty": b"",
    "white space": b" \n",
    "truncated": VALID[:-1],
    "truncated string": b'{"type":"ech',
    "trailing text": VALID + b" x",
    "trailing bracket": VALID + b"}",
    "trailing NUL": VALID + b"\0",
    "two documents": VALID + VALID,
    "form": b"type=echo&payload=1",
    "comment": VALID[:-1] + b"/* */}",
    "trailing comma": VALID[:-1] + b",}",
    "single quotes": b"{'type':'echo','payload':1}",
    "bare word": b"hello",
    "NaN": b'{"type":"echo","payload":{"x":NaN}}',
    "Infinity": b'{"type":"echo","payload":[Infinity]}',
    "-Infinity": b'{"type":"echo","payload":-Infinity}',
    "1e999": b'{"type":"echo","payload":1e999}',
    "-1e999": b'{"type":"echo","payload":{"a":[-1e999]}}',
    "NaN attempts": b'{"type":"echo","payload":1,"maxAttempts":NaN}',
    "5000 digits": b'{"type":"echo","payload":%b}' % (b"9" * 5000),
    "leading zero": b'{"type":"echo","payload":01}',
    "leading plus": b'{"type":"echo","payload":+1}',
    "hexadecimal": b'{"type":"echo","payload":0x10}',
    "bare point": b'{"type":"echo","payload":.5}',
    "invalid UTF-8": b'{"type":"echo","payload":"\xff\xfe"}',
    "cut UTF-8": b'{"type":"echo","payload":"\xc3"}',
    "overlong UTF-8": b'{"type":"echo","payload":"\xc0\xaf"}',
    "surrogate in UTF-8": b'{"type":"echo","payload":"\xed\xa0\x80"}',
    "Latin-1": '{"type":"echo","payload":"é"}'.encode("latin-1"),
    "UTF-16": VALID.decode().encode("utf-16"),
    "UTF-16LE": VALID.decode().encode("utf-16-le"),
    "UTF-32BE": VALID.decode().encode("utf-32-be"),
    "BOM": b"\xef\xbb\xbf" + VALID,
    "raw control character": b'{"type":"echo","payload":"\x01"}',
    "raw newline in a string": b'{"type":"echo","payload":"a\nb"}',
    "bad escape": b'{"type":"echo","payload":"\\x41"}',
    "incomplete escape": b'{"type":"echo","payload":"\\u00"}',
    "duplicate name": b'{"type":"echo","payload":1,"type":"echo"}',
    "duplicate name inside": b'{"type":"echo","payload":{"a":1,"b":2,"a":1}}',
    "duplicate name deep inside": b'{"type":"echo","payload":[[{"x":{"a":1,"\\u0061":2}}]]}',
    "duplicate name of surrogates": b'{"type":"echo","payload":{"\\ud800":1,"\\ud800":2}}',
    "name that is not a string": b'{1:2,"type":"echo","payload":1}',
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_refuse_a_body_that_is_not_json(refuse: Refuse, body: bytes) -> None:
    assert refuse(400, "not-json", body)["detail"].startswith("the body is not JSON: ")


DEEP = {"arrays": (b"[", b"]"), "objects": (b'{"":', b"}"), "both": (b'[{"":', b"}]")}


@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, MAX_DEPTH + 2, 900, 5000, 20000, 45000])
@pytest.mark.parametrize("shape", DEEP)
def test_refuse_a_body_that_is_nested_too_deep(refuse: Refuse, shape: str, levels: int) -> None:
    left, right = DEEP[shape]
    levels = -(-levels // len(right))  # "both" nests two levels at a time
    payload = left * levels + b"1" + right * levels
    assert "nested deeper than" in refuse(400, "not-json", b'{"type":"echo","payload":%b}' % payload)["detail"]


@pytest.mark.parametrize("levels", [900, 5000, 20000, 45000])
def test_refuse_a_body_that_is_nested_too_deep_and_unclosed(refuse: Refuse, levels: int) -> None:
    refuse(400, "not-json", b'{"type":"echo","payload":' + b"[" * levels)


def test_accept_a_payload_of_the_greatest_depth_in_every_element(api: Client) -> None:
    deep = json.loads("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1))
    wide = [deep] * 20
    assert accepted_job(api.post("/jobs", echo_with(payload=wide)), api)["payload"] == wide


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/problem+json",
        "application/jsonx",
        "application/json, text/plain",
        "application/*",
        "x; application/json",
    ],
)
def test_refuse_another_content_type(refuse: Refuse, content_type: str) -> None:
    refuse(415, "unsupported-media-type", echo_with(), headers={"Content-Type": content_type})


@pytest.mark.parametrize("coding", ["gzip", "zstd", "br", "GZIP", "identity, gzip", "x" * 500, "\xff"], ids=ascii)
@pytest.mark.parametrize("path", ["/jobs", "/jobs/batch", "/jobs/retry"])
def test_refuse_a_compressed_body_and_name_its_encoding(
    refuse: Refuse, api: Client, queue: Queue, path: str, coding: str
) -> None:
    headers = {"Content-Encoding": coding}
    problem = refuse(415, "unsupported-media-type", gzip.compress(VALID), path=path, headers=headers)
    assert f"Content-Encoding {ascii(coding.lower())[1:-1][:100]} is not supported" in problem["detail"]
    answer = api.call("POST", path, VALID, headers)
    assert (answer.status, answer.headers["accept-encoding"]) == (415, "identity")


@pytest.mark.parametrize("coding", ["identity", "Identity", " identity "])
def test_accept_a_body_that_is_declared_as_not_compressed(api: Client, coding: str) -> None:
    assert api.call("POST", "/jobs", VALID, {"Content-Encoding": coding}).status == 201


def test_refuse_a_request_without_content_type_and_body(refuse: Refuse) -> None:
    refuse(415, "unsupported-media-type")


def sized(size: int) -> bytes:
    return b'{"type":"echo","payload":"%b"}' % (b"x" * (size - 28))


def test_accept_a_body_of_the_greatest_size(queue: Queue) -> None:
    assert Client(API(Settings(max_body=4096), queue)).post("/jobs", sized(4096)).status == 201


@pytest.mark.parametrize("size", [4097, 8192, 500_000])
def test_refuse_a_body_that_is_too_large(queue: Queue, size: int) -> None:
    answer = Client(API(Settings(max_body=4096), queue)).post("/jobs", sized(size))
    assert (answer.status, answer.kind) == (413, "too-large")
    assert "4096" in answer.problem["detail"]
    assert dump(queue) == {}


# Refuse invalid jobs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [[], ["echo"], "echo", 1, 1.5, True, None], ids=str)
def test_refuse_a_job_that_is_not_an_object(refuse: Refuse, body: Any) -> None:
    assert refuse(422, "invalid-job", body)["field"] == "job"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "type"),
        ({"type": "echo"}, "payload"),
        ({"payload": 1}, "type"),
        ({"type": "echo", "delay": "x"}, "payload"),
    ],
    ids=str,
)
def test_refuse_a_job_without_a_required_field(refuse: Refuse, body: Any, field: str) -> None:
    about = refuse(422, "invalid-job", body)
    assert (about["field"], about["detail"]) == (field, f"{field}: is required")


@pytest.mark.parametrize(
    "name", ["typ", "Type", "max_attempts", "maxattempts", "priority", "id", "status", "jobId", "", " type"]
)
def test_refuse_an_unknown_field_and_list_the_known_ones(refuse: Refuse, name: str) -> None:
    about = refuse(422, "invalid-job", echo_with(**{name: 1}))
    assert about["field"] == name
    assert all(field in about["detail"] for field in FIELDS)


@pytest.mark.parametrize("name", ["\0", "\ud800", "é", "a\nb", '"', "x" * 5000], ids=ascii)
def test_refuse_an_unknown_field_of_any_name(refuse: Refuse, name: str) -> None:
    assert len(refuse(422, "invalid-job", echo_with(**{name: 1}))["field"]) <= 100


@pytest.mark.parametrize(
    "type", ["nope", "", "Echo", "echo ", "ec\0ho", "\ud800", "é", "x" * 5000, "send_email"], ids=ascii
)
def test_refuse_an_unknown_type_and_list_the_known_ones(refuse: Refuse, type: str) -> None:
    about = refuse(422, "unknown-type", {"type": type, "payload": 1})
    assert (about["field"], sorted({*about["known"]} - {*BUILT_IN})) == ("type", ["echo", "send-email"])
    assert "echo, " in about["detail"]
    assert len(about["detail"]) < 500


@pytest.mark.parametrize("type", [None, 1, 1.5, True, [], {}, ["echo"]], ids=str)
def test_refuse_a_type_that_is_not_a_string(refuse: Refuse, type: Any) -> None:
    assert refuse(422, "invalid-job", {"type": type, "payload": 1})["field"] == "type"


@pytest.mark.parametrize(
    ("payload", "path"),
    [
        ({}, "$"),
        ("ann@example.org", "$"),
        (None, "$"),
        ([], "$"),
        ({"to": 1}, "$.to"),
        ({"to": None}, "$.to"),
        ({"to": ["a"]}, "$.to"),
        ({"to": "a", "cc": "b"}, "$.cc"),
        ({"to": "a", "cc": ["b", 1]}, "$.cc[1]"),
        ({"to": "a", "bcc": "b"}, "$"),
        ({"cc": []}, "$"),
    ],
    ids=str,
)
def test_refuse_a_payload_that_does_not_fit_the_handler(refuse: Refuse, payload: Any, path: str) -> None:
    about = refuse(422, "invalid-job", {"type": "send-email", "payload": payload})
    assert (about["field"], about["path"]) == ("payload", path)
    assert about["detail"].startswith(f"payload{path[1:]}: ")


@pytest.mark.parametrize(
    "payload",
    [rb'"\ud800"', rb'"a\udfffb"', rb'{"\udfff":1}', rb'[[{"a":"\udc00\ud800"}]]', rb'[null,"\ud83d"]'],
    ids=ascii,
)
def test_refuse_lone_surrogates_in_a_payload(refuse: Refuse, payload: bytes) -> None:
    assert refuse(422, "invalid-job", b'{"type":"echo","payload":%b}' % payload)["field"] == "payload"


WRONG_ATTEMPTS = [0, -1, 1.5, 100.5, MAX_ATTEMPTS + 1, 10**9, 2**63, 10**400, 1e300, "3", "", True, False, [], [3], {}]
WRONG_DELAYS = [
    -1,
    -0.001,
    MAX_DELAY + 1,
    MAX_DELAY + 0.5,
    1e12,
    2**63,
    10**400,
    1e308,
    "5",
    "",
    True,
    False,
    [],
    [1],
    {},
]
WRONG_RUN_TIMES = [
    1.5,
    1e15,
    10**14,
    2**63,
    10**400,
    True,
    False,
    [],
    {},
    "",
    "tomorrow",
    "1780000000000",
    "2026-02-30T00:00:00Z",
    "2026-13-01T00:00:00Z",
    "2026-01-01T25:00:00Z",
    "2026-01-01T00:00:00",
    "2026-01-01",
    "T00:00:00Z",
    "2026-01-01T00:00:00+99:99",
    "2999-01-01T00:00:00Z",
    "9999-12-31T23:59:59+14:00",
    "9999-12-31T23:59:59-14:00",
    "2026-01-01T00:00:00Z\0",
    "2026-01-01T00:00:00Z ",
    "\ud800",
    "2026-01-01T00:00:00\udfff",
    "2026-01-01T00:00:00 CET",
    "2026-01-01T00:00:00Europe/Paris",
    "2026-01-01T00:00:00Z[Europe/Paris",
    "2026-01-01T00:00:00+0",
    "2026-01-01T00:00:00+24:00",
    "2026-01-01T00:60:00Z",
    "2026-01-01T00:00:60Z",
    "2026-01-01T23:59:60+01:00",
    "2026-01-01T23:59:61Z",
    "9999-12-31T23:59:60Z",
    "2026-01-01T000:00Z",
    "2026-01-0\u0661T00:00:00Z",
    "2026-01-01X00:00:00Z",
    "2026-W01-1T00:00:00Z",
    "9" * 5000,
]
WRONG_NAMES = [*" *?\n\0é٣\ud800/:", "", "a b", "a:b", "{x}", "../q", "a/b", "a\n", "a\0", "a" * 101, 1, True, [], {}]


def brief(value: Any) -> str:
    return ascii(value)[:30]


@pytest.mark.parametrize("value", WRONG_ATTEMPTS, ids=brief)
def test_refuse_an_invalid_number_of_attempts(refuse: Refuse, value: Any) -> None:
    about = refuse(422, "invalid-job", echo_with(maxAttempts=value))
    assert (about["field"], about["detail"]) == (
        "maxAttempts",
        f"maxAttempts: must be a whole number from 1 to {MAX_ATTEMPTS}",
    )


@pytest.mark.parametrize("value", WRONG_DELAYS, ids=brief)
def test_refuse_an_invalid_delay(refuse: Refuse, value: Any) -> None:
    about = refuse(422, "invalid-job", echo_with(delay=value))
    assert about["field"] == "delay"
    assert str(MAX_DELAY) in about["detail"]


@pytest.mark.parametrize("value", WRONG_RUN_TIMES, ids=brief)
def test_refuse_an_invalid_run_time(refuse: Refuse, value: Any) -> None:
    about = refuse(422, "invalid-job", echo_with(runAt=value))
    assert about["field"] == "runAt"
    assert "ISO 8601 with a zone" in about["detail"]


def test_refuse_a_run_time_a_minute_too_far_ahead(refuse: Refuse, queue: Queue) -> None:
    assert refuse(422, "invalid-job", echo_with(runAt=queue.now() + MAX_DELAY * 1000 + 60_000))["field"] == "runAt"


def test_refuse_delay_and_run_time_together(refuse: Refuse) -> None:
    assert refuse(422, "invalid-job", echo_with(delay=1, runAt="2026-01-01T00:00:00Z"))["field"] in ("delay", "runAt")


@pytest.mark.parametrize("value", WRONG_NAMES, ids=brief)
def test_refuse_an_invalid_queue_name(refuse: Refuse, value: Any) -> None:
    assert refuse(422, "invalid-job", echo_with(queue=value))["field"] == "queue"


# Paths and methods ----------------------------------------------------------------------------------------------------

WRONG_IDS = {
    "word": "nope",
    "dots": "..",
    "encoded dots": "%2e%2e",
    "traversal": "..%2fstats",
    "traversal with a job": "..%2fjobs%2f{id}",
    "colon": "a:b",
    "key": "%7bqueue%7d:counts",
    "pattern": "*",
    "newline": "%0a",
    "NUL": "%00",
    "invalid UTF-8": "%ff%fe",
    "cut escape": "%",
    "long": "x" * 10_000,
    "id and newline": "{id}%0a",
    "id and space": "{id}%20",
    "space and id": "%20{id}",
    "id and NUL": "{id}%00",
    "id and letter": "{id}0",
    "id without its last digit": "{cut}",
    "upper case": "{upper}",
    "without hyphens": "{plain}",
    "in braces": "%7b{id}%7d",
    "as URN": "urn:uuid:{id}",
    "full-width digits": "{wide}",
    "another version": "{version4}",
    "unknown": "01900000-0000-7000-8000-000000000000",
    "slash": "{id}/",
    "two slashes": "/{id}",
    "below": "{id}/result",
}


@pytest.mark.parametrize("path", WRONG_IDS.values(), ids=WRONG_IDS.keys())
def test_show_answers_404_to_an_invalid_or_unknown_id(refuse: Refuse, queue: Queue, path: str) -> None:
    id = queue.enqueue("echo", 1).id
    spelled = path.format(
        id=id,
        cut=id[:-1],
        upper=id[:-1].upper() + "A" if id.isdecimal() else id.upper(),
        plain=id.replace("-", ""),
        wide="%ef%bc%90" + id[1:],
        version4=id[:14] + "4" + id[15:],
    )
    refuse(404, "not-found", path=f"/jobs/{spelled}", method="GET")


def test_show_answers_404_when_a_job_has_been_trimmed(api: Client, queue: Queue) -> None:
    job = put(queue, "completed")
    queue.clock.ahead = queue.keep_ms["completed"] + 1
    assert queue.trim() == 1
    assert api.get(f"/jobs/{job.id}").kind == "not-found"


@pytest.mark.parametrize(
    "path",
    [
        *[
            "/nope",
            "/job",
            "/jobs/",
            "/health/",
            "/stats/",
            "//stats",
            "/Stats",
            "/%00",
            "/nope%ff",
            "/%0a",
            "/stats%0a",
            "/health;x",
        ],
        *[
            "/..",
            "/../etc/passwd",
            "/%2e%2e/%2e%2e",
            "/" + "a" * 20_000,
            "/favicon.ico",
            "/%",
            "/%zz",
            "/stats%2f",
            "/<x>",
        ],
    ],
    ids=brief,
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_answer_404_to_an_unknown_path(refuse: Refuse, method: str, path: str) -> None:
    refuse(404, "not-found", echo_with() if method == "POST" else NO_BODY, path=path, method=method)


def test_ignore_the_query_of_a_route_without_parameters(api: Client) -> None:
    assert api.get("/queues?state=%ff&a=1&a=2&&=%00;%").status == 200


METHODS_OF = {path: {method for method, at, *_ in ROUTES if at == path} for _, path, *_ in ROUTES}
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "FOO", "PROPFIND"}
NO_JOB = "01900000-0000-7000-8000-000000000000"


def fill_in(path: str) -> str:
    return path.replace("<id>", NO_JOB).replace("<name>", "default").replace("<limit>", "echo")


def supported_methods(path: str) -> set[str]:
    """Return the methods of a path. HEAD is supported wherever GET is."""
    return METHODS_OF[path] | ({"HEAD"} if "GET" in METHODS_OF[path] else set())


def assert_allow(answer: Answer, path: str) -> None:
    assert METHODS_OF[path] <= set(answer.headers["allow"].split(",")) <= supported_methods(path)


@pytest.mark.parametrize(
    ("path", "method"), [(path, method) for path in METHODS_OF for method in sorted(METHODS - supported_methods(path))]
)
def test_answer_405_to_an_unsupported_method_and_list_the_supported_ones(
    api: Client, queue: Queue, path: str, method: str
) -> None:
    answer = api.call(method, fill_in(path), NO_BODY if method == "HEAD" else echo_with())
    assert answer.status == 405
    assert_allow(answer, path)
    assert method == "HEAD" or answer.kind == "method-not-allowed"
    assert dump(queue) == {}


@pytest.mark.parametrize("path", METHODS_OF)
def test_options_lists_the_supported_methods(api: Client, path: str) -> None:
    answer = api.call("OPTIONS", fill_in(path))
    assert (answer.status, answer.body) == (204, b"")
    assert_allow(answer, path)


def test_options_answers_404_to_an_unknown_path(refuse: Refuse) -> None:
    refuse(404, "not-found", path="/nope", method="OPTIONS")


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/stats", "/jobs/{id}", f"/jobs/{NO_JOB}", "/nope"])
def test_head_answers_like_get_without_the_body(api: Client, queue: Queue, path: str) -> None:
    path = path.format(id=queue.enqueue("echo", 1, delay=60).id)  # delayed, or /stats would show how long it waits
    get, head = (api.call(method, path, headers={"X-Request-ID": "r"}) for method in ("GET", "HEAD"))
    assert (head.status, head.headers) == (get.status, get.headers)
    assert (head.body, int(head.headers["content-length"])) == (b"", len(get.body))


# Health and stats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_health_and_ready_are_ok(api: Client, path: str) -> None:
    answer = api.get(path)
    assert (answer.status, answer.json["status"]) == (200, "ok")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"


def test_stats_are_zero_without_jobs(api: Client) -> None:
    assert api.get("/stats").json == {
        "pending": 0,
        "processing": 0,
        "delayed": 0,
        "retrying": 0,
        "completed": 0,
        "failed": 0,
        "cancelled": 0,
        "oldestWaitingMs": 0,
        "workers": 0,
        "queues": {},
        "lastMinute": {"completed": 0, "failed": 0, "cancelled": 0},
        "total": {"completed": 0, "failed": 0, "cancelled": 0},
    }


def test_stats_begin_with_pending_and_processing(api: Client) -> None:
    assert list(api.get("/stats").json)[:2] == ["pending", "processing"]


@pytest.mark.parametrize("status", STATUSES)
def test_stats_count_a_job_of_each_status(api: Client, queue: Queue, status: str) -> None:
    put(queue, status)
    stats = api.get("/stats").json
    assert {name: stats[name] for name in STATUSES} == {name: int(name == status) for name in STATUSES}
    assert stats["total"] == stats["lastMinute"] == {name: int(name == status) for name in STATUSES[2:]}


def test_stats_count_delayed_jobs_as_pending_in_each_queue(api: Client) -> None:
    api.post("/jobs", echo_with(queue="slow", delay=60))
    api.post("/jobs", echo_with())
    stats = api.get("/stats").json
    assert (stats["pending"], stats["delayed"]) == (2, 1)
    found = {name: (queue["pending"], queue["processing"], queue["paused"]) for name, queue in stats["queues"].items()}
    assert found == {"default": (1, 0, False), "slow": (1, 0, False)}


# Redis errors ---------------------------------------------------------------------------------------------------------


def assert_unavailable(answer: Answer, reason: str) -> None:
    assert (answer.status, answer.kind) == (503, "unavailable"), answer
    assert answer.problem["reason"] == reason
    assert answer.headers["retry-after"] == str(RETRY_AFTER)


REQUESTS = [
    ("GET", "/ready", NO_BODY),
    ("POST", "/jobs", echo_with()),
    ("GET", f"/jobs/{NO_JOB}", NO_BODY),
    ("GET", "/stats", NO_BODY),
    ("POST", "/jobs/batch", [echo_with()]),
    ("GET", "/jobs", NO_BODY),
    ("DELETE", f"/jobs/{NO_JOB}", NO_BODY),
    ("POST", f"/jobs/{NO_JOB}/retry", NO_BODY),
    ("POST", "/jobs/cancel", {}),
    ("GET", "/queues", NO_BODY),
    ("POST", "/queues/default/pause", NO_BODY),
    ("POST", "/queues/default/resume", NO_BODY),
    ("GET", "/workers", NO_BODY),
    ("GET", "/scale?queue=default", NO_BODY),
]
NAMED = [f"{method} {path}".replace(NO_JOB, "id") for method, path, _ in REQUESTS]


@contextmanager
def answering(reply: bytes) -> Iterator[str]:
    """Act as a Redis that gives the same reply to every command; an empty reply sends nothing."""

    def converse(connection: socket.socket) -> None:
        with suppress(OSError), connection, connection.makefile("rb") as commands:
            while parts := commands.readline():
                for _ in range(int(parts[1:])):
                    commands.read(int(commands.readline()[1:]) + 2)
                connection.sendall(reply)

    def accept() -> None:
        try:
            while True:
                threads.append(threading.Thread(target=converse, args=[server.accept()[0]]))
                threads[-1].start()
        except OSError:
            return  # the server has been closed

    threads = [threading.Thread(target=accept)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        threads[0].start()
        try:
            yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"
        finally:
            server.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            for thread in threads:
                thread.join(5)


@contextmanager
def client_for(url: str) -> Iterator[Client]:
    queue = Queue.from_url(url)
    try:
        yield Client(API(Settings(), queue))
    finally:
        queue.pool.disconnect()


@pytest.mark.parametrize(("method", "path", "body"), REQUESTS, ids=NAMED)
def test_answer_503_when_redis_cannot_be_reached(method: str, path: str, body: Any) -> None:
    with client_for(f"redis://127.0.0.1:{free_port()}/0") as api:
        assert_unavailable(api.call(method, path, body), "unreachable")
        assert api.get("/health").status == 200


ERRORS = {
    b"-LOADING Redis is loading the dataset in memory": "loading",
    b"-READONLY You can't write against a read only replica.": "read-only",
    b"-MISCONF Redis is configured to save RDB snapshots, but it's unable to persist to disk.": "read-only",
    b"-NOREPLICAS Not enough good replicas to write.": "read-only",
    b"-OOM command not allowed when used memory > 'maxmemory'.": "full",
    b"-NOAUTH Authentication required.": "refused",
    b"-NOPERM this user has no permissions to run the 'time' command": "refused",
    b"-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.": "unreachable",
    b"-CLUSTERDOWN The cluster is down": "unreachable",
    b"-BUSY Redis is busy running a script.": "busy",
    b"-TRYAGAIN Multiple keys request during rehashing of slot": "busy",
    b"-ERR max number of clients reached": "unreachable",
}


@pytest.mark.parametrize(("error", "reason"), ERRORS.items(), ids=ERRORS.values())
@pytest.mark.parametrize(("method", "path", "body"), REQUESTS, ids=NAMED)
def test_answer_503_when_redis_replies_with_an_error(
    method: str, path: str, body: Any, error: bytes, reason: str
) -> None:
    with answering(error + b"\r\n") as url, client_for(url) as api:
        assert_unavailable(api.call(method, path, body), reason)
        assert api.get("/health").status == 200


def test_answer_503_when_redis_does_not_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyqueue_redis, "SOCKET_TIMEOUT", 0.1)
    with answering(b"") as url, client_for(url) as api:
        assert_unavailable(api.get("/ready"), "timeout")
        assert api.get("/health").status == 200


@pytest.mark.parametrize(("method", "path", "body"), REQUESTS, ids=NAMED)
def test_answer_a_problem_when_the_server_is_not_redis(
    caplog: pytest.LogCaptureFixture, method: str, path: str, body: Any
) -> None:
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as url, client_for(url) as api:
        answer = api.call(method, path, body)
        assert answer.problem["status"] in (500, 503)
        assert_no_trace(answer, api, caplog)


@contextmanager
def configured(queue: Queue, name: str, value: str, before: str) -> Iterator[None]:
    """Change a setting of Redis for the duration of the block."""
    client = raw(queue)
    client.config_set(name, value)
    try:
        yield
    finally:
        client.config_set(name, before)


@contextmanager
def replica(queue: Queue) -> Iterator[None]:
    """Make Redis the replica of a missing server for the duration of the block."""
    client = raw(queue)
    client.execute_command("REPLICAOF", "127.0.0.1", "1")
    try:
        yield
    finally:
        client.execute_command("REPLICAOF", "NO", "ONE")


def test_submit_answers_503_while_redis_is_full(near: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyqueue_redis, "MEMORY_AGE", 0.2)
    api = Client(API(Settings(), near))
    with configured(near, "maxmemory", "1", "0"):
        assert_unavailable(api.post("/jobs", echo_with()), "full")
        assert dump(near) == {}
    until(lambda: api.post("/jobs", echo_with()).status == 201)  # once the reading is old


def test_submit_answers_503_while_redis_is_read_only(near: Queue) -> None:
    api = Client(API(Settings(), near))
    with replica(near):
        assert_unavailable(api.post("/jobs", echo_with()), "read-only")
        assert dump(near) == {}
    assert api.post("/jobs", echo_with()).status == 201


def test_ready_answers_503_while_redis_is_full(near: Queue) -> None:
    api = Client(API(Settings(), near))
    with configured(near, "maxmemory", "1", "0"):
        assert_unavailable(api.get("/ready"), "full")


def test_ready_answers_503_while_redis_is_read_only(near: Queue) -> None:
    api = Client(API(Settings(), near))
    with replica(near):
        assert_unavailable(api.get("/ready"), "read-only")


def test_ready_stores_nothing_except_since_when_there_is_trouble(api: Client, queue: Queue) -> None:
    before = dump(queue)
    assert api.get("/ready").status == 200
    after = dump(queue)
    after.pop(queue.keys.trouble, None)
    assert after == before


def test_show_and_stats_work_while_redis_is_full(near: Queue) -> None:
    api = Client(API(Settings(), near))
    id = near.enqueue("echo", 1).id
    with configured(near, "maxmemory", "1", "0"):
        assert [api.get(path).status for path in (f"/jobs/{id}", "/stats", "/health")] == [200, 200, 200]


def test_submit_works_after_redis_has_closed_every_connection(near: Queue) -> None:
    api = Client(API(Settings(), near))
    assert api.post("/jobs", echo_with()).status == 201
    raw(near).client_kill_filter(_type="normal", skipme=False)
    assert api.post("/jobs", echo_with()).status == 201


@pytest.fixture
def broken(server: Server) -> Queue:
    """A queue that is not checked for consistency at the end."""
    return server.queue()


def test_show_answers_500_when_a_record_is_not_a_string(broken: Queue, caplog: pytest.LogCaptureFixture) -> None:
    api = Client(API(Settings(), broken))
    raw(broken).rpush(broken.keys.job(NO_JOB), "x")
    answer = api.get(f"/jobs/{NO_JOB}")
    assert (answer.status, answer.kind) == (500, "corrupted")
    assert_no_trace(answer, api, caplog)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize("name", ["abc", "a:b", "*", "01900000", NO_JOB.upper() + "\n", ""])
def test_show_answers_404_to_a_key_that_is_not_a_job_id(broken: Queue, name: str) -> None:
    api = Client(API(Settings(), broken))
    raw(broken).set(broken.keys.job(name), '{"type":"echo","payload":1}')
    assert api.get(f"/jobs/{quote(name)}").kind == "not-found"


def test_show_returns_the_readable_part_of_a_broken_record(broken: Queue) -> None:
    api = Client(API(Settings(), broken))
    raw(broken).set(broken.keys.job(NO_JOB), b'{"type":')
    job = api.get(f"/jobs/{NO_JOB}").json
    assert (job["id"], job["status"], job["error"]["type"]) == (NO_JOB, "failed", "UnreadableRecord")


def test_stats_answers_500_when_the_counts_are_not_a_hash(broken: Queue, caplog: pytest.LogCaptureFixture) -> None:
    api = Client(API(Settings(), broken))
    raw(broken).set(broken.keys.counts, "x")
    answer = api.get("/stats")
    assert (answer.status, answer.kind) == (500, "corrupted")
    assert_no_trace(answer, api, caplog)


def test_stats_answers_500_when_a_count_is_not_a_number(broken: Queue, caplog: pytest.LogCaptureFixture) -> None:
    api = Client(API(Settings(), broken))
    raw(broken).hset(broken.keys.counts, "pending:default", "many")
    answer = api.get("/stats")
    assert (answer.status, answer.kind) == (500, "corrupted")
    assert_no_trace(answer, api, caplog)


def test_submit_answers_500_when_a_queue_is_not_a_list(broken: Queue, caplog: pytest.LogCaptureFixture) -> None:
    api = Client(API(Settings(), broken))
    raw(broken).set(broken.keys.jobs("default"), "x")
    answer = api.post("/jobs", echo_with())
    assert (answer.status, answer.kind) == (500, "corrupted")
    assert_no_trace(answer, api, caplog)


def assert_no_trace(answer: Answer, api: Client, caplog: pytest.LogCaptureFixture) -> None:
    for text in (answer.body.decode(), api.log.getvalue(), caplog.text):
        assert "Traceback" not in text
        assert "redis://" not in text
        assert "tinyqueue.py" not in text


# Secrets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path", "body"), REQUESTS, ids=NAMED)
def test_hide_the_password_when_redis_cannot_be_reached(
    caplog: pytest.LogCaptureFixture, method: str, path: str, body: Any
) -> None:
    with client_for(f"redis://u:{SECRET}@127.0.0.1:{free_port()}/0") as api:
        answer = api.call(method, path, body)
        assert_unavailable(answer, "unreachable")
        assert SECRET not in answer.body.decode() + api.log.getvalue() + caplog.text


def test_hide_the_password_when_redis_refuses_it(near: Queue, caplog: pytest.LogCaptureFixture) -> None:
    port = near.pool.connection_kwargs["port"]
    with client_for(f"redis://u:{SECRET}@127.0.0.1:{port}/0") as api:
        answer = api.get("/stats")
        assert_unavailable(answer, "refused")
        assert SECRET not in answer.body.decode() + api.log.getvalue() + caplog.text


@pytest.mark.parametrize(
    "url", [f"http://u:{SECRET}@h", f"redis://u:{SECRET}@h:{SECRET}/0", f"redis://u:{SECRET}@h/{SECRET}", SECRET]
)
def test_hide_the_password_of_an_invalid_url(tmp_path: Path, url: str) -> None:
    (tmp_path / "handlers.py").write_text(HANDLERS_PY)
    [[status, about, _]], log = call_app(tmp_path, [["GET", "/stats"]], REDIS_URL=url)
    assert (status, about["type"]) == (503, "urn:tinyqueue:misconfigured")
    assert "REDIS_URL" in about["detail"]
    assert SECRET not in json.dumps(about) + log


def test_log_no_credentials_and_no_payload(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with client_for(f"redis://127.0.0.1:{free_port()}/0") as api:
        body = echo_with(payload={"password": "hunter2"})
        assert api.post("/jobs?token=tok123", body, {"Authorization": "Bearer tok123"}).status == 503
        assert api.get("/queues?token=tok123", {"Authorization": "Bearer tok123"}).status == 503
        assert api.get("/stats?token=tok123", {"Authorization": "Bearer tok123"}).status == 400
        assert not re.search("tok123|hunter2", api.log.getvalue() + caplog.text)


# wsgi:app -------------------------------------------------------------------------------------------------------------

HANDLERS_PY = (
    "from tinyqueue import handler\n\n@handler('echo')\ndef echo(payload: object) -> object:\n    return payload\n"
)
IMPORT = """
import sys
seen = []
def audit(event, args):
    if event.startswith("socket.") or (event == "open" and str(args[0]).endswith((".env", "handlers.py"))):
        seen.append(event)
sys.addaudithook(audit)
import wsgi
print(seen, "handlers" in sys.modules)
"""
CALL = """
import json, sys
connects = 0
def audit(event, args):
    global connects
    connects += event == "socket.connect"
sys.addaudithook(audit)
import wsgi
from client import Client
client = Client(wsgi.app)
answers = []
for method, path, *body in json.loads(sys.argv[1]):
    answer = client.call(method, path, *body)
    answers.append([answer.status, answer.json, connects])
print(json.dumps(answers))
sys.stderr.write(client.log.getvalue())
"""


def python(script: str, *args: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a new process that inherits only PATH."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": path} | environ
    command = [sys.executable, "-W", "error", "-c", script, *args]
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=30, check=True)


def call_app(cwd: Path, calls: list[list[Any]], **environ: str) -> tuple[Any, str]:
    """Call wsgi:app in a new process. Returns a list with an entry for each call, and the log.

    An entry holds the status, the body, and the number of connections opened so far.
    """
    done = python(CALL, json.dumps(calls), cwd=cwd, **environ)
    return json.loads(done.stdout), done.stderr


def test_import_opens_nothing_and_reads_no_settings(tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text("raise SystemExit('imported')")
    (tmp_path / ".env").write_text("PORT=garbage\n")
    environ = {"PORT": "abc", "TINYQUEUE_NOPE": "1", "REDIS_URL": "garbage", "DYNO": "web.1", "WEB_CONCURRENCY": "-1"}
    done = python(IMPORT, cwd=tmp_path, **environ)
    assert (done.stdout.strip(), done.stderr) == ("[] False", "")


def test_app_answers_503_without_redis_url(tmp_path: Path) -> None:
    calls = [
        ["GET", "/health"],
        ["GET", "/ready"],
        ["POST", "/jobs", echo_with()],
        ["GET", "/stats"],
        ["GET", f"/jobs/{NO_JOB}"],
    ]
    [health, *others], log = call_app(tmp_path, calls)
    assert health[0] == 200
    for status, about, _ in others:
        assert (status, about["type"]) == (503, "urn:tinyqueue:misconfigured")
        assert "REDIS_URL is not set" in about["detail"]
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"PORT": "abc"}, "PORT"),
        ({"TINYQUEUE_NOPE": "1"}, "TINYQUEUE_NOPE"),
        ({"DYNO": "web.1"}, "REDIS_URL is required here (DYNO is set)"),
        ({"REDIS_URL": "redis://127.0.0.1:1/0", "TINYQUEUE_HANDLERS": "jobs"}, "jobs"),
        ({"REDIS_URL": "redis://127.0.0.1:1/0", "TINYQUEUE_HANDLERS": "json"}, "json"),
    ],
    ids=str,
)
def test_app_answers_503_when_a_setting_is_wrong(tmp_path: Path, environ: dict[str, str], expected: str) -> None:
    [health, [status, about, _]], log = call_app(tmp_path, [["GET", "/health"], ["GET", "/stats"]], **environ)
    assert (health[0], status, about["type"]) == (200, 503, "urn:tinyqueue:misconfigured")
    assert expected in about["detail"]
    assert "Traceback" not in log


def test_app_connects_at_the_first_request_that_needs_redis(tmp_path: Path, near: Queue) -> None:
    (tmp_path / "handlers.py").write_text(HANDLERS_PY)
    url = f"redis://127.0.0.1:{near.pool.connection_kwargs['port']}/0"
    calls = [["GET", "/health"], ["GET", "/nope"], ["POST", "/jobs", echo_with()], ["GET", "/stats"]]
    [health, nope, posted, stats], log = call_app(tmp_path, calls, REDIS_URL=url)
    assert [answer[0] for answer in (health, nope, posted, stats)] == [200, 404, 201, 200]
    assert [answer[2] for answer in (health, nope, posted, stats)] == [0, 0, 1, 1]
    assert near.waiting(["default"]) == 1
    assert log == ""


# The server -----------------------------------------------------------------------------------------------------------

POST = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def served(queue: Queue) -> Iterator[tuple[str, int]]:
    """The address of a server that accepts bodies of up to 4096 bytes."""
    with serving(API(Settings(max_body=4096), queue)) as (_, address):
        yield address


def test_serve_many_requests_on_one_connection(served: tuple[str, int]) -> None:
    with Wire(served) as wire:
        for _ in range(100):
            wire.send(spell("POST", "/jobs", VALID))
            location = "/" + wire.answer().headers["location"]
            wire.send(spell("GET", location))
            assert wire.answer().json["payload"] == 1


def test_answer_pipelined_requests_in_order(served: tuple[str, int]) -> None:
    with Wire(served) as wire:
        paths = ["/health", "/nope", "/stats", "/jobs/batch", "/ready"] * 4
        wire.send(b"".join(spell("GET", path) for path in paths))
        assert [wire.answer().status for _ in paths] == [200, 404, 200, 405, 200] * 4


def test_serve_a_request_that_arrives_byte_by_byte(served: tuple[str, int]) -> None:
    with Wire(served) as wire:
        for byte in spell("POST", "/jobs", VALID):
            wire.send(bytes([byte]))
        assert wire.answer().status == 201


def test_serve_a_chunked_body(served: tuple[str, int], queue: Queue) -> None:
    with Wire(served) as wire:
        wire.send(CHUNKED + b"5\r\n" + VALID[:5] + b"\r\n%x\r\n" % (len(VALID) - 5) + VALID[5:] + b"\r\n0\r\n\r\n")
        assert wire.answer().status == 201
        wire.send(spell("GET", "/health"))
        assert wire.answer().status == 200


def test_refuse_a_chunked_body_that_is_too_large(served: tuple[str, int], queue: Queue) -> None:
    with Wire(served) as wire:
        wire.send(CHUNKED + b"1388\r\n" + sized(5000) + b"\r\n0\r\n\r\n")
        assert wire.answer().kind == "too-large"
    assert dump(queue) == {}


@pytest.mark.parametrize(
    "chunks", [b"zz", b"-5\r\nabc", b"5\r\nabc\r\n0\r\n\r\n", b"3\r\nabcdef\r\n0\r\n\r\n"], ids=ascii
)
def test_refuse_broken_chunks(served: tuple[str, int], queue: Queue, chunks: bytes) -> None:
    with Wire(served) as wire:
        wire.send(CHUNKED + chunks + b"\r\n")
        assert wire.answer().status == 400
    assert dump(queue) == {}


CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(VALID), VALID)
AMBIGUOUS = {
    "length and coding": ["POST /jobs HTTP/1.1", "Transfer-Encoding: chunked", "Content-Length: 5"],
    "length 0 and coding": ["POST /jobs HTTP/1.1", "Content-Length: 0", "Transfer-Encoding: chunked"],
    "two lengths": ["POST /jobs HTTP/1.1", "Content-Length: 5", "Content-Length: 5"],
    "coding twice": ["POST /jobs HTTP/1.1", "Transfer-Encoding: chunked", "transfer-encoding: chunked"],
    "coding twice in a line": ["POST /jobs HTTP/1.1", "Transfer-Encoding: chunked, chunked"],
    "coding and nothing": ["POST /jobs HTTP/1.1", "Transfer-Encoding: chunked,"],
    "empty coding": ["POST /jobs HTTP/1.1", "Transfer-Encoding:"],
    "folded coding": ["POST /jobs HTTP/1.1", "Transfer-Encoding:", " chunked"],
    "space before the colon": ["POST /jobs HTTP/1.1", "Transfer-Encoding : chunked"],
    "HTTP/1.0": ["POST /jobs HTTP/1.0", "Connection: keep-alive", "Transfer-Encoding: chunked"],
    "two hosts": ["POST /jobs HTTP/1.1", "Host: elsewhere", f"Content-Length: {len(VALID)}"],
}


@pytest.mark.parametrize("lines", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_refuse_and_close_when_a_proxy_may_have_read_another_request(
    served: tuple[str, int], queue: Queue, lines: list[str]
) -> None:
    with Wire(served) as wire:
        head = [*lines, "Host: localhost", "Content-Type: application/json", "", ""]
        wire.send("\r\n".join(head).encode() + CHUNKS + spell("GET", "/health"))
        answer = wire.answer()
        assert (answer.status, answer.headers["connection"]) == (400, "close")
        assert wire.ended()
    assert dump(queue) == {}


@pytest.mark.parametrize("coding", ["gzip", "gzip, chunked", "identity", "chunked, identity", "xchunked"])
def test_refuse_and_close_when_the_transfer_encoding_is_unknown(served: tuple[str, int], coding: str) -> None:
    with Wire(served) as wire:
        wire.send(spell("POST", "/jobs", None, f"Transfer-Encoding: {coding}") + CHUNKS)
        assert wire.answer().status == 501
        assert wire.ended()


def test_receive_a_refusal_while_the_body_still_arrives(served: tuple[str, int]) -> None:
    for _ in range(100):
        with Wire(served) as wire:
            wire.send(spell("POST", "/jobs", None, f"Content-Length: {1 << 30}", "Content-Type: application/json"))
            for _ in range(100):
                wire.push(b" " * 65536)
            assert wire.answer().status == 413


ALIASES = [
    *["/st%ffats", "/%73tats", "/stats%00", "/%c3%a9stats", "//stats", "///stats", "/stats/"],
    *["/./stats", "/x/../stats", "/stats;x", "/stats#x", "/Stats", "stats"],
]


@pytest.mark.parametrize("path", ALIASES)
def test_answer_404_to_another_spelling_of_a_path(served: tuple[str, int], path: str) -> None:
    with Wire(served) as wire:
        wire.send(spell("GET", path))
        assert wire.answer().kind == "not-found"


@pytest.mark.parametrize("path", ["/st\xffats", "/\xc3\xa9stats"], ids=ascii)
def test_answer_400_to_a_path_with_raw_bytes(served: tuple[str, int], path: str) -> None:
    with Wire(served) as wire:
        wire.send(spell("GET", path))
        assert wire.answer().status == 400
        assert wire.ended()


@pytest.mark.parametrize("path", ["/st%ffats", "//stats", "/%c3%a9stats", "/stats%00"])
def test_app_answers_404_to_another_spelling_of_a_path(refuse: Refuse, path: str) -> None:
    refuse(404, "not-found", path=path, method="GET")


def test_serve_an_absolute_request_target(served: tuple[str, int]) -> None:
    with Wire(served) as wire:
        wire.send(spell("GET", "http://localhost/stats?minutes=1"))
        assert "history" in wire.answer().json


def test_serve_a_client_that_waits_for_100_continue(served: tuple[str, int]) -> None:
    request = spell("POST", "/jobs", VALID, "Expect: 100-continue")
    with Wire(served) as wire:
        wire.send(request.removesuffix(VALID))
        assert wire.answer().status == 100
        wire.send(VALID)
        assert wire.answer().status == 201


def test_refuse_a_slightly_too_large_body_with_a_problem_and_keep_serving(
    served: tuple[str, int], queue: Queue
) -> None:
    with Wire(served) as wire:
        wire.send(spell("POST", "/jobs", sized(5000)))
        answer = wire.answer()
        assert (answer.status, answer.headers["content-type"]) == (413, PROBLEM)
        wire.send(spell("GET", "/health"))
        assert wire.answer().status == 200
    assert dump(queue) == {}


def test_refuse_a_far_too_large_body_before_it_arrives(served: tuple[str, int], queue: Queue) -> None:
    with Wire(served) as wire:
        wire.send(POST + b"Content-Length: 10000000000\r\n\r\n")
        assert wire.answer().status == 413
        assert wire.ended()
    assert dump(queue) == {}


@pytest.mark.parametrize("length", ["abc", "-1", "1.5", "+5", "0x5", " ", "5, 5", "٣"], ids=ascii)
def test_refuse_an_invalid_content_length(served: tuple[str, int], queue: Queue, length: str) -> None:
    with Wire(served) as wire:
        wire.send(POST + f"Content-Length: {length}\r\n\r\n".encode())
        assert wire.answer().status == 400
    assert dump(queue) == {}


def test_refuse_a_body_that_ends_early(served: tuple[str, int], queue: Queue) -> None:
    with Wire(served) as wire:
        wire.send(spell("POST", "/jobs", VALID)[:-1])
        wire.half_close()
        assert wire.ended()
    assert dump(queue) == {}


def test_refuse_headers_that_are_too_large(served: tuple[str, int]) -> None:
    with Wire(served) as wire:
        wire.send(spell("GET", "/health", None, "X-Long: " + "a" * 40_000))
        assert wire.answer().status == 431


def test_refuse_bytes_that_are_not_http(served: tuple[str, int]) -> None:
    with Wire(served) as wire:
        wire.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        assert wire.answer().status == 400


def test_serve_while_others_have_sent_half_a_request(served: tuple[str, int]) -> None:
    half = [Wire(served) for _ in range(50)]
    try:
        for at, wire in enumerate(half):
            wire.send(spell("POST", "/jobs", VALID)[: 20 + at])
        with Wire(served) as wire:
            wire.send(spell("GET", "/health"))
            assert wire.answer().status == 200
    finally:
        for wire in half:
            wire.__exit__()


@pytest.mark.parametrize("path", ["/health", "/stats", "/nope", f"/jobs/{NO_JOB}"])
def test_head_sends_no_body(served: tuple[str, int], path: str) -> None:
    with Wire(served) as wire:
        wire.send(spell("HEAD", path) + spell("GET", path))
        head = wire.answer(bodiless=True)
        get = wire.answer()
        assert head.status == get.status
        assert int(head.headers["content-length"]) == len(get.body) > 0


def test_options_sends_no_body(served: tuple[str, int]) -> None:
    with Wire(served) as wire:
        wire.send(spell("OPTIONS", "/jobs", None, "Connection: close"))
        answer = wire.answer()
        assert (answer.status, answer.body) == (204, b"")
        assert_allow(answer, "/jobs")
        assert wire.ended()


def test_serve_http_1_0_and_close(served: tuple[str, int]) -> None:
    with Wire(served) as wire:
        wire.send(b"GET /health HTTP/1.0\r\n\r\n")
        assert wire.answer().json == {"status": "ok"}
        assert wire.ended()


def test_answer_without_a_server_header(served: tuple[str, int]) -> None:
    with Wire(served) as wire:
        wire.send(spell("GET", "/health"))
        assert "server" not in wire.answer().headers


def test_serve_deep_json_in_a_thread(served: tuple[str, int]) -> None:
    with Wire(served) as wire:
        wire.send(spell("POST", "/jobs", b'{"type":"echo","payload":' + b"[" * 4000))
        assert wire.answer().kind == "not-json"


def test_stop_closes_idle_connections_and_refuses_new_ones(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyqueue_server, "DRAIN_TIMES", (1, 1))
    with serving(API(Settings(), queue)) as (server, address), Wire(address) as idle, Wire(address) as half:
        half.send(b"POST /jobs HTT")
        idle.send(spell("GET", "/health"))
        assert idle.answer().status == 200
        server.stop()
        assert idle.ended()
        assert half.ended()
        with pytest.raises(ConnectionRefusedError):
            Wire(address)


def test_stop_answers_a_request_whose_body_is_arriving(queue: Queue) -> None:
    with serving(API(Settings(), queue)) as (server, address), Wire(address) as wire:
        request = spell("POST", "/jobs", VALID)
        wire.send(request[:-5])
        wire.until_read()
        server.stop()
        until(lambda: refused(address))
        wire.send(request[-5:])
        answer = wire.answer()
        assert (answer.status, answer.headers["connection"]) == (201, "close")
        assert wire.ended()


def test_stop_answers_a_request_whose_body_arrives_slowly(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyqueue_server, "DRAIN_TIMES", (1, 1))
    request = spell("POST", "/jobs", VALID)
    with serving(API(Settings(), queue)) as (server, address), Wire(address) as wire:
        wire.send(request[:-8])
        wire.until_read()
        began = time.monotonic()
        server.stop()
        for at in range(-8, -1, 2):  # takes twice as long as one pause may
            until(lambda at=at: time.monotonic() > began + 0.5 * (10 + at) / 2)
            wire.send(request[at : at + 2 or None])
        answer = wire.answer()
        assert (answer.status, answer.headers["connection"]) == (201, "close")
        assert wire.ended()


def test_stop_answers_a_request_on_a_connection_that_was_idle(queue: Queue) -> None:
    with serving(API(Settings(), queue)) as (server, address), Wire(address) as wire:
        wire.send(spell("GET", "/health"))
        assert wire.answer().status == 200
        answered = time.monotonic()
        until(lambda: time.monotonic() > answered + tinyqueue_server.DRAIN_TIMES[0] + 0.1)
        server.stop()
        until(lambda: refused(address))
        wire.send(spell("GET", "/health"))
        answer = wire.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert wire.ended()


def test_stop_with_a_grace_accepts_requests_but_is_not_ready(queue: Queue) -> None:
    with serving(API(Settings(), queue)) as (server, address), Wire(address) as open_before:
        open_before.send(spell("GET", "/ready"))
        assert open_before.answer().status == 200
        server.stop(60)
        for wire in (open_before, Wire(address)):
            with wire:
                wire.send(spell("GET", "/ready"))
                answer = wire.answer()
                assert (answer.status, answer.kind, answer.headers["connection"]) == (503, "stopping", "close")
        with Wire(address) as wire:
            wire.send(spell("POST", "/jobs", VALID))
            answer = wire.answer()
            assert (answer.status, answer.headers["connection"]) == (201, "close")
        server.stop(60)  # does not prolong it
        server.stop()
        until(lambda: refused(address))


def test_stop_with_a_grace_lets_requests_wait(queue: Queue) -> None:
    job = queue.enqueue("echo", {})
    with serving(API(Settings(), queue)) as (server, address), Wire(address) as wire:
        wire.send(spell("GET", f"/jobs/{job.id}?wait=20"))
        until(lambda: raw(queue).sismember(queue.keys.awaited, job.id))
        server.stop(60)
        with Wire(address) as other:
            other.send(spell("DELETE", f"/jobs/{job.id}"))
            assert other.answer().status == 200
        answer = wire.answer()
        assert (answer.json["status"], answer.headers["connection"]) == ("cancelled", "close")


def test_ready_answers_503_on_an_open_connection_while_the_server_drains(queue: Queue) -> None:
    with serving(API(Settings(), queue)) as (server, address), Wire(address) as wire:
        wire.send(spell("GET", "/ready"))
        assert wire.answer().status == 200
        server.stop()
        until(lambda: refused(address))
        wire.send(spell("GET", "/ready"))
        answer = wire.answer()
        assert (answer.status, answer.kind, answer.headers["retry-after"]) == (503, "stopping", "5")


@pytest.mark.skipif(sys.platform != "linux", reason="this system has no socket filters")
def test_stop_refuses_a_connection_that_is_opened_after_the_last_accept() -> None:
    outcomes: list[str] = []

    def connect(address: tuple[str, int]) -> None:
        try:
            with Wire(address) as wire:
                outcomes.append(f"accepted, then {wire.rest()!r}")
        except OSError as error:
            outcomes.append(type(error).__name__)

    class Late(tinyqueue_server.Server):
        def handle_accept(self) -> None:
            super().handle_accept()
            if self.drain_began:
                client.start()
                client.join(0.3)  # it cannot end: nobody accepts, and nobody refuses yet

    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = Late(API(Settings(), Queue.embedded()), sock)
        client = threading.Thread(target=connect, args=(sock.getsockname(),))
        server.stop()
        server.run()
    client.join(20)
    assert outcomes == ["ConnectionRefusedError"]


@pytest.mark.skipif(sys.platform != "linux", reason="this system has no socket filters")
def test_connect_to_a_socket_that_drops_new_connections_for_a_while() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        tinyqueue_server.drop_new_connections(sock, True)
        with pytest.raises(TimeoutError):
            socket.create_connection(sock.getsockname(), timeout=0.2)
        tinyqueue_server.drop_new_connections(sock, False)
        socket.create_connection(sock.getsockname(), timeout=20).close()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_stop_closes_a_busy_connection_with_an_answer_that_says_so(queue: Queue, version: str) -> None:
    health = f"GET /health HTTP/{version}\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n".encode()
    with serving(API(Settings(), queue)) as (server, address), Wire(address) as wire:
        wire.send(health)
        assert wire.answer().status == 200
        server.stop()
        until(lambda: refused(address))
        wire.send(health)
        answer = wire.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert wire.ended()


def test_stop_answers_accepted_requests(near: Queue) -> None:
    admin = raw(near)
    with serving(API(Settings(), near)) as (server, address):
        wires = [Wire(address) for _ in range(60)]  # more than there are threads
        try:
            admin.execute_command("CLIENT", "PAUSE", "20000", "WRITE")
            for wire in wires:
                wire.send(spell("POST", "/jobs", VALID))
            until(lambda: admin.info("clients")["blocked_clients"] >= 8)
            server.stop()
            until(lambda: refused(address))
            admin.execute_command("CLIENT", "UNPAUSE")
            assert [wire.answer().status for wire in wires] == [201] * 60
        finally:
            admin.execute_command("CLIENT", "UNPAUSE")
            for wire in wires:
                wire.__exit__()
    assert near.waiting(["default"]) == 60


def test_stop_closes_unanswered_connections_after_its_timeout(near: Queue) -> None:
    admin = raw(near)
    admin.execute_command("CLIENT", "PAUSE", "20000", "WRITE")
    try:
        with serving(API(Settings(shutdown_timeout=0), near)) as (server, address):
            wire = Wire(address)
            wire.send(spell("POST", "/jobs", VALID))
            until(lambda: admin.info("clients")["blocked_clients"] == 1)
            server.stop()
        with wire:
            assert wire.ended()
    finally:
        admin.execute_command("CLIENT", "UNPAUSE")


def refused(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=0.1).close()
    except TimeoutError:  # dropped while the socket is being closed; the system would try again after a second
        return False
    except (ConnectionRefusedError, ConnectionResetError):  # reset while the socket is being closed
        return True
    return False
