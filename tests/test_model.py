"""The protocol holds in every interleaving of small worlds, and fails without any of its guards."""

from __future__ import annotations

import pytest
from protocol_model import GUARDS, World, search


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
        world = World(1, 1 if guard == "leave" else 2, without=guard)
    assert search(world)[1], GUARDS[guard]
