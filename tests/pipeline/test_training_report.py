"""The report of a training run: correct figures, curves of bounded size, harmless names, and tables without rows."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p3d.pipeline.errors import REASON_MEANING, TRAINING_REMEDY, Reason, meaning_in_training
from p3d.pipeline.results.report import curves
from p3d.pipeline.results.report.curves import interval_starts, means, ratios, training_curves
from p3d.pipeline.results.report.training import (
    MATRIX_CLASSES,
    Prediction,
    TrainingReport,
    class_rows,
    confusion,
    render_training,
    wilson,
    wrong_videos,
)
from tests.report_page import Page, harmless

METRICS = {
    "step": pa.int64(),
    "epoch": pa.float64(),
    "loss": pa.float32(),
    "top1": pa.float32(),
    "lr": pa.float64(),
    "seconds": pa.float64(),
    "waiting_s": pa.float64(),
    "clips": pa.int32(),
}
TESTS = {"step": pa.int64(), "clip_hit1": pa.float64(), "video_hit1": pa.float64(), "video_hit5": pa.float64()}
PREDICTIONS = {
    "path": pa.string(),
    "label": pa.int32(),
    "predicted": pa.int32(),
    "probability": pa.float32(),
    "rank": pa.int32(),
}
FAILURES = {"path": pa.string(), "reason": pa.string(), "detail": pa.string()}
HOSTILE = "<script>alert(1)</script>\"' onload='x\x1b[31m\u202egpj\x00&lt;{{ 7 * 7 }}"


def table(types: dict[str, pa.DataType], **columns: Any) -> pa.Table:
    return pa.table({name: pa.array(columns.get(name, []), kind) for name, kind in types.items()})


def metrics(n: int, **columns: Any) -> pa.Table:
    """Steps 1 to n of constant values, but for `columns`."""
    constant = {"loss": 2.0, "top1": 0.25, "lr": 0.01, "seconds": 0.5, "waiting_s": 0.125, "clips": 16}
    steps = np.arange(1, n + 1)
    return table(
        METRICS, **{"step": steps, "epoch": steps / 100, **{k: np.full(n, v) for k, v in constant.items()}, **columns}
    )


def predictions(*pairs: tuple[int, int]) -> pa.Table:
    """Test videos v0, v1, ... of (label, predicted), each with a probability that is lower than the one before."""
    return table(
        PREDICTIONS,
        path=[f"v{at}" for at in range(len(pairs))],
        label=[label for label, _ in pairs],
        predicted=[predicted for _, predicted in pairs],
        probability=[1 - at / 1024 for at in range(len(pairs))],
        rank=[0 if label == predicted else 3 for label, predicted in pairs],
    )


def report(**changes: Any) -> TrainingReport:
    """A report whose tables are empty, but for `changes`."""
    empty = TrainingReport(
        out="out/",
        made="2026-11-30 10:00 UTC",
        facts=(("network", "p3d63"), ("learning rate", "0.01")),
        class_names=("bowling", "diving", "fencing"),
        metrics=table(METRICS),
        tests=table(TESTS),
        predictions=table(PREDICTIONS),
        failures=table(FAILURES),
    )
    return replace(empty, **changes)


def rendered(**changes: Any) -> Page:
    return harmless(render_training(report(**changes)))


def words(page: Page) -> str:
    """The text of a page with single spaces."""
    return " ".join(page.text.split())


def points(path: str) -> list[list[tuple[float, float]]]:
    """The lines of a path, each a list of points."""
    return [
        [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", line)] for line in path.split("M") if line
    ]


def test_the_headline_is_that_of_the_last_evaluation() -> None:
    """Hit rates are those of the row with the highest step, of as many videos as there are predictions."""
    page = rendered(
        tests=table(TESTS, step=[200, 100], clip_hit1=[0.5, 0.1], video_hit1=[0.7, 0.2], video_hit5=[0.9, 0.3]),
        predictions=predictions(*[(0, 0)] * 7, (0, 1), (1, 0), (2, 0)),
        class_names=tuple("abcdef"),
    )
    text = words(page)
    assert "70.0% video hit@1 90.0% video hit@5 50.0% clip hit@1" in text
    assert "after step 200, on 10 test videos of 3 classes" in text
    assert "95% interval of video hit@1: 39.7% to 89.2%" in text
    assert [["100", "10.0%", "20.0%", "30.0%"], ["200", "50.0%", "70.0%", "90.0%"]] in [one[1:] for one in page.tables]


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(7, 10, 0.39677815, 0.89220873), (0, 10, 0.0, 0.27753280), (10, 10, 0.72246720, 1.0), (1, 1, 0.20654931, 1.0)],
)
def test_the_interval_is_that_of_wilson(right: int, n: int, low: float, high: float) -> None:
    """The interval has the published values, also for none and all right."""
    assert wilson(right / n, n) == pytest.approx((low, high), abs=1e-8)
    assert wilson(float("nan"), n) is None and wilson(0.5, 0) is None


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60))
def test_the_matrix_and_the_classes_count_every_video(pairs: list[tuple[int, int]]) -> None:
    """The matrix holds the count of each pair, and the classes are sorted by accuracy, each with its own counts."""
    names = tuple("abcdefg")
    counts = Counter(pairs)
    found = confusion(predictions(*pairs), names)
    assert found.names == names and not found.pairs and found.counts_CC is not None
    assert {(i, j): n for i, row in enumerate(found.counts_CC) for j, n in enumerate(row) if n} == dict(counts)
    rows = class_rows(predictions(*pairs), names, len(names))
    assert [row.accuracy for row in rows] == sorted(row.accuracy for row in rows)
    assert {row.name: (row.right, row.videos) for row in rows} == {
        names[label]: (counts[label, label], sum(n for (one, _), n in counts.items() if one == label))
        for label in {label for label, _ in pairs}
    }
    for row in rows:
        wrong = {names[j]: n for (i, j), n in counts.items() if names[i] == row.name and i != j}
        assert row.taken == max(wrong.values(), default=0) and row.taken == wrong.get(row.taken_for, 0)


def test_of_many_classes_the_most_frequent_confusions_are_listed() -> None:
    """Above MATRIX_CLASSES classes there is no matrix; pairs are in the order of their counts, at most `most`."""
    names = tuple(f"c{at}" for at in range(10_000))
    pairs = [(9_999, 3)] * 4 + [(9_999, 9_999)] * 4 + [(3, 9_999)] * 3 + [(5, 6)] + [(8, 8)] * 9
    found = confusion(predictions(*pairs), names, 2)
    assert found.counts_CC is None
    assert [(one.label, one.predicted, one.count, one.videos) for one in found.pairs] == [
        ("c9999", "c3", 4, 8),
        ("c3", "c9999", 3, 3),
    ]
    assert confusion(predictions(), names[:MATRIX_CLASSES]).counts_CC is not None
    assert confusion(predictions(), names[: MATRIX_CLASSES + 1]).counts_CC is None
    page = rendered(class_names=names, predictions=predictions(*pairs))
    assert ["c9999", "c3", "4", "50.0%"] in page.tables[0]
    assert page.tables[1][1] == ["c3", "0", "3", "0.0%", "c9999 (3)"]
    many = rendered(class_names=names, predictions=predictions(*[(at, at + 1) for at in range(25)]))
    assert "20 of 25 classes that have test videos." in words(many)
    assert "20 of 25 test videos that are wrong." in words(many)


def test_the_page_shows_the_matrix() -> None:
    """Each row has the name of its label, its counts under the names of the predictions, and 0 only where right."""
    page = rendered(predictions=predictions((0, 0), (0, 1), (0, 1), (2, 1)))
    assert page.tables[0] == [
        ["", "bowling", "diving", "fencing"],
        ["bowling", "1", "2", ""],
        ["diving", "", "0", ""],
        ["fencing", "", "1", "0"],
    ]
    styles = [attributes["style"] for _, attributes in page.tags if "style" in attributes]
    assert styles == ["--share: 22%", "--share: 36%", "--share: 50%"]


def test_a_class_without_a_name_is_shown_by_its_number() -> None:
    """Neither an empty name nor an index beyond the names ends the report."""
    page = rendered(class_names=("", "b"), predictions=predictions((0, 5), (1, 1)))
    assert page.tables[0][0] == ["", "class 0", "b", "class 2", "class 3", "class 4", "class 5"]


def test_wrong_videos_are_those_of_the_highest_probability() -> None:
    """Only wrong predictions, the most probable first and NaN last, with the place of the label counted from 1."""
    some = predictions((0, 0), (0, 1), (1, 2), (2, 0))
    some = some.set_column(3, "probability", pa.array([1.0, float("nan"), 0.5, 0.75], pa.float32()))
    assert wrong_videos(some, 2) == (Prediction("v3", 2, 0, 0.75, 3), Prediction("v2", 1, 2, 0.5, 3))
    page = rendered(predictions=some)
    assert page.tables[2][1:] == [
        ["v3", "fencing", "bowling", "75.0%", "4"],
        ["v2", "diving", "fencing", "50.0%", "4"],
        ["v1", "bowling", "diving", "NaN", "4"],
    ]
    assert "All test videos that are wrong." in words(page)


def test_five_classes_have_no_hit_at_five() -> None:
    """Of five classes or fewer it is always 100%, so neither the headline nor the table has it."""
    tests = table(TESTS, step=[100], clip_hit1=[0.5], video_hit1=[0.7], video_hit5=[1.0])
    for names, shown in (("abcde", False), ("abcdef", True)):
        page = rendered(tests=tests, predictions=predictions((0, 0)), class_names=tuple(names))
        assert ("hit@5" in words(page)) is shown
        assert [["100", "50.0%", "70.0%", *["100.0%"] * shown]] in [one[1:] for one in page.tables]


def test_remedies_fit_a_training() -> None:
    """Every reason has one, and none speaks of what only a job has: a retry, a launch or its options."""
    assert TRAINING_REMEDY.keys() == set(Reason)
    for reason in Reason:
        assert not re.search(r"retry|launch|--max-duration|--partial", TRAINING_REMEDY[reason], re.IGNORECASE), reason
        assert meaning_in_training(reason)[0] == REASON_MEANING[reason]


def test_failures_are_grouped_with_what_to_do() -> None:
    """Each reason has its count, meaning, remedy and three examples, the most frequent first; so has an unknown one."""
    reasons = ["strange", *[Reason.TRUNCATED] * 5]
    text = words(
        rendered(
            failures=table(FAILURES, path=[f"{at}.mp4" for at in range(6)], reason=reasons, detail=["cut here"] * 6)
        )
    )
    assert "6 videos failed" in text and text.index("5 × truncated") < text.index("1 × strange")
    assert REASON_MEANING[Reason.TRUNCATED].capitalize() in text and TRAINING_REMEDY[Reason.TRUNCATED] in text
    assert "3.mp4: cut here and 2 more" in " ".join(text.split()) and "4.mp4" not in text


def test_the_curves_are_where_the_values_are() -> None:
    """Positions turned back into values by the ticks are those of the metrics and of the evaluations."""
    steps = np.arange(1, 201)
    found = training_curves(
        metrics(200, loss=steps / 100, top1=steps / 400),
        table(TESTS, step=[100, 200], clip_hit1=[0.25, float("nan")], video_hit1=[0.5, 0.625], video_hit5=[0.75, 0.75]),
    )
    assert found is not None
    plot = found.loss

    def values(axis: curves.Axis, positions: list[float]) -> list[float]:
        share = (np.array(positions) - axis.start) / (axis.end - axis.start)
        return list(axis.low + share * (axis.high - axis.low))

    for kind in ("faint", "line"):
        (line,) = points(dict(plot.lines)[kind])
        assert values(plot.x, [x for x, _ in line]) == pytest.approx(list(steps), abs=0.05)
        inside = slice(5, -5)  # a moving mean of a straight line is the line itself, except at its ends
        assert values(plot.y, [y for _, y in line])[inside] == pytest.approx(list(steps / 100)[inside], abs=0.002)
    assert [text for _, text in plot.y.ticks] == ["0", "0.5", "1", "1.5", "2"]
    assert [text for _, text in plot.x.ticks] == ["50", "100", "150", "200"]
    at = [(kind, *values(found.top1.x, [x]), *values(found.top1.y, [y])) for kind, x, y in found.top1.marks]
    assert [kind for kind, *_ in at] == ["video_hit1", "video_hit1", "clip_hit1"]
    assert np.array([one[1:] for one in at]) == pytest.approx(
        np.array([(100, 0.5), (200, 0.625), (100, 0.25)]), abs=0.2
    )


def test_the_page_shows_the_sums_of_the_run() -> None:
    """Steps, epochs, time, the share of it spent waiting, clips per second and learning rate are those of the steps."""
    page = rendered(metrics=metrics(400, waiting_s=np.repeat([0.0, 0.25], 200)))
    text = words(page)
    assert "400 steps, epoch 4, 3 min 20 s" in text and "2 loss at the end" in text
    assert "25.0% of the time in all; 32 clips per second on average. The network waited for frames" in text
    assert page.tables[0][1] == ["1 to 40", "0.4", "2", "25.0%", "0.01", "0.0%", "32"]
    assert page.tables[0][-1] == ["361 to 400", "4", "2", "25.0%", "0.01", "50.0%", "32"]


@given(st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=300), st.integers(1, 50))
def test_intervals_hold_every_step_once(steps: list[int], most: int) -> None:
    """At most `most` intervals, in order, none of them empty, and none wider than its part of the run."""
    step_S = np.sort(np.array(steps, np.int64))
    starts_P = interval_starts(step_S, most)
    assert len(starts_P) <= most and starts_P[0] == 0 and (np.diff(starts_P) > 0).all()
    width = -(-(int(step_S[-1] - step_S[0]) + 1) // most)
    assert all(int(part[-1] - part[0]) < width for part in np.split(step_S, starts_P[1:]))


def test_means_leave_out_what_is_not_finite() -> None:
    """A mean is over the finite values of the window; an interval without one stays a gap."""
    values_S = np.array([1, np.nan, 3, np.inf, np.nan, 7])
    assert means(values_S, np.array([0, 3, 5]), 1).tolist() == pytest.approx([2, np.nan, 7], nan_ok=True)
    assert means(values_S, np.array([0, 2, 3]), 3).tolist() == pytest.approx([2, 11 / 3, 5])
    assert ratios(np.ones(3), np.array([np.nan, 2, 2]), np.array([0]), 1).tolist() == [0.5]
    assert ratios(np.ones(6), np.zeros(6), np.array([0]), 1).tolist() == pytest.approx([np.nan], nan_ok=True)


def test_a_nan_loss_is_said_and_is_a_gap() -> None:
    """The page names the first step without a finite loss; the line has a gap there, and the axis its finite values."""
    loss = np.full(100, 2.0)
    loss[40:60], loss[99] = np.nan, np.inf
    page = rendered(metrics=metrics(100, loss=loss))
    assert "The loss was NaN or infinite in 21 of 100 steps, first in step 41." in words(page)
    found = training_curves(metrics(100, loss=loss), table(TESTS))
    assert found is not None
    assert [len(line) for line in points(dict(found.loss.lines)["line"])] == [40, 39]
    assert (found.loss.y.low, found.loss.y.high) == (2, 4)
    page = rendered(metrics=metrics(100, loss=np.full(100, np.nan)))
    assert "in 100 of 100 steps, first in step 1." in words(page) and "NaN loss at the end" in words(page)


def test_a_loss_that_diverges_leaves_the_rest_readable() -> None:
    """The axis ends near three times the first loss, and the page counts the steps above it."""
    loss = np.concatenate((np.linspace(5, 2, 90), np.geomspace(100, 1e30, 10)))
    found = training_curves(metrics(100, loss=loss), table(TESTS))
    assert found is not None and found.loss.y.high <= 20 and found.above == 10
    assert "10 are above the plot" in words(rendered(metrics=metrics(100, loss=loss)))


def test_a_long_run_of_many_classes_stays_small() -> None:
    """The page of a million steps and 10 000 classes is below 300 kB, and no path has more than POINTS points."""
    n = 1_000_000
    rng = np.random.default_rng(0)
    loss = rng.uniform(1, 2, n)
    loss[123_456] = 4.0  # shown, as the highest value of its interval
    tests = np.linspace(0, 1, 5_000)
    classes = rng.integers(0, 10_000, (2, 50_000))
    made = report(
        class_names=tuple(f"class {at} {'x' * 200}" for at in range(10_000)),
        metrics=metrics(n, loss=loss),
        tests=table(TESTS, step=np.arange(1, 5_001) * 200, clip_hit1=tests, video_hit1=tests, video_hit5=tests),
        predictions=predictions(*zip(*classes.tolist(), strict=True)),
    )
    html = render_training(made)
    page = harmless(html)
    assert len(html.encode()) < 300_000
    paths = [str(one["d"]) for one in page.all("path") if one["class"] != "grid"]
    assert len(paths) == 7
    assert all(sum(map(len, points(path))) <= curves.POINTS for path in paths)
    assert len(page.all("circle")) == 2 * curves.MARKS
    found = training_curves(made.metrics, made.tests)
    assert found is not None
    (faint,) = points(dict(found.loss.lines)["faint"])
    x, y = min(faint, key=lambda one: one[1])
    assert x == pytest.approx(found.loss.x.at(123_456), abs=2) and y == pytest.approx(found.loss.y.at(4.0), abs=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class_names": (), "facts": ()},
        {"metrics": metrics(1)},
        {"metrics": metrics(1, loss=[np.nan], top1=[np.nan], lr=[np.nan], seconds=[0.0], waiting_s=[0.0], clips=[0])},
        {"metrics": metrics(2, step=[7, 7], epoch=[None, None], seconds=[None, None], lr=[0.0, 0.0], loss=[0.0, 0.0])},
        {"metrics": metrics(3, step=[2**40, -5, 10**9], loss=[-1.0, 3e38, -3e38])},
        {"metrics": metrics(50)},
        {"tests": table(TESTS, step=[5], clip_hit1=[np.nan], video_hit1=[np.nan], video_hit5=[np.nan])},
        {"metrics": metrics(3), "tests": table(TESTS, step=[0], clip_hit1=[0.0], video_hit1=[0.0], video_hit5=[0.0])},
        {"predictions": predictions((0, 0))},
        {"predictions": predictions((0, 1)), "class_names": ()},
        {"failures": table(FAILURES, path=["a"], reason=[""], detail=[""])},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error")
def test_empty_and_odd_tables_render(changes: dict[str, Any]) -> None:
    """No table needs a row, and no row a finite value: the page is whole, and no position in it is NaN."""
    html = render_training(report(**changes))
    page = harmless(html)
    positions = [
        str(one[name])
        for tag, one in page.tags
        for name in ("d", "x", "y", "cx", "cy")
        if name in one and tag != "title"
    ]
    assert not [one for one in positions if "nan" in one or "inf" in one]
    assert ("No step was made." in page.text) == ("metrics" not in changes and "tests" not in changes)
    assert ("No evaluation was made." in page.text) == ("tests" not in changes)
    assert ("There are no predictions of test videos." in page.text) == ("predictions" not in changes)
    assert len(page.all("svg")) in (0, 4)


def test_one_step_is_a_dash() -> None:
    """A line of one point, which would not be drawn, is a short dash around the point."""
    found = training_curves(metrics(1), table(TESTS))
    assert found is not None and dict(found.loss.lines)["line"] == f"M{curves.LEFT - 2} {found.loss.y.at(2.0):g}h4"


@pytest.mark.parametrize("classes", [3, MATRIX_CLASSES + 5])
def test_hostile_names_are_text(classes: int) -> None:
    """Markup, control characters and changes of direction in any name are shown as text, and long names are cut."""
    names = tuple(f"{at}{HOSTILE}{'y' * 5000}" for at in range(classes))
    page = rendered(
        out=HOSTILE,
        facts=((HOSTILE, HOSTILE),),
        class_names=names,
        predictions=predictions((0, 1), (1, 2), (2, 0)).set_column(0, "path", pa.array([HOSTILE * 100] * 3)),
        failures=table(FAILURES, path=[HOSTILE], reason=[HOSTILE], detail=[HOSTILE]),
    )
    visible = "<script>alert(1)</script>\"' onload='x\\x1b[31m\\u202egpj\\x00&lt;{{ 7 * 7 }}"
    assert visible in page.text and f"0{visible}" in page.text
    assert len(page.text) < 50_000
    styles = [str(attributes["style"]) for tag, attributes in page.tags if "style" in attributes]
    assert all(re.fullmatch(r"--share: \d+%", one) for one in styles)
