"""How a job decodes its videos, and what it refuses to decode.

`DecodePolicy` is part of the Recipe (it decides which frames are used); `DecodeLimits` belongs to the Run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Decoder = Literal["auto", "decord", "pyav", "nvdec"]
Partial = Literal["fail", "keep"]
MAX_DURATION_S = 24 * 3600.0
MAX_PIXELS = 64 * 1024 * 1024  # of one picture: twice 8K
MAX_FILE_BYTES = 256 * 1024**3


@dataclass(frozen=True, slots=True)
class DecodePolicy:
    """`--decoder` and `--partial`.

    decoder  auto: decord where its frames are proved right and it is not slower; PyAV elsewhere and where decord fails.
             Or one by name. auto never chooses nvdec, because a GPU's colours differ from those of the others
    partial  fail: a damaged or cut video has no rows; keep: the frames before the damage are used, and marked
    """

    decoder: Decoder = "auto"
    partial: Partial = "fail"

    def __post_init__(self) -> None:
        for name, allowed in (("decoder", get_args(Decoder)), ("partial", get_args(Partial))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {' or '.join(allowed)}, not {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What is refused before a picture is decoded: by duration, pixels of one picture, bytes of one file.

    The defaults accept every ordinary video (24 h, 64 megapixels = twice 8K, 256 GiB) and stop a small file that
    claims to be enormous.
    """

    max_duration_s: float = MAX_DURATION_S
    max_pixels: int = MAX_PIXELS
    max_file_bytes: int = MAX_FILE_BYTES
