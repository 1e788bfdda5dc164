"""P3D ResNet: the network that turns 16 frames into one 2048-d row, its weights, and the encoder that runs it.

    frames uint8 -> Encoder -> features float32            ClipRecipe describes how a frame is prepared before this
                       ^
    weights/ -> P3D  --+   (zoo: name -> network and recipe; P3D, or one of the baselines in its paper)

This package does not depend on videos, frame files, Ray or Parquet. Importing it does not import torch; the modules
that need torch are imported by name (`from p3d import zoo`).

Source: Qiu, Yao, Mei, "Learning Spatio-Temporal Representation with Pseudo-3D Residual Networks", ICCV 2017.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Look up `__version__` lazily: importing `importlib.metadata` takes longer than importing this whole package."""
    if name != "__version__":
        raise AttributeError(f"module 'p3d' has no attribute {name!r}")
    from importlib import metadata

    try:
        return metadata.version("p3d-embeddings")
    except metadata.PackageNotFoundError:  # a checkout on the path, or the copy that Ray sends to a cluster's nodes
        return "unknown"
