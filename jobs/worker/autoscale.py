"""What limits a worker, and the decode concurrency that would limit it less. Pure: computed from samples of its load.

If inference threads are idle while all decodes are active, the worker raises its decode concurrency, but not while some
decodes wait for a core. If the inference threads are always busy, it lowers it, because a decode that waits for its
reader keeps a core from another worker. A concurrency that was too low is not tried again for some minutes, since the
worker would starve until it raised it again. There is one sample per second, when the driver asks for the counters.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal, get_args

from p3d.jobs.worker.concurrency import Use

Limit = Literal["network", "decoding", "fetching", "overhead"]
LIMITS: tuple[Limit, ...] = get_args(Limit)
AT_WORK = 0.9  # a part that is busy for this share of the time limits the worker
SAMPLES = 10  # that are averaged
ENOUGH = 5  # samples that are needed before the decode concurrency changes
REMEMBERED = 300  # samples, for which a decode concurrency counts as too low


@dataclass(frozen=True, slots=True)
class Load:
    """The average load of a worker.

    Shares of the time, 0 to 1: `inference_threads` that are busy, and of the concurrent decodes those that are
    `decoding` (not waiting for their reader), `fetching` a copy, or `starting` (without a process yet).
    `decode_concurrency` is a count, and `queued` the mean number of decodes whose frames wait for inference.
    """

    inference_threads: float = 0.0
    decoding: float = 0.0
    fetching: float = 0.0
    decode_concurrency: int = 0
    starting: float = 0.0
    queued: float = 0.0

    @property
    def limit(self) -> Limit:
        """`network`, `decoding` or `fetching`, or `overhead` if none of them is always busy.

        With `overhead` the worker waits for the store or for a shard. A decode that waits for a core counts as active.
        """
        if self.inference_threads >= AT_WORK:
            return "network"
        if self.decoding + self.starting >= AT_WORK:
            return "decoding"
        return "fetching" if self.decoding + self.starting + self.fetching >= AT_WORK else "overhead"


class DecodeAutoscaler:
    """The last samples, and the decode concurrency that follows from them. It never goes below `least`."""

    def __init__(self, concurrency: int, least: int) -> None:
        self.concurrency, self.least = concurrency, least
        self.samples: deque[Load] = deque(maxlen=SAMPLES)
        self.too_few, self.forget_in = 0, 0  # concurrency that left inference idle, samples until it is forgotten

    @property
    def load(self) -> Load:
        """The average of the samples since the decode concurrency last changed."""
        return Load(
            round(self._mean("inference_threads"), 3),
            round(self._mean("decoding"), 3),
            round(self._mean("fetching"), 3),
            self.concurrency,
            round(self._mean("starting"), 3),
            round(self._mean("queued"), 1),
        )

    def _mean(self, name: str) -> float:
        return float(sum(getattr(sample, name) for sample in self.samples)) / max(len(self.samples), 1)

    def sample(self, inference_threads: float, use: Use, most: int) -> int:
        """Add a sample: the share of busy inference threads, and the decodes in use. Returns the new concurrency."""
        n = max(self.concurrency, 1)
        decoding, fetching, starting = (min(part / n, 1.0) for part in (use.at_work, use.fetching, use.starting))
        self.samples.append(Load(inference_threads, decoding, fetching, self.concurrency, starting, use.queued))
        self.forget_in -= 1
        if self.forget_in <= 0:
            self.too_few = 0
        wanted = self.concurrency
        if len(self.samples) >= ENOUGH:
            if self.load.limit == "decoding" and self.load.decoding >= AT_WORK:
                wanted = self.concurrency + max(1, self.concurrency // 4)
                self.too_few, self.forget_in = self.concurrency, REMEMBERED
            elif self.load.limit == "network" and self.concurrency - 1 > self.too_few:
                wanted = max(self.concurrency - 1, min(self.least, self.concurrency))
        wanted = min(wanted, max(most, 1))
        if wanted != self.concurrency:
            self.concurrency = wanted
            self.samples.clear()
        return self.concurrency
