"""Send every query of deploy/grafana.json to a real Prometheus that scrapes a real job; needs its binary.

P3D_PROMETHEUS=/usr/bin/prometheus .venv/bin/python -m pytest -q -s tests/jobs/test_dashboard.py   (apt: prometheus)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import P3D, REPO
from tests.jobs.test_metrics import DASHBOARD, queries
from tests.nodes import nodes
from tests.servers import free_ports

PROMETHEUS = os.environ.get("P3D_PROMETHEUS", "")
CONFIG = REPO / "deploy" / "prometheus.yml"
QUIET = {"p3d_troubles_total"}  # nothing goes wrong here, so the series does not exist


@contextlib.contextmanager
def prometheus(folder: Path, config: Path) -> Iterator[str]:
    """Start Prometheus on loopback with a data folder of its own; yields the URL of its query API."""
    port = free_ports(1)[0]
    words = [f"--config.file={config}", f"--storage.tsdb.path={folder}/tsdb", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "prometheus.txt").open("wb") as said:
        process = subprocess.Popen([PROMETHEUS, *words], stdout=said, stderr=said)
    try:
        yield f"http://127.0.0.1:{port}/api/v1/query"
    finally:
        process.terminate()
        process.wait()


def ask(url: str, query: str) -> list[dict[str, Any]]:
    """The series that a query gives now; fails with the message of Prometheus if it does not parse."""
    try:
        with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode({'query': query})}", timeout=30) as reply:
            return json.loads(reply.read())["data"]["result"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{query}: {error.read().decode()}") from None
    except urllib.error.URLError:
        return []  # Prometheus has only just started


@pytest.mark.skipif(not PROMETHEUS, reason="P3D_PROMETHEUS is not set")
def test_every_query_of_the_dashboard_parses_and_yields(
    tmp_path: Path, archive: Path, small_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a job runs, Prometheus discovers it with the shipped configuration, and each panel has data."""
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    videos = tmp_path / "videos"
    for at in range(12):
        shutil.copytree(archive, videos / str(at))
    (videos / "notes.mp4").write_bytes(b"nonsense")
    left = [query for query in queries(json.loads(DASHBOARD.read_text())) if not query.startswith("label_values")]
    with nodes(1, cpus=2) as cluster:
        config = tmp_path / "prometheus.yml"
        config.write_text(CONFIG.read_text().replace("/tmp/ray/", f"{cluster.folder}/").replace("15s", "1s"))
        words = ("launch", videos, tmp_path / "out", "--weights", small_weights, "--shard-videos", 2, "--batch-size", 1)
        run = subprocess.Popen(
            [*P3D, *map(str, words), "--address", cluster.address], env={**os.environ, **cluster.env}
        )
        with prometheus(tmp_path, config) as url:
            while left and run.poll() is None:
                for query in left[:]:
                    asked = query.replace("$output", ".*").replace("$__rate_interval", "10s").replace("[5m]", "[10s]")
                    if series := [one for one in ask(url, asked) if one["value"][1] != "NaN"]:
                        print(f"{len(series)} series, such as {series[0]['value'][1]:>8.8}:  {query}")
                        left.remove(query)
                time.sleep(0.5)
        assert run.wait(timeout=240) == 3
    assert [query for query in left if not any(name in query for name in QUIET)] == []
