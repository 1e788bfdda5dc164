"""Download the samples that are public into the folder P3D_SAMPLES: `python -m tests.samples.fetch`, or `make samples`.

The bytes go to NAME.partial, which gets its final name once size and hash are those of the list. A file that is there
is checked and left alone. After a cut, the same command continues. Exits 1 if a file is missing or wrong.
"""

from __future__ import annotations

import hashlib
import http.client
import sys
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from urllib.error import HTTPError

from tests.samples import FOLDER, Sample, listed

PIECE_BYTES = 1 << 16
SILENCE_S = 30.0  # without a byte from the server
AGAIN = "run the same command again"


class FetchError(Exception):
    """Why a sample is not there, and what to do."""


def fetch_all(samples: Iterable[Sample], folder: Path) -> int:
    """Download what is public and absent; a line for each file on stdout, or on stderr if it fails. The exit code."""
    public = [one for one in samples if one.url is not None]
    n_failed = 0
    for number, one in enumerate(public, 1):
        try:
            what = "downloaded" if fetch(one, folder / one.path) else "is there"
            print(f"{number}/{len(public)} {one.path}: {what}, {one.n_bytes} bytes", flush=True)
        except FetchError as error:
            n_failed += 1
            print(f"error: {one.path}: {error}", file=sys.stderr, flush=True)
    print(f"{len(public) - n_failed} of {len(public)} public samples are in {folder}")
    return 1 if n_failed else 0


def fetch(sample: Sample, path: Path) -> bool:
    """Download one file to `path`; False if it is there already. FetchError."""
    try:
        if path.exists():
            if wrong := _difference(sample, path):
                raise FetchError(f"{path} {wrong}; remove it and {AGAIN}")
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.partial")
        if not part.exists() or part.stat().st_size < sample.n_bytes:
            _download(sample, part)
        if wrong := _difference(sample, part):
            part.unlink()
            raise FetchError(f"{sample.url} {wrong}, and nothing of it was kept; the list may be out of date")
        part.replace(path)
    except OSError as error:
        raise FetchError(
            f"{path.parent} cannot be used ({error.strerror}); set P3D_SAMPLES to another folder"
        ) from None
    return True


def _difference(sample: Sample, path: Path) -> str:
    """How a file differs from the list; empty if it does not."""
    if (n_bytes := path.stat().st_size) != sample.n_bytes:
        return f"has {n_bytes} bytes instead of {sample.n_bytes}"
    return "" if hashlib.sha256(path.read_bytes()).hexdigest() == sample.sha256 else f"has not the hash {sample.sha256}"


def _download(sample: Sample, part: Path) -> None:
    """Complete the partial file, or a byte more than that, which shows that it is another file. FetchError."""
    had = part.stat().st_size if part.exists() else 0
    why = "the connection was closed"
    request = urllib.request.Request(str(sample.url), headers={"Range": f"bytes={had}-"} if had else {})
    try:
        with urllib.request.urlopen(request, timeout=SILENCE_S) as answer:
            continues = answer.status == http.HTTPStatus.PARTIAL_CONTENT
            with part.open("ab" if continues else "wb") as file:
                while file.tell() <= sample.n_bytes and (piece := answer.read(PIECE_BYTES)):
                    file.write(piece)
    except HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink()
        raise FetchError(f"{sample.url} answered {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        why = str(getattr(error, "reason", "") or error)
    if (has := part.stat().st_size if part.exists() else 0) < sample.n_bytes:
        raise FetchError(f"{sample.url} gave {has} of {sample.n_bytes} bytes ({why}); to continue, {AGAIN}")


def main() -> int:
    """Download the whole list."""
    return fetch_all(listed(), FOLDER)


if __name__ == "__main__":
    sys.exit(main())
