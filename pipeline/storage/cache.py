"""The folder of this user for what can be made again: indexes, and listings that were interrupted."""

from __future__ import annotations

import os
from pathlib import Path

from p3d.pipeline.errors import InputError

CACHE = "P3D_CACHE"


def cache_folder() -> Path:
    """P3D_CACHE, default ~/.cache/p3d. InputError if it is a relative path, or not set and the user has no home."""
    if named := os.environ.get(CACHE):
        if not Path(named).is_absolute():  # in an output from somebody else it would be a folder of that output
            raise InputError(f"{CACHE}={named} is not an absolute path")
        return Path(named)
    try:
        return Path.home() / ".cache" / "p3d"
    except RuntimeError as error:
        raise InputError(f"{error}; set {CACHE} to a folder for them") from None
