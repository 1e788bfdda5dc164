"""bf16: what a plan says about it, and queries on a machine that does not support the precision of the rows."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import p3d
import p3d.device
from p3d import zoo
from p3d.device import computes_in, device_for
from p3d.encoder import Encoder, golden_clip
from p3d.jobs.api.search import embedded
from p3d.jobs.cli.plan import _precisions
from p3d.jobs.job import rows_of, stored_weights
from p3d.jobs.planning import network_trial
from p3d.jobs.planning.decode_trial import Tried
from p3d.jobs.planning.estimate import STARTUP_S, JobGain, job_gain, recommended
from p3d.jobs.planning.network_trial import Gain, embed_trial
from p3d.jobs.planning.prepare import JobSpec, Prepared, prepare, recipe_of_query
from p3d.pipeline.errors import InputError
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.types import VideoEnd, VideoRef
from tests.jobs.embedded import embed_all
from tests.jobs.served import serving
from tests.jobs.test_cli import in_process
from tests.pipeline.rows import recipe
from tests.zoo import moving

needs_bf16 = pytest.mark.skipif(not p3d.device.cpu_has_bf16(), reason="this CPU has no instructions for bf16")


@pytest.fixture
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without instructions for bf16."""
    monkeypatch.setattr(p3d.device, "cpu_has_bf16", lambda: False)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos of one or two clips."""
    root = tmp_path_factory.mktemp("films")
    for at, n_frames in enumerate((36, 16, 20)):
        moving.video(root / f"{at}.mp4", at, n_frames)
    return root


@pytest.fixture(scope="module")
def out(films: Path, small_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """A dataset whose rows were computed in bf16."""
    folder = tmp_path_factory.mktemp("out")
    store = LocalStore(str(folder / "out"))
    embed_all(str(films), store, JobSpec(None, str(small_weights), precision="bf16"), folder)
    return store


@needs_bf16
def test_a_query_has_the_precision_of_the_rows(out: LocalStore, films: Path) -> None:
    """Where the machine has bf16, a file of a bf16 dataset finds itself bit-equal, without a warning."""
    found = p3d.search(out.url, films / "0.mp4", with_self=True)
    assert (found.hits[0].path, found.hits[0].score, found.warning) == ("0.mp4", 1.0, None)


@needs_bf16
def test_a_machine_without_bf16_embeds_a_query_in_fp32_and_says_so(
    out: LocalStore, films: Path, tmp_path: Path, without_bf16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nearest hit is right with a cosine near 1; Python, command line and page each have the warning."""
    path, says = (
        str(films / "0.mp4"),
        "does not support bf16, the precision of the rows, on device cpu; the file was embedded in fp32",
    )
    found = p3d.search(out.url, f"{path}@0.1s", with_self=True)
    assert found.warning is not None and says in found.warning
    assert found.hits[0].path == "0.mp4" and 0.999 < found.hits[0].score < 1
    code, printed, said = in_process("search", out.url, path, "--with-self", "--json")
    answer = json.loads(printed)
    assert (code, answer["hits"][0]["path"], answer["warning"]) == (0, "0.mp4", found.warning)
    assert said.count(says) == 0, "with --json the warning is in the answer"
    code, printed, said = in_process("search", out.url, path)
    assert (code, said.count(says), says in printed) == (0, 1, False)
    code, printed, said = in_process("search", out.url, "0.mp4", "--json")
    assert (code, json.loads(printed)["warning"], says in said) == (0, None, False)  # a stored row has its precision
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serving(out) as page:
        dropped = page.ask("api/drop", method="POST", body=Path(path).read_bytes(), name="0.mp4").json["dropped"]
        assert page.ask("api/similar", dropped=dropped).json["warning"] == found.warning
        assert page.ask("api/similar", id=page.id_of("0.mp4")).json["warning"] is None


@needs_bf16
def test_a_given_encoder_must_have_the_precision_of_the_rows(out: LocalStore, films: Path, small_weights: Path) -> None:
    """Where the machine has bf16, an fp32 encoder is refused for bf16 rows, and a bf16 encoder for fp32 rows."""
    source, path = rows_of(out), str(films / "1.mp4")
    weights = stored_weights(out, source.job.recipe)
    with pytest.raises(ValueError, match="in bf16, the encoder runs p3d-demo in fp32"):
        embedded(source, path, Encoder(weights))
    source.job = replace(source.job, recipe=replace(source.job.recipe, precision="fp32"))
    with pytest.raises(ValueError, match="in fp32, the encoder runs p3d-demo in bf16"):
        embedded(source, path, Encoder(weights, precision="bf16"))


def test_the_precision_of_a_query(without_bf16: None) -> None:
    """fp32 instead of what the device does not support; fp32 rows stay fp32; a missing device is still refused."""
    for asked in ("bf16", "fp16"):
        assert not computes_in(asked, device_for("cpu"))
        assert recipe_of_query(recipe(precision=asked), "cpu") == recipe(precision="fp32")
    assert recipe_of_query(recipe(precision="fp32"), "cpu") == recipe(precision="fp32")
    with pytest.raises(InputError, match="cuda:99"):
        recipe_of_query(recipe(precision="bf16"), "cuda:99")


def tried_clips(weights: Path, spec: JobSpec) -> tuple[Prepared, list[Tried]]:
    """What a plan has after decoding three videos of one clip each."""
    prepared = prepare(spec)
    frames_NHWC, _ = golden_clip(prepared.weights.recipe)
    video = VideoRef("id", "a.mp4", "file:///a.mp4", "", 1)
    shown = [np.roll(frames_NHWC, 9 * at, axis=2) for at in range(3)]
    return prepared, [Tried(video, 0.1, None, VideoEnd(16, 1.0, False), frames) for frames in shown]


@needs_bf16
def test_a_plan_in_fp32_measures_bf16(small_weights: Path) -> None:
    """The cosines are those between the two precisions, over each sample clip once; a plan in bf16 has none."""
    prepared, tried = tried_clips(small_weights, JobSpec(None, str(small_weights)))
    found = embed_trial(prepared, tried, cpus=2)
    (gained,) = found.gains
    assert gained.precision == "bf16" and gained.times > 0 and gained.n_clips == 3
    in_bf16, tried = tried_clips(small_weights, JobSpec(None, str(small_weights), precision="bf16"))
    other = embed_trial(in_bf16, tried, cpus=2)
    assert other.gains == ()
    one_ND, other_ND = found.features_ND.astype(float), other.features_ND.astype(float)
    lengths_N = np.linalg.norm(one_ND, axis=1) * np.linalg.norm(other_ND, axis=1)
    cosines_N = (one_ND * other_ND).sum(axis=1) / lengths_N
    assert gained.lowest == pytest.approx(cosines_N.min(), abs=1e-6) and gained.lowest < 1 - 1e-6
    assert gained.cosine == pytest.approx(np.median(cosines_N), abs=1e-6)
    assert embed_trial(prepared, [], cpus=2).gains == ()  # no clip to compare


def test_a_plan_on_a_machine_without_bf16_measures_fp32_alone(small_weights: Path, without_bf16: None) -> None:
    """The rate of fp32 is there, and no comparison."""
    found = embed_trial(*tried_clips(small_weights, JobSpec(None, str(small_weights))), cpus=2)
    assert found.gains == () and found.clips_per_s > 0 and len(found.features_ND) == 3


@pytest.mark.parametrize(
    ("cores_s", "network_s", "on_cpu", "job_times"),
    [
        (0.0, 1e6, True, 2.5),
        (1e6, 1e6, True, 2 / 1.4),  # the stages share the cores of a CPU
        (1e6, 1e6, False, 1.0),  # a GPU waits for the decoding
        (0.0, STARTUP_S, True, 2 / 1.4),  # the start takes as long as before
    ],
)
def test_the_gain_of_the_whole_job(cores_s: float, network_s: float, on_cpu: bool, job_times: float) -> None:
    """Only the network becomes faster; decoding and the start do not."""
    found = job_gain(Gain("bf16", 2.5, 0.9999, 0.999, 32), cores_s, network_s, on_cpu=on_cpu)
    assert found.job_times == pytest.approx(job_times, rel=1e-4)
    assert (found.times, found.cosine, found.lowest, found.n_clips) == (2.5, 0.9999, 0.999, 32)


@pytest.mark.parametrize(
    ("times", "job_times", "line"),
    [
        (2.61, 1.94, "network 2.6 times as fast here, the job 1.9 times: --precision bf16"),
        (2.61, 1.04, "network 2.6 times as fast here, the job 1.0 times"),
        (0.912, 0.95, "not faster here: the network 0.91 times as fast as in fp32"),
    ],
)
def test_the_lines_of_a_plan(times: float, job_times: float, line: str) -> None:
    """The option is named only if the whole job is faster; the lines fit 80 columns of a terminal."""
    half = JobGain("bf16", times, 0.9999703, 0.9999101, 32, job_times)
    (name, first), (_, second) = _precisions(SimpleNamespace(gains=(half,), not_compared={}))  # type: ignore[arg-type]
    assert (name, first) == ("bf16", line)
    assert second == "(cosine with fp32 0.999970, lowest 0.999910, of 32 clips)"
    assert max(len(first), len(second)) + 10 <= 80
    assert _precisions(SimpleNamespace(gains=(), not_compared={})) == []  # type: ignore[arg-type]


def test_a_plan_on_a_gpu_names_the_most_exact_of_the_fastest_precisions() -> None:
    """fp16 and bf16 are equally fast on a GPU, and fp16 is nearer to fp32; what is too far from it is not named."""
    fp16 = JobGain("fp16", 3.1, 0.9999998, 0.9999996, 32, 2.40)
    bf16 = JobGain("bf16", 3.2, 0.99998, 0.9999, 32, 2.45)
    tf32 = JobGain("tf32", 1.8, 0.9999999, 0.9999999, 32, 1.6)
    assert recommended((bf16, fp16, tf32)) is fp16
    assert recommended((bf16, replace(fp16, lowest=0.9))) is bf16
    assert recommended((tf32, replace(bf16, job_times=1.02))) is tf32
    assert recommended((replace(bf16, job_times=1.04),)) is None
    lines = dict(_precisions(SimpleNamespace(gains=(fp16, bf16, tf32), not_compared={})))  # type: ignore[arg-type]
    assert lines["fp16"].endswith(": --precision fp16")
    assert "--precision" not in lines["bf16"] + lines["tf32"]


@pytest.mark.parametrize(
    ("kind", "name", "supported", "lines"),
    [
        ("cpu", "c3d", {"bf16"}, ["c3d does not support bf16"]),
        ("cpu", "c3d", set(), []),  # nobody expects it of such a CPU
        ("cpu", "p3d63", {"bf16"}, []),
        ("cuda", "p3d63", {"fp16"}, ["this GPU does not support bf16 or tf32"]),
        ("cuda", "c3d", {"fp16", "bf16", "tf32"}, ["c3d does not support fp16 or bf16 or tf32"]),
        ("mps", "p3d63", set(), []),
    ],
)
def test_a_plan_says_why_a_precision_is_not_compared(
    monkeypatch: pytest.MonkeyPatch, kind: str, name: str, supported: set[str], lines: list[str]
) -> None:
    """A line names the network, or the GPU, that lacks a precision which could be expected on this kind of device."""
    monkeypatch.setattr(network_trial, "computes_in", lambda precision, device: precision in supported)
    with torch.device("meta"):
        network = zoo.build(name)
    found = network_trial.not_compared(network, torch.device(kind))
    shown = _precisions(SimpleNamespace(gains=(), not_compared=found))  # type: ignore[arg-type]
    assert shown == [("precision", line) for line in lines]
