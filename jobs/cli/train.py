"""`p3d train`, and what `resume`, `status` and `cancel` do with the output of a training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.declared import Declared, options_of
from p3d.jobs.cli.options import out_store, store_options, store_options_of
from p3d.jobs.cli.progress import LINE_EVERY_S
from p3d.jobs.training.options import LabelOptions, TrainOptions, TrainRun
from p3d.pipeline.errors import InputError
from p3d.pipeline.recipe import MaxFailures, PlanOptions, RunOptions
from p3d.pipeline.types.options import flag_of, options_in

if TYPE_CHECKING:
    from p3d.jobs.training.record import TrainRecord
    from p3d.jobs.training.run import HowToTrain, OnProgress
    from p3d.jobs.training.snapshot import TrainSnapshot
    from p3d.pipeline.storage.store import Store, StoreOptions


@click.command()
@click.argument("src")
@click.argument("out")
@click.option(
    "--init",
    cls=Declared,
    group="Start",
    required=True,
    metavar="FILE|random:SEED",
    help="Start from these weights: a 2-D ImageNet ResNet as in the paper, those of the same network, or random ones.",
)
@click.option(
    "--model",
    cls=Declared,
    group="Start",
    metavar="NAME",
    help="Train this network (see `p3d models`). Default: the one of --init.",
)
@click.option(
    "--graph",
    cls=Declared,
    group="Start",
    type=click.Choice(("caffe", "port")),
    help="Use this graph. Default: caffe, or that of --init.",
)
@options_of(LabelOptions, group="Labels")
@options_of(PlanOptions, only=("id_column", "include", "exclude"), group="Labels")
@options_of(TrainOptions, group="What is trained")
@options_of(TrainRun, inherited=True, group="Speed and limits")
@click.option("--takeover", is_flag=True, help="Take over from a run that is still alive.")
@click.option("--address", metavar="WHERE", help="Join a Ray cluster: auto or HOST:PORT. Default: this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print the final status as one JSON object on stdout.")
@store_options
def train(src: str, out: str, init: str, model: str | None, graph: str | None, as_json: bool, **typed: Any) -> int:
    """Train a network on the labelled videos of SRC, and write weights, tests and a report into OUT.

    Without options this is the paper's fine-tuning on UCF101: 16 frames of 160x160 at random from 182x242, SGD, 7 500
    steps of 128 clips. Classes are the folders of SRC, a column of a list, or what --labels says:

    \b
      p3d train videos/ out/ --init resnet50.pth      # videos/CLASS/NAME.mp4
      p3d train list.csv out/ --init resnet50.pth     # path,label[,split]
      p3d train UCF-101/ out/ --init resnet50.pth --labels ucfTrainTestlist/

    The same command again, or `p3d resume OUT`, continues at the last checkpoint. Ctrl-C stops with a checkpoint.
    `p3d status OUT --watch` shows loss, rate and ETA. OUT/weights.safetensors can be given to `p3d launch --weights`.
    """
    from p3d.jobs.planning.job_spec import check_named
    from p3d.jobs.planning.places import check_places

    output.need("pandas", "train")
    check_named(model, init)  # before torch and Ray are imported
    s3 = store_options_of(typed)
    globs = {name: typed[name] for name in ("id_column", "include", "exclude")}
    store = out_store(out, s3)
    check_places(src, store, PlanOptions(**globs), s3, output.say, "train")
    from p3d.jobs.training.plan import TrainSpec, plan
    from p3d.jobs.training.run import run_training

    labels = LabelOptions(**_of(LabelOptions, typed))
    spec = TrainSpec(src, init, model, graph, labels, TrainOptions(**_of(TrainOptions, typed)), **globs)
    how = how_to_train(typed, s3, {})
    output.say(f"reading the labels of {src} ...")
    record = plan(store, spec, s3, output.say)
    return _ended(store, record, run_training(store, record, how), as_json)


def how_to_train(typed: dict[str, Any], s3: StoreOptions, last: dict[str, Any]) -> HowToTrain:
    """Where and how a training runs, as typed. What is not typed is as in the run before, `last`."""
    from p3d.jobs.training.run import HowToTrain

    given = {name: value for name, value in _of(TrainRun, typed).items() if value is not None}
    if "max_failures" in given:
        given["max_failures"] = MaxFailures.parse(given["max_failures"])
    before = {field.name: getattr(TrainRun.from_dict(last), field.name) for field in fields(TrainRun)} if last else {}
    run = TrainRun(**before | given | {"s3": s3})
    return HowToTrain(run, typed.get("address"), bool(typed.get("takeover")), output.say, show_progress)


def resume_training(store: Store, s3: StoreOptions, trust: bool, as_json: bool, typed: dict[str, Any]) -> int:
    """`p3d resume` of a training. InputError for options that only a job has."""
    output.need("pandas", "train")
    from p3d.jobs.scheduler import control
    from p3d.jobs.training.record import read_record
    from p3d.jobs.training.run import run_training
    from p3d.jobs.trust import need_trust

    ours = {field.name for field in fields(TrainRun)}
    for field, _ in options_in(RunOptions):
        if field.name not in ours and typed[field.name] is not None:
            raise InputError(f"{flag_of(field)} is an option of a job, and {store.url} holds a training; leave it out")
    for flag, given in (("--source", typed["source"]), ("--detach", typed.get("detach"))):
        if given:
            raise InputError(f"{flag} is an option of a job, and {store.url} holds a training; leave it out")
    record = read_record(store)
    s3 = need_trust(store, record, s3, trust_it=trust, verb="resume", say=output.say)
    last = control.newest_epoch(store)
    how = how_to_train(typed, s3, last.options if last else {})
    return _ended(store, record, run_training(store, record, how), as_json)


def _of(record: type, typed: dict[str, Any]) -> dict[str, Any]:
    return {field.name: typed[field.name] for field, _ in options_in(record) if field.name in typed}


def _ended(store: Store, record: TrainRecord, code: int, as_json: bool) -> int:
    from p3d.jobs.monitor.training import read_training_status
    from p3d.jobs.training.record import RESULT_KEY

    if as_json:
        output.show_json(asdict(read_training_status(store, record)))
    elif code in (0, 3):
        output.show(f"{store.url}/{RESULT_KEY}   {record.model}, {len(record.class_names)} classes")
        output.show(f"{store.url}/report.html   curves, confusion, failures")
        output.say(f"use it with:  p3d launch SRC OUT --weights {store.url}/{RESULT_KEY} --scores")
    return code


@contextlib.contextmanager
def show_progress() -> Iterator[OnProgress]:
    """A bar of steps with rate and ETA on a terminal, a line every `LINE_EVERY_S` elsewhere; both on stderr."""
    if output.shows_bars():
        yield from _bar()
        return
    last = [-LINE_EVERY_S]

    def line(now: TrainSnapshot) -> None:
        if time.monotonic() - last[0] >= LINE_EVERY_S:
            last[0] = time.monotonic()
            output.say_progress(_words(now))

    yield line


def _words(now: TrainSnapshot) -> str:
    from p3d.jobs.training.snapshot import TESTING

    if now.phase == TESTING:
        return f"tested {now.tested}/{now.to_test} videos"
    if now.loss is None:
        return f"step {now.step}/{now.steps}, {now.phase} ..."
    loss = f"{now.loss:.3f}"
    right = "-" if now.top1 is None else f"{now.top1:.1%}"
    waiting = "-" if now.waiting is None else f"{now.waiting:.0%}"
    return (
        f"step {now.step}/{now.steps}, loss {loss}, right {right}, {now.clips_per_s:.2f} clips/s, waiting {waiting}, "
        f"{now.failed} failed, ETA {output.human_time(now.eta_s)}"
    )


def _bar() -> Iterator[OnProgress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from p3d.jobs.training.snapshot import TESTING

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("steps", total=None, words="starting")

        def update(now: TrainSnapshot) -> None:
            if now.phase == TESTING:
                bar.update(task, description="test", completed=now.tested, total=now.to_test, words="")
            elif now.step and now.loss is not None and now.top1 is not None:
                words = f"loss {now.loss:.2f}  {now.top1:.0%} right  {now.clips_per_s:.1f} clips/s  "
                words += f"waiting {now.waiting or 0:.0%}  ETA {output.human_time(now.eta_s)}"
                bar.update(task, completed=now.step, total=now.steps, words=words)

        yield update
