"""Whether OpenMP's threads spin or sleep while they wait for each other, on cores that others want too.

    python -m bench.waiting [--busy 2] [--network p3d63] [--rounds 5]

Each arm is a process that encodes for some seconds on all cores, with OMP_WAIT_POLICY as torch finds it or set to
passive, alone or beside so many processes that only count. An arm's figure is clips/s by the wall.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench.rounds import Report, take_turns

CHILD = """
import sys, time
import torch
from bench.model import frames_of
from p3d.encoder import Encoder
from p3d.weights import random_weights
weights = random_weights(sys.argv[1], 0)
encoder = Encoder(weights, batch_size=2, threads=int(sys.argv[2]))
given = frames_of(weights, 2)
encoder.encode(*given)
started, clips = time.perf_counter(), 0
while time.perf_counter() < started + 3:
    encoder.encode(*given)
    clips += 2
print(clips / (time.perf_counter() - started))
"""


def arm(policy: dict[str, str], network: str, threads: int, busy: int) -> Callable[[], float]:
    def run() -> float:
        env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | policy
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            words = [sys.executable, "-c", CHILD, network, str(threads)]
            return float(subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout)
        finally:
            for other in others:
                other.kill()
                other.wait()

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=2)
    parser.add_argument("--network", default="p3d63")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("out"))
    given = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    policies = {"spinning": {}, "sleeping": {"OMP_WAIT_POLICY": "passive"}}  # not set, libgomp spins for a while
    arms = {
        f"{name}, {busy} beside": arm(policy, given.network, threads, busy)
        for busy in sorted({0, given.busy})
        for name, policy in policies.items()
    }
    report = Report("waiting", "Threads that wait for each other")
    found = take_turns(arms, given.rounds, "clips/s", warm=False)
    report.add(found.table(f"{given.network}, {threads} threads", "spinning, 0 beside"))
    ratio = found.ratio(f"sleeping, {given.busy} beside", f"spinning, {given.busy} beside")
    print(f"sleeping over spinning beside {given.busy}: {ratio}")
    print(f"\n{report.write(given.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
