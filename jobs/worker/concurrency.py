"""The decode slots of one worker, which the shards that it has in hand share: the older goes first.

A younger shard begins a decode where a slot is free that no older one has a video for, so the last videos of a shard
are not the only ones that are decoded, and the first ones of the next do not wait until it is committed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class Withdrawn(Exception):
    """The worker is to begin nothing more, and this shard has not begun."""


@dataclass(frozen=True, slots=True)
class Use:
    """What a shard does with the slots now.

    Of its `running` decodes the process of some has `begun` to decode, and of these those are `at_work` that do not
    wait for their reader; others are `fetching` a copy, others `halted` with it. `size_bytes` are of their videos. It
    `wants` to start more, or a suspect runs, which must be `alone`.
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
        """Decodes that have no process yet: they wait for a processor, or for Ray."""
        return self.running - self.begun - self.fetching - self.halted

    @property
    def queued(self) -> int:
        """Decodes whose frames wait for their reader."""
        return self.begun - self.at_work


class DecodeConcurrency:
    """`n` slots, and the shards that use them, the oldest first. Each is in a thread of its own: look under `lock`."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.lock = threading.Condition()
        self.draining = False
        self.turns: list[ShardTurn] = []

    @contextmanager
    def turn(self) -> Iterator[ShardTurn]:
        """For one shard, for as long as it is decoded."""
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
        """Have so many slots from now on; what runs goes on."""
        with self.lock:
            self.n = n
            self.lock.notify_all()

    @property
    def use(self) -> Use:
        """What all shards use together."""
        with self.lock:
            return _sum([turn.use for turn in self.turns])

    def drain(self) -> None:
        """Let no shard begin any more."""
        with self.lock:
            self.draining = True
            self.lock.notify_all()


class ShardTurn:
    """One shard at the slots."""

    def __init__(self, concurrency: DecodeConcurrency) -> None:
        self.concurrency, self.use = concurrency, Use()

    def await_turn(self) -> None:
        """Wait until there is a slot that no older shard has a video for. Withdrawn if it is not to begin at all."""
        concurrency = self.concurrency
        with concurrency.lock:
            concurrency.lock.wait_for(
                lambda: concurrency.draining or (self.may_start and self.others.running < concurrency.n)
            )
            if concurrency.draining:
                raise Withdrawn

    def tell(self, use: Use) -> None:
        with self.concurrency.lock:
            self.use = use
            self.concurrency.lock.notify_all()

    @property
    def others(self) -> Use:
        """What all other shards use together; it wants more if any of them does."""
        return _sum([turn.use for turn in self.concurrency.turns if turn is not self])

    @property
    def may_start(self) -> bool:
        """Has no older shard a video to start, or one that must be alone?"""
        return not any(turn.use.wants or turn.use.alone for turn in self._older())

    @property
    def may_go_on(self) -> bool:
        """Does no older shard have a copy that waits for a slot?"""
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
