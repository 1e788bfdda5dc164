"""Seeded outputs that somebody hostile made. The output of a seed is always the same, but for random ids and times.

    honest records and rows, written by the product's own functions, with hostile text in them
      ──fields of records, columns and footers changed, digests made right again──>
      ──links, fifos, huge and stray files at any path──> OUT

Everything that an output may lure a verb to is in the folder `canary` next to it, or at a port of its own.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from p3d.jobs.job import golden_key, rows_of, weights_key
from p3d.jobs.planning.prepare import JobSpec, prepare
from p3d.pipeline.clips.rules import clip_spans
from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.commit import commit_shard
from p3d.pipeline.dataset.plans import Manifest, plan_digest, write_plan
from p3d.pipeline.dataset.roots import RootRecord
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.dataset.snapshot import snapshot
from p3d.pipeline.errors import MALFORMED
from p3d.pipeline.recipe import JobRecord, Recipe, RunOptions, ShardSizing, digest, new_job_id
from p3d.pipeline.sources.listing import find
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.types import ClipRow, ShardRows
from tests.pipeline.rows import distributions, outcome
from tests.zoo import make

FRAMES = (40, 0, 16, 33)  # of the videos of a shard; 0 is a failure
DEEP, DIGITS = "@deep@", "@digits@"  # replaced in the text of a record by what Python would not write
HOSTILE_TEXT = (
    *("\x1b[2J", "\x1b]0;title\x07", "\x1b]8;;file:///etc/passwd\x07x", "\x9b31m", "\r", "\n", "\x7f", "\x00", "\t"),
    *("\u202e", "\u2066", "\u2028", "\u200b", "\ufeff", "\U000e0041", "\ud800", "\udcff"),
    *("[red]", "[/]", "[link=x]", "<script>alert(1)</script>", "{0}", "{sentence}", "%s%n", "\\x1b", "'\"`$(id)"),
    *("..", "../..", "/", "a/b", ".", "", " ", "-", "--trust", "%2F", "%2e%2e%2f", "%00", "a\\b", "file://", "s3://"),
    *("NaN", "null", "1e999", "9" * 400, "日本", "e\u0301" * 20, "x" * 300),
)
NUMBERS = (
    *(0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(0.5, -0.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"), True, False),
)
ODD: tuple[Any, ...] = (None, [], {}, [[]], [None], {"": None}, {"a": {"b": [1, {"c": []}]}}, "", DEEP, DIGITS)
RAW = (
    *(b"", b"{", b"null", b"[]", b"0", b'""', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"{}" * 2, b"\x00" * 64, b"NaN"),
    *(b"[" * 200_000, b"[" * 50_000 + b"]" * 50_000, b" " * 3_000_000 + b"{}", b"PAR1", b"PAR1" + bytes(64) + b"PAR1"),
)
HUGE_BYTES = (65 << 20, 1 << 30, 5 << 30, 1 << 40)


@dataclass(frozen=True)
class Base:
    """What is made once: weights, a source folder with two videos, files that the user gives, and recipes."""

    root: Path
    recipes: tuple[Recipe, Recipe]
    video: bytes
    index: tuple[bytes, bytes]

    @property
    def weights(self) -> Path:
        return self.root / "weights.safetensors"

    @property
    def source(self) -> Path:
        return self.root / "source"

    @classmethod
    def make(cls, root: Path, weights: Path) -> Base:
        for name in ("source", "empty"):
            (root / name).mkdir(parents=True)
        for name in "ab":
            make.video(root / "source" / f"{name}.mp4", "libx264", 40, options={"preset": "ultrafast"}, gop=12)
        video = (root / "source" / "a.mp4").read_bytes()
        (root / "query.mp4").write_bytes(video)
        (root / "labels.csv").write_text("path,label,split\n" + "".join(f"{name},{name},train\n" for name in LABELLED))
        (root / "exclude.txt").write_text("a\nb\n")
        content = prepare(JobSpec(None, str(weights)))
        (root / "weights.safetensors").write_bytes(content.content)
        scores = prepare(JobSpec(None, str(weights), scores=True, pool="mean+max")).recipe
        return cls(root, (content.recipe, scores), video, foreign_index(root))


LABELLED = ("a.mp4", "b.mp4", "c", "d", "e", "f")


@dataclass(frozen=True)
class Case:
    """A hostile output, and the private places next to it. `ids` are names of its videos, `what` names the damage."""

    number: int
    root: Path
    out: Path
    ids: tuple[str, ...]
    plain: bool
    what: tuple[str, ...]

    @property
    def canary(self) -> Path:
        return self.root / "canary"


class Maker:
    """Makes the output of one seed. `port` is HOST:PORT of a server that nobody may connect to."""

    def __init__(self, base: Base, seed: int, number: int, folder: Path, port: str) -> None:
        self.base, self.number, self.root, self.port = base, number, folder, port
        self.rng = random.Random(f"{seed}/{number}")
        self.canary = folder / "canary"
        self.share = self.rng.choice((0.0, 0.1, 0.3, 1.0))  # of the strings that are hostile
        self.what: list[str] = []

    def make(self) -> Case:
        for name in ("canary/sub", "state", "cache", "home", "outs", "tmp", "made"):
            (self.root / name).mkdir(parents=True)
        (self.root / "tmp" / f"p3d-{os.geteuid()}").mkdir(mode=0o755)  # not private: no Ray is started
        self._make_canary()
        name = self.rng.choice(("out", "out", "an out", "caf\u00e9", "-out", "o\x1b[31mut", "[red]out"))
        store = LocalStore(str(self.root / "outs" / name))
        plain = self.rng.random() < 0.8
        ids = self._rows(store, self.base.recipes[not plain])
        self._records(store)
        if self.rng.random() < 0.2 and (copied := self._snapshot(store)) is not None:
            store = copied
        damage = (self._change_record, self._change_parquet, self._special, self._raw, self._stray, self._flip)
        for _ in range(self.rng.choice((0, 0, 1, 1, 2, 3))):
            step = self.rng.choices(damage, weights=(6, 4, 5, 1, 1, 1))[0]
            with contextlib.suppress(OSError, pa.ArrowException, *MALFORMED):  # nothing of that kind is there
                step(store)
        return Case(self.number, self.root, store.root, ids, plain, tuple(self.what))

    # --- values -------------------------------------------------------------------------------------------------------

    def text(self, honest: str) -> str:
        """An honest text, or with the probability of this seed a hostile one."""
        return self.evil() if self.rng.random() < self.share else honest

    def evil(self) -> str:
        one, three = self.rng.choice(HOSTILE_TEXT), "".join(self.rng.choices(HOSTILE_TEXT, k=3))
        made = self.rng.choice((one, three, f"x{one}", self.lure(), self.lure()))
        return made * 1_000_000 if self.rng.random() < 0.01 and 0 < len(made) < 4 else made

    def lure(self) -> str:
        """A name of something outside."""
        file = self.rng.choice((self.canary / "secret.mp4", self.canary / "record.json", self.canary / "new"))
        up = "../" * self.rng.randint(1, 9)
        paths = str(file), f"{up}{str(file)[1:]}", f"{up}canary/{file.name}", str(file).replace("/", "%2F")
        urls = f"file://{file}", f"file://localhost{file}", f"{file}\0.parquet", "s3://canary/x"
        return self.rng.choice((*paths, *urls, *(f"http://{who}{self.port}/x" for who in ("", "user:secret@"))))

    def value(self, honest: Any) -> Any:
        """A hostile value in the place of an honest one, of its type or of another."""
        if isinstance(honest, str) and self.rng.random() < 0.7:
            return self.evil()
        if isinstance(honest, int | float) and self.rng.random() < 0.6:
            return self.rng.choice(NUMBERS)
        return copy.deepcopy(self.rng.choice((*ODD, self.evil(), self.rng.choice(NUMBERS), ["x"] * 100_000)))

    # --- an output as the product writes it ---------------------------------------------------------------------------

    def _make_canary(self) -> None:
        (self.canary / "secret.mp4").write_bytes(self.base.video)
        (self.canary / "record.json").write_text('{"state": "running", "counter": 1}')
        (self.canary / "sub" / f"7-{'0' * 32}.tmp").write_text("a document")
        (self.canary / "sub" / "clips.parquet").write_bytes(b"PAR1")

    def _recipe(self, honest: Recipe) -> Recipe:
        for _ in range(self.rng.choice((0, 0, 0, 1, 2))):
            name = self.rng.choice(Recipe.__slots__)
            with contextlib.suppress(Exception):  # most values are refused by Recipe itself
                honest = replace(honest, **{name: self.value(getattr(honest, name))})
                digest(honest.to_dict())
        return honest

    def _rows(self, store: LocalStore, honest: Recipe) -> tuple[str, ...]:
        """Records, plans, rows and weights. A changed recipe is stated by job.json and plans, the rows are honest."""
        stated = honest
        if self.rng.random() < 0.3:
            stated = self._recipe(honest)
            try:
                JobRecord(stated, "", {}).to_json()
            except (ValueError, TypeError, RecursionError):
                stated = honest
        job = JobRecord(stated, self.text("random:0"), {self.text("p3d"): self.text("1.0")}, new_job_id())
        store.create("job.json", job.to_json())
        if self.rng.random() < 0.8:
            (store.root / "weights").mkdir()
            os.link(self.base.weights, store.root / weights_key(honest))
            features = [0.5] * honest.feature_dim
            store.create(golden_key(honest), json.dumps({"features": features, "what": "golden"}).encode())
        ids: list[str] = []
        for seq in (1, 2):
            table = self._videos(seq, ids)
            plan = write_plan(store, seq, stated, with_shards(table, ShardSizing(3)), 0, ShardSizing())
            manifest = Manifest(store, plan)
            for at in range(plan.n_shards):
                if self.rng.random() < 0.75:
                    rows = self._shard(manifest, at, honest)
                    commit_shard(store, rows, honest, manifest.user_columns(at))
                    if self.rng.random() < 0.1:
                        folder = self.rng.choice(("videos", "failures", "clips"))
                        (store.root / folder / f"{manifest.shard(at).name}.parquet").unlink()
        return tuple(ids)

    def _videos(self, seq: int, ids: list[str]) -> pa.Table:
        """The videos of a plan: two of the source, others that name the canary or nothing. The second may retry one."""
        found = find(str(self.base.source), DEFAULTS).videos
        rows = found.to_pylist() if seq == 1 else []
        for at in range(4):
            name = self.text(f"{'cdefghij'[4 * (seq - 1) + at]}").encode(errors="replace").decode()
            uri = self.rng.choice((f"file://{self.canary}/secret.mp4", f"file:///v/{name}", self.lure(), self.text("")))
            row = {"video_id": f"{name}{seq}{at}", "path": name, "uri": uri.encode(errors="replace").decode()}
            rows.append(row | {"version": self.text("0" * 16).encode(errors="replace").decode(), "size_bytes": 10})
        if seq == 2 and self.rng.random() < 0.5:
            rows[0]["video_id"] = ids[2]
        for row in rows:
            row.setdefault("mtime_ns", None)
            row.setdefault("etag", None)
        kept = pa.schema([field for field in schema.MANIFEST if field.name != "shard"])
        table = pa.Table.from_pylist([{name: row[name] for name in kept.names} for row in rows], schema=kept)
        ids += table["video_id"].to_pylist()
        n = table.num_rows
        for name, column in (
            (self.text("label"), pa.array([self.plain_text(f"label {at}") for at in range(n)])),
            ("numbers", pa.array([[float("nan"), 1.0, None]] * n)),
            ("when", pa.array([2**62] * n, pa.timestamp("ns"))),
            ("deep", pa.array([{"a": [{"b": "\x1b[2J"}]}] * n)),
            ("bytes", pa.array([b"\xff\x00"] * n)),
            ("kind", pa.array(["x"] * n).dictionary_encode()),
            ("pairs", pa.array([[("a", 1)]] * n, pa.map_(pa.string(), pa.int64()))),
            ("nothing", pa.nulls(n)),
            ("long", pa.array([2**62 + 1] * n, pa.int64()).view(pa.duration("ns"))),
            ("at", pa.array([2**62 + 1] * n, pa.int64()).view(pa.timestamp("ns", tz="UTC"))),
            ("price", pa.array([1] * n, pa.decimal128(38, 10))),
            ("score", pa.array([float("inf"), float("nan")] * n, pa.float32())[:n]),
        ):
            name = name.encode(errors="replace").decode()
            if self.rng.random() < 0.5 and name not in table.column_names and name not in schema.own_columns(1):
                with contextlib.suppress(pa.ArrowException, ValueError):
                    table = table.append_column(name, column)
        return table

    def _shard(self, manifest: Manifest, at: int, honest: Recipe) -> ShardRows:
        plan = manifest.shard(at)
        rng = np.random.default_rng([manifest.plan.seq, at])
        done = [outcome(video, FRAMES[number % len(FRAMES)]) for number, video in enumerate(plan.videos)]
        for number, one in enumerate(done):
            info = one.info and replace(one.info, codec=self.plain_text("h264"), route=self.plain_text("pyav"))
            failure = one.failure and replace(one.failure, detail=self.plain_text("ends early"))
            done[number] = replace(one, info=info, failure=failure)
        clips = tuple(
            ClipRow(one.video.video_id, one.video.path, span, span.start_frame / 25, span.end_frame / 25)
            for one in done
            if one.end
            for span in clip_spans(honest.sampling, one.end.n_frames)
        )
        features_RD = rng.standard_normal((len(clips), honest.feature_dim)).astype(np.float32)
        stats: dict[str, Any] = {"host": self.text("far"), "device": self.text("cpu"), "worker": self.text("0")}
        stats |= {"pid": 1, "ended": "2026-01-02T03:04:05+00:00", "shard_s": 1.0, "wait_s": 0.0, "encode_s": 1.0}
        stats |= {"videos": len(done), "failed": 1, "clips": len(clips), "batch_size": 2, "threads": 1}
        probs_RK = distributions(rng, len(clips), honest.n_scores)
        return ShardRows(plan, tuple(done), clips, features_RD, probs_RK, stats)

    def plain_text(self, honest: str) -> str:
        """As `text`, but text that UTF-8 can hold, as all of Arrow's is."""
        return self.text(honest).encode(errors="replace").decode()

    def _records(self, store: LocalStore) -> None:
        """Records of two runs, as far as a run was made; their options lead to the port."""
        s3 = {"endpoint_url": f"http://{self.port}", "profile": "canary", "requester_pays": True}
        s3 |= {"sse": "aws:kms", "sse_kms_key_id": "canary", "region": "us-east-1"}
        options = RunOptions(1, 2, 1, 1).to_dict()
        options |= {"s3": {**options["s3"], **s3}, "device": self.text("cpu")}
        for number in range(1, self.rng.choice((1, 2, 3))):
            epoch: dict[str, Any] = {"number": number, "pid": 1, "options": options}
            epoch |= {name: self.text(name) for name in ("host", "boot_id", "started", "token", "user")}
            self._write(store, f"_job/epochs/{number:06d}.json", epoch)
            worker: dict[str, Any] = {"worker": 1, "videos": 1, "clips": 1, "shards": [self.text("s")]}
            worker |= {
                "limit": "network",
                "device": self.text("cpu"),
                "host": self.text("far"),
                "state": self.text("busy"),
            }
            worker["load"] = {"inference_threads": 0.5, "decoding": 0.5, "decode_concurrency": 2, "queued": 1}
            state = self.rng.choice(("running", "stopped", "finished", "dead", self.text("stopped")))
            beat: dict[str, Any] = {"schema_version": 1, "counter": 1, "state": state, "exit_code": 6}
            beat |= {"outage": self.text(""), "sentence": self.text("stopped"), "failures": {self.text("truncated"): 1}}
            beat |= {"elapsed_s": 1.0, "clips": 5, "clips_per_s": 1.0, "eta_s": 1.0, "shards": {"done": 1, "all": 2}}
            beat |= {"videos": {"all": 4, "done": 2, "failed": 1}, "workers": [worker] * self.rng.choice((0, 1, 3))}
            self._write(store, f"_job/heartbeats/{number:06d}.json", beat)
            log = "\n".join(self.text("worker 1 is ready") for _ in range(3))
            self._put(store, f"_job/logs/{number:06d}.log", log.encode(errors="surrogatepass"))
        if self.rng.random() < 0.3:
            where = {"where": self.text("http://head:8265"), "name": self.text("raysubmit")}
            where |= {"after": self.rng.choice((0, 1, 2))}
            self._write(store, "_job/submitted.json", where)
        if self.rng.random() < 0.3:
            self._put(store, f"_job/tmp/7-{'1' * 32}.tmp", b"left over")
            self._write(store, "_job/cancel/000002.json", {"now": True})
        if (
            self.rng.random() < 0.4
        ):  # the videos of the source, or others, have moved to the canary, or to where it says
            old = self.rng.choice((f"file://{self.base.source}", "file:///v"))
            new = self.rng.choice(
                (f"file://{self.canary}", "s3://canary/sub", f"file://{self.base.source}", self.lure())
            )
            record = RootRecord(1, old, new, 2, self.rng.choice(("version", "size")), self.plain_text("2026"))
            self._put(store, record.key, record.to_json())
        if self.rng.random() < 0.5:
            content, name = self.base.index
            lists = os.fsencode(self.canary / "sub" / "clips.parquet")
            before, after = (struct.pack("<Q", len(one)) + one for one in (name, lists))
            assert before in content
            self._put(store, "_job/index/clip-cosine-01234567.faiss", content.replace(before, after))
            told = {"schema_version": 1, "index_key": self.lure(), "rows_key": self.lure(), "kind": "ivf"}
            self._write(store, "_job/index/clip-cosine.json", told)

    def _snapshot(self, store: LocalStore) -> LocalStore | None:
        """A snapshot of the output so far, which then is the output."""
        copied = LocalStore(f"{store.url}-copy")
        weights = store.root / weights_key(self.base.recipes[0])
        try:
            if weights.exists():
                weights.rename(self.root / "weights")  # copying 100 MB takes long
            snapshot(rows_of(store), copied, skip_pending=True)
        except Exception:  # noqa: BLE001 - what cannot be copied stays as it is; the verbs themselves are tried later
            return None
        finally:
            if (self.root / "weights").exists():
                (self.root / "weights").rename(weights)
        self.what.append("snapshot")
        return copied

    # --- damage -------------------------------------------------------------------------------------------------------

    def _put(self, store: LocalStore, key: str, content: bytes) -> None:
        """Write a file of the output, in the place of the old one and not into it: it may be a hard link."""
        path = store.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content)

    def _write(self, store: LocalStore, key: str, record: Any) -> None:
        text = json.dumps(record).replace(f'"{DEEP}"', "[" * 9000 + "]" * 9000).replace(f'"{DIGITS}"', "9" * 5000)
        self._put(store, key, text.encode())

    def _files(self, store: LocalStore, suffix: str = "") -> list[Path]:
        files = (path for path in store.root.rglob(f"*{suffix}") if path.is_file() and not path.is_symlink())
        return sorted(path for path in files if not suffix or path.stat().st_size < 1 << 24)

    def _change_record(self, store: LocalStore) -> None:
        """Change fields of a JSON record; its digests are then right again, or not."""
        path = self.rng.choice(self._files(store, ".json"))
        record = json.loads(path.read_text())
        for _ in range(self.rng.choice((1, 1, 2, 5))):
            self._change(record)
        key = str(path.relative_to(store.root))
        self.what.append(f"fields of {key}")
        if self.rng.random() < 0.85:
            with contextlib.suppress(Exception):  # a value that has no canonical form
                record = sealed(key, record)
        self._write(store, key, record)

    def _change(self, record: Any) -> None:
        """Change one field, at any depth."""
        places: list[tuple[Any, Any]] = []
        pending = [record]
        while pending:
            one = pending.pop()
            for at, value in list(one.items() if isinstance(one, dict) else enumerate(one)):
                places.append((one, at))
                if isinstance(value, dict | list):
                    pending.append(value)
        if not places:
            return
        holder, at = self.rng.choice(places)
        how = self.rng.random()
        if how < 0.1:
            del holder[at]
        elif how < 0.2 and isinstance(holder, dict):
            holder[self.evil()] = self.value("")
        elif how < 0.25:
            holder[at] = copy.deepcopy(self.rng.choice(places)[0])
        else:
            holder[at] = self.value(holder[at])

    def _change_parquet(self, store: LocalStore) -> None:
        """Change columns or the footer of a Parquet file; checksums of records are then right again, or not."""
        path = self.rng.choice(self._files(store, ".parquet"))
        key = str(path.relative_to(store.root))
        with pq.ParquetFile(path, memory_map=False) as file:
            table, footer = file.read(use_threads=False), dict(file.metadata.metadata or {})
        footer.pop(b"ARROW:schema", None)
        changed = self.rng.choice((self._change_column, self._change_schema, self._change_footer, self._change_footer))
        table, footer = changed(table, footer)
        self.what.append(f"{changed.__name__} of {key}")
        written = io.BytesIO()
        with pq.ParquetWriter(written, table.schema, write_page_checksum=True, compression="zstd") as writer:
            writer.write_table(table)
            writer.add_key_value_metadata(footer)
        self._put(store, key, written.getvalue())
        if self.rng.random() < 0.85:
            self._seal_file(store, key, table)

    def _change_column(self, table: pa.Table, footer: dict[bytes, bytes]) -> tuple[pa.Table, dict[bytes, bytes]]:
        at = self.rng.randrange(table.num_columns)
        field = table.schema.field(at)
        values = table[at].to_pylist()
        for number in range(len(values)):
            if self.rng.random() < 0.4:
                values[number] = self._fitting(field.type)
        made = pa.array(values, field.type)
        if pa.types.is_string(field.type) and self.rng.random() < 0.2:
            made = not_utf8(len(values))
        nullable = pa.field(field.name, field.type, nullable=field.nullable or made.null_count > 0)
        return table.set_column(at, nullable, made), footer

    def _fitting(self, kind: pa.DataType) -> Any:
        """A hostile value of an Arrow type."""
        if pa.types.is_string(kind):
            return self.plain_text(self.evil()) if self.rng.random() < 0.9 else None
        if pa.types.is_integer(kind):
            bits = kind.bit_width - 1
            return self.rng.choice((0, -1, 2**bits - 1, -(2**bits), None))
        if pa.types.is_floating(kind):
            return self.rng.choice((0.0, -1.0, 1e308, 5e-324, float("nan"), float("inf"), None))
        if pa.types.is_fixed_size_list(kind):
            return [self.rng.choice((0.0, 1e38, float("nan"), float("inf")))] * kind.list_size
        return None

    def _change_schema(self, table: pa.Table, footer: dict[bytes, bytes]) -> tuple[pa.Table, dict[bytes, bytes]]:
        at = self.rng.randrange(table.num_columns)
        name = table.column_names[at]
        match self.rng.randrange(6):
            case 0:
                table = table.drop_columns([name])
            case 1:
                names = [self.plain_text(self.evil()) if one == name else one for one in table.column_names]
                table = table.rename_columns(names)
            case 2:
                table = table.append_column(name, table[at])
            case 3:
                kinds = (pa.large_string(), pa.binary(), pa.int8(), pa.float64(), pa.list_(pa.string()), pa.null())
                table = table.set_column(at, name, pa.array([None] * table.num_rows, self.rng.choice(kinds)))
            case 4:
                table = table.slice(0, self.rng.choice((0, 1)))
            case _:
                table = pa.concat_tables([table] * 3)
        return table, footer

    def _change_footer(self, table: pa.Table, footer: dict[bytes, bytes]) -> tuple[pa.Table, dict[bytes, bytes]]:
        if not footer:
            return table, {b"p3d.outcomes": b"[]", b"\xff": b"\xff"}
        key = self.rng.choice(sorted(footer))
        try:
            record = json.loads(footer[key])
            for _ in range(self.rng.choice((1, 2, 4))):
                self._change(record)
            text = json.dumps(record).replace(f'"{DEEP}"', "[" * 9000 + "]" * 9000).replace(f'"{DIGITS}"', "9" * 5000)
        except ValueError:
            text = "{"
        footer[key] = self.rng.choice((text.encode(), text.encode(), text.encode(), self.rng.choice(RAW[:11])))
        return table, footer

    def _seal_file(self, store: LocalStore, key: str, table: pa.Table) -> None:
        """Make the records that hold the checksum of a changed file right again."""
        content = (store.root / key).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        folder, _, name = key.rpartition("/")
        if key.startswith("plans/"):
            path = store.root / f"{folder[: folder.rfind('-')]}.json"
            record = json.loads(path.read_text())
            part = next((one for one in record["plan"]["parts"] if one["name"] == name), None)
            if part is None:  # an earlier change has renamed it
                return
            part.update(sha256=sha256, n_videos=table.num_rows)
            record["plan"]["n_videos"] = sum(one["n_videos"] for one in record["plan"]["parts"])
            with contextlib.suppress(Exception):
                whole = plan_digest(record["plan"]["recipe_digest"], record["plan"]["seq"], table)
                record["plan"]["digest"] = whole
                (store.root / folder).rename(store.root / f"plans/{record['plan']['seq']:04d}-{whole[:8]}")
            self._put(store, str(path.relative_to(store.root)), json.dumps(sealed("plans/", record)).encode())
        elif (store.root / "snapshot.json").exists():
            record = json.loads((store.root / "snapshot.json").read_text())
            for one in record["files"]:
                if one["key"] == key:
                    one.update(sha256=sha256, size_bytes=len(content), n_rows=table.num_rows)
            for one in ("clips", "videos", "failures"):
                rows_of_it = (file["n_rows"] or 0 for file in record["files"] if file["key"].startswith(one))
                record["counts"][one] = sum(rows_of_it)
            self._put(store, "snapshot.json", json.dumps(sealed("snapshot.json", record)).encode())
        elif folder == "clips":
            for other in ("videos", "failures"):
                path = store.root / other / name
                with pq.ParquetFile(path, memory_map=False) as file:
                    rows, footer = file.read(use_threads=False), dict(file.metadata.metadata or {})
                footer.pop(b"ARROW:schema", None)
                stated = {**json.loads(footer[b"p3d.clips"]), "sha256": sha256, "size_bytes": len(content)}
                footer[b"p3d.clips"] = json.dumps(stated).encode()
                written = io.BytesIO()
                with pq.ParquetWriter(written, rows.schema, write_page_checksum=True) as writer:
                    writer.write_table(rows)
                    writer.add_key_value_metadata(footer)
                self._put(store, f"{other}/{name}", written.getvalue())

    def _special(self, store: LocalStore) -> None:
        """Put a link, a fifo, a socket, a folder or a huge sparse file at the place of a file or a folder."""
        folders = ["_job", "_job/tmp", "_job/epochs", "_job/heartbeats", "_job/probe", "_job/cancel", "_job/damaged"]
        folders += [
            "clips",
            "videos",
            "failures",
            "plans",
            "roots",
            "weights",
            "_job/index",
            "_job/logs",
            "clips/sub",
            "sub",
        ]
        keys = [str(path.relative_to(store.root)) for path in self._files(store)]
        keys += ["job.json", "snapshot.json", "_job/submitted.json", "_job/preflight", "_job/tmp/x", "clips/x.parquet"]
        keys += ["_job/epochs/000009.json", "_job/heartbeats/000001.json", "_job/cancel/000003.json", "_job/epochs/.x"]
        key = self.rng.choice(folders) if self.rng.random() < 0.4 else self.rng.choice(keys)
        path = store.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not path.is_symlink():
            path.rename(self.root / f"was-{self.rng.randrange(10**9)}")
        else:
            path.unlink(missing_ok=True)
        targets = (self.canary, self.canary / "sub", self.canary / "secret.mp4", self.canary / "record.json")
        targets += (self.canary / "new", *map(Path, ("/dev/zero", "/dev/tty", "/proc/self/environ")), path, store.root)
        kinds: tuple[tuple[str, Callable[[], object]], ...] = (
            *(3 * (("link", lambda: path.symlink_to(self.rng.choice(targets))),)),
            ("relative link", lambda: path.symlink_to(os.path.relpath(self.canary / "record.json", path.parent))),
            ("hard link", lambda: os.link(self.base.root / "exclude.txt", path)),
            ("fifo", lambda: os.mkfifo(path)),
            ("socket", lambda: _socket(path)),
            ("folder", path.mkdir),
            ("huge", lambda: _huge(path, self.rng.choice(HUGE_BYTES))),
            ("device", lambda: os.mknod(path, 0o20666, os.makedev(1, 5))),
            ("unreadable", lambda: (path.write_bytes(b"{}"), path.chmod(0))),
        )
        what, do = self.rng.choice(kinds)
        self.what.append(f"{what} at {key}")
        try:
            do()
        except OSError:  # a path that is too long for a socket, or no permission for a device
            path.write_bytes(b"")

    def _raw(self, store: LocalStore) -> None:
        path = self.rng.choice(self._files(store))
        self.what.append(f"raw bytes at {path.relative_to(store.root)}")
        self._put(store, str(path.relative_to(store.root)), self.rng.choice(RAW))

    def _stray(self, store: LocalStore) -> None:
        """Files of other names in our folders."""
        folders = (
            "plans",
            "roots",
            "_job/epochs",
            "_job/heartbeats",
            "clips",
            "videos",
            "failures",
            "weights",
            "_job",
            "",
        )
        folder = self.rng.choice(folders)
        bad: tuple[str, ...] = ("\x1b[2J", "\r", "\u202e", "\udcff", ".DS_Store")
        bad += ("._0001.json", "0001.json", "9999.json", "999999999.json")
        name = f"{self.rng.choice(bad)}{self.rng.choice(('', '.json', '.parquet', '.tmp'))}"
        self.what.append(f"stray {folder}/{name!r}")
        (store.root / folder).mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), (store.root / folder / name).open("xb") as file:
            file.write(self.rng.choice(RAW))

    def _flip(self, store: LocalStore) -> None:
        path = self.rng.choice(self._files(store))
        content = bytearray(path.read_bytes()) if path.stat().st_size < 1 << 24 else bytearray(b"x")
        self.what.append(f"flips in {path.relative_to(store.root)}")
        for _ in range(self.rng.choice((1, 3, 20))):
            if content:
                content[self.rng.randrange(len(content))] = self.rng.randrange(256)
        if self.rng.random() < 0.3:
            del content[self.rng.randrange(len(content) + 1) :]
        self._put(store, str(path.relative_to(store.root)), bytes(content))


def sealed(key: str, record: Any) -> Any:
    """A record whose own digests are right."""
    if key == "job.json":
        return {**record, "recipe_digest": digest(record["recipe"])}
    if key == "snapshot.json":
        record = {name: value for name, value in record.items() if name != "digest"}
        return {**record, "digest": digest(record)}
    for folder, name in (("plans/", "plan"), ("roots/", "root")):
        if key.startswith(folder):
            return {**record, f"{name}_digest": digest(record[name])}
    return record


def foreign_index(root: Path) -> tuple[bytes, bytes]:
    """An index of FAISS whose inverted lists are in another file, which FAISS opens for writing, and its name."""
    import faiss

    name = str(root / "lists")
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(8), 8, 2)
    index.own_invlists = True
    index.train(np.eye(8, dtype=np.float32))
    lists = faiss.OnDiskInvertedLists(2, index.code_size, name)
    lists.this.disown()
    index.replace_invlists(lists, True)
    faiss.write_index(index, str(root / "index"))
    return (root / "index").read_bytes(), os.fsencode(name)


def not_utf8(n: int) -> pa.Array:
    """Strings that no encoder has made."""
    ends = np.arange(n + 1, dtype=np.int32) * 2
    return pa.Array.from_buffers(pa.string(), n, [None, pa.py_buffer(ends.tobytes()), pa.py_buffer(b"\xff\xfe" * n)])


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def _huge(path: Path, size_bytes: int) -> None:
    path.touch()
    os.truncate(path, size_bytes)
