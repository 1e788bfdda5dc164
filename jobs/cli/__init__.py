"""The command line. The module of a verb loads only when the verb is called, so that `p3d --help` answers at once.

Data goes to stdout, messages go to stderr. A user's mistake gives one message and an exit code of `cli.output`.
"""

from __future__ import annotations

import builtins
import importlib
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from keyword import iskeyword
from typing import Any, TypeAlias

import click
from click.shell_completion import CompletionItem

# verb -> (module, one line of help); a group has a table of its verbs instead of a module. Help imports no verb.
Verbs: TypeAlias = "Mapping[str, tuple[str | Verbs, str]]"

RESULTS: Verbs = {
    "index": ("index", "Build or update an index for `p3d search --index`."),
    "dedup": ("dedup", "Find near-duplicate videos, in clusters, with the evidence."),
    "evaluate": ("evaluate", "Measure the scores, or a linear SVM, against labels."),
    "report": ("report", "Write a report of a job as one HTML file."),
    "serve": ("serve", "Open a local web page: search, play, drop a file, a map."),
    "export": ("export", "Write the vectors of each video as a .npy file."),
    "snapshot": ("results", "Write a verified copy: newest rows only, in large files."),
}
CLUSTER: Verbs = {
    "check": ("cluster", "Check whether every node can take part in a job."),
}
JOBS: Verbs = {
    "list": ("jobs", "List the jobs in a folder or under an S3 prefix."),
    "logs": ("jobs", "Print the log of a run."),
    "trace": ("jobs", "Write the timeline of a job for a trace viewer."),
}
WEIGHTS: Verbs = {
    "fetch": ("fetch_weights", "Download published weights and import them."),
    "list": ("fetch_weights", "List the weights that can be fetched by name."),
    "import": ("weights", "Convert weights of any known format to one .safetensors."),
    "show": ("weights", "Show what a weights file is, with hints from its values."),
    "choose": ("choose_weights", "Find graph, channel order and range with labelled videos."),
}
VERBS: Verbs = {
    "plan": ("plan", "Show what a launch would do; writes nothing."),
    "launch": ("launch", "Embed the videos of SRC into OUT."),
    "train": ("train", "Train a network on the labelled videos of SRC."),
    "resume": ("launch", "Continue the job or the training at OUT."),
    "retry": ("retry", "Retry the failed videos of OUT."),
    "status": ("status", "Show the progress of the job at OUT; needs no Ray."),
    "cancel": ("status", "Stop the run at OUT; `p3d resume` continues it."),
    "trust": ("trust", "Trust a job that somebody else launched at OUT."),
    "relocate": ("relocate", "Record that the source videos of OUT have moved."),
    "failures": ("dataset", "List the videos that have no rows, and why."),
    "verify": ("dataset", "Check every file of OUT against its plans."),
    "search": ("search", "Find what in OUT is most similar to a video or clip."),
    "models": ("models", "List the available networks."),
    "weights": (WEIGHTS, "Download, convert and inspect files of weights."),
    "jobs": (JOBS, "Look at jobs, running or finished."),
    "cluster": (CLUSTER, "Check a Ray cluster before a job."),
    "results": (RESULTS, "Use the rows of OUT: index, copies, evaluation, pages."),
}


STORES = "S3"  # the heading of options that almost every verb has; the help of STORES_VERB alone explains them
STORES_VERB = "launch"


def _be_verbose(_ctx: click.Context, _param: click.Parameter, chosen: bool) -> None:
    from p3d.jobs.cli import output

    if chosen:
        output.be_verbose()


def _be_quiet(_ctx: click.Context, _param: click.Parameter, chosen: bool) -> None:
    from p3d.jobs.cli import output

    if chosen:
        output.be_quiet()


LOUDNESS = tuple(
    click.Option([short, long], is_flag=True, is_eager=True, expose_value=False, callback=callback, help=text)
    for short, long, callback, text in (
        ("-v", "--verbose", _be_verbose, "Print log messages, too, such as the events of a run."),
        ("-q", "--quiet", _be_quiet, "Print only results, warnings and errors."),
    )
)


class Place(click.types.StringParamType):
    """Text that may be the name of a file, so that shells complete it as one."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


PLACES = {"FILE", "OUT", "DIR", "ROOT", "SRC", "CSV", "OUT.safetensors", "FILE|random:SEED", "OLD", "NEW"}


class Verb(click.Command):
    """A verb whose help shows its options under the headings that they are declared with.

    Every verb has the options `LOUDNESS`. Shells complete its arguments, and the options that take a file, as files.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *own, help_option = super().get_params(ctx)
        for param in own:
            if param.type is click.STRING and (isinstance(param, click.Argument) or param.metavar in PLACES):
                param.type = Place()
        return [*own, *LOUDNESS, help_option]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)) is not None:
                groups.setdefault(getattr(param, "group", ""), []).append(record)
        stores = groups.pop(STORES, [])
        rest = groups.pop("", [])
        for title, records in [*groups.items(), ("Options", rest)]:
            with formatter.section(title):
                formatter.write_dl(records)
        if stores:
            with formatter.section(STORES):
                if ctx.command.name == STORES_VERB:
                    formatter.write_dl(stores)
                else:
                    flags = ", ".join(flag.split()[0] for flag, _ in stores)
                    formatter.write_text(f"{flags}: see `p3d {STORES_VERB} --help`.")


class LazyGroup(click.Group):
    """A click group made from a table of verbs, each of which is imported when it is needed."""

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
        if type(command) is click.Command:
            command.__class__ = Verb  # so that no verb has to say so
        command.help = command.help or line  # PYTHONOPTIMIZE=2 removes docstrings
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """As click does, but without importing every verb for its line of help."""
        verbs = {name: line for name, (_, line) in self.verbs.items() if name.startswith(incomplete)}
        items = [CompletionItem(name, help=line) for name, line in verbs.items()]
        return [*items, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, text) for name, (_, text) in self.verbs.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            like = get_close_matches(args[0], self.verbs, 1) if args else []
            hint = f" Did you mean {like[0]!r}?" if like else ""
            for group, (where, _) in self.verbs.items():
                if args and not isinstance(where, str) and args[0] in where:
                    hint = f" It is `p3d {group} {args[0]}`."
            raise click.UsageError(f"{error.message}{hint} The verbs are {', '.join(self.verbs)}.", ctx) from None


@click.group(
    cls=LazyGroup, verbs=VERBS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="p3d-embeddings", prog_name="p3d")
def cli() -> None:
    """Turn a video archive into embeddings: P3D ResNet on Ray, rows in Parquet, nothing lost.

    \b
      p3d plan videos/ out/ --weights FILE      # show what would be done
      p3d launch videos/ out/ --weights FILE    # do it; Ctrl-C is safe
      p3d status out/ --watch                   # watch it from any machine
      p3d resume out/                           # continue after a kill

    SRC is a folder, a video, a list (.txt, .csv, .tsv, .jsonl, .parquet), s3://bucket/prefix, or a quoted
    pattern such as 'videos/**/*.mp4'. OUT is a folder or s3://bucket/prefix. It holds everything about a job,
    so every other verb needs only OUT. Each verb has --verbose and --quiet.
    """


def main() -> None:
    """The console script."""
    from p3d.jobs.cli.output import escape_hooks, run_cli

    escape_hooks()
    sys.exit(run_cli(cli))
