"""What a training is, all of it in OUT: its options, its videos with their labels, and the weights that it starts from.

train.json                 the record below, with its digest; created last, so a training is complete or absent
samples.parquet            the videos: the columns of a manifest, the class number, and the split, train or test
weights/<sha256>.safetensors   the start: the whole network, new classifier included
weights.safetensors        the result, with the class names, created once at the end
metrics.parquet, tests.parquet, predictions.parquet, failures.parquet, report.html    created at the end
_job/checkpoints/          the newest checkpoints (p3d.jobs.training.checkpoints)
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from p3d.jobs.job import TRAIN_KEY
from p3d.jobs.training.options import TrainOptions
from p3d.pipeline.dataset.schema import read_parquet
from p3d.pipeline.errors import MALFORMED, DamagedJob, InputError, NoSuchJob, OtherRecipe, OtherVersion, StoreMissing
from p3d.pipeline.recipe import SHA256, check_names, digest
from p3d.pipeline.storage.store import Store
from p3d.preprocessing import ClipRecipe

RESULT_KEY = "weights.safetensors"
FAILURES_KEY = "failures.parquet"
TRAIN_VERSION = 1
TRAIN, TEST = "train", "test"
RESTORE = "restore it from a copy, or train into another output"
SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRecord:
    """A training. `start_sha256` names the weights it starts from, and `start` says what they were made from.

    `freeze` is what the option came to: none, bn, all-bn or backbone. `samples_sha256` is of the bytes of
    the table of samples. `job_id` tells this training from any other. `versions` are those of its creator.
    """

    model: str
    graph: str
    stride_on: str
    class_names: tuple[str, ...]
    recipe: ClipRecipe
    options: TrainOptions
    freeze: str
    start: str
    start_sha256: str
    samples_sha256: str
    n_train: int
    n_test: int
    job_id: str
    versions: dict[str, str]

    @property
    def start_key(self) -> str:
        """The key in OUT of the weights that the training starts from."""
        return f"weights/{self.start_sha256}.safetensors"

    @property
    def samples_key(self) -> str:
        """The key in OUT of the table of the videos."""
        return f"samples/{self.samples_sha256}.parquet"

    def decides(self) -> dict[str, Any]:
        """What decides the result, by name: everything but the id and the versions."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = named | {"recipe": self.recipe.to_dict(), "options": self.options.to_dict()}
        return {name: value for name, value in plain.items() if name not in ("job_id", "versions")}

    def to_json(self) -> bytes:
        """The content of train.json."""
        training = self.decides() | {"class_names": list(self.class_names)}
        record = {"train_version": TRAIN_VERSION, "training": training, "digest": digest(training)}
        record |= {"job_id": self.job_id, "versions": self.versions}
        return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, place: str) -> TrainRecord:
        """Read what `to_json` wrote. DamagedJob if it was edited, OtherVersion if a newer program wrote it."""
        try:
            given = json.loads(content)
            if type(given["train_version"]) is int and given["train_version"] > TRAIN_VERSION:
                raise OtherVersion(
                    f"{place} is of training version {given['train_version']}, and the newest known here is "
                    f"{TRAIN_VERSION}; install a newer p3d"
                )
            training = given["training"]
            if given["digest"] != digest(training):
                raise DamagedJob(f"{place}/{TRAIN_KEY} was edited: it does not match its digest; {RESTORE}")
            if not re.fullmatch("[0-9a-f]{32}", given["job_id"]):
                raise InputError("its job_id is not 32 hex digits")
            check_names({name: (training[name], SHA256) for name in ("start_sha256", "samples_sha256")})
            texts = [training[name] for name in ("model", "graph", "stride_on", "freeze", "start")]
            texts += [*training["class_names"], *given["versions"].values()]
            numbers = [training["n_train"], training["n_test"]]
            if not all(isinstance(one, str) for one in texts) or not all(type(one) is int for one in numbers):
                raise InputError("a value is of another type")
            changed = {
                "class_names": tuple(training["class_names"]),
                "recipe": ClipRecipe.from_dict(training["recipe"]),
                "options": TrainOptions.from_dict(training["options"]),
            }
            return cls(**training | changed, job_id=given["job_id"], versions=given["versions"])
        except (*MALFORMED, InputError) as error:
            raise DamagedJob(f"{place}/{TRAIN_KEY} cannot be read ({error}); {RESTORE}") from None

    def refuse_other(self, other: TrainRecord, place: str) -> None:
        """OtherRecipe, which names what differs, unless `other` is the same training."""
        mine, theirs = _flat(self), _flat(other)
        odd = [
            f"{name.replace('_', ' ')} {str(theirs[name])[:SHOWN]}, not {str(mine[name])[:SHOWN]}"
            for name in mine
            if mine[name] != theirs[name]
        ]
        if odd:
            raise OtherRecipe(
                f"{place} holds a training with other settings: {'; '.join(odd)}. Use the same ones, or another output"
            )


def _flat(record: TrainRecord) -> dict[str, Any]:
    values = record.decides()
    return values | asdict(record.options) | {"options": None}


def is_training(store: Store) -> bool:
    """Is there a training at this output?"""
    return store.head(TRAIN_KEY) is not None


def read_record(store: Store) -> TrainRecord:
    """The training at an output. NoSuchJob without one, DamagedJob if it was edited."""
    try:
        return TrainRecord.from_json(store.read(TRAIN_KEY), store.url)
    except StoreMissing:
        raise NoSuchJob(f"no training exists at {store.url}; `p3d train SRC {store.words()}` starts one") from None


def code_of_result(store: Store) -> int:
    """The exit code of a training that has its result: 3 if videos failed."""
    with contextlib.suppress(StoreMissing, pa.ArrowException, OSError), store.open(FAILURES_KEY) as file:
        return 3 if pq.read_metadata(file).num_rows else 0
    return 0


def samples_bytes(videos: pa.Table) -> bytes:
    """The content of the table of samples; equal tables give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(videos, sink, compression="zstd")
    return sink.getvalue()


def data_digest(videos: pa.Table) -> str:
    """What identifies the data of a training wherever it lies: the sha256 of all paths, sizes, labels and splits."""
    rows = zip(*(videos[name].to_pylist() for name in ("path", "size_bytes", "label", "split")), strict=True)
    return digest([list(row) for row in rows])


def read_samples(store: Store, record: TrainRecord) -> pa.Table:
    """The videos of a training. DamagedJob if they are not those of its record."""
    content = store.read(record.samples_key)
    if hashlib.sha256(content).hexdigest() != record.samples_sha256:
        raise DamagedJob(f"{store.url}/{record.samples_key} is damaged: its sha256 differs from its name; {RESTORE}")
    return read_parquet(io.BytesIO(content))
