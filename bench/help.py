"""How long `p3d --help` and `p3d status` take, from a cold process; median and spread of 15 rounds.

python bench/help.py [OUT]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

P3D = str(Path(sys.executable).with_name("p3d"))
ROUNDS = 15


def main() -> int:
    commands = [["--help"], *([["status", sys.argv[1]]] if len(sys.argv) > 1 else [])]
    for command in commands:
        seconds = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            subprocess.run([P3D, *command], stdout=subprocess.DEVNULL, check=True)
            seconds.append(time.perf_counter() - started)
        print(f"p3d {command[0]}: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
