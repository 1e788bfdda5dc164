"""Linear probing: a linear SVM on the stored video vectors, against labels. The P3D paper's protocol on UCF101.

    labels.csv ──> training and test videos of each split ──> unit vectors of these videos ──> accuracy of each split

path,label,split                      one word per split, separated by ;  train, test, or - for neither
v_Archery_g01_c01.avi,Archery,test;train;train
v_Archery_g08_c01.avi,Archery,train;test;train

Memory holds the vectors of the labelled videos: 8 kB each for 2048 features. Legend: V videos, D feature dimension.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.errors import InputError
from p3d.pipeline.results.evaluation.labels import KEYS, read_table
from p3d.pipeline.types import BOOL, FLOAT32

WORDS = ("train", "test", "-")


@dataclass(frozen=True, slots=True)
class LabelledSplit:
    """A parsed list: the label of each video and, if the list has fixed splits, a word of WORDS for each split."""

    key: str
    label_of: dict[str, str]
    words_of: dict[str, tuple[str, ...]]
    n_splits: int


@dataclass(frozen=True, slots=True)
class Split:
    """One SVM: accuracy in [0, 1] on the test videos. `n_classes` counts the classes of the training videos."""

    accuracy: float
    n_train: int
    n_test: int
    n_classes: int


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The mean accuracy over splits. `unknown_labels` counts labels that name no video with rows."""

    mean: float
    splits: tuple[Split, ...]
    fixed: bool
    videos: int
    unlabelled: int
    unknown_labels: int


def read_split(source: str, content: bytes) -> LabelledSplit:
    """Parse a list of labels and splits. InputError names a value that is not valid."""
    table = read_table(source, content)
    key = next((name for name in KEYS if name in table.column_names), None)
    if key is None or "label" not in table.column_names:
        raise InputError(
            f"{source} needs a column label, and one of {', '.join(KEYS)}; it has {', '.join(table.column_names)}"
        )
    names, labels = table[key].to_pylist(), [label.strip() for label in table["label"].to_pylist()]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{source} names {twice[0]!r} more than once; an SVM takes one label per video")
    label_of = {name: label for name, label in zip(names, labels, strict=True) if label}
    if "split" not in table.column_names:
        return LabelledSplit(key, label_of, {}, 0)
    words_of, n_splits = {}, 0
    for name, text in zip(names, table["split"].to_pylist(), strict=True):
        words = tuple(word.strip() for word in text.split(";"))
        if odd := [word for word in words if word not in WORDS]:
            raise InputError(f"{source}: split of {name!r} has {odd[0]!r}, not one of {', '.join(WORDS)}")
        n_splits = n_splits or len(words)
        if len(words) != n_splits:
            raise InputError(f"{source}: split of {name!r} has {len(words)} words, and others have {n_splits}")
        words_of[name] = words
    return LabelledSplit(key, label_of, words_of, n_splits)


def evaluate_svm(
    source: NewestRows | SnapshotRows,
    given: LabelledSplit,
    *,
    folds: int = 5,
    cost: float = 1.0,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> Accuracy:
    """Accuracy of a linear SVM (`cost` is its C) on the unit vectors of the labelled videos.

    Splits are those of the list, or else `folds` stratified folds drawn with `seed`. InputError if a split has too
    little to train on or to test.
    """
    vectors_VD, names, unlabelled = _vectors(source, given, on_step)
    if not names:
        raise InputError(f"none of {len(given.label_of)} labels is of a video that has rows in {source.store.url}")
    labels_V = np.array([given.label_of[name] for name in names])
    parts = _fixed(given, names) if given.n_splits else _drawn(labels_V, folds, seed)
    splits = tuple(
        _score(vectors_VD, labels_V, train_V, test_V, cost, at) for at, (train_V, test_V) in enumerate(parts)
    )
    mean = float(np.mean([one.accuracy for one in splits]))
    return Accuracy(mean, splits, bool(given.n_splits), len(names), unlabelled, len(given.label_of) - len(names))


def _vectors(
    source: NewestRows | SnapshotRows, given: LabelledSplit, on_step: Callable[[int, int], None] | None
) -> tuple[FLOAT32, list[str], int]:
    """Unit vectors of the labelled videos, their names in the list, and how many have rows but no label."""
    parts: list[FLOAT32] = []
    names: list[str] = []
    unlabelled = 0
    for folder, table in source.rows(clips=False, on_step=on_step):
        if folder != "videos":
            continue
        found = table[given.key].to_pylist()
        keep = np.array([name in given.label_of for name in found], bool)
        parts.append(schema.features_of(table["embedding"], source.job.recipe.feature_dim)[keep])
        names += [name for name in found if name in given.label_of]
        unlabelled += len(found) - int(keep.sum())
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"several videos of {source.store.url} have {given.key} {twice[0]!r}; label by video_id")
    vectors_VD = np.concatenate(parts) if parts else np.empty((0, 1), np.float32)
    return vectors_VD / np.linalg.norm(vectors_VD, axis=1, keepdims=True), names, unlabelled


def _fixed(given: LabelledSplit, names: list[str]) -> list[tuple[BOOL, BOOL]]:
    """Masks (train, test) of each split of the list, [V] each."""
    words = np.array([given.words_of[name] for name in names])
    return [(words[:, at] == "train", words[:, at] == "test") for at in range(given.n_splits)]


def _drawn(labels_V: npt.NDArray[np.str_], folds: int, seed: int) -> list[tuple[BOOL, BOOL]]:
    """Masks (train, test) of stratified folds: each video is tested once, and classes are spread evenly over folds."""
    counts = Counter(labels_V.tolist())
    label, fewest = min(counts.items(), key=lambda one: one[1])
    if fewest < folds:
        raise InputError(
            f"label {label!r} has {fewest} videos, too few for {folds} folds; choose fewer, or a split column"
        )
    rng, fold_V = np.random.default_rng(seed), np.empty(len(labels_V), np.int64)
    dealt = 0
    for one in sorted(counts):
        mine = rng.permutation(np.flatnonzero(labels_V == one))
        fold_V[mine] = (dealt + np.arange(len(mine))) % folds
        dealt += len(mine)
    return [(fold_V != at, fold_V == at) for at in range(folds)]


def _score(
    vectors_VD: FLOAT32, labels_V: npt.NDArray[np.str_], train_V: BOOL, test_V: BOOL, cost: float, at: int
) -> Split:
    """Train on some, test on others."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    classes = np.unique(labels_V[train_V])
    if len(classes) < 2 or not test_V.any():
        raise InputError(
            f"split {at + 1} has {int(train_V.sum())} videos of {len(classes)} classes to train on and "
            f"{int(test_V.sum())} to test; an SVM needs two classes, and a video to test"
        )
    svm = LinearSVC(C=cost, loss="squared_hinge", penalty="l2", dual=True, max_iter=10_000, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            svm.fit(vectors_VD[train_V], labels_V[train_V])
        except ConvergenceWarning:
            raise InputError(f"the SVM of split {at + 1} does not converge at --cost {cost:g}; lower it") from None
    hits_V = svm.predict(vectors_VD[test_V]) == labels_V[test_V]
    return Split(float(hits_V.mean()), int(train_V.sum()), int(test_V.sum()), len(classes))
