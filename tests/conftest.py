"""Shared fixtures: a folder of real videos, a small network, real S3 servers, and the command line in a process."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in a job; several test processes run at once

from tests.servers import Weed, moto, weed
from tests.zoo import make

# Which jobs are this user's own, and indexes, are in folders of this test process, never in the real home.
_state, _cache = (tempfile.TemporaryDirectory(prefix=f"p3d-{what}-") for what in ("state", "cache"))
os.environ["P3D_STATE"], os.environ["P3D_CACHE"] = _state.name, _cache.name
os.environ.pop("P3D_TRUST", None)

settings.register_profile("p3d", deadline=None)  # the machine is shared, so the time of one example means nothing
settings.load_profile("p3d")

REPO = Path(__file__).resolve().parent.parent
LONG = os.environ.get("P3D_CHAOS") == "1"  # `make chaos`: hundreds of kills, and jobs that take minutes
P3D = [sys.executable, "-c", "from p3d.jobs.cli import main; main()"]  # the console script, independent of PATH
# The files that take longest, the longest first: a file runs in one process, and the last to begin is waited for.
LONGEST_FIRST = (
    *("jobs/test_end_to_end.py", "test_tutorial.py", "s3/test_fetch.py", "jobs/test_whole_jobs.py"),
    *("jobs/test_remote.py", "chaos/test_chaos.py", "fuzz/test_hostile_outputs.py", "jobs/test_parallel_decode.py"),
    *("jobs/test_surroundings.py", "chaos/test_two_drivers.py", "jobs/test_zoo.py", "jobs/test_decoding.py"),
    *("jobs/test_outage.py", "jobs/test_retry.py", "jobs/test_cli.py", "jobs/test_preflight.py", "test_demo.py"),
    *("test_how_to.py", "p3d/test_encoder.py", "p3d/test_baselines.py", "p3d/test_weights.py", "s3/test_requests.py"),
    *("sim/test_enumeration.py", "jobs/test_recompute.py", "jobs/test_device.py", "bench/test_null.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; within a file, and for all others, the order stays."""
    rank = {f"tests/{name}": at for at, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


@dataclass(frozen=True)
class Ran:
    """A finished command line."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


def p3d(*args: object, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 240) -> Ran:
    """Run `p3d ARGS` as a user does, in a process of its own; stdout and stderr are captured separately."""
    done = subprocess.run(
        [*P3D, *map(str, args)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def decord_if_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `auto` choose decord for all videos that it reads correctly, even where PyAV is faster."""
    route = importlib.import_module("p3d.pipeline.decode.routes.choice")
    monkeypatch.setattr(route, "SMALL_PIXELS", 0)
    monkeypatch.setattr(route, "SLOWER_CODECS", frozenset())


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's network, a P3D of four blocks, with random weights and a recipe of 64x64 pixels. `make chaos` runs
    P3D-63 in its place."""
    return _random_weights(tmp_path_factory, "p3d63" if LONG else "p3d-demo")


@pytest.fixture(scope="session")
def real_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """P3D-63 with random weights and a recipe of 64x64 pixels: the real network at a sixth of the cost."""
    return _random_weights(tmp_path_factory, "p3d63")


def _random_weights(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    import p3d.weights

    weights = p3d.weights.random_weights(name, 0, graph="caffe", num_classes=10)
    recipe = replace(weights.recipe, resize_hw=(72, 108), crop_hw=(64, 64))
    weights = replace(weights, recipe=recipe, class_names=tuple(f"class {number}" for number in range(10)))
    path = tmp_path_factory.mktemp("weights") / f"{name}.safetensors"
    p3d.weights.save(path, weights)
    return path


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve short videos of several lengths in two folders (of which two share a name), and one text file."""
    root = tmp_path_factory.mktemp("archive")
    (root / "more").mkdir()
    for at in range(12):
        folder = root / "more" if at % 2 else root
        n_frames = (40, 16, 9, 33, 64, 20)[at % 6]
        make.video(folder / f"video{at // 2}.mp4", "libx264", n_frames, options={"preset": "ultrafast"}, gop=12)
    (root / "readme.txt").write_text("not a video\n")
    return root


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict[str, str]]:
    """Start an HTTP S3 server (moto) in this process; yields the environment variables that reach it."""
    with moto() as env:
        before = {name: os.environ.get(name) for name in env}
        os.environ.update(env)
        yield env
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


@pytest.fixture
def bucket(s3_server: dict[str, str], request: pytest.FixtureRequest) -> str:
    """A fresh bucket on the server."""
    import uuid

    import boto3

    name = f"test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return name


@pytest.fixture(scope="session")
def real_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    """SeaweedFS, started once. A test that kills or freezes a server starts its own with `tests.servers.weed`."""
    with weed(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def real_bucket(real_s3: Weed, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket on SeaweedFS; this process and its children reach it by environment variables."""
    import uuid

    import boto3

    for name, value in real_s3.env.items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    boto3.session.Session().client("s3").create_bucket(Bucket=bucket)
    return bucket
