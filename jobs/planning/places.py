"""Are SRC and OUT of a launch two places, and the right way round? Imports no torch: a mistake is refused at once."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from itertools import islice
from urllib.parse import unquote

from p3d.jobs.job import TRAIN_KEY
from p3d.pipeline.errors import InputError, StoreError, StrayFile, shell_words
from p3d.pipeline.recipe import PlanOptions
from p3d.pipeline.sources.below import is_below, place_of_videos
from p3d.pipeline.sources.listing import check_source, is_video, root_of
from p3d.pipeline.sources.lists import LIST_EXTENSIONS
from p3d.pipeline.storage.store import Store, StoreOptions
from p3d.pipeline.storage.urls import open_store

LOOKED_AT = 1000  # objects of OUT, at most; one page of a listing of S3


def check_places(
    src: str, store: Store | None, plan: PlanOptions, s3: StoreOptions, say: Callable[[str], None], verb: str = "launch"
) -> None:
    """InputError if SRC does not exist here or is OUT, if an option does not fit it, or if the two are swapped.

    `store` is that of OUT; None without OUT. An OUT inside SRC is allowed, because none of its files is taken for a
    video. `say` is told what it costs. A SRC on S3 is not looked for. StoreError if OUT cannot be read.
    """
    root = root_of(src)
    if store is not None:
        with warnings.catch_warnings(action="ignore", category=StrayFile):  # of what is no output
            _refuse_swapped(root, store, s3, verb)
    _, globs = check_source(src, id_column=plan.id_column, include=plan.include, exclude=plan.exclude)
    if store is None or src.lower().endswith(LIST_EXTENSIONS):
        return
    source, out = place_of_videos(root), place_of_videos(store.url)
    if not is_below(out, root):
        return
    if is_below(source, store.url):
        raise InputError(f"SRC and OUT are the same place, {store.url}; choose a new folder or prefix for the output")
    if globs.excludes(unquote(out.removeprefix(f"{source}/"))):
        return
    say(
        f"note: {store.url} is inside SRC. None of its files is taken for a video, but each listing of SRC goes "
        "through it, too; --exclude avoids that"
    )


def _refuse_swapped(src: str, store: Store, s3: StoreOptions, verb: str) -> None:
    """InputError if OUT holds videos and no job, while SRC is an output, or is empty or does not exist."""
    if _is_output(store) or not any(is_video(one.key) for one in islice(store.list(), LOOKED_AT)):
        return
    what = ""
    with contextlib.suppress(StoreError, InputError):  # such as a SRC that is a file
        source = open_store(src, s3)
        if _is_output(source):
            what = "is an output of p3d"
        elif next(source.list(), None) is None:
            what = "is empty or does not exist"
    if what:
        words = f"{shell_words(store.url)} {source.words(src)}"
        raise InputError(
            f"SRC and OUT seem to be swapped: {store.url} holds videos, and {source.url} {what}. SRC comes first: "
            f"`p3d {verb} {words}`"
        )


def _is_output(store: Store) -> bool:
    """Is there a job or a training?"""
    return store.head("job.json") is not None or store.head(TRAIN_KEY) is not None
