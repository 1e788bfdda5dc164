"""Near-duplicates: the pairs of brute force for any block size, correct evidence, clusters of connected pairs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.commit import commit_shard
from p3d.pipeline.dataset.plans import Manifest, write_plan
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.dataset.snapshot import SnapshotRows, snapshot
from p3d.pipeline.recipe import JobRecord, ShardSizing
from p3d.pipeline.results import duplicates as dedup
from p3d.pipeline.results import near_pairs
from p3d.pipeline.results.duplicates import find_duplicates
from p3d.pipeline.storage.local import LocalStore
from tests.jobs.test_cli import in_process
from tests.pipeline.rows import DIM, shard_rows, videos
from tests.pipeline.test_snapshot import newest, recipe_


def commit(store: LocalStore, names: list[str], copies: dict[str, str], noise: float, shard_videos: int) -> None:
    """Videos of thirteen clips each; the clips of a copy are those of another plus noise, one clip later."""
    chosen = recipe_(scores=False)
    store.create("job.json", JobRecord(chosen, "random:0", {}).to_json())
    manifest = Manifest(
        store, write_plan(store, 1, chosen, with_shards(videos(names), ShardSizing(shard_videos)), 0, ShardSizing())
    )
    rng = np.random.default_rng(5)
    of = {name: rng.standard_normal((13, DIM)).astype(np.float32) + 3 * rng.standard_normal(DIM) for name in names}
    for copy, original in copies.items():
        of[copy] = np.roll(of[original], 1, axis=0) + noise * rng.standard_normal((13, DIM))
    for at in range(manifest.plan.n_shards):
        rows = shard_rows(manifest, at, frames=(200,))
        features = np.concatenate([of[video.video_id] for video in rows.shard.videos]).astype(np.float32)
        commit_shard(store, replace(rows, features_RD=features), chosen, manifest.user_columns(at))


def vectors(store: LocalStore) -> tuple[list[str], np.ndarray]:
    tables = [table for folder, table in newest(store).rows() if folder == "videos"]
    ids = [one for table in tables for one in table["video_id"].to_pylist()]
    x = np.concatenate([schema.features_of(table["embedding"], DIM) for table in tables]).astype(np.float64)
    return ids, x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(8))
def test_clusters_are_those_of_brute_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """For any block size, shards, row groups and threshold: pairs, clusters, nearest partner; also of a snapshot."""
    print(f"{seed = }")
    rng = Random(seed)
    monkeypatch.setattr(schema, "ROW_GROUP_ROWS", rng.randint(5, 60))
    for name, values in {
        "ROWS": (1, 3, 7, 100),
        "COLUMNS": (2, 5, 100),
        "SAMPLE": (3, 100),
        "SHARES": ((8, 2), (4,)),
    }.items():
        monkeypatch.setattr(near_pairs, name, rng.choice(values))
    monkeypatch.setattr(near_pairs, "DENSE", rng.choice((1, 4, 10**9)))
    names = [f"v{at:02d}" for at in range(20)]
    store = LocalStore(str(tmp_path / "out"))
    commit(store, names, {"v05": "v01", "v19": "v05", "v12": "v03"}, 0.3, rng.randint(1, 9))
    threshold = rng.choice((0.3, 0.8, 0.97, 1.0))
    ids, x = vectors(store)
    cosine = x @ x.T
    np.fill_diagonal(cosine, -2)
    near = cosine >= threshold
    reach = near | np.eye(len(ids), dtype=bool)
    for _ in ids:
        reach = (reach @ reach) > 0
    expected = {frozenset(ids[one] for one in np.flatnonzero(row)) for row in reach if row.sum() > 1}
    for source in (newest(store), SnapshotRows(snapshot_of(store, tmp_path))):
        found = find_duplicates(source, threshold=threshold)
        assert {frozenset(one.video_id for one in cluster) for cluster in found.clusters} == expected
        assert (found.n_videos, found.n_pairs) == (20, near.sum() // 2)
        assert [len(cluster) for cluster in found.clusters] == sorted(map(len, expected), reverse=True)
        for one in (one for cluster in found.clusters for one in cluster):
            at = ids.index(one.video_id)
            assert one.like_id == ids[int(cosine[at].argmax())]
            assert one.cosine == pytest.approx(cosine[at].max(), abs=1e-6)
            assert one.like_path == f"{one.like_id}.mp4" and one.uri == f"file:///v/{one.path}"


def snapshot_of(store: LocalStore, folder: Path) -> LocalStore:
    dest = LocalStore(str(folder / "dest"))
    snapshot(newest(store), dest)
    return dest


@pytest.mark.parametrize("probes", [8, 3])
def test_the_evidence_names_the_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probes: int) -> None:
    """A copy that is one clip late matches one clip late, clip by clip, also with less memory for probes."""
    monkeypatch.setattr(schema, "ROW_GROUP_ROWS", 17)
    monkeypatch.setattr(dedup, "PROBE_BYTES", 4 * DIM * 2 * probes)
    store = LocalStore(str(tmp_path / "out"))
    commit(store, ["a", "b", "c", "d"], {"d": "b"}, 0.01, 2)
    ((first, second),) = find_duplicates(newest(store), threshold=0.99).clusters
    assert (first.video_id, first.like_id, second.video_id, second.like_id) == ("b", "d", "d", "b")
    assert len(first.matches) == len(second.matches) == probes
    starts = [0.0, *(16 * at / 25 for at in range(1, 12)), 184 / 25]  # 200 frames: the last clip ends at the end
    for match in second.matches:
        assert match.cosine > 0.99
        assert starts.index(match.other_start_s) == (starts.index(match.start_s) - 1) % 13
        assert match.end_s - match.start_s == pytest.approx(16 / 25)
    assert {match.start_s for match in second.matches} >= {0.0, 184 / 25}


def test_the_verb_prints_clusters_and_json(tmp_path: Path) -> None:
    """Clusters with evidence in 80 columns, a count on stderr; --json has every match; finding nothing is not an
    error."""
    store = LocalStore(str(tmp_path / "out"))
    commit(store, ["a", "b", "c", "d"], {"d": "b"}, 0.01, 2)
    code, printed, said = in_process("results", "dedup", store.url, "--threshold", "0.99")
    assert code == 0, said
    lines = [line.split() for line in printed.splitlines()]
    assert lines[0] == ["cluster", "1:", "2", "videos"] and [line[0] for line in lines[1::4]] == ["b.mp4", "d.mp4"]
    assert [line[-1] for line in lines[3::4]] == ["d.mp4", "b.mp4"] and lines[4][1:4] == ["s", "is", "like"]
    assert max(map(len, printed.splitlines())) <= 80
    assert "4 videos compared: 2 in 1 cluster, 1 pair of cosine 0.99 or more" in said
    found = json.loads(in_process("results", "dedup", store.url, "--threshold", "0.99", "--json")[1])
    assert len(found["clusters"][0][0]["matches"]) == 8
    code, printed, said = in_process("results", "dedup", store.url, "--threshold", "1")
    assert (code, printed) == (0, "") and "0 in 0 clusters" in said


@pytest.mark.parametrize("dense", [1, 10**9])
def test_bounds_miss_no_pair(monkeypatch: pytest.MonkeyPatch, dense: int) -> None:
    """Of vectors with any spectrum, pairs at the very threshold and copies: those of float64, for any blocks."""
    monkeypatch.setattr(near_pairs, "ROWS", 37)
    monkeypatch.setattr(near_pairs, "COLUMNS", 90)
    monkeypatch.setattr(near_pairs, "DENSE", dense)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((300, 64)) * (1 + np.arange(64.0)) ** -rng.choice((0, 0.5, 2)) + rng.choice((0, 3))
        x[150:] = x[:150] + rng.choice((0, 1e-4, 0.1), 150)[:, None] * rng.standard_normal((150, 64))
        units = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        exact = units.astype(np.float64)
        exact /= np.linalg.norm(exact, axis=1, keepdims=True)
        cosine = np.minimum(np.triu(exact @ exact.T, 1), 1)
        for threshold in (0.5, 0.98, 0.999999, float(np.sort(cosine, axis=None)[-100]) - 1e-12):
            found = [*near_pairs.near_pairs(units, threshold)]
            rows = {(a, b) for first, second, _ in found for a, b in zip(first.tolist(), second.tolist(), strict=True)}
            assert rows == {*map(tuple, np.argwhere((cosine >= threshold) & (np.triu(cosine, 1) != 0)).tolist())}
            assert sum(len(first) for first, _, _ in found) == len(rows)
            for first, second, near in found:
                assert np.abs(near - cosine[first, second]).max() < 1e-6
