"""Control objects: epochs are numbered, one run is active, a run whose heartbeat stops is dead, stops are requested.

Nothing here waits: the sleep of the two watched periods is a function of the tests, which may change the store as
another machine would.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from p3d.jobs import machine
from p3d.jobs.scheduler import control
from p3d.jobs.scheduler.control import (
    HEARTBEAT_S,
    RUNNING,
    Epoch,
    ask_cancel,
    beat,
    cancel_asked,
    claim,
    heartbeat,
    is_live,
    newest_epoch,
    newest_number,
    sweep_temps,
)
from p3d.jobs.scheduler.run_snapshot import RunSnapshot
from p3d.jobs.worker.autoscale import Load
from p3d.pipeline.errors import AlreadyRunning, StoreUnknown, StrayFile
from p3d.pipeline.storage import local as store_module
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import EXISTS, Created, Store
from p3d.pipeline.storage.urls import open_store

BOTH_PERIODS_S = 2 * HEARTBEAT_S
ROUNDS = 100  # of two claims at once


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "out"))
    return open_store(f"s3://{request.getfixturevalue('bucket')}/some/prefix")


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "out"))


@pytest.fixture(autouse=True)
def no_power_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: power loss is tested with the store, and races get more rounds without waiting for the disk."""
    monkeypatch.setattr(store_module, "fsync", lambda *_: None)


class Watch:
    """A sleep that returns at once: it records the duration, and calls `meanwhile`."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.slept_s: list[float] = []
        self.meanwhile = meanwhile

    def __call__(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.meanwhile()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """The sleep of `claim`."""
    watch = Watch()
    monkeypatch.setattr(is_live, "__kwdefaults__", {"sleep": watch})
    return watch


@pytest.fixture(scope="session")
def dead_pid() -> int:
    """The id of a process of this machine that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def record(store: Store, number: int, **fields: Any) -> Epoch:
    """The record of a run of this process on this boot, except for `fields`."""
    here = Epoch(number, platform.node(), machine.boot_id(), os.getpid(), "2026-01-01T00:00:00Z", {})
    epoch = replace(here, **fields)
    content = json.dumps({name: getattr(epoch, name) for name in Epoch.__slots__}).encode()
    assert store.create(f"_job/epochs/{number:06d}.json", content) == "created"
    return epoch


def running(counter: int) -> RunSnapshot:
    return RunSnapshot(counter=counter, state=RUNNING)


def claimed(store: Store, *, takeover: bool = False, **options: Any) -> Epoch:
    return claim(store, options, takeover=takeover, say=lambda sentence: None)


# ---- claims -----------------------------------------------------------------------------------------------------


def test_claims_are_numbered_from_one(store: Store, watch: Watch) -> None:
    """Each run of an output gets the next number, and is the newest from then on."""
    assert newest_epoch(store) is None
    assert newest_number(store) == 0
    for number in (1, 2, 3):
        epoch = claimed(store, workers=number)
        assert epoch.number == newest_number(store) == number
        assert newest_epoch(store) == epoch
        beat(store, number, RunSnapshot(counter=9, state="finished"))
    assert watch.slept_s == []


def test_numbers_sort_beyond_nine(local: LocalStore) -> None:
    """The newest of eleven runs is the eleventh, not the ninth."""
    for number in range(1, 12):
        assert claimed(local, takeover=True).number == number
    assert newest_epoch(local).number == newest_number(local) == 11


def test_a_claim_records_process_and_options(local: LocalStore) -> None:
    """The record of a run holds host, boot, process and options as they were, and its heartbeat begins at 0."""
    claimed(local, workers=3, device="cpu")
    epoch = newest_epoch(local)
    assert (epoch.host, epoch.boot_id, epoch.pid) == (platform.node(), machine.boot_id(), os.getpid())
    assert epoch.options == {"workers": 3, "device": "cpu"}
    assert heartbeat(local, 1) == running(0)


def test_a_live_run_is_not_joined(store: Store, watch: Watch) -> None:
    """A claim while another run's heartbeat changes is refused, names that run and the options, and leaves no trace."""
    record(store, 1, host="elsewhere", pid=4711)
    beat(store, 1, running(5))
    watch.meanwhile = lambda: beat(store, 1, running(6))
    said: list[str] = []
    with pytest.raises(AlreadyRunning, match=r"4711 on elsewhere.*p3d cancel.*--takeover"):
        claim(store, {}, takeover=False, say=said.append)
    assert newest_number(store) == 1
    assert heartbeat(store, 1) == running(6)
    assert watch.slept_s == [BOTH_PERIODS_S]
    assert "elsewhere" in said[0]
    assert f"{BOTH_PERIODS_S:.0f} s" in said[0]


def test_a_run_that_stands_still_is_followed(local: LocalStore, watch: Watch) -> None:
    """A claim after a run whose heartbeat did not move for two periods gets the next number."""
    record(local, 1, host="elsewhere")
    beat(local, 1, running(5))
    assert claimed(local).number == 2
    assert watch.slept_s == [BOTH_PERIODS_S]


def test_a_run_that_never_beat_is_watched_and_followed(local: LocalStore, watch: Watch) -> None:
    """A run elsewhere that left a record and no heartbeat is given two periods to show one, then it is followed."""
    record(local, 1, host="elsewhere")
    said: list[str] = []
    assert claim(local, {}, takeover=False, say=said.append).number == 2
    assert watch.slept_s == [BOTH_PERIODS_S]
    assert len(said) == 1


def test_a_takeover_does_not_wait(local: LocalStore, watch: Watch) -> None:
    """--takeover gets the next number at once and without a message, also from a live run, whose heartbeat stays."""
    record(local, 1)
    beat(local, 1, running(5))
    said: list[str] = []
    assert claim(local, {}, takeover=True, say=said.append).number == 2
    assert (watch.slept_s, said) == ([], [])
    assert heartbeat(local, 1) == running(5)
    assert newest_number(local) > 1  # this tells the previous run that it is superseded


def test_a_run_that_ended_or_died_here_is_not_waited_for(local: LocalStore, watch: Watch, dead_pid: int) -> None:
    """After a run that finished, or whose process has ended on this boot, a claim does not wait or print."""
    said: list[str] = []
    record(local, 1, pid=dead_pid)
    beat(local, 1, running(5))
    assert claim(local, {}, takeover=False, say=said.append).number == 2
    beat(local, 2, RunSnapshot(counter=9, state="stopped"))
    assert claim(local, {}, takeover=False, say=said.append).number == 3
    assert (watch.slept_s, said) == ([], [])


def test_a_claim_that_another_one_precedes_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that starts between the check and the claim wins. The late claim is refused and changes nothing."""
    create = store.create

    def late(key: str, source: bytes | Path) -> Created:
        monkeypatch.undo()
        claimed(store, workers=1)
        beat(store, 1, running(7))
        return create(key, source)

    monkeypatch.setattr(store, "create", late)
    with pytest.raises(AlreadyRunning, match="at this moment"):
        claimed(store, workers=2)
    assert newest_epoch(store).options == {"workers": 1}
    assert newest_number(store) == 1
    assert heartbeat(store, 1) == running(7)


class MeetsAtTheClaim(LocalStore):
    """All claims have read the newest epoch before the first one creates its record."""

    def __init__(self, url: str, n_claims: int) -> None:
        super().__init__(url)
        self.barrier = threading.Barrier(n_claims, timeout=20)

    def create(self, key: str, source: bytes | Path) -> Created:
        if key.startswith("_job/epochs/"):
            self.barrier.wait()
        return super().create(key, source)


def race(store: Store, n_claims: int, *, takeover: bool = False) -> tuple[list[Epoch], list[Exception]]:
    """Several claims at once, each with its own options -> those that won, and the errors of the others."""
    won: list[Epoch] = []
    lost: list[Exception] = []
    start = threading.Barrier(n_claims, timeout=20)

    def one(workers: int) -> None:
        start.wait()
        try:
            won.append(claimed(store, takeover=takeover, workers=workers))
        except Exception as error:  # noqa: BLE001 - the test looks at it
            lost.append(error)

    threads = [threading.Thread(target=one, args=(at,)) for at in range(n_claims)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return won, lost


@pytest.mark.fault(41)
def test_of_two_claims_at_once_one_wins(tmp_path: Path, watch: Watch) -> None:
    """However two claims interleave, exactly one run is active, and the other one gets an error."""
    for at in range(ROUNDS):
        store = LocalStore(str(tmp_path / str(at)))

        def the_winner_works(store: Store = store) -> None:
            beat(store, 1, running(1 + (heartbeat(store, 1) or running(0)).counter))

        watch.meanwhile = the_winner_works
        won, lost = race(store, 2)
        assert [type(error) for error in lost] == [AlreadyRunning]
        assert [newest_epoch(store)] == won
        assert newest_number(store) == 1


@pytest.mark.parametrize("takeover", [False, True])
@pytest.mark.fault(41)
def test_of_claims_that_saw_the_same_run_one_wins(tmp_path: Path, takeover: bool, dead_pid: int) -> None:
    """Four claims that all found the same newest run create one record between them, with --takeover too."""
    for at in range(ROUNDS // 2):
        store = MeetsAtTheClaim(str(tmp_path / str(at)), 4)
        record(LocalStore(store.url), 1, pid=dead_pid)
        won, lost = race(store, 4, takeover=takeover)
        assert [type(error) for error in lost] == [AlreadyRunning] * 3
        assert [newest_epoch(store)] == won
        assert newest_number(store) == 2


class LosesTheReply(LocalStore):
    """As S3 does when the reply to a PUT is lost and botocore repeats it: our own object exists already."""

    def create(self, key: str, source: bytes | Path) -> Created:
        super().create(key, source)
        return EXISTS


def test_a_claim_recognises_its_own_record(tmp_path: Path) -> None:
    """A claim whose reply was lost, so that its repetition finds the record, is still valid."""
    store = LosesTheReply(str(tmp_path / "out"))
    assert claimed(store).number == 1
    assert newest_epoch(store).pid == os.getpid()


# ---- alive or dead ----------------------------------------------------------------------------------------------

ELSEWHERE = {"host": "elsewhere", "boot_id": "another boot"}
HOSTS = {"here": {}, "rebooted": {"boot_id": "an earlier boot"}, "elsewhere": ELSEWHERE}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("before", "meanwhile", "live"),
    [
        (running(5), None, False),
        (running(5), running(5), False),
        (running(5), running(6), True),
        (running(5), running(4), True),  # any change counts: no order of counters is assumed
        (running(5), RunSnapshot(counter=6, state="stopped"), False),
        (running(0), running(1), True),
        (None, None, False),
        (None, running(0), True),
        (None, RunSnapshot(counter=1, state="finished"), False),
    ],
)
def test_a_run_lives_if_its_counter_moves(
    local: LocalStore, host: str, before: RunSnapshot | None, meanwhile: RunSnapshot | None, live: bool
) -> None:
    """Only a running heartbeat that changes or starts within two periods is alive, on whatever host the run is."""
    epoch = record(local, 3, **HOSTS[host])
    if before is not None:
        beat(local, 3, before)
    watch = Watch(lambda: meanwhile is not None and beat(local, 3, meanwhile))
    assert is_live(local, epoch, sleep=watch) is live
    assert watch.slept_s == [BOTH_PERIODS_S]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_a_run_that_ended_is_dead_at_once(local: LocalStore, host: str, state: str) -> None:
    """A heartbeat that says the run is over is believed without watching it."""
    epoch = record(local, 1, **HOSTS[host])
    beat(local, 1, RunSnapshot(counter=5, state=state))
    watch = Watch()
    assert not is_live(local, epoch, sleep=watch)
    assert watch.slept_s == []


@pytest.mark.parametrize("beats", [False, True])
def test_a_dead_process_of_this_boot_is_dead_at_once(local: LocalStore, beats: bool, dead_pid: int) -> None:
    """A run whose process has ended since this boot is dead without watching, whatever its last heartbeat says."""
    epoch = record(local, 1, pid=dead_pid)
    if beats:
        beat(local, 1, running(5))
    watch = Watch(lambda: beat(local, 1, running(6)))
    assert epoch.died_here()
    assert not is_live(local, epoch, sleep=watch)
    assert watch.slept_s == []


@pytest.mark.parametrize(
    "fields", [{"host": "elsewhere"}, {"boot_id": "an earlier boot"}, ELSEWHERE, {"boot_id": ""}], ids=str
)
def test_a_process_number_means_nothing_elsewhere(fields: dict, dead_pid: int, local: LocalStore) -> None:
    """On another host or boot, or where boots have no id, a missing process proves nothing: the run is watched."""
    epoch = record(local, 1, pid=dead_pid, **fields)
    beat(local, 1, running(5))
    watch = Watch(lambda: beat(local, 1, running(6)))
    assert not epoch.died_here()
    assert is_live(local, epoch, sleep=watch)
    assert watch.slept_s == [BOTH_PERIODS_S]


def test_where_boots_have_no_id_no_run_died_here(monkeypatch: pytest.MonkeyPatch, dead_pid: int) -> None:
    """Two empty boot ids are not the same boot, so a process id is not trusted after a reboot."""
    monkeypatch.setattr(control, "boot_id", lambda: "")
    assert not Epoch(1, platform.node(), "", dead_pid, "", {}).died_here()


def test_this_process_has_not_died() -> None:
    """A run of a process that is here did not die here."""
    assert not Epoch(1, platform.node(), machine.boot_id(), os.getpid(), "", {}).died_here()


def test_without_a_heartbeat_it_is_none(store: Store) -> None:
    """An epoch that does not exist, or wrote no heartbeat, has none."""
    assert heartbeat(store, 1) is None
    record(store, 1)
    assert heartbeat(store, 1) is None


def test_a_heartbeat_is_the_last_one(store: Store) -> None:
    """A heartbeat replaces the one before it, of its own epoch only; its JSON has the keys that every version reads."""
    snapshot = replace(RunSnapshot.from_json(WHOLE), counter=2, exit_code=6, sentence="é \x1b[31m")
    beat(store, 1, running(1))
    beat(store, 2, running(8))
    beat(store, 1, snapshot)
    assert heartbeat(store, 1) == snapshot
    assert heartbeat(store, 2) == running(8)
    written = WHOLE | {"counter": 2, "exit_code": 6, "sentence": "é \x1b[31m"}
    assert json.dumps(json.loads(store.read("_job/heartbeats/000001.json"))) == json.dumps(written)
    assert json.loads(store.read("_job/heartbeats/000002.json")) == {"counter": 8, "state": RUNNING}


# ---- cancel and sweep -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("now", [False, True])
def test_a_request_to_stop_reaches_its_run_only(store: Store, now: bool) -> None:
    """A cancel request is seen, with its `now`, by the epoch it names and by no other."""
    assert cancel_asked(store, 2) is None
    ask_cancel(store, 2, now=now)
    assert cancel_asked(store, 2) == {"now": now}
    assert cancel_asked(store, 1) is None
    assert cancel_asked(store, 3) is None


def test_a_later_request_replaces_the_earlier(local: LocalStore) -> None:
    """After a request to drain, a request to stop at once is possible."""
    ask_cancel(local, 1, now=False)
    ask_cancel(local, 1, now=True)
    assert cancel_asked(local, 1) == {"now": True}


def test_a_request_to_stop_does_not_stop_the_next_run(local: LocalStore) -> None:
    """A resume after a cancel is not cancelled by it."""
    ask_cancel(local, claimed(local).number, now=True)
    assert cancel_asked(local, claimed(local, takeover=True).number) is None


def test_a_sweep_removes_temporary_files_only(store: Store) -> None:
    """sweep_temps removes the files in _job/tmp that p3d names so, returns their number, and changes nothing else."""
    mine = "0" * 32 + ".tmp"
    kept = ["clips/a.parquet", "videos/tmp/b.parquet", "_job/tmpfile", "_job/probe/x"]
    kept += [f"_job/tmp/{name}" for name in (f"deep/3-{mine}", "letter.tmp", f"1-{mine}.odt", f"x-{mine}", "1-a.tmp")]
    for key in kept:
        store.create(key, b"kept")
    claimed(store)
    ask_cancel(store, 1, now=False)
    control_keys = ["_job/cancel/000001.json", "_job/epochs/000001.json", "_job/heartbeats/000001.json"]
    for name in (f"1-{mine}", f"22-{mine}"):
        store.replace(f"_job/tmp/{name}", b"left over")
    assert sweep_temps(store) == 2
    assert {info.key for info in store.list()} == {*kept, *control_keys}
    assert store.read("clips/a.parquet") == b"kept"
    assert sweep_temps(store) == 0


def test_a_sweep_of_a_fresh_output_finds_nothing(local: LocalStore) -> None:
    """Where there is no _job/tmp there is nothing to sweep."""
    assert sweep_temps(local) == 0


# ---- facts of this machine --------------------------------------------------------------------------------------


def test_a_process_is_alive_until_it_is_gone() -> None:
    """A child is alive while it runs and not after its end."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        assert machine.is_alive(process.pid)
    assert not machine.is_alive(process.pid)


def test_a_process_of_another_user_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that we may not signal exists."""

    def refuse(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", refuse)
    assert machine.is_alive(1)


def test_cores_are_those_this_process_may_use() -> None:
    """A process that is pinned to one core counts one, whatever the machine has."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert machine.usable_cpus() == len(before)


@pytest.mark.parametrize(("n_cores", "usable"), [(6, 6), (None, 1)])
def test_without_affinity_all_cores_count(monkeypatch: pytest.MonkeyPatch, n_cores: int | None, usable: int) -> None:
    """Without CPU affinity all cores of the machine count, and at least one."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: n_cores)
    assert machine.usable_cpus() == usable


def test_a_boot_has_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The boot id is the kernel's, with the container's pid namespace. Without such a file it is empty."""
    name = tmp_path / "boot_id"
    namespace = tmp_path / "pid"
    namespace.symlink_to("pid:[4026531836]")
    monkeypatch.setattr(machine, "BOOT_ID", name)
    monkeypatch.setattr(machine, "PID_NAMESPACE", namespace)
    assert machine.boot_id() == ""
    name.write_text("6fd5a1d0-0000-4000-8000-c0ffee000000\n")
    assert machine.boot_id() == machine.boot_id() == "6fd5a1d0-0000-4000-8000-c0ffee000000 pid:[4026531836]"


@pytest.mark.parametrize("newer", [True, False])
def test_a_write_whose_file_a_newer_run_removed_is_not_an_outage(local: LocalStore, newer: bool) -> None:
    """While a run prepares, its temporary files may be swept by one that took over: refused (5), not an outage (6)."""
    record(local, 1)
    if newer:
        record(local, 2)
    with pytest.raises(AlreadyRunning if newer else StoreUnknown, match="was removed"), control.Pulse(local, 1):
        raise StoreUnknown("x.tmp was removed while in use")


@pytest.mark.parametrize(("name", "times"), [("create", 1), ("replace", 1), ("create", 2), ("create", 3)])
def test_a_claim_whose_file_was_swept_is_tried_again(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch, name: str, times: int
) -> None:
    """The previous run removes temporary files, including that of the run which takes over. After three times it counts
    as an outage."""
    true, failed = getattr(local, name), []

    def swept(*given: Any, **named: Any) -> Any:
        if len(failed) < times:
            failed.append(given)
            raise StoreUnknown("x.tmp was removed while in use")
        return true(*given, **named)

    monkeypatch.setattr(local, name, swept)
    with contextlib.nullcontext() if times < 3 else pytest.raises(StoreUnknown):
        epoch = control.claim(local, {}, takeover=True, say=print)
        assert control.newest_epoch(local) == epoch and control.heartbeat(local, epoch.number)


# ---- files that are not ours, or not whole ------------------------------------------------------------------------


@pytest.mark.fault(58)
def test_stray_files_are_skipped_and_named(local: LocalStore) -> None:
    """Files of a file manager or an editor among the epochs are no runs: each is named, and the true ones are found."""
    claimed(local, takeover=True)
    strays = [".DS_Store", "._000001.json", "000002.json.swp", "2.json", "000009.txt", "deep/000009.json"]
    for name in strays:
        local.replace(f"_job/epochs/{name}", b"\x00\x05\x16\x07")
    with pytest.warns(StrayFile) as warned:
        assert newest_number(local) == 1
        assert newest_epoch(local) == claimed_record(local, 1)
    said = {str(one.message).partition(" is not")[0].rpartition("/epochs/")[2] for one in warned}
    assert said == set(strays)
    assert claimed(local, takeover=True).number == 2


@pytest.mark.parametrize(
    "content", [b"", b'{"number": 2, "host"', b"[]", b"[" * 100_000, b'{"number": 2}', b"\xff\xfe"]
)
@pytest.mark.fault(58)
def test_a_record_of_a_run_that_cannot_be_read_is_named_and_its_number_is_used(
    local: LocalStore, content: bytes
) -> None:
    """An empty or half record stops nobody: the options are those of the run before, the next run has a new number."""
    first = claimed(local, takeover=True)
    local.replace("_job/epochs/000002.json", content)
    with pytest.warns(StrayFile, match=r"epochs/000002\.json cannot be read and is skipped"):
        found = newest_epoch(local)
    assert found is not None and (found.number, found.options) == (2, first.options)
    assert not found.died_here()
    assert claimed(local, takeover=True).number == 3


def claimed_record(store: Store, number: int) -> Epoch:
    return Epoch(**json.loads(store.read(f"_job/epochs/{number:06d}.json")))


WHOLE = {  # as a run writes it
    "schema_version": 1,
    "epoch": 1,
    "counter": 1,
    "state": RUNNING,
    "outage": "no answer",
    "stopping": "cancelled",
    "elapsed_s": 2.5,
    "shards": {"all": 2, "done": 1},
    "videos": {"all": 3, "done": 1, "failed": 1},
    "counted": True,
    "clips": 4,
    "clips_per_s": 1.6,
    "eta_s": None,
    "failures": {"truncated": 1},
    "workers": [
        {
            "worker": 0,
            "state": "busy",
            "device": "cpu",
            "host": "here",
            "shards": ["1/0"],
            "videos": 1,
            "clips": 4,
            "load": asdict(Load(0.5, 0.9, 0.1, 4, 0.0, 1.5)),
            "limit": "decoding",
        }
    ],
}


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


def test_a_heartbeat_may_have_fewer_and_other_keys(local: LocalStore) -> None:
    """A missing value is the default of its field, in a worker as well, and keys of a later version are left out."""
    whole, (worker,) = RunSnapshot.from_json(WHOLE), WHOLE["workers"]
    default = RunSnapshot(counter=1, state=RUNNING)
    for name in WHOLE.keys() - {"counter", "state", "shards", "clips", "failures"}:
        less = RunSnapshot.from_json(without(WHOLE, name) | {"new": [1]})
        assert less == replace(whole, **{name: getattr(default, name)}), name
    for name in ("shards", "clips", "failures"):  # a run writes them with `videos`
        assert RunSnapshot.from_json(without(WHOLE, name)) == default, name
    for name, value in {"host": "", "limit": None, "load": Load()}.items():
        (found,) = RunSnapshot.from_json({**WHOLE, "workers": [without(worker, name)]}).workers
        assert found == replace(whole.workers[0], **{name: value})
    for load in ({}, None):
        assert RunSnapshot.from_json({**WHOLE, "workers": [{**worker, "load": load}]}).workers[0].load == Load()


@pytest.mark.parametrize(
    "change",
    [
        {"state": 5},
        {"counter": "1"},
        {"counter": True},
        {"videos": {"all": 3}},
        {"videos": [1]},
        {"shards": None},
        {"clips": 1.5},
        {"clips": 10**400},
        {"eta_s": float("inf")},
        {"eta_s": float("nan")},
        {"failures": {"truncated": "many"}},
        {"workers": {"worker": 0}},
        {"workers": [{}]},
        {"workers": [{**WHOLE["workers"][0], "shards": [1]}]},
        {"workers": [{**WHOLE["workers"][0], "load": {"decoding": "all"}}]},
        {"workers": [{**WHOLE["workers"][0], "load": {"inference_threads": 0.5, "decoding": 0.5}}]},
        {"workers": [{**WHOLE["workers"][0], "load": {**WHOLE["workers"][0]["load"], "queued": 10**400}}]},
        {"workers": [{**WHOLE["workers"][0], "limit": ["network"]}]},
        {"workers": [without(WHOLE["workers"][0], "clips")]},
        {"sentence": ["done"]},
    ],
)
@pytest.mark.fault(58)
def test_a_heartbeat_of_another_form_is_not_shown(local: LocalStore, change: dict[str, Any]) -> None:
    """A value of another type than those that a run writes is never shown; state and counter still say who is alive."""
    local.replace("_job/heartbeats/000001.json", json.dumps(WHOLE | change).encode())
    assert heartbeat(local, 1) == (None if {"state", "counter"} & change.keys() else running(1))
    for content in (b"[1]", b"null", b'"running"'):
        local.replace("_job/heartbeats/000001.json", content)
        local.replace("_job/cancel/000001.json", content)
        local.replace("_job/submitted.json", content)
        assert heartbeat(local, 1) is cancel_asked(local, 1) is None
        assert control.not_begun(local, 0) == ""


@pytest.mark.fault(56)
def test_a_fifo_in_the_place_of_a_record_is_named_and_nobody_waits(local: LocalStore) -> None:
    """A fifo or a link as heartbeat, cancel request or epoch counts as missing; it is never opened."""
    claimed(local, takeover=True)
    for name in ("heartbeats/000001.json", "cancel/000001.json"):
        local.delete(f"_job/{name}")
        (local.root / "_job" / name).parent.mkdir(exist_ok=True)
        os.mkfifo(local.root / "_job" / name)
    (local.root / "_job" / "epochs" / "000002.json").symlink_to("/dev/zero")
    with pytest.warns(StrayFile):
        assert heartbeat(local, 1) is cancel_asked(local, 1) is None
        assert newest_number(local) == 1
