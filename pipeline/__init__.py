"""The data plane: from a video file to committed rows, and what can be read back from them.

Knows numpy, pyarrow and the decoders; never the network (`p3d`), the control plane (`jobs`), Ray or the command line.
"""
