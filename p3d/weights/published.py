"""Which file of weights to download, from where, and the SHA-256 that identifies its content.

torchvision publishes each file with the first eight digits of its SHA-256 in the name, and torch's cache relies on it.
A file of another name gets these digits here, so two files of one name never meet in the cache.
Source: torchvision/models/resnet.py (addresses, sizes) and its README (a model may be bound to the terms of its data).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

from urllib3.exceptions import LocationParseError
from urllib3.util import Url, parse_url

from p3d.weights.record import WeightsError

FOLDER: Final = "https://download.pytorch.org/models"
LICENCE: Final = "BSD-3-Clause; ImageNet's terms"
_NAME: Final = re.compile(r"([A-Za-z0-9][\w.-]{0,150}?)(\.pth\.tar|\.pth|\.pt|\.tar|\.safetensors|\.caffemodel)", re.A)


@dataclass(frozen=True, slots=True)
class Published:
    """A file that torchvision publishes, the P3D it becomes, and about its size in MiB as torchvision states it."""

    name: str
    weights: str
    network: str
    file: str
    size_mib: float

    @property
    def url(self) -> str:
        return f"{FOLDER}/{self.file}"

    @property
    def sha256(self) -> str:
        """The first eight hex digits of the SHA-256, from the name of the file."""
        return self.file.rpartition("-")[2].removesuffix(".pth")


PUBLISHED: Final = {
    f"resnet{depth}-v{version}": Published(
        f"resnet{depth}-v{version}",
        f"ResNet{depth}_Weights.IMAGENET1K_V{version}",
        network,
        f"resnet{depth}-{digits}.pth",
        size_mib,
    )
    for depth, version, network, digits, size_mib in (
        (50, 1, "p3d63", "0676ba61", 97.781),
        (50, 2, "p3d63", "11ad3fa6", 97.79),
        (101, 1, "p3d131", "63fe2227", 170.511),
        (101, 2, "p3d131", "cd907fc2", 170.53),
        (152, 1, "p3d199", "394f9c45", 230.434),
        (152, 2, "p3d199", "f82ba261", 230.474),
    )
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to download: URL, name in the cache, SHA-256 or its first digits (hex), and what its origin says."""

    url: str
    file: str
    sha256: str
    origin: str


def wanted(name: str | None = None, url: str | None = None, sha256: str | None = None) -> Wanted:
    """The file of a name in `PUBLISHED`, of a URL, or of that name at that URL (a mirror).

    A URL without https, or whose file name has no hash, needs a `sha256` of 64 hex digits. Raises WeightsError for an
    unknown name, a URL that cannot be used, and a hash that is missing, malformed, or not that of the name.
    """
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256 := sha256.lower()):
        raise WeightsError(f"{sha256[:80]} is not a sha256, which has 64 hex digits, as `sha256sum FILE` prints it")
    if name is not None and name not in PUBLISHED:
        raise WeightsError(f"there are no published weights {name}; give one of {', '.join(PUBLISHED)}, or --url")
    known = PUBLISHED.get(name or "")
    if known and sha256 and not sha256.startswith(known.sha256):
        raise WeightsError(f"the sha256 of {known.name} begins with {known.sha256}, not {sha256[:8]}; leave it out")
    if url is None:
        if known is None:
            raise WeightsError("no weights were named; give a NAME of `p3d weights list`, or --url and --sha256")
        url = known.url
    parts = checked(url)
    scheme = parts.scheme
    name_of_file = known.file if known else unquote(parts.path or "").rpartition("/")[2]
    match = _NAME.fullmatch(name_of_file)
    if match is None:
        raise WeightsError(f"{shown(url)} does not end in the name of a file of weights, such as resnet50.pth")
    stem, suffix = match.groups()
    held = re.fullmatch(r".*-([0-9a-f]{8,64})", stem)
    digits = sha256 or (held[1] if held and scheme == "https" else None)
    if digits is None:
        why = "over http anybody on the way can change the file" if scheme == "http" else "its file name has no hash"
        raise WeightsError(f"{shown(url)} needs --sha256 with the hash that its publisher states, because {why}")
    if held is None or not digits.startswith(held[1]):
        stem = f"{stem}-{digits[:8]}"
    origin = f"downloaded from {shown(url)}"
    if known:
        origin += f", torchvision's {known.weights} ({LICENCE}): trained on pictures of ImageNet-1K, not on video"
    return Wanted(url, stem + suffix, digits, origin)


def checked(url: str) -> Url:
    """The parts of an http(s) URL. Raises WeightsError for another one, and for one with a user name or password."""
    try:
        parts = parse_url(url)
    except LocationParseError:
        parts = Url()
    if parts.scheme not in ("http", "https") or not parts.host or not re.fullmatch("[!-~]{1,2000}", url):
        raise WeightsError(
            "the URL must be http:// or https://, a host and a path, of at most 2000 printable ASCII characters; local "
            "files are for `p3d weights import FILE`"
        )
    if parts.auth is not None:
        raise WeightsError(
            f"{shown(url)} was given with a user name or password, which would end up in logs; download the file in "
            "another way and run `p3d weights import FILE`"
        )
    return parts


def shown(url: str) -> str:
    """A URL without user and query, which may be secret: for messages and origins."""
    parts = parse_url(url)
    return f"{parts.scheme}://{parts.netloc}{parts.path or ''}{'?...' if parts.query else ''}"
