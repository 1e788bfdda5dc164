"""The direction of import is the architecture; this test parses every import and holds it to the house's table."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FILES = sorted(path for package in ("p3d", "pipeline", "jobs") for path in (REPO / package).rglob("*.py"))

# package or file -> what it must never import, at module level or inside a function
NEVER = {
    "p3d": {"pipeline", "jobs", "ray", "click", "decord", "boto3", "av", "pyarrow", "rich"},
    "pipeline": {"p3d", "jobs", "ray", "click", "rich"},
    "jobs": set(),
}
# library -> the only places that may import it
ONLY = {
    "ray": {"jobs/scheduler.py", "jobs/cluster.py", "jobs/decoding.py", "jobs/metrics.py", "jobs/submission.py"},
    "decord": {"pipeline/decode/"},
    "torchcodec": {"pipeline/decode/nvdec_route.py"},
    "torch": {"p3d/", "jobs/", "pipeline/decode/nvdec_route.py"},
    "av": {"pipeline/decode/"},
    "boto3": {"pipeline/s3_client.py"},
    "botocore": {"pipeline/s3.py", "pipeline/s3_body.py", "pipeline/s3_client.py", "pipeline/s3_errors.py"},
    "click": {"jobs/cli/"},
    "rich": {"jobs/cli/", "jobs/monitor.py"},
    "safetensors": {"p3d/weights/"},
    "faiss": {"pipeline/results/"},
    "sklearn": {"pipeline/results/"},
    "jinja2": {"pipeline/results/report/"},
    "markupsafe": {"pipeline/results/report/"},
    "aiohttp": {"pipeline/results/page/"},
    "umap": {"pipeline/results/page/"},
}


def imported(path: Path) -> set[str]:
    """Top-level names of all packages that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPO)))
def test_every_file_imports_only_what_its_room_may(path: Path) -> None:
    """No file imports a package that the table forbids to it."""
    where = str(path.relative_to(REPO))
    names = imported(path)
    assert not names & NEVER[path.relative_to(REPO).parts[0]]
    for library, places in ONLY.items():
        if library in names:
            assert any(where == place or (place.endswith("/") and where.startswith(place)) for place in places), library


def test_the_parser_sees_an_import_inside_a_function(tmp_path: Path) -> None:
    """An import that hides in a function or behind `from` is found too."""
    path = tmp_path / "hidden.py"
    path.write_text("def f():\n    import ray.util\n    from torch.nn import Module\n")
    assert imported(path) == {"ray", "torch"}


@pytest.mark.parametrize(
    "module",
    ["jobs.cli", "jobs.cli.status", "jobs.cli.dataset", "jobs.cli.launch", "jobs.cli.weights", "jobs.monitor"],
)
def test_status_and_help_need_neither_torch_nor_ray(module: str) -> None:
    """Importing a verb costs neither torch (2.8 s) nor Ray."""
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'ray'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0
