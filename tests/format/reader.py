"""Read and verify an output by docs/reference/format.md, without p3d: `python tests/format/reader.py OUT`."""

import hashlib
import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

CLIPS = "video_id path plan_seq:int32 clip_index:int32 start_frame:int64 end_frame:int64 start_s:double end_s:double \
    n_padded:int32"
VIDEOS = (
    "video_id path uri plan_seq:int32 version n_clips:int32 n_frames:int64 duration_s:double fps:double width:int32 \
    height:int32 rotation:int32 codec stream_index:int32 route truncated:bool claimed_frames:int64? fps_estimated:bool \
    stream_why:string? resampled_fps:double? resampled_frames:int64?"
)
FAILURES = "video_id path uri plan_seq:int32 version reason detail attempts:int32"
MANIFEST = "video_id path uri version size_bytes:int64 mtime_ns:int64? etag:string? shard:int32"
JOB = {"schema_version", "recipe", "weights_origin", "versions"}
PLAN = set("seq digest recipe_digest n_videos n_shards size_bytes n_skipped parts schema_version".split())
OTHERS = {"excluded", "pending", "superseded"}
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


def vectors_of(column: Any) -> list[Any]:
    flat, dim = column.combine_chunks().flatten().cast("float"), column.type.list_size
    return [flat.slice(row, dim) for row in range(0, len(flat), dim)]


def pooled(rows: list[Any], how: str) -> list[float]:
    kind = pa.float64() if how == "probs" else pa.float32()
    total = rows[0] if how == "max" else pa.array([0.0] * len(rows[0]), kind)
    for row in rows:
        total = pc.if_else(pc.greater(total, row), total, row) if how == "max" else pc.add(total, pc.cast(row, kind))
    return (total if how == "max" else pc.cast(pc.divide(total, pa.scalar(len(rows), kind)), "float")).to_pylist()


class Output:
    """`rows` are the newest ones of each folder, by shard. `code` is 0 if all is complete, 6 pending, 7 damaged."""

    def __init__(self, out: Path) -> None:
        self.out, self.pending, self.problems = out, 0, list[str]()
        self.rows: dict[str, list[Any]] = {"clips": [], "videos": [], "failures": []}
        found = [path for folder in (*self.rows, "weights") for path in (out / folder).rglob("*")]
        self.files = {str(path.relative_to(out)) for path in found if path.is_file() and not path.is_symlink()}
        is_job = (out / "job.json").exists() or not (out / "snapshot.json").exists()
        self.attempt(self.job if is_job else self.snapshot)
        self.code = 7 if self.problems else 6 if self.pending else 0

    def attempt(self, step: Any, *given: Any) -> None:
        try:
            step(*given)
        except ERRORS as error:
            self.problems.append(f"{given[0] if given else self.out}: {error}")

    def record(self, key: str, held: str, stated: str) -> tuple[Any, dict[str, Any]]:
        given = json.loads((self.out / key).read_bytes())
        sha256, found = given.pop(stated), given[held] if held else given
        check(sha256 == digest(found) and found["schema_version"] == 1, f"{key} was changed, or is of a newer version")
        return found, given

    def data(self, key: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        content = (self.out / key).read_bytes()
        made = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
        if key.startswith("weights/"):
            return None, {}, made
        with pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True, pre_buffer=False) as file:
            footer = {name.decode(): value for name, value in (file.metadata.metadata or {}).items()}
            footer = {name: json.loads(value) for name, value in footer.items() if name.startswith("p3d.")}
            return file.read(use_threads=False), footer | {"writer": file.metadata.created_by.split()[-1]}, made

    def snapshot(self) -> None:
        record, _ = self.record("snapshot.json", "", "digest")
        self.recipe = record["recipe"]
        check(self.files == {one["key"] for one in record["files"]}, "snapshot.json lists other files")
        for one in record["files"]:
            (table, _, made), folder = self.data(one["key"]), one["key"].partition("/")[0]
            held = made | {"key": one["key"], "n_rows": None if table is None else table.num_rows}
            check(held == one, f"{one['key']} is not as recorded")
            if folder in self.rows:
                self.rows[folder].append(table)
        counts = {folder: sum(map(len, tables)) for folder, tables in self.rows.items()}
        others = {name: count for name, count in record["counts"].items() if name not in counts}
        check(others.keys() == OTHERS and record["counts"] == counts | others, "the counts are others")

    def job(self) -> None:
        self.recipe, job = self.record("job.json", "recipe", "recipe_digest")
        texts = [job["weights_origin"], *job["versions"].values(), job_id := job.get("job_id", "0" * 32)]
        sound = job.keys() - {"job_id"} == JOB and job["schema_version"] == 1 and {*map(type, texts)} == {str}
        check(sound and re.fullmatch("[0-9a-f]{32}", job_id), "job.json has other fields or values")
        kind, dim = self.recipe["embedding_dtype"].replace("float16", "halffloat"), self.recipe["feature_dim"]
        hows = self.recipe["pool"].split("+")
        self.pools = {f"embedding_{how}" if how != hows[0] else "embedding": how for how in hows}
        vectors = [(name, kind, dim) for name in self.pools]
        probs = [("probs", "float", self.recipe["num_classes"])] if self.recipe["scores"] else []
        self.pools |= {name: name for name, _, _ in probs}
        clips, videos = schema(CLIPS, vectors[0], *probs), schema(VIDEOS, *vectors, *probs)
        self.schemas = {"clips": clips, "videos": videos, "failures": schema(FAILURES)}
        names = [one.name for one in (self.out / "plans").iterdir() if re.fullmatch(r"\d{4,}\.json", one.name)]
        plans = [self.plan(f"plans/{name}") for name in sorted(names, key=lambda name: int(name[:-5]))]
        newest = {one: plan["seq"] for plan, rows in plans for one in rows["video_id"].to_pylist()}
        for plan, rows, at in [(*pair, at) for pair in plans for at in range(pair[0]["n_shards"])]:
            some = rows.filter(pc.equal(rows["shard"], at))
            self.attempt(self.shard, f"{plan['digest'][:8]}-{at:09d}", plan, at, some, newest)
        self.problems += [f"{one} is of no plan" for one in sorted(self.files) if re.match(r"[cvf].*\.parquet$", one)]

    def plan(self, key: str) -> tuple[dict[str, Any], Any]:
        (plan, _), tables, start = self.record(key, "plan", "plan_digest"), [], 0
        sound = plan.keys() == PLAN and plan["recipe_digest"] == digest(self.recipe)
        check(sound and key == f"plans/{plan['seq']:04d}.json", f"{key} has other fields, recipe or name")
        for at, part in enumerate(plan["parts"]):
            name = f"manifest-{at:05d}.parquet"
            table, _, made = self.data(f"{key[:-5]}-{plan['digest'][:8]}/{name}")
            tables, first, start = [*tables, table], start, table["shard"][-1].as_py() + 1
            held = {"name": name, "sha256": made["sha256"], "n_videos": table.num_rows, "first_shard": first}
            check(held | {"end_shard": start} == part, f"{name} is not as {key} says")
        rows, ours = pa.concat_tables(tables), schema(MANIFEST)
        shards = [*dict.fromkeys(rows["shard"].to_pylist())]
        sound = [rows.num_rows, shards] == [plan["n_videos"], [*range(plan["n_shards"])]]
        sound = sound and rows.column_names[:8] == ours.names and rows.schema.types[:8] == ours.types
        whole = digest(rows, f"{plan['recipe_digest']} {plan['seq']}")
        check(sound and whole == plan["digest"], f"the rows of {key} do not match its digest")
        return plan, rows

    def shard(self, name: str, plan: dict[str, Any], at: int, rows: Any, newest: dict[str, int]) -> None:
        there = [folder for folder in self.rows if f"{folder}/{name}.parquet" in self.files]
        self.files -= {f"{folder}/{name}.parquet" for folder in there}
        self.pending += len(there) < 3
        if not there:
            return
        clips, footer, made = self.data(f"clips/{name}.parquet")  # if it is gone and the others are not: damage
        outcomes, spans = footer["p3d.outcomes"], clips.select(schema(CLIPS).names).to_pylist()
        check(clips.schema.equals(self.schemas["clips"]) and isinstance(footer["p3d.stats"], dict), "other columns")
        of_clip = [(one, index) for one in outcomes for index in range(one["n_clips"])]
        held = [(one["video_id"], one["clip_index"]) for one in spans]
        check(held == [(one["video"]["video_id"], index) for one, index in of_clip], "clips of other outcomes")
        check(all(one["start_frame"] < one["end_frame"] and one["start_s"] < one["end_s"] for one in spans), "times")
        vectors = {name: vectors_of(clips[name]) for name in ("embedding", *(self.pools.keys() & {"probs"}))}
        sound = all(pc.all(pc.is_finite(row)).as_py() and any(row.to_pylist()) for row in vectors["embedding"])
        for row in map(pa.Array.to_pylist, vectors.get("probs", [])):
            sound &= all(0 <= value <= 1 for value in row) and abs(math.fsum(row) - 1) <= 1e-3
        check(sound, "a vector with NaN, infinity or only zeros, or probabilities that are no distribution")
        where = {"plan_seq": plan["seq"], "plan8": plan["digest"][:8], "shard": at}
        tables, derived, first = {"clips": clips}, {"videos": list[Any](), "failures": list[Any]()}, 0
        for one in outcomes:
            record = one["video"] | {"plan_seq": plan["seq"], "n_clips": one["n_clips"]} | (one["failure"] or {})
            some, first = slice(first, first + one["n_clips"]), first + one["n_clips"]
            if one["failure"] is None:
                record |= one["info"] | one["end"]
                every = {how: pooled(vectors.get(how, vectors["embedding"])[some], how) for how in self.pools.values()}
                record |= {column: every[how] for column, how in self.pools.items()}
            derived["videos" if one["failure"] is None else "failures"].append(record)
        for folder in [one for one in derived if one in there]:
            tables[folder], source, _ = self.data(f"{folder}/{name}.parquet")
            expected = pa.Table.from_pylist(derived[folder], self.schemas[folder])
            for own in rows.column_names[8:] if folder == "videos" else ():
                kept = rows[own].filter(pa.array([one["failure"] is None for one in outcomes], pa.bool_()))
                expected = expected.append_column(rows.schema.field(own), kept)
            same = tables[folder].schema.equals(expected.schema) and digest(tables[folder]) == digest(expected)
            same &= source["p3d.clips"] == made | {"writer": source["writer"]} and source["p3d.shard"] == where
            check(same, f"{folder}/ does not hold what its clips give")
        same = [one["video"] for one in outcomes] == rows.drop_columns(rows.column_names[7:]).to_pylist()
        same &= all((one["info"] is one["end"] is None) == (one["failure"] is not None) for one in outcomes)
        same &= footer["p3d.shard"] == where
        for clip, (one, _) in zip(spans, of_clip, strict=True):
            same &= (clip["path"], clip["plan_seq"]) == (one["video"]["path"], plan["seq"])
            same &= min(clip["start_frame"], clip["start_s"]) >= 0 and clip["end_s"] <= one["end"]["duration_s"]
            same &= 0 <= clip["n_padded"] < self.recipe["clip_frames"]
        check(same, "clips/ is not as its plan says")
        for folder, table in tables.items() if len(there) == 3 else ():
            current = [newest[one] == plan["seq"] for one in table["video_id"].to_pylist()]
            self.rows[folder].append(table.filter(pa.array(current, pa.bool_())))


if __name__ == "__main__":
    found = Output(Path(sys.argv[1]))
    print({folder: sum(map(len, tables)) for folder, tables in found.rows.items()})
    print(f"{found.pending} shards are pending", *found.problems, sep="\n")
    sys.exit(found.code)
