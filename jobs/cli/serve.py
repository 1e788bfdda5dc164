"""`p3d results serve`: a local web page for OUT. Imports torch when the first file is dropped, and never Ray."""

from __future__ import annotations

import asyncio
import html
import os
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.options import out_store, source_option, store_options, store_options_of
from p3d.jobs.cli.progress import show_steps
from p3d.pipeline.types.options import DEVICES

if TYPE_CHECKING:
    from p3d.jobs.api.search import Rows
    from p3d.pipeline.results.page.archive import Archive
    from p3d.pipeline.results.page.similar import Embed

MIB = 1024**2
MOMENT_S = 0.5  # that threads get to end by themselves
REDIRECT = """<!doctype html>
<meta charset="utf-8"><meta name="referrer" content="no-referrer">
<meta http-equiv="refresh" content="0; url={url}">
<title>p3d</title>
<p><a href="{url}">The page of p3d results serve</a></p>
"""


@click.command()
@click.argument("out")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Listen on this port. Default: a free one.")
@click.option("--open/--no-open", "open_page", default=True, show_default=True, help="Open the page in the browser.")
@click.option(
    "--map",
    "layout",
    type=click.Choice(["pca", "umap"]),
    default="pca",
    show_default=True,
    help="Lay out the map by PCA or UMAP.",
)
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    default="auto",
    show_default=True,
    help="Embed dropped files on this device.",
)
@click.option(
    "--drop-limit",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    metavar="MIB",
    help="Accept dropped files up to this size.",
)
@source_option("Open only videos below this folder or s3://bucket/prefix.")
@store_options
def serve(
    out: str,
    port: int,
    open_page: bool,
    layout: str,
    device: str,
    drop_limit: int,
    source: str | None,
    **typed: Any,
) -> int:
    """Open a local web page to explore OUT: search, play, drop a file, see all videos on a map.

    Find videos by path, id or conditions on columns. A click plays a clip from its second and shows what is most
    similar, with cosines. A file that is dropped on the page is embedded as `p3d search OUT FILE` does it. The map
    shows up to 20 000 videos, by PCA or (extra `umap`) UMAP of their vectors, coloured by cluster.

    The page opens at once, and shows how much is read. The vectors of the videos are in a temporary file.

    Of an OUT that is not trusted (see `p3d trust`) no video is opened without --source.

    The page listens only on 127.0.0.1, under a printed URL with a random token. It serves the videos of OUT and no
    other file, and only while they are unchanged since they were embedded. From another machine:
    ssh -L 8000:127.0.0.1:PORT HOST. Ctrl-C ends it. It shows OUT as it was at the start. OUT may be a snapshot, too.
    """
    output.need("aiohttp", "page")
    if layout == "umap":
        output.need("umap", "umap")
    from p3d.jobs.cli.trust import sources_allowed
    from p3d.jobs.job import rows_of
    from p3d.pipeline.results.page.archive import read_rows, with_map
    from p3d.pipeline.results.page.opening import Opening
    from p3d.pipeline.results.page.server import serve_until_stopped
    from p3d.pipeline.results.search.index_cache import name_old_index

    s3 = store_options_of(typed)
    store = out_store(out, s3)
    rule = sources_allowed(store, source)
    rows = rows_of(store)
    name_old_index(store)

    def read(on_step: Callable[[str, int, int], None]) -> Iterator[Archive]:
        archive = read_rows(rows, partial(on_step, "read"))
        yield archive
        yield with_map(archive, layout)

    output.say(f"{output.count(rows.n_videos, 'video')} of {store.url}; Ctrl-C ends the page")
    if rows.pending:
        output.say(f"{output.count(rows.pending, 'video')} pending and not shown")

    with tempfile.TemporaryDirectory(prefix="p3d-open-") as private:

        def ready(url: str) -> None:
            output.show(url)
            sys.stdout.flush()
            if open_page:
                _open(url, Path(private))

        asyncio.run(
            serve_until_stopped(
                Opening(read, show_steps(False)),
                embed=_embed_of(rows, device),
                options=s3,
                port=port,
                dropped_bytes=drop_limit * MIB,
                rule=rule,
                on_ready=ready,
            )
        )
    _leave()
    return 0


def _open(url: str, private: Path) -> None:
    """Open a URL by way of a file in a private folder: all users can see the arguments of the browser's process."""
    path = private / "page.html"
    path.touch(0o600)
    path.write_text(REDIRECT.format(url=html.escape(url)))
    threading.Thread(target=webbrowser.open, args=(path.as_uri(),), daemon=True).start()  # some block until closed


def _leave() -> None:
    """End the process if a thread does not end: a batch that is being computed cannot be interrupted."""
    until = time.monotonic() + MOMENT_S
    for thread in threading.enumerate():
        if thread is threading.current_thread() or thread.daemon:
            continue
        thread.join(max(0.0, until - time.monotonic()))
        if thread.is_alive():
            sys.stdout.flush()
            os._exit(0)


def _embed_of(source: Rows, device: str) -> Embed | None:
    """The function that embeds dropped files, with one network for all; None if OUT has no weights."""
    from p3d.jobs.job import weights_key

    if source.store.head(weights_key(source.job.recipe)) is None:
        return None
    encoder: Any = None

    def embed(path: Path) -> Any:
        nonlocal encoder
        from p3d.jobs.api.search import embedded, encoder_of

        encoder = encoder or encoder_of(source, device)
        return embedded(source, str(path), encoder)

    return embed
