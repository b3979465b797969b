"""The dashboard as an operator needs it: with a keyboard, a screen reader, a phone, and in Firefox."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import newest
from firefox import FIREFOX, Firefox
from test_dashboard import (  # the fixtures among them are used by name
    KEYS,
    Open,
    Servers,
    browser,  # noqa: F401
    busy,
    handlers,  # noqa: F401
    open,  # noqa: F401
    shows,
    sign_in,
)

from tinyqueue import Queue
from tinyqueue_config import Settings
from wsgi import API

AXE = "axe-core@^4.11"
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1400, "height": 900}


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The script of axe-core, which finds what keeps people from using a page."""
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
    open: Open,  # noqa: F811
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
    failed = next(job for job in newest(near, "failed") if job.error and job.error.traceback)
    views = {
        "#/": "Attempts per minute",
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
    page.goto(page.url.partition("#")[0] + "#/jobs?status=failed")
    page.get_by_role("button", name="Retry all matching jobs").click()
    shows(page, "jobs match now")
    check_with_axe(page, "a dialog")


@pytest.fixture
def firefox(tmp_path: Path) -> Iterator[Firefox]:
    """Firefox as wide as a phone, on a system with a dark theme and without motion."""
    if not FIREFOX:
        pytest.skip("firefox-esr is not on PATH: THE DASHBOARD IS NOT TESTED IN FIREFOX")
    with Firefox(tmp_path, **{"ui.systemUsesDarkTheme": 1, "ui.prefersReducedMotion": 1}) as firefox:
        firefox.resize(**PHONE)
        yield firefox
        assert firefox.errors() == []


def test_dashboard_works_in_firefox(near: Queue, firefox: Firefox) -> None:
    jobs = busy(near)
    with Servers() as servers:
        url = servers.serve(API(Settings(), near))
        firefox.open(url)
        firefox.shows("Attempts per minute", "40 %")
        assert firefox.run("return matchMedia('(prefers-color-scheme: dark)').matches") is True
        assert firefox.run("return document.documentElement.scrollWidth <= innerWidth") is True
        firefox.type(".find input", jobs["trace"].id)
        firefox.shows(jobs["trace"].id, "Payload")
        firefox.open(url + "#/jobs?status=failed")
        firefox.shows("TimeoutError")
        firefox.click("[data-key='all retry']")
        firefox.shows("jobs match now")
        firefox.click("dialog button.main")
        firefox.shows("Done")
        assert near.stats()["failed"] == 0
