"""A Report -> one HTML file, by the template page.html in this folder."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field

from markupsafe import Markup

from p3d.pipeline.decode.thumbnail import Thumbnail
from p3d.pipeline.recipe import JobRecord
from p3d.pipeline.results.report.facts import Facts, Sampled, largest
from p3d.pipeline.results.report.neighbours import Neighbours
from p3d.pipeline.results.report.pictures import Pictures
from p3d.pipeline.results.report.template import human_time, page_environment
from p3d.pipeline.results.report.throughput import RunFacts, Throughput

PLOT_WIDTH, PLOT_HEIGHT, PLOT_LEFT = 400, 170, 44  # of the throughput plot, in SVG units


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the page shows. `run` is None for a snapshot and for several outputs.

    `states` are those of several outputs, in the order of `facts.outputs`, and empty for one. `names` has a short name
    for the url of each.
    """

    out: str
    made: str
    job: JobRecord
    plans: tuple[tuple[str, str], ...]
    run: RunFacts | None
    facts: Facts
    neighbours: Neighbours
    pictures: Pictures
    seed: int
    states: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def n_pictures(self) -> int:
        """Thumbnails that could be made."""
        return sum(isinstance(one, Thumbnail) for one in self.pictures.values())


def render(report: Report) -> str:
    """The HTML page. It has the size of the thumbnails plus some 60 kB, whatever the size of the dataset."""
    environment = page_environment()
    environment.filters.update(uri=data_uri)
    environment.globals.update(largest=largest)
    return environment.get_template("page.html").render(
        report=report,
        run=report.run,
        facts=report.facts,
        recipe=recipe_rows(report.job),
        plot=None if report.run is None or report.run.timeline is None else plot(report.run.timeline.throughput),
        picture=lambda video, at_s: _picture(report.pictures, video, at_s),
    )


def recipe_rows(job: JobRecord) -> list[tuple[str, str]]:
    """(name, value) of each setting that determines the vectors, as text."""
    recipe = job.recipe
    height, width = recipe.crop_hw
    resize = f"{recipe.resize_hw[0]} x {recipe.resize_hw[1]}" if recipe.resize_hw else f"short side {recipe.short_side}"
    return [
        ("network", f"{recipe.model} (graph {recipe.graph})"),
        ("weights", job.weights_origin),
        ("weights sha256", recipe.weights_sha256),
        ("features", f"{recipe.feature_dim} {recipe.embedding_dtype}, pooled by {recipe.pool}"),
        ("clips", f"{recipe.clips} of {recipe.clip_frames} frames, frame step {recipe.frame_step}"),
        ("frame rate", "the video's own" if recipe.fps is None else f"resampled to {recipe.fps:g} per second"),
        ("frames", f"resized to {resize}, middle {height} x {width} (height x width)"),
        ("decoder", f"{recipe.decoder}, damaged videos: {recipe.partial}"),
        ("precision", recipe.precision),
        ("scores", f"{recipe.num_classes} classes" if recipe.scores else "not stored"),
        ("recipe digest", recipe.digest),
    ]


@dataclass(frozen=True, slots=True)
class Plot:
    """A filled line in units of PLOT_WIDTH x PLOT_HEIGHT, and the ticks of its axes: (position, text)."""

    path: Markup
    mean_y: float
    y_ticks: tuple[tuple[float, str], ...]
    x_ticks: tuple[tuple[float, str], ...]
    table: tuple[tuple[str, str], ...]


def plot(of: Throughput) -> Plot:
    """The throughput as a step plot, one step per bin. The table has one row per tenth of the time."""
    bins = of.clips_per_s
    top = _round_up(max(bins) or 1.0)
    step, bottom = (PLOT_WIDTH - PLOT_LEFT - 8) / len(bins), PLOT_HEIGHT - 24

    def y(value: float) -> float:
        return round(bottom - (bottom - 8) * value / top, 1)

    corners = [f"M{PLOT_LEFT} {bottom}"]
    for at, value in enumerate(bins):
        corners.append(f"V{y(value)}H{PLOT_LEFT + step * (at + 1):.1f}")
    length_s = of.ended_s - of.began_s
    tenth = max(1, len(bins) // 10)
    return Plot(
        path=Markup("".join(corners) + f"V{bottom}Z"),
        mean_y=y(of.mean),
        y_ticks=tuple((y(value), f"{value:g}") for value in (0, top / 2, top)),
        x_ticks=tuple(
            (PLOT_LEFT + step * len(bins) * share, human_time(length_s * share)) for share in (0, 1 / 3, 2 / 3, 1)
        ),
        table=tuple(
            (
                f"{human_time(length_s * at / len(bins))} to {human_time(length_s * (at + tenth) / len(bins))}",
                f"{sum(bins[at : at + tenth]) / len(bins[at : at + tenth]):.2f}",
            )
            for at in range(0, len(bins), tenth)
        ),
    )


def _round_up(value: float) -> float:
    """The smallest 1, 2, 4, 5 or 10 times a power of ten that is at least `value`."""
    power = 1.0
    while power * 10 <= value:
        power *= 10
    while power > value:
        power /= 10
    return next(power * step for step in (1, 2, 4, 5, 10) if power * step >= value)


def data_uri(picture: Thumbnail) -> Markup:
    """The picture as a data URI, for an `src`: base64 needs no escaping."""
    return Markup("data:image/jpeg;base64,") + Markup(base64.b64encode(picture.jpeg).decode())


def _picture(pictures: Pictures, video: Sampled, at_s: float) -> Thumbnail | str:
    """A thumbnail, or the reason why it is missing."""
    return pictures.get((video.key, at_s), "no picture was requested")
