"""Run video readers over the corpus and print what each returns: `python -m tests.conformance [FOLDER]`.

A reader is right about a file if it returns exactly the frames that are shown, in order and turned as shown, or an
error where there must be one. Readers that are not installed are left out. The files stay in FOLDER (default: a
temporary folder), with `corpus.csv`, which says what is right, so that other readers can be tried on them.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import queue
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.conformance.corpus import CASES, Case
from tests.zoo import make

Read = Callable[[Path], np.ndarray]  # path -> frames as shown, [N, H, W, 3] uint8 RGB
TIMEOUT_S = 30.0


def p3d(path: Path) -> np.ndarray:
    from tests.conformance.test_conformance import decoded

    return decoded(path, "every:1", None).frames_NHWC


def pyav(path: Path) -> np.ndarray:
    """The loop that most programs have: the first video stream, `container.decode`."""
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def decord(path: Path) -> np.ndarray:
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    found: np.ndarray = reader.get_batch(range(len(reader))).asnumpy()
    return found


def torchcodec(path: Path) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), dimension_order="NHWC")
    return np.stack([frame.numpy() for frame in decoder])


def daft(path: Path) -> np.ndarray:
    import daft

    frames = daft.read_video_frames(str(path), image_height=96, image_width=192).select("data").to_pydict()["data"]
    return np.stack([np.asarray(frame) for frame in frames])


READERS: dict[str, Read] = {"p3d": p3d, "pyav": pyav, "decord": decord, "torchcodec": torchcodec, "daft": daft}


def outcome(case: Case, read: Read, path: Path) -> str:
    """`right`, or in a few words what is wrong."""
    try:
        frames_NHWC = read(path)
    except ImportError:
        return "not installed"
    except Exception as error:  # noqa: BLE001 - whatever a reader raises
        return "right" if case.reasons else f"error: {type(error).__name__}"
    if case.reasons:
        return f"{len(frames_NHWC)} frames, no error"
    numbers = make.numbers_in(np.rot90(frames_NHWC, -(case.turn // 90), axes=(1, 2)))
    if numbers == list(case.frames):
        return "right"
    return f"{len(numbers)} frames" if len(numbers) != len(case.frames) else "other frames"


def _child(results: multiprocessing.Queue[str], case: Case, name: str, path: Path) -> None:
    results.put(outcome(case, READERS[name], path))


def in_a_process(case: Case, name: str, path: Path) -> str:
    """`outcome` in a process of its own: a reader may crash, or never return."""
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    process = context.Process(target=_child, args=(results, case, name, path))
    process.start()
    try:
        return results.get(timeout=TIMEOUT_S)
    except queue.Empty:
        return "crash" if process.exitcode else "no end"
    finally:
        process.kill()
        process.join()


def _is_usable(name: str, folder: Path) -> bool:
    """Does the reader read a plain video? It may not be installed, or lack a library."""
    case = Case("plain.mp4", lambda path: make.video(path, "libx264", 24), "a plain video")
    case.build(folder / case.name)
    found = in_a_process(case, name, folder / case.name)
    (folder / case.name).unlink()
    if found != "right":
        print(f"{name} is left out: it cannot read a plain video here ({found})")
    return found == "right"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where the files are written (default: temporary)")
    parser.add_argument("--reader", action="append", choices=sorted(READERS), help="readers to run (default: all)")
    asked = parser.parse_args()
    names = asked.reader or list(READERS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "corpus.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["file", "frames", "error", "rotation", "seconds", "fps", "evidence"])
            for case in CASES:
                frames = "" if case.reasons else len(case.frames)
                rows.writerow(
                    [case.name, frames, " or ".join(case.reasons), case.turn, case.duration_s, case.fps, case.evidence]
                )
        names = [name for name in names if _is_usable(name, folder)]
        print(f"{'file':32}" + "".join(f"{name:>22}" for name in names))
        right = dict.fromkeys(names, 0)
        for case in CASES:
            path = folder / case.name
            case.build(path)
            found = [in_a_process(case, name, path) for name in names]
            print(f"{case.name:32}" + "".join(f"{text:>22}" for text in found), flush=True)
            for name, text in zip(names, found, strict=True):
                right[name] += text == "right"
        print(f"{f'right, of {len(CASES)}':32}" + "".join(f"{right[name]:>22}" for name in names))


if __name__ == "__main__":
    main()
