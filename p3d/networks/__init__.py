"""The networks: P3D (`model`), the 2-D residual network, and the baselines that the paper compares with."""
