"""The Ray loop: turns results into events and commands into calls. All decisions are in `scheduler.state`.

    RayLoop.loop():   wait for a result, a signal, a cancel or a newer epoch  ->  Scheduler.handle  ->  carry out

It also writes the heartbeat with the whole progress of the job, so `status` needs neither Ray nor this process.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from p3d.jobs.job import (
    Work,
    confirm,
    count_done,
    derive_again,
    golden_of,
    refuse_changed,
    refuse_damaged,
    refuse_strange,
)
from p3d.jobs.machine import code_digest, cpus_of_a_gpu_worker
from p3d.jobs.planning.feeding import SHARDS_EACH
from p3d.jobs.planning.prepare import most_decodes
from p3d.jobs.scheduler import control
from p3d.jobs.scheduler.cluster import Cluster
from p3d.jobs.scheduler.log import RunLog
from p3d.jobs.scheduler.metrics import Metrics, endpoint
from p3d.jobs.scheduler.run_snapshot import RunSnapshot, ShardCounts, VideoCounts, WorkerSnapshot
from p3d.jobs.scheduler.state import (
    Check,
    Checked,
    CheckFailed,
    Command,
    Counted,
    Dispatch,
    Drain,
    Event,
    Finish,
    Reopened,
    Scheduler,
    ShardDone,
    ShardTrouble,
    StartWorker,
    Stop,
    StopWorker,
    TryAgain,
    WorkerDied,
    WorkerLimitRaised,
    WorkerReady,
    WorkerRefused,
    WorkerUnready,
)
from p3d.jobs.worker.actor import Done, Ready, Refused, ShardError, ShardWorker, WorkerSpec
from p3d.jobs.worker.autoscale import Load
from p3d.jobs.worker.decoding import gpus_of_a_worker
from p3d.pipeline.dataset.commit import Committed, clips_key, derive
from p3d.pipeline.dataset.plans import Manifest
from p3d.pipeline.dataset.repair import set_orphans_aside
from p3d.pipeline.dataset.stored_files import StoredFiles
from p3d.pipeline.dataset.totals import Ended, ShardKey, ShardSet, Totals, count, ended
from p3d.pipeline.errors import (
    DamagedJob,
    InputError,
    JobError,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreGone,
    StoreMissing,
    StoreUnknown,
    counted,
)
from p3d.pipeline.extract import Progress
from p3d.pipeline.recipe import JobRecord, RunOptions
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import shard_name

POLL_S = 0.25
PROGRESS_S = 1.0  # between two queries of the workers' counters
SILENT_S = 60.0  # a busy worker that does not answer such a query for so long is killed: it hangs or is suspended
GRACE_S = 10.0  # after the first interrupt, for shards that will end by then
ONE_SIGNAL_S = 0.5  # signals that follow each other so closely are one: a shell or a wrapper may forward it again
TRY_AGAIN_S = 5.0  # between a failure of a store and the next attempt; doubles
LONGEST_TRY_S = 60.0


@dataclass(slots=True)
class _Worker:
    """An actor, and its last reported state."""

    actor: Any
    ready: bool = False
    device: str = ""
    host: str = ""
    in_hand: dict[ShardKey, Progress] = field(default_factory=dict)  # the oldest first
    began: dict[ShardKey, float] = field(default_factory=dict)  # when each of them was dispatched
    load: Load = field(default_factory=Load)

    @property
    def state(self) -> str:
        return "busy" if self.in_hand else "idle" if self.ready else "starting"

    def snapshot(self, number: int) -> WorkerSnapshot:
        return WorkerSnapshot(
            worker=number,
            state=self.state,
            device=self.device,
            host=self.host,
            shards=tuple(map(str, self.in_hand)),
            videos=sum(progress.videos for progress in self.in_hand.values()),
            clips=sum(progress.clips for progress in self.in_hand.values()),
            load=self.load,
            limit=self.load.limit if self.load.decode_concurrency else None,
        )


class RayLoop:
    """One run of a job on a cluster, from the first worker to the exit code."""

    def __init__(
        self,
        store: Store,
        job: JobRecord,
        manifests: dict[int, Manifest],
        work: Work,
        cluster: Cluster,
        epoch: control.Epoch,
        options: RunOptions,
        *,
        say: Callable[[str], None] = lambda _: None,
        on_progress: Callable[[RunSnapshot], None] | None = None,
    ) -> None:
        gpus, per_gpu = cluster.machines.gpus, options.workers_per_gpu
        on_gpus = gpus > 0 and options.device != "cpu"
        self.gpus_each = gpus_of_a_worker(job.recipe.decoder, options.decode_tasks, per_gpu) if on_gpus else 0
        # without a GPU no CPU is reserved: on a machine with one core no decode could start next to the worker
        self.cpus_each = cpus_of_a_gpu_worker(cluster.machines, options.workers, per_gpu) if on_gpus else 0
        if on_gpus and options.workers > gpus * per_gpu:  # in Ray the others would wait forever
            needed = math.ceil(options.workers / per_gpu)
            raise InputError(
                f"{options.workers} workers, {per_gpu} per GPU, need {counted(needed, 'GPU')}, and Ray sees {gpus}; "
                f"use --workers {gpus * per_gpu}, or a higher --workers-per-gpu"
            )
        self.follows = on_gpus and options.workers == gpus * per_gpu  # a run on all GPUs also uses those that join
        self.store, self.job, self.manifests, self.work, self.epoch = store, job, manifests, work, epoch
        self.cluster, self.options, self.say, self.on_progress = cluster, options, say, on_progress
        self.silent: set[str] = set()  # sinks that have failed, which was said
        self.spec = WorkerSpec(
            store.url,
            job.recipe,
            options,
            tuple(golden_of(store, job.recipe).tolist()),
            code_digest(),
            str(cluster.scratch),
            job.job_id,
        )
        self.state = Scheduler(
            work.todo,
            n_workers=options.workers,
            n_videos=work.n_videos,
            shards_each=SHARDS_EACH,
            counting=True,
            max_failures=options.max_failures,
            shard_attempts=options.shard_attempts,
            worker_deaths=options.worker_deaths,
        )
        self.before = Totals()  # what earlier runs did, once it is counted
        self.counted: SimpleQueue[Event] = SimpleQueue()
        threading.Thread(target=self._count, name="count", daemon=True).start()
        self.workers: dict[int, _Worker] = {}
        self.pending: dict[Any, Callable[[Any], Event | None]] = {}  # pending result -> how it becomes an event
        self.asking: dict[Any, tuple[int, float]] = {}  # pending progress calls -> (worker, when it was asked)
        self.lost = False  # true when Ray has died
        self.finish: Finish | None = None
        self.signals: list[tuple[int, float]] = []  # number and time of each
        self.waits = False  # for shards that are nearly done, since the first signal
        self.log = RunLog(store, epoch.number)
        self.metrics: Metrics | None = None
        with self._sink("metrics"):
            self.metrics = Metrics(store.url)
        self.counter = 0
        self.lost_at: float | None = None  # when the current outage of a store began
        self.why_lost = ""
        self.full = ""  # why no heartbeat can be written: waiting does not help with a disk that is full or gone
        self.try_at, self.try_s = 0.0, TRY_AGAIN_S
        self.started = time.monotonic()
        self.beaten = self.asked = float("-inf")

    def loop(self) -> Finish:
        """Run to the end. SIGINT and SIGTERM stop it cleanly."""
        mine = threading.current_thread() is threading.main_thread()  # Python sets handlers in the main thread only
        numbers = (signal.SIGINT, signal.SIGTERM) if mine else ()
        handlers = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            self._note(f"run {self.epoch.number} on {self.epoch.host}: {counted(len(self.work.todo), 'shard')} to do")
            with self._sink("metrics"):
                if where := endpoint():
                    self._note(f"its Prometheus metrics are at {where}")
            self._carry_out(self.state.start())
            while self.state.finished is None:
                for event in self._results():
                    self._handle(event)
                for event in [*self._outside(), *self._outages()]:
                    self._handle(event)
                self._heartbeat()
            self.finish = self._confirmed(self.state.finished)
            return self.finish
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for worker in self.workers.values():
                self._kill(worker.actor)
            finish = self.finish or Finish(1, "stopped by an internal error; resumable")
            self._beat("finished" if finish.exit_code in (0, 3) else "stopped", finish)
            self._note(f"run {self.epoch.number} ended with exit code {finish.exit_code}: {finish.sentence}")
            with self._sink("log"):
                self.log.write(now=True)

    def _confirmed(self, finish: Finish) -> Finish:
        """Before a run says that it has finished: are its job, its plans and all that was committed really in the
        store, and would `verify` accept what this run wrote? Shards of earlier runs were verified while they were
        counted.
        """
        if finish.exit_code not in (0, 3):
            return finish
        try:
            plans = {seq: manifest.plan for seq, manifest in self.manifests.items()}
            found = StoredFiles(self.store, plans.values())
            refuse_changed(self.store, self.job, self.manifests)
            refuse_damaged(self.store, self.job, self.manifests, self.work.todo)
        except StoreError as error:
            return Finish(6, f"all shards were committed, but {self.store.url} cannot be read: {error}")
        except DamagedJob as error:
            return Finish(7, f"all shards were committed, but {error}", lost=True)
        expected = self.work.committed.with_keys(self.work.todo)
        lost = expected & ~ShardSet({seq: found.whole(plan) for seq, plan in plans.items()})
        if not len(lost):
            return finish
        seq, shard = next(iter(lost))
        return Finish(
            6,
            f"{len(lost)} of {len(expected)} shards were committed and are no longer in {self.store.url}, such as "
            f"{shard_name(plans[seq].plan8, shard)}: was the disk unmounted, or were files removed? A resume computes "
            "what is not there",
            lost=True,
        )

    def _handle(self, event: Event) -> None:
        """Handle an event, and those that result at once from its commands."""
        events = deque([event])
        while events:
            with self._sink("log"):
                self.log.hear(events[0])
            self._measure(lambda metrics: metrics.hear(events[0]))
            events.extend(self._carry_out(self.state.handle(events.popleft())))
            self.state.check()

    # -- what happens

    def _results(self) -> Iterator[Event]:
        """Wait a moment for results of calls. Each is read after the previous one has been handled.

        Reading a result updates the worker at once, so no shard is given to a worker that has died.
        """
        refs = [*self.pending, *self.asking]
        if not refs:
            time.sleep(POLL_S)
            return
        ray.wait(refs, num_returns=1, timeout=POLL_S)
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for ref in ready:
            if (event := self._result(ref)) is not None:
                yield event

    def _result(self, ref: Any) -> Event | None:
        if (asked := self.asking.pop(ref, None)) is not None:
            try:
                worker, (said, load) = self.workers[asked[0]], ray.get(ref)
            except (RayError, KeyError):
                return None  # the call in `pending` reports the death
            worker.in_hand.update((key, said[key]) for key in worker.in_hand if key in said)
            worker.load = load
            self._measure(lambda metrics: metrics.look(worker.in_hand))
            return None
        meaning = self.pending.pop(ref)
        try:
            return meaning(ray.get(ref))
        except RayTaskError:
            raise  # a bug: the exception came from the worker's code
        except RayError as error:  # includes Ray's memory monitor and lost nodes, which are not RayActorErrors
            return meaning(error)

    def _outside(self) -> list[Event]:
        """External events: signals and the death of Ray at once, cancel requests and newer epochs at each heartbeat."""
        events: list[Event] = []
        if not self.counted.empty():
            events.append(self._counted(self.counted.get()))
        if self.signals:
            events += self._interrupted()
        if dead := self.cluster.dead():
            self.lost = True
            how = "killed, or this machine ran out of memory"
            events.append(Stop(6, f"Ray's {dead} has died ({how}); shards in progress were abandoned"))
        if time.monotonic() - self.beaten >= control.HEARTBEAT_S:
            there = self.cluster.machines.gpus * self.options.workers_per_gpu
            if self.follows and there > self.state.n_workers:
                events.append(WorkerLimitRaised(there))
            try:
                if (newest := control.newest_number(self.store)) > self.epoch.number:
                    events.append(
                        Stop(5, f"superseded: run {newest} of this output has taken over from run {self.epoch.number}")
                    )
                elif request := control.cancel_asked(self.store, self.epoch.number):
                    events.append(Stop(6, "cancelled", drain=not request.get("now")))
            except (StoreUnknown, StoreDenied):
                pass  # the heartbeat shows whether this lasts
        return events

    def _outages(self) -> list[Event]:
        """A store that fails pauses the job: one shard is tried now and then, until --store-patience is over."""
        if self.full:
            return [Stop(6, self.full)]
        now = time.monotonic()
        why = self.why_lost or self.state.outage
        if not why:
            self.lost_at = None
            return []
        if self.lost_at is None:
            self.lost_at, self.try_s = now, TRY_AGAIN_S
            self.try_at = now + self.try_s
        patience = self.options.store_patience_s
        if now - self.lost_at > patience and (self.why_lost or not self.state.in_flight):
            how = f"a store did not answer for {patience:g} s, no video failed because of it"
            return [Stop(6, f"{how}; the last error: {why}")]
        if now < self.try_at or self.why_lost:
            return []
        self.try_s = min(2 * self.try_s, LONGEST_TRY_S)
        self.try_at = now + self.try_s
        return [TryAgain()]

    def _counted(self, event: Event) -> Event:
        """Note what the thread that counts has found."""
        if isinstance(event, Counted):
            self.before = event.before
        if isinstance(event, Reopened):
            self.work.todo += event.shards
            name = shard_name(self.manifests[event.shards[0].plan_seq].plan.plan8, event.shards[0].shard)
            self.say(
                f"{len(event.shards)} of the shards have lost their clips files, such as {clips_key(name)}: they are "
                "computed again"
            )
        return event

    def _count(self) -> None:
        """Count what was committed before, and read and verify the footers of shards that no summary covers.

        A thread, since it may take long. What was known from summaries alone is confirmed by a listing first.
        """
        work = self.work
        while True:
            try:
                if not work.listed:
                    work = self._list(work)
                refuse_damaged(self.store, self.job, self.manifests, work.unsummarised)
                return self.counted.put(Counted(count_done(self.store, self.manifests, work, summarise=True)))
            except (StoreUnknown, StoreDenied):
                time.sleep(TRY_AGAIN_S)
            except Exception as error:  # noqa: BLE001 - a thread's boundary: the run would wait forever
                code = 7 if isinstance(error, DamagedJob) else 6 if isinstance(error, JobError) else 1
                return self.counted.put(Stop(code, str(error) or type(error).__name__))

    def _list(self, work: Work) -> Work:
        """What is left, confirmed by a listing. Shards of summaries whose clips files are lost are opened again."""
        found, lost = confirm(self.store, self.manifests, work)
        refuse_strange(self.store, found)
        if not (found.orphaned or found.summaries.stale or found.underived):
            return found
        if control.newest_number(self.store) > self.epoch.number:  # a run that took over does it; this one will stop
            return found
        set_orphans_aside(self.store, found.orphaned)
        for key in found.summaries.stale:
            self.store.delete(key)
        derive_again(self.store, self.job, self.manifests, found.underived)
        if lost:
            self.counted.put(Reopened(tuple(lost)))
        return found

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signals or now - self.signals[-1][1] >= ONE_SIGNAL_S:
            self.signals.append((number, now))

    def _interrupted(self) -> list[Event]:
        """After the first signal the shards that will end within GRACE_S are finished; the second stops at once."""
        number, first_at = self.signals[0]
        by, left_s = f"interrupted by {signal.Signals(number).name}", first_at + GRACE_S - time.monotonic()
        only, near = len(self.signals) == 1 and left_s > 0, sum(left <= left_s for left in self._left_s())
        if only and self.waits:
            return []
        if only and near:
            self.waits = True
            again = "Ctrl-C again stops" if number == signal.SIGINT else "a second signal stops"
            self.say(f"interrupted: finishing {counted(near, 'shard')} within {left_s:.0f} s; {again} at once")
            return [Stop(128 + number, f"{by}; shards that were nearly done are committed", drain=True)]
        return [Stop(128 + number, f"{by}; shards in progress were abandoned")]

    def _left_s(self) -> Iterator[float]:
        """Seconds that each shard in progress still takes, about; infinite if that is not known, or it has not begun.

        By the share of its videos that are done; before the first is, by the sizing of its plan.
        """
        for worker in self.workers.values():
            for key, progress in worker.in_hand.items():
                manifest, taken = self.manifests[key.plan_seq], time.monotonic() - worker.began[key]
                n_left, known = manifest.n_videos(key.shard) - progress.videos, manifest.plan.sizing
                if progress.videos:
                    yield taken * n_left / progress.videos
                elif progress.frames and known.is_known:
                    sizes = manifest.rows(key.shard)["size_bytes"].to_pylist()
                    yield max(0.0, sum(map(known.seconds, sizes)) - taken)
                else:
                    yield math.inf

    # -- what to do

    def _carry_out(self, commands: list[Command]) -> list[Event]:
        """Carry out commands. Returns the events that result at once."""
        events: list[Event] = []
        for command in commands:
            match command:
                case StartWorker(number) if not self.cluster.answers():  # Ray would block, and then end this process
                    events.append(WorkerUnready(number, "the head of the cluster does not answer"))
                case StartWorker(number):
                    self._start(number)
                case Dispatch(number, key):
                    self._dispatch(number, key)
                case Check(key):
                    events.append(self._check(key))
                case Drain(number):
                    self.workers[number].actor.drain.remote()
                case StopWorker(number):
                    self._kill(self.workers.pop(number).actor)
                case Finish():
                    pass
        return events

    def _kill(self, actor: Any) -> None:
        """Kill a worker at the end of a run. If the head is lost, Ray would block and then end this process."""
        if not self.lost:
            ray.kill(actor, no_restart=True)

    def _start(self, number: int) -> None:
        actor = (
            ray.remote(ShardWorker)
            .options(
                num_cpus=self.cpus_each,
                num_gpus=self.gpus_each,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=SHARDS_EACH + 1,
            )
            .remote(self.spec)
        )
        self.workers[number] = _Worker(actor)

        def meaning(reply: Any) -> Event | None:
            if number not in self.workers:
                return None  # it was stopped, while its reply was waiting to be read
            if isinstance(reply, Ready):
                worker = self.workers[number]
                worker.ready, worker.device, worker.host = True, reply.device, reply.host
                return WorkerReady(number)
            if isinstance(reply, ShardError):  # its device failed, and another worker may do better
                ray.kill(actor, no_restart=True)
                return self._died(number, reply.detail)
            if not isinstance(reply, Refused):
                return self._died(number, reply)
            if not reply.outage:
                return WorkerRefused(number, reply.detail)
            ray.kill(self.workers.pop(number).actor, no_restart=True)
            return WorkerUnready(number, reply.detail)

        self.pending[actor.setup.remote()] = meaning

    def _dispatch(self, number: int, key: ShardKey) -> None:
        worker, manifest = self.workers[number], self.manifests[key.plan_seq]
        worker.in_hand[key], worker.began[key] = Progress(), time.monotonic()
        self._measure(lambda metrics: metrics.begin(key))

        def meaning(reply: Any) -> Event | None:
            if number not in self.workers:
                return None  # the result of its other shard reported its death
            match reply:
                case ShardError("device", detail):
                    ray.kill(worker.actor, no_restart=True)
                    return self._died(number, detail)
                case Done() | ShardError():
                    worker.in_hand.pop(key, None)
                    worker.began.pop(key, None)
                    return self._ended(number, key, reply)
            return self._died(number, reply)

        shard = manifest.shard(key.shard)
        call = worker.actor.run_shard.remote(shard, manifest.user_columns(key.shard), manifest.moved(shard))
        self.pending[call] = meaning

    def _ended(self, number: int, key: ShardKey, reply: Done | ShardError) -> Event:
        if isinstance(reply, ShardError):
            return ShardTrouble(number, key, reply.kind, reply.detail)  # type: ignore[arg-type] # the kinds are the same
        self._measure(lambda metrics: metrics.done(key, reply.spent))
        self._summarise(key, reply.videos)
        sums = count(reply.videos, self.work.newest.of_shard(self.manifests[key.plan_seq], key.shard))
        return ShardDone(number, key, sums.videos, sums.clips, tuple(sums.failures.items()))

    def _died(self, number: int, error: Any) -> Event:
        worker = self.workers.pop(number, None)
        if worker is not None and worker.in_hand:
            n_clips = sum(progress.clips for progress in worker.in_hand.values())
            keys = " and ".join(map(str, sorted(worker.in_hand)))
            self._note(f"worker {number} has died while it processed shard {keys}, with {n_clips} clips computed")
        return WorkerDied(number, " ".join(str(error).split())[:300])

    def _check(self, key: ShardKey) -> Event:
        """A worker died with this shard: look in the store whether it was committed."""
        manifest = self.manifests[key.plan_seq]
        shard = manifest.shard(key.shard)
        try:
            found: Committed = derive(self.store, shard, self.job.recipe, manifest.user_columns(key.shard))
        except StoreMissing:
            return Checked(key, committed=False)
        except (StoreUnknown, StoreDenied) as error:
            return CheckFailed(key, str(error))
        except StoreError as error:
            return Stop(6, str(error))
        videos = ended(found.outcomes)
        self._summarise(key, videos)
        sums = count(videos, self.work.newest.of_shard(manifest, key.shard))
        return Checked(key, True, sums.videos, sums.clips, tuple(sums.failures.items()))

    def _summarise(self, key: ShardKey, videos: tuple[Ended, ...]) -> None:
        """Note for a summary how the videos of a shard ended. Without it, a resume reads the footers."""
        with self._sink("summaries"):
            self.work.summaries.add(key, videos)

    def _most_decodes(self) -> int:
        """The maximum decode concurrency of a worker. With NVDEC it is fixed, since decodes share the GPU."""
        nvdec = self.job.recipe.decoder == "nvdec"
        reserved = self.cpus_each * self.state.n_workers
        return self.options.decode_tasks if nvdec else most_decodes(self.cluster.machines, reserved)

    # -- what others see

    @contextlib.contextmanager
    def _sink(self, name: str) -> Iterator[None]:
        """The boundary of a sink, which only tells people about the run: metrics, log or progress.

        Its errors never end a run. The first is said.
        """
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the boundary of a sink
            if name not in self.silent:
                self.silent.add(name)
                with contextlib.suppress(Exception):
                    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                    self.say(f"warning: the {name} of this run cannot be kept ({what}); the run goes on")

    def _measure(self, update: Callable[[Metrics], object]) -> None:
        with self._sink("metrics"):
            if self.metrics is not None:
                update(self.metrics)

    def _note(self, sentence: str) -> None:
        with self._sink("log"):
            self.log.add(sentence)

    def _show(self, snapshot: RunSnapshot) -> None:
        with self._sink("progress"):
            if self.on_progress is not None:
                self.on_progress(snapshot)

    def _heartbeat(self) -> None:
        now = time.monotonic()
        if now - self.asked >= PROGRESS_S:
            self.asked = now
            unanswered = dict(self.asking.values())
            for number, worker in self.workers.items():
                if worker.state == "busy" and number not in unanswered:
                    self.asking[worker.actor.progress.remote(self._most_decodes())] = (number, now)
                elif worker.state == "busy" and now - unanswered[number] > SILENT_S:
                    ray.kill(worker.actor, no_restart=True)  # its call in `pending` then reports the death
            snapshot = self.snapshot(control.RUNNING)
            self._measure(lambda metrics: metrics.show(snapshot))
            self._show(snapshot)
        if time.monotonic() - self.beaten < control.HEARTBEAT_S:
            return
        self._beat(control.RUNNING)
        with self._sink("log"):
            self.log.write()

    def _beat(self, state: str, finish: Finish | None = None) -> None:
        """Write the heartbeat. While it cannot be written, `why_lost` says why."""
        self.beaten = time.monotonic()
        self.counter += 1
        snapshot = self.snapshot(state, finish)
        self._measure(lambda metrics: metrics.show(snapshot))
        try:
            control.beat(self.store, self.epoch.number, snapshot)
            self.why_lost = ""
        except (StoreFull, StoreGone) as error:
            self.full = str(error)
        except StoreError as error:
            self.why_lost = str(error)
        if finish is not None:
            self._show(snapshot)

    def _stopping(self) -> str:
        """What a run that has been asked to stop is still doing; empty otherwise."""
        asked = self.state.stopping
        if asked is None or not asked.drain:
            return ""
        return f"{asked.sentence.partition(';')[0]}: finishing {counted(len(list(self._left_s())), 'shard')} first"

    def snapshot(self, state: str, finish: Finish | None = None) -> RunSnapshot:
        """The progress of the whole job, and its end once it has ended."""
        totals, flying = self.state.totals, [p for w in self.workers.values() for p in w.in_hand.values()]
        elapsed = time.monotonic() - self.started
        videos = totals.videos + sum(progress.videos for progress in flying)
        clips = totals.clips + sum(progress.clips for progress in flying)
        failed = totals.failed + sum(progress.failed for progress in flying)
        done_here = videos - self.before.videos
        left = self.work.n_videos - videos
        return RunSnapshot(
            epoch=self.epoch.number,
            counter=self.counter,
            state=state,
            outage=self.why_lost or self.state.outage,
            stopping=self._stopping(),
            elapsed_s=round(elapsed, 3),
            shards=ShardCounts(all=self.work.n_shards, done=self.work.n_shards - len(self.state.open)),
            videos=VideoCounts(all=self.work.n_videos, done=videos, failed=failed),
            counted=not self.state.counting,
            clips=clips,
            clips_per_s=round((clips - self.before.clips) / elapsed, 3) if elapsed > 0 else 0.0,
            eta_s=round(elapsed * left / done_here, 1) if done_here > 0 else None,
            failures=dict(totals.failures),
            workers=tuple(worker.snapshot(number) for number, worker in sorted(self.workers.items())),
            exit_code=finish.exit_code if finish else None,
            sentence=finish.sentence if finish else None,
        )
