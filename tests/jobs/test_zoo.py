"""The table of docs/reference/failure-reasons.md: in a real job over the zoo, each file ends with its reason.

One job reads every case (tests/zoo/cases.py). Faults that no file can cause are injected into its processes.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from p3d.pipeline.clips.rules import parse_sampling
from p3d.pipeline.decode.messages import decode_messages
from p3d.pipeline.errors import REASON_MEANING, Reason
from p3d.pipeline.sources.listing import find
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.storage.urls import open_store
from p3d.pipeline.types import Failure, FrameSpec, VideoRef
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests.conftest import REPO, Ran, p3d
from tests.s3.proxy import Fault, proxy
from tests.zoo import cases, plants

TABLE = (REPO / "docs" / "reference" / "failure-reasons.md").read_text()
REASONS = re.findall(r"^\| `(\w+)` \|", TABLE, re.M)
TIMEOUT_S = 8
CALM = ("--batch-size", 2, "--video-timeout", TIMEOUT_S, "--max-decode-memory", 400 * 1024**2)


class Zoo:
    """A job over the zoo, and the rows or failure of each file."""

    def __init__(self, out: Path, ran: Ran) -> None:
        self.out, self.ran = out, ran
        self.rows = {row["path"]: row for path in (out / "videos").glob("*") for row in pq.read_table(path).to_pylist()}
        self.failures = {
            row["path"]: row for path in (out / "failures").glob("*") for row in pq.read_table(path).to_pylist()
        }


def last_message(video: VideoRef, scratch: Path, options: StoreOptions) -> object:
    """The last message of one decode, in this process."""
    spec, sampling = FrameSpec(crop_hw=(64, 64), resize_hw=(72, 108)), parse_sampling("every:16", clip_frames=16)
    rules = {"policy": DecodePolicy(), "limits": DecodeLimits()}
    return list(decode_messages(video, spec, sampling, **rules, store_options=options, scratch=scratch))[-1]  # type: ignore[arg-type]


def said(message: object) -> str:
    return message.reason if isinstance(message, Failure) else type(message).__name__


def denied(tmp_path: Path, _: pytest.FixtureRequest) -> str:
    """Decode a file of mode 000 as a user other than root, who could read it."""
    (tmp_path / "v").mkdir()
    cases.good(tmp_path / "v" / "shut.mp4").chmod(0)
    (row,) = find(str(tmp_path / "v"), StoreOptions()).videos.to_pylist()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        answer = "nothing"
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            answer = said(last_message(VideoRef(**row), tmp_path, StoreOptions()))
        finally:
            os.write(writing, answer.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def corrupt(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Decode an object of which the same byte is flipped in every response."""
    server: dict[str, str] = request.getfixturevalue("s3_server")
    bucket: str = request.getfixturevalue("bucket")
    with proxy(server) as front:
        options = StoreOptions(endpoint_url=front.env["AWS_ENDPOINT_URL"])
        open_store(f"s3://{bucket}", options).create("v/good.mp4", cases.good(tmp_path / "good.mp4").read_bytes())
        (row,) = find(f"s3://{bucket}/v", options).videos.to_pylist()
        front.faults = [Fault("flip", method="GET", key="good.mp4", at=100)]
        return said(last_message(VideoRef(**row), tmp_path, options))


# reasons that a job over local files cannot have
SOURCE_REASONS = {Reason.SOURCE_DENIED: denied, Reason.SOURCE_CORRUPT: corrupt}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, small_weights: Path) -> Zoo:
    root = tmp_path_factory.mktemp("zoo")
    source = cases.build(root / "files")
    (source / "other\x1b[2J.txt").touch()
    words = ("launch", source, root / "out", "--weights", small_weights, "--max-failures", "100%", *CALM)
    return Zoo(root / "out", p3d(*words, env=plants.environment(root / "plants")))


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.fault(11, 12, 13, 14, 16, 19, 20, 21, 22, 25, 26, 31)
def test_every_reason_of_the_table_has_a_file_that_ends_in_it(
    reason: str, zoo: Zoo, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Each row of the table has a case that a real decode, nearly always of a real job, ends with that reason."""
    if reason in SOURCE_REASONS:
        assert SOURCE_REASONS[reason](tmp_path, request) == reason
        return
    mine = [case for case in cases.CASES if case.reason == reason]
    assert mine, f"no case of tests/zoo/cases.py ends in {reason}"
    for case in mine:
        assert case.name in zoo.failures, f"{case.name} has rows: {zoo.ran.err}"
        row = zoo.failures[case.name]
        assert row["reason"] == reason, (case.name, row)
        assert row["detail"] and len(row["detail"].splitlines()) == 1


def test_the_table_is_the_closed_set() -> None:
    """The table, the set of reasons and the cases agree."""
    assert REASONS == [str(reason) for reason in Reason] == [str(reason) for reason in REASON_MEANING]
    assert {case.reason for case in cases.CASES} - {None} == set(Reason) - SOURCE_REASONS.keys()


@pytest.mark.fault(13, 14, 16, 17, 18, 24)
def test_no_good_video_is_lost(zoo: Zoo) -> None:
    """All other files of the zoo have rows, despite crashes, hangs and memory use; the exit code shows the failures."""
    good = {case.name for case in cases.CASES if case.reason is None}
    assert zoo.rows.keys() == good
    assert zoo.failures.keys() == {case.name for case in cases.CASES} - good
    assert zoo.ran.code == 1  # one is `internal`: a defect
    found = p3d("verify", zoo.out, "--deep", "--json").json
    assert (found["ok"], found["failed"], found["pending"]) == (len(good), len(cases.CASES) - len(good), 0)
    assert not found["damaged"]
    assert zoo.rows["many_streams.mov"]["stream_index"] == 0
    assert zoo.rows["turned.mp4"]["rotation"] == 270
    short = [row for path in (zoo.out / "clips").glob("*") for row in pq.read_table(path).to_pylist()]
    padded = {row["path"]: row["n_padded"] for row in short if row["n_padded"]}
    assert padded == {"one_frame.mp4": 15, "short.mp4": 11, "moving.gif": 4, "many_streams.mov": 15}


@pytest.mark.fault(12, 13, 14)
def test_details_of_failures_name_the_cause(zoo: Zoo) -> None:
    """The detail of a crash names the signal, that of a hang its deadline, that of excess memory both amounts."""
    assert "Segmentation fault" in zoo.failures["crash.mp4"]["detail"]
    assert zoo.failures["hang.mp4"]["detail"] == f"gave no frame for {TIMEOUT_S} s and was stopped"
    memory = re.search(r"took (\d+) MiB, the limit is 400", zoo.failures["memory.mp4"]["detail"])
    assert memory is not None and 400 <= int(memory[1]) < 2000
    assert zoo.failures["memory.mp4"]["attempts"] == 1


@pytest.mark.fault(51)
def test_names_and_details_of_failures_cannot_control_a_terminal(zoo: Zoo) -> None:
    """The output of each verb has no control characters but newlines, and no newline of a name. Names are escaped."""
    ran = {"launch": zoo.ran} | {verb: p3d(verb, zoo.out) for verb in ("failures", "status", "verify")}
    for verb, said in ran.items():
        shown = said.out + said.err
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]|\nFAKE", shown), verb
        assert "raylet" not in shown, "Ray prints errors of the cluster on stdout, where --json writes too"
    counts = Counter(row["reason"] for row in zoo.failures.values())
    printed = ran["failures"].out
    assert "\\x1b[31m" in printed
    assert all(re.search(rf"^{count} {reason}:", printed, re.M) for reason, count in counts.items())
