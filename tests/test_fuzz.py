"""Malformed requests by the thousand, made from seeds: none may be accepted, none may break anything, none may store anything."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from client import NO_BODY, Client, Wire, serving, spell
from conftest import dump, put

from tinyqueue import HANDLERS, MAX_ATTEMPTS, MAX_DELAY, MAX_DEPTH, Queue, Settings, handler
from wsgi import API, ROUTES

SEEDS = range(8)
REQUESTS = 500  # of each seed, on each server
PACKETS = 60  # of each seed, over a socket
MAX_BODY = 8192


def echo(payload: dict[str, Any]) -> None:
    """Nobody runs it here."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = dict(HANDLERS)
    HANDLERS.clear()
    handler("echo")(echo)
    yield
    HANDLERS.clear()
    HANDLERS.update(before)


# What is sent ---------------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """`lowest` and `highest` bound the status that must come back."""

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
    "delay": [v for v in ODD_VALUES if v is not None and (isinstance(v, bool) or v not in (0, 1.5, -0.0))] + [MAX_DELAY + 1, "1"],
    "runAt": [1.5, True, [], {}, *ODD_TEXTS, 2**63, 10**300, "2999-01-01T00:00:00Z", "2026-01-01", "2026-02-30T00:00:00Z"],
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
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "FOO", "get", "PRI", "X" * 500, "M-SEARCH", "!"]
PATHS = ["/", "/jobs", "/jobs/", "/stats", "/health", "/ready", "/jobs/x", "/nope"]
SERVED = {
    (spelled, path) for method, path, _ in ROUTES for spelled in (method, method.lower(), "HEAD" if method == "GET" else method)
}
NO_JOB = "01900000-0000-7000-8000-000000000000"


def wrong_field(rng: random.Random) -> Request:
    name = rng.choice(list(WRONG))
    return Request("POST", "/jobs", VALID | {name: rng.choice(WRONG[name])})


def unknown_field(rng: random.Random) -> Request:
    name = rng.choice(ODD_TEXTS) + rng.choice(["", "x", *WRONG])
    return Request("POST", "/jobs", VALID | {name if name not in WRONG else "status": rng.choice(ODD_VALUES)})


def missing_field(rng: random.Random) -> Request:
    names = rng.sample(["maxAttempts", "queue", "delay", "runAt"], rng.randint(0, 4)) + rng.choice([[], ["type"], ["payload"]])
    return Request("POST", "/jobs", dict.fromkeys(names, 1))


def no_object(rng: random.Random) -> Request:
    return Request(
        "POST", "/jobs", rng.choice([value for value in ODD_VALUES if not isinstance(value, dict)] + [[VALID], [[VALID]]])
    )


def cut(rng: random.Random) -> Request:
    return Request("POST", "/jobs", JOB[: rng.randrange(len(JOB))])


def trailing(rng: random.Random) -> Request:
    return Request("POST", "/jobs", JOB + rng.choice([b"}", b"]", b",", b"\0", b"x", JOB, b"\xff", b"//", b"\xef\xbb\xbf"]))


def noise(rng: random.Random) -> Request:
    return Request("POST", "/jobs", rng.randbytes(rng.choice([1, 2, 10, 100, 1000])))


def bent_bytes(rng: random.Random) -> Request:
    """Bytes that never stand in UTF-8, somewhere in a job."""
    body = bytearray(JOB)
    for _ in range(rng.randint(1, 5)):
        body.insert(rng.randrange(len(body)), rng.choice(b"\xff\xfe\xc0\xc1\xf5"))
    return Request("POST", "/jobs", bytes(body))


def another_encoding(rng: random.Random) -> Request:
    name = rng.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
    return Request("POST", "/jobs", JOB.decode().encode(name))


def no_number(rng: random.Random) -> Request:
    word = rng.choice(
        [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1E+400", b"9" * 4301, b"01", b"+1", b"1.", b".1", b"0x1", b"1_0"]
    )
    return Request("POST", "/jobs", b'{"type":"echo","payload":{"a":[1,%b]}}' % word)


def deep(rng: random.Random) -> Request:
    levels = rng.choice([MAX_DEPTH + 1, 500, 1500, 4000])
    left, right = rng.choice([(b"[", b"]"), (b'{"":', b"}")])
    closed = rng.choice([0, levels // 2, levels])
    body = b'{"type":"echo","payload":{"a":%b1%b}}' % (left * levels, right * closed)
    return Request("POST", "/jobs", body[:MAX_BODY])


def twice(rng: random.Random) -> Request:
    name = rng.choice([b"type", b"payload", b"\\u0074ype", b"", b"\\ud800", b"id"])
    pair = b'"%b":1' % name
    inner = rng.choice([b"{%b,%b}", b'{"x":{%b,"y":2,%b}}', b"[[{%b , %b}]]"]) % (pair, pair)
    return Request("POST", "/jobs", b'{"type":"echo","payload":{"a":%b}}' % inner)


def too_large(rng: random.Random) -> Request:
    size = rng.choice([MAX_BODY + 1, 2 * MAX_BODY, 20 * MAX_BODY])
    return Request("POST", "/jobs", rng.choice([b" ", b"[", b'"', b"\xff"]) * size)


def content_type(rng: random.Random) -> Request:
    return Request("POST", "/jobs", JOB, {"Content-Type": rng.choice(CONTENT_TYPES)})


def bent_chunks(rng: random.Random) -> Request:
    """What a host that passes chunks on as they are might hand over."""
    body = rng.choice(
        [b"", b"zz\r\n", b"-5\r\nabc", b"5\r\nabc\r\n", b"\r\n", b"ffffffffff\r\n", b"1", b"3;x\r\nabc", rng.randbytes(50)]
    )
    return Request("POST", "/jobs", body, {"Transfer-Encoding": rng.choice(["chunked", "gzip, chunked", "CHUNKED"])})


def odd_headers(rng: random.Random) -> Request:
    """A truncated job among headers of which none may matter."""
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
        "X-" + "a" * 99,
    ]
    values = ["", "\xff\xfe", ',;=\t"', "bytes=0-1", "Basic !!", 'a="', "::1", "a" * 5000, "\x7f", "$Version=1; a"]
    return Request("POST", "/jobs", JOB[:-1], {rng.choice(names): rng.choice(values) for _ in range(rng.randint(1, 5))})


def id_that_is_none(rng: random.Random) -> Request:
    id = list(NO_JOB)
    for _ in range(rng.randint(1, 3)):
        id[rng.randrange(len(id))] = rng.choice(
            ["g", "%00", "%0a", "%2f", ":", "*", "%25", "A", "%e0", "", " ", "..", "/", "x" * 200]
        )
    return Request("GET", "/jobs/" + "".join(id))


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
    method, path = rng.choice(METHODS), rng.choice(PATHS)
    if (method, path) in SERVED:
        method = "PUT"
    return Request(method, path, rng.choice([NO_BODY, JOB, rng.randbytes(20)]))


def query(rng: random.Random) -> Request:
    """A path that is right with a query that must not matter."""
    noise = "".join(rng.choice("%=&;+?#/\\\x01\xff0aé") for _ in range(rng.randint(1, 40)))
    return Request(rng.choice(["GET", "HEAD"]), rng.choice(["/health", "/ready", "/stats"]) + "?" + noise, lowest=200, highest=200)


MAKERS: list[Callable[[random.Random], Request]] = [
    wrong_field,
    unknown_field,
    missing_field,
    no_object,
    cut,
    trailing,
    noise,
    bent_bytes,
    another_encoding,
    no_number,
    deep,
    twice,
    too_large,
    content_type,
    bent_chunks,
    odd_headers,
    id_that_is_none,
    unknown_path,
    wrong_method,
    query,
]


# What must come back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_refuse_whatever_is_malformed(queue: Queue, seed: int) -> None:
    rng = random.Random(seed)
    api = Client(API(Settings(max_body=MAX_BODY), queue))
    put(queue, "failed")
    job = put(queue, "pending")
    before = dump(queue)
    for _ in range(REQUESTS):
        request = rng.choice(MAKERS)(rng)
        answer = api.call(request.method, request.path, request.body, request.headers)
        assert request.lowest <= answer.status <= request.highest, (request, answer)
        if request.method != "HEAD" and answer.status != 200:
            assert answer.problem, request
        elif answer.body:
            assert answer.json, request
    assert dump(queue) == before
    assert api.log.getvalue() == ""
    assert api.get(f"/jobs/{job.id}").json["status"] == "pending"
    assert api.post("/jobs", VALID).status == 201


REQUEST = spell("POST", "/jobs", JOB[:-1])


def packet(rng: random.Random) -> bytes:
    """A request that holds no whole job, with bytes changed, left out, doubled, or put where they do not belong."""
    raw = bytearray(rng.choice([REQUEST, REQUEST, spell("GET", "/stats"), spell("HEAD", "/jobs/" + NO_JOB), rng.randbytes(200)]))
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
                raw[at:at] = rng.choice([b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"\r\n\r\n", b"\xff" * 10, b"9" * 30])
            case 4:
                raw[at:at] = rng.choice([b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n"])
        raw = raw or bytearray(b"\0")
    return bytes(raw)


@pytest.mark.parametrize("seed", SEEDS)
def test_serve_on_after_whatever_comes_over_a_socket(queue: Queue, seed: int) -> None:
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
