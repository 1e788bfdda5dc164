"""P3D ResNet: the network that turns 16 frames into one 2048-d row, its weights, and the encoder that runs it.

    frames uint8 -> Encoder -> features float32            ClipRecipe says how a frame must look before it comes here
                       ^
    weights/ -> P3D  --+   (zoo: name -> network and recipe; P3D, or one of the networks its paper compares with)

This package knows nothing of videos, files of frames, Ray or Parquet, and importing it does not import torch: the
modules that need torch are imported by name (`from p3d import zoo`).

Source: Qiu, Yao, Mei, "Learning Spatio-Temporal Representation with Pseudo-3D Residual Networks", ICCV 2017.
"""
