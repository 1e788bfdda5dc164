"""Errors of two kinds, which are kept separate.

A problem with **one video** is a value: a `Failure` row with a `Reason` from the fixed set below. Inside the data plane
it is raised as `VideoError` up to one boundary (`p3d.pipeline.decode.frames`), which turns it into that row.

A problem with **the job** is an exception with a message for the user:

    JobError
    ├── InputError          an invalid input: no videos, a bad option, a malformed list
    │   └── BadVideo        the one video that was asked for has no rows
    ├── NoSuchJob           this output has no job.json
    ├── OtherRecipe         the output belongs to a job with other settings
    ├── OtherVersion        the output is of a newer schema version than this program reads
    ├── Untrusted           the output is of somebody else, and the request needs trust in it
    ├── AlreadyRunning      another scheduler is running at this output
    ├── ClusterError        Ray could not start, or a node cannot take part in the job
    │   └── NodeFault       the GPU of a node failed while it decoded
    ├── Unfinished          the request needs a finished job
    ├── DamagedJob          job.json, a plan or a manifest does not match its digest
    └── StoreError          the store could not complete a request
        ├── StoreMissing    no such object
        │   ├── StoreChanged   no longer the same object
        │   └── StoreNoBucket  no such bucket
        ├── StoreCorrupt    the bytes received do not match the store's checksum
        ├── StoreDenied     missing credentials or permissions
        ├── StoreFull       no space left
        ├── StoreGone       the folder of the output was removed or exchanged while it was in use
        ├── StoreUnsafe     the store cannot create an object exactly once, or holds a link, a device or a huge file
        └── StoreUnknown    the request may or may not have happened (time-out, lost reply, outage)
"""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches
from enum import StrEnum


class Reason(StrEnum):
    """Why a video has no rows. The set is fixed: `failures.reason` is always one of these."""

    EMPTY_FILE = "empty_file"
    NOT_A_FILE = "not_a_file"
    NOT_A_VIDEO = "not_a_video"
    NO_VIDEO_STREAM = "no_video_stream"
    NO_FRAMES = "no_frames"
    UNSUPPORTED = "unsupported"
    TRUNCATED = "truncated"
    CORRUPT_FRAMES = "corrupt_frames"
    SOURCE_MISSING = "source_missing"
    SOURCE_DENIED = "source_denied"
    SOURCE_CHANGED = "source_changed"
    SOURCE_CORRUPT = "source_corrupt"
    TOO_LONG = "too_long"
    TOO_LARGE = "too_large"
    DECODE_TIMEOUT = "decode_timeout"
    DECODE_MEMORY = "decode_memory"
    DECODER_CRASH = "decoder_crash"
    NON_FINITE = "non_finite"
    INTERNAL = "internal"


REASON_MEANING: dict[Reason, str] = {
    Reason.EMPTY_FILE: "the file has no bytes",
    Reason.NOT_A_FILE: "a directory, fifo, device or socket, or a link that leads out of the source folder",
    Reason.NOT_A_VIDEO: "text, a playlist, a still picture or bytes that no demuxer recognises",
    Reason.NO_VIDEO_STREAM: "a media file without a video stream: audio or subtitles only",
    Reason.NO_FRAMES: "a video stream without a frame that can be decoded",
    Reason.UNSUPPORTED: "encrypted, or a codec, colour matrix or gap that cannot be handled",
    Reason.TRUNCATED: "the end of the file is missing",
    Reason.CORRUPT_FRAMES: "damaged data inside the stream",
    Reason.SOURCE_MISSING: "the file does not exist, or no longer exists",
    Reason.SOURCE_DENIED: "no permission to read the file",
    Reason.SOURCE_CHANGED: "the file is not the one that was planned, or it changed while it was read",
    Reason.SOURCE_CORRUPT: "the bytes received do not match the checksum in the store",
    Reason.TOO_LONG: "longer than the job's limit",
    Reason.TOO_LARGE: "more pixels or bytes than the job's limit",
    Reason.DECODE_TIMEOUT: "decoding took longer than the deadline for one video",
    Reason.DECODE_MEMORY: "decoding needed more memory than one video may use",
    Reason.DECODER_CRASH: "the decoder process crashed on this video, and again when the video was retried alone",
    Reason.NON_FINITE: "the network returned NaN, infinity or only zeros for a clip of this video",
    Reason.INTERNAL: "a bug in this program; the job does not exit 0, please report it",
}
# what the user can do about a video that failed for this reason
REASON_REMEDY: dict[Reason, str] = {
    Reason.EMPTY_FILE: "Copy the file again from its origin, then retry.",
    Reason.NOT_A_FILE: "Leave it out, or put the file itself into the source folder.",
    Reason.NOT_A_VIDEO: "Nothing, if it is not a video. Otherwise check how it was copied.",
    Reason.NO_VIDEO_STREAM: "Nothing: it has no video stream.",
    Reason.NO_FRAMES: "If a player shows frames, convert it (ffmpeg -i IN -c:v libx264 OUT.mp4), and please report it.",
    Reason.UNSUPPORTED: "Decrypt or convert it (ffmpeg -i IN -c:v libx264 OUT.mp4), then retry.",
    Reason.TRUNCATED: "Copy it again; if it is cut at its origin, launch into a new output with --partial keep.",
    Reason.CORRUPT_FRAMES: "Copy it again; if its origin is damaged, launch into a new output with --partial keep.",
    Reason.SOURCE_MISSING: "Restore it, then retry.",
    Reason.SOURCE_DENIED: "Give the job's user permission to read it, then retry.",
    Reason.SOURCE_CHANGED: "Launch again into the same output: the new version is planned.",
    Reason.SOURCE_CORRUPT: "The store holds damaged bytes: upload it again, then retry.",
    Reason.TOO_LONG: "Cut it, or retry with a higher --max-duration.",
    Reason.TOO_LARGE: "Retry with a higher limit if its detail names max_pixels or max_file_bytes; else crop it.",
    Reason.DECODE_TIMEOUT: "Retry with a higher --video-timeout, or convert it.",
    Reason.DECODE_MEMORY: "Retry with a higher --max-decode-memory, or on a GPU with more free memory; or convert it.",
    Reason.DECODER_CRASH: "Convert it, then retry; please report it if you may share the file.",
    Reason.NON_FINITE: "Check the weights; in fp16, launch into a new output with --precision fp32.",
    Reason.INTERNAL: "Please report it with its detail text.",
}


# the same in a training, which skips the video and cannot retry it: a later training takes it again
_SAME_IN_TRAINING = {Reason.NOT_A_FILE, Reason.NOT_A_VIDEO, Reason.NO_VIDEO_STREAM, Reason.NO_FRAMES, Reason.INTERNAL}
TRAINING_REMEDY: dict[Reason, str] = {
    **{reason: REASON_REMEDY[reason] for reason in _SAME_IN_TRAINING},
    Reason.EMPTY_FILE: "Copy the file again from its origin.",
    Reason.UNSUPPORTED: "Decrypt or convert it (ffmpeg -i IN -c:v libx264 OUT.mp4).",
    Reason.TRUNCATED: "Copy it again; if it is cut at its origin, convert it (ffmpeg -i IN -c:v libx264 OUT.mp4).",
    Reason.CORRUPT_FRAMES: "Copy it again; if its origin is damaged, convert it (ffmpeg -i IN -c:v libx264 OUT.mp4).",
    Reason.SOURCE_MISSING: "Restore it.",
    Reason.SOURCE_DENIED: "Give your user permission to read it.",
    Reason.SOURCE_CHANGED: "Train into another output: the new version is taken.",
    Reason.SOURCE_CORRUPT: "The store holds damaged bytes: upload it again.",
    Reason.TOO_LONG: "Cut it.",
    Reason.TOO_LARGE: "Scale it down or cut it.",
    Reason.DECODE_TIMEOUT: "Convert it, or train with a higher --video-timeout.",
    Reason.DECODE_MEMORY: "Convert it, or train with a higher --max-decode-memory.",
    Reason.DECODER_CRASH: "Convert it; please report it if you may share the file.",
    Reason.NON_FINITE: "Check the weights.",
}


# what code raises that reads a record whose values are of other types, or larger, than those that p3d writes
MALFORMED = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError)


def meaning_of(reason: str) -> tuple[str, str]:
    """What a reason means and what to do about it. A row of an output may have one that this version does not know."""
    if reason not in set(Reason):
        return "a reason that this version of p3d does not know", "Look at its detail."
    return REASON_MEANING[Reason(reason)], REASON_REMEDY[Reason(reason)]


def meaning_in_training(reason: str) -> tuple[str, str]:
    """As `meaning_of`, for a video that a training has skipped."""
    meaning, remedy = meaning_of(reason)
    return meaning, TRAINING_REMEDY[Reason(reason)] if reason in set(Reason) else remedy


def check_reasons(reasons: Iterable[str]) -> None:
    """InputError, with those that it may stand for, if a --reason does not exist."""
    for text in sorted(set(reasons) - set(Reason)):
        like = [one for one in Reason if text and text in one] or get_close_matches(text, list(Reason), 3)
        hint = f"; did you mean {' or '.join(like)}?" if like else ""
        raise InputError(f"--reason {text} is not one of {', '.join(Reason)}{hint}")


def escape(text: str) -> str:
    """Text from outside for people: control characters as \\xNN or \\uNNNN, so is all else that is not printable.

    So a name can neither control a terminal nor imitate a line of output, nor change the direction of a line.
    """
    if text.isprintable():
        return text
    return "".join(
        one
        if one.isprintable() or unicodedata.category(one) == "Zs"
        else f"\\x{ord(one):02x}"
        if one < "\u0100"
        else one.encode("ascii", "backslashreplace").decode()
        for one in text
    )


def counted(number: int, noun: str) -> str:
    """`1 video`, `2 videos`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shell_words(*words: str) -> str:
    """Words as a user types them in a shell. What `escape` would change is written as bash, zsh and ksh read it."""
    return " ".join(shlex.quote(word) if escape(word) == word else _dollar_quoted(word) for word in words)


def _dollar_quoted(word: str) -> str:
    raw = word.encode("utf-8", "surrogateescape")
    return "$'" + "".join(chr(one) if 32 <= one < 127 and one not in b"'\\" else f"\\x{one:02x}" for one in raw) + "'"


def as_stored(text: str) -> str:
    """A name that was typed or requested as columns hold it: bytes that are not UTF-8 as \\xNN. Any text has one."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair
        return text.encode("utf-8", "backslashreplace").decode()


class VideoError(Exception):
    """One video cannot be read. Caught in one function, which turns it into a `Failure`.

    `detail` is text for the user: what happened and, where known, at which frame or byte.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class JobError(Exception):
    """The job cannot continue. `str(error)` says what happened, to what, and what to do."""


class InputError(JobError):
    """An invalid input: no videos, a malformed list, an option that contradicts another."""


class BadVideo(InputError):
    """The one video that was asked for has no rows: its place, its `Reason` and a detail for the user."""

    def __init__(self, place: str, reason: Reason, detail: str) -> None:
        super().__init__(place, reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        place, reason, detail = self.args
        return f"{place}: {reason}: {detail}"


class NoSuchJob(JobError):
    """This output has no job.json."""


class OtherRecipe(JobError):
    """The output belongs to a job with other settings; the message names the fields that differ."""


class OtherVersion(JobError):
    """The output is of a newer schema version than this program reads; the message names both."""


class Untrusted(JobError):
    """The user neither launched the job nor named its output to `p3d trust`, and the request needs that."""


class AlreadyRunning(JobError):
    """Another scheduler is running at this output, or has taken over from this one."""


class ClusterError(JobError):
    """Ray could not start, or a node cannot take part in the job. Once that is fixed, the job can be resumed."""


class NodeFault(ClusterError):
    """The GPU of a node failed while it decoded. No video fails because of it. The message names the node."""


class Unfinished(JobError):
    """Some videos of the job are still pending, and the request needs them."""


class DamagedJob(JobError):
    """job.json, a plan or a manifest part does not match its digest."""


class StoreError(JobError):
    """The store could not complete a request."""


class StoreMissing(StoreError):
    """No such object."""


class StoreChanged(StoreMissing):
    """The object is no longer the one that was asked for."""


class StoreNoBucket(StoreMissing):
    """There is no such bucket. This is a problem with the job, whichever object was asked for."""


class StoreCorrupt(StoreError):
    """The bytes received repeatedly do not match the store's checksum."""


class StoreDenied(StoreError):
    """Missing credentials or permissions."""


class StoreFull(StoreError):
    """No space left for the object."""


class StoreGone(StoreError):
    """The folder of the output was removed or unmounted, or another one is in its place. Nothing more is written."""


class StoreUnsafe(StoreError):
    """The store cannot create an object exactly once, or holds what is never opened: a link, a device, a huge file."""


class StoreUnknown(StoreError):
    """The request may or may not have happened: time-out, lost reply, outage."""


# what the user can do about an error of a store
STORE_REMEDY: dict[type[StoreError], str] = {
    StoreMissing: "Restore the object, or run `p3d resume OUT`, which makes missing files again.",
    StoreChanged: "Launch again: the new version of the file is planned.",
    StoreNoBucket: "Check the name of the bucket, the region and `--endpoint-url`.",
    StoreCorrupt: "Upload the object again. If other objects fail, too, check the network and proxies.",
    StoreDenied: "Check the credentials, `--profile`, and the permissions of the user and the bucket.",
    StoreFull: "Free space, then run `p3d resume OUT`.",
    StoreGone: "Mount the disk again, or restore the folder, then run `p3d resume OUT`.",
    StoreUnsafe: "Write to a disk with hard links, to AWS S3, or to a server that supports `If-None-Match`. If the "
    "message names a link, a device or a huge file in OUT, remove it.",
    StoreUnknown: "Wait until the store answers, then run `p3d resume OUT`. `--store-patience` says how long a run "
    "waits for it.",
}


class StrayFile(UserWarning):
    """A file in an output that p3d did not write, or cannot read, was skipped. The message names it."""
