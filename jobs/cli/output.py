"""How the command line talks: exit codes, errors as one sentence, JSON, escaped names, options that verbs share."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from p3d.pipeline import errors
from p3d.pipeline.errors import JobError
from p3d.pipeline.storage.store import ADDRESSING, CHECKSUMS, SSE, Store, StoreOptions, open_store

F = TypeVar("F", bound=Callable[..., Any])

EXIT_CODES: dict[int, str] = {
    0: "all done, no failures",
    1: "internal error (also: a video failed with reason `internal`)",
    2: "usage, or an input that cannot be: no videos, weights that do not fit",
    3: "finished, some videos failed (see `p3d failures`)",
    4: "no such job",
    5: "refused: other recipe at this output, a snapshot's DEST not empty, or another scheduler is live or took over",
    6: "stopped, resumable: cancelled, store outage, credentials, disk full, budget or `--max-failures` spent",
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
    """Run the command line; every expected error becomes a sentence on stderr and a code."""
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
    """One line of talk, on stderr; control characters of file names are escaped."""
    click.echo(escape(text), err=True)


def show(*lines: str) -> None:
    """Lines of data, on stdout."""
    for line in lines:
        click.echo(escape(line))


def show_json(record: dict[str, Any]) -> None:
    """Data for programs, on stdout, with its schema version."""
    click.echo(json.dumps({"schema_version": JSON_SCHEMA, **record}, default=str))


def escape(text: str) -> str:
    """Control characters as \\xNN, so that a file name can neither drive a terminal nor pass for a line of ours."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)


def table(rows: Sequence[tuple[str, ...]], *, right: tuple[int, ...] = ()) -> list[str]:
    """Lines with columns that line up; those of `right` are aligned to the right."""
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
    """InputError, with the command that installs it, unless an optional package is here."""
    if importlib.util.find_spec(module) is None:
        raise errors.InputError(f"this needs {module}, which is not installed: pip install 'p3d-embeddings[{extra}]'")


STORE_OPTIONS = (
    "profile",
    "region",
    "endpoint_url",
    "addressing_style",
    "checksums",
    "requester_pays",
    "sse",
    "sse_kms_key_id",
)


def store_options(verb: F) -> F:
    """The options of verbs that touch S3."""
    for option in (
        click.option("--profile", help="AWS profile; credentials come from botocore's own chain."),
        click.option("--region", help="S3 region."),
        click.option("--endpoint-url", help="S3 server other than AWS, such as http://127.0.0.1:9000."),
        click.option(
            "--addressing-style", type=click.Choice(ADDRESSING), default="auto", help="Bucket in path or host."
        ),
        click.option(
            "--checksums",
            type=click.Choice(CHECKSUMS),
            default="when_supported",
            help="when_required: for servers without S3's newer checksums, or whose ETags are no MD5.",
        ),
        click.option("--requester-pays", is_flag=True, help="Pay for reading from a requester-pays bucket."),
        click.option("--sse", type=click.Choice(SSE), help="Encryption of what is written to S3."),
        click.option("--sse-kms-key-id", help="KMS key, with --sse aws:kms."),
    ):
        verb = option(verb)
    return verb


def options_of(typed: dict[str, Any]) -> StoreOptions:
    """The options above, taken from what was typed. InputError for what cannot be, or carries a password."""
    return StoreOptions(
        endpoint_url=typed["endpoint_url"],
        region=typed["region"],
        profile=typed["profile"],
        addressing=typed["addressing_style"],
        checksums=typed["checksums"],
        requester_pays=typed["requester_pays"],
        sse=typed["sse"],
        sse_kms_key_id=typed["sse_kms_key_id"],
    )


def out_store(out: str, options: StoreOptions) -> Store:
    """The store of an OUT argument."""
    return open_store(out, options)
