"""All options of a job, each in exactly one of three records, which are kept separate.

    Recipe      what decides the numbers of a row. In OUT/job.json with a digest; must not change on one OUT.
    PlanRecord  which videos, in which shards. In OUT/plans/<seq>.json; new plans are added, none is edited.
    RunOptions  speed, limits and retries. In the epoch record of each run; may change with every run.

All three convert to JSON and back strictly: an unknown or missing key is an error. None has a field for a secret.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, TypedDict, get_args

from p3d.pipeline.clips.pool import POOLS
from p3d.pipeline.clips.rules import Sampling, parse_sampling
from p3d.pipeline.errors import MALFORMED, DamagedJob, InputError, OtherRecipe, escape
from p3d.pipeline.storage.store import DEFAULTS, StoreOptions
from p3d.pipeline.types import FrameSpec, checked, shard_name
from p3d.pipeline.types.options import (
    ABSENT,
    DEVICES,
    check_options,
    decode_memory_option,
    max_failures_option,
    option,
    threads_option,
    video_timeout_option,
)
from p3d.pipeline.types.policy import (
    MAX_DURATION_S,
    MAX_FILE_BYTES,
    MAX_PIXELS,
    DecodeLimits,
    DecodePolicy,
    Decoder,
    Partial,
)
from p3d.pipeline.types.versions import SCHEMA_VERSION, exactly, in_version, names_in, refuse_newer

DTYPES = ("float32", "float16")
SHA256 = "[0-9a-f]{64}"
PART = "manifest-[0-9]{5}\\.parquet"
PART_ROWS = 1 << 17  # of a manifest part that is written now, at most
MOST_PART_ROWS = 1_000_000  # of one that is read
MOST_NUMBERS = 1 << 20  # of a row, features or class probabilities; the largest network has 4096 features
SHOWN = 24  # characters of a value in a message; fewer are enough to recognise a sha256
SHOWN_ORIGIN = 200  # of the origin of weights
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
MOST_SHARD_VIDEOS = 100_000
SHARD_VIDEOS = 64  # in a shard where the cost of a video is not known
SHARD_S = 60.0  # seconds of one worker in a shard, about, where it is
VIDEO_TIMEOUT_S = 300.0
SHARD_ATTEMPTS = 4
WORKER_DEATHS = 8
MAX_DECODE_MEMORY = 4 * 1024**3  # bytes; a decode of 8K in 10 bits takes under 2 GiB
WORKERS_PER_GPU = 16  # at most; each has a CUDA context and a copy of the weights
CPU_BATCH = 4  # clips
GPU_BATCH = 32


class _Strict:
    """JSON round trip of a frozen dataclass; tuples become lists and come back as tuples.

    A record with a `schema_version` has the fields of that version. Its other fields say what that version did.
    """

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        return in_version(self, getattr(self, "schema_version", SCHEMA_VERSION))

    @classmethod
    def from_dict(cls, given: Any, version: int = SCHEMA_VERSION) -> Self:
        """Read the JSON object of a record of `version`, unless it states its own. OtherVersion, InputError."""
        if not isinstance(given, dict):
            raise InputError(f"{cls.__name__}: expected a JSON object, not {type(given).__name__}")
        try:
            exactly(cls, given, refuse_newer(given.get("schema_version", version), "it"))
        except ValueError as error:
            raise InputError(f"{cls.__name__}: {error}") from None
        return cls(**{key: _frozen(value) for key, value in given.items()})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def new_job_id() -> str:
    """A random id for a new job: 32 hex digits."""
    return os.urandom(16).hex()


def check_names(named: dict[str, tuple[Any, str]]) -> None:
    """InputError unless each text matches its pattern: they become part of keys, and may come from somebody else."""
    for name, (text, pattern) in named.items():
        if not isinstance(text, str) or not re.fullmatch(pattern, text):
            raise InputError(f"{name} {str(text)[:100]!r} is not one that p3d writes")


def digest(value: Any) -> str:
    """sha256 hex of the canonical JSON of `value`: sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeOptions:
    """What users choose of a Recipe: options that decide the numbers of a row."""

    clips: str = option(
        "every:16", "Cut clips by every:STRIDE, uniform:COUNT, spread:COUNT or random:COUNT@SEED.", metavar="RULE"
    )
    frame_step: int = option(1, "Take every Nth frame into a clip.", low=1, metavar="N")
    fps: float | None = option(
        None,
        "Resample to R frames/s by time, so that all clips span equal time.",
        low=0,
        above=True,
        high=240,
        metavar="R",
        default_text="native frames",
    )
    pool: str = option("mean", "Pool clip vectors into a video vector.", choices=POOLS)
    scores: bool = option(False, "Store class probabilities, too, per clip and per video.")
    embedding_dtype: str = option("float32", "Store vectors in this type.", choices=DTYPES)
    precision: str = option(
        "fp32",
        "Run the network in this precision. fp16 and tf32: CUDA only. `plan` compares them with fp32.",
        choices=PRECISIONS,
    )
    decoder: Decoder = option(
        "auto",
        "Decode with this library. auto: the faster correct one of decord and PyAV. nvdec: on an NVIDIA GPU, whose "
        "colours differ.",
        choices=get_args(Decoder),
    )
    partial: Partial = option(
        "fail", "Let a damaged video fail, or keep its readable beginning.", choices=get_args(Partial)
    )


class RecipeKeywords(TypedDict, total=False):
    """The fields of RecipeOptions as keyword arguments of the Python API."""

    clips: str
    frame_step: int
    fps: float | None
    pool: str
    scores: bool
    embedding_dtype: str
    precision: str
    decoder: Decoder
    partial: Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What users choose of a plan: which videos, in which shards."""

    id_column: str | None = option(
        None,
        "Take video ids from this column of a CSV, TSV, JSONL or Parquet list.",
        metavar="NAME",
        default_text="ids made from paths",
    )
    include: tuple[str, ...] = option(
        (),
        "Take only videos whose path below SRC matches, such as 'talks/**/*.mp4'. May be repeated.",
        metavar="GLOB",
        default_text="all",
    )
    exclude: tuple[str, ...] = option(
        (),
        "Leave out files and folders whose path below SRC matches. May be repeated.",
        metavar="GLOB",
        default_text="none",
    )
    limit: int | None = option(None, "Take only the first N videos.", low=1, metavar="N", default_text="all")
    shard_videos: int | None = option(
        None,
        "Put N videos into a shard, the unit of commit and resume.",
        low=1,
        high=MOST_SHARD_VIDEOS,
        metavar="N",
        default_text="about a minute of work, else 64",
    )

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            given: Any = getattr(self, name)
            globs = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else given or ()
            if isinstance(globs, tuple) and not all(isinstance(glob, str) for glob in globs):
                raise InputError(f"{name} must be texts, not {given!r}")
            object.__setattr__(self, name, globs)
        check_options(self)


class PlanKeywords(TypedDict, total=False):
    """The fields of PlanOptions as keyword arguments of the Python API."""

    id_column: str | None
    include: str | Sequence[str] | None
    exclude: str | Sequence[str] | None
    limit: int | None
    shard_videos: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(RecipeOptions, _Strict):
    """What decides the numbers of a row. Jobs may share a dataset only if their recipes are equal.

    Device, batch size, threads and versions of libraries may change the last bits. They are in the footers of shards.

    `weights_sha256` is of our own safetensors file. `resize_hw`, `short_side` and `crop_hw` are in pixels (see
    FrameSpec). `fps` is the rate that videos are resampled to, None for their own.
    """

    model: str
    graph: str
    weights_sha256: str
    feature_dim: int
    clip_frames: int
    resize_hw: tuple[int, int] | None
    short_side: int | None
    crop_hw: tuple[int, int]
    num_classes: int
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        check_options(self)
        if self.schema_version not in range(1, SCHEMA_VERSION + 1):
            raise InputError(f"schema_version must be 1 to {SCHEMA_VERSION}, not {self.schema_version!r}")
        if newer := self._newer_than(self.schema_version):
            raise InputError(f"{newer} cannot be chosen in an output of schema version {self.schema_version}")
        check_names({"weights_sha256": (self.weights_sha256, SHA256)})
        if not 1 <= self.feature_dim <= MOST_NUMBERS or not 0 <= self.num_classes <= MOST_NUMBERS:
            raise InputError(f"feature_dim {self.feature_dim} or num_classes {self.num_classes} is out of range")
        if self.num_classes < self.scores:
            raise InputError(f"a network of {self.num_classes} classes has no scores to store: launch without --scores")
        try:
            _ = self.sampling, self.frame_spec
        except ValueError as error:
            raise InputError(str(error)) from None

    def _newer_than(self, version: int) -> str:
        """The first field that came after a version and does not say what it did; empty without one."""
        newer = (field for field in dataclasses.fields(self) if field.name not in names_in(Recipe, version))
        return next((field.name for field in newer if getattr(self, field.name) != field.default), "")

    def in_version(self, version: int) -> Recipe:
        """This recipe in an older schema version, in which it gives the same numbers. OtherRecipe if it cannot."""
        if version >= self.schema_version:
            return self
        if newer := self._newer_than(version):
            raise OtherRecipe(
                f"{newer} needs an output of schema version {self.schema_version}, and this one is of {version}: leave "
                "that option out, or use another output"
            )
        return dataclasses.replace(self, schema_version=version)

    @classmethod
    def from_dict(cls, given: Any, version: int = SCHEMA_VERSION) -> Self:
        recipe = super(Recipe, cls).from_dict(given, version)
        for hw in (recipe.resize_hw, recipe.crop_hw):
            if hw is not None and not (len(hw) == 2 and all(type(side) is int for side in hw)):
                raise InputError(f"a height and a width were expected, not {str(hw)[:SHOWN]}")
        return checked([recipe])[0]

    @property
    def sampling(self) -> Sampling:
        return parse_sampling(self.clips, clip_frames=self.clip_frames, frame_step=self.frame_step, fps=self.fps)

    @property
    def frame_spec(self) -> FrameSpec:
        return FrameSpec(crop_hw=self.crop_hw, resize_hw=self.resize_hw, short_side=self.short_side)

    @property
    def decode_policy(self) -> DecodePolicy:
        return DecodePolicy(self.decoder, self.partial)

    @property
    def n_scores(self) -> int:
        """Number of class probabilities stored with each row: K with `--scores`, else 0."""
        return self.num_classes if self.scores else 0

    @property
    def digest(self) -> str:
        return digest(self.to_dict())

    def differences(self, other: Recipe, origins: tuple[str, str] = ("", "")) -> str:
        """The fields that differ in another recipe, which may be of an older version; empty if the two are equal.

        Each is named with its value in the other recipe, and then in this one.
        `origins` say where the weights of both are from. If they differ, they are named instead of the digests.
        """
        mine, theirs = self.in_version(other.schema_version).to_dict(), other.to_dict()
        fields = {
            name: (str(mine[name])[:SHOWN], str(theirs[name])[:SHOWN]) for name in mine if mine[name] != theirs[name]
        }
        here, there = (with_short_digests(origin)[:SHOWN_ORIGIN] for origin in origins)
        if "weights_sha256" in fields and here and there and here != there:
            fields["weights"] = here, there
            del fields["weights_sha256"]
        return "; ".join(f"{name} {there}, not {here}" for name, (here, there) in fields.items())

    def refuse_other(self, other: Recipe, place: str, origins: tuple[str, str] = ("", "")) -> None:
        """Raise OtherRecipe, naming the `differences`, unless `other` is equal."""
        if listed := self.differences(other, origins):
            raise OtherRecipe(f"{place} was made with other settings: {listed}. Use the same ones, or another output")


def part_name(at: int) -> str:
    """The name of a plan's part, by its position from 0."""
    return f"manifest-{at:05d}.parquet"


@dataclass(frozen=True, slots=True)
class PartRecord(_Strict):
    """One manifest part: a Parquet file of `n_videos` rows with the shards [first_shard, end_shard)."""

    name: str
    sha256: str
    n_videos: int
    first_shard: int
    end_shard: int

    def check(self) -> None:
        """InputError unless the name and the counts are those of a part that p3d writes."""
        check_names({"part": (self.name, PART), "sha256": (self.sha256, SHA256)})
        first, end, n_videos = numbers = (self.first_shard, self.end_shard, self.n_videos)
        ints = all(type(number) is int for number in numbers)
        if not ints or not 0 <= first < end <= first + n_videos <= first + MOST_PART_ROWS:
            raise InputError(f"{self.name}: {numbers = } are not those of a part")


@dataclass(frozen=True, slots=True)
class ShardSizing(_Strict):
    """What decides which videos make a shard: at most `videos`, and about SHARD_S seconds of one worker.

    A video of M megabytes takes `seconds_per_video + seconds_per_mb * M` seconds of one worker on a device of the kind
    `device`; 0 of both means that nothing is known.
    """

    videos: int = SHARD_VIDEOS
    device: str = ""
    seconds_per_video: float = 0.0
    seconds_per_mb: float = 0.0

    @property
    def is_known(self) -> bool:
        """True if it tells what a video costs."""
        return self.seconds_per_video > 0 or self.seconds_per_mb > 0

    def seconds(self, size_bytes: int) -> float:
        """Seconds of one worker that a video of this size takes, about; 0 if that is not known."""
        return self.seconds_per_video + self.seconds_per_mb * max(size_bytes, 0) / 1e6

    def check(self) -> None:
        """InputError unless the values are those that p3d writes."""
        seconds = (self.seconds_per_video, self.seconds_per_mb)
        if type(self.videos) is not int or not 1 <= self.videos <= MOST_SHARD_VIDEOS:
            raise InputError(f"sizing: {self.videos!r} is not a number of videos")
        if not all(isinstance(one, int | float) and 0 <= one < math.inf for one in seconds):
            raise InputError(f"sizing: {seconds} are not seconds")
        check_names({"sizing.device": (self.device, "[a-z]{0,16}")})


@dataclass(frozen=True, slots=True)
class PlanRecord(_Strict):
    """OUT/plans/<seq>.json: created once, after the parts, so a plan is complete or absent and its number is unique.

    `digest` covers the recipe's digest and the logical rows in order, not the bytes of a Parquet file. The file also
    has the digest of the record itself, so that an edit is detected.
    """

    seq: int
    digest: str
    recipe_digest: str
    n_videos: int
    n_shards: int
    size_bytes: int
    n_skipped: int
    parts: tuple[PartRecord, ...]
    sizing: ShardSizing
    schema_version: int = SCHEMA_VERSION

    def check(self) -> None:
        """InputError unless the names and the counts are those of a plan that p3d writes."""
        self.sizing.check()
        check_names({"digest": (self.digest, SHA256), "recipe_digest": (self.recipe_digest, SHA256)})
        numbers = (self.seq, self.size_bytes, self.n_skipped)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise InputError(f"{numbers = } are not counts")
        for at, part in enumerate(self.parts):
            part.check()
            if part.name != part_name(at):
                raise InputError(f"its part {at} is {part.name}")
        edges = [0, *(part.end_shard for part in self.parts)]
        starts = [part.first_shard for part in self.parts]
        if not starts or edges[:-1] != starts or edges[-1] != self.n_shards:
            raise InputError("its parts do not have its shards")
        if sum(part.n_videos for part in self.parts) != self.n_videos:
            raise InputError("its parts do not have its videos")

    def to_json(self) -> bytes:
        record = {"plan": self.to_dict(), "plan_digest": digest(self.to_dict())}
        return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, place: str) -> Self:
        try:
            given = json.loads(content)
            if given["plan_digest"] != digest(given["plan"]):  # of what was written, in whatever version
                raise DamagedJob(f"{place} was edited: it does not match its own digest. {RESTORE}")
            refuse_newer(given["plan"]["schema_version"], place)
            plan = cls.from_dict(given["plan"])
            plan.check()
        except (*MALFORMED, InputError) as error:
            raise DamagedJob(f"{place} cannot be read ({error}); restore it") from None
        return plan

    @property
    def plan8(self) -> str:
        return self.digest[:8]

    @property
    def shard_names(self) -> list[str]:
        """The name of every shard, by position in the plan."""
        return [shard_name(self.plan8, shard) for shard in range(self.n_shards)]

    @property
    def key(self) -> str:
        """The key of this record in OUT."""
        return f"plans/{self.seq:04d}.json"

    @property
    def folder(self) -> str:
        """The folder of its manifest parts in OUT."""
        return f"plans/{self.seq:04d}-{self.plan8}"

    @classmethod
    def from_dict(cls, given: Any, version: int = SCHEMA_VERSION) -> Self:
        if isinstance(given, dict) and isinstance(given.get("parts"), list | tuple):
            version = refuse_newer(given.get("schema_version", version), "it")
            given = {**given, "parts": [PartRecord.from_dict(part, version) for part in given["parts"]]}
            early = ShardSizing().to_dict()  # what programs did that did not write it
            given["sizing"] = ShardSizing.from_dict(given.get("sizing", early), version)
        return super(PlanRecord, cls).from_dict(given, version)


@dataclass(frozen=True, slots=True)
class MaxFailures(_Strict):
    """When a job stops early: at `count` failures or `percent` of all videos. With neither, it stops if more than half
    of the first 200 videos fail for one reason."""

    count: int | None = None
    percent: float | None = None

    @classmethod
    def parse(cls, given: str | int | None) -> MaxFailures:
        """Parse `None`, `25` or `5%`. InputError for anything else."""
        if given is None:
            return cls()
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(%?)", str(given).strip())
        if match and match[2] and 0 <= float(match[1]) <= 100:
            return cls(percent=float(match[1]))
        if match and not match[2] and match[1].isdigit():
            return cls(count=int(match[1]))
        raise InputError(f"--max-failures must be a number (25) or a share of the videos (5%), not {given!r}")


@dataclass(frozen=True, slots=True)
class RunOptions(_Strict):
    """Speed, limits and retries of one run. On CPU, a resume keeps `batch_size` and `threads`, because rows are
    bit-identical only if these are equal.

    `workers` are GPU or CPU actors, of which `workers_per_gpu` share a GPU. `decode_tasks`: videos that each worker
    decodes at a time. `shard_attempts` and `worker_deaths`: how often a shard may fail, and workers may die, before the
    job stops. `s3` is how to reach the store.
    """

    workers: int = option(
        ABSENT, "Start N workers.", low=1, metavar="N", default_text="--workers-per-gpu for each GPU, else 1"
    )
    batch_size: int = option(
        ABSENT,
        "Embed N clips at a time.",
        low=1,
        metavar="N",
        default_text=f"{GPU_BATCH} on a GPU, {CPU_BATCH} on a CPU",
    )
    threads: int = threads_option(ABSENT, "Use N threads per batch on a CPU.", "half the cores", low=1)
    decode_tasks: int = ABSENT
    workers_per_gpu: int = option(
        1,
        "Run N workers on each GPU, where one cannot be fed fast enough (`plan` says how fast).",
        low=1,
        high=WORKERS_PER_GPU,
        metavar="N",
    )
    device: str = option("auto", "Compute on this device. CUDA_VISIBLE_DEVICES chooses GPUs.", choices=DEVICES)
    video_timeout_s: float = video_timeout_option(
        VIDEO_TIMEOUT_S, "Fail a video as decode_timeout after this long without frames."
    )
    max_duration_s: float = option(
        MAX_DURATION_S,
        "Fail longer videos as too_long, without decoding.",
        low=0,
        above=True,
        metavar="SECONDS",
        flag="max-duration",
        default_text=f"{MAX_DURATION_S:g} (one day)",
    )
    max_pixels: int = option(MAX_PIXELS, "Fail videos with larger frames as too_large.", low=1, metavar="N")
    max_file_bytes: int = option(
        MAX_FILE_BYTES,
        "Fail larger files as too_large.",
        low=1,
        metavar="N",
        default_text=f"{MAX_FILE_BYTES >> 30} GiB",
    )
    max_decode_memory: int = decode_memory_option(
        MAX_DECODE_MEMORY, "Fail a video as decode_memory if its decode takes more."
    )
    shard_attempts: int = SHARD_ATTEMPTS
    worker_deaths: int = WORKER_DEATHS
    store_patience_s: float = option(
        600.0,
        "Stop the job, resumable, after a store fails for this long.",
        low=0,
        metavar="SECONDS",
        flag="store-patience",
    )
    max_failures: MaxFailures = max_failures_option(
        MaxFailures(), "Stop when more videos than this fail.", "when over half of the first 200 fail for one reason"
    )
    s3: StoreOptions = DEFAULTS

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("decode_tasks", "shard_attempts"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} must be more than 0, not {getattr(self, name)}")

    @property
    def decode_limits(self) -> DecodeLimits:
        return DecodeLimits(self.max_duration_s, self.max_pixels, self.max_file_bytes)

    @classmethod
    def from_dict(cls, given: Any, version: int = SCHEMA_VERSION) -> Self:
        if isinstance(given, dict) and "max_failures" in given:
            given = {**given, "max_failures": MaxFailures.from_dict(given["max_failures"])}
        if isinstance(given, dict) and isinstance(given.get("s3"), dict):
            given = {**given, "s3": StoreOptions(**given["s3"])}
        return super(RunOptions, cls).from_dict(given, version)


class RunKeywords(TypedDict, total=False):
    """The options of RunOptions as keyword arguments of the Python API."""

    workers: int | None
    batch_size: int | None
    threads: int | None
    workers_per_gpu: int | None
    device: str | None
    video_timeout_s: float | None
    max_duration_s: float | None
    max_pixels: int | None
    max_file_bytes: int | None
    max_decode_memory: int | None
    store_patience_s: float | None
    max_failures: str | int | None


def with_short_digests(origin: str) -> str:
    """The origin of weights for a person: 8 digits of each SHA-256 are enough to recognise it. The record has all."""
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1...", origin)


RESTORE = "Restore it from a copy; without one, launch into another output"
_JOB_FIELDS = frozenset({"schema_version", "recipe", "recipe_digest", "weights_origin", "versions"})


def _writer(given: dict[str, Any]) -> str:
    """Which p3d wrote a job.json, for the message of a version that cannot read it."""
    versions = given.get("versions")
    ours = versions.get("p3d-embeddings") if isinstance(versions, dict) else None
    return f", which p3d {escape(ours[:SHOWN])} wrote," if isinstance(ours, str) else ""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """job.json: the recipe, its digest and the versions that wrote it. Created once; holds no local path, no secret.

    `job_id` is 32 random hex digits that tell this job from any other, also from one with the same recipe. It is empty
    for a job of a version that did not write it.
    """

    recipe: Recipe
    weights_origin: str
    versions: dict[str, str]
    job_id: str = ""

    def to_json(self) -> bytes:
        record = {
            "schema_version": self.recipe.schema_version,
            **({"job_id": self.job_id} if self.job_id else {}),
            "recipe": self.recipe.to_dict(),
            "recipe_digest": self.recipe.digest,
            "weights_origin": self.weights_origin,
            "versions": self.versions,
        }
        return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, place: str) -> JobRecord:
        try:
            given = json.loads(content)
            stated, written = given["recipe_digest"], given["recipe"]
            if stated != digest(written):  # of what was written, in whatever version
                raise DamagedJob(f"{place}/job.json was edited: its recipe does not match its digest. {RESTORE}")
            version = refuse_newer(written["schema_version"], f"{place}{_writer(given)}")
            if odd := sorted(given.keys() - {"job_id"} ^ _JOB_FIELDS):
                raise InputError(f"unknown or missing keys: {', '.join(odd)[:100]}")
            if given["schema_version"] != version:
                stated = str(given["schema_version"])[:SHOWN]
                raise InputError(f"its schema_version is {stated!r}, and that of its recipe {version!r}")
            recipe = Recipe.from_dict(written)
            origin, versions = given["weights_origin"], given["versions"]
            job_id = given.get("job_id", "")
            if not isinstance(job_id, str) or not re.fullmatch(r"([0-9a-f]{32})?", job_id):
                raise InputError("its job_id is not 32 hex digits")
            if not isinstance(origin, str) or not all(isinstance(one, str) for one in versions.values()):
                raise InputError("its weights_origin or versions are not text")
        except (*MALFORMED, InputError) as error:
            raise DamagedJob(
                f"{place}/job.json cannot be read ({error}); restore it, or start at another output"
            ) from None
        return cls(recipe, origin, versions, job_id)
