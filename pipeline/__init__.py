"""The data plane: from a video file to committed rows, and what can be read back from them.

Knows numpy, pyarrow and the decoders; never the network (`p3d.networks`), `p3d.jobs`, Ray or the command line.
"""

if __name__ != "p3d.pipeline":
    raise ImportError(f"import p3d.pipeline, not {__name__}: the folder pipeline/ is a part of the package p3d")
