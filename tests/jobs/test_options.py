"""Options are declared once: the command line, the records and the Python API follow from the same fields."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import click
import pytest

from p3d.jobs.cli import cli
from p3d.jobs.planning.job_spec import JobSpec
from p3d.pipeline.errors import InputError
from p3d.pipeline.recipe import (
    PlanKeywords,
    PlanOptions,
    Recipe,
    RecipeKeywords,
    RecipeOptions,
    RunKeywords,
    RunOptions,
)
from p3d.pipeline.results.search.options import SearchOptions
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types.options import flag_of, options_in

DECLARED = (JobSpec, PlanOptions, RunOptions, StoreOptions)


def command(*words: str) -> click.Command:
    """The click command of a verb."""
    found: Any = cli
    for word in words:
        found = found.get_command(click.Context(found), word)
    return found


@pytest.mark.parametrize(
    ("verb", "records"),
    [
        ("launch", DECLARED),
        ("plan", (JobSpec, PlanOptions, StoreOptions)),
        ("resume", (RunOptions, StoreOptions)),
        ("retry", (RunOptions, StoreOptions)),
        ("search", (SearchOptions, StoreOptions)),
    ],
)
def test_a_verb_has_each_option_as_it_is_declared(verb: str, records: tuple[type, ...]) -> None:
    """Flag, help text, default and range of every option of a verb are those of the field."""
    params = {param.name: param for param in command(verb).params if isinstance(param, click.Option)}
    for record in records:
        for field, option in options_in(record):
            param = params[field.name]
            assert flag_of(field) in param.opts and param.help.startswith(option.help)
            inherited = record is RunOptions
            default = None if inherited or field.default is MISSING else field.default
            assert (param.default if isinstance(param.default, str | int | float) else None) == (default or None)
            if isinstance(param.type, click.IntRange | click.FloatRange):
                assert (param.type.min, param.type.max, param.type.min_open) == (option.low, option.high, option.above)
            if option.choices:
                assert tuple(param.type.choices) == option.choices
            if inherited and field.default is not MISSING:
                assert "Default: " in param.help


@pytest.mark.parametrize(
    ("record", "keywords"), [(RecipeOptions, RecipeKeywords), (PlanOptions, PlanKeywords), (RunOptions, RunKeywords)]
)
def test_keywords_are_the_declared_options(record: type, keywords: type) -> None:
    """The keyword arguments of the Python API are exactly the declared options, with their types."""
    hints, typed = get_type_hints(record), get_type_hints(keywords)
    assert [field.name for field, _ in options_in(record)] == list(typed)
    for name, hint in typed.items():
        if name not in ("max_failures", "include", "exclude"):  # texts, as on the command line; one or several
            assert hint in (hints[name], hints[name] | None)


def test_what_decides_numbers_is_in_the_recipe_and_nothing_else_is() -> None:
    """Every option of RecipeOptions is a field of the Recipe, and no option of speed or of a plan is."""
    held = {field.name for field in fields(Recipe)}
    assert {field.name for field, _ in options_in(RecipeOptions)} <= held
    for record in (PlanOptions, RunOptions, StoreOptions):
        assert not held & {field.name for field in fields(record)}


@pytest.mark.parametrize(
    ("record", "given", "words"),
    [
        (PlanOptions, {"shard_videos": 0}, "shard_videos must be at least 1, not 0"),
        (PlanOptions, {"shard_videos": 100_001}, "shard_videos must be at most 100000, not 100001"),
        (PlanOptions, {"limit": -1}, "limit must be at least 1, not -1"),
        (PlanOptions, {"shard_videos": 2.5}, "shard_videos must be int, not 2.5"),
        (PlanOptions, {"limit": True}, "limit must be int, not True"),
        (PlanOptions, {"id_column": 3}, "id_column must be str, not 3"),
        (StoreOptions, {"requester_pays": "yes"}, "requester_pays must be bool, not 'yes'"),
        (StoreOptions, {"sse": "none"}, "sse must be one of AES256, aws:kms, aws:kms:dsse, not 'none'"),
    ],
)
def test_a_value_outside_is_refused(record: type, given: dict[str, Any], words: str) -> None:
    """A value that the command line would refuse is refused by the record, too."""
    with pytest.raises(InputError, match=words):
        record(**given)


def test_search_and_index_have_the_same_level() -> None:
    """So that an index made without options is the one that a search without options uses."""
    found = [
        {
            param.name: (param.default, param.help)
            for param in command(*verb).params
            if param.name in ("level", "metric")
        }  # type: ignore[attr-defined]
        for verb in (("search",), ("results", "index"))
    ]
    assert found[0] == found[1] and found[0]["level"][0] == "clip" and found[0]["metric"][0] == "cosine"
