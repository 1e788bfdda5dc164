"""Run the job of a verb on another machine: `--address`, `--detach`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from p3d.jobs.cli import output

if TYPE_CHECKING:
    from p3d.pipeline.storage.store import Store

POLL_S = 1.0
SUBMITTED_TO = ("http://", "https://")


def runs_remotely(address: str | None) -> bool:
    """Does the driver run remotely, too?"""
    return address is not None and address.startswith(SUBMITTED_TO)


def refuse_to_detach(address: str | None, detach: bool) -> None:
    """UsageError for --detach with a local driver."""
    if detach and not runs_remotely(address):
        raise click.UsageError("--detach needs --address http://HEAD:8265, so that the driver runs on the cluster")


def words_again(ctx: click.Context, **changed: str | bool | None) -> list[str]:
    """The command line of this verb as typed, with the values of `changed`; options without a value are left out."""
    options, arguments = list[str](), list[str]()
    for param in ctx.command.params:
        name = param.name or ""
        typed = ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE
        value = changed.get(name, ctx.params.get(name) if typed else None)
        if value is None:
            continue
        if isinstance(param, click.Argument):
            arguments.append(str(value))
        elif isinstance(param, click.Option) and param.is_flag:
            options += [(param.opts if value else param.secondary_opts)[0]]
        else:
            for one in value if isinstance(value, tuple) else (value,):
                options += [param.opts[0], str(one)]
    return [str(ctx.info_name), *options, "--", *arguments]


def run_remote_driver(
    address: str, store: Store, out: str, words: list[str], *, detach: bool, trusted: bool
) -> int | None:
    """Start the remote driver and print the next commands. None if the caller may now watch until it ends."""
    from p3d.jobs.scheduler import control
    from p3d.jobs.scheduler.submission import openness, state_of, submit, without_user

    if warning := openness(address):
        output.say(f"warning: {warning}")
    before = control.newest_number(store)
    name = submit(address, words, store.url, trusted=trusted)
    control.tell_submitted(store, without_user(address), name, before)
    output.say(f"submitted to {address} as {name}")
    output.say("this machine is no longer needed:")
    named = store.words(out)
    output.say(f"  p3d status {named} --watch    show progress")
    output.say(f"  p3d cancel {named}            stop it, resumable")
    output.say(f"  p3d jobs logs {named}         print the log")
    if detach:
        return 0
    while control.newest_number(store) == before:
        ended, last = state_of(address, name)
        if ended:
            if not last:
                return None
            output.say(f"{ended} before the driver began. Its last lines:")
            for line in last.splitlines():
                output.say(f"  {line}")
            return 6
        time.sleep(POLL_S)
    return None
