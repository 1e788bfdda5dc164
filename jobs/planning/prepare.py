"""Turn names and options into a Recipe, its weights and a Plan.

Only this module connects the network with the data plane: p3d's ClipRecipe (what weights were trained on) becomes
pipeline's FrameSpec (how to resize and crop a frame).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

import p3d.weights
from p3d.device import check_precision, computes_in, device_for
from p3d.encoder import golden_features
from p3d.jobs.job import golden_key, read_job, stored_weights, weights_key
from p3d.jobs.machine import Machines, cpus_of_a_gpu_worker, software, usable_cpus
from p3d.jobs.planning.changes import changes
from p3d.jobs.planning.job_spec import NO_WEIGHTS, JobSpec, check_spec
from p3d.pipeline.dataset.plans import Manifest, plans_of, write_plan
from p3d.pipeline.dataset.roots import load_roots
from p3d.pipeline.dataset.sharding import sharded, with_shards
from p3d.pipeline.dataset.verify import current_failures
from p3d.pipeline.decode.routes.nvdec import not_here
from p3d.pipeline.errors import InputError, NoSuchJob, OtherRecipe, StoreMissing
from p3d.pipeline.recipe import (
    CPU_BATCH,
    GPU_BATCH,
    JobRecord,
    PlanRecord,
    Recipe,
    RecipeOptions,
    RunOptions,
    ShardSizing,
    new_job_id,
)
from p3d.pipeline.sources.listing import SourceListing, look_again
from p3d.pipeline.storage.local import scratch_folder
from p3d.pipeline.storage.store import EXISTS, Store, StoreOptions
from p3d.pipeline.storage.urls import open_store
from p3d.pipeline.types import FrameSpec
from p3d.pipeline.types.options import check_values
from p3d.preprocessing import ClipRecipe
from p3d.weights import Weights

_PER_RUN = ("max_failures", "decode_tasks", "s3")  # set for every run; a resume keeps the other options
# per worker; each holds 100 to 300 MB, and message batches in Ray's shared memory (jobs/scheduler/cluster.py)
MAX_DECODE_TASKS = 32
PLAIN_NAME = re.compile(r"[\w+-][\w .+-]*")  # of a file: no separator, control character or leading dot
NAME_BYTES = 200


@dataclass(frozen=True, eq=False)
class Prepared:
    """A recipe with its weights; `content` is the safetensors file that all workers will load."""

    recipe: Recipe
    weights: Weights
    content: bytes
    origin: str

    @cached_property
    def golden(self) -> list[float]:
        """The features of the golden clip on this machine's CPU: D numbers."""
        return [float(value) for value in golden_features(self.weights)]

    def clips_per_s(self) -> float:
        """The speed of this machine's CPU for a single clip, warmed up. Batches of a job are somewhat faster."""
        _ = self.golden
        started = time.monotonic()
        golden_features(self.weights)
        return 1 / (time.monotonic() - started)


def prepare(spec: JobSpec, s3: StoreOptions | None = None, out: Store | None = None) -> Prepared:
    """Load the weights and fix the recipe. InputError if either is invalid.

    The weights may be an object on S3 (`s3://bucket/key`), read with the options `s3`. Without any, they are those of
    the job at `out`.
    """
    check_spec(spec)
    if spec.weights is None:
        return fix(_weights_of(out, spec), spec)
    with weights_here(spec.weights, s3 or StoreOptions()) as named:
        try:
            weights = p3d.weights.resolve(named, name=spec.model, graph=spec.graph)
        except ValueError as error:
            raise InputError(str(error).replace(named, spec.weights)) from None
    return fix(weights, spec)


def _weights_of(out: Store | None, spec: JobSpec) -> Weights:
    """The weights of the job at OUT. InputError without any, OtherRecipe if they are of another network."""
    if out is None:
        raise InputError(NO_WEIGHTS)
    try:
        weights = stored_weights(out, read_job(out).recipe)
    except NoSuchJob:
        raise InputError(NO_WEIGHTS) from None
    except StoreMissing:
        raise InputError(f"{out.url} no longer holds its weights; give them with --weights") from None
    for name, given, there in (("model", spec.model, weights.name), ("graph", spec.graph, weights.config.graph)):
        if given not in (None, there):
            raise OtherRecipe(
                f"the job at {out.url} has the {name} {there}, not {given}: leave out --{name}, or launch into another "
                "output"
            )
    return weights


@contextlib.contextmanager
def weights_here(named: str, s3: StoreOptions) -> Iterator[str]:
    """The weights as given; an object on S3 is downloaded to a temporary file."""
    if not named.startswith("s3://"):
        yield named
        return
    folder, _, name = named.rpartition("/")
    with scratch_folder("p3d-weights-") as scratch:
        path = scratch / _local_name(unquote(name))
        try:
            open_store(folder, s3).download(unquote(name), path)
        except StoreMissing:
            raise InputError(f"there is no weights file {named}") from None
        yield str(path)


def _local_name(key: str) -> str:
    """The file name of a key of weights if it is a plain one, since the origin of the weights states it; else our own.

    A key may hold any characters, such as those of an absolute path.
    """
    last = key.rpartition("/")[2]
    if PLAIN_NAME.fullmatch(last) and len(last.encode()) <= NAME_BYTES:
        return last
    suffix = re.search(r"\.[A-Za-z]{1,12}$", last)
    return f"weights{suffix[0] if suffix else ''}"


def fix(weights: Weights, spec: JobSpec) -> Prepared:
    """The recipe of loaded weights. InputError if the network takes no RGB or cannot run in `spec.precision`."""
    if weights.config.in_channels != 3:
        raise InputError(
            f"{weights.name} takes optical flow, which p3d does not compute from a video; use an RGB network"
        )
    if spec.precision not in weights.network.precisions:
        known = " or ".join(weights.network.precisions)
        raise InputError(f"{weights.name} runs in {known}, not in {spec.precision}")
    content = p3d.weights.to_bytes(weights)
    clip = weights.recipe
    recipe = Recipe(
        model=weights.name,
        graph=weights.config.graph,
        weights_sha256=hashlib.sha256(content).hexdigest(),
        feature_dim=weights.network.feature_dim,
        clip_frames=clip.n_frames,
        resize_hw=clip.resize_hw,
        short_side=clip.short_side,
        crop_hw=clip.crop_hw,
        num_classes=weights.config.num_classes,
        **{field.name: getattr(spec, field.name) for field in fields(RecipeOptions)},
    )
    return Prepared(recipe, weights, content, weights.origin)


def frame_spec(clip: ClipRecipe) -> FrameSpec:
    """How to resize and crop a frame, so that it matches what the weights were trained on."""
    return FrameSpec(crop_hw=clip.crop_hw, resize_hw=clip.resize_hw, short_side=clip.short_side)


def create_job(store: Store, prepared: Prepared, job_id: str = "") -> JobRecord:
    """Write the weights, the golden features and job.json into OUT, job.json last. Idempotent.

    `job_id` is that of a new job, random if it is empty; the record of a job that existed before keeps its own.
    """
    recipe = prepared.recipe
    if store.head(weights_key(recipe)) is None:
        store.create(weights_key(recipe), prepared.content)
    if store.head(golden_key(recipe)) is None:
        record = {"features": prepared.golden, "what": "features of the golden clip, CPU, float32"}
        store.create(golden_key(recipe), json.dumps(record).encode())
    job = JobRecord(recipe, prepared.origin, software(), job_id or new_job_id())
    if store.create("job.json", job.to_json()) == EXISTS:
        job = read_job(store)
        recipe.refuse_other(job.recipe, store.url, (prepared.origin, job.weights_origin))
    return job


def add_plan(
    store: Store,
    job: JobRecord,
    found: SourceListing,
    *,
    sizing: ShardSizing,
    limit: int | None,
    without: Collection[int] = (),
    say: Callable[[str], None] = lambda _: None,
) -> PlanRecord | None:
    """Plan the videos that are new or changed (`p3d.jobs.planning.changes`); None without any.

    Plans of the numbers `without` will not be run, so that their videos count as new. `say` is told how many videos
    are new, and how many are planned again.
    """
    roots = load_roots(store)
    earlier = [Manifest(store, plan, roots) for plan in plans_of(store, job.recipe)]
    videos = found.videos if limit is None else found.videos.slice(0, limit)
    found_changes = changes(earlier, videos, without=without)
    if not found_changes.n_videos:
        return None
    if earlier:
        say(str(found_changes))
    if found_changes.warning:
        say(found_changes.warning)
    seq = max((manifest.plan.seq for manifest in earlier), default=0) + 1
    rows = sharded(found_changes.tables(), sizing)
    return write_plan(store, seq, job.recipe, rows, found.n_skipped, sizing)


def add_retry(
    store: Store, job: JobRecord, reasons: frozenset[str], s3: StoreOptions, *, sizing: ShardSizing
) -> PlanRecord | None:
    """Plan a retry of the failed videos, all or those with `reasons`; None if no video has failed.

    Each source is looked up again where it is now, so a file that was replaced or restored is used as it is. Ids and
    the user's columns stay. A video that a newer plan already contains is pending, not failed.
    """
    plans, roots = {plan.seq: plan for plan in plans_of(store, job.recipe)}, load_roots(store)
    failed: dict[int, set[str]] = {}
    for row in current_failures(store):
        if row["plan_seq"] not in plans:
            continue  # a newer plan has just appeared: write_plan will detect it
        if not reasons or row["reason"] in reasons:
            failed.setdefault(row["plan_seq"], set()).add(row["video_id"])
    if not failed:
        return None
    tables = []
    for seq, ids in sorted(failed.items()):
        wanted = pa.array(sorted(ids), pa.string())
        for videos in Manifest(store, plans[seq]).parts():
            chosen = videos.filter(pc.is_in(videos["video_id"], wanted)).drop_columns(["shard"])
            tables.append(roots.table(chosen, seq))
    again = look_again(pa.concat_tables(tables, promote_options="default"), s3, keep_missing=True)
    return write_plan(store, max(plans) + 1, job.recipe, with_shards(again, sizing), 0, sizing)


def gpus_here() -> int:
    """The number of GPUs of this machine that torch sees."""
    import torch

    return torch.cuda.device_count()


def machines_here() -> Machines:
    """The cores and GPUs that this process may use."""
    cpus, gpus = usable_cpus(), gpus_here()
    return Machines(cpus, cpus, gpus, ((cpus, gpus),) if gpus else ())


def default_workers(gpus: int, workers_per_gpu: int = 1) -> int:
    """`workers_per_gpu` for each GPU; one without GPUs."""
    return gpus * workers_per_gpu or 1


def refuse_shared_gpu(kind: str, workers_per_gpu: int | None) -> None:
    """InputError if several workers per GPU were asked for, and the device is no GPU."""
    if kind != "cuda" and (workers_per_gpu or 1) > 1:
        raise InputError(
            f"--workers-per-gpu {workers_per_gpu}: the device is {kind}, and only a GPU is shared; leave it out, or "
            "give --workers"
        )


def default_batch(device: str) -> int:
    """Clips per batch; docs/explanation/performance.md has the speed and memory of other sizes."""
    return CPU_BATCH if device == "cpu" else GPU_BATCH


def refuse_unfit_device(recipe: Recipe, device: str, there: Machines | None = None) -> None:
    """InputError if this machine cannot, or should not, compute in the recipe's precision on that device.

    The same holds for the recipe's decoder. The machines of a cluster, `there`, check themselves when a worker starts.
    """
    if there is not None:
        return
    try:
        check_precision(recipe.precision, device_for(device))
    except ValueError as error:
        raise InputError(str(error)) from None
    if recipe.decoder == "nvdec" and (why := not_here()):
        raise InputError(f"--decoder nvdec: {why}. Use auto, decord or pyav")


def recipe_of_query(recipe: Recipe, device: str) -> Recipe:
    """The recipe to embed a file with, to compare it with rows of `recipe`.

    It is in fp32 if the device does not support the precision of `recipe`. InputError if this machine does not have the
    device, or cannot decode as the recipe says.
    """
    with contextlib.suppress(ValueError):  # a device that is not there is refused below
        if not computes_in(recipe.precision, device_for(device)):
            recipe = replace(recipe, precision="fp32")
    refuse_unfit_device(recipe, device)
    return recipe


def most_decodes(machines: Machines, reserved: int = 0) -> int:
    """The most concurrent decodes of one worker, when the others leave it all cores but those `reserved` by workers."""
    return min(max(1, machines.cpus - reserved), MAX_DECODE_TASKS)


def kind_of_device(device: str, there: Machines | None = None) -> str:
    """The kind of device that workers of a run use: "cpu", "cuda" or another type of torch. ValueError."""
    return device_for(device).type if there is None else "cuda" if there.gpus and device != "cpu" else "cpu"


def run_options(last: dict[str, Any], *, there: Machines | None = None, **given: Any) -> RunOptions:
    """The options of a run: those given, else those of the last run of this output, else the defaults.

    `--max-failures`, the number of decode tasks and `s3`, which says where credentials go, are not inherited. `there`
    has the cores and GPUs of a cluster, which replace those of this machine. InputError for a device that is not
    available. `--workers-per-gpu` is inherited by runs on GPUs only, and another value replaces the number of workers.
    """
    given = {name: value for name, value in given.items() if value is not None}
    kept = {name: value for name, value in last.items() if name in RunOptions.__slots__ and name not in _PER_RUN}
    device = given.get("device", kept.get("device", "auto"))
    if isinstance(device, str) and device.startswith("cuda:"):
        raise InputError(f"--device {device}: each worker gets its own GPU; set CUDA_VISIBLE_DEVICES to choose GPUs")
    check_values(RunOptions, kept | given)
    try:
        kind = kind_of_device(device, there)
    except ValueError as error:
        raise InputError(str(error)) from None
    refuse_shared_gpu(kind, given.get("workers_per_gpu"))
    if kind != "cuda":
        kept.pop("workers_per_gpu", None)
    elif given.get("workers_per_gpu") not in (None, kept.get("workers_per_gpu", 1)):
        kept.pop("workers", None)
    machines = there or machines_here()
    per_gpu = given.get("workers_per_gpu", kept.get("workers_per_gpu", 1))
    workers = given.get("workers", kept.get("workers", default_workers(machines.gpus, per_gpu)))
    reserved = cpus_of_a_gpu_worker(machines, workers, per_gpu) if kind == "cuda" else 0
    defaults = {
        "workers": workers,
        "batch_size": default_batch(kind),
        "threads": max(
            1, machines.node_cpus // 2
        ),  # per machine, not per worker: the number of workers must not change any row
        "decode_tasks": min(max(1, machines.cpus // workers - reserved), MAX_DECODE_TASKS),
        "device": device,
    }
    return RunOptions(**{**defaults, **kept, **given})
