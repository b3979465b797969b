"""Test /metrics, and the alerts and the Grafana dashboard in deploy/ that use it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from client import Client
from conftest import free_port, lapse, newest, put, raw
from cutproxy import CutProxy
from prometheus_client.parser import text_string_to_metric_families

import tinyqueue
import tinyqueue_metrics
from tinyqueue import Failure, Job, Outcome, Queue, handler
from tinyqueue_config import Settings
from tinyqueue_doctor import CHECKS
from tinyqueue_metrics import METRICS
from tinyqueue_schedule import make_schedule, put as put_schedule
from wsgi import API

DEPLOY = Path(tinyqueue.__file__).parent / "deploy"
PROMTOOL = shutil.which("promtool")
Samples = dict[tuple[str, ...], float]  # (name, label values in the order of the label names) -> value


def promtool(*arguments: str, text: str | None = None) -> None:
    """Run promtool, which must succeed. If it is missing, skip the test."""
    if not PROMTOOL:
        pytest.skip("promtool is not on PATH: METRICS AND ALERTS ARE NOT CHECKED")
    done = subprocess.run([PROMTOOL, *arguments], input=text, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


def scraped(queue: Queue) -> str:
    answer = Client(API(Settings(), queue)).get("/metrics")
    assert answer.status == 200, answer
    return answer.body.decode()


def samples(queue: Queue) -> Samples:
    families = list(text_string_to_metric_families(scraped(queue)))
    found = [sample for family in families for sample in family.samples]
    values = {(s.name, *(s.labels[name] for name in sorted(s.labels))): s.value for s in found}
    assert len(values) == len(found), "duplicate sample"
    return values


def run(queue: Queue, worker: str, verb: Any = "complete", took: int = 0, **more: Any) -> Job:
    """Start the next job of the default queue and settle it `took` milliseconds later."""
    [job] = queue.dequeue(worker, ["default"])
    queue.clock.ahead += took
    queue.settle(worker, [Outcome(job, verb, **more)])
    return job


def buckets(values: Samples, name: str, type: str = "echo") -> dict[str, float]:
    return {key[1]: value for key, value in values.items() if key[0] == f"tinyqueue_{name}_bucket" and key[3] == type}


# Values ---------------------------------------------------------------------------------------------------------------


def test_metrics_count_every_event_of_a_job(queue: Queue) -> None:
    worker = queue.register(["default"], 7)
    for _ in range(6):
        queue.enqueue("echo", {})
    run(queue, worker)
    run(queue, worker, "fail", error=Failure("Boom", "it broke"))
    run(queue, worker, "fail", error=Failure("Boom", "it broke"), after=60)
    run(queue, worker, "release")
    [lost] = queue.dequeue(worker, ["default"])
    revived = newest(queue, "failed")[0]
    queue.retry(revived.id)
    queue.cancel(revived.id)
    lapse(queue, worker)
    queue.reap(worker)
    values = samples(queue)
    counted = {
        key[0].removeprefix("tinyqueue_jobs_"): value for key, value in values.items() if key[1:] == ("default", "echo")
    }
    assert {name: value for name, value in counted.items() if name.endswith("_total")} == {
        "enqueued_total": 6,
        "started_total": 5,
        "completed_total": 1,
        "failed_total": 1,
        "retried_total": 1,
        "released_total": 1,
        "reaped_total": 1,
        "revived_total": 1,
        "cancelled_total": 1,
    }
    assert values["tinyqueue_jobs", "default", "pending"] == 4
    assert values["tinyqueue_jobs", "default", "processing"] == 0
    assert values["tinyqueue_jobs_delayed",] == 1
    assert lost.id in {job.id for job in newest(queue, "pending")}


def test_metrics_agree_with_stats(queue: Queue) -> None:
    for status in ("completed", "failed", "cancelled", "processing", "delayed", "pending"):
        put(queue, status, queue=f"q.{status}")
    queue.pause("q.pending")
    queue.clock.ahead += 5000
    values, stats, workers = samples(queue), queue.stats(), queue.workers()
    for name, counts in stats["queues"].items():
        assert values["tinyqueue_jobs", name, "pending"] == counts["pending"]
        assert values["tinyqueue_jobs", name, "processing"] == counts["processing"]
        assert values["tinyqueue_queue_paused", name] == counts["paused"]
    assert values["tinyqueue_oldest_waiting_seconds", "q.pending"] == pytest.approx(
        stats["oldestWaitingMs"] / 1000, abs=0.5
    )
    for status in ("completed", "failed", "cancelled"):
        assert values["tinyqueue_jobs_kept", status] == stats[status] == 1
        ended = sum(value for key, value in values.items() if key[0] == f"tinyqueue_jobs_{status}_total")
        assert ended == stats["total"][status] == 1
    assert values["tinyqueue_jobs_delayed",] == stats["delayed"] == 1
    assert values["tinyqueue_workers",] == stats["workers"] == len(workers) == 1


def test_metrics_count_slots_of_alive_workers_only(queue: Queue) -> None:
    alive, dead = queue.register(["default"], 5), queue.register(["default"], 3)
    queue.heartbeat(alive, ["a", "b"])
    queue.heartbeat(dead, ["c"])
    lapse(queue, dead)
    values = samples(queue)
    assert (values["tinyqueue_workers",], values["tinyqueue_slots",], values["tinyqueue_slots_busy",]) == (1, 5, 2)


def test_metrics_measure_waiting_and_running_times(queue: Queue) -> None:
    worker = queue.register(["default"], 1)
    for waited, ran in ((0, 20_000), (400, 40), (7_200_000, 0)):
        queue.enqueue("echo", {})
        queue.clock.ahead += waited
        run(queue, worker, took=ran)
    values = samples(queue)
    waiting, running = buckets(values, "job_waiting_seconds"), buckets(values, "job_running_seconds")
    assert [waiting[le] for le in ("0.25", "1.0", "1800.0", "+Inf")] == [1, 2, 2, 3]
    assert [running[le] for le in ("0.01", "0.25", "15.0", "60.0", "+Inf")] == [1, 2, 2, 3, 3]
    assert values["tinyqueue_job_waiting_seconds_sum", "default", "echo"] == pytest.approx(7200.4, abs=0.5)
    assert values["tinyqueue_job_running_seconds_sum", "default", "echo"] == pytest.approx(20.04, abs=0.5)
    assert values["tinyqueue_job_running_seconds_count", "default", "echo"] == 3


def test_waiting_time_starts_when_a_job_is_due(queue: Queue) -> None:
    worker = queue.register(["default"], 1)
    queue.enqueue("echo", {}, delay=600)
    queue.clock.ahead += 600_000
    queue.promote()
    run(queue, worker, "fail", took=50_000, error=Failure("Boom", "it broke"), after=300)
    queue.clock.ahead += 300_000
    queue.promote()
    run(queue, worker, "release", took=90_000)
    queue.clock.ahead += 2_000
    run(queue, worker)
    values = samples(queue)
    assert values["tinyqueue_job_waiting_seconds_sum", "default", "echo"] == pytest.approx(2.0, abs=0.5)
    assert values["tinyqueue_job_running_seconds_sum", "default", "echo"] == pytest.approx(50.0, abs=0.5)


def test_counter_is_exposed_as_zero_before_its_first_event(queue: Queue) -> None:
    put(queue, "pending")
    values = samples(queue)
    for name in ("failed", "retried", "reaped", "released", "cancelled", "revived", "completed", "started"):
        assert values[f"tinyqueue_jobs_{name}_total", "default", "echo"] == 0


def test_counters_of_a_registered_type_are_zero_before_its_first_job(queue: Queue, no_handlers: None) -> None:
    @tinyqueue.handler("greet", queue="mail")
    def greet(payload: dict[str, Any]) -> None: ...

    values = samples(queue)
    for name in ("enqueued", "started", "completed", "failed", "cancelled", "retried", "reaped"):
        assert values[f"tinyqueue_jobs_{name}_total", "mail", "greet"] == 0


def test_failures_of_a_registered_type_are_zero_in_each_served_queue(queue: Queue, no_handlers: None) -> None:
    @tinyqueue.handler("greet", queue="mail")
    def greet(payload: dict[str, Any]) -> None: ...

    before = {"mail"}
    for served in (["bulk", "mail"], ["urgent"]):
        queue.register(served, 1)
        before |= {*served}
        values = samples(queue)
        for name in ("failed", "retried", "reaped"):
            zeros = {key[1] for key, value in values.items() if key[0] == f"tinyqueue_jobs_{name}_total" and value == 0}
            assert zeros == before


def test_zeros_of_many_types_and_queues_stay_within_the_limit(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, no_handlers: None
) -> None:
    monkeypatch.setattr(tinyqueue_metrics, "SERIES", 10)

    def greet(payload: dict[str, Any]) -> None: ...

    for number in range(8):
        tinyqueue.handler(f"greet-{number}")(greet)
    queue.register(["default", "bulk", "mail"], 1)
    assert sum(key[0] == "tinyqueue_jobs_failed_total" for key in samples(queue)) == 10


def test_expired_job_counts_as_failed_and_not_as_started(queue: Queue) -> None:
    worker = queue.register(["default"], 1)
    queue.enqueue("echo", {}, expires_in=1)
    queue.clock.ahead += 2000
    assert queue.dequeue(worker, ["default"]) == []
    values = samples(queue)
    assert values["tinyqueue_jobs_failed_total", "default", "echo"] == 1
    assert values["tinyqueue_jobs_started_total", "default", "echo"] == 0


def test_jobs_of_one_type_and_queue_share_their_metrics_writes(near: Queue, far: Queue, proxy: CutProxy) -> None:
    near.enqueue_many("echo", range(10))
    worker = near.register(["default"], 10)
    far.dequeue(worker, ["default"], 1)
    far.resume("other")  # from now on it knows the names
    proxy.packets.clear()
    jobs = far.dequeue(worker, ["default"], 9)
    far.settle(worker, [Outcome(job, "complete") for job in jobs])
    written = b"".join(proxy.packets)
    assert len(jobs) == 9
    # Two writes for the start and three for the outcome, plus those of the histogram buckets.
    assert written.count(b"{queue}:metrics") <= 7
    assert b"{queue}:series" not in written


# Counting once --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["reply", "request"])
def test_transaction_repeated_after_a_lost_packet_counts_once(
    near: Queue, far: Queue, proxy: CutProxy, lost: str
) -> None:
    cut = proxy.drop_reply if lost == "reply" else proxy.drop_request
    worker = near.register(["default"], 10)
    cut(b"EXEC")
    far.enqueue("echo", {})
    taken = near.take(worker, ["default"], 1)
    cut(b"EXEC")
    [job] = far.start(worker, taken)
    if lost == "request":  # the pending job is left to adopt
        [job] = far.start(worker, far.adopt(worker, ()))
    cut(b"EXEC")
    far.settle(worker, [Outcome(job, "fail", error=Failure("Boom", "it broke"))])
    cut(b"EXEC")
    far.retry(job.id)
    cut(b"EXEC")
    far.cancel(job.id)
    values = samples(near)
    for name in ("enqueued", "started", "failed", "revived", "cancelled"):
        assert values[f"tinyqueue_jobs_{name}_total", "default", "echo"] == 1, name
    assert values["tinyqueue_job_waiting_seconds_count", "default", "echo"] == 1
    assert values["tinyqueue_job_running_seconds_count", "default", "echo"] == 1


def test_duplicate_submits_count_once(queue: Queue, api: Client, no_handlers: None) -> None:
    tinyqueue.handler("echo")(_echo)
    body = {"type": "echo", "payload": 1, "uniqueKey": "u"}
    for headers in ({"Idempotency-Key": "k"}, {"Idempotency-Key": "k"}, {}):
        assert api.post("/jobs", body, headers).status in (200, 201)
    assert samples(queue)["tinyqueue_jobs_enqueued_total", "default", "echo"] == 1


def _echo(payload: object) -> object:
    return payload


# Names ----------------------------------------------------------------------------------------------------------------


def test_names_beyond_the_limit_count_as_other(server: Any, monkeypatch: pytest.MonkeyPatch, no_handlers: None) -> None:
    monkeypatch.setattr(tinyqueue, "SERIES", 3)
    monkeypatch.setattr(tinyqueue_metrics, "SERIES", 3)
    queue, another = server.queue(), server.queue()
    for number in range(5):
        (queue if number % 2 else another).enqueue("echo", {}, queue=f"q{number}")
    server.queue().enqueue("echo", {}, queue="q9")
    queue.enqueue("echo", {}, queue="q0")  # only the other process has counted this name so far
    values = {key[1]: value for key, value in samples(queue).items() if key[0] == "tinyqueue_jobs_enqueued_total"}
    assert values == {"q0": 2, "q1": 1, "q2": 1, "other": 3}
    assert len({key[1] for key in samples(queue) if key[0] == "tinyqueue_jobs"}) == 3
    assert raw(queue).scard(queue.keys.series) == 3


def test_batch_with_many_new_names_stays_within_the_limit(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyqueue, "SERIES", 10)
    queue = server.queue()
    queue.submit([queue.draft("echo", {}, queue=f"q{number}") for number in range(100)])
    assert raw(queue).scard(queue.keys.series) == 10
    assert len(samples(queue)) < 10 * 60
    assert samples(queue)["tinyqueue_jobs_enqueued_total", "other", "other"] == 90


def test_unknown_fields_in_the_metrics_hash_are_ignored(server: Any) -> None:
    queue = server.queue()
    put(queue, "completed")
    queue.cancel(put(queue, "pending").id)  # a waiting job would grow older between the two scrapes
    before = samples(queue)
    for field in (
        'completed:a"b\n:q',
        "completed:\xe9:q",
        "completed:a",
        "completed:echo:default:9",
        "x\n:a:b",
        "",
        ":::",
    ):
        raw(queue).hset(queue.keys.metrics, field.encode("latin-1"), 5)
    assert samples(queue) == before


@pytest.mark.parametrize("name", ["A", "a.b-c_d", "9", "x" * 100, "le", "inf"])
def test_every_valid_name_is_exposed(queue: Queue, name: str) -> None:
    job = queue.enqueue(name, {}, queue=name)
    worker = queue.register([name], 1)
    [job] = queue.dequeue(worker, [name])
    queue.complete(job)
    values = samples(queue)
    assert values["tinyqueue_jobs_completed_total", name, name] == 1
    assert values["tinyqueue_job_running_seconds_bucket", "+Inf", name, name] == 1
    promtool("check", "metrics", text=scraped(queue))


# Format ---------------------------------------------------------------------------------------------------------------


def test_metrics_pass_promtool(queue: Queue) -> None:
    promtool("check", "metrics", text=scraped(queue))
    for status in ("completed", "failed", "cancelled", "delayed", "processing"):
        put(queue, status, queue=status)
    promtool("check", "metrics", text=scraped(queue))


def test_metrics_use_openmetrics_when_accepted(queue: Queue, api: Client) -> None:
    put(queue, "completed")
    plain = api.get("/metrics")
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    open = api.get("/metrics", {"Accept": "application/openmetrics-text; version=1.0.0"})
    assert open.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert open.body.endswith(b"# EOF\n")
    assert plain.headers["cache-control"] == open.headers["cache-control"] == "no-store"


def test_metrics_return_503_without_redis() -> None:
    answer = Client(API(Settings(), Queue.from_url(f"redis://127.0.0.1:{free_port()}/0"))).get("/metrics")
    assert (answer.status, answer.kind) == (503, "unavailable")


def test_failed_scrapes_are_counted_once_redis_is_back(start_redis: Any) -> None:
    server = start_redis()
    queue = Queue.from_url(server.url)
    api = Client(API(Settings(), queue))
    assert b"tinyqueue_scrape_errors_total 0.0" in api.get("/metrics").body
    server.stop()
    assert [api.get("/metrics").status for _ in range(3)] == [503] * 3
    server.start()
    assert [b"tinyqueue_scrape_errors_total 3.0" in api.get("/metrics").body for _ in range(2)] == [True, True]
    queue.pool.disconnect()


# deploy/ --------------------------------------------------------------------------------------------------------------


def exposed() -> set[str]:
    suffixes = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {f"tinyqueue_{name}{suffix}" for name, kind, *_ in METRICS for suffix in suffixes[kind]}


def test_used_queue_exposes_every_metric(queue: Queue, no_handlers: None) -> None:
    @handler("limited", max_running=1)
    def limited(payload: object) -> None: ...

    put(queue, "completed")
    put_schedule(queue, make_schedule("nightly", "@daily", "echo", {}))
    assert {key[0] for key in samples(queue)} == exposed()


@pytest.mark.parametrize("name", ["alerts.yml", "grafana-dashboard.json"])
def test_deploy_files_use_existing_metrics(name: str) -> None:
    named = set(re.findall(r"tinyqueue_\w+", (DEPLOY / name).read_text()))
    assert named
    assert named <= exposed()


def test_alerts_are_valid_and_documented() -> None:
    promtool("check", "rules", str(DEPLOY / "alerts.yml"))
    text = (DEPLOY / "alerts.yml").read_text()
    alerts = text.split("- alert: ")[1:]
    assert len(alerts) >= 4
    for alert in alerts:
        assert "summary:" in alert
        assert "description:" in alert
        assert "severity:" in alert


def test_alerts_name_checks_that_exist() -> None:
    named = re.findall(r'check!?[=~]+"([\w|]+)"', (DEPLOY / "alerts.yml").read_text())
    assert len(named) == 2
    assert {name for names in named for name in names.split("|")} <= CHECKS.keys()


def test_alerts_fire_only_when_they_should() -> None:
    promtool("test", "rules", str(Path(__file__).with_name("alerts_test.yml")))
    tested = set(re.findall(r'alertname="(\w+)"', Path(__file__).with_name("alerts_test.yml").read_text()))
    assert tested == set(re.findall(r"- alert: (\w+)", (DEPLOY / "alerts.yml").read_text()))


@pytest.fixture(scope="module")
def dashboard() -> Any:
    return json.loads((DEPLOY / "grafana-dashboard.json").read_text())


def test_dashboard_queries_are_valid_promql(dashboard: Any, tmp_path: Path) -> None:
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    plain = [re.sub(r"\$(job|queue)\b", ".*", expr.replace("$__rate_interval", "5m")) for expr in queries]
    assert not [expr for expr in plain if "$" in expr]
    rules = [{"record": f"query:{number}", "expr": expr} for number, expr in enumerate(plain)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    promtool("check", "rules", str(tmp_path / "rules.yml"))


def test_dashboard_imports_with_any_data_source(dashboard: Any) -> None:
    assert dashboard["id"] is None
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    sources = [variable["datasource"] for variable in variables.values() if "datasource" in variable]
    sources += [part["datasource"] for panel in dashboard["panels"] for part in (panel, *panel["targets"])]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard)))
    assert used - {"__rate_interval", "__all"} == variables.keys()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_dashboard_panels_do_not_overlap(dashboard: Any) -> None:
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert all(x < 24 for x, _ in cells)


def test_metrics_ignore_an_accept_header_that_is_not_text(queue: Queue, api: Client) -> None:
    assert api.get("/metrics", {"Accept": "\xff"}).status == 200
