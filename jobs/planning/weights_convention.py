"""Find the convention of weights by trying each on a few labelled videos: `p3d weights choose`.

    labelled videos ──decode once──> clips ──{graph} x {channel order} x {range}──> class scores ──> top-1 of each

Public P3D files do not say which graph, channel order and range they need. A wrong one gives wrong features and no
error. What a file says about itself is ignored here, too: every convention is tried.
Source: spec of the weights, sections 0 and 4; McNemar's test in its exact form for two classifiers on the same videos.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from pathlib import Path

import numpy as np

from p3d.device import device_for
from p3d.encoder import Encoder
from p3d.jobs.planning.prepare import default_batch, frame_spec
from p3d.networks.network import GRAPHS
from p3d.pipeline.clips.rules import Sampling, clip_spans, frame_numbers
from p3d.pipeline.decode.child import decode_in_child
from p3d.pipeline.errors import InputError
from p3d.pipeline.recipe import VIDEO_TIMEOUT_S
from p3d.pipeline.sources.listing import find
from p3d.pipeline.sources.listing_buffer import FIELDS
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.types import UINT8, Failure, FrameBlock, VideoEnd, VideoInfo, VideoRef
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from p3d.preprocessing import CHANNEL_ORDERS, in_convention
from p3d.weights import Weights
from p3d.weights.record import assemble

RANGES = (255, 1)
SIGNIFICANT = 0.05

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Labelled:
    """A video and the number of its class, from 0."""

    video: VideoRef
    label: int


@dataclass(frozen=True, slots=True)
class Trial:
    """One convention, and whether the highest-scored class of each video was correct."""

    graph: str
    channel_order: str
    value_range: int
    right: tuple[bool, ...]

    @property
    def n_right(self) -> int:
        return sum(self.right)


@dataclass(frozen=True, slots=True)
class Choice:
    """All trials, best first, on `n_videos` videos; `warnings` says why the best may be wrong.

    `decided` is false if the best is no better than chance.
    """

    trials: tuple[Trial, ...]
    n_videos: int
    n_clips: int
    warnings: tuple[str, ...]
    decided: bool


def labelled_videos(source: str, class_names: Sequence[str], num_classes: int, *, limit: int) -> list[Labelled]:
    """At most `limit` videos of `source`, taking the classes in turn.

    Labels are folder names, or the column `label` of a list. A label is a class name (case, spaces and underscores do
    not matter), or a class number if there are no names. InputError for a label without a class, or a video without a
    label.
    """
    found = find(source, DEFAULTS).videos
    videos = [VideoRef(**row) for row in found.select([name.name for name in FIELDS]).to_pylist()]
    if "label" in found.column_names:
        labels = [str(label) for label in found["label"].to_pylist()]
    else:
        labels = [video.path.rpartition("/")[0].partition("/")[0] for video in videos]
    if "" in labels:
        raise InputError(
            f"{source}: {videos[labels.index('')].path} has no label; give a folder with one folder per class, "
            "or a list with a column `label`"
        )
    numbers = _numbers(class_names, num_classes)
    by_class: dict[int, list[Labelled]] = {}
    for video, label in zip(videos, labels, strict=True):
        number = numbers(label)
        by_class.setdefault(number, []).append(Labelled(video, number))
    in_turn = (one for row in zip_longest(*by_class.values()) for one in row if one is not None)
    return list(in_turn)[:limit]


def _numbers(class_names: Sequence[str], num_classes: int) -> Callable[[str], int]:
    """A function from a label to its class number."""
    if class_names and len(class_names) != num_classes:
        raise InputError(f"the weights have {num_classes} classes and {len(class_names)} names were given")
    known = {_plain(name): at for at, name in enumerate(class_names)} or {str(at): at for at in range(num_classes)}

    def number(label: str) -> int:
        if (at := known.get(_plain(label))) is None:
            remedy = "give their names with --class-names" if not class_names else "rename it"
            what = "not a class of these weights" if class_names else f"not a class number below {num_classes}"
            raise InputError(f"label {label!r} is {what}; {remedy}")
        return at

    return number


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name.casefold()).strip()


def choose(
    weights: Weights,
    labelled: Sequence[Labelled],
    *,
    clips: int,
    device: str = "auto",
    threads: int | None = None,
    tell: Tell = lambda _: None,
) -> Choice:
    """Try every convention on `clips` uniformly spaced clips of each video; a video's scores are their mean.

    A video that cannot be decoded is reported and left out. InputError if no video is left, or the input is not RGB.
    """
    if weights.recipe.channels != 3:
        raise InputError(f"{weights.name} takes optical flow, which p3d does not compute from a video")
    decoded = list(_decoded(weights, labelled, clips, tell))
    if not decoded:
        raise InputError("none of the labelled videos could be decoded; give others")
    labels = np.array([one.label for one, _ in decoded])
    clips_NTHWC = np.concatenate([found for _, found in decoded])
    owners_N = np.repeat(np.arange(len(decoded)), [len(found) for _, found in decoded])
    trials = []
    conventions = list(product(GRAPHS, CHANNEL_ORDERS, RANGES))
    for at, (graph, order, value_range) in enumerate(conventions, start=1):
        tell(f"{at}/{len(conventions)}: graph {graph}, {order}, range {value_range}")
        tried = _in_convention(weights, graph, order, value_range)
        best_V = _best_classes(tried, clips_NTHWC, owners_N, device, threads)
        trials.append(Trial(graph, order, value_range, tuple((best_V == labels).tolist())))
    trials.sort(key=lambda trial: -trial.n_right)
    warnings = _warnings(trials, weights.config.num_classes)
    decided = not _by_chance(trials[0], len(trials), weights.config.num_classes)
    return Choice(tuple(trials), len(decoded), len(clips_NTHWC), warnings, decided)


def _decoded(
    weights: Weights, labelled: Sequence[Labelled], clips: int, tell: Tell
) -> Iterator[tuple[Labelled, UINT8]]:
    """Each video that can be decoded, with its clips: [N, T, H, W, 3] uint8."""
    sampling = Sampling("uniform", clips, weights.recipe.n_frames)
    for one in labelled:
        with tempfile.TemporaryDirectory(prefix="p3d-choose-") as scratch:
            frames: dict[int, UINT8] = {}
            for message in decode_in_child(
                one.video,
                frame_spec(weights.recipe),
                sampling,
                policy=DecodePolicy(),
                limits=DecodeLimits(),
                store_options=DEFAULTS,
                scratch=Path(scratch),
                timeout_s=VIDEO_TIMEOUT_S,
            ):
                match message:
                    case VideoInfo():
                        frames = {}
                    case FrameBlock():
                        frames.update(zip(message.numbers_N.tolist(), message.frames_NHWC, strict=True))
                    case Failure():
                        tell(f"left out: {one.video.path}: {message.reason}: {message.detail}")
                    case VideoEnd():
                        spans = clip_spans(sampling, message.n_frames)
                        numbers_NT = [frame_numbers(sampling, span, message.n_frames).tolist() for span in spans]
                        yield one, np.stack([[frames[number] for number in numbers_T] for numbers_T in numbers_NT])


def _in_convention(weights: Weights, graph: str, channel_order: str, value_range: int) -> Weights:
    """The same parameters under another convention."""
    return assemble(
        weights.origin,
        dataclasses.replace(weights.config, graph=graph),
        in_convention(weights.recipe, channel_order=channel_order, value_range=value_range),
        weights.network.state_dict(),
        origin=weights.origin,
    )


def _best_classes(
    weights: Weights, clips_NTHWC: UINT8, owners_N: np.ndarray, device: str, threads: int | None
) -> np.ndarray:
    """The class with the highest mean score of each video, [V] int64."""
    encoder = Encoder(weights, device=device, batch_size=default_batch(device_for(device).type), threads=threads)
    n_clips, n_frames = clips_NTHWC.shape[:2]
    index_NT = np.arange(n_clips * n_frames).reshape(n_clips, n_frames)
    _, probs_NK = encoder.encode(clips_NTHWC.reshape(-1, *clips_NTHWC.shape[2:]), index_NT, probs=True)
    sums_VK = np.zeros((owners_N[-1] + 1, probs_NK.shape[1]))
    np.add.at(sums_VK, owners_N, probs_NK)
    best_V: np.ndarray = sums_VK.argmax(axis=1)
    return best_V


def _by_chance(best: Trial, n_trials: int, num_classes: int) -> bool:
    """May the best of so many trials be no better than guessing?"""
    return n_trials * at_least(best.n_right, len(best.right), 1 / num_classes) >= SIGNIFICANT


def _warnings(trials: Sequence[Trial], num_classes: int) -> tuple[str, ...]:
    """Why the first trial may not be the right convention."""
    best, second = trials[:2]
    n = len(best.right)
    warnings = []
    if _by_chance(best, len(trials), num_classes):
        warnings.append(
            f"no convention is better than chance ({best.n_right} of {n} right at {num_classes} classes): check that "
            "the videos show classes of the weights, and that the class names are in their order"
        )
    elif (p := sign_test(best.right, second.right)) >= SIGNIFICANT:
        warnings.append(
            f"the best may be wrong: the second differs from it by chance with {p = :.2g}, on {n} videos; "
            "label more of them"
        )
    return tuple(warnings)


def sign_test(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided p-value that two equally good classifiers differ this much; videos where both agree do not count."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    n = only_first + only_second
    return min(1.0, 2 * at_least(max(only_first, only_second), n, 0.5))


def at_least(k: int, n: int, p: float) -> float:
    """The probability of k or more successes in n independent trials with probability p each."""
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))
