"""Where an encode's time goes: each kind of convolution by oneDNN's own clock, with its arithmetic and its bytes.

    python -m bench.layers [--network p3d199] [--precision fp32] [--batch 1]

One thread, pinned to one core. A child encodes under ONEDNN_VERBOSE; its last encodes are read back by layer and stand
beside the best of as many measurements of the peak and of memory. oneDNN's clock is the wall's, so of each call the
shortest time counts: that which no other process cut into. Bytes are those of a layer's input, output, addend and
weights, each once: what must move at least if nothing of it was in a cache. "All else" is the encode's time outside
oneDNN: poolings, preparing the clips, Python, and torch around each call.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.peak import Peak
from bench.rounds import Report, Table

TURNS = 9
CHILD = """
import sys, time
from bench.model import frames_of
from p3d.encoder import Encoder
from p3d.weights import random_weights
name, precision, batch, turns = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
weights = random_weights(name, 0)
encoder = Encoder(weights, batch_size=batch, threads=1, precision=precision)
given = frames_of(weights, batch)
for turn in range(turns + 3):
    started = time.process_time()
    encoder.encode(*given)
    print("encoded", time.process_time() - started, flush=True)
"""


@dataclass(slots=True)
class Layer:
    """All calls of one kind of convolution in one encode."""

    calls: int = 0
    ms: float = 0
    macs: float = 0
    bytes: float = 0


def turns_of(text: str) -> Iterator[tuple[float, list[list[str]]]]:
    """(milliseconds, oneDNN's lines as fields) of each encode."""
    lines: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("encoded "):
            yield float(line.split()[1]) * 1e3, lines
            lines = []
        elif line.startswith("onednn_verbose") and ",exec," in line:
            lines.append(line.split(","))


def layer_of(fields: list[str], width: int) -> tuple[str, float, float]:
    """(kind, multiply-adds, bytes) of a convolution from oneDNN's problem: mb1_ic64oc256_id8od8kd1..."""
    size = defaultdict(lambda: 1, {k: int(v) for k, v in re.findall(r"(mb|[io][cdhw]|k[dhw])(\d+)", fields[-2])})
    taps = size["kd"] * size["kh"] * size["kw"]
    places = size["mb"] * size["od"] * size["oh"] * size["ow"]
    out, weights = places * size["oc"], taps * size["ic"] * size["oc"]
    given = size["mb"] * size["id"] * size["ih"] * size["iw"] * size["ic"]
    added = out if "sum" in fields[9] or "binary" in fields[9] else 0
    kind = f"{size['kd']}x{size['kh']}x{size['kw']}, {size['ic']} to {size['oc']}"
    kind += f", {size['od']}x{size['oh']}x{size['ow']}" + (" + sum" if added else "")
    return kind, places * weights, (given + out + added + weights) * width


def profile(name: str, precision: str, batch: int) -> tuple[dict[str, Layer], float]:
    """The layers of an encode, and the milliseconds of the whole; the shortest of TURNS."""
    words = [sys.executable, "-c", CHILD, name, precision, str(batch), str(TURNS)]
    text = subprocess.run(
        words, env={**os.environ, "ONEDNN_VERBOSE": "1"}, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    turns = list(turns_of(text))[-TURNS:]
    layers: dict[str, Layer] = defaultdict(Layer)
    for calls in zip(*(lines for _, lines in turns), strict=True):  # one call of the network, in every turn
        kind, macs, moved = calls[0][5], 0.0, 0.0
        if kind == "convolution":
            kind, macs, moved = layer_of(calls[0], 2 if precision == "bf16" else 4)
        layer = layers[kind]
        layer.calls += 1
        layer.ms += min(float(fields[-1]) for fields in calls)
        layer.macs += macs
        layer.bytes += moved
    return layers, min(ms for ms, _ in turns)


def table_of(name: str, precision: str, batch: int) -> Table:
    peak = Peak(1, time.process_time)
    macs_per_s, copied_per_s = (
        max(figure() for _ in range(TURNS)) for figure in (lambda: peak.macs_per_s(precision), peak.copied_per_s)
    )
    layers, whole_ms = profile(name, precision, batch)
    known_ms = sum(layer.ms for layer in layers.values())
    rows = [
        (
            kind,
            str(layer.calls),
            f"{layer.ms:.2f}",
            f"{layer.ms / whole_ms:.1%}",
            f"{layer.macs / layer.ms / 1e6:.0f}",
            f"{layer.macs / layer.ms * 1e3 / macs_per_s:.0%}",
            f"{layer.bytes / layer.ms / 1e6:.1f}",
        )
        for kind, layer in sorted(layers.items(), key=lambda item: -item[1].ms)
    ]
    macs = sum(layer.macs for layer in layers.values())
    rows.append(("all else", "", f"{whole_ms - known_ms:.2f}", f"{1 - known_ms / whole_ms:.1%}", "", "", ""))
    share = f"{macs / whole_ms * 1e3 / macs_per_s:.0%}"
    rows.append(("encode", "", f"{whole_ms:.2f}", "100%", f"{macs / whole_ms / 1e6:.0f}", share, ""))
    heading = f"{name}, {precision}, batch of {batch}, one thread; peak {macs_per_s / 1e9:.0f} GMAC/s, "
    heading += f"copies {copied_per_s / 1e9:.0f} GB/s"
    columns = ("kernel, channels, T x H x W", "calls", "ms", "of the whole", "GMAC/s", "of the peak", "GB/s")
    return Table(heading, columns, tuple(rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="p3d199")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("out"))
    given = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    report = Report("layers", "Where an encode's time goes")
    for precision in given.precision:
        report.add(table_of(given.network, precision, given.batch))
    print(f"\n{report.write(given.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
