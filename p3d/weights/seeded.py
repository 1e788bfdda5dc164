"""Random weights that are the same on every machine, for tests, demos and trial runs. They are never a default.

Every key has its own PCG64 stream, so a network's numbers do not depend on the order of its keys. Only the generator's
raw 64-bit output is used, because numpy guarantees that it never changes. All further arithmetic is exact or correctly
rounded.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch

from p3d import zoo
from p3d.networks.network import Network
from p3d.preprocessing import ClipRecipe
from p3d.weights.record import COUNTER, Weights, WeightsError, assemble, network_config

_SUM_STD = math.sqrt((2**32 - 1) / 3)  # standard deviation of the sum of four uniform 16-bit integers


def random_weights(name: str, seed: int, *, graph: str = "caffe", num_classes: int = 400) -> Weights:
    """Weights with bell-shaped, He-scaled convolutions and normalisations near the identity.

    Three measures keep features informative through 199 layers. Each filter after the first layer sums to zero.
    Otherwise the positive mean after every ReLU would hide the differences between clips (cosine of two different clips
    in P3D-199: 0.997 without, 0.8 with). The last normalisation of each block has a gamma near 0.2. The first
    normalisation, or the first convolution in networks without one, is scaled to the recipe's input range. Raises
    WeightsError for an unknown name or graph and for a negative seed.
    """
    source = f"random:{seed}"
    if seed < 0:
        raise WeightsError(f"{source} needs a seed of at least 0, as in random:0")
    config = network_config(source, name, graph=graph, num_classes=num_classes, stride_on="1x1")
    recipe = zoo.recipe(name, graph)
    with torch.device("meta"):
        network = config.build()
    tensors = {
        key: torch.from_numpy(_draw(key, tuple(value.shape), seed, network, recipe))
        for key, value in network.state_dict().items()
        if not key.endswith(COUNTER)
    }
    return assemble(source, config, recipe, tensors, origin=source)


def _draw(key: str, shape: tuple[int, ...], seed: int, network: Network, recipe: ClipRecipe) -> np.ndarray:
    """One float32 tensor."""
    sums = _sums(key, shape, seed)
    bell = sums / _SUM_STD
    pixel = 64 * recipe.value_range / 255 / recipe.std[0]  # typical deviation of a normalised pixel
    if len(shape) >= 4:
        fan_in = math.prod(shape[1:])
        if key != f"{network.stem}.weight":
            filters = sums.reshape(shape[0], fan_in)
            bell = (fan_in * filters - filters.sum(1, keepdims=True)).reshape(shape) / (fan_in * _SUM_STD)
        values = bell * math.sqrt(2 / fan_in)
        if key == f"{network.stem}.weight" and not network.stem_norm:
            values = values / pixel
    elif key == f"{network.classifier}.weight":
        values = bell * 0.01
    elif len(shape) == 2:
        values = bell * math.sqrt(2 / shape[1])
    elif key.endswith("running_var"):
        values = 1 + 0.1 * bell
        if key == f"{network.stem_norm}.running_var":
            values = values * pixel**2
    elif key.endswith("weight"):
        values = (1 + 0.1 * bell) * (0.2 if key.endswith(f".{network.block_norm}.weight") else 1)
    else:  # running_mean and every bias
        values = 0.1 * bell
    return values.astype(np.float32)


def normal(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Float64 samples, nearly normal, mean 0, variance 1, within 3.5 standard deviations; `key` selects the stream."""
    return _sums(key, shape, seed) / _SUM_STD


def _sums(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Nearly normal integers: each is the centred sum of the four 16-bit quarters of a raw output."""
    stream = np.random.PCG64([seed, zlib.crc32(key.encode())])
    raw = np.asarray(stream.random_raw(math.prod(shape)), dtype=np.uint64)
    total = np.full(raw.shape, -2 * 0xFFFF, np.int64)
    for shift in (0, 16, 32, 48):  # one quarter at a time, to save memory: C3D's fc6 has 33 million
        total += ((raw >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64)
    return total.reshape(shape)
