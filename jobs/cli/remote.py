"""Verbs that run a job somewhere else than here: `--address`, `--detach`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from p3d.jobs.cli import output

if TYPE_CHECKING:
    from p3d.jobs.scheduler.cluster import Cluster
    from p3d.pipeline.storage.store import Store

POLL_S = 1.0
SUBMITTED_TO = ("http://", "https://")


def runs_remotely(address: str | None) -> bool:
    """Is the driver to run over there, too?"""
    return address is not None and address.startswith(SUBMITTED_TO)


@contextlib.contextmanager
def cluster_at(address: str | None, store: Store) -> Iterator[Cluster | None]:
    """The cluster that was named, joined; None for this machine, whose own is started when all else is ready.

    A driver that was submitted and is refused, or fails, before it takes charge of `store` is waited for no longer.
    """
    if address is None:
        yield None
        return
    from p3d.jobs.scheduler import control
    from p3d.jobs.scheduler.cluster import SUBMITTED, joined_cluster
    from p3d.pipeline.errors import StoreError

    try:
        with joined_cluster(address) as cluster:
            there = cluster.machines
            output.say(f"joined {address}: {output.count(there.cpus, 'core')}, {output.count(there.gpus, 'GPU')}")
            yield cluster
    finally:
        if SUBMITTED in os.environ:
            with contextlib.suppress(StoreError):  # then `status` says so for longer; the next run ends it
                control.forget_submitted(store)


def refuse_to_detach(address: str | None, detach: bool) -> None:
    """UsageError for --detach with a driver that is here."""
    if detach and not runs_remotely(address):
        raise click.UsageError("--detach needs --address http://HEAD:8265: somebody else has to run the driver")


def absolute(place: str) -> str:
    """A folder or file as another machine with the same disks would name it."""
    return place if "://" in place else str(Path(place).absolute())


def words_again(ctx: click.Context, **changed: str | None) -> list[str]:
    """The command line of this verb as it was typed, with other values; options that are None are left out."""
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


def run_remote_driver(address: str, store: Store, out: str, words: list[str], *, detach: bool) -> int | None:
    """Start the driver over there, and say how to go on. None if the caller may now watch until it ends."""
    from p3d.jobs.scheduler import control
    from p3d.jobs.scheduler.submission import openness, state_of, submit, without_user

    if warning := openness(address):
        output.say(f"warning: {warning}")
    before = control.newest_number(store)
    name = submit(address, words, store.url)
    control.tell_submitted(store, without_user(address), name, before)
    output.say(f"submitted to {address} as {name}")
    output.say("this machine is not needed any more:")
    output.say(f"  p3d status {out} --watch    how far it is")
    output.say(f"  p3d cancel {out}            stop it, resumable")
    output.say(f"  p3d jobs logs {out}         what happened")
    if detach:
        return 0
    while control.newest_number(store) == before:
        ended, last = state_of(address, name)
        if ended:
            if not last:
                return None
            output.say(f"{ended}, before it began to work. Its last words:")
            for line in last.splitlines():
                output.say(f"  {line}")
            return 6
        time.sleep(POLL_S)
    return None
