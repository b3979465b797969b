"""Your handlers: the functions that run jobs. These three are working examples to build on.

    curl localhost:3000/jobs -H 'content-type: application/json' \\
         -d '{"type": "send-email", "payload": {"to": "user@example.com", "subject": "Hello", "body": "Hi"}}'

The first parameter of a handler receives the payload. Its annotation is the type of the payload:
the JSON is checked against it when the job is submitted, and again before the job runs. A second
parameter annotated `Job` receives the job. `send_email.enqueue(queue, SendEmail(...))` submits a
job from Python, and mypy checks that payload. The handler decides the outcome of the job:

    return value             the job is completed; its result is the value, as JSON
    any exception            the attempt failed; the next one follows after a delay that doubles
                             each time, until no attempts are left
    raise Retry(after=60)    the same, but the next attempt follows after 60 seconds
    raise Discard("why")     the job fails at once; use it for errors that a retry cannot fix
    job.set_progress(3, 10)  the job shows a progress of 30 % while it runs on

A handler runs in one of several threads of a process. Use a lock for anything that handlers share.
Each attempt has its own context variables. Values in threading.local() stay for the next job of the
thread, so set them at the start of a handler. The job that a handler receives is its own copy.
Processes that a handler forks have the default signal handlers.

When a handler exceeds its `timeout`, TimedOut is raised in it at its next line of Python. A call
that waits for the network does not notice that, so give it a timeout of its own. Calls of the queue
are not interrupted: TimedOut is raised when they return.

A job can run twice, because a worker can die after the work and before its outcome is saved. Make
the second run harmless. Mark the effect with job.id, which is the same in every attempt
(send-email). Or write to a temporary file and rename it (the other two). Or check before you act:
has this card been charged for job.id?

Environment of these handlers, read when a job runs:

    SMTP_URL     smtp://user:password@host:587 or smtps://host:465, special characters
                 percent-encoded; unset: no e-mail is sent
    SMTP_FROM    the sender of e-mails; unset: the user in SMTP_URL, or tinyqueue@localhost
    MEDIA_DIR    the folder of images; unset: ./media
    EXPORT_DIR   the folder of exports; unset: ./exports
"""

import csv
import json
import logging
import os
import secrets
import smtplib
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import parseaddr
from io import BytesIO
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import SplitResult, unquote, urlsplit

from msgspec import Meta, Struct

from tinyqueue import Discard, Job, Retry, handler

log = logging.getLogger(__name__)

# The types include constraints, so a submit with an invalid payload is refused. Without them, an
# address with a line break could add a header to the e-mail. A dataclass can be a payload type too,
# but only a Struct can refuse unknown fields, which are often misspelled. The error for a text that
# breaks a pattern has the description in place of the pattern.
Address = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9._%+'-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*\Z",
        max_length=254,
        description="must be one e-mail address, such as user@example.com",
    ),
]
OneLine = Annotated[
    str,
    Meta(
        pattern=r"^[^\x00-\x1f\x7f\x85\u2028\u2029]*\Z",
        max_length=500,
        description="must be one line without control characters",
    ),
]


# send-email -----------------------------------------------------------------------------------------------------------


class SendEmail(Struct, forbid_unknown_fields=True):
    to: Address
    subject: OneLine
    body: str


class Receipt(Struct, rename="camel", omit_defaults=True):
    sent: bool
    message_id: str
    note: str = ""


@handler("send-email", max_attempts=3, timeout=120)
def send_email(email: SendEmail, job: Job) -> Receipt:
    """Send a plain-text e-mail.

    A mail server cannot be asked whether it has sent an e-mail already, so every attempt uses the
    same Message-ID.
    """
    url = _smtp_url()
    sender = os.environ.get("SMTP_FROM") or unquote((url and url.username) or "tinyqueue@localhost")
    address = parseaddr(sender)[1]
    message_id = f"<{job.id}@{address.rpartition('@')[2]}>"
    message = EmailMessage(policy=SMTP)
    message["From"] = sender
    message["To"] = email.to
    message["Subject"] = email.subject
    message["Date"] = datetime.now(UTC)
    message["Message-ID"] = message_id
    message.set_content(email.body, cte="quoted-printable")  # some servers accept only ASCII
    if not url:
        log.info("job %s: e-mail to %s not sent because SMTP_URL is not set", job.id, email.to)
        return Receipt(sent=False, message_id=message_id, note="SMTP_URL is not set")
    try:
        with _mail_server(url) as server:
            server.sendmail(address, [email.to], message.as_bytes())
    except smtplib.SMTPRecipientsRefused as refusal:
        code, answer = refusal.recipients[email.to]
        reason = f"{email.to} was refused: {code} {answer.decode(errors='replace')}"
        if code >= 500:  # a permanent error, such as an unknown mailbox
            raise Discard(reason) from None
        raise Retry(reason, after=300) from None  # such as a full mailbox, or greylisting
    return Receipt(sent=True, message_id=message_id)


def _smtp_url() -> SplitResult | None:
    with suppress(ValueError):  # its text may contain a part of the password
        url = urlsplit(os.environ.get("SMTP_URL", ""))
        if not url.geturl():
            return None
        if url.scheme in ("smtp", "smtps") and url.hostname and url.port != 0:
            return url
    raise RuntimeError(
        "SMTP_URL must be smtp://user:password@host:587 or smtps://host:465, special characters percent-encoded"
    )


@contextmanager
def _mail_server(url: SplitResult) -> Iterator[smtplib.SMTP]:
    """Connect to a mail server and log in.

    smtps:// encrypts the whole connection, smtp:// only if the server offers STARTTLS.
    Refuses to send a password to another machine without encryption.
    """
    context = ssl.create_default_context()
    host = url.hostname or ""
    encrypted = url.scheme == "smtps"
    if encrypted:
        server: smtplib.SMTP = smtplib.SMTP_SSL(host, url.port or 465, timeout=30, context=context)
    else:
        server = smtplib.SMTP(host, url.port or 587, timeout=30)
    try:
        server.ehlo()
        if not encrypted and server.has_extn("starttls"):
            server.starttls(context=context)
            encrypted = True
        if url.username:
            if not encrypted and host not in ("localhost", "127.0.0.1", "::1"):
                raise RuntimeError(f"{host} offers no encryption, so the password was not sent; use smtps://")
            server.login(unquote(url.username), unquote(url.password or ""))
        yield server
        with suppress(OSError):  # the message was accepted, so an error here must not cause a retry
            server.quit()
    finally:
        server.close()


# process-image --------------------------------------------------------------------------------------------------------

MAX_PIXELS = 50_000_000  # about 200 MB of memory; a file of a few kilobytes can claim far more
FORMATS = ("GIF", "JPEG", "PNG", "WEBP")  # Pillow's other parsers are rarely used and often attacked


class ProcessImage(Struct, forbid_unknown_fields=True):
    path: OneLine  # inside MEDIA_DIR
    width: Annotated[int, Meta(ge=1, le=2000)] = 320
    height: Annotated[int, Meta(ge=1, le=2000)] = 320
    format: Literal["jpeg", "png", "webp"] = "jpeg"


class Thumbnail(Struct):
    path: str  # inside MEDIA_DIR
    width: int
    height: int
    bytes: int


@handler("process-image", max_attempts=2, timeout=60)
def process_image(task: ProcessImage) -> Thumbnail:
    """Write a thumbnail that fits into width x height next to the image. Turns photos upright."""
    try:
        from PIL import ExifTags, Image, ImageOps  # here, because Pillow is optional
    except ImportError:
        raise Discard("thumbnails need Pillow; install it with: pip install '.[images]'") from None
    folder = _folder("MEDIA_DIR", "media")
    source = _path_inside(folder, task.path)
    if not source.is_file():
        raise Discard(f"{task.path}: no such file in MEDIA_DIR")
    encoded = BytesIO()
    with source.open("rb") as file:
        try:
            image: Image.Image = Image.open(file, formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"more than {MAX_PIXELS} pixels")
            sideways = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            if image.mode != "RGB":
                image = image.convert("RGBA")
            image.thumbnail((task.height, task.width) if sideways else (task.width, task.height))
            ImageOps.exif_transpose(image, in_place=True)  # last, because a small image takes less memory to turn
            if image.mode == "RGBA" and task.format == "jpeg":  # JPEG has no transparency
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            image.save(encoded, task.format)
        except Exception as error:  # Pillow raises many kinds; a retry would fail in the same way
            raise Discard(f"{task.path} cannot be read as an image: {type(error).__name__}") from error
    target = source.with_name(f"{source.name}.{task.width}x{task.height}.{task.format}")
    with _replacing(target) as temporary:
        temporary.write_bytes(encoded.getbuffer())
    return Thumbnail(str(target.relative_to(folder)), *image.size, bytes=target.stat().st_size)


# export-data ----------------------------------------------------------------------------------------------------------

Cell = str | int | float | bool | None
MAX_CELLS = 1_000_000  # of a CSV, whose rows have a cell for every column, also for those that a client left out


class ExportData(Struct, forbid_unknown_fields=True):
    rows: list[dict[str, Cell]]
    format: Literal["csv", "jsonl"] = "csv"
    name: OneLine = ""  # inside EXPORT_DIR, replacing an existing file; empty: named after the job


class Export(Struct):
    path: str  # inside EXPORT_DIR
    rows: int
    bytes: int


@handler("export-data", max_attempts=3, timeout=300)
def export_data(data: ExportData, job: Job) -> Export:
    """Write rows to a file, as CSV or as one JSON object a line.

    The CSV has a column for each key, in the order in which the keys first appear.
    """
    folder = _folder("EXPORT_DIR", "exports")
    target = _path_inside(folder, data.name or f"{job.id}.{data.format}")
    columns = list(dict.fromkeys(key for row in data.rows for key in row))
    if data.format == "csv" and len(columns) * len(data.rows) > MAX_CELLS:
        size = f"{len(data.rows)} rows with {len(columns)} columns"
        raise Discard(f"{size} have more than {MAX_CELLS} cells; use jsonl, or fewer different keys")
    with _replacing(target) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        if data.format == "csv" and columns:
            table.writerow([_quote_formula(column) for column in columns])
        for done, row in enumerate(data.rows, start=1):
            if data.format == "csv":
                table.writerow([_quote_formula(row.get(column)) for column in columns])
            else:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            job.set_progress(done, of=len(data.rows))
    return Export(str(target.relative_to(folder)), len(data.rows), target.stat().st_size)


def _quote_formula(cell: Cell) -> Cell:
    """Quote text that a spreadsheet would run as a formula, which could leak other cells."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


# Files ----------------------------------------------------------------------------------------------------------------


def _folder(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or default).resolve()


def _path_inside(folder: Path, name: str) -> Path:
    """Resolve a client's path. Refuses one that leads out of the folder, by a link or by `..`."""
    path = (folder / name).resolve()
    if path == folder or not path.is_relative_to(folder):
        raise Discard(f"{name!r} is not inside the folder")
    return path


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, and rename it to `path` at the end: readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
