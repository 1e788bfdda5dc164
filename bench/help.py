"""How long `p3d --help` and `p3d status` take, from a cold process; median and spread of 15 rounds.

python -m bench.help [OUT]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench.rounds import seconds, take_turns

P3D = str(Path(sys.executable).with_name("p3d"))
ROUNDS = 15


def main() -> int:
    commands = [["--help"], *([["status", sys.argv[1]]] if len(sys.argv) > 1 else [])]
    arms = {
        f"p3d {words[0]}": seconds(
            lambda words=words: subprocess.run([P3D, *words], stdout=subprocess.DEVNULL, check=True)
        )
        for words in commands
    }
    found = take_turns(arms, ROUNDS, "s", warm=False)
    for arm in found.of:
        print(f"{arm}: {found.spread(arm)} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
