"""The job at an output: its records, and its progress as read from the store. Needs neither torch nor Ray.

The state of a video is that of the newest plan that contains it: all counts use `plans.NewestPlans`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from p3d.pipeline.dataset.commit import clips_key, derive, read_committed
from p3d.pipeline.dataset.files import local_path, sha256_of
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.plans import Manifest, NewestPlans, load_plans, plans_of
from p3d.pipeline.dataset.roots import load_roots
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.dataset.snapshot_record import SNAPSHOT_KEY
from p3d.pipeline.dataset.stored_files import StoredFiles
from p3d.pipeline.dataset.summaries import Summaries
from p3d.pipeline.dataset.superseded import newest_plans
from p3d.pipeline.dataset.totals import Ended, ShardKey, ShardSet, Totals, count, ended
from p3d.pipeline.errors import DamagedJob, NoSuchJob, OtherRecipe, StoreError, StoreMissing
from p3d.pipeline.recipe import JobRecord, PlanRecord, Recipe
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import BOOL, shard_name

if TYPE_CHECKING:
    from p3d.weights import Weights

TRAIN_KEY = "train.json"  # the record of a training (p3d.jobs.training.record)
READERS = 16  # threads that read the footers of committed shards
AHEAD = 1024  # shards that are read, or wait to be read


def weights_key(recipe: Recipe) -> str:
    """The key of the job's weights in OUT."""
    return f"weights/{recipe.weights_sha256}.safetensors"


def golden_key(recipe: Recipe) -> str:
    """The key in OUT of the golden clip's features, as computed on the CPU."""
    return f"weights/{recipe.weights_sha256}.golden.json"


def read_job(store: Store) -> JobRecord:
    """The job at an output. NoSuchJob if it does not exist, also of a training; DamagedJob if it was edited."""
    try:
        return _job_at(store)
    except NoSuchJob:
        if store.head(TRAIN_KEY) is None:
            raise
        raise NoSuchJob(
            f"{store.url} holds a training and no embeddings. `p3d status {store.words()}` shows it, report.html and "
            "failures.parquet are in it, and `p3d launch --weights` takes its weights.safetensors"
        ) from None


def _job_at(store: Store) -> JobRecord:
    """The job at an output. NoSuchJob if it does not exist, DamagedJob if it was edited."""
    try:
        return JobRecord.from_json(store.read("job.json"), store.url)
    except StoreMissing:
        if any(True for _ in store.list("plans/")):
            raise NoSuchJob(f"{store.url}/job.json is gone, but plans of a job are there: restore it") from None
        raise NoSuchJob(f"no job exists at {store.url}; `p3d launch SRC {store.words()}` starts one") from None


def stored_weights(store: Store, recipe: Recipe) -> Weights:
    """The network that OUT was made with. DamagedJob if its sha256 differs from the recipe's; StoreMissing."""
    import p3d.weights

    key = weights_key(recipe)
    with local_path(store, key) as path:  # of an output in a folder, nothing is copied
        if sha256_of(path) != recipe.weights_sha256:
            raise DamagedJob(f"{store.url}/{key} is damaged: its sha256 differs from its name; restore it")
        return p3d.weights.load(path)


def rows_of(store: Store, leave_out: frozenset[str] = frozenset()) -> NewestRows | SnapshotRows:
    """The newest rows of the job or the snapshot at a store. NoSuchJob if neither exists."""
    if store.head("job.json") is None and store.head(SNAPSHOT_KEY) is not None:
        return SnapshotRows(store, leave_out)
    return NewestRows(store, read_job(store), leave_out)


def refuse_other_job(store: Store, recipe: Recipe, origin: str = "") -> JobRecord | None:
    """The job at an output, or None. OtherRecipe for a job with other settings, and for unrelated files.

    Plans without a job are unrelated, too: their videos are not those of the user's source. `origin` says where the
    weights of the recipe are from.
    """
    try:
        existing = _job_at(store)
    except NoSuchJob:
        ours = ("_job/", "weights/")  # a launch that was killed early leaves these
        unrelated = next((info.key for info in store.list() if not info.key.startswith(ours)), None)
        if unrelated is None:
            return None
        if store.head("job.json") is None:
            raise OtherRecipe(
                f"{store.url} is not empty but holds no job ({unrelated}); choose a new folder for the output"
            ) from None
        existing = _job_at(store)  # another launch created it at this moment
    recipe.refuse_other(existing.recipe, store.url, (origin, existing.weights_origin))
    return existing


def golden_of(store: Store, recipe: Recipe) -> npt.NDArray[np.float32]:
    """The CPU's features of the golden clip, made when the job was planned, [D] float32."""
    return np.array(json.loads(store.read(golden_key(recipe)))["features"], np.float32)


def manifests(store: Store, job: JobRecord) -> dict[int, Manifest]:
    """The manifest of every plan, by plan_seq. DamagedJob if a plan is damaged, or was made for another recipe."""
    plans, roots = plans_of(store, job.recipe), load_roots(store)
    return {plan.seq: Manifest(store, plan, roots) for plan in plans}


@dataclass(slots=True)
class Work:
    """What is left of a job, as read from the store. Each video is counted once.

    Unless `listed`, it is read from summaries: `committed` are the shards that they cover, whose files may be lost, and
    some shards of `todo` may be committed. `orphaned` are names of shards whose clips file is lost, while files made
    from it exist. `strange` are keys of data files that belong to none of these plans.
    """

    todo: list[ShardKey]
    underived: list[ShardKey]
    committed: ShardSet
    n_videos: int
    n_shards: int
    newest: NewestPlans
    summaries: Summaries
    done: Totals = field(default_factory=Totals)
    orphaned: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    listed: bool = True

    @property
    def nothing_left(self) -> bool:
        return not self.todo and not self.underived

    @property
    def unsummarised(self) -> ShardSet:
        """The committed shards that no summary covers: a run reads and verifies the footers of each."""
        return self.committed & ~self.summaries.shards


def glance(store: Store, manifests: dict[int, Manifest]) -> Work | None:
    """What is left of a job, from its summaries alone: a run can begin with it, and lists all files meanwhile.

    None if no shard is covered by a summary, or if all others are committed: then `look` is needed.
    """
    plans = {seq: manifest.plan for seq, manifest in manifests.items()}
    summaries = Summaries(store, manifests, _shards(plans, lambda plan: np.ones(plan.n_shards, bool)))
    todo = list(~summaries.shards)
    if not len(summaries.shards) or _all_committed(store, _names(plans, todo)):
        return None
    newest = newest_plans(store, manifests.values(), write=True)
    return Work(
        todo=todo,
        underived=[],
        committed=summaries.shards,
        n_videos=newest.n_videos,
        n_shards=sum(plan.n_shards for plan in plans.values()),
        newest=newest,
        summaries=summaries,
        listed=False,
    )


def _all_committed(store: Store, names: Iterable[str]) -> bool:
    """Whether shards have their clips files: asks for some at a time, until one is missing."""
    keys = map(clips_key, names)
    with ThreadPoolExecutor(READERS) as pool:
        while some := list(islice(keys, READERS)):
            if None in list(pool.map(store.head, some)):
                return False
    return True


def confirm(store: Store, manifests: dict[int, Manifest], work: Work) -> tuple[Work, list[ShardKey]]:
    """`work`, after a listing of all files, and the shards of summaries whose clips files are lost: they are to do.

    Files that were written since are not looked at: workers report them. Derived files are listed before clips files.
    So an orphaned one is from before this run.
    """
    plans = {seq: manifest.plan for seq, manifest in manifests.items()}
    found = StoredFiles(store, plans.values())
    kept = work.committed & _shards(plans, found.committed)
    lost = work.committed & ~kept
    work.summaries.hold_to(kept)
    confirmed = replace(
        work,
        committed=kept,
        underived=list(kept & ~_shards(plans, found.whole)),
        orphaned=_names(plans, _shards(plans, found.orphaned)),
        strange=found.strange,
        listed=True,
    )
    return confirmed, list(lost)


def _shards(plans: Mapping[int, PlanRecord], which: Callable[[PlanRecord], BOOL]) -> ShardSet:
    return ShardSet({seq: which(plan) for seq, plan in plans.items()})


def _names(plans: Mapping[int, PlanRecord], shards: Iterable[ShardKey]) -> list[str]:
    return sorted(shard_name(plans[key.plan_seq].plan8, key.shard) for key in shards)


def look(store: Store, manifests: dict[int, Manifest], *, write: bool = False) -> Work:
    """Find which shards are committed and which still need their derived files, with one listing per folder.

    With `write`, as by a run, what a later one would have to compute of many videos is kept in OUT.
    """
    plans = {seq: manifest.plan for seq, manifest in manifests.items()}
    found = StoredFiles(store, plans.values())
    committed = _shards(plans, found.committed)
    newest = newest_plans(store, manifests.values(), write=write)
    return Work(
        todo=list(~committed),
        underived=list(committed & ~_shards(plans, found.whole)),
        committed=committed,
        n_videos=newest.n_videos,
        n_shards=sum(plan.n_shards for plan in plans.values()),
        newest=newest,
        summaries=Summaries(store, manifests, committed),
        orphaned=_names(plans, _shards(plans, found.orphaned)),
        strange=found.strange,
    )


def refuse_strange(store: Store, work: Work) -> None:
    """DamagedJob if a data file belongs to no plan: `p3d verify` rejects such an output, so no run may finish it."""
    # listed again, as a plan may have been added meanwhile
    if work.strange and (strange := StoredFiles(store, load_plans(store)).strange):
        raise DamagedJob(
            f"{store.url} holds data files that belong to none of its plans, such as {strange[0]}: move them to a "
            "place outside, then give this command again"
        )


def refuse_damaged(store: Store, job: JobRecord, manifests: dict[int, Manifest], shards: Iterable[ShardKey]) -> None:
    """DamagedJob if the quick `verify` rejects any of these shards, with what to do, in the order that works."""
    from p3d.pipeline.dataset.verify import audit_shards  # which status does not need

    found = audit_shards(store, job.recipe, ((manifests[key.plan_seq], key.shard) for key in shards))
    if found.damaged:
        more = f", and {len(found.problems) - 1} more like it" if len(found.problems) > 1 else ""
        what, words = f"{found.problems[0].rstrip('.')}{more}", store.words()
        raise DamagedJob(
            f"{store.url} is damaged: {what}. First `p3d verify {words} --repair`, which sets damaged files aside, "
            f"then `p3d resume {words}`"
        )


def refuse_changed(store: Store, job: JobRecord, manifests: dict[int, Manifest]) -> None:
    """DamagedJob unless job.json and all plans with which a run began are still in the store."""
    try:
        now = read_job(store)
    except NoSuchJob:
        raise DamagedJob(f"{store.url}/job.json is gone; restore it") from None
    if (now.job_id, now.recipe.digest) != (job.job_id, job.recipe.digest):
        raise DamagedJob(f"{store.url}/job.json has become that of another job; restore it")
    kept = {plan.seq: plan.digest for plan in load_plans(store)}
    for seq, manifest in manifests.items():
        if kept.get(seq) != manifest.plan.digest:
            raise DamagedJob(f"{store.url}/{manifest.plan.key} is gone or was replaced; restore it")


def count_done(store: Store, manifests: dict[int, Manifest], work: Work, *, summarise: bool = False) -> Totals:
    """The totals of the committed shards: from summaries, and from the footers of shards that none covers.

    With `summarise`, summaries of the latter are written.
    """

    def read(key: ShardKey) -> tuple[ShardKey, tuple[Ended, ...]]:
        plan = manifests[key.plan_seq].plan
        found = read_committed(store, shard_name(plan.plan8, key.shard), plan.schema_version)
        return key, ended(found.outcomes)

    done, unread = work.summaries.count(work.newest)
    with ThreadPoolExecutor(READERS) as pool:
        keys = chain(unread, work.unsummarised)
        while some := list(islice(keys, AHEAD)):
            for key, videos in pool.map(read, some):
                done.add(count(videos, work.newest.of_shard(manifests[key.plan_seq], key.shard)))
                if summarise:
                    with contextlib.suppress(StoreError):  # without it, the next run reads the footers again
                        work.summaries.add(key, videos)
    return done


def survey(store: Store, manifests: dict[int, Manifest]) -> Work:
    """`look`, with the totals of the committed shards."""
    work = look(store, manifests)
    work.done = count_done(store, manifests, work)
    return work


def derive_again(store: Store, job: JobRecord, manifests: dict[int, Manifest], shards: Iterable[ShardKey]) -> None:
    """Write the derived files that an interrupted run did not write."""
    for seq, shard in shards:
        manifest = manifests[seq]
        derive(store, manifest.shard(shard), job.recipe, manifest.user_columns(shard))
