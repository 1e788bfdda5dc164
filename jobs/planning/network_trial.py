"""Embed the frames of a few videos to measure the network of one worker, for `p3d plan`.

    trial ──frames of a clip of each──> Encoder, as many inference threads as a job has ──> clips/s, rows
                                        on a GPU also in batches of several sizes
                                   └──> the same in lower precisions, in turn, if fp32 was asked for ──> Gains

On a CPU the Encoder arranges its weights for the first batch size, so one Encoder cannot compare sizes. Only the
default is timed there; docs/explanation/performance.md has rates of other sizes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from statistics import median

import numpy as np
import numpy.typing as npt
import torch

from p3d.device import computes_in, device_for
from p3d.encoder import Encoder
from p3d.jobs.machine import inference_threads_of
from p3d.jobs.planning.decode_trial import Tried
from p3d.jobs.planning.prepare import Prepared, default_batch
from p3d.networks.network import Network
from p3d.pipeline.types import FLOAT32, INT64, UINT8

TIMED_S = 5.0  # in all, unless there are fewer clips, or LEAST_ROUNDS take longer
GPU_BATCHES = (8, 16, 32, 64, 128)  # clips
ROUNDS = 3  # over all sizes in turn, after one to warm up
OTHERS = {"cpu": ("bf16",), "cuda": ("fp16", "bf16", "tf32")}  # precisions to compare with fp32, by kind of device
LEAST_ROUNDS = {"cpu": 2, "cuda": 3}  # that are timed, after one to warm up
OTHER_ROUNDS, OTHER_S = 3, 2.0  # after so many rounds, or seconds in a precision, no further round also runs in it
WORTH = 1.05  # what is this many times as fast as the default is suggested


@dataclass(frozen=True, slots=True)
class Gain:
    """What a precision gains and costs here, compared with fp32.

    `times` is the speed of the network as a multiple of that in fp32, the median of interleaved rounds. `cosine` is the
    median of the cosines between the features of a clip in this precision and in fp32, and `lowest` the lowest, over
    `n_clips` clips of different videos; a feature vector of zeros counts as 0.
    """

    precision: str
    times: float
    cosine: float
    lowest: float
    n_clips: int


@dataclass(frozen=True, slots=True, eq=False)
class EmbedTrial:
    """The embeddings of one clip per video by one worker's network, and its speed.

    `clips_per_s` is the rate with the default batches of `batch_size` clips. `by_batch` has the rates of other sizes, 0
    for those that do not fit; it is empty on a CPU. `features_ND` and `probs_NK` are float32, with N videos; K is 0 if
    the recipe stores no scores. `gains` are those of the precisions that the network and the device also support, if
    the recipe is in fp32 and a video could be decoded. `not_compared` has what lacks each of the others that could be
    expected here.
    """

    device: str
    batch_size: int
    clips_per_s: float
    by_batch: dict[int, float]
    features_ND: FLOAT32
    probs_NK: FLOAT32
    gains: tuple[Gain, ...] = ()
    not_compared: dict[str, str] = field(default_factory=dict)

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

    def encoder_in(precision: str) -> Encoder:
        return Encoder(
            prepared.weights,
            device=device,
            batch_size=size,
            threads=threads if device == "cpu" else None,
            precision=precision,
        )

    on, known = device_for(device), prepared.weights.network.precisions
    encoder = encoder_in(recipe.precision)
    compared = OTHERS.get(on.type, ()) if tried and recipe.precision == "fp32" else ()
    others = {name: _Other(encoder_in(name)) for name in compared if name in known and computes_in(name, on)}
    black_NHWC = np.zeros((1, *recipe.crop_hw, 3), np.uint8)
    clips = [one.frames_NHWC for one in tried if len(one.frames_NHWC)] or [black_NHWC]

    def batch(of: Encoder, number: int, size: int) -> tuple[FLOAT32, FLOAT32]:
        return of.encode(*_batch(clips, recipe.clip_frames, number * size, size), probs=True)

    with ThreadPoolExecutor(inference_threads) as pool:

        def turn(of: Encoder, first: int, size: int) -> list[tuple[FLOAT32, FLOAT32]]:
            return list(pool.map(batch, repeat(of), range(first, first + inference_threads), repeat(size)))

        def in_all(of: Encoder, first: int, size: int) -> list[tuple[FLOAT32, FLOAT32]]:
            """A turn in which no thread takes two batches."""
            together = threading.Barrier(inference_threads)

            def one(number: int) -> tuple[FLOAT32, FLOAT32]:
                together.wait()
                return batch(of, number, size)

            return list(pool.map(one, range(first, first + inference_threads)))

        batch(encoder, 0, size)  # alone, because it may rearrange the weights in memory
        done = in_all(encoder, 0, size)  # each thread chooses cuDNN's algorithms for itself
        for other in others.values():
            in_all(other.encoder, 0, size)
        warm, spent = len(done), list[float]()  # seconds of each round
        while len(done) < (1 + LEAST_ROUNDS.get(on.type, 2)) * inference_threads or (
            sum(spent) < TIMED_S and len(done) * size < len(clips)
        ):
            first, started = len(done), time.monotonic()
            done += turn(encoder, first, size)
            spent.append(time.monotonic() - started)
            for other in others.values():
                if len(spent) <= OTHER_ROUNDS and sum(other.spent) < OTHER_S:
                    started = time.monotonic()
                    other.done += turn(other.encoder, first, size)
                    other.spent.append(time.monotonic() - started)
        rate = len(spent) * inference_threads * size / sum(spent)
        by_batch = (
            {}
            if device == "cpu"
            else rates_by_batch(encoder, GPU_BATCHES, lambda size: turn(encoder, 0, size), inference_threads)
        )
    features_ND, probs_NK = (np.concatenate(rows)[: len(tried)] for rows in zip(*done, strict=True))
    gains = tuple(other.gain(name, done[warm:], spent, len(clips)) for name, other in others.items())
    probs_NK = probs_NK if recipe.scores else probs_NK[:, :0]
    left_out = not_compared(prepared.weights.network, on) if compared else {}
    return EmbedTrial(device, size, rate, by_batch, features_ND, probs_NK, gains, left_out)


def not_compared(network: Network, device: torch.device) -> dict[str, str]:
    """The precisions that are compared with fp32 on this kind of device, but not here: name -> what lacks them.

    A CPU without instructions for bf16 is not expected to have it, so that is not named.
    """
    found: dict[str, str] = {}
    for name in OTHERS.get(device.type, ()):
        if not computes_in(name, device):
            found |= {name: "this GPU"} if device.type == "cuda" else {}
        elif name not in network.precisions:
            found[name] = network.config.name
    return found


@dataclass(slots=True)
class _Other:
    """The rounds of another precision: its batches, and the seconds of each round."""

    encoder: Encoder
    done: list[tuple[FLOAT32, FLOAT32]] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)

    def gain(self, name: str, done: list[tuple[FLOAT32, FLOAT32]], spent: list[float], n_clips: int) -> Gain:
        """Compared with the same batches `done` in fp32, of `n_clips` different clips, and the seconds `spent`."""
        pairs = zip(done, self.done, strict=False)
        cosines_N = np.concatenate([_cosines(ours[0], theirs[0]) for ours, theirs in pairs])[:n_clips]
        times = median(full / other for full, other in zip(spent, self.spent, strict=False))
        return Gain(name, times, float(np.median(cosines_N)), float(cosines_N.min()), len(cosines_N))


def _cosines(one_ND: FLOAT32, other_ND: FLOAT32) -> npt.NDArray[np.float64]:
    """The cosine of each pair of rows; 0 if one of them is all zeros or not finite."""
    one_ND, other_ND = one_ND.astype(np.float64), other_ND.astype(np.float64)
    lengths_N = np.linalg.norm(one_ND, axis=1) * np.linalg.norm(other_ND, axis=1)
    found_N: npt.NDArray[np.float64] = (one_ND * other_ND).sum(axis=1) / np.where(lengths_N > 0, lengths_N, 1.0)
    return np.where(np.isfinite(found_N), found_N, 0.0)


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
