"""docs/reference/json.md lists exactly the keys that each verb prints with `--json`."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p3d.jobs.cli import VERBS, Verbs
from p3d.pipeline.storage.local import LocalStore
from tests.conftest import REPO
from tests.jobs.test_cli import in_process
from tests.owned import own
from tests.pipeline.rows import videos
from tests.pipeline.test_snapshot import add_plan

_spec = importlib.util.spec_from_file_location("docs.json_outputs", REPO / "docs" / "json_outputs.py")
assert _spec is not None and _spec.loader is not None
json_outputs = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(json_outputs)
ANSWERS: tuple[Any, ...] = json_outputs.ANSWERS


def paths_of(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The path of each key of a JSON value, and of those of the objects in it, with its value."""
    if isinstance(value, dict):
        for name, one in value.items():
            here = f"{path}.{name}" if path else name
            yield here, one
            yield from paths_of(one, here)
    elif isinstance(value, list):
        for one in value:
            yield from paths_of(one, f"{path}[]")


def known(answer: Any, path: str) -> bool:
    """Whether a path is documented. A key of an object with any keys (`software{}`) stands below it."""
    listed = {one.rstrip("?") for one in answer.paths()}
    free = [name for name, kind in kinds(answer).items() if kind.startswith("object of ")]
    return path in listed or any(path.startswith(f"{name}.") for name in free)


def kinds(answer: Any) -> dict[str, str]:
    """path -> the type that the page states."""
    found = {path.rstrip("?"): kind for path, (kind, _) in answer.keys.items()}
    for prefix, record in answer.records.items():
        found = dict(json_outputs.fields_of(record, prefix, answer.without)) | found
    return found


def fits(value: Any, kind: str) -> bool:
    """Whether a JSON value has the type that the page states."""
    types = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "list": list, "object": dict}
    if value is None:
        return kind.endswith(" or null")
    if isinstance(value, bool):
        return kind.startswith("boolean")
    return isinstance(value, types[re.split(r" ", kind)[0]])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """Eight videos, one of which failed."""
    store = LocalStore(str(tmp_path_factory.mktemp("json") / "out"))
    add_plan(store, videos(tuple("abcdefgh")), frames=(40, 0, 16, 9, 33, 64, 20, 20))
    own(store)
    return store


# the name of the answer in docs/json_outputs.py -> a command that prints it
COMMANDS = {
    "STATUS": ("status", "OUT"),
    "SEVERAL": ("jobs", "list", "PARENT"),
    "FAILURES": ("failures", "OUT"),
    "VERIFY": ("verify", "OUT", "--deep"),
    "VERIFY_SNAPSHOT": ("verify", "CLEAN"),
    "SEARCH": ("search", "OUT", "a", "--level", "clip"),
    "DEDUP": ("results", "dedup", "OUT", "--threshold", "-1"),
    "EXPORT": ("results", "export", "OUT", "NEW"),
    "SNAPSHOT": ("results", "snapshot", "OUT", "NEW"),
    "REPORT": ("results", "report", "OUT", "-o", "NEW", "--videos", "0", "--queries", "0"),
    "MODELS": ("models", "--model", "p3d-demo"),
    "WEIGHTS_LIST": ("weights", "list"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_verb_prints_the_documented_keys(name: str, out: LocalStore, tmp_path: Path) -> None:
    """Every key is documented with its type, and each one that is always there is there."""
    answer, clean = getattr(json_outputs, name), tmp_path / "clean"
    if name == "VERIFY_SNAPSHOT":
        assert in_process("results", "snapshot", out.url, str(clean))[0] == 0
    given = {"OUT": out.url, "PARENT": str(out.root.parent), "CLEAN": str(clean), "NEW": str(tmp_path / "new")}
    code, printed, said = in_process(*(given.get(word, word) for word in COMMANDS[name]), "--json")
    assert code == 0, said
    record = json.loads(printed)
    assert record.pop("schema_version") == 1
    found, types = dict(paths_of(record)), kinds(answer)
    assert not [path for path in found if not known(answer, path)]
    assert not [path for path, value in found.items() if path in types and not fits(value, types[path])]
    optional = {path.rstrip("?") for path in answer.paths() if path.endswith("?")}
    always = {path for path in types if not re.search(r"[\[.{]", path)} - optional
    assert not always - found.keys()


def with_json(verbs: Verbs, before: str = "") -> Iterator[str]:
    """The verbs that have `--json`, by the declarations in their modules."""
    for name, (where, _) in verbs.items():
        if not isinstance(where, str):
            yield from with_json(where, f"{before}{name} ")
        elif "--json" in in_process(*before.split(), name, "--help")[1]:
            yield before + name


def test_every_verb_with_json_is_on_the_page() -> None:
    """The page names each verb that has the option, and no other."""
    named = {verb.removesuffix(" --svm") for answer in ANSWERS for verb in answer.verbs}
    assert named == set(with_json(VERBS))
