"""A bench's clip rule in one word, RULE or RULE/STEP: `every:48/3` is `--clips every:48 --frame-step 3`."""

from __future__ import annotations

from p3d.pipeline.clips.rules import Sampling, parse_sampling


def sampling_of(word: str, clip_frames: int) -> Sampling:
    """For clips of so many frames."""
    rule, _, step = word.partition("/")
    return parse_sampling(rule, clip_frames=clip_frames, frame_step=int(step or 1))


def options_of(word: str) -> tuple[str, ...]:
    """The same for a command line of P3D."""
    rule, _, step = word.partition("/")
    return ("--clips", rule, "--frame-step", step or "1")
