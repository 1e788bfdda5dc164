"""Which data files an output has, from one listing of each folder: an array for each plan, not a text for each file."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from p3d.pipeline.dataset.commit import data_files
from p3d.pipeline.dataset.files import FOLDERS
from p3d.pipeline.recipe import PlanRecord
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import BOOL, shard_name

DATA_KEY = re.compile(rf"({'|'.join(FOLDERS)})/([0-9a-f]{{8}})-([0-9]{{9,}})\.parquet")


class StoredFiles:
    """The sizes of the data files of some plans, and the keys of files of no plan, `strange`. A mapping key -> bytes.

    Derived files are listed first: of a shard that is committed meanwhile, the clips file is then seen in any case.
    """

    def __init__(self, store: Store, plans: Iterable[PlanRecord]) -> None:
        self._sizes = {plan.plan8: np.full((len(FOLDERS), plan.n_shards), -1, np.int64) for plan in plans}
        self.strange: list[str] = []
        for at, folder in reversed([*enumerate(FOLDERS)]):
            for info in data_files(store, f"{folder}/"):
                place = self._place(info.key)
                if place is None:
                    self.strange.append(info.key)
                else:
                    plan8, shard = place
                    self._sizes[plan8][at, shard] = info.size_bytes
        self.strange.sort()

    def _place(self, key: str) -> tuple[str, int] | None:
        """The plan and the number of the shard that has a data file of this key; None if there is no such shard."""
        found = DATA_KEY.fullmatch(key)
        if found is None or found[2] not in self._sizes:
            return None
        shard = int(found[3])
        if shard >= self._sizes[found[2]].shape[1] or found[3] != shard_name("", shard)[1:]:
            return None
        return found[2], shard

    def committed(self, plan: PlanRecord) -> BOOL:
        """Which shards have their clips file."""
        return self._there(plan)[0]

    def whole(self, plan: PlanRecord) -> BOOL:
        """Which shards have all three files."""
        clips, videos, failures = self._there(plan)
        return clips & videos & failures

    def orphaned(self, plan: PlanRecord) -> BOOL:
        """Which shards have lost their clips file: only files that were made from it exist."""
        clips, videos, failures = self._there(plan)
        return ~clips & (videos | failures)

    def _there(self, plan: PlanRecord) -> list[BOOL]:
        return [sizes >= 0 for sizes in self._sizes[plan.plan8]]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.get(key) >= 0

    def get(self, key: str) -> int:
        """The size of a file, or -1."""
        place = self._place(key)
        if place is None:
            return -1
        return int(self._sizes[place[0]][FOLDERS.index(key.partition("/")[0]), place[1]])
