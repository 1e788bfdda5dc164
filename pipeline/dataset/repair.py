"""Mend an output whose files were damaged after they were committed: the one exception to "nothing is ever replaced".

A damaged videos or failures file is moved to `_job/damaged/` and made again from its clips. A damaged clips file is
moved there too, with what was made from it, and its shard is open again: a resume computes it. Files that belong to
no plan are never touched. Killed anywhere, the same repair or a resume finishes: what was made from a clips file goes
before it, so no new clips can ever stand beside old pooled rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from p3d.pipeline.dataset.commit import clips_key, derive, failures_key, videos_key
from p3d.pipeline.dataset.plans import Manifest, load_plans
from p3d.pipeline.dataset.verify import Audit
from p3d.pipeline.recipe import Recipe
from p3d.pipeline.storage.store import Store


@dataclass(frozen=True, slots=True)
class Repair:
    """What was done: (key, new key) of the files that were moved, keys made again, shards that are open again."""

    moved: tuple[tuple[str, str], ...]
    derived: tuple[str, ...]
    reopened: tuple[str, ...]


def repair(store: Store, recipe: Recipe, found: Audit) -> Repair:
    """Mend what a deep audit found; only the epoch in charge may."""
    stored = {info.key for folder in ("clips/", "videos/", "failures/") for info in store.list(folder)}
    moved: list[tuple[str, str]] = []
    for name in sorted(found.bad_shards):
        for key in (videos_key(name), failures_key(name), clips_key(name)):
            if key in stored:
                moved.append((key, store.set_aside(key)))  # noqa: PERF401 - each move counts once it is done
    wanting = {key for key in found.bad_derived if _name(key) not in found.bad_shards}
    for key in sorted(wanting & stored):
        moved.append((key, store.set_aside(key)))  # noqa: PERF401 - as above
    names = {_name(key) for key in wanting}
    for plan in load_plans(store):
        if any(name.startswith(f"{plan.plan8}-") for name in names):
            manifest = Manifest(store, plan)
            for at in range(plan.n_shards):
                if f"{plan.plan8}-{at:09d}" in names:
                    derive(store, manifest.shard(at), recipe, manifest.user_columns(at))
    return Repair(tuple(moved), tuple(sorted(wanting)), tuple(sorted(found.bad_shards)))


def _name(key: str) -> str:
    return key.rpartition("/")[2].removesuffix(".parquet")
