"""`p3d search`: find what is most similar to a video. Imports torch only to embed a file, and never Ray."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.declared import Declared, options_of
from p3d.jobs.cli.options import store_options, store_options_of
from p3d.jobs.cli.progress import show_steps
from p3d.pipeline.results.search.options import SearchOptions
from p3d.pipeline.types.options import options_in

if TYPE_CHECKING:
    from p3d.pipeline.results.search.exact import Hit, SearchResult

HITS = "Which hits"  # the heading of these options
TYPED = tuple(field.name for field, _ in options_in(SearchOptions))


@click.command()
@click.argument("out")
@click.argument("query")
@options_of(SearchOptions, only=("level", "metric", "top", "per_video", "with_self"), group=HITS)
@click.option(
    "--where",
    cls=Declared,
    group=HITS,
    multiple=True,
    metavar="CONDITION",
    help="Keep only rows that meet this, such as codec=h264. May be repeated. Default: all.",
)
@options_of(SearchOptions, only=("distinct",), group=HITS)
@options_of(SearchOptions, only=("index", "device"))
@click.option(
    "--also",
    multiple=True,
    metavar="OUT",
    help="Search this output of the same recipe, too. May be repeated. Default: none.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@store_options
def search(
    out: str,
    query: str,
    also: tuple[str, ...],
    where: tuple[str, ...],
    as_json: bool,
    **typed: Any,
) -> int:
    """Find the clips or videos of OUT that are most similar to QUERY, the nearest first.

    \b
      p3d search out/ videos/one.mp4                  # the whole video
      p3d search out/ videos/one.mp4@12.5 --top 5     # its second 12.5
      p3d search out/ one.mp4 --level video --where label=cat

    QUERY is a video file, or the video_id, uri or path of a video of OUT. A file is embedded now, with the settings of
    the job at OUT. For a video of OUT its stored rows are used. With a position, as in VIDEO@12.5, VIDEO@1:05 or
    VIDEO@1:02:03.5, QUERY is the clip that shows that second.

    A whole video compared with clips finds clips that are similar to any of its own. The best clip of each video is
    shown, or with --every-clip all of them. If QUERY is a video of OUT, or the file that OUT has a row of, its own rows
    are left out unless --with-self. With --metric cosine, 1 means the same direction; with l2, 0 means equal
    vectors. OUT may be a snapshot, too. A file is embedded in the precision of OUT's rows, or in fp32 with a warning if
    this machine does not support it.

    --where takes a column, one of = != < <= > >=, and a value; all conditions must hold. Columns are those of the rows
    and of videos/, including the ones of your own list: --where "duration_s>=60" --where label=cat.

    OUT may be a folder or prefix with several outputs of one recipe directly in it. With these, or with --also, the
    best hits of all are shown, and which output has each. Ids are unique in one output only: if several have the video
    of QUERY, name it by its uri or file.

    Without --index every row is read and checked, in groups of 4096. Only the newest row of each video counts.
    """
    options = SearchOptions(where=where, **{name: typed[name] for name in TYPED})
    if options.index:
        output.need("faiss", "search")
    from p3d.jobs.api.dataset import several_rows
    from p3d.jobs.api.search import find_in_all, resolve_in_all
    from p3d.pipeline.storage.urls import short_names

    sources = several_rows([out, *also], store_options_of(typed))
    queries = resolve_in_all(sources, query, level=options.level, device=options.device)
    found = find_in_all(sources, queries, options, on_step=partial(show_steps(as_json), "searched"))
    level, metric, spans = options.level, options.metric, queries[0].seconds
    urls, pending = [one.store.url for one in sources], sum(one.pending for one in sources)
    if as_json:
        output.show_json(
            {
                **({"out": urls[0]} if len(urls) == 1 else {"outs": urls}),
                "query": query,
                "level": level,
                "metric": metric,
                "rows": found.n_rows,
                "seconds": round(found.seconds, 4),
                "indexed_rows": found.n_indexed,
                "new_videos": found.n_new,
                "pending": pending,
                "warning": found.warning,
                "hits": [{"rank": at + 1, **_record(hit, metric, spans)} for at, hit in enumerate(found.hits)],
            }
        )
        return 0
    output.show(*_lines(found, metric, level, spans, short_names(urls)))
    _footer(found, options, pending)
    if any(one.video_id is not None for one in queries) and not options.with_self:
        output.say("the query itself is left out; --with-self shows it, too")
    return 0


def _record(hit: Hit, metric: str, spans: tuple[tuple[float, float], ...]) -> dict[str, Any]:
    """A hit as a JSON record: its score under the metric's name, and the seconds of the query that it matches."""
    left_out = {"score", "query", "embedding_D", *(["out"] if hit.out is None else [])}
    kept = [one.name for one in fields(hit) if one.name not in left_out]
    start_s, end_s = spans[hit.query]
    record = {metric: hit.score, **{name: getattr(hit, name) for name in kept}}
    return {**record, "query_start_s": start_s, "query_end_s": end_s}


def _lines(
    found: SearchResult, metric: str, level: str, spans: tuple[tuple[float, float], ...], outs: dict[str, str]
) -> list[str]:
    by_clip, many, several = level == "clip", len(spans) > 1, len(outs) > 1
    head = (
        "",
        metric,
        *(("output",) if several else ()),
        "path",
        *(("seconds",) if by_clip else ()),
        *(("query seconds",) if many else ()),
    )
    rows = [head]
    for at, hit in enumerate(found.hits):
        times = (_span(hit.start_s, hit.end_s),) if by_clip else ()
        asked = (_span(*spans[hit.query]),) if many else ()
        where = (outs[hit.out],) if several and hit.out is not None else ()
        rows.append((str(at + 1), f"{hit.score:.4f}", *where, hit.path, *times, *asked))
    return output.table(rows, right=(0, 1)) if found.hits else []


def _span(start_s: float, end_s: float) -> str:
    return f"{start_s:.2f}-{end_s:.2f}"


def _footer(found: SearchResult, options: SearchOptions, pending: int) -> None:
    if found.warning:
        output.say(found.warning)
    rate = found.n_rows / max(found.seconds, 1e-9)
    compared = f"{output.count(found.n_rows, options.level)} compared in {found.seconds:.2f} s ({rate:,.0f} rows/s)"
    output.say(f"{compared}; the index has {found.n_indexed} rows" if found.n_indexed else compared)
    if found.n_new:
        output.say(
            f"{output.count(found.n_new, 'video')} came after the index and were compared in full; index OUT again"
        )
    if not found.hits:
        limited = bool(options.where) or options.distinct is not None
        output.say("no rows are left: loosen --where or --distinct" if limited else "there is no other row to find")
    elif found.cut_short:
        output.say("near-duplicates filled the candidates; more distinct hits may exist than are shown")
    if pending:
        output.say(f"{output.count(pending, 'video')} pending and not searched")
