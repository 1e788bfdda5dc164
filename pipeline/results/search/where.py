"""Conditions on columns, such as `codec=h264`, `duration_s>=60`, `label!=cat`. All of them must hold.

A condition is one column, one of = != < <= > >=, and a value, which is read as the column's type. A row with null in
the column does not satisfy it. There is no `and`, `or` or function, so a condition is always fast and safe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from p3d.pipeline.errors import InputError, as_stored

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "=": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


@dataclass(frozen=True, slots=True)
class Condition:
    """`compare` of `column` with `value`, which has the column's type."""

    column: str
    compare: Callable[[Any, Any], Any]
    value: pa.Scalar

    def holds(self, table: pa.Table) -> pa.ChunkedArray:
        """Which rows satisfy it, as booleans without nulls."""
        return pc.fill_null(self.compare(table[self.column], self.value), False)


def parse(texts: Iterable[str | Condition], schema: pa.Schema) -> tuple[Condition, ...]:
    """Parse conditions on the columns of a table. InputError explains what is wrong, and lists what is allowed."""
    known = [field.name for field in schema if not pa.types.is_nested(field.type)]
    return tuple(one if isinstance(one, Condition) else _parse(one, schema, known) for one in texts)


def holding(conditions: Iterable[Condition], table: pa.Table) -> pa.Table:
    """The rows that satisfy all of them."""
    for condition in conditions:
        table = table.filter(condition.holds(table))
    return table


def _parse(text: str, schema: pa.Schema, known: list[str]) -> Condition:
    match = re.fullmatch(r"\s*([^=!<>]+?)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", text, re.S)
    if match is None:
        raise InputError(f"condition {text!r} is not like codec=h264 or duration_s>=60, with = != < <= > or >=")
    column, operator, value = match.groups()
    if column not in known:
        raise InputError(f"condition {text!r}: there is no column {column!r}; there are {', '.join(known)}")
    kind = schema.field(column).type
    try:
        return Condition(column, _OPERATORS[operator], pc.cast(pa.scalar(as_stored(value)), kind))
    except pa.ArrowException:
        what = "numbers" if pa.types.is_integer(kind) or pa.types.is_floating(kind) else f"values of type {kind}"
        advice = f"compare it with one instead of {value!r}"
        raise InputError(f"condition {text!r}: column {column} holds {what}; {advice}") from None
