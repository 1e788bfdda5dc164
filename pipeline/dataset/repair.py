"""Repair an output whose files were damaged after they were committed: the one case in which files are replaced.

A damaged videos or failures file is moved to `_job/damaged/` and made again from its clips. A damaged clips file is
moved there too, together with the files made from it, and its shard is open again: a resume computes it. Files that
belong to no plan are never touched. If the process is killed, the same repair or a resume finishes the work: derived
files are moved before their clips file, so new clips and old pooled rows can never exist together.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from p3d.pipeline.dataset.commit import clips_key, derive, failures_key, videos_key
from p3d.pipeline.dataset.plans import Manifest, load_plans
from p3d.pipeline.dataset.verify import Audit
from p3d.pipeline.errors import StoreMissing
from p3d.pipeline.recipe import Recipe
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import parse_shard_name


@dataclass(frozen=True, slots=True)
class Repair:
    """What was done: (key, new key) of each moved file, keys of files made again, names of shards now open again."""

    moved: tuple[tuple[str, str], ...]
    derived: tuple[str, ...]
    reopened: tuple[str, ...]


def repair(store: Store, recipe: Recipe, found: Audit) -> Repair:
    """Repair what a deep audit found. Only the run that holds the current epoch may call this."""
    stored = {info.key for folder in ("clips/", "videos/", "failures/") for info in store.list(folder)}
    moved: list[tuple[str, str]] = []
    for name in sorted(found.bad_shards):
        for key in (videos_key(name), failures_key(name), clips_key(name)):
            if key in stored:
                moved.append((key, store.set_aside(key)))  # noqa: PERF401 - each move counts once it is done
    wanting = {key for key in found.bad_derived if _name(key) not in found.bad_shards}
    for key in sorted(wanting & stored):
        moved.append((key, store.set_aside(key)))  # noqa: PERF401 - as above
    by_plan: dict[str, set[int]] = {}
    for key in wanting:
        plan8, shard = parse_shard_name(_name(key))
        by_plan.setdefault(plan8, set()).add(shard)
    for plan in load_plans(store):
        if plan.plan8 in by_plan:
            manifest = Manifest(store, plan)
            for shard in sorted(by_plan[plan.plan8]):
                derive(store, manifest.shard(shard), recipe, manifest.user_columns(shard))
    return Repair(tuple(moved), tuple(sorted(wanting)), tuple(sorted(found.bad_shards)))


def set_orphans_aside(store: Store, names: list[str]) -> int:
    """Move the derived files of shards that have lost their clips file to `_job/damaged/`. Returns how many.

    Otherwise the shard would be computed again, and its old derived files would belong to other bytes. Only the run
    that holds the current epoch may call this.
    """
    moved = 0
    for name in names:
        for key in (videos_key(name), failures_key(name)):
            with contextlib.suppress(StoreMissing):
                store.set_aside(key)
                moved += 1
    return moved


def _name(key: str) -> str:
    return key.rpartition("/")[2].removesuffix(".parquet")
