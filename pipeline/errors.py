"""What can go wrong, in two kinds that must not be mixed.

Trouble with **one video** is a value: a `Failure` row with a `Reason` from the closed set below. Inside the data plane
it travels as `VideoError` up to one boundary (`p3d.pipeline.decode.frames`), which turns it into that row.

Trouble with **the job** is an exception with a sentence for people:

    JobError
    ├── InputError          an input that cannot be: no videos, a bad option, a malformed list
    │   └── BadVideo        the one video that was asked for has no rows
    ├── NoSuchJob           there is no job.json at this output
    ├── OtherRecipe         the output belongs to a job with other settings
    ├── AlreadyRunning      another scheduler is live at this output
    ├── ClusterError        Ray could not start, or a node cannot do its part
    ├── Unfinished          what was asked needs a job that is done
    ├── DamagedJob          job.json, a plan or a manifest does not match its digest
    └── StoreError          the store could not do what was asked
        ├── StoreMissing    no such object
        │   ├── StoreChanged   no longer the same object
        │   └── StoreNoBucket  no such bucket
        ├── StoreCorrupt    the bytes that arrive are not those the store says it has
        ├── StoreDenied     credentials or permissions
        ├── StoreFull       no space left
        ├── StoreUnsafe     the store cannot create an object exactly once
        └── StoreUnknown    the request may or may not have happened (time-out, lost reply, outage)
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a video has no rows. The closed set: `failures.reason` is always one of these."""

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
    Reason.NOT_A_VIDEO: "text, a playlist, an image or bytes that no demuxer knows",
    Reason.NO_VIDEO_STREAM: "a media file without pictures: audio only, subtitles only",
    Reason.NO_FRAMES: "a video stream of which no frame can be decoded",
    Reason.UNSUPPORTED: "encrypted, or a codec that no decoder here has",
    Reason.TRUNCATED: "the file ends before the frames it promises",
    Reason.CORRUPT_FRAMES: "damaged data inside the stream",
    Reason.SOURCE_MISSING: "the file is not there (any more)",
    Reason.SOURCE_DENIED: "no permission to read the file",
    Reason.SOURCE_CHANGED: "the file is not the one that was planned, or it changed while it was read",
    Reason.SOURCE_CORRUPT: "the bytes that arrived are not those the store says it has",
    Reason.TOO_LONG: "longer than the limit of the job",
    Reason.TOO_LARGE: "more pixels or bytes than the limit of the job",
    Reason.DECODE_TIMEOUT: "decoding took longer than the deadline for one video",
    Reason.DECODE_MEMORY: "decoding needed more memory than one video may take",
    Reason.DECODER_CRASH: "the decoder's process died on this video, and again when it was tried alone",
    Reason.NON_FINITE: "the network gave NaN, infinity or nothing but zeros for a clip of this video",
    Reason.INTERNAL: "a defect of this program; the job does not exit 0, please report it",
}
# what to do about a video that failed for it
REASON_REMEDY: dict[Reason, str] = {
    Reason.EMPTY_FILE: "Copy the file again from where it came from, then retry.",
    Reason.NOT_A_FILE: "Leave it out, or put the file itself into the source folder.",
    Reason.NOT_A_VIDEO: "Nothing, if it is none. Otherwise look at how it was copied.",
    Reason.NO_VIDEO_STREAM: "Nothing: there are no pictures in it.",
    Reason.NO_FRAMES: "Play it; if a player shows pictures, please report it.",
    Reason.UNSUPPORTED: "Decrypt or convert it (ffmpeg -i IN -c:v libx264 OUT.mp4), then retry.",
    Reason.TRUNCATED: "Copy it again; if it is cut at its origin, launch into a new output with --partial keep.",
    Reason.CORRUPT_FRAMES: "Copy it again; if its origin is damaged, launch into a new output with --partial keep.",
    Reason.SOURCE_MISSING: "Bring it back, then retry.",
    Reason.SOURCE_DENIED: "Give the job's user permission to read it, then retry.",
    Reason.SOURCE_CHANGED: "Launch again into the same output: the new version is planned.",
    Reason.SOURCE_CORRUPT: "The store holds damaged bytes: upload it again, then retry.",
    Reason.TOO_LONG: "Cut it, or retry with a higher --max-duration.",
    Reason.TOO_LARGE: "Make it smaller, or retry with a higher --max-pixels or --max-file-bytes.",
    Reason.DECODE_TIMEOUT: "Retry with a higher --video-timeout, or convert it.",
    Reason.DECODE_MEMORY: "Retry with a higher --max-decode-memory, or convert it.",
    Reason.DECODER_CRASH: "Convert it, then retry; please report it if it may be shared.",
    Reason.NON_FINITE: "Look at the weights; in fp16, launch into a new output with --precision fp32.",
    Reason.INTERNAL: "Please report it, with the detail.",
}


class VideoError(Exception):
    """One video cannot be read. Caught at one place, where it becomes a `Failure`.

    `detail` is a sentence for people: what happened and, where known, at which frame or byte.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class JobError(Exception):
    """The job cannot go on. `str(error)` says what happened, to what, and what to do."""


class InputError(JobError):
    """An input that cannot be: no videos, a malformed list, an option that contradicts another."""


class BadVideo(InputError):
    """The one video that was asked for has no rows, for a reason of the closed set and with a sentence."""

    def __init__(self, place: str, reason: Reason, detail: str) -> None:
        super().__init__(place, reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        place, reason, detail = self.args
        return f"{place}: {reason}: {detail}"


class NoSuchJob(JobError):
    """There is no job.json at this output."""


class OtherRecipe(JobError):
    """The output belongs to a job with other settings; the message names the fields that differ."""


class AlreadyRunning(JobError):
    """Another scheduler is live at this output, or has taken over from this one."""


class ClusterError(JobError):
    """Ray could not start, or a node cannot do its part; once that is mended, a resume goes on."""


class Unfinished(JobError):
    """Some videos of the job are still to be done, and what was asked needs them."""


class DamagedJob(JobError):
    """job.json, a plan or a manifest part does not match its digest."""


class StoreError(JobError):
    """The store could not do what was asked."""


class StoreMissing(StoreError):
    """No such object."""


class StoreChanged(StoreMissing):
    """The object is no longer the one that was asked for."""


class StoreNoBucket(StoreMissing):
    """There is no such bucket: trouble with the job, whatever object was asked for."""


class StoreCorrupt(StoreError):
    """The bytes that arrive are, again and again, not those the store says it has."""


class StoreDenied(StoreError):
    """Credentials or permissions."""


class StoreFull(StoreError):
    """No space left where the object should go."""


class StoreUnsafe(StoreError):
    """The store cannot create an object exactly once, so nothing could be promised on it."""


class StoreUnknown(StoreError):
    """The request may or may not have happened: time-out, lost reply, outage."""
