"""The command line: a user's mistake gives one message and a documented exit code, and nothing is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from p3d.jobs.cli import VERBS, cli, output
from p3d.jobs.cli.dataset import _wrapped
from p3d.jobs.cli.output import EXIT_CODES, escape, human_bytes, human_time, table
from p3d.jobs.cli.progress import show_progress
from p3d.jobs.scheduler import control
from p3d.jobs.scheduler.run_snapshot import RunSnapshot, ShardCounts, VideoCounts, WorkerSnapshot
from p3d.jobs.worker.autoscale import Load
from p3d.pipeline.dataset.commit import commit_shard
from p3d.pipeline.errors import REASON_MEANING, REASON_REMEDY, Reason
from p3d.pipeline.storage.local import LocalStore
from tests.conftest import REPO, p3d
from tests.owned import own
from tests.pipeline.rows import planned, recipe, shard_rows


def test_the_generated_documentation_is_up_to_date() -> None:
    """The generated pages and tables of docs match the code."""
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=REPO, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("verb", ["", *VERBS, "weights import", "weights show", "weights fetch", "weights list"])
def test_help_answers_on_every_verb(verb: str) -> None:
    """--help of every verb works and fits 80 columns."""
    result = CliRunner().invoke(cli, [*verb.split(), "--help"], terminal_width=80)
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 4
    assert max(map(len, result.output.splitlines())) <= 80


def test_help_groups_its_options_and_explains_those_of_stores_once() -> None:
    """Every option is under a heading, and of all verbs only `launch` explains the options of S3."""
    helps = {verb: CliRunner().invoke(cli, [verb, "--help"], terminal_width=80).output for verb in ("launch", "status")}
    heads = re.findall(r"^(\S.*):$", helps["launch"], re.M)
    assert heads == ["What is computed", "Which videos", "Speed and limits", "Options", "S3"]
    assert "Use this AWS profile" in helps["launch"] and "Use this AWS profile" not in helps["status"]
    assert re.search(r"--profile, .*see `p3d launch --help`", helps["status"], re.S)


@pytest.fixture
def mistakes(tmp_path: Path, archive: Path, small_weights: Path) -> Path:
    """A folder with an empty source, invalid weights files, and a list that names a video twice."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt.bak").write_text("x")
    (tmp_path / "text.safetensors").write_text("not weights")
    (tmp_path / "cut.safetensors").write_bytes(small_weights.read_bytes()[:1000])
    (tmp_path / "twice.txt").write_text("a.mp4\na.mp4\n")
    (tmp_path / "bad.csv").write_text("colour\nred\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear aunt")
    for name in ("lfs.safetensors", "lfs.mp4"):
        (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12\n")
    (tmp_path / "latin1.csv").write_bytes(b"path,title\na.mp4,caf\xe9\n")
    (tmp_path / "odd.jsonl").write_text('{"path": "a.mp4"}\n{"path"\n')
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """A finished job of one video, and one that failed."""
    store = LocalStore(str(tmp_path_factory.mktemp("made") / "job"))
    manifest = planned(store, ("a", "b"))
    commit_shard(store, shard_rows(manifest, 0), recipe(), manifest.user_columns(0))
    own(store)
    return store


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Botocore finds neither keys nor files of an account."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / "nowhere"))


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("", 2, "Usage"),
        ("lauch a b", 2, "Did you mean 'launch'? The verbs are"),  # codespell:ignore lauch
        ("results servr {made}", 2, "Did you mean 'serve'? The verbs are"),
        ("weights importt x", 2, "Did you mean 'import'?"),
        ("launch {archive}", 2, "OUT"),
        ("launch {archive} {out}", 2, "--weights"),
        ("launch {archive} {out} --weights random:0", 2, "--model"),
        ("launch {archive} {out} --weights random:0 --model p3d63 --decoder nvdec", 2, "Use auto, decord or pyav"),
        ("launch {archive} {out} --weights random:0 --model p3d63 --fps 0", 2, "--fps"),
        ("launch {archive} {out} --weights random:x --model p3d63", 2, "whole number"),
        (
            "launch {archive} {out} --weights random:0 --model p3d64",
            2,
            "error: no network is called 'p3d64'; did you mean",
        ),
        ("launch {archive} {out} --weights {small} --model p3d64", 2, "(`p3d models` lists all)"),
        ("launch {archive} {out} --model p3d64", 2, "error: no network is called 'p3d64'; did you mean p3d63"),
        (
            "plan {archive} --weights {small} --model p3d64",
            2,
            "error: no network is called 'p3d64'; did you mean p3d63",
        ),
        ("weights show {small} --model p3d64", 2, "No such option"),
        ("weights import {small} -o {here}/x.safetensors --model p3d64", 2, "error: no network is called 'p3d64'"),
        ("plan {archive}", 2, "p3d weights fetch"),
        ("launch {archive} {archive} {out} --weights {small}", 2, "Quote a name with blanks, and a pattern"),
        ("launch {archive} {out} --include a.mp4 b.mp4 --weights {small}", 2, "quote it: --include '*.mp4'"),
        ("launch {archive} {out} --weigths {small}", 2, "Did you mean '--weights'?"),
        ("launch {archive} {out} -weights {small}", 2, "Did you mean --weights?"),
        (
            "launch {archive} {out} --weights {here}/lfs.safetensors",
            2,
            "Git LFS pointer, not the file itself; run `git",
        ),
        ("weights show {here}/lfs.safetensors", 2, "run `git lfs pull`"),
        ("launch {archive} s3:/bucket/out --weights {small}", 2, "which has the form s3://bucket/prefix"),
        ("launch s3:/bucket/videos {out} --weights {small}", 2, "which has the form s3://bucket/prefix"),
        ("launch s3//bucket/videos {out} --weights {small}", 2, "which has the form s3://bucket/prefix"),
        ("status s3:bucket/out", 2, "which has the form s3://bucket/prefix"),
        ("launch {archive} s3:// --weights {small}", 2, "must be s3://bucket or s3://bucket/prefix"),
        (
            "launch {archive} s3://bucket/out --weights {small}",
            8,
            "no credentials; run `aws configure`, or give --profile",
        ),
        ("launch s3://bucket/videos {out} --weights {small}", 8, "no credentials; run `aws configure`"),
        ("launch {archive} {out} --weights s3://bucket/w.safetensors", 8, "no credentials; run `aws configure`"),
        ("status s3://bucket/out", 8, "no credentials; run `aws configure`"),
        ("launch {archive} s3://b/out --weights {small} --profile nobody", 8, "see --profile and ~/.aws/config"),
        ("launch {archive} {out} --weights {small} --detach", 2, "--detach needs --address http://HEAD:8265"),
        ("launch {archive} {out} --weights {small} --endpoint-url 127.0.0.1:9", 2, "not of the form http://host:port"),
        ("launch {here}/latin1.csv {out} --weights {small}", 2, "line 2 is not UTF-8: 'a.mp4,caf\\\\xe9'. Convert it"),
        ("launch {here}/odd.jsonl {out} --weights {small}", 2, "odd.jsonl, line 2 is not JSON"),
        ("launch {archive}/no*.mp4 {out} --weights {small}", 2, "as a pattern it matches no video"),
        ("launch {archive} {out} --weights {small} --include no", 2, "patterns match paths below SRC"),
        ("launch {archive}/video0.mp4 {out} --weights {small} --exclude x", 2, "need a folder or a prefix"),
        ("launch {archive} {made}", 2, "no longer holds its weights; give them with --weights"),
        ("launch {archive} {made} --weights {small}", 5, "was made with other settings: model p3d63, not p3d-demo"),
        ("launch {archive} {archive} --weights {small}", 2, "are the same place"),
        ("launch {archive}/*.mp4 {archive} --weights {small}", 2, "are the same place"),
        ("plan {made} {made}", 2, "are the same place"),
        ("launch {out} {archive}", 2, "/out is empty or does not exist. SRC comes first: `p3d launch /"),
        ("plan {made} {archive} --weights {small}", 2, "is an output of p3d. SRC comes first: `p3d launch /"),
        ("cluster check --source s3:/bucket", 2, "which has the form s3://bucket/prefix"),
        ("retry {made} --reason no_frame", 2, "did you mean no_frames?"),
        ("retry {made} --reason corrupt", 2, "did you mean corrupt_frames or source_corrupt?"),
        ("retry {out}", 4, "no job exists"),
        ("failures {made} --reason truncate", 2, "did you mean truncated?"),
        ("search {made} nowhere.mp4", 2, "give a video file, or a video_id, uri or path"),
        ("search {made} b.mp4", 2, "it failed, see `p3d failures"),
        ("search {made} a.mp4 --where fps>x", 2, "column fps holds numbers; compare it with one instead of 'x'"),
        ("search {made} a.mp4 --where fsp>1", 2, "there is no column 'fsp'; there are video_id"),
        ("search {made} a.mp4 --index", 2, "run `p3d results index"),
        ("results snapshot {made} {here}/full", 5, "not empty"),
        ("results evaluate {made} --labels {here}/bad.csv", 2, "embed its videos into another output with --scores"),
        ("jobs list {here}/nowhere", 2, "needs the folder that contains the outputs"),
        ("trust {archive}", 4, "no job exists"),
        ("launch {archive} {out} --weights random:0 --model p3d63-flow", 2, "optical flow"),
        ("plan {archive} --weights random:0 --model p3d63-flow", 2, "optical flow"),
        ("launch {archive} {out} --weights {small} --precision fp8", 2, "'fp32', 'tf32', 'bf16', 'fp16'"),
        ("launch {archive} {out} --weights {small} --precision fp16 --device cpu", 2, "for CUDA devices"),
        ("weights choose {here}/none.safetensors --labelled {archive}", 2, "there is no weights file"),
        ("weights choose {small} --labelled {archive}", 2, "has no label"),
        ("weights choose {small} --labelled {archive} --class-names {here}/none.txt", 2, "could not be read"),
        ("launch {archive} {out} --weights {here}/none.safetensors", 2, "there is no weights file"),
        ("launch {archive} {out} --weights {here}/text.safetensors", 2, "text.safetensors"),
        ("launch {archive} {out} --weights {here}/cut.safetensors", 2, "cut.safetensors"),
        ("launch {archive} {out} --weights {small} --model p3d199", 2, "p3d199"),
        ("launch {archive} {out} --weights {small} --clips often", 2, "every:16"),
        ("launch {archive} {out} --weights {small} --clips every:0", 2, "every:16"),
        ("launch {archive} {out} --weights {small} --max-failures many", 2, "5%"),
        ("launch {archive} {out} --weights {small} --device tpu", 2, "is not one of 'auto', 'cpu', 'cuda', 'mps'"),
        ("launch {archive} {out} --weights {small} --device cuda:1", 2, "Set CUDA_VISIBLE_DEVICES to choose GPUs"),
        ("launch {archive} {out} --weights {small} --batch-size 0", 2, "--batch-size"),
        ("launch {archive} {out} --weights {small} --id-column id", 2, "needs a CSV, TSV, JSONL or Parquet list"),
        ("launch {here}/nowhere {out} --weights {small}", 2, "does not exist"),
        ("launch {here}/empty {out} --weights {small}", 2, "no videos"),
        (
            "launch {here}/twice.txt {out} --weights {small}",
            2,
            "listed more than once, the first as a.mp4 in lines 1, 2",
        ),
        ("launch {here}/bad.csv {out} --weights {small}", 2, "no column of paths"),
        ("launch http://example.org/v {out} --weights {small}", 2, "only local paths and s3://"),
        ("launch {archive} gs://bucket/x --weights {small}", 2, "only folders and s3://"),
        ("launch {archive} {here}/full --weights {small}", 5, "holds no job"),
        ("launch {archive} {here}/twice.txt/out --weights {small}", 8, "a file exists where a folder is needed"),
        ("plan {here}/empty --weights {small}", 2, "no videos"),
        ("resume {out}", 4, "no job exists"),
        ("status {out}", 4, "no job exists"),
        ("cancel {out}", 4, "no job exists"),
        ("failures {out}", 4, "no job exists"),
        ("verify {out}", 4, "no job exists"),
        ("verify s3://b --endpoint-url http://user:secret@127.0.0.1:9", 2, "credentials"),
    ],
)
@pytest.mark.usefixtures("no_credentials")
def test_a_mistake_gives_one_message_and_a_code(
    mistakes: Path, archive: Path, small_weights: Path, made: LocalStore, words: str, code: int, says: str
) -> None:
    """Each mistake gives its documented code and a message with the cause, no traceback, and writes nothing."""
    before = sorted([*mistakes.rglob("*"), *made.root.rglob("*")])
    names = {"archive": archive, "out": mistakes / "out", "here": mistakes, "small": small_weights, "made": made.root}
    ran = in_process(*words.format(**names).split())
    assert ran[0] == code, ran
    assert says in ran[2]
    assert "Traceback" not in ran[2]
    assert "secret" not in ran[2]
    assert ran[1] == ""
    assert sorted([*mistakes.rglob("*"), *made.root.rglob("*")]) == before


def in_process(*args: str) -> tuple[int, str, str]:
    """(code, stdout, stderr) of a command line, run as `main` does but in this process, which is faster."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["p3d", *args]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = output.run_cli(cli)
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def job(tmp_path: Path) -> LocalStore:
    """A job of three shards, of which two are committed."""
    store = LocalStore(str(tmp_path / "out"))
    manifest = planned(store, tuple("abcdefghij"))
    for shard in (0, 1):
        commit_shard(store, shard_rows(manifest, shard), recipe(), manifest.user_columns(shard))
    own(store)
    return store


def test_status_answers_without_any_control_file(job: LocalStore) -> None:
    """Without `_job/` the totals come from the footers; status exits 0, and --exit-code says resumable."""
    code, out, _ = in_process("status", job.url, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["schema_version"] == 1
    assert (found["shards_done"], found["shards_all"]) == (2, 3)
    assert (found["videos_done"], found["videos_failed"], found["videos_all"]) == (8, 2, 10)
    assert found["failures"] == {"truncated": 2}
    assert in_process("status", job.url, "--exit-code")[0] == 6


def test_status_of_a_finished_job_mirrors_it(job: LocalStore) -> None:
    """With all shards committed the job is finished, and --wait exits 3 because videos failed."""
    manifest = planned(job, tuple("abcdefghij"))
    commit_shard(job, shard_rows(manifest, 2), recipe(), manifest.user_columns(2))
    code, out, _ = in_process("status", job.url, "--wait")
    assert code == 3
    assert "finished" in out
    assert "10/10 videos (100%)" in out


def test_a_submitted_driver_that_has_not_begun_is_waited_for(job: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a newer run begins, `status` says so and waits, and exits 6 after the time limit; `cancel` reports that
    nothing runs yet. A run that began, or a complete output, has its usual status."""
    from p3d.jobs.cli import status

    control.tell_submitted(job, "http://head:8265", "p3d-1", after=0)
    code, out, _ = in_process("status", job.url, "--json")
    found = json.loads(out)
    assert (code, found["state"], found["exit_code"]) == (0, "submitted", None)
    assert found["sentence"] == "submitted to http://head:8265 as p3d-1; the driver has not started"
    before = LocalStore(f"{job.url}-2")
    before.create("job.json", job.read("job.json"))
    control.tell_submitted(before, "http://head:8265", "p3d-1", after=0)
    said = in_process("status", before.url)[1].split()
    assert " ".join(said).endswith("submitted submitted to http://head:8265 as p3d-1; the driver has not started")
    assert "videos" not in said  # it has not planned
    _, _, err = in_process("cancel", job.url)
    assert "the driver has not started" in err and "Cancel again" in err
    monkeypatch.setattr(status, "BEGIN_S", 0.0)
    assert in_process("status", job.url, "--wait")[0] == 6
    monkeypatch.setattr(status, "BEGIN_S", 60.0)
    naps = []

    def begin(seconds: float) -> None:
        naps.append(seconds)
        epoch = control.claim(job, {}, takeover=False, say=lambda text: None)
        control.beat(job, epoch.number, RunSnapshot(counter=1, state="stopped", exit_code=6, sentence="cancelled"))

    monkeypatch.setattr(status.time, "sleep", begin)
    code, out, _ = in_process("status", job.url, "--wait")
    assert (code, len(naps)) == (6, 1) and "cancelled" in out
    assert "nothing is running" in in_process("cancel", job.url)[2]
    control.tell_submitted(job, "http://head:8265", "p3d-2", after=1)
    control.beat(job, 1, RunSnapshot(counter=2, state="running"))
    assert "asked" in in_process("cancel", job.url)[2]  # the running one, although another was submitted
    control.beat(job, 1, RunSnapshot(counter=3, state="stopped", exit_code=6, sentence="cancelled"))
    assert json.loads(in_process("status", job.url, "--json")[1])["state"] == "submitted"
    control.forget_submitted(job)
    assert json.loads(in_process("status", job.url, "--json")[1])["state"] == "stopped"
    manifest = planned(job, tuple("abcdefghij"))
    control.tell_submitted(job, "http://head:8265", "p3d-2", after=1)
    commit_shard(job, shard_rows(manifest, 2), recipe(), manifest.user_columns(2))
    assert json.loads(in_process("status", job.url, "--json")[1])["state"] == "finished"


def test_status_shows_a_running_job_from_its_heartbeat(job: LocalStore) -> None:
    """The content of the heartbeat is shown: rate, ETA, workers and their load; lines fit 80 columns."""
    epoch = control.claim(job, {}, takeover=False, say=lambda text: None)
    load = Load(0.34, 0.97, 0.0, 12, queued=1.5)
    worker = WorkerSnapshot(
        worker=0, state="busy", device="cpu", host="h", shards=("1/2",), videos=1, clips=7, load=load, limit="decoding"
    )
    now = RunSnapshot(
        counter=3,
        state="running",
        videos=VideoCounts(all=10, done=9, failed=2),
        shards=ShardCounts(all=3, done=2),
        clips=17,
        clips_per_s=1.5,
        eta_s=65.0,
        elapsed_s=10.0,
        failures={"truncated": 2},
        workers=(worker,),
    )
    control.beat(job, epoch.number, now)
    code, out, _ = in_process("status", job.url)
    assert code == 0
    for words in (
        "running",
        "9/10 videos",
        "1.50 clips/s",
        "ETA 1:05",
        "2 truncated",
        "97% of 12",
        "34%     1.5  97%",
        "1 in progress  0 queued",
        "limited by decoding, the network is busy 34%",
    ):
        assert words in out
    assert max(map(len, out.splitlines())) <= max(80, len(job.url) + 40)
    told = json.loads(in_process("status", job.url, "--json")[1])
    assert told["workers"] == json.loads(json.dumps(now.to_json()["workers"])) and told["limit"] == "decoding"


def test_the_failures_of_a_job_are_shown_in_whole_words(job: LocalStore) -> None:
    """At 80 columns the line of failures breaks between two reasons only, and no line ends with a blank."""
    epoch = control.claim(job, {}, takeover=False, say=lambda text: None)
    failures = {str(reason): 100 - at for at, reason in enumerate(Reason)}
    counts = {"videos": VideoCounts(all=2000, done=1900, failed=1729), "shards": ShardCounts(all=3, done=2)}
    control.beat(job, epoch.number, RunSnapshot(counter=3, state="running", clips=9, failures=failures, **counts))
    lines = in_process("status", job.url)[1].splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("failures: "))
    shown = lines[first:]
    assert len(shown) > 3 and max(map(len, shown)) <= 80 and shown == [line.rstrip() for line in shown]
    assert all(line.endswith(",") for line in shown[:-1]) and "  - clips/s  ETA -" in "\n".join(lines)
    assert " ".join(shown) == "failures: " + ", ".join(f"{count} {reason}" for reason, count in failures.items())


def test_plain_progress_shows_no_speed_before_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    """Where stderr is not a terminal, a line has a dash until a clip is embedded, and then the speed."""
    with show_progress(3) as tell:
        tell(RunSnapshot(counter=1, state="running", videos=VideoCounts(all=3, done=0, failed=0)))
        tell(RunSnapshot(counter=2, state="stopped", clips=4, clips_per_s=2.5))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "0/3 videos, 0 failed, 0 clips, - clips/s, ETA -"
    assert "4 clips, 2.50 clips/s" in second


def test_cancel_asks_the_live_run_and_only_that(job: LocalStore) -> None:
    """cancel writes a request for the newest epoch; without a running job it says so."""
    code, _, err = in_process("cancel", job.url)
    assert (code, "nothing is running" in err) == (0, True)
    epoch = control.claim(job, {}, takeover=False, say=lambda text: None)
    assert in_process("cancel", job.url, "--now")[0] == 0
    assert control.cancel_asked(job, epoch.number) == {"now": True}


def test_failures_are_printed_as_table_csv_and_json(job: LocalStore) -> None:
    """The same failures in three forms; --reason filters; an unknown reason is a mistake."""
    printed = in_process("failures", job.url)[1].splitlines()
    assert printed[0] == f"2 truncated: {REASON_MEANING[Reason.TRUNCATED]}"
    assert printed[1].startswith("  what to do: ") and len(printed) == 3 + 2
    assert printed[3:] == ["    b.mp4 and 1 more", "        ends early"]
    every = in_process("failures", job.url, "--all")[1].splitlines()
    assert every[:3] == printed[:3] and [line.strip() for line in every[3::2]] == ["b.mp4", "f.mp4"]
    assert " ".join(printed[1:3]).split()[3:] == REASON_REMEDY[Reason.TRUNCATED].split()
    for reason in Reason:  # lines of 80 columns that do not split option names
        lines = [*_wrapped(f"9999 {reason}: {REASON_MEANING[reason]}", ""), *_wrapped(REASON_REMEDY[reason], "  ")]
        assert max(map(len, lines)) <= 80 and not any(line.endswith("-") for line in lines)
    csv = in_process("failures", job.url, "--csv")[1].splitlines()
    assert csv[0].startswith("video_id,path,uri")
    assert len(csv) == 3
    rows = json.loads(in_process("failures", job.url, "--json", "--reason", "truncated")[1])["failures"]
    assert [row["video_id"] for row in rows] == ["b", "f"]
    assert in_process("failures", job.url, "--reason", "internal")[2] == "no failures\n"
    assert in_process("failures", job.url, "--reason", "bad luck")[0] == 2


def test_verify_says_whether_the_job_is_complete(job: LocalStore) -> None:
    """Exit code 6 while shards are missing, 7 with the file name when a file is damaged."""
    code, out, _ = in_process("verify", job.url, "--json")
    assert (code, json.loads(out)["reasons"]) == (6, {"truncated": 2})
    alien = job.root / "clips" / "deadbeef-000000000.parquet"
    alien.write_bytes(b"x")
    code, out, err = in_process("verify", job.url)
    assert code == 7
    assert "deadbeef" in err
    assert "unexpected" in out


@pytest.mark.fault(44)
def test_an_edited_job_is_refused(job: LocalStore) -> None:
    """A changed recipe in job.json is reported as damage (row 44)."""
    path = job.root / "job.json"
    path.write_text(path.read_text().replace("every:16", "every:08"))
    code, _, err = in_process("status", job.url)
    assert (code, "edited" in err) == (7, True)


@pytest.mark.fault(42)
def test_an_output_with_another_recipe_is_refused(job: LocalStore, archive: Path, small_weights: Path) -> None:
    """Launching other weights into a job exits 5, lists the differences, and changes nothing (row 42).

    Weights of another origin are named by it.
    """
    before = {path: path.stat().st_mtime_ns for path in job.root.rglob("*")}
    code, _, err = in_process("launch", str(archive), job.url, "--weights", str(small_weights), "--clips", "every:8")
    assert code == 5
    assert "clips every:16, not every:8" in err
    assert "weights_sha256" in err
    assert {path: path.stat().st_mtime_ns for path in job.root.rglob("*")} == before


def test_models_are_listed() -> None:
    """Every network is listed with size, cost and clip, in 80 columns even with a speed; JSON has the same."""
    _, text, said = in_process("models")
    assert re.search(r"p3d199 +199 +66,492,240 +267 +18.4 +2048 +16x160x160", text)
    assert re.search(r"deepvideo-slow +8 +[0-9,]+ +246 +4.1 +4096 +10x170x170", text)
    assert max(map(len, text.splitlines())) + len("  clips/s") <= 80 and max(map(len, said.splitlines())) <= 80
    found = {one["name"]: one for one in json.loads(in_process("models", "--json")[1])["models"]}
    assert list(found) == [line.split()[0] for line in text.splitlines()[1:]]
    assert found["p3d63"]["layers"] == 63
    assert found["c3d"]["crop_hw"] == [112, 112]


def test_models_are_measured() -> None:
    """--measure times the given networks and reports the device, the median and the range."""
    words = ("models", "--model", "p3d-demo", "--measure")
    code, out, err = in_process(*words, "--json")
    assert code == 0, err
    record = json.loads(out)
    (one,) = record["models"]
    assert one["name"] == "p3d-demo"
    assert 0 < one["speed"]["lowest"] <= one["speed"]["clips_per_s"] <= one["speed"]["highest"]
    assert record["measured"]["batch_size"] >= 1
    assert "round 3 of 3: p3d-demo" in err
    code, _, err = in_process("models", "--model", "deepvideo-sinlge")
    assert (code, "did you mean deepvideo-single" in err) == (2, True)


def test_plan_counts_and_writes_nothing(tmp_path: Path, archive: Path, real_weights: Path) -> None:
    """plan gives exact counts of videos and shards, counts clips from the files, and writes nothing."""
    ran = p3d("plan", archive, tmp_path / "out", "--weights", real_weights, "--shard-videos", 5, "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["n_videos"], ran.json["n_shards"], ran.json["skipped"]) == (12, 3, ["readme.txt"])
    assert ran.json["n_clips"] == 28
    assert ran.json["clips_per_s"] > 0
    assert (ran.json["n_tried"], ran.json["binding"], ran.json["useful_cores"]) == (12, "network", None)
    assert 10_000 < ran.json["output_bytes"] < 28 * 2048 * 8  # all videos begin with the same frames and compress well
    assert ran.json["decode_s_per_clip"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(51)
def test_names_cannot_control_a_terminal() -> None:
    """Control characters of a file name are escaped (row 51)."""
    assert escape("a\x1b[31mb\x07\x9b") == "a\\x1b[31mb\\x07\\x9b"
    assert escape("é\nline") == "é\\x0aline"


def test_exit_codes_are_documented() -> None:
    """Every code that an error maps to is in the table."""
    from p3d.pipeline import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.JobError)]
    assert {output.exit_code(kind.__new__(kind)) for kind in kinds} <= EXIT_CODES.keys()


def test_output_is_formatted_for_people() -> None:
    """Sizes, times and tables are easy to read."""
    assert [human_bytes(n) for n in (5, 1500, 2.5e9)] == ["5 B", "1.5 kB", "2.5 GB"]
    assert [human_time(s) for s in (None, 9, 75, 11100)] == ["-", "9 s", "1 min 15 s", "3 h 05 min"]
    assert table([("a", "1"), ("bbb", "22")], right=(1,)) == ["a     1", "bbb  22"]


@pytest.mark.parametrize("words", [(), ("results",), ("weights",)])
def test_a_bare_command_shows_its_help(words: tuple[str, ...]) -> None:
    """`p3d` alone prints the help with its lines, on stderr, and exits 2."""
    code, printed, said = in_process(*words)
    assert (code, printed) == (2, "") and said.startswith("Usage: ") and "\\x0a" not in said
    assert len(said.splitlines()) > 8


def test_a_name_with_a_dash_is_explained(job: LocalStore) -> None:
    """A file name that looks like an option gets a hint, and a mistyped option does not."""
    assert "is written after --, as in `-- -NAME`" in in_process("search", job.url, "-dash.mp4")[2]
    for words in ("launch --hepl", "launch --frobnicate", "launch -weights x"):
        assert "is written after --" not in in_process(*words.split())[2]


def test_an_argument_too_many_of_a_verb_without_arguments_gets_no_hint() -> None:
    """Such a verb takes no name or pattern that a shell could have cut or replaced."""
    said = in_process("models", "p3d63")[2]
    assert "unexpected extra argument (p3d63)" in said and "Quote" not in said


def test_a_job_json_that_is_gone_is_named(job: LocalStore) -> None:
    """If plans are there, the message does not advise to launch into that folder."""
    (job.root / "job.json").unlink()
    code, _, said = in_process("status", job.url)
    assert code == 4 and "job.json is gone" in said and "launch" not in said


def test_an_output_that_is_a_file_is_wrong_input(tmp_path: Path) -> None:
    """Exit code 2, and what to name instead."""
    (tmp_path / "file").write_text("")
    code, _, said = in_process("status", str(tmp_path / "file"))
    assert code == 2 and "is a file; name a folder" in said
