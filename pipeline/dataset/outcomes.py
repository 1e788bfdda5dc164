"""The outcomes of a shard by columns: checked, compared and turned into rows without an object for each video.

    footer of a clips file ──parse──> Outcomes ──video_columns, failures_table──> what videos/ and failures/ must hold

A footer has one JSON record per video of the shard, in manifest order. Reading a shard takes its checks and little
else, so they run over whole columns. `Outcomes.each` has the same as records. Legend: V videos of the shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter, itemgetter
from typing import Any

import pyarrow as pa

from p3d.pipeline.dataset import columns
from p3d.pipeline.dataset.columns import Column
from p3d.pipeline.errors import Reason
from p3d.pipeline.types import Failure, VideoEnd, VideoInfo, VideoOutcome, VideoRef, checked_columns
from p3d.pipeline.types.versions import exactly, names_in

Values = dict[str, Any]  # the fields of one record


@dataclass(frozen=True, slots=True)
class Outcomes:
    """The values of V outcomes, in order, in a schema version; `infos` and `ends` are None for a failure."""

    videos: Sequence[Values]
    n_clips: Sequence[int]
    infos: Sequence[Values | None]
    ends: Sequence[Values | None]
    failures: Sequence[Values | None]
    version: int

    @classmethod
    def of(cls, each: Iterable[VideoOutcome], version: int) -> Outcomes:
        """The outcomes as records -> as columns."""
        each = tuple(each)
        infos, ends, failures = (
            [_values(getattr(one, name), version) for one in each] for name in ("info", "end", "failure")
        )
        videos = [_values(one.video, version) or {} for one in each]
        return cls(videos, [one.n_clips for one in each], infos, ends, failures, version)

    def __len__(self) -> int:
        return len(self.videos)

    @property
    def each(self) -> tuple[VideoOutcome, ...]:
        """The outcomes as records."""
        return tuple(
            VideoOutcome(
                VideoRef(**video),
                n_clips,
                None if info is None else VideoInfo(**info),
                None if end is None else VideoEnd(**end),
                None if failure is None else Failure(**failure),
            )
            for video, n_clips, info, end, failure in zip(
                self.videos, self.n_clips, self.infos, self.ends, self.failures, strict=True
            )
        )

    def are_of(self, planned: pa.Table) -> bool:
        """Whether these are the outcomes of the videos of manifest rows, in order."""
        names = [field.name for field in columns.schema(columns.MANIFEST, self.version) if field.name != "shard"]
        kind = pa.schema([planned.schema.field(name) for name in names])
        try:
            held = pa.Table.from_arrays(_arrays(self.videos, tuple(kind)), schema=kind)
            return bool(planned.select(names).equals(held))
        except (pa.ArrowException, ValueError):  # a text that is not UTF-8 is not that of a plan
            return False

    def video_columns(self, plan_seq: int) -> list[pa.Array]:
        """The columns of videos/ before the embeddings, for the outcomes that have rows."""
        records = [
            # the values of VideoEnd come last: frame count and duration, known after decoding, replace those before it
            {**video, **info, **end, "n_clips": n_clips, "plan_seq": plan_seq}
            for video, n_clips, info, end in zip(self.videos, self.n_clips, self.infos, self.ends, strict=True)
            if info is not None and end is not None
        ]
        return _arrays(records, _fields(columns.VIDEOS, self.version))

    def failures_table(self, plan_seq: int) -> pa.Table:
        """The rows of a shard's failures file."""
        fields = _fields(columns.FAILURES, self.version)
        failed = zip(self.videos, self.failures, strict=True)
        records = [{**video, **failure, "plan_seq": plan_seq} for video, failure in failed if failure is not None]
        return pa.Table.from_arrays(_arrays(records, fields), schema=pa.schema(fields))


def parse(text: str | bytes, version: int) -> Outcomes:
    """The outcomes of a footer. One of MALFORMED if the text is not such a record of this schema version."""
    given = json.loads(text)
    infos, ends, held = ([one[name] or None for one in given] for name in ("info", "end", "failure"))
    failures = [one and {**exactly(Failure, one, version), "reason": Reason(one["reason"])} for one in held]
    videos, n_clips = ([one[name] for one in given] for name in ("video", "n_clips"))
    found = Outcomes(videos, n_clips, infos, ends, failures, version)
    _check(VideoRef, found.videos, version)
    _check(VideoInfo, [one for one in found.infos if one is not None], version)
    _check(VideoEnd, [one for one in found.ends if one is not None], version)
    _check(Failure, [one for one in failures if one is not None], version)
    for info, end, failure in zip(found.infos, found.ends, failures, strict=True):
        if (failure is None) == (info is None or end is None):
            raise ValueError("an outcome is either rows or a failure")
    if not set(map(type, found.n_clips)) <= {int}:
        raise TypeError("a number of clips is not a number")
    if not all(0 <= n_clips < 2**31 for n_clips in found.n_clips):  # a sum of them is compared with the rows
        raise ValueError("a number of clips is not possible")
    return found


def _check(kind: type, records: Sequence[Values], version: int) -> None:
    """One of MALFORMED unless each has the fields of a record of this version, with values of their types."""
    if not records:
        return
    names = names_in(kind, version)
    for one in records:
        if one.keys() != names:
            exactly(kind, one, version)
    checked_columns(kind, {name: [*map(itemgetter(name), records)] for name in names})


def _values(record: Any, version: int) -> Values | None:
    if record is None:
        return None
    names, get = _getter(type(record), version)  # type: ignore[arg-type] # a class is hashable
    return dict(zip(names, get(record), strict=True))


@cache
def _getter(kind: type, version: int) -> tuple[tuple[str, ...], Any]:
    names = tuple(name for name in kind.__slots__ if name in names_in(kind, version))  # type: ignore[attr-defined] # ours
    return names, attrgetter(*names)


@cache
def _fields(every: tuple[Column, ...], version: int) -> tuple[pa.Field, ...]:
    return tuple(columns.schema(every, version))


def _arrays(records: Sequence[Values], fields: tuple[pa.Field, ...]) -> list[pa.Array]:
    """The values of some fields, which all records have, by columns."""
    arrays: list[pa.Array] = pa.array(records, pa.struct(fields)).flatten()
    return arrays
