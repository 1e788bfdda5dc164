"""A job on a cluster that is there already: joined, or submitted to and left alone. Real Ray, with its token."""

from __future__ import annotations

import json
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
from p3d.jobs.scheduler.cluster import PROBES, Cluster, refuse_silent
from p3d.jobs.scheduler.metrics import METRICS, output_tag
from p3d.jobs.scheduler.submission import openness
from p3d.pipeline.dataset.verify import audit
from p3d.pipeline.errors import ClusterError, InputError
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.storage.urls import open_store
from tests.conftest import LONG, P3D, p3d
from tests.nodes import TOKEN, Nodes, nodes
from tests.servers import free_ports

LAUNCH = ("--shard-videos", 2, "--batch-size", 4, "--threads", 1)


@pytest.fixture(scope="module")
def head() -> Iterator[Nodes]:
    with nodes(1, cpus=2) as cluster:
        yield cluster


def finished(out: Path) -> tuple[int, int]:
    """(ok, lost) of an output that must be clean and whole."""
    from p3d.jobs.job import read_job

    store = open_store(str(out))
    result = audit(store, read_job(store))
    assert not result.damaged and result.pending == 0
    return result.ok, result.lost


def test_a_job_is_submitted_with_its_code_and_weights_and_left_alone(
    head: Nodes, tmp_path: Path, archive: Path, small_weights: Path
) -> None:
    """`--detach` returns with the next steps; the driver over there uses this code and the weights that were put into
    OUT; from then on the store is all that is needed. The same again over there adds nothing. No token is written."""
    weights = tmp_path / "mine.safetensors"
    weights.write_bytes(small_weights.read_bytes())
    out = tmp_path / "out"
    words = ("launch", archive, out, "--weights", weights, *LAUNCH, "--address", head.jobs_address)
    ran = p3d(*words, "--detach", env=head.env)
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
    again = p3d("launch", archive, out, "--weights", small_weights, *LAUNCH, "--address", head.address, env=head.env)
    assert again.code == 0 and "nothing in SRC is new or changed" in again.err, again.err


def test_what_prometheus_reads_is_what_the_dataset_says(
    head: Nodes, tmp_path: Path, archive: Path, small_weights: Path
) -> None:
    """Over the endpoint that Ray's service discovery names: videos, clips, failures and bytes are those of the output,
    seconds those of its footers, and every metric of the table but troubles is there, with a tag for the output and
    none that holds a path."""
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


def test_a_driver_that_cannot_begin_is_told_with_its_last_words(
    head: Nodes, tmp_path: Path, small_weights: Path
) -> None:
    """SRC is not there on the cluster: the sentence of the driver over there comes back, with an exit code."""
    words = ("launch", tmp_path / "nothing", tmp_path / "out", "--weights", small_weights, *LAUNCH)
    ran = p3d(*words, "--address", head.jobs_address, env=head.env)
    assert ran.code == 6 and "Its last words" in ran.err and f"{tmp_path}/nothing" in ran.err, ran.err
    assert p3d("status", tmp_path / "out", "--json").json["state"] == "not started"  # nobody waits for it


@pytest.mark.skipif(not LONG, reason="make chaos kills nodes")
@pytest.mark.timeout(900)
def test_a_job_outlives_a_node_and_is_resumable_after_its_head(
    tmp_path: Path, archive: Path, small_weights: Path
) -> None:
    """Of three nodes one is killed in mid-job: at most its two shards are done again and the job finishes. Then the
    head is killed: the driver says so and stops resumable, and another cluster goes on. Nothing is lost or doubled."""
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
        assert log.count("is not committed") <= 2  # what the lost worker had in hand, and not what others had


def test_the_head_of_anothers_cluster_is_dead_when_it_does_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once is not enough, and one answer begins anew; a cluster of our own is asked for its processes instead."""
    import p3d.jobs.scheduler.cluster

    now = [0.0]
    monkeypatch.setattr(p3d.jobs.scheduler.cluster.time, "monotonic", lambda: now[0])
    cluster = Cluster(Machines(1, 1, 0), tmp_path, head=("127.0.0.1", free_ports(1)[0]), asked=0.0)
    seen = []
    for _ in range(PROBES + 1):
        seen.append(cluster.dead())  # too early to knock again
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
def test_an_address_where_nothing_is_is_refused_at_once(address: str, words: str) -> None:
    """Ray would try for ten minutes."""
    port = free_ports(1)[0]
    with pytest.raises(ClusterError, match=words.format(port=port)):
        refuse_silent(address.format(port=port))


def test_detaching_needs_somebody_else_to_run_the_driver(tmp_path: Path) -> None:
    """`--detach` without a job server is a usage error, not a job that dies with the terminal."""
    for words in (
        ("launch", str(tmp_path), str(tmp_path / "o"), "--weights", "random:0"),
        ("resume", "o"),
        ("retry", "o"),
    ):
        ran = CliRunner().invoke(cli, [*words, "--detach", "--address", "auto"])
        assert ran.exit_code == 2 and "--detach needs --address http" in ran.output


def test_a_job_server_cannot_ask_the_nodes() -> None:
    """`cluster check` at the address of a launch is a sentence that says where to run it, not Ray's error."""
    ran = CliRunner().invoke(cli, ["cluster", "check", "--address", "http://head:8265"])
    assert ran.exit_code == 2 and "p3d cluster check --address auto" in ran.output


def test_what_is_open_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback and encrypted ways are fine; a plain way, or a cluster without a token, is a sentence."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert [openness(f"http://{host}:8265") for host in ("127.0.0.1", "[::1]", "localhost")] == [""] * 3
    assert openness("https://head:8265") == ""
    assert "who listens sees the token" in openness("http://head:8265")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "can run code on it" in openness("https://head:8265")


def test_a_command_line_is_said_again_as_it_was_typed() -> None:
    """Options that were typed, with their values; defaults are the other side's; a name is no option."""
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
    """Workers for its GPUs, decodes for all its cores, threads for its smallest machine; what is given stays."""
    there = Machines(cpus=96, node_cpus=16, gpus=8)
    options = run_options({}, there=there)
    assert (options.workers, options.batch_size, options.decode_tasks, options.threads) == (8, 32, 12, 8)
    assert run_options({}, there=Machines(4, 2, 0)).workers == 1
    assert run_options({}, there=there, workers=2, device="cpu").batch_size == planning.default_batch("cpu")


def test_weights_may_be_an_object_on_s3(bucket: str, small_weights: Path, tmp_path: Path) -> None:
    """The same recipe as from the file; one that is not there is a mistake with its name."""
    open_store(f"s3://{bucket}/w").create("my weights.safetensors", small_weights)
    named = f"s3://{bucket}/w/my%20weights.safetensors"
    from_s3 = prepare(JobSpec(None, named), StoreOptions())
    from_file = prepare(JobSpec(None, str(small_weights)))
    assert from_s3.recipe == from_file.recipe and from_s3.origin == from_file.origin
    with pytest.raises(InputError, match=f"there is no weights file s3://{bucket}/w/none"):
        prepare(JobSpec(None, f"s3://{bucket}/w/none"), StoreOptions())
