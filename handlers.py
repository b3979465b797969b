"""Your handlers: the functions that run jobs. Three real ones to start from: keep them, change them, add your own.

    curl localhost:3000/jobs -H 'content-type: application/json' \\
         -d '{"type": "send-email", "payload": {"to": "user@example.com", "subject": "Hello", "body": "Hi"}}'

The payload arrives as the type that annotates the first parameter: JSON is checked against it when the job is submitted and again
before it runs. A second parameter annotated `Job` receives the job. `send_email.enqueue(queue, SendEmail(...))` submits one from
Python, and mypy refuses any other payload. What becomes of the job is the handler's to say:

    return value             completed; the value, as JSON, is the result
    any exception            this attempt failed; another follows after a pause that doubles, until none is left
    raise Retry(after=60)    the same, but the pause is 60 seconds
    raise Discard("why")     failed at once: for what no repetition will mend
    job.set_progress(3, 10)  going on; whoever asks is shown 30 %

It has a thread of its own, in a process that it shares: lock what others use as well. Past its `timeout`, TimedOut is raised in it
at its next line of Python; a call that waits for a network notices nothing and needs a time-out of its own.

It may run twice, for a worker can die after the work and before the note of it. Make the repeat harmless: mark the effect with
job.id, the same in every attempt (send-email); or write under another name, then rename (the other two); or ask before you act,
as in: has this card been charged for job.id?

Environment of these three, read when a job runs:

    SMTP_URL     smtp://user:password@host:587 or smtps://host:465, special characters percent-encoded; without it nothing is sent
    SMTP_FROM    the sender of e-mail; without it the user of SMTP_URL
    MEDIA_DIR    the folder of images; without it ./media
    EXPORT_DIR   the folder of exports; without it ./exports
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

# Constraints are part of a type: whoever breaks one is told when submitting the job. An address with a line break in it, for
# one, would begin another header. A dataclass serves as a payload, too, but a Struct can refuse unknown fields: typing errors.
Address = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._%+'-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*\Z", max_length=254)]
OneLine = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f\x85\u2028\u2029]*\Z", max_length=500)]


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
    """Send a plain-text e-mail. A mail server cannot be asked what it has sent, so a repeat carries the same Message-ID."""
    url = _smtp_url()
    sender = os.environ.get("SMTP_FROM") or unquote((url and url.username) or "tinyqueue@localhost")
    address = parseaddr(sender)[1]
    message_id = f"<{job.id}@{address.rpartition('@')[2]}>"
    message = EmailMessage(policy=SMTP)
    message["From"], message["To"], message["Subject"] = sender, email.to, email.subject
    message["Date"], message["Message-ID"] = datetime.now(UTC), message_id
    message.set_content(email.body, cte="quoted-printable")  # which servers that know only ASCII take as well
    if not url:
        log.info("job %s: the e-mail to %s is not sent, for SMTP_URL is not set", job.id, email.to)
        return Receipt(sent=False, message_id=message_id, note="SMTP_URL is not set")
    try:
        with _mail_server(url) as server:
            server.sendmail(address, [email.to], message.as_bytes())
    except smtplib.SMTPRecipientsRefused as refusal:
        code, answer = refusal.recipients[email.to]
        reason = f"{email.to} is refused: {code} {answer.decode(errors='replace')}"
        if code >= 500:  # nobody of that name
            raise Discard(reason) from None
        raise Retry(reason, after=300) from None  # a full mailbox, or a server that lets strangers wait some minutes
    return Receipt(sent=True, message_id=message_id)


def _smtp_url() -> SplitResult | None:
    with suppress(ValueError):  # whose text may show a part of the password
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
    """Connect and log in. smtps:// encrypts all, smtp:// what follows if the server offers it; passwords never go in the clear."""
    context, host, encrypted = ssl.create_default_context(), url.hostname or "", url.scheme == "smtps"
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
                raise RuntimeError(f"{host} offers no encryption: the password is not sent")
            server.login(unquote(url.username), unquote(url.password or ""))
        yield server
        with suppress(OSError):  # the message is accepted: a goodbye that fails must not send it again
            server.quit()
    finally:
        server.close()


# process-image --------------------------------------------------------------------------------------------------------

MAX_PIXELS = 50_000_000  # some 200 MB when unpacked; a file of a few kilobytes may claim far more
FORMATS = ("GIF", "JPEG", "PNG", "WEBP")  # Pillow reads many more, with parsers that are seldom used and often attacked


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
    """Make a thumbnail that fits into width x height, beside the image. Photos are turned upright."""
    try:
        from PIL import ExifTags, Image, ImageOps  # here and not above: whoever needs no thumbnails need not install it
    except ImportError:
        raise Discard("thumbnails need Pillow: pip install '.[images]'") from None
    folder = _folder("MEDIA_DIR", "media")
    source = _inside(folder, task.path)
    if not source.is_file():
        raise Discard(f"{task.path}: there is no such file in MEDIA_DIR")
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
            ImageOps.exif_transpose(image, in_place=True)  # last: a small image is turned with a fraction of the memory
            if image.mode == "RGBA" and task.format == "jpeg":  # which knows no transparency
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            image.save(encoded, task.format)
        except Exception as error:  # Pillow raises a dozen kinds; whichever it is, the file will be no better next time
            raise Discard(f"{task.path} cannot be read as an image: {type(error).__name__}") from error
    target = source.with_name(f"{source.name}.{task.width}x{task.height}.{task.format}")
    with _replacing(target) as temporary:
        temporary.write_bytes(encoded.getbuffer())
    return Thumbnail(str(target.relative_to(folder)), *image.size, bytes=target.stat().st_size)


# export-data ----------------------------------------------------------------------------------------------------------

Cell = str | int | float | bool | None


class ExportData(Struct, forbid_unknown_fields=True):
    rows: list[dict[str, Cell]]
    format: Literal["csv", "jsonl"] = "csv"
    name: OneLine = ""  # inside EXPORT_DIR, replaced if it is there; without it, named after the job


class Export(Struct):
    path: str  # inside EXPORT_DIR
    rows: int
    bytes: int


@handler("export-data", max_attempts=3, timeout=300)
def export_data(data: ExportData, job: Job) -> Export:
    """Write rows to a file as CSV, with a column for each key in the order of appearance, or as JSON, one row a line."""
    folder = _folder("EXPORT_DIR", "exports")
    target = _inside(folder, data.name or f"{job.id}.{data.format}")
    columns = list(dict.fromkeys(key for row in data.rows for key in row))
    with _replacing(target) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        if data.format == "csv" and columns:
            table.writerow([_harmless(column) for column in columns])
        for done, row in enumerate(data.rows, start=1):
            if data.format == "csv":
                table.writerow([_harmless(row.get(column)) for column in columns])
            else:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            job.set_progress(done, of=len(data.rows))
    return Export(str(target.relative_to(folder)), len(data.rows), target.stat().st_size)


def _harmless(cell: Cell) -> Cell:
    """Keep a spreadsheet from running a text as a formula, which may send other cells away. Numbers are none: -5 stays -5."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


# Files: what the last two share ---------------------------------------------------------------------------------------


def _folder(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or default).resolve()


def _inside(folder: Path, name: str) -> Path:
    """Find a client's file in a folder. Links and .. are followed before it is checked that they lead nowhere else."""
    path = (folder / name).resolve()
    if path == folder or not path.is_relative_to(folder):
        raise Discard(f"{name!r} is not inside the folder")
    return path


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Lend a temporary name in the same folder, then rename: whoever reads `path` sees the old file or the new, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
