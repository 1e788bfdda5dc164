"""Vectors -> a 2-D map: two coordinates and a cluster for each vector. Pure functions.

The map is a PCA of vectors of length 1, so distances on it approximate those by cosine as well as two axes can. The
leading axes come from a randomised range finder with power iterations (Halko, Martinsson, Tropp 2011, algorithm 4.4).
20 000 vectors of 2048 take two seconds, clusters included. Clusters are by k-means++ on the leading COMPONENTS axes;
k, at most MOST_CLUSTERS, has the best simplified silhouette. Legend: S sampled rows, N points, D dimension, C
components, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from p3d.pipeline.errors import InputError
from p3d.pipeline.types import FLOAT32, FLOAT64, INT64

COMPONENTS = 32
OVERSAMPLED = 16
POWER_ITERATIONS = 4
MOST_CLUSTERS = 8  # colours that a reader can distinguish
LLOYD_ROUNDS = 25
SILHOUETTE_ROWS = 4000  # sampled to choose k
ROUNDING = 1e-6  # distance below which vectors count as equal


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """Row numbers of the archive, their coordinates and clusters, and the row nearest to the centre of each cluster.

    `share` in [0, 1] is the share of the variance that the two axes explain; None for layouts without it.
    """

    rows_S: INT64
    xy_S2: FLOAT32
    cluster_S: INT64
    middles_K: INT64
    share: float | None
    layout: str


def project(rows_S: INT64, vectors_SD: FLOAT32, layout: str = "pca") -> Projection:
    """The map of some rows by their vectors of length 1. Deterministic: the same rows give the same map.

    `layout` is "pca" or "umap". InputError if "umap" is asked for and umap-learn is not installed.
    """
    n_rows = len(rows_S)
    if n_rows < 3:
        xy_S2 = np.zeros((n_rows, 2), np.float32)
        xy_S2[:, 0] = np.arange(n_rows)
        none = np.zeros(n_rows, np.int64)
        return Projection(rows_S, xy_S2, none, rows_S[:1], None, "pca")
    rng = np.random.default_rng(0)
    scores_SC, shares_C = principal(vectors_SD, COMPONENTS, rng)
    cluster_S, middle_KC = clusters(scores_SC, rng)
    near_SK = _squares(scores_SC, middle_KC)
    within_SK = np.where(cluster_S[:, None] == np.arange(len(middle_KC)), near_SK, np.inf)
    middles_K = rows_S[within_SK.argmin(axis=0)]
    if layout == "umap":
        return Projection(rows_S, _umap(scores_SC), cluster_S, middles_K, None, "umap")
    return Projection(
        rows_S, scores_SC[:, :2].astype(np.float32), cluster_S, middles_K, float(shares_C[:2].sum()), "pca"
    )


def principal(vectors_SD: FLOAT32, n_components: int, rng: np.random.Generator) -> tuple[FLOAT64, FLOAT64]:
    """Coordinates on the leading axes [S, C], C at least 2, and the share of the variance of each axis [C]."""
    centred_SD = vectors_SD - vectors_SD.mean(axis=0)
    total = float(np.einsum("sd,sd->", centred_SD, centred_SD, dtype=np.float64))
    if total < len(centred_SD) * ROUNDING**2:
        return np.zeros((len(centred_SD), 2)), np.zeros(2)
    wide = min(n_components + OVERSAMPLED, *vectors_SD.shape)
    basis_SW = np.linalg.qr(centred_SD @ rng.standard_normal((vectors_SD.shape[1], wide)).astype(np.float32))[0]
    for _ in range(POWER_ITERATIONS):
        basis_SW = np.linalg.qr(centred_SD @ np.linalg.qr(centred_SD.T @ basis_SW)[0])[0]
    left_WW, values_W, axes_WD = np.linalg.svd((basis_SW.T @ centred_SD).astype(np.float64), full_matrices=False)
    kept = min(n_components, wide)
    signs_W = np.sign(axes_WD[np.arange(wide), np.abs(axes_WD).argmax(axis=1)])  # fixes the sign of each axis
    scores_SC = (basis_SW @ left_WW * values_W * signs_W)[:, :kept]
    if kept < 2:  # features of one dimension
        scores_SC = np.pad(scores_SC, ((0, 0), (0, 2 - kept)))
    return scores_SC, values_W[:kept] ** 2 / max(total, np.finfo(np.float64).tiny)


def clusters(points_SC: FLOAT64, rng: np.random.Generator) -> tuple[INT64, FLOAT64]:
    """The cluster of each point [S], the largest first, and the centres [K, C]. One cluster if all points are equal."""
    chosen = rng.choice(len(points_SC), min(SILHOUETTE_ROWS, len(points_SC)), replace=False)
    best, middle_KC = 0.0, points_SC.mean(axis=0)[None]
    for k in range(2, min(MOST_CLUSTERS, len(points_SC) - 1) + 1):
        tried_KC = _kmeans(points_SC[chosen], k, rng)
        if len(tried_KC) < k:  # there are fewer than k distinct points
            break
        silhouette = _silhouette(points_SC[chosen], tried_KC)
        if silhouette > best + 0.01:  # prefer fewer clusters unless more are clearly better
            best, middle_KC = silhouette, tried_KC
    cluster_S = _squares(points_SC, middle_KC).argmin(axis=1)
    order_K = np.argsort(-np.bincount(cluster_S, minlength=len(middle_KC)), kind="stable")
    return np.argsort(order_K)[cluster_S], middle_KC[order_K]


def _silhouette(points_NC: FLOAT64, middle_KC: FLOAT64) -> float:
    """The mean simplified silhouette, by distances to centres. A point that is a cluster by itself counts as 0."""
    squares_NK = _squares(points_NC, middle_KC)
    two_N2 = np.sqrt(np.partition(squares_NK, 1, axis=1)[:, :2])
    nearest_N = squares_NK.argmin(axis=1)
    alone_N = np.bincount(nearest_N, minlength=len(middle_KC))[nearest_N] == 1
    return float(np.mean(np.where(alone_N, 0, (two_N2[:, 1] - two_N2[:, 0]) / np.maximum(two_N2[:, 1], 1e-12))))


def _kmeans(points_NC: FLOAT64, k: int, rng: np.random.Generator) -> FLOAT64:
    """Centres by k-means++ and Lloyd's algorithm, [K, C]. A cluster that becomes empty keeps its centre."""
    middles = [points_NC[rng.integers(len(points_NC))]]
    for _ in range(k - 1):
        far_N = _squares(points_NC, np.stack(middles)).min(axis=1)
        if not far_N.sum():
            break
        middles.append(points_NC[rng.choice(len(points_NC), p=far_N / far_N.sum())])
    middle_KC = np.stack(middles)
    for _ in range(LLOYD_ROUNDS):
        nearest_N = _squares(points_NC, middle_KC).argmin(axis=1)
        moved_KC = middle_KC.copy()
        for at in np.unique(nearest_N):
            moved_KC[at] = points_NC[nearest_N == at].mean(axis=0)
        if np.array_equal(moved_KC, middle_KC):
            break
        middle_KC = moved_KC
    return middle_KC


def _squares(points_NC: FLOAT64, middle_KC: FLOAT64) -> FLOAT64:
    """Squared distances [N, K]."""
    near_NK = points_NC @ (-2 * middle_KC.T)
    near_NK += np.einsum("nc,nc->n", points_NC, points_NC)[:, None] + np.einsum("kc,kc->k", middle_KC, middle_KC)
    return np.maximum(near_NK, 0)


def _umap(scores_SC: FLOAT64) -> FLOAT32:
    try:
        import umap
    except ImportError:
        raise InputError("a map by UMAP needs umap-learn: pip install 'p3d-embeddings[umap]'") from None
    made = umap.UMAP(n_components=2, n_neighbors=min(15, len(scores_SC) - 1), random_state=0, init="random", n_jobs=1)
    xy_S2: FLOAT32 = made.fit_transform(scores_SC).astype(np.float32)
    return xy_S2
