"""Encoder: frames and clip indices in, one feature row a clip out. It owns the device, the layout and the batch shape.

    frames_NHWC uint8 --to the device once--> gather by index_BT --> channel order, mean, std --> network --> rows

Clips overlap, so frames travel and clips are gathered here. The network is a copy with every batch normalisation folded
into its convolution and the first convolution's channels in the frames' own order; on a CPU its convolutions are packed
(`fused.py`). Every batch has the same shape, the last one padded by its last clip, so that on the CPU a row is
bit-identical whatever its neighbours and wherever it stands; it may still differ in the last bits between batch sizes,
thread counts, torch versions and processors.

Several threads may encode at once, each in a stream of its own: on a GPU the frames of one batch travel, from pinned
memory, while another is computed.

Precision: in bf16 and fp16 the convolutions, their folded weights and what lies between them have 16 bits. Normalising
the frames, the averages, the classifier and all that comes out are float32. Nothing is cast on the way but the frames.

Shapes: N frames, B clips, T frames a clip, H height, W width, C channels, D features, K classes.
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
from typing import Final, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from p3d.networks.fused import can_pack, keep_freed_memory, pack
from p3d.networks.model import P3D, fold
from p3d.recipe import ClipRecipe
from p3d.weights.record import Weights

Frames = npt.NDArray[np.uint8]
Index = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float32]

PRECISIONS: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The least cosine of a device's golden features with the CPU's in float32; docs/measurements.md has what was seen.
MINIMUM_COSINE: Final = {"fp32": 0.9999, "bf16": 0.999, "fp16": 0.9999}


class DeviceFull(RuntimeError):
    """The device has no room for a single clip. No video is to blame: all clips have one size."""


class GoldenMismatch(RuntimeError):
    """This device does not compute what the CPU computed: a wrong driver, library, precision or damaged weights."""


def device_for(wish: str) -> torch.device:
    """The device of "auto", "cpu", "cuda", "cuda:N" or "mps"; "auto" is CUDA if there is one, else the CPU, never mps.

    Raises ValueError for another word or a device this machine does not have.
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


def check_precision(precision: str, device: torch.device) -> None:
    """Raise ValueError unless `precision` is known and worth having on this device.

    On a CPU, bf16 needs its instructions (AVX-512 BF16, AMX or the like). fp16 is refused there: torch computes it
    twenty times slower than fp32 on a CPU without instructions for it (measured), and bf16 is there for the others.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if precision == "fp32" or device.type == "cuda":
        return
    if device.type != "cpu":
        raise ValueError(f"precision {precision} was never tried on {device}; use fp32 there")
    if precision == "fp16":
        raise ValueError("precision fp16 is for CUDA devices: a CPU would be many times slower; use bf16 or fp32 there")
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ValueError("precision bf16 needs a CPU with instructions for it, which this one lacks; use fp32 here")


class Encoder:
    """Weights ready to run, on one device, in one precision.

    It takes `Weights` and not a network, so that numbers which nobody trained or asked for by name cannot get in.
    `batch_size` clips are computed at a time; it is halved, for good, where the device has no room for so many.
    `threads` sets torch's CPU threads for the whole process (None leaves them). The given network is not touched. For
    the whole process too, on a CPU freed memory is kept (`fused.keep_freed_memory`), and on CUDA TF32 is turned off: it
    costs three digits. Threads that share their cores with other work want OMP_WAIT_POLICY=passive in the environment
    before torch is imported, and several that encode at once MALLOC_ARENA_MAX=1 before Python begins.
    Raises ValueError for options that do not fit.
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
        if recipe.channel_order == "bgr":  # turning the filters once is turning every clip, for nothing
            stem = folded.get_submodule(folded.stem)
            assert isinstance(stem.weight, Tensor)
            stem.weight.data = stem.weight.data.flip(1)
            mean, std = recipe.mean[::-1], recipe.std[::-1]
            self._as_read = dataclasses.replace(recipe, channel_order="rgb", mean=mean, std=std)
        # Channels last in memory, which is how the gathered frames lie anyway. P3D-63, 4 clips of 16x160x160, CPU with
        # 2 threads, median of 5 interleaved rounds: 0.75 s, against 1.24 s contiguous; features differ by 4e-7.
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
        """features_BD of the clips whose frames `index_BT` names, and with `probs` also their softmax scores_BK.

        Frames are RGB (or two channels of flow) uint8 at the recipe's crop size; the arrays may be read-only and need
        not be contiguous. Raises ValueError for wrong shapes, dtypes or indices, DeviceFull where not one clip fits.
        """
        layers = self.encode_layers(frames_NHWC, index_BT, ("pool5", "prob") if probs else ("pool5",))
        return (layers["pool5"], layers["prob"]) if probs else layers["pool5"]

    @property
    def layer_names(self) -> tuple[str, ...]:
        """What `encode_layers` can give: the four layers of the paper's ASLAN test, two of them under two names.

        Other networks than P3D have "pool5", which is their features whatever they call them, and "prob".
        """
        if not isinstance(self._network, P3D):
            return "prob", "pool5"
        config = self._network.config
        return "prob", "pool5", "res5", config.last_block(5), "res4", config.last_block(4)

    @torch.inference_mode()
    def encode_layers(self, frames_NHWC: Frames, index_BT: Index, layers: Sequence[str]) -> Mapping[str, Rows]:
        """Each of `layers` (see `layer_names`) of the clips, float32; takes and raises what `encode` does.

        With H x W pixels and 16 frames: prob (B, K), pool5 (B, 2048), res5 (B, 2048, H/32, W/32), res4, before its
        temporal pool, (B, 1024, 2, H/16, W/16). "pool5" and "prob" are those of `encode`, bit for bit.
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
                    raise DeviceFull(f"{self.device} has no room for one clip of {self.name} ({error})") from None
                with self._halving:  # once, though several threads may have come to it
                    self.batch_size = min(self.batch_size, size // 2)
            torch.cuda.empty_cache()  # not in the handler, where the error still holds what it had reached

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[None]:
        """What this thread copies and computes waits for nothing that another does. On a CPU it means nothing."""
        if self.device.type == "mps":  # which has no streams
            yield
            return
        streams = torch.get_device_module(self.device)
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = streams.Stream(self.device)
        with streams.stream(self._of_thread.stream):
            yield

    def _encode(self, frames_NHWC: Frames, index_BT: Index, layers: Sequence[str], size: int) -> Mapping[str, Rows]:
        clips = len(index_BT)
        if not clips:  # the shapes are those of a black clip, of which nothing is kept
            black = np.zeros((1, *self.recipe.crop_hw, self.recipe.channels), np.uint8)
            of_one = self._encode(black, np.zeros((1, self.recipe.n_frames), np.int64), layers, size)
            return MappingProxyType({name: rows[:0] for name, rows in of_one.items()})
        frames = self._to_device(frames_NHWC)
        all_BT = self._to_device(index_BT)
        batches = []
        for start in range(0, clips, size):
            places = torch.arange(start, start + size, device=self.device).clamp_(max=clips - 1)
            # index_select copies whole frames; frames[index_BT] took fifteen times as long for the same bytes
            chosen_BT = all_BT[places]
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
            # A row at a time: threads split a product of five rows so that the bits depend on the place (seen).
            rows = torch.split(found["pool5"], 1)
            found["prob"] = torch.cat([self._network.classify(row).softmax(dim=1) for row in rows])
        return {name: found[name if name in found else name[:4]] for name in layers}  # "res4f" is "res4"

    def _to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        """On the device. The staging copy is ours because the caller's array may be read-only shared memory."""
        if self.device.type == "cpu" and array.flags.writeable and array.flags.c_contiguous:
            return torch.from_numpy(array)
        dtype = torch.uint8 if array.dtype == np.uint8 else torch.int64
        staging = torch.empty(array.shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        np.copyto(staging.numpy(), array)
        return staging.to(self.device, non_blocking=True)  # torch keeps pinned memory until its copy has been made

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
    """RGB bytes to what the network takes: uint8 (B, T, H, W, C) -> float32 (B, C, T, H, W), channels last."""
    if recipe.channel_order == "bgr":
        clips_BTHWC = clips_BTHWC.flip(-1)
    values_BTHWC = clips_BTHWC.float().contiguous()
    # Whole lines of pixels: on a CPU an inner loop over three channels takes nine times as long.
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
    """A line of pixels that all have these values, made once: on a GPU each would be a copy that is waited for."""
    with torch.inference_mode(False):
        return torch.tensor(values * width, dtype=torch.float32, device=device)


def golden_clip(recipe: ClipRecipe) -> tuple[Frames, Index]:
    """One clip that is the same everywhere: slanted stripes that move, another way in each channel; integers only."""
    height, width = recipe.crop_hw
    t, y, x, c = np.ogrid[: recipe.n_frames, :height, :width, : recipe.channels]
    frames_NHWC = ((3 + 2 * c) * x + (5 - 3 * c) * y + (7 + 4 * c) * t + x * y // 16) % 256
    return frames_NHWC.astype(np.uint8), np.arange(recipe.n_frames, dtype=np.int64)[None]


@torch.inference_mode()
def golden_features(weights: Weights) -> Rows:
    """What the golden clip must give: (D,), from the plain network on the CPU in float32, nothing folded."""
    frames_NHWC, index_BT = golden_clip(weights.recipe)
    clips_BTHWC = torch.from_numpy(frames_NHWC)[torch.from_numpy(index_BT)]
    expected_D: Rows = weights.network.features(normalise(clips_BTHWC, weights.recipe))[0].numpy()
    return expected_D


def check_golden(encoder: Encoder, expected_D: Rows, minimum_cosine: float | None = None) -> None:
    """Raise GoldenMismatch unless the golden clip gives `expected_D`, by cosine and, within 1%, by length.

    The least cosine is that of the encoder's precision (MINIMUM_COSINE) if not given. One that is not a number refuses.
    """
    minimum_cosine = MINIMUM_COSINE[encoder.precision] if minimum_cosine is None else minimum_cosine
    found_D = encoder.encode(*golden_clip(encoder.recipe))[0].astype(np.float64)
    wanted_D = expected_D.astype(np.float64)
    if found_D.shape != wanted_D.shape:
        raise GoldenMismatch(f"{encoder.name} gives {len(found_D)} features and the golden ones are {len(wanted_D)}")
    found, wanted = float(np.linalg.norm(found_D)), float(np.linalg.norm(wanted_D))
    cosine = float(found_D @ wanted_D) / (found * wanted) if found * wanted else math.nan
    if not (cosine >= minimum_cosine and abs(found / wanted - 1) <= 0.01):  # written so that nan refuses
        raise GoldenMismatch(
            f"{encoder.name} on {encoder.device} in {encoder.precision} does not reproduce the golden features: "
            f"{cosine = :.6f} (at least {minimum_cosine}), length {found:.4g} for {wanted:.4g}; "
            "check the driver, the torch build and the weights file, or run on another device"
        )


def _joined(batches: list[Tensor], clips: int) -> Rows:
    """The rows of all batches without the padding of the last, as one array on the host."""
    rows: Rows = torch.cat(batches)[:clips].contiguous().cpu().numpy()
    return rows
