"""The Python API: the examples of the documents run as a user's script, and errors are those of the command line."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import p3d
from p3d.jobs.api import runs
from p3d.jobs.job import read_job
from p3d.pipeline.dataset.snapshot import snapshot
from p3d.pipeline.errors import DamagedJob, InputError, NoSuchJob, OtherRecipe, Unfinished
from p3d.pipeline.recipe import PlanOptions, RecipeOptions, RunOptions
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.types.options import options_in
from tests.conftest import REPO
from tests.conftest import p3d as command_line
from tests.zoo import make


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short videos and one that is cut."""
    folder = tmp_path_factory.mktemp("films")
    for at, n_frames in enumerate((40, 16, 20)):
        make.video(folder / f"{at}.mp4", "libx264", n_frames)
    (folder / "cut.mp4").write_bytes((folder / "0.mp4").read_bytes()[:900])
    return folder


CHECKS = """
import json, threading

assert ids and vectors.shape == (2, dataset.recipe.feature_dim), vectors.shape
(failed,) = dataset.failures().to_pylist()
seen = []
made.video(__import__("pathlib").Path("videos/broken.mp4"), "libx264", 20, hw=(96, 192))
retrying = threading.Thread(target=lambda: seen.append(p3d.retry("out/")))  # as from a server: no signal handlers there
retrying.start()
retrying.join()
print(json.dumps([failed["path"], repr(status), seen[0].videos_failed, p3d.open_dataset("out/").vectors()[1].shape]))
"""


def code_of(page: str) -> str:
    """The blocks of Python of a page, in order."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", (REPO / page).read_text(), re.M | re.S))


def test_the_examples_run_in_a_folder_with_modules_of_the_same_names(small_weights: Path, tmp_path: Path) -> None:
    """The Python of README.md and docs/reference/api.md runs in order, as a script without a `__main__` guard.

    The folder has its own `jobs/` and `pipeline.py`. A retry from a thread then reads the repaired file.
    """
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, n_frames in (("one-of-them", 40), ("other", 20)):
        make.video(videos / f"{name}.mp4", "libx264", n_frames, hw=(96, 192))
    (videos / "broken.mp4").write_bytes((videos / "other.mp4").read_bytes()[:900])
    for name in ("jobs/__init__.py", "pipeline.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise ImportError('the module of the user')\n")
    shutil.copy(small_weights, tmp_path / "p3d63.safetensors")
    text = "from tests.zoo import make as made\n" + code_of("README.md") + code_of("docs/reference/api.md") + CHECKS
    (tmp_path / "script.py").write_text(text)
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    words = [sys.executable, "script.py"]
    ran = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert ran.returncode == 0, ran.stderr
    *lines, last = ran.stdout.splitlines()
    failed, shown, n_failed, shape = json.loads(last)
    assert failed == "broken.mp4" and n_failed == 0 and shape[0] == 3
    assert re.fullmatch(r"Status\('.*/out': finished, 3 of 3 videos, 1 failed, \d+ clips\)", shown)
    assert any(line.startswith("RunSnapshot(") for line in lines), lines
    assert any(line.startswith("NoSuchJob no job exists at ") for line in lines)
    assert command_line("verify", tmp_path / "out", "--deep").code == 0


@pytest.mark.parametrize(
    ("function", "records"),
    [
        ("launch", (RecipeOptions, PlanOptions, RunOptions)),
        ("resume", (RunOptions,)),
        ("retry", (RunOptions,)),
        ("embed_file", (RecipeOptions,)),
    ],
)
def test_a_function_shows_and_takes_each_declared_option(function: str, records: tuple[type, ...]) -> None:
    """`help()` shows each option with its default; another keyword is a TypeError before anything is done."""
    parameters = inspect.signature(getattr(p3d, function)).parameters
    for record in records:
        for field, _ in options_in(record):
            shown = parameters[field.name]
            assert shown.default == (None if record is RunOptions else field.default)
            assert shown.kind is shown.KEYWORD_ONLY
    needed = {"launch": {"src": "a", "out": "b", "weights": "c"}, "embed_file": {"path": "a", "weights": "b"}}
    with pytest.raises(TypeError, match="frame_stepp"):
        getattr(p3d, function)(**needed.get(function, {"out": "a"}), frame_stepp=2)


def test_errors_are_those_of_the_command_line(tmp_path: Path, small_weights: Path) -> None:
    """Each mistake is the exception whose text and exit code the command line gives."""
    out, weights = tmp_path / "out", str(small_weights)
    for mistake, kind, words in (
        (lambda: p3d.launch("", out, weights=weights), InputError, "empty text"),
        (lambda: p3d.launch(tmp_path / "none", out, weights=weights), InputError, "none"),
        (lambda: p3d.launch(tmp_path, out, weights="random:0"), InputError, "choose one with --model"),
        (lambda: p3d.launch(tmp_path, out, weights=weights, pool="median"), InputError, "pool must be one of"),
        (lambda: p3d.launch(tmp_path, out, weights=weights, shard_videos=0), InputError, "at least 1"),
        (lambda: p3d.launch(tmp_path, out, weights=weights, batch_size=0), InputError, "at least 1"),
        (lambda: p3d.launch(tmp_path, out, weights=weights, max_failures="many"), InputError, "max-failures"),
        (lambda: p3d.launch(tmp_path, out, weights=weights, address="http://head:8265"), InputError, "ray://"),
        (lambda: p3d.resume(out), NoSuchJob, "no job exists"),
        (lambda: p3d.retry(out, reasons=["bad_luck"]), InputError, "bad_luck"),
        (lambda: p3d.status(out), NoSuchJob, "no job exists"),
        (lambda: p3d.open_dataset(out), NoSuchJob, "no job exists"),
    ):
        with pytest.raises(kind, match=words) as caught:
            mistake()  # type: ignore[no-untyped-call] # lambdas
        assert isinstance(caught.value, p3d.JobError)


def test_a_dataset_gives_the_rows(out: LocalStore, tmp_path: Path) -> None:
    """Rows of a job and of its snapshot are the same, as batches and as numpy, and an unknown column is named."""
    copy = LocalStore(str(tmp_path / "copy"))
    snapshot(p3d.open_dataset(out.url).source, copy)
    whole, copied = p3d.open_dataset(out.url), p3d.open_dataset(copy.url)
    for dataset in (whole, copied):
        for level in ("clip", "video"):
            ids, vectors = dataset.vectors(level)
            assert vectors.dtype == np.float32 and vectors.shape == (len(ids), dataset.recipe.feature_dim)
            assert np.array_equal(vectors, whole.vectors(level)[1]) and ids == whole.vectors(level)[0]
        tables = [pa.Table.from_batches(dataset.clips(["path", "start_s"])), pa.Table.from_batches(dataset.videos())]
        assert tables[0].column_names == ["path", "start_s"] and tables[0].num_rows == len(dataset.vectors("clip")[0])
        assert "fps_estimated" in tables[1].column_names
        assert dataset.failures().num_rows + tables[1].num_rows == dataset.n_videos and dataset.n_pending == 0
        assert dataset.class_names == tuple(f"class {number}" for number in range(10))
        for wrong, words in (
            (lambda: dataset.clips(["nothing"]), "no column 'nothing'; it has video_id"),  # noqa: B023 - called at once
            (lambda: dataset.vectors(column="path"), "does not hold vectors"),  # noqa: B023 - as above
            (lambda: dataset.vectors("frame"), "level must be clip or video"),  # type: ignore[arg-type] # noqa: B023
        ):
            with pytest.raises(InputError, match=words):
                wrong()
    assert repr(whole).startswith(f"Dataset({out.url!r}: {whole.n_videos} videos, p3d-demo, ")


@pytest.mark.parametrize(
    ("code", "kind"), [(6, Unfinished), (7, DamagedJob), (130, KeyboardInterrupt), (143, KeyboardInterrupt)]
)
def test_a_run_that_did_not_finish_raises(code: int, kind: type[BaseException], out: LocalStore) -> None:
    """A script that ignores the status cannot go on as if all videos were done."""
    with pytest.raises(kind):
        runs._ended(runs.Ran(out, read_job(out), code))
    for fine in (None, 0, 1, 3):
        assert runs._ended(runs.Ran(out, read_job(out), fine)).state == "finished"


def test_another_recipe_is_refused(out: LocalStore, small_weights: Path, films: Path) -> None:
    """A launch with other settings into an output raises OtherRecipe, and names the field."""
    with pytest.raises(OtherRecipe, match="pool mean, not max"):
        p3d.launch(films, out.url, weights=small_weights, pool="max")


LAUNCHED = {"src": ".", "out": "o", "weights": "random:0", "model": "p3d-demo"}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"frame_step": 2.0}, "frame_step must be int, not 2.0"),
        ({"frame_step": "2"}, "frame_step must be int, not '2'"),
        ({"fps": True}, "fps must be float or int, not True"),
        ({"clips": 16}, "clips must be str, not 16"),
        ({"pool": ["mean"]}, "pool must be str"),
        ({"model": 63}, "model must be str, not 63"),
        ({"workers": 0}, "workers must be at least 1, not 0"),
        ({"workers": 1.5}, "workers must be int, not 1.5"),
        ({"video_timeout_s": "5"}, "video_timeout_s must be float or int, not '5'"),
        ({"device": 0}, "device must be str, not 0"),
        ({"threads": 100_000}, "threads must be at most 1024"),
        ({"limit": 2.0}, "limit must be int, not 2.0"),
        ({"trust": "yes"}, "trust must be True or False"),
        ({"s3": {}}, r"s3 must be p3d.StoreOptions\(...\), not {}"),
        ({"weights": None}, "Missing option '--weights', as OUT holds no job yet"),
        ({"weights": 7}, "weights must be a path or a URL, not 7"),
        ({"src": ["a.mp4", "b.mp4"]}, "src must be a path or a URL.*write several paths to a .txt"),
        ({"src": b"folder"}, "src must be a path or a URL, not b'folder'"),
    ],
)
def test_a_value_of_another_type_is_named_and_nothing_is_written(
    tmp_path: Path, call: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is an InputError with the name of the argument, before an output is made."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        p3d.launch(**(LAUNCHED | call))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"top": 0}, "top must be at least 1"),
        ({"top": "5"}, "top must be int"),
        ({"metric": "dot"}, "metric must be one of cosine, l2"),
        ({"level": "frame"}, "level must be one of clip, video"),
        ({"distinct": 2}, "distinct must be at most 1"),
        ({"where": "durations>=1"}, "there is no column 'durations'"),
        ({"query": 7}, "query must be a path or a URL"),
    ],
)
def test_a_wrong_search_is_named(out: LocalStore, call: dict[str, Any], words: str) -> None:
    """Options of a search are checked as on the command line; one condition may be a text."""
    with pytest.raises(InputError, match=words):
        p3d.search(**({"out": out.url, "query": "0.mp4"} | call))


def test_numbers_of_numpy_and_single_texts_are_taken(out: LocalStore, tmp_path: Path) -> None:
    """A number of numpy is one of Python, and a text stands for a list of one."""
    assert [batch.column_names for batch in p3d.open_dataset(out.url).clips("path")] == [["path"]]
    assert p3d.search(out.url, "0.mp4", where="n_clips>=1").hits
    with pytest.raises(InputError, match="no videos in"):
        p3d.launch(tmp_path, tmp_path / "o", weights="random:0", model="p3d-demo", shard_videos=np.int64(2))
    with pytest.raises(TypeError, match="did you mean max_duration_s"):
        p3d.resume(tmp_path, max_duration=3)


def test_functions_of_the_user_that_fail_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """An error in `on_progress` or `say` does not end a run, and its traceback is in the log once."""
    told = runs._heard(lambda _: 1 / 0)
    told(1)
    told(2)
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


def test_an_embedded_video_has_a_short_repr(films: Path, small_weights: Path) -> None:
    """In a notebook the last line of a cell shows what it is, and not its numbers."""
    found = p3d.embed_file(films / "0.mp4", small_weights)
    assert repr(found) == "EmbeddedVideo(p3d-demo, 3 clips, 512 features, 1.60 s)"
