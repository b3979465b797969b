"""The verbs of the queue in all circumstances, on the embedded server and on a real one.

The order is that of tinyqueue.py: settings, enqueue, dequeue, settle, cancel and retry, upkeep,
reading. Then come the failures of Redis and of the network. test_matrix.py tests which verb is
allowed in which status.
"""

from __future__ import annotations

import math
import os
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
from conftest import RedisServer, Server, check_consistency, dump, find_lost, free_port, lapse, newest, put, raw
from cutproxy import CutProxy
from hypothesis import given, settings, strategies as st
from redis._parsers import _RESP2Parser  # private to the client

import tinyqueue
import tinyqueue_reading
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
    is_suspect,
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
    """Return an array of that depth."""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.fixture
def worker(queue: Queue) -> str:
    """A registered worker."""
    return queue.register(DEFAULT, 5)


# Settings -------------------------------------------------------------------------------------------------------------


def test_read_settings_of_an_empty_environment_returns_the_defaults() -> None:
    assert Settings.read({}) == Settings()


def test_read_settings_from_the_environment() -> None:
    environ = {
        "REDIS_URL": "redis://h",
        "PORT": "5005",
        "TINYQUEUE_LEASE": "9",
        "TINYQUEUE_TLS_VERIFY": "0",
        "HOME": "/root",
    }
    assert Settings.read(environ) == Settings(redis_url="redis://h", port=5005, lease=9, tls_verify=False)


def test_read_settings_treats_an_empty_variable_as_unset() -> None:
    assert Settings.read({"PORT": "", "REDIS_URL": "", "TINYQUEUE_LEASE": ""}) == Settings()


def test_read_settings_prefers_overrides_then_the_environment_then_dotenv(
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
def test_read_settings_refuses_an_invalid_value(environ: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.read(environ)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_settings_prints_no_short_secret() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.read({"TINYQUEUE_WEBHOOK_SECRETS": "hunter"})
    assert "hunter" not in str(caught.value)


NUMBERS = ("PORT", "WORKER_CONCURRENCY", "TINYQUEUE_LEASE", "TINYQUEUE_OPEN", "TINYQUEUE_TLS_VERIFY")
TEXTS = ("LOG_LEVEL", "LOG_FORMAT", "TINYQUEUE_RATE_LIMIT", "TINYQUEUE_NAMESPACE")
SECRETS = ("redis://:S3cr3tPw@h/0", "9f86d081884c7d659a2+S3cr3tPw/aa0c55ad015=", "hunter S3cr3tPw", "\nS3cr3tPw" * 20)


@pytest.mark.parametrize("name", NUMBERS + TEXTS)
@pytest.mark.parametrize("secret", SECRETS)
def test_read_settings_prints_no_secret_pasted_into_the_wrong_variable(name: str, secret: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.read({name: secret})
    assert "S3cr3tPw" not in str(caught.value)
    assert str(caught.value).startswith(f"{name} (value not shown; it may be a secret) is not valid: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TEXTS)
def test_read_settings_explains_a_malformed_text_without_its_regular_expression(name: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.read({name: "10 per hour"})
    assert "regex" not in str(caught.value)
    assert "\\Z" not in str(caught.value)


DOTENV = "PORT=1\r\nLOG_LEVEL=debug\r\nGREETING=Grüße\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_read_settings_reads_dotenv_as_editors_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    text = "\ufeff" + DOTENV if encoding == "utf-16-be" else DOTENV
    (tmp_path / ".env").write_bytes(text.encode(encoding))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {})
    read = Settings.read()
    assert (read.port, read.log_level, os.environ["GREETING"]) == (1, "debug", "Grüße")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (DOTENV.encode("latin-1"), ".env is not valid UTF-8 at line 3; save it as UTF-8"),
        (DOTENV.encode("utf-16-le"), ".env contains null characters, as UTF-16 without a mark does; save it as UTF-8"),
        (b"\xff\xfeP", ".env is not valid UTF-16 at line 1; save it as UTF-8"),
        (b"PORT=1\nX=a\0b\n", ".env contains null characters"),
    ],
)
def test_read_settings_refuses_dotenv_in_another_encoding_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, said: str
) -> None:
    (tmp_path / ".env").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {})
    with pytest.raises(SettingsError) as caught:
        Settings.read()
    assert str(caught.value).startswith(said)


def test_read_settings_ignores_a_virtual_environment_named_dotenv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Settings.read().port == Settings().port


def test_read_settings_accepts_a_platform_with_redis_url() -> None:
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


def test_open_queue_without_redis_url_makes_an_embedded_queue() -> None:
    queue = open_queue(Settings(namespace="mine", lease=7))
    job = queue.enqueue("echo", {})
    assert (queue.keys.job(job.id), queue.lease_ms) == ("{mine}:job:" + job.id, 7000)
    assert queue.get(job.id) == job


def test_open_queue_with_redis_url_connects_to_it(real: Server) -> None:
    job = real.queue().enqueue("echo", {})
    queue = open_queue(Settings(redis_url=real.url))
    assert queue.get(job.id) == job
    queue.pool.disconnect()


def test_make_queue_refuses_a_namespace_that_could_spell_another_key(server: Server) -> None:
    with pytest.raises(InvalidJob):
        server.queue(namespace="a}:b")


def test_queues_of_two_namespaces_share_nothing(server: Server, queue: Queue) -> None:
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
def test_enqueue_accepts_a_valid_name(queue: Queue, name: str) -> None:
    job = queue.enqueue(name, {}, queue=name)
    assert queue.get(job.id).queue == queue.get(job.id).type == name


@pytest.mark.parametrize("name", ["", "a b", "x" * 101, "ä", "a:b", "{a}", "a\n", "\ud800", 5, None, b"a"])
@pytest.mark.parametrize("field", ["type", "queue"])
def test_enqueue_refuses_an_invalid_name(queue: Queue, field: str, name: Any) -> None:
    if field == "queue" and name is None:
        name = ["default"]  # because None means the default
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
def test_enqueue_refuses_an_invalid_option(queue: Queue, field: str, options: dict[str, Any]) -> None:
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
def test_enqueue_refuses_a_payload_that_is_not_json(queue: Queue, payload: Any) -> None:
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


def test_enqueue_keeps_a_payload_of_the_maximum_depth(queue: Queue) -> None:
    assert queue.get(queue.enqueue("echo", nested(100)).id).payload == nested(100)


@pytest.mark.parametrize("form", ["milliseconds", "datetime", "text"])
def test_enqueue_accepts_run_at_in_three_forms(queue: Queue, form: str) -> None:
    at = (queue.now() // 1000 + 3600) * 1000
    moment = datetime.fromtimestamp(at / 1000, UTC)
    forms = {"milliseconds": at, "datetime": moment, "text": moment.isoformat()}
    assert queue.get(queue.enqueue("echo", {}, run_at=forms[form]).id).run_at == at


@pytest.mark.parametrize("options", [{"run_at": 5}, {"run_at": -5}, {"run_at": "1990-01-01T00:00:00Z"}, {"delay": 0}])
def test_enqueue_with_a_past_run_at_makes_the_job_due_now(queue: Queue, worker: str, options: dict[str, Any]) -> None:
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


def test_enqueue_many_accepts_a_thousand_jobs(queue: Queue) -> None:
    assert len(queue.enqueue_many("echo", range(1000))) == 1000
    assert queue.stats()["pending"] == queue.waiting(DEFAULT) == 1000
    queue.enqueue("echo", {})  # one more token for the bell, whose number check_consistency limits


def test_enqueue_many_refuses_more_than_a_thousand_jobs(queue: Queue) -> None:
    with pytest.raises(InvalidJob) as caught:
        queue.enqueue_many("echo", range(1001))
    assert caught.value.field == "jobs"
    assert dump(queue) == {}


def test_enqueue_many_of_no_payloads_does_nothing(queue: Queue) -> None:
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


def test_dequeue_from_empty_queues_returns_nothing(queue: Queue, worker: str) -> None:
    before = dump(queue)
    assert queue.dequeue(worker, ["default", "other"], 5) == []
    assert dump(queue) == before


def test_dequeue_starts_jobs_first_in_first_out(queue: Queue, worker: str) -> None:
    jobs = [queue.enqueue("echo", n) for n in range(5)]
    assert ids(queue.dequeue(worker, DEFAULT, 2) + queue.dequeue(worker, DEFAULT, 9)) == ids(jobs)


def test_dequeue_empties_the_first_queue_first(queue: Queue, worker: str) -> None:
    low = queue.enqueue_many("echo", [1, 2], queue="low")
    high = queue.enqueue_many("echo", [3, 4], queue="high")
    assert ids(queue.dequeue(worker, ["high", "low"], 3)) == ids([*high, low[0]])


def test_dequeue_drops_the_id_of_a_cancelled_job(queue: Queue, worker: str) -> None:
    cancelled, job = queue.enqueue_many("echo", [1, 2])
    queue.cancel(cancelled.id)
    assert ids(queue.dequeue(worker, DEFAULT, 2)) == [job.id]
    assert queue.adopt(worker, [job.id]) == []


def test_dequeue_starts_a_job_once_though_its_id_is_listed_twice(queue: Queue, worker: str) -> None:
    job = queue.enqueue("echo", {})
    raw(queue).lpush(queue.keys.jobs("default"), job.id)
    assert ids(queue.dequeue(worker, DEFAULT, 2)) == [job.id]
    assert raw(queue).lrange(queue.keys.proc(worker), 0, -1) == [job.id.encode()]


@pytest.mark.parametrize("same", [True, False], ids=["by-the-same-worker", "by-another"])
def test_dequeue_drops_the_id_of_a_running_job(queue: Queue, worker: str, same: bool) -> None:
    job = put(queue, "processing")
    raw(queue).lpush(queue.keys.jobs("default"), job.id)
    assert queue.dequeue(job.worker if same else worker, DEFAULT) == []
    assert raw(queue).lrange(queue.keys.proc(job.worker), 0, -1) == [job.id.encode()]


def test_dequeue_gives_each_job_to_one_of_several_workers(queue: Queue) -> None:
    jobs = queue.enqueue_many("echo", range(100))

    def drain(worker: str) -> list[str]:
        return [job.id for _ in range(100) for job in queue.dequeue(worker, DEFAULT, 3)]

    with ThreadPoolExecutor(4) as pool:
        shares = list(pool.map(drain, [queue.register(DEFAULT, 3) for _ in range(4)]))
    assert sorted(id for share in shares for id in share) == sorted(ids(jobs))


def test_dequeue_by_an_unregistered_worker_loses_no_job(queue: Queue, worker: str) -> None:
    job = queue.enqueue("echo", {})
    with pytest.raises(Reaped):
        queue.dequeue("nobody", DEFAULT)
    assert find_lost(queue) == ["nobody"]
    assert queue.reap("nobody") == 1
    assert ids(queue.dequeue(worker, DEFAULT)) == [job.id]


def test_wait_returns_when_a_job_is_enqueued(queue: Queue) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(queue.wait, ["other", "default"], 3.5)
        queue.enqueue("echo", {})
        assert waiting.result(10)


def test_wait_returns_when_time_is_up(queue: Queue) -> None:
    assert not queue.wait(DEFAULT, 0.01)


def test_wait_takes_no_job(queue: Queue, worker: str) -> None:
    job = queue.enqueue("echo", {})
    assert queue.wait(DEFAULT)
    assert not queue.wait(DEFAULT, 0.01)
    assert ids(queue.dequeue(worker, DEFAULT)) == [job.id]


def test_waiting_counts_the_entries_of_the_named_queues(queue: Queue) -> None:
    queue.enqueue_many("echo", [1, 2])
    queue.enqueue("echo", 3, queue="other")
    assert (queue.waiting(["default", "other"]), queue.waiting(["other", "none"])) == (3, 1)


def test_adopt_returns_ids_whose_take_lost_its_reply(queue: Queue, worker: str) -> None:
    job = put(queue, "processing")
    forgotten = queue.enqueue("echo", {})
    taken = queue.take(job.worker, DEFAULT, 5)
    assert queue.adopt(job.worker, [job.id]) == taken == [forgotten.id.encode()]
    assert ids(queue.start(job.worker, taken, {job.id: job})) == [forgotten.id]


def test_start_that_lost_its_reply_twice_over_a_retry_returns_the_job(near: Queue, far: Queue, proxy: CutProxy) -> None:
    """The reply of settle is lost, and that of the start which follows a retry of the failed job."""
    job = put(near, "processing")
    proxy.drop_reply(b"EXEC", lambda: proxy.drop_request(b"WATCH"))
    with unavailable("unreachable", doubtful=True):
        far.settle(job.worker, [Outcome(job, "fail", error=BOOM)])
    near.retry(job.id)
    taken = near.take(job.worker, DEFAULT, 1)
    proxy.drop_reply(b"EXEC")
    [again] = far.start(job.worker, taken, {job.id: job})
    assert (again.status, again.attempts) == ("processing", 1)
    lapse(near, job.worker)
    assert near.reap(job.worker) == 1


def test_start_after_a_lost_reply_leaves_a_dropped_job_that_became_due(
    near: Queue, far: Queue, proxy: CutProxy
) -> None:
    """Started now, it would be in no list of a worker, and nobody would find it if the worker died."""
    worker = near.register(DEFAULT, 1)
    job = put(near, "delayed")
    raw(near).rpush(near.keys.jobs("default"), job.id)
    taken = near.take(worker, DEFAULT, 1)

    def later() -> None:
        near.clock.ahead += 61_000
        far.clock.ahead += 61_000

    proxy.drop_reply(b"EXEC", later)
    assert [(left.id, left.status) for left in far.start(worker, taken)] == [(job.id, "pending")]
    assert near.promote() == 1
    [started] = near.dequeue(worker, DEFAULT)
    assert started.id == job.id
    near.complete(started)


def test_start_after_a_lost_reply_drops_no_second_entry_of_a_running_job(
    near: Queue, far: Queue, proxy: CutProxy
) -> None:
    """The second LREM would remove the running job's own entry, and nobody would find it if the worker died."""
    worker = near.register(DEFAULT, 1)
    job = put(near, "pending")
    raw(near).lpush(near.keys.jobs("default"), job.id)
    [running] = near.dequeue(worker, DEFAULT)
    taken = near.take(worker, DEFAULT, 1)
    proxy.drop_reply(b"EXEC")
    assert far.start(worker, taken, {job.id: running}) == []
    lapse(near, worker)
    assert near.reap(worker) == 1


def test_adopt_returns_jobs_whose_start_lost_its_reply(queue: Queue) -> None:
    job = put(queue, "processing")
    assert queue.start(job.worker, queue.adopt(job.worker, []), {}) == [job]


# Settle ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [None, 0, "", "text", [1, {"a": None}], {"sent": True}])
def test_complete_stores_the_result(queue: Queue, result: Any) -> None:
    job = put(queue, "processing")
    before = queue.now()
    queue.complete(job, result)
    stored = queue.get(job.id)
    assert (stored.status, stored.result, stored.attempts, stored.worker) == ("completed", result, 1, job.worker)
    assert before <= stored.ended_at == stored.updated_at <= queue.now()
    assert stored.answer()["result"] == result


def test_complete_removes_the_error_of_an_earlier_attempt(queue: Queue, worker: str) -> None:
    queue.fail(put(queue, "processing"), BOOM, 0)
    queue.clock.ahead += 1
    queue.promote()
    [job] = queue.dequeue(worker, DEFAULT)
    assert (job.attempts, job.error) == (2, BOOM)
    queue.complete(job)
    assert queue.get(job.id).error is None


def test_complete_a_second_time_raises_reaped(queue: Queue) -> None:
    job = put(queue, "processing")
    queue.complete(job)
    before = dump(queue)
    with pytest.raises(Reaped):
        queue.complete(job)
    assert dump(queue) == before


def test_fail_delays_the_next_attempt_by_the_backoff(queue: Queue, worker: str) -> None:
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
def test_fail_without_another_attempt_ends_the_job(queue: Queue, most: int, after: float | None) -> None:
    job = put(queue, "processing", max_attempts=most)
    queue.fail(job, BOOM, after)
    stored = queue.get(job.id)
    assert (stored.status, stored.error, stored.attempts, stored.run_at) == ("failed", BOOM, 1, 0)
    assert stored.ended_at >= job.started_at


def test_fail_shortens_message_and_traceback(queue: Queue) -> None:
    job = put(queue, "processing")
    queue.fail(job, Failure.of(ValueError("m" * 999 + "xy"), "ab" + "t" * 3999), None)
    assert queue.get(job.id).error == Failure("ValueError", "m" * 999 + "x", "b" + "t" * 3999)


def test_fail_shortens_the_name_of_an_exception(queue: Queue) -> None:
    job = put(queue, "processing")
    queue.fail(job, Failure.of(type("N" * 100_000, (Exception,), {})()), None)
    assert queue.get(job.id).error == Failure("N" * 100, "")


class Mute(Exception):
    def __str__(self) -> str:
        raise KeyError("inner")


@pytest.mark.parametrize(
    ("error", "message"), [(ValueError("a\ud800"), "a\\ud800"), (Mute(), "(its text raised KeyError)")]
)
def test_fail_stores_an_error_whose_text_is_not_json_or_raises(queue: Queue, error: Exception, message: str) -> None:
    queue.fail(job := put(queue, "processing"), Failure.of(error))
    assert queue.get(job.id).error == Failure(type(error).__name__, message)


@given(st.integers(1, 6) | st.integers(1, 200), st.floats(0.001, 100), st.floats(100, 10_000))
@settings(derandomize=True, database=None)
def test_backoff_doubles_with_jitter_up_to_the_cap(attempts: int, base: float, cap: float) -> None:
    plain = base * 2.0 ** (attempts - 1)
    longest = min(cap, plain * 1.5)
    waits = [backoff(attempts, base, cap) for _ in range(20)]
    assert max(base, longest / 1.5) <= min(waits) * 1.000001
    assert max(waits) <= longest
    assert len(set(waits)) > 1 or base == cap


def test_backoff_spreads_the_waits_at_the_cap() -> None:
    waits = [backoff(20, 1.0, 300.0) for _ in range(1000)]
    assert max(waits) - min(waits) > 80


def test_release_refunds_the_attempt(queue: Queue, worker: str) -> None:
    queue.release(job := put(queue, "processing"))
    stored = queue.get(job.id)
    assert (stored.status, stored.attempts, stored.refunds, stored.worker, stored.error) == ("pending", 0, 1, "", None)
    assert queue.dequeue(worker, DEFAULT)[0].attempts == 1


def test_release_requeues_the_job_at_the_head(queue: Queue, worker: str) -> None:
    job = put(queue, "processing")
    later = queue.enqueue("echo", {})
    queue.release(job)
    assert ids(queue.dequeue(worker, DEFAULT, 2)) == [job.id, later.id]


def test_release_of_several_keeps_their_order(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("echo", [1, 2, 3])
    queue.settle(worker, [Outcome(job, "release") for job in queue.dequeue(worker, DEFAULT, 3)])
    assert ids(queue.dequeue(worker, DEFAULT, 3)) == ids(jobs)


def test_release_refunds_an_attempt_up_to_ten_times(queue: Queue, worker: str) -> None:
    queue.release(job := put(queue, "processing", max_attempts=2))
    for _ in range(9):
        queue.release(queue.dequeue(worker, DEFAULT)[0])
    assert (queue.get(job.id).attempts, queue.get(job.id).refunds) == (0, 10)
    queue.release(queue.dequeue(worker, DEFAULT)[0])
    assert (queue.get(job.id).status, queue.get(job.id).attempts) == ("pending", 1)
    queue.release(queue.dequeue(worker, DEFAULT)[0])
    stored = queue.get(job.id)
    assert (stored.status, stored.error) == ("failed", Failure("WorkerLost", "released too often (attempt 2/2)"))


def test_settle_writes_different_outcomes_in_one_batch(queue: Queue, worker: str) -> None:
    queue.enqueue_many("echo", range(4))
    a, b, c, d = queue.dequeue(worker, DEFAULT, 4)
    batch = [Outcome(a, "complete", 7), Outcome(b, "fail", error=BOOM), Outcome(c, "fail", error=BOOM, after=5)]
    queue.settle(worker, [*batch, Outcome(d, "release")])
    assert [queue.get(job.id).status for job in (a, b, c, d)] == ["completed", "failed", "pending", "pending"]
    assert queue.adopt(worker, []) == []
    stats = queue.stats()
    counts = stats["queues"]["default"]
    assert (counts["pending"], counts["processing"]) == (2, 0)
    assert stats["total"] == {"completed": 1, "failed": 1, "cancelled": 0}


def test_settle_without_outcomes_does_nothing(queue: Queue, worker: str) -> None:
    before = dump(queue)
    queue.settle(worker, [])
    assert dump(queue) == before


def test_set_progress_is_stored_while_running_and_with_the_outcome(queue: Queue) -> None:
    job = put(queue, "processing")
    job.set_progress(1, of=3)
    assert queue.get(job.id).progress == 0.3333
    job.set_progress(2)
    queue.complete(job)
    assert queue.get(job.id).progress == 1.0


def test_set_progress_of_a_settled_job_raises_reaped(queue: Queue) -> None:
    job = put(queue, "processing")
    queue.release(job)
    before = dump(queue)
    with pytest.raises(Reaped):
        job.set_progress(0.5)
    assert dump(queue) == before


def test_start_resets_the_progress(queue: Queue, worker: str) -> None:
    job = put(queue, "processing")
    job.set_progress(0.5)
    queue.release(job)
    assert queue.dequeue(worker, DEFAULT)[0].progress == 0


# Exchange -------------------------------------------------------------------------------------------------------------


def exchange(queue: Queue, *outcomes: Outcome, most: int = 1, names: list[str] = DEFAULT) -> Any:
    """Exchange outcomes of one worker, which holds no other jobs, for up to `most` jobs."""
    held = {outcome.job.id: outcome.job for outcome in outcomes}
    return queue.exchange(outcomes[0].job.worker, outcomes, names, most, held)


def done(job: Job) -> Outcome:
    return Outcome(job, "complete", 7)


def test_exchange_writes_the_outcomes_and_starts_jobs(queue: Queue) -> None:
    job = put(queue, "processing")
    first, second = queue.enqueue_many("echo", [{"a": 1}, 2])
    before = queue.now()
    lost, [started] = exchange(queue, done(job))
    assert lost == []
    assert (queue.get(job.id).status, queue.get(job.id).result) == ("completed", 7)
    assert (started.id, started.payload) == (first.id, {"a": 1})
    assert (started.status, started.attempts, started.worker) == ("processing", 1, job.worker)
    assert before <= started.started_at <= queue.now()
    assert queue.get(first.id) == started
    assert queue.get(second.id).status == "pending"
    assert queue.adopt(job.worker, []) == [first.id.encode()]
    counts = queue.stats()["queues"]["default"]
    assert (counts["pending"], counts["processing"]) == (1, 1)


@pytest.mark.parametrize(("waiting", "most", "count"), [(0, 3, 0), (2, 3, 2), (3, 3, 3), (5, 3, 3), (5, 0, 0)])
def test_exchange_starts_up_to_that_many_jobs_in_their_order(queue: Queue, waiting: int, most: int, count: int) -> None:
    job = put(queue, "processing")
    jobs = queue.enqueue_many("echo", range(waiting)) if waiting else []
    lost, started = exchange(queue, done(job), most=most)
    assert (lost, ids(started)) == ([], ids(jobs[:count]))
    assert queue.get(job.id).status == "completed"
    assert queue.waiting(DEFAULT) == waiting - count
    assert len(queue.adopt(job.worker, [])) == count


def test_exchange_writes_different_outcomes_in_one_batch(queue: Queue, worker: str) -> None:
    queue.enqueue_many("echo", range(4))
    a, b, c, d = queue.dequeue(worker, DEFAULT, 4)
    waiting = queue.enqueue_many("echo", range(3))
    batch = [done(a), Outcome(b, "fail", error=BOOM), Outcome(c, "fail", error=BOOM, after=5), Outcome(d, "release")]
    lost, started = exchange(queue, *batch, most=4)
    assert (lost, ids(started)) == ([], ids(waiting))  # the job that is released is not taken again
    assert [queue.get(job.id).status for job in (a, b, c, d)] == ["completed", "failed", "pending", "pending"]
    counts = queue.stats()["queues"]["default"]
    assert (counts["pending"], counts["processing"]) == (2, 3)
    assert queue.stats()["total"] == {"completed": 1, "failed": 1, "cancelled": 0}


def test_exchange_without_outcomes_starts_jobs(queue: Queue, worker: str) -> None:
    job = queue.enqueue("echo", 1)
    lost, started = queue.exchange(worker, [], DEFAULT, 1, {})
    assert (lost, ids(started)) == ([], [job.id])


def test_exchange_without_outcomes_for_no_jobs_does_nothing(queue: Queue, worker: str) -> None:
    queue.enqueue("echo", 1)
    before = dump(queue)
    assert queue.exchange(worker, [], DEFAULT, 0, {}) == ([], [])
    assert dump(queue) == before


def test_exchange_of_started_jobs_goes_on_until_the_queue_is_empty(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("echo", range(7))
    ran = running = queue.dequeue(worker, DEFAULT, 2)
    while running:
        lost, running = exchange(queue, *map(done, running), most=2)
        assert lost == []
        ran = ran + running
    assert ids(ran) == ids(jobs)
    assert queue.stats()["total"]["completed"] == 7
    queue.deregister(worker)


def test_exchange_lets_the_handler_of_a_started_job_write_progress(queue: Queue) -> None:
    job = put(queue, "processing")
    queue.enqueue("echo", 1)
    _, [started] = exchange(queue, done(job))
    started.set_progress(0.5)
    assert queue.get(started.id).progress == 0.5


@pytest.mark.parametrize(
    ("most", "taken"), [(1, ["a0"]), (2, ["a0", "a1"]), (3, ["a0", "a1", "c0"]), (9, ["a0", "a1", "c0", "c1", "d0"])]
)
def test_exchange_empties_the_first_queue_first(queue: Queue, worker: str, most: int, taken: list[str]) -> None:
    queue.enqueue("echo", "running")
    [job] = queue.dequeue(worker, DEFAULT)
    for name in ("d0", "c0", "c1", "a0", "a1", "x0"):
        queue.enqueue("echo", name, queue=name[0])
    _, started = exchange(queue, done(job), most=most, names=["a", "b", "c", "d"])
    assert [job.payload for job in started] == taken
    assert queue.waiting(["a", "b", "c", "d", "x"]) == 6 - len(taken)


def test_exchange_leaves_out_paused_queues(queue: Queue, worker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyqueue_reading, "PAUSE_AGE", -1.0)  # a pause takes effect at once
    job = put(queue, "processing")
    paused = queue.enqueue("echo", 1)
    other = queue.enqueue("echo", 2, queue="other")
    queue.pause("default")
    _, [started] = exchange(queue, done(job), most=2, names=["default", "other"])
    assert started.id == other.id
    assert exchange(queue, done(started), most=2) == ([], [])
    queue.resume("default")
    assert ids(queue.dequeue(worker, DEFAULT)) == [paused.id]


def test_exchange_reads_which_queues_are_paused(server: Server, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a worker that does nothing else would read it in a round trip of its own."""
    monkeypatch.setattr(tinyqueue_reading, "PAUSE_AGE", 3600.0)
    job = put(queue, "processing")
    queue.enqueue_many("echo", range(3))
    server.queue().pause("default")
    _, [started] = exchange(queue, done(job))
    assert exchange(queue, done(started)) == ([], [])
    assert queue.waiting(DEFAULT) == 0  # as it knows that the queue is paused


@pytest.mark.parametrize("awaited", [True, False])
def test_exchange_leaves_a_token_for_those_who_wait(queue: Queue, awaited: bool) -> None:
    job = put(queue, "processing")
    if awaited:
        assert queue.await_ends([job.id]) == set()
    queue.enqueue("echo", 1)
    exchange(queue, done(job))
    assert raw(queue).llen(queue.keys.done(job.id)) == awaited
    assert not raw(queue).exists(queue.keys.awaited)


def test_exchange_frees_the_unique_key_of_an_ended_job(queue: Queue) -> None:
    job = put(queue, "processing", unique_key="k")
    queue.enqueue("echo", 1)
    exchange(queue, done(job))
    assert queue.enqueue("echo", 2, unique_key="k").id != job.id


def test_exchange_requeues_released_jobs_in_their_order(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("echo", range(5))
    running = queue.dequeue(worker, DEFAULT, 3)
    _, [started] = exchange(queue, *(Outcome(job, "release") for job in running))
    assert started.id == jobs[3].id
    assert ids(queue.dequeue(worker, DEFAULT, 9)) == ids([*jobs[:3], jobs[4]])
    assert queue.get(jobs[0].id).attempts == 1


def test_exchange_cancels_a_failed_job_whose_stop_was_requested(queue: Queue) -> None:
    job = put(queue, "processing")
    queue.cancel(job.id)
    exchange(queue, Outcome(job, "fail", error=BOOM, after=5))
    assert queue.get(job.id).status == "cancelled"


def test_exchange_returns_the_outcome_of_a_lost_job(queue: Queue, worker: str) -> None:
    queue.enqueue_many("echo", range(2))
    kept, lost = queue.dequeue(worker, DEFAULT, 2)
    queue.release(lost)
    [other] = queue.dequeue(queue.register(DEFAULT, 1), DEFAULT)
    waiting = queue.enqueue("echo", 3)
    outcomes = [done(lost), done(kept)]
    left, started = exchange(queue, *outcomes)
    assert (left, ids(started)) == ([outcomes[0]], [waiting.id])
    assert queue.get(kept.id).status == "completed"
    assert queue.get(lost.id) == other


def test_exchange_a_second_time_returns_the_outcome_and_starts_a_job(queue: Queue) -> None:
    job = put(queue, "processing")
    waiting = queue.enqueue_many("echo", range(2))
    exchange(queue, done(job))
    left, started = exchange(queue, done(job))
    assert (left, ids(started)) == ([done(job)], [waiting[1].id])
    assert queue.stats()["total"]["completed"] == 1


def test_exchange_drops_the_id_of_a_cancelled_job(queue: Queue) -> None:
    job = put(queue, "processing")
    cancelled, waiting = queue.enqueue_many("echo", [1, 2])
    queue.cancel(cancelled.id)
    assert ids(exchange(queue, done(job), most=2)[1]) == [waiting.id]
    assert queue.adopt(job.worker, [waiting.id]) == []


def test_exchange_fails_an_expired_job(queue: Queue) -> None:
    job = put(queue, "processing")
    expired = queue.enqueue("echo", 1, expires_in=5)
    waiting = queue.enqueue("echo", 2)
    queue.clock.ahead += 6000
    assert ids(exchange(queue, done(job), most=2)[1]) == [waiting.id]
    assert (queue.get(expired.id).status, queue.get(expired.id).error.type) == ("failed", "Expired")
    assert queue.adopt(job.worker, [waiting.id]) == []


def test_exchange_delays_a_job_that_is_not_due(queue: Queue) -> None:
    job = put(queue, "processing")
    later = queue.enqueue("echo", 1, delay=60)
    raw(queue).lpush(queue.keys.jobs("default"), later.id)
    assert exchange(queue, done(job)) == ([], [])
    assert (queue.get(later.id), queue.stats()["delayed"]) == (later, 1)
    assert queue.adopt(job.worker, []) == []


def test_exchange_starts_a_job_once_though_its_id_is_listed_twice(queue: Queue) -> None:
    job = put(queue, "processing")
    twice = queue.enqueue("echo", 1)
    raw(queue).lpush(queue.keys.jobs("default"), twice.id)
    assert ids(exchange(queue, done(job), most=2)[1]) == [twice.id]
    assert queue.adopt(job.worker, []) == [twice.id.encode()]


@pytest.mark.parametrize("verb", ["complete", "fail", "release"])
def test_exchange_drops_a_second_entry_of_the_job_that_it_settles(queue: Queue, verb: Any) -> None:
    job = put(queue, "processing")
    raw(queue).lpush(queue.keys.jobs("default"), job.id)
    waiting = queue.enqueue("echo", 1)
    lost, started = exchange(queue, Outcome(job, verb, error=BOOM), most=2)
    assert (lost, ids(started)) == ([], [waiting.id])
    assert queue.adopt(job.worker, [waiting.id]) == []
    assert queue.waiting(DEFAULT) == (verb == "release")


def test_exchange_drops_the_id_of_a_job_that_still_runs(queue: Queue, worker: str) -> None:
    queue.enqueue_many("echo", range(2))
    ended, running = queue.dequeue(worker, DEFAULT, 2)
    raw(queue).lpush(queue.keys.jobs("default"), running.id)
    held = {job.id: job for job in (ended, running)}
    assert queue.exchange(worker, [done(ended)], DEFAULT, 1, held) == ([], [])
    assert queue.adopt(worker, []) == [running.id.encode()]


@pytest.mark.parametrize("most", [1, 3])
def test_exchange_leaves_a_suspect_pending(queue: Queue, worker: str, most: int) -> None:
    suspects = queue.enqueue_many("echo", range(2), max_attempts=1)
    lose(queue, 2)
    lose(queue, 2)
    job = put(queue, "processing", queue="other")
    waiting = queue.enqueue("echo", {})
    _, found = exchange(queue, done(job), most=most)
    expected = [(suspects[0].id, "pending"), (suspects[1].id, "pending"), (waiting.id, "processing")]
    assert [(job.id, job.status) for job in found] == expected[:most]
    assert queue.get(suspects[0].id).attempts == 0
    taken = queue.adopt(job.worker, [waiting.id] if most == 3 else [])
    assert suspects[0].id.encode() in taken
    if most == 1:
        [alone] = queue.start(job.worker, taken, {})
        assert (alone.id, alone.status) == (suspects[0].id, "processing")


# The fence ------------------------------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[Queue, Job], object]] = {
    "complete": lambda queue, job: queue.complete(job),
    "fail": lambda queue, job: queue.fail(job, BOOM),
    "fail-later": lambda queue, job: queue.fail(job, BOOM, 5),
    "release": lambda queue, job: queue.release(job),
    "settle-none": lambda queue, job: queue.settle(job.worker, []),
    "settle-again": lambda queue, job: queue.settle(job.worker, [Outcome(job, "complete")], again=True),
    "exchange": lambda queue, job: exchange(queue, done(job), most=0),
    "start": lambda queue, job: queue.start(job.worker, [job.id.encode()]),
    "progress": lambda queue, job: job.set_progress(1),
    "heartbeat": lambda queue, job: queue.heartbeat(job.worker, [job.id]),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("given_to", ["nobody", "another"])
def test_write_by_a_reaped_worker_raises_reaped_and_changes_nothing(
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


def test_exchange_by_a_reaped_worker_raises_reaped_and_loses_no_job(queue: Queue, worker: str) -> None:
    job = put(queue, "processing")
    waiting = queue.enqueue("echo", 1)
    lapse(queue, job.worker)
    queue.reap(job.worker)
    with pytest.raises(Reaped):
        exchange(queue, done(job), most=2)
    assert queue.get(job.id).status == "pending"
    assert find_lost(queue) == [job.worker]
    assert queue.reap(job.worker) == 2
    assert ids(queue.dequeue(worker, DEFAULT, 3)) == [job.id, waiting.id]


def test_heartbeat_renews_the_lease_and_reports_the_running_jobs(queue: Queue, worker: str) -> None:
    raw(queue).pexpire(queue.keys.lease(worker), 5000)
    queue.heartbeat(worker, ["a", "b"])
    assert 5000 < raw(queue).pttl(queue.keys.lease(worker)) <= queue.lease_ms
    [about] = queue.workers()
    assert (about["jobs"], about["alive"]) == (["a", "b"], True)


def test_heartbeat_after_the_lease_but_before_the_reaper_saves_the_worker(queue: Queue) -> None:
    job = put(queue, "processing")
    lapse(queue, job.worker)
    queue.heartbeat(job.worker)
    assert find_lost(queue) == []
    assert queue.reap(job.worker) == 0
    queue.complete(job)


# Cancel and retry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["", "nonsense", "*", "01890000-0000-7000-8000-000000000000", "default\n"])
def test_cancel_retry_and_get_of_an_unknown_id_return_none(queue: Queue, id: str) -> None:
    assert (queue.cancel(id), queue.retry(id), queue.get(id)) == (None, None, None)


def test_cancel_returns_the_stored_job(queue: Queue) -> None:
    job = put(queue, "delayed")
    cancelled = queue.cancel(job.id)
    assert cancelled == queue.get(job.id)
    assert cancelled.ended_at >= job.created_at
    assert queue.stats()["delayed"] == 0


def test_cancel_of_a_taken_job_prevents_its_start(queue: Queue, worker: str) -> None:
    job = put(queue, "pending")
    taken = queue.take(worker, DEFAULT, 1)
    queue.cancel(job.id)
    assert queue.start(worker, taken) == []


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_retry_resets_the_attempts_and_requeues_at_the_end(queue: Queue, worker: str, status: str) -> None:
    job = put(queue, status, max_attempts=1)
    other = queue.enqueue("echo", {})
    assert queue.retry(job.id) == queue.get(job.id)
    started = {job.id: job for job in queue.dequeue(worker, DEFAULT, 5)}
    assert started[job.id].attempts == 1
    if status == "failed":  # the id of a cancelled job may still be in its old place
        assert list(started) == [other.id, job.id]


@pytest.mark.parametrize(("verb", "status", "total"), [("cancel", "pending", 0), ("retry", "failed", 1)])
def test_cancel_or_retry_by_several_at_once_succeeds_for_one(queue: Queue, verb: str, status: str, total: int) -> None:
    job = put(queue, status)
    barrier = threading.Barrier(4)

    def change(_: int) -> bool:
        barrier.wait()
        try:
            return bool(getattr(queue, verb)(job.id))
        except WrongStatus:
            return False

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(change, range(4))) == [False, False, False, True]
    assert queue.stats()["pending"] == total


# Promote --------------------------------------------------------------------------------------------------------------


def test_promote_moves_jobs_whose_run_at_has_come(queue: Queue, worker: str) -> None:
    job = queue.enqueue("echo", {}, delay=60)
    assert (queue.promote(), queue.stats()["delayed"]) == (0, 1)
    queue.clock.ahead += 60_000
    assert (queue.promote(), queue.stats()["delayed"]) == (1, 0)
    assert queue.wait(DEFAULT, 0.01)
    assert ids(queue.dequeue(worker, DEFAULT)) == [job.id]


def test_promote_keeps_the_order_of_run_at(queue: Queue, worker: str) -> None:
    late = queue.enqueue("echo", {}, delay=20)
    early = queue.enqueue("echo", {}, delay=10)
    queue.clock.ahead += 30_000
    queue.promote()
    assert ids(queue.dequeue(worker, DEFAULT, 2)) == [early.id, late.id]


def test_promote_moves_up_to_its_limit(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyqueue, "PROMOTED", 2)
    queue.enqueue_many("echo", range(3), delay=1)
    queue.clock.ahead += 1000
    assert [queue.promote(), queue.promote(), queue.promote()] == [2, 1, 0]


def test_promote_does_nothing_while_another_promotes(queue: Queue) -> None:
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
    assert queue.start(worker, queue.take(worker, DEFAULT, 1), {job.id: started}) == []
    queue.complete(started)


def test_promote_drops_ids_whose_job_is_not_pending(queue: Queue) -> None:
    done = put(queue, "completed")
    raw(queue).zadd(queue.keys.delayed, {done.id: 1, "01890000-0000-7000-8000-000000000000": 2})
    assert queue.promote() == 2
    assert queue.waiting(DEFAULT) == queue.stats()["delayed"] == 0


def test_promote_after_the_clock_was_set_back_waits_for_the_old_time(queue: Queue) -> None:
    job = queue.enqueue("echo", 1, delay=60)
    queue.clock.ahead -= 3_600_000
    queue.clock.ahead += 61_000
    assert queue.promote() == 0
    queue.cancel(job.id)
    queue.retry(job.id)
    worker = queue.register(["default"], 1)
    assert [started.id for started in queue.dequeue(worker, ["default"])] == [job.id]


def test_dequeue_delays_a_job_that_is_not_due_again(queue: Queue, worker: str) -> None:
    job = queue.enqueue("echo", {}, delay=60)
    raw(queue).zrem(queue.keys.delayed, job.id)
    raw(queue).lpush(queue.keys.jobs("default"), job.id)
    assert queue.dequeue(worker, DEFAULT) == []
    assert raw(queue).zscore(queue.keys.delayed, job.id) == job.run_at


# Reap -----------------------------------------------------------------------------------------------------------------


def test_reap_of_a_live_worker_does_nothing(queue: Queue) -> None:
    job = put(queue, "processing")
    assert find_lost(queue) == []
    assert queue.reap(job.worker) == 0
    queue.complete(job)


def test_lost_workers_are_those_whose_lease_did_not_change_for_a_lease(queue: Queue) -> None:
    worker = queue.register(DEFAULT, 1)
    assert queue.lost_workers(now=0.0) == []
    assert queue.lost_workers(now=queue.lease - 1) == []
    queue.heartbeat(worker)
    assert queue.lost_workers(now=queue.lease) == []
    assert queue.lost_workers(now=2 * queue.lease - 1) == []
    assert queue.lost_workers(now=2 * queue.lease) == [worker]


def test_lost_workers_are_those_whose_lease_expired_and_was_not_renewed(queue: Queue) -> None:
    """The time since the last heartbeat counts, although the lease expires meanwhile."""
    worker = queue.register(DEFAULT, 1)
    queue.lost_workers(now=0.0)
    lapse(queue, worker)
    assert queue.lost_workers(now=queue.lease - 1) == []
    assert queue.lost_workers(now=queue.lease) == [worker]


def test_lost_workers_are_not_those_whose_lease_expired_because_the_clock_was_set(queue: Queue) -> None:
    """The wall clock of Redis steps ahead: the lease is gone, but the worker renews it within its time."""
    worker = queue.register(DEFAULT, 1)
    queue.lost_workers(now=0.0)
    lapse(queue, worker)
    assert queue.lost_workers(now=1.0) == []
    queue.heartbeat(worker)
    assert queue.lost_workers(now=queue.lease) == []


def test_reap_removes_a_worker_whose_lease_does_not_expire_because_the_clock_was_set_back(queue: Queue) -> None:
    job = put(queue, "processing")
    raw(queue).persist(queue.keys.lease(job.worker))
    queue.lost_workers(now=0.0)
    assert queue.reap(job.worker) == 0
    assert queue.lost_workers(now=queue.lease) == [job.worker]
    assert queue.reap(job.worker) == 1


def test_heartbeat_lists_the_worker_again_when_the_set_of_workers_was_deleted(queue: Queue) -> None:
    job = put(queue, "processing")
    raw(queue).delete(queue.keys.workers)
    queue.heartbeat(job.worker, [job.id])
    lapse(queue, job.worker)
    assert find_lost(queue) == [job.worker]
    assert queue.reap(job.worker) == 1


def test_reap_requeues_the_job_and_spends_the_attempt(queue: Queue, worker: str) -> None:
    job = put(queue, "processing")
    later = queue.enqueue("echo", {})
    lapse(queue, job.worker)
    assert find_lost(queue) == [job.worker]
    assert queue.reap(job.worker) == 1
    stored = queue.get(job.id)
    assert (stored.status, stored.attempts, stored.worker) == ("pending", 1, "")
    assert stored.error == Failure("WorkerLost", "worker lost (attempt 1/3)")
    assert [about["id"] for about in queue.workers()] == [worker]
    assert [(job.id, job.attempts) for job in queue.dequeue(worker, DEFAULT, 2)] == [(job.id, 2), (later.id, 1)]


def test_reap_requeues_several_jobs_in_their_order(queue: Queue, worker: str) -> None:
    jobs = queue.enqueue_many("echo", range(3))
    lost = queue.register(DEFAULT, 3)
    queue.dequeue(lost, DEFAULT, 3)
    lapse(queue, lost)
    assert queue.reap(lost) == 3
    assert ids(queue.dequeue(worker, DEFAULT, 3)) == ids(jobs)


def lose(queue: Queue, most: int) -> list[Job]:
    """Start up to that many jobs on one worker, and let the worker be lost."""
    worker = queue.register(DEFAULT, most)
    jobs = queue.dequeue(worker, DEFAULT, most)
    lapse(queue, worker)
    assert queue.reap(worker) >= len(jobs)
    return jobs


def test_reap_does_not_count_the_attempts_of_jobs_that_ran_beside_others(queue: Queue) -> None:
    jobs = queue.enqueue_many("echo", range(3), max_attempts=1)
    assert ids(lose(queue, 3)) == ids(jobs)
    for job in jobs:
        stored = queue.get(job.id)
        assert (stored.status, stored.attempts, stored.suspicions) == ("pending", 0, 1)
        assert stored.error == Failure(
            "WorkerLost", "worker lost while it ran other jobs too (attempt 1/1, not counted)"
        )


def test_reap_counts_the_attempt_of_a_job_that_ran_beside_jobs_only_taken(queue: Queue) -> None:
    job, taken = queue.enqueue_many("echo", range(2))
    worker = queue.register(DEFAULT, 2)
    queue.dequeue(worker, DEFAULT)
    queue.take(worker, DEFAULT, 1)
    lapse(queue, worker)
    assert queue.reap(worker) == 2
    assert (queue.get(job.id).attempts, queue.get(job.id).suspicions) == (1, 0)
    assert (queue.get(taken.id).attempts, queue.get(taken.id).suspicions) == (0, 0)


def test_start_leaves_a_suspect_pending_beside_other_jobs(queue: Queue, worker: str) -> None:
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
    assert (alone.status, alone.attempts, is_suspect(alone)) == ("processing", 1, True)
    queue.complete(alone)
    assert queue.deregister(worker) is None
    assert queue.get(suspects[1].id).status == "pending"


def test_reap_fails_a_suspect_lost_alone_in_its_last_attempt(queue: Queue) -> None:
    pill, other = queue.enqueue_many("echo", range(2), max_attempts=1)
    lose(queue, 2)
    lose(queue, 2)
    assert ids(lose(queue, 1)) == [pill.id]
    assert queue.get(pill.id).error == Failure("WorkerLost", "worker lost (attempt 1/1)")
    assert queue.get(other.id).status == "pending"


def test_retry_of_a_suspect_keeps_it_a_suspect(queue: Queue) -> None:
    pill, _ = queue.enqueue_many("echo", range(2), max_attempts=1)
    lose(queue, 2)
    lose(queue, 2)
    lose(queue, 1)
    assert is_suspect(queue.retry(pill.id))


def test_reap_fails_a_job_whose_attempts_are_used_up(queue: Queue) -> None:
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


def test_reap_requeues_a_job_that_was_taken_but_not_started(queue: Queue, worker: str) -> None:
    job = put(queue, "pending")
    lost = queue.register(DEFAULT, 1)
    queue.take(lost, DEFAULT, 1)
    assert queue.get(job.id).status == "pending"
    lapse(queue, lost)
    assert queue.reap(lost) == 1
    assert queue.dequeue(worker, DEFAULT)[0].attempts == 1


def test_reap_twice_requeues_a_job_once(queue: Queue) -> None:
    job = put(queue, "processing")
    lapse(queue, job.worker)
    assert (queue.reap(job.worker), queue.reap(job.worker)) == (1, 0)
    assert queue.waiting(DEFAULT) == 1


def test_reap_ignores_a_job_that_runs_on_another_worker(queue: Queue, worker: str) -> None:
    job = put(queue, "processing")
    lapse(queue, job.worker)
    queue.reap(job.worker)
    [again] = queue.dequeue(worker, DEFAULT)
    raw(queue).lpush(queue.keys.proc(job.worker), job.id)
    raw(queue).sadd(queue.keys.workers, job.worker)
    assert queue.reap(job.worker) == 0
    assert queue.get(job.id) == again
    queue.complete(again)


def test_reap_again_requeues_what_a_reaped_worker_took(queue: Queue, worker: str) -> None:
    reaped = queue.register(DEFAULT, 1)
    lapse(queue, reaped)
    assert queue.reap(reaped) == 0
    job = queue.enqueue("echo", {})
    with pytest.raises(Reaped):
        queue.dequeue(reaped, DEFAULT)
    assert find_lost(queue) == [reaped]
    assert queue.reap(reaped) == 1
    assert [(job.id, job.attempts) for job in queue.dequeue(worker, DEFAULT)] == [(job.id, 1)]


def test_deregister_of_an_idle_worker_removes_all_its_keys(queue: Queue, worker: str) -> None:
    queue.deregister(worker)
    assert dump(queue) == {}


def test_deregister_requeues_the_jobs_that_the_worker_holds(queue: Queue) -> None:
    job = put(queue, "processing")
    queue.deregister(job.worker)
    assert find_lost(queue) == []
    assert queue.get(job.id).status == "pending"


# Trim -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "days"), [("completed", 1), ("failed", 7), ("cancelled", 7)])
def test_trim_deletes_jobs_that_were_kept_long_enough(queue: Queue, status: str, days: int) -> None:
    job = put(queue, status)
    queue.clock.ahead += days * DAY - 10_000
    assert queue.trim() == 0
    queue.clock.ahead += 20_000
    assert queue.trim() == 1
    assert queue.get(job.id) is None
    assert newest(queue, status) == []
    assert (queue.stats()[status], queue.stats()["total"][status]) == (0, 1)


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_trim_deletes_the_entry_of_an_expired_record(server: Server, status: str) -> None:
    queue = server.queue(keep_completed=5, keep_failed=5)
    job = put(queue, status)
    assert 0 < raw(queue).pttl(queue.keys.job(job.id)) <= 5000
    raw(queue).delete(queue.keys.job(job.id))
    queue.clock.ahead += 5001
    assert queue.trim() == 1
    assert queue.stats()[status] == 0
    check_consistency(queue)


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_trim_deletes_the_oldest_jobs_above_the_cap(queue: Queue, monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    monkeypatch.setattr(tinyqueue, "KEPT", 2)
    monkeypatch.setattr(tinyqueue, "MAX_JOBS", 2)  # that many at a time
    jobs = []
    for name in ("a", "b", "c", "d", "e"):
        jobs.append(put(queue, status, queue=name))
        queue.clock.ahead += 1
    assert [queue.trim(), queue.trim(), queue.trim()] == [2, 1, 0]
    assert ids(newest(queue, status)) == [jobs[4].id, jobs[3].id]
    assert [queue.get(job.id) for job in jobs[:3]] == [None] * 3


@pytest.mark.parametrize("status", ["pending", "delayed", "processing"])
def test_trim_never_deletes_a_job_that_has_not_ended(queue: Queue, status: str) -> None:
    job = put(queue, status)
    queue.clock.ahead += 3650 * DAY
    assert queue.trim() == 0
    assert raw(queue).pttl(queue.keys.job(job.id)) == -1


def test_trim_of_ended_jobs_leaves_nothing_but_counts(server: Server) -> None:
    queue = server.queue(keep_completed=1, keep_failed=1)
    for status in ("completed", "failed", "cancelled"):
        put(queue, status, queue=status)
    worker = queue.register(["cancelled"], 1)
    queue.dequeue(worker, ["cancelled"])  # drops the id of the cancelled job
    queue.deregister(worker)
    queue.clock.ahead += 1001
    assert queue.trim() == 3
    left = {key for key in dump(queue) if "bell" not in key and not key.startswith(queue.keys.prefix + "minute:")}
    assert left == {queue.keys.counts, queue.keys.metrics, queue.keys.series}


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["pending", "processing", "completed", "failed", "cancelled"])
def test_page_lists_jobs_of_a_status_newest_first(queue: Queue, status: str) -> None:
    listed = []
    for name in ("a", "b", "c"):
        listed.insert(0, put(queue, status, queue=name))
        queue.clock.ahead += 5
    put(queue, "completed" if status != "completed" else "failed", queue="d")
    assert newest(queue, status) == listed
    assert newest(queue, status, limit=1) == listed[:1]
    assert newest(queue, status, limit=2) == listed[:2]


def test_page_sorts_pending_jobs_by_creation(queue: Queue) -> None:
    jobs = []
    for delay in (30, 0, 20, 10):
        jobs.insert(0, queue.enqueue("echo", {}, delay=delay))
        queue.clock.ahead += 5
    assert newest(queue, "pending") == jobs
    assert newest(queue, "pending", limit=1) == jobs[:1]


@pytest.mark.parametrize("status", ["pending", "processing", "completed", "failed", "cancelled"])
def test_newest_with_limit_zero_returns_nothing(queue: Queue, status: str) -> None:
    put(queue, status)
    assert newest(queue, status, limit=0) == []


def test_stats_counts_jobs_of_every_status(queue: Queue) -> None:
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


def test_workers_lists_the_registered_workers(queue: Queue) -> None:
    before = queue.now()
    worker = queue.register(["a", "b"], 5)
    lost = queue.register(DEFAULT, 1)
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
    [(key, minute)] = dump(queue).items()
    assert key.startswith(queue.keys.prefix + "minute:")
    assert minute.value == {f"lost:{worker}".encode(): b"1"}


@pytest.mark.parametrize("record", RECORDS, ids=range(len(RECORDS)))
@pytest.mark.parametrize("place", ["queue", "delayed", "list of a lost worker"])
def test_read_of_an_unreadable_record_makes_a_failed_job(queue: Queue, worker: str, place: str, record: bytes) -> None:
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


@pytest.mark.parametrize("entry", ENTRIES)
def test_exchange_drops_an_entry_that_names_no_job(queue: Queue, entry: bytes) -> None:
    running = put(queue, "processing")
    raw(queue).rpush(queue.keys.jobs("default"), entry)
    job = queue.enqueue("echo", {})
    assert ids(exchange(queue, done(running), most=2)[1]) == [job.id]
    assert raw(queue).lrange(queue.keys.proc(running.worker), 0, -1) == [job.id.encode()]


@pytest.mark.parametrize("record", RECORDS, ids=range(len(RECORDS)))
def test_exchange_fails_an_unreadable_record(queue: Queue, record: bytes) -> None:
    running = put(queue, "processing")
    raw(queue).set(queue.keys.job(ID), record)
    raw(queue).rpush(queue.keys.jobs("default"), ID)
    job = queue.enqueue("echo", {})
    assert ids(exchange(queue, done(running), most=2)[1]) == [job.id]
    [failed] = newest(queue, "failed")
    assert (failed.id, failed.error.type) == (ID, "UnreadableRecord")


@pytest.mark.parametrize("record", RECORDS, ids=range(len(RECORDS)))
def test_settle_returns_the_outcome_of_a_job_whose_record_is_unreadable(queue: Queue, record: bytes) -> None:
    running = put(queue, "processing")
    whole = raw(queue).get(queue.keys.job(running.id))
    raw(queue).set(queue.keys.job(running.id), record)
    try:
        assert queue.settle(running.worker, [done(running)]) == [done(running)]
        with pytest.raises(Reaped):
            running.set_progress(0.5)
    finally:
        raw(queue).set(queue.keys.job(running.id), whole)


@pytest.mark.parametrize("record", RECORDS, ids=range(len(RECORDS)))
def test_exchange_returns_the_outcome_of_a_job_whose_record_is_unreadable(queue: Queue, record: bytes) -> None:
    running = put(queue, "processing")
    job = queue.enqueue("echo", {})
    whole = raw(queue).get(queue.keys.job(running.id))
    raw(queue).set(queue.keys.job(running.id), record)
    try:
        left, started = exchange(queue, done(running))
        assert (left, ids(started)) == ([done(running)], [job.id])
    finally:
        raw(queue).set(queue.keys.job(running.id), whole)
    assert queue.settle(running.worker, [done(running)]) == []


def test_exchange_takes_from_other_queues_if_one_list_has_the_wrong_type(queue: Queue) -> None:
    running = put(queue, "processing")
    job = queue.enqueue("echo", {}, queue="other")
    raw(queue).set(queue.keys.jobs("default"), "not a list")
    assert ids(exchange(queue, done(running), names=["default", "other"])[1]) == [job.id]
    assert queue.get(running.id).status == "completed"
    raw(queue).delete(queue.keys.jobs("default"))


def test_exchange_with_a_key_of_the_wrong_type_applies_the_rest(server: Server) -> None:
    queue = server.queue()
    running = put(queue, "processing")
    job = queue.enqueue("echo", {})
    raw(queue).set(queue.keys.ended["completed"], "not a sorted set")
    with pytest.raises(Corrupted) as caught:
        exchange(queue, done(running))
    assert caught.value.applied
    assert queue.settle(running.worker, [done(running)], again=True) == []
    assert queue.get(running.id).status == "completed"
    assert ids(queue.start(running.worker, queue.adopt(running.worker, []), {})) == [job.id]


def test_exchange_with_a_set_of_workers_of_the_wrong_type_writes_nothing(server: Server) -> None:
    queue = server.queue()
    running = put(queue, "processing")
    job = queue.enqueue("echo", {})
    raw(queue).set(queue.keys.workers, "not a set")
    with pytest.raises(Corrupted) as caught:
        exchange(queue, done(running))
    assert queue.get(running.id).status == "processing"
    assert queue.settle(running.worker, [done(running)], again=caught.value.applied) == []
    assert queue.get(running.id).status == "completed"
    assert ids(queue.start(running.worker, queue.adopt(running.worker, []), {})) == [job.id]


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
def test_verbs_raise_corrupted_for_a_key_of_the_wrong_type(
    server: Server, key: str, verb: Callable[[Queue], object]
) -> None:
    queue = server.queue()
    key = queue.keys.counts.replace("counts", key)
    if JOB in key:
        raw(queue).lpush(key, "a list")
    else:
        raw(queue).set(key, "a string")
    with pytest.raises(Corrupted, match="WRONGTYPE"):
        verb(queue)
    queue.ping()  # no reply was left on the connection


@pytest.mark.parametrize("key", ["worker:somebody", "lease:somebody"])
def test_workers_raises_corrupted_for_an_unreadable_record(server: Server, key: str) -> None:
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


# Concurrent changes ---------------------------------------------------------------------------------------------------
# `far` has read something, and `near` changes it before `far` writes.


def test_cancel_of_a_job_that_starts_meanwhile_requests_a_stop(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "pending")
    worker = near.register(DEFAULT, 1)
    proxy.before(b"EXEC", lambda: near.dequeue(worker, DEFAULT))
    requested = far.cancel(job.id)
    assert (requested.status, requested.cancelled) == ("processing", True)
    assert near.cancel_requests([job.id]) == [job.id]
    assert near.stats()["cancelled"] == 0


def test_start_drops_a_job_that_is_cancelled_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "pending")
    worker = near.register(DEFAULT, 1)
    proxy.before(b"MSET", lambda: near.cancel(job.id))
    assert far.dequeue(worker, DEFAULT) == []
    assert near.get(job.id).status == "cancelled"


def test_retry_of_a_job_that_is_retried_meanwhile_raises_wrong_status(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "failed")
    proxy.before(b"EXEC", lambda: near.retry(job.id))
    with pytest.raises(WrongStatus, match="pending"):
        far.retry(job.id)
    assert near.waiting(DEFAULT) == 1


def test_trim_keeps_a_job_that_is_retried_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "failed")
    far.clock.ahead += 8 * DAY
    proxy.before(b"EXEC", lambda: near.retry(job.id))
    assert far.trim() == 0
    assert near.get(job.id).status == "pending"


@pytest.mark.parametrize("write", [*(name for name in WRITES if name not in ("settle-none", "settle-again", "start"))])
def test_write_by_a_worker_reaped_just_before_raises_reaped(
    near: Queue, far: Queue, proxy: CutProxy, write: str
) -> None:
    job = put(near, "processing")
    job.__dict__["_queue"] = far
    lapse(near, job.worker)
    proxy.before(b"EXEC", lambda: near.reap(job.worker))
    with pytest.raises(Reaped):
        WRITES[write](far, job)
    assert (near.get(job.id).status, near.waiting(DEFAULT)) == ("pending", 1)


def test_start_by_a_worker_reaped_just_before_raises_reaped(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "pending")
    worker = near.register(DEFAULT, 1)
    lapse(near, worker)
    proxy.before(b"MSET", lambda: near.reap(worker))
    with pytest.raises(Reaped):
        far.dequeue(worker, DEFAULT)
    assert near.dequeue(near.register(DEFAULT, 1), DEFAULT)[0].id == job.id


def test_take_by_a_worker_reaped_in_its_middle_loses_no_job(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "pending")
    worker = near.register(DEFAULT, 1)
    lapse(near, worker)
    proxy.split(b"RPOPLPUSH", lambda: near.reap(worker))
    assert far.take(worker, DEFAULT, 1) == [job.id.encode()]
    assert find_lost(near) == [worker]
    assert near.reap(worker) == 1


def test_reap_of_a_worker_that_wakes_up_meanwhile_does_nothing(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "processing")
    lapse(near, job.worker)
    proxy.before(b"EXEC", lambda: near.heartbeat(job.worker))
    assert far.reap(job.worker) == 0
    near.complete(job)


def test_reap_requeues_a_job_that_starts_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "pending")
    worker = near.register(DEFAULT, 1)
    taken = near.take(worker, DEFAULT, 1)
    lapse(near, worker)
    proxy.before(b"EXEC", lambda: near.start(worker, taken))
    assert far.reap(worker) == 1
    assert (near.get(job.id).status, near.waiting(DEFAULT)) == ("pending", 1)


def test_reap_requeues_a_job_that_is_taken_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "processing")
    near.enqueue("echo", {})
    lapse(near, job.worker)
    proxy.before(b"EXEC", lambda: near.take(job.worker, DEFAULT, 1))
    assert far.reap(job.worker) == 2


def test_reap_ignores_a_job_that_is_settled_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "processing")
    lapse(near, job.worker)
    proxy.before(b"EXEC", lambda: near.complete(job))
    assert far.reap(job.worker) == 0
    assert near.get(job.id).status == "completed"


def test_deregister_requeues_a_job_that_is_taken_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    put(near, "pending")
    worker = near.register(DEFAULT, 1)
    proxy.before(b"EXEC", lambda: near.take(worker, DEFAULT, 1))
    far.deregister(worker)
    assert find_lost(near) == []
    assert near.waiting(DEFAULT) == 1


def test_transact_gives_up_when_watched_keys_keep_changing(
    near: Queue, far: Queue, proxy: CutProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue, "TRIES", 3)
    job = put(near, "processing")
    for done in (0.1, 0.2, 0.3):
        proxy.before(b"EXEC", lambda done=done: near.write_progress(msgspec.structs.replace(job, progress=done)))
    with unavailable("busy"):
        far.complete(job)
    assert near.get(job.id).progress == 0.3


@pytest.fixture(params=["before the second reading", "before the writing"])
def meanwhile(request: pytest.FixtureRequest, proxy: CutProxy) -> Callable[[Callable[[], object]], None]:
    """Change something while `far` exchanges outcomes for one job."""

    def change(work: Callable[[], object]) -> None:
        if request.param == "before the writing":
            proxy.before(b"MSET", work)
        else:  # the packet after the one that takes
            proxy.before(b"RPOPLPUSH", lambda: proxy.before(b"MGET", work))

    return change


def test_exchange_with_a_cancel_request_meanwhile_takes_nothing_twice(near: Queue, far: Queue, meanwhile: Any) -> None:
    job = put(near, "processing")
    first, second = near.enqueue_many("echo", [1, 2])
    meanwhile(lambda: near.cancel(job.id))
    lost, started = exchange(far, Outcome(job, "fail", error=BOOM, after=5))
    assert (lost, ids(started)) == ([], [first.id])
    assert near.get(job.id).status == "cancelled"
    assert ids(near.dequeue(job.worker, DEFAULT)) == [second.id]


def test_exchange_drops_a_job_that_is_cancelled_meanwhile(near: Queue, far: Queue, meanwhile: Any) -> None:
    job = put(near, "processing")
    first, second = near.enqueue_many("echo", [1, 2])
    meanwhile(lambda: near.cancel(first.id))
    assert exchange(far, done(job)) == ([], [])
    assert near.get(job.id).status == "completed"
    assert (near.get(first.id).status, near.get(second.id).status) == ("cancelled", "pending")
    assert near.adopt(job.worker, []) == []


def test_exchange_starts_a_job_that_is_retried_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "processing")
    retried = near.enqueue("echo", 1)
    other = near.enqueue("echo", 2)
    near.cancel(retried.id)
    proxy.before(b"MSET", lambda: near.retry(retried.id))
    assert ids(exchange(far, done(job), most=2)[1]) == [retried.id, other.id]
    assert near.dequeue(job.worker, DEFAULT) == []  # the retry has put a second entry into the list
    assert near.get(retried.id).attempts == 1


def test_exchange_that_loses_a_job_meanwhile_returns_its_outcome(near: Queue, far: Queue, meanwhile: Any) -> None:
    job = put(near, "processing")
    waiting = near.enqueue("echo", 1)
    meanwhile(lambda: near.release(job))
    left, started = exchange(far, done(job))
    assert (left, ids(started)) == ([done(job)], [waiting.id])
    assert near.get(job.id).status == "pending"


def test_exchange_by_a_worker_reaped_meanwhile_raises_reaped(near: Queue, far: Queue, meanwhile: Any) -> None:
    job = put(near, "processing")
    waiting = near.enqueue("echo", 1)
    lapse(near, job.worker)
    meanwhile(lambda: near.reap(job.worker))
    with pytest.raises(Reaped):
        exchange(far, done(job))
    assert (near.get(job.id).status, near.get(waiting.id).status) == ("pending", "pending")
    assert ids(near.dequeue(near.register(DEFAULT, 2), DEFAULT, 3)) == [job.id, waiting.id]


def test_exchange_by_a_worker_reaped_in_the_middle_of_its_take_loses_no_job(
    near: Queue, far: Queue, proxy: CutProxy
) -> None:
    job = put(near, "processing")
    waiting = near.enqueue("echo", 1)
    lapse(near, job.worker)
    proxy.split(b"RPOPLPUSH", lambda: near.reap(job.worker))
    with pytest.raises(Reaped):
        exchange(far, done(job))
    assert find_lost(near) == [job.worker]
    near.reap(job.worker)
    assert sorted(ids(near.dequeue(near.register(DEFAULT, 2), DEFAULT, 3))) == sorted([job.id, waiting.id])


@pytest.mark.parametrize("verb", ["cancel", "release"])
def test_exchange_with_a_change_between_two_queues_takes_from_both(
    near: Queue, far: Queue, proxy: CutProxy, verb: str
) -> None:
    """The change must not abort the transaction that takes from the second queue."""
    job = put(near, "processing", queue="third")
    [first] = near.enqueue_many("echo", [1])
    second = near.enqueue("echo", 2, queue="low")
    change = {"cancel": lambda: near.cancel(job.id), "release": lambda: near.release(job)}[verb]
    proxy.before(b":jobs:low", change)
    left, started = exchange(far, done(job), most=2, names=["default", "low"])
    assert (left, ids(started)) == ([] if verb == "cancel" else [done(job)], [first.id, second.id])


def test_exchange_gives_up_when_watched_keys_keep_changing(
    near: Queue, far: Queue, proxy: CutProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue, "TRIES", 3)
    job = put(near, "processing")
    waiting = near.enqueue("echo", 1)
    for progress in (0.1, 0.2, 0.3):
        changed = msgspec.structs.replace(job, progress=progress)
        proxy.before(b"MSET", lambda changed=changed: near.write_progress(changed))
    with unavailable("busy"):
        exchange(far, done(job))
    assert near.settle(job.worker, [done(job)]) == []
    assert near.adopt(job.worker, []) == [waiting.id.encode()]


# Lost packets ---------------------------------------------------------------------------------------------------------

# The status before, the call, the status after, and how often the id is in its queue then.
LOST: dict[str, tuple[str, Callable[[Queue, Job], Any], str, int]] = {
    "complete": ("processing", lambda far, job: far.complete(job), "completed", 0),
    "fail": ("processing", lambda far, job: far.fail(job, BOOM), "failed", 0),
    "fail-later": ("processing", lambda far, job: far.fail(job, BOOM, 60), "pending", 0),
    "release": ("processing", lambda far, job: far.release(job), "pending", 1),
    "exchange": ("processing", lambda far, job: exchange(far, done(job), most=0), "completed", 0),
    "progress": ("processing", lambda far, job: far.write_progress(job), "processing", 0),
    "cancel": ("pending", lambda far, job: far.cancel(job.id), "cancelled", 1),
    "retry": ("failed", lambda far, job: far.retry(job.id), "pending", 1),
}


@pytest.mark.parametrize("cut", ["drop_reply", "drop_request", "hold"])
@pytest.mark.parametrize("verb", LOST)
def test_transition_is_applied_once_if_a_packet_is_lost(
    near: Queue, far: Queue, proxy: CutProxy, verb: str, cut: str
) -> None:
    before, call, after, listed = LOST[verb]
    job = put(near, before)
    getattr(proxy, cut)(b"EXEC")
    call(far, job)
    proxy.deliver()  # a packet that was late arrives after all
    assert near.get(job.id).status == after
    assert near.get(job.id).attempts == (0 if verb in ("release", "cancel", "retry") else 1)
    assert near.waiting(DEFAULT) == listed
    assert sum(near.stats()["total"].values()) == (verb in ("complete", "fail", "exchange", "cancel", "retry"))


@pytest.mark.parametrize("cut", ["drop_reply", "drop_request"])
@pytest.mark.parametrize("count", [1, 3])
def test_enqueue_stores_jobs_once_if_a_packet_is_lost(
    near: Queue, far: Queue, proxy: CutProxy, count: int, cut: str
) -> None:
    getattr(proxy, cut)(b"EXEC")
    jobs = far.enqueue_many("echo", range(count))
    assert [near.get(job.id) for job in jobs] == jobs
    assert (near.stats()["pending"], near.waiting(DEFAULT)) == (count, count)


def test_enqueue_that_arrives_late_resets_no_job(real: Server, proxy: CutProxy) -> None:
    near = real.queue()
    far = real.queue(proxy.url)
    proxy.hold(b"EXEC")
    job = far.enqueue("echo", {})
    worker = near.register(DEFAULT, 1)
    near.complete(near.dequeue(worker, DEFAULT)[0])
    proxy.deliver()
    assert near.get(job.id).status == "completed"
    assert near.dequeue(worker, DEFAULT) == []


def test_enqueue_without_a_reply_in_time_is_not_sent_again(
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


def test_enqueue_with_an_unknown_outcome_is_doubtful(near: Queue, far: Queue, proxy: CutProxy) -> None:
    proxy.drop_reply(b"EXEC")
    proxy.drop_request(b"EXISTS")  # the check whether it was applied
    with unavailable("unreachable", doubtful=True):
        far.enqueue("echo", {})
    assert len(newest(near, "pending")) == 1


def test_enqueue_whose_reply_is_lost_does_not_repeat_a_job_that_ran(near: Queue, far: Queue, proxy: CutProxy) -> None:
    worker = near.register(DEFAULT, 1)
    proxy.drop_reply(b"EXEC", lambda: near.complete(near.dequeue(worker, DEFAULT)[0]))
    job = far.enqueue("echo", {})
    assert near.get(job.id).status == "completed"


def test_retry_whose_reply_is_lost_does_not_repeat_a_job_that_started(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "failed")
    worker = near.register(DEFAULT, 1)
    proxy.drop_reply(b"EXEC", lambda: near.dequeue(worker, DEFAULT))
    assert far.retry(job.id).id == job.id
    assert near.get(job.id).status == "processing"


def test_release_whose_reply_is_lost_does_not_repeat_a_job_that_started(
    near: Queue, far: Queue, proxy: CutProxy
) -> None:
    job = put(near, "processing")
    proxy.drop_reply(b"EXEC", lambda: near.dequeue(job.worker, DEFAULT))
    far.release(job)
    assert (near.get(job.id).status, near.get(job.id).refunds) == ("processing", 1)


@pytest.mark.parametrize(("cut", "found"), [("drop_reply", 1), ("drop_request", 0), ("hold", 1)])
def test_take_loses_no_job_if_a_packet_is_lost(near: Queue, far: Queue, proxy: CutProxy, cut: str, found: int) -> None:
    job = put(near, "pending")
    worker = near.register(DEFAULT, 1)
    getattr(proxy, cut)(b"RPOPLPUSH")
    with unavailable("unreachable"):
        far.take(worker, DEFAULT, 1)
    proxy.deliver()
    taken = far.adopt(worker, [])
    assert len(taken) == found
    assert ids(far.start(worker, taken or far.take(worker, DEFAULT, 1))) == [job.id]


def test_take_that_arrives_after_the_reaper_loses_no_job(near: Queue, far: Queue, proxy: CutProxy) -> None:
    put(near, "pending")
    worker = near.register(DEFAULT, 1)
    proxy.hold(b"RPOPLPUSH")
    with unavailable("unreachable"):
        far.take(worker, DEFAULT, 1)
    lapse(near, worker)
    assert near.reap(worker) == 0
    proxy.deliver()
    assert find_lost(near) == [worker]
    assert near.reap(worker) == 1


@pytest.mark.parametrize("cut", ["drop_reply", "drop_request", "hold"])
def test_start_begins_one_attempt_if_a_packet_is_lost(near: Queue, far: Queue, proxy: CutProxy, cut: str) -> None:
    job = put(near, "pending")
    worker = near.register(DEFAULT, 1)
    getattr(proxy, cut)(b"MSET")
    [started] = far.dequeue(worker, DEFAULT)
    proxy.deliver()
    assert (started.id, started.attempts) == (job.id, 1)
    assert near.get(job.id) == started


@pytest.mark.parametrize("cut", ["drop_reply", "drop_request"])
def test_reap_requeues_once_if_a_packet_is_lost(near: Queue, far: Queue, proxy: CutProxy, cut: str) -> None:
    job = put(near, "processing")
    lapse(near, job.worker)
    getattr(proxy, cut)(b"EXEC")
    far.reap(job.worker)
    assert (near.get(job.id).status, near.waiting(DEFAULT), near.reap(job.worker)) == ("pending", 1, 0)


@pytest.mark.parametrize("cut", ["drop_reply", "drop_request"])
def test_promote_loses_no_job_if_a_packet_is_lost(near: Queue, far: Queue, proxy: CutProxy, cut: str) -> None:
    job = put(near, "delayed")
    # A second more than needed, because the two do not read the time at the same moment.
    far.clock.ahead = near.clock.ahead = 61_000
    getattr(proxy, cut)(b"EXEC")
    far.promote()
    raw(near).delete(near.keys.promoter)  # its second may not be over
    near.promote()
    assert ids(near.dequeue(near.register(DEFAULT, 1), DEFAULT)) == [job.id]


def test_promote_keeps_a_job_that_is_delayed_again_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    near.enqueue("echo", 1, delay=1)
    near.clock.ahead = far.clock.ahead = 2000
    worker = near.register(["default"], 1)
    started: list[Job] = []

    def overtake() -> None:
        near.promote()
        started.extend(near.dequeue(worker, ["default"]))

    proxy.before(b"NX", overtake)  # it has read the due ids, but not locked
    proxy.before(
        b"ZREM", lambda: near.fail(started[0], Failure("Boom", "it broke"), after=60)
    )  # it has read the job, which is processing
    far.promote()
    assert near.stats()["delayed"] == near.stats()["pending"] == 1


def test_promote_that_arrives_late_keeps_a_job_delayed_again(near: Queue, far: Queue, proxy: CutProxy) -> None:
    near.enqueue("echo", 1, delay=1)
    near.clock.ahead = far.clock.ahead = 2000
    proxy.hold(b"ZREM")
    far.promote()
    raw(near).delete(near.keys.promoter)  # as if it had expired
    near.promote()
    [started] = near.dequeue(near.register(["default"], 1), ["default"])
    near.fail(started, Failure("Boom", "it broke"), after=60)
    proxy.deliver()
    assert near.stats()["delayed"] == near.stats()["pending"] == 1


@pytest.mark.parametrize("applied", [True, False])
def test_settle_with_an_unknown_outcome_can_be_repeated(
    near: Queue, far: Queue, proxy: CutProxy, applied: bool
) -> None:
    job = put(near, "processing")
    cut = proxy.drop_reply if applied else proxy.drop_request
    cut(b"EXEC", lambda: proxy.drop_request(b"WATCH"))  # and then the check whether it was applied
    with unavailable("unreachable", doubtful=True):
        far.settle(job.worker, [Outcome(job, "complete", 7)])
    far.settle(job.worker, [Outcome(job, "complete", 7)], again=True)
    assert near.get(job.id).result == 7
    assert near.stats()["total"]["completed"] == 1


def start_what_was_taken(queue: Queue, worker: str, jobs: list[Job]) -> list[Job]:
    """Adopt what a failed call left in the worker's list, or take one, as a worker does."""
    held = {job.id: job for job in jobs if job.status == "processing"}
    taken = queue.adopt(worker, held)
    if not taken and not held:
        taken = queue.take(worker, DEFAULT, 1)
    return [*held.values(), *queue.start(worker, taken, held)]


@pytest.mark.parametrize("cut", ["drop_reply", "drop_request", "hold"])
@pytest.mark.parametrize("packet", ["take", "read", "write"])
def test_exchange_loses_and_repeats_nothing_if_a_packet_is_lost(
    near: Queue, far: Queue, proxy: CutProxy, packet: str, cut: str
) -> None:
    job = put(near, "processing")
    waiting = near.enqueue("echo", 1)
    triggers = {"take": b"RPOPLPUSH", "read": waiting.id.encode(), "write": b"MSET"}
    getattr(proxy, cut)(triggers[packet])
    jobs: list[Job] = []
    if packet == "write":
        left, jobs = exchange(far, done(job))
        assert (left, ids(jobs)) == ([], [waiting.id])
    else:
        with unavailable("unreachable"):
            exchange(far, done(job))
        assert near.get(job.id).status == "processing"
        assert far.settle(job.worker, [done(job)]) == []
    proxy.deliver()  # a packet that was late arrives after all
    [started] = start_what_was_taken(far, job.worker, jobs)
    assert (started.id, started.status, started.attempts) == (waiting.id, "processing", 1)
    assert near.get(started.id) == started
    assert (near.get(job.id).result, near.stats()["total"]["completed"]) == (7, 1)
    assert near.settle(job.worker, [done(started)]) == []
    assert near.adopt(job.worker, []) == []


@pytest.mark.parametrize("verb", ["complete", "fail", "release"])
@pytest.mark.parametrize("cut", ["drop_reply", "drop_request", "hold"])
def test_exchange_with_an_unknown_outcome_can_be_repeated(
    near: Queue, far: Queue, proxy: CutProxy, cut: str, verb: Any
) -> None:
    job = put(near, "processing")
    waiting = near.enqueue("echo", 1)
    outcome = Outcome(job, verb, error=BOOM)

    def lose_packets() -> None:
        getattr(proxy, cut)(b"MSET")
        proxy.drop_request(b"WATCH")  # the check whether it was applied

    proxy.before(waiting.id.encode(), lose_packets)
    with unavailable("unreachable", doubtful=True):
        exchange(far, outcome)
    assert far.settle(job.worker, [outcome], again=True) == []
    proxy.deliver()
    [started] = start_what_was_taken(far, job.worker, [])
    assert (started.id, started.attempts) == (waiting.id, 1)
    assert near.get(job.id).status == {"complete": "completed", "fail": "failed", "release": "pending"}[verb]
    assert near.waiting(DEFAULT) == (verb == "release")
    assert sum(near.stats()["total"].values()) == (verb != "release")


def test_exchange_after_a_lost_reply_drops_no_second_entry_of_a_running_job(
    near: Queue, far: Queue, proxy: CutProxy
) -> None:
    """The second LREM would remove the running job's own entry, and nobody would find it if the worker died."""
    worker = near.register(DEFAULT, 2)
    near.enqueue_many("echo", [1, 2])
    ended, running = near.dequeue(worker, DEFAULT, 2)
    raw(near).lpush(near.keys.jobs("default"), running.id)
    proxy.drop_reply(b"LREM")
    held = {job.id: job for job in (ended, running)}
    assert far.exchange(worker, [done(ended)], DEFAULT, 1, held) == ([], [])
    lapse(near, worker)
    assert near.reap(worker) == 1


def test_exchange_that_arrives_after_the_reaper_loses_no_job(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "processing")
    near.enqueue("echo", 1)
    proxy.hold(b"RPOPLPUSH")
    with unavailable("unreachable"):
        exchange(far, done(job))
    lapse(near, job.worker)
    assert near.reap(job.worker) == 1
    proxy.deliver()
    assert find_lost(near) == [job.worker]
    assert near.reap(job.worker) >= 1
    assert near.waiting(DEFAULT) == 2


def test_transitions_take_two_round_trips(near: Queue, far: Queue, proxy: CutProxy) -> None:
    worker = near.register(DEFAULT, 10)
    far.store.memory()  # is read again only after two seconds
    for _ in range(2):
        far.enqueue("echo", 0)  # the first adds to the series of the metrics, the second reads them

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


def test_exchange_takes_three_round_trips(
    near: Queue, far: Queue, proxy: CutProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_reading, "PAUSE_AGE", 3600.0)  # an exchange reads which queues are paused
    worker = near.register(DEFAULT, 10)
    near.enqueue_many("echo", range(20))
    near.enqueue_many("echo", range(20), queue="low")
    jobs = far.dequeue(worker, ["default"], 10)
    for name in ("low", "default"):  # the first adds to the series of the metrics, the second reads them
        jobs = exchange(far, *map(done, jobs), most=10, names=[name])[1]

    def round_trips(most: int, names: list[str]) -> int:
        nonlocal jobs
        near.enqueue_many("echo", range(10), queue="low")
        proxy.packets.clear()
        jobs = exchange(far, *map(done, jobs), most=most, names=names)[1]
        return len(proxy.packets)

    assert round_trips(10, ["low"]) == 3
    assert len(jobs) == 10
    assert round_trips(10, ["default", "low"]) == 4
    assert round_trips(10, ["low", "default"]) == 3
    assert len(jobs) == 10
    assert round_trips(0, ["low"]) == 2


# Replies --------------------------------------------------------------------------------------------------------------

PARSERS: dict[str, dict[str, Any]] = {"hiredis": {}, "python": {"parser_class": _RESP2Parser}}


@pytest.fixture(params=PARSERS)
def parsing(request: pytest.FixtureRequest, near: Queue, proxy: CutProxy) -> Iterator[Queue]:
    """A queue on the data of `near`, through `proxy`, whose client parses replies in C or in Python."""
    pool = connect(proxy.url)
    pool.connection_kwargs |= PARSERS[request.param]
    yield Queue(pool)
    pool.disconnect()


def test_exchange_with_each_parser_of_the_client(near: Queue, parsing: Queue) -> None:
    worker = parsing.register(DEFAULT, 300)
    jobs = parsing.enqueue_many("echo", ["x" * 3000] * 500)
    running = parsing.dequeue(worker, DEFAULT, 200)
    lost, started = exchange(parsing, *map(done, running), most=300)
    assert (lost, ids(running + started)) == ([], ids(jobs))
    assert (near.stats()["completed"], near.stats()["processing"]) == (200, 300)
    assert [near.get(job.id) for job in started[:5]] == started[:5]
    assert exchange(parsing, *map(done, started)) == ([], [])


@pytest.mark.parametrize("at", [b"SADD", b"RPOPLPUSH", b"EXISTS", b"MGET", b"MSET", b"LREM", b"HINCRBY"])
def test_exchange_whose_replies_arrive_in_parts(parsing: Queue, proxy: CutProxy, at: bytes) -> None:
    job = put(parsing, "processing")
    waiting = parsing.enqueue_many("echo", range(3))
    proxy.split(at, lambda: None)
    lost, started = exchange(parsing, done(job), most=3)
    assert (lost, ids(started)) == ([], ids(waiting))
    assert parsing.get(job.id).result == 7


@pytest.mark.parametrize("wrong", [("GET", "a list"), ("NOSUCHCOMMAND",)])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_ask_with_an_error_among_the_replies_raises_it(parsing: Queue, at: int, wrong: tuple[str, ...]) -> None:
    raw(parsing).lpush("a list", 1)
    commands: list[Any] = [("PING",), ("PING",)]
    commands.insert(at, wrong)
    with pytest.raises(Corrupted, match="WRONGTYPE" if wrong[0] == "GET" else "unknown command"):
        parsing.store.read(*commands)
    assert parsing.store.read(("ECHO", "next")) == [b"next"]  # and not a reply that was left unread
    raw(parsing).delete("a list")


def test_exchange_with_an_error_among_the_replies_raises_it(parsing: Queue, near: Queue, proxy: CutProxy) -> None:
    """Redis refuses one command of the transaction, and with it all others."""
    job = put(near, "processing")
    waiting = near.enqueue("echo", 1)
    parsing.now()
    proxy.answer(b"MSET", b"+OK\r\n+QUEUED\r\n-OOM command not allowed\r\n" + b"+QUEUED\r\n" * 50)
    with unavailable("full"):
        exchange(parsing, done(job))
    assert near.settle(job.worker, [done(job)]) == []
    assert ids(near.start(job.worker, near.adopt(job.worker, []), {})) == [waiting.id]


# Failures of Redis ---------------------------------------------------------------------------------------------------


@pytest.fixture
def own(start_redis: Callable[..., RedisServer]) -> Iterator[Queue]:
    """A queue with one pending job, on a real server that no other test uses."""
    queue = Queue.from_url(start_redis().url)
    put(queue, "pending")
    yield queue
    check_consistency(queue)
    queue.pool.disconnect()


def assert_refuses_writes(queue: Queue, reason: str) -> None:
    before = dump(queue)
    for write in (lambda: queue.enqueue("echo", {}), lambda: queue.take("somebody", DEFAULT, 1)):
        with unavailable(reason):
            write()
    assert dump(queue) == before
    assert len(newest(queue, "pending")) == 1


def test_write_to_a_full_redis_raises_unavailable_and_stores_nothing(own: Queue) -> None:
    raw(own).config_set("maxmemory", 1)
    assert_refuses_writes(own, "full")
    raw(own).config_set("maxmemory", 0)
    own.enqueue("echo", {})


def test_write_to_a_read_only_redis_raises_unavailable_and_stores_nothing(own: Queue) -> None:
    raw(own).replicaof("127.0.0.1", free_port())
    assert_refuses_writes(own, "read-only")
    raw(own).replicaof("no", "one")
    own.enqueue("echo", {})


@pytest.mark.parametrize("user", ["", ":wrong@", "nobody:right@"])
def test_ping_with_a_wrong_password_is_refused(start_redis: Callable[..., RedisServer], user: str) -> None:
    server = start_redis("--requirepass", "right")
    queue = Queue.from_url(f"redis://{user}127.0.0.1:{server.port}/0")
    with unavailable("refused"):
        queue.ping()
    queue.pool.disconnect()


def test_enqueue_without_a_redis_is_unreachable() -> None:
    queue = Queue.from_url(f"redis://127.0.0.1:{free_port()}/0")
    with unavailable("unreachable"):
        queue.enqueue("echo", {})


def test_ping_without_a_reply_is_a_timeout(real: Server, proxy: CutProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyqueue_redis, "SOCKET_TIMEOUT", 0.3)
    far = real.queue(proxy.url)
    proxy.swallow(b":none")
    with unavailable("timeout"):
        far.ping()
    far.ping()


def test_transition_without_a_reply_waits_for_one_timeout(
    near: Queue, real: Server, proxy: CutProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = put(near, "pending")
    monkeypatch.setattr(tinyqueue_redis, "SOCKET_TIMEOUT", 0.05)
    far = real.queue(proxy.url)
    far.resume("other")  # its first transaction reads the series of the metrics
    proxy.packets.clear()
    proxy.swallow(b"WATCH")
    with unavailable("timeout"):
        far.cancel(job.id)
    assert len(proxy.packets) == 1


def test_wait_that_blocks_does_not_set_the_clock_back(queue: Queue, server: Server) -> None:
    fresh = server.queue()  # which reads the time together with its wait
    fresh.wait(DEFAULT, 1.0)
    assert abs(fresh.now() - queue.now()) < 900  # on a slow machine, a reply is read late, too


def test_submit_without_a_reply_waits_for_one_timeout(
    real: Server, proxy: CutProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_redis, "SOCKET_TIMEOUT", 0.05)
    far = real.queue(proxy.url)
    far.ping()
    proxy.packets.clear()
    proxy.swallow(b"INFO")  # the memory is read first
    with unavailable("timeout"):
        far.enqueue("echo", {})
    assert len(proxy.packets) == 1
    far.enqueue("echo", {})


def test_restart_of_a_killed_redis_keeps_the_accepted_job(start_redis: Callable[..., RedisServer]) -> None:
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


def test_ping_without_a_free_connection_is_busy(real: Server, proxy: CutProxy) -> None:
    far = real.queue(proxy.url, connections=1)
    raised = []

    def meanwhile() -> None:
        with unavailable("busy"):
            far.ping()
        raised.append("busy")

    proxy.before(b":none", meanwhile)
    far.ping()
    assert raised == ["busy"]


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
def test_ping_translates_the_errors_of_redis(far: Queue, proxy: CutProxy, answer: str, reason: str) -> None:
    trouble = far.last_trouble
    proxy.answer(b":none", f"-{answer}\r\n".encode())
    with unavailable(reason):
        far.ping()
    assert far.last_trouble > trouble
    far.ping()
    assert far.last_contact > far.last_trouble


def test_ping_raises_corrupted_for_an_unknown_error(far: Queue, proxy: CutProxy) -> None:
    trouble = far.last_trouble
    proxy.answer(b":none", b"-ERR nobody knows\r\n")
    with pytest.raises(Corrupted, match="nobody knows"):
        far.ping()
    assert far.last_trouble == trouble
