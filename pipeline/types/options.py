"""Options are declared once, as fields of the record that holds them.

    @dataclass
    class RunOptions:
        batch_size: int = option(4, "Embed N clips at a time.", low=1, metavar="N")

The command line, the checks of the record and the keyword arguments of the Python API follow from the field: its name,
its type, its default and its `Option`. Whether an option decides numbers is said by the record that it is in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from p3d.pipeline.errors import InputError
from p3d.pipeline.types import types_of

ABSENT: Any = dataclasses.MISSING
DEVICES = ("auto", "cpu", "cuda", "mps")  # values of --device


@dataclass(frozen=True, slots=True)
class Option:
    """What an option is, besides its field.

    A value is one of `choices`, if there are any, and at least `low` (more than it, if `above`) and at most `high`.
    `default_text` is the default in words, if the field's own value does not say it. `flag` is the name on the command
    line, if the field has another one; `off` that of the opposite, for an option that is on by default.
    """

    help: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    above: bool = False
    metavar: str | None = None
    default_text: str = ""
    flag: str = ""
    off: str = ""


def option(default: Any, text: str, *, since: int = 1, **more: Any) -> Any:
    """Declare a field that is an option. ABSENT as `default` makes it required; `more` are fields of `Option`.

    `since` is the schema version that it came with. An older output did what `default` says.
    """
    return dataclasses.field(default=default, metadata={"option": Option(text, **more), "since": since})


def options_in(record: type) -> Iterator[tuple[dataclasses.Field[Any], Option]]:
    """The options of a record, in the order of its fields."""
    for field in dataclasses.fields(record):
        if "option" in field.metadata:
            yield field, field.metadata["option"]


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The name of an option on the command line, such as `--batch-size`."""
    given: Option = field.metadata["option"]
    return f"--{given.flag or field.name.replace('_', '-')}"


def check_options(record: Any) -> None:
    """InputError unless each option of a record has an allowed value, of its field's type."""
    check_values(type(record), {field.name: getattr(record, field.name) for field, _ in options_in(type(record))})


def check_values(record: Any, values: dict[str, Any]) -> None:
    """`check_options` of values for a record, by the name of the option; names that are not options are left out."""
    kinds = types_of(record)
    for field, given in options_in(record):
        if field.name not in values:
            continue
        value, what = values[field.name], field.name
        if type(value) not in kinds[field.name]:
            allowed = " or ".join(sorted(one.__name__ for one in kinds[field.name] if one is not type(None)))
            raise InputError(f"{what} must be {allowed}, not {value!r}")
        if value is None:
            continue
        if given.choices and value not in given.choices:
            raise InputError(f"{what} must be one of {', '.join(given.choices)}, not {value!r}")
        if given.low is not None and not (value > given.low or (value == given.low and not given.above)):
            raise InputError(f"{what} must be {'more than' if given.above else 'at least'} {given.low:g}, not {value}")
        if given.high is not None and value > given.high:
            raise InputError(f"{what} must be at most {given.high:g}, not {value}")


# options that a run of a job and one of a training have, each with a default and a help of its own


def threads_option(default: Any, help_: str, default_text: str, *, low: int = 0) -> Any:
    """The field of `--threads`."""
    return option(default, help_, low=low, high=1024, metavar="N", default_text=default_text)


def video_timeout_option(default: float, help_: str) -> Any:
    """The field of `--video-timeout`."""
    return option(default, help_, low=0, above=True, metavar="SECONDS", flag="video-timeout")


def decode_memory_option(default: int, help_: str) -> Any:
    """The field of `--max-decode-memory`."""
    return option(default, help_, low=1, metavar="BYTES", default_text=f"{default >> 30} GiB")


def max_failures_option(default: Any, help_: str, default_text: str) -> Any:
    """The field of `--max-failures`."""
    return option(default, help_, metavar="N|P%", default_text=default_text)
