"""Schedules: declaring, ticks and their faults, sync of two releases, the API, commands and backups."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

import pytest
import schedule_storm
from click.testing import CliRunner
from client import Client, running
from conftest import NoBar, RedisServer, Server, check_consistency, dump, put as put_job, raw, until
from cutproxy import CutProxy

import tinyqueue_cli
import tinyqueue_schedule
import worker
from tinyqueue import HANDLERS, Failure, InvalidJob, Job, Queue, QueueFull, Unavailable, handler, schedule
from tinyqueue_backup import back_up, restore
from tinyqueue_config import Settings
from tinyqueue_doctor import examine
from tinyqueue_repair import repair
from tinyqueue_schedule import NOTHING, Schedule, Scheduler, Ticker, declared, list_schedules, make_schedule, put, sync
from tinyqueue_shards import Shards
from wsgi import API

pytestmark = pytest.mark.usefixtures("no_handlers")
ROOT = Path(__file__).parent.parent
BOOM = Failure("Boom", "it broke")
HOURLY = "0 * * * *"


@pytest.fixture(autouse=True)
def handlers(no_handlers: None) -> None:
    @handler("echo")
    def echo(payload: dict[str, Any]) -> Any:
        return payload


def ms(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


def set_clock(queue: Queue, text: str) -> None:
    """Set the clock of a queue, in UTC."""
    queue.clock.ahead += ms(text) - queue.now()


def made(name: str = "nightly", cron: str = HOURLY, **options: Any) -> Schedule:
    return make_schedule(name, cron, "echo", options.pop("payload", {}), **options)


def stored(queue: Any, name: str = "nightly") -> Schedule:
    [found] = [made for made, _ in list_schedules(queue) if made.name == name]
    return found


def jobs(queue: Any) -> list[Job]:
    """All jobs, the oldest first."""
    return list(reversed(queue.page()[0]))


def times(queue: Any) -> list[int]:
    return [job.scheduled_for for job in jobs(queue)]


def tick(queue: Queue, text: str = "") -> None:
    """Tick as a worker that has just started, at that time."""
    if text:
        set_clock(queue, text)
    Ticker(queue).tick()


def end_jobs(queue: Queue, name: str = "default") -> None:
    """Complete all jobs of a queue."""
    own = queue.register([name], 1)
    while found := queue.dequeue(own, [name]):
        queue.complete(found[0])
    queue.deregister(own)


# Declaring ------------------------------------------------------------------------------------------------------------


def test_handler_declares_a_schedule_with_an_empty_payload() -> None:
    @handler("report", queue="slow", max_attempts=7, schedule="0 7 * * mon-fri", timezone="Europe/Berlin")
    def report(payload: dict[str, Any]) -> None: ...

    [found] = declared("app")
    expected = ("report", "report", {}, "slow", 7, "Europe/Berlin", "app")
    assert (found.name, found.type, found.payload, found.queue, found.max_attempts) == expected[:5]
    assert (found.timezone, found.code) == expected[5:]


def test_schedule_declares_a_schedule_with_options() -> None:
    schedule("nightly", "0 2 * * *", "echo", {"a": (1, 2)}, overlap="one", catchup=60, queue="slow", unique_key="n")
    [found] = declared()
    assert (found.payload, found.overlap, found.catchup) == ({"a": [1, 2]}, "one", 60)
    assert (found.queue, found.unique_key) == ("slow", "n")


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"cron": "0 0 30 2 *"}, "schedule 'nightly', cron: .* that day does not exist"),
        ({"cron": "0 25 * * *"}, "schedule 'nightly', cron: the field hour is wrong"),
        ({"timezone": "Europe/Bonn"}, "schedule 'nightly', timezone: unknown time zone 'Europe/Bonn'"),
        ({"name": "a b"}, "schedule 'a b', name: must be 1 to 100 of the characters"),
        ({"overlap": "never"}, "overlap: must be one of skip, one, allow"),
        ({"catchup": -1}, "catchup: must be a number of seconds from 0 to 604800"),
        ({"catchup": True}, "catchup: must be a number"),
        ({"payload": {1, 2}}, "payload"),
        ({"payload": 1}, "payload"),
        ({"max_attempts": 0}, "maxAttempts"),
        ({"queue": ""}, "queue"),
        ({"unique_key": "\n"}, "uniqueKey"),
    ],
)
def test_schedule_that_is_wrong_is_refused_when_it_is_declared(options: dict[str, Any], rule: str) -> None:
    parts = {"name": "nightly", "cron": HOURLY, "type": "echo", "payload": {}} | options
    with pytest.raises(InvalidJob, match=rule):
        schedule(**parts)
    assert declared() == []


def test_schedule_of_an_unknown_type_is_refused_when_all_handlers_are_known() -> None:
    schedule("nightly", HOURLY, "eco", {})
    with pytest.raises(InvalidJob, match="schedule 'nightly', type: no handler is registered for 'eco'"):
        declared()


def test_second_schedule_of_one_name_is_refused() -> None:
    schedule("echo", HOURLY, "echo", {})
    schedule("echo", HOURLY, "echo", {})  # as a reload does
    with pytest.raises(TypeError, match="two schedules are named 'echo'"):
        schedule("echo", "@daily", "echo", {})

    handler("other", schedule=HOURLY)(lambda_handler)
    schedule("other", HOURLY, "echo", {})
    with pytest.raises(InvalidJob, match="'other': is declared twice"):
        declared()


def lambda_handler(payload: dict[str, Any]) -> None: ...


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("schedule('nightly', '0 0 30 2 *', 'echo', {})", "schedule 'nightly', cron: the field day of month is wrong"),
        ("schedule('nightly', '@daily', 'echo', {}, timezone='Mars')", "unknown time zone 'Mars'"),
        ("schedule('nightly', '@daily', 'nope', {})", "no handler is registered for 'nope'"),
        ("handler('report', schedule='61 * * * *')(echo)", "schedule 'report', cron: the field minute is wrong"),
        ("handler('report', schedule='@daily')(number)", "schedule 'report', payload: "),
    ],
)
@pytest.mark.parametrize("command", [["worker.py", "run"], ["wsgi.py"]])
def test_wrong_schedule_stops_the_start_with_one_line(
    tmp_path: Path, command: list[str], line: str, text: str, shared_redis: RedisServer
) -> None:
    code = "from tinyqueue import handler, schedule\ndef echo(payload: dict) -> None: ...\n"
    code += f"def number(payload: int) -> None: ...\nhandler('echo')(echo)\n{line}\n"
    (tmp_path / "handlers.py").write_text(code)
    environ = {"PATH": "/usr/bin:/bin", "REDIS_URL": shared_redis.url, "TINYQUEUE_SHUTDOWN_TIMEOUT": "1"}
    program = [sys.executable, str(ROOT / command[0]), *command[1:]]
    done = subprocess.run(program, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2, done
    [error] = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert text in error


def test_worker_warns_of_a_schedule_that_a_clock_change_surprises() -> None:
    schedule("nightly", "30 2 * * *", "echo", {}, timezone="Europe/Berlin")
    schedule("hourly", HOURLY, "echo", {}, timezone="Europe/Berlin")
    texts = Scheduler(Queue.embedded(), "handlers").surprises()
    assert len(texts) == 2
    assert all(text.startswith("schedule nightly (30 2 * * *): 02:30 on 20") for text in texts)


# Ticks ----------------------------------------------------------------------------------------------------------------


def test_tick_enqueues_one_job_that_names_its_schedule(queue: Queue) -> None:
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made(payload={"a": 1}, queue="slow", max_attempts=2, timezone="Europe/Berlin"))
    tick(queue)
    assert jobs(queue) == []
    for _ in range(2):
        tick(queue, "2026-11-26T07:00:02")
    [job] = jobs(queue)
    assert (job.type, job.payload, job.queue, job.max_attempts) == ("echo", {"a": 1}, "slow", 2)
    assert (job.schedule, job.scheduled_for) == ("nightly", ms("2026-11-26T07:00"))
    assert job.answer()["scheduledFor"] == ms("2026-11-26T07:00")
    found = stored(queue)
    assert (found.last_job, found.last_run_at, found.last_outcome) == (job.id, job.scheduled_for, "enqueued")
    assert found.next_at == ms("2026-11-26T08:00")
    end_jobs(queue, "slow")
    tick(queue, "2026-11-26T08:00")
    assert times(queue) == [ms("2026-11-26T07:00"), ms("2026-11-26T08:00")]


def test_ticker_reads_due_times_once_a_minute(near: Queue, far: Queue, proxy: CutProxy) -> None:
    set_clock(far, "2026-11-26T06:30:01")
    ticker = Ticker(far)
    ticker.tick()
    before = len(proxy.packets)
    for second in range(2, 59):
        set_clock(far, f"2026-11-26T06:30:{second:02}")
        ticker.tick()
    assert not any(b"ZRANGEBYSCORE" in packet for packet in proxy.packets[before:])
    set_clock(far, "2026-11-26T06:31:00")
    ticker.tick()
    assert any(b"ZRANGEBYSCORE" in packet for packet in proxy.packets[before:])


def test_ticker_reads_due_times_after_the_clock_was_set_back(queue: Queue) -> None:
    set_clock(queue, "2026-11-26T09:30")
    ticker = Ticker(queue)
    ticker.tick()
    set_clock(queue, "2026-11-26T06:59")
    put(queue, made())
    set_clock(queue, "2026-11-26T07:00")
    ticker.tick()
    assert times(queue) == [ms("2026-11-26T07:00")]


def test_listing_shows_the_next_tick_after_the_clock_was_set_back(queue: Queue) -> None:
    """It is the stored one, not that of the calendar. Pause and resume bring it back."""
    set_clock(queue, "2026-12-26T06:30")
    put(queue, made())
    set_clock(queue, "2026-11-26T06:30")
    [(found, last)] = list_schedules(queue)
    assert found.answer(queue.now(), last)["nextRuns"][0] == found.next_at == ms("2026-12-26T07:00")
    tinyqueue_schedule.pause(queue, found.name)
    tinyqueue_schedule.resume(queue, found.name)
    [(found, last)] = list_schedules(queue)
    assert found.answer(queue.now(), last)["nextRuns"][0] == found.next_at == ms("2026-11-26T07:00")


def test_tick_that_lost_its_reply_enqueues_one_job(near: Queue, far: Queue, proxy: CutProxy) -> None:
    set_clock(near, "2026-11-26T06:30")
    put(near, made())
    proxy.drop_reply(b"EXEC")
    tick(far, "2026-11-26T07:00")
    assert proxy.idle
    assert times(near) == [ms("2026-11-26T07:00")]


def test_tick_whose_write_arrives_late_enqueues_one_job(near: Queue, far: Queue, proxy: CutProxy) -> None:
    set_clock(near, "2026-11-26T06:30")
    put(near, made())
    proxy.hold(b"EXEC")
    tick(far, "2026-11-26T07:00")
    proxy.deliver()
    assert times(near) == [ms("2026-11-26T07:00")]


def test_tick_of_a_schedule_that_is_edited_meanwhile_enqueues_the_new_job(
    near: Queue, far: Queue, proxy: CutProxy
) -> None:
    set_clock(near, "2026-11-26T06:30")
    put(near, made(payload={"version": 1}))
    set_clock(near, "2026-11-26T07:00")
    proxy.before(b"EXEC", lambda: put(near, made(payload={"version": 2})))
    tick(far, "2026-11-26T07:00")
    [job] = jobs(near)
    assert job.payload == {"version": 2}


@pytest.mark.parametrize("where", [b"WATCH", b"EXEC"])
@pytest.mark.parametrize("change", ["remove", "pause", "move"])
def test_tick_of_a_schedule_that_is_changed_meanwhile_enqueues_nothing(
    near: Queue, far: Queue, proxy: CutProxy, where: bytes, change: str
) -> None:
    set_clock(near, "2026-11-26T06:30")
    put(near, made())
    set_clock(near, "2026-11-26T07:00")
    changes: dict[str, Callable[[], Any]] = {
        "remove": lambda: tinyqueue_schedule.remove(near, "nightly"),
        "pause": lambda: tinyqueue_schedule.pause(near, "nightly"),
        "move": lambda: put(near, made(cron="30 * * * *")),
    }
    proxy.before(where, changes[change])
    tick(far, "2026-11-26T07:00")
    assert proxy.idle
    assert jobs(near) == []


def test_missed_ticks_fold_into_one_job_for_the_last_of_them(queue: Queue) -> None:
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made())
    tick(queue, "2026-11-26T09:40")
    assert times(queue) == [ms("2026-11-26T09:00")]
    assert stored(queue).next_at == ms("2026-11-26T10:00")


def test_ticks_missed_for_longer_than_catchup_are_skipped(queue: Queue) -> None:
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made(cron="0 7 * * *", catchup=1800))
    tick(queue, "2026-11-26T07:30:00.500")
    assert jobs(queue) == []
    found = stored(queue)
    assert (found.last_outcome, found.last_at) == ("missed", ms("2026-11-26T07:00"))
    assert found.next_at == ms("2026-11-27T07:00")
    tick(queue, "2026-11-27T07:29:59")
    assert times(queue) == [ms("2026-11-27T07:00")]


def test_tick_may_be_late_by_a_minute_without_catchup(queue: Queue) -> None:
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made(catchup=0))
    tick(queue, "2026-11-26T07:00:59")
    assert times(queue) == [ms("2026-11-26T07:00")]
    end_jobs(queue)
    tick(queue, "2026-11-26T08:02")
    assert times(queue) == [ms("2026-11-26T07:00")]


@pytest.mark.parametrize(
    ("overlap", "expected"), [("skip", ["07", "09"]), ("one", ["07", "08", "09"]), ("allow", ["07", "08", "09"])]
)
def test_tick_while_the_last_job_runs_depends_on_overlap(queue: Queue, overlap: str, expected: list[str]) -> None:
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made(overlap=overlap))
    tick(queue, "2026-11-26T07:00")
    own = queue.register(["default"], 1)
    [job] = queue.dequeue(own, ["default"])
    ticker = Ticker(queue)
    set_clock(queue, "2026-11-26T08:00")
    ticker.tick()
    assert len(jobs(queue)) == (2 if overlap == "allow" else 1)
    assert stored(queue).last_outcome == {"skip": "skipped"}.get(overlap, "enqueued")
    queue.complete(job)
    set_clock(queue, "2026-11-26T08:00:06")  # within the same minute
    ticker.tick()
    queue.deregister(own)
    end_jobs(queue)
    set_clock(queue, "2026-11-26T09:00")
    ticker.tick()
    assert times(queue) == [ms(f"2026-11-26T{hour}:00") for hour in expected]


def test_tick_that_waits_for_too_long_is_missed(queue: Queue) -> None:
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made(cron="0 7,8 * * *", overlap="one", catchup=600))
    tick(queue, "2026-11-26T07:00")
    for minute in ("08:00", "08:05", "08:09"):
        tick(queue, f"2026-11-26T{minute}")
        assert stored(queue).next_at == ms("2026-11-26T08:00")
    tick(queue, "2026-11-26T08:11")
    assert (stored(queue).last_outcome, len(jobs(queue))) == ("missed", 1)


def test_tick_of_a_job_with_a_taken_unique_key_goes_on_with_the_next(queue: Queue) -> None:
    holder = queue.enqueue("echo", {}, unique_key="only")
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made(unique_key="only", overlap="allow"))
    for hour in ("07", "08"):
        tick(queue, f"2026-11-26T{hour}:00")
        found = stored(queue)
        assert (found.last_outcome, found.last_job) == ("duplicate", holder.id)
        assert found.next_at == ms(f"2026-11-26T{hour}:00") + 3600_000
    end_jobs(queue)
    tick(queue, "2026-11-26T09:00")
    assert [job.scheduled_for for job in jobs(queue) if job.schedule] == [ms("2026-11-26T09:00")]


def test_tick_of_a_unique_key_that_is_taken_meanwhile_enqueues_no_second(
    near: Queue, far: Queue, proxy: CutProxy
) -> None:
    set_clock(near, "2026-11-26T06:30")
    put(near, made(unique_key="only"))
    proxy.before(b"EXEC", lambda: near.enqueue("echo", {}, unique_key="only"))
    tick(far, "2026-11-26T07:00")
    assert len(jobs(near)) == 1
    assert stored(near).last_outcome == "duplicate"


def failed_ticks(queue: Queue) -> int:
    return queue.metrics().get("failedTicks", {}).get((), 0)


def test_tick_into_a_full_queue_is_tried_again_and_counted(server: Server) -> None:
    queue = server.queue(max_pending=1)
    other = queue.enqueue("echo", {})
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made())
    ticker = Ticker(queue)
    for second in ("00", "06", "12"):
        set_clock(queue, f"2026-11-26T07:00:{second}")
        with pytest.raises(QueueFull):
            ticker.tick()
    assert failed_ticks(queue) == 3
    queue.cancel(other.id)
    set_clock(queue, "2026-11-26T07:00:18")
    ticker.tick()
    assert [job.scheduled_for for job in jobs(queue) if job.schedule] == [ms("2026-11-26T07:00")]
    assert failed_ticks(queue) == 3
    check_consistency(queue)


def test_tick_into_a_full_queue_is_given_up_after_catchup(server: Server) -> None:
    queue = server.queue(max_pending=1)
    queue.enqueue("echo", {})
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made(catchup=600))
    with pytest.raises(QueueFull):
        tick(queue, "2026-11-26T07:09")
    tick(queue, "2026-11-26T07:10:01")
    assert stored(queue).last_outcome == "missed"
    check_consistency(queue)


def test_tick_while_redis_is_full_is_tried_again_and_counted_later(
    start_redis: Callable[..., RedisServer], queue_at: Callable[..., Queue]
) -> None:
    queue = queue_at(start_redis().url)
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made())
    raw(queue).config_set("maxmemory", 1)
    ticker = Ticker(queue)
    set_clock(queue, "2026-11-26T07:00")
    with pytest.raises(Unavailable, match="full"):
        ticker.tick()
    raw(queue).config_set("maxmemory", 0)
    until(lambda: queue.memory_use == 0)
    set_clock(queue, "2026-11-26T07:00:06")
    ticker.tick()
    assert times(queue) == [ms("2026-11-26T07:00")]
    assert failed_ticks(queue) == 1
    check_consistency(queue)


def test_tick_that_fails_holds_up_no_other_schedule(server: Server) -> None:
    queue = server.queue(max_pending=1)
    queue.enqueue("echo", {}, queue="full")
    set_clock(queue, "2026-11-26T06:30")
    for name, where in {"a": "full", "b": "free", "c": "full"}.items():
        put(queue, made(name, queue=where))
    with pytest.raises(QueueFull):
        tick(queue, "2026-11-26T07:00")
    assert [job.schedule for job in jobs(queue) if job.schedule] == ["b"]
    assert failed_ticks(queue) == 2


def test_reading_changes_nothing_even_when_a_tick_is_due(queue: Queue) -> None:
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made())
    set_clock(queue, "2026-11-26T07:00")
    before = dump(queue)
    for found, last in list_schedules(queue):
        answer = found.answer(queue.now(), last)
    assert answer["nextRuns"][0] == ms("2026-11-26T08:00")
    assert dump(queue) == before
    tick(queue)
    assert times(queue) == [ms("2026-11-26T07:00")]


def test_schedule_that_is_removed_and_added_again_starts_from_now(queue: Queue) -> None:
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made())
    tinyqueue_schedule.remove(queue, "nightly")
    assert dump(queue) == {}
    set_clock(queue, "2026-11-26T09:30")
    put(queue, made())
    tick(queue)
    assert jobs(queue) == []
    tick(queue, "2026-11-26T10:00")
    assert times(queue) == [ms("2026-11-26T10:00")]


def test_edit_of_a_due_schedule_keeps_its_tick_unless_the_time_changes(queue: Queue) -> None:
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made("a"))
    put(queue, made("b"))
    set_clock(queue, "2026-11-26T07:00")
    put(queue, made("a", payload={"new": True}))
    put(queue, made("b", cron="15 * * * *"))
    tick(queue)
    assert [(job.schedule, job.payload) for job in jobs(queue)] == [("a", {"new": True})]
    assert stored(queue, "b").next_at == ms("2026-11-26T07:15")


def test_pause_skips_ticks_and_resume_goes_on_from_now(queue: Queue) -> None:
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made())
    assert tinyqueue_schedule.pause(queue, "nightly")
    tick(queue, "2026-11-26T07:00")
    put(queue, made(payload={"new": True}))  # an edit does not resume it
    tick(queue, "2026-11-26T07:01")
    assert tinyqueue_schedule.resume(queue, "nightly")
    tick(queue, "2026-11-26T07:02")
    assert jobs(queue) == []
    tick(queue, "2026-11-26T08:00")
    assert times(queue) == [ms("2026-11-26T08:00")]


def test_run_now_enqueues_a_job_and_leaves_the_next_tick(queue: Queue) -> None:
    set_clock(queue, "2026-11-26T06:30:10")
    put(queue, made())
    tinyqueue_schedule.pause(queue, "nightly")
    job = tinyqueue_schedule.run(queue, "nightly")
    assert job
    assert (job.schedule, job.scheduled_for // 60_000) == ("nightly", ms("2026-11-26T06:30") // 60_000)
    assert stored(queue).last_job == job.id
    assert stored(queue).last_at == 0
    assert tinyqueue_schedule.run(queue, "other") is None


def test_run_now_that_lost_its_reply_enqueues_one_job(near: Queue, far: Queue, proxy: CutProxy) -> None:
    put(near, made())
    proxy.drop_reply(b"EXEC")
    job = tinyqueue_schedule.run(far, "nightly")
    assert [found.id for found in jobs(near)] == [job and job.id]


def test_schedule_whose_record_cannot_be_read_holds_up_no_other(real: Server) -> None:
    queue = real.queue()
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made("a"))
    put(queue, made("b"))
    raw(queue).set(queue.keys.schedule("a"), "garbage")
    with pytest.raises(tinyqueue_schedule.Corrupted, match="delete its key"):
        tick(queue, "2026-11-26T07:00")
    assert [job.schedule for job in jobs(queue)] == ["b"]


# Many workers ---------------------------------------------------------------------------------------------------------


def test_eight_workers_that_start_at_once_and_are_killed_make_one_job_a_tick(
    start_redis: Callable[..., RedisServer],
) -> None:
    report = schedule_storm.storm(start_redis().url, trials=4, workers=8, seed=1)
    assert report.ticks >= 4
    assert report.wrong == []


def test_workers_that_were_down_for_three_ticks_make_one_job(queue: Queue) -> None:
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made())
    set_clock(queue, "2026-11-26T09:00:30")
    for _ in range(8):
        tick(queue)
    assert times(queue) == [ms("2026-11-26T09:00")]


def test_due_tick_counts_as_load_so_that_an_autoscaler_starts_a_worker(queue: Queue) -> None:
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made())
    assert queue.scale()["load"] == 0
    set_clock(queue, "2026-11-26T07:00")
    assert queue.scale()["load"] == 1
    tick(queue)
    assert queue.scale()["load"] == 1  # its job


# Sync -----------------------------------------------------------------------------------------------------------------


def names(queue: Any) -> list[str]:
    return [made.name for made, _ in list_schedules(queue)]


OLD = [made("a", code="app"), made("b", code="app")]
NEW = [made("a", code="app")]


def test_sync_adds_changes_and_removes_what_the_code_declares(queue: Queue) -> None:
    put(queue, made("mine"))
    sync(queue, "app", OLD)
    assert names(queue) == ["a", "b", "mine"]
    sync(queue, "app", [made("a", cron="@daily", code="app")])
    assert names(queue) == ["a", "mine"]
    assert stored(queue, "a").cron == "@daily"
    sync(queue, "app", [])
    assert names(queue) == ["mine"]


def test_sync_again_changes_nothing(queue: Queue) -> None:
    set_clock(queue, "2026-11-26T06:30")
    sync(queue, "app", OLD)
    tinyqueue_schedule.pause(queue, "b")
    set_clock(queue, "2026-11-26T06:30:50")
    before = dump(queue)
    for _ in range(8):
        sync(queue, "app", OLD)
    assert dump(queue) == before


def test_sync_of_a_due_schedule_keeps_its_tick(queue: Queue) -> None:
    set_clock(queue, "2026-11-26T06:30")
    sync(queue, "app", OLD)
    set_clock(queue, "2026-11-26T07:00")
    sync(queue, "app", OLD)
    sync(queue, "app", NEW)
    tick(queue)
    assert [job.schedule for job in jobs(queue)] == ["a"]


def test_sync_of_older_code_does_not_bring_back_what_newer_code_removed(queue: Queue) -> None:
    set_clock(queue, "2026-11-26T06:00")
    sync(queue, "app", OLD)
    sync(queue, "app", NEW)
    for minute in range(1, 20):  # a worker of the newer code is seen every minute
        set_clock(queue, f"2026-11-26T06:{minute:02}")
        assert sync(queue, "app", OLD) == [NOTHING]
        sync(queue, "app", NEW)
    assert names(queue) == ["a"]


def test_sync_of_older_code_takes_over_after_a_rollback(queue: Queue) -> None:
    set_clock(queue, "2026-11-26T06:00")
    sync(queue, "app", OLD)
    sync(queue, "app", NEW)
    set_clock(queue, "2026-11-26T06:04:59")
    sync(queue, "app", OLD)
    assert names(queue) == ["a"]
    set_clock(queue, "2026-11-26T06:05:01")
    sync(queue, "app", OLD)
    assert names(queue) == ["a", "b"]
    assert sync(queue, "app", NEW) == [NOTHING]


def test_sync_of_two_programs_that_share_a_queue_keeps_the_schedules_of_both(queue: Queue) -> None:
    sync(queue, "app", NEW)
    [merged] = sync(queue, "other", [made("x", code="other"), made("a", code="other", cron="@daily")])
    assert merged.taken == ["a"]
    assert names(queue) == ["a", "x"]
    assert stored(queue, "a").cron == HOURLY
    sync(queue, "other", [])
    assert names(queue) == ["a"]


def test_sync_of_code_without_schedules_stores_only_that_it_was_there(queue: Queue) -> None:
    assert sync(queue, "app", []) == []
    assert list(dump(queue)) == [queue.keys.generation("app")]
    before = dump(queue)
    assert sync(queue, "app", []) == []
    assert dump(queue) == before


def test_sync_of_older_code_without_schedules_does_not_remove_the_first(queue: Queue) -> None:
    sync(queue, "app", [])
    sync(queue, "app", NEW)
    sync(queue, "app", [])  # a worker of the older release starts again
    assert names(queue) == ["a"]


def test_sync_removes_the_last_schedule(queue: Queue) -> None:
    sync(queue, "app", NEW)
    sync(queue, "app", [])
    assert names(queue) == []


def test_scheduler_of_code_without_schedules_syncs_once(near: Queue, far: Queue, proxy: CutProxy) -> None:
    scheduler = Scheduler(far, "handlers")
    scheduler.sync()
    before = len(proxy.packets)
    scheduler.sync()
    assert len(proxy.packets) == before
    sync(near, "handlers", [made(code="handlers")])
    sync(near, "handlers", [made(code="handlers"), made("b", code="handlers")])
    Scheduler(far, "handlers").sync()
    assert names(near) == ["b", "nightly"]


def test_sync_that_lost_its_reply_is_done_once(near: Queue, far: Queue, proxy: CutProxy) -> None:
    proxy.drop_reply(b"EXEC")
    sync(far, "app", OLD)
    assert names(near) == ["a", "b"]
    [generation] = [json.loads(entry.value) for key, entry in dump(near).items() if ":generation:" in key]
    assert (generation["number"], len(generation["releases"])) == (1, 1)


def test_sync_of_older_code_that_newer_code_overtakes_changes_nothing(near: Queue, far: Queue, proxy: CutProxy) -> None:
    proxy.before(b"EXEC", lambda: (sync(near, "app", OLD), sync(near, "app", NEW)))
    assert sync(far, "app", OLD) == [NOTHING]
    assert names(near) == ["a"]


def test_sync_lists_a_schedule_again_whose_entry_was_lost(queue: Queue) -> None:
    sync(queue, "app", OLD)
    raw(queue).delete(queue.keys.ticks)
    sync(queue, "app", OLD)
    assert names(queue) == ["a", "b"]


def test_worker_syncs_ticks_and_runs_the_job(near: Queue, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    handler("report", schedule="* * * * *")(lambda_handler)
    sync(near, "handlers", declared("handlers"))
    schedule_storm.rewind(near, "report")
    running_worker = worker.Worker(near, Settings(), burst=True)
    assert running_worker.run() == 0
    [job] = jobs(near)[:1]
    assert (job.schedule, job.status) == ("report", "completed")
    HANDLERS.pop("report")
    assert worker.Worker(near, Settings(), burst=True).run() == 0
    assert names(near) == []
    assert "schedules removed: report" in caplog.text


# Shards ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(server: Server) -> Iterator[Shards]:
    parts = [server.queue(namespace=f"queue.{at}") for at in range(3)]
    yield Shards(parts)
    for part in parts:
        check_consistency(part)


def test_schedules_of_shards_tick_in_the_shard_of_their_name(shards: Shards) -> None:
    for part in shards.parts:
        set_clock(part, "2026-11-26T06:30")
    all_names = [f"s{at}" for at in range(9)]
    sync(shards, "app", [made(name, code="app", unique_key=name) for name in all_names])
    assert names(shards) == all_names
    assert all(len(list_schedules(part)) > 0 for part in shards.parts)
    for part in shards.parts:
        tick(part, "2026-11-26T07:00")
    found = jobs(shards)
    assert sorted(job.schedule for job in found) == all_names
    for job in found:
        assert shards.part_of(job.id) is shards.part_for(job.schedule)
        assert shards.get(job.id) == job
    assert tinyqueue_schedule.pause(shards, "s3")
    assert stored(shards, "s3").paused
    tinyqueue_schedule.resume(shards, "s3")


def test_unique_key_of_another_shard_is_refused(shards: Shards) -> None:
    other = next(key for key in "abcdef" if shards.part_for(key) is not shards.part_for("nightly"))
    with pytest.raises(InvalidJob, match="uniqueKey: belongs to another shard"):
        put(shards, made(unique_key=other))
    schedule("nightly", HOURLY, "echo", {}, unique_key=other)
    with pytest.raises(InvalidJob, match="use the name of the schedule as its uniqueKey"):
        Scheduler(shards, "handlers")


def test_limit_of_another_shard_is_refused(shards: Shards) -> None:
    handler("charge", max_running=1, schedule=HOURLY)(lambda_handler)
    for code in declared("app"):  # has the name of its limit
        assert sync(shards, "app", [code])
    other = next(name for name in "abcdef" if shards.part_for(name) is not shards.part_for("charge"))
    with pytest.raises(InvalidJob, match="belongs to another shard than the limit charge"):
        put(shards, make_schedule(other, HOURLY, "charge", {}))


def test_tick_of_a_limited_type_counts_against_the_limit(queue: Queue) -> None:
    handler("charge", max_running=1, limit_by="account")(charge)
    set_clock(queue, "2026-11-26T06:30")
    put(queue, make_schedule("nightly", HOURLY, "charge", {"account": "a"}, overlap="allow"))
    for hour in ("07", "08"):
        tick(queue, f"2026-11-26T{hour}:00")
    assert [job.limit for job in jobs(queue)] == ["charge/a", "charge/a"]
    own = queue.register(["default"], 2)
    [first] = queue.dequeue(own, ["default"], 2)
    assert queue.dequeue(own, ["default"], 2) == []
    queue.complete(first)
    [second] = queue.dequeue(own, ["default"], 2)
    queue.complete(second)
    queue.deregister(own)


class Charge(TypedDict):
    account: str


def charge(payload: Charge) -> None: ...


# The API --------------------------------------------------------------------------------------------------------------

BODY = {"cron": "0 7 * * mon-fri", "type": "echo", "timezone": "Europe/Berlin"}


def test_api_makes_lists_and_removes_a_schedule(api: Client, queue: Queue) -> None:
    set_clock(queue, "2026-11-26T06:30")
    answer = api.call("PUT", "/schedules/report", BODY | {"payload": {"a": 1}, "maxAttempts": 2, "overlap": "one"})
    assert answer.status == 200, answer
    [listed] = api.get("/schedules").json["schedules"]
    assert listed == answer.json
    assert listed["nextRuns"] == [ms(f"2026-{day}T06:00") for day in ("11-27", "11-30", "12-01", "12-02", "12-03")]
    assert (listed["source"], listed["lastRun"], listed["lastTick"]) == ("api", None, None)
    assert (listed["payload"], listed["maxAttempts"], listed["overlap"]) == ({"a": 1}, 2, "one")
    assert api.call("DELETE", "/schedules/report").status == 200
    assert api.get("/schedules").json == {"schedules": []}
    assert api.call("DELETE", "/schedules/report").status == 404


def test_api_pauses_resumes_and_runs_a_schedule(api: Client, queue: Queue) -> None:
    api.call("PUT", "/schedules/report", BODY)
    assert api.post("/schedules/report/pause", None).json["paused"]
    assert api.get("/schedules").json["schedules"][0]["nextRuns"] == []
    assert not api.post("/schedules/report/resume", None).json["paused"]
    answer = api.post("/schedules/report/run", None)
    assert answer.status == 200
    job = queue.get(answer.json["jobId"])
    assert job
    assert job.schedule == "report"
    end_jobs(queue)
    [listed] = api.get("/schedules").json["schedules"]
    assert (listed["lastRun"]["jobId"], listed["lastRun"]["status"]) == (job.id, "completed")
    queue.purge(tinyqueue_cli.Filter("completed"))
    assert api.get("/schedules").json["schedules"][0]["lastRun"]["status"] is None
    for verb in ("pause", "resume", "run"):
        assert api.post(f"/schedules/other/{verb}", None).status == 404


@pytest.mark.parametrize(
    ("change", "field", "text"),
    [
        ({"cron": "0 0 30 2 *"}, "cron", "does not exist"),
        ({"cron": None}, "cron", "must be a cron expression"),
        ({"timezone": "Europe/Bonn"}, "timezone", "unknown time zone"),
        ({"timezone": 1}, "timezone", "unknown time zone"),
        ({"overlap": []}, "overlap", "must be one of skip, one, allow"),
        ({"catchup": "1"}, "catchup", "must be a number of seconds"),
        ({"type": "eco"}, "type", "no handler is registered"),
        ({"payload": 1}, "payload", "Expected"),
        ({"name": "x"}, "name", "unknown field"),
        ({"maxAttempts": 101}, "maxAttempts", "must be a whole number"),
    ],
)
def test_api_refuses_a_wrong_schedule(api: Client, queue: Queue, change: Any, field: str, text: str) -> None:
    answer = api.call("PUT", "/schedules/report", BODY | change)
    assert answer.status == 422
    assert answer.problem["field"] == field
    assert text in answer.problem["detail"]
    assert dump(queue) == {}


def test_api_warns_of_a_clock_change(api: Client) -> None:
    warnings = api.call("PUT", "/schedules/report", BODY | {"cron": "30 2 * * *"}).json["warnings"]
    assert len(warnings) == 2
    assert "Europe/Berlin" in warnings[0]


def test_api_changes_no_schedule_that_code_declares(api: Client, queue: Queue) -> None:
    sync(queue, "app", NEW)
    for method, body in (("PUT", BODY), ("DELETE", None)):
        answer = api.call(method, "/schedules/a", *([body] if body else []))
        assert answer.status == 422
        assert "is declared in code" in answer.problem["detail"]
    assert api.post("/schedules/a/pause", None).json["source"] == "code"
    sync(queue, "app", NEW)
    assert stored(queue, "a").paused


def test_api_needs_the_role_admin_to_change_a_schedule(queue: Queue) -> None:
    keys = "boss:admin:admin-0123456789abcdef,reader:read:read-0123456789abcdef"
    reader = Client(API(Settings(api_keys=keys), queue), "read-0123456789abcdef")
    assert reader.get("/schedules").status == 200
    assert reader.call("PUT", "/schedules/report", BODY).status == 403
    assert reader.post("/schedules/report/run", None).status == 403


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(near: Queue, shared_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("REDIS_URL", shared_redis.url)

    def command(*arguments: str) -> Any:
        return CliRunner().invoke(worker.cli, ["schedules", *arguments])

    return command


def test_command_lists_schedules_and_their_last_run(near: Queue, command: Callable[..., Any]) -> None:
    assert "no schedules; declare one" in command().output
    put(near, made("nightly", "30 2 * * *", timezone="Europe/Berlin"))
    put(near, made("hourly"))
    put_job(near, "pending")
    assert command("--run", "hourly").output.strip() == stored(near, "hourly").last_job
    output = command().output
    assert "Europe/Berlin" in output
    assert "it runs the first time only" in output
    [line] = [line for line in output.splitlines() if line.startswith("hourly")]
    assert "pending" in line
    assert [found["name"] for found in json.loads(command("--json", "hourly").output)] == ["hourly"]


def test_command_pauses_resumes_and_removes_schedules(near: Queue, command: Callable[..., Any]) -> None:
    put(near, made("a"))
    put(near, made("b"))
    assert command("--pause", "a", "b").output == "a paused\nb paused\n"
    assert "paused" in command().output
    assert command("--resume", "b").output == "b resumed\n"
    assert [stored(near, name).paused for name in "ab"] == [True, False]
    assert command("--remove", "a").output == "a removed\n"
    assert names(near) == ["b"]
    assert "no such schedule: a" in command("--pause", "a").output
    assert "no such schedule: a" in command("a").output
    assert "--run needs the NAME" in command("--run").output


# Backups, metrics and doctor ------------------------------------------------------------------------------------------


def test_restore_brings_schedules_back_and_pauses_their_queues(server: Server, tmp_path: Path) -> None:
    queue = server.queue()
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made("a", queue="slow"))
    put(queue, made("b", payload={"x": 1}))
    tinyqueue_schedule.pause(queue, "b")
    sync(queue, "app", [made("c", code="app")])
    file = str(tmp_path / "backup.gz")
    assert back_up(queue, file, NoBar())["schedule"] == 3
    server.clear()
    set_clock(queue, "2026-11-26T09:30")
    restored = restore(queue, file, NoBar())
    assert restored.schedules == 3
    assert restored.resumable == ["default", "slow"]
    assert names(queue) == ["a", "b", "c"]
    assert stored(queue, "b").paused
    assert stored(queue, "b").payload == {"x": 1}
    tick(queue)
    assert jobs(queue) == []
    tick(queue, "2026-11-26T10:00")
    assert sorted(job.schedule for job in jobs(queue)) == ["a", "c"]
    assert {name for name, about in queue.queues().items() if about["paused"]} == {"default", "slow"}
    assert restore(queue, file, NoBar(), merge=True).schedules == 0
    sync(queue, "app", [])
    assert names(queue) == ["a", "b"]
    check_consistency(queue)


def test_metrics_show_each_schedule(api: Client, queue: Queue) -> None:
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made())
    tick(queue, "2026-11-26T07:00")
    set_clock(queue, "2026-11-26T08:01")
    text = api.get("/metrics").body.decode()
    values = dict(re.findall(r'^tinyqueue_schedule_(\w+)\{schedule="nightly"\} (.*)$', text, re.M))
    assert float(values["last_tick_timestamp_seconds"]) == ms("2026-11-26T07:00") / 1000
    assert 60 <= float(values["overdue_seconds"]) < 70
    assert float(values["paused"]) == 0
    assert "tinyqueue_schedule_ticks_failed_total 0.0" in text


def test_doctor_reports_schedules_that_do_nothing(queue: Queue) -> None:
    set_clock(queue, "2026-11-26T06:30")
    put(queue, made("a"))
    put(queue, made("b"))
    tinyqueue_schedule.pause(queue, "b")
    set_clock(queue, "2026-11-26T07:05")
    found = {finding.about: finding for finding in examine(queue, 1) if finding.about.startswith("schedule")}
    assert found["schedules"].level == "warn"
    assert found["schedules"].seen == "2 schedules, overdue: a"
    assert found["schedule"].advice == "tinyqueue schedules --resume b"


def test_doctor_lists_schedules_again_whose_entries_were_lost(queue: Queue) -> None:
    put(queue, made("a"))
    put(queue, made("b"))
    raw(queue).zrem(queue.keys.ticks, "a")
    raw(queue).zadd(queue.keys.ticks, {"gone": 1})
    assert any("2 schedules listed again" in finding.seen for finding in repair([queue]))
    assert names(queue) == ["a", "b"]


# The embedded server of a web process ---------------------------------------------------------------------------------


def test_web_process_without_redis_has_the_schedules_of_the_code(tmp_path: Path) -> None:
    code = "from tinyqueue import handler\n@handler('report', schedule='* * * * *')\n"
    code += "def report(payload: dict) -> None: ..."
    (tmp_path / "handlers.py").write_text(code)
    with running(tmp_path) as server:
        host, port = server.address
        client = Http(f"http://{host}:{port}")
        [found] = until(lambda: client.get("/schedules")["schedules"])
        assert (found["name"], found["source"], len(found["nextRuns"])) == ("report", "code", 5)
        id = client.post("/schedules/report/run")["jobId"]
        until(lambda: client.get(f"/jobs/{id}")["status"] == "completed")


class Http:
    """A client of a server process."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str) -> Any:
        return self._call("GET", path)

    def post(self, path: str) -> Any:
        return self._call("POST", path)

    def _call(self, method: str, path: str) -> Any:
        from urllib.request import Request, urlopen

        with urlopen(Request(self.url + path, method=method), timeout=10) as answer:
            return json.load(answer)
