"""A real Ray cluster for the tests: a head and nodes, each a process group that can be killed like a machine.

It has its own ports, token and session folder. Every process is stopped by its id.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.servers import free_ports

START_S = 90.0
BIN = Path(sys.executable).parent
TOKEN = "canary-token-0123456789abcdef0123456789abcdef"


@dataclass
class Nodes:
    """The simulated machines of a cluster, all on this machine."""

    folder: Path
    ports: dict[str, int]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def env(self) -> dict[str, str]:
        """The environment that authorizes a process, and finds the Python with Ray."""
        path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PATH": path, "RAY_USAGE_STATS_ENABLED": "0"}

    @property
    def address(self) -> str:
        """The address where a driver joins."""
        return f"127.0.0.1:{self.ports['port']}"

    @property
    def jobs_address(self) -> str:
        """The address where a driver is submitted."""
        return f"http://127.0.0.1:{self.ports['dashboard-port']}"

    def start(self, *, gpus: int = 0, cpus: int = 1) -> subprocess.Popen[bytes]:
        """One more node, the head first; returns at once."""
        at = len(self.processes)
        words = [f"--num-cpus={cpus}", f"--num-gpus={gpus}", "--disable-usage-stats", "--block"]
        if at == 0:
            words += ["--head", f"--temp-dir={self.folder}", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
            words += [f"--{name}={port}" for name, port in self.ports.items()]
        else:
            words += [f"--address={self.address}"]
        with (self.folder / f"node{at}.txt").open("wb") as said:
            process = subprocess.Popen(
                [str(BIN / "ray"), "start", *words],
                env={**os.environ, **self.env},
                cwd=self.folder,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def samples(self) -> list[Sample]:
        """What Prometheus would scrape now from all nodes, which it finds through Ray's service discovery file.

        The file also names ports where nothing listens, such as that of an autoscaler that does not run.
        """
        found = json.loads((self.folder / "prom_metrics_service_discovery.json").read_text())
        pages = []
        for target in (target for group in found for target in group["targets"]):
            with (
                contextlib.suppress(urllib.error.URLError),
                urllib.request.urlopen(f"http://{target}/metrics", timeout=START_S) as reply,
            ):
                pages.append(reply.read().decode())
        families = (family for page in pages for family in text_string_to_metric_families(page))
        return [sample for family in families for sample in family.samples]

    def kill(self, at: int) -> None:
        """Kill every process of a node at once, like a power failure."""
        with contextlib.suppress(psutil.NoSuchProcess):
            node = psutil.Process(self.processes[at].pid)
            for one in [node, *node.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        self.processes[at].wait()

    def said(self, at: int) -> str:
        return (self.folder / f"node{at}.txt").read_text(errors="replace")

    def await_text(self, at: int, text: str) -> None:
        """Wait until a node has printed `text`. AssertionError if the node ends first."""
        until = time.monotonic() + START_S
        while text not in self.said(at):
            assert self.processes[at].poll() is None and time.monotonic() < until, self.said(at)
            time.sleep(0.1)


@contextlib.contextmanager
def nodes(n: int, *, gpus: int = 0, cpus: int = 1) -> Iterator[Nodes]:
    """A running cluster of n nodes."""
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    with tempfile.TemporaryDirectory(
        prefix="nodes-", ignore_cleanup_errors=True
    ) as folder:  # short: sockets live in it
        cluster = Nodes(Path(folder), dict(zip(names, free_ports(len(names)), strict=True)))
        try:
            for at in range(n):
                cluster.start(gpus=gpus, cpus=cpus)
                cluster.await_text(at, "This command will now block")
            yield cluster
        finally:
            for at in range(len(cluster.processes)):
                cluster.kill(at)
