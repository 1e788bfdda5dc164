"""Draw rows of an output, embed their source videos again by its recipe, and compare: `p3d verify --recompute`.

    newest clips of OUT ──draw by a seed──> their shards ──rows──> compare ──> RowFound ...
                                                │                     ^
                                                └─ uri, recipe ─> decode, embed as the job did

Only the shards of drawn rows are read. Of a video all frames that the job decoded are decoded, and only the drawn clips
are embedded. On a CPU the bits of a row do not depend on its neighbours in the batch.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from p3d.jobs.job import stored_weights, weights_key
from p3d.jobs.machine import software
from p3d.jobs.monitor.drawn_rows import Drawn, drawn_videos, groups_of, rows_drawn, rows_per_shard
from p3d.jobs.planning.job_spec import JobSpec
from p3d.jobs.worker.encode import encode_of
from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.decode.child import decode_each_in_child
from p3d.pipeline.decode.fetch import pinned
from p3d.pipeline.errors import DamagedJob, InputError, Reason, VideoError
from p3d.pipeline.extract import ClipValues, SomeClips, extract_clips
from p3d.pipeline.recipe import Recipe, RecipeOptions
from p3d.pipeline.results.agreement import Compared, How, compare, exactly, most_wrong
from p3d.pipeline.sources.below import SourceRule
from p3d.pipeline.storage.local import scratch_folder
from p3d.pipeline.storage.store import Store, StoreOptions
from p3d.pipeline.types import FLOAT32, ClipSpan, DecodeMessage, Failure, VideoEnd, VideoRef
from p3d.pipeline.types.policy import DecodeLimits

if TYPE_CHECKING:
    from p3d.encoder import Encoder
    from p3d.weights import Weights

MOST_BATCH, MOST_THREADS = 64, 256  # of a footer that are used: OUT may be somebody else's
SHOWN = 40  # characters of a value of a footer in a message
DECIDES = ("machine", "p3d-embeddings", "torch", "av", "decord", "numpy")  # of the versions: the bits of a row
HALF = 5e-7  # cosine distance, at most, of two vectors that were rounded to float16
# what may be the fault of this machine, or of the limits of this command, and not of the row
NOT_OF_THE_ROW = frozenset(
    {
        *(Reason.SOURCE_MISSING, Reason.SOURCE_DENIED, Reason.SOURCE_CHANGED, Reason.SOURCE_CORRUPT, Reason.NOT_A_FILE),
        *(Reason.TOO_LONG, Reason.TOO_LARGE, Reason.DECODE_TIMEOUT, Reason.DECODE_MEMORY, Reason.INTERNAL),
    }
)
TRACED = 1000  # wrong rows whose vectors are looked for in other rows
MOST_PLACES = 8  # of one vector
_Place = tuple[str, str, int]  # video_id, path and index of a clip
OnClips = Callable[[int, int], None]  # (clips done, all)


@dataclass(frozen=True, slots=True)
class Given:
    """The weights to embed with: their sha256, and whether the user gave them and they are those of the recipe."""

    weights: Weights
    sha256: str
    from_out: bool
    as_recipe: bool


@dataclass(frozen=True, slots=True)
class RowFound:
    """A drawn row, and how it agrees. `made` says what of its shard was made otherwise than here; empty if nothing."""

    path: str
    video_id: str
    clip_index: int
    shard: str
    how: How
    cause: str
    made: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What came of a draw: `n_rows` newest clips, of which `rows` were drawn, in their order."""

    seed: int
    n_rows: int
    weights_sha256: str
    weights_from_out: bool
    weights_as_recipe: bool
    rows: tuple[RowFound, ...]

    def of(self, how: How) -> list[RowFound]:
        """The drawn rows that agree, or do not, in this way."""
        return [row for row in self.rows if row.how == how]

    @property
    def n_checked(self) -> int:
        return len(self.rows) - len(self.of("unchecked"))

    @property
    def most_wrong(self) -> int:
        """With 95 % confidence, no more of `n_rows` rows are wrong, or cannot be checked.

        The rows that were checked say nothing about the others: all rows whose videos are gone may be wrong.
        """
        return most_wrong(self.n_rows, len(self.rows), len(self.of("wrong")) + len(self.of("unchecked")))

    @property
    def share_wrong(self) -> float:
        """With 95 % confidence, no larger share of the rows that can be checked is wrong; 1 if none was checked.

        Their number is not known if others were drawn, too. A bound for more rows than there can be holds for all
        smaller numbers, but for the fraction that is lost where a count is whole.
        """
        n_wrong, n_most = len(self.of("wrong")), self.n_rows - len(self.of("unchecked"))
        if not self.n_checked:
            return 1.0
        if len(self.rows) in (self.n_rows, self.n_checked):
            return most_wrong(n_most, self.n_checked, n_wrong) / n_most
        return min(1.0, (most_wrong(n_most, self.n_checked, n_wrong) + 1) / n_most)

    @property
    def otherwise(self) -> dict[str, int]:
        """What was made otherwise than here -> the number of drawn rows, of those that were checked."""
        return dict(Counter(made for row in self.rows if row.how != "unchecked" for made in row.made))

    @property
    def exit_code(self) -> int:
        """7 if a row is wrong, 6 if none could be checked, else 0."""
        return 7 if self.of("wrong") else 0 if self.n_checked or not self.n_rows else 6


def recompute(
    source: NewestRows,
    n_drawn: int,
    *,
    seed: int,
    rule: SourceRule,
    given: Given,
    s3: StoreOptions,
    on_clips: OnClips | None = None,
) -> Recomputed:
    """Compare `n_drawn` of the newest clips, or all if there are fewer, with what their videos give now.

    No video is opened that `rule` does not allow. DamagedJob; StoreError if a store does not answer.
    """
    counts = rows_per_shard(source)
    numbers = rows_drawn(seed, n_drawn, sum(counts.values()))
    found, n_done = list[_Row](), 0

    def ended(n_clips: int) -> None:
        nonlocal n_done
        n_done += n_clips
        if on_clips is not None:
            on_clips(n_done, len(numbers))

    ended(0)
    machine = _Machine(source.job.recipe, given.weights, rule, s3, ended)
    for group in groups_of(drawn_videos(source, counts, numbers)):
        found += machine.check(group)
    rows = _with_copies(source, _settled(found))
    return Recomputed(seed, sum(counts.values()), given.sha256, given.from_out, given.as_recipe, tuple(rows))


def given_weights(store: Store, recipe: Recipe, named: str | None, s3: StoreOptions) -> Given:
    """The weights that the user names, else those in OUT, which must have the sha256 of the recipe.

    InputError if OUT has none, or those named are of another network than the recipe's; DamagedJob if those in OUT are.
    """
    if named is None:
        if store.head(weights_key(recipe)) is None:
            raise InputError(f"{store.url} no longer holds its weights; give them with --weights, or restore them")
        weights = stored_weights(store, recipe)
        if other := _other_network(weights, recipe):
            raise DamagedJob(
                f"{store.url}: its weights are not of the network of its recipe: {other}; restore job.json"
            )
        return Given(weights, recipe.weights_sha256, from_out=True, as_recipe=True)
    from p3d.jobs.planning.prepare import prepare

    options = {one.name: getattr(recipe, one.name) for one in fields(RecipeOptions)}
    prepared = prepare(JobSpec(recipe.model, named, recipe.graph, **options), s3)
    if other := _other_network(prepared.weights, recipe):
        raise InputError(f"{named} is not of the network of the recipe: {other}")
    sha256 = prepared.recipe.weights_sha256
    return Given(prepared.weights, sha256, from_out=False, as_recipe=sha256 == recipe.weights_sha256)


def _other_network(weights: Weights, recipe: Recipe) -> str:
    """How the network of the weights and its clip recipe differ from a recipe, in words; empty if they do not."""
    clip, config = weights.recipe, weights.config
    theirs = {
        "model": weights.name,
        "graph": config.graph,
        "feature_dim": weights.network.feature_dim,
        "num_classes": config.num_classes,
        "clip_frames": clip.n_frames,
        "resize_hw": clip.resize_hw,
        "short_side": clip.short_side,
        "crop_hw": clip.crop_hw,
    }
    other = {name: value for name, value in theirs.items() if value != getattr(recipe, name)}
    return ", ".join(f"{name} {value} (recipe: {getattr(recipe, name)})" for name, value in other.items())


# ---- computing again -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    """A row that was compared: its result, and what decides whether bits must be equal.

    `host` computed it; `same` if all that is recorded and decides the bits is as here. `stored` and `again` are the
    marks of its vectors.
    """

    found: RowFound
    host: str
    same: bool
    stored: bytes = b""
    again: bytes = b""


@dataclass(slots=True)
class _Machine:
    """Computes drawn clips again, as the job did, and compares them."""

    recipe: Recipe
    weights: Weights
    rule: SourceRule
    s3: StoreOptions
    ended: Callable[[int], None] = lambda _: None  # told of each video that is done its number of drawn clips
    encoders: dict[str, tuple[Encoder, int, int]] = field(default_factory=dict)  # device -> it, batch and threads
    software: dict[str, str] = field(default_factory=software)

    def check(self, group: Sequence[Drawn]) -> list[_Row]:
        """Compare the drawn rows of some videos of the same settings."""
        encoder = self._encoder(group[0].stats)
        refused, allowed = dict[int, Failure](), dict[int, VideoRef]()
        for at, one in enumerate(group):
            try:
                allowed[at] = self._allowed(one)
            except VideoError as error:
                refused[at] = Failure(error.reason, error.detail)
                self.ended(len(one.wanted))
        made = self._embed(encoder, list(allowed.values()), [group[at].wanted for at in allowed])
        again: dict[int, SomeClips | Failure] = {**refused, **dict(zip(allowed, made, strict=True))}
        return [row for at, one in enumerate(group) for row in self._compare(one, again[at], encoder)]

    def _allowed(self, one: Drawn) -> VideoRef:
        """The video of drawn rows, if it may be opened. VideoError."""
        assert one.video is not None, "videos/ has a row of each video with clips"
        self.rule.check(one.video.uri)
        return pinned(one.video, self.s3)

    def _embed(self, encoder: Encoder, videos: list[VideoRef], wanted: list[list[int]]) -> list[SomeClips | Failure]:
        recipe = self.recipe
        if not videos:
            return []
        with (
            scratch_folder("p3d-recompute-") as scratch,
            contextlib.closing(
                decode_each_in_child(
                    videos,
                    recipe.frame_spec,
                    recipe.sampling,
                    policy=recipe.decode_policy,
                    limits=DecodeLimits(),
                    store_options=self.s3,
                    scratch=scratch,
                )
            ) as messages,
        ):
            return extract_clips(
                videos,
                self._followed(messages, wanted),
                encode_of(encoder, recipe),
                {at: frozenset(some) for at, some in enumerate(wanted)},
                sampling=recipe.sampling,
                batch_size=encoder.batch_size,
                embedding_dtype=recipe.embedding_dtype,
            )

    def _followed(
        self, messages: Iterator[tuple[int, DecodeMessage]], wanted: list[list[int]]
    ) -> Iterator[tuple[int, DecodeMessage]]:
        """The same messages; `ended` is told once when a video ends."""
        done = set[int]()
        for at, message in messages:
            yield at, message
            if isinstance(message, VideoEnd | Failure) and at not in done:
                done.add(at)
                self.ended(len(wanted[at]))

    def _compare(self, one: Drawn, again: SomeClips | Failure, encoder: Encoder) -> list[_Row]:
        vectors_KD = schema.features_of(one.rows["embedding"], self.recipe.feature_dim)
        probs_KS = schema.probs_of(one.rows, self.recipe.n_scores)
        found, made = [], self._otherwise(one.stats, encoder)
        for at in one.wanted:
            stored = _stored(one.rows, at, vectors_KD, probs_KS)
            made_again = again.clips.get(at) if isinstance(again, SomeClips) else None
            if made_again is not None:
                others_KD = np.delete(vectors_KD, at, axis=0)
                compared = compare(stored, made_again, others_KD, allowed_distance(self.recipe))
            else:
                compared = _not_made(again)
            row = RowFound(one.path, one.video_id, at, one.shard, compared.how, compared.cause, made)
            marks = _mark(stored.feature_D), b"" if made_again is None else _mark(made_again.feature_D)
            found.append(_Row(row, str(one.stats.get("host", ""))[:SHOWN], not made, *marks))
        return found

    def _encoder(self, stats: dict[str, Any]) -> Encoder:
        """The encoder of a shard: on a CPU if it was made on one, with its batch and threads. InputError."""
        import torch

        device = "cpu" if stats.get("device") == "cpu" else "auto"
        if device not in self.encoders:
            self.encoders[device] = self._new_encoder(device)
        encoder, batch_size, threads = self.encoders[device]
        encoder.batch_size = _number(stats.get("batch_size"), MOST_BATCH) or batch_size
        if encoder.device.type == "cpu":
            torch.set_num_threads(_number(stats.get("threads"), MOST_THREADS) or threads)
        return encoder

    def _new_encoder(self, device: str) -> tuple[Encoder, int, int]:
        from p3d.encoder import Encoder
        from p3d.jobs.planning.prepare import recipe_of_query, run_options

        precision = recipe_of_query(self.recipe, device).precision
        options = run_options({}, workers=1, device=device)
        encoder = Encoder(self.weights, device=device, batch_size=options.batch_size, precision=precision)
        return encoder, options.batch_size, options.threads

    def _otherwise(self, stats: dict[str, Any], encoder: Encoder) -> tuple[str, ...]:
        """What decides the bits of a row and was otherwise when it was made, or is not recorded."""
        found = [] if encoder.device.type == "cpu" else [f"computed on {encoder.device}"]
        if stats.get("device") != "cpu":
            found.append(_unlike("device", stats.get("device")))
        if encoder.precision != self.recipe.precision:
            found.append(f"made in {self.recipe.precision} (here {encoder.precision})")
        if self.recipe.decoder == "nvdec":
            found.append("decoded on a GPU")
        for name, most in (("batch_size", MOST_BATCH), ("threads", MOST_THREADS)):
            if not _number(stats.get(name), most):
                found.append(_unlike(name, stats.get(name)))
        theirs = stats.get("software")
        theirs = theirs if isinstance(theirs, dict) else {}
        here = self.software
        found += [_unlike(name, theirs.get(name), here[name]) for name in DECIDES if theirs.get(name) != here[name]]
        return tuple(found)


def allowed_distance(recipe: Recipe) -> float:
    """The cosine distance that two devices may have: each is within that of the golden check from the CPU in fp32.

    Angles add, and the distance grows with their square, so it is four times as large.
    """
    from p3d.encoder import MAXIMUM_DISTANCE

    return 4 * MAXIMUM_DISTANCE[recipe.precision] + (HALF if recipe.embedding_dtype == "float16" else 0)


def _number(value: Any, most: int) -> int | None:
    return value if type(value) is int and 1 <= value <= most else None


def _unlike(name: str, theirs: Any, here: str = "") -> str:
    """In words: a setting or version was otherwise, or is not recorded."""
    if theirs is None:
        return f"{name} not recorded"
    return f"made with {name} {str(theirs)[:SHOWN]}" + (f" (here {here})" if here else "")


def _not_made(again: SomeClips | Failure) -> Compared:
    """The comparison of a row whose clip could not be computed again."""
    if isinstance(again, SomeClips):
        return Compared("wrong", f"the clip rule gives {again.n_clips} clips, and this is not one of them")
    why = f"{again.reason}: {again.detail}"
    if again.reason in NOT_OF_THE_ROW:
        return Compared("unchecked", why)
    return Compared("wrong", f"its video gives no rows now: {why}")


def _stored(rows: pa.Table, at: int, vectors_KD: FLOAT32, probs_KS: FLOAT32) -> ClipValues:
    names = ("clip_index", "start_frame", "end_frame", "n_padded", "start_s", "end_s")
    index, start, end, n_padded, start_s, end_s = (rows[name][at].as_py() for name in names)
    return ClipValues(ClipSpan(index, start, end, n_padded), start_s, end_s, vectors_KD[at], probs_KS[at])


# ---- what differs ----------------------------------------------------------------------------------------------------


def _settled(rows: Sequence[_Row]) -> list[_Row]:
    """Where bits must be equal, a row that agrees by cosine only is wrong.

    They must if all that is recorded is as here, and the row was made on a host whose bits this processor gives: other
    rows of that host are the same, bit for bit. The kind of processor is not recorded, and a machine elsewhere may have
    the name of this one.
    """
    alike = {row.host for row in rows if row.same and row.found.how == "bits"}
    return [
        _changed(row, exactly(Compared(row.found.how, row.found.cause))) if row.same and row.host in alike else row
        for row in rows
    ]


def _changed(row: _Row, compared: Compared) -> _Row:
    return replace(row, found=replace(row.found, how=compared.how, cause=compared.cause))


def _with_copies(source: NewestRows, rows: Sequence[_Row]) -> list[RowFound]:
    """The rows. The cause of a wrong one says where else in the drawn shards its vector lies, bit for bit.

    The stored vector may be that of another clip, and the one that should be here may be stored for another clip.
    """
    wrong = [row for row in rows if row.found.how == "wrong"][:TRACED]
    lies: dict[bytes, list[_Place]] = {mark: [] for row in wrong for mark in (row.stored, row.again) if mark}
    others = frozenset(source.pieces) - {row.found.shard for row in rows}
    for folder, table in source.rows(skip=others) if lies else ():
        if folder == "clips":
            vectors_ND = schema.features_of(table["embedding"], source.job.recipe.feature_dim)
            for at, vector_D in enumerate(vectors_ND):
                if (held := lies.get(_mark(vector_D))) is not None and len(held) < MOST_PLACES:
                    held.append(tuple(table[name][at].as_py() for name in ("video_id", "path", "clip_index")))
    traced = {id(row): _traced(row, lies) for row in wrong}
    return [replace(row.found, cause=traced.get(id(row), row.found.cause)) for row in rows]


def _traced(row: _Row, lies: dict[bytes, list[_Place]]) -> str:
    cause, here = row.found.cause, (row.found.video_id, row.found.clip_index)
    for mark, said in ((row.stored, "the stored vector is also that of"), (row.again, "the right one is stored for")):
        for video_id, path, index in lies.get(mark, ()):
            if (video_id, index) != here:
                cause += f"; {said} clip {index} of {'this video' if video_id == here[0] else path}"
                break
    return cause


def _mark(vector_D: FLOAT32) -> bytes:
    """16 bytes that stand for the bits of a vector."""
    return hashlib.blake2b(vector_D.tobytes(), digest_size=16).digest()
