"""A store in memory that checks every change as it happens."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from pathlib import Path

import pyarrow as pa

from p3d.pipeline.dataset import schema
from p3d.pipeline.errors import StoreMissing
from p3d.pipeline.recipe import PlanRecord
from p3d.pipeline.storage.store import Created, ObjectInfo
from tests.sim.store import MemoryStore


@lru_cache(maxsize=8192)
def whole(content: bytes) -> tuple[int, dict[str, str]]:
    """The number of rows and the footer of a data file, after reading every page."""
    file = schema.open_parquet(io.BytesIO(content))
    return file.read(use_threads=False).num_rows, schema.read_footer(file)


class CheckedStore(MemoryStore):
    """Checks after every change the invariants that must hold at every instant.

    I3: a visible object is complete. I4: an existing object does not change. I5: a derived file names the clips that
    exist. I7: a visible object belongs to a plan whose parts all exist. As in a folder, temporary files are visible
    below `_job/tmp/`, so that a run can sweep its own or another's.
    """

    def __init__(self, scratch: Path) -> None:
        super().__init__()
        self.kept: dict[str, bytes] = {}
        self.shards: dict[str, tuple[int, int]] = {}  # name -> plan_seq, shard
        self.temps: dict[str, Path] = {}
        self.scratch, self._temps = scratch, count()

    def look(self) -> None:
        for key, content in self.kept.items():
            assert self.objects.get(key) is content, f"I4: {key} changed or vanished"
        if len(self.kept) < len(self.objects):
            for key, content in self.objects.items():
                if key not in self.kept and not key.startswith("_job/"):
                    self._check_new(key, content)
                    self.kept[key] = content

    def _check_new(self, key: str, content: bytes) -> None:
        folder, _, name = key.rpartition("/")
        if folder in ("clips", "videos", "failures"):
            stem = name.removesuffix(".parquet")
            assert name.endswith(".parquet") and stem in self.shards, f"I7: {key} belongs to no plan"
            try:
                _, footer = whole(content)
            except (pa.ArrowException, OSError) as error:
                raise AssertionError(f"I3: {key} is visible but incomplete: {error}") from error
            shard = json.loads(footer[schema.SHARD_KEY])
            assert (shard["plan_seq"], shard["shard"]) == self.shards[stem], f"I7: {key} claims to be of {shard}"
            if folder != "clips":
                clips = self.objects.get(f"clips/{name}")
                assert clips is not None, f"I5: {key} exists before its clips"
                made_from = json.loads(footer[schema.SOURCE_KEY])["sha256"]
                assert made_from == hashlib.sha256(clips).hexdigest(), f"I5: {key} was made from other clips"
        elif folder == "plans":
            plan = PlanRecord.from_json(content, key)
            for part in plan.parts:
                there = self.objects.get(f"{plan.folder}/{part.name}", b"")
                assert hashlib.sha256(there).hexdigest() == part.sha256, f"I7: {key} exists before its {part.name}"
            for at, name in enumerate(plan.shard_names):
                assert name not in self.shards, f"I7: two plans share the shard name {name}"
                self.shards[name] = (plan.seq, at)
        else:
            known = ("job.json", "weights/", "plans/")
            assert key.startswith(known), f"I7: unknown object {key}"

    def superseded(self, epoch: int) -> bool:
        """Whether there is a newer run than this one."""
        return any(key > f"_job/epochs/{epoch:06d}.json" for key in self.objects if key.startswith("_job/epochs/"))

    def create(self, key: str, source: bytes | Path) -> Created:
        try:
            content = source.read_bytes() if isinstance(source, Path) else source
        except FileNotFoundError as error:
            raise StoreMissing(f"{source} does not exist") from error
        created = super().create(key, content)
        self.look()
        return created

    def replace(self, key: str, content: bytes) -> None:
        super().replace(key, content)
        self.look()

    def delete(self, key: str) -> None:
        if (path := self.temps.pop(key, None)) is not None:
            path.unlink(missing_ok=True)
        super().delete(key)
        self.look()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        if prefix == "_job/tmp/":
            return iter([ObjectInfo(key, 0, 0) for key in sorted(self.temps)])
        return super().list(prefix)
