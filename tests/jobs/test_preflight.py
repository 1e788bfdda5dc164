"""Before a job starts: every node can run it, or the launch says which one cannot, and why."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
from ray._private import ray_constants

from p3d.jobs.cli import cli
from p3d.jobs.machine import Machines, gpu_software
from p3d.jobs.scheduler import cluster as clusters
from p3d.jobs.scheduler import preflight
from p3d.jobs.scheduler.cluster import (
    _absolute_tmpdir,
    _sessions,
    inspect_nodes,
    local_cluster,
    own_token,
    refuse_few_processes,
    refuse_unfit,
    refuse_without_loopback,
)
from p3d.jobs.scheduler.preflight import SCRATCH_BYTES, NodeReport, look_here, objections
from p3d.pipeline.errors import ClusterError
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.storage.urls import open_store
from tests.conftest import p3d

HERE = NodeReport("here", 2, "/tmp", 10**12, {"torch": "2.13.0", "av": "18.0"}, "c0de", ("decord", "av"), "", "")


def test_the_token_of_a_local_cluster_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clusters have two tokens; afterwards the environment has the user's own, for a cluster to join."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "theirs")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    seen = set[str]()
    for _ in range(2):
        with own_token():
            seen.add(os.environ["RAY_AUTH_TOKEN"])
        assert os.environ["RAY_AUTH_TOKEN"] == "theirs" and "RAY_AUTH_MODE" not in os.environ
    assert len(seen) == 2 and "theirs" not in seen


def test_too_few_processes_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `ulimit -u 60` Ray aborted, or the command never ended. Root has no such limit."""
    monkeypatch.setattr("resource.getrlimit", lambda _: (60, 60))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    refuse_few_processes()
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(ClusterError, match=r"only 60 processes .* `ulimit -u`"), local_cluster():
        raise AssertionError("Ray was started")


def test_a_relative_tmpdir_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray and its processes start in another working directory, and refuse a relative one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", "t t")
    monkeypatch.setenv("RAY_TMPDIR", "")
    _absolute_tmpdir()
    assert (os.environ["TMPDIR"], os.environ["RAY_TMPDIR"]) == (f"{tmp_path}/t t", "")


def test_a_machine_without_loopback_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container without any network. Ray would try to reach itself for many minutes."""
    refuse_without_loopback()

    def down(*_: object, **__: object) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr("socket.create_connection", down)
    with pytest.raises(ClusterError, match=r"cannot connect to itself at 127\.0\.0\.1"), local_cluster():
        raise AssertionError("Ray was started")


@pytest.mark.parametrize("what", ["open", "link", "file"])
def test_a_folder_for_sessions_that_is_not_private_is_refused(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user may have made it beforehand; the message names it."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    folder = tmp_path / f"p3d-{os.geteuid()}"
    {"open": folder.mkdir, "link": lambda: folder.symlink_to(tmp_path), "file": folder.touch}[what]()
    with pytest.raises(ClusterError, match=f"{folder}.*set TMPDIR"):
        _sessions()


@pytest.mark.parametrize(
    ("changes", "downloads", "words"),
    [
        ({}, True, None),
        ({"host": "other", "cpus": 96, "decoders": ("av",)}, True, None),
        ({"code": "0ther"}, False, "imports other code"),
        ({"software": {"torch": "2.12.0", "av": "18.0"}}, False, r"torch 2.12.0 \(here 2.13.0\)"),
        ({"decoders": ("decord",)}, False, "cannot import PyAV"),
        ({"scratch_bytes": SCRATCH_BYTES - 1}, True, "2.1 GB free in /tmp"),
        ({"scratch_bytes": 0}, False, None),
        ({"out": "no such thing"}, False, "there: no such thing"),
        ({"source": "denied"}, False, "there: denied"),
    ],
)
def test_each_objection_is_one_message(changes: dict, downloads: bool, words: str | None) -> None:
    """A node with a relevant difference is named with what to do; other differences are accepted."""
    import re

    found = objections(
        [HERE, replace(HERE, host="there"), replace(HERE, **{"host": "there"} | changes)], downloads=downloads
    )
    assert len(found) == (words is not None)
    assert words is None or re.search(words, found[0])


def smi(folder: Path, script: str) -> None:
    """An nvidia-smi for the PATH."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_the_software_of_a_gpu_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name and driver by nvidia-smi, and CUDA, cuDNN and FFmpeg; "absent" where unknown, nothing without a GPU."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_software() == {}
    names = ["gpu", "driver", "cuda", "cudnn", "ffmpeg"]
    found = gpu_software("NVIDIA L4")
    assert list(found) == names and (found["gpu"], found["driver"]) == ("NVIDIA L4", "absent")
    smi(tmp_path, 'echo "NVIDIA H100 80GB HBM3, 570.86.15"; echo "NVIDIA H100 80GB HBM3, 570.86.15"')
    found = look_here("", "", "", DEFAULTS).software
    assert (found["gpu"], found["driver"]) == ("NVIDIA H100 80GB HBM3", "570.86.15")
    assert set(names) <= set(found) and all(found.values())
    smi(tmp_path, 'echo "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver"; exit 9')
    assert gpu_software() == {}


def test_gpus_are_shown_by_the_check_of_a_cluster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A node without a GPU has no text in those columns."""
    there = {"gpu": "NVIDIA L4", "driver": "570.86", "cuda": "13.0", "cudnn": "91200", "ffmpeg": "5"}
    nodes = [HERE, replace(HERE, host="there", software=HERE.software | there | {"torchcodec": "0.17.0"})]
    machines = SimpleNamespace(machines=Machines(4, 2, 1))
    monkeypatch.setattr(clusters, "local_cluster", lambda: contextlib.nullcontext(machines))
    monkeypatch.setattr(clusters, "inspect_nodes", lambda *_: (nodes, []))
    assert cli.main(["cluster", "check"], standalone_mode=False) == 0
    head, here, other, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[-6:] == ["gpu", "driver", "cuda", "cudnn", "torchcodec", "ffmpeg"]
    assert here.split()[-1] == "18.0"
    assert " ".join(other.split()[-7:]) == "NVIDIA L4 570.86 13.0 91200 0.17.0 5"


@pytest.mark.fault(10)
def test_a_gpu_is_tried_before_a_job_that_decodes_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node with a GPU decodes the sample file, and gives one message if it cannot; other nodes are not asked."""
    monkeypatch.setattr(preflight, "not_here", lambda: "")
    monkeypatch.setattr(preflight, "sample_problem", lambda: "its GPU does not decode the sample file (CUDA error)")
    host = platform.node()
    assert preflight.try_gpu() == f"--decoder nvdec on {host}: its GPU does not decode the sample file (CUDA error)"
    monkeypatch.setattr(preflight, "sample_problem", lambda: "")
    assert preflight.try_gpu() == ""
    ray.init(address="local", num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)  # Ray believes it
    try:
        with pytest.raises(ClusterError, match=f"^--decoder nvdec on {host}: tor[^;]*$"):  # no torchcodec, or no GPU
            refuse_unfit("", "", "", DEFAULTS, nvdec=True)
        refuse_unfit("", "", "", DEFAULTS)
        assert clusters.ask_nodes(preflight.try_gpu, num_gpus=2) == ([], [])
    finally:
        ray.shutdown()


def test_a_machine_reports_what_it_sees(tmp_path: Path, bucket: str) -> None:
    """OUT and the source are read through its own stores; what is missing gives a message, not an exception."""
    (tmp_path / "job.json").touch()
    assert (look_here(str(tmp_path), "job.json", str(tmp_path), DEFAULTS).out) == ""
    lost = look_here(str(tmp_path / "no"), "job.json", str(tmp_path / "no"), DEFAULTS)
    assert "does not see" in lost.out and "s3://" in lost.out and "is not on this node" in lost.source
    open_store(f"s3://{bucket}").create("job.json", b"{}")
    assert look_here(f"s3://{bucket}", "job.json", f"s3://{bucket}/v", DEFAULTS).out == ""
    lost = look_here(f"s3://{bucket}", "other", "s3://there-is-no-such-bucket/v", DEFAULTS)
    assert "does not see" in lost.out and "there is no such bucket" in lost.source


@pytest.fixture
def second_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cluster of two nodes; the second has a separate file system below the path that is given."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)  # not on loopback, which allows only one node
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        address = ray.get_runtime_context().gcs_address
        start = f"exec {Path(sys.executable).parent / 'ray'} start --address={address} --num-cpus=1 --block"
        node = subprocess.Popen(
            ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs none {hidden} && {start}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        family = []
        try:
            until = time.monotonic() + 60
            while sum(one["Alive"] for one in ray.nodes()) < 2:
                if node.poll() is not None:
                    said = node.communicate()[0]
                    if "unshare" in said:
                        pytest.skip(f"no private mounts here: {said.strip()}")
                    raise AssertionError(said)
                assert time.monotonic() < until
                time.sleep(0.1)
            family = psutil.Process(node.pid).children(recursive=True)
            yield hidden
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                family.append(psutil.Process(node.pid))
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            node.wait()
    finally:
        ray.shutdown()


def test_a_folder_that_one_node_does_not_see_is_refused_as_output(second_node: Path, tmp_path: Path) -> None:
    """A local OUT on two nodes is refused, since the second would write to its own disk; a shared one is not."""
    for folder in (second_node, tmp_path):
        (folder / "job.json").touch()
    nodes, problems = inspect_nodes(str(tmp_path), "job.json", "", DEFAULTS)
    assert (len(nodes), problems) == (2, [])
    with pytest.raises(ClusterError, match=f"does not see what is in {second_node}; use s3://"):
        refuse_unfit(str(second_node), "job.json", "", DEFAULTS)


def test_the_cluster_can_be_checked_before_a_job(tmp_path: Path, archive: Path) -> None:
    """`p3d cluster check` shows each node, leaves nothing in OUT, and lists the problems."""
    out = tmp_path / "out"
    ran = p3d("cluster", "check", out, "--source", archive, "--json")
    assert (ran.code, ran.json["problems"], len(ran.json["nodes"])) == (0, [], 1), ran.err
    assert [path for path in out.rglob("*") if path.is_file()] == []
    ran = p3d("cluster", "check", "--source", tmp_path / "no")
    assert ran.code == 6 and "is not on this node" in ran.err
    assert ran.out.splitlines()[0].split() == ["node", "cores", "scratch", "decoders", "torch", "av"]
