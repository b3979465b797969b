"""Thousands of malformed requests, made from seeds. None may be stored or break anything."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from client import NO_BODY, Client, Wire, serving, spell
from conftest import Entry, dump, put

from tinyqueue import CURSOR, KEY_LENGTH, MAX_ATTEMPTS, MAX_DELAY, Queue, handler
from tinyqueue_config import Settings
from tinyqueue_json import MAX_DEPTH
from wsgi import API, ROUTES

SEEDS = range(8)
REQUESTS = 500  # for each seed, on each server
PACKETS = 60  # for each seed, over a socket
MAX_BODY = 8192


def echo(payload: dict[str, Any]) -> None:
    """Never runs in these tests."""


@pytest.fixture(autouse=True)
def handlers(no_handlers: None) -> None:
    handler("echo")(echo)


# Requests -------------------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """A request. Its status must be from `lowest` to `highest`."""

    method: str
    path: str
    body: Any = NO_BODY
    headers: dict[str, str] | None = None
    lowest: int = 400
    highest: int = 499


VALID = {"type": "echo", "payload": {"a": [1, "b", None, 2.5, {"c": True}]}}
JOB = json.dumps(VALID).encode()
ODD_TEXTS = [
    "",
    " ",
    "\0",
    "\n",
    "é",
    "\ud800",
    "٣",
    "../",
    "{queue}:counts",
    "*",
    "%00",
    "'; --",
    "<script>",
    "a" * 300,
    "echo ",
    "__proto__",
]
ODD_VALUES = [None, True, False, 0, -1, 1.5, -0.0, 2**63, -(2**70), 10**300, 1e308, [], {}, [[]], {"a": {}}, *ODD_TEXTS]
WRONG = {
    "type": [value for value in ODD_VALUES if value != "echo"],
    "payload": [value for value in ODD_VALUES if not isinstance(value, dict)] + [{"a": "\ud800"}, {"\udfff": 1}],
    "maxAttempts": [v for v in ODD_VALUES if v is not None and v is not False] + [False, MAX_ATTEMPTS + 1, 1e300, "3"],
    "queue": [value for value in ODD_VALUES if value is not None and value != "__proto__"],
    "delay": [v for v in ODD_VALUES if v is not None and (isinstance(v, bool) or v not in (0, 1.5, -0.0))]
    + [MAX_DELAY + 1, "1"],
    "expiresIn": [v for v in ODD_VALUES if v is not None and (isinstance(v, bool) or v != 1.5)] + [MAX_DELAY + 1, "1"],
    "uniqueKey": [
        v
        for v in ODD_VALUES
        if v is not None and not (isinstance(v, str) and v.isprintable() and 1 <= len(v) <= KEY_LENGTH)
    ],
    "after": [v for v in ODD_VALUES if v is not None and v != []] + [["a"], [1], [None], [[]], ["a"] * 1001],
    "onFailure": [value for value in ODD_VALUES if value is not None],
    "ref": [v for v in ODD_VALUES if v is not None and v != "__proto__"] + ["00000000-0000-7000-8000-000000000000"],
    "runAt": [
        1.5,
        True,
        [],
        {},
        *ODD_TEXTS,
        2**63,
        10**300,
        "2999-01-01T00:00:00Z",
        "2026-01-01",
        "2026-02-30T00:00:00Z",
    ],
}
CONTENT_TYPES = [
    "",
    "text/plain",
    "application/jsons",
    "json",
    "application/xml;q=application/json",
    "*/*",
    "\xff",
    ";",
    "a/b;" * 50,
]
METHODS = [
    "GET",
    "HEAD",
    "POST",
    "PUT",
    "DELETE",
    "PATCH",
    "TRACE",
    "CONNECT",
    "FOO",
    "get",
    "PRI",
    "X" * 500,
    "M-SEARCH",
    "!",
]
NO_JOB = "01900000-0000-7000-8000-000000000000"
FILLED_ROUTES = [
    (method, path.replace("<id>", NO_JOB).replace("<name>", "default").replace("<limit>", "echo"))
    for method, path, *_ in ROUTES
]
PATHS = ["/", "/jobs/", "/jobs/x", "/nope", "/queues/", "/queues/default", *sorted({path for _, path in FILLED_ROUTES})]
SUPPORTED = {
    (spelled, path)
    for method, path in FILLED_ROUTES
    for spelled in (method, method.lower(), "HEAD" if method == "GET" else method)
}


def job_with_a_wrong_field(rng: random.Random) -> Request:
    return Request("POST", "/jobs", wrong_job(rng))


def wrong_job(rng: random.Random) -> Any:
    name = rng.choice(list(WRONG))
    return VALID | {name: rng.choice(WRONG[name])}


def wrong_batch(rng: random.Random) -> Request:
    """A batch of valid jobs and at least one invalid job."""
    items = [VALID] * rng.randint(0, 5)
    items.insert(rng.randint(0, len(items)), rng.choice([wrong_job(rng), [VALID], None, {}, "x"]))
    if rng.random() < 0.5:
        return Request("POST", "/jobs/batch", items, maybe_odd_idempotency_key(rng))
    body = b"\n".join(json.dumps(item).encode() for item in items)
    return Request("POST", "/jobs/batch", body, {"Content-Type": "application/x-ndjson"})


def not_a_batch(rng: random.Random) -> Request:
    return Request(
        "POST",
        "/jobs/batch",
        rng.choice([value for value in ODD_VALUES if value not in ([[]],)] + [VALID, [], {"jobs": [VALID]}]),
    )


def wrong_partial_batch(rng: random.Random) -> Request:
    """A batch of invalid jobs. Each must be reported and none stored."""
    items = [rng.choice([wrong_job(rng), [VALID], None, {}, "x"]) for _ in range(rng.randint(1, 5))]
    return Request("POST", "/jobs/batch?partial=true", items, lowest=200, highest=200)


def broken_lines(rng: random.Random) -> Request:
    """JSON lines of which one is not JSON."""
    lines = [JOB] * rng.randint(0, 5)
    lines.insert(
        rng.randint(0, len(lines)),
        rng.choice([JOB[:-1], b"x", b"\xff", b"\0", b"NaN", JOB + JOB, b'{"a":1,"a":1}', b"["]),
    )
    path = rng.choice(["/jobs/batch", "/jobs/batch?partial=true"])
    return Request(
        "POST", path, rng.choice([b"\n", b"\r\n", b"\n\n"]).join(lines), {"Content-Type": "application/x-ndjson"}
    )


def maybe_odd_idempotency_key(rng: random.Random) -> dict[str, str]:
    return rng.choice([{}, {"Idempotency-Key": "".join(rng.choice('ab" ~') for _ in range(rng.randint(1, 255)))}])


def invalid_idempotency_key(rng: random.Random) -> Request:
    key = rng.choice(["", '""', "a" * 256, "\0", "a\tb", "\x7f", "\xc3\xa9", "\xff", "\xff" * 300])
    path, body = rng.choice([("/jobs", VALID), ("/jobs/batch", [VALID]), ("/jobs/batch?partial=true", [VALID])])
    return Request("POST", path, body, {"Idempotency-Key": key})


ODD_QUERIES = [
    "",
    "x",
    "-1",
    "0.5",
    "%00",
    "%ff",
    "%0a",
    "%D9%A3",
    "9" * 300,
    "%ud800",
    "+1",
    "1%20",
    "'",
    "[]",
    "1e3",
    "true%00",
]


def wrong_query(rng: random.Random) -> Request:
    value = rng.choice(ODD_QUERIES)
    choices = [
        "/jobs?limit=" + value,
        f"/jobs/{NO_JOB}?wait=" + value,
        "/jobs?state=" + value,
        "/jobs?%ff=" + value,
        "/jobs?type=%ff",
    ]
    if value:
        choices += [
            "/jobs?status=" + value,
            *("/jobs?limit=1&cursor=" + c for c in (value, "1." + value) if not CURSOR.fullmatch(c)),
        ]
    return Request(rng.choice(["GET", "HEAD"]), rng.choice(choices))


VERBS = ("retry", "run", "replay", "purge")  # in the path of a job


def wrong_change(rng: random.Random) -> Request:
    """A bulk change with an invalid filter."""
    fields = rng.choice(
        [
            {
                rng.choice(["type", "queue", "status", "errorType", "cursor"]): rng.choice(
                    [v for v in ODD_VALUES if not isinstance(v, str)]
                )
            },
            {"cursor": rng.choice([text for text in ODD_TEXTS if text])},
            {"status": rng.choice(ODD_TEXTS)},
            {rng.choice(ODD_TEXTS): "x"},
            rng.choice([value for value in ODD_VALUES if not isinstance(value, dict)]),
            {"limit": "1"},
            {"most": rng.choice([0, 1001, 1.5, -1, True, "1", [], {}, None]), "status": "failed"},
        ]
    )
    return Request("POST", rng.choice(["/jobs/cancel", "/jobs/retry", "/jobs/purge"]), fields)


def invalid_queue_name(rng: random.Random) -> Request:
    name = rng.choice(
        [
            "",
            "a" * 101,
            "%00",
            "%0a",
            "a%0a",
            "a%20",
            "%ff",
            "%c3%a9",
            "a:b",
            "*",
            "%7bqueue%7d",
            "a/b",
            "..%2f",
            "%",
            "{a}",
        ]
    )
    return Request("POST", f"/queues/{name}/{rng.choice(['pause', 'resume'])}", rng.choice([NO_BODY, {}]))


def unknown_field(rng: random.Random) -> Request:
    name = rng.choice(ODD_TEXTS) + rng.choice(["", "x", *WRONG])
    return Request("POST", "/jobs", VALID | {name if name not in WRONG else "status": rng.choice(ODD_VALUES)})


def missing_field(rng: random.Random) -> Request:
    names = rng.sample(["maxAttempts", "queue", "delay", "runAt"], rng.randint(0, 4)) + rng.choice(
        [[], ["type"], ["payload"]]
    )
    return Request("POST", "/jobs", dict.fromkeys(names, 1))


def not_an_object(rng: random.Random) -> Request:
    return Request(
        "POST",
        "/jobs",
        rng.choice([value for value in ODD_VALUES if not isinstance(value, dict)] + [[VALID], [[VALID]]]),
    )


def truncated(rng: random.Random) -> Request:
    return Request("POST", "/jobs", JOB[: rng.randrange(len(JOB))])


def trailing(rng: random.Random) -> Request:
    return Request(
        "POST", "/jobs", JOB + rng.choice([b"}", b"]", b",", b"\0", b"x", JOB, b"\xff", b"//", b"\xef\xbb\xbf"])
    )


def random_bytes(rng: random.Random) -> Request:
    return Request("POST", "/jobs", rng.randbytes(rng.choice([1, 2, 10, 100, 1000])))


def invalid_bytes(rng: random.Random) -> Request:
    """A job that contains bytes which never occur in UTF-8."""
    body = bytearray(JOB)
    for _ in range(rng.randint(1, 5)):
        body.insert(rng.randrange(len(body)), rng.choice(b"\xff\xfe\xc0\xc1\xf5"))
    return Request("POST", "/jobs", bytes(body))


def another_encoding(rng: random.Random) -> Request:
    name = rng.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
    return Request("POST", "/jobs", JOB.decode().encode(name))


def invalid_number(rng: random.Random) -> Request:
    word = rng.choice(
        [
            b"NaN",
            b"Infinity",
            b"-Infinity",
            b"1e999",
            b"-1E+400",
            b"9" * 4301,
            b"01",
            b"+1",
            b"1.",
            b".1",
            b"0x1",
            b"1_0",
        ]
    )
    return Request("POST", "/jobs", b'{"type":"echo","payload":{"a":[1,%b]}}' % word)


def too_deep(rng: random.Random) -> Request:
    levels = rng.choice([MAX_DEPTH + 1, 500, 1500, 4000])
    left, right = rng.choice([(b"[", b"]"), (b'{"":', b"}")])
    closed = rng.choice([0, levels // 2, levels])
    body = b'{"type":"echo","payload":{"a":%b1%b}}' % (left * levels, right * closed)
    return Request("POST", "/jobs", body[:MAX_BODY])


def duplicate_name(rng: random.Random) -> Request:
    name = rng.choice([b"type", b"payload", b"\\u0074ype", b"", b"\\ud800", b"id"])
    pair = b'"%b":1' % name
    inner = rng.choice([b"{%b,%b}", b'{"x":{%b,"y":2,%b}}', b"[[{%b , %b}]]"]) % (pair, pair)
    return Request("POST", "/jobs", b'{"type":"echo","payload":{"a":%b}}' % inner)


def too_large(rng: random.Random) -> Request:
    size = rng.choice([MAX_BODY + 1, 2 * MAX_BODY, 20 * MAX_BODY])
    return Request("POST", "/jobs", rng.choice([b" ", b"[", b'"', b"\xff"]) * size)


def wrong_content_type(rng: random.Random) -> Request:
    return Request("POST", "/jobs", JOB, {"Content-Type": rng.choice(CONTENT_TYPES)})


def broken_chunks(rng: random.Random) -> Request:
    """A broken chunked body, as a host that does not decode chunks would pass it on."""
    body = rng.choice(
        [
            b"",
            b"zz\r\n",
            b"-5\r\nabc",
            b"5\r\nabc\r\n",
            b"\r\n",
            b"ffffffffff\r\n",
            b"1",
            b"3;x\r\nabc",
            rng.randbytes(50),
        ]
    )
    return Request("POST", "/jobs", body, {"Transfer-Encoding": rng.choice(["chunked", "gzip, chunked", "CHUNKED"])})


def odd_headers(rng: random.Random) -> Request:
    """A truncated job with odd headers, which must not matter."""
    names = [
        "Accept",
        "Cookie",
        "Range",
        "If-None-Match",
        "Authorization",
        "Host",
        "X-Forwarded-For",
        "Forwarded",
        "Origin",
        "Sec-Fetch-Site",
        "Idempotency-Key",
        "X-Forwarded-Proto",
        "X-" + "a" * 99,
    ]
    values = ["", "\xff\xfe", ',;=\t"', "bytes=0-1", "Basic !!", 'a="', "::1", "a" * 5000, "\x7f", "$Version=1; a"]
    return Request("POST", "/jobs", JOB[:-1], {rng.choice(names): rng.choice(values) for _ in range(rng.randint(1, 5))})


def invalid_id(rng: random.Random) -> Request:
    id = list(NO_JOB)
    for _ in range(rng.randint(1, 3)):
        id[rng.randrange(len(id))] = rng.choice(
            ["g", "%00", "%0a", "%2f", ":", "*", "%25", "A", "%e0", "", " ", "..", "/", "x" * 200]
        )
    method, suffix = rng.choice(
        [("GET", ""), ("GET", "?wait=25"), ("DELETE", ""), *(("POST", "/" + verb) for verb in VERBS)]
    )
    return Request(method, "/jobs/" + "".join(id) + suffix)


def unknown_path(rng: random.Random) -> Request:
    parts = [
        "/",
        "//",
        "/jobs",
        "/stats",
        "..",
        "%2e",
        "%00",
        "%ff%fe",
        "%",
        "%zz",
        ";",
        "\x7f",
        "x" * 1000,
        "/.git",
        "?a=%ff&b",
        "#",
    ]
    path = "/nope" + "".join(rng.choice(parts) for _ in range(rng.randint(0, 8)))
    return Request(rng.choice(["GET", "HEAD", "POST", "OPTIONS", "DELETE", "FOO"]), path)


def wrong_method(rng: random.Random) -> Request:
    method = rng.choice(METHODS)
    path = rng.choice(PATHS)
    if (method, path) in SUPPORTED:
        method = "PUT"
    return Request(method, path, rng.choice([NO_BODY, JOB, rng.randbytes(20)]))


def ignored_query(rng: random.Random) -> Request:
    """A valid path with a random query, which must not matter."""
    noise = "".join(rng.choice("%=&;+?#/\\\x01\xff0aé") for _ in range(rng.randint(1, 40)))
    return Request(
        rng.choice(["GET", "HEAD"]),
        rng.choice(["/health", "/ready", "/queues", "/workers"]) + "?" + noise,
        lowest=200,
        highest=200,
    )


MAKERS: list[Callable[[random.Random], Request]] = [
    job_with_a_wrong_field,
    wrong_batch,
    not_a_batch,
    wrong_partial_batch,
    broken_lines,
    invalid_idempotency_key,
    wrong_query,
    wrong_change,
    invalid_queue_name,
    unknown_field,
    missing_field,
    not_an_object,
    truncated,
    trailing,
    random_bytes,
    invalid_bytes,
    another_encoding,
    invalid_number,
    too_deep,
    duplicate_name,
    too_large,
    wrong_content_type,
    broken_chunks,
    odd_headers,
    invalid_id,
    unknown_path,
    wrong_method,
    ignored_query,
]


# Tests ----------------------------------------------------------------------------------------------------------------


def without_notes(queue: Queue) -> dict[str, Entry]:
    """Return everything except what /ready notes: since when there is trouble, and the backlog of each minute."""
    notes = queue.keys.trouble, queue.keys.minute(0)[:-1]
    return {key: entry for key, entry in dump(queue).items() if not key.startswith(notes)}


@pytest.mark.parametrize("seed", SEEDS)
def test_refuse_every_malformed_request(queue: Queue, seed: int) -> None:
    rng = random.Random(seed)
    api = Client(API(Settings(max_body=MAX_BODY), queue))
    put(queue, "failed")
    job = put(queue, "pending")
    before = without_notes(queue)
    for _ in range(REQUESTS):
        request = rng.choice(MAKERS)(rng)
        answer = api.call(request.method, request.path, request.body, request.headers)
        assert request.lowest <= answer.status <= request.highest, (request, answer)
        if request.method != "HEAD" and answer.status != 200:
            assert answer.problem, request
        elif answer.body:
            assert answer.json, request
    assert without_notes(queue) == before
    assert api.log.getvalue() == ""
    assert api.get(f"/jobs/{job.id}").json["status"] == "pending"
    assert api.post("/jobs", VALID).status == 201


REQUEST = spell("POST", "/jobs", JOB[:-1])
NO_PATH = "/jobs/" + NO_JOB


def packet(rng: random.Random) -> bytes:
    """Make a request without a complete job, with bytes changed, cut, repeated or inserted."""
    raw = bytearray(
        rng.choice(
            [REQUEST, REQUEST, *map(spell, ["GET", "HEAD", "DELETE"], ["/jobs", "/stats", NO_PATH]), rng.randbytes(200)]
        )
    )
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(raw))
        match rng.randrange(5):
            case 0:
                raw[at] = rng.randrange(256)
            case 1:
                del raw[at : at + rng.randint(1, 20)]
            case 2:
                raw[at:at] = raw[at : at + rng.randint(1, 50)]
            case 3:
                raw[at:at] = rng.choice(
                    [b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"\r\n\r\n", b"\xff" * 10, b"9" * 30]
                )
            case 4:
                raw[at:at] = rng.choice(
                    [b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n"]
                )
        raw = raw or bytearray(b"\0")
    return bytes(raw)


@pytest.mark.parametrize("seed", SEEDS)
def test_keep_serving_after_malformed_bytes_on_a_socket(queue: Queue, seed: int) -> None:
    rng = random.Random(seed)
    with serving(API(Settings(max_body=MAX_BODY), queue)) as (_, address):
        before = dump(queue)
        for _ in range(PACKETS):
            with Wire(address) as wire:
                wire.send(packet(rng))
                wire.half_close()
                assert b" 500 " not in wire.rest()
        assert dump(queue) == before
        with Wire(address) as wire:
            wire.send(spell("POST", "/jobs", JOB))
            assert wire.answer().status == 201
