"""Every verb that takes an OUT, run on hostile outputs: each in a process of its own, under strace if it is there.

Starting Python a hundred times would take longer than all verbs. So one process imports everything and forks a child
for each verb. `python -m tests.fuzz.hostile_verbs TASKS ENDS` is that process: a JSON line for each task and each end.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import os
import random
import re
import resource
import selectors
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import click

from tests.fuzz.hostile_outputs import Base, Case

AT_ONCE = 3
LIMIT_S = 30.0
MEMORY_BYTES = 5 << 30
LOOPBACK = "127.0.0.1"  # the page, and what looks for a free port; outputs name another address
ASK_S = 10.0  # for the requests to a page
DETACH_S = 2.5  # after which Ctrl-C ends a verb that only watches
Lines = list[list[str]]
NO_OUT = {"models", "weights"}  # verbs and groups of verbs
READ_ONLY = {"status", "failures", "jobs list", "jobs logs", "jobs trace", "plan", "search", "trust"}
READ_ONLY |= {f"results {verb}" for verb in ("index", "dedup", "evaluate", "report", "serve", "export", "snapshot")}


def lines_of(case: Case, base: Base) -> dict[str, Lines]:
    """verb -> its command lines on this output, after the verb."""
    out, root, rng = str(case.out), case.root, random.Random(case.number)
    given = base.root
    outs = str(root / "outs")
    known, dest = rng.choice(case.ids), str(root / "made" / "dest")
    source, labels = ["--source", str(base.source)], ["--labels", str(given / "labels.csv")]
    # every path is an option's value or follows `--`, since names may begin with a dash
    searches = [[known], [f"{known}@0s"], ["a.mp4"], [rng.choice(["\x1b[2J", "../canary/none", "[red]"])]]
    asked: Lines = [
        [],
        ["--level", "clip"],
        ["--json"],
        ["--where", "duration_s>=1"],
        ["--distinct", "0.9"],
        ["--metric", "l2"],
    ]
    launch = ["--weights", str(base.weights), "--device", "cpu", "--takeover"]
    if not case.plain:
        launch += ["--scores", "--pool", "mean+max"]
    return {
        "plan": [["--weights", str(base.weights), "--", str(given / "empty"), out]],
        "launch": [[*launch, *more, "--", str(base.source), out] for more in ([], ["--json"], ["--limit", "1"])],
        "train": [["--init", "random:0", "--model", "p3d-demo", "--steps", "1", "--", str(base.source), out]],
        "resume": [["--", out], [*source, "--", out], [*source, "--takeover", "--json", "--", out]],
        "retry": [["--", out], ["--reason", "truncated", "--", out]],
        "status": [
            *([*more, "--", out] for more in ([], ["--sources"], ["--json"], ["--exit-code"], ["--wait"], ["--watch"])),
            *([*more, "--", out, outs] for more in ([], ["--json"])),
        ],
        "cancel": [["--", out], ["--now", "--", out], ["--trust", "--", out]],
        "trust": [["--", out]],
        "relocate": [
            ["--from", "/v", "--to", where, *more, "--", out]
            for where in (str(base.source), "/")
            for more in ([], ["--json"])
        ],
        "failures": [[*more, "--", out] for more in ([], ["--json"], ["--csv"], ["--reason", "truncated"])],
        "verify": [
            *([*more, "--", out] for more in ([], ["--json"], ["--deep"], ["--deep", "--json"], ["--repair"])),
            *([*more, "--", out] for more in (["--repair", "--trust"], ["--repair", "--trust", "--json"])),
            *([*more, "--", outs, out] for more in ([], ["--json"])),
            *(["--recompute", "3", *more, "--", out] for more in ([], source, [*source, "--json"])),
        ],
        "search": [
            *([*rng.choice(asked), "--", out, *words] for words in searches),
            ["--index", "--", out, known],
            ["--also", outs, "--", out, known],
            ["--json", "--", out, str(given / "query.mp4")],
        ],
        "jobs list": [[*more, "--", where] for more in ([], ["--json"]) for where in (out, outs)],
        "jobs logs": [[*more, "--", out] for more in ([], ["--tail", "2"], ["--run", "1"])],
        "jobs trace": [["-o", where, "--", out] for where in ("-", str(root / "tmp" / "trace.json"))],
        "cluster check": [["--", out], [*source, "--json", "--", out]],
        "results index": [[*more, "--", out] for more in ([], ["--level", "video", "--json"], ["--kind", "ivf"])],
        "results dedup": [[*more, "--", out] for more in ([], ["--json"], ["--threshold", "-1"])],
        "results evaluate": [[*labels, *more, "--", out] for more in ([], ["--json"], ["--svm", "--folds", "2"])],
        "results report": [
            *([*more, "-o", str(root / "tmp" / "r.html"), "--", out] for more in ([], ["--json"])),
            ["-o", "-", "--videos", "3", "--queries", "1", *source, "--", out],
        ],
        "results serve": [["--no-open", *more, "--", out] for more in ([], source)],
        "results export": [[*more, "--", out, dest + "-npy"] for more in ([], ["--skip-pending", "--json"])],
        "results snapshot": [
            *([*more, "--", out, dest] for more in (["--skip-pending"], [], ["--skip-pending", "--json"])),
            ["--skip-pending", "--exclude", str(given / "exclude.txt"), "--allow-unknown", "--", out, dest],
        ],
    }


def verbs_with_out() -> set[str]:
    """The verbs of the command line that take an OUT or a folder of them, from its own tree."""
    from p3d.jobs.cli import cli

    def below(group: click.Group, before: str) -> Iterator[tuple[str, click.Command]]:
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            if isinstance(command, click.Group):
                yield from below(command, f"{before}{name} ")
            elif command is not None:
                yield f"{before}{name}", command

    verbs = dict(below(cli, ""))
    assert {name.split()[0] for name in verbs} > NO_OUT
    return {name for name in verbs if name.split()[0] not in NO_OUT}


@dataclass(frozen=True)
class Task:
    """A command line on an output, and the folders of its process."""

    number: int
    words: list[str]
    root: str
    allowed: list[str]  # beginnings of paths that may be opened

    @property
    def waits(self) -> bool:
        return bool({"--wait", "--watch"} & set(self.words))

    @property
    def serves(self) -> bool:
        return self.words[:2] == ["results", "serve"]


@dataclass(frozen=True)
class End:
    """How a process ended: its exit code, or minus the number of a signal. `audited` are events outside, by Python."""

    number: int
    pid: int
    code: int
    seconds: float
    cpu_s: float
    timed_out: bool
    audited: list[str]


# --- the process that forks -------------------------------------------------------------------------------------------


def _preload() -> None:
    """Import what the verbs import, so that each child begins at once."""
    import boto3  # noqa: F401
    import faiss  # noqa: F401
    import ray  # noqa: F401
    import sklearn.svm  # noqa: F401

    import p3d.jobs.api.search
    import p3d.jobs.scheduler.run
    import p3d.pipeline.results.page.server  # noqa: F401
    from p3d.jobs.cli import VERBS, LazyGroup, cli

    def load(group: LazyGroup) -> None:
        for name in group.verbs:
            if isinstance(command := group.get_command(click.Context(group), name), LazyGroup):
                load(command)

    assert isinstance(cli, LazyGroup) and VERBS
    load(cli)


def _child(task: Task) -> None:
    """Run the command line in this process, which then ends."""
    from p3d.jobs.cli import main

    root = Path(task.root)
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(root / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.stdin = open(os.devnull)  # noqa: SIM115, PTH123 - for the whole process
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    for name in [name for name in os.environ if name.startswith(("AWS_", "P3D_", "XDG_", "RAY_"))]:
        del os.environ[name]
    places = {"P3D_STATE": "state", "P3D_CACHE": "cache", "TMPDIR": "tmp", "HOME": "home"}
    os.environ |= {name: str(root / folder) for name, folder in places.items()}
    os.environ |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "canary")
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    tempfile.tempdir = None
    os.chdir(root / "tmp")
    sys.argv = ["p3d", *task.words]
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    log = os.open(root / "audit", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.addaudithook(audit_hook(tuple(map(os.fsencode, task.allowed)), log))
    code: Any = 1
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 - as the interpreter does at its top
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type] # there is one
    # a page may have ended by itself; the exit hook of Ray, which only `_preload` imports, would print the interrupt
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


# event -> number of its paths; links are followed in the last part of the first, and not of the second
PATHS = {"open": 1, "os.listdir": 1, "os.scandir": 1, "os.chdir": 1, "os.truncate": 1}
ENTRIES = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2}
ENTRIES |= {"os.chmod": 1, "os.chown": 1, "os.utime": 1, "os.setxattr": 1, "shutil.rmtree": 1}
CALLS = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname", "os.system")


def audit_hook(allowed: tuple[bytes, ...], log: int) -> Callable[[str, tuple[Any, ...]], None]:
    """Write events that concern other paths, and every call of another process or machine, to `log`."""

    def hook(event: str, about: tuple[Any, ...]) -> None:
        if event in CALLS:
            to = about[1] if event == "socket.connect" else about[:1]
            if isinstance(to, tuple) and to[0] != LOOPBACK:
                os.write(log, f"{event} {about[1:]!r}\n".encode(errors="replace"))
            return
        for given in about[: PATHS.get(event, 0) or ENTRIES.get(event, 0)]:
            if not isinstance(given, str | bytes | os.PathLike) or (event == "os.symlink" and given is about[0]):
                continue
            path = os.fsencode(given)
            folder, name = os.path.split(path)
            follows = event in PATHS and not (event == "open" and (about[2] or 0) & os.O_NOFOLLOW)
            real = os.path.realpath(path) if follows else os.path.realpath(folder or b".") + b"/" + name
            if not real.startswith(allowed):
                os.write(log, f"{event} {real!r} as {path!r}\n".encode())

    return hook


def _ask_page(task: Task, pid: int) -> None:
    """Be the browser of a page that a child serves, and then the user who ends it."""
    url, until = "", time.monotonic() + LIMIT_S - ASK_S - 5
    try:
        while not url and time.monotonic() < until:
            os.kill(pid, 0)
            with contextlib.suppress(FileNotFoundError):  # the child has not begun
                shown = (Path(task.root) / "stdout").read_text()
                url = shown.strip() if shown.endswith("\n") else ""
            time.sleep(0.02)
        if url:
            _requests(urlsplit(url).netloc, urlsplit(url).path)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
        os._exit(0)


def _requests(host: str, path: str) -> None:
    connection = http.client.HTTPConnection(host, timeout=ASK_S)
    ids: list[str] = []
    until = time.monotonic() + ASK_S

    def ask(name: str) -> bytes:
        if time.monotonic() > until:
            return b""
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", path + name)
            return connection.getresponse().read()
        connection.close()
        return b""

    for name in ("api/about", "api/videos", "api/videos?where=label%3Dx", "api/map"):
        found = ask(name)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            ids += [str(one["video_id"]) for one in json.loads(found)["videos"]]
    for one in ids[:3]:
        video = f"id={quote(one, errors='surrogatepass')}"
        for name in ("api/video", "api/similar", "api/frames", "picture", "content"):
            ask(f"{name}?{video}&t=0.5&level=clip&clip=0")
    connection.close()


def run_all(tasks: list[Task], say: Callable[[End], None]) -> None:
    """Run each task in a child, a few at once. One that takes too long is killed with all that it started."""
    waiting, running = list(reversed(tasks)), dict[int, tuple[Task, float, list[float]]]()
    with selectors.DefaultSelector() as selector:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                task = waiting.pop()
                if (pid := os.fork()) == 0:
                    _child(task)
                running[pid] = (task, time.monotonic(), [])
                if task.serves and os.fork() == 0:
                    _ask_page(task, pid)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
            for key, _ in selector.select(0.1):
                task, began, signals = running.pop(key.data)
                selector.unregister(key.fd)
                os.close(key.fd)
                _, status, usage = os.wait4(key.data, 0)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(key.data, signal.SIGKILL)
                seconds, cpu_s = time.monotonic() - began, usage.ru_utime + usage.ru_stime
                audited = (Path(task.root) / "audit").read_text().splitlines()
                code = os.waitstatus_to_exitcode(status)
                say(End(task.number, key.data, code, seconds, cpu_s, -9 in signals, audited))
            for pid, (task, began, signals) in running.items():
                taken = time.monotonic() - began
                if taken > LIMIT_S:
                    signals.append(-9)
                    os.killpg(pid, signal.SIGKILL)
                elif task.waits and taken > DETACH_S and not signals:
                    signals.append(signal.SIGINT)
                    os.kill(pid, signal.SIGINT)


def main() -> None:
    tasks = [Task(**json.loads(line)) for line in Path(sys.argv[1]).read_text().splitlines()]
    _preload()
    with Path(sys.argv[2]).open("w") as ends:

        def say(end: End) -> None:
            ends.write(json.dumps(asdict(end)) + "\n")
            ends.flush()

        run_all(tasks, say)


# --- what strace has recorded -----------------------------------------------------------------------------------------

FILE_CALLS = (
    "?open,openat,?openat2,?creat,?rename,?renameat,?renameat2,?link,linkat,?symlink,symlinkat,?unlink,unlinkat,?mkdir,"
    "mkdirat,?rmdir,?mknod,mknodat,?chmod,fchmodat,?chown,?lchown,fchownat,truncate,?utime,?utimes,utimensat,execve,"
    "?execveat,?chroot,?mount,?fork,?vfork,clone,?clone3,connect,bind"
)
CALL = re.compile(r"(\d+) +(\w+)\((.*)$")
RESUMED = re.compile(r"(\d+) +<\.\.\. \w+ resumed>(.*)$")
TEXT = re.compile(r'(?:(AT_FDCWD|\d+)<((?:[^>\\]|\\.)*)>, )?"((?:[^"\\]|\\.)*)"')
OPENED = re.compile(r"\) = \d+<((?:[^>\\]|\\.)*)>$")
ESCAPED = re.compile(rb"\\([0-7]{1,3}|x[0-9a-f]{2}|.)")
PLAIN = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"v": b"\v", b"f": b"\f"}
BIRTH = ("fork", "vfork", "clone", "clone3")


def strangers(trace: Path, tasks: dict[int, Task]) -> dict[int, list[str]]:
    """pid of a task -> the system calls of it and its children that concern other paths, or an address."""
    found: dict[int, list[str]] = {pid: [] for pid in tasks}
    parents: dict[int, int] = {}
    suspicious: list[tuple[int, str, str, list[bytes]]] = []
    for pid, call, rest in _calls(trace):
        if call in BIRTH and (born := re.search(r"= (\d+)(?: |$)", rest)):
            parents[int(born[1])] = pid
        elif call in ("connect", "bind"):
            if "AF_UNIX" not in rest and f'inet_addr("{LOOPBACK}")' not in rest:
                suspicious.append((pid, call, rest, []))
        elif call not in BIRTH:
            suspicious.append((pid, call, rest, _paths(call, rest)))
    for pid, call, rest, paths in suspicious:
        while pid not in tasks and pid in parents:
            pid = parents[pid]
        if pid in tasks:
            allowed = tuple(map(os.fsencode, tasks[pid].allowed))
            canary = os.fsencode(f"{tasks[pid].root}/canary")
            missed = call in ("open", "openat", "openat2", "execve") and " = -1 " in rest  # it opened nothing
            outside = [path for path in paths if path.startswith(canary) or not (missed or path.startswith(allowed))]
            if outside or not paths:
                found[pid].append(f"{call}({rest[:500]}")
    return found


def _calls(trace: Path) -> Iterator[tuple[int, str, str]]:
    """(pid, name, the rest of the line) of each call; two lines of one call are joined."""
    begun: dict[int, tuple[str, str]] = {}
    with trace.open(errors="replace") as file:
        for line in file:
            if match := CALL.match(line):
                pid, call, rest = int(match[1]), match[2], match[3]
                if rest.endswith("<unfinished ...>"):
                    begun[pid] = call, rest.removesuffix("<unfinished ...>").rstrip()
                else:
                    yield pid, call, rest
            elif (match := RESUMED.match(line)) and int(match[1]) in begun:
                call, before = begun.pop(int(match[1]))
                yield int(match[1]), call, before + match[2]


def _paths(call: str, rest: str) -> list[bytes]:
    """The absolute paths of a call, and the one that an open has really opened."""
    texts = list(TEXT.finditer(rest))
    if call in ("symlink", "symlinkat"):
        texts = texts[1:]  # the first is what the link says
    if call == "execve":
        texts = texts[:1]
    paths = [os.path.normpath(os.path.join(_plain(text[2] or "/"), _plain(text[3]))) for text in texts[:2]]  # noqa: PTH118
    if opened := OPENED.search(rest):
        paths.append(_plain(opened[1]))
    return paths


def _plain(text: str) -> bytes:
    """A text of strace without its escapes."""

    def plain(match: re.Match[bytes]) -> bytes:
        what = match[1]
        if what[:1].isdigit():
            return bytes([int(what, 8)])
        return bytes([int(what[1:], 16)]) if what[:1] == b"x" and len(what) == 3 else PLAIN.get(what, what)

    return ESCAPED.sub(plain, text.encode(errors="replace"))


if __name__ == "__main__":
    main()
