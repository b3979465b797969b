"""Lending connections: a connection that a thread uses is closed by no other thread, and an error ends none."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from conftest import RedisServer, Server, free_port, until
from cutproxy import CutProxy

from tinyqueue import Queue, Unavailable
from tinyqueue_redis import Connections, ask, connect
from tinyqueue_shards import Shards


class Trouble(Exception):
    """The translation of all errors of the client."""


@pytest.fixture
def connections(real: Server) -> Iterator[Connections]:
    connections = Connections(connect(real.url), Trouble, Trouble)
    yield connections
    connections.disconnect()


def ask_id(connection: object) -> int:
    """Return the number by which the server knows the connection."""
    [id] = ask(connection, [("CLIENT", "ID")])
    return int(id)


def lent_id(connections: Connections) -> int:
    with connections.lend() as connection:
        return ask_id(connection)


def elsewhere(call: Callable[[], object]) -> None:
    """Call it in another thread."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_disconnect_closes_a_lent_connection_when_it_is_returned(connections: Connections) -> None:
    with connections.lend() as connection:
        id = ask_id(connection)
        elsewhere(connections.disconnect)
        assert ask_id(connection) == id
    assert lent_id(connections) != id


def test_disconnect_closes_a_lent_connection_that_a_harmless_error_returns(connections: Connections) -> None:
    with suppress(Trouble), connections.lend() as connection:
        id = ask_id(connection)
        elsewhere(connections.disconnect)
        raise Trouble
    assert lent_id(connections) != id


def test_disconnect_closes_connections_that_were_just_used(connections: Connections) -> None:
    id = lent_id(connections)
    assert lent_id(connections) == id
    connections.disconnect()
    assert lent_id(connections) != id


def test_transaction_keeps_its_watch_while_another_thread_disconnects(real: Server) -> None:
    queue = real.queue()
    other = real.queue()
    runs = []

    def body(tx: object) -> None:
        runs.append(tx)
        tx.read(("GET", "watched"))  # type: ignore[attr-defined]
        if len(runs) == 1:
            elsewhere(queue.disconnect)
            other.store.read(("SET", "watched", "changed"))
        tx.write("SET", "written", "x")  # type: ignore[attr-defined]

    queue.store.transact(["watched"], body)
    assert len(runs) == 2


def test_threads_get_no_errors_while_another_disconnects(connections: Connections) -> None:
    asked: list[object] = []
    failed: list[Exception] = []
    done = threading.Event()

    def use() -> None:
        while not done.is_set():
            try:
                with connections.lend() as connection:
                    asked.append(ask_id(connection))
            except Exception as error:
                failed.append(error)

    users = [threading.Thread(target=use) for _ in range(4)]
    for user in users:
        user.start()
    while len(asked) < 500 and not failed:
        connections.disconnect()
    done.set()
    for user in users:
        user.join()
    assert failed == []


@pytest.fixture
def shards() -> Iterator[Shards]:
    """Two shards on a server that does not exist."""
    made = Shards([Queue.from_url(f"redis://127.0.0.1:{free_port()}/0", namespace=f"queue.{at}") for at in range(2)])
    yield made
    made.disconnect()


def named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def test_disconnect_ends_the_threads_that_ask_servers_that_are_away(shards: Shards) -> None:
    with pytest.raises(Unavailable):
        shards.enqueue("echo", 1)
    assert len(named("asks shard")) == 2
    shards.disconnect()
    assert named("asks shard") == []
    with pytest.raises(Unavailable):
        shards.enqueue("echo", 1)
    assert len(named("asks shard")) == 2


def test_thread_that_asks_a_hanging_shard_survives_that_its_connection_is_closed(
    start_redis: Callable[..., RedisServer],
) -> None:
    server = start_redis()
    queue = Shards([Queue.from_url(server.url)])
    connections = queue.parts[0].store.connections
    queue.ping()
    assert server.process
    server.process.send_signal(signal.SIGSTOP)
    with pytest.raises(Unavailable):
        queue.parts[0].ping()
    [asker] = named("asks shard")
    for _ in range(20):
        connections.pool.disconnect()
        asker.join(0.05)
    assert asker.is_alive()
    server.process.send_signal(signal.SIGCONT)
    until(lambda: not connections.away)
    queue.ping()
    queue.disconnect()


@pytest.mark.parametrize("address", [b"*2\r\n$9\r\n127.0.0.1\r\n$4\r\nport\r\n", b"*1\r\n$1\r\nh\r\n", b":1\r\n"])
def test_answer_that_no_sentinel_gives_is_reported_as_unavailable(
    real: Server, proxy: CutProxy, address: bytes
) -> None:
    queue = real.queue(f"redis+sentinel://127.0.0.1:{proxy.port}/jobs/0")
    for _ in range(20):
        proxy.answer(b"SENTINEL", address + b"*0\r\n")
    with pytest.raises(Unavailable, match="what answered is not a sentinel"):
        queue.ping()
    queue.disconnect()
    proxy.heal()


def test_sentinel_url_with_an_impossible_host_name_is_reported_as_unavailable() -> None:
    queue = Queue.from_url(f"redis+sentinel://{'x' * 70}:26379/jobs/0")
    with pytest.raises(Unavailable, match="the host name in REDIS_URL is not valid"):
        queue.ping()
