"""Labels of a training: every form states the same classes and splits, and each wrong one is one clear message."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p3d.jobs.training.labels import Labelled, labelled
from p3d.jobs.training.options import LabelOptions
from p3d.pipeline.dataset.schema import MANIFEST
from p3d.pipeline.errors import InputError
from p3d.pipeline.sources.listing import find
from p3d.pipeline.storage.store import DEFAULTS, StoreOptions

VIDEOS = tuple(f"{name}/{number}.mp4" for name in ("archery", "bowling") for number in range(5))
CLASS_IND = "1 Bowling\r\n2 Archery\r\n3 Fencing\r\n"  # not in the order of the names


def fill(root: Path, *names: str) -> str:
    """Files whose content is their own name; labels do not decode them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))
    return str(root)


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def read(source: str, *, seed: int = 0, **options: Any) -> Labelled:
    """As users ask for it: names of LabelOptions, or of arguments of `labelled`."""
    given = {name: options.pop(name) for name in ("include", "exclude", "id_column") if name in options}
    return labelled(source, LabelOptions(**options), DEFAULTS, seed=seed, **given)


def stated(found: Labelled) -> dict[str, tuple[str, str]]:
    """path -> (class name, split)."""
    rows = found.videos.select(["path", "label", "split"]).to_pylist()
    return {row["path"]: (found.class_names[row["label"]], row["split"]) for row in rows}


def classes(found: Labelled) -> dict[str, str]:
    """path -> class name."""
    return {path: name for path, (name, _) in stated(found).items()}


def refused(source: str, *parts: str, **options: Any) -> None:
    """The labels are refused with one message that has these parts."""
    with pytest.raises(InputError) as raised:
        read(source, **options)
    for part in parts:
        assert part in str(raised.value), str(raised.value)


BY_FOLDER = {name: name.partition("/")[0] for name in VIDEOS}


@pytest.fixture
def src(tmp_path: Path) -> str:
    """Two folders with five videos each."""
    return fill(tmp_path / "src", *VIDEOS)


@pytest.fixture
def ucf(tmp_path: Path) -> Path:
    """UCF101's lists of three classes; the first fold has six training videos and two for tests."""
    root = tmp_path / "lists"
    write(root / "classInd.txt", CLASS_IND)
    train = [("Archery", 2), ("Bowling", 1), ("Fencing", 3)]
    lines = [f"{name}/v_{name}_g{group:02}.avi  {number}\r\n" for name, number in train for group in (1, 2)]
    write(root / "trainlist01.txt", "".join(lines))
    write(root / "testlist01.txt", "Archery/v_Archery_g03.avi\r\nBowling/v_Bowling_g03.avi\r\n")
    write(root / "trainlist12.txt", "Archery/v_Archery_g03.avi 2\nBowling/v_Bowling_g03.avi 1\n")
    write(root / "testlist12.txt", "Archery/v_Archery_g01.avi\n")
    return root


UCF_VIDEOS = (
    *(f"{name}/v_{name}_g{group:02}.avi" for name in ("Archery", "Bowling") for group in (1, 2, 3)),
    *("Fencing/v_Fencing_g01.avi", "Fencing/v_Fencing_g02.avi"),
)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_folders_are_classes(tmp_path: Path) -> None:
    """The first folder is the class, at any depth below it, and names are numbered in the order of texts."""
    src = fill(tmp_path, "b c/x/1.mp4", "b c/2.mp4", "\u00e9/1.mp4", "\u00e9/2.mp4", "10/1.mp4", "10/2.mp4", "9/1.mp4")
    fill(tmp_path, "9/2.mp4", "9/readme.txt")
    found = read(src, min_per_class=1)
    assert found.class_names == ("10", "9", "b c", "\u00e9")
    assert all(path.startswith(f"{name}/") for path, name in classes(found).items()) and found.videos.num_rows == 8
    assert found.notes == ("1 other file skipped", "no split was given: 20 % of each class held out for testing")


def test_rows_are_those_of_the_listing(src: str) -> None:
    """Identity, order and columns are those of the job's own listing, with label and split after them."""
    found, listed = read(src), find(src, DEFAULTS).videos
    assert found.videos.select(listed.column_names).equals(listed)
    assert [*listed.column_names, "label", "split"] == found.videos.column_names
    assert listed.column_names == [name for name in MANIFEST.names if name != "shard"]
    assert (found.videos.schema.field("label").type, found.videos.schema.field("split").type) == (
        pa.int32(),
        pa.string(),
    )


def test_a_pattern_and_excluded_folders(src: str) -> None:
    """Folders are classes below the root of a pattern too, and an excluded one is not a class."""
    assert classes(read(f"{src}/**/[0-3].mp4")) == {path: name for path, name in BY_FOLDER.items() if "/4." not in path}
    fill(Path(src), "other/1.mp4")
    assert classes(read(src, exclude=["other"])) == BY_FOLDER


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Training", "val"), ("TRAIN", "validation")])
def test_folders_for_the_splits(tmp_path: Path, train: str, test: str) -> None:
    """Below one folder for training and one for tests, folders are classes and nothing more is held out."""
    src = fill(tmp_path, *(f"{train}/{name}" for name in VIDEOS), f"{test}/archery/0.mp4")
    found = read(src)
    assert stated(found) == {
        **{f"{train}/{path}": (name, "train") for path, name in BY_FOLDER.items()},
        f"{test}/archery/0.mp4": ("archery", "test"),
    }
    assert found.notes == ()


def test_train_and_test_can_be_classes(tmp_path: Path) -> None:
    """Folders that are not exactly one for training and one for tests, but have other names too, are classes."""
    src = fill(tmp_path, *(f"{name}/{number}.mp4" for name in ("train", "test", "plane") for number in range(3)))
    assert read(src).class_names == ("plane", "test", "train")


def test_wrong_folders(tmp_path: Path) -> None:
    """A video without a class is named, and three splits are not taken for three classes."""
    loose = fill(tmp_path / "loose", "a/1.mp4", "loose.mp4")
    refused(loose, "1 video outside of any folder of a class: 'loose.mp4'", f"{loose}/CLASS/", "--labels")
    half = fill(tmp_path / "half", "train/a/1.mp4", "test/b.mp4")
    refused(half, "'test/b.mp4'", f"{half}/train/CLASS/")
    three = fill(tmp_path / "three", "train/a/1.mp4", "val/a/1.mp4", "test/a/1.mp4")
    refused(three, "the folders test, train, val", "--exclude")
    refused(f"{three}/train/a/1.mp4", "'1.mp4'")


def test_folders_have_no_columns(tmp_path: Path) -> None:
    """A column that was named for a folder would be ignored, so it is refused."""
    source = fill(tmp_path / "v", "a/1.mp4", "b/1.mp4")
    for name in ("label", "split"):
        with pytest.raises(InputError, match=f"--{name}-column kind is for a list, and .* is a folder"):
            read(source, min_per_class=1, **{f"{name}_column": "kind"})


# --- a list as SRC ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "txt", "tab.txt"])
def test_a_list_with_labels(src: str, kind: str) -> None:
    """A list of any format has the labels itself, and its rows are the listing's."""
    place, column = Path(src) / f"list.{kind}", "label"
    names = {path: name.replace("a", "\u00e4 ") if kind != "txt" else name for path, name in BY_FOLDER.items()}
    if kind == "parquet":
        labels = pa.array(names.values()).dictionary_encode()
        pq.write_table(pa.table({"video": list(names), column: labels}), place)
    else:
        line, head = {
            "csv": ("{},{}", f"path,{column}"),
            "tsv": ("{}\t{}", f"path\t{column}"),
            "jsonl": ('{{"path": "{}", "label": "{}"}}', ""),
            "txt": ("{}   {} ", "# made by hand\r"),
            "tab.txt": ("{}\t{}", ""),
        }[kind]
        write(place, "\n".join([head, *(line.format(*row) for row in names.items())]).lstrip("\n"))
    found = read(str(place))
    assert classes(found) == names
    assert found.videos["video_id"].equals(find(src, DEFAULTS).videos["video_id"])


def test_a_tab_ends_any_path(tmp_path: Path) -> None:
    """After a tab, a label may have spaces and look like the name of a video, and so may the path before it."""
    fill(tmp_path, *(f"my {at}.mp4" for at in range(4)))
    labels = ("end.mp4", "end.mp4", "the end", "the end")
    lines = [f"my {at}.mp4\t{label}" for at, label in enumerate(labels)]
    assert tuple(classes(read(write(tmp_path / "list.txt", "\n".join(lines)), min_per_class=1)).values()) == labels


def test_columns_and_splits_of_a_list(tmp_path: Path) -> None:
    """Columns may have other names, words of a split several spellings, and ids come from a column."""
    fill(tmp_path, "1.mp4", "2.mp4", "3.mp4", "4.mp4", "5.mp4")
    words = ("train", " Training", "VAL", "train", "train")
    lines = [f"{at}.mp4,{at % 2},{word},id{at}" for at, word in enumerate(words, 1)]
    source = write(tmp_path / "list.csv", "\n".join(["file,kind,part,name", *lines]))
    found = read(source, label_column="kind", split_column="part", id_column="name", min_per_class=1)
    assert stated(found) == {
        **{f"{at}.mp4": (str(at % 2), "train") for at in (1, 2, 4, 5)},
        "3.mp4": ("1", "test"),
    }
    assert found.videos["video_id"].to_pylist() == [f"id{at}" for at in range(1, 6)] and found.notes == ()


@pytest.mark.parametrize("kind", ["csv", "tsv"])
@pytest.mark.parametrize("labels", [("001", "1", "01", "001"), ("1.0", "1", "1.10", "1.1"), ("true", "True", "1", "0")])
def test_labels_of_a_list_are_text(tmp_path: Path, kind: str, labels: tuple[str, ...]) -> None:
    """Classes are as they are written, also numbers and truth values, of a list as SRC and of --labels alike."""
    fill(tmp_path / "v", *(f"{at}.mp4" for at in range(len(labels))))
    sep = {"csv": ",", "tsv": "\t"}[kind]
    lines = [f"path{sep}label", *(f"{at}.mp4{sep}{label}" for at, label in enumerate(labels))]
    expected = {f"{at}.mp4": label for at, label in enumerate(labels)}
    source = write(tmp_path / "v" / f"list.{kind}", "\n".join(lines))
    assert classes(read(source, min_per_class=1, holdout=0.0)) == expected
    assert classes(read(str(tmp_path / "v"), labels=source, min_per_class=1, holdout=0.0)) == expected


@pytest.mark.parametrize("kind", ["csv", "txt"])
def test_whole_numbers_are_in_numeric_order(tmp_path: Path, kind: str) -> None:
    """Labels 2, 10 and -1 are classes in the order of numbers; with a label that is a text all are texts."""
    labels = ("10", "2", "-1", "10", "2", "-1")
    fill(tmp_path, *(f"{at}.mp4" for at in range(8)))
    sep, head = (",", ["path,label"]) if kind == "csv" else (" ", [])
    lines = [f"{at}.mp4{sep}{label}" for at, label in enumerate(labels)]
    assert read(write(tmp_path / f"a.{kind}", "\n".join(head + lines)), holdout=0.0).class_names == ("-1", "2", "10")
    lines += [f"6.mp4{sep}x", f"7.mp4{sep}x"]
    found = read(write(tmp_path / f"b.{kind}", "\n".join(head + lines)), holdout=0.0)
    assert found.class_names == ("-1", "10", "2", "x")
    assert classes(found) == {f"{at}.mp4": label for at, label in enumerate((*labels, "x", "x"))}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("path\n0.mp4", ["no column 'label'", "only paths", "--label-column", "SRC/CLASS/a.mp4"]),
        ("path,kind\n0.mp4,a", ["no column 'label'", "it has kind"]),
        ("path,label\n0.mp4,a\n1.mp4,", ["1 row without a label", "'1.mp4'"]),
        ("path,label\n0.mp4,1\n1.mp4,", ["1 row without a label", "'1.mp4'"]),
        ("path,label\n0.mp4,a\n1.mp4, ", ["1 row without a label", "'1.mp4'"]),
        ("path,label,split\n0.mp4,a,train\n1.mp4,b,dev", ["split of '1.mp4' is 'dev'", "train or test"]),
        ("path,label,split\n0.mp4,a,train\n1.mp4,b,", ["without a split", "'1.mp4'"]),
        ("path,label,split\n0.mp4,a,test\n1.mp4,b,val", ["no video for training"]),
        ("path,label\n0.mp4,a\n1.mp4,a", ["only one class, 'a'"]),
        ("path,label\n0.mp4,a\n9.mp4,a\n8.mp4,b", ["2 videos that do not exist: '9.mp4', '8.mp4'. Paths", "the list."]),
        ("path,label\n0.mp4,a\n1.mp4,b\n0.mp4,b", ["more than once", "0.mp4"]),
        ("path,label\n0.mp4,a\n./0.mp4,b\n1.mp4,b", ["more than once", "0.mp4"]),
        ("path,label\n", ["no videos"]),
        ("", ["cannot be read as a list"]),
        (b"path,label\n0.mp4,\xe4\n", ["line 2 is not UTF-8"]),
    ],
)
def test_a_wrong_list(tmp_path: Path, text: str | bytes, parts: list[str]) -> None:
    """Each mistake in a list is one message that names the row or the column."""
    fill(tmp_path, "0.mp4", "1.mp4")
    refused(write(tmp_path / "list.csv", text), *parts)


def test_categories_of_numbers(tmp_path: Path) -> None:
    """Dictionary-encoded whole numbers, as pandas writes categories, are labels; those with fractions are refused."""
    fill(tmp_path, *(f"{at}.mp4" for at in range(4)))
    for labels, right in (((10, 2, 2, 10), True), ((0.5, 1.0, 1.0, 0.5), False)):
        table = pa.table({"path": [f"{at}.mp4" for at in range(4)], "label": pa.array(labels).dictionary_encode()})
        pq.write_table(table, tmp_path / "list.parquet")
        if right:
            assert read(str(tmp_path / "list.parquet"), min_per_class=1).class_names == ("2", "10")
        else:
            refused(str(tmp_path / "list.parquet"), "values of type double, not texts or whole numbers")


def test_another_split_column_must_exist(src: str) -> None:
    """A column of splits that the user names is not silently missing."""
    source = write(Path(src) / "list.csv", "path,label\narchery/0.mp4,a")
    refused(source, "no column 'part' with a split", "--split-column", split_column="part")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("archery/0.mp4\nmy video.mp4\n", ["no labels, only paths", "SRC/CLASS/a.mp4", "--labels"]),
        ("archery/0.mp4 a\n\n# x\nmy video.mp4\n", ["line 4 has no label: 'my video.mp4'"]),
        ("# nothing\n", ["no lines with a path and a label"]),
        (b"archery/0.mp4 a\narchery/1.mp4 \xe4\n", ["line 2 is not UTF-8"]),
        ("archery/0.mp4 a\narchery/0.mp4 b\n", ["archery/0.mp4", "more than once"]),
    ],
)
@pytest.mark.parametrize("as_labels", [False, True])
def test_a_wrong_text_list(src: str, text: str | bytes, parts: list[str], as_labels: bool) -> None:
    """Mistakes of a text list are the same messages, whether it is SRC or has the labels of SRC."""
    place = write(Path(src) / "list.txt", text)
    refused(src, *parts, labels=place) if as_labels else refused(place, *parts)


# --- a file of labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["path", "filename", "uri", "url", "video_id", "binary", "absolute"])
def test_labels_name_videos_by_path_uri_or_id(src: str, tmp_path: Path, key: str) -> None:
    """A file of labels joins the listing by path, uri or id, in the order of the listing; others are left out."""
    fill(Path(src), "archery/ \u00fc.mp4", "archery/\udcff.mp4", "other/x.mp4")
    listed = find(src, DEFAULTS).videos.to_pylist()
    rows = [row for row in reversed(listed) if row["path"] != "other/x.mp4"]
    values: list[Any] = {
        "uri": [row["uri"] for row in rows],
        "url": [row["uri"] for row in rows],
        "video_id": [row["video_id"] for row in rows],
        "binary": [os.fsencode(row["path"]).replace(b"\\xff", b"\xff") for row in rows],
        "absolute": [f"{src}/./{row['path']}" if "xff" not in row["path"] else row["path"] for row in rows],
    }.get(key, [f"./{row['path']}" for row in rows])
    column = {"binary": "path", "absolute": "path"}.get(key, key)
    labels = [row["path"].partition("/")[0] for row in rows]
    pq.write_table(pa.table({column: values, "label": labels}), tmp_path / "labels.parquet")
    found = read(src, labels=str(tmp_path / "labels.parquet"))
    assert found.videos["path"].to_pylist() == [row["path"] for row in listed if row["path"] != "other/x.mp4"]
    assert all(path.startswith(f"{name}/") for path, name in classes(found).items())
    assert found.notes[0] == f"1 video of {src} without a label left out"


def test_labels_of_a_list_that_is_src(src: str, tmp_path: Path) -> None:
    """The videos of a list that is SRC may get their labels from a file; its own columns are not used then."""
    source = write(Path(src) / "list.csv", "path,label\n" + "".join(f"{path},same\n" for path in VIDEOS))
    labels = write(tmp_path / "labels.tsv", "path\tlabel\n" + "".join(f"{p}\t{n}\n" for p, n in BY_FOLDER.items()))
    assert classes(read(source, labels=labels)) == BY_FOLDER
    plain = write(Path(src) / "plain.txt", "\n".join(VIDEOS))
    assert classes(read(plain, labels=f"file://{quote(labels)}")) == BY_FOLDER


def test_missing_videos(src: str, tmp_path: Path) -> None:
    """Listed videos that do not exist are counted, and left out only on request."""
    rows = [*BY_FOLDER.items(), *((f"gone/{at}.mp4", "gone") for at in range(4))]
    labels = write(tmp_path / "labels.csv", "path,label\n" + "".join(f"{path},{name}\n" for path, name in rows))
    first = "'gone/0.mp4', 'gone/1.mp4', 'gone/2.mp4', ..."
    refused(src, f"4 videos that do not exist: {first}", f"relative to {src}", "--skip-missing", labels=labels)
    refused(src, "or that --include or --exclude leaves out", labels=labels, include=["archery"])
    found = read(src, labels=labels, skip_missing=True)
    assert classes(found) == BY_FOLDER and found.class_names == ("archery", "bowling")
    assert "4 listed videos do not exist and are left out" in found.notes
    source = write(Path(src) / "list.csv", Path(labels).read_bytes())
    assert classes(read(source, skip_missing=True)) == BY_FOLDER
    Path(labels).write_text("path,label\nx.mp4,a\n")
    refused(src, "no label of a video that exists", labels=labels, skip_missing=True)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("label,id\na,1\n", ["no column that names videos", "label, id", ".txt"]),
        ("path,label,label\nx,a,b\n", ["more than one column named 'label'"]),
        ("path,label\n", ["has no rows"]),
        ("path,label\n,a\n", ["1 row without a path"]),
        ("path,label\narchery/0.mp4,a\n./archery/0.mp4,b\n", ["more than once", "'archery/0.mp4'; keep"]),
        ("path,label,split\nbowling/0.mp4,a,train\nbowling/0.mp4,a,train\n", ["'bowling/0.mp4'; keep"]),
        (
            "path,label,split\narchery/0.mp4,a,train\narchery/0.mp4,a,test\n",
            ["'archery/0.mp4', both for training and for tests"],
        ),
    ],
)
def test_a_wrong_file_of_labels(src: str, tmp_path: Path, text: str, parts: list[str]) -> None:
    """Each mistake in a file of labels is one message."""
    refused(src, *parts, labels=write(tmp_path / "labels.csv", text))


def test_a_file_twice_under_two_ids(src: str) -> None:
    """Ids of one's own do not let a video be used for training and tests."""
    text = "path,label,split,id\narchery/0.mp4,a,train,1\narchery/0.mp4,a,test,2\nbowling/0.mp4,b,train,3\n"
    refused(write(Path(src) / "list.csv", text), "both for training and for tests", id_column="id")


def test_wrong_places_of_labels(src: str, tmp_path: Path) -> None:
    """A place without labels is one message, and a credential in it is not repeated."""
    for name in ("no.csv", "no"):
        refused(src, f"--labels {tmp_path}/{name} does not exist", labels=str(tmp_path / name))
    refused(src, "neither a list (.txt, .csv,", "classInd.txt", labels=write(tmp_path / "labels.xlsx", "x"))
    refused(src, "--labels ''", labels="")
    refused(src, "name a local file", labels="http://host/labels.csv")
    refused(src, "looks like an S3 URL", labels="s3:/bucket/labels.csv")
    with pytest.raises(InputError, match="credential") as raised:
        read(src, labels="s3://user:secret@bucket/labels.csv")
    assert "secret" not in str(raised.value)


def test_a_folder_of_two_lists(src: str, tmp_path: Path) -> None:
    """train.txt and one other list state the split; three lists, or one, are refused."""
    lists = tmp_path / "lists.csv"
    write(lists / "train.txt", "".join(f"{path} {name}\n" for path, name in BY_FOLDER.items() if "0" not in path))
    refused(src, "such as train.txt and test.txt; it has train.txt", labels=str(lists))
    write(lists / "val.txt", "archery/0.mp4 archery\nbowling/0.mp4 bowling\n")
    expected = {path: (name, "test" if "0" in path else "train") for path, name in BY_FOLDER.items()}
    assert stated(read(src, labels=f"{lists}/")) == expected
    write(lists / "test.txt", "archery/1.mp4 archery\n")
    refused(src, "it has train.txt, test.txt, val.txt", labels=str(lists))
    (lists / "val.txt").unlink()
    refused(src, "'archery/1.mp4', both for training and for tests", labels=str(lists))


# --- UCF101 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folders", [True, False])
def test_lists_of_ucf101(ucf: Path, tmp_path: Path, folders: bool) -> None:
    """UCF101's lists give split and class numbers, also where the folders of the classes are missing."""
    names = UCF_VIDEOS if folders else tuple(path.rpartition("/")[2] for path in UCF_VIDEOS)
    found = read(fill(tmp_path / "src", *names), labels=str(ucf))
    assert found.class_names == ("Bowling", "Archery", "Fencing") and found.notes == ()
    assert stated(found) == {
        name: (path.partition("/")[0], "test" if "g03" in path else "train")
        for name, path in zip(names, UCF_VIDEOS, strict=True)
    }


def test_another_fold_of_ucf101(ucf: Path, tmp_path: Path) -> None:
    """--fold chooses the lists, and classes without a video are left out with a note."""
    src = fill(tmp_path / "src", *UCF_VIDEOS)
    found = read(src, labels=str(ucf), fold=12, min_per_class=1)
    assert found.class_names == ("Bowling", "Archery") and found.videos.num_rows == 3
    assert found.notes == (
        f"5 videos of {src} without a label left out",
        "1 of 3 classes left out, as they have no videos",
    )
    refused(src, "trainlist03.txt does not exist", "--fold", labels=str(ucf), fold=3)


def test_names_that_are_not_distinct_need_their_folders(ucf: Path, tmp_path: Path) -> None:
    """Videos directly in SRC are not matched by name if two classes have a video of one name."""
    write(ucf / "trainlist01.txt", "Archery/1.avi 2\nBowling/1.avi 1\n")
    write(ucf / "testlist01.txt", "Archery/2.avi\n")
    refused(fill(tmp_path / "src", "1.avi", "2.avi"), "3 videos that do not exist", labels=str(ucf))


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        (
            "trainlist01.txt",
            "Archery/v_Archery_g01.avi 1\nBowling/v_Bowling_g01.avi 0\n",
            ["trainlist01.txt counts classes from 0, classInd.txt from 1"],
        ),
        (
            "trainlist01.txt",
            "Archery/v_Archery_g01.avi 2\nBowling/v_Bowling_g01.avi 3\n",
            ["line 2: 'Bowling' has the number 3, but 1 in classInd.txt"],
        ),
        ("testlist01.txt", "\nGolf/v_Golf_g01.avi\n", ["testlist01.txt, line 2: 'Golf/v_Golf_g01.avi'", "no folder"]),
        ("trainlist01.txt", "v_Golf_g01.avi 1\n", ["line 1: 'v_Golf_g01.avi'", "no folder"]),
        ("trainlist01.txt", "Archery/v_Archery_g03.avi 2\n", ["g03.avi', both for training and for tests"]),
        ("classInd.txt", "Archery\n", ["classInd.txt, line 1: 'Archery'", "1 ApplyEyeMakeup"]),
        ("classInd.txt", "1 Archery\n1 Bowling\n", ["line 2: '1 Bowling' repeats"]),
        ("classInd.txt", "1 Archery\n2 Archery\n", ["line 2: '2 Archery' repeats"]),
        ("classInd.txt", b"1 Arch\xe9ry\n", ["line 1 is not UTF-8"]),
        ("trainlist01.txt", "Fencing/v_Fencing_g01.avi 3\n", ["only test videos of 2 classes: 'Bowling', 'Archery'"]),
    ],
)
def test_wrong_lists_of_ucf101(ucf: Path, tmp_path: Path, name: str, text: str | bytes, parts: list[str]) -> None:
    """Each mistake in UCF101's lists is one message that names the file and, if one line is wrong, the line."""
    write(ucf / name, text)
    refused(fill(tmp_path / "src", *UCF_VIDEOS), *parts, labels=str(ucf))


def test_empty_lists_of_ucf101(ucf: Path, src: str) -> None:
    """Lists without lines are refused."""
    write(ucf / "trainlist01.txt", "")
    write(ucf / "testlist01.txt", "\n")
    refused(src, "have no lines", labels=str(ucf))


# --- the split -------------------------------------------------------------------------------------------------------


def test_held_out_videos_are_a_function_of_seed_and_id(src: str) -> None:
    """Of each class, ceil(share * n) videos are held out: those whose hash of seed and id comes first."""
    for seed, share, n_test in ((0, 0.2, 1), (7, 0.2, 1), (7, 0.21, 2), (7, 0.9, 4)):
        found = read(src, seed=seed, holdout=share, min_per_class=1)
        rows = found.videos.to_pylist()
        for label in (0, 1):
            of_class = [row for row in rows if row["label"] == label]
            of_class.sort(key=lambda row: sha256(f"{seed}\n{row['video_id']}".encode()).digest())
            assert [row["split"] for row in of_class] == ["test"] * n_test + ["train"] * (5 - n_test)
        assert found.notes == (f"no split was given: {100 * share:g} % of each class held out for testing",)
    other = read(src, seed=1)
    assert not other.videos["split"].equals(read(src).videos["split"])


def test_a_share_is_exact(tmp_path: Path) -> None:
    """0.07 of 100 videos are 7, although the product of the floating-point numbers is more."""
    src = fill(tmp_path, *(f"{name}/{at}.mp4" for name in "ab" for at in range(100)))
    assert read(src, holdout=0.07).videos["split"].to_pylist().count("test") == 14


def test_nothing_to_test_on(src: str, tmp_path: Path) -> None:
    """Without a video for tests nothing else is held out, and a note says so."""
    found = read(src, holdout=0.0)
    assert found.notes == ("there is nothing to test on: --holdout is 0",)
    assert set(found.videos["split"].to_pylist()) == {"train"}
    lines = "".join(f"{path},{name},train\n" for path, name in BY_FOLDER.items())
    found = read(write(Path(src) / "list.csv", "path,label,split\n" + lines))
    assert found.notes == ("there is nothing to test on: no video is in the test split",)
    found = read(fill(tmp_path / "two", "a/1.mp4", "b/1.mp4"), min_per_class=1)
    assert found.notes == ("there is nothing to test on: each class has one video",)


def test_small_classes(tmp_path: Path) -> None:
    """A class with too few training videos is named with its number, at most three of them."""
    src = fill(tmp_path, *VIDEOS, *(f"{name}/{at}.mp4" for name in "vwxyz" for at in range(2)))
    parts = ("fewer than 2 training videos of 5 classes after 20 %", "'v' has 1, 'w' has 1, 'x' has 1, ...")
    refused(src, *parts, "--min-per-class 1")
    refused(src, "of 5 classes: 'v' has 2", holdout=0.0, min_per_class=3)
    assert len(read(src, min_per_class=1).class_names) == 7


@pytest.mark.parametrize(
    "options", [{"fold": 0}, {"fold": 100}, {"holdout": 1.0}, {"holdout": -0.1}, {"holdout": "x"}, {"min_per_class": 0}]
)
def test_wrong_options(options: dict[str, Any]) -> None:
    """A value that an option does not allow is refused when the options are made."""
    with pytest.raises(InputError, match=next(iter(options))):
        LabelOptions(**options)


# --- S3 --------------------------------------------------------------------------------------------------------------


def test_labels_on_s3(bucket: str, ucf: Path, tmp_path: Path) -> None:
    """A prefix with folders, a list, a file of labels and UCF101's lists are read from S3 as from a disk."""
    import boto3

    client = boto3.client("s3")
    for name in UCF_VIDEOS:
        client.put_object(Bucket=bucket, Key=f"my src/{name}", Body=name.encode())
    rows = [(path, path.partition("/")[0]) for path in UCF_VIDEOS]
    table = "path,label\n" + "".join(f"{path},{name}\n" for path, name in rows)
    client.put_object(Bucket=bucket, Key="my src/list.csv", Body=table.encode())
    for path in ucf.iterdir():
        client.put_object(Bucket=bucket, Key=f"lists/{path.name}", Body=path.read_bytes())
    s3, place = StoreOptions(), f"s3://{bucket}/my%20src"

    def on_s3(source: str, **options: Any) -> Labelled:
        return labelled(source, LabelOptions(**options), s3)

    local = fill(tmp_path / "src", *UCF_VIDEOS)
    for source, options in (
        (place, {"min_per_class": 1}),
        (f"{place}/list.csv", {"min_per_class": 1}),
        (place, {"labels": f"{place}/list.csv", "min_per_class": 1}),
        (place, {"labels": f"s3://{bucket}/lists/"}),
        (place, {"labels": str(ucf)}),
    ):
        here = str(ucf) if "lists" in str(options.get("labels")) else None
        expected = read(local, labels=here, min_per_class=1)
        found = on_s3(source, **options)
        assert stated(found) == stated(expected) and found.class_names == expected.class_names
        assert found.videos["video_id"].equals(expected.videos["video_id"])
    uris = find(place, s3).videos["uri"].to_pylist()
    written = write(
        tmp_path / "uris.txt", "".join(f"{uri.replace('%20', ' ')}\t{uri.split('/')[-2]}\n" for uri in uris)
    )
    assert stated(on_s3(place, labels=written, min_per_class=1)) == stated(read(local, min_per_class=1))
    client.put_object(Bucket=bucket, Key="odd//1.avi", Body=b"1")
    with pytest.raises(InputError, match=r"outside of any folder of a class: '/1.avi'"):
        on_s3(f"s3://{bucket}/odd")
    for name in ("no.csv", "no"):
        with pytest.raises(InputError, match=r"no(\.csv)? (does not exist|is neither)"):
            on_s3(place, labels=f"s3://{bucket}/{name}")
