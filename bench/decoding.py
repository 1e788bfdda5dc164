"""The table of docs/reference/samples.md: route, frames and outcome of each sample video.

python -m bench.decoding            print the table as Markdown
python -m bench.decoding --write    write it into docs/reference/samples.md; tests check every row
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from bench.rounds import REPO
from p3d.pipeline.clips.rules import parse_sampling
from p3d.pipeline.decode.frames import open_frames
from p3d.pipeline.decode.probe import probe
from p3d.pipeline.decode.routes.choice import route
from p3d.pipeline.errors import VideoError
from p3d.pipeline.types import FrameSpec, VideoEnd, VideoInfo
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests.samples import VIDEOS, names_below

PAGE = REPO / "docs" / "reference" / "samples.md"
SPEC = FrameSpec(crop_hw=(160, 160), resize_hw=(182, 242))
EVERY = parse_sampling("every:16", clip_frames=16)
HEAD = "| file | route | frames | outcome |\n| --- | --- | --- | --- |"
BLOCK = re.compile(r"(<!-- generated: samples -->\n).*?(\n<!-- end -->)", re.S)


def decode(path: Path, policy: DecodePolicy) -> tuple[VideoInfo, VideoEnd]:
    messages = [m for m in open_frames(str(path), SPEC, EVERY, policy=policy) if isinstance(m, VideoInfo | VideoEnd)]
    info, end = messages[-2:]
    assert isinstance(info, VideoInfo)
    assert isinstance(end, VideoEnd)
    return info, end


def row(name: str) -> str:
    path = VIDEOS / name
    try:
        info, end = decode(path, DecodePolicy())
    except VideoError as error:
        try:
            _, kept = decode(path, DecodePolicy(partial="keep"))
            outcome = f"`{error.reason}`; {kept.n_frames} with `--partial keep`"
        except VideoError:
            outcome = f"`{error.reason}`"
        return f"| {name} | | | {outcome}: {error.detail} |"
    _, why = route(probe(str(path), DecodeLimits()), DecodePolicy(), SPEC)
    turned = f"; turned by {info.rotation} degrees" if info.rotation else ""
    return f"| {name} | {info.route} | {end.n_frames} | {why}{turned} |"


def table() -> str:
    return "\n".join([HEAD, *map(row, names_below("videos"))])


if __name__ == "__main__":
    if absent := [name for name in names_below("videos") if not (VIDEOS / name).is_file()]:
        raise SystemExit(f"{len(absent)} of the sample videos are not below P3D_SAMPLES: no {VIDEOS / absent[0]}")
    made = table()
    if "--write" in sys.argv:
        text, count = BLOCK.subn(lambda found: found[1] + made + found[2], PAGE.read_text())
        assert count == 1, f"{PAGE} has no block for the table"
        PAGE.write_text(text)
    else:
        print(made)
