"""Protocols with one defect each that appears only if processes interact: some seed must find it.

Defects that a single process can reveal are in `test_enumeration.py`, the scheduler's in `tests/jobs/test_state.py`,
those of the disk in `test_power_loss.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from p3d.jobs.planning import prepare as planning
from p3d.jobs.scheduler import control
from p3d.jobs.scheduler import loop as loops
from p3d.jobs.scheduler.loop import RayLoop
from p3d.jobs.worker import actor as workers
from p3d.pipeline.dataset import commit, superseded
from p3d.pipeline.dataset import plans as manifest
from p3d.pipeline.dataset.commit import Committed, clips_key
from p3d.pipeline.errors import JobError, Reason, StoreUnknown
from p3d.pipeline.storage.store import CREATED
from p3d.pipeline.types import Failure, VideoOutcome
from tests.sim import cluster
from tests.sim.story import live

Patch = pytest.MonkeyPatch


def renames_if_absent(patch: Patch) -> None:
    """A commit checks that the key is free, then renames its file to it."""

    def create(store, key, path):
        if store.head(key) is not None:
            return False
        content = path.read_bytes()

        def rename():
            store.inner.objects[key] = content
            store.inner.look()

        store._do("renames", key, rename)
        return True

    patch.setattr(commit, "_create", create)


def tries_forever(patch: Patch) -> None:
    """A create whose answer never arrives is tried without limit."""
    patch.setattr(commit, "CREATE_TRIES", 10**9)


def never_looks_for_newer_runs(patch: Patch) -> None:
    """A run that was taken over continues as before."""
    patch.setattr(control, "newest_number", lambda store: 0)


def adopts_without_deriving(patch: Patch) -> None:
    """A shard that another run committed counts as done, even without its derived files."""

    def commit_shard(store, rows, recipe, own):
        with store.temp_file() as path:
            commit._write_clips(path, rows, recipe)
            if not commit._create(store, clips_key(rows.shard.name), path):
                return Committed(True, len(rows.clips), 0, rows.outcomes)
            return commit.derive(store, rows.shard, recipe, own, clips=path)

    patch.setattr(workers, "commit_shard", commit_shard)


def all_failed(rows, reason):
    outcomes = tuple(VideoOutcome(o.video, failure=Failure(reason, "no answer", 1)) for o in rows.outcomes)
    return replace(rows, outcomes=outcomes, clips=(), features_RD=rows.features_RD[:0], probs_RK=rows.probs_RK[:0])


def fails_videos_in_outages(patch: Patch) -> None:
    """A shard that cannot be written for a while is committed as failures."""
    true = commit.commit_shard

    def commit_shard(store, rows, recipe, own):
        try:
            return true(store, rows, recipe, own)
        except StoreUnknown:
            store.world.current.notes.pop("tries", None)
            return true(store, all_failed(rows, Reason.SOURCE_MISSING), recipe, own)

    patch.setattr(workers, "commit_shard", commit_shard)


def deaths_fail_videos(patch: Patch) -> None:
    """The videos of a shard whose worker died are failures in the next attempt."""
    true = cluster.extract

    def extract(world, plan):
        rows = true(world, plan)
        return all_failed(rows, Reason.DECODER_CRASH) if world.attempts[plan.name] > 1 else rows

    patch.setattr(cluster, "extract", extract)


def oldest_plan_counts(patch: Patch) -> None:
    """A video's state is that of the oldest plan that names it."""

    class OldestPlans(manifest.NewestPlans):
        def of_shard(self, plan, shard):
            ids = plan.rows(shard)["video_id"].to_pylist()
            older = [one for one in self._plans if one.plan.seq < plan.plan.seq]
            known = {name for one in older for name in one.videos["video_id"].to_pylist()}
            return np.array([name not in known for name in ids])

    patch.setattr(superseded, "NewestPlans", OldestPlans)


def counts_superseded_rows(patch: Patch) -> None:
    """A video in two plans counts twice."""

    class AllPlans(manifest.NewestPlans):
        def of_shard(self, plan, shard):
            return np.ones(plan.n_videos(shard), bool)

    patch.setattr(superseded, "NewestPlans", AllPlans)


def both_are_in_charge(patch: Patch) -> None:
    """Of two runs that claim the same number, neither checks whether it won."""
    true = control.claim

    def claim(store, options, **named):
        class Careless(type(store)):
            def create(self, key, source):
                super().create(key, source)
                return CREATED

        careless = Careless(store.inner, store.world)
        return true(careless, options, **named)

    patch.setattr(control, "claim", claim)


def loses_a_plan_silently(patch: Patch) -> None:
    """Of two runs that create the same plan number, the loser believes that its plan counts."""
    true = manifest.write_plan

    def write_plan(store, *given):
        try:
            return true(store, *given)
        except JobError as error:
            if isinstance(error, manifest.AlreadyRunning):
                return None
            raise

    patch.setattr(planning, "write_plan", write_plan)


def forgets_a_plans_number(patch: Patch) -> None:
    """Shards are named only by their videos, so that a second retry of the same videos gets the same names."""
    true = manifest._hasher
    patch.setattr(manifest, "_hasher", lambda recipe_digest, _: true(recipe_digest, 1))


def forgives_a_failed_derive(patch: Patch) -> None:
    """A shard whose derived files could not be made counts as done."""

    def commit_shard(store, rows, recipe, own):
        with store.temp_file() as path:
            commit._write_clips(path, rows, recipe)
            created = commit._create(store, clips_key(rows.shard.name), path)
            try:
                return commit.derive(store, rows.shard, recipe, own, clips=path if created else None)
            except StoreUnknown:
                return Committed(not created, len(rows.clips), 0, rows.outcomes)

    patch.setattr(workers, "commit_shard", commit_shard)


def sweeps_unfinished_shards(patch: Patch) -> None:
    """A resume removes clips that have no derived files yet, as if a dead run had left them."""

    def sweep(store):
        names, whole = commit.committed_names(store)
        for name in names - whole:
            store.inner.objects.pop(clips_key(name), None)
            store.inner.look()

    patch.setattr(control, "sweep_temps", sweep)


MUTANTS = [  # with the first seed to try: one soon after it reveals the defect
    (renames_if_absent, 20),
    (tries_forever, 60),
    (never_looks_for_newer_runs, 15),
    (adopts_without_deriving, 0),
    (fails_videos_in_outages, 30),
    (deaths_fail_videos, 5),
    (oldest_plan_counts, 5),
    (counts_superseded_rows, 5),
    (both_are_in_charge, 10),
    (loses_a_plan_silently, 915),
    (forgets_a_plans_number, 220),
    (forgives_a_failed_derive, 425),
    (sweeps_unfinished_shards, 35),
]


@pytest.mark.parametrize(("mutant", "first"), MUTANTS, ids=[mutant.__name__ for mutant, _ in MUTANTS])
def test_the_world_catches_a_protocol_with_this_defect(
    mutant: Callable[[Patch], None], first: int, monkeypatch: Patch
) -> None:
    """The correct protocol passes all seeds; with the defect, some seed breaks an invariant.

    The last listing of a run is left out, and so is its quick audit: with them, some of these defects end in exit code
    6 or 7, and a resume repairs them.
    """
    mutant(monkeypatch)
    monkeypatch.setattr(loops, "refuse_damaged", lambda *_: None)
    monkeypatch.setattr(RayLoop, "_confirmed", lambda _, finish: finish)
    with pytest.raises((AssertionError, JobError)) as caught:
        for seed in range(first, first + 400):
            live(seed)
    print(seed, type(caught.value).__name__, str(caught.value).splitlines()[:1])
