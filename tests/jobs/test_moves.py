"""Source videos that have moved: `p3d relocate` records it, and every verb finds them at the new place."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import boto3
import pytest

import p3d
from p3d.jobs.api.moves import Sources, look_for_sources
from p3d.jobs.api.runs import launch
from p3d.jobs.job import manifests, read_job
from p3d.jobs.planning.changes import changes, to_do
from p3d.jobs.planning.prepare import JobSpec, add_plan, add_retry, create_job, prepare
from p3d.pipeline.dataset.roots import RootRecord, Roots, load_roots
from p3d.pipeline.decode.fetch import local_file
from p3d.pipeline.errors import DamagedJob, OtherVersion, VideoError
from p3d.pipeline.recipe import ShardSizing, digest
from p3d.pipeline.sources.below import SourceRule, place_of_videos
from p3d.pipeline.sources.listing import find
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.types import VideoRef
from tests.jobs.embedded import embed_all
from tests.jobs.served import serving
from tests.jobs.test_cli import in_process
from tests.owned import own
from tests.zoo import make

RECORD = RootRecord(1, "file:///old", "file:///new", 1, "version", "2026-11-29T00:00:00Z")
NAMES = ("a.mp4", "b c.mp4", "sub/é.mp4")


@pytest.fixture(scope="module")
def made(small_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `v` with three videos and a text that is not one, and the output of a job of them."""
    root = tmp_path_factory.mktemp("moves")
    (root / "v" / "sub").mkdir(parents=True)
    for at, name in enumerate(NAMES):
        make.video(root / "v" / name, "libx264", 16 + at)
    (root / "v" / "text.mp4").write_text("no video")
    embed_all(str(root / "v"), LocalStore(str(root / "out")), JobSpec(None, str(small_weights)), root)
    return root


@pytest.fixture
def job(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it whose videos and output may be changed; the user owns it."""
    shutil.copytree(made / "out", tmp_path / "out")
    monkeypatch.setenv("P3D_TRUST", str(tmp_path / "out"))
    return tmp_path


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def copied(made: Path, job: Path, *, times: bool) -> Path:
    """The videos at a new place, with their times or with others."""
    new = job / "new"
    shutil.copytree(made / "v", new, copy_function=shutil.copy2 if times else shutil.copy)
    return new


@pytest.mark.parametrize("times", [True, False])
def test_an_archive_moves(made: Path, job: Path, small_weights: Path, times: bool) -> None:
    """After `relocate` a launch of the new place finds nothing new, and pictures, search, report and retry use it."""
    out, new = job / "out", copied(made, job, times=times)
    store = LocalStore(str(out))
    before = content(out)
    line = ("relocate", str(out), "--from", str(made / "v"), "--to", f"{new}/", "--json")
    code, text, err = in_process(*line)
    assert code == 0, err
    said = json.loads(text)
    assert (said["videos"], said["looked_at"], said["same"], said["gone"]) == (4, 4, 4, 0)
    assert said["compared"] == ("version" if times else "size")
    added = content(out).keys() - before.keys()
    assert {name for name in added if not name.startswith("_job/")} == {"roots/0001.json"}
    assert before.items() <= content(out).items()

    found = find(str(new), DEFAULTS)
    assert add_plan(store, read_job(store), found, sizing=ShardSizing(4), limit=None) is None
    uris = sorted(place_of_videos(str(new / name)) for name in NAMES)
    dataset = p3d.open_dataset(out)
    assert sorted(uri for batch in dataset.videos(["uri"]) for uri in batch["uri"].to_pylist()) == uris
    for named in (uris[0], place_of_videos(str(made / "v" / "a.mp4"))):
        assert p3d.search(out, named, with_self=True).hits[0].uri == uris[0]
    assert json.loads(in_process("failures", str(out), "--json")[1])["failures"][0]["uri"].endswith("/new/text.mp4")
    hidden = made / "v.hidden"
    (made / "v").rename(hidden)
    try:
        with serving(store) as served:
            for name in NAMES:
                video_id = served.id_of(name)
                assert served.ask("content", id=video_id).status == 200
                assert served.ask("picture", id=video_id).status == 200
        page = str(job / "r.html")
        made_of = json.loads(in_process("results", "report", str(out), "-o", page, "--queries", "0", "--json")[1])
        assert (made_of["pictures"], made_of["without_picture"]) == (3, 0)
        assert in_process("verify", str(out))[0] == 0
        shutil.copy(new / "a.mp4", new / "text.mp4")
        plan = add_retry(store, read_job(store), frozenset(), DEFAULTS, sizing=ShardSizing(4))
        assert plan is not None
        (row,) = manifests(store, read_job(store))[2].videos.to_pylist()
        assert row["uri"] == place_of_videos(str(new / "text.mp4")) and row["size_bytes"] > 100
    finally:
        hidden.rename(made / "v")


def test_a_size_that_differs_is_not_accepted(made: Path, job: Path) -> None:
    """`relocate` refuses it, or counts it as changed if told so; no verb opens it, and a launch embeds it again."""
    out, new = job / "out", copied(made, job, times=False)
    with (new / "a.mp4").open("ab") as file:
        file.write(b"more")
    line = ("relocate", str(out), "--from", str(made / "v"), "--to", str(new))
    code, _, err = in_process(*line)
    assert code == 2 and "another size" in err and "a.mp4" in err and not (out / "roots").exists()
    code, text, _ = in_process(*line, "--allow-changed")
    assert code == 0 and "1 of another size" in text and "only the size" in text
    store = LocalStore(str(out))
    made_of = changes(list(manifests(store, read_job(store)).values()), find(str(new), DEFAULTS).videos)
    assert (made_of.n_new, made_of.n_changed, made_of.n_same) == (0, 1, 3)
    with serving(store) as served:
        reply = served.ask("content", id=served.id_of("a.mp4"))
        assert reply.status == 404 and reply.json["reason"] == "source_changed"
    assert in_process("status", str(out), "--sources")[1].splitlines()[-1] == "sources: 3 as planned, 1 changed, 0 gone"


def test_sources_that_are_gone_are_counted(made: Path, job: Path) -> None:
    """`status --sources` counts what is there, at the place where it is now."""
    out, new = job / "out", copied(made, job, times=True)
    (new / "sub" / "é.mp4").unlink()
    code, text, err = in_process("relocate", str(out), "--from", str(made / "v"), "--to", str(new))
    assert code == 0 and "3 the same, 1 gone" in text, err
    assert json.loads(in_process("status", str(out), "--sources", "--json")[1])["sources"] == {
        "there": 3,
        "changed": 0,
        "gone": 1,
        "examples": ["sub/é.mp4"],
    }


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("{v}", "{here}/nothing", "none of the 4 videos"),
        ("{here}/other", "{new}", "no video of"),
        ("{v}", "{v}/", "the same"),
        ("{v}", "http://host/v", "neither a folder nor s3://"),
        ("{v}", "s3://user:secret@host/v", "credential"),
        ("", "{new}", "neither a folder"),
    ],
)
def test_places_that_are_not_those_of_the_videos_are_refused(
    made: Path, job: Path, old: str, new: str, says: str
) -> None:
    """With one sentence and exit code 2, and nothing is written."""
    there = copied(made, job, times=True)
    places = {"v": made / "v", "here": job, "new": there}
    code, _, err = in_process(
        "relocate", str(job / "out"), "--from", old.format(**places), "--to", new.format(**places)
    )
    assert code == 2 and says in err and "secret" not in err
    assert not (job / "out" / "roots").exists()


def test_a_foreign_output_is_not_relocated_and_its_records_lead_nowhere(
    made: Path, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without trust `relocate` and `status --sources` are refused, and a record opens no video outside --source."""
    out, new = job / "out", copied(made, job, times=True)
    store = LocalStore(str(out))
    monkeypatch.delenv("P3D_TRUST")
    monkeypatch.setenv("P3D_STATE", str(job / "state"))
    line = ("relocate", str(out), "--from", str(made / "v"), "--to", str(new))
    assert in_process(*line)[0] == 5 and not (out / "roots").exists()
    code, _, err = in_process("status", str(out), "--sources")
    assert code == 5 and f"p3d trust {out}" in err and "--trust" not in err
    record = replace(RECORD, old=place_of_videos(str(made / "v")), new=place_of_videos(str(new)))
    store.create(record.key, record.to_json())
    with serving(store, rule=SourceRule(str(made / "v"))) as served:  # the user allows the place of the plan
        assert served.ask("content", id=served.id_of("a.mp4")).status == 404
    with serving(store, rule=SourceRule(str(new))) as served:
        assert served.ask("content", id=served.id_of("a.mp4")).status == 200
    assert f"is now {place_of_videos(str(new))}" in in_process("trust", str(out))[1]


def test_a_foreign_record_does_not_choose_what_a_launch_or_a_resume_reads(
    made: Path, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan below SRC is skipped if a record says that its videos are elsewhere, and `plan` says so, too."""
    store = LocalStore(str(job / "out"))
    for path in (job / "out" / "clips", job / "out" / "videos", job / "out" / "failures"):
        shutil.rmtree(path)  # its shard is pending
    found = find(str(made / "v"), DEFAULTS).videos
    monkeypatch.delenv("P3D_TRUST")
    monkeypatch.setenv("P3D_STATE", str(job / "state"))
    assert to_do(store, read_job(store), str(made / "v"), found, None).n_pending_shards == 1
    record = replace(RECORD, old=place_of_videos(str(made / "v")), new="s3://secret/bucket")
    store.create(record.key, record.to_json())
    ahead = to_do(store, read_job(store), str(made / "v"), found, None)
    assert ahead.n_pending_shards == 0 and ahead.changes.n_new == 4
    assert next(iter(ahead.skipped.values())).startswith("s3://secret/bucket/")


def test_a_pending_shard_is_computed_at_the_new_place(made: Path, job: Path, small_weights: Path) -> None:
    """The rows of the shard have the videos as they were planned, so `verify` accepts them."""
    new = copied(made, job, times=False)
    out = job / "out2"
    found = find(str(made / "v"), DEFAULTS)
    store = LocalStore(str(out))
    record = create_job(store, prepare(JobSpec(None, str(small_weights))))
    own(store)
    assert add_plan(store, record, found, sizing=ShardSizing(4), limit=None) is not None
    moved = p3d.relocate(out, made / "v", new)
    assert moved.compared == "size"
    hidden = made / "v.hidden"
    (made / "v").rename(hidden)
    try:
        status = launch(new, out, weights=small_weights, device="cpu")
    finally:
        hidden.rename(made / "v")
    assert (status.plans, status.videos_done, status.failures) == (1, 4, {"not_a_video": 1})
    assert in_process("verify", str(out), "--deep")[0] == 0
    planned = [video.uri for video in manifests(store, record)[1].shard(0).videos]
    assert all(uri.startswith(place_of_videos(str(made / "v"))) for uri in planned)


def test_a_list_of_absolute_paths_keeps_its_ids(made: Path, job: Path, small_weights: Path) -> None:
    """The ids of such a list are those of the old paths; after a move the same videos are found by their place."""
    new, out = copied(made, job, times=True), job / "out3"
    lists = {}
    for folder in (made / "v", new):
        lists[folder] = job / f"{folder.name}.txt"
        lists[folder].write_text("".join(f"{folder}/{name}\n" for name in NAMES))
    store = LocalStore(str(out))
    record = embed_all(str(lists[made / "v"]), store, JobSpec(None, str(small_weights)), job)
    p3d.relocate(out, made / "v", new)
    (new / "a.mp4").write_bytes((new / "b c.mp4").read_bytes())
    plan = add_plan(store, record, find(str(lists[new]), DEFAULTS), sizing=ShardSizing(4), limit=None)
    assert plan is not None and plan.n_videos == 1
    both = manifests(store, record)
    assert both[2].videos["video_id"][0].as_py() in both[1].videos["video_id"].to_pylist()


def test_an_archive_moves_into_a_bucket_and_back(made: Path, job: Path, bucket: str) -> None:
    """Of objects only the sizes can be compared. Each is pinned to its ETag when it is opened. Then it moves back."""
    out, client = job / "out", boto3.client("s3")
    for path in sorted((made / "v").rglob("*.mp4")):
        client.upload_file(str(path), bucket, f"arch/{path.relative_to(made / 'v')}")
    line = ("relocate", str(out), "--json", "--from", str(made / "v"), "--to", f"s3://{bucket}/arch/")
    code, text, err = in_process(*line)
    assert code == 0 and json.loads(text)["compared"] == "size", err
    store, there = LocalStore(str(out)), find(f"s3://{bucket}/arch", DEFAULTS)
    assert add_plan(store, read_job(store), there, sizing=ShardSizing(4), limit=None) is None
    shard = manifests(store, read_job(store))[1]
    moved = shard.moved(shard.shard(0))
    assert moved is not None
    with local_file(moved.videos[1], DEFAULTS, job) as copy:
        assert Path(copy).read_bytes() == (made / "v" / moved.videos[1].path).read_bytes()
    with serving(store) as served:
        for name in NAMES:
            assert served.ask("content", id=served.id_of(name)).status == 200
            assert served.ask("picture", id=served.id_of(name)).status == 200
        client.put_object(Bucket=bucket, Key="arch/a.mp4", Body=b"other")
        assert served.ask("content", id=served.id_of("a.mp4")).json["reason"] == "source_changed"
    with pytest.raises(VideoError, match="other size"), local_file(moved.videos[0], DEFAULTS, job):
        pass
    assert look_for_sources(store, read_job(store), DEFAULTS) == Sources(3, 1, 0)
    back = p3d.relocate(out, f"s3://{bucket}/arch", made / "v")
    assert (back.compared, back.key) == ("version", "roots/0002.json")
    assert look_for_sources(store, read_job(store), DEFAULTS) == Sources(4, 0, 0)


# --- the record -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("file:///old/a.mp4", "file:///new/a.mp4"),
        ("file:///old", "file:///new"),
        ("file:///old/sub/%C3%A9.mp4", "file:///new/sub/%C3%A9.mp4"),
        ("file:///older/a.mp4", None),
        ("file:///old/../a.mp4", None),
        ("file:///old/%2e%2e/a.mp4", None),
        ("file:///old/x%2F..%2Fa.mp4", None),
        ("file:///old/%00", None),
        ("s3://old/a.mp4", None),
        ("", None),
    ],
)
def test_only_what_is_below_the_old_place_moves(uri: str, expected: str | None) -> None:
    """Names that begin alike, and dots in any encoding, do not move: nothing outside the new place is named."""
    assert RECORD.moved(uri) == expected


def test_moves_follow_each_other() -> None:
    """A video may move twice, and back; later plans are not moved; the weakest comparison counts."""
    second = replace(RECORD, seq=2, old="file:///new", new="s3://b/p", plans=2, compared="size")
    back = replace(RECORD, seq=3, old="s3://b/p", new="file:///old", plans=3)
    video = VideoRef("id", "a.mp4", "file:///old/a.mp4", "0" * 16, 7, 5, '"e"')
    assert Roots((RECORD, second)).now(video.uri, 1) == "s3://b/p/a.mp4"
    assert Roots((RECORD, second)).now(video.uri, 2) == video.uri
    assert Roots((RECORD, second)).now("file:///new/a.mp4", 2) == "s3://b/p/a.mp4"
    assert Roots((RECORD, second)).video(video, 1) == replace(video, uri="s3://b/p/a.mp4", version="size:7", etag=None)
    assert Roots((RECORD,)).video(video, 1) == replace(video, uri="file:///new/a.mp4")
    assert Roots((RECORD, second, back)).now(video.uri, 1) == video.uri


def edited(**changes_: object) -> bytes:
    """A record with other values, and with the digest of these."""
    root = json.loads(RECORD.to_json())["root"] | changes_
    root = {name: value for name, value in root.items() if value != "absent"}
    return json.dumps({"root": root, "root_digest": digest(root)}).encode()


@pytest.mark.parametrize(
    ("content_", "error"),
    [
        (RECORD.to_json().replace(b"/new", b"/nev"), DamagedJob),
        (b"{}", DamagedJob),
        (b"[", DamagedJob),
        (edited(seq=2), DamagedJob),
        (edited(seq="1"), DamagedJob),
        (edited(old="/old"), DamagedJob),
        (edited(new="http://host/new"), DamagedJob),
        (edited(new="file:///new/"), DamagedJob),
        (edited(new="file:///old"), DamagedJob),
        (edited(new="s3://"), DamagedJob),
        (edited(new="file:///new\ud800"), DamagedJob),
        (edited(compared="nothing"), DamagedJob),
        (edited(more=1), DamagedJob),
        (edited(plans="absent"), DamagedJob),
        (edited(schema_version=99), OtherVersion),
    ],
)
def test_a_record_that_p3d_did_not_write_is_damage(job: Path, content_: bytes, error: type[Exception]) -> None:
    """Whatever value is wrong. `verify` says so with exit code 7, and names the file."""
    store = LocalStore(str(job / "out"))
    store.create("roots/0001.json", content_)
    with pytest.raises(error, match=r"roots/0001\.json"):
        load_roots(store)
    assert in_process("verify", str(job / "out"))[0] == (7 if error is DamagedJob else 5)


def test_records_have_no_gaps(job: Path) -> None:
    """A record that is missing before another is damage; other names are not records."""
    store = LocalStore(str(job / "out"))
    store.create("roots/notes.txt", b"")
    assert load_roots(store) == Roots()
    store.create("roots/0002.json", replace(RECORD, seq=2).to_json())
    with pytest.raises(DamagedJob, match=r"roots/0001\.json is missing"):
        load_roots(store)
