"""snapshot.json: what a snapshot holds, and the checksum of every file in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.files import FOLDERS, UNREADABLE, check, local_path, sha256_of
from p3d.pipeline.errors import MALFORMED, DamagedJob, InputError
from p3d.pipeline.recipe import SHA256, JobRecord, Recipe, check_names, digest
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import checked
from p3d.pipeline.types.versions import exactly, in_version, refuse_newer

SNAPSHOT_KEY = "snapshot.json"
FILE = rf"(clips|videos|failures)/part-[0-9]{{5,}}\.parquet|weights/{SHA256}\.safetensors"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a snapshot, and what to verify it by. `n_rows` is None for the weights."""

    key: str
    sha256: str
    size_bytes: int
    n_rows: int | None

    def __post_init__(self) -> None:
        check_names({"key": (self.key, FILE), "sha256": (self.sha256, SHA256)})
        numbers = (self.size_bytes, 0 if self.n_rows is None else self.n_rows)
        check(all(type(number) is int and number >= 0 for number in numbers), f"{self.key}: {numbers = }")

    @property
    def folder(self) -> str:
        return self.key.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Counts:
    """Rows of each folder, and what was left out: excluded ids, pending videos, superseded rows."""

    videos: int
    clips: int
    failures: int
    excluded: int
    pending: int
    superseded: int


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """snapshot.json. `versions` are of the software that wrote it, `job.versions` of that which computed the rows.

    `plans`: plan_seq -> digest.
    """

    source: str
    created_at: str
    job: JobRecord
    plans: dict[str, str]
    with_clips: bool
    counts: Counts
    files: tuple[FileRecord, ...]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        recipe = self.job.recipe
        version = recipe.schema_version
        return {
            "schema_version": version,
            "source": self.source,
            "created_at": self.created_at,
            "plans": self.plans,
            "with_clips": self.with_clips,
            "counts": in_version(self.counts, version),
            "files": [in_version(one, version) for one in self.files],
            "versions": self.versions,
            "recipe": recipe.to_dict(),
            "recipe_digest": recipe.digest,
            "weights_sha256": recipe.weights_sha256,
            "weights_origin": self.job.weights_origin,
            "job_versions": self.job.versions,
        }

    def to_json(self) -> bytes:
        record = self.to_dict()
        return (json.dumps(record | {"digest": digest(record)}, indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, url: str) -> SnapshotRecord:
        """Parse the record of the snapshot at `url`. DamagedJob if it is not one, or was changed."""
        try:
            given = json.loads(content)
            stated = given.pop("digest")
            check(stated == digest(given), "it does not match its own digest")
            version = refuse_newer(given["schema_version"], f"{url}/{SNAPSHOT_KEY}")
            texts = [given[name] for name in ("weights_origin", "source", "created_at")]
            for held in (given["job_versions"], given["versions"], given["plans"]):
                texts += [*held, *held.values()]
            check(all(isinstance(one, str) for one in texts), "it has other values than texts")
            recipe = Recipe.from_dict(given["recipe"])
            check(recipe.schema_version == version, f"its recipe is of schema version {recipe.schema_version}")
            files = [FileRecord(**exactly(FileRecord, one, version)) for one in given["files"]]
            record = cls(
                source=given["source"],
                created_at=given["created_at"],
                job=JobRecord(recipe, given["weights_origin"], given["job_versions"]),
                plans=given["plans"],
                with_clips=given["with_clips"],
                counts=checked([Counts(**exactly(Counts, given["counts"], version))])[0],
                files=tuple(checked(files)),
                versions=given["versions"],
            )
            check(digest(record.to_dict()) == stated, "it has fields too many or too few, or they do not fit together")
            return record
        except (*MALFORMED, InputError) as error:
            raise DamagedJob(f"{url}/{SNAPSHOT_KEY} cannot be trusted: {error}. Make the snapshot again") from None


def read_snapshot(store: Store) -> SnapshotRecord:
    """The record of the snapshot in a store. StoreMissing if it does not exist, DamagedJob if it was edited."""
    return SnapshotRecord.from_json(store.read(SNAPSHOT_KEY), store.url)


def problems_of(store: Store, record: SnapshotRecord, on_step: Callable[[int, int], None] | None = None) -> list[str]:
    """One message for each file that is not as recorded, each unrecorded file, and each count that does not add up."""
    found = {info.key: info.size_bytes for folder in (*FOLDERS, "weights") for info in store.list(f"{folder}/")}
    problems = [f"{key} belongs to no snapshot" for key in sorted(found.keys() - {one.key for one in record.files})]
    for done, one in enumerate(record.files):
        problems += [f"{one.key} {what}" for what in _problems_of_file(store, one, found, record.job.recipe)]
        if on_step is not None:
            on_step(done + 1, len(record.files))
    for folder in FOLDERS:
        n_rows = sum(one.n_rows or 0 for one in record.files if one.folder == folder)
        counted = getattr(record.counts, folder)
        if n_rows != counted:
            problems.append(f"{folder}/ has {n_rows} rows in its files, and {counted} in the counts")
    return problems


def _problems_of_file(store: Store, one: FileRecord, found: dict[str, int], recipe: Recipe) -> list[str]:
    if one.key not in found:
        return ["is gone"]
    if found[one.key] != one.size_bytes:
        return [f"has {found[one.key]} bytes, not {one.size_bytes}"]
    try:
        with local_path(store, one.key) as path:
            if sha256_of(path) != one.sha256:
                return ["is not the file that was written: its sha256 differs"]
            if one.n_rows is not None:
                with schema.open_parquet(path) as file:
                    check(file.metadata.num_rows == one.n_rows, f"{file.metadata.num_rows} rows, not {one.n_rows}")
                    schema.check_columns(one.folder, file.schema_arrow, recipe)
    except UNREADABLE as error:
        return [f"cannot be read: {error}"]
    return []
