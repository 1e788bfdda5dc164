"""Workers on GPUs, without a GPU: what a run asks Ray for, and how many clips per second a worker can be fed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from bench import scheduler as bench
from p3d.jobs.cli import plan as cli_plan
from p3d.jobs.machine import Machines
from p3d.jobs.planning import prepare
from p3d.jobs.planning.estimate import fed
from p3d.jobs.planning.feeding import Feeding, feeding
from p3d.jobs.scheduler import control
from p3d.jobs.scheduler import loop as scheduler
from p3d.jobs.scheduler.cluster import (
    OBJECT_STORE_BYTES,
    Cluster,
    little_shared_memory,
    object_store_memory,
    small_stores,
    store_bytes,
)
from p3d.jobs.scheduler.state import WorkerLimitRaised
from p3d.pipeline.errors import InputError
from p3d.pipeline.recipe import RunOptions
from tests.jobs.test_cli import in_process
from tests.pipeline.rows import recipe
from tests.zoo import make

FRAME = 160 * 160 * 3


def cluster(cpus: int, gpus: int) -> Cluster:
    return Cluster(Machines(cpus, cpus, gpus, ((cpus, gpus),) if gpus else ()), Path("/nowhere"))


# --- workers of a run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "per_gpu", "reserved"),
    [(32, 2, 4, 2, (1, 0.5)), (32, 2, 2, 1, (1, 1)), (2, 1, 2, 2, (0, 0.5)), (2, 0, 3, 1, (0, 0))],
)
def test_a_worker_reserves_its_part_of_a_gpu_and_a_core(
    cpus: int, gpus: int, workers: int, per_gpu: int, reserved: tuple[int, float]
) -> None:
    """1/K of a GPU each, and a CPU where there are enough. Without GPUs a worker reserves nothing."""
    asked: list[tuple[int, float]] = []

    class Ray(bench.NullRay):
        def options(self, **given: Any) -> bench.NullRay:
            asked.append((given["num_cpus"], given["num_gpus"]))
            return self

    with bench.without_ray(), patch.object(scheduler, "ray", Ray()):
        run = bench.run_of(20, workers, 2, cluster(cpus, gpus), workers_per_gpu=per_gpu)
        assert run.loop().exit_code == 0
    assert asked == [reserved] * workers
    most = min(prepare.MAX_DECODE_TASKS, cpus - workers * reserved[0])
    assert run._most_decodes() == most


def test_more_workers_than_fit_on_the_gpus_are_refused() -> None:
    """In Ray the others would wait forever. The message says how many fit."""
    with bench.without_ray():
        with pytest.raises(InputError, match=r"7 workers, 3 per GPU, need 3 GPUs, and Ray sees 2; use --workers 6,"):
            bench.run_of(2, 7, 2, cluster(8, 2), workers_per_gpu=3)
        assert bench.run_of(2, 6, 2, cluster(8, 2), workers_per_gpu=3).follows
        assert not bench.run_of(2, 5, 2, cluster(8, 2), workers_per_gpu=3).follows


def test_each_gpu_that_joins_gets_its_workers() -> None:
    """K for each, at the next heartbeat."""
    with bench.without_ray():
        there = cluster(8, 2)
        run = bench.run_of(2, 6, 2, there, workers_per_gpu=3)
        there.machines = Machines(16, 8, 4, ((8, 2), (8, 2)))
        run.counted.get()  # earlier runs have been counted
        with patch.multiple(control, newest_number=lambda _: 1, cancel_asked=lambda *_: None):
            assert run._outside() == [WorkerLimitRaised(12)]


# --- the object store -------------------------------------------------------------------------------------------------


def test_the_store_holds_the_messages_in_flight_and_the_batches() -> None:
    """Of 16 decodes and one worker with batches of 128 clips: what a plain decode may be ahead, and what shares may."""
    message = 8 * 1024**2 + 64 * FRAME
    batches = 4 * 128 * 16 * FRAME
    assert store_bytes(16, 1, FRAME, 128 * 16, ahead=2) == 16 * 3 * message + batches
    assert store_bytes(16, 1, FRAME, 128 * 16) == 16 * 6 * message + batches
    assert store_bytes(4, 4, FRAME, 32 * 16) == 4 * store_bytes(4, 1, FRAME, 32 * 16)


@pytest.mark.parametrize(
    ("needed", "free", "asked"),
    [
        (1, 10**12, OBJECT_STORE_BYTES),
        (10**10, 10**12, 10**10),
        (10**10, 10**9, 950 * 10**6),
        (10**10, 64 * 1024**2, OBJECT_STORE_BYTES),  # on a disk
    ],
)
def test_a_local_store_is_as_large_as_needed_or_as_there_is_room(needed: int, free: int, asked: int) -> None:
    """With too little shared memory a job still runs, and says how much it would need."""
    assert object_store_memory(needed, free) == asked
    warning = little_shared_memory(needed, free)
    assert bool(warning) == (max(needed, OBJECT_STORE_BYTES) > free)
    if warning:
        assert f"{free / 1e6:.0f} MB free" in warning and "take up to 10000 MB" in warning and "--shm-size=" in warning


def node(host: str, cpus: int, gpus: int, mb: float) -> dict[str, Any]:
    """A node as `ray.nodes()` lists it."""
    has = {"CPU": float(cpus), "object_store_memory": mb * 1e6} | ({"GPU": float(gpus)} if gpus else {})
    return {"NodeManagerHostname": host, "Alive": True, "Resources": has}


def test_a_cluster_whose_store_is_too_small_is_refused() -> None:
    """Nodes with workers need their batches, too. The message has both numbers and the remedy."""
    options = RunOptions(2, 32, 8, 15, workers_per_gpu=2, device="auto")
    made = replace(recipe(), crop_hw=(160, 160), clip_frames=16)
    needed = store_bytes(15, 2, FRAME, 32 * 16, ahead=2)
    nodes = [node("head", 0, 0, 80), node("gpu", 16, 1, needed / 1e6 + 1), node("cpu", 16, 0, 700)]
    assert small_stores(nodes, made, options) == []
    nodes[1:] = [node("gpu", 16, 1, needed / 1e6 - 1), node("cpu", 16, 0, 600)]
    of_gpu, of_cpu = small_stores(nodes, made, options)
    assert of_gpu.startswith(f"gpu: Ray's object store has {needed / 1e6 - 1:.0f} MB, and the frames in flight take")
    assert f"take {needed / 1e6:.0f} MB" in of_gpu and f"`ray start --object-store-memory={needed}`" in of_gpu
    assert of_cpu.startswith("cpu: Ray's object store has 600 MB")
    assert "a smaller --batch-size" in of_gpu and "batch" not in of_cpu
    on_cpu = small_stores(nodes, made, replace(options, device="cpu", workers=1))
    assert [one.partition(":")[0] for one in on_cpu] == ["head", "cpu"]


# --- what a worker can be fed -----------------------------------------------------------------------------------------

STAGES: dict[str, float] = {
    "cores": 15,
    "decode_s": 0.0125,
    "read_s": 0.0005,
    "commit_s": 0.0001,
    "shard_clips": 640,
    "shard_s": 0.45,
}


@pytest.mark.parametrize(
    ("changes", "rate", "binding"),
    [
        ({}, 1200, "decoding"),
        ({"cores": 30}, 1 / 0.0006, "reading"),
        ({"cores": 30, "commit_s": 0.0015}, 500, "committing"),
        ({"cores": 30, "shard_clips": 64}, 2 * 64 / 0.45, "shards"),
    ],
)
def test_the_slowest_stage_limits_what_a_worker_is_fed(changes: dict[str, float], rate: float, binding: str) -> None:
    """Reading and committing take turns in one interpreter; all else overlaps."""
    found = feeding(**STAGES | changes)
    assert found.clips_per_s == pytest.approx(rate) and found.binding == binding
    assert found.by_stage["decoding"] == pytest.approx((STAGES | changes)["cores"] / 0.0125)
    assert min(found.by_stage.values()) >= found.clips_per_s


def test_a_plan_on_a_gpu_says_what_a_worker_can_be_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lines; none on a CPU."""
    guess: Any = type("Guess", (), {"feeding": Feeding(650.4, "decoding", {"decoding": 650.4, "reading": 3000.0})})()
    assert cli_plan._feeding(guess) == [
        ("feeding", "one worker gets at most 650 clips/s here, limited by decoding"),
        ("", "(each stage alone: decoding 650, reading 3000 clips/s)"),
    ]
    guess.feeding = None
    assert cli_plan._feeding(guess) == []


def test_a_shard_of_a_remote_source_takes_longer() -> None:
    """With few clips per shard, a source on S3 feeds a worker more slowly. Large frames take longer to read."""
    given: dict[str, Any] = {"cores": 32, "decode_s": 0.001, "shard_clips": 100}
    local, s3 = (fed(recipe(), **given, on_s3=on_s3) for on_s3 in (False, True))
    assert s3.binding == "shards" and s3.clips_per_s < local.clips_per_s
    large = fed(replace(recipe(), resize_hw=(360, 480), crop_hw=(320, 320)), **given, on_s3=False)
    assert large.by_stage["reading"] < local.by_stage["reading"]


def test_a_plan_on_a_cpu_has_no_feeding(tmp_path: Path, small_weights: Path) -> None:
    """Nor may its GPU be shared."""
    make.video(tmp_path / "v.mp4", "libx264", 16)
    line = ("plan", str(tmp_path / "v.mp4"), "--weights", str(small_weights))
    code, text, err = in_process(*line, "--json")
    assert code == 0 and json.loads(text)["feeding"] is None, err
    code, _, err = in_process(*line, "--workers-per-gpu", "2")
    assert code == 2 and "--workers-per-gpu 2: the device is cpu" in err
