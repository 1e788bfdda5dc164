"""The sample files that tests, benchmarks and documents cite: the list of them, and the folder where they are.

`samples.toml` has the source, licence, size and hash of each. None is part of the repository. `make samples` downloads
those that are public into the folder P3D_SAMPLES (default: build/samples). Tests that need others are skipped where
they are absent.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent.parent
LIST = Path(__file__).with_name("samples.toml")
FOLDER = Path(os.environ.get("P3D_SAMPLES") or REPO / "build" / "samples").absolute()
VIDEOS = FOLDER / "videos"


@dataclass(frozen=True)
class Sample:
    """One file: its path below `FOLDER`, and where it can be downloaded, or None."""

    path: str
    url: str | None
    licence: str
    n_bytes: int
    sha256: str


@cache
def listed() -> tuple[Sample, ...]:
    """Every sample of the list, in its order."""
    return tuple(
        Sample(
            source["into"] + name,
            source["url"] + one.get("from", name) if "url" in source else None,
            one.get("licence", source["licence"]),
            one["bytes"],
            one["sha256"],
        )
        for source in tomllib.loads(LIST.read_text()).values()
        for name, one in source["files"].items()
    )


def names_below(folder: str) -> list[str]:
    """The paths of the samples below a folder, such as `videos`, relative to it, sorted."""
    return sorted(one.path.removeprefix(f"{folder}/") for one in listed() if one.path.startswith(f"{folder}/"))


def need(*paths: str) -> Path:
    """The path of the first of these samples. The test is skipped if one of them is absent."""
    for path in paths:
        if not (FOLDER / path).is_file():
            pytest.skip(f"{path} is not below P3D_SAMPLES ({FOLDER}); `make samples` fetches what is public")
    return FOLDER / paths[0]


def need_all_videos() -> Path:
    """The folder of the sample videos. The test is skipped if one of them is absent."""
    need(*(f"videos/{name}" for name in names_below("videos")))
    return VIDEOS
