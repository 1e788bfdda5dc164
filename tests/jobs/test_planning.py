"""The options of a run follow from the command line and the last run."""

from __future__ import annotations

import pytest

from p3d.jobs.machine import Machines, cpus_of_a_gpu_worker
from p3d.jobs.planning.prepare import run_options
from p3d.pipeline.errors import InputError
from p3d.pipeline.recipe import MaxFailures, RunOptions
from p3d.pipeline.storage.store import StoreOptions

CHOSEN = {
    "workers": 3,
    "batch_size": 7,
    "threads": 5,
    "device": "cpu",
    "video_timeout_s": 11.0,
    "max_duration_s": 60.0,
    "max_pixels": 1000,
    "max_file_bytes": 2000,
    "store_patience_s": 13.0,
}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_resume_keeps_every_option_that_is_not_given_again(name: str) -> None:
    """Each option is that of the last run unless it is given; the others stay."""
    last = run_options({}, **CHOSEN).to_dict()
    assert {key: getattr(run_options(last), key) for key in CHOSEN} == CHOSEN
    other = "auto" if name == "device" else CHOSEN[name] + 1
    changed = run_options(last, **{name: other})
    assert {key: getattr(changed, key) for key in CHOSEN} == CHOSEN | {name: other}


def test_limits_of_failure_and_decode_tasks_are_not_inherited() -> None:
    """A resume does not inherit the `--max-failures` that stopped it, nor another machine's cores."""
    last = run_options({}, max_failures=MaxFailures(count=1)).to_dict() | {"decode_tasks": 99}
    again = run_options(last)
    assert again.max_failures == MaxFailures() and again.decode_tasks < 99


def test_s3_options_are_kept_unless_others_are_given() -> None:
    """Options that are given replace those of the user's own record, and the others stay."""
    launched = StoreOptions(endpoint_url="http://127.0.0.1:9000", profile="archive", requester_pays=True)
    assert StoreOptions().or_those_of(launched) == launched
    moved = StoreOptions(endpoint_url="http://127.0.0.1:9001").or_those_of(launched)
    assert (moved.endpoint_url, moved.profile, moved.requester_pays) == ("http://127.0.0.1:9001", "archive", True)


def test_unknown_options_in_a_record_of_another_version_are_ignored() -> None:
    """Unknown options are ignored, and new ones get their defaults, so a job can be upgraded."""
    assert run_options({"threads": 3, "of_the_future": 1}).threads == 3


def test_s3_options_of_a_run_record_are_never_inherited() -> None:
    """A record in OUT does not decide where credentials go, or who pays: neither endpoint nor profile is taken."""
    last = run_options({}, s3=StoreOptions(endpoint_url="http://203.0.113.1", profile="rich", requester_pays=True))
    assert run_options(last.to_dict()).s3 == StoreOptions()


def test_one_gpu_of_a_worker_is_not_chosen_by_number() -> None:
    """`--device cuda:1` is refused with a remedy, and an unknown device with those that there are."""
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES"):
        run_options({}, device="cuda:1")
    with pytest.raises(InputError, match="device must be one of auto, cpu, cuda, mps, not 'gpu'"):
        run_options({}, device="gpu")


GPUS = Machines(cpus=64, node_cpus=32, gpus=4, gpu_nodes=((32, 2), (32, 2)))


def test_workers_per_gpu_decide_the_number_of_workers() -> None:
    """K for each GPU. A resume keeps both numbers, and another K replaces the number of workers."""
    three = run_options({}, there=GPUS, workers_per_gpu=3)
    assert (three.workers, three.workers_per_gpu, three.decode_tasks) == (12, 3, 64 // 12 - 1)
    last = run_options({}, there=GPUS, workers_per_gpu=3, workers=7).to_dict()
    assert run_options(last, there=GPUS).workers == 7 == run_options(last, there=GPUS, workers_per_gpu=3).workers
    assert run_options(last, there=GPUS, workers_per_gpu=2).workers == 8
    assert run_options(last, there=GPUS, workers_per_gpu=2, workers=5).workers == 5
    assert run_options({}, there=GPUS).workers == 4


def test_only_gpus_are_shared() -> None:
    """On a CPU `--workers-per-gpu` is refused, unless a run on GPUs had it."""
    there = Machines(8, 8, 0)
    for given in ({"there": there}, {"there": GPUS, "device": "cpu"}):
        with pytest.raises(InputError, match=r"--workers-per-gpu 2: the device is cpu.*leave it out"):
            run_options({}, workers_per_gpu=2, **given)
    assert run_options({}, there=there, workers_per_gpu=1).workers_per_gpu == 1
    assert run_options({"workers_per_gpu": 4}, there=there).workers_per_gpu == 1


@pytest.mark.parametrize(
    ("nodes", "workers", "per_gpu", "reserved"),
    [
        ((), 1, 1, 0),
        (((1, 1),), 1, 1, 0),
        (((2, 1),), 1, 1, 0),
        (((8, 1),), 1, 1, 1),
        (((8, 1),), 2, 2, 1),
        (((8, 1),), 4, 4, 0),
        (((32, 8), (2, 1)), 9, 1, 0),
        (((32, 8), (4, 1)), 9, 1, 1),
        (((8, 8),), 2, 1, 1),  # there are only two workers
    ],
)
def test_a_worker_on_a_gpu_has_a_core_where_there_are_enough(
    nodes: tuple[tuple[int, int], ...], workers: int, per_gpu: int, reserved: int
) -> None:
    """Every machine with GPUs must have four cores per worker; decodes get what is left."""
    cpus, gpus = sum(cpus for cpus, _ in nodes) or 8, sum(gpus for _, gpus in nodes)
    there = Machines(cpus, cpus, gpus, nodes)
    assert cpus_of_a_gpu_worker(there, workers, per_gpu) == reserved
    device = {} if nodes else {"device": "cpu"}
    options = run_options({}, there=there, workers=workers, workers_per_gpu=per_gpu, **device)
    assert options.decode_tasks == max(1, cpus // workers - reserved)


@pytest.mark.fault(47)
def test_options_cannot_hold_a_secret() -> None:
    """No field of a run's record is named like a secret, and an endpoint that contains one is refused."""
    names = {*RunOptions.__slots__, *StoreOptions.__slots__}
    assert not [name for name in names if any(word in name for word in ("secret", "token", "password", "access_key"))]
    with pytest.raises(InputError, match="credentials come from botocore"):
        StoreOptions(endpoint_url="http://user:word@host")
