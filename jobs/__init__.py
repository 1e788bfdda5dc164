"""The control plane: plans jobs, runs them on Ray, monitors them, and is the command line. Imports `p3d.pipeline`.

The Python API is in `p3d.jobs.api`; users call it as `p3d.launch`, `p3d.search` and so on.
"""

if __name__ != "p3d.jobs":
    raise ImportError(f"import p3d.jobs, not {__name__}: the folder jobs/ is part of the package p3d")
