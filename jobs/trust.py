"""Is the job at an output this user's own? One rule, as with the `known_hosts` of ssh.

    launch, or a client that submits a driver ──remember──> P3D_STATE/<hash of place, endpoint, id>.json ──> trusted
    p3d trust OUT, --trust ────────────────────remember──> the same                                       ──> trusted
    P3D_TRUST=OUT:OUT2 ───────────────────────────────────────────────────────────────────────────────────> trusted

An output that somebody sent may name any file, endpoint or bucket. So a job that is not trusted is read-only: nothing
that it says decides what is read, where credentials go, or what is computed. The records also hold the user's own store
options, because a resume may not take them from OUT.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow.compute as pc

from p3d.jobs.job import manifests, read_job
from p3d.jobs.machine import user_name
from p3d.pipeline.dataset.plans import Manifest
from p3d.pipeline.dataset.snapshot_record import SNAPSHOT_KEY, SnapshotRecord, read_snapshot
from p3d.pipeline.dataset.totals import ShardKey
from p3d.pipeline.errors import InputError, StoreError, Untrusted, shell_words
from p3d.pipeline.recipe import JobRecord, digest
from p3d.pipeline.sources.below import SourceRule
from p3d.pipeline.storage.local import is_private, make_private
from p3d.pipeline.storage.store import DEFAULTS, Store, StoreOptions
from p3d.pipeline.storage.urls import open_store, place_of

STATE = "P3D_STATE"
LISTED = "P3D_TRUST"
SHOWN = 100  # characters of a text from OUT in a message

Say = Callable[[str], None]  # shows one message to the user


class Owned(Protocol):
    """The record of a job, a snapshot or a training, which says whose it is by its `job_id`, or by its content."""

    def to_json(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class TrustRecord:
    """A job that this user launched or named to `p3d trust`: who said so, where and when, and how its store is reached.

    `how` is "launched", "trusted" or "copied" (a snapshot of a trusted output). `options` are those of the newest run.
    """

    out: str
    endpoint: str
    job_id: str
    how: str
    user: str
    host: str
    when: str
    options: StoreOptions


@dataclass(frozen=True, slots=True)
class Origin:
    """Who launched a job, where and when, as its oldest run says. Each is text from OUT, or empty if it is unknown."""

    user: str
    host: str
    started: str

    def __str__(self) -> str:
        who = "@".join(filter(None, (self.user, self.host)))
        return f"by {who or 'somebody unknown'}" + (f" at {self.started}" if self.started else "")


def id_of(job: Owned) -> str:
    """The id of a job; of a job without one, and of a snapshot, the sha256 of its record."""
    return getattr(job, "job_id", "") or hashlib.sha256(job.to_json()).hexdigest()


def owned_at(store: Store) -> JobRecord | SnapshotRecord:
    """The record of the job or the snapshot at a store. NoSuchJob, DamagedJob."""
    if store.head("job.json") is None and store.head(SNAPSHOT_KEY) is not None:
        return read_snapshot(store)
    return read_job(store)


def own_record(store: Store, job: Owned) -> TrustRecord | None:
    """This user's record of the job; None if none was written, or it cannot be read."""
    place, endpoint = place_of(store)
    try:
        path = _path_of(place, endpoint, id_of(job))
        _refuse_shared(path.parent)
        given = json.loads(path.read_bytes())
        options = StoreOptions(**_known(StoreOptions, given["options"]))
        record = TrustRecord(**{**_known(TrustRecord, given), "options": options})
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, InputError):
        return None
    return record if (record.out, record.endpoint, record.job_id) == (place, endpoint, id_of(job)) else None


def is_trusted(store: Store, job: Owned) -> bool:
    """Did this user launch the job, or name its output to `p3d trust` or in P3D_TRUST?"""
    return own_record(store, job) is not None or is_listed(store)


def sources_of(store: Store, job: Owned) -> dict[int, tuple[int, str]]:
    """plan_seq -> (number of videos, the folder or prefix that they share). DamagedJob. A snapshot has no plans."""
    found = {}
    for seq, manifest in (manifests(store, job) if isinstance(job, JobRecord) else {}).items():
        ends = [pc.min_max(videos["uri"]).as_py() for videos in manifest.parts()]
        shared = os.path.commonprefix([str(uri) for both in ends for uri in both.values()])  # noqa: RUF071 - of texts, and cut at a `/` below
        found[seq] = manifest.plan.n_videos, shared[: shared.rfind("/") + 1]
    return found


def is_listed(store: Store) -> bool:
    """Does P3D_TRUST name this output? It holds outputs as the command line takes them, separated by `os.pathsep`."""
    text, place = os.environ.get(LISTED, ""), place_of(store)[0]
    for named in {text, *re.split(rf"{re.escape(os.pathsep)}(?!//)", text)} - {""}:
        if named.startswith("s3://") is not store.url.startswith("s3://"):
            continue  # opening a store on S3 takes half a second
        with contextlib.suppress(InputError):
            if place_of(open_store(named, DEFAULTS))[0] == place:
                return True
    return False


def refuse_untrusted(store: Store, job: Owned, verb: str, otherwise: str = "") -> None:
    """Untrusted, with who launched the job and what to type, unless the job is trusted."""
    if not is_trusted(store, job):
        raise Untrusted(
            f"{store.url} is not trusted, so {verb} is refused: you did not launch this job from here. It was launched "
            f"{origin_of(store)}. If you trust them, and every path in it, run `p3d trust {store.words()}` or add "
            "--trust" + (f"; {otherwise}" if otherwise else "")
        )


def origin_of(store: Store) -> Origin:
    """Who launched the job, from the record of its oldest run. Texts are cut, and have no line breaks."""
    try:
        keys = [info.key for info in store.list("_job/epochs/") if re.fullmatch(r"_job/epochs/\d{6}\.json", info.key)]
        given = json.loads(store.read(min(keys))) if keys else {}
    except (StoreError, ValueError, RecursionError):
        given = {}
    given = given if isinstance(given, dict) else {}
    return Origin(*(" ".join(str(given.get(name) or "").split())[:SHOWN] for name in ("user", "host", "started")))


def remember(store: Store, job_id: str, how: str, options: StoreOptions) -> str:
    """Write this user's record of a job. Returns a warning if it cannot be written, else an empty text."""
    place, endpoint = place_of(store)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return _write(TrustRecord(place, endpoint, job_id, how, user_name(), platform.node(), now, options))


def keep_options(store: Store, job: Owned, options: StoreOptions) -> str:
    """Update the store options in this user's record of a job, if it exists. Returns a warning as `remember` does."""
    record = own_record(store, job)
    if record is None or record.options == options:
        return ""
    return _write(TrustRecord(**{**_fields(record), "options": options}))


def skipped_plans(
    plans: dict[int, Manifest], todo: Iterable[ShardKey], rule: SourceRule, own: str = ""
) -> dict[int, str]:
    """plan_seq -> the uri of a video that may not be opened, for each plan that has one in a shard to do.

    `own` is the digest of a plan that the user has just made, which may be run whatever it names.
    """
    skipped: dict[int, str] = {}
    for seq, shard in todo:
        if seq in skipped or plans[seq].plan.digest == own:
            continue
        uris = map(str, plans[seq].uris(shard))  # null is "None", which is below no root
        refused = next((uri for uri in uris if not rule.allows(uri)), None)
        if refused is not None:
            skipped[seq] = refused
    return skipped


def _write(record: TrustRecord) -> str:
    try:
        path = _path_of(record.out, record.endpoint, record.job_id)
        make_private(path.parent)
        _refuse_shared(path.parent)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            part.touch(0o600)
            part.write_text(json.dumps({**_fields(record), "options": asdict(record.options)}, indent=1) + "\n")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home, a relative path, or a shared folder
        named = shell_words(record.out, *record.options.words())
        return (
            f"warning: this job could not be recorded as yours ({error}); a later `p3d resume` will need "
            f"`p3d trust {named}`, or {LISTED}={record.out} in its environment"
        )
    return ""


def _refuse_shared(folder: Path) -> None:
    """RuntimeError if another user could have put records there. FileNotFoundError if the folder does not exist."""
    if not is_private(folder):
        raise RuntimeError(
            f"{folder} belongs to another user, or others may write to it; set {STATE} to a folder of your own"
        )


def _fields(record: TrustRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in TrustRecord.__slots__}


def _known(kind: type[Any], given: dict[str, Any]) -> dict[str, Any]:
    """What this version knows of a record that another version may have written."""
    return {name: value for name, value in given.items() if name in kind.__slots__}


def _path_of(place: str, endpoint: str, job_id: str) -> Path:
    """The file of a record. RuntimeError if the user has no home, or P3D_STATE is a relative path."""
    named = os.environ.get(STATE)
    folder = Path(named) if named else Path.home() / ".local" / "state" / "p3d"
    if not folder.is_absolute():  # each working directory would have records of its own
        raise RuntimeError(f"{STATE}={named} is not an absolute path")
    return folder / f"{digest([place, endpoint, job_id])}.json"


def take_on_trust(store: Store, job: Owned, s3: StoreOptions, say: Say) -> bool:
    """Record that this user trusts a job, and say whose it is. False if the record cannot be written, which is said."""
    own = own_record(store, job)
    if own is not None:
        say(f"{store.url}: you have {own.how} this job, on {own.host} at {own.when}")
        warning = keep_options(store, job, s3.or_those_of(own.options))
    else:
        warning = remember(store, id_of(job), "trusted", s3)
        until = "trusted only for this command" if warning else "trusted from now on"
        say(f"{until}: {store.url}, launched {origin_of(store)}")
    if warning:
        say(warning)
    return own is not None or not warning


def need_trust(
    store: Store, job: Owned, s3: StoreOptions, *, trust_it: bool, verb: str, say: Say, otherwise: str = ""
) -> StoreOptions:
    """Untrusted unless the job is trusted or `trust_it`. The store options of its runs: as given, else of this user's.

    None of them comes from OUT: they decide where this user's credentials go.
    """
    if trust_it:
        take_on_trust(store, job, s3, say)
    else:
        refuse_untrusted(store, job, verb, otherwise)
    own = own_record(store, job)
    if own is None:
        return s3
    s3 = s3.or_those_of(own.options)
    if warning := keep_options(store, job, s3):
        say(warning)
    return s3
