"""`verify --recompute`: wrong rows are found at the rate of the arithmetic, right ones never are, and nothing else is
opened.

P3D_RECOMPUTE=1 pytest --timeout 3000 tests/jobs/test_recompute.py   10 000 rows, and 200 of P3D-63 (`make recompute`)
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import p3d.device
import p3d.weights
from p3d.jobs.cli import progress
from p3d.jobs.job import read_job
from p3d.jobs.monitor import recompute as recomputing
from p3d.jobs.monitor.drawn_rows import drawn_videos, rows_drawn, rows_per_shard
from p3d.jobs.monitor.recompute import Recomputed, RowFound, given_weights, recompute
from p3d.jobs.planning.job_spec import JobSpec
from p3d.pipeline.clips.rules import clip_spans
from p3d.pipeline.dataset.commit import commit_shard
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.plans import Manifest, write_plan
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.errors import DamagedJob
from p3d.pipeline.extract import ClipValues
from p3d.pipeline.recipe import ShardSizing
from p3d.pipeline.results.agreement import chance_of_few, compare, exactly, most_wrong
from p3d.pipeline.sources.below import EVERY_SOURCE, SourceRule
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.types import FLOAT32, ClipSpan, ShardRows
from tests.jobs.embedded import embed_all
from tests.jobs.test_cli import in_process
from tests.pipeline.rows import planned, recipe, shard_rows, videos
from tests.sim.store import MemoryStore
from tests.zoo import make

LONG = os.environ.get("P3D_RECOMPUTE") == "1"
# videos, frames of each, and how many rows are wrong; a clip starts at every frame
N_VIDEOS, N_FRAMES, N_WRONG = (40, 265, 100) if LONG else (6, 35, 12)
KINDS = ("frame", "video", "weights", "bit")
needs_bf16 = pytest.mark.skipif(not p3d.device.cpu_has_bf16(), reason="this CPU has no instructions for bf16")

Place = tuple[str, int]  # path and index of a clip


def drawn_of(n_rows: int, n_gone: int, n_wrong: int, n_drawn: int, seed: int) -> Recomputed:
    """The answer for a draw of rows of which the first cannot be checked, and the next are wrong."""
    rows = tuple(
        RowFound("", "", 0, "", "unchecked" if at < n_gone else "wrong" if at < n_gone + n_wrong else "bits", "", ())
        for at in rows_drawn(seed, n_drawn, n_rows)
    )
    return Recomputed(seed, n_rows, "", False, True, rows)


@pytest.mark.parametrize(
    ("n_rows", "n_gone", "n_wrong", "n_drawn"), [(400, 200, 6, 60), (90, 10, 2, 60), (50, 48, 1, 9)]
)
def test_the_bounds_hold_if_the_rows_that_cannot_be_checked_are_wrong(
    n_rows: int, n_gone: int, n_wrong: int, n_drawn: int
) -> None:
    """As in an output whose maker names no video for wrong rows: each bound is too low for 5 % of seeds at most."""
    found = [drawn_of(n_rows, n_gone, n_wrong, n_drawn, seed) for seed in range(600)]
    most = 600 * 0.05 + 4 * math.sqrt(600 * 0.05 * 0.95)
    assert sum(one.most_wrong < n_gone + n_wrong for one in found) <= most
    assert sum(one.share_wrong < n_wrong / (n_rows - n_gone) for one in found) <= most
    assert drawn_of(n_rows, n_gone, n_wrong, n_rows, 0).share_wrong == n_wrong / (n_rows - n_gone)


def small_video(path: Path, n_frames: int) -> Path:
    return make.video(path, "libx264", n_frames, options={"preset": "ultrafast"}, gop=12)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of different lengths, so that their last clips differ, too."""
    root = tmp_path_factory.mktemp("films")
    for at in range(N_VIDEOS):
        make.video(
            root / f"film{at:02}.mp4", "libx264", N_FRAMES + at % 3, options={"preset": "ultrafast"}, noise=40 + at
        )
    return root


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two sets of weights of the demo's network, for pictures of 64x64 pixels."""
    found = {}
    for seed in (0, 1):
        weights = p3d.weights.random_weights("p3d-demo", seed, graph="caffe", num_classes=10)
        weights = replace(weights, recipe=replace(weights.recipe, resize_hw=(64, 64), crop_hw=(64, 64)))
        found[seed] = tmp_path_factory.mktemp("tiny") / f"{seed}.safetensors"
        p3d.weights.save(found[seed], weights)
    return found


def again(
    store: LocalStore, n: int, *, seed: int = 0, weights: Path | None = None, rule: SourceRule = EVERY_SOURCE
) -> Recomputed:
    """What `verify --recompute` finds out."""
    source = NewestRows(store, read_job(store))
    given = given_weights(source.store, source.job.recipe, None if weights is None else str(weights), DEFAULTS)
    return recompute(source, n, seed=seed, rule=rule, given=given, s3=DEFAULTS)


def counts(found: Recomputed) -> dict[str, int]:
    every = {how: len(found.of(how)) for how in ("bits", "cosine", "wrong", "unchecked")}  # type: ignore[arg-type] # literals
    return {how: n for how, n in every.items() if n}


def cause(found: Recomputed) -> str:
    (row,) = found.of("wrong")
    return row.cause


@pytest.fixture(scope="module")
def planted(
    films: Path, tiny: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[LocalStore, dict[Place, str]]:
    """A dataset with wrong rows that were committed as right ones are, and which they are, with their kind."""
    folder, wrong = tmp_path_factory.mktemp("planted"), dict[Place, str]()
    other, rng = LocalStore(str(folder / "other")), np.random.default_rng(0)
    of_other: dict[str, FLOAT32] = {}

    def keep(rows: ShardRows) -> ShardRows:
        of_other[rows.shard.name.partition("-")[2]] = rows.features_RD
        return rows

    def forge(rows: ShardRows) -> ShardRows:
        features_RD, n_shards = rows.features_RD.copy(), -(-N_VIDEOS // 4)
        share = N_WRONG // n_shards + (rows.shard.shard < N_WRONG % n_shards)
        for number, at in enumerate(rng.choice(len(features_RD), share, replace=False).tolist()):
            kind, clip = KINDS[(number + rows.shard.shard) % len(KINDS)], rows.clips[at]
            same = np.array([one.video_id == clip.video_id for one in rows.clips])
            from_ = np.flatnonzero(same if kind == "frame" else ~same)
            if kind == "bit":
                features_RD.view(np.uint32)[at, rng.integers(features_RD.shape[1])] ^= 1
            elif kind == "weights":
                features_RD[at] = of_other[rows.shard.name.partition("-")[2]][at]
            else:
                features_RD[at] = rows.features_RD[rng.choice(from_[from_ != at])]
            wrong[clip.path, clip.span.index] = kind
        return replace(rows, features_RD=features_RD)

    embed_all(str(films), other, JobSpec(None, str(tiny[1]), clips="every:1"), folder, forge=keep)
    store = LocalStore(str(folder / "out"))
    embed_all(str(films), store, JobSpec(None, str(tiny[0]), clips="every:1"), folder, forge=forge)
    assert len(wrong) == N_WRONG and set(wrong.values()) == set(KINDS)
    return store, wrong


@pytest.fixture(scope="module")
def everything(planted: tuple[LocalStore, dict[Place, str]]) -> Recomputed:
    """The answer if all rows are drawn."""
    return again(planted[0], 10**9)


def test_every_planted_row_is_found_and_no_other(
    planted: tuple[LocalStore, dict[Place, str]], everything: Recomputed
) -> None:
    """Of all rows exactly the planted ones are wrong, whatever was done to them; all others agree bit for bit."""
    found, wrong = everything, planted[1]
    assert {(row.path, row.clip_index) for row in found.of("wrong")} == wrong.keys()
    assert counts(found) == {"bits": found.n_rows - N_WRONG, "wrong": N_WRONG}
    assert found.most_wrong == N_WRONG and found.exit_code == 7
    assert not LONG or found.n_rows >= 10_000
    print(f"{found.n_rows} rows: {counts(found)}")
    causes = {wrong[row.path, row.clip_index]: row.cause for row in found.of("wrong")}
    assert "1 of 512 values differs" in causes["bit"]
    assert "the stored vector is also that of clip" in causes["frame"] and "of this video" in causes["frame"]
    assert "the stored vector is also that of clip" in causes["video"] and "of film" in causes["video"]
    assert "other weights" in causes["weights"] and "also that of" not in causes["weights"]


def test_wrong_rows_are_drawn_as_often_as_the_arithmetic_says(
    planted: tuple[LocalStore, dict[Place, str]], everything: Recomputed
) -> None:
    """The share of seeds that draw a wrong row is the hypergeometric one, and those drawn are found."""
    store, wrong = planted
    order = everything.rows
    n_rows, n_drawn = len(order), 10
    bad = np.array([(row.path, row.clip_index) in wrong for row in order])
    seeds = 4000
    drawn_SN = np.array([rows_drawn(seed, n_drawn, n_rows) for seed in range(seeds)])
    tenths = np.bincount((drawn_SN * 10 // n_rows).ravel(), minlength=10)
    assert np.abs(tenths - seeds * n_drawn / 10).max() < 6 * math.sqrt(seeds * n_drawn / 10), "some rows are favoured"
    hits = float(bad[drawn_SN].any(axis=1).mean())
    promised = 1 - chance_of_few(n_rows, N_WRONG, n_drawn, 0)
    assert abs(hits - promised) < 4 * math.sqrt(promised * (1 - promised) / seeds)
    for seed in range(40 if LONG else 3):
        drawn = rows_drawn(seed, n_drawn, n_rows)
        found = again(store, n_drawn, seed=seed)
        assert [(row.path, row.clip_index) for row in found.rows] == [
            (order[at].path, order[at].clip_index) for at in drawn
        ]
        assert [row.how == "wrong" for row in found.rows] == bad[drawn].tolist(), seed
    print(f"{N_WRONG} of {n_rows} wrong, {n_drawn} drawn: {hits:.4f} of {seeds} seeds, promised {promised:.4f}")


@pytest.mark.parametrize("again", [False, True])
def test_few_rows_of_many_shards_are_those_that_were_drawn(again: bool) -> None:
    """Between shards without drawn rows, also where a newer plan has some of the videos: each drawn row, no other."""
    store, names = MemoryStore(), [f"video{at:02}" for at in range(26)]
    plans = [planned(store, names, shard_videos=2)]
    if again:
        some = with_shards(videos(names[2:25:5]), ShardSizing(2))
        plans.append(Manifest(store, write_plan(store, 2, recipe(), some, 0, ShardSizing())))
    for plan in plans:
        for at in range(plan.plan.n_shards):
            commit_shard(store, shard_rows(plan, at), recipe(), plan.user_columns(at))
    source = NewestRows(store, read_job(store))
    order = [
        (row["video_id"], row["clip_index"])
        for folder, rows in source.rows()
        if folder == "clips"
        for row in rows.to_pylist()
    ]
    per_shard = rows_per_shard(source)
    assert sum(per_shard.values()) == len(order)
    for seed in range(20):
        numbers = rows_drawn(seed, 3, len(order))
        found = list(drawn_videos(source, per_shard, numbers))
        drawn = [(one.video_id, one.rows["clip_index"][at].as_py()) for one in found for at in one.wanted]
        assert drawn == [order[at] for at in numbers], seed
        assert all(one.video is not None and one.video.path == one.path for one in found)


def test_the_bound_is_exact() -> None:
    """The bound is the largest number that a sample allows with a chance of 5 %, computed with whole numbers."""
    for n_rows in (*range(1, 13), 20, 21):
        for n_checked in range(n_rows + 1):
            every = math.comb(n_rows, n_checked)
            for n_wrong in range(n_checked + 1):
                allowed = [
                    n_bad
                    for n_bad in range(n_wrong, n_rows - (n_checked - n_wrong) + 1)
                    if Fraction(
                        sum(
                            math.comb(n_bad, at) * math.comb(n_rows - n_bad, n_checked - at)
                            for at in range(n_wrong + 1)
                        ),
                        every,
                    )
                    >= Fraction(1, 20)
                ]
                assert most_wrong(n_rows, n_checked, n_wrong) == max(allowed), (n_rows, n_checked, n_wrong)
    n_bad, n_rows = most_wrong(1_000_000, 2000, 0), 1_000_000
    exact = [Fraction(math.comb(n_rows - bad, 2000), math.comb(n_rows, 2000)) for bad in (n_bad, n_bad + 1)]
    assert exact[0] >= Fraction(1, 20) > exact[1]


def test_a_clip_is_compared_in_all_that_its_row_says() -> None:
    """Frames, seconds, vector and scores count, and a vector of another length or another clip is found by cosine."""
    rng = np.random.default_rng(0)
    right, other = rng.standard_normal((2, 64)).astype(np.float32)
    clip = ClipValues(ClipSpan(0, 0, 16, 0), 0.0, 0.64, right, np.array([0.5, 0.5], np.float32))
    none_KD, close = np.empty((0, 64), np.float32), replace(clip, feature_D=right * np.float32(1 + 1e-6))
    assert compare(clip, clip, none_KD, 1e-8).how == "bits"
    assert (
        compare(close, clip, none_KD, 1e-8).how == "cosine"
        and exactly(compare(close, clip, none_KD, 1e-8)).how == "wrong"
    )
    late = replace(clip, end_s=0.64 + 1e-9)
    assert compare(late, clip, none_KD, 1e-8).how == "cosine"
    scored = replace(clip, prob_K=np.array([0.4, 0.6], np.float32))
    padded = replace(clip, span=ClipSpan(0, 0, 16, 1))
    long, moved = replace(clip, feature_D=right * np.float32(1.02)), replace(clip, start_s=0.01)
    for wrong in (padded, moved, scored, long, replace(clip, feature_D=other), replace(clip, feature_D=right * np.nan)):
        assert compare(wrong, clip, none_KD, 1e-8).how == "wrong"
    near = replace(clip, feature_D=(right + 1e-3 * other).astype(np.float32))  # of another frame that looks the same
    assert compare(near, clip, none_KD, 1e-3).how == "cosine"
    assert "another frame" in compare(near, clip, right[None], 1e-3).cause


@pytest.fixture
def honest(films: Path, tiny: dict[int, Path], tmp_path: Path) -> Iterator[LocalStore]:
    """A dataset of copies of three of the videos, which a test may change."""
    (tmp_path / "archive").mkdir()
    for path in sorted(films.iterdir())[:3]:
        (tmp_path / "archive" / path.name).write_bytes(path.read_bytes())
    store = LocalStore(str(tmp_path / "out"))
    embed_all(str(tmp_path / "archive"), store, JobSpec(None, str(tiny[0]), scores=True), tmp_path)
    yield store


def verify(store: LocalStore, *more: object) -> tuple[int, str, str]:
    return in_process("verify", store.url, *map(str, more))


def test_the_answer_follows_from_the_seed(honest: LocalStore) -> None:
    """The same seed gives the same answer, another one draws other rows, and a large N means all rows."""
    answers = [verify(honest, "--recompute", 4, "--seed", seed, "--json")[1] for seed in (1, 1)]
    assert answers[0] == answers[1]
    assert json.loads(answers[0])["recompute"]["seed"] == 1
    assert len({tuple(rows_drawn(seed, 4, 9)) for seed in range(9)}) > 1
    code, out, err = verify(honest, "--recompute", 1000)
    n_rows = again(honest, 1000).n_rows
    assert code == 0 and f"computed again: {n_rows} of {n_rows} clips, drawn with --seed 0" in out
    assert f"at most 0 of {n_rows} rows are wrong" in err and "consistent with the weights in OUT" in err


def test_a_source_that_changed_or_went_is_not_checked(honest: LocalStore, tmp_path: Path) -> None:
    """A row whose source is another file now, or is gone, is named and not wrong; without any source the code is 6."""
    films = sorted((tmp_path / "archive").iterdir())
    os.utime(films[0], ns=(1, 1))
    films[1].unlink()
    code, _, err = verify(honest, "--recompute", 1000)
    assert code == 0 and f"not checked: {films[0].name} clips 0, 1, 2 (" in err
    assert "source_changed" in err and "source_missing" in err
    found = again(honest, 1000)
    assert {row.path for row in found.of("bits")} == {films[2].name} and not found.of("wrong")
    n_rows, n_right = found.n_rows, len(found.of("bits"))
    assert found.most_wrong == n_rows - n_right > 0 and found.share_wrong == 0
    assert "at most 0.00% of the rows that can be checked are wrong" in err
    assert f"at most {n_rows - n_right} of {n_rows} rows are wrong or cannot be checked" in err
    films[2].unlink()
    code, _, err = verify(honest, "--recompute", 1000)
    assert code == 6 and "no row could be checked" in err and "95 %" not in err


def test_a_video_that_gives_no_rows_now_is_wrong(honest: LocalStore, tmp_path: Path) -> None:
    """A row of a file that was never a video, with its planned size and time, cannot be right."""
    film = sorted((tmp_path / "archive").iterdir())[0]
    status = film.stat()
    film.write_bytes(b"x" * status.st_size)
    os.utime(film, ns=(status.st_atime_ns, status.st_mtime_ns))
    found = again(honest, 1000)
    assert {row.path for row in found.of("wrong")} == {film.name}
    assert "its video gives no rows now: not_a_video" in found.of("wrong")[0].cause


def test_weights_of_the_user(
    honest: LocalStore, tiny: dict[int, Path], small_weights: Path, real_weights: Path
) -> None:
    """The right weights agree; with others of the network every row is wrong; another network is refused."""
    code, _, err = verify(honest, "--recompute", 3, "--weights", tiny[0])
    assert code == 0 and "has the weights of the recipe" in err and "weights in OUT" not in err
    code, _, err = verify(honest, "--recompute", 3, "--weights", tiny[1])
    assert (
        code == 7 and "these are not the weights of the recipe" in err and "every row that was checked is wrong" in err
    )
    for other in (real_weights, small_weights):  # another network, and pictures of another size
        code, _, err = verify(honest, "--recompute", 3, "--weights", other)
        assert code == 2 and "network" in err


def test_weights_that_out_has_lost_are_asked_for(honest: LocalStore, tiny: dict[int, Path]) -> None:
    """An OUT without its weights needs --weights, and one with others is damaged."""
    (path,) = (honest.root / "weights").glob("*.safetensors")
    path.write_bytes(tiny[1].read_bytes())
    assert verify(honest, "--recompute", 3)[0] == 7
    path.unlink()
    code, _, err = verify(honest, "--recompute", 3)
    assert code == 2 and "--weights" in err
    assert verify(honest, "--recompute", 3, "--weights", tiny[0])[0] == 0


def test_a_recipe_of_another_network_than_its_weights_is_damage(honest: LocalStore) -> None:
    """A recipe that was written for other weights than those in OUT is refused before anything is decoded."""
    source = NewestRows(honest, read_job(honest))
    source.job = replace(source.job, recipe=replace(source.job.recipe, clip_frames=32))
    with pytest.raises(DamagedJob, match="clip_frames 16"):
        given_weights(source.store, source.job.recipe, None, DEFAULTS)


def with_stats(change: Mapping[str, Any], forge: Callable[[FLOAT32], FLOAT32] = lambda one: one) -> Any:
    """A `forge` that changes the stats of the footer, where None removes one, and the vectors."""

    def forged(rows: ShardRows) -> ShardRows:
        stats = {name: value for name, value in (rows.stats | change).items() if value is not None}
        return replace(rows, stats=stats, features_RD=forge(rows.features_RD.copy()))

    return forged


def flipped(features_RD: FLOAT32) -> FLOAT32:
    """One last bit of the second row is another one."""
    features_RD.view(np.uint32)[1, 7] ^= 1
    return features_RD


def test_what_was_made_otherwise_is_compared_by_cosine(
    honest: LocalStore, tiny: dict[int, Path], tmp_path: Path
) -> None:
    """Another version allows other last bits, and the answer says why, and what it cannot see."""
    store = LocalStore(str(tmp_path / "otherwise"))
    forge = with_stats({"software": {"torch": "1.0"}}, flipped)
    embed_all(str(tmp_path / "archive"), store, JobSpec(None, str(tiny[0])), tmp_path, forge=forge)
    found = again(store, 1000)
    assert counts(found) == {"bits": found.n_rows - 1, "cosine": 1}
    code, _, err = verify(store, "--recompute", 1000)
    assert code == 0 and "cannot see" in err and "made with torch 1.0 (here" in err and "av not recorded" in err


def machine_of(store: LocalStore, **changes: Any) -> recomputing._Machine:
    source = NewestRows(store, read_job(store))
    weights = given_weights(source.store, source.job.recipe, None, DEFAULTS).weights
    return recomputing._Machine(replace(source.job.recipe, **changes), weights, EVERY_SOURCE, DEFAULTS)


def test_all_that_may_change_the_bits_is_compared(honest: LocalStore) -> None:
    """Rows must have the same bits only if the footer has all that decides them, and all of it is as here."""
    machine = machine_of(honest)
    same = {"device": "cpu", "batch_size": 3, "threads": 1, "software": machine.software}
    for changes, said in (
        ({}, None),
        ({"threads": None}, "threads not recorded"),
        ({"batch_size": 10**9}, "made with batch_size 1000000000"),
        ({"batch_size": True}, "made with batch_size True"),
        ({"device": "cuda:0"}, "made with device cuda:0"),
        ({"software": ["odd"]}, "av not recorded"),
        *(({"software": machine.software | {name: "0"}}, f"made with {name} 0") for name in recomputing.DECIDES),
    ):
        stats = same | changes
        found = machine._otherwise(stats, machine._encoder(stats))
        assert found == () if said is None else any(one.startswith(said) for one in found), changes
    encoder = machine._encoder(same)
    assert machine_of(honest, decoder="nvdec")._otherwise(same, encoder) == ("decoded on a GPU",)
    assert machine_of(honest, precision="bf16")._otherwise(same, encoder) == ("made in bf16 (here fp32)",)


@pytest.mark.parametrize("host", ["elsewhere", platform.node()])
def test_a_host_must_give_the_same_bits_if_any_of_its_rows_does(
    host: str, honest: LocalStore, tiny: dict[int, Path], tmp_path: Path
) -> None:
    """The processor is not recorded, and many machines are named `localhost`: one row with the same bits shows it."""
    source, spec = str(tmp_path / "archive"), JobSpec(None, str(tiny[0]))
    one, all_ = LocalStore(str(tmp_path / "one")), LocalStore(str(tmp_path / "all"))
    embed_all(source, one, spec, tmp_path, forge=with_stats({"host": host}, flipped))
    found = again(one, 1000)
    assert counts(found) == {"bits": found.n_rows - 1, "wrong": 1}
    assert "1 of 512 values differs" in cause(found) and "as recorded" in cause(found)

    def every(features_RD: FLOAT32) -> FLOAT32:
        features_RD.view(np.uint32)[:, 7] ^= 1
        return features_RD

    embed_all(source, all_, spec, tmp_path, forge=with_stats({"host": host}, every))
    assert counts(again(all_, 1000)) == {"cosine": found.n_rows}


def test_the_batch_and_threads_of_a_shard_are_used(honest: LocalStore, tmp_path: Path) -> None:
    """Each shard is computed with the batch size and the threads of its own footer."""
    import torch

    machine = machine_of(honest)
    before = torch.get_num_threads()
    try:
        for batch_size, threads in ((5, 2), (3, 1)):
            stats = {"device": "cpu", "batch_size": batch_size, "threads": threads, "software": machine.software}
            encoder = machine._encoder(stats)
            assert (encoder.batch_size, torch.get_num_threads()) == (batch_size, threads)
            assert machine._otherwise(stats, encoder) == ()
    finally:
        torch.set_num_threads(before)


def test_rows_of_older_plans_are_not_drawn(honest: LocalStore, tiny: dict[int, Path], tmp_path: Path) -> None:
    """Of a video that was planned again only the newest rows count."""
    film = sorted((tmp_path / "archive").iterdir())[0]
    small_video(film, 50)
    spec = JobSpec(None, str(tiny[0]), scores=True)
    embed_all(str(tmp_path / "archive"), honest, spec, tmp_path)
    found = again(honest, 1000)
    expected = clip_spans(read_job(honest).recipe.sampling, 50)
    assert counts(found) == {"bits": found.n_rows} and found.exit_code == 0
    assert len([row for row in found.rows if row.path == film.name]) == len(expected)


def test_a_clip_at_another_place_is_wrong(honest: LocalStore, tiny: dict[int, Path], tmp_path: Path) -> None:
    """A row with the right vector and frames that the clip rule does not give is wrong."""

    def shifted(rows: ShardRows) -> ShardRows:
        clips = list(rows.clips)
        span = clips[1].span
        clips[1] = replace(clips[1], span=replace(span, start_frame=span.start_frame - 1, end_frame=span.end_frame - 1))
        return replace(rows, clips=tuple(clips))

    store = LocalStore(str(tmp_path / "shifted"))
    embed_all(str(tmp_path / "archive"), store, JobSpec(None, str(tiny[0])), tmp_path, forge=shifted)
    assert "the clip rule gives frames" in cause(again(store, 1000))


# ---- an OUT from somebody else --------------------------------------------------------------------------------------


@pytest.fixture
def foreign(honest: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    """The same dataset, which this user did not launch."""
    monkeypatch.setenv("P3D_STATE", str(tmp_path / "nothing"))
    return honest


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The uris of the videos that are given to a decoder from now on."""
    uris, decode = list[str](), recomputing.decode_each_in_child

    def spy(videos: Any, *given: Any, **named: Any) -> Any:
        uris.extend(video.uri for video in videos)
        return decode(videos, *given, **named)

    monkeypatch.setattr(recomputing, "decode_each_in_child", spy)
    return uris


def test_a_foreign_output_needs_a_source(foreign: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --source or trust nothing is opened; with it the rows below ROOT are checked, and seed 0 is warned of."""
    uris = opened(monkeypatch)
    code, out, err = verify(foreign, "--recompute", 3)
    assert (code, out, uris) == (5, "", []) and "--source ROOT" in err
    code, _, err = verify(foreign, "--recompute", 3, "--source", tmp_path / "archive")
    assert code == 0 and "choose another seed" in err and uris
    assert (
        "choose another seed" not in verify(foreign, "--recompute", 3, "--seed", 9, "--source", tmp_path / "archive")[2]
    )
    assert verify(foreign, "--recompute", 3, "--trust")[0] == 0


def test_nothing_outside_the_source_is_opened(
    films: Path, tiny: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a path, nor `..`, nor a link leads out of ROOT; such rows are not checked."""
    root, other = tmp_path / "root", tmp_path / "other"
    root.mkdir(), other.mkdir()
    secret, inside, *_ = sorted(films.iterdir())
    (other / "secret.mp4").write_bytes(secret.read_bytes())
    (root / "inside.mp4").write_bytes(inside.read_bytes())
    (root / "link.mp4").symlink_to(other / "secret.mp4")
    (root / "folder").symlink_to(other)
    listed = ("inside.mp4", "link.mp4", "folder/secret.mp4", "../other/secret.mp4")
    names = [str(root / name) for name in listed]
    (tmp_path / "list.txt").write_text("\n".join(names[:1] + names[3:]) + "\n")
    store = LocalStore(str(tmp_path / "out"))
    embed_all(str(tmp_path / "list.txt"), store, JobSpec(None, str(tiny[0])), tmp_path)
    uris = opened(monkeypatch)
    found = again(store, 1000, rule=SourceRule(str(root)))
    assert {row.path for row in found.of("bits")} == {names[0]} and set(uris) == {f"file://{names[0]}"}
    assert all("source_denied" in row.cause for row in found.of("unchecked")) and found.of("unchecked")
    (other / "secret.mp4").rename(tmp_path / "kept.mp4")  # the row names what was a file, and is a link out of its ROOT
    (other / "secret.mp4").symlink_to(tmp_path / "kept.mp4")
    uris.clear()
    assert again(store, 1000, rule=SourceRule(str(other))).n_checked == 0 and not uris


# ---- progress -------------------------------------------------------------------------------------------------------


def test_progress_has_a_rate_and_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where stderr is not a terminal, a line says how many are done, how fast, and when the rest will be."""
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    clock = iter([100.0, 100.0, 100.0, 110.0, 110.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress.show_count("clip") as on_clips:
        on_clips(0, 40)
        on_clips(10, 40)
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("ETA -") and second == "10/40 clips, 1.00 clips/s, ETA 30 s"


# ---- larger networks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_honest_rows_of_p3d63_agree(precision: str, films: Path, real_weights: Path, tmp_path: Path) -> None:
    """Rows of P3D-63 agree bit for bit, in fp32 and bf16; 200 of each with P3D_RECOMPUTE=1."""
    (tmp_path / "archive").mkdir()
    for path in sorted(films.iterdir())[: 20 if LONG else 2]:
        (tmp_path / "archive" / path.name).write_bytes(path.read_bytes())
    store = LocalStore(str(tmp_path / "out"))
    spec = JobSpec(None, str(real_weights), precision=precision, clips="every:26" if LONG else "every:16")
    embed_all(str(tmp_path / "archive"), store, spec, tmp_path)
    found = again(store, 200 if LONG else 5)
    assert counts(found) == {"bits": 200 if LONG else 5}


def test_nothing_is_said_of_weights_that_are_right(honest: LocalStore, tmp_path: Path) -> None:
    """All rows are wrong because their sources were exchanged at the same size and time: weights are not named."""
    first, second, third = sorted((tmp_path / "archive").iterdir())
    third.unlink()
    held = {one: (one.read_bytes(), one.stat().st_mtime_ns) for one in (first, second)}
    for one, other in ((first, second), (second, first)):
        content = held[other][0].ljust(len(held[one][0]), b"\0")[: len(held[one][0])]
        one.write_bytes(content)
        os.utime(one, ns=(held[one][1], held[one][1]))
    code, _, err = verify(honest, "--recompute", 1000)
    assert code == 7 and "every row that was checked is wrong\n" in err and "--repair cannot help" in err
    assert "has the weights" not in err and "consistent" not in err


def test_a_damaged_output_is_not_computed_again_and_that_is_said(honest: LocalStore) -> None:
    """Weights that do not exist are refused before anything is read."""
    code, _, err = verify(honest, "--recompute", 3, "--weights", "nope.safetensors")
    assert code == 2 and "clean" not in err and "nope.safetensors" in err
    (damaged,) = (honest.root / "clips").iterdir()
    damaged.write_bytes(damaged.read_bytes()[:-9])
    code, out, err = verify(honest, "--recompute", 3, "--json")
    assert code == 7 and "no clip was computed again" in err and json.loads(out)["recompute"] is None
