"""ClipRecipe: the preprocessing that a set of weights was trained with.

    decoded frame --resize--> centre crop --> uint8 RGB (done by the pipeline) --> channel order, range, mean, std

Weights used with a wrong recipe give wrong features and no error, so every set of weights carries its recipe. This
module needs neither torch nor numpy, because plans read it too.
Source: README of the authors' release (182x242, centre 160x160, BGR minus 104/117/123); the port's `input_mean`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, Self

CHANNEL_ORDERS: Final = ("rgb", "bgr")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipRecipe:
    """The number of frames, how they are resized and cropped, and how bytes become network inputs.

    Exactly one of `resize_hw` (both sides, pixels, aspect not kept) and `short_side` (pixels, aspect kept) is set; then
    the centre `crop_hw` is taken. Channels are first put in `channel_order`. Then each value v in 0..255 becomes
    (v * value_range / 255 - mean) / std, with mean and std per channel. Optical flow has two channels, x and y, and
    keeps their order ("rgb"). Raises ValueError for inconsistent or out-of-range values.
    """

    n_frames: int = 16
    resize_hw: tuple[int, int] | None = (182, 242)
    short_side: int | None = None
    crop_hw: tuple[int, int] = (160, 160)
    channel_order: str = "rgb"
    value_range: int = 255
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_int("n_frames", self.n_frames)
        _check_pair("crop_hw", self.crop_hw)
        if (self.resize_hw is None) == (self.short_side is None):
            raise ValueError(f"set one of resize_hw and short_side: {self.resize_hw = }, {self.short_side = }")
        if self.resize_hw is not None:
            _check_pair("resize_hw", self.resize_hw)
        if self.short_side is not None:
            _check_int("short_side", self.short_side)
        resized_hw = self.resize_hw or (self.short_side, self.short_side)
        if any(crop > side for crop, side in zip(self.crop_hw, resized_hw, strict=True) if side is not None):
            raise ValueError(f"{self.crop_hw = } does not fit into frames of {resized_hw} pixels")
        if self.value_range not in (1, 255) or isinstance(self.value_range, bool):
            raise ValueError(f"value_range is what 255 becomes, 255 or 1, not {self.value_range!r}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(_is_number(value) for value in values):
                raise ValueError(f"{name} must be a tuple of finite numbers, not {values!r}")
            object.__setattr__(self, name, tuple(map(float, values)))  # 104 and 104.0 give the same recipe and digest
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must have one number per channel: {self.mean = }, {self.std = }")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {self.std}")
        if self.channel_order not in CHANNEL_ORDERS:
            raise ValueError(f"channel_order must be one of {', '.join(CHANNEL_ORDERS)}, not {self.channel_order!r}")
        if self.channel_order == "bgr" and self.channels != 3:
            raise ValueError(f"channel_order 'bgr' needs 3 channels, not {self.channels}")

    @property
    def channels(self) -> int:
        """3 for RGB frames, 2 for optical flow."""
        return len(self.mean)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, tuples as lists; `from_dict` returns an equal recipe."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The recipe that `to_dict` wrote; raises ValueError for unknown or missing keys and for wrong values."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown keys in a clip recipe: {', '.join(unknown)}")
        missing = sorted({"mean", "std"} - set(values))
        if missing:
            raise ValueError(f"a clip recipe without {' and '.join(missing)}")
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**given)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _check_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, not {value!r}")


def _check_pair(name: str, value: object) -> None:
    if not isinstance(value, tuple) or len(value) != 2:
        raise ValueError(f"{name} must be (height, width), not {value!r}")
    for side in value:
        _check_int(name, side)


# The preprocessing of the authors' caffemodels: mean 104/117/123 is blue, green, red.
CAFFE_RGB: Final = ClipRecipe(channel_order="bgr", mean=(104.0, 117.0, 123.0), std=(1.0, 1.0, 1.0))
CAFFE_FLOW: Final = ClipRecipe(mean=(128.0, 128.0), std=(1.0, 1.0))
# The preprocessing that the port declares (ImageNet's statistics); its own demo never applies it.
PORT_RGB: Final = ClipRecipe(value_range=1, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
DEMO_RGB: Final = replace(PORT_RGB, resize_hw=(64, 64), crop_hw=(64, 64))
PORT_FLOW: Final = ClipRecipe(value_range=1, mean=(0.5, 0.5), std=(0.226, 0.226))
# 2-D ResNets: frames of the paper's UCF101 protocol (240x320, crop 224) normalised as in the original release, and
# torchvision's test preprocessing.
IMAGENET_BGR: Final = ClipRecipe(
    resize_hw=(240, 320), crop_hw=(224, 224), channel_order="bgr", mean=(104.0, 117.0, 123.0), std=(1.0, 1.0, 1.0)
)
IMAGENET_RGB: Final = ClipRecipe(
    resize_hw=None,
    short_side=256,
    crop_hw=(224, 224),
    value_range=1,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
# C3D subtracts a mean cube (16x128x171) that is not included; these are roughly its channel means, as ports use them.
C3D_RGB: Final = ClipRecipe(
    resize_hw=(128, 171), crop_hw=(112, 112), channel_order="bgr", mean=(90.0, 98.0, 102.0), std=(1.0, 1.0, 1.0)
)
# Deep Video: 200x200, crop 170, minus 117. The paper crops to a square first; here the short side becomes 200.
DEEPVIDEO_RGB: Final = ClipRecipe(
    n_frames=10, resize_hw=None, short_side=200, crop_hw=(170, 170), mean=(117.0, 117.0, 117.0), std=(1.0, 1.0, 1.0)
)
# Convolutional pooling: frames of 220x220, one per second in the paper (here: --frame-step).
CONVPOOL_RGB: Final = ClipRecipe(
    n_frames=120,
    resize_hw=(240, 320),
    crop_hw=(220, 220),
    channel_order="bgr",
    mean=(104.0, 117.0, 123.0),
    std=(1.0, 1.0, 1.0),
)


def in_convention(recipe: ClipRecipe, *, channel_order: str, value_range: int) -> ClipRecipe:
    """The same frames, resize and crop, with pixel values normalised by one of the four conventions in use.

    Range 255 subtracts 104/117/123 (blue, green, red) without scaling; range 1 uses ImageNet's mean and standard
    deviation. Both are reordered to `channel_order`. Raises ValueError for unknown values and for optical flow.
    """
    if recipe.channels != 3:
        raise ValueError(
            f"channel order and range are settings of RGB weights, but these take {recipe.channels} channels"
        )
    if value_range not in (1, 255):
        raise ValueError(f"value_range is what 255 becomes, 255 or 1, not {value_range!r}")
    known = CAFFE_RGB if value_range == 255 else PORT_RGB
    step = 1 if channel_order == known.channel_order else -1
    return replace(
        recipe, channel_order=channel_order, value_range=value_range, mean=known.mean[::step], std=known.std[::step]
    )
