"""P3D ResNet: the network that turns 16 frames into one 2048-d row, its weights, and the encoder that runs it.

    frames uint8 -> Encoder -> features float32            ClipRecipe says how a frame must look before it comes here
                       ^
    weights/ -> P3D  --+   (zoo: name -> network and recipe; P3D, or one of the networks its paper compares with)

This package knows nothing of videos, files of frames, Ray or Parquet, and importing it does not import torch: the
modules that need torch are imported by name (`from p3d import zoo`).

Source: Qiu, Yao, Mei, "Learning Spatio-Temporal Representation with Pseudo-3D Residual Networks", ICCV 2017.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """`__version__`, looked up when it is asked for: `importlib.metadata` takes longer to import than all of this."""
    if name != "__version__":
        raise AttributeError(f"module 'p3d' has no attribute {name!r}")
    from importlib import metadata

    try:
        return metadata.version("p3d-embeddings")
    except metadata.PackageNotFoundError:  # a checkout on the path, or the copy that Ray sends to a cluster's nodes
        return "unknown"
