"""The same job written for other tools, each in the way of its documentation: clips of videos -> a Parquet dataset.

    python -m bench.peer_loops ARM SRC OUT WEIGHTS CLIPS

All arms decode with decord to the recipe's size, cut the same clips, use the same network, and write path, clip_index
and embedding. Arms whose batches mix videos use P3D's batch size. Arms that batch within a video use 2, because the
Encoder pads a batch and five clips in batches of four would cost eight. Only P3D isolates a decoder, survives a kill or
reports a bad file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bench.inputs import load, recipe_of, sampling_of
from p3d.encoder import Encoder, normalise
from p3d.jobs.machine import usable_cpus
from p3d.jobs.planning.prepare import default_batch
from p3d.pipeline.clips.rules import clip_spans, frame_numbers
from p3d.pipeline.types import FLOAT32, UINT8, FrameSpec

BATCH = default_batch("cpu")
WITHIN = 2  # clips of one video


class Clips:
    """The clips of one video, decoded by decord, for all arms."""

    def __init__(self, weights_path: str, clips: str) -> None:
        recipe = recipe_of(weights_path)
        self.spec = FrameSpec(recipe.crop_hw, recipe.resize_hw, recipe.short_side)
        self.sampling = sampling_of(clips, recipe.n_frames)

    def of(self, path: str) -> Iterator[tuple[int, UINT8]]:
        """(index, frames_THWC) of each clip."""
        import decord

        height, width = self.spec.target_hw(0, 0)
        reader = decord.VideoReader(path, width=width, height=height, num_threads=1)
        for span in clip_spans(self.sampling, len(reader)):
            numbers_T = frame_numbers(self.sampling, span, len(reader))
            yield span.index, self.spec.crop(reader.get_batch(numbers_T).asnumpy())


def encoder(weights_path: str, threads: int, batch: int = BATCH) -> Encoder:
    return Encoder(load(weights_path), batch_size=batch, threads=threads)


def features(model: Encoder, clips_BTHWC: UINT8) -> FLOAT32:
    """P3D's Encoder, as every arm but `today` calls it."""
    b, t = clips_BTHWC.shape[:2]
    frames_NHWC = clips_BTHWC.reshape(b * t, *clips_BTHWC.shape[2:])
    return model.encode(frames_NHWC, np.arange(b * t).reshape(b, t))


def write(out: str, name: str, rows: list[tuple[str, int, FLOAT32]]) -> None:
    """One Parquet file."""
    Path(out).mkdir(parents=True, exist_ok=True)
    flat = pa.array(np.concatenate([row[2] for row in rows]))
    table = {
        "path": [row[0] for row in rows],
        "clip_index": pa.array([row[1] for row in rows], pa.int32()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, len(rows[0][2])),
    }
    pq.write_table(pa.table(table), f"{out}/{name}.parquet")


def plain(src: str, out: str, weights_path: str, clips: str) -> None:
    """A loop over videos: decord, then P3D's Encoder in batches within a video; one file per video."""
    source, model = Clips(weights_path, clips), encoder(weights_path, usable_cpus(), WITHIN)
    for path in _paths(src):
        found = list(source.of(path))
        batches = [found[at : at + WITHIN] for at in range(0, len(found), WITHIN)]
        done = np.concatenate([features(model, np.stack([clip for _, clip in batch])) for batch in batches])
        write(out, Path(path).stem, [(path, index, row) for (index, _), row in zip(found, done, strict=True)])


def today(src: str, out: str, weights_path: str, clips: str) -> None:
    """What users have today: the module as it was trained, one clip at a time, one file per video."""
    source, loaded = Clips(weights_path, clips), load(weights_path)
    torch.set_num_threads(usable_cpus())
    network = loaded.network.eval()
    for path in _paths(src):
        rows = []
        for index, clip_THWC in source.of(path):
            with torch.no_grad():
                row = network.features(normalise(torch.from_numpy(clip_THWC)[None], loaded.recipe))[0]
            rows.append((path, index, row.numpy()))
        write(out, Path(path).stem, rows)


class _Dataset(torch.utils.data.IterableDataset[Any]):
    """Clips of the videos of this DataLoader worker."""

    def __init__(self, paths: list[str], source: Clips) -> None:
        self.paths, self.source = paths, source

    def __iter__(self) -> Iterator[tuple[str, int, UINT8]]:
        info = torch.utils.data.get_worker_info()
        for path in self.paths if info is None else self.paths[info.id :: info.num_workers]:
            for index, clip in self.source.of(path):
                yield path, index, clip


def dataloader(src: str, out: str, weights_path: str, clips: str) -> None:
    """torch's DataLoader over an IterableDataset, one worker per core; batches mix videos."""
    loader = torch.utils.data.DataLoader(
        _Dataset(_paths(src), Clips(weights_path, clips)), batch_size=BATCH, num_workers=usable_cpus()
    )
    model, rows = encoder(weights_path, usable_cpus()), []
    for names, indices, clips_BTHWC in loader:
        done = features(model, clips_BTHWC.numpy())
        rows += list(zip(names, indices.tolist(), done, strict=True))
    write(out, "all", rows)


def ray_data(src: str, out: str, weights_path: str, clips: str) -> None:
    """Ray Data: flat_map to clips, map_batches on a pool of actors, write_parquet. All cores for both stages."""
    import ray

    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    ray.init(address="local", num_cpus=usable_cpus(), include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    class Embed:
        def __init__(self) -> None:
            self.model = encoder(weights_path, 1)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            done = features(self.model, np.stack(list(batch["clip"])))
            return {"path": batch["path"], "clip_index": batch["clip_index"], "embedding": list(done)}

    def cut(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for index, clip in Clips(weights_path, clips).of(row["item"]):
            yield {"path": row["item"], "clip_index": index, "clip": clip}

    (
        ray.data.from_items(_paths(src), override_num_blocks=min(len(_paths(src)), 32))
        .flat_map(cut, num_cpus=0.5)
        .map_batches(Embed, batch_size=BATCH, num_cpus=0.5, compute=ray.data.ActorPoolStrategy(size=usable_cpus()))
        .write_parquet(out)
    )


def daft(src: str, out: str, weights_path: str, clips: str) -> None:
    """Daft: a generator function to clips, a class with a batched method, write_parquet."""
    import daft as df

    source = Clips(weights_path, clips)
    recipe = recipe_of(weights_path)
    shape = (recipe.n_frames, *recipe.crop_hw, 3)
    kind = df.DataType.struct(
        {"clip_index": df.DataType.int32(), "clip": df.DataType.tensor(df.DataType.uint8(), shape)}
    )

    @df.func(return_dtype=kind)
    def cut(path: str) -> Iterator[dict[str, Any]]:
        for index, clip in source.of(path):
            yield {"clip_index": index, "clip": clip}

    @df.cls(max_concurrency=usable_cpus(), use_process=True)
    class Embed:
        def __init__(self) -> None:
            self.model = encoder(weights_path, 1, WITHIN)

        @df.method.batch(return_dtype=df.DataType.embedding(df.DataType.float32(), 2048), batch_size=WITHIN)
        def __call__(self, clip: Any) -> Any:
            return list(features(self.model, np.stack(clip.to_pylist())))

    embed = Embed()
    rows = df.from_pydict({"path": _paths(src)}).into_batches(1)
    rows = rows.select(df.col("path"), cut(df.col("path")).alias("row"))
    rows = rows.select(
        "path", df.col("row").get("clip_index").alias("clip_index"), df.col("row").get("clip").alias("clip")
    )
    rows.select("path", "clip_index", embed(df.col("clip")).alias("embedding")).write_parquet(out)


ARMS = {"plain loop": plain, "loop of today": today, "DataLoader": dataloader, "Ray Data": ray_data, "Daft": daft}


def _paths(src: str) -> list[str]:
    return sorted(str(path) for path in Path(src).iterdir())


if __name__ == "__main__":
    arm, *given = sys.argv[1:]
    ARMS[arm](*given)
    os._exit(0)  # skip the cleanup of libraries, which is not part of the job
