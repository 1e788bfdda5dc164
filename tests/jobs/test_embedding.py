"""`p3d.embed_file` gives the rows of a job without the job, and clear errors."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import p3d.weights
from p3d.encoder import Encoder
from p3d.jobs.api.embed import embed
from p3d.jobs.planning.prepare import JobSpec, prepare
from p3d.jobs.worker.encode import encode_of
from p3d.pipeline.clips.pool import pool
from p3d.pipeline.decode.messages import decode_messages
from p3d.pipeline.errors import BadVideo, InputError, Reason
from p3d.pipeline.extract import extract_shard
from p3d.pipeline.recipe import Recipe
from p3d.pipeline.sources.identity import local_row
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.types import DecodeMessage, ShardPlan, ShardRows
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests.conftest import REPO
from tests.zoo import make


@pytest.fixture(scope="module")
def encoder(real_weights: Path) -> Encoder:
    return Encoder(p3d.weights.load(real_weights), batch_size=3, threads=1)


def in_a_shard(recipe: Recipe, encoder: Encoder, paths: list[Path], scratch: Path) -> ShardRows:
    """The rows of several videos as a worker makes them, with clips of several videos in one batch."""
    shard = ShardPlan(1, "0" * 8, 0, tuple(local_row(path.parent, os.fsencode(path.name)) for path in paths))

    def messages() -> Iterator[tuple[int, DecodeMessage]]:
        for at, video in enumerate(shard.videos):
            for message in decode_messages(
                video,
                recipe.frame_spec,
                recipe.sampling,
                policy=DecodePolicy(),
                limits=DecodeLimits(),
                store_options=DEFAULTS,
                scratch=scratch,
            ):
                yield at, message

    return extract_shard(
        shard,
        messages(),
        encode_of(encoder, recipe),
        sampling=recipe.sampling,
        batch_size=encoder.batch_size,
        feature_dim=recipe.feature_dim,
        n_scores=recipe.n_scores,
        embedding_dtype=recipe.embedding_dtype,
    )


@pytest.mark.parametrize(("clips", "how"), [("every:16", "mean"), ("random:2@7", "mean+max")])
def test_the_rows_are_a_workers(
    clips: str, how: str, archive: Path, real_weights: Path, encoder: Encoder, tmp_path: Path
) -> None:
    """Alone in a child process or with others in a shard, a video has bit-identical rows and vectors."""
    scores = how == "mean+max"
    recipe = prepare(JobSpec(None, str(real_weights), clips=clips, pool=how, scores=scores)).recipe
    paths = [archive / "video0.mp4", archive / "video1.mp4", archive / "more" / "video2.mp4"]
    rows = in_a_shard(recipe, encoder, paths, tmp_path)
    for path, outcome in zip(paths, rows.outcomes, strict=True):
        found = embed(path, encoder, recipe)
        mine = [at for at, row in enumerate(rows.clips) if row.path == path.name]
        assert found.clips == tuple(rows.clips[at] for at in mine)
        assert np.array_equal(found.features_ND, rows.features_RD[mine])
        assert list(found.layers) == (["prob"] if scores else [])
        if scores:
            assert np.array_equal(found.layers["prob"], rows.probs_RK[mine])
        assert (found.info, found.end) == (outcome.info, outcome.end)
        vectors = pool(rows.features_RD[mine], how)
        assert np.array_equal(found.embedding_D, vectors[0])
        assert list(found.pooled) == ["embedding", "embedding_max"][: len(vectors)]
        for one_D, expected_D in zip(found.pooled.values(), vectors, strict=True):
            assert np.array_equal(one_D, expected_D)


def test_layers_are_returned_with_the_rows(archive: Path, real_weights: Path, encoder: Encoder) -> None:
    """Requested layers are returned by name, one row per clip, and the features do not change."""
    recipe = prepare(JobSpec(None, str(real_weights))).recipe
    path = archive / "more" / "video2.mp4"
    plain, found = (
        embed(path, encoder, recipe),
        embed(path, encoder, recipe, layers=("prob", "res5c")),
    )
    assert not plain.layers and list(found.layers) == ["prob", "res5c"]
    assert found.layers["prob"].shape == (len(found.clips), 10)
    assert found.layers["res5c"].shape == (len(found.clips), 2048, 2, 2)
    assert np.array_equal(found.features_ND, plain.features_ND)
    np.testing.assert_allclose(found.layers["res5c"].mean(axis=(2, 3)), found.features_ND, rtol=1e-4)
    with pytest.raises(ValueError, match="no layer 'res4b35'; there are prob, pool5, res5, res5c, res4, res4f"):
        embed(path, encoder, recipe, layers=["res4b35"])


def test_a_decoder_that_restarted_leaves_no_stale_layer(
    archive: Path, real_weights: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a second VideoInfo, the layers are those of the new clips."""
    from p3d.jobs.api import embed as embedding

    recipe = prepare(JobSpec(None, str(real_weights))).recipe
    path = archive / "video0.mp4"
    true = embedding.decode_in_child

    def twice(*given: Any, **named: Any) -> Iterator[DecodeMessage]:
        first = list(true(*given, **named))
        yield from [*first[:-1], *first[2:]]

    expected = embed(path, encoder, recipe, layers=["pool5"])
    monkeypatch.setattr(embedding, "decode_in_child", twice)
    found = embed(path, encoder, recipe, layers=["pool5"])
    assert np.array_equal(found.features_ND, expected.features_ND)
    assert np.array_equal(found.layers["pool5"], found.features_ND)


def test_a_video_without_rows_says_why(
    archive: Path, real_weights: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken or missing file raises BadVideo with the reason and message that a job would record."""
    recipe = prepare(JobSpec(None, str(real_weights))).recipe
    broken = make.damaged(archive / "video0.mp4", tmp_path / "broken.mp4", 0.0, 64)
    for path, reason in ((broken, Reason.NOT_A_VIDEO), (tmp_path / "none.mp4", Reason.SOURCE_MISSING)):
        with pytest.raises(BadVideo) as caught:
            embed(path, encoder, recipe)
        assert caught.value.reason is reason
        assert str(caught.value).startswith(f"{path}: {reason}: ")
    with pytest.raises(InputError, match="only a local file"):
        embed("s3://bucket/video.mp4", encoder, recipe)


def test_the_one_call(archive: Path, real_weights: Path, encoder: Encoder) -> None:
    """`embed_file` takes a weights file or loaded weights, and gives what `embed` gives with a job's options."""
    path = archive / "more" / "video2.mp4"
    recipe = prepare(JobSpec(None, str(real_weights), clips="uniform:1")).recipe
    expected = embed(path, encoder, recipe)
    for weights in (real_weights, p3d.weights.load(real_weights)):
        found = p3d.embed_file(path, weights, clips="uniform:1", device="cpu", batch_size=3, threads=1)
        assert found.recipe == recipe
        assert np.array_equal(found.features_ND, expected.features_ND)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clips": "all"}, "every:STRIDE"),
        ({"precision": "fp8"}, "not 'fp8'"),
        ({"precision": "fp16"}, "for CUDA devices"),
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
        ({"weights": "random:0"}, "choose one with --model"),
        ({"weights": "p3d63-flow"}, "optical flow"),
    ],
)
def test_a_wrong_option_gives_one_message(
    options: dict[str, Any], says: str, archive: Path, real_weights: Path
) -> None:
    """A wrong option is refused as by `p3d launch`, before any video is decoded."""
    weights = options.pop("weights", str(real_weights))
    if weights == "p3d63-flow":
        weights = p3d.weights.random_weights(weights, 0)
    with pytest.raises(InputError, match=says):
        p3d.embed_file(archive / "video0.mp4", weights, **{"device": "cpu", **options})


def test_an_encoder_of_another_network_is_refused(archive: Path, real_weights: Path, encoder: Encoder) -> None:
    """An encoder that does not fit the recipe is refused."""
    recipe = dataclasses.replace(prepare(JobSpec(None, str(real_weights))).recipe, model="p3d199")
    with pytest.raises(ValueError, match="for p3d199 in fp32, the encoder runs p3d63"):
        embed(archive / "video0.mp4", encoder, recipe)


def test_embedding_loads_no_ray() -> None:
    """`p3d.embed_file` does not load Ray."""
    code = "import sys, p3d; p3d.embed_file; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0


def test_the_page_runs(archive: Path, real_weights: Path) -> None:
    """The code for Python of docs/how-to/results.md works."""
    blocks = (REPO / "docs" / "how-to" / "results.md").read_text().split("```")
    code = next(block for block in blocks if block.startswith("python") and "embed_file" in block)
    code = code.removeprefix("python").replace("uniform:20", "uniform:2")
    code = code.replace("WEIGHTS.safetensors", str(real_weights))
    names: dict[str, Any] = {}
    exec(code.replace("VIDEO.mp4", str(archive / "video0.mp4")), names)
    found = names["found"]
    assert found.embedding_D.shape == (2048,) and found.features_ND.shape[1] == 2048
    assert len(found.features_ND) == 2 and found.layers.keys() == {"prob", "res5c"}
