"""Weights files and clip rules of the benches. Speed does not depend on the numbers, so the weights are random.

A clip rule is one word, RULE or RULE/STEP: `every:48/3` is `--clips every:48 --frame-step 3`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import p3d.weights
from p3d.pipeline.clips.rules import Sampling, parse_sampling
from p3d.preprocessing import ClipRecipe
from p3d.weights import Weights


def make_weights(folder: Path, name: str, side: int | None = None) -> Path:
    """Write a weights file of network `name`; with `side`, its recipe takes frames of side x side pixels."""
    weights = p3d.weights.random_weights(name, 0)
    if side is not None:
        recipe = replace(weights.recipe, resize_hw=(side, side * 4 // 3), crop_hw=(side, side))
        weights = replace(weights, recipe=recipe)
    path = folder / f"{name}-{side or 'own'}.safetensors"
    p3d.weights.save(path, weights)
    return path


def load(path: Path | str) -> Weights:
    return p3d.weights.load(Path(path))


def recipe_of(path: Path | str) -> ClipRecipe:
    return load(path).recipe


def sampling_of(word: str, clip_frames: int) -> Sampling:
    """The sampling of a clip rule, for clips of `clip_frames` frames."""
    rule, _, step = word.partition("/")
    return parse_sampling(rule, clip_frames=clip_frames, frame_step=int(step or 1))


def options_of(word: str) -> tuple[str, ...]:
    """The options of a clip rule on P3D's command line."""
    rule, _, step = word.partition("/")
    return ("--clips", rule, "--frame-step", step or "1")
