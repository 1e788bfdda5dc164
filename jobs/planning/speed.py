"""Measure the clips per second of networks on this machine: the encoder alone, without decoding.

Networks are timed in interleaved rounds, so that a machine that slows down or is shared slows all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np

import p3d.weights
from p3d.device import device_for
from p3d.encoder import Encoder, golden_clip
from p3d.jobs.planning.prepare import default_batch

ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Speed:
    """Clips per second of one network: median, lowest and highest of `ROUNDS`."""

    clips_per_s: float
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True)
class Speeds:
    """The speed of each network and the device: one clip at a time on a CPU, the default batch on a GPU."""

    device: str
    threads: int
    batch_size: int
    of: dict[str, Speed]


def measure(names: tuple[str, ...], device: str = "auto", tell: Callable[[str], None] = lambda _: None) -> Speeds:
    """Time one batch of each network in every round, with random weights: their values do not affect the speed.

    Each network is built when its turn comes, so memory holds only one. Raises ValueError for an unknown name or a
    device that is not available.
    """
    import torch

    kind = device_for(device).type
    size = 1 if kind == "cpu" else default_batch(kind)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(ROUNDS):
        for name in names:
            tell(f"round {number + 1} of {ROUNDS}: {name}")
            rates[name].append(_rate(name, device, size, warm=kind != "cpu" or number == 0))
    found = {name: Speed(median(each), min(each), max(each)) for name, each in rates.items()}
    return Speeds(str(device_for(device)), torch.get_num_threads(), size, found)


def _rate(name: str, device: str, size: int, *, warm: bool) -> float:
    """Clips per second of one batch."""
    weights = p3d.weights.resolve("random:0", name=name)  # the values do not affect the time
    encoder = Encoder(weights, device=device, batch_size=size)
    frames_NHWC, index_BT = golden_clip(weights.recipe)
    index_BT = np.repeat(index_BT, size, axis=0)
    if warm:
        encoder.encode(frames_NHWC, index_BT)
    started = time.monotonic()
    encoder.encode(frames_NHWC, index_BT)
    return size / (time.monotonic() - started)
