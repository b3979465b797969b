"""What the HTTP API reads from requests and writes into responses.

The functions use Bottle's current request. They raise Problem or InvalidJob for a client's mistake.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote

from bottle import request

from tinyqueue import HANDLERS, ID, NAME, STATUSES, Filter, InvalidJob, Job, Once, Schedule, UnknownType
from tinyqueue_json import MAX_DEPTH, Preview, from_json, is_number
from tinyqueue_problems import Problem

log = logging.getLogger("tinyqueue.web")
S = TypeVar("S", Job, Schedule)

SHOWN = 200  # characters of a filter that the audit shows

# JSON or query name -> field of Filter
FILTERS = {
    **{"status": "status", "type": "type", "queue": "queue", "errorType": "error_type"},
    **{"tag": "tag", "text": "text"},
}


# Reading requests -----------------------------------------------------------------------------------------------------


def read_body(limit: int, *types: str) -> bytes:
    """Return the body, which must have one of these media types and no more than `limit` bytes."""
    if media_type() not in types:
        detail = f"unsupported media type; send JSON with Content-Type: {' or '.join(types)}"
        raise Problem(415, "unsupported-media-type", detail)
    coding = request.environ.get("HTTP_CONTENT_ENCODING", "identity").strip().lower()
    if coding != "identity":
        detail = f"Content-Encoding {printable(coding)} is not supported; send the body without compression"
        raise Problem(415, "unsupported-media-type", detail, {"Accept-Encoding": "identity"})
    length = content_length()
    try:
        body = b"" if length > limit else read_stream(length, limit + 1)
    except OSError:  # from a server that has lost the client, or that does not wait any longer
        raise Problem(400, "bad-request", "the body did not arrive") from None
    if length > limit or len(body) > limit:
        raise Problem(413, "too-large", f"the body has more than {limit} bytes; send less or raise TINYQUEUE_MAX_BODY")
    return body


def content_length() -> int:
    """Return the declared length of the body, or -1. Not every server checks what it passes on."""
    text = request.environ.get("CONTENT_LENGTH")
    if not text:
        return -1
    if not re.fullmatch("[0-9]{1,18}", text):
        raise Problem(400, "bad-request", "Content-Length must be a number of bytes")
    return int(text)


def read_stream(length: int, most: int) -> bytes:
    """Read the body, up to `most` bytes of it.

    A body without a length is chunked. Servers that decode the chunks, as all known ones do, say so
    with wsgi.input_terminated. Without that, Bottle decodes them.
    """
    environ = request.environ
    if length < 0 and not environ.get("wsgi.input_terminated"):
        with request.body as stream:
            return bytes(stream.read(most))
    left = most if length < 0 else min(length, most)
    body = b""
    while left > len(body) and (part := environ["wsgi.input"].read(left - len(body))):  # it may return less
        body += part
    return body


def media_type() -> str:
    return str(request.content_type).partition(";")[0].strip().lower()


def read_json(limit: int) -> Any:
    return decode_json(read_body(limit, "application/json"), MAX_DEPTH + 1)  # a payload inside a job


def read_optional_json(limit: int) -> Any:
    """Return the body, or an empty object if the request has none.

    Without a length, only JSON as media type means a body: some servers add another type to
    requests without one.
    """
    length = content_length()
    chunked = "HTTP_TRANSFER_ENCODING" in request.environ
    if not length or (length < 0 and not chunked and media_type() != "application/json"):
        return {}
    body = read_body(limit, "application/json")
    return decode_json(body, MAX_DEPTH + 1) if body.strip() else {}


def read_batch(limit: int) -> Any:
    body = read_body(limit, "application/json", "application/x-ndjson")
    if media_type() == "application/json":
        return decode_json(body, MAX_DEPTH + 2)  # a payload inside a job inside an array
    return [decode_json(line, MAX_DEPTH + 1) for line in body.split(b"\n") if line.strip()]


def decode_json(body: bytes, levels: int) -> Any:
    try:
        return from_json(body, levels)
    except ValueError as error:
        raise Problem(400, "not-json", f"the body is not JSON: {error}") from None


def read_arguments(
    what: str, fields: Any, known: Mapping[str, str], required: Sequence[str], type: str = ""
) -> dict[str, Any]:
    """Return a client's fields as arguments. Refuses types without a handler.

    `type` is that of the job if the fields have none.
    """
    if not isinstance(fields, dict):
        raise InvalidJob(what, f"must be an object with {' and '.join(required or ('its fields',))}")
    if unknown := fields.keys() - known.keys():
        raise InvalidJob(printable(min(unknown)), f"unknown field; the fields of a {what} are {', '.join(known)}")
    if missing := set(required) - fields.keys():
        raise InvalidJob(max(missing), "is required")
    wanted = type or fields["type"]
    if isinstance(wanted, str) and wanted not in HANDLERS:
        raise UnknownType(printable(wanted), sorted(HANDLERS))
    return {known[name]: value for name, value in fields.items()}


def read_key(content: Any) -> Once | None:
    """Return the caller's Idempotency-Key, if there is one, with a fingerprint of the request."""
    key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
    if key is None:
        return None
    if len(key) > 1 and key[0] == key[-1] == '"':  # the IETF draft defines the key as a quoted string
        key = key[1:-1]
    if not 1 <= len(key) <= 255 or not key.isascii() or not key.isprintable():
        raise Problem(400, "invalid-idempotency-key", "Idempotency-Key must be 1 to 255 printable ASCII characters")
    own_key = f"{request.environ['tinyqueue.caller']}\n{key}"  # callers may use the same key independently
    whole_request = json.dumps([request.path, request.query_string, content], sort_keys=True)
    return Once(own_key, hashlib.sha256(whole_request.encode()).hexdigest())


def read_query(only: str = "") -> dict[str, str]:
    """Return the query. With `only`, refuse other parameters."""
    query = dict(read_query_pairs())
    if only and (unknown := query.keys() - {only}):
        name = printable(min(unknown))
        raise Problem(400, "invalid-query", f"{name}: unknown parameter; the only one is {only}", field=name)
    return query


def read_query_pairs() -> list[tuple[str, str]]:
    try:
        return parse_qsl(request.query_string, keep_blank_values=True, errors="strict")
    except ValueError as error:
        raise Problem(400, "invalid-query", f"cannot read the query string: {error}") from None


def read_int(query: dict[str, str], name: str, default: int, low: int, high: int) -> int:
    """Remove a number from the query and return it."""
    text = query.pop(name, str(default))
    if not re.fullmatch("[0-9]{1,16}", text) or not low <= int(text) <= high:
        raise Problem(400, "invalid-query", f"{name} must be a whole number from {low} to {high}", field=name)
    return int(text)


def read_most(fields: Any, high: int) -> int:
    """Remove the number `most` from the fields of a body and return it."""
    most = fields.pop("most", high) if isinstance(fields, dict) else high
    if not is_number(most) or not 1 <= most <= high or most % 1:
        raise InvalidJob("most", f"must be a whole number from 1 to {high}")
    return int(most)


def read_flag(query: Mapping[str, str], name: str) -> bool:
    text = query.get(name, "false")
    if text not in ("true", "false"):
        raise Problem(400, "invalid-query", f"{name} must be true or false", field=name)
    return text == "true"


def read_filter(wanted: Mapping[str, str]) -> Filter:
    """Make a filter from a query or the fields of a body. Empty values do not filter."""
    values = {FILTERS[name]: value for name, value in wanted.items() if name in FILTERS and value}
    if unknown := wanted.keys() - FILTERS.keys():
        raise InvalidJob(printable(min(unknown)), f"unknown filter; the filters are {', '.join(FILTERS)}")
    if values.get("status", "pending") not in STATUSES:
        raise InvalidJob("status", f"must be one of {', '.join(STATUSES)}")
    return Filter(**values)  # type: ignore[arg-type]


def note_sent_ids(job: Job) -> Job:
    """Store the request id and the traceparent of the client, if it sent them."""
    sent_ids = request.environ["tinyqueue.sent_ids"]
    job.request_id = sent_ids.get("requestId", "")
    job.traceparent = sent_ids.get("traceparent", "")
    return job


def is_ref(value: Any) -> bool:
    return isinstance(value, str) and bool(NAME.fullmatch(value)) and not ID.fullmatch(value)


def read_refs(items: Sequence[Any], ids: Sequence[str]) -> dict[str, str]:
    """Return the ids of the jobs of a batch by `ref`. If two have the same, the first has it."""
    refs: dict[str, str] = {}
    for fields, id in zip(items, ids, strict=True):
        if isinstance(fields, dict) and is_ref(fields.get("ref")):
            refs.setdefault(fields["ref"], id)
    return refs


def printable(name: str) -> str:
    """Return a client's text, escaped and cut to a length that fits into an error."""
    return ascii(name)[1:-1][:100]


# Writing responses ----------------------------------------------------------------------------------------------------


def require_job(job: Job | None) -> Job:
    if job is None:
        raise Problem(404, "not-found", "no job has this id, or it ended long ago and was deleted; check the id")
    return job


def require_schedule(found: S | None) -> S:
    if found is None:
        raise Problem(404, "not-found", "no schedule has this name; see GET /schedules")
    return found


def require_worker(registered: bool) -> None:
    if not registered:
        raise Problem(404, "not-found", "no worker with this id is registered; see GET /workers")


# What the audit calls a route that has another name.
CALLED = {"hasten": "run", "put": "set"}
COUNTS = {"cancelled", "retried", "purged", "skipped"}  # in the answer to a bulk change


def describe_action(
    route: str, args: Mapping[str, str], body: Mapping[str, Any]
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the action, the target and the result of a route that has changed something."""
    verb, _, kind = route.partition("_")
    action = CALLED.get(verb, verb)
    if kind == "many":
        filter = {name: value[:SHOWN] for name, value in request.environ["tinyqueue.filter"].items() if value}
        return action, {"filter": filter}, {name: n for name, n in body.items() if name in COUNTS}
    [(part, name)] = args.items()
    target = {{"id": "job", "name": kind or "queue", "limit": "limit"}[part]: name}
    if kind == "limit":
        return action, target, body.get("override", {})
    return action, target, {"jobId": body["jobId"]} if body.get("jobId", name) != name else {}


def shown(target: Mapping[str, Any]) -> str:
    """Return the target of an action in words: job 0190..., or failed jobs with type mail."""
    [(kind, about)] = target.items()
    if kind != "filter":
        return f"{kind} {about}"
    others = " and ".join(f"{name} {ascii(value)[1:-1]}" for name, value in about.items() if name != "status")
    return f"{about['status']} jobs" + (f" with {others}" if others else "")


def summary(job: Job) -> dict[str, str]:
    return {"jobId": job.id, "status": job.status}


def shorten(fields: dict[str, Any]) -> dict[str, Any]:
    """Mark a payload or result that was cut as a preview. Remove the traceback and the history."""
    for name in ("payload", "result"):
        if isinstance(fields.get(name), Preview):
            fields[name + "Preview"] = str(fields.pop(name))
    if "error" in fields:
        fields["error"] = {"type": fields["error"].type, "message": fields["error"].message}
    fields.pop("history", None)
    return fields


def log_request(environ: Mapping[str, Any], status: int, milliseconds: int) -> None:
    """Log a request: at info if its method can change something or it failed, else at debug."""
    method = environ["REQUEST_METHOD"][:20]
    path = quote(environ.get("PATH_INFO", ""), errors="replace")[:200]
    level = logging.INFO if method not in ("GET", "HEAD") or status >= 400 else logging.DEBUG
    if log.isEnabledFor(level):
        known = {"key": environ.get("tinyqueue.caller"), "job": environ.get("tinyqueue.job")}
        fields = {"event": "request", "method": method, "path": path, "status": status, "durationMs": milliseconds}
        known["reason"] = environ.get("tinyqueue.reason")
        fields |= {name: value for name, value in known.items() if value}
        by = f" by {known['key']}" if known["key"] else ""
        why = f": {known['reason']}" if known["reason"] else ""
        log.log(level, "%s %s %d in %d ms%s%s", method, path, status, milliseconds, by, why, extra={"fields": fields})
