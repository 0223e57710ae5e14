"""A gate before a server, by which a test makes a network fail: really, over sockets."""

import socket
import threading
from contextlib import suppress
from typing import Literal, Self, final
from urllib.parse import urlsplit

HOST = "127.0.0.1"


@final
class Gate:
    """Passes what comes to `url` on to a server.

    `silent` takes requests and passes none on; `mute` passes them on and keeps the answers; `shut` refuses them.
    """

    def __init__(self, server_url: str) -> None:
        self._server = (urlsplit(server_url).hostname, urlsplit(server_url).port)
        self._open: set[socket.socket] = set()
        self._port = 0
        self.mode: Literal["open", "silent", "mute", "shut"] = "open"
        # Set where something was kept back.
        self.held = threading.Event()

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}"

    def become(self, mode: Literal["open", "silent", "mute", "shut"]) -> None:
        """From now on, for the connections that there are too."""
        before, self.mode = self.mode, mode
        self.held.clear()
        if mode == "shut":
            self._close()
        elif before == "shut":
            self._listen()

    def _listen(self) -> None:
        listener = socket.create_server((HOST, self._port))
        self._port = listener.getsockname()[1]
        self._open.add(listener)
        self._start(self._accept, listener)

    def _close(self) -> None:
        for opened in list(self._open):
            self._open.discard(opened)
            with suppress(OSError):
                # Wakes the thread that waits for it.
                opened.shutdown(socket.SHUT_RDWR)
            opened.close()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self._server)
                self._open |= {client, server}
                self._start(self._pass, client, server, ("silent",))
                self._start(self._pass, server, client, ("silent", "mute"))

    def _pass(self, source: socket.socket, sink: socket.socket, kept_back: tuple[str, ...]) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self.mode in kept_back:
                    self.held.set()
                else:
                    sink.sendall(data)
        for ended in (source, sink):
            self._open.discard(ended)
            with suppress(OSError):
                ended.shutdown(socket.SHUT_RDWR)
            ended.close()

    def _start(self, target: object, *arguments: object) -> None:
        threading.Thread(target=target, args=arguments, daemon=True).start()  # type: ignore[arg-type]
