"""The on-disk format as docs/reference/format.md states it, against what p3d reads and writes."""
