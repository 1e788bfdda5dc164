"""What limits a worker, and how many decodes at once would limit it less: pure, from samples of what is at work.

A worker whose lanes stand still while all its slots decode takes more slots, but not while some of them wait for a
processor; one whose lanes are always at work gives
slots back, for a decode that waits for its reader keeps a processor from another worker. A number of slots that was too
few is not tried again for some minutes: a worker that gave back one too many starves until it has it again. The samples
are one a second, when the driver asks for the counters.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal, get_args

from p3d.jobs.worker.concurrency import Use

Limit = Literal["network", "decoding", "fetching", "overhead"]
LIMITS: tuple[Limit, ...] = get_args(Limit)
AT_WORK = 0.9  # the share of its time at which something limits a worker
SAMPLES = 10  # that an average is over
ENOUGH = 5  # of them that it takes to change the number of slots
REMEMBERED = 300  # samples, for which a number of slots counts as too few


@dataclass(frozen=True, slots=True)
class Load:
    """Shares of the time, 0 to 1: the lanes at work, the slots that decode and do not wait for their reader, those that
    fetch a copy, those that have no process yet. `queued` is a number: decodes whose frames wait for the network, on
    average."""

    inference_threads: float = 0.0
    decoding: float = 0.0
    fetching: float = 0.0
    concurrency: int = 0
    starting: float = 0.0
    queued: float = 0.0

    @property
    def limit(self) -> Limit:
        """`network`, `decoding` or `fetching`; `overhead` where none of them is always at work: then the worker waits
        for the store or for a shard. A decode that waits for a processor is limited by decoding."""
        if self.inference_threads >= AT_WORK:
            return "network"
        if self.decoding + self.starting >= AT_WORK:
            return "decoding"
        return "fetching" if self.decoding + self.starting + self.fetching >= AT_WORK else "overhead"


class Balance:
    """The last samples, and the number of slots that follows from them; `least` is what it never goes below."""

    def __init__(self, concurrency: int, least: int) -> None:
        self.concurrency, self.least = concurrency, least
        self.samples: deque[Load] = deque(maxlen=SAMPLES)
        self.too_few, self.forget_in = 0, 0  # slots with which the network stood still, and samples until it is tried

    @property
    def load(self) -> Load:
        """The average of the samples since the number of slots last changed."""
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
        """One more look: the share of lanes at work, and what the slots are used for. -> how many to have."""
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
