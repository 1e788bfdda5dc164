"""One simulated job: the faults that may happen to it, the commands of users, and the invariants at the end."""

from __future__ import annotations

import contextlib
import signal
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from p3d.jobs import job
from p3d.jobs.planning import prepare as planning
from p3d.jobs.scheduler import control
from p3d.jobs.scheduler.run import ClaimedRun, run_job
from p3d.jobs.scheduler.run_snapshot import VideoCounts
from p3d.pipeline.dataset import commit, schema, verify
from p3d.pipeline.dataset import plans as manifest
from p3d.pipeline.errors import JobError, OtherRecipe
from p3d.pipeline.recipe import RunOptions, ShardSizing
from p3d.pipeline.sources.listing import SourceListing
from p3d.pipeline.storage.store import StoreOptions
from tests.pipeline.rows import recipe, videos
from tests.sim.checked_store import CheckedStore
from tests.sim.cluster import FakeRay, frames_of, orphan
from tests.sim.view import View
from tests.sim.world import Process, World

SMALL, GROWN, CHANGED = tuple("abcd"), tuple("abcdef"), tuple("abCd")  # upper case: the file was replaced
SHARD_VIDEOS = 2
FINISHED = (0, 3)
EXIT_CODES = {0, 3, 5, 6, 143}
PREPARED = planning.Prepared(recipe(scores=True), None, b"weights", "random:0")  # type: ignore[arg-type] # no network here

# Probabilities per store operation and per step; each life draws one value of each.
PER_OPERATION = {
    "lost request": (0.0, 0.01, 0.1),
    "lost reply": (0.0, 0.01, 0.1),
    "delayed": (0.0, 0.03, 0.15),
    "slow": (0.0, 0.05, 0.2),
}
PER_STEP = {
    "driver killed": (0.0, 0.005, 0.02),
    "worker killed": (0.0, 0.01, 0.05),
    "worker cut off": (0.0, 0.01, 0.05),
    "kill does not arrive": (0.0, 0.5),
    "outage": (0.0, 0.0, 0.005, 0.02),
    "interrupt": (0.0, 0.0, 0.003, 0.01),
}
FAULTS = (
    "driver killed",
    "worker killed",
    "worker cut off, continues",
    "zombie commits",
    "commit arrives after its worker gave up",
    "another commit is there",
    "lost request",
    "lost reply",
    "delayed",
    "store outage",
    "interrupt",
    "two drivers at once",
    "taken over",
    "cancelled",
    "source grown or changed",
    "failures retried",
    "two plan at once",
    "temporary file swept",
)


class Life(World):
    """A simulated world with one job."""

    def __init__(self, seed: int, scratch: Path) -> None:
        super().__init__(seed)
        self.attempts: Counter[str] = Counter()
        self.store = CheckedStore(scratch)
        self.ray = FakeRay(self, self.store)
        self.rates = {name: self.rng.choice(rates) for name, rates in (PER_OPERATION | PER_STEP).items()}
        self.calm = self.rng.choice((0, 0, 30, 40, 60))  # steps before the first fault
        self.claimed: set[int] = set()
        self.ended: Counter[str] = Counter()

    # -- faults

    def strikes(self, fault: str, *, quiet: bool = False) -> bool:
        return self.steps >= self.calm and super().strikes(fault, quiet=quiet)

    def maybe_fault(self, process: Process) -> None:
        rates = self.rates
        if not rates or self.steps < self.calm:
            return
        draw = self.rng.random()
        for fault in ("driver killed", "worker killed", "worker cut off", "outage", "interrupt"):
            draw -= rates[fault]
            if draw < 0:
                self.apply_fault(fault)
                return

    def apply_fault(self, fault: str) -> None:
        if fault == "outage":
            self.out_until = max(self.out_until, self.clock + self.rng.choice((1.0, 20.0, 200.0)))
            return
        kind = "worker" if "worker" in fault else "driver"
        victims = [p for p in self.processes if p.kind == kind and p.alive and not p.given_up and p.thread]
        if not victims:
            return
        victim = self.rng.choice(victims)
        if fault == "interrupt":
            for handler in victim.signals:
                self.fired[fault] += 1
                handler(signal.SIGTERM, None)
        elif fault == "worker cut off":
            victim.notes["actor"].cut_off()
        else:
            self.fired[fault] += 1
            self.kill(victim, fault)

    # -- commands of users

    def driver(self, name: str, act: Any, *given: Any) -> Process:
        """A command line in its own process; its result is the exit code or the error."""

        def body() -> Any:
            try:
                code = act(View(self.store, self), *given)
                assert code in EXIT_CODES, f"{process.name} ends with {code}"
                self.ended[str(code)] += 1
            except OtherRecipe as error:
                self.fail(error)  # all commands here use the same recipe
            except JobError as error:
                self.fired["two plan at once"] += "planned at this moment" in str(error)
                self.ended[type(error).__name__] += 1
                return error
            return code

        process = self.spawn("driver", name, body, self.rng.choice(("host A", "host B")))
        process.on_end.append(partial(orphan, self, process))
        return process

    def claim(self, store: View, *, takeover: bool) -> tuple[control.Epoch, RunOptions]:
        me, rng = self.current, self.rng
        patience = rng.choice((20.0, 600.0))
        options = RunOptions(rng.randint(1, 2), 1, 1, 1, device="cpu", store_patience_s=patience)
        others = [p for p in self.processes if p.kind == "driver" and p.alive and p is not me and "epoch" in p.notes]
        epoch = control.claim(store, options.to_dict(), takeover=takeover, say=lambda _: None)
        me.notes["epoch"] = epoch.number
        assert epoch.number not in self.claimed, f"{me.name} and another both are run {epoch.number}"
        self.claimed.add(epoch.number)
        if any(p.alive for p in others):
            self.fired["two drivers at once"] += 1
            self.fired["taken over"] += takeover
        return epoch, options

    def launch(self, store: View, names: tuple[str, ...], takeover: bool) -> int:
        """The steps of `p3d launch`, in the same order."""
        job.refuse_other_job(store, PREPARED.recipe)
        store.prove_create_once()
        epoch, options = self.claim(store, takeover=takeover)
        record = planning.create_job(store, PREPARED)
        found = SourceListing(source(names), ())
        added = planning.add_plan(store, record, found, sizing=ShardSizing(SHARD_VIDEOS), limit=None)
        self.fired["source grown or changed"] += added is not None and added.seq > 1
        code = self.run(store, epoch, options)
        if code in FINISHED:
            planned = newest_plans(job.manifests(self.store, record)).keys()
            assert planned >= {name.lower() for name in names}, f"{self.current.name}: {names} are not all planned"
        return code

    def resume(self, store: View, takeover: bool) -> int:
        """`p3d resume`: does nothing if the job is complete."""
        record = job.read_job(store)
        plans = job.manifests(store, record)
        work = job.glance(store, plans) or job.look(store, plans)
        self.fired["begun from summaries"] += not work.listed
        if work.nothing_left and work.n_shards:
            self.current.notes["idle"] = True
            return 0
        return self.run(store, *self.claim(store, takeover=takeover))

    def retry(self, store: View, takeover: bool) -> int:
        """`p3d retry`."""
        record = job.read_job(store)
        if not verify.current_failures(store):
            return 0
        epoch, options = self.claim(store, takeover=takeover)
        added = planning.add_retry(store, record, frozenset(), StoreOptions(), sizing=ShardSizing(SHARD_VIDEOS))
        self.fired["failures retried"] += added is not None
        return self.run(store, epoch, options)

    def cancel(self, store: View, now: bool) -> int:
        """`p3d cancel`."""
        if epoch := control.newest_number(store):
            control.ask_cancel(store, epoch, now=now)
            self.fired["cancelled"] += 1
        return 0

    def run(self, store: View, epoch: control.Epoch, options: RunOptions) -> int:
        record = job.read_job(store)
        known = job.manifests(self.store, record)
        pulse = SimpleNamespace(stop=lambda: None)
        claimed = ClaimedRun(store, options, epoch, pulse, None)  # type: ignore[arg-type]
        quiet = lambda _: contextlib.nullcontext()  # noqa: E731
        code = run_job("OUT", record, claimed, say=lambda _: None, show_progress=quiet) or 0
        if code in FINISHED:  # a finished run has done all shards of the plans known at its start
            committed, whole = commit.committed_names(self.store)
            left = [name for name, (seq, _) in self.store.shards.items() if seq in known and name not in whole]
            assert not left, f"{self.current.name} finished with {code}, and {left} are open ({len(committed)} are not)"
            self.check_counts(epoch.number, known)
        return code

    def check_counts(self, number: int, known: dict[int, manifest.Manifest]) -> None:
        """Check the counts of a finished run, if its last heartbeat arrived and no plan was added meanwhile."""
        last = control.heartbeat(self.store, number)
        same = known.keys() == {plan.seq for plan in manifest.load_plans(self.store)}
        if last is not None and last.state == "finished" and last.videos.all and same:
            newest = newest_plans(known)
            true = VideoCounts(all=len(newest), done=len(newest), failed=len(failing(newest)))
            assert last.videos == true, f"{self.current.name} finished and counts {last.videos}, not {true}"

    # -- what must hold at the end

    def check_end(self) -> None:
        """I1 to I8, from the store alone and from the true states of the videos."""
        record = job.read_job(self.store)
        found = verify.audit(self.store, record)
        assert (found.damaged, found.pending, found.underived) == (False, 0, 0), found.problems
        plans = job.manifests(self.store, record)
        newest = newest_plans(plans)
        failed = {row["video_id"]: row["reason"] for row in verify.current_failures(self.store)}
        assert failed == dict.fromkeys(failing(newest), "truncated"), f"I8: {failed}, not {failing(newest)}"
        work = job.survey(self.store, plans)
        counted = (work.done.videos, work.n_videos, work.done.failed)
        assert counted == (len(newest), len(newest), len(failed)), f"counted {counted} of {len(newest)} videos"
        keys = []
        for key, content in self.store.objects.items():
            if key.startswith("clips/"):
                keys += clip_keys(content)
        assert len(keys) == len(set(keys)), "I2: a row exists twice"


def source(names: tuple[str, ...]) -> pa.Table:
    """The videos of a source; an upper-case name is a different file under the same name."""
    table = videos([name.lower() for name in names])
    versions = pa.array(["1" * 16 if name.isupper() else "0" * 16 for name in names])
    return table.set_column(table.schema.get_field_index("version"), table.schema.field("version"), versions)


def newest_plans(plans: dict[int, manifest.Manifest]) -> dict[str, int]:
    """The newest plan of each video, computed independently of `p3d.jobs.job`."""
    named = [(name, seq) for seq, plan in plans.items() for name in plan.videos["video_id"].to_pylist()]
    return {name: max(seq for other, seq in named if other == name) for name, _ in named}


def failing(newest: dict[str, int]) -> set[str]:
    """The videos that cannot be read in their newest plan."""
    return {name for name, seq in newest.items() if not frames_of(seq, name)}


def clip_keys(content: bytes) -> list[tuple[Any, ...]]:
    table = schema.open_parquet(pa.BufferReader(content)).read(
        use_threads=False, columns=["plan_seq", "video_id", "clip_index"]
    )
    return [tuple(row.values()) for row in table.to_pylist()]
