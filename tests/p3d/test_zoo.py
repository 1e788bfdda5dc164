"""The zoo and its recipes: names, costs, and validation of recipes."""

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p3d import names, weights, zoo
from p3d.preprocessing import CAFFE_FLOW, CAFFE_RGB, PORT_FLOW, PORT_RGB, ClipRecipe

COSTS = {  # parameters with 400 classes, GMACs of RGB and of flow
    "p3d63": (25_745_232, 8.4410, 8.1199),
    "p3d131": (48_088_400, 12.8975, 12.5764),
    "p3d199": (66_492_240, 18.4025, 18.0814),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs_are_the_published_ones(name: str) -> None:
    """Parameters, multiply-adds and depth agree with counts on the public module, also for flow."""
    params, gmacs, flow_gmacs = COSTS[name]
    rgb, flow = zoo.describe(name), zoo.describe(f"{name}-flow")
    assert (rgb.params, flow.params) == (params, params - 3136)
    assert (round(rgb.gmacs, 4), round(flow.gmacs, 4)) == (gmacs, flow_gmacs)
    assert f"p3d{rgb.layers}" == name
    assert rgb.feature_dim == 2048


def test_the_file_of_p3d199_has_the_known_size() -> None:
    """The size includes the normalisations' 172,288 statistics in addition to the 66,492,240 parameters."""
    assert zoo.describe("p3d199").size_mb == pytest.approx(4 * (66_492_240 + 172_288) / 1e6)


@pytest.mark.parametrize(("name", "gmacs"), [("p3d63", 8.7163), ("p3d131", 13.1727), ("p3d199", 18.6778)])
def test_the_stride_on_the_middle_costs_what_it_should(name: str, gmacs: float) -> None:
    """With the stride on the 3x3 convolutions the first 1x1x1 processes the full image."""
    assert round(zoo.describe(name, stride_on="3x3").gmacs, 4) == gmacs


@pytest.mark.parametrize("variant", ["-a", "-b", "-c"])
def test_single_kind_variants_cost_the_same(variant: str) -> None:
    """A, B and C have the same convolutions in another order, so variants differ only in name."""
    mixed = zoo.describe("p3d63")
    assert zoo.describe(f"p3d63{variant}") == dataclasses.replace(mixed, name=f"p3d63{variant}")


@pytest.mark.parametrize(("wrong", "right"), [("p3d-199", "p3d199"), ("P3D63", "p3d63"), ("p3d131-flo", "p3d131-flow")])
def test_an_unknown_name_is_answered_by_near_ones(wrong: str, right: str) -> None:
    """A misspelt name is refused, and the message suggests the right one."""
    for ask in (zoo.build, zoo.config, zoo.describe, lambda name: zoo.recipe(name, "caffe")):
        with pytest.raises(ValueError, match=rf"{wrong}.*\b{right}\b"):
            ask(wrong)


def test_a_name_like_no_other_is_answered_by_all() -> None:
    """If no name is similar, the message lists every name."""
    with pytest.raises(ValueError, match=r"p3d63, .*p3d199-flow"):
        zoo.config("zzzzzz")


def test_the_names_that_are_known_without_torch_are_those_of_the_zoo() -> None:
    """Each name has a network, and each network a name; `p3d.names` itself imports no torch."""
    depths, variants = zoo._BLOCKS, zoo._VARIANTS
    assert [depth + variant for depth in depths for variant in variants] == list(names.P3D_NAMES)
    assert tuple(zoo._OTHERS) == names.BASELINES and tuple(weights._LOOKS) == names.SUFFIXES
    code = "import sys, p3d.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_recipes_follow_the_graph_and_the_channels() -> None:
    """Each graph's weights get the preprocessing they were published with."""
    assert zoo.recipe("p3d63-b", "caffe") is CAFFE_RGB
    assert zoo.recipe("p3d199-flow", "caffe") is CAFFE_FLOW
    assert zoo.recipe("p3d199", "port") is PORT_RGB
    assert zoo.recipe("p3d131-flow", "port") is PORT_FLOW
    with pytest.raises(ValueError, match="tf"):
        zoo.recipe("p3d63", "tf")


@pytest.mark.parametrize("name", zoo.P3D_NAMES)
@pytest.mark.parametrize("graph", ["caffe", "port"])
def test_every_p3d_takes_its_own_recipe(name: str, graph: str) -> None:
    """Channels and frames of the recipe match the network of that name."""
    recipe, config = zoo.recipe(name, graph), zoo.config(name, graph=graph)
    assert recipe.channels == config.in_channels == (2 if name.endswith("flow") else 3)
    assert recipe.n_frames == 16
    assert config.name == name


numbers = st.floats(-1e6, 1e6, allow_nan=False)
sides = st.integers(1, 500)


@given(
    frames=st.integers(1, 64),
    crop=st.tuples(sides, sides),
    margin=st.integers(0, 99),
    keep_aspect=st.booleans(),
    value_range=st.sampled_from([1, 255]),
    channels=st.lists(st.tuples(numbers, st.floats(1e-6, 1e6)), min_size=1, max_size=4),
)
def test_a_recipe_survives_its_dictionary(
    frames: int,
    crop: tuple[int, int],
    margin: int,
    keep_aspect: bool,
    value_range: int,
    channels: list[tuple[float, float]],
) -> None:
    """from_dict is the inverse of to_dict for every valid recipe."""
    recipe = ClipRecipe(
        n_frames=frames,
        crop_hw=crop,
        resize_hw=None if keep_aspect else (crop[0] + margin, crop[1]),
        short_side=max(crop) + margin if keep_aspect else None,
        channel_order="bgr" if len(channels) == 3 else "rgb",
        value_range=value_range,
        mean=tuple(mean for mean, _ in channels),
        std=tuple(std for _, std in channels),
    )
    assert ClipRecipe.from_dict(recipe.to_dict()) == recipe


def test_whole_and_decimal_numbers_are_one_recipe() -> None:
    """104 and 104.0 are written in the same way, so a recipe's digest does not depend on how it was typed."""
    typed = dataclasses.replace(CAFFE_RGB, mean=(104, 117, 123), std=(1, 1, 1))
    assert json.dumps(typed.to_dict()) == json.dumps(CAFFE_RGB.to_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_frames": 0}, "n_frames"),
        ({"n_frames": True}, "n_frames"),
        ({"n_frames": "16"}, "n_frames"),
        ({"resize_hw": None}, "set one of"),
        ({"short_side": 182}, "set one of"),
        ({"resize_hw": [182]}, "resize_hw"),
        ({"resize_hw": None, "short_side": 159}, "does not fit"),
        ({"crop_hw": [183, 160]}, "does not fit"),
        ({"crop_hw": [160, -160]}, "crop_hw"),
        ({"crop_hw": 160}, "crop_hw"),
        ({"channel_order": "gbr"}, "gbr"),
        ({"mean": [1, 2], "std": [1, 1]}, "'bgr' needs 3"),
        ({"value_range": 256}, "256"),
        ({"value_range": True}, "True"),
        ({"mean": [1, 2]}, "one number per channel"),
        ({"mean": ["a", "b", "c"]}, "finite numbers"),
        ({"mean": [1, 2, float("nan")]}, "finite numbers"),
        ({"std": [1, 1, 0]}, "positive"),
        ({"std": 1}, "std must be a tuple"),
        ({"crop": [160, 160]}, "unknown keys in a clip recipe: crop"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    """A wrong value or an unknown key in a recipe's dictionary is a ValueError that names it."""
    with pytest.raises(ValueError, match=message):
        ClipRecipe.from_dict({**CAFFE_RGB.to_dict(), **change})


def test_a_recipe_without_statistics_is_refused() -> None:
    """Mean and std have no default: omitting them must not pass silently."""
    with pytest.raises(ValueError, match="without mean and std"):
        ClipRecipe.from_dict({"n_frames": 16})


@pytest.mark.parametrize("module", ["p3d", "p3d.preprocessing"])
def test_the_package_and_its_recipes_are_light(module: str) -> None:
    """Importing the package or its recipes does not import torch, so that the command line starts quickly."""
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
