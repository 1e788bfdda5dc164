"""Record opened files with inotify, and connections with a listener, so tests can show that nothing else was read."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_IN_OPEN = 0x20
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Opened:
    """Names of the watched files that were opened so far, in order. A watched folder reports the files in it."""

    descriptor: int
    paths: dict[int, Path]

    def take(self) -> list[str]:
        """The names that were opened since the last call."""
        return [path.name for path in self.take_paths()]

    def take_paths(self) -> list[Path]:
        """The paths that were opened since the last call."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.descriptor, 1 << 16):
                at = 0
                while at < len(data):
                    watch, _, _, length = struct.unpack_from("iIII", data, at)
                    name = data[at + 16 : at + 16 + length].rstrip(b"\0")
                    found.append(self.paths[watch] / os.fsdecode(name))
                    at += 16 + length
        return found


@contextlib.contextmanager
def opened(*paths: Path) -> Iterator[Opened]:
    """Record every open of these files, and of files in these folders, by any process (inotify(7))."""
    descriptor = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    watched = {}
    for path in paths:
        watch = _libc.inotify_add_watch(descriptor, os.fsencode(path), _IN_OPEN)
        assert watch >= 0, os.strerror(ctypes.get_errno())
        watched[watch] = path
    try:
        yield Opened(descriptor, watched)
    finally:
        os.close(descriptor)


@dataclass
class Listener:
    """A port on the loopback interface, and the connections that it accepted."""

    port: int
    calls: list[bytes] = field(default_factory=list)


@contextlib.contextmanager
def listening() -> Iterator[Listener]:
    """Accept connections until the end of the block, and keep the first bytes of each."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        listener = Listener(server.getsockname()[1])

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    call, _ = server.accept()
                    with call:
                        call.settimeout(1)
                        with contextlib.suppress(TimeoutError):
                            listener.calls.append(call.recv(1000))

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)
