"""Quick and deep verify, and repair: files damaged after the commit are found, moved aside and made again."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from random import Random

import pytest

from p3d.jobs.cli import cli
from p3d.jobs.cli.output import run_cli
from p3d.jobs.scheduler import control
from p3d.pipeline.dataset.commit import clips_key, commit_shard, failures_key, videos_key
from p3d.pipeline.dataset.plans import Manifest
from p3d.pipeline.dataset.repair import repair
from p3d.pipeline.dataset.verify import audit
from p3d.pipeline.errors import StoreUnknown
from p3d.pipeline.recipe import JobRecord
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import Store
from tests.conftest import p3d
from tests.owned import own
from tests.pipeline.rows import planned, recipe, shard_rows

NAMES = tuple("abcdefghij")
JOB = JobRecord(recipe(), "random:0", {})
FLIPS = int(os.environ.get("P3D_FLIPS", "60"))


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


@pytest.fixture
def manifest(store: LocalStore) -> Manifest:
    found = planned(store, NAMES)
    commit_all(store, found)
    own(store)
    return found


def commit_all(store: Store, manifest: Manifest) -> None:
    """Commit every shard that is not committed yet, as a resume does."""
    for shard in range(manifest.plan.n_shards):
        if store.head(clips_key(manifest.shard(shard).name)) is None:
            commit_shard(store, shard_rows(manifest, shard), recipe(), manifest.user_columns(shard))


def files(store: LocalStore) -> dict[str, bytes]:
    return {
        str(path.relative_to(store.root)): path.read_bytes()
        for folder in ("clips", "videos", "failures")
        for path in sorted((store.root / folder).glob("*"))
    }


def flip(path: Path, rng: Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


@pytest.mark.fault(45)
def test_a_flipped_bit_is_found_and_repaired(store: LocalStore, manifest: Manifest) -> None:
    """Every random flip in any data file is found by a deep audit; repair and resume give the same bytes again.

    P3D_FLIPS sets how many.
    """
    rng, whole = Random(20261123), files(store)
    for trial in range(FLIPS):
        key = rng.choice(sorted(whole))
        flip(store.root / key, rng)
        found = audit(store, JOB)
        assert found.damaged, f"flip {trial} of {key}"
        done = repair(store, recipe(), found)
        assert len(done.reopened) == key.startswith("clips/"), f"flip {trial} of {key}"
        commit_all(store, manifest)
        again = audit(store, JOB)
        assert not again.damaged
        assert not again.pending
        assert files(store) == whole
    aside = list((store.root / "_job" / "damaged").rglob("*.*"))
    assert not [path for path in aside if path.suffix == ".parquet"], "a glob of the dataset would find these"


@pytest.mark.parametrize("spoil", [clips_key, videos_key, failures_key])
def test_the_quick_audit_reads_footers_only_and_finds_files_that_are_not_whole(
    store: LocalStore, manifest: Manifest, spoil: object
) -> None:
    """Quick and deep agree on a whole dataset; a file that was cut is named by the quick one too."""
    quick, deep = audit(store, JOB, deep=False), audit(store, JOB)
    assert quick == deep
    key = spoil(manifest.shard(1).name)  # type: ignore[operator]
    (store.root / key).write_bytes((store.root / key).read_bytes()[:-9])
    found = audit(store, JOB, deep=False)
    assert found.changed
    assert key in found.problems[0]


def test_the_quick_audit_finds_pooled_rows_of_other_clips(store: LocalStore, manifest: Manifest) -> None:
    """Derived files that name other source bytes than the stored ones are changed, not ok."""
    other = LocalStore(str(store.root.parent / "other"))
    found = planned(other, NAMES)
    commit_shard(other, shard_rows(found, 0, seed=5, frames=(40, 40, 40, 0)), recipe(), found.user_columns(0))
    key = videos_key(manifest.shard(0).name)
    (store.root / key).write_bytes(other.read(key))
    assert audit(store, JOB, deep=False).bad_derived == {key}


def test_files_of_no_plan_are_told_and_left(store: LocalStore, manifest: Manifest) -> None:
    """Repair touches nothing that it did not make."""
    alien = store.root / "clips" / "holiday.parquet"
    alien.write_bytes(b"mine")
    before = files(store)
    done = repair(store, recipe(), audit(store, JOB))
    assert done.moved == ()
    assert files(store) == before
    assert audit(store, JOB).unexpected == 1


class Dies(LocalStore):
    """A store whose process is killed after a number of moves and creates."""

    def __init__(self, url: str, left: int) -> None:
        super().__init__(url)
        self.left = left

    def _tick(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise StoreUnknown("killed")

    def set_aside(self, key: str) -> str:
        self._tick()
        return super().set_aside(key)

    def create(self, key, source):  # type: ignore[no-untyped-def]
        self._tick()
        return super().create(key, source)


@pytest.mark.fault(1)
def test_a_repair_that_is_killed_is_finished_by_the_next(
    store: LocalStore, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill at any step, the next repair and a resume give the undamaged dataset."""
    monkeypatch.setattr("p3d.pipeline.dataset.commit.CREATE_TRIES", 1)
    monkeypatch.setattr("p3d.pipeline.dataset.commit.PAUSE_S", 0.0)
    whole, rng, steps = files(store), Random(1), 0
    for steps in range(12):
        for key in (clips_key(manifest.shard(0).name), videos_key(manifest.shard(1).name)):
            flip(store.root / key, rng)
        dying = Dies(store.url, steps)
        with contextlib.suppress(StoreUnknown):
            repair(dying, recipe(), audit(store, JOB))
        repair(store, recipe(), audit(store, JOB))
        commit_all(store, manifest)
        assert files(store) == whole, f"killed after {steps} steps"
        if dying.left >= 0:
            break
    assert 4 <= steps < 11, "the kill points were not all there are"


def test_repair_from_the_command_line(store: LocalStore, manifest: Manifest) -> None:
    """`verify --repair` lists what it moved and made, and exits 6 while a shard is pending; then all is clean."""
    rng, whole = Random(2), files(store)
    flip(store.root / clips_key(manifest.shard(0).name), rng)
    (store.root / failures_key(manifest.shard(2).name)).write_bytes(b"")
    assert p3d("verify", store.url, "--deep").code == 7
    ran = p3d("verify", store.url, "--repair")
    assert ran.code == 6, ran.err
    assert "moved" in ran.out
    assert "p3d resume" in ran.err
    assert p3d("status", store.url, "--json").json["state"] == "stopped"
    commit_all(store, manifest)
    assert files(store) == whole
    ran = p3d("verify", store.url)
    assert (ran.code, "--deep checks every row" in ran.err) == (0, True)


def test_repair_keeps_out_while_a_run_is_live(
    store: LocalStore, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a run has a heartbeat, repair exits with code 5 and moves nothing."""
    monkeypatch.setattr(control, "HEARTBEAT_S", 0.1)
    epoch = control.claim(store, {}, takeover=False, say=print)
    (store.root / failures_key(manifest.shard(2).name)).write_bytes(b"")
    monkeypatch.setattr("sys.argv", ["p3d", "verify", store.url, "--repair"])
    with control.Pulse(store, epoch.number):
        assert run_cli(cli) == 5
    assert not (store.root / "_job" / "damaged").exists()
