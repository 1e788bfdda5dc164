"""Whole P3D networks of a few kB, so that tests of names, formats and checks do not need 267 MB each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from p3d import zoo
from p3d.networks.model import P3DConfig
from p3d.networks.network import GRAPHS, NetworkConfig
from p3d.preprocessing import ClipRecipe
from p3d.weights import Weights
from p3d.weights.record import COUNTER, expected_shapes

State = dict[str, torch.Tensor]


@contextmanager
def tiny_zoo(blocks: tuple[int, int, int, int] = (1, 1, 1, 1), width: int = 1) -> Iterator[None]:
    """Inside this context the zoo holds only "tiny" and "tiny-flow"."""

    def config(name: str, *, num_classes: int = 400, **options: Any) -> P3DConfig:
        if name not in names:
            raise ValueError(f"no network is called {name!r}")
        channels = 2 if name == "tiny-flow" else 3
        return P3DConfig(
            name=name, blocks=blocks, width=width, in_channels=channels, num_classes=num_classes, **options
        )

    def recipe(name: str, graph: str) -> ClipRecipe:
        return recipes[graph, name]

    names = ("tiny", "tiny-flow")
    recipes = {(graph, name): zoo.recipe(name.replace("tiny", "p3d63"), graph) for graph in GRAPHS for name in names}
    with mock.patch.multiple(zoo, NAMES=names, P3D_NAMES=names, config=config, p3d_config=config, recipe=recipe):
        yield


def drawn(config: NetworkConfig, seed: int) -> State:
    """Finite float32 numbers of every magnitude for every key, in the order of the network, from random bits."""
    bits = np.random.default_rng(seed)
    state = {}
    for key, shape in expected_shapes(config).items():
        raw = bits.integers(0, 1 << 32, shape, dtype=np.uint32)
        raw[(raw & 0x7F80_0000) == 0x7F80_0000] &= 0x807F_FFFF  # infinities and NaN become denormal
        state[key] = torch.from_numpy(raw.view(np.float32))
    return state


def state_of(weights: Weights) -> State:
    return {key: value for key, value in weights.network.state_dict().items() if not key.endswith(COUNTER)}


def assert_bits_equal(found: State, wanted: State) -> None:
    """Compare every tensor, its shape and type, bit for bit: -0.0 differs from 0.0."""
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype == torch.float32
        assert torch.equal(found[key], value), key
        assert torch.equal(found[key].view(torch.int32), value.contiguous().view(torch.int32)), key
