"""The verbs of the queue, each in its circumstances, on the embedded and on a real server.

In the order of tinyqueue.py: settings, enqueue, dequeue, settle, cancel and retry, upkeep, reading; then what Redis and the network
can do to them. Which verb is for which status is in test_matrix.py.
"""

from __future__ import annotations

import math
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import RedisServer, Server, check_consistency, dump, free_port, lapse, newest, put, raw
from cutproxy import CutProxy
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyqueue
import tinyqueue_redis
from tinyqueue import (
    MAX_DELAY,
    Corrupted,
    Failure,
    InvalidJob,
    Job,
    Outcome,
    Queue,
    Reaped,
    SettingsError,
    Unavailable,
    WrongStatus,
    backoff,
)
from tinyqueue_config import Settings, open_queue
from tinyqueue_redis import connect

pytestmark = pytest.mark.usefixtures("no_handlers")
BOOM = Failure("Boom", "it broke")
DEFAULT = ["default"]
DAY = 86400_000


def ids(jobs: list[Job]) -> list[str]:
    return [job.id for job in jobs]


def nested(depth: int) -> list[Any]:
    """An array of that depth."""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.fixture
def worker(queue: Queue) -> str:
    """A registered worker."""
    return queue.register(DEFAULT, 5)


# Settings -------------------------------------------------------------------------------------------------------------


def test_settings_without_any_are_the_defaults() -> None:
    assert Settings.read({}) == Settings()


def test_settings_come_from_the_environment() -> None:
    environ = {
        "REDIS_URL": "redis://h",
        "PORT": "5005",
        "TINYQUEUE_LEASE": "9",
        "TINYQUEUE_TLS_VERIFY": "0",
        "HOME": "/root",
    }
    assert Settings.read(environ) == Settings(redis_url="redis://h", port=5005, lease=9, tls_verify=False)


def test_settings_that_are_empty_count_as_unset() -> None:
    assert Settings.read({"PORT": "", "REDIS_URL": "", "TINYQUEUE_LEASE": ""}) == Settings()


def test_settings_in_dotenv_give_way_to_the_environment_and_both_to_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("PORT=1\nHOST=dotenv\nTINYQUEUE_LEASE=11\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PORT", "2")
    monkeypatch.setenv("HOST", "environ")
    read = Settings.read(port=3, host=None)
    assert (read.port, read.host, read.lease) == (3, "environ", 11)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"PORT": "abc"}, "PORT='abc' is not valid: Expected `int`, got `str` (port the web process listens on)"),
        ({"PORT": "70000"}, "PORT='70000'"),
        ({"PORT": "-1"}, "PORT='-1'"),
        ({"WORKER_CONCURRENCY": "0"}, "WORKER_CONCURRENCY"),
        ({"WORKER_CONCURRENCY": "501"}, "WORKER_CONCURRENCY"),
        ({"WORKER_CONCURRENCY": "1.5"}, "WORKER_CONCURRENCY"),
        ({"WEB_CONCURRENCY": "0"}, "WEB_CONCURRENCY"),
        ({"LOG_FORMAT": "xml"}, "LOG_FORMAT"),
        ({"LOG_LEVEL": "loud"}, "LOG_LEVEL"),
        ({"TINYQUEUE_NAMESPACE": "a{b}"}, "TINYQUEUE_NAMESPACE"),
        ({"TINYQUEUE_NAMESPACE": "a\n"}, "TINYQUEUE_NAMESPACE"),
        ({"TINYQUEUE_LEASE": "1"}, "TINYQUEUE_LEASE"),
        ({"TINYQUEUE_SHUTDOWN_TIMEOUT": "-1"}, "TINYQUEUE_SHUTDOWN_TIMEOUT"),
        ({"TINYQUEUE_WATCHDOG": "9"}, "TINYQUEUE_WATCHDOG"),
        ({"TINYQUEUE_MAX_BODY": "1"}, "TINYQUEUE_MAX_BODY"),
        ({"TINYQUEUE_KEEP_COMPLETED": "0"}, "TINYQUEUE_KEEP_COMPLETED"),
        ({"TINYQUEUE_KEEP_FAILED": "a"}, "TINYQUEUE_KEEP_FAILED"),
        ({"TINYQUEUE_TLS_VERIFY": "perhaps"}, "TINYQUEUE_TLS_VERIFY"),
        ({"TINYQUEUE_LEESE": "30"}, "TINYQUEUE_LEESE is not a setting; use one of HOST, "),
        ({"DYNO": "web.1"}, "REDIS_URL is required here (DYNO is set)"),
        ({"RAILWAY_SERVICE_ID": "1", "REDIS_URL": ""}, "REDIS_URL is required here (RAILWAY_SERVICE_ID is set)"),
    ],
)
def test_settings_refused(environ: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.read(environ)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_with_redis_url_are_fine_on_a_platform() -> None:
    assert Settings.read({"DYNO": "web.1", "REDIS_URL": "redis://h"}).redis_url == "redis://h"


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:S3cr3tPw@127.0.0.1:abc/0",
        "redis://u:S3cr3tPw@127.0.0.1:99999/0",
        "redis://u:S3cr3tPw@127.0.0.1/zero",
        "redis://u:S3cr3tPw@127.0.0.1/0?nope=1",
        "redis://u:S3cr3tPw@127.0.0.1/0?socket_timeout=abc",
        "redis://u:S3cr3tPw#@127.0.0.1/0",
        "redis://u:S3cr3tPw/@127.0.0.1/0",
        "redis://u:[S3cr3tPw]@127.0.0.1/0",
        "redis://u:S3cr3tPw[@127.0.0.1/0",
        "redis://u:S3cr3tPw\u2100@127.0.0.1/0",
        "http://u:S3cr3tPw@127.0.0.1/0",
        "u:S3cr3tPw@127.0.0.1",
        "redis+sentinel://u:S3cr3tPw@127.0.0.1:26379",
        "redis+sentinel://u:S3cr3tPw@127.0.0.1:abc/jobs",
        "redis+sentinel://u:S3cr3tPw@127.0.0.1:26379,/jobs/0",
        "redis+sentinel://u:S3cr3tPw@/jobs/0",
        "redis+sentinel://u:S3cr3tPw@127.0.0.1:26379/jobs/zero",
        "redis+sentinel://u:S3cr3tPw#@127.0.0.1:26379/jobs",
        "redis+sentinel://u:S3cr3tPw/@127.0.0.1:26379/jobs",
        "redis+sentinel://u:S3cr3tPw@127.0.0.1:26379/jobs/0?nope=1",
        "redis+sentinel://127.0.0.1:26379/jobs?sentinel_password=S3cr3tPw&decode_responses=true",
        "rediss+sentinel://u:S3cr3tPw@127.0.0.1:26379/jobs/0?ssl_nope=1",
        "http+sentinel://u:S3cr3tPw@127.0.0.1:26379/jobs/0",
    ],
)
def test_connect_refuses_a_wrong_url_without_showing_the_password(url: str) -> None:
    with pytest.raises(ValueError, match="REDIS_URL") as caught:
        connect(url)
    assert "REDIS_URL" in str(caught.value)
    assert "S3cr3t" not in str(caught.value)


def test_connect_opens_nothing() -> None:
    connect(f"redis://127.0.0.1:{free_port()}/0")


def test_open_queue_without_redis_url_is_embedded() -> None:
    queue = open_queue(Settings(namespace="mine", lease=7))
    job = queue.enqueue("echo", {})
    assert (queue.keys.job(job.id), queue.lease_ms) == ("{mine}:job:" + job.id, 7000)
    assert queue.get(job.id) == job


def test_open_queue_with_redis_url_connects_there(real: Server) -> None:
    job = real.queue().enqueue("echo", {})
    queue = open_queue(Settings(redis_url=real.url))
    assert queue.get(job.id) == job
    queue.pool.disconnect()


def test_namespace_that_could_spell_another_is_refused(server: Server) -> None:
    with pytest.raises(InvalidJob):
        server.queue(namespace="a}:b")


def test_namespaces_share_nothing(server: Server, queue: Queue) -> None:
    other = server.queue(namespace="other")
    job = queue.enqueue("echo", {})
    assert other.get(job.id) is None
    assert other.stats()["pending"] == 0
    assert other.dequeue(other.register(DEFAULT, 1), DEFAULT) == []
    check_consistency(other)


# Enqueue --------------------------------------------------------------------------------------------------------------


def test_enqueue_stores_a_pending_job(queue: Queue) -> None:
    before = queue.now()
    job = queue.enqueue("echo", {"a": [1, None]})
    assert before <= job.created_at <= queue.now()
    assert uuid.UUID(job.id).version == 7
    assert job == Job(
        job.id, "echo", {"a": [1, None]}, "pending", attempts=0, max_attempts=3, queue="default", run_at=0
    )
    assert queue.get(job.id) == job


def test_enqueue_stores_every_option(queue: Queue) -> None:
    job = queue.enqueue("echo", {}, max_attempts=7.0, queue="mail", delay=1.5)
    stored = queue.get(job.id)
    assert (stored.max_attempts, stored.queue, stored.run_at) == (7, "mail", job.created_at + 1500)


@pytest.mark.parametrize("name", ["a", "A-Z_0.9", "x" * 100])
def test_enqueue_takes_names_of_its_alphabet(queue: Queue, name: str) -> None:
    job = queue.enqueue(name, {}, queue=name)
    assert queue.get(job.id).queue == queue.get(job.id).type == name


@pytest.mark.parametrize("name", ["", "a b", "x" * 101, "ä", "a:b", "{a}", "a\n", "\ud800", 5, None, b"a"])
@pytest.mark.parametrize("field", ["type", "queue"])
def test_enqueue_refuses_a_name(queue: Queue, field: str, name: Any) -> None:
    if field == "queue" and name is None:
        name = ["default"]  # None is the default
    options = {"type": "echo", "payload": {}} | {field: name}
    with pytest.raises(InvalidJob) as caught:
        queue.enqueue(**options)
    assert caught.value.field == field
    assert dump(queue) == {}


@pytest.mark.parametrize(
    ("field", "options"),
    [
        *(("maxAttempts", {"max_attempts": value}) for value in (0, -1, 101, 1.5, True, "3", math.nan, math.inf, [3])),
        *(("delay", {"delay": value}) for value in (-1, MAX_DELAY + 1, math.nan, math.inf, True, "5", [5])),
        *(
            ("runAt", {"run_at": value})
            for value in ("tomorrow", "", "2030-01-01T00:00:00", "9999-01-01T00:00:00Z", 1.5, True)
        ),
        ("runAt", {"run_at": datetime(2030, 1, 1)}),
        ("runAt", {"run_at": 10**15}),
        ("delay", {"delay": 1, "run_at": 1}),
    ],
)
def test_enqueue_refuses_an_option(queue: Queue, field: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidJob) as caught:
        queue.enqueue("echo", {}, **options)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: must ")
    assert dump(queue) == {}


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    "payload",
    [
        math.nan,
        {"a": [math.inf]},
        {"null": -math.inf},
        10**5000,
        "\ud800",
        {"\udfff": 1},
        object(),
        nested(101),
        CIRCLE,
    ],
    ids=["nan", "inf", "minus-inf", "big", "surrogate", "surrogate-name", "object", "deep", "circle"],
)
def test_enqueue_refuses_a_payload(queue: Queue, payload: Any) -> None:
    with pytest.raises(InvalidJob) as caught:
        queue.enqueue("echo", payload)
    assert caught.value.field == "payload"
    assert dump(queue) == {}


NUMBERS = st.integers() | st.integers(2**63, 2**70) | st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=20,
)
EMBEDDED = Queue.embedded()


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(JSON)
def test_enqueue_keeps_any_json(payload: Any) -> None:
    assert EMBEDDED.get(EMBEDDED.enqueue("echo", payload).id).payload == payload


def test_enqueue_keeps_a_payload_of_the_greatest_depth(queue: Queue) -> None:
    assert queue.get(queue.enqueue("echo", nested(100)).id).payload == nested(100)


@pytest.mark.parametrize("form", ["milliseconds", "datetime", "text"])
def test_enqueue_takes_run_at_in_three_forms(queue: Queue, form: str) -> None:
    at = (queue.now() // 1000 + 3600) * 1000
    moment = datetime.fromtimestamp(at / 1000, UTC)
    forms = {"milliseconds": at, "datetime": moment, "text": moment.isoformat()}
    assert queue.get(queue.enqueue("echo", {}, run_at=forms[form]).id).run_at == at


@pytest.mark.parametrize("options", [{"run_at": 5}, {"run_at": -5}, {"run_at": "1990-01-01T00:00:00Z"}, {"delay": 0}])
def test_enqueue_for_the_past_is_for_now(queue: Queue, worker: str, options: dict[str, Any]) -> None:
    job = queue.enqueue("echo", {}, **options)
    assert job.run_at == 0
    assert ids(queue.dequeue(worker, DEFAULT)) == [job.id]


def test_enqueue_many_stores_all_in_order(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("echo", [1, 2, 3], max_attempts=2)
    assert [queue.get(job.id) for job in jobs] == jobs
    assert [job.payload for job in queue.dequeue(worker, DEFAULT, 5)] == [1, 2, 3]


def test_enqueue_many_stores_none_if_one_is_wrong(queue: Queue) -> None:
    with pytest.raises(InvalidJob):
        queue.enqueue_many("echo", [1, 2, math.nan])
    assert dump(queue) == {}


def test_enqueue_many_takes_a_thousand(queue: Queue) -> None:
    assert len(queue.enqueue_many("echo", range(1000))) == 1000
    assert queue.stats()["pending"] == queue.waiting(DEFAULT) == 1000
    queue.enqueue("echo", {})  # one more ring of the bell, which the books limit


def test_enqueue_many_refuses_more_than_a_thousand(queue: Queue) -> None:
    with pytest.raises(InvalidJob) as caught:
        queue.enqueue_many("echo", range(1001))
    assert caught.value.field == "jobs"
    assert dump(queue) == {}


def test_enqueue_many_of_none_does_nothing(queue: Queue) -> None:
    assert queue.enqueue_many("echo", []) == []
    assert dump(queue) == {}


def test_submit_stores_drafts_of_several_queues_and_times(queue: Queue, worker: str) -> None:
    drafts = [queue.draft("a", 1), queue.draft("b", 2, queue="b"), queue.draft("a", 3, delay=9), queue.draft("a", 4)]
    assert dump(queue).keys() == {key for key in dump(queue) if "worker" in key or "lease" in key}
    queue.submit(drafts)
    assert [job.payload for job in queue.dequeue(worker, ["default", "b"], 9)] == [1, 4, 2]


# Dequeue --------------------------------------------------------------------------------------------------------------


def test_dequeue_starts_an_attempt(queue: Queue, worker: str) -> None:
    job = queue.enqueue("echo", {"a": 1})
    before = queue.now()
    [started] = queue.dequeue(worker, DEFAULT)
    assert (started.id, started.payload) == (job.id, {"a": 1})
    assert (started.status, started.attempts, started.attempts, started.worker) == ("processing", 1, 1, worker)
    assert before <= started.started_at <= queue.now()
    assert queue.get(job.id) == started


def test_dequeue_finds_nothing(queue: Queue, worker: str) -> None:
    before = dump(queue)
    assert queue.dequeue(worker, ["default", "other"], 5) == []
    assert dump(queue) == before


def test_dequeue_is_first_in_first_out(queue: Queue, worker: str) -> None:
    jobs = [queue.enqueue("echo", n) for n in range(5)]
    assert ids(queue.dequeue(worker, DEFAULT, 2) + queue.dequeue(worker, DEFAULT, 9)) == ids(jobs)


def test_dequeue_keeps_to_the_order_of_queues(queue: Queue, worker: str) -> None:
    low = queue.enqueue_many("echo", [1, 2], queue="low")
    high = queue.enqueue_many("echo", [3, 4], queue="high")
    assert ids(queue.dequeue(worker, ["high", "low"], 3)) == ids([*high, low[0]])


def test_dequeue_drops_what_was_cancelled(queue: Queue, worker: str) -> None:
    cancelled, job = queue.enqueue_many("echo", [1, 2])
    queue.cancel(cancelled.id)
    assert ids(queue.dequeue(worker, DEFAULT, 2)) == [job.id]
    assert queue.adopt(worker, [job.id]) == []


def test_dequeue_starts_an_id_that_is_listed_twice_once(queue: Queue, worker: str) -> None:
    job = queue.enqueue("echo", {})
    raw(queue).lpush(queue.keys.jobs("default"), job.id)
    assert ids(queue.dequeue(worker, DEFAULT, 2)) == [job.id]
    assert raw(queue).lrange(queue.keys.proc(worker), 0, -1) == [job.id.encode()]


@pytest.mark.parametrize("same", [True, False], ids=["by-the-same-worker", "by-another"])
def test_dequeue_drops_an_id_whose_job_runs(queue: Queue, worker: str, same: bool) -> None:
    job = put(queue, "processing")
    raw(queue).lpush(queue.keys.jobs("default"), job.id)
    assert queue.dequeue(job.worker if same else worker, DEFAULT) == []
    assert raw(queue).lrange(queue.keys.proc(job.worker), 0, -1) == [job.id.encode()]


def test_dequeue_shares_jobs_between_workers(queue: Queue) -> None:
    jobs = queue.enqueue_many("echo", range(100))

    def drain(worker: str) -> list[str]:
        return [job.id for _ in range(100) for job in queue.dequeue(worker, DEFAULT, 3)]

    with ThreadPoolExecutor(4) as pool:
        shares = list(pool.map(drain, [queue.register(DEFAULT, 3) for _ in range(4)]))
    assert sorted(id for share in shares for id in share) == sorted(ids(jobs))


def test_dequeue_by_a_worker_that_is_not_registered_loses_nothing(queue: Queue, worker: str) -> None:
    job = queue.enqueue("echo", {})
    with pytest.raises(Reaped):
        queue.dequeue("nobody", DEFAULT)
    assert queue.lost_workers() == ["nobody"]
    assert queue.reap("nobody") == 1
    assert ids(queue.dequeue(worker, DEFAULT)) == [job.id]


def test_wait_ends_when_a_job_comes(queue: Queue) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(queue.wait, ["other", "default"], 3.5)
        queue.enqueue("echo", {})
        assert waiting.result(10)


def test_wait_ends_when_the_time_is_up(queue: Queue) -> None:
    assert not queue.wait(DEFAULT, 0.01)


def test_wait_takes_no_work(queue: Queue, worker: str) -> None:
    job = queue.enqueue("echo", {})
    assert queue.wait(DEFAULT)
    assert not queue.wait(DEFAULT, 0.01)
    assert ids(queue.dequeue(worker, DEFAULT)) == [job.id]


def test_waiting_counts_entries(queue: Queue) -> None:
    queue.enqueue_many("echo", [1, 2])
    queue.enqueue("echo", 3, queue="other")
    assert (queue.waiting(["default", "other"]), queue.waiting(["other", "none"])) == (3, 1)


def test_adopt_finds_what_was_taken_and_forgotten(queue: Queue, worker: str) -> None:
    job = put(queue, "processing")
    forgotten = queue.enqueue("echo", {})
    taken = queue.take(job.worker, DEFAULT, 5)
    assert queue.adopt(job.worker, [job.id]) == taken == [forgotten.id.encode()]
    assert ids(queue.start(job.worker, taken, {job.id: 1})) == [forgotten.id]


def test_adopt_finds_what_was_started_and_forgotten(queue: Queue) -> None:
    job = put(queue, "processing")
    assert queue.start(job.worker, queue.adopt(job.worker, []), {}) == [job]


# Settle ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [None, 0, "", "text", [1, {"a": None}], {"sent": True}])
def test_complete_stores_the_result(queue: Queue, result: Any) -> None:
    job = put(queue, "processing")
    before = queue.now()
    queue.complete(job, result)
    stored = queue.get(job.id)
    assert (stored.status, stored.result, stored.attempts, stored.worker) == ("completed", result, 1, "")
    assert before <= stored.ended_at == stored.updated_at <= queue.now()
    assert stored.answer()["result"] == result


def test_complete_forgets_the_error_of_an_earlier_attempt(queue: Queue, worker: str) -> None:
    queue.fail(put(queue, "processing"), BOOM, 0)
    queue.clock.ahead += 1
    queue.promote()
    [job] = queue.dequeue(worker, DEFAULT)
    assert (job.attempts, job.error) == (2, BOOM)
    queue.complete(job)
    assert queue.get(job.id).error is None


def test_complete_twice_is_refused(queue: Queue) -> None:
    job = put(queue, "processing")
    queue.complete(job)
    before = dump(queue)
    with pytest.raises(Reaped):
        queue.complete(job)
    assert dump(queue) == before


def test_fail_waits_for_the_backoff(queue: Queue, worker: str) -> None:
    job = put(queue, "processing")
    queue.fail(job, BOOM, 10)
    stored = queue.get(job.id)
    assert (stored.status, stored.error, stored.attempts, stored.worker) == ("pending", BOOM, 1, "")
    assert stored.run_at == stored.updated_at + 10_000
    queue.promote()
    assert queue.dequeue(worker, DEFAULT) == []
    queue.clock.ahead += 10_000
    queue.promote()
    assert queue.dequeue(worker, DEFAULT)[0].attempts == 2


@pytest.mark.parametrize(("most", "after"), [(1, 10), (1, None), (3, None)])
def test_fail_without_another_attempt_is_final(queue: Queue, most: int, after: float | None) -> None:
    job = put(queue, "processing", max_attempts=most)
    queue.fail(job, BOOM, after)
    stored = queue.get(job.id)
    assert (stored.status, stored.error, stored.attempts, stored.run_at) == ("failed", BOOM, 1, 0)
    assert stored.ended_at >= job.started_at


def test_fail_stores_message_and_traceback_cut_to_size(queue: Queue) -> None:
    job = put(queue, "processing")
    queue.fail(job, Failure.of(ValueError("m" * 999 + "xy"), "ab" + "t" * 3999), None)
    assert queue.get(job.id).error == Failure("ValueError", "m" * 999 + "x", "b" + "t" * 3999)


class Mute(Exception):
    def __str__(self) -> str:
        raise KeyError("inner")


@pytest.mark.parametrize(
    ("error", "message"), [(ValueError("a\ud800"), "a\\ud800"), (Mute(), "(its text raised KeyError)")]
)
def test_fail_stores_an_error_whatever_its_text(queue: Queue, error: Exception, message: str) -> None:
    queue.fail(job := put(queue, "processing"), Failure.of(error))
    assert queue.get(job.id).error == Failure(type(error).__name__, message)


@given(st.integers(1, 6) | st.integers(1, 200), st.floats(0.001, 100), st.floats(100, 10_000))
@settings(derandomize=True, database=None)
def test_backoff_doubles_with_jitter_up_to_its_cap(attempts: int, base: float, cap: float) -> None:
    plain = base * 2.0 ** (attempts - 1)
    waits = [backoff(attempts, base, cap) for _ in range(20)]
    assert min(cap, plain) <= min(waits)
    assert max(waits) <= min(cap, plain * 1.5)
    assert len(set(waits)) > 1 or max(waits) == cap


def test_release_refunds_the_attempt(queue: Queue, worker: str) -> None:
    queue.release(job := put(queue, "processing"))
    stored = queue.get(job.id)
    assert (stored.status, stored.attempts, stored.refunds, stored.worker, stored.error) == ("pending", 0, 1, "", None)
    assert queue.dequeue(worker, DEFAULT)[0].attempts == 1


def test_release_goes_to_the_head_of_its_queue(queue: Queue, worker: str) -> None:
    job = put(queue, "processing")
    later = queue.enqueue("echo", {})
    queue.release(job)
    assert ids(queue.dequeue(worker, DEFAULT, 2)) == [job.id, later.id]


def test_release_of_several_keeps_their_order(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("echo", [1, 2, 3])
    queue.settle(worker, [Outcome(job, "release") for job in queue.dequeue(worker, DEFAULT, 3)])
    assert ids(queue.dequeue(worker, DEFAULT, 3)) == ids(jobs)


def test_release_refunds_ten_times_at_most(queue: Queue, worker: str) -> None:
    queue.release(job := put(queue, "processing", max_attempts=2))
    for _ in range(9):
        queue.release(queue.dequeue(worker, DEFAULT)[0])
    assert (queue.get(job.id).attempts, queue.get(job.id).refunds) == (0, 10)
    queue.release(queue.dequeue(worker, DEFAULT)[0])
    assert (queue.get(job.id).status, queue.get(job.id).attempts) == ("pending", 1)
    queue.release(queue.dequeue(worker, DEFAULT)[0])
    stored = queue.get(job.id)
    assert (stored.status, stored.error) == ("failed", Failure("WorkerLost", "released too often (attempt 2/2)"))


def test_settle_writes_a_mixed_batch(queue: Queue, worker: str) -> None:
    queue.enqueue_many("echo", range(4))
    a, b, c, d = queue.dequeue(worker, DEFAULT, 4)
    batch = [Outcome(a, "complete", 7), Outcome(b, "fail", error=BOOM), Outcome(c, "fail", error=BOOM, after=5)]
    queue.settle(worker, [*batch, Outcome(d, "release")])
    assert [queue.get(job.id).status for job in (a, b, c, d)] == ["completed", "failed", "pending", "pending"]
    assert queue.adopt(worker, []) == []
    told = queue.stats()
    assert (told["queues"]["default"]["pending"], told["queues"]["default"]["processing"]) == (2, 0)
    assert told["total"] == {"completed": 1, "failed": 1, "cancelled": 0}


def test_settle_of_none_does_nothing(queue: Queue, worker: str) -> None:
    before = dump(queue)
    queue.settle(worker, [])
    assert dump(queue) == before


def test_progress_is_shown_while_running_and_kept_with_the_outcome(queue: Queue) -> None:
    job = put(queue, "processing")
    job.set_progress(1, of=3)
    assert queue.get(job.id).progress == 0.3333
    job.set_progress(2)
    queue.complete(job)
    assert queue.get(job.id).progress == 1.0


def test_progress_of_a_job_that_was_settled_is_refused(queue: Queue) -> None:
    job = put(queue, "processing")
    queue.release(job)
    before = dump(queue)
    with pytest.raises(Reaped):
        job.set_progress(0.5)
    assert dump(queue) == before


def test_progress_starts_anew_with_an_attempt(queue: Queue, worker: str) -> None:
    job = put(queue, "processing")
    job.set_progress(0.5)
    queue.release(job)
    assert queue.dequeue(worker, DEFAULT)[0].progress == 0


# The fence ------------------------------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[Queue, Job], object]] = {
    "complete": lambda queue, job: queue.complete(job),
    "fail": lambda queue, job: queue.fail(job, BOOM),
    "fail-later": lambda queue, job: queue.fail(job, BOOM, 5),
    "release": lambda queue, job: queue.release(job),
    "settle-none": lambda queue, job: queue.settle(job.worker, []),
    "settle-again": lambda queue, job: queue.settle(job.worker, [Outcome(job, "complete")], again=True),
    "start": lambda queue, job: queue.start(job.worker, [job.id.encode()]),
    "progress": lambda queue, job: job.set_progress(1),
    "heartbeat": lambda queue, job: queue.heartbeat(job.worker, [job.id]),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("given_to", ["nobody", "another"])
def test_worker_that_was_reaped_writes_nothing(
    queue: Queue, worker: str, write: Callable[..., object], given_to: str
) -> None:
    job = put(queue, "processing")
    lapse(queue, job.worker)
    queue.reap(job.worker)
    if given_to == "another":
        queue.dequeue(worker, DEFAULT)
    before = dump(queue)
    with pytest.raises(Reaped):
        write(queue, job)
    assert dump(queue) == before


def test_heartbeat_renews_the_lease_and_tells_what_runs(queue: Queue, worker: str) -> None:
    raw(queue).pexpire(queue.keys.lease(worker), 5000)
    queue.heartbeat(worker, ["a", "b"])
    assert 5000 < raw(queue).pttl(queue.keys.lease(worker)) <= queue.lease_ms
    [about] = queue.workers()
    assert (about["jobs"], about["alive"]) == (["a", "b"], True)


def test_heartbeat_of_one_that_overslept_and_was_not_reaped_saves_it(queue: Queue) -> None:
    job = put(queue, "processing")
    lapse(queue, job.worker)
    queue.heartbeat(job.worker)
    assert queue.lost_workers() == []
    assert queue.reap(job.worker) == 0
    queue.complete(job)


# Cancel and retry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["", "nonsense", "*", "01890000-0000-7000-8000-000000000000", "default\n"])
def test_cancel_retry_and_get_of_no_job_are_none(queue: Queue, id: str) -> None:
    assert (queue.cancel(id), queue.retry(id), queue.get(id)) == (None, None, None)


def test_cancel_returns_the_job_as_stored(queue: Queue) -> None:
    job = put(queue, "delayed")
    cancelled = queue.cancel(job.id)
    assert cancelled == queue.get(job.id)
    assert cancelled.ended_at >= job.created_at
    assert queue.stats()["delayed"] == 0


def test_cancel_of_a_job_that_was_taken_and_not_started(queue: Queue, worker: str) -> None:
    job = put(queue, "pending")
    taken = queue.take(worker, DEFAULT, 1)
    queue.cancel(job.id)
    assert queue.start(worker, taken) == []


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_retry_gives_all_attempts_back_and_queues_last(queue: Queue, worker: str, status: str) -> None:
    job = put(queue, status, max_attempts=1)
    other = queue.enqueue("echo", {})
    assert queue.retry(job.id) == queue.get(job.id)
    started = {job.id: job for job in queue.dequeue(worker, DEFAULT, 5)}
    assert started[job.id].attempts == 1
    if status == "failed":  # the id of a cancelled one may still stand where it was
        assert list(started) == [other.id, job.id]


@pytest.mark.parametrize(("verb", "status", "total"), [("cancel", "pending", 0), ("retry", "failed", 1)])
def test_cancel_or_retry_by_several_at_once_succeeds_once(queue: Queue, verb: str, status: str, total: int) -> None:
    job, line = put(queue, status), threading.Barrier(4)

    def change(_: int) -> bool:
        line.wait()
        try:
            return bool(getattr(queue, verb)(job.id))
        except WrongStatus:
            return False

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(change, range(4))) == [False, False, False, True]
    assert queue.stats()["pending"] == total


# Promote --------------------------------------------------------------------------------------------------------------


def test_promote_moves_jobs_when_their_time_has_come(queue: Queue, worker: str) -> None:
    job = queue.enqueue("echo", {}, delay=60)
    assert (queue.promote(), queue.stats()["delayed"]) == (0, 1)
    queue.clock.ahead += 60_000
    assert (queue.promote(), queue.stats()["delayed"]) == (1, 0)
    assert queue.wait(DEFAULT, 0.01)
    assert ids(queue.dequeue(worker, DEFAULT)) == [job.id]


def test_promote_keeps_the_order_of_times(queue: Queue, worker: str) -> None:
    late, early = queue.enqueue("echo", {}, delay=20), queue.enqueue("echo", {}, delay=10)
    queue.clock.ahead += 30_000
    queue.promote()
    assert ids(queue.dequeue(worker, DEFAULT, 2)) == [early.id, late.id]


def test_promote_moves_a_limited_number(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyqueue, "PROMOTED", 2)
    queue.enqueue_many("echo", range(3), delay=1)
    queue.clock.ahead += 1000
    assert [queue.promote(), queue.promote(), queue.promote()] == [2, 1, 0]


def test_promote_leaves_it_to_another_who_is_at_it(queue: Queue) -> None:
    queue.enqueue("echo", {}, delay=1)
    queue.clock.ahead += 1000
    raw(queue).set(queue.keys.promoter, "1", px=1000)
    before = dump(queue)
    assert queue.promote() == 0
    assert dump(queue) == before


def test_promote_twice_runs_a_job_once(queue: Queue, worker: str) -> None:
    job = queue.enqueue("echo", {}, delay=1)
    queue.clock.ahead += 1000
    queue.promote()
    raw(queue).zadd(queue.keys.delayed, {job.id: job.run_at})
    queue.promote()
    assert queue.waiting(DEFAULT) == 2
    [started] = queue.dequeue(worker, DEFAULT, 1)
    assert queue.start(worker, queue.take(worker, DEFAULT, 1), {job.id: 1}) == []
    queue.complete(started)


def test_promote_drops_what_is_not_pending(queue: Queue) -> None:
    done = put(queue, "completed")
    raw(queue).zadd(queue.keys.delayed, {done.id: 1, "01890000-0000-7000-8000-000000000000": 2})
    assert queue.promote() == 2
    assert queue.waiting(DEFAULT) == queue.stats()["delayed"] == 0


def test_job_that_comes_before_its_time_is_put_back(queue: Queue, worker: str) -> None:
    job = queue.enqueue("echo", {}, delay=60)
    raw(queue).zrem(queue.keys.delayed, job.id)
    raw(queue).lpush(queue.keys.jobs("default"), job.id)
    assert queue.dequeue(worker, DEFAULT) == []
    assert raw(queue).zscore(queue.keys.delayed, job.id) == job.run_at


# Reap -----------------------------------------------------------------------------------------------------------------


def test_reap_of_the_living_does_nothing(queue: Queue) -> None:
    job = put(queue, "processing")
    assert queue.lost_workers() == []
    assert queue.reap(job.worker) == 0
    queue.complete(job)


def test_reap_gives_a_job_back_and_its_attempt_is_spent(queue: Queue, worker: str) -> None:
    job = put(queue, "processing")
    later = queue.enqueue("echo", {})
    lapse(queue, job.worker)
    assert queue.lost_workers() == [job.worker]
    assert queue.reap(job.worker) == 1
    stored = queue.get(job.id)
    assert (stored.status, stored.attempts, stored.worker) == ("pending", 1, "")
    assert stored.error == Failure("WorkerLost", "worker lost (attempt 1/3)")
    assert [about["id"] for about in queue.workers()] == [worker]
    assert [(job.id, job.attempts) for job in queue.dequeue(worker, DEFAULT, 2)] == [(job.id, 2), (later.id, 1)]


def test_reap_gives_several_back_in_their_order(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("echo", range(3))
    dead = queue.register(DEFAULT, 3)
    queue.dequeue(dead, DEFAULT, 3)
    lapse(queue, dead)
    assert queue.reap(dead) == 3
    assert ids(queue.dequeue(worker, DEFAULT, 3)) == ids(jobs)


def lose(queue: Queue, most: int) -> list[Job]:
    """Start up to that many jobs on one worker, and let it be lost."""
    worker = queue.register(DEFAULT, most)
    jobs = queue.dequeue(worker, DEFAULT, most)
    lapse(queue, worker)
    assert queue.reap(worker) >= len(jobs)
    return jobs


def test_reap_counts_no_attempt_of_jobs_that_ran_beside_others(queue: Queue) -> None:
    jobs = queue.enqueue_many("echo", range(3), max_attempts=1)
    assert ids(lose(queue, 3)) == ids(jobs)
    for job in jobs:
        stored = queue.get(job.id)
        assert (stored.status, stored.attempts, stored.suspicions) == ("pending", 0, 1)
        assert stored.error == Failure(
            "WorkerLost", "worker lost while it ran other jobs too (attempt 1/1, not counted)"
        )


def test_reap_counts_the_attempt_of_a_job_beside_which_others_were_only_taken(queue: Queue) -> None:
    job, taken = queue.enqueue_many("echo", range(2))
    worker = queue.register(DEFAULT, 2)
    queue.dequeue(worker, DEFAULT)
    queue.take(worker, DEFAULT, 1)
    lapse(queue, worker)
    assert queue.reap(worker) == 2
    assert (queue.get(job.id).attempts, queue.get(job.id).suspicions) == (1, 0)
    assert (queue.get(taken.id).attempts, queue.get(taken.id).suspicions) == (0, 0)


def test_start_leaves_a_suspect_in_company_to_wait(queue: Queue, worker: str) -> None:
    suspects = queue.enqueue_many("echo", range(2), max_attempts=1)
    lose(queue, 2)
    lose(queue, 2)
    innocent = queue.enqueue("echo", {})
    taken = queue.take(worker, DEFAULT, 3)
    assert [(job.id, job.status) for job in queue.start(worker, taken, {})] == [
        (suspects[0].id, "pending"),
        (suspects[1].id, "pending"),
        (innocent.id, "processing"),
    ]
    held = {innocent.id: 1}
    assert [job.status for job in queue.start(worker, taken[:1], held)] == ["pending"]
    queue.complete(queue.get(innocent.id))
    assert sorted(queue.adopt(worker, [])) == sorted(taken[:2])
    [alone] = queue.start(worker, taken[:1], {})
    assert (alone.status, alone.attempts, alone.suspect) == ("processing", 1, True)
    queue.complete(alone)
    assert queue.deregister(worker) is None
    assert queue.get(suspects[1].id).status == "pending"


def test_reap_fails_a_suspect_that_was_lost_alone_with_its_last_attempt(queue: Queue) -> None:
    pill, other = queue.enqueue_many("echo", range(2), max_attempts=1)
    lose(queue, 2)
    lose(queue, 2)
    assert ids(lose(queue, 1)) == [pill.id]
    assert queue.get(pill.id).error == Failure("WorkerLost", "worker lost (attempt 1/1)")
    assert queue.get(other.id).status == "pending"


def test_retry_of_a_suspect_leaves_it_one(queue: Queue) -> None:
    pill, _ = queue.enqueue_many("echo", range(2), max_attempts=1)
    lose(queue, 2)
    lose(queue, 2)
    lose(queue, 1)
    assert queue.retry(pill.id).suspect


def test_reap_fails_a_job_that_has_killed_its_last_worker(queue: Queue) -> None:
    job = queue.enqueue("kill", {})
    for attempt in (1, 2, 3):
        worker = queue.register(DEFAULT, 1)
        assert queue.dequeue(worker, DEFAULT)[0].attempts == attempt
        lapse(queue, worker)
        assert queue.reap(worker) == 1
    stored = queue.get(job.id)
    assert (stored.status, stored.attempts) == ("failed", 3)
    assert stored.error == Failure("WorkerLost", "worker lost (attempt 3/3)")
    assert queue.waiting(DEFAULT) == 0


def test_reap_gives_back_what_was_taken_and_never_started(queue: Queue, worker: str) -> None:
    job = put(queue, "pending")
    dead = queue.register(DEFAULT, 1)
    queue.take(dead, DEFAULT, 1)
    assert queue.get(job.id).status == "pending"
    lapse(queue, dead)
    assert queue.reap(dead) == 1
    assert queue.dequeue(worker, DEFAULT)[0].attempts == 1


def test_reap_twice_gives_back_once(queue: Queue) -> None:
    job = put(queue, "processing")
    lapse(queue, job.worker)
    assert (queue.reap(job.worker), queue.reap(job.worker)) == (1, 0)
    assert queue.waiting(DEFAULT) == 1


def test_reap_leaves_a_job_alone_that_runs_elsewhere(queue: Queue, worker: str) -> None:
    job = put(queue, "processing")
    lapse(queue, job.worker)
    queue.reap(job.worker)
    [again] = queue.dequeue(worker, DEFAULT)
    raw(queue).lpush(queue.keys.proc(job.worker), job.id)
    raw(queue).sadd(queue.keys.workers, job.worker)
    assert queue.reap(job.worker) == 0
    assert queue.get(job.id) == again
    queue.complete(again)


def test_reap_finds_what_a_sleeper_took_after_its_funeral(queue: Queue, worker: str) -> None:
    sleeper = queue.register(DEFAULT, 1)
    lapse(queue, sleeper)
    assert queue.reap(sleeper) == 0
    job = queue.enqueue("echo", {})
    with pytest.raises(Reaped):
        queue.dequeue(sleeper, DEFAULT)
    assert queue.lost_workers() == [sleeper]
    assert queue.reap(sleeper) == 1
    assert [(job.id, job.attempts) for job in queue.dequeue(worker, DEFAULT)] == [(job.id, 1)]


def test_deregister_takes_an_idle_worker_out_of_the_books(queue: Queue, worker: str) -> None:
    queue.deregister(worker)
    assert dump(queue) == {}


def test_deregister_of_one_that_holds_jobs_gives_them_back(queue: Queue) -> None:
    job = put(queue, "processing")
    queue.deregister(job.worker)
    assert queue.lost_workers() == []
    assert queue.get(job.id).status == "pending"


# Trim -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "days"), [("completed", 1), ("failed", 7), ("cancelled", 7)])
def test_trim_forgets_what_has_been_kept_long_enough(queue: Queue, status: str, days: int) -> None:
    job = put(queue, status)
    queue.clock.ahead += days * DAY - 10_000
    assert queue.trim() == 0
    queue.clock.ahead += 20_000
    assert queue.trim() == 1
    assert queue.get(job.id) is None
    assert newest(queue, status) == []
    assert (queue.stats()[status], queue.stats()["total"][status]) == (0, 1)


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_trim_forgets_the_entry_of_a_record_that_has_expired(server: Server, status: str) -> None:
    queue = server.queue(keep_completed=5, keep_failed=5)
    job = put(queue, status)
    assert 0 < raw(queue).pttl(queue.keys.job(job.id)) <= 5000
    raw(queue).delete(queue.keys.job(job.id))
    queue.clock.ahead += 5001
    assert queue.trim() == 1
    assert queue.stats()[status] == 0
    check_consistency(queue)


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_trim_forgets_the_oldest_above_the_cap(queue: Queue, monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    monkeypatch.setattr(tinyqueue, "KEPT", 2)
    monkeypatch.setattr(tinyqueue, "MAX_JOBS", 2)  # ... a limited number at a time
    jobs = []
    for name in ("a", "b", "c", "d", "e"):
        jobs.append(put(queue, status, queue=name))
        queue.clock.ahead += 1
    assert [queue.trim(), queue.trim(), queue.trim()] == [2, 1, 0]
    assert ids(newest(queue, status)) == [jobs[4].id, jobs[3].id]
    assert [queue.get(job.id) for job in jobs[:3]] == [None] * 3


@pytest.mark.parametrize("status", ["pending", "delayed", "processing"])
def test_trim_never_forgets_a_job_that_has_not_ended(queue: Queue, status: str) -> None:
    job = put(queue, status)
    queue.clock.ahead += 3650 * DAY
    assert queue.trim() == 0
    assert raw(queue).pttl(queue.keys.job(job.id)) == -1


def test_ended_jobs_leave_nothing_behind(server: Server) -> None:
    queue = server.queue(keep_completed=1, keep_failed=1)
    for status in ("completed", "failed", "cancelled"):
        put(queue, status, queue=status)
    worker = queue.register(["cancelled"], 1)
    queue.dequeue(worker, ["cancelled"])  # drops what the cancelled one has left
    queue.deregister(worker)
    queue.clock.ahead += 1001
    assert queue.trim() == 3
    left = {key for key in dump(queue) if "bell" not in key and not key.startswith(queue.keys.prefix + "minute:")}
    assert left == {queue.keys.counts, queue.keys.metrics, queue.keys.series}


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["pending", "processing", "completed", "failed", "cancelled"])
def test_jobs_lists_a_status_newest_first(queue: Queue, status: str) -> None:
    listed = []
    for name in ("a", "b", "c"):
        listed.insert(0, put(queue, status, queue=name))
        queue.clock.ahead += 5
    put(queue, "completed" if status != "completed" else "failed", queue="d")
    assert newest(queue, status) == listed
    assert newest(queue, status, limit=1) == listed[:1]
    assert newest(queue, status, limit=2) == listed[:2]


def test_jobs_lists_pending_ones_by_when_they_were_created(queue: Queue) -> None:
    jobs = []
    for delay in (30, 0, 20, 10):
        jobs.insert(0, queue.enqueue("echo", {}, delay=delay))
        queue.clock.ahead += 5
    assert newest(queue, "pending") == jobs
    assert newest(queue, "pending", limit=1) == jobs[:1]


@pytest.mark.parametrize("status", ["pending", "processing", "completed", "failed", "cancelled"])
def test_jobs_of_limit_zero_are_none(queue: Queue, status: str) -> None:
    put(queue, status)
    assert newest(queue, status, limit=0) == []


def test_stats_counts_every_status(queue: Queue) -> None:
    assert queue.stats()["queues"] == {}
    for status in ("pending", "delayed", "processing", "completed", "failed", "cancelled"):
        put(queue, status, queue=status)
    stats = queue.stats()
    assert {name: stats[name] for name in ("pending", "delayed", "processing", "completed", "failed", "cancelled")} == {
        "pending": 2,
        "delayed": 1,
        "processing": 1,
        "completed": 1,
        "failed": 1,
        "cancelled": 1,
    }
    assert stats["workers"] == 1
    assert stats["queues"]["processing"] == {"pending": 0, "processing": 1, "oldestWaitingMs": 0, "paused": False}
    assert stats["total"] == {"completed": 1, "failed": 1, "cancelled": 1}
    assert list(queue.queues()) == sorted(["pending", "delayed", "processing", "completed", "failed", "cancelled"])


def test_workers_tells_who_is_there(queue: Queue) -> None:
    before = queue.now()
    worker, lost = queue.register(["a", "b"], 5), queue.register(DEFAULT, 1)
    lapse(queue, lost)
    about = {each["id"]: each for each in queue.workers()}
    assert (about[worker]["queues"], about[worker]["concurrency"], about[worker]["alive"]) == (["a", "b"], 5, True)
    assert before <= about[worker]["startedAt"] <= about[worker]["lastHeartbeat"]
    assert (about[lost]["alive"], queue.stats()["workers"]) == (False, 1)


# Garbage --------------------------------------------------------------------------------------------------------------

ID = "01890000-0000-7000-8000-000000000000"
ENTRIES = [b"not-json", b"", b"\xff\xfe", b"{}", ID.encode(), ID.upper().encode(), b"x" * 10_000]
RECORDS = [
    b"",
    b"not-json",
    b"null",
    b"[]",
    b"{",
    b"{}",
    b"\xff\xfe",
    b'{"type":"echo"}',
    b'{"payload":1}',
    b'{"type":"echo","payload":{}',
    b'{"type":"echo","payload":"{',
    b'{"type":"echo","payload":"\xff"}',
    b'{"type":"echo","payload":1e999}',
    b'{"type":"echo","payload":1,"attempts":"x"}',
    b'{"type":"echo","payload":1,"status":"lost"}',
    b'{"type":"echo","payload":1,"id":"11890000-0000-7000-8000-000000000000"}',
    b'{"type":"echo","payload":' + b"[" * 100_000,
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_dequeue_drops_an_entry_that_names_no_job(queue: Queue, worker: str, entry: bytes) -> None:
    raw(queue).rpush(queue.keys.jobs("default"), entry)
    job = queue.enqueue("echo", {})
    assert ids(queue.dequeue(worker, DEFAULT, 2)) == [job.id]
    assert raw(queue).lrange(queue.keys.proc(worker), 0, -1) == [job.id.encode()]


@pytest.mark.parametrize("entry", ENTRIES)
def test_promote_and_reap_drop_an_entry_that_names_no_job(queue: Queue, worker: str, entry: bytes) -> None:
    raw(queue).zadd(queue.keys.delayed, {entry: 1})
    raw(queue).lpush(queue.keys.proc(worker), entry)
    lapse(queue, worker)
    assert (queue.promote(), queue.reap(worker)) == (1, 0)
    assert dump(queue) == {}


@pytest.mark.parametrize("record", RECORDS, ids=range(len(RECORDS)))
@pytest.mark.parametrize("place", ["queue", "delayed", "list of the dead"])
def test_unreadable_record_becomes_a_failed_job(queue: Queue, worker: str, place: str, record: bytes) -> None:
    raw(queue).set(queue.keys.job(ID), record)
    assert queue.get(ID).status == "failed"
    if place == "queue":
        raw(queue).rpush(queue.keys.jobs("default"), ID)
        job = queue.enqueue("echo", {})
        assert ids(queue.dequeue(worker, DEFAULT, 2)) == [job.id]
    elif place == "delayed":
        raw(queue).zadd(queue.keys.delayed, {ID: 1})
        assert queue.promote() == 1
    else:
        raw(queue).lpush(queue.keys.proc(worker), ID)
        lapse(queue, worker)
        assert queue.reap(worker) == 0
    [failed] = newest(queue, "failed")
    assert (failed.id, failed.error.type) == (ID, "UnreadableRecord")
    assert failed.payload == record[:10_000].decode("utf-8", "backslashreplace")


JOB = "job:" + ID


@pytest.mark.parametrize(
    ("key", "verb"),
    [
        ("jobs:default", lambda queue: queue.take("somebody", DEFAULT, 1)),
        ("jobs:default", lambda queue: queue.enqueue("echo", {})),
        ("jobs:default", lambda queue: queue.waiting(DEFAULT)),
        ("bell:default", lambda queue: queue.wait(DEFAULT, 0.01)),
        ("delayed", lambda queue: queue.promote()),
        ("completed", lambda queue: queue.trim()),
        ("failed", lambda queue: newest(queue, "failed")),
        ("proc:somebody", lambda queue: queue.reap("somebody")),
        ("proc:somebody", lambda queue: queue.adopt("somebody", [])),
        ("workers", lambda queue: queue.lost_workers()),
        ("counts", lambda queue: queue.stats()),
        (JOB, lambda queue: queue.get(ID)),
        (JOB, lambda queue: queue.cancel(ID)),
        (JOB, lambda queue: queue.retry(ID)),
    ],
)
def test_key_of_the_wrong_type_is_told_as_corrupted(server: Server, key: str, verb: Callable[[Queue], object]) -> None:
    queue = server.queue()
    key = queue.keys.counts.replace("counts", key)
    if JOB in key:
        raw(queue).lpush(key, "a list")
    else:
        raw(queue).set(key, "a string")
    with pytest.raises(Corrupted, match="WRONGTYPE"):
        verb(queue)
    queue.ping()  # nothing was left on the connection


@pytest.mark.parametrize("key", ["worker:somebody", "lease:somebody"])
def test_workers_that_cannot_be_read_are_told_as_corrupted(server: Server, key: str) -> None:
    queue = server.queue()
    raw(queue).sadd(queue.keys.workers, "somebody")
    raw(queue).mset(
        {queue.keys.worker("somebody"): '{"startedAt":1}', queue.keys.counts.replace("counts", key): "garbage"}
    )
    with pytest.raises(Corrupted):
        queue.workers()


@contextmanager
def unavailable(reason: str, doubtful: bool = False) -> Iterator[None]:
    with pytest.raises(Unavailable) as caught:
        yield
    assert (caught.value.reason, caught.value.doubtful) == (reason, doubtful)


# Others at the same moment --------------------------------------------------------------------------------------------
# `far` has read and is about to write when `near` changes what it has read.


def test_cancel_of_a_job_that_is_started_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job, worker = put(near, "pending"), near.register(DEFAULT, 1)
    proxy.before(b"EXEC", lambda: near.dequeue(worker, DEFAULT))
    asked = far.cancel(job.id)
    assert (asked.status, asked.cancelled) == ("processing", True)
    assert near.cancel_requests([job.id]) == [job.id]
    assert near.stats()["cancelled"] == 0


def test_start_of_a_job_that_is_cancelled_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job, worker = put(near, "pending"), near.register(DEFAULT, 1)
    proxy.before(b"MSET", lambda: near.cancel(job.id))
    assert far.dequeue(worker, DEFAULT) == []
    assert near.get(job.id).status == "cancelled"


def test_retry_of_a_job_that_is_retried_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "failed")
    proxy.before(b"EXEC", lambda: near.retry(job.id))
    with pytest.raises(WrongStatus, match="pending"):
        far.retry(job.id)
    assert near.waiting(DEFAULT) == 1


def test_trim_of_a_job_that_is_retried_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "failed")
    far.clock.ahead += 8 * DAY
    proxy.before(b"EXEC", lambda: near.retry(job.id))
    assert far.trim() == 0
    assert near.get(job.id).status == "pending"


@pytest.mark.parametrize("write", [*(name for name in WRITES if name not in ("settle-none", "settle-again", "start"))])
def test_worker_that_is_reaped_just_before_it_writes(near: Queue, far: Queue, proxy: CutProxy, write: str) -> None:
    job = put(near, "processing")
    job.__dict__["_queue"] = far
    lapse(near, job.worker)
    proxy.before(b"EXEC", lambda: near.reap(job.worker))
    with pytest.raises(Reaped):
        WRITES[write](far, job)
    assert (near.get(job.id).status, near.waiting(DEFAULT)) == ("pending", 1)


def test_worker_that_is_reaped_just_before_it_starts(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job, worker = put(near, "pending"), near.register(DEFAULT, 1)
    lapse(near, worker)
    proxy.before(b"MSET", lambda: near.reap(worker))
    with pytest.raises(Reaped):
        far.dequeue(worker, DEFAULT)
    assert near.dequeue(near.register(DEFAULT, 1), DEFAULT)[0].id == job.id


def test_worker_that_is_reaped_in_the_middle_of_a_take(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job, worker = put(near, "pending"), near.register(DEFAULT, 1)
    lapse(near, worker)
    proxy.split(b"RPOPLPUSH", lambda: near.reap(worker))
    assert far.take(worker, DEFAULT, 1) == [job.id.encode()]
    assert near.lost_workers() == [worker]
    assert near.reap(worker) == 1


def test_reap_of_a_worker_that_wakes_up_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "processing")
    lapse(near, job.worker)
    proxy.before(b"EXEC", lambda: near.heartbeat(job.worker))
    assert far.reap(job.worker) == 0
    near.complete(job)


def test_reap_of_a_worker_that_starts_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job, worker = put(near, "pending"), near.register(DEFAULT, 1)
    taken = near.take(worker, DEFAULT, 1)
    lapse(near, worker)
    proxy.before(b"EXEC", lambda: near.start(worker, taken))
    assert far.reap(worker) == 1
    assert (near.get(job.id).status, near.waiting(DEFAULT)) == ("pending", 1)


def test_reap_of_a_worker_that_takes_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "processing")
    near.enqueue("echo", {})
    lapse(near, job.worker)
    proxy.before(b"EXEC", lambda: near.take(job.worker, DEFAULT, 1))
    assert far.reap(job.worker) == 2


def test_reap_of_a_worker_that_settles_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "processing")
    lapse(near, job.worker)
    proxy.before(b"EXEC", lambda: near.complete(job))
    assert far.reap(job.worker) == 0
    assert near.get(job.id).status == "completed"


def test_deregister_of_a_worker_that_takes_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    put(near, "pending")
    worker = near.register(DEFAULT, 1)
    proxy.before(b"EXEC", lambda: near.take(worker, DEFAULT, 1))
    far.deregister(worker)
    assert near.lost_workers() == []
    assert near.waiting(DEFAULT) == 1


def test_transaction_that_others_keep_breaking_gives_up(
    near: Queue, far: Queue, proxy: CutProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue, "TRIES", 3)
    job = put(near, "processing")
    for done in (0.1, 0.2, 0.3):
        proxy.before(b"EXEC", lambda done=done: near.write_progress(msgspec.structs.replace(job, progress=done)))
    with unavailable("busy"):
        far.complete(job)
    assert near.get(job.id).progress == 0.3


# Packets that get lost ------------------------------------------------------------------------------------------------

# verb: the status before, the call, the status after, and how often the id then stands in its queue
LOST: dict[str, tuple[str, Callable[[Queue, Job], Any], str, int]] = {
    "complete": ("processing", lambda far, job: far.complete(job), "completed", 0),
    "fail": ("processing", lambda far, job: far.fail(job, BOOM), "failed", 0),
    "fail-later": ("processing", lambda far, job: far.fail(job, BOOM, 60), "pending", 0),
    "release": ("processing", lambda far, job: far.release(job), "pending", 1),
    "progress": ("processing", lambda far, job: far.write_progress(job), "processing", 0),
    "cancel": ("pending", lambda far, job: far.cancel(job.id), "cancelled", 1),
    "retry": ("failed", lambda far, job: far.retry(job.id), "pending", 1),
}


@pytest.mark.parametrize("cut", ["drop_reply", "drop_request", "hold"])
@pytest.mark.parametrize("verb", LOST)
def test_transition_whose_packet_is_lost_is_applied_once(
    near: Queue, far: Queue, proxy: CutProxy, verb: str, cut: str
) -> None:
    before, call, after, listed = LOST[verb]
    job = put(near, before)
    getattr(proxy, cut)(b"EXEC")
    call(far, job)
    proxy.deliver()  # a packet that was on its way for longer than anybody waited arrives after all
    assert near.get(job.id).status == after
    assert near.get(job.id).attempts == (0 if verb in ("release", "cancel", "retry") else 1)
    assert near.waiting(DEFAULT) == listed
    assert sum(near.stats()["total"].values()) == (verb in ("complete", "fail", "cancel", "retry"))


@pytest.mark.parametrize("cut", ["drop_reply", "drop_request"])
@pytest.mark.parametrize("count", [1, 3])
def test_enqueue_whose_packet_is_lost_is_applied_once(
    near: Queue, far: Queue, proxy: CutProxy, count: int, cut: str
) -> None:
    getattr(proxy, cut)(b"EXEC")
    jobs = far.enqueue_many("echo", range(count))
    assert [near.get(job.id) for job in jobs] == jobs
    assert (near.stats()["pending"], near.waiting(DEFAULT)) == (count, count)


def test_enqueue_whose_packet_arrives_late_resets_nothing(real: Server, proxy: CutProxy) -> None:
    near, far = real.queue(), real.queue(proxy.url)
    proxy.hold(b"EXEC")
    job, worker = far.enqueue("echo", {}), near.register(DEFAULT, 1)
    near.complete(near.dequeue(worker, DEFAULT)[0])
    proxy.deliver()
    assert near.get(job.id).status == "completed"
    assert near.dequeue(worker, DEFAULT) == []


def test_enqueue_that_is_not_answered_in_time_is_not_sent_again(
    near: Queue, real: Server, proxy: CutProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_redis, "SOCKET_TIMEOUT", 0.05)
    far = real.queue(proxy.url)
    far.now()
    proxy.hold(b"EXEC", cut=False)
    with unavailable("timeout", doubtful=True):
        far.enqueue("echo", {})
    assert near.stats()["pending"] == 0
    proxy.deliver()
    assert (near.stats()["pending"], near.waiting(DEFAULT)) == (1, 1)


def test_enqueue_that_is_in_doubt_says_so(near: Queue, far: Queue, proxy: CutProxy) -> None:
    proxy.drop_reply(b"EXEC")
    proxy.drop_request(b"EXISTS")  # the look whether it was applied
    with unavailable("unreachable", doubtful=True):
        far.enqueue("echo", {})
    assert len(newest(near, "pending")) == 1


def test_enqueue_whose_reply_is_lost_while_the_job_runs(near: Queue, far: Queue, proxy: CutProxy) -> None:
    worker = near.register(DEFAULT, 1)
    proxy.drop_reply(b"EXEC", lambda: near.complete(near.dequeue(worker, DEFAULT)[0]))
    job = far.enqueue("echo", {})
    assert near.get(job.id).status == "completed"


def test_retry_whose_reply_is_lost_while_the_job_is_started(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job, worker = put(near, "failed"), near.register(DEFAULT, 1)
    proxy.drop_reply(b"EXEC", lambda: near.dequeue(worker, DEFAULT))
    assert far.retry(job.id).id == job.id
    assert near.get(job.id).status == "processing"


def test_release_whose_reply_is_lost_while_the_job_is_started_again(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "processing")
    proxy.drop_reply(b"EXEC", lambda: near.dequeue(job.worker, DEFAULT))
    far.release(job)
    assert (near.get(job.id).status, near.get(job.id).refunds) == ("processing", 1)


@pytest.mark.parametrize(("cut", "found"), [("drop_reply", 1), ("drop_request", 0), ("hold", 1)])
def test_take_whose_packet_is_lost_hides_nothing(
    near: Queue, far: Queue, proxy: CutProxy, cut: str, found: int
) -> None:
    job, worker = put(near, "pending"), near.register(DEFAULT, 1)
    getattr(proxy, cut)(b"RPOPLPUSH")
    with unavailable("unreachable"):
        far.take(worker, DEFAULT, 1)
    proxy.deliver()
    taken = far.adopt(worker, [])
    assert len(taken) == found
    assert ids(far.start(worker, taken or far.take(worker, DEFAULT, 1))) == [job.id]


def test_take_that_arrives_after_the_funeral_hides_nothing(near: Queue, far: Queue, proxy: CutProxy) -> None:
    put(near, "pending")
    worker = near.register(DEFAULT, 1)
    proxy.hold(b"RPOPLPUSH")
    with unavailable("unreachable"):
        far.take(worker, DEFAULT, 1)
    lapse(near, worker)
    assert near.reap(worker) == 0
    proxy.deliver()
    assert near.lost_workers() == [worker]
    assert near.reap(worker) == 1


@pytest.mark.parametrize("cut", ["drop_reply", "drop_request", "hold"])
def test_start_whose_packet_is_lost_starts_one_attempt(near: Queue, far: Queue, proxy: CutProxy, cut: str) -> None:
    job, worker = put(near, "pending"), near.register(DEFAULT, 1)
    getattr(proxy, cut)(b"MSET")
    [started] = far.dequeue(worker, DEFAULT)
    proxy.deliver()
    assert (started.id, started.attempts) == (job.id, 1)
    assert near.get(job.id) == started


@pytest.mark.parametrize("cut", ["drop_reply", "drop_request"])
def test_reap_whose_packet_is_lost_gives_back_once(near: Queue, far: Queue, proxy: CutProxy, cut: str) -> None:
    job = put(near, "processing")
    lapse(near, job.worker)
    getattr(proxy, cut)(b"EXEC")
    far.reap(job.worker)
    assert (near.get(job.id).status, near.waiting(DEFAULT), near.reap(job.worker)) == ("pending", 1, 0)


@pytest.mark.parametrize("cut", ["drop_reply", "drop_request"])
def test_promote_whose_packet_is_lost_loses_nothing(near: Queue, far: Queue, proxy: CutProxy, cut: str) -> None:
    job = put(near, "delayed")
    far.clock.ahead = near.clock.ahead = 61_000  # a second more: the two do not read the time at the same moment
    getattr(proxy, cut)(b"EXEC")
    far.promote()
    raw(near).delete(near.keys.promoter)  # whose second may still run
    near.promote()
    assert ids(near.dequeue(near.register(DEFAULT, 1), DEFAULT)) == [job.id]


def test_promote_spares_a_job_that_became_delayed_again_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    near.enqueue("echo", 1, delay=1)
    near.clock.ahead = far.clock.ahead = 2000
    worker = near.register(["default"], 1)
    started: list[Job] = []

    def overtake() -> None:
        near.promote()
        started.extend(near.dequeue(worker, ["default"]))

    proxy.before(b"NX", overtake)  # it has read which jobs are due, and does not have the lock yet
    proxy.before(
        b"ZREM", lambda: near.fail(started[0], Failure("Boom", "it broke"), after=60)
    )  # it saw the job processing
    far.promote()
    assert near.stats()["delayed"] == near.stats()["pending"] == 1


def test_promote_that_arrives_late_spares_a_job_that_became_delayed_again(
    near: Queue, far: Queue, proxy: CutProxy
) -> None:
    near.enqueue("echo", 1, delay=1)
    near.clock.ahead = far.clock.ahead = 2000
    proxy.hold(b"ZREM")
    far.promote()
    raw(near).delete(near.keys.promoter)  # its time to live is over
    near.promote()
    [started] = near.dequeue(near.register(["default"], 1), ["default"])
    near.fail(started, Failure("Boom", "it broke"), after=60)
    proxy.deliver()
    assert near.stats()["delayed"] == near.stats()["pending"] == 1


@pytest.mark.parametrize("applied", [True, False])
def test_settle_that_is_in_doubt_can_be_repeated(near: Queue, far: Queue, proxy: CutProxy, applied: bool) -> None:
    job = put(near, "processing")
    cut = proxy.drop_reply if applied else proxy.drop_request
    cut(b"EXEC", lambda: proxy.drop_request(b"WATCH"))  # and then the look whether it was applied
    with unavailable("unreachable", doubtful=True):
        far.settle(job.worker, [Outcome(job, "complete", 7)])
    far.settle(job.worker, [Outcome(job, "complete", 7)], again=True)
    assert near.get(job.id).result == 7
    assert near.stats()["total"]["completed"] == 1


def test_transitions_take_two_round_trips(near: Queue, far: Queue, proxy: CutProxy) -> None:
    worker = near.register(DEFAULT, 10)
    far.store.memory()  # read again only after two seconds
    for _ in range(2):
        far.enqueue("echo", 0)  # and at the names that the metrics know after it has met another

    def round_trips(verb: Callable[[], object]) -> int:
        proxy.packets.clear()
        verb()
        return len(proxy.packets)

    assert round_trips(lambda: far.enqueue_many("echo", range(10))) == 1
    taken = near.take(worker, DEFAULT, 10)
    assert round_trips(lambda: far.start(worker, taken)) == 2
    jobs = newest(near, "processing")
    assert round_trips(lambda: far.settle(worker, [Outcome(job, "complete") for job in jobs])) == 2
    assert round_trips(lambda: far.heartbeat(worker)) == 1


# Trouble with Redis ---------------------------------------------------------------------------------------------------


@pytest.fixture
def own(start_redis: Callable[..., RedisServer]) -> Iterator[Queue]:
    """A queue with one pending job, on a real server of its own."""
    queue = Queue.from_url(start_redis().url)
    put(queue, "pending")
    yield queue
    check_consistency(queue)
    queue.pool.disconnect()


def refuses_writes_and_stores_nothing(queue: Queue, reason: str) -> None:
    before = dump(queue)
    for write in (lambda: queue.enqueue("echo", {}), lambda: queue.take("somebody", DEFAULT, 1)):
        with unavailable(reason):
            write()
    assert dump(queue) == before
    assert len(newest(queue, "pending")) == 1


def test_redis_that_is_full_takes_nothing_and_answers(own: Queue) -> None:
    raw(own).config_set("maxmemory", 1)
    refuses_writes_and_stores_nothing(own, "full")
    raw(own).config_set("maxmemory", 0)
    own.enqueue("echo", {})


def test_redis_that_is_read_only_takes_nothing_and_answers(own: Queue) -> None:
    raw(own).replicaof("127.0.0.1", free_port())
    refuses_writes_and_stores_nothing(own, "read-only")
    raw(own).replicaof("no", "one")
    own.enqueue("echo", {})


@pytest.mark.parametrize("user", ["", ":wrong@", "nobody:right@"])
def test_redis_that_wants_another_password_refuses(start_redis: Callable[..., RedisServer], user: str) -> None:
    server = start_redis("--requirepass", "right")
    queue = Queue.from_url(f"redis://{user}127.0.0.1:{server.port}/0")
    with unavailable("refused"):
        queue.ping()
    queue.pool.disconnect()


def test_redis_that_is_not_there_is_unreachable() -> None:
    queue = Queue.from_url(f"redis://127.0.0.1:{free_port()}/0")
    with unavailable("unreachable"):
        queue.enqueue("echo", {})


def test_redis_that_does_not_answer_is_a_timeout(
    real: Server, proxy: CutProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_redis, "SOCKET_TIMEOUT", 0.05)
    far = real.queue(proxy.url)
    proxy.swallow(b":none")
    with unavailable("timeout"):
        far.ping()
    far.ping()


def test_transition_that_is_not_answered_waits_for_one_timeout(
    near: Queue, real: Server, proxy: CutProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = put(near, "pending")
    monkeypatch.setattr(tinyqueue_redis, "SOCKET_TIMEOUT", 0.05)
    far = real.queue(proxy.url)
    far.resume("other")  # its first transaction looks at the names that the metrics know
    proxy.packets.clear()
    proxy.swallow(b"WATCH")
    with unavailable("timeout"):
        far.cancel(job.id)
    assert len(proxy.packets) == 1


def test_wait_does_not_set_the_clock_back(queue: Queue, server: Server) -> None:
    fresh = server.queue()  # which takes the time along with its wait
    fresh.wait(DEFAULT, 0.3)
    assert abs(fresh.now() - queue.now()) < 200


def test_submit_that_is_not_answered_waits_for_one_timeout(
    real: Server, proxy: CutProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_redis, "SOCKET_TIMEOUT", 0.05)
    far = real.queue(proxy.url)
    far.ping()
    proxy.packets.clear()
    proxy.swallow(b"INFO")  # the look at the memory comes first
    with unavailable("timeout"):
        far.enqueue("echo", {})
    assert len(proxy.packets) == 1
    far.enqueue("echo", {})


def test_redis_that_was_killed_has_kept_what_was_accepted(start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis("--appendonly", "yes")
    queue = Queue.from_url(server.url)
    job = queue.enqueue("echo", {})
    server.kill()
    with unavailable("unreachable"):
        queue.get(job.id)
    server.start()
    assert queue.get(job.id) == job
    check_consistency(queue)
    queue.pool.disconnect()


def test_connections_that_are_all_lent_are_busy(real: Server, proxy: CutProxy) -> None:
    far, told = real.queue(proxy.url, connections=1), []

    def meanwhile() -> None:
        with unavailable("busy"):
            far.ping()
        told.append("busy")

    proxy.before(b":none", meanwhile)
    far.ping()
    assert told == ["busy"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("LOADING Redis is loading the dataset in memory", "loading"),
        ("MISCONF Errors writing to the AOF file: No space left on device", "read-only"),
        ("NOREPLICAS Not enough good replicas to write.", "read-only"),
        ("READONLY You can't write against a read only replica.", "read-only"),
        ("OOM command not allowed when used memory > 'maxmemory'.", "full"),
        ("NOPERM this user has no permissions to run the 'ping' command", "refused"),
        ("NOAUTH Authentication required.", "refused"),
        ("BUSY Redis is busy running a script.", "busy"),
        ("CLUSTERDOWN The cluster is down", "unreachable"),
    ],
)
def test_redis_that_refuses_is_understood(far: Queue, proxy: CutProxy, answer: str, reason: str) -> None:
    trouble = far.last_trouble
    proxy.answer(b":none", f"-{answer}\r\n".encode())
    with unavailable(reason):
        far.ping()
    assert far.last_trouble > trouble
    far.ping()
    assert far.last_contact > far.last_trouble


def test_redis_that_answers_what_nobody_knows_is_corrupted_and_no_outage(far: Queue, proxy: CutProxy) -> None:
    trouble = far.last_trouble
    proxy.answer(b":none", b"-ERR nobody knows\r\n")
    with pytest.raises(Corrupted, match="nobody knows"):
        far.ping()
    assert far.last_trouble == trouble
