"""Files that vanish from an output: a run finds it before it starts, or before it says that it has finished.

The Ray loop is replaced where only what is before and after it matters.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest

from p3d.jobs.job import Work, confirm, count_done, glance, look, manifests, read_job
from p3d.jobs.monitor.status import read_status
from p3d.jobs.scheduler import control
from p3d.jobs.scheduler import loop as loops
from p3d.jobs.scheduler import run as runs
from p3d.jobs.scheduler.loop import RayLoop
from p3d.jobs.scheduler.run import ClaimedRun, run_job
from p3d.jobs.scheduler.state import Counted, Finish, Reopened, Stop
from p3d.pipeline.dataset import summaries
from p3d.pipeline.dataset.commit import clips_key, commit_shard, committed_names, failures_key, videos_key
from p3d.pipeline.dataset.plans import Manifest, load_plans
from p3d.pipeline.dataset.stored_files import StoredFiles
from p3d.pipeline.dataset.totals import ShardKey
from p3d.pipeline.dataset.verify import audit
from p3d.pipeline.errors import DamagedJob, StoreGone, StrayFile
from p3d.pipeline.recipe import RunOptions
from p3d.pipeline.sources.below import EVERY_SOURCE, SourceRule
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import Store
from tests.jobs.test_cli import in_process
from tests.pipeline.rows import planned, recipe, shard_rows
from tests.sim.life import FINISHED, GROWN, SMALL, Life
from tests.sim.story import type_in
from tests.sim.wiring import real_code_of

NAMES = tuple("abcdefghij")


@pytest.fixture
def done(tmp_path: Path) -> LocalStore:
    """A job of three shards, all committed."""
    store = LocalStore(str(tmp_path / "out"))
    manifest = planned(store, NAMES)
    commit_all(store, manifest)
    return store


def commit_all(store: Store, manifest: Manifest, *, frames: tuple[int, ...] = (40,)) -> None:
    """Commit every shard that is not committed yet. Other `frames` give other bytes, as on another machine."""
    for shard in range(manifest.plan.n_shards):
        if store.head(clips_key(manifest.shard(shard).name)) is None:
            rows = shard_rows(manifest, shard, frames=frames)
            commit_shard(store, rows, recipe(), manifest.user_columns(shard))


def commits_all(job: Any, run: ClaimedRun, plans: dict[int, Manifest], *_: Any) -> Finish:
    """A loop that commits what is left, with other bytes than before."""
    for manifest in plans.values():
        commit_all(run.store, manifest, frames=(64,))
    return Finish(0, "finished")


def run(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, rule: SourceRule = EVERY_SOURCE, loop: Any = commits_all
) -> tuple[Any, list[str]]:
    """A run with this loop; its exit code and messages."""
    monkeypatch.setattr(runs, "_loop", loop)
    said: list[str] = []
    options = RunOptions(1, 4, 1, 1)
    epoch = control.claim(store, options.to_dict(), takeover=True, say=said.append)
    pulse: Any = SimpleNamespace(stop=lambda: None)
    claimed = ClaimedRun(store, options, epoch, pulse, None, rule)
    quiet: Any = lambda _: contextlib.nullcontext()  # noqa: E731
    return run_job(store.url, read_job(store), claimed, say=said.append, show_progress=quiet), said


@pytest.mark.fault(59)
@pytest.mark.parametrize("also", [None, videos_key, failures_key])
def test_a_lost_clips_file_is_seen_and_its_shard_is_computed_again(
    done: LocalStore, monkeypatch: pytest.MonkeyPatch, also: Any
) -> None:
    """The derived files of its old bytes are moved aside and named, so that OUT is clean when the run has finished."""
    work = look(done, manifests(done, read_job(done)))
    assert work.nothing_left and not work.orphaned
    name = sorted(committed_names(done)[0])[1]
    old = (done.root / videos_key(name)).read_bytes()
    (done.root / clips_key(name)).unlink()
    if also is not None:
        (done.root / also(name)).unlink()
    assert look(done, manifests(done, read_job(done))).orphaned == [name]
    code, said = run(done, monkeypatch)
    assert code == 0 and f"1 of the shards have lost their clips files, such as {clips_key(name)}" in said[0]
    assert f"{1 if also else 2} files that were made from them are now in _job/damaged/" in said[0]
    found = audit(done, read_job(done))
    assert (found.damaged, found.pending, found.underived) == (False, 0, 0), found.problems
    if also is not videos_key:
        assert [done.read(info.key) for info in done.list("_job/damaged/videos/")] == [old]


@pytest.mark.fault(59)
def test_only_a_run_with_full_trust_moves_files_aside(done: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that may only read the videos below a folder refuses, with the commands in the order that works."""
    name = sorted(committed_names(done)[0])[0]
    (done.root / clips_key(name)).unlink()
    before = sorted(info.key for info in done.list() if not info.key.startswith("_job/"))
    with pytest.raises(DamagedJob, match=r"`p3d trust .*`, then `p3d verify .* --repair`, and then this command"):
        run(done, monkeypatch, SourceRule("/v"))
    assert sorted(info.key for info in done.list() if not info.key.startswith("_job/")) == before


@pytest.mark.fault(59)
def test_a_shard_that_is_committed_while_it_is_listed_is_not_taken_for_lost(done: LocalStore) -> None:
    """Files made from clips are listed before clips, so that a commit between two listings never looks like damage."""
    name = sorted(committed_names(done)[0])[0]
    hidden = {key: (done.root / key).read_bytes() for key in (clips_key(name), videos_key(name), failures_key(name))}

    class Late(LocalStore):
        def list(self, prefix: str = "") -> Any:
            found = list(super().list(prefix))
            if prefix in ("clips/", "videos/", "failures/"):  # right after the first listing, all three appear
                for key, content in hidden.items():
                    (self.root / key).write_bytes(content)
            return iter(found)

    for use in (
        lambda store: look(store, manifests(store, read_job(store))).orphaned,
        lambda store: audit(store, read_job(store), deep=False).problems,
    ):
        for key in hidden:
            (done.root / key).unlink()
        assert use(Late(done.url)) == []


@pytest.mark.fault(55)
def test_a_run_never_writes_into_what_took_the_place_of_its_output(
    done: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If OUT is exchanged for another job's while the run is in progress, nothing is written there."""
    name = sorted(committed_names(done)[0])[0]
    for key in (clips_key(name), videos_key(name), failures_key(name)):
        (done.root / key).unlink()
    other = done.root.parent / "other"
    shutil.copytree(done.root, other)

    def exchange(*_: Any) -> Finish:
        done.root.rename(done.root.parent / "unmounted")
        other.rename(done.root)
        commit_all(done, next(iter(manifests(done, read_job(done)).values())))
        raise AssertionError("written")

    with pytest.raises(StoreGone, match=r"job\.json is gone, or another file or folder is in its place"):
        run(done, monkeypatch, loop=exchange)
    assert not (done.root / clips_key(name)).exists()


def test_a_run_that_is_interrupted_while_ray_starts_is_stopped(
    done: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message, exit code 130, and a last heartbeat that says so: `status` does not take the run for dead."""
    (done.root / clips_key(sorted(committed_names(done)[0])[0])).unlink()

    def interrupted(*_: Any) -> Finish:
        raise KeyboardInterrupt

    code, said = run(done, monkeypatch, loop=interrupted)
    beat = control.heartbeat(done, 1)
    assert code == 130 and "interrupted while Ray was starting; continue with:  p3d resume" in said[-1]
    assert beat is not None and (beat.state, beat.exit_code) == ("stopped", 130)


@pytest.mark.fault(55)
@pytest.mark.parametrize("lost", ["clips", "videos"])
def test_a_run_that_has_lost_a_committed_file_does_not_say_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Before its last heartbeat a run lists what it has committed: if a file is missing it stops with 6, resumable."""
    true = loops.StoredFiles
    life = Life(0, tmp_path)
    life.rates = {}
    vanished: list[str] = []

    def names(store: Store, plans: Any) -> StoredFiles:
        if not vanished:
            key = min(key for key in life.store.objects if key.startswith(f"{lost}/"))
            vanished.append(key)
            for folder in (lost,) if lost == "videos" else ("clips", "videos", "failures"):
                del life.store.objects[key.replace(lost, folder)], life.store.kept[key.replace(lost, folder)]
        return true(store, plans)

    monkeypatch.setattr(loops, "StoredFiles", names)
    with real_code_of(life):
        try:
            assert type_in(life, "launch", life.launch, SMALL, False) == 6
            beat = control.heartbeat(life.store, 1)
            assert beat is not None and (beat.state, beat.exit_code) == ("stopped", 6)
            assert "1 of 2 shards were committed and are no longer in" in str(beat.sentence)
            assert vanished[0].rpartition("/")[2].removesuffix(".parquet") in str(beat.sentence)
            monkeypatch.setattr(loops, "StoredFiles", true)
            assert type_in(life, "resume", life.resume, False) in FINISHED
            life.check_end()
        finally:
            life.end()


@pytest.mark.parametrize("lost", [("clips",), ("clips", "videos", "failures"), ("videos",), ("failures",)])
def test_a_run_that_begins_from_summaries_finds_what_is_lost_before_it_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: tuple[str, ...]
) -> None:
    """Shards that no summary covers are given out before the files are listed. The listing then finds that a file of a
    covered shard is gone: its shard is computed again, or the file is made again, in the same run."""
    life = Life(0, tmp_path)
    life.rates = {}
    reopened: list[tuple[ShardKey, ...]] = []
    begun: list[list[ShardKey]] = []
    moved: list[str] = []
    counted, glance = RayLoop._counted, runs.glance

    def lose(name: str, folders: tuple[str, ...]) -> None:
        for folder, objects in product(folders, (life.store.objects, life.store.kept)):
            del objects[f"{folder}/{name}.parquet"]

    def aside(_: Store, names: list[str]) -> int:
        for name in names:
            lose(name, ("videos", "failures"))
            moved.append(name)
        return 2 * len(names)

    def noted(loop: RayLoop, event: Any) -> Any:
        reopened.extend([event.shards] if isinstance(event, Reopened) else [])
        return counted(loop, event)

    def first(store: Store, plans: dict[int, Manifest]) -> Work | None:
        begun.append([] if (work := glance(store, plans)) is None else list(work.todo))
        return work

    monkeypatch.setattr(RayLoop, "_counted", noted)
    monkeypatch.setattr(runs, "glance", first)
    monkeypatch.setattr(loops, "set_orphans_aside", aside)  # the simulated store moves nothing
    with real_code_of(life):
        try:
            assert type_in(life, "launch", life.launch, SMALL, False) in FINISHED
            name = load_plans(life.store)[0].shard_names[1]
            lose(name, lost)
            assert type_in(life, "launch grown", life.launch, GROWN, False) in FINISHED
            assert begun == [[], [ShardKey(2, 0)]]
            assert reopened == ([(ShardKey(1, 1),)] if "clips" in lost else [])
            life.check_end()
            summary = f"_job/summaries/{load_plans(life.store)[0].shard_names[0]}.parquet"
            assert summary in life.store.objects  # made again
            assert moved == ([name] if lost == ("clips",) else [])
        finally:
            life.end()


@pytest.mark.parametrize("newest", [1, 2])
def test_a_run_that_was_taken_over_while_it_listed_changes_nothing(
    done: LocalStore, monkeypatch: pytest.MonkeyPatch, newest: int
) -> None:
    """The listing of a large job takes minutes. Only the run that holds the newest epoch repairs what it finds."""
    plans = manifests(done, read_job(done))
    monkeypatch.setattr(summaries, "BLOCK", 1)
    count_done(done, plans, look(done, plans), summarise=True)
    (done.root / clips_key(plans[1].plan.shard_names[0])).unlink()
    (done.root / clips_key(plans[1].plan.shard_names[1])).unlink()
    done.delete(summaries.summary_key(plans[1].plan, 0))
    work = glance(done, plans)
    assert work is not None
    monkeypatch.setattr(control, "newest_number", lambda _: newest)
    loop: Any = object.__new__(RayLoop)
    loop.store, loop.job, loop.manifests, loop.counted = done, read_job(done), plans, SimpleQueue()
    loop.epoch = SimpleNamespace(number=1)
    found = loop._list(work)
    moved = [path for path in (done.root / "videos").iterdir() if path.stem in found.orphaned]
    assert len(found.orphaned) == 2 and len(moved) == (2 if newest == 2 else 0)
    assert loop.counted.empty() == (newest == 2)


def test_a_job_that_is_done_but_for_its_last_shards_is_not_run_again(done: LocalStore) -> None:
    """The last block of a plan has no summary. If all of its shards have their files, everything is listed first."""
    plans = manifests(done, read_job(done))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summaries, "BLOCK", 2)
        count_done(done, plans, look(done, plans), summarise=True)
        assert glance(done, plans) is None
        (done.root / clips_key(plans[1].plan.shard_names[2])).unlink()
        work = glance(done, plans)
        assert work is not None and not work.listed and work.todo == [ShardKey(1, 2)]
        assert list(work.committed) == [ShardKey(1, 0), ShardKey(1, 1)] and len(work.unsummarised) == 0
        confirmed, lost = confirm(done, plans, work)  # its derived files are still there: they are set aside
        assert confirmed.orphaned == [plans[1].plan.shard_names[2]] and lost == [] and confirmed.listed


@pytest.mark.parametrize("key", ["job.json", "plans/0001.json"])
def test_a_run_whose_records_are_gone_does_not_say_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Without its job or a plan, `verify` takes all rows for strangers: exit 7, and the message names the record."""
    true = loops.StoredFiles
    life = Life(0, tmp_path)
    life.rates = {}

    def names(store: Store, plans: Any) -> StoredFiles:
        life.store.objects.pop(key, None)
        life.store.kept.pop(key, None)
        return true(store, plans)

    monkeypatch.setattr(loops, "StoredFiles", names)
    with real_code_of(life):
        try:
            with pytest.raises(AssertionError, match="launch#1 ends with 7"):  # no other story of the simulator does
                type_in(life, "launch", life.launch, SMALL, False)
            beat = control.heartbeat(life.store, 1)
            assert beat is not None and (beat.state, beat.exit_code) == ("stopped", 7)
            assert f"/{key} is gone" in str(beat.sentence) and "restore it" in str(beat.sentence)
        finally:
            life.end()


@pytest.mark.fault(59)
def test_a_run_does_not_finish_an_output_that_verify_rejects(done: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data file of no plan is refused by its name before anything is computed; other files there are only named."""
    (done.root / "clips" / ".DS_Store").write_bytes(b"\x00")
    with pytest.warns(StrayFile, match=r"clips/\.DS_Store is not a Parquet file and is skipped"):
        assert run(done, monkeypatch)[0] is None
    with pytest.warns(StrayFile):
        assert not audit(done, read_job(done)).damaged
    (done.root / "clips" / "._a.parquet").write_bytes(b"\x00\x05\x16\x07")
    with pytest.warns(StrayFile), pytest.raises(DamagedJob, match=r"such as clips/\._a\.parquet: move them"):
        run(done, monkeypatch)
    with pytest.warns(StrayFile):
        assert audit(done, read_job(done)).damaged
        assert in_process("resume", done.url, "--trust")[0] == 7


def other_clips(store: LocalStore, name: str) -> None:
    """Replace a clips file in place by a sound one of the same shard with another size, as a restored backup may be."""
    manifest = next(iter(manifests(store, read_job(store)).values()))
    at = manifest.plan.shard_names.index(name)
    (store.root / clips_key(name)).unlink()
    aside = LocalStore(str(store.root.parent / "aside"))
    commit_shard(aside, shard_rows(manifest, at, frames=(64, 90)), recipe(), manifest.user_columns(at))
    shutil.copy(aside.root / clips_key(name), store.root / clips_key(name))


def cut(store: LocalStore, name: str) -> None:
    """Cut the last bytes of a clips file."""
    path = store.root / clips_key(name)
    path.write_bytes(path.read_bytes()[:-9])


def other_videos(store: LocalStore, name: str) -> None:
    """Put the videos file of other clips in the place of a shard's own."""
    other_clips(LocalStore(str(shutil.copytree(store.root, store.root.parent / "twin"))), name)
    shutil.copy(store.root.parent / "aside" / videos_key(name), store.root / videos_key(name))


@pytest.mark.fault(59)
@pytest.mark.parametrize("damage", [other_clips, cut, other_videos])
def test_nothing_left_to_do_is_not_finished_if_the_quick_verify_rejects_it(
    done: LocalStore, monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    """Files damaged in place, and derived files of other clips: exit 7 with two commands, which repair it in order."""
    name = sorted(committed_names(done)[0])[1]
    assert run(done, monkeypatch)[0] is None and read_status(done, read_job(done)).state == "finished"
    damage(done, name)
    assert audit(done, read_job(done), deep=False).damaged
    assert look(done, manifests(done, read_job(done))).nothing_left
    code, _, err = in_process("resume", done.url, "--trust")
    orders = rf"First `p3d verify {done.url} --repair`.*, then `p3d resume {done.url}`"
    assert code == 7 and name in err and re.search(orders, err)
    with pytest.raises(DamagedJob, match=orders):
        run(done, monkeypatch)
    beat = control.heartbeat(done, control.newest_number(done))
    assert beat is not None and (beat.state, beat.exit_code) == ("stopped", 7) and name in str(beat.sentence)
    if damage is not cut:  # status refuses an output with half a file
        assert (read_status(done, read_job(done)).state, in_process("status", done.url)[0]) == ("stopped", 0)
    assert in_process("verify", done.url, "--repair")[0] in (0, 6)
    assert run(done, monkeypatch)[0] in (0, None)
    assert not audit(done, read_job(done)).damaged
    assert read_status(done, read_job(done), over=True).state == "finished"


@pytest.mark.fault(59)
@pytest.mark.parametrize("damage", [other_clips, cut, other_videos])
def test_a_run_with_work_left_does_not_finish_a_damaged_output_either(done: LocalStore, damage: Any) -> None:
    """Shards of earlier runs are verified while they are counted, those of the run itself before it says finished."""
    job, plans = read_job(done), manifests(done, read_job(done))
    work = look(done, plans)
    loop: Any = SimpleNamespace(store=done, job=job, manifests=plans, work=work, counted=SimpleQueue())
    ours = replace(work, todo=list(work.committed), committed=work.committed & ~work.committed)
    finished: Any = SimpleNamespace(**{**vars(loop), "work": ours})
    RayLoop._count(loop)
    assert isinstance(loop.counted.get(), Counted)
    assert RayLoop._confirmed(finished, Finish(0, "finished")) == Finish(0, "finished")
    damage(done, sorted(committed_names(done)[0])[1])
    RayLoop._count(loop)
    stop = loop.counted.get()
    assert isinstance(stop, Stop) and stop.exit_code == 7 and "verify" in stop.sentence
    found = RayLoop._confirmed(finished, Finish(3, "finished"))
    assert (found.exit_code, found.lost) == (7, True) and "all shards were committed, but" in found.sentence
