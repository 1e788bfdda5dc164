"""`p3d train` as users run it, on Ray: kills, Ctrl-C, status, cancel, resume, and the weights that come out."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from p3d.jobs.training import checkpoints
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.storage.urls import open_store
from tests.conftest import P3D, p3d
from tests.training.conftest import OPTIONS, RUN, planned, run_here

STEPS = 60
WORDS = (
    "--init random:0 --model p3d-demo --optimizer adamw --lr 0.003 --schedule one-cycle --test-clips 2 --batch-size 4 "
    f"--threads 1 --decode-tasks 1 --checkpoint-every 0 --steps {STEPS}"
).split()


def until(found: Callable[[], object], what: str, seconds: float = 200) -> None:
    ends = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < ends, f"no {what} within {seconds} s"
        time.sleep(0.05)


def started(src: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*P3D, "train", str(src), str(out), *WORDS, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def step_of(out: Path) -> int:
    return checkpoints.newest_step(open_store(str(out), DEFAULTS)) or 0


@pytest.fixture(scope="module")
def whole(motions: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The result of the same training in one process, without Ray and without a stop."""
    store, record = planned(motions, tmp_path_factory.mktemp("whole") / "out", replace(OPTIONS, steps=STEPS))
    run_here(store, record, RUN)
    return store.read("weights.safetensors")


@pytest.mark.fault(1, 2)
def test_a_killed_driver_and_ctrl_c_lose_nothing(motions: Path, tmp_path: Path, whole: bytes) -> None:
    """kill -9 of the driver, then Ctrl-C of the resume, then a second resume: the same bits as without any."""
    out = tmp_path / "out"
    first = started(motions, out)
    until(lambda: step_of(out) >= 3, "third checkpoint")
    below = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.communicate()
    for one in below:  # Ray's processes end a little later by themselves, and write checkpoints until then
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(below, timeout=60)
    dead = p3d("status", out, "--json").json
    assert dead["state"] == "dead" and dead["exit_code"] == 6
    killed_at = step_of(out)
    second = subprocess.Popen([*P3D, "resume", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: step_of(out) > killed_at, "next checkpoint")
    second.send_signal(signal.SIGINT)
    _, said = second.communicate(timeout=120)
    assert second.returncode == 130 and "continue with:  p3d resume" in said, said
    stopped = p3d("status", out)
    assert "stopped at step" in " ".join(stopped.out.split())
    third = p3d("resume", out)
    assert third.code == 0 and "weights.safetensors" in third.out, third.err
    assert (out / "weights.safetensors").read_bytes() == whole
    again = p3d("train", motions, out, *WORDS)
    assert again.code == 0 and "nothing to do" in again.err
    other = p3d("train", motions, out, *WORDS, "--lr", "0.5")
    assert other.code == 5 and "lr 0.003, not 0.5" in other.err
    assert {"report.html", "train.json", "metrics.parquet"} <= {path.name for path in out.iterdir()}


@pytest.mark.fault(3)
def test_two_processes_one_of_which_is_killed(motions: Path, tmp_path: Path) -> None:
    """The others end with it, all start again from the last checkpoint, and the result can be used by a job."""
    out = tmp_path / "out"
    driver = started(motions, out, "--workers", "2")
    until(lambda: step_of(out) >= 2, "second checkpoint")
    mine = psutil.Process(driver.pid)
    workers = [one for one in mine.children(recursive=True) if "RayTrainWorker" in " ".join(one.cmdline() or [""])]
    assert len(workers) == 2, [one.cmdline() for one in mine.children(recursive=True)]
    workers[0].kill()
    said = driver.communicate(timeout=200)[1]
    assert driver.returncode == 0 and "starting again from the last checkpoint" in said, said
    job = tmp_path / "job"
    launched = p3d("launch", motions / "test", job, "--weights", out / "weights.safetensors", "--scores")
    assert launched.code == 0, launched.err
    shown = p3d("weights", "show", out / "weights.safetensors")
    assert "trained by p3d; start: random:0" in " ".join(shown.out.split())


def test_cancel_and_status_need_only_the_output(motions: Path, tmp_path: Path) -> None:
    """`status --watch` follows a run, `cancel` ends it after a step, with the exit code of a resumable stop."""
    out = tmp_path / "out"
    driver = started(motions, out, "--steps", "100000")
    until(lambda: step_of(out) >= 1, "first checkpoint")
    found = list[dict[str, Any]]()

    def trains() -> bool:
        found.append(p3d("status", out, "--json").json)
        return found[-1]["state"] == "running" and found[-1]["progress"]["clips_per_s"] > 0

    until(trains, "heartbeat of the training")
    assert found[-1]["progress"]["steps"] == 100000
    assert p3d("cancel", out).code == 0
    assert p3d("status", out, "--wait", "--exit-code").code == 6
    assert driver.wait(120) == 6
    driver.communicate()


def test_a_training_of_somebody_else_is_not_resumed(motions: Path, tmp_path: Path) -> None:
    """An output that was sent names videos, so it is refused until it is trusted."""
    _, record = planned(motions, tmp_path / "out")
    elsewhere = {"P3D_STATE": str(tmp_path / "state")}
    refused = p3d("resume", tmp_path / "out", env=elsewhere)
    assert refused.code == 5 and "not trusted" in refused.err
    trusted = p3d("trust", tmp_path / "out", env=elsewhere)
    assert trusted.code == 0 and f"training: {record.n_train + record.n_test} videos" in trusted.out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--init", "no.pth"], 2, "there is no weights file at no.pth"),
        (["--init", "random:0", "--model", "p3d64"], 2, "p3d63"),
        (["--init", "random:0"], 2, "--model"),
        (["--init", "random:0", "--model", "p3d63-flow"], 2, "optical flow"),
        (["--init", "random:0", "--model", "p3d-demo", "--batch-size", "5", "--workers", "2"], 2, "use a multiple"),
        (["--init", "random:0", "--model", "p3d-demo", "--device", "cuda"], 2, "there is no GPU"),
        (["--init", "random:0", "--model", "p3d-demo", "--schedule", "cosine"], 2, "one-cycle"),
        (["--init", "random:0", "--model", "p3d-demo", "--labels", "no.csv"], 2, "no.csv"),
    ],
)
def test_wrong_command_lines_have_one_message(
    words: list[str], code: int, message: str, motions: Path, tmp_path: Path
) -> None:
    """What is wrong is said at once, before Ray starts."""
    ran = p3d("train", motions, tmp_path / "out", *words)
    assert ran.code == code and message in " ".join(ran.err.split()), ran.err
    assert "Traceback" not in ran.err


def test_an_output_of_a_job_is_refused(motions: Path, tmp_path: Path) -> None:
    """A training does not write into embeddings, nor a job into a training, nor a resume with options of a job."""
    job, training = tmp_path / "job", tmp_path / "training"
    planned(motions, training)
    weights = Path(os.fspath(next((training / "weights").iterdir())))
    assert p3d("launch", motions / "test", job, "--weights", weights).code == 0
    refused = p3d("train", motions, job, *WORDS)
    assert refused.code == 5 and "not a training" in refused.err
    assert p3d("launch", motions / "test", training, "--weights", weights).code == 5
    odd = p3d("resume", training, "--batch-size", "8")
    assert odd.code == 2 and "--batch-size is an option of a job" in odd.err
