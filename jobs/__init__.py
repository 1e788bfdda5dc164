"""The control plane: plans jobs, runs them on Ray, watches them, is the command line. Knows `p3d` and `pipeline`."""
