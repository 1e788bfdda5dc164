"""A reader of the format page that uses nothing of p3d agrees with `p3d verify --deep` about any output."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p3d.jobs.job import read_job, rows_of
from p3d.pipeline.clips.pool import POOLS
from p3d.pipeline.dataset.commit import commit_shard, derive
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.plans import Manifest, load_plans, write_plan
from p3d.pipeline.dataset.roots import RootRecord, add_root
from p3d.pipeline.dataset.schema import write_parquet
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.dataset.snapshot import snapshot
from p3d.pipeline.dataset.snapshot_record import problems_of, read_snapshot
from p3d.pipeline.dataset.verify import audit
from p3d.pipeline.errors import JobError
from p3d.pipeline.recipe import JobRecord, ShardSizing, digest
from p3d.pipeline.storage.local import LocalStore
from tests.compat.build import unpack
from tests.conftest import REPO
from tests.format import reader
from tests.pipeline.rows import CLASSES, planned, recipe, shard_rows, videos

SEEDS = int(os.environ.get("P3D_FORMAT", "40"))
PAGE = REPO / "docs" / "reference" / "format.md"
CODES = {"complete": 0, "retried": 0, "scores": 0, "snapshot": 0, "killed": 6}
FOLDERS = ("clips", "videos", "failures")
Damage = Callable[[Path, Random], str]  # damages the output of a folder, and says which file


def build(root: Path, rng: Random) -> Path:
    """An output of one to three plans, by the writers of p3d, or a snapshot of one. Some shards are pending."""
    store, content = LocalStore(str(root / "out")), rng.randbytes(40)
    scores, name = rng.random() < 0.3, sha256(content).hexdigest()
    dtype, pool = rng.choice(["float32", "float16"]), rng.choice(POOLS)
    chosen = recipe(weights_sha256=name, pool=pool, embedding_dtype=dtype, scores=scores)
    store.create(f"weights/{name}.safetensors", content)
    store.create(
        "job.json", JobRecord(chosen, "random:0", {"python": "3"}, rng.choice(["", rng.randbytes(16).hex()])).to_json()
    )
    whole = rng.random() < 0.6
    for seq in range(1, rng.choice([2, 2, 3, 4])):
        names = rng.sample("abcdefghijé", rng.randint(1, 7))
        table = videos(names)
        if rng.random() < 0.4:  # values whose canonical text or comparison is special
            table = table.append_column("when", pa.array([2**60 + at for at in range(len(names))], pa.timestamp("ns")))
            table = table.append_column(
                "weight",
                pa.array([float("nan"), *[None, *map(float, names[2:] and [0.1] * 9)][: len(names) - 1]], pa.float64()),
            )
        manifest = Manifest(
            store, write_plan(store, seq, chosen, with_shards(table, ShardSizing(rng.randint(1, 4))), 0, ShardSizing())
        )
        for shard in range(manifest.plan.n_shards):
            if whole or rng.random() < 0.7:
                frames = rng.choices([0, 9, 16, 40, 70], k=5)
                n_scores = CLASSES if scores else 0
                rows = shard_rows(manifest, shard, seed=rng.getrandbits(30), frames=frames, n_scores=n_scores)
                commit_shard(store, rows, chosen, manifest.user_columns(shard))
                if not whole and rng.random() < 0.2:
                    (store.root / f"{rng.choice(FOLDERS[1:])}/{rows.shard.name}.parquet").unlink()
    for at in range(1, rng.choice([1, 1, 2, 3])):
        record = RootRecord(at, f"file:///v{at}", f"s3://b/{at}", at, rng.choice(["version", "size"]), "2026", 1)
        add_root(store, record)
    if whole and rng.random() < 0.3:
        clean = LocalStore(str(root / "clean"))
        snapshot(NewestRows(store, read_job(store)), clean)
        return clean.root
    return store.root


def one_of(out: Path, rng: Random, pattern: str = "**/*") -> Path:
    """A file of the output, a data file if there is one."""
    found = sorted(path for path in out.glob(pattern) if path.is_file() and "_job" not in path.parts)
    return rng.choice(found or sorted(out.glob("*.json")))


def flip(out: Path, rng: Random) -> str:
    path = one_of(out, rng)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return str(path)


def cut(out: Path, rng: Random) -> str:
    path = one_of(out, rng)
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    return str(path)


def remove(out: Path, rng: Random) -> str:
    (path := one_of(out, rng)).unlink()
    return str(path)


def swap(out: Path, rng: Random) -> str:
    one = one_of(out, rng, "**/*.parquet")
    other = one_of(out, rng, rng.choice([f"{one.parent.name}/*", "**/*"]))
    held = one.read_bytes(), other.read_bytes()
    other.write_bytes(held[0])
    one.write_bytes(held[1])
    return f"{one} and {other}"


def extra(out: Path, rng: Random) -> str:
    path = one_of(out, rng, "**/*.parquet")
    other = path.with_name(rng.choice(["00000000-000000000.parquet", "more.parquet", f"{path.name}.tmp", "note.txt"]))
    other.write_bytes(path.read_bytes())
    return str(other)


def edit(out: Path, rng: Random) -> str:
    """Change, add or remove one value of a record, sometimes with its digests made right again."""
    path = one_of(out, rng, rng.choice(["*.json", "plans/*.json", "roots/*.json"]))
    record, way = json.loads(path.read_bytes()), rng.choice(["value", "remove", "add"])
    forged = rng.random() < 0.5
    start = record.get("plan", record.get("root", record))
    if forged and "digest" in record:  # p3d trusts the rest of a snapshot's record if the digest is right
        start = rng.choice([record["counts"], rng.choice(record["files"])])
    held, key = _place(start, rng)
    if way == "remove":
        del held[key]
    elif way == "add" and isinstance(held, dict):
        held["more"] = 1
    else:
        value = held[key]
        held[key] = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else "other"
    if forged:
        for name, of in (("recipe_digest", "recipe"), ("plan_digest", "plan"), ("root_digest", "root")):
            if name in record and of in record:
                record[name] = digest(record[of])
        if record.pop("digest", None):
            record["digest"] = digest(record)
    path.write_text(json.dumps(record))
    return f"{path}: {way} {key} {forged = }"


def _place(held: Any, rng: Random) -> tuple[Any, Any]:
    """Where a value is that is no record itself, and its key."""
    while True:
        key = rng.choice(sorted(held)) if isinstance(held, dict) else rng.randrange(len(held))
        if not isinstance(held[key], dict | list) or not held[key]:
            return held, key
        held = held[key]


def foreign(out: Path, rng: Random) -> str:
    """A file of another job with the same plan takes the place of one, or the files of a whole shard do."""
    path = one_of(out, rng, f"{rng.choice(FOLDERS)}/*.parquet")
    other = LocalStore(str(out.parent / "other"))
    manifest = planned(other, "abcde", recipe_=recipe(**_changes(out)))
    commit_shard(
        other,
        shard_rows(manifest, 0, seed=9, n_scores=CLASSES * _changes(out)["scores"]),
        recipe(**_changes(out)),
        manifest.user_columns(0),
    )
    for folder in FOLDERS if rng.random() < 0.5 else [path.parent.name]:
        if (out / folder / path.name).exists():
            (out / folder / path.name).write_bytes(next((other.root / folder).iterdir()).read_bytes())
    return str(path)


def _changes(out: Path) -> dict[str, Any]:
    path = out / "job.json" if (out / "job.json").exists() else out / "snapshot.json"
    held = json.loads(path.read_bytes())["recipe"]
    return {name: held[name] for name in ("weights_sha256", "pool", "embedding_dtype", "scores")}


def forge(out: Path, rng: Random) -> str:
    """Rows are changed and written as valid Parquet; of a clips file, the others are sometimes made again from it."""
    path = one_of(out, rng, f"{rng.choice(('clips', 'clips', 'videos', 'failures', 'plans/*'))}/*.parquet")
    if path.suffix != ".parquet":
        return ""
    file = pq.ParquetFile(path)
    table, footer = (
        file.read(),
        {k.decode(): v.decode() for k, v in (file.metadata.metadata or {}).items() if k[:4] == b"p3d."},
    )
    how = rng.choice(["value", "value", "twice", "lost", "order", "none", *["footer"] * bool(footer)])
    if not table.num_rows and how != "footer":
        return ""
    row = rng.randrange(table.num_rows) if table.num_rows else 0
    if how == "value":
        how, table = _changed(table, row, rng)
    elif how == "footer":
        key = rng.choice(sorted(footer))
        held = json.loads(footer[key])
        if held and key != "p3d.stats":
            where, name = _place(held, rng)
            how, where[name] = f"{key} {name}", rng.choice(["x", 0, None, 3])
        footer[key] = json.dumps(held, separators=(",", ":"))
    elif how != "none":
        at = list(range(table.num_rows))
        order = {
            "twice": [*at[: row + 1], *at[row:]],
            "lost": at[:row] + at[row + 1 :],
            "order": rng.sample(at, len(at)),
        }
        table = table.take(pa.array(order[how], pa.int64()))
    path.unlink()
    write_parquet(path, table, footer)
    again = path.parent.name == "clips" and (out / "job.json").exists() and rng.random() < 0.7
    if again:
        again = _derive_again(out, path.stem)
    return f"{path}: {how} {row} {again = }"


def _changed(table: pa.Table, row: int, rng: Random) -> tuple[str, pa.Table]:
    """One value of a row is another."""
    name = rng.choice([*table.column_names, *["embedding"] * 3])
    if name not in table.column_names:
        return "none", table
    field, values = table.schema.field(name), table[name].to_pylist()
    value = values[row]
    if isinstance(value, list):
        array = np.array(values, np.float16 if field.type.value_type == pa.float16() else np.float32)
        bits = array.view(np.uint16 if array.dtype == np.float16 else np.uint32)
        change = rng.choice(["bit", "nan", "zero", "infinity"])
        if change == "bit":
            bits[row, 0] ^= 1
        else:
            array[row, : 1 if change != "zero" else None] = {"nan": np.nan, "zero": 0, "infinity": np.inf}[change]
        column = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), type=field.type)
        return f"{name} {change}", table.set_column(table.column_names.index(name), field, column)
    if isinstance(value, bool | str):
        values[row] = f"{value}x" if isinstance(value, str) else not value
    elif isinstance(value, int | float):
        values[row] = type(value)(rng.choice([-1, 0, value + 1, 1000]))
    return name, table.set_column(table.column_names.index(name), field, pa.array(values, field.type))


def _derive_again(out: Path, name: str) -> bool:
    """Make the files that follow from a clips file. False if p3d refuses to."""
    store = LocalStore(str(out))
    chosen = read_job(store).recipe
    for plan in load_plans(store):
        if name.startswith(plan.plan8):
            for folder in FOLDERS[1:]:
                (out / folder / f"{name}.parquet").unlink(missing_ok=True)
            manifest, shard = Manifest(store, plan), int(name[9:])
            try:
                derive(store, manifest.shard(shard), chosen, manifest.user_columns(shard))
            except (JobError, ValueError, pa.ArrowException):
                return False
    return True


def untouched(out: Path, rng: Random) -> str:
    return ""


DAMAGE: tuple[Damage, ...] = (untouched, flip, flip, cut, remove, swap, extra, edit, edit, foreign, forge, forge, forge)


def p3d_says(out: Path) -> tuple[int, list[str]]:
    """The exit code and the problems of `p3d verify --deep`, where each refusal counts as damage."""
    store = LocalStore(str(out))
    try:
        if not (out / "job.json").exists() and (out / "snapshot.json").exists():
            problems = problems_of(store, read_snapshot(store))
            return 7 if problems else 0, problems
        found = audit(store, read_job(store))
    except JobError as error:
        return 7, [str(error)]
    return 7 if found.damaged else 6 if found.pending or found.underived else 0, found.problems


@pytest.mark.timeout(7200)
def test_the_reader_and_verify_agree_on_whole_and_damaged_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each seeded output, whole, pending or damaged, both say the same."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no power loss here, and a disk may take most of the time for it
    warnings.simplefilter("ignore")
    first, codes, wrong = int(os.environ.get("P3D_SEED", "0")), Counter[int](), list[str]()
    for seed in range(first, first + SEEDS):
        rng, root = Random(seed), tmp_path / str(seed)
        out = build(root, rng)
        damage = rng.choice(DAMAGE)
        where = f"{damage.__name__} {damage(out, rng)}"
        mine = reader.Output(out)
        try:
            theirs = p3d_says(out)
        except Exception as error:  # noqa: BLE001 - an unexpected exception of p3d is a difference, too
            theirs = -1, [repr(error)]
        codes[mine.code] += 1
        if mine.code != theirs[0]:
            wrong.append(f"seed {seed}: {where}: the reader says {mine.code} {mine.problems}, p3d says {theirs}")
        elif where == "untouched ":
            same_rows(out, mine)
    print(f"{SEEDS} seeds from {first}: codes {dict(codes)}")
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)
    assert set(codes) == {0, 6, 7}


def same_rows(out: Path, mine: reader.Output) -> None:
    """The reader's rows are those that p3d reads: all clips and vectors, bit for bit."""
    theirs: dict[str, list[pa.Table]] = {folder: [] for folder in FOLDERS}
    for folder, table in rows_of(LocalStore(str(out))).rows():
        theirs[folder].append(table)
    for folder, tables in mine.rows.items():
        ours = (
            [name for name in (tables or theirs[folder])[0].column_names if name not in ("label", "when", "weight")]
            if tables
            else []
        )
        one = [row for table in tables for row in table.select(ours).to_pylist()]
        assert repr(one) == repr([row for table in theirs[folder] for row in table.select(ours).to_pylist()])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of tests/compat of version 1."""
    return unpack(tmp_path_factory.mktemp("outputs"), 1)


@pytest.mark.parametrize("name", CODES)
def test_outputs_of_real_jobs_are_read(outputs: Path, name: str) -> None:
    """The outputs of real jobs are complete or pending, with the rows that p3d reads."""
    mine = reader.Output(outputs / name)
    assert (mine.code, mine.problems) == (CODES[name], [])
    assert sum(map(len, mine.rows["clips"])) > 0
    same_rows(outputs / name, mine)


def test_the_reader_is_independent() -> None:
    """It imports pyarrow and the standard library only, and has at most 170 lines after its imports and columns."""
    text = Path(reader.__file__).read_text()
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    assert {name.partition(".")[0] for name in names} <= {*sys.stdlib_module_names, "pyarrow"}
    assert len([line for line in text[text.index("\ndef ") :].splitlines() if line]) <= 170


def test_the_examples_of_the_page_are_right() -> None:
    """Each JSON example parses, and its digests are those of its values."""
    examples = [json.loads(one) for one in re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.S)]
    by = {name: next(one for one in examples if name in one) for name in ("weights_origin", "plan", "files")}
    assert len(examples) >= 8
    job, plan, clean = by.values()
    assert job["recipe_digest"] == reader.digest(job["recipe"]) == plan["plan"]["recipe_digest"]
    assert plan["plan_digest"] == reader.digest(plan["plan"])
    rows = next(one for one in examples if isinstance(one, list) and "shard" in one[0])
    assert plan["plan"]["digest"] == reader.digest(rows, f"{job['recipe_digest']} {plan['plan']['seq']}")
    assert clean.pop("digest") == reader.digest(clean)
    assert JobRecord.from_json(json.dumps(job).encode(), "OUT").recipe.digest == job["recipe_digest"]
