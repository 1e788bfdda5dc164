"""The command line. Every verb is a module that loads when it is called, so that `p3d --help` answers at once.

stdout is data, stderr is output. A user's mistake is one sentence and an exit code from the table in `cli.output`.
"""

from __future__ import annotations

import builtins
import importlib
import sys
from collections.abc import Mapping
from keyword import iskeyword
from typing import Any, TypeAlias

import click

# verb -> (module, one line of help); a group of verbs has their table for a module. No help may import a verb.
Verbs: TypeAlias = "Mapping[str, tuple[str | Verbs, str]]"

RESULTS: Verbs = {
    "index": ("index", "An index for `p3d search --index`, beside the dataset."),
    "dedup": ("dedup", "Near-duplicate videos, in clusters, with the evidence."),
    "evaluate": ("evaluate", "Hit rates of the scores, or of a linear SVM, against labels."),
    "report": ("report", "What a job did, as one HTML file."),
    "serve": ("serve", "A page on this machine: search, play, drop a file, a map."),
    "snapshot": ("results", "A clean, verified copy: newest rows only, in large files."),
}
CLUSTER: Verbs = {
    "check": ("cluster", "Ask every node whether it could do its part of a job."),
}
JOBS: Verbs = {
    "list": ("jobs", "The jobs in a folder or below an S3 prefix."),
    "logs": ("jobs", "What happened in a run."),
    "trace": ("jobs", "A job's timeline, for a trace viewer."),
}
WEIGHTS: Verbs = {
    "import": ("weights", "Weights of any known format -> one file that says what it is."),
    "show": ("weights", "What a weights file is, and what its numbers say of it."),
    "choose": ("choose", "Find a file's graph, channel order and range by labelled videos."),
}
VERBS: Verbs = {
    "plan": ("plan", "Say what a launch would do; writes nothing."),
    "launch": ("launch", "Embed the videos of SRC into OUT."),
    "resume": ("launch", "Go on with the job at OUT."),
    "retry": ("retry", "Try the failed videos of OUT once more."),
    "status": ("status", "How far the job at OUT is; needs no Ray."),
    "cancel": ("status", "Ask the run at OUT to stop, resumable."),
    "failures": ("dataset", "The videos that have no rows, and why."),
    "verify": ("dataset", "Check every file of OUT against its plans."),
    "search": ("search", "What in OUT is like a video, or like one second of it."),
    "models": ("models", "The networks that are here."),
    "weights": (WEIGHTS, "What a network's numbers come from."),
    "jobs": (JOBS, "Jobs, running or long past."),
    "cluster": (CLUSTER, "What a job would run on."),
    "results": (RESULTS, "What is made from the rows of OUT."),
}


class LazyGroup(click.Group):
    """A click group made from a table of verbs, which are imported when they are needed."""

    def __init__(self, name: str | None = None, *, verbs: Verbs, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.verbs:
            return None
        where, line = self.verbs[cmd_name]
        if not isinstance(where, str):
            return LazyGroup(cmd_name, verbs=where, help=line)
        attribute = f"{cmd_name}_" if iskeyword(cmd_name) or hasattr(builtins, cmd_name) else cmd_name
        command: click.Command = getattr(importlib.import_module(f"p3d.jobs.cli.{where}"), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, text) for name, (_, text) in self.verbs.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(f"{error.message} The verbs are {', '.join(self.verbs)}.", ctx) from None


@click.group(
    cls=LazyGroup, verbs=VERBS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="p3d-embeddings", prog_name="p3d")
def cli() -> None:
    """Turn a video archive into embeddings: P3D ResNet on Ray, rows in Parquet, nothing lost.

    \b
      p3d plan   videos/ out/ --weights FILE    what would be done
      p3d launch videos/ out/ --weights FILE    do it; Ctrl-C is safe
      p3d status out/ --watch                   from anywhere
      p3d resume out/                           after a kill or an outage

    SRC is a folder, a video, a .txt, .csv or .parquet list, or s3://bucket/prefix. OUT is a folder or
    s3://bucket/prefix, and is all there is to a job: every other verb takes it alone.
    """


def main() -> None:
    """The console script."""
    from p3d.jobs.cli.output import run_cli

    sys.exit(run_cli(cli))
