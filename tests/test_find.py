"""Finding jobs: by tags and by the text of their payloads, in listings, bulk changes and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from client import Client
from conftest import Server, put, raw
from test_processes import folder, run  # noqa: F401  fixtures

import tinyqueue
import tinyqueue_reading
from tinyqueue import MAX_TAGS, Filter, InvalidJob, Job, Queue, handler
from tinyqueue_job import TAG_LENGTH
from tinyqueue_shards import Shards

REPOSITORY = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("no_handlers")


@pytest.fixture(autouse=True)
def types(no_handlers: None) -> None:
    @handler("echo")
    def echo(payload: Any, job: Job) -> None: ...


def ids(jobs: Any) -> list[str]:
    return [job.id for job in jobs]


# Tags -----------------------------------------------------------------------------------------------------------------


def test_submit_with_tags_stores_each_once(api: Client, queue: Queue) -> None:
    answer = api.post("/jobs", {"type": "echo", "payload": 1, "tags": ["customer 17", "größer", "customer 17"]})
    assert answer.status == 201
    job = queue.get(answer.json["jobId"])
    assert job.tags == ("customer 17", "größer")
    assert api.get(f"/jobs/{job.id}").json["tags"] == ["customer 17", "größer"]


@pytest.mark.parametrize("tags", [None, []])
def test_submit_without_tags_stores_none(api: Client, queue: Queue, tags: Any) -> None:
    id = api.post("/jobs", {"type": "echo", "payload": 1, "tags": tags}).json["jobId"]
    assert "tags" not in api.get(f"/jobs/{id}").json
    assert raw(queue).get(queue.keys.job(id)) == b'{"type":"echo","payload":1}'


WRONG = [
    "a",
    {"a": 1},
    7,
    [""],
    [1],
    ["a\n"],
    ["a" * (TAG_LENGTH + 1)],
    [str(n) for n in range(MAX_TAGS + 1)],
    ["a\u00a0"],
]


@pytest.mark.parametrize("tags", WRONG, ids=map(repr, range(len(WRONG))))
def test_submit_refuses_invalid_tags(api: Client, queue: Queue, tags: Any) -> None:
    answer = api.post("/jobs", {"type": "echo", "payload": 1, "tags": tags})
    assert (answer.status, answer.problem["field"]) == (422, "tags")
    with pytest.raises(InvalidJob, match="tags: must be a list of up to 10 texts"):
        queue.draft("echo", 1, tags=tags)
    assert queue.stats()["pending"] == 0


def test_submit_in_a_batch_with_tags(api: Client, queue: Queue) -> None:
    answer = api.post("/jobs/batch", [{"type": "echo", "payload": 1, "tags": [tag]} for tag in "ab"])
    assert [queue.get(job["jobId"]).tags for job in answer.json["jobs"]] == [("a",), ("b",)]


def test_documents_say_how_many_tags_a_job_may_have() -> None:
    tags = json.loads((REPOSITORY / "openapi.json").read_text())["components"]["schemas"]["Job"]["properties"]["tags"]
    assert (tags["maxItems"], tags["items"]["maxLength"]) == (MAX_TAGS, TAG_LENGTH)
    row = f"| `tags` | up to {MAX_TAGS} texts of at most {TAG_LENGTH} printable characters"
    assert row in (REPOSITORY / "docs" / "http.md").read_text()


def test_replay_keeps_the_tags(queue: Queue) -> None:
    job = put(queue, "failed", tags=["vip"])
    assert queue.replay(job.id).tags == ("vip",)
    assert queue.replay(job.id, tags=None).tags == ()


# Filters --------------------------------------------------------------------------------------------------------------


def test_list_by_tag_finds_jobs_of_every_status(queue: Queue) -> None:
    made = {status: put(queue, status, tags=["a", "b"], queue=status) for status in tinyqueue.STATUSES}
    other = queue.enqueue("echo", 1, tags=["ab"])
    assert set(ids(queue.page(Filter(tag="b"))[0])) == {job.id for job in made.values()}
    assert ids(queue.page(Filter("failed", tag="a"))[0]) == [made["failed"].id]
    assert ids(queue.page(Filter(tag="ab"))[0]) == [other.id]
    assert queue.page(Filter(tag="c"))[0] == []


TEXTS = {
    "in a value": ("Meier", True),
    "in another case": ("MEIER@", True),
    "beyond ASCII": ("GRÖSSE 7", True),
    "a field": ('"customer":17', True),
    "a field with a space": ('"customer": 17', True),
    "a field in the middle": ('17,"name"', True),
    "with quotes in a string": ('said "hello"', True),
    "of the type": ("send", False),
    "of the record": ("maxAttempts", False),
    "of a tag": ("vip", False),
    "not there": ("Meyer", False),
}


@pytest.mark.parametrize("cut", [None, 0, 10, 1000])
@pytest.mark.parametrize("text", TEXTS)
def test_list_by_text_looks_at_the_payload(queue: Queue, text: str, cut: int | None) -> None:
    payload = {"customer": 17, "name": "meier@example.com", "note": 'größe 7, he said "hello"'}
    job = queue.enqueue("send", payload, tags=["vip"], max_attempts=7)
    queue.enqueue("send", {"customer": 18})
    wanted, there = TEXTS[text]
    assert ids(queue.page(Filter(text=wanted), cut=cut)[0]) == ([job.id] if there else [])


def test_list_by_text_finds_a_record_that_cannot_be_read(server: Server) -> None:
    queue = server.queue()
    job = put(queue, "failed")
    raw(queue).set(queue.keys.job(job.id), b'{"type":"echo","broken', keepttl=True)
    assert ids(queue.page(Filter(text="broken"))[0]) == [job.id]


def test_list_says_how_many_jobs_it_has_looked_at(api: Client, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyqueue_reading, "SCANNED", 4)
    wanted = queue.enqueue("echo", {"customer": 17}, tags=["vip"])
    queue.enqueue_many("echo", range(9))
    found: list[str] = []
    scanned: list[int] = []
    cursor = ""
    while True:
        answer = api.get(f"/jobs?tag=vip&text=17{cursor}").json
        found += [job["id"] for job in answer["jobs"]]
        scanned.append(answer["scanned"])
        if not answer["cursor"]:
            break
        cursor = f"&cursor={answer['cursor']}"
    assert (found, scanned) == ([wanted.id], [4, 4, 2])
    assert api.get("/jobs?limit=3").json["scanned"] == 3


def test_list_of_shards_adds_up_what_they_looked_at(near: Queue) -> None:
    shards = Shards([near, Queue(near.pool, namespace="other")])
    made = [shards.enqueue("echo", {"n": n}, tags=["even"] * (n % 2 == 0)) for n in range(8)]
    page = shards.page(Filter(tag="even", text='"n":'))
    assert set(ids(page[0])) == {job.id for job in made[::2]}
    assert page.scanned == 8


@pytest.mark.parametrize(("verb", "status"), [("retry", "failed"), ("cancel", "pending")])
@pytest.mark.parametrize("filter", [{"tag": "vip"}, {"text": "customer 17"}, {"tag": "vip", "text": "17"}])
def test_change_many_by_tag_and_text(api: Client, queue: Queue, verb: str, status: str, filter: dict[str, str]) -> None:
    wanted = put(queue, status, tags=["vip"], queue="a")
    other = put(queue, status, tags=["common"], queue="b")
    for job, text in ((wanted, "customer 17"), (other, "customer 18")):
        record = json.loads(raw(queue).get(queue.keys.job(job.id))) | {"payload": {"to": text}}
        raw(queue).set(queue.keys.job(job.id), json.dumps(record), keepttl=True)
    answer = api.post(f"/jobs/{verb}", filter)
    assert (answer.status, answer.json["retried" if verb == "retry" else "cancelled"]) == (200, 1)
    assert queue.get(other.id).status == status
    assert queue.get(wanted.id).status != status


def test_purge_by_tag(queue: Queue) -> None:
    put(queue, "completed", tags=["old"])
    kept = put(queue, "completed")
    assert queue.purge(Filter("completed", tag="old"))["purged"] == 1
    assert ids(queue.page()[0]) == [kept.id]


# The command line -----------------------------------------------------------------------------------------------------


def test_command_line_submits_tags(near: Queue, run: Any) -> None:  # noqa: F811
    id = run("enqueue", "echo", "17", "--tag", "vip", "--tag", "two words").stdout.decode().strip()
    assert near.get(id).tags == ("vip", "two words")
    assert "tags         vip, two words" in run("get", id).stdout.decode()


NO_UNICODE = [("type", "type"), ("queue", "queue"), ("error_type", "errorType"), ("tag", "tag"), ("text", "text")]


@pytest.mark.parametrize(("field", "name"), NO_UNICODE)
def test_refuse_a_filter_that_is_not_unicode(api: Client, queue: Queue, field: str, name: str) -> None:
    put(queue, "failed")
    with pytest.raises(InvalidJob, match=f"{name}: must be valid Unicode"):
        queue.page(Filter(**{field: "a\ud800"}))
    for verb in ("retry", "purge"):
        answer = api.post(f"/jobs/{verb}", {"status": "failed", name: "a\ud800"})
        assert (answer.status, answer.problem["field"]) == (422, name)


def test_command_line_refuses_a_text_that_is_not_unicode(near: Queue, run: Any) -> None:  # noqa: F811
    near.enqueue("echo", 1)
    done = run("list", "--text", b"\xff")
    assert b"text: must be valid Unicode" in done.stderr
    assert done.returncode == 2


def test_list_by_text_finds_a_record_that_is_nested_too_deep(server: Server) -> None:
    queue = server.queue()
    job = put(queue, "failed")
    raw(queue).set(queue.keys.job(job.id), b'{"type":"echo","payload":' + b"[" * 100_000 + b"broken", keepttl=True)
    assert ids(queue.page(Filter(text="broken"))[0]) == [job.id]


def test_command_line_finds_by_tag_and_text(near: Queue, run: Any) -> None:  # noqa: F811
    id = near.enqueue("echo", {"customer": 17}, tags=["vip", "two words"]).id
    near.enqueue("echo", {"customer": 18})
    for options in (("--tag", "two words"), ("--text", '"customer": 17'), ("--tag", "vip", "--text", "CUSTOMER")):
        [job] = json.loads(run("list", "--json", *options).stdout)
        assert job["id"] == id
    done = run("cancel", "--tag", "vip", "--text", "17", "--yes")
    assert done.stdout.decode() == "1 cancelled, 0 skipped (changed meanwhile)\n"
