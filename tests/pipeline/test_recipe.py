"""Recipe, plan and run records: they survive a round trip, and anything else is refused with its name."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p3d.pipeline.errors import DamagedJob, InputError, OtherRecipe
from p3d.pipeline.recipe import (
    DTYPES,
    POOLS,
    PRECISIONS,
    SHOWN,
    JobRecord,
    MaxFailures,
    PartRecord,
    PlanRecord,
    Recipe,
    RunOptions,
    ShardSizing,
    digest,
)
from p3d.pipeline.types.policy import Decoder, Partial
from tests.pipeline.rows import recipe

small = st.integers(1, 10_000)
hexes = st.text("0123456789abcdef", min_size=64, max_size=64)
sizes = st.tuples(st.integers(1, 400), st.integers(1, 400))


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any recipe that is allowed."""
    crop_hw = draw(sizes)
    by_side = draw(st.booleans())
    return Recipe(
        model=draw(st.text(max_size=8)),
        graph=draw(st.sampled_from(["caffe", "paper"])),
        weights_sha256=draw(hexes),
        feature_dim=draw(small),
        clip_frames=draw(small),
        resize_hw=None if by_side else (crop_hw[0] + draw(st.integers(0, 9)), crop_hw[1] + draw(st.integers(0, 9))),
        short_side=max(crop_hw) + draw(st.integers(0, 9)) if by_side else None,
        crop_hw=crop_hw,
        clips=draw(st.sampled_from(["every:{}", "uniform:{}", "spread:{}", "random:{}@7"])).format(draw(small)),
        frame_step=draw(small),
        fps=draw(st.none() | st.floats(0.1, 240)),
        decoder=draw(st.sampled_from(get_args(Decoder))),
        partial=draw(st.sampled_from(get_args(Partial))),
        precision=draw(st.sampled_from(PRECISIONS)),
        pool=draw(st.sampled_from(POOLS)),
        embedding_dtype=draw(st.sampled_from(DTYPES)),
        num_classes=draw(small),
        scores=draw(st.booleans()),
    )


parts = st.builds(PartRecord, st.text(max_size=8), hexes, small, small, small)
plans = st.builds(PlanRecord, small, hexes, hexes, small, small, small, small, st.lists(parts, max_size=3).map(tuple))
limits = st.one_of(
    st.just(MaxFailures()),
    st.builds(MaxFailures, count=st.integers(0)),
    st.builds(MaxFailures, percent=st.floats(0, 100)),
)
runs = st.builds(
    RunOptions,
    workers=small,
    batch_size=small,
    threads=st.integers(1, 1024),
    decode_tasks=small,
    device=st.sampled_from(["auto", "cpu", "cuda"]),
    video_timeout_s=st.floats(0.1, 1e6),
    max_failures=limits,
)


# --- round trips ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.one_of(recipes(), plans, runs, limits, parts))
def test_every_record_comes_back_from_json(record: Any) -> None:
    """Through JSON text and back every record is equal to itself, tuples and nested records included."""
    back = type(record).from_dict(json.loads(json.dumps(record.to_dict())))
    assert back == record and hash(back) == hash(record)


@settings(deadline=None, max_examples=40)
@given(recipes(), st.text(max_size=20), st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3))
def test_a_job_record_comes_back(chosen: Recipe, origin: str, versions: dict[str, str]) -> None:
    """job.json returns the recipe, the origin of the weights and the versions."""
    job = JobRecord(chosen, origin, versions)
    assert JobRecord.from_json(job.to_json(), "OUT") == job
    assert json.loads(job.to_json())["recipe_digest"] == chosen.digest


RECORDS = {
    "Recipe": recipe(),
    "PartRecord": PartRecord("manifest-00000.parquet", "0" * 64, 1, 0, 1),
    "PlanRecord": PlanRecord(1, "0" * 64, "1" * 64, 1, 1, 10, 0, (PartRecord("m", "0" * 64, 1, 0, 1),), ShardSizing()),
    "RunOptions": RunOptions(1, 4, 1, 2, max_failures=MaxFailures(count=3)),
    "MaxFailures": MaxFailures(percent=5.0),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.fault(47)
def test_an_unknown_key_is_refused(name: str) -> None:
    """A key of another version, or a secret added by mistake, is refused by its name; its value is not repeated."""
    record = RECORDS[name]
    with pytest.raises(InputError, match=f"{name}: unknown keys: aws_secret_access_key ") as caught:
        type(record).from_dict(record.to_dict() | {"aws_secret_access_key": "canary"})
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key"),
    [(name, key) for name, record in RECORDS.items() for key in record.to_dict() if key != "sizing"],
)
def test_a_missing_key_is_refused(name: str, key: str) -> None:
    """No key has a default: each missing key is refused by its name."""
    given = RECORDS[name].to_dict()
    del given[key]
    with pytest.raises(InputError, match=f"missing keys: {key} "):
        type(RECORDS[name]).from_dict(given)


def test_a_plan_of_an_early_program_has_no_sizing() -> None:
    """Its shards had 64 videos, which is what the record then says."""
    given = RECORDS["PlanRecord"].to_dict()
    del given["sizing"]
    assert PlanRecord.from_dict(given).sizing == ShardSizing(64)


def test_nested_records_are_strict_too() -> None:
    """Unknown keys inside a plan's part or a run's limits are refused."""
    plan, run = RECORDS["PlanRecord"].to_dict(), RECORDS["RunOptions"].to_dict()
    plan["parts"][0]["odd"] = run["max_failures"]["odd"] = 1
    with pytest.raises(InputError, match=r"PartRecord: unknown keys: odd "):
        PlanRecord.from_dict(plan)
    with pytest.raises(InputError, match=r"MaxFailures: unknown keys: odd "):
        RunOptions.from_dict(run)


# --- digest and comparison --------------------------------------------------------------------------------------------

# one field each, and another value that is allowed
OTHER: dict[str, dict[str, Any]] = {
    "model": {"model": "p3d199"},
    "graph": {"graph": "paper"},
    "weights_sha256": {"weights_sha256": "1" * 64},
    "feature_dim": {"feature_dim": 9},
    "clip_frames": {"clip_frames": 8},
    "resize_hw": {"resize_hw": (182, 243)},
    "short_side": {"short_side": 200, "resize_hw": None},
    "crop_hw": {"crop_hw": (160, 159)},
    "clips": {"clips": "every:8"},
    "frame_step": {"frame_step": 2},
    "fps": {"fps": 25.0},
    "decoder": {"decoder": "pyav"},
    "partial": {"partial": "keep"},
    "pool": {"pool": "max"},
    "embedding_dtype": {"embedding_dtype": "float16"},
    "precision": {"precision": "bf16"},
    "num_classes": {"num_classes": 4},
    "scores": {"scores": True},
}
ONLY_VALUE = {"schema_version"}  # fields with only one allowed value so far


def test_every_field_decides_the_digest() -> None:
    """A recipe with any one field changed has another digest; every field is tested here."""
    assert OTHER.keys() | ONLY_VALUE == {field.name for field in dataclasses.fields(Recipe)}
    digests = [recipe().digest, *(recipe(**change).digest for change in OTHER.values())]
    digests += [digest(recipe().to_dict() | {name: "other"}) for name in ONLY_VALUE]
    assert len(set(digests)) == len(digests)


def test_the_digest_of_this_recipe_never_changes() -> None:
    """The output of an older version can be resumed: the canonical encoding is fixed, whatever the order of keys."""
    assert recipe().digest == "7a68c0d71619991060e189a1481ccadca8a85cdc37ca87f9ea4fbb1d813862b5"
    assert digest(dict(reversed(recipe().to_dict().items()))) == recipe().digest


def test_a_digest_of_nan_is_refused() -> None:
    """A value that JSON cannot represent has no digest."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest({"x": float("nan")})


@settings(deadline=None, max_examples=40)
@given(st.sets(st.sampled_from(sorted(OTHER)), min_size=1))
@pytest.mark.fault(42)
def test_the_fields_that_differ_are_named_and_no_others(names: set[str]) -> None:
    """OtherRecipe gives both values of each field that differs, and names no other field."""
    changes = {key: value for name in sorted(names) for key, value in OTHER[name].items()}  # short_side after resize_hw
    mine, theirs = recipe(), recipe(**changes)
    with pytest.raises(OtherRecipe) as caught:
        mine.refuse_other(theirs, "s3://out")
    text = str(caught.value)
    different = {name for name in mine.to_dict() if getattr(mine, name) != getattr(theirs, name)}
    assert different == changes.keys()
    listed = text.removeprefix("s3://out was made with other settings: ").partition(". Use the same ones")[0]
    assert listed.split("; ") == [
        f"{name} {str(getattr(theirs, name))[:SHOWN]}, not {str(getattr(mine, name))[:SHOWN]}"
        for name in mine.to_dict()
        if name in different
    ]


def test_other_weights_are_named_by_their_origins() -> None:
    """Where both are known and differ, they replace the digests, and a digest in an origin is cut."""
    mine, theirs = recipe(), recipe(weights_sha256="1" * 64)
    for origins, words in (
        (("random:1", "random:0"), "settings: weights random:0, not random:1. Use"),
        (("random:1", f"a.pth, sha256 {'2' * 64}"), "weights a.pth, sha256 22222222..., not random:1. Use"),
        (("random:0", "random:0"), "settings: weights_sha256 "),
        (("random:0", ""), "settings: weights_sha256 "),
    ):
        with pytest.raises(OtherRecipe) as caught:
            mine.refuse_other(theirs, "s3://out", origins)
        assert words in str(caught.value)


def test_an_equal_recipe_is_not_refused() -> None:
    """A recipe read back from JSON is equal."""
    recipe().refuse_other(Recipe.from_dict(json.loads(json.dumps(recipe().to_dict()))), "OUT")


@pytest.mark.parametrize(
    "change",
    [
        {"pool": "median"},
        {"embedding_dtype": "bfloat16"},
        {"decoder": "ffmpeg"},
        {"partial": "maybe"},
        {"precision": "fp8"},
        {"scores": "yes"},
        {"scores": True, "num_classes": 0},
        {"num_classes": -1},
        {"clips": "random:20"},
        {"schema_version": 2},
        {"feature_dim": 0},
        {"weights_sha256": "0" * 63},
        {"weights_sha256": "0" * 64 + "\n"},
        {"weights_sha256": "G" * 64},
        {"clips": "every:0"},
        {"clips": "each:16"},
        {"clip_frames": 0},
        {"frame_step": 0},
        {"fps": 0.0},
        {"short_side": 182},
        {"resize_hw": None},
        {"resize_hw": (159, 242)},
        {"crop_hw": (0, 160)},
    ],
)
def test_an_invalid_recipe_is_refused(change: dict[str, Any]) -> None:
    """Every option is validated when the recipe is made, and the message contains the value."""
    with pytest.raises(InputError, match="|".join(re.escape(str(value).strip()) for value in change.values())):
        recipe(**change)


@pytest.mark.parametrize(
    "name", ["workers", "batch_size", "threads", "decode_tasks", "video_timeout_s", "shard_attempts"]
)
@pytest.mark.parametrize("value", [0, -1])
def test_a_run_of_nothing_is_refused(name: str, value: int) -> None:
    """Counts and times of a run must be more than 0."""
    given = {"workers": 1, "batch_size": 4, "threads": 1, "decode_tasks": 2} | {name: value}
    with pytest.raises(InputError, match=f"{name} must be (more than 0|at least 1), not {value}"):
        RunOptions(**given)  # type: ignore[arg-type] # numbers


# --- job.json ---------------------------------------------------------------------------------------------------------

JOB = JobRecord(recipe(), "random:0", {"torch": "2.6"})


@pytest.mark.parametrize("name", sorted(OTHER))
@pytest.mark.fault(44)
def test_an_edited_recipe_is_damage(name: str) -> None:
    """A recipe in job.json that was edited by hand is detected by its digest."""
    given = json.loads(JOB.to_json())
    given["recipe"] |= OTHER[name]
    with pytest.raises(DamagedJob, match=r"OUT/job\.json was edited"):
        JobRecord.from_json(json.dumps(given).encode(), "OUT")


@pytest.mark.fault(44)
def test_a_flipped_bit_of_job_json_never_gives_another_recipe() -> None:
    """Whichever bit of job.json flips: it is DamagedJob, or the recipe is still the one that was written."""
    content, damaged = JOB.to_json(), 0
    for at in range(len(content)):
        for bit in range(8):
            flipped = content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
            try:
                assert JobRecord.from_json(flipped, "OUT").recipe == JOB.recipe
            except DamagedJob:
                damaged += 1
    assert damaged > 7 * len(content)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"{}", b"[]", b"null", b'{"recipe": {}}', JOB.to_json()[:-20]],
)
def test_a_job_json_that_cannot_be_read_is_damage(content: bytes) -> None:
    """Any other content is DamagedJob, with the location and a remedy."""
    with pytest.raises(DamagedJob, match=r"s3://out/job\.json cannot be read .*restore it, or start at another output"):
        JobRecord.from_json(content, "s3://out")


@pytest.mark.parametrize("key", ["recipe", "recipe_digest", "weights_origin", "versions"])
def test_a_job_json_without_a_key_is_damage(key: str) -> None:
    """A key that is missing is named."""
    given = json.loads(JOB.to_json())
    del given[key]
    with pytest.raises(DamagedJob, match=key):
        JobRecord.from_json(json.dumps(given).encode(), "OUT")


@pytest.mark.parametrize("odd", [5, [], "text", None])
def test_a_job_json_of_another_shape_is_damage(odd: Any) -> None:
    """A recipe that is not a JSON object is DamagedJob too, not a traceback."""
    given = json.loads(JOB.to_json()) | {"recipe": odd}
    with pytest.raises(DamagedJob):
        JobRecord.from_json(json.dumps(given).encode(), "OUT")


# --- --max-failures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, MaxFailures()),
        ("0", MaxFailures(count=0)),
        ("25", MaxFailures(count=25)),
        (" 25 ", MaxFailures(count=25)),
        ("007", MaxFailures(count=7)),
        ("0%", MaxFailures(percent=0.0)),
        ("5%", MaxFailures(percent=5.0)),
        ("2.5%", MaxFailures(percent=2.5)),
        ("100%", MaxFailures(percent=100.0)),
        ("100.0%", MaxFailures(percent=100.0)),
    ],
)
def test_a_limit_is_a_count_or_a_share(text: str | None, expected: MaxFailures) -> None:
    """25 is a count, 5% a share, nothing the default rule; count and share are never both set."""
    assert MaxFailures.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    "|%|-1|+1|2.5|1e3|5 %|5%%|%5|101%|100.01%|-5%|.5%|5.%|nan%|many|\u0665|5\uff05|1,000|1_000|0x10|5\n6".split("|"),
)
def test_any_other_limit_is_refused(text: str) -> None:
    """The message shows both forms and what was given."""
    with pytest.raises(
        InputError, match=rf"a number \(25\) or a share of the videos \(5%\), not {re.escape(repr(text))}"
    ):
        MaxFailures.parse(text)


@given(st.text(st.sampled_from("0123456789.%- e"), max_size=8))
def test_a_limit_is_parsed_or_refused(text: str) -> None:
    """Any text is either a valid limit or an InputError."""
    try:
        limit = MaxFailures.parse(text)
    except InputError:
        return
    assert (limit.count is None) != (limit.percent is None)
    assert (limit.count or 0) >= 0 and 0 <= (limit.percent or 0) <= 100
