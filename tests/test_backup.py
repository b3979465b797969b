"""Backups: what is in the file while jobs move, what a restore makes of it, and what it refuses."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import random
import resource
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import NoBar, RedisServer, Server, check_consistency, dump, put, raw, until
from cutproxy import CutProxy
from test_processes import folder, run, runs, start, work  # noqa: F401  fixtures

from tinyqueue import (
    MAX_JOBS,
    Failure,
    InvalidJob,
    Job,
    KeyReused,
    Loaded,
    Once,
    Queue,
    Unavailable,
)
from tinyqueue_backup import BackupError, Restored, back_up, check, restore
from tinyqueue_doctor import examine
from tinyqueue_repair import repair
from tinyqueue_shards import AnyQueue, Shards

DEFAULT = ["default"]
BOOM = Failure("Boom", "it broke")
DAY = 86400_000


class Steps(NoBar):
    """A progress bar that calls something whenever it is updated: between two reads or writes."""

    def __init__(self, *calls: Callable[[], Any], last: Callable[[], Any] | None = None) -> None:
        self.calls = list(calls)
        self.last = last

    def update(self, n_steps: int, /) -> None:
        if self.calls:
            self.calls.pop(0)()
        elif self.last:
            self.last()


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "backup.jsonl")


def lines(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def jobs_in(file: str) -> dict[str, dict[str, Any]]:
    """The records of a backup by id, after a check that no job is in it twice."""
    found = [line for line in lines(file) if line["kind"] == "job"]
    times = Counter(line["id"] for line in found)
    assert times.total() == len(times)
    return {line["id"]: line["record"] for line in found}


def wipe(queue: AnyQueue) -> None:
    raw(queue.parts[0]).flushall()


def move(queue: AnyQueue, file: str, resume: bool = True, **options: Any) -> Restored:
    """Back up, wipe, restore, and resume the queues."""
    back_up(queue, file, NoBar())
    wipe(queue)
    restored = restore(queue, file, NoBar(), **options)
    for name in restored.resumable if resume else ():
        queue.resume(name)
    return restored


def drain(queue: AnyQueue, *names: str) -> list[str]:
    """Run all jobs that are due, and return their ids in the order in which they were started."""
    worker = queue.register(names or DEFAULT, 1)
    ran = []
    while found := queue.dequeue(worker, names or DEFAULT):
        for job in found:
            ran.append(job.id)
            queue.complete(job)
    return ran


# What comes back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["pending", "delayed", "failed", "cancelled"])
def test_restore_brings_a_job_back_as_it_was(queue: Queue, file: str, status: str) -> None:
    job = put(queue, status, unique_key="a", max_attempts=2)
    before = queue.get(job.id)
    record = dump(queue)[queue.keys.job(job.id)]
    move(queue, file)
    assert queue.get(job.id) == before
    assert dump(queue)[queue.keys.job(job.id)] == record


def test_restore_leaves_completed_jobs_behind(queue: Queue, file: str) -> None:
    job = put(queue, "completed")
    restored = move(queue, file)
    assert (queue.get(job.id), restored.stored) == (None, {})


def test_restore_keeps_the_order_of_every_queue(queue: Queue, file: str) -> None:
    jobs = [queue.enqueue("echo", at, queue=["a", "b"][at % 2]) for at in range(300)]
    released = queue.dequeue(queue.register(["a"], 1), ["a"], 2)
    for job in released:
        queue.release(job)
    move(queue, file)
    swapped = [released[1].id, released[0].id, *(job.id for job in jobs[4::2])]
    assert drain(queue, "a") == swapped
    assert drain(queue, "b") == [job.id for job in jobs[1::2]]


def test_restore_returns_a_running_job_to_the_head_without_its_attempt(queue: Queue, file: str) -> None:
    job = put(queue, "processing")
    later = queue.enqueue("echo", 2)
    move(queue, file)
    back = queue.get(job.id)
    assert back
    assert (back.status, back.attempts, back.worker) == ("pending", 0, "")
    assert drain(queue) == [job.id, later.id]


def test_restore_cancels_a_running_job_that_was_requested_to_stop(queue: Queue, file: str) -> None:
    job = put(queue, "processing", unique_key="a")
    queue.cancel(job.id)
    move(queue, file)
    back = queue.get(job.id)
    assert back
    assert back.status == "cancelled"
    assert queue.enqueue("echo", 1, unique_key="a").id != job.id


def test_restore_promotes_a_delayed_job_when_its_time_comes(queue: Queue, file: str) -> None:
    job = put(queue, "delayed")
    move(queue, file)
    assert drain(queue) == []
    queue.clock.ahead += 61_000
    queue.promote()
    assert drain(queue) == [job.id]


def test_restore_lists_a_delayed_job_whose_time_came_meanwhile(queue: Queue, file: str) -> None:
    job = put(queue, "delayed")
    back_up(queue, file, NoBar())
    wipe(queue)
    queue.clock.ahead += 61_000
    restore(queue, file, NoBar())
    queue.resume("default")
    assert drain(queue) == [job.id]


def test_restore_keeps_ended_jobs_no_longer_than_their_time(queue: Queue, file: str) -> None:
    job = put(queue, "failed")
    back_up(queue, file, NoBar())
    wipe(queue)
    queue.clock.ahead += 3 * DAY
    restore(queue, file, NoBar())
    assert queue.get(job.id) is not None
    assert 3.9 * DAY < raw(queue).pttl(queue.keys.job(job.id)) <= 4 * DAY
    wipe(queue)
    queue.clock.ahead += 5 * DAY
    restored = restore(queue, file, NoBar())
    assert (queue.get(job.id), restored.present) == (None, 1)


def test_restore_lets_a_failed_job_be_retried(queue: Queue, file: str) -> None:
    job = put(queue, "failed", unique_key="a")
    move(queue, file)
    queue.retry(job.id)
    assert drain(queue) == [job.id]


def test_restore_lets_a_unique_key_return_its_job(queue: Queue, file: str) -> None:
    job = queue.enqueue("echo", 1, unique_key="a")
    move(queue, file)
    assert queue.enqueue("echo", 2, unique_key="a") == job


def test_restore_lets_an_idempotency_key_replay(queue: Queue, file: str) -> None:
    [job] = queue.submit([queue.draft("echo", 1)], Once("a", "request"))
    [ended] = queue.submit([queue.draft("echo", 2, queue="other")], Once("b", "request"))
    drain(queue, "other")
    restored = move(queue, file)
    assert restored.keys == 2
    again = Once("a", "request")
    assert queue.submit([queue.draft("echo", 1)], again) == [job]
    assert again.replayed
    [made] = queue.submit([queue.draft("echo", 2)], Once("b", "request"))
    assert made.id == ended.id
    with pytest.raises(KeyReused):
        queue.submit([queue.draft("echo", 1)], Once("a", "another request"))


def test_restore_keeps_the_time_of_an_idempotency_key(queue: Queue, file: str) -> None:
    queue.submit([queue.draft("echo", 1)], Once("a", "request"))
    back_up(queue, file, NoBar())
    wipe(queue)
    queue.clock.ahead += DAY // 2
    restore(queue, file, NoBar())
    assert 0.4 * DAY < raw(queue).pttl(queue.keys.once("a")) <= DAY // 2


def test_restore_shows_a_record_that_cannot_be_read(queue: Queue, file: str) -> None:
    job = queue.enqueue("echo", 1)
    other = queue.enqueue("echo", 2)
    raw(queue).set(queue.keys.job(job.id), b'{"type":"echo","payload":"\xff"}')
    raw(queue).set(queue.keys.job(other.id), json.dumps({"type": "echo", "payload": [1]}, indent=2))
    move(queue, file)
    back = queue.get(job.id)
    assert back
    assert (back.status, back.type, back.payload) == ("failed", "unreadable", '{"type":"echo","payload":"\\xff"}')
    assert drain(queue) == [other.id]


def test_restore_keeps_payloads_as_they_were_written(queue: Queue, file: str) -> None:
    job = put(queue, "processing")
    record = raw(queue).get(queue.keys.job(job.id))
    payload = b'{"n": 1.0, "big": 123456789012345678901234567890, "text": "\\u00e9"}'
    raw(queue).set(queue.keys.job(job.id), record.replace(b'{"to":"you"}', payload))
    move(queue, file)
    assert payload in raw(queue).get(queue.keys.job(job.id))


@pytest.mark.parametrize("status", ["pending", "processing", "failed"])
def test_restore_keeps_fields_of_a_newer_version(queue: Queue, file: str, status: str) -> None:
    job = put(queue, status)
    record = raw(queue).get(queue.keys.job(job.id))
    raw(queue).set(queue.keys.job(job.id), record[:-1] + b',"colour":{"a": 1.0}}', keepttl=True)
    move(queue, file)
    assert b'"colour":{"a": 1.0}' in raw(queue).get(queue.keys.job(job.id))


def test_restore_leaves_nothing_for_doctor(queue: Queue, file: str) -> None:
    for status in ("pending", "delayed", "processing", "failed", "cancelled"):
        put(queue, status, queue=status)
    move(queue, file)
    [counts] = [finding for finding in examine(queue, 1) if finding.about == "counts"]
    assert (counts.level, repair(queue.parts)) == ("ok", [])


# Paused queues --------------------------------------------------------------------------------------------------------


def test_restore_pauses_every_queue_before_its_jobs_can_run(queue: Queue, file: str) -> None:
    jobs = [put(queue, "pending", queue=name) for name in ("a", "b")]
    back_up(queue, file, NoBar())
    wipe(queue)
    started: list[Job] = []
    worker = queue.register(["a", "b"], 1)
    restored = restore(queue, file, Steps(last=lambda: started.extend(queue.dequeue(worker, ["a", "b"]))))
    assert started == []
    assert (restored.resumable, restored.runs) == (["a", "b"], {("a", "echo", True): 1, ("b", "echo", True): 1})
    queue.resume("b")
    assert until(lambda: drain(queue, "a", "b")) == [jobs[1].id]


def test_restore_names_no_queue_to_resume_that_was_paused(queue: Queue, file: str) -> None:
    for name in ("a", "b", "c"):
        put(queue, "pending", queue=name)
    queue.pause("a")
    queue.pause("empty")
    restored = move(queue, file)
    assert restored.resumable == ["b", "c"]
    paused = {name for name, about in queue.queues().items() if about["paused"]}
    assert paused == {"a", "empty"}


# While jobs move ------------------------------------------------------------------------------------------------------


def test_backup_has_a_job_that_fails_while_its_queue_is_read(queue: Queue, file: str) -> None:
    """It leaves its list before that is read, and is delayed after the delayed jobs were read."""
    first = put(queue, "delayed")
    job = queue.enqueue("echo", 1)

    def fail() -> None:
        [started] = queue.dequeue(queue.register(DEFAULT, 1), DEFAULT)
        queue.fail(started, BOOM, 10)

    back_up(queue, file, Steps(fail))
    assert jobs_in(file).keys() == {first.id, job.id}


def test_backup_has_a_job_once_that_is_retried_after_it_was_read(queue: Queue, file: str) -> None:
    for at in range(150):
        put(queue, "failed", queue=f"q{at}")
    failed = {job.id for job in queue.page(limit=200)[0]}
    back_up(queue, file, Steps(*[lambda: [queue.retry(id) for id in failed]] * 1))
    assert jobs_in(file).keys() == failed


def test_backup_has_every_job_while_all_of_them_move(queue: Queue, file: str) -> None:
    """Whenever some have been read, others are started, released, failed, requeued, retried or promoted."""
    random.seed(7)
    worker = queue.register(["a", "b", "c"], 1000)
    for at in range(600):
        queue.enqueue("echo", at, queue="abc"[at % 3], delay=at % 60 if at % 5 == 0 else None, max_attempts=5)
    there = {job.id for job in queue.page(limit=1000)[0]}
    assert len(there) == 600

    def shuffle() -> None:
        for job in queue.dequeue(worker, random.sample("abc", 3), 120):
            after = random.choice([0, 5, 3600, None])
            random.choice([queue.release, lambda job: None, lambda job, after=after: queue.fail(job, BOOM, after)])(job)
        for job in queue.page(limit=1000)[0]:
            if job.status == "failed" and random.random() < 0.5:
                queue.retry(job.id)
        queue.clock.ahead += 3000
        queue.promote()

    back_up(queue, file, Steps(last=shuffle))
    assert jobs_in(file).keys() == there
    wipe(queue)
    restore(queue, file, NoBar())
    assert {job.id for job in queue.page(limit=1000)[0]} == there


def test_backup_leaves_out_a_job_that_completes_before_it_is_read(near: Queue, file: str) -> None:
    """One of the waiting jobs, which are read in several pieces, and one of the others."""
    waiting = fill(near, 1000)
    running = put(near, "processing", queue="other")
    for job in near.enqueue_many("echo", range(600), queue="gone"):
        near.cancel(job.id)

    def complete_first() -> None:
        near.complete(*near.dequeue(near.register(DEFAULT, 1), DEFAULT))

    def wait() -> None: ...

    back_up(near, file, Steps(wait, complete_first, wait, lambda: near.complete(running)))
    found = jobs_in(file)
    assert len(found) == 999 + 600
    assert not {waiting[0], running.id} & found.keys()


def test_backup_puts_jobs_submitted_meanwhile_behind_all_others(queue: Queue, file: str) -> None:
    old = [queue.enqueue("echo", at) for at in range(3)]
    new: list[Job] = []
    back_up(queue, file, Steps(lambda: new.extend(queue.enqueue("echo", at) for at in range(3))))
    wipe(queue)
    restore(queue, file, NoBar())
    queue.resume("default")
    assert drain(queue) == [job.id for job in old + new]


def test_backup_without_a_late_job_lacks_its_idempotency_key_too(queue: Queue, file: str) -> None:
    """Otherwise a repeat of that submit would be answered with a job that does not exist."""
    put(queue, "pending")
    put(queue, "failed", queue="other")

    def submit(key: str) -> Callable[[], Any]:
        return lambda: queue.submit([queue.draft("echo", key)], Once(key, "request"))

    back_up(queue, file, Steps(submit("early"), submit("late")))
    counts = Counter(line["kind"] for line in lines(file))
    assert (counts["job"], counts["once"]) == (3, 1)
    wipe(queue)
    restore(queue, file, NoBar())
    again = Once("late", "request")
    queue.submit([queue.draft("echo", "late")], again)
    assert not again.replayed
    again = Once("early", "request")
    queue.submit([queue.draft("echo", "early")], again)
    assert again.replayed


def test_backup_under_load_loses_no_job(real: Server, near: Queue, file: str) -> None:
    """Threads submit, run, fail and promote jobs all the time. All are run in the end, and all keys replay."""
    over = threading.Event()
    submitted: list[list[Job]] = [[], []]

    def submit(at: int) -> None:
        queue = real.queue()
        for number in itertools.count():
            draft = queue.draft("echo", number, unique_key=f"{at}.{number}")
            submitted[at] += queue.submit([draft], Once(f"{at}.{number}", "request"))
            if over.is_set():
                return

    def serve() -> None:
        queue = real.queue()
        worker = queue.register(DEFAULT, 10)
        while not over.is_set():
            for job in queue.dequeue(worker, DEFAULT, 10):
                act = [queue.complete, queue.release, lambda job: queue.fail(job, BOOM, 0.05), lambda job: None]
                act[job.payload % 4](job)
            queue.promote()

    before = [near.enqueue("echo", 3) for _ in range(2000)]
    threads = [threading.Thread(target=submit, args=(at,)) for at in range(2)]
    threads += [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: all(len(jobs) > 50 for jobs in submitted))
    early = [job for jobs in submitted for job in list(jobs)]
    back_up(near, file, NoBar())
    over.set()
    for thread in threads:
        thread.join()
    unended = {job.id for job in early + before if (found := near.get(job.id)) and found.status != "completed"}
    found = jobs_in(file)
    assert unended <= found.keys()
    wipe(near)
    restored = restore(near, file, NoBar())
    near.resume("default")
    for at, number in itertools.product(range(2), range(50)):
        again = Once(f"{at}.{number}", "request")
        near.submit([near.draft("echo", number, unique_key=f"{at}.{number}")], again)
        assert again.replayed
    near.clock.ahead += 60_000
    near.promote()
    ran = drain(near)
    assert (len(set(ran)), set(ran)) == (len(ran), {id for id, job in found.items() if job.get("status") != "failed"})
    assert restored.stored.total() == len(found)


def test_backup_of_running_processes_is_restored(real: Server, near: Queue, work: Any, runs: Any, run: Any) -> None:  # noqa: F811
    """The worker runs jobs while the backup is made, until closed gates occupy all its slots."""
    near.enqueue("gate", "open")
    for at in range(600):
        near.enqueue("echo", at)
        if at >= 500 and at < 520:
            near.enqueue("gate", "open")
    worker = work()
    until(lambda: len(runs()) > 20)
    done = run("backup", "backup.gz")
    worker.kill()
    unended = {job.id: job for job in near.page(limit=1000)[0] if job.status != "completed"}
    wipe(near)
    restored = run("restore", "backup.gz", "--resume")
    assert (done.returncode, restored.returncode) == (0, 0), restored.stderr
    assert "resumed: default" in restored.stdout.decode()
    back = {job.id: job for job in near.page(limit=1000)[0]}
    assert unended.keys() <= back.keys()
    assert {(job.status, job.attempts) for job in back.values()} == {("pending", 0)}
    before = Counter(runs())
    runs.open("open")
    assert run("--burst").returncode == 0
    after = Counter(runs()) - before
    assert after == Counter(
        line
        for job in back.values()
        for line in ([f"echo {job.payload}"] if job.type == "echo" else ["begin open", "end open"])
    )


def test_backup_during_a_restart_of_redis_is_refused(start_redis: Callable[..., RedisServer], file: str) -> None:
    server = start_redis("--appendonly", "yes", "--appendfsync", "always")
    queue = Queue.from_url(server.url)
    put(queue, "pending")

    def restart() -> None:
        server.kill()
        server.start()
        with suppress(Unavailable):  # the connection is gone, and the next one leads to the new server
            queue.ping()

    with pytest.raises(BackupError, match="make the backup again"):
        back_up(queue, file, Steps(restart))
    assert os.listdir(Path(file).parent) == []
    queue.disconnect()


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["", ".gz", ".zst"])
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The name of a file of each kind."""
    if request.param == ".zst" and sys.version_info < (3, 14):
        pytest.importorskip("zstandard")
    return str(tmp_path / f"backup{request.param}")


@pytest.fixture
def lone() -> Iterator[Queue]:
    """An embedded queue, for tests of the file: they do not depend on the server."""
    server = Server()
    yield server.queue()
    server.close()


def fill(queue: Queue, count: int = 2000) -> list[str]:
    return [job.id for at in range(0, count, 1000) for job in queue.enqueue_many("echo", range(min(count, 1000)))]


def test_restore_reads_a_file_of_each_kind(lone: Queue, packed: str) -> None:
    ids = fill(lone)
    move(lone, packed)
    assert drain_ids(lone) == ids
    assert oct(os.stat(packed).st_mode)[-3:] == "600"
    assert os.listdir(Path(packed).parent) == [Path(packed).name]


def drain_ids(queue: Queue) -> list[str]:
    """The ids in the list of the default queue, first in first."""
    return [id.decode() for id in reversed(raw(queue).lrange(queue.keys.jobs("default"), 0, -1))]


def refuses(lone: Queue, file: str, *words: str) -> None:
    """Check that a restore is refused with these words, and that nothing was written."""
    wipe(lone)
    with pytest.raises(BackupError) as refused:
        restore(lone, file, NoBar())
    assert [word for word in words if word not in str(refused.value)] == []
    assert dump(lone) == {}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_restore_of_a_cut_file_writes_nothing(lone: Queue, packed: str, share: float) -> None:
    fill(lone, 300)
    back_up(lone, packed, NoBar())
    whole = Path(packed).read_bytes()
    Path(packed).write_bytes(whole[: int(len(whole) * share)])
    refuses(lone, packed, packed)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_restore_of_a_damaged_file_writes_nothing(lone: Queue, packed: str, share: float) -> None:
    fill(lone, 300)
    back_up(lone, packed, NoBar())
    data = bytearray(Path(packed).read_bytes())
    data[int(len(data) * share)] ^= 1
    Path(packed).write_bytes(data)
    refuses(lone, packed, packed)


def change(file: str, at: int, **fields: Any) -> None:
    """Change a line of a backup, and its checksum accordingly."""
    found = lines(file)
    found[at] |= fields
    rest = b"".join(json.dumps(line).encode() + b"\n" for line in found[:-1])
    end = found[-1] | {"sha256": hashlib.sha256(rest).hexdigest(), "lines": len(found) - 1}
    end["counts"] = Counter(line["kind"] for line in found[:-1])
    Path(file).write_bytes(rest + json.dumps(end).encode() + b"\n")


def test_restore_reads_a_file_of_format_1(lone: Queue) -> None:
    """The file was written when the format was new, and must be readable for ever."""
    restored = restore(lone, str(Path(__file__).parent / "samples" / "backup-1.jsonl"), NoBar())
    assert (restored.stored, restored.keys, restored.resumable) == ({"pending": 4}, 1, ["default"])
    lone.resume("default")
    assert drain(lone) == ["01a21556-0cd1-7000-a0db-4537839dfafb", "01a21556-1111-7000-a0db-4537839dfafb"]
    mail = lone.enqueue("echo", 1, unique_key="k")
    assert (mail.queue, mail.payload, mail.request_id) == ("mail", [1.0], "r")
    again = Once("a", "request")
    assert lone.submit([lone.draft("echo", 2)], again)[0].id == "01a21556-1111-7000-a0db-4537839dfafb"


def test_restore_refuses_a_newer_format(lone: Queue, file: str) -> None:
    put(lone, "pending")
    back_up(lone, file, NoBar())
    change(file, 0, version=2, tinyqueue="9.1.0")
    refuses(lone, file, "has format 2", "formats up to 1", "use TinyQueue 9.1.0")


def test_restore_refuses_a_kind_that_it_does_not_know(lone: Queue, file: str) -> None:
    put(lone, "pending")
    lone.pause("default")
    back_up(lone, file, NoBar())
    change(file, 1, kind="calendar", every="1d")
    refuses(lone, file, "of a kind that this version does not know: calendar", "use TinyQueue 0.1.0")


def test_restore_passes_over_an_optional_kind(lone: Queue, file: str) -> None:
    job = put(lone, "pending")
    lone.pause("default")
    back_up(lone, file, NoBar())
    change(file, 1, kind="hint", optional=True, more={"a": 1})
    wipe(lone)
    restore(lone, file, NoBar())
    assert lone.get(job.id) == job


@pytest.mark.parametrize("text", [b"", b"{}\n", b"hello\n", b'{"kind":"job"}\n', b"\x1f\x8b", b"\x28\xb5\x2f\xfd"])
def test_restore_refuses_another_file(lone: Queue, file: str, text: bytes) -> None:
    if text.startswith(b"\x28") and sys.version_info < (3, 14):
        pytest.importorskip("zstandard")
    Path(file).write_bytes(text)
    refuses(lone, file, file)


@pytest.mark.parametrize("record", [{"type": "a b"}, {"queue": "a:b"}, {"attempts": "x"}, {"status": "lost"}])
def test_restore_refuses_what_is_not_a_job(lone: Queue, file: str, record: dict[str, Any]) -> None:
    job = put(lone, "pending")
    back_up(lone, file, NoBar())
    change(file, 1, record=jobs_in(file)[job.id] | record)
    refuses(lone, file, "line 2 is not a job")


@pytest.mark.parametrize(
    "fields", [{"key": "a"}, {"value": 7}, {"value": {"fingerprint": "", "ids": ["a"]}}, {"shard": 1}]
)
def test_restore_refuses_what_is_not_an_idempotency_key(lone: Queue, file: str, fields: dict[str, Any]) -> None:
    lone.submit([lone.draft("echo", 1)], Once("a", "request"))
    back_up(lone, file, NoBar())
    change(file, 2, **fields)
    refuses(lone, file, "line 3 is not an Idempotency-Key")


def test_restore_refuses_what_is_not_the_name_of_a_queue(lone: Queue, file: str) -> None:
    lone.pause("default")
    back_up(lone, file, NoBar())
    change(file, 1, queue="a:b")
    refuses(lone, file, "the name of a paused queue is wrong")


def test_restore_refuses_lines_after_the_last(lone: Queue, file: str) -> None:
    put(lone, "pending")
    back_up(lone, file, NoBar())
    Path(file).write_bytes(Path(file).read_bytes() * 2)
    refuses(lone, file, "lines after its last one")


def test_restore_refuses_a_namespace_with_jobs(lone: Queue, file: str) -> None:
    put(lone, "failed")
    back_up(lone, file, NoBar())
    before = dump(lone)
    with pytest.raises(BackupError, match=r"this namespace has jobs already \(1\); use another .* or --merge"):
        restore(lone, file, NoBar())
    assert dump(lone) == before


def test_restore_of_a_missing_file_is_refused(lone: Queue, file: str) -> None:
    refuses(lone, file, "cannot read", "No such file")


def test_backup_into_a_missing_folder_is_refused(lone: Queue, tmp_path: Path) -> None:
    with pytest.raises(BackupError, match=r"cannot write .*No such file"):
        back_up(lone, str(tmp_path / "missing" / "file"), NoBar())


def test_backup_replaces_no_folder_and_no_device(lone: Queue, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    link = tmp_path / "link"
    link.symlink_to(pipe)
    for path in (tmp_path, pipe, link):
        with pytest.raises(BackupError, match=r"cannot write .*: it is not a regular file; use - for"):
            back_up(lone, str(path), NoBar())
    assert link.is_symlink()
    assert pipe.is_fifo()
    assert set(tmp_path.iterdir()) == {pipe, link}


def test_backup_through_a_link_replaces_its_target(lone: Queue, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "file")
    back_up(lone, str(link), NoBar())
    assert link.is_symlink()
    with (tmp_path / "file").open("rb") as file:
        assert check(file, "file").counts == {"header": 1}


def test_backup_says_in_one_line_that_the_last_bytes_cannot_be_written(lone: Queue, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(BackupError, match=r"cannot write .*: File too large"):
            back_up(lone, str(tmp_path / "file.gz"), NoBar())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="this Python has a module for zstd")
def test_backup_without_zstandard_says_what_to_install(
    lone: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(BackupError, match=r"pip install 'tinyqueue\[zstd\]'"):
        back_up(lone, str(tmp_path / "backup.zst"), NoBar())
    (tmp_path / "other").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(BackupError, match=r"pip install 'tinyqueue\[zstd\]'"):
        restore(lone, str(tmp_path / "other"), NoBar())
    assert os.listdir(tmp_path) == ["other"]


# Interrupted and repeated ---------------------------------------------------------------------------------------------


def stop() -> None:
    raise KeyboardInterrupt


def test_backup_that_is_interrupted_leaves_an_older_file_as_it_is(lone: Queue, packed: str) -> None:
    fill(lone)
    Path(packed).write_text("an older backup")
    with pytest.raises(KeyboardInterrupt):
        back_up(lone, packed, Steps(stop))
    assert os.listdir(Path(packed).parent) == [Path(packed).name]
    assert Path(packed).read_text() == "an older backup"


def test_backup_that_is_killed_leaves_no_file_of_that_name(near: Queue, folder: Path, start: Any, real: Server) -> None:  # noqa: F811
    fill(near, 20_000)
    script = Path(__file__).parent.parent / "worker.py"
    process = start(script, "backup", "backup.gz", REDIS_URL=real.url)
    until(lambda: list(folder.glob(".backup.gz.*.part")))
    process.kill()
    assert not (folder / "backup.gz").exists()


def test_restore_that_is_interrupted_is_continued(queue: Queue, file: str) -> None:
    ids = fill(queue, 5000)
    back_up(queue, file, NoBar())
    wipe(queue)
    with pytest.raises(KeyboardInterrupt):
        restore(queue, file, Steps(lambda: None, stop))
    assert drain_ids(queue) == ids[-2000:]
    with pytest.raises(BackupError, match="continues an interrupted restore"):
        restore(queue, file, NoBar())
    restored = restore(queue, file, NoBar(), merge=True)
    assert (restored.stored, restored.present) == ({"pending": 3000}, 2000)
    assert drain_ids(queue) == ids


def test_restore_that_loses_redis_says_how_to_continue(start_redis: Callable[..., RedisServer], file: str) -> None:
    server = start_redis("--appendonly", "yes", "--appendfsync", "always")
    queue = Queue.from_url(server.url)
    ids = fill(queue, 3000)
    back_up(queue, file, NoBar())
    wipe(queue)
    with pytest.raises(BackupError, match=r"unreachable.*; 1000 jobs were restored so far; .* with --merge"):
        restore(queue, file, Steps(server.kill))
    server.start()
    restore(queue, file, NoBar(), merge=True)
    assert drain_ids(queue) == ids
    queue.disconnect()


def test_restore_that_is_repeated_after_the_jobs_ran_does_nothing(queue: Queue, file: str) -> None:
    jobs = [put(queue, status, queue=status) for status in ("pending", "failed", "cancelled")]
    move(queue, file)
    assert drain(queue, "pending") == [jobs[0].id]
    before = dump(queue)
    restored = restore(queue, file, NoBar(), merge=True)
    assert (restored.stored, restored.present) == ({}, 3)
    assert dump(queue) == before


def test_load_that_lost_its_reply_stores_each_job_once(near: Queue, far: Queue, proxy: CutProxy) -> None:
    jobs = [near.draft("echo", at, unique_key=str(at)) for at in range(3)]
    near.pause("default")
    proxy.drop_reply(b"EXEC")
    far.load(jobs)
    assert drain_ids(near) == [job.id for job in reversed(jobs)]
    assert near.stats()["pending"] == 3


def test_load_of_a_job_that_is_loaded_meanwhile_stores_it_once(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = near.draft("echo", 1)
    near.pause("default")
    proxy.before(b"MSET", lambda: near.load([job]))
    assert far.load([job]) == Loaded([], [], [])
    assert drain_ids(near) == [job.id]


def test_load_of_a_job_whose_unique_key_is_taken_meanwhile_leaves_it_out(
    near: Queue, far: Queue, proxy: CutProxy
) -> None:
    job = near.draft("echo", 1, unique_key="a")
    near.pause("default")
    proxy.before(b"MSET", lambda: near.enqueue("echo", 2, unique_key="a"))
    assert far.load([job]) == Loaded([], [job.id], [])
    assert near.get(job.id) is None


def test_load_into_a_queue_that_is_resumed_meanwhile_stores_nothing(near: Queue, far: Queue, proxy: CutProxy) -> None:
    job = near.draft("echo", 1)
    near.pause("default")
    proxy.before(b"MSET", lambda: near.resume("default"))
    assert far.load([job]) == Loaded([], [], ["default"])
    assert near.get(job.id) is None


def test_load_of_one_job_twice_stores_it_once(queue: Queue) -> None:
    job = queue.draft("echo", 1)
    queue.pause("default")
    assert queue.load([job, job]) == Loaded([job], [], [])
    assert drain_ids(queue) == [job.id]


# Into a namespace with jobs -------------------------------------------------------------------------------------------


def test_restore_with_merge_puts_old_jobs_before_new_ones(queue: Queue, file: str) -> None:
    old = fill(queue, 5)
    back_up(queue, file, NoBar())
    wipe(queue)
    new = fill(queue, 5)
    restore(queue, file, NoBar(), merge=True)
    queue.resume("default")
    assert drain(queue) == old + new


def test_restore_with_merge_leaves_out_a_job_whose_unique_key_is_taken(queue: Queue, file: str) -> None:
    old = put(queue, "pending", unique_key="a")
    other = put(queue, "pending", unique_key="b", queue="other")
    back_up(queue, file, NoBar())
    wipe(queue)
    new = put(queue, "pending", unique_key="a")
    restored = restore(queue, file, NoBar(), merge=True)
    assert (restored.taken, queue.get(old.id)) == ([old.id], None)
    assert (queue.get(new.id), queue.get(other.id)) == (new, other)


def test_restore_with_merge_keeps_a_newer_idempotency_key(queue: Queue, file: str) -> None:
    queue.submit([queue.draft("echo", 1)], Once("a", "request"))
    back_up(queue, file, NoBar())
    wipe(queue)
    [new] = queue.submit([queue.draft("echo", 1)], Once("a", "request"))
    restored = restore(queue, file, NoBar(), merge=True)
    assert restored.keys == 0
    assert queue.submit([queue.draft("echo", 1)], Once("a", "request"))[0].id == new.id


def test_restore_leaves_out_old_jobs_on_request(queue: Queue, file: str) -> None:
    old = put(queue, "pending")
    failed = put(queue, "failed", queue="other")
    later = queue.enqueue("echo", 1, delay=2 * 86400)
    queue.clock.ahead += DAY
    young = put(queue, "pending", queue="young")
    back_up(queue, file, NoBar())
    wipe(queue)
    queue.clock.ahead += 60_000
    restored = restore(queue, file, NoBar(), oldest=DAY)
    assert restored.older == 2
    assert [queue.get(job.id) for job in (old, failed)] == [None, None]
    assert [queue.get(job.id) for job in (later, young)] == [later, young]


def test_load_refuses_too_many_jobs(queue: Queue) -> None:
    with pytest.raises(InvalidJob):
        queue.load([queue.draft("echo", 1)] * (MAX_JOBS + 1))
    assert queue.load([]) == Loaded([], [], [])


def test_load_into_a_full_redis_is_refused(start_redis: Callable[..., RedisServer]) -> None:
    queue = Queue.from_url(start_redis().url)
    raw(queue).set("other", b"x" * 10_000_000)
    raw(queue).config_set("maxmemory", int(raw(queue).info("memory")["used_memory"] / 0.97))
    with pytest.raises(Unavailable, match="full"):
        queue.load([queue.draft("echo", 1)])
    queue.disconnect()


# Shards ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(server: Server) -> Iterator[Shards]:
    shards = Shards([server.queue(namespace=f"queue.{at}") for at in range(3)])
    yield shards
    shards._waiters.shutdown()
    for shard in shards.parts:
        check_consistency(shard)


def test_restore_brings_back_the_jobs_of_all_shards(shards: Shards, file: str) -> None:
    jobs = [shards.enqueue("echo", at, unique_key=str(at)) for at in range(30)]
    shards.submit([shards.draft("echo", 1)], Once("a", "request"))
    shards.submit([shards.draft("echo", 1, unique_key="u")], Once("b", "request"))
    move(shards, file)
    assert [shards.get(job.id) for job in jobs] == jobs
    assert [shards.enqueue("echo", 0, unique_key=str(at)) for at in range(30)] == jobs
    for key, options in {"a": {}, "b": {"unique_key": "u"}}.items():
        again = Once(key, "request")
        shards.submit([shards.draft("echo", 1, **options)], again)
        assert again.replayed
    assert len(drain(shards)) == 32


def test_restore_refuses_another_number_of_shards(shards: Shards, server: Server, file: str) -> None:
    shards.enqueue("echo", 1)
    back_up(shards, file, NoBar())
    wipe(shards)
    with pytest.raises(BackupError, match=r"a queue with 3 shards, and TINYQUEUE_SHARDS is 1.*TINYQUEUE_SHARDS=3"):
        restore(server.queue(), file, NoBar())


# The commands ---------------------------------------------------------------------------------------------------------


def test_restore_command_prints_what_would_run(near: Queue, run: Any, folder: Path) -> None:  # noqa: F811
    put(near, "pending", queue="a")
    put(near, "delayed", queue="b")
    put(near, "failed", queue="c")
    near.pause("b")
    done = run("backup", "backup.gz")
    assert b"3 jobs and 0 idempotency keys written to backup.gz" in done.stderr
    assert gzip.decompress((folder / "backup.gz").read_bytes()).startswith(b'{"kind":"header"')
    wipe(near)
    text = run("restore", "backup.gz").stdout.decode()
    assert "3 jobs restored: 1 failed, 2 pending" in text
    assert [line.split() for line in text.splitlines() if "echo" in line] == [
        ["a", "echo", "1", "0"],
        ["b", "echo", "0", "1"],
    ]
    assert "to run their jobs: python worker.py resume a" in text.splitlines()[-1]
    text = run("restore", "backup.gz", "--merge", "--resume").stdout.decode()
    assert "3 jobs left out" in text
    assert text.splitlines()[-1] == "resumed: a"


def test_backup_command_writes_to_a_pipe_that_restore_reads(near: Queue, run: Any) -> None:  # noqa: F811
    job = put(near, "pending")
    done = run("backup", "-")
    assert done.stdout.count(b"\n") == 3
    restored = run("restore", "-", input=done.stdout, TINYQUEUE_NAMESPACE="other")
    assert b"1 job restored" in restored.stdout
    assert b"completed" not in restored.stdout
    assert b'"id":' in run("get", job.id, "--json", TINYQUEUE_NAMESPACE="other").stdout.replace(b'"id": ', b'"id":')


def test_backup_of_an_embedded_redis_is_restored_into_a_real_one(near: Queue, run: Any) -> None:  # noqa: F811
    id = run("enqueue", "echo", "7", REDIS_URL="embedded:./data").stdout.decode().strip()
    done = run("backup", "-", REDIS_URL="embedded:./data")
    restored = run("restore", "-", "--resume", input=done.stdout)
    assert (done.returncode, restored.returncode) == (0, 0), restored.stderr
    assert drain(near) == [id]


def test_restore_command_refuses_with_a_code(near: Queue, run: Any) -> None:  # noqa: F811
    refused = run("restore", "missing")
    assert (refused.returncode, refused.stderr.splitlines()[-1]) == (
        1,
        b"Error: cannot read missing: No such file or directory",
    )
    refused = run("restore", "missing", "--skip-older-than", "1w")
    assert (refused.returncode, b"'1w' is not a time such as 90s, 30m, 12h or 1d" in refused.stderr) == (2, True)
