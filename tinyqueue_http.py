"""Requests that workers send: deliveries to the callbackUrls of jobs, and HTTP jobs.

`send` is the only function that opens a connection. It signs each request as Standard Webhooks
specifies. `webhook-id` is the id of the job of type `webhook` or `http`, the same in every attempt.
The secrets are read from TINYQUEUE_WEBHOOK_SECRETS when a request is sent, and are never stored.
With two secrets, a request has two signatures, and a receiver needs only one of the secrets.

A client chooses the URL, so a request must not reach what only this machine can reach. `send`
resolves the name once, checks all its addresses, and connects to an address that it has checked.
The certificate must be valid for the name, and `Host` has the name. Redirects are not followed, and
proxy settings in the environment are ignored. TINYQUEUE_HTTP_ALLOW lists the networks that are
allowed anyway.

A request takes at most SECONDS, from looking up the name to the end of the answer.

`register` makes the types `http` and `webhook` known to a process that runs or accepts jobs.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import io
import ipaddress
import logging
import os
import random
import re
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, cast

import msgspec
from msgspec import Meta, Raw, Struct

from tinyqueue import HANDLERS, MAX_RESULT, Discard, Job, RateLimited, Retry, __version__, backoff, handler
from tinyqueue_handler import check_url, host_of
from tinyqueue_job import DELIVERIES, URL, URL_LENGTH, URL_RULE
from tinyqueue_json import encode

SECONDS = 15.0  # that a request may take in all
CONNECT = 5.0  # seconds to resolve a name, to connect to one address, and for its TLS handshake
KEPT = 500  # bytes of an answer that the traceback of an error shows to admins
WAITS = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)  # seconds after each failed attempt
JITTER = 0.2  # share by which a wait may be longer, to spread deliveries that failed together
LONGEST_WAIT = 86_400  # seconds of a Retry-After that are honoured
ATTEMPTS = 5  # of an http job, unless its submit says otherwise
BACKOFF = 5.0  # seconds after its first failed attempt
AT_ONCE = 2  # deliveries to one receiver at a time, which is how many slots a hanging receiver can block
FAILURES = 5  # in a row, after which a receiver gets one delivery every PAUSE seconds
PAUSE = 60.0
RECEIVERS = 10_000  # whose failures a process remembers at most
RESERVED = {"host", "connection", "content-length", "transfer-encoding", "te", "trailer", "upgrade", "expect"}
RESERVED |= {"accept-encoding", "user-agent"}
INTERIM = re.compile(rb"\A(HTTP/1\.[0-9] )1(?!01)[0-9]{2}\b")  # a status such as 103, before that of the answer

log = logging.getLogger("tinyqueue.worker")


# Errors ---------------------------------------------------------------------------------------------------------------


class Forbidden(Discard):
    """The URL leads to an address that is not public and not in TINYQUEUE_HTTP_ALLOW."""


class Unsigned(Retry):
    """This process has no secret to sign with."""


class NoAnswer(Retry):
    """There was no connection, or no whole answer in time."""


class BadAnswer(Retry):
    """The answer is a failure for which another attempt may help."""


class Refused(Discard):
    """The answer is a failure for which no other attempt will help."""


class CircuitOpen(RateLimited):
    """The receiver has failed FAILURES times in a row. Nothing was sent; another try follows."""


# Settings -------------------------------------------------------------------------------------------------------------


def read_secrets(text: str) -> list[bytes]:
    """Read the value of TINYQUEUE_WEBHOOK_SECRETS. Raises ValueError with the rule."""
    secrets = []
    for part in filter(None, text.split(",")):
        encoded = part.strip().removeprefix("whsec_")
        try:
            secret = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
        except ValueError:
            secret = b""
        if not part.strip().startswith("whsec_") or not 24 <= len(secret) <= 64:
            raise ValueError("each secret must be whsec_ and the Base64 of 24 to 64 bytes")
        secrets.append(secret)
    if len(secrets) > 2:
        raise ValueError("there must be at most two secrets")
    return secrets


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def read_networks(text: str) -> list[Network]:
    """Read the value of TINYQUEUE_HTTP_ALLOW. Raises ValueError with the rule."""
    try:
        return [ipaddress.ip_network(part.strip()) for part in filter(None, text.split(","))]
    except ValueError:  # its text may repeat a secret from the wrong variable
        raise ValueError("each must be a network such as 10.1.0.0/16, with no bits set after the prefix") from None


def sign(id: str, body: bytes, secrets: Sequence[bytes]) -> dict[str, str]:
    """Return the headers of Standard Webhooks, with a signature for each secret."""
    at = int(time.time())
    signed = f"{id}.{at}.".encode() + body
    digests = (hmac.digest(secret, signed, hashlib.sha256) for secret in secrets)
    signatures = " ".join("v1," + base64.b64encode(digest).decode() for digest in digests)
    return {"webhook-id": id, "webhook-timestamp": str(at), "webhook-signature": signatures}


# Addresses ------------------------------------------------------------------------------------------------------------

GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # everything else in IPv6 is special, mapped or not assigned
# Networks that `is_global` lets through, or that are too important to depend on Python's version.
SPECIAL = [
    ipaddress.ip_network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
        *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        *("2001::/23", "2001:db8::/32", "2002::/16", "3ffe::/16", "3fff::/20"),
    )
]


def may_connect(address: str, allowed: Sequence[Network]) -> bool:
    """Whether a request may go to an address: it is public, or in one of these networks."""
    ip = ipaddress.ip_address(address)
    if any(ip in network for network in allowed):
        return True
    if ip.version == 6 and ip not in GLOBAL_UNICAST:
        return False
    return ip.is_global and not any(ip in network for network in SPECIAL)


class Target(NamedTuple):
    """Where a URL leads. `host` is without brackets and without a dot at the end."""

    tls: bool
    host: str
    port: int
    path: str
    header: str  # the value of Host

    @classmethod
    def of(cls, url: str) -> Target:
        parts = URL.fullmatch(check_url("url", url))
        assert parts  # check_url raises InvalidJob otherwise
        tls = parts["scheme"].lower() == "https"
        own = 443 if tls else 80
        port = int(parts["port"] or own)
        target = parts["target"] or "/"
        path = target if target.startswith("/") else "/" + target
        host = parts["host"].rstrip(".")
        return cls(tls, host.strip("[]"), port, path, host if port == own else f"{host}:{port}")


Place = tuple[int, Any]  # the family of an address, and the address as sockets take it


def resolve(target: Target, seconds: float) -> list[Place]:
    """Return the addresses of a host. Raises NoAnswer if there are none in time.

    Runs the resolver in a thread, because a resolver that waits for its servers cannot be stopped.
    """
    found: list[Any] = []

    def look_up() -> None:
        try:
            found.append(socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.append(error)

    thread = threading.Thread(target=look_up, name="resolver", daemon=True)
    thread.start()
    thread.join(seconds)
    if not found or isinstance(found[0], Exception):
        why = "not found in time" if not found else "unknown host"
        raise NoAnswer(f"{target.host}: {why}; check the name, and the resolver of this worker")
    return [(family, place) for family, _, _, _, place in found[0]]


def check_places(target: Target, places: Sequence[Place], allowed: Sequence[Network]) -> None:
    """Raise Forbidden unless requests may go to all these addresses. Its text names none."""
    if not all(may_connect(place[0].partition("%")[0], allowed) for _, place in places):
        todo = "if requests may go there, add its network to TINYQUEUE_HTTP_ALLOW"
        raise Forbidden(f"{target.host} has an address that is not public; {todo}")


# Sending --------------------------------------------------------------------------------------------------------------


class Outgoing(NamedTuple):
    """A request before it is signed."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes


class Answer(NamedTuple):
    """The status, the headers and the beginning of an answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def send(job: Job, request: Outgoing, most: int) -> Answer:
    """Sign a request, send it and return its answer, with up to `most` bytes of its body.

    Raises Forbidden, Unsigned or NoAnswer.
    """
    secrets = read_secrets(os.environ.get("TINYQUEUE_WEBHOOK_SECRETS", ""))
    if not secrets:
        raise Unsigned("this worker cannot sign requests; set TINYQUEUE_WEBHOOK_SECRETS and restart it", after=60)
    allowed = read_networks(os.environ.get("TINYQUEUE_HTTP_ALLOW", ""))
    until = time.monotonic() + SECONDS
    target = Target.of(request.url)
    places = resolve(target, CONNECT)
    check_places(target, places, allowed)
    own = {"Host": target.header, "User-Agent": f"TinyQueue/{__version__}", "Accept-Encoding": "identity"}
    own |= {"Connection": "close", "Content-Length": str(len(request.body))} | sign(job.id, request.body, secrets)
    request = request._replace(headers={**request.headers, **own})
    with closing(_connect(target, places, until)) as sock, _ending(sock, until) as ended:
        try:
            answer = _exchange(sock, target, request, most)
        except _errors() as error:
            if ended.is_set() or isinstance(error, TimeoutError):
                raise NoAnswer(f"{target.host} did not finish its answer within {SECONDS:.0f} s") from None
            if _is_no_http(error):
                todo = "check the scheme and the port of the URL"
                raise NoAnswer(f"{target.host} did not answer with valid HTTP; {todo}") from None
            raise NoAnswer(f"{target.host} closed the connection before the end of its answer") from None
        if ended.is_set():  # an answer without a length seems to end there
            raise NoAnswer(f"{target.host} did not finish its answer within {SECONDS:.0f} s")
        return answer


def _errors() -> tuple[type[Exception], ...]:
    from urllib3.exceptions import HTTPError

    return OSError, http.client.HTTPException, HTTPError, ValueError


def _is_no_http(error: Exception) -> bool:
    """Whether an answer is not HTTP. Otherwise its end is missing."""
    from urllib3.exceptions import InvalidHeader

    cut = http.client.IncompleteRead, http.client.RemoteDisconnected
    return isinstance(error, (http.client.HTTPException, InvalidHeader)) and not isinstance(error, cut)


def _connect(target: Target, places: Sequence[Place], until: float) -> socket.socket:
    """Connect to the first of these addresses that accepts, with TLS for https."""
    why = "no address"
    for family, place in places:
        # The connection and the handshake may each take that long.
        seconds = min(CONNECT, (until - time.monotonic()) / 2)
        if seconds <= 0:
            break
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(seconds)
            sock.connect(place)
            return tls_context().wrap_socket(sock, server_hostname=target.host) if target.tls else sock
        except OSError as error:
            sock.close()
            why = "the connection was not made in time" if isinstance(error, TimeoutError) else _reason(error)
    raise NoAnswer(f"{target.host}: {why}")


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or 'no handshake'}"
    return (os.strerror(error.errno) if error.errno else "no connection").lower()


@cache
def tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()


@contextmanager
def _ending(sock: socket.socket, until: float) -> Iterator[threading.Event]:
    """End a connection at that time, even while bytes arrive. The event says that it was ended."""
    ended = threading.Event()

    def end() -> None:
        ended.set()
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, until - time.monotonic()), end)
    timer.daemon = True
    timer.start()
    try:
        yield ended
    finally:
        timer.cancel()


def _exchange(sock: socket.socket, target: Target, request: Outgoing, most: int) -> Answer:
    from urllib3.connection import HTTPConnection  # slow to import, and many processes send nothing

    connection = HTTPConnection(target.host, target.port, timeout=SECONDS)
    watched = Watched(sock)
    connection.sock = cast(socket.socket, watched)
    options = {"preload_content": False, "decode_content": False}
    with closing(connection):
        with suppress(BrokenPipeError):  # it may have answered before it has read all
            connection.request(request.method, target.path, request.body or None, request.headers, **options)
        response = connection.getresponse()
        if not watched.headers_ended():
            raise http.client.IncompleteRead(b"")
        body = b""
        while len(body) < most and (part := response.read(most - len(body), decode_content=False)):
            body += part
        return Answer(response.status, response.headers, body)


class Lines(io.BufferedReader):
    """A reader that knows the last line that was read as one."""

    last = b""

    def readline(self, size: int | None = -1, /) -> bytes:
        self.last = super().readline(size)
        return INTERIM.sub(rb"\g<1>100", self.last)  # http.client takes all but 100 for the answer


class Watched:
    """A socket that knows whether the headers of an answer are complete.

    http.client takes the end of the connection for the end of the headers. But an answer that was
    cut off is no outcome, even if its status was read.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lines: Lines | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def makefile(self, mode: str) -> Lines:
        self._lines = Lines(self._sock.makefile("rb", buffering=0))
        return self._lines

    def headers_ended(self) -> bool:
        return self._lines is not None and self._lines.last in (b"\r\n", b"\n")


def _note(error: Exception, answer: Answer) -> Exception:
    """Add the beginning of an answer to the traceback, which the API shows only to admins."""
    if answer.body:
        error.add_note(f"the answer began with: {answer.body[:KEPT].decode('utf-8', 'backslashreplace')}")
    return error


def asked_wait(answer: Answer) -> float:
    """Return the seconds that the Retry-After of a 429 or 503 asks for: 0 to LONGEST_WAIT."""
    text = answer.headers.get("Retry-After", "").strip() if answer.status in (429, 503) else ""
    if re.fullmatch("[0-9]{1,9}", text):
        return min(float(text), LONGEST_WAIT)
    with suppress(ValueError, TypeError, OverflowError):
        return min(max(0.0, parsedate_to_datetime(text).timestamp() - time.time()), LONGEST_WAIT)
    return 0.0


def _redirected(answer: Answer) -> str:
    return "; redirects are not followed" if 300 <= answer.status < 400 else ""


# Circuits -------------------------------------------------------------------------------------------------------------


class Circuits:
    """The receivers that have failed FAILURES times in a row. They get a try every PAUSE seconds.

    Each process counts failures for itself, which costs no command. CircuitOpen then halts the
    limit of the receiver, so all processes hold its deliveries back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock  # in seconds
        self._lock = threading.Lock()
        self._failed: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how often, and when the pause ends

    def check(self, host: str) -> float:
        """Return the seconds until the next try. 0: now, and the caller must make this try."""
        now = self._clock()
        with self._lock:
            failures, until = self._failed.get(host, (0, 0.0))
            if failures >= FAILURES and now >= until:
                self._failed[host] = (failures, now + PAUSE)
        return max(0.0, until - now) if failures >= FAILURES else 0.0

    def note(self, host: str, failed: bool) -> None:
        """Note whether a try has failed."""
        with self._lock:
            failures, _ = self._failed.pop(host, (0, 0.0))
            if failed:
                self._failed[host] = (failures + 1, self._clock() + PAUSE)
            while len(self._failed) > RECEIVERS:
                self._failed.popitem(last=False)
        if failed and failures + 1 == FAILURES:
            log.warning("receiver %s failed %d times in a row; it gets one delivery every %d s", host, FAILURES, PAUSE)
        elif failures >= FAILURES and not failed:
            log.warning("receiver %s answers again", host)


CIRCUITS = Circuits()


# Deliveries -----------------------------------------------------------------------------------------------------------

# Without group names: the pattern is in /openapi.json, and languages write group names differently.
URL_PATTERN = "^" + re.sub(r"\?P<\w+>", "", URL.pattern) + r"\Z"
Url = Annotated[str, Meta(pattern=URL_PATTERN, max_length=URL_LENGTH, description=URL_RULE)]


class Delivery(Struct):
    url: Url
    event: Raw
    host: str = ""  # that of the URL


class Delivered(Struct):
    status: int


def deliver(delivery: Delivery, job: Job) -> Delivered:
    """Send the end of a job to its callbackUrl."""
    wait = WAITS[min(job.attempts, len(WAITS)) - 1] * random.uniform(1, 1 + JITTER)
    host = host_of(delivery.url)
    if left := CIRCUITS.check(host):
        text = f"{host} has failed {FAILURES} times in a row; it gets one delivery every {PAUSE:.0f} s"
        raise CircuitOpen(text, after=left)
    try:
        request = Outgoing("POST", delivery.url, {"Content-Type": "application/json"}, bytes(delivery.event))
        answer = send(job, request, KEPT)
    except (NoAnswer, Unsigned) as error:
        if isinstance(error, NoAnswer):
            CIRCUITS.note(host, failed=True)
        error.after = wait
        raise
    CIRCUITS.note(host, failed=answer.status >= 500)
    if 200 <= answer.status < 300:
        return Delivered(answer.status)
    if answer.status == 410:
        raise _note(Refused(f"{host} answered 410: it wants no more deliveries"), answer)
    text = f"{host} answered {answer.status}{_redirected(answer)}"
    raise _note(BadAnswer(text, after=max(wait, asked_wait(answer))), answer)


# HTTP jobs ------------------------------------------------------------------------------------------------------------

HeaderName = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}\Z", description="must be the name of an HTTP header")
]
HeaderValue = Annotated[
    str,
    Meta(pattern=r"^[ -~]{0,4000}\Z", description="must be printable ASCII of up to 4000 characters"),
]


class Request(Struct, forbid_unknown_fields=True):
    url: Url
    method: Literal["POST", "PUT", "PATCH", "DELETE", "GET"] = "POST"
    headers: dict[HeaderName, HeaderValue] = {}
    body: Any = None

    def __post_init__(self) -> None:
        for name in self.headers:
            if name.lower() in RESERVED or name.lower().startswith("webhook-"):
                raise ValueError(f"the header {name} is set by TinyQueue; leave it out")


def run_request(request: Request, job: Job) -> Any:
    """Send a request to an application. The body of its answer is the result of the job."""
    if request.body is None:
        body, kind = b"", {}
    elif isinstance(request.body, str):
        body, kind = request.body.encode(), {"Content-Type": "text/plain; charset=utf-8"}
    else:
        body, kind = encode(request.body), {"Content-Type": "application/json"}
    given = {name.lower() for name in request.headers}
    headers = request.headers | {name: value for name, value in kind.items() if name.lower() not in given}
    answer = send(job, Outgoing(request.method, request.url, headers, body), MAX_RESULT + 1)
    host = Target.of(request.url).host
    status = answer.status
    if 200 <= status < 300:
        return _result(answer)
    if status in (408, 429) or status >= 500:
        wait = max(asked_wait(answer), backoff(job.attempts, BACKOFF))
        raise _note(BadAnswer(f"{host} answered {status}", after=wait), answer)
    raise _note(Refused(f"{host} answered {status}{_redirected(answer)}"), answer)


def _result(answer: Answer) -> Any:
    """Return the body of an answer: JSON if it is, and is declared as JSON; else text, or None."""
    coding = answer.headers.get("Content-Encoding", "identity").strip().lower()
    if answer.body and coding not in ("identity", ""):
        raise Refused(f"the answer is compressed ({coding[:20]!a}), which was not asked for; answer without that")
    if len(answer.body) > MAX_RESULT:
        raise Refused(f"the answer is longer than {MAX_RESULT} bytes; store it elsewhere and answer with its URL")
    if re.match(r"application/([\w.+-]*\+)?json\b", answer.headers.get("Content-Type", "").lower()):
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return msgspec.json.decode(answer.body)
    return answer.body.decode("utf-8", "replace") or None


def register() -> None:
    """Register the built-in types. Raises TypeError if a module has declared one of them."""
    if "http" not in HANDLERS or HANDLERS["http"].function is not run_request:
        handler("http", max_attempts=ATTEMPTS, timeout=2 * SECONDS, backoff=BACKOFF)(run_request)
    if "webhook" not in HANDLERS or HANDLERS["webhook"].function is not deliver:
        options: dict[str, Any] = {"timeout": 2 * SECONDS, "queue": "webhooks"}
        handler("webhook", max_attempts=DELIVERIES, max_running=AT_ONCE, limit_by="host", **options)(deliver)
