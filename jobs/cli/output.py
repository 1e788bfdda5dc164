"""What the command line prints: exit codes, one message per error, tables, JSON, escaped names."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import json
import logging
import os
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeVar, cast

import click

from p3d.jobs.cli.no_pandas import keep_pandas_out
from p3d.pipeline import errors
from p3d.pipeline.errors import JobError, escape

EXIT_CODES: dict[int, str] = {
    0: "all done, no failures",
    1: "internal error (also: a video failed with reason `internal`)",
    2: "usage error or invalid input, such as no videos or weights that do not fit",
    3: "finished, some videos failed (see `p3d failures`)",
    4: "no such job",
    5: "refused: OUT has another recipe or a newer schema version, OUT is not trusted (`p3d trust`), DEST of a "
    "snapshot or DIR of an export is not empty, or another scheduler is live or took over",
    6: "stopped, resumable: cancelled, store outage, cut download, credentials lost during a run, disk full, "
    "`--max-failures` or retries exhausted",
    7: "`verify`, a snapshot or a run found damage",
    8: "nothing was started: no access to a store, such as no credentials or no permission",
    130: "interrupted by Ctrl-C; resumable (143 for SIGTERM)",
    141: "nobody reads the output any more, as in `p3d models | true`",
}
# what to do after a command that ended so
EXIT_REMEDY: dict[int, str] = {
    0: "Nothing.",
    1: "Please report it, with the traceback or with the detail text of the video.",
    2: "Correct what the message names, and run the command again.",
    3: "Look at `p3d failures OUT`, which gives advice for each reason. After repairs, run `p3d retry OUT`.",
    4: "Check the name of OUT, and for S3 the endpoint and the profile. `p3d jobs list FOLDER` finds jobs.",
    5: "For other settings, or if DEST is not empty, name another folder. For a newer schema version, update p3d. For "
    "somebody else's job, see `p3d trust OUT`. If a run is alive, wait for it, cancel it, or use `--takeover`.",
    6: "Remove the cause that the message names, then run `p3d resume OUT`. No committed shard is lost.",
    7: "Run `p3d verify OUT --repair`, then `p3d resume OUT`. Make a damaged snapshot again.",
    8: "Check the credentials, the profile, the bucket and its permissions: `p3d cluster check OUT --source SRC`.",
    130: "Run `p3d resume OUT` to continue.",
    141: "Nothing.",
}
_CODE_OF: list[tuple[type[JobError], int]] = [
    (errors.InputError, 2),
    (errors.NoSuchJob, 4),
    (errors.OtherRecipe, 5),
    (errors.OtherVersion, 5),
    (errors.Untrusted, 5),
    (errors.AlreadyRunning, 5),
    (errors.Unfinished, 6),
    (errors.DamagedJob, 7),
    (errors.StoreUnsafe, 2),
    (errors.StoreDenied, 8),
    (errors.ClusterError, 6),
    (errors.StoreError, 6),
]
_WORSE = (0, 3, 6, 2, 4, 5, 8, 1, 7)  # later codes are worse
JSON_SCHEMA = 1
count = errors.counted
STDOUT = "the standard output"

T = TypeVar("T")


def exit_code(error: JobError) -> int:
    """The exit code of an error about the job."""
    return next((code for kind, code in _CODE_OF if isinstance(error, kind)), 1)


def worst(codes: Sequence[int]) -> int:
    """The exit code of a command on several outputs: damage before errors, errors before work that is left."""
    return max(codes, key=_WORSE.index, default=0)


def run_cli(command: click.Command) -> int:
    """Run the command line; every expected error becomes one message on stderr and an exit code."""
    code = 1
    try:
        code = _run(command)
    finally:
        if code:
            _Loudness.release()
        _Loudness.reset()
    return code


def _run(command: click.Command) -> int:
    _say_warnings()
    _open_streams()
    keep_pandas_out()
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
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        shown, message = io.StringIO(), error.format_message()
        error.show(shown)
        if hint := _hint(error, message, sys.argv[1:]):
            print(hint, file=shown)
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
    except (BrokenPipeError, SystemExit):  # click and rich make a SystemExit of a closed pipe
        if not isinstance(_Output.failed, BrokenPipeError):
            raise
        return 141
    except (OSError, MemoryError, ImportError, RuntimeError) as error:
        words = _surroundings(error)
        if words is None:
            raise
        say(f"error: {words}")
        return 6


def _hint(error: click.ClickException, message: str, words: list[str]) -> str:
    """What may be meant by the `words` of a command line that click refuses; empty if nothing comes to mind."""
    params = error.ctx.command.params if isinstance(error, click.UsageError) and error.ctx else []
    if isinstance(error, click.NoSuchOption) and not error.possibilities:
        typed = next((word for word in words if word.startswith(error.option_name)), error.option_name)
        if any(f"-{typed}" in param.opts for param in params):
            return f"Did you mean -{typed}?"
        if not typed.startswith("--") or os.path.lexists(typed):
            return "A name that begins with a dash is written after --, as in `-- -NAME`."
    if isinstance(error, click.BadParameter) and "'cuda:" in message:
        return "Set CUDA_VISIBLE_DEVICES to choose GPUs."
    if "unexpected extra argument" in message and any(isinstance(param, click.Argument) for param in params):
        if flag := next((word for word in words if word in ("--include", "--exclude")), None):
            return f"If the shell has replaced a pattern by names, quote it: {flag} '*.mp4'."
        return "Quote a name with blanks, and a pattern such as 'videos/*.mp4', so that it is one word."
    return ""


def _surroundings(error: Exception) -> str | None:
    """The message for an error that only says what this machine lacks; None for another, which is a mistake of ours."""
    if not isinstance(error, OSError):
        text = str(error)
        lacking = errno.ENOMEM if isinstance(error, MemoryError) else _lacking_in(text)
        return f"{_LACKING[lacking]} ({text})" if lacking else None
    if error.errno == errno.ENOENT and str(error.strerror).startswith("No usable temporary directory"):
        return "no folder for temporary files can be written, or all are full; set TMPDIR to one with free space"
    words = _LACKING.get(error.errno or 0)
    if error.filename == STDOUT:
        return f"{STDOUT} cannot be written ({error.strerror})"
    said = str(error.strerror or "")
    named = error.filename or (said if "/" in said else "TMPDIR or another folder")  # pyarrow names a file there
    return words and f"{named}: {words}"


_FULL = "the disk is full; free some space, or set TMPDIR to another folder, and try again"
_LACKING = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "the file would be larger than `ulimit -f` or its file system allows",
    errno.EACCES: "no permission; see the permissions of the file and `umask`",
    errno.EROFS: "this file system is read-only",
    errno.EIO: "the disk or the terminal failed (Input/output error)",
    errno.EMFILE: "too many open files; raise the limit of `ulimit -n`",
    errno.ENFILE: "too many open files on this machine",
    errno.ENOMEM: "too little memory; free some, or raise the limit of `ulimit -v` or of this container",
    errno.EAGAIN: "no process or thread can be started; raise the limit of `ulimit -u`",
}
# what the loader of libraries, PyTorch and Python say without a number
_SAID = {
    "failed to map segment": errno.ENOMEM,
    "annot allocate memory": errno.ENOMEM,
    "can't allocate memory": errno.ENOMEM,
    "bad_alloc": errno.ENOMEM,
    "can't start new thread": errno.EAGAIN,
    "Too many open files": errno.EMFILE,
}


def _lacking_in(text: str) -> int | None:
    return next((number for said, number in _SAID.items() if said in text), None)


def escape_hooks() -> None:
    """Escape what Python prints of itself: uncaught errors, also of threads, and log records of any library."""
    sys.excepthook = say_traceback
    threading.excepthook = lambda of: say_traceback(of.exc_type, of.exc_value, of.exc_traceback)
    sys.unraisablehook = lambda of: say_traceback(of.exc_type, of.exc_value, of.exc_traceback)
    make = logging.getLogRecordFactory()

    def escaped(*given: Any, **named: Any) -> logging.LogRecord:
        record = make(*given, **named)
        with contextlib.suppress(TypeError, ValueError, KeyError):  # a wrong format, which the handler reports
            record.msg, record.args = "\n".join(map(escape, record.getMessage().split("\n"))), None
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = "\n".join(_traceback_lines(*record.exc_info))
        return record

    logging.setLogRecordFactory(escaped)


def say_traceback(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """Print an internal error as Python does, but escaped: its message may hold text from outside."""
    for line in _traceback_lines(kind, error, trace):
        _print(line)


def _traceback_lines(kind: Any, error: Any, trace: Any) -> list[str]:
    return [escape(line) for line in "".join(traceback.format_exception(kind, error, trace)).splitlines()]


def _say_warnings() -> None:
    """Print every warning escaped: one about a stray file as a message, and once; others in Python's form."""
    said = set[str]()

    def show_or_say(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: object = None,
        line: str | None = None,
    ) -> None:
        text = escape(str(message))
        if not issubclass(category, errors.StrayFile):
            for one in warnings.formatwarning(text, category, filename, lineno, line).splitlines():
                say(one)
        elif text not in said:
            said.add(text)
            say(f"warning: {text}")

    warnings.showwarning = show_or_say
    warnings.simplefilter("always", errors.StrayFile)  # also with PYTHONWARNINGS=error or =ignore


class _Output(io.FileIO):
    """The stdout of this process. The first error when it is written names it and is raised; the rest is dropped."""

    failed: OSError | None = None

    def write(self, content: Any) -> int:
        if _Output.failed is not None:  # Python writes what is left when it ends
            return len(content)
        try:
            return super().write(content)
        except OSError as error:
            _Output.failed = OSError(error.errno, error.strerror, STDOUT)  # a BrokenPipeError stays one
            raise _Output.failed from None


def _open_streams() -> None:
    """Let stdout and stderr show what their encoding lacks as \\xNN or \\uNNNN; a closed one accepts everything.

    No later file gets the number of a stream that was closed, since libraries and child processes would write into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115, PTH123 - for the whole process
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        raw, kept = _Output(sys.stdout.fileno(), "w", closefd=False), sys.stdout
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), kept.encoding, line_buffering=kept.line_buffering)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print one message on stderr, escaped. If nobody can read it, such as after a hang-up, the command goes on.

    With --quiet, one that is neither an error nor a warning is printed only if the command fails.
    """
    if _Loudness.quiet and not text.startswith(("error: ", "warning: ")):
        _Loudness.held.append(text)
        return
    if text.startswith("error: "):
        _Loudness.release()
    _print(text)


def say_progress(text: str) -> None:
    """Print one line of progress on stderr, unless --quiet."""
    if not _Loudness.quiet:
        _print(text)


def shows_bars() -> bool:
    """Is progress shown by a bar? Otherwise by `say_progress`."""
    return sys.stderr.isatty() and not _Loudness.quiet


def be_verbose() -> None:
    """Print on stderr what this program logs: events of a run, repeated requests to a store."""
    _Loudness.choose(quiet=False)
    handler = _Loudness.handler = _Printer()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.getLogger("p3d").setLevel(logging.INFO)
    logging.getLogger("p3d").addHandler(handler)


def be_quiet() -> None:
    """Print errors and warnings alone, and other messages only if the command fails."""
    _Loudness.choose(quiet=True)


class _Loudness:
    """How much of the messages of this command is printed."""

    chosen, quiet = False, False
    held: ClassVar = deque[str](maxlen=200)  # what --quiet keeps for a command that fails
    handler: logging.Handler | None = None

    @classmethod
    def choose(cls, *, quiet: bool) -> None:
        if cls.chosen:
            raise click.UsageError("--verbose and --quiet exclude each other")
        cls.chosen, cls.quiet = True, quiet

    @classmethod
    def reset(cls) -> None:
        if cls.handler is not None:
            logging.getLogger("p3d").removeHandler(cls.handler)
            logging.getLogger("p3d").setLevel(logging.NOTSET)
        cls.chosen, cls.quiet, cls.handler = False, False, None
        cls.held.clear()

    @classmethod
    def release(cls) -> None:
        while cls.held:
            _print(cls.held.popleft())


class _Printer(logging.Handler):
    """Prints records of the log as messages."""

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            _print(line)


def _print(text: str) -> None:
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
