"""The dashboard as an operator needs it: in an incident, with a keyboard, a screen reader, a phone, and in Firefox.

``pytest tests/test_operator.py -k incident -rP`` prints how many seconds pass until each cause is shown.
"""

# ruff: noqa: F401, F811 - fixtures are imported, and requested by their names

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGSTOP
from typing import Any

import pytest
from conftest import RedisServer, newest, put, raw, until
from firefox import FIREFOX, Firefox
from test_dashboard import (  # the fixtures among them are used by name
    CONTEXT,
    KEYS,
    Open,
    Servers,
    browser,
    busy,
    handlers,
    lacks,
    many_failed,
    open,
    playwright,
    shows,
    sign_in,
    tile,
    working,
)
from test_processes import ROOT, Process, Web, folder, registered, start

from tinyqueue import Failure, Job, Queue, handler
from tinyqueue_config import Settings
from wsgi import API

AXE = "axe-core@^4.11"
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1400, "height": 900}


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The script of axe-core, which finds faults of accessibility."""
    if not shutil.which("npm"):
        pytest.skip("npm is not on PATH: NOBODY LOOKS WHETHER ALL CAN USE THE DASHBOARD")
    folder = tmp_path_factory.mktemp("axe")
    pack = ["npm", "pack", "--silent", AXE]
    done = subprocess.run(pack, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"npm pack failed: NOBODY LOOKS WHETHER ALL CAN USE THE DASHBOARD\n{done.stderr}")
    [archive] = folder.glob("*.tgz")
    shutil.unpack_archive(archive, folder, filter="data")
    return (folder / "package" / "axe.min.js").read_text()


def check_with_axe(page: Any, where: str) -> None:
    """Fail if the page breaks a rule."""
    for broken in page.evaluate("axe.run()")["violations"]:
        nodes = [f"{node['target']}: {node['failureSummary']}" for node in broken["nodes"][:3]]
        pytest.fail(f"{where} breaks {broken['id']} ({broken['help']}): {nodes}")


@pytest.mark.parametrize(("theme", "size"), [("light", DESK), ("dark", PHONE)], ids=["light", "dark"])
def test_every_page_follows_the_rules_of_axe(
    open: Open,
    near: Queue,
    axe: str,
    theme: str,
    size: dict[str, int],
) -> None:
    busy(near)
    page = open("", color_scheme=theme, api_keys=KEYS)
    page.set_viewport_size(size)
    page.add_init_script(axe)
    page.reload()
    shows(page, "API key")
    check_with_axe(page, "the sign-in form")
    sign_in(page, "admin-0123456789")
    page.get_by_role("button", name="Resume queue reports").click()
    failed = next(job for job in newest(near, "failed") if job.error and job.error.traceback)
    views = {
        "#/": "Attempts per minute",
        "#/failures": "29 failed",
        "#/audit": "resume",
        "#/jobs": "reports",
        "#/jobs?status=failed": "TimeoutError",
        "#/jobs?status=completed&type=nothing": "No matching jobs",
        f"#/jobs/{failed.id}": "Traceback",
        f"#/jobs/{newest(near, 'processing')[0].id}": "running for",
        f"#/jobs/{near.page()[0][0].id}": "Payload",
        "#/jobs/nope": "No job found",
        "#/submit/send-email": "uniqueKey",
    }
    for view, text in views.items():
        page.goto(page.url.partition("#")[0] + view)
        shows(page, text)
        check_with_axe(page, view)
    page.get_by_role("button", name="Submit").click()
    shows(page, "is required")
    check_with_axe(page, "a form with errors")
    page.goto(page.url.partition("#")[0] + f"#/jobs/{failed.id}")
    page.get_by_role("button", name="Edit and run again…").click()
    page.get_by_label("Payload", exact=True).fill("{")
    page.get_by_role("button", name="Run as a new job").click()
    shows(page, "is not valid JSON")
    check_with_axe(page, "a dialog with an error")
    page.goto(page.url.partition("#")[0] + "#/jobs?status=failed")
    page.get_by_label("select all on this page").check()
    check_with_axe(page, "selected jobs")
    page.locator("[data-key=tools] input").uncheck()
    page.get_by_role("button", name="Retry all matching jobs").click()
    shows(page, "jobs match now")
    check_with_axe(page, "a dialog")
    page.get_by_role("button", name="Retry 29 jobs").click()
    shows(page, "29 of 29 requeued.")
    check_with_axe(page, "a change of many jobs")


@pytest.fixture
def firefox(tmp_path: Path) -> Iterator[Firefox]:
    """Firefox as wide as a phone, on a system with a dark theme and without motion."""
    if not FIREFOX:
        pytest.skip("firefox-esr is not on PATH: THE DASHBOARD IS NOT TESTED IN FIREFOX")
    with Firefox(tmp_path, **{"ui.systemUsesDarkTheme": 1, "ui.prefersReducedMotion": 1}) as firefox:
        firefox.resize(**PHONE)
        yield firefox
        assert firefox.errors() == []


ENTER = "\ue007"  # as WebDriver spells it


def test_dashboard_works_in_firefox(near: Queue, firefox: Firefox) -> None:
    busy(near)
    wrong = near.enqueue("echo", {"customer": 17, "amount": "12,50"}, queue="billing")
    near.fail(
        near.dequeue(near.register(["billing"], 1), ["billing"])[0], Failure("ValueError", "not a number"), after=900
    )
    with Servers() as servers:
        url = servers.serve(API(Settings(), near))
        firefox.open(url)
        firefox.shows("Attempts per minute", "40 %", "retrying\n1\n")
        assert firefox.run("return matchMedia('(prefers-color-scheme: dark)').matches") is True
        assert firefox.run("return document.documentElement.scrollWidth <= innerWidth") is True
        firefox.type(".find input", "customer 17" + ENTER)
        firefox.shows("ValueError: not a number")
        firefox.click("td.name a")
        firefox.shows(wrong.id, "Delayed until", "for attempt 2 of 3, after ValueError: not a number")
        firefox.click("[data-key=replay]")
        firefox.run("document.querySelector('#replay').select()")
        firefox.type("#replay", '{"customer": 17, "amount": 12.5}')
        firefox.click("dialog button.main")
        firefox.shows("Replay of", '"amount": 12.5')
        firefox.open(url + "#/jobs?status=failed")
        firefox.shows("TimeoutError")
        firefox.click("[data-key='all retry']")
        firefox.shows("jobs match now")
        firefox.click("dialog button.main")
        firefox.shows("29 of 29 requeued", "Done")
        assert near.stats()["failed"] == 0


# What an operator does ------------------------------------------------------------------------------------------------


def test_banner_names_each_problem_and_its_next_step(open: Open, near: Queue) -> None:
    ghost = "g" * 100
    worker = near.register(["default"], 5)
    near.clock.ahead = -10_000
    near.enqueue("echo", 1, queue=ghost)
    near.clock.ahead = 0
    near.enqueue_many("echo", range(5), queue="default")
    for job in near.dequeue(worker, ["default"], 5):
        near.fail(job, Failure("Boom", "it broke"), after=3600)
    page = open("#/submit")
    problems = page.locator("#banner li")
    playwright.expect(problems.filter(has_text=f"queue {ghost} cannot start")).to_contain_text(
        re.compile("since .*s\\)")
    )
    page.get_by_role("button", name="Copy the command tinyqueue worker").click()
    shows(page, "Command copied.")
    assert page.evaluate("navigator.clipboard.readText()") == f"tinyqueue worker --queue {ghost}"
    said = page.locator("#announcement").text_content()
    for width in (360, 800):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    shown = page.locator("#banner").text_content()
    page.wait_for_function("shown => document.querySelector('#banner').textContent !== shown", arg=shown)
    assert page.locator("#announcement").text_content() == said  # not once more, because the problems are the same
    problems.filter(has_text="All of the 5 attempts of type echo failed").get_by_role("link").click()
    playwright.expect(page.locator("tbody tr")).to_have_count(5)
    playwright.expect(page.locator("tbody tr").first).to_contain_text("retrying")


def test_failures_are_grouped_over_all_jobs_and_retried_at_a_rate_until_stopped(open: Open, near: Queue) -> None:
    many_failed(near, 1100)
    put(near, "failed", queue="other", max_attempts=1)
    retrying = put(near, "processing", queue="third")
    near.fail(retrying, Failure("Timeout", "too slow"), after=3600)
    page = open("#/failures", api_keys=KEYS)
    sign_in(page, "admin-0123456789")
    shows(page, "1,101 failed, 1 retrying, by error")
    playwright.expect(page.locator("tr", has_text="Timeout")).to_contain_text("too slow")
    playwright.expect(page.locator("tr", has_text="Boom")).to_contain_text("1,101")
    page.get_by_role("button", name="Retry Boom of echo").click()
    shows(page, "1,101 jobs match now.")
    playwright.expect(page.get_by_label("Jobs a second")).to_have_value("10")
    page.get_by_label("At most").fill("500")
    page.get_by_role("button", name="Retry 1,101 jobs").click()
    task = page.get_by_role("region", name="Change of many jobs")
    playwright.expect(task).to_contain_text(re.compile("[1-9]0 of 500 requeued"))
    page.get_by_role("link", name="Overview").click()  # it goes on while the operator looks around
    shows(page, "Attempts per minute")
    playwright.expect(task).to_contain_text(re.compile("[2-9]0 of 500 requeued"))
    page.get_by_role("button", name="Stop").click()
    playwright.expect(task).to_contain_text("Stopped")
    requeued = near.stats()["pending"] - 1
    assert requeued in range(20, 100, 10)
    page.get_by_role("link", name="Audit").click()
    playwright.expect(page.locator("tbody tr")).to_have_count(1)
    playwright.expect(page.locator("tbody tr")).to_contain_text(re.compile(rf"admin ?retry.*Boom.*retried {requeued}"))
    page.get_by_role("button", name="Dismiss").click()
    lacks(page, "[data-key=task]")


def test_selected_jobs_are_changed_one_by_one(open: Open, near: Queue) -> None:
    failed = [put(near, "failed", queue=f"q{n}") for n in range(3)]
    delayed = put(near, "delayed")
    page = open("#/jobs")
    shows(page, delayed.id[-8:])
    page.get_by_label("select all on this page").check()
    shows(page, "4 selected")
    page.get_by_label(f"Select echo {failed[0].id[-8:]}").uncheck()
    page.get_by_role("button", name="Delete selected…").click()
    shows(page, "Delete 2 jobs?", "1 other selected job has a status that does not allow this.", "cannot be restored")
    page.get_by_role("button", name="Delete 2 jobs").click()
    shows(page, "2 of 2 deleted.", "Done")
    assert [job.id for job in near.page()[0]] == [delayed.id, failed[0].id]
    page.get_by_label(f"Select echo {delayed.id[-8:]}").check()
    page.get_by_role("button", name="Run now selected…").click()
    near.hasten(delayed.id)  # somebody else was faster
    page.locator("dialog").get_by_role("button", name="Run now 1 job").click()
    shows(page, "0 of 1", "1 skipped")
    playwright.expect(page.get_by_label("select all on this page")).not_to_be_checked()


def test_job_can_be_run_now_and_deleted(open: Open, near: Queue) -> None:
    job = put(near, "delayed")
    page = open(f"#/jobs/{job.id}")
    page.get_by_role("button", name="Run now").click()
    shows(page, "waiting for")
    assert not near.get(job.id).run_at  # type: ignore[union-attr]
    lacks(page, "button:text-is('Run now')")
    near.cancel(job.id)
    page.get_by_role("button", name="Delete…").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    shows(page, "Job deleted.", "Job not found")


def test_job_shows_each_attempt_and_where_a_handler_was_given_up(open: Open, near: Queue) -> None:
    job = near.enqueue("echo", 1, queue="default", max_attempts=3, tags=["march"])
    first, second = near.register(["default"], 1), near.register(["default"], 1)
    stack = "The handler did not stop. Its thread was given up here (most recent call last):\n  sleep(60)\n"
    near.fail(near.dequeue(first, ["default"])[0], Failure("TimedOut", "took longer than 1 s", stack), after=0)
    until(lambda: near.promote() or near.stats()["oldestWaitingMs"])
    near.fail(near.dequeue(second, ["default"])[0], Failure("Boom", "it broke"), after=3600)
    page = open(f"#/jobs/{job.id}")
    steps = page.locator(".line > li")
    playwright.expect(steps).to_contain_text(
        [
            "Submitted",
            re.compile(f"Attempt 1 started on {first}"),
            re.compile("Attempt failed.*TimedOut: took longer than 1 s", re.S),
            re.compile(f"Attempt 2 started on {second}"),
            re.compile("Attempt failed.*Boom: it broke", re.S),
            "Next attempt",
        ]
    )
    page.get_by_text("Where the handler was").click()
    shows(page, "sleep(60)", "retrying", "for attempt 3 of 3")
    page.locator("main").get_by_role("link", name="march").click()
    playwright.expect(page.locator("tbody tr")).to_have_count(1)
    assert page.url.endswith("#/jobs?tag=march")
    page.get_by_role("searchbox").fill("march")
    page.get_by_role("searchbox").press("Enter")
    page.get_by_role("link", name="the tag march").click()
    playwright.expect(page.locator("tbody tr")).to_have_count(1)
    page.get_by_role("searchbox").fill("shop = 3")
    page.get_by_role("searchbox").press("Enter")
    assert page.get_by_role("link", name='"shop":"3"').get_attribute("href") == "#/jobs?text=%22shop%22%3A%223%22"


def test_log_of_a_job_grows_while_it_runs_and_follows_its_end(open: Open, near: Queue) -> None:
    gates = [threading.Event() for _ in range(3)]

    @handler("import", logs=True)
    def import_file(payload: Any, job: Job) -> None:
        job.log("reading", payload)
        gates[0].wait(20)
        for line in range(100):
            job.log("line", line)
        gates[1].wait(20)
        logging.getLogger("shop").warning("line 17 is empty")
        gates[2].wait(20)

    job = near.enqueue("import", "<b>a file</b>")
    page = open(f"#/jobs/{job.id}")
    log = page.locator("pre.log")
    end = "box => box.scrollHeight - box.scrollTop - box.clientHeight"
    with working(near):
        playwright.expect(log).to_contain_text("reading <b>a file</b>")
        gates[0].set()
        playwright.expect(log).to_contain_text("line 99")
        assert log.evaluate(end) <= 1
        log.evaluate("box => box.scrollTop = 0")  # somebody reads the beginning
        gates[1].set()
        playwright.expect(log).to_contain_text("WARNING line 17 is empty")
        assert log.evaluate("box => box.scrollTop") == 0
        gates[2].set()
        shows(page, "completed", "102 lines")


def test_worker_is_made_quiet_and_takes_jobs_again(open: Open, near: Queue) -> None:
    near.register(["default"], 2)
    page = open()
    page.get_by_role("button", name="Quiet worker").click()
    shows(page, "quiet: takes no more jobs")
    assert near.workers()[0]["quiet"]
    page.get_by_role("button", name="Resume worker").click()
    page.get_by_role("button", name="Quiet worker").wait_for()
    assert not near.workers()[0]["quiet"]


def test_overview_follows_the_events_of_the_server_and_polls_without_them(open: Open, near: Queue) -> None:
    """The clock of the page stands still, so only events can change it."""
    page = open(fake_time=True)
    shows(page, "No jobs yet")
    near.enqueue("echo", 1)
    playwright.expect(tile(page, "pending")).to_have_text("1")
    page.route("**/events", lambda route: route.fulfill(status=404, json={"detail": "this server sends no events"}))
    page.reload()
    shows(page, "Attempts per minute")
    near.enqueue("echo", 2)
    with page.expect_response("**/stats?*"):
        page.clock.run_for(2500)
    playwright.expect(tile(page, "pending")).to_have_text("2")


# Somebody who has never seen it, with a keyboard on a phone -----------------------------------------------------------


def tab_to(page: Any, role: str, name: str | re.Pattern[str]) -> Any:
    """Press Tab until the element has the focus, which must be visible then."""
    wanted = page.get_by_role(role, name=name).first
    wanted.wait_for()
    for _ in range(80):
        page.keyboard.press("Tab")
        if wanted.evaluate("element => element === document.activeElement"):
            assert wanted.evaluate("element => getComputedStyle(element).outlineStyle") != "none"
            return wanted
    raise AssertionError(f"Tab does not reach the {role} {name}")


BILLED = """
from tinyqueue import handler

@handler("send-invoice", max_attempts=25)
def send_invoice(payload: dict[str, object]) -> str:
    return f"sent {payload['amount'] + 0.5}"
"""


def test_keyboard_alone_finds_explains_corrects_and_repeats_a_job(
    start_redis: Callable[..., RedisServer], start: Any, folder: Path, browser: Any
) -> None:
    (folder / "handlers.py").write_text(BILLED)
    look = {"viewport": PHONE, "color_scheme": "dark", "reduced_motion": "reduce"}
    page = browser.new_page(**CONTEXT | look)
    page.set_default_timeout(10_000)
    stage = Stage(start_redis("--appendonly", "yes"), start, page)
    for customer in range(1, 40):
        amount = "12,50" if customer == 17 else 12.5
        stage.submit(type="send-invoice", payload={"customer": customer, "amount": amount}, tags=["march"])
    until(lambda: stage.queue.stats()["retrying"] == 1)
    page.keyboard.press("/")
    page.keyboard.type("customer 17")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("tbody tr")).to_have_count(1)
    tab_to(page, "link", "send-invoice")
    page.keyboard.press("Enter")
    shows(page, "Delayed until", "It waits", "TypeError", '"amount": "12,50"')
    tab_to(page, "button", "Edit and run again…")
    page.keyboard.press("Enter")
    playwright.expect(page.get_by_label("Payload", exact=True)).to_be_focused()
    page.keyboard.press("Control+A")
    page.keyboard.type('{"customer": 17, "amount": ')
    tab_to(page, "button", "Run as a new job")
    page.keyboard.press("Enter")
    shows(page, "is not valid JSON")
    playwright.expect(page.get_by_label("Payload", exact=True)).to_be_focused()
    page.keyboard.press("Control+End")
    page.keyboard.type("12.5}")
    tab_to(page, "button", "Run as a new job")
    page.keyboard.press("Enter")
    shows(page, "completed", '"sent 13.0"', "Replay of", "march")
    playwright.expect(page.get_by_role("heading", name="send-invoice")).to_be_focused()
    tab_to(page, "link", re.compile(r"^[0-9a-f-]{36}$"))
    page.keyboard.press("Enter")
    shows(page, "cancelled", '"amount": "12,50"')
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.close()
    stage.queue.disconnect()


# Six incidents, played against real processes -------------------------------------------------------------------------

IN_TIME = 5.0  # seconds from when a cause can be known until the page shows it, without a click
OPERATED = """
import ctypes
from tinyqueue import handler

@handler("echo")
def echo(payload: object) -> object:
    return payload

@handler("charge", max_attempts=25)
def charge(payload: object) -> None:
    raise ConnectionError("the bank is closed")

@handler("import", timeout=1)
def import_file(payload: object) -> None:
    ctypes.CDLL(None).sleep(60)  # nothing interrupts C code that does not look
"""


class Stage:
    """A Redis, a web process, a worker of the queue default, and the dashboard of a healthy queue."""

    def __init__(self, redis: RedisServer, start: Callable[..., Any], page: Any) -> None:
        self.redis = redis
        self.start = start
        self.page = page
        self.queue = Queue.from_url(redis.url)
        self.web = start(ROOT / "wsgi.py", kind=Web, REDIS_URL=redis.url)
        self.worker = self.work("default")
        page.goto(f"http://localhost:{self.web.port}/")
        shows(page, "All is well")

    def work(self, *queues: str) -> Process:
        options = [option for name in queues for option in ("--queue", name)]
        worker: Process = self.start(ROOT / "worker.py", *options, REDIS_URL=self.redis.url, TINYQUEUE_LEASE="2")
        until(lambda: registered(self.queue, worker))
        return worker

    def submit(self, **job: Any) -> tuple[int, Any]:
        status, answer = self.web.call("POST", "/jobs", {"payload": None} | job)
        return status, answer


def all_fail_with_retries_left(stage: Stage) -> str:
    for _ in range(3):
        stage.submit(type="charge")
    until(lambda: stage.queue.stats()["retrying"] == 3)
    return r"attempts of type charge failed .*ConnectionError"


def stuck_handler(stage: Stage) -> str:
    stage.submit(type="import")
    until(lambda: any(worker["givenUp"] for worker in stage.queue.workers()))
    return r"1 handler was given up .*import"


def frozen_worker(stage: Stage) -> str:
    stage.work("default")  # another one, which reaps the first
    stage.worker.signal(SIGSTOP)
    until(lambda: not registered(stage.queue, stage.worker))
    return r"[Ww]orker .* (has sent no heartbeat|lost)"


def redis_down(stage: Stage) -> str:
    stage.redis.kill()
    return r"Redis does not answer.*Connection refused"


def redis_full(stage: Stage) -> str:
    raw(stage.queue).config_set("maxmemory", "1mb")
    status, _ = stage.submit(type="echo")
    assert status == 503
    return r"memory"


def no_worker_for_a_queue(stage: Stage) -> str:
    stage.submit(type="echo", queue="mial")
    until(lambda: stage.queue.stats()["oldestWaitingMs"] >= 3000)  # until then one may just start
    return r"queue mial cannot start, because no live worker serves it"


INCIDENTS = [
    all_fail_with_retries_left,
    stuck_handler,
    frozen_worker,
    redis_down,
    redis_full,
    no_worker_for_a_queue,
]


@pytest.mark.parametrize("incident", INCIDENTS, ids=lambda incident: incident.__name__.replace("_", " "))
def test_cause_of_an_incident_is_shown_in_time_without_a_click(
    incident: Callable[[Stage], str],
    start_redis: Callable[..., RedisServer],
    start: Any,
    folder: Path,
    browser: Any,
) -> None:
    (folder / "handlers.py").write_text(OPERATED)
    page = browser.new_page(**CONTEXT)
    stage = Stage(start_redis("--appendonly", "yes"), start, page)
    cause = re.compile(incident(stage), re.S)
    known = time.monotonic()
    playwright.expect(page.locator("#banner")).to_contain_text(cause, timeout=1000 * IN_TIME)
    print(f"{incident.__name__:28} {time.monotonic() - known:4.1f} s, 0 clicks")
    page.close()
    stage.queue.disconnect()
