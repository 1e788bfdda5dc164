"""The data plane: turns video files into committed rows, and reads them back.

Uses numpy, pyarrow and the decoders. Never imports the network (`p3d.networks`), `p3d.jobs`, Ray or the command line.
"""

if __name__ != "p3d.pipeline":
    raise ImportError(f"import p3d.pipeline, not {__name__}: the folder pipeline/ is part of the package p3d")
