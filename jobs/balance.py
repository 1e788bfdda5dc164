"""What limits a worker, and how many decodes at once would limit it less: pure, from samples of what is at work.

A worker whose lanes stand still while all its slots decode takes more slots; one whose lanes are always at work gives
slots back, for a decode that waits for its reader keeps a processor from another worker. A number of slots that was too
few is not tried again for some minutes: a worker that gave back one too many starves until it has it again. The samples
are one a second, when the driver asks for the counters.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal, get_args

Limit = Literal["network", "decoding", "fetching", "overhead"]
LIMITS: tuple[Limit, ...] = get_args(Limit)
AT_WORK = 0.9  # the share of its time at which something limits a worker
SAMPLES = 10  # that an average is over
ENOUGH = 5  # of them that it takes to change the number of slots
REMEMBERED = 300  # samples, for which a number of slots counts as too few


@dataclass(frozen=True, slots=True)
class Load:
    """Shares of the time, 0 to 1: the lanes at work, the slots that decode and do not wait for their reader, those that
    fetch a copy."""

    lanes: float = 0.0
    decoding: float = 0.0
    fetching: float = 0.0
    slots: int = 0

    @property
    def limit(self) -> Limit:
        """`network`, `decoding` or `fetching`; `overhead` where none of them is always at work: then the worker waits
        for processes to start, for processors that others have, for the store or for a shard."""
        if self.lanes >= AT_WORK:
            return "network"
        if self.decoding >= AT_WORK:
            return "decoding"
        return "fetching" if self.decoding + self.fetching >= AT_WORK else "overhead"


class Balance:
    """The last samples, and the number of slots that follows from them; `least` is what it never goes below."""

    def __init__(self, slots: int, least: int) -> None:
        self.slots, self.least = slots, least
        self.samples: deque[Load] = deque(maxlen=SAMPLES)
        self.too_few, self.forget_in = 0, 0  # slots with which the network stood still, and samples until it is tried

    @property
    def load(self) -> Load:
        """The average of the samples since the number of slots last changed."""
        n = max(len(self.samples), 1)
        return Load(
            round(sum(sample.lanes for sample in self.samples) / n, 3),
            round(sum(sample.decoding for sample in self.samples) / n, 3),
            round(sum(sample.fetching for sample in self.samples) / n, 3),
            self.slots,
        )

    def sample(self, lanes: float, decoding: int, fetching: int, most: int) -> int:
        """One more look: the share of lanes at work, the slots that decode and fetch. -> how many slots to have."""
        share = 1 / max(self.slots, 1)
        self.samples.append(Load(lanes, min(decoding * share, 1.0), min(fetching * share, 1.0), self.slots))
        self.forget_in -= 1
        if self.forget_in <= 0:
            self.too_few = 0
        wanted = self.slots
        if len(self.samples) >= ENOUGH:
            if self.load.limit == "decoding":
                wanted = self.slots + max(1, self.slots // 4)
                self.too_few, self.forget_in = self.slots, REMEMBERED
            elif self.load.limit == "network" and self.slots - 1 > self.too_few:
                wanted = max(self.slots - 1, min(self.least, self.slots))
        wanted = min(wanted, max(most, 1))
        if wanted != self.slots:
            self.slots = wanted
            self.samples.clear()
        return self.slots
