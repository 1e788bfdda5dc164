"""P3D: turn a video archive into embeddings.

    launch, resume, retry     embed the videos of a folder, a list or an S3 prefix into an output; continue; try again
    status, open_dataset      how far a job is; its rows as Arrow batches or numpy arrays
    relocate                  say that the source videos of an output have moved
    search                    the clips or videos of an output that are most similar to a video
    embed_file                embed one file without a job

docs/reference/api.md describes them. The package itself is P3D ResNet: the network that turns 16 frames into one 2048-d
row, its weights, and the encoder that runs it.

    frames uint8 -> Encoder -> features float32            ClipRecipe describes how a frame is prepared before this
                       ^
    weights/ -> P3D  --+   (zoo: name -> network and recipe; P3D, or one of the baselines in its paper)

    p3d.pipeline   the data plane: from a video file to committed rows, and what is read back from them
    p3d.jobs       the control plane: planning, Ray, monitoring, the command line

The modules here do not depend on those two, nor on Ray or Parquet. The one exception are the names of the Python API:
they are looked up in `p3d.jobs` when they are first used. Importing `p3d` loads neither that nor torch; the modules
that need torch are imported by name (`from p3d import zoo`).

Source: Qiu, Yao, Mei, "Learning Spatio-Temporal Representation with Pseudo-3D Residual Networks", ICCV 2017.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if (Path(__file__).parent / "jobs").is_file():  # git without symbolic links writes each as a file that holds its target
    raise ImportError(
        "this checkout of p3d has no symbolic links, which p3d/jobs and p3d/pipeline are. Install p3d as a wheel "
        "(`pip install .`, not `pip install -e .`), or clone it again with `git clone -c core.symlinks=true`"
    )

if TYPE_CHECKING:
    from p3d.jobs.api.dataset import Dataset, open_dataset, status
    from p3d.jobs.api.embed import EmbeddedVideo, embed_file
    from p3d.jobs.api.moves import relocate
    from p3d.jobs.api.runs import launch, resume, retry
    from p3d.jobs.api.search import search
    from p3d.pipeline.errors import JobError
    from p3d.pipeline.storage.store import StoreOptions

API = {
    "launch": "p3d.jobs.api.runs",
    "resume": "p3d.jobs.api.runs",
    "retry": "p3d.jobs.api.runs",
    "status": "p3d.jobs.api.dataset",
    "open_dataset": "p3d.jobs.api.dataset",
    "Dataset": "p3d.jobs.api.dataset",
    "embed_file": "p3d.jobs.api.embed",
    "EmbeddedVideo": "p3d.jobs.api.embed",
    "relocate": "p3d.jobs.api.moves",
    "search": "p3d.jobs.api.search",
    "StoreOptions": "p3d.pipeline.storage.store",
    "JobError": "p3d.pipeline.errors",
}
__all__ = [
    "Dataset",
    "EmbeddedVideo",
    "JobError",
    "StoreOptions",
    "embed_file",
    "launch",
    "open_dataset",
    "relocate",
    "resume",
    "retry",
    "search",
    "status",
]


def __getattr__(name: str) -> Any:
    """Look up the Python API, and `__version__`: importing `importlib.metadata` takes longer than this package."""
    if name in API:
        return getattr(import_module(API[name]), name)
    if name != "__version__":
        raise AttributeError(f"module 'p3d' has no attribute {name!r}")
    from importlib import metadata

    try:
        return metadata.version("p3d-embeddings")
    except metadata.PackageNotFoundError:  # a checkout on the path, or the copy that Ray sends to a cluster's nodes
        return "unknown"


def __dir__() -> list[str]:
    return sorted([*globals(), *API])
