"""Problems: the errors of the HTTP API, as application/problem+json (RFC 9457).

`problem` translates the errors of the queue. This module knows no routes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import bottle
import msgspec
from bottle import request

from tinyqueue import (
    Corrupted,
    InvalidJob,
    KeyReused,
    NotReplicated,
    QueueFull,
    SettingsError,
    TinyQueueError,
    Unavailable,
    UnknownType,
    WrongStatus,
)

log = logging.getLogger("tinyqueue.web")

RETRY_AFTER = 5  # seconds
# Every response has these, not only problems.
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class Problem(Exception):
    """A request that was refused or failed. `more` and `headers` are added to the response."""

    def __init__(
        self, status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.headers = headers or {}
        self.more = more

    def body(self) -> dict[str, Any]:
        title = self.kind.replace("-", " ").capitalize()
        about = {"type": f"urn:tinyqueue:{self.kind}", "title": title, "status": self.status, "detail": str(self)}
        return about | self.more

    def response(self) -> bottle.HTTPResponse:
        if self.kind != kind_of_status(self.status):
            # Not the detail, which may repeat a part of the payload.
            where = f"{self.more.get('field', '')}{self.more.get('path', '').removeprefix('$')}"
            request.environ["tinyqueue.reason"] = " ".join(filter(None, (self.kind, where)))
        headers = {**response_headers(), "Content-Type": "application/problem+json", **self.headers}
        return bottle.HTTPResponse(msgspec.json.encode(self.body()), self.status, headers)


def kind_of_status(status: int) -> str:
    """Return the kind of a problem about which nothing more is known than its status."""
    return HTTPStatus(status).phrase.lower().replace(" ", "-")


# The status and the kind of each error of the queue. The first class that matches counts.
PROBLEMS: tuple[tuple[type[TinyQueueError], int, str], ...] = (
    (UnknownType, 422, "unknown-type"),
    (InvalidJob, 422, "invalid-job"),
    (KeyReused, 422, "idempotency-key-reused"),
    (WrongStatus, 409, "wrong-status"),
    (QueueFull, 503, "queue-full"),
    (NotReplicated, 503, "not-replicated"),
    (Unavailable, 503, "unavailable"),
    (SettingsError, 503, "misconfigured"),
    (Corrupted, 500, "corrupted"),
    (TinyQueueError, 500, "internal"),
)


def problem(error: TinyQueueError, **more: Any) -> Problem:
    """Turn an error of the queue into a problem of the current request."""
    found = problem_of(error, **more)
    if found.status >= 500:
        log.warning("%s %s failed: %s", request.method, ascii(request.path), error)
    return found


def problem_of(error: TinyQueueError, **more: Any) -> Problem:
    """Turn an error of the queue into a problem, also where there is no request."""
    status, kind = next((status, kind) for cls, status, kind in PROBLEMS if isinstance(error, cls))
    match error:
        case UnknownType():
            more |= {"field": error.field, "known": error.known}
        case InvalidJob():
            more |= {"field": error.field} | ({"path": error.path} if error.path else {})
        case NotReplicated():
            ids = [job.id for job in error.jobs]
            more |= {"jobIds": ids} | ({"jobId": ids[0]} if len(ids) == 1 else {})
        case WrongStatus():
            more |= {"jobStatus": error.job.status}
        case Unavailable():
            more |= {"reason": error.reason}
    return Problem(status, kind, str(error), {"Retry-After": str(RETRY_AFTER)} if status == 503 else None, **more)


def response_headers() -> dict[str, str]:
    """Return the headers of a response to the current request."""
    rate_limit_headers: dict[str, str] = request.environ.get("tinyqueue.rate_limit_headers", {})
    return HEADERS | rate_limit_headers
