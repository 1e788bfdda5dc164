"""The network's forms on a GPU, each compared with the CPU's features first and then timed against the default form.

    python -m bench.gpu_variants                                     P3D-63 and P3D-199, all precisions, in 8 minutes
    python -m bench.gpu_variants --device cpu --networks p3d63 --batch 2 --rounds 1

An arm starts with clips of uint8 on the device and ends with features there. `distance` is the largest cosine distance
of any row of the batch to the CPU's features of the plain network in fp32. An arm beyond the limit of its precision is
not timed. Each arm takes turns with the default form, so `times` is a ratio within a round. The report is written after
each arm, and no arm but the very first begins after --minutes. On a CPU, arms that need CUDA are listed and not run.

`launch` is the time to submit a batch. A profile of the default form follows each table.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name torch's own documentation gives it
from torch.profiler import ProfilerActivity, profile

from bench.gpu import Device
from bench.rounds import Report, Table, parser_of, per_second, take_turns
from p3d.device import computes_in, set_tf32
from p3d.encoder import MAXIMUM_DISTANCE, golden_clip, golden_features, normalise
from p3d.networks.network import Network
from p3d.networks.planar import PlanarConv
from p3d.prepared import PRECISIONS, prepared
from p3d.preprocessing import ClipRecipe
from p3d.weights import Weights, random_weights

Run = Callable[[Tensor], Tensor]  # clips uint8 (B, T, H, W, C) -> features float32 (B, D), on the device
DEFAULT: Final = "2-D"
FILLED_BYTES = 8 << 30
SHOWN = 25  # operations of a profile
TURNS = 5  # batches in one turn of an arm


@dataclass(frozen=True, slots=True)
class Arm:
    """How the network is changed. `form` as in `p3d.prepared`; `needs_cuda` if a CPU cannot run it."""

    form: str = "planar"
    contiguous: bool = False  # NCDHW in memory
    benchmark: bool = False  # cuDNN tries its algorithms, in each thread for itself
    fused: bool = False  # bias, ReLU and sum within cuDNN's convolution
    compiled: bool = False  # by torch.compile
    graph: bool = False  # all kernels of a batch launched at once
    one_kernel: bool = False  # that normalises frames
    no_indices: bool = False  # of the first pooling's maxima

    @property
    def needs_cuda(self) -> bool:
        return self.benchmark or self.fused or self.graph


ARMS: Final = {
    DEFAULT: Arm(),
    "3-D": Arm("plain"),
    "3-D, contiguous": Arm("plain", contiguous=True),
    "3-D, contiguous, benchmark": Arm("plain", contiguous=True, benchmark=True),
    "3-D, benchmark": Arm("plain", benchmark=True),
    "2-D, benchmark": Arm(benchmark=True),
    "2-D, one normalising kernel": Arm(one_kernel=True),
    "2-D, pooling without indices": Arm(no_indices=True),
    "2-D, fused": Arm(fused=True),
    "2-D, fused, graph": Arm(fused=True, graph=True),
    "2-D, graph": Arm(graph=True),
    "2-D, all but compile": Arm(fused=True, graph=True, one_kernel=True, no_indices=True, benchmark=True),
    "2-D, compile": Arm(compiled=True),  # last, because it takes longest to start
}


class FusedPlanarConv(PlanarConv):
    """A planar convolution whose bias, ReLU and addend are part of cuDNN's kernel."""

    def relu(self, x_BCTHW: Tensor) -> Tensor:
        return self.folded(torch.cudnn_convolution_relu(*self._given(x_BCTHW), *self._how()), x_BCTHW)

    def add_relu(self, x_BCTHW: Tensor, addend_BCTHW: Tensor) -> Tensor:
        # the operation reads the addend in the layout of its output, and memory of another layout as it lies there
        x_NCHW, weight, bias = self._given(x_BCTHW)
        addend_NCHW = self.plane(addend_BCTHW).contiguous(memory_format=torch.channels_last)
        out = torch.cudnn_convolution_add_relu(x_NCHW, weight, addend_NCHW, 1.0, bias, *self._how())
        return self.folded(out, x_BCTHW)

    def _given(self, x_BCTHW: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.plane(x_BCTHW), self.weight, self.bias

    def _how(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups


class PoolWithoutIndices(nn.Module):
    """Max pooling of 2x3x3 with stride 2 by `maximum`, which unlike torch's pooling writes no 64-bit indices."""

    def __init__(self, pool: nn.MaxPool3d) -> None:
        super().__init__()
        self.pad = (0, 1) if pool.padding == 0 else (1, 0)  # the graph "caffe" rounds up, "port" pads before

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        x = torch.maximum(*x_BCTHW.unfold(2, 2, 2).unbind(-1))
        for dim in (3, 4):
            pad = (0, 0) * (4 - dim) + self.pad
            first, second, third = F.pad(x, pad, value=-torch.inf).unfold(dim, 3, 2).unbind(-1)
            x = torch.maximum(torch.maximum(first, second), third)
        return x


def one_kernel(recipe: ClipRecipe, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Frame normalisation as one multiplication and addition per number, which reads uint8 and writes `dtype`."""
    std = torch.tensor(recipe.std, dtype=torch.float32)
    scale = (recipe.value_range / 255 / std).to(device)
    shift = (-torch.tensor(recipe.mean, dtype=torch.float32) / std).to(device)

    def run(clips_BTHWC: Tensor) -> Tensor:
        out = torch.empty(clips_BTHWC.shape, dtype=dtype, device=device)
        return torch.addcmul(shift, clips_BTHWC, scale, out=out).permute(0, 4, 1, 2, 3)

    return run


def arm_of(arm: Arm, weights: Weights, precision: str, device: torch.device, clips: Tensor) -> Run:
    """The function of an arm. `clips` is a batch of the shape that it will get."""
    network, recipe = prepared(weights, precision, arm.form)
    _change(network, arm)
    network.to(device)
    dtype, layout = PRECISIONS[precision], torch.contiguous_format
    if arm.contiguous:
        for conv in network.modules():
            if isinstance(conv, nn.Conv2d | nn.Conv3d):
                conv.weight.data = conv.weight.data.contiguous(memory_format=layout)
    single = one_kernel(recipe, dtype, device)
    features: Callable[[Tensor], Tensor] = torch.compile(network.features) if arm.compiled else network.features

    def run(clips_BTHWC: Tensor) -> Tensor:
        torch.backends.cudnn.benchmark = arm.benchmark
        clips = single(clips_BTHWC) if arm.one_kernel else normalise(clips_BTHWC, recipe).to(dtype)
        return features(clips.contiguous(memory_format=layout) if arm.contiguous else clips)

    return _in_a_graph(run, clips) if arm.graph else run


def _change(network: Network, arm: Arm) -> None:
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if arm.fused and isinstance(child, PlanarConv):
                child.__class__ = FusedPlanarConv
            if arm.no_indices and isinstance(child, nn.MaxPool3d):
                setattr(module, name, PoolWithoutIndices(child))


def _in_a_graph(run: Run, clips: Tensor) -> Run:
    """The kernels of one batch, recorded once. cuDNN chooses its algorithms while it warms up, in this thread."""
    given, stream = clips.clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(given)

    def again(clips_BTHWC: Tensor) -> Tensor:
        given.copy_(clips_BTHWC)
        graph.replay()
        return out

    return again


def distance(found_BD: Tensor, wanted_D: np.ndarray) -> float:
    """The largest cosine distance of a row; NaN if a row has one."""
    found = found_BD.double().cpu().numpy()
    wanted = wanted_D.astype(np.float64)
    return float(np.max(1 - found @ wanted / (np.linalg.norm(found, axis=1) * np.linalg.norm(wanted))))


@torch.inference_mode()
def measure(
    name: str, precision: str, batch: int, device: Device, rounds: int, until: float, report: Report, out: Path
) -> None:
    """Add a table to the report, which is written after each arm."""
    set_tf32(precision == "tf32")
    weights = random_weights(name, 0)
    wanted_D = golden_features(weights)
    clip = torch.from_numpy(golden_clip(weights.recipe)[0]).to(device.device)
    clips_BTHWC = clip.expand(batch, *clip.shape).contiguous()
    default: Run | None = None
    rows: list[tuple[str, ...]] = []
    columns = ("arm", "distance", "clips/s", f"times {DEFAULT}", "launch, ms", "peak GB")
    first = not report.tables  # its default form always runs, so that a report says something
    report.tables.append(Table(f"{name}, {precision}, batches of {batch}", columns, ()))
    for label, arm in ARMS.items():
        row: tuple[str, ...] = (label, "not run", "needs CUDA", "", "", "")
        if device.large or not arm.needs_cuda:
            row = (label, "not run", "out of time", "", "", "")
            if time.monotonic() < until or (first and label == DEFAULT):
                try:
                    run = arm_of(arm, weights, precision, device.device, clips_BTHWC)
                    default = default or run
                    row = _timed(label, run, default, clips_BTHWC, wanted_D, precision, device, rounds)
                except Exception as error:  # noqa: BLE001 - one arm must not end the others
                    row = (label, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", "", "", "")
        rows.append(row)
        print(" | ".join(row), flush=True)
        report.tables[-1] = Table(report.tables[-1].heading, columns, tuple(rows))
        report.write(out)
    if default is not None and time.monotonic() < until:
        heading = f"{name}, {precision}: operations of {DEFAULT} that take longest"
        report.add(profiled(default, clips_BTHWC, device, heading))
        report.write(out)


def _fill_free_memory() -> None:
    """Leave NaN in the memory that the next tensors get.

    In its convolution with ReLU, torch gives the uninitialised output to cuDNN as an addend, times zero (Conv_v8.cpp).
    If cuDNN reads it, NaN stays NaN, and the arm is wrong.
    """
    torch.full((FILLED_BYTES // 4,), torch.nan, device="cuda")  # freed at once, and kept by torch's allocator


def _timed(
    label: str, run: Run, default: Run, clips: Tensor, wanted_D: np.ndarray, precision: str, device: Device, rounds: int
) -> tuple[str, ...]:
    if device.large:
        _fill_free_memory()
        torch.cuda.reset_peak_memory_stats()
    far = distance(run(clips), wanted_D)
    if not far <= MAXIMUM_DISTANCE[precision]:
        return label, f"{far:.1e}", "wrong", "", "", ""

    def arm(of: Run) -> Callable[[], float]:
        def work() -> None:
            for _ in range(TURNS if device.large else 1):
                of(clips)
            device.wait()

        return per_second(work, len(clips) * (TURNS if device.large else 1))

    arms = {DEFAULT: arm(default)} | ({label: arm(run)} if run is not default else {})
    found = take_turns(arms, rounds, "clips/s", tell=lambda _: None)
    peak = f"{torch.cuda.max_memory_allocated() / 1e9:.2f}" if device.large else ""
    started = time.perf_counter()
    run(clips)
    launch_ms = f"{1e3 * (time.perf_counter() - started):.1f}" if device.large else ""  # before the GPU has finished
    device.wait()
    return label, f"{far:.1e}", str(found.spread(label)), str(found.ratio(label, DEFAULT)), launch_ms, peak


@torch.inference_mode()
def profiled(run: Run, clips: Tensor, device: Device, heading: str) -> Table:
    """The operations of one batch that take most of the device's time, the longest first."""
    kinds = [ProfilerActivity.CUDA if device.large else ProfilerActivity.CPU]
    run(clips)
    with profile(activities=kinds) as found:
        run(clips)
        device.wait()
    name = "self_device_time_total" if device.large else "self_cpu_time_total"
    longest = sorted(found.key_averages(), key=lambda one: -float(getattr(one, name)))[:SHOWN]
    rows = tuple((one.key[:100], str(one.count), f"{getattr(one, name) / 1e3:.3f}") for one in longest)
    return Table(heading, ("operation", "calls", "ms"), rows)


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--networks", nargs="+", default=["p3d63", "p3d199"])
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=["bf16", "fp32", "tf32", "fp16"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=8, help="begin no arm after this time (default 8)")
    given = parser.parse_args()
    device, until = Device(given.device), time.monotonic() + 60 * given.minutes
    report = Report("gpu_variants", f"Forms of the network on {device}")
    for precision in given.precisions:
        for name in given.networks:
            if computes_in(precision, device.device):
                measure(name, precision, given.batch, device, given.rounds, until, report, given.out)
    needs = [label for label, arm in ARMS.items() if arm.needs_cuda]
    print(f"\nonly CUDA runs: {'; '.join(needs)}\n{report.write(given.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
