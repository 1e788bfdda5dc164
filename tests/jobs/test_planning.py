"""The options of a run follow from the command line and the last run."""

from __future__ import annotations

import pytest

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
    """`--device cuda:1` is refused with a remedy."""
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES"):
        run_options({}, device="cuda:1")


@pytest.mark.fault(47)
def test_options_cannot_hold_a_secret() -> None:
    """No field of a run's record is named like a secret, and an endpoint that contains one is refused."""
    names = {*RunOptions.__slots__, *StoreOptions.__slots__}
    assert not [name for name in names if any(word in name for word in ("secret", "token", "password", "access_key"))]
    with pytest.raises(InputError, match="credentials come from botocore"):
        StoreOptions(endpoint_url="http://user:word@host")
