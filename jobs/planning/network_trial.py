"""Embed the frames of a few videos to measure the network of one worker, for `p3d plan`.

    trial ──frames of a clip of each──> Encoder, as many inference threads as a job has ──> clips/s, rows
                                        on a GPU also in batches of several sizes

On a CPU the Encoder arranges its weights for the first batch size, so one Encoder cannot compare sizes. Only the
default is timed there; docs/performance.md has rates of other sizes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from statistics import median

import numpy as np

from p3d.encoder import Encoder, device_for
from p3d.jobs.machine import inference_threads_of
from p3d.jobs.planning.decode_trial import Tried
from p3d.jobs.planning.prepare import Prepared, default_batch
from p3d.pipeline.types import FLOAT32, INT64, UINT8

TIMED_S = 5.0  # after one warm-up batch per inference thread; at least two more batches per thread are timed
GPU_BATCHES = (8, 16, 32, 64, 128)  # clips
ROUNDS = 3  # over all sizes in turn, after one to warm up
WORTH = 1.05  # a batch size this many times as fast as the default is suggested


@dataclass(frozen=True, slots=True, eq=False)
class EmbedTrial:
    """The embeddings of one clip per video by one worker's network, and its speed.

    `clips_per_s` is the rate with the default batches of `batch_size` clips. `by_batch` has the rates of other sizes, 0
    for those that do not fit; it is empty on a CPU. `features_ND` and `probs_NK` are float32, with N videos; K is 0 if
    the recipe stores no scores.
    """

    device: str
    batch_size: int
    clips_per_s: float
    by_batch: dict[int, float]
    features_ND: FLOAT32
    probs_NK: FLOAT32

    @property
    def faster(self) -> str | None:
        """A suggestion of a faster batch size, or None."""
        own = self.by_batch.get(self.batch_size) or self.clips_per_s
        size = max(self.by_batch, key=self.by_batch.__getitem__, default=self.batch_size)
        gain = self.by_batch.get(size, 0.0) / own
        if gain < WORTH:
            return None
        return f"--batch-size {size} is {gain:.2f} times as fast here as the default of {self.batch_size}"


def embed_trial(prepared: Prepared, tried: list[Tried], cpus: int) -> EmbedTrial:
    """Embed the decoded clips on the device of a job, with the inference threads of a worker with `cpus` cores."""
    device, recipe = str(device_for("auto")), prepared.recipe
    size, threads = default_batch(device), max(1, cpus // 2)
    inference_threads = inference_threads_of(device, cpus, threads)
    encoder = Encoder(
        prepared.weights,
        device=device,
        batch_size=size,
        threads=threads if device == "cpu" else None,
        precision=recipe.precision,
    )
    black_NHWC = np.zeros((1, *recipe.crop_hw, 3), np.uint8)
    clips = [one.frames_NHWC for one in tried if len(one.frames_NHWC)] or [black_NHWC]

    def batch(number: int, size: int) -> tuple[FLOAT32, FLOAT32]:
        return encoder.encode(*_batch(clips, recipe.clip_frames, number * size, size), probs=True)

    with ThreadPoolExecutor(inference_threads) as pool:

        def turn(first: int, size: int) -> list[tuple[FLOAT32, FLOAT32]]:
            return list(pool.map(batch, range(first, first + inference_threads), repeat(size)))

        done = [batch(0, size)]  # alone, because it may rearrange the weights in memory
        done += pool.map(batch, range(1, inference_threads), repeat(size))
        started, warm = time.monotonic(), len(done)
        while len(done) < 3 * inference_threads or (
            time.monotonic() - started < TIMED_S and len(done) * size < len(clips)
        ):
            done += turn(len(done), size)
        rate = (len(done) - warm) * size / (time.monotonic() - started)
        by_batch = (
            {}
            if device == "cpu"
            else rates_by_batch(encoder, GPU_BATCHES, lambda size: turn(0, size), inference_threads)
        )
    features_ND, probs_NK = (np.concatenate(rows)[: len(tried)] for rows in zip(*done, strict=True))
    return EmbedTrial(device, size, rate, by_batch, features_ND, probs_NK if recipe.scores else probs_NK[:, :0])


def _batch(clips: list[UINT8], n_frames: int, first: int, size: int) -> tuple[UINT8, INT64]:
    """Frames and clip indices of `size` clips from number `first` on, cyclically."""
    chosen = [clips[(first + at) % len(clips)] for at in range(size)]
    starts = np.cumsum([0, *map(len, chosen[:-1])])
    within_T = np.arange(n_frames)
    index_BT = np.stack([start + np.minimum(within_T, len(c) - 1) for start, c in zip(starts, chosen, strict=True)])
    return np.concatenate(chosen), index_BT


def rates_by_batch(
    encoder: Encoder, sizes: tuple[int, ...], turn: Callable[[int], object], inference_threads: int
) -> dict[int, float]:
    """Clips/s of each of the ascending `sizes`: the median of interleaved rounds, 0 for sizes that do not fit.

    `turn(size)` encodes a batch of `size` in each of the `inference_threads` at once.
    """
    taken: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(ROUNDS + 1):
        for size, seconds in taken.items():
            encoder.batch_size = size
            started = time.monotonic()
            turn(size)
            if encoder.batch_size < size:  # it ran out of memory and made its batches smaller
                taken = {fits: taken[fits] for fits in taken if fits < size}
                break
            if number:
                seconds.append(time.monotonic() - started)
    return {size: inference_threads * size / median(taken[size]) if size in taken else 0.0 for size in sizes}
