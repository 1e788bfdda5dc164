"""A replacement for Ray in a simulated world: `scheduler.loop` uses this module's FakeRay.

A worker is the real ShardWorker, with synthetic rows instead of decoding and network. It can be killed at any step, die
between its commit and its answer, or be cut off: its driver believes it dead, but it continues and commits later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.exceptions import RayActorError

from p3d.jobs.job import weights_key
from p3d.jobs.worker import actor as workers
from p3d.jobs.worker.actor import Ready, Refused, ShardError, ShardWorker, WorkerSpec
from p3d.jobs.worker.autoscale import DecodeAutoscaler
from p3d.jobs.worker.concurrency import DecodeConcurrency
from p3d.jobs.worker.decoding import Decoding
from p3d.pipeline.clips.rules import clip_spans
from p3d.pipeline.errors import StoreDenied, StoreUnknown
from p3d.pipeline.extract import Progress
from p3d.pipeline.types import ClipRow, ShardPlan, ShardRows
from tests.pipeline.rows import CLASSES, DIM, distributions, outcome, recipe
from tests.sim.view import View
from tests.sim.world import Process, World


def frames_of(plan_seq: int, video_id: str) -> int:
    """The number of frames of a video; 0 means that it fails. `d` always fails, `f` until plan 3."""
    return {"a": 40, "b": 9, "c": 16, "d": 0, "e": 9, "f": 0 if plan_seq < 3 else 16}[video_id]


@lru_cache(maxsize=4096)
def rows_of(plan: ShardPlan, attempt: int) -> ShardRows:
    """The rows of one attempt at a shard; every attempt gives different features."""
    outcomes = tuple(outcome(video, frames_of(plan.plan_seq, video.video_id)) for video in plan.videos)
    clips = tuple(
        ClipRow(o.video.video_id, o.video.path, span, span.start_frame / 25, span.end_frame / 25)
        for o in outcomes
        if o.end
        for span in clip_spans(recipe().sampling, o.end.n_frames)
    )
    rng = np.random.default_rng([attempt, plan.plan_seq, plan.shard])
    features_RD = rng.standard_normal((len(clips), DIM)).astype(np.float32)
    return ShardRows(plan, outcomes, clips, features_RD, distributions(rng, len(clips), CLASSES), {})


class Ref:
    """A future result."""

    def __init__(self) -> None:
        self.done, self.value = False, None

    def resolve(self, value: Any) -> None:
        if not self.done:
            self.done, self.value = True, value


class SimWorker(ShardWorker):
    """The real worker except for its startup, its rows and the statistics, which would hold times."""

    def __init__(self, spec: WorkerSpec, world: World, store: View) -> None:
        self.spec, self.store, self.world = spec, store, world
        self.in_hand, self.concurrency, self.broken = {}, DecodeConcurrency(1), None
        self.scratch, self.encoder = Path(), SimpleNamespace(busy=None)
        self.inference_threads, self.autoscaler = SimpleNamespace(under_way=0, n=1), DecodeAutoscaler(1, 1)

    def setup(self) -> Ready | Refused:
        try:
            self.store.read(weights_key(self.spec.recipe))
        except (StoreUnknown, StoreDenied) as error:
            return Refused(str(error), outage=True)
        return Ready("cpu", "host", 1)

    def _extract(self, shard: ShardPlan, decoding: Decoding, progress: Progress) -> ShardRows:
        return extract(self.world, shard)


def extract(world: World, plan: ShardPlan) -> ShardRows:
    """Compute a shard; each call counts as a new attempt."""
    world.current.notes.pop("tries", None)
    attempt = world.attempts[plan.name]
    world.attempts[plan.name] += 1
    world.step(f"computes {plan.name} for the {attempt + 1}th time")
    world.wait(world.rng.choice((0.01, 0.01, 1.0, 12.0)))
    rows = rows_of(plan, attempt)
    rows.stats.clear()
    return rows


true_trouble_of = workers.shard_error_of


def shard_error_of(world: World, error: Exception) -> ShardError:
    """The real function, but an internal error is a defect of the program and fails the seed."""
    trouble = true_trouble_of(error)
    if trouble.kind == "internal":
        world.fail(error)
    return trouble


class Actor:
    """A worker process and its mailbox, as seen by its driver."""

    def __init__(self, ray: FakeRay, spec: WorkerSpec) -> None:
        self.world, self.spec = ray.world, spec
        self.mail: deque[tuple[Callable[[], Any], Ref]] = deque()
        self.refs: list[Ref] = []
        host = self.world.rng.choice(("host A", "host B"))
        self.process = self.world.spawn("worker", f"worker of {self.world.current.name}", self._serve, host)
        self.process.notes["actor"] = self
        self.process.on_end.append(self.lost)
        self.worker = SimWorker(spec, self.world, View(ray.store, self.world))
        self.setup = Call(self, self.worker.setup)
        self.run_shard = Call(self, self.worker.run_shard)
        self.progress = Call(self, self.worker.progress)
        self.drain = Call(self, self.worker.drain)

    def _serve(self) -> None:
        while not self.process.given_up:
            self.world.wait(until=lambda: bool(self.mail) or self.process.given_up)
            while self.mail:
                call, ref = self.mail.popleft()
                answer = call()
                self.world.step("answers")  # it may die between its commit and its answer
                ref.resolve(answer)

    def lost(self) -> None:
        """Tell its driver that it is dead, whether it is or not."""
        for ref in self.refs:
            ref.resolve(RayActorError())

    def cut_off(self) -> None:
        """It continues to run, but its driver believes it dead."""
        self.process.given_up = True
        self.world.note(f"cut off: {self.process.name}")
        if self.mail or self.worker.in_hand:
            self.world.fired["worker cut off, continues"] += 1
        self.lost()


class Call:
    """`actor.method`, with Ray's `.remote`."""

    def __init__(self, actor: Actor, method: Callable[..., Any]) -> None:
        self.actor, self.method = actor, method

    def remote(self, *given: Any) -> Ref:
        actor, ref = self.actor, Ref()
        actor.refs.append(ref)
        if self.method == actor.worker.run_shard:
            driver = actor.world.current
            beats = driver.notes.get("beats", 0)
            if beats >= 3:
                actor.world.fail(AssertionError(f"{driver.name} gives out work {beats} beats after a newer run began"))
            actor.world.note(f"{driver.name} gives {given[0].name} to {actor.process.name}")
        if not actor.process.alive or actor.process.given_up:
            ref.resolve(RayActorError())
        elif self.method in (actor.worker.progress, actor.worker.drain):  # a thread of their own
            ref.resolve(self.method(*given))
        else:
            actor.mail.append((partial(self.method, *given), ref))
        return ref


class FakeRay:
    """The five calls of Ray that `p3d.jobs.scheduler.loop` uses."""

    def __init__(self, world: World, store: Any) -> None:
        self.world, self.store = world, store

    def remote(self, *given: Any) -> Any:
        """`ray.remote(ShardWorker).options(...).remote(spec)`."""
        return Actor(self, given[0]) if isinstance(given[0], WorkerSpec) else self

    def options(self, **_: Any) -> FakeRay:
        return self

    def wait(self, refs: list[Ref], *, num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        if timeout:
            self.world.wait(timeout, until=lambda: any(ref.done for ref in refs))
        ready = [ref for ref in refs if ref.done][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, ref: Ref) -> Any:
        assert ref.done, "the driver would block"
        if isinstance(ref.value, Exception):
            raise ref.value
        return ref.value

    def kill(self, actor: Actor, *, no_restart: bool) -> None:
        """Ray's kill does not reach an unreachable worker."""
        if self.world.strikes("kill does not arrive", quiet=True):
            actor.cut_off()
        elif not actor.process.given_up:
            self.world.kill(actor.process, "stopped")


def orphan(world: World, driver: Process) -> None:
    """End a driver's threads. Of a killed driver's workers some are cut off and finish their work, others die later."""
    for process in world.processes:
        if process.parent is driver and process.alive:
            if process.kind == "thread":
                world.kill(process, "its process ended")
            elif not driver.dead:
                continue
            elif world.rng.random() < 0.5:
                process.notes["actor"].cut_off()
            else:
                world.post(world.rng.choice((0.01, 1.0, 20.0)), partial(world.kill, process, "orphan"))
