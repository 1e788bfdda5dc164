"""The options of a job that determine its embeddings, as the user gives them.

Imports no torch: `--help` answers at once, and so does the refusal of a wrong value.
"""

from __future__ import annotations

from dataclasses import dataclass

from p3d import names
from p3d.pipeline.clips.rules import parse_sampling
from p3d.pipeline.errors import InputError
from p3d.pipeline.recipe import RecipeOptions
from p3d.pipeline.types.options import ABSENT, check_options, option

NO_WEIGHTS = (
    "Missing option '--weights', as OUT holds no job yet. Give a file of weights, such as p3d63.safetensors from `p3d "
    "weights fetch resnet50-v2 -o p3d63.safetensors`, or random:SEED, which shows that the pipeline works but gives "
    "meaningless features"
)


@dataclass(frozen=True, slots=True)
class JobSpec(RecipeOptions):
    """The user's options that determine the embeddings. The Recipe holds what network and weights turn out to be."""

    model: str | None = option(
        ABSENT,
        "Choose the network (see `p3d models`); required for random weights and baseline checkpoints.",
        default_text="that of the weights",
    )
    weights: str | None = option(
        ABSENT,
        "Load weights: our .safetensors, the authors' .caffemodel, the PyTorch port's .pth.tar, or random:SEED.",
        metavar="FILE|random:SEED",
        default_text="those of the job at OUT; required for a new one",
    )
    graph: str | None = option(
        None, "Use the authors' graph or the port's.", choices=("caffe", "port"), default_text="the weights'"
    )

    def __post_init__(self) -> None:
        check_options(self)


def check_spec(spec: JobSpec) -> None:
    """InputError for a clip rule, a network or weights that do not exist, before anything is loaded."""
    try:
        parse_sampling(spec.clips, clip_frames=1)
    except ValueError as error:
        raise InputError(str(error)) from None
    check_named(spec.model, spec.weights)
    if spec.model is None and (spec.weights or "").startswith(names.RANDOM):
        raise InputError("random weights fit any network: choose one with --model (see `p3d models`)")


def check_named(model: str | None, weights: str | None = None) -> None:
    """InputError unless a network has this name, and the weights are random:SEED, on S3, or a file of weights.

    None stands for any network, and for the weights of the job at OUT.
    """
    try:
        if model is not None:
            names.check_name(model)
    except ValueError as error:
        raise InputError(f"{error} (`p3d models` lists all)") from None
    try:
        if weights is not None and not weights.startswith("s3://"):
            names.check_weights(weights)
    except ValueError as error:
        raise InputError(str(error)) from None
