"""`p3d results index`: an index for fast search, in this user's cache. Needs faiss-cpu, but neither torch nor Ray."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.declared import options_of
from p3d.jobs.cli.options import out_store, store_options, store_options_of
from p3d.jobs.cli.progress import show_steps
from p3d.pipeline.results.search.options import SearchOptions


@click.command()
@click.argument("out")
@options_of(SearchOptions, only=("level", "metric"))
@click.option(
    "--kind",
    type=click.Choice(["flat", "ivf", "sq8", "pq"]),
    help="Store vectors in this form (see above). Default: by size.",
)
@click.option(
    "--sample",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    metavar="N",
    help="Measure recall on N rows; 0 skips it.",
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Use N threads of FAISS. Default: all cores.")
@click.option("--rebuild", is_flag=True, help="Build the index from scratch instead of adding new rows.")
@click.option("--json", "as_json", is_flag=True, help="Print the record of the index on stdout.")
@store_options
def index(
    out: str,
    level: Any,
    metric: Any,
    kind: str | None,
    sample: int,
    threads: int | None,
    rebuild: bool,
    as_json: bool,
    **typed: Any,
) -> int:
    """Build an index of OUT for `p3d search --index`, or add the rows that are new since the last build.

    Kinds, with the size of a row of 2048 features: flat stores float32 (8 kB) and scans all rows; ivf stores the same
    in inverted lists and scans some of them; sq8 does so in 8 bits (2 kB), pq in codes of 128 bytes. The default is
    flat up to 256 MiB of rows, ivf up to 2 GiB, sq8 up to 16 GiB, then pq. An index is built in memory. That takes its
    own size, 512 MiB for training, and one row group.

    The index is written atomically to your cache (P3D_CACHE, default ~/.cache/p3d) and may be deleted. Nothing of it is
    read from or written to OUT. The printed recall@10 compares the index alone with exact search, on random rows;
    enough lists are scanned to reach 0.95. Old rows of a replaced video stay in the index and are skipped, until
    --rebuild.
    """
    output.need("faiss", "search")
    from p3d.jobs.job import rows_of
    from p3d.jobs.machine import usable_cpus
    from p3d.pipeline.results.search.index_build import build_index
    from p3d.pipeline.results.search.index_cache import IndexFolder

    started = time.monotonic()
    source = rows_of(out_store(out, store_options_of(typed)))
    record = build_index(
        source,
        level=level,
        metric=metric,
        kind=kind,
        sample=sample,
        threads=threads or usable_cpus(),
        rebuild=rebuild,
        on_step=show_steps(as_json),
        say=output.say,
    )
    assert record.vectors is not None
    path = IndexFolder.of(source, level, metric).path / record.vectors.name
    if as_json:
        shown = {name: value for name, value in asdict(record).items() if name not in ("pieces", "vectors", "rows")}
        shown["index_bytes"] = record.vectors.size_bytes
        output.show_json({"out": source.store.url, "file": str(path), **shown, "pending": source.pending})
        return 0
    recall = "-" if record.recall_at_10 is None else f"{record.recall_at_10:.3f} on {record.sample} rows"
    lists = f", {record.nprobe} of {record.nlist} lists scanned" if record.nlist else ""
    output.show(
        *output.table(
            [
                ("rows", str(record.n_rows)),
                ("kind", f"{record.kind} ({record.factory}{lists})"),
                ("size", output.human_bytes(record.vectors.size_bytes)),
                ("recall@10", recall),
            ]
        )
    )
    output.say(f"{path}, in {output.human_time(time.monotonic() - started)}")
    if source.pending:
        output.say(f"{output.count(source.pending, 'video')} pending; index OUT again to add them")
    return 0
