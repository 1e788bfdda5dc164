"""The network on a GPU, alone and with its copies, compared with the peaks of its matrix products and memory.

    python -m bench.gpu                       P3D-199 on the GPU, fp32, bf16 and fp16, batches of 8 to 64
    python -m bench.gpu --device cpu --networks p3d63 --precisions fp32 --batches 1 --rounds 1

"Network" is the Encoder's network on clips that are on the device already. "Encoder" begins with uint8 frames and ends
with feature rows on the host, in as many threads as a job's worker has. The roofline of a clip is a sum over its
convolutions of the longer of two times: multiply-adds over the rate of a matrix product in that precision, and bytes of
input, output and weights, each once, over the rate at which a copy reads and writes. All arms take turns (`rounds.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.model import frames_of
from bench.plain import PlainP3D
from bench.rounds import Report, Rounds, Table, parser_of, per_second, take_turns
from p3d.device import check_precision, device_for
from p3d.encoder import Encoder, normalise
from p3d.jobs.machine import inference_threads_of, usable_cpus
from p3d.prepared import PRECISIONS
from p3d.weights import random_weights

TURNS = 4  # batches per inference thread in one turn of an arm


@dataclass(frozen=True, slots=True)
class Conv:
    """One convolution of a clip: multiply-adds, numbers read and written, and weights, read once per batch."""

    macs: float
    numbers: int
    weights: int


def convs_of(name: str, hw: tuple[int, int]) -> list[Conv]:
    """Every convolution of a P3D of the authors' graph on one clip of 16 frames, found without computing."""
    found: list[Conv] = []

    def count(conv: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d | nn.Conv3d)
        macs = out.numel() * conv.weight[0].numel()
        found.append(Conv(macs, given[0].numel() + out.numel(), conv.weight.numel()))

    with torch.device("meta"), torch.inference_mode():
        network = PlainP3D(name, "caffe").eval()
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module.register_forward_hook(count)
        network(torch.zeros(1, 3, 16, *hw))
    return found


def roofline_s(convs: list[Conv], width: int, batch: int, macs_per_s: float, bytes_per_s: float) -> float:
    """The minimum seconds per clip: arithmetic or memory limits each convolution. `width` is bytes per number."""
    return sum(
        max(conv.macs / macs_per_s, (conv.numbers + conv.weights / batch) * width / bytes_per_s) for conv in convs
    )


class Device:
    """A device, its synchronisation, and its peaks."""

    def __init__(self, name: str) -> None:
        self.device = device_for(name)
        self.large = self.device.type == "cuda"

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)

    def __str__(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)

    def product(self, precision: str) -> Callable[[], float]:
        """An arm: 1e9 multiply-adds per second of a large matrix product."""
        side = 8192 if self.large else 1024
        a, b = (torch.randn(side, side, device=self.device).to(PRECISIONS[precision]) for _ in range(2))

        def work() -> None:
            for _ in range(TURNS):
                a @ b
            self.wait()

        return per_second(work, TURNS * side**3 / 1e9)

    def copies(self) -> Callable[[], float]:
        """An arm: 1e9 bytes per second that a copy within the device's memory reads and writes."""
        size = (4 << 30) if self.large else (64 << 20)
        a, b = (torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(2))

        def work() -> None:
            for _ in range(TURNS):
                b.copy_(a)
            self.wait()

        return per_second(work, TURNS * 2 * size / 1e9)


@torch.inference_mode()
def network_arm(encoder: Encoder, device: Device, batch: int, frames: tuple) -> Callable[[], float]:  # type: ignore[type-arg]
    """Clips/s of the network alone: normalised clips are on the device, features stay there."""
    frames_NHWC, index_BT = frames
    clips_BTHWC = torch.from_numpy(frames_NHWC[index_BT]).to(device.device)
    clips_BCTHW = normalise(clips_BTHWC, encoder.recipe).to(PRECISIONS[encoder.precision])

    @torch.inference_mode()
    def work() -> None:
        for _ in range(TURNS):
            encoder._network.features(clips_BCTHW)
        device.wait()

    return per_second(work, TURNS * batch)


def encoder_arm(encoder: Encoder, device: Device, batch: int, frames: tuple) -> Callable[[], float]:  # type: ignore[type-arg]
    """Clips/s of the Encoder as a worker calls it: frames from the host, rows to it, in overlapping threads."""
    inference_threads = inference_threads_of(device.device.type, usable_cpus(), max(1, usable_cpus() // 2))
    pool = ThreadPoolExecutor(inference_threads)

    def thread(_: int) -> None:
        for _ in range(TURNS):
            encoder.encode(*frames)

    return per_second(lambda: list(pool.map(thread, range(inference_threads))), inference_threads * TURNS * batch)


def table_of(name: str, precision: str, batches: list[int], device: Device, rounds: int) -> Table:
    """One network in one precision."""
    weights = random_weights(name, 0)
    convs = convs_of(name, weights.recipe.crop_hw)
    arms = {"matrix product, GMAC/s": device.product(precision), "copy, GB/s": device.copies()}
    for batch in batches:
        encoder = Encoder(weights, device=str(device.device), batch_size=batch, precision=precision)
        frames = frames_of(weights, batch)
        encoder.encode(*frames)
        if encoder.batch_size < batch:
            print(f"{name} in {precision}: not enough memory for a batch of {batch}")
            break
        arms[f"network, {batch}"] = network_arm(encoder, device, batch, frames)
        arms[f"Encoder, {batch}"] = encoder_arm(encoder, device, batch, frames)
    found = take_turns(arms, rounds, "per second")
    width = PRECISIONS[precision].itemsize
    rows = [(arm, str(found.spread(arm)), "", "") for arm in list(arms)[:2]]
    rows += [_row(found, arm, convs, width) for arm in list(arms)[2:]]
    heading = f"{name}, {precision}: clips per batch; {sum(one.macs for one in convs) / 1e9:.1f} GMAC per clip"
    return Table(heading, ("arm", "clips/s", "of the roofline", "of the network alone"), tuple(rows), found)


def _row(found: Rounds, arm: str, convs: list[Conv], width: int) -> tuple[str, str, str, str]:
    """One row; shares are taken per round."""
    batch = int(arm.rpartition(" ")[2])
    peaks = zip(found.of["matrix product, GMAC/s"], found.of["copy, GB/s"], strict=True)
    limit = [1 / roofline_s(convs, width, batch, macs * 1e9, moved * 1e9) for macs, moved in peaks]
    of_limit = Rounds("share", {"arm": found.of[arm], "limit": limit}).ratio("arm", "limit")
    alone = "" if arm.startswith("network") else str(found.ratio(arm, f"network, {batch}"))
    return arm, str(found.spread(arm)), str(of_limit), alone


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--networks", nargs="+", default=["p3d199"], help="of p3d63, p3d131 and p3d199 (default: p3d199)"
    )
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32, 64])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    device = Device(given.device)
    for precision in given.precisions:
        check_precision(precision, device.device)
    report = Report("gpu", f"The network on {device}")
    for name in given.networks:
        for precision in given.precisions:
            report.add(table_of(name, precision, given.batches, device, given.rounds))
    print(f"\n{report.write(given.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
