"""The concurrent decodes of one worker, which its current shards share: the older shard has priority.

A younger shard starts a decode when fewer than the maximum run and no older shard has a video to start. So the last
videos of one shard and the first of the next are decoded together, and the next need not wait for a commit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class Withdrawn(Exception):
    """The worker must start nothing more, and this shard has not started."""


@dataclass(frozen=True, slots=True)
class Use:
    """The current decodes of a shard.

    Of its `running` decodes, `begun` have a process that decodes. Of these, `at_work` do not wait for their reader.
    Others are `fetching` a copy, or are `halted` after it. `size_bytes` is the total size of their videos. `wants` is
    true if the shard has more videos to start, and `alone` if one is being retried alone.
    """

    running: int = 0
    begun: int = 0
    at_work: int = 0
    fetching: int = 0
    halted: int = 0
    size_bytes: int = 0
    wants: bool = True
    alone: bool = False

    @property
    def starting(self) -> int:
        """Decodes that have no process yet: they wait for a core, or for Ray."""
        return self.running - self.begun - self.fetching - self.halted

    @property
    def queued(self) -> int:
        """Decodes whose frames wait for their reader."""
        return self.begun - self.at_work


class DecodeConcurrency:
    """At most `n` concurrent decodes, and the shards that share them, oldest first.

    Each shard has its own thread, so all state is read and changed under `lock`.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.lock = threading.Condition()
        self.draining = False
        self.turns: list[ShardTurn] = []

    @contextmanager
    def turn(self) -> Iterator[ShardTurn]:
        """The turn of one shard, for as long as it is decoded."""
        turn = ShardTurn(self)
        with self.lock:
            self.turns.append(turn)
        try:
            yield turn
        finally:
            with self.lock:
                self.turns.remove(turn)
                self.lock.notify_all()

    def resize(self, n: int) -> None:
        """Set the maximum to `n`. Running decodes continue."""
        with self.lock:
            self.n = n
            self.lock.notify_all()

    @property
    def use(self) -> Use:
        """The sum over all shards."""
        with self.lock:
            return _sum([turn.use for turn in self.turns])

    def drain(self) -> None:
        """Let no further shard start."""
        with self.lock:
            self.draining = True
            self.lock.notify_all()


class ShardTurn:
    """One shard's part in the concurrent decodes."""

    def __init__(self, concurrency: DecodeConcurrency) -> None:
        self.concurrency, self.use = concurrency, Use()

    def await_turn(self) -> None:
        """Wait until this shard may start a decode. Raises Withdrawn if it must not start at all."""
        concurrency = self.concurrency
        with concurrency.lock:
            concurrency.lock.wait_for(
                lambda: concurrency.draining or (self.may_start and self.others.running < concurrency.n)
            )
            if concurrency.draining:
                raise Withdrawn

    def tell(self, use: Use) -> None:
        """Replace what this shard uses, and wake the others."""
        with self.concurrency.lock:
            self.use = use
            self.concurrency.lock.notify_all()

    @property
    def others(self) -> Use:
        """The sum over all other shards. Its flags are true if they are for any of them."""
        return _sum([turn.use for turn in self.concurrency.turns if turn is not self])

    @property
    def may_start(self) -> bool:
        """True if no older shard has a video to start, or one that is retried alone."""
        return not any(turn.use.wants or turn.use.alone for turn in self._older())

    @property
    def may_go_on(self) -> bool:
        """True if no older shard has a halted decode, whose copy is ready."""
        return not any(turn.use.halted for turn in self._older())

    def _older(self) -> list[ShardTurn]:
        turns = self.concurrency.turns
        return turns[: turns.index(self)] if self in turns else []


def _sum(uses: list[Use]) -> Use:
    return Use(
        running=sum(use.running for use in uses),
        begun=sum(use.begun for use in uses),
        at_work=sum(use.at_work for use in uses),
        fetching=sum(use.fetching for use in uses),
        halted=sum(use.halted for use in uses),
        size_bytes=sum(use.size_bytes for use in uses),
        wants=any(use.wants for use in uses),
        alone=any(use.alone for use in uses),
    )
