"""Hints: what can be inferred from weights about their training inputs, and what cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name torch's own documentation gives it

from p3d.networks.model import P3D, P3DConfig
from p3d.preprocessing import CAFFE_RGB, PORT_RGB, ClipRecipe
from p3d.weights import Weights
from p3d.weights.hints import hints, sentences


def pictures() -> Tensor:
    """Pictures similar to natural ones, with amplitudes proportional to 1 / frequency: (8, 3, 96, 96) in 0..255."""
    random = np.random.RandomState(0)
    frequency = np.hypot(np.fft.fftfreq(96)[:, None], np.fft.fftfreq(96))
    frequency[0, 0] = 1
    noise = np.fft.ifft2(np.fft.fft2(random.randn(8, 3, 96, 96)) / frequency).real
    mixed = 0.95 * noise.mean(1, keepdims=True) * 3**0.5 + 0.3 * noise
    mixed /= mixed.std()
    return torch.from_numpy(mixed * 60 + 110).float()


def trained(recipe: ClipRecipe, filters: str) -> Weights:
    """A tiny network whose bn1 has the statistics of these filters on pictures in this recipe."""
    network = P3D(P3DConfig(name="p3d63", blocks=(1, 1, 1, 1), num_classes=2)).eval()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 3, 7, 7, generator=generator) * 0.05
    if filters == "smooth":
        weight = F.avg_pool2d(F.pad(weight, (2, 2, 2, 2)), 5, 1)
    inputs = pictures() * recipe.value_range / 255
    inputs = (inputs - torch.tensor(recipe.mean).view(3, 1, 1)) / torch.tensor(recipe.std).view(3, 1, 1)
    out = F.conv2d(inputs, weight, stride=2, padding=3)
    with torch.no_grad():
        network.conv1_custom.weight.copy_(weight[:, :, None])
        network.bn1.running_mean.copy_(out.mean(dim=(0, 2, 3)))
        network.bn1.running_var.copy_(out.var(dim=(0, 2, 3)))
    return Weights(network, recipe, (), "test")


@pytest.mark.parametrize("filters", ["white", "smooth"])
@pytest.mark.parametrize(("recipe", "true_std"), [(CAFFE_RGB, 60), (PORT_RGB, 60 / 255 / 0.226)])
def test_the_scale_of_the_inputs_is_told_within_a_factor_of_two(
    recipe: ClipRecipe, true_std: float, filters: str
) -> None:
    """With any filters, bn1 distinguishes bytes from normalised inputs; a recipe of the other range gets a warning."""
    weights = trained(recipe, filters)
    found = hints(weights)
    assert found.input_std is not None
    assert 0.5 < found.input_std / true_std < 2
    other = PORT_RGB if recipe is CAFFE_RGB else CAFFE_RGB
    assert not sentences(found, recipe)[0].startswith("WARNING")
    assert sentences(found, other)[0].startswith("WARNING")


def test_a_normalisation_that_was_never_trained_tells_nothing() -> None:
    """For an untrained network, and for statistics between the two ranges, the range is reported as unknown."""
    weights = trained(PORT_RGB, "white")
    with torch.no_grad():
        weights.network.bn1.running_var.mul_(60)
    assert "unclear" in sentences(hints(weights), PORT_RGB)[0]
    weights.network.bn1.reset_running_stats()
    assert hints(weights).input_std is None
    assert "cannot be inferred" in sentences(hints(weights), PORT_RGB)[0]


def test_temporal_filters_are_counted_by_what_they_look_at() -> None:
    """One outer tap makes a filter use another frame; trained statistics mark a normalisation as trained."""
    weights = trained(PORT_RGB, "white")
    network = weights.network
    for stage in (network.layer1, network.layer2, network.layer3):
        with torch.no_grad():
            stage[0].conv3.weight[:, :, [0, 2]] = 0
    assert (hints(weights).n_temporal, hints(weights).n_still, hints(weights).n_untouched) == (3, 3, 3)
    with torch.no_grad():
        network.layer2[0].conv3.weight[3, 4, 2] = 0.1
        network.layer3[0].bn3.running_mean[7] = 0.1
    assert (hints(weights).n_still, hints(weights).n_untouched) == (2, 2)
    assert "1 of 3 temporal filters look" in " ".join(sentences(hints(weights), PORT_RGB))
