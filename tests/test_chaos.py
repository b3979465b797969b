"""Fifty chaos trials, always the same ones, sure interruptions, and tests of the plan and of the judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from signal import SIGKILL, SIGTERM
from typing import Any

import pytest
from chaos import (
    CC,
    KINDS,
    Cut,
    Death,
    Evidence,
    Fault,
    Plan,
    Run,
    Signal,
    Submit,
    Verdict,
    World,
    cause_of,
    judge,
    open_world,
    plan,
    plan_interruption,
    read_marks,
    run_trials,
)

from tinyqueue import Failure, Job

pytestmark = pytest.mark.flaky(reruns=0)  # one lost job is one too many
ID = "01a212e8-0d63-7018-974e-7771d63fb8fa"
OTHER = "01a212e8-0d63-7019-a567-10510823b04c"


def test_inject_faults_without_losing_or_repeating_jobs(start_redis: Callable[..., Any]) -> None:
    results = list(run_trials(range(1, 51), parallel=4))
    crashed = [result for result in results if isinstance(result, str)]
    assert crashed == []
    done = [result for result in results if not isinstance(result, str)]
    failed = {result.plan.seed: (result.failures, result.evidence) for result in done if result.failures}
    assert failed == {}
    assert {kind for result in done for kind in result.plan.kinds} == set(KINDS)


@pytest.fixture(scope="module")
def world(start_redis: Callable[..., Any]) -> Iterator[World]:
    with open_world() as world:
        yield world


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("kill-worker", "killed"),
        ("term", "told to stop"),
        ("stop-long", "cut off"),
        ("link-stall-long", "cut off"),
        ("link-reset-long", "cut off"),
    ],
)
def test_run_a_job_again_after_a_fault_that_surely_interrupts_it(world: World, kind: str, cause: str) -> None:
    result = world.trial(plan_interruption(kind))
    assert result.failures == [], result.evidence
    assert result.verdict.explained == {cause: 1}, result.evidence


def test_run_jobs_while_clocks_are_wrong(world: World) -> None:
    if not CC:
        pytest.skip("no C compiler: NO FAULT CHANGES A CLOCK")
    faults = [Fault(kind, 0.0, "worker-0", 0.1) for kind in ("clock-ahead", "clock-back", "wrong-clock")]
    result = world.trial(Plan(0, faults, plan(1).submits))
    assert result.failures == [], result.evidence


def test_run_a_job_again_after_its_handler_failed(world: World) -> None:
    flaky = submit(type="flaky", payloads=[{"token": "t.0", "fails": 2}], ids=[])
    result = world.trial(Plan(0, [], [flaky]))
    assert result.failures == [], result.evidence
    assert result.verdict.explained == {"failed": 2}, result.evidence


# The plan -------------------------------------------------------------------------------------------------------------


def test_plan_depends_on_the_seed_alone() -> None:
    assert plan(7) == plan(7)
    assert plan(7) != plan(8)


def test_plan_covers_every_kind_of_fault() -> None:
    assert {plan(seed).faults[0].kind for seed in range(len(KINDS))} == set(KINDS)


# The judge ------------------------------------------------------------------------------------------------------------


def submit(**changes: Any) -> Submit:
    given = {
        "token": "t",
        "at": 0.0,
        "via": "http",
        "type": "work",
        "payloads": [{"token": "t.0"}],
        "delay": 0.0,
        "ids": [ID],
    }
    return Submit(**given | {"patient": True, "cancel": False} | changes)


def job(**changes: Any) -> Job:
    given = {
        "id": ID,
        "type": "work",
        "payload": {"token": "t.0"},
        "status": "completed",
        "attempts": 1,
        "max_attempts": 10,
    }
    return Job(**given | {"result": "t.0"} | changes)


def run(begin: float = 1.0, end: float = 1.1, **changes: Any) -> Run:
    given = {"id": ID, "attempt": 1, "pid": 100, "worker": "w", "begin": begin, "end": end, "how": "end"}
    return Run(**given | changes)


def evidence(**changes: Any) -> Evidence:
    """Make the evidence of a trial in which one job was submitted, ran once and completed."""
    submits = changes.pop("submits", [submit()])
    faults = changes.pop("faults", ["kill-worker"])
    trial = Plan(1, [Fault(kind, 0.1, "worker-0", 1.0) for kind in faults], submits)
    given = {"plan": trial, "records": [job()], "runs": [run()], "signals": [], "deaths": [], "cuts": [], "logs": {}}
    return Evidence(**given | {"names": {100: "worker-0", 200: "worker-1"}} | changes)


def findings(verdict: Verdict) -> dict[str, int]:
    return {name: len(getattr(verdict, name)) for name in ("lost", "unexplained", "wrong") if getattr(verdict, name)}


def test_judge_accepts_a_trial_without_faults() -> None:
    assert findings(judge(evidence())) == {}


def test_judge_reports_an_accepted_job_that_is_gone() -> None:
    assert findings(judge(evidence(records=[], runs=[]))) == {"lost": 1}


def test_judge_reports_a_job_that_ran_and_is_gone() -> None:
    assert findings(judge(evidence(submits=[submit(ids=[], doubtful=True)], records=[]))) == {"lost": 1}


def test_judge_reports_a_job_that_has_not_ended() -> None:
    assert findings(judge(evidence(records=[job(status="pending")]))) == {"lost": 1}


def test_judge_reports_a_submit_that_made_two_jobs() -> None:
    assert findings(judge(evidence(records=[job(), job(id=OTHER)], runs=[run(), run(id=OTHER)]))) == {"wrong": 1}


def test_judge_accepts_a_job_or_none_for_an_unanswered_submit() -> None:
    unanswered = [submit(ids=[], doubtful=True)]
    assert findings(judge(evidence(submits=unanswered))) == {}
    assert findings(judge(evidence(submits=unanswered, records=[], runs=[]))) == {}


def test_judge_reports_a_refused_submit_that_was_stored() -> None:
    assert findings(judge(evidence(submits=[submit(ids=[])]))) == {"wrong": 1}


def test_judge_reports_a_batch_that_is_not_complete() -> None:
    batch = submit(via="batch", payloads=[{"token": "t.0"}, {"token": "t.1"}], ids=[], doubtful=True)
    assert findings(judge(evidence(submits=[batch]))) == {"lost": 1}


def test_judge_reports_a_job_that_nobody_submitted() -> None:
    assert findings(judge(evidence(submits=[]))) == {"wrong": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"result": "of another job"},
        {"status": "cancelled"},
        {"status": "failed", "error": Failure("WorkerLost", "worker lost (attempt 1/10)")},
        {"status": "failed"},
    ],
)
def test_judge_reports_an_outcome_that_its_handler_does_not_have(changes: dict[str, Any]) -> None:
    assert findings(judge(evidence(records=[job(**changes)]))) == {"wrong": 1}


def test_judge_reports_a_completed_job_that_never_ran() -> None:
    assert findings(judge(evidence(runs=[]))) == {"wrong": 1}


def test_judge_reports_a_cancelled_job_that_ran() -> None:
    cancelled = submit(cancel=True, cancelled_at=0.5)
    assert findings(judge(evidence(submits=[cancelled], records=[job(status="cancelled")]))) == {"wrong": 1}


def test_judge_reports_a_run_without_a_cause() -> None:
    assert findings(judge(evidence(runs=[run(), run(2.0, 2.1, attempt=2, pid=200)]))) == {"unexplained": 1}


def test_judge_reports_overlapping_runs() -> None:
    runs = [run(1.0, 3.0), run(2.0, 2.1, attempt=2, pid=200)]
    signals = [Signal(1.5, 100, SIGTERM)]
    cuts = [Cut(1.5, 4.5, "worker-0")]
    assert findings(judge(evidence(runs=runs, cuts=cuts))) == {}
    late = [run(1.0, 9.0), *runs[1:]]
    assert findings(judge(evidence(runs=runs, signals=signals))) == {}  # a released job runs on until its process exits
    assert findings(judge(evidence(runs=late, signals=signals))) == {"unexplained": 1}


def test_judge_reports_a_job_that_kills_too_many_workers() -> None:
    dead = job(
        type="poison",
        status="failed",
        attempts=2,
        max_attempts=2,
        error=Failure("WorkerLost", "worker lost (attempt 2/2)"),
    )
    runs = [run(at, float("inf"), attempt=at, pid=at, how="") for at in range(1, 6)]
    deaths = [Death(at + 0.1, "worker-0", at, -SIGKILL) for at in range(1, 6)]
    changes = {"faults": ["poison"], "submits": [submit(type="poison")], "records": [dead]}
    assert findings(judge(evidence(runs=runs[:4], deaths=deaths[:4], **changes))) == {}
    assert findings(judge(evidence(runs=runs, deaths=deaths, **changes))) == {"wrong": 1}


def test_judge_reports_a_process_that_ended_by_itself() -> None:
    death = Death(1.5, "worker-0", 100, 70)
    assert findings(judge(evidence(deaths=[death]))) == {"wrong": 1}
    assert findings(judge(evidence(deaths=[death], signals=[Signal(1.4, 100, SIGTERM)]))) == {}


@pytest.mark.parametrize(
    ("cause", "earlier", "changes"),
    [
        ("failed", run(how="fail"), {}),
        ("", run(end=6.0, how="fail"), {}),  # it failed after the other had begun
        ("killed", run(end=float("inf"), how=""), {"deaths": [Death(1.2, "worker-0", 100, -SIGKILL)]}),
        ("told to stop", run(), {"signals": [Signal(1.05, 100, SIGTERM)]}),
        ("cut off", run(end=4.0), {"cuts": [Cut(1.05, 3.9, "worker-0")]}),
        ("", run(), {"deaths": [Death(1.2, "worker-1", 200, -SIGKILL)]}),  # of another worker
        ("", run(), {"deaths": [Death(9.0, "worker-0", 100, -SIGKILL)]}),  # too late
        ("", run(), {"cuts": [Cut(1.05, 3.9, "worker-1")]}),
        ("", run(), {"cuts": [Cut(0.1, 0.9, "worker-0")]}),  # it ended before the run began
    ],
)
def test_cause_of_explains_a_second_run(cause: str, earlier: Run, changes: dict[str, Any]) -> None:
    assert cause_of(earlier, run(5.0, 5.1, attempt=2, pid=200), evidence(**changes)) == cause


def test_read_marks_of_finished_and_unfinished_runs() -> None:
    lines = [
        "begin a 1 100 w 1.0",
        "begin b 1 100 w 1.1",
        "end a 1 100 w 1.2",
        "begin a 2 200 v 1.3",
        "fail a 2 200 v 1.4",
    ]
    assert read_marks([line.split() for line in lines]) == [
        Run("a", 1, 100, "w", 1.0, 1.2, "end"),
        Run("b", 1, 100, "w", 1.1),
        Run("a", 2, 200, "v", 1.3, 1.4, "fail"),
    ]


def test_read_marks_ignores_a_run_of_an_earlier_trial() -> None:
    assert read_marks([["fail", "a", "1", "100", "w", "1.0"]]) == []
