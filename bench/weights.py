"""Random weights for the benches: speed does not depend on the numbers. `p3d63` as it is, or with small frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import p3d.weights
from p3d.recipe import ClipRecipe
from p3d.weights import Weights


def make(folder: Path, name: str, side: int | None = None) -> Path:
    """A weights file of network `name`; with `side`, its recipe takes frames of side x side pixels."""
    weights = p3d.weights.random_weights(name, 0)
    if side is not None:
        weights = replace(
            weights, recipe=replace(weights.recipe, resize_hw=(side, side * 4 // 3), crop_hw=(side, side))
        )
    path = folder / f"{name}-{side or 'own'}.safetensors"
    p3d.weights.save(path, weights)
    return path


def load(path: Path | str) -> Weights:
    return p3d.weights.load(Path(path))


def recipe_of(path: Path | str) -> ClipRecipe:
    return load(path).recipe
