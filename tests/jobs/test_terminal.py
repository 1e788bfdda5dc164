"""Text from outside reaches a terminal escaped, whichever record it stands in; any name of an output or a row works."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import sys
import tempfile
import threading
import unicodedata
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from p3d.jobs.cli.output import _say_warnings, escape, escape_all, escape_hooks, json_text, say
from p3d.jobs.job import read_job, stored_weights
from p3d.jobs.monitor.status import read_status, render
from p3d.jobs.scheduler.cluster import _quiet_start
from p3d.jobs.scheduler.metrics import Metrics, output_tag
from p3d.jobs.scheduler.state import ShardDone
from p3d.pipeline.dataset.commit import commit_shard
from p3d.pipeline.dataset.plans import Manifest, write_plan
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.dataset.totals import ShardKey
from p3d.pipeline.errors import StrayFile
from p3d.pipeline.recipe import JobRecord, RunOptions, ShardSizing
from p3d.pipeline.storage.local import LocalStore
from tests.jobs.test_cli import in_process
from tests.pipeline.rows import recipe, shard_rows, videos

EVIL = (
    "\x1b[2J",
    "\x1b]0;title\x07",
    "\x9b31m",
    "\r",
    "\n",
    "\x7f",
    "\x00",
    "\u202e",
    "\u2028",
    "[red]",
    "[/]",
    "[link=x]",
)
HOSTILE = st.lists(st.sampled_from((*EVIL, "a", "é", "日本", "\\", " ")), min_size=1, max_size=5).map("".join)
NAMES = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=40).filter(lambda name: name.strip("."))
UNSHOWN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def refused(text: str) -> set[str]:
    """The characters of an output that no terminal may get; a line feed only ends lines of our own."""
    return {one for one in text if one != "\n" and unicodedata.category(one) in UNSHOWN}


@given(st.text(st.characters() | st.sampled_from("".join(EVIL))))
def test_escaped_text_is_printable_and_stays_as_it_is(text: str) -> None:
    """No control, direction or line character is left; all else is unchanged; escaping again changes nothing."""
    shown = escape(text)
    assert not refused(shown) and "\n" not in shown and escape(shown) == shown
    assert [one for one in text if one.isprintable()] == [one for one in text if one in shown and one.isprintable()]
    assert escape_all({text: [text, (text, 1)]}) == {shown: [shown, (shown, 1)]}
    assert not refused(json_text({text: text})) and json.loads(json_text({text: text})) == {text: text}


def hostile_output(root: Path, texts: list[str]) -> LocalStore:
    """An output with a text from `texts` in each string of its records and rows, as far as it is read at all."""
    at = iter(range(10**6))

    def evil() -> str:
        return texts[next(at) % len(texts)]

    store = LocalStore(str(root / "out"))
    store.create("job.json", JobRecord(recipe(), evil(), {evil(): evil(), "p3d": evil()}).to_json())
    names = [f"{evil()}{number}" for number in range(4)]
    table = videos(names)
    for column in ("path", "uri", "label"):
        held = [f"{'file:///' if column == 'uri' else ''}{evil()}{number}" for number in range(4)]
        table = table.set_column(table.schema.get_field_index(column), column, pa.array(held))
    table = table.rename_columns([evil() if name == "label" else name for name in table.column_names])
    manifest = Manifest(store, write_plan(store, 1, recipe(), with_shards(table, ShardSizing(2)), 0, ShardSizing()))
    rows = shard_rows(manifest, 0)
    done = []
    for outcome in rows.outcomes:
        info = outcome.info and replace(outcome.info, codec=evil(), container=evil(), route=evil())
        failure = outcome.failure and replace(outcome.failure, detail=evil())
        done.append(replace(outcome, info=info, failure=failure))
    stats = {"host": evil(), "device": evil(), "worker": evil(), "software": {"av": evil()}, "encode_s": 1.0}
    stats |= {"pid": 1, "ended": "2026-01-02T03:04:05+00:00", "shard_s": 1.0, "wait_s": 0.0, "videos": 2, "failed": 1}
    stats |= {"clips": 3, "batch_size": evil(), "threads": evil()}
    commit_shard(store, replace(rows, outcomes=tuple(done), stats=stats), recipe(), manifest.user_columns(0))
    options = RunOptions(1, 1, 1, 1).to_dict()
    epoch = {name: evil() for name in ("host", "boot_id", "started", "token", "user")}
    epoch |= {"number": 1, "pid": 1, "options": options | {"device": evil()}}
    store.create("_job/epochs/000001.json", json.dumps(epoch).encode())
    worker = {"worker": 1, "videos": 1, "clips": 1, "shards": [evil()], "limit": "network"}
    worker |= {name: evil() for name in ("device", "host")} | {"state": "busy"}
    worker["load"] = {"inference_threads": 0.5, "decoding": 0.5, "decode_concurrency": 2, "queued": 1, "limit": evil()}
    beat: dict[str, Any] = {"schema_version": 1, "counter": 1, "outage": evil(), "sentence": evil(), "exit_code": 6}
    beat |= {"elapsed_s": 1.0, "clips": 5, "clips_per_s": 1.0, "eta_s": 1.0, "shards": {"done": 1, "all": 2}}
    beat |= {"videos": {"all": 4, "done": 2, "failed": 1}, "failures": {evil(): 1}, "workers": [worker]}
    store.create("_job/heartbeats/000001.json", json.dumps({**beat, "state": texts[0]}).encode())
    store.create("_job/logs/000001.log", "\n".join(texts).encode(errors="surrogatepass"))
    submitted = {"where": evil(), "name": evil(), "after": 1}
    store.create("_job/submitted.json", json.dumps(submitted).encode())
    return store


@settings(max_examples=12)
@given(st.lists(HOSTILE, min_size=5, max_size=30), st.booleans())
def test_no_verb_prints_a_control_character_of_an_output(texts: list[str], runs: bool) -> None:
    """Hostile text in every string of heartbeat, epoch, log, job.json, plans and rows: each verb prints it escaped."""
    with tempfile.TemporaryDirectory() as folder:
        store = hostile_output(Path(folder), texts)
        beat = store.root / "_job/heartbeats/000001.json"
        if runs:
            beat.write_text(json.dumps({**json.loads(beat.read_bytes()), "state": "running"}))
        first = videos(["x"])["video_id"][0].as_py()
        for words in (
            *(["status", store.url, *more] for more in ([], ["--json"])),
            *(["failures", store.url, *more] for more in ([], ["--json"], ["--csv"])),
            *(["jobs", "list", folder, *more] for more in ([], ["--json"])),
            ["jobs", "logs", store.url],
            ["jobs", "trace", store.url, "-o", "-"],
            *(["verify", store.url, *more] for more in ([], ["--json"], ["--deep"])),
            *(["search", store.url, texts[0] + "0", *more] for more in ([], ["--json"], ["--level", "clip"])),
            ["search", store.url, first, "--where", f"{texts[0]}=1"],
            ["results", "dedup", store.url],
            ["results", "report", store.url, "-o", f"{folder}/report.html"],
            ["results", "snapshot", store.url, f"{folder}/dest", "--skip-pending"],
            ["verify", f"{folder}/dest"],
            ["cancel", store.url],
            ["resume", store.url],
            ["trust", store.url],
            ["failures", store.url, texts[0]],
            *(["status", store.url, f"{folder}/{texts[0]}".replace("\0", ""), *more] for more in ([], ["--json"])),
            *([verb, folder] for verb in ("status", "verify")),
            ["verify", store.url, f"{folder}/dest"],
            ["search", folder, first, "--also", f"{folder}/dest"],
            ["results", "export", store.url, f"{folder}/npy", "--skip-pending"],
            ["status", f"{folder}/{texts[0]}".replace("\0", "")],
        ):
            _, out, err = in_process(*words)
            lines = "\r\n" if "--csv" in words else "\n"  # RFC 4180 ends lines of CSV by both
            assert not refused(out.replace(lines, "\n")), (words, out)
            assert not refused(err) and "Traceback" not in err, (words, err)


def test_text_of_an_output_is_not_markup(tmp_path: Path) -> None:
    """Rich shows brackets as they are, also in the table of workers, and sets neither colours nor links for them."""
    text = "[red]x[/red][link=file:///etc/passwd]y[/link][/]"
    store = hostile_output(tmp_path, [text])
    beat = store.root / "_job/heartbeats/000001.json"
    beat.write_text(json.dumps({**json.loads(beat.read_bytes()), "state": "running"}))
    shown = io.StringIO()
    console = Console(file=shown, width=400, force_terminal=True, color_system="truecolor", highlight=False)
    console.print(render(read_status(store, read_job(store)), width=400, escape=escape_all))
    assert shown.getvalue().count(text) == 5  # weights, device, shard, failures, outage
    assert "\x1b]8" not in shown.getvalue()


@settings(max_examples=30)
@given(NAMES)
def test_any_name_of_an_output_has_metrics_and_a_status(name: str) -> None:
    """Ray accepts the tag of any output, names of two outputs give two tags, and status shows the name."""
    tag = output_tag(f"/x/{name}")
    assert tag.isascii() and tag.isprintable() and len(tag) <= 49 and tag != output_tag(f"/y/{name}")
    metrics = Metrics(f"/x/{name}")
    metrics.hear(ShardDone(0, ShardKey(1, 0), 4, 9, (("truncated", 1),)))
    metrics.begin(ShardKey(1, 0))
    with tempfile.TemporaryDirectory() as folder:
        try:
            Path(folder, name).mkdir()
        except (OSError, UnicodeEncodeError):
            return  # not a name here: too long, or not in the file system's encoding
        store = LocalStore(f"{folder}/{name}")
        store.create("job.json", JobRecord(recipe(), "random:0", {}).to_json())
        code, out, err = in_process("status", f"{folder}/{name}")
        assert (code, err) == (0, "") and not refused(out)


@settings(max_examples=20)
@given(st.lists(NAMES, min_size=4, max_size=4, unique=True), NAMES)
def test_any_names_of_videos_and_columns_are_data(names: list[str], column: str) -> None:
    """Ids, paths and the user's columns may have any Unicode name: rows are committed, found, verified and copied."""
    names = [name.encode(errors="replace").decode() for name in names]
    column = column.encode(errors="replace").decode()
    table = videos(names)
    if len(set(names)) < 4 or column in table.column_names or "\n" in "".join(names):
        return
    table = table.rename_columns([column if name == "label" else name for name in table.column_names])
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(f"{folder}/out")
        store.create("job.json", JobRecord(recipe(), "random:0", {}).to_json())
        manifest = Manifest(store, write_plan(store, 1, recipe(), with_shards(table, ShardSizing(4)), 0, ShardSizing()))
        rows = shard_rows(manifest, 0, frames=(40, 16, 33, 64))
        commit_shard(store, rows, recipe(), manifest.user_columns(0))
        assert in_process("verify", store.url, "--deep")[0] == 0
        assert in_process("results", "snapshot", store.url, f"{folder}/dest")[0] == 0
        # a name may begin with a dash
        found = in_process("search", "--json", "--", f"{folder}/dest", f"{names[0]}.mp4")
        assert json.loads(found[1])["hits"], found


def test_an_output_whose_name_is_not_utf8_is_an_output(tmp_path: Path, small_weights: Path) -> None:
    """Rows are written, verified, copied, indexed and searched there, and its weights load, for libraries of UTF-8."""
    store = LocalStore(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\x1b[31m"))
    content = small_weights.read_bytes()
    chosen = recipe(weights_sha256=hashlib.sha256(content).hexdigest())
    store.create("job.json", JobRecord(chosen, "random:0", {}).to_json())
    store.create(f"weights/{chosen.weights_sha256}.safetensors", content)
    manifest = Manifest(
        store, write_plan(store, 1, chosen, with_shards(videos("abcd"), ShardSizing(4)), 0, ShardSizing())
    )
    commit_shard(store, shard_rows(manifest, 0, frames=(40, 16)), chosen, manifest.user_columns(0))
    assert stored_weights(store, chosen).name == "p3d-demo"
    for words in (
        ["verify", store.url, "--deep"],
        ["results", "snapshot", store.url, f"{store.url}-copy"],
        ["verify", f"{store.url}-copy"],
        ["results", "index", store.url],
        ["search", store.url, "a@0s", "--index"],
        ["search", f"{store.url}-copy", "a"],
        ["results", "report", store.url, "-o", str(tmp_path / "r.html")],
    ):
        code, out, err = in_process(*words)
        assert code == 0 and not refused(out + err), (words, err)


def test_ray_gets_a_command_line_that_it_can_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is not UTF-8 among the arguments does not end `ray.init`; Ray's own function is put back."""
    import ray._private.utils as of_ray

    monkeypatch.setattr(of_ray, "list2cmdline", lambda words: "p3d launch \udce9 \x1b[31m")
    true = of_ray.get_entrypoint_name
    with _quiet_start():
        assert of_ray.get_entrypoint_name().encode() == rb"p3d launch \udce9 \x1b[31m"
    assert of_ray.get_entrypoint_name is true


KINDS = [StrayFile, UserWarning, RuntimeWarning, DeprecationWarning, pytest.PytestWarning]


@given(HOSTILE, st.sampled_from(KINDS), st.booleans())
def test_no_warning_controls_a_terminal(text: str, kind: type[Warning], as_object: bool) -> None:
    """Whatever its category, a warning is printed escaped, and its text begins no line of its own."""
    shown = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(shown):
        warnings.simplefilter("always")
        _say_warnings()
        for _ in range(2):
            warnings.warn(kind(text) if as_object else text, kind, stacklevel=1)
    said = shown.getvalue()
    assert not refused(said) and escape(text) in said
    assert said.count("\n") == (1 if kind is StrayFile else 4)  # of others also the line of code


@given(HOSTILE)
def test_neither_a_log_record_nor_an_error_of_a_thread_controls_a_terminal(text: str) -> None:
    """Records of libraries and uncaught errors, of threads and destructors too, are printed escaped."""

    class Bad:
        def __del__(self) -> None:
            raise ValueError(text)

    def fails(*_: object) -> None:
        raise ValueError(text)

    held = sys.excepthook, threading.excepthook, sys.unraisablehook, logging.getLogRecordFactory()
    shown = io.StringIO()
    try:
        escape_hooks()
        with contextlib.redirect_stderr(shown):
            handler = logging.StreamHandler(shown)
            log = logging.Logger("library")
            log.addHandler(handler)
            log.warning("%s and %d", text, 1)
            log.warning("%d " + text.replace("%", ""), "x")  # a wrong format, whose report is of logging itself
            try:
                fails()
            except ValueError:
                log.exception(text)
            thread = threading.Thread(target=fails)
            thread.start()
            thread.join()
            Bad()
    finally:
        sys.excepthook, threading.excepthook, sys.unraisablehook = held[:3]
        logging.setLogRecordFactory(held[3])
    assert not refused(shown.getvalue()) and shown.getvalue().count("Traceback") >= 3


def test_messages_that_nobody_can_read_end_nothing(monkeypatch: Any) -> None:
    """A message on a closed pipe, a full disk or a closed stream is dropped."""

    def fails(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("click.echo", fails)
    say("x")
