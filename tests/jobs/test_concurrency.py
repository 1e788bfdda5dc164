"""The current shards of a worker share its concurrent decodes: older shards first, and never more than the maximum."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from p3d.jobs.worker.concurrency import DecodeConcurrency, ShardTurn, Use, Withdrawn


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def waits(turn: ShardTurn) -> tuple[threading.Thread, list[str]]:
    """A thread that waits for its turn, and how that ended."""
    how: list[str] = []

    def wait() -> None:
        try:
            turn.await_turn()
            how.append("begun")
        except Withdrawn:
            how.append("withdrawn")

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread, how


def test_a_younger_shard_begins_where_an_older_one_leaves_a_decode(stack: ExitStack) -> None:
    """Not while the older one has a video to start or all decodes are in use, but at once when neither is true."""
    concurrency = DecodeConcurrency(2)
    older, younger = stack.enter_context(concurrency.turn()), stack.enter_context(concurrency.turn())
    older.await_turn()  # the first need not wait
    thread, how = waits(younger)
    for use in (Use(running=2, wants=True), Use(running=1, wants=True), Use(running=2, wants=False)):
        older.tell(use)
        thread.join(0.05)
        assert not how
    older.tell(Use(running=1, wants=False))
    thread.join(5)
    assert how == ["begun"]


def test_a_drain_withdraws_what_has_not_begun(stack: ExitStack) -> None:
    """A shard that waits for its turn then, or comes later, is withdrawn. One that has started is not affected."""
    concurrency = DecodeConcurrency(2)
    older, younger = stack.enter_context(concurrency.turn()), stack.enter_context(concurrency.turn())
    older.await_turn()
    thread, how = waits(younger)
    concurrency.drain()
    thread.join(5)
    assert how == ["withdrawn"]
    with concurrency.turn() as later, pytest.raises(Withdrawn):
        later.await_turn()
    assert older in concurrency.turns and younger in concurrency.turns


def test_a_shard_that_has_ended_lets_the_next_begin(stack: ExitStack) -> None:
    """However it ended, even if it did not report that it uses nothing."""
    concurrency = DecodeConcurrency(1)
    older = concurrency.turn()
    first = older.__enter__()
    younger = stack.enter_context(concurrency.turn())
    first.tell(Use(running=1, wants=True))
    thread, how = waits(younger)
    older.__exit__(None, None, None)
    thread.join(5)
    assert how == ["begun"] and younger.may_start and younger.others == Use(wants=False)


def test_copies_of_older_shards_go_on_first(stack: ExitStack) -> None:
    """While an older shard has a halted decode, none of a younger shard resumes. The older shard need not wait."""
    concurrency = DecodeConcurrency(2)
    older, younger = stack.enter_context(concurrency.turn()), stack.enter_context(concurrency.turn())
    older.tell(Use(running=1, halted=1, wants=False))
    younger.tell(Use(running=1, halted=1))
    assert older.may_go_on and not younger.may_go_on
    older.tell(Use(wants=False))
    assert younger.may_go_on


def test_more_decodes_are_used_at_once(stack: ExitStack) -> None:
    """A shard that waits begins when the decode concurrency is raised."""
    concurrency = DecodeConcurrency(1)
    older, younger = stack.enter_context(concurrency.turn()), stack.enter_context(concurrency.turn())
    older.tell(Use(running=1, wants=False))
    thread, how = waits(younger)
    concurrency.resize(2)
    thread.join(5)
    assert how == ["begun"]
