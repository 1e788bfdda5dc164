"""Options that verbs share: of the recipe, the source, a run, a cluster and S3, and the records made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from p3d.pipeline.storage.store import ADDRESSING, CHECKSUMS, SSE, Store, StoreOptions
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


def _choice(*words: str) -> dict[str, Any]:
    return {"type": click.Choice(words), "default": words[0], "show_default": True}


recipe_options = _apply(
    click.option(
        "--weights",
        required=True,
        metavar="FILE|random:SEED",
        help="Our .safetensors, the authors' .caffemodel, the PyTorch port's .pth.tar, or random:SEED.",
    ),
    click.option("--model", help="Network (see `p3d models`); needed for random weights and checkpoints of baselines."),
    click.option(
        "--graph", type=click.Choice(["caffe", "port"]), help="The authors' graph or the port's. Default: the weights'."
    ),
    click.option(
        "--clips",
        default="every:16",
        show_default=True,
        metavar="RULE",
        help="every:STRIDE, uniform:COUNT or random:COUNT@SEED.",
    ),
    click.option(
        "--frame-step", type=click.IntRange(1), default=1, show_default=True, help="Every Nth frame in a clip."
    ),
    click.option(
        "--fps",
        type=click.FloatRange(min=0, min_open=True, max=240),
        metavar="R",
        help="Resample to R frames/s by time, so that clips of all videos span equal time. Default: as they are.",
    ),
    click.option("--pool", **_choice("mean", "max", "mean+max"), help="From clips to video."),
    click.option("--scores", is_flag=True, help="Also store the probability of each class, per clip and per video."),
    click.option("--embedding-dtype", **_choice("float32", "float16"), help="As stored."),
    click.option("--precision", **_choice("fp32", "bf16", "fp16"), help="Of the network. fp16: CUDA only."),
    click.option(
        "--decoder",
        **_choice("auto", "decord", "pyav", "nvdec"),
        help="auto: the faster of decord and PyAV that is right. nvdec: on an NVIDIA GPU, whose colours differ.",
    ),
    click.option("--partial", **_choice("fail", "keep"), help="A damaged video fails, or keeps its good beginning."),
)
source_options = _apply(
    click.option("--id-column", metavar="NAME", help="Column of a CSV or Parquet list that holds the video ids."),
    click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N videos."),
    click.option(
        "--shard-videos",
        type=click.IntRange(1, 100_000),
        default=64,
        show_default=True,
        help="Videos per shard, the unit of commit and of resume.",
    ),
)
run_options = _apply(
    click.option("--workers", type=click.IntRange(1), help="Default: one per GPU, else 1."),
    click.option("--batch-size", type=click.IntRange(1), help="Clips at a time. Default: 32 on a GPU, 4 on a CPU."),
    click.option("--threads", type=click.IntRange(1), help="Of a CPU worker's network. Default: half the cores."),
    click.option("--device", metavar="NAME", help="auto, cpu or cuda. Default: auto."),
    click.option(
        "--video-timeout",
        "video_timeout_s",
        type=click.FloatRange(min=0.1),
        metavar="SECONDS",
        help="Longest wait for the next frames of a video. Default: 300.",
    ),
    click.option(
        "--max-duration",
        "max_duration_s",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="Longer videos fail as too_long, undecoded. Default: 86400, a day.",
    ),
    click.option(
        "--max-pixels", type=click.IntRange(1), metavar="N", help="Larger frames fail as too_large. Default: 67108864."
    ),
    click.option(
        "--max-file-bytes",
        type=click.IntRange(1),
        metavar="N",
        help="Larger files fail as too_large. Default: 256 GiB.",
    ),
    click.option(
        "--max-decode-memory",
        type=click.IntRange(1),
        metavar="BYTES",
        help="A decode that takes more fails as decode_memory. Default: 4 GiB.",
    ),
    click.option(
        "--store-patience",
        "store_patience_s",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        help="How long a store may fail before the job stops, resumable. Default: 600.",
    ),
    click.option(
        "--max-failures",
        metavar="N|P%",
        help="Stop when more videos fail. Default: when over half of the first 200 fail for one reason.",
    ),
    click.option("--takeover", is_flag=True, help="Take over from a run that is still alive."),
    click.option("--json", "as_json", is_flag=True, help="The final status as one JSON object on stdout."),
)


def job_spec(typed: dict[str, Any]) -> JobSpec:
    """The options that decide the numbers."""
    from p3d.jobs.planning.prepare import JobSpec

    return JobSpec(**{name: typed[name] for name in JobSpec.__slots__})


def options_of_run(typed: dict[str, Any], last: Epoch | None = None, there: Machines | None = None) -> RunOptions:
    """The options that decide how fast and how patient; `last` is the run before, which a resume takes after."""
    from p3d.jobs.planning.prepare import run_options
    from p3d.pipeline.recipe import MaxFailures, RunOptions

    given = {name: typed[name] for name in RunOptions.__slots__ if name in typed}
    given |= {"max_failures": MaxFailures.parse(typed["max_failures"]), "s3": store_options_of(typed)}
    return run_options(last.options if last else {}, there=there, **given)


def address_options(verb: Any) -> Any:
    """Where to run."""
    for option in (  # the last one is shown first
        click.option("--detach", is_flag=True, help="With http://: return once it is submitted."),
        click.option(
            "--address",
            metavar="WHERE",
            help="A Ray cluster: auto, HOST:PORT, ray://HOST:PORT, or http://HEAD:8265 to run the driver there, too. "
            "Default: this machine.",
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
    """The options of verbs that touch S3."""
    for option in (
        click.option("--profile", help="AWS profile; credentials come from botocore's own chain."),
        click.option("--region", help="S3 region."),
        click.option("--endpoint-url", help="S3 server other than AWS, such as http://127.0.0.1:9000."),
        click.option(
            "--addressing-style", type=click.Choice(ADDRESSING), default="auto", help="Bucket in path or host."
        ),
        click.option(
            "--checksums",
            type=click.Choice(CHECKSUMS),
            default="when_supported",
            help="when_required: for servers without S3's newer checksums, or whose ETags are no MD5.",
        ),
        click.option("--requester-pays", is_flag=True, help="Pay for reading from a requester-pays bucket."),
        click.option("--sse", type=click.Choice(SSE), help="Encryption of what is written to S3."),
        click.option("--sse-kms-key-id", help="KMS key, with --sse aws:kms."),
    ):
        verb = option(verb)
    return verb


def store_options_of(typed: dict[str, Any]) -> StoreOptions:
    """The options above, taken from what was typed. InputError for what cannot be, or carries a password."""
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


def out_store(out: str, options: StoreOptions) -> Store:
    """The store of an OUT argument."""
    return open_store(out, options)
