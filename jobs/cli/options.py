"""Options that verbs share (recipe, source, run, cluster, S3), and the records made from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from p3d.jobs.cli import STORES, output
from p3d.jobs.cli.declared import options_of
from p3d.jobs.planning.job_spec import NO_WEIGHTS, JobSpec, check_spec
from p3d.pipeline.errors import InputError, NoSuchJob
from p3d.pipeline.recipe import JobRecord, MaxFailures, PlanOptions, RecipeOptions, RunOptions
from p3d.pipeline.storage.store import Store, StoreOptions
from p3d.pipeline.storage.urls import open_store
from p3d.pipeline.types.options import flag_of, options_in

F = TypeVar("F", bound=Callable[..., Any])


def recipe_options(verb: F) -> F:
    """Add the options that determine the embeddings."""
    group = "What is computed"
    named = options_of(JobSpec, only=("weights", "model", "graph"), group=group)
    return named(options_of(RecipeOptions, group=group)(verb))


source_options = options_of(PlanOptions, group="Which videos")
shard_videos_option = options_of(PlanOptions, only=("shard_videos",))


def run_options(verb: F) -> F:
    """Add the options of speed and fault tolerance."""
    for option in (  # the last one is shown first
        click.option("--json", "as_json", is_flag=True, help="Print the final status as one JSON object on stdout."),
        click.option("--takeover", is_flag=True, help="Take over from a run that is still alive."),
        options_of(RunOptions, inherited=True, group="Speed and limits"),
    ):
        verb = option(verb)
    return verb


def job_spec(
    typed: dict[str, Any], src: str, out: str | None, *, look: bool = True, tell: Callable[[str], None] = lambda _: None
) -> JobSpec:
    """The options that determine the embeddings. What is not typed is as in the job at OUT, if it is trusted.

    What was typed is checked here, before torch and Ray are imported, which takes seconds. With `look`, SRC and OUT are
    also looked at, and `tell` is told what `check_places` says. It is off if another machine reads SRC, and in a driver
    that was submitted: `launch_job` refuses them where it also removes the note of the submission. JobError.
    """
    from p3d.jobs.planning.places import check_places
    from p3d.jobs.trust import is_trusted

    values = {field.name: typed[field.name] for field in fields(JobSpec)}
    check_spec(JobSpec(**values))
    plan, s3 = plan_options(typed), store_options_of(typed)
    store = None if out is None else out_store(out, s3)
    if look:
        check_places(src, store, plan, s3, tell)
    job = None if store is None else _job_at(store)
    if values["weights"] is None and job is None:
        raise InputError(NO_WEIGHTS)
    there = job.recipe if store and job and (typed.get("trust") or is_trusted(store, job)) else None
    inherited = {}
    for field in fields(RecipeOptions) if there else ():
        of_job = getattr(there, field.name)
        if click.get_current_context().get_parameter_source(field.name) == ParameterSource.DEFAULT:
            if values[field.name] != of_job:
                inherited[flag_of(field)] = of_job
            values[field.name] = of_job
    if inherited:
        output.say("as in the job at OUT: " + ", ".join(f"{flag} {value}" for flag, value in inherited.items()))
    return JobSpec(**values)


def _job_at(store: Store) -> JobRecord | None:
    from p3d.jobs.job import read_job

    try:
        return read_job(store)
    except NoSuchJob:
        return None


def plan_options(typed: dict[str, Any]) -> PlanOptions:
    """The options of a plan as typed."""
    return PlanOptions(**{field.name: typed[field.name] for field in fields(PlanOptions)})


def run_options_typed(typed: dict[str, Any]) -> dict[str, Any]:
    """The options of speed and fault tolerance as typed; None for what a resume takes from the last run. InputError."""
    MaxFailures.parse(typed["max_failures"])
    return {field.name: typed[field.name] for field, _ in options_in(RunOptions)}


trust_option = click.option(
    "--trust",
    is_flag=True,
    help="Trust the job at OUT, as `p3d trust` does, and go on. Default: refuse somebody else's job.",
)


def source_option(what: str) -> Callable[[F], F]:
    """The option that names the source videos which a verb may open."""
    return click.option("--source", "source", metavar="ROOT", help=f"{what} Default: all if OUT is trusted, else none.")


def address_options(verb: Any) -> Any:
    """Add the options that say where to run."""
    for option in (  # the last one is shown first
        click.option("--detach", is_flag=True, help="Return once the job is submitted; needs --address http://."),
        click.option(
            "--address",
            metavar="WHERE",
            help="Run on a Ray cluster: auto, HOST:PORT, ray://HOST:PORT, or http://HEAD:8265 to run the driver there, "
            "too. Default: this machine.",
        ),
    ):
        verb = option(verb)
    return verb


store_options = options_of(StoreOptions, group=STORES)
STORE_OPTIONS = tuple(field.name for field, _ in options_in(StoreOptions))


def store_options_of(typed: dict[str, Any]) -> StoreOptions:
    """The store options as typed. InputError if they are invalid or contain a password."""
    return StoreOptions(**{name: typed[name] for name in STORE_OPTIONS})


def options_typed(s3: StoreOptions) -> dict[str, Any]:
    """The values of the command line's options that give these store options, without the defaults."""
    held = {field: getattr(s3, field.name) for field, _ in options_in(StoreOptions)}
    return {field.name: value for field, value in held.items() if value != field.default}


def out_store(out: str, options: StoreOptions) -> Store:
    """The store of an OUT argument."""
    return open_store(out, options)
