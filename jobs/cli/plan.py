"""`p3d plan`: what a launch would do, and how long it would take. Writes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.options import job_spec, out_store, recipe_options, source_options, store_options, store_options_of

if TYPE_CHECKING:
    from p3d.jobs.planning.estimate import Estimate
    from p3d.pipeline.recipe import Recipe


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


def _bf16(guess: Estimate) -> list[tuple[str, str]]:
    """What bf16 would gain and cost here, if it was measured; the option is named if it makes the job faster."""
    from p3d.jobs.planning.network_trial import WORTH

    half = guess.bf16
    if half is None:
        return []
    if half.times < WORTH:
        gains = f"not faster here: the network {half.times:.2f} times as fast as in fp32"
    else:
        gains = f"network {half.times:.1f} times as fast here, the job {half.job_times:.1f} times"
        gains += ": --precision bf16" if half.job_times >= WORTH else ""
    clips = output.count(half.n_clips, "clip")
    return [("bf16", gains), ("", f"(cosine with fp32 {half.cosine:.6f}, lowest {half.lowest:.6f}, of {clips})")]


@click.command()
@click.argument("src")
@click.argument("out", required=False)
@recipe_options
@source_options
@click.option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="Estimate the time of N workers. Default: one per GPU, else 1.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@store_options
def plan(src: str, out: str | None, workers: int | None, as_json: bool, **typed: Any) -> int:
    """Show what `launch` would do with SRC: videos, skipped files, clips, bytes, time. Writes nothing.

    A sample of the videos is probed, and 32 of them are decoded and embedded here, for at most half a minute. Clips,
    bytes and time are extrapolated from that. On a GPU several batch sizes are timed. If OUT holds a job with other
    settings, `plan` refuses it as `launch` would.

    With --precision fp32 some clips are also embedded in bf16, where the network and this machine support it. The
    answer shows how much faster bf16 would be, for the network and for the whole job, and its cosines with fp32. That
    takes a few more seconds.
    """
    from p3d.jobs.job import refuse_other_job
    from p3d.jobs.planning.estimate import estimate
    from p3d.jobs.planning.prepare import prepare, refuse_unfit_device
    from p3d.pipeline.recipe import with_short_digests
    from p3d.pipeline.sources.listing import find

    s3 = store_options_of(typed)
    prepared = prepare(job_spec(typed))
    recipe = prepared.recipe
    refuse_unfit_device(recipe, "auto")
    if out is not None:
        refuse_other_job(out_store(out, s3), recipe)
    found = find(src, s3, id_column=typed["id_column"], tell=output.say)
    guess = estimate(found, prepared, limit=typed["limit"], shard_videos=typed["shard_videos"], workers=workers, s3=s3)
    if as_json:
        output.show_json(
            {
                "recipe": recipe.to_dict(),
                **guess.to_dict(),
                "skipped": list(found.skipped),
                "n_skipped": found.n_skipped,
            }
        )
        return 0
    sampled = (
        f"about, from {output.count(guess.n_sampled, 'video')}"
        if guess.n_sampled
        else "unknown: no video could be sampled"
    )
    size = output.human_bytes(guess.size_bytes)
    skipped = f": {', '.join(found.skipped[:3])}" if found.skipped else ""
    output.show(
        *output.table(
            [
                (
                    "network",
                    f"{recipe.model}, graph {recipe.graph}, weights {with_short_digests(prepared.origin)}",
                ),
                ("sampling", f"{recipe.clips}, {recipe.clip_frames} frames, step {recipe.frame_step}{_rate(recipe)}"),
                ("videos", f"{guess.n_videos} ({size}) in {output.count(guess.n_shards, 'shard')}"),
                ("skipped", f"{output.count(found.n_skipped, 'other file')}{skipped}"),
                ("clips", f"{guess.n_clips} ({sampled})"),
                ("output", output.human_bytes(guess.output_bytes)),
                ("time", f"about {output.human_time(guess.seconds)}; most of it is {guess.binding}"),
                ("", f"({guess.clips_per_s:.2f} clips/s measured on {guess.device}, workers: {guess.workers})"),
                *_batches(guess),
                ("", f"({_cores(guess)}, from {output.count(guess.n_tried, 'video')} decoded here)"),
                *_bf16(guess),
            ]
        )
    )
    for sentence in guess.warnings:
        output.say(sentence)
    return 0
