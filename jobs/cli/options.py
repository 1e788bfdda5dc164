"""Options that verbs share (recipe, source, run, cluster, S3), and the records made from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from p3d.pipeline.clips.pool import POOLS
from p3d.pipeline.recipe import (
    CPU_BATCH,
    GPU_BATCH,
    MAX_DECODE_MEMORY,
    MAX_DURATION_S,
    MAX_FILE_BYTES,
    MAX_PIXELS,
    SHARD_VIDEOS,
    STORE_PATIENCE_S,
    VIDEO_TIMEOUT_S,
)
from p3d.pipeline.storage.store import ADDRESSING, CHECKSUMS, DEFAULTS, SSE, Store, StoreOptions
from p3d.pipeline.storage.urls import open_store

if TYPE_CHECKING:
    from p3d.jobs.machine import Machines
    from p3d.jobs.planning.prepare import JobSpec
    from p3d.jobs.scheduler.control import Epoch
    from p3d.pipeline.recipe import RunOptions

F = TypeVar("F", bound=Callable[..., Any])


def _apply(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(verb: F) -> F:
        for option in reversed(options):
            verb = option(verb)
        return verb

    return decorate


class _Weights(click.types.StringParamType):
    """The text of --weights, which has no default: its absence names the two ways to get some."""

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return (
            "Give a file of weights, such as p3d63.safetensors from `p3d weights fetch resnet50-v2 -o "
            "p3d63.safetensors`, or random:SEED, which shows that the pipeline works but gives meaningless features"
        )


def _choice(*words: str) -> dict[str, Any]:
    return {"type": click.Choice(words), "default": words[0], "show_default": True}


recipe_options = _apply(
    click.option(
        "--weights",
        type=_Weights(),
        required=True,
        metavar="FILE|random:SEED",
        help="Load weights: our .safetensors, the authors' .caffemodel, the PyTorch port's .pth.tar, or random:SEED.",
    ),
    click.option(
        "--model", help="Choose the network (see `p3d models`); required for random weights and baseline checkpoints."
    ),
    click.option(
        "--graph",
        type=click.Choice(["caffe", "port"]),
        help="Use the authors' graph or the port's. Default: the weights'.",
    ),
    click.option(
        "--clips",
        default="every:16",
        show_default=True,
        metavar="RULE",
        help="Cut clips by every:STRIDE, uniform:COUNT or random:COUNT@SEED.",
    ),
    click.option(
        "--frame-step",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        metavar="N",
        help="Take every Nth frame into a clip.",
    ),
    click.option(
        "--fps",
        type=click.FloatRange(min=0, min_open=True, max=240),
        metavar="R",
        help="Resample to R frames/s by time, so that all clips span equal time. Default: native frames.",
    ),
    click.option("--pool", **_choice(*POOLS), help="Pool clip vectors into a video vector."),
    click.option("--scores", is_flag=True, help="Also store class probabilities, per clip and per video."),
    click.option("--embedding-dtype", **_choice("float32", "float16"), help="Store vectors in this type."),
    click.option(
        "--precision",
        **_choice("fp32", "bf16", "fp16"),
        help="Run the network in this precision. fp16: CUDA only. `plan` compares bf16 with fp32.",
    ),
    click.option(
        "--decoder",
        **_choice("auto", "decord", "pyav", "nvdec"),
        help="Decode with this library. auto: the faster correct one of decord and PyAV. nvdec: on an NVIDIA GPU, "
        "whose colours differ.",
    ),
    click.option(
        "--partial", **_choice("fail", "keep"), help="Let a damaged video fail, or keep its readable beginning."
    ),
)
shard_videos_option = click.option(
    "--shard-videos",
    type=click.IntRange(1, 100_000),
    default=SHARD_VIDEOS,
    show_default=True,
    metavar="N",
    help="Put N videos into a shard, the unit of commit and resume.",
)
source_options = _apply(
    click.option(
        "--id-column",
        metavar="NAME",
        help="Take video ids from this column of a CSV or Parquet list. Default: ids made from paths.",
    ),
    click.option("--limit", type=click.IntRange(1), metavar="N", help="Take only the first N videos. Default: all."),
    shard_videos_option,
)
run_options = _apply(
    click.option(
        "--workers", type=click.IntRange(1), metavar="N", help="Start N workers. Default: one per GPU, else 1."
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        metavar="N",
        help=f"Embed N clips at a time. Default: {GPU_BATCH} on a GPU, {CPU_BATCH} on a CPU.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(1),
        metavar="N",
        help="Use N threads per batch on a CPU. Default: half the cores.",
    ),
    click.option("--device", metavar="NAME", help="Compute on auto, cpu or cuda. Default: auto."),
    click.option(
        "--video-timeout",
        "video_timeout_s",
        type=click.FloatRange(min=0.1),
        metavar="SECONDS",
        help=f"Fail a video as decode_timeout after this long without frames. Default: {VIDEO_TIMEOUT_S:g}.",
    ),
    click.option(
        "--max-duration",
        "max_duration_s",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help=f"Fail longer videos as too_long, without decoding. Default: {MAX_DURATION_S:g} (one day).",
    ),
    click.option(
        "--max-pixels",
        type=click.IntRange(1),
        metavar="N",
        help=f"Fail videos with larger frames as too_large. Default: {MAX_PIXELS}.",
    ),
    click.option(
        "--max-file-bytes",
        type=click.IntRange(1),
        metavar="N",
        help=f"Fail larger files as too_large. Default: {MAX_FILE_BYTES >> 30} GiB.",
    ),
    click.option(
        "--max-decode-memory",
        type=click.IntRange(1),
        metavar="BYTES",
        help=f"Fail a video as decode_memory if its decode takes more. Default: {MAX_DECODE_MEMORY >> 30} GiB.",
    ),
    click.option(
        "--store-patience",
        "store_patience_s",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        help=f"Stop the job, resumable, after a store fails for this long. Default: {STORE_PATIENCE_S:g}.",
    ),
    click.option(
        "--max-failures",
        metavar="N|P%",
        help="Stop when more videos than this fail. Default: when over half of the first 200 fail for one reason.",
    ),
    click.option("--takeover", is_flag=True, help="Take over from a run that is still alive."),
    click.option("--json", "as_json", is_flag=True, help="Print the final status as one JSON object on stdout."),
)


def job_spec(typed: dict[str, Any]) -> JobSpec:
    """The options that determine the embeddings."""
    from p3d.jobs.planning.prepare import JobSpec

    return JobSpec(**{name: typed[name] for name in JobSpec.__slots__})


def options_of_run(
    typed: dict[str, Any], s3: StoreOptions, last: Epoch | None = None, there: Machines | None = None
) -> RunOptions:
    """The options of speed and fault tolerance. A resume inherits those of the last run, `last`, but not `s3`."""
    from p3d.jobs.planning.prepare import run_options
    from p3d.pipeline.recipe import MaxFailures, RunOptions

    given = {name: typed[name] for name in RunOptions.__slots__ if name in typed}
    given |= {"max_failures": MaxFailures.parse(typed["max_failures"]), "s3": s3}
    return run_options(last.options if last else {}, there=there, **given)


trust_option = click.option(
    "--trust",
    is_flag=True,
    help="Trust the job at OUT, as `p3d trust` does, and go on. Default: refuse somebody else's job.",
)


def source_option(what: str) -> Callable[[F], F]:
    """The option that names the source videos which a verb may open."""
    return click.option("--source", "source", metavar="ROOT", help=f"{what} Default: all if OUT is trusted, else none.")


def address_options(verb: Any) -> Any:
    """Add the options that say where to run."""
    for option in (  # the last one is shown first
        click.option("--detach", is_flag=True, help="Return once the job is submitted; needs --address http://."),
        click.option(
            "--address",
            metavar="WHERE",
            help="Run on a Ray cluster: auto, HOST:PORT, ray://HOST:PORT, or http://HEAD:8265 to run the driver there, "
            "too. Default: this machine.",
        ),
    ):
        verb = option(verb)
    return verb


STORE_OPTIONS = (
    "profile",
    "region",
    "endpoint_url",
    "addressing_style",
    "checksums",
    "requester_pays",
    "sse",
    "sse_kms_key_id",
)


def store_options(verb: F) -> F:
    """Add the options of verbs that use S3."""
    for option in (
        click.option("--profile", help="Use this AWS profile. Default: botocore's credential chain."),
        click.option("--region", help="Use this S3 region. Default: from the AWS configuration."),
        click.option("--endpoint-url", help="Use an S3 server other than AWS, such as http://127.0.0.1:9000."),
        click.option(
            "--addressing-style",
            type=click.Choice(ADDRESSING),
            default="auto",
            show_default=True,
            help="Put the bucket into the path or host of URLs.",
        ),
        click.option(
            "--checksums",
            type=click.Choice(CHECKSUMS),
            default="when_supported",
            show_default=True,
            help="Choose when_required for servers without S3's newer checksums, or whose ETags are not MD5.",
        ),
        click.option("--requester-pays", is_flag=True, help="Pay for reading from a requester-pays bucket."),
        click.option("--sse", type=click.Choice(SSE), help="Encrypt what is written to S3. Default: the bucket's."),
        click.option("--sse-kms-key-id", help="Encrypt with this KMS key; needs --sse aws:kms."),
    ):
        verb = option(verb)
    return verb


def store_options_of(typed: dict[str, Any]) -> StoreOptions:
    """The store options as typed. InputError if they are invalid or contain a password."""
    return StoreOptions(
        endpoint_url=typed["endpoint_url"],
        region=typed["region"],
        profile=typed["profile"],
        addressing=typed["addressing_style"],
        checksums=typed["checksums"],
        requester_pays=typed["requester_pays"],
        sse=typed["sse"],
        sse_kms_key_id=typed["sse_kms_key_id"],
    )


def options_typed(s3: StoreOptions) -> dict[str, Any]:
    """The values of the command line's options that give these store options, without the defaults."""
    names = {"addressing": "addressing_style"}
    fields = {name: getattr(s3, name) for name in StoreOptions.__slots__}
    return {names.get(name, name): value for name, value in fields.items() if value != getattr(DEFAULTS, name)}


def out_store(out: str, options: StoreOptions) -> Store:
    """The store of an OUT argument."""
    return open_store(out, options)
