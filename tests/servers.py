"""Real S3 servers for the tests: SeaweedFS, a process that can be killed, frozen and restarted on the same data.

Each listens only on loopback, on ports of its own so that two may run at once, and without telemetry. It is stopped by
its process id.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ACCESS_KEY = "p3d-tests"
SECRET_KEY = "canary-secret-7f3a"  # tests search all files that a job leaves for it
START_S = 60.0
_PORTS = tuple(
    "s3.port s3.port.grpc s3.port.iceberg s3.port.lance master.port master.port.grpc volume.port volume.port.grpc "
    "filer.port filer.port.grpc admin.port admin.port.grpc".split()
)


class Weed:
    """One SeaweedFS server over a folder. `kill` or `freeze`, then `start` or `thaw`, make an outage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def env(self) -> dict[str, str]:
        """The environment variables with which any process reaches it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports['s3.port']}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start, and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [
                str(Path(sys.executable).parent / "weed"),
                "mini",
                f"-dir={self.folder}",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                "-master.telemetry=false",
                "-admin.ui=false",
                "-webdav=false",
                *(f"-{name}={port}" for name, port in self.ports.items()),
            ],
            env={**os.environ, "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY},
            stdout=(self.folder / "log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._wait()

    def _wait(self) -> None:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        client = boto3.client(
            "s3",
            endpoint_url=self.env["AWS_ENDPOINT_URL"],
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(connect_timeout=1, read_timeout=2, retries={"mode": "standard", "total_max_attempts": 1}),
        )
        until = time.monotonic() + START_S
        while True:
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
            with contextlib.suppress(BotoCoreError, ClientError):
                client.list_buckets()
                return
            assert time.monotonic() < until, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL, as if the machine lost power; the data stay."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        """SIGSTOP: the kernel accepts connections, but requests are never answered."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def weed(folder: Path) -> Iterator[Weed]:
    """A server for the duration of a test."""
    server = Weed(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def free_ports(count: int) -> list[int]:
    """Distinct ports that are free now; all are bound while they are chosen.

    They lie below the kernel's ports for outgoing connections (from 32768 on) and above those of Ray's workers (up to
    19999). A server binds its last port a second after the first, and one was once taken in between.
    """
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            one, port = stack.enter_context(socket.socket()), secrets.choice(range(20_000, 32_000))
            with contextlib.suppress(OSError):
                one.bind(("127.0.0.1", port))
                found.append(port)
    return found


@contextlib.contextmanager
def moto() -> Iterator[dict[str, str]]:
    """An S3 server in this process, which takes any signature; yields the environment variables that reach it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "canary-secret-7f3a",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()
