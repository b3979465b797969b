"""Adapt generated requests to rules that a schema cannot express. schemathesis.toml loads this file.

Reusing an Idempotency-Key for another request is an error, so each request gets its own key.
`partial=true` accepts a batch that contains invalid jobs, so it is removed. `runAt` has a latest
time and must be in the calendar, and `wait` and `seconds` may take long, so they are limited. The
cron expression, the time zone and the type of a schedule are replaced by some that exist, and so is
the name of a limit, which has no rate. `after` must name jobs that exist, and a `ref` must be unique
in its batch, so valid ones are removed. So is the payload of a replay, which depends on the type of
the job. Other tests cover all of these.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import schemathesis

from tinyqueue import NAME
from tinyqueue_handler import LIMIT, RATE
from tinyqueue_json import TIME, epoch_ms, parse_time

LATEST = timedelta(days=365)


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    key, query = (case.headers or {}).get("Idempotency-Key"), case.query or {}
    if isinstance(key, str) and 1 <= len(key) <= 255 and key.isascii() and key.isprintable():
        case.headers["Idempotency-Key"] = key.strip('"')[:200] + uuid.uuid4().hex
    if query.get("partial") in (True, "true"):
        del query["partial"]
    if str(query.get("wait", "")).isdecimal():
        query["wait"] = min(int(query["wait"]), 1)
    if str(query.get("seconds", "")).isdecimal() and 1 <= int(query["seconds"]) <= 25:
        query["seconds"] = 1
    limit = (case.path_parameters or {}).get("limit")
    if isinstance(limit, str) and LIMIT.fullmatch(limit):
        case.path_parameters["limit"] = "webhook"
        if isinstance(case.body, dict) and RATE.fullmatch(str(case.body.get("rate"))):
            case.body["rate"] = None
    for job in case.body if isinstance(case.body, list) else [case.body]:
        if isinstance(job, dict):
            _adapt(job)
        if isinstance(job, dict) and case.operation.path.endswith("/replay"):
            job.pop("payload", None)


def _adapt(job: dict[str, Any]) -> None:
    if _is_too_late(job.get("runAt")) or _is_impossible(job.get("runAt")):
        job["runAt"] = None
    if _expires_first(job):
        job["expiresIn"] = None
    if isinstance(job.get("cron"), str) and 1 <= len(job["cron"]) <= 200:
        valid = {"cron": "0 7 * * mon-fri", "timezone": "Europe/Berlin", "type": "echo"}
        job.update({name: value for name, value in valid.items() if isinstance(job.get(name), str)})
        job.update({"payload": {}} if "payload" in job else {})
    if _names_jobs(job.get("after")):
        job["after"] = []
    if _is_name(job.get("ref")):
        job["ref"] = None


def _names_jobs(after: Any) -> bool:
    return isinstance(after, list) and len(after) <= 1000 and all(map(_is_name, after))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(NAME.fullmatch(value))


def _expires_first(job: dict[str, Any]) -> bool:
    delay, expiry = job.get("delay"), job.get("expiresIn")
    if isinstance(expiry, bool) or not isinstance(expiry, int | float) or not 0 < expiry <= 366 * 86400:
        return False
    return job.get("runAt") is not None or (isinstance(delay, int | float) and delay >= expiry)


def _is_too_late(moment: Any) -> bool:
    milliseconds = epoch_ms(moment)
    return milliseconds is not None and milliseconds > (datetime.now(UTC) + LATEST).timestamp() * 1000


def _is_impossible(moment: Any) -> bool:
    """Whether a text has the form of a time, but names one like February 30."""
    return isinstance(moment, str) and bool(TIME.fullmatch(moment)) and parse_time(moment) is None
