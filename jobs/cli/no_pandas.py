"""Keep pyarrow from importing pandas, which none of our verbs use.

pyarrow imports pandas at its first conversion, if it is installed. That takes half a second, and Ctrl-C in that time is
lost: pyarrow ignores the KeyboardInterrupt. pyarrow works without pandas.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class NoPandas:
    """A finder of modules that does not find pandas for pyarrow. Others, such as Ray Train, find it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "pandas" and _importer().partition(".")[0] in ("p3d", "pyarrow"):
            raise ModuleNotFoundError("pandas is not used here", name=name)
        return None


def _importer() -> str:
    """The module whose code imports now. pyarrow's compiled code has no frame: then it is the one that called it.

    Empty for a call of importlib.util.find_spec, which only asks whether pandas is installed.
    """
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("importlib"):
        if frame.f_globals["__name__"] == "importlib.util":
            return ""
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", ""))


def keep_pandas_out() -> None:
    """For the rest of this process, unless pandas is imported already."""
    if not any(isinstance(one, NoPandas) for one in sys.meta_path):
        sys.meta_path.insert(0, NoPandas())
