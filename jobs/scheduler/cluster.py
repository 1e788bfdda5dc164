"""The Ray cluster of a run: one on this machine that ends with the run, or one that is already running.

    (no address)         local_cluster    Ray on this machine's loopback interface
    auto, HOST:PORT      joined_cluster   this process joins a running cluster as a driver, and uploads the code
    ray://HOST:PORT      joined_cluster   the same from outside the cluster, through the Ray client server
    http://HOST:PORT     p3d.jobs.scheduler.submission  a driver is started on the cluster

Other users of this machine can reach neither the ports nor the files of a local cluster: it has a token of its own, in
the environment of its processes, and its session folder lies in a private folder.

Ray puts the driver's working directory first on its workers' path, so a user's own `jobs/` or `pipeline.py` there
would shadow ours (measured). So paths are made absolute first, and Ray starts from a private empty folder.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import ray
from ray._common.utils import get_default_system_temp_dir
from ray._private import ray_constants
from ray._raylet import AuthenticationMode, AuthenticationTokenLoader, Config, get_authentication_mode
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from p3d.jobs.machine import Machines, is_alive, usable_cpus
from p3d.jobs.planning.prepare import MAX_DECODE_TASKS
from p3d.jobs.scheduler.control import is_submitted
from p3d.jobs.scheduler.preflight import NodeReport, look_here, objections, try_gpu
from p3d.jobs.worker.decode_task import BLOCKS_AHEAD
from p3d.jobs.worker.decoding import CHUNK_AHEAD, GPU_SHARE
from p3d.jobs.worker.message_batches import MESSAGE_BATCH_BYTES
from p3d.pipeline.decode.blocks import MESSAGE_FRAMES
from p3d.pipeline.errors import ClusterError, InputError, StoreFull, escape
from p3d.pipeline.recipe import Recipe, RunOptions
from p3d.pipeline.storage.local import writing
from p3d.pipeline.storage.store import StoreOptions

Answer = TypeVar("Answer")
ASK_S = 60.0  # timeout for the answer of a node
RUN_PREFIX = "p3d-run-"
LOOK_S = 5.0  # between two queries of the list of nodes
PROBE_S = 5.0  # between two connection probes of a joined cluster's head, and the timeout of each
PROBES = 4  # failed in a row, after which the head counts as dead
OBJECT_STORE_BYTES = 512 * 1024**2  # of a local cluster, at least
BATCHES = 4  # of a worker whose frames are in shared memory: each of two shards fills one, and two wait for a thread
SHM = Path("/dev/shm")
SHM_PART = 0.95  # of what is free there that Ray may take
SESSION_BYTES = 2 * 1024**2  # free space for the logs and sockets of Ray's session, at least
PROCESSES = 256  # processes and threads of a local cluster, at least; on two cores it had 278
PROCESSES_PER_CORE = 4  # two that fetch or decode, a worker, and the preflight task


@dataclass(slots=True)
class Cluster:
    """The machines of a run. `scratch` is the private folder of this run."""

    machines: Machines
    scratch: Path
    node: Any = None  # Ray's record of the processes that it started for us; None for a joined cluster
    head: tuple[str, int] | None = None  # address of the head of a joined cluster
    asked: float = field(default_factory=time.monotonic)
    failed_probes: int = 0

    def watch(self) -> None:
        """Update `machines` from a thread, since nodes of a joined cluster come and go.

        A call to Ray blocks while the head is silent, and after a minute Ray ends the process. The connection probes of
        `dead` end the run before that.
        """
        while True:
            time.sleep(LOOK_S)
            try:
                self.machines = _machines()
            except Exception:  # noqa: BLE001 - Ray has no class for it, and `dead` detects a lost head
                return

    def dead(self) -> str:
        """The names of Ray's essential processes that have ended; empty while all run.

        Ray itself does not report this: pending calls simply never return. The head of a joined cluster is probed by
        connecting to it now and then, and counts as dead after several failures in a row.
        """
        if self.node is not None:
            ended = {name for name, _ in self.node.dead_processes()}
            return " and ".join(name for name in ("raylet", "gcs_server") if name in ended)
        if self.head is None or time.monotonic() - self.asked < PROBE_S:
            return ""
        self.asked = time.monotonic()
        self.failed_probes = 0 if self.answers() else self.failed_probes + 1
        return "head" if self.failed_probes >= PROBES else ""

    def answers(self) -> bool:
        """True if the head of a joined cluster accepts connections. Checked before calls that would block otherwise."""
        try:
            if self.head is not None:
                socket.create_connection(self.head, timeout=PROBE_S).close()
        except OSError:
            return False
        return True


def store_bytes(decode_tasks: int, workers: int, frame_bytes: int, batch_frames: int, ahead: int = CHUNK_AHEAD) -> int:
    """The bytes of shared memory that the frames in flight of `workers` workers take, at most.

    Each worker has `decode_tasks` decodes, which are at most `ahead` message batches ahead of their reader, and one
    more of each is being read: the default is that of the shares of a long video. Its batches have up to `batch_frames`
    frames of `frame_bytes` bytes.
    """
    message_bytes = MESSAGE_BATCH_BYTES + MESSAGE_FRAMES * frame_bytes  # a batch is sent once it is large enough
    return workers * (decode_tasks * (ahead + 1) * message_bytes + BATCHES * batch_frames * frame_bytes)


def store_of_job(recipe: Recipe, options: RunOptions) -> int:
    """`store_bytes` of all workers of a job on one machine."""
    return store_bytes(options.decode_tasks, options.workers, *_frames(recipe, options))


def _frames(recipe: Recipe, options: RunOptions) -> tuple[int, int]:
    """Bytes of a frame, and the most frames of a batch."""
    height, width = recipe.crop_hw
    return 3 * height * width, options.batch_size * recipe.clip_frames


def object_store_memory(needed: int, free: int) -> int:
    """What a local cluster asks Ray for, if /dev/shm has `free` bytes: all that is needed, or what is there.

    If not even OBJECT_STORE_BYTES are there, Ray puts its store on a disk, so that a job is slow but runs.
    """
    wanted = max(needed, OBJECT_STORE_BYTES)
    return wanted if wanted <= free else max(OBJECT_STORE_BYTES, int(free * SHM_PART))


def little_shared_memory(needed: int, free: int) -> str:
    """A warning if /dev/shm is too small for the frames in flight of a job on this machine; empty otherwise."""
    if max(needed, OBJECT_STORE_BYTES) <= free:
        return ""
    wanted = max(needed, OBJECT_STORE_BYTES) / 1e6
    return (
        f"/dev/shm has {free / 1e6:.0f} MB free, and the frames in flight take up to {wanted:.0f} MB: the job runs, "
        f"but may wait for a disk. Enlarge it (`docker run --shm-size={math.ceil(wanted)}m`)"
    )


def free_shared_memory() -> int:
    """Free bytes of /dev/shm; as many as one likes on a system that has none."""
    return shutil.disk_usage(SHM).free if SHM.exists() else sys.maxsize


def refuse_small_stores(recipe: Recipe, options: RunOptions) -> None:
    """ClusterError if the object store of a node of the joined cluster is too small for the frames of a job."""
    if found := small_stores([node for node in ray.nodes() if node["Alive"]], recipe, options):
        raise ClusterError("; ".join(found))


def small_stores(nodes: list[dict[str, Any]], recipe: Recipe, options: RunOptions) -> list[str]:
    """A message for each of the nodes, as `ray.nodes()` lists them, whose object store is too small for a job.

    Workers are where the GPUs are, or else spread evenly. A node without a worker only holds the messages of its own
    decodes. What long videos may take in addition is left out, since Ray then moves frames to a disk.
    """
    on_gpus = options.device != "cpu" and any(node["Resources"].get("GPU") for node in nodes)
    frame_bytes, batch_frames = _frames(recipe, options)
    found = []
    for node in nodes:
        has = node["Resources"]
        on_it = has.get("GPU", 0) * options.workers_per_gpu if on_gpus else math.ceil(options.workers / len(nodes))
        workers = min(int(on_it), options.workers)
        given = (options.decode_tasks, workers) if workers else (min(int(has.get("CPU", 0)), MAX_DECODE_TASKS), 1)
        needed = store_bytes(*given, frame_bytes, batch_frames if workers else 0, ahead=BLOCKS_AHEAD)
        smaller = ", or use a smaller --batch-size" if workers else ""
        if has.get("object_store_memory", 0) < needed:
            found.append(
                f"{node['NodeManagerHostname']}: Ray's object store has {has.get('object_store_memory', 0) / 1e6:.0f} "
                f"MB, and the frames in flight take {needed / 1e6:.0f} MB. Start Ray there with `ray start "
                f"--object-store-memory={needed}`, with a /dev/shm that is larger{smaller}"
            )
    return found


@contextlib.contextmanager
def joined_cluster(address: str) -> Iterator[Cluster]:
    """Join a cluster as a driver, and leave it at the end. This version's code is uploaded to its nodes.

    ClusterError if the cluster does not answer or refuses the connection.
    """
    if found := address if address != "auto" else _address_of_auto():
        refuse_silent(found)  # Ray would retry for many minutes
    before = Path.cwd()
    with _private_folder() as scratch:
        try:
            with _quiet_start():
                ray.init(
                    address=address,
                    # a submitted driver has the code already, and Ray refuses to get it twice
                    runtime_env=None if is_submitted() else {"py_modules": code_folders()},
                    log_to_driver=False,
                    logging_level="ERROR",
                    namespace="p3d",
                )
        except Exception as error:  # Ray has no class for it
            raise ClusterError(
                f"the Ray cluster at {address} could not be joined ({' '.join(str(error).split())[:300]}). Is it up, "
                "of this version of Ray and Python, and is its token here (`ray get-auth-token`, RAY_AUTH_TOKEN)?"
            ) from error
        with contextlib.suppress(OSError):  # it was deleted meanwhile
            os.chdir(before)  # Ray has noted the empty folder; SRC and weights may be relative to this one
        cluster = Cluster(_machines(), scratch, head=_head(address))
        threading.Thread(target=cluster.watch, name="watch", daemon=True).start()
        yield cluster


def _refuse_full(folder: Path) -> None:
    """StoreFull, which names the folder, if Ray's session could not start there: Ray itself would only time out."""
    free = shutil.disk_usage(folder).free
    if free < SESSION_BYTES:
        raise StoreFull(
            f"{folder}: the disk is full ({free / 1e6:.1f} MB free); free some space, or set TMPDIR to another folder"
        )


def refuse_few_processes() -> None:
    """ClusterError if `ulimit -u` allows too few processes and threads: Ray's C++ would abort, or never end."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if os.geteuid() != 0 and limit != resource.RLIM_INFINITY and limit < PROCESSES:
        raise ClusterError(
            f"this user may have only {limit} processes and threads, and Ray needs at least {PROCESSES}; raise the "
            "limit of `ulimit -u`"
        )


def refuse_without_loopback() -> None:
    """ClusterError unless this machine can connect to itself. Without that Ray would try for many minutes."""
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            socket.create_connection(listener.getsockname(), timeout=PROBE_S).close()
    except OSError as error:
        raise ClusterError(
            f"this machine cannot connect to itself at 127.0.0.1, as Ray must ({error.strerror or error}); is its "
            "loopback interface up (`ip link set lo up`)?"
        ) from None


def _machines() -> Machines:
    total, nodes = ray.cluster_resources(), [node for node in ray.nodes() if node["Alive"]]
    each = [(int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0))) for node in nodes]
    smallest = min((cpus for cpus, _ in each), default=0)
    with_gpus = tuple((cpus, gpus) for cpus, gpus in each if gpus)
    return Machines(int(total.get("CPU", 0)), max(1, smallest), int(total.get("GPU", 0)), with_gpus)


def refuse_silent(address: str) -> None:
    """ClusterError if nothing listens at HOST:PORT. The address may have any scheme. InputError if it is not one."""
    url = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        where = (url.hostname or "", url.port or {"http": 80, "https": 443}[url.scheme])
    except (ValueError, KeyError):
        raise InputError(f"--address {address}: HOST:PORT was expected") from None
    try:
        socket.create_connection(where, timeout=PROBE_S).close()
    except OSError as error:
        raise ClusterError(f"nothing answers at {address} ({error.strerror or error})") from None


def _address_of_auto() -> str:
    """Where Ray would look for a running cluster, which may have ended; empty if it knows none."""
    with contextlib.suppress(Exception):  # Ray has no public function for it; without one, Ray itself looks
        return str(ray._private.services.get_ray_address_from_environment("auto", None))
    return ""


def _head(address: str) -> tuple[str, int]:
    """Address of the head: of its client server for ray://, else of its control store (GCS)."""
    where = address.removeprefix("ray://") if address.startswith("ray://") else ray.get_runtime_context().gcs_address
    host, _, port = where.rpartition(":")
    return host, int(port)


def code_folders() -> list[str]:
    """The folder of `p3d` as this process imports it: all code that the nodes of a cluster need.

    Ray follows its symbolic links when packing it, so the nodes get one real folder from a checkout, too.
    """
    import p3d

    return [str(Path(str(p3d.__file__)).parent)]


@contextlib.contextmanager
def local_cluster(*, cpus: int | None = None, frames_bytes: int = 0) -> Iterator[Cluster]:
    """Start Ray on this machine's loopback interface, without a dashboard. Stop it at the end.

    Its object store holds `frames_bytes` of frames (`store_of_job`), or what fits into /dev/shm.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise Ray sends usage statistics
    os.environ.pop("PYTHONOPTIMIZE", None)  # Ray's processes need their docstrings
    _absolute_tmpdir()
    _loopback_only()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads of a worker would take cores from decoders
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")  # a thread's own glibc arena has 64 MB, and a layer may be larger
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; silences its warning
    # Ray keeps this many idle processes; it would end more after a second, and a new one takes a second of CPU time
    os.environ.setdefault("RAY_num_workers_soft_limit", str(PROCESSES_PER_CORE * (cpus or usable_cpus())))
    refuse_few_processes()
    refuse_without_loopback()
    with own_token(), _private_folder() as scratch:
        sessions = _sessions()
        _refuse_full(sessions.parent)
        try:
            with _quiet_start(), _few_processes():
                ray.init(
                    address="local",
                    _temp_dir=str(sessions),
                    num_cpus=cpus or usable_cpus(),
                    object_store_memory=object_store_memory(frames_bytes, free_shared_memory()),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    namespace="p3d",
                )
        except Exception as error:  # Ray has no class for it
            raise ClusterError(
                f"Ray could not start on this machine ({' '.join(str(error).split())}). Common causes: little memory, "
                "a full /tmp or /dev/shm, a small `ulimit -n`, a TMPDIR with a long name or one that is not ASCII; its "
                f"logs are in {sessions}/session_latest/logs"
            ) from error
        yield Cluster(_machines(), scratch, ray._private.worker._global_node)


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    """Start Ray so that it prints nothing, and records the command line escaped.

    Ray prints errors of the cluster on stdout in colour, such as a worker that died, also with `log_to_driver=False`.
    stdout is ours, and `--json` is read by programs; the run's own log names these events. A command line that names a
    file which is not UTF-8 would end `ray.init`.
    """
    ray._private.worker._worker_logs_enabled = False
    recorded = ray._private.utils.get_entrypoint_name
    ray._private.utils.get_entrypoint_name = lambda: escape(recorded())
    try:
        yield
    finally:
        ray._private.utils.get_entrypoint_name = recorded


@contextlib.contextmanager
def _few_processes() -> Iterator[None]:
    """Start Ray without the processes that a cluster of one machine does not use.

    The autoscaler's monitor, the log monitor and the dashboard take a third of the CPU seconds of a start. Ray has no
    public option for them. Where a version of Ray starts them otherwise, they run as before. The agent stays, because
    it serves the metrics.
    """

    def no_server(*_: object, **__: object) -> tuple[None, None]:
        return None, None

    private = ray._private
    fewer = partial(private.parameter.RayParams, no_monitor=True, include_log_monitor=False)
    changes = (
        (private.parameter, "RayParams", fewer),
        (private.services, "start_api_server", no_server),
    )
    with contextlib.ExitStack() as stack:
        for module, name, changed in changes:
            if hasattr(module, name):
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, changed)
        yield


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """A temporary folder from which Ray is started. Afterwards Ray is shut down and the folder removed."""
    _sweep_dead_runs()
    before = Path.cwd()
    with writing(Path(tempfile.gettempdir())):
        scratch = Path(tempfile.mkdtemp(prefix=f"{RUN_PREFIX}{os.getpid()}-"))
        (scratch / "empty").mkdir()
    os.chdir(scratch / "empty")
    try:
        yield scratch
    finally:
        ray.shutdown()
        with contextlib.suppress(OSError):  # it was deleted during the run
            os.chdir(before)
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def own_token() -> Iterator[None]:
    """A token that Ray's processes of this run demand, in the environment, which no other user can read.

    Ray itself would write one to a file that other users can read. RAY_AUTH_MODE=disabled remains in force.
    """
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    before = {name: os.environ.get(name) for name in names}
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    _read_token_again()
    if before["RAY_AUTH_MODE"] is None and get_authentication_mode() != AuthenticationMode.TOKEN:
        del os.environ["RAY_AUTH_MODE"]  # this version of Ray has read the mode once and for all
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})
        _read_token_again()


def _read_token_again() -> None:
    """Make Ray in this process forget the mode and the token that it has read from the environment."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _sessions() -> Path:
    """Where Ray makes its session folders: in a private folder of this user, as Ray opens its own to all users.

    ClusterError if the folder is not private, which another user may have made. Its name is short, since the paths of
    sockets are limited to 107 bytes.
    """
    private = Path(get_default_system_temp_dir()) / f"p3d-{os.geteuid()}"
    try:
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = private.lstat()
    except OSError as error:
        raise ClusterError(f"{private} cannot be made for Ray's session ({error.strerror}); set TMPDIR") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ClusterError(
            f"{private} is not a private folder of this user; remove it, or set TMPDIR to another folder"
        )
    return private / "ray"


def _absolute_tmpdir() -> None:
    """Make a relative TMPDIR absolute, since Ray and its processes start in another working directory."""
    for name in ("TMPDIR", "RAY_TMPDIR"):
        if os.environ.get(name):
            os.environ[name] = str(Path(os.environ[name]).absolute())


def _loopback_only() -> None:
    """Make Ray listen on 127.0.0.1 only, as on a Mac. On Linux it listens on all interfaces by default."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # for the processes it starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # read from the environment when ray was imported


def _sweep_dead_runs() -> None:
    """Remove the private folders of runs on this machine whose process has ended."""
    for folder in Path(tempfile.gettempdir()).glob(f"{RUN_PREFIX}*-*"):
        pid = folder.name.removeprefix(RUN_PREFIX).partition("-")[0]
        if pid.isdigit() and not is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def refuse_unfit(out_url: str, key: str, source: str, options: StoreOptions, *, nvdec: bool = False) -> None:
    """ClusterError with one message per problem if a node cannot run the job. `nvdec`: the job decodes on GPUs."""
    problems = inspect_nodes(out_url, key, source, options)[1]
    if problems := problems or (unfit_gpus() if nvdec else []):
        raise ClusterError("; ".join(problems))


def unfit_gpus() -> list[str]:
    """A message for each node with a GPU that does not decode the sample file. One GPU of each node is tried.

    The others are tried when a worker starts on them.
    """
    found, silent = ask_nodes(try_gpu, num_gpus=GPU_SHARE)
    return [f"{one}; do other jobs on this cluster use all of its GPUs?" for one in silent] + [
        one for one in found if one
    ]


def inspect_nodes(out_url: str, key: str, source: str, options: StoreOptions) -> tuple[list[NodeReport], list[str]]:
    """The report of each node, and the problems found (one message each)."""
    question = (out_url, key, source, options)
    reports, silent = ask_nodes(look_here, *question)
    return reports, silent + objections([look_here(*question), *reports], downloads=source.startswith("s3://"))


def ask_nodes(question: Callable[..., Answer], *about: object, num_gpus: float = 0) -> tuple[list[Answer], list[str]]:
    """Call `question(*about)` on every live node. The answers, and a message for each node that did not answer.

    With `num_gpus`, the share of a GPU that each call reserves, only nodes with a GPU are asked. Ray ends the process
    of such a call after it, and with that its memory on the GPU.
    """
    asked = {
        ray.remote(num_cpus=0, num_gpus=num_gpus, max_retries=0)(question)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(*about): node["NodeManagerHostname"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU", 0) >= num_gpus
    }
    ray.wait(list(asked), num_returns=len(asked), timeout=ASK_S)
    answers, silent = list[Answer](), list[str]()
    for reference, host in asked.items():
        try:
            answers.append(ray.get(reference, timeout=0))
        except GetTimeoutError:
            silent.append(f"{host} did not answer within {ASK_S:g} s")
        except RayError as error:
            silent.append(f"{host} could not answer: {' '.join(str(error).split())[:300]}")
    return answers, silent
