"""`p3d weights fetch` and `p3d weights list`: download published weights and import them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.weights import as_json_option, check_name, convert, import_options, out_option


@click.command()
@click.argument("name", required=False)
@out_option
@click.option("--url", metavar="URL", help="Download this file, or NAME from this mirror. Default: torchvision's.")
@click.option(
    "--sha256",
    metavar="HEX",
    help="Require this hash of the file, 64 hex digits. Default: the first digits, from the name of the file.",
)
@import_options
@as_json_option
def fetch(name: str | None, out: Path, url: str | None, sha256: str | None, as_json: bool, **typed: Any) -> int:
    """Download weights and write them to OUT as `p3d weights import` does.

    \b
      p3d weights fetch resnet50-v2 -o p3d63.safetensors
      p3d weights fetch resnet50-v2 -o w.safetensors --temporal gaussian --seed 0

    NAME is one of the names in `p3d weights list`: torchvision's ImageNet ResNets. They were trained on pictures, not
    on videos, so the P3D that is made from one SEES FRAMES, NOT MOTION (`p3d weights import --help`). ImageNet's terms
    may bind you. With --url, any file that `p3d weights import` reads can be downloaded. Such a URL needs --sha256,
    unless it is https and its file name contains the hash, as in resnet50-0676ba61.pth.

    The file is kept in torch's cache (TORCH_HOME, default ~/.cache/torch), in hub/checkpoints, and is not downloaded
    twice. If a download stops, the part that has arrived is kept there as NAME.partial, and the same command continues
    it. HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY and SSL_CERT_FILE are respected.

    Exits 2 if the file cannot be downloaded this way (unknown URL, wrong hash) or does not fit, and 6 if the same
    command may succeed later (no network, proxy, cut, too slow, disk full).
    """
    from p3d.jobs.cli.progress import show_download
    from p3d.jobs.planning.job_spec import check_named
    from p3d.pipeline.errors import InputError, StoreError

    check_name(out)
    check_named(typed["model"])
    from p3d.weights import WeightsError, published  # which imports torch
    from p3d.weights import fetch as downloads

    try:
        wanted = published.wanted(name, url, sha256)
        with show_download(wanted.file) as progress:
            file = downloads.fetch(wanted, progress=progress)
    except downloads.DownloadError as error:
        raise StoreError(str(error)) from None
    except WeightsError as error:
        raise InputError(str(error)) from None
    output.say(f"{file} has the sha256 that was expected, {wanted.sha256}")
    convert(file, out, as_json=as_json, downloaded=wanted.origin, **typed)
    return 0


@click.command("list")
@as_json_option
def list_(as_json: bool) -> int:
    """List the weights that `p3d weights fetch` knows by name.

    All are 2-D ImageNet ResNets of torchvision, in two versions of its training. NETWORK is what an import makes of
    them. MB is about the size of the download. SHA256 shows the first digits, as published. torchvision is under
    BSD-3-Clause, and says that a model may be bound to the terms of its training data, here ImageNet's.
    """
    from p3d.weights.published import LICENCE, PUBLISHED

    records = [
        {
            "name": one.name,
            "network": one.network,
            "size_mb": round(one.size_mib * 1.048576, 1),
            "sha256": one.sha256,
            "licence": LICENCE,
            "weights": one.weights,
            "url": one.url,
        }
        for one in PUBLISHED.values()
    ]
    if as_json:
        output.show_json({"weights": records})
        return 0
    head = ("NAME", "NETWORK", "MB", "SHA256", "TORCHVISION")
    rows = [
        tuple(str(record[key]) for key in ("name", "network", "size_mb", "sha256", "weights")) for record in records
    ]
    output.show(*output.table([head, *rows], right=(2,)), f"licence: {LICENCE}")
    return 0
