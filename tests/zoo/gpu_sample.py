"""Make the file that a GPU decodes before a job: `python -m tests.zoo.gpu_sample`. FFmpeg and x264 are PyAV's."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

from p3d.pipeline.decode.routes.nvdec import SAMPLE, sample_colours
from tests.conftest import REPO


def make(path: Path) -> None:
    """Ten frames of 256x256, four squares each, in the matrix of BT.601 and limited range, both stated."""
    with av.open(str(path), "w", format="mp4") as output:
        params = "colormatrix=smpte170m:range=tv:qp=8:bframes=2:keyint=5"
        stream = output.add_stream("libx264", rate=25, options={"x264-params": params})
        stream.height, stream.width, stream.pix_fmt = 256, 256, "yuv420p"
        for colours_SC in sample_colours():
            pixels_HWC = np.kron(colours_SC.reshape(2, 2, 3), np.ones((128, 128, 1), np.uint8))
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")))
        output.mux(stream.encode())


if __name__ == "__main__":
    make(REPO / "pipeline" / "decode" / SAMPLE)
