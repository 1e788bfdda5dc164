"""The reference pages and the page of troubleshooting are complete."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import click
import pytest

from p3d.jobs.cli import STORES, LazyGroup, cli
from p3d.jobs.cli.output import EXIT_CODES, EXIT_REMEDY
from p3d.pipeline import errors
from p3d.pipeline.errors import REASON_REMEDY, STORE_REMEDY, TRAINING_REMEDY, Reason, StoreError
from tests.conftest import REPO

PAGE = (REPO / "docs" / "reference" / "environment.md").read_text()
NAME = re.compile(r"(P3D|RAY|OMP|MALLOC|GLOO|TORCH)_(?!\w*ENV_VAR$)\w+")


def test_each_cause_has_a_remedy() -> None:
    """Every failure reason, exit code and error of a store says what to do."""
    assert set(REASON_REMEDY) == set(TRAINING_REMEDY) == set(Reason)
    assert set(EXIT_REMEDY) == set(EXIT_CODES)
    of_store = {one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, StoreError)}
    assert set(STORE_REMEDY) == of_store - {StoreError}
    assert all(text.endswith(".") for table in (REASON_REMEDY, EXIT_REMEDY, STORE_REMEDY) for text in table.values())


def commands(group: LazyGroup, before: str = "") -> Iterator[tuple[str, click.Command]]:
    """The name of every verb, such as `results index`, and its command."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, LazyGroup):
            yield from commands(command, f"{before}{name} ")
        elif command is not None:
            yield before + name, command


def test_every_option_is_on_the_page() -> None:
    """docs/reference/cli.md has each option below its verb, and those of S3 once, at the beginning."""
    page = (REPO / "docs" / "reference" / "cli.md").read_text()
    shared = page.partition("## Store options")[2].partition("## Verbs")[0]
    for name, command in commands(cli):
        text = page.partition(f"### p3d {name}\n")[2].partition("\n### ")[0]
        options = [one for one in command.params if isinstance(one, click.Option) and not one.hidden]
        assert options and text
        for one in options:
            of_store = getattr(one, "group", "") == STORES
            assert one.opts[0] in (shared if of_store else text), (name, one.opts)
            assert not of_store or (one.opts[0] not in text and "(#store-options)" in text)


def variables() -> Iterator[str]:
    """The names of environment variables that stand as text in the code of the three packages."""
    for package in ("p3d", "pipeline", "jobs"):
        for path in (REPO / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value):
                    yield node.value


def test_each_environment_variable_is_on_the_page() -> None:
    """docs/reference/environment.md lists every variable that the code names."""
    found = set(variables())
    assert {"P3D_STATE", "P3D_CACHE", "P3D_TRUST", "OMP_WAIT_POLICY"} <= found
    assert not sorted(name for name in found if f"`{name}`" not in PAGE)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(P3D_\w+)`", PAGE))))
def test_each_variable_of_the_page_is_used(name: str) -> None:
    """The page lists no variable of p3d that nothing reads."""
    folders = ("pipeline", "jobs", "tests", "bench")
    read = (path.read_text() for folder in folders for path in (REPO / folder).rglob("*.py"))
    assert any(f'"{name}"' in text for text in read)
