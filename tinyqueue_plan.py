"""What a load needs: slots, workers, memory and connections. The command `plan` prints it.

`make_plan` only computes. docs/operations.md, Capacity, says where its figures come from.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from tinyqueue import KEPT, SettingsError
from tinyqueue_config import Settings

# Measured by tests/bench.py --plan; docs/operations.md says where. Times are of one core.
BUSY = 0.7  # planned use of slots and cores: the rest absorbs peaks and works off a backlog
FULL = 0.8  # planned use of maxmemory; an alert fires above it
REDIS_COST = 350e-6, 6e-9  # seconds of Redis for a job that is submitted and run by itself; for each byte of it
WORKER_COST = 1000e-6, 10e-9  # seconds of a worker process, without the handler
WEB_COST = 600e-6, 10e-9  # seconds of a web process for a submit
ENTRY = 250, 450  # bytes of Redis for a pending job and for an ended one, beside its record
RECORD = 50, 250  # bytes of the record, beside payload and result
TRACEBACK = 1500  # bytes of a failed job's error
ONCE = 360  # bytes of Redis for an Idempotency-Key
OWN = 5_000_000, 25_000  # bytes of Redis without jobs, and for each connection
MAX_SHARDS = 64


class Load(NamedTuple):
    """What a deployment is planned for. Sizes are bytes of JSON, times are seconds."""

    rate: float
    duration: float
    payload: int
    result: int = 100
    failed: float = 1.0  # percent
    outage: float = 3600.0
    keys: bool = False


class Plan(msgspec.Struct, rename="camel"):
    """What a load needs. Memory is in bytes; connections are those to each shard."""

    busy_slots: float
    slots: int
    workers: int
    web_processes: int
    shards: int
    jobs_per_redis: int
    connections: int
    backlog: int
    catch_up: float
    memory: dict[str, int]
    max_memory: int


def make_plan(load: Load, settings: Settings) -> Plan:
    """Compute what a load needs. Raises SettingsError if it is too much for one deployment."""
    size = load.payload + load.result
    per_redis = _rate_of_one(REDIS_COST, size)
    per_worker = _rate_of_one(WORKER_COST, size)
    shards = max(settings.shards, _round_up(load.rate / per_redis))
    if shards > MAX_SHARDS:
        raise SettingsError(f"{load.rate:,.0f} such jobs/s need {shards} shards, and {MAX_SHARDS} is the maximum")
    needed = max(1, _round_up(load.rate * load.duration / BUSY))
    workers = max(_round_up(needed / settings.worker_concurrency), _round_up(load.rate / per_worker))
    web = _round_up(load.rate / _rate_of_one(WEB_COST, load.payload))
    slots = workers * settings.worker_concurrency
    backlog = _round_up(load.rate * load.outage)
    connections = workers * settings.worker_connections + web * settings.web_connections
    memory = _plan_memory(load, settings, backlog, shards)
    memory["other"] = shards * (OWN[0] + connections * OWN[1])
    return Plan(
        busy_slots=load.rate * load.duration,
        slots=slots,
        workers=workers,
        web_processes=web,
        shards=shards,
        jobs_per_redis=int(per_redis),
        connections=connections,
        backlog=backlog,
        catch_up=backlog / (min(slots / load.duration, workers * per_worker / BUSY) - load.rate),
        memory=memory,
        max_memory=_round_up(sum(memory.values()) / FULL),
    )


def _rate_of_one(cost: tuple[float, float], size: int) -> float:
    """Return how many jobs a second one core serves at the planned use."""
    return BUSY / (cost[0] + cost[1] * size)


def _round_up(number: float) -> int:
    return math.ceil(round(number, 6))


def _plan_memory(load: Load, settings: Settings, backlog: int, shards: int) -> dict[str, int]:
    """Return the bytes of all jobs of each kind that are stored at the end of the outage."""
    kept = KEPT * shards
    share = load.failed / 100
    completed = min(kept, load.rate * (1 - share) * settings.keep_completed)
    failed = min(kept, load.rate * share * settings.keep_failed)
    keys = load.rate * settings.keep_once if load.keys else 0
    return {
        "pending": _round_up((backlog + load.rate * load.duration) * memory_of(load.payload)),
        "completed": _round_up(completed * memory_of(load.payload + load.result, ended=True)),
        "failed": _round_up(failed * memory_of(load.payload + TRACEBACK, ended=True)),
        "keys": _round_up(keys * ONCE),
    }


def memory_of(size: int, ended: bool = False) -> int:
    """Return the bytes of Redis for a job with that many bytes of payload and result.

    Redis' allocator rounds a record up to one of four sizes between two powers of two.
    """
    record = size + RECORD[ended]
    step = 1 << max(4, (record - 1).bit_length() - 3)
    return ENTRY[ended] + -(-record // step) * step
