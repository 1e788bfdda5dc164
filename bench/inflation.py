"""Figures of docs/weights.md: what inflated weights give on still clips, and how well `weights show` guesses a range.

python bench/inflation.py [FOLDER OF VIDEOS]     about a minute; without a folder the second table is left out
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn import functional as F  # noqa: N812 - the name torch's own documentation gives it

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from p3d import zoo
from p3d.recipe import CAFFE_RGB, PORT_RGB
from p3d.weights import Weights
from p3d.weights.hints import hints
from tests.p3d.test_resnet import ResNet, frames, inflated, still, tensors_of


@torch.inference_mode()
def still_clips() -> None:
    """Against the 2-D network, by torch's default convolutions: identity's error, gaussian's cosine."""
    print("network   graph  identity: relative error  gaussian: cosine")
    images = frames(2, 96)
    for graph, stride_on in (("port", "3x3"), ("caffe", "1x1")):
        flat = ResNet((3, 4, 6, 3), v1=stride_on == "1x1", caffe_pool=graph == "caffe")
        wanted = flat.features(images)
        for name in ("p3d63", "p3d63-a", "p3d63-b", "p3d63-c"):
            config = zoo.p3d_config(name, graph=graph, stride_on=stride_on, num_classes=5)
            identity = inflated(config, tensors_of(flat)).features(still(images))
            gaussian = inflated(config, tensors_of(flat), seed=0).features(still(images))
            error = (identity - wanted).norm() / wanted.norm()
            print(f"{name:9} {graph:6} {error:24.1e}  {F.cosine_similarity(gaussian, wanted).mean():16.2f}")


@torch.inference_mode()
def guessed_ranges(folder: Path) -> None:
    """White and Gabor filters on two frames of each video, their statistics in bn1: true deviation and guess."""
    images = _frames_of(folder)
    network = inflated(zoo.p3d_config("p3d63", num_classes=5), tensors_of(ResNet((3, 4, 6, 3))))
    print(f"\nfilters  inputs     true  guessed      ({len(images)} frames)")
    for filters, weight in (("white", torch.randn(64, 3, 7, 7)), ("gabor", _gabors())):
        for recipe in (CAFFE_RGB, PORT_RGB):
            inputs = images * recipe.value_range / 255
            inputs = (inputs - torch.tensor(recipe.mean).view(3, 1, 1)) / torch.tensor(recipe.std).view(3, 1, 1)
            out = F.conv2d(inputs, weight, stride=2, padding=3)
            network.conv1_custom.weight.copy_(weight[:, :, None])
            network.bn1.running_mean.copy_(out.mean(dim=(0, 2, 3)))
            network.bn1.running_var.copy_(out.var(dim=(0, 2, 3)))
            guess = hints(Weights(network, recipe, (), "")).input_std
            print(f"{filters:8} 0..{recipe.value_range:<4} {inputs.std():8.2f} {guess:8.2f}")


def _gabors() -> torch.Tensor:
    """Waves under a bell in every direction, two in three grey: what trained first layers look like."""
    y, x = torch.meshgrid(torch.arange(7) - 3.0, torch.arange(7) - 3.0, indexing="ij")
    filters = []
    for i in range(64):
        angle, frequency, phase, width = torch.rand(4) * torch.tensor([3.14, 2.2, 6.28, 1.5])
        wave = torch.cos((frequency + 0.2) * (x * angle.cos() + y * angle.sin()) + phase)
        colour = torch.ones(3) if i % 3 else torch.randn(3)
        filters.append(colour.view(3, 1, 1) * wave * torch.exp(-(x**2 + y**2) / 2 / (1 + width) ** 2))
    return torch.stack(filters)


def _frames_of(folder: Path) -> torch.Tensor:
    """(N, 3, 182, 242) in 0..255: the fifth and fortieth frame of every video that PyAV opens."""
    import av

    found = []
    for path in sorted(folder.iterdir()):
        try:
            with av.open(str(path)) as container:
                for i, frame in enumerate(container.decode(video=0)):
                    if i in (5, 40):
                        found.append(torch.from_numpy(frame.to_ndarray(format="rgb24", width=242, height=182)))
                    if i >= 40:
                        break
        except (av.FFmpegError, IndexError, OSError):
            continue
    return torch.stack(found).permute(0, 3, 1, 2).float()


if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.manual_seed(0)
    still_clips()
    if len(sys.argv) > 1:
        guessed_ranges(Path(sys.argv[1]))
