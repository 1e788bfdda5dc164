"""Encoder: frames and clip indices in, one feature row per clip out. It owns device, memory layout and batch shape.

    frames_NHWC uint8 --to the device once--> gather by index_BT --> channel order, mean, std --> network --> rows

Clips overlap, so each frame is transferred once and clips are gathered on the device. The network is a copy, prepared
for the device (`prepared.py`). Every batch has the same shape; the last one is padded with its last clip. On a CPU a
row is therefore bit-identical for any neighbours and any position in the batch. It may still differ in the last bits
between batch sizes, thread counts, torch versions and processors.

Several threads may encode at once, each in its own CUDA stream. On a GPU the frames of one batch are copied from pinned
memory while another batch is computed.

Precision: in tf32, convolutions and the classifier multiply with fewer digits. In bf16 and fp16 the convolutions,
their folded weights and the activations between them have 16 bits. Frame normalisation, averages, the classifier and
all outputs are float32. Only the frames are cast to the lower precision.

Shapes: N frames, B clips, T frames per clip, H height, W width, C channels, D features, K classes.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from p3d.device import (
    BusyTime,
    DeviceFull,
    NoKernel,
    check_precision,
    device_for,
    has_no_engine,
    is_full,
    set_tf32,
)
from p3d.networks.fused import keep_freed_memory
from p3d.networks.model import P3D
from p3d.prepared import PRECISIONS, form_for, prepared
from p3d.preprocessing import ClipRecipe
from p3d.weights.record import Weights

Frames = npt.NDArray[np.uint8]
Index = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float32]

# Maximum cosine distance (1 - cosine) between a device's golden features and those of the CPU in float32. TF32 alone
# makes 3e-7 to 5e-7, so a GPU that uses it although fp32 was asked for is found (docs/log/2026-11-30-measurements.md).
MAXIMUM_DISTANCE: Final = {"fp32": 1e-8, "tf32": 1e-5, "bf16": 1e-3, "fp16": 1e-4}


class GoldenMismatch(RuntimeError):
    """This device's features differ from the CPU's: a wrong driver, library or precision, or damaged weights."""


class Encoder:
    """Weights ready to run on one device in one precision.

    It takes `Weights`, not a network, so that an untrained network cannot be used by accident.
    `batch_size` clips are computed at a time; it is halved permanently when the device runs out of memory.
    `threads` sets torch's CPU threads for the whole process (None leaves them). The given network is not modified.
    `form` is one of `prepared.FORMS`; None takes the device's own. `busy` counts the time in which a GPU computes.
    Two settings are process-wide: on a CPU freed memory is kept (`fused.keep_freed_memory`). On CUDA each call turns
    TF32 on in precision tf32 and otherwise off, because it costs three digits of accuracy, so Encoders of fp32 and tf32
    must not encode at the same time in one process. Threads that share cores with other work need
    OMP_WAIT_POLICY=passive before torch is imported. Threads that encode concurrently need MALLOC_ARENA_MAX=1 before
    Python starts. Raises ValueError for invalid options and TypeError for an argument that is not `Weights`.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        device: str = "cpu",
        batch_size: int = 8,
        threads: int | None = None,
        precision: str = "fp32",
        form: str | None = None,
    ) -> None:
        if batch_size < 1 or (threads is not None and threads < 1):
            raise ValueError(f"an encoder needs at least one: {batch_size = }, {threads = }")
        if not isinstance(weights, Weights):
            raise TypeError(f"an encoder takes weights, from p3d.weights, and not a {type(weights).__name__}")
        network, recipe = weights.network, weights.recipe
        if recipe.channels != network.config.in_channels:
            raise ValueError(
                f"the clip recipe has {recipe.channels} channels, "
                f"but {network.config.name} takes {network.config.in_channels}"
            )
        self.device = device_for(device)
        check_precision(precision, self.device)
        if precision not in network.precisions:
            raise ValueError(f"{network.config.name} runs in {' or '.join(network.precisions)}, not in {precision}")
        self.precision = precision
        self.recipe = recipe
        self.batch_size = batch_size
        self.name = network.config.name
        self.feature_dim = network.feature_dim
        if threads is not None:
            torch.set_num_threads(threads)
        if self.device.type == "cpu":
            keep_freed_memory()
        ready, self._as_read = prepared(weights, precision, form or form_for(self.device))
        self._network = ready.to(self.device)
        self.busy = BusyTime() if self.device.type == "cuda" else None
        self._of_thread = threading.local()
        self._halving = threading.Lock()

    @overload
    def encode(self, frames_NHWC: Frames, index_BT: Index, probs: Literal[False] = False) -> Rows: ...

    @overload
    def encode(self, frames_NHWC: Frames, index_BT: Index, probs: Literal[True]) -> tuple[Rows, Rows]: ...

    def encode(self, frames_NHWC: Frames, index_BT: Index, probs: bool = False) -> Rows | tuple[Rows, Rows]:
        """Return float32 features_BD of the clips given by frame indices `index_BT` (int64).

        With `probs`, also return their softmax scores_BK (float32). Frames are uint8, RGB or two-channel optical flow,
        at the recipe's crop size. The arrays may be read-only and need not be contiguous. Raises ValueError for wrong
        shapes, dtypes or indices, and DeviceFull if not even one clip fits into the device's memory.
        """
        layers = self.encode_layers(frames_NHWC, index_BT, ("pool5", "prob") if probs else ("pool5",))
        return (layers["pool5"], layers["prob"]) if probs else layers["pool5"]

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Layers that `encode_layers` can return: the four of the paper's ASLAN test, two of them under two names.

        Networks other than P3D have only "pool5", which stands for their features, and "prob".
        """
        if not isinstance(self._network, P3D):
            return "prob", "pool5"
        config = self._network.config
        return "prob", "pool5", "res5", config.last_block(5), "res4", config.last_block(4)

    @torch.inference_mode()
    def encode_layers(self, frames_NHWC: Frames, index_BT: Index, layers: Sequence[str]) -> Mapping[str, Rows]:
        """Return each of `layers` (see `layer_names`) for the clips, float32; same arguments and errors as `encode`.

        With H x W pixels and 16 frames: prob (B, K), pool5 (B, 2048), res5 (B, 2048, H/32, W/32), and res4 before its
        temporal pool (B, 1024, 2, H/16, W/16). "pool5" and "prob" are bit-identical to those of `encode`.
        """
        self._check(frames_NHWC, index_BT)
        if self.device.type == "cuda":
            set_tf32(self.precision == "tf32")
        if unknown := [name for name in layers if name not in self.layer_names]:
            raise ValueError(f"{self.name} has no layer {unknown[0]!r}; there are {', '.join(self.layer_names)}")
        while True:
            size = self.batch_size
            try:
                with self._own_stream():
                    return self._encode(frames_NHWC, index_BT, layers, size)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not (is_full(error) or has_no_engine(error)):
                    raise
                if size == 1:
                    raise self._one_clip_fails(error) from None
                with self._halving:  # halve once, even if several threads ran out of memory
                    self.batch_size = min(self.batch_size, size // 2)
            torch.cuda.empty_cache()  # outside the handler, where the error still references the tensors

    def _one_clip_fails(self, error: Exception) -> RuntimeError:
        if is_full(error):
            return DeviceFull(f"{self.device} cannot fit one clip of {self.name} in memory ({error})")
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        return NoKernel(
            f"{gpu} cannot compute even one clip of {self.name} in {self.precision} ({error}): its memory is "
            "full, or this build of torch has no convolution for this GPU in this precision; free its memory, or try "
            "--precision fp32"
        )

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[None]:
        """Run this thread's copies and kernels in its own stream, independent of other threads. No effect on a CPU."""
        if self.device.type == "mps":  # mps has no streams
            yield
            return
        streams = torch.get_device_module(self.device)
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = streams.Stream(self.device)
        with streams.stream(self._of_thread.stream):
            yield

    def _encode(self, frames_NHWC: Frames, index_BT: Index, layers: Sequence[str], size: int) -> Mapping[str, Rows]:
        clips = len(index_BT)
        if not clips:  # run one black clip only to learn the shapes
            black = np.zeros((1, *self.recipe.crop_hw, self.recipe.channels), np.uint8)
            of_one = self._encode(black, np.zeros((1, self.recipe.n_frames), np.int64), layers, size)
            return MappingProxyType({name: rows[:0] for name, rows in of_one.items()})
        frames = self._to_device(frames_NHWC)
        all_BT = self._to_device(index_BT)
        before = self._now()
        batches = [self._run(frames, all_BT, start, size, layers) for start in range(0, clips, size)]
        after = self._now()
        rows = {name: _joined([batch[name] for batch in batches], clips) for name in layers}
        if self.busy is not None:
            self.busy.count(before, after)  # both have happened, since the rows are on the host
        return MappingProxyType(rows)

    def _now(self) -> Any:
        """An event in this thread's CUDA stream; None on other devices."""
        if self.busy is None:
            return None
        event: Any = torch.cuda.Event  # untyped
        now = event(enable_timing=True)
        now.record()
        return now

    def _run(
        self, frames_NHWC: Tensor, index_BT: Tensor, start: int, size: int, layers: Sequence[str]
    ) -> dict[str, Tensor]:
        """The layers of a batch of `size` clips from clip `start` on, all on the device."""
        positions = torch.arange(start, start + size, device=index_BT.device).clamp_(max=len(index_BT) - 1)
        # index_select copies whole frames; frames[index_BT] took fifteen times as long for the same bytes
        chosen_BT = index_BT.index_select(0, positions)
        clips_BTHWC = frames_NHWC.index_select(0, chosen_BT.flatten()).view(*chosen_BT.shape, *frames_NHWC.shape[1:])
        clips_BCTHW = normalise(clips_BTHWC, self._as_read).to(PRECISIONS[self.precision])
        if isinstance(self._network, P3D) and not set(layers) <= {"pool5", "prob"}:
            maps = self._network.activations(clips_BCTHW)
            found = {"pool5": maps.pool5_BD, "res5": maps.res5_BCHW, "res4": maps.res4_BCTHW}
        else:
            found = {"pool5": self._network.features(clips_BCTHW)}
        if "prob" in layers:
            # One row at a time: threads split a five-row product so that bits depend on the row's position (observed).
            rows = torch.split(found["pool5"], 1)
            found["prob"] = torch.cat([self._network.classify(row).softmax(dim=1) for row in rows])
        return {name: found[name if name in found else name[:4]] for name in layers}  # "res4f" is an alias of "res4"

    def new_buffer(self, n_bytes: int) -> Frames:
        """Memory for frames, uint8 [n_bytes], from which `encode` copies to the device without a copy of its own.

        On CUDA it is pinned. The caller may overwrite it once `encode` has returned, since results are then on the
        host, and the copy came before them in the same stream.
        """
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda").numpy()

    def _to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        """On the device. The staging copy is ours because the caller's array may be read-only shared memory."""
        if array.flags.writeable and array.flags.c_contiguous:
            held = torch.from_numpy(array)
            if self.device.type == "cpu":
                return held
            if self.device.type == "cuda" and held.is_pinned():  # as from `new_buffer`
                return held.to(self.device, non_blocking=True)
        dtype = torch.uint8 if array.dtype == np.uint8 else torch.int64
        staging = torch.empty(array.shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        np.copyto(staging.numpy(), array)
        return staging.to(self.device, non_blocking=True)  # torch keeps pinned memory until the copy has finished

    def _check(self, frames_NHWC: Frames, index_BT: Index) -> None:
        expected = (*self.recipe.crop_hw, self.recipe.channels)
        if frames_NHWC.dtype != np.uint8 or frames_NHWC.ndim != 4 or frames_NHWC.shape[1:] != expected:
            raise ValueError(
                f"frames must be uint8 of (N, {', '.join(map(str, expected))}), "
                f"not {frames_NHWC.dtype} of {frames_NHWC.shape}"
            )
        if index_BT.dtype != np.int64 or index_BT.ndim != 2 or index_BT.shape[1] != self.recipe.n_frames:
            raise ValueError(
                f"clip indices must be int64 of (B, {self.recipe.n_frames}), not {index_BT.dtype} of {index_BT.shape}"
            )
        if index_BT.size and (index_BT.min() < 0 or index_BT.max() >= len(frames_NHWC)):
            raise ValueError(
                f"clip indices span {index_BT.min()} to {index_BT.max()}, but there are {len(frames_NHWC)} frames"
            )


def normalise(clips_BTHWC: Tensor, recipe: ClipRecipe) -> Tensor:
    """Convert RGB bytes to network input: uint8 (B, T, H, W, C) -> float32 (B, C, T, H, W), channels last."""
    if recipe.channel_order == "bgr":
        clips_BTHWC = clips_BTHWC.flip(-1)
    values_BTHWC = clips_BTHWC.float().contiguous()
    # Work on whole rows of pixels: on a CPU an inner loop over three channels takes nine times as long.
    lines_BTHL = values_BTHWC.flatten(-2)
    width, device = clips_BTHWC.shape[3], clips_BTHWC.device
    if recipe.value_range != 255:
        lines_BTHL.div_(255 / recipe.value_range)
    lines_BTHL.sub_(_line(recipe.mean, width, device))
    if any(std != 1 for std in recipe.std):
        lines_BTHL.div_(_line(recipe.std, width, device))
    return values_BTHWC.permute(0, 4, 1, 2, 3)


@functools.lru_cache(maxsize=16)
def _line(values: tuple[float, ...], width: int, device: torch.device) -> Tensor:
    """A row of pixels that all have these values, cached: on a GPU each new one would be a blocking copy."""
    with torch.inference_mode(False):
        return torch.tensor(values * width, dtype=torch.float32, device=device)


def golden_clip(recipe: ClipRecipe) -> tuple[Frames, Index]:
    """One clip that is the same on every machine: slanted gradients that move differently per channel; integers only.

    Returns frames uint8 (T, H, W, C) and index int64 (1, T).
    """
    height, width = recipe.crop_hw
    t, y, x, c = np.ogrid[: recipe.n_frames, :height, :width, : recipe.channels]
    frames_NHWC = ((3 + 2 * c) * x + (5 - 3 * c) * y + (7 + 4 * c) * t + x * y // 16) % 256
    return frames_NHWC.astype(np.uint8), np.arange(recipe.n_frames, dtype=np.int64)[None]


@torch.inference_mode()
def golden_features(weights: Weights) -> Rows:
    """The expected features of the golden clip: (D,), from the unfolded network on the CPU in float32."""
    frames_NHWC, index_BT = golden_clip(weights.recipe)
    clips_BTHWC = torch.from_numpy(frames_NHWC)[torch.from_numpy(index_BT)]
    expected_D: Rows = weights.network.features(normalise(clips_BTHWC, weights.recipe))[0].numpy()
    return expected_D


def check_golden(encoder: Encoder, expected_D: Rows, most: float | None = None) -> None:
    """Raise GoldenMismatch unless every row of a full batch of golden clips gives `expected_D`.

    Compared by cosine distance, at most `most` (by default MAXIMUM_DISTANCE of the precision), and by length within 1%.
    A NaN is a mismatch. All rows count, because errors with large tensors show in the last rows of a batch.
    """
    most = MAXIMUM_DISTANCE[encoder.precision] if most is None else most
    frames_NHWC, index_BT = golden_clip(encoder.recipe)
    found_BD = encoder.encode(frames_NHWC, np.repeat(index_BT, encoder.batch_size, axis=0)).astype(np.float64)
    wanted_D = expected_D.astype(np.float64)
    if found_BD.shape[1:] != wanted_D.shape:
        raise GoldenMismatch(
            f"{encoder.name} gives {found_BD.shape[1]} features and the golden ones are {len(wanted_D)}"
        )
    wanted = float(np.linalg.norm(wanted_D))
    for row, found_D in enumerate(found_BD):
        found = float(np.linalg.norm(found_D))
        distance = 1 - float(found_D @ wanted_D) / (found * wanted) if found * wanted else math.nan
        if not (distance <= most and abs(found / wanted - 1) <= 0.01):  # also true for NaN
            raise GoldenMismatch(
                f"{encoder.name} on {encoder.device} in {encoder.precision} does not reproduce the golden features in "
                f"row {row + 1} of {len(found_BD)}: cosine distance {distance:.2g} (at most {most:.2g}), length "
                f"{found:.4g} for {wanted:.4g}; check the driver, the torch build and the weights file, or run on "
                "another device"
            )


def _joined(batches: list[Tensor], clips: int) -> Rows:
    """The rows of all batches as one array on the host, without the padding of the last batch."""
    rows: Rows = torch.cat(batches)[:clips].contiguous().cpu().numpy()
    return rows
