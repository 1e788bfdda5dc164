"""A job that this user neither launched nor trusted is read-only, and names nothing that is read or connected to."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import p3d.jobs.scheduler.run as running
from p3d.jobs import trust
from p3d.jobs.api import runs as launching
from p3d.jobs.api.search import _settings_of
from p3d.jobs.cli.options import options_typed
from p3d.jobs.job import manifests, read_job, rows_of
from p3d.jobs.planning.prepare import JobSpec, prepare
from p3d.jobs.scheduler import control, submission
from p3d.jobs.scheduler.run_snapshot import RunSnapshot
from p3d.jobs.scheduler.state import Finish
from p3d.jobs.trust import need_trust
from p3d.pipeline.dataset.commit import commit_shard
from p3d.pipeline.dataset.plans import Manifest, NewestPlans, load_plans, write_plan
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.errors import DamagedJob, OtherRecipe, StoreError, Untrusted
from p3d.pipeline.recipe import JobRecord, Recipe, RunOptions, ShardSizing, new_job_id
from p3d.pipeline.sources.below import SourceRule, is_below
from p3d.pipeline.sources.listing import find
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import DEFAULTS, Store, StoreOptions
from p3d.pipeline.storage.urls import open_store
from tests.conftest import REPO
from tests.jobs.embedded import embed_all
from tests.jobs.served import serving
from tests.jobs.test_cli import in_process
from tests.owned import own
from tests.pipeline.rows import planned, recipe, shard_rows, videos
from tests.zoo import make

EPOCH = {"number": 1, "host": "far\x1b[2Jaway", "boot_id": "", "pid": 1, "started": "2026-01-02T03:04:05Z"}
REFUSED = (
    ["resume"],
    ["retry"],
    ["cancel"],
    ["cancel", "--now"],
    ["verify", "--repair"],
    ["verify", "--recompute", "3"],
)


@pytest.fixture(autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of each test."""
    folder = tmp_path_factory.mktemp("state") / "p3d"
    monkeypatch.setenv("P3D_STATE", str(folder))
    return folder


@pytest.fixture
def foreign(tmp_path: Path) -> LocalStore:
    """A job that somebody else launched: three shards, of which two are committed."""
    store = LocalStore(str(tmp_path / "out"))
    manifest = planned(store, tuple("abcdefghij"))
    for shard in (0, 1):
        commit_shard(store, shard_rows(manifest, shard), recipe(), manifest.user_columns(shard))
    epoch = {**EPOCH, "user": "mallory", "options": RunOptions(1, 1, 1, 1).to_dict()}
    store.create("_job/epochs/000001.json", json.dumps(epoch).encode())
    return store


def words(verb: list[str], out: str) -> list[str]:
    return [verb[0], out, *verb[1:]]


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("verb", REFUSED)
def test_a_foreign_job_is_not_changed(foreign: LocalStore, state: Path, verb: list[str]) -> None:
    """The verbs that work for a job refuse a foreign one with exit code 5, its origin and `p3d trust`; OUT stays."""
    before = content(foreign.root)
    code, out, err = in_process(*words(verb, foreign.url))
    assert (code, out) == (5, "")
    assert "mallory@far" in err and "2026-01-02T03:04:05Z" in err and f"p3d trust {foreign.url}" in err
    assert "\x1b" not in err and len(err.splitlines()) == 1
    assert content(foreign.root) == before and not state.exists()


def test_a_foreign_job_can_be_looked_at(foreign: LocalStore, state: Path, tmp_path: Path) -> None:
    """Verbs that only read work without trust, and do not give it: a copy of a foreign job is foreign, too."""
    dest = str(tmp_path / "dest")
    for line, code in (
        (["status", foreign.url], 0),
        (["verify", foreign.url], 6),
        (["failures", foreign.url], 0),
        (["search", foreign.url, "a"], 0),
        (["jobs", "logs", foreign.url], 0),
        (["results", "snapshot", foreign.url, dest, "--skip-pending"], 0),
        (["results", "report", foreign.url, "-o", str(tmp_path / "r.html")], 0),
        (["verify", dest], 0),
    ):
        assert in_process(*line)[0] == code, in_process(*line)
    assert not state.exists() and not trust.is_trusted(LocalStore(dest), trust.owned_at(LocalStore(dest)))


def test_trust_is_given_once_and_by_name(foreign: LocalStore, state: Path) -> None:
    """`p3d trust` says whose job it is and where its videos are; then cancel works. The record is private."""
    code, out, err = in_process("trust", foreign.url, "--region", "eu-west-1")
    assert code == 0 and "plan 1: 10 videos below file:///v/" in out
    assert "mallory@far\\x1b[2Jaway" in err and "2026-01-02" in err
    assert in_process("cancel", foreign.url)[0] == 0
    (record,) = state.iterdir()
    assert record.stat().st_mode & 0o077 == 0 and state.stat().st_mode & 0o077 == 0
    found = trust.own_record(foreign, read_job(foreign))
    assert found is not None and (found.how, found.options.region) == ("trusted", "eu-west-1")
    assert "you have trusted this job" in in_process("trust", foreign.url)[2]


def test_a_job_is_trusted_and_used_in_one_step(foreign: LocalStore) -> None:
    """--trust does what `p3d trust` does, and goes on."""
    code, _, err = in_process("cancel", foreign.url, "--trust")
    assert code == 0 and "trusted from now on" in err and "mallory" in err
    assert in_process("cancel", foreign.url)[0] == 0


def test_trust_ends_when_another_job_is_there(foreign: LocalStore, tmp_path: Path) -> None:
    """A job that was moved, or whose place has another job of the same recipe, is not trusted."""
    own(foreign)
    job = read_job(foreign)
    assert trust.is_trusted(foreign, job)
    assert not trust.is_trusted(foreign, replace(job, job_id=new_job_id()))
    foreign.root.rename(tmp_path / "moved")
    moved = LocalStore(str(tmp_path / "moved"))
    assert not trust.is_trusted(moved, read_job(moved))
    foreign.root.symlink_to(moved.root)  # it resolves to the new place
    assert not trust.is_trusted(foreign, job)


def test_the_endpoint_is_part_of_the_place(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bucket at another server is another place, and AWS has one place in all regions."""
    here = open_store("s3://archive/out/", DEFAULTS)
    assert trust.place_of(here) == ("s3://archive/out", s3_server["AWS_ENDPOINT_URL"])
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    for options, endpoint in (
        (StoreOptions(endpoint_url="http://127.0.0.1:9"), "http://127.0.0.1:9"),
        (StoreOptions(region="eu-west-1"), ""),
        (StoreOptions(region="us-east-1"), ""),
    ):
        assert trust.place_of(open_store("s3://archive/out", options)) == ("s3://archive/out", endpoint)


@pytest.mark.parametrize(
    ("listed", "trusted"),
    [
        ("{out}", True),
        ("s3://bucket/other:{out}/", True),
        ("file://{out}", True),
        ("{out}/deeper", False),
        ("{parent}", False),
        ("yes", False),
        ("1", False),
        ("*", False),
        (":", False),
        ("", False),
    ],
)
def test_unattended_runs_list_their_outputs(
    foreign: LocalStore, monkeypatch: pytest.MonkeyPatch, listed: str, trusted: bool
) -> None:
    """P3D_TRUST trusts the outputs that it lists and no other: there is no word for all of them."""
    monkeypatch.chdir(foreign.root)
    monkeypatch.setenv("P3D_TRUST", listed.format(out=foreign.url, parent=foreign.root.parent))
    assert in_process("cancel", foreign.url)[0] == (0 if trusted else 5)


def test_a_url_in_the_list_is_one_output(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The colon of s3:// does not separate entries."""
    monkeypatch.setenv("P3D_TRUST", os.pathsep.join(["/elsewhere", "s3://bucket/out/", "/more"]))
    assert trust.is_listed(open_store("s3://bucket/out")) and trust.is_listed(LocalStore("/more"))
    assert not trust.is_listed(open_store("s3://bucket/out2")) and not trust.is_listed(open_store("s3://bucket"))


# --- which videos are read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "root", "expected"),
    [
        ("file://{tmp}/v/a.mp4", "{tmp}/v", True),
        ("file://{tmp}/v/sub/%61.mp4", "{tmp}/v/", True),
        ("file://{tmp}/v/a.mp4", "file://{tmp}/v", True),
        ("file://{tmp}/v/a.mp4", "{tmp}/v/a.mp4", True),
        ("file://{tmp}/v/a.mp4", "/", True),
        ("file://{tmp}/v/a.mp4", "{tmp}/link-to-v", True),
        ("{tmp}/v/a.mp4", "{tmp}/v", True),
        ("file://{tmp}/v2/a.mp4", "{tmp}/v", False),
        ("file://{tmp}/v/../secret", "{tmp}/v", False),
        ("file://{tmp}/v/%2e%2e/secret", "{tmp}/v", False),
        ("file://{tmp}/v/out/secret", "{tmp}/v", False),
        ("file://v/a.mp4", "{tmp}/v", False),
        ("v/a.mp4", "{tmp}/v", False),
        ("file://{tmp}/v/%00", "{tmp}/v", False),
        ("", "{tmp}/v", False),
        ("http://host/v/a.mp4", "{tmp}/v", False),
        ("s3://bucket/v/a.mp4", "{tmp}/v", False),
        ("s3://bucket/v/a.mp4", "/", False),
        ("file://{tmp}/v/a.mp4", "s3://bucket", False),
        ("s3://bucket/v/a.mp4", "s3://bucket/v", True),
        ("s3://bucket/v/a.mp4", "s3://bucket/v/", True),
        ("s3://bucket/v/a.mp4", "s3://bucket", True),
        ("s3://bucket/v%2Fa.mp4", "s3://bucket/v", True),
        ("s3://bucket/v2/a.mp4", "s3://bucket/v", False),
        ("s3://bucket2/v/a.mp4", "s3://bucket", False),
        ("s3://bucket/v/../w/a.mp4", "s3://bucket/v", False),
        ("s3://bucket/v/%2E%2E/w/a.mp4", "s3://bucket/v", False),
        ("s3://bucket/%ff", "s3://bucket", False),
    ],
)
def test_only_what_is_below_the_root_is_below_it(tmp_path: Path, uri: str, root: str, expected: bool) -> None:
    """Links, dots, encodings and prefixes of names do not lead out of a root, whatever the kind of place."""
    (tmp_path / "v" / "sub").mkdir(parents=True)
    (tmp_path / "v" / "out").symlink_to(tmp_path)
    (tmp_path / "link-to-v").symlink_to(tmp_path / "v")
    assert is_below(uri.format(tmp=tmp_path), root.format(tmp=tmp_path)) is expected


def add_plan_of(store: Store, seq: int, names: str, folder: Path, chosen: Recipe) -> Manifest:
    """A plan of files in a folder, four in a shard."""
    table = videos(names)
    uris = [f"file://{folder}/{name}.mp4" for name in names]
    table = table.set_column(table.schema.get_field_index("uri"), "uri", [uris])
    return Manifest(store, write_plan(store, seq, chosen, with_shards(table, ShardSizing(4)), 0, ShardSizing()))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The uris that each run would read; the run itself ends at once, as if all shards were done."""
    read: list[set[str]] = []

    def loop(_: JobRecord, run: running.ClaimedRun, plans: dict[int, Manifest], work: Any, *__: Any) -> Finish:
        read.append({video.uri for seq, shard in work.todo for video in plans[seq].shard(shard).videos})
        control.beat(run.store, run.epoch.number, RunSnapshot(counter=2, state="finished"))
        return Finish(0, "finished")

    monkeypatch.setattr(running, "_loop", loop)
    return read


def test_a_resume_of_a_foreign_job_reads_only_below_the_source(
    foreign: LocalStore, tmp_path: Path, ran: list[set[str]]
) -> None:
    """`resume --source ROOT` runs the plans below ROOT, names the others, inherits no option, and is not finished."""
    own_folder, private = tmp_path / "own", tmp_path / "private"
    add_plan_of(foreign, 2, "kl", own_folder, recipe())
    add_plan_of(foreign, 3, "mn", private, recipe())
    options = RunOptions(77, 1, 1, 1, s3=StoreOptions(endpoint_url="http://203.0.113.1")).to_dict()
    foreign.create("_job/epochs/000002.json", json.dumps({**EPOCH, "number": 2, "options": options}).encode())
    foreign.create("_job/heartbeats/000002.json", b'{"counter": 1, "state": "stopped"}')
    code, _, err = in_process("resume", foreign.url, "--source", str(own_folder))
    assert code == 6 and ran == [{f"file://{own_folder}/{name}.mp4" for name in "kl"}]
    assert re.search(r"plan 1 is skipped: file:///v/\w.mp4", err) and f"plan 3 is skipped: file://{private}" in err
    status = json.loads(in_process("status", foreign.url, "--json")[1])
    assert (status["state"], status["exit_code"]) == ("stopped", 6) and "skipped plans: 1, 3" in status["sentence"]
    epoch = control.newest_epoch(foreign)
    assert epoch is not None and (epoch.number, epoch.options["workers"], epoch.user) == (3, 1, trust.user_name())
    assert epoch.options["s3"]["endpoint_url"] is None
    assert in_process("resume", foreign.url, "--source", str(tmp_path / "nothing"))[0] == 6 and len(ran) == 1


def test_a_launch_into_a_foreign_job_reads_only_its_own_source(
    small_weights: Path, tmp_path: Path, ran: list[set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It plans SRC although a foreign plan that it skips names the same video, and a trusted launch runs all plans."""
    source, private = tmp_path / "v", tmp_path / "private"
    source.mkdir()
    make.video(source / "a.mp4", "libx264", 16)
    prepared = prepare(JobSpec(None, str(small_weights)))
    store = LocalStore(str(tmp_path / "out"))
    line = ("launch", str(source), store.url, "--weights", str(small_weights), "--device", "cpu")
    monkeypatch.setenv("P3D_STATE", str(tmp_path / "of somebody else"))
    launching.job_of(store, prepared, None, DEFAULTS, False, print)
    found = find(str(source), DEFAULTS).videos
    taken = found.slice(0, 1).set_column(found.schema.get_field_index("uri"), "uri", [[f"file://{private}/p.mp4"]])
    table = with_shards(taken, ShardSizing(1))
    write_plan(store, 1, prepared.recipe, table, 0, ShardSizing())
    monkeypatch.setenv("P3D_STATE", str(tmp_path / "mine"))
    code, _, err = in_process(*line)
    assert code == 6 and ran == [{f"file://{source}/a.mp4"}], err
    assert "not trusted" in err and f"plan 1 is skipped: file://{private}/p.mp4 is not below {source}" in err
    assert in_process(*line, "--trust")[0] == 0
    assert ran[-1] == {f"file://{source}/a.mp4", f"file://{private}/p.mp4"}
    assert "not trusted" not in in_process(*line)[2]


def test_a_list_launched_again_into_a_foreign_job_is_planned_once(
    small_weights: Path, tmp_path: Path, ran: list[set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its videos are those of SRC wherever they lie: a launch that was cut off continues, and no video is in two plans.

    A video that a skipped plan names too is in both, and only its rows of the newest plan count.
    """
    listed = tmp_path / "videos.txt"
    for name in "ab":
        make.video(tmp_path / f"{name}.mp4", "libx264", 16)
    listed.write_text("a.mp4\nb.mp4\n")
    prepared = prepare(JobSpec(None, str(small_weights)))
    store = LocalStore(str(tmp_path / "out"))
    monkeypatch.setenv("P3D_STATE", str(tmp_path / "of somebody else"))
    launching.job_of(store, prepared, None, DEFAULTS, False, print)
    found = find(str(listed), DEFAULTS).videos
    private = found.slice(0, 1).set_column(found.schema.get_field_index("video_id"), "video_id", [["x"]])
    private = private.set_column(found.schema.get_field_index("uri"), "uri", [["file:///private/p.mp4"]])
    rows = pa.concat_tables([private, found.slice(0, 1)], promote_options="permissive")
    write_plan(store, 1, prepared.recipe, with_shards(rows, ShardSizing(1)), 0, ShardSizing())
    monkeypatch.setenv("P3D_STATE", str(tmp_path / "mine"))
    line = ("launch", str(listed), store.url, "--weights", str(small_weights), "--device", "cpu")
    for again in (False, True):
        code, _, err = in_process(*line)
        assert code == 6 and ran[-1] == {f"file://{tmp_path}/{name}.mp4" for name in "ab"}, err
        assert f"plan 1 is skipped: file:///private/p.mp4 is not in {listed}" in err
        assert ("nothing in SRC is new" in err) is again and len(load_plans(store)) == 2
    newest = NewestPlans(manifests(store, read_job(store)).values())
    assert newest.find(pa.array(["x"]))[0].tolist() == [1] and newest.n_videos == 1 + found.num_rows
    assert set(newest.find(found["video_id"])[0].tolist()) == {2}


def test_plans_without_a_job_are_not_taken_over(tmp_path: Path, small_weights: Path, archive: Path) -> None:
    """A folder with plans but without job.json is refused: a launch would have run plans of somebody else."""
    store = LocalStore(str(tmp_path / "out"))
    store.create("plans/0001.json", b"{}")
    code, _, err = in_process("launch", str(archive), store.url, "--weights", str(small_weights))
    assert code == 5 and "plans/0001.json" in err


def test_no_source_of_a_foreign_job_is_opened(
    small_weights: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page and report open no video of a foreign OUT without --source, and with it none outside, by a link or not."""
    source = tmp_path / "v"
    source.mkdir()
    (source / "in.mp4").write_bytes((archive / "video0.mp4").read_bytes())
    (tmp_path / "private.mp4").write_bytes((archive / "video1.mp4").read_bytes())
    listed = tmp_path / "list.txt"
    listed.write_text("v/in.mp4\nv/link.mp4\nprivate.mp4\n")
    (tmp_path / "linked.mp4").write_bytes((archive / "video2.mp4").read_bytes())
    (source / "link.mp4").symlink_to(tmp_path / "linked.mp4")
    store = LocalStore(str(tmp_path / "out"))
    embed_all(str(listed), store, JobSpec(None, str(small_weights), clips="uniform:1"), tmp_path)
    monkeypatch.setenv("P3D_STATE", str(tmp_path / "of another user"))
    page = tmp_path / "report.html"
    for more, allowed in (((), set()), (("--source", str(source)), {"v/in.mp4"})):
        words_ = ("results", "report", store.url, "-o", str(page), "--queries", "0", "--json", *more)
        code, out, err = in_process(*words_)
        assert code == 0 and json.loads(out)["pictures"] == len(allowed), err
        assert page.read_text().count("source_denied") == 3 - len(allowed)
        assert ("not trusted" in err) is (not more)
        with serving(store, rule=SourceRule(more[1]) if more else SourceRule()) as served:
            for path in ("v/in.mp4", "v/link.mp4", "private.mp4"):
                video_id = served.id_of(path)
                for ask in (f"content?id={video_id}", f"picture?id={video_id}", f"api/frames?id={video_id}&t=0"):
                    assert served.ask(ask).status == (200 if path in allowed else 404), (ask, path)
    own(store)
    assert json.loads(in_process(*words_[:-2])[1])["pictures"] == 3


@pytest.mark.parametrize(
    ("stats", "expected"),
    [
        ({"device": "cpu", "batch_size": 4, "threads": 2}, {"batch_size": 4, "threads": 2}),
        ({"device": "cpu", "batch_size": 10**12, "threads": 0}, {}),
        ({"device": "cpu", "batch_size": "4", "threads": True}, {}),
        ({"device": ["cpu"], "batch_size": 4}, {}),
    ],
)
def test_a_footer_chooses_no_absurd_batch(tmp_path: Path, stats: dict[str, Any], expected: dict[str, int]) -> None:
    """A search with a file uses the batch and threads of a shard's footer only if a job could have had them."""
    store = LocalStore(str(tmp_path))
    manifest = planned(store, tuple("ab"))
    rows = replace(shard_rows(manifest, 0), stats=stats)
    commit_shard(store, rows, recipe(), manifest.user_columns(0))
    source = rows_of(store)
    assert _settings_of(source, "cpu") == expected


# --- credentials and records ------------------------------------------------------------------------------------------


def test_store_options_come_from_the_users_own_record(foreign: LocalStore) -> None:
    """A resume takes endpoint, profile, payer and key from this user's record or flags, and never from OUT."""
    job = read_job(foreign)
    mine = StoreOptions(endpoint_url="http://127.0.0.1:9000", profile="mine", requester_pays=True)
    theirs = StoreOptions(endpoint_url="http://203.0.113.1", profile="admin", sse="aws:kms", sse_kms_key_id="theirs")
    last = control.Epoch(1, "h", "", 1, "", RunOptions(3, 1, 1, 1, s3=theirs).to_dict())
    typed = dict.fromkeys(("workers", "max_failures"))
    with pytest.raises(Untrusted):
        need_trust(foreign, job, DEFAULTS, trust_it=False, verb="resume", say=print)
    own(foreign, mine)
    s3 = need_trust(foreign, job, DEFAULTS, trust_it=False, verb="resume", say=print)
    options = launching._options(typed, s3, last.options)
    assert (options.s3, options.workers) == (mine, 3)
    s3 = need_trust(foreign, job, StoreOptions(profile="other"), trust_it=False, verb="resume", say=print)
    assert s3 == replace(mine, profile="other")
    record = trust.own_record(foreign, job)
    assert record is not None and record.options == s3  # the next resume needs no flag
    assert options_typed(s3) == {
        "endpoint_url": "http://127.0.0.1:9000",
        "profile": "other",
        "requester_pays": True,
    }


def test_a_launch_records_the_job_before_it_exists(
    small_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the record and job.json leaves nothing that its own user must trust; another's job is not ours."""
    prepared = prepare(JobSpec(None, str(small_weights)))
    store, seen = LocalStore(str(tmp_path / "out")), []
    create = store.create

    def watched(key: str, source: bytes | Path) -> Any:
        if key == "job.json":
            seen.append(trust.is_trusted(store, JobRecord.from_json(bytes(source), "")))  # type: ignore[arg-type]
        return create(key, source)

    monkeypatch.setattr(store, "create", watched)
    job, trusted = launching.job_of(store, prepared, None, DEFAULTS, False, print)
    assert (seen, trusted, len(job.job_id)) == ([True], True, 32)
    store.root.joinpath("job.json").write_bytes(replace(job, job_id=new_job_id()).to_json())
    assert launching.job_of(store, prepared, None, DEFAULTS, False, print)[1] is False  # as in a race of two launches


def test_a_launch_without_a_state_folder_warns_and_goes_on(
    small_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the record cannot be written, one warning names `p3d trust` and P3D_TRUST; the launch runs its own plan."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("P3D_STATE", str(tmp_path / "file" / "state"))
    store = LocalStore(str(tmp_path / "out"))
    assert launching.job_of(store, prepare(JobSpec(None, str(small_weights))), None, DEFAULTS, False, print)[1] is True
    said = capsys.readouterr().out
    assert said.startswith("warning: ") and "p3d trust" in said and f"P3D_TRUST={store.url}" in said
    assert not trust.is_trusted(store, read_job(store))
    code, _, err = in_process("cancel", store.url, "--trust")
    assert code == 0 and "warning" in err  # it was asked for by name
    assert "trusted only for this command" in err


@pytest.mark.parametrize("named", ["file/state", "relative"])
def test_trust_that_cannot_be_recorded_is_no_success(
    foreign: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """`p3d trust` then exits with 6 and does not say "from now on". A relative P3D_STATE is refused: it would depend on
    the working directory."""
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("P3D_STATE", named if named == "relative" else str(tmp_path / named))
    code, _, err = in_process("trust", foreign.url)
    assert code == 6 and "from now on" not in err and "could not be recorded" in err
    assert not (tmp_path / "relative").exists() and in_process("cancel", foreign.url)[0] == 5


def test_a_damaged_record_gives_no_trust(foreign: LocalStore, state: Path) -> None:
    """A record that is cut, of another job or not JSON counts as absent; one of another version is read."""
    own(foreign)
    job, (path,) = read_job(foreign), state.iterdir()
    whole = json.loads(path.read_bytes())
    later = {**whole, "of_the_future": 1, "options": {**whole["options"], "new": 2}}
    for content_, trusted in (
        (json.dumps(later), True),
        (json.dumps({**whole, "out": "/elsewhere"}), False),
        (json.dumps({**whole, "options": {"endpoint_url": "ftp://x"}}), False),
        (json.dumps(whole)[:-9], False),
        ("[]", False),
        ("", False),
    ):
        path.write_text(content_)
        assert trust.is_trusted(foreign, job) is trusted, content_


@pytest.mark.parametrize("words", [["resume"], ["results", "report", "-o", "-"]])
def test_an_empty_source_is_refused(foreign: LocalStore, words: list[str]) -> None:
    """An unset variable of a shell does not mean the working directory."""
    code, _, err = in_process(*words, foreign.url, "--source", "")
    assert code == 2 and "a path is an empty text" in err


def test_a_folder_of_records_that_others_may_write_to_gives_no_trust(
    foreign: LocalStore, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else could have put a record there: it is not read, and `p3d trust` says why it writes none."""
    own(foreign)
    job = read_job(foreign)
    assert trust.is_trusted(foreign, job)
    for mode in (0o770, 0o707):
        state.chmod(mode)
        assert not trust.is_trusted(foreign, job)
        code, _, err = in_process("trust", foreign.url)
        assert code == 6 and f"{state} belongs to another user, or others may write to it; set P3D_STATE" in err
    state.chmod(0o700)
    assert trust.is_trusted(foreign, job)
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    assert not trust.is_trusted(foreign, job)


@pytest.mark.parametrize(
    "epoch",
    [b"", b"[]", b"null", b"{", b'"text"', b"[" * 100_000, b'{"host": {"a": 1}, "user": ["x"], "started": null}'],
)
def test_an_origin_that_cannot_be_read_is_unknown(foreign: LocalStore, epoch: bytes) -> None:
    """Whatever the oldest run record holds, the refusal is one message with the remedy."""
    (foreign.root / "_job/epochs/000001.json").write_bytes(epoch)
    code, _, err = in_process("cancel", foreign.url)
    assert code == 5 and "p3d trust" in err and "Traceback" not in err and len(err) < 1000


def test_a_submitted_driver_trusts_what_its_client_trusts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver on the cluster gets OUT in P3D_TRUST if its client trusts the job, and nothing else."""
    given: list[dict[str, Any]] = []

    class Client:
        def __init__(self, address: str) -> None:
            pass

        def submit_job(self, **how: Any) -> None:
            given.append(how["runtime_env"])

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Client)
    monkeypatch.setattr(submission, "refuse_silent", lambda address: None)
    for trusted in (True, False):
        submission.submit("http://head:8265", ["resume", "out"], "s3://b/out", trusted=trusted)
    assert [one["env_vars"] for one in given] == [{"P3D_TRUST": "s3://b/out"}, {}]


def test_the_id_is_not_part_of_the_recipe() -> None:
    """Two jobs of one recipe differ in their ids alone; a record without an id reads, a wrong id is damage."""
    first, second = (JobRecord(recipe(), "random:0", {}, new_job_id()) for _ in range(2))
    assert first.job_id != second.job_id and first.recipe.digest == second.recipe.digest
    assert JobRecord.from_json(first.to_json(), "") == first
    old = JobRecord(recipe(), "random:0", {})
    assert "job_id" not in json.loads(old.to_json()) and JobRecord.from_json(old.to_json(), "").job_id == ""
    for odd in ("../x", "A" * 32, 5, None, "0" * 31):
        with pytest.raises(DamagedJob, match="job_id"):
            JobRecord.from_json(json.dumps({**json.loads(first.to_json()), "job_id": odd}).encode(), "")


@pytest.mark.parametrize("key", ["%2Ftmp%2Fp3d-trust-x", "..%2F..%2Fx.pth", "%2e%2e", "a%00.pth", "%2Fetc%2Fpasswd"])
def test_weights_on_s3_choose_no_local_path(bucket: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the key of the weights is, they are downloaded to a name of ours in a private folder."""
    seen: list[Path] = []

    def download(self: Store, key: str, path: Path, **how: Any) -> None:
        seen.append(path)
        raise StoreError("enough")

    monkeypatch.setattr("p3d.pipeline.storage.s3.store.S3Store.download", download)
    with pytest.raises(StoreError):
        prepare(JobSpec(None, f"s3://{bucket}/{key}"))
    assert seen[0].parent.name.startswith("p3d-weights-") and seen[0].name.isprintable()


def test_an_output_with_another_recipe_is_still_refused(foreign: LocalStore) -> None:
    """Trust does not replace the other checks."""
    own(foreign)
    with pytest.raises(OtherRecipe):
        recipe(pool="max").refuse_other(read_job(foreign).recipe, foreign.url)


def test_every_test_of_the_page_on_security_exists() -> None:
    """Each test that docs/security.md names is there."""
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (REPO / "docs" / "security.md").read_text())
    assert len(named) > 20
    for path, name in named:
        assert f"def {name}(" in (REPO / path).read_text() if name else (REPO / path).is_file(), (path, name)
