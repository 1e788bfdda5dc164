"""What the command line prints: exit codes, one message per error, tables, JSON, escaped names."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import click

from p3d.pipeline import errors
from p3d.pipeline.errors import JobError, escape

EXIT_CODES: dict[int, str] = {
    0: "all done, no failures",
    1: "internal error (also: a video failed with reason `internal`)",
    2: "usage error or invalid input, such as no videos or weights that do not fit",
    3: "finished, some videos failed (see `p3d failures`)",
    4: "no such job",
    5: "refused: OUT has another recipe, OUT is not trusted (`p3d trust`), DEST of a snapshot is not empty, or another "
    "scheduler is live or took over",
    6: "stopped, resumable: cancelled, store outage, credentials, disk full, `--max-failures` or retries exhausted",
    7: "`verify` or a snapshot found damage",
    130: "interrupted by Ctrl-C; resumable (143 for SIGTERM)",
}
_CODE_OF: list[tuple[type[JobError], int]] = [
    (errors.InputError, 2),
    (errors.NoSuchJob, 4),
    (errors.OtherRecipe, 5),
    (errors.Untrusted, 5),
    (errors.AlreadyRunning, 5),
    (errors.Unfinished, 6),
    (errors.DamagedJob, 7),
    (errors.StoreUnsafe, 2),
    (errors.ClusterError, 6),
    (errors.StoreError, 6),
]
JSON_SCHEMA = 1

T = TypeVar("T")


def exit_code(error: JobError) -> int:
    """The exit code of an error about the job."""
    return next((code for kind, code in _CODE_OF if isinstance(error, kind)), 1)


def run_cli(command: click.Command) -> int:
    """Run the command line; every expected error becomes one message on stderr and an exit code."""
    _say_strays()
    _accept_every_text()
    try:
        Path.cwd()  # Python and Ray need it, also for absolute paths
    except OSError as error:
        say(f"error: the working directory is no longer there ({error.strerror}); `cd` to another one and try again")
        return 2
    try:
        result = command.main(standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return int(stop.exit_code)
    except click.ClickException as error:
        shown, message = io.StringIO(), error.format_message()
        error.show(shown)
        for line in shown.getvalue().replace(message, escape(message)).splitlines():
            say(line)
        return 2
    except click.Abort:
        say("interrupted")
        return 130
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except JobError as error:
        say(f"error: {error}")
        return exit_code(error)
    except BrokenPipeError:
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or f"TMPDIR ({tempfile.gettempdir()}) or another folder"
        say(f"error: {where}: the disk is full; free some space, or set TMPDIR to another folder, and try again")
        return 6


def say_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an internal error as Python does, but escaped: its message may hold text from outside."""
    for line in "".join(traceback.format_exception(kind, error, trace)).splitlines():
        say(line)


def _say_strays() -> None:
    """Print the warnings about stray files as messages, each once; other warnings as Python does."""
    show_warning, said = warnings.showwarning, set[str]()

    def show_or_say(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if not issubclass(category, errors.StrayFile):
            show_warning(message, category, *where)
        elif str(message) not in said:
            said.add(str(message))
            say(f"warning: {message}")

    warnings.showwarning = show_or_say  # type: ignore[assignment] # the same arguments, by position


def _accept_every_text() -> None:
    """Let stdout and stderr show what their encoding lacks as \\xNN or \\uNNNN; a closed one accepts everything."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115, PTH123 - for the whole process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print one message on stderr, escaped. If nobody can read it, such as after a hang-up, the command goes on."""
    with contextlib.suppress(OSError, ValueError):
        click.echo(escape(text), err=True)


def show(*lines: str) -> None:
    """Print lines of data on stdout."""
    for line in lines:
        click.echo(escape(line))


def show_json(record: dict[str, Any]) -> None:
    """Print a JSON object on stdout, with its schema version."""
    click.echo(json_text({"schema_version": JSON_SCHEMA, **record}))


def json_text(record: dict[str, Any]) -> str:
    """A JSON object as ASCII text without control characters."""
    return json.dumps(record, default=str).replace("\x7f", "\\u007f")


def escape_all(value: T) -> T:
    """A record with every text in it escaped, also those in lists, tuples, dicts and dataclasses."""
    made: Any = value
    if isinstance(value, str):
        made = escape(value)
    elif isinstance(value, dict):
        made = {escape_all(name): escape_all(one) for name, one in value.items()}
    elif isinstance(value, list | tuple):
        made = type(value)(map(escape_all, value))
    elif is_dataclass(value) and not isinstance(value, type):
        made = replace(value, **{one.name: escape_all(getattr(value, one.name)) for one in fields(value)})
    return cast("T", made)


def table(rows: Sequence[tuple[str, ...]], *, right: tuple[int, ...] = ()) -> list[str]:
    """Lines with aligned columns; the columns in `right` are aligned to the right."""
    if not rows:
        return []
    rows = escape_all(list(rows))
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]

    def cell(text: str, at: int) -> str:
        return text.rjust(widths[at]) if at in right else text.ljust(widths[at])

    return ["  ".join(cell(text, at) for at, text in enumerate(row)).rstrip() for row in rows]


def count(number: int, noun: str) -> str:
    """`1 video`, `2 videos`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def human_bytes(count: float) -> str:
    """`1.5 GB`; powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def human_time(seconds: float | None) -> str:
    """`3 h 05 min`, `12 s`; a dash for what is not known."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def need(module: str, extra: str) -> None:
    """InputError with the install command unless an optional package is installed."""
    if importlib.util.find_spec(module) is None:
        raise errors.InputError(f"this needs {module}, which is not installed: pip install 'p3d-embeddings[{extra}]'")
