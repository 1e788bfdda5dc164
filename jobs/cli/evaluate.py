"""`p3d results evaluate`: measure the rows of OUT against labels. Needs neither torch nor Ray."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.options import out_store, store_options, store_options_of
from p3d.jobs.cli.progress import show_steps


@click.command()
@click.argument("out")
@click.option(
    "--labels",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    metavar="CSV",
    help="Read labels from columns video_id, uri or path, and label: class names or numbers, separated by ;.",
)
@click.option("--top", type=click.IntRange(2), default=5, show_default=True, metavar="K", help="Set the K of hit@K.")
@click.option("--svm", is_flag=True, help="Train and test a linear SVM on the video vectors instead.")
@click.option(
    "--folds", type=click.IntRange(2), default=5, show_default=True, metavar="N", help="Use N folds with --svm."
)
@click.option("--cost", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="Set C of --svm.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed the folds of --svm.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; rates in [0, 1].")
@store_options
def evaluate(
    out: str,
    labels: Path,
    top: int,
    svm: bool,
    folds: int,
    cost: float,
    seed: int,
    as_json: bool,
    **typed: Any,
) -> int:
    """Measure hit rates of the class scores at OUT, in percent: clip hit@1, video hit@1 and video hit@5.

    These are the rates of the paper's Sports-1M table. The scores of a video are the mean of its clips' full
    distributions. A hit is a label among the K most probable classes; ties go to the lower class number. With several
    labels, any one counts. Videos without a label and failed videos are left out and counted.

    OUT must have been launched with --scores. It may be a snapshot. Every row is checked as it is read.

    --svm needs no scores: it trains a linear SVM (scikit-learn's LinearSVC) on video vectors of length 1 and tests it
    on other videos. Labels are any text, one per video. A column `split` assigns each video to train, test or - for
    neither, one word per split, separated by ;. For example, test;train;train fits the three splits of UCF101. Each
    accuracy and their mean are printed. Without that column, --folds stratified folds are drawn.
    """
    if svm:
        return _svm(out, labels, folds, cost, seed, as_json, typed)
    from p3d.jobs.job import rows_of
    from p3d.pipeline.results.evaluation.classes import class_names
    from p3d.pipeline.results.evaluation.labels import read_labels
    from p3d.pipeline.results.evaluation.scores import evaluate as hits_of
    from p3d.pipeline.results.evaluation.scores import refuse_without_scores

    store = out_store(out, store_options_of(typed))
    source = rows_of(store)
    refuse_without_scores(source)
    recipe = source.job.recipe
    known = read_labels(str(labels), labels.read_bytes(), class_names(store, recipe), recipe.num_classes)
    hits = hits_of(source, known, top=top, on_step=partial(show_steps(as_json), "read"))
    if as_json:
        output.show_json({"out": store.url, "labels": str(labels), "n_classes": recipe.num_classes, **asdict(hits)})
        return 0
    rates = (hits.clip_hit1, hits.video_hit1, hits.video_hit_top)
    head = ("videos", "clips", "clip hit@1", "video hit@1", f"video hit@{top}")
    shown = ["-" if rate is None else f"{100 * rate:.1f}" for rate in rates]
    output.show(*output.table([head, (str(hits.videos), str(hits.clips), *shown)], right=(0, 1, 2, 3, 4)))
    for number, what in (
        (hits.unlabelled, "left out without a label"),
        (hits.failed, "left out because they failed, labelled or not"),
        (hits.pending, "left out because they are pending"),
    ):
        if number:
            output.say(f"{output.count(number, 'video')} {what}")
    if hits.unknown_labels:
        output.say(f"{output.count(hits.unknown_labels, 'label')} without a finished video here")
    if hits.clip_hit1 is None:
        output.say("clip hit@1 is not available: the snapshot at OUT has no clips")
    if top >= recipe.num_classes:
        output.say(f"hit@{top} is always 100 %: there are {recipe.num_classes} classes; choose a smaller --top")
    return 0


def _svm(out: str, labels: Path, folds: int, cost: float, seed: int, as_json: bool, typed: dict[str, Any]) -> int:
    """Run `--svm`."""
    output.need("sklearn", "probe")
    from p3d.jobs.job import rows_of
    from p3d.pipeline.results.evaluation.svm import evaluate_svm, read_split

    source = rows_of(out_store(out, store_options_of(typed)))
    given = read_split(str(labels), labels.read_bytes())
    found = evaluate_svm(source, given, folds=folds, cost=cost, seed=seed, on_step=partial(show_steps(as_json), "read"))
    if as_json:
        settings = {"cost": cost} if found.fixed else {"cost": cost, "folds": folds, "seed": seed}
        output.show_json({"out": source.store.url, "labels": str(labels), **settings, **asdict(found)})
        return 0
    kind = "split" if found.fixed else "fold"
    rows = [(kind, "accuracy", "classes", "trained", "tested")]
    for at, one in enumerate(found.splits, 1):
        rows.append((str(at), f"{100 * one.accuracy:.1f}", str(one.n_classes), str(one.n_train), str(one.n_test)))
    rows.append(("mean", f"{100 * found.mean:.1f}", "", "", ""))
    output.show(*output.table(rows, right=(1, 2, 3, 4)))
    if found.unlabelled:
        output.say(f"{output.count(found.unlabelled, 'video')} left out without a label")
    if found.unknown_labels:
        output.say(f"{output.count(found.unknown_labels, 'label')} without a finished video here")
    return 0
