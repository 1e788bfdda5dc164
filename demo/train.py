"""`make train-demo`: train the small P3D of the demo on made motions, and write demo/p3d-demo.safetensors.

    python -m demo.train [FILE [STEPS]]

Seeds and the number of threads are fixed, so the same processor with the same torch writes the same bytes. Training
and held-out clips share no appearance: each clip draws its own (`demo.motions`).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from demo.motions import MOTIONS, clips
from p3d import weights, zoo
from p3d.weights.record import assemble

FILE = Path(__file__).resolve().parent / "p3d-demo.safetensors"
STEPS, BATCH, LEARNING_RATE = 4000, 16, 3e-3
WEIGHT_SEED, CLIP_SEED, HELD_OUT_SEED = 0, 1, 2
HELD_OUT = 1024  # clips
THREADS = 2  # part of the result: sums are split by thread
NOISE = 0.05  # of normalised pixels, so that what a codec loses does not matter
RECIPE = zoo.recipe("p3d-demo", "caffe")


def batch(size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Normalised float32 clips (B, 3, 16, 64, 64), and their classes (B,)."""
    motion_B = torch.randint(len(MOTIONS), (size,), generator=random)
    pixels = clips(motion_B, RECIPE.n_frames, RECIPE.crop_hw[0], random).permute(0, 4, 1, 2, 3) / 255
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (RECIPE.mean, RECIPE.std))
    return (pixels - mean) / std, motion_B


def train(steps: int) -> nn.Module:
    """A network after `steps` steps of AdamW under a one-cycle learning rate."""
    torch.manual_seed(WEIGHT_SEED)
    network = zoo.build("p3d-demo", num_classes=len(MOTIONS), dropout=0.0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.25)
    random, started, right = torch.Generator().manual_seed(CLIP_SEED), time.monotonic(), 0
    for step in range(1, steps + 1):
        clips_BCTHW, motion_B = batch(BATCH, random)
        logits_BK = network(clips_BCTHW + NOISE * torch.randn(clips_BCTHW.shape, generator=random))
        optimizer.zero_grad()
        functional.cross_entropy(logits_BK, motion_B, label_smoothing=0.05).backward()
        optimizer.step()
        schedule.step()
        right += int((logits_BK.argmax(1) == motion_B).sum())
        if step % 100 == 0:
            left_s = (time.monotonic() - started) / step * (steps - step)
            print(f"step {step}/{steps}   top-1 of the last 100 steps {right / BATCH / 100:.2f}   ETA {left_s:.0f} s")
            right = 0
    return network.eval()


@torch.inference_mode()
def held_out(network: nn.Module) -> float:
    """Top-1 on clips of appearances that training never drew."""
    random, right = torch.Generator().manual_seed(HELD_OUT_SEED), 0
    for _ in range(0, HELD_OUT, 32):
        clips_BCTHW, motion_B = batch(32, random)
        right += int((network(clips_BCTHW).argmax(1) == motion_B).sum())
    return right / HELD_OUT


def main(path: str | Path = FILE, steps: str | int = STEPS) -> None:
    path, steps = Path(path), int(steps)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()
    network = train(steps)
    top1 = held_out(network)
    origin = f"demo/train.py: made motions, {steps} steps of {BATCH} clips; top-1 {top1:.3f} on held-out appearances"
    config = zoo.config("p3d-demo", num_classes=len(MOTIONS))
    weights.save(path, assemble(str(path), config, RECIPE, network.state_dict(), class_names=MOTIONS, origin=origin))
    print(f"{origin}; {path.stat().st_size / 1e6:.1f} MB in {time.monotonic() - started:.0f} s: {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
