"""Run a training on Ray Train: its processes are started and connected by a TorchTrainer, and write into OUT.

    train ──plan──> train.json ──run_training──> claim ──> TorchTrainer ──> loop.train in each process
                                     ^                          |
                                     └── heartbeats of rank 0, through OUT

A process that dies ends the others, and all start again from the newest checkpoint. Ray Train keeps nothing: its own
checkpoints are not used.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from p3d.jobs.machine import Machines
from p3d.jobs.planning.prepare import machines_here
from p3d.jobs.scheduler import control
from p3d.jobs.scheduler.cluster import Cluster, joined_cluster, local_cluster
from p3d.jobs.training import checkpoints, snapshot
from p3d.jobs.training.options import WORKER_DEATHS, TrainRun
from p3d.jobs.training.record import RESULT_KEY, TrainRecord, code_of_result
from p3d.jobs.training.snapshot import STOPPED, Stopped, TrainSnapshot
from p3d.jobs.trust import Say
from p3d.pipeline.errors import ClusterError, InputError, JobError, StoreError, counted
from p3d.pipeline.storage.store import Store

CPU_PART, GPU_PART, NORMALISED_PART = 4, 16, 16  # clips that a process computes at a time
LOOK_S = 0.5
CANCELLED = 6  # exit code of a training that was asked to stop by `p3d cancel`

OnProgress = Callable[[TrainSnapshot], None]


@dataclass(frozen=True, slots=True)
class HowToTrain:
    """Where a training runs, and the functions that tell about it. `address` is that of a cluster to join."""

    run: TrainRun
    address: str | None
    takeover: bool
    say: Say
    show_progress: Callable[[], contextlib.AbstractContextManager[OnProgress]]


def run_training(store: Store, record: TrainRecord, how: HowToTrain) -> int:
    """Train from the newest checkpoint to the end. Returns the exit code, 0 at once if it has finished. JobError.

    Ctrl-C or SIGTERM stops after the step under way, with a checkpoint, a second one at once.
    """
    if store.head(RESULT_KEY) is not None:
        how.say(f"nothing to do: {store.url}/{RESULT_KEY} is there")
        return code_of_result(store)
    with _cluster(how) as cluster:
        run = resolved(how.run, record, cluster.machines if cluster else machines_here())
        if run.workers > 1 and cluster is None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        epoch = control.claim(store, run.to_dict(), takeover=how.takeover, say=how.say)
        how.say("starting Ray ..." if cluster is None else "starting the processes ...")
        with _hint(store, how.say), control.Pulse(store, epoch.number) as pulse, _local(cluster) as cluster:
            at = checkpoints.newest_step(store)
            since = f" from the checkpoint of step {at}" if at is not None else ""
            processes = "1 process" if run.workers == 1 else f"{run.workers} processes"
            how.say(f"training {counted(record.options.steps, 'step')}{since} in {processes} on {run.device} ...")
            control.sweep_temps(store)
            pulse.stop()
            return _watched(store, record, run, epoch.number, cluster, how)


@contextlib.contextmanager
def _hint(store: Store, say: Say) -> Iterator[None]:
    """Say how to continue after a Ctrl-C while Ray starts; `_watched` handles the others."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted; continue with:  p3d resume {store.words()}")
        raise


@contextlib.contextmanager
def _cluster(how: HowToTrain) -> Iterator[Cluster | None]:
    """The cluster to join, or None."""
    if how.address is None:
        yield None
        return
    with joined_cluster(how.address) as cluster:
        yield cluster


@contextlib.contextmanager
def _local(cluster: Cluster | None) -> Iterator[Cluster]:
    """The joined cluster, or one of this machine."""
    if cluster is not None:
        yield cluster
        return
    with local_cluster() as started:
        yield started


def resolved(run: TrainRun, record: TrainRecord, there: Machines) -> TrainRun:
    """The options of a run with every 0 replaced. InputError if they do not fit the machines or the batch."""
    if run.device == "cuda" and not there.gpus:
        raise InputError("--device cuda: there is no GPU; use auto or cpu")
    device = "cpu" if run.device == "cpu" or not there.gpus else "cuda"
    workers = run.workers or (there.gpus if device == "cuda" else 1)
    if device == "cuda" and workers > there.gpus:
        raise InputError(f"--workers {workers}: there are {counted(there.gpus, 'GPU')}, and each process needs one")
    size = record.options.batch_size
    if workers > there.cpus:
        raise InputError(f"--workers {workers}: there are {counted(there.cpus, 'core')}, and each process needs one")
    if size % workers:
        raise InputError(f"--batch-size {size} cannot be divided among {workers} processes; use a multiple")
    cpus = max(1, there.cpus // workers)
    share = size // workers
    part = GPU_PART if device == "cuda" else CPU_PART
    if record.freeze == "none":  # a normalisation that is trained needs the statistics of many clips
        part = NORMALISED_PART
    return replace(
        run,
        device=device,
        workers=workers,
        threads=run.threads or max(1, min(cpus, there.node_cpus)),
        micro_batch=min(run.micro_batch or part, share),
        decode_tasks=run.decode_tasks or max(1, cpus // 2 if device == "cpu" else cpus - 1),
    )


def _watched(store: Store, record: TrainRecord, run: TrainRun, epoch: int, cluster: Cluster, how: HowToTrain) -> int:
    """Start the processes, show their progress until they end, and say how they ended."""
    asked, failed = list[int](), None

    def stop(number: int, _: Any) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt
        with contextlib.suppress(StoreError):
            control.ask_cancel(store, epoch, now=False)
        how.say("stopping after the step under way, with a checkpoint; Ctrl-C again stops at once")

    with _signals(stop), how.show_progress() as on_progress:
        try:
            for deaths in range(WORKER_DEATHS + 1):
                failed = _until_it_ends(store, record, run, epoch, cluster, on_progress, asked)
                if not _has_died(failed, run.workers) or deaths == WORKER_DEATHS or asked:
                    break
                how.say(f"a process of the training died ({_cause(failed)}); starting again from the last checkpoint")
        except KeyboardInterrupt:
            pass
    last = snapshot.read(store, epoch) or TrainSnapshot()
    if failed is None and last.state == snapshot.FINISHED:
        how.say(str(last.sentence))
        return last.exit_code or 0
    error = _job_error(failed)
    kept = checkpoints.newest_step(store)
    if error is None and (asked or (failed is not None and isinstance(_original(failed), Stopped))):
        where = f"at step {kept}" if kept is not None else "before the first checkpoint"
        code, sentence = 128 + asked[0] if asked else CANCELLED, f"stopped {where}"
    elif error is not None:
        code, sentence = 6, str(error)
    else:
        code, sentence = 6, f"the training ended without a result ({_cause(failed)})"
    ended = replace(last, counter=last.counter + 1, state=STOPPED, exit_code=code, sentence=sentence, stopping="")
    with contextlib.suppress(StoreError):
        snapshot.write(store, epoch, ended)
    if error is not None:
        raise error
    how.say(f"{sentence}; continue with:  p3d resume {store.words()}")
    return code


def _until_it_ends(
    store: Store,
    record: TrainRecord,
    run: TrainRun,
    epoch: int,
    cluster: Cluster,
    on_progress: OnProgress,
    asked: list[int],
) -> BaseException | None:
    """Run the processes once. Returns the error that ended them, or None.

    Until rank 0 writes heartbeats, this process writes them, so that no other run takes over, and looks for requests to
    stop, of which rank 0 would know nothing.
    """
    failed: list[BaseException] = []
    before = snapshot.read(store, epoch)
    ours = before.counter if before else 0

    def fit() -> None:
        try:
            _trainer(store, record, run, epoch, cluster.scratch).fit()
        except BaseException as error:  # noqa: BLE001 - looked at below
            failed.append(error)

    thread = threading.Thread(target=fit, name="fit", daemon=True)  # of the main thread, Ray Train would take SIGINT
    thread.start()
    with control.Pulse(store, epoch) as pulse:
        begun = False
        while thread.is_alive():
            thread.join(LOOK_S)
            if dead := cluster.dead():
                raise ClusterError(f"Ray has ended ({dead}); continue with `p3d resume {store.words()}`")
            with contextlib.suppress(StoreError):
                now = snapshot.read(store, epoch)
                if not begun and now is not None and now.counter >= snapshot.OWN and now.counter != ours:
                    begun = True
                    pulse.stop()
                if not begun and (asked or control.cancel_asked(store, epoch) is not None):
                    return Stopped()
                if begun and now is not None:
                    on_progress(now)
    return failed[0] if failed else None


def _trainer(store: Store, record: TrainRecord, run: TrainRun, epoch: int, scratch: Path) -> Any:
    """The TorchTrainer of a run."""
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    on_gpus = run.device == "cuda"
    each = {"CPU": 1.0} | ({"GPU": 1.0} if on_gpus else {})
    return TorchTrainer(
        in_process,
        train_loop_config={"url": store.url, "record": record, "run": run, "epoch": epoch},
        torch_config=TorchConfig(backend="nccl" if on_gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=run.workers, use_gpu=on_gpus, resources_per_worker=each),
        run_config=RunConfig(
            name="p3d", storage_path=str(scratch / "train"), failure_config=FailureConfig(max_failures=0)
        ),
    )


def in_process(config: dict[str, Any]) -> None:
    """What Ray Train runs in each process."""
    from ray.train import get_context
    from ray.train.torch import get_device

    from p3d.jobs.training.process import train
    from p3d.jobs.training.pulse import Process

    run: TrainRun = config["run"]
    context = get_context()
    process = Process(context.get_world_rank(), context.get_world_size(), get_device(), config["epoch"])
    train(config["url"], config["record"], run, process)


def _original(error: BaseException) -> BaseException:
    """The error of the process that failed first, without Ray Train's wrappers."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        every = [getattr(one, "_base_exc", one) for _, one in sorted(failures.items())]
        return next((one for one in every if isinstance(one, JobError)), every[0])
    return error


def _job_error(error: BaseException | None) -> JobError | None:
    found = None if error is None else _original(error)
    return found if isinstance(found, JobError) else None


def _has_died(error: BaseException | None, workers: int) -> bool:
    """True if a process was killed, or its machine is gone. Of several processes, the others then lose a connection."""
    from ray.exceptions import RayActorError

    if error is None or isinstance(_original(error), JobError | Stopped):
        return False
    return workers > 1 or isinstance(_original(error), RayActorError)


def _cause(error: BaseException | None) -> str:
    return "no error" if error is None else " ".join(str(_original(error)).split())[:300]


@contextlib.contextmanager
def _signals(stop: Callable[[int, Any], None]) -> Iterator[None]:
    """Call `stop` for SIGINT and SIGTERM, in a main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
