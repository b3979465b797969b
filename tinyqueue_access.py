"""Access control of the HTTP API: keys and roles, where a request may come from, and rate limits.

This module knows no routes: each names the role that it requires.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import urlsplit

from bottle import request

from tinyqueue import NAME, SettingsError
from tinyqueue_config import Settings
from tinyqueue_problems import Problem
from tinyqueue_shards import AnyQueue

log = logging.getLogger("tinyqueue.web")

# Each role, with the roles that it includes.
ROLES = {"submit": {"submit"}, "read": {"read"}, "admin": {"submit", "read", "admin"}}
SECONDS = {"second": 1, "minute": 60, "hour": 3600}
LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}
LONE_SECRET = 32  # characters that make an entry without a name a secret, as platforms generate them
WRONG_KEYS = (60, 60)  # how many a client may send in how many seconds, if there is no rate limit
MAX_CLIENTS = 10_000  # for which wrong keys are counted at a time
ADDRESS_AND_PORT = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?|([0-9.]+):[0-9]{1,5}")


class Key(NamedTuple):
    """An API key. `roles` are its own role and the roles that it includes."""

    name: str
    roles: set[str]
    secret: bytes


def read_keys(text: str) -> list[Key]:
    """Read TINYQUEUE_API_KEYS. A long secret alone is a key with the name and the role admin.

    Raises SettingsError for anything malformed or ambiguous. The error never contains a secret.
    """
    keys: list[Key] = []
    for number, entry in enumerate(text.split(",") if text else (), 1):
        entry = entry.strip()  # noqa: PLW2901
        if ":" not in entry and len(entry) >= LONE_SECRET:
            entry = f"admin:admin:{entry}"  # noqa: PLW2901
        name, role, secret = (*entry.split(":", 2), "", "")[:3]
        where = f"TINYQUEUE_API_KEYS: entry {number}"
        if not NAME.fullmatch(name) or role not in ROLES:
            raise SettingsError(f"{where} must be name:role:secret; the roles are {', '.join(ROLES)}")
        if len(secret) < 16 or not secret.isascii() or not secret.isprintable() or " " in secret:
            raise SettingsError(f"{where} ({name}): the secret needs 16 or more printable ASCII characters, no spaces")
        if any(name == key.name or secret.encode() == key.secret for key in keys):
            raise SettingsError(f"{where} ({name}): duplicate name or secret")
        keys.append(Key(name, ROLES[role], secret.encode()))
    return keys


class Access:
    """Decides who may do what.

    Without keys, only this machine is served, like in Redis' protected mode. TINYQUEUE_OPEN=1
    serves everyone instead.
    """

    def __init__(self, settings: Settings) -> None:
        self.keys = read_keys(settings.api_keys)
        self.open = settings.open
        self.proxies = settings.trusted_proxies
        amount, _, unit = settings.rate_limit.partition("/")
        self.limit = int(amount or 0)
        self.window = SECONDS.get(unit, 0)
        self.lock = threading.Lock()
        self.wrong_keys = Counter[str]()  # by client, since the window `wrong_keys_since` began
        self.wrong_keys_since = 0.0
        if self.open and self.keys:
            raise SettingsError("TINYQUEUE_OPEN=1 and TINYQUEUE_API_KEYS contradict each other; unset one of them")
        if self.open:
            log.warning("TINYQUEUE_OPEN=1: anyone who can reach this server may submit, read, cancel and retry jobs")

    def authorize(self, role: str, queue: Callable[[], AnyQueue]) -> str:
        """Check that the current request may use a route that requires `role`, or raise a Problem.

        Returns the name of the caller's key, or an empty string without keys. `queue` is only
        called to count the request, if there is a rate limit.
        """
        address = self._client_address()
        if not self.keys and not self.open:
            self._require_local(address)
        if role == "page":
            # A browser has no key when it opens the page. The page must open even without Redis,
            # which counts requests, so this request is not counted.
            return ""
        key = self._find_key(address) if self.keys else None
        if key and role != "any" and role not in key.roles:
            raise Problem(403, "forbidden", f"the key {key.name} lacks the role {role}; use a key that has it")
        if request.method not in ("GET", "HEAD"):
            self._refuse_cross_site()
        # A verdict is given without Redis too, and more requests for it cost Redis nothing.
        if self.limit and request.path != "/verdict":
            self._enforce_rate_limit(queue(), "key-" + key.name if key else "address-" + _network(address))
        return key.name if key else ""

    def _client_address(self) -> str:
        """Return the address that the outermost trusted proxy saw; without proxies, the peer's."""
        peer = str(request.environ.get("REMOTE_ADDR", ""))
        forwarded = request.environ.get("HTTP_X_FORWARDED_FOR", "")
        if not self.proxies or not forwarded:
            return peer.removeprefix("::ffff:")
        try:
            return _read_address(forwarded.split(",")[-self.proxies].strip())
        except (ValueError, IndexError):
            detail = f"X-Forwarded-For lacks a valid address at position {self.proxies} from the right"
            raise Problem(400, "bad-forwarded-for", f"{detail}; check TINYQUEUE_TRUSTED_PROXIES") from None

    def _find_key(self, address: str) -> Key:
        scheme, _, secret = request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        given = secret.strip().encode("utf-8", "replace") if scheme.lower() == "bearer" else b""
        # Compare with every key, so that the time taken reveals nothing.
        found = [key for key in self.keys if hmac.compare_digest(key.secret, given)]
        if found:
            return found[0]
        if given:
            self._count_wrong_key(_network(address))
        detail = "missing or unknown API key; send a secret of TINYQUEUE_API_KEYS as Authorization: Bearer SECRET"
        raise Problem(401, "unauthorized", detail, {"WWW-Authenticate": 'Bearer realm="tinyqueue"'})

    def _count_wrong_key(self, client: str) -> None:
        """Raise a Problem if a client has sent too many wrong keys.

        Counts in this process: clients without a key must not cause writes to Redis. A right key is
        always accepted, because clients behind one address must not lock out each other.
        """
        limit, window = (self.limit, self.window) if self.limit else WRONG_KEYS
        at, left = divmod(time.monotonic(), window)
        with self.lock:
            if at != self.wrong_keys_since or len(self.wrong_keys) >= MAX_CLIENTS:
                self.wrong_keys_since = at
                self.wrong_keys.clear()
            self.wrong_keys[client] += 1
            count = self.wrong_keys[client]
        if count > limit:
            seconds = math.ceil(window - left)
            detail = f"more than {limit} wrong API keys in {window} seconds; try again in {seconds} seconds"
            raise Problem(429, "too-many-requests", detail, {"Retry-After": str(seconds)})

    def _require_local(self, address: str) -> None:
        """Refuse requests from other machines, through a proxy, or under a name that is not local.

        The last rule stops DNS rebinding: a website may point its own name to 127.0.0.1.
        """
        env = request.environ
        forwarded = "HTTP_X_FORWARDED_FOR" in env or "HTTP_FORWARDED" in env
        if not forwarded and _is_local(address, env.get("HTTP_HOST", "localhost")):
            return
        fix = "set TINYQUEUE_API_KEYS, or TINYQUEUE_OPEN=1 to let anyone do everything"
        raise Problem(403, "protected", f"without API keys this server accepts only local requests; {fix}")

    def _refuse_cross_site(self) -> None:
        """Refuse what a browser sends for a page of another site.

        Clients that are not browsers do not send these headers.
        """
        env = request.environ
        site = env.get("HTTP_SEC_FETCH_SITE", "none")
        origin = env.get("HTTP_ORIGIN")
        same_origin = origin is None or origin.partition("://")[2] == env.get("HTTP_HOST")
        if site not in ("same-origin", "none") or not same_origin:
            detail = "a page of another site sent this request; use this server's dashboard or no browser"
            raise Problem(403, "cross-site", detail)

    def _enforce_rate_limit(self, queue: AnyQueue, client: str) -> None:
        left, seconds = queue.spend(client, self.limit, self.window)
        headers = {
            "RateLimit-Policy": f'"default";q={self.limit};w={self.window}',
            "RateLimit": f'"default";r={max(left, 0)};t={seconds}',
        }
        if left < 0:
            detail = f"more than {self.limit} requests in {self.window} seconds; try again in {seconds} seconds"
            raise Problem(429, "too-many-requests", detail, headers | {"Retry-After": str(seconds)})
        request.environ["tinyqueue.rate_limit_headers"] = headers


def _read_address(text: str) -> str:
    """Read an IP address, perhaps with a port. An IPv4 address inside an IPv6 one becomes IPv4."""
    if match := ADDRESS_AND_PORT.fullmatch(text):
        text = match[1] or match[2]
    address = ipaddress.ip_address(text)
    return str(getattr(address, "ipv4_mapped", None) or address)


@lru_cache(maxsize=1000)
def _network(address: str) -> str:
    """Return what counts as one client: an IPv4 address, or the IPv6 /64 of a host."""
    try:
        parsed = ipaddress.ip_address(_read_address(address).partition("%")[0])
    except ValueError:  # for example the path of a Unix socket
        return address
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed.version == 6 else str(parsed)


@lru_cache(maxsize=1000)
def _is_local(address: str, host: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback and urlsplit("//" + host).hostname in LOCAL_NAMES
    except ValueError:
        return False
