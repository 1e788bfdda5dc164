"""Every store operation of a launch and of a resume fails, once or from then on, in each of four ways.

The enumeration is not random: the nth operation fails for n = 1, 2, 3 ... until there is no nth. After each fault the
store works again. Then one resume must finish the job, another must write nothing, and the dataset must be complete.
Each attempt has different rows, like the statistics of real shards, so that a mixture of two attempts is detected.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from p3d.jobs.job import confirm, count_done, derive_again, glance, look, manifests, survey
from p3d.jobs.scheduler import control
from p3d.jobs.scheduler.run_snapshot import RunSnapshot
from p3d.pipeline.dataset import commit, schema, summaries
from p3d.pipeline.dataset.commit import clips_key, commit_shard, derive
from p3d.pipeline.dataset.repair import set_orphans_aside
from p3d.pipeline.dataset.totals import ended
from p3d.pipeline.dataset.verify import audit
from p3d.pipeline.errors import JobError, NoSuchJob, StoreMissing
from p3d.pipeline.recipe import JobRecord, ShardSizing
from p3d.pipeline.sources.listing import SourceListing
from p3d.pipeline.storage.store import CREATED, EXISTS, Store
from tests.pipeline.rows import recipe, shard_rows, videos
from tests.sim.store import KINDS, Died, FaultyStore, MemoryStore

JOB = JobRecord(recipe(), "random:0", {})
FIRST, GROWN = tuple("abcd"), tuple("abcdef")
STRIDE = int(os.environ.get("P3D_STRIDE", "4"))
DATA = ("clips/", "videos/", "failures/", "plans/", "job.json", "weights/")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between tries take no time. Each shard has a summary of its own."""
    monkeypatch.setattr(commit, "PAUSE_S", 0.0)
    monkeypatch.setattr(summaries, "BLOCK", 1)


class Attempts:
    """Numbers the attempts at shards, so that no two give the same bytes."""

    def __init__(self) -> None:
        self.numbers = count()


def launch(store: Store, names: tuple[str, ...], attempts: Attempts) -> None:
    """The store operations of `p3d launch`, in the same order, without the network and Ray."""
    from p3d.jobs.planning.prepare import add_plan

    store.prove_create_once()
    epoch = control.claim(store, {}, takeover=True, say=print)
    store.create("weights/0.safetensors", b"weights")
    if store.create("job.json", JOB.to_json()) == EXISTS:
        JobRecord.from_json(store.read("job.json"), store.url)
    add_plan(store, JOB, SourceListing(videos(names), ()), sizing=ShardSizing(2), limit=None)
    work_off(store, epoch, attempts)


def resume(store: Store, attempts: Attempts) -> None:
    """The store operations of `p3d resume`: nothing if the job is complete."""
    try:
        JobRecord.from_json(store.read("job.json"), store.url)
    except StoreMissing:
        raise NoSuchJob("no job") from None
    work = survey(store, manifests(store, JOB))
    if work.nothing_left and work.n_shards:
        return
    work_off(store, control.claim(store, {}, takeover=True, say=print), attempts)


def meet_zombies(store: MemoryStore, attempts: Attempts) -> None:
    """A resume whose every shard is committed by a worker of a dead run, just before it commits its own rows."""
    work_off(store, control.claim(store, {}, takeover=True, say=print), attempts, zombies=True)


def work_off(store: Store, epoch: control.Epoch, attempts: Attempts, *, zombies: bool = False) -> None:
    """Sweep, count, derive missing files, commit the remaining shards, and write the final heartbeat."""
    control.sweep_temps(store)
    plans = manifests(store, JOB)
    work = glance(store, plans) or look(store, plans)
    if not work.listed:
        work, lost = confirm(store, plans, work)
        set_orphans_aside(store, work.orphaned)
        work.todo += lost
    for stale in work.summaries.stale:
        store.delete(stale)
    count_done(store, plans, work, summarise=True)
    derive_again(store, JOB, plans, work.underived)
    for key in work.todo:
        manifest = plans[key.plan_seq]
        if store.head(clips_key(manifest.shard(key.shard).name)) is not None:  # as a worker asks
            derive(store, manifest.shard(key.shard), recipe(), manifest.user_columns(key.shard))
            continue
        rows = shard_rows(manifest, key.shard, seed=next(attempts.numbers), frames=(40, 0, 16))
        if zombies:
            theirs = shard_rows(manifest, key.shard, seed=next(attempts.numbers), frames=(40, 0, 16))
            with store.temp_file() as path:
                commit._write_clips(path, theirs, recipe())
                MemoryStore.create(store, clips_key(rows.shard.name), path)  # without the injected faults
        done = commit_shard(store, rows, recipe(), manifest.user_columns(key.shard))
        work.summaries.add(key, ended(done.outcomes))
    control.beat(store, epoch.number, RunSnapshot(counter=1, state="finished"))


def launched(attempts: Attempts) -> MemoryStore:
    store = MemoryStore()
    launch(store, FIRST, attempts)
    return store


def half_done(attempts: Attempts) -> MemoryStore:
    """A job that was killed: one shard is committed but not derived, one is missing."""
    store = MemoryStore()
    launch(store, FIRST, attempts)
    stems = sorted(key.removeprefix("clips/") for key in store.objects if key.startswith("clips/"))
    for folder in ("videos", "failures"):
        del store.objects[f"{folder}/{stems[0]}"]
    for folder in ("clips", "videos", "failures"):
        del store.objects[f"{folder}/{stems[1]}"]
    return store


PATHS: dict[str, tuple[Callable[[Attempts], MemoryStore], Callable[[Store, Attempts], None], int]] = {
    "launch": (lambda attempts: MemoryStore(), lambda store, attempts: launch(store, FIRST, attempts), 4),
    "resume": (half_done, resume, 4),
    "a resume that meets zombies": (half_done, meet_zombies, 4),
    "a grown source": (launched, lambda store, attempts: launch(store, GROWN, attempts), 6),
}


def points(path: str, stride: int) -> Iterator[tuple[int, str, bool]]:
    """Every fault on a path (every `stride`th), until there is no nth operation."""
    for first, kind in enumerate(KINDS, 1):
        for always in (False,) if kind.startswith("crash") else (False, True):  # a dead process makes no more requests
            for nth in count(1 + first % stride, stride):
                if not hit(path, nth, kind, always):
                    break
                yield nth, kind, always


def hit(path: str, nth: int, kind: str, always: bool) -> bool:
    """Inject one fault, then check that the job recovers. Returns False if there is no nth operation."""
    make, act, n_videos = PATHS[path]
    attempts = Attempts()
    store = make(attempts)
    faulty = FaultyStore(store, nth, kind, always=always)
    seen = data(store)
    with contextlib.suppress(JobError, Died):
        act(faulty, attempts)
    check_kept(store, seen)
    seen = data(store)
    act(store, attempts)  # the user repeats the command
    try:
        resume(store, attempts)
    except NoSuchJob as error:
        raise AssertionError("the job is missing after a launch without faults") from error
    check_kept(store, seen)
    writes = len(store.written)
    resume(store, attempts)
    assert len(store.written) == writes, f"a resume with nothing to do wrote {store.written[writes:]}"
    found = audit(store, JOB)
    assert (found.damaged, found.pending, found.underived) == (False, 0, 0), found.problems
    work = survey(store, manifests(store, JOB))
    assert (work.done.videos, work.n_videos) == (n_videos, n_videos)
    assert once(store), "a row exists twice"
    return faulty.fired > 0


def data(store: MemoryStore) -> dict[str, bytes]:
    return {key: content for key, content in store.objects.items() if key.startswith(DATA)}


def check_kept(store: MemoryStore, seen: dict[str, bytes]) -> None:
    """I4: every object that was visible still exists, byte for byte."""
    for key, content in seen.items():
        assert store.objects.get(key) == content, f"{key} changed or vanished"


def once(store: MemoryStore) -> bool:
    """I2: (plan_seq, video_id, clip_index) is unique over the dataset."""
    keys = []
    for key in data(store):
        if key.startswith("clips/"):
            table = schema.open_parquet(store.open(key)).read(columns=["plan_seq", "video_id", "clip_index"])
            keys += [tuple(row.values()) for row in table.to_pylist()]
    return len(keys) == len(set(keys))


@pytest.mark.fault(1, 4, 32)
@pytest.mark.parametrize("path", PATHS)
def test_whatever_operation_fails_one_resume_makes_everything_right(path: str) -> None:
    """After lost requests, lost answers and kills at every store operation, the next run finishes the job.

    Only every fourth operation is tried here; `P3D_STRIDE=1` tries all (`make sim`).
    """
    found = list(points(path, STRIDE))
    print(f"{path}: {len(found)} faults")
    assert len(found) > 100 // STRIDE


# ---- mutants: protocols with one defect each, which some fault above must reveal ----------------------------------


def overwrites(patch: pytest.MonkeyPatch) -> None:
    """A create that replaces an existing object."""

    def create(self, key, source):
        self.objects[key] = source if isinstance(source, bytes) else source.read_bytes()
        self.written.append(("create", key))
        return CREATED

    patch.setattr(MemoryStore, "create", create)


def derives_from_memory(patch: pytest.MonkeyPatch) -> None:
    """After adopting another run's commit, the pooled rows are computed from our own clips."""

    def commit_and_derive(store, rows, recipe_, own):
        with store.temp_file() as path:
            commit._write_clips(path, rows, recipe_)
            commit._create(store, clips_key(rows.shard.name), path)
            return derive(store, rows.shard, recipe_, own, clips=path)

    patch.setitem(globals(), "commit_shard", commit_and_derive)


def takes_unknown_for_done(patch: pytest.MonkeyPatch) -> None:
    """A time-out of a create counts as success."""
    true = commit._create

    def create(store, key, path):
        try:
            return store.create(key, path) == CREATED
        except commit.StoreUnknown:
            return True

    assert true is not create
    patch.setattr(commit, "_create", create)


def derives_first(patch: pytest.MonkeyPatch) -> None:
    """The videos and failures files are created before the clips."""

    def reversed_commit(store, rows, recipe_, own):
        with store.temp_file() as path:
            commit._write_clips(path, rows, recipe_)
            made = derive(store, rows.shard, recipe_, own, clips=path)
            commit._create(store, clips_key(rows.shard.name), path)
            return made

    patch.setitem(globals(), "commit_shard", reversed_commit)


def never_derives_again(patch: pytest.MonkeyPatch) -> None:
    """A resume leaves committed shards without their derived files."""
    patch.setitem(globals(), "derive_again", lambda *_: None)


def deletes_on_recovery(patch: pytest.MonkeyPatch) -> None:
    """A resume removes unfinished shards to repeat them."""

    def sweep(store):
        names, whole = commit.committed_names(store)
        for name in names - whole:
            store.objects.pop(clips_key(name))

    patch.setattr(control, "sweep_temps", sweep)


def plan_record_first(patch: pytest.MonkeyPatch) -> None:
    """A plan's record is created before the manifest parts it names."""
    from p3d.pipeline.dataset import plans as manifest

    true = manifest.write_plan

    def write(store, *given):
        scratch = MemoryStore()
        plan = true(scratch, *given)
        for key in sorted(scratch.objects, key=lambda key: not key.endswith(".json")):
            store.create(key, scratch.objects[key])
        return plan

    patch.setattr("p3d.jobs.planning.prepare.write_plan", write)


def one_name_for_all_plans(patch: pytest.MonkeyPatch) -> None:
    """Shards are named only by their number, so that a second plan's names equal the first one's."""
    from p3d.pipeline.types import ShardPlan

    patch.setattr(ShardPlan, "name", property(lambda self: f"00000000-{self.shard:09d}"))


def writes_when_nothing_is_left(patch: pytest.MonkeyPatch) -> None:
    """A resume with nothing to do still claims an epoch."""
    patch.setattr("p3d.jobs.job.Work.nothing_left", property(lambda self: False))


def commits_half(patch: pytest.MonkeyPatch) -> None:
    """The rows of the last video are not written."""
    true = schema.clips_table
    patch.setattr(schema, "clips_table", lambda *given: true(*given)[:-1])


MUTANTS = [
    (overwrites, "launch"),
    (derives_from_memory, "a resume that meets zombies"),
    (takes_unknown_for_done, "launch"),
    (derives_first, "launch"),
    (never_derives_again, "resume"),
    (deletes_on_recovery, "resume"),
    (plan_record_first, "launch"),
    (one_name_for_all_plans, "a grown source"),
    (writes_when_nothing_is_left, "launch"),
    (commits_half, "launch"),
]


@pytest.mark.parametrize(("mutant", "path"), MUTANTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_protocol_with_this_defect_is_caught(
    mutant: Callable[[pytest.MonkeyPatch], None], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some fault on a path reveals the defect, as a broken invariant or a job that cannot be finished."""
    mutant(monkeypatch)
    with pytest.raises((AssertionError, JobError, KeyError, ValueError)) as caught:
        for _ in points(path, 1):
            pass
    print(type(caught.value).__name__, str(caught.value).splitlines()[:1])
