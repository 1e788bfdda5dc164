"""A network as an Encoder runs it: folded, in the order of the frames' channels, and in the device's fastest form.

    Weights --copy, fold, reorder channels, cast, change the convolutions--> (network, recipe of its input)

The forms of a convolution are "packed" for CPUs (`networks/fused.py`), "planar" for CUDA (`networks/planar.py`), and
"plain", torch's own modules, which every device runs.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from torch import Tensor, nn

from p3d.networks.fused import can_pack, pack
from p3d.networks.model import fold
from p3d.networks.network import Network
from p3d.networks.planar import planar
from p3d.preprocessing import ClipRecipe
from p3d.weights.record import Weights

FORMS: Final = ("packed", "planar", "plain")
# "tf32" stores float32; the convolutions multiply with 10 bits of mantissa, on CUDA only
PRECISIONS: Final = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def form_for(device: torch.device) -> str:
    """The form that `prepared` uses on this device unless another one is asked for."""
    if device.type == "cuda":
        return "planar"
    return "packed" if can_pack(device) else "plain"


def prepared(weights: Weights, precision: str = "fp32", form: str = "plain") -> tuple[Network, ClipRecipe]:
    """A new network for inference, on the CPU, and the recipe by which its input is normalised.

    It shares tensors with `weights`, such as those of the classifier, and changes none of them.
    Channels last is the memory layout of gathered frames already, so convolutions have it too. Raises ValueError for an
    unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"the form of a network is one of {', '.join(FORMS)}, not {form!r}")
    with torch.device("meta"):
        network, recipe = weights.config.build().eval(), weights.recipe
    network.load_state_dict(weights.network.state_dict(), assign=True)  # tensors are shared until they are replaced
    fold(network)
    if recipe.channel_order == "bgr":  # flipping the filters once saves flipping the channels of every clip
        stem = network.get_submodule(network.stem)
        assert isinstance(stem.weight, Tensor)
        stem.weight.data = stem.weight.data.flip(1)
        recipe = dataclasses.replace(recipe, channel_order="rgb", mean=recipe.mean[::-1], std=recipe.std[::-1])
    # P3D-63, 4 clips of 16x160x160, CPU with 2 threads, median of 5 interleaved rounds: 0.75 s, compared with 1.24 s
    # in contiguous memory; features differ by 4e-7.
    for conv in network.modules():
        if isinstance(conv, nn.Conv2d | nn.Conv3d):
            layout = torch.channels_last if isinstance(conv, nn.Conv2d) else torch.channels_last_3d
            conv.to(PRECISIONS[precision])  # the classifier keeps float32
            conv.weight.data = conv.weight.data.contiguous(memory_format=layout)
    if form == "packed":
        pack(network)
    elif form == "planar":
        planar(network)
    return network, recipe
