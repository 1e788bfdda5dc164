"""What a training starts from, and the record of it: starts of every format, and records that were edited."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import p3d.weights
from p3d import zoo
from p3d.jobs.monitor.training import read_training_status, render_training
from p3d.jobs.training.network import optimizer_of, schedule_of, start_from, what_is_frozen, with_classes
from p3d.jobs.training.options import LabelOptions, TrainOptions
from p3d.jobs.training.plan import TrainSpec, plan
from p3d.jobs.training.record import TrainRecord, read_record, read_samples
from p3d.networks.model import P3DConfig
from p3d.pipeline.errors import DamagedJob, InputError, OtherVersion
from p3d.pipeline.recipe import digest
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.storage.urls import open_store
from p3d.weights.resnet import flat_names
from tests.jobs.test_cli import in_process
from tests.training.conftest import planned

CLASSES, OPTIONS = ("a", "b", "c"), TrainOptions()


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-D ResNet-50 with torchvision's keys, as one would download it."""
    torch.manual_seed(0)
    network = zoo.build("resnet50", graph="port", stride_on="3x3", num_classes=5)
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(network.state_dict(), path)
    return path


def test_a_2d_network_starts_a_p3d_as_in_the_paper(resnet50: Path) -> None:
    """Spatial filters are those of the file, temporal ones are small and random, and the graph is caffe."""
    start = start_from(str(resnet50), "p3d63", None, CLASSES, OPTIONS)
    assert (start.name, start.config.graph, start.class_names) == ("p3d63", "caffe", CLASSES)
    state, flat = start.network.state_dict(), torch.load(resnet50, weights_only=True)
    config = start.config
    assert isinstance(config, P3DConfig)
    for ours, theirs in flat_names(config).items():
        if not theirs.startswith("fc."):
            assert torch.equal(state[ours].flatten(), flat[theirs].flatten()), ours
    temporal = torch.cat([value.flatten() for key, value in state.items() if ".conv3.weight" in key])
    assert 0.0009 < float(temporal.std()) < 0.0011
    again = start_from(str(resnet50), "p3d63", None, CLASSES, OPTIONS)
    assert p3d.weights.to_bytes(again) == p3d.weights.to_bytes(start)
    other = start_from(str(resnet50), "p3d63", None, CLASSES, replace(OPTIONS, seed=1))
    assert p3d.weights.to_bytes(other) != p3d.weights.to_bytes(start)
    assert what_is_frozen(OPTIONS, str(resnet50)) == "bn" and what_is_frozen(OPTIONS, "random:0") == "none"


def test_a_2d_network_may_be_trained_on_frames(resnet50: Path) -> None:
    """With --model resnet50 the same file starts the 2-D network."""
    start = start_from(str(resnet50), "resnet50", "port", CLASSES, OPTIONS)
    assert start.name == "resnet50" and tuple(start.network.state_dict()["fc.weight"].shape) == (3, 2048)


def test_a_2d_network_starts_an_lstm_over_frames(resnet50: Path) -> None:
    """With --model resnet50-lstm its filters are those of the file, and the LSTM is drawn from the seed."""
    start = start_from(str(resnet50), "resnet50-lstm", None, CLASSES, OPTIONS)
    state, flat = start.network.state_dict(), torch.load(resnet50, weights_only=True)
    assert all(torch.equal(state[key], flat[key]) for key in flat if "fc." not in key and "num_batches" not in key)
    other = start_from(str(resnet50), "resnet50-lstm", None, CLASSES, replace(OPTIONS, seed=1)).network.state_dict()
    assert not torch.equal(state["lstm.weight_ih_l0"], other["lstm.weight_ih_l0"])


@pytest.mark.parametrize("steps", range(1, 10))
def test_a_cycle_may_have_any_number_of_steps(steps: int) -> None:
    """The rate is defined after every step, and is highest in the first half."""
    network = torch.nn.Linear(1, 1)
    options = replace(OPTIONS, steps=steps, schedule="one-cycle")
    optimizer = optimizer_of(network, options)
    schedule = schedule_of(optimizer, options)
    for _ in range(steps):
        optimizer.step()
        schedule.step()
    assert 0 < optimizer.param_groups[0]["lr"] <= options.lr


def test_a_classifier_is_kept_only_for_the_same_classes(tmp_path: Path) -> None:
    """Weights with these class names continue as they are; with others the classifier is new and all else is kept."""
    path = tmp_path / "trained.safetensors"
    trained = with_classes(p3d.weights.random_weights("p3d-demo", 0), CLASSES, 3)
    p3d.weights.save(path, trained)
    same = start_from(str(path), None, None, CLASSES, OPTIONS)
    assert p3d.weights.to_bytes(same) == p3d.weights.to_bytes(trained)
    other = start_from(str(path), None, None, ("a", "b"), OPTIONS)
    assert tuple(other.network.state_dict()["fc.weight"].shape) == (2, 512) and other.class_names == ("a", "b")
    kept = {key for key, value in other.network.state_dict().items() if not key.startswith("fc.")}
    assert all(torch.equal(other.network.state_dict()[key], trained.network.state_dict()[key]) for key in kept)


@pytest.mark.parametrize(
    ("init", "model", "message"),
    [
        ("nothing.pth", None, "no weights file"),
        ("random:0", None, "--model"),
        ("random:0", "p3d63-flow", "optical flow"),
        ("FILE", "p3d199", "p3d199"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(init: str, model: str | None, message: str, resnet50: Path) -> None:
    """Weights of another network, of optical flow, or none at all: one message each."""
    with pytest.raises(InputError, match=message):
        start_from(str(resnet50) if init == "FILE" else init, model, None, CLASSES, OPTIONS)


def test_a_record_is_read_as_it_was_written(motions: Path, tmp_path: Path) -> None:
    """Everything comes back, and the samples are those of the record."""
    store, record = planned(motions, tmp_path / "out")
    assert read_record(store) == record
    videos = read_samples(store, record)
    assert videos.num_rows == record.n_train + record.n_test and set(videos["split"].to_pylist()) == {"train", "test"}


def test_a_training_is_listed_and_named(motions: Path, tmp_path: Path) -> None:
    """`jobs list` and `status` of a folder show it; `failures` and `jobs logs` say where its failures are."""
    planned(motions, tmp_path / "outs" / "one")
    code, printed, said = in_process("jobs", "list", str(tmp_path / "outs"))
    assert (code, said) == (0, "")
    row = printed.splitlines()[1]
    assert row.startswith("one") and "p3d-demo, trained" in row and "step 0/6" in row and "not started" in row
    made = json.loads(in_process("jobs", "list", str(tmp_path / "outs"), "--json")[1])
    assert made["jobs"] == [] and [one["train_videos"] for one in made["trainings"]] == [24]
    for verb in (["failures"], ["jobs", "logs"]):
        code, _, said = in_process(*verb, str(tmp_path / "outs" / "one"))
        assert code == 4 and "holds a training" in said and "failures.parquet" in said


def test_the_status_has_hits_at_five_only_of_more_classes(motions: Path, tmp_path: Path) -> None:
    """Of five classes or fewer the right one is always among five, so the last test does not say so."""
    store, record = planned(motions, tmp_path / "out")
    now = read_training_status(store, record)
    now = replace(now, progress=replace(now.progress, hits={"video_hit1": 0.25, "video_hit5": 1.0}))
    for classes, shown in ((5, False), (6, True)):
        console = Console(file=io.StringIO(), width=80, record=True)
        console.print(render_training(replace(now, classes=classes), width=80, escape=lambda one: one))
        text = console.export_text()
        assert "last test: video_hit1 25.0 %" in text and ("video_hit5" in text) is shown


def test_a_batch_of_more_clips_than_videos_is_said(motions: Path, tmp_path: Path) -> None:
    """It is allowed, with one line; a batch of as many clips as videos needs none."""
    for batch_size, said in ((24, False), (25, True)):
        lines = list[str]()
        given = TrainSpec(
            str(motions), "random:0", "p3d-demo", None, LabelOptions(), TrainOptions(batch_size=batch_size)
        )
        plan(open_store(str(tmp_path / str(batch_size)), DEFAULTS), given, DEFAULTS, lines.append)
        assert any("is more than 24 training videos" in line for line in lines) is said


def test_an_edited_record_is_refused(motions: Path, tmp_path: Path) -> None:
    """Edited values, other types, and the record of a newer program: each has its own message."""
    store, record = planned(motions, tmp_path / "out")
    given = json.loads(record.to_json())

    def read(**changes: object) -> TrainRecord:
        training = given["training"] | changes
        return TrainRecord.from_json(
            json.dumps(given | {"training": training, "digest": digest(training)}).encode(), "out"
        )

    assert read() == record
    for changes in ({"n_train": "9"}, {"start_sha256": "../../x"}, {"class_names": [1]}, {"extra": 1}, {"recipe": []}):
        with pytest.raises(DamagedJob, match=r"out/train\.json cannot be read"):
            read(**changes)
    edited = given | {"training": given["training"] | {"n_train": 1}}
    with pytest.raises(DamagedJob, match="edited"):
        TrainRecord.from_json(json.dumps(edited).encode(), "out")
    with pytest.raises(OtherVersion, match="newer p3d"):
        TrainRecord.from_json(json.dumps(given | {"train_version": 2}).encode(), "out")
    samples = Path(store.url, record.samples_key)
    samples.write_bytes(samples.read_bytes() + b" ")
    with pytest.raises(DamagedJob, match=r"samples/.* is damaged"):
        read_samples(store, record)
