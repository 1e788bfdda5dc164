"""How far features in bf16 and fp16 lie from those in fp32, on weights whose statistics are real: a table, by network.

    2-D ResNet-50 trained on frames of SRC -> inflated to P3D, temporal filters disturbed -> normalisations measured
    anew on clips of SRC -> features of other clips of SRC in each precision, by the Encoder of a job

Random weights would flatter or blame a precision: what it costs depends on the ranges that training leaves behind. The
2-D net learns which video a frame is of; a deeper P3D repeats its blocks in turn. bf16 runs as in a job. fp16, which
the Encoder refuses on a CPU, is rounded to 16 bits at the same places (weights, what enters and leaves every
convolution) with sums in float32, as on a GPU.

python bench/precision.py SRC                      all networks, some 15 minutes on one core
python bench/precision.py SRC --networks p3d63 --steps 20 --clips 8
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name torch's own documentation gives it

from p3d import zoo
from p3d.encoder import Encoder, normalise
from p3d.networks.blocks import Bottleneck2D
from p3d.networks.model import P3D, P3DConfig
from p3d.pipeline.clips.rules import Sampling, clip_spans, frame_numbers
from p3d.pipeline.decode.frames import open_frames
from p3d.pipeline.decode.policy import DecodePolicy
from p3d.pipeline.errors import VideoError
from p3d.pipeline.sources.listing import VIDEO_EXTENSIONS
from p3d.pipeline.types import FrameBlock, FrameSpec, VideoEnd
from p3d.recipe import ClipRecipe
from p3d.weights import Weights

SIDE = 64  # pixels of a clip, and of a training image
CLIPS_A_VIDEO = 12  # of which every third is kept for the comparison


class Flat(nn.Module):
    """The 2-D ResNet under a P3D: the same stem, blocks, widths and strides."""

    def __init__(self, config: P3DConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1_custom = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        caffe = config.graph == "caffe"
        self.pool1 = nn.MaxPool2d(3, 2, padding=0 if caffe else 1, ceil_mode=caffe)
        channels = 64
        for stage, (count, width) in enumerate(zip(config.blocks, (64, 128, 256, 512), strict=True)):
            blocks = []
            for at in range(count):
                stride = 2 if stage and not at else 1
                blocks.append(Bottleneck2D(channels, width, stride=stride, project=not at, stride_on=config.stride_on))
                channels = 4 * width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(2048, config.num_classes)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x = self.pool1(F.relu(self.bn1(self.conv1_custom(images_BCHW))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits_BK: torch.Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits_BK


def clips_of(source: Path, recipe: ClipRecipe) -> tuple[np.ndarray, np.ndarray]:
    """clips_NTHWC uint8 and the number of the video each is of."""
    spec = FrameSpec(crop_hw=recipe.crop_hw, resize_hw=recipe.resize_hw)
    sampling = Sampling("uniform", CLIPS_A_VIDEO, recipe.n_frames)
    clips, labels, videos = [], [], 0
    for path in sorted(path for path in source.rglob("*") if path.suffix in VIDEO_EXTENSIONS):
        frames: dict[int, np.ndarray] = {}
        n_frames = 0
        try:
            for message in open_frames(str(path), spec, sampling, policy=DecodePolicy()):
                if isinstance(message, FrameBlock):
                    frames.update(zip(message.numbers_N.tolist(), message.frames_NHWC, strict=True))
                if isinstance(message, VideoEnd):
                    n_frames = message.n_frames
        except VideoError:
            continue
        if n_frames < CLIPS_A_VIDEO + recipe.n_frames:  # the clips must differ
            continue
        for span in clip_spans(sampling, n_frames):
            clips.append(np.stack([frames[at] for at in frame_numbers(sampling, span, n_frames).tolist()]))
            labels.append(videos)
        videos += 1
    return np.stack(clips), np.array(labels)


def train(config: P3DConfig, recipe: ClipRecipe, clips: np.ndarray, labels: np.ndarray, steps: int) -> Flat:
    """A 2-D net after `steps` of AdamW on random frames and flips."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    net = Flat(config).train()
    for name, parameter in net.named_parameters():
        if name.endswith("bn4.weight"):
            nn.init.constant_(parameter, 0.2)  # deep nets learn from the first step
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-4)
    losses = []
    for step in range(steps):
        picked = rng.integers(len(clips), size=16)
        images = clips[picked, rng.integers(clips.shape[1], size=16)][:, None]
        if step % 2:
            images = images[..., ::-1, :]
        values = normalise(torch.from_numpy(np.ascontiguousarray(images)), recipe)[:, :, 0]
        loss = F.cross_entropy(net(values), torch.from_numpy(labels[picked]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(
        f"# {config.name}: loss {np.mean(losses[:10]):.2f} -> {np.mean(losses[-10:]):.2f} in {steps} steps", flush=True
    )
    return net


def inflate(flat: Flat, config: P3DConfig) -> P3D:
    """The P3D that sees what the 2-D net sees on a static clip, plus a disturbance of every temporal filter."""
    torch.manual_seed(1)
    network, flats = P3D(config).eval(), flat.state_dict()
    names = {"conv2": "conv_normal", "bn2": "bn_normal"}
    state = network.state_dict()
    for key, value in state.items():
        parts = key.split(".")
        if parts[0].startswith("layer"):
            there = flat.config.blocks[int(parts[0][-1]) - 1]
            parts[1] = str(int(parts[1]) if int(parts[1]) < there else 1 + (int(parts[1]) - 1) % (there - 1))
        if len(parts) > 3 and parts[2] in ("conv3", "bn3"):
            continue
        if parts[0] != "layer4" and len(parts) > 3:
            parts[2] = names.get(parts[2], parts[2])
        state[key] = flats[".".join(parts)].reshape(value.shape)
    kinds = config.stage_kinds()
    for stage, letters in enumerate(kinds, start=1):
        for at, kind in enumerate(letters):
            key = f"layer{stage}.{at}.conv3.weight"
            width = state[key].shape[0]
            state[key] = torch.randn(state[key].shape) * 0.3 * (2 / (3 * width)) ** 0.5
            if kind == "A" or (kind == "C" and config.graph == "caffe"):
                state[key][range(width), range(width), 1] += 1
    network.load_state_dict(state)
    return network


@torch.no_grad()
def measure_norms(network: P3D, recipe: ClipRecipe, clips: np.ndarray, batch: int = 8) -> None:
    """Give every normalisation the mean and variance that clips have there."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.reset_running_stats()
            module.momentum = None  # a plain average
    network.train()
    for start in range(0, len(clips) - batch + 1, batch):
        network.features(normalise(torch.from_numpy(clips[start : start + batch]), recipe))
    network.eval()


class Rounded:
    """fp16 where a CPU has none: weights, inputs and outputs of every convolution rounded, sums in float32."""

    def __init__(self, encoder: Encoder) -> None:
        for conv in encoder._network.modules():
            if isinstance(conv, nn.Conv2d | nn.Conv3d):
                conv.weight.data, conv.bias.data = self.round(conv.weight.data), self.round(conv.bias.data)
                conv.register_forward_pre_hook(lambda _, given: (self.round(given[0]),))
                conv.register_forward_hook(lambda _, given, out: self.round(out))

    @staticmethod
    def round(values: torch.Tensor) -> torch.Tensor:
        return values.half().float()


def features(weights: Weights, precision: str, clips: np.ndarray, threads: int) -> np.ndarray:
    if precision == "fp16":
        with patch("p3d.encoder.can_pack", lambda _: False):  # packed convolutions have no place to round at
            encoder = Encoder(weights, batch_size=4, threads=threads)
        Rounded(encoder)
    else:
        encoder = Encoder(weights, batch_size=4, threads=threads, precision=precision)
    n_frames = clips.shape[1]
    index = np.arange(len(clips) * n_frames).reshape(-1, n_frames)
    return encoder.encode(clips.reshape(-1, *clips.shape[2:]), index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--networks", nargs="+", default=["p3d63", "p3d63:port", "p3d131", "p3d199"])
    parser.add_argument("--steps", type=int, default=100, help="of training the 2-D net")
    parser.add_argument("--clips", type=int, default=64, help="to compare")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("network     precision  cosine min  median     relative error median  max")
    small = {"resize_hw": (SIDE * 182 // 160, SIDE * 242 // 160), "crop_hw": (SIDE, SIDE)}
    recipe = dataclasses.replace(zoo.recipe("p3d63", "caffe"), **small)
    clips, labels = clips_of(options.source, recipe)
    kept = np.arange(len(clips)) % 3 == 2
    classes = int(labels.max()) + 1
    flat = train(zoo.config("p3d63", num_classes=classes), recipe, clips[~kept], labels[~kept], options.steps)
    for named in options.networks:
        name, _, graph = named.partition(":")
        network = inflate(flat, zoo.config(name, graph=graph or "caffe", num_classes=classes))
        measure_norms(network, recipe, clips[~kept][:: max(1, (~kept).sum() // 32)])
        weights = Weights(network, recipe, (), "bench/precision.py")
        compared = clips[kept][: options.clips]
        found = {}
        for precision in ("fp32", "bf16", "fp16"):
            found[precision] = rows = features(weights, precision, compared, options.threads).astype(np.float64)
            true = found["fp32"]
            lengths = np.linalg.norm(true, axis=1)
            cosine = (rows * true).sum(1) / lengths / np.linalg.norm(rows, axis=1)
            error = np.linalg.norm(rows - true, axis=1) / lengths
            print(
                f"{named:11} {precision:9}  {cosine.min():.7f}   {np.median(cosine):.7f}  "
                f"{np.median(error):.1e}                {error.max():.1e}",
                flush=True,
            )
        spread = found["fp32"] / np.linalg.norm(found["fp32"], axis=1, keepdims=True)
        print(
            f"# {named}: {len(compared)} clips, median cosine of two of them {np.median(spread @ spread.T):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
