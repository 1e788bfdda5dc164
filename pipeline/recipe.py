"""Every option once, in three records that must not be mixed (house rules, "Identity").

    Recipe      what decides the numbers. In OUT/job.json, digested; may not change on one OUT.
    PlanRecord  which videos, in which shards. In OUT/plans/<seq>.json; new ones are added, none edited.
    RunOptions  how fast and how patient. In the epoch record of each run; may change every time.

All three go to JSON and back strictly: an unknown or missing key is refused. None has room for a secret.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Self

from p3d.pipeline.clips.rules import Sampling, parse_sampling
from p3d.pipeline.errors import DamagedJob, InputError, OtherRecipe
from p3d.pipeline.storage.store import DEFAULTS, StoreOptions
from p3d.pipeline.types import FrameSpec

SCHEMA_VERSION = 1
POOLS = ("mean", "max", "mean+max")
DTYPES = ("float32", "float16")
SHOWN = 24  # characters of a value in a message; a sha256 is known by fewer
DECODERS = ("auto", "decord", "pyav", "nvdec")
PARTIAL = ("fail", "keep")
PRECISIONS = ("fp32", "bf16", "fp16")


class _Strict:
    """JSON round trip of a frozen dataclass; tuples become lists and come back as tuples."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return] # only dataclasses inherit this

    @classmethod
    def from_dict(cls, given: Any) -> Self:
        if not isinstance(given, dict):
            raise InputError(f"{cls.__name__}: a JSON object is needed, not {type(given).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type] # as above
        if given.keys() != known:
            odd = sorted(given.keys() ^ known)
            raise InputError(f"{cls.__name__}: unknown or missing keys {odd}; was it written by another version?")
        return cls(**{key: _frozen(value) for key, value in given.items()})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def digest(value: Any) -> str:
    """sha256 hex of the canonical JSON of `value`: sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Recipe(_Strict):
    """What decides the numbers of a row. Two jobs with equal recipes may share a dataset; others may not.

    `weights_sha256` is of our own safetensors file; `resize_hw`, `short_side`, `crop_hw` are pixels (see FrameSpec);
    `fps` is the rate that videos are resampled to, None for their own.
    """

    model: str
    graph: str
    weights_sha256: str
    feature_dim: int
    clip_frames: int
    resize_hw: tuple[int, int] | None
    short_side: int | None
    crop_hw: tuple[int, int]
    clips: str
    frame_step: int
    fps: float | None
    decoder: str
    partial: str
    precision: str
    pool: str
    embedding_dtype: str
    num_classes: int
    scores: bool
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name, allowed in (
            ("pool", POOLS),
            ("embedding_dtype", DTYPES),
            ("decoder", DECODERS),
            ("partial", PARTIAL),
            ("precision", PRECISIONS),
            ("scores", (False, True)),
            ("schema_version", (SCHEMA_VERSION,)),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is one of {allowed}, not {getattr(self, name)!r}")
        if self.feature_dim < 1 or not re.fullmatch(r"[0-9a-f]{64}", self.weights_sha256):
            raise InputError(f"{self.feature_dim = } and {self.weights_sha256 = } do not describe weights")
        if self.num_classes < self.scores:
            raise InputError(f"a network of {self.num_classes} classes has no scores to store: launch without --scores")
        try:
            _ = self.sampling, self.frame_spec
        except ValueError as error:
            raise InputError(str(error)) from None

    @property
    def sampling(self) -> Sampling:
        return parse_sampling(self.clips, clip_frames=self.clip_frames, frame_step=self.frame_step, fps=self.fps)

    @property
    def frame_spec(self) -> FrameSpec:
        return FrameSpec(crop_hw=self.crop_hw, resize_hw=self.resize_hw, short_side=self.short_side)

    @property
    def n_scores(self) -> int:
        """Class probabilities that are stored with each row: K with `--scores`, else 0."""
        return self.num_classes if self.scores else 0

    @property
    def digest(self) -> str:
        return digest(self.to_dict())

    def refuse_other(self, other: Recipe, place: str) -> None:
        """OtherRecipe, with the fields that differ, unless `other` is the same."""
        mine, theirs = self.to_dict(), other.to_dict()
        fields = [
            f"{name} {str(mine[name])[:SHOWN]} (there: {str(theirs[name])[:SHOWN]})"
            for name in mine
            if mine[name] != theirs[name]
        ]
        if fields:
            raise OtherRecipe(
                f"{place} was made with other settings: {'; '.join(fields)}. Use the same ones, or another output"
            )


@dataclass(frozen=True, slots=True)
class PartRecord(_Strict):
    """One manifest part: a Parquet file of `n_videos` rows that hold the shards [first_shard, end_shard)."""

    name: str
    sha256: str
    n_videos: int
    first_shard: int
    end_shard: int


@dataclass(frozen=True, slots=True)
class PlanRecord(_Strict):
    """OUT/plans/<seq>.json: created once and last, so a plan exists whole or not at all, and its number is its own.

    `digest` covers the recipe's digest and the logical rows in order, never the bytes of a Parquet file. The file also
    has the digest of the record itself, so that an edit is found.
    """

    seq: int
    digest: str
    recipe_digest: str
    n_videos: int
    n_shards: int
    size_bytes: int
    n_skipped: int
    parts: tuple[PartRecord, ...]
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> bytes:
        record = {"plan": self.to_dict(), "plan_digest": digest(self.to_dict())}
        return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, place: str) -> Self:
        try:
            given = json.loads(content)
            plan, stated = cls.from_dict(given["plan"]), given["plan_digest"]
        except (ValueError, KeyError, TypeError, InputError) as error:
            raise DamagedJob(f"{place} cannot be read ({error}); restore it") from None
        if stated != digest(plan.to_dict()):
            raise DamagedJob(f"{place} was edited: it does not match its own digest. Restore it")
        return plan

    @property
    def plan8(self) -> str:
        return self.digest[:8]

    @property
    def key(self) -> str:
        """Where this record is in OUT."""
        return f"plans/{self.seq:04d}.json"

    @property
    def folder(self) -> str:
        """Where its manifest parts are in OUT."""
        return f"plans/{self.seq:04d}-{self.plan8}"

    @classmethod
    def from_dict(cls, given: Any) -> Self:
        if isinstance(given, dict) and isinstance(given.get("parts"), list | tuple):
            given = {**given, "parts": [PartRecord.from_dict(part) for part in given["parts"]]}
        return super(PlanRecord, cls).from_dict(given)


@dataclass(frozen=True, slots=True)
class MaxFailures(_Strict):
    """When a job is hopeless: so many failures (`count`), such a share of all videos (`percent`), or, with neither,
    more than half of the first 200 videos failing for one reason."""

    count: int | None = None
    percent: float | None = None

    @classmethod
    def parse(cls, text: str | None) -> MaxFailures:
        """`None`, `25` or `5%`. InputError otherwise."""
        if text is None:
            return cls()
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(%?)", text.strip())
        if match and match[2] and 0 <= float(match[1]) <= 100:
            return cls(percent=float(match[1]))
        if match and not match[2] and match[1].isdigit():
            return cls(count=int(match[1]))
        raise InputError(f"--max-failures is a number (25) or a share of the videos (5%), not {text!r}")


@dataclass(frozen=True, slots=True)
class RunOptions(_Strict):
    """How fast and how patient one run is. On CPU, `batch_size` and `threads` are kept by a resume, because rows are
    bit-identical only for equal ones.

    `workers` GPU or CPU actors; `batch_size` clips; `threads` of the network per CPU worker; `decode_tasks` videos that
    each worker decodes at a time; `video_timeout_s` the longest wait for the next frames of one video,
    `max_decode_memory` the bytes that its decode may take;
    `store_patience_s` how long a store may fail before the job stops, resumable; `s3` how to reach it.
    """

    workers: int
    batch_size: int
    threads: int
    decode_tasks: int
    device: str = "auto"
    video_timeout_s: float = 300.0
    max_duration_s: float = 24 * 3600.0
    max_pixels: int = 64 * 1024 * 1024
    max_file_bytes: int = 256 * 1024**3
    max_decode_memory: int = 4 * 1024**3
    shard_attempts: int = 4
    worker_deaths: int = 8
    store_patience_s: float = 600.0
    max_failures: MaxFailures = MaxFailures()
    s3: StoreOptions = DEFAULTS

    def __post_init__(self) -> None:
        for name in (
            "workers",
            "batch_size",
            "threads",
            "decode_tasks",
            "video_timeout_s",
            "max_decode_memory",
            "shard_attempts",
        ):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} must be more than 0, not {getattr(self, name)}")

    @classmethod
    def from_dict(cls, given: Any) -> Self:
        if isinstance(given, dict) and "max_failures" in given:
            given = {**given, "max_failures": MaxFailures.from_dict(given["max_failures"])}
        if isinstance(given, dict) and isinstance(given.get("s3"), dict):
            given = {**given, "s3": StoreOptions(**given["s3"])}
        return super(RunOptions, cls).from_dict(given)


@dataclass(frozen=True, slots=True)
class JobRecord:
    """job.json: the recipe, its digest and what wrote it. Created once; holds no path of this machine and no secret."""

    recipe: Recipe
    weights_origin: str
    versions: dict[str, str]

    def to_json(self) -> bytes:
        record = {
            "schema_version": SCHEMA_VERSION,
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
            recipe = Recipe.from_dict(given["recipe"])
            stated, origin, versions = given["recipe_digest"], given["weights_origin"], given["versions"]
        except (ValueError, KeyError, TypeError, InputError) as error:
            raise DamagedJob(
                f"{place}/job.json cannot be read ({error}); restore it, or start at another output"
            ) from None
        if stated != recipe.digest:
            raise DamagedJob(f"{place}/job.json was edited: its recipe does not match its digest. Restore it")
        return cls(recipe, origin, versions)
