"""How a job wants its videos decoded, and what it refuses to decode at all.

`DecodePolicy` is part of the Recipe (it decides which frames a video has); `DecodeLimits` belongs to the Run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class DecodePolicy:
    """`--decoder` and `--partial`.

    decoder  auto: decord where its frames are proved right and it is not slower, PyAV elsewhere and where decord gives
             up; or one by name (nvdec is never chosen by auto: a GPU's colours are not those of the others)
    partial  fail: a damaged or cut video has no rows; keep: the frames before the damage are used, and marked
    """

    decoder: Literal["auto", "decord", "pyav", "nvdec"] = "auto"
    partial: Literal["fail", "keep"] = "fail"

    def __post_init__(self) -> None:
        if self.decoder not in ("auto", "decord", "pyav", "nvdec"):
            raise ValueError(f"decoder is auto, decord, pyav or nvdec, not {self.decoder!r}")
        if self.partial not in ("fail", "keep"):
            raise ValueError(f"partial is fail or keep, not {self.partial!r}")


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What is refused before a picture is decoded: hours, pixels of one picture, bytes of one file.

    The defaults let every honest video through (24 h, 64 megapixels = twice 8K, 256 GiB) and stop a small file that
    claims to be enormous.
    """

    max_duration_s: float = 24 * 3600.0
    max_pixels: int = 64 * 1024 * 1024
    max_file_bytes: int = 256 * 1024**3
