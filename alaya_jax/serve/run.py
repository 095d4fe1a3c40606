"""A server in this process: its socket, and what signals do."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from alaya_jax.errors import RequestError
from alaya_jax.serve.app import create_app
from alaya_jax.serve.service import Service


def listen(host: str, port: int) -> socket.socket:
    """A socket on which a server can be reached; port 0 takes a free one.

    Raises:
      RequestError: the address is taken, or is none of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(1024)
        except BaseException:
            found.close()
            raise
    except (OSError, OverflowError) as error:
        raise RequestError(
            f"cannot listen on {host}:{port}: {error}; name another --port (0: any) or --host"
        ) from error
    return found


LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names of this machine, to itself."""


class _Server(uvicorn.Server):
    """Ends by signals: at the first when what runs has ended, which the second ends."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        on_start: Callable[[], object],
        on_stop: Callable[[], object],
    ):
        super().__init__(config)
        self._service, self._on_start, self._on_stop = service, on_start, on_stop
        self._signals = 0
        service.on_failure = self._stop

    def _stop(self) -> None:
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes the signals; they are not raised again behind, for the server ended as asked."""
        taken = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in taken}
        try:
            self._on_start()
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What a signal does."""
        self._signals += 1
        self._stop()
        match self._signals:
            case 1:
                self._on_stop()
            case 2:  # in a thread: whoever is interrupted here may hold what it needs
                threading.Thread(target=self._service.close).start()
            case _:  # a client reads its answer slowly, or not at all
                self.force_exit = True


def serve(
    service: Service,
    socket: socket.socket,
    on_start: Callable[[], object] = lambda: None,
    on_stop: Callable[[], object] = lambda: None,
) -> None:
    """Serves until SIGINT or SIGTERM: then no new request is taken, and it ends when those that run
    have ended; a second signal ends them, and a third does not wait for clients to hear of it.

    Args:
      service: what is served.
      socket: from `listen`.
      on_start: called when signals are taken.
      on_stop: called at the first signal.

    Raises:
      BaseException: whatever starting the engine raised, or the engine ended by.
    """
    options: dict[str, Any] = {"log_level": "warning", "lifespan": "on", "ws": "none"}
    server = _Server(uvicorn.Config(create_app(service), **options), service, on_start, on_stop)
    try:
        server.run(sockets=[socket])
    finally:
        service.close()
    if service.failure is not None:
        raise service.failure
