"""Which clip is at which position of a training, and how it is changed: pure functions of the seed.

Position p of a training counts clips from 0, over all steps and processes. With V training videos, it is in epoch
p // V, which has each video once, in an order of its own. Step s of a training with batches of B clips has the
positions [s B, (s + 1) B). So a training that is resumed at a step continues with the same clips.

A clip starts at a random frame. It is cropped at a random position, and half of the clips are mirrored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from p3d.pipeline.types import INT64, UINT8

ORDER, CHANGE = 0, 1  # what a stream of random numbers is for
MOST_SEED = 10**18  # of `random:N@SEED`, which has at most 18 digits


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, n_videos: int) -> INT64:
    """The numbers of the training videos in the order of an epoch, int64 [V]."""
    found: INT64 = np.random.default_rng([ORDER, seed, epoch]).permutation(n_videos).astype(np.int64)
    return found


def drawn(seed: int, position: int, n_videos: int) -> tuple[int, int]:
    """(epoch, number of the video) of a position."""
    epoch, at = divmod(position, n_videos)
    return epoch, int(order(seed, epoch, n_videos)[at])


def clip_seed(seed: int, epoch: int) -> int:
    """The seed of the clip rule `random:1@SEED` in an epoch, of at most 18 digits."""
    text = hashlib.sha256(f"{seed}\n{epoch}".encode()).hexdigest()
    return int(text, 16) % MOST_SEED


def changed(clip_THWC: UINT8, crop_hw: tuple[int, int], flip: bool, seed: int, position: int) -> UINT8:
    """A random crop of a clip [T, H, W, C], mirrored with probability 1/2 if `flip`; [T, crop_h, crop_w, C]."""
    random = np.random.default_rng([CHANGE, seed, position])
    height, width = clip_THWC.shape[1:3]
    top = int(random.integers(height - crop_hw[0] + 1))
    left = int(random.integers(width - crop_hw[1] + 1))
    mirrored = bool(random.integers(2)) and flip
    clip_THWC = clip_THWC[:, top : top + crop_hw[0], left : left + crop_hw[1]]
    return np.ascontiguousarray(clip_THWC[:, :, ::-1] if mirrored else clip_THWC)


@dataclass(frozen=True, slots=True)
class Share:
    """The positions of one process: of each group of `world` times `batch` positions, the part with number `rank`.

    It starts at position `first` of the whole training, which begins a group, and ends before `end`.
    """

    rank: int
    world: int
    batch: int
    first: int
    end: int

    def position(self, k: int) -> int:
        """The k-th position of this process."""
        group, at = divmod(k, self.batch)
        return self.first + (group * self.world + self.rank) * self.batch + at

    def __len__(self) -> int:
        groups, rest = divmod(self.end - self.first, self.world * self.batch)
        return groups * self.batch + min(max(rest - self.rank * self.batch, 0), self.batch)

    def every(self, first: int, step: int) -> Iterator[int]:
        """The positions k = `first`, `first` + `step`, ... of this process."""
        return (self.position(k) for k in range(first, len(self), step))
