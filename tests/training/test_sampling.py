"""Which clip is where: each epoch has each video once, and processes share the positions of one process."""

from __future__ import annotations

import numpy as np
import pytest

from p3d.jobs.training.sampling import Share, changed, clip_seed, drawn, order


def test_each_epoch_has_each_video_once_in_its_own_order() -> None:
    """Positions of an epoch name all videos; two epochs, and two seeds, have other orders."""
    epochs = [[drawn(7, epoch * 10 + at, 10) for at in range(10)] for epoch in range(2)]
    for number, epoch in enumerate(epochs):
        assert {number} == {found for found, _ in epoch} and sorted(at for _, at in epoch) == list(range(10))
    assert [at for _, at in epochs[0]] != [at for _, at in epochs[1]]
    assert order(7, 0, 10).tolist() != order(8, 0, 10).tolist()
    assert clip_seed(7, 0) != clip_seed(7, 1) and len(str(clip_seed(7, 0))) <= 18


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_positions_of_each_step(world: int) -> None:
    """All processes together have each position once, and in each step those of one process with the whole batch."""
    shares = [Share(rank, world, 4, 24, 24 + 5 * 4 * world) for rank in range(world)]
    steps = [[[share.position(step * 4 + at) for at in range(4)] for share in shares] for step in range(5)]
    assert [one for step in steps for part in step for one in part] == list(range(24, 24 + 5 * 4 * world))
    assert [len(share) for share in shares] == [20] * world
    children = [list(shares[0].every(first, 3)) for first in range(3)]
    assert sorted(one for child in children for one in child) == [shares[0].position(k) for k in range(20)]


def test_the_last_videos_of_a_test_are_shared_too() -> None:
    """Seven videos in two processes: each video once, although the last group is not full."""
    shares = [Share(rank, 2, 1, 0, 7) for rank in range(2)]
    assert sorted(share.position(k) for share in shares for k in range(len(share))) == list(range(7))


def test_a_change_is_a_crop_and_perhaps_a_mirror_image() -> None:
    """Every change is a crop of the clip; all offsets and both directions occur, and it is repeatable."""
    clip = np.arange(2 * 5 * 6 * 3, dtype=np.uint8).reshape(2, 5, 6, 3)
    parts = {
        clip[:, top : top + 4, left : left + 4][:, :, ::step].tobytes(): (top, left, step)
        for top in range(2)
        for left in range(3)
        for step in (1, -1)
    }
    seen = {parts[changed(clip, (4, 4), True, 3, position).tobytes()] for position in range(200)}
    assert seen == set(parts.values())
    plain = {parts[changed(clip, (4, 4), False, 3, position).tobytes()][2] for position in range(50)}
    assert plain == {1}
    assert changed(clip, (4, 4), True, 3, 5).tobytes() == changed(clip, (4, 4), True, 3, 5).tobytes()
