"""The speed of a network in batches of several sizes, and when a plan suggests one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from p3d.encoder import Encoder, golden_clip
from p3d.jobs.cli.plan import _batches
from p3d.jobs.planning.decode_trial import Tried
from p3d.jobs.planning.network_trial import EmbedTrial, embed_trial, rates_by_batch
from p3d.jobs.planning.prepare import JobSpec, default_batch, prepare
from p3d.pipeline.types import VideoEnd, VideoRef
from p3d.weights import resolve

NONE_D = np.empty((0, 0), np.float32)


def encoder_with_memory_for(clips: int, weights: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Encoder, list[int]]:
    """An encoder on a device with memory for a number of clips at a time, and the batch sizes that it ran."""
    encoder, seen = Encoder(resolve(str(weights)), batch_size=2), []
    true = encoder._network.features

    def features(batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > clips:
            raise torch.OutOfMemoryError(f"{len(batch)} clips do not fit")
        seen.append(len(batch))
        return true(batch)

    monkeypatch.setattr(encoder._network, "features", features)
    return encoder, seen


@pytest.mark.parametrize("fits", [0, 1, 4, 8])
def test_every_size_takes_its_turn_as_far_as_memory_goes(
    fits: int, small_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four rounds over the sizes that fit, without smaller batches; the other sizes have a rate of 0."""
    encoder, seen = encoder_with_memory_for(max(fits, 1), small_weights, monkeypatch)
    frames_NHWC, index_BT = golden_clip(encoder.recipe)
    sizes = (2, 4, 8)

    def turn(size: int) -> None:
        encoder.encode(frames_NHWC, np.repeat(index_BT, size, axis=0))

    found = rates_by_batch(encoder, sizes, turn, inference_threads=1)
    assert list(found) == list(sizes)
    assert [size for size, rate in found.items() if rate > 0] == [size for size in sizes if size <= fits]
    fit = [size for size in sizes if size <= fits]
    assert sum(seen.count(size) for size in fit) >= 4 * len(fit)


@pytest.mark.parametrize(
    ("by_batch", "says"),
    [
        ({}, None),
        ({8: 90.0, 32: 100.0, 64: 104.0}, None),
        ({8: 90.0, 32: 100.0, 64: 120.0, 128: 0.0}, "--batch-size 64 is 1.20 times as fast here as the default of 32"),
        ({8: 50.0, 32: 0.0, 64: 0.0}, None),
        ({8: 66.0, 16: 60.0, 32: 0.0}, "--batch-size 8 is 1.10 times"),
    ],
)
def test_a_faster_size_is_suggested(by_batch: dict[int, float], says: str | None) -> None:
    """A size that is at least 5 % faster than the default, or than its halved rate if it does not fit."""
    found = EmbedTrial("cuda", 32, 60.0, by_batch, NONE_D, NONE_D).faster
    assert found is None if says is None else found is not None and found.startswith(says)


def test_a_cpu_times_the_default_alone(small_weights: Path) -> None:
    """Rows are those of the decoded frames, one row per video."""
    prepared = prepare(JobSpec(None, str(small_weights)))
    frames_NHWC, index_BT = golden_clip(prepared.weights.recipe)
    video = VideoRef("id", "a.mp4", "file:///a.mp4", "", 1)
    tried = [Tried(video, 0.1, None, VideoEnd(16, 1.0, False), kept) for kept in (frames_NHWC, frames_NHWC[:5])]
    found = embed_trial(prepared, tried, cpus=2)
    assert (found.by_batch, found.batch_size, found.probs_NK.shape) == ({}, default_batch("cpu"), (2, 0))
    assert found.clips_per_s > 0
    encoder = Encoder(prepared.weights, batch_size=2)
    padded_BT = np.stack([index_BT[0], np.minimum(index_BT[0], 4)])
    np.testing.assert_allclose(found.features_ND, encoder.encode(frames_NHWC, padded_BT), rtol=1e-4, atol=1e-5)


def test_rates_fit_a_line_of_a_terminal() -> None:
    """The rates of a fast GPU fit 80 columns."""
    rates = {8: 3000.4, 16: 3100.0, 32: 3200.0, 64: 3300.0, 128: 0.0}
    ((_, line),) = _batches(SimpleNamespace(by_batch=rates))  # type: ignore[arg-type]
    assert line == "8: 3000, 16: 3100, 32: 3200, 64: 3300, 128: out of memory (clips/s)"
    assert len(line) + 10 <= 80
