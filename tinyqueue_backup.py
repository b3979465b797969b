"""Backups: the format of the file, writing it from a running queue, and restoring it.

The rules of the queue stay in tinyqueue.py, such as how a job is stored again. The file is JSON
Lines, compressed if its name ends in .gz or .zst:

    {"kind":"header","format":"tinyqueue-backup","version":1,"tinyqueue":"0.1.0",
     "namespace":"queue","shards":1,"createdAt":1764115200000,"counts":{"pending":2, ...}}
    {"kind":"job","id":"...","record":{...}}       the record as Redis has it, without the id
    {"kind":"job","id":"...","record":{...},"behind":true}   submitted during the backup
    {"kind":"once","key":"...","value":{...},"shard":0}      an Idempotency-Key, as its hash
    {"kind":"pause","queue":"..."}
    {"kind":"schedule","record":{...}}             only if there are schedules
    {"kind":"limit","key":"...","value":{...},"shard":0}     what was set in place of its numbers
    {"kind":"end","lines":5,"counts":{"job":2, ...},"sha256":"..."}

The `counts` of the header are those of the queue when the backup began. The `counts` of the last
line are those of the lines before it, by kind. The checksum covers every byte before the last line,
uncompressed. A reader ignores unknown fields. It refuses a newer version, and an unknown kind
unless the line has "optional":true. So a later release may add kinds of entries without a new
version.

The jobs of a queue are in reverse order: the next job to start comes last. A restore puts each job
before those that it restored earlier, so the jobs get their old order again, even if a restore is
interrupted and repeated.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import os
import re
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, cast

import msgspec

from tinyqueue import (
    ENDED,
    ID,
    LIMIT,
    MAX_JOBS,
    NAME,
    PAUSE_AGE,
    SCANNED,
    UNENDED,
    Corrupted,
    Job,
    Made,
    Queue,
    TinyQueueError,
    Unavailable,
    __version__,
    check_name,
    stored_job,
)
from tinyqueue_job import ids_in, read_made, record_of
from tinyqueue_json import created_at
from tinyqueue_redis import pairs, parse_info, scan
from tinyqueue_schedule import Schedule, list_schedules, read_schedule
from tinyqueue_shards import AnyQueue

FORMAT = "tinyqueue-backup"
VERSION = 1
BATCH_BYTES = 4 << 20  # of the records that are read or restored at a time
DRAFT_TIME = 60_000  # milliseconds within which a job is submitted after its id was made


class Bar(Protocol):
    """A progress bar, such as click's: how many jobs are expected, and a number of further ones."""

    length: int | None

    def update(self, n_steps: int, /) -> None: ...


class BackupError(TinyQueueError):
    """A backup cannot be written, read or restored. The text says what to do."""


# The format -----------------------------------------------------------------------------------------------------------


class Line(msgspec.Struct, rename="camel"):
    """A line of the file, of any kind: those of its fields that the kind has are set."""

    kind: str
    optional: bool = False
    format: str = ""
    version: int = 0
    tinyqueue: str = ""
    namespace: str = ""
    shards: int = 1
    created_at: int = 0
    counts: dict[str, int] = {}
    id: str = ""
    record: msgspec.Raw = msgspec.Raw(b"")
    behind: bool = False
    key: str = ""
    value: msgspec.Raw = msgspec.Raw(b"")
    shard: int = 0
    queue: str = ""
    lines: int = 0
    sha256: str = ""


_decode = msgspec.json.Decoder(Line).decode
_encode = msgspec.json.Encoder().encode


class Writer:
    """Writes lines, and counts them for the last one."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.sum = hashlib.sha256()
        self.counts: Counter[str] = Counter()

    def write(self, kind: str, lines: Sequence[bytes]) -> None:
        text = b"".join(lines)
        self.sum.update(text)
        self.file.write(text)
        self.counts[kind] += len(lines)

    def write_fields(self, kind: str, **fields: Any) -> None:
        self.write(kind, [_encode({"kind": kind, **fields}) + b"\n"])

    def end(self) -> None:
        lines = sum(self.counts.values())
        end = {"kind": "end", "lines": lines, "counts": self.counts, "sha256": self.sum.hexdigest()}
        self.file.write(_encode(end) + b"\n")


def _job_line(job: Job, behind: bool) -> bytes:
    record = record_of(job)
    if b"\n" in record:  # JSON may contain line breaks, which JSON Lines may not
        record = msgspec.json.format(record, indent=-1)
    return b'{"kind":"job","id":"%b","record":%b%b}\n' % (job.id.encode(), record, b',"behind":true' * behind)


# Files ----------------------------------------------------------------------------------------------------------------


class _Zstd(NamedTuple):
    """Compression by Zstandard, in a module of Python 3.14 or in a package for older ones."""

    write: Callable[[IO[bytes]], Any]
    read: Callable[[IO[bytes]], Any]
    error: type[Exception]


def _zstd() -> _Zstd:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return _Zstd(lambda file: zstd.ZstdFile(file, "wb"), lambda file: zstd.ZstdFile(file, "rb"), zstd.ZstdError)
    try:
        import zstandard
    except ImportError:
        todo = "install it with: pip install 'tinyqueue[zstd]', or compress with gzip (.gz)"
        raise BackupError(f"zstd needs the package zstandard on Python before 3.14; {todo}") from None
    return _Zstd(
        lambda file: zstandard.ZstdCompressor(write_checksum=True).stream_writer(file, closefd=False),
        lambda file: zstandard.ZstdDecompressor().stream_reader(file, closefd=False),
        zstandard.ZstdError,
    )


def _compressed(file: IO[bytes], name: str) -> IO[bytes]:
    """Return a file that compresses into another one, as the name's ending says."""
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file, mode="wb", compresslevel=4))
    if name.endswith((".zst", ".zstd")):
        return cast(IO[bytes], _zstd().write(file))
    return file


def _decompressed(file: IO[bytes], name: str) -> Iterator[bytes]:
    """Read the lines of a file, whose first bytes say how it is compressed."""
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    if start.startswith(b"\x1f\x8b"):
        try:
            yield from gzip.GzipFile(fileobj=file, mode="rb")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _damaged(name, str(error)) from None
    elif start == b"\x28\xb5\x2f\xfd":
        zstd = _zstd()
        try:
            yield from io.BufferedReader(zstd.read(file), 1 << 20)
        except (EOFError, zstd.error) as error:
            raise _damaged(name, str(error)) from None
    else:
        yield from file


def _damaged(name: str, why: str) -> BackupError:
    return BackupError(f"{name} is damaged ({why}); nothing was restored. Use another copy of it")


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file under another name. It gets its own name when it is complete and on disk."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the new name is on disk, too, once the folder is
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _destination(name: str) -> Iterator[IO[bytes]]:
    if name == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        with ExitStack() as stack:  # the disk may turn out to be full only when the files are closed
            file = stack.enter_context(_replacing(_path_of(name)))
            out = _compressed(file, name)
            if out is not file:
                stack.callback(out.close)
            yield out
    except OSError as error:
        raise BackupError(f"cannot write {name}: {error.strerror or error}") from None


def _path_of(name: str) -> Path:
    """Return the path that a backup replaces: never a link, such as /dev/stdout, nor a device."""
    path = Path(os.path.realpath(name))
    if path.exists() and not path.is_file():
        raise BackupError(f"cannot write {name}: it is not a regular file; use - for standard output")
    return path


@contextmanager
def _source(name: str) -> Iterator[IO[bytes]]:
    """Open a file that can be read twice. Standard input is copied to a temporary file first."""
    try:
        with open(name, "rb") if name != "-" else tempfile.TemporaryFile() as file:
            if name == "-":
                while chunk := sys.stdin.buffer.read(1 << 20):
                    file.write(chunk)
                file.seek(0)
            yield file
    except OSError as error:
        raise BackupError(f"cannot read {name}: {error.strerror or error}") from None


# Back up --------------------------------------------------------------------------------------------------------------


class _Ids:
    """A set of job ids in a temporary file: a million of them takes a few MB of memory."""

    def __init__(self) -> None:
        import sqlite3  # here, because some builds of Python lack it, and only backups need it

        self._db = sqlite3.connect("", isolation_level=None)  # "" is a temporary file of its own
        for statement in (
            "PRAGMA journal_mode=OFF",
            "PRAGMA cache_size=-8000",
            "CREATE TABLE ids (id TEXT PRIMARY KEY) WITHOUT ROWID",
            "BEGIN",
        ):
            self._db.execute(statement)

    def add(self, ids: Iterable[str]) -> None:
        self._db.executemany("INSERT OR IGNORE INTO ids VALUES (?)", ((id,) for id in ids))

    def find(self, ids: Sequence[str]) -> set[str]:
        """Return those of the ids that are in the set."""
        found: set[str] = set()
        for at in range(0, len(ids), 500):
            some = ids[at : at + 500]
            marks = ",".join("?" * len(some))
            found.update(row[0] for row in self._db.execute(f"SELECT id FROM ids WHERE id IN ({marks})", some))
        return found

    def sorted(self, where: str, bound: str, order: str) -> Iterator[list[str]]:
        rows = self._db.execute(f"SELECT id FROM ids WHERE id {where} ? ORDER BY id {order}", (bound,))
        while some := rows.fetchmany(SCANNED):
            yield [row[0] for row in some]

    def close(self) -> None:
        self._db.close()


def back_up(queue: AnyQueue, name: str, bar: Bar) -> dict[str, int]:
    """Write a backup of a queue, which may be running, to a file. Return the counts of its lines.

    Every job that is pending, processing, failed or cancelled from the beginning to the end is in
    the file, once, as it was at one moment meanwhile. Jobs submitted meanwhile may be missing, and
    then so are their Idempotency-Keys. The file appears under its name when it is complete.
    """
    stats = queue.stats()
    counts = {status: stats[status] for status in (*UNENDED, *ENDED) if status != "completed"}
    bar.length = sum(counts.values())
    with _destination(name) as file:
        writer = Writer(file)
        about = {"format": FORMAT, "version": VERSION, "tinyqueue": __version__}
        namespace = queue.parts[0].keys.prefix[1:-2]
        if len(queue.parts) > 1:
            namespace = namespace.rpartition(".")[0]
        about |= {"namespace": namespace, "shards": len(queue.parts)}
        writer.write_fields("header", **about, createdAt=queue.now(), counts=counts)
        for paused in sorted(name for name, state in queue.queues().items() if state["paused"]):
            writer.write_fields("pause", queue=paused)
        for made, _ in list_schedules(queue):
            writer.write_fields("schedule", record=made)
        for at, part in enumerate(queue.parts):
            for limit, value in pairs(part.store.read(("HGETALL", part.keys.overrides))[0]):
                writer.write_fields("limit", key=limit, value=msgspec.Raw(value), shard=at)
        for at, part in enumerate(queue.parts):
            _back_up_part(part, at, writer, bar)
        writer.end()
    return dict(writer.counts)


def _back_up_part(part: Queue, shard: int, writer: Writer, bar: Bar) -> None:
    server = _run_id(part)
    began = part.now()
    seen = _Ids()
    try:
        for jobs in filter(None, _read_jobs(part, seen, began)):
            writer.write("job", jobs)
            bar.update(len(jobs))
        for hash, value in _read_once(part, seen.find, began - DRAFT_TIME):
            writer.write_fields("once", key=hash, value=msgspec.Raw(value), shard=shard)
    finally:
        seen.close()
    if _run_id(part) != server:
        why = "Redis was restarted, or another one has taken over, so some keys may not have been read"
        raise BackupError(f"{why}; make the backup again")


def _read_jobs(part: Queue, seen: _Ids, began: int) -> Iterator[list[bytes]]:
    """Read the jobs that wait, in order, then all others: those that run, move or have ended.

    Of these, the ones that were submitted since `began` come last, to be restored behind all.
    """
    for window in _waiting_ids(part):
        known = seen.find(window)
        for batch in _in_batches(part, [id for id in window if id not in known]):
            waiting = {job.id: line for job, line in batch if job.status in UNENDED}
            seen.add(waiting)
            yield list(waiting.values())
    others = _Ids()
    try:
        for ids in _stored_ids(part):
            known = seen.find(ids)
            others.add(id for id in ids if id not in known)
        bound = f"{began:012x}"
        bound = f"{bound[:8]}-{bound[8:]}"
        older = others.sorted("<", bound, "DESC")
        newer = others.sorted(">=", bound, "ASC")
        for behind, ids in itertools.chain(((False, ids) for ids in older), ((True, ids) for ids in newer)):
            seen.add(ids)
            for batch in _in_batches(part, ids, behind):
                yield [line for job, line in batch if job.status != "completed"]
    finally:
        others.close()


def _in_batches(part: Queue, ids: Sequence[str], behind: bool = False) -> Iterator[list[tuple[Job, bytes]]]:
    """Read jobs and make their lines, up to 500 or BATCH_BYTES at a time."""
    batch: list[tuple[Job, bytes]] = []
    size = 0
    for job in _read_stored(part, ids):
        line = _job_line(job, behind)
        batch.append((job, line))
        size += len(line)
        if len(batch) == 500 or size > BATCH_BYTES:
            yield batch
            batch = []
            size = 0
    yield batch


# Reading a queue ------------------------------------------------------------------------------------------------------


def _run_id(part: Queue) -> str:
    """Return the run id of Redis, or "". A restart or a failover changes it."""
    with suppress(Corrupted, Unavailable):
        info = part.store.read(("EXISTS", part.keys.counts), ("INFO", "server"))[1]
        return parse_info(info).get("run_id", "")
    return ""


def _waiting_ids(part: Queue) -> Iterator[list[str]]:
    """Return the ids that wait: the delayed ones, those of each queue, and the held ones.

    Each kind comes last in first, in the order in which `load` takes jobs. Some ids come twice.
    Jobs that move meanwhile may be missing, but `_stored_ids` has them.
    """
    for window in part.read_entries(part.keys.delayed, "ZRANGE"):
        yield ids_in(reversed(window))
    for window in part.read_lists([part.keys.jobs(name) for name in part.queue_names()]):
        yield ids_in(window)
    for window in part.read_held():
        yield ids_in(reversed(window))


def _stored_ids(part: Queue) -> Iterator[list[str]]:
    """Return the ids of all jobs, except completed ones, in any order.

    A record exists from the submit of a job until it is purged or expires. So no job is missing
    that exists from the beginning to the end, however often it moves meanwhile.
    """
    ids = filter(ID.fullmatch, scan(part.store.read, part.keys.job("")))
    while some := list(itertools.islice(ids, SCANNED)):
        completed = _completed(part, some)
        yield [id for id in some if id not in completed]


def _completed(part: Queue, ids: Sequence[str]) -> set[str]:
    scores = part.store.read(*(("ZSCORE", part.keys.ended["completed"], id) for id in ids)) if ids else []
    return {id for id, score in zip(ids, scores, strict=True) if score is not None}


def _read_stored(part: Queue, ids: Sequence[str]) -> Iterator[Job]:
    """Read jobs as they are stored: payloads and results stay JSON, a `msgspec.Raw`.

    Leaves out jobs that do not exist any more. A job that cannot be read becomes a failed job that
    shows its record.
    """
    for id, record in part.read_records(ids, most=500):  # a backup reads all that it asks for
        if record is not None:
            yield stored_job(id, record)


def _read_once(part: Queue, known: Callable[[Sequence[str]], set[str]], before: int) -> Iterator[tuple[str, bytes]]:
    """Return the Idempotency-Keys with their values, the keys as hashes.

    Leaves out those of jobs that a backup lacks because they were submitted while it was made: a
    repeat of such a submit must store its jobs. `known` returns the ids that the backup has, and
    jobs created before `before` existed when it began.
    """
    hashes = scan(part.store.read, part.keys.once_hash(""))
    while some := list(itertools.islice(hashes, SCANNED)):
        values = part.store.read(("MGET", *map(part.keys.once_hash, some)))[0]
        found = {hash: value for hash, value in zip(some, values, strict=True) if value is not None}
        made = {hash: read_made(value).ids for hash, value in found.items()}
        late = {id for ids in made.values() for id in ids if not ID.fullmatch(id) or created_at(id) >= before}
        lacking = late - known(list(late))
        lacking -= _completed(part, list(lacking))
        yield from ((hash, value) for hash, value in found.items() if lacking.isdisjoint(made[hash]))


# Check ----------------------------------------------------------------------------------------------------------------


class Contents(NamedTuple):
    """What a file contains, known after it was checked from its first line to its last."""

    header: Line
    counts: Mapping[str, int]
    queues: frozenset[str]  # those with jobs that have not ended, or with schedules
    paused: frozenset[str]


def check(file: IO[bytes], name: str) -> Contents:
    """Read all of a file. Raises BackupError if it is cut, damaged, or newer than this version."""
    sum = hashlib.sha256()
    counts: Counter[str] = Counter()
    queues: set[str] = set()
    paused: set[str] = set()
    header: Line | None = None
    end: Line | None = None
    for number, text in enumerate(_decompressed(file, name), 1):
        if end:
            raise _damaged(name, "there are lines after its last one")
        line = _read_line(text, name, number)
        header = header or _check_header(line, name)
        if line.kind == "end":
            end = line
            continue
        sum.update(text)
        counts[line.kind] += 1
        if line.kind == "job":
            job = _check_job(line, name, number)
            queues |= {job.queue} if job.status in UNENDED else set()
        elif line.kind == "once":
            _check_once(line, name, number, header.shards)
        elif line.kind == "pause":
            paused.add(line.queue)
        elif line.kind == "schedule":
            queues.add(_check_schedule(line, name, number).queue)
        elif line.kind == "limit":
            _check_override(line, name, number, header.shards)
        elif line.kind != "header" and not line.optional:
            todo = f"use TinyQueue {header.tinyqueue}, which wrote it, or a newer one"
            raise BackupError(f"{name} has entries of a kind that this version does not know: {line.kind}; {todo}")
    if not header or not end:
        why = "its last line is missing, because the backup was interrupted or the file was cut"
        raise BackupError(f"{name} is incomplete: {why}; nothing was restored. Use another copy of it")
    if end.sha256 != sum.hexdigest() or end.lines != counts.total() or end.counts != counts:
        raise _damaged(name, "its checksum is wrong")
    if not all(map(NAME.fullmatch, paused)):
        raise _damaged(name, "the name of a paused queue is wrong")
    return Contents(header, counts, frozenset(queues), frozenset(paused))


def _read_line(text: bytes, name: str, number: int) -> Line:
    try:
        return _decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if number == 1:
            raise BackupError(f"{name} is not a backup of TinyQueue") from None
        if not text.endswith(b"\n"):  # the file was cut within this line
            return Line("cut", optional=True)
        raise _damaged(name, f"line {number}: {error}") from None


def _check_header(line: Line, name: str) -> Line:
    if line.kind != "header" or line.format != FORMAT:
        raise BackupError(f"{name} is not a backup of TinyQueue")
    if line.version > VERSION:
        todo = f"use TinyQueue {line.tinyqueue}, which wrote it, or a newer one"
        raise BackupError(f"{name} has format {line.version}, and this version reads formats up to {VERSION}; {todo}")
    return line


def _check_job(line: Line, name: str, number: int) -> Job:
    job = stored_job(line.id, bytes(line.record))
    readable = isinstance(job.payload, msgspec.Raw)
    if not (ID.fullmatch(line.id) and readable and NAME.fullmatch(job.queue) and NAME.fullmatch(job.type)):
        raise _damaged(name, f"line {number} is not a job")
    return job


def _check_once(line: Line, name: str, number: int, shards: int) -> None:
    try:
        made = msgspec.json.decode(line.value, type=Made)
    except msgspec.DecodeError:
        made = None
    readable = made is not None and all(ID.fullmatch(id) for id in made.ids)
    if not (readable and re.fullmatch("[0-9a-f]{64}", line.key) and 0 <= line.shard < shards):
        raise _damaged(name, f"line {number} is not an Idempotency-Key")


def _check_schedule(line: Line, name: str, number: int) -> Schedule:
    try:
        made = read_schedule(bytes(line.record))
        made.calendar  # noqa: B018 - raises
        check_name("name", made.name)
        check_name("queue", made.queue)
        check_name("code", made.code or "api")
    except TinyQueueError as error:
        raise _damaged(name, f"line {number} is not a schedule: {error}") from None
    return made


def _check_override(line: Line, name: str, number: int, shards: int) -> None:
    if not LIMIT.fullmatch(line.key) or not 0 <= line.shard < shards:
        raise _damaged(name, f"line {number} names no limit")


# Restore --------------------------------------------------------------------------------------------------------------


class Restored:
    """A restore, and its result as far as it has come."""

    def __init__(self, queue: AnyQueue, contents: Contents, oldest: int) -> None:
        self.queue = queue
        self.contents = contents
        self.oldest = oldest
        self.stored: Counter[str] = Counter()  # jobs by status
        self.runs: Counter[tuple[str, str, bool]] = Counter()  # jobs to run by queue, type, and whether they are due
        self.older = 0  # jobs left out
        self.present = 0
        self.left_out: set[str] = set()
        self.dependents: list[str] = []  # jobs with parents, some of which may come later in the file
        self.taken: list[str] = []
        self.keys = 0
        self.schedules = 0
        self.limits = 0  # whose numbers were set

    @property
    def resumable(self) -> list[str]:
        """The queues that were not paused when the backup was made."""
        return sorted(self.contents.queues - self.contents.paused)

    def load(self, part: Queue, jobs: Sequence[Job], behind: bool) -> None:
        """Store jobs in their shard. Pauses all queues of the file before it stores the first."""
        now = part.now()
        young = [job for job in jobs if not self.oldest or now - _last_change(job) <= self.oldest]
        while (loaded := part.load(young, behind)).unpaused:
            self._pause_queues()
        for job in loaded.jobs:
            self.stored[job.status] += 1
            if job.status == "pending":
                self.runs[job.queue, job.type, job.due <= now] += 1
        self.dependents += [job.id for job in young if job.waiting_for]
        self.left_out.update({job.id for job in jobs} - {job.id for job in loaded.jobs})
        self.taken += loaded.taken
        self.older += len(jobs) - len(young)
        self.present += len(young) - len(loaded.jobs) - len(loaded.taken)

    def advance(self) -> None:
        """Advance the jobs that waited for others.

        A parent that the file does not have has completed while the backup was made.
        """
        for id in self.dependents:
            part = self.queue.part_of(id)
            job = part.get(id)
            if job:
                part.restore(id, completed=set(job.waiting_for) - self.left_out)

    def load_schedules(self, part: Queue, schedules: Sequence[Schedule]) -> None:
        """Store schedules unless they exist. First pauses all queues of the file."""
        if not self.schedules:
            self._pause_queues()
        for made in schedules:
            if not part.store.read(("EXISTS", part.keys.schedule(made.name)))[0]:
                part.change_schedule(made.name, made.restore)
                if made.code:  # so that the code removes it if it no longer declares it
                    part.store.read(("SET", part.keys.generation(made.code), "{}", "NX"))
                self.schedules += 1

    def _pause_queues(self) -> None:
        for name in sorted(self.contents.queues):
            self.queue.pause(name)
        if self.queue.workers():
            time.sleep(2 * PAUSE_AGE)  # until then, they may not know that these queues are paused


def _last_change(job: Job) -> int:
    """Return when a job ended, or could start, or was last started or requeued."""
    return job.ended_at if job.status in ENDED else max(job.created_at, job.run_at, job.updated_at)


def restore(queue: AnyQueue, name: str, bar: Bar, *, merge: bool = False, oldest: int = 0) -> Restored:
    """Restore a file into a namespace without jobs, or with `merge` into one that has some.

    Jobs keep their ids. Those that are there already stay as they are, so a restore that was
    interrupted can be repeated. All queues are paused before their first job is stored. Leaves out
    jobs that could start, or have ended, more than `oldest` milliseconds ago, unless that is 0.
    Raises BackupError before anything is written if the file or the namespace does not fit.
    """
    with _source(name) as file:
        contents = check(file, name)
        _check_target(queue, contents, name, merge)
        bar.length = contents.counts.get("job", 0)
        restored = Restored(queue, contents, oldest)
        if not merge:
            for paused in sorted(contents.paused):
                queue.pause(paused)
        try:
            _restore_lines(restored, _decompressed(file, name), bar)
            restored.advance()
        except Unavailable as error:
            todo = "to continue, repeat the command with --merge"
            raise BackupError(f"{error}; {restored.stored.total()} jobs were restored so far; {todo}") from error
    return restored


def _restore_lines(restored: Restored, texts: Iterable[bytes], bar: Bar) -> None:
    for (kind, part, behind), lines in _batches(restored.queue, texts):
        if kind == "schedule":
            restored.load_schedules(part, [read_schedule(bytes(line.record)) for line in lines])
        elif kind == "once":
            restored.keys += _load_once(part, {line.key: bytes(line.value) for line in lines})
        elif kind == "limit":
            sets = [("HSETNX", part.keys.overrides, line.key, bytes(line.value)) for line in lines]
            restored.limits += sum(part.store.read(*sets))
        else:
            restored.load(part, [stored_job(line.id, bytes(line.record)) for line in lines], behind)
            bar.update(len(lines))


def _load_once(part: Queue, values: Mapping[str, bytes]) -> int:
    """Store Idempotency-Keys of a backup, by their hashes. Return how many were not there.

    Each expires `keep_once` after its newest job was submitted. If that time is over or too far
    ahead, it expires `keep_once` after now.
    """
    now = part.now()
    sets = []
    for hash, value in values.items():
        until = max((created_at(id) for id in read_made(value).ids), default=0) + part.keep_once_ms
        left = until - now if now < until < now + part.keep_once_ms else part.keep_once_ms
        sets.append(("SET", part.keys.once_hash(hash), value, "NX", "PX", left))
    return sum(reply is not None for reply in part.store.read(*sets)) if sets else 0


def _check_target(queue: AnyQueue, contents: Contents, name: str, merge: bool) -> None:
    shards = contents.header.shards
    if shards != len(queue.parts):
        why = f"{name} is the backup of a queue with {shards} shards, and TINYQUEUE_SHARDS is {len(queue.parts)}"
        raise BackupError(f"{why}. Ids and keys belong to their shard: restore it with TINYQUEUE_SHARDS={shards}")
    stats = queue.stats()
    if not merge and (jobs := sum(stats[status] for status in (*UNENDED, *ENDED))):
        todo = "use another TINYQUEUE_NAMESPACE, or --merge, which also continues an interrupted restore"
        raise BackupError(f"this namespace has jobs already ({jobs}); {todo}")


def _part_of(queue: AnyQueue, line: Line) -> Queue:
    """Return the shard of an entry."""
    if line.kind == "schedule":
        return queue.part_for(read_schedule(bytes(line.record)).name)
    return queue.part_of(line.id) if line.kind == "job" else queue.parts[line.shard]


Batch = tuple[str, Queue, bool]  # kind, shard, and whether these jobs go behind all others


def _batches(queue: AnyQueue, texts: Iterable[bytes]) -> Iterator[tuple[Batch, list[Line]]]:
    """Group the lines that one transaction stores."""
    lines: list[Line] = []
    size = 0
    last: Batch | None = None
    for text in texts:
        line = _decode(text)
        if line.kind not in ("job", "once", "schedule", "limit"):
            continue
        part = _part_of(queue, line)
        batch = (line.kind, part, line.behind)
        if last and lines and (batch != last or len(lines) == MAX_JOBS or size > BATCH_BYTES):
            yield last, lines
            lines = []
            size = 0
        last = batch
        lines.append(line)
        size += len(text)
    if last and lines:
        yield last, lines
