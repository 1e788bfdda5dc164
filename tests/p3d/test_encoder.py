"""The encoder: same numbers as the network, independent of a clip's neighbours, and a self-check that can fail."""

import dataclasses
import functools
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from p3d import zoo
from p3d.device import DeviceFull, device_for
from p3d.encoder import Encoder, GoldenMismatch, check_golden, golden_clip, golden_features, normalise
from p3d.preprocessing import CAFFE_RGB, PORT_FLOW, PORT_RGB, ClipRecipe
from p3d.weights import Weights, random_weights

SMALL = {"resize_hw": (72, 96), "crop_hw": (64, 64)}


@functools.cache
def seeded(name: str = "p3d63", graph: str = "caffe") -> Weights:
    """Random weights with a recipe of small images, for speed."""
    weights = random_weights(name, 0, graph=graph)
    return dataclasses.replace(weights, recipe=dataclasses.replace(weights.recipe, **SMALL))


@functools.cache
def encoder_of(batch_size: int) -> Encoder:
    return Encoder(seeded(), batch_size=batch_size, threads=2)


def video(n_frames: int, recipe: ClipRecipe, seed: int = 0) -> np.ndarray:
    shape = (n_frames, *recipe.crop_hw, recipe.channels)
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def every(stride: int, clips: int) -> np.ndarray:
    """Overlapping clips: (B, 16) frame indices."""
    return np.arange(clips)[:, None] * stride + np.arange(16)


@pytest.mark.parametrize(
    ("name", "graph"), [("p3d63", "caffe"), ("p3d63", "port"), ("p3d63-flow", "caffe"), ("p3d63-flow", "port")]
)
def test_rows_are_the_plain_networks(name: str, graph: str) -> None:
    """Gathering, colour, range, layout and folding change a row by less than 1e-5, relative to the plain network."""
    weights = seeded(name, graph)
    recipe = weights.recipe
    frames, index = video(20, recipe), every(3, 2)
    clips = frames[index].astype(np.float32)[..., :: -1 if recipe.channel_order == "bgr" else 1]
    clips = (clips * (recipe.value_range / 255) - np.float32(recipe.mean)) / np.float32(recipe.std)
    with torch.inference_mode():
        plain = weights.network.features(torch.from_numpy(np.ascontiguousarray(clips.transpose(0, 4, 1, 2, 3))))
        scores = weights.network.fc(plain).softmax(1).numpy()
    rows, probs = Encoder(weights, batch_size=2, threads=2).encode(frames, index, probs=True)
    assert rows.dtype == probs.dtype == np.float32
    assert rows.shape == (2, 2048)
    assert np.linalg.norm(rows - plain.numpy()) / np.linalg.norm(plain.numpy()) < 1e-5
    np.testing.assert_allclose(probs, scores, rtol=1e-4)


def test_both_recipes_are_what_they_say() -> None:
    """A known pixel becomes blue-green-red minus the mean, or red-green-blue normalised as for ImageNet."""
    pixel = torch.tensor([[[[[255, 0, 51]]]]], dtype=torch.uint8)
    assert normalise(pixel, CAFFE_RGB).flatten().tolist() == [51 - 104, 0 - 117, 255 - 123]
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert normalise(pixel, PORT_RGB).flatten().tolist() == pytest.approx(expected)
    flow = normalise(pixel[..., :2], PORT_FLOW).flatten().tolist()
    assert flow == pytest.approx([0.5 / 0.226, -0.5 / 0.226])


def test_a_row_depends_on_its_clip_alone() -> None:
    """On a CPU rows and scores are bit-identical alone, among others, in any order and at any position in a batch."""
    encoder = encoder_of(4)
    frames, index = video(40, encoder.recipe), every(4, 7)
    rows, probs = encoder.encode(frames, index, probs=True)
    assert len({row.tobytes() for row in rows}) == 7  # the clips do differ
    order = np.random.RandomState(1).permutation(7)
    moved_rows, moved_probs = encoder.encode(frames, index[order], probs=True)
    assert np.array_equal(moved_rows, rows[order])
    assert np.array_equal(moved_probs, probs[order])
    for clip in (0, 5):
        assert np.array_equal(encoder.encode(frames, index[clip : clip + 1])[0], rows[clip])
    alone = frames[index[6]]
    assert np.array_equal(encoder.encode(alone, np.arange(16)[None])[0], rows[6])


@pytest.mark.parametrize("batch_size", [3, 5])
def test_every_place_in_a_batch_gives_the_same_bits(batch_size: int) -> None:
    """One clip at all positions of an uneven batch gives identical rows and scores, although threads share the work."""
    frames = video(16, seeded().recipe)
    rows, probs = encoder_of(batch_size).encode(frames, every(0, batch_size), probs=True)
    assert len({row.tobytes() for row in rows}) == 1
    assert len({row.tobytes() for row in probs}) == 1


def test_the_same_call_gives_the_same_bits() -> None:
    """Two calls, and another encoder built from the same weights, agree in every bit."""
    encoder = encoder_of(4)
    frames, index = video(16, encoder.recipe), every(1, 1)
    rows = encoder.encode(frames, index)
    assert np.array_equal(encoder.encode(frames, index), rows)
    another = Encoder(seeded(), batch_size=4, threads=2)
    assert np.array_equal(another.encode(frames, index), rows)


def test_the_given_network_is_left_alone() -> None:
    """Folding happens on a copy: the weights can still be saved and trained afterwards."""
    network = seeded().network
    before = {key: value.clone() for key, value in network.state_dict().items()}
    Encoder(seeded())
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_arrays_may_be_read_only_and_strided() -> None:
    """Frames from shared memory or a slice are accepted without a warning and give the same rows."""
    encoder = encoder_of(4)
    frames, index = video(16, encoder.recipe), every(1, 1)
    rows = encoder.encode(frames, index)
    strided = np.repeat(frames, 2, axis=0)[::2]
    strided.flags.writeable = index.flags.writeable = False
    assert not strided.flags.c_contiguous
    assert np.array_equal(encoder.encode(strided, index), rows)


def test_no_clips_give_no_rows() -> None:
    """An empty request returns empty arrays of the right width."""
    rows, probs = encoder_of(4).encode(video(1, seeded().recipe), np.empty((0, 16), np.int64), probs=True)
    assert (rows.shape, probs.shape) == ((0, 2048), (0, 400))


@pytest.mark.parametrize(
    ("frames", "index", "message"),
    [
        (np.zeros((16, 64, 65, 3), np.uint8), every(1, 1), "(16, 64, 65, 3)"),
        (np.zeros((16, 3, 64, 64), np.uint8), every(1, 1), "(16, 3, 64, 64)"),
        (np.zeros((16, 64, 64, 3), np.float32), every(1, 1), "float32"),
        (np.zeros((64, 64, 3), np.uint8), every(1, 1), "(64, 64, 3)"),
        (np.zeros((16, 64, 64, 3), np.uint8), every(1, 1).astype(np.int32), "int32"),
        (np.zeros((16, 64, 64, 3), np.uint8), every(1, 1)[:, :15], "(1, 15)"),
        (np.zeros((16, 64, 64, 3), np.uint8), np.arange(16), "(16,)"),
        (np.zeros((16, 64, 64, 3), np.uint8), every(1, 2), "0 to 16, but there are 16"),
        (np.zeros((16, 64, 64, 3), np.uint8), every(1, 1) - 1, "-1 to 14"),
    ],
)
def test_frames_and_indices_that_do_not_fit_are_refused(frames: np.ndarray, index: np.ndarray, message: str) -> None:
    """A wrong shape, dtype or index is refused, and the error states its value."""
    with pytest.raises(ValueError, match=re.escape(message)):
        encoder_of(4).encode(frames, index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0"),
        ({"threads": 0}, "threads = 0"),
        ({"recipe": PORT_FLOW}, "2 channels"),
        ({"precision": "fp8"}, "fp32, tf32, bf16, fp16, not 'fp8'"),
        ({"precision": "fp16"}, "for CUDA devices"),
        ({"device": "tpu"}, "tpu"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "cuda:x"}, "cuda:x"),
        ({"device": "cpu:0"}, "cpu:0"),
    ],
)
def test_encoders_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    """A wrong option is refused when the encoder is constructed, and the error states its value."""
    with pytest.raises(ValueError, match=message):
        recipe = options.pop("recipe", seeded().recipe)
        Encoder(dataclasses.replace(seeded(), recipe=recipe), **options)


def test_auto_is_the_gpu_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" uses CUDA if it is available and never selects mps."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for("auto") == torch.device("cpu")
    assert device_for("mps") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_for("auto") == torch.device("cuda")


def test_the_golden_clip_moves_and_has_colour() -> None:
    """The golden clip would reveal a wrong frame order, a wrong channel order or a transposed image."""
    frames, index = golden_clip(CAFFE_RGB)
    assert (frames.shape, frames.dtype, index.tolist()) == ((16, 160, 160, 3), np.uint8, [[*range(16)]])
    assert (frames.min(), frames.max()) == (0, 255)
    assert not np.array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[..., 0], frames[..., 2])
    assert not np.array_equal(frames, frames.swapaxes(1, 2))
    assert np.array_equal(frames, golden_clip(CAFFE_RGB)[0])


@pytest.mark.parametrize("graph", ["caffe", "port"])
def test_a_sound_encoder_passes_the_golden_check(graph: str) -> None:
    """Folding and layout on this device stay far inside the tolerance."""
    weights = seeded("p3d63", graph)
    check_golden(Encoder(weights, batch_size=2), golden_features(weights), 1e-12)


def perturbed(change: str) -> Encoder:
    """An encoder with one thing wrong."""
    recipe = seeded().recipe
    if change == "colours swapped":
        recipe = dataclasses.replace(recipe, channel_order="rgb")
    if change == "range forgotten":
        recipe = dataclasses.replace(recipe, value_range=1)
    if change == "mean forgotten":
        recipe = dataclasses.replace(recipe, mean=(0.0, 0.0, 0.0))
    encoder = Encoder(dataclasses.replace(seeded(), recipe=recipe), batch_size=1)
    with torch.no_grad():
        if change == "one layer off":
            encoder._network.layer2[0].conv3.weight.mul_(1.5)
        if change == "too long":
            encoder._network.layer4.append(Scaled(2))
        if change == "not a number":
            encoder._network.conv1_custom.weight[0] = float("nan")
        if change == "all zero":
            encoder._network.layer4.append(Scaled(0))
    return encoder


class Scaled(torch.nn.Module):
    """Multiplies what it is given."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


@pytest.mark.parametrize(
    "change",
    [
        "colours swapped",
        "range forgotten",
        "mean forgotten",
        "one layer off",
        "too long",
        "not a number",
        "all zero",
    ],
)
def test_the_golden_check_catches(change: str) -> None:
    """An encoder with other features is refused, and the error states device, network, row and distance."""
    with pytest.raises(GoldenMismatch, match=r"p3d63 on cpu in fp32 .* in row 1 of 1: cosine distance "):
        check_golden(perturbed(change), golden_features(seeded()))


def test_the_golden_check_catches_another_networks_features() -> None:
    """Golden features of other weights, or of another length, do not pass."""
    others = dataclasses.replace(random_weights("p3d63", 1), recipe=seeded().recipe)
    with pytest.raises(GoldenMismatch, match="cosine"):
        check_golden(encoder_of(4), golden_features(others))
    with pytest.raises(GoldenMismatch, match="golden ones are 512"):
        check_golden(encoder_of(4), np.ones(512, np.float32))


def with_memory_for(clips: int, monkeypatch: pytest.MonkeyPatch) -> Encoder:
    """An encoder of 8 clips at a time, on a device whose memory fits only `clips`."""
    encoder = Encoder(seeded(), batch_size=8, threads=2)
    true = encoder._network.features

    def features(batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > clips:
            raise torch.OutOfMemoryError(f"{len(batch)} clips do not fit")
        return true(batch)

    monkeypatch.setattr(encoder._network, "features", features)
    return encoder


@pytest.mark.fault(9)
@pytest.mark.parametrize(("fits", "settles_at"), [(8, 8), (7, 4), (3, 2), (1, 1)])
def test_a_batch_that_does_not_fit_is_halved_for_good(
    fits: int, settles_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory, the batch is halved until it fits; the rows are the same, and the encoder stays usable."""
    frames, index = video(30, seeded().recipe), every(2, 7)
    encoder = with_memory_for(fits, monkeypatch)
    for _ in range(2):
        rows, probs = encoder.encode(frames, index, probs=True)
        assert encoder.batch_size == settles_at
        expected = encoder_of(1).encode(frames, index, probs=True)
        np.testing.assert_allclose(rows, expected[0], rtol=0, atol=1e-5 * np.abs(expected[0]).max())
        np.testing.assert_allclose(probs, expected[1], rtol=1e-4)


@pytest.mark.fault(9)
def test_threads_that_run_out_of_memory_together_halve_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads both fail with eight clips: the batch is halved only once, and both continue with four."""
    encoder, together = with_memory_for(4, monkeypatch), threading.Barrier(2)
    narrow = encoder._network.features

    def features(batch: torch.Tensor) -> torch.Tensor:
        if len(batch) == 8:
            together.wait(60)
        return narrow(batch)

    monkeypatch.setattr(encoder._network, "features", features)
    frames, index = video(30, seeded().recipe), every(1, 8)
    with ThreadPoolExecutor(2) as pool:
        rows, others = pool.map(lambda _: encoder.encode(frames, index), range(2))
    assert encoder.batch_size == 4 and np.array_equal(rows, others)


def test_threads_encode_at_once_each_in_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are the same as with one thread, and no thread ever uses another's stream."""
    encoder, frames = Encoder(seeded(), batch_size=2, threads=1), video(40, seeded().recipe)
    expected, entered = encoder.encode(frames, every(3, 8)), list[tuple[int, object]]()
    real = torch.cpu.stream

    def seen(stream: object) -> object:
        entered.append((threading.get_ident(), stream))
        return real(stream)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.cpu, "stream", seen)
    with ThreadPoolExecutor(2) as pool:
        for rows in pool.map(lambda at: encoder.encode(frames, every(3, 8)[at : at + 2]), [0, 2, 4, 6] * 3):
            assert {row.tobytes() for row in rows} <= {row.tobytes() for row in expected}
    assert len({stream for _, stream in entered}) == len({thread for thread, _ in entered}) == len(set(entered)) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_threads_encode_at_once_on_a_gpu() -> None:
    """With two threads and many batches, rows of one thread never mix with those of the other."""
    encoder, frames, index = Encoder(seeded(), device="cuda", batch_size=2), video(200, seeded().recipe), every(3, 60)
    expected = encoder.encode(frames, index)
    with ThreadPoolExecutor(2) as pool:
        found = np.concatenate(list(pool.map(lambda at: encoder.encode(frames, index[at : at + 2]), range(0, 60, 2))))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.fault(9)
def test_a_device_without_room_for_one_clip_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeviceFull names the device; no clip is skipped."""
    encoder = with_memory_for(0, monkeypatch)
    with pytest.raises(DeviceFull, match="cpu cannot fit one clip of p3d63 in memory"):
        encoder.encode(video(16, seeded().recipe), every(1, 1))


def test_layers_have_the_papers_shapes_and_names() -> None:
    """prob, pool5, res5c and the last block of res4 have Caffe's names and, at 16x160x160, the sizes in the paper."""
    weights = random_weights("p3d63", 0)
    encoder = Encoder(weights, batch_size=1, threads=2)
    assert encoder.layer_names == ("prob", "pool5", "res5", "res5c", "res4", "res4f")
    frames, index = golden_clip(weights.recipe)
    found = encoder.encode_layers(frames, index, encoder.layer_names)
    shapes = {name: rows.shape[1:] for name, rows in found.items()}
    assert list(shapes) == list(encoder.layer_names)
    assert shapes["prob"] == (400,) and shapes["pool5"] == (2048,)
    assert shapes["res5"] == shapes["res5c"] == (2048, 5, 5)
    assert shapes["res4"] == shapes["res4f"] == (1024, 2, 10, 10)
    assert [zoo.config(name).last_block(4) for name in ("p3d131", "p3d199")] == ["res4b22", "res4b35"]
    with pytest.raises(TypeError):
        found["pool5"] = found["prob"]  # the result is read-only


@pytest.mark.parametrize("clips", [0, 3])
def test_layers_leave_features_and_scores_as_they_are(clips: int) -> None:
    """pool5 and prob equal those of `encode` bit for bit, whatever else is requested, and agree with the maps."""
    encoder = encoder_of(2)
    frames, index = video(24, encoder.recipe), every(4, clips)
    rows, probs = encoder.encode(frames, index, probs=True)
    found = encoder.encode_layers(frames, index, ("res4", "prob", "res5", "pool5"))
    assert np.array_equal(found["pool5"], rows)
    assert np.array_equal(found["prob"], probs)
    np.testing.assert_allclose(found["res5"].mean(axis=(2, 3)), rows, rtol=1e-4, atol=1e-6)
    assert found["res4"].shape == (clips, 1024, 2, 4, 4)
    with pytest.raises(ValueError, match="p3d63 has no layer 'res3'"):
        encoder.encode_layers(frames, index, ["res3"])


def test_res4_is_before_its_temporal_pool() -> None:
    """Applying the pool, res5 and the average to "res4" gives exactly the features."""
    network = seeded().network
    clips = torch.from_numpy(np.random.RandomState(0).randn(1, 3, 16, 64, 64).astype(np.float32))
    with torch.inference_mode():
        found = network.activations(clips)
        again = network.layer4(network.temporal_pool(found.res4_BCTHW)[:, :, 0])
        assert torch.equal(again, found.res5_BCHW)
        assert torch.equal(again.mean(dim=(2, 3)), found.pool5_BD)
        assert torch.equal(network.features(clips), found.pool5_BD)


HAS_BF16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no instructions for bf16"
)


@functools.cache
def halved(batch_size: int) -> Encoder:
    return Encoder(seeded(), batch_size=batch_size, threads=2, precision="bf16")


@HAS_BF16
def test_bf16_is_near_and_float32_comes_out() -> None:
    """bf16 rows are float32, close to but not equal to fp32 rows; the golden check has a limit for bf16."""
    frames, index = video(24, seeded().recipe), every(4, 3)
    rows, probs = halved(2).encode(frames, index, probs=True)
    true, true_probs = encoder_of(2).encode(frames, index, probs=True)
    assert rows.dtype == probs.dtype == np.float32
    cosine = (rows * true).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(true, axis=1)
    assert 0.999 < cosine.min() < 0.9999999
    assert not np.array_equal(rows, rows.astype(np.float16))  # averaged in float32
    np.testing.assert_allclose(probs, true_probs, rtol=0.1)
    check_golden(halved(2), golden_features(seeded()))
    with pytest.raises(GoldenMismatch, match="in bf16 does not reproduce"):
        check_golden(halved(2), golden_features(seeded()), 1e-7)


@HAS_BF16
@pytest.mark.parametrize("batch_size", [2, 5])
def test_a_bf16_row_depends_on_its_clip_alone(batch_size: int) -> None:
    """In bf16 too a row is bit-identical for any neighbours, at every position in a batch of the same size."""
    encoder = halved(batch_size)
    frames, index = video(24, encoder.recipe), every(1, 7)
    rows, probs = encoder.encode(frames, index, probs=True)
    assert len({row.tobytes() for row in rows}) == 7
    order = np.random.RandomState(1).permutation(7)
    moved_rows, moved_probs = encoder.encode(frames, index[order], probs=True)
    assert np.array_equal(moved_rows, rows[order])
    assert np.array_equal(moved_probs, probs[order])
    same = encoder.encode(frames, np.repeat(index[3:4], batch_size, axis=0))
    assert {row.tobytes() for row in same} == {rows[3].tobytes()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_every_precision_passes_the_golden_check_on_a_gpu(precision: str) -> None:
    """On CUDA each precision reproduces the CPU's golden features within its own limit."""
    check_golden(Encoder(seeded(), device="cuda", batch_size=2, precision=precision), golden_features(seeded()))
