"""The options of a training. They need no torch, so that the command line can show them at once.

LabelOptions   where the labels of the videos are
TrainOptions   what decides the weights. In OUT/train.json; a resume cannot change them.
TrainRun       processes, speed and limits. In the record of each run; a resume takes those of the run before.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields
from typing import Any, Self

from p3d.pipeline.clips.rate import MAX_FPS
from p3d.pipeline.errors import InputError
from p3d.pipeline.recipe import MAX_DECODE_MEMORY, MaxFailures
from p3d.pipeline.storage.store import DEFAULTS, StoreOptions
from p3d.pipeline.types.options import (
    check_options,
    decode_memory_option,
    max_failures_option,
    option,
    threads_option,
    video_timeout_option,
)

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("steps", "one-cycle", "constant")
FREEZE = ("auto", "none", "bn", "all-bn", "backbone")
PRECISIONS = ("fp32", "bf16")
DEFAULT_LABEL_COLUMN = "label"
DEFAULT_SPLIT_COLUMN = "split"  # which a list need not have
CLIP_TIMEOUT_S = 60.0
CHECKPOINT_MINUTES = 5.0
WORKER_DEATHS = 3  # of one run, after which it ends


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelOptions:
    """What users say about the labels of a training. InputError for a value that is not allowed."""

    labels: str | None = option(
        None,
        "Read labels from this list, or from a folder with train.txt and test.txt, or with UCF101's lists. Paths in "
        "a list are relative to SRC.",
        metavar="FILE",
        default_text="the folders of SRC; or the labels in it, if it is a list",
    )
    label_column: str = option(DEFAULT_LABEL_COLUMN, "Take labels from this column of a list.", metavar="NAME")
    split_column: str = option(
        DEFAULT_SPLIT_COLUMN, "Take the split, train or test, from this column of a list.", metavar="NAME"
    )
    fold: int = option(1, "Use trainlistNN.txt and testlistNN.txt of UCF101's lists.", low=1, high=99, metavar="NN")
    holdout: float = option(
        0.2,
        "Hold out this share of each class for testing, if no split is given; 0: none.",
        low=0,
        high=0.9,
        metavar="SHARE",
    )
    min_per_class: int = option(2, "Refuse labels with fewer than N training videos in a class.", low=1, metavar="N")
    skip_missing: bool = option(False, "Leave out listed videos that do not exist, instead of refusing the list.")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What users choose of the weights that a training gives. The defaults are the paper's fine-tuning on UCF101."""

    steps: int = option(7500, "Train for N steps.", low=1, metavar="N")
    batch_size: int = option(
        128, "Train on N clips per step, over all processes and parts of a batch.", low=1, metavar="N"
    )
    lr: float = option(0.001, "Use this learning rate, with one-cycle as its maximum.", low=0, above=True, metavar="R")
    schedule: str = option(
        "steps",
        "Change the learning rate: steps divides it by 10 every --lr-every steps, one-cycle raises it for a quarter of "
        "the training and then lowers it.",
        choices=SCHEDULES,
    )
    lr_every: int = option(3000, "Divide the learning rate by 10 every N steps.", low=1, metavar="N")
    optimizer: str = option("sgd", "Optimise with this method.", choices=OPTIMIZERS)
    momentum: float = option(0.9, "Use this momentum with sgd.", low=0, high=1, metavar="M")
    weight_decay: float = option(0.0, "Decay weights at this rate.", low=0, metavar="R")
    dropout: float | None = option(
        None,
        "Drop this share of the features before the classifier; the paper uses 0.9 on UCF101.",
        low=0,
        high=0.99,
        metavar="P",
        default_text="0.5",
    )
    label_smoothing: float = option(0.0, "Give this share of the target to all classes.", low=0, high=1, metavar="S")
    flip: bool = option(True, "Mirror half of the clips from left to right.", off="no-flip")
    freeze: str = option(
        "auto",
        "Freeze what the start has: bn keeps all normalisations but the first, all-bn keeps all, backbone trains only "
        "the classifier. auto: bn from a file, none from random weights.",
        choices=FREEZE,
    )
    frame_step: int = option(1, "Take every Nth frame into a clip.", low=1, metavar="N")
    fps: float | None = option(
        None,
        "Resample videos to R frames per second by time.",
        low=0,
        above=True,
        high=MAX_FPS,
        metavar="R",
        default_text="native frames",
    )
    precision: str = option("fp32", "Multiply in fp32, or with autocast in bf16.", choices=PRECISIONS)
    test_clips: int = option(20, "Test each video on the mean scores of N uniform clips.", low=1, metavar="N")
    seed: int = option(0, "Draw new weights, the order and all changes of clips from this seed.", low=0, high=2**31)

    def __post_init__(self) -> None:
        check_options(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Self:
        """The options that `to_dict` wrote. InputError for unknown or missing names and for wrong values."""
        return cls(**_exactly(cls, given))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRun:
    """Processes, speed and limits of one run. On a CPU, equal `workers`, `threads` and `micro_batch` give equal bits.

    A value of 0 means that the program chooses it.
    """

    workers: int = option(
        0, "Train in N processes, one per GPU.", low=0, metavar="N", default_text="one per GPU, else 1"
    )
    device: str = option("auto", "Compute on auto, cpu or cuda.", choices=("auto", "cpu", "cuda"))
    threads: int = threads_option(0, "Use N threads of each process on a CPU.", "its share of the cores")
    micro_batch: int = option(
        0,
        "Compute N clips at a time and add up their gradients, where a whole batch does not fit into memory.",
        low=0,
        metavar="N",
        default_text="16; 4 on a CPU with frozen normalisations",
    )
    decode_tasks: int = option(
        0,
        "Decode N videos at a time for each process.",
        low=0,
        high=256,
        metavar="N",
        default_text="its share of the cores",
    )
    checkpoint_minutes: float = option(
        CHECKPOINT_MINUTES,
        "Write a checkpoint every M minutes; a resume continues at the last one.",
        low=0,
        metavar="M",
        flag="checkpoint-every",
    )
    test_every: int = option(
        0, "Test every N steps as well as at the end.", low=0, metavar="N", default_text="only at the end"
    )
    video_timeout_s: float = video_timeout_option(CLIP_TIMEOUT_S, "Skip a video after this long without a clip.")
    max_decode_memory: int = decode_memory_option(MAX_DECODE_MEMORY, "Skip a video if its decode takes more.")
    max_failures: MaxFailures = max_failures_option(
        MaxFailures(),
        "Stop when more training videos than this fail.",
        "when over half of those tried fail, at least 20",
    )
    s3: StoreOptions = DEFAULTS

    def __post_init__(self) -> None:
        check_options(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Self:
        """The options that `to_dict` wrote, without those that this version does not know. InputError."""
        names = {field.name for field in fields(cls)}
        known = {name: value for name, value in given.items() if name in names}
        if "max_failures" in known:
            known["max_failures"] = MaxFailures.from_dict(known["max_failures"])
        known.pop("s3", None)  # it decides where credentials go, so it never comes from OUT
        return cls(**known)


def _exactly(record: type, given: Any) -> dict[str, Any]:
    names = {field.name for field in fields(record)}
    if not isinstance(given, dict) or given.keys() != names:
        odd = ", ".join(sorted(names ^ (given.keys() if isinstance(given, dict) else set())))
        raise InputError(f"unknown or missing options: {odd[:200]}")
    return given
