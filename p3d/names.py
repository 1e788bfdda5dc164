"""How a user names a network and its weights. Imports no torch, so that a wrong name is refused at once."""

from __future__ import annotations

import contextlib
import difflib
import re
from pathlib import Path
from typing import Final

P3D_NAMES: Final = tuple(
    depth + variant for depth in ("p3d63", "p3d131", "p3d199") for variant in ("", "-a", "-b", "-c", "-flow")
)
BASELINES: Final = (
    *("resnet50", "resnet101", "resnet152", "resnet50-lstm", "resnet50-3d", "resnet152-3d"),
    *("c3d", "deepvideo-single", "deepvideo-slow", "convpool", "p3d-demo"),
)
NAMES: Final = P3D_NAMES + BASELINES
SUFFIXES: Final = (".safetensors", ".pth", ".pt", ".tar", ".caffemodel")  # of files of weights
LFS_POINTER: Final = b"version https://git-lfs"  # what a checkout without Git LFS has in place of a file
RANDOM: Final = "random:"
_SEED: Final = re.compile(r"[0-9]{1,18}")


def check_name(name: str) -> None:
    """ValueError with suggestions if no network has this name."""
    if name not in NAMES:
        raise unknown(name)


def unknown(name: str) -> ValueError:
    """The error for a name that no network has, with suggestions."""
    near = difflib.get_close_matches(name.lower(), NAMES, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(NAMES)}"
    return ValueError(f"no network is called {name!r}; {hint}")


def check_weights(spec: str) -> None:
    """ValueError unless `spec` is "random:SEED" or the path of a file that may hold weights."""
    if spec.startswith(RANDOM):
        if not _SEED.fullmatch(spec.removeprefix(RANDOM)):
            raise ValueError(f"{spec} needs a whole number of 1 to 18 digits after the colon, as in random:0")
    elif not spec:
        raise ValueError(
            "no weights were named; give the path of a file, download one with `p3d weights fetch`, or give "
            "random:SEED for random weights"
        )
    else:
        check_file(Path(spec))


def check_file(path: Path) -> None:
    """ValueError unless there is a file with a suffix of weights that is no Git LFS pointer."""
    if not path.is_file():
        raise ValueError(
            f"there is no weights file at {path}; give the path of one, download one with `p3d weights fetch`, or give "
            "random:SEED for random weights"
        )
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its checkout")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path} has an unknown suffix, not one of {', '.join(SUFFIXES)}; rename it according to its format"
        )
