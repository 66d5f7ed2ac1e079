"""How the processes of a run learn at once that one of them has ended, and why.

Every process has a connection to the first one. The kernel closes it when a process ends, however that ends, and probes
it where a machine is silent: a process that compiles for minutes is not taken for dead, and one that was killed is
missed at once, while the others may wait for it in a collective for ever.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

Ended = Callable[[int, int, str], None]
"""Called once, in a thread, with the process that ended first, its exit code, and what it said; "" if nothing."""


class Peers:
    """All processes of a run, as one of them sees them.

    A process that ends without `finish` or `fail` was killed, as far as the others know.
    """

    def __init__(self, index: int, count: int, ended: Ended):
        """One process alone; `serve` and `connect` make it one of many."""
        self._index, self.count, self._ended = index, count, ended
        self._listener: socket.socket | None = None
        self._links: dict[int, socket.socket] = {}
        self._done: set[int] = set()
        self._change = threading.Condition()
        self._is_finished = self._is_over = False

    def serve(self, heartbeat: int) -> str:
        """Lets the others connect to this process, the first.

        Args:
          heartbeat: seconds after which a silent machine counts as dead.

        Returns:
          What `connect` needs beside the host.

        Raises:
          OSError: it cannot listen.
        """
        if socket.has_dualstack_ipv6():
            listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=self.count)
        else:
            listener = socket.create_server(("", 0), backlog=self.count)
        self._listener, token = listener, secrets.token_hex(16)
        threading.Thread(target=self._accept, args=(listener, token, heartbeat), daemon=True).start()
        return f"{listener.getsockname()[1]} {token}"

    def wait(self, seconds: float) -> None:
        """Returns when all have connected to this process, the first; then nobody can any more.

        Raises:
          OSError: some have not within so many seconds.
        """
        with self._change:
            self._change.wait_for(lambda: len(self._links) == self.count - 1, seconds)
            missing = sorted(set(range(1, self.count)) - set(self._links))
        if self._listener is not None:
            with contextlib.suppress(OSError):  # some systems say that nobody is connected to it
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        if missing:
            raise OSError(f"processes {missing} have not connected in {seconds} seconds")

    def connect(self, host: str, served: str, heartbeat: int) -> None:
        """Connects this process to the first.

        Args:
          host: of the first.
          served: what `serve` returned there.
          heartbeat: seconds after which a silent machine counts as dead.

        Raises:
          OSError: it cannot be reached.
        """
        port, token = served.split()
        link = socket.create_connection((host, int(port)), timeout=heartbeat)
        link.settimeout(None)
        _probe(link, heartbeat)
        self._links[0] = link
        _send(link, token=token, index=self._index)
        threading.Thread(target=self._listen, args=(link,), daemon=True).start()

    def finish(self) -> None:
        """Returns when all that are connected have come here."""
        if self._index > 0:
            self._tell(done=True)
        self._count_done(self._index)
        with self._change:
            self._change.wait_for(lambda: self._is_finished or not self._links)

    def fail(self, code: int, message: str) -> None:
        """Tells the others that this process is about to end, and why, unless another has ended before."""
        if self._is_first_end():
            self._tell(index=self._index, code=code, message=message)

    def _accept(self, listener: socket.socket, token: str, heartbeat: int) -> None:
        with contextlib.suppress(OSError):  # `wait` has closed it
            while True:
                link, _ = listener.accept()
                _probe(link, heartbeat)
                threading.Thread(target=self._serve, args=(link, token), daemon=True).start()

    def _serve(self, link: socket.socket, token: str) -> None:
        """Reads what another process says, on the first."""
        with link:
            messages = _messages(link)
            hello = next(messages, {})
            if hello.get("token") != token:
                return  # a stranger
            index = int(hello["index"])
            with self._change:
                self._links[index] = link
                self._change.notify_all()
            for message in messages:
                if "done" in message:
                    self._count_done(index)
                else:
                    self._lost(**message)
            if index not in self._done:
                self._lost(index, 1, "")

    def _listen(self, link: socket.socket) -> None:
        """Reads what the first process says, on the others."""
        with link:
            for message in _messages(link):
                if "done" in message:
                    with self._change:
                        self._is_finished = True
                        self._change.notify_all()
                else:
                    self._lost(**message)
            if not self._is_finished:
                self._lost(0, 1, "")

    def _count_done(self, index: int) -> None:
        with self._change:
            self._done.add(index)
            if self._index > 0 or self._is_finished or not self._done >= {0, *self._links}:
                return
            self._is_finished = True
            self._change.notify_all()
        self._tell(done=True)

    def _lost(self, index: int, code: int, message: str) -> None:
        if self._is_first_end():
            if self._index == 0:
                self._tell(index=index, code=code, message=message)
            self._ended(index, code, message)

    def _is_first_end(self) -> bool:
        with self._change:
            before, self._is_over = self._is_over, True
        return not before

    def _tell(self, **message: object) -> None:
        for link in list(self._links.values()):
            _send(link, **message)


def _send(link: socket.socket, **message: object) -> None:
    # One that cannot be told is missed where its link is read.
    with contextlib.suppress(OSError):
        link.sendall(json.dumps(message).encode() + b"\n")


def _messages(link: socket.socket) -> Iterator[dict[str, Any]]:
    """Those that a link brings until it ends."""
    with contextlib.suppress(OSError, ValueError), link.makefile("rb") as lines:
        for line in lines:
            message = json.loads(line)
            if not isinstance(message, dict):
                return  # a stranger's
            yield message


def _probe(link: socket.socket, heartbeat: int) -> None:
    """Lets the kernel end a link that has been silent for so many seconds and does not answer."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    times = {
        "TCP_KEEPIDLE": max(1, heartbeat // 2),
        "TCP_KEEPINTVL": max(1, heartbeat // 8),
        "TCP_KEEPCNT": 4,
        "TCP_USER_TIMEOUT": 1000 * heartbeat,
    }
    for name, value in times.items():
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
