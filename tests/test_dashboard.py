"""The dashboard in a real browser: what it shows of real jobs, what its buttons do, and what it must never let happen.

Every page that a test opens is watched: an error in its console, a breach of its policy or a request to elsewhere fails the test.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from client import Client, serving
from conftest import RedisServer, Server, put, raw, until

from tinyqueue import MAX_JOBS, Discard, Failure, Job, Queue, Settings, handler
from worker import Worker
from wsgi import API

playwright = pytest.importorskip("playwright.sync_api")

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

        def open(at: str = "", queue: Queue | None = None, **options: Any) -> Any:
            known = {name: options.pop(name) for name in list(options) if name in Settings.__struct_fields__}
            url = served.by(API(Settings(**known), queue or near))
            context = browser.new_context(
                viewport={"width": 1400, "height": 900}, locale="en-GB", timezone_id="Europe/Berlin", **options
            )
            context.grant_permissions(["clipboard-read", "clipboard-write"])
            context.add_init_script("addEventListener('securitypolicyviolation', e => console.error('CSP', e.violatedDirective))")
            page = context.new_page()
            page.set_default_timeout(10_000)
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


def count_requests(page: Any) -> list[str]:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    return asked


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
    return {"failed": queue.jobs("failed")[1] if not failed.error else failed, "running": running, "trace": queue.page()[0][-1]}


TRACE = """Traceback (most recent call last):
  File "/app/worker.py", line 171, in run_job
    result = handler.run(job)
  File "/app/handlers.py", line 79, in send_email
    with _mail_server(url) as server:
  File "/usr/lib/python3.11/contextlib.py", line 137, in __enter__
    return next(self.gen)
TimeoutError: the mail server did not answer within 30 s
"""


# How it looks ---------------------------------------------------------------------------------------------------------

WIDTHS = (360, 800, 1400)
LOOKS = ("empty", "busy", "failed", "job", "submit", "sign-in", "confirm")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("look", LOOKS)
def test_fits_every_width_in_both_themes(open: Open, near: Queue, tmp_path: Path, look: str, theme: str) -> None:
    """Also writes the pictures, for people to look at, into the folder DASHBOARD_SHOTS."""
    if look != "empty":
        busy(near)
    failed = next((job.id for job in near.jobs("failed") if job.error and job.error.traceback), "")
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
