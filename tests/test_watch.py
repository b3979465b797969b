"""Reading and changing jobs over HTTP: lists, waiting, cancel, retry, bulk, queues and workers."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
from client import NO_BODY, Answer, Client
from conftest import dump, lapse, put, raw, until

from tinyqueue import STATUSES, Failure, Job, Queue, handler
from tinyqueue_config import WEB_THREADS
from wsgi import PREVIEW_BYTES

NO_JOB = "01900000-0000-7000-8000-000000000000"
ENDED = ("completed", "failed", "cancelled")


def echo(payload: Any, job: Job) -> Any:
    return payload


def deaf(payload: Any) -> Any:
    return payload


@pytest.fixture(autouse=True)
def handlers(no_handlers: None) -> None:
    handler("echo")(echo)
    handler("deaf", queue="deaf")(deaf)


def ids(answer: Answer) -> list[str]:
    assert answer.status == 200, answer
    return [job["id"] for job in answer.json["jobs"]]


def pages(api: Client, path: str) -> list[list[str]]:
    """Return all pages of a listing by following its cursors."""
    found = []
    cursor = ""
    while cursor is not None:
        answer = api.get(path + f"&cursor={cursor}")
        found.append(ids(answer))
        cursor = answer.json["cursor"]
    return found


# List -----------------------------------------------------------------------------------------------------------------


def test_list_is_empty_without_jobs(api: Client) -> None:
    assert api.get("/jobs").json == {"jobs": [], "cursor": None, "scanned": 0}


def test_list_returns_jobs_newest_first_with_the_fields_of_show(api: Client, queue: Queue) -> None:
    made = [put(queue, status, queue=status).id for status in STATUSES]
    answer = api.get("/jobs")
    assert sorted(ids(answer)) == sorted(made)
    assert answer.json["cursor"] is None
    for job in answer.json["jobs"]:
        whole = api.get(f"/jobs/{job['id']}").json
        whole.get("error", {}).pop("traceback", None)
        whole.pop("why", None)
        whole.pop("history", None)
        assert job == whole
    times = [job.get("endedAt", job["createdAt"]) for job in answer.json["jobs"]]
    assert times == sorted(times, reverse=True)


def test_list_returns_a_cancelled_job_once(api: Client, queue: Queue) -> None:
    """Its id stays in the list of its queue until a worker drops it."""
    id = queue.enqueue("echo", 1).id
    queue.clock.ahead = 1000
    queue.cancel(id)
    assert ids(api.get("/jobs")) == [id]
    assert pages(api, "/jobs?limit=1") in ([[id]], [[id], []])


@pytest.mark.parametrize("status", STATUSES)
def test_list_returns_only_jobs_of_the_given_status(api: Client, queue: Queue, status: str) -> None:
    made = {each: put(queue, each, queue=each).id for each in STATUSES}
    assert ids(api.get(f"/jobs?status={status}")) == [made[status]]


def test_list_returns_delayed_jobs_as_pending(api: Client, queue: Queue) -> None:
    id = put(queue, "delayed").id
    assert ids(api.get("/jobs?status=pending")) == [id]


FILTERED = {
    "": 4,
    "type=echo": 3,
    "type=deaf": 1,
    "type=nope": 0,
    "queue=deaf": 1,
    "queue=slow": 1,
    "queue=default": 2,
    "queue=no such name!": 0,
    "errorType=Boom": 1,
    "errorType=boom": 0,
    "status=failed&errorType=Boom&type=echo&queue=default": 1,
    "status=pending&errorType=Boom": 0,
    "status=pending&type=echo": 2,
    "status=&type=&queue=&errorType=&cursor=": 4,
    "type=%C3%A9": 0,
    "type=nope&type=echo": 3,
}


@pytest.mark.parametrize(("query", "count"), FILTERED.items())
def test_list_returns_only_jobs_that_match_all_filters(api: Client, queue: Queue, query: str, count: int) -> None:
    put(queue, "failed")
    put(queue, "pending")
    queue.enqueue("echo", 1, queue="slow")
    queue.enqueue("deaf", 1)
    assert len(ids(api.get("/jobs?" + query.replace(" ", "%20")))) == count


@pytest.mark.parametrize("status", ["pending", "completed", "cancelled"])
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 500])
def test_list_returns_every_job_once_over_all_pages(api: Client, queue: Queue, status: str, limit: int) -> None:
    made = {put(queue, status).id if status != "pending" else queue.enqueue("echo", 1).id for _ in range(7)}
    found = pages(api, f"/jobs?status={status}&limit={limit}")
    assert {len(page) for page in found[:-1]} <= {limit}
    assert len(found) == -(-7 // limit)
    listed = [id for page in found for id in page]
    assert (len(listed), set(listed)) == (7, made)


def test_list_returns_unchanged_jobs_once_while_others_come_and_go(api: Client, queue: Queue) -> None:
    queue.enqueue_many("echo", range(9))
    whole = ids(api.get("/jobs"))
    first = api.get("/jobs?limit=3")
    queue.enqueue("echo", "new")
    queue.cancel(whole[4])
    rest = ids(api.get(f"/jobs?status=pending&limit=100&cursor={first.json['cursor']}"))
    assert ids(first) == whole[:3]
    assert [id for id in rest if id in whole] == [whole[3], *whole[5:]]


def test_list_returns_fifty_jobs_unless_a_limit_is_given(api: Client, queue: Queue) -> None:
    queue.enqueue_many("echo", range(60))
    assert [len(ids(api.get("/jobs" + query))) for query in ("", "?limit=1", "?limit=0059", "?limit=500")] == [
        50,
        1,
        59,
        60,
    ]


@pytest.mark.parametrize("minutes", ["", "121", "-1", "1.0", "x"])
def test_refuse_an_invalid_number_of_minutes(api: Client, minutes: str) -> None:
    answer = api.get(f"/stats?minutes={minutes}")
    assert (answer.status, answer.kind, answer.problem["field"]) == (400, "invalid-query", "minutes")


@pytest.mark.parametrize("minutes", [2, 60, 120])
def test_stats_return_history_for_the_requested_minutes(api: Client, queue: Queue, minutes: int) -> None:
    put(queue, "completed")
    history = api.get(f"/stats?minutes={minutes}").json["history"]
    assert len(history) == minutes
    assert {after["at"] - before["at"] for before, after in pairwise(history)} <= {60_000}
    assert sum(minute["completed"] for minute in history) == 1
    assert api.get("/stats?minutes=0").json == api.get("/stats").json


@pytest.mark.parametrize("limit", ["", "0", "501", "-1", "1.0", "1e1", " 1", "x", "%D9%A3", "9" * 5000, "1%00"])
def test_refuse_an_invalid_limit(api: Client, limit: str) -> None:
    answer = api.get(f"/jobs?limit={limit}")
    assert (answer.status, answer.kind, answer.problem["field"]) == (400, "invalid-query", "limit")


@pytest.mark.parametrize(
    "cursor",
    ["x", "1", "1.", ".1", "1.x", "-1.a", "1.a.b", "1." + "a" * 37, "9" * 17 + ".a", "1.a%0a", "%D9%A3.a", NO_JOB],
)
def test_refuse_an_invalid_cursor(api: Client, queue: Queue, cursor: str) -> None:
    for answer in (api.get(f"/jobs?cursor={cursor}"), api.post("/jobs/cancel", {"cursor": cursor})):
        assert (answer.status, answer.kind, answer.problem["field"]) == (422, "invalid-job", "cursor")


@pytest.mark.parametrize("status", ["delayed", "Pending", "pending ", "x", "%00", "pending,failed"])
def test_refuse_an_invalid_status_and_list_the_valid_ones(api: Client, status: str) -> None:
    answer = api.get(f"/jobs?status={status}")
    assert (answer.status, answer.problem["field"]) == (422, "status")
    assert all(each in answer.problem["detail"] for each in STATUSES)


@pytest.mark.parametrize(
    "query", ["state=failed", "Status=failed", "error_type=x", "%00=x", "%C3%A9=x", "=x", "limit[]=1"]
)
def test_refuse_an_unknown_filter_and_list_the_known_ones(api: Client, query: str) -> None:
    answer = api.get(f"/jobs?{query}")
    assert (answer.status, answer.kind) == (422, "invalid-job")
    assert "status, type, queue, errorType" in answer.problem["detail"]


@pytest.mark.parametrize(
    "query", ["type=%ff", "queue=%fe%ff", "errorType=%c3", "status=%ff", "limit=%ff", "cursor=%ff", "%ff=x"]
)
def test_refuse_a_query_that_is_not_utf8(api: Client, query: str) -> None:
    answer = api.get(f"/jobs?{query}")
    assert answer.status in (400, 422)
    assert answer.problem
    assert api.log.getvalue() == ""


def test_list_shortens_long_payloads_and_results(api: Client, queue: Queue) -> None:
    long = "é" * PREVIEW_BYTES
    queue.enqueue("echo", long)
    [job] = queue.dequeue(queue.register(["default"], 1), ["default"])
    queue.complete(job, {"a": long})
    [listed] = api.get("/jobs").json["jobs"]
    assert not {"payload", "result"} & listed.keys()
    assert ('"' + long).startswith(listed["payloadPreview"])
    assert ('{"a":"' + long).startswith(listed["resultPreview"])
    assert all(
        PREVIEW_BYTES - 4 < len(listed[name].encode()) <= PREVIEW_BYTES for name in ("payloadPreview", "resultPreview")
    )
    assert api.get(f"/jobs/{job.id}").json["result"] == {"a": long}


def test_list_of_large_payloads_takes_little_memory(api: Client, queue: Queue) -> None:
    payload = [[]] * 65_000  # 195 kB of JSON, which takes several MB when it is decoded
    for _ in range(5):
        queue.enqueue_many("echo", [payload] * 10)
    api.get("/jobs?limit=1")
    tracemalloc.start()
    try:
        answer = api.get("/jobs?limit=500")
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert len(ids(answer)) == 50
    assert {len(job["payloadPreview"]) for job in answer.json["jobs"]} == {PREVIEW_BYTES}


def test_list_of_large_payloads_gives_a_short_page_with_a_cursor(api: Client, queue: Queue) -> None:
    made = [job.id for _ in range(10) for job in queue.enqueue_many("echo", ["x" * 1_000_000] * 5)]
    first = api.get("/jobs?limit=500")
    assert 30 <= len(ids(first)) < 50
    second = api.get(f"/jobs?limit=500&cursor={first.json['cursor']}")
    assert (ids(first) + ids(second), second.json["cursor"]) == (made[::-1], None)


def test_list_shows_a_record_that_cannot_be_read(api: Client, queue: Queue) -> None:
    jobs = [put(queue, "failed", queue=name) for name in "abc"]
    for job, record in zip(jobs, (b"x" * 600, b'{"type":"t","payload":"\xff","status":"failed"}', b"{"), strict=True):
        raw(queue).set(queue.keys.job(job.id), record, keepttl=True)
    listed = {job["id"]: job for job in api.get("/jobs").json["jobs"]}
    assert [listed[job.id]["error"]["type"] for job in jobs] == ["UnreadableRecord"] * 3
    assert listed[jobs[0].id]["payloadPreview"] == '"' + "x" * (PREVIEW_BYTES - 1)
    assert listed[jobs[2].id]["payload"] == "{"
    for job in jobs:
        raw(queue).zrem(queue.keys.ended["failed"], job.id)
        raw(queue).delete(queue.keys.job(job.id))


@pytest.mark.parametrize("size", [PREVIEW_BYTES - 2, PREVIEW_BYTES - 1])
def test_list_keeps_a_payload_that_is_just_short_enough(api: Client, queue: Queue, size: int) -> None:
    queue.enqueue("echo", "x" * size)
    [listed] = api.get("/jobs").json["jobs"]
    assert ("payload" in listed) == (size == PREVIEW_BYTES - 2)


def test_list_omits_tracebacks(api: Client, queue: Queue) -> None:
    queue.enqueue("echo", 1, max_attempts=1)
    [job] = queue.dequeue(queue.register(["default"], 1), ["default"])
    queue.fail(job, Failure("Boom", "it broke", "Traceback: ..."))
    assert api.get("/jobs").json["jobs"][0]["error"] == {"type": "Boom", "message": "it broke"}
    assert api.get(f"/jobs/{job.id}").json["error"]["traceback"] == "Traceback: ..."


# Wait -----------------------------------------------------------------------------------------------------------------


def awaited(queue: Queue) -> int:
    """Return the number of jobs that somebody waits for."""
    return int(raw(queue).scard(queue.keys.awaited))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2 * WEB_THREADS) as pool:
        yield pool


def wait_for(api: Client, pool: ThreadPoolExecutor, id: str, times: int = 1) -> list[Future[Answer]]:
    return [pool.submit(api.get, f"/jobs/{id}?wait=25") for _ in range(times)]


@pytest.mark.parametrize("status", ENDED)
def test_wait_returns_when_the_job_ends(api: Client, queue: Queue, pool: ThreadPoolExecutor, status: str) -> None:
    id = queue.enqueue("echo", 1).id
    [waiting] = wait_for(api, pool, id)
    until(lambda: awaited(queue) == 1)
    if status == "cancelled":
        queue.cancel(id)
    else:
        [job] = queue.dequeue(queue.register(["default"], 1), ["default"])
        assert not waiting.done()
        if status == "completed":
            queue.complete(job, "done")
        else:
            queue.fail(job, Failure("Boom", "it broke"))
    assert waiting.result(timeout=20).json["status"] == status


def test_wait_continues_while_other_jobs_end(api: Client, queue: Queue, pool: ThreadPoolExecutor) -> None:
    id = queue.enqueue("echo", 1).id
    [waiting] = wait_for(api, pool, id)
    until(lambda: awaited(queue) == 1)
    queue.cancel(queue.enqueue("echo", 2).id)
    assert not waiting.done()
    queue.cancel(id)
    assert waiting.result(timeout=20).json["status"] == "cancelled"


@pytest.mark.parametrize("status", ENDED)
def test_wait_returns_at_once_for_a_job_that_has_ended(api: Client, queue: Queue, status: str) -> None:
    assert api.get(f"/jobs/{put(queue, status).id}?wait=25").json["status"] == status


def test_wait_answers_404_at_once_for_an_unknown_job(api: Client) -> None:
    assert api.get(f"/jobs/{NO_JOB}?wait=25").status == 404


def test_wait_returns_the_unchanged_job_when_the_time_is_up(api: Client, queue: Queue) -> None:
    id = queue.enqueue("echo", 1).id
    assert api.get(f"/jobs/{id}?wait=1").json["status"] == "pending"
    assert api.get(f"/jobs/{id}?wait=0").json["status"] == "pending"
    assert awaited(queue) == 0


def test_wait_returns_to_all_who_wait_for_the_same_job(api: Client, queue: Queue, pool: ThreadPoolExecutor) -> None:
    id = queue.enqueue("echo", 1).id
    waiting = wait_for(api, pool, id, WEB_THREADS // 2)
    until(lambda: awaited(queue) == 1)
    queue.cancel(id)
    assert [each.result(timeout=20).json["status"] for each in waiting] == ["cancelled"] * (WEB_THREADS // 2)


def test_wait_occupies_at_most_half_of_the_threads(api: Client, queue: Queue, pool: ThreadPoolExecutor) -> None:
    held = [queue.enqueue("echo", n).id for n in range(WEB_THREADS // 2)]
    waiting = [wait_for(api, pool, id)[0] for id in held]
    until(lambda: awaited(queue) == WEB_THREADS // 2)
    others = wait_for(api, pool, queue.enqueue("echo", 1).id, WEB_THREADS)
    assert [other.result(timeout=20).json["status"] for other in others] == ["pending"] * WEB_THREADS
    assert not any(each.done() for each in waiting)
    for id in held:
        queue.cancel(id)
    assert [each.result(timeout=20).json["status"] for each in waiting] == ["cancelled"] * (WEB_THREADS // 2)
    assert awaited(queue) == 0
    id = queue.enqueue("echo", 2).id
    [again] = wait_for(api, pool, id)
    until(lambda: awaited(queue) == 1)
    queue.cancel(id)
    assert again.result(timeout=20).json["status"] == "cancelled"


@pytest.mark.parametrize("value", ["", "-1", "3601", "1.5", "1e1", "x", "true", "%D9%A3", " 1", "1%0a", "9" * 5000])
def test_refuse_an_invalid_wait_time(api: Client, queue: Queue, value: str) -> None:
    answer = api.get(f"/jobs/{put(queue, 'completed').id}?wait={value}")
    assert (answer.status, answer.kind, answer.problem["field"]) == (400, "invalid-query", "wait")


# Cancel ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["pending", "delayed"])
def test_cancel_cancels_a_pending_job(api: Client, queue: Queue, status: str) -> None:
    id = put(queue, status).id
    answer = api.call("DELETE", f"/jobs/{id}")
    assert (answer.status, answer.json) == (200, {"jobId": id, "status": "cancelled"})
    assert api.get(f"/jobs/{id}").json["status"] == "cancelled"
    assert queue.dequeue(queue.register(["default"], 1), ["default"]) == []


def test_cancel_asks_a_running_job_to_stop(api: Client, queue: Queue) -> None:
    id = put(queue, "processing").id
    for _ in range(2):
        answer = api.call("DELETE", f"/jobs/{id}")
        assert (answer.status, answer.json) == (202, {"jobId": id, "status": "processing"})
    assert api.get(f"/jobs/{id}").json["cancelRequested"] is True
    assert queue.cancel_requests([id]) == [id]


def test_cancel_answers_409_when_the_running_handler_takes_no_job(api: Client, queue: Queue) -> None:
    id = queue.enqueue("deaf", 1).id
    assert queue.dequeue(queue.register(["deaf"], 1), ["deaf"])
    answer = api.call("DELETE", f"/jobs/{id}")
    assert (answer.status, answer.kind, answer.problem["jobStatus"]) == (409, "wrong-status", "processing")
    assert "cancelRequested" not in api.get(f"/jobs/{id}").json


@pytest.mark.parametrize("status", ENDED)
def test_cancel_answers_409_when_the_job_has_ended(api: Client, queue: Queue, status: str) -> None:
    id = put(queue, status).id
    before = dump(queue)
    answer = api.call("DELETE", f"/jobs/{id}")
    assert (answer.status, answer.kind, answer.problem["jobStatus"]) == (409, "wrong-status", status)
    assert dump(queue) == before


@pytest.mark.parametrize(("method", "suffix"), [("DELETE", ""), ("POST", "/retry")])
@pytest.mark.parametrize("id", [NO_JOB, "x", NO_JOB.upper()[:-1] + "A", NO_JOB + "0", "%00", "..", "*"])
def test_cancel_and_retry_answer_404_to_an_invalid_or_unknown_id(
    api: Client, queue: Queue, id: str, method: str, suffix: str
) -> None:
    queue.enqueue("echo", 1)
    before = dump(queue)
    assert api.call(method, f"/jobs/{id}{suffix}").kind == "not-found"
    assert dump(queue) == before


# Retry ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_retry_makes_a_failed_or_cancelled_job_pending(api: Client, queue: Queue, status: str) -> None:
    id = put(queue, status).id
    answer = api.call("POST", f"/jobs/{id}/retry")
    assert (answer.status, answer.json) == (200, {"jobId": id, "status": "pending"})
    assert [job.id for job in queue.dequeue(queue.register(["default"], 1), ["default"])] == [id]
    assert api.get(f"/jobs/{id}").json["attempts"] == 1


@pytest.mark.parametrize("status", ["pending", "delayed", "processing", "completed"])
def test_retry_answers_409_when_the_job_has_not_failed(api: Client, queue: Queue, status: str) -> None:
    id = put(queue, status).id
    before = dump(queue)
    answer = api.call("POST", f"/jobs/{id}/retry")
    assert (answer.status, answer.kind) == (409, "wrong-status")
    assert answer.problem["jobStatus"] == ("pending" if status == "delayed" else status)
    assert dump(queue) == before


def test_retry_revives_a_job_once_when_many_request_it(api: Client, queue: Queue, pool: ThreadPoolExecutor) -> None:
    id = put(queue, "failed").id
    answers = [
        done.result(timeout=20) for done in [pool.submit(api.call, "POST", f"/jobs/{id}/retry") for _ in range(10)]
    ]
    assert sorted(answer.status for answer in answers) == [200] + [409] * 9
    assert queue.waiting(["default"]) == 1


def test_retry_answers_409_when_another_job_has_the_unique_key(api: Client, queue: Queue) -> None:
    id = put(queue, "failed", unique_key="u").id
    holder = queue.enqueue("echo", 1, unique_key="u").id
    answer = api.call("POST", f"/jobs/{id}/retry")
    assert (answer.status, answer.problem["jobStatus"]) == (409, "failed")
    assert holder in answer.problem["detail"]


# Many at once ---------------------------------------------------------------------------------------------------------


def fill(queue: Queue) -> dict[str, list[str]]:
    """Make some jobs of each kind and return their ids by kind."""
    made = {status: [put(queue, status).id for _ in range(2)] for status in ("failed", "completed", "cancelled")}
    made["processing"] = [put(queue, "processing", queue="other").id]
    made["slow"] = [queue.enqueue("echo", n, queue="slow").id for n in range(3)]
    made["deaf"] = [queue.enqueue("deaf", n).id for n in range(2)]
    return made


def statuses(api: Client, ids: list[str]) -> set[str]:
    return {api.get(f"/jobs/{id}").json["status"] for id in ids}


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({}, ["slow", "deaf"]),
        ({"status": "pending"}, ["slow", "deaf"]),
        ({"queue": "slow"}, ["slow"]),
        ({"type": "deaf"}, ["deaf"]),
        ({"type": "deaf", "queue": "slow"}, []),
        ({"type": "", "queue": "", "cursor": ""}, ["slow", "deaf"]),
    ],
    ids=str,
)
def test_cancel_many_cancels_exactly_the_matching_jobs(
    api: Client, queue: Queue, fields: dict[str, str], kinds: list[str]
) -> None:
    made = fill(queue)
    before = {kind: statuses(api, made[kind]) for kind in made}
    answer = api.post("/jobs/cancel", fields)
    assert (answer.status, answer.json) == (
        200,
        {"cancelled": sum(len(made[k]) for k in kinds), "skipped": 0, "cursor": None},
    )
    assert {kind: statuses(api, made[kind]) for kind in made} == before | {kind: {"cancelled"} for kind in kinds}


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "failed"),
        ({"status": "failed"}, "failed"),
        ({"status": "cancelled"}, "cancelled"),
        ({"errorType": "Boom"}, "failed"),
    ],
    ids=str,
)
def test_retry_many_retries_exactly_the_matching_jobs(
    api: Client, queue: Queue, fields: dict[str, str], kind: str
) -> None:
    made = fill(queue)
    before = {each: statuses(api, made[each]) for each in made}
    answer = api.post("/jobs/retry", fields)
    assert (answer.status, answer.json) == (200, {"retried": 2, "skipped": 0, "cursor": None})
    assert {each: statuses(api, made[each]) for each in made} == before | {kind: {"pending"}}


def test_retry_many_skips_jobs_that_cannot_be_retried(api: Client, queue: Queue) -> None:
    put(queue, "failed", unique_key="u")
    put(queue, "failed")
    queue.enqueue("echo", 1, unique_key="u")
    assert api.post("/jobs/retry", {}).json == {"retried": 1, "skipped": 1, "cursor": None}


@pytest.mark.parametrize("verb", ["cancel", "retry"])
def test_change_many_continues_at_its_cursor(api: Client, queue: Queue, verb: str) -> None:
    for at in range(0, 1200, 600):
        made = queue.enqueue_many("echo", range(at, at + 600))
    if verb == "retry":
        for job in made:
            queue.cancel(job.id)
    fields = {"status": "cancelled"} if verb == "retry" else {}
    done = []
    cursor = ""
    while cursor is not None:
        answer = api.post(f"/jobs/{verb}", fields | {"cursor": cursor}).json
        done.append(answer["retried" if verb == "retry" else "cancelled"])
        cursor = answer["cursor"]
    assert done == ([600] if verb == "retry" else [1000, 200])


WRONG_BULK_CHANGES = {
    "not an object": [],
    "string": "x",
    "null": None,
    "number": {"type": 1},
    "null value": {"status": None},
    "array": {"status": ["failed"]},
    "unknown filter": {"state": "failed"},
    "limit": {"limit": "1"},
    "ids": {"ids": "x"},
    "unknown status": {"status": "x"},
    "empty status": {"status": ""},
    "completed": {"status": "completed"},
    "processing": {"status": "processing"},
    "cursor": {"cursor": "x"},
    "surrogate": {"\ud800": "x"},
}


@pytest.mark.parametrize("body", WRONG_BULK_CHANGES.values(), ids=WRONG_BULK_CHANGES.keys())
@pytest.mark.parametrize("verb", ["cancel", "retry"])
def test_refuse_an_invalid_bulk_change_and_change_nothing(api: Client, queue: Queue, verb: str, body: Any) -> None:
    fill(queue)
    before = dump(queue)
    answer = api.post(f"/jobs/{verb}", body)
    assert (answer.status, answer.kind) == (422, "invalid-job")
    assert dump(queue) == before


@pytest.mark.parametrize(("verb", "status"), [("cancel", "failed"), ("cancel", "cancelled"), ("retry", "pending")])
def test_refuse_a_bulk_change_of_a_status_that_it_does_not_apply_to(api: Client, verb: str, status: str) -> None:
    assert api.post(f"/jobs/{verb}", {"status": status}).problem["field"] == "status"


@pytest.mark.parametrize("verb", ["cancel", "retry"])
def test_refuse_a_bulk_change_without_a_filter(api: Client, queue: Queue, verb: str) -> None:
    """An empty object is a filter. A missing body is a mistake."""
    fill(queue)
    before = dump(queue)
    assert api.call("POST", f"/jobs/{verb}").status == 415
    assert api.call("POST", f"/jobs/{verb}", b"").status == 400
    assert dump(queue) == before


# Queues and workers ---------------------------------------------------------------------------------------------------


def test_queues_are_empty_without_jobs(api: Client) -> None:
    assert api.get("/queues").json == {"queues": {}}


def test_queues_count_pending_and_processing_jobs(api: Client, queue: Queue) -> None:
    put(queue, "processing")
    queue.enqueue("echo", 1, queue="slow", delay=60)
    queue.enqueue("deaf", 1)
    queue.clock.ahead += 5000
    found = api.get("/queues").json["queues"]
    assert 5000 <= found["deaf"].pop("oldestWaitingMs") < 60_000
    assert found == {
        "deaf": {"pending": 1, "processing": 0, "paused": False},
        "default": {"pending": 0, "processing": 1, "oldestWaitingMs": 0, "paused": False},
        "slow": {"pending": 1, "processing": 0, "oldestWaitingMs": 0, "paused": False},
    }
    assert api.get("/stats").json["queues"].keys() == found.keys()


def test_pause_stops_a_queue_until_it_is_resumed(api: Client, queue: Queue) -> None:
    id = queue.enqueue("echo", 1).id
    for _ in range(2):
        answer = api.call("POST", "/queues/default/pause")
        assert (answer.status, answer.json) == (200, {"queue": "default", "paused": True})
    assert api.get("/queues").json["queues"]["default"]["paused"] is True
    worker = queue.register(["default"], 1)
    assert queue.dequeue(worker, ["default"]) == []
    for _ in range(2):
        answer = api.call("POST", "/queues/default/resume")
        assert (answer.status, answer.json) == (200, {"queue": "default", "paused": False})
    assert api.get("/queues").json["queues"]["default"]["paused"] is False
    assert [job.id for job in queue.dequeue(worker, ["default"])] == [id]


def test_submit_to_a_paused_queue_is_accepted(api: Client, queue: Queue) -> None:
    api.call("POST", "/queues/default/pause")
    assert api.post("/jobs", {"type": "echo", "payload": 1}).status == 201
    assert api.get("/queues").json["queues"]["default"]["pending"] == 1


def test_pause_shows_a_queue_that_never_had_a_job(api: Client) -> None:
    api.call("POST", "/queues/later/pause")
    assert api.get("/queues").json["queues"] == {
        "later": {"pending": 0, "processing": 0, "oldestWaitingMs": 0, "paused": True}
    }


@pytest.mark.parametrize(
    "name", ["a" * 101, "a%20b", "%C3%A9", "%ff", "%00", "a%0a", "a:b", "*", "", "a/b", "%7Bqueue%7D"]
)
@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_pause_answers_404_to_an_invalid_name(api: Client, queue: Queue, name: str, verb: str) -> None:
    assert api.call("POST", f"/queues/{name}/{verb}").kind == "not-found"
    assert dump(queue) == {}


@pytest.mark.parametrize("name", ["a" * 100, "A.b_c-1", ".", "retry"])
def test_pause_accepts_any_valid_name(api: Client, name: str) -> None:
    assert api.call("POST", f"/queues/{name}/pause").json["queue"] == name


def test_workers_are_empty_without_workers(api: Client) -> None:
    assert api.get("/workers").json == {"workers": []}


def test_workers_report_their_settings_and_jobs(api: Client, queue: Queue) -> None:
    id = put(queue, "processing").id
    [worker] = [job["worker"] for job in api.get("/jobs").json["jobs"]]
    queue.heartbeat(worker, [id])
    [shown] = api.get("/workers").json["workers"]
    assert (shown["id"], shown["queues"], shown["concurrency"], shown["alive"]) == (worker, ["default"], 1, True)
    assert shown["jobs"] == [id]
    assert shown["startedAt"] <= shown["lastHeartbeat"]
    assert api.get("/stats").json["workers"] == 1


def test_workers_report_whose_lease_has_expired(api: Client, queue: Queue) -> None:
    worker = queue.register(["default"], 1)
    lapse(queue, worker)
    [shown] = api.get("/workers").json["workers"]
    assert (shown["id"], shown["alive"]) == (worker, False)
    assert api.get("/stats").json["workers"] == 0


# Methods --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/jobs", "/jobs?status=failed&limit=1", "/queues", "/workers", "/openapi.json"])
def test_head_answers_like_get_without_the_body(api: Client, path: str) -> None:
    get, head = (api.call(method, path, headers={"X-Request-ID": "one"}) for method in ("GET", "HEAD"))
    assert (head.status, head.headers, head.body) == (200, get.headers, b"")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *[
            (method, path)
            for path in ("/jobs/batch", "/jobs/retry", "/jobs/cancel")
            for method in ("GET", "DELETE", "PUT", "HEAD")
        ],
        *[(method, f"/jobs/{NO_JOB}/retry") for method in ("GET", "DELETE", "HEAD")],
        *[(method, "/queues/default/pause") for method in ("GET", "DELETE", "HEAD")],
        *[(method, path) for path in ("/queues", "/workers", "/openapi.json") for method in ("POST", "DELETE", "PUT")],
        *[(method, "/jobs") for method in ("DELETE", "PUT", "PATCH")],
        *[(method, f"/jobs/{NO_JOB}") for method in ("POST", "PUT", "PATCH")],
    ],
)
def test_answer_405_to_an_unsupported_method(api: Client, queue: Queue, method: str, path: str) -> None:
    put(queue, "failed")
    before = dump(queue)
    answer = api.call(method, path, {} if method in ("POST", "PUT", "PATCH") else NO_BODY)
    assert answer.status == 405
    assert method not in answer.headers["allow"].split(",")
    assert dump(queue) == before
