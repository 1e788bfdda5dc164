"""The paper's ablation (table 1) in small: ways to see time, on made motions, at equal width and budget.

    python -m bench.ablation                         all arms, three seeds, about 80 minutes of one core
    python -m bench.ablation --only speed            parameters, and clips per second to train and to infer
    python -m bench.ablation --arms P3D-A P3D-B      some of them; what is done already is not done again

Each arm trains the same number of steps on the same clips of eight motions (`demo.motions`). They are four pairs, and
in each pair one is the other reversed in time. Appearance and motion are independent, and each clip has an appearance
of its own.
`top-1` is over held-out clips. `in pairs` counts how often the right motion scores higher than its mirror image: half
is chance, and an arm that does not know the order of frames cannot do better. The paper's column is from UCF101, with
ResNet-50, so only its order can be compared. No order is asserted here.

A finished arm and seed is one JSON file in --out/ablation, so an interrupted bench continues where it was. One thread
computes, since a second one gives such small networks little: two commands with other --arms use two cores.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.rounds import Report, Spread, Table, parser_of, take_turns
from demo.motions import MOTIONS, clips
from p3d.networks.lstm import LSTMConfig
from p3d.networks.model import P3DConfig
from p3d.networks.network import Network, NetworkConfig
from p3d.networks.resnet import ResNet, ResNetConfig

WIDTH, BLOCKS, SIDE, FRAMES = 16, (1, 1, 1, 1), 64, 16
STEPS, BATCH, LEARNING_RATE = 600, 16, 3e-3
SEEDS, HELD_OUT, HELD_OUT_SEED, CLIP_SEED = 3, 2048, 2, 1
MIRROR = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])  # the number of each motion that is this one reversed in time
SPEED_CLIPS = 16


class MaxOverFrames(ResNet):
    """Convolutional pooling: the maximum of each feature over the frames (Ng et al., CVPR 2015, section 3.1)."""

    def features(self, clips_BCTHW: Tensor) -> Tensor:
        found: Tensor = self.frame_features(clips_BCTHW).amax(dim=1)
        return found


def _common(kind: type[NetworkConfig], **more: object) -> Callable[[], Network]:
    named = {"name": "ablation", "blocks": BLOCKS, "width": WIDTH, "num_classes": len(MOTIONS), "dropout": 0.0}
    return lambda: kind(**named | more).build()


# arm: how to build it, whether the order of frames is unknown to it, and the paper's MB, speed and accuracy (table 1)
ARMS: dict[str, tuple[Callable[[], Network], bool, str]] = {
    "2-D on frames": (_common(ResNetConfig), True, "92 MB, 15.0 frames/s, 80.8 %"),
    "convolutional pooling": (
        lambda: MaxOverFrames(
            ResNetConfig(name="ablation", blocks=BLOCKS, width=WIDTH, num_classes=len(MOTIONS), dropout=0.0)
        ),
        True,
        "-",
    ),
    "LSTM on frames": (_common(LSTMConfig, hidden=8 * WIDTH), False, "-"),
    "P3D-A": (_common(P3DConfig, kinds="A"), False, "98 MB, 9.0 clips/s, 83.7 %"),
    "P3D-B": (_common(P3DConfig, kinds="B"), False, "98 MB, 8.8 clips/s, 82.8 %"),
    "P3D-C": (_common(P3DConfig, kinds="C"), False, "98 MB, 8.6 clips/s, 83.0 %"),
    "P3D, mixed": (_common(P3DConfig), False, "98 MB, 8.8 clips/s, 84.2 %"),
    "3x3x3": (_common(ResNetConfig, spacetime=True), False, "-"),
}


def build(arm: str, seed: int) -> Network:
    """The network of an arm, with new weights: He et al.'s for convolutions, torch's own for the rest."""
    torch.manual_seed(seed)
    network = ARMS[arm][0]()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def batch(size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips (B, 3, 16, 64, 64), about -2 to 2, and the numbers of their motions (B,)."""
    motion_B = torch.randint(len(MOTIONS), (size,), generator=random)
    pixels = clips(motion_B, FRAMES, SIDE, random).permute(0, 4, 1, 2, 3)
    return pixels.float() / 64 - 2, motion_B


def train(arm: str, seed: int, steps: int, until: float) -> Network:
    """A network after `steps` steps of AdamW under a one-cycle rate. TimeoutError if the time is over before."""
    network = build(arm, seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, max(steps + 1, 8), pct_start=0.25)
    random = torch.Generator().manual_seed(CLIP_SEED + seed)
    for step in range(steps):
        clips_BCTHW, motion_B = batch(BATCH, random)
        functional.cross_entropy(network(clips_BCTHW), motion_B, label_smoothing=0.05).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if time.monotonic() > until:
            raise TimeoutError(f"{arm}, seed {seed}: step {step} of {steps} when the time was over")
    return network.eval()


@torch.inference_mode()
def test(network: Network, held_out: int) -> tuple[float, float]:
    """Top-1, and how often the right motion scores higher than its mirror image, both in [0, 1]."""
    random, right, in_pairs = torch.Generator().manual_seed(HELD_OUT_SEED), 0, 0
    for first in range(0, held_out, 32):
        clips_BCTHW, motion_B = batch(min(32, held_out - first), random)
        scores_BK = network(clips_BCTHW)
        right += int((scores_BK.argmax(1) == motion_B).sum())
        own_B, mirrored_B = (scores_BK.gather(1, one[:, None])[:, 0] for one in (motion_B, MIRROR[motion_B]))
        in_pairs += int((own_B > mirrored_B).sum())
    return right / held_out, in_pairs / held_out


def run(arm: str, seed: int, steps: int, held_out: int, minutes: float, folder: Path) -> dict[str, float]:
    """The result of an arm and a seed, computed unless it is there for the same budget."""
    path = folder / f"{arm.replace(' ', '-').replace(',', '')}-{seed}.json"
    budget = {"steps": steps, "batch": BATCH, "held_out": held_out}
    if path.exists() and (found := json.loads(path.read_text()))["budget"] == budget:
        return dict(found["result"])
    began = time.monotonic()
    network = train(arm, seed, steps, began + 60 * minutes)
    top1, in_pairs = test(network, held_out)
    result = {"top1": top1, "in_pairs": in_pairs, "seconds": time.monotonic() - began}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"arm": arm, "seed": seed, "budget": budget, "result": result}) + "\n")
    print(f"{arm}, seed {seed}: top-1 {top1:.3f}, in pairs {in_pairs:.3f}, {result['seconds']:.0f} s", file=sys.stderr)
    return result


def size(arm: str) -> tuple[int, float]:
    """Parameters, and MB of a float32 file with the statistics of normalisations."""
    network = build(arm, 0)
    parameters = sum(one.numel() for one in network.parameters())
    statistics_ = sum(one.numel() for one in network.buffers() if one.ndim)
    return parameters, 4 * (parameters + statistics_) / 1e6


def speeds(arms: list[str], rounds: int) -> dict[str, dict[str, Spread]]:
    """Clips per second to train and to infer, the arms taking turns."""
    clips_BCTHW, motion_B = batch(SPEED_CLIPS, torch.Generator().manual_seed(0))

    def step(network: Network) -> float:
        began = time.perf_counter()
        functional.cross_entropy(network.train()(clips_BCTHW), motion_B).backward()
        return SPEED_CLIPS / (time.perf_counter() - began)

    @torch.inference_mode()
    def infer(network: Network) -> float:
        began = time.perf_counter()
        network.eval()(clips_BCTHW)
        return SPEED_CLIPS / (time.perf_counter() - began)

    networks = {arm: build(arm, 0) for arm in arms}
    found = {}
    for what, work in (("train", step), ("infer", infer)):
        turns = take_turns({arm: partial(work, networks[arm]) for arm in arms}, rounds, "clips/s")
        found[what] = {arm: turns.spread(arm) for arm in arms}
    return found


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--only", choices=("accuracy", "speed"))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--held-out", type=int, default=HELD_OUT, metavar="CLIPS")
    parser.add_argument("--minutes", type=float, default=7, help="of each arm and seed, at most (default 7)")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("ablation", "Ways to see time, on made motions")
    if given.only != "speed":
        rows = []
        for arm in given.arms:
            found = [
                run(arm, seed, given.steps, given.held_out, given.minutes, given.out / "ablation")
                for seed in range(given.seeds)
            ]
            top1, in_pairs = ([100 * one[name] for one in found] for name in ("top1", "in_pairs"))
            spread = f"{statistics.mean(top1):.1f} ({min(top1):.1f} to {max(top1):.1f})"
            pairs = f"{statistics.mean(in_pairs):.1f} ({min(in_pairs):.1f} to {max(in_pairs):.1f})"
            rows.append((arm, spread, pairs, "no" if ARMS[arm][1] else "yes", ARMS[arm][2]))
        heading = f"{given.steps} steps of {BATCH} clips, {given.seeds} seeds, {given.held_out} held-out clips"
        columns = ("arm", "top-1, %", "in pairs, %", "knows the order", "paper: size, speed, UCF101")
        report.add(Table(heading, columns, tuple(rows)))
    if given.only != "accuracy":
        found_speeds = speeds(given.arms, given.rounds)
        rows = []
        for arm in given.arms:
            parameters, megabytes = size(arm)
            trained, inferred = (str(found_speeds[what][arm]) for what in ("train", "infer"))
            rows.append((arm, f"{parameters:,}".replace(",", " "), f"{megabytes:.2f}", trained, inferred))
        columns = ("arm", "parameters", "MB", "train, clips/s", "infer, clips/s")
        report.add(Table(f"Size and speed, batches of {SPEED_CLIPS}", columns, tuple(rows)))
    print(report.write(given.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
