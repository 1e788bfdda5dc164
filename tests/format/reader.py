"""Read and verify an output by docs/reference/format.md, without p3d: `python tests/format/reader.py OUT`."""

import hashlib
import json
import re
import sys
from functools import reduce
from math import isfinite
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

# Columns are NAME, of strings, or NAME:TYPE. Those with ? may be null.
CLIPS = "video_id path plan_seq:int32 clip_index:int32 start_frame:int64 end_frame:int64 start_s:double end_s:double \
    n_padded:int32"
VIDEOS = (
    "video_id path uri plan_seq:int32 version n_clips:int32 n_frames:int64 duration_s:double fps:double width:int32 \
    height:int32 rotation:int32 codec stream_index:int32 route truncated:bool claimed_frames:int64? fps_estimated:bool \
    stream_why:string? resampled_fps:double? resampled_frames:int64?"
)
FAILURES = "video_id path uri plan_seq:int32 version reason detail attempts:int32"
MANIFEST = "video_id path uri version size_bytes:int64 mtime_ns:int64? etag:string? shard:int32"
JOB = {"schema_version", "recipe", "weights_origin", "versions", "job_id"}
PLAN = set("seq digest recipe_digest n_videos n_shards size_bytes n_skipped parts sizing schema_version".split())
ROOT = {"seq": int, "old": str, "new": str, "plans": int, "compared": str, "created_at": str, "schema_version": int}
PLACE = r"file://(/[!-~]*[!-.0-~])?|s3://[!-.0-~]+(/[!-~]*[!-.0-~])?"
PLAIN = ["duration_s", "fps", "resampled_fps"]
TEXTS = ["video_id", "path", "codec", "route", "reason"]
VECTOR = "fixed_size_list<element: float"
ERRORS = (pa.ArrowException, OSError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError)


def check(holds: Any, what: str) -> None:
    if not holds:
        raise ValueError(what)


def digest(value: Any, before: str = "") -> str:
    if isinstance(value, pa.Table):  # times in nanoseconds, which Python does not have, as integers
        exact = [pc.cast(one, "int64") if getattr(one.type, "unit", "") == "ns" else one for one in value.columns]
        value = pa.table(exact, value.column_names).to_pylist()
    rows = value if before else [value]
    lines = [json.dumps(one, sort_keys=True, separators=(",", ":"), default=str) for one in rows]
    return hashlib.sha256("\n".join([before, *lines, ""] if before else lines).encode()).hexdigest()


def schema(text: str, *vectors: tuple[str, str, int]) -> Any:
    split = [(*one.strip("?").partition(":")[::2], one.endswith("?")) for one in text.split()]
    plain = [pa.field(name, pa.type_for_alias(kind or "string"), null) for name, kind, null in split]
    lists = [(name, pa.list_(pa.field("element", pa.type_for_alias(kind), False), dim)) for name, kind, dim in vectors]
    return pa.schema([*plain, *(pa.field(name, kind, False) for name, kind in lists)])


def pooled(rows: list[Any], how: str) -> list[float]:
    if how == "max":
        return reduce(lambda one, other: pc.if_else(pc.greater(one, other), one, other), rows).to_pylist()
    kind = pa.float64() if how == "probs" else pa.float32()
    total = reduce(pc.add, [row.cast(kind) for row in rows], pa.array([0.0] * len(rows[0]), kind))
    return pc.divide(total, pa.scalar(len(rows), kind)).cast("float").to_pylist()


def encoded(table: Any, footer: dict[str, Any]) -> dict[str, Any]:
    """The sha256 and size of a derived file as p3d writes it."""
    sink, vectors = pa.BufferOutputStream(), [one.name for one in table.schema if re.match(VECTOR, str(one.type))]
    encodings = {f"{one}.list.element": "BYTE_STREAM_SPLIT" for one in vectors} | dict.fromkeys(PLAIN, "PLAIN")
    options: Any = {"use_dictionary": TEXTS, "column_encoding": encodings, "write_page_checksum": True}
    with pq.ParquetWriter(sink, table.schema, compression="zstd", compression_level=1, **options) as writer:
        writer.write_table(table, row_group_size=4096)
        writer.add_key_value_metadata({key: json.dumps(value) for key, value in footer.items()})
    return hashes(sink.getvalue().to_pybytes())


def hashes(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}


class Output:
    """`rows` are the newest ones of each folder, by shard. `code` is 0 if all is complete, 6 pending, 7 damaged."""

    def __init__(self, out: Path) -> None:
        self.out, self.pending, self.problems = out, 0, list[str]()
        self.rows: dict[str, list[Any]] = {"clips": [], "videos": [], "failures": []}
        found = [path for folder in (*self.rows, "weights") for path in (out / folder).rglob("*")]
        self.files = {str(path.relative_to(out)) for path in found if path.is_file() and not path.is_symlink()}
        is_job = (out / "job.json").exists() or not (out / "snapshot.json").exists()
        self.steps: list[Any] = [(self.job if is_job else self.snapshot,)]
        for step, *given in self.steps:  # self.job appends one for each shard
            try:
                step(*given)
            except ERRORS as error:
                self.problems.append(f"{given[0] if given else out}: {error}")
        self.problems += [f"{one} is of no plan" for one in self.files if re.match(r"[cvf].*\.parquet$", one)]
        self.code = 7 if self.problems else 6 if self.pending else 0

    def record(self, key: str, held: str, stated: str) -> tuple[Any, dict[str, Any]]:
        given = json.loads((self.out / key).read_bytes())
        sha256, found = given.pop(stated), given[held] if held else given
        check(sha256 == digest(found) and found["schema_version"] == 1, f"{key} was changed, or is of a newer version")
        return found, given

    def data(self, key: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        content = (self.out / key).read_bytes()
        with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True, pre_buffer=False) as file:
            entries = {name.decode(): value for name, value in (file.metadata.metadata or {}).items()}
            footer = {name: json.loads(value) for name, value in entries.items() if name.startswith("p3d.")}
            return file.read(use_threads=False), footer | {"by": file.metadata.created_by}, hashes(content)

    def snapshot(self) -> None:
        record, _ = self.record("snapshot.json", "", "digest")
        check(self.files == {one["key"] for one in record["files"]}, "snapshot.json lists other files")
        for key, one in [(one["key"], one) for one in record["files"]]:
            table = None if key.startswith("weights/") else self.data(key)[0]
            n_rows = None if table is None else table.num_rows
            check(hashes((self.out / key).read_bytes()) | {"key": key, "n_rows": n_rows} == one, f"{key} has changed")
            self.rows.get(key.partition("/")[0], []).append(table)
        counts = {folder: sum(map(len, tables)) for folder, tables in self.rows.items()}
        others = {name: record["counts"][name] for name in ("excluded", "pending", "superseded")}
        check(record["counts"] == counts | others, "the counts are others")
        self.files.clear()

    def job(self) -> None:
        self.recipe, job = self.record("job.json", "recipe", "recipe_digest")
        texts = [job["weights_origin"], *job["versions"].values(), job.setdefault("job_id", "0" * 32)]
        sound = job.keys() == JOB and {*map(type, texts)} == {str} and job["schema_version"] == 1
        check(sound and re.fullmatch("[0-9a-f]{32}", job["job_id"]), "job.json has other fields or values")
        kind, dim = self.recipe["embedding_dtype"].replace("float16", "halffloat"), self.recipe["feature_dim"]
        hows = self.recipe["pool"].split("+")
        self.pools = {f"embedding_{how}" if how != hows[0] else "embedding": ("embedding", how) for how in hows}
        vectors = [(name, kind, dim) for name in self.pools]
        probs = [("probs", "float", self.recipe["num_classes"])] if self.recipe["scores"] else []
        self.pools |= {name: (name, name) for name, _, _ in probs}
        clips, videos = schema(CLIPS, vectors[0], *probs), schema(VIDEOS, *vectors, *probs)
        self.schemas = {"clips": clips, "videos": videos, "failures": schema(FAILURES)}
        names = [one.name for one in (self.out / "plans").iterdir() if re.fullmatch(r"\d{4,}\.json", one.name)]
        plans = [self.plan(f"plans/{name}") for name in sorted(names, key=lambda name: int(name[:-5]))]
        stems = [path.stem for path in (self.out / "roots").glob("*.json") if re.fullmatch(r"[0-9]{4,}", path.stem)]
        self.steps += [(self.root, f"roots/{stem}.json", at) for at, stem in enumerate(sorted(stems, key=int), 1)]
        newest = {one: plan["seq"] for plan, rows in plans for one in rows["video_id"].to_pylist()}
        for plan, rows, at in [(*pair, at) for pair in plans for at in range(pair[0]["n_shards"])]:
            name, some = f"{plan['digest'][:8]}-{at:09d}", rows.filter(pc.equal(rows["shard"], at))
            self.steps.append(
                (self.shard, name, {"plan_seq": plan["seq"], "plan8": name[:8], "shard": at}, some, newest)
            )

    def root(self, key: str, at: int) -> None:
        root, others = self.record(key, "root", "root_digest")
        sound = len(others) == 1 and {name: type(value) for name, value in root.items()} == ROOT
        sound = sound and key == f"roots/{root['seq']:04d}.json" and root["seq"] == at and root["plans"] > 0
        places = [re.fullmatch(PLACE, root[name]) for name in ("old", "new")]
        sound = sound and all(places) and root["old"] != root["new"] and root["compared"] in ("version", "size")
        check(sound, f"{key} has other fields or values, or a record before it is missing")

    def plan(self, key: str) -> tuple[dict[str, Any], Any]:
        (plan, _), tables, start = self.record(key, "plan", "plan_digest"), [], 0
        sound = plan.keys() | {"sizing"} == PLAN and plan["recipe_digest"] == digest(self.recipe)
        check(sound and key == f"plans/{plan['seq']:04d}.json", f"{key} has other fields, recipe or name")
        for at, part in enumerate(plan["parts"]):
            name = f"manifest-{at:05d}.parquet"
            table, _, made = self.data(f"{key[:-5]}-{plan['digest'][:8]}/{name}")
            held = {"name": name, "sha256": made["sha256"], "n_videos": table.num_rows, "first_shard": start}
            tables, start = [*tables, table], table["shard"][-1].as_py() + 1
            check(held | {"end_shard": start} == part, f"{name} is not as {key} says")
        rows, ours = pa.concat_tables(tables), schema(MANIFEST)
        shards = [*dict.fromkeys(rows["shard"].to_pylist())]
        sound = [rows.num_rows, shards] == [plan["n_videos"], [*range(plan["n_shards"])]]
        sound = sound and rows.column_names[:8] == ours.names and rows.schema.types[:8] == ours.types
        whole = digest(rows, f"{plan['recipe_digest']} {plan['seq']}")
        check(sound and whole == plan["digest"], f"the rows of {key} do not match its digest")
        return plan, rows

    def shard(self, name: str, where: dict[str, Any], manifest: Any, newest: dict[str, int]) -> None:
        there = [folder for folder in self.rows if f"{folder}/{name}.parquet" in self.files]
        self.files -= {f"{folder}/{name}.parquet" for folder in there}
        self.pending += len(there) < 3
        if not there:
            return
        clips, footer, made = self.data(f"clips/{name}.parquet")  # if it is gone and the others are not: damage
        outcomes = footer["p3d.outcomes"]
        kept = pa.array([one["failure"] is None for one in outcomes], pa.bool_())
        sound = clips.schema.equals(self.schemas["clips"]) and isinstance(footer["p3d.stats"], dict)
        sound &= [one["video"] for one in outcomes] == manifest.select(schema(MANIFEST).names[:-1]).to_pylist()
        sound &= footer["p3d.shard"] == where and sum(one["n_clips"] for one in outcomes) == len(clips)
        check(sound, "clips/ has other columns, videos or rows")
        first, tables = 0, {"clips": clips, "videos": list[Any](), "failures": list[Any]()}
        for one in outcomes:
            video, failure, n_clips = one["video"], one["failure"], one["n_clips"]
            some, first = clips.slice(first, n_clips), first + n_clips
            spans = some.select(schema(CLIPS).names).to_pylist()
            check({one["info"] is None, one["end"] is None, failure is not None, n_clips == 0} != {True, False}, "both")
            for at, (clip, before) in enumerate(zip(spans, [*spans[:1], *spans], strict=False)):
                expected = {"video_id": video["video_id"], "path": video["path"], "plan_seq": where["plan_seq"]}
                sound = clip == clip | expected | {"clip_index": at} and clip["start_frame"] >= before["start_frame"]
                sound &= 0 <= clip["start_frame"] < clip["end_frame"] and 0 <= clip["start_s"] < clip["end_s"]
                check(sound and 0 <= clip["n_padded"] < self.recipe["clip_frames"], "a clip is not as its plan says")
            record = video | {"plan_seq": where["plan_seq"], "n_clips": n_clips} | (failure or one["info"] | one["end"])
            for column, (source, how) in () if failure else self.pools.items():
                vectors = [row.values.cast("float") for row in some[source]]
                for row in map(pa.Array.to_pylist, vectors):
                    check(all(map(isfinite, row)) and any(row), "a vector has NaN or infinity, or is zero")
                    check(how != "probs" or (min(row) >= 0 and max(row) <= 1 and abs(sum(row) - 1) <= 1e-3), "probs")
                record[column] = pooled(vectors, how)
            tables["failures" if failure else "videos"].append(record)
        for folder in [one for one in there if one != "clips"]:
            table, source, held = self.data(f"{folder}/{name}.parquet")
            own = manifest.filter(kept).select(manifest.column_names[8:] if folder == "videos" else [])
            columns = [*pa.Table.from_pylist(tables[folder], self.schemas[folder]).columns, *own.columns]
            expected = pa.table(columns, schema=pa.schema([*self.schemas[folder], *own.schema]))
            writer, tables[folder] = source["p3d.clips"]["writer"], table
            footer = {"p3d.shard": where, "p3d.clips": made | {"writer": writer}}
            same = table.schema.equals(expected.schema) and digest(table) == digest(expected)
            same = same and footer.items() <= source.items() and source["by"].endswith(f" {writer}")
            same = same and (writer != pa.cpp_version or encoded(expected, footer) == held)
            check(same, f"{folder}/ does not hold what its clips give")
        for folder, table in tables.items() if len(there) == 3 else ():
            current = [newest[one] == where["plan_seq"] for one in table["video_id"].to_pylist()]
            self.rows[folder].append(table.filter(pa.array(current, pa.bool_())))


if __name__ == "__main__":
    found = Output(Path(sys.argv[1]))
    counts = {folder: sum(map(len, tables)) for folder, tables in found.rows.items()}
    print(counts, f"{found.pending} shards are pending", *found.problems, sep="\n")
    sys.exit(found.code)
