"""Checkpoints of the public PyTorch port: `.pth.tar` files with a 'state_dict', or a bare state dict.

The keys are our own (we took theirs). Files of 2017/18 lack `num_batches_tracked`, files saved from DataParallel prefix
every key by `module.`; both are understood. Nothing is ever unpickled that is not a plain tensor: a checkpoint can run
any code it likes when loaded otherwise.
Source: the port's README and model; torch.serialization's notes on `weights_only`.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from p3d import zoo
from p3d.recipe import ClipRecipe
from p3d.weights.record import Weights, WeightsError, assemble, check_asked, network_config

_PREFIX: Final = "module."
# What torch's reader raises for bytes that are no checkpoint, or a damaged one.
_DAMAGE: Final = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    ArithmeticError,
    AssertionError,
    MemoryError,
)


def load(
    path: Path,
    *,
    name: str | None = None,
    graph: str | None = None,
    stride_on: str | None = None,
    recipe: ClipRecipe | None = None,
    class_names: tuple[str, ...] | None = None,
) -> Weights:
    """The weights in a checkpoint; the keys tell the network (of the ABC mix), the rest is assumed to be the port's.

    Raises WeightsError and OSError.
    """
    source = str(path)
    tensors = _state_dict(source, _read(path))
    held = _guess(source, tensors)
    if name is not None and not _could_be(name, held):
        check_asked(source, "the network", name, held)
    config = network_config(
        source,
        name or held,
        graph=graph or "port",
        num_classes=_rows(tensors.get("fc.weight")),
        stride_on=stride_on or "1x1",
    )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return assemble(
        source,
        config,
        recipe or zoo.recipe(config.name, config.graph),
        tensors,
        class_names=class_names or (),
        origin=f"checkpoint {path.name}, sha256 {digest}",
    )


def _read(path: Path) -> object:
    """The checkpoint as torch reads it when nothing but tensors and plain containers is allowed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except _DAMAGE as error:
        refused = re.search(r"unsupported global:?(?: GLOBAL)? ([\w.]+)", str(error), re.IGNORECASE)
        if refused:
            raise WeightsError(
                f"{path} was not loaded because it holds {refused[1]}, which is not a tensor and could run code; "
                "if you trust it, open it once on a machine you can lose, with torch.load(..., weights_only=False), "
                "and save its 'state_dict' alone"
            ) from error
        reason = next(iter(str(error).splitlines()), "")[:80] or type(error).__name__
        raise WeightsError(f"{path} is not a whole torch checkpoint ({reason}); fetch it again") from error


def _state_dict(source: str, checkpoint: object) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, without DataParallel's prefix."""
    values = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    if not isinstance(values, Mapping) or not values:
        raise WeightsError(f"{source} holds no state dict; save the network's state_dict() and give that file")
    strange = [key for key, value in values.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if strange:
        raise WeightsError(
            f"{source} holds {strange[0]!r}, which is not a named tensor; save the network's state_dict() alone"
        )
    tensors = {key.removeprefix(_PREFIX): value for key, value in values.items()}
    if len(tensors) != len(values):
        raise WeightsError(
            f"{source} holds keys both with and without {_PREFIX!r}; save one network's state_dict() alone"
        )
    return tensors


def _guess(source: str, tensors: Mapping[str, Tensor]) -> str:
    """The name of the network with as many blocks and input channels as these tensors have."""
    firsts = [re.fullmatch(r"layer([1-4])\.\d+\.conv1\.weight", key) for key in tensors]
    stages = [first[1] for first in firsts if first]
    blocks = tuple(stages.count(stage) for stage in "1234")
    stem = tensors.get("conv1_custom.weight")
    channels = stem.shape[1] if stem is not None and stem.ndim == 5 else 0
    for known in zoo.P3D_NAMES:  # the ABC mix comes first, and its variants have the same keys
        config = zoo.p3d_config(known)
        if (config.blocks, config.in_channels) == (blocks, channels):
            return known
    raise WeightsError(
        f"{source} holds no P3D that is known here ({blocks} blocks a stage, {channels} input channels); "
        f"give a checkpoint of one of {', '.join(zoo.P3D_NAMES)}"
    )


def _could_be(name: str, held: str) -> bool:
    """Whether the named network has the blocks and channels of the one in the file; an unknown name is told later."""
    if name not in zoo.P3D_NAMES:
        return name not in zoo.NAMES
    asked, found = zoo.p3d_config(name), zoo.p3d_config(held)
    return (asked.blocks, asked.in_channels) == (found.blocks, found.in_channels)


def _rows(tensor: Tensor | None) -> int:
    """The number of classes; a checkpoint without a classifier is told by its missing keys."""
    return tensor.shape[0] if tensor is not None and tensor.ndim and tensor.shape[0] else 400
