"""Schema versions of an output: which fields its records and which columns its tables have.

An output has one version, which job.json states. It is written, verified, resumed and read in that version, whatever
version this program writes into new outputs. So a field or column is never removed or changed: a new one is added, with
the version that it came with and the value that says what older versions did. docs/compatibility.md has the rules.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from p3d.pipeline.errors import OtherVersion

SCHEMA_VERSION = 1  # of new outputs, and the newest that can be read
_NAMES: dict[tuple[type, int], frozenset[str]] = {}


def added(since: int, before: Any, **metadata: Any) -> Any:
    """Declare a field of a record that came with version `since`. In older records it has the value `before`."""
    return dataclasses.field(default=before, metadata={"since": since, **metadata})


def since(field: dataclasses.Field[Any]) -> int:
    """The version that a field of a record came with."""
    return int(field.metadata.get("since", 1))


def names_in(record: type, version: int) -> frozenset[str]:
    """The names of the fields that a record (a dataclass) has in a version."""
    if (record, version) not in _NAMES:
        names = (field.name for field in dataclasses.fields(record) if since(field) <= version)
        _NAMES[record, version] = frozenset(names)
    return _NAMES[record, version]


def in_version(record: Any, version: int) -> dict[str, Any]:
    """The fields of a record and of the records in it as a dict, in the form of a version."""
    values: dict[str, Any] = dataclasses.asdict(record)
    return values if version == SCHEMA_VERSION else _form(record, values, version)


def _form(record: Any, values: dict[str, Any], version: int) -> dict[str, Any]:
    names = names_in(type(record), version)
    found = {name: value for name, value in values.items() if name in names}
    for name in found:
        held = getattr(record, name)
        if dataclasses.is_dataclass(held):
            found[name] = _form(held, found[name], version)
    return found


def exactly(record: type, given: dict[str, Any], version: int) -> dict[str, Any]:
    """The values of a record that was written in a version. One of MALFORMED if it has fields too many or too few."""
    names = names_in(record, version)
    if given.keys() != names:
        unknown, missing = ", ".join(sorted(given.keys() - names)), ", ".join(sorted(names - given.keys()))
        odd = " and ".join([f"unknown keys: {unknown}"] * bool(unknown) + [f"missing keys: {missing}"] * bool(missing))
        raise ValueError(f"{odd} (schema version {version})")
    return given


def refuse_newer(version: Any, place: str) -> int:
    """The version that `place` states. OtherVersion if this program does not know it, ValueError if it is not one."""
    if type(version) is not int or version < 1:
        raise ValueError(f"schema_version {str(version)[:24]!r} is not a version")
    if version > SCHEMA_VERSION:
        raise OtherVersion(
            f"{place} is of schema version {version}; what is installed reads versions up to {SCHEMA_VERSION}: use a "
            "newer p3d. Nothing was changed"
        )
    return version
