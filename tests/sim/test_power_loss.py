"""The local store on a simulated disk: power loss, or a failing system call, at every single call of `create`."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p3d.jobs.scheduler import control
from p3d.jobs.scheduler.run_snapshot import RunSnapshot
from p3d.pipeline.errors import StoreError
from p3d.pipeline.storage import local as store_module
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import CREATED, EXISTS
from tests.sim.disk import FOLDER, Disk
from tests.sim.store import Died

KEY, WHOLE, OTHER = "clips/a.parquet", b"a whole shard", b"another whole shard"
Patch = pytest.MonkeyPatch


def create_bytes(store: LocalStore) -> str:
    return store.create(KEY, WHOLE)


def create_file(store: LocalStore) -> str:
    with store.temp_file() as path:
        path.write_bytes(WHOLE)
        return store.create(KEY, path)


def in_an_empty_output(store: LocalStore, disk: Disk) -> None:
    """There is no output yet."""


def next_to_another_object(store: LocalStore, disk: Disk) -> None:
    """The folders and another object exist."""
    store.create("clips/b.parquet", OTHER)


def where_another_was_first(store: LocalStore, disk: Disk) -> None:
    """The key already exists."""
    store.create(KEY, OTHER)


def in_a_folder_that_is_not_synced(store: LocalStore, disk: Disk) -> None:
    """Another process has just created the folder and not synced it yet."""
    disk.now |= {"clips": FOLDER}
    os.makedirs(disk.root / "clips")  # noqa: PTH103 - Path.mkdir is watched


SITUATIONS = (in_an_empty_output, next_to_another_object, where_another_was_first, in_a_folder_that_is_not_synced)
every_create = pytest.mark.parametrize(
    ("create", "situation"),
    [*itertools.product((create_bytes, create_file), SITUATIONS)],
    ids=lambda value: value.__name__,
)


@contextlib.contextmanager
def watched(folder: Path, situation: Callable[[LocalStore, Disk], None]) -> Any:
    """A store on a watched disk in the given situation; calls are counted from then on."""
    with pytest.MonkeyPatch.context() as patch:
        root = folder / "out"
        disk = Disk(root, patch)
        root.mkdir(parents=True)
        situation(LocalStore(str(root)), disk)
        disk.durable["."] = FOLDER
        disk.calls = 0
        yield LocalStore(str(root)), disk


def check_all(disk: Disk, expected: bytes, *, durable: bool) -> int:
    """In every state after a power loss, a visible Parquet file is complete, and it exists if that was promised.

    Returns the number of states.
    """
    n = 0
    for n, left in enumerate(disk.after_power_loss(), 1):  # noqa: B007 - the number of states
        for name, content in left.items():
            if name.endswith(".parquet"):
                assert content in (WHOLE, OTHER), f"{name} holds {content!r} after a power loss"
        if KEY in left:
            assert left[KEY] == expected, f"{KEY} holds {left[KEY]!r}"
        assert KEY in left or not durable, f"{KEY} was promised, but a power loss removed it: {sorted(left)}"
    return n


def check_powers(
    create: Callable[[LocalStore], str], situation: Callable[..., None], tmp_path: Path
) -> tuple[int, int]:
    """Lose power before the nth call, n = 1, 2, 3 ..., and after the last; return the numbers of points and states."""
    first = situation is where_another_was_first
    n_states = 0
    for nth in itertools.count(1):
        with watched(tmp_path / str(nth), situation) as (store, disk):
            disk.die_at = nth
            reply = None
            with contextlib.suppress(Died):
                reply = create(store)
            n_states += check_all(disk, OTHER if first else WHOLE, durable=first or reply is not None)
            visible = {path.name for path in disk.root.rglob("*.parquet")}  # to a reader, without a power loss
            assert all(path.read_bytes() in (WHOLE, OTHER) for path in disk.root.rglob("*.parquet")), visible
            if reply is not None:
                assert reply == (EXISTS if first else CREATED)
                return nth, n_states
            disk.die_at = 0
            again = create(LocalStore(store.url))
            assert again == EXISTS or not first
            n_states += check_all(disk, OTHER if first else WHOLE, durable=True)
    raise AssertionError("unreachable")


@pytest.mark.fault(37)
@every_create
def test_a_power_loss_leaves_a_whole_object_or_none(create: Callable, situation: Callable, tmp_path: Path) -> None:
    """Any unsynced writes and links may be lost at any call; an object that `create` promised remains."""
    points, states = check_powers(create, situation, tmp_path)
    print(f"{create.__name__} {situation.__name__}: {points} points, {states} states")
    assert points > 5
    assert states > points


@pytest.mark.fault(36, 38)
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EPERM], ids=errno.errorcode.get)
@every_create
def test_a_failing_call_leaves_no_half_object(
    create: Callable, situation: Callable, number: int, tmp_path: Path
) -> None:
    """Every call of `create` fails, before or after its effect: a StoreError, no temporary file, a correct retry."""
    first = situation is where_another_was_first
    failed = set()
    for nth, after in ((nth, after) for nth in itertools.count(1) for after in (False, True)):
        with watched(tmp_path / f"{nth}{after}", situation) as (store, disk):
            disk.fail_at, disk.after, disk.error = nth, after, OSError(number, os.strerror(number))
            reply = None
            try:
                reply = create(store)
            except StoreError as error:
                assert str(error)
            failed.add(disk.failed)
            n = check_all(disk, OTHER if first else WHOLE, durable=first or reply is not None)
            assert n
            left = [path.name for path in disk.root.rglob("*.tmp")]
            assert not left or disk.failed == "unlink", f"{disk.failed} failed and left {left}"
            if not disk.failed:
                break
            assert create(LocalStore(store.url)) in (CREATED, EXISTS)
            check_all(disk, OTHER if first else WHOLE, durable=True)
    assert failed >= {"write_bytes", "fsync", "link", "close", "unlink", "open"}


@pytest.mark.fault(37)
def test_a_control_file_that_a_power_loss_emptied_stops_nobody(tmp_path: Path) -> None:
    """Heartbeats and cancel requests are replaced without a sync; damaged ones are read as missing."""
    with watched(tmp_path / "disk", in_an_empty_output) as (store, disk):
        store.replace("_job/heartbeats/000001.json", b'{"state": "running", "counter": 1}')
        store.replace("_job/cancel/000001.json", b'{"now": true}')
        states = list(disk.after_power_loss())
    assert any(content == b"" for left in states for content in left.values())
    for at, left in enumerate(states):
        found = LocalStore(str(tmp_path / str(at)))
        for key, content in left.items():
            found.replace(key, content)
        assert control.heartbeat(found, 1) in (None, RunSnapshot(counter=1, state="running"))
        assert control.cancel_asked(found, 1) in (None, {"now": True})


# ---- mutants ------------------------------------------------------------------------------------------------------


def skips_fsync_of_the_file(patch: Patch) -> None:
    """The file is linked without being synced."""
    true = store_module.fsync
    patch.setattr(store_module, "fsync", lambda path, at=None: true(path, at) if path.is_dir() else None)


def skips_fsync_of_the_folder(patch: Patch) -> None:
    """The link is not synced."""
    true = store_module.fsync
    patch.setattr(store_module, "fsync", lambda path, at=None: None if path.name == "clips" else true(path, at))


def links_before_it_syncs(patch: Patch) -> None:
    """The object is visible a moment before it is durable."""

    def link(self, temp, final):
        try:
            store_module.os.link(temp, final)
        except FileExistsError:
            return EXISTS
        store_module.fsync(temp)
        store_module.fsync(final.parent)
        return CREATED

    patch.setattr(LocalStore, "_link", link)


def renames(patch: Patch) -> None:
    """The temporary file is renamed over any existing object."""

    def rename(self, temp, final):
        store_module.fsync(temp)
        temp.replace(final)
        store_module.fsync(final.parent)
        return CREATED

    patch.setattr(LocalStore, "_link", rename)


def writes_in_place(patch: Patch) -> None:
    """No temporary file: the object grows under its own name."""

    def create(self, key, source):
        final = self.root / key
        self._folder(final.parent)
        if final.exists():
            return EXISTS
        final.write_bytes(source if isinstance(source, bytes) else source.read_bytes())
        store_module.fsync(final)
        store_module.fsync(final.parent)
        return CREATED

    patch.setattr(LocalStore, "create", create)


def builds_among_the_data(patch: Patch) -> None:
    """The temporary file is in clips/, and its name ends in .parquet."""

    @contextlib.contextmanager
    def temp_file(self):
        self._folder(self.root / "clips")
        path = self.root / "clips" / ".tmp.parquet"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    patch.setattr(LocalStore, "temp_file", temp_file)


def trusts_folders_of_others(patch: Patch) -> None:
    """An existing folder is assumed to be durable."""
    patch.setattr(LocalStore, "_folder", lambda self, folder: store_module.make_folder(folder))


def forgets_the_folder(patch: Patch) -> None:
    """New folders are not synced."""

    def make(self, folder):
        if not folder.is_dir():
            make(self, folder.parent)
            folder.mkdir(exist_ok=True)

    patch.setattr(LocalStore, "_folder", make)


MUTANTS = [
    skips_fsync_of_the_file,
    skips_fsync_of_the_folder,
    links_before_it_syncs,
    renames,
    writes_in_place,
    builds_among_the_data,
    trusts_folders_of_others,
    forgets_the_folder,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_store_with_this_defect_is_caught(mutant: Callable[[Patch], None], tmp_path: Path) -> None:
    """After some power loss, or for some reader, an object is incomplete or a promised one is missing."""
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        with pytest.raises(AssertionError) as caught:
            for create, situation in itertools.product((create_bytes, create_file), SITUATIONS):
                check_powers(create, situation, tmp_path / create.__name__ / situation.__name__)
    print(str(caught.value).splitlines()[0])
