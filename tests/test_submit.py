"""Submits with an Idempotency-Key or a uniqueKey, in batches, with an expiry, to full queues."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from client import Answer, Client, Wire, serving, spell
from conftest import Server, dump, newest, put, raw

from tinyqueue import KEY_LENGTH, MAX_DELAY, MAX_JOBS, Failure, Queue, handler
from tinyqueue_config import Settings
from tinyqueue_json import MAX_DEPTH
from tinyqueue_problems import RETRY_AFTER
from wsgi import API

NDJSON = {"Content-Type": "application/x-ndjson"}


class SendEmail(msgspec.Struct, forbid_unknown_fields=True):
    to: str


def echo(payload: Any) -> Any:
    return payload


def send_email(email: SendEmail) -> None:
    """Never runs in these tests."""


@pytest.fixture(autouse=True)
def handlers(no_handlers: None) -> None:
    handler("echo")(echo)
    handler("send-email", queue="mail")(send_email)


def echo_with(**fields: Any) -> dict[str, Any]:
    return {"type": "echo", "payload": None} | fields


def once(key: str = "order-1") -> dict[str, str]:
    return {"Idempotency-Key": key}


def count(queue: Queue) -> int:
    """Count the jobs."""
    return len(raw(queue).keys(queue.keys.job("*")))


def assert_replays(answer: Answer, first: Answer) -> None:
    assert (answer.status, answer.headers["idempotency-replayed"]) == (200, "true")
    assert answer.json["jobId"] == first.json["jobId"]
    assert answer.headers["location"] == first.headers["location"]


# Idempotency-Key ------------------------------------------------------------------------------------------------------


def test_submit_twice_with_one_key_makes_one_job(api: Client, queue: Queue) -> None:
    first = api.post("/jobs", echo_with(), once())
    assert first.status == 201
    assert "idempotency-replayed" not in first.headers
    for _ in range(3):
        assert_replays(api.post("/jobs", echo_with(), once()), first)
    assert count(queue) == 1
    assert queue.waiting(["default"]) == 1


def test_submit_with_two_keys_makes_two_jobs(api: Client, queue: Queue) -> None:
    assert [api.post("/jobs", echo_with(), once(key)).status for key in ("a", "A", "a b")] == [201, 201, 201]
    assert count(queue) == 3


def test_submit_treats_a_quoted_key_like_a_bare_one(api: Client) -> None:
    first = api.post("/jobs", echo_with(), once('"order-1"'))
    assert_replays(api.post("/jobs", echo_with(), once("order-1")), first)
    assert_replays(api.post("/jobs", echo_with(), once('"order-1"')), first)


def test_submit_replays_the_same_job_in_another_spelling(api: Client) -> None:
    first = api.post("/jobs", b'{"type":"echo","payload":{"a":1,"b":[2]},"delay":60}', once())
    assert_replays(api.post("/jobs", b' {"delay":60, "payload":{"b":[2],"a":1},\n"type":"ech\\u006f"}', once()), first)


@pytest.mark.parametrize(
    "fields",
    [
        {"payload": 1},
        {"payload": False},
        {"payload": []},
        {"queue": "slow"},
        {"queue": None},
        {"maxAttempts": 3},
        {"delay": 1},
    ],
    ids=str,
)
def test_submit_refuses_a_key_that_was_used_for_another_job(api: Client, queue: Queue, fields: dict[str, Any]) -> None:
    api.post("/jobs", echo_with(), once())
    before = dump(queue)
    answer = api.post("/jobs", echo_with(**fields), once())
    assert (answer.status, answer.kind) == (422, "idempotency-key-reused")
    assert dump(queue) == before


def test_submit_refuses_a_key_that_was_used_on_another_route(api: Client, queue: Queue) -> None:
    api.post("/jobs", echo_with(), once())
    before = dump(queue)
    assert api.post("/jobs/batch", [echo_with()], once()).kind == "idempotency-key-reused"
    assert dump(queue) == before


@pytest.mark.parametrize(
    "key", ["a", "~" * 255, '"' + "~" * 255 + '"', '"', 'say "hi"', "{queue}:counts", "a,b;c=d", "%00"]
)
def test_submit_accepts_any_printable_key(api: Client, queue: Queue, key: str) -> None:
    first = api.post("/jobs", echo_with(), once(key))
    assert first.status == 201
    assert_replays(api.post("/jobs", echo_with(), once(key)), first)


@pytest.mark.parametrize(
    "key",
    ["", '""', "a" * 256, '"' + "a" * 256 + '"', "a\tb", "a\x7f", "a\0", "é".encode().decode("latin-1"), "\xff"],
    ids=ascii,
)
@pytest.mark.parametrize(
    ("path", "body"), [("/jobs", echo_with()), ("/jobs/batch", [echo_with()])], ids=["job", "batch"]
)
def test_submit_refuses_an_invalid_key(api: Client, queue: Queue, path: str, body: Any, key: str) -> None:
    answer = api.post(path, body, once(key))
    assert (answer.status, answer.kind) == (400, "invalid-idempotency-key")
    assert dump(queue) == {}


def test_submit_keeps_the_keys_of_two_callers_apart(queue: Queue) -> None:
    api = API(Settings(api_keys="ann:submit:0123456789-ann-x,bob:submit:0123456789-bob-x"), queue)
    ann = Client(api, "0123456789-ann-x")
    bob = Client(api, "0123456789-bob-x")
    first = ann.post("/jobs", echo_with(), once())
    other = bob.post("/jobs", echo_with(payload="mine"), once())
    assert (first.status, other.status) == (201, 201)
    assert_replays(ann.post("/jobs", echo_with(), once()), first)
    assert_replays(bob.post("/jobs", echo_with(payload="mine"), once()), other)


def test_submit_accepts_a_key_that_resembles_another_callers(queue: Queue) -> None:
    api = API(Settings(api_keys="a:submit:0123456789-ann-x,a.b:submit:0123456789-bob-x"), queue)
    assert Client(api, "0123456789-ann-x").post("/jobs", echo_with(), once(".b c")).status == 201
    assert Client(api, "0123456789-bob-x").post("/jobs", echo_with(payload=1), once("c")).status == 201


@pytest.mark.parametrize("status", ["processing", "completed", "failed", "cancelled"])
def test_replay_returns_the_current_status_of_the_job(api: Client, queue: Queue, status: str) -> None:
    first = api.post("/jobs", echo_with(), once())
    if status == "cancelled":
        queue.cancel(first.json["jobId"])
    else:
        [job] = queue.dequeue(queue.register(["default"], 1), ["default"])
        if status == "completed":
            queue.complete(job)
        elif status == "failed":
            queue.fail(job, Failure("Boom", "it broke"))
    again = api.post("/jobs", echo_with(), once())
    assert_replays(again, first)
    assert again.json["status"] == status
    assert count(queue) == 1


def test_replay_makes_no_job_when_the_first_was_deleted(api: Client, queue: Queue) -> None:
    first = api.post("/jobs", echo_with(), once())
    queue.cancel(first.json["jobId"])
    queue.clock.ahead = queue.keep_ms["cancelled"] + 1
    queue.trim()
    assert_replays(api.post("/jobs", echo_with(), once()), first)
    assert count(queue) == 0


def test_submit_remembers_a_key_for_the_time_of_the_setting(server: Server) -> None:
    queue = server.queue(keep_once=60)
    api = Client(API(Settings(), queue))
    api.post("/jobs", echo_with(), once())
    [key] = [key for key in raw(queue).keys("*") if b":once:" in key]
    assert 0 < raw(queue).pttl(key) <= 60_000
    raw(queue).pexpire(key, 0)
    assert api.post("/jobs", echo_with(), once()).status == 201


def test_submit_stores_neither_key_nor_job_when_refused(api: Client, queue: Queue) -> None:
    assert api.post("/jobs", {"type": "nope", "payload": 1}, once()).status == 422
    assert dump(queue) == {}
    assert api.post("/jobs", echo_with(), once()).status == 201


def test_submit_concurrently_with_one_key_makes_one_job(near: Queue) -> None:
    request = spell("POST", "/jobs", json.dumps(echo_with()).encode(), "Idempotency-Key: order-1")
    with serving(API(Settings(), near)) as (_, address):
        answers = at_once(address, [request] * 20)
    assert sorted(answer.status for answer in answers) == [200] * 19 + [201]
    assert len({answer.json["jobId"] for answer in answers}) == 1
    assert [answer.headers.get("idempotency-replayed") for answer in answers].count("true") == 19
    assert count(near) == near.waiting(["default"]) == 1


def test_submit_concurrently_with_one_key_and_different_jobs_stores_one(near: Queue) -> None:
    requests = [
        spell("POST", "/jobs", json.dumps(echo_with(payload=n)).encode(), "Idempotency-Key: order-1") for n in range(20)
    ]
    with serving(API(Settings(), near)) as (_, address):
        answers = at_once(address, requests)
    assert sorted(answer.status for answer in answers) == [201] + [422] * 19
    assert count(near) == near.waiting(["default"]) == 1


def at_once(address: tuple[str, int], requests: list[bytes]) -> list[Answer]:
    """Send each request on its own connection, all before the first answer is read."""
    wires = [Wire(address) for _ in requests]
    try:
        with ThreadPoolExecutor(len(wires)) as pool:
            list(pool.map(lambda pair: pair[0].send(pair[1]), zip(wires, requests, strict=True)))
        return [wire.answer() for wire in wires]
    finally:
        for wire in wires:
            wire.__exit__()


def test_submit_a_batch_twice_with_one_key_makes_its_jobs_once(api: Client, queue: Queue) -> None:
    jobs = [echo_with(payload=n) for n in range(50)]
    first = api.post("/jobs/batch", jobs, once())
    again = api.post("/jobs/batch", jobs, once())
    assert (first.status, again.status) == (201, 200)
    assert again.json == first.json
    assert again.headers["idempotency-replayed"] == "true"
    assert count(queue) == 50


@pytest.mark.parametrize("jobs", [[echo_with()], [echo_with()] * 3, [echo_with(), echo_with(payload=1)]], ids=len)
def test_batch_refuses_a_key_that_was_used_for_another_batch(api: Client, queue: Queue, jobs: Any) -> None:
    api.post("/jobs/batch", [echo_with()] * 2, once())
    before = dump(queue)
    assert api.post("/jobs/batch", jobs, once()).kind == "idempotency-key-reused"
    assert dump(queue) == before


def test_batch_refuses_a_key_that_was_used_without_partial(api: Client) -> None:
    api.post("/jobs/batch", [echo_with()], once())
    assert api.post("/jobs/batch?partial=true", [echo_with()], once()).kind == "idempotency-key-reused"


def test_submit_a_partial_batch_twice_with_one_key_makes_its_jobs_once(api: Client, queue: Queue) -> None:
    jobs = [echo_with(), {"type": "nope", "payload": 1}, echo_with()]
    first, again = (api.post("/jobs/batch?partial=true", jobs, once()) for _ in range(2))
    assert again.json == first.json
    assert again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in first.headers
    assert count(queue) == 2


# uniqueKey ------------------------------------------------------------------------------------------------------------


def test_submit_with_a_taken_unique_key_returns_its_job(api: Client, queue: Queue) -> None:
    first = api.post("/jobs", echo_with(uniqueKey="user 7 § é"))
    again = api.post("/jobs", echo_with(uniqueKey="user 7 § é", payload="other", queue="slow", delay=60))
    assert (first.status, again.status) == (201, 200)
    assert again.json == first.json | {"duplicate": True}
    assert again.headers["location"] == first.headers["location"]
    assert "idempotency-replayed" not in again.headers
    assert count(queue) == 1
    assert api.get(first.headers["location"]).json["uniqueKey"] == "user 7 § é"


@pytest.mark.parametrize("status", ["pending", "delayed", "processing"])
def test_unique_key_is_taken_until_the_job_ends(api: Client, queue: Queue, status: str) -> None:
    id = put(queue, status, unique_key="u").id
    assert api.post("/jobs", echo_with(uniqueKey="u")).json["jobId"] == id


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_unique_key_is_free_when_the_job_has_ended(api: Client, queue: Queue, status: str) -> None:
    put(queue, status, unique_key="u")
    assert api.post("/jobs", echo_with(uniqueKey="u")).status == 201


@pytest.mark.parametrize("key", ["", "a" * (KEY_LENGTH + 1), "a\n", "\0", "\ud800", 1, True, [], {}, ["a"]], ids=ascii)
def test_submit_refuses_an_invalid_unique_key(api: Client, queue: Queue, key: Any) -> None:
    answer = api.post("/jobs", echo_with(uniqueKey=key))
    assert (answer.status, answer.kind, answer.problem["field"]) == (422, "invalid-job", "uniqueKey")
    assert dump(queue) == {}


def test_submit_treats_null_as_no_unique_key(api: Client) -> None:
    assert [api.post("/jobs", echo_with(uniqueKey=None)).status for _ in range(2)] == [201, 201]


def test_submit_concurrently_with_one_unique_key_makes_one_job(near: Queue) -> None:
    request = spell("POST", "/jobs", json.dumps(echo_with(uniqueKey="u")).encode())
    with serving(API(Settings(), near)) as (_, address):
        answers = at_once(address, [request] * 20)
    assert sorted(answer.status for answer in answers) == [200] * 19 + [201]
    assert len({answer.json["jobId"] for answer in answers}) == 1
    assert count(near) == 1


def test_submit_marks_as_replayed_only_a_key_used_before(api: Client) -> None:
    api.post("/jobs", echo_with(uniqueKey="u"))
    answer = api.post("/jobs", echo_with(uniqueKey="u"), once())
    assert answer.status == 200
    assert "idempotency-replayed" not in answer.headers


def test_batch_makes_one_job_of_a_duplicate_unique_key(api: Client, queue: Queue) -> None:
    answer = api.post("/jobs/batch", [echo_with(uniqueKey=key) for key in ("a", "b", "a")])
    jobs = answer.json["jobs"]
    assert answer.status == 201
    assert jobs[0] | {"duplicate": True} == jobs[2]
    assert jobs[0] != jobs[1]
    assert count(queue) == 2


def test_batch_of_taken_unique_keys_answers_200(api: Client, queue: Queue) -> None:
    id = put(queue, "pending", unique_key="a").id
    answer = api.post("/jobs/batch", [echo_with(uniqueKey="a")] * 2)
    entry = {"jobId": id, "status": "pending", "duplicate": True}
    assert (answer.status, answer.json) == (200, {"jobs": [entry, entry]})


def test_unique_key_is_shared_by_types_and_queues(api: Client, queue: Queue) -> None:
    first = api.post("/jobs", echo_with(uniqueKey="u"))
    other = {"type": "send-email", "payload": {"to": "a"}, "queue": "slow", "uniqueKey": "u"}
    assert api.post("/jobs", other).json == first.json | {"duplicate": True}
    assert count(queue) == 1


# Batches --------------------------------------------------------------------------------------------------------------


def ids(answer: Answer) -> list[str]:
    return [job["jobId"] for job in answer.json["jobs"]]


def test_batch_answers_201_with_every_id_in_order(api: Client, queue: Queue) -> None:
    answer = api.post("/jobs/batch", [echo_with(payload=n) for n in range(20)])
    assert answer.status == 201
    assert {job["status"] for job in answer.json["jobs"]} == {"pending"}
    assert [api.get(f"/jobs/{id}").json["payload"] for id in ids(answer)] == list(range(20))
    started = queue.dequeue(queue.register(["default"], 20), ["default"], 20)
    assert [job.id for job in started] == ids(answer)


def test_batch_accepts_jobs_of_several_types_and_queues(api: Client, queue: Queue) -> None:
    jobs = [echo_with(queue="slow", delay=60), {"type": "send-email", "payload": {"to": "a"}}, echo_with(maxAttempts=9)]
    records = [api.get(f"/jobs/{id}").json for id in ids(api.post("/jobs/batch", jobs))]
    assert [record["queue"] for record in records] == ["slow", "mail", "default"]
    assert records[2]["maxAttempts"] == 9
    assert queue.waiting(["mail", "default"]) == 2


def test_batch_accepts_the_maximum_number_of_jobs(api: Client, queue: Queue) -> None:
    assert len(set(ids(api.post("/jobs/batch", [echo_with()] * MAX_JOBS)))) == MAX_JOBS == count(queue)


@pytest.mark.parametrize(
    "body", [[], [echo_with()] * (MAX_JOBS + 1), {}, echo_with(), "x", 1, None, True], ids=lambda b: str(b)[:20]
)
@pytest.mark.parametrize("path", ["/jobs/batch", "/jobs/batch?partial=true"])
def test_batch_refuses_what_is_not_a_list_of_jobs(api: Client, queue: Queue, path: str, body: Any) -> None:
    answer = api.post(path, body)
    assert (answer.status, answer.kind, answer.problem["field"]) == (422, "invalid-job", "jobs")
    assert str(MAX_JOBS) in answer.problem["detail"]
    assert dump(queue) == {}


WRONG = {
    "no object": (1, "invalid-job", "job"),
    "batch": ([echo_with()], "invalid-job", "job"),
    "unknown type": ({"type": "nope", "payload": 1}, "unknown-type", "type"),
    "payload": ({"type": "send-email", "payload": {"to": 1}}, "invalid-job", "payload"),
    "surrogate": ({"type": "echo", "payload": "\ud800"}, "invalid-job", "payload"),
    "surrogate in a name": ({"type": "echo", "payload": 1, "\ud800": 1}, "invalid-job", "\\ud800"),
    "large number": ({"type": "echo", "payload": 1, "delay": 10**400}, "invalid-job", "delay"),
    "field": (echo_with(nope=1), "invalid-job", "nope"),
    "delay": (echo_with(delay=-1), "invalid-job", "delay"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("at", [0, 1, 4])
def test_batch_with_an_invalid_job_stores_nothing_and_names_it(
    api: Client, queue: Queue, at: int, case: tuple[Any, str, str]
) -> None:
    wrong, kind, field = case
    jobs: list[Any] = [echo_with()] * 5
    jobs[at] = wrong
    answer = api.post("/jobs/batch", jobs)
    assert (answer.status, answer.kind) == (422, kind)
    assert (answer.problem["index"], answer.problem["field"]) == (at, field)
    assert dump(queue) == {}


@pytest.mark.parametrize("headers", [{}, once()], ids=["without a key", "with a key"])
@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_partial_batch_stores_the_valid_jobs_and_reports_on_each(
    api: Client, queue: Queue, case: tuple[Any, str, str], headers: dict[str, str]
) -> None:
    wrong, kind, field = case
    answer = api.post("/jobs/batch?partial=true", [echo_with(payload=0), wrong, echo_with(payload=2)], headers)
    assert answer.status == 201
    first, error, last = answer.json["jobs"]
    assert error["error"]["type"] == f"urn:tinyqueue:{kind}"
    assert (error["error"]["index"], error["error"]["field"], error["error"]["status"]) == (1, field, 422)
    assert [api.get(f"/jobs/{job['jobId']}").json["payload"] for job in (first, last)] == [0, 2]
    assert count(queue) == 2


def test_partial_batch_of_invalid_jobs_stores_nothing(api: Client, queue: Queue) -> None:
    answer = api.post("/jobs/batch?partial=true", [1, 2, {}])
    assert answer.status == 200
    assert [entry["error"]["index"] for entry in answer.json["jobs"]] == [0, 1, 2]
    assert dump(queue) == {}


def test_partial_batch_of_valid_jobs_answers_201(api: Client) -> None:
    assert api.post("/jobs/batch?partial=true", [echo_with()] * 2).status == 201


def test_batch_with_partial_false_stores_all_or_none(api: Client) -> None:
    assert api.post("/jobs/batch?partial=false", [echo_with(), 1]).status == 422


@pytest.mark.parametrize("value", ["", "1", "yes", "True", "true ", "true%00"])
def test_batch_refuses_an_invalid_value_of_partial(api: Client, queue: Queue, value: str) -> None:
    answer = api.post(f"/jobs/batch?partial={value}", [echo_with()])
    assert (answer.status, answer.kind, answer.problem["field"]) == (400, "invalid-query", "partial")
    assert dump(queue) == {}


def lines(*jobs: Any, end: str = "\n") -> bytes:
    return "".join(json.dumps(job) + end for job in jobs).encode()


@pytest.mark.parametrize(
    "body",
    [
        lines(echo_with(payload=0), echo_with(payload=1)),
        lines(echo_with(payload=0), echo_with(payload=1))[:-1],
        lines(echo_with(payload=0), echo_with(payload=1), end="\r\n"),
        lines(echo_with(payload=0), echo_with(payload=1), end="\n \n\n"),
        b"\n" + lines(echo_with(payload=0), echo_with(payload=1)),
    ],
    ids=["lines", "no newline at the end", "CRLF", "blank lines", "blank line first"],
)
@pytest.mark.parametrize("content_type", ["application/x-ndjson", "Application/X-NDJSON; charset=utf-8"])
def test_batch_accepts_a_job_on_each_line(api: Client, queue: Queue, body: bytes, content_type: str) -> None:
    answer = api.post("/jobs/batch", body, {"Content-Type": content_type})
    assert answer.status == 201
    assert [api.get(f"/jobs/{id}").json["payload"] for id in ids(answer)] == [0, 1]


def test_batch_keeps_line_separators_inside_texts(api: Client) -> None:
    text = "a\u2028b\x85c\x0bd\ne"
    body = '{"type":"echo","payload":"a\u2028b\x85c\\u000bd\\ne"}\n'.encode() * 2
    assert [api.get(f"/jobs/{id}").json["payload"] for id in ids(api.post("/jobs/batch", body, NDJSON))] == [text] * 2


@pytest.mark.parametrize(
    "line",
    [b"{", b"x", b'{"type":"echo","payload":NaN}', b'{"a":1,"a":1}', b"\xff", b'{"type":\n"echo"}', b"{}{}"],
    ids=ascii,
)
def test_batch_refuses_lines_of_which_one_is_not_json(api: Client, queue: Queue, line: bytes) -> None:
    for path in ("/jobs/batch", "/jobs/batch?partial=true"):
        answer = api.post(path, lines(echo_with()) + line + b"\n" + lines(echo_with()), NDJSON)
        assert (answer.status, answer.kind) == (400, "not-json")
    assert dump(queue) == {}


@pytest.mark.parametrize("body", [b"", b"\n\n", b" \r\n"], ids=ascii)
def test_batch_refuses_a_body_without_lines(api: Client, body: bytes) -> None:
    assert api.post("/jobs/batch", body, NDJSON).kind == "invalid-job"


def test_batch_reports_the_index_of_an_invalid_line(api: Client) -> None:
    answer = api.post("/jobs/batch", lines(echo_with(), echo_with(), {"type": "nope", "payload": 1}), NDJSON)
    assert (answer.status, answer.problem["index"]) == (422, 2)


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/ndjson", "application/jsonl", "application/x-ndjsonx"]
)
def test_batch_refuses_another_content_type(api: Client, content_type: str) -> None:
    assert api.post("/jobs/batch", lines(echo_with()), {"Content-Type": content_type}).kind == "unsupported-media-type"


def test_submit_refuses_lines_where_one_job_is_expected(api: Client) -> None:
    assert api.post("/jobs", lines(echo_with()), NDJSON).status == 415


def test_batch_ignores_a_content_type_parameter_that_names_lines(api: Client) -> None:
    answer = api.post(
        "/jobs/batch", json.dumps([echo_with()], indent=1).encode(), {"Content-Type": 'application/json; x="ndjson"'}
    )
    assert answer.status == 201


@pytest.mark.parametrize(("levels", "status"), [(MAX_DEPTH, 201), (MAX_DEPTH + 1, 400), (40_000, 400)])
def test_batch_accepts_payloads_up_to_the_maximum_depth(api: Client, levels: int, status: int) -> None:
    job = b'{"type":"echo","payload":' + b"[" * levels + b"]" * levels + b"}"
    assert api.post("/jobs/batch", b"[" + job + b"]").status == status
    assert api.post("/jobs/batch", job + b"\n", NDJSON).status == status


def test_batch_refuses_a_body_that_is_too_large(queue: Queue) -> None:
    api = Client(API(Settings(max_body=1024), queue))
    for headers in ({}, NDJSON):
        assert api.post("/jobs/batch", b" " * 1025, headers).kind == "too-large"


# expiresIn ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.001, 1, 1.5, 3600, MAX_DELAY])
def test_submit_accepts_the_seconds_after_which_a_job_expires(api: Client, seconds: float) -> None:
    job = api.get(api.post("/jobs", echo_with(expiresIn=seconds)).headers["location"]).json
    assert job["expiresAt"] == job["createdAt"] + round(seconds * 1000)


def test_submit_treats_null_as_no_expiry(api: Client) -> None:
    assert "expiresAt" not in api.get(api.post("/jobs", echo_with(expiresIn=None)).headers["location"]).json


@pytest.mark.parametrize(
    "value", [0, 0.0, -1, MAX_DELAY + 1, 1e300, 10**400, "5", True, [], {}], ids=lambda v: str(v)[:20]
)
def test_submit_refuses_an_invalid_expiry(api: Client, queue: Queue, value: Any) -> None:
    answer = api.post("/jobs", echo_with(expiresIn=value))
    assert (answer.status, answer.kind, answer.problem["field"]) == (422, "invalid-job", "expiresIn")
    assert dump(queue) == {}


def test_dequeue_fails_an_expired_job(api: Client, queue: Queue) -> None:
    location = api.post("/jobs", echo_with(expiresIn=60)).headers["location"]
    queue.clock.ahead = 61_000
    assert queue.dequeue(queue.register(["default"], 1), ["default"]) == []
    job = api.get(location).json
    assert (job["status"], job["error"]["type"], job["attempts"]) == ("failed", "Expired", 0)


# Full queues ----------------------------------------------------------------------------------------------------------


def assert_full(answer: Answer, kind: str = "queue-full") -> None:
    assert (answer.status, answer.kind) == (503, kind)
    assert answer.headers["retry-after"] == str(RETRY_AFTER)


def jobs_in(queue: Queue) -> dict[str, Any]:
    """Return all keys except those that count: a submission that was refused is counted, too."""
    return {key: entry for key, entry in dump(queue).items() if not re.search("}:(metrics|minute:)", key)}


@pytest.fixture
def small(server: Server) -> Queue:
    """A namespace whose queues may have three pending jobs each."""
    return server.queue(max_pending=3)


def test_submit_answers_503_when_the_queue_is_full(small: Queue) -> None:
    api = Client(API(Settings(), small))
    assert [api.post("/jobs", echo_with(delay=delay)).status for delay in (0, 60, 0)] == [201] * 3
    before = jobs_in(small)
    answer = api.post("/jobs", echo_with())
    assert_full(answer)
    assert "default" in answer.problem["detail"]
    assert_full(api.post("/jobs", echo_with(delay=60)))
    assert jobs_in(small) == before


def test_submit_to_another_queue_than_the_full_one_succeeds(small: Queue) -> None:
    api = Client(API(Settings(), small))
    api.post("/jobs/batch", [echo_with()] * 3)
    assert api.post("/jobs", echo_with(queue="other")).status == 201


def test_submit_succeeds_again_when_there_is_room(small: Queue) -> None:
    api = Client(API(Settings(), small))
    [first, *_] = ids(api.post("/jobs/batch", [echo_with()] * 3))
    assert_full(api.post("/jobs", echo_with()))
    assert api.call("DELETE", f"/jobs/{first}").status == 200
    assert api.post("/jobs", echo_with()).status == 201


def test_batch_without_room_for_all_stores_nothing(small: Queue) -> None:
    api = Client(API(Settings(), small))
    assert_full(api.post("/jobs/batch", [echo_with()] * 4))
    assert_full(api.post("/jobs/batch?partial=true", [echo_with()] * 4 + [1]))
    assert_full(api.post("/jobs/batch", [echo_with(queue="other")] + [echo_with()] * 4))
    assert jobs_in(small) == {}
    assert api.post("/jobs/batch", [echo_with()] * 3).status == 201


def test_replay_succeeds_when_the_queue_is_full(small: Queue) -> None:
    api = Client(API(Settings(), small))
    first = api.post("/jobs", echo_with(), once())
    api.post("/jobs/batch", [echo_with()] * 2)
    assert_replays(api.post("/jobs", echo_with(), once()), first)


def test_submit_with_a_taken_unique_key_succeeds_when_the_queue_is_full(small: Queue) -> None:
    """It stores nothing."""
    api = Client(API(Settings(), small))
    first = api.post("/jobs", echo_with(uniqueKey="u"))
    api.post("/jobs/batch", [echo_with()] * 2)
    again = api.post("/jobs", echo_with(uniqueKey="u"))
    assert (again.status, again.json) == (200, first.json | {"duplicate": True})


def test_submit_accepts_a_key_that_was_refused_for_a_full_queue(small: Queue) -> None:
    api = Client(API(Settings(), small))
    [first, *_] = ids(api.post("/jobs/batch", [echo_with()] * 3))
    assert_full(api.post("/jobs", echo_with(), once()))
    small.cancel(first)
    assert api.post("/jobs", echo_with(), once()).status == 201


@pytest.fixture
def tight(near: Queue) -> Iterator[Queue]:
    """A queue on a real Redis whose memory is nearly used up. Jobs can end; submits fail."""
    client = raw(near)
    near.enqueue("echo", "accepted before")
    client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 1.02) + 65536)
    client.config_set("maxmemory-policy", "noeviction")
    yield near
    client.config_set("maxmemory", 0)


def test_submit_answers_503_before_redis_is_full(tight: Queue, real: Server) -> None:
    queue = real.queue()
    api = Client(API(Settings(), queue))
    before = jobs_in(queue)
    for path, body in (
        ("/jobs", echo_with()),
        ("/jobs/batch", [echo_with()] * 2),
        ("/jobs/batch?partial=true", [echo_with(), 1]),
    ):
        answer = api.post(path, body, once())
        assert_full(answer, "unavailable")
        assert answer.problem["reason"] == "full"
    assert jobs_in(queue) == before


def test_complete_succeeds_while_no_job_is_accepted(tight: Queue, real: Server) -> None:
    queue = real.queue()
    api = Client(API(Settings(), queue))
    assert api.post("/jobs", echo_with()).status == 503
    [job] = queue.dequeue(queue.register(["default"], 1), ["default"])
    queue.complete(job, "done")
    assert api.get(f"/jobs/{job.id}").json["result"] == "done"


def test_submit_says_that_the_job_is_stored_when_another_key_is_corrupted(near: Queue) -> None:
    client = raw(near)
    client.set(near.keys.bell("default"), "not a list")
    answer = Client(API(Settings(), near)).post("/jobs", echo_with())
    assert (answer.status, answer.kind) == (500, "corrupted")
    assert answer.problem["detail"].endswith("; everything else of this transaction was applied")
    assert len(newest(near, "pending")) == 1
    client.delete(near.keys.bell("default"))


def test_submit_says_nothing_of_stored_jobs_when_it_could_not_read(near: Queue) -> None:
    client = raw(near)
    client.set(near.keys.once("\nk"), "not JSON")
    answer = Client(API(Settings(), near)).post("/jobs", echo_with(), {"Idempotency-Key": "k"})
    assert (answer.status, answer.kind) == (500, "corrupted")
    assert "applied" not in answer.problem["detail"]
    assert newest(near, "pending") == []
    client.delete(near.keys.once("\nk"))
