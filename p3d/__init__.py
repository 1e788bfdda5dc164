"""P3D ResNet: the network that turns 16 frames into one 2048-d row, its weights, and the encoder that runs it.

    frames uint8 -> Encoder -> features float32            ClipRecipe describes how a frame is prepared before this
                       ^
    weights/ -> P3D  --+   (zoo: name -> network and recipe; P3D, or one of the baselines in its paper)

    p3d.pipeline   the data plane: from a video file to committed rows, and what is read back from them
    p3d.jobs       the control plane: planning, Ray, monitoring, the command line

The modules here do not depend on those two, nor on Ray or Parquet. Importing `p3d` does not import torch; the modules
that need torch are imported by name (`from p3d import zoo`).

Source: Qiu, Yao, Mei, "Learning Spatio-Temporal Representation with Pseudo-3D Residual Networks", ICCV 2017.
"""

from pathlib import Path
from typing import Any

if (Path(__file__).parent / "jobs").is_file():  # git without symbolic links writes each as a file that holds its target
    raise ImportError(
        "this checkout of p3d has no symbolic links, which p3d/jobs and p3d/pipeline are. Install p3d as a wheel "
        "(`pip install .`, not `pip install -e .`), or clone it again with `git clone -c core.symlinks=true`"
    )


def __getattr__(name: str) -> Any:
    """Look up `__version__` lazily: importing `importlib.metadata` takes longer than importing this whole package."""
    if name != "__version__":
        raise AttributeError(f"module 'p3d' has no attribute {name!r}")
    from importlib import metadata

    try:
        return metadata.version("p3d-embeddings")
    except metadata.PackageNotFoundError:  # a checkout on the path, or the copy that Ray sends to a cluster's nodes
        return "unknown"
