"""Write the generated pages of docs, and the generated parts of other pages, from the code.

python docs/generate.py          rewrite
python docs/generate.py --check  exit 1 if a file is out of date
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import p3d  # noqa: E402 - after the path
from docs.json_outputs import ANSWERS, fields_of  # noqa: E402
from p3d import zoo  # noqa: E402
from p3d.jobs.api.moves import Relocated  # noqa: E402 - after the path
from p3d.jobs.cli import STORES_VERB, VERBS, Verbs, cli  # noqa: E402 - after the path
from p3d.jobs.cli.output import EXIT_CODES, EXIT_REMEDY, exit_code  # noqa: E402
from p3d.jobs.monitor.status import Status  # noqa: E402
from p3d.jobs.scheduler.metrics import METRICS, PREFIX  # noqa: E402
from p3d.jobs.scheduler.run_snapshot import RunSnapshot, WorkerSnapshot  # noqa: E402
from p3d.pipeline.clips.pool import POOLS  # noqa: E402
from p3d.pipeline.dataset import schema  # noqa: E402
from p3d.pipeline.dataset.columns import FAILURES, Column  # noqa: E402
from p3d.pipeline.errors import REASON_MEANING, REASON_REMEDY, STORE_REMEDY, TRAINING_REMEDY  # noqa: E402
from p3d.pipeline.recipe import Recipe  # noqa: E402
from p3d.pipeline.results.search.exact import Hit, SearchResult  # noqa: E402
from tests.faults import FAULTS, UNTESTED, shown_by  # noqa: E402


def markdown_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
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


GENERATED = "Generated from the code by `make docs`; a test fails when it is out of date."
S3_HEADING = "\nS3:\n"  # the heading of the store options in the help of a verb; it comes last


def context_of(path: str) -> tuple[click.Context, click.Command]:
    """A verb, such as `launch` or `results snapshot`, and the context that its help needs."""
    command: click.Command = cli
    context = click.Context(cli, info_name="p3d", max_content_width=90, terminal_width=90)
    for name in path.split():
        assert isinstance(command, click.Group)
        found = command.get_command(context, name)
        assert found is not None
        command = found
        context = click.Context(command, info_name=name, parent=context, max_content_width=90, terminal_width=90)
    return context, command


def help_of(path: str) -> str:
    """The help of a verb, without the store options, which `store_help` has once."""
    context, command = context_of(path)
    text, heading, _ = command.get_help(context).partition(S3_HEADING)
    after = "\n\nIt also takes the [store options](#store-options)." if heading else ""
    return f"### p3d {path}\n\n```text\n{text.rstrip()}\n```{after}"


def store_help() -> str:
    context, command = context_of(STORES_VERB)
    return f"```text\n{textwrap.dedent(command.get_help(context).partition(S3_HEADING)[2]).rstrip()}\n```"


def paths(verbs: Verbs, before: str = "") -> Iterator[str]:
    """Every verb in order; the verbs of a group follow it."""
    for name, (where, _) in verbs.items():
        yield before + name
        if not isinstance(where, str):
            yield from paths(where, f"{before}{name} ")


def page(title: str, reader: str, *parts: str) -> str:
    """A generated page; its first line says who it is for."""
    return "\n\n".join([f"# {title}", f"For {reader} {GENERATED}", *parts, ""])


def command_line() -> str:
    return page(
        "Command line",
        "anyone who looks up a command or an option of `p3d`.",
        "Related pages: [exit codes](exit-codes.md), [`--json`](json.md), [environment variables](environment.md).",
        "## Store options",
        "Most verbs read or write S3 and take these options. `p3d launch --help` shows them.",
        store_help(),
        "## Verbs",
        *map(help_of, paths(VERBS)),
    )


def exit_code_page() -> str:
    return page(
        "Exit codes",
        "scripts and schedulers that call `p3d`.",
        exit_codes(),
        "[Troubleshooting](../troubleshooting.md#exit-codes) says what to do after each of them.",
    )


def reason_page() -> str:
    return page(
        "Failure reasons",
        "anyone who finds a video in `failures/` and asks why.",
        "A video without rows has exactly one of these reasons. The set is closed. "
        "[Troubleshooting](../troubleshooting.md#videos-that-failed) says what to do about each.",
        reasons(),
    )


def column_page() -> str:
    return page(
        "Columns",
        "anyone who reads the Parquet files of an output.",
        "`videos/` also has the user's own columns of a list. `embedding_max` exists only with `--pool mean+max`, and "
        "`probs` only with `--scores`. The types below are those of a network with 2048 features and 400 classes. "
        "The columns of `plans/` are in [the format](format.md#plans), the files of a training in "
        "[train](../how-to/train.md#what-is-in-out).",
        columns(),
    )


def metric_page() -> str:
    return page(
        "Metrics",
        "anyone who watches jobs with Prometheus.",
        "Prometheus scrapes these from the driver's node during a run ([how to](../how-to/monitoring.md)). Each metric "
        "also has the tag `output`: the last component of OUT and 8 hex digits of a hash of its URL. Histograms have "
        "`_bucket`, `_count` and `_sum`. Ray exports only buckets, so `_sum` is an estimate.",
        metrics(),
    )


def json_page() -> str:
    return page(
        "`--json` outputs",
        "scripts that read what a verb prints with `--json`.",
        "Each verb prints one JSON object on stdout. It has `schema_version`, which is 1, and the keys below. Messages "
        "go to stderr. Later versions may add keys. Text is ASCII without control characters.",
        "`hits[].path` is the key `path` of each item of the list `hits`. A path that ends in `?` is not always there.",
        *answers(),
    )


def answers() -> Iterator[str]:
    """One section for each object: its keys, and the records in it with their docstrings, each record once."""
    shown: dict[type, str] = {Recipe: "[recipe](format.md#jobjson)"}
    for answer in ANSWERS:
        yield f"## {', '.join(f'`{verb}`' for verb in answer.verbs)}"
        yield answer.text
        if answer.keys:
            rows = [(f"`{path}`", kind, text) for path, (kind, text) in answer.keys.items()]
            yield markdown_table(("key", "type", "meaning"), rows)
        for prefix, record in answer.records.items():
            where = f"`{prefix}`: " if prefix else ""
            if record in shown:
                yield f"{where}the same keys as {shown[record]}."
                continue
            shown[record] = f"`{prefix or answer.verbs[0]}` above"
            yield where + str(inspect.getdoc(record))
            yield "\n".join(f"- `{path}`: {kind}" for path, kind in fields_of(record, prefix, answer.without))


def troubleshooting() -> str:
    failed = [(f"`{one}`", REASON_MEANING[one], REASON_REMEDY[one], TRAINING_REMEDY[one]) for one in REASON_MEANING]
    codes = [(str(code), text, EXIT_REMEDY[code]) for code, text in EXIT_CODES.items()]
    stores = [
        (f"`{one.__name__}`", " ".join(str(inspect.getdoc(one)).split()), f"{exit_code(one(''))}", remedy)
        for one, remedy in STORE_REMEDY.items()
    ]
    return page(
        "Troubleshooting",
        "anyone whose video, command or store has failed.",
        "A message of `p3d` says what happened, to which file, and what to do. This page has the same advice by cause. "
        "`p3d failures OUT` lists the videos that failed, and `p3d jobs logs OUT` prints the log of a run.",
        "## Videos that failed",
        "The reason is in `failures/`, and `p3d failures OUT` prints it. After a repair, `p3d retry OUT` reads the "
        "failed videos again. A training skips such a video.",
        markdown_table(("reason", "meaning", "what to do", "in a training"), failed),
        "## Exit codes",
        markdown_table(("code", "meaning", "what to do"), codes),
        "## Errors of a store",
        "A store is a folder or S3. The class is that of the exception in Python (`p3d.pipeline.errors`). "
        "[S3](how-to/s3.md) has the permissions and options.",
        markdown_table(("class", "meaning", "exit code", "what to do"), stores),
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
        docs / "troubleshooting.md": troubleshooting(),
        docs / "reference" / "cli.md": command_line(),
        docs / "reference" / "exit-codes.md": exit_code_page(),
        docs / "reference" / "failure-reasons.md": reason_page(),
        docs / "reference" / "columns.md": column_page(),
        docs / "reference" / "metrics.md": metric_page(),
        docs / "reference" / "json.md": json_page(),
    }
    parts = {
        docs / "explanation" / "reliability.md": {"faults": faults()},
        docs / "reference" / "api.md": {"api": api()},
        docs / "explanation" / "networks.md": {"networks": networks()},
    }
    wanted |= {path: with_blocks(path.read_text(), **blocks) for path, blocks in parts.items()}
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
