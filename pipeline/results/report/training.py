"""A TrainingReport -> one HTML file, by the template training.html in this folder.

Legend: N test videos, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from p3d.pipeline.errors import meaning_in_training
from p3d.pipeline.results.evaluation.classes import TOP
from p3d.pipeline.results.report.curves import number, percent, training_curves
from p3d.pipeline.results.report.facts import EXAMPLES, Example, FailedBy
from p3d.pipeline.results.report.template import page_environment

ROWS = 20  # of each list of classes, confusions and videos
MATRIX_CLASSES = 30  # a confusion matrix of more classes is not shown
EVALUATIONS = 20  # in the table of them
Z_95 = 1.959963984540054  # quantile 0.975 of the normal distribution


@dataclass(frozen=True, slots=True)
class Prediction:
    """The prediction for a test video: `probability` is that of `predicted`, `rank` that of `label` (0 if right)."""

    path: str
    label: int
    predicted: int
    probability: float
    rank: int


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """Everything that the page shows of a training run. Every table may be empty, and floats may be NaN.

    - `facts`: names and values of settings, in the order shown.
    - `metrics`, one row per step: `step` int64, `epoch` float64, `loss` and `top1` float32, `lr` float64, `seconds` and
      `waiting_s` float64, `clips` int32. `top1` is the share of the batch's clips that are right, `waiting_s` the part
      of `seconds` spent waiting for data, `clips` the number of valid clips in the step.
    - `tests`, one row per evaluation: `step` int64; `clip_hit1`, `video_hit1` and `video_hit5` float64, in [0, 1].
    - `predictions` of the last evaluation, one row per test video: `path` string, `label` and `predicted` int32 indices
      of `class_names`, `probability` float32, `rank` int32. See Prediction.
    - `failures`, one row per video that could not be read: `path`, `reason` and `detail` strings.
    """

    out: str
    made: str
    facts: tuple[tuple[str, str], ...]
    class_names: tuple[str, ...]
    metrics: pa.Table
    tests: pa.Table
    predictions: pa.Table
    failures: pa.Table


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The last evaluation: shares in [0, 1] of `n_videos` test videos, and an interval of `video_hit1`.

    The interval is None if the number of videos is unknown (0) or `video_hit1` is NaN.
    """

    step: int
    clip_hit1: float
    video_hit1: float
    video_hit5: float
    n_videos: int
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class ClassRow:
    """A class: how many of its test videos are right, and the class that most of the others were taken for."""

    name: str
    videos: int
    right: int
    taken_for: str
    taken: int

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""
        return self.right / self.videos


@dataclass(frozen=True, slots=True)
class Pair:
    """`count` of `videos` test videos of class `label` were taken for class `predicted`."""

    label: str
    predicted: str
    count: int
    videos: int


@dataclass(frozen=True, slots=True)
class Confusion:
    """Either `counts_CC` of all classes, [label][predicted], or None and the most frequent confusions as `pairs`."""

    names: tuple[str, ...]
    counts_CC: tuple[tuple[int, ...], ...] | None
    pairs: tuple[Pair, ...]


def render_training(report: TrainingReport) -> str:
    """The HTML page. Its size is bounded, whatever the number of steps, classes and videos."""
    environment = page_environment()
    environment.filters.update(percent=percent, number=number)
    environment.globals.update(meaning_of=meaning_in_training)
    tests, predictions = report.tests.sort_by("step"), report.predictions
    shown = np.linspace(0, len(tests) - 1, min(len(tests), EVALUATIONS)).round().astype(np.int64)
    return environment.get_template("training.html").render(
        report=report,
        top=TOP,
        curves=training_curves(report.metrics.sort_by("step"), tests),
        accuracy=last_accuracy(tests, len(predictions)),
        evaluations=tests.take(shown).to_pylist(),
        confusion=confusion(predictions, report.class_names),
        classes=class_rows(predictions, report.class_names, ROWS),
        n_tested=pc.count_distinct(predictions["label"]).as_py(),
        wrong=wrong_videos(predictions, ROWS),
        n_wrong=pc.sum(pc.not_equal(predictions["label"], predictions["predicted"])).as_py() or 0,
        name_of=lambda at: _name(report.class_names, at),
        failures=_failed(report.failures),
    )


def last_accuracy(tests: pa.Table, n_videos: int) -> Accuracy | None:
    """The last row of `tests`, which are sorted by step; None without a row."""
    if not len(tests):
        return None
    last = tests.select(["step", "clip_hit1", "video_hit1", "video_hit5"]).slice(len(tests) - 1).to_pylist()[0]
    return Accuracy(**last, n_videos=n_videos, interval=wilson(last["video_hit1"], n_videos))


def wilson(share: float, n: int) -> tuple[float, float] | None:
    """The 95% interval of a share of `n` (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953)."""
    if not n or math.isnan(share):
        return None
    middle = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def class_rows(predictions: pa.Table, class_names: tuple[str, ...], n: int) -> tuple[ClassRow, ...]:
    """The `n` classes of the lowest accuracy, the lowest first, among those that have test videos.

    Of classes with the same accuracy, the one with more videos comes first.
    """
    label_N, predicted_N = _classes(predictions)
    label_K, at_N = np.unique(label_N, return_inverse=True)
    videos_K = np.bincount(at_N, minlength=len(label_K))
    right_K = np.bincount(at_N[label_N == predicted_N], minlength=len(label_K))
    rows = []
    for at in np.lexsort((label_K, -videos_K, right_K / videos_K))[:n].tolist():
        wrong, counts = np.unique(predicted_N[(at_N == at) & (predicted_N != label_K[at])], return_counts=True)
        most = int(counts.argmax()) if counts.size else None
        rows.append(
            ClassRow(
                name=_name(class_names, int(label_K[at])),
                videos=int(videos_K[at]),
                right=int(right_K[at]),
                taken_for="" if most is None else _name(class_names, int(wrong[most])),
                taken=0 if most is None else int(counts[most]),
            )
        )
    return tuple(rows)


def confusion(predictions: pa.Table, class_names: tuple[str, ...], most: int = ROWS) -> Confusion:
    """The confusion matrix of at most MATRIX_CLASSES classes, or else the `most` most frequent pairs of classes."""
    label_N, predicted_N = _classes(predictions)
    size = 1 + max(len(class_names) - 1, int(label_N.max(initial=0)), int(predicted_N.max(initial=0)))
    if size <= MATRIX_CLASSES:
        counts = np.bincount(label_N * size + predicted_N, minlength=size * size).reshape(size, size)
        names = tuple(_name(class_names, at) for at in range(size))
        return Confusion(names, tuple(map(tuple, counts.tolist())), ())
    wrong_N = label_N != predicted_N
    codes, counts = np.unique(label_N[wrong_N] * size + predicted_N[wrong_N], return_counts=True)
    pairs = []
    for at in np.argsort(-counts, kind="stable")[:most].tolist():
        label, predicted = divmod(int(codes[at]), size)
        names_of_pair = _name(class_names, label), _name(class_names, predicted)
        pairs.append(Pair(*names_of_pair, int(counts[at]), int((label_N == label).sum())))
    return Confusion((), None, tuple(pairs))


def wrong_videos(predictions: pa.Table, n: int) -> tuple[Prediction, ...]:
    """The `n` wrong predictions with the highest probability, the highest first."""
    wrong = predictions.filter(pc.not_equal(predictions["label"], predictions["predicted"]))
    order = pc.sort_indices(wrong, sort_keys=[("probability", "descending")])[:n]
    columns = ["path", "label", "predicted", "probability", "rank"]
    return tuple(Prediction(**row) for row in wrong.select(columns).take(order).to_pylist())


def _classes(predictions: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    label_N, predicted_N = (predictions[name].to_numpy().astype(np.int64) for name in ("label", "predicted"))
    return label_N, predicted_N


def _name(class_names: tuple[str, ...], at: int) -> str:
    """The name of a class, or its number if it has no name."""
    return class_names[at] if 0 <= at < len(class_names) and class_names[at].strip() else f"class {at}"


def _failed(failures: pa.Table) -> tuple[FailedBy, ...]:
    """Failures by reason, the most frequent first."""
    counts = sorted(failures["reason"].value_counts().to_pylist(), key=lambda one: -one["counts"])
    found = []
    for one in counts:
        examples = failures.filter(pc.equal(failures["reason"], one["values"])).slice(0, EXAMPLES)
        rows = examples.select(["path", "detail"]).to_pylist()
        found.append(FailedBy(one["values"], one["counts"], tuple(Example(**row, attempts=1) for row in rows)))
    return tuple(found)
