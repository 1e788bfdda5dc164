"""Linear probing: the splits of the list, folds that test each video once, and errors for wrong lists."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from p3d.pipeline.errors import InputError
from p3d.pipeline.results.evaluation.svm import _drawn, evaluate_svm, read_split
from p3d.pipeline.storage.local import LocalStore
from tests.jobs.test_cli import in_process
from tests.pipeline.test_dedup import commit, vectors
from tests.pipeline.test_snapshot import newest

NAMES = [f"v{at:02d}" for at in range(24)]


@pytest.fixture
def out(tmp_path: Path) -> LocalStore:
    """Twenty-four videos: three classes of eight similar videos."""
    store = LocalStore(str(tmp_path / "out"))
    commit(store, NAMES, {name: NAMES[at % 3] for at, name in enumerate(NAMES) if at >= 3}, 0.5, 5)
    return store


def csv(*rows: str) -> bytes:
    return "\n".join(rows).encode()


def test_fixed_splits_are_the_lists(out: LocalStore) -> None:
    """Three splits: train and test videos are those of the words, - is neither, and the mean is over the splits."""
    words = ("test;train;-", "train;test;train", "train;train;test")
    rows = [f"{name}.mp4,kind {at % 3},{words[at // 3 % 3]}" for at, name in enumerate(NAMES)]
    found = evaluate_svm(newest(out), read_split("l.csv", csv("path,label,split", *rows)))
    assert [(one.n_train, one.n_test, one.n_classes) for one in found.splits] == [(15, 9, 3), (15, 9, 3), (9, 6, 3)]
    assert [one.accuracy for one in found.splits] == [1.0, 1.0, 1.0]  # the classes are far from each other
    assert (found.mean, found.fixed, found.videos, found.unlabelled, found.unknown_labels) == (1.0, True, 24, 0, 0)


def test_accuracy_is_that_of_a_separate_svm(out: LocalStore) -> None:
    """Labels that are half wrong: the same number as scikit-learn gives for the vectors read by hand."""
    from sklearn.svm import LinearSVC

    rng = np.random.default_rng(1)
    labels = [str(at % 3 if rng.random() < 0.5 else rng.integers(3)) for at in range(24)]
    split = ["test" if at % 2 else "train" for at in range(24)]
    rows = [f"{name},{label},{word}" for name, label, word in zip(NAMES, labels, split, strict=True)]
    found = evaluate_svm(newest(out), read_split("l.csv", csv("video_id,label,split", *rows)), cost=10)
    ids, x = vectors(out)
    assert ids == NAMES
    train = np.array(split) == "train"
    svm = LinearSVC(C=10, random_state=0, max_iter=10_000).fit(x[train], np.array(labels)[train])
    assert found.mean == pytest.approx(svm.score(x[~train], np.array(labels)[~train]))
    assert 0 < found.mean < 1


def test_folds_test_each_video_once_and_each_class_evenly() -> None:
    """Drawn folds are stratified, the same for the same seed, and others for another."""
    labels = np.array(list("aaaaaaabbbbbccccccccccccc"))
    folds = _drawn(labels, 5, 0)
    assert (sum(test.astype(int) for _, test in folds) == 1).all()
    assert all((train ^ test).all() for train, test in folds)
    for name in "abc":
        counts = Counter(fold for fold, (_, test) in enumerate(folds) for one in labels[test] if one == name)
        assert max(counts.values()) - min(counts.values()) <= 1 and len(counts) == 5
    sizes = [int(test.sum()) for _, test in folds]
    assert max(sizes) - min(sizes) <= 1
    assert all((a[1] == b[1]).all() for a, b in zip(folds, _drawn(labels, 5, 0), strict=True))
    assert any((a[1] != b[1]).any() for a, b in zip(folds, _drawn(labels, 5, 1), strict=True))


def test_the_verb_needs_no_scores(out: LocalStore, tmp_path: Path) -> None:
    """--svm over an output without scores: one line per fold, the mean, and what is left out; also as --json."""
    path = tmp_path / "labels.csv"
    path.write_text("path,label\n" + "".join(f"{name}.mp4,{at % 3}\n" for at, name in enumerate(NAMES[:20])) + "z,1\n")
    code, printed, said = in_process("results", "evaluate", out.url, "--labels", str(path), "--svm", "--folds", "4")
    assert code == 0, said
    assert [line.split()[0] for line in printed.splitlines()] == ["fold", "1", "2", "3", "4", "mean"]
    assert printed.splitlines()[-1].split()[1] == "100.0"
    assert "4 videos left out without a label" in said and "1 label without a finished video" in said
    args = ("results", "evaluate", out.url, "--labels", str(path), "--svm", "--json")
    assert json.loads(in_process(*args)[1])["mean"] == 1.0


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (("name,label", "a,1"), "needs a column label, and one of video_id, uri, path"),
        (("path,label", "a,1", "a,2"), "names 'a' more than once"),
        (("path,label,split", "a,1,train", "b,1,maybe"), "'maybe', not one of train, test, -"),
        (("path,label,split", "a,1,train", "b,1,train;test"), "has 2 words, and others have 1"),
        (("path,label", "zebra,1"), "none of 1 labels is of a video"),
        (("path,label", "v00.mp4,1", "v01.mp4,2"), "has 1 videos, too few for 5 folds"),
        (("path,label,split", "v00.mp4,1,train", "v01.mp4,2,test"), "1 videos of 1 classes to train on and 1 to test"),
    ],
)
def test_a_wrong_list_is_an_error(out: LocalStore, rows: tuple[str, ...], says: str) -> None:
    """Invalid lists and splits are refused, and the message has the value."""
    with pytest.raises(InputError, match=says):
        evaluate_svm(newest(out), read_split("l.csv", csv(*rows)))
