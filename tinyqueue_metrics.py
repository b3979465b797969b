"""The metrics of all jobs and workers, as Prometheus collects them."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, product
from typing import Any

from tinyqueue import BUCKETS, ENDED, HANDLERS, SERIES, UNENDED, TinyQueueError
from tinyqueue_reading import add_counts
from tinyqueue_schedule import list_schedules
from tinyqueue_shards import AnyQueue

# Name after tinyqueue_, kind, labels, help text. The names and labels are a part of the contract:
# deploy/ and users' own dashboards read them.
METRICS = (
    ("jobs", "gauge", "queue status", "pending and processing jobs; pending ones include delayed ones"),
    ("jobs_delayed", "gauge", "", "pending jobs that wait for their runAt or for other jobs"),
    ("jobs_retrying", "gauge", "", "pending jobs that wait for another attempt after a failed one"),
    ("jobs_kept", "gauge", "status", "jobs that have ended and are still stored"),
    ("oldest_waiting_seconds", "gauge", "queue", "time that the next job has waited since it could start"),
    ("redis_memory_ratio", "gauge", "", "share of Redis' maxmemory that is used, 0 without a limit"),
    ("queue_paused", "gauge", "queue", "1 if the queue is paused, else 0"),
    ("jobs_held", "gauge", "type", "pending jobs that wait for room under a limit"),
    (
        "limit_usage",
        "gauge",
        "type",
        "share of max_running that is in use; with limit_by, the highest among the limits that hold jobs or were set",
    ),
    ("workers", "gauge", "", "live workers"),
    ("slots", "gauge", "", "jobs that the live workers can run at a time"),
    ("slots_busy", "gauge", "", "jobs that the live workers held at their last heartbeat"),
    ("jobs_enqueued", "counter", "type queue", "jobs accepted"),
    ("jobs_started", "counter", "type queue", "attempts started"),
    ("jobs_completed", "counter", "type queue", "jobs that ended as completed"),
    ("jobs_failed", "counter", "type queue", "jobs that ended as failed"),
    ("jobs_cancelled", "counter", "type queue", "jobs that ended as cancelled"),
    (
        "jobs_retried",
        "counter",
        "type queue",
        "failed attempts after which another follows by itself; not the retries of POST /jobs/retry",
    ),
    (
        "jobs_revived",
        "counter",
        "type queue",
        "jobs requeued by POST /jobs/retry, POST /jobs/<id>/retry or worker.py retry",
    ),
    ("jobs_released", "counter", "type queue", "attempts handed back by a stopping worker"),
    ("jobs_reaped", "counter", "type queue", "attempts lost with their worker"),
    ("schedule_paused", "gauge", "schedule", "1 if the schedule is paused, else 0"),
    ("schedule_overdue_seconds", "gauge", "schedule", "time for which a tick has been due, or 0"),
    (
        "schedule_last_tick_timestamp_seconds",
        "gauge",
        "schedule",
        "time of the last tick, 0 before the first",
    ),
    ("schedule_ticks_failed", "counter", "", "failed tries to enqueue the job of a tick; each is followed by another"),
    ("submissions_refused", "counter", "reason", "requests to submit jobs that were refused although they were valid"),
    ("stuck_threads", "gauge", "", "handlers that still run although they were given up after their timeout"),
    ("problems", "gauge", "check", "1 if the check of the verdict has found a problem, else 0"),
    ("scrape_errors", "counter", "", "scrapes that failed because Redis could not be read"),
    ("job_waiting_seconds", "histogram", "type queue", "time from when a job could start until it started"),
    ("job_running_seconds", "histogram", "type queue", "time from an attempt's start until its outcome was stored"),
)
# Alerts watch these, so they are exposed before the first job of a type in a queue that is served.
FAILURES = {"jobs_failed", "jobs_reaped", "jobs_retried"}


REASONS = (  # why submissions are refused: reasons of Unavailable, then kinds of problems
    *("full", "read-only", "unreachable", "timeout", "loading", "refused", "busy"),
    *("queue-full", "not-replicated", "too-many-requests"),
)


class Refusals:
    """Counts the submissions that a web process refused, in memory until Redis takes the counts."""

    def __init__(self) -> None:
        self.counts = Counter[str]()
        self._lock = threading.Lock()
        self._stored = -math.inf  # when

    def note(self, reason: str, queue: AnyQueue) -> None:
        """Count a refusal. Stores the counts at most once a second, and not while Redis is away."""
        with self._lock:
            self.counts[reason] += 1
        if reason not in ("unreachable", "timeout", "loading") and time.monotonic() - self._stored >= 1:
            self.store(queue)

    def store(self, queue: AnyQueue) -> None:
        with self._lock:
            self._stored = time.monotonic()
            counts = self.counts
            self.counts = Counter()
        try:
            if counts:
                queue.count_refused(counts)
        except TinyQueueError:
            with self._lock:
                self.counts += counts


class Scrape:
    """The values of one scrape. It is a collector, as prometheus_client defines them."""

    def __init__(self, queue: AnyQueue, missed: int = 0, problems: Mapping[str, bool] | None = None) -> None:
        stats = queue.stats()
        counters = queue.metrics()
        errors = {(): counters.pop("scrapeErrors", {}).get((), 0) + missed}
        refused = counters.pop("refused", {})
        failed_ticks = counters.pop("failedTicks", {}).get((), 0)
        schedules = [made for made, _ in list_schedules(queue)]
        now = queue.now()
        workers = [worker for worker in queue.workers() if worker["alive"]]
        pairs = dict.fromkeys(labels[:2] for counts in counters.values() for labels in counts)
        pairs |= dict.fromkeys((type, handler.queue) for type, handler in HANDLERS.items())
        served = dict.fromkeys(name for worker in workers for name in worker["queues"])
        unused = [pair for pair in product(HANDLERS, served) if pair not in pairs][: max(0, SERIES - len(pairs))]
        queues = sorted(stats["queues"].items(), key=lambda item: -item[1]["pending"] - item[1]["processing"])[:SERIES]
        self.values: dict[str, Any] = {
            "jobs": {(name, status): queue[status] for name, queue in queues for status in UNENDED},
            "jobs_delayed": {(): stats["delayed"]},
            "jobs_retrying": {(): stats["retrying"]},
            "jobs_kept": {(status,): stats[status] for status in ENDED},
            "oldest_waiting_seconds": {(name,): queue["oldestWaitingMs"] / 1000 for name, queue in queues},
            "queue_paused": {(name,): int(queue["paused"]) for name, queue in queues},
            "redis_memory_ratio": {(): queue.memory_use},
            **_limit_gauges(queue.limits_in_use()),
            "workers": {(): len(workers)},
            "slots": {(): sum(worker["concurrency"] for worker in workers)},
            "slots_busy": {(): sum(len(worker["jobs"]) for worker in workers)},
            "schedule_paused": {(made.name,): int(made.paused) for made in schedules},
            "schedule_overdue_seconds": {(made.name,): made.overdue(now) / 1000 for made in schedules},
            "schedule_last_tick_timestamp_seconds": {(made.name,): made.last_at / 1000 for made in schedules},
            "schedule_ticks_failed": {(): failed_ticks},
            "submissions_refused": {(reason,): refused.get((reason,), 0) for reason in REASONS},
            "stuck_threads": {(): sum(len(worker["givenUp"]) for worker in workers)},
            "problems": {(check,): int(found) for check, found in (problems or {}).items()},
            "scrape_errors": errors,
            "job_waiting_seconds": _histograms(counters, "waited"),
            "job_running_seconds": _histograms(counters, "ran"),
        }
        started = {pair: buckets[-1][1] for pair, (buckets, _) in self.values["job_waiting_seconds"].items()}
        for what, kind, labels, _ in METRICS:
            if kind == "counter" and labels == "type queue":
                counts = started if what == "jobs_started" else counters.get(what.removeprefix("jobs_"), {})
                # Also zeros: Prometheus sees no increase when a counter first appears with a value.
                more = unused if what in FAILURES else ()
                self.values[what] = {pair: counts.get(pair, 0) for pair in (*pairs, *more)}

    def collect(self) -> Iterator[Any]:
        from prometheus_client import core

        for name, kind, labels, help in METRICS:
            family = getattr(core, f"{kind.title()}MetricFamily")(f"tinyqueue_{name}", help, labels=labels.split())
            for label_values, value in self.values[name].items():
                family.add_metric(label_values, *(value if kind == "histogram" else (value,)))
            yield family


def _limit_gauges(limits: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[tuple[str, ...], float]]:
    """Return the gauges by type: the values of a field that a limit is by may be too many."""
    held: dict[tuple[str, ...], float] = {}
    usage: dict[tuple[str, ...], float] = {}
    for limit, about in limits.items():
        type = (limit.partition("/")[0],)
        held[type] = held.get(type, 0) + about["held"]
        if most := about["maxRunning"]:
            usage[type] = max(usage.get(type, 0.0), about["running"] / most)
    return {"jobs_held": held, "limit_usage": usage}


def _histograms(
    counters: Mapping[str, Mapping[tuple[str, ...], int]], what: str
) -> dict[tuple[str, ...], tuple[Any, float]]:
    """Return buckets, cumulative as Prometheus requires, and sums in seconds, by type and queue."""
    stored = counters.get(what, {})
    sums = counters.get(what + "Ms", {})
    bounds = [*(str(bound / 1000) for bound in BUCKETS[:-1]), "+Inf"]
    histograms = {}
    for pair in dict.fromkeys(labels[:2] for labels in stored):
        counts = accumulate(stored.get((*pair, str(bound)), 0) for bound in BUCKETS)
        histograms[pair] = list(zip(bounds, counts, strict=True)), sums.get(pair, 0) / 1000
    return histograms


# Types ----------------------------------------------------------------------------------------------------------------

LAST = BUCKETS[-2]  # ms; times above the last finite bound count as this


def types(queue: AnyQueue, minutes: int) -> dict[str, Any]:
    """Report by type how many attempts ended in the last minutes, and how long jobs waited and ran.

    The counts begin at a whole minute. The times may begin earlier, at `timesSince`. Every type
    that has a handler is listed.
    """
    recent = queue.recent(minutes)
    since, times = queue.times(minutes)
    counts: dict[str, dict[str, Any]] = {}
    for minute in recent:
        add_counts(counts, minute["types"])
    elapsed = max((queue.now() - recent[0]["at"]) / 60_000, 1.0)
    names = sorted({*HANDLERS, *counts, *times})
    rows = {name: _row(counts.get(name, {}), times.get(name, {}), elapsed) for name in names}
    return {"minutes": minutes, "timesSince": since, "types": rows}


def _row(counts: Mapping[str, Any], times: Mapping[str, Mapping[str, int]], minutes: float) -> dict[str, Any]:
    completed, failed = counts.get("completed", 0), counts.get("failed", 0)
    ended = completed + failed
    return {
        "completed": completed,
        "failed": failed,
        "perMinute": round(ended / minutes, 2),
        "failureShare": round(failed / ended, 4) if ended else None,
        "errors": dict(sorted(counts.get("errors", {}).items(), key=lambda item: -item[1])),
        "waitedMs": _percentiles(times.get("waited", {})),
        "ranMs": _percentiles(times.get("ran", {})),
    }


def _percentiles(counts: Mapping[str, int]) -> dict[str, float | None]:
    buckets = [counts.get(str(bound), 0) for bound in BUCKETS]
    return {"p50": percentile(buckets, 0.5), "p95": percentile(buckets, 0.95)}


def percentile(buckets: Sequence[int], share: float) -> float | None:
    """Estimate a percentile from the counts of BUCKETS, as Prometheus does. None without counts.

    Assumes that times are spread evenly within a bucket.
    """
    wanted = share * sum(buckets)
    below = low = 0.0
    for count, bound in zip(buckets, BUCKETS, strict=True):
        if count and below + count >= wanted:
            return round(low + (min(bound, LAST) - low) * (wanted - below) / count, 1)
        below += count
        low = min(bound, LAST)
    return None
