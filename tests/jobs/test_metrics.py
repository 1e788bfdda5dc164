"""The Prometheus metrics: their table, their sums, and the dashboard that shows them.

`tests/jobs/test_remote.py` compares them, read over a real endpoint, with the dataset.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest

from p3d.jobs.scheduler.loop import RayLoop
from p3d.jobs.scheduler.metrics import METRICS, PREFIX, Metrics, output_tag
from p3d.jobs.scheduler.run import _shown
from p3d.jobs.scheduler.run_snapshot import RunSnapshot, ShardCounts, VideoCounts, WorkerSnapshot
from p3d.jobs.scheduler.state import Checked, ShardDone, ShardTrouble, WorkerDied
from p3d.jobs.worker.actor import Spent
from p3d.jobs.worker.autoscale import LIMITS, Load
from p3d.pipeline.dataset.totals import ShardKey
from p3d.pipeline.errors import REASON_MEANING
from p3d.pipeline.extract import Progress
from tests.conftest import REPO

UNITS = ("seconds", "bytes", "videos", "clips", "shards", "workers", "troubles", "paused")
DASHBOARD = REPO / "deploy" / "grafana.json"


@dataclass
class Series:
    """A Ray metric that keeps its values, by the tags other than `output`."""

    values: dict[tuple[str, ...], float] = field(default_factory=lambda: defaultdict(float))

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0
        self.values[self._tags(tags)] += value

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[self._tags(tags)] = value

    def observe(self, value: float, tags: dict[str, str]) -> None:
        self.values[self._tags(tags)] += 1

    def _tags(self, tags: dict[str, str]) -> tuple[str, ...]:
        return tuple(value for name, value in tags.items() if name != "output")


def counted() -> tuple[Metrics, dict[str, dict[tuple[str, ...], float]]]:
    """Metrics, and the values that they have recorded so far."""
    metrics = Metrics("s3://bucket/run1")
    metrics.series = {name: Series() for name in metrics.series}
    return metrics, {name: series.values for name, series in metrics.series.items()}


def test_names_follow_prometheus_and_say_what_they_are() -> None:
    """`p3d_`, a base unit or what is counted, `_total` for counters alone; tags are closed sets, each described."""
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"p3d_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.name.removesuffix("_total").rpartition("_")[2] in UNITS, metric.name
        assert metric.meaning and set(metric.tags) <= {"reason", "stage", "kind", "state", "limit"}
        assert bool(metric.buckets) == (metric.kind == "histogram") and list(metric.buckets) == sorted(metric.buckets)


def test_an_error_in_metrics_log_or_progress_ends_no_run() -> None:
    """Each sink may fail at every call: the first error of each is said once, and nothing is raised."""

    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise UnicodeEncodeError("ascii", "café", 3, 4, "ordinal not in range")

    said: list[str] = []

    def say(sentence: str) -> None:
        said.append(sentence)
        raise BrokenPipeError

    def on_progress(snapshot: RunSnapshot) -> None:
        raise OSError(28, "No space left on device")

    loop: Any = object.__new__(RayLoop)
    loop.silent, loop.say, loop.on_progress, loop.metrics, loop.log = set(), say, on_progress, Broken(), Broken()
    for _ in range(3):
        loop._measure(lambda metrics: metrics.hear(WorkerDied(1, "")))
        loop._note("a sentence")
        loop._show(RunSnapshot(counter=1, state="running"))
    assert [re.sub(r" \(.*\)", "", sentence) for sentence in said] == [
        f"warning: the {sink} of this run cannot be kept; the run goes on" for sink in ("metrics", "log", "progress")
    ]


def test_a_progress_that_cannot_be_shown_ends_no_run() -> None:
    """An error when the view of a run opens is said, one when it closes is dropped; what the run raises stays."""
    said: list[str] = []

    @contextlib.contextmanager
    def broken(_: int, *, at_once: bool) -> Iterator[Any]:
        if at_once:
            raise OSError(5, "Input/output error")
        yield said.append
        raise OSError(5, "Input/output error")

    for at_once in (True, False):
        with _shown(partial(broken, at_once=at_once), 3, said.append) as on_progress:
            assert (on_progress is None) is at_once
    assert len(said) == 1 and "cannot be shown" in said[0]
    with pytest.raises(KeyError), _shown(lambda _: contextlib.nullcontext(), 3, said.append):
        raise KeyError


def test_updates_add_up_to_the_last_counters_however_often_and_late_they_come() -> None:
    """However often a driver reads the counters of a shard, the sums are those at its end. A late update, or one of a
    shard that was not begun, adds nothing. A shard that is begun again counts its work again."""
    seed = random.randrange(10**6)
    print(f"{seed = }")
    rng = random.Random(seed)
    metrics, said = counted()
    clips = waited_s = 0.0

    def look(shard: ShardKey, end: Progress, share: float) -> Progress:
        seen = Progress(clips=int(share * end.clips), wait_s=share * end.wait_s)
        metrics.look({shard: seen})
        return seen

    for at in range(50):
        shard, end = ShardKey(1, at), Progress(4, 0, rng.randint(1, 99), 9, 2.0, rng.random(), 0.0)
        if at % 2:  # lost with its worker after the last update
            metrics.begin(shard)
            lost = [look(shard, end, share) for share in sorted(rng.random() for _ in range(3))][-1]
            clips, waited_s = clips + lost.clips, waited_s + lost.wait_s
        metrics.begin(shard)
        for share in sorted(rng.random() for _ in range(at % 3)):
            look(shard, end, share)
        metrics.done(shard, Spent(end, 0.0, 1.0, 0.5, 3.0, 70, 100))
        clips, waited_s = clips + end.clips, waited_s + end.wait_s
        metrics.look({shard: end, ShardKey(2, at): end})
    assert said["p3d_encoded_clips_total"][()] == clips
    assert said["p3d_wait_seconds_total"][("frames",)] == pytest.approx(waited_s)
    assert ("device",) not in said["p3d_wait_seconds_total"]
    assert said["p3d_read_bytes_total"][()] == 50 * 70
    assert said["p3d_commit_seconds"][()] == 50 and said["p3d_written_bytes_total"][()] == 5000
    assert not metrics.seen


def test_events_of_the_scheduler_are_the_totals() -> None:
    """A shard that was found committed after its worker died counts like one that was reported. One that was not found
    counts nothing. Deaths and other errors are distinguished."""
    metrics, said = counted()
    key = ShardKey(1, 0)
    metrics.hear(ShardDone(0, key, 64, 800, (("truncated", 2), ("no_frames", 1))))
    metrics.hear(WorkerDied(0, "killed"))
    metrics.hear(Checked(key, True, 3, 0, (("truncated", 3),)))
    metrics.hear(Checked(key, False))
    metrics.hear(ShardTrouble(0, key, "outage", "no answer"))
    metrics.hear(ShardTrouble(0, key, "withdrawn", "not started"))
    assert (said["p3d_videos_total"][()], said["p3d_clips_total"][()], said["p3d_shards_total"][()]) == (67, 800, 2)
    assert said["p3d_failed_videos_total"] == {("truncated",): 5, ("no_frames",): 1}
    assert said["p3d_troubles_total"] == {("died",): 1, ("outage",): 1}


def test_gauges_show_the_snapshot_and_are_zero_at_the_end() -> None:
    """The gauges show the heartbeat. After the run nothing is queued, left or in progress."""
    metrics, said = counted()
    seen = [("busy", ("1/0", "1/1"), "network"), ("busy", ("1/2",), None), ("starting", (), None)]
    snapshot = RunSnapshot(
        counter=1,
        state="running",
        workers=tuple(
            WorkerSnapshot(worker=at, state=state, device="cpu", shards=shards, videos=0, clips=0, limit=limit)
            for at, (state, shards, limit) in enumerate(seen)
        ),
        shards=ShardCounts(all=9, done=4),
        videos=VideoCounts(all=90, done=41, failed=0),
        eta_s=12.5,
        outage="s3 does not answer",
    )
    metrics.show(snapshot)
    shown = {name: dict(values) for name, values in said.items() if values}
    assert shown == {
        "p3d_queued_shards": {(): 2},
        "p3d_working_shards": {(): 3},
        "p3d_left_videos": {(): 49},
        "p3d_workers": {("starting",): 1, ("idle",): 0, ("busy",): 2},
        "p3d_limited_workers": {("network",): 1, ("decoding",): 0, ("fetching",): 0, ("overhead",): 0},
        "p3d_eta_seconds": {(): 12.5},
        "p3d_paused": {(): 1},
    }
    metrics.show(replace(snapshot, eta_s=None))
    assert said["p3d_eta_seconds"][()] == 12.5
    metrics.show(replace(snapshot, state="stopped", eta_s=None))
    assert not any(value for values in said.values() for value in values.values())


def test_an_outputs_tag_is_readable_bounded_and_unique() -> None:
    """The last part of the URL and a digest of all of it; odd bytes and long names are handled."""
    tags = [output_tag(url) for url in ("s3://a/run1", "s3://b/run1", "/x/" + "é" * 200, "/x/\udcff{}\n", "/")]
    assert len(set(tags)) == len(tags) and tags[0].startswith("run1-")
    assert all(re.fullmatch(r"[\w.-]{9,49}", tag) for tag in tags), tags


def queries(dashboard: dict[str, Any]) -> list[str]:
    """Every query of a dashboard, including those of its variables."""
    variables = [one for one in dashboard["templating"]["list"] if one["type"] == "query"]
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return shown + [one["query"]["query"] for one in variables]


def exported_names() -> set[str]:
    """The names as Prometheus sees them: a histogram has three."""
    names = set()
    for metric in METRICS:
        ends = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        names |= {f"{PREFIX}{metric.name}{end}" for end in ends}
    return names


def test_the_dashboard_shows_every_number_and_no_other() -> None:
    """Each name in its queries is exported, with the tags it is grouped by; each metric of the table is in a query."""
    text = "\n".join(queries(json.loads(DASHBOARD.read_text())))
    used = set(re.findall(r"\bray_\w+", text))
    assert used <= exported_names(), used - exported_names()
    assert {metric.name for metric in METRICS if not any(metric.name in name for name in used)} == set()
    tags = {tag for metric in METRICS for tag in metric.tags} | {"output", "le"}
    grouped = re.findall(r"(?:by|on|ignoring) ?\(([\w, ]+)\)", text)
    assert len(grouped) > 5 and {tag for found in grouped for tag in found.split(", ")} <= tags


def test_grafana_can_import_the_dashboard() -> None:
    """The requirements of Grafana's import: a title, unique ids, cells in the grid of 24 columns that do not overlap,
    the data source by its variable, a unit."""
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["title"] and dashboard["uid"] and dashboard["id"] is None and dashboard["schemaVersion"] >= 36
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
        assert panel["title"] and panel["description"] and panel["targets"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}
        assert all('output=~"$output"' in target["expr"] for target in panel["targets"])
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "output"]


def test_every_limit_that_a_worker_can_have_is_shown() -> None:
    """`Load.limit` is one of LIMITS, whatever the shares are."""
    shares = [0.0, 0.5, 1.0]
    said = {Load(*load).limit for load in itertools.product(shares, repeat=3)}
    assert said == set(LIMITS)


def test_reasons_are_a_closed_set() -> None:
    """The only tag whose values come from videos has at most as many values as there are reasons."""
    assert 5 < len(REASON_MEANING) < 50
