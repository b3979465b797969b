"""The handlers of handlers.py: e-mail to an SMTP server, thumbnails of images, exported files."""

from __future__ import annotations

import base64
import csv
import json
import os
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from handlers import ExportData, ProcessImage, SendEmail, export_data, process_image, send_email
from tinyqueue import HANDLERS, Discard, InvalidJob, Job, Queue, Retry, TimedOut
from tinyqueue_config import Settings
from worker import Worker

ROOT = Path(__file__).parent.parent
ID = "01900000-0000-7000-8000-000000000001"
HELLO = SendEmail("user@example.com", "Hello", "Hi")


def job(id: str = ID) -> Job:
    """Make a job as a handler gets it, without a queue, so its progress is not saved."""
    return Job(id, "test", None, "processing", attempts=1)


def files(folder: Path) -> list[str]:
    """List all files in a folder, including temporary ones."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty directory. Register the three handlers; unset their variables."""
    for declared in (send_email, process_image, export_data):
        monkeypatch.setitem(HANDLERS, declared.type, declared)
    for name in ("SMTP_URL", "SMTP_FROM", "MEDIA_DIR", "EXPORT_DIR"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# All handlers ---------------------------------------------------------------------------------------------------------


def test_run_all_handlers_in_a_worker_completes_their_jobs(here: Path) -> None:
    Path("media").mkdir()
    Image.new("RGB", (8, 8)).save("media/photo.png")
    queue = Queue.embedded()
    jobs = [
        queue.enqueue("send-email", {"to": "user@example.com", "subject": "Hello", "body": "Hi"}),
        process_image.enqueue(queue, ProcessImage("photo.png")),
        export_data.enqueue(queue, ExportData([{"a": 1}])),
    ]

    assert Worker(queue, Settings(), burst=True).run() == 0

    done = [found for job in jobs if (found := queue.get(job.id))]
    assert [(job.status, job.attempts) for job in done] == [("completed", 1)] * 3
    size = (here / "media/photo.png.320x320.jpeg").stat().st_size
    assert [job.result for job in done] == [
        {"sent": False, "messageId": f"<{jobs[0].id}@localhost>", "note": "SMTP_URL is not set"},
        {"path": "photo.png.320x320.jpeg", "width": 8, "height": 8, "bytes": size},
        {"path": f"{jobs[2].id}.csv", "rows": 1, "bytes": 6},
    ]
    assert done[2].progress == 1.0


def test_import_handlers_without_side_effects(here: Path) -> None:
    script = "import sys, handlers; sys.exit('PIL' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert files(here) == []


@pytest.mark.parametrize(
    ("type", "payload", "path"),
    [
        ("send-email", {"to": "user", "subject": "Hello", "body": "Hi"}, "$.to"),
        ("send-email", {"to": "user@example.com\n", "subject": "Hello", "body": "Hi"}, "$.to"),
        ("send-email", {"to": "user@example.com\r\nBcc: all@example.com", "subject": "Hello", "body": "Hi"}, "$.to"),
        ("send-email", {"to": "user@example.com, all@example.com", "subject": "Hello", "body": "Hi"}, "$.to"),
        ("send-email", {"to": "All <user@example.com>", "subject": "Hello", "body": "Hi"}, "$.to"),
        ("send-email", {"to": "user@example.com", "subject": "Hello\nBcc: all@example.com", "body": "Hi"}, "$.subject"),
        ("send-email", {"to": "user@example.com", "subject": "Hello\n", "body": "Hi"}, "$.subject"),
        ("send-email", {"to": "user@example.com", "subject": "Hello\u2028", "body": "Hi"}, "$.subject"),
        ("send-email", {"to": "user@example.com", "subject": "Hello", "body": "Hi", "cc": "all@example.com"}, "$"),
        ("process-image", {"path": "photo.png", "width": 0}, "$.width"),
        ("process-image", {"path": "photo.png", "format": "gif"}, "$.format"),
        ("process-image", {"path": "photo.png\x00"}, "$.path"),
        ("export-data", {"rows": [{"a": 1}, {"a": [1]}]}, "$.rows[1][...]"),
        ("export-data", {"rows": [], "format": "xlsx"}, "$.format"),
        ("export-data", {"rows": [], "name": "a\nb"}, "$.name"),
    ],
)
def test_submit_an_invalid_payload_is_refused(type: str, payload: Any, path: str) -> None:
    queue = Queue.embedded()
    with pytest.raises(InvalidJob) as refusal:
        queue.enqueue(type, payload)
    assert (refusal.value.field, refusal.value.path) == ("payload", path)
    assert queue.stats()["pending"] == 0


# send-email -----------------------------------------------------------------------------------------------------------


class Delivery(NamedTuple):
    sender: str
    recipients: list[str]
    message: EmailMessage
    encrypted: bool
    login: str


class MailServer(socketserver.ThreadingTCPServer):
    """Speaks a little SMTP. `answers` maps a verb to a fixed answer; an empty one hangs up."""

    daemon_threads = True

    def __init__(self, tls: ssl.SSLContext | None = None, implicit_tls: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Session)
        self.port = self.server_address[1]
        self.tls, self.implicit_tls = tls, implicit_tls
        self.answers: dict[str, str] = {}
        self.deliveries: list[Delivery] = []
        self.verbs: list[str] = []
        self.errors: list[BaseException | None] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(error := sys.exception(), ConnectionError):  # a client may close the connection at any time
            self.errors.append(error)


class Session(socketserver.StreamRequestHandler):
    server: MailServer
    login = ""
    encrypted = False

    def handle(self) -> None:
        if self.server.implicit_tls:
            self.encrypt()
        self.reply("220 mail.example.com")
        while line := self.rfile.readline():
            verb, _, rest = line.decode().strip().partition(" ")
            self.server.verbs.append(verb := verb.upper())
            if verb not in self.server.answers:
                getattr(self, verb.lower())(rest)
            elif answer := self.server.answers[verb]:
                self.reply(answer)
            else:
                return

    def reply(self, *lines: str) -> None:
        self.wfile.write("".join(f"{line}\r\n" for line in lines).encode())

    def encrypt(self) -> None:
        assert self.server.tls
        try:
            self.request = self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        except OSError as error:  # the client does not trust the certificate
            raise ConnectionAbortedError from error
        self.rfile.close()
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)
        self.encrypted = True

    def finish(self) -> None:
        super().finish()
        self.connection.close()

    def ehlo(self, rest: str) -> None:
        offers = ["250-STARTTLS"] if self.server.tls and not self.encrypted else []
        self.reply("250-mail.example.com", *offers, "250 AUTH PLAIN")

    def starttls(self, rest: str) -> None:
        self.reply("220 ready")
        self.encrypt()

    def auth(self, rest: str) -> None:
        self.login = base64.b64decode(rest.removeprefix("PLAIN ")).decode().replace("\0", ":").removeprefix(":")
        self.reply("235 welcome")

    def mail(self, rest: str) -> None:
        self.sender, self.recipients = rest.partition("<")[2].partition(">")[0], list[str]()
        self.reply("250 ok")

    def rcpt(self, rest: str) -> None:
        self.recipients.append(rest.partition("<")[2].partition(">")[0])
        self.reply("250 ok")

    def data(self, rest: str) -> None:
        self.reply("354 ready")
        text = b""
        while (line := self.rfile.readline()) not in (b".\r\n", b""):
            assert line.isascii()
            text += line.removeprefix(b".")
        message = message_from_bytes(text, EmailMessage, policy=policy.default)
        self.server.deliveries.append(Delivery(self.sender, self.recipients, message, self.encrypted, self.login))
        self.reply("250 accepted")

    def rset(self, rest: str) -> None:
        self.reply("250 ok")

    def quit(self, rest: str) -> None:
        self.reply("221 bye")


def serve(server: MailServer) -> Iterator[MailServer]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    assert server.errors == []


@pytest.fixture
def mail(monkeypatch: pytest.MonkeyPatch) -> Iterator[MailServer]:
    """Run a mail server without encryption and set SMTP_URL to it."""
    server = MailServer()
    monkeypatch.setenv("SMTP_URL", f"smtp://127.0.0.1:{server.port}")
    yield from serve(server)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a file with a key and an untrusted certificate for 127.0.0.1."""
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=test -addext subjectAltName=IP:127.0.0.1 -keyout - -out -"
    )
    try:
        path.write_bytes(subprocess.run(command.split(), capture_output=True, check=True).stdout)
    except FileNotFoundError:
        pytest.skip("needs openssl to make a certificate")
    return path


@pytest.fixture(params=["smtp", "smtps"])
def tls_mail(
    request: pytest.FixtureRequest, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MailServer]:
    """Run a mail server with STARTTLS or implicit TLS; set SMTP_URL to it, with a password."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = MailServer(context, implicit_tls=request.param == "smtps")
    monkeypatch.setenv("SMTP_URL", f"{request.param}://me%40example.com:p%2Fw@127.0.0.1:{server.port}")
    yield from serve(server)


def test_send_email_without_a_server_logs_all_but_the_body(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    receipt = send_email(SendEmail("user@example.com", "Hello", "the secret"), job())
    assert not receipt.sent
    assert "user@example.com" in caplog.text
    assert ID in caplog.text
    assert "the secret" not in caplog.text


@pytest.mark.parametrize("body", ["Hi\n", "Grüße\n", ".\n.. and so on\n\nFrom me\n", "long " * 100 + "\n"])
def test_send_email_delivers_the_message_unchanged(mail: MailServer, body: str) -> None:
    receipt = send_email(SendEmail("user+tag@example.com", "Grüße an alle " * 20, body), job())
    (delivery,) = mail.deliveries
    assert receipt.sent
    assert delivery.recipients == ["user+tag@example.com"]
    assert delivery.message["To"] == "user+tag@example.com"
    words = delivery.message["Subject"].split()  # because Python 3.13.0 adds a space when it folds the line
    assert words == ["Grüße", "an", "alle"] * 20
    assert delivery.message.get_content().replace("\r\n", "\n") == body
    assert delivery.message["Message-ID"] == receipt.message_id
    assert delivery.message["Date"].datetime.tzinfo
    assert (delivery.sender, delivery.login) == ("tinyqueue@localhost", "")


def test_send_email_repeats_the_same_message_id(mail: MailServer) -> None:
    receipts = [send_email(HELLO, job()), send_email(HELLO, job()), send_email(HELLO, job(ID.replace("1", "2")))]
    first, again, other = [delivery.message["Message-ID"] for delivery in mail.deliveries]
    assert first == again != other
    assert [first, again, other] == [receipt.message_id for receipt in receipts]


def test_send_email_with_a_configured_sender_uses_it(mail: MailServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMTP_FROM", "The Shop <shop@example.com>")
    send_email(HELLO, job())
    (delivery,) = mail.deliveries
    assert delivery.sender == "shop@example.com"
    assert delivery.message["From"] == "The Shop <shop@example.com>"
    assert delivery.message["Message-ID"] == f"<{ID}@example.com>"


def test_send_email_to_an_encrypted_server_logs_in(
    tls_mail: MailServer, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    send_email(HELLO, job())
    (delivery,) = tls_mail.deliveries
    assert delivery.encrypted
    assert (delivery.sender, delivery.login) == ("me@example.com", "me@example.com:p/w")


def test_send_email_to_an_untrusted_server_sends_no_password(tls_mail: MailServer) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        send_email(HELLO, job())
    assert "AUTH" not in tls_mail.verbs
    assert tls_mail.deliveries == []


def test_send_email_to_an_unencrypted_server_sends_no_password(
    mail: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "SMTP_URL", f"smtp://me:secret@127.1:{mail.port}"
    )  # this machine, but not by a name that shows it
    with pytest.raises(RuntimeError, match="no encryption") as error:
        send_email(HELLO, job())
    assert "secret" not in str(error.value)
    assert "AUTH" not in mail.verbs
    assert mail.deliveries == []


def test_send_email_to_this_machine_logs_in_without_encryption(
    mail: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMTP_URL", f"smtp://me:p%40ss@127.0.0.1:{mail.port}")
    send_email(HELLO, job())
    assert mail.deliveries[0].login == "me:p@ss"


def test_send_email_after_a_permanent_refusal_is_discarded(mail: MailServer) -> None:
    mail.answers["RCPT"] = "550 no such user"
    with pytest.raises(Discard, match=r"^user@example\.com was refused: 550 no such user$"):
        send_email(HELLO, job())


def test_send_email_after_a_temporary_refusal_is_retried(mail: MailServer) -> None:
    mail.answers["RCPT"] = "451 come back later"
    with pytest.raises(Retry, match="451 come back later") as retry:
        send_email(HELLO, job())
    assert retry.value.after == 300


@pytest.mark.parametrize(
    ("verb", "answer"),
    [("EHLO", ""), ("AUTH", "535 wrong"), ("MAIL", "421 busy"), ("RCPT", ""), ("DATA", "452 full"), ("DATA", "")],
)
def test_send_email_to_a_failing_server_fails_the_attempt(
    mail: MailServer, monkeypatch: pytest.MonkeyPatch, verb: str, answer: str
) -> None:
    monkeypatch.setenv("SMTP_URL", f"smtp://me:secret@127.0.0.1:{mail.port}")
    mail.answers[verb] = answer
    with pytest.raises(OSError) as error:  # noqa: PT011 - the base of all errors of smtplib
        send_email(HELLO, job())
    assert "secret" not in str(error.value)
    assert mail.deliveries == []


def test_send_email_to_a_closed_port_fails_the_attempt(mail: MailServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMTP_URL", "smtp://127.0.0.1:1")
    with pytest.raises(ConnectionRefusedError):
        send_email(HELLO, job())


@pytest.mark.parametrize("answer", ["", "500 what?"])
def test_send_email_with_a_failing_goodbye_succeeds(mail: MailServer, answer: str) -> None:
    mail.answers["QUIT"] = answer
    assert send_email(HELLO, job()).sent
    assert len(mail.deliveries) == 1


@pytest.mark.parametrize(
    "url",
    [
        "smtp://me:secret/x@host",
        "smtp://me:secret#@host:25",
        "smtp://me:secret\u2100@host",
        "http://me:secret@host",
        "host:25",
    ],
)
def test_send_email_with_an_invalid_url_does_not_show_the_password(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("SMTP_URL", url)
    with pytest.raises(RuntimeError, match="SMTP_URL must be") as error:
        send_email(HELLO, job())
    assert "secret" not in str(error.value)
    assert error.value.__context__ is None


def test_send_email_with_an_unchecked_payload_adds_no_header(mail: MailServer) -> None:
    with pytest.raises(ValueError, match="linefeed"):
        send_email(SendEmail("user@example.com", "Hello\nBcc: all@example.com", "Hi"), job())
    assert mail.deliveries == []


# process-image --------------------------------------------------------------------------------------------------------


@pytest.fixture
def media(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the folder of images, and one image outside of it."""
    folder = tmp_path / "media"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    monkeypatch.setenv("MEDIA_DIR", str(folder))
    return folder


def png_of(width: int, height: int) -> bytes:
    """Make a PNG that claims a size and contains no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )


@pytest.mark.parametrize(
    ("format", "width", "height", "size"),
    [
        ("jpeg", 100, 100, (100, 50)),
        ("png", 320, 10, (20, 10)),
        ("webp", 1, 1, (1, 1)),
        ("jpeg", 2000, 2000, (400, 200)),
    ],
)
def test_process_image_makes_a_thumbnail_that_fits(
    media: Path, format: str, width: int, height: int, size: tuple[int, int]
) -> None:
    (media / "sub").mkdir()
    Image.new("RGB", (400, 200), "blue").save(media / "sub/photo.jpg")
    before = (media / "sub/photo.jpg").read_bytes()

    made = process_image(ProcessImage("sub/photo.jpg", width, height, format))  # type: ignore[arg-type]

    assert made.path == f"sub/photo.jpg.{width}x{height}.{format}"
    assert (made.width, made.height) == size
    assert made.bytes == (media / made.path).stat().st_size
    with Image.open(media / made.path) as image:
        assert image.format == format.upper()
        assert image.size == size
        assert image.convert("RGB").getpixel((0, 0))[2] > 200  # type: ignore[index]
    assert (media / "sub/photo.jpg").read_bytes() == before
    assert len(files(media)) == 2


def test_process_image_turns_a_photo_upright_and_removes_its_metadata(media: Path) -> None:
    photo = Image.new("RGB", (400, 200), "blue")
    photo.paste("red", (0, 0, 200, 200))  # the left half, which becomes the top
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a camera"
    photo.save(media / "photo.jpg", exif=exif)

    made = process_image(ProcessImage("photo.jpg", 100, 50))

    assert (made.width, made.height) == (25, 50)
    with Image.open(media / made.path) as image:
        assert not image.getexif()
        top, bottom = image.getpixel((12, 5)), image.getpixel((12, 45))
    assert top[0] > 200 > bottom[0]  # type: ignore[index]
    assert bottom[2] > 200 > top[2]  # type: ignore[index]


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("1", "png"), ("L", "png"), ("LA", "png"), ("P", "gif"), ("RGBA", "webp"), ("CMYK", "jpg")],
)
def test_process_image_accepts_every_pixel_format(media: Path, mode: str, suffix: str, format: str) -> None:
    Image.new(mode, (400, 200)).save(media / f"photo.{suffix}")
    made = process_image(ProcessImage(f"photo.{suffix}", 100, 100, format))  # type: ignore[arg-type]
    assert (made.width, made.height) == (100, 50)


def test_process_image_to_jpeg_makes_transparent_pixels_white(media: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(media / "photo.png")
    made = process_image(ProcessImage("photo.png"))
    with Image.open(media / made.path) as image:
        assert image.getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["png", "webp"])
def test_process_image_to_png_or_webp_keeps_transparency(media: Path, format: str) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(media / "photo.png")
    made = process_image(ProcessImage("photo.png", format=format))  # type: ignore[arg-type]
    with Image.open(media / made.path) as image:
        assert image.convert("RGBA").getpixel((4, 4))[3] == 0  # type: ignore[index]


def test_process_image_repeated_writes_the_same_file(media: Path) -> None:
    Image.new("RGB", (8, 8)).save(media / "photo.png")
    assert process_image(ProcessImage("photo.png")) == process_image(ProcessImage("photo.png"))
    assert files(media) == ["photo.png", "photo.png.320x320.jpeg"]


def test_process_image_follows_a_link_that_stays_inside(media: Path) -> None:
    Image.new("RGB", (8, 8)).save(media / "photo.png")
    (media / "link.png").symlink_to("photo.png")
    assert process_image(ProcessImage("link.png")).path == "photo.png.320x320.jpeg"


@pytest.mark.parametrize(
    "path", ["../outside.png", "sub/../../outside.png", "{tmp}/outside.png", "link.png", "folder/outside.png"]
)
def test_process_image_outside_the_folder_is_discarded(media: Path, tmp_path: Path, path: str) -> None:
    (media / "link.png").symlink_to(tmp_path / "outside.png")
    (media / "folder").symlink_to(tmp_path)
    before = files(tmp_path)
    with pytest.raises(Discard, match="not inside the folder"):
        process_image(ProcessImage(path.format(tmp=tmp_path)))
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "path", ["nothing.png", "folder", "pipe.png", "text.png", "half.png", "drawing.eps", "old.bmp"]
)
def test_process_image_of_another_file_is_discarded(media: Path, path: str) -> None:
    (media / "folder").mkdir()
    os.mkfifo(media / "pipe.png")  # reading it would block forever
    (media / "text.png").write_text("not an image")
    Image.effect_noise((64, 64), 50).save(media / "half.png")
    (media / "half.png").write_bytes((media / "half.png").read_bytes()[:1000])
    Image.new("RGB", (8, 8)).save(media / "drawing.eps")  # Pillow would run Ghostscript on it
    Image.new("RGB", (8, 8)).save(media / "old.bmp")
    before = files(media)
    with pytest.raises(Discard, match=path):
        process_image(ProcessImage(path))
    assert files(media) == before


@pytest.mark.parametrize("size", [(10_000, 5_001), (12_000, 12_000), (60_000, 60_000)])
def test_process_image_of_a_decompression_bomb_is_discarded(media: Path, size: tuple[int, int]) -> None:
    (media / "bomb.png").write_bytes(png_of(*size))
    with pytest.raises(Discard, match="DecompressionBomb"):
        process_image(ProcessImage("bomb.png"))


def test_process_image_without_pillow_says_what_to_install(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(Discard, match=r"pip install '\.\[images\]'"):
        process_image(ProcessImage("photo.png"))


def test_process_image_that_cannot_write_leaves_no_file(media: Path) -> None:
    Image.new("RGB", (8, 8)).save(media / "photo.png")
    (media / "photo.png.320x320.jpeg").mkdir()
    with pytest.raises(IsADirectoryError):
        process_image(ProcessImage("photo.png"))
    assert files(media) == ["photo.png"]


# export-data ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set the folder of exports, which does not exist yet."""
    monkeypatch.setenv("EXPORT_DIR", str(tmp_path / "exports"))
    return tmp_path / "exports"


def table(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_export_data_as_csv_has_a_column_for_each_key(exports: Path) -> None:
    made = export_data(ExportData([{"b": 1, "a": "x,\n'ü"}, {"c": None, "b": -2.5}, {}]), job())
    assert made.path == f"{ID}.csv"
    assert made.rows == 3
    assert made.bytes == (exports / made.path).stat().st_size
    assert table(exports / made.path) == [["b", "a", "c"], ["1", "x,\n'ü", ""], ["-2.5", "", ""], ["", "", ""]]


def test_export_data_as_json_lines_writes_the_rows_unchanged(exports: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": "=1+1\n\u2028ü", "b": -5}, {"c": None, "d": True, "e": 0.1, "f": 2**70}, {}]
    made = export_data(ExportData(rows, "jsonl"), job())
    assert made.path == f"{ID}.jsonl"
    assert [json.loads(line) for line in (exports / made.path).read_bytes().splitlines()] == rows


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_export_data_without_rows_writes_an_empty_file(exports: Path, format: str) -> None:
    made = export_data(ExportData([], format), job())  # type: ignore[arg-type]
    assert (made.rows, made.bytes) == (0, 0)
    assert (exports / made.path).read_bytes() == b""


def test_export_data_as_csv_with_too_many_cells_is_discarded(exports: Path) -> None:
    rows = [{f"key {number}": 1} for number in range(1001)]
    with pytest.raises(Discard, match="1001 rows with 1001 columns have more than 1000000 cells; use jsonl"):
        export_data(ExportData(rows), job())
    assert not exports.exists() or files(exports) == []
    assert export_data(ExportData(rows, "jsonl"), job()).bytes < 20_000
    assert export_data(ExportData(rows[:1000]), job()).rows == 1000


@pytest.mark.parametrize("text", ['=HYPERLINK("http://evil")', "+1", "-5", "@SUM(A1)", "\t=1", "\r=1"])
def test_export_data_as_csv_quotes_formulas(exports: Path, text: str) -> None:
    made = export_data(ExportData([{text: text, "n": -5, "plain": "1=1"}]), job())
    assert table(exports / made.path) == [["'" + text, "n", "plain"], ["'" + text, "-5", "1=1"]]


def test_export_data_repeated_writes_the_same_file(exports: Path) -> None:
    assert export_data(ExportData([{"a": 1}]), job()) == export_data(ExportData([{"a": 1}]), job())
    assert files(exports) == [f"{ID}.csv"]


def test_export_data_with_a_name_replaces_the_existing_file(exports: Path) -> None:
    export_data(ExportData([{"a": 1}, {"a": 2}], name="2026/report.txt"), job())
    made = export_data(ExportData([{"a": 3}], name="2026/report.txt"), job(ID.replace("1", "2")))
    assert made.path == "2026/report.txt"
    assert files(exports) == ["2026/report.txt"]
    assert table(exports / made.path) == [["a"], ["3"]]


def test_export_data_writes_a_file_with_default_permissions(exports: Path) -> None:
    made = export_data(ExportData([]), job())
    umask = os.umask(0)
    os.umask(umask)
    assert (exports / made.path).stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize(
    "name", ["../out.csv", "a/../../out.csv", "{tmp}/out.csv", "link.csv", "folder/out.csv", ".", "a/.."]
)
def test_export_data_outside_the_folder_is_discarded(exports: Path, tmp_path: Path, name: str) -> None:
    exports.mkdir()
    (exports / "link.csv").symlink_to(tmp_path / "out.csv")
    (exports / "folder").symlink_to(tmp_path)
    before = files(tmp_path)
    with pytest.raises(Discard, match="not inside the folder"):
        export_data(ExportData([{"a": 1}], name=name.format(tmp=tmp_path)), job())
    assert files(tmp_path) == before


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_export_data_with_an_invalid_row_leaves_no_file(exports: Path, format: str) -> None:
    rows: list[dict[str, Any]] = [{"a": "fine"}, {"a": "\ud800"}]
    with pytest.raises(UnicodeEncodeError):
        export_data(ExportData(rows, format), job())  # type: ignore[arg-type]
    assert files(exports) == []


@pytest.mark.parametrize("error", [TimedOut, RuntimeError])
def test_export_data_interrupted_keeps_the_existing_file(exports: Path, error: type[BaseException]) -> None:
    class Interrupted(Job):
        def set_progress(self, done: float, of: float = 1.0) -> None:
            if done > 1:
                raise error

    export_data(ExportData([{"a": 1}], name="report.csv"), job())
    with pytest.raises(error):
        export_data(ExportData([{"a": 2}, {"a": 3}], name="report.csv"), Interrupted(ID, "test", None))
    assert files(exports) == ["report.csv"]
    assert table(exports / "report.csv") == [["a"], ["1"]]


def test_export_data_run_in_parallel_writes_one_whole_file(exports: Path) -> None:
    data = ExportData([{"a": n} for n in range(1000)])
    threads = [threading.Thread(target=export_data, args=(data, job())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files(exports) == [f"{ID}.csv"]
    assert len(table(exports / f"{ID}.csv")) == 1001
