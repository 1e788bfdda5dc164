"""The direction of imports defines the architecture; these tests check every import against the tables below."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import p3d

REPO = Path(__file__).resolve().parent.parent
TOP = ("p3d", "pipeline", "jobs")

# A module may import the modules before it in its line, and none after it. `p3d` and `pipeline` do not import each
# other; `jobs` imports both.
ORDER = {
    "p3d": "names preprocessing networks zoo weights prepared device encoder",
    "p3d.pipeline": "errors types clips storage recipe dataset sources decode extract results",
    "p3d.jobs": "machine job trust planning worker scheduler training monitor api cli",
}
NEVER = {
    "p3d": {"p3d.pipeline", "p3d.jobs", "ray", "click", "decord", "boto3", "av", "pyarrow", "rich"},
    "p3d.pipeline": {"p3d", "p3d.jobs", "ray", "click", "rich"},
    "p3d.jobs": set[str](),
}
# library -> the only modules that may import it, by name of the module or of its package
ONLY = {
    "ray": "p3d.jobs.scheduler p3d.jobs.worker.decoding p3d.jobs.training.run",
    "decord": "p3d.pipeline.decode.routes.decord",
    "torchcodec": "p3d.pipeline.decode.routes.nvdec",
    "torch": "p3d.networks p3d.weights p3d.prepared p3d.device p3d.encoder p3d.zoo p3d.preprocessing p3d.jobs "
    "p3d.pipeline.decode.routes.nvdec",
    "av": "p3d.pipeline.decode",
    "boto3": "p3d.pipeline.storage.s3.client",
    "botocore": "p3d.pipeline.storage.s3",
    "click": "p3d.jobs.cli",
    "rich": "p3d.jobs.cli p3d.jobs.monitor",
    "safetensors": "p3d.weights p3d.jobs.training.checkpoints",
    "urllib3": "p3d.weights p3d.pipeline.storage.s3",
    "faiss": "p3d.pipeline.results",
    "sklearn": "p3d.pipeline.results",
    "jinja2": "p3d.pipeline.results.report",
    "markupsafe": "p3d.pipeline.results.report",
    "aiohttp": "p3d.pipeline.results.page",
    "umap": "p3d.pipeline.results.page",
}
MOST_AT_THE_TOP = 10
NOT_COUNTED = {"__init__", "__main__", "py", "__pycache__"}  # `py` is py.typed


def dotted(path: Path) -> str:
    """The name under which a file of a top-level folder is imported."""
    parts = path.relative_to(REPO).with_suffix("").parts
    parts = parts if parts[0] == "p3d" else ("p3d", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# `rglob` does not follow links, so each file is seen once. `python -m p3d` is the command line under another name.
MODULES = {dotted(path): path for top in TOP for path in sorted((REPO / top).rglob("*.py"))}
del MODULES["p3d.__main__"]


def imported(path: Path, modules: Mapping[str, Path] = MODULES) -> set[str]:
    """Full names of all modules that a file imports anywhere; `from package import module` counts as the module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in modules else node.module for name in full}
    return names


def needed(module: str) -> set[str]:
    """What a module imports. The Python API of `p3d` is the one exception to the direction: see the test of it."""
    return imported(MODULES[module]) - (set(p3d.API.values()) if module == "p3d" else set())


def test_the_api_is_looked_up_when_it_is_used() -> None:
    """`import p3d` loads none of the modules of its API; each name is found, and no other one is."""
    code = f"import sys, p3d; sys.exit(bool({set(p3d.API.values())!r} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0
    assert sorted(p3d.API) == p3d.__all__ and set(p3d.API) <= set(dir(p3d))
    assert all(getattr(p3d, name).__module__ == module for name, module in p3d.API.items())
    with pytest.raises(AttributeError, match="no attribute 'lunch'"):
        _ = p3d.lunch


def below(module: str, package: str) -> bool:
    """Whether a module is in a package or is it; `p3d` excludes p3d.pipeline and p3d.jobs."""
    if package == "p3d":
        return module.split(".")[0] == "p3d" and module != "p3d" and package_of(module) == "p3d"
    return module == package or module.startswith(f"{package}.")


def package_of(module: str) -> str:
    """Which of the three packages a module belongs to."""
    head = ".".join(module.split(".")[:2])
    return head if head in ("p3d.pipeline", "p3d.jobs") else "p3d"


def part_of(module: str) -> str:
    """The top-level module or folder of its package that a module belongs to; empty for the package itself."""
    return module.removeprefix(package_of(module)).removeprefix(".").split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports_only_what_it_may(module: str) -> None:
    """No module imports a package or library that the tables forbid."""
    names = needed(module)
    for forbidden in NEVER[package_of(module)]:
        assert not [name for name in names if below(name, forbidden)], forbidden
    for library, users in ONLY.items():
        if any(below(name, library) for name in names):
            assert any(below(module, user) for user in users.split()), library


@pytest.mark.parametrize("module", MODULES)
def test_every_import_follows_the_order(module: str) -> None:
    """Within a package, imports go to the same part or to an earlier one in the order."""
    package, part = package_of(module), part_of(module)
    order = ORDER[package].split()
    for name in needed(module):
        if name in MODULES and package_of(name) == package and part and part_of(name) not in ("", part):
            assert order.index(part_of(name)) < order.index(part), f"{module} imports {name}"


def test_there_is_no_import_cycle() -> None:
    """Modules can be sorted so that each imports only earlier ones, including imports inside functions."""
    waiting = {module: needed(module) & MODULES.keys() - {module} for module in MODULES}
    while free := [
        module
        for module, needs in waiting.items()
        if not needs & waiting.keys() or not any(module in others for others in waiting.values())
    ]:
        for module in free:
            del waiting[module]
    assert not waiting, f"cycles among {sorted(waiting)}"


@pytest.mark.parametrize("top", TOP)
def test_the_top_level_of_a_package_is_small(top: str) -> None:
    """A package has at most ten top-level modules or folders, and each is in the order."""
    names = {path.name.partition(".")[0] for path in (REPO / top).iterdir() if not path.is_symlink()} - NOT_COUNTED
    assert len(names) <= MOST_AT_THE_TOP
    assert names == set(ORDER["p3d" if top == "p3d" else f"p3d.{top}"].split())


def test_the_parser_finds_an_import_inside_a_function(tmp_path: Path) -> None:
    """An import inside a function or with `from` is found by its full name."""
    path = tmp_path / "hidden.py"
    path.write_text("def f():\n    import ray.util\n    from torch.nn import Module\n    from p3d.jobs import job\n")
    assert imported(path) == {"ray.util", "torch.nn", "p3d.jobs.job"}


def test_dotted_prefixes_distinguish_the_packages() -> None:
    """Forbidding `p3d` to the pipeline does not forbid the pipeline itself."""
    assert below("p3d.encoder", "p3d") and below("p3d.pipeline.clips.rules", "p3d.pipeline")
    assert not below("p3d.pipeline.clips.rules", "p3d") and not below("p3d.jobs", "p3d")
    assert (part_of("p3d.pipeline.clips.rules"), part_of("p3d.jobs"), part_of("p3d.zoo")) == ("clips", "", "zoo")


@pytest.mark.parametrize("name", ["pipeline", "jobs"])
def test_a_bare_name_is_refused(name: str) -> None:
    """`import jobs` in a checkout says which name to use, instead of loading every module a second time."""
    said = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert said.returncode == 1 and f"import p3d.{name}, not {name}" in said.stderr


def test_a_checkout_without_links_says_so(tmp_path: Path) -> None:
    """Where git wrote the links as files, as on Windows, the import names the remedy."""
    (tmp_path / "p3d").mkdir()
    (tmp_path / "p3d" / "__init__.py").write_text((REPO / "p3d" / "__init__.py").read_text())
    (tmp_path / "p3d" / "jobs").write_text("../jobs")
    words = [sys.executable, "-c", "import p3d"]
    said = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert said.returncode == 1 and "Install p3d as a wheel" in said.stderr


@pytest.mark.parametrize(
    "module",
    [
        "p3d.jobs.cli",
        "p3d.jobs.cli.status",
        "p3d.jobs.cli.dataset",
        "p3d.jobs.cli.launch",
        "p3d.jobs.cli.weights",
        "p3d.jobs.monitor.status",
    ],
)
def test_status_and_help_need_neither_torch_nor_ray(module: str) -> None:
    """Importing a verb costs neither torch (2.8 s) nor Ray."""
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'ray'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0
