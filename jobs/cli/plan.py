"""`p3d plan`: what a launch would do, what would go wrong, and how long it would take. Writes nothing."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.declared import options_of
from p3d.jobs.cli.options import job_spec, out_store, recipe_options, source_options, store_options, store_options_of
from p3d.pipeline.recipe import RunOptions

if TYPE_CHECKING:
    from p3d.jobs.planning.changes import ToDo
    from p3d.jobs.planning.estimate import Estimate
    from p3d.pipeline.recipe import Recipe

WIDTH = 80
NAME = 40  # characters of a file name, at most
Lines = list[tuple[str, str]]


def _rate(recipe: Recipe) -> str:
    return "" if recipe.fps is None else f", at {recipe.fps:g} frames/s"


def _cores(guess: Estimate) -> str:
    """What decoding costs in CPU time."""
    decoding = f"{guess.decode_s_per_clip * 1e3:.1f} ms of a core to decode a clip"
    if guess.useful_cores is None:
        return f"{decoding}, {guess.network_s_per_clip * 1e3:.0f} to embed it"
    return f"{decoding}: {guess.useful_cores:.1f} cores keep a GPU busy"


def _batches(guess: Estimate) -> list[tuple[str, str]]:
    """The clips per second of several batch sizes, if they were measured."""
    rates = [f"{size}: {rate:.0f}" if rate else f"{size}: out of memory" for size, rate in guess.by_batch.items()]
    return [("batch", f"{', '.join(rates)} (clips/s)")] if rates else []


def _feeding(guess: Estimate) -> Lines:
    """How many clips per second reach a worker on a GPU, and what limits that."""
    fed = guess.feeding
    if fed is None:
        return []
    stages = ", ".join(f"{stage} {rate:.0f}" for stage, rate in fed.by_stage.items())
    return [
        ("feeding", f"one worker gets at most {fed.clips_per_s:.0f} clips/s here, limited by {fed.binding}"),
        ("", f"(each stage alone: {stages} clips/s)"),
    ]


def _precisions(guess: Estimate) -> Lines:
    """What other precisions would gain and cost here, if they were measured; the option is named for the best one."""
    from p3d.jobs.planning.estimate import recommended
    from p3d.jobs.planning.network_trial import WORTH

    lines, best = Lines(), recommended(guess.gains)
    for one in guess.gains:
        if one.times < WORTH:
            gains = f"not faster here: the network {one.times:.2f} times as fast as in fp32"
        else:
            gains = f"network {one.times:.1f} times as fast here, the job {one.job_times:.1f} times"
            gains += f": --precision {one.precision}" if one is best else ""
        clips = output.count(one.n_clips, "clip")
        cosines = f"(cosine with fp32 {one.cosine:.6f}, lowest {one.lowest:.6f}, of {clips})"
        lines += [(one.precision, gains), ("", cosines)]
    for lacking in dict.fromkeys(guess.not_compared.values()):
        names = " or ".join(name for name, what in guess.not_compared.items() if what == lacking)
        lines.append(("precision", f"{lacking} does not support {names}"))
    return lines


def _short(name: str) -> str:
    """A file name for a line of the table: the end tells more than the beginning."""
    return name if len(name) <= NAME else f"...{name[3 - NAME :]}"


def _share(share: float | None) -> Lines:
    """How much of a video the clips look at."""
    if share is None:
        return []
    percent = f"{100 * share:.0f}" if share >= 0.01 else f"{100 * share:.1g}"
    return [("", f"(looks at {percent} % of the frames of the median video)")]


def _videos(todo: ToDo, guess: Estimate | None, out: str | None) -> Lines:
    """How many videos there are to do, and why."""
    changes, n_pending = todo.changes, todo.pending.num_rows
    n_todo = changes.n_videos + n_pending
    if guess is None:
        lines = [("videos", "nothing to do")]
    else:
        size = output.human_bytes(guess.size_bytes)
        lines = [("videos", f"{n_todo} ({size}) in {output.count(guess.n_shards, 'shard')}")]
    if out is not None and (n_pending or changes.n_changed or changes.n_columns or changes.n_same):
        pending = f", and {n_pending} pending of earlier plans" if n_pending else ""
        own = f"{changes.n_columns} with changed columns, " if changes.n_columns else ""
        counts = f"{changes.n_new} new, {changes.n_changed} changed, {own}{changes.n_same} unchanged{pending}"
        lines.append(("", f"({counts})"))
    if changes.warning:
        lines.append(("warning", changes.warning.removeprefix("warning: ")))
    return lines


def _problems(guess: Estimate) -> Lines:
    """What will go wrong: files that are missing, and videos of the sample that fail."""
    lines: Lines = []
    if guess.n_missing:
        names = ", ".join(map(_short, guess.missing))
        more = ", ..." if guess.n_missing > len(guess.missing) else ""
        do = "does" if guess.n_missing == 1 else "do"
        lines.append(("missing", f"{output.count(guess.n_missing, 'file')} {do} not exist: {names}{more}"))
    if guess.n_sampled:
        share = f" ({guess.n_failed / guess.n_sampled:.0%})" if guess.n_failed else ""
        lines.append(("failing", f"{guess.n_failed} of {output.count(guess.n_sampled, 'video')} looked at{share}"))
    for one in guess.failing:
        path, detail = one.examples[0]
        lines.append(("", f"{one.count} {one.reason}, such as {_short(path)}: {detail}"))
    return lines


def _table(rows: Lines) -> list[str]:
    """The lines of a table of two columns; long cells continue on the next line."""
    first = max(len(name) for name, _ in rows) + 2
    broken = [
        (name if at == 0 else "", line)
        for name, text in rows
        for at, line in enumerate(
            textwrap.wrap(output.escape_all(text), WIDTH - first, break_on_hyphens=False, break_long_words=False)
            or [""]
        )
    ]
    return [f"{name.ljust(first)}{line}".rstrip() for name, line in broken]


@click.command()
@click.argument("src")
@click.argument("out", required=False)
@recipe_options
@source_options
@click.option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="Estimate the time of N workers. Default: --workers-per-gpu for each GPU, else 1.",
)
@options_of(RunOptions, only=("workers_per_gpu",))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@store_options
def plan(src: str, out: str | None, workers: int | None, workers_per_gpu: int, as_json: bool, **typed: Any) -> int:
    """Show what `launch` would do with SRC: videos, failures, clips, bytes, time. Writes nothing.

    With OUT, the videos are those that `launch SRC OUT` would embed: new and changed ones, and what earlier plans have
    left. If OUT holds a job with other settings, `plan` refuses it as `launch` would.

    \b
      p3d plan videos/ --weights p3d63.safetensors        # a new job
      p3d plan videos/ out/ --workers 8                   # what OUT lacks
      p3d plan videos/ --model p3d63 --weights random:0   # without weights

    Of a sample of up to 500 videos the headers are read, and 32 of them are decoded and embedded here, for at most half
    a minute. The answer names files that do not exist, and the videos of the sample that fail, with the reason. Clips,
    bytes and time are extrapolated. On a GPU several batch sizes are timed, and the answer shows how many clips per
    second one worker can be fed on this machine, and which stage limits that.

    With --precision fp32 some clips are also embedded in bf16, and on a GPU in fp16 and tf32, where the network and
    this machine support them. The answer shows how much faster they would be, for the network and for the whole job,
    their cosines with fp32, and which one to choose. That takes a few more seconds.
    """
    spec, s3, limit = job_spec(typed, src, out, tell=output.say), store_options_of(typed), typed["limit"]
    output.say("loading the network ...")  # torch alone takes seconds to import
    from p3d.jobs.job import refuse_other_job, weights_key
    from p3d.jobs.planning.changes import ToDo, changes, to_do
    from p3d.jobs.planning.estimate import estimate, weights_bytes
    from p3d.jobs.planning.prepare import kind_of_device, prepare, refuse_shared_gpu, refuse_unfit_device
    from p3d.pipeline.recipe import with_short_digests
    from p3d.pipeline.sources.listing import find

    refuse_shared_gpu(kind_of_device("auto"), workers_per_gpu)
    store = None if out is None else out_store(out, s3)
    prepared = prepare(spec, s3, store)
    recipe = prepared.recipe
    refuse_unfit_device(recipe, "auto")
    job = refuse_other_job(store, recipe, prepared.origin) if store is not None else None
    output.say(f"listing {src} ...")
    globs = {name: typed[name] for name in ("include", "exclude")}
    found = find(src, s3, id_column=typed["id_column"], **globs, tell=output.say)
    if store is not None and job is not None:
        todo = to_do(store, job, src, found.videos, limit)
    else:
        videos = found.videos if limit is None else found.videos.slice(0, limit)
        todo = ToDo(changes([], videos), videos.slice(0, 0), 0, {})
    has_weights = store is not None and store.head(weights_key(recipe)) is not None
    guess = None
    if todo.changes.n_videos or todo.pending.num_rows:
        guess = estimate(
            todo,
            prepared,
            shard_videos=typed["shard_videos"],
            workers=workers,
            workers_per_gpu=workers_per_gpu,
            weights_bytes=0 if has_weights else weights_bytes(prepared),
            s3=s3,
            tell=output.say,
        )
    for seq, uri in todo.skipped.items():
        output.say(f"plan {seq} would be skipped: {uri} is not in SRC, and OUT is not trusted")
    if as_json:
        output.show_json(
            {
                "recipe": recipe.to_dict(),
                "n_videos": 0,
                **(guess.to_dict() if guess else {}),
                "n_new": todo.changes.n_new,
                "n_changed": todo.changes.n_changed,
                "n_changed_columns": todo.changes.n_columns,
                "n_unchanged": todo.changes.n_same,
                "n_pending": todo.pending.num_rows,
                "skipped": list(found.skipped),
                "n_skipped": found.n_skipped,
            }
        )
        return 0
    skipped = f": {', '.join(map(_short, found.skipped[:3]))}" if found.skipped else ""
    lines: Lines = [
        ("network", f"{recipe.model}, graph {recipe.graph}, weights {with_short_digests(prepared.origin)}"),
        ("sampling", f"{recipe.clips}, {recipe.clip_frames} frames, step {recipe.frame_step}{_rate(recipe)}"),
        *_share(guess.share if guess else None),
        *_videos(todo, guess, out),
        ("skipped", f"{output.count(found.n_skipped, 'other file')}{skipped}"),
    ]
    output.show(*_table(lines + (_estimated(guess) if guess else [])))
    for sentence in guess.warnings if guess else ():
        output.say(sentence)
    return 0


def _longest(guess: Estimate) -> str:
    from p3d.jobs.planning.estimate import STARTUP_S

    return "the start" if guess.seconds < 2 * STARTUP_S else guess.binding


def _estimated(guess: Estimate) -> Lines:
    """The problems and the cost of what there is to do."""
    sampled = (
        f"about, from {output.count(guess.n_sampled, 'video')}"
        if guess.n_sampled
        else "unknown: no video could be sampled"
    )
    rows, weights = output.human_bytes(guess.output_bytes), output.human_bytes(guess.weights_bytes)
    whole = output.human_bytes(guess.output_bytes + guess.weights_bytes)
    return [
        *_problems(guess),
        ("clips", f"{guess.n_clips} ({sampled})"),
        ("output", f"{whole}: {rows} of rows, {weights} of weights" if guess.weights_bytes else rows),
        ("time", f"about {output.human_time(guess.seconds)}; most of it is {_longest(guess)}"),
        ("", f"({guess.clips_per_s:.2f} clips/s measured on {guess.device}, workers: {guess.workers})"),
        *_batches(guess),
        ("", f"({_cores(guess)}, from {output.count(guess.n_tried, 'video')} decoded here)"),
        *_feeding(guess),
        *_precisions(guess),
    ]
