"""Check how the threads of one worker pass on jobs and outcomes, in every interleaving.

    python tests/cycle_model.py [--slots 2] [--jobs 3] [--without GUARD]

A step is a statement of worker.py whose effect another thread can see. A handler may run for ever.
So when only handlers and the bell could go on, no started job may be left in the inbox, and no
outcome may be left unsaved: a slot must have been woken for them. With --without, one of the guards
is left out. Then the search finds a wrong state, and prints the steps to it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import click
from protocol_model import search

GUARDS = {
    "most": "an exchange starts no more jobs than it saves outcomes",
    "chain": "a slot that leaves something wakes another before it runs its job",
    "again": "a slot looks for work again after each exchange",
    "clear": "a slot that was woken resets `waking` before it looks for work, not after",
    "taker": "the taker wakes a slot after it held the cycle",
    "error": "the taker does so even after an error that ends it",
    "enter": "new jobs count as held before saved ones leave",
}


class Slot(NamedTuple):
    at: str = "look"
    batch: int = 0  # outcomes that it saves
    came: int = 0  # jobs that it started in exchange


class State(NamedTuple):
    slots: tuple[Slot, ...]
    jobs: int  # in the queue
    taker: str = "wait"
    free: int = 0  # free slots that the taker has counted
    tokens: int = 0  # free slots that it has not counted yet
    inbox: int = 0
    outcomes: int = 0
    held: int = 0  # started jobs that are not settled, as threads see them that wait until nothing runs
    wakes: int = 0
    waking: bool = False
    locked: bool = False  # the cycle

    def slot(self, at: int, to: str, batch: int = 0, came: int = 0, **changes: object) -> State:
        slots = (*self.slots[:at], Slot(to, batch, came), *self.slots[at + 1 :])
        return self._replace(slots=tuple(sorted(slots)), **changes)  # type: ignore[arg-type]

    def woken(self) -> dict[str, object]:
        return {} if self.waking else {"waking": True, "wakes": self.wakes + 1}


Step = tuple[str, State]


class Cycle:
    def __init__(self, slots: int, jobs: int, without: str = "") -> None:
        self.without = without
        self.first = State((Slot(),) * slots, jobs, tokens=slots)

    def guarded(self, guard: str) -> bool:
        return guard != self.without

    def steps(self, state: State) -> Iterator[Step]:
        yield from self.goes_on(state)
        for at, slot in enumerate(state.slots):
            if slot.at == "run":
                yield "a handler ends", state.slot(at, "look", outcomes=state.outcomes + 1)
        if state.taker == "bell" and state.jobs:
            yield "the bell rings", state._replace(taker="count")

    def goes_on(self, state: State) -> Iterator[Step]:
        """The steps that wait for no handler and no bell."""
        for at, slot in enumerate(state.slots):
            yield from getattr(self, "slot_" + slot.at)(state, at, slot)
        yield from getattr(self, "taker_" + state.taker)(state)

    # A slot

    def slot_look(self, state: State, at: int, slot: Slot) -> Iterator[Step]:
        if state.inbox:
            yield "a slot takes a job", state.slot(at, "begin", inbox=state.inbox - 1)
        elif state.outcomes:
            yield "a slot finds outcomes", state.slot(at, "try")
        else:
            yield "a slot finds nothing", state.slot(at, "rest" if self.guarded("clear") else "clear")

    def slot_begin(self, state: State, at: int, slot: Slot) -> Iterator[Step]:
        left = (state.inbox or state.outcomes) and self.guarded("chain")
        yield "a slot runs a job", state.slot(at, "run", **(state.woken() if left else {}))

    def slot_run(self, state: State, at: int, slot: Slot) -> Iterator[Step]:
        yield from ()

    def slot_try(self, state: State, at: int, slot: Slot) -> Iterator[Step]:
        if state.locked:
            yield "a slot finds the cycle held", state.slot(at, "rest")
        else:
            yield "a slot holds the cycle", state.slot(at, "save", state.outcomes, outcomes=0, locked=True)

    def slot_save(self, state: State, at: int, slot: Slot) -> Iterator[Step]:
        most = slot.batch if self.guarded("most") else slot.batch + 1
        for came in range(min(most, state.jobs) + 1):
            then = state.slot(at, "enter", slot.batch, came, jobs=state.jobs - came)
            if not self.guarded("enter"):
                then = then._replace(held=state.held - slot.batch)
            yield f"a slot exchanges {slot.batch} outcomes for {came} jobs", then

    def slot_enter(self, state: State, at: int, slot: Slot) -> Iterator[Step]:
        changes = {"held": state.held + slot.came, "inbox": state.inbox + slot.came}
        yield "its new jobs are held", state.slot(at, "leave", slot.batch, slot.came, **changes)

    def slot_leave(self, state: State, at: int, slot: Slot) -> Iterator[Step]:
        held = state.held - slot.batch if self.guarded("enter") else state.held
        yield "its saved jobs are not", state.slot(at, "let", slot.batch, slot.came, held=held)

    def slot_let(self, state: State, at: int, slot: Slot) -> Iterator[Step]:
        yield "a slot lets go of the cycle", state.slot(at, "report", slot.batch, slot.came, locked=False)

    def slot_report(self, state: State, at: int, slot: Slot) -> Iterator[Step]:
        tokens = state.tokens + max(0, slot.batch - slot.came)
        yield "a slot reports free slots", state.slot(at, "look" if self.guarded("again") else "rest", tokens=tokens)

    def slot_rest(self, state: State, at: int, slot: Slot) -> Iterator[Step]:
        if state.wakes:
            then = "clear" if self.guarded("clear") else "look"
            yield "a slot wakes", state.slot(at, then, wakes=state.wakes - 1)

    def slot_clear(self, state: State, at: int, slot: Slot) -> Iterator[Step]:
        yield "it says so", state.slot(at, "look" if self.guarded("clear") else "rest", waking=False)

    # The taker

    def taker_wait(self, state: State) -> Iterator[Step]:
        if state.tokens:
            yield "the taker counts free slots", state._replace(taker="count")

    def taker_count(self, state: State) -> Iterator[Step]:
        yield "the taker waits for the cycle", state._replace(taker="lock", free=state.free + state.tokens, tokens=0)

    def taker_lock(self, state: State) -> Iterator[Step]:
        if not state.locked:
            yield "the taker holds the cycle", state._replace(taker="take", locked=True)

    def taker_take(self, state: State) -> Iterator[Step]:
        came = min(state.free, state.jobs)
        changes = {"jobs": state.jobs - came, "held": state.held + came, "inbox": state.inbox + came}
        yield f"the taker starts {came} jobs", state._replace(taker="let", free=state.free - came, **changes)  # type: ignore[arg-type]

        yield "the taker cannot take jobs", state._replace(taker="fail")

    def taker_fail(self, state: State) -> Iterator[Step]:
        yield "the taker lets go of the cycle", state._replace(taker="stop", locked=False)

    def taker_stop(self, state: State) -> Iterator[Step]:
        woken = state.woken() if (state.inbox or state.outcomes) and self.guarded("error") else {}
        yield "the taker ends", state._replace(taker="gone", **woken)  # type: ignore[arg-type]

    def taker_gone(self, state: State) -> Iterator[Step]:
        yield from ()

    def taker_let(self, state: State) -> Iterator[Step]:
        yield "the taker lets go of the cycle", state._replace(taker="wake", locked=False)

    def taker_wake(self, state: State) -> Iterator[Step]:
        woken = state.woken() if (state.inbox or state.outcomes) and self.guarded("taker") else {}
        yield "the taker goes on", state._replace(taker="bell" if state.free else "wait", **woken)  # type: ignore[arg-type]

    def taker_bell(self, state: State) -> Iterator[Step]:
        yield from ()

    # States that must never occur

    def wrong(self, state: State) -> str:
        started = state.inbox + state.outcomes
        started += sum(
            {"begin": 1, "run": 1, "save": slot.batch, "enter": slot.came}.get(slot.at, 0) for slot in state.slots
        )
        if started and not state.held:
            return "nothing is held, but jobs were started"
        if (state.inbox or state.outcomes) and not any(self.goes_on(state)):
            return f"{state.inbox} jobs and {state.outcomes} outcomes wait for a handler to end"
        return ""


@click.command()
@click.option("--slots", default=2, show_default=True)
@click.option("--jobs", default=3, show_default=True)
@click.option("--without", type=click.Choice(list(GUARDS)), help="Leave a guard out.")
def main(slots: int, jobs: int, without: str | None) -> None:
    """Search all states of a worker with these slots, and jobs to take."""
    states, why, path = search(Cycle(slots, jobs, without or ""))
    click.echo("\n".join([*path, f"{states} states: {why or 'no state is wrong'}"]))
    sys.exit(bool(why))


if __name__ == "__main__":
    main()
