"""The protocol holds in every interleaving of small worlds, and fails without any of its guards."""

from __future__ import annotations

import pytest
from cycle_model import GUARDS as CYCLE_GUARDS, Cycle
from dependency_model import GUARDS as DEPENDENCY_GUARDS, NEEDED_IN, WORLDS as DEPENDENCY_WORLDS, Dependencies
from limit_model import GUARDS as LIMIT_GUARDS, NEEDS, WORLDS, World as LimitWorld
from protocol_model import GUARDS, World, search
from schedule_model import PERIOD, SYNC, TICKS, Sync, Ticks

pytestmark = pytest.mark.flaky(reruns=0)  # a search visits the same states every time


@pytest.mark.parametrize(
    ("jobs", "workers", "pill"),
    [(1, 1, False), (1, 2, False), (1, 3, False), (2, 1, False), (2, 2, True), (3, 2, True)],
)
def test_protocol_holds_in_every_interleaving(jobs: int, workers: int, pill: bool) -> None:
    states, why, path = search(World(jobs, workers, pill))
    assert not why, f"{why}: {path}"
    assert states > 300, "the search visited too few states"


@pytest.mark.parametrize("guard", GUARDS)
def test_protocol_fails_without_any_of_its_guards(guard: str) -> None:
    if guard in ("beside", "alone"):
        world = World(2, 1, pill=True, without=guard)
    elif guard == "cycle":
        world = World(2, 1, without=guard)
    else:
        world = World(1, 1 if guard in ("leave", "same", "quiet", "unmark") else 2, without=guard)
    assert search(world)[1], GUARDS[guard]


@pytest.mark.parametrize(("slots", "jobs"), [(1, 9), (2, 4), (3, 4)])
def test_slots_pass_on_jobs_and_outcomes_in_every_interleaving(slots: int, jobs: int) -> None:
    states, why, path = search(Cycle(slots, jobs))
    assert not why, f"{why}: {path}"
    assert states > 300, "the search visited too few states"


@pytest.mark.parametrize("guard", CYCLE_GUARDS)
def test_slots_leave_work_undone_without_any_of_their_guards(guard: str) -> None:
    assert search(Cycle(2, 4, without=guard))[1], CYCLE_GUARDS[guard]


@pytest.mark.parametrize("world", DEPENDENCY_WORLDS)
def test_dependents_wait_for_no_ended_job_in_every_interleaving(world: str) -> None:
    states, why, path = search(Dependencies(**DEPENDENCY_WORLDS[world]))
    assert not why, f"{why}: {path}"
    assert states > 3000, "the search visited too few states"


@pytest.mark.parametrize("guard", DEPENDENCY_GUARDS)
def test_dependents_fail_without_any_of_their_guards(guard: str) -> None:
    assert search(Dependencies(**DEPENDENCY_WORLDS[NEEDED_IN.get(guard, "two")], without=guard))[1], DEPENDENCY_GUARDS[
        guard
    ]


@pytest.mark.parametrize("world", sorted(WORLDS.keys() - {"ahead"}))
def test_limits_hold_in_every_interleaving(world: str) -> None:
    states, why, path = search(LimitWorld(**WORLDS[world]))
    assert not why, f"{why}: {path}"
    assert states > 100, "the search visited too few states"


@pytest.mark.parametrize("guard", LIMIT_GUARDS)
def test_limits_fail_without_any_of_their_guards(guard: str) -> None:
    assert search(LimitWorld(**WORLDS[NEEDS[guard]], without=guard))[1], LIMIT_GUARDS[guard]


@pytest.mark.parametrize(("workers", "catchup"), [(1, 1), (1, PERIOD), (2, 1)])
def test_ticks_hold_in_every_interleaving(workers: int, catchup: int) -> None:
    states, why, path = search(Ticks(workers, catchup=catchup))
    assert not why, f"{why}: {path}"
    assert states > 3000, "the search visited too few states"


@pytest.mark.parametrize("guard", TICKS)
def test_ticks_fail_without_any_of_their_guards(guard: str) -> None:
    assert search(Ticks(2, guard, PERIOD if guard == "fold" else 1))[1], TICKS[guard]


def test_sync_of_two_releases_holds_in_every_interleaving() -> None:
    states, why, path = search(Sync())
    assert not why, f"{why}: {path}"
    assert states > 300, "the search visited too few states"


@pytest.mark.parametrize("guard", SYNC)
def test_sync_of_two_releases_fails_without_any_of_its_guards(guard: str) -> None:
    assert search(Sync(guard))[1], SYNC[guard]
