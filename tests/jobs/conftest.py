"""Fixtures that several files of these tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from p3d.jobs.planning.prepare import JobSpec
from p3d.pipeline.storage.local import LocalStore
from tests.jobs.embedded import embed_all


@pytest.fixture(scope="module")
def out(films: Path, small_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """A dataset of the videos of the module's own fixture `films`."""
    folder = tmp_path_factory.mktemp("out")
    store = LocalStore(str(folder / "out"))
    embed_all(str(films), store, JobSpec(None, str(small_weights)), folder)
    return store
