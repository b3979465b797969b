"""mypy refuses a payload of the wrong type before anything runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# A comment in a line says what mypy must report there. It must report nothing in other lines.
PROGRAM = """
from dataclasses import dataclass

from handlers import ProcessImage, SendEmail, send_email
from tinyqueue import Job, Queue, handler


@dataclass
class Greet:
    name: str


@dataclass
class Greeting:
    text: str


@handler("greet", timeout=None)
def greet(payload: Greet) -> Greeting:
    return Greeting(f"Hello {payload.name}")


def use(queue: Queue, job: Job, email: SendEmail, image: ProcessImage) -> None:
    send_email.enqueue(queue, email)
    send_email.enqueue(queue, email, delay=60, max_attempts=5)
    send_email.enqueue(queue, image)  # error: arg-type
    send_email.enqueue(queue, {"to": "user@example.com", "subject": "Hello", "body": "Hi"})  # error: arg-type
    greet.enqueue(queue, Greet("you"))
    greet.enqueue(queue, email)  # error: arg-type

    reveal_type(send_email.enqueue(queue, email))  # note: tinyqueue_job.Job
    reveal_type(send_email(email, job))  # note: handlers.Receipt
    reveal_type(send_email(email, job=job))  # note: handlers.Receipt
    reveal_type(greet(Greet("you")))  # note: program.Greeting
    send_email(image, job)  # error: arg-type
    send_email(email, email)  # error: arg-type
    send_email(email)  # error: call-arg
    greet(Greet("you"), job)  # error: call-arg


@handler("greet", timeout="soon")  # error: arg-type
def hello(payload: Greet) -> None: ...


@handler("greet")  # error: arg-type
def nothing() -> None: ...
"""


def test_mypy_checks_handlers_and_their_payloads(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        "--follow-imports=silent",
        "--hide-error-context",
    ]
    command += [f"--cache-dir={tmp_path / 'cache'}", program.name]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )

    lines = enumerate(PROGRAM.splitlines(), start=1)
    expected = {
        (number, *match.groups()) for number, line in lines if (match := re.search(r"# (error|note): (.+)", line))
    }
    found = set()
    for line in done.stdout.splitlines()[:-1]:
        if error := re.fullmatch(r"program\.py:(\d+): error: .* \[([a-z-]+)\]", line):
            found.add((int(error[1]), "error", error[2]))
        elif note := re.fullmatch(r'program\.py:(\d+): note: Revealed type is "(.+)"', line):
            found.add((int(note[1]), "note", note[2]))
    assert found == expected, done.stdout + done.stderr
