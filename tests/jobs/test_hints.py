"""A command that a message tells the user to type works as it stands: OUT is quoted, and the S3 options are there.

A wrong value is refused before torch and Ray are imported, which takes seconds.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from p3d.jobs.cli import dataset
from p3d.jobs.cli.options import store_options_of
from p3d.pipeline.errors import escape
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.s3.store import S3Store
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.storage.urls import open_store
from tests.conftest import REPO

OPTIONS = StoreOptions(
    endpoint_url="http://127.0.0.1:9000",
    region="eu-central-1",
    profile="some one",
    addressing="path",
    checksums="when_required",
    requester_pays=True,
    sse="aws:kms",
    sse_kms_key_id="a/b",
)


@pytest.mark.parametrize("options", [StoreOptions(), StoreOptions(profile="x"), OPTIONS])
def test_the_words_of_a_store_reach_it_again(options: StoreOptions) -> None:
    """Typed after a verb, they give the same OUT and the same options, and nothing that has its default."""
    store = S3Store("s3://bucket/it's out", options)
    words = shlex.split(store.words())
    context = dataset.failures.make_context("failures", list(words))
    assert open_store(context.params["out"], options).url == store.url
    assert store_options_of(context.params) == options
    assert (len(words) == 1) is (options == StoreOptions())


def test_out_is_named_as_it_was_typed() -> None:
    """A folder has no options; a name with a blank is quoted."""
    assert open_store("out", OPTIONS).words("my out") == "'my out'"
    assert open_store("s3://b/out", StoreOptions(profile="x")).words("s3://b/out/") == "s3://b/out/ --profile x"


def test_every_command_in_a_message_has_them() -> None:
    """No message of the sources names a command with an OUT in another way."""
    hint = re.compile(r"p3d [a-z ]+ (?:SRC )?\{(?!(?:[a-z.]*store\.words\(|(?:named|words)\}))[^}]*\}")
    found = [
        f"{path}: {match[0]}"
        for package in ("pipeline", "jobs")
        for path in sorted((REPO / package).rglob("*.py"))
        for match in hint.finditer(path.read_text())
        if "weights import" not in match[0]
    ]
    assert found == []


@pytest.mark.parametrize("name", ["a\nb", "\u202eabc", "\udcff\udcfe", "it's\t\\x", "\x1b[2J'", "caf\u00e9\r"])
def test_a_name_that_is_shown_escaped_is_typed_in_another_way(name: str) -> None:
    """What the terminal shows, typed into bash, is the same OUT: control characters, other directions, any bytes."""
    shown = escape(LocalStore(f"/{name}").words())
    typed = subprocess.run(["bash", "-c", f"printf %s {shown}"], capture_output=True, check=True)
    assert typed.stdout == os.fsencode(f"/{name}") and shown.isprintable()


MISTAKES = (
    *(
        f"launch v out --weights w.pth {more}"
        for more in (
            "--clips often",
            "--device gpu",
            "--max-failures x",
            "--model p3d64",
            "--workers 0",
            "--id-column id",
            "--exclude ..",
            "--endpoint-url here",
            "--detach",
        )
    ),
    "launch v out",
    "launch v out --weights none.pth",
    "launch v out --weights w.bin",
    "launch v out --weights random:0",
    "launch v out --weights random:x --model p3d63",
    "launch none out --weights w.pth",
    "launch v v --weights w.pth",
    "launch out v",
    "plan v",
    "plan v --weights w.pth --clips often",
    "plan none --weights w.pth",
    "plan v v --weights w.pth",
    "resume v",
    "resume out --max-failures x",
    "retry out --reason corrupt",
    "retry out",
    "search out x --device gpu",
    "models --model p3d64",
    "weights show none.pth",
    "weights import none.pth -o x.safetensors",
    "weights import w.pth -o x.safetensors --model p3d64",
    "weights fetch resnet50-v2 -o x.bin",
    "weights choose none.pth --labelled v",
    "weights choose w.pth --labelled v --model p3d64",
)
RUN = """
import json, sys
from p3d.jobs.cli import cli
from p3d.jobs.cli.output import run_cli
found = []
for words in json.loads(sys.stdin.read()):
    sys.argv = ["p3d", *words.split()]
    found.append((words, run_cli(cli), sorted({"torch", "ray"} & sys.modules.keys())))
print(json.dumps(found))
"""


def test_a_wrong_value_is_refused_without_torch_and_ray(tmp_path: Path) -> None:
    """Each mistake has its exit code and a message in a process that has imported neither."""
    (tmp_path / "v").mkdir()
    for name in ("v/a.mp4", "w.pth", "w.bin"):
        (tmp_path / name).write_bytes(b"x")
    ran = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=tmp_path,
        input=json.dumps(MISTAKES),
        capture_output=True,
        text=True,
        check=True,
    )
    found = [tuple(one) for one in json.loads(ran.stdout)]
    assert [words for words, *_ in found] == list(MISTAKES)
    assert [one for one in found if one[1] not in (2, 4) or one[2]] == [], ran.stderr
    assert "Traceback" not in ran.stderr and not (tmp_path / "out").exists()
