"""The networks: P3D (`model`), the 2-D and 3-D residual networks (`resnet`), and the paper's other baselines."""
