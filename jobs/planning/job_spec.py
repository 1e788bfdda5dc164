"""The options of a job that determine its embeddings, as the user gives them. Imports no torch, for `--help`."""

from __future__ import annotations

from dataclasses import dataclass

from p3d.pipeline.recipe import RecipeOptions
from p3d.pipeline.types.options import ABSENT, check_options, option


@dataclass(frozen=True, slots=True)
class JobSpec(RecipeOptions):
    """The user's options that determine the embeddings. The Recipe holds what network and weights turn out to be."""

    model: str | None = option(
        ABSENT, "Choose the network (see `p3d models`); required for random weights and baseline checkpoints."
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
