"""Jobs on machines that lack something: disk space, permissions, file descriptors, shared memory, a correct clock.

Private mounts (`unshare -rm`) give each test its own file system; where they are not allowed, a test is skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from p3d.pipeline.storage.local import LocalStore
from tests.conftest import LONG, P3D, Ran, p3d


def in_private_mounts(setup: str, *args: object, env: dict[str, str] | None = None) -> Ran:
    """`p3d ARGS` after the shell commands of `setup`, whose mounts only this process and its children see."""
    command = " ".join(shlex.quote(str(word)) for word in [*P3D, *args])
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{setup}\n{command}"],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if "unshare" in done.stderr and ("not permitted" in done.stderr or "failed" in done.stderr):
        pytest.skip(f"no private mounts here: {done.stderr.strip()}")
    return Ran(done.returncode, done.stdout, done.stderr)


# one core, 8 MB of /dev/shm, and the usual limit of open files
LITTLE = "mount -t tmpfs -o size=8m none /dev/shm\nulimit -n 1024\ntaskset -pc 0 $$ > /dev/null"


@pytest.mark.fault(36, 53, 54)
def test_a_full_disk_stops_a_job_on_a_small_machine_and_a_resume_finishes_it(
    tmp_path: Path, archive: Path, small_weights: Path
) -> None:
    """Exit 6 names the path. No partial or temporary file is left. With free space, a resume finishes. One core, 8 MB
    of /dev/shm and 1024 open files are enough for both runs."""
    out, kept = tmp_path / "disk" / "out", tmp_path / "kept"
    out.parent.mkdir()
    size = small_weights.stat().st_size + 120_000  # the weights fit, and a few shards
    copy = f"code=$?; cp -r {out} {kept}; exit $code"
    script = f"{LITTLE}\nmount -t tmpfs -o size={size} none {out.parent}"
    words = ["launch", archive, out, "--weights", small_weights, "--shard-videos", 1]
    command = " ".join(shlex.quote(str(word)) for word in [*P3D, *words])
    ran = in_private_mounts(f"{script}\n({command})\n{copy}", "--version")
    assert ran.code == 6, ran.err
    assert f"{out}" in ran.err and "the disk is full; free some space and resume" in ran.err
    assert f"p3d resume {out}" in ran.err
    assert list((kept / "_job" / "tmp").iterdir()) == []
    found = p3d("verify", kept, "--deep", "--json").json
    assert not found["damaged"] and found["ok"] + found["pending"] == 12 and found["ok"] > 0 < found["pending"]
    again = in_private_mounts(LITTLE, "resume", kept, "--trust")
    assert again.code == 0, again.err
    assert p3d("verify", kept, "--deep").code == 0
    stats = [json.loads(pq.read_metadata(path).metadata[b"p3d.stats"]) for path in (kept / "clips").iterdir()]
    assert {one["threads"] for one in stats} == {1}


@pytest.mark.fault(39)
def test_an_output_that_cannot_be_written_is_refused_at_launch(
    tmp_path: Path, archive: Path, small_weights: Path
) -> None:
    """A read-only file system gives one message, before Ray starts or a video is read."""
    out = tmp_path / "disk" / "out"
    out.parent.mkdir()
    ran = in_private_mounts(
        f"mount -t tmpfs -o ro none {out.parent}", "launch", archive, out, "--weights", small_weights
    )
    assert (ran.code, ran.out) == (8, "")
    assert ran.err.splitlines()[-1].startswith(f"error: {out}") and "read-only" in ran.err
    assert "Traceback" not in ran.err and "starting" not in ran.err


@pytest.mark.parametrize("words", [["status", "out"], ["launch", "/videos", "/out", "--weights", "random:0"]])
def test_a_working_directory_that_was_deleted_is_a_message(tmp_path: Path, words: list[str]) -> None:
    """Exit 2, and the message says what to do, also for absolute paths."""
    (tmp_path / "gone").mkdir()
    command = " ".join(shlex.quote(word) for word in [*P3D, *words])
    done = subprocess.run(
        ["sh", "-c", f"rmdir '{tmp_path}/gone'; exec {command}"],
        cwd=tmp_path / "gone",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    expected = "error: the working directory is no longer there"
    assert done.stderr.splitlines()[-1].startswith(expected) and "Traceback" not in done.stderr


@pytest.mark.fault(39)
def test_an_output_without_hard_links_is_refused_at_launch(tmp_path: Path, archive: Path, small_weights: Path) -> None:
    """If results cannot be written exactly once, nothing is written: the error names the file system and a remedy."""
    if not Path("/dev/shm").is_dir() or shutil.which("unshare") is None:
        pytest.skip("no file system without hard links can be made here")
    store, true = LocalStore(str(tmp_path / "out")), os.link

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    os.link = refuse
    try:
        with pytest.raises(Exception, match=r"has no hard links .* Write to a local disk or to S3"):
            store.prove_create_once()
    finally:
        os.link = true


@pytest.mark.skipif(not LONG, reason="Ray tries for half a minute: make chaos")
@pytest.mark.fault(53)
def test_too_few_descriptors_are_an_error_and_not_a_hang(tmp_path: Path, archive: Path, small_weights: Path) -> None:
    """If Ray cannot start, the job ends in bounded time with the possible causes, and can be resumed."""
    out = tmp_path / "out"
    ran = in_private_mounts("ulimit -n 32", "launch", archive, out, "--weights", small_weights)
    assert ran.code == 6, ran.err
    assert "Ray could not start" in ran.err and "ulimit -n" in ran.err and "Traceback" not in ran.err
    assert p3d("status", out, "--json").json["state"] == "dead"


@pytest.mark.fault(55)
def test_an_output_that_goes_away_in_mid_job_stops_it_and_is_not_made_again(
    tmp_path: Path, archive: Path, small_weights: Path
) -> None:
    """A disk that is pulled after the first commit: exit 6, nothing at its old place, nothing lost on the disk."""
    out, pulled = tmp_path / "disk" / "out", tmp_path / "pulled"
    words = ["launch", archive, out, "--weights", small_weights, "--shard-videos", 1, "--clips", "uniform:200"]
    with subprocess.Popen([*P3D, *map(str, words)], stderr=subprocess.PIPE, text=True) as job:
        try:
            while job.poll() is None and not any((out / "clips").glob("*.parquet")):
                time.sleep(0.02)
            out.rename(pulled)
            _, said = job.communicate(timeout=60)
        finally:
            job.kill()
    assert job.returncode == 6, said
    assert f"{out}/job.json is gone, or another file or folder is in its place" in said
    assert f"continue with:  p3d resume {out}" in said and "no committed shard is lost" not in said
    assert not out.exists()
    found = p3d("verify", pulled, "--deep", "--json").json
    assert not found["damaged"] and found["ok"] > 0 < found["pending"]


@pytest.mark.fault(60)
def test_a_full_temporary_folder_is_named_and_weights_are_not_copied_there(
    tmp_path: Path, archive: Path, small_weights: Path
) -> None:
    """With TMPDIR full, a search for a new video works on an output in a folder; a run says which folder is full."""
    store = LocalStore(str(tmp_path / "out"))
    content = small_weights.read_bytes()
    key = f"weights/{hashlib.sha256(content).hexdigest()}.safetensors"
    store.create(key, content)
    script = f"""import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from types import SimpleNamespace
from p3d.jobs.job import stored_weights
from p3d.jobs.scheduler.cluster import local_cluster
from p3d.pipeline.errors import StoreFull
from p3d.pipeline.storage.local import LocalStore
stored_weights(LocalStore({store.url!r}), SimpleNamespace(weights_sha256={key[8:72]!r}))
try:
    local_cluster().__enter__()
except StoreFull as error:
    print(error)
"""
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "tmp").mkdir()
    setup = (
        f"mount -t tmpfs -o size=64k none {tmp_path}/tmp\nTMPDIR={tmp_path}/tmp {sys.executable} {tmp_path}/script.py"
    )
    ran = in_private_mounts(setup, "--version")
    assert ran.out.startswith(f"{tmp_path}/tmp/") and "the disk is full" in ran.out, ran.err
    assert "or set TMPDIR to another folder" in ran.out.splitlines()[0]
