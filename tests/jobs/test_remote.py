"""A job on an existing cluster, joined or submitted to, with real Ray and its token."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from p3d.jobs.cli import cli, remote
from p3d.jobs.machine import Machines
from p3d.jobs.planning import prepare as planning
from p3d.jobs.planning.prepare import JobSpec, prepare, run_options
from p3d.jobs.scheduler.cluster import PROBES, Cluster, joined_cluster, refuse_silent
from p3d.jobs.scheduler.metrics import METRICS, output_tag
from p3d.jobs.scheduler.submission import openness
from p3d.pipeline.dataset.verify import audit
from p3d.pipeline.errors import ClusterError, InputError
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.storage.urls import open_store
from tests.conftest import LONG, P3D, p3d
from tests.jobs.embedded import embed_all
from tests.nodes import TOKEN, Nodes, nodes
from tests.servers import free_ports

LAUNCH = ("--shard-videos", 2, "--batch-size", 4, "--threads", 1)


@pytest.fixture(scope="module")
def head() -> Iterator[Nodes]:
    with nodes(1, cpus=2) as cluster:
        yield cluster


def finished(out: Path) -> tuple[int, int]:
    """(ok, lost) of an output that must be clean and complete."""
    from p3d.jobs.job import read_job

    store = open_store(str(out))
    result = audit(store, read_job(store))
    assert not result.damaged and result.pending == 0
    return result.ok, result.lost


def where(head: Nodes) -> tuple[str, str]:
    return "--address", head.address


def test_a_job_is_submitted_with_its_code_and_weights_and_left_alone(
    head: Nodes, tmp_path: Path, archive: Path, small_weights: Path
) -> None:
    """`--detach` returns with the next steps. The remote driver uses this code and the weights in OUT; from then on
    only the store is needed. The same launch again on the cluster adds nothing. No token is written."""
    weights = tmp_path / "mine.safetensors"
    weights.write_bytes(small_weights.read_bytes())
    out = tmp_path / "out"
    words = ("launch", archive, out, "--weights", weights, *LAUNCH, "--address", head.jobs_address)
    mine = head.env | {"P3D_STATE": str(tmp_path / "state")}  # the driver on the head cannot read it
    ran = p3d(*words, "--detach", env=mine)
    assert ran.code == 0, ran.err
    assert "submitted to" in ran.err and f"p3d status {out} --watch" in ran.err
    assert "INFO" not in ran.err, ran.err
    weights.unlink()  # it is in OUT
    assert p3d("status", out, "--json").json["state"] in ("submitted", "running")
    done = p3d("status", out, "--wait", "--json")
    assert (done.code, done.json["videos_done"], done.json["state"]) == (0, 12, "finished"), p3d(
        "jobs", "logs", out
    ).out
    assert finished(out) == (12, 0)
    assert not [path for path in out.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    mine_too = os.path.relpath(small_weights, archive)  # relative paths are those of the folder where p3d is called
    again = p3d("launch", ".", out, "--weights", mine_too, *LAUNCH, "--address", head.address, env=mine, cwd=archive)
    assert again.code == 0 and "nothing in SRC is new or changed" in again.err, again.err
    assert "not trusted" not in again.err
    lost = min((out / "clips").iterdir()).name
    for folder in ("clips", "videos", "failures"):
        (out / folder / lost).unlink()
    assert p3d("resume", out, "--address", head.jobs_address, env=head.env).code == 5
    resumed = p3d("resume", out, "--address", head.jobs_address, env=mine)  # the driver trusts what its client trusts
    assert resumed.code == 0 and finished(out) == (12, 0), resumed.err


def test_metrics_in_prometheus_match_the_dataset(
    head: Nodes, tmp_path: Path, archive: Path, small_weights: Path
) -> None:
    """The metrics at the endpoint of Ray's service discovery match the output: videos, clips, failures and bytes, and
    the seconds of its footers. Every metric but troubles exists and has the output as a tag; no tag holds a path."""
    videos = tmp_path / "videos"
    shutil.copytree(archive / "more", videos)
    (videos / "notes.mp4").write_bytes(b"nonsense")
    out = tmp_path / "out"
    ran = p3d("launch", videos, out, "--weights", small_weights, *LAUNCH, "--address", head.address, env=head.env)
    assert ran.code == 3, ran.err
    found = [sample for sample in head.samples() if sample.labels.get("output") == output_tag(str(out))]
    tags = ("reason", "stage", "kind")
    values = {(sample.name, *(sample.labels.get(tag, "") for tag in tags)): sample.value for sample in found}
    stats = [json.loads(pq.read_metadata(path).metadata[b"p3d.stats"]) for path in out.glob("clips/*.parquet")]
    assert values["ray_p3d_videos_total", "", "", ""] == 7
    assert values["ray_p3d_failed_videos_total", "not_a_video", "", ""] == 1
    assert [key for key in values if "failed" in key[0]] == [("ray_p3d_failed_videos_total", "not_a_video", "", "")]
    n_clips = sum(pq.ParquetFile(path).metadata.num_rows for path in out.glob("clips/*.parquet"))
    for name in ("clips", "encoded_clips"):
        assert values[f"ray_p3d_{name}_total", "", "", ""] == n_clips > 0
    for name in ("p3d_commit_seconds_count", "p3d_shard_seconds_count", "p3d_shards_total"):
        assert values[f"ray_{name}", "", "", ""] == len(stats) == 4
    assert values["ray_p3d_read_bytes_total", "", "", ""] == sum(path.stat().st_size for path in videos.iterdir())
    written = sum(path.stat().st_size for path in out.glob("clips/*.parquet"))
    assert values["ray_p3d_written_bytes_total", "", "", ""] == written
    seconds = {"encode_s": ("stage_seconds", "encode", ""), "wait_s": ("wait_seconds", "", "frames")}
    for column, (name, stage, kind) in seconds.items():
        expected = sum(one[column] for one in stats)
        assert values[f"ray_p3d_{name}_total", "", stage, kind] == pytest.approx(expected, rel=1e-6), column
    assert values["ray_p3d_stage_seconds_total", "", "decode", ""] > 0
    assert values["ray_p3d_stage_seconds_total", "", "commit", ""] > 0
    names = {metric.name for metric in METRICS if any(metric.name in sample.name for sample in found)}
    assert {metric.name for metric in METRICS} - names == {"p3d_troubles_total"}
    labels = {value for sample in found for value in sample.labels.values()}
    assert not [value for value in labels if str(tmp_path) in value or ".mp4" in value]


def test_a_driver_that_cannot_begin_is_reported_with_its_last_lines(
    head: Nodes, tmp_path: Path, small_weights: Path
) -> None:
    """SRC does not exist on the cluster: the message of the remote driver is shown, with an exit code."""
    words = ("launch", tmp_path / "nothing", tmp_path / "out", "--weights", small_weights, *LAUNCH)
    ran = p3d(*words, "--address", head.jobs_address, env=head.env)
    assert ran.code == 6 and "Its last lines" in ran.err and f"{tmp_path}/nothing" in ran.err, ran.err
    assert p3d("status", tmp_path / "out", "--json").json["state"] == "not started"  # the note is removed


@pytest.mark.skipif(not LONG, reason="make chaos kills nodes")
@pytest.mark.timeout(900)
def test_a_job_outlives_a_node_and_is_resumable_after_its_head(
    tmp_path: Path, archive: Path, small_weights: Path
) -> None:
    """One of three nodes is killed during the job: at most its two shards are repeated, and the job finishes. Then the
    head is killed: the driver stops, resumable, and another cluster continues. Nothing is lost or duplicated."""
    for victim, code in ((2, 0), (0, 6)):
        out = tmp_path / f"out{victim}"
        with nodes(3, gpus=1) as cluster:
            words = ("launch", archive, out, "--weights", small_weights, "--workers", 3, *LAUNCH[:2], "--batch-size", 1)
            with subprocess.Popen(
                [*P3D, *map(str, words), "--address", cluster.address],
                env={**cluster.env},
                stderr=subprocess.PIPE,
                text=True,
            ) as driver:
                until = time.monotonic() + 120
                while len(list(out.glob("clips/*"))) < 1:
                    assert time.monotonic() < until and driver.poll() is None
                    time.sleep(0.02)
                cluster.kill(victim)
                said = driver.communicate(timeout=300)[1]
            log = p3d("jobs", "logs", out).out
            print(f"node {victim} killed: exit code {driver.returncode}\n{said[-500:]}\n{log}")
            assert driver.returncode == code, said
        if code:
            assert p3d("resume", out).code == 0
        assert finished(out) == (12, 0)
        assert len(re.findall(r"worker \d+ died:", log)) <= 3
        assert log.count("is not committed") <= 2  # the shards of the lost worker, and no others


def test_an_output_is_verified_on_a_cluster(head: Nodes, tmp_path: Path, archive: Path, small_weights: Path) -> None:
    """The answer is that of this machine: counts, problems, exit code. A damaged plan is one message, as there."""
    out = tmp_path / "out"
    embed_all(str(archive), open_store(str(out)), JobSpec(None, str(small_weights)), tmp_path, shard_videos=1)
    damaged = sorted((out / "clips").iterdir())[1]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    for words in ((), ("--deep",)):
        here, there = (p3d("verify", out, "--json", *words, *more, env=head.env) for more in ((), where(head)))
        assert (there.code, there.out) == (here.code, here.out) and here.code == 7, there.err
        assert "joined 127.0.0.1" in there.err
    (plan,) = (out / "plans").glob("*/*.parquet")
    plan.write_bytes(plan.read_bytes()[:-9])
    broken = p3d("verify", out, *where(head), env=head.env)
    assert broken.code == 7 and "Traceback" not in broken.err and str(plan.name) in broken.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--address", "http://head:8265"), "p3d verify OUT --address auto"),
        (("--address", "auto", "--repair"), "--repair runs on this machine"),
        (("--address", "auto", "--recompute", "3"), "--recompute runs on this machine"),
    ],
)
def test_what_cannot_be_verified_on_a_cluster_is_a_usage_error(words: tuple[str, ...], said: str) -> None:
    ran = CliRunner().invoke(cli, ["verify", "out", *words])
    assert ran.exit_code == 2 and said in ran.output


def test_the_head_of_a_joined_cluster_is_dead_after_several_failed_probes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One failed probe is not enough. A cluster of our own is checked by its processes instead."""
    import p3d.jobs.scheduler.cluster

    now = [0.0]
    monkeypatch.setattr(p3d.jobs.scheduler.cluster.time, "monotonic", lambda: now[0])
    cluster = Cluster(Machines(1, 1, 0), tmp_path, head=("127.0.0.1", free_ports(1)[0]), asked=0.0)
    seen = []
    for _ in range(PROBES + 1):
        seen.append(cluster.dead())  # too early for the next probe
        now[0] += 6
        seen.append(cluster.dead())
    assert seen == [""] * (2 * PROBES - 1) + ["head"] + ["", "head"]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("nonsense", "HOST:PORT was expected"),
        ("127.0.0.1:x", "HOST:PORT was expected"),
        ("127.0.0.1:{port}", "nothing answers at 127.0.0.1:{port} "),
        ("ray://127.0.0.1:{port}", "nothing answers at ray://127"),
        ("http://127.0.0.1:{port}", "nothing answers at http://127"),
    ],
)
def test_an_address_without_a_server_is_refused_at_once(address: str, words: str) -> None:
    """Otherwise Ray would try for ten minutes."""
    port = free_ports(1)[0]
    kind = InputError if "expected" in words else ClusterError
    with pytest.raises(kind, match=words.format(port=port)):
        refuse_silent(address.format(port=port))


def test_a_cluster_that_has_ended_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` may find the address of a cluster that is gone, as in /tmp/ray/ray_current_cluster."""
    port = free_ports(1)[0]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(ClusterError, match=f"nothing answers at 127.0.0.1:{port} "), joined_cluster("auto"):
        pass


def test_detaching_needs_a_remote_driver(tmp_path: Path) -> None:
    """`--detach` without a job server is a usage error, not a job that ends with the terminal."""
    for words in (
        ("launch", str(tmp_path), str(tmp_path / "o"), "--weights", "random:0"),
        ("resume", "o"),
        ("retry", "o"),
    ):
        ran = CliRunner().invoke(cli, [*words, "--detach", "--address", "auto"])
        assert ran.exit_code == 2 and "--detach needs --address http" in ran.output


def test_nodes_cannot_be_checked_through_a_job_server() -> None:
    """`cluster check` at an http:// address says where to run it, instead of showing Ray's error."""
    ran = CliRunner().invoke(cli, ["cluster", "check", "--address", "http://head:8265"])
    assert ran.exit_code == 2 and "p3d cluster check --address auto" in ran.output


def test_an_insecure_address_gives_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback and encrypted addresses are fine; plain HTTP, or a cluster without a token, gives a warning."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert [openness(f"http://{host}:8265") for host in ("127.0.0.1", "[::1]", "localhost")] == [""] * 3
    assert openness("https://head:8265") == ""
    assert "is not encrypted and exposes the token" in openness("http://head:8265")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "can run code on it" in openness("https://head:8265")


def test_a_command_line_is_repeated_as_it_was_typed() -> None:
    """Typed options keep their values, defaults are left to the remote side, and names like options are arguments."""
    seen = []

    @click.command("verb")
    @click.argument("src")
    @click.option("--times", type=int, default=3)
    @click.option("--rate", type=float)
    @click.option("--reason", "reasons", multiple=True)
    @click.option("--flag", is_flag=True)
    @click.option("--keep/--drop", default=True)
    @click.option("--secret")
    def verb(**_: object) -> None:
        seen.append(remote.words_again(click.get_current_context(), src="/abs/-x", secret=None))

    CliRunner().invoke(
        verb, ["--rate", "2", "--reason", "a", "--reason", "b", "--flag", "--drop", "--secret", "s", "--", "-x"]
    )
    assert seen == [["verb", "--rate", "2.0", "--reason", "a", "--reason", "b", "--flag", "--drop", "--", "/abs/-x"]]


def test_a_clusters_machines_decide_the_defaults() -> None:
    """Workers follow its GPUs, decodes all its cores, threads its smallest machine; given options stay."""
    there = Machines(cpus=96, node_cpus=16, gpus=8)
    options = run_options({}, there=there)
    assert (options.workers, options.batch_size, options.decode_tasks, options.threads) == (8, 32, 12, 8)
    assert run_options({}, there=Machines(4, 2, 0)).workers == 1
    assert run_options({}, there=there, workers=2, device="cpu").batch_size == planning.default_batch("cpu")


def test_weights_may_be_an_object_on_s3(bucket: str, small_weights: Path, tmp_path: Path) -> None:
    """The recipe is the same as from the file; a missing object gives an error with its name."""
    open_store(f"s3://{bucket}/w").create("my weights.safetensors", small_weights)
    named = f"s3://{bucket}/w/my%20weights.safetensors"
    from_s3 = prepare(JobSpec(None, named), StoreOptions())
    from_file = prepare(JobSpec(None, str(small_weights)))
    assert from_s3.recipe == from_file.recipe and from_s3.origin == from_file.origin
    with pytest.raises(InputError, match=f"there is no weights file s3://{bucket}/w/none"):
        prepare(JobSpec(None, f"s3://{bucket}/w/none"), StoreOptions())
