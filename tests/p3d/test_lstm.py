"""The LSTM over frames: its equations and weights over time, training, and its start from a 2-D network."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from p3d import zoo
from p3d.encoder import Encoder, check_golden, golden_features
from p3d.networks.lstm import LSTMConfig, ResNetLSTM
from p3d.preprocessing import IMAGENET_RGB
from p3d.weights import Weights, WeightsError, load, random_weights, save, to_bytes
from p3d.weights.record import assemble
from p3d.weights.resnet import from_frames
from tests.p3d.test_baselines import assert_a_row_depends_on_its_clip_alone, clips_of, hollow, unlike_clips
from tests.p3d.test_resnet import ResNet as PlainResNet

TINY = LSTMConfig(
    name="tiny", blocks=(1, 1, 1, 1), width=8, hidden=12, lstm_layers=2, num_classes=5, dropout=0, graph="port"
)
Values = npt.NDArray[np.float64]


def tiny(config: LSTMConfig = TINY) -> ResNetLSTM:
    """A small network with ordinary random numbers, in eval mode."""
    torch.manual_seed(0)
    return config.build().eval()


def frames_of(network: ResNetLSTM, clips_BCTHW: Tensor) -> Tensor:
    with torch.inference_mode():
        return network.frame_features(clips_BCTHW)


def sigmoid(x: Values) -> Values:
    return 1 / (1 + np.exp(-x))


def outputs_of(network: ResNetLSTM, frames_TF: Values) -> Values:
    """The outputs of the last layer by the equations of the paper without peepholes, in float64, (T, D)."""
    state = {key: value.double().numpy() for key, value in network.lstm.state_dict().items()}
    given = frames_TF
    for layer in range(network.lstm.num_layers):
        into, back = state[f"weight_ih_l{layer}"], state[f"weight_hh_l{layer}"]
        bias = state[f"bias_ih_l{layer}"] + state[f"bias_hh_l{layer}"]
        out, cell = np.zeros(back.shape[1]), np.zeros(back.shape[1])
        outputs = []
        for row in given:
            enter, keep, new, show = np.split(into @ row + back @ out + bias, 4)
            cell = sigmoid(keep) * cell + sigmoid(enter) * np.tanh(new)
            out = sigmoid(show) * np.tanh(cell)
            outputs.append(out)
        given = np.stack(outputs)
    return given


@pytest.mark.parametrize("length", [1, 2, 7])
def test_features_are_the_outputs_weighted_by_time(length: int) -> None:
    """For one and more frames: the LSTM's equations, and weights that grow linearly to that of the last frame."""
    network, clips = tiny(), clips_of(2, 3, length, 40, 36)
    frames_BTF = frames_of(network, clips).double().numpy()
    g_T = np.linspace(0, 1, length + 1)[1:]
    expected = np.stack([np.average(outputs_of(network, clip), axis=0, weights=g_T) for clip in frames_BTF])
    with torch.inference_mode():
        found = network.features(clips).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.01


def test_the_order_of_frames_matters() -> None:
    """Another order of the same frames gives other features, unlike the mean over frames."""
    network, clip = tiny(), clips_of(1, 3, 6, 32, 32)
    with torch.inference_mode():
        assert not torch.allclose(network.features(clip), network.features(clip.flip(2)), rtol=1e-2)


def test_training_computes_the_same_and_reaches_every_parameter() -> None:
    """In training mode the whole batch at once gives the same features, and every parameter gets a gradient."""
    network, clips = tiny(), clips_of(3, 3, 4, 64, 64)
    with torch.inference_mode():
        expected = network.features(clips)
    network.lstm.train()
    network.training = True  # not the normalisations
    torch.testing.assert_close(network.features(clips), expected, rtol=0, atol=1e-6)
    network.train()
    network(clips).square().sum().backward()
    without = [key for key, parameter in network.named_parameters() if not parameter.grad.abs().max() > 0]
    assert not without


def test_a_few_steps_learn_the_direction_of_motion() -> None:
    """Clips and the same clips backwards, which have equal frames, are distinguished after a little training."""
    network = tiny(dataclasses.replace(TINY, num_classes=2))
    forwards = clips_of(6, 3, 4, 32, 32)
    clips, labels = torch.cat([forwards, forwards.flip(2)]), torch.tensor([0] * 6 + [1] * 6)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(30):
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(clips), labels)
        loss.backward()
        optimiser.step()
    assert (network(clips).argmax(1) == labels).all()
    assert loss.item() < 0.3


@pytest.mark.parametrize("form", ["packed", "planar", "plain"])
def test_a_row_depends_on_its_clip_alone(form: str) -> None:
    """In every form the golden check passes, and rows have the same bits alone and at any position in a batch."""
    recipe = dataclasses.replace(IMAGENET_RGB, n_frames=2, crop_hw=(64, 64))
    weights = Weights(tiny(dataclasses.replace(TINY, hidden=512, width=16)), recipe, (), "a test")
    encoder = Encoder(weights, batch_size=5, threads=2, form=form)
    assert encoder.feature_dim == 512
    assert_a_row_depends_on_its_clip_alone(encoder)
    check_golden(encoder, golden_features(weights), 1e-11)


def test_random_features_stay_sane() -> None:
    """Random weights do not saturate the cells, and different clips have different features."""
    network = random_weights("resnet50-lstm", 0, num_classes=5).network
    with torch.inference_mode():
        features = network.features(unlike_clips(2, 80, 64))
    assert features.std() > 0.05 and features.abs().max() < 1
    assert torch.cosine_similarity(features[0], features[1], dim=0) < 0.95


def test_cost_counts_the_lstm() -> None:
    """The LSTM's multiply-adds are its weights once per frame, in addition to those of the 2-D network."""
    flat, found = zoo.describe("resnet50"), zoo.describe("resnet50-lstm")
    added = found.gmacs - flat.gmacs
    assert added == pytest.approx(16 * 4 * 512 * (2048 + 3 * 512) / 1e9)
    assert (found.layers, found.feature_dim, found.n_frames) == (52, 512, 16)


@pytest.mark.parametrize("change", [{"hidden": 0}, {"lstm_layers": 0}, {"spacetime": True}, {"width": 0}])
def test_an_lstm_that_cannot_be_is_refused(change: dict[str, int]) -> None:
    """No cells, no layers, no channels, and 3x3x3 convolutions, which leave no frames, are ValueErrors."""
    with pytest.raises(ValueError, match=r"LSTM|width"):
        dataclasses.replace(TINY, **change)


# A change here changes the meaning of a seed in every file that was ever made from one.
SEED_3_SHA256 = "f161c694e24a1194b09d508351d49b918cf0927608ddffe8c8af580f3ebd78e3"


def test_a_start_from_frames_keeps_them_and_draws_the_rest() -> None:
    """Frame tensors are the given ones; LSTM and classifier are small, pinned, and different for another seed."""
    plain = PlainResNet((1, 1, 1, 1))
    config = dataclasses.replace(TINY, width=64, hidden=512, stride_on="3x3")
    state = from_frames(config, plain.state_dict(), seed=3)
    network = assemble("a test", config, IMAGENET_RGB, state, origin="a test").network
    clips = clips_of(1, 3, 2, 64, 64)
    assert isinstance(network, ResNetLSTM)
    with torch.inference_mode():
        expected = torch.stack([plain.features(clips[:, :, t]) for t in range(2)], dim=1)
        torch.testing.assert_close(network.frame_features(clips), expected, rtol=1e-5, atol=1e-6)
    drawn = state["lstm.weight_hh_l1"]
    assert drawn.std().item() == pytest.approx((3 * 512) ** -0.5, rel=0.01) and abs(drawn.mean()) < 1e-4
    assert hashlib.sha256(drawn.numpy().tobytes()).hexdigest() == SEED_3_SHA256
    assert state["lstm.bias_ih_l0"].unique_consecutive().tolist() == [0, 1, 0]
    assert state["lstm.bias_ih_l0"][512:1024].min() == 1 and not state["lstm.bias_hh_l0"].any()
    assert state["fc.weight"].std() > 0.02 and not state["fc.bias"].any()
    other = from_frames(config, plain.state_dict(), seed=4)
    weights = {f"lstm.weight_{which}_l{layer}" for which in ("ih", "hh") for layer in (0, 1)} | {"fc.weight"}
    assert {key for key in state if not torch.equal(state[key], other[key])} == weights


def test_a_2d_file_becomes_an_lstm_that_is_named(tmp_path: Path) -> None:
    """The file's classifier is not used, the classes are the named ones or 400, and the origin says to train it."""
    path = tmp_path / "w.pth"
    torch.save(hollow("resnet50"), path)
    weights = load(path, name="resnet50-lstm", temporal="gaussian", seed=7)
    assert weights.config == zoo.config("resnet50-lstm", graph="port", stride_on="3x3")
    assert weights.recipe == IMAGENET_RGB
    assert "w.pth, sha256" in weights.origin and "seed 7: to be trained" in weights.origin
    named = load(path, name="resnet50-lstm", temporal="gaussian", seed=7, class_names=("a", "b", "c"))
    assert named.config.num_classes == 3
    save(tmp_path / "w.safetensors", named)
    assert to_bytes(load(tmp_path / "w.safetensors", name="resnet50-lstm")) == to_bytes(named)


@pytest.mark.parametrize(
    ("held", "options", "message"),
    [
        ("resnet50", {}, "without the LSTM of resnet50-lstm: .*--temporal gaussian --seed 0"),
        ("resnet50", {"temporal": "identity"}, "not with temporal = 'identity'"),
        ("resnet50", {"temporal": "gaussian"}, "seed = None"),
        ("resnet50", {"temporal": "gaussian", "seed": -1}, "seed = -1"),
        (
            "resnet101",
            {"temporal": "gaussian", "seed": 0},
            "does not fit the frames of resnet50-lstm: unexpected layer3",
        ),
        ("c3d", {}, "none of resnet50-lstm"),
    ],
)
def test_files_that_give_no_lstm_are_refused(
    tmp_path: Path, held: str, options: dict[str, object], message: str
) -> None:
    """No seed, identity filters, another depth, or another network: the error names the file and what to do."""
    path = tmp_path / "w.pth"
    torch.save(hollow(held), path)
    with pytest.raises(WeightsError, match=rf"w\.pth .*{message}"):
        load(path, name="resnet50-lstm", **options)
