"""A TCP proxy in front of Redis that does something unkind to a packet: it cuts, delays, swallows or splits it. Or to all of them.

    with CutProxy(server.port) as proxy:
        far = Queue.from_url(proxy.url)
        proxy.drop_reply(b"EXEC")
        far.enqueue("echo", {})  # is applied, but its reply is lost

Each deed waits for the next packet from a client that holds its trigger, and is done once. What several packets shall suffer is
asked for several times. A packet is what one send of the client brings: up to 16 KB, which Redis reads and runs in one go.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from select import select
from typing import NamedTuple

Deed = Callable[
    [socket.socket, socket.socket, bytes], bool
]  # (client, server, packet) -> whether the connection goes on
SIZE = 1 << 16


def nothing() -> None:
    pass


class Rule(NamedTuple):
    trigger: bytes
    deed: Deed


class CutProxy:
    """Listens on `port`, forwards to a Redis on 127.0.0.1. `packets` are all that clients have sent."""

    def __init__(self, redis_port: int) -> None:
        self.redis_port = redis_port
        self.packets: list[bytes] = []
        self.delay = 0.0  # seconds that each packet is late, either way
        self.flowing = (
            threading.Event()
        )  # cleared: nothing passes, and nothing is lost; what was sent meanwhile comes late
        self.flowing.set()
        self._rules: list[Rule] = []
        self._lock = threading.Lock()  # of two packets that fit one rule, one gets it
        self._late: list[tuple[socket.socket, bytes]] = []
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._run(self._accept)

    # What can be done to a packet -------------------------------------------------------------------------------------

    def drop_reply(self, trigger: bytes, meanwhile: Callable[[], object] = nothing) -> None:
        """Forward the packet; when Redis has answered, run `meanwhile`, and cut the client off without the answer."""

        def deed(client: socket.socket, server: socket.socket, packet: bytes) -> bool:
            server.sendall(packet)
            server.recv(SIZE)
            meanwhile()
            return False

        self._rules.append(Rule(trigger, deed))

    def drop_request(self, trigger: bytes, meanwhile: Callable[[], object] = nothing) -> None:
        """Run `meanwhile` and cut the client off; Redis never sees the packet."""

        def deed(client: socket.socket, server: socket.socket, packet: bytes) -> bool:
            meanwhile()
            return False

        self._rules.append(Rule(trigger, deed))

    def hold(self, trigger: bytes, cut: bool = True) -> None:
        """Keep the packet, for Redis to receive at `deliver`; cut the client off, or let it wait until its own timeout."""

        def deed(client: socket.socket, server: socket.socket, packet: bytes) -> bool:
            self._late.append((server.dup(), packet))
            return not cut

        self._rules.append(Rule(trigger, deed))

    def deliver(self) -> list[bytes]:
        """Let the packets that are held arrive, and return what Redis answers."""
        answers = []
        late, self._late = self._late, []
        for server, packet in late:
            with server, suppress(ConnectionError):  # Redis itself may have been killed since
                server.sendall(packet)
                answers.append(server.recv(SIZE))
        return answers

    def swallow(self, trigger: bytes) -> None:
        """Forward nothing and answer nothing: the client waits until its own timeout."""
        self._rules.append(Rule(trigger, lambda client, server, packet: True))

    def answer(self, trigger: bytes, reply: bytes) -> None:
        """Answer in the place of Redis, which does not see the packet, and end the connection."""

        def deed(client: socket.socket, server: socket.socket, packet: bytes) -> bool:
            client.sendall(reply)
            return False

        self._rules.append(Rule(trigger, deed))

    def before(self, trigger: bytes, meanwhile: Callable[[], object]) -> None:
        """Run `meanwhile` before the packet is forwarded."""

        def deed(client: socket.socket, server: socket.socket, packet: bytes) -> bool:
            meanwhile()
            server.sendall(packet)
            return True

        self._rules.append(Rule(trigger, deed))

    def split(self, trigger: bytes, meanwhile: Callable[[], object]) -> None:
        """Forward what stands before the trigger; when Redis has answered that, run `meanwhile`; then forward the rest."""

        def deed(client: socket.socket, server: socket.socket, packet: bytes) -> bool:
            at = packet.index(trigger)
            server.sendall(packet[:at])
            client.sendall(server.recv(SIZE))
            meanwhile()
            server.sendall(packet[at:])
            return True

        self._rules.append(Rule(trigger, deed))

    def cut(self) -> None:
        """End all connections that are there."""
        for client in tuple(self._open):
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def heal(self) -> None:
        """Ask for nothing more, let everything flow, and forget what has passed. What is held arrives."""
        self._rules.clear()
        self.delay = 0.0
        self.flowing.set()
        self.packets.clear()
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self.deliver()

    @property
    def idle(self) -> bool:
        """Whether everything that was asked for has been done."""
        return not self._rules

    # The proxy itself -------------------------------------------------------------------------------------------------

    def __enter__(self) -> CutProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cut all connections and end all threads."""
        self.flowing.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(10)
        for end in (self._listener, *(server for server, _ in self._late)):
            end.close()

    def _run(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                client, _ = self._listener.accept()
                self._open.add(client)
                self._run(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with suppress(ConnectionError), client, socket.create_connection(("127.0.0.1", self.redis_port)) as server:
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while self._pass(client, server):
                pass
        self._open.discard(client)

    def _pass(self, client: socket.socket, server: socket.socket) -> bool:
        """Wait for a packet and pass it on; tell whether the connection goes on."""
        ready, _, _ = select([client, server], [], [])
        if self.delay:
            time.sleep(self.delay)
        self.flowing.wait()
        if server in ready:
            reply = server.recv(SIZE)
            client.sendall(reply)
            return bool(reply)
        if packet := client.recv(SIZE):
            self.packets.append(packet)
            return self._deed(packet)(client, server, packet)
        return False

    def _deed(self, packet: bytes) -> Deed:
        with self._lock:
            for rule in self._rules:
                if rule.trigger in packet:
                    self._rules.remove(rule)
                    return rule.deed
        return _forward


def _forward(client: socket.socket, server: socket.socket, packet: bytes) -> bool:
    server.sendall(packet)
    return True
