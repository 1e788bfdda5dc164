"""Our own format: one self-describing safetensors file.

The tensors are those of the network without training counters, float32. Everything else is JSON with sorted keys under
the single metadata key "p3d". safetensors writes several metadata keys in random order, but equal weights must give
equal bytes, because a job identifies them by their sha256.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any, Final

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from p3d.preprocessing import ClipRecipe
from p3d.weights.record import COUNTER, ImportOptions, Weights, WeightsError, assemble, check_asked, network_config

FORMAT_VERSION: Final = 1
_KEY: Final = "p3d"
_FIELDS: Final = {
    "format_version": int,
    "network": str,
    "graph": str,
    "stride_on": str,
    "in_channels": int,
    "num_classes": int,
    "recipe": dict,
    "class_names": list,
    "origin": str,
}


def to_bytes(weights: Weights) -> bytes:
    """The content of the file; equal weights give equal bytes in every process and on every machine."""
    config = weights.config
    card = {
        "format_version": FORMAT_VERSION,
        "network": config.name,
        "graph": config.graph,
        "stride_on": config.stride_on,
        "in_channels": config.in_channels,
        "num_classes": config.num_classes,
        "recipe": weights.recipe.to_dict(),
        "class_names": list(weights.class_names),
        "origin": weights.origin,
    }
    tensors = {key: value.contiguous() for key, value in weights.network.state_dict().items() if COUNTER not in key}
    return safetensors.torch.save(tensors, metadata={_KEY: json.dumps(card, sort_keys=True)})


def save(path: str | Path, weights: Weights) -> None:
    """Write the file atomically: a reader never sees a part of it. Raises OSError."""
    write(Path(path), to_bytes(weights))


def write(path: Path, content: bytes) -> None:
    """Like `save`, for content returned by `to_bytes`. Raises OSError."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_foreign(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a foreign safetensors file; None if it has our description. Same errors as `load`."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            if _KEY in (file.metadata() or {}):
                return None
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise _damaged(path, error) from error


def load(
    path: Path,
    asked: ImportOptions,
) -> Weights:
    """The weights that `save` wrote; options in `asked` must agree with the file. Raises WeightsError and OSError."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            card = _read_card(path, file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise _damaged(path, error) from error
    check_asked(str(path), "the network", asked.name, card["network"])
    check_asked(str(path), "the graph", asked.graph, card["graph"])
    check_asked(str(path), "stride_on", asked.stride_on, card["stride_on"])
    try:
        held_recipe = ClipRecipe.from_dict(card["recipe"])
    except ValueError as error:
        raise WeightsError(f"{path} has a clip recipe that cannot be read ({error}); convert it again") from error
    check_asked(str(path), "the recipe", asked.recipe, held_recipe)
    held_names = tuple(str(each) for each in card["class_names"])
    check_asked(str(path), "the class names", asked.class_names, held_names)
    config = network_config(
        str(path),
        card["network"],
        graph=card["graph"],
        num_classes=card["num_classes"],
        stride_on=card["stride_on"],
    )
    if config.in_channels != card["in_channels"]:
        raise WeightsError(
            f"{path} says {card['in_channels']} input channels, but {config.name} takes {config.in_channels}; "
            "convert it again"
        )
    return assemble(str(path), config, held_recipe, tensors, class_names=held_names, origin=card["origin"])


def _damaged(path: Path, error: SafetensorError) -> WeightsError:
    return WeightsError(f"{path} is not a whole safetensors file ({error}); copy or convert it again")


def _read_card(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The JSON under "p3d", checked to have exactly the expected fields and types. Raises WeightsError."""
    if _KEY not in metadata:
        raise WeightsError(
            f"{path} is a safetensors file that does not say which network it holds; load its tensors from a .pth "
            "checkpoint and save them with p3d.weights.save"
        )
    try:
        card = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} has a description that is not JSON ({error}); convert it again") from error
    if not isinstance(card, dict):
        raise WeightsError(f"{path} has a description that is not a JSON object; convert it again")
    version = card.get("format_version")
    if version != FORMAT_VERSION:
        raise WeightsError(
            f"{path} is written in format {version!r}, but this version reads {FORMAT_VERSION}; "
            "update p3d or convert it again"
        )
    wrong = sorted(
        {key for key, kind in _FIELDS.items() if type(card.get(key)) is not kind} | (card.keys() - _FIELDS.keys())
    )
    if wrong:
        raise WeightsError(f"{path} has missing, unknown or mistyped fields: {', '.join(wrong)}; convert it again")
    return card
