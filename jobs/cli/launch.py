"""`p3d plan`, `launch` and `resume`: from what a user typed to a run, and back to an exit code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from p3d.jobs.cli import output as talk
from p3d.jobs.cli import remote as away

if TYPE_CHECKING:
    from collections.abc import Iterator

    from p3d.jobs.machine import Machines
    from p3d.jobs.planning.estimate import Estimate
    from p3d.jobs.planning.prepare import JobSpec, Prepared
    from p3d.jobs.scheduler.cluster import Cluster
    from p3d.jobs.scheduler.control import Epoch, Pulse
    from p3d.pipeline.recipe import JobRecord, Recipe, RunOptions
    from p3d.pipeline.storage.store import Store

F = TypeVar("F", bound=Callable[..., Any])
LINE_EVERY_S = 10.0  # of the plain progress lines, where stderr is no terminal


def _apply(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(verb: F) -> F:
        for option in reversed(options):
            verb = option(verb)
        return verb

    return decorate


def _choice(*words: str) -> dict[str, Any]:
    return {"type": click.Choice(words), "default": words[0], "show_default": True}


recipe_options = _apply(
    click.option(
        "--weights",
        required=True,
        metavar="FILE|random:SEED",
        help="Our .safetensors, the authors' .caffemodel, the PyTorch port's .pth.tar, or random:SEED.",
    ),
    click.option("--model", help="Network (see `p3d models`); needed for random weights and checkpoints of baselines."),
    click.option(
        "--graph", type=click.Choice(["caffe", "port"]), help="The authors' graph or the port's. Default: the weights'."
    ),
    click.option(
        "--clips",
        default="every:16",
        show_default=True,
        metavar="RULE",
        help="every:STRIDE, uniform:COUNT or random:COUNT@SEED.",
    ),
    click.option(
        "--frame-step", type=click.IntRange(1), default=1, show_default=True, help="Every Nth frame in a clip."
    ),
    click.option(
        "--fps",
        type=click.FloatRange(min=0, min_open=True, max=240),
        metavar="R",
        help="Resample to R frames/s by time, so that clips of all videos span equal time. Default: as they are.",
    ),
    click.option("--pool", **_choice("mean", "max", "mean+max"), help="From clips to video."),
    click.option("--scores", is_flag=True, help="Also store the probability of each class, per clip and per video."),
    click.option("--embedding-dtype", **_choice("float32", "float16"), help="As stored."),
    click.option("--precision", **_choice("fp32", "bf16", "fp16"), help="Of the network. fp16: CUDA only."),
    click.option(
        "--decoder",
        **_choice("auto", "decord", "pyav", "nvdec"),
        help="auto: the faster of decord and PyAV that is right. nvdec: on an NVIDIA GPU, whose colours differ.",
    ),
    click.option("--partial", **_choice("fail", "keep"), help="A damaged video fails, or keeps its good beginning."),
)
source_options = _apply(
    click.option("--id-column", metavar="NAME", help="Column of a CSV or Parquet list that holds the video ids."),
    click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N videos."),
    click.option(
        "--shard-videos",
        type=click.IntRange(1, 100_000),
        default=64,
        show_default=True,
        help="Videos per shard, the unit of commit and of resume.",
    ),
)
run_options = _apply(
    click.option("--workers", type=click.IntRange(1), help="Default: one per GPU, else 1."),
    click.option("--batch-size", type=click.IntRange(1), help="Clips at a time. Default: 32 on a GPU, 4 on a CPU."),
    click.option("--threads", type=click.IntRange(1), help="Of a CPU worker's network. Default: half the cores."),
    click.option("--device", metavar="NAME", help="auto, cpu or cuda. Default: auto."),
    click.option(
        "--video-timeout",
        "video_timeout_s",
        type=click.FloatRange(min=0.1),
        metavar="SECONDS",
        help="Longest wait for the next frames of a video. Default: 300.",
    ),
    click.option(
        "--max-duration",
        "max_duration_s",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="Longer videos fail as too_long, undecoded. Default: 86400, a day.",
    ),
    click.option(
        "--max-pixels", type=click.IntRange(1), metavar="N", help="Larger frames fail as too_large. Default: 67108864."
    ),
    click.option(
        "--max-file-bytes",
        type=click.IntRange(1),
        metavar="N",
        help="Larger files fail as too_large. Default: 256 GiB.",
    ),
    click.option(
        "--max-decode-memory",
        type=click.IntRange(1),
        metavar="BYTES",
        help="A decode that takes more fails as decode_memory. Default: 4 GiB.",
    ),
    click.option(
        "--store-patience",
        "store_patience_s",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        help="How long a store may fail before the job stops, resumable. Default: 600.",
    ),
    click.option(
        "--max-failures",
        metavar="N|P%",
        help="Stop when more videos fail. Default: when over half of the first 200 fail for one reason.",
    ),
    click.option("--takeover", is_flag=True, help="Take over from a run that is still alive."),
    click.option("--json", "as_json", is_flag=True, help="The final status as one JSON object on stdout."),
)


def _spec(typed: dict[str, Any]) -> JobSpec:
    """The options that decide the numbers."""
    from p3d.jobs.planning.prepare import JobSpec

    return JobSpec(**{name: typed[name] for name in JobSpec.__slots__})


def options_of_run(typed: dict[str, Any], last: Epoch | None = None, there: Machines | None = None) -> RunOptions:
    """The options that decide how fast and how patient; `last` is the run before, which a resume takes after."""
    from p3d.jobs.planning.prepare import run_options
    from p3d.pipeline.recipe import MaxFailures, RunOptions

    given = {name: typed[name] for name in RunOptions.__slots__ if name in typed}
    given |= {"max_failures": MaxFailures.parse(typed["max_failures"]), "s3": talk.options_of(typed)}
    return run_options(last.options if last else {}, there=there, **given)


def _rate(recipe: Recipe) -> str:
    return "" if recipe.fps is None else f", at {recipe.fps:g} frames/s"


def _cores(guess: Estimate) -> str:
    """What decoding asks of the processor."""
    decoding = f"{guess.decode_s_per_clip * 1e3:.1f} ms of a core to decode a clip"
    if guess.useful_cores is None:
        return f"{decoding}, {guess.network_s_per_clip * 1e3:.0f} to embed it"
    return f"{decoding}: {guess.useful_cores:.1f} cores keep a GPU busy"


def _batches(guess: Estimate) -> list[tuple[str, str]]:
    """What batches of several sizes gave, where they were tried."""
    rates = [f"{size}: {rate:.0f}" if rate else f"{size}: no room" for size, rate in guess.by_batch.items()]
    return [("batch", f"{', '.join(rates)} (clips/s)")] if rates else []


@click.command()
@click.argument("src")
@click.argument("out", required=False)
@recipe_options
@source_options
@click.option("--workers", type=click.IntRange(1), help="To estimate the time for. Default: one per GPU, else 1.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@talk.store_options
def plan(src: str, out: str | None, workers: int | None, as_json: bool, **typed: Any) -> int:
    """Say what `launch` would do with SRC: videos, skipped files, clips, bytes, time. Writes nothing.

    A sample of the videos is looked at, and 32 of them are decoded and embedded here, for half a minute at most: clips,
    bytes and time follow from that. On a GPU batches of several sizes are timed, too. With OUT, a job with other
    settings there is refused as `launch` would.
    """
    from p3d.jobs.job import refuse_other_job
    from p3d.jobs.planning.estimate import estimate
    from p3d.jobs.planning.prepare import prepare, refuse_unfit_device
    from p3d.pipeline.sources.listing import find

    s3 = talk.options_of(typed)
    prepared = prepare(_spec(typed))
    recipe = prepared.recipe
    refuse_unfit_device(recipe, "auto")
    if out is not None:
        refuse_other_job(talk.out_store(out, s3), recipe)
    found = find(src, s3, id_column=typed["id_column"], tell=talk.say)
    guess = estimate(found, prepared, limit=typed["limit"], shard_videos=typed["shard_videos"], workers=workers, s3=s3)
    if as_json:
        talk.show_json(
            {
                "recipe": recipe.to_dict(),
                **guess.to_dict(),
                "skipped": list(found.skipped),
                "n_skipped": found.n_skipped,
            }
        )
        return 0
    sampled = (
        f"about, from {talk.count(guess.n_sampled, 'video')}"
        if guess.n_sampled
        else "unknown: no video could be sampled"
    )
    skipped = f": {', '.join(found.skipped[:3])}" if found.skipped else ""
    talk.show(
        *talk.table(
            [
                ("network", f"{recipe.model}, graph {recipe.graph}, weights {prepared.origin}"),
                ("sampling", f"{recipe.clips}, {recipe.clip_frames} frames, step {recipe.frame_step}{_rate(recipe)}"),
                (
                    "videos",
                    f"{guess.n_videos} ({talk.human_bytes(guess.size_bytes)}) in {talk.count(guess.n_shards, 'shard')}",
                ),
                ("skipped", f"{talk.count(found.n_skipped, 'other file')}{skipped}"),
                ("clips", f"{guess.n_clips} ({sampled})"),
                ("output", talk.human_bytes(guess.output_bytes)),
                ("time", f"about {talk.human_time(guess.seconds)}; most of it is {guess.binding}"),
                ("", f"({guess.clips_per_s:.2f} clips/s measured on {guess.device}, workers: {guess.workers})"),
                *_batches(guess),
                ("", f"({_cores(guess)}, from {talk.count(guess.n_tried, 'video')} decoded here)"),
            ]
        )
    )
    for sentence in guess.warnings:
        talk.say(sentence)
    return 0


@click.command()
@click.argument("src")
@click.argument("out")
@recipe_options
@source_options
@run_options
@away.address_options
@talk.store_options
def launch(
    src: str,
    out: str,
    takeover: bool,
    as_json: bool,
    address: str | None,
    detach: bool,
    **typed: Any,
) -> int:
    """Embed the videos of SRC into OUT.

    The same launch again goes on where it stopped, and adds what is new or changed in SRC. Ctrl-C stops cleanly.

    With --address http://HEAD:8265 the weights are put into OUT and all else happens on the cluster: SRC and OUT must
    be named as its machines know them. Ctrl-C then only stops watching.
    """
    from p3d.jobs.job import refuse_other_job
    from p3d.jobs.planning.prepare import add_plan, create_job, prepare, refuse_unfit_device
    from p3d.jobs.scheduler import control
    from p3d.pipeline.sources.listing import find

    away.refuse_to_detach(address, detach)
    s3 = talk.options_of(typed)
    store = talk.out_store(out, s3)
    if away.is_away(address):
        assert address is not None
        return _launch_away(address, detach, store, prepare(_spec(typed), s3))
    with away.cluster_at(address, store) as cluster:
        there = cluster.machines if cluster else None
        options = options_of_run(typed, there=there)
        prepared = prepare(_spec(typed), s3)
        refuse_unfit_device(prepared.recipe, options.device, there)
        refuse_other_job(store, prepared.recipe)
        found = find(src, s3, id_column=typed["id_column"], tell=talk.say)
        store.probe()
        epoch = control.claim(store, options.to_dict(), takeover=takeover, say=talk.say)
        with control.Pulse(store, epoch.number) as pulse:
            job = create_job(store, prepared)
            added = add_plan(store, job, found, shard_videos=typed["shard_videos"], limit=typed["limit"])
            if added is None:
                talk.say("nothing in SRC is new or changed")
            else:
                planned = f"{talk.count(added.n_videos, 'video')} in {talk.count(added.n_shards, 'shard')}"
                talk.say(f"{planned}, {talk.count(added.n_skipped, 'other file')} skipped")
            return run_job(out, job, NextRun(store, options, epoch, pulse, cluster), as_json)


def _launch_away(address: str, detach: bool, store: Store, prepared: Prepared) -> int:
    """Put the weights into OUT, where the driver over there takes them from, and start it."""
    from p3d.jobs.job import refuse_other_job, weights_key
    from p3d.jobs.planning.prepare import create_job

    refuse_other_job(store, prepared.recipe)
    store.probe()
    create_job(store, prepared)
    src = away.absolute(click.get_current_context().params["src"])
    weights = f"{store.url}/{weights_key(prepared.recipe)}"
    return run_verb_away(address, detach, store, src=src, weights=weights)


def run_verb_away(address: str, detach: bool, store: Store, **changed: str) -> int:
    """The same verb over there; then, unless detached, what `p3d status --watch` shows until it ends."""
    from p3d.jobs.cli.status import status

    ctx = click.get_current_context()
    out, as_json = ctx.params["out"], ctx.params["as_json"]
    words = away.words_again(ctx, out=store.url, **changed, address="auto", detach=None, as_json=None)
    code = away.run_away(address, store, out, words, detach=detach)
    if code is not None:
        return code
    s3 = {name: value for name, value in ctx.params.items() if name in talk.STORE_OPTIONS}
    found: int = ctx.invoke(status, out=out, watch=not as_json, wait=as_json, mirror=True, as_json=as_json, **s3)
    return found


@click.command()
@click.argument("out")
@run_options
@away.address_options
@talk.store_options
def resume(
    out: str,
    takeover: bool,
    as_json: bool,
    address: str | None,
    detach: bool,
    **typed: Any,
) -> int:
    """Go on with the job at OUT. What is committed is not computed again.

    Options are those of the last run unless given: on a CPU, equal batch size and threads give bit-identical rows.
    """
    from p3d.jobs.job import look, manifests, read_job

    away.refuse_to_detach(address, detach)
    store = talk.out_store(out, talk.options_of(typed))
    job = read_job(store)
    work = look(store, manifests(store, job))
    if work.nothing_left and work.n_shards:
        talk.say(f"nothing to do: all {work.n_videos} videos are accounted for")
        return report(out, store, job, as_json)
    if away.is_away(address):
        assert address is not None
        return run_verb_away(address, detach, store)
    with next_run(out, store, job, typed, address, takeover) as run:
        return run_job(out, job, run, as_json)


@dataclass(frozen=True, slots=True)
class NextRun:
    """One more run of a job that is there: in charge of it, with the options of the last one unless given."""

    store: Store
    options: RunOptions
    epoch: Epoch
    pulse: Pulse
    cluster: Cluster | None


@contextlib.contextmanager
def next_run(
    out: str, store: Store, job: JobRecord, typed: dict[str, Any], address: str | None, takeover: bool
) -> Iterator[NextRun]:
    """Join the cluster that was named, settle the options, and take charge."""
    from p3d.jobs.planning.prepare import refuse_unfit_device
    from p3d.jobs.scheduler import control

    with away.cluster_at(address, store) as cluster:
        there = cluster.machines if cluster else None
        options = options_of_run(typed, control.newest_epoch(store), there)
        refuse_unfit_device(job.recipe, options.device, there)
        store = talk.out_store(out, options.s3)
        epoch = control.claim(store, options.to_dict(), takeover=takeover, say=talk.say)
        with control.Pulse(store, epoch.number) as pulse:
            yield NextRun(store, options, epoch, pulse, cluster)


def run_job(out: str, job: JobRecord, mine: NextRun, as_json: bool) -> int:
    """Run what is left, then report. On a cluster of our own, where none was joined."""
    from p3d.jobs.job import derive_again, look, manifests
    from p3d.jobs.scheduler import control
    from p3d.jobs.scheduler.cluster import local_cluster, refuse_unfit
    from p3d.jobs.scheduler.run import Run
    from p3d.pipeline.errors import StoreError

    store, options = mine.store, mine.options
    control.sweep_temps(store)
    plans = manifests(store, job)
    work = look(store, plans)
    derive_again(store, job, plans, work.underived)
    if not work.todo:
        mine.pulse.stop()
        control.beat(store, mine.epoch.number, {"counter": 1, "state": "finished"})
        return report(out, store, job, as_json)
    talk.say(f"{len(work.todo)} of {work.n_shards} shards to do; starting {talk.count(options.workers, 'worker')} ...")
    own = contextlib.nullcontext(mine.cluster) if mine.cluster else local_cluster()
    with own as cluster, _progress_bar(work.n_videos) as on_progress:
        first = plans[work.todo[0].plan_seq].shard(work.todo[0].shard).videos[0]
        refuse_unfit(store.url, "job.json", first.uri if first.uri.startswith("s3://") else "", options.s3)
        run = Run(store, job, plans, work, cluster, mine.epoch, options, on_progress=on_progress)
        mine.pulse.stop()
        finish = run.loop()
    if finish.exit_code in (0, 3) or finish.exit_code > 128:
        # workers were killed at whatever they wrote: ours just now, or those of a dead driver since the first sweep
        with contextlib.suppress(StoreError):
            if control.newest_number(store) == mine.epoch.number:  # a run that took over would not like it
                control.sweep_temps(store)
    talk.say(finish.sentence)
    if finish.exit_code not in (0, 3):
        talk.say(f"nothing that was committed is lost; go on with:  p3d resume {out}")
    report(out, store, job, as_json, over=True)
    return finish.exit_code


def report(out: str, store: Store, job: JobRecord, as_json: bool, *, over: bool = False) -> int:
    """What is in OUT now, and what to do next; `over` if the newest run is this one, which has ended."""
    from dataclasses import asdict

    from p3d.jobs.monitor.status import read_status

    now = read_status(store, job, over=over)
    if as_json:
        talk.show_json(asdict(now))
    else:
        talk.show(f"{store.url}/clips/*.parquet   {now.clips_done} clip embeddings")
        talk.show(f"{store.url}/videos/*.parquet  {now.videos_done - now.videos_failed} video embeddings")
        if now.videos_failed:
            talk.say(f"{talk.count(now.videos_failed, 'video')} failed:  p3d failures {out}")
    return now.exit_code or 0


@contextmanager
def _progress_bar(n_videos: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar with ETA on a terminal, a line now and then elsewhere; both on stderr."""
    if sys.stderr.isatty():
        yield from _bar(n_videos)
        return
    last, paused = [-LINE_EVERY_S], [""]

    def line(snapshot: dict[str, Any]) -> None:
        if bool(snapshot["outage"]) != bool(paused[0]):
            talk.say(f"paused: {snapshot['outage']}" if snapshot["outage"] else "going on: the store answers again")
        paused[0] = snapshot["outage"]
        if snapshot["elapsed_s"] - last[0] >= LINE_EVERY_S or snapshot["state"] != "running":
            last[0] = snapshot["elapsed_s"]
            videos = snapshot["videos"]
            talk.say(
                f"{videos['done']}/{videos['all']} videos, {videos['failed']} failed, {snapshot['clips']} clips, "
                f"{snapshot['clips_per_s']:.2f} clips/s, ETA {talk.human_time(snapshot['eta_s'])}"
            )

    yield line


def _bar(n_videos: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("videos"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[failed]} failed"),
        TimeElapsedColumn(),
        TextColumn("ETA {task.fields[eta]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=n_videos, rate="starting", failed=0, eta="-")

        def update(snapshot: dict[str, Any]) -> None:
            videos = snapshot["videos"]
            rate = f"{snapshot['clips_per_s']:.2f} clips/s" if snapshot["clips_per_s"] else "starting"
            rate = "paused: a store does not answer" if snapshot["outage"] else rate
            eta = talk.human_time(snapshot["eta_s"])
            bar.update(task, completed=videos["done"], total=videos["all"], rate=rate, failed=videos["failed"], eta=eta)

        yield update
