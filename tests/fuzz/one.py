"""`python -m tests.fuzz.one SEED INDEX FILE`: writes one file of a campaign for inspection."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.fuzz.mutate import fuzzed

seed, index, path = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
what, content = fuzzed(seed, index)
path.write_bytes(content)
print(f"{path}: {what}, {len(content)} bytes")
