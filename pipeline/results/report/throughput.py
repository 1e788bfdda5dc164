"""What a report shows of the runs of a job: machines and settings, throughput over time, and what took the time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from p3d.pipeline.dataset.shard_times import ShardTime
from p3d.pipeline.results.report.facts import Bar

BINS = 100  # of the plot of throughput


@dataclass(frozen=True, slots=True)
class Machine:
    """One host of a job and what it did."""

    host: str
    devices: str
    settings: str
    workers: int
    shards: int
    videos: int
    clips: int
    busy_s: float


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One launch or resume, as recorded in its epoch."""

    number: int
    started: str
    host: str
    state: str
    options: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Throughput:
    """Clips per second in BINS equal intervals of [began_s, ended_s), which are seconds since 1970."""

    began_s: float
    ended_s: float
    clips_per_s: tuple[float, ...]
    mean: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """Sums over all shards of a job. `stages` divides the shards' time; a worker may compute several shards at once.

    `network_share` is the share of network time in the time in which workers had a shard. `idle_share` is the share
    of time without a shard between the start of a worker's first shard and the end of its last. Both are in [0, 1].
    """

    throughput: Throughput
    stages: tuple[Bar, ...]
    network_share: float
    idle_share: float
    machines: tuple[Machine, ...]


@dataclass(frozen=True, slots=True)
class RunFacts:
    """How the rows were made. `trouble` is an error message if the footers could not be read, else empty."""

    state: str
    sentence: str
    runs: tuple[RunRecord, ...]
    software: tuple[tuple[str, str], ...]
    timeline: Timeline | None
    trouble: str = ""


def timeline(shards: list[ShardTime]) -> Timeline | None:
    """Sums over shards; None without shards. The clocks of several machines are not corrected."""
    if not shards:
        return None
    workers: dict[tuple[str, int], list[ShardTime]] = {}
    hosts: dict[str, list[ShardTime]] = {}
    for shard in shards:
        workers.setdefault((shard.host, shard.pid), []).append(shard)
        hosts.setdefault(shard.host, []).append(shard)
    present_s = sum(max(one.ended_s for one in of) - min(one.began_s for one in of) for of in workers.values())
    covered_s = sum(_covered_s(of) for of in workers.values())
    shard_s = sum(one.shard_s for one in shards)
    wait_s, full_s = sum(one.wait_s for one in shards), sum(one.full_s for one in shards)
    stages = {
        "waiting for frames (fetch and decode)": wait_s,
        "waiting for the network": full_s,
        "gathering frames and rows": max(0.0, shard_s - wait_s - full_s),
    }
    whole_s = sum(stages.values()) or 1.0
    return Timeline(
        throughput(shards),
        tuple(Bar(name, seconds, f"{seconds / whole_s:.0%}") for name, seconds in stages.items()),
        min(1.0, sum(one.encode_s for one in shards) / (covered_s or 1.0)),
        max(0.0, 1 - covered_s / present_s) if present_s else 0.0,
        tuple(_machine(host, of) for host, of in hosts.items()),
    )


def _covered_s(of: list[ShardTime]) -> float:
    """The time in seconds in which a worker had at least one shard."""
    covered_s, until_s = 0.0, -np.inf
    for one in sorted(of, key=lambda one: one.began_s):
        covered_s += max(0.0, one.ended_s - max(one.began_s, until_s))
        until_s = max(until_s, one.ended_s)
    return covered_s


def throughput(shards: list[ShardTime]) -> Throughput:
    """Throughput, with the clips of each shard spread evenly over the time in which it was computed."""
    began_s, ended_s = min(one.began_s for one in shards), max(one.ended_s for one in shards)
    step_s = max(ended_s - began_s, 1e-3) / BINS
    edges = began_s + step_s * np.arange(BINS + 1)
    sums = np.zeros(BINS)
    for one in shards:
        first = min(BINS - 1, max(0, int((one.began_s - began_s) / step_s)))
        last = min(BINS - 1, int((one.ended_s - began_s) / step_s))
        at = slice(first, last + 1)
        inside_s = np.minimum(edges[first + 1 : last + 2], one.ended_s) - np.maximum(edges[at], one.began_s)
        inside_s = np.maximum(inside_s, 0)
        total = inside_s.sum()
        sums[at] += one.clips * (inside_s / total if total > 0 else 1 / len(inside_s))
    clips = sum(one.clips for one in shards)
    return Throughput(began_s, began_s + BINS * step_s, tuple((sums / step_s).tolist()), clips / (BINS * step_s))


def _machine(host: str, of: list[ShardTime]) -> Machine:
    return Machine(
        host=host,
        devices=_listed(one.device for one in of),
        settings=_listed(one.settings for one in of),
        workers=len({one.pid for one in of}),
        shards=len(of),
        videos=sum(one.videos for one in of),
        clips=sum(one.clips for one in of),
        busy_s=sum(one.ended_s - one.began_s for one in of),
    )


def _listed(words: Iterable[str], most: int = 8) -> str:
    """The distinct words, sorted, at most `most` of them."""
    found = sorted(set(words))
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
