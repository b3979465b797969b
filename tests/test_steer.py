"""Job control: idempotent submits, unique keys, expiry, pause, cancel, lists, waiting, limits."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from conftest import ENDED, RedisServer, Server, check_consistency, dump, lapse, newest, put, raw, until
from cutproxy import CutProxy

import tinyqueue
import tinyqueue_reading
import tinyqueue_redis
import worker as process
from tinyqueue import (
    MAX_DELAY,
    MEMORY_SHARE,
    Clock,
    Corrupted,
    Failure,
    Filter,
    InvalidJob,
    Job,
    KeyReused,
    Once,
    Outcome,
    Queue,
    QueueFull,
    Unavailable,
    WrongStatus,
    handler,
)
from tinyqueue_config import Settings
from tinyqueue_redis import memory_use
from worker import Worker

pytestmark = pytest.mark.usefixtures("no_handlers")
BOOM = Failure("Boom", "it broke")
DEFAULT = ["default"]
ONCE = Once("the client's key", "what it sent")


def ids(jobs: list[Job]) -> list[str]:
    return [job.id for job in jobs]


def found(queue: Queue, job: Job) -> Job:
    """Return the job as it is now."""
    now = queue.get(job.id)
    assert now
    return now


class FixedClock(Clock):
    """A clock that moves only with `ahead`."""

    def now(self) -> int:
        return 1_800_000_000_000 + self.ahead


@pytest.fixture
def worker(queue: Queue) -> str:
    """The id of a registered worker."""
    return queue.register(DEFAULT, 5)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Worker]]:
    """Start workers in threads. They are stopped at the end of the test."""
    monkeypatch.setattr(process, "BLOCK", 0.1)
    monkeypatch.setattr(process, "TICK", 0.02)
    monkeypatch.setattr(process, "PROMOTE_EVERY", 0.02)
    started: list[Worker] = []

    def start(queue: Queue, *names: str, slots: int = 1, burst: bool = False) -> Worker:
        settings = msgspec.structs.replace(Settings(), worker_concurrency=slots, shutdown_timeout=10)
        made = Worker(queue, settings, names or ("default",), burst)
        made.thread = threading.Thread(target=made.run)
        made.thread.start()
        started.append(made)
        return made

    yield start
    for each in started:
        each.stop("release")
    for each in started:
        each.thread.join(20)
        assert not each.thread.is_alive(), "the worker did not stop"


def stop(worker: Worker) -> None:
    worker.stop("drain")
    worker.thread.join(20)
    assert not worker.thread.is_alive(), "the worker did not stop"


# Idempotent submits ---------------------------------------------------------------------------------------------------


def submit_once(queue: Queue, count: int = 1, once: Once = ONCE, **options: Any) -> list[Job]:
    return queue.submit([queue.draft("echo", {"n": n}, **options) for n in range(count)], once)


def test_once_returns_the_first_jobs_when_a_submit_is_repeated(queue: Queue, worker: str) -> None:
    first = submit_once(queue, 3)
    before = dump(queue)
    assert submit_once(queue, 3) == first
    assert dump(queue) == before
    assert ids(queue.dequeue(worker, DEFAULT, 9)) == ids(first)


def test_once_returns_the_jobs_in_their_present_state(queue: Queue) -> None:
    [job] = submit_once(queue)
    queue.cancel(job.id)
    assert submit_once(queue) == [found(queue, job)]


def test_once_returns_trimmed_jobs_as_they_were_submitted(queue: Queue) -> None:
    first = submit_once(queue, 2)
    queue.cancel(first[0].id)
    queue.clock.ahead += 8 * 86400_000
    assert queue.trim() == 1
    again = submit_once(queue, 2)
    assert [(job.id, job.status, job.payload) for job in again] == [(job.id, "pending", job.payload) for job in first]
    assert queue.get(first[0].id) is None


@pytest.mark.parametrize(("fingerprint", "count"), [("another", 1), (ONCE.fingerprint, 2)])
def test_once_refuses_the_key_for_a_different_request(queue: Queue, fingerprint: str, count: int) -> None:
    submit_once(queue)
    before = dump(queue)
    with pytest.raises(KeyReused):
        submit_once(queue, count, Once(ONCE.key, fingerprint))
    assert dump(queue) == before


def test_once_makes_new_jobs_for_another_key(queue: Queue) -> None:
    assert ids(submit_once(queue)) != ids(submit_once(queue, once=Once("another", ONCE.fingerprint)))
    assert queue.waiting(DEFAULT) == 2


def test_once_makes_one_job_when_many_submit_at_the_same_time(server: Server, queue: Queue) -> None:
    queues = [server.queue() for _ in range(20)]
    together = threading.Barrier(20)

    def submit(mine: Queue) -> str:
        together.wait()
        return submit_once(mine)[0].id

    with ThreadPoolExecutor(20) as pool:
        assert len(set(pool.map(submit, queues))) == 1
    assert queue.stats()["pending"] == queue.waiting(DEFAULT) == 1


@pytest.mark.parametrize("options", [{}, {"unique_key": "u"}, {"delay": 60}], ids=["plain", "unique", "delayed"])
@pytest.mark.parametrize("cut", ["drop_reply", "drop_request", "hold"])
def test_once_is_applied_once_when_a_packet_is_lost(
    near: Queue, far: Queue, proxy: CutProxy, cut: str, options: dict[str, Any]
) -> None:
    getattr(proxy, cut)(b"EXEC")
    [job] = submit_once(far, **options)
    proxy.deliver()
    assert found(near, job).status == "pending"
    assert near.stats()["pending"] == 1
    assert near.waiting(DEFAULT) == int("delay" not in options)
    assert ids(submit_once(near, **options)) == [job.id]


def test_once_is_sent_again_after_a_timeout(
    real: Server, near: Queue, proxy: CutProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_redis, "SOCKET_TIMEOUT", 0.2)
    far = real.queue(proxy.url)
    proxy.hold(b"EXEC", cut=False)
    [job] = submit_once(far)
    proxy.deliver()
    assert near.stats()["pending"] == near.waiting(DEFAULT) == 1
    assert ids(submit_once(near)) == [job.id]


def test_once_makes_no_second_job_when_the_first_ends_before_the_resend(
    near: Queue, far: Queue, proxy: CutProxy
) -> None:
    worker = near.register(DEFAULT, 1)
    proxy.drop_reply(b"EXEC", lambda: near.complete(near.dequeue(worker, DEFAULT)[0]))
    [job] = submit_once(far)
    assert found(near, job).status == "completed"
    assert near.waiting(DEFAULT) == 0


def test_once_returns_the_jobs_of_a_faster_client(near: Queue, far: Queue, proxy: CutProxy) -> None:
    theirs: list[Job] = []
    proxy.before(b"EXEC", lambda: theirs.extend(submit_once(near)))
    assert ids(submit_once(far)) == ids(theirs)
    assert near.waiting(DEFAULT) == 1


def test_once_is_remembered_until_its_key_expires(server: Server) -> None:
    queue = server.queue(keep_once=60)
    [first] = submit_once(queue)
    [key] = [key for key in dump(queue) if key.startswith(queue.keys.prefix + "once:")]
    assert 0 < raw(queue).pttl(key) <= 60_000
    raw(queue).delete(key)  # as if it had expired
    assert ids(submit_once(queue)) != [first.id]
    check_consistency(queue)


def test_once_stores_nothing_without_jobs(queue: Queue) -> None:
    before = dump(queue)
    assert queue.submit([], ONCE) == []
    assert dump(queue) == before


@pytest.mark.parametrize("garbage", [b"", b"\xff", b"null", b"[]", b"{}", b'{"fingerprint":"what it sent","ids":1}'])
def test_once_raises_corrupted_when_its_key_holds_garbage(server: Server, garbage: bytes) -> None:
    queue = server.queue()
    submit_once(queue)
    [key] = [key for key in dump(queue) if key.startswith(queue.keys.prefix + "once:")]
    raw(queue).set(key, garbage or b" ")
    with pytest.raises(Corrupted):
        submit_once(queue)


# Unique keys ----------------------------------------------------------------------------------------------------------


def unique(queue: Queue, key: str = "k", /, **options: Any) -> Job:
    return queue.enqueue("echo", {}, unique_key=key, **options)


def test_unique_returns_the_job_that_has_the_key(queue: Queue, worker: str) -> None:
    first = unique(queue)
    assert unique(queue) == first
    [job] = queue.dequeue(worker, DEFAULT, 5)
    assert unique(queue) == found(queue, first)
    queue.fail(job, BOOM, after=60)
    assert (unique(queue).id, unique(queue, queue="other").status) == (first.id, "pending")
    assert queue.stats()["pending"] == 1
    assert queue.waiting([*DEFAULT, "other"]) == 0


def test_unique_key_is_held_by_a_delayed_job(queue: Queue) -> None:
    first = unique(queue, delay=60)
    assert unique(queue) == first
    assert queue.waiting(DEFAULT) == 0


@pytest.mark.parametrize("status", ENDED)
def test_unique_key_is_free_when_its_job_has_ended(queue: Queue, status: str) -> None:
    first = put(queue, status, unique_key="k")
    second = unique(queue)
    assert second.id != first.id
    assert unique(queue).id == second.id


def test_unique_key_is_free_when_its_last_attempt_is_reaped(queue: Queue) -> None:
    job = put(queue, "processing", unique_key="k", max_attempts=1)
    lapse(queue, job.worker)
    queue.reap(job.worker)
    assert unique(queue).id != job.id


def test_unique_key_is_held_when_its_job_is_requeued(queue: Queue) -> None:
    job = put(queue, "processing", unique_key="k")
    lapse(queue, job.worker)
    queue.reap(job.worker)
    assert unique(queue).id == job.id
    assert queue.waiting(DEFAULT) == 1


def test_unique_key_is_free_when_its_job_has_expired(queue: Queue, worker: str) -> None:
    first = unique(queue, expires_in=5)
    queue.clock.ahead += 5001
    assert unique(queue).id == first.id
    queue.dequeue(worker, DEFAULT)
    assert unique(queue).id != first.id


def test_unique_makes_one_job_for_a_key_repeated_in_a_batch(queue: Queue) -> None:
    drafts = [queue.draft("echo", n, unique_key=key) for n, key in enumerate(["a", None, "a", "b", "a"])]
    made = queue.submit(drafts)
    assert ids(made) == ids([drafts[0], drafts[1], drafts[0], drafts[3], drafts[0]])
    assert queue.waiting(DEFAULT) == 3
    assert queue.stats()["pending"] == 3


def test_unique_stores_the_other_jobs_of_a_batch_when_a_key_is_taken(queue: Queue, worker: str) -> None:
    first = unique(queue)
    drafts = [queue.draft("echo", 1, unique_key="k"), queue.draft("echo", 2)]
    assert ids(queue.submit(drafts)) == [first.id, drafts[1].id]
    assert ids(queue.dequeue(worker, DEFAULT, 9)) == [first.id, drafts[1].id]


def test_unique_makes_one_job_when_many_submit_at_the_same_time(server: Server, queue: Queue) -> None:
    queues = [server.queue() for _ in range(20)]
    together = threading.Barrier(20)

    def submit(mine: Queue) -> str:
        together.wait()
        return unique(mine).id

    with ThreadPoolExecutor(20) as pool:
        assert len(set(pool.map(submit, queues))) == 1
    assert queue.stats()["pending"] == queue.waiting(DEFAULT) == 1


def test_unique_makes_a_new_job_when_the_key_is_freed_during_the_submit(
    near: Queue, far: Queue, proxy: CutProxy
) -> None:
    first = put(near, "processing", unique_key="k")
    assert unique(near).id == first.id
    proxy.before(b"EXEC", lambda: near.complete(first))
    made = far.submit([far.draft("echo", {}, unique_key="k"), far.draft("echo", {})])  # the second job requires a write
    assert first.id not in ids(made)
    assert near.waiting(DEFAULT) == 2


@pytest.mark.parametrize("cut", ["drop_reply", "drop_request", "hold"])
def test_unique_is_applied_once_when_a_packet_is_lost(near: Queue, far: Queue, proxy: CutProxy, cut: str) -> None:
    getattr(proxy, cut)(b"EXEC")
    job = unique(far)
    proxy.deliver()
    assert near.stats()["pending"] == near.waiting(DEFAULT) == 1
    assert unique(near).id == job.id


def test_unique_batch_counts_nothing_twice_when_it_arrives_late(
    real: Server, near: Queue, proxy: CutProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_redis, "SOCKET_TIMEOUT", 0.2)
    far = real.queue(proxy.url)
    unique(near)
    proxy.hold(b"EXEC", cut=False)
    with suppress(Unavailable):
        far.submit([far.draft("echo", {}, unique_key="k"), far.draft("echo", {})])
    proxy.deliver()
    assert near.stats()["pending"] == len(newest(near, "pending"))


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_retry_takes_its_unique_key_again(queue: Queue, status: str) -> None:
    job = put(queue, status, unique_key="k")
    assert queue.retry(job.id)
    assert unique(queue).id == job.id


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_retry_is_refused_when_another_job_has_the_unique_key(queue: Queue, status: str) -> None:
    job = put(queue, status, unique_key="k")
    other = unique(queue)
    before = dump(queue)
    with pytest.raises(WrongStatus, match=other.id):
        queue.retry(job.id)
    assert dump(queue) == before
    queue.cancel(other.id)
    assert queue.retry(job.id)


def test_retry_is_refused_when_its_unique_key_is_taken_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "failed", unique_key="k")
    proxy.before(b"EXEC", lambda: unique(near))
    with pytest.raises(WrongStatus, match="uniqueKey"):
        far.retry(job.id)
    assert found(near, job).status == "failed"


@pytest.mark.parametrize("cut", ["drop_reply", "drop_request", "hold"])
def test_retry_with_a_unique_key_is_applied_once_when_a_packet_is_lost(
    near: Queue, far: Queue, proxy: CutProxy, cut: str
) -> None:
    job = put(near, "failed", unique_key="k")
    getattr(proxy, cut)(b"EXEC")
    assert far.retry(job.id).status == "pending"
    proxy.deliver()
    assert near.stats()["pending"] == near.waiting(DEFAULT) == 1


@pytest.mark.parametrize("holder", ["01890000-0000-7000-8000-000000000000", "garbage", b"\xff"])
def test_unique_takes_over_a_key_that_names_no_job(queue: Queue, holder: Any) -> None:
    raw(queue).set(queue.keys.unique("k"), holder)
    job = unique(queue)
    assert unique(queue).id == job.id


def test_unique_takes_over_a_key_that_names_a_job_with_another_key(queue: Queue) -> None:
    other = unique(queue, "other")
    raw(queue).set(queue.keys.unique("k"), other.id)
    assert unique(queue).id != other.id


def test_once_returns_the_first_job_when_another_now_has_its_unique_key(queue: Queue) -> None:
    first = unique(queue)
    assert ids(submit_once(queue, 2, unique_key="k")) == [first.id] * 2
    queue.cancel(first.id)
    second = unique(queue)
    assert ids(submit_once(queue, 2, unique_key="k")) == [first.id] * 2
    assert second.id != first.id


@pytest.mark.parametrize("key", ["", "x" * 201, "a\nb", "a\x00", "\ud800", 7, ["k"], True, b"k"])
def test_unique_refuses_an_invalid_key(queue: Queue, key: Any) -> None:
    with pytest.raises(InvalidJob) as caught:
        queue.draft("echo", {}, unique_key=key)
    assert caught.value.field == "uniqueKey"


@pytest.mark.parametrize("key", ["x", "x" * 200, "with spaces", "ünïcødé", "{other}:job:1", "*"])
def test_unique_accepts_any_printable_key(queue: Queue, key: str) -> None:
    assert unique(queue, key) == unique(queue, key)
    assert unique(queue, "other" + key[:9]).id != unique(queue, key).id


# Expiry ---------------------------------------------------------------------------------------------------------------


def test_expired_job_fails_when_it_would_start(queue: Queue, worker: str) -> None:
    late = queue.enqueue("echo", 1, expires_in=5)
    other = queue.enqueue("echo", 2)
    queue.clock.ahead += 5000
    assert ids(queue.dequeue(worker, DEFAULT, 2)) == [other.id]
    ended = found(queue, late)
    assert (ended.status, ended.error.type, ended.attempts, ended.started_at) == ("failed", "Expired", 0, 0)
    assert ended.answer()["expiresAt"] == late.expires_at == late.created_at + 5000
    assert queue.stats()["total"]["failed"] == 1


def test_expired_job_fails_when_its_delay_is_over(queue: Queue, worker: str) -> None:
    job = queue.enqueue("echo", 1, delay=5, expires_in=10)
    queue.clock.ahead += 10_001
    queue.promote()
    assert queue.dequeue(worker, DEFAULT) == []
    assert found(queue, job).status == "failed"


@pytest.mark.parametrize("start", [{"delay": 10}, {"delay": 10.5}, {"delay": MAX_DELAY}])
def test_enqueue_refuses_a_delay_beyond_the_expiry(queue: Queue, start: dict[str, float]) -> None:
    with pytest.raises(InvalidJob, match="expiresIn: must end after the job may start"):
        queue.enqueue("echo", 1, **start, expires_in=10)
    with pytest.raises(InvalidJob, match="expiresIn: must end after the job may start"):
        queue.enqueue("echo", 1, run_at=queue.now() + round(start["delay"] * 1000), expires_in=10)
    assert queue.page() == ([], "")


def test_enqueue_accepts_a_run_time_in_the_past_with_an_expiry(queue: Queue) -> None:
    assert queue.enqueue("echo", 1, run_at=1, expires_in=0.001).run_at == 0


def test_job_starts_when_it_has_not_expired(queue: Queue, worker: str) -> None:
    queue.clock.ahead += 1
    job = queue.enqueue("echo", 1, expires_in=60)
    queue.clock.ahead += 50_000
    assert ids(queue.dequeue(worker, DEFAULT)) == [job.id]


@pytest.mark.parametrize("how", ["fail", "release", "reap"])
def test_expiry_does_not_end_a_job_that_has_started_before(queue: Queue, how: str) -> None:
    job = put(queue, "processing", expires_in=5)
    if how == "fail":
        queue.fail(job, BOOM, after=10)
    elif how == "release":
        queue.release(job)
    else:
        lapse(queue, job.worker)
        queue.reap(job.worker)
    queue.clock.ahead += 11_000
    queue.promote()
    assert ids(queue.dequeue(queue.register(DEFAULT, 1), DEFAULT)) == [job.id]


def test_retry_runs_an_expired_job(queue: Queue, worker: str) -> None:
    job = queue.enqueue("echo", 1, expires_in=5)
    queue.clock.ahead += 6000
    queue.dequeue(worker, DEFAULT)
    assert queue.retry(job.id).expires_at == 0
    assert ids(queue.dequeue(worker, DEFAULT)) == [job.id]


@pytest.mark.parametrize("cut", ["drop_reply", "drop_request", "hold"])
def test_expiry_is_applied_once_when_a_packet_is_lost(near: Queue, far: Queue, proxy: CutProxy, cut: str) -> None:
    worker = near.register(DEFAULT, 1)
    job = near.enqueue("echo", 1, expires_in=5)
    far.clock.ahead += 6000
    taken = near.take(worker, DEFAULT, 1)
    getattr(proxy, cut)(b"EXEC")
    assert [job.status for job in far.start(worker, taken)] in ([], ["pending"])  # left to adopt
    proxy.deliver()
    assert far.start(worker, far.adopt(worker, [])) == []
    assert found(near, job).error.type == "Expired"
    assert near.stats()["total"]["failed"] == 1


@pytest.mark.parametrize("seconds", [0, -1, MAX_DELAY + 1, float("nan"), float("inf"), "5", True, [5]])
def test_expiry_refuses_an_invalid_time(queue: Queue, seconds: Any) -> None:
    with pytest.raises(InvalidJob) as caught:
        queue.draft("echo", {}, expires_in=seconds)
    assert caught.value.field == "expiresIn"


# Pause and resume -----------------------------------------------------------------------------------------------------


@pytest.fixture
def immediate_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a pause take effect at once."""
    monkeypatch.setattr(tinyqueue_reading, "PAUSE_AGE", -1.0)


def test_pause_starts_no_jobs_but_accepts_them(queue: Queue, worker: str, immediate_pause: None) -> None:
    before = queue.enqueue("echo", 1)
    other = queue.enqueue("echo", 1, queue="other")
    queue.pause("default")
    after = queue.enqueue("echo", 2)
    names = ["default", "other"]
    assert (queue.waiting(DEFAULT), queue.waiting(names)) == (0, 1)
    assert queue.take(worker, DEFAULT, 5) == []
    assert ids(queue.dequeue(worker, names, 5)) == [other.id]
    assert {name: about["paused"] for name, about in queue.queues().items()} == {"default": True, "other": False}
    queue.resume("default")
    assert queue.waiting(DEFAULT) == 2
    assert ids(queue.dequeue(worker, DEFAULT, 5)) == [before.id, after.id]


def test_pause_does_not_affect_running_jobs(queue: Queue, immediate_pause: None) -> None:
    job = put(queue, "processing")
    queue.pause("default")
    job.set_progress(0.5)
    queue.complete(job)
    assert found(queue, job).status == "completed"


def test_pause_takes_effect_in_other_processes(server: Server, queue: Queue, worker: str) -> None:
    other = server.queue()
    other.waiting(DEFAULT)
    queue.pause("default")
    queue.enqueue("echo", 1)
    until(lambda: other.waiting(DEFAULT) == 0)
    assert other.take(worker, DEFAULT, 1) == []


def test_pause_and_resume_are_idempotent(queue: Queue, worker: str, immediate_pause: None) -> None:
    queue.pause("default")
    queue.pause("default")
    job = queue.enqueue("echo", 1)
    queue.resume("default")
    queue.resume("default")
    assert ids(queue.dequeue(worker, DEFAULT, 5)) == [job.id]


@pytest.mark.parametrize("name", ["", "a b", "{x}", 7, "x" * 101])
@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_pause_and_resume_refuse_an_invalid_name(queue: Queue, verb: str, name: Any) -> None:
    with pytest.raises(InvalidJob):
        getattr(queue, verb)(name)


def test_pause_shows_a_queue_that_never_had_a_job(queue: Queue) -> None:
    queue.pause("new")
    assert queue.queues() == {"new": {"pending": 0, "processing": 0, "oldestWaitingMs": 0, "paused": True}}


def test_promote_and_release_fill_a_paused_queue(queue: Queue, worker: str, immediate_pause: None) -> None:
    job = put(queue, "processing")
    delayed = put(queue, "delayed")
    queue.pause("default")
    queue.release(job)
    queue.clock.ahead += 61_000
    queue.promote()
    assert queue.dequeue(worker, DEFAULT, 5) == []
    queue.resume("default")
    assert ids(queue.dequeue(worker, DEFAULT, 5)) == [job.id, delayed.id]


def test_resume_wakes_a_waiting_worker(server: Server, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyqueue_reading, "PAUSE_AGE", 3600.0)  # only the wait can end the pause for it
    queue.pause("default")
    other = server.queue()
    assert other.waiting(DEFAULT) == 0
    with ThreadPoolExecutor(1) as pool:
        woken = pool.submit(other.wait, DEFAULT, 3.0)
        queue.resume("default")
        assert woken.result(10)
    queue.enqueue("echo", 1)
    assert other.waiting(DEFAULT) == 1


def test_resume_makes_a_running_worker_take_the_jobs(queue: Queue, work: Any) -> None:
    ran: list[Any] = []

    @handler("echo")
    def echo(payload: Any) -> None:
        ran.append(payload)

    queue.pause("default")
    work(queue, "default", "other")
    job = queue.enqueue("echo", "paused")
    other = queue.enqueue("echo", "not", queue="other")
    assert queue.wait_for(other.id, 20).status == "completed"
    assert (found(queue, job).status, ran) == ("pending", ["not"])
    queue.resume("default")
    assert queue.wait_for(job.id, 20).status == "completed"


def test_pause_outlives_the_workers(queue: Queue, work: Any) -> None:
    @handler("echo")
    def echo(payload: Any) -> None: ...

    queue.pause("default")
    stop(work(queue))
    job = queue.enqueue("echo", 1)
    restarted = work(queue)
    until(lambda: restarted.id)
    burst = work(queue, burst=True)
    burst.thread.join(20)
    assert not burst.thread.is_alive()
    assert found(queue, job).status == "pending"


def test_burst_ends_although_a_paused_queue_has_jobs(queue: Queue, work: Any) -> None:
    @handler("echo")
    def echo(payload: Any) -> None: ...

    queue.pause("default")
    backlog = queue.enqueue_many("echo", range(5))
    other = queue.enqueue("echo", 1, queue="other")
    burst = work(queue, "default", "other", burst=True)
    burst.thread.join(20)
    assert not burst.thread.is_alive()
    assert {found(queue, job).status for job in backlog} == {"pending"}
    assert found(queue, other).status == "completed"


# Cancelling running jobs ----------------------------------------------------------------------------------------------


def test_cancel_asks_a_running_job_to_stop(queue: Queue) -> None:
    job = put(queue, "processing")
    asked = queue.cancel(job.id)
    assert (asked.status, asked.cancelled, asked.answer()["cancelRequested"]) == ("processing", True, True)
    assert asked == found(queue, job)
    assert queue.cancel_requests([job.id, put(queue, "processing", queue="other").id]) == [job.id]
    assert queue.stats()["total"]["cancelled"] == 0


def test_cancel_of_a_running_job_is_idempotent(queue: Queue) -> None:
    job = put(queue, "processing")
    queue.cancel(job.id)
    before = dump(queue)
    assert queue.cancel(job.id).cancelled
    assert dump(queue) == before


def test_cancel_is_refused_when_the_running_handler_takes_no_job(queue: Queue) -> None:
    @handler("echo")
    def echo(payload: Any) -> None: ...

    job = put(queue, "processing")
    before = dump(queue)
    with pytest.raises(WrongStatus, match="takes no Job"):
        queue.cancel(job.id)
    assert dump(queue) == before


@pytest.mark.parametrize("how", ["fail and retry", "fail for good", "release", "reap"])
def test_job_that_was_asked_to_stop_ends_cancelled(queue: Queue, how: str) -> None:
    job = put(queue, "processing", unique_key="k")
    queue.cancel(job.id)
    if how.startswith("fail"):
        queue.fail(job, BOOM, after=None if how == "fail for good" else 10)
    elif how == "release":
        queue.release(job)
    else:
        lapse(queue, job.worker)
        assert queue.reap(job.worker) == 1
    ended = found(queue, job)
    assert (ended.status, ended.cancelled, ended.attempts) == ("cancelled", True, 1)
    assert queue.waiting(DEFAULT) == queue.stats()["delayed"] == queue.stats()["processing"] == 0
    assert queue.stats()["total"] == {"completed": 0, "failed": 0, "cancelled": 1}


def test_job_that_was_asked_to_stop_but_returns_ends_completed(queue: Queue) -> None:
    job = put(queue, "processing")
    queue.cancel(job.id)
    queue.complete(job, 7)
    ended = found(queue, job)
    assert (ended.status, ended.result, ended.cancelled) == ("completed", 7, False)


def test_retry_of_a_stopped_job_removes_the_request_to_stop(queue: Queue, worker: str) -> None:
    job = put(queue, "processing")
    queue.cancel(job.id)
    queue.release(job)
    assert not queue.retry(job.id).cancelled
    [again] = queue.dequeue(worker, DEFAULT)
    assert not again.cancelled
    queue.release(again)
    assert found(queue, job).status == "pending"


def test_progress_keeps_the_request_to_stop_and_shows_it_to_the_handler(queue: Queue) -> None:
    job = put(queue, "processing")
    queue.cancel(job.id)
    assert not job.cancelled
    job.set_progress(0.5)
    assert job.cancelled
    assert (found(queue, job).cancelled, found(queue, job).progress) == (True, 0.5)


@pytest.mark.parametrize("verb", ["progress", "complete", "fail", "release"])
def test_worker_write_respects_a_cancel_just_before_it(near: Queue, far: Queue, proxy: CutProxy, verb: str) -> None:
    job = put(near, "processing")
    proxy.before(b"EXEC", lambda: near.cancel(job.id))
    if verb == "progress":
        job.progress = 0.5
        far.write_progress(job)
    elif verb == "fail":
        far.fail(job, BOOM, after=5)
    else:
        getattr(far, verb)(job)
    now = found(near, job)
    expected = {"progress": "processing", "complete": "completed", "fail": "cancelled", "release": "cancelled"}
    assert (now.status, now.cancelled) == (expected[verb], verb != "complete")


def test_cancel_is_refused_when_the_job_ends_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "processing")
    proxy.before(b"EXEC", lambda: near.complete(job))
    with pytest.raises(WrongStatus, match="completed"):
        far.cancel(job.id)


@pytest.mark.parametrize("cut", ["drop_reply", "drop_request", "hold"])
def test_cancel_of_a_running_job_is_applied_when_a_packet_is_lost(
    near: Queue, far: Queue, proxy: CutProxy, cut: str
) -> None:
    job = put(near, "processing")
    getattr(proxy, cut)(b"EXEC")
    assert far.cancel(job.id).cancelled
    proxy.deliver()
    assert (found(near, job).status, found(near, job).cancelled) == ("processing", True)


def test_job_ends_cancelled_when_its_handler_sees_the_request_and_raises(queue: Queue, work: Any) -> None:
    runs: list[int] = []

    @handler("echo", timeout=30)
    def echo(payload: Any, job: Job) -> None:
        runs.append(job.attempts)
        until(lambda: job.cancelled)
        raise RuntimeError("I stop")

    job = queue.enqueue("echo", {})
    work(queue)
    until(lambda: runs)
    assert queue.cancel(job.id).status == "processing"
    ended = queue.wait_for(job.id, 20)
    assert (ended.status, ended.error.message, runs) == ("cancelled", "I stop", [1])
    assert queue.stats()["delayed"] == 0


def test_job_ends_completed_when_its_handler_sees_the_request_and_returns(queue: Queue, work: Any) -> None:
    running = threading.Event()

    @handler("echo", timeout=30)
    def echo(payload: Any, job: Job) -> str:
        running.set()
        until(lambda: job.cancelled)
        return "as far as I came"

    job = queue.enqueue("echo", {})
    work(queue)
    assert running.wait(20)
    queue.cancel(job.id)
    ended = queue.wait_for(job.id, 20)
    assert (ended.status, ended.result, ended.cancelled) == ("completed", "as far as I came", False)


def test_cancel_does_not_affect_another_running_job(queue: Queue, work: Any) -> None:
    seen: dict[str, Job] = {}
    go_on = threading.Event()

    @handler("echo", timeout=30)
    def echo(payload: str, job: Job) -> bool:
        seen[payload] = job
        if payload == "a":
            until(lambda: job.cancelled)
        else:
            go_on.wait(20)
        return job.cancelled

    a = queue.enqueue("echo", "a")
    b = queue.enqueue("echo", "b")
    work(queue, slots=2)
    until(lambda: len(seen) == 2)
    queue.cancel(a.id)
    queue.wait_for(a.id, 20)
    go_on.set()
    assert queue.wait_for(b.id, 20).result is False


def test_stopped_job_is_not_logged_as_about_to_be_retried(
    queue: Queue, work: Any, caplog: pytest.LogCaptureFixture
) -> None:
    running = threading.Event()

    @handler("echo", timeout=30)
    def echo(payload: Any, job: Job) -> None:
        running.set()
        until(lambda: job.cancelled)
        raise RuntimeError("I stop")

    job = queue.enqueue("echo", {})
    worker = work(queue)
    assert running.wait(20)
    queue.cancel(job.id)
    assert queue.wait_for(job.id, 20).status == "cancelled"
    stop(worker)
    assert not [line for line in caplog.messages if "again in" in line]


# Listings -------------------------------------------------------------------------------------------------------------


def pages(queue: Queue, filter: Filter = Filter(), limit: int = 2) -> list[list[str]]:  # noqa: B008
    """Return the ids of all pages of a listing."""
    found, cursor = queue.page(filter, limit=limit)
    all = [ids(found)]
    while cursor:
        found, cursor = queue.page(filter, limit=limit, cursor=cursor)
        all.append(ids(found))
        assert len(all) < 1000
    return all


def everything(queue: Queue, filter: Filter = Filter(), limit: int = 2) -> list[str]:  # noqa: B008
    return [id for page in pages(queue, filter, limit) for id in page]


@pytest.mark.parametrize("limit", [1, 2, 3, 50])
def test_page_lists_all_statuses_newest_first(queue: Queue, limit: int) -> None:
    made = []
    for status in ("pending", "completed", "delayed", "failed", "processing"):
        made.insert(0, put(queue, status, queue=status).id)
        queue.clock.ahead += 5
    assert everything(queue, limit=limit) == made


@pytest.mark.parametrize("delay", [0, 60])
def test_page_lists_a_cancelled_job_once(queue: Queue, delay: int) -> None:
    job = queue.enqueue("echo", {}, delay=delay)
    queue.clock.ahead += 5
    queue.cancel(job.id)
    assert everything(queue) == [job.id]


@pytest.mark.parametrize("status", ["pending", "processing", "completed", "failed", "cancelled"])
@pytest.mark.parametrize("limit", [1, 2, 4, 50])
def test_page_lists_one_status_newest_first(queue: Queue, status: str, limit: int) -> None:
    made = []
    for name in ("a", "b", "c", "d"):
        made.insert(0, put(queue, status, queue=name).id)
        put(queue, "completed" if status != "completed" else "failed", queue=name + "x")
        queue.clock.ahead += 5
    assert everything(queue, Filter(status), limit) == made
    assert all(len(page) <= limit for page in pages(queue, Filter(status), limit))


def test_page_lists_only_jobs_that_match_all_filters(queue: Queue, worker: str) -> None:
    a = queue.enqueue("mail", 1)
    queue.clock.ahead += 5
    b = queue.enqueue("mail", 2, queue="other")
    queue.clock.ahead += 5
    c = queue.enqueue("sum", 3)
    d = queue.enqueue("mail", 4, max_attempts=1)
    queue.clock.ahead += 5
    for job in queue.dequeue(worker, DEFAULT, 9)[1:]:
        queue.fail(job, Failure("Boom" if job.type == "mail" else "Bang", ""))
    assert everything(queue, Filter(type="mail")) == [d.id, b.id, a.id]
    assert everything(queue, Filter(queue="other")) == [b.id]
    assert set(everything(queue, Filter("failed"))) == {c.id, d.id}
    assert everything(queue, Filter(error_type="Bang")) == [c.id]
    assert everything(queue, Filter("failed", "mail", "default", "Boom")) == [d.id]
    assert everything(queue, Filter("failed", "mail", "default", "Bang")) == []
    assert everything(queue, Filter("processing")) == [a.id]


def test_page_continues_at_its_cursor_while_jobs_come_and_go(queue: Queue) -> None:
    made = []
    for name in "abcdefgh":
        made.insert(0, put(queue, "failed", queue=name).id)
        queue.clock.ahead += 5
    first, cursor = queue.page(Filter("failed"), limit=3)
    assert ids(first) == made[:3]
    queue.retry(made[2])  # the last job of the page leaves the listing
    queue.retry(made[4])
    put(queue, "failed", queue="new")
    second, cursor = queue.page(Filter("failed"), limit=3, cursor=cursor)
    assert ids(second) == [made[3], made[5], made[6]]
    third, cursor = queue.page(Filter("failed"), limit=3, cursor=cursor)
    assert (ids(third), cursor) == ([made[7]], "")


def test_page_lists_every_job_of_many_that_ended_in_the_same_millisecond(near: Queue) -> None:
    near.store.clock = FixedClock()
    made: list[str] = []
    for _ in range(3):
        worker = near.register(DEFAULT, 500)
        made += ids(near.enqueue_many("echo", range(1000)))
        jobs = near.dequeue(worker, DEFAULT, 1000)
        near.settle(worker, [Outcome(job, "complete") for job in jobs])
    near.clock.ahead -= 1000
    made.append(put(near, "completed").id)
    assert sorted(everything(near, Filter("completed"), 500)) == sorted(made)


def test_page_examines_a_limited_number_and_may_be_empty(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyqueue_reading, "SCANNED", 3)
    first = queue.enqueue("rare", {})
    queue.clock.ahead += 5
    queue.enqueue_many("echo", range(7))
    found = pages(queue, Filter(type="rare"), limit=1)
    assert found[:2] == [[], []]
    assert [id for page in found for id in page] == [first.id]


def test_page_has_no_cursor_without_jobs(queue: Queue) -> None:
    assert queue.page() == ([], "")


def test_page_has_no_cursor_when_it_is_full_and_the_last(queue: Queue) -> None:
    jobs = queue.enqueue_many("echo", range(2))
    found, cursor = queue.page(limit=2)
    assert (set(ids(found)), cursor) == (set(ids(jobs)), "")


@pytest.mark.parametrize(
    "cursor", ["x", "1", "1.", ".a", "1.x", "-1.a", "1.a\n", "99999999999999999.a", "1.a 1.a", "\u0661.a"]
)
@pytest.mark.parametrize("call", ["page", "change_many"])
def test_page_refuses_an_invalid_cursor(queue: Queue, cursor: str, call: str) -> None:
    calls = {
        "page": lambda: queue.page(cursor=cursor),
        "change_many": lambda: queue.change_many("cancel", Filter(), cursor),
    }
    with pytest.raises(InvalidJob) as caught:
        calls[call]()
    assert caught.value.field == "cursor"


def test_page_skips_entries_whose_records_are_missing(queue: Queue) -> None:
    gone = put(queue, "failed", queue="a")
    kept = put(queue, "failed", queue="b")
    raw(queue).delete(queue.keys.job(gone.id))
    assert everything(queue, Filter("failed"), 1) == [kept.id]
    raw(queue).zrem(queue.keys.ended["failed"], gone.id)


def enqueue_thousands(queue: Queue, count: int, **options: Any) -> list[str]:
    return [id for _ in range(count) for id in ids(queue.enqueue_many("echo", range(1000), **options))]


def test_page_lists_every_job_of_more_delayed_ones_than_one_command_reads(near: Queue) -> None:
    made = enqueue_thousands(near, 12, delay=3600)
    assert everything(near, Filter("pending"), 500) == sorted(made, reverse=True)


def test_page_lists_delayed_jobs_newest_first_whenever_they_are_due(near: Queue) -> None:
    late = [id for at in range(11) for id in enqueue_thousands(near, 1, delay=3600 - at)]
    assert everything(near, limit=500) == sorted(late, reverse=True)


def test_page_lists_every_job_of_a_long_queue_in_no_order(near: Queue) -> None:
    made = enqueue_thousands(near, 12)
    shuffled = random.sample(made, len(made))
    raw(near).delete(near.keys.jobs("default"))
    raw(near).lpush(near.keys.jobs("default"), *shuffled)
    assert everything(near, Filter("pending"), 500) == sorted(made, reverse=True)


def test_first_page_reads_only_the_newest_of_a_long_queue(near: Queue) -> None:
    for _ in range(20):
        near.clock.ahead += 1000
        near.enqueue_many("echo", range(1000))
        near.enqueue_many("echo", range(100), queue="other")
    client = raw(near)
    before = client.info("stats")["total_net_output_bytes"]
    jobs, cursor = near.page(Filter("pending"), limit=150)
    sent = client.info("stats")["total_net_output_bytes"] - before
    assert sorted((job.id for job in jobs), reverse=True) == [job.id for job in jobs]
    assert {job.queue for job in jobs} == {"default", "other"}
    assert len(jobs) == 150
    assert cursor
    assert sent < 400_000, "all ids have 900 KB"


@pytest.fixture
def few_scanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page needs the beginning of a list only, even of one with a few hundred entries."""
    monkeypatch.setattr(tinyqueue_reading, "SCANNED", 20)


def submitted(queue: Queue, number: int, **options: Any) -> list[str]:
    """Submit jobs, ten of them every two seconds, and return their ids, newest first."""
    ids: list[str] = []
    while len(ids) < number:
        queue.clock.ahead += 2000
        ids += [job.id for job in queue.enqueue_many("echo", range(min(10, number - len(ids))), **options)]
    return ids[::-1]


@pytest.mark.usefixtures("few_scanned")
@pytest.mark.parametrize("fresh", [1, 3, 30])
def test_first_page_lists_new_jobs_behind_old_ones_that_were_retried(near: Queue, fresh: int) -> None:
    old = submitted(near, 503)
    new = submitted(near, fresh)
    near.clock.ahead += 3_600_000
    for id in reversed(old):
        near.cancel(id)
        near.retry(id)
    assert raw(near).llen(near.keys.jobs("default")) == 1006 + fresh
    assert [job.id for job in near.page(limit=10)[0]] == sorted(new + old, reverse=True)[:10]


@pytest.mark.usefixtures("few_scanned")
def test_first_page_lists_a_new_job_that_was_hastened_past_old_ones(near: Queue) -> None:
    submitted(near, 1000)
    [new] = submitted(near, 1, delay=600)
    assert near.hasten(new)
    assert near.page(limit=10)[0][0].id == new


@pytest.mark.usefixtures("few_scanned")
def test_first_page_lists_a_new_job_between_old_ones_that_were_delayed_and_older_ones(near: Queue) -> None:
    submitted(near, 500)
    delayed = submitted(near, 505, delay=2 * 3600)  # so that no probe meets the new one
    [new] = submitted(near, 1)
    near.clock.ahead += 3 * 3_600_000
    while near.promote():
        pass
    assert [job.id for job in near.page(limit=10)[0]] == [new, *delayed[:9]]


@pytest.mark.usefixtures("few_scanned")
@pytest.mark.parametrize("others", [0, 1, 2, 40])
def test_pages_list_every_job_once_of_a_long_queue_with_jobs_in_other_places(near: Queue, others: int) -> None:
    ids = submitted(near, 300)
    ids += submitted(near, others, delay=50)
    ids += submitted(near, 300)
    near.promote()
    for id in random.Random(7).sample(ids, others):
        near.cancel(id)
        near.retry(id)
    ids += submitted(near, 300)
    ids += (late := submitted(near, others, delay=600))
    for id in late[:2]:
        near.hasten(id)
    found: list[str] = []
    cursor = ""
    while cursor or not found:
        jobs, cursor = near.page(Filter("pending"), limit=15, cursor=cursor)
        found += [job.id for job in jobs]
    assert found == sorted(ids, reverse=True)


def test_page_lists_delayed_jobs_that_are_promoted_meanwhile(near: Queue) -> None:
    made = enqueue_thousands(near, 12, delay=60)
    found, cursor = near.page(limit=500)
    listed = ids(found)
    near.clock.ahead += 61_000
    while cursor:
        near.promote()
        found, cursor = near.page(limit=500, cursor=cursor)
        listed += ids(found)
    assert listed == sorted(made, reverse=True)


def test_page_lists_a_pending_job_in_the_list_of_a_worker(queue: Queue, worker: str) -> None:
    job = queue.enqueue("echo", {})
    assert queue.take(worker, DEFAULT, 1) == [job.id.encode()]
    assert ids(newest(queue, "pending")) == [job.id]
    assert queue.page(Filter("processing")) == ([], "")
    queue.start(worker, [job.id.encode()])


def test_page_goes_on_past_entries_that_name_no_job(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyqueue_reading, "SCANNED", 3)
    job = queue.enqueue("echo", {})
    copies = [job.id, *(f"{at:08x}-nonsense" for at in range(9))] * 4
    raw(queue).lpush(queue.keys.jobs("default"), *copies)
    queue.clock.ahead += 5
    made = [job.id, *ids(queue.enqueue_many("echo", range(5)))]
    raw(queue).lpush(queue.keys.jobs("default"), *made, *made)
    assert everything(queue, limit=1) == made[::-1]


def test_page_of_one_queue_lists_no_other(queue: Queue) -> None:
    [first, second] = [put(queue, status, queue="a").id for status in ("pending", "delayed")]
    put(queue, "pending", queue="b")
    assert everything(queue, Filter(queue="a"), 1) == [second, first]


# Bulk changes ---------------------------------------------------------------------------------------------------------


def test_cancel_many_cancels_matching_jobs(queue: Queue) -> None:
    fitting = queue.enqueue_many("mail", range(3)) + queue.enqueue_many("mail", range(2), delay=60)
    other = queue.enqueue("sum", 1)
    ended = put(queue, "completed", queue="q")
    assert queue.change_many("cancel", Filter("pending", "mail")) == {"cancelled": 5, "skipped": 0, "cursor": ""}
    assert {found(queue, job).status for job in fitting} == {"cancelled"}
    assert (found(queue, other).status, found(queue, ended).status) == ("pending", "completed")
    assert queue.change_many("cancel", Filter("pending", "mail")) == {"cancelled": 0, "skipped": 0, "cursor": ""}


def test_retry_many_revives_matching_jobs(queue: Queue) -> None:
    jobs = [put(queue, status, queue=status) for status in ("failed", "cancelled", "completed", "pending")]
    assert queue.change_many("retry", Filter("failed")) == {"retried": 1, "skipped": 0, "cursor": ""}
    assert [found(queue, job).status for job in jobs] == ["pending", "cancelled", "completed", "pending"]


def test_retry_many_skips_jobs_that_cannot_be_retried(queue: Queue) -> None:
    for status in ("failed", "completed", "pending"):
        put(queue, status, queue=status)
    assert queue.change_many("retry", Filter()) == {"retried": 1, "skipped": 2, "cursor": ""}


def test_retry_many_revives_one_job_for_each_unique_key(queue: Queue) -> None:
    for _ in range(3):
        put(queue, "failed", unique_key="k")
    assert queue.change_many("retry", Filter("failed")) == {"retried": 1, "skipped": 2, "cursor": ""}


@pytest.mark.parametrize(
    ("verb", "word", "status"), [("cancel", "cancelled", "pending"), ("retry", "retried", "failed")]
)
def test_change_many_continues_at_its_cursor(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, verb: Any, word: str, status: str
) -> None:
    monkeypatch.setattr(tinyqueue_reading, "SCANNED", 2)
    for name in "abcde":
        put(queue, status, queue=name)
    counts = []
    cursor = ""
    while not counts or cursor:
        answer = queue.change_many(verb, Filter(status), cursor)
        counts.append((answer[word], answer["skipped"]))
        cursor = answer["cursor"]
    assert counts == [(2, 0), (2, 0), (1, 0)]
    assert newest(queue, status) == []


def test_cancel_many_skips_jobs_that_change_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    near.enqueue_many("echo", range(3))

    def cancel_all() -> None:
        for job in newest(near, "pending"):
            near.cancel(job.id)

    proxy.before(b"WATCH", cancel_all)
    assert far.change_many("cancel", Filter("pending")) == {"cancelled": 0, "skipped": 3, "cursor": ""}


def test_cancel_many_reaches_every_job_of_a_long_queue(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyqueue_reading, "LISTED", 5)
    jobs = queue.enqueue_many("echo", range(12))
    cursor = queue.change_many("cancel", Filter("pending"))["cursor"]
    while cursor:
        cursor = queue.change_many("cancel", Filter("pending"), cursor)["cursor"]
    assert {found(queue, job).status for job in jobs} == {"cancelled"}


def test_cancel_many_reaches_every_job_of_many_delayed_ones(near: Queue) -> None:
    enqueue_thousands(near, 11, delay=3600)
    cancelled = 0
    cursor = ""
    while not cancelled or cursor:
        answer = near.change_many("cancel", Filter("pending"), cursor)
        cancelled += answer["cancelled"]
        cursor = answer["cursor"]
    assert cancelled == 11_000
    assert near.stats()["delayed"] == 0


def test_cancel_many_asks_running_jobs_to_stop_or_skips_them(queue: Queue) -> None:
    @handler("deaf")
    def deaf(payload: Any) -> None: ...

    job = put(queue, "processing")
    queue.enqueue("deaf", {}, queue="other")
    queue.dequeue(queue.register(["other"], 1), ["other"])
    assert queue.change_many("cancel", Filter("processing")) == {"cancelled": 1, "skipped": 1, "cursor": ""}
    assert found(queue, job).cancelled


# Waiting for the end of a job -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["complete", "fail", "cancel", "reap", "expire"])
def test_wait_for_returns_when_the_job_ends(server: Server, queue: Queue, how: str) -> None:
    job = put(
        queue, "processing" if how in ("complete", "fail", "reap") else "pending", max_attempts=1, expires_in=3600
    )
    other = server.queue()
    subscribed = threading.Event()

    def end() -> None:
        assert subscribed.wait(20)
        if how == "complete":
            queue.complete(job)
        elif how == "fail":
            queue.fail(job, BOOM)
        elif how == "cancel":
            queue.cancel(job.id)
        elif how == "reap":
            lapse(queue, job.worker)
            queue.reap(job.worker)
        else:
            queue.clock.ahead += 3700_000
            queue.dequeue(queue.register(DEFAULT, 1), DEFAULT)

    with ThreadPoolExecutor(2) as pool:
        ending = pool.submit(end)
        waiting = pool.submit(other.wait_for, job.id, 60)
        until(lambda: raw(queue).sismember(queue.keys.awaited, job.id))
        begun = time.monotonic()
        subscribed.set()
        ended = waiting.result(30)
        ending.result(30)
        assert time.monotonic() - begun < 4, "it was not woken, but looked again after a timeout"
    assert ended == found(queue, job)
    assert ended.status in ENDED


def test_wait_for_reads_the_job_three_times(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "processing")
    other = put(near, "processing", queue="other")
    far.get(job.id)
    proxy.packets.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(far.wait_for, job.id, 60)
        until(lambda: any(b"BLPOP" in packet for packet in proxy.packets))
        near.complete(other)
        near.complete(job)
        assert waiting.result(30).status == "completed"
    assert sum(b"GET" in packet or b"ZSCORE" in packet for packet in proxy.packets) == 3
    assert sum(b"BLPOP" in packet for packet in proxy.packets) == 1


def test_wait_for_returns_when_the_job_ends_just_before_the_wait(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = put(near, "processing")
    proxy.before(b"SADD", lambda: near.complete(job))
    assert far.wait_for(job.id, 60).status == "completed"
    assert not any(b"BLPOP" in packet for packet in proxy.packets)


@pytest.mark.parametrize("status", ENDED)
def test_wait_for_returns_at_once_when_the_job_has_ended(queue: Queue, status: str) -> None:
    job = put(queue, status)
    assert queue.wait_for(job.id, 60) == job


@pytest.mark.parametrize("id", ["01890000-0000-7000-8000-000000000000", "", "no id"])
def test_wait_for_returns_none_for_an_unknown_job(queue: Queue, id: str) -> None:
    assert queue.wait_for(id, 60) is None


@pytest.mark.parametrize("seconds", [0, -1, 0.05])
def test_wait_for_returns_the_unchanged_job_when_the_time_is_up(queue: Queue, seconds: float) -> None:
    job = put(queue, "pending")
    assert queue.wait_for(job.id, seconds) == job
    assert queue.get(job.id) == job  # the connection is still usable


def test_wait_for_wakes_all_who_wait_for_the_same_job(server: Server, queue: Queue) -> None:
    job = put(queue, "processing")
    other = server.queue()
    with ThreadPoolExecutor(20) as pool:
        waiting = [pool.submit(other.wait_for, job.id, 60) for _ in range(20)]
        until(
            lambda: (
                raw(queue).info("clients")["blocked_clients"] == 20
                if server.url
                else raw(queue).sismember(queue.keys.awaited, job.id)
            )
        )
        queue.complete(job)
        assert {each.result(30).status for each in waiting} == {"completed"}


@pytest.mark.parametrize("packet", [b"GET", b"SADD", b"BLPOP"])
@pytest.mark.parametrize("cut", ["drop_reply", "drop_request"])
def test_wait_for_raises_unavailable_when_its_connection_is_cut(
    near: Queue, far: Queue, proxy: CutProxy, cut: str, packet: bytes
) -> None:
    job = put(near, "processing")
    getattr(proxy, cut)(packet)
    if (cut, packet) == ("drop_reply", b"BLPOP"):
        proxy.packets.clear()
        threading.Timer(0.1, near.complete, [job]).start()  # until then there is no reply to drop
    with pytest.raises(Unavailable):
        far.wait_for(job.id, 60)
    assert far.get(job.id) == found(near, job)


def test_wait_for_leaves_no_keys_behind(queue: Queue) -> None:
    job = put(queue, "processing")
    assert queue.wait_for(job.id, 0.05) == job
    assert not raw(queue).exists(queue.keys.awaited)
    queue.complete(job)
    assert not raw(queue).exists(queue.keys.done(job.id))


# Counts and limits ----------------------------------------------------------------------------------------------------


def test_queues_count_the_oldest_wait_from_when_the_job_could_start(queue: Queue) -> None:
    """Not from when it was enqueued: neither a delay nor an end before a retry is a wait."""
    queue.enqueue("echo", 1, delay=20)
    queue.clock.ahead += 23_000
    queue.promote()
    assert 2000 <= queue.stats()["oldestWaitingMs"] < 10_000
    failed = put(queue, "failed", queue="other")
    queue.clock.ahead += 200_000
    queue.retry(failed.id)
    assert queue.queues()["other"]["oldestWaitingMs"] < 10_000


def test_queues_report_how_long_the_oldest_job_has_waited(queue: Queue, worker: str) -> None:
    queue.enqueue("echo", 1)
    queue.clock.ahead += 5000
    queue.enqueue("echo", 2)
    queue.enqueue("echo", 3, queue="other")
    queue.clock.ahead += 2000
    queues = queue.queues()
    assert 7000 <= queues["default"]["oldestWaitingMs"] < 20_000
    assert 2000 <= queues["other"]["oldestWaitingMs"] < 7000
    assert 7000 <= queue.stats()["oldestWaitingMs"] < 20_000
    queue.dequeue(worker, DEFAULT)
    assert 2000 <= queue.stats()["oldestWaitingMs"] < 7000


def test_queues_report_no_waiting_time_when_nothing_waits(queue: Queue) -> None:
    put(queue, "delayed", queue="a")
    put(queue, "processing", queue="b")
    put(queue, "cancelled", queue="c")
    queue.clock.ahead += 5000
    assert {about["oldestWaitingMs"] for about in queue.queues().values()} == {0}


def test_stats_count_jobs_that_ended_in_the_last_minute(queue: Queue) -> None:
    queue.store.clock = FixedClock()  # stands at the beginning of a minute
    for status in ENDED:
        put(queue, status, queue=status)
    put(queue, "completed", queue="another")
    expected = {"completed": 2, "failed": 1, "cancelled": 1}
    queue.clock.ahead += 59_000
    assert queue.stats()["lastMinute"] == expected
    queue.clock.ahead += 1000
    assert queue.stats()["lastMinute"] == expected
    queue.clock.ahead += 30_000  # in the middle of the next minute, half of the last one counts
    assert queue.stats()["lastMinute"] == {"completed": 1, "failed": 0, "cancelled": 0}
    queue.clock.ahead += 30_000
    assert queue.stats()["lastMinute"] == dict.fromkeys(ENDED, 0)
    assert queue.stats()["total"] == expected
    [minute] = [key for key in dump(queue) if key.startswith(queue.keys.prefix + "minute:")]
    assert 0 < raw(queue).ttl(minute) <= 7200


def test_history_counts_starts_ends_and_waiting_time_of_each_minute(queue: Queue) -> None:
    queue.store.clock = FixedClock()
    begun = queue.now()
    for delay in (0, 5):
        queue.enqueue("echo", 1, delay=delay)
    queue.clock.ahead += 60_000 + 7000
    queue.promote()
    worker = queue.register(DEFAULT, 2)
    for job in queue.dequeue(worker, DEFAULT, 2):
        queue.complete(job)
    nothing = {"started": 0, "completed": 0, "failed": 0, "cancelled": 0, "retried": 0, "waitedMs": 0}
    [before, now] = queue.stats(2)["history"]
    assert before == {"at": begun, **nothing}
    assert now == {"at": begun + 60_000, **nothing, "started": 2, "completed": 2, "waitedMs": 67_000 + 62_000}
    queue.clock.ahead += 60_000
    assert queue.stats(2)["history"] == [now, {"at": begun + 120_000, **nothing}]
    assert "history" not in queue.stats()


def test_stats_count_jobs_that_are_retrying(queue: Queue) -> None:
    worker = queue.register(DEFAULT, 3)
    queue.enqueue_many("echo", [1, 2, 3])
    failing, failed, released = queue.dequeue(worker, DEFAULT, 3)
    queue.fail(failing, Failure("Boom", "it broke"), 60)
    queue.fail(failed, Failure("Boom", "it broke"))
    queue.release(released)
    stats = queue.stats(1)
    assert (stats["pending"], stats["delayed"], stats["retrying"]) == (2, 1, 1)
    assert stats["history"][0]["retried"] == 1


@pytest.mark.parametrize("end", ["start", "cancel"])
def test_stats_count_a_job_as_retrying_until_its_next_attempt(queue: Queue, end: str) -> None:
    queue.store.clock = FixedClock()
    worker = queue.register(DEFAULT, 1)
    id = queue.enqueue("echo", 1).id
    [job] = queue.dequeue(worker, DEFAULT)
    queue.fail(job, Failure("Boom", "it broke"), 1)
    assert queue.stats()["retrying"] == 1
    queue.clock.ahead += 2000
    queue.promote()
    assert queue.stats()["retrying"] == 1
    if end == "cancel":
        queue.cancel(id)
    else:
        queue.dequeue(worker, DEFAULT)
    assert queue.stats()["retrying"] == 0


def test_trim_corrects_the_count_of_retrying_jobs_once_none_is_pending(queue: Queue) -> None:
    queue.enqueue("echo", 1)
    raw(queue).hset(queue.keys.counts, "retrying", 2)  # as if a version without the count had ended two of them
    queue.trim()
    assert queue.stats()["retrying"] == 2
    worker = queue.register(DEFAULT, 1)
    [job] = queue.dequeue(worker, DEFAULT)
    queue.complete(job)
    queue.trim()
    assert queue.stats()["retrying"] == 0


def test_recent_counts_attempts_by_type_and_error(queue: Queue) -> None:
    queue.store.clock = FixedClock()
    begun = queue.now()
    worker = queue.register(DEFAULT, 4)
    queue.enqueue_many("echo", [1, 2, 3])
    queue.enqueue("other", 1)
    first, second, third, other = queue.dequeue(worker, DEFAULT, 4)
    queue.complete(first)
    queue.fail(second, Failure("Boom", "it broke"), 60)
    queue.fail(third, Failure("Crash: a:b", "it crashed"))
    queue.settle(worker, [Outcome(other, "release", error=Failure("RateLimited", "later"), after=60, halt=True)])
    errors = {"Boom": 1, "Crash: a:b": 1}
    minute = {"at": begun, "types": {"echo": {"completed": 1, "failed": 2, "errors": errors}}}
    assert queue.recent(2) == [{"at": begun - 60_000, "types": {}}, minute]


def test_recent_counts_an_attempt_that_was_lost_with_its_worker(queue: Queue) -> None:
    worker = queue.register(DEFAULT, 1)
    queue.enqueue("echo", 1)
    queue.dequeue(worker, DEFAULT)
    queue.store.read(("DEL", queue.keys.lease(worker)))
    queue.reap(worker)
    [minute] = [minute for minute in queue.recent(2) if minute["types"]]
    assert minute["types"] == {"echo": {"completed": 0, "failed": 1, "errors": {"WorkerLost": 1}}}


@pytest.mark.parametrize("verb", ["fail", "release", "retry"])
def test_history_counts_waiting_time_of_a_later_attempt_from_its_requeue(queue: Queue, verb: str) -> None:
    queue.store.clock = FixedClock()
    queue.enqueue("echo", 1)
    worker = queue.register(DEFAULT, 1)
    queue.clock.ahead += 10_000
    [job] = queue.dequeue(worker, DEFAULT)
    queue.clock.ahead += 10_000
    if verb == "release":
        queue.release(job)
    else:
        queue.fail(job, BOOM, after=3 if verb == "fail" else None)
    if verb == "retry":
        queue.clock.ahead += 10_000
        queue.retry(job.id)
    queue.clock.ahead += 4000
    queue.promote()
    queue.dequeue(worker, DEFAULT)
    [now] = queue.stats(1)["history"]
    assert (now["started"], now["waitedMs"]) == (2, 10_000 + (1000 if verb == "fail" else 4000))


def test_spend_counts_down_within_a_window(queue: Queue) -> None:
    queue.store.clock = FixedClock()
    assert [queue.spend("me", 2, 60) for _ in range(3)] == [(1, 60), (0, 60), (-1, 60)]
    assert queue.spend("2001:db8::1", 2, 60) == (1, 60)
    queue.clock.ahead += 59_000
    assert queue.spend("me", 2, 60) == (-2, 1)
    queue.clock.ahead += 1000
    assert queue.spend("me", 2, 60) == (1, 60)
    assert all(0 < raw(queue).ttl(key) <= 60 for key in dump(queue) if key.startswith(queue.keys.prefix + "rate:"))


def test_spend_counts_every_request_of_many_at_the_same_time(queue: Queue) -> None:
    queue.store.clock = FixedClock()
    with ThreadPoolExecutor(8) as pool:
        left = [left for left, _ in pool.map(lambda _: queue.spend("me", 10, 3600), range(40))]
    assert sorted(left, reverse=True) == list(range(9, -31, -1))


def test_max_pending_refuses_further_jobs(server: Server) -> None:
    queue = server.queue(max_pending=2)
    worker = queue.register(DEFAULT, 1)
    queue.enqueue("echo", 1)
    with pytest.raises(QueueFull, match="default"):
        queue.enqueue_many("echo", range(2))
    queue.enqueue("echo", 2, delay=60)
    before = dump(queue)
    with pytest.raises(QueueFull):
        queue.enqueue("echo", 3)
    with pytest.raises(QueueFull):
        submit_once(queue)
    assert dump(queue) == before
    queue.enqueue("echo", 3, queue="other")
    queue.dequeue(worker, DEFAULT)
    queue.enqueue("echo", 4)
    check_consistency(queue)


def test_max_pending_accepts_submits_that_store_nothing(server: Server) -> None:
    queue = server.queue(max_pending=2)
    first = submit_once(queue, unique_key="k")
    second = unique(queue, "other")
    assert submit_once(queue, unique_key="k") == first
    assert unique(queue, "other") == second
    check_consistency(queue)


def test_max_pending_does_not_apply_to_requeued_jobs(server: Server) -> None:
    queue = server.queue(max_pending=1)
    job = put(queue, "processing")
    failed = put(queue, "failed")
    queue.enqueue("echo", 1)
    queue.release(job)
    assert queue.retry(failed.id)
    assert queue.stats()["pending"] == 3
    check_consistency(queue)


@pytest.fixture
def own_redis(start_redis: Callable[..., RedisServer]) -> Iterator[Queue]:
    """A queue on a real server that no other test uses."""
    queue = Queue.from_url(start_redis("--maxmemory-policy", "noeviction").url)
    yield queue
    check_consistency(queue)
    queue.pool.disconnect()


def test_refuse_new_jobs_but_let_others_end_when_memory_is_short(
    own_redis: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyqueue_redis, "MEMORY_AGE", 0.2)
    job = put(own_redis, "processing")
    used = raw(own_redis).info("memory")["used_memory"]
    raw(own_redis).config_set("maxmemory", int(used / 0.97))
    fresh = Queue(own_redis.pool)
    assert memory_is_short(fresh)
    for submit in (lambda: fresh.enqueue("echo", 1), lambda: submit_once(fresh), lambda: unique(fresh)):
        with pytest.raises(Unavailable) as caught:
            submit()
        assert (caught.value.reason, caught.value.doubtful) == ("full", False)
    raw(own_redis).config_set("maxmemory", used * 2)
    fresh.complete(job)
    until(lambda: not memory_is_short(fresh))
    fresh.enqueue("echo", 1)


@pytest.mark.parametrize("rules", [["&*"], ["&*", "-@dangerous"], []], ids=["all", "no INFO", "no channels"])
def test_user_with_usual_permissions_can_submit_and_end_jobs(own_redis: Queue, rules: list[str]) -> None:
    raw(own_redis).execute_command(
        "ACL", "SETUSER", "app", "on", ">secret", "~{queue}*", "resetchannels", "+@all", *rules
    )
    queue = Queue.from_url(f"redis://app:secret@127.0.0.1:{own_redis.pool.connection_kwargs['port']}/0")
    queue.submit([queue.draft("echo", 1)])
    [job] = queue.dequeue(queue.register(DEFAULT, 1), DEFAULT)
    queue.complete(job)
    assert found(own_redis, job).status == "completed"
    queue.pool.disconnect()


def memory_is_short(queue: Queue) -> bool:
    return memory_use(queue.store.memory()) > MEMORY_SHARE


def test_memory_is_never_short_without_a_limit(queue: Queue) -> None:
    assert not memory_is_short(queue)


def test_data_stays_consistent_when_everything_happens_at_once(server: Server, queue: Queue) -> None:
    def client(seed: int) -> None:
        mine = server.queue()
        chance = random.Random(seed)
        for n in range(200):
            key = chance.choice(["a", "b", "c"])
            with suppress(WrongStatus, KeyReused, Unavailable):
                match chance.randrange(6):
                    case 0:
                        drafts = [mine.draft("echo", n, unique_key=chance.choice([key, None])) for _ in range(3)]
                        mine.submit(drafts, chance.choice([None, Once(f"{seed % 2} {n}", "")]))
                    case 1:
                        mine.enqueue("echo", n, delay=60)
                    case 2:
                        mine.change_many("cancel", Filter(chance.choice(["pending", "processing"])))
                    case 3:
                        mine.change_many("retry", Filter(chance.choice(["failed", "cancelled"])))
                    case 4:
                        mine.pause("default")
                    case _:
                        mine.resume("default")
                        mine.page(limit=5)

    def work(seed: int) -> None:
        mine = server.queue()
        chance = random.Random(seed)
        id = mine.register(DEFAULT, 5)
        for _ in range(200):
            jobs = mine.dequeue(id, DEFAULT, 5)
            for job in jobs:
                job.set_progress(chance.random())
            verbs = [chance.choice(["complete", "fail", "release"]) for _ in jobs]
            mine.settle(id, [Outcome(job, verb, error=BOOM) for job, verb in zip(jobs, verbs, strict=True)])
        mine.deregister(id)

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(work if seed % 2 else client, seed) for seed in range(8)]
        for each in running:
            each.result(120)


# Many queues ----------------------------------------------------------------------------------------------------------


def test_submit_refuses_one_queue_too_many(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyqueue, "MAX_QUEUES", 3)
    queue = server.queue()
    for name in "abc":
        queue.enqueue("echo", 1, queue=name)
    for other in (queue, server.queue()):
        with pytest.raises(QueueFull, match="queue d is one too many: there are 3 queues with jobs"):
            other.enqueue("echo", 1, queue="d")
        other.enqueue("echo", 1, queue="a")
    assert list(queue.queues()) == ["a", "b", "c"]
    check_consistency(queue)


def test_submit_of_a_batch_with_too_many_queues_stores_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyqueue, "MAX_QUEUES", 3)
    queue = server.queue()
    with pytest.raises(QueueFull):
        queue.submit([queue.draft("echo", 1, queue=name) for name in "abcd"])
    assert queue.page() == ([], "")
    assert len(queue.submit([queue.draft("echo", 1, queue=name) for name in "abc"])) == 3


def test_submit_reads_the_names_of_queues_once(near: Queue, far: Queue, proxy: CutProxy) -> None:
    far.enqueue("echo", 1)
    far.enqueue("echo", 2)  # reads the series of the metrics
    proxy.packets.clear()
    far.enqueue("echo", 3)
    assert not any(b"HGETALL" in packet for packet in proxy.packets)
    assert len(proxy.packets) == 1


def test_trim_forgets_queues_without_jobs_when_there_are_many(queue: Queue) -> None:
    made = [queue.enqueue("echo", 1, queue=f"q{at}") for at in range(130)]
    put(queue, "processing", queue="busy")
    put(queue, "completed", queue="done")
    put(queue, "delayed", queue="later")
    for job in made[5:]:
        queue.cancel(job.id)
    queue.pause("q100")
    queue.trim()  # drops the ids of the cancelled jobs
    queue.trim()
    assert set(queue.queues()) == {"busy", "later", "q0", "q1", "q2", "q3", "q4", "q100"}
    left = {key.decode() for key in raw(queue).keys("*q129")}
    assert left == set()
    assert queue.enqueue("echo", 1, queue="q129").queue == "q129"
    assert queue.queues()["q129"]["pending"] == 1


def test_trim_keeps_queues_without_jobs_when_there_are_few(queue: Queue) -> None:
    put(queue, "completed", queue="done")
    queue.trim()
    assert list(queue.queues()) == ["done"]


def test_trim_loses_no_job_that_arrives_meanwhile(near: Queue, far: Queue, proxy: CutProxy) -> None:
    for at in range(110):
        put(near, "completed", queue=f"q{at}")
    proxy.before(b"HDEL", lambda: near.enqueue("echo", 1, queue="q7"))
    far.trim()
    assert list(near.queues()) == ["q7"]


def test_trim_loses_no_job_of_a_queue_whose_count_is_wrong(queue: Queue) -> None:
    for at in range(110):
        put(queue, "completed", queue=f"q{at}")
    job = queue.enqueue("echo", 1, queue="q7")
    raw(queue).hset(queue.keys.counts, "pending:q7", 0)
    queue.trim()
    queue.promote()
    raw(queue).hset(queue.keys.counts, "pending:q7", 1)
    assert [started.id for started in queue.dequeue(queue.register(["q7"], 1), ["q7"])] == [job.id]


def test_page_with_many_queues_sends_few_packets(near: Queue, far: Queue, proxy: CutProxy) -> None:
    near.submit([near.draft("echo", 1, queue=f"q{at}") for at in range(900)])
    far.page(limit=1)
    proxy.packets.clear()
    assert len(far.page(limit=1)[0]) == 1
    assert len(proxy.packets) < 25
