"""Where the source videos are now: OUT/roots/<seq>.json says that those of one folder or prefix have moved to another.

    plans/*.json ──uri as planned──> Roots.now ──uri as it is now──> whatever opens or shows the video

Nothing that was written before is edited. A record holds for the plans that existed when it was made, since later plans
name the videos where they are. Records apply one after the other, so that an archive can move twice, or back.

A move may change the time or the ETag of a file, and with it the version. `compared` says what was compared on a sample
when the record was made. After "version" each video must have its planned version; after "size" the planned size is
enough, and another size is never accepted.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args
from urllib.parse import unquote_to_bytes

import pyarrow as pa

from p3d.pipeline.errors import MALFORMED, AlreadyRunning, DamagedJob, InputError
from p3d.pipeline.recipe import digest
from p3d.pipeline.storage.store import EXISTS, Store
from p3d.pipeline.types import VideoRef, checked, size_version
from p3d.pipeline.types.versions import SCHEMA_VERSION, exactly, in_version, refuse_newer

Compared = Literal["version", "size"]
ROOT_KEY = re.compile(r"roots/[0-9]{4,}\.json")
PLACE = re.compile(r"file://(/[!-~]*[!-.0-~])?|s3://[!-.0-~]+(/[!-~]*[!-.0-~])?")  # without a slash at the end


@dataclass(frozen=True, slots=True)
class RootRecord:
    """OUT/roots/<seq>.json: the videos at `old` and below it are now at `new`, for the plans up to number `plans`.

    `old` and `new` are percent-encoded, as the uris of videos are, and have no slash at the end.
    """

    seq: int
    old: str
    new: str
    plans: int
    compared: Compared
    created_at: str
    schema_version: int = SCHEMA_VERSION

    @property
    def key(self) -> str:
        """The key of this record in OUT."""
        return f"roots/{self.seq:04d}.json"

    def moved(self, uri: str) -> str | None:
        """The new uri of a video, or None if it is not below `old`, or has a part `.` or `..` below it."""
        if uri == self.old:
            return self.new
        if not uri.startswith(f"{self.old}/"):
            return None
        rest = uri[len(self.old) :]
        raw = unquote_to_bytes(os.fsencode(rest))
        return None if b"\0" in raw or {b".", b".."} & set(raw.split(b"/")) else self.new + rest

    def check(self) -> None:
        """InputError unless the values are those of a record that p3d writes."""
        checked([self])
        if self.seq < 1 or self.plans < 1:
            raise InputError(f"seq {self.seq} and plans {self.plans} are not numbers from 1")
        if not PLACE.fullmatch(self.old) or not PLACE.fullmatch(self.new) or self.old == self.new:
            raise InputError("old and new are not two places of videos")
        if self.compared not in get_args(Compared):
            raise InputError("compared is neither version nor size")

    def to_json(self) -> bytes:
        root = in_version(self, self.schema_version)
        record = {"root": root, "root_digest": digest(root)}
        return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, place: str) -> Self:
        """Parse a record. OtherVersion; DamagedJob if it is not one, or was edited."""
        try:
            given = json.loads(content)
            if given["root_digest"] != digest(given["root"]) or len(given) != 2:
                raise DamagedJob(f"{place} was edited: it does not match its own digest. Restore it")
            version = refuse_newer(given["root"]["schema_version"], place)
            record = cls(**exactly(cls, given["root"], version))
            record.check()
        except (*MALFORMED, InputError) as error:
            raise DamagedJob(f"{place} cannot be read ({error}); restore it") from None
        return record


@dataclass(frozen=True, slots=True)
class Roots:
    """The records of an output, in order."""

    records: tuple[RootRecord, ...] = ()

    def now(self, uri: str, plan_seq: int) -> str:
        """The uri at which a video of a plan is now."""
        return self._now(uri, plan_seq)[0]

    def video(self, video: VideoRef, plan_seq: int) -> VideoRef:
        """A video of a plan as it is to be opened now. Its version is a `size_version` if only sizes were compared."""
        uri, compared = self._now(video.uri, plan_seq)
        if compared == "size":
            return replace(video, uri=uri, version=size_version(video.size_bytes), etag=None)
        return video if compared is None else replace(video, uri=uri)

    def by_size(self, uri: str, plan_seq: int) -> bool:
        """Has a video of a plan moved, and was only its size compared?"""
        return self._now(uri, plan_seq)[1] == "size"

    def table(self, rows: pa.Table, plan_seq: int) -> pa.Table:
        """Rows of one plan, with the current uris in their column `uri`."""
        if not any(plan_seq <= record.plans for record in self.records):
            return rows
        uris = [None if uri is None else self.now(uri, plan_seq) for uri in rows["uri"].to_pylist()]
        at = rows.schema.get_field_index("uri")
        return rows.set_column(at, rows.schema.field(at), pa.array(uris, rows.schema.field(at).type))

    def _now(self, uri: str, plan_seq: int) -> tuple[str, Compared | None]:
        """The current uri, and what was compared when the video moved: the weakest of its moves, None without any."""
        compared: Compared | None = None
        for record in self.records:
            moved = record.moved(uri) if plan_seq <= record.plans else None
            if moved is not None:
                uri, compared = moved, "size" if "size" in (compared, record.compared) else "version"
        return uri, compared


def load_roots(store: Store) -> Roots:
    """Every record of an output. DamagedJob if one was edited or is missing before another."""
    records = []
    for info in store.list("roots/"):
        if not ROOT_KEY.fullmatch(info.key):
            continue
        record = RootRecord.from_json(store.read(info.key), f"{store.url}/{info.key}")
        if info.key != record.key:
            raise DamagedJob(f"{store.url}/{info.key} is not the record of that number; restore it")
        records.append(record)
    records.sort(key=lambda record: record.seq)
    for at, record in enumerate(records, 1):
        if record.seq != at:
            raise DamagedJob(f"{store.url}/roots/{at:04d}.json is missing; restore it")
    return Roots(tuple(records))


def add_root(store: Store, record: RootRecord) -> None:
    """Create a record. AlreadyRunning if another process has created one of this number."""
    record.check()
    content = record.to_json()
    if store.create(record.key, content) == EXISTS and store.read(record.key) != content:
        raise AlreadyRunning(f"{store.url}: another root was recorded at this moment; give the same command again")
