"""Random weights are never used by accident: all code that computes features gets explicit weights."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import p3d.weights
from p3d import zoo
from p3d.encoder import Encoder, golden_features
from p3d.jobs.api import embed as embedding
from p3d.jobs.cli import VERBS, LazyGroup, cli
from p3d.jobs.planning import prepare as planning
from p3d.jobs.planning import weights_convention as choosing
from p3d.jobs.worker.actor import Refused, ShardWorker, WorkerSpec
from p3d.pipeline.errors import InputError, OtherRecipe
from p3d.pipeline.storage.local import LocalStore
from p3d.weights import Weights, WeightsError
from tests.conftest import REPO
from tests.pipeline.rows import recipe

NO_WEIGHTS = ("", "random", "random:", "random:x", "Random:0", "random:-1", "p3d63")


def verbs(group: click.Group, before: str = "p3d") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from verbs(command, f"{before} {name}")
        else:
            yield f"{before} {name}", command


def test_no_verb_has_weights_unless_they_are_typed() -> None:
    """`--weights` has no default where a verb has it but the job's own; resume and retry use those."""
    assert isinstance(cli, LazyGroup) and cli.verbs is VERBS
    having = {name: option for name, verb in verbs(cli) for option in verb.params if option.name == "weights"}
    assert {"p3d plan", "p3d launch"} <= having.keys()
    assert not {"p3d resume", "p3d retry"} & having.keys()
    assert all(option.envvar is None and not isinstance(option.default, str) for option in having.values())
    files = [option for name, verb in verbs(cli) if name == "p3d weights choose" for option in verb.params]
    assert next(option for option in files if option.name == "file").required


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (p3d.weights.load, "path"),
        (p3d.weights.resolve, "spec"),
        (p3d.weights.random_weights, "seed"),
        (Encoder, "weights"),
        (golden_features, "weights"),
        (planning.fix, "weights"),
        (planning.JobSpec, "weights"),
        (embedding.embed_file, "weights"),
        (embedding.embed, "encoder"),
        (choosing.choose, "weights"),
    ],
)
def test_no_function_has_default_weights(function: Any, argument: str) -> None:
    """Every function that leads to features requires weights, a seed or an encoder, without a default."""
    assert inspect.signature(function).parameters[argument].default is inspect.Parameter.empty


@pytest.mark.parametrize("words", NO_WEIGHTS)
def test_a_name_that_is_nearly_random_is_refused(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only random:SEED with a network gives random weights; similar texts are refused, in jobs and in calls."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        planning.prepare(planning.JobSpec("p3d63", words))
    with pytest.raises(InputError):
        p3d.embed_file(tmp_path / "video.mp4", words, model="p3d63")


def test_a_launch_into_a_job_takes_its_weights(tmp_path: Path, small_weights: Path) -> None:
    """Neither --weights nor --model is needed again; another network than that of the job is refused."""
    store = LocalStore(str(tmp_path / "out"))
    with pytest.raises(InputError, match="Missing option '--weights'"):
        planning.prepare(planning.JobSpec(None, None), out=store)
    first = planning.prepare(planning.JobSpec(None, str(small_weights)))
    planning.create_job(store, first)
    again = planning.prepare(planning.JobSpec(None, None), out=store)
    assert (again.recipe, again.content) == (first.recipe, first.content)
    with pytest.raises(OtherRecipe, match="has the model p3d-demo, not p3d199: leave out --model"):
        planning.prepare(planning.JobSpec("p3d199", None), out=store)


def test_random_weights_need_a_network_by_name(tmp_path: Path) -> None:
    """random:0 alone does not choose a network, and it does not replace a file."""
    with pytest.raises(InputError, match="choose one with --model"):
        planning.prepare(planning.JobSpec(None, "random:0"))
    with pytest.raises(InputError, match="choose one with --model"):
        p3d.embed_file(tmp_path / "video.mp4", "random:0")
    with pytest.raises(WeightsError, match="no weights file at random:0"):
        p3d.weights.load("random:0", name="p3d63")


def test_a_new_network_is_not_weights() -> None:
    """The Encoder refuses a network of `zoo.build`, bare or wrapped as Weights."""
    network = zoo.build("p3d63", num_classes=2)
    with pytest.raises(TypeError, match="takes weights"):
        Encoder(network)  # type: ignore[arg-type] # that is the point
    with pytest.raises(WeightsError, match="in training mode cannot be used as weights"):
        Weights(network, zoo.recipe("p3d63", "caffe"), (), "")


def test_a_worker_whose_weights_are_gone_or_changed_is_refused(tmp_path: Path, small_weights: Path) -> None:
    """A resume computes nothing if OUT has lost its weights or holds others under their name."""
    options = planning.run_options({}, device="cpu")
    given = (str(tmp_path), recipe(), options, (0.0,))
    from p3d.jobs.job import weights_key
    from p3d.jobs.machine import code_digest

    worker = ShardWorker(WorkerSpec(*given, code_digest(), str(tmp_path)))
    assert isinstance(worker.setup(), Refused)
    (tmp_path / "weights").mkdir()
    (tmp_path / weights_key(recipe())).write_bytes(small_weights.read_bytes())
    refused = worker.setup()
    assert isinstance(refused, Refused) and "is damaged" in refused.detail
    assert not hasattr(worker, "encoder")


def test_nothing_of_a_job_builds_a_network_by_itself() -> None:
    """No line of `jobs` calls `build` or `random_weights`: weights come through `p3d.weights.load` and `resolve`."""
    calls = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for path in (REPO / "jobs").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    }
    assert {"load", "resolve"} <= calls
    assert not {"build", "random_weights"} & calls
