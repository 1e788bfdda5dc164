"""`--verbose` and `--quiet` of every verb: what goes to stderr, and that results and errors are never lost."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import pytest

from p3d.jobs.cli import Verb, cli, output, progress
from p3d.jobs.scheduler.log import RunLog
from p3d.jobs.scheduler.state import WorkerDied
from p3d.pipeline.errors import InputError
from tests.sim.store import MemoryStore

Ran = Callable[..., tuple[int, str, str]]


def work(*, code: int = 0, fails: bool = False) -> int:
    """A verb that says, warns, shows progress, logs an event of a run and prints its result."""
    output.say("starting")
    output.say("warning: one file is odd")
    progress.show_steps(False)("step", 1, 2)
    with progress.show_progress(2), progress.show_count("clip") as count, progress.step_bars() as bars:
        count(1, 2)
        bars("part", 1, 2)
    RunLog(MemoryStore(), 1).hear(WorkerDied(0, "out of memory"))
    if fails:
        raise InputError("no video")
    output.show("result")
    return code


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ran:
    """Run `work` as the verb of a command line: (code, stdout, stderr)."""
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)

    def run(*flags: str, body: Callable[[], int] = work) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["p3d", *flags])
        code = output.run_cli(Verb("work", callback=body))
        return code, *capsys.readouterr()

    return run


def test_messages_and_progress_are_shown_and_the_log_is_not(ran: Ran) -> None:
    code, out, err = ran()
    assert (code, out) == (0, "result\n")
    assert err.splitlines()[:2] == ["starting", "warning: one file is odd"]
    assert {"step 1/2", "1/2 clips", "part 1/2"} <= {line.partition(",")[0] for line in err.splitlines()}
    assert "out of memory" not in err


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
def test_a_quiet_success_prints_its_result_and_warnings(ran: Ran, flag: str) -> None:
    assert ran(flag) == (0, "result\n", "warning: one file is odd\n")


def test_a_quiet_failure_says_all_but_its_progress(ran: Ran) -> None:
    """An exit code other than 0, an error and an internal error each print the messages that were kept."""
    assert ran("-q", body=lambda: work(code=6)) == (6, "result\n", "warning: one file is odd\nstarting\n")
    code, _, err = ran("-q", body=lambda: work(fails=True))
    assert (code, err) == (2, "warning: one file is odd\nstarting\nerror: no video\n")
    with pytest.raises(ZeroDivisionError):
        ran("-q", body=lambda: work() // 0)


def test_an_internal_error_is_not_kept(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    """Python's hook prints the traceback of a quiet command, too."""

    def body() -> int:
        output.say_traceback(ValueError, ValueError("a bug"), None)
        return 0

    assert "ValueError: a bug" in ran("-q", body=body)[2]


def test_a_verbose_verb_shows_the_log_while_it_runs(ran: Ran) -> None:
    """Events of a run come with their time; the next command line logs nothing."""
    code, out, err = ran("-v")
    assert (code, out) == (0, "result\n")
    events = [line for line in err.splitlines() if "worker 0 died: out of memory" in line]
    assert len(events) == 1 and events[0][2] == events[0][5] == ":"
    assert "out of memory" not in ran()[2] and not logging.getLogger("p3d").handlers


def test_text_of_the_log_is_escaped(ran: Ran) -> None:
    def body() -> int:
        logging.getLogger("p3d.x").info("a%sb", "\u202e")
        return 0

    assert r"a\u202eb" in ran("-v", body=body)[2]


def test_a_verb_is_not_both(ran: Ran) -> None:
    code, _, err = ran("-v", "-q")
    assert code == 2 and "--verbose and --quiet exclude each other" in err


def test_no_bar_is_drawn_by_a_quiet_verb(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, too."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bars: list[bool] = []
    for flag in ("-v", "-q"):
        ran(flag, body=lambda: bars.append(output.shows_bars()) or 0)
    assert bars == [True, False]


@pytest.mark.parametrize("flags", [[], ["-q"], ["-v"]])
def test_a_real_verb_takes_the_flags(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`p3d weights list` accepts both, and its result stays."""
    monkeypatch.setattr(sys, "argv", ["p3d", "weights", "list", *flags])
    assert output.run_cli(cli) == 0
    assert "resnet50-v2" in capsys.readouterr().out
