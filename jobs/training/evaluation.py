"""Test a training by the paper's protocol, and write its results: the last part of every process of a training.

Each test video has N uniform clips of the centre of its frames. The scores of a video are the mean of those of its
clips, which are distributions. A hit is the right class among the K most probable; ties go to the lower class number.
The network that is tested is that of the file that is written, in the form in which jobs run it.
Source: the paper, section 5.1 (20 clips, single centre crop, mean of scores).
"""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch.distributed as dist

import p3d.weights
from p3d.encoder import Encoder
from p3d.jobs.planning.prepare import frame_spec
from p3d.jobs.training import snapshot
from p3d.jobs.training.checkpoints import METRICS
from p3d.jobs.training.clips import Feeder, UniformClips
from p3d.jobs.training.loop import Training
from p3d.jobs.training.network import trained
from p3d.jobs.training.record import RESULT_KEY, TEST, TRAIN, TrainRecord, data_digest
from p3d.jobs.training.sampling import Share
from p3d.jobs.training.snapshot import FINISHED, TESTING, Stopped
from p3d.pipeline.clips.rules import parse_sampling
from p3d.pipeline.errors import InputError, Reason, StoreMissing, counted
from p3d.pipeline.recipe import with_short_digests
from p3d.pipeline.results.evaluation.classes import TOP
from p3d.pipeline.results.report.training import TrainingReport, render_training
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import FLOAT32, Failure
from p3d.weights import Weights, WeightsError

TESTED_KEY = "_job/tested.json"
PREDICTIONS = pa.schema(
    [
        ("path", pa.string()),
        ("class", pa.string()),
        ("predicted_class", pa.string()),
        ("label", pa.int32()),  # the number of the class
        ("predicted", pa.int32()),
        ("probability", pa.float32()),
        ("rank", pa.int32()),  # of the right class, 0 if it is the most probable
        ("clips", pa.int32()),
        ("clips_right", pa.int32()),
    ]
)
FAILURES = pa.schema([("path", pa.string()), ("split", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


def test(training: Training) -> tuple[pa.Table, dict[str, Failure]]:
    """Test the network as it is now: the predictions of all test videos, and the failed ones by path. All processes.

    The hit rates are added to `training.tests`.
    """
    videos = training.videos.filter(pc.equal(training.videos["split"], TEST))
    rows, failed = list[dict[str, Any]](), dict[str, Failure]()
    if videos.num_rows:
        rows, failed = _of_all(training, *_of_share(training, videos))
    predictions = pa.Table.from_pylist(rows, PREDICTIONS)
    if rows:
        training.tests.append({"step": training.step, **hits_of(predictions)})
        training.pulse.now = replace(training.pulse.now, hits=hits_of(predictions))
    return predictions, failed


def _tested(training: Training) -> tuple[pa.Table, dict[str, Failure]]:
    """The last test, kept in a control object: a run that is killed between two results must not mix two tests."""
    try:
        given = json.loads(training.store.read(TESTED_KEY))
        failed = {path: Failure(Reason(reason), detail) for path, (reason, detail) in given["failed"].items()}
        training.tests = given["tests"]
        return pa.Table.from_pylist(given["rows"], PREDICTIONS), failed
    except StoreMissing:
        pass
    predictions, failed = test(training)
    if training.process.rank == 0:
        kept = {path: (one.reason, one.detail) for path, one in failed.items()}
        content = {"rows": predictions.to_pylist(), "failed": kept, "tests": training.tests}
        training.store.replace(TESTED_KEY, json.dumps(content).encode())
    return predictions, failed


def hits_of(predictions: pa.Table) -> dict[str, float]:
    """clip_hit1, video_hit1 and video_hit5, in [0, 1]; empty without predictions."""
    if not predictions.num_rows:
        return {}
    rank = predictions["rank"].to_numpy()
    clips = pc.sum(predictions["clips"]).as_py()
    return {
        "clip_hit1": pc.sum(predictions["clips_right"]).as_py() / clips,
        "video_hit1": float((rank == 0).mean()),
        f"video_hit{TOP}": float((rank < TOP).mean()),
    }


def _of_share(training: Training, videos: pa.Table) -> tuple[list[dict[str, Any]], dict[str, Failure]]:
    """The predictions of this process's share of the test videos, and its failures by path."""
    process, options, run = training.process, training.options, training.run
    clip = training.start.recipe
    sampling = parse_sampling(
        f"uniform:{options.test_clips}", clip_frames=clip.n_frames, frame_step=options.frame_step, fps=options.fps
    )
    source = training.source(videos, frame_spec(clip), sampling)
    share = Share(process.rank, process.world, 1, 0, videos.num_rows)
    encoder = Encoder(weights_now(training, ""), device=str(process.device), batch_size=run.micro_batch)
    labels, paths = videos["label"].to_pylist(), videos["path"].to_pylist()
    rows, failed = list[dict[str, Any]](), dict[str, Failure]()
    training.pulse.now = replace(training.pulse.now, phase=TESTING, to_test=len(share), tested=0)
    with Feeder(UniformClips(source), share, children=run.decode_tasks, ahead=1) as feeder:
        for number, found in feeder:
            if isinstance(found, Failure):
                failed[paths[number]] = found
            else:
                index_NT = np.arange(found.shape[0] * found.shape[1], dtype=np.int64).reshape(found.shape[:2])
                _, probs_NK = encoder.encode(found.reshape(-1, *found.shape[2:]), index_NT, probs=True)
                if not np.isfinite(probs_NK).all():
                    raise InputError(f"the trained network gives NaN for {paths[number]}; train with a lower --lr")
                rows.append(prediction(paths[number], labels[number], probs_NK, training.record.class_names))
            training.pulse.now = replace(training.pulse.now, tested=training.pulse.now.tested + 1)
            if training.pulse.asked.is_set():  # of rank 0; the others end with it
                raise training.pulse.error or Stopped
    return rows, failed


def prediction(path: str, label: int, probs_NK: FLOAT32, names: tuple[str, ...]) -> dict[str, Any]:
    """The row of a video with the class probabilities of its N clips."""
    mean_K = probs_NK.mean(axis=0)
    by_probability = np.argsort(-mean_K, kind="stable")
    return {
        "path": path,
        "class": names[label],
        "predicted_class": names[int(by_probability[0])],
        "label": label,
        "predicted": int(by_probability[0]),
        "probability": float(mean_K[by_probability[0]]),
        "rank": int(np.flatnonzero(by_probability == label)[0]),
        "clips": len(probs_NK),
        "clips_right": int((probs_NK.argmax(axis=1) == label).sum()),
    }


def _of_all(
    training: Training, rows: list[dict[str, Any]], failed: dict[str, Failure]
) -> tuple[list[dict[str, Any]], dict[str, Failure]]:
    """The rows and failures of all processes, in the order of paths."""
    every: list[Any] = [(rows, failed)]
    if training.process.world > 1:
        every = [None] * training.process.world
        dist.all_gather_object(every, (rows, failed))
    together = sorted((row for found, _ in every for row in found), key=lambda row: str(row["path"]))
    return together, {path: one for _, found in every for path, one in found.items()}


def weights_now(training: Training, origin: str) -> Weights:
    """The weights of the training as they are now. InputError if they are not finite."""
    try:
        return trained(training.start, training.network.state_dict(), origin)
    except WeightsError as error:
        raise InputError(f"{error}; train into another output with a lower --lr") from None


def finish(training: Training) -> None:
    """Test the trained network, and create the results in OUT, weights.safetensors last. Rank 0 writes."""
    predictions, failed = _tested(training)
    if training.process.rank:
        return
    store, record = training.store, training.record
    hits = hits_of(predictions)
    rows = np.array(training.metrics, np.float64).reshape(-1, len(METRICS))
    kinds = dict(zip(METRICS, (np.int64, np.float64, np.float32, np.float32, *[np.float64] * 3, np.int32), strict=True))
    metrics = pa.table({name: rows[:, at].astype(kind) for at, (name, kind) in enumerate(kinds.items())})
    tables = {
        "metrics": metrics,
        "tests": pa.Table.from_pylist(training.tests) if training.tests else _no_tests(),
        "predictions": predictions,
        "failures": _failures(training, failed),
    }
    for name, table in tables.items():
        create_table(store, f"{name}.parquet", table)
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    report = TrainingReport(store.url, made, facts_of(record), record.class_names, **tables)
    store.create("report.html", render_training(report).encode())
    weights = weights_now(training, origin_of(training, predictions.num_rows, hits))
    store.create(RESULT_KEY, p3d.weights.to_bytes(weights))
    n_failed = len(training.failures) + len(failed)
    training.pulse.now = replace(
        training.pulse.now,
        state=FINISHED,
        step=training.step,
        steps=training.options.steps,
        checkpoint=training.step,
        failed=n_failed,
        exit_code=3 if n_failed else 0,
        sentence=f"finished: {counted(record.options.steps, 'step')}"
        + _in_words(hits, predictions.num_rows, record)
        + (f"; {counted(n_failed, 'video')} failed (failures.parquet)" if n_failed else ""),
    )
    snapshot.write(store, training.process.epoch, training.pulse.now)


def facts_of(record: TrainRecord) -> tuple[tuple[str, str], ...]:
    """What was trained and how, for the report."""
    options = record.options
    height, width = record.recipe.crop_hw
    schedule = f"steps of {options.lr_every}" if options.schedule == "steps" else options.schedule
    n_train, n_test, n_classes = record.n_train, record.n_test, len(record.class_names)
    flipped = ", half of them mirrored" if options.flip else ""
    return (
        ("network", f"{record.model}, graph {record.graph}"),
        ("start", with_short_digests(record.start)),
        ("videos", f"{n_train} to train on, {n_test} to test on, {n_classes} classes"),
        ("clips", f"{record.recipe.n_frames} frames of {height}x{width}{flipped}"),
        ("steps", f"{options.steps} of {options.batch_size} clips"),
        ("optimiser", f"{options.optimizer}, learning rate {options.lr:g}, {schedule}"),
        ("frozen", record.freeze),
        ("precision", options.precision),
        ("seed", str(options.seed)),
        ("p3d", record.versions.get("p3d-embeddings", "")),
    )


def _in_words(hits: dict[str, float], n_videos: int, record: TrainRecord) -> str:
    if not hits:
        return f", all {counted(record.n_test, 'test video')} failed" if record.n_test else ", no video to test on"
    named = [("clip hit@1", "clip_hit1"), ("video hit@1", "video_hit1")]
    if len(record.class_names) > TOP:  # else it is always 100 %
        named.append((f"hit@{TOP}", f"video_hit{TOP}"))
    rates = ", ".join(f"{name} {100 * hits[key]:.1f} %" for name, key in named)
    return f", {rates} of {counted(n_videos, 'test video')}"


def origin_of(training: Training, n_tested: int, hits: dict[str, float]) -> str:
    """What the file of the result says of its origin: start, data, steps, frames and accuracy."""
    record, options = training.record, training.options
    frames = f", {options.fps:g} frames/s" if options.fps else ""
    frames += f", frame step {options.frame_step}" if options.frame_step > 1 else ""
    return (
        f"trained by p3d; start: {record.start}; {options.steps} steps of {options.batch_size} clips of "
        f"{record.n_train} videos (data {data_digest(training.videos)[:16]}){frames}, {options.optimizer}, seed "
        f"{options.seed}" + _in_words(hits, n_tested, record)
    )


def _no_tests() -> pa.Table:
    names = ("step", "clip_hit1", "video_hit1", f"video_hit{TOP}")
    return pa.table({name: pa.array([], pa.int64() if name == "step" else pa.float64()) for name in names})


def _failures(training: Training, tested: dict[str, Failure]) -> pa.Table:
    videos = training.clips.source.videos["path"]
    rows = [(videos[number].as_py(), TRAIN, one) for number, one in sorted(training.failures.items())]
    rows += [(path, TEST, one) for path, one in sorted(tested.items())]
    return pa.Table.from_pylist(
        [{"path": path, "split": split, "reason": one.reason, "detail": one.detail} for path, split, one in rows],
        FAILURES,
    )


def create_table(store: Store, key: str, table: pa.Table) -> None:
    """Create a Parquet file in OUT, unless an earlier run that was killed has created it."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    store.create(key, sink.getvalue())
