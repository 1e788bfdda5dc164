"""What every `--json` prints, as data: docs/generate.py makes docs/reference/json.md of it, and tests/test_json.py
compares it with what the verbs print.

A key is written as its path: `hits[].path` is the key `path` of each item of `hits`, and `software{}` each value of
`software`. A path that ends in `?` is not always there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from p3d.jobs.api.moves import Relocated, Sources
from p3d.jobs.monitor.recompute import RowFound
from p3d.jobs.monitor.status import Status
from p3d.jobs.monitor.training import TrainStatus
from p3d.jobs.planning.estimate import Estimate
from p3d.jobs.planning.speed import Speed
from p3d.jobs.planning.weights_convention import Trial
from p3d.jobs.scheduler.preflight import NodeReport
from p3d.pipeline.dataset.snapshot_record import Counts, FileRecord
from p3d.pipeline.dataset.verify import Audit
from p3d.pipeline.recipe import Recipe
from p3d.pipeline.results.duplicates import Duplicates
from p3d.pipeline.results.evaluation.scores import Hits
from p3d.pipeline.results.evaluation.svm import Accuracy
from p3d.pipeline.results.export import Exported
from p3d.pipeline.results.search.exact import Hit
from p3d.pipeline.results.search.index import IndexRecord
from p3d.preprocessing import ClipRecipe
from p3d.weights.hints import Hints
from p3d.zoo import Description


@dataclass(frozen=True)
class Answer:
    """The object that some verbs print: `keys` (path -> type and meaning), and `records` (path -> class of its fields).

    The path "" of a record is the object itself. `without` are fields that are not printed.
    """

    verbs: tuple[str, ...]
    text: str
    keys: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    records: Mapping[str, type] = field(default_factory=dict)
    without: frozenset[str] = frozenset()

    def paths(self) -> set[str]:
        """The path of every key, those of records in it included."""
        found = set(self.keys)
        for prefix, record in self.records.items():
            found |= {path for path, _ in fields_of(record, prefix, self.without)}
        return found


def fields_of(record: type, prefix: str, without: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """(path, type) of each field of a record and of the records in it."""
    hints = get_type_hints(record)
    for one in dataclasses.fields(record):
        if one.name not in without:
            yield from _of(hints[one.name], f"{prefix}.{one.name}" if prefix else one.name)


def _of(hint: Any, path: str) -> Iterator[tuple[str, str]]:
    """(path, type) of a value and of what it holds."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (kept,) = [one for one in args if one is not type(None)]
        (_, text), *rest = _of(kept, path)
        yield path, f"{text} or null"
        yield from rest
    elif origin is Literal:
        yield path, "string"
    elif dataclasses.is_dataclass(hint):
        yield path, "object"
        yield from fields_of(hint, path)  # type: ignore[arg-type]
    elif origin in (tuple, list, set, frozenset):
        (_, text), *rest = _of(args[0], f"{path}[]")
        yield path, _many("list", text)
        yield from rest
    elif origin is dict:
        (_, text), *rest = _of(args[1], f"{path}{{}}")
        yield path, _many("object", text)
        yield from rest
    else:
        yield path, {str: "string", int: "integer", float: "number", bool: "boolean"}.get(hint, "string")


def _many(kind: str, text: str) -> str:
    """`list of strings`; `list of list of strings`."""
    return f"{kind} of {text}" if " of " in text else f"{kind} of {text}s"


STATUS = Answer(
    ("status", "launch", "resume", "retry"),
    "The progress of a job. `launch`, `resume` and `retry` print it when the run has ended. `sources` is there with "
    "`--sources`.",
    {"sources?": ("object", "where the source videos are now")},
    {"": Status, "sources": Sources},
)
TRAINING = Answer(
    ("status", "train", "resume"),
    "The progress of a training, if OUT is one.",
    records={"": TrainStatus},
)
SEVERAL = Answer(
    ("status", "jobs list"),
    "Several outputs, such as those in a folder. Each item of `jobs` is the object of `status` of a job, each one of "
    "`trainings` that of a training.",
    {
        "jobs": ("list", "jobs"),
        "trainings": ("list", "trainings"),
        "unreadable": ("list of strings", "outputs that could not be read"),
    },
    {"jobs[]": Status, "trainings[]": TrainStatus},
)
FAILURES = Answer(
    ("failures",),
    "The videos that have no rows.",
    {
        "failures": ("list", "videos without rows, the newest row of each"),
        "failures[].video_id": ("string", "as in [failures/](columns.md#failures)"),
        "failures[].path": ("string", "the same"),
        "failures[].uri": ("string", "the same"),
        "failures[].plan_seq": ("integer", "the same"),
        "failures[].version": ("string", "the same"),
        "failures[].reason": ("string", "one of the [failure reasons](failure-reasons.md)"),
        "failures[].detail": ("string", "what happened"),
        "failures[].attempts": ("integer", "how many decodes were started"),
    },
)
RECOMPUTE_KEYS = {
    "recompute?": ("object", "with `--recompute`: how the rows agree that were computed again"),
    "recompute.seed": ("integer", "that of the draw"),
    "recompute.rows": ("integer", "newest clips of OUT"),
    "recompute.drawn": ("integer", "clips that were drawn"),
    "recompute.bits": ("integer", "those that agree bit for bit"),
    "recompute.cosine": ("integer", "those that agree by their cosine"),
    "recompute.wrong": ("integer", "those that do not agree"),
    "recompute.unchecked": ("integer", "those that could not be checked"),
    "recompute.most_wrong": ("integer", "with the given confidence, no more rows are wrong"),
    "recompute.of": ("integer", "the number of rows that `most_wrong` is about"),
    "recompute.confidence": ("number", "0.95"),
    "recompute.otherwise": ("object of integers", "what was made otherwise than here, in how many drawn rows"),
    "recompute.weights": ("object", "the weights that were used"),
    "recompute.weights.sha256": ("string", "their sha256"),
    "recompute.weights.from_out": ("boolean", "whether they are those in OUT"),
    "recompute.weights.as_recipe": ("boolean", "whether they are those of the recipe"),
    "recompute.wrong_rows": ("list", "rows that do not agree"),
    "recompute.unchecked_rows": ("list", "rows that could not be checked"),
}
VERIFY = Answer(
    ("verify",),
    'The audit of one output. Of several outputs it is `{"outputs": [...]}`: each item has `out`, `exit_code`, and '
    "these keys or `error`.",
    {"damaged": ("boolean", "whether damage was found"), **RECOMPUTE_KEYS},
    {"": Audit, "recompute.wrong_rows[]": RowFound, "recompute.unchecked_rows[]": RowFound},
)
VERIFY_SNAPSHOT = Answer(
    ("verify",),
    "The check of a snapshot.",
    {
        "snapshot": ("boolean", "true"),
        "problems": ("list of strings", "a message for each problem"),
        "damaged": ("boolean", "whether there are any"),
    },
    {"": Counts},
)
PLAN = Answer(
    ("plan",),
    "What a launch would do. The keys of the estimate are missing if there is nothing to do.",
    {
        "recipe": ("object", "the settings of the job, as in [job.json](format.md#jobjson)"),
        "n_new": ("integer", "videos that OUT does not have"),
        "n_changed": ("integer", "videos whose file has changed"),
        "n_changed_columns": ("integer", "videos for which the list has other values"),
        "n_unchanged": ("integer", "videos that OUT has"),
        "n_pending": ("integer", "videos that earlier plans have left"),
        "skipped": ("list of strings", "the first other files of SRC"),
        "n_skipped": ("integer", "how many other files SRC has"),
    },
    {"": Estimate, "recipe": Recipe},
)
SEARCH = Answer(
    ("search",),
    "The most similar clips or videos, best first.",
    {
        "out?": ("string", "the output that was searched"),
        "outs?": ("list of strings", "the outputs, if there are several"),
        "query": ("string", "as it was typed"),
        "level": ("string", "`clip` or `video`"),
        "metric": ("string", "`cosine` or `l2`"),
        "rows": ("integer", "rows that were compared"),
        "seconds": ("number", "how long that took"),
        "indexed_rows": ("integer", "rows of the index; 0 without `--index`"),
        "new_videos": ("integer", "videos that the index does not have yet"),
        "pending": ("integer", "videos that have no rows yet"),
        "warning": ("string or null", "about the query"),
        "hits": ("list", "the hits"),
        "hits[].rank": ("integer", "from 1"),
        "hits[].cosine?": ("number", "the cosine, if that is the metric"),
        "hits[].l2?": ("number", "the Euclidean distance, if that is the metric"),
        "hits[].query_start_s": ("number", "the seconds of the query that the hit matches"),
        "hits[].query_end_s": ("number", "their end"),
    },
    {"hits[]": Hit},
    frozenset({"score", "query", "embedding_D"}),
)
DEDUP = Answer(
    ("results dedup",),
    "Clusters of near-duplicates, each a list of videos.",
    {
        "out": ("string", "the output"),
        "threshold": ("number", "the least cosine"),
        "pending": ("integer", "videos that have no rows yet"),
    },
    {"": Duplicates},
)
EVALUATE = Answer(
    ("results evaluate",),
    "Hit rates of class scores.",
    {
        "out": ("string", "the output"),
        "labels": ("string", "the file of labels"),
        "n_classes": ("integer", "the classes of the network"),
    },
    {"": Hits},
)
SVM = Answer(
    ("results evaluate --svm",),
    "The accuracy of a linear SVM. `folds` and `seed` are missing if the labels have fixed splits.",
    {
        "out": ("string", "the output"),
        "labels": ("string", "the file of labels"),
        "cost": ("number", "as given"),
        "folds?": ("integer", "as given"),
        "seed?": ("integer", "as given"),
    },
    {"": Accuracy},
)
EXPORT = Answer(
    ("results export",),
    "What was written.",
    {"out": ("string", "the output"), "dir": ("string", "the folder of the arrays")},
    {"": Exported},
)
SNAPSHOT = Answer(
    ("results snapshot",),
    "`snapshot.json`, as in [the format](format.md#snapshots), without its digest.",
    {
        "source": ("string", "the output that it was made of"),
        "created_at": ("string", "UTC"),
        "plans": ("object of strings", "number of a plan -> its digest"),
        "with_clips": ("boolean", "whether it has clips/"),
        "counts": ("object", "rows of each folder, and what was left out"),
        "files": ("list", "its files"),
        "versions": ("object of strings", "the software that wrote it"),
        "recipe": ("object", "the settings of the job"),
        "recipe_digest": ("string", ""),
        "weights_sha256": ("string", ""),
        "weights_origin": ("string", ""),
        "job_versions": ("object of strings", "the software that planned the job"),
        "dest": ("string", "where it is"),
        "n_unknown": ("integer", "ids of `--exclude` that no video has"),
    },
    {"counts": Counts, "files[]": FileRecord, "recipe": Recipe},
)
INDEX = Answer(
    ("results index",),
    "The record of the index.",
    {
        "out": ("string", "the output"),
        "file": ("string", "the file of the index"),
        "index_bytes": ("integer", "its size"),
        "pending": ("integer", "videos that have no rows yet"),
    },
    {"": IndexRecord},
    frozenset({"pieces", "vectors", "rows"}),
)
REPORT = Answer(
    ("results report",),
    "What was written.",
    {
        "out": ("string", "the output"),
        "report": ("string", "the file"),
        "size_bytes": ("integer", "its size"),
        "videos": ("integer", "videos of the job"),
        "failed": ("integer", "those that failed"),
        "pending": ("integer", "those without rows yet"),
        "clips": ("integer", "clips"),
        "pictures": ("integer", "pictures in the report"),
        "without_picture": ("integer", "videos whose picture could not be made"),
    },
)
RELOCATE = Answer(("relocate",), "What was found at the new place.", records={"": Relocated})
CHECK = Answer(
    ("cluster check",),
    "The report of each node.",
    {
        "gpus": ("integer", "GPUs of the cluster"),
        "nodes": ("list", "nodes"),
        "problems": ("list of strings", "what would prevent a job"),
    },
    {"nodes[]": NodeReport},
)
MODELS = Answer(
    ("models",),
    "The networks. `measured` and `speed` are there with `--measure`.",
    {
        "models": ("list", "networks"),
        "models[].speed?": ("object", "clips per second"),
        "measured?": ("object", "where they were measured"),
        "measured.device": ("string", ""),
        "measured.threads": ("integer", ""),
        "measured.batch_size": ("integer", ""),
    },
    {"models[]": Description, "models[].speed": Speed},
)
WEIGHTS = Answer(
    ("weights show", "weights import", "weights fetch"),
    "What a file of weights is. `hints` are printed by `show` alone.",
    {
        "file": ("string", "the file"),
        "size_bytes": ("integer", "its size"),
        "sha256": ("string", ""),
        "format": ("string", "such as `native` or `caffe`"),
        "network": ("string", "one of `p3d models`"),
        "graph": ("string", "`caffe` or `port`"),
        "stride_on": ("string", "`1x1` or `3x3`"),
        "in_channels": ("integer", "3 for RGB, 2 for optical flow"),
        "num_classes": ("integer", ""),
        "class_names": ("list of strings", "empty if they are not known"),
        "recipe": ("object", "how a clip is prepared"),
        "origin": ("string", "where the weights came from"),
        "hints?": ("object", "from the values of the weights"),
    },
    {"recipe": ClipRecipe, "hints": Hints},
)
WEIGHTS_LIST = Answer(
    ("weights list",),
    "The weights that `weights fetch` knows.",
    {
        "weights": ("list", ""),
        "weights[].name": ("string", "the name that `fetch` takes"),
        "weights[].network": ("string", "what an import makes of it"),
        "weights[].size_mb": ("number", "of the download, in 1e6 bytes"),
        "weights[].sha256": ("string", "its first digits"),
        "weights[].licence": ("string", ""),
        "weights[].weights": ("string", "torchvision's name"),
        "weights[].url": ("string", ""),
    },
)
CHOOSE = Answer(
    ("weights choose",),
    "How often each convention was right, best first.",
    {
        "videos": ("integer", "videos that were classified"),
        "clips": ("integer", "their clips"),
        "trials": ("list", "conventions"),
        "trials[].right": ("integer", "videos whose class was right"),
        "warnings": ("list of strings", "why the best may be wrong"),
        "next": ("string", "the command to run next"),
    },
    {"trials[]": Trial},
    frozenset({"right"}),
)
ANSWERS = (
    *(PLAN, STATUS, TRAINING, SEVERAL, FAILURES, VERIFY),
    *(VERIFY_SNAPSHOT, SEARCH, RELOCATE, INDEX, DEDUP, EVALUATE, SVM, EXPORT, SNAPSHOT, REPORT, MODELS, WEIGHTS),
    *(WEIGHTS_LIST, CHOOSE, CHECK),
)
