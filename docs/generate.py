"""Write docs/reference.md and the generated parts of other pages of docs from the code.

python docs/generate.py          rewrite
python docs/generate.py --check  exit 1 if a file is out of date
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import p3d  # noqa: E402 - after the path
from p3d import zoo  # noqa: E402
from p3d.jobs.api.moves import Relocated  # noqa: E402 - after the path
from p3d.jobs.cli import VERBS, Verbs, cli  # noqa: E402 - after the path
from p3d.jobs.cli.output import EXIT_CODES  # noqa: E402
from p3d.jobs.monitor.status import Status  # noqa: E402
from p3d.jobs.scheduler.metrics import METRICS, PREFIX  # noqa: E402
from p3d.jobs.scheduler.run_snapshot import RunSnapshot, WorkerSnapshot  # noqa: E402
from p3d.pipeline.clips.pool import POOLS  # noqa: E402
from p3d.pipeline.dataset import schema  # noqa: E402
from p3d.pipeline.dataset.columns import FAILURES, Column  # noqa: E402
from p3d.pipeline.errors import REASON_MEANING  # noqa: E402
from p3d.pipeline.recipe import Recipe  # noqa: E402
from p3d.pipeline.results.search.exact import Hit, SearchResult  # noqa: E402
from tests.faults import FAULTS, UNTESTED, shown_by  # noqa: E402


def markdown_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def exit_codes() -> str:
    return markdown_table(("code", "meaning"), [(str(code), text) for code, text in EXIT_CODES.items()])


def reasons() -> str:
    return markdown_table(("reason", "meaning"), [(f"`{reason}`", text) for reason, text in REASON_MEANING.items()])


EXAMPLE = Recipe(
    model="p3d63",
    graph="caffe",
    weights_sha256="0" * 64,
    feature_dim=2048,
    clip_frames=16,
    resize_hw=(182, 242),
    short_side=None,
    crop_hw=(160, 160),
    pool=POOLS[-1],
    num_classes=400,
    scores=True,
)


def columns() -> str:
    tables = {
        "clips": schema.clips_columns(EXAMPLE),
        "videos": schema.videos_columns(EXAMPLE),
        "failures": FAILURES,
    }
    head = ("column", "type", "unit", "meaning")
    return "\n\n".join(
        f"### {name}/\n\n" + markdown_table(head, [(f"`{c.name}`", _type(c), c.unit, _meaning(c)) for c in found])
        for name, found in tables.items()
    )


def _type(column: Column) -> str:
    text = str(column.type).replace("element: float not null", "float32")
    return f"`{text}`" + (", or null" if column.nullable else "")


def _meaning(column: Column) -> str:
    if column.since == 1:
        return column.meaning
    return f"{column.meaning} (since schema version {column.since}; in older rows `{json.dumps(column.before)}`)"


def metrics() -> str:
    rows = [
        (f"`{PREFIX}{one.name}`", one.kind, " ".join(f"`{tag}`" for tag in one.tags), one.meaning) for one in METRICS
    ]
    return markdown_table(("name", "kind", "tags", "meaning"), rows)


# network, classes and the values of the P3D paper: MB, result (top-1 on UCF101 of table 1, video hit@1 on Sports-1M
# of table 2 and figure 1), speed on its GPU (table 1). 261 MB is from memory of the figure and was not verified.
PAPER = (
    ("resnet50", 101, "92", "80.8 UCF101", "15.0 frames/s"),
    ("p3d63-a", 101, "98", "83.7 UCF101", "9.0 clips/s"),
    ("p3d63-b", 101, "98", "82.8 UCF101", "8.8 clips/s"),
    ("p3d63-c", 101, "98", "83.0 UCF101", "8.6 clips/s"),
    ("p3d63", 101, "98", "84.2 UCF101", "8.8 clips/s"),
    ("p3d199", 487, "261?", "66.4 Sports-1M", ""),
    ("resnet152", 487, "235", "64.6 Sports-1M", ""),
    ("c3d", 487, "321", "61.1 Sports-1M", ""),
    ("deepvideo-single", 487, "", "59.3 Sports-1M", ""),
    ("deepvideo-slow", 487, "", "60.9 Sports-1M", ""),
    ("convpool", 487, "", "72.3 Sports-1M", ""),
    ("resnet50-lstm", 487, "", "", ""),
    ("resnet50-3d", 487, "", "", ""),
    ("resnet152-3d", 487, "", "", ""),
    ("p3d-demo", 8, "", "", ""),
)


def networks() -> str:
    head = ("network", "layers", "parameters", "MB", "MiB", "paper: MB", "result", "speed", "GMAC", "features", "clip")
    rows = []
    for name, classes, *paper in PAPER:
        one = zoo.describe(name, num_classes=classes)
        size = (f"{one.size_mb:.0f}", f"{one.size_mb * 1e6 / 2**20:.0f}")
        clip = "x".join(map(str, (one.n_frames, *one.crop_hw)))
        cost = (f"{one.gmacs:.1f}", str(one.feature_dim), clip)
        rows.append((f"`{name}`", str(one.layers), f"{one.params:,}", *size, *paper, *cost))
    return markdown_table(head, rows)


def help_of(path: str) -> str:
    """The help of a verb, such as `launch` or `results snapshot`."""
    context, command = click.Context(cli, info_name="p3d", max_content_width=90, terminal_width=90), cli
    for name in path.split():
        command = command.get_command(context, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=context, max_content_width=90, terminal_width=90)
    return f"### p3d {path}\n\n```\n{command.get_help(context)}\n```"


def paths(verbs: Verbs, before: str = "") -> Iterator[str]:
    """Every verb in order; the verbs of a group follow it."""
    for name, (where, _) in verbs.items():
        yield before + name
        if not isinstance(where, str):
            yield from paths(where, f"{before}{name} ")


def reference() -> str:
    return "\n\n".join(
        [
            "# Reference",
            "Generated from the code by `make docs`; a test fails when it is out of date.",
            "## Verbs",
            *map(help_of, paths(VERBS)),
            "## Exit codes",
            exit_codes(),
            "## Failure reasons",
            "The closed set of `failures.reason`.",
            reasons(),
            "## Columns",
            "`videos/` also has the user's own columns of a list. `embedding_max` exists only with "
            "`--pool mean+max`, and `probs` only with `--scores`, here with 400 classes.",
            columns(),
            "## Metrics",
            "What Prometheus scrapes from the driver's node during a run ([cluster.md](cluster.md)). Each metric also "
            "has the tag `output`: the last component of OUT and 8 hex digits of a hash of its URL. Histograms have "
            "`_bucket`, `_count` and `_sum`; Ray exports only buckets, so `_sum` is an estimate.",
            metrics(),
            "",
        ]
    )


# what the functions of the Python API return or pass to a callback
RECORDS = (p3d.Dataset, Status, RunSnapshot, WorkerSnapshot, p3d.EmbeddedVideo, SearchResult, Hit, Relocated)


def api() -> str:
    """The docstrings of the Python API: functions first, then the records that they return."""
    every = {name: getattr(p3d, name) for name in p3d.API}
    functions = [_function(f"p3d.{name}", one) for name, one in every.items() if inspect.isfunction(one)]
    records = [_record(one) for one in RECORDS]
    return "\n\n".join([*functions, *records])


def _function(name: str, function: Any, level: str = "###") -> str:
    signature, shown = inspect.signature(function), list[str]()
    for one in signature.parameters.values():
        if one.kind is one.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        if one.name != "self":
            default = "" if one.default is one.empty else f" = {one.default!r}"
            shown.append(f"{one.name}: {one.annotation}{default}")
    line = f"{name}({', '.join(shown)}) -> {signature.return_annotation}"
    if len(line) > 100:
        line = "\n".join([f"{name}(", *(f"    {one}," for one in shown), f") -> {signature.return_annotation}"])
    return f"{level} {name}\n\n```\n{line}\n```\n\n{inspect.getdoc(function)}"


def _record(record: type) -> str:
    parts = [f"### {record.__name__}", str(inspect.getdoc(record))]
    if record is not p3d.Dataset:
        return "\n\n".join([*parts, "\n".join(f"- `{one.name}`: `{one.type}`" for one in dataclasses.fields(record))])
    public = {name: one for name, one in vars(record).items() if not name.startswith("_")}
    held = [f"- `{name}`: {inspect.getdoc(one)}" for name, one in public.items() if isinstance(one, property)]
    methods = [_function(name, one, "####") for name, one in public.items() if inspect.isfunction(one)]
    return "\n\n".join([*parts, "\n".join(held), *methods])


def faults() -> str:
    tests = shown_by()
    rows = [(str(row), title, UNTESTED.get(row) or "<br>".join(_short(tests[row]))) for row, title in FAULTS.items()]
    return markdown_table(("", "fault", "shown by"), rows)


def _short(names: list[str]) -> list[str]:
    """The first three names, and the number of others."""
    shown = [f"`{name}`" for name in names[:3]]
    return shown if len(names) <= 3 else [*shown, f"and {len(names) - 3} more"]


def with_blocks(text: str, **blocks: str) -> str:
    """The text with its generated blocks replaced. Exits if a block is missing or repeated."""
    for name, content in blocks.items():
        shown = name.replace("_", " ")
        pattern = rf"(<!-- generated: {shown} -->\n).*?(\n<!-- end -->)"
        text, count = re.subn(pattern, lambda found, content=content: found[1] + content + found[2], text, flags=re.S)
        if count != 1:
            raise SystemExit(f"the file needs exactly one block '<!-- generated: {shown} -->'")
    return text


def main() -> int:
    docs = ROOT / "docs"
    wanted = {
        docs / "reference.md": reference(),
        docs / "reliability.md": with_blocks((docs / "reliability.md").read_text(), faults=faults()),
        docs / "reference" / "api.md": with_blocks((docs / "reference" / "api.md").read_text(), api=api()),
        docs / "networks.md": with_blocks((docs / "networks.md").read_text(), networks=networks()),
    }
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            click.echo(f"{path.relative_to(ROOT)} is out of date: run `make docs`", err=True)
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
