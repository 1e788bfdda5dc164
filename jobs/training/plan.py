"""Plan a training: read the labels and the start, and create train.json. Idempotent."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow.compute as pc

import p3d.weights
from p3d.jobs.job import TRAIN_KEY, read_job
from p3d.jobs.machine import software
from p3d.jobs.planning.job_spec import check_named
from p3d.jobs.planning.prepare import weights_here
from p3d.jobs.training.labels import labelled
from p3d.jobs.training.network import start_from, what_is_frozen
from p3d.jobs.training.options import LabelOptions, TrainOptions
from p3d.jobs.training.record import (
    TRAIN,
    TrainRecord,
    is_training,
    read_record,
    samples_bytes,
)
from p3d.jobs.trust import Say, refuse_untrusted, remember
from p3d.pipeline.errors import NoSuchJob, OtherRecipe, counted
from p3d.pipeline.recipe import new_job_id
from p3d.pipeline.storage.store import EXISTS, Store, StoreOptions


@dataclass(frozen=True, slots=True)
class TrainSpec:
    """What a user gives for a training: the videos, their labels, the network and the start."""

    src: str
    init: str
    model: str | None
    graph: str | None
    labels: LabelOptions
    options: TrainOptions
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    id_column: str | None = None


def plan(store: Store, spec: TrainSpec, s3: StoreOptions, say: Say) -> TrainRecord:
    """The training that a user asks for, created at OUT unless it exists there. JobError of many kinds.

    OtherRecipe if OUT holds a job, another training, or unrelated files.
    """
    check_named(spec.model, spec.init)
    existing = _existing(store)
    found = labelled(
        spec.src,
        spec.labels,
        s3,
        seed=spec.options.seed,
        include=spec.include,
        exclude=spec.exclude,
        id_column=spec.id_column,
        tell=say,
    )
    for note in found.notes:
        say(note)
    with weights_here(spec.init, s3) as init:
        start = start_from(init, spec.model, spec.graph, found.class_names, spec.options)
    content, samples = p3d.weights.to_bytes(start), samples_bytes(found.videos)
    n_train = pc.sum(pc.equal(found.videos["split"], TRAIN)).as_py()
    record = TrainRecord(
        model=start.name,
        graph=start.config.graph,
        stride_on=start.config.stride_on,
        class_names=found.class_names,
        recipe=start.recipe,
        options=spec.options,
        freeze=what_is_frozen(spec.options, spec.init),
        start=start.origin.replace(init, spec.init),
        start_sha256=hashlib.sha256(content).hexdigest(),
        samples_sha256=hashlib.sha256(samples).hexdigest(),
        n_train=n_train,
        n_test=found.videos.num_rows - n_train,
        job_id=new_job_id(),
        versions=software(),
    )
    say(
        f"{counted(record.n_train, 'training video')} and {counted(record.n_test, 'test video')} of "
        f"{len(record.class_names)} classes; {record.model} starts from {record.start}"
    )
    if spec.options.batch_size > n_train:
        say(
            f"warning: --batch-size {spec.options.batch_size} is more than {counted(n_train, 'training video')}: a "
            "step takes several clips of one video"
        )
    if existing is not None:
        record.refuse_other(existing, store.url)
        refuse_untrusted(store, existing, "train")  # its checkpoints are somebody else's
        return existing
    store.prove_create_once()
    if warning := remember(store, record.job_id, "launched", s3):  # first, as in a launch
        say(warning)
    store.create(record.start_key, content)
    store.create(record.samples_key, samples)
    if store.create(TRAIN_KEY, record.to_json()) == EXISTS:
        existing = read_record(store)  # another command created it at this moment
        record.refuse_other(existing, store.url)
        return existing
    return record


def _existing(store: Store) -> TrainRecord | None:
    """The training at an output; None if OUT is empty. OtherRecipe for anything else."""
    if is_training(store):
        return read_record(store)
    try:
        read_job(store)
    except NoSuchJob:
        ours = ("_job/", "weights/", "samples/")  # a training that was killed early leaves these
        unrelated = next((info.key for info in store.list() if not info.key.startswith(ours)), None)
        if unrelated is None:
            return None
        raise OtherRecipe(
            f"{store.url} is not empty but holds no training ({unrelated}); choose a new folder for the output"
        ) from None
    raise OtherRecipe(f"{store.url} holds the embeddings of a job, not a training; choose another output")
