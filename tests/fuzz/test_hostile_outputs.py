"""Hostile outputs, one verb each: nothing outside is read or written, nothing is connected to, nobody is misled.

P3D_FUZZ sets the number of seeds (`make fuzz-outputs` uses 2000, the suite 100), P3D_SEED the campaign, P3D_ONLY the
numbers of single seeds, separated by commas.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import socket
import stat
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from p3d.jobs.cli.output import EXIT_CODES
from tests.conftest import REPO
from tests.fuzz.hostile_outputs import Base, Case, Maker
from tests.fuzz.hostile_verbs import (
    FILE_CALLS,
    LIMIT_S,
    MEMORY_BYTES,
    READ_ONLY,
    End,
    Task,
    audit_hook,
    lines_of,
    strangers,
    verbs_with_out,
)
from tests.watch import opened

SEEDS = int(os.environ.get("P3D_FUZZ", "100"))
SEED = int(os.environ.get("P3D_SEED", "1"))
ONLY = os.environ.get("P3D_ONLY", "")
BATCH = 50  # outputs at a time, on the disk and under one strace
UNSHOWN = ("Cc", "Cf", "Cs", "Zl", "Zp")
CODES = {*EXIT_CODES, 143}
# what any program reads: itself, its libraries, and what they ask the system
SYSTEM = (
    *("/usr/", "/lib", "/bin/", "/opt/", "/sys/", "/proc/", "/dev/null", "/dev/urandom", "/dev/shm", "/etc/ld.so"),
    *("/etc/localtime", "/etc/passwd", "/etc/nsswitch.conf", "/etc/mime.types", "/etc/locale.alias", "/etc/ssl"),
    *("/run/nscd", "/var/run/nscd", "/etc/gai.conf", "/etc/host", "/etc/resolv.conf"),
    *("pipe:", "socket:", "anon_inode", "/memfd:"),
)


def _strace() -> str | None:
    """strace, if it is installed and may trace."""
    found = shutil.which("strace")
    words = [found, "-f", "--seccomp-bpf", "-qq", "-o", os.devnull, "true"]
    return found if found and subprocess.run(words, capture_output=True, check=False).returncode == 0 else None


STRACE = _strace()


@dataclass
class Tally:
    """What a campaign has found, each finding with the number of its seed."""

    seeds: int = 0
    verbs: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    cpu_s: float = 0.0
    longest_s: float = 0.0
    ends: list[str] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)
    audited: list[str] = field(default_factory=list)
    traced: list[str] = field(default_factory=list)


def _tree(root: Path) -> dict[str, tuple[object, ...]]:
    """Every entry below a folder, with what a change of it would change."""
    found: dict[str, tuple[object, ...]] = {}
    pending = [root]
    while pending:
        for entry in os.scandir(pending.pop()):
            status = entry.stat(follow_symlinks=False)
            mark = (status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns)
            found[entry.path] = mark if not stat.S_ISDIR(status.st_mode) else mark[:2]
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
    return found


def _numbers() -> list[int]:
    return [int(one) for one in ONLY.split(",")] if ONLY else list(range(SEEDS))


def campaign(base: Base, numbers: list[int], root: Path) -> Tally:
    """Make the outputs of these seeds and run a verb on each."""
    tally, began = Tally(), time.monotonic()
    # verbs are drawn evenly: each block of seeds is one shuffled round of all verbs
    verbs = sorted(lines_of(Case(0, root, root, ("a",), True, ()), base))
    for at in range(0, len(numbers), BATCH):
        _batch(base, numbers[at : at + BATCH], verbs, root / f"batch{at:05d}", tally)
        if log := os.environ.get("P3D_FUZZ_LOG"):  # a campaign of an hour can be looked at while it runs
            Path(log).write_text(f"seed {SEED}: {json.dumps({**vars(tally), 'verbs': len(tally.verbs)}, indent=1)}\n")
    tally.seconds = time.monotonic() - began
    return tally


def _verb_of(number: int, verbs: list[str]) -> str:
    order = random.Random(f"{SEED}/{number // len(verbs)}").sample(verbs, len(verbs))
    return order[number % len(verbs)]


def _batch(base: Base, numbers: list[int], verbs: list[str], root: Path, tally: Tally) -> None:
    cases: dict[int, Case] = {}
    tasks: dict[int, Task] = {}
    ports: dict[int, socket.socket] = {}
    for number in numbers:
        host = f"127.77.{number >> 8 & 255}.{number & 255}"  # nothing else on this machine uses it
        ports[number] = socket.create_server((host, 0))
        ports[number].setblocking(False)
        folder = root / f"{number:06d}"
        folder.mkdir(parents=True)
        port = f"{host}:{ports[number].getsockname()[1]}"
        with _little_memory():
            case = cases[number] = Maker(base, SEED, number, folder, port).make()
        verb = _verb_of(number, verbs)
        words = [*verb.split(), *random.Random(f"{SEED}/{number}").choice(lines_of(case, base)[verb])]
        own = (case.out, base.root, *(folder / name for name in ("state", "cache", "home", "tmp", "outs", "made")))
        ours = (REPO.resolve(), REPO, sys.prefix, sys.base_prefix, *(folder / name for name in ("std", "audit")))
        tasks[number] = Task(number, words, str(folder), [*map(str, (*own, *ours)), *SYSTEM])
    canaries = {number: (_tree(case.canary), _tree(case.out)) for number, case in cases.items()}
    with opened(*(case.canary / folder for case in cases.values() for folder in ("", "sub"))) as seen:
        trace = root / "trace"
        seen.take()
        ends = _run(tasks, root, trace)
        touched = seen.take_paths()
    for number, end in ends.items():
        case, task = cases[number], tasks[number]
        _look_at(tally, case, task, end)
        where = f"{number} {' '.join(task.words[:2])}"
        after = (_tree(case.canary), _tree(case.out))
        if after[0] != canaries[number][0]:
            tally.touched.append(f"{where}: changed {after[0].items() ^ canaries[number][0].items()}")
        tally.touched += [f"{where}: opened {path}" for path in touched if path.is_relative_to(case.canary)]
        verb = next(verb for verb in verbs if task.words[: len(verb.split())] == verb.split())
        if verb in READ_ONLY and after[1] != canaries[number][1]:
            tally.touched.append(f"{where}: changed OUT {after[1].items() ^ canaries[number][1].items()}")
        try:
            ports[number].accept()
            tally.touched.append(f"{where}: connected to a port that OUT names")
        except BlockingIOError:
            pass
        tally.audited += [f"{where}: {line}" for line in end.audited]
    if trace.exists():
        by_pid = strangers(trace, {end.pid: tasks[number] for number, end in ends.items()})
        of_pid = {end.pid: number for number, end in ends.items()}
        for pid, found in by_pid.items():
            tally.traced += [f"{of_pid[pid]} {tasks[of_pid[pid]].words[:2]}: {line}" for line in found]
    for one in ports.values():
        one.close()
    if not ONLY:
        subprocess.run(["rm", "-rf", str(root)], check=True)


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    """Limit the memory of this process: a snapshot of a hostile output is made in it."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _run(tasks: dict[int, Task], root: Path, trace: Path) -> dict[int, End]:
    """Run the tasks in the process of `hostile_verbs`, under strace where it works."""
    (root / "tasks").write_text("".join(json.dumps(asdict(task)) + "\n" for task in tasks.values()))
    strace = [STRACE, "-f", "-y", "--seccomp-bpf", "-qq", "-s", "4096", "-o", str(trace), "-e", f"trace={FILE_CALLS}"]
    runs = [sys.executable, "-m", "tests.fuzz.hostile_verbs", root / "tasks", root / "ends"]
    words = [*(strace if STRACE else []), *runs]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_WAIT_POLICY": "passive"}
    ran = subprocess.run(list(map(str, words)), cwd=REPO, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    ends = [End(**json.loads(line)) for line in (root / "ends").read_text().splitlines()]
    assert {end.number for end in ends} == set(tasks)
    return {end.number: end for end in ends}


def _look_at(tally: Tally, case: Case, task: Task, end: End) -> None:
    """The end of a process, and what it has shown."""
    verb = " ".join(word for word in task.words[: 2 if task.words[0] in ("jobs", "results", "cluster") else 1])
    tally.seeds += 1
    tally.verbs[verb] += 1
    tally.codes[str(end.code)] += 1
    tally.cpu_s += end.cpu_s
    tally.longest_s = max(tally.longest_s, end.seconds)
    where = f"{case.number} {task.words} on {', '.join(case.what) or 'hostile text'}"
    out, err = (Path(task.root, name).read_bytes() for name in ("stdout", "stderr"))
    if end.timed_out or end.seconds > LIMIT_S:
        tally.ends.append(f"{where}: took more than {LIMIT_S:g} s")
    elif end.code not in CODES:
        tally.ends.append(f"{where}: exit code {end.code}")
    if b"Traceback" in err or end.code == 1:
        tally.ends.append(f"{where}: {err.decode(errors='replace')[-3000:]}")
    for name, text in (("stdout", out), ("stderr", err)):
        lines = "\r\n" if "--csv" in task.words else "\n"  # RFC 4180 ends lines of CSV by both
        shown = text.decode(errors="surrogateescape").replace(lines, "")
        if bad := {one for one in shown if unicodedata.category(one) in UNSHOWN and one != "\n"}:
            tally.shown.append(f"{where}: {name} has {sorted(bad)}")


@pytest.fixture(scope="module")
def tally(tmp_path_factory: pytest.TempPathFactory, small_weights: Path) -> Iterator[Tally]:
    root = tmp_path_factory.mktemp("hostile")
    found = campaign(Base.make(root / "given", small_weights), _numbers(), root)
    print(f"\nseed {SEED}: {json.dumps({**vars(found), 'verbs': len(found.verbs)}, indent=1)}")
    yield found


def test_every_verb_that_takes_an_output_is_tried() -> None:
    """The verbs come from the command line itself: a new one fails here until it has command lines."""
    case = Case(0, Path("/r"), Path("/r/out"), ("a",), True, ())
    none = Base(Path("/b"), (None, None), b"", (b"", b""))  # type: ignore[arg-type] # its recipes are not used
    assert lines_of(case, none).keys() == verbs_with_out()
    assert verbs_with_out() > READ_ONLY


TRACE = r"""
10 openat(AT_FDCWD</c/tmp>, "/c/out/job.json", O_RDONLY|O_CLOEXEC) = 3</c/out/job.json>
10 openat(AT_FDCWD</c/tmp>, "/etc/none", O_RDONLY|O_CLOEXEC) = -1 ENOENT (No such file or directory)
10 openat(AT_FDCWD</c/tmp>, "/c/out/clips", O_RDONLY|O_CLOEXEC <unfinished ...>
11 connect(4<socket:[1]>, {sa_family=AF_UNIX, sun_path="/run/x"}, 9) = 0
10 <... openat resumed>) = 4</c/canary/caf\303\251>
10 clone3({flags=CLONE_VM}, 88) = 11
11 unlinkat(4</c/canary/sub>, "7.tmp", 0) = 0
11 connect(4<socket:[1]>, {sa_family=AF_INET, sin_port=htons(80), sin_addr=inet_addr("127.77.0.1")}, 16) = -1
11 openat(AT_FDCWD</c/tmp>, "../canary/none", O_RDONLY) = -1 ENOENT (No such file or directory)
12 openat(AT_FDCWD</c/tmp>, "/etc/shadow", O_RDONLY) = 3</etc/shadow>
10 rename("/c/out/a", "/elsewhere") = 0
"""


def test_a_trace_is_read_as_a_whole(tmp_path: Path) -> None:
    """Links, relative names, threads, halves of lines and connections are found; a stranger's process is nobody's."""
    (tmp_path / "trace").write_text(TRACE)
    found = strangers(tmp_path / "trace", {10: Task(0, [], "/c", ["/c/out", "/c/tmp"])})
    assert [line.partition("(")[0] for line in found[10]] == ["openat", "unlinkat", "connect", "openat", "rename"]


def test_audit_events_are_judged_by_where_they_lead(tmp_path: Path) -> None:
    """An open through a link is one of its target, unless links are not followed; other events concern the name."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to("/etc/passwd")
    (tmp_path / "out" / "elsewhere").symlink_to("/etc")
    with (tmp_path / "log").open("wb") as log:
        hook = audit_hook((os.fsencode(tmp_path / "out"),), log.fileno())
        for name, outside in (("link", True), ("elsewhere/x", True), ("../x", True), ("job.json", False)):
            at = log.tell()
            hook("open", (str(tmp_path / "out" / name), "r", os.O_RDONLY))
            assert (os.fstat(log.fileno()).st_size > at) is outside, name
            log.seek(0, os.SEEK_END)
        hook("open", (str(tmp_path / "out" / "link"), None, os.O_RDONLY | os.O_NOFOLLOW))
        hook("os.remove", (tmp_path / "out" / "link", -1))
        hook("socket.connect", (None, "/run/a-socket"))
        assert os.fstat(log.fileno()).st_size == log.tell()
        hook("os.remove", (tmp_path / "out" / "elsewhere" / "x", -1))
        hook("socket.connect", (None, ("127.77.0.1", 80)))
    assert len((tmp_path / "log").read_text().splitlines()) == 5


@pytest.mark.timeout(7200)
@pytest.mark.fault(22, 51, 56, 57, 58)
def test_every_verb_ends_in_time_with_a_code_of_the_table(tally: Tally) -> None:
    """No verb dies by a signal, shows a traceback, or takes more than 30 s, and no verb is left out."""
    assert tally.ends == []
    assert ONLY or max(tally.verbs.values()) - min(tally.verbs.values()) <= 1


def test_no_verb_prints_a_control_character(tally: Tally) -> None:
    """Nothing on stdout or stderr controls a terminal, whatever the output holds."""
    assert tally.shown == []


def test_no_verb_touches_what_an_output_leads_to(tally: Tally) -> None:
    """Files and folders outside stay unopened and unchanged, ports get no connection, and looking changes nothing."""
    assert tally.touched == []


def test_python_opens_nothing_outside(tally: Tally) -> None:
    """The audit events of each process concern OUT, the cache, and what the command line names."""
    assert tally.audited == []


@pytest.mark.skipif(STRACE is None, reason="strace is not installed or may not trace; the audit events are checked")
def test_no_system_call_concerns_anything_outside(tally: Tally) -> None:
    """The same for the system calls of each process and its children."""
    assert tally.traced == []
