"""Test the dashboard in a real browser: what it shows, what its buttons do, what it must not allow.

Every page that a test opens is monitored. A console error, a violation of the Content-Security-Policy
or a request to another host fails the test.

``PYTHONPATH=. python tests/test_dashboard.py`` takes the README's screenshot, docs/dashboard.png.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode

import pytest
from client import Client, serving
from conftest import RedisServer, newest, put, raw, until
from test_why import SITUATIONS

from tinyqueue import HANDLERS, Discard, Failure, Job, Outcome, Override, Queue, handler
from tinyqueue_config import Settings
from tinyqueue_schedule import make_schedule, put as put_schedule
from worker import Worker
from wsgi import API

try:
    import playwright.sync_api as playwright
except ImportError:
    pytest.skip("playwright is not installed: THE DASHBOARD IS NOT TESTED", allow_module_level=True)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NO_CHROMIUM = "chromium is not on PATH: THE DASHBOARD IS NOT TESTED"
KEYS = "admin:admin:admin-0123456789,reader:read:read-0123456789ab,client:submit:submit-0123456789"
CONTEXT: Any = {"viewport": {"width": 1400, "height": 900}, "locale": "en-GB", "timezone_id": "Europe/Berlin"}
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


# Browser, server and data ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip(NO_CHROMIUM)
    with launched_browser() as browser:
        yield browser


@contextmanager
def launched_browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open(browser: Any, near: Queue) -> Iterator[Open]:
    """Serve a queue and open its dashboard: open("#/jobs", api_keys=KEYS, ...) -> page."""
    problems: list[str] = []
    with Servers() as servers:

        def open(
            path: str = "", queue: Queue | None = None, fake_time: bool = False, monitored: bool = True, **options: Any
        ) -> Any:
            settings = {name: options.pop(name) for name in list(options) if name in Settings.__struct_fields__}
            url = servers.serve(API(Settings(**settings), queue or near))
            context = browser.new_context(**CONTEXT, **options)
            context.grant_permissions(["clipboard-read", "clipboard-write"])
            context.add_init_script(
                "addEventListener('securitypolicyviolation', e => console.error('CSP', e.violatedDirective))"
            )
            page = context.new_page()
            if fake_time:
                page.clock.install()
            page.set_default_timeout(10_000)
            if monitored:
                _monitor(page, url, problems)
            page.goto(url + path)
            return page

        yield open
        for context in browser.contexts:
            context.close()
    assert problems == []


def _monitor(page: Any, url: str, problems: list[str]) -> None:
    """Collect console messages, uncaught errors and requests to other hosts."""

    def on_console(message: Any) -> None:
        # The browser itself logs every response above 399 and every failed request.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            problems.append(message.text)

    def on_request(request: Any) -> None:
        if not request.url.startswith((url, "data:")):
            problems.append(request.url)

    page.on("console", on_console)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", on_request)


class Servers(ExitStack):
    """HTTP servers in this process. They stop at the end of the block."""

    def serve(self, api: API) -> str:
        """Start a server and return its URL."""
        _, (host, port) = self.enter_context(serving(api))
        return f"http://{host}:{port}/"


@contextmanager
def working(queue: Queue) -> Iterator[None]:
    """Run a real worker with two slots in a thread."""
    worker = Worker(queue, Settings(worker_concurrency=2))
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield
    finally:
        worker.stop("release")
        thread.join(20)
        assert not thread.is_alive()


def shows(page: Any, *texts: str) -> None:
    """Wait until the page shows all of these texts."""
    for text in texts:
        playwright.expect(page.locator("body")).to_contain_text(text)


def lacks(page: Any, selector: str) -> None:
    playwright.expect(page.locator(selector)).to_have_count(0)


def tile(page: Any, status: str) -> Any:
    return page.locator(f".tiles a:has(.status.{status}) b")


def busy(queue: Queue) -> dict[str, Job]:
    """Add an hour of history, jobs of every status, a paused queue and two workers."""
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


# Submitting, finding and changing jobs --------------------------------------------------------------------------------


def test_submit_form_sends_every_field_and_links_to_the_job(open: Open, near: Queue) -> None:
    page = open("#/submit/send-email")
    page.locator("main").get_by_label("to", exact=False).first.fill("ada@example.com")
    page.locator("[name='payload.subject']").fill("Hello")
    page.locator("[name='payload.body']").fill("two\nlines")
    page.locator("[name='payload.format']").select_option("html")
    page.locator("[name='payload.copies']").fill("2")
    page.get_by_label("urgent").check()
    page.locator("[name='payload.cc']").fill('["b@example.com"]')
    page.locator("[name=maxAttempts]").fill("5")
    page.locator("[name=uniqueKey]").fill("u")
    page.locator("[name=callbackUrl]").fill("http://receiver.example/end")
    page.get_by_role("button", name="Submit").click()
    page.locator("text=Accepted: >> a").click()
    shows(page, "waiting for")
    [job] = newest(near, "pending")
    message = {"to": "ada@example.com", "subject": "Hello", "body": "two\nlines", "format": "html", "copies": 2}
    assert job.payload == message | {"urgent": True, "cc": ["b@example.com"]}
    assert (job.max_attempts, job.queue, job.unique_key) == (5, "default", "u")
    assert job.callback_url == "http://receiver.example/end"
    with working(near):
        shows(page, "completed", '"sent": "ada@example.com"')


def fill_required(page: Any) -> None:
    """Fill in the required fields of send-email."""
    for name, text in {"to": "ada@example.com", "subject": "Hello", "body": "Hi"}.items():
        page.locator(f"[name='payload.{name}']").fill(text)


def test_job_shows_its_callback_and_the_state_of_its_delivery(open: Open, near: Queue) -> None:
    url = "http://receiver.example/<b>end"
    job = put(near, "pending", callback_url=url)
    page = open(f"#/jobs/{job.id}")
    shows(page, "Callback URL", url)
    lacks(page, "text=Delivery")
    near.cancel(job.id)
    shows(page, "Delivery", "attempt 0 of 10")
    worker = near.register(["webhooks"], 1)
    [delivery] = near.dequeue(worker, ["webhooks"])
    near.fail(delivery, Failure("NoAnswer", "receiver.example: connection refused"), after=300)
    shows(page, "retrying", "attempt 1 of 10", "NoAnswer: receiver.example: connection refused")
    page.locator(f"a[href='#/jobs/{delivery.id}']").click()
    shows(page, "webhook", delivery.id, "Delayed until")
    near.deregister(worker)


def test_job_shows_the_id_of_a_delivery_that_was_deleted(open: Open, near: Queue) -> None:
    job = put(near, "pending", callback_url="http://receiver.example/")
    near.cancel(job.id)
    id = near.get(job.id).callback_job
    near.cancel(id)
    near.forget("cancelled", [id.encode()])
    page = open(f"#/jobs/{job.id}", monitored=False)  # the browser logs the 404
    shows(page, "Delivery", id)


def test_submit_omits_empty_fields(open: Open, near: Queue) -> None:
    page = open("#/submit/send-email")
    fill_required(page)
    page.locator("[name='payload.subject']").press("Enter")
    shows(page, "Accepted")
    [job] = newest(near, "pending")
    assert job.payload == {"to": "ada@example.com", "subject": "Hello", "body": "Hi"}


@pytest.mark.parametrize(
    ("name", "keys", "rule"), [("payload.subject", "", "is required"), ("payload.copies", "2e", "must be a number")]
)
def test_submit_sends_nothing_when_a_field_is_missing_or_invalid(
    open: Open, near: Queue, name: str, keys: str, rule: str
) -> None:
    page = open("#/submit/send-email")
    fill_required(page)
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    input = page.locator(f"[name='{name}']")
    input.fill("")
    input.press_sequentially(keys)
    page.get_by_role("button", name="Submit").click()
    playwright.expect(input).to_be_focused()
    playwright.expect(input).to_have_accessible_description(f"✕ {rule}")
    assert sent == []


def test_submit_defaults_to_an_empty_object_for_an_untyped_payload(open: Open, near: Queue) -> None:
    page = open("#/submit/charge-card")
    page.get_by_role("button", name="Submit").click()
    shows(page, "Accepted")
    assert newest(near, "pending")[0].payload == {}


def test_submit_warns_when_the_queue_has_no_worker_or_is_paused(open: Open, near: Queue) -> None:
    near.register(["default"], 1)
    page = open("#/submit/send-email")
    fill_required(page)
    page.locator("[name=queue]").fill("mial")
    page.get_by_role("button", name="Submit").click()
    shows(page, "No worker serves queue mial.")
    page.locator("[name=queue]").fill("")
    page.get_by_role("button", name="Submit").click()
    lacks(page, "text=No worker serves")
    near.pause("default")
    shows(page, "Queue default is paused. Its jobs start after it is resumed.")


def test_pending_job_shows_why_it_does_not_start(open: Open, near: Queue) -> None:
    job = put(near, "delayed", queue="reports")
    page = open(f"#/jobs/{job.id}")
    shows(page, "Delayed until", "No worker serves queue reports. Check the name, or start a worker for it.")
    near.register(["reports"], 1)
    lacks(page, "text=No worker serves")
    near.pause("reports")
    shows(page, "Queue reports is paused.")


IN_OTHER_WORDS = {
    "delayed": "Delayed until",
    "retries": "Delayed until",
    "paused": "Queue default is paused. Its jobs start after it is resumed.",
    "not served": "No worker serves queue default.",
    "waits": "Waits for",
    "waits for many": "and 10 more",
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_pending_job_shows_why_it_does_not_start_in_each_situation(open: Open, near: Queue, name: str) -> None:
    del HANDLERS["echo"]

    @handler("echo")
    def echo(payload: Any, job: Job) -> None: ...

    job, text = SITUATIONS[name][1](near)
    page = open(f"#/jobs/{job.id}")
    shows(page, IN_OTHER_WORDS.get(name, f"It {text}"))


def test_job_links_to_those_that_it_waits_for(open: Open, near: Queue) -> None:
    parents = [near.enqueue("echo", "first parent"), near.enqueue("echo", "second parent")]
    job = near.enqueue("echo", "child", after=parents)
    page = open(f"#/jobs/{job.id}")
    page.get_by_role("link", name=parents[1].id[-8:]).click()
    shows(page, "second parent")
    [first] = near.dequeue(near.register(["reports"], 1), ["reports"])
    near.complete(first)
    page.goto(page.url.partition("#")[0] + f"#/jobs/{job.id}")
    shows(page, "After")
    assert page.get_by_role("link", name=first.id[-8:]).count() == 1


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("payload.copies", "1.5", "Expected `int`, got `float`"),
        ("payload.cc", '["a", 1]', "cc[1]: Expected `str`, got `int`"),
        ("payload.cc", "[", "is not valid JSON"),
        ("queue", "a b", "must be 1 to 100 of the characters"),
        ("maxAttempts", "0", "must be a whole number from 1 to 100"),
        ("callbackUrl", "http://user@receiver.example/", "must be an http or https URL"),
    ],
)
def test_submit_shows_an_error_beside_the_invalid_field(
    open: Open, near: Queue, name: str, value: str, rule: str
) -> None:
    page = open("#/submit/send-email")
    fill_required(page)
    page.locator(f"[name='{name}']").fill(value)
    page.get_by_role("button", name="Submit").click()
    playwright.expect(page.locator(f".field:has([name='{name}']) .wrong")).to_contain_text(rule)
    playwright.expect(page.locator(f"[name='{name}']")).to_be_focused()
    playwright.expect(page.locator(f"[name='{name}']")).to_have_value(value)
    assert near.page()[0] == []


def test_submit_accepts_json_for_an_untyped_payload(open: Open, near: Queue) -> None:
    page = open("#/submit/echo")
    page.locator("[name=payload]").fill('{"n": 12345678901234567890, "deep": [null]}')
    page.get_by_role("button", name="Submit").click()
    shows(page, "Accepted")
    assert newest(near, "pending")[0].payload == {"n": 12345678901234567890, "deep": [None]}


def test_retry_button_requeues_a_failed_job(open: Open, near: Queue) -> None:
    fixed = threading.Event()

    @handler("flaky", max_attempts=1)
    def flaky(payload: Any) -> str:
        if not fixed.is_set():
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
        fixed.set()
        page.get_by_role("button", name="Retry").click()
        shows(page, "Requeued; attempts reset.")
        shows(page, "completed", '"done"')
        lacks(page, "main button:text-is('Retry')")


@pytest.mark.parametrize("around", ["{}", ' "{}",', "https://jobs.example.com/#/jobs/{}?x=1", '{{"jobId":"{}"}}'])
def test_find_opens_a_job_when_its_id_is_pasted(open: Open, near: Queue, around: str) -> None:
    job = near.enqueue("echo", {"found": "it"})
    page = open()
    shows(page, "Queues")
    page.keyboard.press("/")
    playwright.expect(page.get_by_label("Find a job by id")).to_be_focused()
    page.keyboard.insert_text(around.format(job.id))
    shows(page, '"found": "it"')
    assert page.url.endswith(f"#/jobs/{job.id}")


def test_find_opens_a_recent_job_by_the_end_of_its_id(open: Open, near: Queue) -> None:
    job = near.enqueue("echo", {"found": "it"})
    near.enqueue("echo", 2)
    page = open()
    find = page.get_by_label("Find a job by id")
    find.fill(job.id[-8:])
    find.press("Enter")
    shows(page, '"found": "it"', job.id)
    find.fill("deadbeef")
    find.press("Enter")
    shows(page, "No job found for deadbeef. Enter a whole id, or the last 8 characters of one of the latest 500 jobs.")


def test_focus_stays_on_a_control_or_moves_to_the_heading_when_it_is_removed(open: Open, near: Queue) -> None:
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


@pytest.mark.parametrize("page_name", ["constructor", "__proto__", "toString", "hasOwnProperty/x"])
def test_open_a_page_that_is_named_like_a_member_of_every_object(open: Open, page_name: str) -> None:
    shows(open(f"#/{page_name}"), "Overview")
    shows(open(f"#/submit/{page_name}"), "Submit")


def test_work_behind_a_proxy_that_removes_a_prefix(open: Open, near: Queue) -> None:
    page = open("#/jobs")
    base = page.url.partition("#")[0]
    page.route(
        f"{base}tools/queue/**", lambda route: route.continue_(url=route.request.url.replace("/tools/queue", ""))
    )
    page.goto("about:blank")  # the page without the prefix sends no more requests
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{base}tools/queue/")
    shows(page, f"curl '{base}tools/queue/jobs'")
    page.goto(f"{base}tools/queue/#/submit/echo")
    page.get_by_label("JSON", exact=False).first.fill('"hello"')
    page.get_by_role("button", name="Submit").click()
    job = until(lambda: newest(near, "pending"))[0]
    page.get_by_role("link", name=job.id).click()
    shows(page, job.id)
    assert [url for url in asked if not url.startswith((f"{base}tools/queue/", "data:"))] == []


@pytest.mark.parametrize(
    ("id", "text"),
    [
        ("01900000-0000-7000-8000-000000000000", "Job 01900000-0000-7000-8000-000000000000 does not exist."),
        ("%3Cimg%20src=x%3E", "No job found for %3Cimg%20src=x%3E."),
        ("nope", "No job found for nope."),
    ],
)
def test_job_page_reports_an_unknown_id(open: Open, id: str, text: str) -> None:
    shows(open(f"#/jobs/{id}"), "Job not found", text)


def test_cancel_button_cancels_a_pending_job(open: Open, near: Queue) -> None:
    job = put(near, "delayed")
    page = open(f"#/jobs/{job.id}")
    page.get_by_role("button", name="Cancel").click()
    shows(page, "Job cancelled.", "cancelled")
    playwright.expect(page.get_by_role("button", name="Retry")).to_be_visible()
    assert near.get(job.id).status == "cancelled"  # type: ignore[union-attr]


def test_cancel_button_shows_why_a_running_job_cannot_be_cancelled(open: Open, near: Queue) -> None:
    job = near.enqueue("send-email", {"to": "a", "subject": "s", "body": "b"})
    near.dequeue(near.register(["default"], 1), ["default"])
    page = open(f"#/jobs/{job.id}")
    page.get_by_role("button", name="Cancel").click()
    shows(page, "its handler takes no Job to read the request")


def test_pause_and_resume_buttons_change_the_queue(open: Open, near: Queue) -> None:
    near.enqueue("echo", 1, queue="reports")
    page = open()
    page.get_by_role("button", name="Pause queue reports").click()
    shows(page, "paused: no jobs are started")
    assert near.queues()["reports"]["paused"]
    page.get_by_role("button", name="Resume queue reports").click()
    page.get_by_role("button", name="Pause queue reports").wait_for()
    shows(page, "Queue reports resumed.")
    assert not near.queues()["reports"]["paused"]


def test_schedules_show_their_runs_and_can_be_paused_resumed_and_run(open: Open, near: Queue) -> None:
    put_schedule(near, make_schedule("nightly", "30 2 * * *", "echo", {}, timezone="Europe/Berlin"))
    page = open()
    row = page.locator("tr[data-key=nightly]")
    playwright.expect(row).to_contain_text("30 2 * * * Europe/Berlin")
    playwright.expect(row).to_contain_text("in ")
    playwright.expect(row).to_contain_text("02:30 on 20")
    page.get_by_role("button", name="Pause schedule nightly").click()
    page.get_by_role("button", name="Resume schedule nightly").wait_for()
    playwright.expect(row).to_contain_text("paused")
    page.get_by_role("button", name="Run schedule nightly").click()
    playwright.expect(row).to_contain_text("pending")
    page.get_by_role("button", name="Resume schedule nightly").click()
    page.get_by_role("button", name="Pause schedule nightly").wait_for()
    [job] = near.page()[0]
    assert job.schedule == "nightly"
    row.locator("a").click()
    shows(page, job.id, "nightly")


def test_overview_without_schedules_has_no_panel_for_them(open: Open, near: Queue) -> None:
    put(near, "completed")
    page = open()
    shows(page, "Queues")
    lacks(page, "[data-key=schedules]")


@pytest.fixture
def limited(near: Queue) -> list[Job]:
    """Declare a limit of one for each account, start one of its jobs and hold two."""
    handler("bill", max_running=1, limit_by="account")(nothing)
    worker = near.register(["default"], 10)
    jobs = near.enqueue_many("bill", [{"account": "a"}] * 3)
    near.dequeue(worker, ["default"], 10)
    return jobs


def test_held_job_shows_its_limit_and_its_position(open: Open, near: Queue, limited: list[Job]) -> None:
    page = open(f"#/jobs/{limited[2].id}")
    shows(page, "It is held by the limit bill/a, at position 2 of those that wait for room.")
    near.cancel(limited[1].id)
    shows(page, "It is held by the limit bill/a, at position 1 of those that wait for room.")
    near.complete(near.get(limited[0].id))
    lacks(page, "text=held by the limit")
    shows(page, "Limit")


def test_limits_can_be_paused_resumed_and_changed(open: Open, near: Queue, limited: list[Job]) -> None:
    page = open()
    row = page.locator("[data-key=limits] [data-key='bill/a']")
    playwright.expect(row.locator(".n").first).to_have_text("1 of 1")
    page.get_by_role("button", name="Pause limit bill/a").click()
    shows(page, "Limit bill/a paused.")
    playwright.expect(row).to_contain_text("paused: none of its jobs are started")
    page.get_by_role("button", name="Change limit bill/a").click()
    page.get_by_label("Jobs at a time").fill("7")
    page.get_by_label("Jobs at a time").press("Enter")
    playwright.expect(row).to_contain_text("1 of 7")
    assert near.limits_in_use()["bill/a"]["override"] == {"maxRunning": 7, "paused": True}
    page.get_by_role("button", name="Resume limit bill/a").click()
    page.get_by_role("button", name="Pause limit bill/a").wait_for()
    assert near.limits_in_use()["bill/a"]["override"] == {"maxRunning": 7}
    page.get_by_role("button", name="Change limit bill/a").click()
    page.get_by_label("Jobs at a time").fill("")
    page.locator("dialog").get_by_role("button", name="Change").click()
    playwright.expect(row).to_contain_text("1 of 1")
    assert near.limits_in_use()["bill/a"]["override"] == {}
    page.get_by_role("button", name="Change limit bill/a").click()
    page.get_by_label("Jobs at a time").fill("0")
    page.locator("dialog").get_by_role("button", name="Change").click()
    shows(page, "maxRunning: must be")


def test_value_whose_type_is_paused_has_no_button_that_would_not_resume_it(
    open: Open, near: Queue, limited: list[Job]
) -> None:
    near.set_limit("bill", Override(paused=True))
    page = open()
    shows(page, "paused: none of its jobs are started")
    assert page.locator("[data-key='bill/a'] button").all_inner_texts() == ["Change…"]
    page.get_by_role("button", name="Resume limit bill", exact=True).click()
    page.get_by_role("button", name="Pause limit bill/a").wait_for()


def test_overview_without_limits_has_no_panel_for_them(open: Open, near: Queue) -> None:
    put(near, "pending")
    page = open()
    shows(page, "Workers")
    lacks(page, "[data-key=limits]")


def test_notice_does_not_move_the_page_and_closes_by_itself(open: Open, near: Queue) -> None:
    near.enqueue("echo", 1, queue="reports")
    page = open(fake_time=True)
    button = page.get_by_role("button", name="queue reports")
    before = button.bounding_box()
    button.click()
    shows(page, "Queue reports paused. It still accepts jobs, but workers start none of them.")
    playwright.expect(button).to_have_text("Resume")
    assert button.bounding_box()["y"] == before["y"]
    page.clock.run_for(6500)
    lacks(page, "#notice p")


def test_notice_closes_when_dismissed(open: Open, near: Queue) -> None:
    near.enqueue("echo", 1, queue="reports")
    page = open()
    page.get_by_role("button", name="Pause queue reports").click()
    page.get_by_role("button", name="Dismiss").click()
    lacks(page, "#notice p")


def test_notice_of_a_failed_action_stays_until_the_server_answers_again(open: Open, near: Queue) -> None:
    near.enqueue("echo", 1, queue="reports")
    page = open(fake_time=True)
    shows(page, "reports")
    page.context.set_offline(True)
    page.get_by_role("button", name="Pause queue reports").click()
    alert = page.locator("#notice [role=alert]")
    playwright.expect(alert).to_have_text("Cannot reach the server")
    page.clock.run_for(60_000)
    playwright.expect(alert).to_be_visible()
    page.context.set_offline(False)
    page.clock.run_for(2500)
    lacks(page, "#notice p")


def test_overview_shows_the_jobs_of_each_worker(open: Open, near: Queue) -> None:
    job = put(near, "processing")
    near.register(["reports"], 3)
    page = open()
    running = page.locator("tr", has_text="1 of 1")
    playwright.expect(running).to_contain_text(f"echo {job.id[-8:]} for")
    playwright.expect(page.locator("tr", has_text="0 of 3")).to_contain_text("idle")
    running.get_by_role("link", name="echo").click()
    shows(page, job.id, f"Worker{job.worker}")


def test_progress_is_shown_while_a_job_runs_and_hidden_when_it_has_ended(open: Open, near: Queue) -> None:
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


def test_retry_all_counts_the_matching_jobs_and_asks_before_it_requeues_them(open: Open, near: Queue) -> None:
    many_failed(near, 1205)
    kept = near.enqueue("charge-card", {})
    worker = near.register(["default"], 1)
    near.fail(near.dequeue(worker, ["default"])[0], Failure("Other", "not this one"))
    page = open("#/jobs?status=failed&errorType=Boom")
    page.get_by_role("button", name="Retry all matching jobs").click()
    shows(page, "Retry all failed jobs with error Boom?", "1,205 jobs match now.")
    page.get_by_role("button", name="Close").click()
    assert near.stats()["failed"] == 1206
    page.get_by_role("button", name="Retry all matching jobs").click()
    page.get_by_role("button", name="Retry 1,205 jobs").click()
    shows(page, "1,205 of 1,205 requeued.")
    playwright.expect(page.locator("[data-key=task] small")).to_have_text("Done")
    lacks(page, "dialog[open]")
    stats = near.stats()
    assert (stats["failed"], stats["pending"]) == (1, 1205)
    assert near.get(kept.id).status == "failed"  # type: ignore[union-attr]


def test_listing_can_be_filtered_and_paged(open: Open, near: Queue) -> None:
    near.enqueue_many("echo", range(60), queue="reports")
    near.enqueue("send-email", {"to": "a", "subject": "s", "body": "b"})
    page = open("#/jobs")
    rows = page.locator("tbody tr")
    playwright.expect(rows).to_have_count(50)
    page.locator("main").get_by_label("type").select_option("echo")
    page.get_by_role("link", name="Older").click()
    playwright.expect(rows).to_have_count(10)
    page.get_by_role("link", name="Newest").click()
    playwright.expect(rows).to_have_count(50)
    page.locator("main").get_by_label("type").select_option("send-email")
    playwright.expect(rows).to_have_count(1)
    page.get_by_label("status").select_option("failed")
    shows(page, "No matching jobs")
    page.get_by_role("link", name="Show all jobs").click()
    playwright.expect(rows).to_have_count(50)


def test_copy_as_curl_copies_a_command_that_submits_the_same_job(open: Open, near: Queue) -> None:
    payload = {"text": 'it\'s "quoted" $HOME `id` \\ é\n', "big": 2**63 + 1}
    near.pause("reports")
    job = near.enqueue("echo", payload, max_attempts=7, queue="reports")
    page = open("#/jobs", api_keys=KEYS)
    sign_in(page, "admin-0123456789")
    page.get_by_role("link", name="echo").click()
    page.get_by_role("button", name="Copy as curl").click()
    shows(page, "Command copied.")
    command = page.evaluate("navigator.clipboard.readText()")
    assert "admin-0123456789" not in command
    subprocess.run(
        ["bash", "-c", command], env={"PATH": os.environ["PATH"], "TINYQUEUE_KEY": "admin-0123456789"}, check=True
    )
    [copy] = [found for found in newest(near, "pending") if found.id != job.id]
    assert (copy.type, copy.payload, copy.max_attempts, copy.queue) == ("echo", payload, 7, "reports")


def test_copy_as_curl_shows_the_command_when_the_clipboard_is_unavailable(open: Open, near: Queue) -> None:
    """Browsers offer the clipboard only over HTTPS and on localhost."""
    job = near.enqueue("echo", {"n": 1})
    page = open()
    page.add_init_script("delete Navigator.prototype.clipboard")
    page.goto(page.url.partition("#")[0] + f"?again#/jobs/{job.id}")
    page.get_by_role("button", name="Copy as curl").click()
    playwright.expect(page.get_by_label("text to copy")).to_contain_text('"payload":{"n":1}')
    assert page.evaluate("String(getSelection())").startswith("curl ")
    page.keyboard.press("Escape")
    lacks(page, "dialog[open]")


def test_chart_describes_the_selected_minute(open: Open, near: Queue) -> None:
    near.clock.ahead = -near.now() % 60_000 - 3 * 60_000 + 30_000  # the middle of a minute
    put(near, "completed")
    put(near, "failed", queue="other")
    near.clock.ahead = 0
    page = open()
    chart = page.locator("figure", has_text="Attempts per minute")
    caption = chart.locator("figcaption")
    chart.locator("svg").focus()
    texts = []
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
        texts.append(caption.text_content().partition("  ")[2])
    assert texts.count("2 started, 1 completed, 0 retried, 1 failed, 0 cancelled") == 1
    assert texts.count("0 started, 0 completed, 0 retried, 0 failed, 0 cancelled") == 4
    box = chart.locator("svg").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 50)
    playwright.expect(caption).to_contain_text("0 started")
    page.mouse.move(0, 0)
    playwright.expect(caption).to_contain_text("― started")


# Keys -----------------------------------------------------------------------------------------------------------------


def sign_in(page: Any, secret: str) -> None:
    page.get_by_label("API key").fill(secret)
    page.get_by_role("button", name="Sign in").click()


def test_sign_in_keeps_the_key_in_this_tab_only_until_sign_out(open: Open, near: Queue) -> None:
    page = open(api_keys=KEYS)
    sign_in(page, "wrong-0123456789ab")
    shows(page, "Invalid API key")
    sign_in(page, "admin-0123456789")
    shows(page, "Queues")
    assert "0123456789" not in page.url
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]
    page.reload()
    shows(page, "Queues")
    page.get_by_role("button", name="Sign out").click()
    shows(page, "API key")
    assert page.evaluate("sessionStorage.length") == 0


def test_sign_in_with_the_keyboard_leaves_no_focus_frame(open: Open, near: Queue) -> None:
    page = open(api_keys=KEYS)
    page.get_by_label("API key").press_sequentially("admin-0123456789")
    page.keyboard.press("Enter")
    shows(page, "Queues")
    page.wait_for_function("document.activeElement.tagName === 'H1' || document.activeElement.id === 'main'")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "none"


def test_navigation_closes_the_dialog(open: Open, near: Queue) -> None:
    put(near, "failed")
    page = open("#/jobs?status=failed")
    page.get_by_role("button", name="Retry all matching jobs").click()
    shows(page, "1 job matches now.")
    page.evaluate("location.hash = '#/overview'")
    lacks(page, "dialog[open]")


def test_traceback_is_shown_from_its_end(open: Open, near: Queue) -> None:
    lines = "\n".join(f"line {at} of a library" for at in range(200))
    worker = near.register(["default"], 1)
    near.enqueue("echo", {}, queue="default", max_attempts=1)
    [job] = near.dequeue(worker, ["default"])
    near.settle(worker, [Outcome(job, "fail", error=Failure("Boom", "it broke", f"{lines}\nBoom: it broke"))])
    page = open(f"#/jobs/{job.id}")
    shows(page, "Boom: it broke")
    box = page.locator("pre.end")
    assert box.evaluate("box => box.scrollHeight - box.scrollTop - box.clientHeight") <= 1
    box.evaluate("box => box.scrollTop = 0")
    page.evaluate("draw()")
    assert box.evaluate("box => box.scrollTop") == 0


def test_read_key_sees_no_button_that_changes_anything(open: Open, near: Queue, limited: list[Job]) -> None:
    jobs = [put(near, status) for status in ("failed", "delayed")] + limited[1:]
    put_schedule(near, make_schedule("nightly", "@daily", "echo", {}))
    page = open(api_keys=KEYS)
    sign_in(page, "read-0123456789ab")
    texts = {"#/": "nightly", "#/failures": "Boom", "#/audit": "Nobody has", "#/jobs?status=failed": "Boom"}
    for view in (*texts, *(f"#/jobs/{job.id}" for job in jobs)):
        page.goto(page.url.partition("#")[0] + view)
        shows(page, texts.get(view, "Payload"))
        assert view != "#/" or page.locator("[data-key='bill/a']").count() == 1
        found = page.locator("button, main a.button, input[type=checkbox]").all_text_contents()
        assert set(found) <= {"Sign out", "Copy", "Copy as curl", "Count again"}
    lacks(page, ".tabs >> text=Submit")
    page.goto(page.url.partition("#")[0] + "#/submit")
    shows(page, "Key reader lacks the role submit. Sign in with a key that has it.")
    lacks(page, "form.job")


def test_submit_key_sees_only_the_form(open: Open, near: Queue) -> None:
    page = open("#/jobs", api_keys=KEYS)
    sign_in(page, "submit-0123456789")
    shows(page, "Submit a job")
    lacks(page, ".tabs, .find")
    fill_required(page)
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


def test_polling_stops_in_a_hidden_tab_and_resumes_when_the_tab_is_shown(open: Open, near: Queue) -> None:
    page = open(fake_time=True)
    shows(page, "No jobs yet")
    with page.expect_response("**/limits"):
        page.clock.run_for(2500)
    playwright.expect(page.locator("body")).to_contain_text("No jobs yet")
    hide(page, True)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.clock.run_for(60_000)
    near.enqueue("echo", 1)
    page.clock.run_for(60_000)
    assert requests == []
    hide(page, False)
    playwright.expect(tile(page, "pending")).to_have_text("1")


def test_polling_keeps_typed_text_selection_focus_and_closed_details(open: Open, near: Queue) -> None:
    job = put(near, "failed")
    near.retry(job.id)
    worker = near.register([job.queue], 1)
    [job] = near.dequeue(worker, [job.queue])
    near.fail(job, Failure("Boom", "it broke", TRACE), after=3600)
    page = open(f"#/jobs/{job.id}", fake_time=True)
    shows(page, "Boom")
    page.locator("summary").click()
    find = page.get_by_label("Find a job by id")
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


def test_outage_shows_the_age_of_the_data_and_ends_when_the_server_answers(open: Open, near: Queue) -> None:
    page = open(fake_time=True)
    shows(page, "No jobs yet")
    page.context.set_offline(True)
    page.clock.run_for(2500)
    shows(page, "Cannot reach the server. Showing data from", "No jobs yet")
    page.context.set_offline(False)
    near.enqueue("echo", 1)
    page.clock.run_for(2500)
    playwright.expect(tile(page, "pending")).to_have_text("1")
    lacks(page, "#banner >> text=Cannot reach the server")


def test_outage_stops_the_clock_at_the_last_answer_in_every_view(open: Open, near: Queue) -> None:
    near.register(["reports"], 1)
    page = open(fake_time=True)
    up = page.locator("td[data-name=up]")
    shows(page, "idle")
    page.context.set_offline(True)
    page.clock.run_for(2500)
    shows(page, "Showing data from")
    banner = page.locator("[data-key=poll-error]")
    notice, was = banner.text_content(), up.text_content()
    page.clock.run_for(60_000)
    playwright.expect(up).to_have_text(was)
    page.get_by_role("link", name="Submit", exact=True).click()
    shows(page, "Submit a job")
    with page.expect_event("requestfailed"):
        page.clock.run_for(2500)
    playwright.expect(banner).to_contain_text(notice.partition(" Retrying")[0])


def test_outage_is_shown_above_the_submit_form(open: Open, near: Queue) -> None:
    page = open("#/submit", fake_time=True)
    shows(page, "Submit a job")
    page.wait_for_function("state.loadedAt")  # the form is shown before
    page.context.set_offline(True)
    page.clock.run_for(2500)
    shows(page, "Cannot reach the server. Showing data from")


def test_redis_outage_is_shown_and_the_page_recovers_when_redis_is_back(
    open: Open, near: Queue, start_redis: Callable[..., RedisServer]
) -> None:
    server = start_redis()
    page = open(queue=Queue.from_url(server.url), fake_time=True)
    shows(page, "No jobs yet")
    server.stop()
    page.clock.run_for(2500)
    shows(page, "Redis is unavailable (unreachable)", "Showing data from")
    server.start()
    page.clock.run_for(6000)
    lacks(page, "#banner >> text=Redis is unavailable (unreachable)")


def test_page_opens_during_a_redis_outage(open: Open, start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis()
    server.stop()
    shows(open(queue=Queue.from_url(server.url)), "Redis is unavailable (unreachable)")


def test_every_page_shows_what_is_wrong_with_redis(open: Open, start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    page = open(queue=Queue.from_url(server.url))
    banner = page.locator("#banner")
    wrong = re.compile("maxmemory-policy is allkeys-lru.*since.*evicts jobs or leases when its memory is full", re.S)
    playwright.expect(banner).to_contain_text(wrong)
    page.get_by_role("link", name="Submit", exact=True).click()
    shows(page, "Submit a job")
    playwright.expect(banner).to_contain_text(wrong)


def test_rate_limit_is_shown(open: Open, near: Queue) -> None:
    shows(open(rate_limit="2/hour"), "more than 2 requests in 3600 seconds; try again in", "Retrying…")


# Data is never markup -------------------------------------------------------------------------------------------------

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script></pre>&lt;b&gt;"


def test_page_shows_job_data_as_text(open: Open, near: Queue) -> None:
    worker = near.register(["default"], 1)
    tag = "<img src=x onerror=alert(1)>"
    failed = near.enqueue("echo", {EVIL: EVIL}, unique_key=EVIL, queue="default", tags=[tag])
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
    for view, texts in {
        "#/": (EVIL,),
        "#/failures": (EVIL,),
        "#/jobs?status=failed": (f"{EVIL}: {EVIL}", tag),
        f"#/jobs?{urlencode({'text': EVIL})}": (quoted,),
        "#/jobs": (quoted,),
        f"#/jobs/{failed.id}": (f"{quoted}: {quoted}", f"{EVIL}: {EVIL}", f"Unique key{EVIL}"),
        f"#/jobs/{done.id}": (quoted,),
        f"#/jobs/{running.id}": (quoted,),
    }.items():
        page.goto(page.url.partition("#")[0] + view)
        shows(page, *texts)
        lacks(page, "img, main script, header script, b:text('&lt;')")
        assert "owned" not in page.title()
    page.goto(page.url.partition("#")[0] + "#/jobs?status=failed")
    page.locator("[name=errorType]").select_option(EVIL)
    page.get_by_role("button", name="Retry all matching jobs").click()
    shows(page, f"with error {EVIL}?")
    lacks(page, "img, dialog script")


def test_content_security_policy_blocks_other_hosts_and_markup_from_strings(open: Open, near: Queue) -> None:
    page = open(monitored=False)
    shows(page, "No jobs yet")
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


# Layout ---------------------------------------------------------------------------------------------------------------

WIDTHS = (360, 800, 1400)
LOOKS = ("empty", "busy", "failed", "job", "submit", "sign-in", "confirm")


def test_page_fits_every_width_with_the_longest_names(open: Open, near: Queue) -> None:
    name, text = "n" * 100, "x" * 1000
    handler(name, max_running=1)(nothing)
    job = near.enqueue(name, {text: text}, queue=name, unique_key="u" * 200)
    worker = near.register([name] * 20, 1)
    near.fail(near.dequeue(worker, [name])[0], Failure("E" * 200, text, text), after=0)
    near.dequeue(worker, [name])
    put_schedule(near, make_schedule(name, ",".join(["1"] * 96) + " 2 * * *", name, {}, timezone="Europe/Berlin"))
    page = open()
    for view, expected in {
        "#/": "Workers",
        "#/jobs": "EEE",
        f"#/jobs/{job.id}": "Payload",
        f"#/submit/{name}": "Job options",
    }.items():
        page.goto(page.url.partition("#")[0] + view)
        shows(page, expected)
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{view} scrolls sideways at {width}"


def nothing(payload: Any) -> None: ...


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("look", LOOKS)
def test_page_fits_every_width_in_both_themes(open: Open, near: Queue, tmp_path: Path, look: str, theme: str) -> None:
    """Also saves the screenshots in the directory that DASHBOARD_SHOTS names."""
    if look != "empty":
        busy(near)
    failed = next((job.id for job in newest(near, "failed") if job.error and job.error.traceback), "")
    views = {
        "failed": "#/jobs?status=failed",
        "job": f"#/jobs/{failed}",
        "submit": "#/submit/send-email",
        "confirm": "#/jobs?status=failed",
    }
    keys = {"api_keys": KEYS} if look == "sign-in" else {}
    page = open(views.get(look, ""), color_scheme=theme, **keys)
    texts = {
        "empty": "No jobs yet",
        "busy": "Attempts per minute",
        "failed": "TimeoutError",
        "job": "Traceback",
        "submit": "uniqueKey",
        "sign-in": "API key",
        "confirm": "TimeoutError",
    }
    shows(page, texts[look])
    if look == "confirm":
        page.get_by_role("button", name="Retry all matching jobs").click()
        shows(page, "jobs match now")
    if look == "submit":
        page.get_by_role("button", name="Submit").click()
        page.get_by_label("cc").fill("[1")
        page.get_by_role("button", name="Submit").click()
        shows(page, "is not valid JSON")
    folder = Path(os.environ.get("DASHBOARD_SHOTS") or tmp_path)
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.evaluate("scrollTo(0, 0)")
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"the page scrolls sideways at {width}"
        page.screenshot(path=folder / f"{look}-{width}-{theme}.png", full_page=look != "confirm")


# The screenshot in the README -----------------------------------------------------------------------------------------

SCREENSHOT = Path(__file__).resolve().parent.parent / "docs" / "dashboard.png"
SCREENSHOT_BYTES = 150_000
SCREENSHOT_WIDTH = 1400  # pixels
SCREENSHOT_TIME = datetime(2026, 3, 12, 14, 52, 40, tzinfo=UTC)
MINUTE = 60_000  # ms


def test_screenshot_in_the_readme_is_a_small_png() -> None:
    data = SCREENSHOT.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) <= SCREENSHOT_BYTES
    assert int.from_bytes(data[16:20], "big") <= SCREENSHOT_WIDTH


class DemoQueue:
    """A busy queue to take a screenshot of. Times are in milliseconds before SCREENSHOT_TIME."""

    def __init__(self) -> None:
        self.queue = Queue.embedded()
        self.now = int(SCREENSHOT_TIME.timestamp() * 1000)
        self.random = random.Random(2031)

    def fill(self) -> None:
        workers = [
            self.register("worker-1", 4127, ["emails", "payments"], 3, 187 * MINUTE),
            self.register("worker-2", 4130, ["emails", "images"], 3, 187 * MINUTE),
            self.register("worker-3", 8816, ["images", "reports"], 2, 41 * MINUTE),
        ]
        for minute in range(59, -1, -1):
            self.work(workers[0], minute)
        for job in self.wait("imports", "import-contacts", 6, 240_000)[:4]:
            self.queue.cancel(job.id)
        self.run(workers[0], "emails", "send-email", 2_300)
        self.run(workers[0], "payments", "charge-card", 1_200)
        self.run(workers[0], "emails", "send-email", 1_100)
        self.run(workers[1], "images", "process-image", 9_400, 0.7)
        self.run(workers[1], "images", "process-image", 6_300, 0.4)
        self.run(workers[1], "emails", "send-email", 1_400)
        self.run(workers[2], "reports", "export-data", 134_000, 0.85)
        self.run(workers[2], "images", "process-image", 3_200, 0.2)
        self.wait("emails", "send-email", 14, 4_300)
        self.wait("images", "process-image", 6, 12_300)
        self.wait("reports", "export-data", 3, 75_300)
        self.wait("reports", "export-data", 5, 75_300, delay=3600)
        self.wait("imports", "import-contacts", 21, 190_300)
        self.queue.pause("imports")
        for worker in workers:
            self.queue.heartbeat(worker)
        self.travel(0)

    def travel(self, before: float) -> None:
        self.queue.clock.ahead += self.now - int(before) - self.queue.now()

    def register(self, host: str, pid: int, queues: list[str], concurrency: int, before: int) -> str:
        self.travel(before)
        worker = self.queue.register(queues, concurrency, host)
        key = self.queue.keys.worker(worker)
        about = json.loads(raw(self.queue).get(key))
        raw(self.queue).set(key, json.dumps(about | {"host": host, "pid": pid}))
        return worker

    def work(self, worker: str, minute: int) -> None:
        """Process the jobs of one minute; a few of them fail."""
        load = 1 + math.sin(minute / 9) / 2 + self.random.uniform(-0.15, 0.15)
        outage = 22 <= minute <= 25
        begin = minute * MINUTE - 4_000 if minute else 30_000
        for queue, type, number in (("emails", "send-email", 34), ("images", "process-image", 12)):
            self.travel(begin + 1_400 * load * self.random.uniform(0.7, 1.3) * (3 if outage else 1))
            self.queue.enqueue_many(type, [{}] * int(number * load), queue=queue)
            self.travel(begin)
            jobs = self.queue.dequeue(worker, [queue], 500)
            failures = 7 if outage and queue == "emails" else self.random.choice([0, 0, 0, 1])
            failures = 4 if minute < 4 and queue == "images" else failures
            self.travel(begin - 900)
            retry = 300 if minute < 4 else None
            self.queue.settle(worker, [_outcome(job, n < failures, retry) for n, job in enumerate(jobs)])

    def run(self, worker: str, queue: str, type: str, before: int, progress: float = 0) -> None:
        self.travel(before)
        self.queue.enqueue(type, {}, queue=queue)
        [job] = self.queue.dequeue(worker, [queue])
        if progress:
            job.set_progress(progress, 1)
            self.queue.heartbeat(worker, [job.id])

    def wait(self, queue: str, type: str, number: int, before: int, **options: Any) -> list[Job]:
        self.travel(before)
        return self.queue.enqueue_many(type, [{}] * number, queue=queue, **options)


def _outcome(job: Job, failed: bool, retry: float | None) -> Outcome:
    if failed:
        error = Failure("TimeoutError", "the mail server did not answer within 30 s")
        return Outcome(job, "fail", error=error, after=retry)
    return Outcome(job, "complete")


def take_screenshot(path: Path) -> None:
    """Save a screenshot of the overview of a busy queue."""
    from PIL import Image

    demo = DemoQueue()
    demo.fill()
    settings = Settings(redis_url="redis://localhost")  # hides the note that jobs are not persisted
    with Servers() as servers, launched_browser() as browser:
        url = servers.serve(API(settings, demo.queue))
        page = browser.new_page(**CONTEXT | {"viewport": {"width": 1120, "height": 400}}, device_scale_factor=1.25)
        page.clock.set_fixed_time(SCREENSHOT_TIME)
        page.route("**/*", _set_date)
        page.route("**/events", lambda route: route.abort())  # they never end
        page.goto(url)
        shows(page, "Attempts per minute", "worker-3")
        picture = page.screenshot(full_page=True)
    path.parent.mkdir(exist_ok=True)
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _set_date(route: Any) -> None:
    """Send SCREENSHOT_TIME as the server's time, because the page sets its clock by it."""
    response = route.fetch()
    route.fulfill(response=response, headers=response.headers | {"date": format_datetime(SCREENSHOT_TIME, usegmt=True)})


if __name__ == "__main__":
    take_screenshot(SCREENSHOT)
