"""The dashboard in a real browser: what it shows of real jobs, what its buttons do, and what it must never let happen.

Every page that a test opens is watched: an error in its console, a breach of its policy or a request to elsewhere fails the test.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from client import Client, serving
from conftest import RedisServer, newest, put, raw

from tinyqueue import Discard, Failure, Job, Outcome, Queue, handler
from tinyqueue_config import Settings
from worker import Worker
from wsgi import API

try:
    import playwright.sync_api as playwright
except ImportError:
    if os.environ.get("CI") == "true":
        raise
    pytest.skip("there is no playwright: THE DASHBOARD IS NOT TESTED", allow_module_level=True)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NO_CHROMIUM = "there is no chromium on PATH: THE DASHBOARD IS NOT TESTED"
KEYS = "admin:admin:admin-0123456789,reader:read:read-0123456789ab,client:submit:submit-0123456789"
Open = Callable[..., Any]


@dataclass
class Message:
    to: str
    subject: str
    body: str
    format: Literal["text", "html"] = "text"
    copies: int = 1
    urgent: bool = False
    cc: list[str] = field(default_factory=list)


@pytest.fixture(autouse=True)
def handlers(no_handlers: None) -> None:
    @handler("send-email")
    def send_email(message: Message) -> dict[str, Any]:
        """Send a plain-text e-mail."""
        return {"sent": message.to}

    @handler("charge-card", max_attempts=1)
    def charge_card(payload: dict[str, Any]) -> None:
        raise Discard("the card was declined")

    @handler("echo", queue="reports")
    def echo(payload: Any, job: Job) -> Any:
        return payload


# A browser, and what it is shown --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM and os.environ.get("CI") == "true":
        pytest.fail(NO_CHROMIUM)
    if not CHROMIUM:
        pytest.skip(NO_CHROMIUM)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open(browser: Any, near: Queue) -> Iterator[Open]:
    """Serve the queue and open its dashboard: open("#/jobs", api_keys=KEYS, viewport={...}) -> the page."""
    troubles: list[str] = []
    with Served() as served:

        def open(
            at: str = "", queue: Queue | None = None, fake_time: bool = False, watched: bool = True, **options: Any
        ) -> Any:
            known = {name: options.pop(name) for name in list(options) if name in Settings.__struct_fields__}
            url = served.by(API(Settings(**known), queue or near))
            context = browser.new_context(
                viewport={"width": 1400, "height": 900}, locale="en-GB", timezone_id="Europe/Berlin", **options
            )
            context.grant_permissions(["clipboard-read", "clipboard-write"])
            context.add_init_script(
                "addEventListener('securitypolicyviolation', e => console.error('CSP', e.violatedDirective))"
            )
            page = context.new_page()
            if fake_time:
                page.clock.install()
            page.set_default_timeout(10_000)
            if watched:
                page.on("console", lambda told: _note(troubles, told))
                page.on("pageerror", lambda error: troubles.append(str(error)))
                page.on("request", lambda asked: asked.url.startswith((url, "data:")) or troubles.append(asked.url))
            page.goto(url + at)
            return page

        yield open
        for context in browser.contexts:
            context.close()
    assert troubles == []


def _note(troubles: list[str], told: Any) -> None:
    """A browser tells of every answer above 399, and of a server that is away, by itself. The page tells of nothing."""
    if told.type in ("error", "warning") and not told.text.startswith("Failed to load resource"):
        troubles.append(told.text)


class Served:
    """Servers of this process that end with a block."""

    def __enter__(self) -> Served:
        self.ends: list[Any] = []
        return self

    def by(self, api: API) -> str:
        block = serving(api)
        _, (host, port) = block.__enter__()
        self.ends.append(block)
        return f"http://{host}:{port}/"

    def __exit__(self, *_: object) -> None:
        for block in self.ends:
            block.__exit__(None, None, None)


@contextmanager
def working(queue: Queue) -> Iterator[None]:
    """Run a real worker of two slots in a thread."""
    worker = Worker(queue, Settings(worker_concurrency=2))
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield
    finally:
        worker.orders.put("release")
        thread.join(20)
        assert not thread.is_alive()


def shows(page: Any, *texts: str) -> None:
    """Wait until the page shows all these texts."""
    for text in texts:
        playwright.expect(page.locator("body")).to_contain_text(text)


def lacks(page: Any, selector: str) -> None:
    playwright.expect(page.locator(selector)).to_have_count(0)


def tile(page: Any, status: str) -> Any:
    return page.locator(f".tiles a:has(.status.{status}) b")


def busy(queue: Queue) -> dict[str, Job]:
    """An hour of work, jobs of every status, a paused queue, two workers."""
    mail = {"to": "ada@example.com", "subject": "Your invoice 2031", "body": "Dear Ada,\n\nplease find…", "copies": 2}
    worker = queue.register(["default", "mail"], 4)
    for back in range(58, 0, -1):
        queue.clock.ahead = -back * 60_000
        for n in range(3 + (back * 7) % 9):
            queue.enqueue("send-email", mail)
            queue.clock.ahead += 40 + 37 * (back * n % 11)
        for n, job in enumerate(queue.dequeue(worker, ["default"], 20)):
            if (n + back) % 13 == 0:
                queue.fail(job, Failure("TimeoutError", "the mail server did not answer within 30 s", TRACE))
            else:
                queue.complete(job, {"sent": True, "messageId": f"<{job.id}@mail.example.com>"})
    queue.clock.ahead = 0
    failed = put(queue, "failed", queue="payments")
    put(queue, "cancelled", queue="reports")
    put(queue, "delayed", queue="reports")
    for n in range(3):
        queue.enqueue("echo", {"month": n}, queue="reports")
    queue.pause("reports")
    queue.enqueue("send-email", mail, queue="mail", unique_key="invoice-2031", max_attempts=5)
    [running] = queue.dequeue(worker, ["mail"])
    running.set_progress(2, 5)
    queue.heartbeat(worker, [running.id])
    queue.heartbeat(queue.register(["reports"], 2))
    return {
        "failed": newest(queue, "failed")[1] if not failed.error else failed,
        "running": running,
        "trace": queue.page()[0][-1],
    }


TRACE = """Traceback (most recent call last):
  File "/app/worker.py", line 171, in run_job
    result = handler.run(job)
  File "/app/handlers.py", line 79, in send_email
    with _mail_server(url) as server:
  File "/usr/lib/python3.11/contextlib.py", line 137, in __enter__
    return next(self.gen)
TimeoutError: the mail server did not answer within 30 s
"""


# Submit, find, steer --------------------------------------------------------------------------------------------------


def test_submit_a_job_by_its_form_and_follow_it_to_its_end(open: Open, near: Queue) -> None:
    page = open("#/submit/send-email")
    page.get_by_label("to", exact=False).first.fill("ada@example.com")
    page.locator("[name='payload.subject']").fill("Hello")
    page.locator("[name='payload.body']").fill("two\nlines")
    page.locator("[name='payload.format']").select_option("html")
    page.locator("[name='payload.copies']").fill("2")
    page.get_by_label("urgent").check()
    page.locator("[name='payload.cc']").fill('["b@example.com"]')
    page.locator("[name=maxAttempts]").fill("5")
    page.locator("[name=uniqueKey]").fill("u")
    page.get_by_role("button", name="Submit").click()
    page.locator("text=Accepted: >> a").click()
    shows(page, "waiting for")
    [job] = newest(near, "pending")
    message = {"to": "ada@example.com", "subject": "Hello", "body": "two\nlines", "format": "html", "copies": 2}
    assert job.payload == message | {"urgent": True, "cc": ["b@example.com"]}
    assert (job.max_attempts, job.queue, job.unique_key) == (5, "default", "u")
    with working(near):
        shows(page, "completed", '"sent": "ada@example.com"')


def written(page: Any) -> None:
    """Enter what a send-email must have."""
    for name, text in {"to": "ada@example.com", "subject": "Hello", "body": "Hi"}.items():
        page.locator(f"[name='payload.{name}']").fill(text)


def test_submit_leaves_out_what_is_left_empty(open: Open, near: Queue) -> None:
    page = open("#/submit/send-email")
    written(page)
    page.locator("[name='payload.subject']").press("Enter")
    shows(page, "Accepted")
    [job] = newest(near, "pending")
    assert job.payload == {"to": "ada@example.com", "subject": "Hello", "body": "Hi"}


@pytest.mark.parametrize(
    ("name", "keys", "rule"), [("payload.subject", "", "is required"), ("payload.copies", "2e", "is not a number")]
)
def test_submit_sends_nothing_when_a_field_is_missing_or_cannot_be_read(
    open: Open, near: Queue, name: str, keys: str, rule: str
) -> None:
    page = open("#/submit/send-email")
    written(page)
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    input = page.locator(f"[name='{name}']")
    input.fill("")
    input.press_sequentially(keys)
    page.get_by_role("button", name="Submit").click()
    playwright.expect(input).to_be_focused()
    playwright.expect(input).to_have_accessible_description(f"✕ {rule}")
    assert sent == []


def test_submit_begins_an_object_of_no_known_form_as_an_empty_one(open: Open, near: Queue) -> None:
    page = open("#/submit/charge-card")
    page.get_by_role("button", name="Submit").click()
    shows(page, "Accepted")
    assert newest(near, "pending")[0].payload == {}


def test_submit_warns_of_a_queue_that_nobody_serves(open: Open, near: Queue) -> None:
    near.register(["default"], 1)
    page = open("#/submit/send-email")
    written(page)
    page.locator("[name=queue]").fill("mial")
    page.get_by_role("button", name="Submit").click()
    shows(page, "No worker serves the queue mial.")
    page.locator("[name=queue]").fill("")
    page.get_by_role("button", name="Submit").click()
    lacks(page, "text=No worker serves")
    near.pause("default")
    shows(page, "The queue default is paused.")


def test_a_job_that_waits_tells_why(open: Open, near: Queue) -> None:
    job = put(near, "delayed", queue="reports")
    page = open(f"#/jobs/{job.id}")
    shows(page, "It is delayed until", "No worker serves the queue reports.")
    near.register(["reports"], 1)
    lacks(page, "text=No worker serves")
    near.pause("reports")
    shows(page, "The queue reports is paused.")


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("payload.copies", "1.5", "Expected `int`, got `float`"),
        ("payload.cc", '["a", 1]', "cc[1]: Expected `str`, got `int`"),
        ("payload.cc", "[", "is not JSON"),
        ("queue", "a b", "must be 1 to 100 of the characters"),
        ("maxAttempts", "0", "must be a whole number from 1 to 100"),
    ],
)
def test_submit_shows_a_refusal_beside_the_field_that_it_is_about(
    open: Open, near: Queue, name: str, value: str, rule: str
) -> None:
    page = open("#/submit/send-email")
    written(page)
    page.locator(f"[name='{name}']").fill(value)
    page.get_by_role("button", name="Submit").click()
    playwright.expect(page.locator(f".field:has([name='{name}']) .wrong")).to_contain_text(rule)
    playwright.expect(page.locator(f"[name='{name}']")).to_be_focused()
    playwright.expect(page.locator(f"[name='{name}']")).to_have_value(value)
    assert near.page()[0] == []


def test_submit_a_payload_of_no_known_form_as_json(open: Open, near: Queue) -> None:
    page = open("#/submit/echo")
    page.locator("[name=payload]").fill('{"n": 12345678901234567890, "deep": [null]}')
    page.get_by_role("button", name="Submit").click()
    shows(page, "Accepted")
    assert newest(near, "pending")[0].payload == {"n": 12345678901234567890, "deep": [None]}


def test_find_a_failed_job_and_retry_it(open: Open, near: Queue) -> None:
    mended = threading.Event()

    @handler("flaky", max_attempts=1)
    def flaky(payload: Any) -> str:
        if not mended.is_set():
            raise ConnectionError("the bank is closed")
        return "done"

    near.enqueue("flaky", {"card": 1})
    with working(near):
        page = open()
        playwright.expect(tile(page, "failed")).to_have_text("1")
        tile(page, "failed").click()
        shows(page, "ConnectionError: the bank is closed")
        page.get_by_role("link", name="flaky").click()
        shows(
            page, "Traceback (most recent call last)", 'raise ConnectionError("the bank is closed")', "Attempts1 of 1"
        )
        mended.set()
        page.get_by_role("button", name="Retry").click()
        shows(page, "completed", '"done"')
        lacks(page, "main button:text-is('Retry')")


@pytest.mark.parametrize("around", ["{}", ' "{}",', "https://jobs.example.com/#/jobs/{}?x=1", '{{"jobId":"{}"}}'])
def test_find_a_job_by_pasting_its_id(open: Open, near: Queue, around: str) -> None:
    job = near.enqueue("echo", {"found": "it"})
    page = open()
    shows(page, "Queues")
    page.keyboard.press("/")
    playwright.expect(page.get_by_label("Find a job by its id")).to_be_focused()
    page.keyboard.insert_text(around.format(job.id))
    shows(page, '"found": "it"')
    assert page.url.endswith(f"#/jobs/{job.id}")


def test_find_a_late_job_by_the_end_of_its_id(open: Open, near: Queue) -> None:
    job = near.enqueue("echo", {"found": "it"})
    near.enqueue("echo", 2)
    page = open()
    find = page.get_by_label("Find a job by its id")
    find.fill(job.id[-8:])
    find.press("Enter")
    shows(page, '"found": "it"', job.id)
    find.fill("deadbeef")
    find.press("Enter")
    shows(page, "There is no job deadbeef among the latest 500: give the whole id.")


def test_the_focus_stays_at_what_is_done_or_goes_to_the_heading(open: Open, near: Queue) -> None:
    job = near.enqueue("echo", 1, queue="reports")
    page = open("#/jobs")
    shows(page, "echo")
    status = page.get_by_label("status")
    status.focus()
    page.keyboard.press("p")
    page.wait_for_url("**status=pending")
    shows(page, job.id[-8:])
    playwright.expect(status).to_be_focused()
    page.get_by_role("link", name="echo").press("Enter")
    playwright.expect(page.get_by_role("heading", name="echo")).to_be_focused()
    page.get_by_role("button", name="Cancel").press("Enter")
    page.get_by_role("button", name="Retry").wait_for()
    playwright.expect(page.get_by_role("heading", name="echo")).to_be_focused()
    page.goto(page.url.partition("#")[0] + "#/submit/echo")
    page.locator("[name=payload]").fill("1")
    page.get_by_role("button", name="Submit").press("Enter")
    shows(page, "Accepted")
    playwright.expect(page.get_by_role("button", name="Submit")).to_be_focused()


@pytest.mark.parametrize("id", ["01900000-0000-7000-8000-000000000000", "%3Cimg%20src=x%3E", "nope"])
def test_say_so_when_there_is_no_such_job(open: Open, id: str) -> None:
    shows(open(f"#/jobs/{id}"), f"There is no job {id}")


def test_cancel_a_pending_job(open: Open, near: Queue) -> None:
    job = put(near, "delayed")
    page = open(f"#/jobs/{job.id}")
    page.get_by_role("button", name="Cancel").click()
    shows(page, "It is cancelled.", "cancelled")
    playwright.expect(page.get_by_role("button", name="Retry")).to_be_visible()
    assert near.get(job.id).status == "cancelled"  # type: ignore[union-attr]


def test_tell_why_a_job_cannot_be_cancelled(open: Open, near: Queue) -> None:
    job = near.enqueue("send-email", {"to": "a", "subject": "s", "body": "b"})
    near.dequeue(near.register(["default"], 1), ["default"])
    page = open(f"#/jobs/{job.id}")
    page.get_by_role("button", name="Cancel").click()
    shows(page, "its handler takes no Job that would tell it")


def test_pause_and_resume_a_queue(open: Open, near: Queue) -> None:
    near.enqueue("echo", 1, queue="reports")
    page = open()
    page.get_by_role("button", name="Pause queue reports").click()
    shows(page, "paused: nothing is started")
    assert near.queues()["reports"]["paused"]
    page.get_by_role("button", name="Resume queue reports").click()
    page.get_by_role("button", name="Pause queue reports").wait_for()
    assert not near.queues()["reports"]["paused"]


def test_a_notice_moves_nothing_and_goes_by_itself(open: Open, near: Queue) -> None:
    near.enqueue("echo", 1, queue="reports")
    page = open(fake_time=True)
    button = page.get_by_role("button", name="queue reports")
    before = button.bounding_box()
    button.click()
    shows(page, "Queue reports is paused: it accepts")
    playwright.expect(button).to_have_text("Resume")
    assert button.bounding_box()["y"] == before["y"]
    page.clock.run_for(6500)
    lacks(page, "#said p")


def test_a_notice_can_be_dismissed(open: Open, near: Queue) -> None:
    near.enqueue("echo", 1, queue="reports")
    page = open()
    page.get_by_role("button", name="Pause queue reports").click()
    page.get_by_role("button", name="Dismiss").click()
    lacks(page, "#said p")


def test_the_failure_of_an_action_is_told_until_the_server_answers_again(open: Open, near: Queue) -> None:
    near.enqueue("echo", 1, queue="reports")
    page = open(fake_time=True)
    shows(page, "reports")
    page.context.set_offline(True)
    page.get_by_role("button", name="Pause queue reports").click()
    alert = page.locator("#said [role=alert]")
    playwright.expect(alert).to_have_text("The server cannot be reached")
    page.clock.run_for(60_000)
    playwright.expect(alert).to_be_visible()
    page.context.set_offline(False)
    page.clock.run_for(2500)
    lacks(page, "#said p")


def test_show_what_each_worker_runs(open: Open, near: Queue) -> None:
    job = put(near, "processing")
    near.register(["reports"], 3)
    page = open()
    running = page.locator("tr", has_text="1 of 1")
    playwright.expect(running).to_contain_text(f"echo {job.id[-8:]} for")
    playwright.expect(page.locator("tr", has_text="0 of 3")).to_contain_text("idle")
    running.get_by_role("link", name="echo").click()
    shows(page, job.id, f"Worker{job.worker}")


def test_show_how_far_a_running_job_is_and_of_one_that_ended_nothing(open: Open, near: Queue) -> None:
    worker = near.register(["reports"], 1)
    near.enqueue("echo", 1, queue="reports")
    [job] = near.dequeue(worker, ["reports"])
    job.set_progress(2, 5)
    near.heartbeat(worker, [job.id])
    page = open()
    playwright.expect(page.locator("tr", has_text="1 of 1")).to_contain_text(
        re.compile(rf"echo {job.id[-8:]} for .* 40 %")
    )
    page.get_by_role("link", name="echo").click()
    shows(page, "Progress 40 %")
    near.complete(job, None)
    shows(page, "Completed")
    lacks(page, "progress")
    page.get_by_role("link", name="Jobs").click()
    shows(page, job.id[-8:])
    lacks(page, "progress")


def many_failed(queue: Queue, number: int) -> None:
    worker = queue.register(["default"], number)
    for start in range(0, number, 500):
        queue.enqueue_many("echo", range(min(500, number - start)), queue="default")
        jobs = queue.dequeue(worker, ["default"], 500)
        assert queue.settle(worker, [Outcome(job, "fail", error=Failure("Boom", "it broke")) for job in jobs]) == []
    queue.deregister(worker)


def test_retry_all_that_fit_after_saying_how_many_they_are(open: Open, near: Queue) -> None:
    many_failed(near, 1205)
    kept = near.enqueue("charge-card", {})
    worker = near.register(["default"], 1)
    near.fail(near.dequeue(worker, ["default"])[0], Failure("Other", "not this one"))
    page = open("#/jobs?status=failed&errorType=Boom")
    page.get_by_role("button", name="Retry all of these").click()
    shows(page, "Retry all failed jobs with the error Boom?", "1,205 jobs fit now.")
    page.get_by_role("button", name="Close").click()
    assert near.stats()["failed"] == 1206
    page.get_by_role("button", name="Retry all of these").click()
    page.get_by_role("button", name="Retry 1,205 jobs").click()
    shows(page, "1,205 of 1,205 are pending again.")
    playwright.expect(page.locator("dialog h2")).to_have_text("Done")
    stats = near.stats()
    assert (stats["failed"], stats["pending"]) == (1, 1205)
    assert near.get(kept.id).status == "failed"  # type: ignore[union-attr]


def test_narrow_a_listing_and_page_through_it(open: Open, near: Queue) -> None:
    near.enqueue_many("echo", range(60), queue="reports")
    near.enqueue("send-email", {"to": "a", "subject": "s", "body": "b"})
    page = open("#/jobs")
    rows = page.locator("tbody tr")
    playwright.expect(rows).to_have_count(50)
    page.get_by_label("type").select_option("echo")
    page.get_by_role("link", name="Older").click()
    playwright.expect(rows).to_have_count(10)
    page.get_by_role("link", name="Newest").click()
    playwright.expect(rows).to_have_count(50)
    page.get_by_label("type").select_option("send-email")
    playwright.expect(rows).to_have_count(1)
    page.get_by_label("status").select_option("failed")
    shows(page, "No job fits")
    page.get_by_role("link", name="Show all jobs").click()
    playwright.expect(rows).to_have_count(50)


def test_copy_a_job_as_the_command_that_submits_it_again(open: Open, near: Queue) -> None:
    payload = {"text": 'it\'s "quoted" $HOME `id` \\ é\n', "big": 2**63 + 1}
    near.pause("reports")
    job = near.enqueue("echo", payload, max_attempts=7, queue="reports")
    page = open("#/jobs", api_keys=KEYS)
    sign_in(page, "admin-0123456789")
    page.get_by_role("link", name="echo").click()
    page.get_by_role("button", name="Copy as curl").click()
    shows(page, "in the clipboard")
    command = page.evaluate("navigator.clipboard.readText()")
    assert "admin-0123456789" not in command
    subprocess.run(
        ["bash", "-c", command], env={"PATH": os.environ["PATH"], "TINYQUEUE_KEY": "admin-0123456789"}, check=True
    )
    [again] = [found for found in newest(near, "pending") if found.id != job.id]
    assert (again.type, again.payload, again.max_attempts, again.queue) == ("echo", payload, 7, "reports")


def test_show_the_command_where_a_page_may_not_use_the_clipboard(open: Open, near: Queue) -> None:
    """As browsers have it over plain HTTP, but for this machine's own servers."""
    job = near.enqueue("echo", {"n": 1})
    page = open()
    page.add_init_script("delete Navigator.prototype.clipboard")
    page.goto(page.url.partition("#")[0] + f"?again#/jobs/{job.id}")
    page.get_by_role("button", name="Copy as curl").click()
    playwright.expect(page.get_by_label("text to copy")).to_contain_text('"payload":{"n":1}')
    assert page.evaluate("String(getSelection())").startswith("curl ")
    page.keyboard.press("Escape")
    lacks(page, "dialog[open]")


def test_say_what_happened_in_a_minute_of_a_chart(open: Open, near: Queue) -> None:
    near.clock.ahead = -near.now() % 60_000 - 3 * 60_000 + 30_000  # in the midst of a minute
    put(near, "completed")
    put(near, "failed", queue="other")
    near.clock.ahead = 0
    page = open()
    chart = page.locator("figure", has_text="Throughput")
    told = chart.locator("figcaption")
    chart.locator("svg").focus()
    said = []
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
        said.append(told.text_content().partition("  ")[2])
    assert said.count("2 started, 1 completed, 1 failed, 0 cancelled") == 1
    assert said.count("0 started, 0 completed, 0 failed, 0 cancelled") == 4
    box = chart.locator("svg").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 50)
    playwright.expect(told).to_contain_text("0 started")
    page.mouse.move(0, 0)
    playwright.expect(told).to_contain_text("jobs a minute")


# Keys -----------------------------------------------------------------------------------------------------------------


def sign_in(page: Any, secret: str) -> None:
    page.get_by_label("API key").fill(secret)
    page.get_by_role("button", name="Sign in").click()


def test_a_key_is_kept_in_the_tab_only_and_leaves_with_it(open: Open, near: Queue) -> None:
    page = open(api_keys=KEYS)
    sign_in(page, "wrong-0123456789ab")
    shows(page, "That key is not one of this server's.")
    sign_in(page, "admin-0123456789")
    shows(page, "Queues")
    assert "0123456789" not in page.url
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]
    page.reload()
    shows(page, "Queues")
    page.get_by_role("button", name="Sign out").click()
    shows(page, "API key")
    assert page.evaluate("sessionStorage.length") == 0


def test_a_key_that_may_only_read_is_shown_no_button_that_changes(open: Open, near: Queue) -> None:
    jobs = [put(near, status) for status in ("failed", "delayed")]
    page = open(api_keys=KEYS)
    sign_in(page, "read-0123456789ab")
    for at in ("#/", "#/jobs?status=failed", *(f"#/jobs/{job.id}" for job in jobs)):
        page.goto(page.url.partition("#")[0] + at)
        shows(page, {"#/": "Queues", "#/jobs?status=failed": "Boom"}.get(at, "Payload"))
        found = page.locator("button, a.button").all_text_contents()
        assert set(found) <= {"Sign out", "Copy", "Copy as curl"}
    lacks(page, ".tabs >> text=Submit")
    page.goto(page.url.partition("#")[0] + "#/submit")
    shows(page, "The key reader may not submit jobs.")
    lacks(page, "form.job")


def test_a_key_that_may_only_submit_is_shown_the_form_alone(open: Open, near: Queue) -> None:
    page = open("#/jobs", api_keys=KEYS)
    sign_in(page, "submit-0123456789")
    shows(page, "Submit a job")
    lacks(page, ".tabs, .find")
    written(page)
    page.get_by_role("button", name="Submit").click()
    shows(page, "Accepted")
    assert len(newest(near, "pending")) == 1


# Polling --------------------------------------------------------------------------------------------------------------


def hide(page: Any, hidden: bool) -> None:
    page.evaluate(
        "hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});"
        " document.dispatchEvent(new Event('visibilitychange')); }",
        hidden,
    )


def test_polling_stops_in_a_hidden_tab_and_goes_on_at_once_when_it_is_seen(open: Open, near: Queue) -> None:
    page = open(fake_time=True)
    shows(page, "No job yet")
    with page.expect_response("**/stats*"):
        page.clock.run_for(2500)
    playwright.expect(page.locator("body")).to_contain_text("No job yet")
    hide(page, True)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.clock.run_for(60_000)
    near.enqueue("echo", 1)
    page.clock.run_for(60_000)
    assert asked == []
    hide(page, False)
    playwright.expect(tile(page, "pending")).to_have_text("1")


def test_polling_keeps_what_is_typed_selected_focused_and_closed(open: Open, near: Queue) -> None:
    job = put(near, "failed")
    near.retry(job.id)
    worker = near.register([job.queue], 1)
    [job] = near.dequeue(worker, [job.queue])
    near.fail(job, Failure("Boom", "it broke", TRACE), after=3600)
    page = open(f"#/jobs/{job.id}", fake_time=True)
    shows(page, "Boom")
    page.locator("summary").click()
    find = page.get_by_label("Find a job by its id")
    find.fill("half an id")
    page.evaluate("getSelection().selectAllChildren(document.querySelector('main pre:not(details pre)'))")
    selected = page.evaluate("String(getSelection())")
    assert '"to": "you"' in selected
    near.promote()
    near.cancel(job.id)
    page.clock.run_for(2500)
    shows(page, "Cancelled")
    assert page.evaluate("String(getSelection())") == selected
    assert not page.evaluate("document.querySelector('details').open")
    playwright.expect(find).to_have_value("half an id")
    playwright.expect(find).to_be_focused()


def test_a_lost_connection_is_told_with_the_time_of_the_last_data_and_mends_by_itself(open: Open, near: Queue) -> None:
    page = open(fake_time=True)
    shows(page, "No job yet")
    page.context.set_offline(True)
    page.clock.run_for(2500)
    shows(page, "The server cannot be reached. What you see is from", "No job yet")
    page.context.set_offline(False)
    near.enqueue("echo", 1)
    page.clock.run_for(2500)
    playwright.expect(tile(page, "pending")).to_have_text("1")
    lacks(page, "#banner >> text=cannot be reached")


def test_an_outage_stops_the_times_at_the_last_answer_in_every_view(open: Open, near: Queue) -> None:
    near.register(["reports"], 1)
    page = open(fake_time=True)
    up = page.locator("td[data-name=up]")
    shows(page, "idle")
    page.context.set_offline(True)
    page.clock.run_for(2500)
    shows(page, "What you see is from")
    notice, was = page.locator("#banner").text_content(), up.text_content()
    page.clock.run_for(60_000)
    playwright.expect(up).to_have_text(was)
    page.get_by_role("link", name="Submit", exact=True).click()
    shows(page, "Submit a job")
    with page.expect_event("requestfailed"):
        page.clock.run_for(2500)
    playwright.expect(page.locator("#banner")).to_contain_text(notice.partition(" Trying")[0])


def test_an_outage_is_told_beside_the_form(open: Open, near: Queue) -> None:
    page = open("#/submit", fake_time=True)
    shows(page, "Submit a job")
    page.context.set_offline(True)
    page.clock.run_for(2500)
    shows(page, "The server cannot be reached. What you see is from")


def test_redis_that_is_away_is_told_and_the_page_recovers_when_it_is_back(
    open: Open, near: Queue, start_redis: Callable[..., RedisServer]
) -> None:
    server = start_redis()
    page = open(queue=Queue.from_url(server.url), fake_time=True)
    shows(page, "No job yet")
    server.stop()
    page.clock.run_for(2500)
    shows(page, "Redis is unreachable", "What you see is from")
    server.start()
    page.clock.run_for(6000)
    lacks(page, "#banner >> text=Redis is unreachable")


def test_a_page_opens_while_redis_is_away(open: Open, start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis()
    server.stop()
    shows(open(queue=Queue.from_url(server.url)), "Redis is unreachable")


def test_too_many_requests_are_told(open: Open, near: Queue) -> None:
    shows(open(rate_limit="2/hour"), "more than 2 requests in 3600 seconds. Trying again.")


# Nothing is markup ----------------------------------------------------------------------------------------------------

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script></pre>&lt;b&gt;"


def test_everything_of_a_job_is_shown_as_text(open: Open, near: Queue) -> None:
    worker = near.register(["default"], 1)
    failed = near.enqueue("echo", {EVIL: EVIL}, unique_key=EVIL, queue="default")
    near.fail(near.dequeue(worker, ["default"])[0], Failure(EVIL, EVIL, EVIL), after=None)
    done = near.enqueue("echo", EVIL, queue="default")
    near.complete(near.dequeue(worker, ["default"])[0], EVIL)
    running = near.enqueue("echo", EVIL, queue="default")
    near.dequeue(worker, ["default"])
    raw(near).hset(near.keys.counts, f"pending:{EVIL}", 0)
    about = json.dumps({"host": EVIL, "pid": 1, "queues": [EVIL], "concurrency": 1, "startedAt": 1})
    raw(near).set(near.keys.worker(worker), about)
    page = open()
    quoted = json.dumps(EVIL)
    for at, texts in {
        "#/": (EVIL,),
        "#/jobs?status=failed": (f"{EVIL}: {EVIL}",),
        "#/jobs": (quoted,),
        f"#/jobs/{failed.id}": (f"{quoted}: {quoted}", f"{EVIL}: {EVIL}", f"Unique key{EVIL}"),
        f"#/jobs/{done.id}": (quoted,),
        f"#/jobs/{running.id}": (quoted,),
    }.items():
        page.goto(page.url.partition("#")[0] + at)
        shows(page, *texts)
        lacks(page, "img, main script, header script, b:text('&lt;')")
        assert "owned" not in page.title()
    page.goto(page.url.partition("#")[0] + "#/jobs?status=failed")
    page.locator("[name=errorType]").select_option(EVIL)
    page.get_by_role("button", name="Retry all of these").click()
    shows(page, f"with the error {EVIL}?")
    lacks(page, "img, dialog script")


def test_the_browser_refuses_to_run_or_fetch_what_is_not_the_pages_own(open: Open, near: Queue) -> None:
    page = open(watched=False)
    shows(page, "No job yet")
    policy = Client(API(Settings(), near)).get("/").headers["content-security-policy"]
    assert "unsafe" not in policy
    assert {"default-src 'none'", "connect-src 'self'", "form-action 'none'", "frame-ancestors 'none'"} <= set(
        policy.split("; ")
    )
    for code in (
        "document.body.innerHTML = '<b>'",
        "document.write('<b>')",
        "new DOMParser().parseFromString('<b>', 'text/html')",
    ):
        with pytest.raises(playwright.Error, match="TrustedHTML"):
            page.evaluate(f"() => {{ {code} }}")


# How it looks ---------------------------------------------------------------------------------------------------------

WIDTHS = (360, 800, 1400)
LOOKS = ("empty", "busy", "failed", "job", "submit", "sign-in", "confirm")


def test_fits_every_width_with_the_longest_names(open: Open, near: Queue) -> None:
    name, text = "n" * 100, "x" * 1000
    handler(name)(nothing)
    job = near.enqueue(name, {text: text}, queue=name, unique_key="u" * 200)
    worker = near.register([name] * 20, 1)
    near.fail(near.dequeue(worker, [name])[0], Failure("E" * 200, text, text), after=0)
    near.dequeue(worker, [name])
    page = open()
    for at, sign in {
        "#/": "Workers",
        "#/jobs": "EEE",
        f"#/jobs/{job.id}": "Payload",
        f"#/submit/{name}": "Options",
    }.items():
        page.goto(page.url.partition("#")[0] + at)
        shows(page, sign)
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{at} scrolls sideways at {width}"


def nothing(payload: Any) -> None: ...


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("look", LOOKS)
def test_fits_every_width_in_both_themes(open: Open, near: Queue, tmp_path: Path, look: str, theme: str) -> None:
    """Also writes the pictures, for people to look at, into the folder DASHBOARD_SHOTS."""
    if look != "empty":
        busy(near)
    failed = next((job.id for job in newest(near, "failed") if job.error and job.error.traceback), "")
    at = {
        "failed": "#/jobs?status=failed",
        "job": f"#/jobs/{failed}",
        "submit": "#/submit/send-email",
        "confirm": "#/jobs?status=failed",
    }
    keys = {"api_keys": KEYS} if look == "sign-in" else {}
    page = open(at.get(look, ""), color_scheme=theme, **keys)
    sign = {
        "empty": "No job yet",
        "busy": "Throughput",
        "failed": "TimeoutError",
        "job": "Traceback",
        "submit": "uniqueKey",
        "sign-in": "API key",
        "confirm": "TimeoutError",
    }
    shows(page, sign[look])
    if look == "confirm":
        page.get_by_role("button", name="Retry all of these").click()
        shows(page, "jobs fit now")
    if look == "submit":
        page.get_by_role("button", name="Submit").click()
        page.get_by_label("cc").fill("[1")
        page.get_by_role("button", name="Submit").click()
        shows(page, "is not JSON")
    folder = Path(os.environ.get("DASHBOARD_SHOTS") or tmp_path)
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.evaluate("scrollTo(0, 0)")
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"it scrolls sideways at {width}"
        page.screenshot(path=folder / f"{look}-{width}-{theme}.png", full_page=look != "confirm")
