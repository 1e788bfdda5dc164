"""Checkpoints of the public PyTorch port: `.pth.tar` files with a 'state_dict', or a bare state dict.

Our keys are the same as the port's. Files of 2017/18 lack `num_batches_tracked`, and files saved from DataParallel
prefix every key with `module.`. Both are supported, in the containers of old and new torch, written by Python 2 or 3.
Only plain tensors are unpickled, because a checkpoint could otherwise run arbitrary code. `guard` checks the file
before torch reads it.
Source: the port's README and model; torch.serialization's notes on `weights_only`.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from p3d import zoo
from p3d.weights import pickle_guard
from p3d.weights.recognise import recognise
from p3d.weights.record import ImportOptions, Weights, WeightsError, assemble, sha256_of

_PREFIX: Final = "module."
_LARGEST_CLAIM: Final = 1 << 30  # bytes that the tensors of a small file may claim: four times P3D-199
# What torch's reader raises for bytes that are not a checkpoint, or a damaged one.
_DAMAGE: Final = (
    pickle_guard.DamageError,
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
    tensors: Mapping[str, Tensor],
    asked: ImportOptions,
) -> Weights:
    """A P3D from `tensors`, which were read from `path`. The keys identify the network (of the ABC mix).

    Options that are not given follow the port. Raises WeightsError and OSError.
    """
    source = str(path)
    config = recognise(source, tensors, name=asked.name, graph=asked.graph or "port", stride_on=asked.stride_on)
    return assemble(
        source,
        config,
        asked.recipe or zoo.recipe(config.name, config.graph),
        tensors,
        class_names=asked.class_names or (),
        origin=f"checkpoint {path.name}, sha256 {sha256_of(path)}",
    )


def read(path: Path) -> dict[str, Tensor]:
    """The named tensors of any torch checkpoint, without DataParallel's prefix. Raises WeightsError and OSError."""
    tensors = _state_dict(str(path), _read(path))
    _check_claim(path, tensors)
    return tensors


def _read(path: Path) -> object:
    """The checkpoint as torch reads it if only tensors and plain containers are allowed."""
    try:
        pickle_guard.check(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle_guard.ForeignContentError as error:
        raise WeightsError(
            f"{path} was not loaded because it holds {str(error)[:80]}, which is not a tensor and could run code; "
            "if you trust it, open it once on an isolated machine with torch.load(..., weights_only=False), "
            "and save its 'state_dict' alone"
        ) from error
    except _DAMAGE as error:
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
            f"{source} holds {strange[0]!r:.80}, which is not a named tensor; save the network's state_dict() alone"
        )
    tensors = {key.removeprefix(_PREFIX): value for key, value in values.items()}
    if len(tensors) != len(values):
        raise WeightsError(
            f"{source} holds keys both with and without {_PREFIX!r}; save one network's state_dict() alone"
        )
    return tensors


def _check_claim(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Limit the claimed size before memory is allocated, because tensors may repeat one stored number (stride 0)."""
    claim, size = sum(tensor.nbytes for tensor in tensors.values()), path.stat().st_size
    if claim > max(size, _LARGEST_CLAIM):
        raise WeightsError(
            f"{path} has {size} bytes but claims {claim} bytes of tensors; save the network's state_dict() again"
        )
