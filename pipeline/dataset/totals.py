"""One shard of a job: its name, how its videos ended, and sums over shards. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import compress
from typing import NamedTuple

import numpy as np

from p3d.pipeline.types import BOOL, VideoOutcome

CHUNK = 1 << 16  # shards that are Python objects at a time


class ShardKey(NamedTuple):
    """Which shard: its plan's sequence number, and its index in that plan."""

    plan_seq: int
    shard: int

    def __str__(self) -> str:
        return f"{self.plan_seq}/{self.shard}"


class ShardSet:
    """A set of shards: one byte for each shard of its plans. Iterates in the order of the plans and of their shards."""

    def __init__(self, of_plan: Mapping[int, BOOL]) -> None:
        self._of_plan = of_plan

    def __iter__(self) -> Iterator[ShardKey]:
        for seq, held_S in self._of_plan.items():
            for first in range(0, len(held_S), CHUNK):
                for at in np.flatnonzero(held_S[first : first + CHUNK]).tolist():
                    yield ShardKey(seq, first + at)

    def __len__(self) -> int:
        return sum(int(np.count_nonzero(held_S)) for held_S in self._of_plan.values())

    def of_plan(self, plan_seq: int) -> BOOL:
        """Which shards of a plan are in the set, [shards]."""
        return self._of_plan[plan_seq]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, ShardKey) and bool(self._of_plan[key.plan_seq][key.shard])

    def __invert__(self) -> ShardSet:
        return ShardSet({seq: ~held_S for seq, held_S in self._of_plan.items()})

    def with_keys(self, keys: Iterable[ShardKey]) -> ShardSet:
        """The set with these shards, too."""
        both = {seq: held_S.copy() for seq, held_S in self._of_plan.items()}
        for seq, shard in keys:
            both[seq][shard] = True
        return ShardSet(both)

    def __and__(self, other: ShardSet) -> ShardSet:
        return ShardSet({seq: held_S & other._of_plan[seq] for seq, held_S in self._of_plan.items()})


@dataclass(slots=True)
class Totals:
    """Running sums over the whole job, earlier runs included."""

    videos: int = 0
    clips: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        return sum(self.failures.values())

    def add(self, more: Totals) -> None:
        self.videos += more.videos
        self.clips += more.clips
        self.failures.update(more.failures)


class Ended(NamedTuple):
    """How a video of a shard ended: the part of a VideoOutcome that a driver needs. It unpickles 20 times as fast."""

    video_id: str
    n_clips: int
    reason: str | None  # of its failure


def ended(outcomes: Iterable[VideoOutcome]) -> tuple[Ended, ...]:
    """The records of a shard's videos, in the order of the shard."""
    return tuple(Ended(o.video.video_id, o.n_clips, str(o.failure.reason) if o.failure else None) for o in outcomes)


def count(videos: Iterable[Ended], current_V: BOOL) -> Totals:
    """The sums over a shard's videos, in its order, without those that a newer plan lists.

    All of them count if they are not as many as planned: then the file is damaged, which `verify` says.
    """
    known = list(videos)
    if len(known) == len(current_V):
        known = list(compress(known, current_V.tolist()))
    _, n_clips, reasons = zip(*known, strict=True) if known else ((), (), ())
    return Totals(len(known), sum(n_clips), Counter(filter(None, reasons)))
