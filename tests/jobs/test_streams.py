"""Standard streams and limits of a command that are closed, full or missing: one message and a documented code."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from p3d.jobs.cli.output import EXIT_CODES, STDOUT, _say_warnings, _surroundings
from p3d.pipeline.errors import StrayFile
from tests.conftest import P3D

MODELS = " ".join(map(shlex.quote, [*P3D, "models", "--model", "p3d-demo"]))
FIRST_FREE = "import os; from p3d.jobs.cli import output; output._open_streams(); os._exit(os.open('/', os.O_RDONLY))"


def in_shell(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A script of bash, which has `pipefail`."""
    return subprocess.run(
        ["bash", "-c", script], env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("words", ["models --model p3d-demo", "--help", "launch --help"])
def test_a_closed_pipe_has_a_code_of_its_own(words: str) -> None:
    """A reader that has gone is neither a success nor an internal error, and nothing is said about it."""
    command = " ".join(map(shlex.quote, [*P3D, *words.split()]))
    ran = in_shell(f"({command}; echo $? >&2) | true")
    assert ran.stderr == "141\n" and 141 in EXIT_CODES


@pytest.mark.parametrize("stdout", ["1>/dev/full", "1</dev/null"])
def test_an_output_that_cannot_be_written_is_named(stdout: str) -> None:
    """A full disk behind stdout, or a stdout that is not open for writing: exit 6, and no other folder is named."""
    ran = in_shell(f"{MODELS} {stdout}")
    assert ran.returncode == 6
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"error: {STDOUT} cannot be written (")


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Else a library that writes to stdout or stderr would write into a file of the dataset."""
    python = shlex.quote(sys.executable)
    ran = in_shell(f"{python} -c {shlex.quote(FIRST_FREE)} <&- >&- 2>&-")
    assert 3 <= ran.returncode < 10


def test_help_has_text_without_docstrings() -> None:
    """PYTHONOPTIMIZE=2 removes them."""
    ran = in_shell(f"{' '.join(map(shlex.quote, [*P3D, 'plan', '--help']))}", PYTHONOPTIMIZE="2")
    assert ran.returncode == 0 and "Show what a launch would do" in ran.stdout


@pytest.mark.parametrize("action", ["error", "ignore"])
def test_a_stray_file_is_named_whatever_is_done_about_warnings(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    """PYTHONWARNINGS neither turns it into an error nor hides it."""
    with warnings.catch_warnings():
        warnings.simplefilter(action)  # type: ignore[arg-type]
        _say_warnings()
        warnings.warn("a stray file", StrayFile, stacklevel=1)
    assert capsys.readouterr().err == "warning: a stray file\n"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x"), "/x: the disk is full"),
        (OSError(errno.EFBIG, "File too large", "/x/report.html"), "/x/report.html: the file would be larger than"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "/x: this file system is read-only"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.EIO, "Input/output error", STDOUT), f"{STDOUT} cannot be written"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), "set TMPDIR"),
        (PermissionError(errno.EACCES, "Failed to open local file '/t/x'"), "'/t/x': no permission; see"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (MemoryError(), "too little memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "too little memory"),
        (ImportError("libx.so: cannot open shared object file: Too many open files"), "ulimit -n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "too little memory"),
        (RuntimeError("std::bad_alloc"), "too little memory"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
    ],
)
def test_what_a_machine_lacks_is_a_message(error: Exception, says: str) -> None:
    """Limits and full disks are no internal errors."""
    assert says in (_surroundings(error) or "")


def test_other_errors_of_the_system_stay_internal() -> None:
    """A missing file that no verb has expected is a mistake of ours."""
    assert _surroundings(FileNotFoundError(errno.ENOENT, "No such file or directory", "/x")) is None
    assert _surroundings(ImportError("No module named 'x'")) is None
    assert _surroundings(RuntimeError("x")) is None
