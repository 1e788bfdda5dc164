"""What the command line prints: exit codes, one message per error, tables, JSON, escaped names."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import click

from p3d.pipeline import errors
from p3d.pipeline.errors import JobError

EXIT_CODES: dict[int, str] = {
    0: "all done, no failures",
    1: "internal error (also: a video failed with reason `internal`)",
    2: "usage error or invalid input, such as no videos or weights that do not fit",
    3: "finished, some videos failed (see `p3d failures`)",
    4: "no such job",
    5: "refused: OUT has another recipe, DEST of a snapshot is not empty, or another scheduler is live or took over",
    6: "stopped, resumable: cancelled, store outage, credentials, disk full, `--max-failures` or retries exhausted",
    7: "`verify` or a snapshot found damage",
    130: "interrupted by Ctrl-C; resumable (143 for SIGTERM)",
}
_CODE_OF: list[tuple[type[JobError], int]] = [
    (errors.InputError, 2),
    (errors.NoSuchJob, 4),
    (errors.OtherRecipe, 5),
    (errors.AlreadyRunning, 5),
    (errors.Unfinished, 6),
    (errors.DamagedJob, 7),
    (errors.StoreUnsafe, 2),
    (errors.ClusterError, 6),
    (errors.StoreError, 6),
]
JSON_SCHEMA = 1


def exit_code(error: JobError) -> int:
    """The exit code of an error about the job."""
    return next((code for kind, code in _CODE_OF if isinstance(error, kind)), 1)


def run_cli(command: click.Command) -> int:
    """Run the command line; every expected error becomes one message on stderr and an exit code."""
    try:
        result = command.main(standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return int(stop.exit_code)
    except click.ClickException as error:
        error.show(sys.stderr)
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


def say(text: str) -> None:
    """Print one message on stderr; control characters of file names are escaped."""
    click.echo(escape(text), err=True)


def show(*lines: str) -> None:
    """Print lines of data on stdout."""
    for line in lines:
        click.echo(escape(line))


def show_json(record: dict[str, Any]) -> None:
    """Print a JSON object on stdout, with its schema version."""
    click.echo(json.dumps({"schema_version": JSON_SCHEMA, **record}, default=str))


def escape(text: str) -> str:
    """Control characters as \\xNN, so that a file name can neither control a terminal nor imitate a line of output."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)


def table(rows: Sequence[tuple[str, ...]], *, right: tuple[int, ...] = ()) -> list[str]:
    """Lines with aligned columns; the columns in `right` are aligned to the right."""
    if not rows:
        return []
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
