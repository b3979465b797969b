"""Access control: keys and roles, local access without keys, rate limits, proxies and other sites.

Also that answers have security headers and that secrets appear nowhere.
"""

from __future__ import annotations

import logging
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from client import NO_BODY, Answer, Client, Wire, running, spell
from conftest import dump, free_port, put, raw

import wsgi
from tinyqueue import Queue, SettingsError, handler
from tinyqueue_access import Access
from tinyqueue_config import Settings
from wsgi import API, ROUTES

SECRETS = {"submit": "submit-0123456789", "read": "read-0123456789ab", "admin": "admin:0123456789ab"}
KEYS = ",".join(f"{role}-key:{role}:{secret}" for role, secret in SECRETS.items())
NO_JOB = "01900000-0000-7000-8000-000000000000"
JOB = {"type": "echo", "payload": 1}
HANDLERS_PY = """
from tinyqueue import handler

@handler("fails", max_attempts=1)
def fails(payload: dict) -> None:
    raise ValueError
"""


def echo(payload: Any) -> Any:
    return payload


@pytest.fixture(autouse=True)
def handlers(no_handlers: None) -> None:
    handler("echo")(echo)


def with_keys(queue: Queue, secret: str = "", **settings: Any) -> Client:
    """A client of an API with keys."""
    return Client(API(Settings(api_keys=KEYS, **settings), queue), secret)


def open_to_all(queue: Queue, peer: str = "198.51.100.7", **settings: Any) -> Client:
    """A remote client of an API that serves everyone."""
    return Client(API(Settings(open=True, **settings), queue), peer=peer)


def send(api: Client, method: str, path: str, **headers: str) -> Answer:
    """Call a route. The body of a POST is an empty object."""
    spelled = path.replace("<id>", NO_JOB).replace("<name>", "default").replace("<limit>", "echo")
    return api.call(
        method,
        spelled,
        {} if method in ("POST", "PUT") else NO_BODY,
        {n.replace("_", "-"): v for n, v in headers.items()},
    )


# Roles ----------------------------------------------------------------------------------------------------------------

NEEDED_ROLES = {
    ("GET", "/health"): None,
    ("GET", "/ready"): "read",
    ("GET", "/"): None,
    ("GET", "/openapi.json"): "any",
    ("GET", "/whoami"): "any",
    ("POST", "/jobs"): "submit",
    ("POST", "/jobs/batch"): "submit",
    ("GET", "/jobs"): "read",
    ("GET", "/jobs/count"): "read",
    ("GET", "/failures"): "read",
    ("GET", "/jobs/<id>"): "read",
    ("DELETE", "/jobs/<id>"): "admin",
    ("GET", "/jobs/<id>/log"): "read",
    ("POST", "/jobs/<id>/retry"): "admin",
    ("POST", "/jobs/retry"): "admin",
    ("POST", "/jobs/cancel"): "admin",
    ("POST", "/jobs/purge"): "admin",
    ("POST", "/jobs/<id>/run"): "admin",
    ("POST", "/jobs/<id>/replay"): "admin",
    ("POST", "/jobs/<id>/purge"): "admin",
    ("GET", "/queues"): "read",
    ("POST", "/queues/<name>/pause"): "admin",
    ("POST", "/queues/<name>/resume"): "admin",
    ("GET", "/limits"): "read",
    ("PUT", "/limits/<limit>"): "admin",
    ("GET", "/schedules"): "read",
    ("PUT", "/schedules/<name>"): "admin",
    ("DELETE", "/schedules/<name>"): "admin",
    ("POST", "/schedules/<name>/pause"): "admin",
    ("POST", "/schedules/<name>/resume"): "admin",
    ("POST", "/schedules/<name>/run"): "admin",
    ("POST", "/work"): "admin",
    ("GET", "/stats"): "read",
    ("GET", "/verdict"): "read",
    ("GET", "/scale"): "read",
    ("GET", "/workers"): "read",
    ("GET", "/types"): "read",
    ("GET", "/events"): "read",
    ("POST", "/workers/<name>/quiet"): "admin",
    ("POST", "/workers/<name>/resume"): "admin",
    ("GET", "/audit"): "read",
    ("GET", "/metrics"): "read",
}
GUARDED = [route for route, role in NEEDED_ROLES.items() if role]
CHANGING = [route for route in GUARDED if route[0] != "GET"]
READING = [route for route in NEEDED_ROLES if route[0] == "GET"]


def test_roles_are_listed_for_every_route() -> None:
    assert {(method, path) for method, path, *_ in ROUTES} == NEEDED_ROLES.keys()


@pytest.mark.parametrize("role", SECRETS)
@pytest.mark.parametrize(("method", "path"), NEEDED_ROLES)
def test_key_may_use_exactly_the_routes_of_its_role(near: Queue, role: str, method: str, path: str) -> None:
    before = dump(near)
    answer = send(with_keys(near, SECRETS[role]), method, path)
    if NEEDED_ROLES[method, path] in (None, "any", role) or role == "admin":
        assert answer.status not in (401, 403)
    else:
        assert (answer.status, answer.kind) == (403, "forbidden")
        assert NEEDED_ROLES[method, path] in answer.problem["detail"]
        assert dump(near) == before


@pytest.mark.parametrize("secret", ["", "wrong-0123456789ab"])
@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_refuse_missing_and_unknown_keys_on_every_protected_route(
    near: Queue, method: str, path: str, secret: str
) -> None:
    answer = send(with_keys(near, secret), method, path)
    assert (answer.status, answer.kind) == (401, "unauthorized")
    assert answer.headers["www-authenticate"].startswith("Bearer ")
    assert dump(near) == {}


def test_head_requires_the_role_of_get(near: Queue) -> None:
    found = {role: with_keys(near, secret).call("HEAD", "/stats").status for role, secret in SECRETS.items()}
    assert found == {"submit": 403, "read": 200, "admin": 200}


@pytest.mark.parametrize("path", ["/health", "/"])
def test_serve_health_and_dashboard_without_a_key(near: Queue, path: str) -> None:
    assert with_keys(near).get(path).status == 200


@pytest.mark.parametrize("role", SECRETS)
def test_whoami_returns_name_and_roles_of_the_key(near: Queue, role: str) -> None:
    included = {"submit": ["submit"], "read": ["read"], "admin": ["submit", "read", "admin"]}
    caller = with_keys(near, SECRETS[role]).get("/whoami").json
    assert caller["roles"] == included[role]
    assert f"{caller['name']}:{role}:{SECRETS[role]}" in KEYS.split(",")


def test_whoami_returns_all_roles_when_no_keys_are_set(near: Queue) -> None:
    caller = open_to_all(near).get("/whoami").json
    assert caller == {"name": "", "roles": ["submit", "read", "admin"], "embedded": True}
    caller = open_to_all(near, redis_url="redis://localhost").get("/whoami").json
    assert not caller["embedded"]


def test_accept_a_key_from_any_address_proxy_and_host_name(near: Queue) -> None:
    api = Client(API(Settings(api_keys=KEYS), near), SECRETS["read"], peer="198.51.100.7")
    assert (
        api.get("/stats", {"Host": "jobs.example.org", "X-Forwarded-For": "nonsense", "Forwarded": "for=x"}).status
        == 200
    )


@pytest.mark.parametrize("spelled", ["Bearer {}", "bearer {}", "BEARER {}", "Bearer   {}", "Bearer {} "])
def test_accept_every_spelling_of_the_bearer_scheme(near: Queue, spelled: str) -> None:
    assert with_keys(near).get("/stats", {"Authorization": spelled.format(SECRETS["read"])}).status == 200


READ = SECRETS["read"]
WRONG_KEYS = {
    "empty": "",
    "scheme alone": "Bearer",
    "no secret": "Bearer ",
    "spaces": "Bearer    ",
    "secret alone": READ,
    "another scheme": f"Basic {READ}",
    "token": f"Token {READ}",
    "colon": f"Bearer: {READ}",
    "one character less": f"Bearer {READ[:-1]}",
    "one character more": f"Bearer {READ}x",
    "upper case": f"Bearer {READ.upper()}",
    "quoted": f'Bearer "{READ}"',
    "twice": f"Bearer {READ}, Bearer {READ}",
    "name and secret": f"Bearer read-key:{READ}",
    "whole entry": f"Bearer read-key:read:{READ}",
    "name": "Bearer read-key",
    "all keys": f"Bearer {KEYS}",
    "NUL": f"Bearer {READ}\0",
    "UTF-8": "Bearer " + "é😀".encode().decode("latin-1"),
    "not UTF-8": "Bearer \xff\xfe",
    "scheme that is not UTF-8": f"\xff {READ}",
    "long": "Bearer " + "a" * 20_000,
}


@pytest.mark.parametrize("value", WRONG_KEYS.values(), ids=WRONG_KEYS.keys())
def test_give_the_same_answer_to_every_wrong_key(near: Queue, value: str) -> None:
    api = with_keys(near)
    missing = api.get("/stats", {"X-Request-ID": "r"})
    answer = api.get("/stats", {"X-Request-ID": "r", "Authorization": value})
    assert answer == missing
    assert answer.kind == "unauthorized"
    assert api.log.getvalue() == ""


def test_ignore_a_key_in_the_query_or_a_cookie(near: Queue) -> None:
    path = f"/stats?token={READ}&api_key={READ}&access_token={READ}"
    assert with_keys(near).get(path, {"Cookie": f"token={READ}", "X-Api-Key": READ}).status == 401


# Wrong settings -------------------------------------------------------------------------------------------------------

SECRET = "S3cr3tPw-0123456789"
WRONG_SETTINGS = {
    "space": " ",
    "secret alone": SECRET,
    "no role": f"ann:{SECRET}",
    "unknown role": f"ann:root:{SECRET}",
    "role in upper case": f"ann:ADMIN:{SECRET}",
    "empty role": f"ann::{SECRET}",
    "empty name": f":admin:{SECRET}",
    "space in the name": f"an n:admin:{SECRET}",
    "no secret": "ann:admin",
    "empty secret": "ann:admin:",
    "secret of spaces": "ann:admin:" + " " * 20,
    "short secret": f"ann:admin:{SECRET[:15]}",
    "space in the secret": f"ann:admin:{SECRET} x",
    "tab in the secret": f"ann:admin:{SECRET}\tx",
    "DEL in the secret": f"ann:admin:{SECRET}\x7f",
    "secret that is not ASCII": f"ann:admin:{SECRET}é",
    "comma at the end": f"ann:admin:{SECRET},",
    "comma at the beginning": f",ann:admin:{SECRET}",
    "two commas": f"ann:admin:{SECRET},,bob:read:{SECRET}x",
    "name twice": f"ann:admin:{SECRET},ann:read:{SECRET}x",
    "secret twice": f"ann:read:{SECRET},bob:admin:{SECRET}",
    "second entry": f"ann:read:{SECRET},bob:admin:{SECRET[:15]}",
}


@pytest.mark.parametrize("keys", WRONG_SETTINGS.values(), ids=WRONG_SETTINGS.keys())
def test_refuse_ambiguous_keys_without_showing_a_secret(keys: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Access(Settings(api_keys=keys))
    message = str(refused.value)
    assert message.startswith("TINYQUEUE_API_KEYS: entry ")
    assert "\n" not in message
    assert SECRET[:15] not in message


def test_accept_spaces_around_keys_and_colons_in_secrets(near: Queue) -> None:
    access = Access(Settings(api_keys=f" ann:admin:{SECRET}:x , bob:read:{SECRET}:y"))
    assert [(key.name, key.secret.decode()) for key in access.keys] == [("ann", f"{SECRET}:x"), ("bob", f"{SECRET}:y")]


def test_accept_a_generated_secret_alone_as_a_key_of_an_admin(near: Queue) -> None:
    secret = "f+w/" * 10 + "x8E="
    api = API(Settings(api_keys=f"ann:read:{SECRET}, {secret}"), near)
    answer = Client(api, secret, peer="198.51.100.7").get("/whoami")
    assert (answer.json["name"], answer.json["roles"]) == ("admin", ["submit", "read", "admin"])
    assert Client(api, secret[:-1]).get("/whoami").status == 401


@pytest.mark.parametrize("keys", ["x" * 31, f"admin:read:{SECRET},{'x' * 32}", "x" * 31 + "\u00e9", "x " * 20])
def test_refuse_a_secret_alone_that_is_short_malformed_or_takes_a_name(keys: str) -> None:
    with pytest.raises(SettingsError, match="TINYQUEUE_API_KEYS: entry"):
        Access(Settings(api_keys=keys))


def test_refuse_open_together_with_keys() -> None:
    with pytest.raises(
        SettingsError, match=r"TINYQUEUE_OPEN=1 and TINYQUEUE_API_KEYS contradict each other"
    ) as refused:
        Access(Settings(api_keys=f"ann:admin:{SECRET}", open=True))
    assert SECRET not in str(refused.value)


def test_warn_once_when_open(near: Queue, caplog: pytest.LogCaptureFixture) -> None:
    api = open_to_all(near)
    assert [api.get("/stats").status for _ in range(2)] == [200, 200]
    assert [(record.levelno, "TINYQUEUE_OPEN" in record.message) for record in caplog.records] == [
        (logging.WARNING, True)
    ]


def test_treat_empty_keys_as_no_keys(near: Queue) -> None:
    settings = Settings.read({"TINYQUEUE_API_KEYS": "", "TINYQUEUE_OPEN": ""})
    assert Client(API(settings, near), peer="198.51.100.7").get("/stats").kind == "protected"


@pytest.mark.parametrize(
    "environ",
    [
        {"TINYQUEUE_API_KEYS": f"ann:root:{SECRET}"},
        {"TINYQUEUE_API_KEYS": f"ann:admin:{SECRET},"},
        {"TINYQUEUE_API_KEYS": f"ann:admin:{SECRET}", "TINYQUEUE_OPEN": "1"},
        {"TINYQUEUE_RATE_LIMIT": "600"},
        {"TINYQUEUE_RATE_LIMIT": "0/minute"},
        {"TINYQUEUE_TRUSTED_PROXIES": "-1"},
    ],
    ids="+".join,
)
def test_exit_at_once_when_an_access_setting_is_wrong(tmp_path: Path, environ: dict[str, str]) -> None:
    (tmp_path / "handlers.py").write_text(HANDLERS_PY)
    paths = {"PORT": "0", "HOST": "127.0.0.1", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, wsgi.__file__]
    done = subprocess.run(
        command, cwd=tmp_path, env=environ | paths, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 2
    assert next(iter(environ)) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stdout + done.stderr


# Without keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.9.8.7", "::1", "::ffff:127.0.0.1"])
def test_serve_this_machine_when_no_keys_are_set(near: Queue, peer: str) -> None:
    api = Client(API(Settings(), near), peer=peer)
    assert api.post("/jobs", JOB).status == 201
    assert api.get("/stats").status == 200


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST", "localhost:3000", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:3000"]
)
def test_serve_this_machine_under_each_local_name(near: Queue, host: str) -> None:
    assert Client(API(Settings(), near)).get("/stats", {"Host": host}).status == 200


NOT_LOCAL: dict[str, tuple[str, dict[str, str]]] = {
    "another machine": ("198.51.100.7", {}),
    "private network": ("192.168.0.7", {}),
    "mapped": ("::ffff:198.51.100.7", {}),
    "IPv6": ("2001:db8::1", {}),
    "any address": ("0.0.0.0", {}),
    "no address": ("", {}),
    "socket": ("localhost", {}),
    "rebound name": ("127.0.0.1", {"Host": "evil.example.org"}),
    "rebound name and port": ("127.0.0.1", {"Host": "evil.example.org:3000"}),
    "name with a local prefix": ("127.0.0.1", {"Host": "localhost.evil.example.org"}),
    "name with a local suffix": ("127.0.0.1", {"Host": "evil-localhost"}),
    "address in a name": ("127.0.0.1", {"Host": "127.0.0.1.nip.io"}),
    "local name in front": ("127.0.0.1", {"Host": "localhost@evil.example.org"}),
    "unclosed bracket": ("127.0.0.1", {"Host": "[::1"}),
    "empty name": ("127.0.0.1", {"Host": ""}),
    "name that is not UTF-8": ("127.0.0.1", {"Host": "\xff"}),
    "proxy": ("127.0.0.1", {"X-Forwarded-For": "127.0.0.1"}),
    "proxy with an empty header": ("127.0.0.1", {"X-Forwarded-For": ""}),
    "proxy with a malformed header": ("127.0.0.1", {"X-Forwarded-For": "\xff"}),
    "proxy with Forwarded": ("127.0.0.1", {"Forwarded": "for=127.0.0.1"}),
}


@pytest.mark.parametrize(("peer", "headers"), NOT_LOCAL.values(), ids=NOT_LOCAL.keys())
def test_refuse_remote_clients_when_no_keys_are_set(near: Queue, peer: str, headers: dict[str, str]) -> None:
    api = Client(API(Settings(), near), peer=peer)
    for answer in (api.get("/stats", headers), api.post("/jobs", JOB, headers)):
        assert (answer.status, answer.kind) == (403, "protected")
        assert "TINYQUEUE_API_KEYS" in answer.problem["detail"]
    assert api.get("/health", headers).status == 200
    assert dump(near) == {}


@pytest.mark.parametrize("value", ["127.0.0.1", "::1"])
def test_refuse_a_remote_client_that_claims_a_local_address_behind_a_trusted_proxy(near: Queue, value: str) -> None:
    api = Client(API(Settings(trusted_proxies=1), near), peer="198.51.100.7")
    assert api.get("/stats", {"X-Forwarded-For": value}).kind == "protected"


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_refuse_remote_clients_on_every_protected_route(near: Queue, method: str, path: str) -> None:
    assert send(Client(API(Settings(), near), peer="198.51.100.7"), method, path).kind == "protected"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_serve_this_machine_over_ipv4_and_ipv6_when_no_keys_are_set(tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text(HANDLERS_PY)
    with running(tmp_path, HOST="") as ((_, port), log, _):
        for address in ("127.0.0.1", "::1"):
            with Wire((address, port)) as wire:
                wire.send(spell("GET", "/stats"))
                assert wire.answer().status == 200
                wire.send(spell("GET", "/stats", None, "X-Forwarded-For: 127.0.0.1"))
                assert wire.answer().kind == "protected"
                wire.send(spell("GET", "/stats").replace(b"Host: localhost", b"Host: evil.example.org"))
                assert wire.answer().kind == "protected"
    assert "Traceback" not in log.read_text()


def test_protect_the_dashboard_like_its_data(near: Queue) -> None:
    assert Client(API(Settings(), near)).get("/").status == 200
    assert Client(API(Settings(), near), peer="198.51.100.7").get("/").kind == "protected"
    assert open_to_all(near).get("/").status == 200


def test_serve_everyone_when_open(near: Queue) -> None:
    api = open_to_all(near)
    headers = {"Host": "jobs.example.org", "X-Forwarded-For": "1.2.3.4", "Forwarded": "for=1.2.3.4"}
    id = api.post("/jobs", JOB, headers).json["jobId"]
    assert api.call("DELETE", f"/jobs/{id}", headers=headers).status == 200


# Limits ---------------------------------------------------------------------------------------------------------------


def limits(answer: Answer) -> tuple[str, int, int]:
    """Return the policy, how many requests are left, and for how many seconds."""
    match = re.fullmatch(r'"default";r=(\d+);t=(\d+)', answer.headers["ratelimit"])
    assert match
    return answer.headers["ratelimit-policy"], int(match[1]), int(match[2])


def test_limit_refuses_further_requests_and_reports_how_many_are_left(queue: Queue) -> None:
    api = open_to_all(queue, rate_limit="3/hour")
    answers = [api.get("/stats") for _ in range(5)]
    assert [answer.status for answer in answers] == [200, 200, 200, 429, 429]
    assert [limits(answer)[:2] for answer in answers] == [('"default";q=3;w=3600', left) for left in (2, 1, 0, 0, 0)]
    assert all(1 <= limits(answer)[2] <= 3600 for answer in answers)
    assert answers[-1].kind == "too-many-requests"
    assert int(answers[-1].headers["retry-after"]) == limits(answers[-1])[2]
    assert "retry-after" not in answers[0].headers


@pytest.mark.parametrize(("limit", "seconds"), [("5/second", 1), ("5/minute", 60), ("5/hour", 3600)])
def test_limit_accepts_each_unit(queue: Queue, limit: str, seconds: int) -> None:
    policy, _, left = limits(open_to_all(queue, rate_limit=limit).get("/stats"))
    assert policy == f'"default";q=5;w={seconds}'
    assert 1 <= left <= seconds


def test_limit_starts_again_in_the_next_window(queue: Queue) -> None:
    api = open_to_all(queue, rate_limit="1/hour")
    assert [api.get("/stats").status for _ in range(2)] == [200, 429]
    queue.clock.ahead += 3600_000
    assert [api.get("/stats").status for _ in range(2)] == [200, 429]


def test_limit_stores_no_job_of_a_refused_request(queue: Queue) -> None:
    api = open_to_all(queue, rate_limit="1/hour")
    assert [api.post("/jobs", JOB).status for _ in range(3)] == [201, 429, 429]
    assert queue.waiting(["default"]) == 1


def test_limit_counts_each_key_separately_whatever_its_address(queue: Queue) -> None:
    api = API(Settings(api_keys=KEYS, rate_limit="2/hour"), queue)
    first, second = (Client(api, SECRETS["read"], peer) for peer in ("198.51.100.7", "198.51.100.8"))
    assert [client.get("/stats").status for client in (first, second, first)] == [200, 200, 429]
    assert Client(api, SECRETS["admin"], "198.51.100.7").get("/stats").status == 200


def test_limit_counts_each_address_separately(queue: Queue) -> None:
    api = API(Settings(open=True, rate_limit="1/hour"), queue)
    peers = ["198.51.100.7", "198.51.100.8", "2001:db8::1", "198.51.100.7", "::ffff:198.51.100.7"]
    assert [Client(api, peer=peer).get("/stats").status for peer in peers] == [200, 200, 200, 429, 429]


def test_limit_counts_all_addresses_of_an_ipv6_network_as_one_client(queue: Queue) -> None:
    peers = ["2001:db8::1", "2001:db8::2", "2001:db8:0:0:ffff::", "2001:db8:0:1::1"]
    statuses = [open_to_all(queue, peer, rate_limit="2/hour").get("/stats").status for peer in peers]
    assert statuses == [200, 200, 429, 200]


def test_refuse_further_wrong_keys_of_a_client_and_accept_right_ones(near: Queue) -> None:
    app = API(Settings(api_keys=KEYS), near)
    wrong = Client(app, "wrong-0123456789ab", "198.51.100.7")
    assert [wrong.get("/stats").status for _ in range(60)] == [401] * 60
    answer = wrong.get("/stats")
    assert (answer.status, answer.kind) == (429, "too-many-requests")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert Client(app, "wrong-0123456789ab", "198.51.100.8").get("/stats").status == 401
    assert Client(app, "", "198.51.100.7").get("/stats").status == 401
    assert Client(app, READ, "198.51.100.7").get("/stats").status == 200
    assert counted_clients(near) == set()


def test_limit_applies_to_wrong_keys(near: Queue) -> None:
    app = API(Settings(api_keys=KEYS, rate_limit="2/hour", trusted_proxies=1), near)
    wrong = Client(app, "wrong-0123456789ab")
    statuses = [wrong.get("/stats", {"X-Forwarded-For": f"[2001:db8::{n}]:{n}"}).status for n in range(1, 5)]
    assert statuses == [401, 401, 429, 429]


def test_limit_is_shared_by_all_processes_of_one_redis(queue: Queue) -> None:
    apis = [open_to_all(queue, rate_limit="2/hour") for _ in range(2)]
    assert [api.get("/stats").status for api in apis * 2] == [200, 200, 429, 429]


@pytest.mark.parametrize("secret", ["", "wrong-0123456789ab", SECRETS["submit"]])
def test_limit_does_not_count_refused_clients(queue: Queue, secret: str) -> None:
    api = with_keys(queue, secret, rate_limit="3/hour")
    assert {api.get("/stats").status for _ in range(3)} <= {401, 403}
    assert counted_clients(queue) == set()


def test_limit_does_not_apply_to_health(queue: Queue) -> None:
    api = open_to_all(queue, rate_limit="1/hour")
    assert [api.get("/health").status for _ in range(5)] == [200] * 5
    assert "ratelimit" not in api.get("/health").headers


@pytest.mark.parametrize("path", ["/jobs?limit=x", f"/jobs/{NO_JOB}"])
def test_limit_is_reported_with_errors(queue: Queue, path: str) -> None:
    assert limits(open_to_all(queue, rate_limit="5/hour").get(path))[1] == 4


def test_limit_counts_expire_with_the_window(queue: Queue) -> None:
    api = open_to_all(queue, rate_limit="5/minute")
    for _ in range(7):
        api.get("/stats")
    [key] = [key for key in raw(queue).keys("*") if b":rate:" in key]
    assert 0 < raw(queue).ttl(key) <= 60


def test_report_no_limit_when_none_is_set(queue: Queue) -> None:
    assert not open_to_all(queue).get("/stats").headers.keys() & {"ratelimit", "ratelimit-policy"}


# Proxies --------------------------------------------------------------------------------------------------------------


def counted_clients(queue: Queue) -> set[str]:
    """Return the clients whose requests have been counted."""
    return {match[1].decode() for key in raw(queue).keys("*") if (match := re.search(rb":rate:(.+):\d+$", key))}


@pytest.mark.parametrize(
    ("proxies", "header", "address"),
    [
        (0, "1.2.3.4", "198.51.100.7"),
        (0, "nonsense", "198.51.100.7"),
        (1, "1.2.3.4", "1.2.3.4"),
        (1, "9.9.9.9, 1.2.3.4", "1.2.3.4"),
        (1, "nonsense, 1.2.3.4", "1.2.3.4"),
        (1, "\t9.9.9.9,1.2.3.4 ", "1.2.3.4"),
        (1, "1.2.3.4:49152", "1.2.3.4"),
        (1, "2001:DB8:0::1", "2001:db8::/64"),
        (1, "[2001:db8::7]:49152", "2001:db8::/64"),
        (1, "[2001:db8::7]", "2001:db8::/64"),
        (1, "::ffff:1.2.3.4", "1.2.3.4"),
        (1, "[::FFFF:102:304]:80", "1.2.3.4"),
        (1, "fe80::1%eth0", "fe80::/64"),
        (2, "9.9.9.9, 1.2.3.4, 5.6.7.8", "1.2.3.4"),
        (2, "1.2.3.4, 5.6.7.8", "1.2.3.4"),
        (3, "9.9.9.9, 1.2.3.4, nonsense, 5.6.7.8", "1.2.3.4"),
    ],
)
def test_use_the_address_seen_by_the_outermost_trusted_proxy(
    queue: Queue, proxies: int, header: str, address: str
) -> None:
    api = open_to_all(queue, rate_limit="9/hour", trusted_proxies=proxies)
    assert api.get("/stats", {"X-Forwarded-For": header}).status == 200
    assert counted_clients(queue) == {f"address-{address}"}


def test_use_the_address_of_the_peer_without_a_forwarded_header(queue: Queue) -> None:
    assert open_to_all(queue, rate_limit="9/hour", trusted_proxies=1).get("/stats").status == 200
    assert counted_clients(queue) == {"address-198.51.100.7"}


@pytest.mark.parametrize(
    ("proxies", "header"),
    [
        *[
            (1, header)
            for header in ("nonsense", "1.2.3", "1.2.3.4,", ",", " ", 'for="[::1]"', "1.2.3.256", "1.2.3.4:", ":80")
        ],
        *[
            (1, header)
            for header in (
                "1.2.3.4:x",
                "1.2.3.4:123456",
                "[1.2.3.4",
                "[::1]x",
                "[::1]:",
                "::1]:80",
                "[]",
                "[::1]:80:80",
            )
        ],
        *[
            (1, header)
            for header in ("1.2.3.4, unknown", "\xc3\xa9", "\xff", "1.2.3.4\0", "a" * 5000, "1.2.3.4 5.6.7.8")
        ],
        (2, "1.2.3.4"),
        (2, "nonsense, 1.2.3.4"),
        (3, "1.2.3.4, 5.6.7.8"),
    ],
)
def test_refuse_a_malformed_forwarded_header(queue: Queue, proxies: int, header: str) -> None:
    answer = open_to_all(queue, rate_limit="9/hour", trusted_proxies=proxies).get("/stats", {"X-Forwarded-For": header})
    assert (answer.status, answer.kind) == (400, "bad-forwarded-for")
    assert counted_clients(queue) == set()


def test_limit_cannot_be_evaded_by_inventing_addresses(queue: Queue) -> None:
    api = open_to_all(queue, rate_limit="3/hour")
    statuses = [
        api.get("/stats", {"X-Forwarded-For": f"10.0.0.{n}", "Forwarded": f"for=10.0.0.{n}"}).status for n in range(50)
    ]
    assert statuses == [200] * 3 + [429] * 47
    assert len(counted_clients(queue)) == 1


def test_limit_cannot_be_evaded_by_inventing_addresses_before_a_trusted_proxy(queue: Queue) -> None:
    api = open_to_all(queue, rate_limit="3/hour", trusted_proxies=1)
    statuses = [api.get("/stats", {"X-Forwarded-For": f"10.0.0.{n}, 203.0.113.9"}).status for n in range(50)]
    assert statuses == [200] * 3 + [429] * 47
    assert counted_clients(queue) == {"address-203.0.113.9"}


# Pages of other sites -------------------------------------------------------------------------------------------------

CROSS_SITE = {
    "cross-site": {"Sec-Fetch-Site": "cross-site"},
    "same-site": {"Sec-Fetch-Site": "same-site"},
    "unknown": {"Sec-Fetch-Site": "x"},
    "empty": {"Sec-Fetch-Site": ""},
    "not UTF-8": {"Sec-Fetch-Site": "\xff"},
    "another origin": {"Origin": "https://evil.example.org"},
    "null": {"Origin": "null"},
    "empty origin": {"Origin": ""},
    "origin that is not UTF-8": {"Origin": "\xff"},
    "another port": {"Origin": "http://127.0.0.1:8000"},
    "origin with the same prefix": {"Origin": "http://127.0.0.1.evil.example.org"},
    "same-origin of another origin": {"Sec-Fetch-Site": "same-origin", "Origin": "https://evil.example.org"},
    "cross-site of this origin": {"Sec-Fetch-Site": "cross-site", "Origin": "http://127.0.0.1"},
}


@pytest.mark.parametrize("headers", CROSS_SITE.values(), ids=CROSS_SITE.keys())
def test_refuse_requests_of_a_page_of_another_site(near: Queue, headers: dict[str, str]) -> None:
    for api in (Client(API(Settings(), near)), with_keys(near, SECRETS["admin"]), open_to_all(near)):
        answer = api.post("/jobs", JOB, headers)
        assert (answer.status, answer.kind) == (403, "cross-site")
    assert dump(near) == {}


@pytest.mark.parametrize(("method", "path"), CHANGING)
def test_refuse_cross_site_requests_on_every_changing_route(near: Queue, method: str, path: str) -> None:
    before = dump(near)
    assert send(Client(API(Settings(), near)), method, path, Sec_Fetch_Site="cross-site").kind == "cross-site"
    assert dump(near) == before


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_refuse_content_types_that_a_form_can_send(near: Queue, content_type: str) -> None:
    api = Client(API(Settings(), near))
    for path in ("/jobs", "/jobs/batch", "/jobs/retry", "/jobs/cancel"):
        assert api.post(path, JOB, {"Content-Type": content_type}).status == 415
    assert dump(near) == {}


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost:3000", "Host": "localhost:3000"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "http://localhost:3000", "Host": "localhost:3000"},
        {"Origin": "https://localhost", "Host": "localhost"},
    ],
    ids=str,
)
def test_accept_requests_of_a_page_of_this_server(near: Queue, headers: dict[str, str]) -> None:
    assert Client(API(Settings(), near)).post("/jobs", JOB, headers).status == 201


@pytest.mark.parametrize(("method", "path"), READING)
def test_get_changes_nothing(queue: Queue, method: str, path: str) -> None:
    job = put(queue, "failed")
    api = Client(API(Settings(), queue))
    api.get("/verdict")  # the first look notes since when a problem lasts
    before = dump(queue)
    for suffix in ("", "?action=retry&_method=DELETE"):
        answer = api.get(path.replace("<id>", job.id) + suffix, {"X-Http-Method-Override": "DELETE"})
        assert answer.status in ((404,) if path == "/events" else (200, 400, 422))  # only our own server sends events
    assert dump(queue) == before


# Security headers -----------------------------------------------------------------------------------------------------

ANSWERS = [
    (200, "GET", "/health", NO_BODY, {}),
    (200, "GET", "/openapi.json", NO_BODY, {}),
    (201, "POST", "/jobs", JOB, {}),
    (204, "OPTIONS", "/jobs", NO_BODY, {}),
    (400, "POST", "/jobs", b"{", {}),
    (401, "GET", "/stats", NO_BODY, {"Authorization": "Bearer x"}),
    (403, "POST", "/jobs", JOB, {"Authorization": f"Bearer {READ}"}),
    (403, "POST", "/jobs", JOB, {"Sec-Fetch-Site": "cross-site"}),
    (404, "GET", "/nope", NO_BODY, {}),
    (404, "GET", f"/jobs/{NO_JOB}", NO_BODY, {}),
    (405, "PUT", "/jobs", JOB, {}),
    (413, "POST", "/jobs", b" " * 2000, {}),
    (415, "POST", "/jobs", JOB, {"Content-Type": "text/plain"}),
    (422, "POST", "/jobs", {}, {}),
]


def assert_secured(answer: Answer) -> None:
    found = {
        name: answer.headers.get(name)
        for name in ("cache-control", "x-content-type-options", "content-security-policy")
    }
    policy = "default-src 'none'; frame-ancestors 'none'"
    assert found == {
        "cache-control": "no-store",
        "x-content-type-options": "nosniff",
        "content-security-policy": policy,
    }
    assert not answer.headers.keys() & {"access-control-allow-origin", "server", "x-powered-by", "set-cookie"}


@pytest.mark.parametrize("case", ANSWERS, ids=lambda case: f"{case[0]} {case[1]} {case[2]}")
def test_every_answer_has_security_headers(near: Queue, case: tuple[int, str, str, Any, dict[str, str]]) -> None:
    status, method, path, body, headers = case
    answer = with_keys(near, SECRETS["admin"], max_body=1024).call(method, path, body, headers)
    assert answer.status == status
    assert_secured(answer)


def test_rate_limited_answer_has_security_headers(near: Queue) -> None:
    api = open_to_all(near, rate_limit="1/hour")
    assert_secured(api.get("/stats"))
    refused = api.get("/stats")
    assert refused.status == 429
    assert_secured(refused)


def test_answer_without_redis_has_security_headers() -> None:
    answer = Client(API(Settings(), Queue.from_url(f"redis://127.0.0.1:{free_port()}/0"))).get("/stats")
    assert answer.status == 503
    assert_secured(answer)


# Secrets --------------------------------------------------------------------------------------------------------------

HIDDEN = re.compile("hunter2|tok123|" + "|".join(map(re.escape, SECRETS.values())))


@pytest.mark.parametrize("up", [True, False], ids=["redis", "no redis"])
def test_logs_and_other_answers_contain_no_secret_and_no_payload(
    near: Queue, caplog: pytest.LogCaptureFixture, up: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    queue = near if up else Queue.from_url(f"redis://u:hunter2@127.0.0.1:{free_port()}/0")
    api = with_keys(queue, SECRETS["admin"])
    answers = []
    for body in (
        JOB | {"payload": {"password": "hunter2"}},
        {"type": "hunter", "payload": "hunter2"},
        {"payload": "hunter2"},
        b"hunter2",
    ):
        for headers in (
            {},
            {"Idempotency-Key": "tok123"},
            {"Authorization": "Bearer tok123"},
            {"Authorization": "tok123"},
        ):
            for path in ("/jobs?token=tok123", "/jobs/batch?token=tok123", "/jobs/cancel?token=tok123"):
                answers.append(api.post(path, body, headers))
    answers += [
        api.get(path) for path in ("/stats", "/queues", "/workers", "/ready", "/openapi.json", "/health?token=tok123")
    ]
    for answer in answers:
        assert not HIDDEN.search(f"{answer.headers} {answer.body!r}"), answer
    assert not HIDDEN.search(api.log.getvalue() + caplog.text)


def test_process_log_contains_no_secret_and_no_payload(tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text(HANDLERS_PY)
    with running(tmp_path, TINYQUEUE_API_KEYS=KEYS, LOG_LEVEL="debug") as (address, log, _), Wire(address) as wire:
        body = b'{"type":"fails","payload":{"password":"hunter2"}}'
        wire.send(spell("POST", "/jobs?token=tok123", body, "Authorization: Bearer tok123"))
        assert wire.answer().status == 401
        own = f"Authorization: Bearer {SECRETS['admin']}"
        wire.send(spell("POST", "/jobs?token=tok123", body, own))
        location = "/" + wire.answer().headers["location"]
        wire.send(spell("GET", f"{location}?wait=20", None, own))
        assert wire.answer().json["status"] == "failed"
    assert "ValueError" in log.read_text()
    assert not HIDDEN.search(log.read_text())
