"""`p3d results index`: an index for fast search, beside the dataset. Needs faiss-cpu; neither torch nor Ray."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.options import out_store, store_options, store_options_of
from p3d.jobs.cli.results import progress


@click.command()
@click.argument("out")
@click.option("--level", type=click.Choice(["clip", "video"]), default="clip", show_default=True)
@click.option("--metric", type=click.Choice(["cosine", "l2"]), default="cosine", show_default=True)
@click.option(
    "--kind", type=click.Choice(["flat", "ivf", "sq8", "pq"]), help="How vectors are held; without it, by size."
)
@click.option(
    "--sample",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    metavar="N",
    help="Rows to measure recall with; 0 measures none.",
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Of FAISS; without it, all cores.")
@click.option("--rebuild", is_flag=True, help="Make it anew, and not only add what is new.")
@click.option("--json", "as_json", is_flag=True, help="The index's record on stdout.")
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
    """Make an index of OUT for `p3d search --index`, or add to it the rows that came since.

    Kinds, and what a row of 2048 features takes: flat holds every number (8 kB) and looks at all of them; ivf holds
    every number in lists and looks through some; sq8 the same in 8 bits (2 kB); pq in codes of 128 bytes. By size, it
    is flat to 256 MiB of rows, ivf to 2 GiB, sq8 to 16 GiB, then pq. An index is made in memory: it takes its own size,
    512 MiB to train with, and one group of rows.

    It is written whole to OUT/_job/index/ and may be deleted. The recall@10 that is printed is of the index by itself,
    against exact search, for rows drawn at random; of lists, as many are looked through as give 0.95. An index of other
    weights or settings is refused. Of a video that was replaced, older rows stay in the index, which skips them, until
    --rebuild.
    """
    output.need("faiss", "search")
    from p3d.jobs.job import rows_of
    from p3d.jobs.machine import usable_cpus
    from p3d.pipeline.results.search.index_build import build_index

    started = time.monotonic()
    source = rows_of(out_store(out, store_options_of(typed)))
    show_steps = sys.stderr.isatty() and not as_json
    record = build_index(
        source,
        level=level,
        metric=metric,
        kind=kind,
        sample=sample,
        threads=threads or usable_cpus(),
        rebuild=rebuild,
        on_step=progress if show_steps else None,
    )
    if as_json:
        shown = {name: value for name, value in asdict(record).items() if name != "pieces"}
        output.show_json({"out": source.store.url, **shown, "pending": source.pending})
        return 0
    recall = "-" if record.recall_at_10 is None else f"{record.recall_at_10:.3f} on {record.sample} rows"
    lists = f", {record.nprobe} of {record.nlist} lists looked through" if record.nlist else ""
    output.show(
        *output.table(
            [
                ("rows", str(record.n_rows)),
                ("kind", f"{record.kind} ({record.factory}{lists})"),
                ("size", output.human_bytes(record.index_bytes)),
                ("recall@10", recall),
            ]
        )
    )
    output.say(f"{source.store.url}/{record.index_key}, in {output.human_time(time.monotonic() - started)}")
    if source.pending:
        output.say(f"{output.count(source.pending, 'video')} still to be done; index OUT again to add them")
    return 0
