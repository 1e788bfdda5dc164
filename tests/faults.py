"""The fault matrix: possible faults, by number. The tests that cover a row are found by their `fault` marks.

`docs/generate.py` makes the table of docs/explanation/reliability.md from this. `tests/test_faults.py` requires a test
for each row, or an explanation why it has no test.
"""

from __future__ import annotations

import ast
from pathlib import Path

FAULTS: dict[int, str] = {
    1: "kill -9 of the driver, at any moment",
    2: "SIGINT, SIGTERM",
    3: "kill -9 of a worker",
    4: "a worker dies after its commit, before its reply",
    5: "a worker that was given up continues",
    6: "a node or its raylet is lost",
    7: "the head of the cluster is lost",
    8: "Ray loses requests and replies",
    9: "the GPU runs out of memory",
    10: "a device error that does not go away",
    11: "the network gives NaN or infinity",
    12: "the machine runs out of memory during a decode",
    13: "a decoder crashes",
    14: "a decoder hangs",
    15: "a decoder hangs while it is closed",
    16: "broken, empty, truncated and foreign files",
    17: "frames that are silently repeated",
    18: "a container with wrong metadata: counts, rates, rotation",
    19: "a video that is too long or too large",
    20: "a decompression bomb",
    21: "playlists and protocols instead of videos",
    22: "links out of the source, FIFOs, devices, path traversal",
    23: "equal names in two folders; duplicates in a list",
    24: "names in any encoding, any S3 key",
    25: "a source that changes after planning, or while it is read",
    26: "a source that is missing or forbidden",
    27: "S3 answers 503, 500, 429 for a while",
    28: "S3 does not answer for minutes",
    29: "S3 responses that trickle or stall",
    30: "a body that is cut off or reset",
    31: "bytes that are corrupted in transit",
    32: "a create whose reply is lost",
    33: "409 for a create",
    34: "a store that ignores If-None-Match",
    35: "listings of many pages",
    36: "a full disk",
    37: "power loss",
    38: "fsync, link or close fails",
    39: "an output that cannot be written, or has no hard links",
    40: "clocks that jump or differ",
    41: "two resumes at once, a resume while running, takeover",
    42: "one output, a different recipe",
    43: "software upgraded between two runs",
    44: "job.json, a plan or a manifest edited or damaged",
    45: "a committed file damaged later",
    46: "credentials that expire during a job",
    47: "secrets in outputs, logs, errors",
    48: "weights that run code, or do not fit",
    49: "malicious lists",
    50: "Ray reachable from other machines",
    51: "names that control a terminal or fake a line",
    52: "shards made on other devices, or with other batch sizes or threads",
    53: "few file descriptors, few processes",
    54: "little shared memory",
    55: "an output that is unmounted, removed or exchanged during a job",
    56: "links, FIFOs, devices and huge files in an output",
    57: "records of an output that name files elsewhere",
    58: "stray, empty and half control files",
    59: "a lost clips file",
    60: "a full TMPDIR",
}
# rows that no test here can cover, or not yet, and why
UNTESTED: dict[int, str] = {}


def shown_by() -> dict[int, list[str]]:
    """Row -> `file::test` of the tests with its mark, read from their source."""
    found: dict[int, list[str]] = {row: [] for row in FAULTS}
    root = Path(__file__).resolve().parent
    for path in sorted(root.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                for row in _rows(node):
                    found.setdefault(row, []).append(f"{path.relative_to(root)}::{node.name}")
    return found


def _rows(test: ast.FunctionDef) -> list[int]:
    marks = [call for call in test.decorator_list if isinstance(call, ast.Call)]
    return [
        ast.literal_eval(row) for call in marks if ast.unparse(call.func) == "pytest.mark.fault" for row in call.args
    ]
