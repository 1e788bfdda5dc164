"""Encoder: frames and clip indices in, one feature row per clip out. It owns device, memory layout and batch shape.

    frames_NHWC uint8 --to the device once--> gather by index_BT --> channel order, mean, std --> network --> rows

Clips overlap, so each frame is transferred once and clips are gathered on the device. The network is a copy with every
batch normalisation folded into its convolution and the first convolution's channels in the order of the frames. On a
CPU its convolutions are packed (`fused.py`). Every batch has the same shape; the last one is padded with its last clip.
On a CPU a row is therefore bit-identical for any neighbours and any position in the batch. It may still differ in the
last bits between batch sizes, thread counts, torch versions and processors.

Several threads may encode at once, each in its own CUDA stream. On a GPU the frames of one batch are copied from pinned
memory while another batch is computed.

Precision: in bf16 and fp16 the convolutions, their folded weights and the activations between them have 16 bits. Frame
normalisation, averages, the classifier and all outputs are float32. Only the frames are cast to the lower precision.

Shapes: N frames, B clips, T frames per clip, H height, W width, C channels, D features, K classes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from p3d.networks.fused import can_pack, keep_freed_memory, pack
from p3d.networks.model import P3D, fold
from p3d.preprocessing import ClipRecipe
from p3d.weights.record import Weights

Frames = npt.NDArray[np.uint8]
Index = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float32]

PRECISIONS: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Minimum cosine of a device's golden features with the CPU's in float32; measured values: docs/measurements.md.
MINIMUM_COSINE: Final = {"fp32": 0.9999, "bf16": 0.999, "fp16": 0.9999}


class DeviceFull(RuntimeError):
    """The device's memory cannot hold even one clip. No video causes this: all clips have the same size."""


class GoldenMismatch(RuntimeError):
    """This device's features differ from the CPU's: a wrong driver, library or precision, or damaged weights."""


def device_for(wish: str) -> torch.device:
    """The torch device for "auto", "cpu", "cuda", "cuda:N" or "mps"; "auto" is CUDA if available, else CPU, never mps.

    Raises ValueError for any other string and for a device that this machine does not have.
    """
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, colon, number = wish.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (colon and not (kind == "cuda" and number.isascii() and number.isdigit())):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, not {wish!r}")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {wish} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices here")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps was asked for, but torch sees none here")
    return torch.device(wish)


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bf16, and torch uses them."""
    onednn: Any = torch.backends.mkldnn  # untyped
    return bool(onednn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def computes_in(precision: str, device: torch.device) -> bool:
    """Whether `check_precision` accepts this precision on this device."""
    try:
        check_precision(precision, device)
    except ValueError:
        return False
    return True


def check_precision(precision: str, device: torch.device) -> None:
    """Raise ValueError unless `precision` is known and useful on this device.

    On a CPU, bf16 needs native instructions (such as AVX-512 BF16 or AMX). fp16 is refused there: on a CPU without fp16
    instructions torch is twenty times slower in fp16 than in fp32 (measured), and other CPUs can use bf16.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if precision == "fp32" or device.type == "cuda":
        return
    if device.type != "cpu":
        raise ValueError(f"precision {precision} was never tried on {device}; use fp32 there")
    if precision == "fp16":
        raise ValueError("precision fp16 is for CUDA devices: a CPU would be many times slower; use bf16 or fp32 there")
    if not cpu_has_bf16():
        raise ValueError("precision bf16 needs a CPU with instructions for it, which this one lacks; use fp32 here")


class Encoder:
    """Weights ready to run on one device in one precision.

    It takes `Weights`, not a network, so that an untrained network cannot be used by accident.
    `batch_size` clips are computed at a time; it is halved permanently when the device runs out of memory.
    `threads` sets torch's CPU threads for the whole process (None leaves them). The given network is not modified.
    Two settings are process-wide: on a CPU freed memory is kept (`fused.keep_freed_memory`), and on CUDA TF32 is turned
    off, because it costs three digits of accuracy. Threads that share cores with other work need
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
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        folded = copy.deepcopy(network).eval()
        fold(folded)
        self._as_read = recipe
        if recipe.channel_order == "bgr":  # flipping the filters once saves flipping the channels of every clip
            stem = folded.get_submodule(folded.stem)
            assert isinstance(stem.weight, Tensor)
            stem.weight.data = stem.weight.data.flip(1)
            mean, std = recipe.mean[::-1], recipe.std[::-1]
            self._as_read = dataclasses.replace(recipe, channel_order="rgb", mean=mean, std=std)
        # Channels last is the layout of the gathered frames already. P3D-63, 4 clips of 16x160x160, CPU with 2 threads,
        # median of 5 interleaved rounds: 0.75 s, compared with 1.24 s contiguous; features differ by 4e-7.
        for conv in folded.modules():
            if isinstance(conv, nn.Conv2d | nn.Conv3d):
                layout = torch.channels_last if isinstance(conv, nn.Conv2d) else torch.channels_last_3d
                conv.to(PRECISIONS[precision])  # the classifier keeps float32
                conv.weight.data = conv.weight.data.contiguous(memory_format=layout)
        if can_pack(self.device):
            pack(folded)
            keep_freed_memory()
        self._network = folded.to(self.device)
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
        if unknown := [name for name in layers if name not in self.layer_names]:
            raise ValueError(f"{self.name} has no layer {unknown[0]!r}; there are {', '.join(self.layer_names)}")
        while True:
            size = self.batch_size
            try:
                with self._own_stream():
                    return self._encode(frames_NHWC, index_BT, layers, size)
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise DeviceFull(f"{self.device} cannot fit one clip of {self.name} in memory ({error})") from None
                with self._halving:  # halve once, even if several threads ran out of memory
                    self.batch_size = min(self.batch_size, size // 2)
            torch.cuda.empty_cache()  # outside the handler, where the error still references the tensors

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
        batches = []
        for start in range(0, clips, size):
            positions = torch.arange(start, start + size, device=self.device).clamp_(max=clips - 1)
            # index_select copies whole frames; frames[index_BT] took fifteen times as long for the same bytes
            chosen_BT = all_BT[positions]
            clips_BTHWC = frames.index_select(0, chosen_BT.flatten()).view(*chosen_BT.shape, *frames.shape[1:])
            batches.append(self._run(normalise(clips_BTHWC, self._as_read), layers))
        return MappingProxyType({name: _joined([batch[name] for batch in batches], clips) for name in layers})

    def _run(self, clips_BCTHW: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """The layers of one batch, on the device."""
        clips_BCTHW = clips_BCTHW.to(PRECISIONS[self.precision])
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

    def _to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        """On the device. The staging copy is ours because the caller's array may be read-only shared memory."""
        if self.device.type == "cpu" and array.flags.writeable and array.flags.c_contiguous:
            return torch.from_numpy(array)
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


def check_golden(encoder: Encoder, expected_D: Rows, minimum_cosine: float | None = None) -> None:
    """Raise GoldenMismatch unless the golden clip gives `expected_D`: by cosine, and by length within 1%.

    The default minimum cosine depends on the encoder's precision (MINIMUM_COSINE). A NaN cosine is a mismatch.
    """
    minimum_cosine = MINIMUM_COSINE[encoder.precision] if minimum_cosine is None else minimum_cosine
    found_D = encoder.encode(*golden_clip(encoder.recipe))[0].astype(np.float64)
    wanted_D = expected_D.astype(np.float64)
    if found_D.shape != wanted_D.shape:
        raise GoldenMismatch(f"{encoder.name} gives {len(found_D)} features and the golden ones are {len(wanted_D)}")
    found, wanted = float(np.linalg.norm(found_D)), float(np.linalg.norm(wanted_D))
    cosine = float(found_D @ wanted_D) / (found * wanted) if found * wanted else math.nan
    if not (cosine >= minimum_cosine and abs(found / wanted - 1) <= 0.01):  # also true for NaN
        raise GoldenMismatch(
            f"{encoder.name} on {encoder.device} in {encoder.precision} does not reproduce the golden features: "
            f"{cosine = :.6f} (at least {minimum_cosine}), length {found:.4g} for {wanted:.4g}; "
            "check the driver, the torch build and the weights file, or run on another device"
        )


def _joined(batches: list[Tensor], clips: int) -> Rows:
    """The rows of all batches as one array on the host, without the padding of the last batch."""
    rows: Rows = torch.cat(batches)[:clips].contiguous().cpu().numpy()
    return rows
