"""The labelled videos of a training: which class each one shows, and which are held out for testing.

    SRC/CLASS/VIDEO          folders are classes; below SRC/train and SRC/test, they state the split too
    SRC is a list            a CSV, TSV, JSONL or Parquet file with a column of labels, or a text file of such lines:
                                 archery/a.mp4 3              label after the last space, or after the last tab
    --labels FILE            such a list, with paths relative to SRC, or with a column `video_id` or `uri`
    --labels FOLDER          train.txt and test.txt, or UCF101's classInd.txt, trainlistNN.txt and testlistNN.txt

A video has one label. Its identity is that of the listing (`p3d.pipeline.sources.identity`), in every form.
"""

from __future__ import annotations

import hashlib
import math
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from urllib.parse import quote_from_bytes

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from p3d.jobs.training.options import DEFAULT_LABEL_COLUMN, DEFAULT_SPLIT_COLUMN, LabelOptions
from p3d.pipeline.dataset.schema import MANIFEST
from p3d.pipeline.errors import InputError, StoreMissing, StoreNoBucket, as_stored, counted
from p3d.pipeline.sources.identity import local_path
from p3d.pipeline.sources.listing import VIDEO_EXTENSIONS, find, root_of
from p3d.pipeline.sources.lists import (
    LIST_EXTENSIONS,
    TABLE_EXTENSIONS,
    FileList,
    path_column,
    read_list,
    read_table,
    utf8_of,
)
from p3d.pipeline.storage.s3.uri import refuse_almost_s3, s3_uri, split_s3_uri
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.storage.urls import CREDENTIAL, open_store
from p3d.pipeline.types import BOOL, INT64

TRAIN, TEST = "train", "test"
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("test", "testing", "val", "valid", "validation"), TEST),
}
SHOWN = 3  # names in a message
COLUMNS = [name for name in MANIFEST.names if name != "shard"]
LABEL, SPLIT = pa.field("label", pa.int32(), nullable=False), pa.field("split", pa.string(), nullable=False)
CLASSES = "classInd.txt"  # of UCF101
FORMS = (
    "a folder for each class, as SRC/CLASS/a.mp4; a CSV, TSV, JSONL or Parquet list as SRC, with a column for labels; "
    "a text list as SRC, with lines of a path and a label; or --labels with such a list, or with a folder of UCF101's "
    "lists"
)


@dataclass(frozen=True, slots=True)
class Labelled:
    """Labelled videos in the order of the listing.

    `videos` has the columns of MANIFEST except `shard`, then `label` (int32, the position in `class_names`) and `split`
    ("train" or "test"). Each class has a training video. `notes` are messages for the user.
    """

    videos: pa.Table
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Stated:
    """What a source of labels says, in its own order: the video, the class and perhaps the split of each row.

    `names` are values of `key`: a path, which may also be a uri, or a video_id. `splits` are TRAIN or TEST. `order` has
    all class names in the order of their numbers, if the source defines one. With `bare`, a path that SRC does not have
    stands for the video of that name directly in SRC. `origin` is the source, for messages.
    """

    origin: str
    names: list[str]
    classes: pa.Array
    splits: pa.Array | None
    order: tuple[str, ...] | None = None
    key: str = "path"
    bare: bool = False


def labelled(
    source: str,
    options: LabelOptions,
    s3: StoreOptions,
    *,
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    id_column: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Labelled:
    """The labelled videos of SRC, which is listed as `p3d launch` does (`p3d.pipeline.sources.listing.find`).

    Where no split is stated, `options.holdout` of each class is held out, by a hash of `seed` and the video's id, so
    the same videos and seed give the same split. InputError for labels that cannot be used.
    """
    stated = None if options.labels is None else _read_labels(options.labels, options, s3)
    read = read_list if stated is not None else partial(_read_source, column=options.label_column)
    found = find(source, s3, id_column=id_column, include=include, exclude=exclude, tell=tell, read=read)
    root = root_of(source)
    is_list = root.lower().endswith(LIST_EXTENSIONS) and not Path(root).is_dir()
    notes = [f"{counted(found.n_skipped, 'other file')} skipped"] if found.n_skipped else []
    absent: list[str] = []
    if stated is None:
        if not is_list:
            _refuse_columns(source, options)
        paths = found.videos["path"].to_pylist()
        stated = _of_columns(source, found.videos, paths, options) if is_list else _of_folders(source, paths)
        rows = _table(found.videos, stated.classes, stated.splits)
    else:
        rows, absent = _joined(found.videos, stated)
        if without := found.videos.num_rows - pc.count_distinct(rows["uri"]).as_py():
            notes.append(f"{counted(without, 'video')} of {source} without a label left out")
    there = pc.greater_equal(rows["size_bytes"], 0)
    absent += rows.filter(pc.invert(there))["path"].to_pylist()
    if absent:
        filtered = options.labels is not None and bool(include or exclude or root != source)
        notes.append(_missing(absent, stated, options, source, filtered))
    rows = rows.filter(there)
    _refuse_repeated(stated.origin, rows)
    return _numbered(stated, rows, options, seed, notes)


# --- what states labels ----------------------------------------------------------------------------------------------


def _of_folders(source: str, paths: list[str]) -> _Stated:
    """Classes are the first folders below SRC; or the second ones, if the first are one for training and one for tests.

    Class names are sorted as text.
    """
    parts = [path.split("/", 2) for path in paths]
    tops = sorted({names[0] for names in parts if len(names) > 1})
    words = [SPLIT_WORDS.get(top.lower(), "") for top in tops]
    depth = 0
    if len(words) > 1 and TRAIN in words and "" not in words:
        if sorted(words) != [TEST, TRAIN]:
            raise InputError(
                f"{source} has the folders {', '.join(tops)}, which look like more than two splits; leave out all but "
                "one folder for training and one for tests with --exclude"
            )
        depth = 1
    loose = [path for path, names in zip(paths, parts, strict=True) if len(names) < depth + 2 or not names[depth]]
    if loose:
        below = f"{source.rstrip('/')}/{'train/' * depth}CLASS/"
        raise InputError(
            f"{source} has {counted(len(loose), 'video')} outside of any folder of a class: {_some(loose)}. Move them "
            f"into {below}, or give labels in another form: {FORMS}"
        )
    classes = [names[depth] for names in parts]
    order = tuple(sorted(set(classes)))
    splits = [SPLIT_WORDS[names[0].lower()] for names in parts] if depth else None
    return _Stated(source, paths, pa.array(classes), None if splits is None else pa.array(splits), order)


def _refuse_columns(source: str, options: LabelOptions) -> None:
    """InputError for names of columns where folders are the classes."""
    for name, default in (("label", DEFAULT_LABEL_COLUMN), ("split", DEFAULT_SPLIT_COLUMN)):
        if (column := getattr(options, f"{name}_column")) != default:
            raise InputError(
                f"--{name}-column {column} is for a list, and {source} is a folder, whose folders are the classes. "
                "Leave it out, or name the list with --labels"
            )


def _of_columns(origin: str, table: pa.Table, names: list[str], options: LabelOptions, key: str = "path") -> _Stated:
    """Labels and splits in columns of a table; `names` has the video of each row, for messages too."""
    classes = _texts(origin, table, options.label_column, "label", names)
    if options.split_column == DEFAULT_SPLIT_COLUMN and DEFAULT_SPLIT_COLUMN not in table.column_names:
        return _Stated(origin, names, classes, None, key=key)
    words = _texts(origin, table, options.split_column, "split", names)
    at = pc.index_in(pc.utf8_lower(words), value_set=pa.array(list(SPLIT_WORDS)))
    if at.null_count:
        row = pc.index(pc.is_null(at), True).as_py()
        raise InputError(
            f"{origin}: the split of {names[row]!r} is {words[row].as_py()!r}; write train or test, or name another "
            "column with --split-column"
        )
    return _Stated(origin, names, classes, pa.array(list(SPLIT_WORDS.values())).take(at), key=key)


def _texts(origin: str, table: pa.Table, name: str, what: str, names: list[str]) -> pa.Array:
    """A column of texts, whole numbers or truth values as texts without spaces around them.

    InputError for a column that does not exist or is of another type, and for a row without a value.
    """
    if name not in table.column_names:
        others = ", ".join(column for column in table.column_names if column not in COLUMNS)
        forms = f". Labels may be given as: {FORMS}" if what == "label" else ""
        raise InputError(
            f"{origin} has no column {name!r} with a {what} of each video; it has {others[:200] or 'only paths'}. Name "
            f"the column with --{what}-column{forms}"
        )
    column = table[name]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    try:
        if pa.types.is_floating(kind):
            raise pa.ArrowInvalid("a number with a fraction is not a name")
        texts = pc.utf8_trim_whitespace(pc.cast(pc.cast(column, kind), pa.string()).combine_chunks())
    except pa.ArrowException as error:
        raise InputError(
            f"{origin}: column {name!r} has values of type {kind}, not texts or whole numbers ({str(error)[:200]})"
        ) from None
    empty = pc.fill_null(pc.equal(pc.utf8_length(texts), 0), True)
    if n_empty := pc.sum(empty).as_py():
        first = names[pc.index(empty, True).as_py()]
        raise InputError(
            f"{origin} has {counted(n_empty, 'row')} without a {what}, the first for {first!r}; add it or remove "
            "the row"
        )
    return texts


def _read_labels(place: str, options: LabelOptions, s3: StoreOptions) -> _Stated:
    """What `--labels` names."""
    if CREDENTIAL.match(place):
        raise InputError("--labels contains a credential; use a plain path or s3:// and botocore's credential chain")
    refuse_almost_s3(place)
    if not place or ("://" in place and not place.startswith(("s3://", "file:///"))):
        raise InputError(f"--labels {place!r}: name a local file or folder, or one on s3://")
    if place.startswith("file:///"):
        place = os.fsdecode(local_path(place))
    if place.lower().endswith(LIST_EXTENSIONS) and (content := _read(place, s3)) is not None:
        if place.lower().endswith(TABLE_EXTENSIONS):
            return _of_table(place, content, options)
        entries, labels = _read_lines(place, content)
        return _Stated(place, entries, pa.array(labels), None)
    folder = place.rstrip("/")
    if (classes := _read(f"{folder}/{CLASSES}", s3)) is not None:
        return _of_ucf101(folder, classes, options.fold, s3)
    return _of_two_lists(folder, s3)


def _of_table(place: str, content: bytes, options: LabelOptions) -> _Stated:
    """Labels in a table that names videos by video_id, uri or path: the first of these columns that is there."""
    table = read_table(place, content, lambda names: options.label_column in names, "video_id", [options.label_column])
    if twice := sorted(name for name, count in Counter(table.column_names).items() if count > 1):
        raise InputError(f"{place} has more than one column named {twice[0]!r}; rename one")
    if not table.num_rows:
        raise InputError(f"{place} has no rows")
    column = "video_id" if "video_id" in table.column_names else path_column(table.column_names)
    if column is None:
        raise InputError(
            f"{place} has no column that names videos, such as path, uri or video_id; it has "
            f"{', '.join(table.column_names)[:200]}. A file of lines with a path and a label, and no header, must be "
            "named .txt"
        )
    entries = [os.fsdecode(entry) if isinstance(entry, bytes) else entry for entry in table[column].to_pylist()]
    if nameless := sum(not entry for entry in entries):
        raise InputError(f"{place} has {counted(nameless, 'row')} without a {column}; add it or remove the row")
    names = [as_stored(str(entry)) for entry in entries]
    return _of_columns(place, table, names, options, "video_id" if column == "video_id" else "path")


def _of_two_lists(folder: str, s3: StoreOptions) -> _Stated:
    """Labels in train.txt and test.txt of a folder, or files with other SPLIT_WORDS as names."""
    contents = {word: content for word in SPLIT_WORDS if (content := _read(f"{folder}/{word}.txt", s3)) is not None}
    if sorted(SPLIT_WORDS[word] for word in contents) != [TEST, TRAIN]:
        is_list = folder.lower().endswith(LIST_EXTENSIONS)
        if not contents and (is_list if folder.startswith("s3://") else not Path(folder).exists()):
            raise InputError(f"--labels {folder} does not exist")
        has = f"; it has {', '.join(f'{word}.txt' for word in contents)}" if contents else ""
        raise InputError(
            f"--labels {folder} is neither a list ({', '.join(LIST_EXTENSIONS)}) nor a folder of lists, which has "
            f"{CLASSES} of UCF101, or one list for training and one for tests, such as train.txt and test.txt{has}"
        )
    names, labels, splits = [], [], []
    for word, content in contents.items():
        entries, classes = _read_lines(f"{folder}/{word}.txt", content)
        names += entries
        labels += classes
        splits += [SPLIT_WORDS[word]] * len(entries)
    return _Stated(folder, names, pa.array(labels), pa.array(splits))


def _read_source(source: str, content: bytes, id_column: str | None, *, column: str) -> FileList:
    """As `read_list`, of a list with labels: those of a text list become a column of this name."""
    if source.lower().endswith(TABLE_EXTENSIONS):
        return read_list(source, content, id_column, [column])
    entries, labels = _read_lines(source, content)
    return FileList(entries, own=pa.table({column: labels}))


def _read_lines(origin: str, content: bytes) -> tuple[list[str], list[str]]:
    """The paths and the labels of a text list.

    A label is after the last tab of a line that has one, else after the last space. A label that looks like the name of
    a video is the end of a path with a space. InputError, with the line, if one has no label.
    """
    entries, labels, unlabelled = [], [], []
    for number, line in _lines(origin, content):
        has_tab = "\t" in line
        path, _, label = line.rpartition("\t" if has_tab else " ")
        if not path.strip() or (not has_tab and posixpath.splitext(label)[1].lower() in VIDEO_EXTENSIONS):
            unlabelled.append((number, line))
        entries.append(path.rstrip())
        labels.append(label.strip())
    if not entries:
        raise InputError(f"{origin} has no lines with a path and a label")
    if len(unlabelled) == len(entries):
        raise InputError(f"{origin} has no labels, only paths. Labels may be given as: {FORMS}")
    if unlabelled:
        number, line = unlabelled[0]
        raise InputError(f"{origin}, line {number} has no label: {line[:100]!r}; write a path, a space and a label")
    return entries, labels


def _lines(origin: str, content: bytes) -> Iterator[tuple[int, str]]:
    """The lines of a text with their numbers, without those that are blank or comments, and without spaces at ends."""
    for number, line in enumerate(utf8_of(origin, content).decode().split("\n"), start=1):
        if line.strip() and not line.startswith("#"):
            yield number, line.rstrip()


def _of_ucf101(folder: str, classes: bytes, fold: int, s3: StoreOptions) -> _Stated:
    """UCF101's lists: classInd.txt has numbers and names of classes, trainlistNN.txt paths and the same numbers.

    testlistNN.txt has paths only. The class of a video is the folder in its path.
    """
    numbers = _class_numbers(f"{folder}/{CLASSES}", classes)
    names, found, splits = [], [], []
    for split in (TRAIN, TEST):
        place = f"{folder}/{split}list{fold:02}.txt"
        if (content := _read(place, s3)) is None:
            raise InputError(f"{place} does not exist; choose the number of another list with --fold")
        wrong: list[tuple[int, str, int]] = []  # line, class, stated number
        n_stated = 0
        for line, text in _lines(place, content):
            path, _, number = text.rpartition(" ")
            if not re.fullmatch("[0-9]{1,9}", number) or not path:
                path, number = text, ""
            path = path.rstrip()
            name = posixpath.basename(posixpath.dirname(path))
            if name not in numbers:
                raise InputError(
                    f"{place}, line {line}: {path[:100]!r} is in no folder of a class of {CLASSES}; correct the line"
                )
            if number:
                n_stated += 1
                if int(number) != numbers[name]:
                    wrong.append((line, name, int(number)))
            names.append(path)
            found.append(name)
            splits.append(split)
        _refuse_other_numbers(place, wrong, numbers, n_stated)
    if not names:
        raise InputError(f"the lists of fold {fold} in {folder} have no lines")
    order = tuple(sorted(numbers, key=numbers.__getitem__))
    return _Stated(folder, names, pa.array(found, pa.string()), pa.array(splits, pa.string()), order, bare=True)


def _class_numbers(place: str, content: bytes) -> dict[str, int]:
    """Name -> number of classInd.txt."""
    numbers: dict[str, int] = {}
    seen: set[int] = set()
    for line, text in _lines(place, content):
        matched = re.fullmatch(r"([0-9]{1,9})\s+(.+)", text)
        if matched is None:
            raise InputError(
                f"{place}, line {line}: {text[:100]!r} is not a number and a name, as '1 ApplyEyeMakeup' is"
            )
        number, name = int(matched[1]), matched[2]
        if name in numbers or number in seen:
            raise InputError(
                f"{place}, line {line}: {text[:100]!r} repeats a number or a name; correct one of the two lines"
            )
        numbers[name] = number
        seen.add(number)
    return numbers


def _refuse_other_numbers(
    place: str, wrong: list[tuple[int, str, int]], numbers: dict[str, int], n_stated: int
) -> None:
    """InputError if a list of UCF101 states other class numbers than classInd.txt."""
    if not wrong:
        return
    line, name, number = wrong[0]
    off = {stated - numbers[one] for _, one, stated in wrong}
    if len(wrong) == n_stated and off in ({-1}, {1}):
        first = min(numbers.values())
        raise InputError(
            f"{place} counts classes from {first + off.pop()}, {CLASSES} from {first}; take both from one copy of the "
            "lists, or correct the numbers"
        )
    raise InputError(
        f"{place}, line {line}: {name!r} has the number {number}, but {numbers[name]} in {CLASSES}; correct one of them"
    )


def _read(place: str, s3: StoreOptions) -> bytes | None:
    """The content of a local file or an S3 object; None if it does not exist. InputError if it cannot be read."""
    if place.startswith("s3://"):
        bucket, key = split_s3_uri(place)
        try:
            return open_store(f"s3://{bucket}", s3).read(key)
        except StoreNoBucket:
            raise
        except StoreMissing:
            return None
    try:
        return Path(place).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{place} cannot be read ({error.strerror})") from None


# --- labels and videos -----------------------------------------------------------------------------------------------


def _table(videos: pa.Table, classes: pa.Array, splits: pa.Array | None) -> pa.Table:
    """The columns of the listing, and the class and split of each video as stated."""
    splits = pa.nulls(len(classes), pa.string()) if splits is None else splits
    return videos.select(COLUMNS).append_column("class", classes).append_column("split", splits)


def _joined(videos: pa.Table, stated: _Stated) -> tuple[pa.Table, list[str]]:
    """The videos that are labelled, in the order of the listing, and the names of those that are not in it."""
    if stated.key == "video_id":
        at = {one: row for row, one in enumerate(videos["video_id"].to_pylist())}
        found = [at.get(name, -1) for name in stated.names]
    else:
        at = {one: row for name in ("uri", "path") for row, one in enumerate(videos[name].to_pylist())}
        found = [at.get(name, -1) for name in stated.names]
        found = [at.get(_spelled(name), -1) if row < 0 else row for row, name in zip(found, stated.names, strict=True)]
        bare = [posixpath.basename(name) for name in stated.names]
        if stated.bare and len(set(bare)) == len(bare):
            found = [at.get(name, -1) if row < 0 else row for row, name in zip(found, bare, strict=True)]
    found_N = np.array(found, np.int64)
    rows = np.argsort(found_N)[int((found_N < 0).sum()) :]
    absent = [name for name, row in zip(stated.names, found, strict=True) if row < 0]
    splits = None if stated.splits is None else stated.splits.take(rows)
    return _table(videos.take(found_N[rows]), stated.classes.take(rows), splits), absent


def _spelled(name: str) -> str:
    """A name as the listing has it: the uri of an absolute one, and a path without `./` and the like."""
    if name.startswith("s3://"):
        return s3_uri(*split_s3_uri(name))
    if name.startswith(("file:///", "/")):
        raw = local_path(name) if name.startswith("file:") else os.fsencode(name)
        return f"file://{quote_from_bytes(os.path.normpath(raw))}"
    return posixpath.normpath(name)


def _missing(absent: list[str], stated: _Stated, options: LabelOptions, source: str, filtered: bool) -> str:
    """The note about listed videos that do not exist. InputError unless they are skipped."""
    exist, are = ("does not exist", "is") if len(absent) == 1 else ("do not exist", "are")
    if options.skip_missing:
        return f"{counted(len(absent), 'listed video')} {exist} and {are} left out"
    left_out = ", or that --include or --exclude leaves out" if filtered else ""
    base = "the list" if options.labels is None else source
    relative = "" if stated.key == "video_id" else f"Paths are relative to {base}. "
    raise InputError(
        f"{stated.origin} lists {counted(len(absent), 'video')} that {exist}{left_out}: {_some(absent)}. {relative}"
        "Correct the list, or leave such videos out with --skip-missing"
    )


def _refuse_repeated(origin: str, rows: pa.Table) -> None:
    """InputError if one file is in two rows: it would count twice, or be tested after it was trained with."""
    counts = pc.value_counts(rows["uri"].combine_chunks())
    if len(counts) == rows.num_rows:
        return
    twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    first = rows.filter(pc.equal(rows["uri"], twice[0]))
    both = pc.count_distinct(first["split"]).as_py() > 1
    raise InputError(
        f"{origin} lists {counted(len(twice), 'video')} more than once, the first is {first['path'][0].as_py()!r}"
        f"{', both for training and for tests' if both else ''}; keep one row for each video"
    )


def _numbered(stated: _Stated, rows: pa.Table, options: LabelOptions, seed: int, notes: list[str]) -> Labelled:
    """Number the classes, complete the split, and refuse what cannot be trained with."""
    origin = stated.origin
    names = _class_names(rows["class"], stated.order)
    if not names:
        raise InputError(f"{origin} has no label of a video that exists; correct its paths")
    if len(names) == 1:
        raise InputError(f"{origin} has only one class, {names[0]!r}; training needs two classes or more")
    if stated.order is not None and (left_out := len(stated.order) - len(names)):
        notes.append(f"{left_out} of {len(stated.order)} classes left out, as they have no videos")
    labels = pc.index_in(rows["class"].combine_chunks(), value_set=pa.array(names)).to_numpy()
    held_out = stated.splits is None and options.holdout > 0
    if held_out:
        test = _held_out(labels, rows["video_id"].to_pylist(), options.holdout, seed)
    else:
        test = pc.fill_null(pc.equal(rows["split"], TEST), False).to_numpy()
    if test.all():
        raise InputError(f"{origin} has no video for training, only for tests; correct the split")
    if not test.any():
        why = "each class has one video" if held_out else "--holdout is 0"
        why = why if stated.splits is None else "no video is in the test split"
        notes.append(f"there is nothing to test on: {why}")
    elif held_out:
        notes.append(f"no split was given: {100 * options.holdout:g} % of each class held out for testing")
    _refuse_small(origin, names, np.bincount(labels[~test], minlength=len(names)), options, held_out)
    rows = rows.select(COLUMNS).append_column(LABEL, pa.array(labels, pa.int32()))
    return Labelled(rows.append_column(SPLIT, pa.array(np.where(test, TEST, TRAIN), pa.string())), names, tuple(notes))


def _class_names(classes: pa.ChunkedArray, order: tuple[str, ...] | None) -> tuple[str, ...]:
    """The names that occur, in the order of the source; else by number if all are whole numbers, else as text."""
    names = set(pc.unique(classes).to_pylist())
    if order is not None:
        return tuple(name for name in order if name in names)
    are_numbers = all(re.fullmatch(r"0|-?[1-9][0-9]{0,18}", name) for name in names)
    return tuple(sorted(names, key=int if are_numbers else None))


def _held_out(labels_N: npt.NDArray[np.int32], ids: list[str], share: float, seed: int) -> BOOL:
    """Which videos are for tests, [N]: of n videos of a class, the first ceil(share * n) in the order of a hash.

    Of a class with two videos or more, at least one is held out and at least one is not.
    """
    hashes = b"".join(hashlib.sha256(f"{seed}\n{one}".encode()).digest() for one in ids)
    words_4N = np.frombuffer(hashes, ">u8").reshape(-1, 4).astype(np.uint64).T
    order = np.lexsort((*words_4N[::-1], labels_N))  # the last key is the first one to sort by
    exact = Fraction(str(share))  # 0.07 * 100 would be more than 7
    test_N, start = np.zeros(len(ids), np.bool_), 0
    for n_class in np.bincount(labels_N).tolist():
        n_test = min(max(1, math.ceil(exact * n_class)), n_class - 1)
        test_N[order[start : start + n_test]] = True
        start += n_class
    return test_N


def _refuse_small(origin: str, names: tuple[str, ...], counts_K: INT64, options: LabelOptions, held_out: bool) -> None:
    """InputError if a class has no training videos, or too few."""
    for least in (1, options.min_per_class):
        small = np.flatnonzero(counts_K < least)
        if not len(small):
            continue
        n_small = f"{len(small)} {'class' if len(small) == 1 else 'classes'}"
        if least == 1:
            raise InputError(
                f"{origin} has only test videos of {n_small}: {_some([names[at] for at in small])}. Move some to "
                "training, or leave these classes out"
            )
        shown = ", ".join(f"{names[at]!r} has {counts_K[at]}" for at in small[:SHOWN])
        after = f" after {100 * options.holdout:g} % were held out" if held_out else ""
        raise InputError(
            f"{origin} has fewer than {least} training videos of {n_small}{after}: {shown}"
            f"{', ...' if len(small) > SHOWN else ''}. Add videos, remove these classes, or use --min-per-class 1"
        )


def _some(names: list[str]) -> str:
    """The first names, for a message."""
    return ", ".join(map(repr, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
