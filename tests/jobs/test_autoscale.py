"""The decode concurrency of a worker follows from its load, and the limiting part is named correctly."""

from __future__ import annotations

from itertools import pairwise

import pytest

from p3d.jobs.worker.autoscale import ENOUGH, REMEMBERED, DecodeAutoscaler, Load
from p3d.jobs.worker.concurrency import Use


def busy(n: int) -> Use:
    """`n` decodes that are all active."""
    return Use(n, begun=n, at_work=n)


def live(
    clips_per_s_per_decode: float, network_clips_per_s: float, *, concurrency: int, most: int, seconds: int = 200
) -> DecodeAutoscaler:
    """A worker whose decodes yield so many clips per second each, of which the network processes so many."""
    balance, queued, n = DecodeAutoscaler(concurrency, 1), 0.0, concurrency
    for _ in range(seconds):
        decoding = (
            n if queued < 10 else round(network_clips_per_s / clips_per_s_per_decode)
        )  # the rest wait for their reader
        queued += min(decoding, n) * clips_per_s_per_decode
        taken = min(queued, network_clips_per_s)
        queued -= taken
        n = balance.sample(taken / network_clips_per_s, Use(n, begun=n, at_work=min(decoding, n)), most)
    return balance


@pytest.mark.parametrize(("concurrency", "most", "expected"), [(2, 16, 10), (2, 6, 6), (16, 16, 10)])
def test_the_concurrency_comes_to_what_the_network_takes(concurrency: int, most: int, expected: int) -> None:
    """If ten decodes saturate the network, both two and sixteen become about ten, but never more than the maximum."""
    balance = live(10.0, 100.0, concurrency=concurrency, most=most)
    assert abs(balance.concurrency - expected) <= 2 and balance.concurrency <= most


def test_what_limits_is_named() -> None:
    """`network` if the network is slow and decodes are queued, `decoding` if all decodes cannot saturate it, else
    `fetching` or `overhead`."""
    assert live(10.0, 5.0, concurrency=1, most=1).load.limit == "network"
    assert live(1.0, 100.0, concurrency=4, most=4).load.limit == "decoding"
    assert live(10.0, 5.0, concurrency=1, most=1).load.queued == 0.5  # its decode waits half of the time
    assert live(1.0, 100.0, concurrency=4, most=4).load.queued == 0
    assert Load(0.2, 0.1, 0.85, 4).limit == "fetching"
    assert Load(0.2, 0.3, 0.1, 4).limit == "overhead"


def test_decodes_that_wait_for_a_core_bring_no_more() -> None:
    """While some decodes wait for a core, a worker does not raise their number, and decoding is its limit."""
    balance = DecodeAutoscaler(4, 1)
    assert {balance.sample(0.1, Use(4, begun=2, at_work=2), 32) for _ in range(100)} == {4}
    assert (balance.load.limit, balance.load.decoding, balance.load.starting) == ("decoding", 0.5, 0.5)


def test_a_number_that_starved_the_network_is_not_tried_again_at_once() -> None:
    """A concurrency that just saturates the network is kept once one fewer was too few, for some minutes."""
    balance, seen = DecodeAutoscaler(4, 1), []
    for _ in range(2 * REMEMBERED):  # four saturate it, and three do not
        fed = balance.concurrency >= 4
        seen.append(balance.sample(1.0 if fed else 0.8, busy(balance.concurrency), 4))
    falls = [at for at, (before, now) in enumerate(pairwise(seen)) if now < before]
    assert len(falls) == 2 and falls[1] - falls[0] >= REMEMBERED


def test_one_sample_changes_nothing() -> None:
    """The number changes with an average of several samples, and not again before as many more."""
    balance = DecodeAutoscaler(4, 1)
    seen = [balance.sample(0.1, busy(balance.concurrency), 32) for _ in range(2 * ENOUGH)]
    assert seen == [4] * (ENOUGH - 1) + [5] * ENOUGH + [6]
