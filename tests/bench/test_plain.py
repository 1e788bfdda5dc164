"""The plain network of bench/model.py equals our network, and the peak is measured if a compiler is available."""

from __future__ import annotations

import shutil

import pytest
import torch

from bench.peak import Peak
from bench.plain import macs_of, plain_of
from p3d.weights import random_weights


@pytest.mark.parametrize("graph", ["caffe", "port"])
@torch.inference_mode()
def test_the_plain_module_is_the_same_network(graph: str) -> None:
    """The independent implementation gives the same features as p3d/ from the same parameters, in both graphs."""
    network = random_weights("p3d63", 0, graph=graph).network
    clip = torch.randn(1, 3, 16, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = network.features(clip)
    found = plain_of(network.state_dict(), "p3d63", graph)(clip)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_multiply_adds_are_counted() -> None:
    """P3D-63 has 8.441e9 per clip of the paper's size, as in the specification; taps on padding are not real."""
    network = plain_of(random_weights("p3d63", 0).network.state_dict(), "p3d63", "caffe")
    with torch.device("meta"):
        clip = torch.zeros(1, 3, 16, 160, 160)
    macs, real = macs_of(network.to("meta"), clip)
    assert macs == pytest.approx(8.4410e9, rel=1e-4)
    assert 0.9 * macs < real < macs
    conv = torch.nn.Conv3d(1, 1, (3, 1, 1), padding=(1, 0, 0))
    assert macs_of(conv, torch.zeros(1, 1, 2, 5, 5)) == (150, pytest.approx(100))


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler here")
def test_the_peak_is_that_of_vectors() -> None:
    """The loops do at least one multiply-add per nanosecond and thread, which a scalar loop would not reach."""
    peak = Peak(1)
    assert peak.macs_per_s("fp32") > 1e9
    assert peak.macs_per_s("bf16") >= 0
    assert peak.copied_per_s() > 1e8
