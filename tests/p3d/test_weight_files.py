"""Weights files as a whole: conversions preserve every bit, and damaged files are refused without side effects.

`make fuzz` is the long form of the second half.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p3d import zoo
from p3d.weights import WeightsError, load, save
from tests.p3d import caffe_writer, checkpoint_writer, fuzz_weights
from tests.p3d.tiny_nets import State, assert_bits_equal, drawn, state_of, tiny_zoo

INPUTS = int(os.environ.get("P3D_FUZZ", "2000"))
SEED = int(os.environ.get("P3D_SEED", "0"))

few = st.integers(1, 2)
networks = st.fixed_dictionaries(
    {
        "blocks": st.tuples(few, st.integers(1, 3), st.integers(1, 4), few),
        "width": st.integers(1, 3),
        "name": st.sampled_from(["tiny", "tiny-flow"]),
        "graph": st.sampled_from(["caffe", "port"]),
        "num_classes": st.integers(1, 4),
        "seed": st.integers(0, 2**32),
    }
)


def go_round(folder: Path, suffix: str, network: dict[str, object], written: Callable[[State], bytes]) -> None:
    """file -> load -> native file -> load -> the same file again."""
    with tiny_zoo(network["blocks"], network["width"]):
        config = zoo.config(network["name"], graph=network["graph"], num_classes=network["num_classes"])
        state = drawn(config, network["seed"])
        foreign, native = folder / f"foreign{suffix}", folder / "ours.safetensors"
        foreign.write_bytes(written(state))
        weights = load(foreign, graph=network["graph"])
        assert weights.config == config
        assert_bits_equal(state_of(weights), state)
        save(native, weights)
        again = load(native)
        assert (again.config, again.recipe, again.origin) == (config, weights.recipe, weights.origin)
        assert_bits_equal(state_of(again), state)
        assert written(state_of(again)) == foreign.read_bytes()
    assert sorted(folder.iterdir()) == sorted((foreign, native))


property_test = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@property_test
@given(network=networks, age=st.sampled_from(checkpoint_writer.AGES), prefix=st.sampled_from(["", "module."]))
def test_a_checkpoint_of_the_port_goes_round(
    tmp_path_factory: pytest.TempPathFactory, network: dict[str, object], age: str, prefix: str
) -> None:
    """port -> ours -> port, with any depth and graph: every tensor and finally every byte is the same."""

    def written(state: State) -> bytes:
        return checkpoint_writer.checkpoint(state, age=age, prefix=prefix)

    go_round(tmp_path_factory.mktemp("port"), ".pth.tar", network, written)


@property_test
@given(
    network=networks,
    numbered=st.booleans(),
    vectors=st.sampled_from(["1xC", "1xCx1x1", "C"]),
    old_dims=st.booleans(),
    doubles=st.booleans(),
)
def test_a_caffemodel_goes_round(
    tmp_path_factory: pytest.TempPathFactory,
    network: dict[str, object],
    numbered: bool,
    vectors: str,
    old_dims: bool,
    doubles: bool,
) -> None:
    """caffe -> ours -> caffe, with any depth, block naming and blob format: every tensor and byte is the same."""
    with tiny_zoo(network["blocks"]):
        rows = list(caffe_writer.rows(zoo.config(network["name"]), numbered=numbered))

    def written(state: State) -> bytes:
        return caffe_writer.caffemodel(rows, state, vectors=vectors, old_dims=old_dims, doubles=doubles)

    go_round(tmp_path_factory.mktemp("caffe"), ".caffemodel", network, written)


@pytest.mark.parametrize("name", sorted(fuzz_weights.samples()))
@pytest.mark.parametrize("suffix", [".caffemodel", ".safetensors", ".pth", ".pth.tar"])
def test_a_file_under_the_suffix_of_another_format_is_refused(tmp_path: Path, name: str, suffix: str) -> None:
    """The wrong reader fails with a clear error, not with a crash or wrong numbers."""
    path = tmp_path / f"other{suffix}"
    path.write_bytes(fuzz_weights.samples()[name][0])
    same = suffix.removesuffix(".tar") == Path(name).suffix
    with tiny_zoo(), nullcontext() if same else pytest.raises(WeightsError, match=rf"other{suffix} .*not a whole"):
        load(path)


@pytest.mark.timeout(6 * 3600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pickletools, for backslashes in damaged names
@pytest.mark.fault(48)
def test_damage_is_refused_with_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged files of every format, some with repaired checksums, give a WeightsError or a whole network."""
    print(f"seed {SEED}, {INPUTS} inputs")
    here, temporary, folder = (tmp_path / name for name in ("here", "tmp", "files"))
    for each in (here, temporary, folder):
        each.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    tally = fuzz_weights.run(INPUTS, SEED, folder)
    assert tally.outcomes.total() == INPUTS
    for name in fuzz_weights.samples():
        assert tally.outcomes[f"{name} refused"] > INPUTS / len(fuzz_weights.samples()) / 2
    assert not [*here.iterdir(), *temporary.iterdir(), *folder.iterdir()]
