"""A TCP proxy in front of Redis that injects faults: it cuts, delays, swallows or splits packets.

    with CutProxy(server.port) as proxy:
        far = Queue.from_url(proxy.url)
        proxy.drop_reply(b"EXEC")
        far.enqueue("echo", {})  # is applied, but its reply is lost

Each fault waits for the next packet of a client that contains its trigger, and happens once. To hit
several packets, request the fault several times. A packet is what one send of the client delivers:
up to 16 KB, which Redis reads and runs at once.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from select import select
from typing import NamedTuple

# (client, server, packet) -> whether to keep the connection open
Fault = Callable[[socket.socket, socket.socket, bytes], bool]
SIZE = 1 << 16


def nothing() -> None:
    pass


class Rule(NamedTuple):
    trigger: bytes
    fault: Fault


class CutProxy:
    """Forwards from `port` to a Redis. `packets` holds everything that clients have sent."""

    def __init__(self, redis_port: int) -> None:
        self.redis_port = redis_port
        self.packets: list[bytes] = []
        self.delay = 0.0  # seconds by which each packet is delayed, in both directions
        self.flowing = threading.Event()  # while cleared, packets wait; none is lost
        self.flowing.set()
        self._rules: list[Rule] = []
        self._lock = threading.Lock()  # two packets must not trigger the same rule
        self._late: list[tuple[socket.socket, bytes]] = []
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._run(self._accept)

    # Faults -----------------------------------------------------------------------------------------------------------

    def drop_reply(self, trigger: bytes, meanwhile: Callable[[], object] = nothing) -> None:
        """Forward the packet. After its reply, run `meanwhile` and close the connection."""

        def fault(client: socket.socket, server: socket.socket, packet: bytes) -> bool:
            server.sendall(packet)
            server.recv(SIZE)
            meanwhile()
            return False

        self._rules.append(Rule(trigger, fault))

    def drop_request(self, trigger: bytes, meanwhile: Callable[[], object] = nothing) -> None:
        """Run `meanwhile` and close the client's connection. Redis never sees the packet."""

        def fault(client: socket.socket, server: socket.socket, packet: bytes) -> bool:
            meanwhile()
            return False

        self._rules.append(Rule(trigger, fault))

    def hold(self, trigger: bytes, cut: bool = True) -> None:
        """Hold the packet back until `deliver`.

        Closes the client's connection, or with cut=False, leaves it waiting for its own timeout.
        """

        def fault(client: socket.socket, server: socket.socket, packet: bytes) -> bool:
            self._late.append((server.dup(), packet))
            return not cut

        self._rules.append(Rule(trigger, fault))

    def deliver(self) -> list[bytes]:
        """Send the packets that were held back to Redis, and return its replies."""
        answers = []
        late = self._late
        self._late = []
        for server, packet in late:
            with server, suppress(ConnectionError):  # Redis may have been killed meanwhile
                server.sendall(packet)
                answers.append(server.recv(SIZE))
        return answers

    def swallow(self, trigger: bytes) -> None:
        """Discard the packet. The client waits until its own timeout."""
        self._rules.append(Rule(trigger, lambda client, server, packet: True))

    def answer(self, trigger: bytes, reply: bytes) -> None:
        """Reply in place of Redis, which never sees the packet, and close the connection."""

        def fault(client: socket.socket, server: socket.socket, packet: bytes) -> bool:
            client.sendall(reply)
            client.shutdown(socket.SHUT_WR)
            while client.recv(SIZE):  # closed before the client closes, it could lose the reply
                pass
            return False

        self._rules.append(Rule(trigger, fault))

    def before(self, trigger: bytes, meanwhile: Callable[[], object]) -> None:
        """Run `meanwhile` before the packet is forwarded."""

        def fault(client: socket.socket, server: socket.socket, packet: bytes) -> bool:
            meanwhile()
            server.sendall(packet)
            return True

        self._rules.append(Rule(trigger, fault))

    def split(self, trigger: bytes, meanwhile: Callable[[], object]) -> None:
        """Forward what precedes the trigger, run `meanwhile` after its reply, forward the rest."""

        def fault(client: socket.socket, server: socket.socket, packet: bytes) -> bool:
            at = packet.index(trigger)
            server.sendall(packet[:at])
            client.sendall(server.recv(SIZE))
            meanwhile()
            server.sendall(packet[at:])
            return True

        self._rules.append(Rule(trigger, fault))

    def cut(self) -> None:
        """Close all present connections."""
        for client in tuple(self._open):
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def heal(self) -> None:
        """Remove all faults, deliver what was held back, and clear `packets`."""
        self._rules.clear()
        self.delay = 0.0
        self.flowing.set()
        self.packets.clear()
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self.deliver()

    @property
    def idle(self) -> bool:
        """Whether all requested faults have happened."""
        return not self._rules

    # The proxy itself -------------------------------------------------------------------------------------------------

    def __enter__(self) -> CutProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections and end all threads."""
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
        with suppress(OSError):  # the listener has been closed
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
        """Wait for a packet and pass it on. Returns whether to keep the connection open."""
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
            return self._fault(packet)(client, server, packet)
        return False

    def _fault(self, packet: bytes) -> Fault:
        with self._lock:
            for rule in self._rules:
                if rule.trigger in packet:
                    self._rules.remove(rule)
                    return rule.fault
        return _forward


def _forward(client: socket.socket, server: socket.socket, packet: bytes) -> bool:
    server.sendall(packet)
    return True
