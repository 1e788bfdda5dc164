"""The map of the page: PCA equal to a full decomposition, clusters that exist, and edge cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p3d.pipeline.results.page.projection import COMPONENTS, MOST_CLUSTERS, clusters, principal, project


@pytest.mark.parametrize("shape", [(300, 64), (40, 512), (3, 8), (9, 2)])
def test_the_axes_are_those_of_a_full_decomposition(shape: tuple[int, int]) -> None:
    """Scores up to a sign, and shares of the variance, of vectors of very different lengths."""
    rng = np.random.default_rng(1)
    spread_D, lengths_N1 = np.geomspace(4, 0.05, shape[1]), rng.uniform(0.1, 9, (shape[0], 1))
    vectors_ND = (rng.standard_normal(shape) * spread_D * lengths_N1).astype(np.float32)
    unit_ND = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    scores_NC, shares_C = principal(unit_ND, COMPONENTS, np.random.default_rng(0))
    u, s, _ = np.linalg.svd((unit_ND - unit_ND.mean(axis=0)).astype(np.float64), full_matrices=False)
    assert np.allclose(np.abs(scores_NC[:, :2]), np.abs(u[:, :2] * s[:2]), atol=2e-3)
    assert np.allclose(shares_C[:2], (s**2 / np.sum(s**2))[:2], atol=1e-3)


def test_clusters_that_are_there_are_found() -> None:
    """Five groups far from each other are five clusters, the largest first, each with its own row at its centre."""
    rng = np.random.default_rng(2)
    truth = np.repeat(np.arange(5), (50, 40, 30, 20, 10))
    vectors_ND = (4 * np.eye(5, 16)[truth] + 0.2 * rng.standard_normal((150, 16)) + 1).astype(np.float32)
    order = rng.permutation(150)
    projection = project(np.arange(1000, 1150), vectors_ND[order])
    assert np.array_equal(projection.cluster_S, truth[order])
    assert [truth[order][row - 1000] for row in projection.middles_K] == [0, 1, 2, 3, 4]
    assert projection.xy_S2.shape == (150, 2) and projection.share is not None and 0 < projection.share <= 1
    again = project(np.arange(1000, 1150), vectors_ND[order])
    assert np.array_equal(projection.xy_S2, again.xy_S2) and np.array_equal(projection.cluster_S, again.cluster_S)


def test_umap_keeps_neighbours_together() -> None:
    """With umap-learn, as in `make test-page`: finite, reproducible coordinates, and two separate groups."""
    pytest.importorskip("umap")
    rng = np.random.default_rng(3)
    truth = np.repeat([0, 1], (40, 20))
    vectors_ND = (3 * np.eye(2, 32)[truth] + 0.1 * rng.standard_normal((60, 32))).astype(np.float32)
    projection = project(np.arange(60), vectors_ND, "umap")
    assert (projection.layout, projection.share) == ("umap", None)
    assert (projection.xy_S2.dtype, projection.xy_S2.shape) == (np.float32, (60, 2))
    assert np.isfinite(projection.xy_S2).all() and np.array_equal(projection.cluster_S, truth)
    far_SS = np.linalg.norm(projection.xy_S2[:, None] - projection.xy_S2[None], axis=2)
    np.fill_diagonal(far_SS, np.inf)
    assert np.array_equal(truth[np.argsort(far_SS, axis=1)[:, :5]], np.repeat(truth[:, None], 5, axis=1))
    assert np.array_equal(project(np.arange(60), vectors_ND, "umap").xy_S2, projection.xy_S2)
    assert project(np.arange(3), vectors_ND[:3], "umap").xy_S2.shape == (3, 2)  # the fewest rows that get a map


@settings(max_examples=60)
@given(
    n_rows=st.integers(0, 12),
    dim=st.integers(1, 9),
    kinds=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_rows_have_a_map(n_rows: int, dim: int, kinds: int, seed: int) -> None:
    """Few rows, equal rows, one dimension, rows of zeros: finite coordinates, clusters from 0 on, own centres."""
    rng = np.random.default_rng(seed)
    some_KD = rng.standard_normal((kinds, dim)).astype(np.float32) * rng.integers(0, 2, (kinds, 1)).astype(np.float32)
    vectors_ND = some_KD[rng.integers(0, kinds, n_rows)]
    projection = project(np.arange(n_rows), vectors_ND)
    assert projection.xy_S2.shape == (n_rows, 2) and np.isfinite(projection.xy_S2).all()
    n_clusters = len(np.unique(projection.cluster_S))
    assert n_clusters <= min(MOST_CLUSTERS, max(1, n_rows)) and set(projection.cluster_S) <= set(range(MOST_CLUSTERS))
    assert set(projection.middles_K.tolist()) <= set(range(n_rows))
    for cluster, row in enumerate(projection.middles_K.tolist()):
        assert projection.cluster_S[row] == cluster


def test_points_that_are_all_alike_are_one_cluster() -> None:
    """Rounding errors do not create clusters."""
    cluster_S, middle_KC = clusters(np.full((20, 3), 0.1), np.random.default_rng(0))
    assert set(cluster_S) == {0} and len(middle_KC) == 1
    vectors_ND = np.tile(np.random.default_rng(3).standard_normal(64).astype(np.float32), (30, 1))
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    vectors_ND += 2e-8 * np.repeat([[1], [-1]], 15, axis=0).astype(np.float32)
    assert set(project(np.arange(30), vectors_ND).cluster_S) == {0}
