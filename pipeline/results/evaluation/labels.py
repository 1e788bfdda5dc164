"""Labels of videos, from a CSV file. Each row has a video and its label or labels.

path,label
sports/a.mp4,archery
sports/b.mp4,archery;187         several labels: by name, or by class number from 0
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from p3d.pipeline.errors import InputError
from p3d.pipeline.sources.lists import read_csv

KEYS = ("video_id", "uri", "path")  # columns of the dataset that may name the video; the first one present is used


@dataclass(frozen=True, slots=True)
class Labels:
    """`of` maps a value of column `key` to class numbers. Rows with an empty label are left out."""

    key: str
    of: dict[str, frozenset[int]]


def read_labels(source: str, content: bytes, names: tuple[str, ...], n_classes: int) -> Labels:
    """Parse a list of labels. A label is first looked up as a class name, then read as a class number.

    InputError names a value that is not valid. A video that is named twice is an error too: two contradictory rows
    must not count as two labels.
    """
    table = read_table(source, content)
    key = next((name for name in KEYS if name in table.column_names), None)
    if key is None or "label" not in table.column_names:
        raise InputError(
            f"{source} needs a column label, and one of {', '.join(KEYS)}; it has {', '.join(table.column_names)}"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"the weights name several classes {twice[0]!r}, so names are ambiguous; label by number")
    numbers = {name: number for number, name in enumerate(names)}
    found: dict[str, frozenset[int]] = {}
    for video, label in zip(table[key].to_pylist(), table["label"].to_pylist(), strict=True):
        if video in found:
            raise InputError(
                f"{source} names {video!r} more than once; put all its labels into one row, with ; between"
            )
        parts = [label] if label in numbers else label.split(";")
        found[video] = frozenset(_number(source, part.strip(), numbers, n_classes) for part in parts if part.strip())
    return Labels(key, {video: classes for video, classes in found.items() if classes})


def read_table(source: str, content: bytes) -> pa.Table:
    """The table with every column as text: 007 stays 007, and a class may be called null."""

    def types(names: list[str]) -> dict[str, pa.DataType]:
        if len(set(names)) != len(names):
            raise InputError(f"{source} has two columns of the same name among {', '.join(names)}; rename one")
        return dict.fromkeys(names, pa.string())

    try:
        return read_csv(source, content, lambda names: "label" in names, types, strings_can_be_null=False)
    except pa.ArrowException as error:
        raise InputError(f"{source} cannot be read as CSV: {error}") from None


def _number(source: str, label: str, numbers: dict[str, int], n_classes: int) -> int:
    if label in numbers:
        return numbers[label]
    if label.isascii() and label.isdigit() and int(label) < n_classes:
        return int(label)
    known = f"a name, such as {next(iter(numbers))!r}, or " if numbers else ""
    missing = "" if numbers else "; the weights name no classes"
    raise InputError(f"{source}: {label!r} is not a class: {known}a number from 0 to {n_classes - 1}{missing}")
